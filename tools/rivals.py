"""PPO of Stable-Baselines3 and of SBX (JAX), which tools/speed.py measures ours against. Runs in a virtual
environment of its own (pip install sbx-rl "gymnasium[mujoco]"; sbx-rl brings Stable-Baselines3):

    sbx-venv/bin/python tools/rivals.py sbx --num-envs 8 --num-steps 256 --batch-size 256 --update-epochs 5

Normalises observations and rewards by VecNormalize, and prints "global_step=n" and "SPS: n" after every
rollout, as CleanRL's scripts do. One thread.
"""

import argparse
import os
import time

os.environ["OMP_NUM_THREADS"] = "1"  # before NumPy, PyTorch and JAX are imported, which read it
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize


class Report(BaseCallback):
    """Says how far training is whenever a rollout has ended."""

    def _on_training_start(self) -> None:
        self.begin = time.perf_counter()

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        spent = time.perf_counter() - self.begin
        print(f"global_step={self.num_timesteps}\nSPS: {self.num_timesteps / spent:.0f}", flush=True)


def main() -> None:
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_is)
    parser.add_argument("library", choices=["sb3", "sbx"])
    parser.add_argument("--env-id", default="Walker2d-v4")
    parser.add_argument("--total-timesteps", type=int, default=1_000_000)
    parser.add_argument("--num-envs", type=int, default=1)
    parser.add_argument("--num-steps", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--update-epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if args.library == "sb3":
        import torch
        from stable_baselines3 import PPO

        torch.set_num_threads(1)
    else:
        from sbx import PPO
    envs = VecNormalize(make_vec_env(args.env_id, n_envs=args.num_envs, seed=args.seed))
    sizes = dict(n_steps=args.num_steps, batch_size=args.batch_size, n_epochs=args.update_epochs)
    PPO("MlpPolicy", envs, seed=args.seed, **sizes).learn(args.total_timesteps, callback=Report())


if __name__ == "__main__":
    main()
