"""Going on with a run, or evaluating its policy: what was saved, and whether it is what it should be.

Damaged and foreign files are refused in one line, and what they contain is never executed.
"""

import json
import os
import shlex
from dataclasses import asdict
from pathlib import Path

import torch

from support.flags import check_ranges, fail, given_flags, say, script_of, shown
from support.names import no_flag
from support.replay import FILE as REPLAY
from support.run_folder import CHECKPOINT, MODEL, PREVIOUS, git_commit, lock_folder, versions


def load(flag: str, args, *names: str) -> tuple[dict, Path]:
    """What a run of args's script saved, and its path: the file that flag names, or in the folder that it
    names the first of names that is there. Under "args" are the flags of the run."""
    place = Path(getattr(args, flag.lstrip("-")))
    there = [place / name for name in names if os.path.exists(place / name)] or [place / names[0]]
    path = place if os.path.isfile(place) else there[0]
    folder = path.parent
    older = path.with_name(PREVIOUS)
    hint = ""
    if path.name == CHECKPOINT and os.path.exists(older):
        hint = f"; the one before it: {flag} {shlex.quote(no_flag(older))}"
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        own = saved["config"]
        script, flags, then = own["script"], own["flags"], own["versions"]
        config = own  # a model.pt may be alone
        if flag == "--resume" or os.path.exists(folder / "config.json"):
            config = read_config(flag, folder, path.name)
        same = without_length(config) == without_length(own)
        if flag == "--resume":
            check_rows(folder, saved["lines"], path.name, hint)
    except FileNotFoundError as missing:
        fail(f"{flag} {folder} has no {Path(missing.filename).name}: name the folder of a run")
    except Exception as problem:  # a torn zip file, other contents, an unreadable disk, ...
        fail(f"{flag} {folder}: {path.name} is damaged or no checkpoint ({shown(problem)[:80]}){hint}")
    if script != script_of(args).name:
        fail(f"{flag} {folder} is a run of {script}: use that script")
    if not same:
        other = f"{flags.get('env_id')}, seed {flags.get('seed')}"
        fail(f"{flag} {folder}: {path.name} is of another run ({other}){hint}")
    checkout = f"check out commit {then.get('git_commit')}"
    if "iteration" in saved and "parts" not in saved:
        fail(f"{flag} {folder} was begun by an older version: {checkout}")
    try:
        saved["args"] = type(args)(**config["flags"])
    except TypeError:
        fail(f"{flag} {folder} was begun by a version with other flags: {checkout}")
    check_ranges(saved["args"])
    now = versions() | {"git_commit": git_commit(args)}
    changed = [f"{name} {then.get(name)} (now {now[name]})" for name in now if now[name] != then.get(name)]
    if changed:
        say(f"note: {folder} was begun with {', '.join(changed)}; results may differ", error=True)
    saved["config"] = config
    return saved, path


def read_config(flag: str, folder: Path, saved: str) -> dict:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return config | {"flags": dict(config["flags"])}
    except (ValueError, TypeError, KeyError) as problem:
        where = f"what was in it is in {saved}, under 'config'"
        fail(f"{flag} {folder}: config.json is damaged ({shown(problem)[:80]}): {where}")


def without_length(config: dict) -> dict:
    """The contents of config.json but for --total-timesteps, which may have grown since a file was saved."""
    flags = {name: value for name, value in config["flags"].items() if name != "total_timesteps"}
    return config | {"flags": flags}


def check_rows(folder: Path, lines: dict[str, int], checkpoint: str, hint: str) -> None:
    """Refuses to go on where a csv file has fewer rows than belong to the checkpoint."""
    for name, count in lines.items():
        if (folder / name).read_bytes().count(b"\n") < count:
            what = f"{name} has lost rows that {checkpoint} counts on"
            fail(f"--resume {folder}: {what}{hint or ': start a new run'}")


def own_flags(args, argv: list[str] | None, saved: dict, free: set[str], why: str) -> dict:
    """The flags of the saved run, those of `free` as the command line has them; others may not differ."""
    own = asdict(saved["args"])
    given = given_flags(args, argv)
    for name in sorted(given - free):
        if getattr(args, name) != own[name]:
            fail(f"--{name.replace('_', '-')} {why}: drop it")
    return own | {name: getattr(args, name) for name in given & free}


def load_to_resume(args, argv: list[str] | None):
    """The flags of the run to go on with and its last checkpoint, to which are added "lock", the lock of its
    folder, and "path", its own. --resume names the folder, or one of its checkpoints."""
    folder = Path(args.resume if os.path.isdir(args.resume) else os.path.dirname(args.resume))
    if not os.path.exists(folder / "config.json"):
        fail(f"--resume {args.resume} is not the folder of a run")
    held = lock_folder(folder)  # before the checkpoint is read, which another process may be about to replace
    try:
        checkpoint, path = load("--resume", args, CHECKPOINT, PREVIOUS)
        if checkpoint["args"].cuda and not torch.cuda.is_available():  # no CPU can go on from its generators
            where = "torch finds none here: resume it on a machine that has one"
            fail(f"--resume {folder}: the run began with --cuda, so that it goes on on a GPU only; {where}")
        why = "cannot change on the way, --resume goes on with the flags of the run"
        free = {"resume", "track", "tensorboard", "total_timesteps"}
        own = own_flags(args, argv, checkpoint, free, why)
        if own["total_timesteps"] < (before := checkpoint["args"].total_timesteps):
            fail(f"--total-timesteps may only grow on the way, from {before:,} on: drop it or raise it")
        if own["total_timesteps"] > before and "replay" in checkpoint["parts"]:
            if not os.path.exists(folder / REPLAY):
                why = f"{folder} has ended without --keep-replay, so that its {REPLAY} is gone"
                fail(f"--total-timesteps cannot grow: {why}: drop it")
    except BaseException:
        held.release()
        raise
    args = type(args)(**own | {"resume": str(folder), "runs_dir": str(folder.parent)})
    return args, checkpoint | {"lock": held, "path": path}


def load_to_evaluate(args, argv: list[str] | None):
    """The flags to evaluate with, and path and contents of the model, or last checkpoint, of --evaluate."""
    saved, path = load("--evaluate", args, MODEL, CHECKPOINT, PREVIOUS)
    if "parts" in saved:  # a checkpoint: as if the run had ended there
        saved |= {"actor": saved["parts"]["actor"], "obs_rms": saved["parts"]["envs"]["obs_rms"]}
    here = {"evaluate", "eval_episodes", "eval_max_steps", "eval_stochastic", "capture_video"}
    why = "has no part in --evaluate, which takes it from the run"
    own = own_flags(args, argv, saved, here | {"seed"}, why)
    own |= {name: getattr(args, name) for name in here}  # of the command line or by default, never the run's
    own |= {"cuda": False, "track": False, "tensorboard": False}  # the policy acts in NumPy, and logs nothing
    return type(args)(**own), path, saved
