"""The main benchmark end to end on a few images: its table, JSON, figure, claims and exit codes."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_runs import fake_run

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_pgd  # noqa: E402
from pgd.competitors import TITLES  # noqa: E402
from pgd.results import cells, predicted_ratio  # noqa: E402
from readme import measured  # noqa: E402

pytestmark = pytest.mark.slow
TINY = ["--seeds", "2", "--warmup", "1", "--epochs", "3", "--train-images", "160", "--test-images", "100"]


def run(*args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_pgd.py"), *args]
    env = os.environ | {"OMP_NUM_THREADS": "1"}  # two busy threads on a busy machine wait for each other
    return subprocess.run(command, capture_output=True, text=True, timeout=1000, env=env)


def test_bench_end_to_end(tmp_path):
    foreign = ["torchattacks"] if importlib.util.find_spec("torchattacks") else []
    ours = ["pgd_at", "ham", "ham_frozen_bn", "random"]
    done = run(*TINY, "--methods", ",".join([*ours, "torchattacks"]), "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    for part in ("hard fraction h", "predicted from h", "worst class %, ema", "training time −45 %", "torchattacks"):
        assert part in done.stdout
    result = json.loads((tmp_path / "bench_pgd_digits.json").read_text())
    assert list(result["table"]) == [*ours, *foreign]
    ham = result["table"]["ham"]
    assert len(ham["h"]) == 2
    assert all(0 <= h <= 1 for h in ham["h"])
    assert [claim["claim"] for claim in result["claims"][:2]] == [measured.WHOLE, measured.PHASE]
    assert result["machine"]["torch"]
    titles = [group["title"] for group in result["report"]["groups"]]
    assert titles == ["PGD-AT", "HAM", "HAM, frozen BN", "random rows", *(f"PGD-AT ({name})" for name in foreign)]
    folder = tmp_path / "bench_pgd_digits"
    assert len(list(folder.glob("*-seed[01]"))) == 2 * len(titles)
    phases = [json.loads(line)["phase"] for line in (folder / "ham-seed1" / "metrics.jsonl").read_text().splitlines()]
    assert phases == ["pgd_at", "ham", "ham"]  # the warm-up is in every run
    assert (folder / "report" / "index.html").exists()
    assert (tmp_path / "bench_pgd_digits.png").read_bytes().startswith(b"\x89PNG")


def fake_runs(folder: Path, seeds: int, ham_seconds: float = 5.0, worst: float = 0.3, base: float = 0.2) -> None:
    """Of known lengths and accuracies, since a test must not depend on the speed of its machine."""
    for seed in range(seeds):
        accuracy = {"ham": [0.5, worst + 0.001 * seed], "pgd_at": [0.5, base]}
        for name, seconds in (("pgd_at", 10.0), ("ham", ham_seconds)):
            fake_run(
                folder / f"{name}-seed{seed}", name, seed, seconds=[5.0, *[seconds] * 3], weights=("ema", "last"),
                accuracy=dict.fromkeys(("clean", "pgd20", "cw20"), accuracy[name]),
                settings={"run.label": TITLES[name]},
            )  # fmt: skip


@pytest.mark.parametrize(("ham_seconds", "code"), [(5.0, 0), (6.0, 1)])
def test_check_follows_the_time_claim(ham_seconds, code, tmp_path, monkeypatch, capsys):
    def trained(seed, images, args, folder, progress):
        if seed == 0:
            fake_runs(folder, 3, ham_seconds)

    monkeypatch.setattr(bench_pgd, "run_seed", trained)
    monkeypatch.setattr(bench_pgd, "overhead", lambda *_: {"share": 0.05, "how": "not measured"})
    told = ["--check", "--methods", "pgd_at,ham", "--warmup", "1", "--epochs", "4", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["bench_pgd.py", *told])
    for _ in range(2):  # a second call takes the place of the first
        assert bench_pgd.main() == code
        assert ("the time claim does not hold" in capsys.readouterr().err) == bool(code)
    monkeypatch.setattr(bench_pgd, "run_seed", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # what a stopped call leaves is what was there
        bench_pgd.main()
    assert len(list((tmp_path / "bench_pgd_digits").glob("*-seed?"))) == 6
    result = json.loads((tmp_path / "bench_pgd_digits.json").read_text())
    assert result["table"]["ham"]["phase_ratio"] == pytest.approx([ham_seconds / 10] * 3)
    assert result["table"]["ham"]["whole_ratio"] == pytest.approx([(5 + 3 * ham_seconds) / 35] * 3)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--methods", "ham"], "--methods: got ham; it needs pgd_at and ham"),
        (["--methods", "pgd_at,ham,trades"], "--methods: got"),
        (["--warmup", "9", "--epochs", "9"], "--warmup: got 9 with --epochs 9"),
        (["--seeds", "0"], "--seeds: got 0"),
        (["--dataset", "digits", "--data", str(ROOT)], "not allowed with argument"),
    ],
)
def test_bad_arguments(args, message):
    done = run(*args)
    assert done.returncode == 2
    assert message in done.stderr


def test_predicted_ratio_is_the_cost_model():
    """K=10, M=3: (7 + 17h)/23."""
    assert predicted_ratio(0.0, 10, 3) == pytest.approx(7 / 23)
    assert predicted_ratio(1.0, 10, 3) == pytest.approx(24 / 23)
    assert predicted_ratio(0.33, 10, 3) == pytest.approx(0.548, abs=1e-3)


@pytest.mark.parametrize(("seeds", "worst"), [(1, "30.0"), (3, "30.1 ± 0.1")])
def test_cells_tell_a_spread_of_several_seeds_alone(tmp_path, seeds, worst):
    args = argparse.Namespace(methods=["pgd_at", "ham"], seeds=seeds, warmup=1, steps=10, screen_steps=3)
    fake_runs(tmp_path, seeds)
    rows = cells(bench_pgd.result_of(tmp_path, args, "")["table"])
    assert ["CW-20 worst class %, ema", "20.0" + " ± 0.0" * (seeds > 1), worst] in rows
    assert any("±" in cell for row in rows for cell in row) == (seeds > 1)


def test_claims_are_those_of_the_report_beside_the_cost_model(tmp_path):
    args = argparse.Namespace(methods=["pgd_at", "ham"], seeds=2, warmup=1, steps=10, screen_steps=3)
    fake_runs(tmp_path / "good", 2)
    good = bench_pgd.result_of(tmp_path / "good", args, "")["claims"]
    assert [c["measured"] for c in good[:2]] == ["−43 %", "−50 % (cost model from h: −51 %)"]
    assert good[2]["measured"] == "+10.0 ± 0.1 points (average over all images +5.0)"
    assert [c["holds"] for c in good] == [False, *[True] * 9]
    fake_runs(tmp_path / "bad", 2, 6.0, 0.22)
    bad = bench_pgd.result_of(tmp_path / "bad", args, "")["claims"]
    assert [c["holds"] for c in bad] == [False] * 10
