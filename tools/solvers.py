"""Solvers of (H + rho I) x = v on critics of real runs: how accurate for how many milliseconds.

    python tools/solvers.py runs/Walker2d-v4__blpo__1__1763900000 runs/Hopper-v4__blpo__1__1763900500

Every run is copied and goes on from the last checkpoint but one, so that critic, rollouts and v are those of
training; the run itself stays as it is. Writes one row for each environment, solver, kind of products and
budget (products with H): the relative residual ||(H + rho I) x - v|| / ||v||, with the whole Hessian in
float64 whatever the solver used, and the milliseconds of a solve in float32 (one thread, median of
repetitions, products included).
"""

import copy
import json
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository, wherever this is started

import support  # noqa: F401  before torch, because it sets the number of threads

import numpy as np
import torch
import tyro

import blpo_continuous
import blpo_discrete
import nystrom
from jacobian import flatten, jacobian_of
from support.files import check_can_be_written
from support.flags import fail, parse_args
from tools.results import write_csv

SCRIPTS = {"blpo_continuous.py": blpo_continuous, "blpo_discrete.py": blpo_discrete}
BUDGETS = {
    "krylov": (1, 2, 3, 4, 6),
    "v-gaussian": (1, 2, 5, 10, 20),
    "gaussian": (2, 5, 10, 20, 50),
    "columns": (2, 5, 10, 20, 50),
    "cg": (1, 2, 3, 5, 8),
    "pcg": (1, 2, 3, 5),  # iterations after a Krylov sketch of rank 2
}


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """folders of BLPO runs"""
    systems: int = 5
    """linear systems of each run, one per epoch"""
    repeat: int = 7
    """timed repetitions of a solve"""
    csv: Path = Path("results/solvers.csv")
    """file to write"""


class Enough(Exception):
    """Raised in the middle of a run that has given all that was asked for."""


class Moment(NamedTuple):
    """What a run handed to its hypergradient."""

    actor: torch.nn.Module
    critic: torch.nn.Module
    advantages: np.ndarray  # (B,), under that critic
    batch: NamedTuple  # the script's Batch
    transitions: NamedTuple  # the script's Transitions
    args: object  # the run's flags


def watch(run: Path, script, **watching) -> None:
    """Goes on with a copy of a run from its last checkpoint but one, with functions of its script replaced by
    those of the same name in `watching`, until one of them raises Enough or the run has ended."""
    replaced = {name: getattr(script, name) for name in watching}
    try:
        vars(script).update(watching)
        with tempfile.TemporaryDirectory() as folder:
            going = shutil.copytree(run, Path(folder) / run.resolve().name)
            untold = ["--no-track", "--no-tensorboard"]  # the run's record is not to be written to
            script.main(["--resume", str(going / "checkpoint.previous.pt"), *untold])
    except Enough:
        pass
    finally:
        vars(script).update(replaced)


def moments(run: Path, count: int):
    """The script of a run, and the first `count` moments after its last checkpoint but one."""
    script = SCRIPTS[json.loads((run / "config.json").read_text(encoding="utf-8"))["script"]]
    leader_gradient, curvature = script.leader_gradient, script.curvature
    taken, seen = [], {}

    def see_actor(J, advantages, batch, transitions, actor, args):
        seen["rest"] = advantages, batch, transitions, args
        seen["actor"] = copy.deepcopy(actor)
        return leader_gradient(J, advantages, batch, transitions, actor, args)

    def see_critic(critic, batch, J, args):
        taken.append(Moment(seen["actor"], in_precision(critic, torch.float32), *seen["rest"]))
        if len(taken) == count:
            raise Enough
        return curvature(critic, batch, J, args)

    watch(run, script, leader_gradient=see_actor, curvature=see_critic)
    return script, taken


def in_precision(critic, dtype):
    """A copy of a critic, with arrays of its own."""
    other = copy.deepcopy(critic).to(dtype)
    other.vector = flatten(other)
    other.jacobian = jacobian_of(other.value)
    return other


def doubled(script, moment: Moment) -> Moment:
    """The same in float64."""
    actor, critic, advantages, batch, transitions, args = moment
    batch = script.Batch(*(x.astype(float) if x.dtype == np.float32 else x for x in batch))
    transitions = script.Transitions(*(x.astype(float) if x.dtype == np.float32 else x for x in transitions))
    critic = in_precision(critic, torch.float64)
    return Moment(actor, critic, advantages.astype(float), batch, transitions, args)


def system(script, moment: Moment, hessian: str):
    """The map u -> H u, by products of the kind `hessian`, and v (p,), by the script's own functions."""
    actor, critic, advantages, batch, transitions, args = moment
    J = critic.jacobian(transitions.all_obs)
    v = script.leader_gradient(J, advantages, batch, transitions, actor, args)
    return script.curvature(critic, batch, J, replace(args, hessian=hessian)), v


def misfit(run: Path, scripts=SCRIPTS) -> bool:
    """Whether run is not one of these scripts, with a solver, on the CPU, with two checkpoints."""
    try:
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
        flags = config["flags"]
        fits = config["script"] in scripts and flags["ihvp"] != "none" and not flags["cuda"]
    except (OSError, ValueError, KeyError, TypeError):
        return True
    return not fits or not (run / "checkpoint.previous.pt").exists()


def setup_ms(script, moment: Moment, hessian: str, repeat: int) -> float:
    """Milliseconds of what comes before the first product, beyond the Jacobian, which v needs anyway."""
    _, critic, _, batch, transitions, args = moment
    J = critic.jacobian(transitions.all_obs)
    spent = []
    for _ in range(repeat):
        begin = time.perf_counter()
        script.curvature(critic, batch, J, replace(args, hessian=hessian))
        spent.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(spent)


def solve(solver: str, product, v, budget: int, rho: float, generator):
    """x (p,) by `budget` products with H; CG and preconditioned CG make as many iterations."""
    if solver in ("cg", "pcg"):
        return nystrom.solve(solver, product, v, rho=rho, cg_iters=budget, cg_tol=0.0)[0]
    return nystrom.solve("nystrom", product, v, budget, rho, solver, generator=generator)[0]


class System(NamedTuple):
    """One linear system, as a solver gets it and exactly."""

    product: object
    v: np.ndarray  # (p,)
    exact_product: object  # with the whole Hessian, in float64
    exact_v: np.ndarray  # (p,)


@dataclass
class Case:
    """One solver with one budget on the systems of one run; `row` is what will be written about it."""

    row: dict
    systems: list[System]
    solver: str
    budget: int
    rho: float
    setup: float  # milliseconds
    spent: list[float] = field(default_factory=list)  # milliseconds of each solve

    def measure(self) -> None:
        residuals = []
        for i, (product, v, exact_product, exact_v) in enumerate(self.systems):
            generator = torch.Generator().manual_seed(i)
            begin = time.perf_counter()
            x = solve(self.solver, product, v, self.budget, self.rho, generator).astype(float)
            self.spent.append(1e3 * (time.perf_counter() - begin))
            rest = exact_product(x) + self.rho * x - exact_v
            residuals.append(nystrom.norm(rest) / nystrom.norm(exact_v))
        self.row["residual"] = f"{statistics.mean(residuals):.4g}"
        self.row["ms"] = round(self.setup + statistics.median(self.spent), 3)


def cases_of(run: Path, args: Args) -> list[Case]:
    script, taken = moments(run, args.systems)
    cases = []
    for hessian in ("gauss-newton", "full"):
        setup = statistics.median(setup_ms(script, moment, hessian, args.repeat) for moment in taken)
        exact = [system(script, doubled(script, moment), "full") for moment in taken]
        systems = [System(*system(script, moment, hessian), *known) for moment, known in zip(taken, exact)]
        flags = taken[0].args
        for solver, budgets in BUDGETS.items():
            for budget in budgets:
                products = budget + 2 * (solver == "pcg")
                row = {"env_id": flags.env_id, "solver": solver, "hessian": hessian, "products": products}
                cases.append(Case(row, systems, solver, budget, flags.nystrom_rho, setup))
    return cases


def main(args: Args) -> None:
    if not args.runs:
        fail("name the folder of at least one run")
    if min(args.systems, args.repeat) < 1:
        fail("--systems and --repeat must be at least 1")
    check_can_be_written("csv", args.csv)
    if bad := [str(run) for run in args.runs if misfit(run)]:
        names = ", ".join(bad)
        fail(f"{names}: not a run of BLPO, with a solver, that has written two checkpoints")
    cases = [case for run in args.runs for case in cases_of(run, args)]
    for _ in range(args.repeat):  # outermost, so that a slow spell of the machine meets all cases
        for case in cases:
            case.measure()
    rows = [case.row for case in cases]
    write_csv(args.csv, rows)
    print(f"{len(rows)} rows in {args.csv}; python tools/plot.py draws them")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(parse_args(Args, __doc__))
