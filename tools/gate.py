"""What the hypergradient changes, on minibatches of real runs: a gate before anybody trains with a new one.

    python tools/gate.py runs/Walker2d-v4__blpo__1__1763900000 runs/Hopper-v4__blpo__1__1763900500

With the weights c_k of the cross term (blpo_continuous.py), and the clip gates aside, the hypergradient is a
policy gradient whose advantages have the factors 1 - 2 c_k. For each of the VARIANTS, ways to define it, this
prints means over minibatches of

    cosine        between grad_theta f and the whole hypergradient, 1: the same direction. Both take the
                  advantages of the regression targets, so that it shows what the factors do, and not what a
                  newer critic does
    position      share of the variance of c_k that the position in the window explains: R^2 of a linear
                  regression on the trace of a constant, sum_{t <= k, same episode} (gamma lambda)^{k-t}
    factor, sd    mean and standard deviation of 1 - 2 c_k

A variant that nearly keeps the direction, or whose weights say where a step lies and nothing about its state,
needs no training run. Linear systems are solved exactly, in float64, with the Gauss-Newton matrix.

The run is copied and goes on from its last checkpoint but one; it must be one of blpo_continuous.py with
minibatches of one trajectory each.
"""

import copy
import csv
import json
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository, wherever this is started

import support  # noqa: F401  before torch, because it sets the number of threads

import numpy as np
import torch
import tyro

import blpo_continuous as script
from jacobian import flatten, jacobian_of
from tools.solvers import Enough, in_precision
from tools.tables import markdown

WINDOWS = 4  # consecutive windows of the same environment that a moment knows


class Moment(NamedTuple):
    """A minibatch of one trajectory at the point of a run at which its hypergradient is due, and the windows
    of that environment before it: WINDOWS of T steps each, the last of which is the minibatch."""

    actor: script.Actor
    critic: script.Critic  # in float64, after its best response
    old_critic: script.Critic  # in float64, as it was when the iteration began
    obs: np.ndarray  # (WINDOWS, T, obs_dim)
    next_obs: np.ndarray  # (WINDOWS, T, obs_dim)
    actions: np.ndarray  # (WINDOWS, T, action_size)
    rewards: np.ndarray  # (WINDOWS, T)
    terminated: np.ndarray  # (WINDOWS, T)
    done: np.ndarray  # (WINDOWS, T)
    logprobs: np.ndarray  # (WINDOWS, T), under the policy that acted
    args: script.Args


class Terms(NamedTuple):
    """What a variant makes of a moment: B steps, with g = -sum_k e_k (1 - 2 c_k) A_k grad log pi / B."""

    c: np.ndarray  # (B,)
    position: np.ndarray  # (B,), the same trace of a constant
    direct: np.ndarray  # (p,) grad_theta f
    implicit: np.ndarray  # (p,) minus the cross term


def copied_actor(actor):
    other = copy.deepcopy(actor)
    other.vector = flatten(other)
    other.jacobian = jacobian_of(other.net)
    return other


def moments(run: Path, count: int) -> list[Moment]:
    """The first `count` moments of the fourth iteration after a run's last checkpoint but one."""
    rollouts, taken, acting = [], [], {}
    make_batch, leader_gradient, curvature = script.make_batch, script.leader_gradient, script.curvature

    def see_rollout(rollout, actor, critic, args):
        batch, explained_variance = make_batch(rollout, actor, critic, args)
        logprobs = batch.logprobs.reshape(args.num_envs, args.num_steps)
        rollouts.append([x.copy() for x in (*rollout, logprobs)])
        acting["actor"], acting["old_critic"] = actor, in_precision(critic, torch.float64)
        return batch, explained_variance

    def see_minibatch(J, advantages, mb, ratio, args):
        acting["obs"] = mb.obs
        return leader_gradient(J, advantages, mb, ratio, args)

    def see_critic(critic, mb, J, args):
        if len(rollouts) >= WINDOWS:
            windows = rollouts[-WINDOWS:]
            n = next(n for n, obs in enumerate(windows[-1][0]) if np.array_equal(obs, mb.obs))
            streams = [np.stack([window[i][n] for window in windows]) for i in range(len(windows[0]))]
            critics = in_precision(critic, torch.float64), acting["old_critic"]
            taken.append(Moment(copied_actor(acting["actor"]), *critics, *streams, args))
        if len(taken) == count:
            raise Enough
        return curvature(critic, mb, J, args)

    script.make_batch, script.leader_gradient, script.curvature = see_rollout, see_minibatch, see_critic
    try:
        with tempfile.TemporaryDirectory() as folder:
            going = shutil.copytree(run, Path(folder) / run.name)
            script.main(["--resume", str(going / "checkpoint.previous.pt")])
    except Enough:
        pass
    finally:
        script.make_batch, script.leader_gradient = make_batch, leader_gradient
        script.curvature = curvature
    return taken


# Pieces


def rows(J):
    """J as a matrix (n, p), of a network with one output."""
    n = len(J.outputs)
    parts = []
    for a, g in zip(J.inputs, J.single):
        parts += [(g[:, :, None] * a[:, None, :]).reshape(n, -1), g]
    return np.concatenate(parts, 1)


def solved(J, v, rho: float):
    """J x (B,) for x = ((2/B) J^T J + rho I)^{-1} v, from J (B, p): a system of B equations."""
    B = len(J)
    kernel = J @ J.T
    inner = np.linalg.solve(kernel + rho * B / 2 * np.eye(B), J @ v)
    return (J @ v - kernel @ inner) / rho


def traces(done, args, weights=None):
    """Gamma (T, T) of one trajectory; with weights (T,) of its steps, entry (t, k) has their product from t to
    k - 1 besides."""
    Gamma = script.gae_matrix(done[None], args.gamma, args.gae_lambda, np.float64)[0]
    if weights is None:
        return Gamma
    logs = np.concatenate([[0.0], np.log(weights)]).cumsum()[:-1]
    return Gamma * np.exp(np.minimum(logs[None, :] - logs[:, None], 0.0))


# Variants


def hypergradient(
    moment: Moment,
    rho: float | None = None,
    windows: int = 1,
    carried: bool = False,
    leader: str = "return",
    features: str = "all",
) -> Terms:
    """The two terms of the hypergradient of a moment.

    rho: damping, None for that of the run. windows: how many of the last ones are in the batch, those before
    the minibatch with importance weights. carried: the traces c_k begin in the window before. leader:
    "return" is the mean of A + V; "start" the mean of V over first states of episodes, and over all states
    where the batch has none. features: parameters of the critic that best-respond: "all", "no output bias",
    or "head", the output layer alone, without its bias.
    """
    args = moment.args
    used = windows + carried
    T = moment.done.shape[1]
    obs, next_obs, actions, rewards, terminated, done, logprobs = (
        x[-used:].reshape(used * T, *x.shape[2:]) for x in moment[3:10]
    )
    discounts = args.gamma * (1 - terminated.astype(float))
    policy = moment.actor.policy(obs, actions)
    ratio = np.exp((policy.log_prob - logprobs).astype(float))
    weights = np.minimum(ratio, 1) if windows > 1 else np.ones(used * T)
    Gamma = traces(done, args, weights if windows > 1 else None)
    batch = slice(carried * T, None)  # what the losses are means over
    B = windows * T

    J = rows(moment.critic.jacobian(obs.astype(float)))
    J_next = rows(moment.critic.jacobian(next_obs.astype(float)))
    if features == "no output bias":
        J, J_next = J[:, :-1], J_next[:, :-1]
    elif features == "head":
        hidden = moment.critic.value[-1].in_features
        J, J_next = J[:, -hidden - 1 : -1], J_next[:, -hidden - 1 : -1]

    values, next_values = (moment.old_critic.jacobian(x.astype(float)).outputs[:, 0] for x in (obs, next_obs))
    inside = traces(done[batch], args, weights[batch] if windows > 1 else None)
    advantages = inside @ (weights * (rewards + discounts * next_values - values))[batch]

    rho = args.nystrom_rho if rho is None else rho
    if leader == "return":
        df_ddelta = -weights[batch] * inside.sum(0) / B
        v = J[batch].T @ (-df_ddelta - 1 / B) + J_next[batch].T @ (discounts[batch] * df_ddelta)
    else:
        first = np.flatnonzero(np.concatenate([[False], done[batch][:-1]]))
        first = first if len(first) else np.arange(B)
        v = -J[batch][first].mean(0)

    if carried:  # w at the steps of the window before as well, by the same x
        system = J[batch] @ J[batch].T + rho * B / 2 * np.eye(B)
        x = (v - J[batch].T @ np.linalg.solve(system, J[batch] @ v)) / rho
        w = J @ x
    else:
        w = solved(J, v, rho)
    c = (Gamma.T @ w)[batch]
    position = traces(done[batch], args).sum(0)

    policy = moment.actor.policy(obs[batch], actions[batch])
    importance = weights[batch] if windows > 1 else ratio[batch]

    def gradient(coefficients):
        return policy.gradient((-importance * coefficients / B).astype(np.float32)).astype(float)

    return Terms(c, position, gradient(advantages), gradient(-2 * c * advantages))


VARIANTS = {
    "default": {},
    "damping 5": dict(rho=5.0),
    "damping 0.5": dict(rho=0.5),
    "traces across window borders": dict(carried=True),
    "leader: start states": dict(leader="start"),
    "leader: start states, damping 0.5": dict(leader="start", rho=0.5),
    "critic without output bias": dict(features="no output bias"),
    "critic without output bias, damping 0.5": dict(features="no output bias", rho=0.5),
    "linear head without bias, damping 0.5": dict(features="head", rho=0.5),
    "four rollouts": dict(windows=4),
    "four rollouts, damping 0.5": dict(windows=4, rho=0.5),
}


def cosine(a, b) -> float:
    return float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-30))


def explained(c, position) -> float:
    """R^2 of the regression of c on position and a constant; 1 where c is a constant."""
    X = np.stack([position, np.ones_like(position)], 1)
    rest = c - X @ np.linalg.lstsq(X, c, rcond=None)[0]
    return 1 - float(rest.var() / max(c.var(), 1e-30))


def judged(terms: Terms) -> dict[str, float]:
    factor = 1 - 2 * terms.c
    return {
        "cosine": cosine(terms.direct, terms.direct + terms.implicit),
        "position": explained(terms.c, terms.position),
        "factor": float(factor.mean()),
        "sd": float(factor.std()),
    }


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """folders of runs of blpo_continuous.py"""
    minibatches: int = 8
    """minibatches of each run"""
    csv: Path = Path("results/gate.csv")
    """file to write: a row per run, minibatch and variant"""


def misfit(run: Path) -> bool:
    """Whether run is not what this script needs."""
    if not (run / "config.json").exists() or not (run / "checkpoint.previous.pt").exists():
        return True
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    flags = config["flags"]
    one_trajectory = flags.get("num_envs") == flags.get("num_minibatches")
    return config["script"] != "blpo_continuous.py" or flags["ihvp"] == "none" or not one_trajectory


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    args = tyro.cli(Args, args=argv, description=__doc__)
    if bad := [str(run) for run in args.runs if misfit(run)]:
        names = ", ".join(bad)
        sys.exit(f"error: {names}: not a run of blpo_continuous.py with two checkpoints and one trajectory each")
    found = []
    for run in args.runs:
        flags = json.loads((run / "config.json").read_text(encoding="utf-8"))["flags"]
        for i, moment in enumerate(moments(run, args.minibatches)):
            for variant, how in VARIANTS.items():
                row = {"env_id": flags["env_id"], "steps": flags["total_timesteps"], "minibatch": i}
                numbers = judged(hypergradient(moment, **how))
                found.append(row | {"variant": variant} | {k: f"{x:.4g}" for k, x in numbers.items()})
    args.csv.parent.mkdir(parents=True, exist_ok=True)
    with open(args.csv, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, found[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
    print(table(found))


def table(found: list[dict]) -> str:
    """Markdown: means over all minibatches of each variant, of the cosine the smallest besides."""
    lines = []
    for variant in dict.fromkeys(row["variant"] for row in found):
        chosen = [row for row in found if row["variant"] == variant]
        columns = {name: np.array([float(row[name]) for row in chosen]) for name in ("cosine", "position", "factor", "sd")}
        means = {name: column.mean() for name, column in columns.items()}
        cells = [f"{means['cosine']:.3f} ({columns['cosine'].min():.3f})", f"{means['position']:.3f}"]
        lines.append([variant, *cells, f"{means['factor']:.2f}", f"{means['sd']:.2f}"])
    return markdown(["variant", "cosine, mean (smallest)", "position", "factor 1 - 2c", "sd"], lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
