"""Bilevel policy optimization (BLPO) with Nystrom hypergradients, for continuous actions, in one file.

Prakash, He, Goktas & Greenwald, "Bi-Level Policy Optimization with Nystrom Hypergradients", arXiv:2505.11714.
The actor (parameters theta) leads, the critic V (omega) follows. In every epoch over a rollout of B steps,
with advantages A and lambda-returns R:

    1. K_omega passes of critic steps on g = mean (R - V)^2, then A from that critic ("nesting")
    2. v = grad_omega f                     f: the leader's loss, -mean ratio (A + V), at ratio = 1
    3. x = (H + rho I)^{-1} v               H = grad^2_omega g, by the Nystrom method (nystrom.py)
    4. h = grad_theta f - (grad^2_theta,omega g) x        grad_theta f as in PPO: A normalised, clipped
    5. a pass of actor steps along -h

Steps along gradients are made on minibatches, drawn from all steps of the rollout; 2 and 3 take it whole.

g depends on theta through the distribution of the returns that the critic regresses on. The cross term is a
policy gradient, with w_k = grad V(s_k) . x and c_k = sum_{t <= k, same episode} (gamma lambda)^{k-t} w_t,

    (grad^2_theta,omega g) x = -(2/B) sum_k c_k A_k grad_theta log pi(a_k | s_k),    A = R - V_old here,

and costs one product with the actor's Jacobian. tests/test_math.py checks it, with visits held fixed. What
`diff ppo_continuous.py blpo_continuous.py` adds is marked `# BLPO:`; deviations: docs/hypergradient.md.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import support  # before the others, because it sets the number of threads, which torch reads when imported

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn

from jacobian import Adam, Array, Gaussian, flatten, jacobian_of, namespace, norm, on_device
from nystrom import gauss_newton_products, loss_hessian_products, solve  # BLPO:
from support import evaluation
from support.acting import numpy_policy
from support.command import start
from support.environments import Environments
from support.flags import Count, Name, Natural, NonNegative, NonNegativeOrInf, Positive, PositiveOrInf
from support.flags import RunFlags, Size, UnitInterval, UnitStep, UpTo1000
from support.run_folder import Metrics, Run, finite


@dataclass
class Args(RunFlags):
    env_id: Name = "Walker2d-v4"
    """Gymnasium id of an environment with a Box action space ("module:id" imports the module first)"""
    total_timesteps: Count = 1_000_000
    """environment steps in total, over all environments, rounded down to whole rollouts"""
    num_envs: Size = 8
    """parallel environments, N"""
    num_steps: Count = 256
    """steps of each environment per rollout, T"""
    num_minibatches: Count = 8
    """minibatches per epoch: must divide num_envs * num_steps"""
    update_epochs: Count = 10
    """epochs of an update, each with a pass of actor steps over the rollout"""
    actor_lr: UnitStep = 3e-4
    """Adam step size of the actor"""
    critic_lr: UnitStep = 1e-3
    """Adam step size of the critic"""
    anneal_lr: bool = True
    """decay both step sizes linearly to 0, over --anneal-timesteps if it is given"""
    hidden_size: Size = 64
    """width of the two hidden layers, in both networks"""
    gamma: UnitInterval = 0.99
    """discount factor"""
    gae_lambda: UnitInterval = 0.95
    """lambda of generalised advantage estimation"""
    norm_obs: bool = True
    """normalise observations by running statistics, shared by all environments"""
    norm_reward: bool = True
    """divide rewards by the running standard deviation of the discounted return"""
    norm_adv: bool = True
    """normalise advantages per minibatch"""
    clip_coef: UpTo1000 = 0.5
    """clip range of the probability ratio"""
    ent_coef: NonNegative = 0.0
    """weight of the entropy bonus"""
    max_grad_norm: UpTo1000 = 0.5
    """gradient norm at which each network's gradient is clipped"""
    # BLPO:
    nested_critic_steps: Count = 2
    """passes of critic steps over the rollout before each pass of actor steps (K_omega)"""
    ihvp: Literal["nystrom", "cg", "pcg", "none"] = "nystrom"
    """solver of (H + rho I) x = v; "pcg": CG preconditioned by Nystrom; "none": nesting, no hypergradient"""
    hypergradient: Literal["exact", "mean-c", "released"] = "exact"
    """"exact": the derivative for fixed visits of states; "released": the term of the authors' code;
    "mean-c": a control, in which the weights that tell steps apart are replaced by their mean"""
    nystrom_rank: Natural = 2
    """Hessian-vector products in the Nystrom sketch: more are more accurate"""
    nystrom_rho: Positive = 50.0
    """damping rho of the critic's Hessian (the poster's alpha), for every solver"""
    nystrom_sketch: Literal["krylov", "v-gaussian", "gaussian", "columns"] = "krylov"
    """what H multiplies: v and H v; v and Gaussian vectors; Gaussian vectors; unit vectors (the poster's)"""
    hessian: Literal["gauss-newton", "full"] = "gauss-newton"
    """products with the critic's Gauss-Newton matrix, or with its whole Hessian by double backward"""
    cg_iters: Count = 50
    """iterations of cg and pcg at most; they stop earlier at a relative residual of 1e-3"""
    implicit_bound: NonNegativeOrInf = 1.0
    """largest norm of the term that the hypergradient adds, relative to PPO's gradient (inf: unbounded)"""
    implicit_clip: PositiveOrInf = 0.5
    """clip range of the probability ratio in the term that the hypergradient adds (inf: unclipped)"""


def check_args(args: Args) -> None:
    """Rules between several flags; the range of a single one is part of its type."""
    rollout = args.num_envs * args.num_steps
    args.require("total_timesteps", args.total_timesteps >= rollout, f"be a rollout at least, {rollout}")
    divides = rollout % args.num_minibatches == 0
    args.require("num_minibatches", divides, f"divide num_envs * num_steps = {rollout}")
    meant = args.ihvp != "none" or args.hypergradient == "exact"
    args.require("hypergradient", meant, "be exact with --ihvp none, which has none")
    args.require("num_steps", rollout * args.num_steps < 2**29, "keep GAE's N x T x T numbers below 2^29")
    enough = rollout >= (2 if args.norm_adv else 1) * args.num_minibatches
    args.require("num_minibatches", enough, "leave two steps to a minibatch, or come with --no-norm-adv")


# Networks


def layer_init(layer: nn.Linear, std: float = math.sqrt(2)) -> nn.Linear:
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


def mlp(inputs: int, hidden: int, outputs: int, std: float) -> nn.Sequential:
    return nn.Sequential(
        layer_init(nn.Linear(inputs, hidden)),
        nn.Tanh(),
        layer_init(nn.Linear(hidden, hidden)),
        nn.Tanh(),
        layer_init(nn.Linear(hidden, outputs), std),
    )


class Actor(nn.Module):
    """Gaussian policy with a state-independent standard deviation."""

    def __init__(self, obs_dim: int, action_size: int, hidden: int = 64, device: str = "cpu"):
        super().__init__()
        self.log_std = nn.Parameter(torch.zeros(action_size))
        self.net = mlp(obs_dim, hidden, action_size, std=0.01)  # the mean
        self.vector = flatten(self, device)  # theta, log_std first: an array that the parameters are views of
        self.jacobian = jacobian_of(self.net)

    def policy(self, obs, actions):  # (B, obs_dim), (B, action_size)
        return Gaussian(self.jacobian(obs), self.vector[: len(self.log_std)], actions)

    def noise(self, *shape, generator=None):
        """What makes the mean a sample, (*shape, action_size)."""
        standard = torch.randn(*shape, len(self.log_std), generator=generator)
        return (standard * self.log_std.detach().exp().cpu()).numpy()

    @staticmethod
    def act(outputs, noise):
        """Actions (..., action_size) from the outputs of net; noise 0 gives the most likely ones."""
        return outputs + noise

    @staticmethod
    def for_env(actions, space):
        """What environments take, from actions (n, action_size)."""
        return actions.reshape(len(actions), *space.shape).clip(space.low, space.high)


class Critic(nn.Module):
    def __init__(self, obs_dim: int, hidden: int = 64, device: str = "cpu"):
        super().__init__()
        self.value = mlp(obs_dim, hidden, 1, std=1.0)
        self.vector = flatten(self, device)  # omega
        self.jacobian = jacobian_of(self.value)

    def forward(self, obs):  # (..., obs_dim) -> (...)
        return self.value(obs).squeeze(-1)


# Generalised advantage estimation


class Batch(NamedTuple):
    """B steps: a rollout of N environments, T steps each, or a minibatch of them."""

    obs: Array  # (B, obs_dim)
    actions: Array  # (B, action_size)
    logprobs: Array  # (B,), under the policy that acted
    advantages: Array  # (B,), under the critic as the iteration began; in actor steps, as it has responded
    returns: Array  # (B,), the lambda-returns of that critic: the regression targets
    weights: Array  # BLPO: (B,), the a_k of the implicit term


class Transitions(NamedTuple):
    """What GAE takes of a rollout of B steps, but for the values."""

    rewards: Array  # (B,)
    discounts: Array  # (B,): gamma, or 0 where the episode terminated (truncation does not count)
    Gamma: Array  # (N, T, T), by gae_matrix
    all_obs: Array  # (n, obs_dim): obs, then the true next ones that are not in obs
    next_rows: Array  # (B,), the row of all_obs of the next observation: none twice, so += is safe


def gae_matrix(done, gamma: float, gae_lambda: float, dtype=np.float32):
    """Gamma (N, T, T) with entry (t, k) = (gamma lambda)^(k-t) for k >= t in the same episode, else 0: GAE is
    Gamma delta. done (N, T) is true where an episode ended, by termination or truncation."""
    episode = done.cumsum(1) - done  # number of ends before step t
    T = done.shape[1]
    powers = ((gamma * gae_lambda) ** np.arange(T)).astype(dtype)
    padded = np.concatenate([np.zeros(T - 1, dtype), powers])
    decay = np.lib.stride_tricks.sliding_window_view(padded, T)[::-1]  # row t: t zeros, then powers
    return decay * (episode[:, :, None] == episode[:, None, :])


def with_next(obs, next_obs, cut):
    """all_obs and next_rows of Transitions, from obs and next_obs (B, obs_dim), and cut (B,), which is true
    where the next observation is not the next row of obs."""
    xp, B = namespace(obs), len(obs)
    next_rows = xp.arange(1, B + 1, device=obs.device)
    next_rows[cut] = xp.arange(B, B + int(cut.sum()), device=obs.device)
    return xp.concatenate([obs, next_obs[cut]]), next_rows


def along(Gamma, x):
    """Gamma x of each trajectory: (M, T, T), (B,) -> (B,)."""
    return (Gamma @ x.reshape(len(Gamma), -1, 1)).reshape(-1)


def gae(steps: Transitions, values):
    """A = Gamma delta (B,), delta = r + gamma (1 - terminated) V(s') - V(s), from V at all_obs (n,)."""
    delta = steps.rewards + steps.discounts * values[steps.next_rows] - values[: len(steps.rewards)]
    return along(steps.Gamma, delta)


def make_batch(rollout, actor: Actor, critic: Critic, args: Args) -> tuple[Batch, Transitions, float]:
    """Advantages and targets from the critic as it is now, and the share of their variance it explains."""
    *steps, done = rollout  # each (N, T, ...)
    cut = done.copy()
    cut[:, -1] = True
    Gamma = on_device(gae_matrix(done, args.gamma, args.gae_lambda, steps[0].dtype), args.device)
    steps = [on_device(x.reshape(-1, *x.shape[2:]), args.device) for x in (*steps, cut)]
    obs, next_obs, actions, rewards, terminated, cut = steps
    transitions = Transitions(rewards, args.gamma * (1 - terminated), Gamma, *with_next(obs, next_obs, cut))
    values = critic.jacobian(transitions.all_obs).outputs[:, 0]
    advantages = gae(transitions, values)
    returns = advantages + values[: len(obs)]
    explained_variance = 1 - float(advantages.var() / returns.var().clip(1e-12))
    logprobs = actor.policy(obs, actions).log_prob
    batch = Batch(obs, actions, logprobs, advantages, returns, 0 * returns)
    return batch, transitions, explained_variance


def minibatches(batch: Batch, args: Args, passes: int = 1):
    """Those of some passes over a batch, each in another order of its steps."""
    for _ in range(passes):
        # As an array, since NumPy takes a tensor of one element for a number
        rows = torch.randperm(len(batch.obs)).view(args.num_minibatches, -1).numpy()
        yield from map(Batch, *(x[rows] for x in batch))


# Losses, and their derivatives with respect to V or log pi


def critic_loss(values, returns):
    """Mean squared error of the values V (B,), without the factor one half, and d loss / d V (B,)."""
    error = values - returns
    return float(error @ error) / len(error), 2 / len(error) * error


def policy_loss(ratio, advantages, clip: float):
    """PPO's clipped surrogate, to be minimised, and d loss / d log pi(a|s) (B,): -ratio A / B where the
    unclipped term is at most the clipped one, which is constant, and 0 elsewhere."""
    unclipped = ratio * advantages
    clipped = ratio.clip(1 - clip, 1 + clip) * advantages
    loss = -float(namespace(ratio).minimum(unclipped, clipped).mean())
    return loss, (unclipped <= clipped) * unclipped / -len(ratio)


def standardized(x):
    centred = x - x.mean()
    return centred / (norm(centred) / math.sqrt(len(x) - 1) + 1e-8)


# BLPO: the hypergradient


def leader_gradient(J, advantages, batch: Batch, transitions: Transitions, actor: Actor, args: Args):
    """v = grad_omega f (p,), p parameters. A = Gamma delta with delta = r + discount V' - V, so that
    df/d delta = Gamma^T df/dA; then V receives -df/d delta, and V' discount * df/d delta.
    exact: f = -mean (A + V), the ratio taken as 1, so that df/dA = -1/B, and V has -1/B more.
    released: f is the clipped surrogate, in which the baseline -V of A counts, as in the authors' code."""
    xp, B = namespace(advantages), len(advantages)
    df_dA = xp.full_like(advantages, -1 / B)
    if args.hypergradient == "released":
        ratio = xp.exp(actor.policy(batch.obs, batch.actions).log_prob - batch.logprobs)
        clipped = ratio.clip(1 - args.clip_coef, 1 + args.clip_coef)
        df_dA *= xp.where(ratio * advantages <= clipped * advantages, ratio, clipped)
    df_ddelta = along(transitions.Gamma.swapaxes(1, 2), df_dA)
    df_dV = xp.zeros_like(J.outputs)
    df_dV[:B, 0] = -df_ddelta - (0 if args.hypergradient == "released" else 1 / B)
    df_dV[transitions.next_rows, 0] += transitions.discounts * df_ddelta
    return df_dV @ J


def curvature(critic: Critic, batch: Batch, J, args: Args):
    """The map u -> H u: the Hessian of g, or its Gauss-Newton part (2/B) J_B^T J_B, without the second
    derivative of V. J_B: the rows of J at the B observations, not those at the true next ones."""
    if args.hessian == "gauss-newton":
        weights = namespace(batch.returns).zeros_like(J.outputs[:, 0])
        weights[: len(batch.returns)] = 2 / len(batch.returns)
        return gauss_newton_products(J, weights)
    error = torch.as_tensor(batch.returns) - critic(torch.as_tensor(batch.obs))
    return loss_hessian_products(error.square().mean(), critic.parameters())


def solve_ihvp(H, v, args: Args, generator):
    """x = (H + rho I)^{-1} v (p,), and its correction ||x - v/rho|| / ||v/rho||; NaN if v or H is."""
    sketch = dict(rank=args.nystrom_rank, sketch=args.nystrom_sketch, generator=generator)
    return solve(args.ihvp, H, v, rho=args.nystrom_rho, cg_iters=args.cg_iters, **sketch)


def implicit_weights(J, x, advantages, batch: Batch, transitions: Transitions, args: Args):
    """The a_k (B,) of the implicit term -grad_theta mean_k ratio_k a_k, by the change J x of V along x.
    exact: a = -2 c A, with the A of the targets R (batch.advantages), makes it minus the cross term.
    mean-c: the same with the mean of all c in place of each.
    released: the authors subtract d/d eps grad_theta L2(theta, omega + eps x), L2 the sum over a trajectory
    of -2 min(ratio A, clip(ratio) A) e, with e = R - V: a = 2 T (A w - dA e), dA the change of A along x."""
    B = len(advantages)
    w = (J @ x)[:, 0]
    if args.hypergradient == "released":
        dA = gae(transitions._replace(rewards=0 * transitions.rewards), w)
        return 2 * args.num_steps * (advantages * w[:B] - dA * (batch.returns - J.outputs[:B, 0]))
    c = along(transitions.Gamma.swapaxes(1, 2), w[:B])
    return -2 * (c.mean() if args.hypergradient == "mean-c" else c) * batch.advantages


def implicit_derivative(ratio, mb: Batch, args: Args):
    """d loss / d log pi (B,) for the loss -mean_k ratio_k a_k. It is 0 where ratio_k has left its clip range
    in the direction in which a_k, or released A_k, drives it."""
    signs = mb.advantages if args.hypergradient == "released" else mb.weights
    upper, lower = 1 + args.implicit_clip, 1 - args.implicit_clip
    gate = namespace(ratio).where(signs > 0, ratio < upper, ratio > lower)
    return gate * mb.weights * ratio / -len(ratio)


def add_bounded(direct, implicit, bound: float):
    """direct + implicit (p,), the latter shrunk to bound * ||direct||, dropped if not finite; and metrics."""
    size, implicit_size = norm(direct), norm(implicit)
    if not math.isfinite(implicit_size):
        nothing = dict.fromkeys(("implicit_cosine", "implicit_norm_ratio", "implicit_bound_active"), math.nan)
        return direct, {"implicit_dropped": 1.0} | nothing
    limit = bound * size if bound < math.inf else math.inf  # 0 * inf is NaN
    scale = limit / implicit_size if implicit_size > limit else 1.0
    return direct + scale * implicit, {
        "implicit_dropped": 0.0,
        "implicit_cosine": float(direct @ implicit) / max(size * implicit_size, 1e-30),
        "implicit_norm_ratio": implicit_size / max(size, 1e-30),
        "implicit_bound_active": float(scale < 1),
    }


def train(args: Args, checkpoint: dict | None = None) -> Path:
    """Trains, writes the run folder and returns it; goes on from a checkpoint if there is one."""
    N, T = args.num_envs, args.num_steps
    iterations = args.total_timesteps // (N * T)
    envs = Environments(args, actions=gym.spaces.Box)
    torch.manual_seed(args.seed)
    actor = Actor(envs.obs_dim, envs.action_size, args.hidden_size, args.device)
    critic = Critic(envs.obs_dim, args.hidden_size, args.device)
    actor_adam = Adam(actor.vector, args.actor_lr, args.max_grad_norm)
    critic_adam = Adam(critic.vector, args.critic_lr, args.max_grad_norm)
    size = len(critic.vector)  # BLPO: known only now
    args.require("nystrom_rank", args.nystrom_rank <= size, f"be at most {size}, the critic's parameters")

    # All that the iterations to come depend on: a checkpoint is the state of these
    parts = dict(actor=actor, critic=critic, envs=envs, torch=torch.default_generator)
    parts |= dict(actor_adam=actor_adam, critic_adam=critic_adam)
    parts["sketch"] = torch.Generator(args.device).manual_seed(2**31 + args.seed)  # BLPO: its own stream

    # A rollout: N environments, T steps
    obs, next_obs = np.zeros((2, N, T, envs.obs_dim), np.float32)
    actions = np.zeros((N, T, envs.action_size), np.float32)
    rewards, terminated = np.zeros((2, N, T), np.float32)
    done = np.zeros((N, T), bool)
    rollout = (obs, next_obs, actions, rewards, terminated, done)

    with Run(args, iterations, parts, checkpoint) as run:  # a Stop raised in here ends it with one line
        envs.begin(run)  # first observations; of a resumed run, iterations() then restores the checkpoint
        lap = run.lap  # lap(phase) adds the time since the last lap to the phase; envs.step laps "env"
        for iteration in run.iterations():  # begins at the checkpoint, if any, and writes the next ones
            metrics = Metrics()
            if args.anneal_lr:
                left = 1 - iteration / ((args.anneal_timesteps or args.total_timesteps) // (N * T))
                actor_adam.lr, critic_adam.lr = left * args.actor_lr, left * args.critic_lr

            # Rollout. The policy acts in NumPy: PyTorch's cost per call outweighs a few observations
            net = numpy_policy(actor.net)
            noise = actor.noise(T, N)
            for t in range(T):
                obs[:, t] = envs.obs
                outputs = finite(net(envs.obs), "the policy has diverged: lower --actor-lr")
                actions[:, t] = actor.act(outputs, noise[t])
                lap("inference")
                step = envs.step(actor.for_env(actions[:, t], envs.action_space))
                next_obs[:, t], rewards[:, t], terminated[:, t], done[:, t] = step
                lap("bookkeeping")
            batch, transitions, explained_variance = make_batch(rollout, actor, critic, args)
            lap("bookkeeping")

            # Update
            for _ in range(args.update_epochs):
                # BLPO: 1. nesting: the critic best-responds before the actor moves
                for mb in minibatches(batch, args, passes=args.nested_critic_steps):
                    J = critic.jacobian(mb.obs)
                    loss, dloss_dV = critic_loss(J.outputs[:, 0], mb.returns)
                    critic_adam.step(dloss_dV[:, None] @ J)
                    metrics.add(skipped_updates=critic_adam.skipped, critic_loss=loss)
                J = critic.jacobian(transitions.all_obs)
                advantages = gae(transitions, J.outputs[:, 0])  # under its best response
                metrics.add(critic_loss_nested=critic_loss(J.outputs[: N * T, 0], batch.returns)[0])
                lap("critic")

                # BLPO: the weights of the hypergradient's implicit term
                weights = batch.weights
                if args.ihvp != "none":
                    v = leader_gradient(J, advantages, batch, transitions, actor, args)  # 2
                    H = curvature(critic, batch, J, args)
                    x, correction = solve_ihvp(H, v, args, parts["sketch"])  # 3
                    weights = implicit_weights(J, x, advantages, batch, transitions, args)
                    metrics.add(ihvp_correction=correction)
                    lap("hypergradient")

                for mb in minibatches(batch._replace(advantages=advantages, weights=weights), args):
                    # The actor's gradient: clipped surrogate, normalised advantages, entropy bonus
                    policy = actor.policy(mb.obs, mb.actions)
                    logratio = policy.log_prob - mb.logprobs
                    ratio = namespace(logratio).exp(logratio)
                    normalized = standardized(mb.advantages) if args.norm_adv else mb.advantages
                    loss, dloss_dlogp = policy_loss(ratio, normalized, args.clip_coef)
                    actor_grad = policy.gradient(dloss_dlogp, entropy_weight=-args.ent_coef)

                    # BLPO: the hypergradient h, along which the actor then steps (5)
                    if args.ihvp != "none":
                        lap("actor")
                        implicit = policy.gradient(implicit_derivative(ratio, mb, args))
                        actor_grad, info = add_bounded(actor_grad, implicit, args.implicit_bound)  # 4
                        metrics.add(**info)
                        lap("hypergradient")

                    actor_adam.step(actor_grad)
                    metrics.add(skipped_updates=actor_adam.skipped)
                    metrics.add(policy_loss=loss, approx_kl=(ratio - 1 - logratio).mean())
                    metrics.add(clip_fraction=(abs(ratio - 1) > args.clip_coef).sum() / len(ratio))
                    lap("actor")

            metrics.add(entropy=actor.policy(batch.obs, batch.actions).entropy())
            metrics.add(explained_variance=explained_variance)
            evaluated = evaluation.during_training(run, iteration, actor, envs, args)
            run.log_means(envs.steps, envs.statistics(), metrics, evaluated)
        evaluation.finish(run, actor, critic, envs, args)
    return run.folder


def main(argv: list[str] | None = None) -> Path | None:
    return start(Args, check_args, train, Actor, __doc__, argv)


if __name__ == "__main__":
    main()
