"""TRADES against an independent implementation, its gradient where a clean probability underflows, HAM x TRADES."""

from __future__ import annotations

import copy

import pytest
import torch
from nets import sgd, small_cnn
from torch import nn
from torch.nn import functional as F

import ham_kernels as ham
from ham_kernels.attack.pgd import PGD
from ham_kernels.methods.mining import Examples
from ham_reference import trades as reference
from ham_reference.method import draw_seed

ATTACK = {"eps": 0.2, "step_size": 0.05, "steps": 5}
L2 = {"eps": 1.5, "step_size": 0.4, "steps": 5, "norm": "l2"}  # smooth in the gradient: no rounding grows to a sign


@pytest.fixture
def batch(seed):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(40, 1, 8, 8, generator=g), torch.randint(0, 10, (40,), generator=g)


def smooth_net() -> nn.Module:
    """No gradient is exactly zero, whose sign would be rounding."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.GELU(), nn.Flatten(), nn.Linear(512, 10)
    )  # fmt: skip


def examples_of(method, model, x, y, **attack):
    objective = ham.methods.Objective(method, PGD(**ATTACK | attack))
    return objective, objective.examples(model, x, y, seed=7, step=3)


def assert_same_examples(ours, theirs, norm="linf"):
    """L2 noise differs in its last bits between libraries. Under L-inf the sign of a gradient near 0 is rounding, and
    moves the row's other pixels from there on: 1 row in 30,000, so at most 2 of 40.
    """
    differ = ((ours - theirs).abs() > (1e-5 if norm == "l2" else 1e-6)).flatten(1)
    assert int(differ.any(1).sum()) <= (0 if norm == "l2" else 2)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_same_examples_and_loss_as_the_reference(norm, batch):
    x, y = batch
    model = smooth_net()
    model(x)  # running statistics that are not those of the start
    attack = L2 if norm == "l2" else ATTACK | {"norm": norm}
    objective, ours = examples_of(ham.methods.TRADES(beta=4.0), model, x, y, **attack)
    theirs = reference.trades_examples(model, x, **attack, seed=7, step=3)
    assert_same_examples(ours.x_adv, theirs, norm)
    twin = copy.deepcopy(model)
    loss, expected = objective.loss(model, ours), reference.two_terms(twin, x, ours.x_adv, y, beta=4.0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    expected.backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_same_weights_as_the_reference(batch):
    """Update by update, each from the same weights: differences of rounding would grow."""
    x, y = batch
    model, twin = smooth_net(), smooth_net()
    trainer = ham.Trainer(model, sgd(model), ham.methods.TRADES(), **L2, seed=5)
    for step in range(4):
        twin.load_state_dict(model.state_dict())
        optimizer = sgd(twin)
        optimizer.load_state_dict(copy.deepcopy(trainer.optimizer.state_dict()))
        loss = trainer.train_step(x, y, epoch=1).loss
        x_adv = reference.trades_examples(twin, x, **L2, seed=5, step=step)
        expected = reference.two_terms(twin, x, x_adv, y, beta=6.0)
        assert loss == pytest.approx(expected.item(), rel=1e-6)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        for (name, p), q in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6, msg=name)


def test_loss_where_trades_loss_stood(batch):
    x, y = batch
    model = smooth_net()
    twin = copy.deepcopy(model)
    g = torch.Generator().manual_seed(3)
    ours = ham.loss(ham.methods.TRADES(), model, x, y, **L2, generator=g)
    theirs = reference.trades_loss(twin, x, y, **L2, generator=g.manual_seed(3))
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    assert draw_seed(g) >= 0


def test_stopping_rows_as_the_reference_does(batch):
    """HAM x TRADES: rows that resist M steps stay in both terms, at x^M."""
    x, y = batch
    model = smooth_net()
    y[::2] = model.eval()(x[::2]).argmax(1)  # some of these resist a small eps, most of the others are wrong at once
    model.train()
    small = ATTACK | {"eps": 0.02, "step_size": 0.005}
    method = ham.methods.TRADES(early_drop=True, easy="stop", screen_steps=2)
    objective, ours = examples_of(method, model, x, y, **small)
    theirs, hard = reference.stopped_examples(model, x, y, **small, screen_steps=2, norm="linf", seed=7, step=3)
    assert 0 < ours.n_hard == int(hard.sum()) < len(y)
    assert (ours.n_kept, ours.n_forward) == (len(y), len(y))
    assert_same_examples(ours.x_adv, theirs)
    assert objective.loss(copy.deepcopy(model), ours).item() == pytest.approx(
        reference.two_terms(copy.deepcopy(model), x, ours.x_adv, y, beta=6.0).item(), rel=1e-6
    )


def test_the_clean_prediction_is_computed_once(batch):
    x, y = batch
    model = small_cnn()
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    examples_of(ham.methods.TRADES(), model, x, y)
    assert len(passes) == ATTACK["steps"] + 1


class Given(nn.Module):
    """Logits that are parameters: those of clean images and those of adversarial ones, in turn."""

    def __init__(self, *logits):
        super().__init__()
        self.logits = nn.ParameterList(nn.Parameter(torch.tensor([z])) for z in logits)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.logits[(self.calls - 1) % len(self.logits)].expand(len(x), -1) + 0 * x.sum()


@pytest.mark.parametrize("gap", [50.0, 104.0, 200.0, 1e4])
def test_gradient_is_finite_where_a_clean_probability_underflows(gap):
    """The usual form, whose target is a probability, has NaN there from a gap of 104 on."""
    x, y = torch.rand(3, 1, 2, 2), torch.zeros(3, dtype=torch.int64)
    model = Given([0.0, -gap, 1.0], [1.0, 0.0, 0.0])
    loss = ham.methods.TRADES().loss_of(model, Examples(x, x, y, None, 3, 3), None)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    z, z_adv = (p.detach().double().requires_grad_() for p in model.logits)
    q = F.softmax(z, 1)
    kl = (q * (F.log_softmax(z, 1) - F.log_softmax(z_adv, 1))).sum()
    expected = F.cross_entropy(z, y[:1]) + 6.0 * kl
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for p, q in zip(model.logits, torch.autograd.grad(expected, (z, z_adv)), strict=True):
        torch.testing.assert_close(p.grad.double(), q, rtol=1e-5, atol=1e-6)


def test_weights_multiply_both_terms(batch):
    x, y = batch
    model = smooth_net().eval()
    x_adv, weights = (x + 0.1 * torch.rand_like(x)).clamp(0, 1), torch.rand(len(x)) + 0.5
    method = ham.methods.TRADES(beta=2.0)
    each = [
        method.loss_of(model, Examples(a[None], b[None], c[None], None, 1, 1), None)
        for a, b, c in zip(x_adv, x, y, strict=True)
    ]
    whole = method.loss_of(model, Examples(x_adv, x, y, weights, len(y), len(y)), None)
    assert whole.item() == pytest.approx((torch.stack(each) * weights).mean().item(), rel=1e-5)
