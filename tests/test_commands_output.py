"""Output that nobody reads, or that a terminal cannot show, ends no work."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys

import pytest
from helpers import environment
from runs_helper import ROOT, TINY

from ham_kernels.commands import progress
from ham_kernels.training.reports import StepReport

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("no_gpu")]


def ham(*arguments: str, cwd, **more: str) -> subprocess.Popen:
    """With its two streams apart."""
    env = environment(ROOT, ROOT / "python", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", **more)
    return subprocess.Popen(
        [sys.executable, "-m", "ham_kernels", *arguments], cwd=cwd, env=env, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip


def test_a_closed_pipe_does_not_end_a_training(tmp_path):
    """As `ham train | head -1`."""
    process = ham("train", *TINY, "--out", "run", cwd=tmp_path)
    assert process.stdout.readline().startswith(b"run: digits, small_cnn")
    process.stdout.close()
    err = process.stderr.read()
    assert (process.wait(240), err) == (0, b"")
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "finished"


def test_a_closed_pipe_does_not_end_a_judgement(tmp_path):
    assert ham("train", *TINY, "--out", "run", "--quiet", cwd=tmp_path).wait(240) == 0
    weights = ("--weights", "ema", "last", "--attacks", "clean", "--no-masking", "--no-analyses")
    process = ham("evaluate", "run", *weights, cwd=tmp_path)
    process.stdout.close()
    process.stderr.close()
    assert process.wait(240) == 0
    assert (tmp_path / "run/evaluation/last.json").exists()


def test_a_terminal_without_lambda_shows_the_rest(tmp_path):
    process = ham("train", *TINY, "--out", "run", cwd=tmp_path, PYTHONIOENCODING="ascii")
    out, err = process.communicate(timeout=1000)
    assert process.returncode == 0, err
    assert b"HAM (from epoch 3, M=1, ?=1)" in out


def test_only_a_missing_reader_is_passed_over(monkeypatch, capsys):
    class Broken:
        def __init__(self, number: int):
            self.number = number

        def write(self, text):
            raise OSError(self.number, os.strerror(self.number))

        def flush(self):
            pass

        def fileno(self):
            raise OSError("has none")

    for number in (errno.EPIPE, errno.EIO):
        progress.say("x", Broken(number))
    with pytest.raises(OSError, match="No space left"):
        progress.say("x", Broken(errno.ENOSPC))


# ---------------------------------------------------------------- where no terminal is
def test_a_minute_without_a_line_is_told(capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    shown = progress.TrainProgress(2, 4, done=4)
    judged = progress.JudgeProgress(quiet=False)
    for minute in range(3):
        now = 61.0 * minute
        shown.batch(StepReport(1.5, 8, 8, None), epoch=2)
        judged("pgd20", minute + 1, 10)
    out, err = capsys.readouterr()
    assert re.findall(r"epoch 2/2  batch (\d)/4  loss 1.500  left \d+:\d\d", out) == ["2", "3"]
    assert err.splitlines() == ["pgd20 ...", "pgd20: 2 of 10 done", "pgd20: 3 of 10 done"]
