"""tools/plot.py and its modules: from run folders, made up here, to CSV files, tables and what is drawn."""

import csv
import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import scipy.stats

from matplotlib.figure import Figure
from moviepy import ImageSequenceClip
from PIL import Image

from tools import figures, film, learning, plot, results, speed, tables, tabular

ROOT = Path(__file__).parent.parent
TUNED = ROOT / "results" / "tuned"  # docs/results.md, C
VERSIONS = {"python": "3.11.7", "torch": "2.13.0", "gymnasium": "1.4.0", "git_commit": "0123abc"}


# Run folders as the scripts write them


def write_rows(path, rows):
    lines = [",".join(rows[0])] + [",".join(str(value) for value in row.values()) for row in rows]
    path.write_text("\n".join(lines) + "\n")


def write_run(
    runs_dir, method, seed, *, env_id="Pendulum-v1", length=30, final=10.0, evaluation=(1.0,), **flags
):
    """A finished run of a deep script; its return rises to `final` in equal steps, the first is NaN."""
    folder = runs_dir / f"{re.sub('[^a-zA-Z0-9_.-]', '-', f'{env_id}__{method}')}__{seed}__1795573961"
    folder.mkdir(parents=True)
    private = {"runs_dir": str(runs_dir), "resume": "", "evaluate": "", "track": False}
    own = {"env_id": env_id, "exp_name": method, "seed": seed, "gamma": 0.99, "total_timesteps": 64 * length}
    own |= private | flags
    script = "blpo_continuous.py" if method.startswith("blpo") else "ppo_continuous.py"
    config = {"script": script, "flags": own, "versions": VERSIONS}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    rows = []
    for i in range(length):
        row = {"global_step": 64 * (i + 1), "wall_seconds": 0.5 * (i + 1), "sps": 128.5, "episodes": i}
        row["return_100"] = final * i / (length - 1) if i else "nan"
        row |= {"approx_kl": 0.03, "entropy": 5 - 0.125 * i}
        if method.startswith("blpo"):
            row |= {"ihvp_correction": 0.25, "implicit_cosine": 0.5, "implicit_norm_ratio": 2.0}
        rows.append(row | {"seconds_env": 0.1})
    write_rows(folder / "progress.csv", rows)
    write_rows(folder / "evaluation.csv", [{"return": value, "length": 200} for value in evaluation])
    return folder


def write_tabular_run(runs_dir, problem, method, seed, *, norms, phis=None):
    """A finished run of sobirl_tabular.py with the given |grad phi|, one a round."""
    folder = runs_dir / f"{problem}__{method}__{seed}__1795573966"
    folder.mkdir(parents=True)
    flags = {
        "problem": problem,
        "method": "m-sobirl",
        "exp_name": method,
        "seed": seed,
        "runs_dir": str(runs_dir),
    }
    config = {"script": "sobirl_tabular.py", "flags": flags | {"beta": 0.5}, "versions": VERSIONS}
    (folder / "config.json").write_text(json.dumps(config))
    rows = []
    for i, norm in enumerate(norms):
        phi = phis[i] if phis else 100 - i
        row = {
            "round": i,
            "seconds": 0.25 * (i + 1),
            "phi": phi,
            "gradient_norm": norm,
            "cosine": 1 - 0.01 * i,
        }
        rows.append(row | {"policy_error": 7.0, "sweeps": 10 + i % 2})
    write_rows(folder / "progress.csv", rows)
    (folder / "solution.pt").touch()
    return folder


def read(path):
    """Every row of a CSV file, by a reader that is not the one under test."""
    head, *lines = csv.reader(path.read_text(encoding="utf-8").splitlines())
    return [dict(zip(head, line, strict=True)) for line in lines]


# Export


def test_every_column_of_the_export(tmp_path):
    """Numbers that are all different, so that an exchange of columns shows."""
    kept = {"num_envs": 4, "norm_obs": True}
    private = {"checkpoint_every": 5, "eval_every": 2, "capture_video": True}
    write_run(
        tmp_path / "runs",
        "blpo run",
        7,
        env_id="module:Some Env/v0",
        length=401,
        final=123.456,
        evaluation=(50.0, 60.0, 71.111),
        **kept,
        **private,
    )
    results.export(tmp_path / "runs", tmp_path / "results")
    (row,) = read(tmp_path / "results" / "summary.csv")
    assert json.loads(row.pop("flags")) == {"gamma": 0.99, "total_timesteps": 64 * 401} | kept
    assert row == VERSIONS | {
        "env_id": "module-Some-Env-v0",
        "exp_name": "blpo-run",
        "seed": "7",
        "script": "blpo_continuous.py",
        "global_step": str(64 * 401),
        "return_100": "123.46",
        "eval_return": "60.37",  # the mean of the three episodes
        "wall_seconds": "200.5",
        "sps": "128.5",
    }
    points = read(tmp_path / "results" / "module-Some-Env-v0__blpo-run__7.csv")
    assert list(points[0]) == [
        "global_step",
        "return_100",
        "wall_seconds",
        "implicit_cosine",
        "implicit_norm_ratio",
        "ihvp_correction",
        "approx_kl",
        "entropy",
    ]
    kept_rows = [int(i * 400 / 199) for i in range(200)]
    for i, point in zip(kept_rows, points, strict=True):
        assert float(point["global_step"]) == 64 * (i + 1) and float(point["wall_seconds"]) == 0.5 * (i + 1)
        expected = 123.456 * i / 400 if i else math.nan
        assert float(point["return_100"]) == pytest.approx(expected, rel=1e-5, nan_ok=True)
        diagnostics = {"implicit_cosine": "0.5", "implicit_norm_ratio": "2", "ihvp_correction": "0.25"}
        diagnostics |= {"approx_kl": "0.03", "entropy": f"{5 - 0.125 * i:g}"}
        assert point.items() >= diagnostics.items()


def test_a_short_run_keeps_every_row_and_ppo_has_no_hypergradient(tmp_path):
    write_run(tmp_path / "runs", "ppo", 1, length=9)
    results.export(tmp_path / "runs", tmp_path / "results")
    points = read(tmp_path / "results" / "Pendulum-v1__ppo__1.csv")
    columns = ["global_step", "return_100", "wall_seconds", "approx_kl", "entropy"]
    assert len(points) == 9 and list(points[0]) == columns


def test_export_adds_replaces_and_refuses_what_does_not_fit(tmp_path, capsys, refused):
    runs, out = tmp_path / "runs", tmp_path / "results"
    for seed in (10, 9):
        write_run(runs, "blpo", seed, final=seed)
    killed = write_run(runs, "blpo", 11)
    (killed / "evaluation.csv").unlink()
    write_tabular_run(runs, "synthetic", "exact", 1, norms=[1.0])
    results.export(runs, out)
    assert capsys.readouterr().out == f"no evaluation, left out: {killed.name}\n"
    assert [(row["seed"], row["return_100"]) for row in read(out / "summary.csv")] == [
        ("10", "10.0"),
        ("9", "9.0"),
    ]
    contents = {path.name: path.read_bytes() for path in out.iterdir()}
    results.export(runs, out)  # adding the same again changes nothing
    assert contents == {path.name: path.read_bytes() for path in out.iterdir()}

    # a younger run of the same name replaces the older one, and brings a column that the others lack
    write_run(tmp_path / "more", "blpo", 9, final=99.0, steps=5)
    write_run(tmp_path / "more", "ppo", 1)
    results.export(tmp_path / "more", out)
    assert [row["return_100"] for row in read(out / "summary.csv")] == ["10.0", "99.0", "10.0"]
    assert float(read(out / "Pendulum-v1__blpo__9.csv")[-1]["return_100"]) == 99

    # runs of one name have one set of flags; nothing is written if they have not
    contents = {path.name: path.read_bytes() for path in out.iterdir()}
    write_run(tmp_path / "other", "aaa", 1)
    write_run(tmp_path / "other", "blpo", 3, gamma=0.9, steps=6)
    same_name = "error: Pendulum-v1__blpo__3__1795573961 has other flags than the runs"
    with refused(same_name, "--gamma 0.9, not 0.99"):
        results.export(tmp_path / "other", out)
    assert contents == {path.name: path.read_bytes() for path in out.iterdir()}
    write_run(
        tmp_path / "fits", "blpo", 3, track=True, resume="x", new_flag=1
    )  # none of these changes what is measured
    results.export(tmp_path / "fits", out)
    assert len(read(out / "summary.csv")) == 4


def test_damaged_or_missing_folders_are_one_line(tmp_path, refused):
    (tmp_path / "runs" / "broken").mkdir(parents=True)
    for text in ('{"script": ', "[]"):
        (tmp_path / "runs" / "broken" / "config.json").write_text(text)
        for export, where in itertools.product((results.export, tabular.export), ("runs", "nowhere")):
            with refused(where):
                export(tmp_path / where, tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_finals_and_curves_are_grouped_in_the_order_of_tables(tmp_path):
    runs, out = tmp_path / "runs", tmp_path / "results"
    for method, seed, final in (("ppo", 1, 1), ("zzz", 1, 2), ("blpo", 10, 3), ("blpo", 9, 4), ("aaa", 1, 5)):
        write_run(runs, method, seed, final=final)
    write_run(runs, "nested", 4, length=2, final=math.nan)
    results.export(runs, out)
    summary = results.read_csv(out / "summary.csv")
    finals = results.grouped(summary)
    assert [method for _, method in finals] == ["blpo", "ppo", "aaa", "zzz"]
    assert list(finals["Pendulum-v1", "blpo"]) == [4, 3]  # seed 9 before seed 10
    assert results.without_episodes(summary) == ["Pendulum-v1 nested 4"]
    curves = results.load_curves(out, summary)
    assert [method for _, method in curves] == ["blpo", "nested", "ppo", "aaa", "zzz"]
    assert [run["return_100"][-1] for run in curves["Pendulum-v1", "blpo"]] == [4, 3]
    # the first finite return of each run: a 29th of its last
    starts = results.starting_returns(curves)
    assert starts == {"Pendulum-v1": pytest.approx(np.mean([1, 2, 3, 4, 5]) / 29, rel=1e-5)}
    assert results.starting_returns({("E", "nested"): curves["Pendulum-v1", "nested"]}) == {}


# Tables


def results_of(returns):
    """A summary with the given final returns by method, of one environment."""
    summary = []
    for method, finals in returns.items():
        for seed, final in enumerate(finals):
            row = dict(env_id="E", exp_name=method, seed=seed, return_100=final, eval_return=final + 0.5)
            summary.append(row)
    return summary


def test_table_says_how_far_blpo_is_ahead(recwarn):
    returns = {
        "blpo": (10.0, 12.0, 14.0),
        "nested": (1.0, 3.0, 13.0),
        "mean-c": (5.0,),
        "ppo-matched": (7.0, 7.0),
    }
    text = tables.table(results_of(returns))
    # Welch by hand: 12 - 17 / 3, variances 4 and 124 / 3 over 3 seeds each
    a, b, lead = 4 / 3, 124 / 9, 12 - 17 / 3
    half = scipy.stats.t.ppf(0.975, (a + b) ** 2 / (a**2 / 2 + b**2 / 2)) * math.sqrt(a + b)
    spread = scipy.stats.t.ppf(0.975, 2) * math.sqrt(b)
    # of nine pairs BLPO wins seven: 10 and 12 lose against 13
    ahead = f"{lead - half:.1f} to {lead + half:.1f} | 0.78"
    assert f"| E | nesting only | 3 | 5.7 ± {spread:.1f} | {ahead} | 1.0, 3.0, 13.0 | 6.2 |" in text
    assert "| E | BLPO, mean c | 1 | 5.0 |  |  | 5.0 | 5.5 |" in text
    assert "| E | PPO, matched | 2 | 7.0 ± 0.0 |" in text
    assert [line.split(" | ")[1] for line in text.splitlines()[2:]] == [
        "BLPO",
        "BLPO, mean c",
        "nesting only",
        "PPO, matched",
    ]
    assert text.splitlines()[1] == "|---|---|---|---|---|---|---|---|"
    assert not recwarn.list


def test_runs_without_spread_and_without_episodes():
    _, even = tables.table(results_of({"blpo": (100.0,) * 3, "mine": (9.0,) * 3})).splitlines()[2:]
    assert even.startswith("| E | mine | 3 | 9.0 ± 0.0 | 91.0 to 91.0 | 1.00 |")
    same = tables.table(results_of({"blpo": (999.87,) * 5, "mine": (999.87,) * 5})).splitlines()[-1]
    assert same.startswith("| E | mine | 5 | 999.9 ± 0.0 |  |  |")
    # a run that has finished no episode has no part in either mean
    silent = tables.table(results_of({"blpo": (1.0, math.nan, 3.0)})).splitlines()[-1]
    assert cells_of(silent)[2:4] == ["2", "2.0 ± 12.7"] and cells_of(silent)[-1] == "2.5"


def test_large_returns_are_shown_without_decimals():
    text = tables.table(results_of({"blpo": (1234.56, -7.0), "mine": (1.25,)}))
    assert "| 1,235, -7 |" in text and "| E | mine | 1 | 1 |" in text


def test_overview_has_a_line_per_environment():
    summary = results_of({"blpo": (10.0, 12.0), "nested": (1.0, 3.0), "ppo-matched": (7.0, 8.0)})
    summary += [
        row | {"env_id": "other"} for row in results_of({"nested": (1.0,)})
    ]  # without BLPO: not compared
    head, _, line = tables.overview(summary).splitlines()
    titles = ["environment", "PPO, matched", "nesting only", "BLPO"]
    assert cells_of(head) == [*titles, "BLPO minus PPO, matched", "P(BLPO > PPO, matched)"]
    expected = r"\| E \| 7.5 ± 6.4 \| 2.0 ± 12.7 \| 11.0 ± 12.7 \| -\d.\d to \d+.\d \| 1.00 \|"
    assert re.fullmatch(expected, line), line
    assert tables.overview(results_of({"nested": (1.0, 2.0)})) == ""


def test_groups_with_fewer_seeds_are_named():
    summary = results_of({"blpo": (1.0, 2.0), "ppo": (1.0,), "mine": (math.nan, 1.0)})
    assert tables.fewer_seeds(summary) == "fewer seeds than others: E PPO, CleanRL's flags (1), E mine (1)"
    assert tables.fewer_seeds(results_of({"blpo": (1.0,), "ppo": (2.0,)})) == "" == tables.fewer_seeds([])


def test_the_table_of_policies_by_hand():
    """Medians of a run's rows and means of two runs; who lacks a column in one run has no line."""
    runs = [
        {"approx_kl": np.array([math.nan, 0.1, 0.4, 0.2]), "entropy": np.array([5.0, 9.0, 9.0, -1.0])},
        {"approx_kl": np.array([0.5, 0.4, 0.4]), "entropy": np.array([4.0, 0.0, 2.0])},
    ]
    curves = {("E", "blpo"): runs, ("E", "ppo"): [runs[0], {"entropy": np.ones(3)}]}
    found = rows_in(tables.policies(curves))
    assert found[1:] == [["E", "BLPO", "2", "0.300", "4.5", "0.5"]]
    assert tables.policies({("E", "ppo"): curves["E", "ppo"]}) == "" == tables.policies({})


def test_comparisons_by_hand():
    """The final returns of three methods in one environment, in which runs begin at 10."""
    returns = {"blpo": (20.0, 30.0, 40.0, 1000.0), "nested": (10.0, 10.0), "ppo-matched": (20.0, 20.0)}
    finals = {("E", method): np.array(values) for method, values in returns.items()}
    start = {"E": 10.0}
    # (x - 10) / 10 = 1, 2, 3, 99, of which the middle half is 2 and 3
    nested = learning.compare(finals, start, "nested")
    value, low, high = nested.difference
    assert value == pytest.approx(2.5 - 0) and 1 <= low < 2.5 < high <= 99
    assert nested.environments == 1 and nested.chance == pytest.approx((1, 1, 1))
    matched = learning.compare(finals, start, "ppo-matched")
    assert matched.difference.value == pytest.approx(2.5 - 1)
    assert matched.chance.value == pytest.approx((0.5 + 3) / 4)
    # a method in another environment, or with one seed, is not compared
    finals["F", "mean-c"] = finals["E", "nested"]
    finals["E", "mine"] = np.array([1.0])
    assert learning.compare(finals, start, "mean-c") is learning.compare(finals, start, "mine") is None
    lines = learning.table({"final": {"nested": nested}}).splitlines()
    chance, difference = "1.00 (1.00 to 1.00)", f"2.50 ({low:.2f} to {high:.2f})"
    assert lines[2] == f"| final return | nesting only (1) | {chance} | {nested.p:.2g} | {difference} |"
    assert learning.table({}) == ""


def test_the_tuned_ppo_is_the_reference_where_there_is_one():
    pairs = {"blpo": (10.0, 12.0), "ppo-matched": (7.0, 8.0), "ppo-tuned": (20.0, 22.0)}
    finals = {("E", method): np.array(values) for method, values in pairs.items()}
    assert tables.reference(finals) == "ppo-tuned"
    scaled = tables.normalised(finals, "blpo", ["E"], {"E": 1.0})
    assert scaled["E", "blpo"] == pytest.approx([9 / 20, 11 / 20])
    head, _, line = tables.overview(results_of(pairs)).splitlines()
    titles = ["environment", "PPO, tuned", "PPO, matched", "BLPO"]
    assert cells_of(head) == [*titles, "BLPO minus PPO, tuned", "P(BLPO > PPO, tuned)"]
    assert line.endswith("| 0.00 |")
    del finals["E", "ppo-tuned"]
    assert tables.reference(finals) == "ppo-matched"
    del finals["E", "ppo-matched"]
    assert tables.reference(finals) == tables.reference({}) == "ppo"


SIX = np.array([0.0, 1.3, 2.1, 4.4, 7.2, 10.9])  # returns of six seeds


def interval_by_enumeration(values, share=0.95):
    """The bootstrap interval of the mean, from all n^n equally likely draws."""
    means = np.array(list(itertools.product(values, repeat=len(values)))).mean(1)
    return np.percentile(means, [50 - 50 * share, 50 + 50 * share])


def assert_95_percent(low, high):
    """That low and high are the ends of the 95 % interval of SIX, up to the noise of the draws."""
    errors = {}
    for share in (0.5, 0.8, 0.9, 0.95, 0.98, 0.99):
        errors[share] = np.abs(np.array([low, high]) - interval_by_enumeration(SIX, share)).max()
    assert min(errors, key=errors.get) == 0.95 and errors[0.95] < 0.15, errors


def test_intervals_of_aggregates_are_95_percent():
    low, high = tables.bootstrap({"a": SIX}, lambda finals: finals["a"].mean(-1))
    assert_95_percent(low, high)
    # groups are drawn apart: the difference of two equal groups varies, by the root of two
    difference = tables.bootstrap(
        {"a": SIX, "b": SIX}, lambda finals: finals["a"].mean(-1) - finals["b"].mean(-1)
    )
    wide = np.ptp(difference)
    assert wide == pytest.approx(math.sqrt(2) * (high - low), rel=0.1)


# How fast runs learn


def curve(steps, returns):
    return {"global_step": np.array(steps, float), "return_100": np.array(returns, float)}


def test_areas_and_steps_by_hand():
    rising = curve([100, 200, 400], [math.nan, 2.0, 6.0])
    # 2 until step 200, then a line to 6 at 400; the mean of 1,000 steps from 0.4 to 400
    assert learning.area(rising, 400) == pytest.approx((200 * 2 + 200 * 4) / 400, rel=2e-3)
    assert learning.area(rising, 200) == 2.0 and math.isnan(learning.area(rising, 100))
    assert math.isnan(learning.area(curve([1, 2], [math.nan] * 2), 800))
    assert math.isnan(learning.area(rising, 600)) and learning.area(rising, 599) > 0  # all but a rollout
    short = curve([2048 * i for i in range(1, 10)], range(9))  # of --total-timesteps 20000: nine rollouts
    assert learning.area(short, 20_000) > 0 and math.isnan(learning.area(short, 20_480))
    assert learning.steps_to(rising, 5.0) == 350 and learning.steps_to(rising, 1.0) == 200
    assert learning.steps_to(rising, 6.1) == math.inf
    assert learning.steps_to(curve([10, 20, 30], [0, 4, 1]), 2) == 15  # the first time


def summary_of(groups, **flags):
    """Curves, each a list of seeds' curves, and a summary to match, whose runs have these flags."""
    lines = []
    for (env_id, method), runs in groups.items():
        for seed, run in enumerate(runs, 1):
            row = {"env_id": env_id, "exp_name": method, "seed": str(seed), "flags": json.dumps(flags)}
            lines.append(row | {"return_100": str(run["return_100"][-1])})
    return lines, groups


def measured_of(groups, **flags):
    """The measures of such runs, and their curves."""
    summary, curves = summary_of(groups, **flags)
    return learning.measures(summary, curves), curves


def test_measures_follow_the_budget_of_a_run():
    groups = {
        ("E", "blpo"): [curve([0, 100, 200, 400], [0, 4, 4, 8]), curve([0, 100, 200, 400], [0, 0, 2, 2])],
        ("E", "ppo-matched"): [curve([0, 400], [0, 8]), curve([0, 400], [0, 4])],
    }
    summary, curves = summary_of(groups, total_timesteps=400)
    found = learning.measures(summary, curves)
    assert found["AUC25"]["E", "blpo"] == pytest.approx([2, 0], abs=0.01)
    assert found["AUC"]["E", "blpo"] == pytest.approx([(200 + 400 + 1200) / 400, (100 + 400) / 400], rel=0.01)
    assert found["final"]["E", "ppo-matched"].tolist() == [8, 4]
    assert found["steps"]["E", "blpo"].tolist() == [-75, -math.inf]  # half way is 3
    assert found["steps"]["E", "ppo-matched"].tolist() == [-150, -300]
    # the same curves as the first quarter of longer runs: there is no more to say of them
    summary, curves = summary_of(groups, total_timesteps=400, anneal_timesteps=1600)
    quarter = learning.measures(summary, curves)
    assert list(quarter) == ["AUC25"]
    assert quarter["AUC25"]["E", "blpo"].tolist() == found["AUC"]["E", "blpo"].tolist()


def test_permutation_p_by_enumeration():
    """Of all ways to give runs in two environments their labels, the share with a P as far from 0.5."""
    rng = np.random.default_rng(3)
    values = {("E", "a"): rng.normal(1, 1, 3), ("E", "b"): rng.normal(0, 1, 3)}
    values |= {("F", "a"): np.array([1.0, 2.0]), ("F", "b"): np.array([1.0, 0.0, -np.inf])}  # with a tie
    splits = []
    for env_id in "EF":
        both = np.concatenate([values[env_id, "a"], values[env_id, "b"]])
        chosen = itertools.combinations(range(len(both)), len(values[env_id, "a"]))
        pairs = [(both[list(one)], np.delete(both, list(one))) for one in chosen]
        splits.append([np.mean([(x > y) + 0.5 * (x == y) for x in a for y in b]) for a, b in pairs])
    observed = np.mean([tables.beats(values[env, "a"], values[env, "b"]) for env in "EF"])
    means = [(e + f) / 2 for e in splits[0] for f in splits[1]]
    expected = np.mean([abs(mean - 0.5) >= abs(observed - 0.5) - 1e-9 for mean in means])
    assert 0.02 < expected < 0.9
    assert learning.permutation_p(values, "a", "b", "EF") == pytest.approx(expected, rel=1e-12)
    assert learning.permutation_p(values, "b", "a", "EF") == pytest.approx(expected, rel=1e-12)  # two-sided
    apart = {("E", "a"): np.arange(10.0), ("E", "b"): np.arange(10.0) + 100}
    assert learning.permutation_p(apart, "a", "b", "E") == pytest.approx(2 / math.comb(20, 10))
    assert learning.permutation_p(apart, "a", "a", "E") == 1


def test_permutation_p_with_unequal_numbers_of_seeds():
    """As in a benchmark that is half done, where the unit of P is small, 1 / 453,600: against samples."""
    rng = np.random.default_rng(0)
    sizes = [(10, 10), (10, 9), (9, 9), (8, 10), (9, 8), (10, 7)]
    values = {}
    for env_id, (m, n) in enumerate(sizes):
        values[env_id, "a"], values[env_id, "b"] = rng.normal(0.35, 1, m), rng.normal(0, 1, n)
    wins = np.zeros(4000)
    observed = 0.0
    for env_id, (m, n) in enumerate(sizes):
        both = np.concatenate([values[env_id, "a"], values[env_id, "b"]])
        observed += (both[:m, None] > both[m:]).mean() / len(sizes)
        for i in range(len(wins)):
            mixed = rng.permutation(both)
            wins[i] += (mixed[:m, None] > mixed[m:]).mean() / len(sizes)
    expected = np.mean(abs(wins - 0.5) >= abs(observed - 0.5) - 1e-12)
    p = learning.permutation_p(values, "a", "b", range(len(sizes)))
    assert 0.01 < p < 0.3 and abs(p - expected) < 4 * (p * (1 - p) / len(wins)) ** 0.5


def test_iqm_difference_by_hand():
    values = {("E", "blpo"): np.array([20.0, 30, 40, 1000]), ("E", "ppo-matched"): np.array([20.0, 20])}
    values["E", "nested"] = np.array([15.0, 15])
    environments = learning.shared_environments(values, "blpo", "nested", "ppo-matched")
    assert environments == ("E",)
    difference = tables.iqm_difference(values, "nested", environments, {"E": 10.0})
    assert difference.value == pytest.approx(2.5 - 0.5)  # (x - 10) / 10: the middle of 1, 2, 3, 99
    assert difference.low < 2 < difference.high
    assert tables.chance_of_improvement(values, "ppo-matched", environments).value == pytest.approx(3.5 / 4)
    assert learning.compare(values, {"E": 10.0}, "nested")[3] == difference
    assert learning.compare(values, {"E": 20.0}, "nested")[3] is None  # the matched PPO has not learned
    assert learning.compare(values, {"E": 10.0}, "mine") is None
    single = values | {("F", "blpo"): np.array([1.0]), ("F", "nested"): np.array([1.0, 2])}
    assert learning.shared_environments(single, "blpo", "nested") == ("E",)


def test_the_table_of_learning_speed():
    level = [curve([0, 400], [0, 8]), curve([0, 400], [0, 6])]
    groups = {("E", "blpo"): [curve([0, 100, 400], [0, 7, 9])] * 2, ("E", "ppo-matched"): level}
    groups["E", "nested"] = [curve([0, 400], [0, 1])]  # a single seed
    text = learning.table(learning.comparisons(*measured_of(groups, total_timesteps=400)))
    lines = [line.split(" | ") for line in text.splitlines()[2:]]
    measures = ["AUC, first quarter", "AUC", "steps to half way", "final return"]
    assert [line[0] for line in lines] == [f"| {name}" for name in measures]
    assert {line[1] for line in lines} == {"PPO, matched (1)"}
    assert {line[2] for line in lines} == {"1.00 (1.00 to 1.00)"}
    assert all(float(line[3]) == pytest.approx(1 / 3, abs=0.05) for line in lines)
    assert lines[2][4] == " |" and float(lines[1][4].split()[0]) > 0.5
    alone = measured_of({("E", "blpo"): level}, total_timesteps=400)
    assert learning.comparisons(*alone) == {} and learning.without_area(*alone) == ""
    assert learning.without_area(*measured_of(groups, total_timesteps=40_000)).count(",") == 4


def test_holm_by_hand():
    assert learning.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert learning.holm([0.9, 0.5]) == [1.0, 1.0] and learning.holm([0.02]) == [0.02]


def test_the_registered_tests_from_the_command_line(tmp_path, capsys, refused):
    for seed in range(3):
        for method, final in (("blpo", 10 + seed), ("nested", 9 + seed), ("ppo-matched", 5.0)):
            write_run(tmp_path / "runs", method, seed, final=final)
    results.export(tmp_path / "runs", tmp_path / "results")
    learning.main(["--results-dir", str(tmp_path / "results"), "--against", "ppo-matched", "nested"])
    _, _, first, second = capsys.readouterr().out.splitlines()
    chance = ["1", "3 and 3", "1.000", "1.000 to 1.000"]
    assert cells_of(first) == ["AUC, first quarter", "ppo-matched", *chance, "0.1", "0.2"]
    assert cells_of(second)[4] == f"{7 / 9:.3f}"
    words = ["--measures", "final", "AUC", "--against", "ppo-matched"]
    learning.main(["--results-dir", str(tmp_path / "results"), *words])
    lines = [cells_of(line) for line in capsys.readouterr().out.splitlines()[2:]]
    assert [line[0] for line in lines] == ["final return", "AUC"]
    assert [line[-2:] for line in lines] == [["0.1", "0.1"]] * 2  # alone by its measure: nothing to correct
    with refused("no two seeds of blpo and of mean-c to compare by AUC25"):
        learning.main(["--results-dir", str(tmp_path / "results")])
    other_way = ["--method", "nested", "--against", "blpo", "ppo-matched"]
    learning.main(["--results-dir", str(tmp_path / "results"), *other_way])
    head, _, first, second = capsys.readouterr().out.splitlines()
    assert cells_of(head)[1] == "nesting only against"
    assert cells_of(first)[1:5:3] == ["blpo", f"{2 / 9:.3f}"] and cells_of(second)[1] == "ppo-matched"
    with refused("no two seeds of mine and of blpo, ppo-matched to compare"):
        learning.main(["--results-dir", str(tmp_path / "results"), "--method", "mine", *other_way[2:]])


@pytest.mark.parametrize(
    "name, damage",
    [
        ("summary.csv", lambda text: text.replace('""total_timesteps"": 1920', '""total"": 1')),
        ("summary.csv", lambda text: text.replace(",10.0,", ",ten,")),
        ("summary.csv", lambda text: "env_id,seed\nE,1\n"),
        ("Pendulum-v1__blpo__1.csv", lambda text: text.splitlines()[0]),
        ("Pendulum-v1__blpo__1.csv", lambda text: text.replace("global_step", "step") + "1,2\n"),
        ("Pendulum-v1__blpo__1.csv", lambda text: text.replace("return_100", "returns")),
        ("Pendulum-v1__blpo__1.csv", lambda text: text.replace("entropy", "ce_fresh")),
        ("Pendulum-v1__blpo__1.csv", lambda text: text.replace("entropy", "hyper_grad_norm")),
        ("Pendulum-v1__blpo__1.csv", None),
    ],
)
def test_damaged_results_are_one_line(tmp_path, refused, name, damage):
    write_run(tmp_path / "runs", "blpo", 1)
    results.export(tmp_path / "runs", tmp_path / "results")
    path = tmp_path / "results" / name
    if damage:
        assert damage(path.read_text()) != path.read_text()
        path.write_text(damage(path.read_text()))
    else:
        path.unlink()
    with refused("is damaged"):
        plot.main(["--results-dir", str(tmp_path / "results"), "--figures-dir", str(tmp_path)])


def test_tables_are_written_even_if_nobody_reads_them(tmp_path, monkeypatch):
    """As in `plot.py | head`, where the pipe is closed before all is printed."""
    write_run(tmp_path / "runs", "blpo", 1)
    results.export(tmp_path / "runs", tmp_path)
    monkeypatch.setattr(figures, "save", lambda *_: None)
    monkeypatch.setattr(sys.stdout, "write", Mock(side_effect=BrokenPipeError))
    with pytest.raises(BrokenPipeError):
        plot.main(["--results-dir", str(tmp_path)])
    assert (tmp_path / "tables.md").read_text().startswith("| ")


def test_runs_of_other_schedules_do_not_mix(tmp_path, refused):
    old = write_run(tmp_path / "runs", "blpo", 1)  # of a version without the flag
    write_run(tmp_path / "runs", "blpo", 2, anneal_timesteps=0)
    results.export(tmp_path / "runs", tmp_path / "results")
    write_run(tmp_path / "runs", "blpo", 3, anneal_timesteps=10_000)
    with refused("--anneal_timesteps 10000, not 0"):
        results.export(tmp_path / "runs", tmp_path / "results")
    assert old.exists()


def test_runs_of_other_scripts_do_not_mix(tmp_path, refused):
    """Older lines of a summary do not say which script they are of, and go with any."""
    write_run(tmp_path / "runs", "mine", 1)
    results.export(tmp_path / "runs", tmp_path / "results")
    path = write_run(tmp_path / "runs", "mine", 2) / "config.json"
    path.write_text(path.read_text().replace("ppo_continuous.py", "blpo_continuous.py"))
    with refused("__mine__2__", "is a run of blpo_continuous.py, and not of ppo_continuous.py", "--exp-name"):
        results.export(tmp_path / "runs", tmp_path / "results")
    summary = tmp_path / "results" / "summary.csv"
    rows = [row | {"script": ""} for row in results.read_csv(summary)]
    results.write_csv(summary, rows)
    (path.parent.parent / "Pendulum-v1__mine__1__1795573961" / "evaluation.csv").unlink()
    results.export(tmp_path / "runs", tmp_path / "results")
    assert [row["script"] for row in results.read_csv(summary)] == ["", "blpo_continuous.py"]


# The published tables


@pytest.mark.parametrize("name", ["results", "results/tuned", "results/earlier", "results/discrete"])
def test_published_tables_are_those_of_the_published_runs(name):
    folder = ROOT / name
    summary, curves = results.load_results(folder)
    measured = learning.measures(summary, curves)
    compared = learning.comparisons(measured, curves)
    parts = [tables.all_tables(summary), tables.policies(curves)]
    parts += [learning.table(compared), learning.without_area(measured, curves)]
    if (folder / "tabular_summary.csv").exists():
        parts.append(tabular.table(results.read_csv(folder / "tabular_summary.csv"), ("preference", "688")))
    text = "\n\n".join(part for part in parts if part)
    assert text + "\n" == (folder / "tables.md").read_text(encoding="utf-8")
    for row in summary:
        run = read(folder / f"{row['env_id']}__{row['exp_name']}__{row['seed']}.csv")
        assert float(run[-1]["return_100"]) == pytest.approx(float(row["return_100"]), rel=1e-3)


def page(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_returns_that_pages_show_are_those_of_the_published_runs():
    readme = page("README.md").split("## Results")[1].split("| BLPO against")[0]
    page_now, page_earlier = page("docs/results.md").split("## Returns after 1M steps")
    of_tuned = page_now.split("Returns, means of the last 100")[1].split("**A possible reason")[0]
    of_defaults = page_now.split("**Result.**")[-1].split("Returns, ")[1].split("P by the other")[0]
    of_discrete = page_now.split("## Discrete actions")[1]
    for section, folder, least in (
        (readme, "results", 5),
        (of_defaults, "results", 5),
        (of_tuned, "results/tuned", 9),
        (of_discrete, "results/discrete", 4),
        (page_earlier, "results/earlier", 20),
    ):
        published = page(f"{folder}/tables.md").splitlines()
        shown = [line for line in section.splitlines() if line.startswith("|")]
        assert len(shown) >= least and not set(shown) - set(published)


def cells_of(line):
    return [cell.strip() for cell in line.split("|")[1:-1]]


def rows_in(text):
    """The cells of all tables of a page or a part of it."""
    return [cells_of(line) for line in text.splitlines() if line.startswith("| ")]


def area_cells(areas, env_id, methods):
    """What pages show of the areas under the curves of an environment's runs."""
    runs = [areas[env_id, method] for method in methods]
    return [env_id, *(f"{x.mean():,.0f} ± {x.std(ddof=1):,.0f}" for x in runs)]


def found():
    """What the README says was found, in one line."""
    return " ".join(page("README.md").split("**What was found so far**")[1].split("Train on")[0].split())


def percents(chance, interval):
    """0.823 and "0.747 to 0.895" as the README shows them: 82 % (75 to 90 %)."""
    value, low, high = (round(100 * float(share)) for share in (chance, *interval.split(" to ")))
    return f"{value} % ({low} to {high} %)"


@pytest.mark.parametrize("letter, said, folder", [("B", "Most of it failed", "tuned"), ("E", "Result", ".")])
def test_how_defaults_end_is_what_pages_say(letter, said, folder):
    """The criteria of docs/results.md, B, from summary.csv without the tools, for the defaults of C and E."""
    section = page("docs/results.md").split(f"\n## {letter}. ")[1].split("\n## ")[0]
    table = section.split(f"**{said}.**")[1].split("\n|---|---|---|---|---|---|\n")[1].split("\n\n")[0]
    shown = {row[0]: row[1:] for row in rows_in(table)}
    rows = read(ROOT / "results" / folder / "summary.csv")
    for env_id, least in {"Walker2d-v4": 3800, "Hopper-v4": 2500, "HalfCheetah-v4": 2000}.items():
        there = [row for row in rows if row["env_id"] == env_id]
        finals = lambda method: [float(row["return_100"]) for row in there if row["exp_name"] == method]
        runs = [np.array(finals(method)) for method in ("blpo", "ppo")]
        errors = [x.var(ddof=1) / 5 for x in runs]  # squared standard errors of the means
        half = [scipy.stats.t.ppf(0.975, 4) * math.sqrt(error) for error in errors]
        cells = [f"{x.mean():,.0f} ± {h:,.0f}" for x, h in zip(runs, half)]
        freedom = sum(errors) ** 2 / sum(error**2 / 4 for error in errors)  # Welch-Satterthwaite
        reach = scipy.stats.t.ppf(0.975, freedom) * math.sqrt(sum(errors))
        difference = runs[0].mean() - runs[1].mean()
        interval = f"{difference - reach:,.0f} to {difference + reach:,.0f}"
        met = runs[0].mean() >= least, difference + reach >= 0
        verdicts = {
            (0, 0): "both missed",
            (0, 1): "missed; not below PPO",
            (1, 0): "met; below PPO",
            (1, 1): "both met",
        }
        assert [len(x) for x in runs] == [5, 5]
        assert shown[env_id] == [f"{least:,}", *cells, interval, verdicts[met]]


def test_learning_speed_that_pages_show_is_that_of_the_published_runs(capsys):
    """The tables of docs/results.md, A: probabilities, intervals, p, areas; shares in the README."""
    folder = ROOT / "results" / "quarter"
    learning.main(["--results-dir", str(folder)])
    tested = [cells_of(line) for line in capsys.readouterr().out.splitlines()[2:]]
    section = page("docs/results.md").split("## A. ")[1].split("## B. ")[0]
    shown = rows_in(section)
    assert [row[1] for row in tested] == ["ppo-matched", "nested", "mean-c"]
    for _, method, environments, runs, chance, interval, p, adjusted in tested:
        assert (environments, runs) == ("6", "60 and 60")
        assert [f"`{method}`", chance, interval, p, adjusted] in shown

    areas = learning.measures(*results.load_results(folder))["AUC25"]
    order = ["ppo-matched", "ppo-matched-clip0.5", "nested", "nested-clip0.5", "mean-c", "blpo"]
    for env_id in sorted({env_id for env_id, _ in areas}):
        runs = [areas[env_id, method] for method in order]
        assert area_cells(areas, env_id, order) in shown
        chances = [np.mean(runs[-1][:, None] > x) for x in runs[:-1]]
        assert [env_id, *(f"{chance:.2f}" for chance in chances)] in shown
    to_ppo, _, to_mean = (percents(row[4], row[5]) for row in tested)
    assert f"faster than PPO in {to_ppo} of the pairs, but only in {to_mean} faster than a control" in found()


def test_the_methods_at_their_best_are_what_pages_say(capsys):
    """docs/results.md, C, and the README: the registered tests, and what became of the statements."""
    others = ["ppo-tuned", "nested-tuned", "nested", "mean-c"]
    results_dir = ["--results-dir", str(TUNED)]
    learning.main([*results_dir, "--measures", "AUC", "final", "--against", *others])
    section = page("docs/results.md").split("## C. ")[1].split("## D. ")[0]
    chances = {}
    for line in capsys.readouterr().out.splitlines()[2:]:
        measure, method, environments, runs, *numbers = cells_of(line)
        several = {"ppo-tuned": 7, "nested": 7}.get(method, 3)
        assert (environments, runs) == (str(several), f"{5 * several} and {5 * several}")
        assert [measure, f"`{method}`", environments, *numbers] in rows_in(section)
        chances[measure, method] = float(numbers[0]), *map(float, numbers[1].split(" to "))
    above = lambda measure, method, least: chances[measure, method][1] > least
    holds = {
        name: above("AUC", method, 0.5) and above("final return", method, 0.45)
        for name, method in {"C1": "ppo-tuned", "C2": "nested-tuned"}.items()
    }
    holds["C3"] = above("AUC", "nested", 0.5) and above("AUC", "mean-c", 0.5)
    verdict = ", ".join(f"{name} {'holds' if holds[name] else 'fails'}" for name in holds)
    assert f"**{verdict}.**" in section

    learning.main([*results_dir, "--measures", "AUC25", "AUC", "final", "--against", "ppo-tuned", "ppo"])
    rows = [cells_of(line) for line in capsys.readouterr().out.splitlines()[2:]]
    early, whole, final = (percents(row[4], row[5]) for row in rows if row[1] == "ppo-tuned")
    assert f"BLPO was ahead of PPO in {early} of the pairs of runs by the first quarter" in found()
    measured = learning.measures(*results.load_results(TUNED))["AUC25"]
    tasks = learning.shared_environments(measured, "blpo", "ppo-tuned")
    ahead = [tables.beats(measured[task, "blpo"], measured[task, "ppo-tuned"]) for task in tasks]
    assert sum(share > 0.5 for share in ahead) == 5 and ahead.count(0) == 2 and len(ahead) == 7
    (p,) = (row[6] for row in rows if row[:2] == ["AUC, first quarter", "ppo-tuned"])
    assert f"(p = {float(p):.2f}: ahead on five tasks, behind in every pair on two)" in found()
    assert f"by the whole curves, {whole}, and at the end, {final}, no difference is shown" in found()
    for measure in ("AUC", "final return"):
        _, low, high = chances[measure, "ppo-tuned"]
        assert low < 0.5 < high
    short = " ".join(page("docs/results.md").split("**In short.**")[1].split("Words:")[0].split())
    for method, told in {
        "ppo-tuned": "= {} by the first quarter of the learning curves, but not by the whole curves, {},"
        " nor at the end, {}.",
        "ppo": "on three tasks, these are {}, {} and {}:",
    }.items():
        shares = [
            "{:.2f} ({:.2f} to {:.2f})".format(*map(float, [row[4], *row[5].split(" to ")]))
            for row in rows
            if row[1] == method
        ]
        assert told.format(*shares) in short


def test_what_the_defaults_are_worth():
    """Tables of docs/results.md, E, and the README: BLPO's defaults against PPO, nesting and the control."""
    published = rows_in(page("results/tables.md"))
    methods = [f"{results.label(method)} (3)" for method in ("ppo", "nested", "mean-c")]
    arms = [results.label(method) for method in ("blpo", "nested", "mean-c")]
    section = page("docs/results.md").split("## E. ")[1].split("\n## ")[0]
    text = " ".join(section.split())
    shown = rows_in("| BLPO against" + section.split("| BLPO against")[1])
    shorter = rows_in("| BLPO against" + page("README.md").split("| BLPO against")[1].split("\n## ")[0])
    assert [row[0] for row in shorter[1:]] == methods
    for number, measure in enumerate(("AUC, first quarter", "AUC", "final return"), 1):
        for method, *cells in shorter[1:]:
            (row,) = [row for row in published if row[:2] == [measure, method]]
            assert cells[number - 1] == row[2] and row in shown
    higher = {}
    for folder in ("results", "results/tuned"):
        rows = rows_in(page(f"{folder}/tables.md"))
        of_walker = {row[1]: row[5] for row in rows if row[0] == "Walker2d-v4" and len(row) == 8}
        higher[folder] = " and ".join(of_walker[results.label(method)] for method in ("nested", "mean-c"))
    assert f"P(BLPO higher) = {higher['results']}, as in C ({higher['results/tuned']})" in text
    moved = [float(row[3]) for row in published if len(row) == 6 and row[1] in arms]
    assert f"medians of {min(moved)} to {max(moved)} nats in all arms and tasks" in text

    assert "HalfCheetah-v4 end either below 1,800 or above 2,700, with any method" in text
    summary = read(ROOT / "results" / "summary.csv")
    cheetah = [float(row["return_100"]) for row in summary if row["env_id"] == "HalfCheetah-v4"]
    assert len(cheetah) == 20 and all(value < 1800 or value > 2700 for value in cheetah)


def test_how_far_policies_move_is_what_the_page_says():
    """docs/results.md, C, "looked at afterwards", from the per-seed files of seeds 21 to 25."""
    section = page("docs/results.md").split("looked at afterwards.**")[1].split("## D. ")[0]
    text = " ".join(section.split())
    head, *lines = rows_in(section)
    methods = ["blpo", "mean-c", "nested", "nested-tuned", "ppo-tuned"]
    assert head[1:] == [results.label(method) for method in methods] and len(lines) == 7
    moved, entropy = {}, {}
    for env_id, *cells in lines:
        for method, cell in zip(methods, cells, strict=True):
            runs = [read(path) for path in TUNED.glob(f"{env_id}__{method}__2[1-5].csv")]
            if not runs:
                assert cell == ""
                continue
            assert len(runs) == 5
            kl = [np.median([float(row["approx_kl"]) for row in run if row["approx_kl"]]) for run in runs]
            moved[method, env_id] = np.mean(kl)
            entropy[method, env_id] = np.mean([float(run[-1]["entropy"]) for run in runs])
            assert cell == f"{moved[method, env_id]:.3f}, {entropy[method, env_id]:.1f}"

    tasks = [env_id for env_id, *_ in lines]
    to_nesting = [moved["blpo", env_id] / moved["nested", env_id] for env_id in tasks]
    to_blpo = [kl / moved["blpo", env_id] for (method, env_id), kl in moved.items() if method == "mean-c"]
    assert f"{min(to_nesting):.1f} to {max(to_nesting):.1f} times as far as one of nesting only" in text
    assert f"{min(to_blpo):.2f} to {max(to_blpo):.2f} times as far as BLPO" in text
    assert f"HumanoidStandup-v4 as far as {moved['blpo', 'HumanoidStandup-v4']:.2f} nats" in text
    less = sum(entropy["blpo", env_id] < entropy["nested", env_id] for env_id in tasks)
    assert f"less entropy on {less} of {len(tasks)} tasks" in text


def test_another_leader_is_what_the_page_says(capsys):
    """docs/results.md, D."""
    folder = ROOT / "results" / "quarter"
    against = ["--method", "blpo-start", "--against", "nested", "mean-c"]
    learning.main(["--results-dir", str(folder), *against])
    section = page("docs/results.md").split("## D. ")[1].split("## E. ")[0]
    shown = rows_in(section)
    for line in capsys.readouterr().out.splitlines()[2:]:
        _, method, environments, runs, *found = cells_of(line)
        assert (environments, runs) == ("3", "30 and 30") and [f"`{method}`", *found] in shown
    areas = learning.measures(*results.load_results(folder))["AUC25"]
    for env_id in ("Walker2d-v4", "Hopper-v4", "HalfCheetah-v4"):
        assert area_cells(areas, env_id, ["nested", "mean-c", "blpo-start"]) in shown


def test_steps_to_the_published_return_are_what_the_page_says():
    """docs/speed.md, of E's runs on Walker2d-v4, whose files have about every second of a run's points."""
    section = page("docs/speed.md").split("## Minutes to")[1].split("## ")[0].split("today's")[1]
    shown = [int(text.replace(",", "")) for text in re.findall(r"\d{3},\d{3}", section)]
    for seed, steps in zip((36, 37, 38, 39), shown):
        run = read(ROOT / "results" / f"Walker2d-v4__blpo__{seed}.csv")
        reached = next(float(row["global_step"]) for row in run if float(row["return_100"]) >= 2288)
        assert reached - 3 * 2048 <= steps <= reached
    last = read(ROOT / "results" / "Walker2d-v4__blpo__40.csv")
    assert max(float(row["return_100"]) for row in last) < 2288
    assert f"seed 40 ends at {float(last[-1]['return_100']):,.0f}" in section
    assert shown[4] == sorted(shown[:4])[2]  # the median of five, of which one does not get there


def test_speeds_that_pages_show_are_those_measured():
    """docs/speed.md, its minutes to the published return, and the README: of the files in results/speed."""
    text = page("docs/speed.md")
    line = " ".join(text.split())
    shown = [row[1:] for row in rows_in(text)]
    files, turns = ("same", "cleanrl", "widths"), ("sps", "slowest", "fastest")
    same, cleanrl, widths = (read(ROOT / "results" / "speed" / f"{name}.csv") for name in files)
    several = lambda row: "{:,.0f} ({:,.0f} to {:,.0f})".format(*(float(row[name]) for name in turns))
    for row in same + cleanrl:
        phases = [f"{float(row[f'{phase}_ms']):.0f}".removeprefix("0") for phase in figures.PHASES]
        cells = [several(row), f"{float(row['ratio']):.2f}", f"{int(row['mib']):,}", *phases]
        assert cells in shown
    for row in widths:
        cells = [f"{float(row['critic_ms']) / 160:.2f}", f"{float(row['hypergradient_ms']) / 10:.1f}"]
        assert [*cells, several(row), f"{int(row['mib']):,}"] in [row[1:] for row in shown]
    assert f"environments, {1e3 * float(same[0]['env_ms']) / 2048:.0f} µs a step in the first table" in line

    ratios = [float(row["ratio"]) for row in same]
    blpo, nested, matched, sb3, sbx, _ = rates = [float(row["sps"]) for row in same]
    told = "{:.1f} times as many environment steps a second as CleanRL's PPO and {:.1f} times as many as"
    assert told.format(ratios[0], blpo / sb3) in line
    told = "BLPO steps {:.2f} times as fast as Stable-Baselines3's PPO and {:.2f} times as fast as SBX's"
    assert told.format(blpo / sb3, blpo / sbx) in line
    assert f"PPO in the same form {matched / sbx:.2f} times as fast as SBX's" in line
    assert f"an iteration {nested / blpo:.2f} times as long as nesting without them" in line
    told = "{:.2f} times as many environment steps per second as CleanRL's PPO, and {:.2f} times as many as"
    assert told.format(ratios[0], blpo / sb3) in " ".join(page("README.md").split())
    assert f"{538_636 / float(cleanrl[-1]['sps']) / 60:.1f} minutes at the rate above" in line
    assert f"{630_784 / rates[0] / 60:.1f} minutes at its rate of the first table" in line
    runs = [read(ROOT / "results" / f"Walker2d-v4__ppo__{seed}.csv") for seed in range(1, 6)]
    enough = [[row["global_step"] for row in run if float(row["return_100"]) >= 2288][0] for run in runs]
    steps = np.median(np.array(enough, float))
    minutes = steps / float(cleanrl[1]["sps"]) / 60
    assert f"{steps:,.0f} steps in the median, {minutes:.1f} minutes at its rate of the second table" in line


def test_the_size_of_the_implicit_term_is_what_the_page_shows():
    """docs/hypergradient.md, of the runs of E: medians, tenth and ninetieth percentiles over points."""
    text = page("docs/hypergradient.md")
    shown, medians = rows_in(text), []
    for env_id in ("Walker2d-v4", "Hopper-v4", "HalfCheetah-v4"):
        points = []
        for path in (ROOT / "results").glob(f"{env_id}__blpo__*.csv"):
            points += [(row["implicit_norm_ratio"], row["implicit_cosine"]) for row in read(path)]
        ratio, cosine = np.array(points, dtype=float).T
        bounded = np.minimum(ratio, 1)
        of_sum = (1 + bounded * cosine) / np.sqrt(1 + 2 * bounded * cosine + bounded**2)
        low, middle, high = np.percentile([ratio, cosine, of_sum], [10, 50, 90], axis=1)
        cells = [f"{m:.2f} ({a:.2f}–{b:.2f})" for a, m, b in zip(low, middle, high)]
        assert len(points) == 1000 and [env_id, *cells] in shown
        medians.append(middle)
    (least, cosine, turned), (most, largest, straight) = np.min(medians, 0), np.max(medians, 0)
    told = f"is then {least:.1f} to {most:.1f} of that of the direct one, and the cosine between these two is"
    told += f" {cosine:.2f} to {largest:.2f}, so that their sum has a cosine of"
    told += f" {turned:.2f} to {straight:.2f}"
    assert told in " ".join(text.split())


def test_published_aggregates_recomputed_without_the_tools():
    """Differences of IQMs and P(BLPO > x) in plain NumPy, from the runs to tables.md and docs/results.md."""
    folder = ROOT / "results" / "earlier"
    finals, starts = {}, {}
    for row in read(folder / "summary.csv"):
        env_id, method = row["env_id"], row["exp_name"]
        finals.setdefault((env_id, method), []).append(float(row["return_100"]))
        curve = [
            float(point["return_100"]) for point in read(folder / f"{env_id}__{method}__{row['seed']}.csv")
        ]
        starts.setdefault(env_id, []).append(next(value for value in curve if not math.isnan(value)))
    names = {
        "BLPO, released term": "blpo-released",
        "BLPO with CG": "blpo-cg",
        "BLPO with preconditioned CG": "blpo-pcg",
        "nesting only": "nested",
        "PPO, matched": "ppo-matched",
    }

    def iqm(method, environments):
        scores = []
        for env_id in environments:
            zero, one = np.mean(starts[env_id]), np.mean(finals[env_id, "ppo-matched"])
            scores += [(value - zero) / (one - zero) for value in finals[env_id, method]]
        scores = sorted(scores)
        cut = len(scores) // 4
        return np.mean(scores[cut : len(scores) - cut])

    def chance(method, environments):
        shares = []
        for env_id in environments:
            pairs = list(itertools.product(finals[env_id, "blpo"], finals[env_id, method]))
            shares.append(sum(1.0 if x > y else 0.5 if x == y else 0.0 for x, y in pairs) / len(pairs))
        return np.mean(shares)

    for name_of_page in ("results/earlier/tables.md", "docs/results.md"):
        text = page(name_of_page)
        for name, method in names.items():
            environments = [
                env_id for env_id, other in finals if other == method and len(finals[env_id, other]) > 1
            ]
            row = rf"^\| final return \| {re.escape(name)} \({len(environments)}\) \|(.+)\|$"
            (line,) = re.findall(row, text, re.MULTILINE)
            shown = [cell.split("(")[0].strip() for cell in line.split("|")]
            difference = iqm("blpo", environments) - iqm(method, environments)
            expected = [f"{chance(method, environments):.2f}", f"{difference:.2f}"]
            assert [shown[0], shown[2]] == expected, (name_of_page, name)


# What is drawn


def legend(axis):
    return [text.get_text() for text in axis.get_legend().get_texts()]


def shared_legend(figure):
    (found,) = figure.legends
    return [text.get_text() for text in found.get_texts()]


def band(axis, index=0):
    """x, lower and upper end of what fill_between has drawn."""
    vertices = axis.collections[index].get_paths()[0].vertices
    x = np.unique(vertices[:, 0])
    ends = [vertices[vertices[:, 0] == value, 1] for value in x]
    return x, np.array([values.min() for values in ends]), np.array([values.max() for values in ends])


def methods_in(axis):
    """Labels of the methods that have a line, by their colours."""
    labels = {colour: label for colour, _, label in results.STYLES.values()}
    return list(dict.fromkeys(labels[line.get_color()] for line in axis.lines))


@pytest.mark.parametrize("folder", ["", "tuned", "discrete", "preferences"])
def test_methods_of_a_published_figure_differ_in_grey(folder):
    """By their line styles, which no two of them share."""
    methods = {row["exp_name"] for row in read(ROOT / "results" / folder / "summary.csv")}
    assert len({str(results.style(method)[1]) for method in methods}) == len(methods)


def run_of(steps, returns, **columns):
    return {"global_step": np.array(steps, float), "return_100": np.array(returns, float)} | columns


AGAINST_STEPS = dict(x="global_step", y="return_100", xlabel="the steps", ylabel="the return", scale=10)


def test_curves_are_means_over_seeds_on_what_all_of_them_reach():
    curves = {
        ("E", "blpo"): [
            run_of([10, 20, 60], [math.nan, 2, 6]),  # known from 20 on
            run_of([0, 100], [0, 20]),  # until 100, the other one until 60
        ],
        ("E", "nested"): [run_of([0, 50], [1, 2])],
        ("E", "silent"): [run_of([0, 50], [math.nan, math.nan])],
        ("F", "my method"): [run_of([0, 50], [3, 4])],
        ("G", "another"): [run_of([0, 50], [3, 4])],
        ("G", "my method"): [run_of([0, 50], [3, 4])],
    }
    figure = figures.draw_curves(curves, **AGAINST_STEPS)
    first, second, third = [axis for axis in figure.axes if axis.get_visible()]
    assert (first.get_title(), second.get_title()) == ("E", "F")
    assert (figure.get_supxlabel(), figure.get_supylabel()) == ("the steps", "the return")
    methods = ["BLPO", "nesting only", "my method", "another"]
    assert shared_legend(figure) == [f"{name} (n = {1 + (name == 'BLPO')})" for name in methods]
    assert third.lines[1].get_color() == second.lines[0].get_color() != third.lines[0].get_color()
    one, other, blpo, nested = first.lines
    for line, run in ((one, ([2, 6], [2, 6])), (other, ([0, 10], [0, 20])), (nested, ([0, 5], [1, 2]))):
        assert (line.get_xdata().tolist(), line.get_ydata().tolist()) == run
        assert line.get_linewidth() < 1
    grid = np.linspace(20, 60, 200)
    np.testing.assert_allclose(blpo.get_xdata(), grid / 10)
    np.testing.assert_allclose(blpo.get_ydata(), (grid / 10 + grid / 5) / 2)
    assert blpo.get_linewidth() == 2 and len(second.lines) == 1  # a single seed is no mean
    assert one.get_color() == other.get_color() == blpo.get_color() == "#0072B2"
    assert nested.get_color() == "#009E73" and blpo.get_linestyle() == "-"
    assert first.yaxis.get_major_formatter()(12345.5) == "12,345.5"


def test_legends_say_how_many_seeds_there_are():
    run = run_of([0, 50], [1, 2])
    curves = {("E", "blpo"): 5 * [run], ("E", "ppo"): 3 * [run], ("F", "blpo"): 10 * [run]}
    figure = figures.draw_curves(curves, **AGAINST_STEPS)
    assert shared_legend(figure) == ["BLPO (n = 5 to 10)", "PPO, CleanRL's flags (n = 3)"]


def test_solved_tasks_end_where_they_are_solved():
    grid = np.arange(0, 101.0)

    def solving(steps):
        return [run_of(grid, 100 * (grid / steps).clip(0, 1))] * 2

    curves = {("E", "blpo"): solving(10), ("E", "nested"): solving(40)}
    (axis,) = figures.draw_curves(curves, **AGAINST_STEPS | {"scale": 1}).axes
    assert axis.get_xlim() == pytest.approx((0, 1.25 * 39), abs=1)  # at 39 both are within 2 %
    for late in ({("E", "blpo"): solving(10), ("E", "nested"): solving(90)}, {("E", "blpo"): solving(10)}):
        (axis,) = figures.draw_curves(late, **AGAINST_STEPS | {"scale": 1}).axes
        assert axis.get_xlim() == (0, 100)


@pytest.mark.parametrize("count, shape", [(1, (1, 1)), (2, (1, 2)), (3, (1, 3)), (4, (2, 2)), (5, (2, 3))])
def test_panels_stand_in_rows(count, shape):
    curves = {(f"E{i}", "blpo"): [run_of([0, 1], [0, i])] for i in range(count)}
    figure = figures.draw_curves(curves, **AGAINST_STEPS)
    visible = [axis for axis in figure.axes if axis.get_visible()]
    assert [axis.get_title() for axis in visible] == [f"E{i}" for i in range(count)]
    assert visible[0].get_gridspec().get_geometry() == shape


def test_which_curves_are_in_which_figure():
    diagnostics = {
        "implicit_cosine": np.array([0.1, 0.2]),
        "implicit_norm_ratio": np.array([0.3, 0.4]),
        "ihvp_correction": np.array([0.5, 0.6]),
    }
    seconds = {"wall_seconds": np.array([60.0, 120.0])}
    plain = run_of([1e6, 2e6], [7, 8], **seconds)
    bilevel = run_of([1e6, 2e6], [7, 8], **seconds, **diagnostics)
    curves = {
        ("E", "blpo"): [bilevel],
        ("E", "blpo-cg"): [bilevel],
        ("E", "ppo-matched"): [plain],
        ("F", "blpo"): [bilevel],
        ("F", "ppo"): [plain],
    }
    drawn = figures.curve_figures(curves)
    (endings,) = drawn.pop("variants").axes
    assert [text.get_text() for text in endings.get_yticklabels()] == ["BLPO with CG", "BLPO"]
    shown = {}
    for name, figure in drawn.items():
        shown[name] = {axis.get_title(): methods_in(axis) for axis in figure.axes}
    assert shown == {
        "curves": {"E": ["BLPO", "PPO, matched"], "F": ["BLPO", "PPO, CleanRL's flags"]},
        "time": {"E": ["BLPO", "BLPO with CG", "PPO, matched"], "F": ["BLPO", "PPO, CleanRL's flags"]},
        "implicit_cosine": {"E": ["BLPO", "BLPO with CG"], "F": ["BLPO"]},
        "implicit_norm_ratio": {"E": ["BLPO", "BLPO with CG"], "F": ["BLPO"]},
        "ihvp_correction": {"E": ["BLPO", "BLPO with CG"], "F": ["BLPO"]},
    }
    ends = {}
    for name, figure in drawn.items():
        axis = figure.axes[0]
        line = axis.lines[0]
        ends[name] = (
            figure.get_supxlabel(),
            figure.get_supylabel(),
            *line.get_xdata()[[0, -1]],
            *line.get_ydata()[[0, -1]],
        )
    steps = "environment steps (millions)"
    returns = "return, mean of the last 100 episodes"
    assert ends == {
        "curves": (steps, returns, 1, 2, 7, 8),
        "time": ("wall-clock time (minutes)", returns, 1, 2, 7, 8),
        "implicit_cosine": (steps, "cosine of implicit term and policy gradient", 1, 2, 0.1, 0.2),
        "implicit_norm_ratio": (steps, "norm of implicit term / policy gradient", 1, 2, 0.3, 0.4),
        "ihvp_correction": (steps, "‖x − v/ρ‖ / ‖v/ρ‖", 1, 2, 0.5, 0.6),
    }
    # variants alone are drawn among the curves; without BLPO there are no diagnostics
    assert list(figures.curve_figures({("E", "ppo"): [plain]})) == ["curves", "time"]
    alone = figures.curve_figures({("E", "mean-c"): [plain]})
    assert list(alone) == ["curves", "time"]
    assert shared_legend(alone["curves"]) == ["BLPO, mean c (n = 1)"]


def test_variants_are_shown_by_where_their_runs_end():
    curves = {
        ("E", "blpo"): [run_of([0, 1], [5, 1]), run_of([0, 1], [5, 3])],
        ("E", "blpo-cg"): [run_of([0, 1], [5, 4])],
        ("solved", "blpo"): [run_of([0, 1], [5, 500]), run_of([0, 1], [5, 500])],
    }
    (axis,) = figures.draw_endings(curves).axes
    assert axis.get_title() == "E"  # in the other one nothing differs
    assert [text.get_text() for text in axis.get_yticklabels()] == ["BLPO with CG", "BLPO"]
    dots = {line.get_ydata()[0]: list(line.get_xdata()) for line in axis.lines if line.get_marker() == "o"}
    assert dots == {1: [1, 3], 0: [4]}
    (cg, blpo) = [bar.get_segments()[0][:, 0] for bar in axis.collections]
    half = scipy.stats.t.ppf(0.975, 1)  # two returns, standard error 1
    assert blpo == pytest.approx([2 - half, 2 + half]) and cg == pytest.approx([4, 4])


def test_aggregate_figure():
    mine = learning.Comparison(2, tables.Estimate(0.7, 0.55, 0.95), 0.01, tables.Estimate(-0.1, -0.3, 0.2))
    nested = learning.Comparison(3, tables.Estimate(0.4, 0.2, 0.6), 0.5, None)  # no scale for a difference
    result = {"AUC25": {"nested": nested, "mine": mine}, "steps": {"mine": mine}, "final": {"mine": mine}}
    left, right = figures.draw_aggregate(result).axes
    rows = [text.get_text() for text in left.get_yticklabels()]
    assert rows == ["mine (2 tasks)", "nesting only (3 tasks)"]
    assert "P(BLPO better)" in left.get_xlabel() and "BLPO minus this" in right.get_xlabel()
    drawn = []
    for axis in (left, right):
        points = [(list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines]
        drawn.append([(x, [round(value, 2) for value in y]) for x, y in points])
    assert drawn[0] == [
        ([0.2, 0.6], [1.24, 1.24]),
        ([0.4], [1.24]),
        ([0.55, 0.95], [0.24, 0.24]),
        ([0.7], [0.24]),
        ([0.55, 0.95], [-0.24, -0.24]),
        ([0.7], [-0.24]),
        ([0.5, 0.5], [0, 1]),  # what is even
    ]
    ends = [([-0.3, 0.2], [-0.1])] * 2
    assert [(drawn[1][i][0], drawn[1][i + 1][0]) for i in (0, 2)] == ends and drawn[1][4] == ([0, 0], [0, 1])
    assert left.get_xlim() == (0, 1)
    colours = [line.get_color() for line in left.lines]
    assert colours[0] == colours[1] == results.STYLES["nested"][0] != colours[2] == colours[3]
    assert shared_legend(left.figure) == ["AUC, first quarter", "final return"]


def test_a_speed_has_columns_for_the_phases_of_all_commands(capsys):
    commands = ("python sobirl_continuous.py", "python other.py")
    turns = [
        [speed.Measured(rate, 300.4, {"env": 2.0, "reward": ms}), speed.Measured(rate / 2, 100, {})]
        for rate, ms in ((1000, 5), (3000, 6), (2000, 60))
    ]
    rows = speed.table(commands, turns)
    assert rows == [
        dict(zip(rows[0], (commands[0], 2000, 1000, 3000, 2, 300, 2, 6))),
        dict(zip(rows[0], (commands[1], 1000, 500, 1500, 1, 100, 0, 0))),
    ]
    assert list(rows[0])[-3:] == ["mib", "env_ms", "reward_ms"]
    speed.show(commands, rows)
    assert capsys.readouterr().out.splitlines() == [
        "| command | SPS | ratio | MiB | env, ms | reward, ms |",
        "| --- | --- | --- | --- | --- | --- |",
        "| `python sobirl_continuous.py` | 2,000 | 2.00 | 300 | 2 | 6 |",
        "| `python other.py` | 1,000 | 1.00 | 100 |  |  |",
    ]


def test_runtime_figure():
    rows = [
        {
            "name": "blpo",
            "sps": "500",
            "slowest": "400",
            "fastest": "500",
            "mib": "400",
            "env_ms": "30",
            "critic_ms": "10",
            "hypergradient_ms": "60",
        },
        {
            "name": "ppo-matched",
            "sps": "1000",
            "slowest": "800",
            "fastest": "1250",
            "mib": "300",
            "env_ms": "30",
            "critic_ms": "10",
            "hypergradient_ms": "0",
        },
        {
            "name": "python other.py",
            "sps": "250",
            "slowest": "200",
            "fastest": "400",
            "mib": "1",
            "env_ms": "",
            "critic_ms": "0",
            "hypergradient_ms": "0",
        },
    ]
    (axis,) = figures.draw_runtime(rows).axes
    assert [text.get_text() for text in axis.get_yticklabels()] == ["python other.py", "PPO, matched", "BLPO"]
    assert axis.get_xlabel() == "time per environment step, relative to PPO, matched"
    assert legend(axis) == ["env", "critic", "hypergradient"]
    bars = [(bar.get_y() + bar.get_height() / 2, bar.get_x(), bar.get_width()) for bar in axis.patches]
    empty = [(0, 0, 4), (0, 0, 0), (0, 0, 0), (0, 0, 0)]  # four times as slow, and it does not tell by what
    matched = [(1, 0, 0.75), (1, 0.75, 0.25), (1, 1, 0)]
    blpo = [(2, 0, 0.6), (2, 0.6, 0.2), (2, 0.8, 1.2)]
    np.testing.assert_allclose(bars, empty + matched + blpo, atol=1e-12)
    assert [(text.get_text(), text.get_position()[1]) for text in axis.texts] == [
        ("4.00", 0),
        ("1.00", 1),
        ("2.00", 2),
    ]
    spreads = [(*line.get_xdata(), line.get_ydata()[0]) for line in axis.lines]
    np.testing.assert_allclose(spreads, [(2.5, 5, 0), (0.8, 1.25, 1), (2, 2.5, 2)])  # of all turns
    assert axis.get_xlim() == (0, pytest.approx(1.12 * 5))
    (axis,) = figures.draw_runtime(rows[:1] + rows[2:]).axes  # without it, relative to the last
    assert axis.get_xlabel().endswith("relative to python other.py") and axis.texts[0].get_text() == "1.00"
    (axis,) = figures.draw_runtime(results.read_csv(ROOT / "results" / "speed.csv")).axes
    assert len(axis.get_yticklabels()) == 6


def test_solvers_figure():
    rows = [
        dict(env_id="E", solver="krylov", hessian="gauss-newton", products="1", ms="0.5", residual="0.1"),
        dict(env_id="E", solver="krylov", hessian="gauss-newton", products="2", ms="1", residual="0.01"),
        dict(env_id="E", solver="krylov", hessian="full", products="1", ms="2", residual="0.2"),
        dict(env_id="E", solver="new", hessian="gauss-newton", products="1", ms="3", residual="0.3"),
        dict(env_id="F", solver="cg", hessian="gauss-newton", products="1", ms="4", residual="0.4"),
    ]
    first, second = figures.draw_solvers(rows).axes
    assert (first.get_title(), second.get_title()) == ("E", "F")
    assert first.get_ylabel() == "‖(H + ρI)x − v‖ / ‖v‖"
    assert first.get_xlabel() == second.get_xlabel() == "ms per solve"
    assert {a.get_xscale() for a in (first, second)} == {a.get_yscale() for a in (first, second)} == {"log"}
    named = shared_legend(first.figure)
    assert named[:3] == ["Nyström, Krylov (default: ringed)", "new", "CG"] and "1 %" in named[-1]
    drawn = [(list(line.get_xdata()), list(line.get_ydata()), line.get_linestyle()) for line in first.lines]
    ring = ([1], [0.01], "None")
    percent = ([0, 1], [0.01, 0.01], "-")
    assert drawn == [([0.5, 1], [0.1, 0.01], "-"), ring, ([2], [0.2], ":"), ([3], [0.3], "-"), percent]
    assert [line.get_markerfacecolor() for line in first.lines[1:3]] == ["none", "white"]
    colours = [line.get_color() for line in first.lines]
    assert colours[0] == colours[1] == colours[2] != colours[3]
    assert list(second.lines[0].get_xydata()[0]) == [4, 0.4]
    assert first.get_ylim() == second.get_ylim() == (0.005, 0.8)


def test_the_figure_of_the_gate_takes_any_number_of_runs():
    rows, weights = [], []
    for i in range(5):
        run = dict(env_id=f"E{i}", steps=str(1000 * (i + 1)))
        rows.append(run | dict(variant="default", signal="0.9", signal_error="0.1"))
        weights.append(run | dict(age="0", factor="1"))
    figure = figures.draw_gate(rows, weights)
    assert shared_legend(figure) == [f"E{i}, {i + 1}k steps" for i in range(5)]


def test_times_of_solves_are_what_the_page_shows():
    """docs/nystrom.md: of every solver the cheapest solve that reaches a residual, and its products."""
    found_rows = rows_in(page("docs/nystrom.md"))
    shown = {cells[0].replace("`", "").replace("*", ""): cells[1:] for cells in found_rows}
    names = {"columns": "Nyström, random columns (the poster)", "gaussian": "Nyström, Gaussian"}
    names |= {"v-gaussian": "Nyström, v first", "krylov": "Nyström, Krylov (default: 2 products)"}
    names |= {"cg": "CG", "pcg": "preconditioned CG"}
    whole = {"krylov": "Nyström, Krylov, products with all of H", "cg": "CG, products with all of H"}
    solves = {}
    for row in read(ROOT / "results" / "solvers.csv"):
        name = row["solver"], row["hessian"], row["env_id"]
        solves.setdefault(name, []).append((float(row["ms"]), row["products"], float(row["residual"])))
    for hessian, solvers in (("gauss-newton", names), ("full", whole)):
        for solver, name in solvers.items():
            cells = []
            for least in (0.01, 0.003):
                for env_id in ("Walker2d-v4", "Hopper-v4"):
                    good = [solve for solve in solves[solver, hessian, env_id] if solve[2] <= least]
                    if not good:
                        cells.append("")
                        continue
                    ms, products, _ = min(good)
                    cells.append(f"{ms:.{0 if ms >= 10 else 1}f} ({products})")
            assert shown[name] == cells, name


def test_figures_are_written_as_png_and_pdf(tmp_path):
    for folder in ("a/b", "c"):
        figure = figures.draw_curves({("E", "blpo"): [run_of([0, 1], [0, 1])]}, **AGAINST_STEPS)
        figures.save(figure, tmp_path / folder, "name")
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"name.png", "name.pdf"}
    assert (tmp_path / "c" / "name.png").read_bytes().startswith(b"\x89PNG")
    pdf = (tmp_path / "c" / "name.pdf").read_bytes()
    assert pdf.startswith(b"%PDF") and b"CreationDate" not in pdf  # a drawing is the same tomorrow
    for name in ("name.png", "name.pdf"):
        assert (tmp_path / "a" / "b" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()


# Runs of sobirl_tabular.py


def test_every_column_of_the_tabular_export(tmp_path, capsys):
    runs, out = tmp_path / "runs", tmp_path / "results"
    norms = [10.0 / (i + 1) for i in range(100)]
    norms[60:] = [0.001] * 40  # arrives in round 60
    write_tabular_run(runs, "preference", "drlhf", 3, norms=norms)
    write_tabular_run(runs, "preference", "drlhf", 12, norms=[0.5, 0.4, 0.2])
    write_tabular_run(runs, "preference", "zzz", 1, norms=[0.5])
    write_tabular_run(runs, "synthetic", "my own", 1, norms=[0.5, 0.25])
    write_tabular_run(runs, "new-problem", "exact", 1, norms=[0.5])
    killed = write_tabular_run(runs, "synthetic", "exact", 1, norms=[0.5])
    (killed / "solution.pt").unlink()
    write_run(runs, "blpo", 1)
    tabular.export(runs, out)
    assert capsys.readouterr().out == f"no solution, left out: {killed.name}\n"
    summary = read(out / "tabular_summary.csv")
    # problems and methods in the order of the table, those without a place in it at the end; seeds by number
    names = [("synthetic", "my-own", "1"), ("preference", "drlhf", "3"), ("preference", "drlhf", "12")]
    names += [("preference", "zzz", "1"), ("new-problem", "exact", "1")]
    assert [(row["problem"], row["exp_name"], row["seed"]) for row in summary] == names
    flags = json.dumps({"method": "m-sobirl", "beta": 0.5})
    assert summary[1] == VERSIONS | {
        "problem": "preference",
        "exp_name": "drlhf",
        "seed": "3",
        "rounds": "99",
        "seconds": "25.0",
        "phi": "1.0",
        "gradient_norm": "0.001",
        "round_to_0.001": "60.0",
        "seconds_to_0.001": "15.25",
        "sweeps": "10.5",
        "flags": flags,
    }
    assert summary[2]["round_to_0.001"] == summary[2]["seconds_to_0.001"] == ""
    points = [row for row in read(out / "tabular.csv") if row["seed"] == "3"]
    kept = sorted({round(100 ** (i / 39)) - 1 for i in range(40)})
    assert [int(row["round"]) for row in points] == kept
    for i, row in zip(kept, points):
        expected = 0.25 * (i + 1), 100 - i, norms[i], 1 - 0.01 * i
        shown = [float(row[column]) for column in ("seconds", "phi", "gradient_norm", "cosine")]
        assert shown == pytest.approx(expected, rel=1e-4)
    contents = {path.name: path.read_bytes() for path in out.iterdir()}
    tabular.export(runs, out)  # adding the same runs again changes nothing
    assert contents == {path.name: path.read_bytes() for path in out.iterdir()}


def tabular_rows(**columns):
    """Rows of tabular_summary.csv, one for every value of the columns, which have the same length."""
    base = {
        "problem": "preference",
        "exp_name": "drlhf",
        "seed": "1",
        "rounds": "9",
        "sweeps": "2.5",
        "phi": "1",
    }
    base |= {"gradient_norm": "0.5", "round_to_0.001": "", "seconds_to_0.001": ""}
    return [base | dict(zip(columns, values)) for values in zip(*columns.values(), strict=True)]


def test_tabular_runs_replace_their_like_and_do_not_mix(tmp_path, refused):
    """The younger of two runs with one name stays; runs of one name have one set of flags."""
    write_tabular_run(tmp_path / "old", "synthetic", "exact", 1, norms=[1.0])
    tabular.export(tmp_path / "old", tmp_path / "results")
    folder = write_tabular_run(tmp_path / "new", "synthetic", "exact", 1, norms=[0.5, 0.2])
    tabular.export(tmp_path / "new", tmp_path / "results")
    (row,) = read(tmp_path / "results" / "tabular_summary.csv")
    assert float(row["gradient_norm"]) == 0.2 and len(read(tmp_path / "results" / "tabular.csv")) == 2
    config = json.loads((folder / "config.json").read_text())
    config["flags"] |= {"seed": 2, "beta": 0.7}
    (folder / "config.json").write_text(json.dumps(config))
    with refused("other flags", "--beta 0.7, not 0.5"):
        tabular.export(tmp_path / "new", tmp_path / "results")
    config["flags"]["beta"] = 0.5
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "progress.csv").write_text((folder / "progress.csv").read_text().splitlines()[0] + "\n")
    with refused("progress.csv is damaged"):
        tabular.export(tmp_path / "new", tmp_path / "results")


@pytest.mark.parametrize(
    "files, word",
    [
        ({"speed.csv": "name,sps,env_ms\n"}, "speed.csv"),
        ({"speed.csv": "name,sps,slowest,fastest,env_ms\na,0,0,0,1\n"}, "ZeroDivisionError"),
        ({"gate.csv": "env_id,steps\n", "gate_weights.csv": "env_id\n"}, "gate.csv or gate_weights.csv"),
        ({"gate.csv": "env_id,steps\n"}, "no results"),
        ({"tabular_summary.csv": "problem,exp_name,seed\n"}, "no results"),
        ({"summary.csv": "env_id,exp_name,seed,return_100,flags\n"}, "no results in"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(tmp_path, refused, files, word):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with refused(word):
        plot.main(["--results-dir", str(tmp_path), "--figures-dir", str(tmp_path / "figures")])


def test_tabular_table():
    rows = tabular_rows(
        seed=["1", "2", "3", "688"],
        phi=["1", "2", "4", "100"],
        gradient_norm=["0.1", "0.01", "0.0001", "5"],
        rounds=["1000", "1000", "3000", "7"],
    )
    rows[1] |= {"round_to_0.001": "10", "seconds_to_0.001": "1"}
    rows[2] |= {"round_to_0.001": "30", "seconds_to_0.001": "2"}
    rows += tabular_rows(problem=["new", "synthetic"], exp_name=["mine", "exact"])
    assert tabular.table(rows, ("preference", "688")).splitlines()[2:] == [
        "| synthetic | exact (9) | 1 | 0 |  |  | 2 | 1.0000 | 0.5 | 9 |",
        "| preference | DRLHF | 3 | 2 | 20 | 1.50 | 2 | 2.0000 | 0.01 | 1,000 |",
        "| new | mine | 1 | 0 |  |  | 2 | 1.0000 | 0.5 | 9 |",
        "| preference, seed 688 | DRLHF | 1 | 0 |  |  | 2 | 100.0000 | 5 | 7 |",
    ]
    together = tabular.table(rows).splitlines()
    assert (
        together[3] == "| preference | DRLHF | 4 | 2 | 20 | 1.50 | 2 | 3.0000 | 0.055 | 1,000 |"
        and len(together) == 5
    )
    assert together[:2] == [
        "| problem | method | seeds | reach ‖∇φ‖ ≤ 0.001 | rounds until then | seconds until then "
        "| sweeps a round | last φ | last ‖∇φ‖ | rounds |",
        "|" + "---|" * 10,
    ]


def tabular_points(problem, method, seed, phis):
    points = []
    for i, phi in enumerate(phis):
        row = dict(problem=problem, exp_name=method, seed=seed, round=i, seconds=2 * (i + 1), phi=phi)
        points.append({k: str(v) for k, v in (row | dict(gradient_norm=phi / 10, cosine=phi / 100)).items()})
    return points


def test_tabular_figure():
    points = []
    for seed, phi in (("1", 1), ("2", 2), ("3", 4), ("4", 8), ("688", 64)):
        points += tabular_points("preference", "drlhf", seed, [phi] * 5)
    points += tabular_points("synthetic", "exact", "1", [9, 3, 1])
    points += tabular_points("synthetic", "exact", "2", [9, 3, 1])
    points += tabular_points("synthetic", "mine", "1", [7, 5])
    figure = tabular.draw(points, ("preference", "688"))
    titles = ["synthetic (n = 1)", "preference (n = 4)", "preference, seed 688 (n = 1)"]
    assert [axis.get_title() for axis in figure.axes] == [title for title in titles for _ in range(4)]
    labels = [
        ("rounds", "φ"),
        ("rounds", "‖∇φ‖"),
        ("seconds", "‖∇φ‖"),
        ("rounds", "cosine of direction and ∇φ"),
    ]
    assert [(axis.get_xlabel(), axis.get_ylabel()) for axis in figure.axes] == 3 * labels
    assert {axis.get_xscale() for axis in figure.axes} == {"log"}
    assert [axis.get_yscale() for axis in figure.axes[:4]] == ["log", "log", "log", "linear"]
    assert [axis.get_yscale() for axis in figure.axes[4:8]] == ["linear", "log", "log", "linear"]
    (key,) = figure.legends
    assert [text.get_text() for text in key.get_texts()] == ["exact (9)", "mine", "DRLHF"]

    exact, mine = figure.axes[0].lines
    rounds = np.geomspace(1, 3, 100)  # rounds are counted from 1 on this axis
    np.testing.assert_allclose(exact.get_xdata(), rounds)
    np.testing.assert_allclose(exact.get_ydata(), np.interp(np.log(rounds), np.log([1, 2, 3]), [9, 3, 1]))
    np.testing.assert_allclose(mine.get_xdata()[[0, -1]], [1, 2])
    assert exact.get_linewidth() > mine.get_linewidth()
    assert not figure.axes[0].collections  # neither the exact method nor a single seed has a band
    np.testing.assert_allclose(figure.axes[2].lines[0].get_xdata()[[0, -1]], [2, 6])  # seconds stay seconds
    np.testing.assert_allclose(figure.axes[2].lines[0].get_ydata()[[0, -1]], [0.9, 0.1])

    for column, unit in enumerate((1, 0.1, 0.1, 0.01)):  # median and quartiles of 1, 2, 4, 8
        axis = figure.axes[4 + column]
        np.testing.assert_allclose(axis.lines[0].get_ydata(), 3 * unit)
        _, low, high = band(axis)
        np.testing.assert_allclose(low, 1.75 * unit)
        np.testing.assert_allclose(high, 5 * unit)
    np.testing.assert_allclose(figure.axes[8].lines[0].get_ydata(), 64)
    together = tabular.draw(points)
    assert len(together.axes) == 8
    np.testing.assert_allclose(together.axes[4].lines[0].get_ydata(), 4)  # the median of five


# The command line


def test_from_runs_to_tables_and_figures(tmp_path, capsys, monkeypatch):
    """All of it, in folders whose names are patterns, and once more from results/ alone."""
    runs, out, drawn = (tmp_path / f"{name}*?[a]" for name in ("runs", "results", "figures"))
    for method, seed, final in (
        ("ppo-matched", 1, 4),
        ("ppo-matched", 2, 6),
        ("blpo", 1, 9),
        ("blpo", 2, 11),
    ):
        write_run(runs, method, seed, final=final)
    write_run(runs, "ppo", 1, length=2, final=math.nan)
    (runs / "killed").mkdir()
    (runs / "killed" / "config.json").write_text("{}")
    for problem, seed in (("synthetic", 1), ("preference", 1), ("preference", 688)):
        write_tabular_run(runs, problem, "exact", seed, norms=[1.0, 0.5])
    flags = ["--results-dir", str(out), "--figures-dir", str(drawn)]

    plot.main([*flags, "--runs-dir", str(runs), "--apart", "preference:688"])
    first = capsys.readouterr().out.splitlines(keepends=True)
    assert first[0] == "no evaluation, left out: killed\n"
    assert first[1] == "no episode was finished, left out: Pendulum-v1 ppo 1\n"
    text = "".join(first[2:])
    assert text == (out / "tables.md").read_text(encoding="utf-8")
    blocks = text.split("\n\n")
    assert [block.splitlines()[0].split(" | ")[0] for block in blocks] == [
        "| environment",
        "| environment",
        "| environment",
        "| measure",
        "no area, since a run has no episode so early or ends before: Pendulum-v1 PPO, CleanRL's flags",
        "| problem",
    ]
    assert "| Pendulum-v1 | BLPO | 2 | 10.0 ± 12.7 |" in blocks[1]
    assert "| Pendulum-v1 | BLPO | 2 | 0.030 | 5.0 | 1.4 |" in blocks[2]
    assert "| preference, seed 688 | exact (9) | 1 |" in blocks[5]
    names = {
        "curves",
        "time",
        "implicit_cosine",
        "implicit_norm_ratio",
        "ihvp_correction",
        "aggregate",
        "tabular",
        "tabular_all",
    }
    assert {path.name for path in drawn.iterdir()} == {
        f"{name}.{kind}" for name in names for kind in ("png", "pdf")
    }

    timed = dict(name="ppo-matched", sps=10, slowest=9, fastest=11, ratio=1, mib=1, env_ms=3)
    write_rows(out / "speed.csv", [timed])
    solver = dict(env_id="E", solver="cg", hessian="gauss-newton", products=1, residual=0.5, ms=2)
    write_rows(out / "solvers.csv", [solver])
    save, given, new = figures.save, [], {"runtime", "solvers"}

    def save_what_is_new(figure, folder, name):  # files of a figure take a second, and the others are there
        given.append(name)
        if name in new:
            save(figure, folder, name)

    monkeypatch.setattr(figures, "save", save_what_is_new)
    plot.main(flags)  # from results/ alone
    again = capsys.readouterr().out
    assert again.startswith("no episode was finished") and "| preference | exact (9) | 2 |" in again
    assert sorted(given) == sorted(names | new) and {path.stem for path in drawn.iterdir()} == names | new
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in (runs, out, drawn)}


def test_measurements_are_drawn_without_runs(tmp_path, capsys):
    for name in ("gate.csv", "gate_weights.csv"):
        (tmp_path / name).write_bytes((ROOT / "results" / name).read_bytes())
    plot.main(["--results-dir", str(tmp_path), "--figures-dir", str(tmp_path / "figures")])
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {"gate"}
    assert capsys.readouterr().out == "" and not (tmp_path / "tables.md").exists()


def test_as_a_script_from_elsewhere_in_a_plain_locale(tmp_path):
    """Files are UTF-8, whatever the locale is, and a folder's name may be that of an option."""
    write_run(tmp_path / "--help", "blpo", 1)
    write_tabular_run(tmp_path / "--help", "synthetic", "exact", 1, norms=[1.0])
    (tmp_path / "tables.py").write_text("raise AssertionError('the wrong module')\n")
    command = [
        sys.executable,
        ROOT / "tools" / "plot.py",
        "--runs-dir=--help",
        "--results-dir=-r",
        "--figures-dir=f",
    ]
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, env=ascii_only | {"PATH": "/usr/bin:/bin"}
    )
    assert done.returncode == 0 and not done.stderr, done.stderr.decode()
    assert done.stdout == (tmp_path / "-r" / "tables.md").read_bytes()
    assert "| Pendulum-v1 | BLPO | 1 | 10.0 |" in done.stdout.decode() and "‖∇φ‖" in done.stdout.decode()
    assert (tmp_path / "f" / "curves.png").exists() and (tmp_path / "f" / "tabular.png").exists()


def test_bad_input_is_one_line(tmp_path, capsys, refused, monkeypatch):
    folders = ["--results-dir", str(tmp_path / "results"), "--figures-dir", str(tmp_path / "figures")]
    with refused("no results in", "--runs-dir"):
        plot.main(folders)
    with refused("--runs-dir", "nowhere is not a folder"):
        plot.main([*folders, "--runs-dir", str(tmp_path / "nowhere")])
    with refused("Unrecognized options: --nothing (--help lists all flags)"):
        plot.main([*folders, "--nothing"])
    for value in ("preference", ":1", "preference:", "preference:one", "preference:-1", "preference:01"):
        with refused(f"--apart must be problem:seed, for example preference:688, got {value}\n"):
            plot.main([*folders, "--apart", value])
    write_tabular_run(tmp_path / "runs", "synthetic", "exact", 688, norms=[1.0])
    write_tabular_run(tmp_path / "runs", "preference", "exact", 1, norms=[1.0])
    with refused("--apart preference:688: "):
        plot.main([*folders, "--runs-dir", str(tmp_path / "runs"), "--apart", "preference:688"])
    assert not (tmp_path / "figures").exists()
    for name in ("draw", "draw_overview"):  # the table is enough
        monkeypatch.setattr(tabular, name, lambda *_: Figure())
    plot.main([*folders, "--apart", "synthetic:688"])
    assert "| synthetic, seed 688 | exact (9) | 1 |" in capsys.readouterr().out
    write_run(tmp_path / "deep", "blpo", 1)
    deep = ["--results-dir", str(tmp_path / "r"), "--runs-dir", str(tmp_path / "deep")]
    with refused("--apart a:1: "):
        plot.main([*deep, "--apart=a:1"])


@pytest.mark.parametrize(
    "text", [b"", b"return,length\n", b"return,length\nx,3\n", b"\xff\xfe\n", b"length\n3\n"]
)
def test_a_damaged_evaluation_is_one_line(text, tmp_path, refused):
    folder = write_run(tmp_path / "runs", "blpo", 1)
    (folder / "evaluation.csv").write_bytes(text)
    with refused(str(folder), "evaluation.csv is damaged"):
        results.export(tmp_path / "runs", tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_cut_episodes_of_an_evaluation_are_named(tmp_path, capsys):
    folder = write_run(tmp_path / "runs", "blpo", 1)
    (folder / "evaluation.csv").write_text("return,length,cut\n1.0,5,0\n2.0,9,1\n")
    results.export(tmp_path / "runs", tmp_path / "results")
    assert f"1 of 2 episodes of the evaluation were cut: {folder.name}" in capsys.readouterr().out


# The film


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """Two seconds of 20 frames each, 64 x 32 pixels, black at first, red after a second."""
    path = tmp_path_factory.mktemp("film") / "a b.mp4"
    pictures = np.zeros((40, 32, 64, 3), np.uint8)
    pictures[20:, :, :, 0] = 255
    ImageSequenceClip(list(pictures), fps=20).write_videofile(str(path), logger=None)
    return path


def test_a_film_is_cut_from_a_video(video, tmp_path):
    gif = tmp_path / "film.gif"
    film.main([str(video), str(gif), "--begin", "0.5", "--seconds", "1", "--width", "16", "--fps", "10"])
    with Image.open(gif) as found:
        assert found.size == (16, 8) and found.info["loop"] == 0
        seconds, red = 0, []
        for i in range(found.n_frames):
            found.seek(i)
            seconds += found.info["duration"] / 1000
            red.append(np.asarray(found.convert("RGB"))[..., 0].mean())
    assert seconds == pytest.approx(1)  # frames that are equal are stored as one
    assert red[0] < 40 and red[-1] > 200


@pytest.mark.parametrize(
    "flags, line",
    [
        (["--begin", "2.5"], "--begin 2.5 is not before the end"),
        (["--fps", "0"], "--fps must be"),
        (["--seconds", "-1"], "--seconds must be"),
        (["--begin", "inf"], "--begin must be"),
        (["--fps", "51"], "--fps must be"),
    ],
)
def test_a_film_that_cannot_be_cut(video, tmp_path, refused, flags, line):
    with refused(line):
        film.main([str(video), str(tmp_path / "film.gif"), *flags])
    assert not list(tmp_path.iterdir())


def test_a_film_of_what_is_no_video_or_goes_nowhere(video, tmp_path, refused):
    (tmp_path / "text.mp4").write_text("no video")
    for words in ([tmp_path / "text.mp4", tmp_path / "a.gif"], [video, tmp_path / "none" / "a.gif"]):
        with refused("cannot be made into"):
            film.main([*map(str, words), "--seconds", "0.2"])
    film.main([str(video), str(tmp_path / "thin.gif"), "--seconds", "0.2", "--width", "1"])


def test_a_film_of_no_video(tmp_path, refused):
    with refused("none.mp4 is no file\n"):
        film.main([str(tmp_path / "none.mp4"), str(tmp_path / "film.gif")])
