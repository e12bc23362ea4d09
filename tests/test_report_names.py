"""Names in figures and tables: no two alike, letters that fonts have, every method in every legend."""

from __future__ import annotations

import json
import random
import warnings

import fake_runs
import matplotlib.figure
import pytest
from fake_runs import fake_run

from ham_kernels import report
from ham_kernels.commands.evaluation_text import verdict
from ham_kernels.report.drawing import by_class, names
from ham_kernels.report.text_format import distinct, shortened

CORN = ["Corn_(maize)___Cercospora_leaf_spot", "Corn_(maize)___Common_rust", "Corn_(maize)___healthy"]


@pytest.mark.parametrize(
    ("whole", "expected"),
    [
        (CORN, ["Corn_(m…eaf_spot", "Corn_(m…mon_rust", "Corn_(m…_healthy"]),
        (["short", "also short"], ["short", "also short"]),
        ([f"{'x' * 30}{i}{'y' * 30}" for i in range(2)], ["…xxxx0yyyyyyyyy…", "…xxxx1yyyyyyyyy…"]),
        (["a  b", "a b"], ["…a b #1", "…a b #2"]),  # as they are shown
    ],
)
def test_names_cut_differ(whole, expected):
    assert distinct(whole, 16) == expected


def test_any_names_cut_differ(seed):
    draw = random.Random(seed)
    for _ in range(300):
        whole = {"".join(draw.choices("ab ", k=draw.randint(1, 60))) for _ in range(draw.randint(2, 9))}
        found = distinct(sorted(whole), 16)
        assert len(set(found)) == len(found)
        assert max(map(len, found)) <= 16
        assert all(len(shortened(name, 16)) <= 16 for name in whole)


def test_the_worst_class_is_told_by_name():
    config = json.loads(json.dumps(fake_runs.CONFIG))
    raw = fake_runs.evaluation("ema", {"clean": [0.9, 0.8, 0.7], "pgd20": [0.2, 0.5, 0.1]}, config, CORN, 1, None)
    raw["attacks"]["pgd20"]["no_gradient"] = 3
    text = verdict(raw, "run")
    assert "class Corn_(maize)___healthy: 10.0" in text
    assert "PGD-20: gradient missing for 3 of 300 images" in text
    assert "nearly all" not in text
    raw["attacks"]["clean"] = fake_runs.attack([0.0, 0.95, 0.02])
    assert "Corn_(maize)___Common_rust is its answer for nearly all images" in verdict(raw, "run")


@pytest.mark.slow
def test_every_method_is_in_every_legend_and_no_letter_is_a_box(tmp_path, monkeypatch):
    legends, plain = [], matplotlib.figure.Figure.legend

    def noted(self, *args, **kwargs):
        made = plain(self, *args, **kwargs)
        legends.append([text.get_text() for text in made.get_texts()])
        return made

    monkeypatch.setattr(matplotlib.figure.Figure, "legend", noted)
    monkeypatch.setattr(names, "_family", lambda letter: None)  # whatever fonts are here
    parts = {"confidence": fake_runs.confidence([0.2, 0.4], [[1, 1], [0, 2]]), "easy": fake_runs.easy([0.5])}
    runs = [
        fake_run(tmp_path / m, m, accuracy={"pgd20": [0.5, 0.3]}, classes=["猫", "dog"], parts=parts,
                 settings={"run.label": label})
        for m, label in (("pgd_at", "_baseline"), ("ham", "方法"))
    ]  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = report.build(runs, tmp_path / "out").read_text()
    assert len(legends) == 9
    assert all(entries[:2] == ["_baseline", "#2"] for entries in legends)
    assert page.count("Methods (no font here has all letters): #2 方法. Classes (no font here has all letters): #1 猫.")


def test_letters_come_from_a_font_that_has_them():
    letter = "ᶁ"  # not in DejaVu Sans, but in STIXGeneral, which matplotlib brings as well
    family = names._family(letter)
    assert family is not None
    assert names.families(["plain", letter]) == [names.FONT, family]
    assert names.families(["plain"]) == [names.FONT]
    assert names.classes({"classes": [letter, "b"]}) == [letter, "b"]


@pytest.mark.parametrize("methods", [1, 7])  # lines, and a heat map
def test_ticks_of_many_classes_are_thinned(methods):
    classes = [f"a class with a long name, number {i}" for i in range(100)]
    spreads = [{"mean": i / 100, "std": None, "low": None, "high": None, "n": 1} for i in range(100)]
    accuracy = {"ema": {"pgd20": {"per_class": spreads, "worst": {"mean": 0.0}}}}
    groups = [{"title": f"m{i}", "baseline": False, "weights": "ema", "accuracy": accuracy} for i in range(methods)]
    section = {"classes": classes, "attack": "pgd20", "groups": groups}
    figure = by_class.class_bars(section, {f"m{i}": i for i in range(methods)})
    ticks = [tick.get_text() for tick in figure.axes[0].get_xticklabels()]
    assert len(ticks) == len(set(ticks)) == 20
    assert all(tick.endswith(str(5 * i)) for i, tick in enumerate(ticks))
