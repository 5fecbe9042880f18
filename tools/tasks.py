"""Environments of the experiments with learned rewards: `--env-id tools.tasks:Preference-v0`, from the
repository's folder.

    Preference-v0      the preference problem of sobirl_tabular.py with the same seed, as an environment
    PendulumBins-v0    Pendulum-v1 with seven torques to choose from
"""

import gymnasium as gym
import numpy as np

import sobirl_tabular


class Preference(gym.Env):
    """Episodes of two steps in a decision process of four states, which are observed as vectors with a single
    1, and three actions. They begin in any state and are cut, not terminated: the follower plans further than
    a segment is long. The reward is the true one, whose preferences are to be learned."""

    def __init__(self, problem: int = 688):
        self.problem = sobirl_tabular.preference(problem)
        self.P = self.problem.P.numpy()
        states, actions = self.P.shape[:2]
        self.rewards = self.problem.true.numpy()
        self.observation_space = gym.spaces.Box(0.0, 1.0, (states,), np.float32)
        self.action_space = gym.spaces.Discrete(actions)

    def observe(self):
        return np.eye(len(self.P), dtype=np.float32)[self.state]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.state = 0, int(self.np_random.integers(len(self.P)))
        return self.observe(), {}

    def step(self, action):
        reward = float(self.rewards[self.state, action])
        self.state = int(self.np_random.choice(len(self.P), p=self.P[self.state, action]))
        self.t += 1
        return self.observe(), reward, False, self.t == self.problem.horizon, {}


def pendulum_with_bins(bins: int = 7, **options):
    """Pendulum-v1 with torques that are evenly spaced from -2 to 2."""
    torques = np.linspace(-2, 2, bins, dtype=np.float32)[:, None]
    env = gym.make("Pendulum-v1", disable_env_checker=True, **options)
    return gym.wrappers.TransformAction(env, torques.__getitem__, gym.spaces.Discrete(bins))


gym.register("Preference-v0", entry_point=Preference)
gym.register("PendulumBins-v0", entry_point=pendulum_with_bins)
