"""The scripts as a user meets them: the command line, the run folder, learning on tasks with known
answers."""

import csv
import gc
import importlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import blpo_continuous as blpo
import blpo_discrete
import ppo_continuous as ppo
import ppo_discrete
import sobirl_continuous
import sobirl_discrete
import sobirl_tabular
from jacobian import MLPJacobian, ModuleJacobian, RectifiedJacobian
from nystrom import cg_ihvp, nystrom_ihvp
from support import run_folder
from support.flags import check_ranges, parse_args
from tools import speed
from tools.solvers import Moment, doubled, system

ROOT = Path(__file__).parent.parent
SCRIPTS = [ppo, blpo]
DISCRETE = [ppo_discrete, blpo_discrete]
LEADERS = [sobirl_continuous, sobirl_discrete]
NORMALISED = ["--norm-obs", "--norm-reward"]  # the default of the continuous scripts
TINY = [
    "--num-envs",
    "4",
    "--num-steps",
    "16",
    "--num-minibatches",
    "4",
    "--update-epochs",
    "1",
    "--eval-episodes",
    "1",
]


def command(script, *flags):
    return [sys.executable, "-W", "error::RuntimeWarning", f"{ROOT}/{script.__name__}.py", *map(str, flags)]


def start(script, *flags, **options):
    options = dict(cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) | options
    return subprocess.Popen(command(script, *flags), **options)


def run(script, *flags, env=None, status=0):
    """The script in a process of its own; its standard output and error."""
    process = start(script, *flags, env=os.environ | (env or {}))
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, out + err
    return out, err


FORKS = """
import multiprocessing, multiprocessing.connection

def one():
    begin.wait()
    script.main(flags)

context = multiprocessing.get_context("fork")
begin = context.Barrier(count)
processes = [context.Process(target=one) for _ in range(count)]
for process in processes:
    process.start()
if until_one_ends:
    multiprocessing.connection.wait([process.sentinel for process in processes], timeout=60)
    for process in processes:
        process.kill()  # of no consequence where it has ended
for process in processes:
    process.join()
print(*sorted(process.exitcode for process in processes))
"""


def begun_together(count, script, *flags, until_one_ends=False):
    """Several processes with the same flags, which have imported PyTorch and wait for each other before they
    begin: their exit codes. With until_one_ends the others are killed then."""
    program = f"import {script.__name__} as script\nflags = {list(map(str, flags))}\n"
    program += f"count, until_one_ends = {count}, {until_one_ends}\n{FORKS}"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(map(int, done.stdout.splitlines()[-1].split()))


def train(script, tmp_path, *flags):
    """The script's own functions in this process, which saves the seconds of the imports; the run folder."""
    return script.main([*map(str, flags), "--runs-dir", str(tmp_path)])


def stand_in_for_wandb(monkeypatch, init):
    """A module with this function is what this process imports as wandb from now on."""
    module = types.ModuleType("wandb")
    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)


def rows(path):
    with open(path) as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def load(script, folder):
    model = torch.load(folder / "model.pt", weights_only=True)
    obs_dim = model["actor"]["net.0.weight"].shape[1]
    actor, critic = script.Actor(obs_dim, len(model["actor"]["net.4.bias"])), script.Critic(obs_dim)
    actor.load_state_dict(model["actor"])
    critic.load_state_dict(model["critic"])
    return actor, critic, model


# The command line


@pytest.mark.parametrize("script", [*SCRIPTS, *DISCRETE, sobirl_tabular])
def test_every_flag_is_read_and_documented(script, capsys):
    files = [Path(script.__file__), *sorted((ROOT / "support").glob("*.py"))]
    source = "".join(path.read_text() for path in files)
    for name in script.Args.__dataclass_fields__:
        assert re.search(rf"(args|self)\.{name}\b", source), name
        assert re.search(rf'    {name}: [^"]*("[^"]*"[^"]*)*\n    """\S.+', source), name
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert not stop.value.code and "seed of the" in out
    for name in script.Args.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in out, name


STAND_INS = r"""
python() { printf '%s\x1f' "$@"; printf '\x1e'; }
pip() { :; }
bash() { :; }
ls() { echo runs/some; }
"""


def test_commands_that_pages_show_are_accepted():
    """As a shell reads them, but for blocks that set up an environment or take an earlier commit."""
    shown = []
    for page in [ROOT / "README.md", *ROOT.glob("docs/*.md")]:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            if "git checkout" not in block and "-m venv" not in block:
                command = ["bash", "-euc", STAND_INS + block]
                done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
                assert done.returncode == 0 and not done.stderr, (page, done.stderr)
                shown += [command.split("\x1f")[:-1] for command in done.stdout.split("\x1e")[:-1]]
    scripts = {f"{script.__name__}.py": script for script in [*SCRIPTS, *DISCRETE, *LEADERS, sobirl_tabular]}
    assert {name for name, *_ in shown} >= scripts.keys() - {"ppo_discrete.py", "blpo_discrete.py"}
    for name, *flags in shown:
        assert (ROOT / name).exists()
        if name in scripts:
            args = parse_args(scripts[name].Args, "", flags)
            check_ranges(args)
            scripts[name].check_args(args)
        elif name.startswith("tools/") and name != "tools/rivals.py":  # which another environment runs
            parse_args(importlib.import_module(name[:-3].replace("/", ".")).Args, "", flags)


def test_the_first_two_commands_of_the_readme():
    """One line each, which sets up and does something: a script's flags are right, or it is pytest."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", readme, re.DOTALL)[:2]
    train, test = (block.removesuffix("\n").split(" && ") for block in blocks)
    assert train[:2] == test[:2] == ["python3 -m venv .venv", ".venv/bin/pip install -r requirements.txt"]
    assert test[2:] == [".venv/bin/python -m pytest -q"]
    (command,) = train[2:]
    python, script, *flags = command.split(" ")
    assert (python, script) == (".venv/bin/python", "blpo_continuous.py") and "\n" not in command
    assert parse_args(blpo.Args, "", flags).env_id == "Walker2d-v4"


@pytest.mark.parametrize("name", ["film", "gate", "learning", "phi", "plot", "solvers", "speed", "tuning"])
def test_commands_that_tools_show_are_accepted(name):
    """At the head of each of them."""
    tool = importlib.import_module(f"tools.{name}")
    pattern = rf"^    python (tools/{name}\.py.*?)(?: {{2,}}# .*)?$"
    shown = re.findall(pattern, tool.__doc__, re.MULTILINE)
    assert shown
    for command in shown:
        parse_args(tool.Args, "", shlex.split(command)[1:])


@pytest.mark.parametrize("script", [blpo, sobirl_tabular])
def test_help_begins_with_the_flags(script, capsys):
    """After one paragraph: the derivation is for readers of the script."""
    with pytest.raises(SystemExit):
        script.main(["--help"])
    before, flags = capsys.readouterr().out.split("--seed", 1)
    assert script.__doc__.split("\n")[0][:40] in before and len(before.splitlines()) < 45
    assert "hypergradient" not in flags.split("--gamma")[0]


# The run folder


@pytest.mark.parametrize("script", SCRIPTS)
def test_run_folder(script, tmp_path):
    """Also that nothing imports wandb without --track."""
    (tmp_path / "wandb.py").write_text("import os\nos._exit(3)\n")
    runs = tmp_path / "runs"
    flags = [*TINY, "--env-id", "Pendulum-v1", "--total-timesteps", 2000, "--runs-dir", runs, "--seed", 3]
    out, err = run(script, *flags, env={"PYTHONPATH": str(tmp_path)})
    assert err == ""
    (folder,) = runs.iterdir()
    assert folder.name.startswith(f"Pendulum-v1__{script.__name__}__3__")
    assert (
        str(folder) in out
        and "evaluation, 1 deterministic episodes: return -" in out
        and "SPS" in out
        and "ms per iteration" in out
    )
    config = json.loads((folder / "config.json").read_text())
    assert config["flags"]["seed"] == 3 and config["flags"]["num_steps"] == 16
    assert config["versions"]["torch"] == torch.__version__ and set(config["versions"]) >= {
        "python",
        "gymnasium",
        "numpy",
    }
    progress, episodes = rows(folder / "progress.csv"), rows(folder / "episodes.csv")
    assert [row["global_step"] for row in progress] == [64 * (i + 1) for i in range(2000 // 64)]
    assert len(episodes) == 4 * (496 // 200) == progress[-1]["episodes"]
    assert all(row["length"] == 200 and row["return"] < 0 for row in episodes)
    assert progress[-1]["return_100"] == pytest.approx(np.mean([row["return"] for row in episodes]))
    assert len(rows(folder / "evaluation.csv")) == 1
    phases = [k for k in progress[0] if k.startswith("seconds_")]
    assert {"seconds_env", "seconds_inference", "seconds_critic", "seconds_actor"} <= set(phases)
    assert ("seconds_hypergradient" in phases) == (script is blpo)
    spent = sum(row[k] for row in progress for k in phases)
    assert 0.1 * progress[-1]["wall_seconds"] < spent <= 1.01 * progress[-1]["wall_seconds"]
    *_, model = load(script, folder)
    assert model["config"] == config and model["obs_rms"]["count"] > 1900


@pytest.mark.parametrize("script", DISCRETE)
def test_run_folder_discrete(script, tmp_path):
    folder = train(script, tmp_path, *TINY, "--total-timesteps", 2000)
    assert folder.name.startswith(f"CartPole-v1__{script.__name__}__1__")
    progress, episodes = rows(folder / "progress.csv"), rows(folder / "episodes.csv")
    assert len(progress) == 31 and len(episodes) == progress[-1]["episodes"]
    assert 0 < progress[-1]["entropy"] <= progress[0]["entropy"] + 1e-6 <= math.log(2) + 2e-6
    assert all(row["length"] == row["return"] for row in episodes)
    assert ("seconds_hypergradient" in progress[0]) == (script is blpo_discrete)
    *_, model = load(script, folder)
    assert "obs_rms" not in model


@pytest.mark.parametrize("script", SCRIPTS + DISCRETE)
def test_same_seed_same_bytes_other_seed_other_bytes(script, tmp_path):
    def progress(seed, name):
        flags = (
            "--env-id",
            "Hopper-v4" if script in SCRIPTS else "CartPole-v1",
            "--total-timesteps",
            1024,
            "--seed",
            seed,
        )
        table = rows(train(script, tmp_path / name, *TINY, *flags) / "progress.csv")
        return [{k: v for k, v in row.items() if "seconds" not in k and k != "sps"} for row in table]

    first = progress(1, "a")
    assert str(first) == str(progress(1, "b"))  # str: nan equals nan
    assert str(first) != str(progress(2, "c"))


def test_nesting_only_is_the_hypergradient_times_zero(tmp_path):
    """--ihvp none and --implicit-bound 0: the same update, bit for bit, whatever the solver."""

    def weights(*flags):
        folder = train(blpo, tmp_path, *TINY, "--env-id", "Hopper-v4", "--total-timesteps", 640, *flags)
        return torch.load(folder / "model.pt", weights_only=True)["actor"]

    reference = weights("--ihvp", "none")
    for flags in (["nystrom"], ["cg"], ["pcg", "--hypergradient", "released"]):
        other = weights("--implicit-bound", 0, "--ihvp", *flags)
        assert all(torch.equal(reference[name], other[name]) for name in reference)
    assert not all(torch.equal(reference[name], value) for name, value in weights().items())


FOUR = [*TINY, "--total-timesteps", 256]  # iterations, as in LEADING
LEADING = ["--env-id", "Pendulum-v1", "--hidden-size", 8, "--batch-size", 8, "--total-timesteps", 480]
LEADING += ["--learning-starts", 120, "--outer-steps", 120, "--query-steps", 60]


@pytest.mark.parametrize(
    "script, flags",
    [
        (ppo, FOUR),
        (blpo_discrete, ["--env-id", "CartPole-v1", *FOUR]),
        *((blpo, [*FOUR, *flags.split()]) for flags in ("", "--ihvp cg", "--ihvp pcg", "--hessian full")),
        (blpo, [*FOUR, "--nystrom-sketch", "columns"]),
        *((sobirl_continuous, [*LEADING, "--method", method]) for method in ("sobirl", "hpgd", "pbrl")),
        (sobirl_discrete, [*LEADING, "--env-id", "tools.tasks:PendulumBins-v0", "--method", "sobirl"]),
    ],
)
def test_updates_leave_no_array_to_the_garbage_collector(script, flags, tmp_path, monkeypatch):
    """A Jacobian holds arrays of a rollout's size: it must be gone as soon as nobody needs it, and it is not
    where a function that refers to itself refers to it."""
    alive = []
    log_means = run_folder.Run.log_means

    def count(*given):
        kinds = (MLPJacobian, RectifiedJacobian, ModuleJacobian, torch.Tensor)
        alive.append(sum(type(one) in kinds for one in gc.get_objects()))
        log_means(*given)

    monkeypatch.setattr(run_folder.Run, "log_means", count)
    gc.collect()
    gc.disable()
    try:
        train(script, tmp_path, *flags, "--eval-episodes", 0)
    finally:
        gc.enable()
    assert len(alive) == 4 and alive[3] == alive[1]


def test_a_killed_run_keeps_what_it_measured(tmp_path, monkeypatch):
    """SIGKILL leaves what another process can read: every row from the moment on when it was measured."""
    log, left = run_folder.Run.log, []

    def see_what_is_on_disk(self, row, line):
        log(self, row, line)
        measured = rows(self.folder / "progress.csv")
        left.append(len(measured))
        assert measured[-1]["global_step"] == row["global_step"]
        assert len(rows(self.folder / "episodes.csv")) == row["episodes"]

    monkeypatch.setattr(run_folder.Run, "log", see_what_is_on_disk)
    folder = train(blpo, tmp_path, *TINY, "--env-id", "Pendulum-v1", "--total-timesteps", 1280)
    assert left == list(range(1, 21)) and rows(folder / "progress.csv")[-1]["episodes"] == 4


def test_two_runs_in_the_same_second_get_two_folders(tmp_path):
    flags = [*TINY, "--env-id", "Pendulum-v1", "--total-timesteps", 128, "--runs-dir", tmp_path]
    assert begun_together(3, ppo, *flags) == [0, 0, 0]
    assert len(list(tmp_path.glob("*/model.pt"))) == 3


def test_wandb_offline(tmp_path):
    flags = (*TINY, "--env-id", "Pendulum-v1", "--total-timesteps", 640, "--track")
    offline = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(tmp_path)}
    run(blpo, *flags, "--runs-dir", tmp_path / "a", env=offline)
    assert list(tmp_path.glob("**/*.wandb"))


def test_wandb_out_of_reach(tmp_path, monkeypatch, capsys):
    """A failure of wandb.init stands for every broken installation."""
    flags = (*TINY, "--env-id", "Pendulum-v1", "--total-timesteps", 640, "--track")

    def no_network(**_):
        raise ConnectionError("no network")

    stand_in_for_wandb(monkeypatch, no_network)
    assert (train(blpo, tmp_path, *flags) / "model.pt").exists()
    assert capsys.readouterr().err == "wandb is off: ConnectionError: no network\n"

    class Lost:
        def log(self, row, step):
            raise ConnectionError("lost")

    stand_in_for_wandb(monkeypatch, lambda **_: Lost())
    assert (train(ppo, tmp_path, *flags) / "model.pt").exists()
    assert capsys.readouterr().err == "wandb is off: ConnectionError: lost\n"


def test_run_names_stay_in_the_runs_folder(tmp_path):
    folder = train(
        blpo,
        tmp_path,
        *TINY,
        "--env-id",
        "Pendulum-v1",
        "--total-timesteps",
        64,
        "--exp-name",
        "../../$(a b)",
    )
    assert folder.parent == tmp_path and folder.is_dir()


@pytest.mark.parametrize(
    "name, expected", [("sobirl_discrete.py", True), ("ppo_continuous_action.py", False)]
)
def test_which_commands_report_in_a_file(name, expected):
    assert speed.is_ours(f"{ROOT}/{name}") == expected and not speed.is_ours(f"/elsewhere/{name}")


def test_speed_side_by_side(tmp_path, refused):
    other = tmp_path / "other.py"  # reports as CleanRL does, 1,000 steps every 0.25 s, later every 0.3 s
    other.write_text(
        f"import time\nturns = open({str(tmp_path / 'turns')!r}, 'a')\nturns.write('.')\n"
        "for i in range(1, 6):\n    time.sleep(0.2 + 0.05 * turns.tell())\n"
        "    print(f'global_step={1000 * i}, episodic_return=[1.]')\n    print('SPS:', 1)\n"
    )
    ours = (
        f"{sys.executable} {ROOT}/ppo_continuous.py --env-id Pendulum-v1 --num-steps 64 --num-minibatches 2"
    )
    measuring = [
        sys.executable,
        ROOT / "tools" / "speed.py",
        ours,
        f"{sys.executable} {other}",
        "--steps",
        "640",
        "--turns",
        "2",
        "--csv",
        tmp_path / "speed.csv",
    ]
    done = subprocess.run(measuring, capture_output=True, text=True, check=True, cwd=tmp_path)
    out = done.stdout.splitlines()
    table = list(csv.DictReader(open(tmp_path / "speed.csv")))
    assert [row["name"] for row in table] == [ours, f"{sys.executable} {other}"] and float(
        table[0]["env_ms"]
    ) > 0
    for row in table:
        slowest, median, fastest = (float(row[rate]) for rate in ("slowest", "sps", "fastest"))
        assert slowest < fastest or row["name"] == ours and slowest == fastest  # by chance, when rounded
        assert median == pytest.approx((slowest + fastest) / 2, rel=0.01)
    assert (
        len(out) == 4
        and out[2].startswith(f"| `{ours}` |")
        and out[3].startswith(f"| `{sys.executable} {other}` |")
    )
    mine, theirs = (
        [float(cell.replace(",", "")) for cell in line.split("|")[2:-1] if cell.strip()] for line in out[2:]
    )
    assert 100 < mine[2] < 2_000 and 5 < theirs[2] < 100  # MiB
    assert 0 < theirs[0] <= 5_000 and theirs[1] == 1 and len(theirs) == 3
    assert (
        mine[1] == pytest.approx(mine[0] / theirs[0], rel=0.5) and len(mine) == 3 + 5
    )  # a PPO has no hypergradient
    once, silent = tmp_path / "once.py", tmp_path / "silent.py"
    once.write_text("print('global_step=640', 'SPS: 1', sep='\\n')")
    silent.write_text("print('SPS: 1', 'SPS: 2', sep='\\n')")
    for bad, word in (
        (f"{sys.executable} -c 1/0", "ZeroDivisionError"),
        ("nosuchcommand", "nosuch"),
        ("a 'b", "quot"),
        (f"{sys.executable} {once}", "reported 1 times; raise --steps"),
        (f"{sys.executable} {other}", "--csv"),
        (f"{sys.executable} {silent}", "did not say how far"),
    ):
        to_nowhere = str(tmp_path) * ("--csv" in word)
        with refused(word):
            speed.main(speed.Args((bad,), steps=640, csv=to_nowhere))


# Every flag value


@pytest.mark.parametrize(
    "flags",
    [
        *(
            ["--ihvp", ihvp, "--hypergradient", mode]
            for ihvp in ("nystrom", "cg", "pcg")
            for mode in ("exact", "released")
        ),
        ["--ihvp", "none"],
        ["--hypergradient", "mean-c"],
        *(
            ["--nystrom-sketch", sketch, "--nystrom-rank", "3"]
            for sketch in ("krylov", "v-gaussian", "gaussian", "columns")
        ),
        ["--nystrom-rank", "0"],
        *(["--hessian", "full", "--ihvp", ihvp] for ihvp in ("nystrom", "cg")),
        ["--nystrom-rho", "0.5", "--cg-iters", "3", "--ihvp", "cg"],
        ["--implicit-bound", "inf", "--implicit-clip", "inf", "--nested-critic-steps", "5"],
    ],
)
def test_blpo_flags(flags, tmp_path):
    folder = train(blpo, tmp_path, *TINY, "--env-id", "Pendulum-v1", "--total-timesteps", 192, *flags)
    table = rows(folder / "progress.csv")
    assert len(table) == 3 and all(row["skipped_updates"] == 0 for row in table)
    assert all(math.isfinite(row["policy_loss"]) and math.isfinite(row["approx_kl"]) for row in table)
    if "none" not in flags:
        assert all(
            row["implicit_dropped"] == 0 and -1.001 <= row["implicit_cosine"] <= 1.001 for row in table
        )
    assert all(row["critic_loss_nested"] < row["critic_loss"] for row in table)


@pytest.mark.parametrize("script", SCRIPTS + DISCRETE)
def test_a_rollout_may_be_one_step(script, tmp_path):
    env_id = "CartPole-v1" if script in DISCRETE else "Pendulum-v1"
    one = ["--num-envs", "1", "--num-steps", "1", "--num-minibatches", "1", "--no-norm-adv"]
    folder = train(script, tmp_path, *TINY, "--env-id", env_id, "--total-timesteps", "3", *one)
    assert [row["skipped_updates"] for row in rows(folder / "progress.csv")] == [0, 0, 0]


@pytest.mark.parametrize(
    "flags",
    [
        ["--no-norm-obs", "--no-norm-reward", "--no-norm-adv", "--no-anneal-lr"],
        ["--gamma", "0", "--gae-lambda", "1", "--ent-coef", "0.01", "--eval-episodes", "0"],
        [
            "--clip-coef",
            "0.1",
            "--max-grad-norm",
            "1",
            "--actor-lr",
            "1e-4",
            "--critic-lr",
            "1e-2",
            "--hidden-size",
            "32",
        ],
    ],
)
@pytest.mark.parametrize("script", SCRIPTS + DISCRETE)
def test_common_flags(script, flags, tmp_path):
    flags = flags if script in SCRIPTS or "--no-norm-obs" in flags else [*NORMALISED, *flags]
    env_id = "Pendulum-v1" if script in SCRIPTS else "Acrobot-v1"
    folder = train(script, tmp_path, *TINY, "--env-id", env_id, "--total-timesteps", 192, *flags)
    assert all(math.isfinite(row["policy_loss"]) for row in rows(folder / "progress.csv"))
    assert (folder / "evaluation.csv").exists() == ("0" not in flags[-1:])
    assert ("obs_rms" in torch.load(folder / "model.pt", weights_only=True)) == ("--no-norm-obs" not in flags)


def test_every_ppo_flag_changes_the_update(tmp_path):
    """tests/test_update.py says how; here every flag of PPO's own makes other weights from the same
    rollout."""

    def weights(*flags):
        quick = [
            "--update-epochs",
            8,
            "--critic-lr",
            0.03,
            "--no-norm-reward",
        ]  # so that values leave the clip range
        flags = [*TINY, "--env-id", "Pendulum-v1", "--total-timesteps", 192, *quick, *flags]
        folder = train(ppo, tmp_path, *flags)
        assert all(row["skipped_updates"] == 0 for row in rows(folder / "progress.csv"))
        model = torch.load(folder / "model.pt", weights_only=True)
        return torch.cat([model[net][name].flatten() for net in ("actor", "critic") for name in model[net]])

    variants = [
        [],
        ["--no-clip-vloss"],
        ["--vf-coef", "2"],
        ["--no-joint-grad-clip"],
        ["--trajectory-minibatches"],
    ]
    found = [weights(*flags) for flags in variants]
    for i, one in enumerate(found):
        assert all(not torch.equal(one, other) for other in found[:i]), variants[i]
    assert torch.equal(found[0], weights())


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_cuda_without_a_gpu_is_refused(capsys):
    refused(ppo, capsys, "--cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("script", SCRIPTS)
def test_cuda(script, tmp_path):
    folder = train(script, tmp_path, *TINY, "--env-id", "Pendulum-v1", "--total-timesteps", 640, "--cuda")
    assert all(math.isfinite(row["policy_loss"]) for row in rows(folder / "progress.csv"))


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    "env_id, obs_dim, action_size",
    [("tests.probe_envs:ProbeOdd-v0", 7, 4), ("InvertedPendulum-v4", 4, 1), ("Pusher-v5", 23, 7)],
)
def test_other_spaces(script, env_id, obs_dim, action_size, tmp_path):
    """Dictionary observations with a two-dimensional action, and other MuJoCo tasks: networks of the right
    size that have been trained, and actions that the environment takes (ProbeOdd refuses others)."""
    flags = ["--env-id", env_id, "--total-timesteps", 256]
    folder = train(script, tmp_path, *TINY, *flags)
    actor, critic, model = load(script, folder)
    assert actor.net[0].in_features == critic.value[0].in_features == obs_dim
    assert actor.net[-1].out_features == len(actor.log_std) == action_size
    torch.manual_seed(1)
    untrained = script.Actor(obs_dim, action_size)
    assert (actor.log_std != untrained.log_std).any() and not torch.equal(
        actor.net[0].weight, untrained.net[0].weight
    )
    assert len(model["obs_rms"]["mean"]) == obs_dim and (model["obs_rms"]["var"] != 1).any()
    episodes = rows(folder / "episodes.csv")
    if "Odd" in env_id:
        assert {(row["return"], row["length"]) for row in episodes} == {(3, 3)}


@pytest.mark.parametrize("script", DISCRETE)
@pytest.mark.parametrize(
    "env_id, obs_dim, action_size",
    [("tests.probe_envs:ProbeGrid-v0", 48, 3), ("FrozenLake-v1", 16, 4), ("MountainCar-v0", 2, 3)],
)
def test_other_discrete_spaces(script, env_id, obs_dim, action_size, tmp_path):
    """A picture with actions that begin at 3, one-hot observations, no reward at all."""
    folder = train(script, tmp_path, *TINY, "--env-id", env_id, "--total-timesteps", 1024)
    actor, critic, _ = load(script, folder)
    assert actor.net[0].in_features == critic.value[0].in_features == obs_dim
    assert actor.net[-1].out_features == action_size
    episodes = rows(folder / "episodes.csv")
    if "Mountain" in env_id:
        assert all(row["return"] == -200 for row in episodes) and len(episodes) == 4
    else:
        assert {row["return"] for row in episodes} == {0, 1} or "Frozen" in env_id
        assert all(row["length"] == 2 for row in episodes) or "Frozen" in env_id
        assert len(episodes) > 20


# Bad input


def last_line(capsys, status, act, *given):
    """The one line with which act(*given) ends the program with this status."""
    with pytest.raises(SystemExit) as stop:
        act(*given)
    err = capsys.readouterr().err
    assert stop.value.code == status and err.startswith("error: ") and err.count("\n") == 1, err
    return err


def refused(script, capsys, *flags):
    return last_line(capsys, 2, script.main, [*map(str, flags)])


def stopped(script, capsys, tmp_path, *flags):
    """What a run says that has begun and cannot go on."""
    return last_line(capsys, 1, train, script, tmp_path, *flags)


BAD = [
    (["--env-id", "Walker2d-v9"], "Walker2d", "v5"),
    (["--env-id", "Waker2d-v4"], "--env-id", "Walker2d-v4"),
    (["--env-id", "nomodule:Walker2d-v4"], "--env-id", "nomodule"),
    (["--env-id", ""], "--env-id", ""),
    (["--env-id", "CartPole-v1"], "--env-id", "_discrete.py"),
    (["--env-id", "Pusher-v4"], "--env-id", "Pusher-v5"),
    (["--env-id", "tests.probe_envs:ProbeRefuses-v0"], "--env-id", "no licence for this simulator"),
    (["--total-timesteps", "100"], "--total-timesteps", "2048"),
    (["--anneal-timesteps", "100"], "--anneal-timesteps", "--total-timesteps"),
    (["--anneal-timesteps", "2000000", "--no-anneal-lr"], "--anneal-timesteps", "--no-anneal-lr"),
    (["--num-minibatches", "7"], "--num-minibatches", "divide"),
    (["--num-envs", "0"], "--num-envs", "4,096"),
    (["--num-steps", "-5"], "--num-steps", "at least 1"),
    (["--num-minibatches", "0"], "--num-minibatches", "at least 1"),
    (["--update-epochs", "0"], "--update-epochs", "at least 1"),
    (["--hidden-size", "0"], "--hidden-size", "4,096"),
    (["--num-envs", "2.5"], "--num-envs", "2.5"),
    (["--actor-lr", "0"], "--actor-lr", "(0, 1]"),
    (["--critic-lr", "-1"], "--critic-lr", "(0, 1]"),
    (["--actor-lr", "nan"], "--actor-lr", "(0, 1]"),
    (["--max-grad-norm", "inf"], "--max-grad-norm", "1,000"),
    (["--clip-coef", "0"], "--clip-coef", "1,000"),
    (["--gamma", "1.1"], "--gamma", "[0, 1]"),
    (["--gae-lambda", "nan"], "--gae-lambda", "[0, 1]"),
    (["--ent-coef", "-1"], "--ent-coef", "positive"),
    (["--eval-episodes", "-1"], "--eval-episodes", "10,000"),
    (["--seed", "-1"], "--seed", "2^31"),
    (["--nosuchflag", "3"], "--nosuchflag", ""),
    (["--exp-name", "x" * 300], "--exp-name", "100"),
    (["--env-id", "tests.probe_envs:ProbeIntegerAction-v0"], "--env-id", "real-valued"),
    (["--env-id", "tests.probe_envs:ProbeNoReset-v0"], "--env-id", "lost the map"),
    (["--num-steps", "1000000", "--total-timesteps", "9" * 9], "--num-steps", "2^29"),
    (["--num-envs", "2", "--num-steps", "1", "--num-minibatches", "2"], "--num-minibatches", "two steps"),
    (["--runs-dir", "/dev/null/runs"], "--runs-dir", "another folder"),
]
BAD_BLPO = [
    (["--ihvp", "lu"], "--ihvp", "nystrom"),
    (["--hypergradient", "true"], "--hypergradient", "released"),
    (["--nystrom-sketch", "rows"], "--nystrom-sketch", "columns"),
    (["--nystrom-rank", "-1"], "--nystrom-rank", "positive"),
    (["--nystrom-rank", "6000"], "--nystrom-rank", "5377"),
    (["--nystrom-rho", "0"], "--nystrom-rho", "positive"),
    (["--nystrom-rho", "inf"], "--nystrom-rho", "finite"),
    (["--cg-iters", "0"], "--cg-iters", "at least 1"),
    (["--nested-critic-steps", "0"], "--nested-critic-steps", "at least 1"),
    (["--implicit-bound", "-0.1"], "--implicit-bound", "positive"),
    (["--implicit-clip", "0"], "--implicit-clip", "positive"),
]
BAD_DISCRETE = [
    (["--env-id", "Pendulum-v1"], "--env-id", "_continuous.py"),
    (["--env-id", "tests.probe_envs:ProbeManyActions-v0"], "--env-id", "Discrete"),
    (["--num-minibatches", "3"], "--num-minibatches", "divide"),
    (["--total-timesteps", "100"], "--total-timesteps", "512"),
    (["--ent-coef", "-1"], "--ent-coef", "positive"),
]
ROLLOUT = ["--num-envs", "3", "--num-steps", "8", "--num-minibatches", "4"]  # windows of 6 steps
BAD_PPO = [
    (["--vf-coef", "0"], "--vf-coef", "positive"),
    (["--trajectory-minibatches", *ROLLOUT], "--num-minibatches", "multiple of num_envs"),
]


@pytest.mark.parametrize(
    "script, flags, flag, fix",
    [
        *((script, *case) for script in SCRIPTS for case in BAD),
        *((blpo, *case) for case in BAD_BLPO),
        *((script, *case) for script in (ppo, ppo_discrete) for case in BAD_PPO),
        *((script, *case) for script in DISCRETE for case in BAD_DISCRETE),
    ],
)
def test_bad_input_is_one_line(script, flags, flag, fix, capsys, tmp_path):
    err = refused(script, capsys, "--runs-dir", tmp_path, *flags)
    assert flag in err and fix in err, err
    assert not list(tmp_path.iterdir())  # before any work starts


def test_bad_input_through_the_command_line(tmp_path):
    out, err = run(blpo, "--env-id", "Waker2d-v4", "--runs-dir", tmp_path, status=2)
    assert out == "" and err.startswith("error: --env-id Waker2d-v4") and err.count("\n") == 1


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize(
    "script, name",
    [
        (ppo, "ProbeBroken-v0"),
        (blpo, "ProbeBroken-v0"),
        (blpo, "ProbeBrokenEnd-v0"),
        (blpo, "ProbeBrokenReset-v0"),
    ],
)
def test_non_finite_observation_stops_the_run(script, name, tmp_path, capsys):
    flags = [*TINY, "--env-id", f"tests.probe_envs:{name}", "--total-timesteps", 10_000]
    err = stopped(script, capsys, tmp_path, *flags)
    (folder,) = tmp_path.iterdir()
    assert name in err and "non-finite observation" in err and "step " in err and str(folder) in err
    step = int(err.split("step ")[1].split(")")[0])
    table = rows(folder / "progress.csv")
    assert table[-1]["global_step"] <= step < table[-1]["global_step"] + 64 and rows(folder / "episodes.csv")


# Learning


PROBE = [
    "--num-envs",
    8,
    "--num-steps",
    16,
    "--num-minibatches",
    2,
    "--update-epochs",
    4,
    "--no-norm-obs",
    "--no-norm-reward",
]
PROBE += ["--actor-lr", 3e-3, "--critic-lr", 3e-3, "--eval-episodes", 1, "--total-timesteps", 5_000]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    "name, steps, best, value", [("OneStep", [0.0], 0.5, 1.0), ("TwoStep", [0.0, 1.0], -0.5, 1.0)]
)
def test_probe_actions_and_values(script, name, steps, best, value, tmp_path):
    env_id = f"tests.probe_envs:Probe{name}-v0"
    folder = train(script, tmp_path, *PROBE, "--env-id", env_id, "--gamma", 0.9, "--total-timesteps", 10_000)
    actor, critic, _ = load(script, folder)
    obs = torch.tensor(steps)[:, None]
    assert float(actor.net(obs).detach()[-1]) == pytest.approx(best, abs=0.15)
    spread = float(actor.log_std.exp().detach()) ** 2
    values = critic(obs).detach()
    assert float(values[-1]) == pytest.approx(value - spread, abs=0.15)  # E[(a - best)^2] = std^2
    assert float(values[0]) == pytest.approx((value - spread) * 0.9 ** (len(steps) - 1), abs=0.15)
    assert rows(folder / "evaluation.csv")[0]["return"] > 0.9
    assert rows(folder / "episodes.csv")[0]["length"] == len(steps)


@pytest.mark.parametrize("script", DISCRETE)
def test_probe_choices_and_values(script, tmp_path):
    """Two steps, of which the second pays 1 for action 4 (of 3 to 5), 0 for others."""
    folder = train(
        script,
        tmp_path,
        *PROBE,
        "--env-id",
        "tests.probe_envs:ProbeChoice-v0",
        "--gamma",
        0.9,
        "--actor-lr",
        1e-2,
    )
    actor, critic, _ = load(script, folder)
    obs = torch.tensor([[0.0], [1.0]])
    chances = actor.net(obs).softmax(-1).detach()
    assert chances[1, 1] > 0.9 and chances.sum(-1) == pytest.approx([1.0, 1.0])
    values = critic(obs).detach()
    assert float(values[1]) == pytest.approx(float(chances[1, 1]), abs=0.1)
    assert float(values[0]) == pytest.approx(0.9 * float(chances[1, 1]), abs=0.1)
    assert rows(folder / "evaluation.csv")[0] == {"return": 1, "length": 2, "cut": 0}


@pytest.mark.parametrize("script, steps", [(ppo_discrete, 30_000), (blpo_discrete, 20_000)])
def test_learns_to_balance_a_little(script, steps, tmp_path):
    folder = train(script, tmp_path, "--total-timesteps", steps, "--env-id", "CartPole-v1")
    assert (
        rows(folder / "progress.csv")[-1]["return_100"]
        > 80
        > 40
        > np.mean([row["return"] for row in rows(folder / "episodes.csv")][:50])
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_truncation_bootstraps_and_termination_does_not(script, tmp_path):
    flags = [*PROBE, "--gamma", 0.8, "--env-id"]
    endless = train(script, tmp_path / "a", *flags, "tests.probe_envs:ProbeForever-v0")
    assert rows(endless / "episodes.csv")[0]["length"] == 5
    assert float(load(script, endless)[1](torch.zeros(1, 1)).detach()) == pytest.approx(
        1 / (1 - 0.8), rel=0.05
    )
    ending = train(script, tmp_path / "b", *flags, "tests.probe_envs:ProbeProbe-v0")
    assert float(load(script, ending)[1](torch.zeros(1, 1)).detach()) == pytest.approx(1.0, rel=0.05)


def test_next_observations_are_the_true_ones(tmp_path, monkeypatch):
    """Also where an episode was truncated, at different steps in different environments."""
    rollouts, leader_gradient = [], blpo.leader_gradient

    def spy(J, advantages, batch, transitions, *rest):
        rollouts.append((batch.obs.copy(), transitions.all_obs, transitions.next_rows))
        return leader_gradient(J, advantages, batch, transitions, *rest)

    monkeypatch.setattr(blpo, "leader_gradient", spy)
    flags = [
        "--env-id",
        "tests.probe_envs:ProbeClock-v0",
        "--total-timesteps",
        640,
        "--no-norm-obs",
        "--no-norm-adv",
    ]
    train(blpo, tmp_path, *TINY, *flags)
    apart = set()  # next observations that are not the next row of obs
    for obs, all_obs, next_rows in rollouts:
        next_obs = all_obs[next_rows]
        assert (next_obs == obs + 1).all()
        apart |= set(next_obs[next_rows >= len(obs), 0].tolist())
    assert len(apart) > 4


@pytest.fixture(scope="module")
def walker(tmp_path_factory):
    """The first 36,864 steps of Walker2d-v4 under default flags, and the last moment that its hypergradient
    was made from."""
    last = {}
    leader_gradient = blpo.leader_gradient
    curvature = blpo.curvature

    def see_actor(J, *rest):
        advantages, batch, transitions, actor, args = rest
        last["rest"] = advantages, batch, transitions, args
        last["actor"] = actor
        return leader_gradient(J, *rest)

    def see_critic(critic, batch, J, args):
        last["moment"] = Moment(last["actor"], critic, *last["rest"])  # the critic's last step has been made
        return curvature(critic, batch, J, args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blpo, "leader_gradient", see_actor)
        patch.setattr(blpo, "curvature", see_critic)
        flags = ["--env-id", "Walker2d-v4", "--total-timesteps", 36_864, "--anneal-timesteps", 10**6]
        folder = train(blpo, tmp_path_factory.mktemp("walker"), *flags)
    return folder, last["moment"]


def test_learns_to_walk_a_little(walker):
    table = rows(walker[0] / "progress.csv")
    assert table[-1]["return_100"] > 200 > table[1]["return_100"]
    assert table[-1]["explained_variance"] > 0.5
    assert all(row["implicit_dropped"] == row["skipped_updates"] == 0 for row in table)


def first_trajectory(moment):
    """A moment of the first trajectory alone, which dense solves are quicker for."""
    batch, transitions, T = moment.batch, moment.transitions, moment.args.num_steps
    rows = transitions.next_rows[:T]
    cut = rows != np.arange(1, T + 1)
    cut[-1] = True
    all_obs, next_rows = blpo.with_next(batch.obs[:T], transitions.all_obs[rows], cut)
    parts = transitions.rewards[:T], transitions.discounts[:T], transitions.Gamma[:1], all_obs, next_rows
    batch = blpo.Batch(*(x[:T] for x in batch))
    parts = blpo.Transitions(*parts)
    return moment._replace(batch=batch, transitions=parts, advantages=moment.advantages[:T])


def test_default_ihvp_on_a_trained_critic_is_within_one_percent(walker):
    """Default rank and damping against float64 solves whose residual is 1e-12, on the last rollout of a real
    run. What the hypergradient takes from x = (H + rho I)^{-1} v is w = J x: w is compared where H is the
    whole Hessian, x with its Gauss-Newton part."""
    moment = doubled(blpo, first_trajectory(walker[1]))
    critic, batch, args = moment.critic, moment.batch, moment.args
    systems = {hessian: system(blpo, moment, hessian) for hessian in ("full", "gauss-newton")}
    v, rho = systems["full"][1], args.nystrom_rho
    exact = {}
    for name, (product, _) in systems.items():
        one, other = np.random.default_rng(0).standard_normal((2, len(v)))
        assert one @ product(other) == pytest.approx(other @ product(one), rel=1e-8)  # H is symmetric
        x, _ = cg_ihvp(product, v, rho, 1000, 1e-13)
        assert np.linalg.norm(product(x) + rho * x - v) <= 1e-12 * np.linalg.norm(v) and x.dtype == np.float64
        exact[name] = x
    J = critic.jacobian(batch.obs)

    def errors(hessian, sketch, rank, seed=0):
        """Relative errors of x against the exact solve with the same H, with the whole H, and of J x with the
        whole H."""
        x, _ = nystrom_ihvp(systems[hessian][0], v, rank, rho, sketch, torch.Generator().manual_seed(seed))
        off = lambda x, truth: float(np.linalg.norm(x - truth) / np.linalg.norm(truth))
        return off(x, exact[hessian]), off(x, exact["full"]), off(J @ x, J @ exact["full"])

    for hessian, sketch, ranks in (
        ("full", "krylov", range(6)),
        ("gauss-newton", "krylov", range(6)),
        ("full", "columns", [5] * 5),
    ):
        for seed, rank in enumerate(ranks):
            print(hessian, sketch, rank, *(f"{error:.2g}" for error in errors(hessian, sketch, rank, seed)))
    same_h, _, w = errors(args.hessian, args.nystrom_sketch, args.nystrom_rank)
    assert same_h <= 0.002 and w <= 0.01
    assert errors("full", args.nystrom_sketch, 3)[1] <= 0.001
    assert errors(args.hessian, args.nystrom_sketch, 0)[2] > 0.2  # there is something to approximate
