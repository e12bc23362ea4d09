"""--from and --preset: whose settings and weights a fine-tuning takes, what it has cost, how reports count it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from fake_runs import write_json
from runs_helper import TINY
from test_report_frontier import by_title, run, section_of, text_of

import ham_kernels as ham
from ham_kernels import methods
from ham_kernels.commands.cli import main
from ham_kernels.commands.flags import parse_train
from ham_kernels.report.writing.frontier_tables import frontier_table
from ham_kernels.runs.folder import RunFolder
from ham_kernels.runs.presets import preset, rescaled
from ham_kernels.runs.settings import RunSettings, WarmUpSettings


@pytest.fixture
def settings():
    """Unlike the preset in all that a fine-tuning must keep."""
    usual = preset("digits")
    return replace(
        usual, method=methods.CFA(class_from=7, beta=3.0), attack=replace(usual.attack, eps=0.1),
        data=replace(usual.data, batch_size=64), engine=replace(usual.engine, channels_last="on"),
        warm_up=WarmUpSettings("n_fgsm"), run=RunSettings(seed=3, label="mine", ema_decay=0.9, precision="bf16"),
        optim=replace(usual.optim, optimizer="adamw", lr=0.004, schedule="cosine"),
    )  # fmt: skip


def told(*flags: str) -> ham.TrainSettings:
    wanted = parse_train(list(flags)).settings
    wanted.check()
    return wanted


# ---------------------------------------------------------------- --from
def test_the_settings_of_a_run(settings, tmp_path):
    origin = str(RunFolder.create(tmp_path / "run", settings).path)
    found = told("--from", origin, "--method", "trades")
    assert found.method == methods.TRADES()
    assert (found.attack, found.engine, found.data) == (settings.attack, settings.engine, settings.data)
    assert found.optim == replace(settings.optim, epochs=2, lr=0.0004, schedule="step", milestones=(), lr_decay=())
    assert found.run == replace(settings.run, label=None, weights=origin)
    assert found.warm_up == WarmUpSettings()


def test_flags_say_otherwise(settings, tmp_path):
    origin = str(RunFolder.create(tmp_path / "run", settings).path)
    flags = ("--epochs", "5", "--lr", "0.3", "--schedule", "cosine", "--seed", "8", "--eps", "0.2", "--beta", "2")
    found = told("--from", origin, *flags)
    assert found.method == methods.CFA(class_from=2, beta=2.0)  # the run's own, its course shortened
    assert (found.optim.epochs, found.optim.lr, found.run.seed, found.attack.eps) == (5, 0.3, 8, 0.2)
    assert found.optim.schedule == "cosine"


def test_a_course_is_shortened(settings, tmp_path):
    origin = str(RunFolder.create(tmp_path / "run", settings).path)
    assert told("--from", origin, "--method", "dafa").method.class_from == 2
    assert told("--from", origin, "--method", "ham").method == methods.HAM(start_epoch=1)


def test_the_rate_of_a_fine_tuned_run_stays(settings, tmp_path):
    tuned = replace(settings, run=replace(settings.run, weights="other.pt"))
    origin = str(RunFolder.create(tmp_path / "run", tuned).path)
    assert told("--from", origin).optim.lr == 0.004


def test_images_are_found_wherever_this_was_started(settings, tmp_path):
    there = tmp_path / "images"
    there.mkdir()
    settings = replace(settings, data=replace(settings.data, path="../images"))
    folder = RunFolder.create(tmp_path / "run", settings)
    place = {"named": "../images", "given": "../images", "absolute": str(there)}
    write_json(folder.path / "data.json", {"places": {"path": place}})
    assert told("--from", str(folder.path)).data.path == str(there)
    there.rmdir()
    assert told("--from", str(folder.path)).data.path == "../images"


def test_a_file_of_weights(tmp_path):
    torch.save({}, tmp_path / "w.pt")
    found = told("--from", str(tmp_path / "w.pt"), "--dataset", "cifar10", "--preset", "fast")
    usual = preset("cifar10")
    assert found.method == methods.Fair(fast=True)
    assert found.optim == replace(usual.optim, epochs=2, lr=usual.optim.lr / 10, milestones=(), lr_decay=())
    assert (found.data, found.attack) == (usual.data, usual.attack)
    assert found.run.weights == str(tmp_path / "w.pt")


def test_refusals(settings, tmp_path):
    origin = str(RunFolder.create(tmp_path / "run", settings).path)
    for flags, message in (
        (["--from", str(tmp_path / "none")], "from: .*none is neither a run folder nor a file of weights"),
        (["--from", str(tmp_path)], "from: .* is no run folder"),
        (["--from", origin, "--weights", "w.pt"], "weights: cannot be given with --from"),
        (["--from", origin, "--config", "c.toml"], "config: cannot be given with --from"),
        (["--from", origin, "--optimizer", "sgd"], r"lr: .*config\.toml has 0\.004, for adamw; give --lr for sgd"),
        (["--preset", "fast", "--method", "wat"], "preset: got 'fast' with --method wat"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            told(*flags)


def test_presets(tmp_path):
    fast = methods.Fair(fast=True)
    assert (told("--preset", "fair").method, told("--preset", "fair").optim.epochs) == (fast, 58)  # 0.95 * 24 * 23 / 9
    assert (told("--preset", "fast").method, told("--preset", "fast").optim.epochs) == (fast, 24)
    assert told("--preset", "fair", "--epochs", "12") == told("--preset", "fast", "--epochs", "12")
    assert told("--preset", "paper").method == methods.WAT()
    (tmp_path / "c.toml").write_text("[optim]\nepochs = 9\n")
    assert told("--preset", "fast", "--config", str(tmp_path / "c.toml"), "--no-fast").method == methods.Fair()
    of_file = told("--preset", "fair", "--config", str(tmp_path / "c.toml"))
    assert (of_file.method, of_file.optim.epochs) == (fast, 9)
    (tmp_path / "c.toml").write_text("[run]\nseed = 3\n")
    assert told("--preset", "fair", "--config", str(tmp_path / "c.toml")).optim.epochs == 58


def test_as_many_epochs_as_a_share_of_the_time_buys(settings, tmp_path):
    """PGD-AT takes 2K + 3 forwards of a batch, TRADES 2K + 7, N-FGSM 5, Free-AT 8 times 3."""

    def epochs(*flags):
        found = told(*flags)
        assert found.optim.milestones == rescaled(preset("digits"), found.optim.epochs).optim.milestones
        return found.optim.epochs

    assert epochs("--method", "trades", "--time", "1") == round(24 * 23 / 27)
    assert epochs("--method", "trades", "--time", "1/2", "--steps", "5") == round(24 / 2 * 13 / 17)
    assert epochs("--method", "pgd_at", "--step-sizes", "2", "1", "--time", "1") == round(24 * 23 / 7)
    assert epochs("--method", "n_fgsm", "--time", "1", "--epochs", "10") == 46
    assert epochs("--method", "free_at", "--time", "1") == 23
    assert epochs("--method", "rslad", "--teacher", "RUN", "--time", "1") == round(24 * 23 / (26 + 1))
    assert epochs("--method", "natural", "--time", "1e-9") == 1
    origin = str(RunFolder.create(tmp_path / "run", settings).path)
    assert told("--from", origin, "--preset", "fair", "--steps", "10").optim.epochs == round(2 * 0.95 * 23 / 9)
    for bad in ("0", "-1", "nan", "inf"):
        with pytest.raises(ValueError, match=f"time: got {bad}; it must be a finite number > 0"):
            told("--method", "trades", "--time", bad)
    with pytest.raises(SystemExit):
        told("--method", "trades", "--time", "long")


# ---------------------------------------------------------------- a run of it
@pytest.mark.slow
def test_a_run_goes_on_from_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *TINY, "--method", "pgd_at", "--out", "a", "--quiet"]) == 0
    assert main(["train", "--from", "a", "--method", "fair", "--epochs", "1", "--lr", "0", "--out", "b"]) == 0
    assert "begins with the weights of a" in capsys.readouterr().out
    before, after = RunFolder("a").load_weights("ema")["model"], RunFolder("b").load_weights("last")["model"]
    assert all(torch.equal(before[name], after[name]) for name in before if "running" not in name and "num" not in name)
    a = [json.loads(line) for line in (tmp_path / "a/metrics.jsonl").read_text().splitlines()]
    begun = json.loads((tmp_path / "b/begun_with.json").read_text())
    assert begun == {
        "weights": str(tmp_path / "a"), "run": "PGD-AT", "epochs": 4, "forwards": 4 * (2 * 3 + 3),
        "seconds": pytest.approx(sum(e["seconds"] for e in a)),
        "cpu_seconds": pytest.approx(sum(e["cpu_seconds"] for e in a)),
    }  # fmt: skip
    assert main(["train", "--from", "b", "--method", "trades", "--epochs", "1", "--out", "c", "--quiet"]) == 0
    again = json.loads((tmp_path / "c/begun_with.json").read_text())
    assert again["epochs"] == 4
    assert again["forwards"] == 5 * (2 * 3 + 3)
    assert again["seconds"] > begun["seconds"]


# ---------------------------------------------------------------- in reports
def tuned(root, begun: dict | None, method: str = "fair", **options):
    """Two epochs, 10 s, from PGD-AT's four in 100 s."""
    folder = run(
        root, "f", method, [0.8, 0.4], 20.0,
        settings={"optim.epochs": 2, "optim.lr": 0.01, "optim.milestones": [], "run.weights": "p-seed0", **options},
    )  # fmt: skip
    lines = (folder / "metrics.jsonl").read_text().splitlines()[:2]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    write_json(folder / "status.json", {"state": "finished", "epoch": 2, "epochs": 2, "message": ""})
    if begun is not None:
        write_json(folder / "begun_with.json", begun)
    return folder


BEGUN = {"weights": "/p", "run": "PGD-AT", "epochs": 4, "seconds": 100.0, "cpu_seconds": None, "forwards": 92.0}


def test_cost_with_and_without_what_it_goes_on_from(tmp_path, monkeypatch):
    theirs = {
        "model.mean": [0.5],
        "model.std": [0.3],
    }  # PGD-AT's run leaves them to its data
    runs = [run(tmp_path, "p", "pgd_at", [0.8, 0.2], 100.0), tuned(tmp_path, BEGUN, **theirs)]
    section, _ = section_of(runs, tmp_path / "out", monkeypatch)
    found = by_title(section)
    assert list(found) == ["PGD-AT", "fair, 2 epochs from PGD-AT"]
    fair = found["fair, 2 epochs from PGD-AT"]
    assert (fair["time"]["mean"], fair["own_time"]["mean"]) == (110.0, 10.0)
    assert (fair["relative_time"], fair["relative_forwards"]) == (pytest.approx(1.1), pytest.approx(1.5))
    row = text_of(frontier_table(section))["fair, 2 epochs from PGD-AT"]
    assert row["Training fine-tuning alone"] == "10.0 s"
    assert text_of(frontier_table(section))["PGD-AT"]["Training fine-tuning alone"] == "–"
    assert any("what those cost is in the times shown" in note for note in section["notes"])


def test_claims_on_time_count_it(tmp_path, monkeypatch):
    runs = [run(tmp_path, "p", "pgd_at", [0.8, 0.2], 100.0), tuned(tmp_path, BEGUN, "ham")]
    section, _ = section_of(runs, tmp_path / "out", monkeypatch)
    whole = next(c for c in section["claims"] if "whole run" in c["claim"])
    assert whole["measured"].startswith("+10 %")


@pytest.mark.parametrize("begun", [None, {"weights": "/w.pt"}, {"epochs": "four", "seconds": True, "forwards": [1]}])
def test_an_unknown_cost_is_not_compared(begun, tmp_path, monkeypatch):
    """Nor are its epochs, which are none of a whole training."""
    runs = [run(tmp_path, "p", "pgd_at", [0.8, 0.2], 100.0), tuned(tmp_path, begun)]
    section, _ = section_of(runs, tmp_path / "out", monkeypatch)
    assert section["frontier"] is None
    group = next(g for g in section["groups"] if "2 epochs from p-seed0" in g["title"])
    assert group["time"]["mean"] is None
    assert any("is not known, so that it has no time to compare" in note for note in section["notes"])


def test_seeds_that_go_on_from_runs_of_their_own_are_one_group(tmp_path, monkeypatch):
    runs = [run(tmp_path, "p", "pgd_at", [0.8, 0.2], 100.0, seed) for seed in (0, 1)]
    for seed in (0, 1):
        runs.append(tuned(tmp_path / str(seed), BEGUN, **{"run.weights": f"p-seed{seed}", "run.seed": seed}))
    section, _ = section_of(runs, tmp_path / "out", monkeypatch)
    assert [m["seeds"] for m in section["frontier"]["methods"]] == [2, 2]
