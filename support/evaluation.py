"""Whole episodes of a policy under frozen statistics: during a run, at its end, by --evaluate, on film."""

import ctypes.util
import math
import os
import re
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch

from support.environments import EVALUATION, Environments, RunningMeanStd, make_env, numpy_policy
from support.flags import fail, say
from support.run_folder import MODEL, EnvironmentFailed, Run, misfit


def play(actor, normalize, args, videos: Path | None = None):
    """Returns and lengths of --eval-episodes episodes, of 100,000 steps at most, each (episodes,).

    `normalize` maps raw observations to what the policy sees. Seeds and noise are the evaluation's own, so
    that training goes on as if there had been none.
    """
    env = make_env(args.env_id, render_mode="rgb_array") if videos else make_env(args.env_id)
    if videos:
        name = re.sub(r"[^\w.-]+", "-", args.env_id)
        first_three = range(3).__contains__
        env = gym.wrappers.RecordVideo(env, str(videos), first_three, name_prefix=name, disable_logger=True)
    policy = numpy_policy(actor.net)
    returns = np.zeros(args.eval_episodes)
    lengths = np.zeros(args.eval_episodes, dtype=int)
    generator = torch.Generator().manual_seed(args.seed)
    seeds = np.random.SeedSequence([args.seed, EVALUATION]).generate_state(args.eval_episodes).tolist()
    for episode, seed in enumerate(seeds):
        raw_obs, _ = env.reset(seed=seed)
        done = False
        while not done and lengths[episode] < 100_000:
            obs = np.asarray(normalize(raw_obs), np.float32)[None]
            noise = actor.noise(1, generator=generator) if args.eval_stochastic else 0.0
            action = actor.act(policy(obs), noise)
            raw_obs, reward, terminated, truncated, _ = env.step(actor.for_env(action, env.action_space)[0])
            returns[episode] += reward
            lengths[episode] += 1
            done = terminated or truncated
    env.close()
    return returns, lengths


def summary(args, returns, lengths) -> str:
    kind = f"{args.eval_episodes} {'stochastic' if args.eval_stochastic else 'deterministic'} episodes"
    spread = f"{returns.mean():.1f} ± {returns.std():.1f} ({returns.min():.1f} to {returns.max():.1f})"
    steps = f"{lengths.mean():.0f} ({lengths.min()} to {lengths.max()})"
    return f"evaluation, {kind}: return {spread}, length {steps}"


def during_training(run: Run, iteration: int, actor, envs: Environments, args) -> dict:
    """Columns of progress.csv where --eval-every asks for them, empty in the iterations between."""
    if not args.eval_every:
        return {}
    found = {"eval_return": math.nan, "eval_length": math.nan}
    if (iteration + 1) % args.eval_every == 0:
        try:
            returns, lengths = play(actor, envs.normalize, args)
            found = {"eval_return": float(returns.mean()), "eval_length": float(lengths.mean())}
        except Exception as problem:  # whatever a foreign environment raises: training can do without
            say(f"evaluation failed: {type(problem).__name__}: {problem}", error=True)
    run.lap("evaluation")
    return found


def finish(run: Run, actor, critic, envs: Environments, args) -> None:
    """Ends a run: model.pt, the time that it took, evaluation.csv."""
    wall = run.wall()
    model = {"actor": actor.cpu().state_dict(), "critic": critic.cpu().state_dict(), "config": run.config}
    if envs.obs_rms:
        model["obs_rms"] = envs.obs_rms.state_dict()
    run.save(MODEL, model)
    run.release_signals()
    envs.close()
    phases = ", ".join(f"{phase} {1e3 * spent / run.count:.0f}" for phase, spent in run.seconds.items())
    say(f"{envs.steps:,} steps in {wall:.0f} s, {envs.steps / wall:.0f} SPS; ms per iteration: {phases}")
    if args.eval_episodes:
        try:
            returns, lengths = play(actor, envs.normalize, args)
        except Exception as problem:  # whatever a foreign environment raises
            raise EnvironmentFailed(args.env_id, envs.steps) from problem
        rows = "".join(f"{r!r},{n}\n" for r, n in zip(returns.tolist(), lengths.tolist()))
        run.save("evaluation.csv", "return,length\n" + rows)
        say(summary(args, returns, lengths))
    say(f"results in {run.folder}")


def evaluate_run(Actor, args, path: Path, saved: dict) -> None:
    """--evaluate: the policy of a finished run, or of the last checkpoint. `saved` is what
    run_folder.evaluated returned, Actor the script's class of policies."""
    try:
        weights = saved["actor"]
        actor = Actor(weights["net.0.weight"].shape[1], len(weights["net.4.bias"]), args.hidden_size)
        actor.load_state_dict(weights)
        normalize = np.asarray
        if args.norm_obs:
            obs_rms = RunningMeanStd()
            obs_rms.load_state_dict(saved["obs_rms"])
            normalize = obs_rms.normalize
    except (KeyError, RuntimeError, AttributeError) as problem:
        misfit("--evaluate", path, problem)
    videos = path.parent / "videos" if args.capture_video else None
    if videos and sys.platform == "linux":  # without a screen; read when mujoco is imported
        os.environ.setdefault("MUJOCO_GL", "egl" if ctypes.util.find_library("EGL") else "osmesa")
    try:
        returns, lengths = play(actor, normalize, args, videos)
    except Exception as problem:  # whatever a foreign environment or its renderer raises
        fail(f"--evaluate {path.parent}: {args.env_id} failed: {type(problem).__name__}: {problem}", status=1)
    say(summary(args, returns, lengths) + (f"; videos in {videos}" if videos else ""))
