"""The commands as their users meet them: from flags to files, and what bad input is told."""

from __future__ import annotations

import json
import time

import pytest
import torch
from runs_helper import TINY, assert_same_weights, finish, ham

from ham_kernels.commands import cli, flags
from ham_kernels.commands import train as train_command
from ham_kernels.common import files
from ham_kernels.runs.folder import RunFolder
from ham_kernels.runs.judge_settings import EvaluateSettings
from ham_kernels.runs.presets import preset

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
        (["train", "--model", "resnet_18", "--out", "OUT"], "ham train: model: got 'resnet_18'"),
        (["train", "--model", "resnet18", "--out", "OUT"], "ham train: model: channels: got 1"),
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
        (["sweep", "ham", "--seed", "7"], "seed: cannot be given to a sweep; give --seeds"),
        (["sweep", "baseline", "--method", "fair"], "method: cannot be given to a sweep; the experiment sets it"),
        (["sweep", "grid", "--lam", "7"], "lam: cannot be given to a sweep of grid"),
        (["sweep", "grid", "--steps", "4", "--screen-steps", "3"], "screen-steps: cannot be given"),
        *[
            (["train", f"--{name}", ""], f"{name}: got an empty string")
            for name in ("path", "out", "weights", "from", "resume", "teacher", "generated", "config", "root")
        ],
        (["train", "--quiet", "--out="], "out: got an empty string"),
        (["train", "--resume", "RUN", "--path", ""], "path: got an empty string"),
        (["evaluate", ""], "run: got an empty string"),
        (["evaluate", "--quiet", "", "--attacks", "clean"], "run: got an empty string"),
        (["evaluate", "--model", "small_cnn", "--checkpoint", ""], "checkpoint: got an empty string"),
        (["evaluate", "RUN", "--transfer_from", ""], "transfer_from: got an empty string"),
        (["export", ""], "run: got an empty string"),
        (["report", "--no-pdf", "a", ""], "runs: got an empty string"),
        (["report", "a", "--out", ""], "out: got an empty string"),
        (["predict", "", "a.png"], "source: got an empty string"),
        (["predict", "RUN", ""], "files: got an empty string"),
        (["sweep", "ham", "--out", ""], "out: got an empty string"),
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
    names = [str(train_command._new_folder(preset("svhn"), None)) for _ in range(3)]
    assert names == [f"runs/svhn-ham-seed0{end}" for end in ("", "-2", "-3")]


@pytest.mark.parametrize("name", ["checkpoints", "status.json", "data.json", "evaluation"])
def test_a_run_does_not_begin_where_parts_of_one_lie(name, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).mkdir()
    with pytest.raises(FileExistsError, match=f"out: .* holds {name}"):
        train_command.train(flags.parse_train(list(TINY)).settings, tmp_path / "run", quiet=True)
    assert [p.name for p in (tmp_path / "run").iterdir()] == [name]


@pytest.mark.parametrize("name", ["sweep.json", "other/config.toml"])
def test_a_run_does_not_begin_in_a_folder_of_runs(name, tmp_path, capsys):
    (tmp_path / "runs" / name).parent.mkdir(parents=True)
    (tmp_path / "runs" / name).touch()
    assert cli.main(["train", *TINY, "--out", str(tmp_path / "runs")]) == 2
    told = capsys.readouterr().err
    assert told == f"ham train: out: {tmp_path}/runs holds other runs; give {tmp_path}/runs/NAME\n"
    assert [p.name for p in (tmp_path / "runs").iterdir()] == [name.split("/")[0]]


def test_an_empty_string_is_no_folder_in_python():
    told = flags.parse_train(list(TINY)).settings
    with pytest.raises(ValueError, match=r"^out: got an empty string"):
        train_command.train(told, "", quiet=True)
    with pytest.raises(ValueError, match=r"^run: got an empty string"):
        train_command.resume("")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("text", ["1.5", "[]", "null", "{}", '{"state": "finished"}'])
def test_a_status_that_tells_nothing_is_named_as_damaged(text, tmp_path):
    run = RunFolder.create(tmp_path / "run", preset("digits"))
    (run.path / "status.json").write_text(text)
    with pytest.warns(UserWarning, match=r"status\.json is damaged \(it h"):
        assert run.status()["state"] == "new"


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
    assert all(torch.equal(v, files.load(path)["model"][k]) for k, v in state["model"].items())


@pytest.mark.slow
def test_output_is_plain_where_nobody_watches(tmp_path):
    process = ham("train", *TINY, "--out", "run", cwd=tmp_path)
    process.stdout.reconfigure(newline="")  # or "\r" would come out as a line's end
    code, out = finish(process)
    assert code == 0
    assert "\r" not in out
    assert "\x1b" not in out
    lines = out.splitlines()
    assert len(lines) == 3 + 4 + 1
    assert lines[3].startswith("epoch 1/4  pgd_at   loss ")
    for word in ("hard", "images/s", "val clean", "pgd2", "left"):
        assert word in lines[5]


def test_help_is_there_at_once(tmp_path):
    """No torch, no tyro: a few times an empty interpreter. (The figure of the goal comes from a benchmark.)"""
    start = time.monotonic()
    code, out = finish(ham("--help", cwd=tmp_path))
    assert code == 0
    assert "train" in out
    assert time.monotonic() - start < 30  # catches only a hang


def test_pause_and_go_on(run, tmp_path, one_thread):
    RunFolder.create(tmp_path / "run", flags.parse_train(list(TINY)).settings)
    trainer = train_command.resume(tmp_path / "run", until_epoch=1, quiet=True)
    assert trainer.epoch == 1
    assert RunFolder.open(tmp_path / "run").status()["state"] == "interrupted"
    train_command.resume(tmp_path / "run", quiet=True)
    assert_same_weights(tmp_path / "run", run)


@pytest.mark.slow
def test_layers_that_rest_in_a_model_of_the_users_are_not_trained(tmp_path, one_thread):
    settings = flags.parse_train([*TINY, "--model", "nets:resting_norms", "--epochs", "3"]).settings
    trainer = train_command.train(settings, tmp_path / "run", quiet=True)
    statistics = {k: v for k, v in trainer.model.state_dict().items() if "running" in k}
    assert statistics
    assert all(bool((v == ("var" in name)).all()) for name, v in statistics.items())  # as a new BatchNorm has them
