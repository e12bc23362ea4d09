"""The benchmark of AutoAttack: who takes turns how, its table and verdict from known lanes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("pyautoattack")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import bench_autoattack as bench


def lane(seconds: list[float], correct: str) -> dict:
    return {"seconds": seconds, "correct": correct}


def found(fast: dict) -> dict[str, dict]:
    theirs = lane([10.0, 30.0], "1100" * 50)
    return {bench.THEIRS: theirs, bench.PLAIN: lane([20.0, 20.0], "1100" * 50), bench.FAST: fast}


def test_table_compares_with_the_package_alone():
    head, theirs, plain, fast = bench.table(found(lane([5.0, 10.0], "1100" * 49 + "1000")))
    assert theirs[1:] == ["40", "1.00", "1.00 to 1.00", "50.0", "0 of 200"]
    assert plain[1:] == ["40", "1.00", "0.50 to 1.50", "50.0", "0 of 200"]
    assert fast[1:] == ["15", "2.67", "2.00 to 3.00", "49.5", "1 of 200"]
    assert len(head) == len(fast)


@pytest.mark.parametrize(("fast", "ends"), [
    (lane([5.0, 10.0], "1100" * 49 + "1000"), "2.67 x, 99.5 %, 0.5 points: holds"),
    (lane([15.0, 10.0], "1100" * 50), "1.60 x, 100.0 %, 0.0 points: does not hold"),
    (lane([5.0, 10.0], "1100" * 48 + "1010" * 2), "2.67 x, 98.0 %, 0.0 points: does not hold"),
    (lane([5.0, 10.0], "1100" * 49 + "0000"), "2.67 x, 99.0 %, 1.0 points: does not hold"),
])  # fmt: skip
def test_verdict_is_of_time_verdicts_and_average(fast, ends):
    assert bench.verdict(found(fast)).endswith(ends)


def test_each_part_goes_to_each_in_turn_behind_one_warm_up(capsys):
    log = []

    def judge(name: str):
        return lambda x, y: (log.append((name, len(y))), y == 0)[1]

    judges = {name: judge(name) for name in (bench.THEIRS, bench.FAST)}
    x, y = torch.rand(40, 1, 2, 2), torch.arange(40) % 2
    lanes = bench.contest(judges, list(zip(x.tensor_split(2), y.tensor_split(2), strict=True)))
    assert log == [(bench.FAST, 20), *[(bench.THEIRS, 20), (bench.FAST, 20)] * 2]
    assert lanes[bench.FAST]["correct"] == "10" * 20
    assert len(lanes[bench.FAST]["seconds"]) == 2


def test_its_section_has_settings_versions_and_verdict():
    result = {
        "settings": {"model": "m", "dataset": "d", "images": 200, "eps": 8 / 255, "norm": "linf", "parts": 2},
        "machine": {"cpu": "c", "cores": "2", "gpu": "none", "torch": "2", "ham_kernels": "0", "date": "today"},
        "pyautoattack": "0.2.0", "lanes": found(lane([5.0, 10.0], "1100" * 50)),
    }  # fmt: skip
    text = bench.readme_section(result)
    for part in ("m, 200 test images of d", "pyautoattack 0.2.0", "| ours, fast search | 15 |", "points: holds"):
        assert part in text
