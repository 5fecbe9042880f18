"""Games: of MinAtar, and of the Arcade Learning Environment (ALE), Atari's.

Their packages are in requirements-games.txt and are asked for by name only. A policy sees an Atari game as is
usual (Mnih et al., 2015; Machado et al., arXiv:1709.06009): of every four frames it acts once and sees the
last two, as one picture of 84 x 84 shades of grey, and an observation is the last four of these pictures,
(4, 84, 84). A game begins with up to 30 frames in which nothing is done.
"""

import contextlib
import importlib.util
import re

import gymnasium as gym
import numpy as np

from support.flags import fail

ATARI = re.compile(r"ALE/.+|.+(NoFrameskip|Deterministic)-v\d")


def package_of(env_id: str) -> str | None:
    """The package that registers an environment of this name, if it is a game's."""
    name = env_id.rpartition(":")[2]
    if name.startswith("MinAtar/"):
        return "minatar"
    return "ale_py" if ATARI.fullmatch(name) else None


def is_game(env_id: str) -> bool:
    return package_of(env_id) is not None


def hint(name: str) -> str:
    """What to add to the line on an environment that is not known, if Atari has a game of that name."""
    with contextlib.suppress(ImportError):
        register("ALE/any")
    game = re.sub(r"-v\d+$", "", name) + "NoFrameskip-v4"
    return f"; of Atari there is {game}" if game in gym.registry else ""


def check_packages(env_id: str) -> None:
    """Refuses a game whose package is not installed. What a module registers, which is named before a colon,
    is its own affair."""
    package = None if ":" in env_id else package_of(env_id)
    packages = {"ale_py": ("ale_py", "cv2")}.get(package, (package,))
    if package and not all(map(importlib.util.find_spec, packages)):
        fail(f"--env-id {env_id} needs a package more: pip install -r requirements-games.txt")


def register(name: str) -> None:
    """Makes games known that the import of their packages, which nobody else needs, does not."""
    name = name.rpartition(":")[2]
    if name in gym.registry:
        return
    if package_of(name) == "minatar":
        import minatar.gym

        minatar.gym.register_envs()
    if package_of(name) == "ale_py":
        import ale_py

        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no greetings
        gym.register_envs(ale_py)


def is_atari(env: gym.Env) -> bool:
    """Whether env is an Atari game that shows its screen, and not its memory."""
    return type(env.unwrapped).__module__.startswith("ale_py.") and len(env.observation_space.shape) == 3


def seen_by_policies(env: gym.Env, training: bool) -> gym.Env:
    """An Atari game with observations (4, 84, 84); in training, episodes are lives, and rewards signs."""
    if env.unwrapped._frameskip != 1:
        fix = """--env-kwargs '{"frameskip": 1}', or the NoFrameskip-v4 of the game"""
        raise ValueError(f"it skips frames, as is done here as well: {fix}")
    env = gym.wrappers.AtariPreprocessing(env)
    return gym.wrappers.FrameStackObservation(Lives(env, training), 4)


ENDED = "support.games: games that have ended"  # a key of info


class Lives(gym.Wrapper):
    """Presses FIRE where a life begins, which many games wait for. In training an episode is a life, after
    which the game goes on, and a reward is its sign; `info[ENDED]` has the return and the length of the game
    that has ended with the episode, if one has."""

    def __init__(self, env: gym.Env, training: bool):
        super().__init__(env)
        self.training = training
        meanings = env.unwrapped.get_action_meanings()
        self.fire = meanings.index("FIRE" if "FIRE" in meanings else "NOOP")
        self.lives = 0  # left; 0 where a game is to begin
        self.game_return, self.game_length = 0.0, 0
        self.ended = []  # (return, length) of games that no info has told yet

    def reset(self, *, seed=None, options=None):
        over = seed is not None or not self.lives
        for _ in range(10):
            if over:
                self.env.reset(seed=seed, options=options)
                self.game_return, self.game_length = 0.0, 0
            obs, _, terminated, truncated, info = self.play(self.fire)
            over, seed = terminated or truncated, None
            if not over:
                return obs, info
        raise RuntimeError("the game ends before it begins")

    def step(self, action):
        lives = self.lives
        self.game_length += 1
        obs, reward, terminated, truncated, info = self.play(action)
        lost = 0 < self.lives < lives
        if self.training:
            info[ENDED] = list(self.ended)
            if terminated or truncated or lost:
                self.ended = []
            return obs, float(np.sign(reward)), terminated or lost, truncated, info
        if lost:
            obs, more, terminated, truncated, info = self.play(self.fire)
            reward += more
        return obs, reward, terminated, truncated, info

    def play(self, action):
        step = _, reward, terminated, truncated, info = self.env.step(action)
        self.game_return += float(reward)
        self.lives = 0 if terminated or truncated else info["lives"]
        if terminated or truncated:
            self.ended.append((self.game_return, self.game_length))
        return step
