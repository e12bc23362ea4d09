"""Training runs in processes of their own, to be stopped and killed."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import torch
from helpers import environment

from ham_kernels.runs.folder import RunFolder

ROOT = Path(__file__).resolve().parents[1]
# Small, and with all that has a state: weight average, momentum, decay of the rate, both phases, validation.
TINY = (
    "--dataset", "digits", "--train-images", "240", "--val-images", "40", "--test-images", "60", "--batch-size", "48",
    "--epochs", "4", "--start-epoch", "3", "--milestones", "4", "--lr-decay", "0.1", "--steps", "3",
    "--screen-steps", "1", "--val-attack", "pgd2", "--ema-decay", "0.9",
)  # fmt: skip


def ham(*arguments: str, cwd: Path, **options) -> subprocess.Popen:
    """`ham ...` as a process, on one thread, with its output kept."""
    alone = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
    env = environment(ROOT, ROOT / "python", **alone)
    return subprocess.Popen(
        [sys.executable, "-m", "ham_kernels", *arguments], cwd=cwd, env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options,
    )  # fmt: skip


def finish(process: subprocess.Popen, timeout: float = 240) -> tuple[int, str]:
    out, _ = process.communicate(timeout=timeout)
    return process.returncode, out


def wait_for(condition, process: subprocess.Popen, timeout: float = 120) -> None:
    """Until the condition holds; fails where the process ends or time runs out before."""
    end = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "the run does not get there"
        time.sleep(0.005)


def assert_same_weights(run: Path, reference: Path) -> None:
    """Every kind of weights of two runs, and all metrics but the clock's, are the same to the last bit."""
    ours, theirs = RunFolder.open(run), RunFolder.open(reference)
    assert ours.available_weights() == theirs.available_weights()
    for weights in theirs.available_weights():
        a, b = ours.load_weights(weights), theirs.load_weights(weights)
        assert a["epoch"] == b["epoch"], weights
        assert a["model"].keys() == b["model"].keys()
        assert all(torch.equal(a["model"][k], b["model"][k]) for k in b["model"]), weights
    assert timeless_metrics(run) == timeless_metrics(reference)


def timeless_metrics(run: Path) -> list[dict]:
    import json

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clocks = ("seconds", "cpu_seconds", "waited", "images_per_s", "sum")
    return [{k: v for k, v in line.items() if k not in clocks} for line in lines]
