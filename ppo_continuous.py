"""Proximal policy optimization (PPO) for continuous actions, in one file: the baseline of blpo_continuous.py.

Schulman et al., "Proximal Policy Optimization Algorithms" (arXiv:1707.06347), with the details and default
flags of CleanRL's ppo_continuous_action.py: normalised advantages, orthogonal initialisation, annealing,
clipped value loss, joint gradient clipping. Deliberate deviations: the observation at a time limit
bootstraps; running statistics are shared by all environments, without the last observations of episodes;
actor and critic have an optimizer each (the same update, since Adam is separable); there is no target KL.

`diff ppo_continuous.py blpo_continuous.py` is the method; flags of a PPO that matches it: docs/benchmark.md.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import support  # before the others, because it sets the number of threads, which torch reads when imported

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn

from jacobian import Adam, Array, Gaussian, flatten, jacobian_of, namespace, norm, on_device
from support import evaluation
from support.acting import numpy_policy
from support.command import start
from support.environments import Environments
from support.flags import Count, Name, NonNegative, Positive, RunFlags, Size, UnitInterval, UnitStep, UpTo1000
from support.run_folder import Metrics, Run, finite


@dataclass
class Args(RunFlags):
    env_id: Name = "Walker2d-v4"
    """Gymnasium id of an environment with a Box action space ("module:id" imports the module first)"""
    total_timesteps: Count = 1_000_000
    """environment steps in total, over all environments, rounded down to whole rollouts"""
    num_envs: Size = 1
    """parallel environments, N"""
    num_steps: Count = 2048
    """steps of each environment per rollout, T"""
    num_minibatches: Count = 32
    """minibatches per epoch: must divide num_envs * num_steps"""
    trajectory_minibatches: bool = False
    """minibatches of neighbouring steps of an environment instead of steps drawn at random"""
    update_epochs: Count = 10
    """epochs of an update, each with a pass of actor steps over the rollout"""
    actor_lr: UnitStep = 3e-4
    """Adam step size of the actor"""
    critic_lr: UnitStep = 3e-4
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
    clip_coef: UpTo1000 = 0.2
    """clip range of the probability ratio"""
    ent_coef: NonNegative = 0.0
    """weight of the entropy bonus"""
    max_grad_norm: UpTo1000 = 0.5
    """gradient norm at which each network's gradient is clipped"""
    joint_grad_clip: bool = True
    """clip the gradient norm of both networks together"""
    vf_coef: Positive = 0.5
    """weight of the value loss, itself half a mean square"""
    clip_vloss: bool = True
    """clip the change of the value, too, by clip_coef"""


def check_args(args: Args) -> None:
    """Rules between several flags; the range of a single one is part of its type."""
    rollout = args.num_envs * args.num_steps
    args.require("total_timesteps", args.total_timesteps >= rollout, f"be a rollout at least, {rollout}")
    divides = rollout % args.num_minibatches == 0
    args.require("num_minibatches", divides, f"divide num_envs * num_steps = {rollout}")
    crossing = args.trajectory_minibatches and args.num_minibatches % args.num_envs > 0
    args.require("num_minibatches", not crossing, "be a multiple of num_envs with --trajectory-minibatches")
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
    advantages: Array  # (B,), under the critic as it was when the iteration began
    returns: Array  # (B,), the lambda-returns of that critic: the regression targets


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


def make_batch(rollout, actor: Actor, critic: Critic, args: Args) -> tuple[Batch, float]:
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
    return Batch(obs, actions, logprobs, advantages, returns), explained_variance


def minibatches(batch: Batch, args: Args, passes: int = 1):
    """Those of some passes over a batch, each in another order of its steps."""
    together = len(batch.obs) // args.num_minibatches if args.trajectory_minibatches else 1
    groups = torch.arange(len(batch.obs)).view(-1, together)  # of neighbours
    for _ in range(passes):
        # As an array, since NumPy takes a tensor of one element for a number
        rows = groups[torch.randperm(len(groups))].view(args.num_minibatches, -1).numpy()
        yield from map(Batch, *(x[rows] for x in batch))


# Losses, and their derivatives with respect to V or log pi


def critic_loss(values, returns):
    """Mean squared error of the values V (B,), without the factor one half, and d loss / d V (B,)."""
    error = values - returns
    return float(error @ error) / len(error), 2 / len(error) * error


def value_loss(values, mb: Batch, args: Args):
    """vf_coef / 2 times the mean squared error, and d loss / d V (B,). With --clip-vloss the
    error of a value held near the old one counts where it is larger."""
    error = values - mb.returns
    moves = 1.0  # d error / d value
    if args.clip_vloss:
        change = values - (mb.returns - mb.advantages)  # of the value, since the iteration began
        held = error - change + change.clip(-args.clip_coef, args.clip_coef)
        clipped = abs(held) > abs(error)
        error = namespace(error).where(clipped, held, error)
        moves = ~(clipped & (abs(change) > args.clip_coef))
    return args.vf_coef * 0.5 * float(error @ error) / len(error), args.vf_coef / len(error) * error * moves


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

    # All that the iterations to come depend on: a checkpoint is the state of these
    parts = dict(actor=actor, critic=critic, envs=envs, torch=torch.default_generator)
    parts |= dict(actor_adam=actor_adam, critic_adam=critic_adam)

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
            batch, explained_variance = make_batch(rollout, actor, critic, args)
            lap("bookkeeping")

            # Update
            for _ in range(args.update_epochs):
                for mb in minibatches(batch, args):
                    # The critic's gradient
                    J = critic.jacobian(mb.obs)
                    _, dloss_dV = value_loss(J.outputs[:, 0], mb, args)
                    critic_grad = dloss_dV[:, None] @ J
                    lap("critic")

                    # The actor's gradient: clipped surrogate, normalised advantages, entropy bonus
                    policy = actor.policy(mb.obs, mb.actions)
                    logratio = policy.log_prob - mb.logprobs
                    ratio = namespace(logratio).exp(logratio)
                    normalized = standardized(mb.advantages) if args.norm_adv else mb.advantages
                    loss, dloss_dlogp = policy_loss(ratio, normalized, args.clip_coef)
                    actor_grad = policy.gradient(dloss_dlogp, entropy_weight=-args.ent_coef)

                    if args.joint_grad_clip:
                        size = math.hypot(norm(actor_grad), norm(critic_grad))
                        shrink = min(1.0, args.max_grad_norm / (size + 1e-6)) if size < math.inf else 1.0
                        actor_grad, critic_grad = shrink * actor_grad, shrink * critic_grad
                    critic_adam.step(critic_grad)
                    metrics.add(skipped_updates=critic_adam.skipped)
                    actor_adam.step(actor_grad)
                    metrics.add(skipped_updates=actor_adam.skipped)
                    metrics.add(critic_loss=critic_loss(J.outputs[:, 0], mb.returns)[0])
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
