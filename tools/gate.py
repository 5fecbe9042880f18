"""What the hypergradient changes, on trajectories of real runs: a gate before anybody trains with a new one.

    python tools/gate.py runs/Walker2d-v4__blpo__1__1763900000 runs/Hopper-v4__blpo__1__1763900500

With the traces c_k of the cross term (blpo_continuous.py), and the clip gates aside, the hypergradient is a
policy gradient whose advantages have the weights 1 - 2 c_k. It is calculated for each trajectory of a rollout
as if that were the batch, for each of the VARIANTS, ways to define it, and the table has means over runs of

    cosine of the means       between the expectations of grad_theta f and of the whole hypergradient, by the
                              products of different trajectories, whose noise is independent. 1: the same
                              direction. Both take the advantages of the regression targets, so that it
                              shows what the weights do, and not what a newer critic does
    of single trajectories    the same of each trajectory by itself: mostly of the noise that both share
    position                  share of the variance of c_k that the position in the window explains: R^2 of a
                              regression on the trace of a constant, the sum of (gamma lambda)^{k-t} over the
                              steps t <= k of the episode
    factor, its sd            mean and standard deviation of 1 - 2 c_k

A variant that nearly keeps the direction, or whose weights say where a step lies and nothing about its state,
needs no training run. Linear systems are solved exactly, in float64, with the Gauss-Newton matrix.

A run is copied and goes on from its last checkpoint but one; it must be one of blpo_continuous.py with four
iterations left from there, and should have many environments. What is measured is written to gate.csv, a row
per run and variant, and to gate_weights.csv the default's weights at the steps of a run's first trajectory;
plot.py draws both.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository, wherever this is started

import support  # noqa: F401  before torch, because it sets the number of threads

import numpy as np
import torch
import tyro

import blpo_continuous as script
from support.files import check_can_be_written
from support.flags import fail, parse_args
from tools.results import write_csv
from tools.solvers import Enough, in_precision, misfit, watch
from tools.tables import markdown

WINDOWS = 4  # consecutive windows of the same environment that a moment knows


class Moment(NamedTuple):
    """One trajectory of a rollout when the hypergradient is due, and the windows of that environment before
    it: WINDOWS of T steps each, the last of which is the trajectory."""

    actor: script.Actor
    critic: script.Critic  # in float64, after its best response
    old_critic: script.Critic  # in float64, as it was when the iteration began: that of the targets
    obs: np.ndarray  # (WINDOWS, T, obs_dim)
    next_obs: np.ndarray  # (WINDOWS, T, obs_dim)
    actions: np.ndarray  # (WINDOWS, T, action_size)
    rewards: np.ndarray  # (WINDOWS, T)
    terminated: np.ndarray  # (WINDOWS, T)
    done: np.ndarray  # (WINDOWS, T)
    logprobs: np.ndarray  # (WINDOWS, T), under the policies that acted
    args: script.Args


def moments(run: Path) -> list[Moment]:
    """The trajectories of one rollout, the fourth after a run's last checkpoint but one, in its first epoch;
    none if the run ends before."""
    rollouts, taken, seen = [], [], {}
    make_batch, curvature = script.make_batch, script.curvature

    def see_rollout(rollout, actor, critic, args):
        batch, transitions, explained_variance = make_batch(rollout, actor, critic, args)
        logprobs = batch.logprobs.reshape(args.num_envs, args.num_steps)
        rollouts.append([x.copy() for x in (*rollout, logprobs)])
        seen["actor"], seen["critic"] = actor, in_precision(critic, torch.float64)
        return batch, transitions, explained_variance

    def see_response(critic, batch, J, args):
        if len(rollouts) >= WINDOWS:
            networks = seen["actor"], in_precision(critic, torch.float64), seen["critic"]
            for n in range(args.num_envs):
                streams = (np.stack([x[n] for x in windows]) for windows in zip(*rollouts[-WINDOWS:]))
                taken.append(Moment(*networks, *streams, args))
            raise Enough
        return curvature(critic, batch, J, args)

    watch(run, script, make_batch=see_rollout, curvature=see_response)
    return taken


# The hypergradient


class Terms(NamedTuple):
    """What a variant makes of the B steps of a moment: h = direct + implicit."""

    c: np.ndarray  # (B,), the trace of w
    position: np.ndarray  # (B,), the same trace of a constant
    direct: np.ndarray  # (p,), grad_theta f
    implicit: np.ndarray  # (p,), minus the cross term


def rows(J):
    """J as a matrix (n, p), of a network with one output."""
    parts = []
    for a, g in zip(J.inputs, J.single):
        parts += [(g[:, :, None] * a[:, None, :]).reshape(len(a), -1), g]
    return np.concatenate(parts, 1)


def solved(J, v, rho: float):
    """x = ((2/B) J^T J + rho I)^{-1} v (p,), exactly, from J (B, p): a system of B equations."""
    B = len(J)
    return (v - J.T @ np.linalg.solve(J @ J.T + rho * B / 2 * np.eye(B), J @ v)) / rho


def traces(done, args, weights):
    """Gamma (T, T) of one trajectory, entry (t, k) times the product of the weights (T,) from t to k - 1."""
    Gamma = script.gae_matrix(done[None], args.gamma, args.gae_lambda, np.float64)[0]
    logs = np.concatenate([[0.0], np.log(weights)]).cumsum()[:-1]
    return Gamma * np.exp(np.minimum(logs[None, :] - logs[:, None], 0.0))


def trained(J, critic: script.Critic, features: str):
    """The columns of J (n, p) that belong to the parameters of the critic that respond."""
    if features == "no output bias":
        return J[:, :-1]
    if features == "head":
        return J[:, -critic.value[-1].in_features - 1 : -1]
    return J


def hypergradient(
    moment: Moment,
    rho: float | None = None,
    windows: int = 1,
    carried: bool = False,
    leader: str = "return",
    features: str = "all",
) -> Terms:
    """The two terms of the hypergradient of a moment.

    rho: damping, None for that of the run. windows: how many of them are in the batch; with more than one,
    steps have importance weights, cut off at 1 as in Retrace. carried: the traces c_k begin in the window
    before. leader: "return" is the mean of A + V, "start" the mean of V at the first states of the
    episodes that begin in the batch, or at all states if none does. features: the parameters of the critic
    that respond: "all", "no output bias", or "head", the output layer alone, without its bias.
    """
    args = moment.args
    rho = args.nystrom_rho if rho is None else rho
    T = moment.done.shape[1]
    B = windows * T
    before = carried * T  # steps of the window before, which are not in the batch
    streams = (x[-windows - carried :] for x in moment[3:10])
    streams = (x.reshape(B + before, *x.shape[2:]) for x in streams)
    obs, next_obs, actions, rewards, terminated, done, logprobs = streams
    batch = slice(before, None)

    policy = moment.actor.policy(obs[batch], actions[batch])
    ratio = np.exp((policy.log_prob - logprobs[batch]).astype(float))
    weights = np.minimum(ratio, 1.0) if windows > 1 else np.ones(B)
    Gamma = traces(done[batch], args, weights)

    # A of the targets, from the critic that made them
    old = [moment.old_critic.jacobian(x[batch].astype(float)).outputs[:, 0] for x in (obs, next_obs)]
    discounts = args.gamma * (1 - terminated[batch].astype(float))
    advantages = Gamma @ (weights * (rewards[batch] + discounts * old[1] - old[0]))

    # v and w = J x
    critic = moment.critic
    J, J_next = (trained(rows(critic.jacobian(x.astype(float))), critic, features) for x in (obs, next_obs))
    if leader == "return":
        df_ddelta = -weights * Gamma.sum(0) / B
        v = (-df_ddelta - 1 / B) @ J[batch] + (discounts * df_ddelta) @ J_next[batch]
    else:
        begins = np.roll(done[batch], 1)
        begins[0] = len(moment.done) > windows and moment.done[-windows - 1, -1]
        first = np.flatnonzero(begins)
        v = -J[batch][first if len(first) else slice(None)].mean(0)
    w = J @ solved(J[batch], v, rho)
    c = (traces(done, args, np.ones(before + B)).T @ w)[batch] if carried else Gamma.T @ w

    factors = np.ones(B) if windows > 1 else ratio  # A_k has the weight of step k already

    def gradient(weighted):  # -grad_theta mean_k ratio_k a_k
        return policy.gradient((-factors * weighted / B).astype(np.float32)).astype(float)

    position = script.gae_matrix(done[None, batch], args.gamma, args.gae_lambda, np.float64)[0].sum(0)
    return Terms(c, position, gradient(advantages), gradient(-2 * c * advantages))


VARIANTS = {
    "default": {},
    "damping 0.5": dict(rho=0.5),
    "traces across window borders": dict(carried=True),
    "leader: start states": dict(leader="start"),
    "leader: start states, damping 0.5": dict(leader="start", rho=0.5),
    "critic without output bias, damping 0.5": dict(features="no output bias", rho=0.5),
    "output layer alone, without bias, damping 0.5": dict(features="head", rho=0.5),
    "four rollouts": dict(windows=4),
}


def cosine(a, b) -> float:
    return float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-30))


def explained(y, x) -> float:
    """R^2 of the regression of y on x and a constant."""
    X = np.stack([x, np.ones_like(x)], 1)
    rest = y - X @ np.linalg.lstsq(X, y, rcond=None)[0]
    return 1 - float(rest.var() / max(y.var(), 1e-30))


def products(first, second) -> float:
    """Sum of the scalar products of first_i and second_j over all pairs i != j; both (n, p)."""
    return float(first.sum(0) @ second.sum(0) - (first * second).sum())


def cosine_of_means(first, second) -> float:
    """Estimate of the cosine between the expectations of two vectors from samples of both, (n, p). A vector
    is only multiplied with those of other samples, whose noise is independent. NaN where there is more noise
    than signal."""
    squared = products(first, first) * products(second, second)
    return products(first, second) / squared**0.5 if products(first, first) > 0 and squared > 0 else np.nan


def judged(found: list[Terms]) -> dict[str, float]:
    """The numbers of a row of gate.csv, from the terms of all trajectories."""
    direct = np.array([terms.direct for terms in found])
    whole = direct + np.array([terms.implicit for terms in found])
    cosines = [cosine(one, other) for one, other in zip(direct, whole)]
    units = direct / np.linalg.norm(direct, axis=1)[:, None]
    factors = [1 - 2 * terms.c for terms in found]
    n = len(found)
    left_out = [cosine_of_means(np.delete(direct, i, 0), np.delete(whole, i, 0)) for i in range(n)]
    return {
        "signal": cosine_of_means(direct, whole),
        "signal_error": float(np.std(left_out) * (n - 1) ** 0.5),  # jackknife
        "cosine": float(np.mean(cosines)),
        "smallest": min(cosines),
        "between": products(units, units) / (n * (n - 1)),
        "position": float(np.mean([explained(terms.c, terms.position) for terms in found])),
        "factor": float(np.mean([factor.mean() for factor in factors])),
        "sd": float(np.mean([factor.std() for factor in factors])),
    }


def age_in_window(done):
    """Steps since the episode or the window began, (T,)."""
    steps = np.arange(len(done))
    begins = np.concatenate([[True], done[:-1].astype(bool)])
    return steps - np.maximum.accumulate(np.where(begins, steps, 0))


def table(found: list[dict]) -> str:
    """Markdown: means of each variant over the runs in which there is a number."""
    lines = []
    for variant in dict.fromkeys(row["variant"] for row in found):
        cells = []
        for name, style in FORMATS.items():
            values = np.array([float(row[name]) for row in found if row["variant"] == variant])
            known = values[np.isfinite(values)]
            cells.append(style.format(known.mean()) if len(known) else "")
        lines.append([variant, *cells])
    head = ["hypergradient", "cosine of the means", "of single trajectories", "position"]
    head += ["weight 1 − 2c", "its sd"]
    # The direct gradient is the same in all variants but those of several rollouts.
    between = np.mean([float(row["between"]) for row in found if row["variant"] == "default"])
    note = f"cosine between `∇_θ f` on one trajectory and on another: {between:.2f}"
    return markdown(head, lines) + "\n\n" + note


FORMATS = {"signal": "{:.3f}", "cosine": "{:.3f}", "position": "{:.2f}", "factor": "{:.1f}", "sd": "{:.1f}"}


# The command line


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """folders of runs of blpo_continuous.py"""
    results_dir: Path = Path("results")
    """folder of gate.csv and gate_weights.csv"""


def main(argv: list[str] | None = None) -> None:
    """Writes both files and prints the table."""
    args = parse_args(Args, __doc__, argv)
    if not args.runs:
        fail("name the folder of at least one run")
    check_can_be_written("results-dir", args.results_dir / "gate.csv")
    if bad := [str(run) for run in args.runs if misfit(run, ["blpo_continuous.py"])]:
        names = ", ".join(bad)
        fail(f"{names}: not a run of blpo_continuous.py with two checkpoints and a solver")
    found, weights = [], []
    for run in args.runs:
        taken = moments(run)
        if not taken:
            fail(f"{run} has no {WINDOWS} iterations after its last checkpoint but one")
        if len(taken) < 2:
            fail(f"{run} has one environment, and products are of different ones: take 2 or more")
        flags = taken[0].args
        name = {"env_id": flags.env_id, "steps": flags.total_timesteps}
        for variant, how in VARIANTS.items():
            terms = [hypergradient(moment, **how) for moment in taken]
            numbers = {column: f"{value:.4g}" for column, value in judged(terms).items()}
            found.append(name | {"trajectories": len(taken), "variant": variant} | numbers)
            if variant == "default":
                pairs = zip(age_in_window(taken[0].done[-1]), 1 - 2 * terms[0].c)
                weights += [name | {"age": age, "factor": f"{factor:.4g}"} for age, factor in pairs]
    write_csv(args.results_dir / "gate.csv", found)
    write_csv(args.results_dir / "gate_weights.csv", weights)
    print(table(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
