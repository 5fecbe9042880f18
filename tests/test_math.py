"""The formulas of the scripts, by the scripts' own functions, in float64. Spec: the docstring of
blpo_continuous.py."""

import copy
import functools
import itertools
import math
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch

import blpo_continuous as blpo
import blpo_discrete
import jacobian
import nystrom
import ppo_continuous as ppo
import ppo_discrete
from jacobian import MLPJacobian, ModuleJacobian, RectifiedJacobian, jacobian_of
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
    assert done[:, :-1].any(1).all() and (done & ~terminated.bool()).any()  # of both kinds, within windows
    cut = done.clone()
    cut[:, -1] = True

    def critic(obs):
        return obs.sum(-1) ** 2

    all_obs, next_rows = script.with_next(obs.flatten(0, 1), next_obs.flatten(0, 1), cut.flatten())
    assert len(all_obs) == 300 + int(cut.sum())
    stacked = critic(all_obs)
    values, next_values = critic(obs), torch.where(cut, critic(next_obs), critic(obs).roll(-1, 1))
    assert torch.equal(stacked[:300], values.flatten()) and torch.equal(
        stacked[next_rows], next_values.flatten()
    )
    matrix = script.gae_matrix(done.numpy(), GAMMA, LAMBDA, np.float64)
    discounts = GAMMA * (1 - terminated.flatten())
    steps = script.Transitions(rewards.flatten(), discounts, torch.as_tensor(matrix), all_obs, next_rows)
    expected = recursion(rewards, values, next_values, terminated, done).flatten()
    assert torch.allclose(script.gae(steps, stacked), expected, atol=1e-12)
    arrays = script.Transitions(*(x.numpy() for x in steps))
    assert np.allclose(script.gae(arrays, stacked.numpy()), expected, atol=1e-12)


def test_gae_by_hand():
    """Three steps, the first episode truncated after one, the second terminated after two."""
    done = np.array([[True, False, True]])
    discounts = np.array([GAMMA, GAMMA, 0.0])
    rewards, values = np.array([1.0, 2.0, 3.0]), np.array([4.0, 5.0, 6.0, 7.0, 8.0])
    deltas = [1 + GAMMA * 7 - 4, 2 + GAMMA * 6 - 5, 3 - 6]
    expected = [deltas[0], deltas[1] + GAMMA * LAMBDA * deltas[2], deltas[2]]
    matrix = blpo.gae_matrix(done, GAMMA, LAMBDA, np.float64)
    steps = blpo.Transitions(rewards, discounts, matrix, all_obs=None, next_rows=np.array([3, 2, 4]))
    assert np.allclose(blpo.gae(steps, values), expected)


class TabularActor(NamedTuple):
    """Stands for the scripts' Actor where only log-probabilities are asked for."""

    log_prob: np.ndarray  # (B,)

    def policy(self, obs, actions):
        return self


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
        self.make_batch()

    def log_prob(self, theta):
        return torch.log_softmax(theta, 1)[self.s, self.a]

    def steps(self):
        """The enumerated windows as Transitions of tensors."""
        obs, next_obs = self.phi[self.s, :-1].flatten(0, 1), self.phi[self.next_s, :-1].flatten(0, 1)
        discounts = GAMMA * (1 - self.terminated.flatten().double())
        Gamma = torch.as_tensor(blpo.gae_matrix(self.terminated.numpy(), GAMMA, LAMBDA, np.float64))
        rows = blpo.with_next(obs, next_obs, self.cut.flatten())
        return blpo.Transitions(self.r.flatten(), discounts, Gamma, *rows)

    def advantages(self, critic):
        """V and A, both (windows, T), differentiable in the critic."""
        steps = self.steps()
        values = critic(steps.all_obs)
        return values[: self.r.numel()].view_as(self.r), blpo.gae(steps, values).view_as(self.r)

    def make_batch(self):
        """batch and transitions, of NumPy's arrays, as in the scripts."""
        steps = self.steps()
        self.transitions = blpo.Transitions(*(x.numpy() for x in steps))
        with torch.no_grad():
            values, advantages = self.advantages(self.old_critic)
            self.batch = blpo.Batch(
                obs=steps.all_obs[: self.r.numel()].numpy(),
                actions=self.a.numpy(),
                logprobs=self.log_prob(self.theta).flatten().numpy(),
                advantages=advantages.flatten().numpy(),
                returns=(advantages + values).flatten().numpy(),
                weights=np.zeros(self.r.numel()),
            )

    def best_response(self, theta, rho=0.0, center=None):
        """argmin_w sum_t E[(E_theta[R_t | s_t] - w.phi(s_t))^2] / T + rho/2 ||w - center||^2, at the states
        visited."""
        phi, ratio = self.phi[self.s], (self.log_prob(theta) - self.log_prob(self.theta)).exp()
        future = ratio.flip(1).cumprod(1).flip(1)  # product of the ratios from t on
        H = 2 * torch.einsum("nti,ntj->ij", phi, phi) / self.s.numel()
        returns = torch.as_tensor(self.batch.returns).view_as(future)
        b = 2 * torch.einsum("nti,nt->i", phi, future * returns) / self.s.numel()
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
        log_prob = self.log_prob(theta).flatten()

        def gradient(e):  # of sum_k e_k log pi, as Policy.gradient
            return (
                torch.autograd.grad(torch.as_tensor(e) @ log_prob, theta, retain_graph=True)[0]
                .flatten()
                .numpy()
            )

        batch, transitions = self.batch, self.transitions
        J = jacobian_of(critic.value)(transitions.all_obs)
        advantages = blpo.gae(transitions, J.outputs[:, 0])
        ratio = np.exp(log_prob.detach().numpy() - batch.logprobs)
        direct = gradient(blpo.policy_loss(ratio, advantages, args.clip_coef)[1])
        actor = TabularActor(log_prob.detach().numpy())
        v = blpo.leader_gradient(J, advantages, batch, transitions, actor, args)
        x, _ = blpo.solve_ihvp(blpo.curvature(critic, batch, J, args), v, args, torch.Generator())
        weights = blpo.implicit_weights(J, x, advantages, batch, transitions, args)
        batch = batch._replace(advantages=advantages, weights=weights)
        implicit = gradient(blpo.implicit_derivative(ratio, batch, args))
        h, _ = blpo.add_bounded(direct, implicit, args.implicit_bound)
        return tuple(map(torch.as_tensor, (direct, h - direct, h)))


def exact_args(mdp, **changes):
    """The whole Hessian (rank p) and no bound or clip on the implicit term: the hypergradient as it is
    defined."""
    flags = dict(
        gamma=GAMMA, gae_lambda=LAMBDA, num_steps=T, nystrom_rank=mdp.phi.shape[1], nystrom_sketch="columns"
    )
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


def derivative_with_visits(mdp, rho):
    """d/dtheta f(theta, omega*(theta)), where the leader's and the critic's means are over the states that
    theta visits in windows whose first states stay; by autograd."""
    theta = mdp.theta.clone().requires_grad_()
    ratio = (mdp.log_prob(theta) - mdp.log_prob(mdp.theta)).exp()
    past = torch.cat([torch.ones(len(ratio), 1), ratio[:, :-1].cumprod(1)], 1)  # of the state, (windows, T)
    future = ratio.flip(1).cumprod(1).flip(1)  # of the return from it
    phi, returns = mdp.phi[mdp.s], torch.as_tensor(mdp.batch.returns).view_as(ratio)
    center = mdp.best_response(mdp.theta)[0]
    H = 2 * torch.einsum("nt,nti,ntj->ij", past, phi, phi) / past.numel()
    b = 2 * torch.einsum("nt,nti->i", past * future * returns, phi) / past.numel()
    omega = torch.linalg.solve(H + rho * torch.eye(len(H)), b + rho * center)
    steps = mdp.steps()
    values = torch.nn.functional.pad(steps.all_obs, (0, 1), value=1.0) @ omega
    lambda_returns = (blpo.gae(steps, values) + values[: past.numel()]).view_as(past)
    return torch.autograd.grad(-(past * ratio * lambda_returns).mean(), theta)[0].flatten()


def test_how_far_the_hypergradient_is_off_where_visits_move():
    """What docs/hypergradient.md says of it: errors and cosines on thirteen MDPs."""
    errors, cosines = [], []
    for seed in range(13):
        mdp = MDP(seed)
        critic = LinearCritic(mdp.best_response(mdp.theta)[0])
        h = mdp.hypergradient(critic, exact_args(mdp, nystrom_rho=1e-5))[2]
        total = derivative_with_visits(mdp, 1e-5)
        errors.append(float((h - total).norm() / total.norm()))
        cosines.append(float(torch.cosine_similarity(h, total, dim=0)))
    path = Path(__file__).parent.parent / "docs" / "hypergradient.md"
    page = " ".join(path.read_text(encoding="utf-8").split())
    cosines.sort()
    said = f"by {100 * min(errors):.0f} to {100 * max(errors):.0f} %"
    assert f"{said} on thirteen" in page
    assert f"the cosine between the two is {cosines[0]:.2f} on one of them" in page
    assert f"and {cosines[1]:.2f} or more on the others" in page


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


def flat(tensors):
    return torch.cat([x.detach().flatten() for x in tensors])


def as_numpy(x):
    return x.numpy()


@pytest.mark.parametrize("kind", [as_numpy, torch.as_tensor], ids=["numpy", "torch"])
@pytest.mark.parametrize(
    "made, activation",
    [
        (MLPJacobian, torch.nn.Tanh),
        (RectifiedJacobian, torch.nn.ReLU),
        (ModuleJacobian, torch.nn.Tanh),
        (ModuleJacobian, torch.nn.ReLU),
    ],
)
@pytest.mark.parametrize("sizes", [(3, 1), (3, 1, 1), (3, 5, 4, 1), (2, 4, 3), (3, 6, 5, 4, 2)])
def test_jacobian_products_equal_autograd(sizes, made, activation, kind):
    """J u, s J and the gradient by inputs, of networks of any depth, width and number of outputs, by hand and
    by torch.func."""
    torch.manual_seed(0)
    layers = [layer for m, n in zip(sizes, sizes[1:]) for layer in (torch.nn.Linear(m, n), activation())]
    net = torch.nn.Sequential(*layers[:-1])
    x = torch.randn(7, sizes[0], requires_grad=True)
    outputs = net(x)
    dense = torch.stack(
        [flat(torch.autograd.grad(y, net.parameters(), retain_graph=True)) for y in outputs.flatten()]
    )
    s = torch.randn(7, sizes[-1])
    (by_input,) = torch.autograd.grad(outputs, x, s, retain_graph=True)
    x = x.detach()
    if made is not ModuleJacobian:
        if len(sizes) > 2:
            assert type(jacobian_of(net)(x.numpy())) is made
            assert np.allclose(numpy_policy(net)(x.numpy()), outputs.detach(), rtol=1e-12, atol=1e-14)
        net = [(kind(layer.weight.detach()), kind(layer.bias.detach())) for layer in net[::2]]
    J = made(net, kind(x))
    u = torch.randn(dense.shape[1])
    assert torch.allclose(torch.as_tensor(J.outputs), outputs, rtol=1e-12, atol=1e-12)
    along_u, gradient = J @ kind(u), kind(s) @ J
    assert isinstance(along_u, type(kind(u))) and isinstance(gradient, type(kind(u)))
    assert torch.allclose(torch.as_tensor(along_u).flatten(), dense @ u, rtol=1e-12, atol=1e-12)
    assert torch.allclose(torch.as_tensor(gradient), s.flatten() @ dense, rtol=1e-12, atol=1e-12)
    found = J.by_input(kind(s))
    assert isinstance(found, type(kind(s)))
    assert torch.allclose(torch.as_tensor(found), by_input, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("activation", [torch.nn.Tanh, torch.nn.ReLU])
def test_large_networks_are_multiplied_by_torch(activation, outputs, monkeypatch):
    """The same products, of NumPy's arrays and as NumPy's arrays; a short side leaves a product to NumPy."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        *(torch.nn.Linear(3, 128), activation(), torch.nn.Linear(128, 130), activation()),
        torch.nn.Linear(130, outputs),
    )
    multiplied, torch_mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b: multiplied.append((*a.shape, *b.shape)) or torch_mm(a, b))
    for rows, torch_products in ((128, 5 if outputs == 1 else 6), (127, 0)):
        x, s = torch.randn(rows, 3).numpy(), torch.randn(rows, outputs).numpy()
        u = torch.randn(128 * 4 + 130 * 129 + outputs * 131).numpy()
        multiplied.clear()
        J, expected = jacobian_of(net)(x), ModuleJacobian(net, x)
        found = J.outputs, J @ u, s @ J, J.by_input(s)
        assert len(multiplied) == torch_products and all(min(shape) >= 128 for shape in multiplied)
        for ours, other in zip(found, (expected.outputs, expected @ u, s @ expected, expected.by_input(s))):
            assert isinstance(ours, np.ndarray) and np.allclose(ours, other, rtol=1e-12, atol=1e-12)


def test_other_networks_are_differentiated_and_act_by_torch():
    for net in (
        torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ELU(), torch.nn.Linear(4, 1)),
        torch.nn.Sequential(
            torch.nn.Linear(3, 4),
            torch.nn.ReLU(),
            torch.nn.Linear(4, 4),
            torch.nn.Tanh(),
            torch.nn.Linear(4, 1),
        ),
        torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1, bias=False)),
        torch.nn.Linear(3, 1),
    ):
        x = torch.randn(5, 3)
        J = jacobian_of(net)(x.numpy())
        assert isinstance(J, ModuleJacobian)
        assert np.allclose(numpy_policy(net)(x.numpy()), net(x).detach(), rtol=1e-12, atol=1e-14)
        s = np.ones((5, 1))
        expected = flat(torch.autograd.grad(net(x).sum(), net.parameters()))
        assert np.allclose(s @ J, expected, rtol=1e-12, atol=1e-12)


def test_curvature_is_the_hessian_or_its_gauss_newton_part():
    torch.manual_seed(0)
    critic = blpo.Critic(3, hidden=5)
    params, obs, returns = list(critic.parameters()), torch.randn(7, 3), torch.randn(6)
    dense = torch.stack([flat(torch.autograd.grad(value, params)) for value in map(critic, obs)])
    J = critic.jacobian(obs.numpy())
    batch = blpo.Batch(*[None] * 6)._replace(obs=obs[:6].numpy(), returns=returns.numpy())
    sizes = [p.numel() for p in params]

    def loss(w):
        parts = w.split(sizes)
        named = {name: part.view(p.shape) for (name, p), part in zip(critic.named_parameters(), parts)}
        return ((returns - torch.func.functional_call(critic, named, (obs[:6],))) ** 2).mean()

    H = torch.func.hessian(loss)(flat(params)).numpy()
    gauss_newton = (2 / 6 * dense[:6].T @ dense[:6]).numpy()  # the seventh stands for a true next observation
    u = np.random.default_rng(0).normal(size=(len(H), 3))
    for hessian, truth in (("full", H), ("gauss-newton", gauss_newton)):
        product = blpo.curvature(critic, batch, J, blpo.Args(hessian=hessian))
        assert np.allclose(product(u[:, 0]), truth @ u[:, 0], rtol=1e-11, atol=1e-12)
        assert np.allclose(product(u), truth @ u, rtol=1e-11, atol=1e-12)
    assert not np.allclose(H, gauss_newton, rtol=1e-2)


@functools.cache  # the fixed point takes a second; nobody changes what is returned
def converged(seed):
    """A critic with a value for each state, as offsets from the third one's, at the fixed point of its own
    lambda-returns."""
    mdp = MDP(seed, features=3)
    mdp.phi, mdp.old_critic = torch.tensor([[1.0, 0, 1], [0, 1, 1], [0, 0, 1]]), LinearCritic(torch.zeros(3))
    for _ in range(25):  # the distance shrinks by gamma (1 - lambda) / (1 - gamma lambda) = 0.64 every time
        mdp.make_batch()
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
        v = flat(torch.autograd.grad(-advantages.mean(), list(critic.parameters()))).numpy()
        return solve(product, v, args, generator)

    solve = blpo.solve_ihvp
    monkeypatch.setattr(blpo, "solve_ihvp", solve_for_f)
    assert torch.cosine_similarity(mdp.hypergradient(critic, args)[1], direct, dim=0) < -0.9


@pytest.mark.parametrize("seed", range(13))
def test_released_mode_equals_literal_double_differentiation_of_L2(seed):
    mdp = MDP(seed)
    critic = LinearCritic(mdp.best_response(mdp.theta)[0] + 0.3)
    flags = dict(hypergradient="released", nystrom_rho=0.7, clip_coef=0.2, implicit_clip=0.5)
    args = exact_args(mdp, **flags)
    moved = mdp.theta + 1.5 * torch.randn(
        3, 2, generator=torch.Generator().manual_seed(seed)
    )  # where clips are active
    _, implicit, _ = mdp.hypergradient(critic, args, moved)

    w = flat(critic.parameters()).requires_grad_()
    theta = moved.clone().requires_grad_()
    batch = {name: torch.as_tensor(x) for name, x in mdp.batch._asdict().items()}
    returns = batch["returns"].view(-1, T)
    ratio = (mdp.log_prob(theta) - batch["logprobs"].view(-1, T)).exp()
    assert ratio.min() < 0.5 or ratio.max() > 1.5

    def advantages_and_values(w):
        obs, next_obs = mdp.phi[mdp.s] @ w, mdp.phi[mdp.next_s] @ w
        next_values = torch.where(mdp.cut, next_obs, obs.roll(-1, 1))
        delta = mdp.r + GAMMA * (1 - mdp.terminated.double()) * next_values - obs
        return torch.einsum("ntk,nk->nt", torch.as_tensor(mdp.transitions.Gamma), delta), obs

    A, V = advantages_and_values(w)
    f = -torch.min(ratio * A, ratio.clamp(0.8, 1.2) * A).mean()
    v = torch.autograd.grad(f, w, retain_graph=True)[0]
    H = torch.func.hessian(lambda w: ((returns - mdp.phi[mdp.s] @ w) ** 2).mean())(w.detach())
    x = torch.linalg.solve(H + 0.7 * torch.eye(2), v)
    # a sum over the trajectory, the mean over the trajectories
    L2 = (-2 * torch.min(ratio * A, ratio.clamp(0.5, 1.5) * A) * (returns - V)).sum(1).mean()
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


def test_mean_c_is_a_policy_gradient_of_the_old_advantages():
    """With one c for all steps the implicit term points along the policy gradient of the targets' advantages,
    or against it: nothing of the trace c_k is left but its mean."""
    mdp = MDP(0)
    critic = LinearCritic(mdp.best_response(mdp.theta)[0])
    args = exact_args(mdp, nystrom_rho=1.0)
    _, implicit, _ = mdp.hypergradient(critic, exact_args(mdp, nystrom_rho=1.0, hypergradient="mean-c"))
    batch, transitions = mdp.batch, mdp.transitions
    J = jacobian_of(critic.value)(transitions.all_obs)
    advantages = blpo.gae(transitions, J.outputs[:, 0])
    v = blpo.leader_gradient(J, advantages, batch, transitions, None, args)
    x, _ = blpo.solve_ihvp(blpo.curvature(critic, batch, J, args), v, args, torch.Generator())
    a = blpo.implicit_weights(J, x, advantages, batch, transitions, args)  # of every c_k as it is
    mean_c = np.mean(a / (-2 * batch.advantages))
    theta = mdp.theta.clone().requires_grad_()
    old_advantages = torch.as_tensor(batch.advantages)
    objective = (old_advantages * mdp.log_prob(theta).flatten()).mean()
    (expected,) = torch.autograd.grad(2 * mean_c * objective, theta)
    assert torch.allclose(implicit, expected.flatten(), rtol=1e-9, atol=1e-12)
    exact = mdp.hypergradient(critic, args)[1]
    assert not torch.allclose(implicit, exact, rtol=1e-2)


class Known:
    """A Jacobian that is given as a matrix (n, p)."""

    __array_ufunc__ = None

    def __init__(self, matrix, outputs):
        self.matrix, self.outputs = matrix, outputs

    def __matmul__(self, u):
        return self.matrix @ u[:, None]

    def __rmatmul__(self, s):
        return s[:, 0] @ self.matrix


def test_interior_values_enter_the_leader_equally():
    """docs/hypergradient.md: away from the window's ends the leader has the coefficient
    -gamma (1 - lambda) / ((1 - gamma lambda) B) at every V(s_t). With a critic that can represent a constant
    and small damping, the factors 1 - 2 c_k are therefore 1 + kappa times the trace of a constant, kappa the
    coefficient without -1/B, which away from the ends is 1 + gamma (1 - lambda) / (1 - gamma lambda)^2."""
    T = 2000
    args = blpo.Args(num_envs=1, num_steps=T, gamma=0.97, gae_lambda=0.9)
    Gamma = blpo.gae_matrix(np.zeros((1, T), bool), args.gamma, args.gae_lambda, np.float64)
    nothing = np.zeros(T)
    all_obs, next_rows = blpo.with_next(np.zeros((T, 1)), np.zeros((T, 1)), np.arange(T) == T - 1)
    transitions = blpo.Transitions(nothing, np.full(T, args.gamma), Gamma, all_obs, next_rows)
    batch = blpo.Batch(all_obs[:T], nothing, nothing, np.ones(T), nothing, nothing)
    outputs = np.zeros((T + 1, 1))

    identity = np.eye(T + 1)
    v = blpo.leader_gradient(Known(identity, outputs), nothing, batch, transitions, None, args)
    kappa = args.gamma * (1 - args.gae_lambda) / (1 - args.gamma * args.gae_lambda)
    assert np.allclose(v[200 : T - 200] * T, -kappa, rtol=1e-6)
    assert abs(v[0] * T + kappa) > 0.1  # near the ends it has another one

    constant = Known(np.ones((T + 1, 1)), outputs)
    v = blpo.leader_gradient(constant, nothing, batch, transitions, None, args)
    x = v / (2 + 1e-9)  # H = 2, and hardly any damping
    factors = 1 + blpo.implicit_weights(constant, x, nothing, batch, transitions, args)
    assert factors[200] == pytest.approx(1 + kappa / (1 - args.gamma * args.gae_lambda), rel=0.02)


def derivative(loss, x):
    """Of loss(x) by x, by autograd."""
    x = torch.as_tensor(x).clone().requires_grad_()
    return torch.autograd.grad(loss(x), x)[0].numpy()


def clipped_objective(logratio, advantages, clip):
    ratio = logratio.exp()
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).mean()


@pytest.mark.parametrize("script", [ppo, blpo, blpo_discrete])
def test_losses_and_their_derivatives_equal_autograd(script):
    rng = np.random.default_rng(0)
    logratio, A, V, R = 0.4 * rng.normal(size=50), *rng.normal(size=(3, 50))
    loss, e = script.policy_loss(np.exp(logratio), A, 0.2)
    assert loss == pytest.approx(float(clipped_objective(torch.as_tensor(logratio), torch.as_tensor(A), 0.2)))
    assert np.allclose(
        e, derivative(lambda x: clipped_objective(x, torch.as_tensor(A), 0.2), logratio), atol=1e-15
    )
    assert (e == 0).any() and (e > 0).any() and (e < 0).any()
    loss, by_values = script.critic_loss(V, R)
    assert loss == pytest.approx(((V - R) ** 2).mean(), rel=1e-12)
    assert np.allclose(
        by_values, derivative(lambda x: (x - torch.as_tensor(R)).square().mean(), V), atol=1e-15
    )


@pytest.mark.parametrize("clip", [0.5, math.inf])
def test_the_implicit_derivative_equals_autograd(clip):
    """Gated by its own sign it is that of the clipped surrogate; gated by another's, as L2 in the released
    code is: min(rho A, clip(rho) A) a / A."""
    rng = np.random.default_rng(1)
    logratio, a, A = 0.6 * rng.normal(size=60), *rng.normal(size=(2, 60))
    mb = blpo.Batch(*[None] * 6)._replace(advantages=A, weights=a)
    own = blpo.implicit_derivative(np.exp(logratio), mb, blpo.Args(implicit_clip=clip))
    assert np.allclose(
        own, derivative(lambda x: clipped_objective(x, torch.as_tensor(a), clip), logratio), atol=1e-15
    )
    released = blpo.Args(implicit_clip=clip, hypergradient="released")
    other = blpo.implicit_derivative(np.exp(logratio), mb, released)

    def gated(x):
        ratio, advantages = x.exp(), torch.as_tensor(A)
        lower = torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
        return -(lower * torch.as_tensor(a / A)).mean()

    assert np.allclose(other, derivative(gated, logratio), atol=1e-14)
    assert (clip == math.inf) == np.allclose(own, other)


@pytest.mark.parametrize("clip_vloss", [True, False])
def test_value_loss_and_its_derivative_equal_autograd(clip_vloss):
    rng = np.random.default_rng(2)
    V, old, R = 0.5 * rng.normal(size=(3, 80))
    mb = ppo.Batch(obs=None, actions=None, logprobs=None, advantages=R - old, returns=R)

    def loss(values):
        returns, before = torch.as_tensor(R), torch.as_tensor(old)
        error = (values - returns) ** 2
        if clip_vloss:
            held = before + (values - before).clamp(-0.2, 0.2)
            error = torch.max(error, (held - returns) ** 2)
        return 3.0 * 0.5 * error.mean()

    found, by_values = ppo.value_loss(V, mb, ppo.Args(vf_coef=3.0, clip_vloss=clip_vloss))
    assert found == pytest.approx(float(loss(torch.as_tensor(V))), rel=1e-12)
    assert np.allclose(by_values, derivative(loss, V), atol=1e-15)
    assert (by_values == 0).any() == clip_vloss


def test_standardized_by_hand():
    for script in (ppo, blpo):
        expected = [-2 / 7**0.5, -1 / 7**0.5, 3 / 7**0.5]
        assert script.standardized(np.array([1.0, 2.0, 6.0])).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("tensors", [False, True])
@pytest.mark.parametrize("hidden", [1, 6])
@pytest.mark.parametrize("script", [ppo, blpo, ppo_discrete, blpo_discrete])
def test_policies_and_their_gradients_equal_autograd(script, hidden, tensors, monkeypatch):
    """log pi, entropy, and the gradient of a weighted sum of both, in float64 to 1e-12."""
    torch.manual_seed(3)
    if tensors:  # as on a GPU
        monkeypatch.setattr(jacobian, "as_array", lambda tensor: tensor.detach())
    actor = script.Actor(4, 3, hidden)
    for p in actor.parameters():
        torch.nn.init.normal_(p)
    obs, e = torch.randn(9, 4), torch.randn(9)
    if script in (ppo_discrete, blpo_discrete):
        actions = torch.randint(3, (9,))
        truth = torch.distributions.Categorical(logits=actor.net(obs))
        log_prob, entropy = truth.log_prob(actions), truth.entropy().mean()
    else:
        actions = torch.randn(9, 3)
        truth = torch.distributions.Normal(actor.net(obs), actor.log_std.exp())
        log_prob, entropy = truth.log_prob(actions).sum(1), truth.entropy().sum(1).mean()
    kind = torch.as_tensor if tensors else as_numpy
    found = actor.policy(kind(obs), kind(actions))
    assert torch.allclose(torch.as_tensor(found.log_prob), log_prob, rtol=1e-12, atol=1e-12)
    assert found.entropy() == pytest.approx(float(entropy.detach()), rel=1e-12)
    for weight in (0.0, 0.7):
        optional = dict(retain_graph=True, allow_unused=True, materialize_grads=True)
        expected = flat(
            torch.autograd.grad(e @ log_prob + weight * entropy, list(actor.parameters()), **optional)
        )
        gradient = torch.as_tensor(found.gradient(kind(e), entropy_weight=weight))
        assert torch.allclose(gradient, expected, rtol=1e-12, atol=1e-12)


def test_samples_are_those_of_the_softmax():
    """The Gumbel-max trick: frequencies of 200,000 samples are the probabilities, to five standard errors."""
    torch.manual_seed(0)
    actor = blpo_discrete.Actor(5, 3, hidden=16)
    torch.nn.init.normal_(actor.net[-1].weight)
    logits = actor.net(torch.randn(5)).detach()
    samples = actor.act(logits.numpy(), actor.noise(200_000, generator=torch.Generator().manual_seed(1)))
    chances = logits.softmax(-1).numpy()
    off = np.bincount(samples, minlength=3) / len(samples) - chances
    assert (np.abs(off) < 5 * np.sqrt(chances * (1 - chances) / len(samples))).all()
    assert actor.act(logits.numpy(), 0.0) == int(logits.argmax())
    assert actor.for_env(np.array([0, 2]), gym.spaces.Discrete(3, start=-1)) == [-1, 1]


@pytest.mark.parametrize("script", [blpo, ppo])
def test_numpy_policy_is_the_actor(script, float64):
    actor = script.Actor(5, 3, hidden=16)
    x, policy = torch.randn(7, 5), numpy_policy(actor.net)
    assert np.allclose(policy(x.numpy()), actor.net(x).detach().numpy(), rtol=1e-12, atol=1e-14)
    assert np.allclose(policy(x[0].numpy()), actor.net(x[0]).detach().numpy(), rtol=1e-12, atol=1e-14)


def test_add_bounded():
    direct, implicit = np.array([3.0, 4.0]), np.array([0.0, 20.0])
    total, info = blpo.add_bounded(direct, implicit, 0.5)
    assert np.allclose(total, [3.0, 6.5])
    assert info["implicit_norm_ratio"] == 4 and info["implicit_bound_active"] == 1
    assert info["implicit_cosine"] == pytest.approx(0.8)
    assert (blpo.add_bounded(direct, implicit, math.inf)[0] == direct + implicit).all()
    assert (blpo.add_bounded(0 * direct, implicit, math.inf)[0] == implicit).all()
    assert (blpo.add_bounded(direct, implicit, 0.0)[0] == direct).all()
    for bad in (math.nan, math.inf):
        total, info = blpo.add_bounded(direct, np.array([1.0, bad]), 1.0)
        assert (total == direct).all() and info["implicit_dropped"] == 1


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
    vector = np.array([1.0, 2.0])
    adam = blpo.Adam(vector, lr=0.1, max_norm=0.5)
    for bad in (math.nan, math.inf):
        adam.step(np.array([1.0, bad]))
        assert adam.skipped and vector.tolist() == [1.0, 2.0] and adam.steps == 0
    adam.step(np.array([1.0, 0.0]))
    assert not adam.skipped and vector[0] < 1.0 and vector[1] == 2.0


@pytest.mark.parametrize("script", [ppo, blpo])
def test_adam_is_that_of_torch(script):
    """On the flat vector of a critic, against torch's own clipping and Adam, parameter by parameter; a state
    that was saved and loaded goes on alike."""
    torch.manual_seed(0)
    ours, theirs = script.Critic(3), script.Critic(3)
    theirs.load_state_dict(ours.state_dict())
    start = ours.vector.copy()
    adam = script.Adam(ours.vector, lr=1e-2, max_norm=0.5)
    reference = torch.optim.Adam(theirs.parameters(), lr=1e-2, eps=1e-5)
    small = 0
    for i in range(20):
        if i == 10:
            state = {name: copy.deepcopy(x) for name, x in adam.state_dict().items()}
            adam = script.Adam(ours.vector, lr=1e-2, max_norm=0.5)
            adam.load_state_dict(state)
        obs, returns = torch.randn(5, 3), 3 * torch.randn(5)
        J = ours.jacobian(obs.numpy())
        _, by_values = script.critic_loss(J.outputs[:, 0], returns.numpy())
        gradient = (by_values[:, None] @ J) * (1e-3 if i % 2 else 1)
        small += float(np.linalg.norm(gradient)) < 0.5
        adam.step(gradient)
        reference.zero_grad()
        ((theirs(obs) - returns).square().mean() * (1e-3 if i % 2 else 1)).backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        reference.step()
    for a, b in zip(ours.parameters(), theirs.parameters()):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-13)
    assert 5 <= small <= 15  # both kinds: shorter gradients stay as they are
    assert not np.allclose(start, ours.vector, atol=0.1)


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
        mdp.make_batch()
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
