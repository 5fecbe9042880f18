"""Bilevel reinforcement learning on tabular problems: M-SoBiRL, SoBiRL and what they are compared with.

Yang, Gao & Yuan, "Bilevel Reinforcement Learning via the Development of Hyper-gradient without Lower-Level
Convexity" (arXiv:2405.19697); equation numbers are theirs. A leader chooses parameters x of a reward r(x), a
follower answers with the optimal policy of the entropy-regularised decision process (P, r(x), gamma, tau),
and the leader pays f(x, pi*(x)):

    min_x phi(x) = f(x, pi*(x))
    Q* = r(x) + gamma P V*,    V* = tau log sum_a exp(Q*/tau),    pi* = exp((Q* - V*)/tau)

V* is the fixed point of varphi(x, v)_s = tau log sum_a exp((r_sa(x) + gamma P_sa v)/tau), a contraction.
Implicit differentiation therefore needs no convexity below, only first derivatives and one linear system, of
the size of the state space. With m = pi* o grad_pi f and U^T m = sum_a m - gamma P^T m the hypergradient is

    grad phi = grad_x f + (1/tau) grad r^T (m - lambda w)                                                (9)
    w = (I - gamma P^pi*)^{-T} U^T m,    lambda = pi*

and most methods differ in w alone: one least-squares step a round (M-SoBiRL), the first term of the Neumann
series (78), roll-outs (15), or nothing (DRLHF). Everything is float64 and tested against finite differences:
tests/test_sobirl.py.

    python sobirl_tabular.py --problem synthetic --method m-sobirl
    for method in exact m-sobirl drlhf; do
        python sobirl_tabular.py --problem preference --method $method
    done
    python tools/plot.py --runs-dir runs
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Callable, Literal, NamedTuple

import support  # before torch, because it sets the number of threads

import torch
import torch.nn.functional as F

from support.command import own_process
from support.flags import Flags, Name, Range, Seed, Stop, check_ranges, fail, parse_args, say
from support.run_folder import Run, check_runs_dir

Rounds = Annotated[int, Range(1, 1_000_000, "lie between 1 and 1,000,000")]
Tolerance = Annotated[float, Range(1e-12, 1, "lie between 1e-12 and 1")]
Penalty = Annotated[float, Range(1e-300, 1_000_000, "be positive, and at most 1,000,000")]
Momentum = Annotated[float, Range(0, 1_000_000, "lie in [0, 1,000,000]")]
# None: the problem, or the method, has a value of its own
Discount = Annotated[float | None, Range(0, 0.999, "lie in [0, 0.999]")]
Temperature = Annotated[float | None, Range(0.001, 1_000, "lie in [0.001, 1,000]")]
Rate = Annotated[float | None, Range(1e-300, 1_000, "be positive, and at most 1,000")]
Decay = Annotated[float | None, Range(0, 1, "lie in [0, 1]")]
Samples = Annotated[int | None, Range(0, 100_000, "lie between 0 and 100,000")]
Rollout = Annotated[int | None, Range(1, 100_000, "lie between 1 and 100,000")]


@dataclass
class Args(Flags):
    problem: Literal["synthetic", "reward-shaping", "preference"] = "synthetic"
    """what leader and follower want"""
    method: Literal[
        "m-sobirl", "exact", "unrolled", "hpgd", "pbrl", "parl", "sobirl", "stoc-sobirl", "drlhf"
    ] = "m-sobirl"
    """how the leader finds its direction"""
    exp_name: Name = ""
    """name of the experiment, part of the run folder's name (empty: the method's name)"""
    seed: Seed = 1
    """seed of the problem, and of the samples"""
    rounds: Rounds = 1000
    """steps of the leader"""
    runs_dir: str = "runs"
    """folder that receives the run folder {problem}__{exp_name}__{seed}__{unix time}"""
    track: bool = False
    """log to Weights and Biases too (WANDB_MODE=offline needs no account, WANDB_PROJECT names the project)"""
    gamma: Discount = None
    """discount factor of the follower (None: the problem's own)"""
    tau: Temperature = None
    """temperature of the follower (None: the problem's own)"""
    beta: Rate = None
    """step size of the leader (None: the problem's own, one for exact directions, m-sobirl, samples each)"""
    beta_decay: Decay = None
    """the step size falls with round^-beta_decay (None: 1/3 for stoc-sobirl, else 0)"""
    sweeps: Rounds = 10
    """m-sobirl, unrolled, pbrl: soft Bellman sweeps a round, from where the last round ended"""
    tol: Tolerance = 1e-8
    """the other methods: error of Q* at which their sweeps end"""
    w_solver: Literal["gd", "exact"] = "gd"
    """m-sobirl: gradient steps on the least squares of w, or the solution"""
    w_steps: Rounds = 1
    """m-sobirl: gradient steps a round"""
    xi: Rate = None
    """m-sobirl: step size of w (None: 1/|A|^2, the largest that cannot overshoot)"""
    penalty: Penalty = 100.0
    """pbrl: weight lambda of the follower's regret"""
    samples: Samples = None
    """sobirl, stoc-sobirl, hpgd: tuples of trajectories a round (0: expectations; None: 64, sobirl 0)"""
    rollout: Rollout = None
    """sobirl, stoc-sobirl, hpgd: steps of a roll-out (None: until gamma^steps < 0.001)"""
    depth: Literal["full", "one"] = "full"
    """sobirl, stoc-sobirl: (15), or its truncation after one step, (78)"""
    baseline: bool = True
    """sobirl, stoc-sobirl: subtract the mean of the other samples from l (not in the paper)"""
    momentum: Momentum = 10.0
    """stoc-sobirl: eta_k = min(1, momentum * round^-2/3), the weight of a new sample (1e6: plain SGD)"""

    unit = "round"  # of progress

    @property
    def subject(self) -> str:
        return self.problem

    @property
    def total(self) -> int:
        return self.rounds


def check_args(args: Args) -> None:
    """Refuses what cannot work before any work starts; every message names the flag and the fix."""
    check_ranges(args)
    alone = args.samples == 1 and args.baseline and args.method in ("sobirl", "stoc-sobirl")
    others = "be at least 2, or come with --no-baseline: the baseline is the mean of the others"
    args.require("samples", not alone, others)
    sampled = args.samples != 0 or args.method != "stoc-sobirl"
    args.require("samples", sampled, "be at least 1 with stoc-sobirl, which is about samples")
    takes = not args.samples or args.method in ("sobirl", "stoc-sobirl", "hpgd")
    args.require("samples", takes, f"be left out: {args.method} takes expectations")
    check_runs_dir(args.runs_dir)


# Problems


@dataclass
class Problem:
    """S states, A actions, n parameters. The follower solves (P, reward(x), gamma, tau). The leader's
    objective is given as a function and as (12), an expectation over tuples of independent trajectories under
    pi, with the same P and starts rho: objective(x, pi) = E[sum_h costs(x, states, actions)_h]."""

    P: torch.Tensor  # (S, A, S)
    gamma: float
    tau: float
    start: torch.Tensor  # (n,), the first x
    reward: Callable  # (n,) -> (S, A)
    objective: Callable  # (n,), (S, A) -> ()
    costs: Callable  # (n,), states, actions, alive, each (M, tuple_size, H) -> (M, H)
    beta: float  # step sizes of the leader: with exact directions,
    beta_tracking: float  # with one least-squares step a round (m-sobirl),
    beta_sampled: float  # with samples
    tuple_size: int = 1
    horizon: int = 0  # steps of a trajectory; 0: it goes on with probability upper_gamma
    upper_gamma: float = 0.0
    optimum: float = math.nan  # min phi where it is known
    true: torch.Tensor | None = None  # (S, A), the reward that preferences come from

    @property
    def rho(self):  # (S,), uniform
        return torch.full((len(self.P),), 1 / len(self.P), dtype=self.P.dtype)


def uniform(*shape, generator):
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


def normal(*shape, generator):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def synthetic(seed: int) -> Problem:
    """The authors' random problem: r_sa = c_sa x'Mx, f = |x|^2/2 + |pi|^2/2, so that min phi = S/(2A), at x =
    0. As (12): two independent state-action pairs coincide with probability |pi|^2/S^2."""
    S, A, n = 10, 5, 100
    g = torch.Generator().manual_seed(seed)
    ranks = torch.stack([torch.randperm(S, generator=g) for _ in range(S * A)])
    successors = ranks < torch.randint(1, S, (S * A, 1), generator=g)
    P = (uniform(S * A, S, generator=g) * successors).reshape(S, A, S)
    c = uniform(S, A, generator=g) * uniform(S, A, generator=g)
    M = normal(n, n, generator=g)

    def costs(x, s, a, alive):
        same = (s[:, 0] == s[:, 1]) & (a[:, 0] == a[:, 1])
        return 0.5 * (x @ x) + 0.5 * S**2 * same.to(x.dtype)

    P = P / P.sum(-1, keepdim=True)
    return Problem(
        P=P,
        gamma=0.5,
        tau=1.0,
        start=normal(n, generator=g),
        reward=lambda x: c * (x @ M @ x),
        objective=lambda x, pi: 0.5 * (x @ x) + 0.5 * pi.square().sum(),
        costs=costs,
        beta=8e-3,
        beta_tracking=8e-3,
        beta_sampled=8e-3,
        tuple_size=2,
        horizon=1,
        optimum=S / (2 * A),
    )


def reward_shaping(seed: int, size: int = 5, price: float = 1e-3) -> Problem:
    """A grid with a wall, a goal in a corner that pays 1 and leads back to a random cell, and moves that slip
    once in ten. The leader wants return with discount 0.95; the follower, short-sighted (0.5), sees that
    reward plus one parameter for each state and action, for which the leader pays price/2 |x|^2. The seed
    draws the wall's gap."""
    S, A, true_gamma = size * size, 4, 0.95
    g = torch.Generator().manual_seed(seed)
    column, gap = size // 2, int(torch.randint(size, (), generator=g))
    wall = {(row, column) for row in range(size) if row != gap}
    P = torch.zeros(S, A, S, dtype=torch.float64)
    for row in range(size):
        for col in range(size):
            for slip, (down, right) in enumerate(((1, 0), (0, 1), (-1, 0), (0, -1))):
                to = min(max(row + down, 0), size - 1), min(max(col + right, 0), size - 1)
                to = (row, col) if to in wall else to
                P[row * size + col, :, to[0] * size + to[1]] += 0.1 / A
                P[row * size + col, slip, to[0] * size + to[1]] += 0.9
    P[-1] = 1 / S
    true = torch.zeros(S, A, dtype=torch.float64)
    true[-1] = 1.0

    def objective(x, pi):
        system = torch.eye(S, dtype=P.dtype) - true_gamma * transition(P, pi)
        value = torch.linalg.solve(system, (pi * true).sum(1))
        return 0.5 * price * (x @ x) - value.mean()

    def costs(x, s, a, alive):
        first = F.one_hot(torch.zeros(len(s), dtype=torch.long), s.shape[2])
        return 0.5 * price * (x @ x) * first - (true[s, a] * alive)[:, 0]

    return Problem(
        P=P,
        gamma=0.5,
        tau=0.1,
        start=torch.zeros(S * A, dtype=torch.float64),
        reward=lambda x: true + x.reshape(S, A),
        objective=objective,
        costs=costs,
        beta=1.0,
        beta_tracking=3e-3,
        beta_sampled=0.03,
        upper_gamma=true_gamma,
    )


def preference(seed: int, S: int = 4, A: int = 3, H: int = 2) -> Problem:
    """Reward learning from preferences between two trajectories of H steps: cross-entropy of the
    Bradley-Terry model of r(x), one parameter for each state and action, against that of a hidden true
    reward; all pairs can be enumerated."""
    g = torch.Generator().manual_seed(seed)
    P = uniform(S, A, S, generator=g) ** 4
    P = P / P.sum(-1, keepdim=True)
    true = 2 * normal(S, A, generator=g)
    paths = torch.cartesian_prod(*[torch.arange(S), torch.arange(A)] * H).reshape(-1, H, 2)
    s, a = paths[..., 0], paths[..., 1]  # every trajectory, (D, H)
    chance = P[s[:, :-1], a[:, :-1], s[:, 1:]].prod(1) / S  # (D,), without the policy's part

    def loss(r, first, second):  # states and actions of the two sides, each (..., H) -> (...)
        margin = lambda r: r[first].sum(-1) - r[second].sum(-1)
        return F.binary_cross_entropy_with_logits(margin(r), margin(true).sigmoid(), reduction="none")

    def objective(x, pi):
        p = chance * pi[s, a].prod(1)
        return p @ loss(x.reshape(S, A), (s[:, None], a[:, None]), (s[None], a[None])) @ p

    def costs(x, s, a, alive):  # the whole loss is due at the last step
        last = F.one_hot(torch.full((len(s),), s.shape[2] - 1), s.shape[2])
        return loss(x.reshape(S, A), (s[:, 0], a[:, 0]), (s[:, 1], a[:, 1]))[:, None] * last

    return Problem(
        P=P,
        gamma=0.9,
        tau=0.2,
        start=normal(S * A, generator=g),
        reward=lambda x: x.reshape(S, A),
        objective=objective,
        costs=costs,
        beta=0.3,
        beta_tracking=0.01,
        beta_sampled=0.1,
        tuple_size=2,
        horizon=H,
        true=true,
    )


PROBLEMS = {"synthetic": synthetic, "reward-shaping": reward_shaping, "preference": preference}


# The follower


def transition(P, pi):
    """P^pi, (S, S)."""
    return torch.einsum("sa,sap->sp", pi, P)


def soft_value(Q, tau):
    """V = tau log sum_a exp(Q/tau) (10), (S, A) -> (S,)."""
    return tau * torch.logsumexp(Q / tau, 1)


def sweep(problem: Problem, r, Q):
    """The soft Bellman optimality operator, a gamma-contraction in the maximum norm, (S, A) -> (S, A)."""
    return r + problem.gamma * problem.P @ soft_value(Q, problem.tau)


def best_response(problem: Problem, r, Q, tol: float):
    """Q within tol of Q*, by as many sweeps as the contraction asks for, and how many."""
    last, Q = Q, sweep(problem, r, Q)
    gap = float((Q - last).abs().max())  # |last - Q*| <= gap / (1 - gamma)
    count = 1
    if problem.gamma > 0 and gap > tol * (1 - problem.gamma):
        count = math.ceil(math.log(tol * (1 - problem.gamma) / gap) / math.log(problem.gamma))
    for _ in range(count - 1):
        Q = sweep(problem, r, Q)
    return Q, count


def soft_policy_value(problem: Problem, r, log_pi):
    """V of a policy, entropy included, (S, A) -> (S,)."""
    system = torch.eye(len(problem.P), dtype=r.dtype) - problem.gamma * transition(problem.P, log_pi.exp())
    return torch.linalg.solve(system, (log_pi.exp() * (r - problem.tau * log_pi)).sum(1))


def solve_follower(problem: Problem, r, Q):
    """Q* to machine precision, by soft policy iteration, which is Newton's method on V = varphi(x, V)."""
    for _ in range(100):
        last = Q
        V = soft_policy_value(problem, r, torch.log_softmax(Q / problem.tau, 1))
        Q = r + problem.gamma * problem.P @ V
        if (Q - last).abs().max() <= 1e-13 * (1 + Q.abs().max()):
            break
    return sweep(problem, r, Q)


# The leader: every method returns a direction, (n,), from x, the follower's Q, and what it remembers from
# round to round


def gradients(problem: Problem, x, pi):
    """grad_x f (n,) and pi o grad_pi f (S, A)."""
    x, pi = x.detach().requires_grad_(), pi.detach().requires_grad_()
    by_x, by_pi = torch.autograd.grad(problem.objective(x, pi), (x, pi))
    return by_x, pi.detach() * by_pi


def pull_back(problem: Problem, x, weights):
    """grad r(x)^T weights, (S, A) -> (n,): grad r itself is never formed."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad((problem.reward(x) * weights).sum(), x)[0]


def adjoint_system(problem: Problem, pi, m):
    """A = (I - gamma P^pi)^T and b = U^T m of w = A^{-1} b."""
    A = torch.eye(len(pi), dtype=pi.dtype) - problem.gamma * transition(problem.P, pi).T
    return A, m.sum(1) - problem.gamma * torch.einsum("sap,sa->p", problem.P, m)


def assemble(problem: Problem, x, by_x, m, policy, w):
    """The three terms of (9); most methods differ in w alone."""
    return by_x + pull_back(problem, x, m - policy * w[:, None]) / problem.tau


def exact(problem, x, Q, memory, args, generator):
    """(9), with the linear system solved."""
    pi = torch.softmax(Q / problem.tau, 1)
    by_x, m = gradients(problem, x, pi)
    return assemble(problem, x, by_x, m, pi, torch.linalg.solve(*adjoint_system(problem, pi, m)))


def m_sobirl(problem, x, Q, memory, args, generator):
    """Algorithm 1: w follows the solution by gradient steps on |Aw - b|^2/2, warm-started; at
    first (the algorithm's input w_0) it is that solution."""
    pi = torch.softmax(Q / problem.tau, 1)
    by_x, m = gradients(problem, x, pi)
    A, b = adjoint_system(problem, pi, m)
    w = memory["w"] if "w" in memory else torch.linalg.solve(A, b)
    xi = args.xi or float(torch.linalg.matrix_norm(A, 2)) ** -2
    for _ in range(args.w_steps):
        w = w - xi * A.T @ (A @ w - b)
    if args.w_solver == "exact":
        w = torch.linalg.solve(A, b)
    memory["w"] = w
    # lambda of grad_x varphi(x, V), with the V of (10)
    policy = torch.softmax(sweep(problem, problem.reward(x), Q) / problem.tau, 1)
    return assemble(problem, x, by_x, m, policy, w)


def unrolled(problem, x, Q, memory, args, generator):
    """Autograd through this round's sweeps; what the rounds before contributed to Q is a constant."""
    x, Q = x.detach().requires_grad_(), memory["Q before"]
    r = problem.reward(x)
    for _ in range(args.sweeps):
        Q = sweep(problem, r, Q)
    return torch.autograd.grad(problem.objective(x, torch.softmax(Q / problem.tau, 1)), x)[0]


def drlhf(problem, x, Q, memory, args, generator):
    """(13) alone: the leader takes the policy for given (Christiano et al., 2017)."""
    return gradients(problem, x, torch.softmax(Q / problem.tau, 1))[0]


def pbrl(problem, x, Q, memory, args, generator):
    """Shen et al. (2024): min f(x, y) + penalty (V*(x) - V^y(x)) over x and a second policy y. y takes mirror
    ascent steps on penalty V^y - f, each towards exp((Q^y - grad_pi f/(penalty d))/tau), d its discounted
    visits to the states."""
    r = problem.reward(x)
    eye = torch.eye(len(Q), dtype=Q.dtype)

    def visits(pi):  # discounted, (S,)
        return torch.linalg.solve(eye - problem.gamma * transition(problem.P, pi).T, problem.rho)

    pi = torch.softmax(Q / problem.tau, 1)
    logits = memory.get("logits", Q / problem.tau)
    step = 1 / (1 + 1 / (args.penalty * problem.tau * (1 - problem.gamma)))
    for _ in range(args.sweeps):
        log_y = torch.log_softmax(logits, 1)
        y = log_y.exp()
        by_y = gradients(problem, x, y)[1] / y.clamp_min(1e-300)
        Q_y = r + problem.gamma * problem.P @ soft_policy_value(problem, r, log_y)
        target = Q_y - by_y / (args.penalty * visits(y)[:, None])
        logits = (1 - step) * log_y + step * target / problem.tau
    y = torch.softmax(logits, 1)
    memory["logits"] = logits
    regret = visits(pi)[:, None] * pi - visits(y)[:, None] * y  # of y, by the entries of r
    return gradients(problem, x, y)[0] + args.penalty * pull_back(problem, x, regret)


def parl(problem, x, Q, memory, args, generator):
    """Chakraborty et al. (2024): implicit differentiation of grad_theta V = 0 for a softmax policy theta. Its
    Hessian is singular, since theta_s + constant is the same policy: pseudo-inverse."""

    def value(theta, x):
        return soft_policy_value(problem, problem.reward(x), torch.log_softmax(theta, 1)).mean()

    x = x.detach().requires_grad_()
    theta = (Q / problem.tau).detach().requires_grad_()
    f = problem.objective(x, torch.softmax(theta, 1))
    by_x, by_theta = torch.autograd.grad(f, (x, theta))
    hessian = torch.func.hessian(value)(theta.detach(), x.detach()).reshape(theta.numel(), -1)
    z = torch.linalg.pinv(hessian, rtol=1e-10, hermitian=True) @ by_theta.flatten()
    slope = torch.autograd.grad(value(theta, x), theta, create_graph=True)[0]
    return by_x - torch.autograd.grad(slope.flatten() @ z, x)[0]


class Sample(NamedTuple):
    """M tuples of trajectories of the leader's objective, and two roll-outs of T steps in the follower's
    problem for each step in them: from its state and action, for grad Q, and from its state alone, for grad
    V."""

    s: torch.Tensor  # (M, tuple_size, H)
    a: torch.Tensor
    alive: torch.Tensor  # bool, False behind a trajectory's end
    after_q: tuple[torch.Tensor, torch.Tensor]  # states and actions, each (V, T), of the V steps alive
    after_v: tuple[torch.Tensor, torch.Tensor]


def walk(P, pi, s, steps: int, generator, a=None):
    """States and actions, each (N, steps), from states s (N,) on, the first actions given or drawn."""
    states, actions = [], []
    for _ in range(steps):
        a = torch.multinomial(pi[s], 1, generator=generator)[:, 0] if a is None else a
        states.append(s)
        actions.append(a)
        s, a = torch.multinomial(P[s, a], 1, generator=generator)[:, 0], None
    return torch.stack(states, 1), torch.stack(actions, 1)


def draw(problem: Problem, pi, args, generator) -> Sample:
    count = args.samples * problem.tuple_size
    length = torch.full((count,), problem.horizon)
    if not problem.horizon:  # geometric, mean 1/(1 - upper_gamma)
        length = 1 + (torch.log(uniform(count, generator=generator)) / math.log(problem.upper_gamma)).long()
    begin = torch.multinomial(problem.rho, count, replacement=True, generator=generator)
    s, a = walk(problem.P, pi, begin, int(length.max()), generator)
    alive = torch.arange(s.shape[1]) < length[:, None]
    after_q = walk(problem.P, pi, s[alive], args.rollout, generator, a[alive])
    after_v = walk(problem.P, pi, s[alive], args.rollout, generator)
    return Sample(*(y.reshape(args.samples, problem.tuple_size, -1) for y in (s, a, alive)), after_q, after_v)


def estimate(problem: Problem, x, pi, sample: Sample, behaviour, args):
    """(15), or with depth "one" (78), at x and pi from a sample of the policy `behaviour`, each part of it
    weighed by its likelihood ratio: the gradient of mean l + (1/tau) mean of l times the sum over steps of (Q
    - V), l in the latter constant."""
    x = x.detach().requires_grad_()
    ratio = pi / behaviour.clamp_min(1e-300)
    s, a, alive = sample.s, sample.a, sample.alive
    weight = torch.where(alive, ratio[s, a], 1.0).flatten(1).prod(1)  # (M,)
    weight = weight.clamp_max(10)  # our own addition
    l = problem.costs(x, s, a, alive).sum(1)
    centred = l.detach()
    if args.baseline:
        centred = centred - (centred.sum() - centred) / (len(l) - 1)
    r = problem.reward(x)
    if args.depth == "one":
        advantage = (r - (pi * r).sum(1, keepdim=True))[s[alive], a[alive]]
    else:
        discount = problem.gamma ** torch.arange(args.rollout, dtype=r.dtype)

        def total(path, odds):  # discounted reward of roll-outs, each step weighed by its likelihood ratio
            return (discount * odds.cumprod(1).clamp_max(10) * r[path]).sum(1)

        first = torch.ones_like(discount[:1]).expand(int(alive.sum()), 1)  # the first action is given
        given = torch.cat([first, ratio[sample.after_q][:, 1:]], 1)
        advantage = total(sample.after_q, given) - total(sample.after_v, ratio[sample.after_v])  # (V,)
    owner = torch.arange(len(l))[:, None, None].expand_as(s)[alive]
    surrogate = (weight * l).mean() + ((weight * centred)[owner] * advantage).sum() / (len(l) * problem.tau)
    return torch.autograd.grad(surrogate, x)[0]


def sobirl(problem, x, Q, memory, args, generator):
    """Algorithm 2: (15) with the policy at hand; without samples its expectation, (9) at that policy."""
    pi = torch.softmax(Q / problem.tau, 1)
    if args.samples:
        return estimate(problem, x, pi, draw(problem, pi, args, generator), pi, args)
    if args.depth == "full":
        return exact(problem, x, Q, memory, args, generator)
    by_x, m = gradients(problem, x, pi)  # (78): what gamma multiplies is dropped
    return assemble(problem, x, by_x, m, pi, m.sum(1))


def momentum_step(previous, new, before, eta: float):
    """h_k = g(x_k) + (1 - eta)(h_{k-1} - g(x_{k-1})), both g from the same sample (STORM)."""
    return new + (1 - eta) * (previous - before)


def stoc_sobirl(problem, x, Q, memory, args, generator):
    """Stoc-SoBiRL: momentum-corrected (15)."""
    pi = torch.softmax(Q / problem.tau, 1)
    sample = draw(problem, pi, args, generator)
    h = estimate(problem, x, pi, sample, pi, args)
    memory["round"] = memory.get("round", 0) + 1
    if "h" in memory:
        before = estimate(problem, memory["x"], memory["pi"], sample, pi, args)
        h = momentum_step(memory["h"], h, before, min(1.0, args.momentum * memory["round"] ** (-2 / 3)))
    memory.update(h=h, x=x, pi=pi)
    return h


def visit_means(values, s, a, S: int, A: int):
    """Mean of values over visits to each (s, a) minus that over visits to s; values, s, a (V,) -> (S, A)."""

    def mean(index, size):
        total = torch.zeros(size, dtype=values.dtype).index_add(0, index, values)
        return total / torch.bincount(index, minlength=size).clamp_min(1)

    return mean(s * A + a, S * A).reshape(S, A) - mean(s, S)[:, None]


def hpgd(problem, x, Q, memory, args, generator):
    """Thoma et al. (2024): (14) with causal advantages of the leader, A_U, in place of l, and grad A of the
    follower as a mean over visits; without samples its expectation."""
    pi = torch.softmax(Q / problem.tau, 1)
    if not args.samples:
        by_x, m = gradients(problem, x, pi)
        m = m - pi * m.sum(1, keepdim=True)  # visits times A_U
        return assemble(problem, x, by_x, m, pi, torch.linalg.solve(*adjoint_system(problem, pi, m)))
    S, A = pi.shape
    sample = draw(problem, pi, args, generator)
    x = x.detach().requires_grad_()
    costs = problem.costs(x, sample.s, sample.a, sample.alive)  # (M, H)
    to_go = costs.detach().flip(1).cumsum(1).flip(1)[:, None].expand(sample.s.shape)[sample.alive]
    s, a = sample.s[sample.alive], sample.a[sample.alive]
    advantage = visit_means(to_go, s, a, S, A)  # A_U
    begin = torch.multinomial(problem.rho, args.samples, replacement=True, generator=generator)
    states, actions = walk(problem.P, pi, begin, 2 * args.rollout, generator)
    rewards = problem.reward(x)[states, actions]
    suffix = 0.0
    sums = []
    for t in reversed(range(2 * args.rollout)):
        suffix = rewards[:, t] + problem.gamma * suffix
        sums.append(suffix)
    first = slice(0, args.rollout)  # whose sums reach at least as far as a roll-out
    values = torch.stack(sums[::-1], 1)[:, first].flatten()
    # grad of it: grad A
    lower = visit_means(values, states[:, first].flatten(), actions[:, first].flatten(), S, A)
    surrogate = costs.sum(1).mean() + (advantage * lower)[s, a].sum() / (args.samples * problem.tau)
    return torch.autograd.grad(surrogate, x)[0]


METHODS = {
    "m-sobirl": m_sobirl,
    "exact": exact,
    "unrolled": unrolled,
    "hpgd": hpgd,
    "pbrl": pbrl,
    "parl": parl,
    "sobirl": sobirl,
    "stoc-sobirl": stoc_sobirl,
    "drlhf": drlhf,
}
FIXED_SWEEPS = ("m-sobirl", "unrolled", "pbrl")


def filled(args: Args, **own) -> Args:
    """args with these values where it has none."""
    return replace(args, **{name: value for name, value in own.items() if getattr(args, name) in (None, "")})


def complete(args: Args) -> tuple[Args, Problem]:
    """The problem, and every flag that was left to it or to the method."""
    problem = PROBLEMS[args.problem](args.seed)
    samples = 64 if args.method in ("hpgd", "stoc-sobirl") else 0
    args = filled(args, gamma=problem.gamma, tau=problem.tau, exp_name=args.method, samples=samples)
    problem = replace(problem, gamma=args.gamma, tau=args.tau)

    beta = problem.beta_sampled if args.samples else problem.beta
    if args.method == "m-sobirl" and args.w_solver == "gd":
        beta = problem.beta_tracking
    beta_decay = 0.0
    if args.method == "stoc-sobirl":
        beta *= 4  # because it falls
        beta_decay = 1 / 3
    rollout = math.ceil(math.log(1e-3) / math.log(problem.gamma)) if problem.gamma > 0 else 1
    args = filled(args, beta=beta, beta_decay=beta_decay, rollout=rollout)

    length = problem.horizon or 1 / (1 - problem.upper_gamma)
    steps = args.samples * problem.tuple_size * length * args.rollout
    if steps > 1e8:
        got = f"got {args.samples}, {steps:.1g} steps: lower it or --rollout"
        fail(f"--samples must leave at most 1e8 steps of roll-outs to a round, {got}")
    return args, problem


def train(args: Args) -> Path:
    args, problem = complete(args)
    generator = torch.Generator().manual_seed(args.seed)
    x = problem.start
    Q = torch.zeros(problem.P.shape[:2], dtype=x.dtype)
    optimum = Q
    memory = {}
    seconds = 0.0

    with Run(args, args.rounds + 1) as run:  # the last round only measures
        lap = run.lap
        for step in run.iterations():
            diverged = f"x has diverged in round {step}: lower --beta {args.beta:g}"
            memory["Q before"] = Q
            sweeps = args.sweeps
            r = problem.reward(x)
            if not r.abs().max() < 1e100:
                raise Stop(diverged)
            if args.method in FIXED_SWEEPS:
                for _ in range(args.sweeps):
                    Q = sweep(problem, r, Q)
            else:
                Q, sweeps = best_response(problem, r, Q, args.tol)
            lap("follower")
            direction = METHODS[args.method](problem, x, Q, memory, args, generator)
            beta = args.beta / (step + 1) ** args.beta_decay
            lap("leader")

            # Measurements, whose time does not count: phi and its gradient with the follower solved exactly
            optimum = solve_follower(problem, r, optimum)
            gradient = exact(problem, x, optimum, {}, args, None)
            pi = torch.softmax(Q / problem.tau, 1)
            best = torch.softmax(optimum / problem.tau, 1)
            phi = float(problem.objective(x, best))
            if not (math.isfinite(phi) and bool(direction.isfinite().all())):
                raise Stop(diverged)
            seconds += lap.seconds["follower"] + lap.seconds["leader"]
            row = {
                "round": step,
                "seconds": round(seconds, 6),
                "phi": phi,
                "gradient_norm": float(gradient.norm()),
                "cosine": float(F.cosine_similarity(direction, gradient, dim=0, eps=1e-300)),
                "direction_norm": float(direction.norm()),
                "policy_error": float((pi - best).abs().max()),
                "sweeps": sweeps,
            }
            row |= {f"seconds_{phase}": round(spent, 6) for phase, spent in lap.seconds.items()}
            norm = row["gradient_norm"]
            run.log(row, f"phi {phi:.6g}  |grad phi| {norm:.3g}  cosine {row['cosine']:.4f}")
            if step < args.rounds:
                x = x - beta * direction

        run.save("solution.pt", {"x": x, "policy": best, "Q": optimum, "phi": phi, "config": run.config})
        known = f", optimum {problem.optimum:g}" if math.isfinite(problem.optimum) else ""
        say(f"{args.rounds:,} rounds in {seconds:.2f} s: phi {phi:.6g}{known}, |grad phi| {norm:.3g}")
        say(f"results in {run.folder}")
    return run.folder


def main(argv: list[str] | None = None) -> Path:
    if argv is None:
        own_process()
    args = parse_args(Args, __doc__, argv)
    check_args(args)
    return train(args)


if __name__ == "__main__":
    main()
