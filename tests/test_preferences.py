"""Rewards from preferences: the teacher, the queue, the loss and its gradient, what is measured, and
sobirl_continuous.py --method drlhf and random as a user meets them."""

import functools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch

import jacobian
import sobirl_continuous as sobirl
from leader import by_step, preference_loss
from support.flags import Stop, parse_args
from support.preferences import Preferences, Teacher, accuracy, bayes_ceiling, correlation, generator_of
from support.preferences import margins_of, ranks
from support.replay import LAST, Replay
from support.run_folder import PREVIOUS
from tests.test_replay import Args, FakeRun, memory, steps
from tests.test_sac import DURABLE, QUERY, SMALL, assert_it_goes_on, contents, flat, whole_and_killed
from tests.test_scripts import refused, rows, train

PENDULUM = [*SMALL, *QUERY, "--env-id", "Pendulum-v1", "--method", "drlhf"]


@functools.cache
def flags(*given):
    return parse_args(sobirl.Args, "", list(map(str, given)))


# Segments


def test_segments_stay_inside_episodes_and_the_memory(tmp_path):
    """Of a ring that has gone round: every segment that there is, equally often, and no other."""
    found = memory(tmp_path, 30, spare=10)
    lengths = (7, 5, 11, 2, 3, 9, 6)
    steps(found, 60, lengths)
    generator = torch.Generator().manual_seed(0)
    starts = found.segments(0, 4, (20_000, 2), generator)
    steps_of = found.read(starts[..., None] + np.arange(4))
    time, episode = steps_of.obs[..., 0], steps_of.obs[..., 1]
    assert (np.diff(time, axis=-1) == 1).all() and (np.diff(episode, axis=-1) == 0).all()
    oldest = found.read(np.array([found.first + (found.rows["kind"][found.first % found.size] == LAST)]))
    first = int(oldest.obs[0, 0])
    ends = np.cumsum(lengths)
    expected = [t for t in range(first, 57) if not any(t < end < t + 4 for end in ends)]
    counts = np.array([(time[..., 0] == t).sum() for t in expected])
    assert counts.sum() == starts.size
    mean = starts.size / len(expected)
    assert abs(((counts - mean) ** 2 / mean).sum() - len(expected)) < 4 * (2 * len(expected)) ** 0.5
    late = found.segments(found.written - 12, 4, (500,), generator)
    assert late.min() >= found.written - 12 and late.max() == found.written - 4
    assert found.segments(found.written - 3, 4, (500, 2), generator).shape == (0, 2)
    assert found.segments(0, 4, (3, 2), generator, end=found.first + 3).shape == (0, 2)
    with pytest.raises(Stop, match="--segment 20 is longer than any episode, of 17 steps"):
        found.segments(0, 20, (3,), generator)


def test_the_last_steps(tmp_path):
    found = memory(tmp_path, 30)
    steps(found, 25, lengths=(10, 9))
    assert found.taken(found.recent(8)).obs[:, 0].tolist() == list(range(17, 25))
    assert len(found.recent(100)) == 25
    assert found.terminates() and not memory(tmp_path, 30).terminates()


# The teacher


def teacher(*given):
    return Teacher(flags(*given), torch.Generator().manual_seed(0))


def rewards(count, length=3, seed=0):
    return np.random.default_rng(seed).normal(size=(count, 2, length))


def test_the_oracle_prefers_the_larger_sum():
    found = np.array([[[1, 2], [0, 2]], [[0, 0], [0, 1]], [[1, 2], [2, 1]]], float)
    labels, answered = teacher().label(found)
    assert labels.tolist() == [1, 0, 0.5] and answered.all()
    labels, _ = teacher("--teacher-gamma", 0.5).label(np.array([[[4, 0], [0, 1.9]], [[4, 0], [0, 2.1]]]))
    assert labels.tolist() == [1, 0]  # 4 a step ago is worth 2


def test_bernoulli_labels_have_their_rate():
    pair = np.tile([[[0.5, 0.5], [0.2, 0.1]]], (40_000, 1, 1))
    labels, _ = teacher("--labels", "bernoulli").label(pair)
    p = 1 / (1 + math.exp(-0.7))
    assert set(labels) == {0, 1}
    assert abs(labels.mean() - p) < 4 * (p * (1 - p) / len(labels)) ** 0.5


def test_mistakes_of_the_teacher():
    found = rewards(20_000)
    sums = found.sum(-1)
    right = (sums[:, 0] > sums[:, 1]).astype(float)
    labels, _ = teacher("--label-flip", 0.2).label(found)
    assert abs((labels != right).mean() - 0.2) < 4 * (0.2 * 0.8 / len(labels)) ** 0.5
    labels, _ = teacher("--label-equal", 0.3).label(found)
    gap = abs(sums[:, 0] - sums[:, 1])
    assert (labels == 0.5).sum() == 6_000 and gap[labels == 0.5].max() <= gap[labels != 0.5].min()
    assert (labels == right)[labels != 0.5].all()
    labels, answered = teacher("--label-skip", 0.1).label(found)
    better = sums.max(1)
    assert (~answered).sum() == 2_000 and better[~answered].max() <= better[answered].min()
    assert (labels == right).all()


# The queue


def asked(tmp_path, *given, capacity=1000, predict=None):
    """Preferences over a memory of 300 steps, observed as (step, 0), with reward step/2."""
    args = flags("--segment", 3, "--queue", 8, "--pairs", 4, "--initial-pairs", 4, *given)
    replay = Replay(Args(tmp_path, capacity), 2, 1, 500)
    replay.begin(FakeRun(tmp_path))
    steps(replay, 300)
    return Preferences(args, replay, predict or (lambda obs, actions: obs[None, ..., 0]))


def test_first_in_first_out(tmp_path):
    found = asked(tmp_path)
    all_starts = found.segments(0, 20, 2)
    for begin in range(0, 20, 4):
        fresh = found.ask(all_starts[begin : begin + 4])
        expected = all_starts[max(0, begin - 4) : begin + 4]
        assert (found.starts == expected).all()
        assert (found.starts[fresh] == all_starts[begin : begin + 4]).all()
        assert found.labels.tolist() == [1.0 if a > b else 0.0 if a < b else 0.5 for a, b in expected]
    pairs = found.pairs(np.array([2, 0]))
    assert pairs.obs.shape == (2, 2, 3, 2) and pairs.actions.shape == (2, 2, 3, 1)
    assert (pairs.obs[..., 0, 0] == found.starts[[2, 0]]).all()
    assert (pairs.labels == found.labels[[2, 0]]).all()
    assert found.asked == 20
    batches = list(found.minibatches(2, 3))
    assert [len(batch) for batch in batches] == [3, 3, 2] * 2
    assert sorted(np.concatenate(batches[:3])) == sorted(np.concatenate(batches[3:])) == list(range(8))


def test_the_budget_of_labels(tmp_path):
    found = asked(tmp_path, "--label-budget", 6)
    assert [len(found.ask(found.segments(0, 4, 2))) for _ in range(3)] == [4, 2, 0]
    assert found.asked == len(found.labels) == 6


def test_the_budget_is_of_labels_that_are_given(tmp_path):
    """Pairs without an answer, of which every second one is, leave the others their labels."""
    found = asked(tmp_path, "--label-budget", 3, "--label-skip", 0.5)
    assert [len(found.ask(found.segments(0, 4, 2))) for _ in range(3)] == [2, 1, 0]
    assert found.asked == len(found.labels) == 3


def test_unanswered_pairs_are_not_queued(tmp_path):
    found = asked(tmp_path, "--label-skip", 0.5)
    starts = found.segments(0, 4, 2)
    fresh = found.ask(starts)
    assert len(fresh) == found.asked == 2
    best = np.sort(np.argsort(starts.max(1), kind="stable")[2:])
    assert (found.starts == starts[best]).all()


def test_pairs_whose_steps_are_gone_leave_the_queue(tmp_path):
    found = asked(tmp_path, "--queue", 100, capacity=50)
    found.ask(found.segments(0, 30, 2))
    before, labels = found.starts, found.labels
    steps(found.replay, 20, begin=300)
    fresh = found.ask(found.segments(310, 4, 2))
    kept = before.min(1) >= 320 - 50
    assert 0 < kept.sum() < 30
    assert (found.starts[:-4] == before[kept]).all() and (found.labels[:-4] == labels[kept]).all()
    assert (fresh == np.arange(len(found.labels))[-4:]).all()


def test_queries(tmp_path):
    """uniform takes any pairs; the others, of ten times as many, those on which members differ most, or those
    that are closest to even."""

    def predict(obs, actions):
        t = obs[..., 0]
        return np.stack([0.01 * t, 0.01 * t + 0.5 * (t % 2), -0.01 * t])

    for kind in ("disagreement", "entropy"):
        found = asked(tmp_path, "--query", kind, "--reward-members", 3, predict=predict)
        copy = asked(tmp_path, predict=predict)
        chosen, candidates = found.choose(0, 4), copy.different(0, 40)
        q = 1 / (1 + np.exp(-margins_of(copy.predicted(candidates))))
        worth = q.std(0) if kind == "disagreement" else -abs(q.mean(0) - 0.5)
        assert {tuple(pair) for pair in chosen} == {tuple(candidates[i]) for i in np.argsort(-worth)[:4]}
    assert (asked(tmp_path).choose(0, 4) == asked(tmp_path).different(0, 4)).all()


def test_pairs_are_of_different_segments(tmp_path):
    """Each of the ordered pairs of five possible segments as often as any other; of one there is no pair."""
    found = asked(tmp_path)
    last = found.replay.written - found.args.segment  # the first row of the last segment
    drawn = found.different(last - 4, 20_000)
    counts = np.unique(drawn, axis=0, return_counts=True)[1]
    assert len(counts) == 5 * 4 and abs(counts - 1000).max() < 5 * 31  # 20 pairs, standard deviation 31
    assert set(drawn.ravel()) == set(range(last - 4, last + 1))
    assert found.different(last, 10).shape == (0, 2)
    with pytest.raises(Stop, match="fits only once") as stop:
        found.note_first_query(found.true_rewards(found.different(last, 10)))
    assert stop.value.status == 2


def test_the_teacher_disturbs_no_other_stream(tmp_path):
    """The same pairs are asked about and in the same order, whatever the teacher draws."""
    sure, erring = (asked(tmp_path, *given) for given in ([], ["--label-flip", 0.5]))
    for preferences in (sure, erring):
        for _ in range(3):
            preferences.ask(preferences.different(0, 6))
    assert (sure.starts == erring.starts).all() and (sure.labels != erring.labels).any()
    streams = [generator_of(sure.args, stream) for stream in range(3)]
    streams.append(torch.Generator().manual_seed(sure.args.seed))
    assert len({float(torch.rand(1, generator=generator)) for generator in streams}) == 4


def test_a_first_query_that_says_nothing(tmp_path, capsys):
    found = asked(tmp_path)
    found.replay.rows = found.replay.rows.copy()
    found.replay.rows["reward"] = 1.0
    for last, fix in ((1.0, "had the reward 1: raise --learning-starts"), (2.0, "raise --segment")):
        found.replay.rows["reward"][found.replay.written - 1] = last
        with pytest.raises(Stop, match="100% of the pairs tie") as stop:
            found.note_first_query(np.ones((20, 2, 3)))
        assert stop.value.status == 2 and fix in str(stop.value)
    found.note_first_query(np.concatenate([np.ones((19, 2, 3)), rewards(1)]))
    assert "95% of the pairs tie" in capsys.readouterr().err


# Measures


def test_measures(tmp_path):
    true = np.array([2.0, -1, 0, 3, -0.5])
    assert accuracy(np.array([1.0, -2, 5, -1, -1]), true) == 3 / 4
    assert math.isnan(accuracy(np.ones(2), np.zeros(2)))
    assert bayes_ceiling(true) == pytest.approx(np.mean([max(p, 1 - p) for p in 1 / (1 + np.exp(-true))]))
    x, y = np.random.default_rng(0).normal(size=(2, 50)).round(1)
    assert correlation(x, y) == pytest.approx(scipy.stats.pearsonr(x, y)[0], rel=1e-9)
    assert correlation(ranks(x), ranks(y)) == pytest.approx(scipy.stats.spearmanr(x, y)[0], rel=1e-9)
    assert math.isnan(correlation(x, 0 * y))
    steep = lambda obs, actions: np.tanh(obs[None, ..., 0] - 150)
    found = asked(tmp_path, "--reward-output", "tanh", predict=steep)
    found.query(0)
    assert found.measured["reward_correlation"] > 0.5 and found.measured["reward_saturated"] > 0.9
    assert found.measured["labels_used"] == 4
    small = lambda obs, actions: np.stack([0.01 * obs[..., 0], -0.02 * obs[..., 0]])
    found = asked(tmp_path, predict=small)
    found.query(0)
    found.query(100)
    margins = torch.as_tensor(margins_of(small(*found.steps(found.starts[4:]))))  # (members, M)
    labels = torch.as_tensor(found.labels)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(margins, labels[4:].expand(2, 4))
    assert not torch.equal(labels[:4], labels[4:]) and len(set(found.labels[4:])) > 1
    assert found.measured["ce_fresh"] == pytest.approx(float(expected))
    wrong = asked(tmp_path, predict=lambda obs, actions: -obs[None, ..., 0])
    wrong.query(0)
    assert wrong.measured["accuracy_fresh"] == wrong.measured["accuracy_replay"] == 0
    assert wrong.measured["reward_spearman"] == pytest.approx(-1)
    assert math.isnan(wrong.measured["reward_saturated"])  # there are no limits


# The loss


def reward_net(*given, obs_dim=3, action_size=2):
    torch.manual_seed(0)
    return sobirl.BoxReward(obs_dim, action_size, flags("--reward-hidden-size", 5, *given))


@pytest.mark.parametrize(
    "given",
    [
        [],
        ["--reward-output", "tanh"],
        ["--reward-output", "tanh", "--reward-members", 3],
        ["--reward-input", "state", "--reward-members", 2],
    ],
)
def test_the_gradient_of_the_preferences(given, float64):
    """(13): every member's cross-entropy, by autograd."""
    reward = reward_net(*given)
    obs, actions = torch.randn(7, 2, 4, 3), torch.randn(7, 2, 4, 2)
    labels = torch.tensor([1, 0, 0.5, 1, 1, 0, 0.5])
    each, found = reward.at(obs.numpy(), actions.numpy())
    losses, by_margins = preference_loss(margins_of(found), labels.numpy())
    gradient = reward.gradient(each, found, by_step(by_margins / 7, found))

    x = obs if "state" in given else torch.cat([obs, actions], -1)
    outputs = torch.stack([net(x).squeeze(-1) for net in reward.nets])
    expected = outputs.tanh() if "tanh" in given else outputs
    assert np.allclose(found, expected.detach())
    returns = expected.sum(-1)
    cross_entropy = torch.nn.functional.binary_cross_entropy_with_logits(
        returns[..., 0] - returns[..., 1], labels.expand(len(outputs), 7), reduction="none"
    )
    assert np.allclose(losses, cross_entropy.detach(), rtol=1e-12)
    loss = cross_entropy.mean(1).sum()
    assert np.allclose(gradient, flat(torch.autograd.grad(loss, list(reward.parameters()))), atol=1e-14)
    swapped, _ = preference_loss(margins_of(found[:, :, ::-1]), 1 - labels.numpy())
    assert np.allclose(swapped, losses, rtol=1e-12)


def test_large_margins():
    losses, by_margins = preference_loss(np.float32([500, -500, 500]), np.float32([1, 1, 0.5]))
    assert losses.tolist() == [0, 500, 250] and by_margins.tolist() == [0, -1, 0.5]


def test_what_the_follower_sees():
    reward = reward_net("--reward-members", 2)
    obs, actions = np.random.default_rng(0).normal(size=(2, 50, 3)).astype(np.float32)
    actions = actions[:, :2]
    mean = reward.predict(obs, actions).mean(0)
    assert np.allclose(reward.seen(obs, actions), mean)
    reward.normalise(SimpleNamespace(obs=obs, actions=actions))
    seen = reward.seen(obs, actions)
    assert seen.mean() == pytest.approx(0, abs=1e-5) and seen.std() == pytest.approx(1, rel=1e-5)
    reward.vector *= 1000
    reward.mean_std[:] = torch.tensor([0.0, 1.0])
    assert abs(reward.seen(obs, actions)).max() == 10
    reward.normalise(SimpleNamespace(obs=obs, actions=actions))  # this is cut, and not what it is of
    large = reward.predict(obs, actions).mean(0)
    assert np.allclose(reward.seen(obs, actions), (large - large.mean()) / large.std(), atol=1e-4)
    for net in reward.nets:  # rewards that differ by rounding alone are seen as equal
        net[-1].weight.data *= 1e-5 / abs(net[-1].weight).max()
        net[-1].bias.data[:] = 100
    reward.normalise(SimpleNamespace(obs=obs, actions=actions))
    assert 0 < abs(reward.seen(obs, actions)).max() < 0.3
    assert abs(large).max() > 20


@pytest.mark.filterwarnings("error")
def test_a_reward_of_states_warns_of_nothing():
    """PyTorch would, of an array that cannot be written, where matrices are large."""
    reward = reward_net("--reward-input", "state", "--reward-hidden-size", 128, obs_dim=130)
    obs, actions = np.zeros((200, 130), np.float32), np.zeros((200, 2), np.float32)
    assert reward.at(obs, actions)[1].shape == (1, 200)


# Runs


def test_sac_builds_no_reward_net(tmp_path, monkeypatch):
    monkeypatch.setattr(sobirl, "BoxReward", None)
    monkeypatch.setattr(sobirl, "Preferences", None)
    folder = train(sobirl, tmp_path, *PENDULUM, "--method", "sac")
    assert "accuracy_fresh" not in rows(folder / "progress.csv")[0]


def test_the_order_of_an_iteration(tmp_path, monkeypatch):
    """In the first query are all steps, in later ones those of the frozen actor alone; labels in the queue
    stay what they were, and the follower's targets are asked of the net as it is after its training, shifted
    and scaled over all steps so far, which are less than 10,000."""
    events, labels = [], {}
    at, query, train_reward = sobirl.Reward.at, Preferences.query, sobirl.train_reward
    normalise = sobirl.Reward.normalise

    def see_query(self, begin):
        query(self, begin)
        starts = self.starts[self.fresh].copy()
        events.append(("query", begin, self.replay.written, starts, self.measured.copy()))
        for start, label in zip(self.starts, self.labels):
            assert labels.setdefault(tuple(start), label) == label

    def see_training(reward, *others):
        before = reward.vector.copy()
        train_reward(reward, *others)
        events.append(("trained", before, reward.vector.copy()))

    def see_normalise(self, steps):
        normalise(self, steps)
        rewards = self.predict(steps.obs, steps.actions).mean(0)
        assert np.allclose(self.mean_std, [rewards.mean(), rewards.std()], rtol=1e-5)
        events.append(("normalised", len(rewards), self.mean_std.tolist()))

    def see_seen(self, obs, actions):
        events.append(("asked", self.vector.copy()))
        assert self.mean_std.tolist() == [event for event in events if event[0] == "normalised"][-1][2]
        return at(self, obs, actions)[1].mean(0)

    monkeypatch.setattr(Preferences, "query", see_query)
    monkeypatch.setattr(sobirl, "train_reward", see_training)
    monkeypatch.setattr(sobirl.Reward, "seen", see_seen)
    monkeypatch.setattr(sobirl.Reward, "normalise", see_normalise)
    folder = train(sobirl, tmp_path, *PENDULUM, "--total-timesteps", 140)
    kinds = [event[0] for event in events]
    assert kinds == (["query", "trained", "normalised"] + ["asked"] * 20) * 4  # as many updates as steps
    assert [event[1] for event in events if event[0] == "normalised"] == [75, 95, 115, 135]
    queries = [event for event in events if event[0] == "query"]
    trained = [event for event in events if event[0] == "trained"]
    assert [written - begin for _, begin, written, *_ in queries] == [15] * 4
    assert queries[0][3].min() < 60 and len(queries[0][3]) == 10
    for _, begin, written, starts, _ in queries[1:]:
        assert len(starts) == 6 and starts.min() >= begin and starts.max() <= written - 5
    for i, (_, before, after) in enumerate(trained):
        assert (before != after).any()
        seen = [event[1] for event in events if event[0] == "asked"][20 * i : 20 * i + 20]
        assert all((vector == after).all() for vector in seen)
    table = rows(folder / "progress.csv")
    assert [row["labels_used"] for row in table] == [0, 0, 0, 10, 16, 22, 28]
    scales = [event[2][1] for event in events if event[0] == "normalised"]
    assert [row["reward_scale"] for row in table[3:]] == pytest.approx([1, *scales[:-1]], rel=1e-6)
    for row, (*_, measured) in zip(table[3:], queries):
        assert all(row[name] == measured[name] for name in ("accuracy_fresh", "ce_fresh"))
    assert all(math.isnan(row["accuracy_fresh"]) for row in table[:3])
    assert all(math.isfinite(row[name]) for row in table[3:] for name in ("ce", "ce_grad_norm", "r_std"))
    saved = torch.load(folder / "model.pt", weights_only=True)["reward"]
    assert "nets.0.0.weight" in saved and saved["mean_std"].tolist() != [0, 1]


def test_new_pairs_are_measured_before_they_are_queued(tmp_path, monkeypatch):
    found = asked(tmp_path)
    seen = []
    monkeypatch.setattr(found, "measure", lambda starts: seen.append((len(found.labels), len(starts))))
    found.query(0)
    found.query(100)
    assert seen == [(0, 4), (4, 4)]


def test_the_random_reward_stays_as_it_is(tmp_path):
    folder = train(sobirl, tmp_path, *PENDULUM, "--method", "random", "--checkpoint-every", 2)
    first = torch.load(folder / PREVIOUS, weights_only=True)["parts"]["reward"]
    last = torch.load(folder / "checkpoint.pt", weights_only=True)["parts"]["reward"]
    assert [name for name in first if not torch.equal(first[name], last[name])] == ["mean_std"]
    table = rows(folder / "progress.csv")
    assert math.isfinite(table[-1]["accuracy_fresh"]) and math.isnan(table[-1]["ce"])


def test_after_the_budget_the_reward_stays(tmp_path):
    folder = train(sobirl, tmp_path, *PENDULUM, "--label-budget", 22)
    table = rows(folder / "progress.csv")
    assert [row["labels_used"] for row in table[3:7]] == [10, 16, 22, 22]
    assert math.isfinite(table[5]["ce"]) and math.isnan(table[6]["ce"]) and math.isnan(table[-1]["ce"])
    assert math.isfinite(table[-1]["accuracy_fresh"])


HOPPER = [*DURABLE, *QUERY, "--method", "drlhf", "--buffer-size", 90, "--labels", "bernoulli"]
HOPPER += ["--query", "disagreement", "--reward-members", 2]
STEPS = [61, 70, 75, 110, 199, 391]


@pytest.fixture(scope="module")
def reference_and_killed(tmp_path_factory):
    folder, killed = whole_and_killed(tmp_path_factory.mktemp("reference"), STEPS, *HOPPER)
    return contents(folder), killed


@pytest.mark.parametrize("step", STEPS)
def test_resume_is_byte_identical(step, reference_and_killed, tmp_path):
    reference, killed = reference_and_killed
    assert_it_goes_on(killed[step], tmp_path, reference)


def test_flags_change_the_run(tmp_path):
    variants = [
        [],
        ["--method", "random"],
        ["--method", "sac"],
        ["--query-steps", 10],
        ["--segment", 4],
        ["--pairs", 5],
        ["--initial-pairs", 9],
        ["--queue", 10],
        ["--query", "entropy"],
        ["--query", "entropy", "--query-oversample", 3],
        ["--labels", "bernoulli"],
        ["--label-flip", 0.5],
        ["--label-skip", 0.5],
        ["--label-equal", 0.5],
        ["--label-budget", 20],
        ["--teacher-gamma", 0.1],
        ["--reward-lr", 1e-2],
        ["--reward-decay", 1],
        ["--reward-epochs", 3],
        ["--initial-epochs", 5],
        ["--reward-batch-size", 5],
        ["--reward-hidden-size", 9],
        ["--reward-members", 2],
        ["--reward-input", "state"],
        ["--reward-output", "tanh"],
        ["--no-reward-norm"],
    ]
    few = ["--total-timesteps", 120, "--eval-episodes", 0]
    found = [contents(train(sobirl, tmp_path, *PENDULUM, *few, *given))["model"] for given in variants]
    for i, one in enumerate(found):
        assert all(one != other for other in found[:i]), variants[i]


BAD = [
    (["--learning-starts", "50"], "--learning-starts", "multiple"),
    (["--learning-starts", "0"], "--learning-starts", "multiple"),
    (["--query-steps", "21"], "--query-steps", "--outer-steps"),
    (["--query-steps", "5"], "--query-steps", "more than --segment 5"),
    (["--label-skip", "1"], "--label-skip", "leave one of --pairs 6"),
    (["--label-skip", "0.95"], "--label-skip", "leave one of --pairs 6"),
    (["--label-equal", "1"], "--label-equal", "leave one of --pairs 6"),
    (["--label-skip", "0.05"], "--label-skip", "--pairs 6"),
    (["--label-equal", "0.05"], "--label-equal", "--pairs 6"),
    (["--method", "sobirl", "--hyper-start", "396"], "--hyper-start", "at most 395"),
    (["--method", "sobirl", "--hyper-start", "116", "--label-budget", "22"], "--hyper-start", "at most 115"),
    (["--method", "hpgd", "--total-timesteps", "99"], "--learning-starts", "before the end, 80 steps"),
    (["--method", "pbrl", "--label-budget", "10"], "--label-budget", "more than 10"),
    (["--method", "sobirl", "--label-budget", "5", "--label-skip", "0.5"], "--label-budget", "more than 5"),
    (["--method", "sobirl", "--pairs", "1"], "--pairs", "at least 2, to compare losses, or come with --no-b"),
    (["--method", "hpgd", "--no-baseline", "--hyper-batch-size", "1"], "--hyper-batch-size", "at least 2"),
    (["--total-timesteps", "79"], "--learning-starts", "60 steps, the whole iterations"),
    (["--buffer-size", "39"], "--buffer-size", "40"),
    (["--queue", "9"], "--queue", "--initial-pairs"),
    (["--query", "disagreement"], "--reward-members", "at least 2"),
    (["--query", "best"], "--query", "entropy"),
    (["--label-flip", "2"], "--label-flip", "[0, 1]"),
    (["--teacher-gamma", "nan"], "--teacher-gamma", "[0, 1]"),
    (["--reward-members", "0"], "--reward-members", "between 1"),
    (["--reward-decay", "-1"], "--reward-decay", "positive"),
    (["--pairs", "0"], "--pairs", "between 1"),
    (["--segment", "0"], "--segment", "between 1"),
]


@pytest.mark.parametrize("given, flag, fix", BAD)
def test_bad_input_is_one_line(given, flag, fix, capsys, tmp_path):
    err = refused(sobirl, capsys, *PENDULUM, "--runs-dir", tmp_path, *given)
    assert flag in err and fix in err, err
    assert not list(tmp_path.iterdir())


def test_what_only_the_first_query_can_know(tmp_path, capsys):
    """Episodes that are too short, and rewards that are all alike, in one line."""
    given = [*PENDULUM, "--runs-dir", tmp_path, "--env-id"]
    err = refused(sobirl, capsys, *given, "tests.probe_envs:ProbeTwoStep-v0")
    assert "--segment 5 is longer than any episode, of 2 steps" in err
    err = refused(sobirl, capsys, *given, "tests.probe_envs:ProbeForever-v0")
    assert "100% of the pairs tie" in err and "had the reward 1" in err and "--learning-starts" in err


def test_ends_of_episodes_that_tell_too_much_are_noted(tmp_path, capsys):
    train(sobirl, tmp_path, *PENDULUM, "--env-id", "Hopper-v4", "--total-timesteps", 100)
    assert capsys.readouterr().err.count("terminate_when_unhealthy") == 1


@pytest.mark.parametrize("output, notes", [("tanh", 1), ("linear", 0)])
def test_rewards_at_their_limits_are_noted(output, notes, tmp_path, capsys):
    """Once, and only where there are limits: rewards are learned that all are 1, then some that are not."""
    found = Preferences(flags("--reward-output", output), memory(tmp_path, 200), None)
    steps(found.replay, 150)
    for largest in (0.98, 0.995, 0.995, 0.5):
        found.predict = lambda obs, actions: np.full((1, *obs.shape[:-1]), largest)
        found.measure(found.different(0, 4))
        said = capsys.readouterr().err
        notes -= said.count("note: 100% of the learned rewards") * said.count("--reward-output")
        assert largest > 0.98 or not said
    assert notes == 0


# What no preference tells of a reward, a constant: the gradient of these is rounding, and so is the mean
CONSTANT = {("reward", "nets.0.4.bias"), ("reward", "nets.1.4.bias")}


@pytest.mark.parametrize("method", ["sac", "drlhf", "sobirl", "hpgd", "pbrl"])
def test_on_tensors_a_run_is_the_same(method, tmp_path, monkeypatch):
    """As on a GPU, where there are no NumPy arrays: here with tensors of the CPU."""
    few = ["--total-timesteps", 120, "--eval-episodes", 0, "--reward-members", 2]
    given = [*PENDULUM, "--method", method, *few]
    expected = torch.load(train(sobirl, tmp_path, *given) / "model.pt", weights_only=True)
    monkeypatch.setattr(jacobian, "as_array", lambda tensor: tensor.detach())
    found = torch.load(train(sobirl, tmp_path, *given) / "model.pt", weights_only=True)
    for net in {"actor", "critic", "reward"} & expected.keys():
        for name, value in expected[net].items():
            if (net, name) in CONSTANT:
                continue
            close = torch.isclose(found[net][name], value, rtol=1e-4, atol=1e-6)
            assert (close[1:] if name == "mean_std" else close).all(), (net, name)


def test_learns_to_balance_a_pendulum_from_preferences(tmp_path):
    """6,500 steps, after which the mean returns of seeds 1 to 3 are -87, -163 and -162."""
    given = ["--env-id", "Pendulum-v1", "--hidden-size", 64, "--batch-size", 64, "--policy-lr", 3e-3]
    given += ["--q-lr", 4e-3, "--tau", 0.04, "--learning-starts", 1000, "--total-timesteps", 6500]
    given += ["--method", "drlhf", "--reward-lr", 3e-3]
    folder = train(sobirl, tmp_path, *given)
    assert np.mean([row["return"] for row in rows(folder / "evaluation.csv")]) >= -200
    assert np.nanmedian([row["accuracy_replay"] for row in rows(folder / "progress.csv")]) >= 0.8
