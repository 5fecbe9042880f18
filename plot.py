"""Results from run folders: per-seed curves as small CSV files, a Markdown table and learning curves.

    python plot.py --runs-dir runs          # runs/ -> results/ (finished runs only), then results/ -> table and figure
    python plot.py                          # only results/ -> table and figure

results/{env_id}__{exp_name}__{seed}.csv holds about 200 points of (global_step, return_100), the mean return of the last 100
training episodes; results/summary.csv a line per run with its final return_100, its deterministic evaluation, versions and flags.
"""

import csv
import json
import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import scipy.stats
import tyro

# exp_name: colour, line style, label; other names get the next colour. Okabe-Ito colours, readable in grey by their line style; a method looks the same everywhere.
STYLES = {
    "blpo": ("#0072B2", "-", "BLPO (exact)"),
    "blpo-released": ("#56B4E9", "--", "BLPO (released)"),
    "control": ("#E69F00", "-.", "control: plain advantage"),
    "nested": ("#009E73", ":", "nesting only"),
    "ppo-matched": ("#000000", (0, (5, 1)), "PPO, matched"),
}


def style(method):
    return STYLES.get(method, (None, "-", method))


@dataclass
class Args:
    runs_dir: str = ""
    """folder of run folders whose finished runs are added to results_dir first"""
    results_dir: str = "results"
    """folder of the per-seed CSV files"""
    figure: str = "figures/continuous.png"
    """the figure to write"""


def rank(method):
    """Order of the methods in the table and the legend: as in STYLES, then the others."""
    return list(STYLES).index(method) if method in STYLES else len(STYLES), method


def read(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def export(runs_dir: Path, results_dir: Path):
    """Thins every finished run (one with an evaluation) to about 200 points; unfinished ones are named."""
    if not runs_dir.is_dir():
        sys.exit(f"error: --runs-dir {runs_dir} is not a folder")
    results_dir.mkdir(parents=True, exist_ok=True)
    summary_path = results_dir / "summary.csv"
    summary = {(row["env_id"], row["exp_name"], row["seed"]): row for row in read(summary_path)} if summary_path.exists() else {}
    for folder in sorted(path.parent for path in runs_dir.glob("*/config.json")):
        if not (folder / "evaluation.csv").exists():
            print(f"no evaluation, left out: {folder.name}")
            continue
        config, progress = json.loads((folder / "config.json").read_text()), read(folder / "progress.csv")
        flags, returns = config["flags"], [float(row["return"]) for row in read(folder / "evaluation.csv")]
        name = *(re.sub(r"[^\w.-]+", "-", flags[key], flags=re.ASCII) for key in ("env_id", "exp_name")), str(flags["seed"])
        last = progress[-1]
        row = dict(zip(("env_id", "exp_name", "seed"), name)) | {"global_step": last["global_step"]}
        row |= {"return_100": round(float(last["return_100"]), 2), "eval_return": round(float(np.mean(returns)), 2)}
        row |= {"wall_seconds": last["wall_seconds"], "sps": last["sps"]} | config["versions"]
        row["flags"] = json.dumps({k: v for k, v in flags.items() if k not in ("runs_dir", "env_id", "exp_name", "seed")})
        if (others := {r["flags"] for r in summary.values() if (r["env_id"], r["exp_name"]) == name[:2]} - {row["flags"]}):
            sys.exit(f"error: {folder.name} has other flags than the runs of that name in {results_dir}: {row['flags']}, not {others.pop()}")
        summary[name] = row
        keep = np.unique(np.linspace(0, len(progress) - 1, 200).astype(int))
        with open(results_dir / ("__".join(name) + ".csv"), "w") as file:
            file.write("global_step,return_100\n")
            file.writelines(f"{progress[i]['global_step']},{float(progress[i]['return_100']):.2f}\n" for i in keep)
    columns = list(dict.fromkeys(column for row in summary.values() for column in row))
    with open(summary_path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(summary[key] for key in sorted(summary))


def table(summary) -> str:
    """Markdown: mean ± standard deviation over seeds of the last 100 training episodes and of the evaluation, and how far
    BLPO is ahead in the former, as Welch's 95 % confidence interval."""
    lines = ["| environment | method | seeds | last 100 training episodes | BLPO (exact) minus this, 95 % | each seed | deterministic evaluation |"]
    lines.append("|---|---|---|---|---|---|---|")
    groups = defaultdict(list)
    for row in summary:
        groups[row["env_id"], row["exp_name"]].append(row)
    spread = lambda x: f"{np.mean(x):,.0f} ± {np.std(x, ddof=1):,.0f}" if len(x) > 1 else f"{x[0]:,.0f}"
    finals = {key: [float(row["return_100"]) for row in rows] for key, rows in groups.items()}
    for (env_id, method), rows in sorted(groups.items(), key=lambda item: (item[0][0], rank(item[0][1]))):
        final, blpo, ahead = finals[env_id, method], finals.get((env_id, "blpo"), []), ""
        if method != "blpo" and min(len(final), len(blpo)) > 1 and np.std(final) * np.std(blpo) > 0:
            interval = scipy.stats.ttest_ind(blpo, final, equal_var=False).confidence_interval()
            ahead = f"{interval.low:+,.0f} to {interval.high:+,.0f}"
        each, evaluation = ", ".join(f"{x:,.0f}" for x in final), [float(row["eval_return"]) for row in rows]
        lines.append(f"| {env_id} | {style(method)[2]} | {len(rows)} | {spread(final)} | {ahead} | {each} | {spread(evaluation)} |")
    return "\n".join(lines)


def draw(results_dir: Path, summary, figure: Path):
    """A panel per environment: mean over seeds, thin lines for the seeds themselves."""
    environments = sorted({row["env_id"] for row in summary}, reverse=True)
    fig, axes = plt.subplots(1, len(environments), figsize=(5.2 * len(environments), 4.8), squeeze=False)
    for axis, env_id in zip(axes[0], environments):
        for method in sorted({row["exp_name"] for row in summary if row["env_id"] == env_id}, key=rank):
            colour, line, label = style(method)
            rows = [row for row in summary if (row["env_id"], row["exp_name"]) == (env_id, method)]
            curves = [read(results_dir / f"{env_id}__{method}__{row['seed']}.csv") for row in rows]
            curves = [np.array([[float(p["global_step"]), float(p["return_100"])] for p in curve]).T for curve in curves]
            steps = max((curve[0] for curve in curves), key=len)
            returns = np.array([np.interp(steps, *curve, right=np.nan) for curve in curves])  # a short run ends where it ends
            (mean,) = axis.plot(steps / 1e6, returns.mean(0), color=colour, linestyle=line, linewidth=2, label=f"{label} (n = {len(rows)})")
            axis.plot(steps / 1e6, returns.T, color=mean.get_color(), linewidth=0.5, alpha=0.45)
        axis.set(title=env_id, xlabel="environment steps (millions)", xlim=(0, None))
        axis.grid(alpha=0.25)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, fontsize=8, frameon=False)
    axes[0, 0].set_ylabel("return, mean of the last 100 episodes")
    fig.tight_layout()
    figure.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(figure, dpi=120)


if __name__ == "__main__":
    matplotlib.use("Agg")
    args = tyro.cli(Args, description=__doc__)
    results = Path(args.results_dir)
    if args.runs_dir:
        export(Path(args.runs_dir), results)
    summary = read(results / "summary.csv") if (results / "summary.csv").exists() else []
    if not summary:
        sys.exit(f"error: no results in {results}: name a folder with finished runs by --runs-dir")
    print(table(summary))
    draw(results, summary, Path(args.figure))
