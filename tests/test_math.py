"""The formulas of the scripts, by the scripts' own functions, in float64. Spec: the docstring of
blpo_continuous.py."""

import itertools
import math

import gymnasium as gym
import numpy as np
import pytest
import torch

import blpo_continuous as blpo
import blpo_discrete
import nystrom
import ppo_continuous as ppo
from support.acting import numpy_policy
from support.environments import RunningMeanStd
from support.run_folder import Metrics

pytestmark = pytest.mark.usefixtures("float64")

GAMMA, LAMBDA, T = 0.9, 0.8, 4


def recursion(rewards, values, next_values, terminated, done):
    """GAE as textbooks write it, backwards in time."""
    advantages, last = torch.zeros_like(rewards), torch.zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + GAMMA * (1 - terminated[:, t]) * next_values[:, t] - values[:, t]
        last = delta + GAMMA * LAMBDA * (1 - done[:, t].double()) * last
        advantages[:, t] = last
    return advantages


@pytest.mark.parametrize("script", [ppo, blpo])
def test_gae_matrix_equals_the_recursion(script):
    torch.manual_seed(0)
    rewards, obs, next_obs = torch.randn(6, 50), torch.randn(6, 50, 3), torch.randn(6, 50, 3)
    terminated = (torch.rand(6, 50) < 0.1).double()
    done = terminated.bool() | (torch.rand(6, 50) < 0.1)  # truncations
    assert (
        done[:, :-1].any(1).all() and (done & ~terminated.bool()).any()
    )  # several episodes in a window, both kinds
    cut = done.clone()
    cut[:, -1] = True
    critic = lambda obs: obs.sum(-1) ** 2
    values, next_values = script.split_values(critic(script.stacked_obs(obs, next_obs, cut)), cut)
    truth = torch.where(cut, critic(next_obs), values.roll(-1, 1))
    assert torch.allclose(values, critic(obs), atol=1e-12) and torch.allclose(next_values, truth, atol=1e-12)
    matrix = script.gae_matrix(done, GAMMA, LAMBDA)
    advantages = script.gae(rewards, values, next_values, terminated, matrix, GAMMA)
    assert torch.allclose(advantages, recursion(rewards, values, next_values, terminated, done), atol=1e-12)


def test_gae_by_hand():
    """Three steps, the first episode truncated after one, the second terminated after two."""
    done, terminated = torch.tensor([[True, False, True]]), torch.tensor([[0.0, 0.0, 1.0]])
    rewards, values, next_values = (
        torch.tensor([[1.0, 2.0, 3.0]]),
        torch.tensor([[4.0, 5.0, 6.0]]),
        torch.tensor([[7.0, 6.0, 8.0]]),
    )
    deltas = [1 + GAMMA * 7 - 4, 2 + GAMMA * 6 - 5, 3 - 6]
    expected = torch.tensor([[deltas[0], deltas[1] + GAMMA * LAMBDA * deltas[2], deltas[2]]])
    advantages = blpo.gae(
        rewards, values, next_values, terminated, blpo.gae_matrix(done, GAMMA, LAMBDA), GAMMA
    )
    assert torch.allclose(advantages, expected)


class LinearCritic(torch.nn.Module):
    """V = w . phi for features phi whose last one is the constant 1, the bias."""

    def __init__(self, w):
        super().__init__()
        self.value = torch.nn.Sequential(torch.nn.Linear(len(w) - 1, 1))
        torch.nn.utils.vector_to_parameters(w.detach().clone(), self.parameters())

    def forward(self, obs):
        return self.value(obs).squeeze(-1)


class MDP:
    """Three states, two actions, windows of T = 4 steps, enumerated.

    All probabilities are multiples of 1/4, so that a batch in which every window stands as often as its
    probability says turns the means of the training script into exact expectations. From (s, a) two next
    states are equally likely; (2, 1) terminates, after which an episode starts in state 0.
    """

    def __init__(self, seed, features=2):
        generator = torch.Generator().manual_seed(seed)
        self.pi = torch.tensor([[1, 3], [2, 2], [3, 1]])[torch.randperm(3, generator=generator)] / 4
        self.theta = self.pi.log()  # softmax logits (3, 2)
        self.phi = torch.randn(3, features, generator=generator)
        self.phi[:, -1] = 1
        self.rewards = torch.randn(3, 2, 3, generator=generator)
        targets = torch.stack([torch.randperm(3, generator=generator)[:2] for _ in range(6)]).view(3, 2, 2)
        start = torch.tensor([0, 0, 1, 2])
        # every slot of every random choice, as mixed-radix digits: the start 4, then per step the action 4
        # and the move 2
        grid = torch.tensor(list(itertools.product(range(4), *([range(8)] * T))))
        s, columns = start[grid[:, 0]], []
        for t in range(T):
            slot, move = grid[:, 1 + t] // 2, grid[:, 1 + t] % 2
            a = (slot >= (4 * self.pi[s, 0])).long()
            nxt = targets[s, a, move]
            term = (s == 2) & (a == 1)
            columns.append((s, a, nxt, term))
            s = torch.where(term, 0, nxt)
        self.s, self.a, self.next_s, self.terminated = (torch.stack(c, 1) for c in zip(*columns))
        self.cut = self.terminated.clone()
        self.cut[:, -1] = True
        self.r = self.rewards[self.s, self.a, self.next_s]
        self.old_critic = LinearCritic(torch.randn(features, generator=generator))
        self.batch = self.make_batch()

    def log_prob(self, theta):
        return torch.log_softmax(theta, 1)[self.s, self.a]

    def advantages(self, critic):
        obs = blpo.stacked_obs(self.phi[self.s, :-1], self.phi[self.next_s, :-1], self.cut)
        values, next_values = blpo.split_values(critic(obs), self.cut)
        matrix = blpo.gae_matrix(self.terminated, GAMMA, LAMBDA)
        return values, blpo.gae(self.r, values, next_values, self.terminated.double(), matrix, GAMMA)

    def make_batch(self):
        with torch.no_grad():
            values, advantages = self.advantages(self.old_critic)
            matrix = blpo.gae_matrix(self.terminated, GAMMA, LAMBDA)
            obs, next_obs = self.phi[self.s, :-1], self.phi[self.next_s, :-1]
            return blpo.Batch(
                obs=obs,
                actions=self.a,
                logprobs=self.log_prob(self.theta),
                old_advantages=advantages,
                returns=advantages + values,
                next_obs=next_obs,
                rewards=self.r,
                terminated=self.terminated.double(),
                cut=self.cut,
                Gamma=matrix,
            )

    def best_response(self, theta, rho=0.0, center=None):
        """argmin_w sum_t E[(E_theta[R_t | s_t] - w.phi(s_t))^2] / T + rho/2 ||w - center||^2, at the states
        visited."""
        phi, ratio = self.phi[self.s], (self.log_prob(theta) - self.log_prob(self.theta)).exp()
        future = ratio.flip(1).cumprod(1).flip(1)  # product of the ratios from t on
        H = 2 * torch.einsum("nti,ntj->ij", phi, phi) / self.s.numel()
        b = 2 * torch.einsum("nti,nt->i", phi, future * self.batch.returns) / self.s.numel()
        if center is not None:
            b = b + rho * center
        return torch.linalg.solve(H + rho * torch.eye(len(H)), b), H

    def leader(self, theta, w):
        """f(theta, omega) with the lambda-return in the advantage's place, as a surrogate around
        self.theta."""
        values, advantages = self.advantages(LinearCritic(w))
        ratio = (self.log_prob(theta) - self.log_prob(self.theta)).exp()
        return -(ratio * (advantages + values)).mean().detach()

    def hypergradient(self, critic, args, theta=None):
        """grad_theta f, implicit term and their sum, by the functions of the training loop in its order."""
        theta = (self.theta if theta is None else theta).clone().requires_grad_()
        mb = self.batch
        J = blpo.Jacobian(critic.value, blpo.stacked_obs(mb.obs, mb.next_obs, mb.cut))
        values, advantages = self.advantages(critic)
        values, advantages = values.detach(), advantages.detach()
        ratio = (self.log_prob(theta) - mb.logprobs).exp()
        loss = blpo.policy_loss(ratio, advantages, args.clip_coef)
        direct = torch.autograd.grad(loss, theta, retain_graph=True)[0].flatten()
        weights = sign = advantages
        if args.hypergradient != "control":
            v = blpo.leader_gradient(J, mb, ratio, args)
            x, _ = blpo.solve_ihvp(blpo.curvature(critic, mb, J, args), v, args, torch.Generator())
            weights = blpo.implicit_weights(J @ x, values, advantages, mb, args)
            sign = weights if args.hypergradient == "exact" else advantages
        implicit = torch.autograd.grad(blpo.implicit_loss(ratio, weights, sign, args.implicit_clip), theta)[0]
        h, _ = blpo.add_bounded(direct, implicit.flatten(), args.implicit_bound)
        return direct, h - direct, h


def exact_args(mdp, **changes):
    """The whole Hessian (rank p) and no bound or clip on the implicit term: the hypergradient as it is
    defined."""
    flags = dict(gamma=GAMMA, gae_lambda=LAMBDA, nystrom_rank=mdp.phi.shape[1], nystrom_sketch="columns")
    return blpo.Args(**(flags | dict(implicit_bound=math.inf, implicit_clip=math.inf) | changes))


@pytest.mark.parametrize("rho", [1e-5, 1.0, 50.0])
@pytest.mark.parametrize("seed", range(5))
def test_hypergradient_equals_finite_differences_with_visits_held_fixed(seed, rho):
    """d/dtheta f(theta, omega*(theta)), sign included, where theta moves the returns but not which states are
    visited; rho > 0 is the damped best response argmin g + rho/2 ||. - omega||^2."""
    mdp = MDP(seed)
    w, _ = mdp.best_response(mdp.theta)
    _, implicit, h = mdp.hypergradient(LinearCritic(w), exact_args(mdp, nystrom_rho=rho))
    step, total, partial = 1e-4, torch.zeros(6), torch.zeros(6)
    for i in range(6):
        bump = step * torch.eye(6)[i].view(3, 2)
        # fourth-order central differences: error O(step^4)
        for scale, weight in ((1, 8), (-1, -8), (2, -1), (-2, 1)):
            theta = mdp.theta + scale * bump
            total[i] += weight * mdp.leader(theta, mdp.best_response(theta, rho, w)[0]) / (12 * step)
            partial[i] += weight * mdp.leader(theta, w) / (12 * step)
    assert (h - total).norm() <= 1e-8
    assert (implicit - (total - partial)).norm() <= 1e-8
    if rho < 1:  # the test would see a wrong sign or a missing term
        assert implicit.norm() > 1e-2 and (h - 2 * implicit - total).norm() > 1e-2


@pytest.mark.parametrize("seed", range(5))
def test_every_solver_gives_the_same_hypergradient(seed):
    mdp = MDP(seed)
    critic = LinearCritic(mdp.best_response(mdp.theta)[0])
    rho = 1.0  # so that x is far from v / rho
    reference = mdp.hypergradient(critic, exact_args(mdp, nystrom_rho=rho))[1]

    def error(**flags):
        implicit = mdp.hypergradient(critic, exact_args(mdp, nystrom_rho=rho, **flags))[1]
        return (implicit - reference).norm() / reference.norm()

    assert error(nystrom_rank=0) > 0.5
    assert error(hessian="full") < 2e-3
    for ihvp in ("cg", "pcg"):
        assert error(ihvp=ihvp) < 2e-3
    for sketch in ("gaussian", "v-gaussian", "krylov"):
        assert error(nystrom_sketch=sketch) < 2e-3


def test_jacobian_equals_autograd_on_a_deep_critic():
    """J u, J^T s and (2/B) J^T J u, and the whole Hessian that the last one leaves the second derivatives out
    of."""
    torch.manual_seed(0)
    critic = blpo.Critic(3)
    params, obs = list(critic.parameters()), torch.randn(7, 3)
    dense = torch.stack([blpo.flat(torch.autograd.grad(value, params)) for value in map(critic, obs)])
    J = blpo.Jacobian(critic.value, obs)
    u, s = torch.randn(dense.shape[1]), torch.randn(7)
    assert (
        torch.allclose(J.values, critic(obs))
        and torch.allclose(J @ u, dense @ u)
        and torch.allclose(J.transposed(s), dense.T @ s)
    )

    returns = torch.randn(2, 3)
    mb = blpo.Batch(*[torch.zeros(2, 3)] * 10)._replace(obs=obs[:6].view(2, 3, 3), returns=returns)
    shapes = [p.shape for p in params]

    def loss(w):
        parts = w.split([shape.numel() for shape in shapes])
        named = {name: part.view(p.shape) for (name, p), part in zip(critic.named_parameters(), parts)}
        return ((returns - torch.func.functional_call(critic, named, (mb.obs,))) ** 2).mean()

    H = torch.func.hessian(loss)(blpo.flat(params).detach())
    gauss_newton = 2 / 6 * dense[:6].T @ dense[:6]  # the seventh stands for a true next observation
    for hessian, truth in (("full", H), ("gauss-newton", gauss_newton)):
        product = blpo.curvature(critic, mb, J, blpo.Args(hessian=hessian))
        assert torch.allclose(product(u), truth @ u) and torch.allclose(product(dense.T), truth @ dense.T)
    assert not torch.allclose(H, gauss_newton, rtol=1e-2)


def converged(seed):
    """A critic with a value for each state, as offsets from the third one's, at the fixed point of its own
    lambda-returns."""
    mdp = MDP(seed, features=3)
    mdp.phi, mdp.old_critic = torch.tensor([[1.0, 0, 1], [0, 1, 1], [0, 0, 1]]), LinearCritic(torch.zeros(3))
    for _ in range(60):
        mdp.batch = mdp.make_batch()
        mdp.old_critic = LinearCritic(mdp.best_response(mdp.theta)[0])
    return mdp, mdp.old_critic


@pytest.mark.parametrize("seed", range(13))
def test_which_leader(seed, monkeypatch):
    """The return as the leader makes the hypergradient agree with the policy gradient; f with its own
    baseline opposes it."""
    mdp, critic = converged(seed)
    args = exact_args(mdp, nystrom_rho=1e-3)
    direct, _, h = mdp.hypergradient(critic, args)
    assert torch.cosine_similarity(h, direct, dim=0) > 0.98

    def solve_for_f(product, v, args, generator):
        _, advantages = mdp.advantages(critic)
        v = blpo.flat(torch.autograd.grad(-advantages.mean(), list(critic.parameters())))
        return solve(product, v, args, generator)

    solve = blpo.solve_ihvp
    monkeypatch.setattr(blpo, "solve_ihvp", solve_for_f)
    assert torch.cosine_similarity(mdp.hypergradient(critic, args)[1], direct, dim=0) < -0.9


@pytest.mark.parametrize("seed", range(13))
def test_released_mode_equals_literal_double_differentiation_of_L2(seed):
    mdp = MDP(seed)
    critic = LinearCritic(mdp.best_response(mdp.theta)[0] + 0.3)
    args = exact_args(mdp, hypergradient="released", nystrom_rho=0.7, implicit_clip=0.5)
    moved = mdp.theta + 1.5 * torch.randn(
        3, 2, generator=torch.Generator().manual_seed(seed)
    )  # where clips are active
    _, implicit, _ = mdp.hypergradient(critic, args, moved)

    w = blpo.flat(critic.parameters()).detach().requires_grad_()
    theta = moved.clone().requires_grad_()
    ratio = (mdp.log_prob(theta) - mdp.batch.logprobs).exp()
    assert ratio.min() < 0.5 or ratio.max() > 1.5

    def advantages_and_values(w):
        obs, next_obs = mdp.phi[mdp.s] @ w, mdp.phi[mdp.next_s] @ w
        next_values = torch.where(mdp.cut, next_obs, obs.roll(-1, 1))
        delta = mdp.r + GAMMA * (1 - mdp.batch.terminated) * next_values - obs
        return torch.einsum("ntk,nk->nt", mdp.batch.Gamma, delta), obs

    A, V = advantages_and_values(w)
    f = -torch.min(ratio * A, ratio.clamp(0.8, 1.2) * A).mean()
    v = torch.autograd.grad(f, w, retain_graph=True)[0]
    H = torch.func.hessian(lambda w: ((mdp.batch.returns - mdp.phi[mdp.s] @ w) ** 2).mean())(w.detach())
    x = torch.linalg.solve(H + 0.7 * torch.eye(2), v)
    # a sum over the trajectory, the mean over the minibatch's trajectories
    L2 = (-2 * torch.min(ratio * A, ratio.clamp(0.5, 1.5) * A) * (mdp.batch.returns - V)).sum(1).mean()
    gradient = torch.autograd.grad(L2, theta, create_graph=True)[0].flatten()
    term = torch.stack(
        [torch.autograd.grad(g, w, retain_graph=True)[0] @ x for g in gradient]
    )  # d/d eps grad L2(w + eps x)
    assert torch.allclose(implicit, -term, atol=1e-6)


@pytest.mark.parametrize("rho", [1e-3, 50.0])
@pytest.mark.parametrize("seed", range(13))
def test_released_sign_is_the_reverse_of_the_exact_one(seed, rho, monkeypatch):
    """For the x of the exact mode, what `released` adds to grad f points against what `exact` adds."""
    mdp, critic = converged(seed)
    solve, solutions = blpo.solve_ihvp, []
    monkeypatch.setattr(blpo, "solve_ihvp", lambda *inputs: solutions.append(solve(*inputs)) or solutions[0])
    direct, exact, _ = mdp.hypergradient(critic, exact_args(mdp, nystrom_rho=rho))
    released = mdp.hypergradient(critic, exact_args(mdp, nystrom_rho=rho, hypergradient="released"))[1]
    assert torch.cosine_similarity(exact, released, dim=0) < -0.9
    # with its own v, baseline included, the sign is reversed twice: it pushes along the policy gradient again
    monkeypatch.setattr(blpo, "solve_ihvp", solve)
    released = mdp.hypergradient(critic, exact_args(mdp, nystrom_rho=rho, hypergradient="released"))[1]
    assert torch.cosine_similarity(direct, released, dim=0) > 0.5


def test_control_is_an_unnormalised_policy_gradient():
    mdp = MDP(0)
    critic = LinearCritic(mdp.best_response(mdp.theta)[0])
    direct, implicit, _ = mdp.hypergradient(critic, exact_args(mdp, hypergradient="control"))
    assert torch.allclose(implicit, direct, atol=1e-12)


def test_gate_of_the_implicit_loss_is_that_of_the_clipped_surrogate():
    ratio = torch.linspace(0.2, 2.0, 40, requires_grad=True)
    weights = torch.randn(40, generator=torch.Generator().manual_seed(0))
    ours = torch.autograd.grad(blpo.implicit_loss(ratio, weights, weights, 0.5), ratio)[0]
    clipped = torch.autograd.grad(blpo.policy_loss(ratio, weights, 0.5), ratio)[0]
    assert torch.allclose(ours, clipped)
    assert (ours == 0).any()


def test_policy_and_value_losses_by_hand():
    ratio, advantages = torch.tensor([1.5, 0.5, 1.5, 0.5]), torch.tensor([1.0, 1.0, -1.0, -1.0])
    for script in (ppo, blpo):
        assert float(script.policy_loss(ratio, advantages, 0.2)) == pytest.approx(
            -(1.2 + 0.5 - 1.5 - 0.8) / 4
        )
        assert script.standardized(torch.tensor([1.0, 2.0, 6.0])).tolist() == pytest.approx(
            [-2 / 7**0.5, -1 / 7**0.5, 3 / 7**0.5]
        )
        assert float(script.critic_loss(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 1.0]))) == pytest.approx(
            2.5
        )
    values, old, returns = torch.tensor([1.0, 0.1]), torch.tensor([0.0, 0.0]), torch.tensor([1.0, 1.0])
    mb = ppo.Batch(obs=None, actions=None, logprobs=None, old_advantages=returns - old, returns=returns)
    clipped = (0.8**2 + 0.9**2) / 2  # the first value is held near its old one, where its error is larger
    assert float(ppo.value_loss(values, mb, ppo.Args(vf_coef=3.0))) == pytest.approx(3 * clipped / 2)
    plain = (0**2 + 0.9**2) / 2
    assert float(ppo.value_loss(values, mb, ppo.Args(vf_coef=3.0, clip_vloss=False))) == pytest.approx(
        3 * plain / 2
    )


def test_categorical_log_prob_entropy_and_samples(float64):
    actor = blpo_discrete.Actor(5, 3, hidden=16)
    torch.nn.init.normal_(actor.net[-1].weight)
    obs, actions = torch.randn(4, 7, 5), torch.randint(3, (4, 7))
    categorical = torch.distributions.Categorical(logits=actor.net(obs))
    assert torch.allclose(actor.log_prob(obs, actions), categorical.log_prob(actions))
    assert torch.allclose(actor.entropy(obs), categorical.entropy().mean())
    # the Gumbel-max trick: frequencies of 200,000 samples are the probabilities, to five standard errors
    logits = actor.net(obs[0, 0]).detach()
    samples = actor.act(logits.numpy(), actor.noise(200_000, generator=torch.Generator().manual_seed(1)))
    chances = logits.softmax(-1).numpy()
    off = np.bincount(samples, minlength=3) / len(samples) - chances
    assert (np.abs(off) < 5 * np.sqrt(chances * (1 - chances) / len(samples))).all()
    assert actor.act(logits.numpy(), 0.0) == int(logits.argmax())
    assert actor.for_env(np.array([0, 2]), gym.spaces.Discrete(3, start=-1)) == [-1, 1]


@pytest.mark.parametrize("script", [blpo, ppo])
def test_numpy_policy_is_the_actor(script, float64):
    actor = script.Actor(5, 3, hidden=16)
    script.FlatAdam(actor, lr=1e-3, max_norm=1.0)
    x, policy = torch.randn(7, 5), numpy_policy(actor.net)
    assert np.allclose(policy(x.numpy()), actor.net(x).detach().numpy(), rtol=1e-12, atol=1e-14)
    assert np.allclose(policy(x[0].numpy()), actor.net(x[0]).detach().numpy(), rtol=1e-12, atol=1e-14)


def test_gaussian_log_prob_and_entropy():
    actor = blpo.Actor(3, 2)
    torch.nn.init.normal_(actor.log_std)
    obs, actions = torch.randn(5, 4, 3), torch.randn(5, 4, 2)
    normal = torch.distributions.Normal(actor.net(obs), actor.log_std.exp())
    assert torch.allclose(actor.log_prob(obs, actions), normal.log_prob(actions).sum(-1))
    assert torch.allclose(actor.entropy(obs), normal.entropy()[0, 0].sum())


def test_add_bounded():
    direct, implicit = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 20.0])
    total, info = blpo.add_bounded(direct, implicit, 0.5)
    assert torch.allclose(total, torch.tensor([3.0, 6.5]))
    assert info["implicit_norm_ratio"] == 4 and info["implicit_bound_active"] == 1
    assert info["implicit_cosine"] == pytest.approx(0.8)
    assert torch.equal(blpo.add_bounded(direct, implicit, math.inf)[0], direct + implicit)
    assert torch.equal(blpo.add_bounded(0 * direct, implicit, math.inf)[0], implicit)
    assert torch.equal(blpo.add_bounded(direct, implicit, 0.0)[0], direct)
    for bad in (math.nan, math.inf):
        total, info = blpo.add_bounded(direct, torch.tensor([1.0, bad]), 1.0)
        assert torch.equal(total, direct) and info["implicit_dropped"] == 1


def test_non_finite_critic_drops_the_term_and_non_finite_gradients_are_refused():
    mdp = MDP(0)
    critic = LinearCritic(mdp.best_response(mdp.theta)[0])
    for ihvp in ("nystrom", "cg", "pcg"):
        x, correction = blpo.solve_ihvp(
            lambda u: 2 * u, torch.tensor([1.0, math.nan]), exact_args(mdp, ihvp=ihvp), None
        )
        assert x.isnan().all() and math.isnan(correction)
    with pytest.raises(ValueError, match="rank"):  # a mistake is not a number that is not finite
        blpo.solve_ihvp(lambda u: 2 * u, torch.ones(2), exact_args(mdp, nystrom_rank=3), None)
    with pytest.raises(ValueError, match="method"):
        nystrom.solve("lu", lambda u: 2 * u, torch.ones(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blpo, "solve_ihvp", lambda product, v, *_: (v * math.nan, math.nan))
        direct, implicit, h = mdp.hypergradient(critic, exact_args(mdp))
    assert torch.isfinite(h).all() and torch.equal(h, direct)
    layer = torch.nn.Linear(1, 1)
    optimizer = blpo.FlatAdam(layer, lr=0.1, max_norm=0.5)
    before = optimizer.vector.detach().clone()
    for bad in (math.nan, math.inf):
        optimizer.step(torch.tensor([1.0, bad]))
        assert optimizer.skipped and torch.equal(optimizer.vector.detach(), before)
    optimizer.step(torch.tensor([1.0, 0.0]))
    assert not optimizer.skipped and float(layer.weight.detach()) < float(before[0])


@pytest.mark.parametrize("script", [ppo, blpo])
def test_one_flat_parameter_trains_like_many(script):
    """FlatAdam against torch's own clipping and Adam, parameter by parameter."""
    torch.manual_seed(0)
    ours, theirs = script.Critic(3), script.Critic(3)
    theirs.load_state_dict(ours.state_dict())
    start = script.flat(ours.parameters()).detach()
    optimizer = script.FlatAdam(ours, lr=1e-2, max_norm=0.5)
    reference = torch.optim.Adam(theirs.parameters(), lr=1e-2, eps=1e-5)
    small = 0
    for i in range(20):
        obs, returns = torch.randn(5, 3), 3 * torch.randn(5)
        loss = script.critic_loss(ours(obs), returns) * (1e-3 if i % 2 else 1)
        gradient = script.flat_grad(loss, ours)
        small += float(gradient.norm()) < 0.5
        optimizer.step(gradient)
        reference.zero_grad()
        (script.critic_loss(theirs(obs), returns) * (1e-3 if i % 2 else 1)).backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        reference.step()
    for a, b in zip(ours.parameters(), theirs.parameters()):
        assert torch.allclose(a, b, atol=1e-9)
    assert 5 <= small <= 15  # both kinds: shorter gradients stay as they are
    assert not torch.allclose(start, script.flat(ours.parameters()), atol=0.1)


def test_metrics_are_means_of_what_is_finite():
    metrics = Metrics()
    metrics.add(loss=torch.tensor(1.0, requires_grad=True), share=True, none=math.nan)
    metrics.add(loss=4.0, share=False, none=math.inf)
    metrics.add(loss=math.nan)
    means = metrics.means()
    assert means["loss"] == 2.5 and means["share"] == 0.5 and math.isnan(means["none"])


def test_running_mean_std_equals_numpy():
    data = np.random.default_rng(0).normal(3, 2, (90, 4))
    rms = RunningMeanStd(4)
    for part in np.split(data, [8, 9, 50]):
        rms.update(part)
    assert np.allclose(rms.mean, data.mean(0), atol=1e-4) and np.allclose(rms.var, data.var(0), rtol=1e-4)
    assert np.abs(rms.normalize(1e6 * data)).max() == 10


def test_converged_training_satisfies_the_stackelberg_conditions():
    """Gradient descent on h with a best-responding linear critic and an entropy bonus (for an interior
    optimum): at the end the total derivative vanishes and the follower's Hessian is positive definite, the
    necessary conditions of a local strong Stackelberg equilibrium. On-policy batches are drawn with
    replacement from the enumerated windows."""
    generator = torch.Generator().manual_seed(0)
    mdp = MDP(1, features=2)
    everything, start = mdp.__dict__.copy(), mdp.theta.clone()
    args, tau = exact_args(mdp, nystrom_rho=1e-3), 0.3
    norms = []
    for iteration in range(300):
        theta = mdp.theta
        mdp.__dict__.update(everything)
        weight = (mdp.log_prob(theta) - mdp.log_prob(start)).sum(1).exp()
        rows = torch.multinomial(
            weight, 60_000 if iteration in (0, 299) else 4_000, True, generator=generator
        )
        for name in ("s", "a", "next_s", "terminated", "cut", "r"):
            setattr(mdp, name, everything[name][rows])
        mdp.theta = theta
        mdp.batch = mdp.make_batch()
        w, H = mdp.best_response(mdp.theta)
        mdp.old_critic = everything["old_critic"] = LinearCritic(w)
        _, _, h = mdp.hypergradient(mdp.old_critic, args)
        logits = theta.clone().requires_grad_()
        p = torch.log_softmax(logits, 1)
        visits = torch.bincount(mdp.s.flatten(), minlength=3) / mdp.s.numel()
        entropy = -(visits[:, None] * p.exp() * p).sum()
        total = h.view(3, 2) - tau * torch.autograd.grad(entropy, logits)[0]
        norms.append(float(total.norm()))
        if iteration < 299:
            mdp.theta = theta - 1.0 * total
    assert norms[-1] < 0.02 < 0.1 < norms[0]
    assert torch.linalg.eigvalsh(H)[0] > 1e-3
    assert (
        torch.softmax(mdp.theta, 1).min() > 1e-3
    )  # interior, so that the vanishing gradient means something
