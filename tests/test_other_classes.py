"""Weights and teachers of runs on other classes, and teachers that cannot take the images."""

from __future__ import annotations

import pytest
import torch
from test_run_images import SHORT, photos, trained

from ham_kernels.commands import train as train_command
from ham_kernels.commands.flags import parse_train
from ham_kernels.runs.folder import RunFolder

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ham_kernels.HamWarning")]


@pytest.fixture
def origin(tmp_path, monkeypatch):
    """A run on classes a and b."""
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "ab")
    run = trained("ab", "--method", "pgd_at")
    return str(run.path.rename(tmp_path / "origin"))


def goes_on(origin: str, path: str, *more: str):
    wanted = parse_train(["--from", origin, "--path", path, "--epochs", "1", "--val-attack", "pgd1", *more])
    return train_command.prepared(wanted.settings, "next")


def test_a_head_of_other_classes_is_new_though_there_are_as_many(origin, tmp_path):
    photos(tmp_path / "xy", classes="xy")
    theirs = RunFolder(origin).load_weights("ema")["model"]
    same, other = goes_on(origin, "ab"), goes_on(origin, "xy")
    assert "new, for other classes" not in same.begun
    assert other.begun.endswith("new, for other classes: 12.weight, 12.bias")
    ours = other.trainer.model.state_dict()
    assert not torch.equal(ours["12.weight"], theirs["12.weight"])
    assert torch.equal(ours["1.weight"], theirs["1.weight"])
    assert torch.equal(same.trainer.model.state_dict()["12.weight"], theirs["12.weight"])


@pytest.mark.parametrize("classes", ["xy", "xyz"])
def test_offsets_are_of_no_random_head(origin, classes, tmp_path):
    photos(tmp_path / "others", classes=classes)
    with pytest.raises(
        ValueError, match=r"weights: .* knows other classes, so that 12.weight, 12.bias would be random"
    ):
        goes_on(origin, "others", "--method", "offsets")
    goes_on(origin, "ab", "--method", "offsets")


def test_a_teacher_knows_the_same_classes(origin, tmp_path):
    photos(tmp_path / "xy", classes="xy")
    told = ["--path", "xy", *SHORT, "--method", "rslad", "--teacher", origin]
    with pytest.raises(ValueError, match=r"teacher: .* knows class 'a' where these images have 'x'"):
        train_command.prepared(parse_train(told).settings, "next")
    train_command.prepared(parse_train([*told, "--path", "ab"]).settings, "next")


def test_a_teacher_that_cannot_take_the_images_is_named_before_the_run_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flat.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(192, 2))\n"
    )
    photos(tmp_path / "small")
    photos(tmp_path / "large", size=12)
    teacher = trained("small", "--method", "pgd_at", "--model", "flat:make").path.rename(tmp_path / "teacher")
    told = ["--path", "large", *SHORT, "--method", "rslad", "--teacher", str(teacher)]
    with pytest.raises(ValueError, match=r"teacher: .* cannot take images of shape \(3, 12, 12\)"):
        train_command.train(parse_train(told).settings, "student", quiet=True)
    assert not (tmp_path / "student").exists()


def test_another_teacher_of_a_distilled_run(origin, tmp_path):
    told = ["--path", "ab", *SHORT, "--method", "rslad", "--teacher", origin]
    train_command.train(parse_train(told).settings, "distilled", quiet=True)
    trained("ab", "--method", "pgd_at", "--seed", "5").path.rename(tmp_path / "other")
    for base in (["--from", "distilled"], ["--config", "distilled/config.toml"]):
        again = parse_train([*base, "--teacher", "other", "--val-attack", "pgd1"]).settings
        assert again.run.teacher_digest is None
        assert parse_train(base).settings.run.teacher_digest is not None
        train_command.prepared(again, "next")
