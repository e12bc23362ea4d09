"""Weights of classes by their counts, on top of every method's own."""

from __future__ import annotations

import pytest
import torch
from nets import sgd, small_cnn

import ham_kernels as ham
from ham_kernels.commands.flags import parse_train
from ham_kernels.commands.from_settings import trainer_of
from ham_kernels.data.batches import Shown
from ham_kernels.methods import count_weights
from ham_kernels.methods.objective import Objective
from ham_kernels.methods.registry import class_of

PGD = ham.PGD(0.1, 0.05, 4)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    return torch.rand(24, 1, 8, 8, generator=g), torch.randint(0, 10, (24,), generator=g)


def test_weights_have_mean_one_over_the_rows_of_an_epoch():
    """And each class that has rows has the same share of the loss."""
    counts = [500, 50, 0, 5]
    weights = count_weights(counts)
    assert weights == pytest.approx([555 / 1500, 555 / 150, 1.0, 555 / 15])
    assert sum(w * n for w, n in zip(weights, counts, strict=True)) == pytest.approx(555)
    assert count_weights([7, 7, 7]) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("name", ham.methods.names())
def test_the_loss_of_every_method_is_weighed(name):
    """In its own weights by label; and twice the weight is twice the loss."""
    x, y = batch()
    x.shown = Shown(tuple(x.shape), x.shape[2:], torch.arange(len(x)), None)
    kind = class_of(name)
    weights = torch.arange(1.0, 11.0)

    def of(loss_weights):
        model, teacher = small_cnn(), small_cnn(seed=1) if kind.needs_teacher else None
        objective = Objective(kind(), PGD, loss_weights, teacher)
        objective.epoch = 100  # behind every start of class weights
        examples = objective.examples(model, x, y, seed=0, step=0)
        return examples, objective.loss(model, examples).item()

    (plain, loss), (twice, double), (weighed, _) = of(None), of(torch.full((10,), 2.0)), of(weights)
    assert double == pytest.approx(2 * loss, rel=1e-5)
    own = torch.ones(plain.n_kept) if plain.weights is None else plain.weights
    torch.testing.assert_close(weighed.weights, own * weights[plain.y])
    assert torch.equal(twice.y, plain.y)


def test_a_settings_weights_reach_every_phase():
    told = parse_train(["--balance", "weights", "--natural-epochs", "1", "--warm-up", "n_fgsm"]).settings
    counts = [5, *[10] * 9]
    trainer = trainer_of(told, small_cnn(), torch.device("cpu"), counts)
    phases = [trainer.phases.objective(epoch) for epoch in (1, 2, 9)]
    assert [p.method.name for p in phases] == ["natural", "n_fgsm", "ham"]
    assert all(torch.equal(p.loss_weights, torch.tensor(count_weights(counts))) for p in phases)
    assert not any("loss_weights" in p.memory() for p in phases)
    plain = trainer_of(parse_train([]).settings, small_cnn(), torch.device("cpu"), counts)
    assert plain.phases.objective(9).loss_weights is None


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ([1.0, -1.0], ValueError, r"loss_weights: got .*; it must be one number per class, each finite and >= 0"),
        ("many", TypeError, "loss_weights: got 'many' .*; it must be one number per class"),
        ([1.0] * 9, ValueError, "loss_weights: got 9 for 10 classes; give one each"),
    ],
)
def test_weights_that_are_none(weights, error, message):
    model = small_cnn()
    with pytest.raises(error, match=message):
        ham.Trainer(model, sgd(model), ham.methods.PGDAT(), steps=1, loss_weights=weights).train_step(*batch(), 1)
