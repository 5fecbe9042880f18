"""The environments of tools/tasks.py, and tools/phi.py and tools/preferences.py, which show what came out."""

import re

import gymnasium as gym
import numpy as np
import pytest
import scipy.stats
import torch

import sobirl_discrete
import sobirl_tabular as tabular
from support.environments import env_state, make_env
from tests.test_discrete import SMALL, flags
from tests.test_scripts import ROOT, train
from tools import phi, plot, preferences, results
from tools.tables import ahead_cells, welch

PREFERENCE = [*SMALL, "--env-id", "tools.tasks:Preference-v0", "--segment", 2, "--no-autotune"]
PREFERENCE += ["--no-reward-norm"]
SMALL_TASKS = ["Pendulum-v1", "tools.tasks-PendulumBins-v0", "Reacher-v5"]
CHEETAH = "HalfCheetah-v4"
PAGE = (ROOT / "docs" / "preferences.md").read_text(encoding="utf-8")


@pytest.fixture
def few_rounds(monkeypatch):
    """An eighth of what tables are given, where it is not the question how far they come."""
    monkeypatch.setattr(phi, "ROUNDS", 100)


def test_a_preference_problem_is_an_environment():
    """Chances and rewards of many steps are those of the table; episodes are cut after two."""
    env = gym.make("tools.tasks:Preference-v0", problem=2)
    problem = tabular.preference(2)
    rng = np.random.default_rng(0)
    visits, moves, begins, n = np.zeros((4, 3)), np.zeros((4, 3, 4)), np.zeros(4), 40_000
    obs, _ = env.reset(seed=0)
    begins[obs.argmax()] += 1
    for t in range(n):
        s, a = int(obs.argmax()), int(rng.integers(3))
        assert obs.sum() == 1 and obs.max() == 1
        obs, reward, terminated, truncated, _ = env.step(a)
        assert reward == float(problem.true[s, a]) and not terminated and truncated == (t % 2 == 1)
        visits[s, a] += 1
        moves[s, a, obs.argmax()] += 1
        if truncated:
            obs, _ = env.reset()
            begins[obs.argmax()] += 1
    P, found = problem.P.numpy(), moves / visits[..., None]
    assert (abs(found - P) <= 4.5 * np.sqrt(P * (1 - P) / visits[..., None]) + 1e-9).all()
    assert abs(begins / begins.sum() - 0.25).max() < 0.02


def test_a_pendulum_with_bins():
    """Torques from -2 to 2, evenly spaced; a checkpoint keeps its state."""
    env = gym.make("tools.tasks:PendulumBins-v0", bins=5)
    assert env.action_space == gym.spaces.Discrete(5)
    plain = gym.make("Pendulum-v1")
    for action, torque in enumerate((-2, -1, 0, 1, 2)):
        env.reset(seed=action)
        plain.reset(seed=action)
        one, other = env.step(action), plain.step(np.float32([torque]))
        assert (one[0] == other[0]).all() and one[1:4] == other[1:4]
    made = make_env(flags("--env-id", "tools.tasks:PendulumBins-v0"))
    made.reset(seed=0)
    assert env_state(made) and made.action_space.n == 7
    assert made.spec.max_episode_steps == 200 or made.get_wrapper_attr("_max_episode_steps") == 200


def test_phi_is_that_of_the_table(few_rounds):
    """By another way: all pairs of trajectories one by one, and an episode's rewards by enumeration."""
    problem = tabular.preference(19)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pi = phi.follower(problem, x)
    V = torch.zeros(4, dtype=torch.float64)
    for _ in range(500):
        Q = x + problem.gamma * problem.P @ V
        V = problem.tau * torch.logsumexp(Q / problem.tau, 1)
    assert torch.allclose(pi, torch.softmax(Q / problem.tau, 1), atol=1e-9)
    paths = [(s, a, t, b) for s in range(4) for a in range(3) for t in range(4) for b in range(3)]
    chance = np.array([float(pi[s, a] * problem.P[s, a, t] * pi[t, b]) / 4 for s, a, t, b in paths])
    sums, true = (np.array([float(r[s, a] + r[t, b]) for s, a, t, b in paths]) for r in (x, problem.true))
    q, y = (1 / (1 + np.exp(-(z[:, None] - z[None]))) for z in (sums, true))
    expected = chance @ -(y * np.log(q) + (1 - y) * np.log(1 - q)) @ chance
    found = phi.measure(problem, x, torch.full_like(x, 1 / 3))
    assert found["phi"] == pytest.approx(expected, rel=1e-9)
    assert found["true_return"] == pytest.approx(chance @ true, rel=1e-9)
    assert found["phi_actor"] != pytest.approx(expected, rel=1e-2)
    best = phi.true_return(problem, phi.follower(problem, problem.true))
    assert best > found["true_return"]
    assert phi.of_tables(problem, "sobirl")["phi"] < phi.of_tables(problem, "drlhf")["phi"]


def test_what_runs_have_achieved(tmp_path, capsys, refused, few_rounds):
    folders = {}
    for method, name, output in (("drlhf", "drlhf", "linear"), ("sobirl", "sobirl-unbounded", "tanh")):
        given = ["--env-kwargs", '{"problem": 2}', "--method", method, "--exp-name", f"{name}-2"]
        given += ["--reward-output", output, "--alpha", 0.2, "--gamma", 0.9]
        folders[output] = train(sobirl_discrete, tmp_path / "runs", *PREFERENCE, *given)
    command = ["--runs-dir", str(tmp_path / "runs"), "--csv", str(tmp_path / "phi.csv")]
    phi.main(["collect", *command])
    phi.main(["collect", *command])  # again is no more
    train(sobirl_discrete, tmp_path / "runs", *SMALL, "--env-id", "tests.probe_envs:ProbePole-v0")
    phi.main(["collect", *command])  # nor are runs of another kind
    found = results.read_csv(tmp_path / "phi.csv")
    assert [(row["problem"], row["method"]) for row in found] == [("2", "drlhf"), ("2", "sobirl-unbounded")]
    for row, (output, folder) in zip(found, folders.items()):
        model = torch.load(folder / "model.pt", weights_only=True)
        nets = {"reward": sobirl_discrete.reward_network(4, 8, 3)}
        nets["actor"] = sobirl_discrete.Actor(4, 3, 8).net
        for name, net in nets.items():
            prefix = "nets.0." if name == "reward" else "net."
            weights = {k.removeprefix(prefix): v for k, v in model[name].items() if k.startswith(prefix)}
            net.load_state_dict(weights)
        with torch.no_grad():
            reward, pi = nets["reward"](torch.eye(4)), nets["actor"](torch.eye(4)).softmax(1)
        reward = reward.tanh() if output == "tanh" else reward
        expected = phi.measure(tabular.preference(2), reward.double(), pi.double())
        for column, value in expected.items():
            assert float(row[column]) == pytest.approx(value, abs=1e-4)
    capsys.readouterr()
    phi.main(["table", *command])
    table = capsys.readouterr().out.splitlines()
    heads = "| problem | drlhf, networks (1 runs) | sobirl-unbounded, networks (1 runs) | exact (9), table |"
    assert table[0].startswith(heads)
    others = {"--alpha 0.2 --gamma 0.9": [], "--batch_size 9, not 8": ["--batch-size", 9]}
    others["run it with --no-autotune --no-reward-norm"] = ["--reward-norm"]
    for line, changed in others.items():
        alpha = given if changed else given[:-4]
        wrong = train(sobirl_discrete, tmp_path / line, *PREFERENCE, *alpha, "--seed", 2, *changed)
        with refused(line):
            phi.main(["collect", "--runs-dir", str(wrong.parent), *command[2:]])
    shown, returned = float(found[0]["phi"]), float(found[0]["true_return"])
    assert table[2].startswith(f"| 2 | {shown:.3f} ({returned:.2f}) |")
    phi.main(["figure", *command, "--figures-dir", str(tmp_path)])
    assert (tmp_path / "phi.png").stat().st_size > 5000
    left, right = phi.draw(results.read_csv(tmp_path / "phi.csv")).axes
    means = [line.get_xdata() for line in left.lines if line.get_marker() == "o"]
    assert [float(x[0]) for x in means] == [float(row["phi"]) for row in found]
    problem = tabular.preference(2)
    last = [line.get_xdata() for line in right.lines if line.get_marker() == "o"][-1]
    assert float(last[0]) == phi.share_of_best(problem, float(found[1]["true_return"]))
    assert phi.share_of_best(problem, phi.true_return(problem, phi.follower(problem, problem.true))) == 1
    with refused("error: --csv ", "none.csv is not there"):
        phi.main(["table", "--csv", str(tmp_path / "none.csv")])
    for contents in (b"", b"no model", (folder / "model.pt").read_bytes()[:500]):
        (folder / "model.pt").write_bytes(contents)
        with refused("model.pt is damaged"):
            phi.main(["collect", *command])
    with refused("--problems"):
        phi.main(["tables", "--tables-csv", str(tmp_path / "tables.csv"), "--problems"])
    with refused("--csv ", "it is a folder"):
        phi.main(["collect", *command[:2], "--csv", str(tmp_path)])
    (tmp_path / "no runs").mkdir()
    with refused("has no finished run"):
        phi.main(["collect", "--runs-dir", str(tmp_path / "no runs"), "--csv", str(tmp_path / "new.csv")])


def test_problems_of_phi_are_in_their_rows():
    """Each at the height of its number; a method is in the legend once, also one without a style."""
    flat = [("2", "mine", 0.3), ("2", "drlhf", 0.4), ("19", "mine", 0.5)]
    rows = [{"problem": p, "method": m, "phi": str(x), "true_return": "1"} for p, m, x in flat]
    figure = phi.draw(rows)
    left = figure.axes[0]
    heights = {tick.get_text(): y for y, tick in zip(left.get_yticks(), left.get_yticklabels())}
    means = [line for line in left.lines if line.get_marker() == "o"]
    found = {float(line.get_xdata()[0]): round(float(line.get_ydata()[0])) for line in means}
    assert found == {x: heights[problem] for problem, _, x in flat}
    assert sorted(text.get_text() for text in figure.legends[0].get_texts()) == ["DRLHF", "mine"]
    assert len({line.get_color() for line in means}) == 2


def test_what_tables_reach(capsys, tmp_path, few_rounds):
    phi.main(["tables", "--problems", "2", "106", "--tables-csv", str(tmp_path / "tables.csv")])
    shown = capsys.readouterr().out.strip()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.splitlines()[2:]]
    exact, sobirl, drlhf = lines
    assert [row[0] for row in (exact, sobirl, drlhf)] == list(phi.TABLES)
    assert (exact[2], sobirl[2], drlhf[2]) == ("1", "2", "0")
    problems = [tabular.preference(2), tabular.preference(106)]
    reached = [phi.of_tables(problem, "drlhf") for problem in problems]
    assert float(drlhf[1]) == pytest.approx(np.mean([row["phi"] for row in reached]), abs=1e-3)
    shares = []
    for problem, row in zip(problems, reached):
        chance = phi.true_return(problem, torch.full((4, 3), 1 / 3, dtype=torch.float64))
        best = phi.true_return(problem, phi.follower(problem, problem.true))
        shares.append((row["true_return"] - chance) / (best - chance))
    assert float(drlhf[3]) == pytest.approx(np.mean(shares), abs=0.006)
    assert phi.table_of_tables(results.read_csv(tmp_path / "tables.csv")) == shown


def test_what_tables_reach_is_what_the_page_shows():
    """All of the CSV file, of which two problems are calculated again."""
    rows = results.read_csv(ROOT / "results" / "phi_tables.csv")
    assert phi.table_of_tables(rows) in (ROOT / "docs" / "tabular.md").read_text(encoding="utf-8")
    assert sorted({int(row["problem"]) for row in rows}) == list(range(200, 230))
    for number in (203, 228):
        for row in phi.without_networks(number):
            found = [x for x in rows if (x["problem"], x["method"]) == (str(number), row["method"])]
            assert float(found[0]["phi"]) == pytest.approx(row["phi"], abs=2e-4)
            assert float(found[0]["share"]) == pytest.approx(row["share"], abs=2e-3)


def test_phi_that_the_page_shows_is_that_of_the_published_runs():
    """And what it says about them: on how many problems phi is lower, and how far the returns are."""
    runs = results.read_csv(ROOT / "results" / "phi.csv")
    shown, means = set(re.findall(r"^\| (\d+ \|.+?\|.+?\|.+?) \|", PAGE, re.MULTILINE)), {}
    methods = ("drlhf", "sobirl", "sobirl-unbounded")
    for number in (2, 19, 21, 40, 81, 87, 95, 105, 106, 126):
        for method in methods:
            rows = [row for row in runs if (row["problem"], row["method"]) == (str(number), method)]
            assert len(rows) == 3
            means[number, method] = np.mean([(float(r["phi"]), float(r["true_return"])) for r in rows], 0)
        cells = ["{:.3f} ({:.2f})".format(*means[number, method]) for method in methods]
        assert " | ".join([str(number), *cells]) in shown
    numbers = {number for number, _ in means}
    below = [number for number in numbers if means[number, methods[2]][0] < means[number, "drlhf"][0]]
    assert len(below) == 9 and means[106, "drlhf"][0] - means[106, methods[2]][0] < 0.001
    assert sum(means[number, "sobirl"][0] < means[number, "drlhf"][0] for number in numbers) == 7
    gains = [np.diff([round(means[n, method][1], 2) for method in methods[:2]])[0] for n in numbers]
    assert (np.sign(gains) == -1).sum() == 8 and (np.sign(gains) == 1).sum() == 1
    assert "(lower than DRLHF's on eight problems, higher on one)" in " ".join(section_of(1).split())
    shares = {}
    for method in methods:
        each = [phi.share_of_best(tabular.preference(n), means[n, method][1]) for n in numbers]
        shares[method] = f"{np.mean(each):.0%}".replace("%", " %")
    assert shares == {"drlhf": "99 %", "sobirl": "95 %", "sobirl-unbounded": "57 %"}
    assert all(f"{share}" in PAGE for share in shares.values())


# Tables and figures of runs that learn a reward


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """Results of runs of three methods, two seeds each, and of one in another environment."""
    folder = tmp_path_factory.mktemp("learned")
    for method in ("sac", "drlhf", "sobirl"):
        for seed in (1, 2):
            given = ["--env-id", "tests.probe_envs:ProbePole-v0", "--method", method, "--seed", seed]
            train(sobirl_discrete, folder / "runs", *SMALL, *given, "--eval-episodes", 2)
    train(sobirl_discrete, folder / "runs", *PREFERENCE, "--method", "random")
    results.export(folder / "runs", folder / "results")
    return folder


def test_the_table_of_learned_rewards(learned):
    summary, _ = results.load_results(learned / "results")
    lines = preferences.table(summary, results.grouped(summary)).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert [row[:3] for row in cells[2:]] == [
        ["tests.probe_envs-ProbePole-v0", "SAC, true reward", "2"],
        ["tests.probe_envs-ProbePole-v0", "DRLHF", "2"],
        ["tests.probe_envs-ProbePole-v0", "SoBiRL, bounded", "2"],
        ["Preference-v0", "random reward", "1"],
    ]
    runs = [row for row in summary if row["exp_name"] == "drlhf"]
    first, second = (float(row["eval_return"]) for row in runs)
    half = 12.7062 * abs(first - second) / 2  # Student's t of two
    assert cells[3][4] == f"{(first + second) / 2:.1f} ± {half:.1f}"
    assert cells[3][5] == f"{(first + second) / 2:.1f}"
    assert cells[3][6] == f"{np.mean([float(row['accuracy_replay']) for row in runs]):.2f}"
    assert cells[2][6:] == ["", "", ""]


def test_the_difference_to_drlhf(learned):
    """Welch's interval, by SciPy."""
    summary, _ = results.load_results(learned / "results")
    (line,) = preferences.against_drlhf(summary, results.grouped(summary)).splitlines()[2:]
    ours, theirs = (
        [float(row["eval_return"]) for row in summary if row["exp_name"] == name]
        for name in ("sobirl", "drlhf")
    )
    interval = scipy.stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval()
    chance = np.mean([(x > y) + 0.5 * (x == y) for x in ours for y in theirs])
    shown = f"{interval.low:,.1f} to {interval.high:,.1f} | {chance:.2f}"
    assert line == f"| tests.probe_envs-ProbePole-v0 | SoBiRL, bounded | {shown} |"
    # a run in which no episode has ended counts in neither table
    silent = next(row for row in summary if row["exp_name"] == "sobirl") | {"return_100": "nan"}
    more = [*summary, silent | {"eval_return": "1e9"}]
    finals = results.grouped(summary)
    assert preferences.against_drlhf(more, finals) == preferences.against_drlhf(summary, finals)
    assert preferences.table(more, finals) == preferences.table(summary, finals)


def test_new_pairs_of_all_queries_but_the_first():
    """The leader's loss and the accuracy: means over queries, of which two have pairs that all tie."""
    nan = np.nan

    def run(losses, accuracies):
        return {"ce_fresh": np.array([nan, *losses]), "accuracy_fresh": np.array([nan, *accuracies])}

    ours = [run([9, 0.5, 0.7], [0, 0.8, nan]), run([9, 0.3, 0.5], [0, 0.6, 0.8])]
    theirs = [run([9, 0.9, 0.9], [0, 0.9, 0.9]), run([9, 0.7, 0.9, nan], [0, nan, 0.8, nan])]
    curves = {("E", "drlhf"): theirs, ("E", "sobirl"): ours}
    lines = preferences.new_pairs(curves).splitlines()[2:]
    losses = scipy.stats.ttest_ind([0.6, 0.4], [0.9, 0.8], equal_var=False).confidence_interval()
    right = scipy.stats.ttest_ind([0.8, 0.7], [0.9, 0.8], equal_var=False).confidence_interval()
    assert lines[0] == "| E | DRLHF | 0.850 ± 0.635 |  | 0.850 ± 0.635 |  |"
    told = f"| 0.500 ± 1.271 | {losses[0]:.3f} to {losses[1]:.3f} | 0.750 ± 0.635 | {right[0]:.3f} to"
    assert lines[1] == f"| E | SoBiRL, bounded {told} {right[1]:.3f} |"
    older = [{"accuracy_fresh": np.ones(3)}]
    assert preferences.new_pairs(curves | {("E", "sac"): older}) == preferences.new_pairs(curves)
    for other in ({}, {("E", "drlhf"): theirs}, curves | {("E", "drlhf"): older}):
        assert preferences.new_pairs(other) == ""


def test_the_loss_by_setting():
    """Means of two runs and more, and the interval of the ratio: that of the difference of logarithms."""
    run = lambda *losses: {"ce_fresh": np.array([np.nan, 5, *losses])}
    curves = {("E", "drlhf-a-1"): [run(1, 3), run(1)], ("E", "sobirl-a-1"): [run(4), run(8), run(8)]}
    (line,) = preferences.loss_by_setting(curves).splitlines()[2:]
    interval = scipy.stats.ttest_ind(np.log([4, 8, 8]), np.log([2, 1]), equal_var=False).confidence_interval()
    low, high = np.exp(interval)
    shown = f"4.49 ({low:.2f} to {high:.2f})"  # 256^(1/3) / 2^(1/2)
    assert line == f"| E | a-1 | 1.500 (1.000 to 2.000) | 6.667 (4.000 to 8.000) | {shown} |"
    assert preferences.loss_by_setting(curves | {("E", "drlhf-a-1"): [run(1)]}) == ""
    assert preferences.loss_by_setting(curves | {("E", "drlhf-a-1"): [run(1), run()]}) == ""


def test_the_comparison_by_setting():
    """P of (1, 3) against (0, 3) is (1 + 0 + 1 + 0.5) / 4, that of (3, 4) against (1, 2) is 1."""

    def run(name, *evaluations):
        known = dict(env_id="E", exp_name=name, return_100="1", accuracy_replay="0.5")
        measured = [{"seed": str(i), "eval_return": str(x)} for i, x in enumerate(evaluations)]
        return [known | one | {"reward_correlation": "nan" if name[0] == "s" else "1"} for one in measured]

    summary = run("drlhf-few", 0, 3) + run("sobirl-few", 1, 3)
    summary += run("drlhf-many-2", 1, 2) + run("sobirl-many-2", 3, 4)
    finals = results.grouped(summary)
    head, _, first, second, _, last = preferences.by_setting(summary, finals).splitlines()
    assert head.startswith("| environment | setting | DRLHF, evaluation | SoBiRL, evaluation | P(SoBiRL >")
    assert first == "| E | few | 1.5 (0.0 to 3.0) | 2.0 (1.0 to 3.0) | 0.62 | 0.50, 0.50 | 1.00,  |"
    assert second.startswith("| E | many-2 | 1.5 (1.0 to 2.0) | 3.5 (3.0 to 4.0) | 1.00 |")
    assert last.startswith("P(SoBiRL > DRLHF), mean over the settings: 0.81 (0.5")
    for other in ([], summary[:-2], summary + run("sac", 1, 2), run("drlhf", 1, 2) + run("sobirl", 1, 2)):
        assert preferences.by_setting(other, results.grouped(other)) == ""


def section_of(number: int) -> str:
    return PAGE.split(f"\n## {number}. ")[1].split("\n## ")[0]


def runs_of(folder: str, *env_ids: str):
    summary, _ = results.load_results(ROOT / "results" / folder)
    return [row for row in summary if row["env_id"] in env_ids]


def listed(values, form: str = "{:,.0f}") -> str:
    """In words: the first one, the second one and the last one."""
    *others, last = (form.format(value) for value in values)
    return f"{', '.join(others)} and {last}"


LATER, APART = 60_000, -0.1  # docs/preferences.md, 4: from which step on, and below which correlation


def lowest_correlation(run: dict) -> float:
    """Of learned and true rewards after that step; a reward for which it is below the limit comes apart."""
    return run["reward_correlation"][run["global_step"] > LATER].min()


def evaluations(folder: str, env_id: str, method: str = "drlhf"):
    return results.column_of(runs_of(folder, env_id), (env_id, method), "eval_return")


@pytest.mark.parametrize(
    "number, folder, env_ids, count",
    [
        (2, "preferences", SMALL_TASKS[:1], 45),
        (3, "preferences", SMALL_TASKS[1:2], 45),
        (4, "preferences", [CHEETAH], 15),
        (6, "preferences", SMALL_TASKS[2:], 30),
        (7, "linear", [CHEETAH], 25),
        (8, "linear", SMALL_TASKS, 30),
        (9, "bounds", SMALL_TASKS[:2], 50),
    ],
)
def test_the_page_shows_what_these_tasks_have_come_to(number, folder, env_ids, count):
    """Tables, and all of the runs that were registered."""
    section, summary = section_of(number), runs_of(folder, *env_ids)
    finals = results.grouped(summary)
    for table in (preferences.table(summary, finals), preferences.against_drlhf(summary, finals)):
        assert table in section
    assert sum(map(len, finals.values())) == len(summary) == count
    assert {len(values) for values in finals.values()} == {5}
    for row in summary:
        curve = results.read_csv(results.curve_path(ROOT / "results" / folder, row))
        assert float(curve[-1]["return_100"]) == pytest.approx(float(row["return_100"]), rel=1e-3)


def test_how_runs_with_a_tanh_end():
    """docs/preferences.md, 4: each of them, and the labels."""
    section, summary = " ".join(section_of(4).split()), runs_of("preferences", CHEETAH)
    for name, told in {"drlhf": "By seed, DRLHF at {}", "sobirl": "SoBiRL at {}"}.items():
        assert told.format(listed(evaluations("preferences", CHEETAH, name))) in section
    assert {row["labels_used"] for row in summary} == {"", f"{100 + 13 * 97}"} and "1,361 times" in section


def test_how_runs_of_hpgd_and_pbrl_end():
    """docs/preferences.md, 7: each run of PBRL, how long HPGD's second term is, and whose reward comes apart,
    by the limit of section 4."""
    section = " ".join(section_of(7).split())
    assert f"by seed at {listed(evaluations('linear', CHEETAH, 'pbrl'))}." in section
    curves = results.load_curves(ROOT / "results" / "linear", runs_of("linear", CHEETAH))
    ratios = [np.nanmedian(preferences.with_ratios(run)["ratio"]) for run in curves[CHEETAH, "hpgd"]]
    assert f"{min(ratios):,.0f} to {max(ratios):,.0f} times as long as the first one" in section
    apart = {name: [lowest_correlation(run) < APART for run in runs] for (_, name), runs in curves.items()}
    assert not any(apart["hpgd"]) and apart["pbrl"] == [False, True, False, False, False]
    assert "In none of them the reward comes apart." in section
    assert "In the second of them the reward comes apart in the sense of section 4." in section


def test_why_rewards_have_no_limits():
    """The rule of section 8, which was registered, and what is said of it."""
    medians = [np.median(evaluations(folder, CHEETAH)) for folder in ("linear", "preferences")]
    medians.append(np.median(evaluations("preferences", CHEETAH, "sac")))
    free, limited, sac = medians
    assert free >= sac / 2 > limited
    in_short = PAGE.split("*Registered*")[0]
    for median in medians:
        assert f"{median:,.0f}" in in_short and f"{median:,.0f}" in section_of(7) + section_of(4)
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"to a return of {free:,.0f}, SAC with the true reward to {sac:,.0f} (medians)" in readme
    intervals = []
    for env_id, decimals in zip(SMALL_TASKS, (0, 0, 1)):
        ends = evaluations("linear", env_id)
        assert env_id == "Reacher-v5" or np.median(ends) >= -200
        intervals.append(ahead_cells(ends, evaluations("preferences", env_id), decimals)[0])
        assert float(intervals[-1].split(" to ")[1]) > 0  # not shown to be lower
    assert f"is {intervals[0]}, {intervals[1]} and {intervals[2]}." in " ".join(section_of(8).split())
    assert flags().reward_output == "linear" and flags().reward_norm
    gain, chance = ahead_cells(evaluations("linear", CHEETAH), evaluations("preferences", CHEETAH), 0)
    told = f"by {gain} (Welch's 95 % interval), and higher in {100 * float(chance):.0f} % of the pairs"
    assert told in " ".join(section_of(7).split())


def test_where_rewards_come_apart():
    """docs/preferences.md, 4: in how many runs, and how well they then predict old pairs."""
    lowest, accuracies, valued = {"preferences": [], "linear": []}, [], []
    for folder, found in lowest.items():
        rows = [row for row in runs_of(folder, CHEETAH) if row["exp_name"] in ("drlhf", "sobirl")]
        for run in sum(results.load_curves(ROOT / "results" / folder, rows).values(), []):
            later = run["global_step"] > LATER
            found.append(lowest_correlation(run))
            if found[-1] < APART:
                old = run["accuracy_replay"][later]
                accuracies.append((old.min(), old[-1]))
                valued.append(run["r_mean"][later][run["reward_correlation"][later] < APART].min())
    fallen, ended = zip(*accuracies)
    section = " ".join(section_of(4).split())
    assert f"In {len(accuracies)} of the {len(lowest['preferences'])} runs that learn a reward" in section
    told = f"between {min(fallen):.2f} and {max(fallen):.2f}, and ends between {min(ended):.2f} and"
    assert f"{told} {max(ended):.2f}." in section and min(lowest["linear"]) > APART
    assert f"the net values at {min(valued):.2f} or more" in section


def test_what_other_bounds_have_come_to():
    """docs/preferences.md, 9: the verdicts by the registered rule, the pairs of runs, and the rewards."""
    _, curves = results.load_results(ROOT / "results" / "bounds")
    section = section_of(9)
    assert preferences.new_pairs(curves) in section
    text = " ".join(section.split())
    arms = ("sobirl", "sobirl-bound-1", "sobirl-bound-3", "sobirl-unbounded")
    signs, higher, deviations = {}, {}, []

    def sign(ours, theirs):
        """Of Welch's interval, 0 if it holds 0."""
        low, high = welch(ours, theirs)
        return int(low > 0) - int(high < 0)

    for env_id in SMALL_TASKS[:2]:
        loss = {arm: preferences.over_queries(curves[env_id, arm], "ce_fresh") for arm in ("drlhf", *arms)}
        right = {arm: preferences.over_queries(curves[env_id, arm], "accuracy_fresh") for arm in loss}
        ends = {arm: evaluations("bounds", env_id, arm) for arm in loss}
        for arm in arms:
            compared = {"evaluation": ends, "loss": loss, "accuracy": right}
            for name, values in compared.items():
                signs.setdefault((name, arm), []).append(sign(values[arm], values["drlhf"]))
            higher.setdefault(arm, []).append(np.mean(loss[arm][:, None] > loss["drlhf"]))
        deviations.append([np.mean([run["r_std"][-1] for run in curves[env_id, arm]]) for arm in loss])
    both = {key: both[0] for key, both in signs.items() if both[0] == both[1] != 0}
    lower = {("accuracy", arm): -1 for arm in arms[2:]}
    assert both == {("loss", "sobirl-bound-1"): 1} | lower and signs["evaluation", arms[3]] == [0, -1]
    assert higher[arms[2]] == higher[arms[3]] == [1, 1]
    assert "is higher in {:.0f} % and {:.0f} % of".format(*(100 * np.array(higher["sobirl"]))) in text
    pairs = ["{:.1f} and {:.1f}".format(*pair) for pair in zip(*deviations)]
    told = "ends at {} with DRLHF, at {} with a bound of 1, at {} with 3, and at {} without one."
    assert told.format(pairs[0], *pairs[2:]) in text


@pytest.mark.parametrize(
    "number, folder, settings, less",
    [
        (10, "why", "standard small-steps gamma-0 patient warm gamma-0.9", "small-steps"),
        (11, "steps", "standard steps-4 steps-1 as-section-1", "steps-1 steps-4"),
    ],
)
def test_why_the_leaders_loss_rises(number, folder, settings, less):
    """docs/preferences.md: tables, ratios, the verdicts by the registered rule, and in which settings the
    ratio's interval is below that of the first one."""
    summary, curves = results.load_results(ROOT / "results" / folder)
    finals = results.grouped(summary)
    assert len(finals) == 2 * len(settings.split()) and {len(values) for values in finals.values()} == {5}
    section, table = section_of(number), preferences.loss_by_setting(curves)
    evaluated, chance = preferences.by_setting(summary, finals).split("\n\n")
    assert table in section and evaluated in section
    told = " ".join(section.split(table)[1].split())
    assert f"P(SoBiRL > DRLHF) is {chance.rsplit(': ')[1]}, mean over the settings" in told
    cells = [line.split(" | ") for line in table.splitlines()[2:]]
    ratios = {name: [float(x) for x in re.findall(r"[\d.]+", ratio)] for _, name, *_, ratio in cells}
    assert all(f"{ratios[name][0]:.2f}" in told for name in settings.split()[:5])
    raised = [name for name, (_, low, _) in ratios.items() if low > 1]
    assert raised == (["standard"] if number == 11 else list(ratios))
    assert all(high > 1 for *_, high in ratios.values())  # lowered in none
    assert [name for name, (*_, high) in ratios.items() if high < ratios["standard"][1]] == less.split()


def test_the_page_shows_what_other_penalties_have_come_to():
    summary, _ = results.load_results(ROOT / "results" / "penalty")
    means = {
        name.removeprefix("pbrl-"): results.column_of(summary, (env_id, name), "eval_return").mean()
        for env_id, name in results.grouped(summary)
    }
    page = " ".join(PAGE.split())
    assert list(means) == ["0.001", "0.01", "0.1", "1"] and len(summary) == 12
    assert "0.001, 0.01, 0.1 and 1 were tried with seeds 1 to 3 (`results/penalty`; mean" in page
    assert f"mean evaluations of {listed(means.values(), '{:.0f}')}), and the default, 0.01, was kept" in page
    assert flags().penalty == 0.01


def test_the_page_shows_what_other_teachers_have_come_to():
    """docs/preferences.md, 5: the table, P, and how much lower SoBiRL ends where labels are wrong."""
    folder = ROOT / "results" / "labels"
    text = section_of(5)
    table, chance = (folder / "tables.md").read_text(encoding="utf-8").rstrip().split("\n\n")
    assert table in text
    summary, _ = results.load_results(folder)
    finals = results.grouped(summary)
    assert preferences.by_setting(summary, finals) == f"{table}\n\n{chance}"
    assert len(finals) == 18 and {len(values) for values in finals.values()} == {3}
    spread = results.load_results(ROOT / "results" / "labels_spread")[0]
    labels = {row["exp_name"].partition("-")[2]: int(row["labels_used"]) for row in summary + spread}
    assert f"the teacher answers {labels['standard']} times" in text
    told = "and not 2,000 but {labels-2000:,} labels", "the others, {labels-100-spread} in all"
    assert all(words.format(**labels) in " ".join(text.split()) for words in told)
    others = [row for row in summary if not row["exp_name"].endswith("labels-100")]
    without = preferences.by_setting(others, results.grouped(others)).rsplit(": ")[1]
    told = f"P(SoBiRL > DRLHF) = {chance.rsplit(': ')[1]}, mean over the nine settings; without"
    assert f"{told} that of 100 labels, see below, {without}." in " ".join(text.split())
    table, chance = (ROOT / "results/labels_spread/tables.md").read_text(encoding="utf-8").split("\n\n")
    assert table in text and f"{chance.rstrip().rsplit(': ')[1]}, of nine pairs" in text
    evaluated = lambda name: results.column_of(summary, ("Pendulum-v1", name), "eval_return").mean()
    lower = [evaluated(f"drlhf-{wrong}") - evaluated(f"sobirl-{wrong}") for wrong in ("flip-0.1", "flip-0.3")]
    assert "SoBiRL's runs end lower, by {:.0f} and {:.0f} on average".format(*lower) in text


def test_how_large_the_second_term_grows_without_a_bound():
    """docs/preferences.md, 2: the largest ratio of the two terms in each run."""
    found = []
    for method in ("sobirl-unbounded", "sobirl-authors"):
        peaks = []
        for path in (ROOT / "results" / "preferences").glob(f"Pendulum-v1__{method}__*.csv"):
            rows = [row for row in results.read_csv(path) if float(row["ce_grad_norm"]) > 0]
            ratios = [float(row["hyper_grad_norm"]) / float(row["ce_grad_norm"]) for row in rows]
            peaks.append(np.nanmax(ratios))
        assert len(peaks) == 5
        found += [f"{min(peaks):,.0f} to {max(peaks):,.0f} times"]
    page = " ".join(PAGE.split())
    fresh, authors = found
    assert f"to {fresh} the first term in the five runs with fresh pairs" in page
    assert f"and to {authors} with the authors' loss" in page


def test_the_bars_of_the_pendulum_with_bins():
    """That they were met, as docs/preferences.md says."""
    rows = results.read_csv(ROOT / "results" / "preferences" / "summary.csv")
    there = [row for row in rows if row["env_id"] == "tools.tasks-PendulumBins-v0"]
    median = lambda name: np.median([float(row["eval_return"]) for row in there if row["exp_name"] == name])
    assert [round(median(name)) for name in ("sac", "drlhf", "sobirl", "random")] == [-135, -135, -135, -1456]
    curves = results.load_curves(ROOT / "results" / "preferences", there)
    last = [run["accuracy_replay"][-1] for run in curves["tools.tasks-PendulumBins-v0", "drlhf"]]
    assert f"{np.mean(last):.2f}" == "0.91"


def test_the_speed_that_the_page_shows():
    """docs/preferences.md: rates, ratios to CleanRL's script, and what learning a reward costs."""
    rows = results.read_csv(ROOT / "results" / "speed_sac.csv")
    page = PAGE.split("## Speed")[1]
    shown = [line.split(" | ", 1)[1] for line in page.splitlines() if line.startswith("| ")][1:]
    cells = [f"{float(row['sps']):.0f} | {float(row['ratio']):.2f} | {row['mib']} |" for row in rows]
    assert shown[: len(rows)] == cells
    text = " ".join(page.split())
    assert f"makes {float(rows[0]['ratio']):.2f} times as many steps as CleanRL's script" in text
    rates = {row["name"]: float(row["sps"]) for row in rows}
    (large, larger), (small, smaller) = (
        [f"{rates[f'{method}-{size}'] / rates[f'sac-{size}']:.2f}" for method in ("drlhf", "sobirl")]
        for size in ("128", "64")
    )
    assert f"`drlhf` makes {large} and `sobirl` {larger} times the steps of `sac`" in text
    assert f"with 64 × 64 {small} and {smaller}." in text


def test_the_figure_of_learned_rewards(learned, tmp_path):
    _, curves = results.load_results(learned / "results")
    figure = preferences.draw(curves)
    axes = np.array(figure.axes).reshape(len(preferences.PANELS), 2).T
    assert [axis.get_title() for axis in axes[:, 0]] == ["tests.probe_envs-ProbePole-v0", "Preference-v0"]
    assert [axis.get_ylabel() for axis in axes[0]] == [title for _, title, _ in preferences.PANELS]
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names[1:3] == ["DRLHF (n = 2)", "SoBiRL, bounded (n = 2)"] and "random reward (n = 1)" in names
    (ratio,) = axes[0, 4].lines
    runs = curves["tests.probe_envs-ProbePole-v0", "sobirl"]
    last = [run["hyper_grad_norm"][-1] / run["ce_grad_norm"][-1] for run in runs]
    assert ratio.get_ydata()[-1] == pytest.approx(np.mean(last)) and axes[0, 4].get_yscale() == "log"
    (_, _, temperature) = axes[0, 5].lines
    assert temperature.get_ydata()[-1] == pytest.approx(np.mean([1 / run["alpha"][-1] for run in runs]))
    assert len(axes[0, 1].lines) == len(axes[0, 3].lines) == 2 and len(axes[0, 0].lines) == 3 * 3
    before = [{name: run[name] for name in run if name != "ce_fresh"} for run in runs]
    older = preferences.draw({("E", "sobirl"): before})
    assert [axis.get_ylabel() for axis in older.axes] == [
        title for column, title, _ in preferences.PANELS if column != "ce_fresh"
    ]


def test_plot_draws_learned_rewards_alone(learned, tmp_path, capsys):
    plot.main(["--results-dir", str(learned / "results"), "--figures-dir", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"preferences.png", "preferences.pdf"}
    assert "| tests.probe_envs-ProbePole-v0 | DRLHF | 2 |" in capsys.readouterr().out
