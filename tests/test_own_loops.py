"""Training by a loop of one's own: step by step, by losses, epoch by epoch, with any loader and optimiser."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from nets import sgd, small_cnn
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

import ham_kernels as ham
from ham_kernels.common.troubles import HamWarning
from ham_kernels.methods import registry

HOW = {"eps": 0.1, "step_size": 0.03, "steps": 4}


@pytest.fixture
def batches(seed):
    g = torch.Generator().manual_seed(seed)
    return [(torch.rand(12, 1, 8, 8, generator=g), torch.randint(0, 10, (12,), generator=g)) for _ in range(3)]


def trainer_of(method, model=None, optimizer=None, **how):
    model = small_cnn() if model is None else model
    return ham.Trainer(model, optimizer or sgd(model), method, **{**HOW, **how})


# ---------------------------------------------------------------- step by step
METHODS = [kind for kind in map(registry.class_of, registry.names()) if kind().keeps_over_batches]
OVER_EPOCHS = [kind for kind in METHODS if not (kind.needs_teacher or kind.knows_images or kind.tunes_only)]


@pytest.mark.parametrize("kind", OVER_EPOCHS)
def test_steps_of_later_epochs_end_the_one_before(kind, batches):
    """As in `fit`: what a method remembers over epochs is not that of one long epoch."""
    course = {field: 2 for field, first, _ in kind().begins() if first > 1}
    model = small_cnn()
    by_fit, by_steps = (trainer_of(kind(start_epoch=1, **course), copy.deepcopy(model)) for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HamWarning)
        by_fit.fit(batches, epochs=3)
        for epoch in (1, 2, 3):
            if epoch == 3:  # a stop between two epochs
                saved, by_steps = by_steps.state_dict(), trainer_of(kind(start_epoch=1, **course))
                by_steps.load_state_dict(copy.deepcopy(saved))
            for x, y in batches:
                by_steps.train_step(x, y, epoch=epoch)
    for a, b in zip(by_fit.model.parameters(), by_steps.model.parameters(), strict=True):
        assert torch.equal(a, b)


# ---------------------------------------------------------------- losses
def test_a_loss_of_one_row_takes_no_statistics_of_it(seed):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))
    before = model[2].running_mean.clone()
    ham.ham_loss(model, torch.rand(1, 1, 8, 8), torch.tensor([3]), steps=2, screen_steps=1, early_drop=False).backward()
    assert torch.equal(model[2].running_mean, before)
    assert model.training
    assert model[2].training
    assert model[1].weight.grad.abs().sum() > 0


# ---------------------------------------------------------------- epoch by epoch
def test_one_fit_per_epoch_reaches_a_later_start(batches):
    trainer = trainer_of(ham.methods.HAM(start_epoch=3, screen_steps=2))
    with pytest.warns(HamWarning, match=r"start_epoch: is 3; this call of fit trains one epoch"):
        trainer.fit(batches, epochs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", HamWarning)
        for epoch in (2, 3):
            trainer.fit(batches, epochs=epoch)
    assert [report.phase for report in trainer.history] == ["pgd_at", "pgd_at", "ham"]
    with pytest.raises(ValueError, match="start_epoch: is 9, beyond epochs=6"):
        trainer_of(ham.methods.HAM(start_epoch=9, screen_steps=2)).fit(batches, epochs=6)


class Stream(IterableDataset):
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def test_a_loader_without_a_length_goes_with_a_weight_average(batches):
    trainer = trainer_of(ham.methods.PGDAT(start_epoch=1), ema_decay=0.5)
    assert len(trainer.fit(DataLoader(Stream(batches), batch_size=None), epochs=2)) == 2


def test_a_sampler_is_told_the_epoch(batches):
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    data = TensorDataset(x, y)
    seen = []
    loader = DataLoader(data, 12, sampler=DistributedSampler(data, 1, 0), collate_fn=lambda rows: noted(rows, seen))
    trainer_of(ham.methods.PGDAT(start_epoch=1)).fit(loader, epochs=2)
    assert sorted(seen[:36]) == sorted(seen[36:])
    assert seen[:36] != seen[36:]


def noted(rows, seen):
    seen += [float(x.sum()) for x, _ in rows]
    return torch.stack([x for x, _ in rows]), torch.stack([y for _, y in rows])


def test_batches_in_memory_say_that_they_come_again(seed):
    x, y = torch.randint(0, 256, (12, 1, 8, 8), dtype=torch.uint8), torch.arange(12) % 10
    loader = ham.data.Batches(x, y, 4, shuffle=True)
    next(iter(loader))
    first = [labels.tolist() for _, labels in loader]
    with pytest.warns(HamWarning, match="epoch: a second pass over this loader gives the order"):
        assert [labels.tolist() for _, labels in loader] == first
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for epoch in (1, 2):
            loader.set_epoch(epoch)
            list(loader)
        list(loader)
        in_order = ham.data.Batches(x, y, 4, shuffle=False)
        for _ in range(3):
            list(in_order)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.rand(12, 1, 8, 8)}, TypeError, r"x: got torch\.float32 of shape .* must be uint8"),
        ({"x": torch.zeros(12, 64, dtype=torch.uint8)}, TypeError, r"x: got torch\.uint8 of shape \(12, 64\)"),
        ({"y": torch.arange(11)}, ValueError, r"y: got torch\.int64 of shape \(11,\); it must be int64 \(12,\)"),
        ({"y": torch.arange(12, dtype=torch.int32)}, ValueError, r"y: got torch\.int32"),
        ({"x": torch.zeros(12, 1, 8, 8, dtype=torch.uint8).numpy()}, TypeError, r"x: got ndarray"),
        ({"y": list(range(12))}, TypeError, r"y: got list"),
    ],
)
def test_batches_in_memory_take_bytes_and_labels(change, error, message):
    given = {"x": torch.zeros(12, 1, 8, 8, dtype=torch.uint8), "y": torch.arange(12), **change}
    with pytest.raises(error, match=message):
        ham.data.Batches(**given, batch_size=4, shuffle=False)


# ---------------------------------------------------------------- models and optimisers
class Lazy(nn.Module):
    """Makes what it adds to the images in its first forward: in a slot that is there, or in a new one that it notes."""

    def __init__(self, slot: bool):
        super().__init__()
        self.net, self.slot, self.made = small_cnn(), slot, False
        if slot:
            self.register_buffer("place", None, persistent=False)

    def forward(self, x):
        if self.slot and self.place is None:
            self.place = torch.full(x.shape[1:], 0.01)
        elif not self.slot and not self.made:
            self.register_buffer("place", torch.full(x.shape[1:], 0.01))
            self.made = True
        return self.net(x + self.place)


@pytest.mark.parametrize("slot", [True, False])
@pytest.mark.parametrize("awp", [0.0, 0.01])
def test_a_model_that_makes_a_buffer_in_its_first_forward(slot, awp, batches):
    x, y = batches[0]
    model = Lazy(slot)
    assert torch.isfinite(ham.ham_loss(model, x, y, steps=2, screen_steps=1))
    assert ham.evaluate(Lazy(slot), batches, ["clean", "pgd2"], eps=0.1, step_size=0.05)["clean"].n == 36
    trainer = trainer_of(ham.methods.PGDAT(start_epoch=1, awp=awp), Lazy(slot), ema_decay=0.9)
    assert len(trainer.fit(batches, epochs=2)) == 2


def test_gradients_that_the_optimiser_does_not_hold_do_not_add_up(batches):
    model = small_cnn()
    body, head = list(model.parameters())[:-2], list(model.parameters())[-2:]
    trainer = trainer_of(ham.methods.PGDAT(start_epoch=1), model, torch.optim.SGD(head, lr=0.0))
    norms = []
    for _ in range(3):
        trainer.train_step(*batches[0], epoch=1)
        norms.append(float(sum(p.grad.square().sum() for p in body).sqrt()))
    assert norms[2] < 1.5 * norms[0]
    body[0].grad.fill_(torch.nan)
    trainer.train_step(*batches[0], epoch=1)
