"""What every training script here does beside training: command line, run folder, checkpoints, interruptions.

A run folder is worth more than the process that writes it. Rows are on disk as soon as they are measured; other files appear
whole or not at all; a checkpoint holds all that the rest of the run depends on, the environments in the middle of their
episodes included, so that a run that was killed and resumed writes the same bytes as one that was not. There is no learning
in this file: blpo_continuous.py and ppo_continuous.py read without it.
"""

import contextlib
import difflib
import fcntl
import importlib
import importlib.metadata
import inspect
import io
import itertools
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from tqdm import tqdm

CHECKPOINT, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"


# The command line: whatever is wrong is said in one line that names the flag and the fix, exit status 2


def say(message: str, error: bool = False) -> None:
    """Prints a line; a terminal, pipe or log file that is gone does not end a run."""
    stream = sys.stderr if error else sys.stdout
    try:
        print(message, file=stream, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # what is still buffered must go somewhere


def fail(message: str, status: int = 2):
    say(f"error: {' '.join(message.split())}", error=True)
    raise SystemExit(status)


def parse_args(Args, description: str, argv: list[str] | None = None):
    """The command line as Args; tyro's boxed complaints become one line."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(Args, args=argv, description=description)
    except SystemExit as stop:
        if stop.code:
            _title, *body = [line.strip("│╭╮╰╯─ ") for line in complaint.getvalue().splitlines()]
            fail(" ".join(itertools.takewhile(bool, body)) + " (--help lists all flags)")
        raise


def given_flags(args, argv: list[str] | None) -> set[str]:
    """The fields of args that the command line names."""
    words = {word.split("=")[0][2:].replace("-", "_") for word in (sys.argv[1:] if argv is None else argv) if word.startswith("--")}
    return {name for name in asdict(args) if {name, f"no_{name}"} & words}


def require(args, must: str, ok, *flags: str) -> None:
    """Every one of the flags must satisfy ok; must says what that means."""
    for flag in flags:
        if not ok(getattr(args, flag)):
            fail(f"--{flag.replace('_', '-')} must {must}, got {getattr(args, flag)!r}")


def check_places(env_id: str, runs_dir: str) -> None:
    """The environment is registered, the folder of runs can be written."""
    module, _, name = env_id.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
        gym.spec(name)
    except Exception as problem:  # a foreign module may raise anything
        close = difflib.get_close_matches(name, gym.registry, n=3)
        fail(f"--env-id {env_id}: {problem}" + f" Close: {', '.join(close)}." * bool(close))
    if name == "Pusher-v4":
        fail("--env-id Pusher-v4 does not work with mujoco >= 3: use Pusher-v5")
    check_runs_dir(runs_dir)


def check_runs_dir(runs_dir: str) -> None:
    try:
        os.makedirs(runs_dir, exist_ok=True)
        tempfile.TemporaryDirectory(dir=runs_dir).cleanup()
    except OSError as problem:
        fail(f"--runs-dir {runs_dir} is not writable ({problem.strerror}): name another folder")


# The state of an environment


def wrappers(env: gym.Env) -> list[gym.Env]:
    """Outermost first, the environment itself last."""
    return [env] if env is env.unwrapped else [env, *wrappers(env.env)]


def pack(value):
    """NumPy's values as tensors, which torch.load reads without running foreign code; None for what is not plain data."""
    if isinstance(value, tuple):
        return tuple(map(pack, value))
    if isinstance(value, (np.ndarray, np.generic)):
        return torch.from_numpy(np.array(value))
    return value if isinstance(value, (bool, int, float, str)) else None


def unpack(value):
    if isinstance(value, tuple):
        return tuple(map(unpack, value))
    return value.numpy()[()] if isinstance(value, torch.Tensor) else value


def env_state(env: gym.Env) -> dict | None:
    """All that a MuJoCo or classic-control environment of Gymnasium remembers: plain attributes of its own and of its
    wrappers, its random generator, MuJoCo's arrays. None for others, or with other wrappers, which may remember more."""
    known = (gym.wrappers.TimeLimit, gym.wrappers.OrderEnforcing, gym.wrappers.FlattenObservation)
    *around, core = wrappers(env)
    ours = type(core).__module__.startswith(("gymnasium.envs.mujoco.", "gymnasium.envs.classic_control."))
    if not (ours and all(type(layer) in known for layer in around)):
        return None
    layers = [{k: pack(v) for k, v in vars(layer).items()} for layer in wrappers(env)]
    state = {"random": core.np_random.bit_generator.state}
    state["layers"] = [{k: v for k, v in layer.items() if v is not None} for layer in layers]
    if data := getattr(core, "data", None):
        state["arrays"] = {name: pack(a) for name in dir(data) if isinstance(a := getattr(data, name), np.ndarray)}
        state["time"] = data.time
    return state


def restore_env(env: gym.Env, state: dict) -> None:
    """Puts env, which has been reset, into a state that env_state returned."""
    core = env.unwrapped
    core.np_random.bit_generator.state = state["random"]
    for layer, values in zip(wrappers(env), state["layers"]):
        vars(layer).update({k: unpack(v) for k, v in values.items()})
    if "arrays" in state:
        core.data.time = state["time"]
        for name, value in state["arrays"].items():
            if (array := getattr(core.data, name)).shape == value.shape:  # those of contacts vary; every step recomputes them
                array[...] = value.numpy()


# The run folder


class Stopwatch:
    """Adds the time since its last call to the phase named."""

    def __init__(self):
        self.seconds, self.last = defaultdict(float), time.perf_counter()

    def __call__(self, phase: str):
        now = time.perf_counter()
        self.seconds[phase] += now - self.last
        self.last = now


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("torch", "gymnasium", "mujoco", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def script_of(args) -> Path:
    """The file that defines the class of args: the training script."""
    return Path(inspect.getfile(type(args)))


def git_commit(args) -> str:
    with contextlib.suppress(OSError):  # no git here
        git = ["git", "-C", script_of(args).resolve().parent, "rev-parse", "HEAD"]
        return subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return ""


def lock(folder: Path) -> int:
    """A file descriptor that keeps other processes from writing the run, until it is closed or its process ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        fail(f"--resume {folder}: another process is writing this run: wait for it or stop it")
    return descriptor


class Run:
    """The run folder of args, a new one or, with a checkpoint, the one to go on with (args.resume); one process writes it.
    `subject` (the environment) begins its name, `total` is where the first column of progress.csv ends, `headers` are those
    of the csv files that write() fills."""

    def __init__(self, args, subject: str, total: int, checkpoint: dict | None = None, unit="step", headers: dict[str, str] | None = None):
        self.total, self.unit, self.wandb, self.last_line, self.signal = total, unit, None, 0.0, None
        self.files, self.lines, self.handlers, self.bar = {}, {}, {}, None
        self.script = os.path.relpath(script_of(args))
        if checkpoint:
            self.folder, self.config, self.lock = Path(args.resume), checkpoint["config"], checkpoint["lock"]
        else:
            stem = re.sub(r"[^\w.-]+", "-", f"{subject}__{args.exp_name}__{args.seed}", flags=re.ASCII)
            for born in itertools.count(int(time.time())):  # the next free second: runs may start at the same time
                with contextlib.suppress(FileExistsError):
                    (folder := Path(args.runs_dir) / f"{stem}__{born}").mkdir()
                    break
            self.folder, self.lock = folder, lock(folder)
            self.config = {"script": script_of(args).name, "flags": asdict(args)}
            self.config["versions"] = versions() | {"git_commit": git_commit(args)}
            self.save("config.json", json.dumps(self.config, indent=2) + "\n")
        with self.storing():
            for name in (*(headers or {}), "progress.csv"):
                self.files[name] = open(self.folder / name, "a", buffering=1)  # flushed at every line
                self.lines[name] = checkpoint["lines"][name] if checkpoint else 0
                lines = (self.folder / name).read_bytes().splitlines(keepends=True)[: self.lines[name]]
                self.files[name].truncate(sum(map(len, lines)))  # forgets rows after the checkpoint: they are measured again
        if not checkpoint:
            for name, header in (headers or {}).items():
                self.write(name, header)
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not in the main thread
                self.handlers[number] = signal.signal(number, self.on_signal)
        self.bar = tqdm(total=total, unit=unit, file=sys.stdout) if sys.stdout.isatty() else None
        if args.track:
            with self.broadcast():
                import wandb

                name = self.folder.name
                self.wandb = wandb.init(name=name, id=name, resume="allow", config=self.config, dir=self.folder)

    def on_signal(self, number, _frame):
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
        self.signal = number
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopping after this iteration; once more to stop at once\n")

    @contextlib.contextmanager
    def storing(self):
        try:
            yield
        except OSError as problem:  # disk full, folder deleted, ...
            self.stop(f"error: cannot write to {self.folder}: {problem.strerror}")

    @contextlib.contextmanager
    def broadcast(self):
        """Training is worth more than its broadcast: whatever wandb raises, say so and go on without it."""
        try:
            yield
        except Exception as problem:
            say(f"wandb is off: {problem}", error=True)
            self.wandb = None

    def write(self, name: str, line: str):
        with self.storing():
            self.files[name].write(line + "\n")
        self.lines[name] += 1

    def log(self, row: dict, shown: str):
        """A row of progress.csv, of wandb and, as `shown`, of the terminal; its first column says how far the run is."""
        with self.storing():
            os.stat(self.folder / "progress.csv")  # the open file would not notice that the folder was deleted
        if not self.lines["progress.csv"]:
            self.write("progress.csv", ",".join(row))
        self.write("progress.csv", ",".join(map(str, row.values())))
        if self.wandb:
            with self.broadcast():
                self.wandb.log(row, step=next(iter(row.values())))
        step = next(iter(row.values()))
        if self.bar is not None:
            with contextlib.suppress(OSError):  # the terminal is gone
                self.bar.set_postfix_str(shown, refresh=False)
                self.bar.update(step - self.bar.n)
        elif time.time() - self.last_line > 5:
            self.last_line = time.time()
            say(f"{self.unit} {step:>{len(f'{self.total:,}')},} of {self.total:,}  {shown}")

    def save(self, name: str, content: str | dict):
        """Writes a file under a temporary name first, so that name is whole at any moment, whatever happens."""
        data = io.BytesIO(content.encode() if isinstance(content, str) else b"")
        if isinstance(content, dict):
            torch.save(content, data)
        path, temporary = self.folder / name, self.folder / f"{name}.tmp"
        with self.storing(), contextlib.ExitStack() as cleanup:
            cleanup.callback(temporary.unlink, missing_ok=True)
            with open(temporary, "wb") as file:
                file.write(data.getvalue())
                file.flush()
                os.fsync(file.fileno())
            if name == CHECKPOINT and path.exists():
                os.replace(path, self.folder / PREVIOUS)
            os.replace(temporary, path)

    def checkpoint(self, state: dict):
        """Saves state, and how many lines of the csv files, which are brought to disk first, belong to it."""
        with self.storing():
            for file in self.files.values():
                os.fsync(file.fileno())
        self.save(CHECKPOINT, state | {"config": self.config, "lines": self.lines})

    def check_finite(self, step: int, *arrays):  # each (N, ...)
        if not all(np.isfinite(array).all() for array in arrays):
            bad = np.argmin(np.isfinite(np.concatenate(arrays, axis=1)).all(1))
            what = f"{self.config['flags']['env_id']} returned a non-finite observation or reward (environment {bad}, step {step})"
            self.stop(f"error: {what}; what was measured until then is in {self.folder}")

    def environment_failed(self, step: int, problem: Exception):
        with self.storing():
            (self.folder / "error.txt").write_text(traceback.format_exc())
        what = f"{self.config['flags']['env_id']} failed at step {step}: {type(problem).__name__}: {problem}"
        self.stop(f"error: {what} (traceback in {self.folder / 'error.txt'})")

    def stop(self, message: str, status: int = 1):
        """Ends the process with one line, which says how to go on."""
        self.close()
        if (self.folder / CHECKPOINT).exists():
            message += f"; go on from the last checkpoint: python {shlex.join([self.script, '--resume', str(self.folder)])}"
        say(" ".join(message.split()), error=True)
        raise SystemExit(status)

    def release_signals(self):
        """From here on a signal ends the process."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def close(self):
        self.release_signals()
        for file in self.files.values():
            with contextlib.suppress(OSError):  # of a full disk, which has been reported
                file.close()
        if self.bar is not None:
            with contextlib.suppress(OSError):
                self.bar.close()
        if self.wandb:
            with self.broadcast():
                self.wandb.finish()
        with contextlib.suppress(OSError):  # closed before
            os.close(self.lock)


# Going on with a run


def load(flag: str, args, *names: str) -> tuple[dict, Path]:
    """What a run of args's script saved in the folder that flag names, under the first of names that is there, or in a file
    that flag names, and the path. Damaged or foreign files are refused, and never executed. "args" are the run's flags."""
    place = Path(getattr(args, flag.lstrip("-")))
    path = place if os.path.isfile(place) else next((place / name for name in names if os.path.exists(place / name)), place / names[0])
    folder, older = path.parent, path.with_name(PREVIOUS)
    hint = f"; the one before it: {flag} {shlex.quote(str(older))}" if path.name == CHECKPOINT and os.path.exists(older) else ""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        config, own = json.loads((folder / "config.json").read_text()), saved["config"]
        script, flags, then = own["script"], own["flags"], own["versions"]
        if flag == "--resume":
            for name in ("progress.csv", "episodes.csv"):
                if (folder / name).read_bytes().count(b"\n") < saved["lines"][name]:
                    fail(f"{flag} {folder}: {name} has lost rows that {path.name} counts on{hint or ': start a new run'}")
    except FileNotFoundError as missing:
        fail(f"{flag} {folder} has no {Path(missing.filename).name}: name the folder of a run")
    except Exception as problem:  # a torn zip file, other contents, an unreadable disk, ...
        fail(f"{flag} {folder}: {path.name} is damaged or no checkpoint ({str(problem)[:60]}){hint}")
    if script != script_of(args).name:
        fail(f"{flag} {folder} is a run of {script}: use that script")
    if config != own:
        fail(f"{flag} {folder}: {path.name} is of another run ({flags.get('env_id')}, seed {flags.get('seed')}){hint}")
    try:
        saved["args"] = type(args)(**flags)
    except TypeError:
        fail(f"{flag} {folder} was begun by a version with other flags: check out commit {then.get('git_commit')}")
    now = versions() | {"git_commit": git_commit(args)}
    if changed := [f"{name} {then.get(name)} (now {now[name]})" for name in now if now[name] != then.get(name)]:
        say(f"note: {folder} was begun with {', '.join(changed)}; results may differ", error=True)
    return saved, path


def misfit(flag: str, path: Path, problem: Exception):
    """What load returned is not what this version of the script, or of the environment, saves."""
    fail(f"{flag} {path} does not fit the networks or the environment of this version ({type(problem).__name__}: {str(problem)[:60]})")


def own_flags(args, argv: list[str] | None, saved: dict, free: set[str], why: str) -> dict:
    """The flags of the saved run, with those of `free` that the command line names; it may not name others that differ."""
    own, given = asdict(saved["args"]), given_flags(args, argv)
    for name in sorted(given - free):
        if getattr(args, name) != own[name]:
            fail(f"--{name.replace('_', '-')} {why}: drop it")
    return own | {name: getattr(args, name) for name in given & free}


def resumed(args, argv: list[str] | None):
    """The flags and the checkpoint of the run to go on with: --resume is its folder, or one of its checkpoints."""
    folder = Path(args.resume if os.path.isdir(args.resume) else os.path.dirname(args.resume))
    if not os.path.exists(folder / "config.json"):
        fail(f"--resume {args.resume} is not the folder of a run")
    descriptor = lock(folder)  # before the checkpoint is read: whoever writes the run may be about to write another
    try:
        checkpoint, path = load("--resume", args, CHECKPOINT, PREVIOUS)
        why = "cannot change on the way, --resume goes on with the flags of the run"
        own = own_flags(args, argv, checkpoint, {"resume", "cuda", "track"}, why)
        if path.name != CHECKPOINT:  # the newer one counts on rows that will now be written again
            os.replace(path, folder / CHECKPOINT)
    except BaseException:
        os.close(descriptor)
        raise
    args = type(args)(**own | {"resume": str(folder), "runs_dir": str(folder.parent)})
    return args, checkpoint | {"lock": descriptor}


def evaluated(args, argv: list[str] | None):
    """The flags to evaluate with, the path and the contents of the model, or of the last checkpoint, of --evaluate."""
    saved, path = load("--evaluate", args, "model.pt", CHECKPOINT, PREVIOUS)
    here = {"evaluate", "eval_episodes", "eval_stochastic", "capture_video"}  # never the run's, given or not
    own = own_flags(args, argv, saved, here | {"seed"}, "has no part in --evaluate, which takes it from the run")
    return type(args)(**own | {name: getattr(args, name) for name in here}), path, saved
