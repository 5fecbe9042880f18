"""Proximal policy optimization (PPO) for discrete actions, in one file: the baseline of blpo_discrete.py.

Schulman et al., "Proximal Policy Optimization Algorithms" (arXiv:1707.06347), with the details and default
flags of CleanRL's ppo.py: normalised advantages, orthogonal initialisation, annealing,
clipped value loss, joint gradient clipping. Deliberate deviations: the last state before a time limit
bootstraps; running statistics are shared by all environments, without the last observations of episodes;
actor and critic have an optimizer each (the same update, since Adam is separable).

`diff ppo_discrete.py blpo_discrete.py` is the method. The flags for a comparison in which nothing else
differs are in README.md, "PPO, matched".
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

from support import evaluation
from support.acting import numpy_policy
from support.command import start
from support.environments import Environments
from support.flags import Count, Name, NonNegative, Positive, RunFlags, Size, UnitInterval, UnitStep, UpTo1000
from support.run_folder import Metrics, Run, finite


@dataclass
class Args(RunFlags):
    env_id: Name = "CartPole-v1"
    """Gymnasium id of an environment with a Discrete action space ("module:id" imports the module first)"""
    total_timesteps: Count = 500_000
    """environment steps in total, over all environments, rounded down to whole rollouts"""
    num_envs: Size = 4
    """parallel environments, N"""
    num_steps: Count = 128
    """steps of each environment per rollout, T"""
    num_minibatches: Count = 4
    """minibatches per epoch: must divide num_envs * num_steps"""
    trajectory_minibatches: bool = False
    """minibatches of whole trajectories instead of single steps: num_minibatches must then divide num_envs"""
    update_epochs: Count = 4
    """passes over a rollout"""
    actor_lr: UnitStep = 2.5e-4
    """Adam step size of the actor"""
    critic_lr: UnitStep = 2.5e-4
    """Adam step size of the critic"""
    anneal_lr: bool = True
    """decay both step sizes linearly to 0 over the iterations"""
    hidden_size: Size = 64
    """width of the two hidden layers, in both networks"""
    gamma: UnitInterval = 0.99
    """discount factor"""
    gae_lambda: UnitInterval = 0.95
    """lambda of generalised advantage estimation"""
    norm_obs: bool = False
    """normalise observations by running statistics, shared by all environments"""
    norm_reward: bool = False
    """divide rewards by the running standard deviation of the discounted return"""
    norm_adv: bool = True
    """normalise advantages per minibatch"""
    clip_coef: UpTo1000 = 0.2
    """clip range of the probability ratio"""
    ent_coef: NonNegative = 0.01
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
    samples = args.num_envs if args.trajectory_minibatches else rollout
    what = "--num-envs" if args.trajectory_minibatches else "num_envs * num_steps ="
    args.require("num_minibatches", samples % args.num_minibatches == 0, f"divide {what} {samples}")
    args.require("num_steps", rollout * args.num_steps < 2**31, "keep num_envs * num_steps^2 below 2^31")
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
    """Categorical policy."""

    def __init__(self, obs_dim: int, action_size: int, hidden: int = 64):
        super().__init__()
        self.net = mlp(obs_dim, hidden, action_size, std=0.01)  # the logits

    def log_prob(self, obs, actions):  # (..., obs_dim), (...) -> (...)
        return self.net(obs).log_softmax(-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)

    def entropy(self, obs):  # (..., obs_dim) -> (), the mean
        logprobs = self.net(obs).log_softmax(-1)
        return -(logprobs.exp() * logprobs).sum(-1).mean()

    def noise(self, *shape, generator=None):
        """Gumbel noise, (*shape, action_size): the largest of logits + noise is a sample of their softmax."""
        exponential = torch.empty(*shape, self.net[-1].out_features).exponential_(generator=generator)
        return -exponential.log().numpy()

    @staticmethod
    def act(outputs, noise):
        """Actions (...) from the outputs of net; noise 0 gives the most likely ones."""
        return (outputs + noise).argmax(-1)

    @staticmethod
    def for_env(actions, space):
        """What environments take, from actions (n,)."""
        return [int(action) for action in actions + space.start]


class Critic(nn.Module):
    def __init__(self, obs_dim: int, hidden: int = 64):
        super().__init__()
        self.value = mlp(obs_dim, hidden, 1, std=1.0)

    def forward(self, obs):  # (..., obs_dim) -> (...)
        return self.value(obs).squeeze(-1)


# Generalised advantage estimation


class Batch(NamedTuple):
    """A rollout of N environments and T steps; (N * T, ...), not (N, T, ...), if minibatches are of steps."""

    obs: torch.Tensor  # (N, T, obs_dim)
    actions: torch.Tensor  # (N, T)
    logprobs: torch.Tensor  # (N, T), under the policy that acted
    old_advantages: torch.Tensor  # (N, T), under the critic as it was when the iteration began
    returns: torch.Tensor  # (N, T), the lambda-returns of that critic: the regression targets


def gae_matrix(done, gamma: float, gae_lambda: float):
    """Gamma (N, T, T) with entry (t, k) = (gamma lambda)^(k-t) for k >= t in the same episode, else 0: GAE is
    Gamma delta. done (N, T) is true where an episode ended, by termination or truncation."""
    episode = done.cumsum(1) - done.to(torch.long)  # number of ends before step t
    steps = torch.arange(done.shape[1], device=done.device)
    lag = steps[None, :] - steps[:, None]
    powers = (gamma * gae_lambda) ** steps.to(torch.get_default_dtype())
    decay = powers[lag.clamp_min(0)] * (lag >= 0)
    return decay * (episode[:, :, None] == episode[:, None, :])


def stacked_obs(obs, next_obs, cut):
    """obs (N, T, obs_dim), then next_obs where it is not the next obs: what V is needed at, (n, obs_dim)."""
    return torch.cat([obs.flatten(0, 1), next_obs[cut]])


def split_values(stacked, cut):
    """V(s_t) and V(s'_t), both (N, T), from V at stacked_obs."""
    values = stacked[: cut.numel()].view_as(cut)
    return values, values.roll(-1, 1).masked_scatter(cut, stacked[cut.numel() :])


def gae(rewards, values, next_values, terminated, Gamma, gamma: float):
    """A = Gamma delta, delta = r + gamma (1 - terminated) V(s') - V(s), all (N, T); differentiable in V."""
    delta = rewards + gamma * (1 - terminated) * next_values - values
    return (Gamma @ delta.unsqueeze(-1)).squeeze(-1)


@torch.no_grad()
def make_batch(rollout, actor: Actor, critic: Critic, args: Args) -> tuple[Batch, float]:
    """Advantages and targets from the critic as it is now, and the share of their variance it explains."""
    tensors = [torch.as_tensor(array, device=args.device) for array in rollout]  # they share its memory
    obs, next_obs, actions, rewards, terminated, done = tensors
    cut = done.clone()
    cut[:, -1] = True
    Gamma = gae_matrix(done, args.gamma, args.gae_lambda)
    values, next_values = split_values(critic(stacked_obs(obs, next_obs, cut)), cut)
    advantages = gae(rewards, values, next_values, terminated, Gamma, args.gamma)
    returns = advantages + values
    explained_variance = float(1 - (returns - values).var() / returns.var().clamp_min(1e-12))
    logprobs = actor.log_prob(obs, actions)
    batch = Batch(obs, actions, logprobs, advantages, returns)
    if not args.trajectory_minibatches:
        batch = Batch(*(x.flatten(0, 1) for x in batch))
    return batch, explained_variance


# Losses, and steps along flat gradients


def critic_loss(values, returns):
    """Mean squared error of the value, without the factor one half."""
    return (returns - values).square().mean()


def value_loss(values, mb: Batch, args: Args):
    """vf_coef / 2 times critic_loss; with --clip-vloss that of values near the old ones, where larger."""
    error = critic_loss(values, mb.returns)
    if args.clip_vloss:
        old_values = mb.returns - mb.old_advantages
        near_old = old_values + (values - old_values).clamp(-args.clip_coef, args.clip_coef)
        error = torch.max((mb.returns - values).square(), (mb.returns - near_old).square()).mean()
    return args.vf_coef * 0.5 * error


def policy_loss(ratio, advantages, clip: float):
    """PPO's clipped surrogate, to be minimised."""
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).mean()


def standardized(x):
    return (x - x.mean()) / (x.std() + 1e-8)


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def flat_grad(loss, module: nn.Module):
    """The gradient of loss by all of module's parameters, (p,). The graph stays until the loss goes."""
    return flat(torch.autograd.grad(loss, list(module.parameters()), retain_graph=True))


class FlatAdam:
    """Adam on all of module's parameters as one vector, of which they become views: it moves one tensor."""

    def __init__(self, module: nn.Module, lr: float, max_norm: float):
        self.max_norm = max_norm
        self.skipped = False  # whether the last step was
        self.vector = nn.Parameter(flat(module.parameters()).detach())
        sizes = [p.numel() for p in module.parameters()]
        for p, view in zip(module.parameters(), self.vector.detach().split(sizes)):
            p.data = view.view_as(p)
        self.adam = torch.optim.Adam([self.vector], lr=lr, eps=1e-5, fused=True)

    def step(self, gradient) -> None:
        """A step along -gradient (p,), clipped in norm. A gradient that is not finite is skipped."""
        norm = float(gradient.norm())
        self.skipped = not math.isfinite(norm)
        if not self.skipped:
            self.vector.grad = gradient * min(1.0, self.max_norm / (norm + 1e-6))
            self.adam.step()


def train(args: Args, checkpoint: dict | None = None) -> Path:
    """Trains, writes the run folder and returns it; goes on from a checkpoint if there is one."""
    N, T = args.num_envs, args.num_steps
    iterations = args.total_timesteps // (N * T)
    envs = Environments(args, actions=gym.spaces.Discrete)
    torch.manual_seed(args.seed)
    actor = Actor(envs.obs_dim, envs.action_size, args.hidden_size).to(args.device)
    critic = Critic(envs.obs_dim, args.hidden_size).to(args.device)
    actor_optimizer = FlatAdam(actor, args.actor_lr, args.max_grad_norm)
    critic_optimizer = FlatAdam(critic, args.critic_lr, args.max_grad_norm)

    # All that the iterations to come depend on: a checkpoint is the state of these
    parts = dict(actor=actor, critic=critic, envs=envs, torch=torch.default_generator)
    parts |= dict(actor_adam=actor_optimizer.adam, critic_adam=critic_optimizer.adam)

    # A rollout: N environments, T steps
    obs, next_obs = np.zeros((2, N, T, envs.obs_dim), np.float32)
    actions = np.zeros((N, T), np.int64)
    rewards, terminated = np.zeros((2, N, T), np.float32)
    done = np.zeros((N, T), bool)
    rollout = (obs, next_obs, actions, rewards, terminated, done)

    with Run(args, iterations, parts, checkpoint) as run:  # a Stop raised in here ends it with one line
        envs.begin(run)  # first observations; of a resumed run, iterations() then restores the checkpoint
        lap = run.lap  # lap(phase) adds the time since the last lap to the phase; envs.step laps "env"
        for iteration in run.iterations():  # begins at the checkpoint, if any, and writes the next ones
            metrics = Metrics()
            if args.anneal_lr:
                left = 1 - iteration / iterations
                actor_optimizer.adam.param_groups[0]["lr"] = left * args.actor_lr
                critic_optimizer.adam.param_groups[0]["lr"] = left * args.critic_lr

            # Rollout. The policy acts in NumPy: PyTorch's cost per call outweighs a few observations
            policy = numpy_policy(actor.net)
            noise = actor.noise(T, N)
            for t in range(T):
                obs[:, t] = envs.obs
                outputs = finite(policy(envs.obs), "the policy has diverged: lower --actor-lr")
                actions[:, t] = actor.act(outputs, noise[t])
                lap("inference")
                step = envs.step(actor.for_env(actions[:, t], envs.action_space))
                next_obs[:, t], rewards[:, t], terminated[:, t], done[:, t] = step
                lap("bookkeeping")
            batch, explained_variance = make_batch(rollout, actor, critic, args)
            lap("bookkeeping")

            # Update
            for _ in range(args.update_epochs):
                for chosen in torch.randperm(len(batch.obs)).chunk(args.num_minibatches):
                    mb = Batch(*(x[chosen] for x in batch))

                    # The critic's gradient
                    values = critic(mb.obs)
                    critic_grad = flat_grad(value_loss(values, mb, args), critic)
                    lap("critic")

                    # The actor's gradient
                    logratio = actor.log_prob(mb.obs, mb.actions) - mb.logprobs
                    ratio = logratio.exp()
                    normalized = standardized(mb.old_advantages) if args.norm_adv else mb.old_advantages
                    loss = policy_loss(ratio, normalized, args.clip_coef)
                    if args.ent_coef > 0:
                        loss = loss - args.ent_coef * actor.entropy(mb.obs)
                    actor_grad = flat_grad(loss, actor)

                    if args.joint_grad_clip:
                        norm = torch.cat([actor_grad, critic_grad]).norm()
                        shrink = (args.max_grad_norm / (norm + 1e-6)).clamp(max=1)
                        actor_grad, critic_grad = shrink * actor_grad, shrink * critic_grad
                    critic_optimizer.step(critic_grad)
                    metrics.add(skipped_updates=critic_optimizer.skipped)
                    actor_optimizer.step(actor_grad)
                    metrics.add(skipped_updates=actor_optimizer.skipped)
                    metrics.add(critic_loss=critic_loss(values, mb.returns))
                    metrics.add(policy_loss=loss, approx_kl=(ratio - 1 - logratio).mean())
                    metrics.add(clip_fraction=((ratio - 1).abs() > args.clip_coef).float().mean())
                    lap("actor")

            metrics.add(entropy=actor.entropy(batch.obs), explained_variance=explained_variance)
            evaluated = evaluation.during_training(run, iteration, actor, envs, args)
            run.log_means(envs.steps, envs.statistics(), metrics, evaluated)
        evaluation.finish(run, actor, critic, envs, args)
    return run.folder


def main(argv: list[str] | None = None) -> Path | None:
    return start(Args, check_args, train, Actor, __doc__, argv)


if __name__ == "__main__":
    main()
