"""Training gives the weights that it gave before, bit by bit; and runs of before go on.

The arithmetic is that of any x86-64 processor (no oneDNN, no vector code that depends on the processor), so that the
digests hold on all of them; they were recorded at commit 36ad03f, with the torch named beside them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from ham_kernels import report

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

OLD_RUNS = Path(__file__).resolve().parent / "data" / "runs_0_1_0.tar.xz"
TORCH = "2.14.1"
DIGESTS = {  # of the last weights
    "ham": "a0fcc7261c24459d8c36b180b069d88e20871ed92a071c1f756d25ad99b9de03",
    "pgd_at": "a08a136747b0a55c5a0f3c3ec6a3a2c7358cee3e878dfc4672ae287669650a21",
    "n_fgsm": "d081618597070d8e86fe8e54598f9bfed946113791d80a6492cdabe1f507e64c",
}
OLD_RUN = "1aaf17ae0e8c1943cdb3cfbeecc748a71b3b73e90dd52c4d7acc4c517825c87b"  # of last and averaged weights
FLAGS = {"ham": "--method ham", "pgd_at": "--method pgd_at", "n_fgsm": "--method ham --warm-up n_fgsm"}
DATA = "--dataset digits --train-images 384 --test-images 100 --val-images 64 --batch-size 64"
CODE = """
import hashlib, sys
import torch
from ham_kernels.commands.cli import main
from ham_kernels.runs.folder import RunFolder

torch.backends.mkldnn.enabled = False
out, kinds, *command = sys.argv[1:]
assert main(command) == 0
digest = hashlib.sha256()
for weights in kinds.split(","):
    for name, value in sorted(RunFolder.open(out).load_weights(weights)["model"].items()):
        digest.update(name.encode())
        digest.update(value.contiguous().numpy().tobytes())
print(digest.hexdigest())
"""


def digest_of(out: Path, kinds: str, *command: str) -> str:
    """Of the weights of these kinds that `ham COMMAND` leaves in `out`."""
    portable = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-c", CODE, str(out), kinds, *command]
    env = {**os.environ, **portable, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(run, capture_output=True, text=True, check=True, env=env).stdout.split()[-1]


@pytest.fixture
def of_this_torch():
    if not torch.__version__.startswith(TORCH):
        pytest.skip(f"the digests are of torch {TORCH}")


@pytest.mark.usefixtures("of_this_torch")
@pytest.mark.parametrize("name", DIGESTS)
def test_final_weights_are_those_of_before(name, tmp_path):
    out = tmp_path / "run"
    command = f"train {DATA} --epochs 3 --start-epoch 2 --quiet --device cpu {FLAGS[name]} --out".split()
    assert digest_of(out, "last", *command, str(out)) == DIGESTS[name]


@pytest.fixture
def old_runs(tmp_path):
    """Runs of version 0.1.0 at commit 36ad03f: HAM, paused after epoch 2 of 3; PGD-AT, its checkpoints taken away."""
    with tarfile.open(OLD_RUNS) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


@pytest.mark.usefixtures("of_this_torch")
def test_a_run_of_before_goes_on(old_runs):
    out = old_runs / "ham"
    assert digest_of(out, "last,ema", "train", "--resume", str(out), "--quiet") == OLD_RUN


def test_runs_of_before_are_reported(old_runs):
    ham, pgd_at = (report.read_run(old_runs / name) for name in ("ham", "pgd_at"))
    assert (ham.method.name, ham.method.mines, ham.method.start_epoch) == ("ham", True, 2)
    assert (pgd_at.method.name, pgd_at.method.mines) == ("pgd_at", False)
    assert [e.mines for e in ham.epochs] == [False, True]
    assert [e.mines for e in pgd_at.epochs] == [False, False]
    page = report.build([ham.folder, pgd_at.folder], old_runs / "report")
    table = (page.parent / "table.md").read_text()
    assert "| PGD-AT (not finished) |" in table
    assert "| HAM (not finished) |" in table
