"""`ham evaluate`: what it writes, adds to, refuses, and shows."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from runs_helper import TINY

from ham_kernels import models
from ham_kernels.commands import cli, flags, progress
from ham_kernels.commands import train as train_command
from ham_kernels.commands.evaluate import evaluate_run
from ham_kernels.commands.evaluation_text import verdict
from ham_kernels.evaluation import gradient_masking
from ham_kernels.report.reading.evaluations import read_evaluation
from ham_kernels.runs.folder import RunFolder
from ham_kernels.runs.judge_settings import EvaluateSettings

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("no_gpu")]
QUICK = EvaluateSettings(attacks=("clean", "pgd3"), masking_images=32, analysis_images=64)
CLEAN = EvaluateSettings(attacks=("clean",), masking=False, analyses=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory, one_thread):
    out = tmp_path_factory.mktemp("commands") / "run"
    train_command.train(flags.parse_train(list(TINY)).settings, out, quiet=True)
    return out


# ---------------------------------------------------------------- what it writes
@pytest.mark.slow
def test_evaluation_is_written_and_added_to(run, capsys):
    (path,) = evaluate_run(run, QUICK)
    assert path == run / "evaluation/ema.json"
    shown = capsys.readouterr().out
    assert "weights ema (epoch 4), test images" in shown
    assert "gradient masking" in shown
    first = json.loads(path.read_text())
    assert set(first["attacks"]) == {"clean", "pgd3"}
    assert first["attacks"]["clean"]["n"] == 60
    assert first["attacks"]["clean"]["on"]["torch"] == torch.__version__
    assert {"masking", "confidence", "easy"} <= set(first)
    assert first["easy"]["part"] == "train"
    assert [m["m"] for m in first["easy"]["by_m"]] == [1, 2]
    evaluate_run(run, EvaluateSettings(attacks=("fgsm",), masking=False, analyses=False), quiet=True)
    second = json.loads(path.read_text())
    assert set(second["attacks"]) == {"clean", "pgd3", "fgsm"}
    assert second["attacks"]["pgd3"] == first["attacks"]["pgd3"]
    assert second["masking"] == first["masking"]
    # Fewer images, or another budget or part, take nothing away.
    evaluate_run(run, EvaluateSettings(attacks=("pgd3",), images=20, masking=False, analyses=False), quiet=True)
    assert json.loads(path.read_text())["attacks"] == second["attacks"]
    (other,) = evaluate_run(
        run, EvaluateSettings(attacks=("clean",), eps=0.1, masking=False, analyses=False), quiet=True
    )
    assert other.name == "ema.test-eps0.1-step0.025-fp32-seed0.json"
    (restarted,) = evaluate_run(
        run, EvaluateSettings(attacks=("pgd3",), restarts=2, masking=False, analyses=False), quiet=True
    )
    third = json.loads(restarted.read_text())["attacks"]
    assert set(third) == {"clean", "pgd3", "fgsm", "pgd3-r2"}
    assert third["pgd3-r2"]["accuracy"]["value"] <= third["pgd3"]["accuracy"]["value"]


@pytest.mark.slow
def test_a_fast_search_never_takes_the_place_of_a_plain_one(run, tmp_path, capsys):
    how = replace(CLEAN, attacks=("clean", "pgd2"))
    shutil.copytree(run, tmp_path / "run")

    def judged(search: str, images: int = how.images) -> dict:
        (path,) = evaluate_run(tmp_path / "run", replace(how, search=search, images=images), quiet=True)
        attacks = json.loads(path.read_text())["attacks"]
        assert "search" not in attacks["clean"]["settings"]  # for which nothing is searched
        return attacks["pgd2"]

    fast = judged("fast")
    assert fast["settings"]["search"]["channels_last"]
    assert judged("fast") == fast
    assert judged("plain", 20) == fast  # on fewer images
    assert "PGD-2: stays as a fast search found it on 60 images, more than 20" in capsys.readouterr().err
    plain = judged("plain")
    assert "search" not in plain["settings"]
    assert sum(a != b for a, b in zip(plain["correct"], fast["correct"], strict=True)) <= 2  # of 60
    assert judged("fast") == judged("fast", 20) == plain


def test_images_are_noted_and_altered_results_judged_anew(run, tmp_path, capsys):
    """The digest is of the images, whatever the batch size."""
    found = []
    for batch_size in (7, 60):
        shutil.copytree(run, tmp_path / str(batch_size), ignore=shutil.ignore_patterns("evaluation"))
        (path,) = evaluate_run(tmp_path / str(batch_size), replace(CLEAN, batch_size=batch_size), quiet=True)
        found.append(json.loads(path.read_text()))
    first, second = (raw["attacks"]["clean"] for raw in found)
    assert len(first["labels"].split()) == first["n"] == 60
    assert len(first["images_sha256"]) == 64
    assert (first["labels"], first["images_sha256"]) == (second["labels"], second["images_sha256"])
    (fewer,) = evaluate_run(tmp_path / "7", replace(CLEAN, attacks=("pgd1",), images=20), quiet=True)
    assert json.loads(fewer.read_text())["attacks"]["pgd1"]["images_sha256"] != first["images_sha256"]
    before = dict(second["accuracy"])
    second["accuracy"]["value"] += 0.1
    path.write_text(json.dumps(found[1]))
    evaluate_run(tmp_path / "60", CLEAN, quiet=True)
    assert "ema.json: what it states under clean does not follow from its flags" in capsys.readouterr().err
    again = json.loads(path.read_text())["attacks"]["clean"]
    assert again["accuracy"] == before
    assert again["labels"] == second["labels"]


@pytest.mark.slow
def test_a_run_of_one_step_is_judged_too(tmp_path):
    """What stays easy is asked of longer attacks alone."""
    one = ("--method", "fgsm_rs", "--steps", "1", "--epochs", "1", "--start-epoch", "1")
    settings = flags.parse_train([*TINY, *one]).settings
    train_command.train(settings, tmp_path / "run", quiet=True)
    (path,) = evaluate_run(tmp_path / "run", replace(CLEAN, analyses=True, analysis_images=20), quiet=True)
    result = json.loads(path.read_text())
    assert result["examples"]["attack"] == "pgd1"
    assert "confidence" in result
    assert "easy" not in result


def test_several_budgets_have_files_of_their_own(run, tmp_path, capsys):
    """The same as told one by one; the run's own budget is judged once, and what is done stays."""
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("evaluation"))
    how = replace(CLEAN, attacks=("clean", "pgd2"), analyses=True, analysis_images=20, images=30)
    usual, small, large = evaluate_run(tmp_path / "run", replace(how, eps_curve=(0.1, 0.2, 0.4)))
    out, err = capsys.readouterr()
    lines = zip(out.splitlines()[-2:], ("weights ema, eps 0.1: PGD-2 ", "weights ema, eps 0.4: PGD-2 "), strict=True)
    assert all(line.startswith(words) for line, words in lines)
    assert "\npgd2 at eps 0.1 ...\n" in err
    assert usual.name == "ema.json"
    assert small.name == "ema.test-eps0.1-step0.025-fp32-seed0.json"
    assert large.name == "ema.test-eps0.4-step0.1-fp32-seed0.json"
    found = [json.loads(path.read_text()) for path in (usual, small, large)]
    assert [set(raw["attacks"]) for raw in found] == [{"clean", "pgd2"}, {"pgd2"}, {"pgd2"}]
    assert [{"examples", "easy", "confidence"} & raw.keys() for raw in found[1:]] == [set(), set()]
    accuracies = [raw["attacks"]["pgd2"]["accuracy"]["value"] for raw in (found[1], found[0], found[2])]
    assert accuracies == sorted(accuracies, reverse=True)
    before = small.read_bytes()
    (alone,) = evaluate_run(tmp_path / "run", replace(how, eps=0.1, attacks=("pgd2",), analyses=False), quiet=True)
    assert alone == small
    assert json.loads(alone.read_text())["attacks"] == json.loads(before)["attacks"]
    (_, given) = evaluate_run(tmp_path / "run", replace(how, step_size=0.1, eps_curve=(0.1,)), quiet=True)
    assert given.name == "ema.test-eps0.1-step0.05-fp32-seed0.json"


def test_examples_are_kept_and_made_anew_where_they_are_not_what_they_were(run, tmp_path):
    """Also those of a file of before; and with no more than a few images left to read."""
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("evaluation"))
    settings = replace(CLEAN, analyses=True, analysis_images=40)
    (path,) = evaluate_run(tmp_path / "run", CLEAN, quiet=True)
    assert "examples" not in json.loads(path.read_text())
    evaluate_run(tmp_path / "run", settings, quiet=True)
    found = json.loads(path.read_text())["examples"]
    arrays = path.with_name("ema.examples.npz")
    assert (found["attack"], found["part"], found["file"]) == ("pgd3", "test", arrays.name)
    assert found["key"] == {"images": 40, "part": "test", "steps": 3}
    with np.load(arrays) as kept:
        assert kept["x"].shape == kept["x_adv"].shape == (10, 1, 8, 8)
        assert kept["x"].dtype == "float16"
        assert (kept["x"] != kept["x_adv"]).any((1, 2, 3)).all()
    assert [row["label"] for row in found["rows"]] == list(range(10))
    before = arrays.stat().st_mtime_ns, arrays.read_bytes()
    evaluate_run(tmp_path / "run", settings, quiet=True)
    assert before[0] == arrays.stat().st_mtime_ns
    arrays.write_bytes(before[1][:-1])
    evaluate_run(tmp_path / "run", settings, quiet=True)
    assert arrays.read_bytes() == before[1]
    assert json.loads(path.read_text())["examples"] == found
    (val,) = evaluate_run(tmp_path / "run", replace(settings, part="val"), quiet=True)
    assert json.loads(val.read_text())["examples"]["file"] == f"{val.stem}.examples.npz"


def test_evaluation_refuses_other_images(run, tmp_path):
    """Images that were split anew could put into the test part what the run was trained on."""
    shutil.copytree(run, tmp_path / "run")
    config = tmp_path / "run/config.toml"
    config.write_text(config.read_text().replace("val_images = 40", "val_images = 41"))
    with pytest.raises(ValueError, match=r"data: .* was trained on other images: counts was"):
        evaluate_run(tmp_path / "run", QUICK, quiet=True)
    with pytest.raises(ValueError, match=r"data: .* was trained on other images"):
        train_command.resume(tmp_path / "run", quiet=True)


def test_two_evaluations_do_not_share_a_file(run, monkeypatch):
    monkeypatch.setattr(RunFolder.alone.__wrapped__, "__defaults__", (".lock", 0.2))
    with RunFolder(run).alone("evaluation/.lock"), pytest.raises(BlockingIOError, match="another process works on"):
        evaluate_run(run, QUICK, quiet=True)


def test_a_function_that_makes_another_model_by_now_is_named(run, monkeypatch):
    import ham_kernels as ham_package

    other = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    monkeypatch.setattr(models, "create", lambda *_, **how: other)
    with pytest.raises(ValueError, match=r"model: small_cnn makes another model than it did for this run: .*"):
        ham_package.load_model(run, "ema", "cpu")


def test_loading_a_model_leaves_the_generators_alone(run):
    import ham_kernels as ham_package

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model = ham_package.load_model(run, "ema", "cpu")
    assert torch.equal(torch.rand(3), expected)
    assert not model.training


def test_evaluation_agrees_with_the_python_function(run):
    import ham_kernels as ham_package
    from ham_kernels import data
    from ham_kernels.commands.run_images import images_of

    evaluate_run(run, EvaluateSettings(("best",), ("pgd3",), masking=False, analyses=False), quiet=True)
    found = json.loads((run / "evaluation/best.json").read_text())["attacks"]["pgd3"]
    settings = RunFolder.open(run).settings()
    images = images_of(settings)
    model = ham_package.load_model(run, "best", "cpu")
    loader = data.part_loader(images, "test")
    judged = ham_package.evaluate(
        model, loader, ("pgd3",), eps=settings.attack.eps, step_size=settings.attack.step_size
    )["pgd3"]
    assert found["accuracy"]["value"] == pytest.approx(judged.accuracy)
    assert [c["value"] for c in found["per_class"]] == pytest.approx(list(judged.per_class))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (EvaluateSettings(weights=("final",)), "weights: got 'final'; allowed are last, ema, best, best_ema"),
        (EvaluateSettings(attacks=("pgd0",)), "attacks: got 'pgd0'"),
        (EvaluateSettings(attacks=("clean", "nonsense")), "attacks: got 'nonsense'"),
        (EvaluateSettings(images=0), "images: got 0"),
        (EvaluateSettings(eps=-1.0), "eps: got -1"),
        (EvaluateSettings(eps=0.0), "eps: got 0 for it or step_size"),
        (EvaluateSettings(part="tset"), "part: got 'tset'"),
        (EvaluateSettings(eps=8.0), r"eps: got 8, .* \(did you mean 8/255\?\)"),
        (EvaluateSettings(step_size=2.0), r"step_size: got 2, .* \(did you mean 2/255\?\)"),
        (EvaluateSettings(eps_curve=(0.1, 0.0)), "eps_curve: got 0.0; it must be above 0"),
        (EvaluateSettings(eps_curve=(0.1, float("nan"))), "eps_curve: got nan; it must be finite"),
        (EvaluateSettings(eps_curve=(0.1, 0.3, 0.1)), "eps_curve: got 0.1 0.3 0.1; give each budget once"),
        (EvaluateSettings(eps_curve=(0.1, 4.0)), r"eps_curve: got 4, .* \(did you mean 4/255\?\)"),
        (EvaluateSettings(eps_curve=(0.1,), attacks=("clean",)), "eps_curve: got 0.1 with attacks=clean"),
        (EvaluateSettings(eps_curve=(0.1,), eps=0.0, masking=False), "eps_curve: got 0.1 with eps=0"),
    ],
)
def test_bad_evaluations_are_refused_before_any_work(settings, message, run):
    before = sorted(p for p in (run / "evaluation").rglob("*")) if (run / "evaluation").exists() else []
    with pytest.raises(ValueError, match=message):
        evaluate_run(run, settings, quiet=True)
    after = sorted(p for p in (run / "evaluation").rglob("*")) if (run / "evaluation").exists() else []
    assert before == after


@pytest.mark.slow
def test_masking_is_checked_by_default_where_it_costs_no_more_than_the_attacks(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("evaluation"))
    cheap = EvaluateSettings(("last",), ("clean", "pgd3"), analyses=False)
    (path,) = evaluate_run(tmp_path / "run", cheap)
    assert "masking" not in json.loads(path.read_text())
    assert "gradient masking: not checked; --masking does, with some 350" in capsys.readouterr().out
    evaluate_run(tmp_path / "run", replace(cheap, attacks=("pgd400",), images=20), quiet=True)  # 350 of 60 images
    assert "masking" not in json.loads(path.read_text())
    evaluate_run(tmp_path / "run", replace(cheap, attacks=("pgd400",)), quiet=True)  # 401 of each against 350
    assert json.loads(path.read_text())["masking"]["n"] == 60


@pytest.mark.slow
def test_masking_checks_are_kept_one_by_one(run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("evaluation"))
    settings = EvaluateSettings(("last",), ("clean",), masking_images=16, analyses=False)

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(gradient_masking, "_scale", stopped)
        with pytest.raises(KeyboardInterrupt):
            evaluate_run(tmp_path / "run", settings, quiet=True)
    path = tmp_path / "run/evaluation/last.json"
    begun = json.loads(path.read_text())["masking_begun"]["checks"]
    assert [check["name"] for check in begun] == ["steps", "budget"]
    assert read_evaluation("last", json.loads(path.read_text()), [], path).masking is None
    evaluate_run(tmp_path / "run", settings, quiet=True)
    result = json.loads(path.read_text())
    assert result["masking"]["checks"][:2] == begun
    assert len(result["masking"]["checks"]) == 5
    assert "masking_begun" not in result


@pytest.mark.slow
def test_transfer_from_another_run(run, tmp_path):
    train_command.train(flags.parse_train([*TINY, "--seed", "1"]).settings, tmp_path / "other", quiet=True)
    quick = EvaluateSettings(("last",), ("clean",), masking_images=32, transfer_from=tmp_path / "other", analyses=False)
    (path,) = evaluate_run(run, quick, quiet=True)
    checks = {c["name"]: c for c in json.loads(path.read_text())["masking"]["checks"]}
    assert 0 <= checks["transfer"]["values"]["transfer"] <= 1
    before = json.loads(path.read_text())["masking"]
    evaluate_run(run, replace(quick, transfer_from=None), quiet=True)
    assert json.loads(path.read_text())["masking"] == before, "less said again"
    evaluate_run(run, replace(quick, transfer_from=None, masking_images=16), quiet=True)
    assert json.loads(path.read_text())["masking"]["key"] == {"images": 16, "other": None}


@pytest.mark.parametrize(
    ("other", "message"), [("SELF", "is the run itself"), ("NOWHERE", "is no run folder"), ("NEW", "has not begun")]
)
def test_examples_come_from_another_run(other, message, run, tmp_path, capsys):
    RunFolder.create(tmp_path / "new", flags.parse_train(list(TINY)).settings)
    path = {"SELF": run.parent / "." / run.name, "NOWHERE": tmp_path, "NEW": tmp_path / "new"}[other]
    assert cli.main(["evaluate", str(run), "--transfer-from", str(path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"ham evaluate: transfer_from: {path}")
    assert message in err


# ---------------------------------------------------------------- weights come and go
def damage(path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.filterwarnings("ignore:checkpoint .* was altered")
def test_a_damaged_checkpoint_takes_no_evaluation_along(run, tmp_path):
    """What was found of later weights stays, whichever of several weights is affected, and both files are named."""
    shutil.copytree(run, tmp_path / "run")
    weights = EvaluateSettings(("best", "ema"), ("clean", "pgd3"), masking=False, analyses=False)
    paths = evaluate_run(tmp_path / "run", weights, quiet=True)
    newest = RunFolder(tmp_path / "run").checkpoints.newest_first()[0]
    damage(newest)
    before = [p.read_bytes() for p in paths]
    for name in (newest.name, newest.with_suffix(".damaged").name):  # a resume that was stopped has set it aside
        message = rf"weights: .*ema.json judges those of epoch 4; {name} is damaged, and step_\d+.pt .* epoch 3\. "
        with pytest.raises(ValueError, match=message):
            evaluate_run(tmp_path / "run", weights, quiet=True)
        assert before == [p.read_bytes() for p in paths]
        if newest.exists():
            newest.rename(newest.with_suffix(".damaged"))
    paths[1].rename(tmp_path / "ema.json")
    (path,) = evaluate_run(tmp_path / "run", CLEAN, quiet=True)
    assert json.loads(path.read_text())["epoch"] == 3


def test_results_of_earlier_weights_are_kept_beside_the_new(tmp_path, capsys, one_thread):
    RunFolder.create(tmp_path / "run", flags.parse_train(list(TINY)).settings)
    train_command.resume(tmp_path / "run", until_epoch=1, quiet=True)
    (path,) = evaluate_run(tmp_path / "run", CLEAN, quiet=True)
    before = path.read_bytes()
    train_command.resume(tmp_path / "run", until_epoch=2, quiet=True)
    evaluate_run(tmp_path / "run", CLEAN, quiet=True)
    (kept,) = path.parent.glob("ema.json.epoch1-*")
    assert kept.read_bytes() == before
    told = capsys.readouterr().err
    assert str(kept) in told
    assert "epoch 1, now 2" in told
    assert json.loads(path.read_text())["epoch"] == 2
    for eps in ("0.1000001", "0.1000002", "0.1000001"):  # of one file name
        (path,) = evaluate_run(tmp_path / "run", replace(CLEAN, eps=float(eps)), quiet=True)
    assert len(list(path.parent.glob(f"{path.name}.epoch2-*"))) == 2  # none is lost
    assert "eps 0.1000001, now 0.1000002" in capsys.readouterr().err


# ---------------------------------------------------------------- what it shows
def test_a_check_that_was_not_run_has_not_passed(run):
    (path,) = evaluate_run(run, QUICK, quiet=True)
    result = json.loads(path.read_text())
    shown = verdict(result, run)
    assert "4 checks, 1 not run" in shown
    assert "  not run  Examples made on another model are no stronger than its own: no other model" in shown
    result["masking"] = {"suspicious": True, "checks": [
        {"name": "a", "title": "A", "values": {"x": 1}, "suspicious": True, "why": "bad"},
        {"name": "b", "title": "B", "values": {"x": 1}, "suspicious": False, "why": "as it should be"},
    ]}  # fmt: skip
    shown = verdict(result, run)
    assert "gradient masking: SUSPICIOUS in 1 of 2 checks\n  !!       A: bad\n  ok       B: as it" in shown


def test_parts_of_autoattack_say_what_each_took(run):
    (path,) = evaluate_run(run, QUICK, quiet=True)
    result = json.loads(path.read_text())
    settings = {"parts": ["apgd-ce", "fab-t", "square"]}  # as of two classes
    lost = {"settings": settings, "lost": {"apgd-ce": 41, "square": 2}}
    result["attacks"]["autoattack"] = result["attacks"]["pgd3"] | lost
    assert "AutoAttack took 41 by APGD-CE, 0 by FAB-T, 2 by SQUARE" in verdict(result, run).splitlines()


def test_numbers_say_what_they_are_of(run):
    (path,) = evaluate_run(run, QUICK, quiet=True)
    result = json.loads(path.read_text())
    result["easy"]["by_m"][0] |= {"easy_fraction": 0.992, "stay_share": 0.726}
    shown = verdict(result, run).splitlines()
    assert "easy after M steps, and of these still easy after K = 3 (training images):" in shown
    assert "  M=1: 99.2 % of the images are easy, 72.6 % of these stay so" in shown
    values = [c["value"] for c in result["attacks"]["pgd3"]["per_class"]]
    assert f" class {values.index(min(values))}: {100 * min(values):.1f} [" in next(
        line for line in shown if line.startswith("PGD-3")
    )


@pytest.mark.slow
def test_a_bar_ends_before_the_next_line(run, tmp_path, monkeypatch, capsys):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("evaluation"))
    monkeypatch.setattr(progress, "on_terminal", lambda: True)
    evaluate_run(tmp_path / "run", QUICK)
    err = capsys.readouterr().err
    lines = err.splitlines(keepends=False)
    for word in ("examples ...", "confidence ...", "easy ..."):
        assert f"\n{word}\n" in err
    assert any(line.startswith("masking: 100%") and "5/5" in line for line in lines)
    assert err.count("\n") == 2 + 1 + 3  # attacks, masking, analyses
