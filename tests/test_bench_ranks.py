"""The benchmark of several processes against one: it runs, and says what it measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "benchmarks" / "bench_ranks.py"


@pytest.mark.slow
def test_both_ways_in_turn(tmp_path):
    told = ["--rounds", "1", "--batch-size", "6", "--pairs", "10", "--out", str(tmp_path)]
    said = subprocess.run([sys.executable, str(BENCH), *told], capture_output=True, text=True, check=True).stdout
    result = json.loads((tmp_path / "bench_ranks_cpu.json").read_text())
    assert list(result["methods"]) == ["PGD-AT", "HAM"]
    for rates in result["methods"].values():
        ratio = rates["all"]["median"] / rates["alone"]["median"]
        assert rates["ratio"]["median"] == pytest.approx(ratio)
    assert "2 processes" in said
    for r in result["alone"].values():
        assert 0 < r["low"] <= r["ratio"] <= r["high"] < 10
    assert "in times of one without the points" in said


@pytest.mark.slow
def test_one_process_is_no_comparison():
    done = subprocess.run([sys.executable, str(BENCH), "--processes", "1"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "--processes: got 1; it must be at least 2" in done.stderr
