"""Which runs are one method, what it is called, and what may stand in one figure."""

from __future__ import annotations

import json

import pytest
from fake_runs import change_evaluation, fake_run, interval, write_json

from ham_kernels import report
from ham_kernels.report.comparing.sections import sections
from ham_kernels.report.reading.find_runs import read_runs

UNSCREENED = {"method.early_drop": False, "method.reweight": False}
ACCURACY = {"clean": [0.9, 0.8], "pgd20": [0.5, 0.3]}


def grouped(runs, baseline=None):
    return sections(read_runs(runs), baseline)


def titles(tmp_path, *variants):
    """Titles of the groups of a section: each variant is (method, settings)."""
    runs = [fake_run(tmp_path / str(i), method, settings=s) for i, (method, s) in enumerate(variants)]
    (section,) = grouped(runs)
    return [group.title for group in section.groups]


def test_seeds_and_folders_do_not_divide(tmp_path):
    runs = [
        fake_run(tmp_path / "b", "ham", 1, settings={"data.root": "elsewhere", "data.download": False}),
        fake_run(tmp_path / "a", "ham", 0),
        fake_run(tmp_path / "c", "ham", 2, settings={"method.lam": 1}),  # 1 and 1.0
    ]
    (section,) = grouped(runs)
    (group,) = section.groups
    assert [run.seed for run in group.runs] == [0, 1, 2]


def test_titles_of_the_methods(tmp_path):
    found = titles(
        tmp_path,
        ("ham", {}),
        ("ham", {"method.freeze_bn": True}),
        ("ham", {"method.reweight": False}),
        ("ham", {"method.early_drop": False}),
        ("ham", {"method.rows": "random"}),
        ("ham", {"method.bn_rows": "all"}),
        ("pgd_at", {}),
    )
    assert found == [
        "PGD-AT", "HAM", "HAM, frozen BN", "HAM, no reweighting", "HAM, no early drop", "HAM, random rows",
        "HAM, BN of all rows",
    ]  # fmt: skip


def test_titles_of_a_sweep_name_what_differs(tmp_path):
    found = titles(
        tmp_path,
        ("pgd_at", {}),
        ("ham", {"method.screen_steps": 2, "method.lam": 0.5}),
        ("ham", {"method.screen_steps": 2, "method.lam": 1.0}),
        ("ham", {"method.screen_steps": 3, "method.lam": 0.5}),
    )
    assert found == ["PGD-AT", "HAM, M=2, λ=0.5", "HAM, M=2, λ=1", "HAM, M=3, λ=0.5"]


def test_engine_options_are_named_where_they_differ(tmp_path):
    fast = {"engine.compile": "on", "engine.winograd": "require"}
    assert titles(tmp_path / "a", ("pgd_at", fast), ("ham", fast)) == ["PGD-AT", "HAM"]
    slower = {"engine.compile": "on"}
    assert titles(tmp_path / "b", ("pgd_at", slower), ("ham", fast)) == ["PGD-AT", "HAM, Winograd"]


def test_settings_without_effect_do_not_divide(tmp_path):
    assert titles(tmp_path / "a", ("pgd_at", {}), ("pgd_at", {"method.lam": 2.0, "method.start_epoch": 3})) == [
        "PGD-AT"
    ]
    unweighted = {"method.reweight": False}
    assert titles(tmp_path / "b", ("ham", unweighted), ("ham", {**unweighted, "method.lam": 2.0})) == [
        "HAM, no reweighting"
    ]


SAME = [  # ways to ask for the same
    ({"engine.compile": "on"}, {"engine.compile": "require"}),
    ({"run.precision": "bf16"}, {"run.precision": "require-bf16"}),
    ({"run.device": "cpu"}, {"run.device": "auto"}),  # on a machine without a GPU
    ({"run.device": "cuda"}, {"run.device": "cuda:0"}),
    ({"data.workers": 0}, {"data.workers": 8}),
    ({"data.test_images": 100}, {}),
    ({"optim.schedule": "cosine"}, {"optim.schedule": "cosine", "optim.milestones": [3], "optim.lr_decay": [0.5]}),
    ({"optim.optimizer": "adamw"}, {"optim.optimizer": "adamw", "optim.momentum": 0.5}),
    ({"optim.adam_eps": 1e-6}, {}),
    ({"method.start_epoch": 1}, {"method.start_epoch": 1, "warm_up.name": "n_fgsm"}),
    ({"model.mean": [0.5], "model.std": [0.2]}, {"model.mean": [0.5], "model.std": [0.2], "model.normalize": True}),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_the_same_in_other_words_is_one_method(one, other, tmp_path):
    runs = [fake_run(tmp_path / str(seed), "ham", seed, settings=told) for seed, told in enumerate((one, other))]
    (section,) = grouped(runs)
    assert [len(group.runs) for group in section.groups] == [2]


def test_an_idle_setting_is_in_no_title(tmp_path):
    cosine = {"optim.schedule": "cosine", "optim.milestones": [2], "optim.lr_decay": [0.5]}
    found = titles(tmp_path, ("pgd_at", {}), ("pgd_at", cosine), ("pgd_at", {"optim.optimizer": "adamw"}))
    assert found == ["PGD-AT", "PGD-AT, cosine schedule", "PGD-AT, AdamW"]


def test_models_trained_elsewhere_are_seeds_of_one_only_where_a_person_calls_them_so(tmp_path):
    def adopted(name, label, **origin):
        folder = fake_run(
            tmp_path / name, state="adopted", accuracy={"pgd20": [0.5, 0.4]}, settings={"run.label": label}
        )
        write_json(folder / "origin.json", {"class": "Net", "parameters": 9} | origin)
        return folder

    runs = [adopted("a", "best", named=False), adopted("b", "best", named=False)]  # best.pt of two trainings
    runs += [adopted("c", "ours", named=True), adopted("d", "ours"), adopted("e", "ours", parameters=99)]
    for i, folder in enumerate(runs):
        change_evaluation(folder, lambda raw, i=i: raw.update(checkpoint_sha256=f"{i}"))
    (section,) = grouped(runs)
    assert [(g.title, len(g.counted)) for g in section.groups] == [
        ("best (a)", 1), ("best (b)", 1), ("ours", 2), ("ours (2)", 1),
    ]  # fmt: skip


def test_settings_younger_than_a_run_do_not_divide(tmp_path):
    usual = {
        "data.balance": "none",
        "optim.optimizer": "sgd",
        "optim.adam_betas": [0.9, 0.999],
        "optim.adam_eps": 1e-8,
        "optim.grad_clip": 0.0,
    }
    assert titles(tmp_path, ("ham", {}), ("ham", usual)) == ["HAM"]
    other = usual | {"optim.optimizer": "adamw", "optim.grad_clip": 0.5, "data.balance": "sampler"}
    named = "HAM, AdamW, gradients clipped at 0.5, balanced sampler"
    assert titles(tmp_path / "other", ("ham", {}), ("ham", other)) == ["HAM", named]


def test_titles_of_other_settings(tmp_path):
    found = titles(
        tmp_path,
        ("pgd_at", {}),
        ("pgd_at", {"optim.epochs": 8, "run.ema_decay": False}),
        ("pgd_at", {"optim.epochs": 8, "optim.lr": 0.05, "model.normalize": True}),
    )
    assert found == [
        "PGD-AT, 4 epochs, lr=0.1, EMA=0.97, normalize=False",
        "PGD-AT, lr=0.1, no EMA, normalize=False",
        "PGD-AT, lr=0.05, EMA=0.97, normalize=True",
    ]


def test_titles_name_epochs_that_are_not_the_usual_and_what_scales_with_them_among_equal_ones(tmp_path):
    short = {"optim.epochs": 4, "optim.milestones": [3], "method.start_epoch": 2, "warm_up.natural_epochs": 1}
    long = {"optim.epochs": 24, "optim.milestones": [18], "method.start_epoch": 9, "warm_up.natural_epochs": 4}
    found = titles(tmp_path / "a", ("pgd_at", long), ("ham", short), ("ham", long))
    assert found == ["PGD-AT", "HAM, 4 epochs", "HAM"]
    later = {**long, "optim.milestones": [20]}
    found = titles(tmp_path / "b", ("ham", short), ("ham", long), ("ham", later))
    assert found == ["HAM, 4 epochs", "HAM, milestones=[18]", "HAM, milestones=[20]"]


def test_titles_of_as_many_updates_name_no_epochs(tmp_path):
    replayed = {"optim.epochs": 3, "optim.milestones": [2], "method.replays": 8, **UNSCREENED}
    usual = {"optim.epochs": 24, "optim.milestones": [18]}
    assert titles(tmp_path / "a", ("pgd_at", usual), ("free_at", replayed)) == ["PGD-AT", "Free-AT"]
    found = titles(tmp_path / "b", ("pgd_at", usual), ("free_at", {**replayed, "optim.epochs": 4}))
    assert found == ["PGD-AT", "Free-AT, 4 epochs"]
    plain = dict.fromkeys(
        [f"method.{name}" for name in ("reweight", "early_drop", "rows", "freeze_bn", "bn_rows", "lam")]
    )
    usual, twice = usual | plain, {"optim.epochs": 48, "optim.milestones": [36], **plain}
    fast = {**twice, "method.step_sizes": [1.0]}
    found = titles(tmp_path / "c", ("pgd_at", usual), ("trades", twice), ("pgd_at", fast))
    assert found == ["PGD-AT", "TRADES, 48 epochs", "PGD-AT, steps of 1 ε, 48 epochs"]
    assert titles(tmp_path / "d", ("trades", usual), ("mart", twice)) == ["TRADES, 24 epochs", "MART, 48 epochs"]


def test_titles_name_teachers_where_they_are_several(tmp_path):
    taught = {"run.teacher": "runs/a", "run.teacher_digest": "1", **UNSCREENED}
    assert titles(tmp_path / "a", ("pgd_at", {}), ("rslad", taught), ("absld", taught)) == ["PGD-AT", "RSLAD", "ABSLD"]
    other = {**taught, "run.teacher": "runs/b", "run.teacher_digest": "2"}
    found = titles(tmp_path / "b", ("rslad", taught), ("absld", other))
    assert found == ["RSLAD, teacher=runs/a", "ABSLD, teacher=runs/b"]
    later = {**taught, "run.teacher_digest": "3"}
    found = titles(tmp_path / "c", ("rslad", taught), ("absld", later))
    assert found == ["RSLAD, teacher_digest=1", "ABSLD, teacher_digest=3"]


def test_titles_of_the_engines_options(tmp_path):
    runs = [{}, *({f"engine.{name}": "on"} for name in ("channels_last", "compile", "cuda_graphs", "winograd"))]
    assert titles(tmp_path, *(("pgd_at", options) for options in runs)) == [
        "PGD-AT", "PGD-AT, channels_last", "PGD-AT, compiled", "PGD-AT, CUDA graphs", "PGD-AT, Winograd",
    ]  # fmt: skip


def test_labels(tmp_path):
    runs = [
        fake_run(tmp_path / "0", "ham", 0, settings={"run.label": "ours"}),
        fake_run(tmp_path / "1", "ham", 1, settings={"run.label": "ours"}),
        fake_run(tmp_path / "2", "pgd_at", 0, settings={"run.label": "ours"}),
        fake_run(tmp_path / "3", "ham", 0, settings={"run.label": "a", "method.lam": 2.0}),
        fake_run(tmp_path / "4", "ham", 1, settings={"run.label": "b", "method.lam": 2.0}),  # same settings, two labels
    ]
    (section,) = grouped(runs)
    assert [(g.title, len(g.runs)) for g in section.groups] == [("ours (2)", 1), ("ours", 2), ("HAM, λ=2", 2)]


@pytest.mark.slow
def test_one_section_for_each_data_set_and_budget(tmp_path):
    runs = [
        fake_run(tmp_path / "a", "pgd_at", accuracy=ACCURACY),
        fake_run(tmp_path / "b", "ham", accuracy=ACCURACY, settings={"attack.eps": 0.1}),
        fake_run(tmp_path / "c", "ham", accuracy=ACCURACY, settings={"data.dataset": "cifar10"}),
        fake_run(tmp_path / "d", "ham", accuracy=ACCURACY, settings={"attack.norm": "l2"}),
        fake_run(tmp_path / "e", "ham"),  # not evaluated: belongs to the first by its settings
        fake_run(tmp_path / "f", "ham", accuracy=ACCURACY, settings={"data.path": "somewhere/birds"}),
    ]
    found = grouped(runs)
    assert [s.title for s in found] == [
        "digits, ε 0.2 (L∞)", "digits, ε 0.1 (L∞)", "cifar10, ε 0.2 (L∞)", "digits, ε 0.2 (L2)", "birds, ε 0.2 (L∞)",
    ]  # fmt: skip
    assert [[r.name for g in s.groups for r in g.runs] for s in found] == [["a", "e"], ["b"], ["c"], ["d"], ["f"]]
    report.build(runs, tmp_path / "out")
    data = json.loads((tmp_path / "out" / "data.json").read_text())
    assert len({figure for figure in data["figures"] if "class_accuracy" in figure}) == 5
    assert len((tmp_path / "out" / "table.md").read_text().split("| Method")) == 6


def test_other_classes_are_another_section(tmp_path):
    runs = [fake_run(tmp_path / n, "ham", accuracy=ACCURACY, classes=list(n)) for n in ("ab", "cd")]
    assert [s.title for s in grouped(runs)] == ["digits, ε 0.2 (L∞)", "digits, ε 0.2 (L∞) (2)"]


def test_baseline(tmp_path):
    runs = [fake_run(tmp_path / "h", "ham"), fake_run(tmp_path / "r", "ham", settings={"method.rows": "random"})]
    (section,) = grouped(runs)
    assert section.baseline is None
    assert any("nothing is shown relative" in note for note in section.notes)
    (section,) = grouped(runs, "HAM, random rows")
    assert section.baseline is section.groups[0]
    assert section.groups[0].title == "HAM, random rows"
    with pytest.raises(ValueError, match=r"^baseline: got 'PGD-AT'.*HAM, random rows"):
        grouped(runs, "PGD-AT")


def test_weights_shown(tmp_path):
    """The average where it is evaluated, else the last weights; the page warns where that differs."""
    runs = [
        fake_run(tmp_path / "p", "pgd_at", accuracy=ACCURACY, weights=("last",)),
        fake_run(tmp_path / "h", "ham", accuracy=ACCURACY, weights=("last", "ema", "best")),
    ]
    (section,) = grouped(runs)
    assert [g.weights for g in section.groups] == ["last", "ema"]
    assert any("Not alike in weights: last weights; weight average" in note for note in section.notes)
    report.build(runs, tmp_path / "out")
    table = (tmp_path / "out" / "table.md").read_text()
    assert r"| PGD-AT \[last weights\] |" in table
    assert r"| HAM \[weight average\] |" in table
    (section,) = json.loads((tmp_path / "out" / "data.json").read_text())["sections"]
    worst = [c["claim"] for c in section["claims"] if c["claim"].startswith("worst")]
    assert worst == ["worst class +3.2 points (last weights, PGD-20)"]  # compared for the weights that both have
    assert section["groups"][1]["differences"] is None


def test_shared_warm_ups_and_several_commits_are_said(tmp_path):
    runs = [
        fake_run(tmp_path / "p", "pgd_at", accuracy=ACCURACY, seconds=[2.0, 3.0, 3.0, 3.0]),
        fake_run(tmp_path / "h", "ham", accuracy=ACCURACY, seconds=[2.0, 1.0, 1.0, 1.0]),
    ]
    path = runs[1] / "environment.json"
    write_json(path, {**json.loads(path.read_text()), "commit": "def5678-dirty"})
    (section,) = grouped(runs)
    commits, warm_up = section.notes
    assert commits == "Not of one commit: abc1234, def5678-dirty (-dirty: with changes that no commit holds)."
    assert warm_up.startswith("Epochs 1 to 1 were trained once per seed, for all methods; their time counts in each.")


def test_what_limits_the_comparison_is_said(tmp_path):
    runs = [fake_run(tmp_path / "p", "pgd_at", accuracy=ACCURACY), fake_run(tmp_path / "h", "ham", accuracy=ACCURACY)]
    (section,) = grouped(runs)
    assert section.notes == []
    path = runs[1] / "evaluation" / "ema.json"
    write_json(path, {**json.loads(path.read_text()), "images": 77, "precision": "bf16"})
    path = runs[1] / "environment.json"
    write_json(path, {**json.loads(path.read_text()), "machine": {"cpu": "Other", "gpu": "H200"}})
    (section,) = grouped(runs)
    assert [note.split(":")[0] for note in section.notes] == [
        "Not alike in test images",
        "Not alike in the precision of the evaluation",
        "Trained on different machines, so times do not compare",
    ]


def test_weights_judged_at_another_budget_are_left_out(tmp_path):
    run = fake_run(tmp_path / "h", "ham", accuracy=ACCURACY, weights=("ema", "last"))
    path = run / "evaluation" / "last.json"
    write_json(path, {**json.loads(path.read_text()), "eps": 0.1})
    ((group,),) = [s.groups for s in grouped([run])]
    assert list(group.runs[0].evaluations) == ["ema"]
    assert "evaluation/last.json: left out" in group.runs[0].notes[0]


def test_an_interval_beside_its_value_can_be_drawn(tmp_path):
    """The bootstrap interval of a worst class may lie below its value, that of a std above."""
    run = fake_run(tmp_path / "p", "pgd_at", accuracy=ACCURACY)
    path = run / "evaluation" / "ema.json"
    raw = json.loads(path.read_text())
    raw["attacks"]["pgd20"]["worst_class"] = {"value": 0.3, "low": 0.1, "high": 0.25}
    raw["attacks"]["pgd20"]["per_class"][0] = {"value": 0.5, "low": 0.55, "high": 0.6}
    raw["attacks"]["pgd20"]["std"] = interval(None)
    write_json(path, raw)
    report.build([run], tmp_path / "out")
    assert "worst_class_time" in (tmp_path / "out" / "index.html").read_text()


def test_a_seed_counts_once(tmp_path):
    """A copy, or a second run of a seed, would make the spread over seeds smaller than it is."""
    kept = fake_run(tmp_path / "again", "pgd_at", seed=0, accuracy=ACCURACY | {"cw20": [0.4, 0.2]})
    fake_run(tmp_path / "first", "pgd_at", seed=0, accuracy=ACCURACY)
    fake_run(tmp_path / "other", "pgd_at", seed=1, accuracy=ACCURACY)
    fine = [fake_run(tmp_path / f"tuned{i}", seed=0, settings={"run.weights": f"runs/{i}"}) for i in range(2)]
    for run in fine:
        write_json(run / "begun_with.json", {"run": "PGD-AT"})
    (section,) = grouped([kept, tmp_path / "first", tmp_path / "other", *fine])
    base, tuned = section.groups
    assert [run.name for run in base.counted] == ["again", "other"]  # of the same seed the one judged by more
    assert "Not in the means, since another run of the same seed is: first." in section.notes
    assert len(tuned.counted) == 2  # of other first weights


def test_adopted_models_of_one_name_count_by_their_weights(tmp_path):
    runs = [fake_run(tmp_path / str(i), accuracy=ACCURACY, settings={"run.label": "Theirs"}) for i in range(3)]
    for i, run in enumerate(runs):
        write_json(run / "status.json", {"state": "adopted", "epoch": 0, "epochs": 0, "message": ""})
        path = run / "evaluation/ema.json"
        write_json(path, json.loads(path.read_text()) | {"checkpoint_sha256": "ab"[i > 0] * 64})
    (section,) = grouped(runs)
    assert [len(group.counted) for group in section.groups] == [2]
