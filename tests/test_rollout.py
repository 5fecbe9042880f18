"""What the scripts learn from: rollouts, running statistics, regression targets, seeds and evaluations,
rebuilt by textbook code from what environments remember of a run."""

import copy
import csv
import re
from typing import NamedTuple

import numpy as np
import pytest
import torch

import blpo_continuous as blpo
import blpo_discrete
import ppo_continuous as ppo
import ppo_discrete
from support.environments import EVALUATION, RESUMED
from tests.probe_envs import Wander

SCRIPTS = [ppo, blpo, ppo_discrete, blpo_discrete]
NORMALISED = ["--norm-obs", "--norm-reward"]
N, T = 4, 16
SMALL = ["--num-envs", N, "--num-steps", T, "--num-minibatches", 2, "--update-epochs", 1, "--hidden-size", 8]
SMALL += ["--gamma", 0.9, "--gae-lambda", 0.8, "--total-timesteps", 3 * N * T, "--eval-episodes", 0]


# A run in this process, and what it hands to make_batch


class Rollout(NamedTuple):
    """What make_batch is given, in its order: arrays (N, T, ...)."""

    obs: np.ndarray
    next_obs: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    done: np.ndarray


class Iteration(NamedTuple):
    """Copies of what one iteration began with, of the batch it made, and of its epochs' permutations."""

    rollout: Rollout
    actor: torch.nn.Module
    critic: torch.nn.Module
    args: object
    batch: NamedTuple
    explained_variance: float
    permutations: list


def is_discrete(script):
    return script in (ppo_discrete, blpo_discrete)


def main(script, tmp_path, *flags):
    """The script, in this process, on the environment that remembers; the run folder."""
    Wander.made.clear()
    env_id = "tests.probe_envs:ProbeWander" + "Discrete" * is_discrete(script) + "-v0"
    return script.main([*map(str, flags), "--env-id", env_id, "--runs-dir", str(tmp_path)])


def recorded_run(script, tmp_path, *flags):
    """The run folder, and the Iterations of the run."""
    iterations = []
    make_batch = script.make_batch
    randperm = torch.randperm

    def recording_make_batch(rollout, actor, critic, args):
        networks = copy.deepcopy(actor), copy.deepcopy(critic)
        arrays = Rollout(*map(np.copy, rollout))
        made = make_batch(rollout, actor, critic, args)
        batch, explained_variance = made[0], made[-1]
        kept = type(batch)(*map(np.copy, batch))
        iterations.append(Iteration(arrays, *networks, args, kept, explained_variance, []))
        return made

    def recording_randperm(*size, **options):
        permutation = randperm(*size, **options)
        if not options:  # those of sketches have a generator
            iterations[-1].permutations.append(permutation)
        return permutation

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "make_batch", recording_make_batch)
        patch.setattr(torch, "randperm", recording_randperm)
        folder = main(script, tmp_path, *flags)
    return folder, iterations


def rows(path):
    with open(path) as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


# The textbook


def advantages_by_recursion(rollout, values, next_values, gamma, gae_lambda):
    """Generalised advantage estimation, backwards through the steps of each environment; lists of floats or
    of tensors, [n][t]. The state after a step has no value if the step terminated; no sum goes past the end
    of an episode, whichever kind of end it is."""
    rows_of_advantages = []
    for n in range(len(values)):
        ahead = 0.0
        row = []
        for t in reversed(range(len(values[n]))):
            follows = 0.0 if rollout.terminated[n][t] else next_values[n][t]
            delta = float(rollout.rewards[n][t]) + gamma * follows - values[n][t]
            ahead = delta if rollout.done[n][t] else delta + gamma * gae_lambda * ahead
            row.insert(0, ahead)
        rows_of_advantages.append(row)
    return rows_of_advantages


class Statistics:
    """Mean and deviation of everything seen so far, computed anew each time from all of it, with a prior of
    mean 0 and variance 1 that counts 1e-4 observations."""

    def __init__(self):
        self.seen = []

    def add(self, x):  # (N,) or (N, obs_dim)
        self.seen.extend(np.array(x))

    @property
    def mean(self):
        return np.sum(self.seen, 0) / (len(self.seen) + 1e-4)

    @property
    def deviation(self):
        square = (np.sum(np.square(self.seen), 0) + 1e-4) / (len(self.seen) + 1e-4)
        return np.sqrt(square - self.mean**2 + 1e-8)

    def normalised(self, x):
        return np.clip((x - self.mean) / self.deviation, -10, 10)


def rebuilt(envs, args):
    """What the envs' memories should have become in the rollout arrays, one long Rollout of all iterations
    (without actions), and the final statistics of the observations."""
    episodes = [iter(env.resets[2:]) for env in envs]  # the first reset looks at the shape, the next begins
    raw = np.array([env.resets[1][1] for env in envs])
    obs_statistics, return_statistics = Statistics(), Statistics()
    obs_statistics.add(raw)
    normalise = obs_statistics.normalised if args.norm_obs else np.array
    discounted = np.zeros(len(envs))
    obs = normalise(raw)
    columns = []
    for answers in zip(*(env.steps for env in envs)):
        _, raw, rewards, terminated, truncated = map(np.array, zip(*answers))
        last = raw.copy()
        done = terminated | truncated
        for n in np.flatnonzero(done):
            raw[n] = next(episodes[n])[1]
        obs_statistics.add(raw)
        discounted = args.gamma * discounted + rewards
        return_statistics.add(discounted)
        discounted[done] = 0
        if args.norm_reward:
            rewards = np.clip(rewards / return_statistics.deviation, -10, 10)
        columns.append((obs, normalise(last), rewards, terminated, done))
        obs = normalise(raw)
    obs, next_obs, rewards, terminated, done = (np.stack(column, 1) for column in zip(*columns))
    return Rollout(obs, next_obs, None, rewards, terminated, done), obs_statistics


def policy(script, actor, obs):
    """The policy's distribution of actions, or, continuous, of their components."""
    if is_discrete(script):
        return torch.distributions.Categorical(logits=actor.net(obs))
    return torch.distributions.Normal(actor.net(obs), actor.log_std.exp())


def normalised_reference(model):
    """The map from raw observations to what the policy saw, from the statistics in model.pt."""
    mean, var = (model["obs_rms"][name].numpy() for name in ("mean", "var"))
    return lambda raw: np.clip((raw - mean) / np.sqrt(var + 1e-8), -10, 10)


def trained_net(script, model):
    actor = script.Actor(3, 3 if is_discrete(script) else 2, 8)
    actor.load_state_dict(model["actor"])
    return actor.net


def taken(script, outputs):
    """The most likely actions for the outputs of the policy's network, as environments take them."""
    return outputs.argmax(-1) + 2 if is_discrete(script) else outputs.clip(-1, 1)


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


# Tests


@pytest.mark.parametrize("flags", [NORMALISED, ["--no-norm-obs", "--no-norm-reward"]])
@pytest.mark.parametrize("script", SCRIPTS)
def test_rollout_and_targets_are_those_of_the_textbook(script, flags, tmp_path, monkeypatch):
    """Observations, rewards and ends of three iterations from the environments' own memory,
    log-probabilities, advantages and returns from the networks of the time."""
    monkeypatch.setattr(Wander, "spike", 40)
    folder, iterations = recorded_run(script, tmp_path, *SMALL, *flags)
    args = iterations[0].args
    envs = list(Wander.made)
    assert len(envs) == N and len(iterations) == 3 and all(len(env.steps) == 3 * T for env in envs)
    expected, statistics = rebuilt(envs, args)
    found = Rollout(*(np.concatenate(arrays, 1) for arrays in zip(*(i.rollout for i in iterations))))
    for name in ("obs", "next_obs", "rewards", "terminated", "done"):
        assert_close(getattr(found, name), getattr(expected, name))

    in_episode = ~expected.done[:, :-1]
    assert (found.next_obs[:, :-1][in_episode] == found.obs[:, 1:][in_episode]).all()
    given = np.array([[action for action, *_ in env.steps] for env in envs])
    assert_close(given, found.actions + 2 if is_discrete(script) else found.actions.clip(-1, 1))

    # all of that matters here: both kinds of end and both at once, clipped values, open episodes
    truncated = np.array([[step[4] for step in env.steps] for env in envs])
    terminated = found.terminated > 0
    for kind_of_end in (terminated & truncated, terminated & ~truncated, truncated & ~terminated):
        assert kind_of_end.any()
    assert not expected.done[:, T - 1 :: T].all()
    if args.norm_obs:
        assert (np.abs(expected.obs) == 10).any() and (np.abs(expected.rewards) == 10).any()
        rms = torch.load(folder / "model.pt", weights_only=True)["obs_rms"]
        np.testing.assert_allclose(rms["mean"], statistics.mean, rtol=1e-9)
        np.testing.assert_allclose(rms["var"] + 1e-8, statistics.deviation**2, rtol=1e-6)
    if not is_discrete(script):
        assert (np.abs(found.actions) > 1).any()

    for i in iterations:
        obs, next_obs = torch.as_tensor(i.rollout.obs), torch.as_tensor(i.rollout.next_obs)
        values, next_values = (i.critic.value(x).detach().squeeze(-1).numpy() for x in (obs, next_obs))
        advantages = np.array(advantages_by_recursion(i.rollout, values, next_values, 0.9, 0.8))
        returns = advantages + values
        _, _, logprobs_found, advantages_found, returns_found, *_ = i.batch
        assert_close(advantages_found.reshape(N, T), advantages)
        assert_close(returns_found.reshape(N, T), returns)
        explained = 1 - advantages.var() / returns.var()
        assert i.explained_variance == pytest.approx(explained, abs=1e-5)
        logprobs = policy(script, i.actor, obs).log_prob(torch.as_tensor(i.rollout.actions))
        logprobs = logprobs if is_discrete(script) else logprobs.sum(-1)
        assert_close(logprobs_found.reshape(N, T), logprobs.detach())


@pytest.mark.parametrize("script", SCRIPTS)
def test_actions_are_samples_of_the_policy(script, tmp_path):
    """Those of a second iteration, whose policy, after large steps, they tell apart from the first one."""
    flags = [*SMALL, *NORMALISED, "--actor-lr", 0.8, "--num-steps", 200, "--total-timesteps", 2 * 200 * N]
    _, (_, last) = recorded_run(script, tmp_path, *flags)
    actions = torch.as_tensor(last.rollout.actions)
    with torch.no_grad():
        distribution = policy(script, last.actor, torch.as_tensor(last.rollout.obs))
    if is_discrete(script):
        probabilities = distribution.probs.reshape(-1, 3)
        counts = torch.bincount(actions.flatten(), minlength=3)
        deviation = (probabilities * (1 - probabilities)).sum(0).sqrt()
        assert ((counts - probabilities.sum(0)).abs() < 4 * deviation).all()
        assert ((probabilities.mean(0) - 1 / 3).abs() * len(probabilities) > 5 * deviation).any()
    else:
        z = ((actions - distribution.mean) / distribution.stddev).flatten(0, 1)
        assert (z.mean(0).abs() < 4 / len(z) ** 0.5).all()
        assert ((z.square().mean(0) - 1).abs() < 4 * (2 / len(z)) ** 0.5).all()
        assert ((distribution.variance[0, 0] - 1).abs() > 8 * (2 / len(z)) ** 0.5).any()


@pytest.mark.parametrize("script", [ppo_discrete, blpo_discrete])
def test_noise_samples_any_softmax(script):
    """A far from uniform one, which tells Gumbel noise from its mirror image."""
    torch.manual_seed(0)
    probabilities = np.array([0.8, 0.15, 0.05])
    samples = script.Actor.act(np.log(probabilities), script.Actor(1, 3).noise(20_000))
    assert np.abs(np.bincount(samples) / 20_000 - probabilities).max() < 0.01


def evaluation_seeds(tmp_path, script, seed):
    """The seeds of all first resets and of all evaluation episodes of a run."""
    main(script, tmp_path, *SMALL, "--seed", seed, "--eval-episodes", 3)
    training, evaluation = Wander.made[:N], Wander.made[N]
    assert all([s for s, _ in env.resets[2:]] == [None] * (len(env.resets) - 2) for env in training)
    return [env.resets[1][0] for env in training] + [s for s, _ in evaluation.resets]


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_two_environments_or_episodes_share_a_seed(script, tmp_path):
    """Neither within a run nor between runs with neighbouring seeds; the same --seed gives the same ones."""
    one, two = (evaluation_seeds(tmp_path, script, seed) for seed in (1, 2))
    assert len({*one, *two}) == 2 * (N + 3) and None not in one + two
    assert evaluation_seeds(tmp_path, script, 1) == one


@pytest.mark.parametrize("flags", [NORMALISED, ["--no-norm-obs", "--no-norm-reward"]])
@pytest.mark.parametrize("script", SCRIPTS)
def test_evaluation_sees_normalised_observations_and_reports_raw_returns(script, flags, tmp_path, capsys):
    """At the end, by --evaluate and by --eval-every, with statistics that evaluation leaves alone."""
    flags_of_evaluation = ["--eval-episodes", 3, "--eval-every", 3]
    folder = main(script, tmp_path, *SMALL, *flags, "--actor-lr", 0.05, *flags_of_evaluation)
    during, after = Wander.made[N:]
    capsys.readouterr()
    main(script, tmp_path, "--evaluate", folder, "--eval-episodes", 3)
    by_flag = Wander.made[-1]
    line = capsys.readouterr().out
    model = torch.load(folder / "model.pt", weights_only=True)
    net = trained_net(script, model)
    normalise = normalised_reference(model) if flags == NORMALISED else np.array
    for env in (during, after, by_flag):
        ends = [terminated or truncated for *_, terminated, truncated in env.steps]
        assert sum(ends) == 3 and ends[-1]
        starts = iter(env.resets)
        raw = next(starts)[1]
        seen = []
        for (_, answer, *_), end in zip(env.steps, ends):
            seen.append(raw)
            raw = next(starts, (None, None))[1] if end else answer
        outputs = net(torch.as_tensor(normalise(np.array(seen)), dtype=torch.float32)).detach().numpy()
        np.testing.assert_allclose([a for a, *_ in env.steps], taken(script, outputs), rtol=1e-4, atol=1e-5)
    assert len({tuple(np.round(outputs, 4)) for outputs in outputs}) > 3  # actions depend on what is seen

    returns, lengths = [0.0], [0]
    for _, _, reward, terminated, truncated in by_flag.steps:
        returns[-1] += reward
        lengths[-1] += 1
        if terminated or truncated:
            returns.append(0.0)
            lengths.append(0)
    table = rows(folder / "evaluation.csv")
    np.testing.assert_allclose([row["return"] for row in table], returns[:3], rtol=1e-9)
    assert [row["length"] for row in table] == lengths[:3]
    last = rows(folder / "progress.csv")[-1]
    assert last["eval_return"] == pytest.approx(np.mean(returns[:3]))
    assert last["eval_length"] == pytest.approx(np.mean(lengths[:3]))
    mean, deviation = map(float, re.search(r"return (-?[\d.]+) ± ([\d.]+)", line).groups())
    assert mean == pytest.approx(np.mean(returns[:3]), abs=0.06)
    assert deviation == pytest.approx(np.std(returns[:3]), abs=0.06)


@pytest.mark.parametrize("script", SCRIPTS)
def test_rows_of_episodes_have_raw_returns(script, tmp_path):
    """episodes.csv: the sums of the rewards as the environments gave them, in the order of the ends."""
    folder = main(script, tmp_path, *SMALL, *NORMALISED)
    expected = []
    sums, counts = np.zeros(N), np.zeros(N)
    for t, answers in enumerate(zip(*(env.steps for env in Wander.made))):
        for n, (_, _, reward, terminated, truncated) in enumerate(answers):
            sums[n] += reward
            counts[n] += 1
            if terminated or truncated:
                expected.append([(t + 1) * N, sums[n], counts[n]])
                sums[n] = counts[n] = 0
    found = [list(row.values()) for row in rows(folder / "episodes.csv")]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


class Killed(Exception):
    """Ends a run between two checkpoints."""


@pytest.mark.parametrize("script", SCRIPTS)
def test_resumed_environments_have_seeds_of_their_own(script, tmp_path):
    """An environment that cannot be put back begins new episodes: not those it began with, not those of
    evaluation, not those of an earlier resume; before the first step it may begin as it began. Statistics go
    on from the checkpoint."""
    flags = [*SMALL, *NORMALISED, "--seed", 5, "--checkpoint-every", 1]
    seeds = []
    for finished in range(3):  # iterations, when the run is killed
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            patch.setattr(script, "make_batch", killing(script.make_batch, after=min(finished, 1)))
            main(script, tmp_path, *flags)
        (folder,) = tmp_path.iterdir()
        seeds.append(seeds_of_training())
        flags = ["--resume", folder]
    counted = torch.load(folder / "checkpoint.pt", weights_only=True)["parts"]["envs"]["obs_rms"]["count"]
    assert float(counted) == pytest.approx(N * (2 * T + 1) + 1e-4)  # the first observations count once
    main(script, tmp_path, *flags)
    begun, at_once, first, second = *seeds, seeds_of_training()
    main(script, tmp_path, "--evaluate", folder)
    evaluation = [seed for seed, _ in Wander.made[0].resets]
    assert len({*begun, *first, *second, *evaluation}) == 3 * N + 10
    assert not {*at_once} & {*first, *second, *evaluation}
    keys = 5, (5, RESUMED, N * T), (5, RESUMED, 2 * N * T), (5, EVALUATION)
    for key, some in zip(keys, (begun, first, second, evaluation)):
        assert np.random.SeedSequence(key).generate_state(len(some)).tolist() == some


def killing(make_batch, after):
    """make_batch that raises after so many calls."""
    calls = []

    def dies(*inputs):
        if len(calls) == after:
            raise Killed
        calls.append(None)
        return make_batch(*inputs)

    return dies


def seeds_of_training():
    """The last seed that each of the environments of the last run was given before its first step."""
    return [[seed for seed, _ in env.resets if seed is not None][-1] for env in Wander.made[:N]]
