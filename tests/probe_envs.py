"""Environments with known answers, and broken ones: `--env-id tests.probe_envs:ProbeOneStep-v0` from the
repository root."""

import time

import gymnasium as gym
import numpy as np
from gymnasium.envs.classic_control.cartpole import CartPoleEnv


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


class BrokenReset(Probe):
    """The first observation of the thirtieth episode is NaN."""

    steps, episodes = 7, 0

    def observe(self):
        self.episodes += self.t == 0
        return np.array([np.nan if self.t == 0 and self.episodes == 30 else self.t], np.float32)


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


class Endless(Probe):
    """Never ends, and has no time limit."""

    steps = 10**9


class Texts(Probe):
    """A Dict observation, of which one part is text."""

    def __init__(self):
        super().__init__()
        number = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.observation_space = gym.spaces.Dict({"mission": gym.spaces.Text(30), "place": number})

    def observe(self):
        return {"mission": "go to the door", "place": np.full(2, self.t, np.float32)}


class Sequences(Probe):
    """A Dict observation, of which one part has no fixed length."""

    def __init__(self):
        super().__init__()
        list_of_any_length = gym.spaces.Sequence(gym.spaces.Discrete(3))
        inside = gym.spaces.Dict({"queue": list_of_any_length, "place": gym.spaces.Discrete(2)})
        self.observation_space = gym.spaces.Dict({"state": inside})

    def observe(self):
        return {"state": {"queue": (0, 1), "place": 0}}


class Silent(Probe):
    """Fails without a message."""

    def __init__(self):
        raise AssertionError


class Missing(Probe):
    """Fails with an exception whose message is only a word."""

    def __init__(self):
        raise KeyError("license")


class ArrayReward(Probe):
    """Rewards are arrays of one element."""

    steps = 3

    def reward(self, action):
        return np.array([2.0])


class HugeReward(Probe):
    """Rewards whose squares are beyond single precision."""

    steps = 3

    def reward(self, action):
        return 1e30


class Wide(Probe):
    """A box of +-2,000 in which the best action is 1,000: OneStep's task in other units."""

    def __init__(self):
        super().__init__()
        self.action_space = gym.spaces.Box(-2000.0, 2000.0, self.action_shape, np.float32)

    def step(self, action):
        assert action.shape == self.action_shape and (np.abs(action) <= 2000).all()
        self.t += 1
        reward = 1.0 - float(((action / 2000 - 0.5) ** 2).sum())
        return self.observe(), reward, True, False, {}


class Unit(OneStep):
    """The same task in a box of +-1."""

    def __init__(self):
        super().__init__()
        self.action_space = gym.spaces.Box(-1.0, 1.0, self.action_shape, np.float32)


class Picture(Probe):
    """As large as a frame of an Atari game."""

    def __init__(self):
        super().__init__()
        self.observation_space = gym.spaces.Box(0, 255, (84, 84, 3), np.uint8)

    def observe(self):
        return np.full((84, 84, 3), self.t % 256, np.uint8)


class Leaves(Broken):
    """Ends the process after 200 steps, as if all were well."""

    def observe(self):
        if np.isnan(super().observe()).any():
            raise SystemExit(0)
        return np.array([self.t], np.float32)


class Unspeakable(Probe):
    """Fails with an exception that cannot be shown."""

    def __init__(self):
        class Mute(Exception):
            def __str__(self):
                raise ValueError("no")

        raise Mute


class ArrayFlags(Probe):
    """Says in arrays of one element whether an episode has ended."""

    steps = 3

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        return obs, np.array([reward]), np.array([terminated]), np.array([truncated]), info


class Strict(Probe):
    """Refuses actions that are not in its box, whose bounds single precision does not have."""

    steps = 3

    def __init__(self):
        super().__init__()
        self.action_space = gym.spaces.Box(10.1, 30.7, (1,), np.float32)

    def step(self, action):
        assert self.action_space.contains(action), action
        self.t += 1
        return self.observe(), 1.0, self.t >= self.steps, False, {}


class Options(Probe):
    """Takes an argument: how long its episodes are."""

    def __init__(self, length=1, name="none"):
        super().__init__()
        self.steps = length
        self.name = name


class Unbounded(OneStep):
    """Takes any real number."""

    def __init__(self):
        super().__init__()
        self.action_space = gym.spaces.Box(-np.inf, np.inf, self.action_shape, np.float32)


NEW = (
    Unbounded,
    Leaves,
    Unspeakable,
    ArrayFlags,
    Strict,
    Endless,
    Texts,
    Sequences,
    Silent,
    Missing,
    ArrayReward,
    HugeReward,
    Wide,
    Unit,
    Picture,
    Options,
)
for env in (
    *NEW,
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
    BrokenReset,
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


class Wander(gym.Env):
    """Random dynamics with means and scales far from 0 and 1, in episodes of 2 to 12 steps, ended by
    termination, by truncation, or by both at once. Remembers all that it is asked and answers."""

    made = []  # all of them, in the order in which they were made
    spike = None  # the step of the first one made at which observation and reward are out of all range

    def __init__(self):
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.resets = []  # (seed, observation)
        self.steps = []  # (action, observation, reward, terminated, truncated)
        Wander.made.append(self)

    def observe(self):
        return np.array([5.0, -20.0, 0.01]) + np.array([1.0, 10.0, 1e-3]) * self.x

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.normal(size=3)
        self.left = self.np_random.integers(2, 13)
        self.end = [(True, False), (False, True), (False, True), (True, True)][self.np_random.integers(4)]
        self.resets.append((seed, self.observe()))
        return self.observe(), {}

    def step(self, action):
        self.x = 0.8 * self.x + 0.3 * self.np_random.normal(size=3) + 0.3 * self.push(action)
        obs = self.observe()
        reward = float(3 + self.x[0] - 0.5 * self.x[1] ** 2 + 0.3 * self.np_random.normal())
        if self is Wander.made[0] and len(self.steps) + 1 == self.spike:
            obs = obs - 1e4
            reward += 1e4
        self.left -= 1
        terminated, truncated = self.end if self.left == 0 else (False, False)
        self.steps.append((np.copy(action), obs, reward, terminated, truncated))
        return obs, reward, terminated, truncated, {}

    def push(self, action):
        return np.append(action, 0.0)


class WanderDiscrete(Wander):
    """Three actions, 2 to 4."""

    def __init__(self):
        super().__init__()
        self.action_space = gym.spaces.Discrete(3, start=2)

    def push(self, action):
        return 2 * np.eye(3)[action - 2]


gym.register("ProbeWander-v0", entry_point=Wander)
gym.register("ProbeWanderDiscrete-v0", entry_point=WanderDiscrete)


class Lights(gym.Env):
    """A small image (4, 5, 2) in which one of three columns is lit, and which of them, chosen as action 1 to
    3, pays; whatever is seen in the second channel does not matter. Episodes are cut after 10 steps. Light
    is 51, a fifth of 255."""

    dtype, light = np.uint8, 51

    def __init__(self):
        top = 1 if self.dtype is bool else 255
        self.observation_space = gym.spaces.Box(0, top, (4, 5, 2), self.dtype)
        self.action_space = gym.spaces.Discrete(3, start=1)

    def observe(self):
        self.column = int(self.np_random.integers(3))
        image = np.zeros((4, 5, 2), self.dtype)
        image[1 + self.np_random.integers(2), 1 + self.column, 0] = self.light
        image[..., 1] = self.light * (self.np_random.random((4, 5)) < 0.3)
        return image

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.observe(), {}

    def step(self, action):
        reward = 1.0 - 0.5 * abs(action - 1 - self.column)
        self.t += 1
        return self.observe(), reward, False, self.t >= 10, {}


class Switches(Lights):
    """The same of booleans, as in MinAtar."""

    dtype, light = bool, 1


class Thin(Lights):
    """Images that are too thin for a convolution."""

    def __init__(self):
        super().__init__()
        self.observation_space = gym.spaces.Box(0, 255, (2, 5, 2), np.uint8)

    def observe(self):
        return super().observe()[:2]


class Film(gym.Env):
    """Pictures (84, 84) that tell the step and the episode; action 1 pays. Episodes end after 1, 2, ..., 6
    steps and so on; every second one is cut."""

    def __init__(self):
        self.observation_space = gym.spaces.Box(0, 255, (84, 84), np.uint8)
        self.action_space = gym.spaces.Discrete(2)
        self.episode = 0

    def observe(self):
        picture = np.full((84, 84), 10 * self.t, np.uint8)
        picture[0, :2] = self.t, self.episode
        return picture

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.episode = 0, self.episode + 1
        return self.observe(), {}

    def step(self, action):
        self.t += 1
        over = self.t > self.episode % 6
        cut = self.episode % 2 == 0
        return self.observe(), float(action == 1), over and not cut, over and cut, {}


def stacked(frames=4):
    return gym.wrappers.FrameStackObservation(Film(), frames)


class Arcade(gym.Env):
    """A game of three lives, as Atari's tell about them: its steps are rows of `played`, `script` says what
    happens at each of them: "+" pays 7, "-" costs 3, "x" takes a life; the last one ends the game."""

    script, fire_pays = "+-x+x-x", 0.0
    meanings = ["NOOP", "UP", "FIRE"]

    def __init__(self):
        self.observation_space = gym.spaces.Box(0, 99, (1,), np.float32)
        self.action_space = gym.spaces.Discrete(3)
        self.played = []
        self.games = 0

    def get_action_meanings(self):
        return self.meanings

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.lives, self.games = 0, 3, self.games + 1
        return np.zeros(1, np.float32), {"lives": 3}

    def step(self, action):
        event = "." if action == 2 else self.script[self.t]  # firing changes nothing
        self.played.append((self.games, event))
        self.t += event != "."
        self.lives -= event == "x"
        over = self.t == len(self.script)
        reward = {"+": 7.0, "-": -3.0, ".": self.fire_pays}.get(event, 0.0)
        return np.float32([self.t]), reward, over, False, {"lives": self.lives}


class Table(gym.Env):
    """A decision process of three states, observed as vectors with a single 1, and two actions, in which
    moves are certain; episodes are cut after 20 steps."""

    to = np.array([[0, 1], [2, 0], [1, 2]])  # (S, A)
    rewards = np.array([[0.2, -0.5], [1.0, 0.0], [-1.0, 0.6]])

    def __init__(self):
        self.observation_space = gym.spaces.Box(0.0, 1.0, (3,), np.float32)
        self.action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.state = 0, int(self.np_random.integers(3))
        return np.eye(3, dtype=np.float32)[self.state], {}

    def step(self, action):
        reward = float(self.rewards[self.state, action])
        self.t, self.state = self.t + 1, int(self.to[self.state, action])
        return np.eye(3, dtype=np.float32)[self.state], reward, False, self.t >= 20, {}


class Pole(CartPoleEnv):
    """CartPole with a reward that tells how good a state is, so that preferences do too. It counts as one of
    Gymnasium's, whose state a checkpoint keeps."""

    __module__ = CartPoleEnv.__module__

    def step(self, action):
        obs, _, terminated, truncated, info = super().step(action)
        return obs, 1.0 - abs(float(obs[0])) - 5 * abs(float(obs[2])), terminated, truncated, info


for env in (Lights, Switches, Thin, Table, Arcade):
    gym.register(f"Probe{env.__name__}-v0", entry_point=env)
gym.register("ProbePole-v0", entry_point=Pole, max_episode_steps=30)
gym.register("ProbeFilm-v0", entry_point=stacked)
gym.register("ProbeShortFilm-v0", entry_point=lambda: stacked(3))
