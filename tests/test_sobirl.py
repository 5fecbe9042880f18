"""sobirl_tabular.py: every formula against finite differences or full enumeration in float64, then the script
as a user meets it."""

import csv
import itertools
import json
import os
import shlex
import signal
import typing
from dataclasses import replace

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from matplotlib.figure import Figure

import sobirl_tabular as sobirl
from support import run_folder
from tests.test_durable import FLOATS, INTEGERS, TEXT
from tests.test_scripts import refused, rows, stand_in_for_wandb, start, train
from tools import plot, tabular

ARGS = sobirl.Args(samples=0, rollout=40)
METHODS, PROBLEMS = sobirl.METHODS, sobirl.PROBLEMS


def tiny(seed=0, S=4, A=3, n=5, gamma=0.8, tau=0.5, H=2, state_only=False):
    """A problem that shares nothing with those of the script: a non-linear reward, l any function of two
    trajectories and x."""
    g = torch.Generator().manual_seed(seed)
    P = sobirl.uniform(S, A, S, generator=g) ** 2
    C, D = sobirl.normal(S, A, n, generator=g), sobirl.normal(S, A, n, generator=g)
    if state_only:
        C, D = C[:, :1].expand_as(C), D[:, :1].expand_as(D)
    cost, other = sobirl.normal(S, A, generator=g), sobirl.normal(S, A, S, A, generator=g)

    def loss(x, s, a):  # (..., 2, H) -> (...)
        return (
            cost[s, a].sum((-1, -2)) * x.sin().sum()
            + other[s[..., 0, -1], a[..., 0, -1], s[..., 1, 0], a[..., 1, 0]]
            + x[0] ** 2
        )

    def costs(x, s, a, alive):
        return loss(x, s, a)[:, None] * torch.eye(H, dtype=x.dtype)[-1]

    def objective(x, pi):
        return (problem.chance(pi) * loss(x, *problem.tuples)).sum()

    problem = sobirl.Problem(
        P / P.sum(-1, keepdim=True),
        gamma,
        tau,
        sobirl.normal(n, generator=g),
        lambda x: torch.tanh(C @ x) + 0.3 * (D @ x),
        objective,
        costs,
        0.1,
        0.1,
        0.1,
        2,
        H,
    )
    problem.tuples, problem.chance = tuples(problem)
    return problem


def tuples(problem):
    """All tuples of trajectories, their states and actions, each (M, I, H), and their probabilities as a
    function of pi."""
    S, A, H = *problem.P.shape[:2], problem.horizon
    paths = torch.tensor(list(itertools.product(range(S), range(A), repeat=H))).reshape(-1, H, 2)
    s, a = paths[..., 0], paths[..., 1]
    moves = problem.P[s[:, :-1], a[:, :-1], s[:, 1:]].prod(1) / S
    index = torch.cartesian_prod(*[torch.arange(len(s))] * problem.tuple_size).reshape(-1, problem.tuple_size)
    return (s[index], a[index]), lambda pi: (moves * pi[s, a].prod(1))[index].prod(1)


def optimum(problem, x):
    Q = sobirl.solve_follower(problem, problem.reward(x), torch.zeros(problem.P.shape[:2], dtype=x.dtype))
    return Q, torch.softmax(Q / problem.tau, 1)


def differences(f, x, h=1e-4):
    """Central differences of fourth order, (n,) -> (n, ...)."""
    rows = []
    for e in torch.eye(len(x), dtype=x.dtype) * h:
        rows.append((8 * (f(x + e) - f(x - e)) - (f(x + 2 * e) - f(x - 2 * e))) / (12 * h))
    return torch.stack(rows)


def reward_jacobian(problem, x):
    return torch.func.jacrev(problem.reward)(x)  # (S, A, n)


def implicit(problem, x, pi):
    """grad V (Proposition 4.1), grad Q and grad pi (8) at a policy, (S, n), (S, A, n), (S, A, n)."""
    dr = reward_jacobian(problem, x)
    dV = torch.linalg.solve(
        torch.eye(len(pi), dtype=x.dtype) - problem.gamma * sobirl.transition(problem.P, pi),
        (pi[..., None] * dr).sum(1),
    )
    dQ = dr + problem.gamma * problem.P @ dV
    return dV, dQ, pi[..., None] * (dQ - dV[:, None]) / problem.tau


def direction(name, problem, x, args=ARGS, memory=None, Q=None):
    Q = optimum(problem, x)[0] if Q is None else Q
    return METHODS[name](
        problem, x, Q, {} if memory is None else memory, args, torch.Generator().manual_seed(0)
    )


def close(a, b, tol=1e-8):
    assert (a - b).abs().max() <= tol, float((a - b).abs().max())


# The follower


@pytest.mark.parametrize("gamma, tau", [(0.0, 0.5), (0.8, 0.5), (0.99, 0.01), (0.5, 100.0)])
def test_follower_by_sweeps_by_newton_and_by_hand(gamma, tau, monkeypatch):
    problem = tiny(gamma=gamma, tau=tau)
    r = problem.reward(problem.start)
    Q, pi = optimum(problem, problem.start)
    V = sobirl.soft_value(Q, tau)
    close(Q, r + gamma * problem.P @ V, 1e-10)  # (5)-(7)
    close(V, (pi * (Q - tau * torch.log_softmax(Q / tau, 1))).sum(1), 1e-10)
    for tol in (1e-2, 1e-6):
        swept, count = sobirl.best_response(problem, r, torch.zeros_like(Q), tol)
        assert (swept - Q).abs().max() <= tol
        assert sobirl.best_response(problem, r, swept, tol)[1] <= count  # the warm start pays
        made = []
        with monkeypatch.context() as spy:
            sweep = sobirl.sweep
            spy.setattr(sobirl, "sweep", lambda *given: made.append(1) or sweep(*given))
            sobirl.best_response(problem, r, torch.zeros_like(Q), tol)
        assert len(made) == count  # the sweeps that it tells are all that it makes
    other = torch.softmax(
        sobirl.normal(4, 3, generator=torch.Generator().manual_seed(1)), 1
    )  # no policy does better
    system = torch.eye(4, dtype=r.dtype) - gamma * sobirl.transition(problem.P, other)
    assert (torch.linalg.solve(system, (other * (r - tau * other.log())).sum(1)) <= V).all()


def test_sweep_is_a_contraction():
    problem, g = tiny(), torch.Generator().manual_seed(1)
    r = problem.reward(problem.start)
    for _ in range(20):
        first, second = 10 * sobirl.normal(2, 4, 3, generator=g)
        gap = (sobirl.sweep(problem, r, first) - sobirl.sweep(problem, r, second)).abs().max()
        assert 0 < gap <= problem.gamma * (first - second).abs().max()


def test_small_temperatures_do_not_overflow():
    problem = tiny(tau=1e-3)
    assert direction("exact", problem, 100 * problem.start).isfinite().all()


# The hypergradient


@pytest.mark.parametrize("seed", range(3))
def test_derivatives_of_the_best_response(seed):
    problem = tiny(seed)
    x = problem.start
    dV, dQ, dpi = implicit(problem, x, optimum(problem, x)[1])
    close(dV, differences(lambda x: sobirl.soft_value(optimum(problem, x)[0], problem.tau), x).movedim(0, -1))
    close(dQ, differences(lambda x: optimum(problem, x)[0], x).movedim(0, -1))
    close(dpi, differences(lambda x: optimum(problem, x)[1], x).movedim(0, -1))


@pytest.mark.parametrize(
    "problem", [tiny(0), tiny(1), *(make(seed) for make in PROBLEMS.values() for seed in (1, 2))]
)
def test_hypergradient_against_finite_differences(problem):
    """(9), sign included; on the large problems along random directions."""
    g = torch.Generator().manual_seed(0)
    x = problem.start + 0.3 * sobirl.normal(len(problem.start), generator=g)
    basis = (
        torch.eye(len(x), dtype=x.dtype)
        if len(x) < 20
        else torch.linalg.qr(sobirl.normal(len(x), 3, generator=g))[0].T
    )
    phi = lambda t: problem.objective(x + t @ basis, optimum(problem, x + t @ basis)[1])
    gradient = basis @ direction("exact", problem, x)
    assert gradient.norm() > 1e-3
    close(
        gradient,
        differences(phi, torch.zeros(len(basis), dtype=x.dtype), 1e-3 if len(x) < 20 else 1e-4),
        1e-8 * max(1, float(gradient.norm())),
    )


@pytest.mark.parametrize("seed", range(3))
def test_model_free_form_by_enumeration(seed):
    """(13) + (14): the expectation over all pairs of trajectories of grad l + l/tau sum (grad Q - grad V) is
    (9)."""
    problem = tiny(seed)
    x, pi = problem.start, optimum(problem, problem.start)[1]
    dV, dQ, _ = implicit(problem, x, pi)
    (s, a), chance = problem.tuples, problem.chance(pi)
    assert abs(float(chance.sum()) - 1) < 1e-12
    loss = lambda x: problem.costs(x, s, a, torch.ones_like(s, dtype=torch.bool)).sum(1)
    score = (dQ[s, a] - dV[s]).sum((1, 2))  # (M, n)
    first = torch.func.grad(lambda x: chance @ loss(x))(x)
    close(first, direction("drlhf", problem, x))  # (13) is all that DRLHF has
    close(first + (chance * loss(x)) @ score / problem.tau, direction("exact", problem, x))
    close(chance @ score, torch.zeros_like(x))  # so that any baseline may be subtracted
    dr = reward_jacobian(problem, x)
    short = (dr - (pi[..., None] * dr).sum(1, keepdim=True))[s, a].sum((1, 2))
    close(
        first + (chance * loss(x)) @ short / problem.tau,
        direction("sobirl", problem, x, replace(ARGS, depth="one")),
    )  # (78)


@pytest.mark.parametrize("name", ["synthetic", "preference"])
def test_objective_is_the_expectation_over_tuples(name):
    """(12) of the problems whose trajectories can be enumerated."""
    problem = PROBLEMS[name](3)
    pi = optimum(problem, problem.start)[1]
    (s, a), chance = tuples(problem)
    l = problem.costs(problem.start, s, a, torch.ones_like(s, dtype=torch.bool)).sum(1)
    close(chance(pi) @ l, problem.objective(problem.start, pi), 1e-10)


def test_objective_of_reward_shaping_is_the_mean_of_its_samples():
    problem, g = PROBLEMS["reward-shaping"](1), torch.Generator().manual_seed(0)
    x = 0.5 * sobirl.normal(100, generator=g)
    pi = optimum(problem, x)[1]
    sample = sobirl.draw(problem, pi, replace(ARGS, samples=20_000, rollout=1), g)
    l = problem.costs(x, sample.s, sample.a, sample.alive).sum(1)
    assert abs(float(l.mean() - problem.objective(x, pi))) < 4 * float(l.std()) / 20_000**0.5
    assert abs(float(sample.alive.sum(2).double().mean()) - 20) < 0.6  # 1/(1 - 0.95)


# The other methods have the same target


@pytest.mark.parametrize(
    "problem", [tiny(0), PROBLEMS["synthetic"](1), PROBLEMS["reward-shaping"](1), PROBLEMS["preference"](1)]
)
def test_methods_that_equal_the_hypergradient(problem):
    x = problem.start
    target = direction("exact", problem, x)
    unit = float(target.norm())
    for name in ("sobirl", "hpgd"):
        close(direction(name, problem, x), target, 1e-10 * unit)
    close(direction("parl", problem, x), target, 1e-6 * unit)
    args = replace(ARGS, sweeps=2000)
    close(
        direction("unrolled", problem, x, args, {"Q before": torch.zeros_like(optimum(problem, x)[0])}),
        target,
        1e-8 * unit,
    )


def test_m_sobirl_tends_to_the_hypergradient():
    problem = tiny()
    x, Q = problem.start, optimum(problem, problem.start)[0]
    target, errors = direction("exact", problem, x), []
    for sweeps in (1, 5, 10, 20, 120):  # with w solved, as the sweeps grow
        swept = torch.zeros_like(Q)
        for _ in range(sweeps):
            swept = sobirl.sweep(problem, problem.reward(x), swept)
        errors.append(
            float(
                (direction("m-sobirl", problem, x, replace(ARGS, w_solver="exact"), Q=swept) - target).norm()
            )
        )
    assert all(later < 0.9 * earlier for earlier, later in zip(errors, errors[1:])) and errors[-1] < 1e-10
    errors = []
    for steps in (0, 10, 100, 1000, 3000):  # with Q solved, as the steps on w grow
        memory = {"w": torch.zeros(4, dtype=x.dtype)}
        errors.append(
            float((direction("m-sobirl", problem, x, replace(ARGS, w_steps=steps), memory) - target).norm())
        )
    assert all(later < earlier for earlier, later in zip(errors, errors[1:])) and errors[-1] < 1e-7


def test_weights_of_m_sobirl_are_those_of_the_next_sweep():
    """lambda of (9) is the policy after another sweep, not the one at hand: they differ until the follower
    has converged."""
    problem = tiny(3)
    x = problem.start
    Q = sobirl.normal(*problem.P.shape[:2], generator=torch.Generator().manual_seed(5))
    args = replace(ARGS, w_solver="exact")
    found = sobirl.m_sobirl(problem, x, Q, {}, args, None)

    V = problem.tau * (Q / problem.tau).exp().sum(1).log()
    pi = ((Q - V[:, None]) / problem.tau).exp()
    swept = problem.reward(x) + problem.gamma * (problem.P * V).sum(-1)
    lam = (swept / problem.tau).exp() / (swept / problem.tau).exp().sum(1, keepdim=True)
    by_x, m = sobirl.gradients(problem, x, pi)
    w = torch.linalg.solve(*sobirl.adjoint_system(problem, pi, m))
    jacobian = torch.autograd.functional.jacobian(problem.reward, x)  # (S, A, n)

    def direction(policy):
        return by_x + torch.einsum("sa,san->n", m - policy * w[:, None], jacobian) / problem.tau

    assert torch.allclose(found, direction(lam), atol=1e-12)
    assert not torch.allclose(direction(pi), direction(lam), rtol=1e-2)


def test_one_step_on_w_by_hand():
    problem = tiny()
    x, pi = problem.start, optimum(problem, problem.start)[1]
    A, b = sobirl.adjoint_system(problem, pi, sobirl.gradients(problem, x, pi)[1])
    w = sobirl.normal(4, generator=torch.Generator().manual_seed(5))
    for xi in (0.1, None):
        memory = {"w": w}
        direction("m-sobirl", problem, x, replace(ARGS, xi=xi), memory)
        step = xi or 1 / torch.linalg.eigvalsh(A.T @ A)[-1]
        close(memory["w"], w - step * (A.T @ A @ w - A.T @ b), 1e-12)


def test_penalty_method_tends_to_the_hypergradient():
    problem = tiny()
    target, errors = direction("exact", problem, problem.start), []
    for penalty in (10, 100, 1000, 10_000):
        memory, args = {}, replace(ARGS, penalty=penalty, sweeps=150)  # 0.8^150 is 3e-15
        errors.append(float((direction("pbrl", problem, problem.start, args, memory) - target).norm()))
    assert errors[-1] < 1e-3 * float(target.norm())
    for earlier, later in zip(errors, errors[1:]):
        assert 7 < earlier / later < 13, errors  # error proportional to 1/penalty


def test_penalised_policy_is_stationary():
    """What pbrl's mirror ascent ends at: no direction in the simplex improves penalty V^y - f."""
    problem, memory, args = tiny(), {}, replace(ARGS, penalty=20.0, sweeps=400)
    direction("pbrl", problem, problem.start, args, memory)
    r = problem.reward(problem.start)

    def gain(logits):
        log_y = torch.log_softmax(logits, 1)
        system = torch.eye(4, dtype=r.dtype) - problem.gamma * sobirl.transition(problem.P, log_y.exp())
        value = torch.linalg.solve(system, (log_y.exp() * (r - problem.tau * log_y)).sum(1)).mean()
        return args.penalty * value - problem.objective(problem.start, log_y.exp())

    close(torch.func.grad(gain)(memory["logits"]), torch.zeros(4, 3, dtype=r.dtype), 1e-8)


# Samples


def mean_and_error(draws):
    draws = torch.stack(draws)
    return draws.mean(0), draws.std(0) / len(draws) ** 0.5


@pytest.mark.parametrize("depth, baseline", [("full", True), ("full", False), ("one", True)])
@pytest.mark.parametrize("shifted", [False, True])
def test_estimator_is_unbiased(depth, baseline, shifted):
    """The mean of 100 estimates (15), or (78), is its expectation within four standard errors; also where the
    sample comes from another policy and is weighed by the likelihood ratio."""
    problem, g = tiny(gamma=0.5), torch.Generator().manual_seed(0)
    x, (Q, pi) = problem.start, optimum(problem, problem.start)
    behaviour = (
        torch.softmax((Q + 0.1 * sobirl.normal(4, 3, generator=g)) / problem.tau, 1) if shifted else pi
    )
    args = replace(ARGS, samples=150, rollout=12, depth=depth, baseline=baseline)
    draws = [
        sobirl.estimate(problem, x, pi, sobirl.draw(problem, behaviour, args, g), behaviour, args)
        for _ in range(100)
    ]
    mean, error = mean_and_error(draws)
    target = direction("sobirl", problem, x, replace(ARGS, depth=depth))
    assert (error < 0.2 * target.norm()).all()
    assert ((mean - target).abs() < 4 * error + 1e-3 * target.norm()).all(), (mean - target) / error


@pytest.mark.parametrize("name", ["sobirl", "hpgd"])
def test_monte_carlo_error_falls_with_the_root_of_the_samples(name):
    problem, g = tiny(gamma=0.5), torch.Generator().manual_seed(0)
    x, Q = problem.start, optimum(problem, problem.start)[0]
    target, errors = direction("exact", problem, x), []
    for samples in (64, 256, 1024, 4096):
        args = replace(ARGS, samples=samples, rollout=14)
        errors.append(
            sum(float((METHODS[name](problem, x, Q, {}, args, g) - target).square().sum()) for _ in range(20))
            ** 0.5
        )
    for earlier, later in zip(errors, errors[1:]):
        assert 1.5 < earlier / later < 2.7, errors  # 2


def test_baseline_is_the_mean_of_the_others():
    """Which leaves a sample's own score unbiased, unlike the mean of all."""
    problem, args = tiny(gamma=0.5), replace(ARGS, samples=3, rollout=8)
    x, pi = problem.start, optimum(problem, problem.start)[1]
    sample = sobirl.draw(problem, pi, args, torch.Generator().manual_seed(0))
    l = problem.costs(x, sample.s, sample.a, sample.alive).sum(1)
    others = torch.stack([l[[1, 2]].mean(), l[[0, 2]].mean(), l[[0, 1]].mean()])
    plain = replace(args, baseline=False)
    of_others = sobirl.estimate(replace(problem, costs=lambda *_: others[:, None]), x, pi, sample, pi, plain)
    close(
        sobirl.estimate(problem, x, pi, sample, pi, args),
        sobirl.estimate(problem, x, pi, sample, pi, plain) - of_others,
        1e-10,
    )


def test_hpgd_is_consistent():
    """Where all of the hypergradient is implicit, and moves are certain, so that what lies ahead matters."""
    problem, g = tiny(gamma=0.8), torch.Generator().manual_seed(0)
    cost = sobirl.normal(4, 3, generator=g)
    problem = replace(
        problem,
        P=torch.nn.functional.one_hot(problem.P.argmax(-1), 4).double(),
        costs=lambda x, s, a, alive: cost[s, a].sum(1),
    )
    (s, a), chance = tuples(problem)
    problem = replace(problem, objective=lambda x, pi: chance(pi) @ cost[s, a].sum((1, 2)) + 0 * x.sum())
    Q, args, target = (
        optimum(problem, problem.start)[0],
        replace(ARGS, samples=4000, rollout=30),
        direction("exact", problem, problem.start),
    )
    mean, error = mean_and_error([sobirl.hpgd(problem, problem.start, Q, {}, args, g) for _ in range(8)])
    assert ((mean - target).abs() < 6 * error).all() and (mean - target).norm() < 0.05 * target.norm(), (
        mean - target
    ) / error


def test_visit_means_by_hand():
    values, s, a = torch.tensor([1.0, 3.0, 8.0, 5.0]), torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 1, 1])
    assert sobirl.visit_means(values, s, a, 2, 2).tolist() == [[2 - 4, 8 - 4], [0 - 5, 0]]


def test_momentum():
    g, before, previous = torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([10.0])
    assert sobirl.momentum_step(previous, g, before, 1.0) == g  # plain SGD
    assert sobirl.momentum_step(previous, g, before, 0.25) == 1 + 0.75 * (10 - 2)
    problem, args = tiny(gamma=0.5), replace(ARGS, samples=8, rollout=8, momentum=1.0)
    Q = optimum(problem, problem.start)[0]
    plain, expected, memory, generators = [], None, {}, [torch.Generator().manual_seed(0) for _ in range(2)]
    for k in range(4):  # at x and pi that do not move, h is a weighted mean of the plain estimates
        plain.append(sobirl.sobirl(problem, problem.start, Q, {}, args, generators[0]))
        h = sobirl.stoc_sobirl(problem, problem.start, Q, memory, args, generators[1])
        eta = (k + 1) ** (-2 / 3)
        expected = plain[0] if k == 0 else expected + eta * (plain[k] - expected)
        close(h, expected, 1e-10)
    # x and pi have moved: the new sample, of the new policy, is evaluated at the old ones too
    x, new, old = problem.start + 0.1, optimum(problem, problem.start + 0.1)[0], dict(memory)
    pi = torch.softmax(new / problem.tau, 1)
    sample = sobirl.draw(problem, pi, args, generators[0])
    now, then = (
        sobirl.estimate(problem, *point, sample, pi, args)
        for point in ((x, pi), (problem.start, torch.softmax(Q / problem.tau, 1)))
    )
    close(
        sobirl.stoc_sobirl(problem, x, new, memory, args, generators[1]),
        now + (1 - 5 ** (-2 / 3)) * (old["h"] - then),
        1e-10,
    )
    assert (now - then).norm() > 1e-3


# What tells the methods apart


def cosine(a, b):
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


def test_a_reward_of_states_alone_has_no_truncated_term():
    """(78) is DRLHF when the reward does not take the action, whatever the hypergradient is."""
    problem = tiny(state_only=True)
    truncated = direction("sobirl", problem, problem.start, replace(ARGS, depth="one"))
    close(truncated, direction("drlhf", problem, problem.start), 1e-12)
    assert (direction("exact", problem, problem.start) - truncated).norm() > 0.1


def test_truncation_is_exact_without_discounting():
    problem = tiny(gamma=0.0)
    close(
        direction("sobirl", problem, problem.start, replace(ARGS, depth="one")),
        direction("exact", problem, problem.start),
        1e-12,
    )


def test_how_often_drlhf_opposes_the_hypergradient():
    """With HOW_MANY=1000 the numbers of docs/tabular.md."""
    count, opposed = int(os.environ.get("HOW_MANY", 100)), {"drlhf": 0, "sobirl": 0}
    for seed in range(count):
        problem = PROBLEMS["preference"](seed)
        target = direction("exact", problem, problem.start)
        for name in opposed:
            opposed[name] += (
                cosine(direction(name, problem, problem.start, replace(ARGS, depth="one")), target) < 0
            )
    print(opposed)
    assert 0.02 * count < opposed["drlhf"] < 0.2 * count and opposed["sobirl"] < 0.02 * count


def test_where_drlhf_opposes_the_hypergradient():
    """The sharpest case of docs/tabular.md: DRLHF's direction raises phi, those of SoBiRL lower it."""
    problem = PROBLEMS["preference"](688)
    x, phi = problem.start, lambda x: problem.objective(x, optimum(problem, x)[1])
    target, taken = direction("exact", problem, x), direction("drlhf", problem, x)
    truncated = direction("sobirl", problem, x, replace(ARGS, depth="one"))
    assert cosine(taken, target) < -0.75 and cosine(truncated, target) > 0.8
    assert phi(x - 1e-3 * taken) > phi(x) > phi(x - 1e-3 * truncated) > phi(x - 1e-3 * target)


# The script as a user meets it


@pytest.mark.parametrize("name", PROBLEMS)
def test_all_methods_from_the_same_start(name, tmp_path):
    starts = set()
    for method in METHODS:
        few = [] if method not in ("hpgd", "stoc-sobirl") else ["--samples", 3, "--rollout", 5]
        folder = train(sobirl, tmp_path, "--problem", name, "--method", method, "--rounds", 2, *few)
        progress, solution = (
            rows(folder / "progress.csv"),
            torch.load(folder / "solution.pt", weights_only=True),
        )
        assert folder.name.startswith(f"{name}__{method}__1__") and not (folder / "episodes.csv").exists()
        assert [row["round"] for row in progress] == [0, 1, 2] and progress[-1]["phi"] == solution["phi"]
        assert progress[2]["seconds"] > progress[1]["seconds"] > 0 and all(
            row["seconds_leader"] > 0 for row in progress
        )
        problem = PROBLEMS[name](1)
        assert abs(float(problem.objective(solution["x"], solution["policy"])) - solution["phi"]) < 1e-12
        flags = json.loads((folder / "config.json").read_text())["flags"]
        assert (
            flags["beta"] > 0 and flags["samples"] is not None and flags["gamma"] == problem.gamma
        )  # what was left open is filled in
        starts.add((progress[0]["phi"], progress[0]["gradient_norm"]))
        if method in ("exact", "parl", "sobirl"):
            assert progress[0]["cosine"] > 1 - 1e-9
    assert len(starts) == 1


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_m_sobirl_reaches_the_known_optimum(seed, tmp_path):
    progress = rows(train(sobirl, tmp_path, "--seed", seed) / "progress.csv")
    assert len(progress) == 1001 and 0 <= progress[-1]["phi"] - 1 <= 1e-3 < 10 < progress[0]["phi"]
    assert max(row["sweeps"] for row in progress) == 10  # O(1), whatever the accuracy


def test_preference_tells_drlhf_from_the_hypergradient(tmp_path):
    ends = {}
    for method in ("exact", "m-sobirl", "drlhf"):
        flags = [
            "--problem",
            "preference",
            "--seed",
            688,
            "--method",
            method,
            "--rounds",
            100,
            "--w-solver",
            "exact",
        ]
        progress = rows(train(sobirl, tmp_path, *flags) / "progress.csv")
        ends[method] = progress[-1]["phi"] - progress[0]["phi"]
    assert ends["exact"] < -0.1 and ends["m-sobirl"] < -0.1 and ends["drlhf"] > 0, ends


def test_same_seed_same_numbers_and_killed_runs_keep_theirs(tmp_path, monkeypatch):
    numbers = lambda folder: [(row["phi"], row["cosine"]) for row in rows(folder / "progress.csv")]
    flags = ["--method", "stoc-sobirl", "--samples", 4, "--rounds", 20]
    first = numbers(train(sobirl, tmp_path, *flags))
    assert (
        first
        == numbers(train(sobirl, tmp_path, *flags))
        != numbers(train(sobirl, tmp_path, *flags, "--seed", 2))
    )

    log, left = run_folder.Run.log, []

    def see_what_is_on_disk(self, row, line):
        log(self, row, line)
        assert not (self.folder / "solution.pt").exists()
        left.append(numbers(self.folder))

    with monkeypatch.context() as patch:  # what others can read is what SIGKILL leaves
        patch.setattr(run_folder.Run, "log", see_what_is_on_disk)
        train(sobirl, tmp_path, *flags)
    assert left == [first[: i + 1] for i in range(21)]

    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        process = start(sobirl, *flags, "--rounds", 500_000, "--runs-dir", tmp_path / str(number))
        process.stdout.readline()  # says how far it is: training has begun
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert process.returncode == status and "Traceback" not in err
        (folder,) = (tmp_path / str(number)).iterdir()
        kept = numbers(folder)
        assert len(kept) >= 1 and not (folder / "solution.pt").exists()
        assert kept[0] == first[0] and "stopped at round" in err


def test_track(tmp_path, monkeypatch):
    seen = []

    class Broadcast:
        def log(self, row, step):
            seen.append(("logged", step, sorted(row)[0]))

        def finish(self):
            seen.append("finished")

    def init(config, **_):
        seen.append(("config", config["flags"]["method"]))
        return Broadcast()

    stand_in_for_wandb(monkeypatch, init)
    train(sobirl, tmp_path, "--rounds", 2, "--track")
    assert seen[0] == ("config", "m-sobirl") and seen[-1] == "finished"
    assert seen[1:-1] == [("logged", step, "cosine") for step in range(3)]


@pytest.mark.parametrize(
    "flags, flag, fix",
    [
        (["--problem", "maze"], "--problem", "preference"),
        (["--method", "sac"], "--method", "m-sobirl"),
        (["--rounds", "0"], "--rounds", "1,000,000"),
        (["--sweeps", "0"], "--sweeps", "between 1"),
        (["--tol", "0"], "--tol", "1e-12"),
        (["--gamma", "1"], "--gamma", "0.999"),
        (["--tau", "0"], "--tau", "0.001"),
        (["--beta", "-1"], "--beta", "positive"),
        (["--beta", "nan"], "--beta", "positive"),
        (["--xi", "0"], "--xi", "positive"),
        (["--beta-decay", "2"], "--beta-decay", "[0, 1]"),
        (["--penalty", "0"], "--penalty", "positive"),
        (["--samples", "-1"], "--samples", "100,000"),
        (["--samples", "1", "--method", "sobirl"], "--samples", "--no-baseline"),
        (["--samples", "0", "--method", "stoc-sobirl"], "--samples", "at least 1"),
        (["--samples", "100000", "--rollout", "10000", "--method", "hpgd"], "--samples", "--rollout"),
        (["--samples", "64", "--method", "exact"], "--samples", "exact takes expectations"),
        (["--rollout", "0"], "--rollout", "between 1"),
        (["--momentum", "-1"], "--momentum", "1,000,000"),
        (["--w-steps", "0"], "--w-steps", "between 1"),
        (["--w-solver", "cg"], "--w-solver", "exact"),
        (["--seed", "-1"], "--seed", "2^31"),
        (["--exp-name", "x" * 300], "--exp-name", "100"),
        (["--runs-dir", "/dev/null/runs"], "--runs-dir", "another folder"),
    ],
)
def test_bad_input_is_one_line(flags, flag, fix, capsys, tmp_path):
    err = refused(sobirl, capsys, "--runs-dir", tmp_path, *flags)
    assert flag in err and fix in err, err
    assert not list(tmp_path.iterdir())


def test_one_sample_is_enough_without_a_baseline(tmp_path):
    for given in (["hpgd"], ["sobirl", "--no-baseline"]):
        folder = train(sobirl, tmp_path, "--samples", 1, "--rounds", 2, "--method", *given)
        assert len(rows(folder / "progress.csv")) == 3  # also what it began with


@pytest.mark.parametrize("method", ["exact", "sobirl", "parl", "m-sobirl"])
def test_divergence_is_one_line(method, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train(sobirl, tmp_path, "--method", method, "--beta", 1000)
    err = capsys.readouterr().err
    assert stop.value.code == 1 and "lower --beta" in err and err.count("\n") == 1
    assert rows(next(tmp_path.glob("*/progress.csv")))  # what was measured until then


def flag_values():
    values = {}
    for name, kind in typing.get_type_hints(sobirl.Args).items():
        if name not in ("track", "runs_dir", "rounds"):
            words = (
                TEXT
                if kind in (int, float, str)
                else st.sampled_from(list(map(str, getattr(kind, "__args__", "x"))))
            )
            values[name] = st.one_of(INTEGERS, FLOATS, TEXT, words) if kind is not bool else st.none()
    return st.lists(
        st.sampled_from(sorted(values)).flatmap(lambda name: st.tuples(st.just(name), values[name])),
        max_size=4,
    )


def test_any_command_line_runs_or_names_the_flag(tmp_path, capsys):
    seen = {"ran": 0, "refused": 0}

    @hypothesis.settings(
        max_examples=80,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(st.sampled_from([*METHODS]), st.sampled_from([*PROBLEMS]), flag_values())
    def case(method, problem, flags):
        if any(
            name in ("sweeps", "w_steps", "samples", "rollout")
            and value
            and value.isdecimal()
            and int(value) > 100
            for name, value in flags
        ):
            return  # accepted, and long
        words = ["--rounds", "2", "--problem", problem, "--method", method, "--runs-dir", str(tmp_path)]
        words += ["--samples", "4", "--rollout", "4"] if method in ("hpgd", "stoc-sobirl") else []
        for name, value in flags:
            words += [f"--{name.replace('_', '-')}", *([] if value is None else [str(value)])]
        hypothesis.note(shlex.join(words))
        try:
            sobirl.main(words)
            seen["ran"] += 1
        except SystemExit as stop:
            err = capsys.readouterr().err
            assert (
                stop.code in (1, 2) and err.startswith("error: ") and err.count("\n") == 1 and "--" in err
            ), err
            seen["refused"] += 1

    case()
    assert min(seen.values()) >= 10, seen


def test_plot_from_runs_to_table_and_figure(tmp_path, capsys, monkeypatch):
    for flags in (
        ["--seed", 1],
        ["--seed", 2],
        ["--problem", "preference", "--method", "drlhf"],
        ["--problem", "preference", "--seed", 688],
    ):
        train(sobirl, tmp_path / "runs", "--rounds", 5, *flags)
    train(sobirl, tmp_path / "runs", "--rounds", 300, "--method", "drlhf", "--beta", 0.04)
    (train(sobirl, tmp_path / "runs", "--rounds", 2, "--exp-name", "killed") / "solution.pt").unlink()
    places = ["--results-dir", tmp_path / "results", "--figures-dir", tmp_path / "figures"]
    command = ["--apart", "preference:688", *places, "--runs-dir", tmp_path / "runs"]
    command = list(map(str, command))
    capsys.readouterr()
    plot.main(command)
    first = capsys.readouterr().out
    assert "no solution, left out: synthetic__killed__1__" in first
    assert (
        "| synthetic | M-SoBiRL | 2 | 0 |  |  | 10 |" in first
        and "| preference, seed 688 | M-SoBiRL | 1 |" in first
    )
    row = next(
        row
        for row in csv.DictReader(open(tmp_path / "results" / "tabular_summary.csv"))
        if row["exp_name"] == "drlhf" and row["problem"] == "synthetic"
    )
    there = next(
        row
        for row in rows(next((tmp_path / "runs").glob("synthetic__drlhf*")) / "progress.csv")
        if row["gradient_norm"] <= 1e-3
    )
    assert (
        float(row["round_to_0.001"]) == there["round"] and float(row["seconds_to_0.001"]) == there["seconds"]
    )
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    assert drawn == {f"{name}.{kind}" for name in ("tabular", "tabular_all") for kind in ("png", "pdf")}
    contents = lambda: {path.name: path.read_bytes() for path in (tmp_path / "results").iterdir()}
    before = contents()  # adding the same runs again changes nothing
    for name in ("draw", "draw_overview"):  # which take a while
        monkeypatch.setattr(tabular, name, lambda *_: Figure())
    plot.main(command)
    again = capsys.readouterr().out
    assert again == first and contents() == before and before["tables.md"].decode() == first.split("\n", 1)[1]
