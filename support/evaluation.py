"""Whole episodes of a policy under frozen statistics: during a run, at its end, by --evaluate, on film."""

import ctypes.util
import math
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch

from support.acting import numpy_policy
from support.environments import EVALUATION, Environments, RunningMeanStd, make_env
from support.flags import FOREIGN, Stop, fail, say, shown
from support.names import slug
from support.run_folder import EVALUATIONS, MODEL, Run, misfit


class Episodes(NamedTuple):
    """What an evaluation measured, a row for each of its episodes."""

    returns: np.ndarray  # (episodes,), sums of rewards as the environment gives them
    lengths: np.ndarray  # (episodes,), steps
    cut: np.ndarray  # (episodes,), True where --eval-max-steps ended the episode early


def render_without_a_screen() -> None:
    """Chooses what MuJoCo draws with, unless the user has; read when mujoco is imported."""
    if sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl" if ctypes.util.find_library("EGL") else "osmesa")


def follow_the_robot(env: gym.Env, options: dict) -> None:
    """Films with the camera "track" of a MuJoCo model, unless the user has chosen another one: Gymnasium 1.4
    stays where the episode began (its pull request 1618), and a walker leaves the picture after a second."""
    renderer = getattr(env.unwrapped, "mujoco_renderer", None)
    if renderer is None or options.keys() & {"camera_id", "camera_name", "default_camera_config"}:
        return
    model = env.unwrapped.model
    names = [model.camera(number).name for number in range(model.ncam)]
    if "track" in names:
        renderer.camera_id = names.index("track")


def play(actor, normalize, args, videos: Path | None = None) -> Episodes:
    """--eval-episodes episodes. `normalize` maps raw observations to what the policy sees. Seeds and noise
    are the evaluation's own, so that training goes on as if there had been none."""
    options = dict(render_mode="rgb_array") if videos else {}
    env = make_env(args, training=False, **options)
    if videos:
        follow_the_robot(env, args.env_options)
        name = slug(args.env_id)

        def first_three(episode: int) -> bool:
            return episode < 3

        env = gym.wrappers.RecordVideo(env, str(videos), first_three, name_prefix=name, disable_logger=True)
    policy = numpy_policy(actor.net)
    found = Episodes(*(np.zeros(args.eval_episodes, dtype) for dtype in (float, int, bool)))
    sequence = np.random.SeedSequence([args.seed, EVALUATION])
    *seeds, of_noise = sequence.generate_state(args.eval_episodes + 1).tolist()
    generator = torch.Generator().manual_seed(of_noise)
    last_line = time.monotonic()
    with env:  # closed, and the film finished, whatever happens
        for episode, seed in enumerate(seeds):
            raw_obs, _ = env.reset(seed=seed)
            done = False
            while not done and not found.cut[episode]:
                obs = np.asarray(normalize(raw_obs), np.float32)[None]
                noise = actor.noise(1, generator=generator) if args.eval_stochastic else 0.0
                action = actor.act(policy(obs), noise)
                action = actor.for_env(action, env.action_space)[0]
                raw_obs, reward, terminated, truncated, _ = env.step(action)
                found.returns[episode] += np.asarray(reward, float).item()
                found.lengths[episode] += 1
                done = terminated or truncated
                found.cut[episode] = not done and found.lengths[episode] >= args.eval_max_steps
                if time.monotonic() - last_line > 5:
                    last_line = time.monotonic()
                    steps = found.lengths[episode]
                    say(f"evaluation: step {steps:,} of episode {episode + 1} of {args.eval_episodes}")
    return found


def summary(args, found: Episodes) -> str:
    returns, lengths, cut = found
    kind = f"{args.eval_episodes} {'stochastic' if args.eval_stochastic else 'deterministic'} episodes"
    spread = f"{returns.mean():.1f} ± {returns.std():.1f} ({returns.min():.1f} to {returns.max():.1f})"
    steps = f"{lengths.mean():.0f} ({lengths.min()} to {lengths.max()})"
    line = f"evaluation, {kind}: return {spread}, length {steps}"
    if cut.any():
        limit = f"--eval-max-steps {args.eval_max_steps}"
        line += f"; {cut.sum()} of them were cut at {limit}, their returns are sums until then"
    return line


def during_training(run: Run, iteration: int, actor, envs: Environments, args) -> dict:
    """Columns of progress.csv where --eval-every asks for them, empty in the iterations between."""
    if not args.eval_every:
        return {}
    found = {"eval_return": math.nan, "eval_length": math.nan}
    if (iteration + 1) % args.eval_every == 0:
        try:
            episodes = play(actor, envs.normalize, args)
            found["eval_return"] = float(episodes.returns.mean())
            found["eval_length"] = float(episodes.lengths.mean())
        except FOREIGN as problem:  # whatever a foreign environment raises: training can do without
            say(f"evaluation failed: {shown(problem)}", error=True)
    run.lap("evaluation")
    return found


def finish(run: Run, actor, critic, envs: Environments, args, **others) -> None:
    """Writes model.pt, in which `others` are modules too, and evaluation.csv, and prints how long the run
    took."""
    wall = run.wall()
    modules = {"actor": actor, "critic": critic, **others}
    model = {name: module.cpu().state_dict() for name, module in modules.items()} | {"config": run.config}
    if envs.obs_rms:
        model["obs_rms"] = envs.obs_rms.state_dict()
    run.save(MODEL, model)
    run.release_signals()
    envs.close()
    phases = ", ".join(f"{phase} {1e3 * spent / run.count:.0f}" for phase, spent in run.seconds.items())
    say(f"{envs.steps:,} steps in {wall:.0f} s, {envs.steps / wall:.0f} SPS; ms per iteration: {phases}")
    if args.eval_episodes:
        try:
            found = play(actor, envs.normalize, args)
        except FOREIGN as problem:  # whatever a foreign environment raises
            raise Stop(f"the evaluation at the end failed in {args.env_id}") from problem
        rows = zip(found.returns.tolist(), found.lengths.tolist(), found.cut.astype(int).tolist())
        lines = ["return,length,cut", *(f"{r!r},{n},{cut}" for r, n, cut in rows)]
        run.save(EVALUATIONS, "\n".join(lines) + "\n")
        say(summary(args, found))
    say(f"results in {run.folder}")


def sizes_of(weights: dict) -> tuple:
    """What a policy of these weights sees, a number of numbers or the form of images, and its outputs."""
    *_, last = (name for name in weights if name.startswith("net.") and name.endswith(".bias"))
    form = weights.get("net.0.form")
    inputs = weights["net.0.weight"].shape[1] if form is None else form.tolist()
    return inputs, len(weights[last])


def evaluate_run(Actor, args, path: Path, saved: dict) -> None:
    """--evaluate: the policy of a finished run, or of the last checkpoint. `saved` is what
    saved.load_to_evaluate returned, Actor the script's class of policies."""
    try:
        weights = saved["actor"]
        actor = Actor(*sizes_of(weights), args.hidden_size)
        actor.load_state_dict(weights)
        normalize = np.asarray
        if args.norm_obs:
            obs_rms = RunningMeanStd()
            obs_rms.load_state_dict(saved["obs_rms"])
            normalize = obs_rms.normalize
    except (KeyError, RuntimeError, AttributeError, ValueError) as problem:
        misfit("--evaluate", path, problem)
    videos = path.parent / "videos" if args.capture_video else None
    if videos:
        render_without_a_screen()
    try:
        found = play(actor, normalize, args, videos)
    except FOREIGN as problem:  # whatever a foreign environment or its renderer raises
        fail(f"--evaluate {path.parent}: {args.env_id} failed: {shown(problem)}", status=1)
    say(summary(args, found) + (f"; videos in {videos}" if videos else ""))
