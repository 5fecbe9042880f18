"""All figures of the deep runs, and of speed.csv, solvers.csv and gate.csv (tools of the same names).

Every `draw_` function returns a matplotlib Figure that belongs to nobody else: no pyplot, no backend, no
global state. `save` writes it as png and pdf.

Curves are dictionaries from (env_id, exp_name) to a list with a dictionary of columns for every seed, each
column of the shape (points,), as `results.load_curves` returns them.
"""

import io
import itertools
import textwrap
from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator
from PIL import Image  # which matplotlib needs, too

from tools.learning import MEASURES
from tools.results import colours, label, method_order, style
from tools.tables import half_width

# Shown beside BLPO in a figure of their own:
VARIANTS = ("blpo-released", "blpo-cg", "blpo-pcg", "mean-c")
RETURN_LABEL = "return, mean of the last 100 episodes"
STEPS_LABEL = "environment steps (millions)"
DPI = 120

# What an iteration spends its time on: acting in blue, learning in red, lighter and darker in grey, too
PHASES = {
    "env": "#1F4E79",
    "inference": "#6699CC",
    "bookkeeping": "#BBBBBB",
    "critic": "#F4A582",
    "hypergradient": "#B2182B",
    "actor": "#FDDBC7",
}

# Solvers of solvers.csv in the order of the legend: name, colour, marker, label. Others come after these,
# under their name.
SOLVERS = {
    "columns": ("#000000", "s", "Nyström, random columns"),
    "gaussian": ("#E69F00", "D", "Nyström, Gaussian"),
    "v-gaussian": ("#56B4E9", "^", "Nyström, v first"),
    "krylov": ("#0072B2", "o", "Nyström, Krylov (default: ringed)"),
    "cg": ("#CC79A7", "v", "CG"),
    "pcg": ("#009E73", "P", "preconditioned CG"),
}
DEFAULT_SOLVE = ("krylov", "gauss-newton", "2")  # --nystrom-rank 2


def save(figure: Figure, figures_dir: Path, name: str) -> None:
    """Writes figures_dir/name.png, of 256 colours, and .pdf; the same figure gives the same bytes again."""
    figures_dir.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI, bbox_inches="tight")
    image = Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    image.save(figures_dir / f"{name}.png", optimize=True)
    figure.savefig(figures_dir / f"{name}.pdf", dpi=DPI, bbox_inches="tight", metadata={"CreationDate": None})


def panels(count: int):
    """A figure and a list of `count` axes in rows of at most three, four of them two by two."""
    columns = 2 if count == 4 else min(count, 3)
    rows = -(-count // columns)  # rounded up
    figure = Figure(figsize=(3.5 * columns, 2.8 * rows))
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, list(axes.flat[:count])


# Learning curves


def measured(runs, x: str, y: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """The columns x and y of every run that has them, without the points at which y is not finite."""
    found = []
    for run in runs:
        if x not in run or y not in run:
            continue
        finite = np.isfinite(run[y])
        if finite.any():
            found.append((run[x][finite], run[y][finite]))
    return found


def on_common_grid(runs, points: int = 200):
    """Runs, pairs of x and y, at the same values of x.

    Returns a grid over what all of them reach, (points,), and y there, (seeds, points).
    """
    begin = max(x[0] for x, _ in runs)
    end = min(x[-1] for x, _ in runs)
    grid = np.linspace(begin, end, points)
    return grid, np.array([np.interp(grid, x, y) for x, y in runs])


def settled(lines) -> float | None:
    """Where a panel may end: the x from which on the means of all methods stay within 2 % of what they have
    covered, of each other and of where they end, and a quarter more; None where that is not much of a cut.

    lines: pairs of x and mean, one per method.
    """
    if len(lines) < 2:
        return None
    grid, means = on_common_grid(lines)
    end = means[:, -1].mean()
    moving = np.flatnonzero(np.abs(means - end).max(0) > 0.02 * (means.max() - means.min()))
    if len(moving) == 0 or moving[-1] > 0.6 * len(grid):
        return None
    return 1.25 * grid[moving[-1]]


def draw_curves(curves, *, x: str, y: str, xlabel: str, ylabel: str, scale: float) -> Figure:
    """A panel per environment of column y against column x / scale: a thin line for every run, a thick one
    for the mean over the seeds of a method, if there are several. Tasks that all methods solve end there."""
    environments = list(dict.fromkeys(env_id for env_id, _ in curves))
    colour_of = colours(dict.fromkeys(method for _, method in curves))  # the same in all panels
    figure, axes = panels(len(environments))
    handles = {}
    counts = defaultdict(set)
    for axis, env_id in zip(axes, environments):
        means = []
        for (env, method), all_runs in curves.items():
            runs = measured(all_runs, x, y)
            if env != env_id or not runs:
                continue
            colour, line_style = colour_of[method], style(method)[1]
            for run_x, run_y in runs:
                (line,) = axis.plot(run_x / scale, run_y, color=colour, linewidth=0.6, alpha=0.35)
            grid, values = on_common_grid(runs)
            if grid[0] < grid[-1]:
                means.append((grid / scale, values.mean(0)))
                if len(runs) > 1:
                    (line,) = axis.plot(*means[-1], color=colour, linestyle=line_style, linewidth=2)
            handles.setdefault(method, line)
            counts[method].add(len(runs))
        axis.margins(x=0)
        axis.set(title=env_id, xlim=(0, settled(means)))
        axis.yaxis.set_major_formatter("{x:,.10g}")
        axis.grid(alpha=0.25)
    figure.supxlabel(xlabel, fontsize="medium")
    figure.supylabel(ylabel, fontsize="medium")
    figure.tight_layout()
    add_legend(figure, handles, counts)
    return figure


def draw_endings(curves) -> Figure:
    """A panel per environment with a row per method: every run's last return, their mean and its interval.

    Environments in which all runs end with the same return are left out, unless there is no other.
    """
    lasts = defaultdict(set)
    for (env_id, _), runs in curves.items():
        lasts[env_id] |= {run["return_100"][-1] for run in runs}
    environments = [env_id for env_id, returns in lasts.items() if len(returns) > 1] or list(lasts)[:1]
    methods = sorted({method for _, method in curves}, key=method_order, reverse=True)
    colour_of = colours(methods)
    figure = Figure(figsize=(1.5 + 3.2 * len(environments), 0.45 * len(methods) + 1.2))
    axes = figure.subplots(1, len(environments), sharey=True, squeeze=False)[0]
    for axis, env_id in zip(axes, environments):
        for y, method in enumerate(methods):
            returns = np.array([run["return_100"][-1] for run in curves.get((env_id, method), [])])
            if len(returns) == 0:
                continue
            axis.plot(returns, np.full(len(returns), y), "o", color=colour_of[method], alpha=0.4)
            half = half_width(returns) if len(returns) > 1 else 0
            axis.errorbar(returns.mean(), y, xerr=half, color=colour_of[method], marker="|", markersize=14)
        axis.set(title=env_id, yticks=range(len(methods)), ylim=(-0.6, len(methods) - 0.4))
        axis.xaxis.set_major_formatter("{x:,.10g}")
        axis.grid(alpha=0.25)
    axes[0].set_yticklabels([label(method) for method in methods])
    figure.supxlabel(RETURN_LABEL, fontsize="medium")
    figure.tight_layout()
    return figure


def add_legend(figure: Figure, handles: dict, counts: dict, ncols: int = 4) -> None:
    """A legend below the panels: of every method a line, and of how many runs its means are."""
    names = [f"{label(method)} (n = {' to '.join(map(str, ends(counts[method])))})" for method in handles]
    place_legend(figure, dict(zip(names, handles.values())), ncols)


def place_legend(figure: Figure, handles: dict, ncols: int = 3) -> None:
    """Puts names and their lines below the panels."""
    below = dict(loc="upper center", bbox_to_anchor=(0.5, 0))
    figure.legend(handles.values(), handles, ncols=ncols, frameon=False, **below)


def ends(numbers) -> list[int]:
    """The smallest and the largest of some numbers, once if they are equal."""
    return sorted({min(numbers), max(numbers)})


def curve_figures(curves) -> dict[str, Figure]:
    """The figures of learning curves by name.

    Always curves and time; variants where BLPO has some, and its diagnostics where a run has measured them.
    """
    against_steps = dict(
        x="global_step",
        y="return_100",
        xlabel=STEPS_LABEL,
        ylabel=RETURN_LABEL,
        scale=1e6,
    )
    main = {key: runs for key, runs in curves.items() if key[1] not in VARIANTS}
    figures = {"curves": draw_curves(main or curves, **against_steps)}

    varied = {env_id for env_id, method in curves if method in VARIANTS}
    if varied and main:
        beside_blpo = {
            (env_id, method): runs
            for (env_id, method), runs in curves.items()
            if env_id in varied and method in ("blpo", *VARIANTS)
        }
        figures["variants"] = draw_endings(beside_blpo)

    figures["time"] = draw_curves(
        curves,
        x="wall_seconds",
        y="return_100",
        xlabel="wall-clock time (minutes)",
        ylabel=RETURN_LABEL,
        scale=60,
    )

    bilevel = {key: runs for key, runs in curves.items() if any("ihvp_correction" in run for run in runs)}
    diagnostics = {
        "implicit_cosine": "cosine of implicit term and policy gradient",
        "implicit_norm_ratio": "norm of implicit term / policy gradient",
        "ihvp_correction": "‖x − v/ρ‖ / ‖v/ρ‖",
    }
    for name, meaning in diagnostics.items():
        if bilevel:
            figures[name] = draw_curves(
                bilevel,
                x="global_step",
                y=name,
                xlabel=STEPS_LABEL,
                ylabel=meaning,
                scale=1e6,
            )
    return figures


# Aggregates


# The measures of learning.py that a figure compares methods by, and their markers
MARKERS = {"AUC25": "^", "AUC": "s", "final": "o"}


def draw_aggregate(compared) -> Figure:
    """Two panels with a row per method: P(BLPO > method), and the difference of interquartile means; in a row
    a dot with its interval for every measure.

    compared: as from `learning.comparisons`, not empty.
    """
    shown = {name: compared[name] for name in MARKERS if name in compared}
    methods = sorted({method for found in shown.values() for method in found}, key=method_order)
    colour_of = colours(methods)
    tasks = {m: [found[m].environments for found in shown.values() if m in found] for m in methods}
    figure = Figure(figsize=(9, 0.55 * len(methods) + 1.5))
    left, right = figure.subplots(1, 2, sharey=True)
    handles = {}
    for name, found in shown.items():
        marker = MARKERS[name]
        offset = 0.24 * (1 - list(MARKERS).index(name))
        for method, comparison in found.items():
            y = len(methods) - 1 - methods.index(method) + offset
            for axis, value in ((left, comparison.chance), (right, comparison.difference)):
                if value is None:
                    continue
                axis.plot([value.low, value.high], [y, y], color=colour_of[method], linewidth=1.5)
                axis.plot(value.value, y, marker, color=colour_of[method], markersize=5)
        handles[MEASURES[name]] = Line2D([], [], color="grey", marker=marker, linewidth=1.5)
    left.set(yticks=range(len(methods)), ylim=(-0.6, len(methods) - 0.4), xlim=(0, 1))
    left.set_yticklabels([f"{label(method)} ({max(tasks[method])} tasks)" for method in methods[::-1]])
    left.set_xlabel("P(BLPO better), pairs of runs")
    right.set_xlabel("BLPO minus this, interquartile means")
    for axis, even in ((left, 0.5), (right, 0)):
        axis.axvline(even, color="grey", linewidth=0.8)
        axis.grid(alpha=0.25)
    figure.tight_layout()
    place_legend(figure, handles)
    return figure


# Speed and solvers


def draw_runtime(rows: list[dict]) -> Figure:
    """Time per environment step of every command, by phase, relative to the whole of one of them; a black
    line from its fastest turn to its slowest.

    rows: of speed.csv, not empty: name (an exp_name or a command), sps (steps a second), slowest and fastest
    (of all turns), and a column of milliseconds for each phase, {phase}_ms. That one is "ppo-matched" if it
    is there, else the last. A command that does not tell its phases has an empty bar.
    """
    phases = [column.removesuffix("_ms") for column in rows[0] if column.endswith("_ms")]
    base = next((row for row in rows if row["name"] == "ppo-matched"), rows[-1])
    totals, shortest, longest = (
        [float(base["sps"]) / float(row[rate]) for row in rows] for rate in ("sps", "fastest", "slowest")
    )

    figure = Figure(figsize=(7, 0.45 * len(rows) + 1.6))
    axis = figure.subplots()
    for y, (row, total, low, high) in enumerate(reversed(list(zip(rows, totals, shortest, longest)))):
        spent = np.array([float(row[f"{phase}_ms"] or 0) for phase in phases])
        parts = spent / max(spent.sum(), 1e-9) * total
        if not parts.any():
            axis.barh(y, total, color="white", edgecolor="black")
        left = 0.0
        for i, phase in enumerate(phases):
            axis.barh(
                y,
                parts[i],
                left=left,
                color=PHASES.get(phase, "#DDDDDD"),
                edgecolor="white",
                label=phase if y == 0 else None,
            )
            left += parts[i]
        axis.plot([low, high], [y, y], color="black", linewidth=1.5)
        axis.text(high + 0.02, y, f"{total:.2f}", va="center", fontsize=9)
    axis.set(yticks=range(len(rows)), xlabel=f"time per environment step, relative to {label(base['name'])}")
    axis.set_yticklabels([label(row["name"]) for row in reversed(rows)])
    axis.set_xlim(0, 1.12 * max(longest))
    axis.legend(fontsize=9, ncols=3, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.tight_layout()
    return figure


def draw_solvers(rows: list[dict]) -> Figure:
    """A panel per environment: relative residual against milliseconds per solve, a point per budget.

    The default is ringed. rows: of solvers.csv, not empty: env_id, solver, hessian ("gauss-newton" or
    "full"), products, ms, residual.
    """
    environments = list(dict.fromkeys(row["env_id"] for row in rows))
    others = dict.fromkeys(row["solver"] for row in rows if row["solver"] not in SOLVERS)
    solvers = SOLVERS | {solver: (None, ".", solver) for solver in others}
    residuals = [float(row["residual"]) for row in rows]
    common = 0.5 * min(residuals), 2 * max(residuals)
    handles = {}
    figure, axes = panels(len(environments))
    for axis, env_id in zip(axes, environments):
        for solver, (colour, marker, name) in solvers.items():
            for hessian, line_style in (("gauss-newton", "-"), ("full", ":")):
                chosen = [
                    row
                    for row in rows
                    if (row["env_id"], row["solver"], row["hessian"]) == (env_id, solver, hessian)
                ]
                if not chosen:
                    continue
                (line,) = axis.plot(
                    [float(row["ms"]) for row in chosen],
                    [float(row["residual"]) for row in chosen],
                    line_style,
                    color=colour,
                    marker=marker,
                    markersize=5,
                    linewidth=1,
                )
                line.set_markerfacecolor(line.get_color() if hessian == "gauss-newton" else "white")
                handles.setdefault(name, line)
                for row in chosen:
                    if (solver, hessian, row["products"]) == DEFAULT_SOLVE:
                        default = float(row["ms"]), float(row["residual"])
                        axis.plot(*default, "o", markersize=13, color=colour, markerfacecolor="none")
        axis.axhline(0.01, color="grey", linewidth=0.8)
        axis.set(title=env_id, xlabel="ms per solve", xscale="log", yscale="log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_ylim(*common)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("‖(H + ρI)x − v‖ / ‖v‖")
    figure.tight_layout()
    grey = dict(color="grey", marker="o")
    handles["filled: Gauss–Newton products"] = Line2D([], [], **grey)
    handles["hollow: full Hessian"] = Line2D([], [], linestyle=":", markerfacecolor="white", **grey)
    handles["line: residual of 1 %"] = Line2D([], [], color="grey", linewidth=0.8)
    place_legend(figure, handles)
    return figure


def draw_gate(rows: list[dict], weights: list[dict]) -> Figure:
    """Left the weights 1 - 2 c_k of single trajectories, right the cosine of every variant in every run.

    rows: of gate.csv, not empty: env_id, steps, variant, signal, signal_error; weights: of gate_weights.csv:
    env_id, steps, age, factor.
    """
    figure = Figure(figsize=(10, 4))
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.1))
    runs = list(dict.fromkeys((row["env_id"], row["steps"]) for row in rows))
    environments = dict.fromkeys(env_id for env_id, _ in runs)
    colours = dict(zip(environments, itertools.cycle(("#0072B2", "#D55E00", "#009E73", "#CC79A7"))))
    markers = dict(zip(dict.fromkeys(steps for _, steps in runs), itertools.cycle("o^sv")))
    line_styles = dict(zip(markers, itertools.cycle(("-", "--", ":", "-."))))
    variants = list(dict.fromkeys(row["variant"] for row in rows))[::-1]
    handles = {}
    for i, run in enumerate(runs):
        env_id, steps = run
        look = dict(color=colours[env_id], marker=markers[steps])
        name = f"{env_id}, {int(steps) // 1000}k steps"
        chosen = [row for row in weights if (row["env_id"], row["steps"]) == run]
        ages, factors = (np.array([float(row[name]) for row in chosen]) for name in ("age", "factor"))
        episodes = np.flatnonzero(np.diff(ages) < 0) + 1  # where a new one begins
        for x, y in zip(np.split(ages, episodes), np.split(factors, episodes)):
            left.plot(x, y, color=colours[env_id], linestyle=line_styles[steps], linewidth=1.2)
        handles[name] = Line2D([], [], linestyle=line_styles[steps], **look)

        chosen = [row for row in rows if (row["env_id"], row["steps"]) == run]
        y = [variants.index(row["variant"]) + 0.3 - 0.6 * i / max(len(runs) - 1, 1) for row in chosen]
        cosines = [float(row["signal"]) for row in chosen]
        errors = [1.96 * float(row["signal_error"]) for row in chosen]
        right.errorbar(cosines, y, xerr=errors, linestyle="", markersize=4, elinewidth=0.8, **look)
    left.set(xlabel="steps since the window or the episode began", ylabel="weight 1 − 2c of an advantage")
    right.axvline(0.9, color="grey", linewidth=0.8)
    right.set(xlabel="cosine of policy gradient and hypergradient", yticks=range(len(variants)))
    right.set_xlim(-1.05, 1.15)
    right.set_yticklabels([textwrap.fill(variant, 28) for variant in variants])
    for axis in (left, right):
        axis.grid(alpha=0.25)
    figure.tight_layout()
    place_legend(figure, handles)
    return figure
