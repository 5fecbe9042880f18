"""Runs of sobirl_tabular.py: export, table and figure.

`results/tabular.csv` holds 40 points of a run, `results/tabular_summary.csv` a line per run with what it
reached, versions and flags. A run is known by its problem, exp_name and seed.

`apart`, where a function takes it, is the (problem, seed) of an instance that is shown in a row of its own,
as one that behaves unlike the others would hide in their median; None: there is none. The files do not depend
on it.
"""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from support.flags import fail, shown
from support.names import slug
from tools.results import PRIVATE_FLAGS, is_finished, is_tabular, read_csv, refuse_changed_flags, run_folders
from tools.results import write_csv
from tools.tables import markdown

# The methods in the order of table and legend: exp_name, colour, line style, label with oracle and published
# rate. Methods with other names come after these and are shown under their exp_name.
STYLES = {
    "exact": ("#BBBBBB", "-", "exact (9)"),
    "m-sobirl": ("#0072B2", "-", "M-SoBiRL"),
    "m-sobirl-w": ("#0072B2", ":", "M-SoBiRL, w solved"),
    "unrolled": ("#000000", (0, (1, 3)), "unrolled"),
    "parl": ("#CC79A7", (0, (4, 4)), "PARL"),
    "pbrl": ("#E69F00", (0, (2, 4)), "PBRL"),
    "hpgd": ("#009E73", "-.", "HPGD, 64 samples"),
    "sobirl": ("#56B4E9", (0, (5, 2)), "SoBiRL (15), expectation"),
    "sobirl-78": ("#999933", "-", "SoBiRL (78), expectation"),
    "sobirl-64": ("#56B4E9", ":", "SoBiRL (15), 64 samples"),
    "stoc-sobirl": ("#000000", "-.", "Stoc-SoBiRL, 64 samples"),
    "drlhf": ("#D55E00", "--", "DRLHF"),
}
PROBLEMS = ("synthetic", "reward-shaping", "preference")  # in this order, others after them
TOLERANCE = 1e-3  # of |grad phi|: a run gets there in the first round that has no more
REACHED = tuple(f"{column}_to_{TOLERANCE:g}" for column in ("round", "seconds"))
POINT_COLUMNS = ("round", "seconds", "phi", "gradient_norm", "cosine")
POINTS = 40


def style(method: str):
    """Colour (None: the next of matplotlib's cycle), line style and label of a method, by its exp_name."""
    return STYLES.get(method, (None, "-", method))


def run_name(row: dict) -> tuple[str, str, str]:
    """What tells a run from the others, in a row of either file."""
    return row["problem"], row["exp_name"], row["seed"]


def run_order(row: dict):
    """Sorting key of the rows of both files: problem, method, seed."""
    problems, methods = list(PROBLEMS), list(STYLES)
    problem, method = row["problem"], row["exp_name"]
    return (
        problems.index(problem) if problem in problems else len(problems),
        problem,
        methods.index(method) if method in methods else len(methods),
        method,
        int(row["seed"]),
    )


def instance(row: dict) -> tuple[str, str]:
    """Problem and seed of a row."""
    return row["problem"], row["seed"]


def panel(row: dict, apart: tuple[str, str] | None) -> str:
    """The title under which a run is shown: its problem, with the seed if that instance is shown apart."""
    return f"{row['problem']}, seed {row['seed']}" if instance(row) == apart else row["problem"]


def shown_order(rows: list[dict], apart: tuple[str, str] | None) -> list[dict]:
    """The rows in the order of table and figure: as in the files, the instance shown apart at the end."""
    return sorted(rows, key=lambda row: (instance(row) == apart, run_order(row)))


# Export


def export(runs_dir: Path, results_dir: Path) -> None:
    """Adds every finished run of sobirl_tabular.py (one with a solution) to results_dir.

    What was there of the same problem, exp_name and seed is replaced; of two such runs the one whose folder
    is later in the alphabet stays, which is the younger one.
    """
    summary_path = results_dir / "tabular_summary.csv"
    points_path = results_dir / "tabular.csv"
    summary = {}
    points = defaultdict(list)
    if summary_path.exists():
        summary = {run_name(row): row for row in read_csv(summary_path)}
        for row in read_csv(points_path):
            points[run_name(row)].append(row)

    for folder, config in run_folders(runs_dir):
        if not is_tabular(config) or not is_finished(folder, proof="solution.pt"):
            continue
        try:
            rows = read_csv(folder / "progress.csv")
            progress = [{column: float(value) for column, value in row.items()} for row in rows]
            row = summary_row(config, progress)
        except (OSError, ValueError, KeyError, TypeError, IndexError) as problem:
            fail(f"{folder}: progress.csv is damaged ({shown(problem)})")
        same_name = [other for other in summary.values() if run_name(other)[:2] == run_name(row)[:2]]
        refuse_changed_flags(folder, row, same_name, "the runs of that name")
        summary[run_name(row)] = row
        points[run_name(row)] = thinned(row, progress)

    if summary:
        rows = sorted(summary.values(), key=run_order)
        write_csv(summary_path, rows)
        write_csv(points_path, [point for row in rows for point in points[run_name(row)]])


def summary_row(config: dict, progress: list[dict[str, float]]) -> dict:
    """The line of tabular_summary.csv for a run; REACHED is empty if it does not get to TOLERANCE."""
    flags = config["flags"]
    name = {"problem": flags["problem"], "exp_name": slug(flags["exp_name"]), "seed": str(flags["seed"])}
    last = progress[-1]
    arrival = next((row for row in progress if row["gradient_norm"] <= TOLERANCE), {})
    reached = {
        "rounds": int(last["round"]),
        "seconds": last["seconds"],
        "phi": last["phi"],
        "gradient_norm": last["gradient_norm"],
        REACHED[0]: arrival.get("round", ""),
        REACHED[1]: arrival.get("seconds", ""),
        "sweeps": round(float(np.mean([row["sweeps"] for row in progress])), 1),
    }
    kept = {flag: value for flag, value in flags.items() if flag not in name and flag not in PRIVATE_FLAGS}
    return name | reached | config["versions"] | {"flags": json.dumps(kept)}


def thinned(row: dict, progress: list[dict[str, float]]) -> list[dict]:
    """The rows of tabular.csv for a run: at most POINTS of its rounds, evenly spread on a log axis."""
    name = {column: row[column] for column in ("problem", "exp_name", "seed")}
    kept = np.unique(np.geomspace(1, len(progress), POINTS).round().astype(int)) - 1
    return [name | {column: f"{progress[i][column]:.5g}" for column in POINT_COLUMNS} for i in kept]


# Table


def median(rows: list[dict], column: str) -> float:
    """Median over the seeds that have a value in the column."""
    return float(np.median([float(row[column]) for row in rows if row[column] != ""]))


def table(summary: list[dict], apart: tuple[str, str] | None = None) -> str:
    """Markdown: a line per problem and method, medians over seeds.

    summary: rows of tabular_summary.csv. Rounds and seconds until |grad phi| <= TOLERANCE are those of the
    seeds that get there, and empty if none does.
    """
    groups = defaultdict(list)
    for row in shown_order(summary, apart):
        groups[panel(row, apart), row["exp_name"]].append(row)
    lines = []
    for (problem, method), rows in groups.items():
        arrived = [row for row in rows if row[REACHED[0]] != ""]
        until = ["", ""]
        if arrived:
            until = [f"{median(arrived, REACHED[0]):,.0f}", f"{median(arrived, REACHED[1]):.2f}"]
        lines.append(
            [
                problem,
                style(method)[2],
                len(rows),
                len(arrived),
                *until,
                f"{median(rows, 'sweeps'):.0f}",
                f"{median(rows, 'phi'):.4f}",
                f"{median(rows, 'gradient_norm'):.2g}",
                f"{median(rows, 'rounds'):,.0f}",
            ]
        )
    head = [
        "problem",
        "method",
        "seeds",
        "reach ‖∇φ‖ ≤ 0.001",
        "rounds until then",
        "seconds until then",
        "sweeps a round",
        "last φ",
        "last ‖∇φ‖",
        "rounds",
    ]
    return markdown(head, lines)


# Figure


def on_common_grid(runs: list[list[dict]], x: str, y: str, points: int = 100):
    """Runs, lists of rows of tabular.csv, at the same values of x.

    Returns a logarithmic grid over what all of them reach, (points,), and y there, (seeds, points). Rounds
    are counted from 1 here, not from 0 as in the file, because the axis is logarithmic; seconds stay what
    they are.
    """
    shift = 1 if x == "round" else 0
    xs = [np.array([float(row[x]) for row in run]) + shift for run in runs]
    ys = [np.array([float(row[y]) for row in run]) for run in runs]
    grid = np.geomspace(max(values[0] for values in xs), min(values[-1] for values in xs), points)
    return grid, np.array([np.interp(np.log(grid), np.log(a), b) for a, b in zip(xs, ys)])


COLUMNS = (
    ("round", "phi", "rounds", "φ"),
    ("round", "gradient_norm", "rounds", "‖∇φ‖"),
    ("seconds", "gradient_norm", "seconds", "‖∇φ‖"),
    ("round", "cosine", "rounds", "cosine of direction and ∇φ"),
)
OVERVIEW = ("exact", "m-sobirl", "sobirl-78", "drlhf")


def draw_overview(points: list[dict], apart: tuple[str, str] | None = None) -> Figure:
    """phi and the cosine of some methods on the preference problems alone, if there are any."""
    chosen = [row for row in points if row["exp_name"] in OVERVIEW and row["problem"] == "preference"]
    return draw(chosen or points, apart, (COLUMNS[0], COLUMNS[3]))


def draw(points: list[dict], apart: tuple[str, str] | None = None, columns=COLUMNS) -> Figure:
    """A row of panels per problem: phi and |grad phi| against rounds, |grad phi| against seconds, cosine.

    The cosine is that of the direction taken and the hypergradient, against rounds.
    points: rows of tabular.csv, not empty. Lines are medians over seeds, bands quartiles; "exact", which most
    methods follow, is a thick line without a band, so that the others can be seen on it.
    """
    groups = defaultdict(lambda: defaultdict(list))
    problem_of = {}
    for row in shown_order(points, apart):
        title = panel(row, apart)
        problem_of[title] = row["problem"]
        groups[title, row["exp_name"]][row["seed"]].append(row)
    titles = list(problem_of)
    legend_height = 0.7  # inches, below the panels
    height = 3.1 * len(titles) + legend_height

    figure = Figure(figsize=(3.75 * len(columns), height))
    axes = figure.subplots(len(titles), len(columns), squeeze=False)
    for (title, method), seeds in groups.items():
        colour, line_style, name = style(method)
        for axis, (x, y, xlabel, ylabel) in zip(axes[titles.index(title)], columns):
            grid, values = on_common_grid(list(seeds.values()), x, y)
            (line,) = axis.plot(
                grid,
                np.median(values, 0),
                color=colour,
                linestyle=line_style,
                linewidth=5 if method == "exact" else 1.7,
                label=name,
            )
            if len(seeds) > 1 and method != "exact":
                low, high = np.percentile(values, [25, 75], axis=0)
                axis.fill_between(grid, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
            logarithmic = y == "gradient_norm" or (problem_of[title], y) == ("synthetic", "phi")
            axis.set(xlabel=xlabel, ylabel=ylabel, xscale="log", title=f"{title} (n = {len(seeds)})")
            axis.set_yscale("log" if logarithmic else "linear")
            axis.xaxis.set_minor_formatter("")
            axis.yaxis.set_minor_formatter("")
            axis.grid(alpha=0.25)
    handles = {line.get_label(): line for axis in axes.flat for line in axis.lines}
    figure.tight_layout(rect=(0, legend_height / height, 1, 1))
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="lower center",
        ncols=1 + len(columns),
        frameon=False,
        fontsize=9,
        handlelength=4,
    )
    return figure
