"""The statistics of the deep runs, and their Markdown tables.

Seeds are the unit. Intervals are 95 %: Student's t for the mean of a cell, Welch's for differences of means,
bootstrap over seeds for aggregates. Aggregates normalise a return by the environment: 0 is where runs begin,
1 is the final mean of the reference, a PPO. IQM is the mean of the middle half; P(BLPO > x) counts pairs of
runs.

A summary is the list of the lines of summary.csv (see results.py); `finals` are its final returns by (env_id,
exp_name), each of shape (seeds,), as `results.grouped` returns them.
"""

import warnings
from typing import NamedTuple

import numpy as np
import scipy.stats

from tools.results import column_of, grouped, label

OVERVIEW_METHODS = ("ppo", "ppo-tuned", "ppo-matched", "nested-tuned", "nested", "mean-c", "blpo")

# The PPO that is the scale of aggregates and has a column of its own beside BLPO: the first that is there
REFERENCES = ("ppo-tuned", "ppo-matched", "ppo")

RESAMPLES = 10_000  # of a bootstrap: ends of intervals of P then vary by about 0.003


class Estimate(NamedTuple):
    """A statistic and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


# Statistics


def beats(x, y) -> np.ndarray:
    """P(X > Y) over all pairs of the returns x (..., m) and y (..., n), ties counted half: (...)."""
    x, y = np.asarray(x)[..., :, None], np.asarray(y)[..., None, :]
    return ((x > y) + 0.5 * (x == y)).mean((-2, -1))


def half_width(returns) -> float:
    """Half of Student's 95 % interval of the mean of at least two returns."""
    return float(scipy.stats.t.ppf(0.975, len(returns) - 1) * scipy.stats.sem(returns))


def bootstrap(finals, statistic) -> tuple[float, float]:
    """95 % interval of statistic(finals) when the seeds of every group are drawn again, with replacement.

    statistic maps a dictionary like finals, of arrays (RESAMPLES, seeds), to an array (RESAMPLES,). The draws
    are the same in every call with the same finals.
    """
    rng = np.random.default_rng(0)
    drawn = {name: rng.choice(returns, (RESAMPLES, len(returns))) for name, returns in finals.items()}
    low, high = np.nanpercentile(statistic(drawn), [2.5, 97.5])
    return float(low), float(high)


def estimate(finals, statistic) -> Estimate:
    """statistic(finals) with its bootstrap interval."""
    return Estimate(float(statistic(finals)), *bootstrap(finals, statistic))


def reference(finals) -> str:
    """The exp_name of the method of REFERENCES that finals, or anything else by (env_id, exp_name), has."""
    there = {method for _, method in finals}
    return next((method for method in REFERENCES if method in there), REFERENCES[-1])


def environments_with_scale(finals, start) -> set[str]:
    """Those in which the reference learns, by the mean of at least two runs: without it there is no scale
    for the others."""
    ppo = {env_id: returns for (env_id, name), returns in finals.items() if name == reference(finals)}
    return {env_id for env_id, returns in ppo.items() if len(returns) > 1 and returns.mean() > start[env_id]}


def normalised(finals, method: str, environments, start) -> dict:
    """A method's part of finals on the scale on which 0 is where the runs of an environment begin and 1 is
    the mean of the reference.

    start: return where runs begin, by environment. KeyError if an environment lacks it, the method or the
    reference.
    """
    unit = {env_id: finals[env_id, reference(finals)].mean() - start[env_id] for env_id in environments}
    return {(env, method): (finals[env, method] - start[env]) / unit[env] for env in environments}


def iqm(returns) -> np.ndarray:
    """Interquartile mean of several groups of runs, arrays (..., seeds), taken together: (...)."""
    return scipy.stats.trim_mean(np.concatenate(list(returns), axis=-1), 0.25, axis=-1)


def iqm_difference(finals, method: str, environments, start, ours: str = "blpo") -> Estimate:
    """Interquartile mean of our runs minus that of the method's, both normalised, all environments taken
    together."""
    used = {}
    for name in (ours, method):
        used |= normalised(finals, name, environments, start)

    def statistic(drawn):
        means = [iqm(drawn[env_id, name] for env_id in environments) for name in (ours, method)]
        return means[0] - means[1]

    return estimate(used, statistic)


def chance_of_improvement(finals, method: str, environments, ours: str = "blpo") -> Estimate:
    """P(ours > method), counted in pairs of runs in each environment, mean over the environments."""

    def statistic(returns):
        shares = [beats(returns[env_id, ours], returns[env_id, method]) for env_id in environments]
        return np.mean(shares, axis=0)

    used = {
        (env_id, name): values
        for (env_id, name), values in finals.items()
        if env_id in environments and name in (method, ours)
    }
    return estimate(used, statistic)


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


def welch(ours, theirs) -> tuple[float, float]:
    """Welch's 95 % interval of the difference of two means."""
    with warnings.catch_warnings():  # one of them may have no spread
        warnings.simplefilter("ignore", RuntimeWarning)
        return tuple(scipy.stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval())


def ahead_cells(blpo, other, decimals: int) -> tuple[str, str]:
    """Welch's interval of the difference of the means, and P(BLPO > other).

    Both are empty where the seeds tell nothing: fewer than two of either, or the same return in all runs.
    """
    if min(len(other), len(blpo)) < 2 or np.ptp([*other, *blpo]) == 0:
        return "", ""
    low, high = welch(blpo, other)
    return f"{number(low, decimals)} to {number(high, decimals)}", f"{beats(blpo, other):.2f}"


def overview(summary) -> str:
    """Markdown: a line per environment that has BLPO and the reference; empty if there is none."""
    finals = grouped(summary)
    ppo = reference(finals)
    present = {method for _, method in finals}
    methods = [method for method in OVERVIEW_METHODS if method in present]
    rows = []
    for env_id in dict.fromkeys(env_id for env_id, _ in finals):
        if (env_id, "blpo") not in finals or (env_id, ppo) not in finals:
            continue
        decimals = decimals_for(finals, env_id)
        means = [
            mean_cell(finals[env_id, method], decimals) if (env_id, method) in finals else ""
            for method in methods
        ]
        ahead = ahead_cells(finals[env_id, "blpo"], finals[env_id, ppo], decimals)
        rows.append([env_id, *means, *ahead])
    if not rows:
        return ""
    titles = [label(method) for method in methods]
    return markdown(["environment", *titles, f"BLPO minus {label(ppo)}", f"P(BLPO > {label(ppo)})"], rows)


def table(summary) -> str:
    """Markdown: a line per environment and method, final training returns and how far BLPO is ahead."""
    finals = grouped(summary)
    rows = []
    for (env_id, method), returns in finals.items():
        decimals = decimals_for(finals, env_id)
        ahead = "", ""
        if method != "blpo":
            ahead = ahead_cells(finals.get((env_id, "blpo"), []), returns, decimals)
        each_seed = ", ".join(number(value, decimals) for value in returns)
        evaluation = number(column_of(summary, (env_id, method), "eval_return").mean(), decimals)
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


def policies(curves) -> str:
    """Markdown: how far an update moves the policy and what is left of its entropy, of runs that tell both,
    by medians over the rows of a run and means over seeds; empty if none does.

    curves: as load_curves returns them.
    """
    rows = []
    for (env_id, method), runs in curves.items():
        if not all({"approx_kl", "entropy"} <= run.keys() for run in runs):
            continue
        moved = np.mean([np.nanmedian(run["approx_kl"]) for run in runs])
        first, last = (np.mean([run["entropy"][i] for run in runs]) for i in (0, -1))
        rows.append([env_id, label(method), len(runs), f"{moved:.3f}", f"{first:.1f}", f"{last:.1f}"])
    if not rows:
        return ""
    moves = ["KL of an update, median", "entropy, first update", "entropy, last update"]
    return markdown(["environment", "method", "seeds", *moves], rows)


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


def all_tables(summary) -> str:
    """The tables of returns, with an empty line between them."""
    parts = [overview(summary), table(summary), fewer_seeds(summary)]
    return "\n\n".join(part for part in parts if part)
