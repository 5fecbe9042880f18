"""Environments with known answers, and broken ones: `--env-id tests.probe_envs:ProbeOneStep-v0` from the
repository root."""

import time

import gymnasium as gym
import numpy as np


class Probe(gym.Env):
    """Observation (step,), reward 1 for each of `steps` steps, then terminated, or truncated by a time
    limit."""

    steps, action_shape = 1, (1,)

    def __init__(self):
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
        self.action_space = gym.spaces.Box(-2.0, 2.0, self.action_shape, np.float32)

    def observe(self):
        return np.array([self.t], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.observe(), {}

    def step(self, action):
        assert action.shape == self.action_shape and (np.abs(action) <= 2).all()
        reward = self.reward(action)
        self.t += 1
        return self.observe(), reward, self.t >= self.steps, False, {}

    def reward(self, action):
        return 1.0


class OneStep(Probe):
    """The best action is 0.5."""

    def reward(self, action):
        return 1.0 - float(((action - 0.5) ** 2).sum())


class TwoStep(Probe):
    """Only the second step pays, best at -0.5: the critic has to carry its value back to the first."""

    steps = 2

    def reward(self, action):
        return (1.0 - float(((action + 0.5) ** 2).sum())) if self.t == 1 else 0.0


class Forever(Probe):
    """Reward 1 for ever in one state; registered with a time limit of 5. V = 1 / (1 - gamma) if truncation
    bootstraps."""

    steps = 10**9

    def observe(self):
        return np.zeros(1, np.float32)


class Clock(Probe):
    """Observes the time, in one array that it reuses; truncated after 4 steps in one environment, 5 in the
    next, and so on."""

    steps, made = 10**9, 0

    def __init__(self):
        super().__init__()
        self.clock = np.zeros(1, np.float32)
        self.limit, Clock.made = 4 + Clock.made % 4, Clock.made + 1

    def observe(self):
        self.clock[:] = self.t
        return self.clock

    def step(self, action):
        obs, reward, terminated, _, info = super().step(action)
        return obs, reward, terminated, self.t >= self.limit, info


class Odd(Probe):
    """Dictionary observations, an action of shape (2, 2)."""

    steps, action_shape = 3, (2, 2)

    def __init__(self):
        super().__init__()
        box = gym.spaces.Box(-np.inf, np.inf, (2, 2), np.float32)
        self.observation_space = gym.spaces.Dict({"a": box, "b": gym.spaces.Discrete(3)})

    def observe(self):
        return {"a": np.full((2, 2), self.t, np.float32), "b": np.int64(self.t % 3)}


class Broken(Probe):
    """Returns NaN after 200 steps."""

    steps, total = 7, 0

    def observe(self):
        self.total += 1
        return np.array([np.nan if self.total > 200 else self.t], np.float32)


class BrokenEnd(Probe):
    """The last observation of the thirtieth episode is NaN, the reset after it is fine again: a simulation
    that blew up."""

    steps, episodes = 7, 0

    def observe(self):
        self.episodes += self.t == self.steps
        return np.array([np.nan if self.t == self.steps and self.episodes > 30 else self.t], np.float32)


class Raises(Broken):
    """Raises after 200 steps."""

    def observe(self):
        if np.isnan(super().observe()).any():
            raise RuntimeError("the robot\nfell off the table")
        return np.array([self.t], np.float32)


class Reshapes(Broken):
    """Returns another shape after 200 steps, one that would broadcast."""

    def observe(self):
        return (
            np.zeros((), np.float32) if np.isnan(super().observe()).any() else np.array([self.t], np.float32)
        )


class Hangs(Broken):
    """Does not come back from a reset after 200 steps."""

    def reset(self, **options):
        if self.total > 200:
            time.sleep(1000)
        return super().reset(**options)


class Lies(Probe):
    """Its observations are not of the shape that it announces."""

    def observe(self):
        return np.zeros(2, np.float32)


class Refuses(Probe):
    def __init__(self):
        raise RuntimeError("no licence\nfor this simulator")


class NoReset(Probe):
    def reset(self, **_):
        raise RuntimeError("lost the map")


class IntegerAction(Probe):
    def __init__(self):
        super().__init__()
        self.action_space = gym.spaces.Box(0, 3, (2,), np.int64)


class ManyActions(Probe):
    def __init__(self):
        super().__init__()
        self.action_space = gym.spaces.MultiDiscrete([2, 3])


class Choice(Probe):
    """Discrete actions 3 to 5, of which 4 pays in the second step."""

    steps = 2

    def __init__(self):
        super().__init__()
        self.action_space = gym.spaces.Discrete(3, start=3)

    def step(self, action):
        assert isinstance(action, int) and 3 <= action <= 5
        reward = float(self.t == 1 and action == 4)
        self.t += 1
        return self.observe(), reward, self.t >= self.steps, False, {}


class Grid(Choice):
    """Observes a picture."""

    def __init__(self):
        super().__init__()
        self.observation_space = gym.spaces.Box(0, 255, (4, 4, 3), np.uint8)

    def observe(self):
        return np.full((4, 4, 3), self.t, np.uint8)


for env in (
    ManyActions,
    Choice,
    Grid,
    OneStep,
    TwoStep,
    Probe,
    Clock,
    Odd,
    Broken,
    BrokenEnd,
    Raises,
    Reshapes,
    Hangs,
    Lies,
    Refuses,
    NoReset,
    IntegerAction,
):
    gym.register(f"Probe{env.__name__}-v0", entry_point=env)
gym.register("ProbeForever-v0", entry_point=Forever, max_episode_steps=5)
