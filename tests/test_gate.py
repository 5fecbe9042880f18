"""tools/gate.py: its hypergradients against autograd and loops, what it writes, what it refuses."""

import csv
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import blpo_continuous
from nystrom import cg_ihvp
from support.flags import parse_args
from tools import figures, gate, solvers
from tools.gate import VARIANTS, WINDOWS, Moment, age_in_window, cosine, explained, hypergradient, solved

ROOT = Path(__file__).parent.parent
T, OBS, ACTIONS, GAMMA, LAMBDA = 7, 3, 2, 0.9, 0.8


def random_moment(seed: int) -> Moment:
    """Windows in which episodes end by termination and by truncation, and go on over borders."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    args = blpo_continuous.Args(num_envs=2, num_steps=T, gamma=GAMMA, gae_lambda=LAMBDA, nystrom_rho=0.3)
    actor = blpo_continuous.Actor(OBS, ACTIONS, hidden=4)
    critics = [gate.in_precision(blpo_continuous.Critic(OBS, hidden=4), torch.float64) for _ in range(2)]
    stream = rng.normal(size=(WINDOWS * T + 1, OBS)).astype(np.float32)
    obs, next_obs = stream[:-1].reshape(WINDOWS, T, OBS), stream[1:].reshape(WINDOWS, T, OBS).copy()
    actions = rng.normal(size=(WINDOWS, T, ACTIONS)).astype(np.float32)
    rewards = rng.normal(size=(WINDOWS, T))
    done = rng.random((WINDOWS, T)) < 0.25
    done[-1, 2] = True  # an episode begins in the last window
    next_obs[done] += 1  # not the first state of the next episode
    terminated = done & (rng.random(done.shape) < 0.5)
    logprobs = rng.normal(size=(WINDOWS, T)) - 2
    return Moment(actor, *critics, obs, next_obs, actions, rewards, terminated, done, logprobs, args)


def by_hand(moment: Moment, rho=0.3, windows=1, carried=False, leader="return", features="all"):
    """c (B,) and the implicit term by autograd, dense matrices and loops over pairs of steps."""
    obs, next_obs, actions, rewards, terminated, done, logprobs = (
        torch.as_tensor(np.concatenate(x)) for x in moment[3:10]
    )
    end, begin = len(obs), len(obs) - windows * T
    policy = torch.distributions.Normal(moment.actor.net(obs), moment.actor.log_std.exp())
    log_pi = policy.log_prob(actions).sum(1)
    ratio = (log_pi - logprobs).exp().detach().double()
    weight = ratio.clamp(max=1) if windows > 1 else torch.ones(end, dtype=torch.float64)

    def trace(t, k, weighted=True):
        """(gamma lambda)^(k - t), times the weights between, or 0 across the end of an episode"""
        if done[t:k].any():
            return 0.0
        product = weight[t:k].prod().item() if weighted and windows > 1 else 1.0
        return (GAMMA * LAMBDA) ** (k - t) * product

    def advantages(critic):
        V, V_next = critic(obs.double()), critic(next_obs.double())
        delta = weight * (rewards + GAMMA * (1 - terminated.double()) * V_next - V)
        return [sum(trace(t, k) * delta[k] for k in range(t, end)) for t in range(begin, end)], V

    critic = moment.critic
    A, V = advantages(critic)
    if leader == "return":
        f = -sum(A) / len(A) - V[begin:].mean()
    else:
        first = [t for t in range(begin, end) if t > 0 and done[t - 1]]
        f = -V[first or list(range(begin, end))].mean()
    chosen = {
        "all": list(critic.parameters()),
        "no output bias": list(critic.parameters())[:-1],
        "head": [critic.value[-1].weight],
    }[features]

    def flat(scalar):
        grads = torch.autograd.grad(scalar, chosen, retain_graph=True, allow_unused=True)
        grads = [torch.zeros_like(p) if g is None else g for p, g in zip(chosen, grads)]
        return torch.cat([g.flatten() for g in grads])

    J = torch.stack([flat(value) for value in V])
    H = 2 / (end - begin) * J[begin:].T @ J[begin:]
    x = torch.linalg.solve(H + rho * torch.eye(len(H), dtype=torch.float64), flat(f))
    w = J @ x
    earliest = begin - T if carried else begin
    c = [sum(trace(t, k) * w[t].item() for t in range(earliest, k + 1)) for k in range(begin, end)]

    old = torch.stack(advantages(moment.old_critic)[0]).detach()
    if windows == 1:
        surrogate = (ratio[begin:] * torch.tensor(c) * old * log_pi[begin:]).sum()
    else:  # the weights of steps move with the policy, and with them the targets of the critic
        moving = weight * (log_pi - log_pi.detach()).exp()
        V, V_next = (moment.old_critic(x.double()).detach() for x in (obs, next_obs))
        delta = rewards + GAMMA * (1 - terminated.double()) * V_next - V
        surrogate = sum(
            w[t].item() * trace(t, k, weighted=False) * moving[t : k + 1].prod() * delta[k]
            for t in range(begin, end)
            for k in range(t, end)
        )
    theta = list(moment.actor.parameters())
    implicit = torch.autograd.grad(2 / (end - begin) * surrogate, theta)
    return np.array(c), torch.cat([part.flatten() for part in implicit]).numpy()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seed", range(3))
def test_every_variant_equals_autograd_and_loops(variant, seed):
    moment = random_moment(seed)
    terms = hypergradient(moment, **VARIANTS[variant])
    c, implicit = by_hand(moment, **VARIANTS[variant])
    assert np.abs(terms.c - c).max() < 1e-6 * np.abs(c).max()  # observations and actors are float32
    assert np.linalg.norm(terms.implicit - implicit) < 1e-5 * np.linalg.norm(implicit)


def test_the_default_is_what_the_script_calculates():
    """-2 c A, the weights of the implicit term, from the script's own functions on one trajectory."""
    moment = random_moment(5)
    args = moment.args
    terms = hypergradient(moment)
    rollout = [x[-1:] for x in moment[3:9]]
    rollout[:2] = [x.astype(float) for x in rollout[:2]]
    batch, transitions, _ = blpo_continuous.make_batch(rollout, moment.actor, moment.old_critic, args)
    J = moment.critic.jacobian(transitions.all_obs)
    ones = np.ones(T)
    v = blpo_continuous.leader_gradient(J, ones, batch, transitions, moment.actor, args)
    H = blpo_continuous.curvature(moment.critic, batch, J, args)
    x, _ = cg_ihvp(H, v, args.nystrom_rho, max_iters=200, tol=1e-12)
    weights = blpo_continuous.implicit_weights(J, x, ones, batch, transitions, args)
    assert np.allclose(weights, -2 * terms.c * batch.advantages, rtol=1e-6, atol=1e-9)


def test_position_is_the_trace_of_a_constant():
    moment = random_moment(1)
    done = moment.done[-1]
    expected = []
    total = 0.0
    for k in range(T):
        total = GAMMA * LAMBDA * total * (0 if k and done[k - 1] else 1) + 1
        expected.append(total)
    assert np.allclose(hypergradient(moment).position, expected)


def test_small_pieces():
    rng = np.random.default_rng(0)
    J, v = rng.normal(size=(5, 9)), rng.normal(size=9)
    assert np.allclose(solved(J, v, 0.7), np.linalg.solve(2 / 5 * J.T @ J + 0.7 * np.eye(9), v))
    assert age_in_window(np.array([0, 0, 1, 0, 1, 1, 0])).tolist() == [0, 1, 2, 0, 1, 0, 0]
    assert cosine(np.array([1.0, 0]), np.array([3.0, 4])) == pytest.approx(0.6)
    x = rng.normal(size=50)
    y = 3 * x - 2
    assert explained(y, x) == pytest.approx(1)
    noisy = y + 5 * rng.normal(size=50)
    assert explained(noisy, x) == pytest.approx(np.corrcoef(noisy, x)[0, 1] ** 2)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    flags = "--env-id InvertedPendulum-v4 --num-envs 2 --num-minibatches 2 --num-steps 32"
    flags += f" --total-timesteps 768 --checkpoint-every 6 --eval-episodes 1 --runs-dir {folder}"
    return blpo_continuous.main(flags.split())


def rows_of(path):
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_cosines_of_means_see_through_noise():
    """Two vectors at an angle, in noise that both share and that is larger than they are: single samples have
    a cosine near 1, the estimate is that of the vectors."""
    rng = np.random.default_rng(0)
    n, p = 400, 50
    first, second = np.zeros(p), np.zeros(p)
    first[0], second[:2] = 1, (0.6, 0.8)
    noise = rng.normal(size=(n, p))
    X, Y = first + noise, second + noise
    assert np.mean([cosine(x, y) for x, y in zip(X, Y)]) > 0.95
    assert gate.cosine_of_means(X, Y) == pytest.approx(0.6, abs=0.1)
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    assert gate.products(X, Y) == pytest.approx(sum(X[i] @ Y[j] for i, j in pairs))
    assert np.isnan(gate.cosine_of_means(noise[:2], -noise[:2]))


def test_what_is_said_of_terms():
    rng = np.random.default_rng(1)
    found = []
    for _ in range(6):
        c, position = rng.normal(size=(2, 40))
        direct = np.eye(9)[0] + 0.1 * rng.normal(size=9)
        found.append(gate.Terms(c, position, direct, np.eye(9)[1] + 0.1 * rng.normal(size=9)))
    numbers = gate.judged(found)
    D, H = (np.array(x) for x in zip(*((terms.direct, terms.direct + terms.implicit) for terms in found)))
    cosines = [cosine(one, other) for one, other in zip(D, H)]
    assert numbers["cosine"] == pytest.approx(np.mean(cosines)) and numbers["smallest"] == min(cosines)
    assert numbers["signal"] == pytest.approx(gate.cosine_of_means(D, H))
    others = [gate.cosine_of_means(np.delete(D, i, 0), np.delete(H, i, 0)) for i in range(6)]
    jackknife = (5 / 6 * sum((x - np.mean(others)) ** 2 for x in others)) ** 0.5
    assert numbers["signal_error"] == pytest.approx(jackknife)
    pairs = [cosine(D[i], D[j]) for i in range(6) for j in range(6) if i != j]
    assert numbers["between"] == pytest.approx(np.mean(pairs))
    factors = [1 - 2 * terms.c for terms in found]
    assert numbers["factor"] == pytest.approx(np.mean(factors))
    assert numbers["sd"] == pytest.approx(np.mean([factor.std() for factor in factors]))


def test_on_a_run(run, tmp_path, capsys):
    gate.main([str(run), "--results-dir", str(tmp_path)])
    printed = capsys.readouterr().out
    rows = rows_of(tmp_path / "gate.csv")
    assert [row["variant"] for row in rows] == list(VARIANTS)
    assert {(row["env_id"], row["steps"], row["trajectories"]) for row in rows} == {
        ("InvertedPendulum-v4", "768", "2")
    }
    assert all(-1 <= float(row["cosine"]) <= 1 and float(row["position"]) <= 1 for row in rows)
    default = rows[0]
    signal = float(default["signal"])  # of two trajectories, from which there may be no estimate
    shown = f"{signal:.3f}" if math.isfinite(signal) else ""
    assert f"| default | {shown} | {float(default['cosine']):.3f} |" in printed

    weights = rows_of(tmp_path / "gate_weights.csv")
    assert len(weights) == 32 and weights[0]["age"] == "0"  # one trajectory, from its beginning


def test_moments_are_those_of_training(run):
    """The windows of a moment follow each other, the policy acted in its last one, and the run it was taken
    from is what it was."""
    before = sorted((path.name, path.read_bytes()) for path in run.iterdir())
    taken = gate.moments(run)
    assert sorted((path.name, path.read_bytes()) for path in run.iterdir()) == before
    assert len(taken) == 2
    for moment in taken:
        assert moment.obs.shape == (WINDOWS, 32, 4) and moment.done.shape == (WINDOWS, 32)
        policy = moment.actor.policy(moment.obs[-1], moment.actions[-1])
        ratio = np.exp(policy.log_prob - moment.logprobs[-1])
        assert np.abs(ratio - 1).max() < 1e-5  # it is the first epoch
        for earlier, later in zip(moment.obs[:-1], moment.obs[1:]):
            assert not np.array_equal(earlier, later)
    assert not np.array_equal(taken[0].obs, taken[1].obs)  # two environments
    assert np.array_equal(taken[0].critic.vector, taken[1].critic.vector)
    assert not np.array_equal(taken[0].critic.vector, taken[0].old_critic.vector)  # it has responded


def test_bad_runs_are_refused(tmp_path, capsys):
    none = ["--results-dir", str(tmp_path / "none")]

    def answer(run):
        with pytest.raises(SystemExit) as stop:
            gate.main([str(run), *none])
        assert not (tmp_path / "none").exists() and stop.value.code == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    command = [sys.executable, ROOT / "tools" / "gate.py", tmp_path / "nothing", *none]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert "not a run of blpo_continuous.py with two checkpoints and a solver" in found.stderr
    assert found.returncode == 2 and found.stderr.count("\n") == 1
    flags = f"--env-id InvertedPendulum-v4 --runs-dir {tmp_path} --num-envs 4 --num-steps 16"
    flags += " --num-minibatches 2 --eval-episodes 1 --total-timesteps 384 --checkpoint-every 2"
    nested = blpo_continuous.main([*flags.split(), "--ihvp", "none"])
    assert "not a run of blpo_continuous.py with two checkpoints and a solver" in answer(nested)

    lonely = flags.replace("--num-envs 4 --num-steps 16", "--num-envs 1 --num-steps 64")
    lonely = lonely.replace("384", "640").replace("--checkpoint-every 2", "--checkpoint-every 5")
    lonely = blpo_continuous.main([*lonely.split(), "--exp-name", "lonely"])
    assert f"{lonely} has one environment" in answer(lonely)

    short = blpo_continuous.main([*flags.split(), "--exp-name", "short"])
    assert f"{short} has no {WINDOWS} iterations after its last checkpoint but one" in answer(short)


@pytest.mark.parametrize("tool", [gate, solvers])
def test_nothing_is_written_of_no_runs(tool, tmp_path, monkeypatch, refused):
    """Results that are there stay; a folder that is no run, or has a damaged config.json, is refused."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / f"{tool.__name__[6:]}.csv").write_text("kept\n")
    call = tool.main if tool is gate else lambda words: solvers.main(parse_args(solvers.Args, "", words))
    with refused("name the folder of at least one run"):
        call([])
    (tmp_path / "run").mkdir()
    for text in ("", "[]", '{"script": "blpo_continuous.py"}'):
        (tmp_path / "run" / "config.json").write_text(text)
        with refused("run: not a run of"):
            call(["run"])
    assert [path.read_text() for path in (tmp_path / "results").iterdir()] == ["kept\n"]


def test_the_published_table_and_its_figure_are_those_of_the_results():
    rows, weights = rows_of(ROOT / "results" / "gate.csv"), rows_of(ROOT / "results" / "gate_weights.csv")
    table, scale = gate.table(rows).split("\n\n")
    page = (ROOT / "docs" / "hypergradient.md").read_text(encoding="utf-8")
    between = np.mean([float(row["between"]) for row in rows if row["variant"] == "default"])
    assert scale.endswith(f": {between:.2f}") and f"the cosine is {between:.2f}." in " ".join(page.split())
    assert table in page
    assert all(row["trajectories"] == "64" for row in rows)
    spread = []  # of a run's weights, without the first 50 steps of windows and episodes
    for run in {(row["env_id"], row["steps"]) for row in weights}:
        late = [row for row in weights if (row["env_id"], row["steps"]) == run and int(row["age"]) >= 50]
        values = np.array([float(row["factor"]) for row in late])
        spread.append(round(100 * values.std() / values.mean()))
    assert f"varies by {min(spread)} to {max(spread)} per cent of its mean" in " ".join(page.split())

    left, right = figures.draw_gate(rows, weights).axes
    assert len({(line.get_color(), line.get_linestyle()) for line in left.lines}) == 6  # a look for each run
    assert sum(len(line.get_xdata()) for line in left.lines) == len(weights)
    assert all((np.diff(line.get_xdata()) == 1).all() for line in left.lines)  # a line for each episode
    variants = [label.get_text().replace("\n", " ") for label in right.get_yticklabels()]
    assert variants == list(reversed(VARIANTS))
    first = next(line for line in right.lines if len(line.get_xdata()) == len(VARIANTS))
    run = [row for row in rows if (row["env_id"], row["steps"]) == (rows[0]["env_id"], rows[0]["steps"])]
    assert list(first.get_xdata()) == [float(row["signal"]) for row in run]
    bars = right.containers[0].lines[2][0].get_segments()
    wide = [1.96 * float(row["signal_error"]) for row in run]
    assert np.allclose([(bar[1][0] - bar[0][0]) / 2 for bar in bars], wide)
