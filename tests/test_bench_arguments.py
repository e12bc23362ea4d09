"""The benchmarks refuse what they cannot measure, or could not write, before they measure anything."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

FOLDERS = ("training", "methods", "input", "run", "winograd", "ranks", "pgd", "kernels")  # that --out names
HERE = str(ROOT / "benchmarks")


def refusal(monkeypatch, capsys, script: str, *arguments: str) -> str:
    if script == "bench_autoattack":
        pytest.importorskip("pyautoattack")
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(script).parse()
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("below", ["", "/below"])
def test_out_that_cannot_be_a_folder(monkeypatch, capsys, name, below):
    said = refusal(monkeypatch, capsys, f"bench_{name}", "--out", __file__ + below)
    assert f"--out: got {__file__}{below}; {__file__} is not a folder that can be written" in said


@pytest.mark.parametrize("script", ["bench_autoattack", "bench_fair", "simulate_ranks"])
def test_out_that_cannot_be_a_file(monkeypatch, capsys, script):
    first = [HERE] if script == "bench_autoattack" else []
    assert "a folder; it must be a file" in refusal(monkeypatch, capsys, script, *first, "--out", HERE)
    said = refusal(monkeypatch, capsys, script, *first, "--out", __file__ + "/x.json")
    assert f"{__file__} is not a folder that can be written" in said


def test_what_is_fine_makes_no_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["bench_run", "--out", str(tmp_path / "new" / "deeper"), "--device", "cpu"])
    assert importlib.import_module("bench_run").parse().out == tmp_path / "new" / "deeper"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        ("bench_pgd", ["--eps", "-1"], "--eps: got -1.0; it must be more than 0"),
        ("bench_pgd", ["--batch-size", "0"], "--batch-size: got 0; it must be at least 1"),
        ("bench_pgd", ["--data", "/no/where"], "--data: /no/where is not there"),
        ("bench_fair", ["--dataset", "nope"], "--dataset: invalid choice: 'nope'"),
        ("bench_fair", ["--path", "/no/where"], "--path: /no/where is not there"),
        ("bench_autoattack", ["/no/where"], "run: /no/where is not there"),
        ("bench_training", ["--device", "foo"], "--device: got foo; it must be one of torch's devices"),
        ("bench_methods", ["--data", "/no/where"], "--data: /no/where is not there"),
        ("bench_input", ["--workers", "0", "-1"], "--workers: got -1; none may be negative"),
        ("bench_run", ["--device", "auto"], "--device: got auto; it must be one of torch's devices"),
        ("simulate_ranks", ["--seed", "-1"], "--seed: got -1; it must be >= 0"),
        ("simulate_ranks", ["--node-gb-s", "0"], "--node-gb-s: got 0.0; it must be > 0"),
    ],
)
def test_bad_arguments(monkeypatch, capsys, script, arguments, said):
    assert said in refusal(monkeypatch, capsys, script, *arguments)
