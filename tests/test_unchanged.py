"""The method of a run stays what it was once mining has begun; before that, runs share their warm-ups."""

from __future__ import annotations

import shutil
import signal

import pytest
from runs_helper import TINY

from ham_kernels.commands import train as train_command
from ham_kernels.commands.flags import parse_train
from ham_kernels.common import files
from ham_kernels.runs.folder import RunFolder

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("no_gpu")]


def stopped_after(batches: int, out) -> None:
    """A run of 5 batches an epoch, stopped; mining starts with epoch 3."""
    original = train_command._Job._batch_end

    def stopping(job, step):
        if job.trainer.steps_done == batches:
            job.stop.number = signal.SIGTERM
        original(job, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_command._Job, "_batch_end", stopping)
        with pytest.raises(train_command.Stopped):
            train_command.train(parse_train(list(TINY)).settings, out, quiet=True)


@pytest.fixture(scope="module")
def mining(tmp_path_factory, one_thread):
    out = tmp_path_factory.mktemp("mining") / "run"
    stopped_after(11, out)
    return out


def change(run, old: str, new: str) -> None:
    config = run / "config.toml"
    text = config.read_text()
    assert text.count(old) == 1
    config.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            'name = "ham"',
            'name = "pgd_at"',
            "method.name: .* of a run with ham, config.toml says pgd_at",
        ),
        ("screen_steps = 1", "screen_steps = 2", "method.screen_steps: .* with 1, config.toml says 2"),
        ("lam = 1.0", "lam = 9.0", r"method.lam: .* with 1.0, config.toml says 9.0; such a change needs a new run"),
        ("start_epoch = 3", "start_epoch = 4", "method.start_epoch: .* with 3, config.toml says 4"),
    ],
)
def test_the_method_stays_once_mining_has_begun(old, new, message, mining, tmp_path):
    shutil.copytree(mining, tmp_path / "run")
    change(tmp_path / "run", old, new)
    before = {p.name: p.read_bytes() for p in (tmp_path / "run/checkpoints").iterdir()}
    with pytest.raises(ValueError, match=message):
        train_command.resume(tmp_path / "run", quiet=True)
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "run/checkpoints").iterdir()}


def test_what_says_nothing_of_the_method_may_change(mining, tmp_path, one_thread):
    shutil.copytree(mining, tmp_path / "run")
    change(tmp_path / "run", "checkpoint_minutes = 10.0", 'checkpoint_minutes = 0.5\nlabel = "mine"')
    assert train_command.resume(tmp_path / "run", until_epoch=3, quiet=True).epoch == 3
    assert train_command.resume(tmp_path / "run", quiet=True).epoch == 4


@pytest.mark.parametrize("batches", [3, 10])
def test_a_warm_up_is_of_any_method(batches, tmp_path, one_thread):
    """Within an epoch, and at the end of the last one before mining; what it goes on with then stays."""
    stopped_after(batches, tmp_path / "run")
    change(tmp_path / "run", "lam = 1.0", "lam = 2.0")
    train_command.resume(tmp_path / "run", until_epoch=3, quiet=True)
    change(tmp_path / "run", "lam = 2.0", "lam = 1.0")
    with pytest.raises(ValueError, match=r"method.lam: .* with 2.0"):
        train_command.resume(tmp_path / "run", quiet=True)


@pytest.mark.parametrize("schedule", ["step", "cosine", "one_cycle"])
def test_a_run_grows_longer_where_that_leaves_its_learning_rates(schedule, tmp_path, one_thread):
    run = RunFolder.create(tmp_path / "run", parse_train([*TINY, "--schedule", schedule]).settings)
    change(run.path, "epochs = 4", "epochs = 5")
    train_command.resume(run.path, until_epoch=1, quiet=True)  # nothing done before it: free
    change(run.path, "epochs = 5", "epochs = 6")
    if schedule == "step":
        assert train_command.resume(run.path, until_epoch=2, quiet=True).epoch == 2
    else:
        with pytest.raises(ValueError, match=r"optim.epochs: .* with 5, config.toml says 6; such a change needs a new"):
            train_command.resume(run.path, until_epoch=2, quiet=True)


def test_mining_cannot_begin_in_the_past(tmp_path, one_thread):
    stopped_after(10, tmp_path / "run")
    change(tmp_path / "run", "start_epoch = 3", "start_epoch = 2")
    with pytest.raises(ValueError, match=r"method.start_epoch: .* with 3, config.toml says 2"):
        train_command.resume(tmp_path / "run", quiet=True)


def test_pgd_at_is_a_warm_up_at_any_epoch(tmp_path, one_thread):
    run = RunFolder.create(tmp_path / "run", parse_train([*TINY, "--method", "pgd_at", "--start-epoch", "1"]).settings)
    train_command.resume(run.path, until_epoch=2, quiet=True)
    was = 'name = "pgd_at"\nstart_epoch = 1\nearly_drop = false'
    change(run.path, was, 'name = "ham"\nstart_epoch = 3\nearly_drop = true')
    assert [r.phase for r in train_command.resume(run.path, quiet=True).history] == ["pgd_at", "pgd_at", "ham", "ham"]


def test_a_checkpoint_of_an_earlier_version_goes_on(mining, tmp_path, one_thread):
    shutil.copytree(mining, tmp_path / "run")
    newest = RunFolder(tmp_path / "run").checkpoints.newest_first()[0]
    state = files.load(newest)
    del state["method"], state["epochs"]
    files.save(newest, state)
    assert train_command.resume(tmp_path / "run", quiet=True).epoch == 4
