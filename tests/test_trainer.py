"""HAMTrainer: the reference's rows and losses, phases, weight average, frozen BatchNorm, epochs, failures."""

from __future__ import annotations

import copy
import math
import time

import pytest
import torch
from nets import Broken, Constant, Counting, sgd, small_cnn

import ham_kernels as ham
import ham_reference as reference
from ham_kernels import data
from ham_kernels.commands.progress import epoch_line
from ham_kernels.training.reports import EpochReport

SETTINGS = {"eps": 0.2, "step_size": 0.05, "steps": 5, "screen_steps": 2, "start_epoch": 2}


@pytest.fixture(scope="module")
def digits():
    images = data.digits()
    return images.x_train[:320].float() / 255, images.y_train[:320]


def pair(**choices):
    """Our trainer and the reference's on equal models."""
    model = small_cnn(width=16)
    twin = copy.deepcopy(model)
    settings = SETTINGS | choices
    return ham.HAMTrainer(model, sgd(model), **settings), reference.HAMTrainer(twin, sgd(twin), **settings)


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"norm": "l2", "eps": 1.0, "step_size": 0.25},
        {"reweight": False},
        {"early_drop": False},
        {"early_drop": False, "reweight": False},
        {"rows": "random"},
        {"freeze_bn": True, "ema_decay": 0.9},
        {"lam": 0.1, "seed": 11},
    ],
    ids=lambda c: ",".join(c) or "defaults",
)
def test_trainer_is_the_reference(digits, choices):
    """Same hard rows; loss within 1e-4 relative (two float32 sums of the CE gradient differ in the last bits)."""
    ours, theirs = pair(**choices)
    x, y = digits
    for epoch in (1, 2, 3):
        for rows in range(0, 320, 64):
            a = ours.train_step(x[rows : rows + 64], y[rows : rows + 64], epoch=epoch)
            b = theirs.train_step(x[rows : rows + 64], y[rows : rows + 64], epoch=epoch)
            assert (a.n, a.n_hard) == (b.n, b.n_hard)
            assert a.loss == pytest.approx(b.loss, rel=1e-4)
    for (name, p), q in zip(ours.model.state_dict().items(), theirs.model.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4, msg=name)
    if ours.ema_model is not None:
        for p, q in zip(ours.ema_model.parameters(), theirs.ema_model.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


def test_report_and_phases(digits):
    ours, _ = pair()
    x, y = digits[0][:64], digits[1][:64]
    warm_up, mining = ours.train_step(x, y, epoch=1), ours.train_step(x, y, epoch=2)
    assert (warm_up.n, warm_up.n_hard, warm_up.hard_fraction) == (64, 64, 1.0)
    assert mining.n_hard <= 64
    assert mining.hard_fraction == mining.n_hard / 64
    assert warm_up.seconds > 0


@pytest.mark.slow
def test_cost_of_a_step_is_the_cost_model(digits):
    """2K+3 for PGD-AT, 2M+1+2h(K-M)+3h for HAM, in full-batch forwards."""
    x, y = digits[0][:128], digits[1][:128]
    counting = Counting(small_cnn(width=16))
    trainer = ham.HAMTrainer(counting, sgd(counting), **SETTINGS)
    for _ in range(40):
        trainer.train_step(x, y, epoch=1)
    counting.__init__(counting.inner)
    trainer.train_step(x, y, epoch=1)
    assert counting.full_batch_forwards(128) == 2 * 5 + 3
    counting.__init__(counting.inner)
    h = trainer.train_step(x, y, epoch=2).hard_fraction
    assert 0 < h < 1
    assert counting.full_batch_forwards(128) == pytest.approx(2 * 2 + 1 + 2 * h * (5 - 2) + 3 * h)


def test_same_seed_same_weights(digits):
    x, y = digits[0][:64], digits[1][:64]
    runs = []
    for seed in (0, 0, 1):
        trainer, _ = pair(seed=seed)
        for epoch in (1, 2):
            trainer.train_step(x, y, epoch=epoch)
        runs.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_weight_average_follows_each_update(digits):
    x, y = digits[0][:64], digits[1][:64]
    trainer, _ = pair(ema_decay=0.9)  # the first update counts 9/11: the average forgets its start
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train_step(x, y, epoch=1)
    for average, old, new in zip(trainer.ema_model.parameters(), before, trainer.model.parameters(), strict=True):
        torch.testing.assert_close(average, (2 * old + 9 * new.detach()) / 11)
        assert not average.requires_grad
    assert not trainer.ema_model.training
    assert pair()[0].ema_model is None


def test_frozen_batchnorm_keeps_its_statistics_only_while_mining(digits):
    x, y = digits[0][:64], digits[1][:64]
    trainer, _ = pair(freeze_bn=True)
    bn = trainer.model[2]
    start = bn.running_mean.clone()
    trainer.train_step(x, y, epoch=1)
    warm = bn.running_mean.clone()
    weight = bn.weight.detach().clone()
    trainer.train_step(x, y, epoch=2)
    assert not torch.equal(start, warm)
    assert torch.equal(warm, bn.running_mean)
    assert not torch.equal(weight, bn.weight)  # its scale still learns


def test_no_hard_row_means_no_update():
    model = Constant([5.0, 0.0, 0.0])
    trainer = ham.HAMTrainer(model, sgd(model), **SETTINGS, ema_decay=0.5)
    x, y = torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)
    report = trainer.train_step(x, y, epoch=2)
    assert (report.loss, report.n, report.n_hard) == (0.0, 4, 0)
    assert torch.equal(model.logits.detach(), torch.tensor([5.0, 0.0, 0.0]))
    history = ham.HAMTrainer(model, sgd(model), **SETTINGS | {"start_epoch": 1}).fit([(x, y)], epochs=1)
    assert history[0].skipped == 1


@pytest.mark.parametrize("epoch", [1, 2])
def test_one_row_uses_running_statistics(digits, epoch):
    """One row has no batch statistics; BatchNorm1d would raise and BatchNorm2d would fit itself to one image."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10), torch.nn.BatchNorm1d(10))
    trainer = ham.HAMTrainer(model, sgd(model), **SETTINGS)
    wrong = (digits[1][:1] + 1) % 10  # a wrong label keeps the row hard
    report = trainer.train_step(digits[0][:1], wrong, epoch=epoch)
    assert report.n == 1
    assert model[2].num_batches_tracked == 0


def test_modes_after_a_step_are_those_before(digits):
    trainer, _ = pair()
    trainer.model.eval()
    trainer.model[1].train()
    modes = [m.training for m in trainer.model.modules()]
    trainer.train_step(digits[0][:16], digits[1][:16], epoch=2)
    assert modes == [m.training for m in trainer.model.modules()]


@pytest.mark.parametrize("only_train", [False, True], ids=["in the attack", "in the update"])
def test_nan_from_the_model_changes_nothing(digits, only_train):
    """Names epoch and batch; weights, BatchNorm statistics, optimiser and average are those of the last good step."""
    x, y = digits
    inner = small_cnn(width=16)
    model = Broken(inner, lambda z: z * math.nan, after=10**9, only_train=only_train)
    trainer = ham.HAMTrainer(model, sgd(model), **SETTINGS, ema_decay=0.9)
    trainer.train_step(x[:64], y[:64], epoch=1)
    before = copy.deepcopy((model.state_dict(), trainer.optimizer.state_dict(), trainer.ema_model.state_dict()))
    model.after = 0
    with pytest.raises(ham.NonFiniteError, match=r"epoch 1, batch 1: model: .*nothing was updated"):
        trainer.fit([(x[:64], y[:64])], epochs=2)
    after = (model.state_dict(), trainer.optimizer.state_dict(), trainer.ema_model.state_dict())
    for a, b in zip(before, after, strict=True):
        assert str(a) == str(b)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert trainer.epoch == 0


def test_fit_history_and_validation(digits):
    x, y = digits
    trainer, _ = pair(ema_decay=0.9)
    loader = [(x[i : i + 64], y[i : i + 64]) for i in range(0, 192, 64)]
    scheduler = torch.optim.lr_scheduler.StepLR(trainer.optimizer, 1, gamma=0.5)
    seen = []
    history = trainer.fit(loader, 3, val_loader=loader[:1], scheduler=scheduler, on_epoch_end=seen.append)
    assert [r.epoch for r in history] == [1, 2, 3]
    assert [r.phase for r in history] == ["pgd_at", "ham", "ham"]
    assert seen == history
    assert [r.n for r in history] == [192] * 3
    assert history[0].hard_fraction == 1.0
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.05 * 0.5**3)
    for report in history:
        assert set(report.val) == set(report.val_ema) == {"clean", "pgd20"}
    assert trainer.fit(loader, 4)[-1].epoch == 4
    with pytest.raises(ValueError, match="epochs: got 4, but 4 are done"):
        trainer.fit(loader, 4)


def test_the_time_in_which_a_batch_was_not_there(digits):
    x, y = digits

    class Loader:
        def __iter__(self):
            for part in zip(x.split(160), y.split(160), strict=True):
                time.sleep(0.3)
                yield part

    report = pair(start_epoch=1)[0].fit(Loader(), 1)[0]
    assert 0.6 <= report.waited <= report.seconds
    assert f"{report.waited / report.seconds:.0%} of it waiting for images (--workers)" in epoch_line(report)
    back = EpochReport.from_dict({k: v for k, v in report.to_dict().items() if k != "waited"})
    assert back.waited is None  # of a checkpoint of before
    assert "waiting" not in epoch_line(back)


def test_ham_loss_is_the_references_and_trains(digits):
    x, y = digits[0][:64], digits[1][:64]
    model = small_cnn(width=16)
    twin = copy.deepcopy(model)
    settings = {"eps": 0.2, "step_size": 0.05, "steps": 5, "screen_steps": 2}
    ours = ham.ham_loss(model, x, y, **settings, generator=torch.Generator().manual_seed(7))
    theirs = reference.ham_loss(twin, x, y, **settings, generator=torch.Generator().manual_seed(7))
    ours.backward()
    theirs.backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-4)
    assert model.training
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5)


def test_ham_loss_without_a_hard_row_is_zero():
    model = Constant([9.0, 0.0])
    loss = ham.ham_loss(model, torch.rand(4, 1, 4, 4), torch.zeros(4, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0.0
    assert not model.logits.grad.any()  # a zero that GradScaler takes for one


def test_bf16_training_runs_and_learns(digits):
    x, y = digits
    trainer, _ = pair()
    model = trainer.model
    half = ham.HAMTrainer(model, sgd(model), **SETTINGS, precision="bf16")
    first = half.train_step(x[:128], y[:128], epoch=1).loss
    for _ in range(15):
        last = half.train_step(x[:128], y[:128], epoch=1).loss
    assert last < first
    assert all(p.dtype == torch.float32 for p in model.parameters())
