"""Solvers of (H + rho I) x = v at equal accuracy, on critics in the middle of real training runs.

    python solvers.py runs/Walker2d-v4__blpo__1__1795305468 runs/Hopper-v4__blpo__1__1795305773

Goes on with a copy of each run from its last checkpoint but one, for its first minibatches, and gives their critic, Hessian
and v to every solver with growing budgets. Writes results/solvers.csv, which plot.py draws: per run, solver, kind of products
and budget (products with H) the relative residual ||(H + rho I) x - v|| / ||v||, with the whole Hessian in float64 whatever
the solver used, and the milliseconds of a solve in float32 (one thread, median of repetitions, products included).
"""

import copy
import csv
import json
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro

import blpo_continuous
import blpo_discrete
from nystrom import cg_ihvp, make_sketch, nystrom_ihvp, nystrom_solve

BUDGETS = {"krylov": (1, 2, 3, 4, 6), "v-gaussian": (1, 2, 5, 10, 20), "gaussian": (2, 5, 10, 20, 50), "columns": (2, 5, 10, 20, 50)}
BUDGETS |= {"cg": (1, 2, 3, 5, 8), "pcg": (1, 2, 3, 5)}  # pcg: iterations after a Krylov sketch of rank 2


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """folders of BLPO runs"""
    minibatches: int = 5
    """minibatches of each run"""
    repeat: int = 7
    """timed repetitions of a solve"""
    csv: Path = Path("results/solvers.csv")
    """file to write"""


class Enough(Exception):
    pass


def systems(run: Path, count: int):
    """The first `count` minibatches of a run that goes on: copies of critic, minibatch, ratio, and its flags."""
    script = {"blpo_continuous.py": blpo_continuous, "blpo_discrete.py": blpo_discrete}[json.loads((run / "config.json").read_text())["script"]]
    taken, original = [], script.implicit_weights

    def spy(critic, mb, ratio, args, generator):
        taken.append((copy.deepcopy(critic), mb, ratio.detach(), args))
        if len(taken) == count:
            raise Enough
        return original(critic, mb, ratio, args, generator)

    script.implicit_weights = spy
    try:
        with tempfile.TemporaryDirectory() as folder:
            going = shutil.copytree(run, Path(folder) / run.name)
            script.main(["--resume", str(going / "checkpoint.previous.pt")])
    except Enough:
        pass
    script.implicit_weights = original
    return script, taken


def system(script, critic, mb, ratio, args, hessian):
    """The map u -> H u, and v, as the script hands them to its solver."""
    seen, original = [], script.solve_ihvp

    def record(product, v, args, generator):
        seen[:] = product, v
        return v, {"correction": 0.0}

    script.solve_ihvp = record
    script.implicit_weights(critic, mb, ratio, replace(args, hessian=hessian), None)
    script.solve_ihvp = original
    return seen


def misfit(run: Path) -> bool:
    """Whether run is not what this script needs."""
    if not (run / "config.json").exists() or not (run / "checkpoint.previous.pt").exists():
        return True
    config = json.loads((run / "config.json").read_text())
    return not config["script"].startswith("blpo") or config["flags"]["ihvp"] == "none" or config["flags"]["hypergradient"] == "control"


def setup_ms(script, critic, mb, args, hessian, repeat):
    """Milliseconds of what comes before the first product, beyond the Jacobian, which every hypergradient needs."""
    J, spent = script.Jacobian(critic, script.stacked_obs(mb.obs, mb.next_obs, mb.cut)), []
    for _ in range(repeat):
        begin = time.perf_counter()
        script.curvature(critic, mb, J, replace(args, hessian=hessian))
        spent.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(spent)


def solve(solver, product, v, budget, rho, generator):
    if solver == "cg":
        return cg_ihvp(product, v, rho, budget, 0.0)[0]
    if solver == "pcg":
        omega, Y = make_sketch("krylov", product, v, 2)
        return cg_ihvp(product, v, rho, budget, 0.0, lambda r: nystrom_solve(Y, omega, r, rho)[0])[0]
    return nystrom_ihvp(product, v, budget, rho, solver, generator)[0]


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*is out of date.*")
    args = tyro.cli(Args, description=__doc__)
    if bad := [str(run) for run in args.runs if misfit(run)]:
        sys.exit(f"error: {', '.join(bad)}: not a run of BLPO, with a solver, that has written two checkpoints")
    cases = []  # of all runs: what to solve, and the row to fill
    for run in args.runs:
        script, minibatches = systems(run, args.minibatches)
        for hessian in ("gauss-newton", "full"):
            prepared, setup = [], [setup_ms(script, critic, mb, flags, hessian, args.repeat) for critic, mb, _, flags in minibatches]
            for critic, mb, ratio, flags in minibatches:
                double = script.Batch(*(x.double() if x.is_floating_point() else x for x in mb))
                exact, v = system(script, copy.deepcopy(critic).double(), double, ratio.double(), flags, "full")
                prepared.append((*system(script, critic, mb, ratio, flags, hessian), exact, v))
            for solver, budget in ((solver, budget) for solver, budgets in BUDGETS.items() for budget in budgets):
                row = {"env_id": flags.env_id, "solver": solver, "hessian": hessian, "products": budget + 2 * (solver == "pcg")}
                cases.append((row, prepared, solver, budget, flags.nystrom_rho, statistics.median(setup), []))
    for _ in range(args.repeat):  # outermost, so that a machine's moods meet all cases
        for row, prepared, solver, budget, rho, setup, spent in cases:
            residuals = []
            for i, (product, v, exact, v_exact) in enumerate(prepared):
                begin = time.perf_counter()
                x = solve(solver, product, v, budget, rho, torch.Generator().manual_seed(i)).double()
                spent.append(1e3 * (time.perf_counter() - begin))
                residuals.append(float((exact(x) + rho * x - v_exact).norm() / v_exact.norm()))
            row |= {"residual": f"{statistics.mean(residuals):.4g}", "ms": round(setup + statistics.median(spent), 3)}
    rows = [row for row, *_ in cases]
    args.csv.parent.mkdir(parents=True, exist_ok=True)
    with open(args.csv, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"{len(rows)} rows in {args.csv}; python plot.py draws them")
