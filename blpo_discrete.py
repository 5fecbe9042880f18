"""Bilevel policy optimization (BLPO) with Nystrom hypergradients, for discrete actions, in one file.

Prakash, He, Goktas & Greenwald, "Bi-Level Policy Optimization with Nystrom Hypergradients" (arXiv:2505.11714). The actor
(parameters theta) leads, the critic (omega) follows. For every minibatch of whole trajectories (Algorithm 1):

    1. K_omega critic steps on g(theta, omega) = mean (R - V)^2, so that the critic best-responds first   ("nesting")
    2. v = grad_omega f                                  f: the leader's objective, differentiable in omega through GAE
    3. x = (H_q + rho I)^{-1} v                          H = grad^2_omega g, by the Nystrom method (nystrom.py)
    4. h = grad_theta f - (grad^2_theta,omega g) x       the hypergradient
    5. one actor step along -h

How g depends on theta: through the distribution of the returns that the critic regresses on. With w_k = grad V(s_k) . x and
c_k = sum_{t <= k, same episode} (gamma lambda)^{k-t} w_t the cross term is a policy gradient with weights of its own,

    (grad^2_theta,omega g) x = -(2/B) sum_k c_k A_k grad_theta log pi(a_k | s_k),

so that it costs one backward pass through the actor and no double one. tests/test_math.py proves it, sign included. The
products with H leave out the second derivatives of V (Gauss-Newton; --hessian full keeps them): no double backward at all.

The twin of blpo_continuous.py, from which it differs in the policy (a Categorical one), its default flags (nothing is
normalised by running statistics) and nothing else: `diff blpo_continuous.py blpo_discrete.py`.

Deliberate deviations: the step's own baseline is left out of v (the leader is the return, as on the poster; with the
baseline the total derivative opposes the policy gradient), and the implicit term, like that of the authors' released code,
has a looser clip, un-normalised advantages and a norm bounded by that of grad_theta f. README.md, "Which hypergradient?".
Blocks that ppo_discrete.py does not have are marked `# BLPO:`; `diff ppo_discrete.py blpo_discrete.py` is the method.
"""

import contextlib
import ctypes.util
import gc
import math
import os
import re
import signal
import sys
import time
import warnings
from collections import defaultdict, deque
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

# One thread is fastest for networks this small and lets seeds run side by side; NumPy and PyTorch read this when imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn

from nystrom import cg_ihvp, hessian_products, make_sketch, nystrom_ihvp, nystrom_solve  # BLPO:
from run_folder import Run, Stopwatch, check_places, env_state, evaluated, fail, misfit, parse_args, require, restore_env, resumed, say


@dataclass
class Args:
    env_id: str = "CartPole-v1"
    """Gymnasium id of an environment with a Discrete action space ("module:id" imports the module first)"""
    exp_name: str = Path(__file__).stem
    """name of the experiment, part of the run folder's name"""
    seed: int = 1
    """seed of the environments, the networks, the exploration noise and the minibatches"""
    total_timesteps: int = 500_000
    """environment steps in total, over all environments, rounded down to whole rollouts"""
    runs_dir: str = "runs"
    """folder that receives the run folder {env_id}__{exp_name}__{seed}__{unix time}"""
    checkpoint_every: int = 0
    """iterations between checkpoints (0: a twentieth of the run)"""
    resume: str = ""
    """run folder to continue in place from its last checkpoint, with the flags it was started with"""
    evaluate: str = ""
    """run folder whose policy to evaluate instead of training"""
    eval_episodes: int = 10
    """episodes of an evaluation: at the end, by --evaluate, by --eval-every (0: none)"""
    eval_every: int = 0
    """iterations between evaluations during training, which they leave untouched (0: none)"""
    eval_stochastic: bool = False
    """sample the actions of evaluations as in training, instead of taking the mean"""
    capture_video: bool = False
    """film the first three episodes of --evaluate (mp4, in the run folder)"""
    cuda: bool = False
    """train on the GPU; for networks of this size the CPU is faster"""
    track: bool = False
    """log to Weights and Biases too (WANDB_MODE=offline needs no account, WANDB_PROJECT names the project)"""
    num_envs: int = 4
    """parallel environments"""
    num_steps: int = 128
    """steps of each environment per rollout"""
    num_minibatches: int = 4
    """minibatches per epoch, of whole trajectories: must divide num_envs"""
    update_epochs: int = 4
    """passes over a rollout"""
    actor_lr: float = 2.5e-4
    """Adam step size of the actor"""
    critic_lr: float = 1e-3
    """Adam step size of the critic"""
    anneal_lr: bool = True
    """decay both step sizes linearly to 0 over the iterations"""
    hidden_size: int = 64
    """width of the two hidden layers, in both networks"""
    gamma: float = 0.99
    """discount factor"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation"""
    norm_obs: bool = False
    """normalise observations by running statistics, shared by all environments"""
    norm_reward: bool = False
    """divide rewards by the running standard deviation of the discounted return"""
    norm_adv: bool = True
    """normalise advantages per minibatch"""
    clip_coef: float = 0.2
    """clip range of the probability ratio"""
    ent_coef: float = 0.01
    """weight of the entropy bonus"""
    max_grad_norm: float = 0.5
    """gradient norm at which each network's gradient is clipped"""
    # BLPO:
    nested_critic_steps: int = 5
    """critic steps per actor step, K_omega"""
    ihvp: Literal["nystrom", "cg", "pcg", "none"] = "nystrom"
    """solver of step 3; "pcg" is CG preconditioned by the Nystrom sketch, "none" is nesting without a hypergradient"""
    hypergradient: Literal["exact", "released", "control"] = "exact"
    """"exact"; "released": as in the authors' code; "control": the plain advantage in place of the implicit weights"""
    nystrom_rank: int = 2
    """Hessian-vector products in the sketch"""
    nystrom_rho: float = 50.0
    """damping rho of the critic's Hessian (the poster's alpha), for every solver"""
    nystrom_sketch: Literal["krylov", "v-gaussian", "gaussian", "columns"] = "krylov"
    """what the Hessian is multiplied by (nystrom.py); "columns" is the poster's random column sampling"""
    hessian: Literal["gauss-newton", "full"] = "gauss-newton"
    """products with (2/B) J^T J, J the critic's Jacobian, or with all of the critic's Hessian, by double backward"""
    cg_iters: int = 50
    """iterations of cg and pcg at most; they stop earlier at a relative residual of 1e-3"""
    implicit_bound: float = 1.0
    """largest norm of the implicit term in units of that of grad_theta f (inf: unbounded)"""
    implicit_clip: float = math.inf
    """clip range of the probability ratio in the implicit term (inf: unclipped)"""


def check_args(args: Args) -> None:
    """Refuses what cannot work before any work starts; every message names the flag and the fix."""
    need = partial(require, args)
    need("be at least 1", lambda n: n >= 1, "total_timesteps", "num_steps", "num_minibatches", "update_epochs")
    need("lie between 1 and 4,096", lambda n: 1 <= n <= 4_096, "hidden_size", "num_envs")
    need("be 0 or positive", lambda n: n >= 0, "checkpoint_every", "eval_every")
    need("lie between 0 and 10,000", lambda n: 0 <= n <= 10_000, "eval_episodes")
    need("come with --evaluate and the folder of a run", lambda on: not on or args.evaluate, "capture_video")
    need("be empty with --evaluate: give one of them", lambda path: not (path and args.evaluate), "resume")
    need("be at least 1 with --evaluate and --eval-every", lambda n: n or not (args.evaluate or args.eval_every), "eval_episodes")
    need("lie in (0, 1]", lambda x: 0 < x <= 1, "actor_lr", "critic_lr")
    need("lie in (0, 1,000]", lambda x: 0 < x <= 1_000, "max_grad_norm", "clip_coef")
    need("lie in [0, 1]", lambda x: 0 <= x <= 1, "gamma", "gae_lambda")
    need("be 0 or positive, and finite", lambda x: 0 <= x < math.inf, "ent_coef")
    need("lie in [0, 2^31)", lambda n: 0 <= n < 2**31, "seed")
    need("have at most 100 characters", lambda name: len(name) <= 100, "exp_name", "env_id")
    small = f"keep num_envs * num_steps^2, the size of the GAE matrices, below 2^31, with --num-envs {args.num_envs}"
    need(small, lambda steps: args.num_envs * steps**2 < 2**31, "num_steps")
    # BLPO:
    need("be at least 1", lambda n: n >= 1, "nested_critic_steps", "cg_iters")
    need("be positive and finite", lambda x: 0 < x < math.inf, "nystrom_rho")
    need("be 0 or positive", lambda x: x >= 0, "nystrom_rank", "implicit_bound")
    need("be positive", lambda x: x > 0, "implicit_clip")

    rollout = args.num_envs * args.num_steps
    need(f"be at least one rollout, num_envs * num_steps = {rollout}", lambda n: n >= rollout, "total_timesteps")
    need(f"divide --num-envs {args.num_envs}", lambda n: args.num_envs % n == 0, "num_minibatches")
    need("leave two steps to a minibatch, or give --no-norm-adv", lambda n: not args.norm_adv or rollout >= 2 * n, "num_minibatches")
    need("be off: torch finds no GPU here", lambda on: not on or torch.cuda.is_available(), "cuda")
    if not args.evaluate:
        check_places(args.env_id, args.runs_dir)


def make_env(env_id: str, **options) -> gym.Env:
    env = gym.make(env_id, disable_env_checker=True, **options)
    if not (isinstance(env.observation_space, gym.spaces.Box) and len(env.observation_space.shape) == 1):
        env = gym.wrappers.FlattenObservation(env)  # dm_control's dictionaries, images
    return env


def make_envs(args: Args) -> list[gym.Env]:
    """A plain list: stepping it in a loop costs 7 microseconds per step less than SyncVectorEnv (README.md, "Speed")."""
    try:
        envs = [make_env(args.env_id) for _ in range(args.num_envs)]
        shapes = {np.shape(env.reset(seed=args.seed)[0]) for env in envs}
    except Exception as problem:  # whatever a foreign environment raises
        fail(f"--env-id {args.env_id} cannot be made: {problem}")
    obs_space, action_space = envs[0].observation_space, envs[0].action_space
    if isinstance(action_space, gym.spaces.Box):
        fail(f"--env-id {args.env_id} has continuous actions: use blpo_continuous.py")
    if not isinstance(action_space, gym.spaces.Discrete):
        fail(f"--env-id {args.env_id} has actions {action_space}: name an environment with a Discrete action space")
    if not isinstance(obs_space, gym.spaces.Box):
        fail(f"--env-id {args.env_id} has observations {obs_space}, which cannot be flattened: name another environment")
    if shapes != {obs_space.shape}:
        fail(f"--env-id {args.env_id} returns observations of shape {shapes.pop()}, not {obs_space.shape} as it says: repair it")
    return envs


class RunningMeanStd:
    """Mean and variance of a stream of batches, merged as in Chan et al. (1979)."""

    def __init__(self, shape=()):
        self.mean, self.var, self.count = np.zeros(shape), np.ones(shape), 1e-4

    def update(self, x):  # (n, *shape)
        mean, total = x.mean(0), self.count + len(x)
        delta = mean - self.mean
        m2 = self.var * self.count + ((x - mean) ** 2).sum(0) + delta**2 * self.count * len(x) / total
        self.mean, self.var, self.count = self.mean + delta * len(x) / total, m2 / total, total

    def normalize(self, x):
        return np.clip((x - self.mean) / np.sqrt(self.var + 1e-8), -10, 10)

    def state_dict(self):
        return {name: torch.as_tensor(value, dtype=torch.float64) for name, value in vars(self).items()}

    def load_state_dict(self, state):
        vars(self).update({name: value.numpy() for name, value in state.items()})


def layer_init(layer: nn.Linear, std: float = math.sqrt(2)) -> nn.Linear:
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


def mlp(inputs: int, hidden: int, outputs: int, std: float) -> nn.Sequential:
    layers = [layer_init(nn.Linear(inputs, hidden)), nn.Tanh(), layer_init(nn.Linear(hidden, hidden)), nn.Tanh()]
    return nn.Sequential(*layers, layer_init(nn.Linear(hidden, outputs), std))


class Actor(nn.Module):
    """Categorical policy."""

    def __init__(self, obs_dim: int, action_count: int, hidden: int = 64):
        super().__init__()
        self.net = mlp(obs_dim, hidden, action_count, std=0.01)  # the logits

    def log_prob(self, obs, actions):  # (..., obs_dim), (...) -> (...)
        return self.net(obs).log_softmax(-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)

    def entropy(self, obs):  # (..., obs_dim) -> (), the mean
        logprobs = self.net(obs).log_softmax(-1)
        return -(logprobs.exp() * logprobs).sum(-1).mean()

    def noise(self, *shape, generator=None):
        """Gumbel noise, (*shape, action_count): the largest of logits + noise is a sample of their softmax."""
        return -torch.empty(*shape, self.net[-1].out_features).exponential_(generator=generator).log().numpy()

    @staticmethod
    def act(outputs, noise):
        """Actions (...) from the net's outputs; noise 0 gives the most likely ones."""
        return (outputs + noise).argmax(-1)

    @staticmethod
    def for_env(actions, space):
        """What environments take, from actions (n,)."""
        return [int(action) for action in actions + space.start]


def numpy_policy(net: nn.Sequential):
    """The map from observations (n, obs_dim) to net's outputs without PyTorch, whose cost per call outweighs a few observations."""
    layers = [(layer.weight.detach().cpu().numpy().T, layer.bias.detach().cpu().numpy()) for layer in net[::2]]

    def policy(x):
        for W, b in layers[:-1]:
            x = np.tanh(x @ W + b)
        W, b = layers[-1]
        return x @ W + b

    return policy


class Critic(nn.Module):
    def __init__(self, obs_dim: int, hidden: int = 64):
        super().__init__()
        self.value = mlp(obs_dim, hidden, 1, std=1.0)

    def forward(self, obs):  # (..., obs_dim) -> (...)
        return self.value(obs).squeeze(-1)


class Batch(NamedTuple):
    """A rollout, or the trajectories of it that make a minibatch: N environments, T steps."""

    obs: torch.Tensor  # (N, T, obs_dim)
    next_obs: torch.Tensor  # BLPO: (N, T, obs_dim), the true next state, also where an episode ended
    actions: torch.Tensor  # (N, T)
    rewards: torch.Tensor  # BLPO: (N, T)
    terminated: torch.Tensor  # BLPO: (N, T), 1. where the episode terminated (truncation does not count)
    cut: torch.Tensor  # BLPO: (N, T), True where next_obs is not the next step's obs: episode ends and the last step
    gae_matrix: torch.Tensor  # BLPO: (N, T, T)
    logprobs: torch.Tensor  # (N, T), under the policy that acted
    advantages: torch.Tensor  # (N, T), under the critic as it was when the iteration began
    returns: torch.Tensor  # (N, T), the lambda-returns of that critic: the regression targets


def gae_matrix(done, gamma: float, gae_lambda: float):
    """Gamma (N, T, T) with entry (t, k) = (gamma lambda)^(k-t) for k >= t in the same episode, else 0: GAE = Gamma delta.

    done (N, T) is true where an episode ended, by termination or truncation.
    """
    episode = done.cumsum(1) - done.to(torch.long)  # number of ends before step t
    steps = torch.arange(done.shape[1], device=done.device)
    lag = steps[None, :] - steps[:, None]
    decay = ((gamma * gae_lambda) ** steps.to(torch.get_default_dtype()))[lag.clamp_min(0)] * (lag >= 0)
    return decay * (episode[:, :, None] == episode[:, None, :])


def stacked_obs(obs, next_obs, cut):
    """obs (N, T, obs_dim), then next_obs where it is not the next obs: what V is needed at, (n, obs_dim)."""
    return torch.cat([obs.flatten(0, 1), next_obs[cut]])


def split_values(stacked, cut):
    """V(s_t) and V(s'_t), both (N, T), from V at stacked_obs."""
    values = stacked[: cut.numel()].view_as(cut)
    return values, values.roll(-1, 1).masked_scatter(cut, stacked[cut.numel() :])


def gae(rewards, values, next_values, terminated, matrix, gamma: float):
    """A = Gamma delta, delta = r + gamma (1 - terminated) V(s') - V(s), all (N, T); linear and differentiable in V."""
    delta = rewards + gamma * (1 - terminated) * next_values - values
    return (matrix @ delta.unsqueeze(-1)).squeeze(-1)


def critic_loss(values, returns):
    """Mean squared error of the value, without the factor one half."""
    return (returns - values).square().mean()


def policy_loss(ratio, advantages, clip: float):
    """PPO's clipped surrogate, to be minimised."""
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).mean()


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def flatten(module: nn.Module) -> nn.Parameter:
    """All of module's parameters as one flat vector, of which they become parts: an optimizer then moves one tensor, not seven."""
    vector = nn.Parameter(flat(module.parameters()).detach())
    for p, part in zip(module.parameters(), vector.detach().split([p.numel() for p in module.parameters()])):
        p.data = part.view_as(p)
    return vector


def apply_gradient(optimizer, gradient, max_norm: float) -> float:
    """An optimizer step along a flat gradient, clipped to max_norm; a non-finite one is refused. Returns 1. if so, else 0."""
    norm = float(gradient.norm())
    if not math.isfinite(norm):
        return 1.0
    optimizer.param_groups[0]["params"][0].grad = gradient * min(1.0, max_norm / (norm + 1e-6))
    optimizer.step()
    return 0.0


# BLPO: a flat vector as parameters again
def unflat(vector, module: nn.Module) -> dict[str, torch.Tensor]:
    parts = vector.split([p.numel() for p in module.parameters()])
    return {name: part.view_as(p) for (name, p), part in zip(module.named_parameters(), parts)}


# BLPO: steps 2 to 4
class Jacobian:
    """J (n, p), the derivatives of the critic's values at n observations by its parameters, layer by layer.

    For a layer y = W a + b they are dV_n/dW = g_n a_n^T and dV_n/db = g_n with g_n = dV_n/dy_n, which one backward pass
    gives for all n: products with J and its transpose then are a few matrix products, and no autograd.
    """

    def __init__(self, critic: nn.Module, obs):
        y, inputs, outputs = obs, [], []
        for layer in critic.value:
            a, y = y.detach(), layer(y)
            if isinstance(layer, nn.Linear):
                inputs.append(a)
                outputs.append(y)
        self.values = y.detach().squeeze(-1)  # (n,)
        self.layers = list(zip(inputs, torch.autograd.grad(y.sum(), outputs)))  # a (n, in) and g (n, out)
        self.sizes = [size for a, g in self.layers for size in (g.shape[1] * a.shape[1], g.shape[1])]

    def __matmul__(self, u):  # J u: (p,) -> (n,)
        parts, total = iter(u.split(self.sizes)), 0
        for a, g in self.layers:
            W, b = next(parts).view(-1, a.shape[1]), next(parts)
            total = total + (torch.addmm(b, a, W.T) * g).sum(1)
        return total

    def transposed(self, s):  # J^T s: (n,) -> (p,)
        weighted = [(a, s[:, None] * g) for a, g in self.layers]
        return flat(part for a, g in weighted for part in (g.T @ a, g.sum(0)))


# BLPO: step 3
def solve_ihvp(product, v, args: Args, generator):
    """x = (H + rho I)^{-1} v by the solver of --ihvp; NaN where v or H is not finite, so that the term is dropped."""
    rank, rho, sketch = args.nystrom_rank, args.nystrom_rho, args.nystrom_sketch
    try:
        if args.ihvp == "nystrom":
            return nystrom_ihvp(product, v, rank, rho, sketch, generator)
        precondition = None
        if args.ihvp == "pcg":
            omega, Y = make_sketch(sketch, product, v, rank, generator)
            precondition = lambda r: nystrom_solve(Y, omega, r, rho)[0]
        return cg_ihvp(product, v, rho, args.cg_iters, 1e-3, precondition)
    except ValueError:
        return torch.full_like(v, math.nan), {"correction": math.nan}


# BLPO: step 3
def curvature(critic, mb: Batch, J: Jacobian, args: Args):
    """The map u -> H u: the Hessian of g, or its Gauss-Newton part (2/B) J^T J, without the second derivatives of V."""
    if args.hessian == "full":

        def grad_fn(w):
            values = torch.func.functional_call(critic, unflat(w, critic), (mb.obs,))
            return torch.autograd.grad(critic_loss(values, mb.returns), w, create_graph=True)[0]

        return hessian_products(grad_fn, flat(critic.parameters()))
    B = mb.returns.numel()
    mean = torch.zeros_like(J.values)  # over the B observations, not the true next ones that follow them
    mean[:B] = 2 / B

    def product(u):
        if u.ndim == 2:
            return torch.stack([product(column) for column in u.T], 1)
        return J.transposed(mean * (J @ u))

    return product


# BLPO: steps 2 to 4, up to the actor's backward pass
def implicit_weights(critic: nn.Module, mb: Batch, ratio, args: Args, generator):
    """Advantages of the current critic and the a_k of the implicit term -grad_theta mean_k rho_k a_k, all (M, T).

    exact: v = -grad mean(A + V), the lambda-return, and a = -2 c A makes the implicit term minus the cross term.
    released: v = grad f, baseline included, and the term subtracted is the authors' d/d eps grad_theta L2(theta, omega + eps x)
    with L2 = -2 sum_t min(rho A, clip(rho) A) (R - V), so that a = 2 T (A w - dA e), e = R - V, dA the change of A along x.
    control: a = A, no hypergradient at all.
    """
    obs, plain = stacked_obs(mb.obs, mb.next_obs, mb.cut), args.ihvp == "none" or args.hypergradient == "control"
    J = None if plain else Jacobian(critic, obs)
    outputs = critic(obs).detach() if plain else J.values.requires_grad_()
    values, next_values = split_values(outputs, mb.cut)
    advantages = gae(mb.rewards, values, next_values, mb.terminated, mb.gae_matrix, args.gamma)
    info = {"critic_loss_nested": float(critic_loss(values.detach(), mb.returns))}
    if plain:
        return advantages, advantages, info

    if args.hypergradient == "exact":
        leader = -(advantages + values).mean()
    else:
        leader = policy_loss(ratio.detach(), advantages, args.clip_coef)
    v = J.transposed(torch.autograd.grad(leader, outputs)[0])  # the chain rule, GAE's part by autograd
    x, ihvp_info = solve_ihvp(curvature(critic, mb, J, args), v, args, generator)
    info["ihvp_correction"] = ihvp_info["correction"]

    change, next_change = split_values(J @ x, mb.cut)  # w_t = grad V(s_t) . x, and the same at s'_t
    values, advantages = values.detach(), advantages.detach()
    if args.hypergradient == "exact":
        c = (mb.gae_matrix.transpose(1, 2) @ change.unsqueeze(-1)).squeeze(-1)
        return advantages, -2 * c * mb.advantages, info
    change_a = gae(torch.zeros_like(values), change, next_change, mb.terminated, mb.gae_matrix, args.gamma)
    weights = 2 * values.shape[1] * (advantages * change - change_a * (mb.returns - values))
    return advantages, weights, info


# BLPO: step 4
def implicit_loss(ratio, weights, sign, clip: float):
    """Its gradient is the implicit term, with the gate of min(rho A, clip(rho) A) for an A of the given sign."""
    gate = torch.where(sign > 0, ratio < 1 + clip, ratio > 1 - clip)
    return -(gate * weights * ratio).mean()


# BLPO: step 4
def hypergradient(direct, ratio, weights, advantages, actor_params, args: Args):
    """h = grad_theta f + the implicit term, flat, and its metrics; direct is grad_theta f, flat too."""
    sign = weights if args.hypergradient == "exact" else advantages
    implicit = torch.autograd.grad(implicit_loss(ratio, weights, sign, args.implicit_clip), actor_params)
    return add_bounded(direct, flat(implicit), args.implicit_bound)


# BLPO: step 4
def add_bounded(direct, implicit, bound: float):
    """direct + implicit (flat vectors), the latter shrunk to the norm bound * ||direct||, or dropped if not finite."""
    norm, implicit_norm = float(direct.norm()), float(implicit.norm())
    if not math.isfinite(implicit_norm):
        info = ("implicit_cosine", "implicit_norm_ratio", "implicit_bound_active")
        return direct, {"implicit_dropped": 1.0} | dict.fromkeys(info, math.nan)
    limit = bound * norm if bound < math.inf else math.inf
    scale = limit / implicit_norm if implicit_norm > limit else 1.0
    return direct + scale * implicit, {
        "implicit_dropped": 0.0,
        "implicit_cosine": float(direct @ implicit) / max(norm * implicit_norm, 1e-30),
        "implicit_norm_ratio": implicit_norm / max(norm, 1e-30),
        "implicit_bound_active": float(scale < 1),
    }


def evaluate(actor: Actor, obs_rms: RunningMeanStd | None, args: Args, videos: Path | None = None):
    """Returns and lengths of --eval-episodes whole episodes, of 100,000 steps at most, under frozen statistics."""
    env, policy = make_env(args.env_id, **(dict(render_mode="rgb_array") if videos else {})), numpy_policy(actor.net)
    if videos:
        name = re.sub(r"[^\w.-]+", "-", args.env_id)
        env = gym.wrappers.RecordVideo(env, str(videos), lambda episode: episode < 3, name_prefix=name, disable_logger=True)
    returns, lengths = np.zeros(args.eval_episodes), np.zeros(args.eval_episodes, dtype=int)
    generator = torch.Generator().manual_seed(args.seed)  # training has a generator and seeds of its own
    for episode, seed in enumerate(np.random.SeedSequence([args.seed, 1]).generate_state(args.eval_episodes).tolist()):
        obs, _ = env.reset(seed=seed)
        done = False
        while not done and lengths[episode] < 100_000:
            obs = obs_rms.normalize(obs) if obs_rms else obs
            noise = actor.noise(1, generator=generator) if args.eval_stochastic else 0.0
            action = actor.act(policy(np.asarray(obs, np.float32)[None]), noise)
            obs, reward, terminated, truncated, _ = env.step(actor.for_env(action, env.action_space)[0])
            returns[episode] += reward
            lengths[episode] += 1
            done = terminated or truncated
    env.close()
    return returns, lengths


def summary(args: Args, returns, lengths) -> str:
    kind = f"{args.eval_episodes} {'stochastic' if args.eval_stochastic else 'deterministic'} episodes"
    spread = f"{returns.mean():.1f} ± {returns.std():.1f} ({returns.min():.1f} to {returns.max():.1f})"
    return f"evaluation, {kind}: return {spread}, length {lengths.mean():.0f} ({lengths.min()} to {lengths.max()})"


def evaluate_run(args: Args, path: Path, saved: dict) -> None:
    """--evaluate: the policy of a finished run, or of the last checkpoint."""
    try:
        actor = Actor(saved["actor"]["net.0.weight"].shape[1], len(saved["actor"]["net.4.bias"]), args.hidden_size)
        actor.load_state_dict(saved["actor"])
        obs_rms = RunningMeanStd() if args.norm_obs else None
        if args.norm_obs:
            obs_rms.load_state_dict(saved["obs_rms"])
    except (KeyError, RuntimeError) as problem:
        misfit("--evaluate", path, problem)
    if args.capture_video and sys.platform == "linux":  # without a screen; read when mujoco is imported
        os.environ.setdefault("MUJOCO_GL", "egl" if ctypes.util.find_library("EGL") else "osmesa")
    videos = path.parent / "videos" if args.capture_video else None
    try:
        returns, lengths = evaluate(actor, obs_rms, args, videos)
    except Exception as problem:  # whatever a foreign environment or its renderer raises
        fail(f"--evaluate {path.parent}: {args.env_id} failed: {type(problem).__name__}: {problem}", status=1)
    say(summary(args, returns, lengths) + (f"; videos in {videos}" if videos else ""))


def train(args: Args, checkpoint: dict | None = None) -> Path:
    """Trains, writes the run folder and returns it; goes on from a checkpoint if there is one."""
    envs = make_envs(args)
    N, T = args.num_envs, args.num_steps
    obs_dim, action_space = envs[0].observation_space.shape[0], envs[0].action_space
    action_count = int(action_space.n)
    device = torch.device("cuda" if args.cuda else "cpu")
    torch.manual_seed(args.seed)
    actor = Actor(obs_dim, action_count, args.hidden_size).to(device)
    critic = Critic(obs_dim, args.hidden_size).to(device)
    actor_params, critic_params = list(actor.parameters()), list(critic.parameters())
    actor_optimizer = torch.optim.Adam([flatten(actor)], lr=args.actor_lr, eps=1e-5, fused=True)
    critic_optimizer = torch.optim.Adam([flatten(critic)], lr=args.critic_lr, eps=1e-5, fused=True)
    if args.nystrom_rank > (size := flat(critic_params).numel()):  # BLPO:
        fail(f"--nystrom-rank must be at most {size}, the number of the critic's parameters, got {args.nystrom_rank}")

    obs_rms = RunningMeanStd(obs_dim) if args.norm_obs else None
    return_rms = RunningMeanStd()
    buffer = lambda *shape, dtype=np.float32: np.zeros((N, T, *shape), dtype)
    obs, next_obs, actions = buffer(obs_dim), buffer(obs_dim), buffer(dtype=np.int64)
    rewards, terminated, truncated, done = buffer(), buffer(), np.zeros(N, dtype=bool), buffer(dtype=bool)
    discounted_return, episode_return, episode_length = np.zeros(N), np.zeros(N), np.zeros(N, dtype=int)
    now_obs, recent, episodes, begun, earlier = buffer(obs_dim)[:, 0], deque(maxlen=100), 0, 0, 0.0
    normalize = obs_rms.normalize if args.norm_obs else lambda x: x
    raw_obs, last_obs, reward = np.zeros((N, obs_dim)), np.zeros((N, obs_dim)), np.zeros(N)
    iterations, seconds = args.total_timesteps // (N * T), defaultdict(float)
    checkpoint_every = args.checkpoint_every or math.ceil(iterations / 20)
    parts = dict(actor=actor, critic=critic, actor_optimizer=actor_optimizer, critic_optimizer=critic_optimizer)
    parts |= dict(return_rms=return_rms) | (dict(obs_rms=obs_rms) if args.norm_obs else {})
    arrays = dict(now_obs=now_obs, discounted_return=discounted_return, episode_return=episode_return, episode_length=episode_length)
    generators = dict(torch=torch.default_generator)
    # BLPO: the sketch has a generator of its own, so that no solver disturbs the training streams
    sketch_generator = generators["sketch"] = torch.Generator(device).manual_seed(args.seed)

    def state(iteration):
        """All that the iterations to come depend on."""
        saved = {name: part.state_dict() for name, part in parts.items()} | {"arrays": {k: torch.as_tensor(v) for k, v in arrays.items()}}
        saved |= {"generators": {k: v.get_state() for k, v in generators.items()}, "envs": [env_state(env) for env in envs]}
        saved |= {"iteration": iteration, "episodes": episodes, "recent": list(recent), "seconds": dict(seconds)}
        return saved | {"wall": earlier + time.perf_counter() - start}

    def reset(i, seed=None):
        np.stack([envs[i].reset(seed=seed)[0]], out=raw_obs[i : i + 1])  # stack refuses other shapes

    if checkpoint:
        try:
            begun, episodes, earlier = (checkpoint[name] for name in ("iteration", "episodes", "wall"))
            recent.extend(checkpoint["recent"])
            seconds |= checkpoint["seconds"]
            for name, part in parts.items():
                part.load_state_dict(checkpoint[name])
            for name, generator in generators.items():
                generator.set_state(checkpoint["generators"][name])
        except (KeyError, RuntimeError, ValueError) as problem:
            misfit("--resume", args.resume, problem)
    run = Run(args, args.env_id, args.total_timesteps, checkpoint, headers={"episodes.csv": "global_step,return,length"})
    # seeds of their own for all environments of all runs: seed, seed + 1, ... would share most of them between neighbours
    try:
        for i, seed in enumerate(np.random.SeedSequence([args.seed, begun] if begun else args.seed).generate_state(N).tolist()):
            reset(i, seed)
    except Exception as problem:  # whatever a foreign environment raises
        run.environment_failed(begun * N * T, problem)
    run.check_finite(0, raw_obs)
    if args.norm_obs and not checkpoint:
        obs_rms.update(raw_obs)
    now_obs[:] = normalize(raw_obs)
    if checkpoint and checkpoint["envs"][0]:
        for env, saved in zip(envs, checkpoint["envs"]):
            restore_env(env, saved)
        for name, array in arrays.items():
            array[...] = checkpoint["arrays"][name].numpy()
    elif begun:
        say(f"note: {args.env_id} cannot be put back into the middle of an episode: its episodes begin anew", error=True)
    start = time.perf_counter()
    if not checkpoint:
        run.checkpoint(state(0))  # from now on a killed run can go on

    for iteration in range(begun, iterations):
        global_step = iteration * N * T
        if args.anneal_lr:
            left = 1 - iteration / iterations
            actor_optimizer.param_groups[0]["lr"] = left * args.actor_lr
            critic_optimizer.param_groups[0]["lr"] = left * args.critic_lr

        # Rollout
        lap = Stopwatch()
        policy, noise = numpy_policy(actor.net), actor.noise(T, N)
        for t in range(T):
            obs[:, t] = now_obs
            outputs = policy(now_obs)
            if not np.isfinite(outputs).all():
                run.stop(f"error: the policy has diverged, its outputs are not finite (step {global_step}): lower --actor-lr")
            actions[:, t] = actor.act(outputs, noise[t])
            lap("inference")
            global_step += N
            try:
                steps = [env.step(action) for env, action in zip(envs, actor.for_env(actions[:, t], action_space))]
                observed, reward[:], terminated[:, t], truncated[:], _ = zip(*steps)
                np.stack(observed, out=last_obs)  # which refuses other shapes
                raw_obs[:], done[:, t] = last_obs, truncated | (terminated[:, t] > 0)
                ended = np.flatnonzero(done[:, t])
                for i in ended:  # last_obs keeps the true next observation
                    reset(i)
            except Exception as problem:  # whatever a foreign environment raises
                run.environment_failed(global_step, problem)
            lap("env")
            run.check_finite(global_step, raw_obs, last_obs, reward[:, None])
            episode_return += reward
            episode_length += 1
            discounted_return *= args.gamma
            discounted_return += reward
            if args.norm_obs:
                obs_rms.update(raw_obs)
            rewards[:, t] = reward
            if args.norm_reward:
                return_rms.update(discounted_return)
                rewards[:, t] = np.clip(reward / np.sqrt(return_rms.var + 1e-8), -10, 10)
            now_obs[:] = normalize(raw_obs)
            next_obs[:, t] = normalize(last_obs) if len(ended) else now_obs
            for i in ended:
                recent.append((float(episode_return[i]), int(episode_length[i])))  # the last 100
                run.write("episodes.csv", f"{global_step},{recent[-1][0]!r},{recent[-1][1]}")
                episodes += 1
                episode_return[i] = episode_length[i] = discounted_return[i] = 0
            lap("bookkeeping")

        # Advantages and regression targets, from the critic as it is now
        with torch.no_grad():
            tensors = [torch.as_tensor(x, device=device) for x in (obs, next_obs, actions, rewards, terminated, done)]
            b_obs, b_next_obs, b_actions, b_rewards, b_terminated, b_done = tensors
            cut = b_done.clone()
            cut[:, -1] = True
            matrix = gae_matrix(b_done, args.gamma, args.gae_lambda)
            values, next_values = split_values(critic(stacked_obs(b_obs, b_next_obs, cut)), cut)
            advantages = gae(b_rewards, values, next_values, b_terminated, matrix, args.gamma)
            logprobs = actor.log_prob(b_obs, b_actions)
        returns = advantages + values
        batch = Batch(
            b_obs, b_next_obs, b_actions, b_rewards, b_terminated, cut, matrix, logprobs, advantages, returns
        )
        explained_variance = float(1 - (returns - values).var() / returns.var().clamp_min(1e-12))
        lap("bookkeeping")

        # Update
        metrics = defaultdict(list)
        for _ in range(args.update_epochs):
            for chosen in torch.randperm(N).chunk(args.num_minibatches):
                mb = Batch(*(x[chosen] for x in batch))

                # BLPO: 1. nesting: the critic best-responds before the actor moves
                for step in range(args.nested_critic_steps):
                    loss = critic_loss(critic(mb.obs), mb.returns)
                    gradient = flat(torch.autograd.grad(loss, critic_params))
                    metrics["skipped_updates"].append(apply_gradient(critic_optimizer, gradient, args.max_grad_norm))
                    if step == 0:
                        metrics["critic_loss"].append(float(loss.detach()))
                lap("critic")

                logratio = actor.log_prob(mb.obs, mb.actions) - mb.logprobs
                ratio = logratio.exp()
                lap("actor")

                # BLPO: 2. v = grad_omega f, 3. x = (H + rho I)^{-1} v, 4. the weights of the cross term along x
                advantages, weights, info = implicit_weights(critic, mb, ratio, args, sketch_generator)
                lap("hypergradient")

                normalized = advantages
                if args.norm_adv:
                    normalized = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
                loss = policy_loss(ratio, normalized, args.clip_coef)
                if args.ent_coef > 0:
                    loss = loss - args.ent_coef * actor.entropy(mb.obs)
                gradient = flat(torch.autograd.grad(loss, actor_params, retain_graph=True))
                # BLPO: 4. h = grad_theta f + the implicit term
                if args.ihvp != "none":
                    gradient, implicit_info = hypergradient(gradient, ratio, weights, advantages, actor_params, args)
                    info |= implicit_info
                for name, value in info.items():  # BLPO:
                    metrics[name].append(value)
                metrics["skipped_updates"].append(apply_gradient(actor_optimizer, gradient, args.max_grad_norm))
                with torch.no_grad():
                    metrics["policy_loss"].append(float(loss.detach()))
                    metrics["approx_kl"].append(float((ratio - 1 - logratio).mean()))
                    metrics["clip_fraction"].append(float(((ratio - 1).abs() > args.clip_coef).float().mean()))
                lap("actor")

        if args.eval_every:
            due = (iteration + 1) % args.eval_every == 0
            returns, lengths = [math.nan], [math.nan]
            try:
                if due:
                    returns, lengths = evaluate(actor, obs_rms, args)
            except Exception as problem:  # whatever a foreign environment raises: training can do without
                say(f"evaluation failed: {type(problem).__name__}: {problem}", error=True)
            lap("evaluation")
        wall = earlier + time.perf_counter() - start
        mean = lambda values: float(np.mean(values)) if len(values) else math.nan
        row = {"global_step": global_step, "wall_seconds": round(wall, 3), "sps": round(global_step / wall, 1)}
        row |= {"episodes": episodes, "return_100": mean([r for r, _ in recent]), "length_100": mean([n for _, n in recent])}
        row |= {"entropy": float(actor.entropy(b_obs).detach()), "explained_variance": explained_variance}
        row |= {name: mean([x for x in values if math.isfinite(x)]) for name, values in metrics.items()}
        row |= {f"seconds_{phase}": round(spent, 5) for phase, spent in lap.seconds.items()}
        if args.eval_every:
            row |= {"eval_return": mean(returns), "eval_length": mean(lengths)}
        for phase, spent in lap.seconds.items():
            seconds[phase] += spent
        run.log(row, f"SPS {row['sps']:.0f}  return {row['return_100']:.1f}  KL {row['approx_kl']:.4f}")
        if run.signal or (iteration + 1) % checkpoint_every == 0 or iteration + 1 == iterations:
            run.checkpoint(state(iteration + 1))
        if run.signal:
            run.stop(f"stopped at step {global_step}", status=128 + run.signal)

    model = {"actor": actor.cpu().state_dict(), "critic": critic.cpu().state_dict(), "config": run.config}
    run.save("model.pt", model | (dict(obs_rms=obs_rms.state_dict()) if args.norm_obs else {}))
    run.release_signals()
    for env in envs:
        with contextlib.suppress(Exception):
            env.close()
    phases = ", ".join(f"{phase} {1e3 * spent / iterations:.0f}" for phase, spent in seconds.items())
    wall, steps = earlier + time.perf_counter() - start, iterations * N * T
    say(f"{steps:,} steps in {wall:.0f} s, {steps / wall:.0f} SPS; ms per iteration: {phases}")
    if args.eval_episodes:
        try:
            returns, lengths = evaluate(actor, obs_rms, args)
        except Exception as problem:  # whatever a foreign environment raises
            run.environment_failed(steps, problem)
        rows = "".join(f"{r!r},{n}\n" for r, n in zip(returns.tolist(), lengths.tolist()))
        run.save("evaluation.csv", "return,length\n" + rows)
        say(summary(args, returns, lengths))
    run.close()
    say(f"results in {run.folder}")
    return run.folder


def main(argv: list[str] | None = None) -> Path | None:
    args, checkpoint = parse_args(Args, __doc__, argv), None
    if args.evaluate and not args.resume:
        args, path, saved = evaluated(args, argv)
    elif args.resume and not args.evaluate:
        args, checkpoint = resumed(args, argv)
    check_args(args)
    return evaluate_run(args, path, saved) if args.evaluate else train(args, checkpoint)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=".*is out of date.*")  # the v4 environments of the published tables
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # outside of training Ctrl-C just ends
    gc.freeze()  # what the imports made will never be garbage: without this the collector goes through it again and again
    main()
