"""Steps per second of training commands, measured side by side: one after the other, in turns, so that a machine's moods meet all.

    python speed.py "python blpo_continuous.py" "python blpo_continuous.py --ihvp none" --turns 3

Every command must end by itself and say how far it is: the scripts here do so in progress.csv, CleanRL's by lines "SPS: n"
and "global_step=n". A command's rate is taken from its first report on (steady state: imports and first iteration left out).
Prints a row per command: median steps per second, median over the turns of the ratio to the last command's rate of the same
turn, largest memory (peak RSS), and for the scripts here the milliseconds of an iteration by phase. All with one thread of
PyTorch.
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

import tyro

PHASES = ("env", "inference", "bookkeeping", "critic", "hypergradient", "actor")


@dataclass
class Args:
    commands: tyro.conf.Positional[tuple[str, ...]]
    """commands to compare, one quoted string each; all rates are put in relation to the last one's"""
    turns: int = 3
    """how often each command is run"""
    steps: int = 102_400
    """environment steps of each run: --total-timesteps STEPS is appended to every command"""
    csv: str = ""
    """file to write the rows to as well (results/speed.csv is what plot.py draws), named by each command's --exp-name"""


def measure(command: str, steps: int):
    """Steps per second in steady state, peak RSS in MiB, and milliseconds per iteration by phase where the command says."""
    try:
        words = [*shlex.split(command), "--total-timesteps", str(steps)]
    except ValueError as problem:
        sys.exit(f"error: {command}: {problem}")
    with tempfile.TemporaryDirectory() as folder:
        ours = any(re.search(r"(blpo|ppo)_\w+\.py$", word) and (Path(word).parent / "nystrom.py").exists() for word in words)
        if ours:
            words += ["--eval-episodes", "0", "--runs-dir", folder]
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        try:
            process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
        except OSError as problem:
            sys.exit(f"error: {command}: {problem}")
        step, points, tail = 0, [], ""
        for line in process.stdout:
            tail = line
            if found := re.search(r"global_step=(\d+)", line):
                step = int(found[1])
            if found := re.fullmatch(r"SPS: (\d+)\n", line):
                points.append((step, time.perf_counter()))
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"error: {command} ended with status {os.waitstatus_to_exitcode(status)}: {tail.strip()}")
        rows = []
        for path in Path(folder).glob("*/progress.csv"):
            with open(path) as file:
                rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
            points = [(row["global_step"], row["wall_seconds"]) for row in rows]
    if len(points) < 2:
        sys.exit(f"error: {command} reported {len(points)} times; raise --steps")
    (first, begin), (last, end) = points[0], points[-1]
    spent = {phase: [row[f"seconds_{phase}"] for row in rows[1:]] for phase in PHASES if rows and f"seconds_{phase}" in rows[0]}
    phases = {phase: 1e3 * statistics.mean(seconds) for phase, seconds in spent.items()}
    return (last - first) / (end - begin), usage.ru_maxrss / 1024, phases


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    if min(args.turns, args.steps, len(args.commands)) < 1:
        sys.exit("error: name at least one command, and keep --turns and --steps at 1 or more")
    results = [[measure(command, args.steps) for command in args.commands] for _ in range(args.turns)]
    table = []
    print(f"| command | SPS | ratio | MiB | {' | '.join(f'{phase}, ms' for phase in PHASES)} |")
    print("|---" * (4 + len(PHASES)) + "|")
    for i, command in enumerate(args.commands):
        rate = statistics.median(turn[i][0] for turn in results)
        ratio = statistics.median(turn[i][0] / turn[-1][0] for turn in results)
        memory = max(turn[i][1] for turn in results)
        spent = [statistics.median(turn[i][2].get(phase, 0) for turn in results) for phase in PHASES]
        name = (re.findall(r"--exp-name[ =](\S+)", command) or [command])[0]
        table.append({"name": name, "sps": round(rate, 1), "ratio": round(ratio, 4), "mib": round(memory)})
        table[-1] |= {f"{phase}_ms": round(ms, 2) for phase, ms in zip(PHASES, spent)}
        print(f"| `{command}` | {rate:,.0f} | {ratio:.2f} | {memory:.0f} | {' | '.join(f'{ms:.0f}' if ms else '' for ms in spent)} |")
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, table[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)
