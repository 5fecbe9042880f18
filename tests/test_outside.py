"""What outsiders run into: situations from public bug reports about single-file training scripts."""

import builtins
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import filelock
import numpy as np
import pytest
import torch

import blpo_continuous as blpo
import ppo_continuous as ppo
import ppo_discrete
import sobirl_continuous as sobirl
from support import environments, flags, run_folder
from support.flags import check_ranges, parse_args
from tests.test_scripts import DISCRETE, ROOT, SCRIPTS, TINY, load, refused, rows, train
from tests.test_scripts import stand_in_for_wandb

PROBES = "tests.probe_envs:Probe"
PENDULUM = [*TINY, "--env-id", "Pendulum-v1", "--total-timesteps", 640]
SAC = ["--env-id", "Pendulum-v1", "--hidden-size", 8, "--batch-size", 8, "--learning-starts", 50]
SAC += ["--outer-steps", 20, "--total-timesteps", 100, "--eval-episodes", 1]


def probe(name, *more):
    return [*TINY, "--env-id", f"{PROBES}{name}-v0", "--total-timesteps", 640, *more]


# Runs every file of `commands` as a script; a word that ends with * is the only path that begins so
IN_TURN = """
import glob, os, runpy, sys
streams = [(stream, stream.errors) for stream in (sys.stdout, sys.stderr)]
for words in commands:
    words = [glob.glob(word)[0] if word.endswith("*") else word for word in words]
    for stream, errors in streams:
        stream.reconfigure(errors=errors)  # as it was for the first of them
    sys.argv, sys.path[0] = words, os.path.dirname(words[0])
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as stop:
        assert not stop.code, words
    assert "torch._dynamo" not in sys.modules  # which would take two seconds of every start
    print("end of", os.path.basename(words[0]))
"""


def run_in_turn(*commands, env):
    """Scripts with their flags, one after the other in a process of their own, which imports PyTorch once;
    what they print, in bytes."""
    words = [list(map(str, command)) for command in commands]
    program = f"commands = {ascii(words)}\n{IN_TURN}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, env=os.environ | env)
    assert done.returncode == 0 and done.stdout.count(b"end of") == len(commands), done
    return done


# Foreign exceptions


@pytest.mark.parametrize(
    "name, reason",
    [
        ("Silent", "cannot be made: AssertionError"),
        ("Missing", "cannot be made: KeyError: 'license'"),
        ("Refuses", "cannot be made: RuntimeError: no licence for this simulator"),
        ("Sequences", "TypeError: its observations cannot be flattened: part ['state']['queue'] is Seq"),
    ],
)
def test_a_foreign_exception_is_shown_with_its_type(name, reason, capsys):
    assert reason in refused(ppo, capsys, *probe(name))


def test_foreign_exceptions_everywhere_have_their_type(tmp_path, capsys, monkeypatch):
    """In modules, during a run, in evaluations, from wandb: the kind, not the place."""
    (tmp_path / "broken_module.py").write_text("assert False\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "AssertionError" in refused(ppo, capsys, "--env-id", "broken_module:X-v0")
    assert flags.shown(AssertionError()) == "AssertionError"
    assert flags.shown(KeyError("license")) == "KeyError: 'license'"
    assert flags.shown(RuntimeError("two\n lines")) == "RuntimeError: two lines"
    for path in [*ROOT.glob("*.py"), *(ROOT / "support").glob("*.py")]:
        text = path.read_text(encoding="utf-8")
        assert ": {problem}" not in text, path
        assert text.count("str(problem)") == (path.name == "flags.py"), path


def test_text_in_observations_is_left_out(tmp_path, capsys):
    folder = train(blpo, tmp_path, *probe("Texts"))
    assert capsys.readouterr().err.count("note: text is left out of the observations: mission") == 1
    assert load(blpo, folder)[0].net[0].in_features == 2


def test_pictures_are_announced(tmp_path, capsys):
    train(ppo, tmp_path, *probe("Picture", "--total-timesteps", 64, "--hidden-size", 1, "--eval-episodes", 0))
    err = capsys.readouterr().err
    assert "(84, 84, 3) are flattened to 21,168 numbers" in err and err.count("\n") == 1


def test_an_environment_that_ends_the_process_is_an_error(tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit) as stop:
        train(ppo, tmp_path, *probe("Leaves", "--total-timesteps", 6400))
    assert stop.value.code == 1 and "SystemExit: 0" in capsys.readouterr().err
    (tmp_path / "leaving.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    flags_ = ["--env-id", "leaving:X-v0", "--runs-dir", tmp_path / "none"]
    assert "SystemExit: 0" in refused(ppo, capsys, *flags_)


def test_an_exception_that_cannot_be_shown_has_a_type(capsys):
    assert "cannot be made: Mute: its message cannot be shown" in refused(ppo, capsys, *probe("Unspeakable"))


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_do_not_write_into_a_run(closed, tmp_path):
    """A file that is opened gets the number of a closed stream, and what is printed would land in it."""
    words = [sys.executable, f"{ROOT}/ppo_continuous.py", *PENDULUM, "--runs-dir", tmp_path]
    longer = ["--total-timesteps", "1000000"]
    rows_there = f"$(cat {shlex.quote(str(tmp_path))}/*/progress.csv 2> /dev/null | wc -l)"
    waiting = f"while kill -0 $! && (({rows_there} < 5)); do sleep 0.1; done"
    shell = f"{shlex.join(map(str, words + longer))} {closed} & {waiting}; kill -TERM $!; wait $!"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert done.returncode == 143, done
    (folder,) = tmp_path.iterdir()
    for name in ("progress.csv", "episodes.csv"):
        assert all(re.fullmatch(r"[-\w.,]+", line) for line in (folder / name).read_text().splitlines())
    steps = [row["global_step"] for row in rows(folder / "progress.csv")]
    assert steps == [64 * (i + 1) for i in range(len(steps))] and len(steps) > 3


# Environments without a time limit


def test_evaluations_without_end_are_cut_and_counted(tmp_path, capsys):
    folder = train(blpo, tmp_path, *probe("Endless", "--eval-episodes", 3, "--eval-max-steps", 50))
    out, err = capsys.readouterr()
    assert "return 50.0" in out and "3 of them were cut at --eval-max-steps 50" in out
    table = rows(folder / "evaluation.csv")
    assert [(row["return"], row["length"], row["cut"]) for row in table] == [(50, 50, 1)] * 3
    assert err.count("no episode has ended in 256 steps") == 1 and "time limit?" in err
    blpo.main(["--evaluate", str(folder), "--eval-episodes", "2", "--eval-max-steps", "7"])
    assert "2 of them were cut at --eval-max-steps 7" in capsys.readouterr().out


def test_an_episode_that_ends_at_the_limit_is_not_cut(tmp_path, capsys):
    folder = train(blpo, tmp_path, *probe("Forever", "--eval-episodes", 2, "--eval-max-steps", 5))
    out, err = capsys.readouterr()
    assert [row["cut"] for row in rows(folder / "evaluation.csv")] == [0, 0] and "cut" not in out
    assert "no episode has ended" not in err


def test_long_evaluations_say_how_far_they_are(tmp_path, capsys, monkeypatch):
    seconds = iter(range(0, 10**6, 2))
    monkeypatch.setattr("support.evaluation.time.monotonic", lambda: next(seconds))
    train(ppo, tmp_path, *probe("Endless", "--eval-episodes", 2, "--eval-max-steps", 100))
    out = capsys.readouterr().out
    assert "evaluation: step 3 of episode 1 of 2" in out and "of episode 2 of 2" in out


# Modules and files beside the user


def test_a_module_in_the_current_folder_is_found(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import gymnasium\nentry = 'gymnasium.envs.classic_control.pendulum:PendulumEnv'\n"
        "gymnasium.register('Mine-v0', entry, max_episode_steps=20)\n"
    )
    script = [sys.executable, f"{ROOT}/blpo_continuous.py", *TINY, "--total-timesteps", "128"]
    done = subprocess.run([*script, "--env-id", "mine:Mine-v0"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])  # without the current folder
    blpo.main(["--evaluate", str(folder), "--eval-episodes", "1"])
    del sys.modules["mine"], environments.gym.registry["Mine-v0"]
    settings = os.environ | dict(ENVS="mine:Mine-v0", METHODS="nested", SEEDS="1", PYTHON=sys.executable)
    benchmark = ["bash", f"{ROOT}/benchmark.sh", "--dry-run"]
    dry = subprocess.run(benchmark, cwd=tmp_path, env=settings, capture_output=True, text=True)
    assert "blpo_continuous.py" in dry.stdout, dry.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_encoding_of_the_terminal(encoding, tmp_path):
    script, plot = ROOT / "ppo_continuous.py", ROOT / "tools" / "plot.py"
    places = ["--results-dir", tmp_path / "results", "--figures-dir", tmp_path / "figures"]
    done = run_in_turn(
        [script, *PENDULUM, "--exp-name", "\u96ea", "--runs-dir", tmp_path / "runs"],
        [script, "--help"],
        [script, "--evaluate", f"{tmp_path}/runs/*"],
        [plot, "--runs-dir", tmp_path / "runs", *places],
        env={"PYTHONIOENCODING": encoding},
    )
    assert done.stdout.count(b"evaluation, ") == 2 and not done.stderr, done
    (folder,) = (tmp_path / "runs").iterdir()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["flags"]["exp_name"] == "\u96ea"
    assert (tmp_path / "results" / "tables.md").exists()


def test_names_of_other_alphabets_are_kept_apart(tmp_path):
    names = ["\u96ea", "\u96e8", "\u00e9t\u00e9", "ete", "a b", "a-b"]
    folders = [train(ppo, tmp_path, *PENDULUM, "--exp-name", name, "--eval-episodes", 0) for name in names]
    stems = [folder.name.rsplit("__", 1)[0] for folder in folders]
    assert len(set(stems[:4])) == 4 and all(stem.isascii() for stem in stems)
    assert stems[3:] == ["Pendulum-v1__ete__1", "Pendulum-v1__a-b__1", "Pendulum-v1__a-b__1"]


def test_files_are_opened_with_an_encoding():
    """Wherever text is read or written, in scripts, support and tools."""
    for path in [*ROOT.glob("*.py"), *(ROOT / "support").glob("*.py"), *(ROOT / "tools").glob("*.py")]:
        text = path.read_text(encoding="utf-8")
        for call in re.findall(r"(?<![\w.])open\([^\n]*|\.(?:read|write)_text\([^\n]*", text):
            binary = re.search(r'"[rw]\+?b"', call)
            assert "encoding=" in call or binary, f"{path.name}: {call}"


# Machines


@pytest.mark.parametrize(
    "problem", [OSError(38, "Function not implemented"), NotImplementedError("no flock")]
)
def test_where_files_cannot_be_locked_runs_go_on(problem, tmp_path, capsys, monkeypatch):
    def acquire(self, *_, **__):
        raise problem

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    folder = train(ppo, tmp_path, *PENDULUM)
    ppo.main(["--resume", str(folder)])
    err = capsys.readouterr().err
    assert err.count("note: files cannot be locked here") == 2 and err.count("\n") == 2


def test_nothing_that_only_unix_has_is_needed(tmp_path):
    """Import, training and resume with fcntl, resource, pwd, grp and os.pwrite hidden, as on Windows."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\nfor name in ('fcntl', 'resource', 'pwd', 'grp', 'termios'):\n"
        "    sys.modules[name] = None\ndel os.pwrite, os.pread\n"
    )
    commands = []
    for name, given in (("ppo", PENDULUM), ("sobirl", SAC)):
        script, runs = ROOT / f"{name}_continuous.py", tmp_path / name
        commands += [[script, *given, "--runs-dir", runs], [script, "--resume", f"{runs}/*"]]
    run_in_turn(*commands, env={"PYTHONPATH": str(tmp_path)})


def test_scripts_and_support_import_nothing_that_only_unix_has(monkeypatch):
    original = builtins.__import__
    seen = []

    def spy(name, *rest, **more):
        seen.append(name)
        return original(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", spy)
    for module in ("support.run_folder", "support.saved", "support.environments", "support.flags"):
        source = Path(sys.modules[module].__file__).read_text(encoding="utf-8")
        exec(compile(source, module, "exec"), {"__name__": "again"})
    assert not {"fcntl", "resource", "pwd", "termios"} & set(seen)


def test_wandb_knows_a_renamed_run(tmp_path, monkeypatch):
    """The id is in config.json, not in the folder's name."""
    seen = []

    class Broadcast:
        def log(self, row, step):
            pass

        def finish(self):
            pass

    def init(id, **_):
        seen.append(id)
        return Broadcast()

    stand_in_for_wandb(monkeypatch, init)
    folder = train(ppo, tmp_path, *PENDULUM, "--track")
    renamed = folder.rename(tmp_path / "a better name")
    ppo.main(["--resume", str(renamed)])
    assert seen == [folder.name] * 2


# Numbers


@pytest.mark.parametrize("script", SCRIPTS)
def test_updates_that_are_skipped_are_announced(script, tmp_path, capsys):
    """PPO's joint clip as well: it must not shrink the other network's gradient to 0."""
    train(script, tmp_path, *probe("HugeReward", "--no-norm-reward"))
    err = capsys.readouterr().err
    assert err.count("of this iteration's updates were skipped") == 1 and "--norm-reward" in err
    train(script, tmp_path, *probe("HugeReward"))
    assert "skipped" not in capsys.readouterr().err


@pytest.mark.parametrize("script", SCRIPTS)
def test_rewards_may_be_arrays_of_one(script, tmp_path):
    folder = train(script, tmp_path, *probe("ArrayReward"))
    assert {row["return"] for row in rows(folder / "episodes.csv")} == {6}
    assert rows(folder / "evaluation.csv")[0]["return"] == 6


@pytest.mark.parametrize("script", SCRIPTS)
def test_ends_of_episodes_may_be_arrays_of_one(script, tmp_path):
    folder = train(script, tmp_path, *probe("ArrayFlags"))
    assert {(row["return"], row["length"]) for row in rows(folder / "episodes.csv")} == {(3, 3)}


def test_rescaled_actions_are_in_the_box(tmp_path):
    """Also where single precision would leave it by the last digit."""
    folder = train(ppo, tmp_path, *probe("Strict", "--actor-lr", 0.3, "--no-anneal-lr"))
    assert len(rows(folder / "progress.csv")) == 10


def test_a_model_is_evaluated_without_its_folder(tmp_path, capsys):
    folder = train(blpo, tmp_path / "runs", *PENDULUM)
    capsys.readouterr()
    blpo.main(["--evaluate", str(folder), "--eval-episodes", "1"])
    expected = capsys.readouterr().out
    alone = (folder / "model.pt").rename(tmp_path / "sent by mail.pt")
    blpo.main(["--evaluate", str(alone), "--eval-episodes", "1"])
    assert capsys.readouterr().out == expected
    assert "use that script" in refused(ppo, capsys, "--evaluate", alone)


def test_a_run_on_the_gpu_is_evaluated_without_one(tmp_path, capsys):
    """The policy acts in NumPy."""
    folder = train(ppo, tmp_path, *PENDULUM)
    saved = torch.load(folder / "model.pt", weights_only=True)
    saved["config"]["flags"]["cuda"] = True
    torch.save(saved, tmp_path / "model.pt")
    ppo.main(["--evaluate", str(tmp_path / "model.pt"), "--eval-episodes", "1"])
    assert "evaluation, 1 deterministic" in capsys.readouterr().out


def test_a_logged_run_is_evaluated_without_the_packages(tmp_path, capsys, monkeypatch):
    """Evaluations log nothing."""
    folder = train(ppo, tmp_path, *PENDULUM)
    saved = torch.load(folder / "model.pt", weights_only=True)
    saved["config"]["flags"] |= {"tensorboard": True, "track": True}
    torch.save(saved, tmp_path / "model.pt")
    monkeypatch.setattr(flags.importlib.util, "find_spec", lambda name: None)
    ppo.main(["--evaluate", str(tmp_path / "model.pt"), "--eval-episodes", "1"])
    assert "evaluation, 1 deterministic" in capsys.readouterr().out


def test_a_run_goes_on_on_the_kind_of_device_that_it_began_on(tmp_path, capsys, monkeypatch):
    """The states of its generators fit no other."""
    folder = train(ppo, tmp_path, *PENDULUM)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "--cuda cannot change on the way" in refused(ppo, capsys, "--resume", folder, "--cuda")
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    saved["config"]["flags"]["cuda"] = True
    torch.save(saved, folder / "checkpoint.pt")
    (folder / "config.json").write_text(json.dumps(saved["config"]))
    assert "--cuda cannot change on the way" in refused(ppo, capsys, "--resume", folder, "--no-cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for more in ([], ["--no-cuda"]):
        err = refused(ppo, capsys, "--resume", folder, *more)
        assert "the run began with --cuda" in err and "torch finds none here" in err


# Wishes


def test_environments_get_their_arguments(tmp_path, capsys):
    options = '{"length": 4, "name": "a b"}'
    folder = train(ppo, tmp_path, *probe("Options", "--env-kwargs", options))
    assert {row["length"] for row in rows(folder / "episodes.csv")} == {4}
    assert rows(folder / "evaluation.csv")[0]["length"] == 4
    capsys.readouterr()
    ppo.main(["--evaluate", str(folder), "--eval-episodes", "1"])
    assert "length 4 " in capsys.readouterr().out
    ppo.main(["--resume", str(folder)])
    capsys.readouterr()
    for bad in ("{", "[1]", "3", '"length"', "{'length': 4}"):
        err = refused(ppo, capsys, *probe("Options", "--env-kwargs", bad))
        assert "--env-kwargs must be a JSON object" in err
    for key in ("id", "disable_env_checker"):
        assert "--env-kwargs" in refused(
            ppo, capsys, *probe("Options", "--env-kwargs", json.dumps({key: "x"}))
        )
    err = refused(ppo, capsys, *probe("Options", "--env-kwargs", '{"width": 3}'))
    assert "TypeError" in err and "width" in err


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--total-timesteps", "1e6"], {"total_timesteps": 1_000_000}),
        (["--total-timesteps=2.5E5"], {"total_timesteps": 250_000}),
        (["--total-timesteps", "1_000_000"], {"total_timesteps": 1_000_000}),
        (["--total_timesteps", "1e+5"], {"total_timesteps": 100_000}),
        (["--norm-adv=False", "--anneal-lr=true"], {"norm_adv": False, "anneal_lr": True}),
        (["--norm_adv=false", "--track=False"], {"norm_adv": False, "track": False}),
        (["--no-norm-adv", "--norm-obs=TRUE"], {"norm_adv": False, "norm_obs": True}),
        (["--actor-lr", "1e-4", "--exp-name", "1e3"], {"actor_lr": 1e-4, "exp_name": "1e3"}),
        (["--norm-adv", "False", "--anneal-lr", "true"], {"norm_adv": False, "anneal_lr": True}),
    ],
)
@pytest.mark.parametrize("script", SCRIPTS + DISCRETE)
def test_numbers_and_booleans_as_people_write_them(script, words, expected):
    args = parse_args(script.Args, "", words)
    check_ranges(args)
    assert {name: getattr(args, name) for name in expected} == expected


@pytest.mark.parametrize(
    "words",
    [["--total-timesteps", "1.5"], ["--num-envs", "1e-1"], ["--norm-adv=maybe"], ["--num-envs", "1_e3"]],
)
def test_other_numbers_and_booleans_are_refused(words, capsys):
    assert words[0].split("=")[0] in refused(blpo, capsys, *words)


def test_an_empty_folder_is_not_no_folder(capsys):
    """`--resume "$RUN"` with RUN unset does not begin another run."""
    for flag in ("--resume", "--evaluate"):
        assert f"{flag} must name the folder of a run" in refused(ppo, capsys, flag, "")


def test_a_refused_resume_changes_nothing(tmp_path, capsys, monkeypatch):
    folder = train(ppo, tmp_path, *PENDULUM)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for more in (["--total-timesteps", "1280", "--cuda"], ["--total-timesteps", "32"]):
        refused(ppo, capsys, "--resume", folder, *more)
        refused(ppo, capsys, "--resume", folder / "checkpoint.previous.pt", *more)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    config = json.loads(before["config.json"])
    for name, value in (("seed", "x"), ("gamma", "0.9"), ("anneal_lr", "no"), ("total_timesteps", 640.5)):
        wrong = config | {"flags": config["flags"] | {name: value}}
        (folder / "config.json").write_text(json.dumps(wrong))
        assert "--" in refused(ppo, capsys, "--resume", folder)
    for text in ("", "[]", '{"flags": 3}'):
        (folder / "config.json").write_text(text)
        assert "config.json is damaged" in refused(ppo, capsys, "--resume", folder)


def bytes_of(folder):
    """All files, holes at their ends apart."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder): path.read_bytes().rstrip(b"\0") for path in paths}


def test_a_resume_that_training_refuses_changes_nothing(tmp_path, capsys, monkeypatch):
    """Also where it is the environment, the replay memory or a part that is not as it was."""
    few = ["--outer-steps", 20, "--learning-starts", 50, "--batch-size", 8, "--hidden-size", 8]
    few += ["--env-id", "Pendulum-v1", "--total-timesteps", 200, "--checkpoint-every", 3]
    folder = train(sobirl, tmp_path, *few, "--method", "sac", "--keep-replay", "--eval-episodes", 1)
    with open(folder / "progress.csv", "a") as file:
        file.write("7,7")  # no checkpoint counts on it
    monkeypatch.setattr(run_folder.Run, "begin_broadcast", lambda run: (run.folder / "wandb").touch())

    def refusals(expected):
        before = bytes_of(folder)
        for place in (folder, folder / "checkpoint.previous.pt"):
            more = ["--total-timesteps", 400, "--track"]
            assert expected in refused(sobirl, capsys, "--resume", place, *more)
            assert bytes_of(folder) == before

    with monkeypatch.context() as patch:
        patch.setattr(environments, "make_env", lambda args: 1 / 0)
        refusals("cannot be made")
    with monkeypatch.context() as patch:
        patch.setattr(sobirl, "generators", lambda args: {"another": torch.default_generator})
        refusals("does not fit")
    whole = (folder / "replay.bin").read_bytes()
    (folder / "replay.bin").write_bytes(whole[:1000])
    refusals("replay.bin is gone or damaged")
    (folder / "replay.bin").write_bytes(whole)
    sobirl.main(["--resume", str(folder), "--total-timesteps", "400"])
    assert [row["global_step"] for row in rows(folder / "progress.csv")] == list(range(20, 401, 20))


def test_a_finished_run_can_go_on(tmp_path, capsys):
    """To twice its length, with the schedule of the longer one from there on; and again after a kill."""
    flags_ = [*TINY, "--env-id", "Hopper-v4", "--checkpoint-every", 3]
    folder = train(ppo, tmp_path, *flags_, "--total-timesteps", 640)
    first = rows(folder / "progress.csv")
    old_evaluation = (folder / "evaluation.csv").read_text()
    weights = torch.load(folder / "model.pt", weights_only=True)["actor"]["net.0.weight"]
    capsys.readouterr()
    assert "may only grow" in refused(ppo, capsys, "--resume", folder, "--total-timesteps", 320)
    ppo.main(["--resume", str(folder), "--total-timesteps", "1280"])
    err = capsys.readouterr().err
    assert err.count("now ends at 1,280 steps, not at 640") == 1
    second = rows(folder / "progress.csv")
    assert [row["global_step"] for row in second] == [64 * (i + 1) for i in range(20)] and second[
        :10
    ] == first
    assert json.loads((folder / "config.json").read_text())["flags"]["total_timesteps"] == 1280
    assert (folder / "evaluation.640.csv").read_text() == old_evaluation and (
        folder / "evaluation.csv"
    ).exists()
    assert not torch.equal(
        weights, torch.load(folder / "model.pt", weights_only=True)["actor"]["net.0.weight"]
    )
    assert second[10]["approx_kl"] > 0  # step sizes are not 0 any more
    ppo.main(["--resume", str(folder)])  # finished again
    ppo.main(["--evaluate", str(folder), "--eval-episodes", "1"])
    capsys.readouterr()

    killed = train(ppo, tmp_path / "killed", *flags_, "--total-timesteps", 640)
    checkpoint = (killed / "checkpoint.pt").read_bytes()
    ppo.main(["--resume", str(killed), "--total-timesteps", "1280"])
    expected = rows(killed / "progress.csv")
    (killed / "checkpoint.pt").write_bytes(checkpoint)  # as if it had been killed before it wrote another one
    ppo.main(["--resume", str(killed)])
    times = ("sps", "wall_seconds")
    for before, after in zip(expected, rows(killed / "progress.csv"), strict=True):
        assert {k: v for k, v in before.items() if "seconds" not in k and k not in times} == {
            k: v for k, v in after.items() if "seconds" not in k and k not in times
        }


@pytest.mark.parametrize("longer, older", [(True, False), (False, True), (True, True)])
def test_what_an_end_has_left_goes_when_a_run_goes_on(longer, older, tmp_path, monkeypatch, capsys):
    """Made longer, or from the checkpoint before, and is stopped before it ends again: it is not finished,
    and evaluated from its last checkpoint."""
    given = [*TINY, "--env-id", "Pendulum-v1", "--checkpoint-every", 3, "--total-timesteps", 640]
    folder = train(ppo, tmp_path, *given)
    model = (folder / "model.pt").read_bytes()
    evaluated = (folder / "evaluation.csv").read_bytes()
    more = [str(folder / "checkpoint.previous.pt") if older else str(folder)]
    more += ["--total-timesteps", "1280"] if longer else []

    def stop(*_):
        raise run_folder.Stop("enough")

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(run_folder.Run, "log_means", stop)
        ppo.main(["--resume", *more])
    assert not (folder / "evaluation.csv").exists() and not (folder / "model.pt").exists()
    if longer:
        assert (folder / "model.640.pt").read_bytes() == model
        assert (folder / "evaluation.640.csv").read_bytes() == evaluated
    ppo.main(["--evaluate", str(folder), "--eval-episodes", "1"])
    ppo.main(["--resume", str(folder)])
    assert ((folder / "evaluation.csv").read_bytes() == evaluated) == (not longer)


def test_the_command_that_goes_on_is_one(tmp_path, monkeypatch, capsys):
    """Also of a folder whose name begins like a flag; it is not advised where a flag is wrong."""
    monkeypatch.chdir(tmp_path)
    given = [*map(str, TINY), "--env-id", "Pendulum-v1", "--total-timesteps", "640", "--runs-dir=-x"]
    for status, times in ((1, 1), (2, 0)):
        with monkeypatch.context() as patch, pytest.raises(SystemExit):

            def stop(*_):
                raise run_folder.Stop("enough", status=status)

            patch.setattr(run_folder.Run, "log_means", stop)
            ppo.main(given)
        assert capsys.readouterr().err.count(" --resume ./-x/Pendulum") == times


@pytest.mark.parametrize("script", SCRIPTS)
def test_boxes_of_any_size_are_learned_alike(script, tmp_path):
    """A box of +-2,000 with its best action at 1,000, and the same task in +-1: the same numbers."""
    learn = ["--num-envs", 8, "--num-steps", 16, "--num-minibatches", 2, "--update-epochs", 4]
    learn += ["--no-norm-obs", "--no-norm-reward", "--actor-lr", 1e-2, "--critic-lr", 3e-3]
    learn += ["--total-timesteps", 5_000, "--eval-episodes", 1]

    def play(name, *more):
        return train(script, tmp_path / name, *learn, "--env-id", f"{PROBES}{name}-v0", *more)

    wide, unit = play("Wide"), play("Unit")
    found = [rows(folder / "episodes.csv") for folder in (wide, unit)]
    late = [np.mean([row["return"] for row in table[-200:]]) for table in found]
    assert late[0] == pytest.approx(late[1], abs=0.02) and rows(wide / "evaluation.csv")[0]["return"] > 0.95
    lost = play("Wide", "--rescale-actions", "off")
    assert rows(lost / "evaluation.csv")[0]["return"] < 0.9  # it acts between -3 and 3


def test_boxes_of_the_size_of_one_stay():
    """MuJoCo's and Pendulum's numbers are those of the published tables."""
    box = environments.gym.spaces.Box
    ones = np.ones(2, np.float32)
    for half in (1, 0.4, 2, 3):
        assert not environments.rescales("auto", box(-half * ones, half * ones))
        assert environments.rescales("on", box(-half * ones, half * ones))
    assert environments.rescales("auto", box(-2000 * ones, 2000 * ones))
    assert environments.rescales("auto", box(-1e-3 * ones, 1e-3 * ones))
    assert environments.rescales("auto", box(5 * ones, 6 * ones))
    for wish in ("auto", "on"):
        assert not environments.rescales(wish, box(-np.inf, np.inf, (2,)))
        assert not environments.rescales(wish, environments.gym.spaces.Discrete(3))
    assert not environments.rescales("off", box(-2000 * ones, 2000 * ones))


@pytest.mark.parametrize(
    "script, env_id, kind",
    [
        (ppo, f"{PROBES}Unbounded-v0", environments.gym.spaces.Box),
        (ppo_discrete, "CartPole-v1", environments.gym.spaces.Discrete),
    ],
)
def test_what_cannot_be_rescaled_is_not_asked_for_in_vain(script, env_id, kind, tmp_path, capsys):
    ask = [*TINY, "--env-id", env_id, "--total-timesteps", 64, "--runs-dir", tmp_path, "--rescale-actions"]
    err = refused(script, capsys, *ask, "on")
    assert "--rescale-actions must be auto or off" in err and env_id in err
    for wish in ("auto", "off"):
        envs = environments.Environments(script.Args(env_id=env_id, rescale_actions=wish), kind)
        assert isinstance(envs.action_space, kind)


def test_tensorboard(tmp_path, capsys, monkeypatch):
    """Against a stand-in of the writer, whose package is not among the requirements; without it one line."""
    written = []

    class SummaryWriter:
        def __init__(self, folder, purge_step=None):
            written.append((Path(folder), purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def close(self):
            written.append("closed")

    monkeypatch.setattr(flags.importlib.util, "find_spec", lambda name: None)
    assert "pip install tensorboard" in refused(ppo, capsys, *PENDULUM, "--tensorboard")
    monkeypatch.setattr(flags.importlib.util, "find_spec", lambda name: name)
    module = type(sys)("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    folder = train(ppo, tmp_path, *PENDULUM, "--tensorboard")
    table = rows(folder / "progress.csv")
    scalars = [entry for entry in written if len(entry) == 3]
    assert written[0] == (folder, None) and written[-1] == "closed"
    assert len(scalars) == len(table) * len(table[0])
    assert ("policy_loss", table[-1]["policy_loss"], 640) in scalars
    written.clear()
    ppo.main(["--resume", str(folder), "--total-timesteps", "1280"])
    assert written[0] == (folder, 641) and written[1][2] == 704


def test_lock_file_is_the_only_new_file(tmp_path):
    folder = train(ppo, tmp_path, *PENDULUM)
    names = {"checkpoint.pt", "checkpoint.previous.pt", "config.json", "episodes.csv", "evaluation.csv"}
    assert {path.name for path in folder.iterdir()} == names | {"model.pt", "progress.csv", run_folder.LOCK}
