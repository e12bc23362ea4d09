"""The input benchmark end to end on a few images: its lines, JSON and exit codes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import bench_input

TINY = ["--images", "300", "--files", "3", "--workers", "0", "--repetitions", "2", "--device", "cpu", "--check"]


@pytest.mark.parametrize(("goal", "code", "word"), [(1, 0, "held"), (10**12, 1, "not held")])
def test_verdict_follows_the_goal(goal, code, word, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(bench_input.GOAL, "cpu", goal)
    monkeypatch.setattr(sys, "argv", ["bench_input.py", *TINY, "--out", str(tmp_path)])
    assert bench_input.main() == code
    out, err = capsys.readouterr()
    assert f"goal {goal:,} images/s from memory on 2 CPU cores, measured" in out
    assert f": {word}\n" in out
    assert ("the goal is missed" in err) == bool(code)
    result = json.loads((tmp_path / "bench_input_cpu.json").read_text())
    assert result["verdict"]["held"] == (code == 0)
    for measured in (result["memory"], result["files"]["0 workers"]):
        assert len(measured["all"]) == 2
        assert 0 < measured["lowest"] <= measured["median"] <= measured["highest"]
    assert result["machine"]["torch"]


def test_bad_arguments(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_input.py", "--repetitions", "1"])
    with pytest.raises(SystemExit):
        bench_input.main()
    assert "--repetitions: got 1; it must be at least 2" in capsys.readouterr().err
