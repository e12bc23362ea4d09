"""How models fail: which class is taken for which, under which budgets, on which images."""

from __future__ import annotations

import json

import numpy as np
import pytest
from fake_runs import change_evaluation, fake_run, with_flags, write_json

from ham_kernels import report
from ham_kernels.report.drawing import failures


def answered(run, answers, attack="pgd20"):
    """Gives an attack answers, one text of class numbers for each class's images, and what follows from them."""

    def change(raw):
        flags = ["".join("01"[answer == str(c)] for answer in of) for c, of in enumerate(answers)]
        with_flags(raw["attacks"][attack], flags)
        raw["attacks"][attack]["answers"] = " ".join("".join(answers))

    change_evaluation(run, change)


def at_eps(run, eps, per_class, attacks=("pgd20",), **changed):
    raw = json.loads((run / "evaluation" / "ema.json").read_text())
    found = fake_run(run.parent / f"of-{run.name}-{eps}", accuracy=dict.fromkeys(attacks, per_class))
    other = json.loads((found / "evaluation" / "ema.json").read_text())
    raw |= {"eps": eps, "step_size": eps / 4, "attacks": other["attacks"], **changed}
    write_json(run / "evaluation" / f"ema.test-eps{eps:g}-step{eps / 4:g}-fp32-seed0.json", raw)


def built(runs, out):
    report.build(runs, out)
    data = json.loads((out / "data.json").read_text())
    (section,) = data["sections"]
    return data, section, (out / "index.html").read_text()


def test_confusions_are_shares_of_the_class_over_all_seeds(tmp_path):
    runs = [fake_run(tmp_path / str(s), "pgd_at", s, accuracy={"pgd20": [0.5, 0.5, 0.5]}) for s in (0, 1)]
    answered(runs[0], ["0011", "1111", "2220"])
    answered(runs[1], ["0001", "1110", "0000"])
    data, section, page = built(runs, tmp_path / "out")
    found = section["groups"][0]["confusion"]
    assert found["attack"] == "pgd20"
    assert found["shares"][0] == pytest.approx([5 / 8, 3 / 8, 0])
    assert found["shares"][2] == pytest.approx([5 / 8, 0, 3 / 8])
    assert [(p["label"], p["answer"], p["images"]) for p in found["pairs"]] == [(2, 0, 5), (0, 1, 3), (1, 0, 1)]
    assert "figures/confusion.png" in data["figures"]
    assert "Most often: PGD-AT takes 2 for 0 in 62.5 %." in page


def test_of_methods_without_a_worst_class_the_best_averages_are_drawn():
    def group(title, average, baseline=False):
        accuracy = {"ema": {"pgd20": {"worst": {"mean": 0.0}, "average": {"mean": average}}}}
        told = {"title": title, "baseline": baseline, "accuracy": accuracy, "weights": "ema"}
        return told | {"confusion": {"shares": [[1.0]]}}

    groups = [group("low", 0.01), group("base", 0.02, True), group("best", 0.34), group("mid", 0.1)]
    section = {"groups": groups, "attack": "pgd20", "weights": "ema"}
    assert [g["title"] for g in failures.worth_showing(section, "confusion", 3)] == ["base", "best", "mid"]


def test_confusions_are_by_the_strongest_attack_that_keeps_answers(tmp_path):
    run = fake_run(tmp_path / "p", "pgd_at", accuracy={"pgd20": [0.5, 0.5], "autoattack": [0.4, 0.5]})
    answered(run, ["0011", "1111"])
    _, section, page = built([run], tmp_path / "out")
    assert section["attack"] == "autoattack"
    assert section["groups"][0]["confusion"]["attack"] == "pgd20"
    assert "taken for another under PGD-20" in page


def test_answers_that_contradict_the_flags_are_not_used(tmp_path):
    run = fake_run(tmp_path / "p", "pgd_at", accuracy={"pgd20": [0.5, 0.5]})
    answered(run, ["0011", "1111"])
    change_evaluation(run, lambda raw: raw["attacks"]["pgd20"].update(answers="0 0 0 1 1 1 1 1"))
    with pytest.warns(UserWarning, match="answers"):
        _, section, _ = built([run], tmp_path / "out")
    assert section["groups"][0]["confusion"] is None


# ---------------------------------------------------------------- budgets
def test_accuracy_over_eps_begins_with_clean_images(tmp_path):
    run = fake_run(tmp_path / "p", "pgd_at", accuracy={"clean": [1.0, 0.8], "pgd20": [0.6, 0.2]})
    at_eps(run, 0.1, [0.8, 0.6])
    at_eps(run, 0.4, [0.2, 0.0])
    data, section, page = built([run], tmp_path / "out")
    found = section["groups"][0]["over_eps"]
    assert found["eps"] == [0.0, 0.1, 0.2, 0.4]
    assert [s["mean"] for s in found["average"]] == pytest.approx([0.9, 0.7, 0.4, 0.1])
    assert [s["mean"] for s in found["worst"]] == pytest.approx([0.8, 0.6, 0.2, 0.0])
    assert "figures/over_eps.png" in data["figures"]
    assert data["runs"][0]["left_out"] == {}
    assert f"ham evaluate {run} --weights ema --attacks pgd20 --eps-curve 0.1 0.4" in page


@pytest.mark.parametrize(
    "changed",
    [{"part": "train"}, {"precision": "bf16"}, {"checkpoint_sha256": "0" * 64}, {"step_size": 1e-4}],
)
def test_other_images_precision_weights_or_steps_are_no_point_of_the_curve(tmp_path, changed):
    run = fake_run(tmp_path / "p", "pgd_at", accuracy={"clean": [1.0, 0.8], "pgd20": [0.6, 0.2]})
    at_eps(run, 0.1, [0.8, 0.6], **changed)
    _, section, _ = built([run], tmp_path / "out")
    assert section["groups"][0]["over_eps"] is None


@pytest.mark.slow
def test_a_curve_is_of_the_seeds_and_images_that_all_its_points_have(tmp_path):
    accuracy = {"clean": [1.0, 0.8], "pgd20": [0.6, 0.2]}
    runs = [fake_run(tmp_path / str(seed), "pgd_at", seed, accuracy=accuracy) for seed in (0, 1)]
    at_eps(runs[0], 0.1, [0.8, 0.6])
    at_eps(runs[0], 0.4, [0.2, 0.0])
    at_eps(runs[0], 0.3, [0.9, 0.9])
    fewer = next((runs[0] / "evaluation").glob("*eps0.3*"))
    raw = json.loads(fewer.read_text())
    raw["attacks"]["pgd20"]["n"] = 40
    write_json(fewer, raw)
    _, section, _ = built(runs, tmp_path / "out")
    found = section["groups"][0]["over_eps"]
    assert (found["eps"], found["seeds"]) == ([0.0, 0.1, 0.2, 0.4], 1)
    at_eps(runs[0], 0.5, [0.1, 0.0], attacks=("cw20",))  # one more budget, by another attack, takes nothing away
    _, section, _ = built(runs, tmp_path / "again")
    assert section["groups"][0]["over_eps"]["eps"] == [0.0, 0.1, 0.2, 0.4]


def test_a_budget_judged_by_another_attack_gives_no_curve_of_the_headline(tmp_path):
    run = fake_run(tmp_path / "p", "pgd_at", accuracy={"clean": [1.0, 0.8], "pgd20": [0.6, 0.2], "cw20": [0.5, 0.2]})
    at_eps(run, 0.1, [0.8, 0.6])
    _, section, _ = built([run], tmp_path / "out")
    assert section["attack"] == "cw20"
    assert section["groups"][0]["over_eps"]["attack"] == "pgd20"


# ---------------------------------------------------------------- images
def with_examples(run, count=2):
    x = np.linspace(0, 1, count * 64, dtype=np.float16).reshape(count, 1, 8, 8)
    np.savez(run / "evaluation" / "ema.examples.npz", x=x, x_adv=np.clip(x + 0.1, 0, 1).astype(np.float16))
    rows = [
        {"label": i, "answer": i, "probability": 0.9, "answer_adv": 0, "probability_adv": 0.6} for i in range(count)
    ]
    told = {"attack": "pgd10", "part": "test", "file": "ema.examples.npz", "rows": rows}
    change_evaluation(run, lambda raw: raw.update(examples=told))


def test_images_are_drawn_with_their_perturbation(tmp_path):
    run = fake_run(tmp_path / "p", "pgd_at", accuracy={"pgd20": [0.5, 0.5]})
    with_examples(run)
    data, section, page = built([run], tmp_path / "out")
    assert section["groups"][0]["examples"]["rows"][1]["answer_adv"] == 0
    assert "figures/examples.png" in data["figures"]
    assert "PGD-AT: 1 of 2 images are turned." in page


@pytest.mark.parametrize("damage", ["gone", "torn", "not as written", "of other images"])
def test_images_that_are_gone_leave_the_report_without_them(tmp_path, damage):
    run = fake_run(tmp_path / "p", "pgd_at", accuracy={"pgd20": [0.5, 0.5]})
    with_examples(run)
    path = run / "evaluation" / "ema.examples.npz"
    if damage == "gone":
        path.unlink()
    elif damage == "torn":
        path.write_bytes(path.read_bytes()[:100])
    elif damage == "not as written":
        change_evaluation(run, lambda raw: raw["examples"].update(sha256="0" * 64))
    else:
        np.savez(path, x=np.zeros((3, 1, 8, 8)), x_adv=np.zeros((3, 1, 8, 8)))
    data, _, page = built([run], tmp_path / "out")
    assert "figures/examples.png" not in data["figures"]
    assert "Images and their perturbation" in page  # among those without data


def test_examples_of_classes_that_are_not_there_become_a_note(tmp_path):
    run = fake_run(tmp_path / "p", "pgd_at", accuracy={"pgd20": [0.5, 0.5]})
    with_examples(run)
    change_evaluation(run, lambda raw: raw["examples"]["rows"][0].update(answer_adv=77))
    data, section, _ = built([run], tmp_path / "out")
    assert section["groups"][0]["examples"] is None
    assert "examples cannot be read" in data["runs"][0]["notes"][0]
