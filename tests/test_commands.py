"""The commands as their users meet them: from flags to files, and what bad input is told."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time

import pictures
import pytest
import torch
from runs_helper import TINY, assert_same_weights, finish, ham, wait_for

from ham_kernels import checkpoint, cli
from ham_kernels.commands import flags
from ham_kernels.commands import sweep as sweep_command
from ham_kernels.commands import train as train_command
from ham_kernels.commands.evaluate import evaluate_run
from ham_kernels.commands.experiments import cells
from ham_kernels.presets import preset
from ham_kernels.runs import RunFolder
from ham_kernels.settings import EvaluateSettings

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("no_gpu")]
QUICK = EvaluateSettings(attacks=("clean", "pgd3"), masking_images=32, analysis_images=64)


@pytest.fixture(scope="module")
def run(tmp_path_factory, one_thread):
    out = tmp_path_factory.mktemp("commands") / "run"
    train_command.train(flags.parse_train(list(TINY)).settings, out, quiet=True)
    return out


# ---------------------------------------------------------------- flags
def test_flags_win_over_file_over_preset(tmp_path):
    (tmp_path / "c.toml").write_text("[data]\ndataset = 'svhn'\n[optim]\nepochs = 60\nlr = 0.5\n")
    s = flags.parse_train(["--config", str(tmp_path / "c.toml"), "--lr", "0.25"]).settings
    assert s.data.dataset == "svhn"
    assert (s.optim.epochs, s.optim.lr) == (60, 0.25)
    assert s.method.screen_steps == 5  # SVHN's preset
    assert s.method.start_epoch == preset("svhn", 60).method.start_epoch  # stretched with the file's epochs
    s = flags.parse_train(["--config", str(tmp_path / "c.toml"), "--epochs", "30", "--start-epoch", "7"]).settings
    assert (s.optim.epochs, s.method.start_epoch) == (30, 7)
    assert s.optim.milestones == preset("svhn", 30).optim.milestones


def test_a_path_takes_the_preset_of_natural_images():
    s = flags.parse_train(["--path", "folder"]).settings
    assert (s.data.path, s.data.dataset, s.model.name) == ("folder", "cifar10", "preact_resnet18")
    assert flags.parse_train(["--path", "folder", "--dataset", "digits"]).settings.model.name == "small_cnn"


def test_ema_can_be_switched_off():
    assert flags.parse_train(["--ema-decay", "None"]).settings.run.ema_decay is None


def test_resume_takes_no_other_settings(capsys):
    with pytest.raises(SystemExit) as exit_:
        flags.parse_train(["--resume", "x", "--lam", "3"])
    assert exit_.value.code == 2
    assert "--lam" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "evaluate", "report", "sweep"])
def test_help_of_every_command(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main([command, "--help"])
    assert exit_.value.code == 0
    assert f"usage: ham {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "--dataset", "mnist"], "dataset: got 'mnist'; allowed are digits, cifar10"),
        (["train", "--epochs", "5", "--start-epoch", "9"], "start_epoch: got 9 with epochs=5"),
        (["train", "--model", "resnet_18", "--out", "OUT"], "resnet_18"),
        (["train", "--model", "vit_b_16", "--train-images", "200", "--path", "PHOTOS", "--out", "OUT"], "PHOTOS"),
        (["train", "--eps", "-1", "--out", "OUT"], "eps: got -1.0"),
        (["train", "--device", "cuda:99", "--out", "OUT"], "device: got 'cuda:99'"),
        (["train", "--device", "tpu", "--out", "OUT"], "device: got 'tpu'"),
        (["train", "--val-images", "5000", "--out", "OUT"], "val_images: got 5000"),
        (["train", "--path", "/nowhere", "--out", "OUT"], "path: /nowhere does not exist"),
        (["train", "--config", "/nowhere.toml"], "config: /nowhere.toml is not a file"),
        (["train", "--resume", "OUT"], "OUT is no run folder"),
        (["evaluate", "OUT"], "OUT is no run folder"),
        (["report", "OUT"], "OUT"),
        (["train", "--lr", "inf"], "lr: got inf"),
        (["train", "--momentum", "5"], "momentum: got 5.0"),
        (["train", "--screen-steps", "10"], "screen_steps: got 10 with steps=10"),
        (["sweep", "ham", "--seed", "7"], "seed: cannot be given to a sweep of ham; give --seeds"),
        (["sweep", "grid", "--lam", "7"], "lam: cannot be given to a sweep of grid"),
        (["sweep", "grid", "--steps", "4", "--screen-steps", "3"], "screen-steps: cannot be given"),
    ],
)
def test_bad_input_is_told_in_one_line_and_leaves_nothing(argv, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir() if p.name != "PHOTOS"] == []


def test_an_existing_run_is_not_overwritten(run, capsys):
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    assert cli.main(["train", *TINY, "--out", str(run)]) == 2
    assert f"ham train --resume {run}" in capsys.readouterr().err
    assert before == {p: p.stat().st_mtime_ns for p in run.rglob("*")}


def test_free_folder_counts_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [str(train_command._new_folder(preset("svhn")).path) for _ in range(3)]
    assert names == [f"runs/svhn-ham-seed0{end}" for end in ("", "-2", "-3")]


@pytest.mark.parametrize("name", ["checkpoints", "status.json", "data.json"])
def test_a_run_does_not_begin_where_parts_of_one_lie(name, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).mkdir()
    with pytest.raises(FileExistsError, match=f"out: .* holds {name}"):
        train_command.train(flags.parse_train(list(TINY)).settings, tmp_path / "run", quiet=True)
    assert [p.name for p in (tmp_path / "run").iterdir()] == [name]


# ---------------------------------------------------------------- train
def test_a_run_folder_holds_everything(run):
    folder = RunFolder.open(run)
    assert folder.settings() == flags.parse_train(list(TINY)).settings
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert [line["phase"] for line in lines] == ["pgd_at", "pgd_at", "ham", "ham"]
    assert [line["lr"] for line in lines] == pytest.approx([0.05, 0.05, 0.05, 0.005])
    assert lines[0]["hard_fraction"] == 1.0
    assert lines[0]["n"] == 240
    assert lines[0]["val"]["pgd2"]["n"] == 40
    facts = json.loads((run / "environment.json").read_text())
    assert facts["versions"]["torch"] == torch.__version__.split("+")[0]
    assert facts["sessions"][0]["ended"]
    assert folder.status()["state"] == "finished"
    assert set(folder.available_weights()) == {"last", "ema", "best", "best_ema"}
    assert len(folder.checkpoints.newest_first()) == 2


def test_best_is_the_epoch_that_validation_says(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for weights, key in (("best", "val"), ("best_ema", "val_ema")):
        scores = [line[key]["pgd2"]["accuracy"] for line in lines]
        assert RunFolder.open(run).load_weights(weights)["epoch"] == 1 + scores.index(max(scores))


def test_weights_can_be_read_by_torch_alone(run):
    path = run / "checkpoints/best.pt"
    state = torch.load(path, weights_only=True)
    assert all(torch.equal(v, checkpoint.load(path)["model"][k]) for k, v in state["model"].items())


def test_output_is_plain_where_nobody_watches(tmp_path):
    process = ham("train", *TINY, "--out", "run", cwd=tmp_path)
    process.stdout.reconfigure(newline="")  # or "\r" would come out as a line's end
    code, out = finish(process)
    assert code == 0
    assert "\r" not in out
    assert "\x1b" not in out
    lines = out.splitlines()
    assert len(lines) == 2 + 4 + 1
    assert lines[2].startswith("epoch 1/4  pgd_at   loss ")
    for word in ("hard", "images/s", "val clean", "pgd2", "left"):
        assert word in lines[4]


def test_help_is_there_at_once(tmp_path):
    """No torch, no tyro: a few times an empty interpreter. (The figure of the goal comes from a benchmark.)"""
    start = time.monotonic()
    code, out = finish(ham("--help", cwd=tmp_path))
    assert code == 0
    assert "train" in out
    assert time.monotonic() - start < 30  # catches only a hang


def test_tensorboard_gets_every_epoch_where_it_is_installed(tmp_path, monkeypatch):
    import sys
    import types

    events, made = [], []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            made.append((folder, purge_step))

        def add_scalar(self, tag, value, step):
            events.append((tag, value, step))

        def close(self):
            made.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    RunFolder.create(tmp_path / "run", flags.parse_train(list(TINY)).settings)
    train_command.resume(tmp_path / "run", until_epoch=1, quiet=True)
    trainer = train_command.resume(tmp_path / "run", quiet=True)
    folder = str(tmp_path / "run/tensorboard")
    assert made == [(folder, 1), "closed", (folder, 2), "closed"]  # what a lost session logged further is hidden
    assert [(v, step) for tag, v, step in events if tag == "loss"] == [(r.loss, r.epoch) for r in trainer.history]
    assert {"hard_fraction", "lr", "val/clean/accuracy", "val_ema/pgd2/worst_class"} <= {tag for tag, _, _ in events}


def test_pause_and_go_on(run, tmp_path, one_thread):
    RunFolder.create(tmp_path / "run", flags.parse_train(list(TINY)).settings)
    trainer = train_command.resume(tmp_path / "run", until_epoch=1, quiet=True)
    assert trainer.epoch == 1
    assert RunFolder.open(tmp_path / "run").status()["state"] == "interrupted"
    train_command.resume(tmp_path / "run", quiet=True)
    assert_same_weights(tmp_path / "run", run)


# ---------------------------------------------------------------- evaluate
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
    assert other.name == "ema.test-eps0.1-step0.05-fp32-seed0.json"
    (restarted,) = evaluate_run(
        run, EvaluateSettings(attacks=("pgd3",), restarts=2, masking=False, analyses=False), quiet=True
    )
    third = json.loads(restarted.read_text())["attacks"]
    assert set(third) == {"clean", "pgd3", "fgsm", "pgd3-r2"}
    assert third["pgd3-r2"]["accuracy"]["value"] <= third["pgd3"]["accuracy"]["value"]


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
    from ham_kernels.commands.assemble import images_of

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
    ],
)
def test_bad_evaluations_are_refused_before_any_work(settings, message, run):
    before = sorted(p for p in (run / "evaluation").rglob("*")) if (run / "evaluation").exists() else []
    with pytest.raises(ValueError, match=message):
        evaluate_run(run, settings, quiet=True)
    after = sorted(p for p in (run / "evaluation").rglob("*")) if (run / "evaluation").exists() else []
    assert before == after


def test_transfer_from_another_run(run, tmp_path):
    train_command.train(flags.parse_train([*TINY, "--seed", "1"]).settings, tmp_path / "other", quiet=True)
    quick = EvaluateSettings(("last",), ("clean",), masking_images=32, transfer_from=tmp_path / "other", analyses=False)
    (path,) = evaluate_run(run, quick, quiet=True)
    checks = {c["name"]: c for c in json.loads(path.read_text())["masking"]["checks"]}
    assert 0 <= checks["transfer"]["values"]["transfer"] <= 1


# ---------------------------------------------------------------- sweep
def test_experiments_are_the_papers():
    base = preset("cifar10")
    paper = cells("paper", base, (0, 1))
    names = [c.name for c in paper]
    assert len(names) == len(set(names)) == 2 * 21
    assert names[:2] == ["pgd_at-seed0", "ham-M3-lam1-seed0"]
    assert {(c.settings.method.screen_steps, c.settings.method.lam) for c in paper[1:21]} == {
        (m, lam) for m in (1, 2, 3, 4, 5) for lam in (0.5, 1.0, 1.5, 2.0)
    }
    ablations = {c.name.removesuffix("-seed0"): c.settings for c in cells("ablations", base, (0,))}
    stem = "ham-M3-lam1"
    assert not ablations[f"{stem}-drop_only"].method.reweight
    assert not ablations[f"{stem}-reweight_only"].method.early_drop
    assert ablations[f"{stem}-random_rows"].method.rows == "random"
    assert ablations[f"{stem}-frozen_bn"].method.freeze_bn
    assert ablations[f"{stem}-bn_of_all_rows"].method.bn_rows == "all"
    assert ablations[stem] == cells("ham", base, (0,))[0].settings
    for cell in paper:
        cell.settings.check()
    with pytest.raises(ValueError, match=r"seeds: got \(1, 1\)"):
        cells("ham", base, (1, 1))


def test_sweep_goes_on_and_survives_a_failed_run(tmp_path, run):
    """Stopped after its first run, with another one broken by hand: the rest is done, the broken one is named."""
    command = ("sweep", "ham", *TINY, "--seeds", "0", "1", "--attacks", "clean", "pgd2", "--out", "sweep")
    first, broken = (tmp_path / f"sweep/ham-M1-lam1-seed{seed}" for seed in (0, 1))
    process = ham(*command, cwd=tmp_path, start_new_session=True)
    wait_for((first / "checkpoints").exists, process)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C on a terminal
    code, out = finish(process)
    assert code == 130, out
    assert "the same command goes on" in out
    assert not RunFolder(first).busy()  # its process has ended before the sweep's
    assert not broken.exists()
    base = flags.parse_sweep(list(command[1:])).settings
    RunFolder.create(broken, cells("ham", base, (1,))[0].settings)
    (broken / "checkpoints").mkdir()
    (broken / "checkpoints/step_0000000001.pt").write_bytes(b"not a checkpoint")
    code, out = finish(ham(*command, cwd=tmp_path))
    assert code == 1, out
    assert "ham-M1-lam1-seed1: FAILED: `ham train` ended with 2" in out
    assert "step_0000000001.pt" in out
    outcome = json.loads((tmp_path / "sweep/sweep.json").read_text())
    assert outcome["runs"] == {first.name: "finished", broken.name: "failed"}
    assert (tmp_path / "sweep/report/index.html").exists()
    # Behind a shared warm-up a run ends as one trained by itself does, and its time holds the warm-up's.
    assert_same_weights(first, run)
    folders = tmp_path / "sweep/warm-ups/seed0", first
    warm, own = ((path / "metrics.jsonl").read_text().splitlines() for path in folders)
    assert len(warm) == 2
    assert own[:2] == warm


def test_a_sweep_does_not_mix_settings(tmp_path, run):
    """Neither in its runs nor in the warm-up that they share, also when the run itself is gone."""
    command = flags.parse_sweep(["ham", *TINY, "--attacks", "clean", "--out", str(tmp_path / "sweep")])
    assert sweep_command.sweep(command) == 0
    other = flags.parse_sweep(["ham", *TINY, "--lr", "0.01", "--attacks", "clean", "--out", str(tmp_path / "sweep")])
    with pytest.raises(ValueError, match=r"out: .*ham-M1-lam1-seed0 was begun with other settings"):
        sweep_command.sweep(other)
    shutil.rmtree(tmp_path / "sweep/ham-M1-lam1-seed0")
    with pytest.raises(ValueError, match=r"out: .*warm-ups/seed0 was begun with other settings"):
        sweep_command.sweep(other)
    further = flags.parse_sweep(
        ["ham", *TINY, "--lam", "2", "--attacks", "clean", "--out", str(tmp_path / "sweep")]
    )  # another method shares the warm-up
    assert sweep_command.sweep(further) == 0
    assert sorted(p.name for p in (tmp_path / "sweep").iterdir() if p.is_dir()) == [
        "ham-M1-lam2-seed0", "report", "warm-ups",
    ]  # fmt: skip


def test_a_run_whose_warm_up_failed_is_tried_again(tmp_path, capsys):
    photos = tmp_path / "photos"
    command = flags.parse_sweep(
        ["ham", *TINY, "--path", str(photos), "--attacks", "clean", "--out", str(tmp_path / "sweep")]
    )
    assert sweep_command.sweep(command) == 1
    assert "does not exist" in capsys.readouterr().out
    pictures.write_folder(
        photos, [f"{part}/{c}/{i}.png" for part, n in (("train", 150), ("test", 6)) for c in "abc" for i in range(n)]
    )
    assert sweep_command.sweep(command) == 0
