"""`ham train --dry-run`: its kinds of epochs, its arithmetic, and that it leaves nothing."""

from __future__ import annotations

import pytest
from runs_helper import TINY

import ham_kernels as ham
from ham_kernels.commands import cli, dry_run
from ham_kernels.commands.flags import parse_train

pytestmark = pytest.mark.usefixtures("no_gpu")


@pytest.mark.slow
def test_each_kind_of_epoch_is_timed_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dry_run, "UNTIMED", 1)
    monkeypatch.setattr(dry_run, "TIMED", 2)
    few = ["--train-images", "96", "--val-images", "20", "--batch-size", "16"]
    assert cli.main(["train", *TINY, *few, "--natural-epochs", "1", "--dry-run"]) == 0
    said, told = capsys.readouterr()
    assert "timing steps of PGD-AT ..." in told
    assert "4 epochs of 6 batches of 16, sgd with lr 0.05 (step), on " in said
    assert "epoch 1, natural: 3.0 forwards a step; " in said
    assert "epoch 2, PGD-AT: 9.0 forwards a step; " in said
    assert "epochs 3 to 4, HAM: " in said
    assert "% hard rows; " in said
    assert "validation: " in said
    assert "of 6 steps timed; checkpoints are not counted" in said
    assert "GiB of this process" in said
    assert list(tmp_path.iterdir()) == []


def test_groups_of_batches_and_few_images(monkeypatch):
    """More steps than an epoch has: 30 images are less than a batch."""
    monkeypatch.setattr(dry_run, "TIMED", 2)
    told = parse_train(
        [*TINY, "--train-images", "30", "--val-images", "0", "--method", "pgd_at", "--start-epoch", "1", "--group", "2"]
    ).settings
    estimate = dry_run.dry_run(told)
    (kind,) = estimate.kinds
    assert (kind.first, kind.last, len(kind.row_seconds), kind.hard) == (1, 4, 2, 1.0)
    assert (estimate.rows, estimate.validation) == (30, 0.0)


def test_the_arithmetic_of_an_estimate():
    """10 images; 2 epochs at 1 to 3 s an image, 3 at 4 s; 5 s of validation each. HAM at K = 10, M = 3: 7 + 17h."""
    kinds = (
        dry_run.Kind(ham.methods.PGDAT(), 1, 2, (1.0, 3.0), 1.0, 10),
        dry_run.Kind(ham.methods.HAM(), 3, 5, (4.0, 4.0, 4.0), 0.5, 10),
    )
    estimate = dry_run.Estimate(kinds, 10, 5, 5.0, "unknown")
    assert estimate.seconds() == pytest.approx(2 * 20 + 3 * 40 + 25)
    assert (estimate.seconds(min), estimate.seconds(max)) == pytest.approx((165, 205))
    assert kinds[1].forwards == 15.5
    assert estimate.seconds(hard=0.0) == pytest.approx(2 * 20 + 3 * 40 * 7 / 15.5 + 25)
    assert estimate.seconds(hard=1.0) == pytest.approx(2 * 20 + 3 * 40 * 24 / 15.5 + 25)
    whole = (
        "the whole run: 3:05, from 2:45 to 3:25 by the fastest and the slowest of 5 steps timed; checkpoints are not"
    )
    assert whole in estimate.lines()[3]
    assert "20 s (10 s to 30 s, 2 steps), 20 s an epoch" in dry_run.Estimate(kinds, 10, 128, 5.0, "").lines()[0]


def test_a_dry_run_refuses_what_a_run_does(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.toml").write_text("")
    assert cli.main(["train", *TINY, "--out", str(tmp_path / "run"), "--dry-run"]) == 2
    assert "holds a run already" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["train", "--resume", str(tmp_path / "run"), "--dry-run"])
