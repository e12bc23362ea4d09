"""The reference of the methods against closed forms, a solver, and numbers worked out by hand."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from nets import sgd
from scipy.optimize import minimize
from torch import nn
from torch.nn import functional as F

from ham_reference import METHODS, awp, class_weights, losses
from ham_reference.attack import Attacked, attack
from ham_reference.class_weights import ClassStatistics

CLASSES = 4
ATTACK = {"eps": 0.1, "step_size": 0.03, "steps": 5}


def net(classes: int = CLASSES) -> nn.Module:
    """Smooth, with statistics that are not those of the start."""
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten(), nn.Linear(4 * 36, classes)
    )
    model(torch.rand(20, 1, 6, 6))
    return model


@pytest.fixture
def batch(seed):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(24, 1, 6, 6, generator=g), torch.randint(0, CLASSES, (24,), generator=g)


def attacked(seen: torch.Tensor, y: torch.Tensor, q: torch.Tensor | None = None) -> Attacked:
    hard = seen.argmax(1) != y
    return Attacked(torch.zeros(len(y), 1, 6, 6), hard, seen, q, (~hard).long(), torch.ones(len(y)))


# ---------------------------------------------------------------- losses
def test_losses_by_hand(seed):
    logits, y = torch.tensor([[0.0, math.log(3.0), 0.0]]), torch.tensor([0])  # p = .2, .6, .2
    assert losses.cross_entropy(logits, y).item() == pytest.approx(-math.log(0.2))
    smoothed = -(0.7 + 0.1) * math.log(0.2) - 0.1 * math.log(0.6) - 0.1 * math.log(0.2)
    assert losses.cross_entropy(logits, y, 0.3).item() == pytest.approx(smoothed)
    boosted = losses.boosted_cross_entropy(logits, y, 0.3).item()
    assert boosted == pytest.approx(smoothed - math.log(1.0001 - 0.6))
    logits, y = torch.randn(9, 5), torch.randint(0, 5, (9,))
    usual = F.cross_entropy(logits, y, reduction="none", label_smoothing=0.3)
    torch.testing.assert_close(losses.cross_entropy(logits, y, 0.3), usual)


def test_mart_by_the_authors_form(batch):
    x, y = batch
    model, x_adv, w = net().eval(), (x + 0.1 * torch.rand_like(x)).clamp(0, 1), torch.rand(len(x))
    method = METHODS["mart"](CLASSES, **ATTACK, beta=4.0)
    p, p_adv = F.softmax(model(x), 1), F.softmax(model(x_adv), 1)
    label = F.one_hot(y, CLASSES).bool()
    rival = torch.where(label, 0, p_adv).amax(1)
    bce = F.nll_loss(p_adv.log(), y, reduction="none") + F.nll_loss(
        torch.stack([1.0001 - rival + 1e-12] * CLASSES, 1).log(), y, reduction="none"
    )
    kl = F.kl_div(torch.log(p_adv + 1e-12), p, reduction="none").sum(1)
    expected = w * (bce + 4.0 * kl * (1.0000001 - p[label]))
    torch.testing.assert_close(method.each(model, x, x_adv, y, w, epoch=1), expected, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- class statistics and weights
def test_statistics_over_batches_by_hand():
    statistics = ClassStatistics(3, memory=0.5)
    first = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.7, 0.1], [0.1, 0.8, 0.1]]))
    statistics.add(first, torch.tensor([0, 0, 1]))
    statistics.add(torch.log(torch.tensor([[0.6, 0.1, 0.3]])), torch.tensor([0]))
    assert statistics.rows.tolist() == [2.0, 0.5, 0.0]
    assert statistics.hard.tolist() == [0.5, 0.0, 0.0]
    margin = (0.5 * (-0.25 + 0.5) - 0.3, 0.5 * -0.7)
    assert statistics.seen() == [0, 1]
    assert statistics.mean("margin").tolist() == pytest.approx([margin[0] / 2, -0.7], abs=1e-6)
    ce = -0.5 * math.log(0.5 * 0.2) - math.log(0.6)
    assert statistics.mean("ce")[:2].tolist() == pytest.approx([ce / 2, -math.log(0.8)], abs=1e-6)
    predicted = statistics.mean("predicted")
    assert predicted[0].tolist() == pytest.approx([(0.35 + 0.6) / 2, (0.475 + 0.1) / 2, (0.175 + 0.3) / 2], abs=1e-6)
    assert len(predicted) == 2


def test_hard_share_by_hand():
    hard, rows = torch.tensor([3.0, 0.0, 0.0]).double(), torch.tensor([5.0, 1.0, 0.0]).double()
    v = class_weights.hard_share(hard, rows, 0.5)  # of all rows a half is hard
    assert v.tolist() == pytest.approx([(3.5 / 6) ** 0.5, 0.5, 0.5**0.5])
    assert class_weights.hard_share(0 * hard, rows, 0.5).tolist() == [1, 1, 1]


@pytest.mark.parametrize("radius", [0.02, 0.1, 0.5])
def test_kl_ball_against_a_solver(radius, seed):
    a = torch.rand(6, dtype=torch.float64) * 2 - 1
    v = class_weights.kl_ball(a, radius)
    assert v.mean().item() == pytest.approx(1.0)
    assert -v.log().mean().item() == pytest.approx(radius, rel=1e-8)  # the budget is spent
    found = minimize(
        lambda p: -float(p @ a.numpy()), [1 / 6] * 6, method="SLSQP", bounds=[(1e-9, 1)] * 6,
        constraints=[
            {"type": "eq", "fun": lambda p: p.sum() - 1},
            {"type": "ineq", "fun": lambda p: radius + float(torch.from_numpy(p * 6).log().mean())},
        ], options={"ftol": 1e-13, "maxiter": 500},
    )  # fmt: skip
    best = float(v @ a / 6)
    assert best >= -found.fun - 1e-7
    assert best == pytest.approx(-found.fun, abs=1e-4)
    torch.testing.assert_close(class_weights.kl_ball(3 * a + 2, radius), v)


def test_kl_ball_where_classes_are_equal_or_nearly():
    assert class_weights.kl_ball(torch.full((3,), 0.3).double(), 0.1).tolist() == [1, 1, 1]
    v = class_weights.kl_ball(torch.tensor([0.0, 1e-9]).double(), 0.1)
    q = v[0].item() / 2  # of two classes: q (1 - q) = exp(-2 radius) / 4
    assert q * (1 - q) == pytest.approx(math.exp(-0.2) / 4)


def test_largest_weights_of_the_kl_ball():
    """One class of ten is worst, the others are alike: the figures of the closed form."""
    a = torch.tensor([1.0] + [0.0] * 9).double()
    for radius, largest in ((0.5, 5.7), (0.1, 2.8), (0.05, 2.2)):
        assert class_weights.kl_ball(a, radius)[0].item() == pytest.approx(largest, abs=0.1)


def test_chi2_and_exponentiated_by_hand():
    cost = torch.tensor([1.0, 2.0, 3.0]).double()
    t = math.sqrt(0.2) / math.sqrt(2 / 3)
    assert class_weights.chi2(cost, 0.1).tolist() == pytest.approx([1 - t, 1, 1 + t])
    assert class_weights.chi2(cost, 0.1).var(correction=0).item() == pytest.approx(0.2)  # mean t^2 = 2 * strength
    assert class_weights.chi2(cost, 2.0).tolist()[0] == 0
    assert class_weights.chi2(0 * cost, 2.0).tolist() == [1, 1, 1]
    e = [math.exp(2 * c) for c in (1, 2, 3)]
    assert class_weights.exponentiated(cost, 2.0).tolist() == pytest.approx([3 * v / sum(e) for v in e])


def test_dafa_weights_by_hand():
    s = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.4, 0.0, 0.6]]).double()
    gain01, gain02, gain21 = 0.3 * 0.8, 0.2 * 0.6, 0.0 * 0.8  # harder class first
    expected = [1 + gain01 + gain02, 1 - gain01 - gain21, 1 + gain21 - gain02]
    assert class_weights.dafa(s, 1.0).tolist() == pytest.approx(expected)
    assert class_weights.dafa(s, 9.0).tolist()[1:] == [0.05, 0.05]


# ---------------------------------------------------------------- methods
def test_gairat_weights_of_each_number_of_right_looks():
    method = METHODS["gairat"](CLASSES, eps=0.1, step_size=0.01, steps=10)
    looks = Attacked(None, None, None, None, torch.arange(11), torch.ones(11))
    w = method.row_weights(looks, torch.zeros(11, dtype=torch.int64), epoch=1)
    expected = [1, 1, 0.98, 0.88, 0.5, 0.12, 0.018, 0.0025, 3e-4, 5e-5, 6e-6]
    assert w.tolist() == pytest.approx(expected, rel=0.15)


def test_cfa_by_hand():
    method = METHODS["cfa"](CLASSES, **ATTACK, class_from=2)
    y = torch.tensor([0, 0, 1, 2])
    right = F.one_hot(torch.tensor([0, 1, 1, 3]), CLASSES).float()  # 1 of 2, 1 of 1, 0 of 1, none of class 3
    method.observe(attacked(right, y), y, epoch=1)
    each = torch.arange(4)
    assert method.budget(each, epoch=1)[0].tolist() == pytest.approx([0.1] * 4)
    method.end_epoch()
    eps, step_size = method.budget(each, epoch=2)
    assert eps.tolist() == pytest.approx([0.08, 0.13, 0.03, 0.1])
    assert step_size == 0.03
    assert method.factor(each, 2, method.lam_beta).tolist() == pytest.approx([1.0, 1.5, 0.5, 1.0])
    method.end_epoch()  # an epoch without rows
    assert method.budget(each, epoch=3)[0].tolist() == pytest.approx([0.1] * 4)


def test_wat_by_hand():
    method = METHODS["wat"](3, **ATTACK, beta=2.0, eta=0.5)
    y = torch.tensor([0, 1, 1])
    q = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.5, 0.25, 0.25]])
    looks = attacked(q.log(), y, q)
    assert method.row_weights(looks, y, 1).tolist() == pytest.approx([2 * 3 / 4] * 3)
    method.observe(attacked(torch.tensor([[0.25, 0.5, 0.25], *q[1:].tolist()]).log(), y, q), y, epoch=1)
    method.end_epoch()
    first = math.log(2) + 2 * 0.25 * math.log(2)  # KL((.5, .25, .25) || (.25, .5, .25)) = .25 log 2
    second = (math.log(2) + math.log(4)) / 2
    of_all = (first + 2 * second) / 3
    assert method.totals.tolist() == pytest.approx([first, second, of_all, of_all], rel=1e-6)
    e = [math.exp(0.5 * t) for t in method.totals.tolist()]
    w = [3 * v / sum(e) for v in e]
    assert method.row_weights(looks, y, 2).tolist() == pytest.approx([w[0] + w[3], w[1] + w[3], w[1] + w[3]])


def test_dafa_learns_once():
    method = METHODS["dafa"](2, **ATTACK, class_from=2)
    y = torch.tensor([0, 1])
    looks = attacked(torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log(), y)
    method.observe(looks, y, epoch=1)
    method.end_epoch()
    gain = 0.5 * 0.75
    assert method.w.tolist() == pytest.approx([1 + gain, 1 - gain])
    method.observe(attacked(looks.seen.flip(0), y), y, epoch=2)
    method.end_epoch()
    eps, step_size = method.budget(y, epoch=3)
    assert eps.tolist() == pytest.approx([0.1 * (1 + gain), 0.1 * (1 - gain)])
    assert step_size.tolist() == pytest.approx([0.03 * (1 + gain), 0.03 * (1 - gain)])


# ---------------------------------------------------------------- the update
def test_weight_perturbation_by_hand():
    """Of |w x|^2 / 2 the gradient points along w: the weight is longer by gamma while the gradient is taken."""
    model = nn.Linear(3, 3, bias=False)
    start = model.weight.detach().clone()

    def loss(m):
        return (m.weight**2).sum() / 2

    with awp.perturbed(model, loss, 0.1):
        torch.testing.assert_close(model.weight.detach(), 1.1 * start)
        with torch.no_grad():
            model.weight -= 1.0  # an optimiser's step
    torch.testing.assert_close(model.weight.detach(), start - 1.0)


def test_weight_perturbation_moves_weights_only_and_comes_back(batch):
    x, y = batch
    model = net().train()
    before = copy.deepcopy(model.state_dict())

    def loss(m):
        return F.cross_entropy(m(x), y)

    def inside():
        with awp.perturbed(model, loss, 0.05):
            now = model.state_dict()
            for name, was in before.items():
                if name in ("0.weight", "4.weight"):
                    assert (now[name] - was).norm().item() == pytest.approx(0.05 * was.norm().item(), rel=1e-4)
                else:
                    assert torch.equal(now[name], was), name
            assert loss(model.eval()).isfinite()
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="memory"):
        inside()
    for name, was in before.items():
        torch.testing.assert_close(model.state_dict()[name], was, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_rows_keep_to_their_own_ball(norm, batch):
    x, y = batch
    eps = torch.linspace(0.02, 0.3, len(x))
    result = attack(
        net(), x, y, eps=eps, step_size=eps / 2, steps=4, norm=norm, seed=1, step=0, early_drop=True, easy="jump",
        screen_steps=2,
    )  # fmt: skip
    delta = (result.x_adv - x).flatten(1)
    length = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    assert (length <= eps + 1e-6).all()
    assert (length > eps / 4).all()


def test_easy_rows_stop_or_jump_while_hard_ones_go_on(batch):
    x, y = batch
    model = net().eval()
    y[::2] = model(x[::2]).argmax(1)  # some of these are easy
    how = {"eps": 0.02, "step_size": 0.003, "norm": "linf", "seed": 1, "step": 0}
    early, late = (attack(model, x, y, steps=k, **how).x_adv for k in (2, 5))
    before = attack(model, x, y, steps=1, **how).x_adv
    stopped = attack(model, x, y, steps=5, early_drop=True, easy="stop", screen_steps=2, **how)
    jumped = attack(model, x, y, steps=5, early_drop=True, easy="jump", screen_steps=2, **how)
    hard = ~(model(early).argmax(1) == y)
    assert torch.equal(stopped.hard, hard)
    assert 0 < int(hard.sum()) < len(y)
    torch.testing.assert_close(stopped.seen, model(early).detach(), rtol=1e-5, atol=1e-6)
    for result in (stopped, jumped):
        assert torch.equal(result.x_adv[hard], late[hard])
    assert torch.equal(stopped.x_adv[~hard], early[~hard])
    again = early
    for _ in range(3):
        again = torch.min(torch.max(again + early - before, x - 0.02), x + 0.02).clamp(0, 1)
    torch.testing.assert_close(jumped.x_adv[~hard], again[~hard], rtol=0, atol=1e-6)
    assert (stopped.right_looks[~hard] == 5).all()


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_updates(name, batch):
    x, y = batch
    model = net()
    optimizer = sgd(model)
    method = METHODS[name](CLASSES, **ATTACK)
    if hasattr(method, "teacher"):
        method.teacher = net()
    before = copy.deepcopy(model.state_dict())
    for step in range(2):
        update = method.step(model, optimizer, x, y, seed=5, step=step, epoch=1)
        method.end_epoch()
        assert math.isfinite(update.loss)
        assert len(update.weights) == len(update.rows) > 0
        if not method.as_is:
            assert update.weights.mean().item() == pytest.approx(1.0, rel=1e-5)
    assert not torch.equal(before["4.weight"], model.state_dict()["4.weight"])
    assert model.training
