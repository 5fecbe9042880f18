"""The weights that a run ends with are those of updates written anew, literally and slowly, in float64, on
its own rollouts: CleanRL's PPO, and BLPO with dense Jacobians, dense solves and double differentiation."""

import copy
import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from torch.func import functional_call, hessian, jacrev
from torch.nn.utils import clip_grad_norm_, parameters_to_vector

import blpo_continuous as blpo
import blpo_discrete
import jacobian
import ppo_continuous as ppo
import ppo_discrete
from tests.test_rollout import advantages_by_recursion, is_discrete, main, policy, recorded_run, rows

PPO = [ppo, ppo_discrete]
BLPO = [blpo, blpo_discrete]
N, T = 4, 10
ITERATIONS = 3
SMALL = ["--num-envs", N, "--num-steps", T, "--num-minibatches", 2, "--update-epochs", 3, "--hidden-size", 4]
SMALL += ["--total-timesteps", ITERATIONS * N * T + 7, "--eval-episodes", 0, "--norm-obs", "--norm-reward"]
SMALL += ["--gamma", 0.95, "--gae-lambda", 0.8, "--actor-lr", 0.05, "--critic-lr", 0.02, "--max-grad-norm", 1]


# What both references share


class Trajectories:
    """A recorded rollout as float64 tensors (N, T, ...)."""

    def __init__(self, rollout):
        for name, array in rollout._asdict().items():
            x = torch.as_tensor(array)
            setattr(self, name, x.double() if x.is_floating_point() else x)


def minibatches_of(permutation, args):
    """Lists of (n, t), the steps of each minibatch of a pass."""
    size = N * T // args.num_minibatches
    if getattr(args, "trajectory_minibatches", False):  # neighbours; it is the minibatches that are drawn
        permutation = torch.cat([torch.arange(i * size, (i + 1) * size) for i in permutation.tolist()])
    assert sorted(permutation.tolist()) == list(range(N * T))
    for start in range(0, N * T, size):
        yield [divmod(k, T) for k in permutation[start : start + size].tolist()]


def chosen(x, steps):
    """The steps (n, t) of a tensor (N, T, ...)."""
    return torch.stack([x[n, t] for n, t in steps])


def advantages_of(critic, rollout, args):
    """(n, T), differentiable in the critic's parameters."""
    values, next_values = (critic.value(x).squeeze(-1) for x in (rollout.obs, rollout.next_obs))
    table = advantages_by_recursion(rollout, values, next_values, args.gamma, args.gae_lambda)
    return torch.stack([torch.stack(row) for row in table])


def log_prob(script, actor, obs, actions):
    logprobs = policy(script, actor, obs).log_prob(actions)
    return logprobs if is_discrete(script) else logprobs.sum(-1)


def mean_entropy(script, actor, obs):
    entropy = policy(script, actor, obs).entropy()
    return (entropy if is_discrete(script) else entropy.sum(-1)).mean()


def surrogate(ratio, advantages, clip):
    """PPO's clipped objective, to be minimised."""
    return -torch.min(ratio * advantages, torch.clamp(ratio, 1 - clip, 1 + clip) * advantages).mean()


def normalised(advantages, args):
    if not args.norm_adv:
        return advantages
    return (advantages - advantages.mean()) / (advantages.std() + 1e-8)


class Reference:
    """Networks and optimizers that start where the run started; `update` takes one iteration. What it meets
    on its way is kept in `met`, name -> list of numbers, and compared with progress.csv."""

    def __init__(self, script, first):
        self.script = script
        self.args = first.args
        self.actor, self.critic = (copy.deepcopy(net).double() for net in (first.actor, first.critic))
        self.optimizers = [
            torch.optim.Adam(self.actor.parameters(), lr=self.args.actor_lr, eps=1e-5),
            torch.optim.Adam(self.critic.parameters(), lr=self.args.critic_lr, eps=1e-5),
        ]
        self.met = defaultdict(list)

    def anneal(self, iteration, iterations):
        fraction = 1.0 - (iteration - 1.0) / iterations if self.args.anneal_lr else 1.0
        for optimizer, lr in zip(self.optimizers, (self.args.actor_lr, self.args.critic_lr)):
            optimizer.param_groups[0]["lr"] = fraction * lr

    def clip_gradient(self, *nets):
        """Together, if there are several."""
        norm = clip_grad_norm_([p for net in nets for p in net.parameters()], self.args.max_grad_norm)
        self.meet(gradient_clipped=norm > self.args.max_grad_norm)

    def meet(self, **numbers):
        for name, number in numbers.items():
            self.met[name].append(float(torch.as_tensor(number).detach()))

    def meet_policy(self, ratio, loss):
        self.meet(policy_loss=loss, approx_kl=(ratio - 1 - ratio.log()).mean())
        self.meet(clip_fraction=((ratio - 1).abs() > self.args.clip_coef).double().mean())


def check(script, flags, Kind, tmp_path):
    """Runs the script and the reference on the script's rollouts, compares networks after every iteration and
    metrics of every row, and returns what the reference met."""
    folder, iterations = recorded_run(script, tmp_path, *SMALL, *flags)
    assert len(iterations) == ITERATIONS
    reference = Kind(script, iterations[0])
    networks = reference.actor, reference.critic
    first = [parameters_to_vector(net.parameters()).detach() for net in networks]
    model = torch.load(folder / "model.pt", weights_only=True)
    ends = [(i.actor.state_dict(), i.critic.state_dict()) for i in iterations[1:]]
    ends.append((model["actor"], model["critic"]))
    table = rows(folder / "progress.csv")
    met = defaultdict(list)
    for number, (iteration, end, row) in enumerate(zip(iterations, ends, table), 1):
        reference.anneal(number, ITERATIONS)
        reference.update(iteration)
        for net, state, start in zip(networks, end, first):
            found = torch.cat([state[name].flatten() for name, _ in net.named_parameters()])
            expected = parameters_to_vector(net.parameters()).detach()
            error = float((found - expected).norm() / (expected - start).norm())
            assert error < 1e-5
        obs = Trajectories(iteration.rollout).obs
        reference.meet(entropy=mean_entropy(script, reference.actor, obs))
        columns = reference.met.keys() & row.keys()
        assert columns >= {"critic_loss", "policy_loss", "approx_kl", "clip_fraction", "entropy"}
        for name in columns:
            assert row[name] == pytest.approx(np.mean(reference.met[name]), rel=1e-4, abs=2e-6), name
        for name, numbers in reference.met.items():
            met[name] += numbers
        reference.met.clear()
    return met


def sometimes(fractions):
    """Whether something, of which these are fractions, happened and did not happen."""
    return min(fractions) < max(fractions) and 0 < np.mean(fractions) < 1


# PPO, as in CleanRL


class PPOReference(Reference):
    def update(self, iteration):
        args = self.args
        rollout = Trajectories(iteration.rollout)
        with torch.no_grad():
            b_logprobs = log_prob(self.script, self.actor, rollout.obs, rollout.actions)
            b_values = self.critic.value(rollout.obs).squeeze(-1)
            b_advantages = advantages_of(self.critic, rollout, args)
            b_returns = b_advantages + b_values
        assert len(iteration.permutations) == args.update_epochs
        for permutation in iteration.permutations:
            for steps in minibatches_of(permutation, args):
                obs = chosen(rollout.obs, steps)
                newlogprob = log_prob(self.script, self.actor, obs, chosen(rollout.actions, steps))
                ratio = (newlogprob - chosen(b_logprobs, steps)).exp()
                pg_loss = surrogate(ratio, normalised(chosen(b_advantages, steps), args), args.clip_coef)

                values = self.critic.value(obs).squeeze(-1)
                old, returns = chosen(b_values, steps), chosen(b_returns, steps)
                v_loss = (values - returns) ** 2
                self.meet(critic_loss=v_loss.mean())
                self.meet(value_clipped=((values - old).abs() > args.clip_coef).double().mean())
                if args.clip_vloss:
                    v_clipped = old + torch.clamp(values - old, -args.clip_coef, args.clip_coef)
                    v_loss = torch.max(v_loss, (v_clipped - returns) ** 2)
                v_loss = 0.5 * v_loss.mean()

                entropy_loss = mean_entropy(self.script, self.actor, obs)
                self.meet_policy(ratio, pg_loss)
                loss = pg_loss - args.ent_coef * entropy_loss + v_loss * args.vf_coef
                for optimizer in self.optimizers:
                    optimizer.zero_grad()
                loss.backward()
                if args.joint_grad_clip:
                    self.clip_gradient(self.actor, self.critic)
                else:
                    self.clip_gradient(self.actor)
                    self.clip_gradient(self.critic)
                for optimizer in self.optimizers:
                    optimizer.step()


@pytest.mark.parametrize(
    "flags",
    [
        ["--max-grad-norm", 0.5],
        ["--no-clip-vloss", "--vf-coef", 2, "--no-joint-grad-clip"],
        ["--trajectory-minibatches", "--num-minibatches", 4],
        ["--ent-coef", 0.1, "--no-norm-adv", "--no-anneal-lr"],
        ["--clip-coef", 0.05, "--max-grad-norm", 0.3, "--vf-coef", 1.5, "--ent-coef", 0],
    ],
    ids=["default", "matched", "trajectories", "entropy", "ranges"],
)
@pytest.mark.parametrize("script", PPO)
def test_ppo_updates_are_those_of_cleanrl(script, flags, tmp_path):
    """One clip or two; with and without each of CleanRL's details."""
    met = check(script, flags, PPOReference, tmp_path)
    assert_all_matters(met)


# BLPO


def lambda_returns(critic, rollout, args):
    """The mixture of n-step returns, backwards, without the detour through advantages."""
    next_values = critic.value(rollout.next_obs).squeeze(-1)
    table = []
    for n in range(len(rollout.obs)):
        row = []
        for t in reversed(range(T)):
            bootstrap = (1 - rollout.terminated[n, t]) * next_values[n, t]
            if row and not rollout.done[n, t]:
                bootstrap = (1 - args.gae_lambda) * bootstrap + args.gae_lambda * row[0]
            row.insert(0, rollout.rewards[n, t] + args.gamma * bootstrap)
        table.append(torch.stack(row))
    return torch.stack(table)


def flat_gradient(loss, net, **options):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()), **options)])


def values_of_flat(critic, obs):
    """The flat parameters, and the map from them to V at the observations (B, obs_dim) -> (B,)."""
    parameters = dict(critic.named_parameters())
    sizes = [p.numel() for p in parameters.values()]

    def values(w):
        parts = [part.view_as(p) for part, p in zip(w.split(sizes), parameters.values())]
        return functional_call(critic, dict(zip(parameters, parts)), obs.flatten(0, 1))

    return parameters_to_vector(parameters.values()).detach(), values


class BLPOReference(Reference):
    def update(self, iteration):
        args = self.args
        rollout = Trajectories(iteration.rollout)
        with torch.no_grad():
            old_logprobs = log_prob(self.script, self.actor, rollout.obs, rollout.actions)
            old_advantages = advantages_of(self.critic, rollout, args)
            targets = old_advantages + self.critic.value(rollout.obs).squeeze(-1)
        passes = args.nested_critic_steps + 1
        assert len(iteration.permutations) == args.update_epochs * passes
        for epoch in range(args.update_epochs):
            *of_critic, of_actor = iteration.permutations[epoch * passes : (epoch + 1) * passes]
            self.best_respond(rollout.obs, targets, of_critic)
            advantages = advantages_of(self.critic, rollout, args).detach()
            weights = None  # what the implicit term takes of the whole rollout
            if args.ihvp != "none":
                weights = self.implicit_weights(rollout, old_logprobs, old_advantages, targets)
            for steps in minibatches_of(of_actor, args):
                self.step_actor(rollout, old_logprobs, advantages, weights, steps)

    def best_respond(self, obs, targets, permutations):
        critic = self.critic
        for permutation in permutations:
            for steps in minibatches_of(permutation, self.args):
                values = critic.value(chosen(obs, steps)).squeeze(-1)
                error = (values - chosen(targets, steps)).square().mean()
                self.meet(critic_loss=error)
                self.optimizers[1].zero_grad()
                error.backward()
                self.clip_gradient(critic)
                self.optimizers[1].step()
        self.meet(critic_loss_nested=(critic.value(obs).squeeze(-1) - targets).square().mean())

    def step_actor(self, rollout, old_logprobs, advantages, weights, steps):
        args, actor = self.args, self.actor
        obs, actions = chosen(rollout.obs, steps), chosen(rollout.actions, steps)
        ratio = (log_prob(self.script, actor, obs, actions) - chosen(old_logprobs, steps)).exp()
        A = chosen(advantages, steps)
        loss = surrogate(ratio, normalised(A, args), args.clip_coef)
        self.meet_policy(ratio, loss)
        loss = loss - args.ent_coef * mean_entropy(self.script, actor, obs)
        h = flat_gradient(loss, actor, retain_graph=True)
        if args.ihvp != "none":
            implicit = self.implicit_term(ratio, A, chosen(weights, steps))
            longer = float(implicit.norm() / h.norm())
            self.meet(implicit_norm_ratio=longer)
            if args.implicit_bound < math.inf:
                self.meet(implicit_bound_active=longer > args.implicit_bound)
            self.meet(implicit_cosine=torch.cosine_similarity(implicit, h, dim=0))
            h = h + implicit / max(1, longer / args.implicit_bound)
        parameters = list(actor.parameters())
        for p, part in zip(parameters, h.split([p.numel() for p in parameters])):
            p.grad = part.view_as(p)
        self.clip_gradient(actor)
        self.optimizers[0].step()

    def implicit_weights(self, rollout, old_logprobs, old_advantages, targets):
        """a (N, T): the implicit term is minus the gradient of the mean of ratio a, but for its gate."""
        args, actor, critic = self.args, self.actor, self.critic
        if args.hypergradient != "released":
            f = -lambda_returns(critic, rollout, args).mean()
        else:
            logprobs = log_prob(self.script, actor, rollout.obs, rollout.actions).detach()
            ratio = (logprobs - old_logprobs).exp()
            f = surrogate(ratio, advantages_of(critic, rollout, args), args.clip_coef)
        v = flat_gradient(f, critic)
        w, values = values_of_flat(critic, rollout.obs)
        J = jacrev(values)(w)
        if args.hessian == "full":
            H = hessian(lambda w: (values(w) - targets.flatten()).square().mean())(w)
            eigenvalues, Q = torch.linalg.eigh(H)
            assert eigenvalues[0] < -1e-4
            H = Q @ torch.diag(eigenvalues.clamp(min=0)) @ Q.T  # the sketch is kept positive semidefinite
        else:
            H = 2 / len(J) * J.T @ J
        x = torch.linalg.solve(H + args.nystrom_rho * torch.eye(len(w)), v)
        self.meet(ihvp_correction=(x - v / args.nystrom_rho).norm() / (v / args.nystrom_rho).norm())

        if args.hypergradient != "released":
            c = self.traces((J @ x).view_as(rollout.rewards), rollout)
            if args.hypergradient == "mean-c":
                c = torch.full_like(c, float(c.sum()) / c.numel())
            return -2 * c * old_advantages

        # L2 sums -2 ratio A e over the steps of a trajectory and averages over trajectories. The derivative
        # of each of its terms along x, by double differentiation: A and e = R - V both move
        factors = torch.zeros_like(targets, requires_grad=True)
        A = advantages_of(critic, rollout, args)
        e = targets - critic.value(rollout.obs).squeeze(-1)
        L2 = (factors * -2 * A * e).sum(1).mean()
        along_x = flat_gradient(L2, critic, create_graph=True) @ x
        (term,) = torch.autograd.grad(along_x, factors)
        return term * factors.numel()  # the mean over steps in place of the sum

    def implicit_term(self, ratio, A, a):
        """-grad mean min(ratio a, clip(ratio) a) in the exact modes; in the released one, the gate is that of
        the advantages, min(ratio A, clip(ratio) A) a / A."""
        clip = self.args.implicit_clip
        clipped = torch.clamp(ratio, 1 - clip, 1 + clip)
        if self.args.hypergradient == "released":
            self.meet_gate(ratio)
            return flat_gradient(-(torch.min(ratio * A, clipped * A) * a / A).mean(), self.actor)
        self.meet_gate(ratio, a * A < 0)
        return flat_gradient(surrogate(ratio, a, clip), self.actor)

    def meet_gate(self, ratio, signs_differ=None):
        if self.args.implicit_clip == math.inf:
            return
        beyond = (ratio - 1).abs() > self.args.implicit_clip
        self.meet(implicit_clipped=beyond.double().mean())
        if signs_differ is not None:
            self.meet(gates_differ=(beyond & signs_differ).double().mean())

    def traces(self, w, mb):
        """c_k = sum over t <= k in the same episode of (gamma lambda)^(k-t) w_t."""
        c = torch.zeros_like(w)
        for n in range(len(w)):
            for k in range(T):
                for t in range(k, -1, -1):
                    if t < k and mb.done[n, t]:
                        break  # step t ended an earlier episode
                    c[n, k] += (self.args.gamma * self.args.gae_lambda) ** (k - t) * w[n, t]
        return c


RANK = 41  # the critic's parameters: with all of H in its sketch the solver is exact
EXACT = ["--nystrom-rank", RANK, "--nystrom-rho", 0.7, "--implicit-bound", 1.2, "--implicit-clip", 0.1]


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--hessian", "full", "--nested-critic-steps", 3, "--ent-coef", 0.1],
        ["--implicit-bound", "inf", "--implicit-clip", 0.3, "--nested-critic-steps", 1, "--no-anneal-lr"],
        ["--implicit-clip", "inf", "--no-norm-adv", "--nystrom-sketch", "columns", "--max-grad-norm", 2],
        ["--ihvp", "pcg", "--nystrom-sketch", "gaussian", "--nystrom-rho", 3, "--clip-coef", 0.1],
    ],
    ids=["default", "full", "unbounded", "unclipped", "pcg"],
)
@pytest.mark.parametrize("script", BLPO)
def test_exact_updates_are_those_of_the_specification(script, flags, tmp_path):
    """Weights a = -2 c A, both Hessians, and every sketch and solver that can be exact, with a full rank."""
    met = check(script, [*EXACT, *flags], BLPOReference, tmp_path)
    assert_all_matters(met)


@pytest.mark.parametrize(
    "flags",
    [
        ["--hypergradient", "released", "--implicit-bound", 5],
        ["--hypergradient", "released", "--implicit-bound", 5, "--hessian", "full", "--implicit-clip", "inf"],
        ["--hypergradient", "mean-c"],
        ["--ihvp", "none", "--nested-critic-steps", 4, "--max-grad-norm", 0.4],
    ],
    ids=["released", "released-full", "mean-c", "none"],
)
@pytest.mark.parametrize("script", BLPO)
def test_updates_of_the_other_modes_are_those_of_the_specification(script, flags, tmp_path):
    """The released code's term by double differentiation, the mean of c, nesting alone."""
    met = check(script, [*EXACT, *flags], BLPOReference, tmp_path)
    assert_all_matters(met)


def assert_all_matters(met):
    """Whatever gates, clips or bounds there are, they were at work in some updates and not in others, and H
    changed x."""
    conditional = {"implicit_bound_active", "implicit_clipped", "gates_differ", "value_clipped"}
    for name in {"clip_fraction", "gradient_clipped"} | conditional & met.keys():
        assert sometimes(met[name]), name
    if "ihvp_correction" in met:
        assert min(met["ihvp_correction"]) > 0.2


# What a researcher may change, and where it runs

FEW = ["--num-envs", 4, "--num-steps", 32, "--num-minibatches", 4, "--update-epochs", 2, "--hidden-size", 5]
FEW += ["--total-timesteps", 512, "--eval-episodes", 0, "--norm-obs", "--norm-reward", "--ent-coef", 0.01]
RELEASED = ["--hypergradient", "released", "--nystrom-sketch", "columns", "--hessian", "full"]
PPO_MODES = [[], ["--trajectory-minibatches", "--no-clip-vloss", "--no-joint-grad-clip"]]
BLPO_MODES = [[], RELEASED, ["--ihvp", "cg"], ["--ihvp", "pcg", "--nystrom-sketch", "gaussian"]]
BLPO_MODES += [["--hypergradient", "mean-c"], ["--ihvp", "none"]]
MODES = [(script, flags) for script in PPO for flags in PPO_MODES]
MODES += [(script, flags) for script in BLPO for flags in BLPO_MODES]


def assert_alike(one, other):
    """The rows of two runs' progress.csv, clocks apart."""
    assert len(one) == len(other) > 1
    for row, expected in zip(one, other):
        for name, value in expected.items():
            if not name.startswith(("wall", "sps", "seconds")):
                assert row[name] == pytest.approx(value, rel=1e-3, abs=1e-4, nan_ok=True), name


@pytest.mark.parametrize("script, flags", MODES)
def test_tensors_do_what_arrays_do(script, flags, tmp_path, monkeypatch):
    """The path of a GPU, PyTorch's tensors in place of NumPy's arrays, taken here on the CPU."""
    arrays = rows(main(script, tmp_path, *FEW, *flags) / "progress.csv")
    kinds = set()

    def as_tensor(tensor):
        kinds.add(type(tensor.detach()))
        return tensor.detach()

    monkeypatch.setattr(jacobian, "as_array", as_tensor)
    tensors = rows(main(script, tmp_path, *FEW, *flags) / "progress.csv")
    assert kinds == {torch.Tensor}
    assert_alike(tensors, arrays)


@pytest.mark.parametrize("script", PPO + BLPO)
def test_any_network_may_take_the_place_of_mlp(script, tmp_path, monkeypatch):
    """A network of other layers trains by changing `mlp` alone; the same one does what it did before."""

    class Wrapped(torch.nn.Module):
        def __init__(self, *sizes, **options):
            super().__init__()
            self.inside = mlp(*sizes, **options)

        def forward(self, x):
            return self.inside(x)

        def __getitem__(self, i):
            return self.inside[i]

    mlp = script.mlp
    written_out = rows(main(script, tmp_path, *FEW) / "progress.csv")
    monkeypatch.setattr(script, "mlp", Wrapped)
    assert_alike(rows(main(script, tmp_path, *FEW) / "progress.csv"), written_out)
