"""support/games.py, and what sobirl_discrete.py makes of frames: lives and games, stacks that the replay
memory puts together, networks. What needs the games themselves is skipped without their packages."""

import importlib.util
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch

import sobirl_discrete as sobirl
from leader import ChoiceReward, preference_gradient
from support import games
from support.environments import Image, env_state, image_of, make_env, restore_env
from support.preferences import Pairs, Preferences
from support.replay import Replay
from support.run_folder import PREVIOUS
from tests.probe_envs import Arcade
from tests.test_discrete import SMALL, flags
from tests.test_replay import Args, FakeRun
from tests.test_sac import contents, interrupted
from tests.test_scripts import ROOT, refused, rows, train

FRAMES = Image(84, 84, 4, 255.0, True)
FILM = [*SMALL, "--env-id", "tests.probe_envs:ProbeFilm-v0", "--batch-size", 4, "--reward-batch-size", 2]
FILM += ["--query-steps", 18, "--segment", 2, "--pairs", 2, "--initial-pairs", 3, "--reward-epochs", 1]
FILM += ["--update-frequency", 6, "--total-timesteps", 120, "--initial-epochs", 1, "--hyper-batch-size", 2]

atari = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("ale_py", "cv2"))), reason="needs requirements-games.txt"
)
minatar = pytest.mark.skipif(not importlib.util.find_spec("minatar"), reason="needs requirements-games.txt")
BEAM = "BeamRiderNoFrameskip-v4"


# Lives and games


def lives_of_a_game(training):
    env = Arcade()
    return env, games.Lives(env, training)


def test_in_training_an_episode_is_a_life():
    """The game goes on where it was, FIRE begins every life, rewards are signs, and the last episode tells
    the return and the length of the game."""
    core, env = lives_of_a_game(training=True)
    env.reset(seed=1)
    found = []
    for _ in range(2 * len(core.script)):
        obs, reward, terminated, truncated, info = env.step(0)
        found.append((obs.item(), reward, terminated, info[games.ENDED]))
        if terminated:
            env.reset()
    game = [(1, 1, False, []), (2, -1, False, []), (3, 0, True, []), (4, 1, False, [])]
    game += [(5, 0, True, []), (6, -1, False, []), (7, 0, True, [(7 - 3 + 7 - 3, 7)])]
    assert found == 2 * game
    assert core.played[:20] == [(n, event) for n in (1, 2) for event in ".+-x.+x.-x"]


def test_in_an_evaluation_an_episode_is_a_game():
    core, env = lives_of_a_game(training=False)
    env.reset(seed=1)
    core.fire_pays = 0.5  # which belongs to the step before
    found = [env.step(0)[1:3] for _ in core.script]
    assert found == [(7, False), (-3, False), (0.5, False), (7, False), (0.5, False), (-3, False), (0, True)]
    assert "".join(event for _, event in core.played) == ".+-x.+x.-x"


def test_a_seed_begins_another_game():
    core, env = lives_of_a_game(training=True)
    for seed, expected in ((1, 1), (None, 1), (2, 2)):
        env.reset(seed=seed)
        assert core.games == expected


def test_games_that_end_where_a_life_begins():
    """As FIRE is pressed: such a game is told with the next life, and one that never begins is given up."""
    core, env = lives_of_a_game(training=True)
    env.reset(seed=1)
    while not env.step(0)[2]:
        pass
    step, ends = core.step, [True, False]
    core.step = lambda action: (*step(action)[:3], ends.pop(0) if ends else False, {"lives": core.lives})
    env.reset()
    assert core.games == 2 and not ends
    infos = []
    while not infos or not infos[-1][2]:
        infos.append(env.step(0))
    assert infos[-1][4][games.ENDED] == [(4.0, 3)] and env.ended == []
    core.step = lambda action: (*step(action)[:3], True, {"lives": core.lives})
    with pytest.raises(RuntimeError, match="ends before it begins"):
        env.reset(seed=1)


def test_a_foreign_info_ends_no_run(tmp_path, monkeypatch):
    """Whatever an environment calls a game."""
    step = Arcade.step
    monkeypatch.setattr(Arcade, "step", lambda self, a: (*step(self, a)[:4], {"game": "chess", "lives": 0}))
    folder = train(sobirl, tmp_path, *SMALL, "--env-id", "tests.probe_envs:ProbeArcade-v0")
    assert len(rows(folder / "episodes.csv")) > 10


def test_games_without_lives_or_fire(monkeypatch):
    """Pong counts no lives; a game without FIRE begins with a step of nothing."""
    monkeypatch.setattr(Arcade, "meanings", ["UP", "NOOP"])
    core, env = lives_of_a_game(training=True)
    step, reset = core.step, core.reset
    core.step = lambda action: (*step(action)[:4], {"lives": 0})
    core.reset = lambda **given: (reset(**given)[0], {"lives": 0})
    assert env.fire == 1
    env.reset(seed=1)
    ends = [env.step(0)[2] for _ in core.script[1:]]
    assert ends == [False] * 5 + [True]


@pytest.fixture
def arcade(monkeypatch):
    """Makes of Arcade a game as Atari's are."""
    monkeypatch.setattr(games, "is_atari", lambda env: isinstance(env.unwrapped, Arcade))
    monkeypatch.setattr(games, "seen_by_policies", games.Lives)


def test_returns_are_those_of_games(arcade, tmp_path):
    given = [*SMALL, "--env-id", "tests.probe_envs:ProbeArcade-v0", "--eval-episodes", 2, "--eval-stochastic"]
    folder = train(sobirl, tmp_path, *given)
    recorded = rows(folder / "episodes.csv")
    assert len(recorded) >= 5 and {row["return"] for row in recorded} == {8}
    assert [row["return"] for row in rows(folder / "evaluation.csv")] == [8, 8]


# Frames


def film(tmp_path, capacity=40, spare=5, add_to=None, after=0):
    """A replay memory of the film, and the transitions that it was told, step by step: a new one, or that of
    `add_to`, which is told what comes after so many steps."""
    env = gym.wrappers.FlattenObservation(gym.make("tests.probe_envs:ProbeFilm-v0"))
    memory = add_to
    if not memory:
        tmp_path.mkdir(exist_ok=True)
        memory = Replay(Args(tmp_path, capacity), 4 * 84 * 84, 0, spare, np.uint8, 4)
        memory.begin(FakeRun(tmp_path))
    told = {}
    obs, _ = env.reset(seed=0)
    for step in range(150):
        next_obs, reward, terminated, truncated, _ = env.step(step % 2)
        told[memory.written] = (obs, next_obs)
        if step >= after:
            memory.add(obs, step % 2, next_obs, reward, terminated, terminated or truncated)
        obs = env.reset()[0] if terminated or truncated else next_obs
        yield memory, told


def test_stacks_are_those_of_the_wrapper(tmp_path):
    """At beginnings and ends of episodes and where the ring goes round; a row holds one frame."""
    for memory, told in film(tmp_path):
        numbers = np.arange(memory.first, memory.written)
        numbers = numbers[memory.is_step(numbers)]
        found = memory.read(numbers)
        assert (found.obs == np.stack([told[n][0] for n in numbers])).all()
        assert (found.next_obs == np.stack([told[n][1] for n in numbers])).all()
    assert memory.written > 2 * memory.size and memory.row.nbytes == 84 * 84 + 4 + 4 + 4
    assert memory.read(numbers[:30].reshape(2, 15)).obs.shape == (2, 15, 4 * 84 * 84)
    assert memory.read(numbers[:0].reshape(0, 2)).obs.shape == (0, 2, 4 * 84 * 84)
    assert (memory.rewards(numbers) == found.rewards).all()


def test_stacks_after_a_checkpoint(tmp_path):
    """Also of the oldest rows, where it is two checkpoints old and the ring has been written over as far as
    it may be."""
    states, spare = {}, 5
    for memory, told in film(tmp_path, spare=spare):
        states[memory.written] = memory.state_dict(), dict(told)
        for written, (state, known) in states.items():
            if not 0 < memory.written - written <= 2 * spare:
                continue
            again = Replay(Args(tmp_path, 40), 4 * 84 * 84, 0, spare, np.uint8, 4)
            again.rows, again.written = memory.rows.copy(), written
            again.kinds, again.before = memory.kinds.copy(), memory.before.copy()
            numbers = np.arange(again.first, written)
            numbers = numbers[again.is_step(numbers)][:-1]  # what follows the last one is written over
            if not len(numbers):
                continue
            assert (again.read(numbers).obs == np.stack([known[n][0] for n in numbers])).all()


def test_stacks_of_a_memory_that_goes_on(tmp_path):
    """The second half of the steps, in the middle of an episode, added to a memory that a checkpoint has
    begun."""
    *_, (whole, _) = film(tmp_path / "whole", 400)
    for count, (half, _) in enumerate(film(tmp_path / "half", 400), 1):
        if count == 75:
            break
    assert half.age == 3
    again = Replay(half.args, 4 * 84 * 84, 0, 5, np.uint8, 4)
    again.begin(FakeRun(tmp_path / "half", dict(iteration=1)))
    again.load_state_dict(half.state_dict())
    list(film(tmp_path, add_to=again, after=75))
    numbers = np.arange(whole.first, whole.written)
    assert again.written == whole.written and (again.read(numbers).obs == whole.read(numbers).obs).all()


def test_training_sees_the_frames_of_the_wrapper(tmp_path, monkeypatch):
    """Whatever is sampled: four frames of one episode, one step apart or the first one, bytes, and the newest
    last."""
    batches, observed = [], []
    read, observations = Replay.read, Replay.observations

    def see(self, numbers):
        assert self.row.nbytes == 84 * 84 + 12  # one frame, action, reward, kind
        batches.append(read(self, numbers))
        return batches[-1]

    def see_observations(self, numbers):
        found = observations(self, numbers)
        observed.extend([found] * (len(numbers) > 0))
        return found

    monkeypatch.setattr(Replay, "read", see)
    monkeypatch.setattr(Replay, "observations", see_observations)
    train(sobirl, tmp_path, *FILM, "--method", "drlhf")
    for obs in observed:
        assert obs.dtype == np.uint8
        step, episode = np.moveaxis(obs.reshape(-1, 4, 84 * 84)[..., :2].astype(int), -1, 0)
        assert (episode == episode[:, :1]).all()
        assert (step == (step[:, 3:] - np.arange(4)[::-1]).clip(0)).all()
    for batch in batches:
        before, after = (x.reshape(-1, 4, 84 * 84) for x in (batch.obs, batch.next_obs))
        assert (after[:, :3] == before[:, 1:]).all()
    assert len(batches) == 10 and len(observed) > 30


def test_networks_of_frames():
    found = sobirl.network(FRAMES, 256, 9)
    convolutions = [module for module in found if isinstance(module, torch.nn.Conv2d)]
    assert [(*c.weight.shape, *c.stride) for c in convolutions] == [
        (32, 4, 8, 8, 4, 4), (64, 32, 4, 4, 2, 2), (64, 64, 3, 3, 1, 1)
    ]  # fmt: skip
    assert [tuple(x.weight.shape) for x in found if isinstance(x, torch.nn.Linear)] == [(512, 3136), (9, 512)]
    assert [type(x).__name__ for x in found].count("ReLU") == 4
    found = sobirl.reward_network(FRAMES, 64, 9)
    convolutions = [module for module in found if isinstance(module, torch.nn.Conv2d)]
    assert [(*c.weight.shape, *c.stride) for c in convolutions] == [
        (16, 4, 7, 7, 3, 3), (16, 16, 5, 5, 2, 2), (16, 16, 3, 3, 1, 1), (16, 16, 3, 3, 1, 1)
    ]  # fmt: skip
    kinds = [type(x).__name__ for x in found]
    assert kinds[2:5] == ["BatchNorm2d", "LeakyReLU", "Dropout"] and kinds.count("Dropout") == 4
    assert [tuple(x.weight.shape) for x in found if isinstance(x, torch.nn.Linear)] == [(64, 784), (9, 64)]
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 84, 84), dtype=np.uint8)
    pixels = sobirl.Picture(FRAMES)(torch.as_tensor(images.reshape(3, -1)))
    assert torch.allclose(pixels, torch.as_tensor(images / 255).float())


def reward_of_frames():
    torch.manual_seed(0)
    return ChoiceReward(FRAMES, 2, flags(), sobirl.reward_network)


def test_dropout_and_batch_norm_act_in_training_alone():
    """(13) has them, of one pass; what the follower sees, and predictions, have not, and change no
    statistics."""
    reward = reward_of_frames()
    rng = np.random.default_rng(0)
    obs = rng.integers(0, 256, (3, 2, 2, 4 * 84 * 84), dtype=np.uint8)
    pairs = Pairs(obs, rng.integers(0, 2, (3, 2, 2)).astype(np.int32), np.float32([1, 0, 0.5]))
    before = {name: value.clone() for name, value in reward.state_dict().items()}
    seen = [reward.seen(pairs.obs, pairs.actions) for _ in range(2)]
    assert (seen[0] == seen[1]).all()
    assert (seen[0] == reward.predict(pairs.obs, pairs.actions)[0]).all()
    assert all((value == before[name]).all() for name, value in reward.state_dict().items())

    torch.manual_seed(1)
    losses, margins, gradient = preference_gradient(reward, pairs)
    assert not reward.training
    changed = {name for name, value in reward.state_dict().items() if (value != before[name]).any()}
    assert {name.split(".")[-1] for name in changed} == {"running_mean", "running_var", "num_batches_tracked"}
    again = reward_of_frames()
    torch.manual_seed(1)
    (net,) = again.nets.train()
    outputs = net(torch.as_tensor(obs.reshape(12, -1)))
    chosen = outputs.gather(1, torch.as_tensor(pairs.actions).long().reshape(12, 1)).reshape(3, 2, 2)
    expected = chosen[:, 0].sum(1) - chosen[:, 1].sum(1)
    assert np.allclose(margins[0], expected.detach(), atol=1e-6)
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    loss = bce(expected, torch.as_tensor(pairs.labels))
    assert losses.mean() == pytest.approx(float(loss.detach()), rel=1e-5)
    expected = torch.cat([p.flatten() for p in torch.autograd.grad(loss, list(net.parameters()))])
    assert np.allclose(gradient, expected, atol=1e-6) and expected.abs().max() > 1e-3
    for name, value in again.nets.state_dict().items():
        assert torch.allclose(value, reward.nets.state_dict()[name]), name


def test_with_the_second_term_times_0_frames_are_those_of_drlhf(tmp_path, monkeypatch):
    """It draws no dropout mask and changes no statistics."""
    expected = torch.load(train(sobirl, tmp_path, *FILM, "--method", "drlhf") / "model.pt", weights_only=True)
    original, calls = sobirl.second_term, []

    def nothing(*inputs):
        calls.append(original(*inputs))
        return 0 * calls[-1][0], 0.0

    monkeypatch.setattr(sobirl, "second_term", nothing)
    found = torch.load(train(sobirl, tmp_path, *FILM, "--method", "sobirl") / "model.pt", weights_only=True)
    assert calls and any(np.abs(gradient).max() > 0 for gradient, _ in calls)
    for net in ("actor", "critic", "reward"):
        assert all((found[net][name] == value).all() for name, value in expected[net].items()), net


def test_segments_are_predicted_in_parts(tmp_path, monkeypatch):
    """Pairs of them, and of their observations; the numbers are the same. No part has a graph."""
    found, parts, seen = [], [], []
    steps, at = Preferences.steps, ChoiceReward.at

    def see(self, starts):
        parts.append(len(starts))
        return steps(self, starts)

    def see_at(self, obs, actions):
        each, rewards = at(self, obs, actions)
        if not self.training:
            seen.append((len(obs), any(J.J.graph.requires_grad for J in each)))
        return each, rewards

    monkeypatch.setattr(Preferences, "steps", see)
    monkeypatch.setattr(ChoiceReward, "at", see_at)
    for at_once, numbers, largest in ((2, 4 * 84 * 84 * 3, 2), (300, 10**9, 300)):
        parts.clear()
        seen.clear()
        monkeypatch.setattr("support.preferences.AT_ONCE", at_once)
        monkeypatch.setattr("leader.LARGEST", numbers)
        folder = train(sobirl, tmp_path, *FILM, "--method", "drlhf")
        found.append([(row["accuracy_replay"], row["r_mean"]) for row in rows(folder / "progress.csv")])
        assert max(parts) == largest
        assert max(count for count, _ in seen) == (4 if largest == 2 else 1200)
        assert not any(graph for _, graph in seen)
    assert np.allclose(*found, equal_nan=True) and np.isfinite(found[0][-1]).all()


def test_other_frames_are_refused(tmp_path, capsys):
    given = ["--env-id", "tests.probe_envs:ProbeShortFilm-v0", "--runs-dir", tmp_path]
    err = refused(sobirl, capsys, *given)
    assert "--env-id must have 4 frames of 84 x 84, not (84, 84, 3)" in err


# Packages


@pytest.mark.parametrize("name", [BEAM, "ALE/Pong-v5", "MinAtar/Breakout-v1"])
def test_games_need_their_packages(name, tmp_path, capsys, monkeypatch):
    """To train, and to evaluate."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    err = refused(sobirl, capsys, "--env-id", name, "--runs-dir", tmp_path)
    assert err.startswith(f"error: --env-id {name} ") and "pip install -r requirements-games.txt" in err
    monkeypatch.undo()
    folder = train(sobirl, tmp_path, *SMALL, "--env-id", "CartPole-v1")
    monkeypatch.setattr(games, "package_of", lambda name: "no_such_package")
    assert "pip install -r requirements-games.txt" in refused(sobirl, capsys, "--evaluate", folder)


def test_what_a_module_registers_needs_no_package_of_ours(monkeypatch):
    monkeypatch.setattr(games, "package_of", lambda name: "no_such_package")
    games.check_packages("tests.probe_envs:ProbeFrozenDeterministic-v1")


def test_which_names_are_games():
    found = {BEAM: "ale_py", "ALE/Pong-v5": "ale_py", "module:ALE/Pong-v5": "ale_py", "Hopper-v4": None}
    found |= {"MinAtar/Asterix-v0": "minatar", "PongDeterministic-v4": "ale_py", "Pendulum-v1": None}
    assert {name: games.package_of(name) for name in found} == found


# The games themselves


def beam(training=True, name=BEAM, kwargs="{}"):
    return make_env(SimpleNamespace(**BASE, env_id=name, env_options=eval(kwargs)), training)


BASE = dict(rescale_actions="auto")


@atari
def test_atari_as_policies_see_it():
    """The last four pictures, bytes; the usual chain of wrappers gives the same."""
    games.register(BEAM)
    env = beam()
    assert image_of(env) == FRAMES and env.observation_space.shape == (4 * 84 * 84,)
    usual = gym.wrappers.AtariPreprocessing(gym.make(BEAM), noop_max=30, frame_skip=4, screen_size=84)
    obs, _ = env.reset(seed=3)
    usual.reset(seed=3)
    first = usual.step(1)[0]  # FIRE
    frames = [first] * 4
    assert (obs.reshape(4, 84, 84) == frames).all() and obs.dtype == np.uint8 and obs.std() > 5
    for action in np.random.default_rng(0).integers(0, 9, 60).tolist():
        frames = [*frames[1:], usual.step(action)[0]]
        assert (env.step(action)[0].reshape(4, 84, 84) == frames).all()


@atari
def test_atari_lives_and_returns(tmp_path):
    """A life lost does not restart the game, whose return is the sum of the rewards of all lives."""
    env = beam()
    env.reset(seed=0)
    rng = np.random.default_rng(0)
    lives, total, ends, raw = [env.unwrapped.ale.lives()], 0.0, 0, env.unwrapped.step

    def step(action):
        nonlocal total
        found = raw(action)
        total += float(found[1])
        return found

    env.unwrapped.step = step
    signs = set()
    while True:
        _, reward, terminated, truncated, info = env.step(int(rng.integers(9)))
        signs.add(reward)
        if terminated:
            ends += 1
            lives.append(env.unwrapped.ale.lives())
            if info[games.ENDED]:
                break
            env.reset()
            assert env.unwrapped.ale.lives() == lives[-1]
    assert lives == [3, 2, 1, 0] and ends == 3 and signs == {0.0, 1.0}
    ((game_return, length),) = info[games.ENDED]
    assert game_return == total and length < 20_000 and total >= 44 and total % 44 == 0


@atari
def test_atari_by_another_name(tmp_path):
    for name, ends in (("Pong-v4", "of Atari there is PongNoFrameskip-v4\n"), ("Pendulun-v1", "v5?\n")):
        command = [sys.executable, ROOT / "sobirl_discrete.py", "--env-id", name, "--runs-dir", tmp_path]
        found = subprocess.run(command, capture_output=True, text=True)
        assert found.returncode == 2 and found.stderr.endswith(ends) and found.stderr.count("\n") == 1


@minatar
def test_benchmarks_of_games(tmp_path):
    command = ["bash", ROOT / "benchmark.sh", "--dry-run"]
    settings = dict(PYTHON=sys.executable, ENVS="MinAtar/Breakout-v1", METHODS="drlhf", SEEDS="1")
    out = subprocess.check_output(command, env=os.environ | settings, cwd=tmp_path, text=True)
    assert "/sobirl_discrete.py " in out and "--total-timesteps=500000" in out


@atari
def test_atari_that_skips_frames_is_refused(tmp_path, capsys):
    err = refused(sobirl, capsys, "--env-id", "ALE/BeamRider-v5", "--runs-dir", tmp_path)
    assert "frameskip" in err and "NoFrameskip-v4" in err
    assert image_of(beam(name="ALE/BeamRider-v5", kwargs="{'frameskip': 1}")) == FRAMES


def goes_on(env, again, actions):
    """Both see the same, whatever is done."""
    for action in actions:
        one, other = (e.step(int(action)) for e in (env, again))
        assert (one[0] == other[0]).all() and one[1:4] == other[1:4]
        if one[2] or one[3]:
            assert (env.reset()[0] == again.reset()[0]).all()


GAMES = [pytest.param(BEAM, marks=atari), pytest.param("PongNoFrameskip-v4", marks=atari)]
GAMES += [
    pytest.param(f"MinAtar/{name}-v1", marks=minatar)
    for name in ("Breakout", "Asterix", "Freeway", "Seaquest", "SpaceInvaders")
]


@pytest.mark.parametrize("name", GAMES)
def test_games_go_on_in_the_middle(name, tmp_path):
    """From a checkpoint's file: emulator, frames and all."""
    games.register(name)
    env, again = beam(name=name), beam(name=name)
    rng = np.random.default_rng(0)
    env.reset(seed=5)
    for action in rng.integers(0, env.action_space.n, 137):
        if env.step(int(action))[2]:
            env.reset()
    torch.save(env_state(env), tmp_path / "state.pt")
    assert (tmp_path / "state.pt").stat().st_size < 300_000
    again.reset(seed=6)
    restore_env(again, torch.load(tmp_path / "state.pt", weights_only=True))
    goes_on(env, again, rng.integers(0, env.action_space.n, 700))


@atari
def test_atari_resume_is_byte_identical(tmp_path, monkeypatch):
    given = [*FILM, "--env-id", "BreakoutNoFrameskip-v4", "--method", "sobirl", "--segment", 12]
    given += ["--keep-replay", "--checkpoint-every", 4, "--eval-max-steps", 30, "--learning-starts", 200]
    given += ["--total-timesteps", 280, "--update-frequency", 12, "--initial-pairs", 20]
    monkeypatch.setattr("support.preferences.OLD_PAIRS", 5)
    expected = contents(train(sobirl, tmp_path / "reference", *given))
    folder = interrupted(tmp_path / "killed", monkeypatch, 257, *given, script=sobirl)
    shutil.copytree(folder, tmp_path / "again" / folder.name)
    assert contents(sobirl.main(["--resume", str(folder)])) == expected
    older = tmp_path / "again" / folder.name / PREVIOUS
    assert contents(sobirl.main(["--resume", str(older)])) == expected


@minatar
def test_minatar_resume_is_byte_identical(tmp_path, monkeypatch):
    given = [*SMALL, "--env-id", "MinAtar/Breakout-v1", "--method", "drlhf", "--keep-replay"]
    expected = contents(train(sobirl, tmp_path / "reference", *given))
    folder = interrupted(tmp_path / "killed", monkeypatch, 133, *given, script=sobirl)
    assert contents(sobirl.main(["--resume", str(folder)])) == expected
