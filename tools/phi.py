"""What runs on tools.tasks:Preference-v0 have achieved, exactly: their states can be enumerated.

    python tools/phi.py collect --runs-dir runs-phi    # results/phi.csv, a line per finished run
    python tools/phi.py table                          # means over seeds, beside what tables reach
    python tools/phi.py tables                         # what tables reach: results/phi_tables.csv
    python tools/phi.py figure                         # figures/phi.png, of the CSV file

phi is the leader's loss (12), the expected cross-entropy of two-step preferences: of the learned reward with
its optimal follower, and with the actor as it was trained. The true return is the follower's, of an episode.
An experiment is named method-problem.
"""

import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sobirl_discrete
import sobirl_tabular as tabular
from leader import ChoiceReward
from support.files import check_can_be_written
from support.flags import fail, parse_args, shown
from tools import figures, results
from tools.results import colours, label, method_order
from tools.tables import markdown

ENVIRONMENT = "tools.tasks:Preference-v0"
ROUNDS = 800  # of the tabular methods, from a reward of 0
TABLES = {"exact (9)": "exact", "SoBiRL (78)": "sobirl", "DRLHF": "drlhf"}


@dataclass
class Args:
    action: tyro.conf.Positional[Literal["collect", "table", "tables", "figure"]]
    """collect: finished runs into the CSV file; table: print it; figure: draw it; tables: methods without
    networks into a CSV file of their own, and print it"""
    runs_dir: Path = Path("runs-phi")
    """folder of the run folders"""
    csv: Path = Path("results/phi.csv")
    """a line per run"""
    tables_csv: Path = Path("results/phi_tables.csv")
    """a line per problem and method without networks"""
    problems: tuple[int, ...] = tuple(range(200, 230))
    """of tables: the seeds of preference problems"""
    figures_dir: Path = Path("figures")
    """folder of the figure"""


def follower(problem: tabular.Problem, reward):
    """The optimal policy (S, A) of a reward (S, A)."""
    Q = tabular.solve_follower(problem, reward, torch.zeros_like(reward))
    return torch.softmax(Q / problem.tau, 1)


def true_return(problem: tabular.Problem, pi) -> float:
    """The expected sum of true rewards over an episode."""
    state, total = problem.rho, 0.0
    for _ in range(problem.horizon):
        total += float(state @ (pi * problem.true).sum(1))
        state = state @ tabular.transition(problem.P, pi)
    return total


def measure(problem: tabular.Problem, reward, actor=None) -> dict:
    """Of a reward (S, A), and of an actor's policy (S, A)."""
    pi = follower(problem, reward)
    found = {"phi": float(problem.objective(reward.reshape(-1), pi))}
    if actor is not None:
        found["phi_actor"] = float(problem.objective(reward.reshape(-1), actor))
    return found | {"true_return": true_return(problem, pi)}


def learned(folder: Path, flags: dict, problem: tabular.Problem):
    """The reward and the policy of a run, two tables (S, A)."""
    S, A = problem.P.shape[:2]
    saved = torch.load(folder / "model.pt", weights_only=True)
    names = ("reward_hidden_size", "reward_output", "reward_members", "reward_input")
    args = sobirl_discrete.Args(**{name: flags[name] for name in names})
    reward = ChoiceReward(S, A, args, sobirl_discrete.reward_network)
    reward.load_state_dict(saved["reward"])
    actor = sobirl_discrete.Actor(S, A, flags["hidden_size"])
    actor.load_state_dict(saved["actor"])
    states = np.eye(S, dtype=np.float32)
    rewards = reward.predict(states[:, None].repeat(A, 1), np.arange(A)[None].repeat(S, 0)).mean(0)
    return torch.as_tensor(rewards).double(), torch.as_tensor(actor.policy(states).probs).double()


def collect(args: Args) -> None:
    """Adds finished runs to the CSV file."""
    known = results.read_csv(args.csv) if args.csv.exists() else []
    rows = {(row["problem"], row["method"], row["seed"]): row for row in known}
    for folder, config in results.run_folders(args.runs_dir):
        flags = config.get("flags", {})
        learns = config.get("script") == "sobirl_discrete.py" and flags["method"] != "sac"
        if not learns or flags["env_id"] != ENVIRONMENT:
            continue
        if not results.is_finished(folder, proof="evaluation.csv"):
            continue
        number = json.loads(flags["env_kwargs"]).get("problem", 688)
        problem = tabular.preference(number)
        own = (problem.tau, problem.gamma)
        if flags["autotune"] or flags["reward_norm"] or (flags["alpha"], flags["gamma"]) != own:
            wanted = f"--no-autotune --no-reward-norm --alpha {problem.tau} --gamma {problem.gamma}"
            fail(f"{folder.name} has another follower than the problem: run it with {wanted}")
        try:
            reward, actor = learned(folder, flags, problem)
        except Exception as damage:  # a torn file, other contents, an unreadable disk, ...
            fail(f"{folder}: model.pt is damaged ({shown(damage)})")
        found = measure(problem, reward, actor)
        method = flags["exp_name"].removesuffix(f"-{number}")
        name = (str(number), method, str(flags["seed"]))
        row = dict(zip(("problem", "method", "seed"), name))
        row |= {column: round(value, 4) for column, value in found.items()}
        private = (*results.PRIVATE_FLAGS, "env_kwargs")
        row["flags"] = json.dumps({flag: value for flag, value in flags.items() if flag not in private})
        same = [other for other in rows.values() if other["method"] == method]
        results.refuse_changed_flags(folder, row, same, f"the runs of {method}")
        rows[name] = row
    if not rows:
        fail(f"--runs-dir {args.runs_dir} has no finished run that learned a reward on {ENVIRONMENT}")
    order = sorted(rows, key=lambda name: (int(name[0]), name[1], int(name[2])))
    results.write_csv(args.csv, [rows[name] for name in order])


def of_tables(problem: tabular.Problem, method: str) -> dict:
    """What a method of sobirl_tabular.py reaches with exact expectations, from a reward of 0."""
    args = tabular.Args(samples=0, depth="one" if method == "sobirl" else "full")
    x = torch.zeros_like(problem.start)
    Q = torch.zeros(problem.P.shape[:2], dtype=x.dtype)
    for _ in range(ROUNDS):
        Q = tabular.solve_follower(problem, problem.reward(x), Q)
        x = x - problem.beta * getattr(tabular, method)(problem, x, Q, {}, args, None)
    return measure(problem, problem.reward(x))


def table(args: Args) -> str:
    """Markdown: a line per problem, phi (and the true return) of every method, means over seeds."""
    rows = results.read_csv(args.csv)
    groups = defaultdict(list)
    for row in rows:
        groups[int(row["problem"]), row["method"]].append([float(row["phi"]), float(row["true_return"])])
    methods = sorted({method for _, method in groups})
    lines = []
    for number in sorted({number for number, _ in groups}):
        problem = tabular.preference(number)
        cells = [np.mean(groups[number, method], 0) if groups[number, method] else None for method in methods]
        for method in TABLES.values():
            found = of_tables(problem, method)
            cells.append((found["phi"], found["true_return"]))
        shown = ["" if cell is None else "{:.3f} ({:.2f})".format(*cell) for cell in cells]
        lines.append([number, *shown, f"{best_return(problem):.2f}"])
    count = {method: len([row for row in rows if row["method"] == method]) for method in methods}
    heads = [f"{method}, networks ({count[method]} runs)" for method in methods]
    heads += [f"{name}, table" for name in TABLES]
    return markdown(["problem", *heads, "best return"], lines)


def best_return(problem: tabular.Problem) -> float:
    """The true return of the policy that is optimal for the true reward."""
    return true_return(problem, follower(problem, problem.true))


def share_of_best(problem: tabular.Problem, reached):
    """How far true returns are on the way from that of a uniformly random policy (0) to the best one (1)."""
    worst = true_return(problem, torch.full_like(problem.true, 1 / problem.true.shape[1]))
    return (reached - worst) / (best_return(problem) - worst)


def draw(rows: list[dict]) -> Figure:
    """A line per problem: phi at the left, the true return at the right, a small dot per run and a large one
    for the mean of every method."""
    numbers = sorted({int(row["problem"]) for row in rows})
    methods = sorted({row["method"] for row in rows}, key=method_order)
    figure = Figure(figsize=(9, 0.36 * len(numbers) + 1.3))
    axes = figure.subplots(1, 2, sharey=True)
    for index, (method, colour) in enumerate(colours(methods).items()):
        name = label(method)  # for the legend, once
        shift = 0.22 * (index - (len(methods) - 1) / 2)
        for y, number in enumerate(reversed(numbers)):
            problem = tabular.preference(number)
            runs = [row for row in rows if (int(row["problem"]), row["method"]) == (number, method)]
            if not runs:
                continue
            phis = [float(row["phi"]) for row in runs]
            returns = share_of_best(problem, np.array([float(row["true_return"]) for row in runs]))
            for axis, values in zip(axes, (phis, returns)):
                axis.plot(values, [y + shift] * len(values), ".", color=colour, markersize=3, alpha=0.6)
                axis.plot(np.mean(values), y + shift, "o", color=colour, markersize=5, label=name)
                name = None
    axes[0].set(yticks=range(len(numbers)), xlabel="the leader's loss φ", ylabel="preference problem")
    axes[0].set_yticklabels(reversed(numbers))
    axes[1].set_xlabel("true return (0: random policy, 1: follower of the true reward)")
    for axis in axes:
        axis.grid(alpha=0.25)
    figure.tight_layout()
    figure.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=len(methods), frameon=False)
    return figure


def without_networks(number: int) -> list[dict]:
    """What every tabular method reaches on a problem: a row each of the tables' CSV file."""
    problem = tabular.preference(number)
    rows = []
    for name, method in TABLES.items():
        reached = of_tables(problem, method)
        share = round(share_of_best(problem, reached["true_return"]), 4)
        rows.append({"problem": number, "method": name, "phi": round(reached["phi"], 4), "share": share})
    return rows


def table_of_tables(rows: list[dict]) -> str:
    """Markdown: the mean phi over problems, on how many it is below DRLHF's, and the mean share_of_best."""
    found = defaultdict(list)
    for row in rows:
        found[row["method"]].append((float(row["phi"]), float(row["share"])))
    values = {name: np.array(pairs) for name, pairs in found.items()}
    lines = []
    for name, pairs in values.items():
        below = int((pairs[:, 0] < values["DRLHF"][:, 0]).sum())
        lines.append([name, f"{pairs[:, 0].mean():.3f}", below, f"{pairs[:, 1].mean():.2f}"])
    head = ["method", "mean φ", f"below DRLHF's, of {len(values['DRLHF'])}", "true return, 0 to 1"]
    return markdown(head, lines)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(Args, __doc__, argv)
    to_write = {"collect": ("csv", args.csv), "tables": ("tables-csv", args.tables_csv)}
    if args.action in to_write:
        check_can_be_written(*to_write[args.action])
    if args.action == "collect":
        collect(args)
    elif args.action == "tables":
        if not args.problems:
            fail("--problems must name at least one")
        rows = [row for number in args.problems for row in without_networks(number)]
        results.write_csv(args.tables_csv, rows)
        print(table_of_tables(rows))
    elif not args.csv.exists():
        fail(f"--csv {args.csv} is not there: run `python tools/phi.py collect` first")
    elif args.action == "figure":
        figures.save(draw(results.read_csv(args.csv)), args.figures_dir, "phi")
    else:
        print(table(args))


if __name__ == "__main__":
    main()
