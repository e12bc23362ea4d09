"""A method of one's own by MODULE:CLASS: the file that docs/methods.md shows, as a user would run it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nets import sgd, small_cnn
from torch import nn

import ham_kernels as ham
from ham_kernels.commands import cli
from ham_kernels.methods.registry import class_of

DOC = (Path(__file__).parents[1] / "docs" / "methods.md").read_text()
SHORT = (
    "--dataset", "digits", "--model", "small_cnn", "--epochs", "2", "--steps", "2", "--train-images", "256",
    "--test-images", "40", "--val-attack", "pgd1", "--device", "cpu",
)  # fmt: skip


def shown(words: str) -> str:
    return next(block for block in re.findall(r"```python\n(.*?)```", DOC, re.DOTALL) if words in block)


def ham_command(*words: str, at: Path) -> subprocess.CompletedProcess:
    """In a process of its own, which knows no other method of this name."""
    command = [sys.executable, "-m", "ham_kernels", *words]
    return subprocess.run(command, cwd=at, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_it_trains_goes_on_is_judged_swept_and_compared(tmp_path):
    (tmp_path / "my_method.py").write_text(shown("my_method.py"))
    for words in (
        ("train", "--method", "my_method:Focal", "--gamma", "1", *SHORT, "--early-drop", "--screen-steps", "1"),
        ("train", "--resume", "runs/digits-focal-seed0"),
        ("evaluate", "runs/digits-focal-seed0", "--attacks", "clean", "fgsm", "--no-masking", "--no-analyses"),
        (
            "sweep",
            "methods",
            "--only",
            "my_method:Focal",
            *SHORT,
            "--screen-steps",
            "1",
            "--attacks",
            "clean",
            "fgsm",
            "--no-masking",
        ),
        ("report", "runs/digits-focal-seed0", "--out", "report", "--no-pdf"),
    ):
        done = ham_command(*words, at=tmp_path)
        assert done.returncode == 0, done.stderr
    assert 'name = "my_method:Focal"' in (tmp_path / "runs/digits-focal-seed0/config.toml").read_text()
    assert (tmp_path / "runs/sweep-digits/focal-seed0/evaluation/ema.json").exists()
    (section,) = json.loads((tmp_path / "report/data.json").read_text())["sections"]
    assert section["groups"][0]["title"].startswith("Focal AT, early drop")
    assert section["groups"][0]["settings"]["method.gamma"] == 1.0


def test_a_loop_with_an_objective_teaches_it_of_classes():
    model = small_cnn()
    told = {
        "ham": ham, "model": model, "optimizer": sgd(model), "epochs": 2,
        "train_loader": [(torch.rand(20, 1, 8, 8), torch.arange(20) % 10) for _ in range(2)],
    }  # fmt: skip
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    exec(shown("Objective"), told)
    assert told["objective"].epoch == 3
    assert told["objective"].class_totals.abs().sum() > 0
    assert not torch.equal(before, nn.utils.parameters_to_vector(model.parameters()))
    with pytest.raises(TypeError, match="end: got int; it must be"):
        told["objective"].end_epoch(3)


def test_what_is_no_method_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "no_method_here.py").write_text(
        "class Mine:\n    pass\nimport ham_kernels.methods as m\nBase = m.Method\n"
    )
    for address, words in (
        ("not_there:Mine", "method: not_there cannot be imported"),
        ("no_method_here:Other", "method: no_method_here has no class 'Other'"),
        ("no_method_here:Mine", "is no class below ham_kernels.methods.Method with a name of its own"),
        ("no_method_here:Base", "is no class below ham_kernels.methods.Method with a name of its own"),
        (":Mine", "it must be MODULE:CLASS"),
    ):
        assert cli.main(["train", "--method", address]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_methods_of_ours_are_told_by_their_name():
    assert ham.methods.TRADES().address == "trades"
    assert class_of("ham_kernels.methods.trades:TRADES") is ham.methods.TRADES
