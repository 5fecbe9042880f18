"""Table and figure of the runs that learn a reward from preferences, and of SAC, which knows it.

Curves and summaries are those of tools/results.py.
"""

import numpy as np
from matplotlib.figure import Figure

from tools.figures import add_legend, measured, on_common_grid
from tools.results import column_of, label, style
from tools.tables import ahead_cells, decimals_for, markdown, mean_cell, number

# What every row of the figure shows of a task, from left to right: column, title, and whether it is a
# logarithm that tells it
PANELS = (
    ("return_100", "return, last 100 episodes", False),
    ("accuracy_replay", "accuracy on old pairs", False),
    ("accuracy_fresh", "accuracy on new pairs", False),
    ("ratio", "second term / first, before the bound", True),
    ("inverse_alpha", "1 / temperature", True),
)


def with_ratios(run: dict) -> dict:
    """A run's columns, with those that the figure calculates."""
    found = dict(run)
    with np.errstate(divide="ignore", invalid="ignore"):
        if "hyper_grad_norm" in run:
            found["ratio"] = run["hyper_grad_norm"] / run["ce_grad_norm"]
        if "alpha" in run:
            found["inverse_alpha"] = 1 / run["alpha"]
    return found


def draw(curves) -> Figure:
    """A row per environment, a column per PANELS: means over seeds of every method, returns with a thin line
    for every run."""
    environments = list(dict.fromkeys(env_id for env_id, _ in curves))
    figure = Figure(figsize=(3.2 * len(PANELS), 2.7 * len(environments) + 0.6))
    axes = figure.subplots(len(environments), len(PANELS), squeeze=False)
    handles, counts = {}, {}
    for (env_id, method), runs in curves.items():
        runs = [with_ratios(run) for run in runs]
        row = axes[environments.index(env_id)]
        colour, line_style, _ = style(method)
        for axis, (column, _, _) in zip(row, PANELS):
            lines = measured(runs, "global_step", column)
            if not lines:
                continue
            if column == "return_100":
                for x, y in lines:
                    axis.plot(x / 1000, y, color=colour, linewidth=0.5, alpha=0.3)
            grid, values = on_common_grid(lines)
            look = dict(color=colour, linestyle=line_style, linewidth=1.6)
            (line,) = axis.plot(grid / 1000, values.mean(0), **look)
            handles.setdefault(method, line)
            counts.setdefault(method, set()).add(len(lines))
    for env_id, row in zip(environments, axes):
        for axis, (_, title, logarithmic) in zip(row, PANELS):
            axis.set_title(title if axis in axes[0] else "", fontsize="medium")
            axis.margins(x=0)
            axis.grid(alpha=0.25)
            if logarithmic:
                axis.set_yscale("log")
        row[0].set_ylabel(env_id.removeprefix("tools.tasks-"))
        row[0].yaxis.set_major_formatter("{x:,.10g}")
    figure.supxlabel("environment steps (thousands)", fontsize="medium")
    figure.tight_layout()
    add_legend(figure, handles, counts)
    return figure


def table(summary, finals) -> str:
    """Markdown: a line per environment and method. finals: as from results.grouped."""
    rows = []
    for (env_id, method), returns in finals.items():
        decimals = decimals_for(finals, env_id)
        evaluated = column_of(summary, (env_id, method), "eval_return")
        cells = [mean_cell(returns, decimals), mean_cell(evaluated, decimals)]
        cells.append(number(np.median(evaluated), decimals))
        for column in ("accuracy_replay", "accuracy_fresh", "reward_correlation"):
            known = column_of(summary, (env_id, method), column)
            known = known[np.isfinite(known)]
            cells.append(f"{np.mean(known):.2f}" if len(known) else "")
        rows.append([env_id.removeprefix("tools.tasks-"), label(method), len(returns), *cells])
    head = ["environment", "method", "seeds", "return, last 100 training episodes"]
    head += ["deterministic evaluation", "its median", "accuracy, old pairs", "accuracy, new pairs"]
    head += ["correlation with the true reward"]
    return markdown(head, rows)


def against_drlhf(summary, finals) -> str:
    """Markdown: for every other method that learns a reward Welch's 95 % interval of the mean deterministic
    evaluation minus that of DRLHF, and P(method > DRLHF); empty where no environment has two runs of both."""
    evaluations = {group: column_of(summary, group, "eval_return") for group in finals}
    rows = []
    for (env_id, method), values in evaluations.items():
        base = evaluations.get((env_id, "drlhf"), np.array([]))
        interval, chance = ahead_cells(values, base, decimals_for(finals, env_id))
        if method not in ("sac", "drlhf") and interval:
            rows.append([env_id.removeprefix("tools.tasks-"), label(method), interval, chance])
    head = ["environment", "method", "evaluation minus DRLHF's", "P(method > DRLHF)"]
    return markdown(head, rows) if rows else ""
