"""PGD attack: against the reference, inside the ball, and the model left as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from nets import Broken, Counting, small_cnn
from torch import nn

import ham_kernels as ham
import ham_reference as reference
from ham_kernels import engine
from ham_kernels.attack.pgd import PGD, Attack, cw_gradient

EPS = {"linf": (0.2, 0.05), "l2": (1.0, 0.25)}


@pytest.fixture
def batch():
    return torch.rand(24, 1, 8, 8), torch.randint(0, 10, (24,))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("random_start", [True, False])
def test_attack_is_the_reference(batch, norm, random_start, seed):
    model, (x, y), (eps, step_size) = small_cnn(seed), batch, EPS[norm]
    settings = {"eps": eps, "step_size": step_size, "steps": 5, "norm": norm, "random_start": random_start}
    ours = ham.pgd_attack(model, x, y, **settings, generator=torch.Generator().manual_seed(3))
    theirs = reference.pgd_attack(model, x, y, **settings, generator=torch.Generator().manual_seed(3))
    # the two CE gradients differ in the last bits; where a pixel's gradient is all but 0 its sign may then differ
    assert ((ours - theirs).abs() > 1e-5).float().mean() < 0.01


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_attack_stays_in_the_ball_and_raises_the_loss(batch, norm, seed):
    model, (x, y), (eps, step_size) = small_cnn(seed), batch, EPS[norm]
    x_adv = ham.pgd_attack(model, x, y, eps=eps, step_size=step_size, steps=10, norm=norm)
    delta = (x_adv - x).flatten(1)
    size = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    assert size.max() <= eps + 1e-5
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    model.eval()
    loss = nn.functional.cross_entropy
    assert loss(model(x_adv), y) > loss(model(x), y)


def test_zero_steps_give_the_start(batch):
    model, (x, y) = small_cnn(), batch
    assert torch.equal(ham.pgd_attack(model, x, y, steps=0, random_start=False), x)
    start = ham.pgd_attack(model, x, y, eps=0.1, steps=0)
    assert 0 < (start - x).abs().max() <= 0.1 + 1e-6


def test_eps_and_step_per_row(batch):
    """Rows with their own budget are attacked as if each budget had been given to the whole batch."""
    model, (x, y) = small_cnn(), batch
    eps = torch.where(torch.arange(24) % 2 == 0, 0.1, 0.3)
    mixed = ham.pgd_attack(model, x, y, eps=eps, step_size=eps / 4, steps=3, generator=torch.Generator().manual_seed(1))
    for part, value in ((slice(0, None, 2), 0.1), (slice(1, None, 2), 0.3)):
        alone = ham.pgd_attack(
            model, x, y, eps=value, step_size=value / 4, steps=3, generator=torch.Generator().manual_seed(1)
        )
        torch.testing.assert_close(mixed[part], alone[part], rtol=0, atol=1e-6)


def test_default_generator_makes_attacks_repeatable(batch):
    model, (x, y) = small_cnn(), batch
    torch.manual_seed(5)
    first = ham.pgd_attack(model, x, y, eps=0.1, step_size=0.05, steps=2)
    second = ham.pgd_attack(model, x, y, eps=0.1, step_size=0.05, steps=2)
    torch.manual_seed(5)
    again = ham.pgd_attack(model, x, y, eps=0.1, step_size=0.05, steps=2)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_inside_no_grad_and_with_images_that_require_grad(batch):
    model, (x, y) = small_cnn(), batch
    plain = ham.pgd_attack(model, x, y, steps=2, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        inside = ham.pgd_attack(model, x, y, steps=2, generator=torch.Generator().manual_seed(1))
    x.requires_grad_()
    leaf = ham.pgd_attack(model, x, y, steps=2, generator=torch.Generator().manual_seed(1))
    assert torch.equal(plain, inside)
    assert torch.equal(plain, leaf)
    assert not leaf.requires_grad
    assert x.grad is None


def test_a_step_is_one_forward_and_one_backward(batch):
    model, (x, y) = Counting(small_cnn()), batch
    ham.pgd_attack(model, x, y, steps=7)
    assert (model.forward_rows, model.input_backward_rows) == (7 * 24, 7 * 24)


def state_of(model: nn.Module):
    return (
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        {k: v.clone() for k, v in model.state_dict().items()},
    )


def assert_same_state(before, after):
    assert before[:2] == after[:2]
    for a, b in zip(before[2], after[2], strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert all(torch.equal(before[3][k], after[3][k]) for k in before[3])


@pytest.mark.parametrize("fails", [False, True])
def test_model_is_left_as_it_was(batch, fails):
    """Modes module by module, requires_grad, .grad, weights and BatchNorm statistics; also when the model raises."""
    inner, (x, y) = small_cnn(), batch
    nn.functional.cross_entropy(inner(x), y).backward()
    inner[2].eval()  # a user's frozen BatchNorm
    inner[1].weight.requires_grad_(False)

    def boom(z):
        raise RuntimeError("boom")

    model = Broken(inner, boom, after=2 if fails else 10**9)
    before = copy.deepcopy(state_of(model))
    if fails:
        with pytest.raises(RuntimeError, match="boom"):
            ham.pgd_attack(model, x, y, steps=5)
    else:
        ham.pgd_attack(model, x, y, steps=5)
    assert_same_state(before, state_of(model))


def test_images_in_channels_last(batch):
    model = small_cnn(channels=3)
    x, y = torch.rand(6, 3, 8, 8), torch.randint(0, 10, (6,))
    plain = ham.pgd_attack(model, x, y, steps=3, generator=torch.Generator().manual_seed(2))
    last = ham.pgd_attack(
        model, x.contiguous(memory_format=torch.channels_last), y, steps=3, generator=torch.Generator().manual_seed(2)
    )
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert ((plain - last).abs() > 1e-5).float().mean() < 0.02  # convolutions in another order of summation


def test_bf16_autocast_attacks_about_as_well(batch):
    model, (x, y) = small_cnn(), batch
    x_adv = ham.pgd_attack(model, x, y, eps=0.2, step_size=0.05, steps=10, precision="bf16")
    assert x_adv.dtype == torch.float32
    model.eval()
    loss = nn.functional.cross_entropy
    full = ham.pgd_attack(model, x, y, eps=0.2, step_size=0.05, steps=10)
    clean, strong, weak = loss(model(x), y), loss(model(full), y), loss(model(x_adv), y)
    assert weak - clean > 0.8 * (strong - clean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cw_gradient_is_that_of_the_margin(dtype):
    """Against autograd, where the label is the largest logit, the smallest, or one among others."""
    z, y = torch.randn(50, 7).to(dtype), torch.randint(0, 7, (50,))
    z = (z + 1e-2 * torch.arange(7)).detach().requires_grad_()  # bf16 logits tie; float arithmetic parts them
    is_label = nn.functional.one_hot(y, 7).bool()
    margin = z.masked_fill(is_label, -torch.inf).amax(1) - z.gather(1, y[:, None])[:, 0]
    (expected,) = torch.autograd.grad(margin.sum(), z)
    others = z.masked_fill(is_label, -torch.inf)
    alone = (others == others.amax(1, keepdim=True)).sum(1) == 1  # autograd shares the gradient among ties
    assert alone.sum() > 25
    assert torch.equal(cw_gradient(z.detach(), y)[alone], expected[alone])


def test_cw_gradient_takes_one_of_tied_others():
    z = torch.tensor([[1.0, 1.0, 1.0], [0.0, 2.0, 2.0]])
    assert cw_gradient(z, torch.tensor([1, 0])).tolist() == [[1, -1, 0], [-1, 1, 0]]


def test_cw_raises_the_margin_where_softmax_saturates(batch):
    """Logits times 1e4: the cross entropy has no gradient left on rows that are right by far, the margin has."""
    inner, (x, _) = small_cnn().eval(), batch
    model = Broken(inner, lambda z: z * 1e4)
    y = inner(x).argmax(1)
    ends = {}
    for loss in ("ce", "cw"):
        pgd = PGD(0.1, 0.02, 5, random_start=False, loss=loss)
        with engine.attack_mode(model):
            attack = Attack(model, x, y, pgd, seed=0, step=0)
            attack.steps(pgd.steps)
        ends[loss] = attack.rows.x_adv
    lead = {loss: torch.topk(inner(x_adv), 2).values @ torch.tensor([1.0, -1.0]) for loss, x_adv in ends.items()}
    before = torch.topk(inner(x), 2).values @ torch.tensor([1.0, -1.0])
    still = (ends["ce"] == x).flatten(1).all(1)
    assert still.float().mean() > 0.5
    assert torch.equal(lead["ce"][still], before[still])
    assert (lead["cw"] < before).all()


def test_observer_sees_the_logits_at_each_point(batch):
    model, (x, y) = Counting(small_cnn().eval()), batch
    pgd, seen = PGD(0.2, 0.05, 3), {}
    with engine.attack_mode(model):
        attack = Attack(model, x, y, pgd, seed=1, step=0)
        start = attack.rows.x_adv.clone()
        attack.steps(3, lambda k, z: seen.setdefault(k, z))
        assert model.forward_rows == 3 * len(x)  # looking costs no forward
        torch.testing.assert_close(seen[0], model(start))
    assert list(seen) == [0, 1, 2]
    assert not any(z.requires_grad for z in seen.values())


def test_bad_loss():
    with pytest.raises(ValueError, match="loss: got 'dlr'; allowed are 'ce', 'cw'"):
        PGD(loss="dlr")
