"""The leader of bilevel reinforcement learning: a reward net, and the gradients of its losses on pairs.

The net r_x(s, a) is to predict which of two segments of L steps is preferred:

    l = -y log q - (1 - y) log(1 - q),    q = sigmoid(R_1 - R_2),    R_i = sum_h r_x(s_h^i, a_h^i)

Equation numbers are those of Yang, Gao & Yuan (arXiv:2405.19697). There the pairs are played by the policy pi
that maximises r_x and entropy with weight alpha. It depends on x by grad log pi = (grad Q - grad V) / alpha,
so that the gradient of E[l] has two terms, the second one with grad Q and grad V of the follower:

    (13)    E[grad l]
    (14)    (1/alpha) E[(l - b) sum_{i,h} (grad Q(s, a) - grad V(s))]
    (78)    (1/alpha) E[(l - b) sum_{i,h} (grad r_x(s, a) - E_a' grad r_x(s, a'))],    a' ~ pi(.|s)

(78) keeps of (14) the first step. The baseline b, the mean loss of the other pairs, is not in the paper: it
changes no expectation where pairs are independent and pi has played them, since that of the sum is 0 then.
(Pairs of one query may share steps, where episodes terminate no segment crosses an end, and that the states
in which segments begin depend on pi, too, neither (14) nor (78) takes into account.) With
--reward-norm the follower maximises (r_x - m) / s, cut at +-10, so that s alpha stands for alpha; m and s
count as constants, although they depend on x, and the cut as if it were not there. Of several members pi
maximises the mean, and the leader's loss is the sum of theirs: l in the second term is the mean.
A loss that has one of these as its gradient is linear in r_x and has no minimum; what keeps it in check is
`bounded`, with a bound.

The penalty method (PBRL: Shen, Yang & Chen, arXiv:2402.06886) differentiates no policy. The pairs are played
by a second one, the leader's own, and the leader pays for what that one's return lacks to the follower's:

    E[grad l] + lambda (grad R of the follower's segments - grad R of the rival's)

with R in the units that the follower sees. This term is linear in r_x, too. It is taken as it is, without a
bound: lambda says how much it counts. While the follower is the worse one, the leader is paid for that. The
rival descends the same objective, E[l] - lambda R, the first part by REINFORCE. Its pairs serve for many
updates, while it goes on from the policy that has played them: without PPO's clipped ratio (Schulman et al.,
arXiv:1707.06347) it would make pairs of a high loss less and less likely, without end.
"""

import math

import numpy as np
import torch
from torch import nn

from jacobian import flatten, jacobian_of, on_device, one_hot
from nystrom import namespace, norm
from support.preferences import Pairs, Preferences, margins_of

LARGEST = 10_000_000  # numbers in the observations that are predicted at once


def mlp(inputs: int, hidden: int, outputs: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden),
        nn.Tanh(),
        nn.Linear(hidden, hidden),
        nn.Tanh(),
        nn.Linear(hidden, outputs),
    )


class Reward(nn.Module):
    """r_x(s, a): the mean of --reward-members networks, each of which learns by itself. What they see of
    states and actions is up to BoxReward and ChoiceReward, which make the networks."""

    def __init__(self, nets: list[nn.Module], args):
        super().__init__()
        self.args = args
        self.nets = nn.ModuleList(nets)
        self.vector = flatten(self, args.device)  # x
        self.jacobian_of_each = [jacobian_of(net) for net in self.nets]
        # What --reward-norm takes away. No preference tells of a constant that all rewards have in common:
        # where a linear net has one output, the gradient by its bias is rounding, of which Adam makes steps
        self.register_buffer("mean_std", torch.tensor([0.0, 1.0]))
        self.eval()

    def jacobians(self, obs, actions):
        """Those of the members' outputs, and the shape of the rewards."""
        raise NotImplementedError

    def at(self, obs, actions):
        """The members' Jacobians and rewards (members, ...), at actions (..., K) in the states obs
        (..., obs_dim), of which there may be several in each."""
        xp = namespace(obs)
        each, shape = self.jacobians(obs, actions)
        outputs = xp.stack([J.outputs.reshape(shape) for J in each])
        return each, xp.tanh(outputs) if self.args.reward_output == "tanh" else outputs

    def gradient(self, each, rewards, by_rewards):
        """(p,), from the derivatives of a loss by the members' rewards, (members, ...)."""
        slope = 1 - rewards * rewards if self.args.reward_output == "tanh" else 1.0
        parts = [by_output.reshape(-1, 1) @ J for by_output, J in zip(by_rewards * slope, each)]
        return namespace(rewards).concatenate(parts)

    @property
    def std(self) -> float:
        """What the follower's rewards have been divided by."""
        return float(self.mean_std[1])

    @torch.no_grad()
    def seen(self, obs, actions):
        """What the follower sees, (...)."""
        mean, std = self.mean_std.tolist()
        return ((self.at(obs, actions)[1].mean(0) - mean) / std).clip(-10, 10)

    def normalise(self, steps) -> None:
        """From now on the follower sees rewards of mean 0 and deviation 1 over these steps."""
        rewards = self.predict(steps.obs, steps.actions).mean(0)
        rounding = 1e-6 * (1 + abs(rewards.mean()))  # all that a net may have that is the same everywhere
        self.mean_std[:] = torch.tensor([rewards.mean(), max(rewards.std(), rounding)])

    @torch.no_grad()
    def predict(self, obs, actions) -> np.ndarray:
        """The members' rewards (members, ...), of NumPy's arrays obs (..., obs_dim) and actions, on any
        device; of so many at a time that images take no more than some 100 MB."""
        shape, size = obs.shape[:-1], obs.shape[-1]
        obs = obs.reshape(-1, size)
        actions = actions.reshape(len(obs), *actions.shape[len(shape) :])
        count = max(1, min(len(obs), LARGEST // size))
        found = []
        for begin in range(0, len(obs), count):
            part = (x[begin : begin + count] for x in (obs, actions))
            rewards = self.at(*(on_device(x, self.args.device) for x in part))[1]
            found.append(torch.as_tensor(rewards).cpu().numpy())
        return np.concatenate(found, 1).reshape(-1, *shape) if found else np.zeros((len(self.nets), *shape))


class BoxReward(Reward):
    """For actions (..., K) that are vectors: a network sees state and action, with --reward-input state the
    state alone."""

    def __init__(self, obs_dim: int, action_size: int, args):
        inputs = obs_dim + (action_size if args.reward_input == "state-action" else 0)
        super().__init__([mlp(inputs, args.reward_hidden_size) for _ in range(args.reward_members)], args)

    def jacobians(self, obs, actions):
        xp, shape = namespace(obs), actions.shape[:-1]
        x = obs if obs.shape[:-1] == shape else xp.broadcast_to(obs, (*shape, obs.shape[-1]))
        if self.args.reward_input == "state-action":
            x = xp.concatenate([x, actions], -1)
        return [jacobian(x.reshape(-1, x.shape[-1])) for jacobian in self.jacobian_of_each], shape


class ChoiceReward(Reward):
    """For actions (...) that are numbers of choices: a network, made by the script's `network` of
    inputs, width and outputs, sees the state, and has an output for every action; for none of them with
    --reward-input state."""

    def __init__(self, inputs, choices: int, args, network):
        outputs = choices if args.reward_input == "state-action" else 1
        size = args.reward_hidden_size
        super().__init__([network(inputs, size, outputs) for _ in range(args.reward_members)], args)

    def jacobians(self, obs, actions):
        """A network sees a state once, however many actions there are in it."""
        states = obs.reshape(-1, obs.shape[-1])
        choices = actions if self.args.reward_input == "state-action" else 0 * actions
        return [Chosen(jacobian(states), choices) for jacobian in self.jacobian_of_each], actions.shape


class Chosen:
    """Of a Jacobian J at n inputs with K outputs those of the chosen ones, `choices` (m n numbers): m of the
    outputs at the first input, ..., at the last one."""

    __array_ufunc__ = None  # so that NumPy leaves s @ J to __rmatmul__

    def __init__(self, J, choices):
        self.J = J
        self.chosen = one_hot(choices.reshape(-1, len(J.outputs)), J.outputs)  # (m, n, K)
        self.outputs = (self.chosen * J.outputs).sum(-1)  # (m, n)

    def __rmatmul__(self, s):
        """s J: (m n, 1) -> (p,), the gradient of sum(s * outputs)."""
        return (s.reshape(*self.outputs.shape, 1) * self.chosen).sum(0) @ self.J


def pairs_at(places, preferences: Preferences, device: str) -> Pairs:
    """Those at these places in the queue, as what a reward net calculates with."""
    return Pairs(*(on_device(x, device) for x in preferences.pairs(places)))


# Losses, and their gradients


def preference_loss(margins, labels):
    """Cross-entropies l (..., M) of q = sigmoid(margins), the R_1 - R_2, with labels (M,), and their
    derivatives q - y by the margins."""
    xp = namespace(margins)
    losses = xp.log1p(xp.exp(-abs(margins))) + margins.clip(0) - labels * margins
    return losses, 0.5 * (1 + xp.tanh(margins / 2)) - labels


def by_step(by_margins, rewards):
    """The derivatives (..., M, 2, L) by the rewards, from those by their margins (..., M)."""
    result = namespace(rewards).ones_like(rewards) * by_margins[..., None, None]
    result[..., 1, :] *= -1
    return result


def preference_gradient(reward: Reward, pairs: Pairs):
    """(13): the losses and margins (members, M), and the gradient (p,) of the mean loss. Dropout and batch
    norm, where networks have them, act here alone: not in the rewards that the follower sees, nor in the
    second term, which is a derivative of these."""
    reward.train()
    each, rewards = reward.at(pairs.obs, pairs.actions)  # (members, M, 2, L)
    reward.eval()
    margins = margins_of(rewards)
    losses, by_margins = preference_loss(margins, pairs.labels)
    return losses, margins, reward.gradient(each, rewards, by_step(by_margins / len(pairs.labels), rewards))


def hyper_weights(losses, alpha: float, baseline: bool):
    """(l - b) / alpha of each pair, divided by the number of pairs, (M,): what the sums of (14) and (78) are
    weighed with, from the losses l (M,), which count as constants there."""
    M = len(losses)
    others = (losses.sum() - losses) / max(M - 1, 1)
    return (losses - others if baseline else losses) / (alpha * M)


def hyper_gradient(reward: Reward, pairs: Pairs, others, chances, alpha: float, baseline: bool):
    """(78), with E_a' r(s, a') = sum_j chances_j r(s, a'_j), over the actions `others` (A, M, 2, L, ...) with
    chances (A, M, 2, L): the gradient (p,), and the mean over pairs of the sum that it weighs."""
    xp = namespace(pairs.obs)
    actions = xp.concatenate([pairs.actions[None], others])
    each, rewards = reward.at(pairs.obs, actions)  # (members, 1 + A, M, 2, L)
    losses, _ = preference_loss(margins_of(rewards[:, 0]), pairs.labels)
    expected = (chances * rewards[:, 1:]).sum(1)
    weights = hyper_weights(losses.mean(0), alpha, baseline)
    by_rewards = xp.ones_like(rewards) * weights[:, None, None]
    by_rewards[:, 1:] *= -chances
    return reward.gradient(each, rewards, by_rewards), (rewards[:, 0] - expected).sum((-2, -1)).mean()


def rival_weights(losses, log_ratio, baseline: bool):
    """The derivatives (M, 2, L) of E[l], by the log-probabilities that the rival gives to what was done in
    pairs with the losses l (M,), which count as constants. They are those of PPO's clipped surrogate in
    every step: mean of sum_{i,h} max(w ratio, w clip(ratio, 0.8, 1.2)) with w = l - b, b the mean loss. The
    ratio's logarithm (M, 2, L) is 0 where the rival is still what it was when it played."""
    weights = (losses - losses.mean() if baseline else losses)[:, None, None] / len(losses)
    ratio = namespace(losses).exp(log_ratio.clip(-20, 20))
    unclipped = weights * ratio
    return (unclipped >= weights * ratio.clip(0.8, 1.2)) * unclipped


def suffix_gradient(reward: Reward, pairs: Pairs, gamma: float, alpha: float, baseline: bool):
    """(14), a gradient (p,), where Q(s_h, a_h) is the discounted sum of rewards from h to the end of the
    segment, and V the mean of such sums over all segments. It is biased, since l depends on the same steps.
    In the sum over h the reward of the step k has the weight sum_{h <= k} gamma^(k-h)."""
    each, rewards = reward.at(pairs.obs, pairs.actions)
    steps = namespace(rewards).empty_like(rewards[0, 0, 0])  # (L,)
    steps[:] = on_device(np.cumsum(gamma ** np.arange(len(steps))), rewards.device)
    losses, _ = preference_loss(margins_of(rewards), pairs.labels)
    weights = hyper_weights(losses.mean(0), alpha, baseline)
    by_sums = (weights - weights.mean())[:, None, None]  # each sum is also a part of the mean
    return reward.gradient(each, rewards, by_sums * steps * namespace(rewards).ones_like(rewards))


def penalty_gradient(reward: Reward, best, rival, weight: float):
    """The gradient (p,) of weight times the mean of R over the segments `best` minus that over `rival`, each
    of them steps (n, 2, L, ...) of NumPy, summed over the members; and that difference, of their mean. R is
    in the units that the follower sees."""
    obs = on_device(np.stack([best.obs, rival.obs]), reward.args.device)
    actions = on_device(np.stack([best.actions, rival.actions]), reward.args.device)
    each, rewards = reward.at(obs, actions)  # (members, 2, n, 2, L)
    by_rewards = namespace(rewards).full_like(rewards, weight / (2 * len(best.obs) * reward.std))
    by_rewards[:, 1] *= -1
    returns = rewards.sum(-1).mean((0, 2, 3))
    return reward.gradient(each, rewards, by_rewards), (returns[0] - returns[1]) / reward.std


def bounded(direct, second, bound: float):
    """direct + second (p,), the latter shrunk to the norm bound * ||direct|| where it is longer, and not at
    all if bound is 0; dropped if not finite; and metrics."""
    size, second_size = norm(direct), norm(second)
    if not math.isfinite(second_size):
        nothing = dict.fromkeys(("hyper_grad_norm", "hyper_cosine", "hyper_bound_active"), math.nan)
        return direct, {"hyper_dropped": 1.0} | nothing
    cosine = float(direct @ second) / max(size * second_size, 1e-30)
    scale = min(1.0, bound * size / max(second_size, 1e-30)) if bound else 1.0
    return direct + scale * second, {
        "hyper_dropped": 0.0,
        "hyper_grad_norm": second_size,
        "hyper_cosine": cosine,
        "hyper_bound_active": float(scale < 1),
    }
