r"""A search over minibatches, step sizes and so on, the same for PPO, nesting and BLPO.

Configuration 0 is what the scripts had as defaults before the search. Numbers 1 to 24 are drawn once, by a
seed, so that every level of a factor is in equally many of them.

    python tools/tuning.py commands --seeds 101 | xargs -d "\n" -P 2 -I {} sh -c {}
    python tools/tuning.py collect    # results/tuning.csv, a line per finished run
    python tools/tuning.py table      # configurations by their score, best first
    python tools/tuning.py factors --seeds 101    # mean scores of the levels of every factor

The commands are for the scripts of commit 29a3403, which could still make minibatches of whole windows. Runs
that are in the folder or in the CSV file are not started again. The score of a configuration is the mean
over environments of its mean return there divided by the mean of all runs there, of whatever method. Only
configurations are compared that have been run with the same seeds.
"""

import shlex
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import tyro

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import results
from tools.learning import area
from tools.tables import markdown

ENVIRONMENTS = ("Walker2d-v4", "Hopper-v4", "HalfCheetah-v4")
METHODS = ("ppo", "nested", "blpo")
ROLLOUT = 2048  # steps, of every configuration
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


def flags_of(method: str, chosen: Configuration) -> list[str]:
    """The flags of a script for a configuration."""
    lengths = {"one window": chosen.minibatch, "windows of 32": 32, "windows of 16": 16, "steps": 256}
    length = lengths[chosen.of]
    flags = ["--num-envs", ROLLOUT // length, "--num-steps", length]
    flags += ["--num-minibatches", ROLLOUT // chosen.minibatch, "--update-epochs", chosen.epochs]
    flags += ["--actor-lr", chosen.actor_lr, "--clip-coef", chosen.clip]
    if method != "ppo":
        flags += ["--nested-critic-steps", chosen.nested_critic_steps]
        flags += ["--minibatches", "steps"] if chosen.of == "steps" else []
        flags += ["--ihvp", "none"] if method == "nested" else []
    else:
        flags += [] if chosen.of == "steps" else ["--trajectory-minibatches"]
        if chosen.critic == "separate":
            flags += ["--critic-lr", 1e-3, "--no-clip-vloss", "--vf-coef", 2, "--no-joint-grad-clip"]
        else:
            flags += ["--critic-lr", chosen.actor_lr]
    return [str(flag) for flag in flags]


@dataclass
class Args:
    action: tyro.conf.Positional[Literal["commands", "collect", "table", "factors"]]
    """commands: print what is left to run; collect: finished runs into the CSV file; table: print it;
    factors: print the mean score of every level of every factor"""
    runs_dir: Path = Path("runs-tuning")
    """folder of the run folders"""
    csv: Path = Path("results/tuning.csv")
    """a line per run"""
    seeds: tuple[int, ...] = (101, 102)
    """of the commands, and runs that the table counts: configurations that lack one of them are left out"""
    methods: tuple[Literal["ppo", "nested", "blpo"], ...] = METHODS
    """of the commands"""
    only: tuple[int, ...] = tuple(range(CONFIGURATIONS + 1))
    """numbers of configurations, of the commands"""
    steps: int = 300_000
    """environment steps of a run, of the 1,000,000 over which step sizes anneal"""


NAME = ("method", "configuration", "env_id", "seed", "steps")  # columns that name a run


def known_runs(args: Args) -> dict[tuple[str, ...], dict]:
    """The rows of the CSV file, if there is one, by what names them."""
    rows = results.read_csv(args.csv) if args.csv.exists() else []
    return {tuple(row[column] for column in NAME): row for row in rows}


def commands(args: Args) -> list[str]:
    """Shell commands of the runs that have not been finished, seeds outermost."""
    there = {path.parent.name.rsplit("__", 1)[0] for path in args.runs_dir.glob("*/evaluation.csv")}
    known = known_runs(args)
    python = [sys.executable, "-u"]
    every = configurations()
    found = []
    for seed in args.seeds:
        for number in args.only:
            for method in args.methods:
                for env_id in ENVIRONMENTS:
                    name = f"{method}-{number}"
                    collected = (method, str(number), env_id, str(seed), str(args.steps)) in known
                    if collected or f"{env_id}__{name}__{seed}" in there:
                        continue
                    script = "ppo_continuous.py" if method == "ppo" else "blpo_continuous.py"
                    run = [*python, script, "--env-id", env_id, "--exp-name", name, "--seed", str(seed)]
                    run += ["--total-timesteps", str(args.steps), "--anneal-timesteps", "1000000"]
                    run += ["--eval-episodes", "1", "--runs-dir", str(args.runs_dir)]
                    found.append(shlex.join([*run, *flags_of(method, every[number])]) + " > /dev/null")
    return found


def collect(args: Args) -> None:
    """Adds finished runs to the CSV file: what was measured, then the configuration."""
    every = configurations()
    rows = known_runs(args)
    for folder, config in results.run_folders(args.runs_dir):
        if not results.is_finished(folder, proof="evaluation.csv"):
            continue
        progress = results.read_csv(folder / "progress.csv")
        evaluation = results.read_csv(folder / "evaluation.csv")
        row = results.summary_row(config, progress[-1], evaluation)
        columns = ("global_step", "return_100")
        curve = {column: np.array([float(point[column]) for point in progress]) for column in columns}
        steps = config["flags"]["total_timesteps"]
        method, number = row["exp_name"].split("-")
        measured = {"method": method, "configuration": int(number), "env_id": row["env_id"]}
        measured |= {"seed": row["seed"], "steps": steps, "area": round(area(curve, steps), 2)}
        measured |= {"return_100": row["return_100"], "sps": row["sps"]} | every[int(number)]._asdict()
        rows[tuple(str(measured[column]) for column in NAME)] = measured
    order = sorted(rows, key=by_number)
    results.write_csv(args.csv, [rows[name] for name in order])


def by_number(name: tuple[str, ...]):
    """Sorting key of what names a run."""
    method, number, env_id, seed, steps = name
    return method, int(number), env_id, int(seed), int(steps)


def means_of(args: Args) -> dict[tuple[str, int], dict[str, float]]:
    """By method and configuration the mean return in each environment, of those that have all seeds."""
    returns = defaultdict(lambda: defaultdict(list))
    for row in results.read_csv(args.csv):
        if int(row["steps"]) == args.steps and int(row["seed"]) in args.seeds:
            returns[row["method"], int(row["configuration"])][row["env_id"]].append(float(row["return_100"]))
    return {
        name: {env: float(np.mean(found[env])) for env in ENVIRONMENTS}
        for name, found in returns.items()
        if all(len(found[env]) == len(args.seeds) for env in ENVIRONMENTS)
    }


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
    if not means:
        sys.exit(f"error: {args.csv} has no configuration with the seeds {args.seeds} in all environments")
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


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    args = tyro.cli(Args, args=argv, description=__doc__)
    if args.action == "commands":
        print("\n".join(commands(args)))
    elif args.action == "collect":
        collect(args)
    elif args.action == "factors":
        print(factors(args))
    else:
        print(table(args))


if __name__ == "__main__":
    main()
