"""The benchmark of what a run costs beside its training, end to end on a small model."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import bench_run

pytestmark = pytest.mark.slow
TINY = ["--model", "small_cnn", "--batch-size", "4", "--repetitions", "2", "--device", "cpu", "--check"]


@pytest.mark.parametrize(("goal", "code"), [(1e9, 0), (0.0, 1)])
def test_verdict_follows_the_goals(goal, code, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_run, "GOAL_SHARE", goal)
    monkeypatch.setattr(bench_run, "GOAL_HELP", 60.0)
    monkeypatch.setattr(sys, "argv", ["bench_run.py", *TINY, "--out", str(tmp_path)])
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[1]), prepend=os.pathsep)
    monkeypatch.chdir(tmp_path)
    assert bench_run.main() == code
    assert ("a goal is missed" in capsys.readouterr().err) == bool(code)
    result = json.loads((tmp_path / "bench_run_cpu.json").read_text())
    assert [v["held"] for v in result["verdicts"]] == [code == 0, True]
    assert result["checkpoint"]["bytes"] > 100_000
    assert result["step"]["median"] > 0
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]  # its checkpoints are swept up


def test_bad_arguments(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_run.py", "--steps", "0"])
    with pytest.raises(SystemExit):
        bench_run.main()
    assert "--steps: got 0; it must be at least 1" in capsys.readouterr().err
