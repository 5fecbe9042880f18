"""The statistics of the deep runs, and their Markdown tables.

Seeds are the unit. Intervals are 95 %: Student's t for the mean of a cell, Welch's for differences of means,
bootstrap over seeds for aggregates. Aggregates normalise a return by the environment: 0 is where runs begin,
1 is the final mean of "PPO, matched". IQM is the mean of the middle half; P(BLPO > x) counts pairs of runs.

A summary is the list of the lines of summary.csv (see results.py); `finals` are its final returns by (env_id,
exp_name), each of shape (seeds,), as `results.grouped` returns them.
"""

import warnings
from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy.stats

from tools.results import grouped, label, method_order

OVERVIEW_METHODS = ("ppo", "ppo-matched", "nested", "blpo")


class Estimate(NamedTuple):
    """A statistic and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


@dataclass
class Aggregate:
    """A method over several environments; the fields of a comparison with BLPO are None for BLPO itself."""

    environments: tuple[str, ...]
    """those that have at least two seeds each of the method, of BLPO and of PPO, matched"""
    iqm: Estimate
    """interquartile mean of the method's normalised returns"""
    blpo: Estimate | None = None
    """BLPO's interquartile mean on the same environments"""
    chance: Estimate | None = None
    """P(BLPO > method), mean over the environments"""


# Statistics


def beats(x, y) -> float:
    """P(X > Y) over all pairs of the returns x, of shape (m,), and y, of shape (n,), ties counted half."""
    return float(np.mean((x[:, None] > y) + 0.5 * (x[:, None] == y)))


def half_width(returns) -> float:
    """Half of Student's 95 % interval of the mean of at least two returns."""
    return float(scipy.stats.t.ppf(0.975, len(returns) - 1) * scipy.stats.sem(returns))


def bootstrap(finals, statistic, resamples=2000) -> tuple[float, float]:
    """95 % interval of statistic(finals) when the seeds of every group are drawn again, with replacement.

    statistic maps a dictionary like finals to a number. The draws are the same in every call with the same
    finals.
    """
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(resamples):
        draws.append(statistic({name: rng.choice(returns, len(returns)) for name, returns in finals.items()}))
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return float(low), float(high)


def estimate(finals, statistic) -> Estimate:
    """statistic(finals) with its bootstrap interval."""
    return Estimate(float(statistic(finals)), *bootstrap(finals, statistic))


def environments_with_scale(finals, start) -> set[str]:
    """Those in which "PPO, matched" learns, by the mean of at least two runs: without it there is no scale
    for the others."""
    ppo = {env_id: returns for (env_id, name), returns in finals.items() if name == "ppo-matched"}
    return {env_id for env_id, returns in ppo.items() if len(returns) > 1 and returns.mean() > start[env_id]}


def normalised(finals, method: str, environments, start) -> dict:
    """A method's part of finals on the scale on which 0 is where the runs of an environment begin and 1 is
    the mean of "PPO, matched".

    start: return where runs begin, by environment. KeyError if an environment lacks it, the method or
    "ppo-matched".
    """
    unit = {env_id: finals[env_id, "ppo-matched"].mean() - start[env_id] for env_id in environments}
    return {(env, method): (finals[env, method] - start[env]) / unit[env] for env in environments}


def iqm(returns) -> float:
    """Interquartile mean of several groups of runs taken together."""
    return float(scipy.stats.trim_mean(np.concatenate(list(returns)), 0.25))


def normalised_iqm(finals, method: str, environments, start) -> Estimate:
    """Interquartile mean of a method's normalised returns, all runs on the environments taken together."""
    return estimate(normalised(finals, method, environments, start), lambda drawn: iqm(drawn.values()))


def chance_of_improvement(finals, method: str, environments) -> Estimate:
    """P(BLPO > method), counted in pairs of runs in each environment, mean over the environments."""

    def statistic(returns):
        return np.mean([beats(returns[env_id, "blpo"], returns[env_id, method]) for env_id in environments])

    used = {
        (env_id, name): values
        for (env_id, name), values in finals.items()
        if env_id in environments and name in (method, "blpo")
    }
    return estimate(used, statistic)


def aggregate(summary, start: dict[str, float]) -> dict[str, Aggregate]:
    """An Aggregate per method, in the order of tables.

    A group with a single seed has no interval and does not count.
    start: return where runs begin, by environment, as from `results.starting_returns`; KeyError if one is
    missing. Where BLPO has several environments, a method that shares only one of them is left out: that is
    no aggregate.
    """
    finals = {name: returns for name, returns in grouped(summary).items() if len(returns) > 1}
    scaled = environments_with_scale(finals, start)
    least = min(2, sum(method == "blpo" for _, method in finals))
    blpo_iqm = {}  # by environments: many methods share theirs, and a bootstrap takes a while
    result = {}
    for method in sorted({method for _, method in finals}, key=method_order):
        environments = tuple(
            env_id
            for env_id, name in finals
            if name == method and (env_id, "blpo") in finals and env_id in scaled
        )
        if not environments or len(environments) < least:
            continue
        if environments not in blpo_iqm:
            blpo_iqm[environments] = normalised_iqm(finals, "blpo", environments, start)
        if method == "blpo":
            result[method] = Aggregate(environments, iqm=blpo_iqm[environments])
        else:
            result[method] = Aggregate(
                environments,
                iqm=normalised_iqm(finals, method, environments, start),
                blpo=blpo_iqm[environments],
                chance=chance_of_improvement(finals, method, environments),
            )
    return result


# Text


def markdown(head, rows) -> str:
    """A Markdown table of a list of column titles and rows of cells, which may be numbers."""
    lines = ["| " + " | ".join(str(cell) for cell in cells) + " |" for cells in [head, *rows]]
    lines.insert(1, "|" + "---|" * len(head))
    return "\n".join(lines)


def decimals_for(finals, env_id: str) -> int:
    """Decimals with which an environment's returns are shown: none where they reach 1,000."""
    largest = max(np.abs(returns).max() for (env, _), returns in finals.items() if env == env_id)
    return 0 if largest >= 1000 else 1


def number(value: float, decimals: int) -> str:
    """A return as text, thousands set apart by commas."""
    return f"{value:,.{decimals}f}"


def mean_cell(returns, decimals: int) -> str:
    """Mean of the seeds, and half of its 95 % interval where there are several."""
    if len(returns) == 1:
        return number(returns.mean(), decimals)
    return f"{number(returns.mean(), decimals)} ± {number(half_width(returns), decimals)}"


def ahead_cells(blpo, other, decimals: int) -> tuple[str, str]:
    """Welch's interval of the difference of the means, and P(BLPO > other).

    Both are empty where the seeds tell nothing: fewer than two of either, or no spread at all.
    """
    if min(len(other), len(blpo)) < 2 or np.std(other) + np.std(blpo) == 0:
        return "", ""
    with warnings.catch_warnings():  # one of them may have no spread
        warnings.simplefilter("ignore", RuntimeWarning)
        interval = scipy.stats.ttest_ind(blpo, other, equal_var=False).confidence_interval()
    return (
        f"{number(interval.low, decimals)} to {number(interval.high, decimals)}",
        f"{beats(blpo, other):.2f}",
    )


def overview(summary) -> str:
    """Markdown: a line per environment that has BLPO and "PPO, matched"; empty if there is none."""
    finals = grouped(summary)
    present = {method for _, method in finals}
    methods = [method for method in OVERVIEW_METHODS if method in present]
    rows = []
    for env_id in dict.fromkeys(env_id for env_id, _ in finals):
        if (env_id, "blpo") not in finals or (env_id, "ppo-matched") not in finals:
            continue
        decimals = decimals_for(finals, env_id)
        means = [
            mean_cell(finals[env_id, method], decimals) if (env_id, method) in finals else ""
            for method in methods
        ]
        ahead = ahead_cells(finals[env_id, "blpo"], finals[env_id, "ppo-matched"], decimals)
        rows.append([env_id, *means, *ahead])
    if not rows:
        return ""
    titles = [label(method) for method in methods]
    return markdown(["environment", *titles, "BLPO minus PPO, matched", "P(BLPO > PPO)"], rows)


def table(summary) -> str:
    """Markdown: a line per environment and method, final training returns and how far BLPO is ahead."""
    finals = grouped(summary)
    evaluations = defaultdict(list)
    for row in summary:
        evaluations[row["env_id"], row["exp_name"]].append(float(row["eval_return"]))
    rows = []
    for (env_id, method), returns in finals.items():
        decimals = decimals_for(finals, env_id)
        ahead = "", ""
        if method != "blpo":
            ahead = ahead_cells(finals.get((env_id, "blpo"), []), returns, decimals)
        each_seed = ", ".join(number(value, decimals) for value in returns)
        evaluation = number(np.mean(evaluations[env_id, method]), decimals)
        mean = mean_cell(returns, decimals)
        rows.append([env_id, label(method), len(returns), mean, *ahead, each_seed, evaluation])
    head = [
        "environment",
        "method",
        "seeds",
        "return, last 100 training episodes",
        "BLPO minus this",
        "P(BLPO > this)",
        "each seed",
        "deterministic evaluation",
    ]
    return markdown(head, rows)


def fewer_seeds(summary) -> str:
    """A line that names the groups with fewer seeds than the largest has; empty if there are none."""
    finals = grouped(summary)
    most = max((len(returns) for returns in finals.values()), default=0)
    few = [
        f"{env_id} {label(method)} ({len(returns)})"
        for (env_id, method), returns in finals.items()
        if len(returns) < most
    ]
    return f"fewer seeds than others: {', '.join(few)}" if few else ""


def aggregate_table(result: dict[str, Aggregate]) -> str:
    """Markdown: a line per method of what `aggregate` returned; empty if that is empty."""
    if not result:
        return ""
    rows = []
    for method, values in result.items():
        comparison = [values.blpo or "", values.chance or ""]
        rows.append([f"{label(method)} ({len(values.environments)})", values.iqm, *comparison])
    head = [
        "over the environments that have all of BLPO, PPO matched and the method",
        "IQM of normalised returns",
        "BLPO's there",
        "P(BLPO > this)",
    ]
    return markdown(head, rows)


def all_tables(summary, result: dict[str, Aggregate]) -> str:
    """All tables of the deep runs, with an empty line between them. result: as from `aggregate`."""
    parts = [overview(summary), table(summary), fewer_seeds(summary), aggregate_table(result)]
    return "\n\n".join(part for part in parts if part)
