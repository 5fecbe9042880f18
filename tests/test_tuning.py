"""tools/tuning.py: what is drawn, the commands, the collected runs and their scores."""

import shlex
from collections import Counter

import pytest

from tests.test_scripts import ROOT
from tests.test_tools import write_run
from tools import results, tuning
from tools.tuning import ENVIRONMENTS, FACTORS, METHODS, configurations, flags_of


def test_levels_are_balanced_and_the_draw_stays():
    before, *drawn = configurations()
    assert len(drawn) == len(set(drawn)) == 24
    for name, levels in FACTORS.items():
        count = Counter(getattr(chosen, name) for chosen in drawn)
        assert count == dict.fromkeys(levels, 24 // len(levels))
    assert drawn[0] == (256, "windows of 16", 10, 6e-4, 0.5, 2, "separate")
    assert drawn[23] == (256, "steps", 10, 3e-4, 0.5, 2, "joint")


@pytest.mark.parametrize("method", METHODS)
def test_flags_say_what_a_configuration_is(method):
    """Those of commit 29a3403, whose scripts could make minibatches of whole windows as well."""
    for chosen in configurations():
        words = flags_of(method, chosen)
        flags = {word: value for word, value in zip(words, [*words[1:], ""]) if word.startswith("--")}
        steps = int(flags["--num-envs"]) * int(flags["--num-steps"])
        assert steps == 2048 == chosen.minibatch * int(flags["--num-minibatches"])
        window = {"one window": chosen.minibatch, "windows of 32": 32, "windows of 16": 16, "steps": 256}
        assert int(flags["--num-steps"]) == window[chosen.of]
        values = [float(flags[name]) for name in ("--update-epochs", "--actor-lr", "--clip-coef")]
        assert values == list(chosen[2:5])
        if method == "ppo":
            joint = chosen.critic == "joint"
            assert ("--trajectory-minibatches" in flags) == (chosen.of != "steps")
            assert ("--no-joint-grad-clip" in flags) == ("--no-clip-vloss" in flags) == (not joint)
            assert float(flags["--critic-lr"]) == (chosen.actor_lr if joint else 1e-3)
            assert flags.get("--vf-coef") == (None if joint else "2")
        else:
            assert int(flags["--nested-critic-steps"]) == chosen.nested_critic_steps
            assert (flags.get("--ihvp") == "none") == (method == "nested")
            assert (flags.get("--minibatches") == "steps") == (chosen.of == "steps")


def arguments(tmp_path, **changed):
    settings = dict(action="commands", runs_dir=tmp_path / "runs", csv=tmp_path / "tuning.csv")
    return tuning.Args(**settings | changed)


def write_runs(tmp_path, returns, steps=300_000, seed=101, runs="runs"):
    """Runs of {method-number: {environment: final return}}."""
    for name, found in returns.items():
        for env_id, final in found.items():
            flags = dict(env_id=env_id, final=final, total_timesteps=steps)
            write_run(tmp_path / runs, name, seed, **flags)


def test_commands_leave_out_what_there_is(tmp_path):
    every = tuning.commands(arguments(tmp_path))
    assert len(every) == 2 * 25 * 3 * 3
    words = shlex.split(every[0])
    assert words[2:] == shlex.split(
        "ppo_continuous.py --env-id Walker2d-v4 --exp-name ppo-0 --seed 101 --total-timesteps 300000"
        f" --anneal-timesteps 1000000 --eval-episodes 1 --runs-dir {tmp_path}/runs"
    ) + flags_of("ppo", configurations()[0]) + [">", "/dev/null"]

    write_runs(tmp_path, {"ppo-0": {"Walker2d-v4": 1.0}, "blpo-3": {"Hopper-v4": 1.0}})
    left = tuning.commands(arguments(tmp_path))
    assert left == [line for line in every if line not in (every[0], every[3 * 9 + 7])]
    assert "blpo-3" in every[3 * 9 + 7] and "Hopper-v4" in every[3 * 9 + 7]

    # what has been collected need not be there any more; other seeds and lengths are other runs
    tuning.collect(arguments(tmp_path))
    elsewhere = tmp_path / "elsewhere"
    again = tuning.commands(arguments(tmp_path, runs_dir=elsewhere))
    assert [line.replace(str(elsewhere), str(tmp_path / "runs")) for line in again] == left
    longer = dict(steps=1_000_000, only=(0, 3), methods=("blpo",), seeds=(101,))
    assert len(tuning.commands(arguments(tmp_path, runs_dir=elsewhere, **longer))) == 2 * 3


def test_collect_and_score(tmp_path, capsys):
    walker, hopper, cheetah = ENVIRONMENTS
    returns = {
        "ppo-0": {walker: 100, hopper: 30, cheetah: 10},
        "nested-2": {walker: 300, hopper: 10, cheetah: 20},
        "blpo-2": {walker: 200, hopper: 20, cheetah: 60},
        "blpo-4": {walker: 900},  # not in all environments
    }
    write_runs(tmp_path, returns)
    tuning.collect(arguments(tmp_path))
    write_runs(tmp_path, {"ppo-0": dict.fromkeys(ENVIRONMENTS, 1000)}, steps=1_000_000, runs="longer")
    tuning.collect(arguments(tmp_path, runs_dir=tmp_path / "longer"))
    rows = results.read_csv(tmp_path / "tuning.csv")
    assert len(rows) == 13
    first = {key: rows[0][key] for key in ("method", "configuration", "env_id", "return_100", "of", "clip")}
    known = dict(method="blpo", configuration="2", env_id=cheetah, return_100="60.0")
    assert first == known | {"of": "windows of 32", "clip": "0.3"}

    once = arguments(tmp_path, seeds=(101,))
    scores = tuning.scores(tuning.means_of(once))
    # by hand: means over the three whole configurations are 200, 20 and 30
    expected = {("blpo", 2): 4 / 3, ("nested", 2): 8 / 9, ("ppo", 0): 7 / 9}
    assert list(scores) == list(expected) and list(scores.values()) == pytest.approx(list(expected.values()))
    table = tuning.table(once).splitlines()
    assert table[2] == "| blpo | 2 | 1.33 | 200 | 20 | 60 | 128 | windows of 32 | 5 | 0.0003 | 0.3 | 1 |"

    with pytest.raises(SystemExit, match="no configuration with the seeds"):
        tuning.table(arguments(tmp_path))  # 102 has not been run
    write_runs(tmp_path, {"ppo-0": {walker: 300, hopper: 50, cheetah: 30}}, seed=102)
    tuning.collect(arguments(tmp_path))
    assert tuning.means_of(arguments(tmp_path)) == {("ppo", 0): {walker: 200, hopper: 40, cheetah: 20}}


def test_what_the_page_shows_is_what_was_found():
    """Of the best configurations of stage 2 and the levels of stage 1."""
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").split("## B. ")[1].split("## E. ")[0]
    shown = {line for line in text.splitlines() if line.startswith("| ")}
    csv = ROOT / "results" / "tuning.csv"
    both = tuning.table(tuning.Args(action="table", csv=csv)).splitlines()
    levels = tuning.factors(tuning.Args(action="factors", csv=csv, seeds=(101,))).splitlines()
    assert shown <= {*both, *levels} and {line for line in levels if line.startswith("| ")} <= shown
    for method in METHODS:
        best = [line for line in both if line.startswith(f"| {method} ")][:3]
        assert set(best) <= shown


def test_factors(tmp_path):
    """By hand: of two configurations with minibatches of 64 steps, and without 0, which was not drawn."""
    every = configurations()
    small = [number for number in range(1, 25) if every[number].minibatch == 64][:2]
    large = next(number for number in range(1, 25) if every[number].minibatch == 256)
    returns = {f"blpo-{small[0]}": 10, f"blpo-{small[1]}": 20, f"blpo-{large}": 60, "blpo-0": 30}
    runs = {name: dict.fromkeys(ENVIRONMENTS, value) for name, value in returns.items()}
    write_runs(tmp_path, runs)
    once = arguments(tmp_path, seeds=(101,))
    tuning.collect(once)
    lines = tuning.factors(once).splitlines()
    assert "| minibatch | 64 |  |  | 0.50 (2) |" in lines and "| minibatch | 256 |  |  | 2.00 (1) |" in lines
    assert "| minibatch | 128 |  |  |  |" in lines and "| critic | joint |  |  |  |" in lines
