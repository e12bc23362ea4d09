"""Which run folders a report finds, in which order, what became of the others, and where it may be written."""

from __future__ import annotations

import fcntl
import json

import pytest
from fake_runs import change_evaluation, fake_run, write_json

from ham_kernels import report
from ham_kernels.report.reading.evaluations import Attack, EasyAt, Interval
from ham_kernels.report.reading.json_types import read_as

ACCURACY = {"clean": [0.9, 0.8], "pgd20": [0.5, 0.3]}


@pytest.fixture(autouse=True)
def without_figures(monkeypatch):
    """Most of a report's time is drawing; these tests read its words."""
    from ham_kernels.report.drawing import figure_list

    monkeypatch.setattr(figure_list, "ENTRIES", ())


def built(runs, out):
    report.build(runs, out)
    return (out / "index.html").read_text(encoding="utf-8"), json.loads((out / "data.json").read_text())


def test_a_report_is_not_written_over_a_run(tmp_path):
    """Both have a data.json; without its own a run can be neither evaluated nor resumed."""
    run, other = fake_run(tmp_path / "run"), fake_run(tmp_path / "other", seed=1)
    write_json(run / "data.json", {"classes": ["0", "1"]})
    before = sorted(p.name for p in run.iterdir())
    with pytest.raises(ValueError, match=r"^out: .*run is a run folder.*try .*run/report"):
        report.build([run, other], run)
    assert json.loads((run / "data.json").read_text()) == {"classes": ["0", "1"]}
    assert sorted(p.name for p in run.iterdir()) == before
    built([run], run / "report")
    built([run], run / "report")  # a report replaces a report


# ---------------------------------------------------------------- sweeps
def test_a_sweeps_runs_are_in_the_order_of_m_and_lambda(tmp_path):
    names = [
        "pgd_at-seed0", "pgd_at-seed10", "ham-M1-lam0.5-seed0", "ham-M1-lam1-seed0", "ham-M1-lam1.5-seed0",
        "ham-M1-lam2-seed0", "ham-M2-lam0.5-seed0", "ham-M10-lam1-seed0", "ham-M3-lam1-group2-seed0",
        "ham-M3-lam1-n_fgsm-seed0", "ham-M3-lam1-round32-seed0", "ham-M3-lam0.5-one_step-seed0",
    ]  # fmt: skip
    for name in reversed(names):
        fake_run(tmp_path / "sweep" / name)
    assert [run.name for run in report.read_runs([tmp_path / "sweep"])] == names


def test_cells_without_a_run_folder_are_named(tmp_path):
    sweep = tmp_path / "sweep"
    fake_run(sweep / "pgd_at-seed0", "pgd_at", accuracy=ACCURACY)
    fake_run(sweep / "ham-seed0", "ham", state="failed")
    (sweep / "ham-seed1").mkdir()
    states = {"pgd_at-seed0": "finished", "ham-seed0": "failed", "ham-seed1": "failed", "ham-seed2": "failed"}
    failed = [
        {"run": "ham-seed0", "problem": "FAILED: it has a folder that says so"},
        {"run": "ham-seed1", "problem": "FAILED: <no> space left"},
    ]
    write_json(sweep / "sweep.json", {"experiment": "baseline", "runs": states, "failed": failed})
    page, data = built([sweep, sweep], tmp_path / "out")
    assert [(cell["run"], cell["problem"]) for cell in data["lost"]] == [
        ("ham-seed1", "FAILED: <no> space left"), ("ham-seed2", "failed"),
    ]  # fmt: skip
    assert "Missing or unreadable" in page
    assert "<strong>ham-seed1</strong> has no run folder" in page
    assert "FAILED: &lt;no&gt; space left" in page
    page, data = built([sweep / "pgd_at-seed0"], tmp_path / "one")
    assert (data["lost"], "Missing or unreadable" in page) == ([], False)


@pytest.mark.parametrize("text", ["{", "[]", '{"runs": 3, "failed": [1, {"run": 2}]}', '{"runs": null}'])
def test_a_broken_sweep_json_stops_no_report(tmp_path, text):
    fake_run(tmp_path / "sweep" / "run", accuracy=ACCURACY)
    (tmp_path / "sweep" / "sweep.json").write_text(text)
    page, _ = built([tmp_path / "sweep"], tmp_path / "out")
    assert ("sweep.json" in page) == (text in ("{", "[]"))


# ---------------------------------------------------------------- one run
def test_other_evaluations_are_named_where_there_is_none_that_is_shown(tmp_path):
    run = fake_run(tmp_path / "run", accuracy=ACCURACY)
    other = "ema.test-eps0.2-step0.05-bf16-seed0.json"
    (run / "evaluation" / other).write_bytes((run / "evaluation" / "ema.json").read_bytes())
    write_json(run / "evaluation" / ".ema.flags.json", {})
    change_evaluation(run, lambda raw: raw.update(precision="bf16"), other.removesuffix(".json"))
    page, _ = built([run], tmp_path / "shown")
    assert f"<li>run: {other} (precision bf16)</li>" in page
    (run / "evaluation" / "ema.json.epoch2-0123abcd").write_text('{"epoch": 2}')
    page, _ = built([run], tmp_path / "earlier")
    assert "<li>run: ema.json.epoch2-0123abcd (earlier weights, of epoch 2)</li>" in page
    (run / "evaluation" / "ema.json.epoch2-0123abcd").unlink()
    (run / "evaluation" / "ema.json").unlink()
    page, _ = built([run], tmp_path / "out")
    assert "not evaluated on test images at its own budget in fp32 with seed 0" in page
    assert f"reports show no other evaluations, of which it has: {other})" in page
    (run / "evaluation" / other).unlink()
    page, _ = built([run], tmp_path / "none")
    assert "not evaluated: <code>ham evaluate" in page
    assert "Evaluations left out" not in page


def test_a_killed_run_is_not_running(tmp_path):
    """kill -9 leaves the status as it was, but no lock."""
    run = fake_run(tmp_path / "run", seconds=[1.0, 1.0], state="running")
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        page, data = built([run], tmp_path / "out")
        assert "training is not finished (running at epoch 2 of 4)" in page
        assert data["runs"][0]["state"] == "running"
    page, data = built([run], tmp_path / "out")
    assert "training is not finished (stopped at epoch 2 of 4)" in page
    assert data["runs"][0]["state"] == "stopped"
    (run / ".lock").unlink()
    assert report.read_run(run).state == "stopped"


# ---------------------------------------------------------------- types
def test_json_is_read_as_the_types_of_a_dataclass():
    assert read_as(EasyAt, {"m": 3, "easy_fraction": 1, "stay_share": float("nan"), "more": []}) == EasyAt(
        m=3, easy_fraction=1.0, stay_share=None
    )
    attack = read_as(Attack, {"accuracy": 0.5, "per_class": [None, {"value": 0.5, "low": 0.4}]})
    assert attack.accuracy == Interval(0.5)
    assert attack.per_class == (Interval(None), Interval(0.5, 0.4))
    assert attack.n is None


@pytest.mark.parametrize(
    ("raw", "error", "words"),
    [
        ({}, KeyError, "'m'"),
        ([], TypeError, r"got \[\] where an object belongs"),
        ({"m": True}, TypeError, "m: got True where a number belongs"),
        ({"m": None}, TypeError, "m: got None where a number belongs"),
        ({"m": 3, "stay_share": "0.3"}, TypeError, "stay_share: got '0.3' where a number belongs"),
    ],
)
def test_what_is_of_another_type_is_named(raw, error, words):
    with pytest.raises(error, match=f"^{words}$"):
        read_as(EasyAt, raw)
