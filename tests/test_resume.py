"""Runs that are stopped, killed or damaged: they go on, and end with the same weights, bit by bit."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess

import numpy as np
import pictures
import pytest
import torch
from runs_helper import TINY, assert_same_weights, finish, ham, wait_for

from ham_kernels import models
from ham_kernels.commands import train as train_command
from ham_kernels.commands.flags import parse_train
from ham_kernels.commands.signals import StopRequest
from ham_kernels.common import files
from ham_kernels.runs import checkpoints
from ham_kernels.runs.folder import RunFolder
from ham_kernels.training.trainer import Trainer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.usefixtures("no_gpu")]


def settings(*more: str):
    return parse_train([*TINY, *more]).settings


@pytest.fixture(scope="module")
def reference(tmp_path_factory, one_thread):
    """The run that nobody disturbed."""
    out = tmp_path_factory.mktemp("reference") / "run"
    train_command.train(settings(), out, quiet=True)
    return out


# ---------------------------------------------------------------- within one process
@pytest.mark.parametrize("stop_at", [1, 5, 7, 13, 20])
def test_stop_after_any_batch(stop_at, reference, tmp_path, monkeypatch, one_thread):
    """Five batches an epoch: within the first, at an epoch's last batch, in both phases, at the very end."""
    count = 0
    original = train_command._Job._batch_end

    def stopping(job, step):
        nonlocal count
        count += 1
        if count == stop_at:
            job.stop.number = signal.SIGTERM
        original(job, step)

    monkeypatch.setattr(train_command._Job, "_batch_end", stopping)
    with pytest.raises(train_command.Stopped):
        train_command.train(settings(), tmp_path / "run", quiet=True)
    assert RunFolder(tmp_path / "run").status()["state"] == "interrupted"
    monkeypatch.undo()
    torch.rand(3)  # the generators have moved on since
    trainer = train_command.resume(tmp_path / "run", quiet=True)
    assert trainer.epoch == 4
    assert_same_weights(tmp_path / "run", reference)


@pytest.mark.parametrize(
    "more",
    [
        ("--optimizer", "adamw", "--grad-clip", "0.5", "--balance", "weights"),
        ("--balance", "sampler", "--augment", "crop"),
    ],
)
def test_optimizers_and_balance_go_on_within_an_epoch(more, tmp_path, monkeypatch, one_thread):
    told = settings(*more)
    train_command.train(told, tmp_path / "whole", quiet=True)
    original = train_command._Job._batch_end

    def stopping(job, step):
        if job.trainer.steps_done == 12:
            job.stop.number = signal.SIGTERM
        original(job, step)

    monkeypatch.setattr(train_command._Job, "_batch_end", stopping)
    with pytest.raises(train_command.Stopped):
        train_command.train(told, tmp_path / "run", quiet=True)
    monkeypatch.undo()
    train_command.resume(tmp_path / "run", quiet=True)
    assert_same_weights(tmp_path / "run", tmp_path / "whole")


def test_random_generators_go_on_too(tmp_path, monkeypatch, one_thread):
    """A model with dropout draws from torch's global generator in every update."""
    create = models.create

    def with_dropout(*args, **options):
        return torch.nn.Sequential(create(*args, **options), torch.nn.Dropout(0.3))

    monkeypatch.setattr(models, "create", with_dropout)
    train_command.train(settings(), tmp_path / "reference", quiet=True)
    original = train_command._Job._batch_end

    def stopping(job, step):
        if job.trainer.steps_done == 7:
            job.stop.number = signal.SIGTERM
        original(job, step)

    with monkeypatch.context() as patch:
        patch.setattr(train_command._Job, "_batch_end", stopping)
        with pytest.raises(train_command.Stopped):
            train_command.train(settings(), tmp_path / "run", quiet=True)
    torch.rand(3)
    train_command.resume(tmp_path / "run", quiet=True)
    assert_same_weights(tmp_path / "run", tmp_path / "reference")


def test_a_seed_is_of_every_generator(tmp_path, monkeypatch, one_thread):
    """A model of the user's may draw from Python's generator and NumPy's, when it is made and in its forward."""
    create = models.create

    class Drawing(torch.nn.Module):
        def forward(self, z):
            return z * (1 + 0.1 * random.random() + 0.1 * np.random.rand())  # noqa: NPY002

    monkeypatch.setattr(models, "create", lambda *args, **how: torch.nn.Sequential(create(*args, **how), Drawing()))
    for name in ("one", "two"):
        train_command.train(settings(), tmp_path / name, quiet=True)
    assert_same_weights(tmp_path / "one", tmp_path / "two")


def test_stop_in_validation(reference, tmp_path, monkeypatch, one_thread):
    judged = 0
    original = Trainer.judged

    def stopping(self, model, loader, attacks):
        nonlocal judged
        judged += 1
        if judged == 4:  # the average, in the second epoch
            loader._stop.number = signal.SIGINT
        return original(self, model, loader, attacks)

    monkeypatch.setattr(Trainer, "judged", stopping)
    with pytest.raises(train_command.Stopped):
        train_command.train(settings(), tmp_path / "run", quiet=True)
    monkeypatch.undo()
    train_command.resume(tmp_path / "run", quiet=True)
    assert_same_weights(tmp_path / "run", reference)


def test_two_processes_do_not_share_a_run(tmp_path, monkeypatch, one_thread):
    run = RunFolder.create(tmp_path / "run", settings())
    monkeypatch.setattr(RunFolder.alone.__wrapped__, "__defaults__", (".lock", 0.2))
    with run.alone():
        assert run.busy()
        with pytest.raises(BlockingIOError, match="another process works on"):
            train_command.resume(tmp_path / "run", quiet=True)
    assert not run.busy()


def test_a_failure_is_noted_and_can_be_resumed(reference, tmp_path, monkeypatch, one_thread):
    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr(train_command._Job, "_keep_best", broken)
    with pytest.raises(OSError, match="disk full"):
        train_command.train(settings(), tmp_path / "run", quiet=True)
    status = RunFolder(tmp_path / "run").status()
    assert status["state"] == "failed"
    assert "disk full" in status["message"]
    monkeypatch.undo()
    train_command.resume(tmp_path / "run", quiet=True)
    assert_same_weights(tmp_path / "run", reference)


@pytest.mark.parametrize("when", ["_batch_end", "_keep_best", "within a write"])
@pytest.mark.parametrize("how", ["moved", "removed"])
def test_a_run_that_is_moved_or_removed_leaves_no_half_run(how, when, reference, tmp_path, monkeypatch, one_thread):
    run, moved = tmp_path / "run", tmp_path / "moved"
    owner, name = (checkpoints, "save") if when == "within a write" else (train_command._Job, when)
    original = getattr(owner, name)

    def vanishing(*told):
        if (run / "checkpoints").exists():
            run.rename(moved) if how == "moved" else shutil.rmtree(run)
        return original(*told)

    monkeypatch.setattr(owner, name, vanishing)
    with pytest.raises(FileNotFoundError, match=r"^out: .*run has been moved or removed while it was trained"):
        train_command.train(settings(), run, quiet=True)
    assert not run.exists()
    if how == "moved":
        monkeypatch.undo()
        train_command.resume(moved, quiet=True)
        assert_same_weights(moved, reference)


def test_what_others_wrote_where_a_run_was_stays(tmp_path, monkeypatch):
    run = RunFolder.create(tmp_path / "run", settings())
    original = files.write_atomically

    def meanwhile(path, *parts):
        (run.path / "config.toml").unlink()
        (run.path / "notes.txt").write_text("of another")
        original(path, *parts)

    monkeypatch.setattr("ham_kernels.runs.folder.write_atomically", meanwhile)
    with pytest.raises(FileNotFoundError, match=r"^out: .* has been moved or removed"):
        run.write_json("evaluation/last.json", {})
    assert os.listdir(run.path) == ["notes.txt"]


# ---------------------------------------------------------------- processes and signals
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_ends_with_a_checkpoint(number, code, reference, tmp_path):
    for _ in range(5):  # on a busy machine the signal can come after the end
        process = ham("train", *TINY, "--out", "run", cwd=tmp_path)
        wait_for((tmp_path / "run/status.json").exists, process)
        process.send_signal(number)
        status, out = finish(process)
        if status:
            break
        shutil.rmtree(tmp_path / "run")
    assert status == code, out
    assert f"{signal.Signals(number).name}: stops after this batch; again: at once" in out
    assert f"stopped by {signal.Signals(number).name}; go on with `ham train --resume run`" in out
    state = json.loads((tmp_path / "run/status.json").read_text())
    assert state["state"] == "interrupted"
    status, out = finish(ham("train", "--resume", "run", "--quiet", cwd=tmp_path))
    assert (status, out) == (0, "")
    assert_same_weights(tmp_path / "run", reference)
    sessions = json.loads((tmp_path / "run/environment.json").read_text())["sessions"]
    assert len(sessions) == 2
    assert all(s["ended"] and s["machine"]["cpu"] for s in sessions)
    assert (sessions[0]["from_epoch"], sessions[0]["from_batch"]) == (1, 0)


def kill_at_random_moments(kills: int, rng: random.Random, folder) -> None:
    """kill -9, as often as asked, each at a random moment of the work; then the run is left to end."""
    killed = 0
    while killed < kills:
        resumed = (folder / "run/config.toml").exists()
        before = written_at(folder / "run/status.json")
        if resumed:
            process = ham("train", "--resume", "run", "--quiet", cwd=folder)
        else:
            process = ham("train", *TINY, "--checkpoint-minutes", "0", "--out", "run", "--quiet", cwd=folder)
        wait_for(lambda before=before: written_at(folder / "run/status.json") != before, process)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0.0, 0.8))  # a checkpoint after each batch: kills hit the writing, too
        process.kill()
        code, out = finish(process)
        if code == 0:  # it came through: anew, so that every kill hits work
            (folder / "run").rename(folder / f"done-{rng.random()}")
        else:
            assert code == -signal.SIGKILL, out
            killed += 1
    if (folder / "run").exists():
        code, out = finish(ham("train", "--resume", "run", cwd=folder))
        assert code == 0, out


def written_at(path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


@pytest.mark.parametrize(
    "kills", [pytest.param(3, id="3 kills"), pytest.param(20, id="20 kills", marks=pytest.mark.thorough)]
)
def test_kill_loses_nothing(kills, reference, tmp_path, seed):
    kill_at_random_moments(kills, random.Random(seed), tmp_path)
    runs = [p for p in tmp_path.iterdir() if (p / "config.toml").exists()]
    assert runs
    for run in runs:
        assert_same_weights(run, reference)
        assert not list((run / "checkpoints").glob(".*"))  # what a kill tore is swept up


# ---------------------------------------------------------------- damaged files
def damage(path, rng: random.Random) -> str:
    """Cuts the file, flips a bit, overwrites a stretch or swaps it for nothing; says what it did."""
    data = bytearray(path.read_bytes())
    kind = rng.choice(["cut", "flip", "stretch", "append", "empty"])
    at = rng.randrange(len(data))
    if kind == "cut":
        data = data[:at]
    elif kind == "flip":
        data[at] ^= 1 << rng.randrange(8)
    elif kind == "stretch":
        before = bytes(data)
        while bytes(data) == before:
            data[at : at + 64] = rng.randbytes(len(data[at : at + 64]))
    elif kind == "append":
        data += rng.randbytes(5)
    else:
        data = bytearray()
    path.write_bytes(data)
    return f"{kind} at {at}"


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, one_thread):
    """A run stopped in its last epoch, with two checkpoints."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    patch = pytest.MonkeyPatch()
    original = train_command._Job._batch_end

    def stopping(job, step):
        if job.trainer.steps_done == 17:
            job.stop.number = signal.SIGTERM
        original(job, step)

    patch.setattr(train_command._Job, "_batch_end", stopping)
    with pytest.raises(train_command.Stopped):
        train_command.train(settings(), out, quiet=True)
    patch.undo()
    return out


@pytest.mark.parametrize(
    "places", [pytest.param(8, id="8 places"), pytest.param(100, id="100 places", marks=pytest.mark.thorough)]
)
def test_damage_is_found_and_named(places, stopped, tmp_path, seed):
    """The newest checkpoint altered in one place: named, set aside, and the one before it is used, unchanged."""
    rng = random.Random(seed)
    newest, previous = RunFolder(stopped).checkpoints.newest_first()
    good = files.load(previous)
    for _ in range(places):
        folder = tmp_path / "checkpoints"
        folder.mkdir(exist_ok=True)
        for path in (newest, previous):
            (folder / path.name).write_bytes(path.read_bytes())
        what = damage(folder / newest.name, rng)
        with pytest.warns(UserWarning, match=f"{newest.name} (is truncated|was altered)"):
            found, state, _ = checkpoints.Checkpoints(folder).load_newest(set_aside=True)
        assert found.name == previous.name, what
        assert state["trainer"]["steps_done"] == good["trainer"]["steps_done"]
        assert torch.equal(state["random"]["torch"], good["random"]["torch"])
        assert (folder / newest.name).with_suffix(".damaged").exists()
        assert not (folder / newest.name).exists()


def test_resume_after_damage_ends_the_same(stopped, reference, tmp_path, seed, one_thread):
    shutil.copytree(stopped, tmp_path / "run")
    damage(RunFolder(tmp_path / "run").checkpoints.newest_first()[0], random.Random(seed))
    with pytest.warns(UserWarning, match="the one before it is used"):
        train_command.resume(tmp_path / "run", quiet=True)
    assert_same_weights(tmp_path / "run", reference)


def test_no_intact_checkpoint_is_an_error(stopped, tmp_path, seed):
    shutil.copytree(stopped, tmp_path / "run")
    rng = random.Random(seed)
    for path in RunFolder(tmp_path / "run").checkpoints.newest_first():
        damage(path, rng)
    for _ in range(2):  # nor is it a new run the second time
        with (
            pytest.warns(UserWarning, match="if that is intact"),
            pytest.raises(files.CheckpointError, match=r"none of step_\d+.pt, step_\d+.pt"),
        ):
            train_command.resume(tmp_path / "run", quiet=True)


def test_a_reader_sets_nothing_aside(stopped, tmp_path, monkeypatch):
    """Nor is a checkpoint damaged that this process has no memory for."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(stopped / "checkpoints", folder)
    before = sorted(p.name for p in folder.iterdir())
    kept = checkpoints.Checkpoints(folder)
    damage(kept.newest_first()[0], random.Random(1))
    with pytest.warns(UserWarning, match="the one before it is used"):
        assert kept.load_newest()[0] == kept.newest_first()[1]

    def full(*_, **__):
        raise MemoryError

    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(MemoryError), pytest.warns(UserWarning, match="the one before it"):
        kept.load_newest(set_aside=True)
    assert before == sorted(p.name for p in folder.iterdir())


def test_another_number_of_threads_is_said(stopped, tmp_path, one_thread):
    shutil.copytree(stopped, tmp_path / "run")
    torch.set_num_threads(2)
    try:
        with pytest.warns(UserWarning, match="has used 1 CPU threads and goes on with 2"):
            train_command.resume(tmp_path / "run", quiet=True)
    finally:
        torch.set_num_threads(1)


def test_changed_settings_need_a_new_run(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    config = tmp_path / "run/config.toml"
    text = config.read_text()
    config.write_text(text.replace("lr = 0.05", "lr = 0.01"))
    with pytest.raises(ValueError, match=r"optim.lr: the checkpoint is of a run with 0.05, config.toml says 0.01"):
        train_command.resume(tmp_path / "run", quiet=True)
    config.write_text(text.replace("milestones = [\n    4,\n]", "milestones = [2, 4]"))
    with pytest.raises(ValueError, match="lr_decay: got 1 factors for 2 milestones"):
        train_command.resume(tmp_path / "run", quiet=True)


def test_epochs_are_no_fewer_than_begun(reference, tmp_path):
    shutil.copytree(reference, tmp_path / "run")
    config = tmp_path / "run/config.toml"
    config.write_text(config.read_text().replace("epochs = 4", "epochs = 3"))
    before = (tmp_path / "run/status.json").read_text()
    with pytest.raises(ValueError, match=r"optim\.epochs: config\.toml says 3, but the checkpoint is of epoch 4"):
        train_command.resume(tmp_path / "run", quiet=True)
    assert (tmp_path / "run/status.json").read_text() == before


def test_a_checkpoint_may_be_older_than_a_setting(stopped, tmp_path, one_thread):
    shutil.copytree(stopped, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    path, state, _ = run.checkpoints.load_newest()
    young = ("optimizer", "adam_betas", "adam_eps", "grad_clip", "balance")
    for name in young:
        del state["settings"]["data" if name == "balance" else "optim"][name]
    files.save(path, state)
    config = run.path / "config.toml"
    text = config.read_text()
    lines = text.replace("adam_betas = [\n    0.9,\n    0.999,\n]\n", "").splitlines()
    config.write_text("\n".join(line for line in lines if not line.startswith(young)))
    assert not any(name in config.read_text() for name in young)
    assert train_command.resume(run.path, quiet=True).epoch == 4
    config.write_text(text.replace('optimizer = "sgd"', 'optimizer = "adamw"'))
    with pytest.raises(ValueError, match=r"optim.optimizer: .* of a run with sgd, config.toml says adamw"):
        train_command.resume(run.path, quiet=True)


def test_how_it_runs_may_change(stopped, tmp_path, one_thread):
    shutil.copytree(stopped, tmp_path / "run")
    config = tmp_path / "run/config.toml"
    text = config.read_text()
    for name in ("channels_last", "winograd"):
        assert f'{name} = "off"' in text
        text = text.replace(f'{name} = "off"', f'{name} = "on"')
    config.write_text(text)
    assert train_command.resume(tmp_path / "run", quiet=True).epoch == 4


def test_the_images_may_move(tmp_path, one_thread):
    """Their path is no setting of the training: data.json tells whether they are the same."""
    names = [f"{part}/{c}/{i}.png" for part, n in (("train", 60), ("test", 4)) for c in "ab" for i in range(n)]
    before, after = tmp_path / "before", tmp_path / "after"
    pictures.write_folder(before, names)
    moved = settings("--path", str(before), "--root", str(tmp_path / "data"))
    RunFolder.create(tmp_path / "run", moved)
    train_command.resume(tmp_path / "run", until_epoch=1, quiet=True)
    before.rename(after)
    config = tmp_path / "run/config.toml"
    config.write_text(config.read_text().replace(str(before), str(after)))
    assert train_command.resume(tmp_path / "run", quiet=True).epoch == 4


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            stop.check()
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
