"""benchmark.sh end to end, killed, raced, interrupted, with hostile names; solvers.py on what a run leaves."""

import csv
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import blpo_continuous as blpo
import plot
from tests.test_scripts import ROOT, train

TINY = "--num-envs 4 --num-steps 16 --num-minibatches 4 --update-epochs 1 --eval-episodes 1"


def benchmark(tmp_path, *flags, **settings):
    settings = dict(PYTHON=sys.executable, RUNS_DIR=str(tmp_path / "runs"), FLAGS=TINY, JOBS="2") | settings
    return subprocess.Popen(
        ["bash", f"{ROOT}/benchmark.sh", *flags], env=os.environ | settings, text=True, cwd=tmp_path,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def finish(process, status=0):
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, out + err
    return out, err


def finished(tmp_path):
    return sorted(path.parent.name.rsplit("__", 1)[0] for path in tmp_path.glob("runs/*/evaluation.csv"))


def names(envs, methods):
    return sorted(f"{env}__{method}__{seed}" for env in envs.split() for method in methods.split() for seed in (1, 2))


def test_end_to_end_with_a_failure(tmp_path):
    settings = dict(ENVS="Pendulum-v1 CartPole-v1 No-v0", SEEDS="1 2", STEPS="960", METHODS="ppo-matched blpo")
    out, err = finish(benchmark(tmp_path, **settings), status=1)
    assert finished(tmp_path) == names("Pendulum-v1 CartPole-v1", "ppo-matched blpo")
    assert "8 of 12 done" in out and "0 running, 4 failed" in out and "min left" in out
    assert err.count("failed: No-v0__") == 4 and err.count("error: --env-id No-v0") == 4
    assert "| Pendulum-v1 | BLPO | 2 |" in out and "| CartPole-v1 | PPO, matched | 2 |" in out
    figures = {path.name for path in (tmp_path / "runs" / "figures").iterdir()}
    assert {"curves.png", "curves.pdf", "time.png", "aggregate.png", "implicit_cosine.png"} <= figures
    with open(tmp_path / "runs" / "results" / "summary.csv") as file:
        assert len(list(csv.DictReader(file))) == 8
    # nothing is left but the failures; no run is repeated
    out, _ = finish(benchmark(tmp_path, "--dry-run", **settings))
    assert out.count("\n") == out.count("--env-id=No-v0") == 4
    before = sorted(path.name for path in (tmp_path / "runs").iterdir())
    finish(benchmark(tmp_path, **settings | dict(ENVS="Pendulum-v1 CartPole-v1")))
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == before
    # a folder for each choice of STEPS and FLAGS
    for other in (dict(STEPS="1920"), dict(FLAGS=f"{TINY} --gamma 0.9")):
        _, err = finish(benchmark(tmp_path, **settings | other), status=2)
        assert "RUNS_DIR" in err and list(other)[0] in err and err.count("\n") == 1
    out, _ = finish(benchmark(tmp_path / "runs", "--dry-run", **settings | dict(METHODS="blpo", SEEDS="1", ENVS=" Pendulum-v1\n ", RUNS_DIR="other")))
    assert shlex.split(out)[1:] == [f"{ROOT}/blpo_continuous.py", "--env-id=Pendulum-v1", "--exp-name=blpo", "--seed=1",
                                    "--total-timesteps=960", "--runs-dir=other", *TINY.split()]  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_or_interrupted_and_started_again_by_two(number, tmp_path):
    """No job lost, none run twice: one folder per job, although two invocations share the second half of the work."""
    settings = dict(ENVS="Pendulum-v1", SEEDS="1 2", METHODS="nested blpo", STEPS="12800", FLAGS=f"{TINY} --checkpoint-every 5")
    first = benchmark(tmp_path, **settings)
    deadline = time.time() + 120
    while len(finished(tmp_path)) < 1:
        assert time.time() < deadline and first.poll() is None
        time.sleep(0.05)
    if number == signal.SIGKILL:  # its jobs live on, and keep their locks
        first.kill()
        first.communicate()
    else:
        os.killpg(first.pid, number)  # as Ctrl-C in a terminal
        _, err = finish(first, status=130)
        assert "start again to go on" in err
        assert not subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True).stdout
    again = [benchmark(tmp_path, **settings) for _ in range(2)]
    for process in again:
        finish(process)
    assert finished(tmp_path) == names("Pendulum-v1", "nested blpo") and len(list(tmp_path.glob("runs/*/config.json"))) == 4
    for path in tmp_path.glob("runs/*/progress.csv"):
        with open(path) as file:
            assert [int(row["global_step"]) for row in csv.DictReader(file)] == [64 * (i + 1) for i in range(200)]


def test_jobs_killed_all_at_once_are_failures(tmp_path):
    """As by the kernel when memory runs out: bash may not notice such deaths. What comes after them is still done."""
    trap = tmp_path / "python"  # kills training runs of seed 1 and 2, and those beside them, at once
    trap.write_text(f"""#!/bin/bash
case "$*" in *--seed=[12]*) touch {tmp_path}/$$; while (( $(ls {tmp_path} | grep -c '^[0-9]') < 2 )); do sleep 0.05; done; kill -9 $(ls {tmp_path} | grep '^[0-9]');; esac
exec {sys.executable} "$@"
""")
    trap.chmod(0o755)
    settings = dict(ENVS="Pendulum-v1", METHODS="nested", SEEDS="1 2 3 4", STEPS="960", PYTHON=str(trap))
    out, err = finish(benchmark(tmp_path, **settings), status=1)
    assert finished(tmp_path) == ["Pendulum-v1__nested__3", "Pendulum-v1__nested__4"]
    assert err.count("failed: Pendulum-v1__nested__") == 2 and "unbound" not in err and "2 of 4 done" in out


def test_chatty_modules_and_short_runs(tmp_path):
    """What a module prints when imported does not matter; runs without a finished episode are named, the others drawn."""
    (tmp_path / "chatty.py").write_text("import gymnasium\nprint('hello\\nfrom chatty')\ngymnasium.register('Chatty-v0', 'gymnasium.envs.classic_control:CartPoleEnv')\n")
    (tmp_path / "leaving.py").write_text("raise SystemExit\n")
    settings = dict(ENVS="leaving:X-v0 chatty:Chatty-v0 Pendulum-v1", METHODS="nested", SEEDS="1", STEPS="640", PYTHONPATH=str(tmp_path))
    out, _ = finish(benchmark(tmp_path, "--dry-run", **settings))
    assert [Path(shlex.split(line)[1]).name for line in out.splitlines()] == ["blpo_continuous.py", "blpo_discrete.py", "blpo_continuous.py"]
    out, _ = finish(benchmark(tmp_path, **settings | dict(ENVS="chatty:Chatty-v0 Pendulum-v1")))
    assert "no episode was finished, left out: Pendulum-v1 nested 1" in out and "| chatty-Chatty-v0 | nesting only | 1 |" in out
    assert (tmp_path / "runs" / "figures" / "curves.png").exists()


def test_names_are_data(tmp_path):
    hostile = ["a b $(touch pwned) `touch pwned`; touch pwned", "--help", "'\"*", "../x"]
    settings = dict(ENVS="\n".join(hostile), METHODS="nested", SEEDS="1", STEPS="640")
    out, _ = finish(benchmark(tmp_path, "--dry-run", **settings))
    assert [next(word for word in shlex.split(line) if word.startswith("--env-id"))[9:] for line in out.splitlines()] == hostile
    _, err = finish(benchmark(tmp_path, **settings), status=1)
    assert err.count("error: --env-id") == 4 and not list(tmp_path.glob("**/pwned")) and {p.name for p in tmp_path.iterdir()} == {"runs"}


@pytest.mark.parametrize("setting", ["METHODS=best", "SEEDS=one", "SEEDS=01", "STEPS=-1", "JOBS=0", "LAUNCHER=moon", "PYTHON=/nowhere/python"])
def test_bad_settings_are_one_line(setting, tmp_path):
    name, value = setting.split("=")
    _, err = finish(benchmark(tmp_path, **{name: value}), status=2)
    assert err.startswith("error: ") and name in err and value in err and err.count("\n") == 1
    assert "LAUNCHER" not in finish(benchmark(tmp_path, "--dri-run"), status=2)[1]


def test_slurm_submits_one_array(tmp_path):
    """Against a stand-in that keeps its arguments and runs one element; tests/slurm.sh does it with a real Slurm."""
    (tmp_path / "bin").mkdir()
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" > {tmp_path}/arguments\nSLURM_ARRAY_TASK_ID=2 bash -c "${{@: -1}}" >&2\necho 7\n')
    sbatch.chmod(0o755)
    settings = dict(LAUNCHER="slurm", PARTITION="cpu", SBATCH="--time=1:00", ENVS="Pendulum-v1", STEPS="640", SEEDS="1 2", PATH=f"{sbatch.parent}:{os.environ['PATH']}")
    out, err = finish(benchmark(tmp_path, **settings))
    arguments = (tmp_path / "arguments").read_text().splitlines()
    assert "Slurm array 7 of 6 jobs" in out and {"--array=0-5%2", "--partition=cpu", "--time=1:00", "--cpus-per-task=1"} <= set(arguments)
    assert finished(tmp_path) == ["Pendulum-v1__blpo__1"], err


def test_solvers_on_a_real_critic(tmp_path):
    run = train(blpo, tmp_path / "runs", "--env-id", "Pendulum-v1", "--total-timesteps", 20_480, "--eval-episodes", 0)
    command = [sys.executable, f"{ROOT}/solvers.py", "--csv", tmp_path / "solvers.csv", "--minibatches", "2", "--repeat", "2"]
    files = {path.name: path.read_bytes() for path in run.iterdir()}
    subprocess.run([*command, run], check=True, capture_output=True)
    assert files == {path.name: path.read_bytes() for path in run.iterdir()}  # it worked on a copy
    with open(tmp_path / "solvers.csv") as file:
        table = list(csv.DictReader(file))
    residual = {(row["solver"], row["hessian"], int(row["products"])): float(row["residual"]) for row in table}
    assert len(residual) == 58 and all(float(row["ms"]) > 0 for row in table)
    for solver in ("krylov", "cg"):  # few products do much, enough of them all that float32 can
        assert residual[solver, "full", 1] > residual[solver, "full", 3] < 0.01
        assert min(value for key, value in residual.items() if key[:2] == (solver, "full")) < 1e-4
    assert residual["krylov", "gauss-newton", 2] < residual["columns", "gauss-newton", 2]
    plot.plt.switch_backend("Agg")
    plot.save(plot.draw_solvers(table), tmp_path, "solvers")
    assert (tmp_path / "solvers.png").stat().st_size > 10_000
    other = train(blpo, tmp_path / "runs", *TINY.split(), "--env-id", "Pendulum-v1", "--total-timesteps", 640, "--ihvp", "none")
    for wrong in (tmp_path, other):
        failed = subprocess.run([*command, wrong], capture_output=True, text=True)
        assert failed.returncode == 1 and "not a run of BLPO" in failed.stderr and failed.stderr.count("\n") == 1
