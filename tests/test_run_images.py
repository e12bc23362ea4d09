"""The task a run is told at its start, settings that fit a folder, and images that have moved since."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from dataclasses import replace

import pictures
import pytest
import torch
from pictures import write_folder, write_tar

from ham_kernels import data
from ham_kernels.commands import run_images
from ham_kernels.commands import train as train_command
from ham_kernels.commands.evaluate import evaluate_run
from ham_kernels.commands.flags import number, parse_evaluate, parse_train
from ham_kernels.commands.run_images import find, task_in_words
from ham_kernels.common.troubles import HamWarning
from ham_kernels.data.glance import Glance, glance
from ham_kernels.runs.config_file import read_toml
from ham_kernels.runs.folder import RunFolder
from ham_kernels.runs.judge_settings import EvaluateSettings
from ham_kernels.runs.presets import preset

SHORT = (
    "--epochs", "1", "--start-epoch", "1", "--milestones", "--lr-decay", "--batch-size", "4", "--val-images", "4",
    "--model", "small_cnn", "--steps", "2", "--screen-steps", "1", "--val-attack", "pgd1", "--device", "cpu",
)  # fmt: skip
JUDGE = {"attacks": ("clean",), "masking": False, "analyses": False, "device": "cpu"}


def photos(folder, size: int = 8, classes: str = "ab", each: int = 10):
    return write_folder(folder, [f"{c}/{i}.png" for c in classes for i in range(each)], size)


def trained(path: str, *more: str):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HamWarning)
        train_command.train(parse_train(["--path", path, *SHORT, *more]).settings, "run", quiet=True)
    return RunFolder("run")


# ---------------------------------------------------------------- the task at the start
def test_the_log_names_classes_and_counts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "set")
    with pytest.warns(HamWarning, match=r"batch_size: an epoch has fewer than 10 batches \(3: 12 images, 4 a batch\)"):
        train_command.train(parse_train(["--path", "set", *SHORT]).settings, "run")
    assert "2 classes, images to train/val/test 12/4/4: a 6/2/2, b 6/2/2" in capsys.readouterr().out
    facts = json.loads((tmp_path / "run/data.json").read_text())
    assert facts["class_counts"] == {"train": [6, 6], "val": [2, 2], "test": [2, 2]}
    assert facts["counts"] == {"train": 12, "val": 4, "test": 4}


def test_many_classes_in_few_words():
    counts = {"train": 2 * 20, "test": 20}
    facts = {
        "classes": [f"c{i}" for i in range(20)],
        "counts": counts,
        "class_counts": {"train": [2] * 20, "test": [1] * 20},
    }
    said = task_in_words(facts)
    assert said.startswith("20 classes, images to train/test 40/20: c0 2/1, c1 2/1")
    assert said.endswith("c9 2/1, and 10 more; each has 2-2/1-1")


def test_a_class_that_is_not_trained_is_told():
    settings = parse_train(["--train-images", "3", "--val-images", "0"]).settings
    with pytest.warns(HamWarning, match="data: there is no training image of 7 classes: '"):
        find(settings)


# ---------------------------------------------------------------- settings that fit the folder
def told(*flags: str):
    return parse_train(list(flags)).settings


def test_settings_fit_a_small_folder(tmp_path):
    s = told("--path", str(photos(tmp_path / "set", 16, each=50)))
    assert (s.data.val_images, s.data.size, s.model.name, s.optim.lr) == (8, None, "small_cnn", 0.05)
    assert s.attack == preset("cifar10").attack
    assert told("--path", str(tmp_path / "set"), "--train-images", "30").data.val_images == 3


def test_what_is_typed_wins(tmp_path):
    path = str(photos(tmp_path / "set", 16, each=50))
    s = told("--path", path, "--val-images", "20", "--model", "wrn_28_10", "--lr", "0.3", "--batch-size", "64")
    assert (s.data.val_images, s.model.name, s.optim.lr, s.data.batch_size) == (20, "wrn_28_10", 0.3, 64)
    (tmp_path / "c.toml").write_text("[data]\nval_images = 7\nbatch_size = 32\n[optim]\nmomentum = 0.5\n")
    s = told("--path", path, "--config", str(tmp_path / "c.toml"))
    assert (s.data.val_images, s.data.batch_size, s.optim.momentum) == (7, 32, 0.5)
    assert s.optim.lr == 0.05 * 32 / 128
    s = told("--path", path, "--dataset", "cifar10")  # a preset by name is taken as it is
    assert (s.data.val_images, s.model.name, s.optim.lr) == (1000, "preact_resnet18", 0.1)


@pytest.mark.parametrize(
    ("size", "model", "crop"), [(16, "small_cnn", None), (17, "preact_resnet18", None), (64, "preact_resnet18", None),
                                (65, "resnet18", 65), (300, "resnet18", 224)],
)  # fmt: skip
def test_the_model_is_chosen_by_the_size_of_images(size, model, crop, tmp_path):
    s = told("--path", str(photos(tmp_path / "set", size, each=3)))
    assert (s.model.name, s.data.size) == (model, crop)


def test_images_of_many_sizes_are_taken_at_the_usual_one(tmp_path):
    for i, side in enumerate((30, 40, 50)):
        write_folder(tmp_path / "set", [f"{c}/{side}-{k}.png" for c in "ab" for k in range(3)], (side, side + i))
    assert told("--path", str(tmp_path / "set")).data.size == 40
    assert told("--path", str(tmp_path / "set"), "--size", "100").model.name == "resnet18"
    assert told("--path", str(write_tar(tmp_path / "set.tar", tmp_path / "set"))).data.size == 40


def test_settings_of_idx_files(tmp_path):
    pictures.write_fashion_mnist(tmp_path)
    s = told("--path", str(tmp_path))
    assert (s.data.dataset, s.data.augment, s.model.normalize, s.data.val_images) == ("fashion_mnist", "crop", False, 0)
    assert glance(tmp_path) == Glance(6, 28, idx=True)


def test_a_glance_passes_over_a_broken_image(tmp_path):
    """Whose name is told when it is read; the others say as before what they are."""
    source = photos(tmp_path / "set", each=10)
    whole = glance(source)
    next(source.rglob("*.png")).write_bytes(b"broken")
    assert glance(source) == whole


def test_one_class_is_named_with_its_folder(tmp_path):
    source = write_folder(tmp_path / "set", [f"cat/{i}.png" for i in range(9)])
    told = replace(preset("cifar10"), data=replace(preset("cifar10").data, path=str(source), val_images=0))
    with pytest.raises(ValueError, match=r"path: .*set has one class, 'cat'; a classifier needs two or more"):
        run_images.images_of(told)


def test_a_glance_counts_what_trains(tmp_path):
    write_folder(tmp_path / "set", [f"{p}/{c}/{i}.png" for p in ("Train", "val") for c in "ab" for i in range(7)])
    assert glance(tmp_path / "set") == Glance(14, 6)
    assert glance(write_tar(tmp_path / "set.tar", tmp_path / "set")) == Glance(14, 6, tar=True)
    assert glance(photos(tmp_path / "other", each=10)) == Glance(16, 8)
    (tmp_path / "no.tar").write_bytes(b"?")
    for bad in (tmp_path / "no.tar", tmp_path / "nowhere", tmp_path):
        assert glance(bad) is None


# ---------------------------------------------------------------- images that have moved
@pytest.fixture
def moved(tmp_path, monkeypatch):
    """A run of one epoch on the folder `pictures`, where it was trained."""
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "pictures")
    trained("pictures")
    (tmp_path / "elsewhere").mkdir()
    return tmp_path


def test_a_run_is_judged_and_resumed_from_another_folder(moved, monkeypatch):
    monkeypatch.chdir(moved / "elsewhere")
    assert evaluate_run("../run", EvaluateSettings(**JUDGE), quiet=True)
    assert train_command.resume("../run", quiet=True).epoch == 1


def test_images_that_are_gone_name_flag_and_line(moved):
    (moved / "pictures").rename(moved / "other")
    with pytest.raises(
        FileNotFoundError, match=r"^path: pictures, .*--path, or in run/config.toml, line 3: path = "
    ) as error:
        evaluate_run("run", EvaluateSettings(**JUDGE), quiet=True)
    line = int(str(error.value).split("line ")[1].split(":")[0])
    assert (moved / "run/config.toml").read_text().splitlines()[line - 1] == 'path = "pictures"'
    with pytest.raises(FileNotFoundError, match=r"^path: pictures, "):
        train_command.resume("run", quiet=True)
    evaluate_run("run", EvaluateSettings(path="other", **JUDGE), quiet=True)
    train_command.resume("run", path="other", quiet=True)
    evaluate_run("run", EvaluateSettings(**JUDGE), quiet=True)  # resume has noted where they are
    (moved / "other").rename(moved / "third")
    config = (moved / "run/config.toml").read_text()
    (moved / "run/config.toml").write_text(config.replace('path = "pictures"', 'path = "third"'))
    evaluate_run("run", EvaluateSettings(**JUDGE), quiet=True)


def test_other_images_are_refused(moved):
    shutil.copytree(moved / "pictures", moved / "other")
    (moved / "other/a/0.png").write_bytes(pictures.png(99, 8))
    with pytest.raises(ValueError, match=r"^path: other: run was trained on other images: sha256 was"):
        evaluate_run("run", EvaluateSettings(path="other", **JUDGE), quiet=True)
    with pytest.raises(ValueError, match=r"^path: other: run was trained on other images"):
        train_command.resume("run", path="other", quiet=True)
    (moved / "other/a/0.png").unlink()
    with pytest.raises(ValueError, match=r"^path: other: run was trained on other images: counts was"):
        evaluate_run("run", EvaluateSettings(path="other", **JUDGE), quiet=True)


def test_files_may_move_under_another_name(tmp_path, monkeypatch):
    """Their digest is of CLASS/NAME, and of the folder above, as the run knew it."""
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "pictures", 70)
    run = trained("pictures", "--size", "66", "--workers", "0")
    (tmp_path / "pictures").rename(tmp_path / "other")
    find(run.settings(), run, "other")
    find(run.settings(), run, str(tmp_path / "other"))
    before = (tmp_path / "other/a/0.png").read_bytes()
    for other in (before + b"?", before[:-1] + b"?"):
        (tmp_path / "other/a/0.png").write_bytes(other)
        with pytest.raises(ValueError, match="trained on other images: files_sha256"):
            find(run.settings(), run, "other")


def test_a_run_of_before_knows_no_places(moved):
    run = RunFolder("run")
    facts = run.data_facts()
    for new in ("places", "class_counts"):
        del facts[new]
    run.write_json("data.json", facts)
    assert train_command.resume("run", quiet=True).epoch == 1
    assert run.places()["path"]["absolute"] == str(moved / "pictures")


# ---------------------------------------------------------------- what is typed, and refused at once
def test_fractions_on_the_command_line():
    s = told("--eps", "8/255", "--step-size=2/255", "--step-sizes", "1", "1/2", "--lr", "0.1")
    assert (s.attack.eps, s.attack.step_size, s.method.step_sizes, s.optim.lr) == (8 / 255, 2 / 255, (1.0, 0.5), 0.1)
    assert parse_evaluate(["run", "--eps", "16/255"]).settings.eps == 16 / 255
    assert parse_evaluate(["run"]).settings.eps is None
    for word in ("8/0", "8/", "/255", "1/2/3", "x"):
        with pytest.raises(ValueError, match="it must be a number, or a fraction such as 8/255"):
            number(word)


def test_steps_in_units_of_a_byte_are_refused():
    with pytest.raises(ValueError, match=r"^step_size: got 2, .*did you mean 2/255\?"):
        told("--step-size", "2").check()
    told("--step-size", "2", "--norm", "l2").check()


def test_a_byte_order_mark_is_no_part_of_toml(tmp_path):
    (tmp_path / "c.toml").write_bytes(b"\xef\xbb\xbf[optim]\nepochs = 3\n")
    assert read_toml(tmp_path / "c.toml") == {"optim": {"epochs": 3}}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--model", "resnet81"), "model: got 'resnet81'; close are"),
        (
            ("--method", "trades", "--early-drop", "--easy", "drop", "--device", "cpu", "--seed", "9" * 25),
            "seed: got 99",
        ),
    ],
)
def test_wrong_settings_are_refused_before_data_are_read(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_command.run_images, "find", lambda *_: pytest.fail("data were read"))
    with pytest.raises(ValueError, match=message):
        train_command.train(told(*flags), "run", quiet=True)
    assert not os.listdir(tmp_path)


def test_another_run_needs_the_check_that_uses_it(tmp_path):
    with pytest.raises(ValueError, match=r"transfer_from: got .* with masking off"):
        EvaluateSettings(transfer_from=tmp_path, masking=False).check()


def test_folders_that_cannot_be_written_are_named(moved, monkeypatch):
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: access(path, mode) and not mode & os.W_OK)
    for out in (None, "a/b"):
        with pytest.raises(PermissionError, match=r"^out: .*cannot be written, as .* is read-only here; give another"):
            train_command.train(told("--path", "pictures", *SHORT), out, quiet=True)
    with pytest.raises(PermissionError, match=r"^run: run cannot be written"):
        evaluate_run("run", EvaluateSettings(**JUDGE), quiet=True)
    with pytest.raises(PermissionError, match=r"^run: run cannot be written"):
        train_command.resume("run", quiet=True)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"^out: .*file/run cannot be written \(.*; give another folder"):
        RunFolder.create(tmp_path / "file/run", told())
    assert os.listdir(tmp_path) == ["file"]


def test_final_weights_do_not_hang_on_the_early_check(tmp_path, monkeypatch):
    """It makes a model of its own, which draws from torch's generator."""
    monkeypatch.chdir(tmp_path)
    settings = told(*SHORT, "--train-images", "24", "--test-images", "8")
    a = train_command.train(settings, "a", quiet=True).model.state_dict()
    monkeypatch.setattr(train_command, "check_before_data", lambda *_: torch.rand(3))
    b = train_command.train(settings, "b", quiet=True).model.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)


# ---------------------------------------------------------------- flags that say what is trained
@pytest.mark.parametrize(
    "flags", ["--batch-size 512 --train-images 9", "--batch-size=512 --lr 0.3", "--screen-steps 2 --label a_b"]
)
def test_flags_with_underscores_are_the_same(flags, tmp_path):
    photos(tmp_path / "set")
    hyphens = ["--path", str(tmp_path / "set"), *flags.split()]
    underscores = [w.replace("-", "_").replace("__", "--", 1) if w.startswith("--") else w for w in hyphens]
    assert underscores != hyphens
    assert told(*underscores) == told(*hyphens)


def test_a_data_set_beside_the_path_of_a_file(tmp_path):
    (tmp_path / "c.toml").write_text("[data]\ndataset = 'cifar10'\npath = 'mine'\n")
    config = ("--config", str(tmp_path / "c.toml"))
    with pytest.raises(ValueError, match=r"dataset: got 'digits', but .*c.toml has the path mine; give --path too"):
        told(*config, "--dataset", "digits")
    assert told(*config, "--dataset", "digits", "--path", "None").data.path is None
    assert told(*config, "--dataset", "digits", "--path", "other").data.path == "other"
    assert told(*config, "--dataset", "cifar10").data.path == "mine"


def test_a_validation_part_of_its_own_can_be_left_out(tmp_path):
    write_folder(tmp_path, [f"{part}/{c}/{i}.png" for part in ("train", "val", "test") for c in "ab" for i in range(3)])
    with_it, without = (
        run_images.images_of(told("--path", str(tmp_path), "--val-images", n, "--size", "6")) for n in ("4", "0")
    )
    assert with_it.counts == {"train": 6, "val": 6, "test": 6}
    assert without.counts == {"train": 6, "test": 6}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "eps 0.2, step 0.05, K 10, linf"),
        (("--method", "fair", "--fast"), "eps 0.25 (1.25 of 0.2), steps of 2 1 0.5 eps, K 3, linf"),
        (("--method", "pgd_at", "--eps-factor", "2"), "eps 0.4 (2 of 0.2), step 0.1, K 10, linf"),
        (("--method", "n_fgsm"), "eps 0.2, one step, linf"),
    ],
)
def test_the_attack_at_the_start_is_the_one_trained_with(flags, words):
    assert train_command.attack_in_words(told("--dataset", "digits", *flags)) == words


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--steps", "7", "--step-sizes", "2", "1"), "steps: has no effect with --step-sizes"),
        (("--milestones", "2", "--lr-decay", "-1"), "lr_decay: got -1"),
        (("--milestones", "2", "--lr-decay", "nan"), "lr_decay: got nan"),
        (("--milestones", "0", "--lr-decay", "0.1"), "milestones: got 0"),
    ],
)
def test_flags_without_sense_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        told("--dataset", "digits", "--method", "pgd_at", *flags).check()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--easy", "jump"), "--easy: has no effect without --early-drop"),
        (("--no-reweight", "--lam=2"), "--lam: has no effect without --reweight"),
        (("--class_from", "3"), "--class-from: has no effect in PGD-AT"),
        (("--method", "fair_ard", "--clean-share", "0.1"), "--clean-share: has no effect in Fair-ARD"),
        (("--schedule", "cosine", "--milestones", "3"), "--milestones: has no effect with --schedule cosine"),
    ],
)
def test_flags_without_effect_are_told(flags, message):
    with pytest.warns(HamWarning, match=message):
        told("--dataset", "digits", "--method", "pgd_at", *flags)


def test_decays_count_for_their_own_schedule_alone():
    settings = told("--schedule", "cosine")
    replace(settings, optim=replace(settings.optim, milestones=(1, 2), lr_decay=(0.1,))).check()


def test_no_epoch_is_best_without_validation_images(tmp_path):
    with pytest.raises(ValueError, match="best_by: got 'worst_class' without validation images"):
        train_command.train(
            told("--dataset", "digits", "--val-images", "0", "--best-by", "worst_class"), tmp_path / "run"
        )
    assert not (tmp_path / "run").exists()


def test_a_table_of_other_channels_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures.write_fashion_mnist(tmp_path)
    with pytest.raises(ValueError, match="normalize: cifar10's mean and std are of 3 channels, and the images have 1"):
        trained("FashionMNIST/raw", "--dataset", "cifar10", "--val-images", "1")


@pytest.mark.slow
def test_damaged_notes_are_named_and_what_can_be_done_without_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "set")
    run = trained("set")
    for name in ("status.json", "environment.json"):
        (run.path / name).write_text('{"state": ')
    with pytest.warns(HamWarning, match=r"run: run/status.json is damaged .*; the run goes on without it"):
        train_command.resume("run", quiet=True)
    assert run.status()["state"] == "finished"
    (run.path / "data.json").write_text('{"classes"')
    with pytest.raises(ValueError, match=r"run: run/data.json is damaged"):
        train_command.resume("run", quiet=True)


@pytest.mark.slow
def test_other_counts_name_the_settings_that_make_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "set")
    run = trained("set")
    config = run.path / "config.toml"
    config.write_text(config.read_text().replace("val_images = 4", "val_images = 6"))
    with pytest.raises(
        ValueError, match=r"counts was .* as config.toml's train_images, test_images and val_images say"
    ):
        train_command.resume("run", quiet=True)


def test_small_files_that_would_be_enlarged_are_told(tmp_path):
    photos(tmp_path / "set", size=16)
    (tmp_path / "set/a/odd.png").write_bytes(pictures.png(1, (16, 17)))
    with pytest.warns(HamWarning, match=r"of about 16 pixels, .* they are enlarged to 224 x 224; give --size 16"):
        images = data.class_folders(tmp_path / "set", cache=False)
    assert images.size == 224
