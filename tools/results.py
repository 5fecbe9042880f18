"""From run folders to `results/`: what a finished run of a deep script leaves, as small CSV files.

`results/{env_id}__{exp_name}__{seed}.csv` holds about 200 points of a run: environment steps, the mean return
of the last 100 training episodes, the seconds it took so far (with whatever else the machine did), and BLPO's
diagnostics. `results/summary.csv` has a line per run: its final return_100, the mean return of its
evaluation, versions and flags.

A summary, here and in the other modules, is the list of those lines as `read_csv` returns them: dictionaries
of strings.
"""

import csv
import io
import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from support.files import write_whole
from support.flags import fail, shown
from support.names import slug

# The methods in the order of tables and legends: exp_name, colour, line style, label. Methods with other
# names come after these and are shown under their exp_name. Okabe-Ito colours (grey for its yellow), told
# apart in grey by the line style.
STYLES = {
    "blpo": ("#0072B2", "-", "BLPO"),
    "blpo-released": ("#56B4E9", "--", "BLPO, released term"),
    "blpo-cg": ("#117755", (0, (3, 1, 1, 1)), "BLPO with CG"),
    "blpo-pcg": ("#888888", (0, (3, 1, 1, 1, 1, 1)), "BLPO with preconditioned CG"),
    "mean-c": ("#E69F00", (0, (3, 1)), "BLPO, mean c"),
    "nested": ("#009E73", ":", "nesting only"),
    "nested-tuned": ("#CC79A7", (0, (3, 1, 1, 1, 1, 1)), "nesting only, tuned"),
    "nested-clip0.5": ("#66C2A4", (0, (1, 1)), "nesting only, clip 0.5"),
    "ppo-tuned": ("#000000", "-.", "PPO, tuned"),
    "ppo-matched": ("#000000", (0, (5, 1)), "PPO, matched"),
    "ppo-matched-clip0.5": ("#777777", (0, (5, 3)), "PPO, matched, clip 0.5"),
    "ppo": ("#D55E00", "--", "PPO, CleanRL's flags"),
}

# Those of the scripts that learn a reward, in Tol's colours
LEADERS = {
    "sac": ("#222222", "-.", "SAC, true reward"),
    "drlhf": ("#EE6677", (0, (5, 1)), "DRLHF"),
    "sobirl": ("#4477AA", "-", "SoBiRL, bounded"),
    "sobirl-bound-1": ("#332288", "--", "SoBiRL, bound 1"),
    "sobirl-bound-3": ("#44AA99", (0, (3, 1, 1, 1, 1, 1)), "SoBiRL, bound 3"),
    "sobirl-four": ("#228833", (0, (3, 1, 1, 1)), "SoBiRL, four steps"),
    "sobirl-unbounded": ("#66CCEE", "--", "SoBiRL, unbounded"),
    "sobirl-authors": ("#AA3377", (0, (1, 1)), "SoBiRL, authors' loss"),
    "hpgd": ("#CCBB44", (0, (3, 1)), "HPGD"),
    "pbrl": ("#8C564B", (0, (3, 1, 1, 1, 1, 1)), "PBRL"),
    "random": ("#BBBBBB", ":", "random reward"),
}
STYLES |= LEADERS

# Columns of progress.csv that a line of the summary has too, of runs that learn a reward.
LAST_COLUMNS = ("accuracy_fresh", "accuracy_replay", "reward_correlation", "tie_rate", "labels_used")

# Columns of progress.csv that the per-seed files keep, as far as a run has them.
CURVE_COLUMNS = (
    "global_step",
    "return_100",
    "wall_seconds",
    "implicit_cosine",
    "implicit_norm_ratio",
    "ihvp_correction",
    "approx_kl",
    "entropy",
    "alpha",
    "ce_fresh",
    "accuracy_fresh",
    "accuracy_replay",
    "accuracy_train",
    "bayes_ceiling",
    "tie_rate",
    "reward_correlation",
    "r_mean",
    "r_std",
    "ce_grad_norm",
    "hyper_grad_norm",
)
POINTS = 200

# What a per-seed file must have, and what it must have with another column.
NEEDED_COLUMNS = {"global_step", "return_100"}
NEEDED_WITH = {"ce_fresh": "accuracy_fresh", "hyper_grad_norm": "ce_grad_norm"}

# Flags that do not change what a run measures, or that have a column of their own.
PRIVATE_FLAGS = (
    "runs_dir",
    "env_id",
    "exp_name",
    "seed",
    "checkpoint_every",
    "resume",
    "evaluate",
    "eval_every",
    "capture_video",
    "track",
    "tensorboard",
    "keep_replay",
)

# Flags that older runs do not have, with the values at which they would have made no difference.
LATER_FLAGS = {
    "anneal_timesteps": 0,
    "env_kwargs": "{}",
    "eval_max_steps": 10_000,
    "eval_stochastic": False,
    "hidden_size": 64,
    "rescale_actions": "auto",
}


def style(method: str):
    """Colour (None: see colours), line style and label of a method, by its exp_name."""
    return STYLES.get(method, (None, "-", method))


def colours(methods) -> dict:
    """Colours of methods in a figure; those without one of their own take matplotlib's in turn."""
    unstyled = [method for method in methods if style(method)[0] is None]
    return {method: style(method)[0] or f"C{unstyled.index(method)}" for method in methods}


def label(method: str) -> str:
    """The name of a method in tables and legends."""
    return style(method)[2]


def method_order(method: str):
    """Sorting key: methods as in STYLES, then the others by name."""
    known = list(STYLES)
    return (known.index(method) if method in known else len(known)), method


def run_order(row: dict):
    """Sorting key of the lines of a summary: environment, method, seed."""
    return row["env_id"], method_order(row["exp_name"]), int(row["seed"])


# Files


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, every value as text."""
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_csv(path: Path, rows: list[dict]) -> None:
    """Writes rows, of which some may lack columns; the columns are in the order in which they first occur.
    Makes the folder."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text.getvalue())


def curve_path(results_dir: Path, row: dict) -> Path:
    """The per-seed file that belongs to a line of the summary."""
    return results_dir / f"{row['env_id']}__{row['exp_name']}__{row['seed']}.csv"


# Run folders


def run_folders(runs_dir: Path) -> list[tuple[Path, dict]]:
    """Every run folder in runs_dir, by name, with the contents of its config.json.

    Ends the program with one line and status 2 if runs_dir is not a folder or a config.json is damaged.
    """
    if not runs_dir.is_dir():
        fail(f"--runs-dir {runs_dir} is not a folder")
    found = []
    for folder in sorted(path.parent for path in runs_dir.glob("*/config.json")):
        path = folder / "config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as problem:
            fail(f"{path} is not JSON: {problem}")
        if not isinstance(config, dict):
            fail(f"{path} is not of a run: it has no flags")
        found.append((folder, config))
    return found


def is_tabular(config: dict) -> bool:
    """Whether a run is one of sobirl_tabular.py, which measures other things than the deep scripts."""
    return config.get("script") == "sobirl_tabular.py"


def is_finished(folder: Path, proof: str) -> bool:
    """Whether a run has written its last file, `proof`; one that has not is named on standard output."""
    if (folder / proof).exists():
        return True
    print(f"no {Path(proof).stem}, left out: {folder.name}")
    return False


# Export


def export(runs_dir: Path, results_dir: Path) -> None:
    """Adds every finished run of a deep script (one with an evaluation) to results_dir.

    What was there of the same environment, exp_name and seed is replaced; of two such runs the one whose
    folder is later in the alphabet stays, which is the younger one. All runs of a name must have the same
    flags: if they have not, the program ends with one line and status 2, and nothing is written.
    """
    summary_path = results_dir / "summary.csv"
    known = read_csv(summary_path) if summary_path.exists() else []
    summary = {(row["env_id"], row["exp_name"], row["seed"]): row for row in known}
    curves = {}
    for folder, config in run_folders(runs_dir):
        if is_tabular(config) or not is_finished(folder, proof="evaluation.csv"):
            continue
        try:
            progress = read_csv(folder / "progress.csv")
            evaluation = read_csv(folder / "evaluation.csv")
            if not progress or not evaluation:
                raise ValueError("no rows")
            row = summary_row(config, progress[-1], evaluation)
            curve = curve_text(progress)
        except (ValueError, KeyError, TypeError) as problem:  # no text, no number, a missing column or cell
            fail(f"{folder}: progress.csv or evaluation.csv is damaged ({shown(problem)})")
        if cut := sum(episode.get("cut") == "1" for episode in evaluation):
            print(f"{cut} of {len(evaluation)} episodes of the evaluation were cut: {folder.name}")
        same_name = [
            other
            for other in summary.values()
            if (other["env_id"], other["exp_name"]) == (row["env_id"], row["exp_name"])
        ]
        refuse_changed_flags(folder, row, same_name, f"the runs of that name in {results_dir}")
        summary[row["env_id"], row["exp_name"], row["seed"]] = row
        curves[curve_path(results_dir, row)] = curve

    if not summary:
        return
    results_dir.mkdir(parents=True, exist_ok=True)
    for path, text in curves.items():
        write_whole(path, text)
    write_csv(summary_path, [summary[name] for name in sorted(summary)])


def summary_row(config: dict, last: dict, evaluation: list[dict]) -> dict:
    """The line of summary.csv for a run.

    config: contents of config.json; last: last row of progress.csv; evaluation: rows of evaluation.csv, one
    an episode. Returns are in the environment's own units, rounded to 0.01; wall_seconds are seconds, sps
    environment steps a second.
    """
    flags = config["flags"]
    row = {
        "env_id": slug(flags["env_id"]),
        "exp_name": slug(flags["exp_name"]),
        "seed": str(flags["seed"]),
        "script": config["script"],
        "global_step": last["global_step"],
        "return_100": round(float(last["return_100"]), 2),
        "eval_return": round(float(np.mean([float(episode["return"]) for episode in evaluation])), 2),
        "wall_seconds": last["wall_seconds"],
        "sps": last["sps"],
    }
    row |= {column: last[column] for column in LAST_COLUMNS if column in last}
    public_flags = {name: value for name, value in flags.items() if name not in PRIVATE_FLAGS}
    return row | config["versions"] | {"flags": json.dumps(public_flags)}


def refuse_changed_flags(folder: Path, row: dict, others: list[dict], named: str) -> None:
    """Ends the program with one line if a run's line of the summary has not the script and flags of others.
    Older lines do not name their script."""
    flags = LATER_FLAGS | json.loads(row["flags"])
    for other in others:
        script, known = row.get("script"), other.get("script")
        if script and known and script != known:
            fail(f"{folder.name} is a run of {script}, and not of {known} as {named}: give it an --exp-name")
        theirs = LATER_FLAGS | json.loads(other["flags"])
        common = flags.keys() & theirs.keys()
        if changed := sorted(name for name in common if flags[name] != theirs[name]):
            told = ", ".join(f"--{name} {flags[name]}, not {theirs[name]}" for name in changed)
            fail(f"{folder.name} has other flags than {named}: {told}")


def curve_text(progress: list[dict]) -> str:
    """The per-seed CSV file of a run: at most POINTS rows of its progress, evenly spread, first to last."""
    columns = [column for column in CURVE_COLUMNS if column in progress[0]]
    kept = np.unique(np.linspace(0, len(progress) - 1, POINTS).astype(int))
    lines = [",".join(f"{float(progress[i][column]):.6g}" for column in columns) for i in kept]
    return "\n".join([",".join(columns), *lines]) + "\n"


# What tables and figures start from


def has_return(row: dict) -> bool:
    """Whether the run of a line of the summary has finished an episode: others have no return."""
    return bool(np.isfinite(float(row["return_100"])))


def grouped(summary: list[dict]) -> dict[tuple[str, str], np.ndarray]:
    """Final training returns by (env_id, exp_name), each of shape (seeds,).

    They come in the order of tables and legends. A run that is too short to have finished an episode has no
    return and is left out.
    """
    finals = defaultdict(list)
    for row in sorted(summary, key=run_order):
        if has_return(row):
            finals[row["env_id"], row["exp_name"]].append(float(row["return_100"]))
    return {name: np.array(values) for name, values in finals.items()}


def without_episodes(summary: list[dict]) -> list[str]:
    """The runs that `grouped` leaves out, as texts, in the order of the summary."""
    return [
        f"{row['env_id']} {row['exp_name']} {row['seed']}"
        for row in summary
        if not has_return(row)
    ]


def column_of(summary, group, name: str) -> np.ndarray:
    """A column's numbers over the runs of a group that `grouped` counts, NaN where one has none."""
    runs = [row for row in summary if (row["env_id"], row["exp_name"]) == group]
    return np.array([float(row.get(name) or "nan") for row in runs if has_return(row)])


def load_curves(results_dir: Path, summary: list[dict]) -> dict[tuple[str, str], list[dict[str, np.ndarray]]]:
    """The per-seed files of all lines of a summary, by (env_id, exp_name).

    Every seed is a dictionary of columns of the shape (points,); a run's return_100 is NaN until its first
    episode ends.
    """
    curves = defaultdict(list)
    for row in sorted(summary, key=run_order):
        path = curve_path(results_dir, row)
        points = read_csv(path)
        columns = {column: np.array([float(point[column]) for point in points]) for column in points[0]}
        needed = NEEDED_COLUMNS | {other for column, other in NEEDED_WITH.items() if column in columns}
        if missing := needed - columns.keys():
            raise ValueError(f"{path.name} has no {' and '.join(sorted(missing))}")
        curves[row["env_id"], row["exp_name"]].append(columns)
    return dict(curves)


def load_results(results_dir: Path) -> tuple[list[dict[str, str]], dict]:
    """The summary and the curves of a folder; ends the program with one line where they are damaged."""
    try:
        summary = read_csv(results_dir / "summary.csv")
        for row in summary:
            int(json.loads(row["flags"])["total_timesteps"])
            float(row["return_100"])
        return summary, load_curves(results_dir, summary)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as problem:
        fail(f"{results_dir} is damaged ({shown(problem)})")


def starting_returns(curves) -> dict[str, float]:
    """Per environment the mean, over all runs of all methods, of a run's first finite return_100.

    curves: as from `load_curves`. An environment in which no run has finished an episode is missing.
    """
    starts = defaultdict(list)
    for (env_id, _), runs in curves.items():
        for run in runs:
            finite = run["return_100"][np.isfinite(run["return_100"])]
            starts[env_id].extend(finite[:1])
    return {env_id: float(np.mean(values)) for env_id, values in starts.items() if values}
