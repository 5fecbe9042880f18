"""Proximal policy optimization (PPO) for continuous actions, in one file: the baseline of blpo_continuous.py.

Schulman et al., "Proximal Policy Optimization Algorithms" (arXiv:1707.06347), with the details and the default flags of
CleanRL's ppo_continuous_action.py: advantage normalisation, orthogonal initialisation, annealing, clipped value loss, joint
gradient clipping. Deliberate deviations: an episode cut by a time limit bootstraps from its true last state; actor and
critic have an optimizer each (the same update, Adam being separable); GAE is one product with the matrix Gamma.

For a comparison in which only the bilevel parts differ, give it BLPO's rollouts, minibatches and step sizes (README.md,
"PPO, matched"). `diff ppo_continuous.py blpo_continuous.py` is the method.
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
from typing import NamedTuple

# One thread is fastest for networks this small and lets seeds run side by side; NumPy and PyTorch read this when imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn

from run_folder import Run, Stopwatch, check_places, env_state, evaluated, fail, misfit, parse_args, require, restore_env, resumed, say

@dataclass
class Args:
    env_id: str = "Walker2d-v4"
    """Gymnasium id of an environment with a Box action space ("module:id" imports the module first)"""
    exp_name: str = Path(__file__).stem
    """name of the experiment, part of the run folder's name"""
    seed: int = 1
    """seed of the environments, the networks, the exploration noise and the minibatches"""
    total_timesteps: int = 1_000_000
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
    num_envs: int = 1
    """parallel environments"""
    num_steps: int = 2048
    """steps of each environment per rollout"""
    num_minibatches: int = 32
    """minibatches per epoch: must divide num_envs * num_steps"""
    trajectory_minibatches: bool = False
    """minibatches of whole trajectories instead of single steps: num_minibatches must then divide num_envs"""
    update_epochs: int = 10
    """passes over a rollout"""
    actor_lr: float = 3e-4
    """Adam step size of the actor"""
    critic_lr: float = 3e-4
    """Adam step size of the critic"""
    anneal_lr: bool = True
    """decay both step sizes linearly to 0 over the iterations"""
    hidden_size: int = 64
    """width of the two hidden layers, in both networks"""
    gamma: float = 0.99
    """discount factor"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation"""
    norm_obs: bool = True
    """normalise observations by running statistics, shared by all environments"""
    norm_reward: bool = True
    """divide rewards by the running standard deviation of the discounted return"""
    norm_adv: bool = True
    """normalise advantages per minibatch"""
    clip_coef: float = 0.2
    """clip range of the probability ratio"""
    ent_coef: float = 0.0
    """weight of the entropy bonus"""
    max_grad_norm: float = 0.5
    """gradient norm at which each network's gradient is clipped"""
    joint_grad_clip: bool = True
    """clip the gradient norm of both networks together"""
    vf_coef: float = 0.5
    """weight of the value loss, itself half a mean square"""
    clip_vloss: bool = True
    """clip the change of the value, too, by clip_coef"""


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
    need("be positive and finite", lambda x: 0 < x < math.inf, "vf_coef")

    rollout = args.num_envs * args.num_steps
    need(f"be at least one rollout, num_envs * num_steps = {rollout}", lambda n: n >= rollout, "total_timesteps")
    parts, what = (args.num_envs, "--num-envs") if args.trajectory_minibatches else (rollout, "num_envs * num_steps =")
    need(f"divide {what} {parts}", lambda n: parts % n == 0, "num_minibatches")
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
    if isinstance(action_space, gym.spaces.Discrete):
        fail(f"--env-id {args.env_id} has discrete actions: use blpo_discrete.py")
    if not (isinstance(action_space, gym.spaces.Box) and np.issubdtype(action_space.dtype, np.floating)):
        fail(f"--env-id {args.env_id} has actions {action_space}: name an environment with a real-valued Box action space")
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
    """Gaussian policy with a state-independent standard deviation."""

    def __init__(self, obs_dim: int, action_dim: int, hidden: int = 64):
        super().__init__()
        self.net = mlp(obs_dim, hidden, action_dim, std=0.01)  # the mean
        self.log_std = nn.Parameter(torch.zeros(action_dim))

    def log_prob(self, obs, actions):  # (..., obs_dim), (..., action_dim) -> (...)
        z = (actions - self.net(obs)) * torch.exp(-self.log_std)
        return -0.5 * z.square().sum(-1) - self.log_std.sum() - 0.5 * math.log(2 * math.pi) * len(self.log_std)

    def entropy(self, obs):  # (..., obs_dim) -> ()
        return self.log_std.sum() + 0.5 * math.log(2 * math.pi * math.e) * len(self.log_std)

    def noise(self, *shape, generator=None):
        """What makes the mean a sample, (*shape, action_dim)."""
        return (torch.randn(*shape, len(self.log_std), generator=generator) * self.log_std.detach().exp().cpu()).numpy()

    @staticmethod
    def act(outputs, noise):
        """Actions (..., action_dim) from the net's outputs; noise 0 gives the most likely ones."""
        return outputs + noise

    @staticmethod
    def for_env(actions, space):
        """What environments take, from actions (n, action_dim)."""
        return actions.reshape(len(actions), *space.shape).clip(space.low, space.high)


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
    actions: torch.Tensor  # (N, T, action_dim)
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


def clipped_critic_loss(values, returns, old_values, clip: float):
    """critic_loss, or the larger error of the value kept within clip of its old one, as in the code of Schulman et al."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return torch.max((returns - values).square(), (returns - clipped).square()).mean()


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
    action_dim = math.prod(action_space.shape)
    device = torch.device("cuda" if args.cuda else "cpu")
    torch.manual_seed(args.seed)
    actor = Actor(obs_dim, action_dim, args.hidden_size).to(device)
    critic = Critic(obs_dim, args.hidden_size).to(device)
    actor_params, critic_params = list(actor.parameters()), list(critic.parameters())
    actor_size = sum(p.numel() for p in actor_params)
    actor_optimizer = torch.optim.Adam([flatten(actor)], lr=args.actor_lr, eps=1e-5, fused=True)
    critic_optimizer = torch.optim.Adam([flatten(critic)], lr=args.critic_lr, eps=1e-5, fused=True)

    obs_rms = RunningMeanStd(obs_dim) if args.norm_obs else None
    return_rms = RunningMeanStd()
    buffer = lambda *shape, dtype=np.float32: np.zeros((N, T, *shape), dtype)
    obs, next_obs, actions = buffer(obs_dim), buffer(obs_dim), buffer(action_dim)
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
        batch = Batch(b_obs, b_actions, logprobs, advantages, returns)
        if not args.trajectory_minibatches:
            batch = Batch(*(x.flatten(0, 1) for x in batch))
        explained_variance = float(1 - (returns - values).var() / returns.var().clamp_min(1e-12))
        lap("bookkeeping")

        # Update
        metrics = defaultdict(list)
        for _ in range(args.update_epochs):
            for chosen in torch.randperm(len(batch.obs)).chunk(args.num_minibatches):
                mb = Batch(*(x[chosen] for x in batch))

                logratio = actor.log_prob(mb.obs, mb.actions) - mb.logprobs
                ratio = logratio.exp()
                normalized = mb.advantages
                if args.norm_adv:
                    normalized = (mb.advantages - mb.advantages.mean()) / (mb.advantages.std() + 1e-8)
                loss = policy_loss(ratio, normalized, args.clip_coef)
                if args.ent_coef > 0:
                    loss = loss - args.ent_coef * actor.entropy(mb.obs)
                lap("actor")
                values = critic(mb.obs)
                error = critic_loss(values, mb.returns)
                if args.clip_vloss:
                    error = clipped_critic_loss(values, mb.returns, mb.returns - mb.advantages, args.clip_coef)
                gradient = flat(torch.autograd.grad(loss + args.vf_coef * 0.5 * error, actor_params + critic_params))
                if args.joint_grad_clip:
                    gradient = gradient * (args.max_grad_norm / (gradient.norm() + 1e-6)).clamp(max=1)
                actor_gradient, critic_gradient = gradient[:actor_size], gradient[actor_size:]
                metrics["skipped_updates"].append(apply_gradient(critic_optimizer, critic_gradient, args.max_grad_norm))
                metrics["critic_loss"].append(float(critic_loss(values.detach(), mb.returns)))
                lap("critic")
                metrics["skipped_updates"].append(apply_gradient(actor_optimizer, actor_gradient, args.max_grad_norm))
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
