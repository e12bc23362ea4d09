"""Each example has the gradients of one process on two as well, and the scripts for clusters are what they say."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
LOOPS = {
    "ddp": None,
    "fsdp2": None,
    "accelerate_loop": "accelerate",
    "fabric_loop": "lightning",
    "lightning_loop": "lightning",
}
OWN_LAUNCHER = ("fabric_loop", "lightning_loop")


def run(name: str, world: int, out: Path) -> tuple[dict[str, torch.Tensor], list[list[torch.Tensor]]]:
    """(weights after two updates, gradients of each), on 64 images and on the one left: a process has none."""
    noted = out.with_suffix(".gradients")
    told = ["--epochs", "1", "--images", "65", "--out", str(out)]
    if name in OWN_LAUNCHER:
        launcher, told = [], [*told, "--devices", str(world)]
    else:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)] if world > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"EXAMPLE": str(EXAMPLES / f"{name}.py"), "GRADIENTS": str(noted)}
    for _ in range(4):
        done = subprocess.run(
            [sys.executable, *launcher, str(Path(__file__).with_name("noting_gradients.py")), *told], env=environment,
            cwd=out.parent, capture_output=True, text=True, timeout=1000,
        )  # fmt: skip
        if "terminate called without an active exception" not in done.stderr:  # torch, when a process unloads it
            break
    assert done.returncode == 0, done.stderr[-3000:]
    assert not [line for line in done.stderr.splitlines() if f"{name}.py" in line and "FutureWarning" in line]
    return torch.load(out), torch.load(noted)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOPS)
def test_two_processes_train_as_one(name, tmp_path):
    if LOOPS[name]:
        pytest.importorskip(LOOPS[name])
    (one, by_one), (two, by_two) = (run(name, world, tmp_path / f"{world}.pt") for world in (1, 2))
    assert one.keys() == two.keys()
    for key, t in one.items():
        assert near(two[key], t), key
    assert len(by_one) == 2
    for update, gradients in enumerate(by_one):
        for alone, together in zip(gradients, by_two[update], strict=True):
            assert near(together, alone), update


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Within 1e-6, and within 5e-6 of the largest entry: fp32 sums in another order."""
    return float((a.double() - b.double()).abs().max()) <= min(1e-6, 5e-6 * float(b.abs().max()))


def test_the_scripts_for_clusters():
    subprocess.run(["bash", "-n", str(EXAMPLES / "slurm.sh")], check=True)
    import yaml

    job = yaml.safe_load((EXAMPLES / "pytorchjob.yaml").read_text())
    (container,) = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    subprocess.run(["bash", "-n", "-c", container["args"][0]], check=True)


def test_no_example_is_untested():
    assert {p.stem for p in EXAMPLES.glob("*.py")} == set(LOOPS)
    assert importlib.util.find_spec("ham_kernels.distributed")
