"""Screen, compact, finish, weigh: who stays, what each weighs, and what it costs in forwards."""

from __future__ import annotations

import pytest
import torch
from nets import Constant, Counting, small_cnn
from objectives import keep, mine

import ham_reference as reference
from ham_kernels.attack.pgd import PGD

K, M = 10, 3
PGD_SETTINGS = {"eps": 0.2, "step_size": 0.05, "steps": K}


@pytest.fixture
def batch():
    y = torch.randint(1, 10, (32,))
    y[torch.randperm(32)[:14]] = 0
    return torch.rand(32, 1, 8, 8), y


def run(model, batch, rows="hard", lam=1.0, seed=4, step=9):
    kept = keep(rows, M) if rows != "all" else keep()
    return mine(model, *batch, PGD(**PGD_SETTINGS), kept, lam, seed=seed, step=step)


def favours_class_0():
    """A model so fond of class 0 that its images are easy, and all others hard."""
    model = small_cnn()
    with torch.no_grad():
        model[-1].bias[0] += 4.0
    return model


@pytest.mark.parametrize("rows", ["hard", "random", "all"])
@pytest.mark.parametrize("lam", [None, 1.0])
def test_examples_are_the_references(batch, rows, lam):
    model = favours_class_0()
    ours = run(model, batch, rows, lam)
    x_adv, y, weights, kept = reference.hard_examples(
        model, *batch, **PGD_SETTINGS, screen_steps=M, lam=lam or 0.0, reweight=lam is not None,
        early_drop=rows != "all", norm="linf", seed=4, step=9, rows=rows,
    )  # fmt: skip
    assert ours.n == 32
    if rows != "all":
        assert ours.n_hard == 18
        assert torch.equal(ours.index.long(), kept)
    assert torch.equal(ours.y, y)
    assert torch.equal(ours.x, batch[0][kept])
    assert ((ours.x_adv - x_adv).abs() > 1e-5).float().mean() < 0.01
    if lam is None:
        assert ours.weights is None
    else:
        torch.testing.assert_close(ours.weights, weights, rtol=1e-3, atol=1e-4)


def test_forwards_counted_for_pgd_at(batch):
    """2K in the attack; the trainer adds 3 (test_trainer)."""
    model = Counting(small_cnn())
    run(model, batch, "all")
    assert model.full_batch_forwards(32) == 2 * K


@pytest.mark.parametrize("rows", ["hard", "random"])
def test_forwards_counted_for_ham(batch, rows):
    model = Counting(favours_class_0())
    examples = run(model, batch, rows)
    h = examples.n_hard / examples.n
    assert 0 < h < 1
    assert model.full_batch_forwards(32) == pytest.approx(2 * M + 1 + 2 * h * (K - M))


def test_ties_are_hard_and_a_clear_win_is_easy(batch):
    x, _ = batch
    y = torch.zeros(32, dtype=torch.int64)
    assert run(Constant([1.0, 1.0, 0.0]), (x, y)).n_hard == 32
    assert run(Constant([1.0, 0.5, 0.0]), (x, y)).n_hard == 0
    assert run(Constant([0.5, 1.0, 0.0]), (x, y)).n_hard == 32


def test_without_a_hard_row_no_step_is_spent(batch):
    model = Counting(Constant([9.0, 0.0, 0.0]))
    examples = run(model, (batch[0], torch.zeros(32, dtype=torch.int64)))
    assert examples.n_hard == 0
    assert examples.weights.shape == (0,)
    assert model.full_batch_forwards(32) == 2 * M + 1


def test_random_rows_are_as_many_but_not_the_same(batch):
    model = favours_class_0()
    hard, random = run(model, batch, "hard"), run(model, batch, "random")
    assert hard.n_hard == random.n_hard
    assert not torch.equal(hard.index, random.index)
    assert torch.equal(random.index, run(model, batch, "random").index)
    assert not torch.equal(random.index, run(model, batch, "random", step=10).index)


def test_weights_have_mean_one_and_saturate(batch):
    varied = run(favours_class_0(), batch, lam=50.0).weights  # steps of these logits are about 0.01
    saturated = run(favours_class_0(), batch, lam=1e6).weights
    assert varied.mean() == pytest.approx(1.0, abs=1e-5)
    assert varied.std() > 0.01
    assert saturated.std() < 1e-3


def test_eps_per_row_follows_the_rows(batch):
    model = favours_class_0()
    eps = torch.linspace(0.05, 0.4, 32)
    examples = mine(model, *batch, PGD(eps, eps / 4, K), keep("hard", M), None, seed=1, step=0)
    delta = (examples.x_adv - examples.x).flatten(1).abs().amax(1)
    assert examples.n_hard > 0
    assert (delta <= eps[examples.index.long()] + 1e-5).all()
    assert (delta > 0.5 * eps[examples.index.long()]).all()
