"""From run folders to results: per-seed curves as small CSV files, a Markdown table, figures (png and pdf).

    python plot.py --runs-dir runs          # runs/ -> results/ (finished runs only), then results/ -> table and figures
    python plot.py                          # only results/ -> table and figures

results/{env_id}__{exp_name}__{seed}.csv holds about 200 points of a run: the mean return of the last 100 training episodes,
the seconds it took so far (with whatever else the machine did), BLPO's diagnostics. results/summary.csv has a line per run
with its final return_100, its deterministic evaluation, versions and flags. results/speed.csv (by speed.py --csv) and
results/solvers.csv (by solvers.py) are drawn if they are there. Runs of sobirl_tabular.py go into results/tabular.csv (40 points
a run) and results/tabular_summary.csv, and from there into a table and a figure of their own. results/tables.md is what is printed.

Statistics: seeds are the unit. Bands and intervals are 95 %: bootstrap over seeds for curves and aggregates, Student's t for
the mean of a cell, Welch's for differences. Aggregates normalise a return by the environment: 0 is the first point of all
runs, 1 the final mean of "PPO, matched"; IQM is the mean of the middle half; P(BLPO > x) counts pairs of runs.
"""

import csv
import json
import re
import sys
import warnings
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import scipy.stats
import tyro

# exp_name: colour, line style, label; other names come after these. Okabe-Ito colours (grey for its yellow), told apart in grey by their line style.
STYLES = {
    "blpo": ("#0072B2", "-", "BLPO"),
    "blpo-released": ("#56B4E9", "--", "BLPO, released term"),
    "blpo-cg": ("#CC79A7", (0, (3, 1, 1, 1)), "BLPO with CG"),
    "blpo-pcg": ("#888888", (0, (3, 1, 1, 1, 1, 1)), "BLPO with preconditioned CG"),
    "control": ("#E69F00", "-.", "control: plain advantage"),
    "nested": ("#009E73", ":", "nesting only"),
    "ppo-matched": ("#000000", (0, (5, 1)), "PPO, matched"),
    "ppo": ("#D55E00", (0, (1, 2)), "PPO, CleanRL's flags"),
}
VARIANTS = ("blpo-released", "blpo-cg", "blpo-pcg", "control")  # a figure of their own
CURVE = ("global_step", "return_100", "wall_seconds", "implicit_cosine", "implicit_norm_ratio", "ihvp_correction")
PRIVATE = ("runs_dir", "env_id", "exp_name", "seed", "checkpoint_every", "resume", "evaluate", "eval_every", "capture_video", "track")


def style(method):
    return STYLES.get(method, (None, "-", method))


def rank(method):
    """Order of the methods in tables and legends: as in STYLES, then the others."""
    return list(STYLES).index(method) if method in STYLES else len(STYLES), method


def order(row):
    """Key by which rows of the summary are sorted."""
    return row["env_id"], rank(row["exp_name"]), int(row["seed"])


@dataclass
class Args:
    runs_dir: str = ""
    """folder of run folders whose finished runs are added to results_dir first"""
    results_dir: str = "results"
    """folder of the per-seed CSV files"""
    figures_dir: str = "figures"
    """folder of the figures to write"""


def read(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def write(path, rows):
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def finished(runs_dir: Path, tabular: bool, proof: str):
    """Folder, config and progress of the runs, of sobirl_tabular.py or of the others, that have the file `proof`; the rest is named."""
    for folder in sorted(path.parent for path in runs_dir.glob("*/config.json")):
        config = json.loads((folder / "config.json").read_text())
        if (config.get("script") == "sobirl_tabular.py") != tabular:
            continue
        if (folder / proof).exists():
            yield folder, config, read(folder / "progress.csv")
        else:
            print(f"no {Path(proof).stem}, left out: {folder.name}")


def export(runs_dir: Path, results_dir: Path):
    """Thins every finished run (one with an evaluation) to about 200 points; unfinished ones are named."""
    if not runs_dir.is_dir():
        sys.exit(f"error: --runs-dir {runs_dir} is not a folder")
    results_dir.mkdir(parents=True, exist_ok=True)
    summary_path = results_dir / "summary.csv"
    summary = {(row["env_id"], row["exp_name"], row["seed"]): row for row in read(summary_path)} if summary_path.exists() else {}
    files = {}  # written when all runs are known to fit together
    for folder, config, progress in finished(runs_dir, False, "evaluation.csv"):
        flags, returns = config["flags"], [float(row["return"]) for row in read(folder / "evaluation.csv")]
        name = *(re.sub(r"[^\w.-]+", "-", flags[key], flags=re.ASCII) for key in ("env_id", "exp_name")), str(flags["seed"])
        last = progress[-1]
        row = dict(zip(("env_id", "exp_name", "seed"), name)) | {"global_step": last["global_step"]}
        row |= {"return_100": round(float(last["return_100"]), 2), "eval_return": round(float(np.mean(returns)), 2)}
        row |= {"wall_seconds": last["wall_seconds"], "sps": last["sps"]} | config["versions"]
        row["flags"] = json.dumps(flags := {k: v for k, v in flags.items() if k not in PRIVATE})
        for other in (json.loads(r["flags"]) for r in summary.values() if (r["env_id"], r["exp_name"]) == name[:2]):
            if changed := [f"--{k} {flags[k]}, not {other[k]}" for k in flags.keys() & other.keys() if flags[k] != other[k]]:
                sys.exit(f"error: {folder.name} has other flags than the runs of that name in {results_dir}: {', '.join(sorted(changed))}")
        summary[name] = row
        keep = np.unique(np.linspace(0, len(progress) - 1, 200).astype(int))
        columns = [column for column in CURVE if column in last]
        lines = [",".join(f"{float(progress[i][column]):.6g}" for column in columns) for i in keep]
        files["__".join(name) + ".csv"] = "\n".join([",".join(columns), *lines]) + "\n"
    for name, text in files.items():
        (results_dir / name).write_text(text)
    if summary:
        write(summary_path, [summary[key] for key in sorted(summary)])


def grouped(summary):
    """Final returns of the seeds, by environment and method, in the order of tables and legends; a run that is too short to
    have finished an episode has none."""
    finals = defaultdict(list)
    for row in sorted((row for row in summary if np.isfinite(float(row["return_100"]))), key=order):
        finals[row["env_id"], row["exp_name"]].append(float(row["return_100"]))
    return {key: np.array(values) for key, values in finals.items()}


def beats(x, y) -> float:
    """P(X > Y) over all pairs of runs, ties counted half."""
    return float(np.mean((x[:, None] > y) + 0.5 * (x[:, None] == y)))


def formatter(finals, env_id):
    decimals = 0 if max(abs(x).max() for (env, _), x in finals.items() if env == env_id) >= 1000 else 1
    return lambda x: f"{x:,.{decimals}f}"


def with_spread(final, show) -> str:
    return show(final.mean()) + (f" ± {show(scipy.stats.t.ppf(0.975, len(final) - 1) * scipy.stats.sem(final))}" if len(final) > 1 else "")


def ahead(blpo, other, show) -> tuple[str, str]:
    """The interval of the difference of the means, and P(BLPO > other); empty where the seeds tell nothing."""
    if min(len(other), len(blpo)) < 2 or np.std(other) + np.std(blpo) == 0:
        return "", ""
    interval = scipy.stats.ttest_ind(blpo, other, equal_var=False).confidence_interval()
    return f"{show(interval.low)} to {show(interval.high)}", f"{beats(blpo, other):.2f}"


def overview(summary) -> str:
    """Markdown: a line per environment that has BLPO and PPO."""
    finals, main = grouped(summary), ("ppo", "ppo-matched", "nested", "blpo")
    methods = [method for method in main if any(m == method for _, m in finals)]
    lines = [f"| environment | {' | '.join(style(m)[2] for m in methods)} | BLPO minus PPO, matched | P(BLPO > PPO) |"]
    lines.append("|---" * (len(methods) + 3) + "|")
    for env_id in dict.fromkeys(env for env, _ in finals):
        if (env_id, "blpo") in finals and (env_id, "ppo-matched") in finals:
            show = formatter(finals, env_id)
            cells = [with_spread(finals[env_id, m], show) if (env_id, m) in finals else "" for m in methods]
            lines.append(f"| {' | '.join([env_id, *cells, *ahead(finals[env_id, 'blpo'], finals[env_id, 'ppo-matched'], show)])} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def table(summary) -> str:
    """Markdown: a line per environment and method, final training returns over seeds and how far BLPO is ahead."""
    lines = ["| environment | method | seeds | return, last 100 training episodes | BLPO minus this | P(BLPO > this) | each seed | deterministic evaluation |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    finals, evaluations = grouped(summary), defaultdict(list)
    for row in summary:
        evaluations[row["env_id"], row["exp_name"]].append(float(row["eval_return"]))
    for (env_id, method), final in finals.items():
        show = formatter(finals, env_id)
        difference = ahead(finals.get((env_id, "blpo"), []), final, show) if method != "blpo" else ("", "")
        each, evaluation = ", ".join(map(show, final)), show(np.mean(evaluations[env_id, method]))
        cells = (env_id, style(method)[2], len(final), with_spread(final, show), *difference, each, evaluation)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def bootstrap(finals, statistic, resamples=2000):
    """95 % interval of statistic({key: values}) when the seeds of every key are drawn again, with replacement."""
    rng = np.random.default_rng(0)
    draws = [statistic({key: rng.choice(x, len(x)) for key, x in finals.items()}) for _ in range(resamples)]
    return np.nanpercentile(draws, [2.5, 97.5])


def aggregate(summary, first) -> dict:
    """Per method with at least two seeds: IQM of normalised returns, BLPO's on the same environments, and P(BLPO > method), mean
    over environments, each (value, low, high), and over which environments. `first` is an environment's return at the first point."""
    finals, result = {key: x for key, x in grouped(summary).items() if len(x) > 1}, {}

    @cache  # BLPO's is asked for again with every method on the same environments
    def iqm(method, environments):
        used = {(env, method): finals[env, method] for env in environments}
        unit = {env: finals[env, "ppo-matched"].mean() - first[env] for env in environments}

        def statistic(draw):
            return scipy.stats.trim_mean(np.concatenate([(x - first[env]) / unit[env] for (env, _), x in draw.items()]), 0.25)

        return statistic(used), *bootstrap(used, statistic)

    for method in sorted({method for _, method in finals}, key=rank):
        common = tuple(env for env, m in finals if m == method and (env, "ppo-matched") in finals and (env, "blpo") in finals)
        several = len({env for env, m in finals if m == "blpo"}) > 1
        if len(common) < 1 + several:  # one environment among several is no aggregate
            continue

        def chance(draw):
            return np.mean([beats(draw[env, "blpo"], draw[env, method]) for env in common])

        result[method] = {"environments": common, "iqm": iqm(method, common)}
        if method != "blpo":
            used = {key: x for key, x in finals.items() if key[0] in common and key[1] in (method, "blpo")}
            result[method] |= {"blpo": iqm("blpo", common), "chance": (chance(used), *bootstrap(used, chance))}
    return result


def save(fig, figures_dir: Path, name: str):
    figures_dir.mkdir(parents=True, exist_ok=True)
    for suffix in ("png", "pdf"):
        fig.savefig(figures_dir / f"{name}.{suffix}", dpi=120, bbox_inches="tight", metadata={"CreationDate": None} if suffix == "pdf" else None)
    plt.close(fig)


def panels(count: int):
    columns = 2 if count == 4 else min(count, 3)
    fig, axes = plt.subplots(-(-count // columns), columns, figsize=(4.4 * columns, 3.4 * -(-count // columns)), squeeze=False)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return fig, axes.flat[:count]


def draw_curves(curves, x, y, xlabel, ylabel, scale):
    """A panel per environment of y against x: mean over seeds, 95 % bootstrap band."""
    environments = list(dict.fromkeys(env for env, _ in curves))
    fig, axes = panels(len(environments))
    for axis, env_id in zip(axes, environments):
        for method, runs in ((m, runs) for (env, m), runs in curves.items() if env == env_id):
            colour, line, label = style(method)
            runs = [{k: run[k][np.isfinite(run[y])] for k in (x, y)} for run in runs if x in run and y in run and np.isfinite(run[y]).any()]
            if not runs:
                continue
            grid = np.linspace(max(run[x][0] for run in runs), min(run[x][-1] for run in runs), 200)  # what all runs reach
            values = np.array([np.interp(grid, run[x], run[y]) for run in runs])
            (mean,) = axis.plot(grid / scale, values.mean(0), color=colour, linestyle=line, linewidth=1.8, label=f"{label} (n = {len(runs)})")
            if len(runs) > 1:
                band = scipy.stats.bootstrap((values,), np.mean, axis=0, method="percentile", n_resamples=1000, rng=0).confidence_interval
                axis.fill_between(grid / scale, band.low, band.high, color=mean.get_color(), alpha=0.15, linewidth=0)
        axis.set(title=env_id, xlabel=xlabel, xlim=(0, None))
        axis.grid(alpha=0.25)
        axis.legend(fontsize=7, frameon=False, handlelength=3)
    for axis in fig.axes[:: fig.axes[0].get_gridspec().ncols]:
        axis.set_ylabel(ylabel)
    fig.tight_layout()
    return fig


def draw_aggregate(result):
    fig, axes = plt.subplots(1, 2, figsize=(9, 0.5 * len(result) + 1.4), sharey=True)
    for row, (method, values) in enumerate(reversed(result.items())):
        for name, axis, y, width, by in (("iqm", 0, row, 6, method), ("blpo", 0, row - 0.28, 2, "blpo"), ("chance", 1, row, 6, method)):
            if name in values:
                (value, *interval), colour = values[name], style(by)[0]
                axes[axis].plot(interval, [y, y], color=colour, linewidth=width, alpha=0.35, solid_capstyle="butt")
                axes[axis].plot(value, y, "o", color=colour, markersize=width)
    axes[0].set(yticks=range(len(result)), ylim=(-0.6, len(result) - 0.4))
    axes[0].set_xlabel("IQM of normalised returns (PPO, matched = 1)\nthin: BLPO on the same environments")
    axes[0].set_yticklabels([f"{style(m)[2]} ({len(v['environments'])} env.)" for m, v in reversed(result.items())])
    axes[1].set(xlabel="P(BLPO > this), pairs of runs", xlim=(0, 1))
    axes[1].axvline(0.5, color="grey", linewidth=0.8)
    for axis in axes:
        axis.grid(alpha=0.25)
    fig.tight_layout()
    return fig


def draw_runtime(rows):
    """Time per step by phase, relative to the whole of PPO's, from results/speed.csv."""
    phases = [column.removesuffix("_ms") for column in rows[0] if column.endswith("_ms")]
    base = next((row for row in rows if row["name"] == "ppo-matched"), rows[-1])
    fig, axis = plt.subplots(figsize=(7, 0.45 * len(rows) + 1.6))
    for y, row in enumerate(reversed(rows)):
        total, parts = float(base["sps"]) / float(row["sps"]), np.array([float(row[f"{phase}_ms"] or 0) for phase in phases])
        parts = parts / max(parts.sum(), 1e-9) * total
        if not parts.any():  # a command that does not tell its phases
            axis.barh(y, total, color="white", edgecolor="black")
        left = np.concatenate([[0], parts.cumsum()])
        for i, (phase, part) in enumerate(zip(phases, parts)):
            grey, hatch = str(0.25 + 0.6 * i / max(len(phases) - 1, 1)), ("", "//", "", "..", "", "xx")[i % 6]
            axis.barh(y, part, left=left[i], color=grey, hatch=hatch, edgecolor="white", label=phase if y == 0 else None)
        axis.text(total + 0.02, y, f"{total:.2f}", va="center", fontsize=8)
    axis.set(yticks=range(len(rows)), xlabel=f"time per environment step, relative to {style(base['name'])[2]}")
    axis.set_yticklabels([style(row["name"])[2] for row in reversed(rows)])
    axis.set_xlim(0, 1.12 * max(float(base["sps"]) / float(row["sps"]) for row in rows))
    axis.legend(fontsize=7, ncols=3, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    fig.tight_layout()
    return fig


SOLVERS = {
    "columns": ("#000000", "s", "Nyström, random columns"),
    "gaussian": ("#E69F00", "D", "Nyström, Gaussian"),
    "v-gaussian": ("#56B4E9", "^", "Nyström, v first"),
    "krylov": ("#0072B2", "o", "Nyström, Krylov (default)"),
    "cg": ("#CC79A7", "v", "CG"),
    "pcg": ("#009E73", "P", "preconditioned CG"),
}


def draw_solvers(rows):
    """Residual against time per solve, a point per budget, from results/solvers.csv."""
    fig, axes = panels(len(environments := list(dict.fromkeys(row["env_id"] for row in rows))))
    for axis, env_id in zip(axes, environments):
        for solver, (colour, marker, label) in SOLVERS.items():
            for hessian, line, fill in (("gauss-newton", "-", colour), ("full", ":", "white")):
                points = [(float(r["ms"]), float(r["residual"])) for r in rows if (r["env_id"], r["solver"], r["hessian"]) == (env_id, solver, hessian)]
                axis.plot(*zip(*points), line, color=colour, marker=marker, markersize=5, markerfacecolor=fill, linewidth=1,
                          label=label if hessian == "gauss-newton" else None)  # fmt: skip
        axis.set(title=env_id, xlabel="ms per solve", xscale="log", yscale="log")
        axis.set_xticks([0.5, 1, 2, 5, 10, 20], labels=["0.5", "1", "2", "5", "10", "20"])
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("‖(H + ρI)x − v‖ / ‖v‖")
    axes[0].legend(fontsize=6.5, frameon=False, title="filled: Gauss–Newton products\nhollow, dotted: full Hessian", title_fontsize=6.5)
    fig.tight_layout()
    return fig


def benchmark(results: Path, figures: Path) -> str:
    """Draws all figures of results/summary.csv; its tables."""
    summary = read(results / "summary.csv")
    curves, missing = defaultdict(list), {(env, method): len(x) for (env, method), x in grouped(summary).items()}
    if silent := [f"{row['env_id']} {row['exp_name']} {row['seed']}" for row in summary if not np.isfinite(float(row["return_100"]))]:
        print(f"no episode was finished, left out: {', '.join(silent)}")
    for row in sorted(summary, key=order):
        points = read(results / f"{row['env_id']}__{row['exp_name']}__{row['seed']}.csv")
        curves[row["env_id"], row["exp_name"]].append({k: np.array([float(p[k]) for p in points]) for k in points[0]})
    tables = [overview(summary), table(summary)]
    if few := [f"{env} {style(method)[2]} ({n})" for (env, method), n in missing.items() if n < max(missing.values())]:
        tables.append(f"fewer seeds than others: {', '.join(few)}")
    first = defaultdict(list)
    for (env_id, _), runs in curves.items():
        first[env_id] += [run["return_100"][np.isfinite(run["return_100"])][0] for run in runs if np.isfinite(run["return_100"]).any()]
    first = {env_id: np.mean(values) for env_id, values in first.items() if values}
    label = "return, mean of the last 100 episodes"
    steps = ("global_step", "return_100", "environment steps (millions)", label, 1e6)
    save(draw_curves({key: runs for key, runs in curves.items() if key[1] not in VARIANTS} or curves, *steps), figures, "curves")
    varied = {env for env, method in curves if method in VARIANTS}
    if varied and any(method not in VARIANTS for _, method in curves):
        shown = {key: runs for key, runs in curves.items() if key[0] in varied and key[1] in ("blpo", *VARIANTS)}
        save(draw_curves(shown, *steps), figures, "variants")
    save(draw_curves(curves, "wall_seconds", "return_100", "wall-clock time (minutes)", label, 60), figures, "time")
    bilevel = {key: runs for key, runs in curves.items() if any("ihvp_correction" in run for run in runs)}
    for name, what in dict(implicit_cosine="cosine of implicit term and policy gradient", implicit_norm_ratio="norm of implicit term / policy gradient",
                           ihvp_correction="‖x − v/ρ‖ / ‖v/ρ‖").items():  # fmt: skip
        if bilevel:
            save(draw_curves(bilevel, "global_step", name, "environment steps (millions)", what, 1e6), figures, name)
    if result := aggregate(summary, first):
        lines = ["| over the environments that have all of BLPO, PPO matched and the method | IQM of normalised returns | BLPO's there | P(BLPO > this) |"]
        lines.append("|---|---|---|---|")
        for method, values in result.items():
            cells = ["{:.2f} ({:.2f} to {:.2f})".format(*values[name]) if name in values else "" for name in ("iqm", "blpo", "chance")]
            lines.append(f"| {style(method)[2]} ({len(values['environments'])}) | {' | '.join(cells)} |")
        tables.append("\n".join(lines))
        save(draw_aggregate(result), figures, "aggregate")
    if (results / "speed.csv").exists():
        save(draw_runtime(read(results / "speed.csv")), figures, "runtime")
    if (results / "solvers.csv").exists():
        save(draw_solvers(read(results / "solvers.csv")), figures, "solvers")
    return "\n\n".join(filter(None, tables))


# sobirl_tabular.py: colour, line style, label, oracle and published rate

TABULAR = {
    "exact": ("#BBBBBB", "-", "exact (9)"),
    "m-sobirl": ("#0072B2", "-", "M-SoBiRL"),
    "m-sobirl-w": ("#0072B2", ":", "M-SoBiRL, w solved"),
    "unrolled": ("#000000", (0, (1, 3)), "unrolled"),
    "parl": ("#CC79A7", (0, (4, 4)), "PARL"),
    "pbrl": ("#E69F00", (0, (2, 4)), "PBRL"),
    "hpgd": ("#009E73", "-.", "HPGD, 64 samples"),
    "sobirl": ("#56B4E9", (0, (5, 2)), "SoBiRL (15), expectation"),
    "sobirl-78": ("#F0E442", "-", "SoBiRL (78), expectation"),
    "sobirl-64": ("#56B4E9", ":", "SoBiRL (15), 64 samples"),
    "stoc-sobirl": ("#000000", "-.", "Stoc-SoBiRL, 64 samples"),
    "drlhf": ("#D55E00", "--", "DRLHF"),
}
TOLERANCE = 1e-3
OPPOSED = ("preference", "688")  # DRLHF sets out against the hypergradient and ends above where it began: shown by itself


def panel(row):
    """The problem under which a run is shown."""
    return f"{row['problem']}, seed {row['seed']}" if (row["problem"], row["seed"]) == OPPOSED else row["problem"]


def tabular_order(row):
    names, problems = list(TABULAR), ["synthetic", "reward-shaping", "preference", panel(dict(problem=OPPOSED[0], seed=OPPOSED[1]))]
    return problems.index(panel(row)), names.index(row["exp_name"]) if row["exp_name"] in names else len(names), row["exp_name"], int(row["seed"])


def export_tabular(runs_dir: Path, results_dir: Path):
    """Adds every finished run of sobirl_tabular.py (one with a solution): 40 points of it, and a line of what it reached."""
    paths = [results_dir / "tabular_summary.csv", results_dir / "tabular.csv"]
    summary, points = {key(row): row for row in read(paths[0])} if paths[0].exists() else {}, defaultdict(list)
    for row in read(paths[1]) if summary else []:
        points[key(row)].append(row)
    for _, config, progress in finished(runs_dir, True, "solution.pt"):
        flags, progress = config["flags"], [{k: float(v) for k, v in row.items()} for row in progress]
        name = {"problem": flags["problem"], "exp_name": re.sub(r"[^\w.-]+", "-", flags["exp_name"], flags=re.ASCII), "seed": str(flags["seed"])}
        last, there = progress[-1], next((row for row in progress if row["gradient_norm"] <= TOLERANCE), {})
        row = name | {"rounds": int(last["round"]), "seconds": last["seconds"], "phi": last["phi"], "gradient_norm": last["gradient_norm"]}
        row |= {f"{column}_to_{TOLERANCE:g}": there.get(column, "") for column in ("round", "seconds")}
        row |= {"sweeps": round(float(np.mean([row["sweeps"] for row in progress])), 1)} | config["versions"]
        summary[key(row)] = row | {"flags": json.dumps({k: v for k, v in flags.items() if k not in (*name, *PRIVATE)})}
        keep = np.unique(np.geomspace(1, len(progress), 40).round().astype(int)) - 1
        columns = ("round", "seconds", "phi", "gradient_norm", "cosine")
        points[key(row)] = [name | {column: f"{progress[i][column]:.5g}" for column in columns} for i in keep]
    if summary:
        results_dir.mkdir(parents=True, exist_ok=True)
        rows = sorted(summary.values(), key=tabular_order)
        write(paths[0], rows)
        write(paths[1], [point for row in rows for point in points[key(row)]])


def key(row):
    return row["problem"], row["exp_name"], row["seed"]


def tabular_table(summary) -> str:
    """Markdown: medians over seeds; rounds and seconds until |grad phi| <= 0.001, of the seeds that get there."""
    lines = ["| problem | method | seeds | reach ‖∇φ‖ ≤ 0.001 | rounds until then | seconds until then | sweeps a round | last φ | last ‖∇φ‖ | rounds |"]
    lines.append("|---|---|---|---|---|---|---|---|---|---|")
    groups = defaultdict(list)
    for row in sorted(summary, key=tabular_order):
        groups[panel(row), row["exp_name"]].append(row)
    for (problem, method), rows in groups.items():
        median = lambda column: np.median([float(row[column]) for row in rows if row[column] != ""])
        there = [row for row in rows if row[f"round_to_{TOLERANCE:g}"] != ""]
        until = [f"{median(f'round_to_{TOLERANCE:g}'):,.0f}", f"{median(f'seconds_to_{TOLERANCE:g}'):.2f}"] if there else ["", ""]
        cells = [problem, TABULAR.get(method, (0, 0, method))[2], len(rows), len(there), *until, f"{median('sweeps'):.0f}"]
        cells += [f"{median('phi'):.4f}", f"{median('gradient_norm'):.2g}", f"{median('rounds'):,.0f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def draw_tabular(points):
    """A row per problem: phi, |grad phi| against rounds and seconds, cosine to the hypergradient; medians over seeds, and quartiles."""
    groups = defaultdict(lambda: defaultdict(list))
    for row in sorted(points, key=tabular_order):
        groups[panel(row), row["exp_name"]][row["seed"]].append(row)
    problems = list(dict.fromkeys(problem for problem, _ in groups))
    panels = [("round", "phi", "rounds", "φ"), ("round", "gradient_norm", "rounds", "‖∇φ‖"), ("seconds", "gradient_norm", "seconds", "‖∇φ‖"),
              ("round", "cosine", "rounds", "cosine of direction and ∇φ")]  # fmt: skip
    fig, axes = plt.subplots(len(problems), 4, figsize=(15, 3.1 * len(problems) + 0.7), squeeze=False)
    for (problem, method), seeds in groups.items():
        colour, line, label = TABULAR.get(method, (None, "-", method))
        for axis, (x, y, xlabel, ylabel) in zip(axes[problems.index(problem)], panels):
            runs = [{k: np.array([float(p[k]) for p in run]) for k in (x, y)} for run in seeds.values()]
            first = (lambda run: run[x] + 1) if x == "round" else (lambda run: run[x])
            grid = np.geomspace(max(first(run)[0] for run in runs), min(first(run)[-1] for run in runs), 100)
            values = np.array([np.interp(np.log(grid), np.log(first(run)), run[y]) for run in runs])
            axis.plot(grid, np.median(values, 0), color=colour, linestyle=line, linewidth=5 if method == "exact" else 1.7, label=label)
            if len(runs) > 1 and method != "exact":
                axis.fill_between(grid, *np.percentile(values, [25, 75], axis=0), color=axis.lines[-1].get_color(), alpha=0.12, linewidth=0)
            axis.set(xlabel=xlabel, ylabel=ylabel, xscale="log", title=f"{problem} (n = {len(seeds)})")
            axis.set_yscale("log" if y == "gradient_norm" or (problem, y) == ("synthetic", "phi") else "linear")
            axis.xaxis.set_minor_formatter("")
            axis.yaxis.set_minor_formatter("")
            axis.grid(alpha=0.25)
    handles = {line.get_label(): line for axis in axes.flat for line in axis.lines}
    fig.tight_layout(rect=(0, 0.7 / (3.1 * len(problems) + 0.7), 1, 1))
    fig.legend(handles.values(), handles.keys(), loc="lower center", ncols=6, frameon=False, fontsize=9, handlelength=4)
    return fig


if __name__ == "__main__":
    matplotlib.use("Agg")
    warnings.filterwarnings("ignore", category=scipy.stats.DegenerateDataWarning)  # seeds that all reach the maximum
    args = tyro.cli(Args, description=__doc__)
    results, figures = Path(args.results_dir), Path(args.figures_dir)
    if args.runs_dir:
        export(Path(args.runs_dir), results)
        export_tabular(Path(args.runs_dir), results)
    if not any((results / name).exists() for name in ("summary.csv", "tabular_summary.csv")):
        sys.exit(f"error: no results in {results}: name a folder with finished runs by --runs-dir")
    tables = [benchmark(results, figures)] if (results / "summary.csv").exists() else []
    if (results / "tabular_summary.csv").exists():
        tables.append(tabular_table(read(results / "tabular_summary.csv")))
        save(draw_tabular(read(results / "tabular.csv")), figures, "tabular")
    print("\n\n".join(tables))
    (results / "tables.md").write_text("\n\n".join(tables) + "\n")
