"""Each example trains the same model on two processes as on one, and the scripts for clusters are what they say."""

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


def run(name: str, world: int, out: Path) -> dict[str, torch.Tensor]:
    """The weights after two updates, on 64 images and on those left: 33, or one, so that a process has none."""
    told = ["--epochs", "1", "--images", "65" if name in ("ddp", "fsdp2") else "97", "--out", str(out)]
    if name in OWN_LAUNCHER:
        launcher, told = [], [*told, "--devices", str(world)]
    else:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)] if world > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for _ in range(4):
        done = subprocess.run(
            [sys.executable, *launcher, str(EXAMPLES / f"{name}.py"), *told], env=environment, cwd=out.parent,
            capture_output=True, text=True, timeout=280,
        )  # fmt: skip
        if "terminate called without an active exception" not in done.stderr:  # torch, when a process unloads it
            break
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOPS)
def test_two_processes_train_as_one(name, tmp_path):
    if LOOPS[name]:
        pytest.importorskip(LOOPS[name])
    one, two = (run(name, world, tmp_path / f"{world}.pt") for world in (1, 2))
    assert one.keys() == two.keys()
    for key, t in one.items():
        assert (t.double() - two[key].double()).abs().max() <= 1e-5 * t.double().abs().max().clamp_min(1), key


def test_the_scripts_for_clusters():
    subprocess.run(["bash", "-n", str(EXAMPLES / "slurm.sh")], check=True)
    import yaml

    job = yaml.safe_load((EXAMPLES / "pytorchjob.yaml").read_text())
    (container,) = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    subprocess.run(["bash", "-n", "-c", container["args"][0]], check=True)


def test_no_example_is_untested():
    assert {p.stem for p in EXAMPLES.glob("*.py")} == set(LOOPS)
    assert importlib.util.find_spec("ham_kernels.distributed")
