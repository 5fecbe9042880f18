"""The run folder: what a run measures, what it needs to go on, and how it ends.

A run folder is worth more than the process that writes it. Rows are on disk as soon as they are measured;
other files appear whole or not at all; a checkpoint holds all that the rest of the run depends on, the
environments in the middle of their episodes included, so that a run that was killed and resumed writes the
same bytes as one that was not.
"""

import contextlib
import fcntl
import importlib.metadata
import io
import itertools
import json
import math
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

import numpy as np
import torch
from tqdm import tqdm

from support.flags import fail, given_flags, say, script_of

CHECKPOINT = "checkpoint.pt"
PREVIOUS = "checkpoint.previous.pt"
MODEL = "model.pt"


class Stop(Exception):
    """Ends a run with one line. What it measured is on disk, and --resume goes on from its last
    checkpoint."""

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status = status


class EnvironmentFailed(Stop):
    """A foreign environment raised; raise it `from` the problem, whose traceback goes into error.txt."""

    def __init__(self, env_id: str, step: int):
        super().__init__(f"{env_id} failed at step {step}")


def finite(x, complaint: str):
    """x, if all of it is finite; otherwise the run ends with the complaint."""
    if not np.isfinite(x).all():
        raise Stop(complaint)
    return x


class Stopwatch:
    """Adds the time since its last call to the phase that is named."""

    def __init__(self):
        self.restart()

    def restart(self):
        self.seconds = defaultdict(float)
        self.last = time.perf_counter()

    def __call__(self, phase: str):
        now = time.perf_counter()
        self.seconds[phase] += now - self.last
        self.last = now


class Metrics(defaultdict):
    """Lists of numbers by name, of which progress.csv gets the means."""

    def __init__(self):
        super().__init__(list)

    def add(self, **values):
        for name, value in values.items():
            self[name].append(float(value.detach() if isinstance(value, torch.Tensor) else value))

    def means(self) -> dict[str, float]:
        """The mean of the finite numbers under each name, NaN where there are none."""
        finite_ones = {name: [x for x in values if math.isfinite(x)] for name, values in self.items()}
        return {name: float(np.mean(values)) if values else math.nan for name, values in finite_ones.items()}


def state_of(part):
    return part.get_state() if isinstance(part, torch.Generator) else part.state_dict()


def restore(part, state) -> None:
    if isinstance(part, torch.Generator):
        part.set_state(state)
    else:
        part.load_state_dict(state)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("torch", "gymnasium", "mujoco", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def git_commit(args) -> str:
    with contextlib.suppress(OSError):  # no git here
        git = ["git", "-C", script_of(args).resolve().parent, "rev-parse", "HEAD"]
        return subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return ""


def check_runs_dir(runs_dir: str) -> None:
    """Refuses a folder that cannot be made or written."""
    try:
        os.makedirs(runs_dir, exist_ok=True)
        tempfile.TemporaryDirectory(dir=runs_dir).cleanup()
    except OSError as problem:
        fail(f"--runs-dir {runs_dir} is not writable ({problem.strerror}): name another folder")


def lock(folder: Path) -> int:
    """A file descriptor that keeps other processes from writing the run, until it is closed or its process
    ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        fail(f"--resume {folder}: another process is writing this run: wait for it or stop it")
    return descriptor


class Run:
    """The run folder of args, a new one or, with a checkpoint, the one that args.resume names; one process
    writes it.

        with Run(args, iterations, parts, checkpoint) as run:
            for iteration in run.iterations():
                ...
                run.log_means(step, known, metrics)

    `parts` maps names to everything that the iterations to come depend on: each part has a state_dict() and a
    load_state_dict(), or is a torch.Generator. Without parts there are no checkpoints. The block ends with
    one line where it raises Stop, and after SIGINT or SIGTERM at the end of the iteration, with a checkpoint.
    """

    def __init__(self, args, count: int, parts: dict | None = None, checkpoint: dict | None = None):
        self.args = args
        self.count = count
        self.parts = parts or {}
        self.restored = checkpoint
        self.lap = Stopwatch()
        self.seconds = defaultdict(float)  # by phase, over all iterations
        self.earlier = 0.0  # seconds before this process
        self.start = time.perf_counter()
        self.step = 0  # as in the last row of progress.csv
        self.signal = None
        self.files = {}
        self.lines = {}
        self.handlers = {}
        self.bar = None
        self.wandb = None
        self.last_line = 0.0
        if checkpoint:
            self.folder = Path(args.resume)
            self.lock = checkpoint["lock"]
            self.config = checkpoint["config"]
        else:
            self.folder = self.make_folder()
            self.lock = lock(self.folder)
            self.config = {"script": script_of(args).name, "flags": asdict(args)}
            self.config["versions"] = versions() | {"git_commit": git_commit(args)}
            self.save("config.json", json.dumps(self.config, indent=2) + "\n")
        self.open_table("progress.csv")
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not in the main thread
                self.handlers[number] = signal.signal(number, self.on_signal)
        if sys.stdout.isatty():
            self.bar = tqdm(total=args.total, unit=args.unit, file=sys.stdout)
        if args.track:
            self.begin_broadcast()

    def make_folder(self) -> Path:
        args = self.args
        stem = re.sub(r"[^\w.-]+", "-", f"{args.subject}__{args.exp_name}__{args.seed}", flags=re.ASCII)
        for born in itertools.count(int(time.time())):  # the next free second: runs may start together
            folder = Path(args.runs_dir) / f"{stem}__{born}"
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                return folder

    def __enter__(self):
        return self

    def __exit__(self, kind, problem, _traceback):
        if isinstance(problem, Stop):
            message = f"error: {problem}" if problem.status == 1 else str(problem)
            if cause := problem.__cause__:
                error = self.folder / "error.txt"
                with self.storing():
                    error.write_text("".join(traceback.format_exception(cause)))
                message += f": {type(cause).__name__}: {cause} (traceback in {error})"
            self.stop(message, problem.status)
        self.close()

    # Iterations

    def iterations(self):
        """The numbers of the iterations that are left. After each of them what is due: a checkpoint, or the
        end."""
        first = self.restore() if self.restored else 0
        self.start = time.perf_counter()
        if self.parts and not self.restored:
            self.checkpoint(0)  # from now on a killed run can go on
        every = self.args.checkpoint_every or math.ceil(self.count / 20)
        for iteration in range(first, self.count):
            self.lap.restart()
            yield iteration
            done = iteration + 1
            if self.parts and (self.signal or done % every == 0 or done == self.count):
                self.checkpoint(done)
            if self.signal:
                raise Stop(f"stopped at {self.args.unit} {self.step}", status=128 + self.signal)

    def restore(self) -> int:
        """Puts every part where it was when the checkpoint was written, and returns the next iteration."""
        saved = self.restored
        try:
            self.earlier = saved["wall"]
            self.seconds |= saved["seconds"]
            for name, part in self.parts.items():
                restore(part, saved["parts"][name])
            return saved["iteration"]
        except (KeyError, RuntimeError, ValueError) as problem:
            misfit("--resume", self.args.resume, problem)

    def checkpoint(self, iteration: int) -> None:
        """Saves the parts, and how many lines of the csv files, which are brought to disk first, belong to
        them."""
        with self.storing():
            for file in self.files.values():
                os.fsync(file.fileno())
        state = {"iteration": iteration, "wall": self.wall(), "seconds": dict(self.seconds)}
        state["parts"] = {name: state_of(part) for name, part in self.parts.items()}
        self.save(CHECKPOINT, state | {"config": self.config, "lines": self.lines})

    def wall(self) -> float:
        """Seconds of training so far, those before a resume included."""
        return self.earlier + time.perf_counter() - self.start

    # Rows and files

    def open_table(self, name: str, header: str = "") -> None:
        """Opens a csv file for write(). Rows after the checkpoint are forgotten: they will be measured
        again."""
        path = self.folder / name
        with self.storing():
            self.files[name] = open(path, "a", buffering=1)  # flushed at every line
            self.lines[name] = self.restored["lines"][name] if self.restored else 0
            kept = path.read_bytes().splitlines(keepends=True)[: self.lines[name]]
            self.files[name].truncate(sum(map(len, kept)))
        if header and not self.lines[name]:
            self.write(name, header)

    def write(self, name: str, line: str) -> None:
        with self.storing():
            self.files[name].write(line + "\n")
        self.lines[name] += 1

    def log_means(self, step: int, known: dict, metrics: Metrics, evaluated: dict | None = None) -> None:
        """A row of progress.csv: what is known, the means of the metrics, this iteration's seconds by phase,
        and what an evaluation found."""
        wall = self.wall()
        row = {"global_step": step, "wall_seconds": round(wall, 3), "sps": round(step / wall, 1)}
        row |= known
        row |= metrics.means()
        row |= {f"seconds_{phase}": round(spent, 5) for phase, spent in self.lap.seconds.items()}
        row |= evaluated or {}
        for phase, spent in self.lap.seconds.items():
            self.seconds[phase] += spent
        self.log(row, f"SPS {row['sps']:.0f}  return {row['return_100']:.1f}  KL {row['approx_kl']:.4f}")

    def log(self, row: dict, shown: str) -> None:
        """A row of progress.csv, of wandb and, as `shown`, of the terminal; its first column says how far the
        run is."""
        with self.storing():
            os.stat(self.folder / "progress.csv")  # the open file would not notice that the folder is gone
        if not self.lines["progress.csv"]:
            self.write("progress.csv", ",".join(row))
        self.write("progress.csv", ",".join(map(str, row.values())))
        self.step = next(iter(row.values()))
        if self.wandb:
            with self.broadcast():
                self.wandb.log(row, step=self.step)
        if self.bar is not None:
            with contextlib.suppress(OSError):  # the terminal is gone
                self.bar.set_postfix_str(shown, refresh=False)
                self.bar.update(self.step - self.bar.n)
        elif time.time() - self.last_line > 5:
            self.last_line = time.time()
            total = f"{self.args.total:,}"
            say(f"{self.args.unit} {self.step:>{len(total)},} of {total}  {shown}")

    def save(self, name: str, content: str | dict) -> None:
        """Writes a file under a temporary name first, so that `name` is whole at any moment, whatever
        happens."""
        data = io.BytesIO()
        if isinstance(content, dict):
            torch.save(content, data)
        else:
            data.write(content.encode())
        path = self.folder / name
        temporary = self.folder / f"{name}.tmp"
        with self.storing(), contextlib.ExitStack() as cleanup:
            cleanup.callback(temporary.unlink, missing_ok=True)
            with open(temporary, "wb") as file:
                file.write(data.getvalue())
                file.flush()
                os.fsync(file.fileno())
            if name == CHECKPOINT and path.exists():
                os.replace(path, self.folder / PREVIOUS)
            os.replace(temporary, path)

    @contextlib.contextmanager
    def storing(self):
        try:
            yield
        except OSError as problem:  # disk full, folder deleted, ...
            self.stop(f"error: cannot write to {self.folder}: {problem.strerror}")

    # Weights and Biases

    def begin_broadcast(self) -> None:
        with self.broadcast():
            import wandb

            name = self.folder.name
            self.wandb = wandb.init(name=name, id=name, resume="allow", config=self.config, dir=self.folder)

    @contextlib.contextmanager
    def broadcast(self):
        """Training is worth more than its broadcast: whatever wandb raises, say so and go on without it."""
        try:
            yield
        except Exception as problem:
            say(f"wandb is off: {problem}", error=True)
            self.wandb = None

    # The end

    def on_signal(self, number, _frame) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
        self.signal = number
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopping after this iteration; once more to stop at once\n")

    def release_signals(self) -> None:
        """From here on a signal ends the process."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def stop(self, message: str, status: int = 1):
        """Ends the process with one line, which says how to go on."""
        self.close()
        if (self.folder / CHECKPOINT).exists():
            script = os.path.relpath(script_of(self.args))
            again = shlex.join([script, "--resume", str(self.folder)])
            message += f"; go on from the last checkpoint: python {again}"
        say(" ".join(message.split()), error=True)
        raise SystemExit(status)

    def close(self) -> None:
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


# Going on with a run, or evaluating it


def misfit(flag: str, path, problem: Exception):
    """What load returned is not what this version of the script, or of the environment, saves."""
    reason = f"{type(problem).__name__}: {str(problem)[:60]}"
    fail(f"{flag} {path} does not fit the networks or the environment of this version ({reason})")


def load(flag: str, args, *names: str) -> tuple[dict, Path]:
    """What a run of args's script saved, and its path: in the file that flag names, or in its folder under
    the first of names that is there. "args" are the run's flags. Damaged or foreign files are refused, and
    never executed."""
    place = Path(getattr(args, flag.lstrip("-")))
    there = [place / name for name in names if os.path.exists(place / name)]
    path = place if os.path.isfile(place) else (there or [place / names[0]])[0]
    folder = path.parent
    older = path.with_name(PREVIOUS)
    hint = ""
    if path.name == CHECKPOINT and os.path.exists(older):
        hint = f"; the one before it: {flag} {shlex.quote(str(older))}"
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        config = json.loads((folder / "config.json").read_text())
        own = saved["config"]
        script, flags, then = own["script"], own["flags"], own["versions"]
        if flag == "--resume":
            check_rows(folder, saved["lines"], path.name, hint)
    except FileNotFoundError as missing:
        fail(f"{flag} {folder} has no {Path(missing.filename).name}: name the folder of a run")
    except Exception as problem:  # a torn zip file, other contents, an unreadable disk, ...
        fail(f"{flag} {folder}: {path.name} is damaged or no checkpoint ({str(problem)[:60]}){hint}")
    if script != script_of(args).name:
        fail(f"{flag} {folder} is a run of {script}: use that script")
    if config != own:
        other = f"{flags.get('env_id')}, seed {flags.get('seed')}"
        fail(f"{flag} {folder}: {path.name} is of another run ({other}){hint}")
    checkout = f"check out commit {then.get('git_commit')}"
    if path.name != MODEL and "parts" not in saved:
        fail(f"{flag} {folder} was begun by an older version: {checkout}")
    try:
        saved["args"] = type(args)(**flags)
    except TypeError:
        fail(f"{flag} {folder} was begun by a version with other flags: {checkout}")
    now = versions() | {"git_commit": git_commit(args)}
    changed = [f"{name} {then.get(name)} (now {now[name]})" for name in now if now[name] != then.get(name)]
    if changed:
        say(f"note: {folder} was begun with {', '.join(changed)}; results may differ", error=True)
    return saved, path


def check_rows(folder: Path, lines: dict[str, int], checkpoint: str, hint: str) -> None:
    """Refuses to go on where a csv file has fewer rows than belong to the checkpoint."""
    for name, count in lines.items():
        if (folder / name).read_bytes().count(b"\n") < count:
            what = f"{name} has lost rows that {checkpoint} counts on"
            fail(f"--resume {folder}: {what}{hint or ': start a new run'}")


def own_flags(args, argv: list[str] | None, saved: dict, free: set[str], why: str) -> dict:
    """The flags of the saved run, with those of `free` that the command line names; others it must leave as
    they are."""
    own = asdict(saved["args"])
    given = given_flags(args, argv)
    for name in sorted(given - free):
        if getattr(args, name) != own[name]:
            fail(f"--{name.replace('_', '-')} {why}: drop it")
    return own | {name: getattr(args, name) for name in given & free}


def resumed(args, argv: list[str] | None):
    """The flags and the checkpoint of the run to go on with: --resume is its folder, or one of its
    checkpoints."""
    folder = Path(args.resume if os.path.isdir(args.resume) else os.path.dirname(args.resume))
    if not os.path.exists(folder / "config.json"):
        fail(f"--resume {args.resume} is not the folder of a run")
    descriptor = lock(folder)  # before the checkpoint is read, which another process may be about to replace
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
    """The flags to evaluate with, the path and the contents of the model, or of the last checkpoint, of
    --evaluate."""
    saved, path = load("--evaluate", args, MODEL, CHECKPOINT, PREVIOUS)
    if path.name != MODEL:  # as if the run ended there
        parts = saved["parts"]
        saved |= {"actor": parts["actor"], "obs_rms": parts["envs"]["obs_rms"]}
    here = {"evaluate", "eval_episodes", "eval_stochastic", "capture_video"}  # never the run's, given or not
    why = "has no part in --evaluate, which takes it from the run"
    own = own_flags(args, argv, saved, here | {"seed"}, why)
    return type(args)(**own | {name: getattr(args, name) for name in here}), path, saved
