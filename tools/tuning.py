"""A search over minibatches, step sizes and so on, the same for PPO, nesting and BLPO: what came out.

Configuration 0 is what the scripts had as defaults before the search. Numbers 1 to 24 are drawn once, by a
seed, so that every level of a factor is in equally many of them.

    python tools/tuning.py table                              # configurations by their score, best first
    python tools/tuning.py table --steps 1000000              # those that were run to the end
    python tools/tuning.py factors --seeds 101                # mean scores of the levels of every factor
    python tools/tuning.py endings                            # BLPO, by the end of whole runs

The runs are those of commit 29a3403, whose scripts could still make minibatches of whole windows, and whose
tools/tuning.py prints their commands. The score of a configuration is the mean over environments of its mean
return there divided by the mean of all runs there, of whatever method. Only configurations are compared that
have been run with the same seeds.
"""

import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import tyro

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support.flags import fail, parse_args, shown
from tools import results
from tools.learning import budget, is_whole
from tools.tables import markdown

ENVIRONMENTS = ("Walker2d-v4", "Hopper-v4", "HalfCheetah-v4")
METHODS = ("ppo", "nested", "blpo")
CONFIGURATIONS = 24

# Levels of every factor. Rollouts are cut into windows, one for every environment: a minibatch is one window,
# or several shorter windows of different environments, or steps drawn at random from all windows.
FACTORS = {
    "minibatch": (256, 128, 64),  # steps
    "of": ("one window", "windows of 32", "windows of 16", "steps"),
    "epochs": (5, 10),
    "actor_lr": (3e-4, 6e-4),
    "clip": (0.2, 0.3, 0.5),
    "nested_critic_steps": (1, 2, 4),  # of nesting and BLPO
    "critic": ("separate", "joint"),  # of PPO: as BLPO's, or CleanRL's loss, step size and clipping
}


class Configuration(NamedTuple):
    """A level of every factor."""

    minibatch: int
    of: str
    epochs: int
    actor_lr: float
    clip: float
    nested_critic_steps: int
    critic: str


BEFORE = Configuration(256, "one window", 5, 6e-4, 0.2, 2, "separate")


def configurations() -> list[Configuration]:
    """BEFORE, then those that are drawn."""
    rng = np.random.default_rng(0)
    columns = []
    for levels in FACTORS.values():
        column = levels * (CONFIGURATIONS // len(levels))
        columns.append([column[i] for i in rng.permutation(CONFIGURATIONS)])
    return [BEFORE, *(Configuration(*row) for row in zip(*columns))]


@dataclass
class Args:
    action: tyro.conf.Positional[Literal["table", "factors", "endings"]]
    """table: print the configurations by their score; factors: the mean score of every level of every
    factor; endings: BLPO's configurations that were run to the end, and those of --endings-dir"""
    csv: Path = Path("results/tuning.csv")
    """a line per run"""
    seeds: tuple[int, ...] = (101, 102)
    """runs that count: configurations that lack one of these seeds are left out"""
    steps: int = 300_000
    """runs that count in table and factors: their environment steps, of 1,000,000 to anneal over"""
    endings_dir: Path = Path("results/endings")
    """results of later configurations, whose exp_name is blpo-{number}"""


def means_of(args: Args, later=()) -> dict[tuple[str, int], dict[str, float]]:
    """By method and configuration the mean return in each environment, of those that have all seeds. later:
    lines beside those of args.csv."""
    if not args.csv.is_file():
        fail(f"--csv {args.csv} is no file")
    returns = defaultdict(lambda: defaultdict(list))
    try:
        for row in [*results.read_csv(args.csv), *later]:
            if int(row["steps"]) == args.steps and int(row["seed"]) in args.seeds:
                name = row["method"], int(row["configuration"])
                returns[name][row["env_id"]].append(float(row["return_100"]))
    except (KeyError, ValueError, TypeError) as problem:  # a missing column or cell, no number
        fail(f"--csv {args.csv} is damaged ({shown(problem)})")
    whole = {
        name: {env: float(np.mean(found[env])) for env in ENVIRONMENTS}
        for name, found in returns.items()
        if all(len(found[env]) == len(set(args.seeds)) for env in ENVIRONMENTS)
    }
    if not whole:
        fail(f"{args.csv} has no configuration with the seeds {args.seeds} in all environments")
    return whole


def scores(means) -> dict[tuple[str, int], float]:
    """By method and configuration, best first."""
    scale = {env: np.mean([found[env] for found in means.values()]) for env in ENVIRONMENTS}
    score = {}
    for name, found in means.items():
        score[name] = float(np.mean([found[env] / scale[env] for env in ENVIRONMENTS]))
    return dict(sorted(score.items(), key=lambda item: -item[1]))


def table(args: Args) -> str:
    """Markdown: the configurations that have all seeds, best first."""
    means = means_of(args)
    every = configurations()
    rows = []
    for (method, number), score in scores(means).items():
        returns = [f"{means[method, number][env]:,.0f}" for env in ENVIRONMENTS]
        chosen = every[number]
        other = chosen.critic if method == "ppo" else chosen.nested_critic_steps
        rows.append([method, number, f"{score:.2f}", *returns, *chosen[:5], other])
    head = ["method", "number", "score", *ENVIRONMENTS, *Configuration._fields[:5], "K or critic"]
    return markdown(head, rows)


def factors(args: Args) -> str:
    """Markdown: for every level of every factor the mean score over the configurations that were drawn with
    it, in brackets their number."""
    score, every = scores(means_of(args)), configurations()
    lines = []
    for factor, levels in FACTORS.items():
        for level in levels:
            cells = []
            for method in METHODS:
                chosen = [n for n in range(1, CONFIGURATIONS + 1) if getattr(every[n], factor) == level]
                known = [score[method, n] for n in chosen if (method, n) in score]
                without = {"critic": ("nested", "blpo"), "nested_critic_steps": ("ppo",)}.get(factor, ())
                shown = known and method not in without
                cells.append(f"{np.mean(known):.2f} ({len(known)})" if shown else "")
            lines.append([factor, level, *cells])
    return markdown(["factor", "level", *METHODS], lines)


def endings(args: Args) -> str:
    """Markdown: BLPO's configurations with runs of 1,000,000 steps, and those of args.endings_dir, best
    first; their score is among themselves."""
    later = []
    there = (args.endings_dir / "summary.csv").exists()
    for row in results.load_results(args.endings_dir)[0] if there else []:
        number = row["exp_name"].removeprefix("blpo-")
        if number.isdigit() and is_whole(row):
            later.append(row | dict(method="blpo", configuration=number, steps=budget(row)))
    whole = means_of(replace(args, steps=1_000_000), later)
    means = {name: found for name, found in whole.items() if name[0] == "blpo"}
    rows = []
    for name, score in scores(means).items():
        rows.append([name[1], f"{score:.2f}", *(f"{means[name][env]:,.0f}" for env in ENVIRONMENTS)])
    return markdown(["number", "score", *ENVIRONMENTS], rows)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    args = parse_args(Args, __doc__, argv)
    print({"table": table, "factors": factors, "endings": endings}[args.action](args))


if __name__ == "__main__":
    main()
