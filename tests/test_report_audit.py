"""Requirements as a pass or a fail, measures over the classes, the attack asked for, and the columns of a paper."""

from __future__ import annotations

import csv
import json

import pytest
from fake_runs import change_evaluation, fake_run, with_flags

from ham_kernels import report
from ham_kernels.commands.cli import main

FOUR = [0.9, 0.5, 0.3, 0.1]  # average 0.45, worst three 0.3, range 0.8


@pytest.fixture(autouse=True)
def without_figures(monkeypatch):
    from ham_kernels.report.drawing import figure_list

    monkeypatch.setattr(figure_list, "ENTRIES", ())


def one(tmp_path, name="p", per_class=FOUR, seed=0, **options):
    names = ["airplane", "bird", "cat", "dog"]
    accuracy = {"clean": [1.0, 0.9, 0.9, 0.8], "pgd20": per_class}
    return fake_run(tmp_path / name, "pgd_at", seed, accuracy=accuracy, classes=names, **options)


def held(runs, out, *required, **options):
    report.build(runs, out, require=required, **options)
    (section,) = json.loads((out / "data.json").read_text())["sections"]
    return section["audit"]


@pytest.mark.parametrize(
    ("requirement", "value", "passes"),
    [
        ("worst_class>=10", 10.0, True),
        ("worst_class >= 10.5 %", 10.0, False),
        ("accuracy>=45", 45.0, True),
        ("worst3>=30", 30.0, True),
        ("worst_class>=0.5 %", 10.0, True),
        ("worst_class>=0", 10.0, True),
        ("range<=79", 80.0, False),
        ("gini<=0.37", 0.361, True),
        ("nstd<=0.6", 0.657, False),
        ("clean.worst_class>=80", 80.0, True),
        ("class cat>=31", 30.0, False),
        ("pgd20.class airplane>=50", 90.0, True),
    ],
)
def test_a_requirement_passes_or_fails(tmp_path, requirement, value, passes):
    (entry,) = held([one(tmp_path)], tmp_path / "out", requirement)
    assert entry["value"] == pytest.approx(value, abs=1e-3)
    assert entry["passes"] is passes


def test_what_was_measured_has_its_interval_and_what_it_leaves_open(tmp_path):
    close, far = held([one(tmp_path)], tmp_path / "out", "worst_class>=8", "worst_class>=40")
    assert close["measured"] == "10.0 % (95 % interval 6.0 to 14.0) under PGD-20; the interval leaves it open"
    assert close["passes"]
    assert far["measured"] == "10.0 % (95 % interval 6.0 to 14.0) under PGD-20"
    assert not far["passes"]


def test_several_seeds_are_judged_by_their_mean_and_its_interval(tmp_path):
    runs = [one(tmp_path, str(seed), [0.9, 0.5, 0.3, 0.1 + 0.02 * seed], seed) for seed in range(3)]
    (entry,) = held(runs, tmp_path / "out", "worst_class>=12")
    assert entry["passes"]
    assert entry["value"] == pytest.approx(12.0)
    half = 4.30265 * 2.0 / 3**0.5  # Student's t of two degrees of freedom
    assert (entry["low"], entry["high"]) == pytest.approx((12 - half, 12 + half), abs=1e-3)


@pytest.mark.parametrize("share", [0.29, 0.57, 0.58])
def test_a_value_at_the_bound_meets_it(tmp_path, share):
    """In binary 100 * 0.29 is a little less than 29."""
    (entry,) = held([one(tmp_path, per_class=[share] * 4)], tmp_path / "out", f"worst_class>={100 * share:.0f}")
    assert entry["passes"]


def test_seeds_that_are_alike_are_no_certainty(tmp_path):
    runs = [one(tmp_path, str(seed), seed=seed) for seed in (0, 1)]
    (entry,) = held(runs, tmp_path / "out", "worst_class>=5")
    assert entry["measured"].endswith("; all seeds alike, which says nothing of others")
    far = [one(tmp_path, f"far{seed}", [0.9, 0.5, 0.3, 0.5 * seed], seed) for seed in (0, 1)]
    (entry,) = held(far, tmp_path / "far", "class dog>=5")
    assert (entry["low"], entry["high"]) == (0.0, 100.0)


def test_the_mean_of_the_worst_three_has_its_interval(tmp_path):
    run = one(tmp_path)
    change_evaluation(run, lambda raw: raw["attacks"]["pgd20"].update(worst3={"value": 0.3, "low": 0.2, "high": 0.4}))
    (entry,) = held([run], tmp_path / "out", "worst3>=25")
    assert (entry["low"], entry["high"]) == pytest.approx((20.0, 40.0))


def test_a_class_of_one_data_set_is_asked_of_that(tmp_path):
    other = fake_run(tmp_path / "o", "pgd_at", accuracy={"pgd20": FOUR}, settings={"data.dataset": "svhn"})
    report.build([one(tmp_path), other], tmp_path / "out", require=["class cat>=10"], columns=["clean.avg", "worst"])
    sections = json.loads((tmp_path / "out" / "data.json").read_text())["sections"]
    assert [len(section["audit"]) for section in sections] == [1, 0]
    assert "| PGD-AT | – | 10.0 |" in (tmp_path / "out" / "table.md").read_text()


def test_what_was_not_measured_fails(tmp_path):
    (entry,) = held([one(tmp_path)], tmp_path / "out", "autoattack.accuracy>=2")
    assert not entry["passes"]
    assert entry["measured"] == "not judged by AutoAttack"
    begun = one(tmp_path, "begun", state="stopped")
    (entry,) = held([begun], tmp_path / "begun-out", "accuracy>=2")
    assert not entry["passes"]


@pytest.mark.parametrize(
    ("required", "words"),
    [
        ("worst_class=20", "worst_class>=20"),
        ("worst_class>=twenty", "a number"),
        ("gini<=20%", "gini is a ratio, not in percent"),
        ("gini<=20", "gini is from 0 to 1"),
        ("clean.accuracy>=0.5", "accuracy is in percent; did you mean 50?"),
        ("worst_class>=1", "worst_class is in percent; did you mean 100?"),
        ("class cat>=.25", "class cat is in percent; did you mean 25?"),
        ("accuracy>=101", "accuracy is from 0 to 100"),
        ("median>=20", "'median>=20' has no measure that is known"),
        ("class horse>=20", "names no class of these: airplane, bird, cat, dog"),
    ],
)
def test_a_requirement_that_cannot_be_read_leaves_no_report(tmp_path, required, words):
    with pytest.raises(ValueError, match="require: ") as error:
        report.build([one(tmp_path)], tmp_path / "out", require=[required])
    assert words in str(error.value)
    assert not (tmp_path / "out").exists()


def test_the_command_ends_with_1_where_a_requirement_fails(tmp_path, capsys):
    command = ["report", str(one(tmp_path)), "--out", str(tmp_path / "out"), "--audit", "--no-pdf"]
    assert main([*command, "--require", "worst_class>=5"]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("pass  PGD-AT: worst_class>=5, 10.0 % (95 % interval")
    assert main([*command, "--require", "worst_class>=5", "clean.accuracy>=99"]) == 1
    assert "FAIL  PGD-AT: clean.accuracy>=99, 90.0 %" in capsys.readouterr().out


def test_an_audit_tells_of_no_paper(tmp_path):
    runs = [one(tmp_path), fake_run(tmp_path / "h", "ham", accuracy={"clean": FOUR, "pgd20": FOUR},
                                    classes=["airplane", "bird", "cat", "dog"])]  # fmt: skip
    report.build(runs, tmp_path / "usual")
    assert "The paper's claims" in (tmp_path / "usual" / "index.html").read_text()
    report.build(runs, tmp_path / "audit", audit=True)
    page = (tmp_path / "audit" / "index.html").read_text()
    assert "arxiv" not in page
    assert "The paper's claims" not in page
    assert not (tmp_path / "audit" / "frontier.html").exists()
    assert "--audit" in page  # the command that makes it again


# ---------------------------------------------------------------- the attack, the columns
def test_the_attack_that_is_asked_for_is_the_headline(tmp_path):
    runs = [one(tmp_path), one(tmp_path, "other", seed=1)]
    for run in runs:
        change_evaluation(run, lambda raw: raw["attacks"].update(cw20=raw["attacks"]["pgd20"]))
    report.build(runs, tmp_path / "out", attack="pgd20")
    page = (tmp_path / "out" / "index.html").read_text()
    assert "“Robust” means PGD-20, as asked for." in page
    assert "--attack pgd20" in page
    with pytest.raises(ValueError, match="attack: got 'cw99'; these runs were judged by cw20, pgd20"):
        report.build(runs, tmp_path / "out", attack="cw99")


def test_the_columns_of_the_paper_are_those_asked_for(tmp_path):
    runs = [one(tmp_path)]
    report.build(runs, tmp_path / "out", columns=["clean.worst", "gini", "worst3", "time"])
    accuracy, cost = (tmp_path / "out" / "table.md").read_text().split("\n\n")[1::2]
    assert accuracy.splitlines()[0] == "| Method | Clean worst | PGD-20 Gini | PGD-20 worst 3 |"
    assert accuracy.splitlines()[2] == "| PGD-AT | 80.0 | 0.361 | 30.0 |"
    assert cost.splitlines()[0] == "| Method | Training time, s |"
    for wrong, words in (
        ("avg.clean", "they are avg"),
        ("cw20.avg", "these runs were judged by"),
        ("speed", "they are"),
    ):
        with pytest.raises(ValueError, match=f"columns: got '{wrong}'; {words}"):
            report.build(runs, tmp_path / "wrong", columns=[wrong])
    assert not (tmp_path / "wrong").exists()


# ---------------------------------------------------------------- class by class
def test_every_class_stands_with_its_images_and_exact_interval(tmp_path):
    run = one(tmp_path, per_class=[0.5, 0.5, 0.5, 0.5])
    flags = ["1" * 9 + "0", "10" * 5, "0001", "00"]
    change_evaluation(run, lambda raw: with_flags(raw["attacks"]["pgd20"], flags))
    report.build([run], tmp_path / "out")
    with (tmp_path / "out" / "classes.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["attack"] == "pgd20"]
    assert [(row["class"], row["images"], row["correct"]) for row in rows] == [
        ("airplane", "10", "9"), ("bird", "10", "5"), ("cat", "4", "1"), ("dog", "2", "0"),
    ]  # fmt: skip
    assert {row["method"] for row in rows} == {"PGD-AT"}
    assert float(rows[0]["low"]) == pytest.approx(0.86)  # as the evaluation tells it
    page = (tmp_path / "out" / "index.html").read_text()
    assert "Class by class" in page
    assert "90.0" in page


def test_a_report_goes_neither_into_a_run_nor_below_a_file_nor_over_other_kinds(tmp_path):
    run = one(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "figures").write_text("")
    (tmp_path / "b" / "table.md").mkdir(parents=True)
    for out, words in (
        (run / "evaluation", "is a part of a run folder"),
        (tmp_path / "file" / "x", "is a file"),
        (tmp_path / "a", "figures is in the way"),
        (tmp_path / "b", "table.md is in the way"),
    ):
        with pytest.raises(ValueError, match=f"out: .*{words}"):
            report.build([run], out)
