"""The weight average: what of a model it averages, what it takes over, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from nets import sgd
from torch import nn
from torch.nn.utils import parametrizations

import ham_kernels as ham
from ham_kernels.training.ema import WeightAverage


def test_batchnorms_statistics_are_averaged_and_other_buffers_taken_over():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model.register_buffer("seen", torch.zeros(3))
    average = WeightAverage(model, 0.75)
    average.updates = 100  # the decay is whole
    with torch.no_grad():
        for value in model.state_dict().values():
            value.add_(4)
    average.update(model)
    for name, value in model.state_dict().items():
        taken_over = name in ("seen", "1.num_batches_tracked")
        expected = value if taken_over else value - 3
        torch.testing.assert_close(average.model.state_dict()[name], expected)


def test_vectors_of_a_spectral_norm_are_the_models(seed):
    """Their average is no unit vector, by which the norm of the averaged weights would be told too small."""

    def layer(wide: int, narrow: int) -> nn.Module:
        return parametrizations.spectral_norm(nn.Linear(wide, narrow))

    model = nn.Sequential(nn.Flatten(), layer(64, 32), nn.ReLU(), layer(32, 10))
    trainer = ham.Trainer(
        model, sgd(model, lr=0.5), ham.methods.PGDAT(start_epoch=1), eps=0.1, step_size=0.05, steps=2, ema_decay=0.9
    )
    x, y = torch.rand(16, 1, 8, 8), torch.randint(0, 10, (16,))
    before = model[1].parametrizations.weight[0]._u.clone()
    for _ in range(40):
        trainer.train_step(x, y, epoch=1)
    assert not torch.equal(before, model[1].parametrizations.weight[0]._u)
    for name, ours in trainer.ema_model.named_buffers():
        assert torch.equal(ours, model.get_buffer(name)), name
        assert float(ours.norm()) == pytest.approx(1.0, abs=1e-5)


class Growing(nn.Module):
    """Keeps its images, however many, and makes a buffer in its first training forward."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 10)
        self.register_buffer("last", torch.zeros(0))
        self.made = False

    def forward(self, x):
        if self.training:
            self.last = x.flatten(1).mean(1).detach()
            if not self.made:
                self.register_buffer("late", torch.ones(3))
                self.made = True
        return self.head(x.flatten(1))


def test_buffers_that_appear_or_grow_are_taken_over():
    model = Growing()
    trainer = ham.Trainer(
        model, sgd(model), ham.methods.PGDAT(start_epoch=1), eps=0.1, step_size=0.05, steps=2, ema_decay=0.9
    )
    for rows in (12, 5):
        trainer.train_step(torch.rand(rows, 1, 8, 8), torch.randint(0, 10, (rows,)), epoch=1)
        for name in ("last", "late"):
            torch.testing.assert_close(getattr(trainer.ema_model, name), getattr(model, name))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_too_coarse_for_an_average_are_refused(dtype):
    with pytest.raises(ValueError, match=r"ema_decay: got 0\.99, but weights are b?float16, too coarse"):
        WeightAverage(nn.Linear(4, 4).to(dtype), 0.99)
