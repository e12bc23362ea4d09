"""Updates as graphs: their own examples, gradients and images; failures; numbers of rows."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from engine_helpers import CPU, ragged_batches
from graph_helpers import (
    RAGGED,
    Recorder,
    assert_same_model,
    examples_of,
    twins,
)
from nets import Broken, sgd, small_cnn
from objectives import WithLoss
from torch import Tensor, nn

import ham_kernels as ham
from ham_kernels.engine import Buffers, Engine, EngineOptions
from ham_kernels.engine import graphs as graphs_module
from ham_kernels.methods import weighted_ce
from ham_kernels.methods.mining import Examples
from ham_kernels.training.update import Updater


@pytest.fixture(scope="module")
def batches():
    return ragged_batches(RAGGED)


@functools.cache
def objective(loss) -> WithLoss:
    """One for each loss: graphs are kept by it."""
    return WithLoss(loss)


def updater_of(model: nn.Module, capture=None, optimizer=None, grad_clip: float = 0.0) -> Updater:
    options = EngineOptions(cuda_graphs=capture is not None)
    return Updater(optimizer or sgd(model), Engine(options, CPU, capture=capture), CPU, grad_clip)


def pulled_together(model: nn.Module, examples: Examples) -> Tensor:
    """A loss of clean and adversarial logits, as TRADES has."""
    return weighted_ce(model, examples) + (model(examples.x_adv) - model(examples.x)).square().mean()


# ---------------------------------------------------------------- the update alone
@pytest.mark.parametrize("loss", [weighted_ce, pulled_together])
@pytest.mark.parametrize("weighted", [True, False])
def test_an_update_reads_its_own_examples(loss, weighted):
    """Whatever of the examples a loss looks at is that of this update, not of the one that was captured."""
    model = small_cnn()
    twin = copy.deepcopy(model)
    ours, theirs = updater_of(model, Recorder()), updater_of(twin)
    for seed in range(6):
        examples = examples_of(24, seed, weighted)
        losses = ours(model, objective(loss), examples, False), theirs(twin, objective(loss), examples, False)
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert_same_model(model, twin)


def test_clipped_adamw_from_a_replay():
    """The optimiser stays outside of the graph, and clips gradients where the graph writes them."""
    model = small_cnn()
    twin = copy.deepcopy(model)
    ours, theirs = (
        updater_of(m, capture, torch.optim.AdamW(m.parameters(), 1e-3), 0.05)
        for m, capture in ((model, Recorder()), (twin, None))
    )
    for seed in range(6):
        for update, m in ((ours, model), (theirs, twin)):
            update(m, objective(weighted_ce), examples_of(24, seed), False)
            norm = torch.stack([p.grad.norm() for p in m.parameters()]).norm().item()
            assert norm == pytest.approx(0.05, rel=1e-3)
    assert_same_model(model, twin)


def test_frozen_statistics_are_a_graph_of_their_own():
    model = small_cnn()
    twin = copy.deepcopy(model)
    ours, theirs = updater_of(model, Recorder()), updater_of(twin)
    for seed, frozen in enumerate((False, False, False, True, True, True, False, True)):
        for update, m in ((ours, model), (theirs, twin)):
            update(m, objective(weighted_ce), examples_of(24, seed), frozen)
    assert model[2].num_batches_tracked == 4
    assert_same_model(model, twin)


def test_gradients_of_another_loss_do_not_stay():
    """Two losses in turn, of which one reaches one head only: the other head then has no gradient."""

    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.body, self.main, self.other = nn.Linear(64, 16), nn.Linear(16, 10), nn.Linear(16, 10)

        def forward(self, x):
            return self.main(self.body(x.flatten(1)))

    def both(model, examples):
        return weighted_ce(model, examples) + model.other(model.body(examples.x_adv.flatten(1))).square().mean()

    model = TwoHeads()
    twin = copy.deepcopy(model)
    ours, theirs = updater_of(model, Recorder()), updater_of(twin)
    for seed in range(5):
        for loss in (both, weighted_ce):
            ours(model, objective(loss), examples_of(24, seed), False)
            theirs(twin, objective(loss), examples_of(24, seed), False)
    assert_same_model(model, twin)


def test_graphs_of_an_update_share_their_gradients():
    """One set of gradients per graph would be up to 128 times the model's memory."""
    model = small_cnn()
    update = updater_of(model, Recorder())
    for n in (20, 20, 24, 24, 28, 28):  # the first of each is eager, and makes gradients anew
        update(model, objective(weighted_ce), examples_of(n, n), False)
    assert len(update._engine.graphs) == 3
    where = set()
    for n in (20, 24, 28):
        update(model, objective(weighted_ce), examples_of(n, n), False)
        where.add(model[1].weight.grad.data_ptr())
    assert len(where) == 1


def test_graphs_of_an_update_share_their_images():
    """One batch of images per graph would be up to 256 batches on the device."""
    model = small_cnn()
    update = updater_of(model, Recorder())
    for n in (28, 28, 24, 24, 20, 20):
        update(model, objective(weighted_ce), examples_of(n, n), False)
    graphed = list(update._engine.graphs._kept.values())
    assert len(graphed) == 3
    assert len({g.places["x_adv"].untyped_storage().data_ptr() for g in graphed}) == 1


def test_an_update_that_failed_once_is_captured_later():
    """What a caller survives, such as a batch that did not fit into memory."""
    failures = iter([RuntimeError("once")])

    def fail_once(z):
        for error in failures:
            raise error
        return z

    model = Broken(small_cnn(), fail_once, only_train=True)
    twin = copy.deepcopy(model.inner)
    ours, theirs = updater_of(model, Recorder()), updater_of(twin)
    before = Buffers(model)
    with pytest.raises(RuntimeError, match="once"):
        ours(model, objective(weighted_ce), examples_of(24, 0), False)
    before.undo()  # as a trainer does
    for seed in range(4):
        ours(model, objective(weighted_ce), examples_of(24, seed), False)
        theirs(twin, objective(weighted_ce), examples_of(24, seed), False)
    assert len(ours._engine.graphs) == 1
    assert_same_model(model.inner, twin)


def test_more_numbers_of_rows_than_graphs_are_not_captured_over_and_over(monkeypatch):
    """A capture costs as much as many updates."""
    monkeypatch.setattr(graphs_module, "LIMIT", 3)
    recorder = Recorder()
    model = small_cnn()
    update = updater_of(model, recorder)
    for _ in range(5):
        for n in range(20, 26):
            update(model, objective(weighted_ce), examples_of(n, n), False)
    assert 0 < len(update._engine.graphs) <= 3
    assert recorder.captures <= 6


def test_nan_in_a_replay_changes_nothing():
    model = small_cnn()
    update = updater_of(model, Recorder())
    for seed in range(3):
        update(model, objective(weighted_ce), examples_of(24, seed), False)
    before = copy.deepcopy((model.state_dict(), update.optimizer.state_dict()))
    buffers = Buffers(model)
    bad = examples_of(24, 9)
    bad.weights[3] = torch.nan
    with pytest.raises(ham.NonFiniteError, match="nothing was updated"):
        update(model, objective(weighted_ce), bad, False)
    buffers.undo()  # as a trainer does
    assert str(before) == str((model.state_dict(), update.optimizer.state_dict()))
    assert torch.isfinite(torch.tensor(update(model, objective(weighted_ce), examples_of(24, 5), False)))


def test_gradients_cleared_by_the_caller(batches):
    """on_batch_end or a caller's own loop may call zero_grad; frozen statistics are a graph of their own."""
    ours, theirs = twins(small_cnn(), freeze_bn=True)
    for epoch in (1, 1, 1, 2, 2, 2, 1):
        reports = [t.train_step(*batches[0], epoch=epoch) for t in (ours, theirs)]
        assert reports[0].loss == pytest.approx(reports[1].loss, rel=1e-4)
        for t in (ours, theirs):
            t.optimizer.zero_grad()
    assert_same_model(ours.model, theirs.model)
