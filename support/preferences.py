"""What is known of a reward without being told it: pairs of segments, and which of the two a teacher prefers.

The teacher stands for a person. It sees the environment's reward, which the learner does not, and errs as
people do (Lee et al., "B-Pref", arXiv:2111.03026). Nothing here learns; how well what was learned predicts
preferences is measured against the environment's reward, without the teacher's errors.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Callable, Literal, NamedTuple

import numpy as np
import torch

from support.flags import Few, Natural, RunFlags, Stop, UnitInterval, UpToMillion, say
from support.games import is_game
from support.replay import Replay

# Streams of random numbers, beside that of networks and actions: what draws from one disturbs no other
QUERIES, TEACHER, SECOND_TERM = range(3)
AT_ONCE = 50  # pairs whose rewards are predicted at once: images are large
OLD_PAIRS = 300  # from the whole memory, on which predictions are measured


@dataclass
class PreferenceFlags(RunFlags):
    """The flags of queries and of the teacher."""

    query_steps: UpToMillion = 500
    """first steps of an iteration, from which pairs are cut: the actor (pbrl: the rival) plays, frozen"""
    segment: UpToMillion = 25
    """steps of a segment"""
    pairs: UpToMillion = 40
    """pairs of a query"""
    initial_pairs: UpToMillion = 100
    """pairs of the first query, which also has the steps at random"""
    label_budget: Natural = 0
    """labels after which the teacher gives no more, and the reward net stays as it is (0: no limit);
    with --reward-norm what the follower sees of it is still shifted and scaled"""
    queue: UpToMillion = 3_000
    """pairs that are learned from: so many, the last ones that have a label"""
    query: Literal["uniform", "disagreement", "entropy"] = "uniform"
    """which pairs are asked about. uniform: any; of more candidates (--query-oversample),
    disagreement: those on which the reward nets differ most;
    entropy: those whose predicted preference is closest to one half"""
    query_oversample: Few = 10
    """candidates for every pair of a query that is not uniform"""
    labels: Literal["oracle", "bernoulli"] = "oracle"
    """oracle: the teacher prefers the segment with the larger sum of rewards;
    bernoulli: the first one, with probability sigmoid(its sum minus that of the other one)"""
    label_flip: UnitInterval = 0.0
    """share of labels that are wrong"""
    label_skip: UnitInterval = 0.0
    """share of the pairs of a query without an answer, those whose better segment is worst"""
    label_equal: UnitInterval = 0.0
    """share of the pairs of a query that the teacher finds equal, those with the smallest difference"""
    teacher_gamma: UnitInterval = 1.0
    """discount of the teacher's sums, from their ends: the last steps count most"""


def check_schedule(args, every: dict[str, int]) -> None:
    """Refuses a schedule by which a run of whole iterations learns nothing. every: flags, and the steps
    between what they time."""
    played = args.total_timesteps // args.outer_steps * args.outer_steps
    args.require("total_timesteps", played > 0, f"be at least --outer-steps {args.outer_steps}")
    steps = f"{played:,} steps, the whole iterations of --total-timesteps {args.total_timesteps}"
    args.require("learning_starts", args.learning_starts < played, f"be less than {steps}")
    for flag, steps_between in every.items():
        due = played // steps_between > args.learning_starts // steps_between
        args.require(flag, due, f"be due once at least, after --learning-starts and within {steps}")
    if args.hyper:
        check_second_term(args, played)


def check_second_term(args, played: int) -> None:
    """Refuses flags with which sobirl, hpgd or pbrl would be drlhf, whose gradient is all that the first
    query has. played: steps of the run."""
    queries = (played - args.learning_starts) // args.outer_steps
    steps = f"--outer-steps {args.outer_steps} twice before the end, {played:,} steps"
    args.require("learning_starts", queries > 1, f"leave {steps}: the first query has no second term")
    if args.label_budget:
        first, further = (n - round(args.label_skip * n) for n in (args.initial_pairs, args.pairs))
        most = f"{first}, the labels of the first query, which has no second term"
        args.require("label_budget", args.label_budget > first, f"be 0, or more than {most}")
        queries = min(queries, 1 + math.ceil((args.label_budget - first) / max(further, 1)))
    last = args.learning_starts + (queries - 1) * args.outer_steps + args.query_steps
    args.require("hyper_start", args.hyper_start <= last, f"be at most {last:,}, the last query's step")
    if args.baseline or args.method == "hpgd":
        instead = "" if args.method == "hpgd" else ", or come with --no-baseline"
        for flag in ("pairs", "hyper_batch_size"):
            args.require(flag, getattr(args, flag) > 1, f"be at least 2, to compare losses{instead}")


def check_queries(args) -> None:
    """Rules between the flags of a script with a leader."""
    begins = args.learning_starts > 0 and args.learning_starts % args.outer_steps == 0
    args.require("learning_starts", begins, f"be a multiple of --outer-steps {args.outer_steps}, and not 0")
    within = args.segment < args.query_steps <= args.outer_steps
    limits = f"more than --segment {args.segment} and at most --outer-steps {args.outer_steps}"
    args.require("query_steps", within, f"be {limits}: there are to be different segments")
    most = args.outer_steps - args.segment
    both = args.method != "pbrl" or args.query_steps <= most  # the penalty compares what the two have played
    rest = f"at most {most}, so that pbrl's follower plays a segment, too: lower it or raise --outer-steps"
    args.require("query_steps", both, f"be {rest}")
    room = args.buffer_size >= 2 * args.outer_steps
    args.require("buffer_size", room, f"hold an iteration and its ends of episodes, {2 * args.outer_steps}")
    longer = args.queue >= max(args.pairs, args.initial_pairs)
    args.require("queue", longer, "hold a query, --pairs and --initial-pairs")
    several = args.query != "disagreement" or args.reward_members > 1
    args.require("reward_members", several, "be at least 2 with --query disagreement")
    with_action = args.method != "sobirl" or args.reward_input != "state"
    args.require("reward_input", with_action, "be state-action with sobirl, whose second term is 0 otherwise")
    for flag, pairs in itertools.product(("label_skip", "label_equal"), ("pairs", "initial_pairs")):
        share, count = getattr(args, flag), getattr(args, pairs)
        query = f"--{pairs.replace('_', '-')} {count}"
        args.require(flag, round(share * count) < count, f"leave one of {query}, to learn anything")
        some = share == 0 or round(share * args.pairs) > 0
        args.require(flag, some, f"be 0, or at least one of --pairs {args.pairs}")


def sigmoid(x):
    return 0.5 * (1 + np.tanh(x / 2))


class Pairs(NamedTuple):
    """M pairs of segments of L steps."""

    obs: np.ndarray  # (M, 2, L, obs_dim)
    actions: np.ndarray  # (M, 2, L, action_size), or (M, 2, L) numbers of choices
    labels: np.ndarray  # (M,): 1. if the first segment is preferred, 0. if the second, 0.5 if neither is


class Teacher:
    """Labels pairs by the sums of the environment's rewards over the segments.

    --labels oracle: the larger sum is preferred, neither if they are equal; bernoulli: the first one with
    probability sigmoid(R_1 - R_2). Then the --label-equal share of the pairs with the smallest difference is
    told to be equal, the --label-flip share of the other labels is wrong, and the --label-skip share of the
    pairs whose better segment is worst has no answer."""

    def __init__(self, args, generator: torch.Generator):
        self.args = args
        self.generator = generator

    def chance(self, count: int):
        return torch.rand(count, generator=self.generator, dtype=torch.float64).numpy()

    def label(self, rewards):
        """Labels (M,), and which of the pairs have an answer (M,), from rewards (M, 2, L)."""
        args = self.args
        weights = args.teacher_gamma ** np.arange(rewards.shape[2])[::-1]  # a forgetful one: the end counts
        returns = rewards @ weights
        difference = returns[:, 0] - returns[:, 1]
        labels = (np.sign(difference) + 1) / 2
        if args.labels == "bernoulli":
            labels = (self.chance(len(labels)) < sigmoid(difference)).astype(float)
        if args.label_equal:
            labels[lowest(abs(difference), args.label_equal)] = 0.5
        if args.label_flip:
            wrong = self.chance(len(labels)) < args.label_flip
            labels[wrong] = 1 - labels[wrong]
        answered = np.ones(len(labels), bool)
        if args.label_skip:
            answered[lowest(returns.max(1), args.label_skip)] = False
        return labels, answered


def lowest(values, share: float):
    """Where the lowest share of the values is."""
    return np.argsort(values, kind="stable")[: round(share * len(values))]


def generator_of(args, stream: int) -> torch.Generator:
    """Random numbers that no other stream of a run has."""
    (seed,) = np.random.SeedSequence([args.seed, stream]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(seed >> np.uint64(1)))


class Preferences:
    """Queries, and a queue of labelled pairs, the last --queue of them. A segment is known by the number of
    its first row in the replay memory, so that nothing is stored twice; a pair whose rows are gone leaves the
    queue. `measured` has the columns of progress.csv that tell how well preferences are predicted."""

    def __init__(self, args, replay: Replay, predict: Callable):
        self.args = args
        self.replay = replay
        self.predict = predict  # the learned rewards (members, ...) of obs (..., obs_dim) and actions
        self.generator = generator_of(args, QUERIES)  # of queries and minibatches
        self.teacher = Teacher(args, generator_of(args, TEACHER))
        self.starts = np.zeros((0, 2), np.int64)
        self.labels = np.zeros(0, np.float32)
        self.asked = 0  # labels that the teacher has given
        self.queries = 0
        self.fresh = np.arange(0)  # where in the queue the pairs of the last query are
        self.noted = False  # that rewards are at their limits
        self.measured = dict.fromkeys(MEASURES, np.nan) | {"ce_fresh": np.nan, "labels_used": 0}

    def query(self, begin: int) -> None:
        """Pairs from the row `begin` on, the first time from all rows: chosen, measured before anything is
        learned from them, labelled and queued, of which it may be that none are left: see `fresh`."""
        first = self.queries == 0
        starts = self.choose(0 if first else begin, self.args.initial_pairs if first else self.args.pairs)
        if first:
            self.note_first_query(self.true_rewards(starts))
        self.measure(starts)
        self.queries += 1
        self.fresh = self.ask(starts)
        self.measured |= {"ce_fresh": self.loss_of_fresh(), "labels_used": self.asked}

    def loss_of_fresh(self) -> float:
        """The leader's loss: the cross-entropy of the pairs of the last query, mean over members, which the
        follower of the reward as it is has played. NaN without any."""
        margins = margins_of(self.predicted(self.starts[self.fresh]))  # (members, M)
        losses = np.logaddexp(0, margins) - self.labels[self.fresh] * margins
        return float(losses.mean()) if losses.size else np.nan

    def some_fresh(self, count: int, generator: torch.Generator) -> np.ndarray:
        """Places in the queue of pairs of the last query, at most as many."""
        return self.fresh[torch.randperm(len(self.fresh), generator=generator)[:count].numpy()]

    def choose(self, begin: int, count: int) -> np.ndarray:
        """First rows (count, 2) of pairs of segments."""
        if self.args.query == "uniform":
            return self.different(begin, count)
        candidates = self.different(begin, self.args.query_oversample * count)
        q = sigmoid(margins_of(self.predicted(candidates)))  # (members, candidates)
        worth = q.std(0) if self.args.query == "disagreement" else -abs(q.mean(0) - 0.5)
        return candidates[np.argsort(-worth, kind="stable")[:count]]

    def predicted(self, starts):
        """The learned rewards of segments, (members, M, 2, L), of pairs of them, (M, 2)."""
        parts = [starts[begin : begin + AT_ONCE] for begin in range(0, max(1, len(starts)), AT_ONCE)]
        return np.concatenate([self.predict(*self.steps(part)) for part in parts], 1)

    def true_rewards(self, starts):
        """The environment's rewards of segments, (*shape, L)."""
        return self.replay.rewards(self.rows_of(starts)).astype(float)

    def measure(self, fresh) -> None:
        """Compares learned with true rewards: on the pairs of a query, on pairs from the whole memory, and on
        the last steps."""
        old = self.different(0, OLD_PAIRS)
        true, true_old = (margins_of(self.true_rewards(starts)) for starts in (fresh, old))
        learned, learned_old = (margins_of(self.predicted(starts)).mean(0) for starts in (fresh, old))
        numbers = self.replay.recent(1000)
        rewards = self.predict(*self.replay.taken(numbers)).mean(0)
        true_rewards = self.replay.rewards(numbers)
        values = (accuracy(learned, true), accuracy(learned_old, true_old))
        values += (bayes_ceiling(true), float(np.mean(true == 0)) if len(true) else np.nan)
        values += (correlation(rewards, true_rewards), correlation(ranks(rewards), ranks(true_rewards)))
        at_limits = np.mean(abs(rewards) > 0.99) if self.args.reward_output == "tanh" else np.nan
        values += (float(rewards.mean()), float(rewards.std()), float(at_limits))
        self.measured |= dict(zip(MEASURES, values))
        self.note_saturation()

    def segments(self, begin: int, *shape: int, end: int | None = None):
        """First rows of segments from the row `begin` on, and before the row `end`, in an array of this
        shape."""
        return self.replay.segments(begin, self.args.segment, shape, self.generator, end)

    def different(self, begin: int, count: int) -> np.ndarray:
        """First rows (count, 2) of pairs of two different segments from the row `begin` on, each pair as
        likely as any other; (0, 2) where there are no two."""
        starts = self.replay.starts(begin, self.args.segment)
        n = len(starts)
        if n < 2:
            return np.zeros((0, 2), int)
        first = torch.randint(n, (count,), generator=self.generator)
        further = torch.randint(1, n, (count,), generator=self.generator)
        return starts[torch.stack([first, (first + further) % n], 1).numpy()]

    def steps(self, starts):
        """What was done in the segments with the first rows `starts`, (*shape, L, ...)."""
        return self.replay.taken(self.rows_of(starts))

    def rows_of(self, starts):
        return starts[..., None] + np.arange(self.args.segment)

    def ask(self, starts) -> np.ndarray:
        """Has pairs (M, 2) labelled, as far as --label-budget goes and the teacher answers, and queues them;
        where in the queue the new ones are."""
        labels, answered = self.teacher.label(self.true_rewards(starts))
        if self.args.label_budget:
            answered &= self.asked + np.cumsum(answered) <= self.args.label_budget
        new = int(answered.sum())
        self.asked += new
        self.starts = np.concatenate([self.starts, starts[answered]])
        self.labels = np.concatenate([self.labels, labels[answered].astype(np.float32)])
        there = self.starts.min(1, initial=2**62) >= self.replay.first
        there[: -self.args.queue] = False
        self.starts, self.labels = self.starts[there], self.labels[there]
        return np.arange(len(self.labels) - new, len(self.labels))

    def note_first_query(self, rewards) -> None:
        """Ends a run whose first query says nothing; notes where one says little, or where episodes say what
        only rewards should."""
        env_id = self.args.env_id
        if not len(rewards):
            what = f"--segment {self.args.segment} fits only once into what was played"
            raise Stop(f"{what}: lower it", status=2)
        ties = np.mean(margins_of(rewards) == 0)
        where = f"of the first query {ties:.0%} of the pairs tie"
        if ties == 1:
            numbers = np.arange(self.replay.first, self.replay.written)
            seen = self.replay.rewards(numbers[self.replay.is_step(numbers)])
            if np.ptp(seen) == 0:
                why = f"all {len(seen):,} steps of {env_id} had the reward {seen[0]:g}"
                fix = "--learning-starts"
            else:
                why = f"segments of {env_id} have equal rewards"
                fix = "--segment"
            raise Stop(f"{where}: {why}: raise {fix}, or name another environment", status=2)
        if ties > 0.9:
            say(f"note: {where}, from which little can be learned: raise --segment", error=True)
        if self.replay.terminates():
            what = f"episodes of {env_id} terminate, and their lengths tell what is good"
            fix = """: --env-kwargs '{"terminate_when_unhealthy": false}' where the environment has it"""
            say(f"note: {what}, beside the preferences{'' if is_game(env_id) else fix}", error=True)

    def note_saturation(self) -> None:
        """Says once where rewards have reached the limits of tanh, which is flat there: what the net has got
        wrong it then unlearns slowly."""
        share = self.measured["reward_saturated"]
        if share > 0.95 and not self.noted:
            self.noted = True
            what = f"{share:.0%} of the learned rewards of the last 1,000 steps are within 0.01 of -1 or 1"
            say(f"note: {what}, where the net learns little: see --reward-output", error=True)

    def pairs(self, chosen) -> Pairs:
        """Those at these places in the queue."""
        steps = self.steps(self.starts[chosen])
        return Pairs(steps.obs, steps.actions, self.labels[chosen])

    def minibatches(self, epochs: int, size: int):
        """Places in the queue, each once an epoch."""
        for _ in range(epochs):
            for chosen in torch.randperm(len(self.labels), generator=self.generator).split(size):
                yield chosen.numpy()

    def state_dict(self) -> dict:
        arrays = {"starts": torch.as_tensor(self.starts), "labels": torch.as_tensor(self.labels)}
        numbers = {"asked": self.asked, "queries": self.queries}
        generators = {"generator": self.generator.get_state(), "teacher": self.teacher.generator.get_state()}
        return arrays | numbers | generators

    def load_state_dict(self, state: dict) -> None:
        self.starts, self.labels = state["starts"].numpy(), state["labels"].numpy()
        self.asked, self.queries = state["asked"], state["queries"]
        self.generator.set_state(state["generator"])
        self.teacher.generator.set_state(state["teacher"])


# Measures, against the environment's reward


MEASURES = ("accuracy_fresh", "accuracy_replay", "bayes_ceiling", "tie_rate", "reward_correlation")
MEASURES += ("reward_spearman", "r_mean", "r_std", "reward_saturated")


def margins_of(rewards):
    """R_1 - R_2 (..., M), from rewards (..., M, 2, L)."""
    return rewards[..., 0, :].sum(-1) - rewards[..., 1, :].sum(-1)


def accuracy(margins, true_margins) -> float:
    """How often margins (M,) have the sign of the true ones, among those that are not 0; NaN without any."""
    decided = true_margins != 0
    right = (margins > 0)[decided] == (true_margins > 0)[decided]
    return float(right.sum()) / len(right) if len(right) else np.nan


def bayes_ceiling(true_margins) -> float:
    """The accuracy against --labels bernoulli that nobody exceeds, E max(p, 1 - p), ties included."""
    return float(sigmoid(abs(true_margins)).mean()) if len(true_margins) else np.nan


def correlation(x, y) -> float:
    """Pearson's, NaN where one of the two is constant."""
    x, y = x - x.mean(dtype=float), y - y.mean(dtype=float)
    size = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / size) if size > 0 else np.nan


def ranks(x):
    """0, 1, ... by size, the mean rank where values are equal."""
    values, which, counts = np.unique(x, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts + 1) / 2)[which]
