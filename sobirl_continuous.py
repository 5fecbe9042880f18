"""Bilevel reinforcement learning with networks: a reward learned from preferences, for continuous actions.

The leader is a reward net r_x(s, a), which is to predict which of two segments a teacher prefers. l(x) is the
cross-entropy of its predictions on pairs of segments that the follower, who maximises r_x, has played:

    --method sac      no leader, the environment's reward: what the others could reach at best
             drlhf    x follows (13), as if the segments were given: Christiano et al. (arXiv:1706.03741)
             sobirl   (13) + (78): the follower plays the segments, and depends on x; the first step of it
             hpgd     (13) + (14): the whole of it, from discounted sums of rewards along the segments
             pbrl     (13) + a penalty: a second policy, the rival, plays the pairs, and pays for its regret
             random   x stays as it is: what the follower reaches without any preference

Equation numbers are those of Yang, Gao & Yuan (arXiv:2405.19697); leader.py has the formulas.

The follower is soft actor-critic: Haarnoja et al. (arXiv:1812.05905), with the defaults of CleanRL's script.
The actor pi (parameters theta) maximises reward and entropy; two critics Q_1, Q_2 estimate what an action is
worth, and of two estimates the smaller one counts. For every step of the environment, B steps (s, a, s') are
drawn from the replay memory; their rewards are asked of the reward net as it is now, shifted and scaled
(--reward-norm):

    V(s')    = min_i Q'_i(s', a') - alpha log pi(a'|s')                                   a' ~ pi(.|s')
    y        = r + gamma (1 - terminated) V(s')
    critic   a step on  mean (Q_1(s, a) - y)^2 + mean (Q_2(s, a) - y)^2
    Q'       moves by a share tau towards Q
    actor    a step on  mean alpha log pi(a~|s) - min_i Q_i(s, a~)                        a~ ~ pi(.|s)
    alpha    a step on  mean -alpha (log pi(a~|s) + target entropy), in log alpha

Gradients are written out, as products with the networks' Jacobians (jacobian.py). What differs from CleanRL:
a truncated episode bootstraps from the observation that it ended with; networks see actions in (-1, 1), while
log pi is the density in the environment's units, of which small boxes have a lower target entropy; alpha's
step takes the sample that the actor's step took.

Of the --outer-steps steps of an iteration the actor, frozen, or pbrl's rival plays the first --query-steps.
Pairs are cut from these and labelled; x is updated; the follower makes up for missed updates and plays on.
"""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import support  # before the others, because it sets the number of threads, which torch reads when imported

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn

from jacobian import FusedAdam, SquashedGaussian, flatten, jacobian_of, on_device
from leader import BoxReward, Reward, bounded, hyper_gradient, penalty_gradient, preference_gradient
from leader import pairs_at, preference_loss, rival_weights, suffix_gradient
from nystrom import namespace, norm
from support import evaluation
from support.acting import numpy_policy
from support.command import start
from support.environments import Environments
from support.flags import Count, Few, Name, Natural, NonNegative, Positive, Size
from support.flags import UnitInterval, UnitStep, UpToBillion, UpToMillion
from support.preferences import SECOND_TERM, PreferenceFlags, Preferences, accuracy
from support.preferences import check_queries, check_schedule, generator_of, margins_of
from support.replay import Replay, Transitions, check_memory
from support.run_folder import Metrics, Run, finite, generators

# Columns of progress.csv: of every method, and of those with a leader
METRICS = ("alpha", "entropy", "critic_loss", "actor_loss", "q_mean", "skipped_updates")
PHASES = ("inference", "env", "critic", "actor", "bookkeeping")
LEADER = ("ce", "ce_grad_norm", "accuracy_train", "reward_scale")
HYPER = ("hyper_grad_norm", "hyper_cosine", "hyper_bound_active", "hyper_dropped", "score_mean")


@dataclass
class Args(PreferenceFlags):
    env_id: Name = "HalfCheetah-v4"
    """Gymnasium id of an environment whose actions fill a box ("module:id" imports the module first)"""
    method: Literal["sac", "drlhf", "sobirl", "hpgd", "pbrl", "random"] = "sac"
    """sac: maximise the environment's reward; random: one that is never learned;
    drlhf: one learned from pairs as if they were given;
    sobirl: also by a second term, since pairs depend on the policy; hpgd: the same by discounted sums;
    pbrl: with a penalty instead, while a second policy, the rival, plays the pairs"""
    total_timesteps: Count = 1_000_000
    """environment steps in total, rounded down to whole iterations"""
    exp_name: Name = ""
    """name of the experiment, part of the run folder's name (empty: the method's name)"""
    outer_steps: UpToMillion = 1_000
    """environment steps of an iteration; there is a row of progress.csv for every iteration"""
    checkpoint_every: UpToMillion = 10
    """iterations between checkpoints"""
    buffer_size: UpToBillion = 1_000_000
    """rows of the replay memory: a step is one, the end of an episode another one"""
    keep_replay: bool = False
    """keep replay.bin when the run has ended, so that --total-timesteps may grow afterwards"""
    batch_size: UpToMillion = 256
    """steps that an update is an average over"""
    learning_starts: Natural = 5_000
    """steps at random before the first update"""
    policy_lr: UnitStep = 3e-4
    """Adam step size of the actor, and of pbrl's rival"""
    q_lr: UnitStep = 1e-3
    """Adam step size of the critics, and of log alpha"""
    anneal_lr: bool = False
    """decay --policy-lr and --q-lr linearly to 0, over --anneal-timesteps if it is given"""
    hidden_size: Size = 256
    """width of the two hidden layers of actor and critics"""
    gamma: UnitInterval = 0.99
    """discount factor"""
    tau: UnitStep = 0.005
    """share of the way to the critics that their targets go with every update"""
    policy_frequency: Count = 2
    """the actor is updated after every so many updates of the critics, as many times in a row"""
    alpha: Positive = 1.0
    """temperature, the weight of the entropy: where it begins with --autotune, where it stays without"""
    autotune: bool = True
    """learn alpha, so that the entropy becomes minus the number of an action's components,
    and less by as much as the largest entropy is less where the box is smaller than [-1, 1]"""

    # The leader
    reward_lr: UnitStep = 1e-3
    """AdamW step size of the reward net"""
    reward_decay: NonNegative = 1e-2
    """AdamW weight decay of the reward net"""
    reward_epochs: Count = 8
    """passes over the queue in an iteration"""
    initial_epochs: Count = 50
    """passes over the first pairs"""
    reward_batch_size: UpToMillion = 64
    """pairs of an update of the reward net"""
    reward_hidden_size: Size = 64
    """width of the two hidden layers of the reward net"""
    reward_members: Few = 1
    """reward nets, of which the mean counts"""
    reward_input: Literal["state-action", "state"] = "state-action"
    """what the reward net sees"""
    reward_output: Literal["linear", "tanh"] = "linear"
    """linear: any rewards (what the follower sees ends at +-10, after --reward-norm); tanh: in (-1, 1)"""
    reward_norm: bool = True
    """shift and scale what the follower sees, to mean 0 and deviation 1 over the last 10,000 steps"""
    hyper_bound: NonNegative = 0.3
    """sobirl, hpgd: largest norm of the second term, in units of that of drlhf's gradient (0: unbounded)"""
    hyper_pairs: Literal["fresh", "queue"] = "fresh"
    """sobirl, hpgd: pairs in the second term, those of the last query alone or of the whole queue"""
    hyper_batch_size: UpToMillion = 16
    """pairs in the second term of an update, if fresh (pbrl: in its penalty and in the rival's update)"""
    hyper_actions: Few = 4
    """sobirl: actions sampled in every state, whose mean reward is what the policy expects there"""
    hyper_steps: Natural = 0
    """updates with the second term, or pbrl's penalty: the last ones of an iteration (0: all)"""
    hyper_start: Natural = 0
    """environment steps before the second term, or pbrl's penalty, is taken"""
    hyper_coef_max: NonNegative = 0.0
    """sobirl, hpgd: largest factor of the second term, 1/(temperature * reward_scale) (0: any)"""
    baseline: bool = True
    """subtract a mean of pairs' losses from each one in the second term (pbrl: in the rival's update;
    hpgd does so in any case)"""
    penalty: Positive = 0.01
    """pbrl: weight of the rival's regret, what its segments' learned rewards lack to the follower's"""

    # What environments ask for, and has no flag here: one of them, as it is
    num_envs = 1
    norm_obs = False
    norm_reward = False

    @property
    def leads(self) -> bool:
        """Whether there is a reward net."""
        return self.method != "sac"

    @property
    def hyper(self) -> bool:
        """Whether there is a second term."""
        return self.method in ("sobirl", "hpgd", "pbrl")

    @property
    def usual_name(self) -> str:
        return self.method


def check_args(args: Args) -> None:
    """Rules between several flags; the range of a single one is part of its type."""
    check_schedule(args, {"policy_frequency": args.policy_frequency})
    check_memory(args)
    if args.leads:
        check_queries(args)


# Networks


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, outputs),
    )


class Actor(nn.Module):
    """Gaussian policy whose samples are squashed into (-1, 1), which the environment's box is scaled to."""

    def __init__(self, obs_dim: int, outputs: int, hidden: int = 256, device: str = "cpu"):
        super().__init__()
        self.net = mlp(obs_dim, hidden, outputs)  # the means of an action's components, then their deviations
        self.vector = flatten(self, device)  # theta: an array that the parameters are views of
        self.jacobian = jacobian_of(self.net)
        self.action_size = outputs // 2

    def noise(self, *shape, generator=None):
        """What makes the mean a sample, (*shape, action_size)."""
        return torch.randn(*shape, self.action_size, generator=generator).numpy()

    def policy(self, obs, log_half: float):
        """The Jacobian at obs (B, obs_dim), and the policy with an action in each of these states."""
        J = self.jacobian(obs)
        noise = on_device(self.noise(len(obs)), obs.device)
        return J, SquashedGaussian(J.outputs, noise, log_half)

    @staticmethod
    def act(outputs, noise):
        """Actions (n, action_size) from the outputs of net; noise 0 gives the squashed means."""
        return SquashedGaussian(outputs, noise).actions

    @staticmethod
    def for_env(actions, space):
        """What environments take, from actions (n, action_size)."""
        within = actions.reshape(len(actions), *space.shape)
        scaled = space.low + (within + 1) / 2 * (space.high - space.low)
        return scaled.clip(space.low, space.high).astype(space.dtype)


class Critic(nn.Module):
    """Two networks, Q_1 and Q_2."""

    def __init__(self, obs_dim: int, action_size: int, hidden: int = 256, device: str = "cpu"):
        super().__init__()
        self.nets = nn.ModuleList(mlp(obs_dim + action_size, hidden, 1) for _ in range(2))
        self.vector = flatten(self, device)
        self.jacobian_of_each = [jacobian_of(net) for net in self.nets]

    def values(self, obs, actions):
        """The Jacobians of Q_1 and Q_2 at obs (B, obs_dim) and actions (B, action_size), and what the two are
        there (2, B)."""
        xp = namespace(obs)
        x = xp.concatenate([obs, actions], 1)
        both = [jacobian(x) for jacobian in self.jacobian_of_each]
        return both, xp.stack([J.outputs[:, 0] for J in both])

    def moves_to(self, other, share: float) -> None:
        torch.as_tensor(self.vector).lerp_(torch.as_tensor(other.vector), share)


class Temperature(nn.Module):
    """alpha, known by its logarithm."""

    def __init__(self, alpha: float):
        super().__init__()
        self.log_alpha = nn.Parameter(torch.tensor([math.log(alpha)]))
        self.vector = flatten(self)

    @property
    def alpha(self) -> float:
        return math.exp(self.vector[0])


# Losses, and their gradients


def soft_value(values, log_prob, alpha: float):
    """An estimate of the soft value V (B,), from the two values (2, B) of an action and its log pi (B,)."""
    return namespace(values).amin(values, 0) - alpha * log_prob


def critic_gradient(critic: Critic, obs, actions, y):
    """Mean squared error of each critic (their mean), the mean value, and the gradient (p,) of the sum."""
    both, values = critic.values(obs, actions)
    error = values - y
    parts = [(2 / len(y) * e)[:, None] @ J for e, J in zip(error, both)]
    return float((error * error).mean()), float(values.mean()), namespace(y).concatenate(parts)


def actor_gradient(J, policy: SquashedGaussian, critic: Critic, obs, alpha: float):
    """mean (alpha log pi - min_i Q_i) over the policy's actions, and its gradient (p,) by theta, on which the
    actions depend. In each state it goes through the smaller one of the critics."""
    xp, B = namespace(obs), len(obs)
    both, values = critic.values(obs, policy.actions)
    first = values[0] <= values[1]
    by_values = xp.stack([first, ~first]) * xp.full_like(values, -1 / B)  # (2, B)
    by_inputs = sum(Q.by_input(by_value[:, None]) for Q, by_value in zip(both, by_values))
    by_log_prob = xp.full_like(policy.log_prob, alpha / B)
    loss = -float(soft_value(values, policy.log_prob, alpha).mean())
    return loss, policy.gradient(by_inputs[:, obs.shape[1] :], by_log_prob) @ J


def temperature_gradient(log_prob, alpha: float, target_entropy: float):
    """Of mean -alpha (log pi + target entropy) by log alpha, (1,)."""
    return np.array([-alpha * (float(log_prob.mean()) + target_entropy)])


# The leader


def second_term(reward: Reward, actor: Actor, alpha, preferences: Preferences, generator, args: Args, places):
    """(78), in which a' are samples of the policy, or with hpgd (14): gradient and mean score. Of pairs of
    the last query, or, where they may be any, of those at these places in the queue."""
    if args.hyper_pairs == "fresh":
        places = preferences.some_fresh(args.hyper_batch_size, generator)
    pairs = pairs_at(places, preferences, args.device)
    if args.method == "hpgd":  # its sums are deviations from their own mean: there is no score
        return suffix_gradient(reward, pairs, args.gamma, alpha, args.baseline), math.nan
    A, xp = args.hyper_actions, namespace(pairs.obs)
    outputs = actor.jacobian(pairs.obs.reshape(-1, pairs.obs.shape[-1])).outputs
    noise = on_device(actor.noise(A * len(outputs), generator=generator), args.device)
    others = SquashedGaussian(xp.tile(outputs, (A, 1)), noise).actions.reshape(A, *pairs.actions.shape)
    chances = xp.full_like(others[..., 0], 1 / A)
    return hyper_gradient(reward, pairs, others, chances, alpha, args.baseline)


def penalty_term(reward: Reward, preferences: Preferences, begin: int, args: Args, _):
    """pbrl: gradient and regret, of the rival's segments, from the row `begin` on, against those that the
    follower has played before."""
    since = preferences.replay.recent(args.outer_steps)[0]  # where, an iteration ago, the rival had ended
    best = preferences.segments(since, args.hyper_batch_size, 2, end=begin)
    rival = preferences.segments(begin, args.hyper_batch_size, 2)
    if not len(best):  # all of the follower's episodes were too short: there is nothing to compare with
        return 0 * reward.vector, math.nan
    return penalty_gradient(reward, preferences.steps(best), preferences.steps(rival), args.penalty)


def log_probs_of(rival: Actor, pairs):
    """pbrl: the log-probabilities (M, 2, L) that the rival gives to what was done in pairs, its policy there
    and the Jacobian."""
    J = rival.jacobian(pairs.obs.reshape(-1, pairs.obs.shape[-1]))
    policy = SquashedGaussian.of(J.outputs, pairs.actions.reshape(len(J.outputs), -1))
    policy.noise = policy.noise.clip(-6, 6)  # an action at the edge of the box hides how far beyond u was
    return policy.log_prob.reshape(pairs.obs.shape[:-1]), policy, J


def rival_gradient(rival: Actor, played, reward: Reward, preferences: Preferences, generator, args: Args):
    """pbrl: what E[l], in units of the penalty for a step, adds to the rival's gradient. REINFORCE, of a few
    of the pairs that it played last, with the log-probabilities `played` (M, 2, L) of all of them."""
    places = preferences.some_fresh(args.hyper_batch_size, generator)
    pairs = pairs_at(places, preferences, args.device)
    losses, _ = preference_loss(margins_of(reward.at(pairs.obs, pairs.actions)[1]), pairs.labels)
    log_probs, policy, J = log_probs_of(rival, pairs)
    log_ratio = log_probs - played[places - preferences.fresh[0]]
    by_log_probs = rival_weights(losses.mean(0), log_ratio, args.baseline)
    return policy.score(by_log_probs.reshape(-1)) @ J / (args.penalty * args.segment)


def train_reward(reward: Reward, adam, preferences, epochs: int, second, metrics: Metrics, lap, args: Args):
    """Steps of x along minus (13) and, if given, the `second` term, a function of places in the queue."""
    metrics.add(reward_scale=reward.std)  # the same in all updates
    batches = list(preferences.minibatches(epochs, args.reward_batch_size))
    for left, places in zip(range(len(batches), 0, -1), batches):
        pairs = pairs_at(places, preferences, args.device)
        losses, margins, gradient = preference_gradient(reward, pairs)
        metrics.add(ce=losses.mean(), ce_grad_norm=norm(gradient))
        metrics.add(accuracy_train=accuracy(margins.mean(0), pairs.labels - 0.5))
        if second and (left <= args.hyper_steps or not args.hyper_steps):
            lap("reward")
            term, score = second(places)
            gradient, found = bounded(gradient, term, 0 if args.method == "pbrl" else args.hyper_bound)
            metrics.add(score_mean=score, **found)
            lap("hyper")
        adam.step(gradient)
        metrics.add(skipped_updates=adam.skipped)


def box_of(args: Args, space) -> float:
    """Refuses a box that squashed actions cannot fill; the sum of the logarithms of half its sides."""
    filled = (np.isfinite(space.low) & np.isfinite(space.high) & (space.low < space.high)).all()
    args.require("env_id", filled, f"have actions in a bounded box, not in {space}")
    return float(np.log((space.high.astype(float) - space.low) / 2).sum())


def train(args: Args, checkpoint: dict | None = None) -> Path:
    """Trains, writes the run folder and returns it; goes on from a checkpoint if there is one."""
    iterations = args.total_timesteps // args.outer_steps
    envs = Environments(args, actions=gym.spaces.Box)
    obs_dim, action_size = envs.obs_dim, envs.action_size
    log_half = box_of(args, envs.action_space)
    # The largest entropy is K log 2 + log_half. In a small box it may be less than CleanRL's target, -K, for
    # which alpha would grow without bound: where it is less than in [-1, 1]^K, the target is less by as much
    target_entropy = min(0.0, log_half) - action_size
    torch.manual_seed(args.seed)
    actor = Actor(obs_dim, 2 * action_size, args.hidden_size, args.device)
    critic = Critic(obs_dim, action_size, args.hidden_size, args.device)
    target = Critic(obs_dim, action_size, args.hidden_size, args.device)
    target.moves_to(critic, 1.0)
    temperature = Temperature(args.alpha)
    actor_adam = FusedAdam(actor.vector, args.policy_lr)
    critic_adam = FusedAdam(critic.vector, args.q_lr)
    alpha_adam = FusedAdam(temperature.vector, args.q_lr)
    replay = Replay(args, obs_dim, action_size, 2 * args.checkpoint_every * args.outer_steps)
    if args.leads:
        reward = BoxReward(obs_dim, action_size, args)
        reward_adam = FusedAdam(reward.vector, args.reward_lr, args.reward_decay)
        preferences = Preferences(args, replay, reward.predict)
        hyper = generator_of(args, SECOND_TERM)

    # All that the iterations to come depend on: a checkpoint is the state of these
    parts = dict(actor=actor, critic=critic, target=target, temperature=temperature)
    parts |= dict(actor_adam=actor_adam, critic_adam=critic_adam, alpha_adam=alpha_adam)
    parts |= dict(envs=envs, replay=replay, **generators(args))
    if args.leads:
        parts |= dict(reward=reward, reward_adam=reward_adam, preferences=preferences, hyper=hyper)
    if args.method == "pbrl":
        rival = Actor(obs_dim, 2 * action_size, args.hidden_size, args.device)
        rival_adam = FusedAdam(rival.vector, args.policy_lr)
        parts |= dict(rival=rival, rival_adam=rival_adam)

    with Run(args, iterations, parts, checkpoint) as run:  # a Stop raised in here ends it with one line
        envs.begin(run)  # first observations; of a resumed run, iterations() then restores the checkpoint
        replay.begin(run)
        lap = run.lap  # lap(phase) adds the time since the last lap to the phase; envs.step laps "env"
        lap.phases = PHASES + ("reward",) * args.leads + ("hyper",) * args.hyper
        for iteration in run.iterations():  # begins at the checkpoint, if any, and writes the next ones
            metrics = Metrics(*METRICS, *LEADER * args.leads, *HYPER * args.hyper)
            if args.anneal_lr:
                left = 1 - iteration / ((args.anneal_timesteps or args.total_timesteps) // args.outer_steps)
                actor_adam.lr = left * args.policy_lr
                critic_adam.lr = alpha_adam.lr = left * args.q_lr
                if args.method == "pbrl":
                    rival_adam.lr = actor_adam.lr

            begin = replay.written  # the first row of the iteration
            updated = envs.steps  # steps of the environment for which there has been an update
            for t in range(args.outer_steps):
                # A step. The policy acts in NumPy: PyTorch's cost per call outweighs a single observation
                obs = envs.obs.copy()
                if envs.steps < args.learning_starts:
                    action = 2 * torch.rand(1, action_size).numpy() - 1
                else:
                    player = rival if args.method == "pbrl" and t < args.query_steps else actor
                    outputs = finite(numpy_policy(player.net)(obs), "the policy diverged: lower --policy-lr")
                    action = actor.act(outputs, actor.noise(1))
                lap("inference")
                step = envs.step(actor.for_env(action, envs.action_space))
                replay.add(obs[0], action[0], *(x[0] for x in step))
                lap("bookkeeping")
                if envs.steps <= args.learning_starts:
                    updated = envs.steps
                    continue

                # The leader's turn, after steps in which the follower only acts
                if args.leads and t + 1 < args.query_steps:
                    continue
                if args.leads and t + 1 == args.query_steps:
                    epochs = args.reward_epochs if preferences.queries else args.initial_epochs
                    second = None
                    due = args.hyper and preferences.queries and envs.steps >= args.hyper_start
                    if due and args.method == "pbrl":
                        second = partial(penalty_term, reward, preferences, begin, args)
                    elif due:
                        alpha = max(temperature.alpha * reward.std, 1 / (args.hyper_coef_max or math.inf))
                        second = partial(second_term, reward, actor, alpha, preferences, hyper, args)
                    preferences.query(begin)
                    if args.method == "pbrl" and preferences.queries > 1 and len(preferences.fresh):
                        played = log_probs_of(rival, pairs_at(preferences.fresh, preferences, args.device))[0]
                    if len(preferences.fresh) and args.method != "random":
                        train_reward(reward, reward_adam, preferences, epochs, second, metrics, lap, args)
                    if args.reward_norm:
                        reward.normalise(replay.taken(replay.recent(10_000)))
                    lap("reward")

                for updated in range(updated + 1, envs.steps + 1):
                    # The critics' update
                    mb = Transitions(*(on_device(x, args.device) for x in replay.sample(args.batch_size)))
                    rewards = reward.seen(mb.obs, mb.actions) if args.leads else mb.rewards
                    _, policy = actor.policy(mb.next_obs, log_half)
                    _, next_values = target.values(mb.next_obs, policy.actions)
                    next_soft = soft_value(next_values, policy.log_prob, temperature.alpha)
                    y = rewards + args.gamma * (1 - mb.terminated) * next_soft
                    loss, value, gradient = critic_gradient(critic, mb.obs, mb.actions, y)
                    critic_adam.step(gradient)
                    target.moves_to(critic, args.tau)
                    metrics.add(critic_loss=loss, q_mean=value, skipped_updates=critic_adam.skipped)
                    lap("critic")

                    # The actor's updates, and those of alpha, as many as it has missed
                    for _ in range(args.policy_frequency * (updated % args.policy_frequency == 0)):
                        alpha = temperature.alpha
                        J, policy = actor.policy(mb.obs, log_half)
                        loss, gradient = actor_gradient(J, policy, critic, mb.obs, alpha)
                        actor_adam.step(gradient)
                        if args.autotune:
                            alpha_adam.step(temperature_gradient(policy.log_prob, alpha, target_entropy))
                        metrics.add(actor_loss=loss, entropy=-policy.log_prob.mean(), alpha=alpha)
                        metrics.add(skipped_updates=actor_adam.skipped)
                        if args.method == "pbrl":
                            J, policy = rival.policy(mb.obs, log_half)
                            _, gradient = actor_gradient(J, policy, critic, mb.obs, alpha)
                            if preferences.queries > 1 and len(preferences.fresh):
                                gradient += rival_gradient(rival, played, reward, preferences, hyper, args)
                            rival_adam.step(gradient)
                    lap("actor")

            evaluated = evaluation.during_training(run, iteration, actor, envs, args)
            known, shown = envs.statistics(), "alpha {alpha:.3g}"
            if args.leads:
                known, shown = known | preferences.measured, shown + "  accuracy {accuracy_fresh:.2f}"
            run.log_means(envs.steps, known, metrics, evaluated, shown)
        evaluation.finish(run, actor, critic, envs, args, **(dict(reward=reward) if args.leads else {}))
        replay.end()
    return run.folder


def main(argv: list[str] | None = None) -> Path | None:
    return start(Args, check_args, train, Actor, __doc__, argv)


if __name__ == "__main__":
    main()
