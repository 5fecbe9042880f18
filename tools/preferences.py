"""Table and figure of the runs that learn a reward from preferences, and of SAC, which knows it.

Curves and summaries are those of tools/results.py.
"""

import numpy as np
from matplotlib.figure import Figure

from tools.figures import add_legend, measured, on_common_grid
from tools.results import colours, column_of, label, style
from tools.tables import Estimate, ahead_cells, beats, chance_of_improvement, decimals_for, markdown
from tools.tables import mean_cell, number, welch

# What the rows of the figure show of every task, where a run has it: column, title, and whether it is a
# logarithm that tells it
PANELS = (
    ("return_100", "return, last 100 episodes", False),
    ("accuracy_replay", "accuracy on old pairs", False),
    ("accuracy_fresh", "accuracy on new pairs", False),
    ("ce_fresh", "leader's loss, new pairs", True),
    ("ratio", "second term / first", True),
    ("inverse_alpha", "1 / temperature", True),
)

BOTH = ("drlhf", "sobirl")  # what by_setting compares


def task(env_id: str) -> str:
    """Its name in figures and tables: those of tools/tasks.py without their module."""
    return env_id.removeprefix("tools.tasks-")


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
    """A column per environment, a row per panel: means over seeds of every method, on logarithmic axes
    medians, and of returns a thin line for every run."""
    curves = {group: [with_ratios(run) for run in runs] for group, runs in curves.items()}
    logged = set().union(*(run for runs in curves.values() for run in runs))
    panels = [panel for panel in PANELS if panel[0] in logged]
    environments = list(dict.fromkeys(env_id for env_id, _ in curves))
    figure = Figure(figsize=(max(5.5, 3.6 * len(environments)), 2.2 * len(panels) + 0.4))
    axes = figure.subplots(len(panels), len(environments), squeeze=False, sharex="col")
    handles, counts = {}, {}
    colour_of = colours(dict.fromkeys(method for _, method in curves))
    for (env_id, method), runs in curves.items():
        colour, line_style = colour_of[method], style(method)[1]
        for axis, (column, _, logarithmic) in zip(axes[:, environments.index(env_id)], panels):
            lines = measured(runs, "global_step", column)
            if not lines:
                continue
            if column == "return_100":
                for x, y in lines:
                    axis.plot(x / 1000, y, color=colour, linewidth=0.5, alpha=0.3)
            grid, values = on_common_grid(lines)
            look = dict(color=colour, linestyle=line_style, linewidth=1.6)
            middle = np.median(values, axis=0) if logarithmic else values.mean(0)
            (line,) = axis.plot(grid / 1000, middle, **look)
            handles.setdefault(method, line)
            counts.setdefault(method, set()).add(len(lines))
    for row, (_, title, logarithmic) in zip(axes, panels):
        row[0].set_ylabel(title)
        for axis in row:
            axis.margins(x=0)
            axis.grid(alpha=0.25)
            if logarithmic:
                axis.set_yscale("log")
                axis.yaxis.set_minor_formatter("")
    for axis, env_id in zip(axes[0], environments):
        axis.set_title(task(env_id))
        axis.yaxis.set_major_formatter("{x:,.10g}")
    figure.supxlabel("environment steps (thousands)", fontsize="medium")
    figure.tight_layout()
    figure.align_ylabels()
    add_legend(figure, handles, counts, ncols=3)
    return figure


def mean_where_known(summary, group, column: str) -> str:
    """The mean over a group's runs in which a measure is known, empty where it never is."""
    values = column_of(summary, group, column)
    values = values[np.isfinite(values)]
    return f"{values.mean():.2f}" if len(values) else ""


def table(summary, finals) -> str:
    """Markdown: a line per environment and method. finals: as from results.grouped."""
    rows = []
    for (env_id, method), returns in finals.items():
        decimals = decimals_for(finals, env_id)
        evaluated = column_of(summary, (env_id, method), "eval_return")
        cells = [mean_cell(returns, decimals), mean_cell(evaluated, decimals)]
        cells.append(number(np.median(evaluated), decimals))
        for column in ("accuracy_replay", "accuracy_fresh", "reward_correlation"):
            cells.append(mean_where_known(summary, (env_id, method), column))
        rows.append([task(env_id), label(method), len(returns), *cells])
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
            rows.append([task(env_id), label(method), interval, chance])
    head = ["environment", "method", "evaluation minus DRLHF's", "P(method > DRLHF)"]
    return markdown(head, rows) if rows else ""


def logs_loss(runs) -> bool:
    """Whether the leader's loss on new pairs is known, of all runs and of more than their first query."""
    return all(np.isfinite(run.get("ce_fresh", [])).sum() > 1 for run in runs)


def over_queries(runs, column: str):
    """The mean of a measure over all queries of each run but the first, as far as it is known; (runs,)."""
    queries = [run[column][np.isfinite(run["ce_fresh"])][1:] for run in runs]
    known = [values[np.isfinite(values)] for values in queries]
    return np.array([values.mean() if len(values) else np.nan for values in known])


def new_pairs(curves) -> str:
    """Markdown: the leader's loss and the accuracy on new pairs, and Welch's 95 % intervals of the difference
    to DRLHF; empty where no environment has runs of DRLHF and of another method that log this loss."""
    known = {
        group: [over_queries(runs, column) for column in ("ce_fresh", "accuracy_fresh")]
        for group, runs in curves.items()
        if logs_loss(runs)
    }
    rows = []
    for (env_id, method), measured in known.items():
        base = known.get((env_id, "drlhf"), ([], []))
        cells = []
        for values, others in zip(measured, base):
            cells += [mean_cell(values, 3), "" if method == "drlhf" else ahead_cells(values, others, 3)[0]]
        rows.append([task(env_id), label(method), *cells])
    head = ["environment", "method", "leader's loss, new pairs", "minus DRLHF's"]
    head += ["accuracy, new pairs", "minus DRLHF's"]
    return markdown(head, rows) if any(row[3] for row in rows) else ""


def loss_by_setting(curves) -> str:
    """Markdown: the leader's loss on new pairs in every setting, of runs that by_setting compares, mean,
    lowest and highest run; and SoBiRL's divided by DRLHF's, with Welch's 95 % interval, means and interval of
    the logarithm; empty where a run does not log it, or there are fewer than two of a kind."""
    if not all(logs_loss(runs) and len(runs) > 1 for runs in curves.values()):
        return ""
    rows = []
    for env_id, setting in settings_of(curves):
        groups = [curves[env_id, f"{method}-{setting}"] for method in BOTH]
        losses = [over_queries(runs, "ce_fresh") for runs in groups]
        cells = [f"{loss.mean():.3f} ({loss.min():.3f} to {loss.max():.3f})" for loss in losses]
        drlhf, sobirl = (np.log(loss) for loss in losses)
        difference = sobirl.mean() - drlhf.mean(), *welch(sobirl, drlhf)
        rows.append([task(env_id), setting, *cells, Estimate(*np.exp(difference))])
    head = ["environment", "setting", "DRLHF, leader's loss on new pairs", "SoBiRL, the same", "ratio"]
    return markdown(head, rows)


def settings_of(groups):
    """The settings of runs named {method}-{setting}, by (env_id, setting), in order."""
    return dict.fromkeys((env_id, name.partition("-")[2]) for env_id, name in groups)


def by_setting(summary, finals) -> str:
    """Markdown: SoBiRL against DRLHF in every setting, of runs named sobirl-{setting} and drlhf-{setting}:
    evaluations (mean, lowest and highest run), and P(SoBiRL > DRLHF) by these, with its mean over settings;
    empty where a run has another name, or a setting only one of the two."""
    places = settings_of(finals)
    wanted = {(env_id, f"{method}-{setting}") for env_id, setting in places for method in BOTH}
    if not finals or wanted != finals.keys():
        return ""

    evaluations, rows = {}, []
    for env_id, setting in places:
        groups = [(env_id, f"{method}-{setting}") for method in BOTH]
        drlhf, sobirl = both = [column_of(summary, group, "eval_return") for group in groups]
        evaluations |= {((env_id, setting), method): values for method, values in zip(BOTH, both)}
        decimals = decimals_for(finals, env_id)
        cells = []
        for values in both:
            mean, least, most = (number(x, decimals) for x in (values.mean(), values.min(), values.max()))
            cells.append(f"{mean} ({least} to {most})")
        cells.append(f"{beats(sobirl, drlhf):.2f}")
        for column in ("accuracy_replay", "reward_correlation"):
            cells.append(", ".join(mean_where_known(summary, group, column) for group in groups))
        rows.append([task(env_id), setting, *cells])
    chance = chance_of_improvement(evaluations, "drlhf", places, ours="sobirl")
    head = ["environment", "setting", "DRLHF, evaluation", "SoBiRL, evaluation", "P(SoBiRL > DRLHF)"]
    head += ["accuracy on old pairs, of both", "correlation with the true reward, of both"]
    return f"{markdown(head, rows)}\n\nP(SoBiRL > DRLHF), mean over the settings: {chance}"
