"""Two switches of every method: rows weighed by their label's probability under attack; training at a larger eps."""

from __future__ import annotations

import pytest
import torch
from nets import sgd, small_cnn
from torch.nn import functional as F

import ham_kernels as ham
from ham_kernels.attack.pgd import PGD
from ham_kernels.methods import Objective

ATTACK = {"eps": 0.2, "step_size": 0.05, "steps": 4}
SCREENED = {"early_drop": True, "screen_steps": 2}


@pytest.fixture
def batches(seed):
    g = torch.Generator().manual_seed(seed)
    return [(torch.rand(60, 1, 8, 8, generator=g), torch.randint(0, 4, (60,), generator=g)) for _ in range(3)]


def net() -> torch.nn.Module:
    """Sure of some rows."""
    torch.manual_seed(0)
    model = small_cnn()
    with torch.no_grad():
        next(m for m in reversed(list(model.modules())) if isinstance(m, torch.nn.Linear)).weight.mul_(20)
    return model


def objective(**switches) -> Objective:
    return Objective(ham.methods.PGDAT(start_epoch=1, **switches), PGD(**ATTACK))


# ---------------------------------------------------------------- trust
@pytest.mark.parametrize("power", [0.3, 1.0])
def test_weights_of_the_first_batch(power, batches):
    """p^q over its mean in the class; over all rows the mean is 1, and every class weighs as many as its rows."""
    x, y = batches[0]
    made = objective(trust=power).examples(net(), x, y, seed=1, step=0)
    p = F.softmax(made.look.z, 1).gather(1, y[:, None])[:, 0] ** power
    for c in range(4):
        torch.testing.assert_close(made.weights[y == c], p[y == c] / p[y == c].mean(), rtol=1e-5, atol=1e-6)
    assert made.weights.std() > 0.01


def test_classes_weigh_what_they_did_whatever_the_model_has_forgotten(batches):
    """A mean of earlier batches would let a class go of which the model has just lost all rows."""
    x, y = batches[0]
    model, made = net(), objective(trust=1.0)
    made.examples(model, x, y, seed=1, step=0)
    with torch.no_grad():
        model.get_parameter([name for name, _ in model.named_parameters()][-1])[2] += 20  # one answer to all
    found = made.examples(model, x, y, seed=1, step=1)
    for c in range(4):
        assert found.weights[y == c].mean().item() == pytest.approx(1, rel=1e-4)


def test_a_row_alone_in_its_class_has_weight_1(batches):
    x, y = batches[0]
    alone = torch.cat([(y == 0).nonzero()[:1, 0], (y == 1).nonzero()[:5, 0]])
    made = objective(trust=1.0).examples(net(), x[alone], y[alone], seed=1, step=0)
    assert made.weights[0].item() == pytest.approx(1, rel=1e-5)
    assert made.weights[1:].std() > 0


@pytest.mark.parametrize("switches", [{}, {"rows": "random"}, {"round_to": 8}, {"easy": "jump"}, {"bn_rows": "all"}])
def test_rows_keep_their_own_where_others_leave(switches, batches):
    x, y = batches[0]
    made = objective(trust=1.0, **SCREENED, **switches).examples(net(), x, y, seed=1, step=0)
    kept = slice(None) if made.index is None else made.index.long()
    assert torch.equal(y[kept], made.y)
    torch.testing.assert_close(made.label_ce, F.cross_entropy(made.look.z, y, reduction="none")[kept])


def test_batches_attacked_as_one(batches):
    """Each has its own rows."""
    (x, y), (x2, y2) = batches[:2]
    group = objective(trust=1.0, **SCREENED)
    parts = group.group_examples(net(), torch.cat([x, x2]), torch.cat([y, y2]), (60, 60), seed=1, step=0)
    for part, labels in zip(parts, (y, y2), strict=True):
        expected = F.cross_entropy(part.look.z, labels, reduction="none")[part.hard]
        torch.testing.assert_close(part.label_ce, expected)


def test_its_power_0_is_the_method_as_it_was(batches):
    made = objective().examples(net(), *batches[0], seed=1, step=0)
    assert (made.weights, made.label_ce, made.look) == (None, None, None)


def test_it_multiplies_what_else_weighs_rows(batches):
    alone = {"trust": {"trust": 0.5}, "reweight": {"reweight": True}, "class_weights": {"class_weights": "hard_share"}}
    weights = {
        name: objective(**switches).examples(net(), *batches[0], seed=1, step=0).weights
        for name, switches in {**alone, "all": {k: v for s in alone.values() for k, v in s.items()}}.items()
    }
    product = weights["trust"] * weights["reweight"] * weights["class_weights"]
    torch.testing.assert_close(weights["all"], product / product.mean(), rtol=1e-5, atol=1e-6)


def test_a_row_that_is_lost_without_doubt_has_a_finite_weight(batches):
    model = net()
    with torch.no_grad():
        model.get_parameter([name for name, _ in model.named_parameters()][-1])[0] = 1e4
    x, y = batches[0]
    made = objective(trust=1.0).examples(model, x, y, seed=1, step=0)
    assert torch.isfinite(made.weights).all()


# ---------------------------------------------------------------- eps_factor
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("step_sizes", [(), (2.0, 1.0, 0.5)])
def test_attacks_reach_so_many_times_as_far(norm, step_sizes, batches):
    """As an attack of that eps and step size would."""
    x, y = batches[0]
    attack = ATTACK | {"norm": norm}
    wide = Objective(ham.methods.PGDAT(start_epoch=1, eps_factor=1.5, step_sizes=step_sizes), PGD(**attack))
    told = {**attack, "eps": 1.5 * attack["eps"], "step_size": 1.5 * attack["step_size"]}
    usual = Objective(ham.methods.PGDAT(start_epoch=1, step_sizes=step_sizes), PGD(**told))
    a, b = (o.examples(net(), x, y, seed=1, step=0).x_adv for o in (wide, usual))
    assert torch.equal(a, b)
    length = (a - x).abs().amax() if norm == "linf" else (a - x).flatten(1).norm(dim=1).amax()
    assert attack["eps"] < length.item() <= 1.5 * attack["eps"] + 1e-5


def test_whoever_judges_keeps_to_eps(batches):
    model = net()
    trainer = ham.Trainer(model, sgd(model), ham.methods.PGDAT(start_epoch=1, eps_factor=1.5), **ATTACK)
    report = trainer.fit(batches, 1, val_loader=batches, val_attacks=("pgd5",))[-1]
    expected = ham.evaluate(model, batches, ("pgd5",), eps=ATTACK["eps"], step_size=ATTACK["step_size"])
    assert report.val["pgd5"].per_class[:4] == expected["pgd5"].per_class[:4]


def test_refused_where_they_have_no_effect():
    for told in ({"trust": 0.5}, {"eps_factor": 1.25}):
        name = next(iter(told))
        with pytest.raises(ValueError, match=f"{name}: got .*natural has no attack"):
            ham.methods.Natural(**told)
    with pytest.raises(ValueError, match=r"trust: got 0\.5; Free-AT"):
        ham.methods.FreeAT(trust=0.5)
    assert ham.methods.FreeAT(eps_factor=1.25).attack(PGD(eps=0.25)).eps == 0.25  # widened before
    with pytest.raises(ValueError, match=r"trust: got 0\.5; class offsets"):
        ham.methods.Offsets(trust=0.5)
    for name in ("trust", "eps_factor"):
        with pytest.raises(ValueError, match=f"{name}: got -1"):
            ham.methods.PGDAT(**{name: -1.0})
