"""The main benchmark end to end on a few images: its table, JSON, figure, claims and exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_pgd  # noqa: E402
from pgd import results as pgd_results  # noqa: E402

pytestmark = pytest.mark.slow
TINY = ["--seeds", "2", "--warmup", "1", "--epochs", "3", "--train-images", "160", "--test-images", "100"]


def run(*args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_pgd.py"), *args]
    env = os.environ | {"OMP_NUM_THREADS": "1"}  # two busy threads on a busy machine wait for each other
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env=env)


def test_bench_end_to_end(tmp_path):
    done = run(*TINY, "--methods", "pgd_at,ham,ham_frozen_bn,random,torchattacks", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    for part in ("hard fraction h", "predicted from h", "worst class %, ema", "training time -45 %", "torchattacks"):
        assert part in done.stdout
    result = json.loads((tmp_path / "bench_pgd_digits.json").read_text())
    assert set(result["table"]) == {"pgd_at", "ham", "ham_frozen_bn", "random", "torchattacks"}
    ham = result["table"]["ham"]
    assert len(ham["h"]) == 2
    assert all(0 <= h <= 1 for h in ham["h"])
    assert all(len(seed["arms"]["ham"]["epochs"]) == 2 for seed in result["seeds"])
    assert result["machine"]["torch"]
    assert (tmp_path / "bench_pgd_digits.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("ham_seconds", "code"), [(5.0, 0), (6.0, 1)])
def test_check_follows_the_time_claim(ham_seconds, code, tmp_path, monkeypatch, capsys):
    """Runs of known lengths, since a test must not depend on the speed of its machine."""
    monkeypatch.setattr(bench_pgd, "run_seed", lambda *_: seed_result(ham_seconds, 0.3, 0.1))
    monkeypatch.setattr(bench_pgd, "overhead", lambda *_: {"share": 0.05, "how": "not measured"})
    monkeypatch.setattr(bench_pgd, "figure", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["bench_pgd.py", "--check", "--methods", "pgd_at,ham", "--out", str(tmp_path)])
    assert bench_pgd.main() == code
    assert ("the time claim does not hold" in capsys.readouterr().err) == bool(code)
    assert (tmp_path / "bench_pgd_digits.json").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--methods", "ham"], "--methods: got ham; it needs pgd_at and ham"),
        (["--methods", "pgd_at,ham,trades"], "--methods: got"),
        (["--warmup", "9", "--epochs", "9"], "--warmup: got 9 with --epochs 9"),
        (["--seeds", "0"], "--seeds: got 0"),
        (["--dataset", "digits", "--data", "x"], "not allowed with argument"),
    ],
)
def test_bad_arguments(args, message):
    done = run(*args)
    assert done.returncode == 2
    assert message in done.stderr


def test_predicted_ratio_is_the_cost_model():
    """K=10, M=3: (7 + 17h)/23."""
    assert pgd_results.predicted_ratio(0.0, 10, 3) == pytest.approx(7 / 23)
    assert pgd_results.predicted_ratio(1.0, 10, 3) == pytest.approx(24 / 23)
    assert pgd_results.predicted_ratio(0.33, 10, 3) == pytest.approx(0.548, abs=1e-3)


def seed_result(ham_seconds: float, ham_worst: float, ham_std: float) -> dict:
    def arm(seconds, n_hard, worst, std):
        judged = {"accuracy": 0.5, "worst_class": worst, "std": std, "per_class": [0.5, worst]}
        both = {"clean": judged, "pgd20": judged, "cw20": judged}
        return {"epochs": [{"seconds": seconds, "n": 100, "n_hard": n_hard}], "raw": both, "ema": both}

    arms = {"pgd_at": arm(10.0, 100, 0.2, 0.2), "ham": arm(ham_seconds, 25, ham_worst, ham_std)}
    return {"warm_up_s": 10.0, "arms": arms}


def test_claims_are_judged_on_the_numbers():
    good = pgd_results.claims(pgd_results.summarise([seed_result(5.0, 0.30, 0.10)] * 2, 10, 3))
    assert [c["holds"] for c in good] == [True, False, *[True] * 8]
    assert [c["measured"] for c in good[:2]] == ["-50 % (cost model from h: -51 %)", "-25 %"]
    assert "+10.0 ± 0.0 points" in good[2]["measured"]
    bad = pgd_results.claims(pgd_results.summarise([seed_result(6.0, 0.22, 0.19)] * 2, 10, 3))
    assert [c["holds"] for c in bad] == [False] * 10


def test_a_model_that_fails_all_classes_alike_is_judged_too():
    run = seed_result(5.0, 0.3, 0.1)
    for weights in ("raw", "ema"):
        run["arms"]["pgd_at"][weights]["pgd20"] = {"accuracy": 0.0, "worst_class": 0.0, "std": 0.0}
        run["arms"]["pgd_at"][weights]["cw20"] = {"accuracy": 0.4, "worst_class": 0.29, "std": 0.2}
    judged = pgd_results.claims(pgd_results.summarise([run], 10, 3))
    assert [c["measured"] for c in judged[3::4]] == ["no ratio, PGD-AT's is 0"] * 2
    assert [c["holds"] for c in judged] == [True, False, *[True, False, False, True] * 2]  # CW-20: +1 point, and -50 %
