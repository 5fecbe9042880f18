"""benchmark.sh end to end, killed, raced, interrupted, with hostile names; solvers.py on a run."""

import contextlib
import csv
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import blpo_continuous as blpo
from support.flags import parse_args
from tools import figures, solvers

ROOT = Path(__file__).parent.parent
TINY = "--num-envs 4 --num-steps 16 --num-minibatches 4 --update-epochs 1 --eval-episodes 1"


def benchmark(tmp_path, *flags, script=ROOT / "benchmark.sh", stdout=subprocess.PIPE, **settings):
    defaults = dict(PYTHON=sys.executable, RUNS_DIR=str(tmp_path / "runs"), FLAGS=TINY, JOBS="2")
    return subprocess.Popen(
        ["bash", script, *flags],
        env=os.environ | defaults | settings,
        text=True,
        cwd=tmp_path,
        stdout=stdout,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def finish(process, status=0):
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, out + err
    return out, err


def finished(tmp_path):
    return sorted(path.parent.name.rsplit("__", 1)[0] for path in tmp_path.glob("runs/*/evaluation.csv"))


def names(envs, methods):
    jobs = itertools.product(envs.split(), methods.split(), "12")
    return sorted("__".join(job) for job in jobs)


def commands(out):
    """The commands of a dry run, as lists of words."""
    return [shlex.split(line) for line in out.splitlines()]


def write_script(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text("#!/bin/bash\n" + text)
    path.chmod(0o755)
    return str(path)


def stand_in(tmp_path, training=""):
    """A Python that answers what benchmark.sh asks, and trains at once: it leaves a finished run folder.

    training: what it does before, in bash; env_id, exp_name, seed and runs_dir are set. Fail-v0 ends with
    an error.
    """
    return write_script(
        tmp_path / "bin" / "python",
        f"""
case "$*" in
    "-c "*) exit ;;
    "-W ignore - "*)
        shift 4
        for env_id in "${{@:2:$1}}"; do
            [[ $env_id == CartPole* ]] && echo "discrete $env_id" || echo "continuous $env_id"
        done
        exit ;;
    *plot.py*)
        echo "drawn: ${{@:2}}"
        exit ;;
esac
while (($#)); do
    case $1 in
        --resume) folder=$2 ;;
        --*=*)
            name=${{1%%=*}} name=${{name#--}}
            declare "${{name//-/_}}=${{1#*=}}" ;;
    esac
    shift
done
{training}
if [[ ${{env_id-}} == Fail-v0 ]]; then echo "no such thing" >&2; exit 1; fi
folder=${{folder-$runs_dir/${{env_id}}__${{exp_name}}__${{seed}}__1795573961}}
mkdir -p "$folder"
if [[ ! -e $folder/config.json ]]; then
    printf '{{\\n  "total_timesteps": %s\\n}}' "$total_timesteps" > "$folder/config.json"
fi
touch "$folder/evaluation.csv"
""",
    )


def in_front_of_python(tmp_path, text):
    """The real Python, after some bash."""
    return write_script(tmp_path / "bin" / "python", f'{text}\nexec {shlex.quote(sys.executable)} "$@"\n')


def without_plots(tmp_path):
    """The real Python, but for the drawing, which takes a while."""
    return in_front_of_python(tmp_path, "[[ $1 != */plot.py ]] || exit 0")


def write_run_folder(folder, *files, steps=960):
    folder.mkdir(parents=True)
    config = {"flags": {"seed": 1, "total_timesteps": steps, "z": 0}}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for name in files:
        (folder / name).touch()
    return folder


# The commands

LOSSES = "--critic-lr 1e-3 --no-clip-vloss --vf-coef 2 --no-joint-grad-clip"
ROLLOUTS = "--num-envs 8 --num-steps 256 --num-minibatches 8 --clip-coef 0.5"
MATCHED = f"{ROLLOUTS} --update-epochs 10 --actor-lr 3e-4"
TUNED = f"{ROLLOUTS} --update-epochs 5 --actor-lr 6e-4 --trajectory-minibatches"
NESTED = "--num-minibatches 32 --nested-critic-steps 1 --update-epochs 5 --actor-lr 3e-4 --clip-coef 0.3"
COMMANDS = {
    ("Pendulum-v1", "blpo"): ("blpo_continuous.py", ""),
    ("Pendulum-v1", "blpo-released"): ("blpo_continuous.py", "--hypergradient released"),
    ("Pendulum-v1", "mean-c"): ("blpo_continuous.py", "--hypergradient mean-c"),
    ("Pendulum-v1", "blpo-cg"): ("blpo_continuous.py", "--ihvp cg"),
    ("Pendulum-v1", "blpo-pcg"): ("blpo_continuous.py", "--ihvp pcg"),
    ("Pendulum-v1", "nested"): ("blpo_continuous.py", "--ihvp none"),
    ("Pendulum-v1", "ppo"): ("ppo_continuous.py", ""),
    ("Pendulum-v1", "ppo-matched"): ("ppo_continuous.py", f"{LOSSES} {MATCHED}"),
    ("Pendulum-v1", "ppo-tuned"): ("ppo_continuous.py", f"{LOSSES} {TUNED}"),
    ("Pendulum-v1", "nested-tuned"): ("blpo_continuous.py", f"--ihvp none {NESTED}"),
    ("CartPole-v1", "blpo"): ("blpo_discrete.py", ""),
    ("CartPole-v1", "blpo-released"): ("blpo_discrete.py", "--hypergradient released"),
    ("CartPole-v1", "mean-c"): ("blpo_discrete.py", "--hypergradient mean-c"),
    ("CartPole-v1", "blpo-cg"): ("blpo_discrete.py", "--ihvp cg"),
    ("CartPole-v1", "blpo-pcg"): ("blpo_discrete.py", "--ihvp pcg"),
    ("CartPole-v1", "nested"): ("blpo_discrete.py", "--ihvp none"),
    ("CartPole-v1", "ppo"): ("ppo_discrete.py", ""),
    ("CartPole-v1", "ppo-matched"): ("ppo_discrete.py", LOSSES),
    ("CartPole-v1", "ppo-tuned"): ("ppo_discrete.py", LOSSES),
    ("CartPole-v1", "nested-tuned"): ("blpo_discrete.py", "--ihvp none"),
}
LEADERS = {
    "sac": "--method sac",
    "drlhf": "--method drlhf",
    "sobirl": "--method sobirl",
    "sobirl-unbounded": "--method sobirl --hyper-bound 0",
    "sobirl-four": "--method sobirl --hyper-bound 0 --hyper-steps 4",
    "sobirl-authors": "--method sobirl --hyper-bound 0 --hyper-pairs queue --no-baseline --no-reward-norm",
    "hpgd": "--method hpgd",
    "pbrl": "--method pbrl",
    "random": "--method random",
}
for env_id, kind in (("Pendulum-v1", "continuous"), ("CartPole-v1", "discrete")):
    for method, flags in LEADERS.items():
        COMMANDS[env_id, method] = f"sobirl_{kind}.py", flags
COMMANDS = dict(sorted(COMMANDS.items(), key=lambda item: item[0][0] == "CartPole-v1"))
STEPS = {"Pendulum-v1": "1000000", "CartPole-v1": "500000"}


def test_the_command_of_every_method(tmp_path):
    methods = " ".join(dict.fromkeys(method for _, method in COMMANDS))
    settings = dict(ENVS="Pendulum-v1 CartPole-v1", METHODS=methods, SEEDS="3 12")

    def expected(steps, extra):
        lines = []
        for seed in ("3", "12"):  # outermost
            for (env_id, method), (script, flags) in COMMANDS.items():
                line = [sys.executable, f"{ROOT}/{script}", f"--env-id={env_id}", f"--exp-name={method}"]
                line += [f"--seed={seed}", f"--total-timesteps={steps or STEPS[env_id]}"]
                line += ["--runs-dir=some runs", *flags.split(), *extra]
                lines.append(line)
        return lines

    out, err = finish(benchmark(tmp_path, "--dry-run", **settings, FLAGS="", RUNS_DIR="some runs"))
    assert commands(out) == expected("", []) and not err
    flags = "--hidden-size 128\n--gamma 0.9"  # words of a line stay together
    more = dict(FLAGS=flags, STEPS="7000", RUNS_DIR="some runs")
    out, _ = finish(benchmark(tmp_path, "--dry-run", **settings, **more))
    assert commands(out) == expected("7000", ["--hidden-size 128", "--gamma 0.9"])
    assert not list(tmp_path.iterdir())  # a dry run leaves nothing


def test_default_jobs(tmp_path):
    python = stand_in(tmp_path)
    command = ["bash", ROOT / "benchmark.sh", "--dry-run"]
    out = subprocess.check_output(command, env=os.environ | {"PYTHON": python}, cwd=tmp_path, text=True)
    found = [tuple(word.split("=")[1] for word in words[2:5]) for words in commands(out)]
    envs = ("Walker2d-v4", "Hopper-v4", "CartPole-v1", "Acrobot-v1")
    methods = ("ppo-tuned", "nested", "blpo")
    assert found == [(env, method, seed) for seed in "12345" for env in envs for method in methods]
    assert {words[6] for words in commands(out)} == {"--runs-dir=runs"}


def test_environments_and_figures_do_without_torch():
    """Whose import would take seconds whenever benchmark.sh begins and ends."""
    importing = "import sys, support.games, support.names, tools.plot; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", importing], cwd=ROOT).returncode == 0


# Runs


def test_end_to_end_with_a_failure(tmp_path):
    envs, methods = "Pendulum-v1 CartPole-v1", "ppo-matched blpo"
    settings = dict(ENVS=f"{envs} No-v0", METHODS=methods, SEEDS="1 2", STEPS="1600")
    settings["FLAGS"] = f"{TINY} --actor-lr 1e-2"  # so that PPO learns, which is the scale of the aggregates
    failing = "echo 'error: --env-id No-v0' >&2; exit 2"  # for half of the failures PyTorch need not load
    failing = f"[[ $* != *--env-id=No-v0* || $* == *--seed=1* ]] || {{ {failing}; }}"
    settings["PYTHON"] = in_front_of_python(tmp_path, failing)
    out, err = finish(benchmark(tmp_path, **settings), status=1)
    assert finished(tmp_path) == names(envs, methods)
    assert "8 of 12 done" in out and "0 running, 4 failed" in out and "min left" in out
    assert err.count("failed: No-v0__") == 4 and err.count("error: --env-id No-v0") == 4
    assert "| Pendulum-v1 | BLPO | 2 |" in out and "| CartPole-v1 | PPO, matched | 2 |" in out
    drawn = {path.name for path in (tmp_path / "runs" / "figures").iterdir()}
    assert {"curves.png", "curves.pdf", "time.png", "aggregate.png", "implicit_cosine.png"} <= drawn
    with open(tmp_path / "runs" / "results" / "summary.csv", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 8
    # nothing is left but the failures; no run is repeated
    out, _ = finish(benchmark(tmp_path, "--dry-run", **settings))
    assert out.count("\n") == out.count("--env-id=No-v0") == 4
    before = sorted(path.name for path in (tmp_path / "runs").iterdir())
    again = settings | dict(ENVS=envs, PYTHON=without_plots(tmp_path))
    out, _ = finish(benchmark(tmp_path, **again))
    assert out == "8 of 8 done, 0 running, 0 failed\n"
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == before


def test_a_folder_for_each_choice_of_steps_and_flags(tmp_path):
    settings = dict(PYTHON=stand_in(tmp_path), ENVS="Pendulum-v1", METHODS="blpo", SEEDS="1", STEPS="960")
    finish(benchmark(tmp_path, **settings))
    others = [("STEPS", "1920"), ("STEPS", "96"), ("STEPS", "60"), ("FLAGS", f"{TINY} --gamma 0.9")]
    for name, value in others:
        _, err = finish(benchmark(tmp_path, **settings | {name: value}), status=2)
        assert "RUNS_DIR" in err and name in err and value in err and err.count("\n") == 1
    out, _ = finish(benchmark(tmp_path / "runs", "--dry-run", **settings | dict(RUNS_DIR="other")))
    assert len(commands(out)) == 1


def test_lists_may_be_lines(tmp_path):
    settings = dict(PYTHON=stand_in(tmp_path), METHODS="blpo\n", SEEDS="1\n")
    settings |= dict(ENVS=" Pendulum-v1\n\n  a b \t\n")
    out, _ = finish(benchmark(tmp_path, "--dry-run", **settings))
    assert [words[2] for words in commands(out)] == ["--env-id=Pendulum-v1", "--env-id=a b"]
    for _ in range(2):  # a line break at the end does not make other FLAGS of them
        finish(benchmark(tmp_path, **settings | dict(ENVS="Pendulum-v1", FLAGS="--a b\n--c\n")))


def test_report_counts_what_is_running(tmp_path):
    """A line when the first jobs have been started, and one after each that ends and the next that begins."""
    runs = tmp_path / "runs"
    settings = dict(PYTHON=stand_in(tmp_path), METHODS="blpo", STEPS="960")
    out, _ = finish(benchmark(tmp_path, **settings, ENVS="Pendulum-v1", SEEDS="1 2 3 4"))
    lines = [line.split(", about")[0] for line in out.splitlines()]
    assert lines == [
        "0 of 4 done, 2 running, 0 failed",
        "1 of 4 done, 2 running, 0 failed",
        "2 of 4 done, 2 running, 0 failed",
        "3 of 4 done, 1 running, 0 failed",
        "4 of 4 done, 0 running, 0 failed",
        f"drawn: --runs-dir={runs} --results-dir={runs}/results --figures-dir={runs}/figures",
    ]
    assert [", about 0 h 0 min left" in line for line in out.splitlines()] == [False, *[True] * 4, False]
    settings |= dict(RESULTS_DIR="r", FIGURES_DIR="-f", JOBS="1")
    out, err = finish(benchmark(tmp_path, **settings, ENVS="Fail-v0 Pendulum-v1", SEEDS="1 5"), status=1)
    lines = [line.split(", about")[0] for line in out.splitlines()]
    assert lines == [
        "1 of 4 done, 1 running, 0 failed",
        "1 of 4 done, 1 running, 1 failed",
        "1 of 4 done, 1 running, 2 failed",
        "2 of 4 done, 0 running, 2 failed",
        f"drawn: --runs-dir={runs} --results-dir=r --figures-dir=-f",
    ]
    shown = "failed: Fail-v0__blpo__{0}, the end of {1}/logs/Fail-v0__blpo__{0}.log:\n    no such thing\n"
    assert err == "".join(shown.format(seed, runs) for seed in (1, 5))


def test_nothing_is_drawn_where_nothing_is_finished(tmp_path):
    settings = dict(PYTHON=stand_in(tmp_path), ENVS="Fail-v0", METHODS="blpo", SEEDS="1")
    out, _ = finish(benchmark(tmp_path, **settings), status=1)
    assert out.splitlines() == ["0 of 1 done, 1 running, 0 failed", "0 of 1 done, 0 running, 1 failed"]


def test_a_job_that_cannot_begin_is_a_failure(tmp_path):
    """It has no log to show; the others are done and drawn."""
    (tmp_path / "runs" / "locks" / "Pendulum-v1__blpo__1").mkdir(parents=True)
    settings = dict(PYTHON=stand_in(tmp_path), ENVS="Pendulum-v1", METHODS="blpo", SEEDS="1 2", STEPS="960")
    out, err = finish(benchmark(tmp_path, **settings), status=1)
    assert "1 of 2 done, 0 running, 1 failed" in out and "drawn: " in out
    assert "failed: Pendulum-v1__blpo__1, the end of" in err


def test_at_most_as_many_as_jobs_says(tmp_path):
    """Every job counts those that run beside it, and the first three wait for each other: one after the other
    they would wait in vain, and fail."""
    count = f"""
cd {tmp_path}/bin
mkdir run.$$ begun.$$
for attempt in {{1..1500}}; do
    if (($(ls -d begun.* | wc -l) >= 3)); then break; fi
    if ((attempt == 1500)); then exit 1; fi
    sleep 0.02
done
sleep 0.2
ls -d run.* | wc -l >> counts
rmdir run.$$
"""
    settings = dict(PYTHON=stand_in(tmp_path, count), ENVS="Pendulum-v1", METHODS="blpo", SEEDS="1 2 3 4 5 6")
    finish(benchmark(tmp_path, **settings, JOBS="3"))
    counts = [int(line) for line in (tmp_path / "bin" / "counts").read_text().split()]
    assert len(counts) == 6 and max(counts) == 3


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_or_interrupted_and_started_again_by_two(number, tmp_path):
    """No job lost, none run twice: a folder per job, although two invocations share the rest of the work."""
    settings = dict(ENVS="Pendulum-v1", SEEDS="1 2", METHODS="nested blpo", STEPS="3200")
    settings |= dict(FLAGS=f"{TINY} --checkpoint-every 5", PYTHON=without_plots(tmp_path))
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
    assert finished(tmp_path) == names("Pendulum-v1", "nested blpo")
    assert len(list(tmp_path.glob("runs/*/config.json"))) == 4
    for path in tmp_path.glob("runs/*/progress.csv"):
        with open(path, encoding="utf-8") as file:
            steps = [int(row["global_step"]) for row in csv.DictReader(file)]
        assert steps == [64 * (i + 1) for i in range(50)]


def test_jobs_killed_all_at_once_are_failures(tmp_path):
    """As by the kernel when memory runs out: bash may not notice such deaths. The rest is still done."""
    trap = f"""
if [[ $seed == [12] ]]; then
    cd {tmp_path}/bin
    touch kill.$$
    while (($(ls | grep -c kill) < 2)); do sleep 0.05; done
    kill -9 $(ls | sed -n 's/kill.//p')
fi
"""
    settings = dict(ENVS="Pendulum-v1", METHODS="nested", SEEDS="1 2 3 4", PYTHON=stand_in(tmp_path, trap))
    out, err = finish(benchmark(tmp_path, **settings), status=1)
    assert finished(tmp_path) == ["Pendulum-v1__nested__3", "Pendulum-v1__nested__4"]
    assert err.count("failed: Pendulum-v1__nested__") == 2 and "unbound" not in err and "2 of 4 done" in out


def test_jobs_killed_while_the_shell_is_busy_are_failures(tmp_path):
    """Bash forgets children that a signal kills while it does not wait for them: here it cannot print yet."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, b"." * 4096)
    os.set_blocking(writing, True)
    killed = f"if [[ $seed == [12] ]]; then touch {tmp_path}/bin/kill.$$; kill -9 $$; fi"
    settings = dict(ENVS="Pendulum-v1", METHODS="nested", SEEDS="1 2 3", PYTHON=stand_in(tmp_path, killed))
    process = benchmark(tmp_path, **settings, stdout=writing)
    os.close(writing)
    deadline = time.time() + 60
    while True:
        pids = [path.suffix[1:] for path in (tmp_path / "bin").glob("kill.*")]
        if len(pids) == 2 and not any(Path("/proc", pid).exists() for pid in pids):
            break
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.02)
    with open(reading) as file:
        out = file.read().strip(".")
    _, err = finish(process, status=1)
    assert finished(tmp_path) == ["Pendulum-v1__nested__3"]
    assert err.count("failed: Pendulum-v1__nested__") == 2 and "unbound" not in err
    assert out.startswith("0 of 3 done, 2 running, 0 failed\n") and "1 of 3 done, 0 running, 2 failed" in out


def test_a_job_of_another_invocation_is_waited_for(tmp_path):
    """Its turn comes after the others; then it turns out to be finished, and is not run again."""
    wait = f"[[ $seed != 1 ]] || until [[ -e {tmp_path}/bin/go ]]; do sleep 0.02; done\n"
    settings = dict(ENVS="Pendulum-v1", METHODS="blpo", STEPS="960", PYTHON=stand_in(tmp_path, wait))
    slow = benchmark(tmp_path, **settings, SEEDS="1")
    lock = tmp_path / "runs" / "logs" / "Pendulum-v1__blpo__1.log"  # it has the lock when it opens its log
    deadline = time.time() + 60
    while not lock.exists():
        assert time.time() < deadline and slow.poll() is None
        time.sleep(0.02)
    second = benchmark(tmp_path, **settings, SEEDS="1 2")
    while not finished(tmp_path):
        assert time.time() < deadline and second.poll() is None
        time.sleep(0.02)
    (tmp_path / "bin" / "go").touch()
    finish(slow)
    out, _ = finish(second)
    assert finished(tmp_path) == names("Pendulum-v1", "blpo") and "2 of 2 done, 0 running" in out


# Paths and names


def test_chatty_modules_and_short_runs(tmp_path):
    """What a module prints when imported does not matter; runs without a finished episode are named."""
    environment = "'gymnasium.envs.classic_control:CartPoleEnv'"
    chatty = "import gymnasium\nprint('hello\\nfrom chatty')\n"
    (tmp_path / "chatty.py").write_text(f"{chatty}gymnasium.register('Chatty-v0', {environment})\n")
    (tmp_path / "leaving.py").write_text("raise SystemExit\n")
    settings = dict(METHODS="nested", SEEDS="1", STEPS="640", PYTHONPATH=str(tmp_path))
    all_three = settings | dict(ENVS="leaving:X-v0 chatty:Chatty-v0 Pendulum-v1")
    out, _ = finish(benchmark(tmp_path, "--dry-run", **all_three))
    scripts = [Path(words[1]).name for words in commands(out)]
    assert scripts == ["blpo_continuous.py", "blpo_discrete.py", "blpo_continuous.py"]
    settings |= dict(ENVS="chatty:Chatty-v0 Pendulum-v1")
    out, _ = finish(benchmark(tmp_path, **settings))
    assert "no episode was finished, left out: Pendulum-v1 nested 1" in out
    assert "| chatty-Chatty-v0 | nesting only | 1 |" in out
    assert (tmp_path / "runs" / "figures" / "curves.png").exists()
    out, _ = finish(benchmark(tmp_path, "--dry-run", **settings))
    assert out == ""  # the scripts spell their folders as benchmark.sh expects them


NEEDY = """
import gymnasium
from gymnasium.envs.classic_control import CartPoleEnv
class Needy(CartPoleEnv):
    def __init__(self, size, render_mode=None):
        assert size == 3
        super().__init__()
gymnasium.register("Needy-v0", Needy)
"""


def test_environments_are_looked_at_with_their_arguments(tmp_path):
    """Without which this one cannot be made, so that nobody would know that its actions are discrete."""
    (tmp_path / "needy.py").write_text(NEEDY)
    settings = dict(ENVS="Pendulum-v1 needy:Needy-v0", METHODS="nested", SEEDS="1", PYTHONPATH=str(tmp_path))

    def scripts(flags):
        out, _ = finish(benchmark(tmp_path, "--dry-run", **settings, FLAGS=flags))
        return [Path(words[1]).name for words in commands(out)]

    for flags in ('--env-kwargs {"size":3}', '--gamma=0.9\n--env_kwargs={"size": 3}'):
        assert scripts(flags)[1] == "blpo_discrete.py"
    for flags in ("", '--env-kwargs {"size":4}', "--env-kwargs", "--env-kwargs 3", "--env-kwargs {"):
        assert scripts(flags)[1] == "blpo_continuous.py"  # where the job will say what is wrong
    assert scripts("--gamma 0.9 --eval-episodes 07")[0] == "blpo_continuous.py"


@pytest.mark.parametrize("name", ["my*runs?[a]", "--help", "a b'\"\\$(touch pwned)%j"])
def test_a_folder_is_a_name_and_no_pattern(name, tmp_path):
    """What is finished is skipped, what was interrupted is resumed: of this folder, not of one like it."""
    runs = tmp_path / name
    write_run_folder(runs / "Pendulum-v1__blpo__1__1700000001", "checkpoint.pt")
    write_run_folder(runs / "Pendulum-v1__blpo__2__1700000002", "checkpoint.previous.pt")
    write_run_folder(runs / "Pendulum-v1__blpo__3__1700000003", "checkpoint.pt", "evaluation.csv")
    write_run_folder(runs / "Pendulum-v1__blpo__4__1700000004")  # nothing to go on from
    for decoy in ("my-runs-a", "myrunsa", "myXrunsYa"):
        like_it = tmp_path / decoy / "Pendulum-v1__blpo__4__1700000004"
        write_run_folder(like_it, "checkpoint.pt", "evaluation.csv")
    settings = dict(PYTHON=stand_in(tmp_path), ENVS="Pendulum-v1", METHODS="blpo", SEEDS="1 2 3 4")
    settings |= dict(RUNS_DIR=name, STEPS="960", FLAGS="")
    shown = f"./{name}" if name.startswith("-") else name
    out, _ = finish(benchmark(tmp_path, "--dry-run", **settings))
    first, second, fourth = (words[2:] for words in commands(out))
    assert first == ["--resume", f"{shown}/Pendulum-v1__blpo__1__1700000001"]
    assert second == ["--resume", f"{shown}/Pendulum-v1__blpo__2__1700000002"]
    assert fourth[0] == "--env-id=Pendulum-v1" and fourth[-1] == f"--runs-dir={shown}"
    finish(benchmark(tmp_path, **settings))
    assert len(list(runs.glob("*/evaluation.csv"))) == 4 and len(list((runs / "logs").iterdir())) == 3
    assert not list(tmp_path.glob("**/pwned"))
    _, err = finish(benchmark(tmp_path, **settings | dict(STEPS="1000")), status=2)
    assert err.startswith("error: RUNS_DIR=") and name in err and err.count("\n") == 1


def test_names_are_data(tmp_path):
    """Of jobs, which a stand-in refuses as the scripts would."""
    hostile = ["a b $(touch pwned) `touch pwned`; touch pwned", "--help", "'\"*", "../x"]
    settings = dict(ENVS="\n".join(hostile), METHODS="nested", SEEDS="1", STEPS="640")
    out, _ = finish(benchmark(tmp_path, "--dry-run", **settings))
    assert [words[2] for words in commands(out)] == [f"--env-id={name}" for name in hostile]
    refuse = f'echo "$env_id" >> {tmp_path}/bin/names; echo "error: --env-id" >&2; exit 2'
    _, err = finish(benchmark(tmp_path, **settings, PYTHON=stand_in(tmp_path, refuse)), status=1)
    assert sorted((tmp_path / "bin" / "names").read_text().splitlines()) == sorted(hostile)
    assert err.count("error: --env-id") == 4 and not list(tmp_path.glob("**/pwned"))
    assert {path.name for path in tmp_path.iterdir()} == {"bin", "runs"}


BAD_SETTINGS = ["METHODS=best", "SEEDS=one", "SEEDS=01", "STEPS=-1", "JOBS=0", "LAUNCHER=moon"]
BAD_SETTINGS += ["PYTHON=/nowhere/python", "FLAGS=--eval-episodes 0"]


@pytest.mark.parametrize("setting", BAD_SETTINGS)
def test_bad_settings_are_one_line(setting, tmp_path):
    name, value = setting.split("=")
    _, err = finish(benchmark(tmp_path, **dict(PYTHON=stand_in(tmp_path)) | {name: value}), status=2)
    assert err.startswith("error: ") and name in err and value in err and err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("flags", ["--eval_episodes=0 --gamma 0.9", "--gamma=0.9\n--eval-episodes\n0"])
def test_runs_that_are_not_evaluated_are_refused(flags, tmp_path):
    """They would never count as finished, and be resumed for ever."""
    _, err = finish(benchmark(tmp_path, PYTHON=stand_in(tmp_path), FLAGS=flags), status=2)
    assert err.startswith("error: FLAGS must not have --eval-episodes 0") and err.count("\n") == 1


@pytest.mark.parametrize("flags", ["--exp-name=mine", "--total_timesteps 5", "--gamma\n0.9\n--seed\n3"])
def test_what_benchmark_sets_itself_is_no_flag(flags, tmp_path):
    """Runs of another name, seed or length would not be found again."""
    _, err = finish(benchmark(tmp_path, PYTHON=stand_in(tmp_path), FLAGS=flags), status=2)
    assert err.startswith("error: FLAGS must not have --") and err.count("\n") == 1
    assert re.search("--(exp-name|total_timesteps|seed), which", err)


def test_the_number_of_threads_is_no_number_of_cores(tmp_path):
    """nproc obeys OMP_NUM_THREADS, which is often set."""
    write_script(tmp_path / "bin" / "nproc", "echo ${OMP_NUM_THREADS+none}1\n")
    settings = dict(PYTHON=stand_in(tmp_path), PATH=f"{tmp_path}/bin:{os.environ['PATH']}", JOBS="")
    settings |= dict(ENVS="Pendulum-v1", SEEDS="1", OMP_NUM_THREADS="37")
    finish(benchmark(tmp_path, "--dry-run", **settings))


def test_slurm_limits_an_array_itself_unless_jobs_is_set(tmp_path):
    """The number of cores of the machine that hands it in is none of a cluster's business."""
    write_script(tmp_path / "bin" / "sbatch", f"printf '%s\\n' \"$@\" > {tmp_path}/arguments\necho 7\n")
    settings = dict(PYTHON=stand_in(tmp_path), PATH=f"{tmp_path}/bin:{os.environ['PATH']}", JOBS="")
    settings |= dict(LAUNCHER="slurm", ENVS="Pendulum-v1", SEEDS="1")
    finish(benchmark(tmp_path, **settings))
    assert "--array=0-2" in (tmp_path / "arguments").read_text().splitlines()
    settings["PATH"] = f"{tmp_path}/empty:/usr/bin:/bin"
    if not shutil.which("sbatch", path=settings["PATH"]):
        _, err = finish(benchmark(tmp_path, **settings | {"RUNS_DIR": "none"}), status=2)
        assert "needs sbatch" in err and not (tmp_path / "none").exists()


@pytest.mark.parametrize("flags", [["--dri-run"], ["--job"], ["--job", "6"], ["--job", "a[$(touch pwned)]"]])
def test_bad_flags_are_one_line(flags, tmp_path):
    settings = dict(PYTHON=stand_in(tmp_path), ENVS="Pendulum-v1", SEEDS="1 2")  # jobs 0 to 5
    _, err = finish(benchmark(tmp_path, *flags, **settings), status=2)
    assert err.startswith("error: ") and flags[0] in err and "LAUNCHER" not in err and err.count("\n") == 1
    assert not list(tmp_path.glob("**/pwned"))


# Slurm


def test_slurm_submits_one_array(tmp_path):
    """Against a stand-in that keeps its arguments and runs one element; tests/slurm.sh has a real Slurm."""
    sbatch = f"""
printf '%s\\n' "$@" > {tmp_path}/arguments
PATH=/usr/bin:/bin SLURM_ARRAY_TASK_ID=2 sh -c "${{@: -1}}" >&2 # a node of the cluster has no sbatch
echo 7
"""
    write_script(tmp_path / "bin" / "sbatch", sbatch)
    settings = dict(PYTHON=stand_in(tmp_path), PATH=f"{tmp_path}/bin:{os.environ['PATH']}")
    settings |= dict(LAUNCHER="slurm", PARTITION="cpu", SBATCH="--time=1:00 --mem=2G", FLAGS="--a 'b")
    settings |= dict(ENVS="Pendulum-v1", STEPS="640", SEEDS="1 2", METHODS="ppo-matched nested blpo")
    (tmp_path / "it's $HOME").mkdir()
    script = shutil.copy(ROOT / "benchmark.sh", tmp_path / "it's $HOME")
    out, err = finish(benchmark(tmp_path, script=script, **settings, RUNS_DIR="runs"))
    *options, wrap, command = (tmp_path / "arguments").read_text().splitlines()
    assert options == [
        "--parsable",
        "--job-name=blpo",
        "--array=0-5%2",
        "--ntasks=1",
        "--cpus-per-task=1",
        "--export=ALL",
        "--output=runs/logs/slurm-%A_%a.log",
        "--partition=cpu",
        "--time=1:00",
        "--mem=2G",
    ]
    assert wrap == "--wrap" and command.endswith(" --job $SLURM_ARRAY_TASK_ID")
    told, afterwards = out.split("; afterwards: ")
    assert told == "Slurm array 7 of 6 jobs, results into runs"
    drawn = subprocess.check_output(["sh", "-c", afterwards], text=True)
    assert drawn == "drawn: --runs-dir=runs --results-dir=runs/results --figures-dir=runs/figures\n"
    places = dict(RUNS_DIR="runs", RESULTS_DIR="my results", FIGURES_DIR="-f")
    out, _ = finish(benchmark(tmp_path, script=script, **settings, **places))
    drawn = subprocess.check_output(["sh", "-c", out.split("; afterwards: ")[1]], text=True)
    assert drawn == "drawn: --runs-dir=runs --results-dir=my results --figures-dir=-f\n"
    assert finished(tmp_path) == ["Pendulum-v1__blpo__1"], err
    # what follows a % in --output is replaced by Slurm: a folder's own is doubled
    finish(benchmark(tmp_path, script=script, **settings, RUNS_DIR="50%a"))
    assert "--output=50%%a/logs/slurm-%A_%a.log" in (tmp_path / "arguments").read_text().splitlines()
    assert (tmp_path / "50%a" / "logs" / "Pendulum-v1__blpo__1.log").exists()


def test_solvers_on_a_real_critic(tmp_path, refused):
    from tests.test_scripts import train

    given = ["--env-id", "Pendulum-v1", "--total-timesteps", 20_480, "--eval-episodes", 0]
    run = train(blpo, tmp_path / "runs", *given)
    flags = ["--csv", str(tmp_path / "solvers.csv"), "--systems", "2", "--repeat", "1"]
    command = [sys.executable, f"{ROOT}/tools/solvers.py", *flags]
    files = {path.name: path.read_bytes() for path in run.iterdir()}
    subprocess.run([*command, run], check=True, capture_output=True)
    assert files == {path.name: path.read_bytes() for path in run.iterdir()}  # it worked on a copy
    with open(tmp_path / "solvers.csv") as file:
        table = list(csv.DictReader(file))
    residual = {
        (row["solver"], row["hessian"], int(row["products"])): float(row["residual"]) for row in table
    }
    assert len(residual) == 58 and all(float(row["ms"]) > 0 for row in table)
    for solver in ("krylov", "cg"):  # few products do much, enough of them all that float32 can
        assert residual[solver, "full", 1] > residual[solver, "full", 3] < 0.01
        assert min(value for key, value in residual.items() if key[:2] == (solver, "full")) < 1e-4
    assert residual["krylov", "gauss-newton", 2] < residual["columns", "gauss-newton", 2]
    (axis,) = figures.draw_solvers(table).axes
    assert axis.get_title() == "Pendulum-v1"
    points = [len(line.get_xdata()) for line in axis.lines]
    assert sorted(points) == sorted([*(2 * [5, 5, 5, 5, 5, 4]), 1, 2])  # the default's ring, and 1 %
    few = [*TINY.split(), "--env-id", "Pendulum-v1", "--total-timesteps", 640]
    other = train(blpo, tmp_path / "runs", *few, "--ihvp", "none")
    for wrong in (tmp_path, other):
        with refused("not a run of BLPO"):
            solvers.main(parse_args(solvers.Args, "", [*flags, str(wrong)]))
