"""The environments of a run, side by side: making and stepping them, running statistics, and what a
checkpoint keeps.

Nothing here learns. Environments are foreign code: whatever they raise ends the run with one line
(EnvironmentFailed). An observation has one name for each of its forms:

    raw_obs     what the environments returned, (N, obs_dim)
    obs         what the policy sees: raw_obs normalised by running statistics, float32
    next_obs    what followed an action, normalised too: also at the end of an episode its true last
    observation,
                where obs already is the first one of the next episode
"""

import contextlib
import difflib
import importlib
import math
from collections import deque
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch

from support.flags import fail, say, script_of
from support.run_folder import EnvironmentFailed, Run, Stop

# What seeds are drawn for, beside --seed itself for the environments of training: streams that must not
# coincide.
EVALUATION = 1
RESUMED = 2


def check_env_id(env_id: str) -> None:
    """Refuses an environment that is not registered, or known not to work."""
    module, _, name = env_id.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
        gym.spec(name)
    except Exception as problem:  # a foreign module may raise anything
        close = difflib.get_close_matches(name, gym.registry, n=3)
        fail(f"--env-id {env_id}: {problem}" + f" Close: {', '.join(close)}." * bool(close))
    if name == "Pusher-v4":
        fail("--env-id Pusher-v4 does not work with mujoco >= 3: use Pusher-v5")


def make_env(env_id: str, **options) -> gym.Env:
    """An environment whose observations are flat vectors, (obs_dim,)."""
    env = gym.make(env_id, disable_env_checker=True, **options)
    space = env.observation_space
    if isinstance(space, gym.spaces.Box) and len(space.shape) == 1:
        return env
    return gym.wrappers.FlattenObservation(env)  # dm_control's dictionaries, images


def numpy_policy(net: torch.nn.Sequential):
    """The map from observations (n, obs_dim) to the outputs of net, a stack of linear layers with tanh
    between them, as it is now. PyTorch's cost per call outweighs the arithmetic of a few observations."""
    weights = [layer.weight.detach().cpu().numpy().T for layer in net[::2]]
    biases = [layer.bias.detach().cpu().numpy() for layer in net[::2]]

    def policy(x):
        for W, b in zip(weights[:-1], biases[:-1]):
            x = np.tanh(x @ W + b)
        return x @ weights[-1] + biases[-1]

    return policy


class RunningMeanStd:
    """Mean and variance of a stream of batches, merged as in Chan et al. (1979)."""

    def __init__(self, shape=()):
        self.mean = np.zeros(shape)
        self.var = np.ones(shape)
        self.count = 1e-4

    def update(self, x):  # (n, *shape)
        total = self.count + len(x)
        mean = x.mean(0)
        delta = mean - self.mean
        m2 = self.var * self.count + ((x - mean) ** 2).sum(0) + delta**2 * self.count * len(x) / total
        self.mean = self.mean + delta * len(x) / total
        self.var = m2 / total
        self.count = total

    def normalize(self, x):
        return np.clip((x - self.mean) / np.sqrt(self.var + 1e-8), -10, 10)

    def state_dict(self) -> dict:
        return {name: torch.as_tensor(value, dtype=torch.float64) for name, value in vars(self).items()}

    def load_state_dict(self, state: dict) -> None:
        vars(self).update({name: value.numpy() for name, value in state.items()})


class Step(NamedTuple):
    """What one step of all N environments gave."""

    next_obs: np.ndarray  # (N, obs_dim), the true next observation, also where an episode ended
    rewards: np.ndarray  # (N,), with --norm-reward divided by the running deviation of the discounted return
    terminated: np.ndarray  # (N,), 1. where the episode terminated: no value follows
    done: np.ndarray  # (N,), True where it terminated or was truncated: the next obs begins another episode


class Environments:
    """N environments in a plain list: stepping it in a loop costs 7 microseconds a step less than
    SyncVectorEnv.

    `actions` is the class of action spaces that the script can train on; anything else is refused in one
    line. `obs` is what the policy sees now, `steps` counts the steps of all environments together.
    """

    def __init__(self, args, actions: type):
        self.args = args
        N = args.num_envs
        try:
            self.list = [make_env(args.env_id) for _ in range(N)]
            shapes = {np.shape(env.reset(seed=args.seed)[0]) for env in self.list}
        except Exception as problem:  # whatever a foreign environment raises
            fail(f"--env-id {args.env_id} cannot be made: {problem}")
        self.action_space = self.list[0].action_space
        self.refuse_other_spaces(actions, shapes)
        self.obs_dim = self.list[0].observation_space.shape[0]

        self.obs_rms = RunningMeanStd(self.obs_dim) if args.norm_obs else None
        self.return_rms = RunningMeanStd()
        self.obs = np.zeros((N, self.obs_dim), np.float32)
        self.raw_obs = np.zeros((N, self.obs_dim))
        self.last_obs = np.zeros((N, self.obs_dim))  # raw; not raw_obs where an episode has just ended
        self.discounted_return = np.zeros(N)
        self.episode_return = np.zeros(N)
        self.episode_length = np.zeros(N, dtype=int)
        self.steps = 0
        self.episodes = 0
        self.recent = deque(maxlen=100)  # (return, length) of the last 100 episodes

    @property
    def action_size(self) -> int:
        """How many actions a Discrete space has, or how many numbers make an action of a Box."""
        if isinstance(self.action_space, gym.spaces.Discrete):
            return int(self.action_space.n)
        return math.prod(self.action_space.shape)

    def refuse_other_spaces(self, actions: type, shapes: set) -> None:
        """Ends the process unless this script can train here; `shapes` are those of the observations
        returned."""
        found = self.action_space
        script = script_of(self.args).name
        space = self.list[0].observation_space
        problem = None
        if actions is gym.spaces.Box and isinstance(found, gym.spaces.Discrete):
            problem = f"has discrete actions: use {script.replace('continuous', 'discrete')}"
        elif actions is gym.spaces.Discrete and isinstance(found, gym.spaces.Box):
            problem = f"has continuous actions: use {script.replace('discrete', 'continuous')}"
        elif not isinstance(found, actions):
            problem = f"has actions {found}: name an environment with a {actions.__name__} action space"
        elif actions is gym.spaces.Box and not np.issubdtype(found.dtype, np.floating):
            problem = f"has actions {found}: name an environment with a real-valued Box action space"
        elif not isinstance(space, gym.spaces.Box):
            problem = f"has observations {space}, which cannot be flattened: name another environment"
        elif shapes != {space.shape}:
            problem = f"returns observations of shape {shapes.pop()}, not {space.shape} as it says: repair it"
        if problem:
            fail(f"--env-id {self.args.env_id} {problem}")

    def begin(self, run: Run) -> None:
        """First observations of a new run; episodes that end from now on are rows of the run's
        episodes.csv."""
        self.run = run
        run.open_table("episodes.csv", "global_step,return,length")
        self.reset_all(self.args.seed)
        if self.obs_rms:
            self.obs_rms.update(self.raw_obs)
        self.obs[:] = self.normalize(self.raw_obs)

    def normalize(self, raw_obs):
        return self.obs_rms.normalize(raw_obs) if self.obs_rms else raw_obs

    def reset(self, i: int, seed: int | None = None) -> None:
        observed, _ = self.list[i].reset(seed=seed)
        np.stack([observed], out=self.raw_obs[i : i + 1])  # stack refuses other shapes

    def reset_all(self, key) -> None:
        """Resets with seeds of their own for all environments of all runs: seed, seed + 1, ... would be
        shared by runs with neighbouring seeds. `key` is what the seeds are drawn from."""
        seeds = np.random.SeedSequence(key).generate_state(len(self.list)).tolist()
        try:
            for i, seed in enumerate(seeds):
                self.reset(i, seed)
        except Exception as problem:  # whatever a foreign environment raises
            raise EnvironmentFailed(self.args.env_id, self.steps) from problem
        self.check_finite(self.raw_obs)

    def step(self, actions) -> Step:
        """One step of each environment; one whose episode ended is reset. `actions` has one for each, as they
        take it."""
        self.steps += len(self.list)
        try:
            results = [env.step(action) for env, action in zip(self.list, actions)]
            observed, reward, terminated, truncated, _ = zip(*results)
            reward = np.array(reward, float)
            terminated = np.array(terminated, np.float32)
            done = np.array(truncated, bool) | (terminated > 0)
            np.stack(observed, out=self.last_obs)  # which refuses other shapes
            self.raw_obs[:] = self.last_obs
            for i in np.flatnonzero(done):
                self.reset(i)
        except Exception as problem:  # whatever a foreign environment raises
            raise EnvironmentFailed(self.args.env_id, self.steps) from problem
        self.run.lap("env")
        self.check_finite(self.raw_obs, self.last_obs, reward[:, None])
        return self.account(reward, terminated, done)

    def account(self, reward, terminated, done) -> Step:
        """Updates running statistics, normalises by them, and writes a row for every episode that ended."""
        self.episode_return += reward
        self.episode_length += 1
        self.discounted_return *= self.args.gamma
        self.discounted_return += reward
        if self.obs_rms:
            self.obs_rms.update(self.raw_obs)
        if self.args.norm_reward:
            self.return_rms.update(self.discounted_return)
            reward = np.clip(reward / np.sqrt(self.return_rms.var + 1e-8), -10, 10)
        self.obs[:] = self.normalize(self.raw_obs)
        next_obs = self.normalize(self.last_obs) if done.any() else self.obs
        for i in np.flatnonzero(done):
            self.end_episode(i)
        return Step(next_obs, reward, terminated, done)

    def end_episode(self, i: int) -> None:
        episode_return = float(self.episode_return[i])
        length = int(self.episode_length[i])
        self.run.write("episodes.csv", f"{self.steps},{episode_return!r},{length}")
        self.recent.append((episode_return, length))
        self.episodes += 1
        self.episode_return[i] = 0
        self.episode_length[i] = 0
        self.discounted_return[i] = 0

    def check_finite(self, *arrays) -> None:  # each (N, ...)
        if not all(np.isfinite(array).all() for array in arrays):
            bad = np.argmin(np.isfinite(np.concatenate(arrays, axis=1)).all(1))
            where = f"environment {bad}, step {self.steps}"
            raise Stop(f"{self.args.env_id} returned a non-finite observation or reward ({where})")

    def statistics(self) -> dict:
        """Columns of progress.csv."""
        returns, lengths = zip(*self.recent) if self.recent else ([math.nan], [math.nan])
        return {
            "episodes": self.episodes,
            "return_100": float(np.mean(returns)),
            "length_100": float(np.mean(lengths)),
        }

    def close(self) -> None:
        for env in self.list:
            with contextlib.suppress(Exception):  # whatever a foreign environment raises: the run is over
                env.close()

    # Checkpoints

    def arrays(self) -> dict[str, np.ndarray]:
        """What stands in the middle of an episode, beside the environments themselves."""
        names = ("obs", "discounted_return", "episode_return", "episode_length")
        return {name: getattr(self, name) for name in names}

    def state_dict(self) -> dict:
        state = {"steps": self.steps, "episodes": self.episodes, "recent": list(self.recent)}
        state["return_rms"] = self.return_rms.state_dict()
        state["obs_rms"] = self.obs_rms.state_dict() if self.obs_rms else None
        state["arrays"] = {name: torch.as_tensor(array) for name, array in self.arrays().items()}
        state["envs"] = [env_state(env) for env in self.list]
        return state

    def load_state_dict(self, state: dict) -> None:
        """Goes on where state_dict was called: in the middle of episodes, where environments can be put back
        into one."""
        self.steps = state["steps"]
        self.episodes = state["episodes"]
        self.recent.extend(state["recent"])
        self.return_rms.load_state_dict(state["return_rms"])
        if self.obs_rms:
            self.obs_rms.load_state_dict(state["obs_rms"])
        self.reset_all([self.args.seed, RESUMED, self.steps])
        self.obs[:] = self.normalize(self.raw_obs)
        if state["envs"][0]:
            for env, saved in zip(self.list, state["envs"]):
                restore_env(env, saved)
            for name, array in self.arrays().items():
                array[...] = state["arrays"][name].numpy()
        elif self.steps:
            what = f"{self.args.env_id} cannot be put back into the middle of an episode"
            say(f"note: {what}: its episodes begin anew", error=True)


# The state of a single environment


def wrappers(env: gym.Env) -> list[gym.Env]:
    """Outermost first, the environment itself last."""
    return [env] if env is env.unwrapped else [env, *wrappers(env.env)]


def pack(value):
    """NumPy's values as tensors, which torch.load reads without running foreign code; None for what is not
    plain data."""
    if isinstance(value, tuple):
        return tuple(map(pack, value))
    if isinstance(value, (np.ndarray, np.generic)):
        return torch.from_numpy(np.array(value))
    return value if isinstance(value, (bool, int, float, str)) else None


def unpack(value):
    if isinstance(value, tuple):
        return tuple(map(unpack, value))
    return value.numpy()[()] if isinstance(value, torch.Tensor) else value


def env_state(env: gym.Env) -> dict | None:
    """All that a MuJoCo or classic-control environment of Gymnasium remembers: plain attributes of its own
    and of its wrappers, its random generator, MuJoCo's arrays. None for others, or with other wrappers, which
    may remember more."""
    known = (gym.wrappers.TimeLimit, gym.wrappers.OrderEnforcing, gym.wrappers.FlattenObservation)
    *around, core = wrappers(env)
    ours = type(core).__module__.startswith(("gymnasium.envs.mujoco.", "gymnasium.envs.classic_control."))
    if not (ours and all(type(layer) in known for layer in around)):
        return None
    layers = [{k: pack(v) for k, v in vars(layer).items()} for layer in wrappers(env)]
    state = {"random": core.np_random.bit_generator.state}
    state["layers"] = [{k: v for k, v in layer.items() if v is not None} for layer in layers]
    if data := getattr(core, "data", None):
        fields = {name: getattr(data, name) for name in dir(data)}
        state["arrays"] = {name: pack(x) for name, x in fields.items() if isinstance(x, np.ndarray)}
        state["time"] = data.time
    return state


def restore_env(env: gym.Env, state: dict) -> None:
    """Puts env, which has been reset, into a state that env_state returned."""
    core = env.unwrapped
    core.np_random.bit_generator.state = state["random"]
    for layer, values in zip(wrappers(env), state["layers"]):
        vars(layer).update({k: unpack(v) for k, v in values.items()})
    if "arrays" in state:
        core.data.time = state["time"]
        for name, value in state["arrays"].items():
            array = getattr(core.data, name)
            if array.shape == value.shape:  # those of contacts vary; every step recomputes them
                array[...] = value.numpy()
