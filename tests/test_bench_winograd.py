"""bench_winograd.py: that it runs, and that its table says what was measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import bench_winograd

from ham_kernels.ops.winograd import status

pytestmark = pytest.mark.slow


@pytest.mark.skipif(status()[0] is None, reason=status()[1])
def test_a_short_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_winograd, "LAYERS", ((16, 8), (32, 4)))
    assert bench_winograd.main(["--rows", "8", "--rounds", "2", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "bench_winograd_cpu.json").read_text())
    assert [(row["dtype"], row["channels"]) for row in result["layers"]] == [
        ("fp32", 16), ("fp32", 32), ("bf16", 16), ("bf16", 32),
    ]  # fmt: skip
    for row in result["layers"]:
        errors = {name: found["error"] for name, found in row["competitors"].items()}
        assert all(len(found["seconds"]) == 2 for found in row["competitors"].values())
        assert max(errors.values()) < (1e-5 if row["dtype"] == "fp32" else 1e-2)
        assert errors["torch"] > 0
    assert "32 channels, 4×4, bf16" in capsys.readouterr().out
    assert result["machine"]["torch"] in bench_winograd.readme_section(result)


def test_the_table():
    found = {
        "winograd": {"seconds": [0.010, 0.020], "error": 1e-6},
        "torch": {"seconds": [0.030, 0.040], "error": 2e-7},
        "torch, channels_last": {"seconds": [0.020, 0.020], "error": 3e-7},
    }
    row = {"dtype": "fp32", "rows": 8, "channels": 64, "side": 32, "competitors": found, "transform": [0.001]}
    _, cells = bench_winograd.cells([row])
    assert cells == [
        "64 channels, 32×32, fp32", "8", "15.0", "35.0", "20.0", "2.50", "1.50", "1.0e-06", "2.0e-07", "3.0e-07", "1.0",
    ]  # fmt: skip


def test_bad_numbers_and_no_library(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        bench_winograd.parse(["--rows", "4"])
    monkeypatch.setattr(bench_winograd, "status", lambda: (None, "not built"))
    assert bench_winograd.main([]) == 1
    assert "not built" in capsys.readouterr().err
