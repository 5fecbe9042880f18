"""support/environments.py beside the rollouts that test_rollout.py rebuilds."""

import gymnasium as gym
import mujoco
import numpy as np
import pytest

from blpo_continuous import Args
from support.environments import ONE_ISLAND, make_env

WITHOUT_ISLANDS = int(mujoco.mjtDisableBit.mjDSBL_ISLAND)


def looks_for_islands(env) -> bool:
    return not env.unwrapped.model.opt.disableflags & WITHOUT_ISLANDS


def trajectory(env, steps: int) -> list[bytes]:
    rng = np.random.default_rng(0)
    seen = [env.reset(seed=1)[0].tobytes()]
    for _ in range(steps):
        action = rng.uniform(env.action_space.low, env.action_space.high).astype(np.float32)
        obs, reward, terminated, truncated, _ = env.step(action)
        seen.append(obs.tobytes() + np.float64(reward).tobytes())
        if terminated or truncated:
            seen.append(env.reset()[0].tobytes())
    return seen


@pytest.mark.parametrize("env_id", sorted(ONE_ISLAND))
def test_steps_are_the_same_without_looking_for_islands(env_id):
    faster, plain = make_env(Args(env_id=env_id)), gym.make(env_id, disable_env_checker=True)
    assert not looks_for_islands(faster) and looks_for_islands(plain)
    assert trajectory(faster, 400) == trajectory(plain, 400)


def test_other_models_are_left_alone():
    assert looks_for_islands(make_env(Args(env_id="Pusher-v5")))  # its steps would differ
    changed = make_env(Args(env_id="Hopper-v5", env_kwargs='{"frame_skip": 2}'))
    assert looks_for_islands(changed)


def clock_runs(env) -> bool:
    """Whether MuJoCo measures how long its steps take."""
    env.reset(seed=0)
    env.step(env.action_space.sample())
    return env.unwrapped.data.timer[mujoco.mjtTimer.mjTIMER_STEP].duration > 0


@pytest.mark.skipif(not mujoco.__version__.startswith("3.3."), reason="newer ones keep their clock")
def test_mujocos_clock_is_stopped_but_not_a_users():
    assert clock_runs(gym.make("Hopper-v5"))
    assert not clock_runs(make_env(Args(env_id="Hopper-v5")))
    mujoco.set_mjcb_time(lambda: 2.0)
    try:
        make_env(Args(env_id="Hopper-v5"))
        assert mujoco.get_mjcb_time()() == 2.0
    finally:
        mujoco.set_mjcb_time(None)
