"""Weights by class: the six rules by hand, their state over batches, imbalance, absent classes, epochs before them."""

from __future__ import annotations

import copy
import math
import warnings
from typing import get_args

import pytest
import torch
from nets import Constant, sgd, small_cnn
from torch.nn import functional as F

import ham_kernels as ham
from ham_kernels.attack.pgd import PGD
from ham_kernels.common import field_types
from ham_kernels.common.troubles import HamWarning
from ham_kernels.engine import NonFiniteError
from ham_kernels.methods import EpochEnd, Objective, class_weights
from ham_kernels.methods.class_weights import RULES
from ham_kernels.methods.mining import Look

ATTACK = {"eps": 0.2, "step_size": 0.05, "steps": 3}
rules = pytest.mark.parametrize("rule", RULES)


@pytest.fixture
def batch(seed):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(40, 1, 8, 8, generator=g), torch.randint(0, 10, (40,), generator=g)


@pytest.fixture
def logits(seed):
    g = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(60, 5, generator=g), torch.randint(0, 5, (60,), generator=g)


def memory_of(rule: str, classes: int) -> torch.nn.Module:
    memory = torch.nn.Module()
    for name, value in class_weights.empty_state(rule, classes).items():
        memory.register_buffer(name, value)
    return memory


# ---------------------------------------------------------------- rules
@pytest.mark.parametrize("radius", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("classes", [2, 10, 100])
def test_kl_ball_is_the_worst_distribution(radius, classes, seed):
    """The conditions of Karush, Kuhn and Tucker, which suffice for a convex problem: a_c = nu - mu / (C p_c)."""
    a = torch.randn(classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    w = class_weights.kl_ball_weights(a, radius).double()
    assert w.mean().item() == pytest.approx(1.0, rel=1e-6)
    assert -w.log().mean().item() == pytest.approx(radius, rel=1e-4)  # the budget is spent
    design = torch.stack([torch.ones_like(w), -1 / w], 1)
    nu, mu = torch.linalg.lstsq(design, a[:, None]).solution[:, 0]
    assert mu > 0
    torch.testing.assert_close(nu - mu / w, a, rtol=0, atol=1e-5 * (1 + (mu / w).max().item()))


@pytest.mark.parametrize("radius", [1e-4, 0.1, 2.0, 20.0])
def test_kl_ball_at_its_edges(radius):
    assert torch.equal(class_weights.kl_ball_weights(torch.full((7,), 0.3), radius), torch.ones(7))
    alone = class_weights.kl_ball_weights(torch.tensor([0.0, 0.0, 0.0, 1.0]), radius)
    others = class_weights.kl_ball_weights(torch.tensor([0.0, 1.0, 1.0, 1.0]), radius)
    for w in (alone, others):
        assert w.isfinite().all()
        assert w.sum().item() == pytest.approx(4.0, rel=1e-5)
        assert -w.double().log().mean().item() == pytest.approx(radius, rel=1e-3)
    a = torch.tensor([0.1, -0.4, 0.25, 0.9])
    torch.testing.assert_close(
        class_weights.kl_ball_weights(a, radius),
        class_weights.kl_ball_weights(-3 + 100 * a, radius),
        rtol=1e-4,
        atol=1e-6,
    )


def test_zero_radius_treats_all_alike():
    a = torch.tensor([0.1, -0.4, 0.25, 0.9])
    for w in (class_weights.kl_ball_weights(a, 0.0), class_weights.chi2_weights(a, 0.0)):
        torch.testing.assert_close(w, torch.ones(4), rtol=0, atol=1e-6)


def test_chi2_by_hand():
    losses = torch.tensor([1.0, 2.0, 3.0])
    std = math.sqrt(2 / 3)
    expected = [1 - math.sqrt(0.4) / std, 1.0, 1 + math.sqrt(0.4) / std]
    torch.testing.assert_close(class_weights.chi2_weights(losses, 0.2), torch.tensor(expected))
    assert class_weights.chi2_weights(losses, 50.0)[0] == 0  # at least
    assert torch.equal(class_weights.chi2_weights(torch.full((3,), 0.7), 1.0), torch.ones(3))


def test_dafa_by_hand(seed):
    s = torch.rand(6, 6, generator=torch.Generator().manual_seed(seed)).softmax(1)
    expected = torch.ones(6)
    for i in range(6):
        for j in range(6):
            if j != i:
                expected[i] += s[i, j] * s[j, j] if s[i, i] < s[j, j] else -s[j, i] * s[i, i]
    torch.testing.assert_close(class_weights.dafa_weights(s, 1.0), expected)
    assert (class_weights.dafa_weights(s, 1e6) >= class_weights.LEAST).all()


def test_hard_share_by_hand():
    sums, counts = torch.tensor([[3.0], [1.0], [0.0]]), torch.tensor([4.0, 4.0, 0.0])
    expected = torch.tensor([3.5 / 5, 1.5 / 5, 0.5]) ** 0.7  # one row more, as hard as half of all are
    torch.testing.assert_close(class_weights.hard_share_weights(sums, counts, 0.7), expected)
    assert torch.equal(class_weights.hard_share_weights(torch.zeros(3, 1), counts, 0.7), torch.ones(3))


def test_hedge_by_hand():
    """Hard shares of an epoch by class and of all rows; a share of the totals stays, what was counted does not."""
    memory = memory_of("hedge", 3)
    z = torch.tensor([[2.0, 0, 0], [0, 2, 0], [0, 2, 0], [2, 0, 0]])
    y = torch.tensor([0, 1, 0, 1])  # of class 0 and of class 1 one row each is hard, of class 2 there is none
    class_weights.observe(memory, Look(z, y), "hedge", 0.5)
    class_weights.observe(memory, Look(z[:2], y[:2]), "hedge", 0.5)  # does not fade within an epoch
    assert torch.equal(class_weights.weights_of(memory, "hedge", 3.0), torch.full((3,), 2 * 3 / 4))  # no epoch yet
    class_weights.end_epoch(memory, "hedge", 0.5)
    third = 1 / 3
    torch.testing.assert_close(memory.class_totals, torch.full((4,), third, dtype=torch.float64))
    class_weights.observe(memory, Look(z[1:3], y[1:3]), "hedge", 0.5)
    class_weights.end_epoch(memory, "hedge", 0.5)
    totals = third / 2 + torch.tensor([1.0, 0.0, 0.5, 0.5], dtype=torch.float64)  # a class that is absent is as all are
    torch.testing.assert_close(memory.class_totals, totals)
    memory.class_totals.copy_(torch.tensor([0.0, 1.0, 2.0, 1.0]))
    e = [math.exp(3 * t) for t in (0, 1, 2, 1)]
    expected = [3 * (v + e[3]) / sum(e) for v in e[:3]]
    torch.testing.assert_close(class_weights.weights_of(memory, "hedge", 3.0), torch.tensor(expected))
    memory.class_totals.mul_(1000)  # of a long training: no exponential overflows
    assert class_weights.weights_of(memory, "hedge", 3.0).isfinite().all()


def test_hedge_moves_with_the_epochs_of_a_training(batch):
    """Nothing in the first epoch; then the class that stays hard weighs more; through a checkpoint as without one."""
    x, y = batch
    y = y % 2
    model = Constant(torch.tensor([1.0, 0.0]))  # class 1 is hard always
    method = ham.methods.PGDAT(start_epoch=1, class_weights="hedge", class_strength=1.0)
    objective = Objective(method, PGD(**ATTACK))
    seen = []
    for epoch in range(1, 4):
        made = objective.examples(model, x, y, seed=1, step=epoch)
        seen.append(made.weights)
        objective.end_epoch(EpochEnd(epoch, model, None, None))
    torch.testing.assert_close(seen[0], torch.ones(len(y)))
    ratio = [float(w[y == 1][0] / w[y == 0][0]) for w in seen]
    assert ratio[2] > ratio[1] > ratio[0] == pytest.approx(1.0)
    mean = float(y.float().mean())
    e0, e1, em = 1.0, math.exp(1.9), math.exp(1.9 * mean)
    assert ratio[2] == pytest.approx((e1 + em) / (e0 + em), rel=1e-5)


@pytest.mark.parametrize("method", [ham.methods.Fair(), ham.methods.WAT(), ham.methods.CFA(), ham.methods.DAFA()])
def test_an_epoch_without_a_batch_leaves_nothing(method):
    objective = Objective(method, PGD(**ATTACK))
    objective.end_epoch(EpochEnd(1, small_cnn(), None, None))
    assert objective.epoch == 2
    assert not objective.memory()


def test_every_rule_can_be_named():
    allowed = get_args(field_types.hints(ham.methods.PGDAT)["class_weights"])
    assert set(allowed) == {"none", *RULES}


# ---------------------------------------------------------------- state
@rules
def test_state_fades_and_is_divided_by_counts(rule, logits):
    z, y = logits
    memory = memory_of(rule, 5)
    keeps = 1.0 if RULES[rule].by_epoch else 0.5
    for part in (slice(0, 20), slice(20, 60)):
        class_weights.observe(memory, Look(z[part], y[part]), rule, 0.5)
    per_row = RULES[rule].rows(z, y).double()
    share = torch.where(torch.arange(60) < 20, keeps, 1.0)
    for c in range(5):
        rows = y == c
        assert memory.class_counts[c].item() == pytest.approx(share[rows].sum().item())
        torch.testing.assert_close(memory.class_sums[c], (per_row * share[:, None])[rows].sum(0), rtol=1e-5, atol=1e-5)
    twice = memory_of(rule, 5)  # each row given twice changes nothing: classes need not be of one size
    class_weights.observe(twice, Look(z.repeat(2, 1), y.repeat(2)), rule, 0.0)
    once = memory_of(rule, 5)
    class_weights.observe(once, Look(z, y), rule, 0.0)
    if rule != "hard_share":
        torch.testing.assert_close(
            class_weights.weights_of(twice, rule, None),
            class_weights.weights_of(once, rule, None),
            rtol=1e-4,
            atol=1e-5,
        )


def test_small_differences_of_long_sums_count(logits):
    """chi2 divides by the spread of the classes; where they hardly differ, sums in fp32 would decide."""
    z, y = logits
    z, memory = 1e-4 * z, memory_of("chi2", 5)
    for _ in range(30):
        class_weights.observe(memory, Look(z, y), "chi2", 0.99)
    losses = class_weights.cross_entropy(z, y).double()
    means = torch.stack([losses[y == c].mean() for c in range(5)])
    expected = class_weights.chi2_weights(means, 0.1).float()
    torch.testing.assert_close(class_weights.weights_of(memory, "chi2", 0.1), expected, rtol=0, atol=1e-6)


@rules
def test_absent_classes_and_single_ones(rule, logits):
    z, y = logits
    for labels in (y.clamp(max=2), torch.full_like(y, 3)):
        memory = memory_of(rule, 5)
        class_weights.observe(memory, Look(z, labels), rule, 0.9)
        class_weights.end_epoch(memory, rule, 0.9)
        w = class_weights.weights_of(memory, rule, None)
        assert w.isfinite().all()
        assert (w >= 0).all()


@rules
@pytest.mark.parametrize("more", [1, 200])
def test_classes_that_no_row_is_of_change_nothing(rule, more, logits):
    """A head with more outputs than there are classes, or a subset that lacks some, trains as without them."""
    z, y = logits
    own, wide = memory_of(rule, 5), memory_of(rule, 5 + more)
    for _ in range(2):
        class_weights.observe(own, Look(z, y), rule, 0.9)
        class_weights.observe(wide, Look(F.pad(z, (0, more), value=-40.0), y), rule, 0.9)
    for memory in (own, wide):
        class_weights.end_epoch(memory, rule, 0.9)
    v, w = (class_weights.weights_of(memory, rule, None) for memory in (own, wide))
    if rule in ("hedge", "exponentiated"):  # up to a factor, as rules are
        v, w = v / v[0], w / w[0]
    torch.testing.assert_close(w[:5], v, rtol=1e-5, atol=1e-5)


def test_what_rows_are_by(logits):
    z, y = logits
    p = F.softmax(z, 1)
    own, other = p.gather(1, y[:, None])[:, 0], p.scatter(1, y[:, None], 0).amax(1)
    torch.testing.assert_close(class_weights.probability_margin(z, y), other - own)
    torch.testing.assert_close(class_weights.cross_entropy(z, y), F.cross_entropy(z, y, reduction="none"))
    assert torch.equal(class_weights.is_hard(z, y), ~(own > other))
    assert class_weights.is_hard(torch.tensor([[1.0, 1.0], [torch.nan, 0.0]]), torch.tensor([0, 0])).all()
    assert class_weights.for_rows(torch.tensor([1.0, 2.0]), torch.tensor([1, 0, 7, -3])).isfinite().all()


# ---------------------------------------------------------------- in a method
@rules
@pytest.mark.parametrize("switches", [{}, {"early_drop": True, "easy": "drop"}, {"early_drop": True, "easy": "jump"}])
def test_rows_weigh_by_their_class(rule, switches, batch):
    """Mean 1 over the rows in the loss; equal within a class; from what the attack looked at anyway."""
    x, y = batch
    model = small_cnn()
    y = torch.where(torch.arange(len(y)) < 20, model.eval()(x).argmax(1), y)
    model.train()
    method = ham.methods.PGDAT(start_epoch=1, class_weights=rule, screen_steps=1, **switches)
    objective = Objective(method, PGD(**ATTACK))
    made = objective.examples(model, x, y, seed=1, step=2)
    assert made.weights.mean().item() == pytest.approx(1.0, rel=1e-5)
    table = class_weights.weights_of(objective, rule, None)
    w = table[made.y]
    torch.testing.assert_close(made.weights, w / w.mean())
    model.eval()
    steps = 1 if switches else ATTACK["steps"] - 1
    seen = Objective(ham.methods.PGDAT(start_epoch=1), PGD(**ATTACK | {"steps": steps})).examples(
        model, x, y, seed=1, step=2
    )
    torch.testing.assert_close(made.look.z, model(seen.x_adv).detach(), rtol=1e-4, atol=1e-5)


def test_strength_zero_is_no_weights(batch):
    x, y = batch
    model = small_cnn()
    for rule in RULES:
        method = ham.methods.PGDAT(start_epoch=1, class_weights=rule, class_strength=0.0)
        made = Objective(method, PGD(**ATTACK)).examples(model, x, y, seed=1, step=2)
        torch.testing.assert_close(made.weights, torch.ones(len(y)), rtol=0, atol=1e-6)


def test_epochs_before_class_from_only_look(batch):
    x, y = batch
    method = ham.methods.PGDAT(start_epoch=1, class_weights="hard_share", class_from=3)
    objective = Objective(method, PGD(**ATTACK))
    model = small_cnn()
    for epoch, weighs in ((1, False), (2, False), (3, True)):
        objective.epoch = epoch
        assert (objective.examples(model, x, y, seed=1, step=epoch).weights is not None) == weighs
    assert objective.class_counts.sum() == pytest.approx(40 * (1 + 0.9 + 0.81))


def test_hams_weights_and_those_of_classes_multiply(batch):
    x, y = batch
    model = small_cnn()
    both = ham.methods.PGDAT(start_epoch=1, reweight=True, class_weights="chi2")
    objective = Objective(both, PGD(**ATTACK))
    made = objective.examples(model, x, y, seed=1, step=2)
    alone = Objective(ham.methods.PGDAT(start_epoch=1, reweight=True), PGD(**ATTACK)).examples(
        model, x, y, seed=1, step=2
    )
    product = alone.weights * class_weights.weights_of(objective, "chi2", None)[y]
    torch.testing.assert_close(made.weights, product / product.mean())


def test_statistics_are_saved_and_undone(batch):
    x, y = batch
    model = small_cnn()
    trainer = ham.Trainer(model, sgd(model), ham.methods.Fair(class_weights="dafa"), **ATTACK)
    trainer.train_step(x, y, epoch=1)
    memory = trainer.phases.method
    before = {name: b.clone() for name, b in memory.named_buffers()}
    state = copy.deepcopy(trainer.state_dict())
    twin = small_cnn()
    again = ham.Trainer(twin, sgd(twin), ham.methods.Fair(class_weights="dafa"), **ATTACK)
    again.load_state_dict(state)
    for name, b in again.phases.method.named_buffers():
        assert torch.equal(b, before[name])
    with pytest.raises(ValueError, match="its method remembers class_counts, class_sums"):
        ham.Trainer(twin, sgd(twin), ham.methods.PGDAT(), **ATTACK).load_state_dict(state)
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    with pytest.raises(NonFiniteError):
        trainer.train_step(x, y, epoch=1)
    for name, b in memory.named_buffers():
        assert torch.equal(b, before[name])


def test_a_batch_that_weighs_nothing_makes_a_loss_of_zero():
    """χ² may give a class no weight; a batch of that class alone has no mean to be scaled by."""
    x, y = torch.rand(6, 1, 2, 2), torch.zeros(6, dtype=torch.int64)
    method = ham.methods.PGDAT(start_epoch=1, class_weights="chi2", class_strength=50.0)
    objective = Objective(method, PGD(**ATTACK))
    model = Constant([2.0, 0.0, 0.0])
    objective.examples(model, x, torch.tensor([1, 1, 2, 2, 0, 0]), seed=1, step=1)
    made = objective.examples(model, x, y, seed=1, step=2)
    assert made.weights.tolist() == [0.0] * 6
    assert objective.loss(model, made).item() == 0.0


def test_dafa_needs_an_epoch_of_its_own_before_its_weights():
    with pytest.raises(ValueError, match="class_from: got 3 with start_epoch=4"):
        ham.methods.DAFA(start_epoch=4, class_from=3)
    with pytest.raises(ValueError, match="class_from: got 1 with start_epoch=1"):
        ham.methods.DAFA(class_from=1)


def test_a_loss_says_that_it_forgets(batch):
    """A method given to loss() anew each time has no memory; an Objective made once has."""
    model = small_cnn()
    with pytest.warns(HamWarning, match="method: fair goes by earlier batches or by epochs"):
        ham.loss(ham.methods.Fair(), model, *batch, **ATTACK)
    for by_epoch in (ham.methods.MAIL(), ham.methods.FAT()):  # in epoch 1 for ever, they would be another method
        with pytest.warns(HamWarning, match=f"method: {by_epoch.title} goes by earlier batches or by epochs"):
            ham.loss(by_epoch, model, *batch, **ATTACK)
    with warnings.catch_warnings():
        warnings.simplefilter("error", HamWarning)
        ham.loss(ham.methods.FAAL(), model, *batch, **ATTACK)  # by this batch alone
        objective = Objective(ham.methods.Fair(class_weights="hard_share"), PGD(**ATTACK))
        for _ in range(2):
            ham.loss(objective, model, *batch)
    assert objective.class_counts.sum() == pytest.approx(40 * 1.9)
