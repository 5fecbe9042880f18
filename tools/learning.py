"""How fast runs learn: areas under their curves, steps to a return, and what seeds say about a difference.

Every measure is a dictionary by (env_id, exp_name) of arrays (seeds,), larger is better:

    AUC, AUC25    mean of return_100 over 1,000 evenly spaced steps from 0 to the end of the budget, or to a
                  quarter of it. Until the first episode has ended it counts as its first value
    steps         minus the steps until return_100 is half way from where runs begin to the final mean of
                  the PPO that is the reference (see tables.py); minus infinity where it never is
    final         return_100 at the end

A run's budget is what its step sizes are annealed over: a run that ends early has no AUC and no final return.
Curves are as results.load_curves returns them, a summary is the list of the lines of summary.csv. Run as a
program it makes the tests of docs/results.md, A (and with other flags those of C and D):

    python tools/learning.py --results-dir results/quarter
"""

import json
import math
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import scipy.stats

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support.flags import fail, parse_args
from tools.results import grouped, has_return, label, load_results, method_order, run_order
from tools.results import starting_returns
from tools.tables import Estimate, beats, chance_of_improvement, environments_with_scale
from tools.tables import iqm_difference, markdown, reference

POINTS = 1000
MEASURES = {
    "AUC25": "AUC, first quarter",
    "AUC": "AUC",
    "steps": "steps to half way",
    "final": "final return",
}


def area(curve: dict, until: int) -> float:
    """Mean of return_100 over the steps from 0 to `until`; NaN where no episode ended by then, or the run is
    too short by more than the rounding to whole rollouts, a row of the curve."""
    finite = np.isfinite(curve["return_100"])
    row = np.diff(curve["global_step"], prepend=0).max()
    if not finite.any() or curve["global_step"][finite][0] > until or curve["global_step"][-1] + row <= until:
        return np.nan
    steps = np.linspace(0, until, POINTS + 1)[1:]
    return float(np.interp(steps, curve["global_step"][finite], curve["return_100"][finite]).mean())


def steps_to(curve: dict, level: float) -> float:
    """Steps until return_100 is at least `level`, interpolated; infinity where it never is."""
    finite = np.isfinite(curve["return_100"])
    steps, returns = curve["global_step"][finite], curve["return_100"][finite]
    above = np.flatnonzero(returns >= level)
    if len(above) == 0:
        return np.inf
    i = above[0]
    if i == 0:
        return float(steps[0])
    share = (level - returns[i - 1]) / (returns[i] - returns[i - 1])
    return float(steps[i - 1] + share * (steps[i] - steps[i - 1]))


def budget(row: dict) -> int:
    """The steps over which the step sizes of a run are annealed, by its line of the summary."""
    flags = json.loads(row["flags"])
    return int(flags.get("anneal_timesteps") or flags["total_timesteps"])


def is_whole(row: dict) -> bool:
    """Whether a run has used its budget, which is rounded down to whole rollouts."""
    return budget(row) == json.loads(row["flags"])["total_timesteps"]


def measures(summary: list[dict], curves) -> dict[str, dict]:
    """Every measure of MEASURES that some run has, by its name."""
    rows = defaultdict(list)
    for row in sorted(summary, key=run_order):  # as load_curves does
        rows[row["env_id"], row["exp_name"]].append(row)
    start = starting_returns(curves)
    finals = grouped([row for row in summary if is_whole(row)])
    found = {name: {} for name in MEASURES}
    for group, runs in curves.items():
        env_id = group[0]
        pairs = list(zip(rows[group], runs, strict=True))
        found["AUC25"][group] = [area(curve, budget(row) // 4) for row, curve in pairs]
        if not all(is_whole(row) and has_return(row) for row in rows[group]):
            continue  # all measures are of the same runs
        found["AUC"][group] = [area(curve, budget(row)) for row, curve in pairs]
        found["final"][group] = finals[group]
        if (env_id, reference(finals)) in finals:
            level = (start[env_id] + finals[env_id, reference(finals)].mean()) / 2
            found["steps"][group] = [-steps_to(curve, level) for curve in runs]
    for name, groups in found.items():
        arrays = {group: np.array(values, dtype=float) for group, values in groups.items()}
        found[name] = {group: values for group, values in arrays.items() if not np.isnan(values).any()}
    return {name: groups for name, groups in found.items() if groups}


def shared_environments(values, *methods: str) -> tuple[str, ...]:
    """Those with at least two seeds of every one of the methods."""
    there = dict.fromkeys(env_id for env_id, _ in values)
    return tuple(env for env in there if all(len(values.get((env, name), ())) > 1 for name in methods))


def permutation_p(values, first: str, second: str, environments) -> float:
    """Two-sided p value of the mean over environments of P(first > second), where the labels of the runs of
    an environment could as well be others: exact, over all ways to give them."""
    pairs = [(values[env_id, first], values[env_id, second]) for env_id in environments]
    unit = math.lcm(*(2 * len(x) * len(y) for x, y in pairs))  # of P: 1 / unit
    chances = np.ones(1)  # of the sums over environments
    observed = 0
    for x, y in pairs:
        wins = round(2 * len(x) * len(y) * beats(x, y))
        step = unit // (2 * len(x) * len(y))
        before, chances = chances, np.zeros(len(chances) + unit)
        for k, chance in enumerate(chances_of_wins(np.concatenate([x, y]), len(x))):
            chances[k * step :][: len(before)] += chance * before
        observed += step * wins
    even = len(pairs) * unit // 2
    as_far = np.abs(np.arange(len(chances)) - even) >= abs(observed - even)
    return min(1.0, float(chances[as_far].sum()))


def chances_of_wins(returns, m: int) -> np.ndarray:
    """How probable it is that m of n returns, chosen at random, win k / 2 of their pairs with the others, a
    tie being half a win: (2 m (n - m) + 1,), by k."""
    ranks = np.rint(2 * scipy.stats.rankdata(returns)).astype(int)
    ways = np.zeros((m + 1, ranks.sum() + 1))  # to choose so many, with such a sum of doubled ranks
    ways[0, 0] = 1
    for rank in ranks:
        ways[1:, rank:] += ways[:-1, :-rank].copy()
    fewest = m * (m + 1)  # the sum if they win nothing (Mann and Whitney's U is half of what is above it)
    counts = ways[m, fewest : fewest + 2 * m * (len(returns) - m) + 1]
    return counts / counts.sum()


def holm(ps: list[float]) -> list[float]:
    """p values of several hypotheses, adjusted so that all of them may be looked at (Holm, 1979)."""
    order = np.argsort(ps)
    factors = np.arange(len(ps), 0, -1)
    adjusted = np.empty(len(ps))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(np.array(ps)[order] * factors))
    return adjusted.tolist()


class Comparison(NamedTuple):
    """A method of ours, BLPO or a variant, and another method by one measure."""

    environments: int
    chance: Estimate  # P(ours better)
    p: float
    difference: Estimate | None  # of the interquartile means; None where there is no scale for it


def compare(values, start, method: str, ours: str = "blpo") -> Comparison | None:
    """None where no environment has two seeds of both. Without start, returns where runs begin by
    environment, there is no difference."""
    environments = shared_environments(values, ours, method)
    if not environments:
        return None
    difference = None
    if start and set(environments) <= environments_with_scale(values, start):
        difference = iqm_difference(values, method, environments, start, ours)
    chance = chance_of_improvement(values, method, environments, ours)
    p = permutation_p(values, ours, method, environments)
    return Comparison(len(environments), chance, p, difference)


def comparisons(measured, curves) -> dict[str, dict[str, Comparison]]:
    """BLPO against every other method that can be compared, by measure and method. measured: as `measures`
    returns it."""
    start = starting_returns(curves)
    found = {}
    for name, values in measured.items():
        scale = None if name == "steps" else start  # steps may be infinite
        methods = sorted({method for _, method in values} - {"blpo"}, key=method_order)
        compared = {method: compare(values, scale, method) for method in methods}
        found[name] = {method: comparison for method, comparison in compared.items() if comparison}
    return {name: compared for name, compared in found.items() if compared}


def table(compared: dict[str, dict[str, Comparison]]) -> str:
    """Markdown of what `comparisons` returned; empty if that is empty."""
    rows = []
    for measure, methods in compared.items():
        for method, found in methods.items():
            who = f"{label(method)} ({found.environments})"
            rows.append([MEASURES[measure], who, found.chance, f"{found.p:.2g}", found.difference or ""])
    if not rows:
        return ""
    head = ["measure", "BLPO against (environments)", "P(BLPO better)", "permutation p", "difference of IQMs"]
    return markdown(head, rows)


def without_area(measured, curves) -> str:
    """A line that names the groups that have no area; empty if there are none."""
    there = measured.get("AUC25", {})
    missing = [f"{env_id} {label(method)}" for env_id, method in curves if (env_id, method) not in there]
    if not missing:
        return ""
    return "no area, since a run has no episode so early or ends before: " + ", ".join(missing)


@dataclass
class Args:
    results_dir: Path = Path("results")
    """folder of the per-seed CSV files"""
    measures: tuple[Literal["AUC25", "AUC", "steps", "final"], ...] = ("AUC25",)
    """what runs are compared by"""
    method: str = "blpo"
    """the method that is compared with others"""
    against: tuple[str, ...] = ("ppo-matched", "nested", "mean-c")
    """the others, each by a hypothesis of its own"""


def main(argv: list[str] | None = None) -> None:
    """Prints by every measure the tests of P(--method > other) = 0.5 for every other of --against. Holm's
    correction is over these."""
    args = parse_args(Args, __doc__, argv)
    summary, curves = load_results(args.results_dir)
    measured = measures(summary, curves)
    rows = []
    for measure in args.measures:
        values = measured.get(measure, {})
        compared = {other: compare(values, None, other, args.method) for other in args.against}
        if absent := [other for other, comparison in compared.items() if comparison is None]:
            what = f"of {args.method} and of {', '.join(absent)} to compare by {measure}"
            fail(f"{args.results_dir} has no two seeds {what}")
        adjusted = holm([comparison.p for comparison in compared.values()])
        for (other, comparison), p in zip(compared.items(), adjusted):
            both = args.method, other
            used = shared_environments(values, *both)
            runs = " and ".join(str(sum(len(values[env, name]) for env in used)) for name in both)
            value, low, high = comparison.chance
            chance = [f"{value:.3f}", f"{low:.3f} to {high:.3f}"]
            ps = [f"{comparison.p:.2g}", f"{p:.2g}"]
            rows.append([MEASURES[measure], other, comparison.environments, runs, *chance, *ps])
    against = f"{label(args.method)} against"
    head = ["measure", against, "environments", "runs", "P", "95 % interval", "p", "p, Holm"]
    print(markdown(head, rows))
    if missing := without_area(measured, curves):
        print(missing)


if __name__ == "__main__":
    main()
