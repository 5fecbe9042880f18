"""leader.py: the second term of the leader's gradient, against the tabular problems of sobirl_tabular.py,
full enumeration, autograd and quadrature, in float64; then sobirl_continuous.py with --method sobirl, hpgd
and pbrl."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import sobirl_continuous as sobirl
import sobirl_discrete
import sobirl_tabular as tabular
from jacobian import FusedAdam, SquashedGaussian
from leader import bounded, hyper_gradient, hyper_weights, penalty_gradient, preference_gradient
from leader import preference_loss, rival_weights, suffix_gradient
from support.preferences import Pairs, Preferences, margins_of
from support.replay import Replay
from support.run_folder import PREVIOUS
from tests.test_preferences import HOPPER, PENDULUM, flags, reward_net
from tests.test_replay import memory, steps
from tests.test_sac import assert_it_goes_on, contents, flat, whole_and_killed
from tests.test_scripts import refused, rows, train


@pytest.fixture(autouse=True)
def double(float64):
    """All of this is exact."""


def pairs(M=6, L=4, obs_dim=3, action_size=2, seed=0):
    rng = np.random.default_rng(seed)
    obs = rng.normal(size=(M, 2, L, obs_dim))
    return Pairs(obs, rng.uniform(-1, 1, (M, 2, L, action_size)), rng.choice([0.0, 0.5, 1.0], M))


# Against tables


def enumerated(problem):
    """All pairs of trajectories of a tabular preference problem: states and actions (D^2, 2, H), and how
    likely each pair is under a policy."""
    S, A, H = *problem.P.shape[:2], problem.horizon
    paths = torch.tensor(list(itertools.product(range(S), range(A), repeat=H))).reshape(-1, H, 2)
    s, a = paths[..., 0], paths[..., 1]
    moves = problem.P[s[:, :-1], a[:, :-1], s[:, 1:]].prod(1) / S
    index = torch.cartesian_prod(torch.arange(len(s)), torch.arange(len(s)))
    return s[index], a[index], lambda pi: (moves * pi[s, a].prod(1))[index].prod(1)


def hyper_loss(rewards, expected, losses, alpha, baseline):
    """A loss whose gradient is (78), from rewards and expected (M, 2, L)."""
    return hyper_weights(losses, alpha, baseline) @ (rewards - expected).sum((-2, -1))


def surrogate(problem, x, pi, s, a, chance, true, tau):
    """(13) + (78) of a table of rewards by autograd, the second one through hyper_weights."""
    r = x.requires_grad_().reshape(pi.shape)
    labels = margins_of(true[s, a]).sigmoid()
    losses, _ = preference_loss(margins_of(r[s, a]), labels)
    expected = (pi * r).sum(1)[s]
    weighted = losses.detach() * chance * len(chance)  # hyper_weights are those of a mean of pairs
    second = hyper_loss(r[s, a], expected, weighted, tau, baseline=False)
    first = torch.autograd.grad(losses @ chance, x, retain_graph=True)[0]
    return first, torch.autograd.grad(second, x)[0]


def true_reward(seed, S=4, A=3):
    """What tabular.preference draws as the hidden reward."""
    g = torch.Generator().manual_seed(seed)
    tabular.uniform(S, A, S, generator=g)
    return 2 * tabular.normal(S, A, generator=g)


@pytest.mark.parametrize("seed", range(60))
def test_surrogate_is_the_one_step_hypergradient(seed):
    """(13) + (78) = sobirl(depth="one") of the table, and (13) alone drlhf; with gamma 0 both are exact."""
    problem = tabular.preference(seed)
    s, a, chances = enumerated(problem)
    for gamma in (problem.gamma, 0.0):
        problem = tabular.replace(problem, gamma=gamma)
        x = problem.start
        Q = tabular.solve_follower(problem, problem.reward(x), torch.zeros(4, 3))
        pi = torch.softmax(Q / problem.tau, 1)
        chance = chances(pi)
        assert float(chance.sum()) == pytest.approx(1)
        first, second = surrogate(problem, x.clone(), pi, s, a, chance, true_reward(seed), problem.tau)
        args = tabular.Args(samples=0, depth="one")
        expected = tabular.sobirl(problem, x, Q, {}, args, None)
        assert (first + second - expected).abs().max() <= 1e-12
        assert (first - tabular.drlhf(problem, x, Q, {}, args, None)).abs().max() <= 1e-12
    assert (first + second - tabular.exact(problem, x, Q, {}, args, None)).abs().max() <= 1e-12


@pytest.mark.parametrize("seed", range(5))
def test_several_members_share_a_policy(seed):
    """Two tables of rewards, whose mean the policy maximises: the total derivative of the sum of their losses
    is (13) of each, and (78) of each with the mean of both losses."""
    problem = tabular.replace(tabular.preference(seed), gamma=0.0)
    s, a, chances = enumerated(problem)
    labels = margins_of(true_reward(seed)[s, a]).sigmoid()
    x = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(seed), requires_grad=True)

    def losses_of(tables):
        return torch.stack([preference_loss(margins_of(r[s, a]), labels)[0] for r in tables])

    pi = torch.softmax(x.mean(0) / problem.tau, 1)
    total = chances(pi) @ losses_of(x).sum(0)
    exact = torch.autograd.grad(total, x, retain_graph=True)[0]

    pi, chance = pi.detach(), chances(pi).detach()
    weighted = losses_of(x).mean(0).detach() * chance * len(chance)
    second = [hyper_loss(r[s, a], (pi * r).sum(1)[s], weighted, problem.tau, False) for r in x]
    found = torch.autograd.grad(chance @ losses_of(x).sum(0) + sum(second), x)[0]
    assert (found - exact).abs().max() <= 1e-12 < exact.abs().max()


def test_scores_and_baselines_on_policy_and_off():
    """The expected score is 0 for pairs that pi has played, not for those of others; on-policy the baseline
    changes no expectation, enumerated over two independent pairs."""
    problem = tabular.preference(3, S=2, A=2, H=1)
    s, a, chances = enumerated(problem)
    torch.manual_seed(0)
    pi, other = torch.softmax(torch.randn(2, 2, 2), -1)
    x = torch.randn(4, requires_grad=True)
    r = x.reshape(2, 2)

    def score(policy):
        scores = (r[s, a] - (pi * r).sum(1)[s]).sum((-2, -1))
        return torch.autograd.grad(chances(policy) @ scores, x, retain_graph=True)[0]

    assert score(pi).abs().max() <= 1e-15 and score(other).abs().max() > 0.01
    losses, _ = preference_loss(margins_of(r[s, a]), (a[:, 0, 0] > a[:, 1, 0]).double())
    two = torch.cartesian_prod(torch.arange(16), torch.arange(16))
    expected = (pi * r).sum(1)[s]

    def mean_gradient(baseline, policy):
        batches = [hyper_loss(r[s, a][m], expected[m], losses.detach()[m], 0.3, baseline) for m in two]
        mean = chances(policy)[two].prod(1) @ torch.stack(batches)
        return torch.autograd.grad(mean, x, retain_graph=True)[0]

    exact = mean_gradient(False, pi)
    assert exact.abs().max() > 0.01
    assert (mean_gradient(True, pi) - exact).abs().max() <= 1e-12
    assert (mean_gradient(True, other) - mean_gradient(False, other)).abs().max() > 1e-3


# Gradients, by autograd


def learned(reward, obs, actions):
    """Rewards of the members, differentiable, (members, ...)."""
    x = torch.cat([torch.as_tensor(obs), torch.as_tensor(actions)], -1)
    outputs = torch.stack([net(x).squeeze(-1) for net in reward.nets])
    return outputs.tanh() if reward.args.reward_output == "tanh" else outputs


THREE_TANH = ["--reward-output", "tanh", "--reward-members", 3]


@pytest.mark.parametrize("baseline", [True, False])
@pytest.mark.parametrize("given", [[], ["--reward-output", "tanh"], THREE_TANH])
def test_gradient_of_the_second_term(given, baseline):
    """(78) with expectations over five actions of any chances, the weights from the members' mean losses."""
    reward, batch = reward_net(*given), pairs()
    rng = np.random.default_rng(1)
    others, chances = rng.uniform(-1, 1, (5, 6, 2, 4, 2)), rng.dirichlet(np.ones(5), (6, 2, 4))
    chances = np.moveaxis(chances, -1, 0)
    gradient, score = hyper_gradient(reward, batch, others, chances, 0.2, baseline)

    rewards = learned(reward, batch.obs, batch.actions)
    of_others = learned(reward, np.broadcast_to(batch.obs, (5, *batch.obs.shape)).copy(), others)
    expected = (torch.as_tensor(chances) * of_others).sum(1)
    losses = torch.nn.functional.binary_cross_entropy_with_logits(
        margins_of(rewards), torch.as_tensor(batch.labels).expand(len(rewards), 6), reduction="none"
    ).detach()
    losses = losses.mean(0)
    b = (losses.sum() - losses) / 5 if baseline else 0.0
    scores = (rewards - expected).sum((-2, -1))
    loss = ((losses - b) * scores).mean(1).sum() / 0.2
    assert np.allclose(gradient, flat(torch.autograd.grad(loss, list(reward.parameters()))), atol=1e-13)
    assert score == pytest.approx(float(scores.mean().detach()), rel=1e-9)


@pytest.mark.parametrize("baseline", [True, False])
@pytest.mark.parametrize("given", [[], ["--reward-output", "tanh", "--reward-members", 2]])
def test_gradient_of_suffixes(given, baseline):
    """(14): sums of discounted sums, less their mean over all segments, written as loops."""
    reward, batch, gamma = reward_net(*given), pairs(), 0.8
    gradient = suffix_gradient(reward, batch, gamma, 0.2, baseline)
    rewards = learned(reward, batch.obs, batch.actions)
    losses = torch.nn.functional.binary_cross_entropy_with_logits(
        margins_of(rewards), torch.as_tensor(batch.labels).expand(len(rewards), 6), reduction="none"
    ).detach()
    Q = torch.zeros_like(rewards)
    for h in range(4):
        for k in range(h, 4):
            Q[..., h] = Q[..., h] + gamma ** (k - h) * rewards[..., k]
    V = Q.mean((1, 2), keepdim=True)  # for every h
    scores = (Q - V).sum((-2, -1))
    losses = losses.mean(0)
    b = (losses.sum() - losses) / 5 if baseline else 0.0
    loss = ((losses - b) * scores).mean(1).sum() / 0.2
    assert np.allclose(gradient, flat(torch.autograd.grad(loss, list(reward.parameters()))), atol=1e-12)


def test_a_reward_of_states_has_no_second_term():
    reward, batch = reward_net("--reward-input", "state"), pairs()
    others = np.random.default_rng(1).uniform(-1, 1, (5, 6, 2, 4, 2))
    gradient, score = hyper_gradient(reward, batch, others, np.full((5, 6, 2, 4), 0.2), 0.1, True)
    first = preference_gradient(reward, batch)[2]
    assert abs(gradient).max() <= 1e-12 * abs(first).max() + 1e-14 and abs(score) <= 1e-12


def test_temperature_and_one_pair():
    reward, batch = reward_net(), pairs()
    others, chances = pairs(seed=1).actions[None], np.ones((1, 6, 2, 4))
    one, tenth = (hyper_gradient(reward, batch, others, chances, alpha, True)[0] for alpha in (1.0, 0.1))
    assert np.allclose(10 * one, tenth, rtol=1e-12)
    single = Pairs(*(x[:1] for x in batch))  # which has no others: b is 0
    one_other = others[:, :1], chances[:, :1], 1.0
    with_b, without = (hyper_gradient(reward, single, *one_other, baseline)[0] for baseline in (True, False))
    assert np.allclose(with_b, without) and abs(with_b).max() > 0


def test_bounded():
    direct, second = np.array([3.0, 4.0]), np.array([0.0, 20.0])
    total, found = bounded(direct, second, 0.5)
    assert np.allclose(total, [3.0, 6.5])
    assert found["hyper_grad_norm"] == 20 and found["hyper_bound_active"] == 1
    assert found["hyper_cosine"] == pytest.approx(0.8)
    total, found = bounded(direct, second / 10, 0.5)
    assert np.allclose(total, [3.0, 6.0]) and found["hyper_bound_active"] == 0
    assert (bounded(direct, second, 0.0)[0] == direct + second).all()
    assert (bounded(direct, 0 * second, 0.3)[0] == direct).all()
    for bound in (0.0, 0.3):  # what has overflowed is left out
        total, found = bounded(direct, np.array([math.nan, 1.0]), bound)
        assert (total == direct).all() and math.isnan(found["hyper_grad_norm"])
        assert math.isnan(found["hyper_bound_active"]) and found["hyper_dropped"] == 1
    assert bounded(direct, second, 0.3)[1]["hyper_dropped"] == 0


@pytest.mark.parametrize("given", [[], ["--reward-members", 2]])
def test_gradient_of_the_penalty(given):
    """In the follower's units: of a reward ten times as large the regret is the same."""
    reward, best, rival = reward_net(*given), pairs(), pairs(seed=1)
    reward.mean_std[:] = torch.tensor([2.0, 3.0])
    gradient, difference = penalty_gradient(reward, best, rival, 0.7)
    returns = [learned(reward, batch.obs, batch.actions).sum(-1).mean((1, 2)) for batch in (best, rival)]
    loss = 0.7 * (returns[0] - returns[1]).sum() / 3
    assert np.allclose(gradient, flat(torch.autograd.grad(loss, list(reward.parameters()))), atol=1e-13)
    assert difference == pytest.approx(float((returns[0] - returns[1]).mean().detach()) / 3, rel=1e-9)


def played_pairs(rival):
    """Pairs that the rival has played, their log-probabilities, and what rival_gradient asks of Preferences:
    an earlier query has left ten pairs."""
    batch = pairs()
    outputs = rival.jacobian(batch.obs.reshape(-1, 3)).outputs
    actions = SquashedGaussian(outputs, np.random.default_rng(1).normal(size=(len(outputs), 2))).actions
    batch = batch._replace(actions=actions.reshape(batch.actions.shape))
    places = 10 + np.arange(6)
    chosen = lambda of: Pairs(*(x[of - 10] for x in batch))
    preferences = SimpleNamespace(some_fresh=lambda *_: places[::-1], pairs=chosen, fresh=places)
    return batch, sobirl.log_probs_of(rival, batch)[0], preferences


@pytest.mark.parametrize("baseline", [True, False])
def test_gradient_of_the_rival(baseline):
    """REINFORCE: the losses, of the members' mean, less their mean, times the gradient of log y over both
    segments, in units of what the penalty lets a step count, which like the follower's rewards have been
    divided by the deviation."""
    reward = reward_net("--reward-members", 2)
    reward.mean_std[1] = 3.0
    torch.manual_seed(1)
    rival = sobirl.Actor(3, 4, 6)
    batch, played, preferences = played_pairs(rival)
    given = ["--method", "pbrl", "--penalty", 0.2, "--segment", 5]
    args = flags(*given, *([] if baseline else ["--no-baseline"]))
    found = sobirl.rival_gradient(rival, played, reward, preferences, None, args)
    margins = margins_of(learned(reward, batch.obs, batch.actions))
    labels = torch.as_tensor(batch.labels).expand_as(margins)
    losses = torch.nn.functional.binary_cross_entropy_with_logits(margins, labels, reduction="none")
    losses = losses.detach().mean(0)
    mean, raw = rival.net(torch.as_tensor(batch.obs)).chunk(2, -1)
    u = torch.arctanh(torch.as_tensor(batch.actions))
    normal = torch.distributions.Normal(mean, (-5 + 3.5 * (raw.tanh() + 1)).exp())
    log_prob = normal.log_prob(u).sum((1, 2, 3))
    loss = ((losses - losses.mean() if baseline else losses) * log_prob).mean() / (0.2 * 5)
    assert np.allclose(found, flat(torch.autograd.grad(loss, list(rival.parameters()))), atol=1e-12)


@pytest.mark.parametrize("baseline", [True, False])
def test_weights_of_pairs_that_another_rival_has_played(baseline):
    """Those of PPO's clipped surrogate: they end where a step has become a fifth more or less likely, in the
    direction of the gradient."""
    rng = np.random.default_rng(0)
    losses = rng.uniform(0, 2, 6)
    log_ratio = rng.normal(0, 0.4, (6, 2, 4))
    found = rival_weights(losses, log_ratio, baseline)
    w = torch.as_tensor(losses - losses.mean() if baseline else losses)[:, None, None]
    log_prob = torch.as_tensor(log_ratio).requires_grad_()
    ratio = log_prob.exp()
    surrogate = torch.maximum(w * ratio, w * ratio.clip(0.8, 1.2)).sum((1, 2)).mean()
    (expected,) = torch.autograd.grad(surrogate, log_prob)
    assert np.allclose(found, expected, atol=1e-15)
    gone = np.where(w > 0, log_ratio < math.log(0.8), log_ratio > math.log(1.2))
    assert ((found == 0) == gone).all() and 5 < gone.sum() < 40
    assert np.isfinite(rival_weights(losses, 1e4 * log_ratio, baseline)).all()


def test_a_rival_stays_near_the_pairs_that_it_has_played():
    """However often it is updated by them: REINFORCE without a clip has no end."""
    reward = reward_net()
    torch.manual_seed(1)
    rival = sobirl.Actor(3, 4, 6)
    batch, played, preferences = played_pairs(rival)
    adam = FusedAdam(rival.vector, 1e-2)
    args = flags("--method", "pbrl")
    for _ in range(500):
        adam.step(sobirl.rival_gradient(rival, played, reward, preferences, None, args))
    moved = sobirl.log_probs_of(rival, batch)[0] - played
    assert 0.1 < np.median(abs(moved)) < 1


def test_actions_at_the_edge_of_the_box_do_not_swamp_the_rival():
    """They are kept as if u were 7.25 at most; a mean that is far beyond that saw ordinary noise."""
    reward, batch = reward_net(), pairs()
    torch.manual_seed(1)
    rival = sobirl.Actor(3, 4, 6)
    last = rival.net[-1]
    with torch.no_grad():
        last.weight.zero_(), last.bias.copy_(torch.tensor([9.0, 9.0, -0.5, -0.5]))  # means, spread of 0.1
    edge = batch._replace(actions=np.ones_like(batch.actions))
    places = np.arange(6)
    preferences = SimpleNamespace(some_fresh=lambda *_: places, pairs=lambda _: edge, fresh=places)
    played, *_ = sobirl.log_probs_of(rival, edge)
    args = flags("--method", "pbrl", "--penalty", 1, "--segment", 1)
    found = sobirl.rival_gradient(rival, played, reward, preferences, None, args)
    outputs = rival.jacobian(edge.obs.reshape(-1, 3)).outputs
    raw = SquashedGaussian.of(outputs, edge.actions.reshape(-1, 2))
    assert abs(raw.noise).min() > 9 and 0 < np.linalg.norm(found) < 100


# Samples


def second_term(reward, batch, *given, generator=None, alpha=1.0, method="sobirl"):
    """The script's, of these pairs, with an untrained actor; and that actor."""
    torch.manual_seed(5)
    actor = sobirl.Actor(3, 2 * batch.actions.shape[-1], 6)
    preferences = SimpleNamespace(
        fresh=np.arange(len(batch.labels)),
        some_fresh=lambda count, _: np.arange(len(batch.labels))[:count],
        pairs=lambda places: Pairs(*(x[places] for x in batch)),
    )
    args = flags("--method", method, "--reward-hidden-size", 5, *given)
    generator = generator or torch.Generator().manual_seed(0)
    return sobirl.second_term(reward, actor, alpha, preferences, generator, args, None), actor


def test_sampled_actions_against_quadrature():
    """The mean of many estimates with four actions each, and the expectation by Gauss and Hermite."""
    reward, batch = reward_net(action_size=1), pairs(action_size=1)
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(400):
        (gradient, _), actor = second_term(reward, batch, "--hyper-actions", 4, generator=generator)
        found.append(gradient)
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    outputs = actor.jacobian(batch.obs.reshape(-1, 3)).outputs
    others = [SquashedGaussian(outputs, np.full((len(outputs), 1), z)).actions for z in nodes]
    others = np.stack(others).reshape(40, *batch.actions.shape)
    chances = (weights / weights.sum())[:, None, None, None] * np.ones((40, 6, 2, 4))
    exact, _ = hyper_gradient(reward, batch, others, chances, 1.0, True)
    error = np.mean(found, 0) - exact
    deviation = np.std(found, 0) / math.sqrt(len(found))
    assert (abs(error) <= 4.5 * deviation + 1e-12).all()
    assert np.linalg.norm(exact) > 10 * np.linalg.norm(deviation)


def test_actions_of_the_second_term_have_a_generator_of_their_own():
    first, second = (second_term(reward_net(), pairs())[0][0] for _ in range(2))
    assert (first == second).all()
    generator = torch.Generator().manual_seed(1)
    assert (second_term(reward_net(), pairs(), generator=generator)[0][0] != first).any()
    (suffix, score), _ = second_term(reward_net(), pairs(), "--gamma", 0.5, method="hpgd", alpha=0.3)
    assert (suffix == suffix_gradient(reward_net(), pairs(), 0.5, 0.3, True)).all() and math.isnan(score)


# Runs


SOBIRL = [*PENDULUM, "--method", "sobirl", "--hyper-batch-size", 3]


def test_with_the_second_term_times_0_a_run_is_that_of_drlhf(tmp_path, monkeypatch):
    few = ["--total-timesteps", 200]
    expected = contents(train(sobirl, tmp_path, *PENDULUM, *few))
    assert contents(train(sobirl, tmp_path, *SOBIRL, *few))["model"] != expected["model"]
    original = sobirl.second_term
    monkeypatch.setattr(sobirl, "second_term", lambda *inputs: (0 * original(*inputs)[0], 0.0))
    assert contents(train(sobirl, tmp_path, *SOBIRL, *few))["model"] == expected["model"]


def test_where_the_second_term_is_taken(tmp_path, monkeypatch):
    """Not in the first query, whose steps were at random; on fresh pairs only, with the temperature of the
    time, in the last updates, after a start, as the flags say."""
    seen = []
    original = sobirl.second_term

    def spy(reward, actor, alpha, preferences, generator, args, places):
        seen.append((preferences.queries, alpha, places, preferences.fresh.copy(), reward.std))
        return original(reward, actor, alpha, preferences, generator, args, places)

    monkeypatch.setattr(sobirl, "second_term", spy)
    few = ["--total-timesteps", 160, "--eval-episodes", 0]

    def calls(*given, norm="--no-reward-norm"):
        seen.clear()
        train(sobirl, tmp_path, *SOBIRL, *few, norm, *given)
        return [queries for queries, *_ in seen]

    # 10, 16, 22, ... pairs in minibatches of 4, twice
    updates = {2: 8, 3: 12, 4: 14, 5: 18}
    assert calls() == [query for query, count in updates.items() for _ in range(count)]
    alphas = [alpha for _, alpha, *_ in seen]
    assert len(set(alphas)) == 4 and alphas == sorted(alphas, reverse=True)
    assert calls("--hyper-steps", 3) == [2, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 5]
    assert set(calls("--hyper-start", 120)) == {4, 5}
    assert set(calls("--no-autotune", "--alpha", 0.5)) == {2, 3, 4, 5} and seen[0][1] == 0.5
    calls("--no-autotune", "--alpha", 0.5, "--hyper-coef-max", 1.25)
    assert {alpha for _, alpha, *_ in seen} == {0.8}
    calls("--no-autotune", "--alpha", 0.5, norm="--reward-norm")  # times the deviation of the rewards
    assert len({alpha for _, alpha, *_ in seen}) == 4
    assert all(alpha == 0.5 * std for _, alpha, *_, std in seen)
    calls("--no-autotune", "--alpha", 0.5, "--hyper-coef-max", 5.7, norm="--reward-norm")
    assert {alpha == 1 / 5.7 for _, alpha, *_ in seen} == {True, False}
    assert all(alpha == max(0.5 * std, 1 / 5.7) for _, alpha, *_, std in seen)
    for _, _, places, fresh, _ in seen:
        assert len(fresh) == 6 and len(places) <= 4


def test_fresh_pairs_or_any(tmp_path, monkeypatch):
    rooms = []
    original = sobirl.pairs_at

    def spy(places, preferences, args):
        rooms.append((sorted(places), preferences.fresh))
        return original(places, preferences, args)

    monkeypatch.setattr(sobirl, "pairs_at", spy)
    for kind in ("fresh", "queue"):
        rooms.clear()
        few = ["--total-timesteps", 100, "--eval-episodes", 0]
        train(sobirl, tmp_path, *SOBIRL, "--hyper-pairs", kind, *few)
        firsts, seconds = rooms[12::2], rooms[13::2]  # after 4 epochs of 3 minibatches without the term
        assert len(firsts) == len(seconds) == 8
        if kind == "fresh":
            assert all(set(places) <= set(fresh) and len(places) == 3 for places, fresh in seconds)
        else:
            assert all(one[0] == other[0] for one, other in zip(firsts, seconds))


@pytest.mark.parametrize("method", ["sobirl", "hpgd", "pbrl"])
def test_columns(method, tmp_path):
    """There is no score with hpgd, whose sums are deviations from their own mean."""
    table = rows(train(sobirl, tmp_path, *SOBIRL, "--method", method) / "progress.csv")
    for name in ("hyper_grad_norm", "hyper_cosine", "hyper_bound_active", "score_mean"):
        there = (method, name) != ("hpgd", "score_mean")
        assert all(math.isnan(row[name]) for row in table[:4])
        assert all(math.isfinite(row[name]) == there for row in table[4:])
    assert all(-1.001 <= row["hyper_cosine"] <= 1.001 for row in table[4:])


def test_flags_change_the_run(tmp_path):
    variants = [
        [],
        ["--method", "hpgd"],
        ["--hyper-bound", 0.01],
        ["--hyper-bound", 0],
        ["--hyper-pairs", "queue"],
        ["--hyper-batch-size", 4],
        ["--hyper-actions", 3],
        ["--hyper-steps", 2],
        ["--hyper-start", 100],
        ["--hyper-coef-max", 1e-3],
        ["--no-baseline"],
        ["--method", "drlhf"],
        ["--method", "pbrl"],
        ["--method", "pbrl", "--penalty", 2],
    ]
    few = ["--total-timesteps", 120, "--eval-episodes", 0, "--hyper-bound", 0.02]
    found = [contents(train(sobirl, tmp_path, *SOBIRL, *few, *given))["model"] for given in variants]
    for i, one in enumerate(found):
        assert all(one != other for other in found[:i]), variants[i]


@pytest.mark.parametrize("method", ["sobirl", "hpgd", "pbrl"])
def test_resume_is_byte_identical(method, tmp_path):
    given = [*HOPPER, "--method", method, "--hyper-batch-size", 3]
    folder, killed = whole_and_killed(tmp_path, [133, 215], *given)
    expected = contents(folder)
    for step in killed:
        assert_it_goes_on(killed[step], tmp_path / f"{step} again", expected)


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "Hopper-v4"])
def test_the_rival_plays_the_query(env_id, tmp_path, monkeypatch):
    """y plays the frozen steps and pi all others, and the penalty compares rows that pi has played with rows
    that y has played; with Hopper there are also rows between them that are no steps."""
    players, played, terms = [], {}, []
    numpy_policy, add, penalty_term = sobirl.numpy_policy, Replay.add, sobirl.penalty_term

    def see_policy(net):
        players.append(net)
        return numpy_policy(net)

    def see_step(self, *values):
        if players:
            played[self.written] = "y" if players[-1] is players[0] else "pi"
        add(self, *values)

    def see_term(reward, preferences, begin, args, places):
        segments = preferences.segments

        def see_segments(*inputs, end=None):
            found = segments(*inputs, end=end)
            terms.append(found[..., None] + np.arange(args.segment))
            return found

        preferences.segments = see_segments
        result = penalty_term(reward, preferences, begin, args, places)
        preferences.segments = segments
        assert math.isfinite(result[1]) == (terms[-2].size > 0)
        return result

    monkeypatch.setattr(sobirl, "numpy_policy", see_policy)
    monkeypatch.setattr(Replay, "add", see_step)
    monkeypatch.setattr(sobirl, "penalty_term", see_term)
    few = ["--outer-steps", 30, "--total-timesteps", 210, "--eval-episodes", 0, "--checkpoint-every", 1]
    given = [*SOBIRL, "--method", "pbrl", *few, "--hyper-batch-size", 50, "--env-id", env_id]
    folder = train(sobirl, tmp_path, *given)
    assert list(played.values()) == (["y"] * 15 + ["pi"] * 15) * 5
    best, rival = ([rows for rows in terms[i::2] if rows.size] for i in (0, 1))
    assert len(best) > 20 and len(rival) > 20 and (max(played) > 210) == (env_id == "Hopper-v4")
    assert {played[row] for rows in best for row in rows.flat} == {"pi"}
    assert {played[row] for rows in rival for row in rows.flat} == {"y"}
    turns = [row for row in played if played[row] == "pi" and played.get(row - 1) == "y"]
    assert {rows.min() for rows in best} & set(turns)  # from the first of them on
    saved = [torch.load(folder / name, weights_only=True)["parts"] for name in (PREVIOUS, "checkpoint.pt")]
    first, last = (parts["rival"] for parts in saved)
    assert all(not torch.equal(first[name], last[name]) for name in first)


@pytest.mark.parametrize(
    "script, env_id",
    [(sobirl, "Pendulum-v1"), (sobirl_discrete, "tests.probe_envs:ProbePole-v0")],
)
def test_ratios_are_to_the_rival_that_has_played(script, env_id, tmp_path, monkeypatch):
    """They are 1 at the first update after a query, and other ones later."""
    found = []
    query, rival_weights = Preferences.query, script.rival_weights

    def see_query(self, begin):
        found.append([])
        query(self, begin)

    def see_weights(losses, log_ratio, baseline):
        found[-1].append(float(abs(log_ratio).max()))
        return rival_weights(losses, log_ratio, baseline)

    monkeypatch.setattr(Preferences, "query", see_query)
    monkeypatch.setattr(script, "rival_weights", see_weights)
    given = [*SOBIRL, "--method", "pbrl", "--total-timesteps", 120, "--eval-episodes", 0, "--env-id", env_id]
    train(script, tmp_path, *given, "--policy-lr", 1e-2)
    assert not found[0] and len(found) == 3  # the first query's pairs are not the rival's alone
    for ratios in found[1:]:
        assert len(ratios) > 3 and ratios[0] < 1e-9 and min(ratios[1:]) > 1e-4


def test_without_segments_of_the_follower_there_is_no_penalty(tmp_path):
    """Its episodes may be too short for one: the update goes on without, whatever the memory has room for."""
    args = flags("--method", "pbrl", "--segment", 3, "--outer-steps", 10, "--query-steps", 5)
    replay = memory(tmp_path, 21)
    steps(replay, 10)
    steps(replay, 5, lengths=[1] * 15, begin=10)  # the follower's, an episode each: 10 rows
    begin = replay.written
    steps(replay, 5, begin=15)
    assert replay.first == begin - 16
    for capacity in (21, 15):  # the second time the memory begins with them
        replay.capacity = capacity
        preferences = Preferences(args, replay, None)
        reward = reward_net(obs_dim=2, action_size=1)
        term, regret = sobirl.penalty_term(reward, preferences, begin, args, None)
        assert not term.any() and math.isnan(regret)


def test_the_follower_has_to_play_a_segment(tmp_path, capsys):
    given = [*SOBIRL, "--method", "pbrl", "--runs-dir", tmp_path, "--query-steps"]
    for steps_of_rival in (20, 16):
        err = refused(sobirl, capsys, *given, steps_of_rival)
        assert "--query-steps must be at most 15" in err and "--outer-steps" in err
    assert not list(tmp_path.iterdir())


def test_sobirl_needs_the_action(tmp_path, capsys):
    err = refused(sobirl, capsys, *SOBIRL, "--reward-input", "state", "--runs-dir", tmp_path)
    assert "--reward-input must be state-action" in err
