"""Flags: those that every training script has, the ranges that values lie in, and refusals of one line.

The range of a flag belongs to its type (`gamma: Fraction = 0.99`), so that a script only checks what no
single flag can know. Whatever is wrong is said in one line that names the flag and the fix, before any work
starts, and the process ends with status 2.
"""

import contextlib
import inspect
import io
import itertools
import math
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, get_type_hints

import torch
import tyro


@dataclass(frozen=True)
class Range:
    """Metadata of a flag's type: the values it takes, and the words in which others are refused."""

    low: float
    high: float
    must: str

    def __contains__(self, value) -> bool:
        return self.low <= value <= self.high  # False for NaN


@dataclass(frozen=True)
class Length:
    """Metadata of a flag's type: how many characters it may have."""

    most: int

    @property
    def must(self) -> str:
        return f"have at most {self.most} characters"

    def __contains__(self, text) -> bool:
        return len(text) <= self.most


TINY = 5e-324  # the smallest positive float: where an open interval begins
HUGE = 1.7e308  # about the largest finite one

Count = Annotated[int, Range(1, math.inf, "be at least 1")]
Size = Annotated[int, Range(1, 4_096, "lie between 1 and 4,096")]
Every = Annotated[int, Range(0, math.inf, "be 0 or positive")]
Episodes = Annotated[int, Range(0, 10_000, "lie between 0 and 10,000")]
Seed = Annotated[int, Range(0, 2**31 - 1, "lie in [0, 2^31)")]
StepSize = Annotated[float, Range(TINY, 1, "lie in (0, 1]")]
Fraction = Annotated[float, Range(0, 1, "lie in [0, 1]")]
Norm = Annotated[float, Range(TINY, 1_000, "lie in (0, 1,000]")]
Weight = Annotated[float, Range(0, HUGE, "be 0 or positive, and finite")]
Positive = Annotated[float, Range(TINY, HUGE, "be positive and finite")]
Bound = Annotated[float, Range(0, math.inf, "be 0 or positive")]
Clip = Annotated[float, Range(TINY, math.inf, "be positive")]
Name = Annotated[str, Length(100)]


class Flags:
    """What the flags of any script can do beside holding values. A run folder needs `subject`, what the run
    is about, which begins the folder's name; `total`, where the first column of progress.csv ends; and
    `unit`, its unit."""

    unit = "step"
    checkpoint_every = 0  # iterations; 0: a twentieth of the run

    def require(self, flag: str, ok: bool, must: str) -> None:
        """Ends the process with one line that names the flag and what it must do, unless ok."""
        if not ok:
            fail(f"--{flag.replace('_', '-')} must {must}, got {getattr(self, flag)!r}")


@dataclass
class RunFlags(Flags):
    """The flags of every script that trains in Gymnasium's environments; its Args adds those of its
    algorithm."""

    env_id: Name
    """Gymnasium id of the environment ("module:id" imports the module first)"""
    total_timesteps: Count
    """environment steps in total, over all environments, rounded down to whole rollouts"""
    exp_name: Name = ""
    """name of the experiment, part of the run folder's name (empty: the script's name)"""
    seed: Seed = 1
    """seed of the environments, the networks, the exploration noise and the minibatches"""
    runs_dir: str = "runs"
    """folder that receives the run folder {env_id}__{exp_name}__{seed}__{unix time}"""
    checkpoint_every: Every = 0
    """iterations between checkpoints (0: a twentieth of the run)"""
    resume: str = ""
    """run folder to continue in place from its last checkpoint, with the flags it was started with"""
    evaluate: str = ""
    """run folder whose policy to evaluate instead of training"""
    eval_episodes: Episodes = 10
    """episodes of an evaluation: at the end, by --evaluate, by --eval-every (0: none)"""
    eval_every: Every = 0
    """iterations between evaluations during training, which they leave untouched (0: none)"""
    eval_stochastic: bool = False
    """sample the actions of evaluations as in training, instead of taking the most likely ones"""
    capture_video: bool = False
    """film the first three episodes of --evaluate (mp4, in the run folder)"""
    cuda: bool = False
    """train on the GPU; for networks of this size the CPU is faster"""
    track: bool = False
    """log to Weights and Biases too (WANDB_MODE=offline needs no account, WANDB_PROJECT names the project)"""

    @property
    def subject(self) -> str:
        return self.env_id

    @property
    def total(self) -> int:
        return self.total_timesteps

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.cuda else "cpu")


def say(message: str, error: bool = False) -> None:
    """Prints a line; a terminal, pipe or log file that is gone does not end a run."""
    stream = sys.stderr if error else sys.stdout
    try:
        print(message, file=stream, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # what is still buffered must go somewhere


def fail(message: str, status: int = 2):
    """Ends the process with one line on standard error."""
    say(f"error: {' '.join(message.split())}", error=True)
    raise SystemExit(status)


def check_ranges(args: Flags) -> None:
    """Refuses a flag outside of the range that its type names. None, where a type allows it, is no value
    yet."""
    for flag, kind in get_type_hints(type(args), include_extras=True).items():
        value = getattr(args, flag)
        for allowed in getattr(kind, "__metadata__", ()):
            args.require(flag, value is None or value in allowed, allowed.must)


def check_run_flags(args: RunFlags) -> None:
    """Refuses what is wrong with the flags that all training scripts share."""
    check_ranges(args)
    evaluates = bool(args.evaluate or args.eval_every)
    args.require("capture_video", not args.capture_video or bool(args.evaluate), "come with --evaluate RUN")
    args.require("eval_episodes", args.eval_episodes > 0 or not evaluates, "be at least 1 to evaluate")
    args.require("cuda", not args.cuda or torch.cuda.is_available(), "be off: torch finds no GPU here")


def parse_args(Args, description: str, argv: list[str] | None = None):
    """The command line as an instance of Args; tyro's boxed complaints become one line."""
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
    words = [word for word in (sys.argv[1:] if argv is None else argv) if word.startswith("--")]
    names = {word.split("=")[0][2:].replace("-", "_") for word in words}
    return {name for name in asdict(args) if {name, f"no_{name}"} & names}


def script_of(args) -> Path:
    """The file that defines the class of args: the training script."""
    return Path(inspect.getfile(type(args)))
