"""The run folder: what a run measures, what it needs to go on, and how it ends.

A run folder is worth more than the process that writes it. Rows are on disk as soon as they are measured;
other files appear whole or not at all; a checkpoint holds all that the rest of the run depends on, the
environments in the middle of their episodes included, so that a run that was killed and resumed writes the
same bytes as one that was not.
"""

import contextlib
import importlib.metadata
import io
import itertools
import json
import math
import os
import platform
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
from typing import NoReturn

import filelock
import numpy as np
import torch
from tqdm import tqdm

from support.files import write_whole
from support.flags import Stop, fail, say, script_of, shown
from support.names import no_flag, slug

CHECKPOINT = "checkpoint.pt"
PREVIOUS = "checkpoint.previous.pt"
MODEL = "model.pt"
EVALUATIONS = "evaluation.csv"
LOCK = "run.lock"


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
    """Adds the time since its last call to the phase that is named. `phases` are those that are reported even
    where they take no time."""

    def __init__(self):
        self.phases = ()
        self.restart()

    def restart(self):
        self.seconds = defaultdict(float, dict.fromkeys(self.phases, 0.0))
        self.last = time.perf_counter()

    def __call__(self, phase: str):
        now = time.perf_counter()
        self.seconds[phase] += now - self.last
        self.last = now


class Metrics(defaultdict):
    """Lists of numbers by name, of which progress.csv gets the means; those with `names` have columns even
    where there are no numbers yet."""

    def __init__(self, *names: str):
        super().__init__(list, {name: [] for name in names})

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


def generators(args) -> dict[str, torch.Generator]:
    """PyTorch's own, as parts of a run."""
    found = {"torch": torch.default_generator}
    if args.cuda:
        found["cuda"] = torch.cuda.default_generators[torch.cuda.current_device()]
    return found


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("torch", "gymnasium", "mujoco", "numpy", "ale-py", "opencv-python-headless", "minatar"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def git_commit(args) -> str:
    """That of the script; with -dirty where a file has changed since."""
    with contextlib.suppress(OSError):  # no git here
        git = ["git", "-C", script_of(args).resolve().parent, "describe", "--always", "--dirty"]
        git += ["--exclude=*", "--abbrev=40"]  # the hash, whatever tags there are
        return subprocess.run(git, capture_output=True, text=True, errors="replace").stdout.strip()
    return ""


def check_runs_dir(runs_dir: str) -> None:
    """Refuses a folder that cannot be made or written."""
    try:
        os.makedirs(runs_dir, exist_ok=True)
        tempfile.TemporaryDirectory(dir=runs_dir).cleanup()
    except OSError as problem:
        fail(f"--runs-dir {runs_dir} is not writable ({problem.strerror}): name another folder")


def check_run_folder(folder: str) -> None:
    """Refuses to go on with a run whose folder cannot be written."""
    try:
        tempfile.TemporaryDirectory(dir=folder).cleanup()
    except OSError as problem:
        fail(f"--resume {folder} cannot be written ({problem.strerror}): make room, or make it writable")


def lock_folder(folder: Path) -> filelock.BaseFileLock:
    """Keeps other processes from writing the run, until it is released or its process ends."""
    held = filelock.FileLock(folder / LOCK, blocking=False)
    try:
        held.acquire()
    except filelock.Timeout:
        fail(f"--resume {folder}: another process is writing this run: wait for it or stop it")
    except (OSError, NotImplementedError) as problem:  # some network file systems and containers
        why = f"nothing keeps a second process from writing {folder}"
        say(f"note: files cannot be locked here ({shown(problem)}): {why}", error=True)
    return held


def misfit(flag: str, path, problem: Exception) -> NoReturn:
    """What was saved is not what this version of the script, or of the environment, saves."""
    reason = shown(problem)[:80]
    fail(f"{flag} {path} does not fit the networks or the environment of this version ({reason})")


class Run:
    """The run folder of args, a new one or, with a checkpoint, which saved.load_to_resume returns, the one
    that args.resume names; one process writes it.

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
        self.step = checkpoint["step"] if checkpoint else 0  # as in the last row of progress.csv
        self.received = None  # the number of a signal that asks to stop
        self.closed = False
        self.files = {}
        self.lines = {}
        self.columns = []  # of progress.csv
        self.handlers = {}
        self.bar = None
        self.wandb = None
        self.events = None
        self.last_line = 0.0
        self.noted = False  # whether it was said that updates are skipped
        if checkpoint:
            self.folder = Path(args.resume)
            self.lock = checkpoint["lock"]  # which has been held since before it was read
            self.config = checkpoint["config"]
        else:
            self.folder = self.make_folder()
            self.lock = lock_folder(self.folder)
            self.config = {"script": script_of(args).name, "id": self.folder.name, "flags": asdict(args)}
            self.config["versions"] = versions() | {"git_commit": git_commit(args)}
            self.save("config.json", json.dumps(self.config, indent=2) + "\n")
        self.open_table("progress.csv")
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not in the main thread
                self.handlers[number] = signal.signal(number, self.on_signal)
        if sys.stdout.isatty():
            self.bar = tqdm(total=args.total, unit=args.unit, file=sys.stdout)

    def make_folder(self) -> Path:
        args = self.args
        stem = f"{slug(args.subject)}__{slug(args.exp_name)}__{args.seed}"
        for born in itertools.count(int(time.time())):  # the next free second: runs may start together
            folder = Path(args.runs_dir) / f"{stem}__{born}"
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                return folder

    def __enter__(self):
        return self

    def __exit__(self, _kind, raised, _traceback):
        if isinstance(raised, Stop):
            message = f"{raised}" if raised.status > 128 else f"error: {raised}"  # above: a signal
            if cause := raised.__cause__:
                error = self.folder / "error.txt"
                with self.storing():
                    text = "".join(traceback.format_exception(cause))
                    error.write_text(text, encoding="utf-8", errors="replace")
                message += f": {shown(cause)} (traceback in {error})"
            self.stop(message, raised.status)
        self.close()

    # Iterations

    def iterations(self):
        """The numbers of the iterations that are left; after each of them a checkpoint or the end, if due."""
        first = 0
        if self.restored:
            first = self.restore_parts()
            self.go_on()  # nothing can be refused any more: only from here on does the folder change
        if self.args.track:
            self.begin_broadcast()
        if self.args.tensorboard:
            self.begin_events()
        self.start = time.perf_counter()
        if self.parts and not self.restored:
            self.write_checkpoint(0)  # from now on a killed run can go on
        every = self.args.checkpoint_every or math.ceil(self.count / 20)
        for iteration in range(first, self.count):
            self.lap.restart()
            yield iteration
            done = iteration + 1
            if self.parts and (self.received or done % every == 0 or done == self.count):
                self.write_checkpoint(done)
            if self.received:
                raise Stop(f"stopped at {self.args.unit} {self.step}", status=128 + self.received)

    def restore_parts(self) -> int:
        """Puts every part where it was when the checkpoint was written, and returns the next iteration."""
        saved = self.restored
        try:
            self.earlier = saved["wall"]
            self.seconds |= saved["seconds"]
            # The replay memory last: it writes into its file, which must not change if another is refused
            for name in sorted(self.parts, key=lambda name: name == "replay"):
                restore(self.parts[name], saved["parts"][name])
            return saved["iteration"]
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as problem:
            misfit("--resume", self.args.resume, problem)

    def go_on(self) -> None:
        """What changes in the folder of a run that goes on.

        An older checkpoint becomes the last one: the newer one counts on rows that will now be written again,
        and what an end that had been reached has left goes, until the run ends again. A larger
        --total-timesteps moves the end of the run, which may have been reached: config.json then has the new
        one, and the evaluation and the model of the old one go on under another name. Rows after the
        checkpoint are dropped, because they are measured again.
        """
        with self.storing():
            before = self.restored["args"].total_timesteps
            if self.args.total_timesteps != before:
                self.move_the_end(before)
            if self.restored["path"].name != CHECKPOINT:
                for name in (EVALUATIONS, MODEL):  # in this order: a run is finished if it is evaluated
                    (self.folder / name).unlink(missing_ok=True)
                os.replace(self.restored["path"], self.folder / CHECKPOINT)
            for name, file in self.files.items():
                kept = (self.folder / name).read_bytes().splitlines(keepends=True)[: self.lines[name]]
                file.truncate(sum(map(len, kept)))
                if name == "progress.csv" and kept:
                    self.columns = kept[0].decode().strip().split(",")

    def move_the_end(self, before: int) -> None:
        """Makes --total-timesteps, which was `before`, the end of the run."""
        for name in (EVALUATIONS, MODEL):
            path = self.folder / name
            if path.exists():
                os.replace(path, path.with_name(f"{path.stem}.{before}{path.suffix}"))
        self.config["flags"]["total_timesteps"] = self.args.total_timesteps
        self.save("config.json", json.dumps(self.config, indent=2) + "\n")
        total = f"{self.args.total_timesteps:,} steps, not at {before:,}"
        schedule = "" if self.args.anneal_timesteps else "; with --anneal-lr step sizes fall to 0 there"
        say(f"note: {self.folder} now ends at {total}{schedule}", error=True)

    def write_checkpoint(self, iteration: int) -> None:
        """Saves the parts, and how many rows of the csv files, brought to disk before, belong to them."""
        with self.storing():
            for file in self.files.values():
                os.fsync(file.fileno())
        state = {"iteration": iteration, "step": self.step}
        state |= {"wall": self.wall(), "seconds": dict(self.seconds)}
        state["parts"] = {name: state_of(part) for name, part in self.parts.items()}
        self.save(CHECKPOINT, state | {"config": self.config, "lines": self.lines}, previous=PREVIOUS)

    def wall(self) -> float:
        """Seconds of training so far, those before a resume included."""
        return self.earlier + time.perf_counter() - self.start

    # Rows and files

    def open_table(self, name: str, header: str = "") -> None:
        """Opens a csv file for write()."""
        path = self.folder / name
        with self.storing():
            self.files[name] = open(path, "a", buffering=1, encoding="utf-8")  # flushed at every line
        self.lines[name] = self.restored["lines"][name] if self.restored else 0
        if header and not self.lines[name]:
            self.write(name, header)

    def write(self, name: str, line: str) -> None:
        with self.storing():
            self.files[name].write(line + "\n")
        self.lines[name] += 1

    def log_means(
        self,
        step: int,
        known: dict,
        metrics: Metrics,
        evaluated: dict | None = None,
        ending: str = "KL {approx_kl:.4f}",
    ) -> None:
        """A row of progress.csv: what is known, the means of the metrics, this iteration's seconds by phase,
        and what an evaluation found. `ending` says what of it ends the line for the terminal."""
        self.note_skipped_updates(metrics)
        wall = self.wall()
        row = {"global_step": step, "wall_seconds": round(wall, 3), "sps": round(step / wall, 1)}
        row |= known
        row |= metrics.means()
        row |= {f"seconds_{phase}": round(spent, 5) for phase, spent in self.lap.seconds.items()}
        row |= evaluated or {}
        for phase, spent in self.lap.seconds.items():
            self.seconds[phase] += spent
        self.log(row, f"SPS {row['sps']:.0f}  return {row['return_100']:.1f}  {ending.format(**row)}")

    def note_skipped_updates(self, metrics: Metrics) -> None:
        """Says, once in a run, that training only seems to go on."""
        skipped = float(np.mean(metrics["skipped_updates"] or [0.0]))
        if skipped > 0.1 and not self.noted:
            self.noted = True
            what = f"{skipped:.0%} of this iteration's updates were skipped, because gradients are not finite"
            fix = "--norm-reward, or smaller" if "norm_reward" in asdict(self.args) else "smaller"
            say(f"note: {what}. Very large rewards? Try {fix} step sizes", error=True)

    def log(self, row: dict, line: str) -> None:
        """A row of progress.csv, of wandb and TensorBoard, and `line` for the terminal. In progress.csv every
        row has the columns of the first one, which another version may have written, with nan for what the
        row lacks; the first column says how far the run is."""
        with self.storing():
            os.stat(self.folder / "progress.csv")  # the open file would not notice that the folder is gone
        if not self.lines["progress.csv"]:
            self.columns = list(row)
            self.write("progress.csv", ",".join(row))
        self.write("progress.csv", ",".join(str(row.get(column, math.nan)) for column in self.columns))
        self.step = next(iter(row.values()))
        if self.wandb:
            with self.broadcast():
                self.wandb.log(row, step=self.step)
        if self.events:
            with self.storing():
                for name, value in row.items():
                    self.events.add_scalar(name, value, self.step)
        if self.bar is not None:
            with contextlib.suppress(OSError):  # the terminal is gone
                self.bar.set_postfix_str(line, refresh=False)
                self.bar.update(self.step - self.bar.n)
        elif time.time() - self.last_line > 5:
            self.last_line = time.time()
            total = f"{self.args.total:,}"
            say(f"{self.args.unit} {self.step:>{len(total)},} of {total}  {line}")

    def save(self, name: str, content: str | dict, previous: str = "") -> None:
        """Writes a text, or a dictionary by torch.save, as a file that is whole wherever it is there. What
        had its name before is kept under the name `previous`, if that is given."""
        if isinstance(content, dict):
            data = io.BytesIO()
            torch.save(content, data)
            content = data.getvalue()
        with self.storing():
            write_whole(self.folder / name, content, self.folder / previous if previous else None)

    @contextlib.contextmanager
    def storing(self):
        try:
            yield
        except OSError as problem:  # disk full, folder deleted, ...
            self.stop(f"error: cannot write to {self.folder}: {problem.strerror or shown(problem)}")

    # Weights and Biases, TensorBoard

    def begin_broadcast(self) -> None:
        with self.broadcast():
            import wandb

            known = self.config.get("id", self.folder.name)  # of a renamed folder its first name
            named = dict(name=self.folder.name, id=known, resume="allow")
            self.wandb = wandb.init(**named, config=self.config, dir=self.folder)

    def begin_events(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        again = self.step + 1 if self.restored else None  # from here on rows are measured again
        self.events = SummaryWriter(self.folder, purge_step=again)

    @contextlib.contextmanager
    def broadcast(self):
        """Training is worth more than its broadcast: whatever wandb raises, say so and go on without it."""
        try:
            yield
        except Exception as problem:
            say(f"wandb is off: {shown(problem)}", error=True)
            self.wandb = None

    # The end

    def on_signal(self, number, _frame) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
        self.received = number
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopping after this iteration; once more to stop at once\n")

    def release_signals(self) -> None:
        """From here on a signal ends the process."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def stop(self, message: str, status: int = 1) -> NoReturn:
        """Ends the process with one line, which says how to go on."""
        self.close()
        if status != 2 and (self.folder / CHECKPOINT).exists():  # 2: a flag is wrong, and would be again
            script = os.path.relpath(script_of(self.args))
            again = shlex.join([script, "--resume", no_flag(self.folder)])
            message += f"; go on from the last checkpoint: python {again}"
        say(message, error=True)
        raise SystemExit(status)

    def close(self) -> None:
        """Closes all that is open, once; also called where the run has ended before."""
        if self.closed:
            return
        self.closed = True
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
        if self.events:
            self.events.close()
        self.lock.release()
