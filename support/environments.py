"""The environments of a run, side by side: making and stepping them, running statistics, what a checkpoint
keeps.

Nothing here learns. Environments are foreign code: whatever they raise ends the run with one line.
An observation has one name for each of its forms, all (N, obs_dim):

    raw_obs     what the policy will act on next, as the environments returned it
    last_obs    raw too, what followed the last action: differs from raw_obs where an episode has just ended
    obs         raw_obs, normalised by running statistics: what the policy sees
    next_obs    last_obs, normalised
"""

import contextlib
import difflib
import importlib
import math
import os
import sys
from collections import deque
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch

from support import games
from support.flags import FOREIGN, Stop, fail, say, script_of, shown
from support.run_folder import EnvironmentFailed, Run

# What seeds are drawn for, beside --seed itself for the environments of training: streams that must not
# coincide.
EVALUATION = 1
RESUMED = 2

# MuJoCo looks for islands, groups of bodies that no contact joins, to solve for each of them alone. These
# tasks have one robot and nothing to push, so that there is one island: without looking for it 10,000 steps
# are the same to the byte, and physics is up to 8 % faster (mujoco 3.3.7).
ROBOTS = ("Ant", "HalfCheetah", "Hopper", "Humanoid", "HumanoidStandup", "InvertedDoublePendulum")
ROBOTS += ("InvertedPendulum", "Reacher", "Swimmer", "Walker2d")
ONE_ISLAND = {f"{robot}-{version}" for robot in ROBOTS for version in ("v4", "v5")}

# What MuJoCo's next step depends on
MUJOCO_STATE = ("qpos", "qvel", "act", "ctrl", "qacc_warmstart", "mocap_pos", "mocap_quat", "eq_active")

MANY = 5_000  # numbers in an observation, from which on it is more likely a picture than a state


def find_modules_here() -> None:
    """Lets "module:id" name a module in the current folder, as `python -m` would."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def check_env_id(env_id: str) -> None:
    """Refuses an environment that is not registered, or known not to work."""
    module, _, name = env_id.rpartition(":")
    games.check_packages(env_id)
    try:
        if module:
            importlib.import_module(module)
        games.register(name)
        gym.spec(name)
    except FOREIGN as problem:  # a foreign module may raise anything
        close = difflib.get_close_matches(name, gym.registry, n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        hint += games.hint(name)
        fail(f"--env-id {env_id}: {shown(problem)}{hint}")
    if name == "Pusher-v4":
        fail("--env-id Pusher-v4 does not work with mujoco >= 3: use Pusher-v5")


def make_env(args, training=True, **options) -> gym.Env:
    """An environment with flat observations, (obs_dim,), and with actions of about the size of 1. In training
    an episode of an Atari game is a life, and rewards are signs."""
    options = args.env_options | options | {"disable_env_checker": True}
    games.register(args.env_id)
    env = gym.make(args.env_id, **options)
    if games.is_atari(env):
        env = games.seen_by_policies(env, training)
    if args.env_id in ONE_ISLAND and not args.env_options:
        import mujoco  # which other environments do not need

        env.unwrapped.model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_ISLAND
    stop_the_clock()
    if texts := text_parts(env.observation_space):
        env = gym.wrappers.FilterObservation(env, [key for key in env.observation_space if key not in texts])
    space = env.observation_space
    if not (isinstance(space, gym.spaces.Box) and len(space.shape) == 1):
        if bad := unflattenable(space):
            raise TypeError(f"its observations cannot be flattened: {bad}")
        env = gym.wrappers.FlattenObservation(env)  # dm_control's dictionaries, images
    if rescales(args.rescale_actions, env.action_space):
        env = rescaled(env)
    return env


def stop_the_clock() -> None:
    """Takes MuJoCo's profiling clock away, which changes no number. Since MuJoCo 3.3.1 every new MjData sets
    one, which a step of Walker2d-v4 reads 456 times: 12 to 18 % of physics (3.17 keeps it). A clock of the
    user's stays."""
    mujoco = sys.modules.get("mujoco")
    clock = getattr(mujoco, "get_mjcb_time", None)  # None without MuJoCo
    if clock and clock() is None:
        mujoco.set_mjcb_time(None)


def rescaled(env: gym.Env) -> gym.Env:
    """The environment with actions in [-1, 1]."""
    box = env.action_space

    def within(action):  # rounding may leave the box by the last digit, which some environments refuse
        return np.clip(action, box.low, box.high).astype(box.dtype)

    one = box.dtype.type(1)
    return gym.wrappers.RescaleAction(gym.wrappers.TransformAction(env, within, box), -one, one)


def text_parts(space: gym.Space) -> list[str]:
    """The keys of a Dict space under which there is text, which no network here reads."""
    if not isinstance(space, gym.spaces.Dict):
        return []
    return [key for key, part in space.items() if isinstance(part, gym.spaces.Text)]


class Image(NamedTuple):
    """The form of images, which are observed flat, as all observations are."""

    height: int
    width: int
    channels: int
    top: float  # the largest value: 255 of bytes, 1 of booleans
    frames: bool = False  # channels are the last pictures of a game, one after the other, the newest last


def image_of(env: gym.Env) -> Image | None:
    """The form of images (height, width, channels) of bytes or booleans, or of frames (channels, height,
    width), before a FlattenObservation around env; None for observations of any other kind."""
    for layer in wrappers(env):
        if isinstance(layer, gym.wrappers.FlattenObservation):
            space = layer.env.observation_space
            small = isinstance(space, gym.spaces.Box) and space.dtype in (np.uint8, np.bool_)
            if small and len(space.shape) == 3:
                stacks = [x for x in wrappers(layer.env) if isinstance(x, gym.wrappers.FrameStackObservation)]
                frames = any(x.padding_type == "reset" and x.observation_space == space for x in stacks)
                if stacks and not frames:
                    return None
                shape = (*space.shape[1:], space.shape[0]) if frames else space.shape
                return Image(*shape, float(space.high.max()), frames)
    return None


def unflattenable(space: gym.Space, name: str = "") -> str:
    """The first part of a space that is no vector of a fixed length, by name and kind, or an empty text."""
    if isinstance(space, (gym.spaces.Dict, gym.spaces.Tuple)):
        parts = space.items() if isinstance(space, gym.spaces.Dict) else enumerate(space)
        found = (unflattenable(part, f"{name}[{key!r}]") for key, part in parts)
        return next(filter(None, found), "")
    known = (gym.spaces.Box, gym.spaces.Discrete, gym.spaces.MultiDiscrete, gym.spaces.MultiBinary)
    if isinstance(space, known):
        return ""
    return f"part {name} is {space}" if name else f"they are {space}"


def can_be_rescaled(space: gym.Space) -> bool:
    """Whether actions are real numbers in a box that [-1, 1] can be stretched to."""
    if not isinstance(space, gym.spaces.Box) or not np.issubdtype(space.dtype, np.floating):
        return False
    return bool((np.isfinite(space.low) & np.isfinite(space.high) & (space.low < space.high)).all())


def rescales(wish: str, space: gym.Space) -> bool:
    """Whether the policy acts in [-1, 1] instead of in the box itself. A Gaussian policy begins with mean 0
    and deviation 1, and is content with boxes that are ten times larger or smaller: MuJoCo's stay as they
    are."""
    if wish == "off" or not can_be_rescaled(space):
        return False
    low, high = space.low.astype(float), space.high.astype(float)
    half = (high - low) / 2
    centre = (high + low) / 2
    usual = (half >= 0.1) & (half <= 10) & (np.abs(centre) <= half)
    return wish == "on" or not usual.all()


class RunningMeanStd:
    """Mean and variance of a stream of batches, merged as in Chan et al. (1979)."""

    def __init__(self, shape=()):
        self.mean = np.zeros(shape)
        self.var = np.ones(shape)
        self.count = 1e-4

    def update(self, x):  # (n, *shape)
        total = self.count + len(x)
        mean = x.sum(0) / len(x)  # half the time of x.mean(0), and the same number
        delta = mean - self.mean
        m2 = self.var * self.count + ((x - mean) ** 2).sum(0) + delta**2 * self.count * len(x) / total
        self.mean = self.mean + delta * len(x) / total
        self.var = m2 / total
        self.count = total

    def normalize(self, x):
        return ((x - self.mean) / np.sqrt(self.var + 1e-8)).clip(-10, 10)

    def state_dict(self) -> dict:
        return {name: torch.as_tensor(value, dtype=torch.float64) for name, value in vars(self).items()}

    def load_state_dict(self, state: dict) -> None:
        vars(self).update({name: value.numpy() for name, value in state.items()})


class Step(NamedTuple):
    """What one step of all N environments gave; valid until the next one, because arrays are used again."""

    next_obs: np.ndarray  # (N, obs_dim), the true next observation, also where an episode ended
    rewards: np.ndarray  # (N,), with --norm-reward in running deviations of the discounted return, to ±10
    terminated: np.ndarray  # (N,), 1. where the episode terminated: no value follows
    done: np.ndarray  # (N,), True where it terminated or was truncated: the next obs begins another episode


class Environments:
    """N environments in a plain list: stepping it in a loop costs 7 microseconds a step less than
    SyncVectorEnv.

    `actions` is the class of action spaces that the script can train on; anything else is refused in one
    line; `images` says whether its networks see them as such. `obs` is what the policy sees now, `steps`
    counts the steps of all environments together.
    """

    def __init__(self, args, actions: type, images: bool = False):
        self.args = args
        N = args.num_envs
        try:
            self.envs = [make_env(args) for _ in range(N)]
            shapes = {np.shape(env.reset(seed=args.seed)[0]) for env in self.envs}
        except FOREIGN as problem:  # whatever a foreign environment raises
            fail(f"--env-id {args.env_id} cannot be made: {shown(problem)}")
        self.action_space = self.envs[0].action_space
        self.refuse_other_spaces(actions, shapes)
        self.obs_dim = self.envs[0].observation_space.shape[0]
        self.image = image_of(self.envs[0])
        self.note_what_was_changed(images)

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
        self.noted = False  # whether it was said that none has ended

    @property
    def action_size(self) -> int:
        """How many actions a Discrete space has, or how many numbers make an action of a Box."""
        if isinstance(self.action_space, gym.spaces.Discrete):
            return int(self.action_space.n)
        return math.prod(self.action_space.shape)

    def refuse_other_spaces(self, actions: type, shapes: set) -> None:
        """Ends the process unless this script can train here; `shapes` are of the observations returned."""
        found = self.action_space
        script = script_of(self.args).name
        space = self.envs[0].observation_space
        problem = None
        if actions is gym.spaces.Box and isinstance(found, gym.spaces.Discrete):
            problem = f"has discrete actions: use {script.replace('continuous', 'discrete')}"
        elif actions is gym.spaces.Discrete and isinstance(found, gym.spaces.Box):
            problem = f"has continuous actions: use {script.replace('discrete', 'continuous')}"
        elif not isinstance(found, actions):
            problem = f"has actions {found}: name an environment with a {actions.__name__} action space"
        elif actions is gym.spaces.Box and not np.issubdtype(found.dtype, np.floating):
            problem = f"has actions {found}: name an environment with a real-valued Box action space"
        elif shapes != {space.shape}:
            problem = f"returns observations of shape {shapes.pop()}, not {space.shape} as it says: repair it"
        if problem:
            fail(f"--env-id {self.args.env_id} {problem}")
        if self.args.rescale_actions == "on" and not can_be_rescaled(found):
            what = f"{self.args.env_id}, whose actions {found} have no bounded box"
            self.args.refuse("rescale_actions", f"be auto or off for {what}")

    def note_what_was_changed(self, images: bool) -> None:
        """Says what the policy does not see or do as the environment has it."""
        core = self.envs[0].unwrapped
        if texts := text_parts(core.observation_space):
            say(f"note: text is left out of the observations: {', '.join(texts)}", error=True)
        if self.obs_dim >= MANY and not (images and self.image):
            shape = getattr(core.observation_space, "shape", None)
            if self.image and self.image.frames:
                shape = (self.image.channels, self.image.height, self.image.width)
            what = f"observations {shape or ''} are flattened to {self.obs_dim:,} numbers"
            cost = "there is no convolution here, and a step will take milliseconds"
            say(f"note: {what}: {cost}; use a wrapper that extracts features", error=True)

    def begin(self, run: Run) -> None:
        """First observations of a run; episodes that end from now on are rows of its episodes.csv."""
        self.run = run
        run.open_table("episodes.csv", "global_step,return,length")
        self.reset_all(self.args.seed)
        if self.obs_rms:
            self.obs_rms.update(self.raw_obs)
        self.obs[:] = self.normalize(self.raw_obs)

    def normalize(self, raw_obs):
        return self.obs_rms.normalize(raw_obs) if self.obs_rms else raw_obs

    def reset(self, i: int, seed: int | None = None) -> None:
        observed, _ = self.envs[i].reset(seed=seed)
        np.stack([observed], out=self.raw_obs[i : i + 1])  # stack refuses other shapes

    def reset_all(self, key) -> None:
        """Resets with seeds of their own for all environments of all runs: seed, seed + 1, ... would be
        shared by runs with neighbouring seeds. `key` is what the seeds are drawn from."""
        seeds = np.random.SeedSequence(key).generate_state(len(self.envs)).tolist()
        try:
            for i, seed in enumerate(seeds):
                self.reset(i, seed)
        except FOREIGN as problem:  # whatever a foreign environment raises
            raise EnvironmentFailed(self.args.env_id, self.steps) from problem
        self.check_finite(self.raw_obs)

    def step(self, actions) -> Step:
        """One step of each environment, with an action for each; one whose episode ended is reset."""
        self.steps += len(self.envs)
        try:
            results = [env.step(action) for env, action in zip(self.envs, actions)]
            observed, reward, terminated, truncated, infos = zip(*results)
            reward = np.array(reward, float).reshape(len(self.envs))  # from numbers, or arrays of one
            terminated = np.array(terminated, np.float32).reshape(len(self.envs))
            done = np.array(truncated, bool).reshape(len(self.envs)) | (terminated > 0)
            np.stack(observed, out=self.last_obs)  # which refuses other shapes
            self.raw_obs[:] = self.last_obs
            ended = np.flatnonzero(done)
            for i in ended:
                self.reset(i)
        except FOREIGN as problem:  # whatever a foreign environment raises
            raise EnvironmentFailed(self.args.env_id, self.steps) from problem
        self.run.lap("env")
        self.check_finite(self.last_obs, reward[:, None])
        if len(ended):
            self.check_finite(self.raw_obs)
        return self.normalise_and_record(reward, terminated, done, ended, infos)

    def normalise_and_record(self, reward, terminated, done, ended, infos) -> Step:
        """Updates running statistics, normalises by them, and writes a row for every episode that ended."""
        self.episode_return += reward
        self.episode_length += 1
        self.discounted_return *= self.args.gamma
        self.discounted_return += reward
        if self.obs_rms:
            self.obs_rms.update(self.raw_obs)
        if self.args.norm_reward:
            self.return_rms.update(self.discounted_return)
            reward = (reward / np.sqrt(self.return_rms.var + 1e-8)).clip(-10, 10)
        self.obs[:] = self.normalize(self.raw_obs)
        next_obs = self.normalize(self.last_obs) if len(ended) else self.obs
        for i in ended:
            self.end_episode(i, infos[i])
        return Step(next_obs, reward, terminated, done)

    def end_episode(self, i: int, info: dict) -> None:
        """Records it; of an Atari game, whose episodes are lives, the whole games that are over."""
        episode = float(self.episode_return[i]), int(self.episode_length[i])
        for episode_return, length in info.get(games.ENDED, [episode]):
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
        if not self.episodes and not self.noted:
            self.note_endless_episodes()
        returns, lengths = zip(*self.recent) if self.recent else ([math.nan], [math.nan])
        return {
            "episodes": self.episodes,
            "return_100": float(np.mean(returns)),
            "length_100": float(np.mean(lengths)),
        }

    def note_endless_episodes(self) -> None:
        """Says once, after a third of the run, that no episode has ended, unless a time limit is to come."""
        spec = self.envs[0].spec
        limit = (spec.max_episode_steps if spec else None) or 0
        if self.steps >= self.args.total_timesteps / 3 and self.steps > limit * len(self.envs):
            self.noted = True
            what = f"no episode has ended in {self.steps:,} steps, so that there is no return to show"
            say(f"note: {what}: has {self.args.env_id} a time limit?", error=True)

    def close(self) -> None:
        for env in self.envs:
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
        state["envs"] = [env_state(env) for env in self.envs]
        return state

    def load_state_dict(self, state: dict) -> None:
        """Goes on where state_dict was called, in the middle of episodes if environments can be put there."""
        self.steps = state["steps"]
        self.episodes = state["episodes"]
        self.recent.extend(state["recent"])
        self.return_rms.load_state_dict(state["return_rms"])
        if self.obs_rms:
            self.obs_rms.load_state_dict(state["obs_rms"])
        self.reset_all([self.args.seed, RESUMED, self.steps] if self.steps else self.args.seed)
        self.obs[:] = self.normalize(self.raw_obs)
        if state["envs"][0]:
            for env, saved in zip(self.envs, state["envs"]):
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
    """Plain data, with NumPy's values as tensors, which torch.load reads safely; None for anything else."""
    if isinstance(value, np.random.RandomState):
        value = value.get_state()
    if isinstance(value, (tuple, list, deque)):
        items = [pack(item) for item in value]
        unknown = any(item is None and part is not None for item, part in zip(items, value))
        return None if unknown else tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, (np.ndarray, np.generic)):
        return torch.from_numpy(np.array(value)) if value.dtype.kind in "biufc" else None
    if type(value).__module__.startswith("minatar."):
        return pack_object(value)
    return value if isinstance(value, (bool, int, float, str)) else None


def pack_object(thing) -> dict:
    """The attributes that pack knows."""
    packed = {name: pack(value) for name, value in vars(thing).items()}
    return {name: value for name, value in packed.items() if value is not None}


def unpack(value):
    if isinstance(value, (tuple, list)):
        return type(value)(map(unpack, value))
    return value.numpy()[()] if isinstance(value, torch.Tensor) else value


def unpack_object(thing, packed: dict) -> None:
    """Gives it the attributes that pack_object has returned."""
    for name, value in packed.items():
        there = getattr(thing, name, None)
        if isinstance(value, dict):
            unpack_object(there, value)
        elif isinstance(there, np.random.RandomState):
            there.set_state(unpack(value))
        elif isinstance(there, deque):
            there.extend(unpack(value))  # as many as it holds
        else:
            vars(thing)[name] = unpack(value)


def env_state(env: gym.Env) -> dict | None:
    """All that a MuJoCo or classic-control environment of Gymnasium remembers, or a game: plain attributes of
    its own and of its wrappers, its random generator, MuJoCo's arrays, the emulator. None for others, or with
    other wrappers, which may remember more."""
    known = (gym.wrappers.TimeLimit, gym.wrappers.OrderEnforcing, games.Lives)
    known += (gym.wrappers.AtariPreprocessing, gym.wrappers.FrameStackObservation)
    known += (gym.wrappers.FlattenObservation, gym.wrappers.RescaleAction, gym.wrappers.TransformAction)
    *around, core = wrappers(env)
    modules = ("gymnasium.envs.mujoco.", "gymnasium.envs.classic_control.", "ale_py.", "minatar.")
    ours = type(core).__module__.startswith(modules)
    if not (ours and all(type(layer) in known for layer in around)):
        return None
    state = {"random": core.np_random.bit_generator.state}
    state["layers"] = [pack_object(layer) for layer in wrappers(env)]
    if hasattr(core, "ale"):
        emulator = core.clone_state(include_rng=True).__getstate__()
        state["emulator"] = torch.frombuffer(bytearray(emulator), dtype=torch.uint8)
    if data := getattr(core, "data", None):
        fields = {name: getattr(data, name) for name in dir(data)}
        arrays = {name: x for name, x in fields.items() if isinstance(x, np.ndarray)}
        state["shapes"] = {name: (x.dtype.str, x.shape) for name, x in arrays.items()}
        joined = b"".join(x.tobytes() for x in arrays.values())  # torch.save takes 50 us for every tensor
        state["bytes"] = torch.frombuffer(bytearray(joined), dtype=torch.uint8)
        state["time"] = data.time
    return state


def restore_env(env: gym.Env, state: dict) -> None:
    """Puts env, which has been reset, into a state that env_state returned."""
    core = env.unwrapped
    core.np_random.bit_generator.state = state["random"]
    for layer, values in zip(wrappers(env), state["layers"]):
        unpack_object(layer, values)
    if "emulator" in state:
        kind = type(core.clone_state())
        emulator = kind.__new__(kind)
        emulator.__setstate__(state["emulator"].numpy().tobytes())
        core.restore_state(emulator)
    if data := getattr(core, "data", None):
        data.time = state["time"]
        joined = memoryview(state["bytes"].numpy())
        for name, (dtype, shape) in state["shapes"].items():
            array = getattr(data, name, None)  # which another version of MuJoCo may lack
            size = math.prod(shape)
            if array is not None and array.shape == shape:
                array[...] = np.frombuffer(joined, dtype, size).reshape(shape)
            elif name in MUJOCO_STATE:  # others, of contacts for example, every step computes anew
                raise ValueError(f"MuJoCo's {name} had the shape {shape}")
            joined = joined[size * np.dtype(dtype).itemsize :]
