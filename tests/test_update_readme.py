"""Measured sections of README and docs/results.md: made of result files, and nothing where there is none."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import update_readme  # noqa: E402
from readme import frontier, measured, presets, questions, reports, timed  # noqa: E402


@pytest.fixture
def results(tmp_path, monkeypatch) -> Path:
    """A copy of benchmarks/results/ that a test may change."""
    folder = tmp_path / "benchmarks" / "results"
    shutil.copytree(ROOT / "benchmarks" / "results", folder)
    monkeypatch.setattr(measured, "RESULTS", folder)
    monkeypatch.setattr(measured, "ROOT", tmp_path)
    return folder


def cells_of(table: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    assert len({len(row) for row in rows}) == 1
    return {first: rest for first, *rest in rows}


def change(path: Path, edit) -> None:
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize("page", update_readme.PAGES, ids=lambda page: page.name)
def test_pages_are_what_the_results_say(page):
    text = page.read_text()
    assert update_readme.written(text, update_readme.PAGES[page], page.parent) == text
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (page.parent / link).exists(), link


def test_a_page_without_its_section_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="claims: the page has 0 such sections"):
        update_readme.written("# Nothing", {"claims": measured.claims}, tmp_path)


def test_claims_of_the_digits_are_those_of_their_report(results):
    said = [("−50 % (cost model from h: −54 %)", True), ("−35 %; undecided: 95 % interval −225.6 to +155.6", None)]
    worst, std = (text.format("CW-20") for text in (measured.WORST, measured.STD))
    asked = dict(
        zip((measured.PHASE, measured.WHOLE, worst, std), [*said, ("+12.2 points", True), ("+1 %", False)], strict=True)
    )

    def edit(result):
        result["claims"] = [{"claim": claim, "measured": m, "holds": holds} for claim, (m, holds) in asked.items()]

    change(results / "bench_pgd_digits.json", edit)
    digits = {claim: cells[0] for claim, cells in cells_of(measured.claims(ROOT)).items()}
    assert digits[measured.PHASE] == "−50 % (cost model from h: −54 %): **holds**"
    assert digits[measured.WHOLE] == "−35 %; undecided: 95 % interval −225.6 to +155.6"
    assert (digits[worst], digits[std]) == ("+12.2 points: **holds**", "+1 %: **does not hold**")
    assert digits[measured.WORST.format("AutoAttack")] == "not judged"


def test_what_a_gpu_says_is_taken_over(results):
    assert "Nothing has been measured on a GPU yet" in measured.gpu(ROOT)
    paper = "Claims of the paper"
    table = [
        ("bench-kernels", "compact is quick", "3 µs", "held"),
        (paper, f"HAM: {measured.PHASE}", "−47 %", "holds"),
        (paper, "HAM: 75% of the examples easy at M = 3 stay easy (weight average)", "71.0%", "does not hold"),
        (paper, f"HAM, frozen BN: {measured.WHOLE}", "−30 %", "does not hold"),
        ("Stages without a result", "train", "not run yet", "not measured"),
    ]
    keys = ("section", "goal", "measured", "verdict")
    summary = {
        "gpus": ["A", "B"],
        "made": "2026-12-01T00:00",
        "table": [dict(zip(keys, r, strict=True)) for r in table],
    }
    (results / "gpu").mkdir()
    (results / "gpu" / "summary.json").write_text(json.dumps(summary))
    rows = {claim: cells[-1] for claim, cells in cells_of(measured.claims(ROOT)).items()}
    assert rows[measured.PHASE] == "−47 %: **holds**"
    assert rows[measured.WHOLE] == "not judged"
    assert rows[measured.EASY] == "71.0%: **does not hold**"
    text = measured.gpu(measured.ROOT)
    assert text.startswith("A and B, 2026-12-01; [all of it](docs/gpu-results.md).")
    assert list(cells_of(text).items())[2:] == [("compact is quick", ["3 µs", "**held**"])]


def test_each_device_has_its_own_tables(results):
    shutil.copy(results / "bench_training_cpu.json", results / "bench_training_gpu.json")

    def edit(result):
        result["machine"]["gpu"] = "A GPU"

    change(results / "bench_training_gpu.json", edit)
    for text in (timed.training(ROOT), timed.training_short(ROOT)):
        assert 0 < text.index("GPU: A GPU") < text.index("GPU: none")


def test_reports_of_one_setting_are_one_table(results, monkeypatch):
    """What one report has may be better than what another one has; both have the same baseline."""
    first, second = frontier.SWEEPS[0][:2]
    monkeypatch.setattr(frontier, "SWEEPS", ((first, second),))
    methods = {m["title"]: m for m in frontier.methods_of(frontier.SWEEPS[0])}
    assert "PGD-AT" not in methods["WAT"]["worse_than"]
    better = methods["WAT"]

    def edit(data):
        found = data["sections"][0]["frontier"]["methods"]
        found[:] = [m for m in found if m["baseline"]]
        time, forwards = better["relative_time"] - 0.01, better["relative_forwards"] - 0.01
        found.append({**better, "title": "the other", "relative_time": time, "relative_forwards": forwards})
        elsewhere = {**better, "relative_time": None}
        found.append({**elsewhere, "title": "untimed"})
        found.append({**elsewhere, "title": "fewer", "relative_forwards": forwards})

    change(results / second / "data.json", edit)
    methods = {m["title"]: m for m in frontier.methods_of(frontier.SWEEPS[0])}
    assert (
        len(methods)
        == len(json.loads((results / first / "data.json").read_text())["sections"][0]["frontier"]["methods"]) + 3
    )
    for worse in ("WAT", "untimed"):  # by forwards, where one was not timed
        assert methods[worse]["worse_than"] == ["the other", "fewer"]
    assert not methods["the other"]["worse_than"]
    assert "| **the other** |" in frontier.frontier(ROOT)
    assert "| WAT |" in frontier.frontier(ROOT)

    def other_baseline(data):
        (pgd_at,) = (g for g in data["sections"][0]["groups"] if g["title"] == "PGD-AT")
        pgd_at["accuracy"]["ema"]["autoattack"]["worst"]["values"][1] += 0.06

    change(results / second / "data.json", other_baseline)
    with pytest.raises(ValueError, match="sweep_field_digits: its PGD-AT of seed 1 is not that of sweep_methods"):
        frontier.frontier(ROOT)


def test_a_machine_is_named_once_whatever_cores_a_process_may_take():
    def report(*machines: str) -> dict:
        runs = [{"machine": machine, "versions": {"torch": "2.14.1"}, "commit": "abc"} for machine in machines]
        return {"runs": runs, "made": "2026-11-29T10:00"}

    two = "A CPU, cores: 2, GPU: none; then A CPU, cores: 16, GPU: none"
    told = measured.machines_of(report("A CPU, cores: 2, GPU: none", two), report("A GPU's, GPU: H200"))
    assert told == "A CPU, cores: 2 or 16, GPU: none; A GPU's, GPU: H200; torch 2.14.1; commit abc; 2026-11-29"


def test_a_report_names_runs_that_did_not_finish(results):
    change(results / "sweep_cheaper" / "data.json", lambda data: data["runs"][1].update(state="failed", name="the one"))
    assert "Did not finish: the one." in reports.kept("cheaper")(ROOT)


def test_a_report_by_a_weaker_attack_than_all_its_runs_share_is_refused(results):
    change(results / "sweep_cifar_small" / "data.json", lambda data: data["sections"][0].update(attack="pgd20"))
    with pytest.raises(ValueError, match=r"sweep_cifar_small: its figures are by pgd20, but all .* by autoattack"):
        reports.cifar_small(ROOT)


def test_the_strongest_attack_is_told_first(results):
    lines = [line for line in measured.claims(ROOT).splitlines() if "worst class" in line]
    assert [next(title for title in measured.JUDGES if title in line) for line in lines] == [
        "AutoAttack", "CW-20", "PGD-20",
    ]  # fmt: skip


def test_the_frontier_comes_first_where_a_report_has_one(results):
    folder = results / "sweep_cheaper"
    (folder / "frontier.md").write_text("| the frontier |\n")
    (folder / "frontier_time.png").write_bytes(b"")
    text = reports.report(ROOT, "sweep_cheaper", "")
    table = (folder / "table.md").read_text().strip()
    places = [text.index(part) for part in ("frontier_time.png", "worst_class_time.png", "| the frontier |", table)]
    assert places == sorted(places)


# ---------------------------------------------------------------- the paper's open questions
def a_group(title: str, seeds: list[int], values: list[float], classes: list[float], sure: list[float]) -> dict:
    def of(measure: float) -> dict:
        return {"mean": measure, "values": [measure] * len(seeds)}

    accuracy = {m: {"mean": sum(values) / len(values), "values": values} for m in ("average", "worst", "std")}
    accuracy["per_class"] = [of(v) for v in classes]
    sure = {"overconfident": [of(v) for v in sure]}
    return {
        "title": title, "seeds": seeds, "accuracy": {"ema": {"autoattack": accuracy}}, "confidence": sure,
        "forwards": {"mean": 23.0 if title == "PGD-AT" else 11.5},
    }  # fmt: skip


def test_a_preset_is_the_better_average_of_those_near_the_best_worst_class():
    def a_method(title: str, average: float, worst: float) -> dict:
        return {"title": title, "average": {"mean": average}, "worst": {"mean": worst}}

    far = a_method("far", 0.9, 0.30)
    assert presets.chosen([a_method("best", 0.60, 0.375), a_method("near", 0.65, 0.365), far])["title"] == "near"
    assert presets.chosen([a_method("best", 0.60, 0.375), a_method("less", 0.59, 0.365), far])["title"] == "best"


def test_questions_are_answered_seed_by_seed(tmp_path, monkeypatch):
    base = a_group("PGD-AT", [0, 1, 2], [0.60, 0.62, 0.64], [0.9, 0.2, 0.5], [0.7, 0.0, 0.1])
    ham = a_group(
        "HAM", [2, 1, 0], [0.54, 0.52, 0.50], [0.6, 0.3, 0.4], [0.0, 0.3, 0.1]
    )  # the same 10 points below, in another order
    fair = a_group(questions.COMPARED[1], [0, 1, 2], [0.65, 0.66, 0.67], [0.8, 0.5, 0.5], [0.5, 0.0, 0.1])
    for folder, groups in ((questions.SWEEP, [base, ham]), (questions.LATER, [fair])):
        section = {"dataset": "digits", "eps": 0.2, "classes": ["a", "b", "c"], "groups": groups}
        section["frontier"] = {"attack": "autoattack"}
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "data.json").write_text(json.dumps({"sections": [section]}))
    monkeypatch.setattr(measured, "RESULTS", tmp_path)
    monkeypatch.setattr(measured, "machines_of", lambda *data: "a machine")
    parts, classes = re.findall(r"(?:^\|.*\n?)+", questions.questions(tmp_path), re.MULTILINE)
    assert cells_of(parts)["both: HAM"] == ["−10.0", "−10.0", "−10.0", "0.50"]  # alike: no interval is known
    assert cells_of(classes)["a"] == ["90.0", "−30.0", "−10.0", "70.0", "0.0", "50.0"]
    assert "PGD-AT: rank correlation over classes of over-confidence and robustness +1.00" in questions.questions(
        tmp_path
    )
