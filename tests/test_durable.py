"""Nothing is lost: kills, signals, full disks, damaged files, broken environments, odd command lines."""

import copy
import ctypes.util
import json
import math
import os
import random
import shlex
import shutil
import signal
import string
import subprocess
import sys
import time
import types
import typing
import warnings
from pathlib import Path

import gymnasium as gym
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch

import blpo_continuous as blpo
import ppo_continuous as ppo
from support import environments, evaluation, run_folder
from tests.test_scripts import DISCRETE, ROOT, SCRIPTS, TINY, begun_together, refused, rows, run, start
from tests.test_scripts import stopped, train

SMALL = [*TINY, "--env-id", "Hopper-v4", "--total-timesteps", 1280, "--checkpoint-every", 3]  # 20 iterations
SMALL_OF = {
    script: [*SMALL, *([] if script in SCRIPTS else ["--env-id", "Acrobot-v1", "--norm-obs"])]
    for script in SCRIPTS + DISCRETE
}


def contents(folder):
    """All that a run has measured and learned, times apart."""
    progress = (folder / "progress.csv").read_text()
    assert progress.endswith("\n")
    table = [line.split(",") for line in progress.splitlines()]
    keep = [i for i, name in enumerate(table[0]) if not (name == "sps" or "seconds" in name)]
    model = torch.load(folder / "model.pt", weights_only=True)
    weights = {
        f"{net}.{k}": v.tolist() for net in ("actor", "critic", "obs_rms") for k, v in model[net].items()
    }
    files = [(folder / name).read_text() for name in ("episodes.csv", "evaluation.csv")]
    return [[row[i] for i in keep] for row in table], files, weights


def only(tmp_path):
    (folder,) = (path.parent for path in tmp_path.glob("*/config.json"))
    return folder


def wait_for(condition, process, seconds=120):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.02)


# Checkpoints and resume


CONTROL = [
    name
    for name, spec in gym.registry.items()
    if str(spec.entry_point).startswith(("gymnasium.envs.mujoco", "gymnasium.envs.classic_control"))
    and name not in ("Pusher-v4", "CartPole-v0")
]


@pytest.mark.parametrize("env_id", CONTROL)
def test_an_environment_goes_on_where_it_was(env_id, tmp_path):
    """In another process it would be another object: saved, loaded and restored, it returns the same bytes,
    resets included."""

    def play(env, actions):
        seen = []
        for action in actions:
            obs, reward, terminated, truncated, _ = env.step(action)
            seen.append((np.asarray(obs).tobytes(), float(reward), terminated, truncated))
            if terminated or truncated:
                seen.append(np.asarray(env.reset()[0]).tobytes())
        return seen

    first, second = (gym.make(env_id, disable_env_checker=True) for _ in range(2))
    first.reset(seed=1), second.reset(seed=2)
    first.action_space.seed(0)
    actions = [first.action_space.sample() for _ in range(500)]
    play(first, actions[:137])
    torch.save(environments.env_state(first), tmp_path / "state")
    environments.restore_env(second, torch.load(tmp_path / "state", weights_only=True))
    assert play(first, actions[137:]) == play(second, actions[137:])


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


class Reference(typing.NamedTuple):
    """A whole run, and what SIGKILL would have left of it."""

    script: types.ModuleType
    contents: tuple
    moments: Path  # by iteration, copies of its folder

    def killed(self, iteration, tmp_path):
        """The folder of a run that died in the middle of this iteration, having written half a row."""
        folder = only(self.moments / str(iteration))
        return shutil.copytree(folder, tmp_path / folder.name)


@pytest.fixture(scope="module", params=SCRIPTS + DISCRETE, ids=lambda script: script.__name__)
def reference(request, tmp_path_factory):
    moments, log = tmp_path_factory.mktemp("moments"), run_folder.Run.log

    def copy_and_log(self, row, line):
        copy = shutil.copytree(self.folder, moments / str(row["global_step"] // 64 - 1) / self.folder.name)
        with open(copy / "progress.csv", "a") as progress:
            progress.write("7,7")
        log(self, row, line)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder.Run, "log", copy_and_log)
        folder = train(request.param, tmp_path_factory.mktemp("reference"), *SMALL_OF[request.param])
    return Reference(request.param, contents(folder), moments)


def interrupted(script, tmp_path, monkeypatch, iteration, *flags):
    """A run that dies in the middle of an iteration, having written half a row; its folder."""

    def log(self, row, shown):
        if row["global_step"] > 64 * iteration:
            self.files["progress.csv"].write("7,7")
            self.close()  # as the kernel would
            raise Killed
        original(self, row, shown)

    original = run_folder.Run.log
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(run_folder.Run, "log", log)
        script.main([*map(str, flags), "--runs-dir", str(tmp_path)])
    return only(tmp_path)


@pytest.mark.parametrize("iteration", [0, 2, 3, 7, 18, 19])
def test_resume_is_byte_identical(reference, iteration, tmp_path):
    script, expected, _ = reference
    folder = reference.killed(iteration, tmp_path)
    assert script.main(["--resume", str(folder)]) == folder
    assert contents(folder) == expected
    assert len(list(tmp_path.iterdir())) == 1  # in place
    assert script.main(["--resume", str(folder)]) == folder  # a finished run stays as it is
    assert contents(folder) == expected


@pytest.mark.parametrize(
    "flags",
    [["--env-id", "Pendulum-v1", "--no-norm-obs"], ["--env-id", "MountainCarContinuous-v0", "--track"]],
)
def test_resume_of_other_environments_and_with_wandb(flags, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    flags = [*TINY, "--total-timesteps", 896, "--checkpoint-every", 3, "--nystrom-sketch", "gaussian", *flags]
    read = lambda folder: (
        (folder / "episodes.csv").read_text(),
        [row["approx_kl"] for row in rows(folder / "progress.csv")],
    )
    expected = read(train(blpo, tmp_path / "reference", *flags))
    folder = interrupted(blpo, tmp_path / "killed", monkeypatch, 8, *flags)
    assert read(blpo.main(["--resume", str(folder)])) == expected


def test_resume_of_an_environment_whose_state_is_unknown(tmp_path, monkeypatch, capsys):
    flags = [
        *TINY,
        "--env-id",
        "tests.probe_envs:ProbeTwoStep-v0",
        "--total-timesteps",
        640,
        "--checkpoint-every",
        3,
    ]
    folder = interrupted(ppo, tmp_path, monkeypatch, 7, *flags)
    ppo.main(["--resume", str(folder)])
    assert capsys.readouterr().err.count("its episodes begin anew") == 1
    assert [row["global_step"] for row in rows(folder / "progress.csv")] == [64 * (i + 1) for i in range(10)]
    assert all(row["length"] == 2 for row in rows(folder / "episodes.csv"))


KILLS = int(os.environ.get("KILLS", 4))


@pytest.mark.parametrize("script", SCRIPTS[1:] if KILLS < 10 else SCRIPTS)
def test_kills_at_random_moments(script, tmp_path):
    """SIGKILL, one in four during start and imports, the others while rows are written; KILLS=50 for the long
    version."""
    flags = [
        *TINY,
        "--env-id",
        "Hopper-v4",
        "--total-timesteps",
        320 * max(KILLS, 20),
        "--checkpoint-every",
        2,
    ]
    expected = contents(train(script, tmp_path / "reference", *flags))
    runs, moments, kills, midway = tmp_path / "runs", random.Random(1), 0, 0
    size = lambda: sum(path.stat().st_size for path in runs.glob("*/progress.csv"))
    while kills < KILLS:
        alive = list(runs.glob("*/checkpoint*.pt"))
        process, before = (
            start(script, *(["--resume", alive[0].parent] if alive else [*flags, "--runs-dir", runs])),
            None,
        )
        if kills % 4:
            while process.poll() is None and not (before is not None and size() > before):
                before = (
                    size() if before is None or size() < before else before
                )  # resuming cuts the file first
                time.sleep(0.001)
            time.sleep(moments.uniform(0, 0.15))
            midway += process.poll() is None
        else:
            time.sleep(moments.uniform(0, 2))
        process.kill()
        assert process.wait() == -signal.SIGKILL, (
            process.communicate()
        )  # otherwise the run was too short for so many kills
        kills += 1
    assert midway >= KILLS // 2
    run(script, "--resume", next(runs.glob("*/checkpoint*.pt")).parent)
    (folder,) = (path.parent for path in runs.glob("*/model.pt"))
    assert contents(folder) == expected


SIGNALLED = [*TINY, "--env-id", "Hopper-v4", "--total-timesteps", 3_200, "--checkpoint-every", 10_000]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return contents(train(ppo, tmp_path_factory.mktemp("undisturbed"), *SIGNALLED))


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_finish_the_iteration(number, status, undisturbed, tmp_path, monkeypatch):
    process = start(ppo, *SIGNALLED, "--runs-dir", tmp_path / "runs")
    wait_for(
        lambda: any(len(path.read_text().splitlines()) > 8 for path in tmp_path.glob("runs/*/progress.csv")),
        process,
    )
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status and "Traceback" not in err
    line = err.splitlines()[-1]
    assert line.startswith("stopped at step")
    monkeypatch.chdir(ROOT)
    path, *again = shlex.split(line.split(": python ")[1])
    assert Path(path).samefile(ppo.__file__)
    ppo.main(again)
    assert contents(only(tmp_path / "runs")) == undisturbed


def test_evaluations_leave_training_untouched(reference, tmp_path):
    script, (table, episodes, weights), _ = reference
    folder = train(script, tmp_path, *SMALL_OF[script], "--eval-every", 4)
    more, same_episodes, same_weights = contents(folder)
    assert (same_episodes, same_weights) == (episodes, weights)
    assert [row[: len(table[0])] for row in more] == table and more[0][len(table[0]) :] == [
        "eval_return",
        "eval_length",
    ]
    evaluated = [row["eval_return"] for row in rows(folder / "progress.csv")]
    assert [i + 1 for i, value in enumerate(evaluated) if math.isfinite(value)] == [4, 8, 12, 16, 20]
    assert evaluated[-1] == rows(folder / "evaluation.csv")[0]["return"]


def test_going_on_from_an_older_checkpoint_and_killed_again(reference, tmp_path, monkeypatch):
    script, expected, _ = reference
    folder = reference.killed(11, tmp_path)
    older = folder / "checkpoint.previous.pt"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(
            run_folder.Run, "log", lambda self, row, shown: self.close() or (_ for _ in ()).throw(Killed)
        )
        script.main(["--resume", str(older)])
    assert contents(script.main(["--resume", str(folder)])) == expected


def test_what_a_checkpoint_counts_on_is_on_disk_before_it(tmp_path, monkeypatch):
    """The order of fsync and rename: rows, then the new file under another name, then its name."""
    seen = []
    fsync, replace = os.fsync, os.replace

    def see_fsync(descriptor):
        seen.append(("fsync", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def see_replace(source, target):
        seen.append(("rename", os.path.basename(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", see_fsync)
    monkeypatch.setattr(os, "replace", see_replace)
    train(ppo, tmp_path, *TINY, "--env-id", "Pendulum-v1", "--total-timesteps", 64, "--eval-episodes", 0)
    one = [("fsync", "progress.csv"), ("fsync", "episodes.csv"), ("fsync", "checkpoint.pt.tmp")]
    first, second = one + [("rename", "checkpoint.pt")], one + [("rename", "checkpoint.previous.pt")]
    config = [("fsync", "config.json.tmp"), ("rename", "config.json")]
    model = [("fsync", "model.pt.tmp"), ("rename", "model.pt")]
    assert seen == config + first + second + [("rename", "checkpoint.pt")] + model


def test_a_lock_is_exclusive(tmp_path, capsys):
    held = run_folder.lock_folder(tmp_path)
    with pytest.raises(SystemExit):
        run_folder.lock_folder(tmp_path)
    assert "another process" in capsys.readouterr().err
    held.release()
    run_folder.lock_folder(tmp_path).release()


def test_wrappers_that_remember_begin_anew(tmp_path, monkeypatch, capsys):
    gym.register(
        "Delayed-v0",
        "gymnasium.envs.classic_control.pendulum:PendulumEnv",
        max_episode_steps=30,
        additional_wrappers=(gym.wrappers.DelayObservation.wrapper_spec(delay=2),),
    )
    try:
        folder = interrupted(
            ppo,
            tmp_path,
            monkeypatch,
            7,
            *TINY,
            "--env-id",
            "Delayed-v0",
            "--total-timesteps",
            640,
            "--checkpoint-every",
            3,
        )
        ppo.main(["--resume", str(folder)])
    finally:
        del gym.registry["Delayed-v0"]
    assert "its episodes begin anew" in capsys.readouterr().err


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_nobody_listens(number, status, tmp_path):
    """Standard output and error are a pipe whose reader has gone: training goes on, a signal still writes a
    checkpoint."""
    flags = [
        *TINY,
        "--env-id",
        "Pendulum-v1",
        "--total-timesteps",
        10**7,
        "--checkpoint-every",
        10**6,
        "--runs-dir",
        tmp_path,
    ]
    process = start(ppo, *flags, stderr=subprocess.STDOUT)
    process.stdout.close()
    lines = lambda: max(
        (len(path.read_text().splitlines()) for path in tmp_path.glob("*/progress.csv")), default=0
    )
    wait_for(lambda: lines() > 20, process)
    process.send_signal(number)
    assert process.wait(timeout=60) == status
    assert torch.load(only(tmp_path) / "checkpoint.pt", weights_only=True)["iteration"] == lines() - 1


def test_the_disk_is_full_under_the_log_file(tmp_path):
    with open("/dev/full", "w") as full:
        process = start(ppo, *SMALL, "--runs-dir", tmp_path, stdout=full)
    assert process.wait(timeout=60) == 0
    assert (only(tmp_path) / "evaluation.csv").exists()


# Evaluate


def test_evaluate(reference, tmp_path, capsys):
    script = reference.script
    folder = train(script, tmp_path, *SMALL_OF[script], "--total-timesteps", 320, "--seed", 3)
    before = contents(folder)
    capsys.readouterr()

    def evaluate(*flags):
        script.main(["--evaluate", str(folder), *map(str, flags)])
        return capsys.readouterr().out

    out = evaluate("--eval-episodes", 1)
    expected = f"return {rows(folder / 'evaluation.csv')[0]['return']:.1f} ±"
    assert "1 deterministic episodes" in out and expected in out and "length" in out
    two, noisy = evaluate("--eval-episodes", 2), evaluate("--eval-episodes", 2, "--eval-stochastic")
    assert evaluate("--eval-episodes", 2) == two
    assert "2 stochastic episodes" in noisy and noisy == evaluate("--eval-episodes", 2, "--eval-stochastic")
    if script in SCRIPTS:  # an untrained Acrobot takes its 500 steps in any case
        assert evaluate("--eval-episodes", 2, "--seed", 9) != two
        assert noisy.split("return")[1] != two.split("return")[1]
    assert contents(folder) == before
    (folder / "model.pt").unlink()
    assert evaluate("--eval-episodes", 1) == out  # from the last checkpoint
    assert "--hidden-size has no part" in refused(script, capsys, "--evaluate", folder, "--hidden-size", 8)
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    weights = saved["parts"]["actor"]
    weights["mean.0.weight"] = weights.pop("net.0.weight")
    torch.save(saved, folder / "checkpoint.pt")
    assert "does not fit" in refused(script, capsys, "--evaluate", folder)
    assert "does not fit" in refused(script, capsys, "--resume", folder)


of_pictures = pytest.mark.skipif(
    sys.platform == "linux" and not any(map(ctypes.util.find_library, ("EGL", "OSMesa"))),
    reason="neither EGL nor OSMesa is installed",
)


@of_pictures
def test_video(tmp_path, capsys):
    folder = train(blpo, tmp_path, *TINY, "--env-id", "InvertedPendulum-v4", "--total-timesteps", 64)
    env = {"MUJOCO_GL": ""} if "MUJOCO_GL" not in os.environ else {}
    environment = {k: v for k, v in (os.environ | env).items() if v}
    out = subprocess.run(
        [
            sys.executable,
            f"{ROOT}/blpo_continuous.py",
            "--evaluate",
            folder,
            "--capture-video",
            "--eval-episodes",
            "4",
        ],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert out.returncode == 0, out.stderr
    videos = sorted((folder / "videos").glob("*.mp4"))
    assert (
        len(videos) == 3
        and all(path.read_bytes()[4:8] == b"ftyp" for path in videos)
        and str(folder / "videos") in out.stdout
    )


@of_pictures
@pytest.mark.parametrize(
    "env_id, options, follows",
    [
        ("Walker2d-v4", {}, True),
        ("HalfCheetah-v5", {}, True),
        ("Walker2d-v4", {"camera_id": -1}, False),
        ("Walker2d-v5", {"default_camera_config": {"distance": 4.0}}, False),
    ],
)
def test_a_video_follows_the_robot(env_id, options, follows):
    """Far from where the episode began a picture of it changes with its height, or it is not there."""
    program = f"""if True:
        from support import evaluation
        evaluation.render_without_a_screen()
        import gymnasium, mujoco
        options = {options}
        with gymnasium.make("{env_id}", render_mode="rgb_array", **options) as env:
            evaluation.follow_the_robot(env, options)
            env.reset(seed=0)
            env.render()
            core = env.unwrapped
            core.data.qpos[0] = 100
            pictures = []
            for height in (0.0, 0.3):
                core.data.qpos[1] += height
                mujoco.mj_forward(core.model, core.data)
                pictures.append(env.render())
        print((pictures[0] != pictures[1]).any())
        """
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert out.stdout == f"{follows}\n", out.stderr


def test_a_video_of_what_has_no_such_camera():
    for env_id in ("Reacher-v5", "CartPole-v1"):  # no camera "track", and no MuJoCo
        with gym.make(env_id, render_mode="rgb_array") as env:
            before = vars(getattr(env.unwrapped, "mujoco_renderer", env)).copy()
            evaluation.follow_the_robot(env, {})
            assert vars(getattr(env.unwrapped, "mujoco_renderer", env)) == before


# Bad days


def test_disk_full(tmp_path):
    """A tmpfs too small for the run: it stops in one line, the last checkpoint loads, and where there is more
    room it ends as ever."""
    script = f"""
        mount -t tmpfs -o size=250k none {tmp_path}/disk || exit 77
        {sys.executable} {ROOT}/ppo_continuous.py {" ".join(map(str, SMALL))} --runs-dir {tmp_path}/disk
        echo status $?
        cp -r {tmp_path}/disk {tmp_path}/saved
    """
    (tmp_path / "disk").mkdir()
    unshare = ["unshare", "-rm", "sh", "-c", script]
    if (
        not shutil.which("unshare")
        or (done := subprocess.run(unshare, capture_output=True, text=True)).returncode == 77
    ):
        pytest.skip("no private tmpfs here")
    assert done.returncode == 0 and "status 1" in done.stdout, done.stderr
    assert (
        "cannot write" in done.stderr
        and "No space left on device" in done.stderr
        and "--resume" in done.stderr
    )
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1, done.stderr
    folder = only(tmp_path / "saved")
    assert not (folder / "model.pt").exists()
    ppo.main(["--resume", str(folder)])
    assert contents(folder) == contents(train(ppo, tmp_path / "reference", *SMALL))


def test_quota(tmp_path):
    """A limit on the size of files stands for a quota: progress.csv cannot grow, its torn row is measured
    again."""
    limited = f"ulimit -f 25; exec {sys.executable} {ROOT}/ppo_continuous.py {' '.join(TINY)}"
    limited += " --env-id Pendulum-v1"
    limited += f" --total-timesteps 200000 --checkpoint-every 50 --hidden-size 4 --runs-dir {tmp_path}"
    done = subprocess.run(["bash", "-c", limited], capture_output=True, text=True)
    assert done.returncode == 1 and "cannot write" in done.stderr and done.stderr.count("\n") == 1, (
        done.stderr
    )
    assert torch.load(only(tmp_path) / "checkpoint.pt", weights_only=True)["iteration"] > 0


def test_damaged_checkpoint(reference, tmp_path, capsys):
    script, expected, _ = reference
    folder = reference.killed(11, tmp_path)
    checkpoint = folder / "checkpoint.pt"
    whole = checkpoint.read_bytes()
    for data in (
        whole[: len(whole) // 2],
        whole[:-1],
        b"",
        b"\0" * 1000,
        whole[:5000] + bytes(1000) + whole[6000:],
    ):
        checkpoint.write_bytes(data)
        err = refused(script, capsys, "--resume", folder)
        assert "checkpoint.pt is damaged" in err and "checkpoint.previous.pt" in err
    older = shlex.split(err.split("the one before it: ")[1])
    assert contents(script.main(older)) == expected
    checkpoint.unlink()  # killed between the two renames
    (folder / "checkpoint.previous.pt").write_bytes(whole)
    assert contents(script.main(["--resume", str(folder)])) == expected


@pytest.mark.parametrize("script", [ppo, blpo])
def test_a_schedule_may_be_longer_than_the_run(script, tmp_path, capsys):
    """A run that ends at a quarter of its schedule has the first rows of the whole one, and ends in its bytes
    when it goes on; further than the schedule it may not go."""
    schedule = [*SMALL, "--anneal-timesteps", 1280, "--total-timesteps"]
    whole = contents(train(script, tmp_path / "whole", *schedule, 1280))
    assert whole == contents(train(script, tmp_path / "plain", *SMALL, "--total-timesteps", 1280))
    slow = train(script, tmp_path / "slow", *SMALL, "--total-timesteps", 1280, "--anneal-timesteps", 12800)
    assert whole != contents(slow)
    folder = train(script, tmp_path / "short", *schedule, 320)
    assert contents(folder)[0] == whole[0][:6]  # a header and five iterations
    capsys.readouterr()
    script.main(["--resume", str(folder), "--total-timesteps", "1280"])
    assert "fall to 0" not in capsys.readouterr().err
    assert contents(folder) == whole
    err = refused(script, capsys, "--resume", folder, "--total-timesteps", 2560)
    assert "--total-timesteps must be at most --anneal-timesteps 1280" in err


def test_a_checkpoint_without_physics_is_refused(tmp_path, monkeypatch, capsys):
    """One of a version that kept MuJoCo's arrays otherwise, or a MuJoCo whose state has another shape."""
    folder = interrupted(ppo, tmp_path, monkeypatch, 7, *SMALL)
    whole = torch.load(folder / "checkpoint.pt", weights_only=True)

    def refusal(change):
        saved = copy.deepcopy(whole)
        change(saved["parts"]["envs"]["envs"][0])
        torch.save(saved, folder / "checkpoint.pt")
        return refused(ppo, capsys, "--resume", folder)

    assert "does not fit" in refusal(lambda env: env.pop("bytes"))
    assert "qpos had the shape" in refusal(lambda env: env["shapes"].update(qpos=("<f8", (5,))))
    torch.save(whole, folder / "checkpoint.pt")
    whole["parts"]["envs"]["envs"][0]["shapes"]["xpos"] = ("<f8", (15,))  # derived, as all that is not state
    torch.save(whole, folder / "checkpoint.pt")
    ppo.main(["--resume", str(folder)])


def test_rows_keep_the_columns_of_the_first(tmp_path, monkeypatch):
    """Also of a version that did not have one of today's, or had another one."""
    folder = interrupted(ppo, tmp_path, monkeypatch, 7, *SMALL)
    progress = folder / "progress.csv"
    lines = progress.read_text().splitlines()
    first, *others = lines[0].split(",")
    assert "sps" in others and "return_100" in others
    names = [first, *("speed" if name == "sps" else name for name in others if name != "return_100")]
    gone = 1 + others.index("return_100")
    kept = [line.split(",") for line in lines[1:]]
    kept = [",".join(cells[:gone] + cells[gone + 1 :]) for cells in kept]
    progress.write_text("\n".join([",".join(names), *kept]) + "\n")
    ppo.main(["--resume", str(folder)])
    header, *found = (line.split(",") for line in progress.read_text().splitlines())
    assert header == names and {len(row) for row in found} == {len(names)}
    assert found[-1][names.index("speed")] == "nan" and found[0][names.index("speed")] != "nan"
    assert float(found[-1][names.index("wall_seconds")]) > float(found[0][names.index("wall_seconds")])


def test_checkpoints_of_others(tmp_path, monkeypatch, capsys):
    folder = interrupted(ppo, tmp_path / "a", monkeypatch, 7, *SMALL)
    other = interrupted(ppo, tmp_path / "b", monkeypatch, 7, *SMALL[:-5], "Walker2d-v4", *SMALL[-4:])
    assert "use that script" in refused(blpo, capsys, "--resume", folder)
    assert "use that script" in refused(blpo, capsys, "--evaluate", folder)
    assert "--gamma cannot change" in refused(ppo, capsys, "--resume", folder, "--gamma", 0.9)
    assert "may only grow" in refused(ppo, capsys, "--resume", folder, "--total-timesteps", 640)
    assert "damaged or no checkpoint" in refused(
        ppo, capsys, "--resume", train(ppo, tmp_path / "c", *SMALL) / "model.pt"
    )
    assert "--resume" in refused(ppo, capsys, "--resume", "x" * 300)
    assert "--evaluate" in refused(ppo, capsys, "--evaluate", "x" * 300)
    assert "no model.pt" in refused(ppo, capsys, "--evaluate", tmp_path)
    assert "--resume" in refused(ppo, capsys, "--resume", tmp_path / "nowhere")
    assert "--evaluate" in refused(ppo, capsys, "--resume", folder, "--evaluate", folder)
    assert "--capture-video" in refused(ppo, capsys, "--capture-video")
    assert "--eval-episodes" in refused(ppo, capsys, "--evaluate", folder, "--eval-episodes", 0)
    config, checkpoint, pair = (
        folder / "config.json",
        folder / "checkpoint.pt",
        [path.read_bytes() for path in folder.glob("checkpoint.pt")],
    )
    shutil.copy(other / "checkpoint.pt", checkpoint)
    assert "another run (Walker2d-v4" in refused(ppo, capsys, "--resume", folder)
    checkpoint.write_bytes(pair[0])

    def rewrite(change):
        saved = torch.load(checkpoint, weights_only=True)
        change(saved)
        torch.save(saved, checkpoint)
        config.write_text(json.dumps(saved["config"]))

    rewrite(lambda saved: saved["config"]["versions"].update(torch="1.0"))
    ppo.main(["--resume", str(folder)])
    assert (
        "note: " in (err := capsys.readouterr().err)
        and "torch 1.0 (now 2.13.0" in err
        and err.count("\n") == 1
    )
    rewrite(lambda saved: saved["config"]["versions"].update(git_commit="0"))
    ppo.main(["--resume", str(folder)])
    assert "git_commit 0 (now " in capsys.readouterr().err
    rewrite(lambda saved: saved.update(older=saved.pop("parts")))
    assert "older version: check out commit 0" in refused(ppo, capsys, "--resume", folder)
    rewrite(lambda saved: saved.update(parts=saved.pop("older")))
    rewrite(lambda saved: saved["config"]["flags"].update(renamed_flag=1))
    assert "other flags" in refused(ppo, capsys, "--resume", folder)
    config.unlink()
    assert "not the folder of a run" in refused(ppo, capsys, "--resume", folder)
    (other / "episodes.csv").write_text("global_step,return,length\n")
    assert "lost rows" in refused(ppo, capsys, "--resume", other)


def test_a_run_knows_its_commit(tmp_path, monkeypatch):
    """And whether a file has changed since; a tag changes nothing, nor does a file that git does not know."""
    monkeypatch.setattr(run_folder, "script_of", lambda args: tmp_path / "script.py")
    assert run_folder.git_commit(None) == ""

    def git(*words):
        words = ["git", "-c", "user.name=me", "-c", "user.email=me@here", *words]
        return subprocess.run(words, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    (tmp_path / "script.py").write_text("1\n")
    git("init"), git("add", "."), git("commit", "-m", "one"), git("tag", "-a", "v1", "-m", "one")
    (tmp_path / "more.txt").write_text("2\n")
    assert run_folder.git_commit(None) == git("rev-parse", "HEAD") != ""
    (tmp_path / "script.py").write_text("2\n")
    assert run_folder.git_commit(None) == git("rev-parse", "HEAD") + "-dirty"


def test_a_foreign_checkpoint_is_not_executed(tmp_path, capsys):
    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/executed",)

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    torch.save({"config": Payload()}, tmp_path / "run" / "checkpoint.pt")
    for flag in ("--resume", "--evaluate"):
        assert "damaged or no checkpoint" in refused(ppo, capsys, flag, tmp_path / "run")
    assert not (tmp_path / "executed").exists()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("support/*.py"), *ROOT.glob("tools/*.py")]:
        text = path.read_text()
        assert text.count("torch.load(") == text.count("weights_only=True)") and "pickle" not in text


def test_run_folder_deleted_meanwhile(tmp_path, monkeypatch, capsys):
    log, seen = run_folder.Run.log, []

    def log_and_delete(self, row, line):
        seen.append(row["global_step"])
        log(self, row, line)
        if row["global_step"] == 640:
            shutil.rmtree(self.folder)

    monkeypatch.setattr(run_folder.Run, "log", log_and_delete)
    flags = [*TINY, "--env-id", "Pendulum-v1", "--total-timesteps", 1280, "--checkpoint-every", 100]
    err = stopped(ppo, capsys, tmp_path, *flags)
    assert "cannot write" in err and "No such file" in err and not list(tmp_path.iterdir())
    assert seen[-1] == 704  # the next row was the last


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize(
    "name, what", [("Raises", "RuntimeError: the robot fell off the table"), ("Reshapes", "ValueError")]
)
def test_failing_environment(name, what, tmp_path, capsys):
    env_id = f"tests.probe_envs:Probe{name}-v0"
    flags = [*TINY, "--env-id", env_id, "--total-timesteps", 10_000, "--checkpoint-every", 2]
    err = stopped(blpo, capsys, tmp_path, *flags)
    folder = only(tmp_path)
    assert what in err and f"Probe{name}-v0 failed at step" in err and "--resume" in err
    assert "Traceback" in (folder / "error.txt").read_text()
    step = int(err.split("failed at step ")[1].split(":")[0])
    assert step - 64 <= rows(folder / "progress.csv")[-1]["global_step"] < step and rows(
        folder / "episodes.csv"
    )


def test_environment_that_fails_outside_of_training(tmp_path, monkeypatch, capsys):
    flags = [*TINY, "--env-id", "Pendulum-v1", "--total-timesteps", 640]

    def broken(*_, **__):
        raise RuntimeError("out of\nlicences")

    with monkeypatch.context() as patch:
        patch.setattr(gym.Wrapper, "close", broken)
        assert (train(ppo, tmp_path / "close", *flags, "--eval-episodes", 0) / "model.pt").exists()
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "play", broken)
        with pytest.raises(SystemExit) as stop:
            train(ppo, tmp_path / "evaluation", *flags, "--eval-every", 5)
    err = capsys.readouterr().err
    assert (
        stop.value.code == 1
        and err.count("evaluation failed: RuntimeError: out of") == 2
        and "the evaluation at the end failed in Pendulum-v1: RuntimeError" in err
        and "failed at step" not in err
    )
    folder = only(tmp_path / "evaluation")
    assert len(rows(folder / "progress.csv")) == 10 and not (folder / "evaluation.csv").exists()
    ppo.main(["--resume", str(folder)])
    assert len(rows(folder / "evaluation.csv")) == 1


def test_hanging_environment_can_be_stopped(tmp_path):
    flags = [
        *TINY,
        "--env-id",
        "tests.probe_envs:ProbeHangs-v0",
        "--total-timesteps",
        10_000,
        "--checkpoint-every",
        2,
        "--runs-dir",
        tmp_path,
    ]
    process = start(ppo, *flags, env=os.environ | {"PYTHONPATH": str(ROOT)})
    wait_for(
        lambda: any(len(path.read_text().splitlines()) > 10 for path in tmp_path.glob("*/progress.csv")),
        process,
    )
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=10)
    assert (
        process.returncode == -signal.SIGINT and "once more to stop at once" in err and "Traceback" not in err
    )
    assert torch.load(only(tmp_path) / "checkpoint.pt", weights_only=True)["iteration"] >= 8


def test_two_processes_cannot_write_one_run(tmp_path, capsys, monkeypatch):
    process = start(ppo, *TINY, "--env-id", "Hopper-v4", "--total-timesteps", 10**7, "--runs-dir", tmp_path)
    wait_for(lambda: any(path.stat().st_size > 1000 for path in tmp_path.glob("*/progress.csv")), process)
    folder = only(tmp_path)
    assert "another process" in refused(ppo, capsys, "--resume", folder)
    process.kill()
    process.wait()
    assert begun_together(2, ppo, "--resume", folder, until_one_ends=True) == [-signal.SIGKILL, 2]


# Any command line: training starts, or one line names the flag


CASES = int(os.environ.get("CASES", 50))
NUMBERS = [0, 1, -1, 2, 7, 64, 10**6, -(10**9), 2**31, 2**63, 10**30]
INTEGERS = st.one_of(st.sampled_from(NUMBERS), st.integers(-3, 40)).map(str)
FLOATS = st.one_of(
    st.sampled_from("0 1 -1 0.5 1e-30 1e30 1e308 nan inf -inf 1e-3".split()), st.floats(0, 1).map(repr)
)
TEXT = st.one_of(
    st.sampled_from(["", "a b", "../../x", "$(id)", "'", "-x", "\u00e9\u2603", "x" * 200]),
    st.text(string.printable, max_size=12),
)
LENGTHS = (
    "update_epochs",
    "nested_critic_steps",
    "total_timesteps",
    "cg_iters",
    "eval_episodes",
    "num_envs",
    "num_steps",
    "hidden_size",
)


def flag_values(script):
    """A strategy for some flags of the script and values of about their types."""
    values = {}
    known = {int: INTEGERS, float: FLOATS, bool: st.none(), str: TEXT}
    for name, kind in typing.get_type_hints(script.Args).items():
        if name in ("cuda", "track", "capture_video", "runs_dir"):
            continue
        typed = known[kind] if kind in known else st.sampled_from(kind.__args__)
        values[name] = st.one_of(typed, typed, typed, INTEGERS, FLOATS, TEXT) if kind is not bool else typed
    values["env_id"] = st.one_of(
        st.sampled_from(["Pendulum-v1", "Hopper-v4", "CartPole-v1", "Pendulum-v1:", ":", "a:b:c"]), TEXT
    )
    return st.lists(
        st.sampled_from(sorted(values)).flatmap(lambda name: st.tuples(st.just(name), values[name])),
        max_size=5,
    )


@pytest.mark.parametrize("script", SCRIPTS + DISCRETE)
def test_any_command_line_trains_or_names_the_flag(script, tmp_path, capsys, monkeypatch):
    """CASES=500 for the long version. What would train for hours is cut short in its third iteration."""

    class Enough(Exception):
        pass

    def log(self, row, shown):
        if row["global_step"] > 2 * self.config["flags"]["num_envs"] * self.config["flags"]["num_steps"]:
            self.close()
            raise Enough
        original(self, row, shown)

    original, seen = run_folder.Run.log, {"trained": 0, "refused": 0}
    monkeypatch.setattr(run_folder.Run, "log", log)

    @hypothesis.settings(
        max_examples=CASES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(flag_values(script))
    def case(flags):
        given = dict(flags)
        huge = {
            name
            for name in LENGTHS
            if name in given and str(given[name]).isdecimal() and int(given[name]) > 64
        }
        if huge - {"total_timesteps", "num_envs"} or given.get("num_envs") in ("4096", "1000"):
            return  # accepted, and long
        words = [
            *map(str, TINY),
            "--total-timesteps",
            "4096",
            "--env-id",
            "Pendulum-v1" if script in SCRIPTS else "CartPole-v1",
            "--runs-dir",
            str(tmp_path),
        ]
        for name, value in flags:
            words += [f"--{name.replace('_', '-')}", *([] if value is None else [str(value)])]
        hypothesis.note(shlex.join(words))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                script.main(words)
            seen["trained"] += 1
        except Enough:
            seen["trained"] += 1
        except SystemExit as stop:
            err = capsys.readouterr().err
            assert (
                stop.code in (1, 2)
                and err.startswith("error: ")
                and err.count("\n") == 1
                and "Traceback" not in err
            ), err
            assert "--" in err and (stop.code == 2 or "diverged" in err), err
            seen["refused"] += 1
        capsys.readouterr()

    case()
    print(seen)
    assert seen["trained"] >= CASES // 20 and seen["refused"] >= CASES // 5
