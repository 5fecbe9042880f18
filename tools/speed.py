"""Steps per second of training commands, measured side by side: one after the other, in turns, so that
whatever slows the machine down for a while meets all of them.

    python tools/speed.py "python blpo_continuous.py" "python blpo_continuous.py --ihvp none" --turns 3

Every command must end by itself and say how far it is: the scripts here do so in progress.csv, CleanRL's by
lines "SPS: n" and "global_step=n". A command's rate is taken from its first report on (steady state: imports
and first iteration left out). Prints a row per command: median steps per second, median over the turns of the
ratio to the last command's rate of the same turn, largest memory (peak RSS), and for the scripts here the
milliseconds of an iteration by phase. All with one thread of PyTorch. A report counts the steps of the last
line with a step: of a script that names them more rarely than its rate, as CleanRL's SAC at the end of every
episode, take --steps at which both its first and its last report lag behind alike.
"""

import csv
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import tyro

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support.files import check_can_be_written
from support.flags import fail, parse_args
from tools.results import write_csv  # no more of the tools: a command's memory is at least what is held here


@dataclass
class Args:
    commands: tyro.conf.Positional[tuple[str, ...]]
    """commands to compare, one quoted string each; all rates are put in relation to the last one's"""
    turns: int = 3
    """how often each command is run"""
    steps: int = 102_400
    """environment steps of each run: --total-timesteps STEPS is appended to every command"""
    csv: str = ""
    """file to write the rows to after every turn, named by --exp-name (plot.py draws results/speed.csv)"""


class Measured(NamedTuple):
    """One run of a command."""

    rate: float  # steps per second in steady state
    memory: float  # peak RSS, MiB
    phases: dict[str, float]  # milliseconds of an iteration, where the command says


def is_ours(word: str) -> bool:
    """Whether a word of a command is one of this repository's scripts, which report in progress.csv."""
    ours = re.search(r"(blpo|ppo|sobirl)_(continuous|discrete)\.py$", word)
    return bool(ours) and (Path(word).parent / "nystrom.py").exists()


def printed_points(stream) -> tuple[list[tuple[int, float]], str]:
    """(step, time) whenever a command prints its rate as CleanRL's scripts do, and its last line."""
    step = 0
    points = []
    last_line = ""
    for line in stream:
        last_line = line.strip()
        if found := re.search(r"global_step=(\d+)", line):
            step = int(found[1])
        if re.fullmatch(r"SPS: (\d+)\n", line):
            points.append((step, time.perf_counter()))
    return points, last_line


def progress_of(runs_dir: str) -> list[dict[str, float]]:
    """The rows of the progress.csv of the only run in a folder, none if there is no run."""
    rows = []
    for path in Path(runs_dir).glob("*/progress.csv"):
        with open(path, encoding="utf-8") as file:
            rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    return rows


def measure(command: str, steps: int) -> Measured:
    """Runs a command once. Ends the process with one line where it cannot be run or reports too little."""
    try:
        words = [*shlex.split(command), "--total-timesteps", str(steps)]
    except ValueError as problem:
        fail(f"{command}: {problem}")
    with tempfile.TemporaryDirectory() as folder:
        if any(map(is_ours, words)):
            words += ["--eval-episodes", "0", "--runs-dir", folder]
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        try:
            process = subprocess.Popen(words, env=env, **pipes)
        except OSError as problem:
            fail(f"{command}: {problem}")
        points, last_line = printed_points(process.stdout)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            code = os.waitstatus_to_exitcode(status)
            fail(f"{command} ended with status {code}: {last_line}")
        rows = progress_of(folder)
    if rows:
        points = [(row["global_step"], row["wall_seconds"]) for row in rows]
    if len(points) < 2:
        fail(f"{command} reported {len(points)} times; raise --steps")
    (first, begin), (last, end) = points[0], points[-1]
    if last <= first or end <= begin:
        fail(f"{command} did not say how far it was: it has no progress.csv and prints no global_step=n")
    phases = {}
    for column in rows[0] if rows else ():
        if column.startswith("seconds_"):
            phases[column.removeprefix("seconds_")] = 1e3 * statistics.mean(row[column] for row in rows[1:])
    return Measured((last - first) / (end - begin), usage.ru_maxrss / 1024, phases)


def table(commands: tuple[str, ...], turns: list[list[Measured]]) -> list[dict]:
    """A row per command, of all turns so far, with a column for every phase that one of them tells."""
    phases = dict.fromkeys(phase for measured in turns[0] for phase in measured.phases)
    rows = []
    for i, command in enumerate(commands):
        named = re.findall(r"--exp-name[ =](\S+)", command) or [command]
        rates = [turn[i].rate for turn in turns]
        row = {
            "name": named[0],
            "sps": round(statistics.median(rates), 1),
            "slowest": round(min(rates), 1),
            "fastest": round(max(rates), 1),
            "ratio": round(statistics.median(turn[i].rate / turn[-1].rate for turn in turns), 4),
            "mib": round(max(turn[i].memory for turn in turns)),
        }
        for phase in phases:
            row[f"{phase}_ms"] = round(statistics.median(turn[i].phases.get(phase, 0) for turn in turns), 2)
        rows.append(row)
    return rows


def show(commands: tuple[str, ...], rows: list[dict]) -> None:
    """Prints the rows as a Markdown table."""
    phases = [column for column in rows[0] if column.endswith("_ms")]
    head = ["command", "SPS", "ratio", "MiB", *(f"{phase.removesuffix('_ms')}, ms" for phase in phases)]
    lines = [head, ["---"] * len(head)]
    for command, row in zip(commands, rows):
        spent = [f"{row[phase]:.0f}" if row[phase] else "" for phase in phases]
        lines.append([f"`{command}`", f"{row['sps']:,.0f}", f"{row['ratio']:.2f}", f"{row['mib']}", *spent])
    for line in lines:
        print(f"| {' | '.join(line)} |")


def main(args: Args) -> None:
    if min(args.turns, args.steps, len(args.commands)) < 1:
        fail("name at least one command, and keep --turns and --steps at 1 or more")
    if args.csv:
        check_can_be_written("csv", Path(args.csv))
    turns = []
    for _ in range(args.turns):
        turns.append([measure(command, args.steps) for command in args.commands])
        rows = table(args.commands, turns)
        if args.csv:  # after every turn, so that what is measured is not lost
            write_csv(Path(args.csv), rows)
    show(args.commands, rows)


if __name__ == "__main__":
    main(parse_args(Args, __doc__))
