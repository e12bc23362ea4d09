"""The strongest attack that all compared runs have: what every headline figure is by."""

from __future__ import annotations

import json

import pytest
from fake_runs import change_evaluation, fake_run

from ham_kernels import report
from ham_kernels.report.strength import of_each_family, strongest

ALL = {name: [0.6, 0.3] for name in ("clean", "fgsm", "pgd20", "cw20", "autoattack")}


@pytest.fixture(autouse=True)
def without_figures(monkeypatch):
    from ham_kernels.report.drawing import figure_list

    monkeypatch.setattr(figure_list, "ENTRIES", ())


@pytest.mark.parametrize(
    ("judged", "found"),
    [
        ([["clean", "fgsm", "pgd20", "apgd", "cw20", "autoattack"]], "autoattack"),
        ([["clean", "fgsm", "pgd20", "apgd", "cw20"]], "apgd"),
        ([["pgd100", "apgd"]], "apgd"),
        ([["apgd", "odi10", "odi2"]], "odi10"),
        ([["apgd", "odi2"]], "apgd"),
        ([["pgd20", "odi5"]], "pgd20"),
        ([["autoattack", "odi20"]], "autoattack"),
        ([["pgd7", "pgd20", "pgd100", "fgsm"]], "pgd100"),
        ([["pgd20", "pgd20-r5", "pgd20-r10"]], "pgd20-r10"),
        ([["clean", "fgsm", "spatial"]], "fgsm"),
        ([["pgd20", "cw20", "autoattack"], ["pgd20", "cw20"], ["pgd20", "cw20", "cw50"]], "cw20"),
        ([["pgd20", "autoattack"], ["pgd20", "cw20"], ["cw20"]], "cw20"),  # none that all have: that of most
        ([["clean"], ["clean"]], None),
        ([], None),
    ],
)
def test_the_strongest_that_all_have(judged, found):
    assert strongest(judged) == found
    assert strongest([list(reversed(names)) for names in reversed(judged)]) == found


def test_one_of_each_family_is_shown():
    judged = [["clean", "fgsm", "pgd20", "cw20", "autoattack"], ["pgd20", "pgd50", "cw20"]]
    assert of_each_family(judged) == ["autoattack", "cw20", "pgd20"]
    assert of_each_family(judged, "fgsm", None, "apgd") == ["autoattack", "cw20", "pgd20", "fgsm"]


def attack_of(runs, out):
    report.build(runs, out)
    (section,) = json.loads((out / "data.json").read_text())["sections"]
    return section["attack"], "strongest" in section["attack_why"]


def test_every_seed_counts(tmp_path):
    """AutoAttack of one seed alone stands for no comparison, neither does one of a run that is not finished."""
    without = {name: values for name, values in ALL.items() if name != "autoattack"}
    runs = [fake_run(tmp_path / f"p{seed}", "pgd_at", seed, accuracy=ALL) for seed in (0, 1)]
    runs += [fake_run(tmp_path / "h0", "ham", 0, accuracy=ALL)]
    assert attack_of(runs, tmp_path / "all") == ("autoattack", True)
    begun = fake_run(tmp_path / "begun", "trades", accuracy=without, state="stopped")
    assert attack_of([*runs, begun], tmp_path / "begun-too") == ("autoattack", True)
    runs += [fake_run(tmp_path / "h1", "ham", 1, accuracy=without)]
    assert attack_of(runs, tmp_path / "less") == ("cw20", True)


def test_an_attack_on_other_images_of_some_runs_is_passed_over(tmp_path):
    runs = [fake_run(tmp_path / m, m, accuracy=ALL) for m in ("pgd_at", "ham")]
    change_evaluation(runs[1], lambda raw: raw["attacks"]["autoattack"].update(n=40))
    assert attack_of(runs, tmp_path / "apart") == ("cw20", True)
    change_evaluation(runs[0], lambda raw: raw["attacks"]["autoattack"].update(n=40))
    assert attack_of(runs, tmp_path / "alike") == ("autoattack", True)


def test_pgd_at_with_a_switch_is_no_baseline(tmp_path):
    runs = [fake_run(tmp_path / "ham", "ham", accuracy=ALL)]
    for name, value in (("step_sizes", [1.0, 0.5]), ("early_drop", True), ("freeze_bn", True)):
        changed = {"method.reweight": None, "method.early_drop": None, f"method.{name}": value}
        runs.append(fake_run(tmp_path / name, "pgd_at", accuracy=ALL, settings=changed))
    report.build(runs, tmp_path / "out")
    (section,) = json.loads((tmp_path / "out" / "data.json").read_text())["sections"]
    assert section["baseline"] is None
