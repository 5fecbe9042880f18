"""Flags: those that every training script has, the ranges that values lie in, and refusals of one line.

The range of a flag belongs to its type (`gamma: UnitInterval = 0.99`), so that a script only checks what no
single flag can know. Whatever is wrong is said in one line that names the flag and the fix, before any work
starts, and the process ends with status 2.
"""

import contextlib
import importlib.util
import inspect
import io
import itertools
import json
import math
import operator
import os
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal, NoReturn, get_args, get_origin, get_type_hints

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


@dataclass(frozen=True)
class JsonObject:
    """Metadata of a flag's type: a text that is a JSON object."""

    must = 'be a JSON object, such as \'{"is_slippery": false}\''

    def __contains__(self, text) -> bool:
        with contextlib.suppress(ValueError, RecursionError):
            return isinstance(json.loads(text), dict)
        return False


FOREIGN = (Exception, SystemExit)  # what other people's code may raise, an end of the process included
TINY = 5e-324  # the smallest positive float: where an open interval begins
HUGE = 1.7e308  # about the largest finite one

# Types of flags, named by their ranges and not by a use; (a, b] leaves a out
Count = Annotated[int, Range(1, 2**63 - 1, "be at least 1, and below 2^63")]
Size = Annotated[int, Range(1, 4_096, "lie between 1 and 4,096")]
Natural = Annotated[int, Range(0, 2**63 - 1, "be 0 or positive, and below 2^63")]
Few = Annotated[int, Range(1, 100, "lie between 1 and 100")]
UpToMillion = Annotated[int, Range(1, 1_000_000, "lie between 1 and 1,000,000")]
UpToBillion = Annotated[int, Range(1, 1_000_000_000, "lie between 1 and 1,000,000,000")]
UpTo10000 = Annotated[int, Range(0, 10_000, "lie between 0 and 10,000")]
Seed = Annotated[int, Range(0, 2**31 - 1, "lie in [0, 2^31)")]
UnitStep = Annotated[float, Range(TINY, 1, "lie in (0, 1]")]
UnitInterval = Annotated[float, Range(0, 1, "lie in [0, 1]")]
UpTo1000 = Annotated[float, Range(TINY, 1_000, "lie in (0, 1,000]")]
NonNegative = Annotated[float, Range(0, HUGE, "be 0 or positive, and finite")]
Positive = Annotated[float, Range(TINY, HUGE, "be positive and finite")]
NonNegativeOrInf = Annotated[float, Range(0, math.inf, "be 0 or positive")]
PositiveOrInf = Annotated[float, Range(TINY, math.inf, "be positive")]
Name = Annotated[str, Length(100)]
Json = Annotated[str, JsonObject()]


class Flags:
    """What the flags of any script can do beside holding values. A run folder needs `subject`, what the run
    is about, which begins the folder's name; `total`, where the first column of progress.csv ends; and
    `unit`, its unit."""

    unit = "step"
    checkpoint_every = 0  # iterations; 0: a twentieth of the run
    tensorboard = False

    def require(self, flag: str, ok: bool, must: str) -> None:
        """Refuses the value of a flag unless ok."""
        if not ok:
            self.refuse(flag, must)

    def refuse(self, flag: str, must: str) -> NoReturn:
        """Ends the process with one line that names the flag and what it must do."""
        fail(f"--{flag.replace('_', '-')} must {must}, got {getattr(self, flag)!r}")


@dataclass
class RunFlags(Flags):
    """The flags of every script that trains in Gymnasium's environments; its Args adds the algorithm's."""

    env_id: Name
    """Gymnasium id of the environment ("module:id" imports the module first)"""
    total_timesteps: Count
    """environment steps in total, over all environments, rounded down to whole rollouts"""
    anneal_timesteps: Natural = 0
    """steps over which --anneal-lr decays the step sizes, at least --total-timesteps (0: just these)"""
    exp_name: Name = ""
    """name of the experiment, part of the run folder's name (empty: the script's name)"""
    seed: Seed = 1
    """seed of the environments, the networks, the exploration noise and the minibatches"""
    env_kwargs: Json = "{}"
    """arguments of the environment, as JSON: '{"is_slippery": false}'"""
    rescale_actions: Literal["auto", "on", "off"] = "auto"
    """act in [-1, 1] and rescale to the action box;
    "auto": where 0 is not in the box, or half of one of its sides is not between 0.1 and 10"""
    runs_dir: str = "runs"
    """folder that receives the run folder {env_id}__{exp_name}__{seed}__{unix time}"""
    checkpoint_every: Natural = 0
    """iterations between checkpoints (0: a twentieth of the run)"""
    resume: str = ""
    """run folder to continue from its last checkpoint, with its own flags (--total-timesteps may grow)"""
    evaluate: str = ""
    """run folder, or model.pt of a run, whose policy to evaluate instead of training"""
    eval_episodes: UpTo10000 = 10
    """episodes of an evaluation: at the end, by --evaluate, by --eval-every (0: none)"""
    eval_max_steps: Count = 10_000
    """steps at which an episode of an evaluation is cut, and counted as cut"""
    eval_every: Natural = 0
    """iterations between evaluations during training, which they leave untouched (0: none)"""
    eval_stochastic: bool = False
    """sample the actions of evaluations as in training, instead of taking the most likely ones"""
    capture_video: bool = False
    """film the first three episodes of --evaluate (mp4, in the run folder)"""
    cuda: bool = False
    """train on the GPU; for networks of this size the CPU is faster"""
    track: bool = False
    """log to Weights and Biases too (WANDB_MODE=offline needs no account, WANDB_PROJECT names the project)"""
    tensorboard: bool = False
    """write event files for TensorBoard into the run folder too (needs the package tensorboard)"""

    @property
    def subject(self) -> str:
        return self.env_id

    @property
    def usual_name(self) -> str:
        """What an experiment is called that has no --exp-name."""
        return script_of(self).stem

    @property
    def total(self) -> int:
        return self.total_timesteps

    @property
    def env_options(self) -> dict:
        """--env-kwargs as a dictionary."""
        return json.loads(self.env_kwargs)

    @property
    def device(self):
        """As a torch.device."""
        import torch  # not above: whoever wants no more than fail() would wait for it

        return torch.device("cuda" if self.cuda else "cpu")


def shown(problem: BaseException) -> str:
    """A foreign exception in one line: its type, and its message if it has one."""
    try:
        message = " ".join(str(problem).split())
    except Exception:  # foreign, too
        message = "its message cannot be shown"
    return f"{type(problem).__name__}: {message}" if message else type(problem).__name__


def print_anything() -> None:
    """From here on printing neither fails, whatever the encoding of a terminal, nor gets into files."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:  # closed: a file of the run would get its number, and with it what is printed
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r+", encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def say(message: str, error: bool = False) -> None:
    """Prints a line, errors and notes as one; a terminal, pipe or log file that is gone ends no run."""
    stream = sys.stderr if error else sys.stdout
    message = " ".join(message.split()) if error else message
    try:
        print(message, file=stream, flush=True)
    except UnicodeEncodeError:
        print(message.encode("ascii", "replace").decode(), file=stream, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # what is still buffered must go somewhere


def fail(message: str, status: int = 2) -> NoReturn:
    """Ends the process with one line on standard error."""
    say(f"error: {message}", error=True)
    raise SystemExit(status)


class Stop(Exception):
    """Ends a run with one line. What it measured is on disk; --resume goes on from its last checkpoint."""

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status = status


def check_ranges(args: Flags) -> None:
    """Refuses a flag outside of the range that its type names; where that allows None, it may be unset."""
    types = get_type_hints(type(args))
    for flag, kind in get_type_hints(type(args), include_extras=True).items():
        value = getattr(args, flag)
        check_type(args, flag, types[flag])
        for allowed in getattr(kind, "__metadata__", ()):
            args.require(flag, value is None or value in allowed, allowed.must)


def check_type(args: Flags, flag: str, kind) -> None:
    """Refuses a value that the command line could not have given: those of a run come from a file."""
    value = getattr(args, flag)
    if get_origin(kind) is Literal:
        args.require(flag, value in get_args(kind), f"be one of {', '.join(get_args(kind))}")
    elif kind is float:
        args.require(flag, isinstance(value, (int, float)) and not isinstance(value, bool), "be a number")
    elif isinstance(kind, type):
        args.require(flag, type(value) is kind, f"be of type {kind.__name__}")


def check_run_flags(args: RunFlags) -> None:
    """Refuses what is wrong with the flags that all training scripts share."""
    check_ranges(args)
    if args.capture_video and not args.evaluate:
        args.refuse("capture_video", "come with --evaluate RUN")
    if args.eval_episodes == 0 and (args.evaluate or args.eval_every):
        args.refuse("eval_episodes", "be at least 1 to evaluate")
    if args.anneal_timesteps and not args.anneal_lr:
        args.refuse("anneal_timesteps", "be 0 with --no-anneal-lr, which leaves nothing to decay")
    if 0 < args.anneal_timesteps < args.total_timesteps:
        args.refuse("total_timesteps", f"be at most --anneal-timesteps {args.anneal_timesteps}, or that be 0")
    if args.cuda and not gpu_is_there():
        args.refuse("cuda", "be off: torch finds no GPU here")
    if fixed := {"id", "disable_env_checker"} & args.env_options.keys():
        args.refuse("env_kwargs", f"not have {', '.join(sorted(fixed))}, which is not the environment's")
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        args.refuse("tensorboard", "come with its package: pip install tensorboard")


def gpu_is_there() -> bool:
    import torch

    return torch.cuda.is_available()


def translated(words: list[str], Args) -> list[str]:
    """A command line as tyro reads it: `--norm-adv=False` and `--anneal-lr=true`, which is how the sweep
    agents of wandb pass booleans, become --no-norm-adv and --anneal-lr; 1e6 becomes 1000000 for a flag that
    takes an integer."""
    kinds = {name.replace("_", "-"): kind for name, kind in get_type_hints(Args).items()}
    result = []
    expects = None  # the type of the value that follows a flag
    for word in words:
        flag, equals, value = word.partition("=")
        name = flag[2:].replace("_", "-")
        kind = kinds.get(name) if flag.startswith("--") else None
        if equals and kind is bool:
            if not is_boolean(value):
                fail(f"--{name} must be true or false where it has a value, got {value!r}")
            word = switch(name, value)
        elif equals and kind is int:
            word = f"{flag}={whole_number(value)}"
        elif expects is int:
            word = whole_number(word)
        elif expects is bool and is_boolean(word):  # of the flag before it
            word = switch(result.pop()[2:].replace("_", "-"), word)
        expects = None if equals else kind
        result.append(word)
    return result


def is_boolean(text: str) -> bool:
    return text.lower() in ("true", "false")


def switch(name: str, value: str) -> str:
    """A boolean flag with a value as the flag without one that says the same."""
    return f"--{name}" if value.lower() == "true" else f"--no-{name}"


def whole_number(text: str) -> str:
    """1e6 and 2.5e5 as digits; any other text as it is."""
    if re.fullmatch(r"[+-]?\d+(_\d+)*(\.\d*)?[eE]\+?\d{1,2}", text):
        value = float(text)
        return str(int(value)) if value.is_integer() else text
    return text


def parse_args(Args, description: str, argv: list[str] | None = None):
    """The command line as an instance of Args; tyro's boxed complaints become one line. Of the description
    --help shows the first paragraph: what comes after it is for readers of the script."""
    complaint = io.StringIO()
    words = translated(sys.argv[1:] if argv is None else argv, Args)
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(Args, args=words, description=description.split("\n\n")[0])
    except SystemExit as stop:
        if stop.code:
            _title, *body = [line.strip("│╭╮╰╯─ ") for line in complaint.getvalue().splitlines()]
            body = [line if line.strip("-+|") else "" for line in body]  # rules, where there is no Unicode
            body = itertools.dropwhile(operator.not_, body)
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
