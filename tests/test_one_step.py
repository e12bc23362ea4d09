"""FGSM-RS, N-FGSM and natural training: the reference's examples, their range, their cost, what they refuse."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nets import Counting, sgd, small_cnn
from objectives import fgsm_rs, n_fgsm, natural
from torch import nn
from torch.nn import functional as F

import ham_kernels as ham
from ham_kernels import data
from ham_kernels.attack.step import PGD
from ham_kernels.common import checks
from ham_reference import method
from ham_reference import one_step as reference

EPS = 0.1
OBJECTIVES = {"fgsm_rs": fgsm_rs(PGD(EPS)), "n_fgsm": n_fgsm(PGD(EPS)), "natural": natural()}
ORACLES = {"fgsm_rs": reference.fgsm_rs, "n_fgsm": reference.n_fgsm}
START = {"fgsm_rs": EPS, "n_fgsm": 2 * EPS}


@pytest.fixture
def batch():
    return torch.rand(32, 1, 8, 8), torch.randint(0, 10, (32,))


class Clear(nn.Module):
    """Odd labels against even ones, by weights far from 0, so that no gradient's sign depends on rounding."""

    def __init__(self, weights: torch.Tensor):
        super().__init__()
        self.weights = nn.Parameter(weights)

    def forward(self, x):
        z = x.flatten(1) @ self.weights.to(x.dtype)
        return z[:, None] * torch.tensor([-1.0, 1.0], dtype=x.dtype, device=x.device).repeat(5)


def clear(pixels: int = 64) -> nn.Module:
    return Clear((0.01 + 0.01 * torch.rand(pixels)) * torch.randn(pixels).sign())


def examples(objective, model, batch, seed=4, step=9):
    return objective.examples(model, *batch, seed=seed, step=step).x_adv


# ---------------------------------------------------------------- examples
@pytest.mark.parametrize("name", ORACLES)
def test_examples_are_the_references(name, batch, seed):
    model, (x, y) = small_cnn(seed), batch
    ours = examples(OBJECTIVES[name], model, batch, seed=seed)
    theirs = ORACLES[name](model, x, y, eps=EPS, seed=seed, step=9)
    with method.evaluating(model):
        _, gradient = method.input_gradient(model, method.start_point(x, START[name], "linf", seed, 9), y)
    decided = gradient.abs() > 1e-5 * gradient.abs().max()  # the two CE gradients differ in the last bits
    assert decided.float().mean() > 0.9
    assert torch.equal(ours[decided], theirs[decided])
    assert (ours - x).abs().mean() > 0.3 * EPS


@pytest.mark.parametrize("name", ORACLES)
def test_examples_are_the_references_in_every_pixel(name, batch):
    model = clear()
    assert torch.equal(examples(OBJECTIVES[name], model, batch), ORACLES[name](model, *batch, eps=EPS, seed=4, step=9))


@given(eps=st.floats(0, 0.5), noise=st.floats(0, 4), seed=st.integers(0, 2**62), edges=st.booleans())
def test_ball_and_range(eps, noise, seed, edges):
    """FGSM-RS stays in the eps-ball; N-FGSM within (noise + 1) * eps; both in [0, 1]. Up to one rounding."""
    x = torch.rand(4, 2, 8, 8, generator=torch.Generator().manual_seed(seed % 2**31))
    batch = x.round() if edges else x, torch.arange(4)
    for objective, radius in ((fgsm_rs(PGD(eps)), eps), (n_fgsm(PGD(eps), noise), (noise + 1) * eps)):
        x_adv = examples(objective, clear(128), batch, seed=seed)
        assert x_adv.min() >= 0
        assert x_adv.max() <= 1
        assert (x_adv - batch[0]).abs().max() <= radius + 1e-6


def test_n_fgsm_leaves_the_ball_and_fgsm_rs_fills_it():
    """Around mid-grey: |U(-2, 2) + 1| > 1 for half of the pixels; |U(-1, 1) + 1.25| > 1 for 5 of 8."""
    grey = torch.full((64, 1, 8, 8), 0.5), torch.randint(0, 10, (64,))
    far = (examples(OBJECTIVES["n_fgsm"], clear(), grey) - 0.5).abs() / EPS
    assert 0.45 < (far > 1 + 1e-5).float().mean() < 0.55
    assert 2.9 < far.max() <= 3 + 1e-5
    far = (examples(OBJECTIVES["fgsm_rs"], clear(), grey) - 0.5).abs() / EPS
    assert far.max() <= 1 + 1e-5
    assert 0.57 < (far > 1 - 1e-5).float().mean() < 0.68


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_n_fgsm_is_not_projected_at_any_eps(dtype):
    """Black images that are odd when white: each pixel goes up from its noise by all of eps. One rounding each."""
    model = Clear(torch.full((64,), 0.01))
    black = torch.zeros(8, 1, 8, 8, dtype=dtype), torch.zeros(8, dtype=torch.int64)
    for eps in (0.004, 0.01, 0.2, 0.7):
        start = method.start_point(black[0].float(), 2 * eps, "linf", 4, 9).to(dtype)
        assert torch.equal(examples(n_fgsm(PGD(eps)), model, black), (start.float() + eps).clamp(0, 1).to(dtype))


def test_without_noise_n_fgsm_is_fgsm(batch):
    model, (x, y) = clear(), batch
    _, gradient = method.input_gradient(model, x, y)
    expected = (x + EPS * gradient.sign()).clamp(0, 1)
    assert torch.equal(examples(n_fgsm(PGD(EPS), noise=0), model, batch), expected)


@pytest.mark.parametrize("objective", [fgsm_rs(PGD(0)), n_fgsm(PGD(0)), natural()])
def test_eps_0_trains_on_the_images(objective, batch):
    assert torch.equal(examples(objective, small_cnn(), batch), batch[0])


def test_fgsm_rs_takes_eps_per_row(batch):
    eps = torch.linspace(0.0, 0.2, 32)
    delta = (examples(fgsm_rs(PGD(eps)), clear(), batch) - batch[0]).flatten(1).abs().amax(1)
    torch.testing.assert_close(delta, eps, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("make", [fgsm_rs, n_fgsm])
def test_steps_and_start_of_the_given_attack_do_not_matter(make, batch):
    plain = make(PGD(EPS))
    other = make(PGD(EPS, step_size=0.3, steps=7, random_start=False, start_eps=0.4))
    assert other.pgd == plain.pgd
    assert make(PGD(EPS, loss="cw")).pgd.loss == "cw"


@pytest.mark.parametrize("name", ORACLES)
def test_noise_is_named_by_seed_and_step(name, batch):
    model = small_cnn()
    first = examples(OBJECTIVES[name], model, batch)
    assert torch.equal(first, examples(OBJECTIVES[name], model, batch))
    assert not torch.equal(first, examples(OBJECTIVES[name], model, batch, step=10))
    assert not torch.equal(first, examples(OBJECTIVES[name], model, batch, seed=5))


# ---------------------------------------------------------------- one step of training
@pytest.mark.parametrize(("name", "cost"), [("fgsm_rs", 5), ("n_fgsm", 5), ("natural", 3)])
def test_cost_in_full_batch_forwards(name, cost, batch):
    model, objective = Counting(small_cnn()), OBJECTIVES[name]
    made = objective.examples(model, *batch, seed=0, step=0)
    objective.loss(model, made).backward()
    assert (made.n, made.n_hard, made.n_forward, made.weights) == (32, 32, 32, None)
    assert model.full_batch_forwards(32) == cost


def test_cost_of_warm_up_steps_in_a_training(batch):
    for warm_up, epoch, cost in (("n_fgsm", 1, 3), ("n_fgsm", 2, 5), ("fgsm_rs", 2, 5), ("pgd_at", 2, 2 * 6 + 3)):
        model = Counting(small_cnn())
        settings = {"steps": 6, "screen_steps": 2, "start_epoch": 3, "warm_up": warm_up, "natural_epochs": 1}
        ham.HAMTrainer(model, sgd(model), eps=EPS, step_size=EPS / 4, **settings).train_step(*batch, epoch=epoch)
        assert model.full_batch_forwards(32) == cost


@pytest.mark.parametrize("name", OBJECTIVES)
def test_making_examples_leaves_the_model_alone(name, batch):
    model = small_cnn()
    model[1].eval()
    modes = [m.training for m in model.modules()]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    examples(OBJECTIVES[name], model, batch)
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_is_the_mean_cross_entropy(name, batch):
    model, objective = small_cnn(), OBJECTIVES[name]
    made = objective.examples(model, *batch, seed=0, step=0)
    objective.loss(model, made).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    expected = F.cross_entropy(model(made.x_adv), batch[1])
    expected.backward()
    assert objective.loss(model, made).item() == pytest.approx(expected.item(), rel=1e-5)
    for gradient, p in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, p.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_one_step_training_resists_pgd_and_natural_training_does_not():
    images = data.digits()
    x, y = images.x_train.float() / 255, images.y_train
    robust = {}
    for name, objective in {"fgsm_rs": fgsm_rs(PGD(0.2)), "n_fgsm": n_fgsm(PGD(0.2)), "natural": natural()}.items():
        model = small_cnn(width=16)
        optimizer = sgd(model, 0.1)
        for step, rows in enumerate(torch.randperm(1280, generator=torch.Generator().manual_seed(0)).split(64) * 6):
            made = objective.examples(model, x[rows], y[rows], seed=0, step=step)
            optimizer.zero_grad()
            objective.loss(model, made).backward()
            optimizer.step()
        model.eval()
        x_adv = ham.pgd_attack(model, x[:256], y[:256], eps=0.2, step_size=0.05, steps=10)
        with torch.no_grad():
            robust[name] = (model(x_adv).argmax(1) == y[:256]).float().mean().item()
    assert robust["fgsm_rs"] > 0.35
    assert robust["n_fgsm"] > 0.35
    assert robust["natural"] < 0.1


# ---------------------------------------------------------------- bad input
@pytest.mark.parametrize("make", [fgsm_rs, n_fgsm])
def test_l2_is_refused(make):
    with pytest.raises(ValueError, match="norm: got 'l2'"):
        make(PGD(1.0, 0.25, norm="l2"))


@pytest.mark.parametrize(
    ("noise", "error"), [(-0.1, ValueError), (math.nan, ValueError), (math.inf, ValueError), ("2", TypeError)]
)
def test_bad_noise_is_named(noise, error):
    with pytest.raises(error, match="noise: got"):
        n_fgsm(PGD(EPS), noise)


def test_n_fgsm_refuses_eps_per_row():
    with pytest.raises(TypeError, match="eps: got"):
        n_fgsm(PGD(torch.full((4,), 0.1)))


def update(objective, x, y, model=None):
    model = small_cnn() if model is None else model
    loss = objective.loss(model, objective.examples(model, x, y, seed=0, step=0))
    loss.backward()
    return loss


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x, y: (x * 2 + 1, y), "x: pixels run from"),
        (lambda x, y: (x * math.nan, y), "x: holds NaN"),
        (lambda x, y: (x, y - 100), "y: labels run from"),
        (lambda x, y: (x, y + 10), "y: labels run from"),
    ],
    ids=["range", "NaN", "negative label", "unknown label"],
)
def test_bad_batches_are_named(name, spoil, message, batch):
    with pytest.raises(ValueError, match=message):
        update(OBJECTIVES[name], *spoil(*batch))


def test_natural_loss_is_nan_where_the_host_cannot_read_labels(batch, monkeypatch):
    """As on a GPU: a label that the model does not know gives no loss and no gradient to train on."""
    monkeypatch.setattr(checks, "_readable", lambda t: False)
    x, y = batch
    assert update(natural(), x, y).isfinite()
    y[5] = 10
    model = small_cnn()
    assert update(natural(), x, y, model).isnan()
    assert all((p.grad == 0).all() for p in model.parameters())


def test_natural_loss_is_not_finite_where_logits_are_not(batch):
    model = small_cnn()
    for value in (math.nan, math.inf):
        with torch.no_grad():
            model[-1].bias[3] = value
        assert not update(natural(), *batch, model).isfinite()


# ---------------------------------------------------------------- GPU
@pytest.mark.gpu
@pytest.mark.parametrize("name", OBJECTIVES)
def test_same_examples_on_a_gpu(name, batch):
    model = clear()
    here = examples(OBJECTIVES[name], model, batch)
    there = examples(OBJECTIVES[name], model.cuda(), [t.cuda() for t in batch])
    assert torch.equal(here, there.cpu())


@pytest.mark.gpu
def test_unknown_label_on_a_gpu_gives_natural_training_no_loss(batch):
    model, (x, y) = small_cnn().cuda(), batch
    y[5] = 10
    assert update(natural(), x.cuda(), y.cuda(), model).isnan()
