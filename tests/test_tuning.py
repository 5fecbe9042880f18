"""tools/tuning.py: what is drawn, and the scores of what has been run."""

from collections import Counter

import pytest
import tyro

import blpo_continuous
import ppo_continuous
from tests.test_benchmark import benchmark, commands, finish
from tests.test_scripts import ROOT
from tests.test_tools import write_run
from tools import results, tuning
from tools.tuning import ENVIRONMENTS, FACTORS, METHODS, configurations


def test_levels_are_balanced_and_the_draw_stays():
    before, *drawn = configurations()
    assert len(drawn) == len(set(drawn)) == 24
    for name, levels in FACTORS.items():
        count = Counter(getattr(chosen, name) for chosen in drawn)
        assert count == dict.fromkeys(levels, 24 // len(levels))
    assert drawn[0] == (256, "windows of 16", 10, 6e-4, 0.5, 2, "separate")
    assert drawn[23] == (256, "steps", 10, 3e-4, 0.5, 2, "joint")


def arguments(tmp_path, **changed):
    return tuning.Args(**dict(action="table", csv=tmp_path / "tuning.csv") | changed)


def write_rows(tmp_path, returns, steps=300_000, seed=101):
    """Adds lines of runs of {method-number: {environment: final return}}."""
    path = tmp_path / "tuning.csv"
    rows = results.read_csv(path) if path.exists() else []
    for name, found in returns.items():
        method, number = name.split("-")
        for env_id, final in found.items():
            row = dict(method=method, configuration=number, env_id=env_id, seed=seed, steps=steps)
            rows.append(row | dict(return_100=final))
    results.write_csv(path, rows)


def test_scores_by_hand(tmp_path, refused):
    walker, hopper, cheetah = ENVIRONMENTS
    returns = {
        "ppo-0": {walker: 100, hopper: 30, cheetah: 10},
        "nested-2": {walker: 300, hopper: 10, cheetah: 20},
        "blpo-2": {walker: 200, hopper: 20, cheetah: 60},
        "blpo-4": {walker: 900},  # not in all environments
    }
    write_rows(tmp_path, returns)
    write_rows(tmp_path, {"ppo-0": dict.fromkeys(ENVIRONMENTS, 1000)}, steps=1_000_000)
    once = arguments(tmp_path, seeds=(101,))
    scores = tuning.scores(tuning.means_of(once))
    # by hand: means over the three whole configurations are 200, 20 and 30
    expected = {("blpo", 2): 4 / 3, ("nested", 2): 8 / 9, ("ppo", 0): 7 / 9}
    assert list(scores) == list(expected) and list(scores.values()) == pytest.approx(list(expected.values()))
    table = tuning.table(once).splitlines()
    assert table[2] == "| blpo | 2 | 1.33 | 200 | 20 | 60 | 128 | windows of 32 | 5 | 0.0003 | 0.3 | 1 |"

    with refused("no configuration with the seeds"):
        tuning.table(arguments(tmp_path))  # 102 has not been run
    with refused("no configuration with the seeds"):
        tuning.factors(arguments(tmp_path))
    with refused("--csv ", "none.csv is no file"):
        tuning.table(arguments(tmp_path, csv=tmp_path / "none.csv"))
    for text in ("method,configuration\nppo,0\n", "steps,seed\nmany,1\n"):
        (tmp_path / "other.csv").write_text(text)
        with refused("--csv ", "other.csv is damaged"):
            tuning.table(arguments(tmp_path, csv=tmp_path / "other.csv"))
    write_rows(tmp_path, {"ppo-0": {walker: 300, hopper: 50, cheetah: 30}}, seed=102)
    assert tuning.means_of(arguments(tmp_path)) == {("ppo", 0): {walker: 200, hopper: 40, cheetah: 20}}


def test_what_the_page_shows_is_what_was_found():
    """Of stage 3, the best configurations of stages 1 and 2, and the levels of stage 1."""
    section = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").split("## B. ")[1]
    text = section.split("**Most of it failed.**")[0]
    shown = {line for line in text.splitlines() if line.startswith("| ")}
    csv = ROOT / "results" / "tuning.csv"
    both = tuning.table(tuning.Args(action="table", csv=csv)).splitlines()
    levels = tuning.factors(tuning.Args(action="factors", csv=csv, seeds=(101,))).splitlines()
    whole = tuning.table(tuning.Args(action="table", csv=csv, steps=1_000_000)).splitlines()
    assert len(whole) == 2 + 9 and set(whole) - {whole[1]} <= shown
    assert shown <= {*both, *levels, *whole} and {line for line in levels if line.startswith("| ")} <= shown
    for method in METHODS:
        best = [line for line in both if line.startswith(f"| {method} ")][:3]
        assert set(best) <= shown


def test_the_table_of_endings_is_that_of_the_results():
    """Of E, and what it says of configuration 7, which C has run with other seeds."""
    published = dict(csv=ROOT / "results" / "tuning.csv", endings_dir=ROOT / "results" / "endings")
    found = tuning.endings(tuning.Args(action="endings", **published))
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    section = page.split("## E. ")[1].split("\n## ")[0]
    assert f"\n\n{found}\n\n" in section
    leaders = tuning.endings(tuning.Args(action="endings", seeds=(31, 32, 33, 34, 35), **published))
    assert f"\n\n{leaders}\n\n" in section and "**Of the two leaders 24 is the better one**" in section
    assert leaders.splitlines()[2].startswith("| 24 | ")
    here = next(line for line in found.splitlines() if line.startswith("| 7 |")).split(" | ")[2]
    of_others = page.split("## C. ")[1].splitlines()
    walker = next(line for line in of_others if line.startswith("| Walker2d-v4 |"))
    there = walker.split(" | ")[6].split(" ± ")[0]
    assert f"has {there} on Walker2d-v4 there and {here} here" in " ".join(section.split())


def test_what_the_page_says_first_of_the_search():
    """The scores of the three tuned configurations, best first, in short."""
    args = tuning.Args(action="table", csv=ROOT / "results" / "tuning.csv", steps=1_000_000)
    found = tuning.scores(tuning.means_of(args))
    best = {}
    for name in found:  # best first
        best.setdefault(name[0], name)
    assert best == {"ppo": ("ppo", 3), "nested": ("nested", 9), "blpo": ("blpo", 7)}
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    short = " ".join(page.split("**In short.**")[1].split("Words:")[0].split())
    blpo, nested, ppo = (found[best[method]] for method in ("blpo", "nested", "ppo"))
    assert f"{blpo:.2f} (BLPO), {nested:.2f} (nesting) and {ppo:.2f} (PPO)" in short


def test_the_tuned_methods_are_what_the_search_has_found(tmp_path):
    """BLPO's defaults (E), and nested-tuned and ppo-tuned of benchmark.sh (B)."""
    settings = dict(ENVS="Walker2d-v4", SEEDS="1", FLAGS="")
    out, _ = finish(benchmark(tmp_path, "--dry-run", METHODS="nested-tuned ppo-tuned blpo", **settings))
    flags = {words[3].split("=")[1]: words[2:] for words in commands(out)}
    nested, blpo = (tyro.cli(blpo_continuous.Args, args=flags[name]) for name in ("nested-tuned", "blpo"))
    ppo = tyro.cli(ppo_continuous.Args, args=flags["ppo-tuned"])
    for args, number in ((ppo, 3), (nested, 9), (blpo, 24)):
        chosen = configurations()[number]
        assert args.num_envs * args.num_steps == 2048 == chosen.minibatch * args.num_minibatches
        assert (args.update_epochs, args.actor_lr, args.clip_coef) == chosen[2:5]
    for args, number in ((nested, 9), (blpo, 24)):
        chosen = configurations()[number]
        assert (args.nested_critic_steps, "steps") == (chosen.nested_critic_steps, chosen.of)
    assert (nested.ihvp, blpo.ihvp) == ("none", "nystrom")
    chosen = configurations()[3]
    assert (ppo.num_steps, chosen.of, chosen.critic) == (chosen.minibatch, "one window", "separate")
    assert ppo.trajectory_minibatches and not ppo.joint_grad_clip and not ppo.clip_vloss
    assert (ppo.critic_lr, ppo.vf_coef / 2) == (blpo.critic_lr, 1)  # the loss is the mean square itself


def test_factors(tmp_path):
    """By hand: of two configurations with minibatches of 64 steps, and without 0, which was not drawn."""
    every = configurations()
    small = [number for number in range(1, 25) if every[number].minibatch == 64][:2]
    large = next(number for number in range(1, 25) if every[number].minibatch == 256)
    returns = {f"blpo-{small[0]}": 10, f"blpo-{small[1]}": 20, f"blpo-{large}": 60, "blpo-0": 30}
    runs = {name: dict.fromkeys(ENVIRONMENTS, value) for name, value in returns.items()}
    write_rows(tmp_path, runs)
    lines = tuning.factors(arguments(tmp_path, seeds=(101,))).splitlines()
    assert "| minibatch | 64 |  |  | 0.50 (2) |" in lines and "| minibatch | 256 |  |  | 2.00 (1) |" in lines
    assert "| minibatch | 128 |  |  |  |" in lines and "| critic | joint |  |  |  |" in lines


def test_endings_are_scored_among_themselves(tmp_path):
    """Two later configurations beside one of BLPO that was run to the end; others do not count."""
    write_rows(tmp_path, {"blpo-7": dict.fromkeys(ENVIRONMENTS, 30)}, steps=1_000_000)
    write_rows(tmp_path, {"blpo-7": dict.fromkeys(ENVIRONMENTS, 50)}, steps=1_000_000, seed=102)
    write_rows(tmp_path, {"ppo-3": dict.fromkeys(ENVIRONMENTS, 900)}, steps=1_000_000)
    for env_id in ENVIRONMENTS:
        run = dict(env_id=env_id, total_timesteps=1_000_000)
        for seed in (101, 102):
            write_run(tmp_path / "runs", "blpo-25", seed, final=seed - 71, **run)
            write_run(tmp_path / "runs", "blpo-26", seed, final=49, **run)
        write_run(tmp_path / "runs", "blpo-27", 101, final=99, **run)  # 102 has not been run
    results.export(tmp_path / "runs", tmp_path / "endings")
    given = arguments(tmp_path, action="endings", endings_dir=tmp_path / "endings")
    lines = tuning.endings(given).splitlines()[2:]
    # means 40, 30.5 and 49: their own mean is 39.83
    assert lines == [
        "| 26 | 1.23 | 49 | 49 | 49 |",
        "| 7 | 1.00 | 40 | 40 | 40 |",
        "| 25 | 0.77 | 30 | 30 | 30 |",
    ]
