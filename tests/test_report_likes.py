"""Only like is compared with like: images by their digests, results by their flags, models that answer one class."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import fake_runs
import pytest
from fake_runs import change_evaluation, fake_run, with_flags, write_json

from ham_kernels import report
from ham_kernels.common.line_sums import first_altered, with_sums
from ham_kernels.common.troubles import HamWarning
from ham_kernels.report.comparing.paired import paired
from ham_kernels.report.comparing.sections import sections
from ham_kernels.report.reading.evaluations import Attack, Interval
from ham_kernels.report.reading.find_runs import read_runs
from ham_kernels.report.reading.flags import contradiction
from ham_kernels.report.reading.json_types import read_as

ACCURACY = {"clean": [0.9, 0.8], "pgd20": [0.5, 0.3]}


@pytest.fixture(autouse=True)
def without_figures(monkeypatch):
    """Most of a report's time is drawing; these tests read its words."""
    from ham_kernels.report.drawing import figure_list

    monkeypatch.setattr(figure_list, "ENTRIES", ())


def built(runs, out):
    """(index.html, sections of data.json, table.md)."""
    report.build(runs, out)
    data = json.loads((out / "data.json").read_text())
    return (out / "index.html").read_text(), data["sections"], (out / "table.md").read_text()


def pair(tmp_path, **options):
    return [fake_run(tmp_path / m, m, accuracy=ACCURACY, **options) for m in ("pgd_at", "ham")]


def give_flags(run, flags, attack="pgd20", **how):
    change_evaluation(run, lambda raw: with_flags(raw["attacks"][attack], flags, **how))


# ---------------------------------------------------------------- images
def test_other_images_under_the_same_name_are_another_section(tmp_path):
    runs = pair(tmp_path)
    runs.append(fake_run(tmp_path / "seed1", "ham", 1, accuracy=ACCURACY))
    for run, digest, train in zip(runs, "aba", (40, 50, 40), strict=True):
        write_json(run / "data.json", {"sha256": digest, "counts": {"train": train, "test": 9}})
    found = sections(read_runs(runs))
    assert [[run.name for g in s.groups for run in g.runs] for s in found] == [["pgd_at", "seed1"], ["ham"]]
    numbers = "other numbers of images (train 50, test 9 against train 40, test 9)"
    assert found[1].notes[-1] == f"Not compared with “{found[0].title}”: {numbers}."
    write_json(runs[1] / "data.json", {"sha256": "b", "counts": {"train": 40, "test": 9}})
    assert "as their digests tell" in sections(read_runs(runs))[0].notes[-1]


def test_the_same_images_under_other_names_are_one_section(tmp_path):
    runs = [
        fake_run(tmp_path / name, m, accuracy=ACCURACY, settings={"data.path": f"{name}/{name}"})
        for name, m in (("one", "pgd_at"), ("two", "ham"))
    ]
    for run in runs:
        write_json(run / "data.json", {"sha256": "a"})
    (section,) = sections(read_runs(runs))
    assert section.notes == ["The same images under several names: one, two."]


def test_file_names_may_agree_where_the_images_judged_do_not(tmp_path):
    runs = pair(tmp_path)
    for run, images in zip(runs, "ab", strict=True):
        give_flags(run, ["1100", "1000"], images=images)
    assert len(sections(read_runs(runs))) == 2
    give_flags(runs[1], ["1100", "1000"], images="a")
    assert len(sections(read_runs(runs))) == 1


def test_runs_without_a_digest_fall_back_on_the_name(tmp_path):
    runs = pair(tmp_path)
    (runs[1] / "data.json").unlink()
    (section,) = sections(read_runs(runs))
    assert section.notes[0].startswith("No digest of the images is kept by ham: ")
    for run, test in zip(runs, (40, 50), strict=True):
        write_json(run / "data.json", {"counts": {"train": 9, "test": test}})
    assert len(sections(read_runs(runs))) == 2


def test_other_precision_is_not_ranked(tmp_path):
    runs = [
        fake_run(tmp_path / m, m, accuracy={"pgd20": of}) for m, of in (("pgd_at", [0.5, 0.4]), ("ham", [0.8, 0.7]))
    ]
    assert "**70.0**" in built(runs, tmp_path / "a")[2]
    change_evaluation(runs[1], lambda raw: raw.update(precision="bf16"))
    _, (section,), text = built(runs, tmp_path / "b")
    assert "**70.0**" not in text
    measured = [c["measured"] for c in section["claims"] if c["claim"].startswith("worst")]
    assert measured
    assert all(words.startswith("not judged: judged unlike in precision (bf16 and fp32)") for words in measured)


# ---------------------------------------------------------------- flags
def altered(name):
    def change(raw):
        attack = raw["attacks"]["pgd20"]
        if name == "flag":
            attack["correct"] = "0" + attack["correct"][1:]
        elif name == "cut":
            attack["correct"] = attack["correct"][:-1]
        elif name == "labels":
            attack["labels"] = attack["labels"].replace("0", "1", 1)
        elif name == "no class":
            attack["labels"] = attack["labels"].replace("0", "7", 1)
        elif name == "per_class":
            attack["per_class"][1]["value"] += 0.1
        else:
            attack[name]["value"] += 0.01

    return change


@pytest.mark.parametrize("what", ["flag", "cut", "labels", "no class", "accuracy", "per_class", "worst_class", "std"])
def test_results_that_do_not_follow_from_their_flags_are_refused(tmp_path, what):
    runs = pair(tmp_path)
    give_flags(runs[1], ["1110", "1000"])
    built(runs, tmp_path / "whole")
    change_evaluation(runs[1], altered(what))
    with pytest.warns(HamWarning, match=r"^runs: .*ham/evaluation/ema\.json: .* under pgd20 .*ham evaluate"):
        page, (section,), _ = built(runs, tmp_path / "out")
    assert "evaluation/ema.json: what it states under pgd20 does not follow from its flags" in page
    assert list(section["groups"][1]["accuracy"]["ema"]) == ["clean"]


@pytest.mark.parametrize(
    ("answers", "why"),
    [
        ("0 1 1 0", None),
        ("0 1 1", "its answers are not one of 2 classes for each of 4 flags"),
        ("0 2 1 0", "its answers are not one of 2 classes for each of 4 flags"),
        ("0 0 1 0", "its answers are not the labels where its flags are 1, and others where they are 0"),
        ("1 1 1 0", "its answers are not the labels where its flags are 1, and others where they are 0"),
    ],
)
def test_answers_follow_from_flags_and_labels(answers, why):
    assert contradiction(replace(judged(["10", "10"]), answers=answers)) == why


def test_measures_over_classes_follow_from_the_accuracies_where_a_file_lacks_them():
    found = judged(["1110", "1000", ""])
    assert (found.worst3, found.range, found.gini) == (Interval(0.5), Interval(0.5), Interval(0.25))
    assert judged(["0", "0"]).gini == Interval()
    assert contradiction(replace(found, range=Interval(0.4))) == "range is 50.00 %, not 40.00 %"


# ---------------------------------------------------------------- log
LINES = ['{"epoch": 1, "seconds": 1.5}', '{"epoch": 2, "seconds": 2.5}', '{"epoch": 3, "seconds": 3.5}']


@pytest.mark.parametrize("what", ["whole", "number", "gone", "swapped", "no sum", "old"])
def test_sums_tell_the_first_altered_line(what):
    lines = list(with_sums(LINES))
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3]
    expected = {"whole": None, "number": 2, "gone": 1, "swapped": 2, "no sum": 3, "old": None}[what]
    if what == "number":
        lines[1] = lines[1].replace("2.5", "0.5")
    elif what == "gone":
        del lines[0]
    elif what == "swapped":
        lines[1:] = lines[:0:-1]
    elif what == "no sum":
        lines[2] = LINES[2]
    elif what == "old":
        lines = LINES
    assert first_altered([line.encode() for line in lines]) == expected


def test_an_altered_log_gives_no_time(tmp_path):
    runs = pair(tmp_path)
    path = runs[1] / "metrics.jsonl"
    path.write_text("\n".join(with_sums(path.read_text().splitlines())))
    assert report.read_run(runs[1]).seconds == 5.0
    path.write_text(path.read_text().replace('"seconds": 1.0', '"seconds": 0.1'))
    with pytest.warns(HamWarning, match=r"metrics\.jsonl line 2 is not as written"):
        page, (section,), _ = built(runs, tmp_path / "out")
    assert "metrics.jsonl line 2 is not as written" in page
    assert section["groups"][1]["time"]["mean"] is None


def test_a_log_that_was_cut_is_told(tmp_path):
    run = fake_run(tmp_path / "run")
    path = run / "metrics.jsonl"
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines()[:-1]))
    with pytest.warns(HamWarning, match="ends at epoch 3, while status.json says that 4 are done"):
        assert report.read_run(run).seconds is None


# ---------------------------------------------------------------- models
@pytest.mark.parametrize("which", ["pgd_at", "ham"])
def test_a_model_that_answers_one_class_is_neither_ranked_nor_judged(tmp_path, which):
    one = {"clean": [0.02, 0.9], "pgd20": [0.0, 0.9]}
    runs = [fake_run(tmp_path / m, m, accuracy=one if m == which else ACCURACY) for m in ("pgd_at", "ham")]
    page, (section,), text = built(runs, tmp_path / "out")
    assert f"{which}, weight average: answers “1” for nearly all images" in page
    assert "(answers one class)" in text
    assert "**" not in text  # one method left
    assert [(c["claim"], c["holds"]) for c in section["claims"]] == [("all", None)]
    assert "answers one class" in section["claims"][0]["measured"]


def test_missing_gradients_stand_beside_the_attack(tmp_path):
    runs = pair(tmp_path)
    change_evaluation(runs[0], lambda raw: raw["attacks"]["pgd20"].update(no_gradient=0))
    change_evaluation(runs[1], lambda raw: raw["attacks"]["pgd20"].update(no_gradient=17))
    page, _, text = built(runs, tmp_path / "out")
    assert page.count("PGD-20: gradient missing for 17 of 200 images") == 1
    assert "gradient missing: HAM under PGD-20 for 17 images." in text


# ---------------------------------------------------------------- claims
def test_images_are_counted_in_the_smallest_class(tmp_path):
    for few, holds in ((31, None), (32, True)):
        runs = pair(tmp_path / str(few))
        give_flags(runs[0], ["1" * 400, "0" * few])
        give_flags(runs[1], ["1" * 400, "1" * few])
        _, (section,), _ = built(runs, tmp_path / f"out{few}")
        (found,) = (c for c in section["claims"] if c["claim"].startswith("worst"))
        assert found["holds"] is holds
        assert ("not judged: 31 images in the smallest class" in found["measured"]) == (holds is None)


def test_class_counts_of_the_run_tell_the_smallest_class(tmp_path):
    runs = pair(tmp_path)
    for run in runs:  # as `run_images.facts_of` writes them
        write_json(run / "data.json", {"sha256": "a", "class_counts": {"train": [300, 30, 5], "test": [190, 10, 0]}})
    _, (section,), _ = built(runs, tmp_path / "out")
    assert any("The smallest class judged has 10 images" in note for note in section["notes"])
    assert {g["accuracy"]["ema"]["pgd20"]["smallest_class"] for g in section["groups"]} == {10}


def judged(flags, images="the same"):
    raw = fake_runs.attack([0.0] * len(flags))
    with_flags(raw, flags, images)
    return read_as(Attack, raw)


def test_pairs_know_more_than_both_sides(seed):
    """Two models that differ at 4 of 200 images, of which each gets half right."""
    draw = random.Random(seed)
    theirs = [draw.choices("01", k=200) for _ in range(2)]
    ours = [list(flags) for flags in theirs]
    for at in draw.sample([i for i in range(200) if theirs[0][i] == "0"], 4):
        ours[0][at] = "1"
    flags = [["".join(of_class) for of_class in model] for model in (ours, theirs)]
    found = paired(judged(flags[0]), judged(flags[1]))
    low, high = found["per_class"][0]
    assert 0 <= low < 0.02 < high < 0.05  # apart: 0.02 -+ 0.1
    assert found["per_class"][1] == (0, 0)
    assert paired(judged(flags[0]), judged(flags[1], "others")) is None


def test_one_seed_is_judged_in_pairs(tmp_path):
    runs = pair(tmp_path)
    give_flags(runs[0], ["1" * 200, "0" * 180 + "1" * 20])
    for gained, holds in ((8, None), (60, True)):
        give_flags(runs[1], ["1" * 200, "0" * (180 - gained) + "1" * (20 + gained)])
        _, (section,), _ = built(runs, tmp_path / str(gained))
        (found,) = (c for c in section["claims"] if c["claim"].startswith("worst"))
        assert found["holds"] is holds
        assert ("undecided: 95 % interval over images, in pairs, +" in found["measured"]) == (holds is None)


@pytest.mark.parametrize(("cpu", "words"), [(1.0, "; undecided: the machine was busy"), (3.9, " (CPU time −50 %)")])
def test_cpu_time_stands_beside_wall_time(tmp_path, cpu, words):
    """Two threads."""
    settings = {"run.device": "cpu"}
    runs = [
        fake_run(tmp_path / m, m, accuracy=ACCURACY, seconds=[2.0 * s] * 4, settings=settings)
        for m, s in (("pgd_at", 1.0), ("ham", 0.5))
    ]
    for run, scale in zip(runs, (1.0, 0.5), strict=True):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        (run / "metrics.jsonl").write_text("".join(json.dumps(e | {"cpu_seconds": cpu * scale}) + "\n" for e in lines))
    _, (section,), _ = built(runs, tmp_path / "out")
    found = section["claims"][0]
    assert words in found["measured"]
    assert found["holds"] is (None if "busy" in words else True)
    assert found["measured"].endswith("; one run each: other work on the machine would change it")
