"""Short runs of every script and mode end in the numbers that are kept in golden.json.

    python -m tests.test_golden          # writes golden.json anew, where numbers change on purpose

Where arithmetic rounds as on the machine that wrote them, weights and rows are equal to the byte. Elsewhere
(another processor, another version of PyTorch, NumPy or MuJoCo) the first iteration must still agree to three
digits.
"""

import contextlib
import csv
import hashlib
import importlib
import io
import json
import tempfile
from pathlib import Path

import support  # noqa: F401  before NumPy, because it sets the number of threads

import mujoco
import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).parent / "golden.json"
SHORT = "--num-envs 4 --num-steps 64 --num-minibatches 4 --update-epochs 2 --total-timesteps 768"
SHORT += " --eval-episodes 1"
MATCHED = "--critic-lr 1e-3 --no-clip-vloss --vf-coef 2 --no-joint-grad-clip"
PLAIN = "--no-norm-obs --no-norm-reward --no-norm-adv --no-anneal-lr"
AUTHORS = "--hypergradient released --nystrom-sketch columns --nystrom-rank 5 --hessian full"
SAC = "--hidden-size 16 --batch-size 16 --outer-steps 100 --learning-starts 200 --total-timesteps 800"
SAC += " --eval-episodes 1"
LEARNED = "--query-steps 50 --segment 10 --pairs 8 --initial-pairs 12 --initial-epochs 5"
LEARNED += " --reward-hidden-size 16"
TANH = "--reward-output tanh --no-reward-norm"
PROBE = "tests.probe_envs:Probe"
CASES = {
    "blpo": f"blpo_continuous --env-id Hopper-v4 {SHORT}",
    "blpo nesting only": f"blpo_continuous --env-id Hopper-v4 {SHORT} --ihvp none",
    "blpo cg": f"blpo_continuous --env-id Hopper-v4 {SHORT} --ihvp cg",
    "blpo pcg": f"blpo_continuous --env-id Hopper-v4 {SHORT} --ihvp pcg",
    "blpo released": f"blpo_continuous --env-id Hopper-v4 {SHORT} {AUTHORS}",
    "blpo mean-c": f"blpo_continuous --env-id Pendulum-v1 {SHORT} --hypergradient mean-c",
    "blpo plain": f"blpo_continuous --env-id Hopper-v4 {SHORT} {PLAIN} --eval-every 2",
    "blpo discrete": f"blpo_discrete --env-id CartPole-v1 {SHORT}",
    "ppo": f"ppo_continuous --env-id Hopper-v4 {SHORT} --eval-stochastic",
    "ppo matched": f"ppo_continuous --env-id Hopper-v4 {SHORT} {MATCHED}",
    "ppo tuned": f"ppo_continuous --env-id Hopper-v4 {SHORT} {MATCHED} --trajectory-minibatches",
    "ppo discrete": f"ppo_discrete --env-id Acrobot-v1 {SHORT} --norm-obs",
    "sac": f"sobirl_continuous --env-id Hopper-v4 {SAC}",
    "drlhf": f"sobirl_continuous --method drlhf --env-id Pendulum-v1 {SAC} {LEARNED}",
    "drlhf tanh": f"sobirl_continuous --method drlhf --env-id Pendulum-v1 {SAC} {LEARNED} {TANH}",
    "sobirl": f"sobirl_continuous --method sobirl --env-id Pendulum-v1 {SAC} {LEARNED}",
    "hpgd": f"sobirl_continuous --method hpgd --env-id Pendulum-v1 {SAC} {LEARNED}",
    "pbrl": f"sobirl_continuous --method pbrl --env-id Pendulum-v1 {SAC} {LEARNED}",
    "pbrl discrete": f"sobirl_discrete --method pbrl --env-id {PROBE}Pole-v0 {SAC} {LEARNED}",
    "sac discrete": f"sobirl_discrete --env-id CartPole-v1 {SAC}",
    "sobirl discrete": f"sobirl_discrete --method sobirl --env-id {PROBE}Pole-v0 {SAC} {LEARNED}",
    "sobirl images": f"sobirl_discrete --method sobirl --env-id {PROBE}Lights-v0 {SAC} {LEARNED}",
    "m-sobirl": "sobirl_tabular --problem preference --rounds 8",
    "stoc-sobirl": "sobirl_tabular --problem reward-shaping --method stoc-sobirl --samples 8 --rounds 4",
}


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def arithmetic() -> str:
    """How this machine rounds: versions, and the bytes of a few operations of the kinds that the scripts are
    made of."""
    rng = np.random.default_rng(0)
    parts = [torch.__version__, np.__version__, mujoco.__version__]
    for shape in ((8, 17), (64, 64), (256, 64)):
        a = rng.normal(size=shape).astype(np.float32)
        b = rng.normal(size=(shape[1], 64)).astype(np.float32)
        for product in (np.tanh(a @ b), torch.tanh(torch.from_numpy(a) @ torch.from_numpy(b)).numpy()):
            parts.append(digest(product.tobytes()))
        double = torch.from_numpy(a.astype(float))
        parts.append(digest((double @ double.T).exp().sum(0).numpy().tobytes()))
    images = torch.from_numpy(rng.normal(size=(16, 2, 4, 5)).astype(np.float32))
    parts.append(digest(torch.conv2d(images, images[:, :, :3, :3]).numpy().tobytes()))
    return digest(" ".join(parts).encode())


def tensors(value, name=""):
    """Names and tensors of nested dictionaries, in order."""
    if isinstance(value, dict):
        for key in sorted(value):
            yield from tensors(value[key], f"{name}.{key}")
    elif isinstance(value, torch.Tensor):
        yield name, value


def measured(folder: Path) -> dict:
    """Digests of what a run measured, times apart, and of its weights; its first row."""
    with open(folder / "progress.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    rows = [{k: v for k, v in row.items() if "seconds" not in k and k != "sps"} for row in rows]
    found = {"progress": digest(json.dumps(rows, sort_keys=True).encode())}
    for name in ("episodes.csv", "evaluation.csv"):
        if (folder / name).exists():
            found[name] = digest((folder / name).read_bytes())
    for name in ("model.pt", "solution.pt"):
        if (folder / name).exists():
            saved = torch.load(folder / name, weights_only=True)
            data = [key.encode() + tensor.numpy().tobytes() for key, tensor in tensors(saved)]
            found[name] = digest(b"".join(data))
    return found | {"first row": rows[0]}


def play(case: str) -> dict:
    script, *flags = CASES[case].split()
    with tempfile.TemporaryDirectory() as runs, contextlib.redirect_stdout(io.StringIO()):
        return measured(importlib.import_module(script).main([*flags, "--runs-dir", runs]))


@pytest.mark.parametrize("case", CASES)
def test_golden(case):
    kept = json.loads(GOLDEN.read_text(encoding="utf-8"))
    found = play(case)
    if kept["arithmetic"] == arithmetic():
        assert found == kept["cases"][case]
        return
    expected = {name: float(value) for name, value in kept["cases"][case]["first row"].items()}
    assert found["first row"].keys() == expected.keys()
    for name, value in found["first row"].items():
        assert float(value) == pytest.approx(expected[name], rel=2e-3, abs=1e-5, nan_ok=True), name


if __name__ == "__main__":
    torch.set_num_threads(1)
    content = {"arithmetic": arithmetic(), "cases": {case: play(case) for case in CASES}}
    GOLDEN.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
