"""From run folders to results: per-seed curves as small CSV files, Markdown tables, figures (png and pdf).

    python tools/plot.py --runs-dir runs          # finished runs -> results/ -> tables and figures
    python tools/plot.py --apart preference:688   # results/ -> tables and figures, as they are published

The tables are printed and written to results/tables.md. results/speed.csv (by speed.py --csv),
results/solvers.csv (by solvers.py) and results/gate.csv (by gate.py) are drawn if they are there, with runs
or without. What the files hold is said in tools/results.py and tools/tabular.py, what the numbers mean in
tools/tables.py and tools/learning.py. Of runs that learn a reward there are other ones, if no others are in
the folder: tools/preferences.py.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a file, for which Python looks in tools/, but not in the folder that holds it
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support.files import write_whole
from support.flags import fail, parse_args, shown
from tools import figures, learning, preferences, results, tables, tabular


# Figures of what other tools have measured, and the files that they are drawn from
MEASUREMENTS = {
    "runtime": (figures.draw_runtime, ["speed.csv"]),
    "solvers": (figures.draw_solvers, ["solvers.csv"]),
    "gate": (figures.draw_gate, ["gate.csv", "gate_weights.csv"]),
}


@dataclass
class Args:
    runs_dir: str = ""
    """folder of run folders whose finished runs are added to results_dir first"""
    results_dir: str = "results"
    """folder of the per-seed CSV files"""
    figures_dir: str = "figures"
    """folder of the figures to write"""
    apart: str = ""
    """problem:seed of runs of sobirl_tabular.py to show in a row of their own, for example preference:688"""


def parse_apart(text: str) -> tuple[str, str] | None:
    """Problem and seed of --apart, None if it is empty; one line and status 2 if it is not problem:seed."""
    if not text:
        return None
    found = re.fullmatch(r"(.+):(0|[1-9][0-9]*)", text)
    if not found:
        fail(f"--apart must be problem:seed, for example preference:688, got {text}")
    return found[1], found[2]


def joined(*parts: str) -> str:
    """One text, of those tables that are not empty."""
    return "\n\n".join(filter(None, parts))


def deep_runs(results_dir: Path, figures_dir: Path) -> str:
    """Draws the figures of summary.csv and returns the tables."""
    summary, curves = results.load_results(results_dir)
    if silent := results.without_episodes(summary):
        print(f"no episode was finished, left out: {', '.join(silent)}")
    if not summary:
        fail(f"no results in {results_dir / 'summary.csv'}: add finished runs by --runs-dir")
    finals = results.grouped(summary)
    if text := preferences.by_setting(summary, finals):
        return joined(text, preferences.loss_by_setting(curves))
    if {row["exp_name"] for row in summary} <= set(results.LEADERS):
        figures.save(preferences.draw(curves), figures_dir, "preferences")
        differences = preferences.against_drlhf(summary, finals), preferences.new_pairs(curves)
        return joined(preferences.table(summary, finals), *differences)
    measured = learning.measures(summary, curves)
    compared = learning.comparisons(measured, curves)

    drawn = figures.curve_figures(curves)
    if compared:
        drawn["aggregate"] = figures.draw_aggregate(compared)
    for name, figure in drawn.items():
        figures.save(figure, figures_dir, name)
    parts = [tables.all_tables(summary), tables.policies(curves)]
    return joined(*parts, learning.table(compared), learning.without_area(measured, curves))


def tabular_runs(results_dir: Path, figures_dir: Path, apart: tuple[str, str] | None) -> str:
    """Draws the figures of tabular.csv; returns the table of tabular_summary.csv."""
    points = results.read_csv(results_dir / "tabular.csv")
    figures.save(tabular.draw_overview(points, apart), figures_dir, "tabular")
    figures.save(tabular.draw(points, apart), figures_dir, "tabular_all")
    return tabular.table(results.read_csv(results_dir / "tabular_summary.csv"), apart)


def has(results_dir: Path, *names: str) -> bool:
    """Whether all these files are there."""
    return all((results_dir / name).exists() for name in names)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    args = parse_args(Args, __doc__, argv)
    apart = parse_apart(args.apart)
    results_dir = Path(args.results_dir)
    figures_dir = Path(args.figures_dir)
    if args.runs_dir:
        results.export(Path(args.runs_dir), results_dir)
        tabular.export(Path(args.runs_dir), results_dir)
    has_deep = has(results_dir, "summary.csv")
    has_tabular = has(results_dir, "tabular_summary.csv", "tabular.csv")
    measured = [name for name, (_, files) in MEASUREMENTS.items() if has(results_dir, *files)]
    if not has_deep and not has_tabular and not measured:
        fail(f"no results in {results_dir}: name a folder with finished runs by --runs-dir")
    if apart:
        rows = results.read_csv(results_dir / "tabular_summary.csv") if has_tabular else []
        if apart not in {tabular.instance(row) for row in rows}:
            fail(f"--apart {args.apart}: {results_dir} has no run of sobirl_tabular.py with that seed")

    for name in measured:
        draw, files = MEASUREMENTS[name]
        read = [results.read_csv(results_dir / file) for file in files]
        try:
            if not all(read):
                raise ValueError("it has no rows")
            figure = draw(*read)
        except (ValueError, KeyError, TypeError, IndexError, ZeroDivisionError) as problem:
            fail(f"{' or '.join(files)} in {results_dir} is damaged ({shown(problem)})")
        figures.save(figure, figures_dir, name)
    parts = []
    if has_deep:
        parts.append(deep_runs(results_dir, figures_dir))
    if has_tabular:
        parts.append(tabular_runs(results_dir, figures_dir, apart))
    if parts:
        text = joined(*parts)
        write_whole(results_dir / "tables.md", text + "\n")
        print(text)  # last, since a pipe may have been closed: plot.py | head


if __name__ == "__main__":
    main()
