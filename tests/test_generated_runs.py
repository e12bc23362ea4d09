"""Runs on generated images beside real ones: their settings, what a resume may change, and what is told of them."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_runs import fake_run
from runs_helper import TINY, assert_same_weights, finish, ham

from ham_kernels.commands import train as train_command
from ham_kernels.commands.evaluate import evaluate_run
from ham_kernels.commands.export import about_of
from ham_kernels.commands.flags import parse_train
from ham_kernels.commands.model_card import model_card, robustbench_entry
from ham_kernels.report.comparing.sections import sections
from ham_kernels.report.reading.runs import read_run
from ham_kernels.report.writing.page import _shared_settings
from ham_kernels.runs.config_file import from_toml, to_toml
from ham_kernels.runs.folder import RunFolder
from ham_kernels.runs.judge_settings import EvaluateSettings
from ham_kernels.runs.presets import preset
from ham_kernels.runs.resume_rules import check_unchanged, noted

JUDGE = EvaluateSettings(attacks=("clean",), masking=False, analyses=False, device="cpu")


def write(path: Path, n: int = 300, save=np.savez_compressed) -> Path:
    """Generated digits: noise."""
    made = np.random.default_rng(n).integers(0, 256, (n, 8, 8, 1), np.uint8)
    save(path, image=made, label=np.arange(n) % 10)
    return path


def told(*flags: str):
    return parse_train([*TINY, *flags]).settings


# ---------------------------------------------------------------- settings
def test_flags_and_toml(tmp_path):
    assert (told().data.generated, told().data.generated_share) == (None, 0.7)
    settings = told("--generated", "made.npz", "--generated-share", "4/5")
    settings.check()
    assert (settings.data.generated, settings.data.generated_share) == ("made.npz", 0.8)
    (tmp_path / "c.toml").write_text(to_toml(settings))
    assert from_toml(tmp_path / "c.toml", preset("digits")).data == settings.data


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--generated-share", "0.5"), r"generated_share: got 0\.5, which has no effect without generated"),
        (("--generated", "x", "--generated-share", "1"), r"generated_share: got 1\.0; it must be above 0 and below 1"),
        (("--generated", "x", "--generated-share", "0.001"), "got 0.001 with batch_size=48, so 0 rows of a batch"),
        (("--generated", "x", "--balance", "weights"), "balance: got 'weights' with generated images"),
        (("--generated", "x", "--balance", "sampler"), "balance: got 'sampler' with generated images"),
    ],
)
def test_bad_settings(flags, message):
    with pytest.raises(ValueError, match=message):
        told(*flags).check()


def test_a_resume_may_move_the_file_and_change_no_share():
    settings = told("--generated", "made.npz")
    state = {**noted(settings), "trainer": {"epoch": 1, "running": None}}
    check_unchanged(state, replace(settings, data=replace(settings.data, generated="moved.npz")))
    for change, name in (
        (
            {"generated_share": 0.8},
            r"data\.generated_share: the checkpoint is of a run with 0\.7, config\.toml says 0\.8",
        ),
        ({"generated": None}, r"data\.generated: the checkpoint is of a run with True, config\.toml says False"),
    ):
        with pytest.raises(ValueError, match=name):
            check_unchanged(state, replace(settings, data=replace(settings.data, **change)))
    older = {**noted(told()), "trainer": {"epoch": 1, "running": None}}
    for name in ("generated", "generated_share"):  # of a time without these settings
        del older["settings"]["data"][name]
    check_unchanged(older, told())
    with pytest.raises(ValueError, match=r"data\.generated: the checkpoint is of a run with False"):
        check_unchanged(older, settings)


def test_reports_tell_shares_apart(tmp_path):
    """And say nothing of a share where there are no generated images."""
    for name, settings in (
        ("plain", {"data.generated_share": 0.7}),
        ("some", {"data.generated": "made.npz", "data.generated_share": 0.7}),
        ("most", {"data.generated": "made.npz", "data.generated_share": 0.9}),
    ):
        fake_run(tmp_path / name, settings=settings)
    (section,) = sections([read_run(tmp_path / name) for name in ("plain", "some", "most")])
    assert {group.title for group in section.groups} == {
        "HAM",
        "HAM, with made.npz, 0.7 generated",
        "HAM, with made.npz, 0.9 generated",
    }


def test_a_report_tells_what_all_groups_share():
    """A group without generated images, or on all training images, shares neither file nor number with the others."""
    told = {"data.generated": "made.npz", "data.generated_share": 0.7, "data.train_images": 100}
    trained = {"mines_hard_rows": True, "adopted": False}
    mixed, plain = (trained | {"settings": s | {"attack.steps": 10}} for s in (told, {}))
    assert _shared_settings([mixed, mixed]) == [
        "training images 100", "K 10", "generated images made.npz", "their share of a batch 0.7",
    ]  # fmt: skip
    assert _shared_settings([mixed, plain]) == ["K 10"]


# ---------------------------------------------------------------- runs
@pytest.mark.slow
@pytest.mark.usefixtures("no_gpu")
def test_a_run_goes_on_within_an_epoch(tmp_path, monkeypatch, one_thread):
    """Its file moved and packed otherwise in between; other images are refused, and judging needs none."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "made.npz")
    flags = ("--generated", "made.npz", "--generated-share", "0.5", "--augment", "crop", "--root", "root")
    train_command.train(told(*flags), "whole", quiet=True)
    original = train_command._Job._batch_end

    def stopping(job, step):
        if job.trainer.steps_done == 12:
            job.stop.number = signal.SIGTERM
        original(job, step)

    monkeypatch.setattr(train_command._Job, "_batch_end", stopping)
    with pytest.raises(train_command.Stopped):
        train_command.train(told(*flags), "run", quiet=True)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path.parent)  # the absolute place is noted
    assert evaluate_run(tmp_path / "run", JUDGE, quiet=True)
    (tmp_path / "made.npz").unlink()
    assert evaluate_run(tmp_path / "run", JUDGE, quiet=True)
    with pytest.raises(FileNotFoundError, match=r"^generated: .*made.npz is not there"):
        train_command.resume(tmp_path / "run", quiet=True)
    config = tmp_path / "run/config.toml"
    for name, n in (("other", 299), ("again", 300)):
        write(tmp_path / f"{name}.npz", n, np.savez)
        text = config.read_text().splitlines()
        line = next(i for i, words in enumerate(text) if words.startswith("generated ="))
        text[line] = f'generated = "{tmp_path / name}.npz"'
        config.write_text("\n".join(text))
        if n == 299:
            with pytest.raises(ValueError, match=r"was trained on other images: generated was \{'images': 300"):
                train_command.resume(tmp_path / "run", quiet=True)
    train_command.resume(tmp_path / "run", quiet=True)
    assert_same_weights(tmp_path / "run", tmp_path / "whole")
    run = RunFolder(tmp_path / "run")
    assert run.data_facts()["generated"]["images"] == 300
    about = about_of(run, "last", run.load_weights("last"))
    assert "Of each training batch a share of 0.5 was drawn from 300 generated images." in model_card(about, {}, run)
    assert robustbench_entry(about, {})["additional_data"] is True


@pytest.mark.slow
def test_from_the_command_line(tmp_path):
    write(tmp_path / "made.npz")
    flags = [
        *TINY,
        "--epochs",
        "1",
        "--start-epoch",
        "1",
        "--milestones",
        "--lr-decay",
        "--device",
        "cpu",
        "--out",
        "run",
    ]
    code, said = finish(ham("train", *flags, "--generated", "made.npz", cwd=tmp_path))
    assert code == 0, said
    assert "34 of 48 rows of a batch are of 300 images of made.npz" in said
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    assert line["n"] == 5 * 48  # as many batches as 240 real images make
    assert len(list((tmp_path / "data/cache").glob("made.npz-*.npy"))) == 1
    shutil.rmtree(tmp_path / "run")
    write(tmp_path / "made.npz", 20, lambda path, image, label: np.savez(path, image=image[:, :7], label=label))
    code, said = finish(ham("train", *flags, "--generated", "made.npz", cwd=tmp_path))
    assert code != 0
    assert "generated: made.npz: image has shape (20, 7, 8, 1); it must be (n, 8, 8, 1), as the training images" in said
    assert not (tmp_path / "run").exists()
