"""How fast runs learn: areas under their curves, steps to a return, and what seeds say about a difference.

Every measure is a dictionary by (env_id, exp_name) of arrays (seeds,), larger is better:

    AUC, AUC25    mean of return_100 over 1,000 evenly spaced steps from 0 to the end of the budget, or to a
                  quarter of it. Until the first episode has ended it counts as its first value
    steps         minus the steps until return_100 is half way from where runs begin to the final mean of
                  "PPO, matched"; minus infinity where it never is
    final         return_100 at the end

A run's budget is what its step sizes are annealed over: a run that ends early has no AUC and no final return.
Curves are as results.load_curves returns them, a summary is the list of the lines of summary.csv.
"""

import json
from collections import defaultdict

import numpy as np
import scipy.stats

from tools.results import grouped, label, method_order, run_order, starting_returns
from tools.tables import Estimate, beats, estimate, markdown

POINTS = 1000
DRAWS = 100_000  # of a permutation test
MEASURES = {
    "AUC25": "AUC, first quarter",
    "AUC": "AUC",
    "steps": "steps to half way",
    "final": "final return",
}


def area(curve: dict, until: int) -> float:
    """Mean of return_100 over the steps from 0 to `until`; NaN where no episode ended by then."""
    finite = np.isfinite(curve["return_100"])
    if not finite.any() or curve["global_step"][finite][0] > until:
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
    return flags.get("anneal_timesteps") or flags["total_timesteps"]


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
        if not all(is_whole(row) for row in rows[group]) or group not in finals:
            continue
        found["AUC"][group] = [area(curve, budget(row)) for row, curve in pairs]
        found["final"][group] = finals[group]
        if (env_id, "ppo-matched") in finals:
            level = (start[env_id] + finals[env_id, "ppo-matched"].mean()) / 2
            found["steps"][group] = [-steps_to(curve, level) for curve in runs]
    for name, groups in found.items():
        arrays = {group: np.array(values, dtype=float) for group, values in groups.items()}
        found[name] = {group: values for group, values in arrays.items() if not np.isnan(values).any()}
    return {name: groups for name, groups in found.items() if groups}


def shared_environments(values, *methods: str) -> tuple[str, ...]:
    """Those with at least two seeds of every one of the methods."""
    there = dict.fromkeys(env_id for env_id, _ in values)
    return tuple(env for env in there if all(len(values.get((env, name), ())) > 1 for name in methods))


def chance(values, first: str, second: str, environments) -> Estimate:
    """P(first > second), counted in pairs of runs in each environment, mean over the environments."""
    used = {(env, method): values[env, method] for env in environments for method in (first, second)}

    def statistic(drawn):
        return np.mean([beats(drawn[env, first], drawn[env, second]) for env in environments])

    return estimate(used, statistic)


def iqm_difference(values, start, first: str, second: str, environments) -> Estimate:
    """Interquartile mean of the first method's runs minus that of the second's, where 0 is where the runs of
    an environment begin and 1 is the mean of "PPO, matched" in the same measure."""
    used = {}
    for env_id in environments:
        unit = values[env_id, "ppo-matched"].mean() - start[env_id]
        for method in (first, second):
            used[env_id, method] = (values[env_id, method] - start[env_id]) / unit

    def statistic(drawn):
        runs = {name: [drawn[env_id, name] for env_id in environments] for name in (first, second)}
        means = {name: scipy.stats.trim_mean(np.concatenate(values), 0.25) for name, values in runs.items()}
        return means[first] - means[second]

    return estimate(used, statistic)


def permutation_p(values, first: str, second: str, environments, draws: int = DRAWS) -> float:
    """Two-sided p value of the mean over environments of P(first > second), where the labels of the runs of
    an environment could as well be others. At least 1 / (draws + 1)."""
    rng = np.random.default_rng(0)
    observed = np.mean([beats(values[env, first], values[env, second]) for env in environments])
    total = np.zeros(draws)
    for env_id in environments:
        x, y = values[env_id, first], values[env_id, second]
        ranks = np.tile(scipy.stats.rankdata(np.concatenate([x, y])), (draws, 1))
        sums = rng.permuted(ranks, axis=1)[:, : len(x)].sum(1)
        total += (sums - len(x) * (len(x) + 1) / 2) / (len(x) * len(y))  # P as Mann and Whitney's U
    extreme = np.abs(total / len(environments) - 0.5) >= abs(observed - 0.5) - 1e-9
    return float((extreme.sum() + 1) / (draws + 1))


def table(summary: list[dict], curves) -> str:
    """Markdown: BLPO against every other method by every measure; empty where there is nothing to compare."""
    start = starting_returns(curves)
    rows = []
    for name, values in measures(summary, curves).items():
        for method in sorted({method for _, method in values} - {"blpo"}, key=method_order):
            environments = shared_environments(values, "blpo", method, "ppo-matched")
            if not environments:
                continue
            p = f"{permutation_p(values, 'blpo', method, environments):.1g}"
            difference = ""
            if name != "steps":  # which may be infinite
                difference = iqm_difference(values, start, "blpo", method, environments)
            who = f"{label(method)} ({len(environments)})"
            rows.append([MEASURES[name], who, chance(values, "blpo", method, environments), p, difference])
    head = ["measure", "BLPO against (environments)", "P(BLPO better)", "permutation p", "difference of IQMs"]
    return markdown(head, rows) if rows else ""
