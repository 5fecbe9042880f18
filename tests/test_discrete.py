"""sobirl_discrete.py: what differs from sobirl_continuous.py. Gradients in float64 against autograd, a whole
run against one that is written literally, a table against its solution, images, the leader's term as an exact
sum over actions, and the script as a user meets it."""

import functools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import jacobian
import leader
import sobirl_continuous
import sobirl_discrete as sobirl
import sobirl_tabular as tabular
from leader import preference_gradient, suffix_gradient
from support.environments import Image, image_of, make_env
from support.flags import parse_args
from support.preferences import Pairs, margins_of
from support.replay import Replay
from tests.probe_envs import Lights, Switches, Table, Wander
from tests.test_leader import enumerated, true_reward
from tests.test_sac import assert_it_goes_on, assert_true_steps, contents, flat, whole_and_killed
from tests.test_scripts import ROOT, refused, rows, run, train

SMALL = ["--hidden-size", 8, "--batch-size", 8, "--eval-episodes", 1, "--outer-steps", 20]
SMALL += ["--learning-starts", 60, "--total-timesteps", 240, "--checkpoint-every", 3, "--update-frequency", 1]
SMALL += ["--query-steps", 15, "--segment", 5, "--pairs", 6, "--initial-pairs", 10, "--hyper-batch-size", 3]
SMALL += ["--reward-hidden-size", 8, "--reward-epochs", 2, "--initial-epochs", 4, "--reward-batch-size", 4]
POLE = [*SMALL, "--env-id", "tests.probe_envs:ProbePole-v0"]
LIGHTS = [*SMALL, "--env-id", "tests.probe_envs:ProbeLights-v0"]
FORM = Image(5, 4, 2, 255.0)
LEADERS = ["drlhf", "sobirl", "hpgd", "pbrl", "random"]


@functools.cache
def flags(*given):
    return parse_args(sobirl.Args, "", list(map(str, given)))


def as_numpy(x):
    return x.detach().numpy()


@pytest.fixture(params=[as_numpy, torch.as_tensor], ids=["numpy", "torch"])
def kind(request, monkeypatch):
    """Makes of a tensor what the script calculates with, on the CPU and elsewhere."""
    if request.param is torch.as_tensor:
        monkeypatch.setattr(jacobian, "as_array", lambda tensor: tensor.detach())
    return request.param


INPUTS = pytest.mark.parametrize("inputs", [4, FORM], ids=["vectors", "images"])


def observed(inputs, *shape):
    """Observations (*shape, obs_dim), of images as bytes."""
    rng = np.random.default_rng(0)
    if isinstance(inputs, int):
        return torch.as_tensor(rng.normal(size=(*shape, inputs)))
    return torch.as_tensor(rng.integers(0, 256, (*shape, 5 * 4 * 2), dtype=np.uint8))


# The follower's gradients, against autograd


@INPUTS
def test_gradients_of_actor_and_critics(inputs, kind, float64):
    torch.manual_seed(0)
    actor, critic = sobirl.Actor(inputs, 3, hidden=6), sobirl.Critic(inputs, 3, hidden=6)
    obs = observed(inputs, 9)
    values = torch.stack([net(obs) for net in critic.nets])
    assert (values[0] < values[1]).any() and (values[0] > values[1]).any()
    log_pi = torch.log_softmax(actor.net(obs), 1)
    pi = log_pi.exp()
    V = (pi * (values.min(0).values.detach() - 0.2 * log_pi)).sum(1)
    found = sobirl.soft_value(critic.values(kind(obs))[1], actor.policy(kind(obs)), 0.2)
    assert torch.allclose(torch.as_tensor(found), V)
    loss, gradient = sobirl.actor_gradient(actor.policy(kind(obs)), critic, kind(obs), 0.2)
    assert loss == pytest.approx(-float(V.mean().detach()), rel=1e-12)
    expected = flat(torch.autograd.grad(-V.mean(), list(actor.parameters())))
    assert torch.allclose(torch.as_tensor(gradient), expected, atol=1e-14) and expected.abs().max() > 1e-3

    actions, y = torch.tensor([0, 2, 1, 1, 2, 0, 2, 2, 1], dtype=torch.int32), torch.randn(9)
    loss, value, gradient = sobirl.critic_gradient(critic, kind(obs), kind(actions), kind(y))
    taken = values.gather(2, actions.long().expand(2, 9)[..., None]).squeeze(2)
    expected = (taken - y).square().mean(1).sum()
    assert 2 * loss == pytest.approx(float(expected.detach()), rel=1e-12)
    assert value == pytest.approx(float(taken.mean().detach()), rel=1e-12)
    expected = flat(torch.autograd.grad(expected, list(critic.parameters())))
    assert torch.allclose(torch.as_tensor(gradient), expected, atol=1e-13)

    log_alpha = torch.tensor(math.log(0.3), requires_grad=True)
    loss = (pi.detach() * (-log_alpha.exp() * (log_pi.detach() + 0.7))).sum(1).mean()
    (expected,) = torch.autograd.grad(loss, log_alpha)
    found = sobirl.temperature_gradient(-actor.policy(kind(obs)).entropies, 0.3, 0.7)
    assert found == pytest.approx(float(expected), rel=1e-9)


def test_actions_are_samples_of_the_policy():
    torch.manual_seed(0)
    actor = sobirl.Actor(4, 3, hidden=6)
    logits = np.float32([[1.0, 0.0, -1.0]])
    drawn = actor.act(logits, actor.noise(20_000))
    probs = np.exp(logits[0]) / np.exp(logits).sum()
    counts = np.bincount(drawn, minlength=3)
    assert (abs(counts - 20_000 * probs) < 4 * np.sqrt(20_000 * probs * (1 - probs))).all()
    assert actor.act(logits, 0.0).tolist() == [0]
    space = sobirl.gym.spaces.Discrete(3, start=5)
    assert actor.for_env(np.array([0, 2]), space) == [5, 7]


# A whole run, with the updates written literally


def test_a_run_is_that_of_the_textbook(float64, tmp_path, monkeypatch):
    """From the batches that were drawn, which are steps of the environment's own memory: the weights that the
    run ends with, by autograd and PyTorch's optimizers, to eight digits."""
    Wander.made.clear()
    monkeypatch.setattr(Wander, "spike", None)
    batches, first, critics = [], {}, []
    sample, begin = Replay.sample, sobirl.Critic.__init__

    def see_sample(self, count):
        batches.append(sample(self, count))
        actor = self.run.parts["actor"]
        first.setdefault("actor", {k: v.clone() for k, v in actor.state_dict().items()})
        return batches[-1]

    def see_critic(self, *inputs):
        begin(self, *inputs)
        critics.append(self)
        first.setdefault("critic", {k: v.clone() for k, v in self.state_dict().items()})

    monkeypatch.setattr(Replay, "sample", see_sample)
    monkeypatch.setattr(sobirl.Critic, "__init__", see_critic)
    given = ["--env-id", "tests.probe_envs:ProbeWanderDiscrete-v0", "--eval-episodes", 0, "--gamma", 0.9]
    given += ["--tau", 0.05, "--target-frequency", 4, "--update-frequency", 2, "--target-entropy", 0.5]
    given += ["--policy-lr", 0.01, "--q-lr", 0.02, "--alpha", 0.5, "--total-timesteps", 180]
    folder = train(sobirl, tmp_path, *SMALL, *given)
    (env,) = Wander.made
    assert len(batches) == 60
    env.steps = [(np.int64(action - 2), *rest) for action, *rest in env.steps]  # numbered from 0
    assert_true_steps(batches, env)

    actor, critic, target = sobirl.Actor(3, 3, 8), sobirl.Critic(3, 3, 8), sobirl.Critic(3, 3, 8)
    actor.load_state_dict(first["actor"])
    critic.load_state_dict(first["critic"])
    target.load_state_dict(first["critic"])
    log_alpha = torch.tensor([math.log(0.5)], requires_grad=True)
    actor_adam = torch.optim.Adam(actor.parameters(), 0.01)
    critic_adam = torch.optim.Adam(critic.parameters(), 0.02)
    alpha_adam = torch.optim.Adam([log_alpha], 0.02)
    for update, batch in enumerate(batches, 31):  # of steps 62, 64, ...
        obs, actions, rewards, terminated, next_obs = (torch.as_tensor(x) for x in batch)
        obs, rewards, terminated, next_obs = (x.double() for x in (obs, rewards, terminated, next_obs))
        alpha = log_alpha.exp().detach()
        with torch.no_grad():
            log_pi = torch.log_softmax(actor.net(next_obs), 1)
            smaller = torch.minimum(*(net(next_obs) for net in target.nets))
            y = rewards + 0.9 * (1 - terminated) * (log_pi.exp() * (smaller - alpha * log_pi)).sum(1)
        taken = actions.long()[:, None]
        loss = sum(torch.nn.functional.mse_loss(net(obs).gather(1, taken)[:, 0], y) for net in critic.nets)
        critic_adam.zero_grad()
        loss.backward()
        critic_adam.step()
        if update % 4 == 0:
            with torch.no_grad():
                for p, q in zip(critic.parameters(), target.parameters()):
                    q.copy_(0.05 * p + 0.95 * q)
        log_pi = torch.log_softmax(actor.net(obs), 1)
        smaller = torch.minimum(*(net(obs) for net in critic.nets)).detach()
        loss = (log_pi.exp() * (alpha * log_pi - smaller)).sum(1).mean()
        actor_adam.zero_grad()
        loss.backward()
        actor_adam.step()
        entropy = -(log_pi.exp() * log_pi).sum(1).detach()
        alpha_loss = (log_alpha.exp() * (entropy - 0.5 * math.log(3))).mean()
        alpha_adam.zero_grad()
        alpha_loss.backward()
        alpha_adam.step()
    model = torch.load(folder / "model.pt", weights_only=True)
    for name, net in (("actor", actor), ("critic", critic)):
        for key, value in net.state_dict().items():
            assert torch.allclose(model[name][key], value, rtol=1e-6, atol=1e-8), key
            assert not torch.allclose(first[name][key], value, rtol=1e-2)
    for key, value in target.state_dict().items():
        assert torch.allclose(critics[1].state_dict()[key], value, rtol=1e-6, atol=1e-8), key
    parts = torch.load(folder / "checkpoint.pt", weights_only=True)["parts"]
    assert torch.allclose(parts["temperature"]["log_alpha"], log_alpha, rtol=1e-6)


def test_values_of_a_table(tmp_path):
    """With a fixed temperature Q is within 1e-2 of the solution, and pi is its softmax."""
    given = ["--env-id", "tests.probe_envs:ProbeTable-v0", "--no-autotune", "--alpha", 0.5, "--gamma", 0.8]
    given += ["--hidden-size", 16, "--batch-size", 32, "--policy-lr", 0.01, "--q-lr", 0.01, "--tau", 0.05]
    given += ["--learning-starts", 200, "--total-timesteps", 4000, "--update-frequency", 1, "--anneal-lr"]
    folder = train(sobirl, tmp_path, *given, "--outer-steps", 200, "--eval-episodes", 0)
    model = torch.load(folder / "model.pt", weights_only=True)
    actor, critic = sobirl.Actor(3, 2, 16), sobirl.Critic(3, 2, 16)
    actor.load_state_dict(model["actor"])
    critic.load_state_dict(model["critic"])
    r, P = torch.as_tensor(Table.rewards), torch.eye(3, dtype=torch.float64)[Table.to]
    problem = SimpleNamespace(P=P, gamma=0.8, tau=0.5)
    Q = tabular.solve_follower(problem, r, torch.zeros(3, 2, dtype=torch.float64)).numpy()
    assert abs(critic.values(np.eye(3, dtype=np.float32))[1] - Q).max() <= 0.01
    pi = torch.softmax(torch.as_tensor(Q) / 0.5, 1).numpy()
    assert abs(actor.policy(np.eye(3, dtype=np.float32)).probs - pi).max() <= 0.01


# The leader


def reward_net(*given, inputs=4, choices=3):
    torch.manual_seed(0)
    args = flags("--reward-hidden-size", 5, *given)
    return sobirl.ChoiceReward(inputs, choices, args, sobirl.reward_network)


def pairs(inputs=4, M=6, L=4, choices=3):
    rng = np.random.default_rng(1)
    actions = rng.integers(0, choices, (M, 2, L)).astype(np.int32)
    return Pairs(observed(inputs, M, 2, L).numpy(), actions, rng.choice([0.0, 0.5, 1.0], M))


def of_kind(batch, kind):
    return Pairs(*(kind(torch.as_tensor(x)) for x in batch))


def learned(reward, obs):
    """Rewards of all actions, differentiable, (members, ..., A)."""
    obs = torch.as_tensor(obs)
    outputs = torch.stack([net(obs.reshape(-1, obs.shape[-1])) for net in reward.nets])
    outputs = outputs.reshape(len(outputs), *obs.shape[:-1], -1)
    return outputs.tanh() if reward.args.reward_output == "tanh" else outputs


def of_actions(rewards, actions):
    index = torch.as_tensor(actions).long().expand(rewards.shape[:-1])[..., None]
    return rewards.gather(-1, index).squeeze(-1)


def cross_entropy(rewards, labels):
    margins = margins_of(rewards)
    labels = torch.as_tensor(labels).expand_as(margins)
    return torch.nn.functional.binary_cross_entropy_with_logits(margins, labels, reduction="none")


MEMBERS = pytest.mark.parametrize(
    "given", [[], ["--reward-output", "tanh", "--reward-members", 2], ["--reward-input", "state"]]
)


@INPUTS
@MEMBERS
def test_gradient_of_the_preferences(given, inputs, kind, float64):
    """(13), by autograd; of rewards that do not depend on the action there is one output."""
    reward, batch = reward_net(*given, inputs=inputs), pairs(inputs)
    losses, margins, gradient = preference_gradient(reward, of_kind(batch, kind))
    every = learned(reward, batch.obs)
    assert every.shape[-1] == (1 if "state" in given else 3)
    rewards = of_actions(every, batch.actions * (every.shape[-1] > 1))
    expected = cross_entropy(rewards, batch.labels)
    assert torch.allclose(torch.as_tensor(losses), expected)
    assert torch.allclose(torch.as_tensor(margins), margins_of(rewards))
    expected = flat(torch.autograd.grad(expected.mean(1).sum(), list(reward.parameters())))
    assert torch.allclose(torch.as_tensor(gradient), expected, atol=1e-14)
    assert np.allclose(reward.predict(batch.obs, batch.actions), as_numpy(rewards))


def given_pairs(batch):
    """What second_term and rival_gradient ask of Preferences, of all of these pairs."""
    every = np.arange(len(batch.labels))
    chosen = lambda places: Pairs(*(x[places] for x in batch))
    return SimpleNamespace(some_fresh=lambda *_: every, pairs=chosen, fresh=every)


def second_term(reward, actor, batch, alpha=0.2, places=None, method="sobirl", given=()):
    args = flags("--method", method, *given)
    return sobirl.second_term(reward, actor, alpha, given_pairs(batch), None, args, places)


@INPUTS
@pytest.mark.parametrize("baseline", [True, False])
@pytest.mark.parametrize("given", [[], ["--reward-output", "tanh", "--reward-members", 2]])
def test_gradient_of_the_second_term(given, baseline, inputs, float64):
    """(78) with the exact expectation over actions."""
    reward, batch = reward_net(*given, inputs=inputs), pairs(inputs)
    actor = sobirl.Actor(inputs, 3, 6)
    actor.vector *= 3  # chances that are not all alike
    more = [] if baseline else ["--no-baseline"]
    gradient, score = second_term(reward, actor, batch, given=more)
    every = learned(reward, batch.obs)
    rewards = of_actions(every, batch.actions)
    obs = torch.as_tensor(batch.obs)
    pi = torch.softmax(actor.net(obs.flatten(0, 2)), 1).reshape(6, 2, 4, 3).detach()
    assert pi.std(-1).max() > 0.05
    scores = (rewards - (pi * every).sum(-1)).sum((-2, -1))
    losses = cross_entropy(rewards, batch.labels).detach().mean(0)  # of the members
    b = (losses.sum() - losses) / 5 if baseline else 0.0
    loss = ((losses - b) * scores).mean(1).sum() / 0.2
    expected = flat(torch.autograd.grad(loss, list(reward.parameters())))
    assert np.allclose(gradient, expected, atol=1e-13) and expected.abs().max() > 1e-3
    assert score == pytest.approx(float(scores.mean().detach()), rel=1e-9)


def test_the_other_terms(float64):
    """hpgd is (14) of leader.py; the rival's gradient is REINFORCE."""
    reward, batch = reward_net("--reward-members", 2), pairs()
    torch.manual_seed(1)
    rival = sobirl.Actor(4, 3, 6)
    found, _ = second_term(reward, rival, batch, method="hpgd", given=["--gamma", 0.5])
    assert (found == suffix_gradient(reward, batch, 0.5, 0.2, True)).all()
    every = learned(reward, batch.obs)
    rewards = of_actions(every, batch.actions)
    discounts = torch.tensor([1, 1.5, 1.75, 1.875])  # sums of 0.5^k
    losses = cross_entropy(rewards, batch.labels).detach().mean(0)
    sums = rewards * discounts
    scores = (sums - sums.mean((1, 2), keepdim=True)).sum((-2, -1))
    b = (losses.sum() - losses) / 5
    expected = ((losses - b) * scores).mean(1).sum() / 0.2
    assert np.allclose(found, flat(torch.autograd.grad(expected, list(reward.parameters()))), atol=1e-13)

    reward.mean_std[1] = 3.0
    args = flags("--method", "pbrl", "--penalty", 0.2, "--segment", 5)
    played, _ = sobirl.log_probs_of(rival, batch)
    found = sobirl.rival_gradient(rival, played, reward, given_pairs(batch), None, args)
    log_pi = torch.log_softmax(rival.net(torch.as_tensor(batch.obs)), -1)
    log_prob = of_actions(log_pi, batch.actions).sum((1, 2))
    loss = ((losses - losses.mean()) * log_prob).mean() / (0.2 * 5)
    assert np.allclose(found, flat(torch.autograd.grad(loss, list(rival.parameters()))), atol=1e-13)


def linear(weights):
    """A network without hidden layers, of weights (outputs, inputs)."""
    net = torch.nn.Sequential(torch.nn.Linear(*weights.shape[::-1]))
    torch.nn.init.zeros_(net[0].bias)
    net[0].weight.data[:] = weights
    return net


def tables(problem, x, Q):
    """Reward net and actor that are the tables x and softmax(Q / tau), states being vectors with a single
    1."""
    table = linear(x.reshape(Q.shape).T)
    reward = sobirl.ChoiceReward(*Q.shape, flags(), lambda *_: table)
    actor = sobirl.Actor(len(Q), Q.shape[1], 4)
    actor.net = linear(Q.T / problem.tau)
    actor.jacobian = jacobian.jacobian_of(actor.net)
    return reward, actor


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sizes", [dict(S=4, A=3, H=1), dict(S=2, A=2, H=2)])
def test_surrogate_is_the_one_step_hypergradient(sizes, seed, float64):
    """(13) + (78) of all pairs, by their chances, = sobirl(depth="one") of the table, (13) alone drlhf."""
    problem = tabular.preference(seed, **sizes)
    S, A = problem.P.shape[:2]
    s, a, chances = enumerated(problem)
    Q = tabular.solve_follower(problem, problem.reward(problem.start), torch.zeros(S, A))
    chance = chances(torch.softmax(Q / problem.tau, 1)).numpy()
    labels = margins_of(true_reward(seed, S, A)[s, a]).sigmoid().numpy()
    batch = Pairs(np.eye(S)[s], a.numpy(), labels)
    reward, actor = tables(problem, problem.start, Q)

    def total(part):
        each = [weight * part(np.array([i])) for i, weight in enumerate(chance)]
        return np.sum(each, 0)[: S * A].reshape(A, S).T.reshape(-1)

    def direct(i):
        return preference_gradient(reward, Pairs(*(x[i] for x in batch)))[2]

    given = ["--no-baseline", "--hyper-pairs", "queue"]

    def second(i):
        return second_term(reward, actor, batch, problem.tau, i, given=given)[0]

    args = tabular.Args(samples=0, depth="one")
    first = total(direct)
    assert abs(first - tabular.drlhf(problem, problem.start, Q, {}, args, None).numpy()).max() <= 1e-12
    expected = tabular.sobirl(problem, problem.start, Q, {}, args, None).numpy()
    assert abs(first + total(second) - expected).max() <= 1e-12 and abs(expected - first).max() > 1e-3


def test_scores_on_policy_and_off(float64, monkeypatch):
    """The expected score is 0 if pi chooses, for the numbers and for their gradients, and not otherwise."""
    reward = reward_net()
    actor, other = sobirl.Actor(4, 3, 6), sobirl.Actor(4, 3, 6)
    actor.vector *= 3
    obs = np.broadcast_to(observed(4, 1, 2, 1).numpy(), (9, 2, 1, 4)).copy()
    actions = np.stack(np.divmod(np.arange(9), 3), 1)[..., None]
    batch = Pairs(obs, actions, np.full(9, 0.5))
    monkeypatch.setattr(leader, "preference_loss", lambda margins, labels: (np.ones_like(margins), None))
    given = ["--no-baseline", "--hyper-pairs", "queue"]
    found = [second_term(reward, actor, batch, 1.0, np.array([i]), given=given) for i in range(9)]

    def expected(policy):
        probs = policy.policy(obs[0].reshape(2, 4)).probs
        chance = np.outer(probs[0], probs[1]).reshape(9)
        return chance @ [score for _, score in found], chance @ np.stack([by_x for by_x, _ in found])

    score, gradient = expected(actor)
    assert abs(score) <= 1e-14 and abs(gradient).max() <= 1e-14
    score, gradient = expected(other)
    assert abs(score) > 1e-3 and abs(gradient).max() > 1e-3


def test_a_state_is_seen_once(monkeypatch, float64):
    """However many actions there are in it: by each member of the reward net, and by the actor."""
    seen = []
    forward = torch.nn.Conv2d.forward

    def see(self, images):
        seen.append(len(images))
        return forward(self, images)

    reward, actor, batch = reward_net(inputs=FORM), sobirl.Actor(FORM, 3, 6), pairs(FORM)
    monkeypatch.setattr(torch.nn.Conv2d, "forward", see)
    second_term(reward, actor, batch)
    assert seen == [48, 48]


# Images


def test_which_observations_are_images():
    def found(name):
        return image_of(make_env(flags("--env-id", f"tests.probe_envs:Probe{name}-v0")))

    assert found("Lights") == (4, 5, 2, 255, False) and found("Switches") == (4, 5, 2, 1, False)
    assert found("Grid") == (4, 4, 3, 255, False) and found("Pole") is None and found("Odd") is None
    picture = sobirl.Picture(FORM)
    images = np.random.default_rng(0).integers(0, 256, (3, 5, 4, 2), dtype=np.uint8)
    pixels = picture(torch.as_tensor(images.reshape(3, -1)))
    assert torch.allclose(pixels, torch.as_tensor(images.transpose(0, 3, 1, 2) / 255).float())


@pytest.mark.parametrize("Env", [Lights, Switches], ids=["bytes", "booleans"])
@pytest.mark.parametrize("method", ["sac", *LEADERS])
def test_images_are_scaled_once(method, Env, tmp_path, monkeypatch):
    """Whoever looks at them, in training and in evaluations; the replay memory keeps bytes, one image a
    step."""
    seen, memories = {}, []
    forward, begin = torch.nn.Conv2d.forward, Replay.begin

    def see(self, images):
        assert images.shape[1:] == (2, 4, 5)
        seen.setdefault(self, set()).update(images.unique().tolist())
        return forward(self, images)

    def see_replay(self, run):
        memories.append(self)
        begin(self, run)

    monkeypatch.setattr(torch.nn.Conv2d, "forward", see)
    monkeypatch.setattr(Replay, "begin", see_replay)
    given = ["--env-id", f"tests.probe_envs:Probe{Env.__name__}-v0", "--method", method]
    train(sobirl, tmp_path, *SMALL, *given, "--total-timesteps", 100, "--reward-members", 2)
    networks = 5 + 2 * (method != "sac") + (method == "pbrl")  # actor, critics, targets, rewards, rival
    assert len(seen) == networks
    assert set().union(*seen.values()) == {0, np.float32(0.2) if Env is Lights else 1}
    (memory,) = memories
    assert memory.row["obs"].dtype == np.uint8 and memory.row.nbytes == 4 * 5 * 2 + 4 + 4 + 4
    images = memory.rows["obs"][:100]
    assert set(np.unique(images)) == {0, Env.light}
    assert memory.read(np.arange(5)).obs.dtype == np.uint8


@pytest.mark.parametrize("name, what", [("Thin", "(2, 5, 2)"), ("Picture", "continuous actions")])
def test_other_images_are_refused(name, what, tmp_path, capsys):
    err = refused(sobirl, capsys, "--env-id", f"tests.probe_envs:Probe{name}-v0", "--runs-dir", tmp_path)
    assert what in err and "--env-id" in err and not list(tmp_path.iterdir())


def test_large_images_are_refused(capsys):
    envs = SimpleNamespace(image=Image(84, 84, 4, 255.0), obs_dim=84 * 84 * 4)
    with pytest.raises(SystemExit):
        sobirl.inputs_of(flags(), envs)
    assert "--env-id must have images" in capsys.readouterr().err


def test_games_need_their_package(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    err = refused(sobirl, capsys, "--env-id", "MinAtar/Breakout-v1", "--runs-dir", tmp_path)
    assert "pip install -r requirements-games.txt" in err
    assert "minatar" in (ROOT / "requirements-games.txt").read_text()
    assert "minatar" not in (ROOT / "requirements.txt").read_text()


# The command line


BAD = [
    (["--env-id", "Pendulum-v1"], "--env-id", "use sobirl_continuous.py"),
    (["--env-id", "tests.probe_envs:ProbeManyActions-v0"], "--env-id", "Discrete"),
    (["--method", "sobirl", "--reward-input", "state"], "--reward-input", "state-action"),
    (["--update-frequency", "0"], "--update-frequency", "at least 1"),
    (["--update-frequency", "241"], "--update-frequency", "--total-timesteps"),
    (["--target-frequency", "241"], "--target-frequency", "due once at least"),
    (["--target-frequency", "0"], "--target-frequency", "at least 1"),
    (["--target-entropy", "1.1"], "--target-entropy", "[0, 1]"),
    (["--hyper-actions", "4"], "--hyper-actions", ""),
    (["--policy-frequency", "2"], "--policy-frequency", ""),
]


@pytest.mark.parametrize("given, flag, fix", BAD)
def test_bad_input_is_one_line(given, flag, fix, capsys, tmp_path):
    err = refused(sobirl, capsys, *POLE, "--runs-dir", tmp_path, *given)
    assert flag in err and fix in err, err
    assert not list(tmp_path.iterdir())


def test_the_continuous_script_names_this_one(tmp_path, capsys):
    err = refused(sobirl_continuous, capsys, "--env-id", "CartPole-v1", "--runs-dir", tmp_path)
    assert "use sobirl_discrete.py" in err


def test_a_reward_of_which_nothing_can_be_learned(tmp_path, capsys):
    """CartPole's is 1 for every step: all pairs tie, and the run says so and ends."""
    given = [*SMALL, "--env-id", "CartPole-v1", "--method", "drlhf", "--runs-dir", tmp_path]
    err = refused(sobirl, capsys, *given)
    assert "100% of the pairs tie: all 75 steps of CartPole-v1 had the reward 1" in err
    assert "raise --learning-starts, or name another environment" in err


# Runs


def test_run_folder(tmp_path):
    out, err = run(sobirl, *LIGHTS, "--runs-dir", tmp_path, "--method", "sobirl", "--seed", 3)
    assert err == ""
    (folder,) = tmp_path.iterdir()
    assert "ProbeLights-v0__sobirl__3__" in folder.name
    progress = rows(folder / "progress.csv")
    assert [row["global_step"] for row in progress] == list(range(20, 241, 20))
    learning = {"alpha", "entropy", "critic_loss", "actor_loss", "q_mean", "skipped_updates", "ce"}
    for row in progress:
        for name in learning:
            assert math.isfinite(row[name]) == (row["global_step"] > 60), name
        for name in ("hyper_grad_norm", "hyper_cosine", "hyper_bound_active", "score_mean"):
            assert math.isfinite(row[name]) == (row["global_step"] > 80), name
    assert 0 < progress[-1]["entropy"] <= math.log(3) + 1e-6
    config = json.loads((folder / "config.json").read_text())
    assert config["flags"]["target_entropy"] == 0.89
    assert len(rows(folder / "evaluation.csv")) == 1 and len(rows(folder / "episodes.csv")) == 24


def test_flags_change_the_run(tmp_path):
    variants = [
        ["--method", "sac"],
        ["--method", "sac", "--no-autotune"],
        ["--method", "sac", "--target-entropy", 0.5],
        ["--method", "sac", "--update-frequency", 3],
        ["--method", "sac", "--target-frequency", 3],
        ["--method", "sac", "--tau", 0.5],
        ["--method", "sac", "--anneal-lr"],
        ["--method", "drlhf"],
        ["--method", "drlhf", "--reward-input", "state"],
        ["--method", "drlhf", "--reward-members", 2],
        ["--method", "drlhf", "--no-reward-norm"],
        ["--method", "random"],
        ["--method", "hpgd"],
        ["--method", "pbrl"],
        ["--method", "pbrl", "--penalty", 2],
        ["--method", "sobirl"],
        ["--method", "sobirl", "--hyper-bound", 0.01],
        ["--method", "sobirl", "--hyper-pairs", "queue"],
        ["--method", "sobirl", "--no-baseline"],
    ]
    few = ["--total-timesteps", 100, "--eval-episodes", 0]
    found = [contents(train(sobirl, tmp_path, *POLE, *few, *given))["model"] for given in variants]
    for i, one in enumerate(found):
        assert all(one != other for other in found[:i]), variants[i]


def test_the_follower_makes_up_for_updates(tmp_path, monkeypatch):
    """Those that it has missed while it only acted, one for every third step; the leader's turn is before."""
    updates = []
    sample = Replay.sample

    def see(self, count):
        updates.append((self.run.parts["envs"].steps, self.run.parts["preferences"].queries))
        return sample(self, count)

    monkeypatch.setattr(Replay, "sample", see)
    few = ["--total-timesteps", 100, "--eval-episodes", 0, "--update-frequency", 3]
    train(sobirl, tmp_path, *POLE, *few, "--method", "drlhf")
    missed = [(75, 1)] * 5 + [(78, 1)] + [(95, 2)] * 5 + [(96, 2), (99, 2)]
    assert updates == missed  # of the steps 63, 66, ..., 75, and 78; 81, ..., 93, and so on


def test_the_rival_plays_the_query(tmp_path, monkeypatch):
    """pbrl: the frozen steps, and the follower all others; the reward is asked of what was done."""
    players, batches = [], []
    numpy_policy, sample, seen = sobirl.numpy_policy, Replay.sample, sobirl.ChoiceReward.seen

    def see_policy(net):
        players.append(net)
        return numpy_policy(net)

    def see_sample(self, count):
        batches.append(sample(self, count))
        return batches[-1]

    def see_seen(self, obs, actions):
        assert (obs == batches[-1].obs).all() and (actions == batches[-1].actions).all()
        return seen(self, obs, actions)

    monkeypatch.setattr(sobirl, "numpy_policy", see_policy)
    monkeypatch.setattr(Replay, "sample", see_sample)
    monkeypatch.setattr(sobirl.ChoiceReward, "seen", see_seen)
    train(sobirl, tmp_path, *POLE, "--method", "pbrl", "--total-timesteps", 120, "--eval-episodes", 0)
    names = ["y" if net is players[0] else "pi" for net in players]
    assert names == (["y"] * 15 + ["pi"] * 5) * 3 and len(batches) == 60


def test_with_the_second_term_times_0_a_run_is_that_of_drlhf(tmp_path, monkeypatch):
    given = [*POLE, "--total-timesteps", 160]
    expected = contents(train(sobirl, tmp_path, *given, "--method", "drlhf"))
    original = sobirl.second_term
    monkeypatch.setattr(sobirl, "second_term", lambda *inputs: (0 * original(*inputs)[0], 0.0))
    assert contents(train(sobirl, tmp_path, *given, "--method", "sobirl"))["model"] == expected["model"]


@pytest.mark.parametrize("method", ["sac", *LEADERS])
def test_on_tensors_a_run_is_the_same(method, tmp_path, monkeypatch):
    """As on a GPU, where there are no NumPy arrays: here with tensors of the CPU."""
    few = ["--total-timesteps", 120, "--eval-episodes", 0, "--reward-members", 2]
    given = [*(LIGHTS if method in ("sac", "sobirl") else POLE), "--method", method, *few]
    expected = torch.load(train(sobirl, tmp_path, *given) / "model.pt", weights_only=True)
    monkeypatch.setattr(jacobian, "as_array", lambda tensor: tensor.detach())
    found = torch.load(train(sobirl, tmp_path, *given) / "model.pt", weights_only=True)
    for net in {"actor", "critic", "reward"} & expected.keys():
        for name, value in expected[net].items():
            assert torch.allclose(found[net][name], value, rtol=1e-4, atol=1e-6), (net, name)


@pytest.mark.parametrize("method", ["sac", "sobirl", "pbrl"])
def test_resume_is_byte_identical(method, tmp_path):
    """Its ring goes round, and its episodes end in the middle of iterations."""
    given = [*POLE, "--method", method, "--keep-replay", "--buffer-size", 60, "--update-frequency", 3]
    folder, killed = whole_and_killed(tmp_path, [75, 133, 215], *given, script=sobirl)
    expected = contents(folder)
    assert contents(train(sobirl, tmp_path / "again", *given)) == expected
    for step in killed:
        assert_it_goes_on(killed[step], tmp_path / f"{step} again", expected, script=sobirl)


def test_evaluate(tmp_path, capsys):
    """Policies of vectors and of images, which say what they see; also from the last checkpoint."""
    for given in (POLE, LIGHTS):
        folder = train(sobirl, tmp_path, *given, "--total-timesteps", 100)
        capsys.readouterr()

        def evaluate(*more):
            sobirl.main(["--evaluate", str(folder), *map(str, more)])
            return capsys.readouterr().out

        out = evaluate("--eval-episodes", 1)
        assert f"return {rows(folder / 'evaluation.csv')[0]['return']:.1f} ±" in out
        assert evaluate("--eval-episodes", 3) != evaluate("--eval-episodes", 3, "--eval-stochastic")
        (folder / "model.pt").unlink()
        assert evaluate("--eval-episodes", 1) == out


# Learning


def test_learns_what_an_image_shows(tmp_path):
    """Which column is lit, from preferences between two steps: at best a return of 10, by chance 5.6."""
    given = [*LIGHTS, "--method", "sobirl", "--hidden-size", 32, "--batch-size", 32, "--reward-lr", 3e-3]
    given += ["--segment", 2, "--query-steps", 100, "--outer-steps", 200, "--learning-starts", 400]
    given += ["--total-timesteps", 1400, "--initial-pairs", 60, "--pairs", 30, "--initial-epochs", 20]
    given += ["--policy-lr", 3e-3, "--q-lr", 3e-3, "--gamma", 0, "--reward-batch-size", 16]
    given += ["--update-frequency", 2, "--target-entropy", 0.2, "--eval-episodes", 20]
    folder = train(sobirl, tmp_path, *given)
    assert np.mean([row["return"] for row in rows(folder / "evaluation.csv")]) >= 9


def test_learns_to_balance_a_pole(tmp_path):
    """20,000 steps, after which other seeds stay up for 380 to 500 steps of 500, and chance for 22."""
    given = ["--hidden-size", 64, "--policy-lr", 1e-3, "--q-lr", 2e-3, "--tau", 0.05, "--no-autotune"]
    given += ["--alpha", 0.05, "--learning-starts", 1000, "--total-timesteps", 20_000]
    given += ["--update-frequency", 2]
    folder = train(sobirl, tmp_path, *given)
    returns = [row["return"] for row in rows(folder / "evaluation.csv")]
    assert len(returns) == 10 and np.mean(returns) >= 300
