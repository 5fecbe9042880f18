"""Bilevel reinforcement learning with networks: a reward learned from preferences, for discrete actions.

The leader is a reward net r_x(s, a), which is to predict which of two segments a teacher prefers. l(x) is the
cross-entropy of its predictions on pairs of segments that the follower, who maximises r_x, has played:

    --method sac      no leader, the environment's reward: what the others could reach at best
             drlhf    x follows (13), as if the segments were given: Christiano et al. (arXiv:1706.03741)
             sobirl   (13) + (78): the follower plays the segments, and depends on x; the first step of it
             hpgd     (13) + (14): the whole of it, from discounted sums of rewards along the segments
             pbrl     (13) + a penalty: a second policy, the rival, plays the pairs, and pays for its regret
             random   x stays as it is: what the follower reaches without any preference

Equation numbers are those of Yang, Gao & Yuan (arXiv:2405.19697); leader.py has the formulas.

The follower is soft actor-critic in the form of Christodoulou (arXiv:1910.07207), in which expectations over
actions are sums. The actor pi (parameters theta) maximises reward and entropy; two critics Q_1, Q_2 estimate
what each action is worth, and of two estimates the smaller one counts. At every --update-frequency-th step
of the environment, B steps (s, a, s') are drawn from the replay memory; their rewards are asked of the reward
net as it is now, shifted and scaled (--reward-norm):

    V(s')    = sum_a pi(a|s') (min_i Q'_i(s', a) - alpha log pi(a|s'))
    y        = r + gamma (1 - terminated) V(s')
    critic   a step on  mean (Q_1(s, a) - y)^2 + mean (Q_2(s, a) - y)^2
    Q'       moves by a share tau towards Q
    actor    a step on  mean sum_a pi(a|s) (alpha log pi(a|s) - min_i Q_i(s, a))
    alpha    a step on  mean alpha (H(pi(.|s)) - target entropy), in log alpha, H the entropy

Gradients are written out, as products with the networks' Jacobians (jacobian.py). What differs from CleanRL:
a truncated episode bootstraps from the observation that it ended with; the actor's loss is a sum over actions
and not their mean; the targets follow softly, since that serves vectors and images alike (as on Atari: --tau
1 --target-frequency 2000, with step sizes of 1e-4); Adam's eps is 1e-8, not 1e-4; weights begin as PyTorch
makes them, not from Kaiming's normal distribution with biases of 0.

Observations are vectors, or images (height, width, channels) of bytes or booleans, such as MinAtar's, or the
last four frames of an Atari game (support/games.py), both of which convolutions see first. The reward net has
an output for every action, so that the expectation in (78) is a sum too.

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

import leader
from jacobian import Categorical, FusedAdam, flatten, jacobian_of, on_device, one_hot
from leader import ChoiceReward, Reward, bounded, hyper_gradient, penalty_gradient, preference_gradient
from leader import pairs_at, preference_loss, rival_weights, suffix_gradient
from nystrom import namespace, norm
from support import evaluation
from support.acting import numpy_policy
from support.command import start
from support.environments import MANY, Environments, Image
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
    env_id: Name = "CartPole-v1"
    """Gymnasium id of an environment with a Discrete action space ("module:id" imports the module first)"""
    method: Literal["sac", "drlhf", "sobirl", "hpgd", "pbrl", "random"] = "sac"
    """sac: maximise the environment's reward; random: one that is never learned;
    drlhf: one learned from pairs as if they were given;
    sobirl: also by a second term, since pairs depend on the policy; hpgd: the same by discounted sums;
    pbrl: with a penalty instead, while a second policy, the rival, plays the pairs"""
    total_timesteps: Count = 500_000
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
    batch_size: UpToMillion = 64
    """steps that an update is an average over"""
    learning_starts: Natural = 5_000
    """steps at random before the first update"""
    policy_lr: UnitStep = 3e-4
    """Adam step size of the actor, and of pbrl's rival"""
    q_lr: UnitStep = 3e-4
    """Adam step size of the critics, and of log alpha"""
    anneal_lr: bool = False
    """decay --policy-lr and --q-lr linearly to 0, over --anneal-timesteps if it is given"""
    hidden_size: Size = 256
    """width of the two hidden layers of actor and critics (of Atari's frames it is one, of 512)"""
    gamma: UnitInterval = 0.99
    """discount factor"""
    tau: UnitStep = 0.005
    """share of the way to the critics that their targets go at a time"""
    target_frequency: Count = 1
    """updates from one move of the targets to the next"""
    update_frequency: Count = 4
    """environment steps from one update to the next"""
    alpha: Positive = 1.0
    """temperature, the weight of the entropy: where it begins with --autotune, where it stays without"""
    autotune: bool = True
    """learn alpha, so that the entropy becomes --target-entropy"""
    target_entropy: UnitInterval = 0.89
    """entropy that alpha is learned for, in units of that of equal chances, log of the number of actions"""

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
    """width of the two hidden layers of the reward net (of Atari's frames it is one)"""
    reward_members: Few = 1
    """reward nets, of which the mean counts"""
    reward_input: Literal["state-action", "state"] = "state-action"
    """what the reward depends on: with state the net has one output for all actions"""
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
    apart = args.update_frequency
    check_schedule(args, {"update_frequency": apart, "target_frequency": apart * args.target_frequency})
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


class Picture(nn.Module):
    """Flat images (n, H W C), or frames (n, C H W), as (n, C, H, W), scaled to [0, 1] only here."""

    def __init__(self, form):
        super().__init__()
        self.register_buffer("form", torch.tensor(form))  # the fields of Image
        *self.shape, self.top, self.frames = map(int, form)

    def forward(self, images):
        pixels = images.to(torch.get_default_dtype()) / self.top
        height, width, channels = self.shape
        if self.frames:
            return pixels.reshape(len(pixels), channels, height, width)
        return pixels.reshape(len(pixels), height, width, channels).movedim(3, 1)


def network(inputs: int | Image, hidden: int, outputs: int, mlp=mlp) -> nn.Sequential:
    """Of vectors, which are so many numbers, an mlp; of images one after a convolution, as in MinAtar's
    networks (Young & Tian, arXiv:1903.03176); of frames that of Mnih et al. (2015)."""
    if isinstance(inputs, int):
        return mlp(inputs, hidden, outputs)
    height, width, channels, _, frames = map(int, inputs)
    if not frames:
        layers = [nn.Conv2d(channels, 16, 3), nn.ReLU(), nn.Flatten()]
        features = 16 * (height - 2) * (width - 2)
        return nn.Sequential(Picture(inputs), *layers, *mlp(features, hidden, outputs))
    layers = [nn.Conv2d(channels, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU()]
    layers += [nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 7 * 7, 512), nn.ReLU()]
    return nn.Sequential(Picture(inputs), *layers, nn.Linear(512, outputs))


def reward_network(inputs: int | Image, hidden: int, outputs: int) -> nn.Sequential:
    """The reward net's: the same with the leader's mlp; of frames that of Yang, Gao & Yuan, whose dropout and
    batch norm act only while it is trained."""
    if isinstance(inputs, int) or not inputs.frames:
        return network(inputs, hidden, outputs, leader.mlp)
    layers, channels = [Picture(inputs)], inputs.channels
    for size, stride in ((7, 3), (5, 2), (3, 1), (3, 1)):
        layers += [nn.Conv2d(channels, 16, size, stride), nn.BatchNorm2d(16), nn.LeakyReLU(), nn.Dropout()]
        channels = 16
    layers += [nn.Flatten(), nn.Linear(16 * 7 * 7, hidden), nn.LeakyReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden, outputs))


class Actor(nn.Module):
    """Categorical policy."""

    def __init__(self, inputs: int | Image, outputs: int, hidden: int = 256, device: str = "cpu"):
        super().__init__()
        self.net = network(inputs, hidden, outputs)  # the logits
        self.vector = flatten(self, device)  # theta: an array that the parameters are views of
        self.jacobian = jacobian_of(self.net)

    def policy(self, obs, actions=None):
        """The policy at obs (B, obs_dim), with an action in each of these states if they are given (B,)."""
        return Categorical(self.jacobian(obs), actions)

    def noise(self, *shape, generator=None):
        """Gumbel noise, (*shape, outputs): the largest of logits + noise is a sample of their softmax."""
        exponential = torch.empty(*shape, self.net[-1].out_features).exponential_(generator=generator)
        return -exponential.log().numpy()

    @staticmethod
    def act(outputs, noise):
        """Actions (...) from the outputs of net; noise 0 gives the most likely ones."""
        return (outputs + noise).argmax(-1)

    @staticmethod
    def for_env(actions, space):
        """What environments take, from actions (n,)."""
        return [int(action) for action in actions + space.start]


class Critic(nn.Module):
    """Two networks, Q_1 and Q_2, with an output for every action."""

    def __init__(self, inputs: int | Image, outputs: int, hidden: int = 256, device: str = "cpu"):
        super().__init__()
        self.nets = nn.ModuleList(network(inputs, hidden, outputs) for _ in range(2))
        self.vector = flatten(self, device)
        self.jacobian_of_each = [jacobian_of(net) for net in self.nets]

    def values(self, obs):
        """The Jacobians of Q_1 and Q_2 at obs (B, obs_dim), and the values of all actions (2, B, A)."""
        both = [jacobian(obs) for jacobian in self.jacobian_of_each]
        return both, namespace(obs).stack([J.outputs for J in both])

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


def soft_value(values, policy: Categorical, alpha: float):
    """The soft values V (B,), from two values of every action (2, B, A)."""
    smaller = namespace(values).amin(values, 0)
    return (policy.probs * smaller).sum(1) + alpha * policy.entropies


def critic_gradient(critic: Critic, obs, actions, y):
    """Mean squared error (mean of both critics), mean value, gradient (p,) of the sum, at actions (B,)."""
    both, values = critic.values(obs)
    taken = one_hot(actions, values[0])
    values = (taken * values).sum(2)  # (2, B)
    error = values - y
    parts = [(2 / len(y) * e)[:, None] * taken @ J for e, J in zip(error, both)]
    return float((error * error).mean()), float(values.mean()), namespace(y).concatenate(parts)


def actor_gradient(policy: Categorical, critic: Critic, obs, alpha: float):
    """mean sum_a pi (alpha log pi - min_i Q_i) = -mean V, and its gradient (p,) by theta. With the costs c_a
    in brackets, that by the logits is pi_a (c_a - sum_b pi_b c_b): what c owes to log pi cancels."""
    _, values = critic.values(obs)
    V = soft_value(values, policy, alpha)
    costs = alpha * policy.logprobs - namespace(values).amin(values, 0)  # (B, A)
    by_logits = policy.probs * (costs + V[:, None]) / len(obs)
    return -float(V.mean()), by_logits @ policy.J


def temperature_gradient(log_prob, alpha: float, target_entropy: float):
    """Of mean -alpha (log pi + target entropy) by log alpha, (1,)."""
    return np.array([-alpha * (float(log_prob.mean()) + target_entropy)])


# The leader


def second_term(reward: Reward, actor: Actor, alpha, preferences: Preferences, generator, args: Args, places):
    """(78), in which a' are all actions with their chances, or with hpgd (14): gradient and mean score. Of
    pairs of the last query, or, where they may be any, of those at these places in the queue."""
    if args.hyper_pairs == "fresh":
        places = preferences.some_fresh(args.hyper_batch_size, generator)
    pairs = pairs_at(places, preferences, args.device)
    if args.method == "hpgd":  # its sums are deviations from their own mean: there is no score
        return suffix_gradient(reward, pairs, args.gamma, alpha, args.baseline), math.nan
    policy = actor.policy(pairs.obs.reshape(-1, pairs.obs.shape[-1]))
    chances = policy.probs.T.reshape(-1, *pairs.actions.shape)  # (A, M, 2, L)
    every = on_device(np.arange(len(chances)), args.device)[:, None, None, None]
    others = namespace(chances).broadcast_to(every, chances.shape)
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
    """pbrl: the log-probabilities (M, 2, L) that the rival gives to what was done in pairs, and its policy
    there."""
    policy = rival.policy(pairs.obs.reshape(-1, pairs.obs.shape[-1]), pairs.actions.reshape(-1))
    return policy.log_prob.reshape(pairs.actions.shape), policy


def rival_gradient(rival: Actor, played, reward: Reward, preferences: Preferences, generator, args: Args):
    """pbrl: what E[l], in units of the penalty for a step, adds to the rival's gradient. REINFORCE, of a few
    of the pairs that it played last, with the log-probabilities `played` (M, 2, L) of all of them."""
    places = preferences.some_fresh(args.hyper_batch_size, generator)
    pairs = pairs_at(places, preferences, args.device)
    losses, _ = preference_loss(margins_of(reward.at(pairs.obs, pairs.actions)[1]), pairs.labels)
    log_probs, policy = log_probs_of(rival, pairs)
    log_ratio = log_probs - played[places - preferences.fresh[0]]
    by_log_probs = rival_weights(losses.mean(0), log_ratio, args.baseline)
    return policy.gradient(by_log_probs.reshape(-1)) / (args.penalty * args.segment)


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


def inputs_of(args: Args, envs: Environments) -> int | Image:
    """What networks see: how many numbers, or images of which form; others than those above are refused."""
    if not envs.image:
        return envs.obs_dim
    *shape, _, frames = envs.image
    known = shape == [84, 84, 4] if frames else min(shape[:2]) >= 3 and envs.obs_dim < MANY
    what = "4 frames of 84 x 84" if frames else f"images from 3 x 3 to {MANY:,} numbers (wrap it)"
    args.require("env_id", known, f"have {what}, not {tuple(shape)}")
    return envs.image


def train(args: Args, checkpoint: dict | None = None) -> Path:
    """Trains, writes the run folder and returns it; goes on from a checkpoint if there is one."""
    iterations = args.total_timesteps // args.outer_steps
    envs = Environments(args, actions=gym.spaces.Discrete, images=True)
    inputs, action_size = inputs_of(args, envs), envs.action_size
    target_entropy = args.target_entropy * math.log(action_size)
    torch.manual_seed(args.seed)
    actor = Actor(inputs, action_size, args.hidden_size, args.device)
    critic = Critic(inputs, action_size, args.hidden_size, args.device)
    target = Critic(inputs, action_size, args.hidden_size, args.device)
    target.moves_to(critic, 1.0)
    temperature = Temperature(args.alpha)
    actor_adam = FusedAdam(actor.vector, args.policy_lr)
    critic_adam = FusedAdam(critic.vector, args.q_lr)
    alpha_adam = FusedAdam(temperature.vector, args.q_lr)
    spare = 2 * args.checkpoint_every * args.outer_steps
    frames = envs.image.channels if envs.image and envs.image.frames else 1
    replay = Replay(args, envs.obs_dim, 0, spare, np.uint8 if envs.image else np.float32, frames)
    if args.leads:
        reward = ChoiceReward(inputs, action_size, args, reward_network)
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
        rival = Actor(inputs, action_size, args.hidden_size, args.device)
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
                    action = torch.randint(action_size, (1,)).numpy()
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
                    if updated % args.update_frequency:
                        continue

                    # The critics' update
                    mb = Transitions(*(on_device(x, args.device) for x in replay.sample(args.batch_size)))
                    rewards = reward.seen(mb.obs, mb.actions) if args.leads else mb.rewards
                    next_values = target.values(mb.next_obs)[1]
                    next_soft = soft_value(next_values, actor.policy(mb.next_obs), temperature.alpha)
                    y = rewards + args.gamma * (1 - mb.terminated) * next_soft
                    loss, value, gradient = critic_gradient(critic, mb.obs, mb.actions, y)
                    critic_adam.step(gradient)
                    if updated // args.update_frequency % args.target_frequency == 0:
                        target.moves_to(critic, args.tau)
                    metrics.add(critic_loss=loss, q_mean=value, skipped_updates=critic_adam.skipped)
                    lap("critic")

                    # The actor's update, and that of alpha
                    alpha = temperature.alpha
                    policy = actor.policy(mb.obs)
                    loss, gradient = actor_gradient(policy, critic, mb.obs, alpha)
                    actor_adam.step(gradient)
                    if args.autotune:
                        alpha_adam.step(temperature_gradient(-policy.entropies, alpha, target_entropy))
                    metrics.add(actor_loss=loss, entropy=policy.entropy(), alpha=alpha)
                    metrics.add(skipped_updates=actor_adam.skipped)
                    if args.method == "pbrl":
                        _, gradient = actor_gradient(rival.policy(mb.obs), critic, mb.obs, alpha)
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
