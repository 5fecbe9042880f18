"""From the command line to training, to going on with a run, or to an evaluation of one."""

import contextlib
import gc
import signal
import warnings

from support.environments import check_env_id, find_modules_here
from support.evaluation import evaluate_run
from support.flags import check_run_flags, given_flags, parse_args, print_anything
from support.games import check_packages
from support.run_folder import check_run_folder, check_runs_dir
from support.saved import load_to_evaluate, load_to_resume


def own_process() -> None:
    """What is right for a process that does nothing but train."""
    print_anything()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # outside of training Ctrl-C just ends, without a traceback
    # The published tables use the v4 environments; Gymnasium warns of each that it is out of date
    warnings.filterwarnings("ignore", message=".*is out of date.*")
    # Updates that are not finite are skipped, counted and reported; environments may still warn
    ours = r"(__main__|jacobian|leader|nystrom|support\.replay|numpy\._core\._methods)$"
    warnings.filterwarnings("ignore", category=RuntimeWarning, module=ours)
    gc.freeze()  # what the imports made will never be garbage: the collector need not go through it again


def start(Args, check_args, train, Actor, description: str, argv: list[str] | None = None):
    """Runs a script with the flags of argv, or of the command line; returns the folder of a training run."""
    if argv is None:
        own_process()
    args = parse_args(Args, description, argv)
    args.exp_name = args.exp_name or args.usual_name
    args.require("resume", not (args.resume and args.evaluate), "be empty with --evaluate: give one of them")
    for flag in {"resume", "evaluate"} & given_flags(args, argv):
        args.require(flag, getattr(args, flag) != "", "name the folder of a run")
    find_modules_here()
    if args.evaluate:
        args, path, saved = load_to_evaluate(args, argv)
        check_run_flags(args)
        check_packages(args.env_id)
        return evaluate_run(Actor, args, path, saved)

    checkpoint = None
    if args.resume:
        args, checkpoint = load_to_resume(args, argv)
    with contextlib.ExitStack() as ended:
        if args.resume:
            ended.callback(checkpoint["lock"].release)  # whatever is refused, in train() too
        check_run_flags(args)
        check_args(args)
        check_env_id(args.env_id)
        if args.resume:
            check_run_folder(args.resume)
        else:
            check_runs_dir(args.runs_dir)
        return train(args, checkpoint)
