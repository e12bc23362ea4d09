"""CUDA graphs change nothing of training: on the CPU with a stand-in for a graph."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from engine_helpers import CPU, SETTINGS, digits, ragged_batches
from graph_helpers import (
    RAGGED,
    Recorder,
    assert_same_model,
    assert_same_steps,
    rerun,
    trainer_of,
    twins,
)
from nets import Broken, sgd, small_cnn
from objectives import keep, mine
from torch import Tensor, nn

import ham_kernels as ham
import ham_reference as reference
from ham_kernels.attack.replay import Bucket
from ham_kernels.engine import PLAIN, Engine, EngineOptions, EngineWarning
from ham_kernels.engine.graphs import BUCKETS, Graphs, bucket_of


@pytest.fixture(scope="module")
def batches():
    return ragged_batches(RAGGED)


def test_tape_is_a_graph():
    """It repeats what was done on the same memory, not the Python; its own tensors do not outlive a replay."""
    x, out, factor, seen = torch.ones(3), torch.zeros(3), 2.0, []

    def fn():
        z = x * factor
        seen.append(z)
        out.copy_(z + 1)

    (replay,) = Recorder()([fn], CPU, None)
    x, factor = x.fill_(5.0), 3.0
    replay()
    assert out.tolist() == [11.0] * 3
    assert len(seen) == 3
    assert seen[-1].isnan().all()


@pytest.mark.parametrize(
    ("choices", "capture"),
    [
        ({}, rerun),
        ({}, Recorder()),
        ({"norm": "l2", "eps": 1.0, "step_size": 0.25}, Recorder()),
        ({"reweight": False}, Recorder()),
        ({"early_drop": False, "lam": 0.1}, Recorder()),
        ({"rows": "random", "seed": 11}, Recorder()),
        ({"freeze_bn": True, "ema_decay": 0.9}, Recorder()),
    ],
    ids=lambda v: (",".join(v) or "defaults") if isinstance(v, dict) else type(v).__name__,
)
def test_graphs_give_the_references_training(batches, choices, capture):
    model = small_cnn()
    twin = copy.deepcopy(model)
    ours = trainer_of(model, capture, **choices)
    theirs = reference.HAMTrainer(twin, sgd(twin), **SETTINGS | choices)
    assert_same_steps(ours, theirs, batches)
    if ours.ema_model is not None:
        assert_same_model(ours.ema_model, theirs.ema_model)


@pytest.mark.parametrize(
    "choices",
    [
        {"screen": "one_step"},
        {"round_to": 16},
        {"bn_rows": "all"},
        {"channels_last": True},
        {"group": 2, "group_updates": "one"},
        {"warm_up": "n_fgsm"},
        {"natural_epochs": 1},
    ],
    ids=lambda c: ",".join(c),
)
def test_graphs_change_nothing(batches, choices):
    """What the reference does not know, against the same trainer without graphs."""
    model = small_cnn(channels=3)
    coloured = [(x.expand(-1, 3, -1, -1) * torch.tensor([1.0, 0.7, 0.4]).view(3, 1, 1), y) for x, y in batches]
    ours, theirs = twins(model, **choices)
    histories = [t.fit(coloured, 3) for t in (ours, theirs)]
    for a, b in zip(*histories, strict=True):
        assert (a.n, a.n_hard, a.n_kept, a.skipped) == (b.n, b.n_hard, b.n_kept, b.skipped)
        assert a.loss == pytest.approx(b.loss, rel=1e-4)
    assert_same_model(ours.model, theirs.model)
    assert len(ours.engine.graphs) > 3


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_graphs_change_nothing_in_half_precision(batches, precision, monkeypatch):
    """Also that the graphs read the rounded weights where the next batch puts them. Half a percent: other blocks of
    rows in a half-precision product round otherwise.
    """
    monkeypatch.setattr("ham_kernels.engine.engine.half_problem", lambda *_: None)
    ours, theirs = twins(small_cnn(), precision=precision)
    for epoch in (1, 1, 2, 2):
        for x, y in batches[:2]:
            a, b = ours.train_step(x, y, epoch=epoch), theirs.train_step(x, y, epoch=epoch)
            assert abs(a.n_hard - b.n_hard) <= 1
            assert a.loss == pytest.approx(b.loss, rel=5e-3)
    other = small_cnn(seed=5).state_dict()
    for t in (ours, theirs):
        t.model.load_state_dict(other)
    a, b = ours.train_step(*batches[0], epoch=2), theirs.train_step(*batches[0], epoch=2)
    assert a.loss == pytest.approx(b.loss, rel=5e-3)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("loss", ["ce", "cw"])
def test_budgets_per_row_follow_into_the_graphs(norm, loss):
    """Twice with other budgets: the first ones must not have been captured."""
    x, y = digits(48)
    model = small_cnn()
    engine = Engine(EngineOptions(cuda_graphs=True), CPU, capture=Recorder())
    for low, high in ((0.05, 0.4), (0.3, 0.01)):
        eps = torch.linspace(low, high, 48) * (5 if norm == "l2" else 1)
        pgd = ham.PGD(eps, eps / 4, 5, norm, loss=loss)
        a, b = (mine(model, x, y, pgd, keep("hard", 2), 1.0, seed=1, step=0, engine=e)
                for e in (engine, PLAIN))  # fmt: skip
        assert 0 < a.n_hard == b.n_hard
        assert torch.equal(a.index, b.index)
        assert ((a.x_adv - b.x_adv).abs() > 1e-5).float().mean() < 0.01
        torch.testing.assert_close(a.weights, b.weights, rtol=1e-3, atol=1e-4)


def test_steps_are_captured_once(batches):
    """Per number of rows: one step for the attack, one look, one update; then nothing any more."""
    recorder = Recorder()
    trainer = trainer_of(small_cnn(), recorder)
    x, y = batches[0]
    trainer.train_step(x, y, epoch=1)
    assert recorder.captures == 1  # the update's number of rows has not come back yet
    trainer.train_step(x, y, epoch=1)
    assert recorder.captures == 2
    for _ in range(3):
        trainer.train_step(x, y, epoch=1)
    assert recorder.captures == 2


def test_a_step_runs_no_python_of_the_model_once_captured(batches):
    model = Broken(small_cnn(), lambda z: z)
    trainer = trainer_of(model, Recorder())
    for _ in range(2):
        trainer.train_step(*batches[0], epoch=1)
    before = model.calls
    trainer.train_step(*batches[0], epoch=1)
    assert model.calls == before


# ---------------------------------------------------------------- buckets
@pytest.mark.parametrize("full", [1, 2, 7, 16, 37, 128, 1000])
def test_buckets_hold_every_number_of_rows(full):
    buckets = [bucket_of(rows, full) for rows in range(1, full + 1)]
    assert all(rows <= bucket <= full for rows, bucket in enumerate(buckets, 1))
    assert buckets == sorted(buckets)
    assert len(set(buckets)) <= len(BUCKETS)
    assert all(bucket - rows <= full / 8 + 1 for rows, bucket in enumerate(buckets, 1))  # what padding costs at most


def test_a_bucket_is_a_share_of_batches_of_its_size():
    graphs = Graphs(CPU, lambda *_: [])
    assert graphs.rows_for(38, 128) == bucket_of(38, 128)
    assert graphs.rows_for(154, 512) == bucket_of(154, 512)
    assert graphs.rows_for(38, 128) == bucket_of(38, 128)  # whatever larger batches there were
    assert graphs.rows_for(100, 336) == bucket_of(100, 512)  # the last of an epoch


def test_unused_rows_do_not_matter(batches):
    """All that buckets hold between two batches may be garbage: NaN in images and logits, labels of no class."""
    ours, theirs = twins(small_cnn())
    buckets = 0
    for epoch in (1, 2, 2, 3):
        for x, y in batches:
            a, b = ours.train_step(x, y, epoch=epoch), theirs.train_step(x, y, epoch=epoch)
            assert a.n_hard == b.n_hard
            assert a.loss == pytest.approx(b.loss, rel=1e-4)
            for bucket in ours.engine.graphs._kept.values():
                if isinstance(bucket, Bucket):
                    buckets += 1
                    for t in (*vars(bucket.rows).values(), bucket.logits, bucket.max_step):
                        if isinstance(t, Tensor):
                            t.fill_(torch.nan if t.is_floating_point() else 10**6)
    assert buckets > 10
    assert_same_model(ours.model, theirs.model)


def test_rows_that_meet_in_the_model_are_not_padded(batches):
    """BatchNorm without running statistics normalises an attack by the batch, so that padding would change the rows."""

    def model():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU(), nn.Flatten(),
            nn.Linear(144, 10),
        )  # fmt: skip

    ours, theirs = trainer_of(model(), Recorder()), trainer_of(model())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EngineWarning)
        assert_same_steps(ours, theirs, batches, epochs=(2, 2))


# ---------------------------------------------------------------- traces of a capture
def test_captures_leave_no_trace_in_batchnorm(batches):
    ours, theirs = twins(small_cnn())
    for _ in range(3):
        for t in (ours, theirs):
            t.train_step(*batches[0], epoch=1)
        for a, b in zip(ours.model.buffers(), theirs.model.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert ours.model[2].num_batches_tracked == 3


def test_captures_leave_no_trace_in_random_numbers(batches):
    """Dropout draws in an update what it would draw without graphs, so that a resumed run is the run."""

    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 10))

    losses = []
    for capture in (None, Recorder()):
        trainer = trainer_of(model(), capture)
        torch.manual_seed(3)
        losses.append([trainer.train_step(*batches[0], epoch=1).loss for _ in range(5)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_parameters_that_the_loss_does_not_reach_get_no_gradient(batches):
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = small_cnn(), nn.Linear(3, 3)

        def forward(self, x):
            return self.used(x)

    ours, theirs = twins(Partly())  # weight decay would shrink a weight whose gradient is zero and not None
    start = ours.model.unused.weight.detach().clone()
    assert_same_steps(ours, theirs, batches[:1], epochs=(1, 1, 1, 1))
    assert ours.model.unused.weight.grad is None
    assert torch.equal(ours.model.unused.weight, start)


@pytest.mark.parametrize("at_first", [True, False], ids=["frozen later", "thawed later"])
def test_weights_frozen_or_thawed_between_steps(batches, at_first):
    ours, theirs = twins(small_cnn())
    for t in (ours, theirs):
        t.model[4].weight.requires_grad_(at_first)
        for _ in range(3):
            t.train_step(*batches[0], epoch=1)
        t.model[4].weight.requires_grad_(not at_first)
        for _ in range(3):
            t.train_step(*batches[0], epoch=1)
    assert_same_model(ours.model, theirs.model)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_inside_autocast_of_the_caller(batches, precision, monkeypatch):
    """autocast keeps the weights that it cast until its outermost block ends: a capture must not take those over."""
    monkeypatch.setattr("ham_kernels.engine.engine.half_problem", lambda *_: None)
    ours, theirs = twins(small_cnn(), precision=precision)
    for t in (ours, theirs):
        for group in t.optimizer.param_groups:
            group["lr"] = 0.3  # old weights should show
    for _ in range(6):
        losses = []
        for t in (ours, theirs):
            with torch.autocast("cpu", torch.bfloat16):
                losses.append(t.train_step(*batches[0], epoch=1).loss)
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
