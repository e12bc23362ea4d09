"""What methods remember of classes, against the reference over epochs, and by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from nets import sgd
from test_reference_methods import CLASSES, L2, SEED, end_epoch, epochs, reference_of, smooth_net, trainer_of  # noqa: F401

from ham_kernels.attack.pgd import PGD, Attack
from ham_kernels.engine import PLAIN
from ham_kernels.methods import fair_tat, fsr
from ham_reference.fsr import spectral_weights

# by method: settings, and which of the reference's attributes each buffer is
STATES = [
    ("cfol", {"eta": 3.0}, {"cfol_scores": "scores"}),
    ("fair_ard", {"power": 0.2}, {"ard_weights": "v"}),
    ("absld", {}, {"absld_temperatures": "temperatures"}),
    ("fair_tat", {"temperature": 9.0}, {"tat_odds": "odds", "tat_eps": "factors"}),
    ("frl", {"rate": 0.5, "eps_rate": 2.0, "slack": 0.02}, {"frl_multipliers": "multipliers"}),
    ("fsr", {}, {"fsr_weights": "g"}),
]


@pytest.mark.parametrize(("name", "switches", "states"), STATES, ids=[name for name, *_ in STATES])
def test_the_state_is_that_of_the_reference(name, switches, states, epochs):  # noqa: F811
    trainer, reference = trainer_of(smooth_net(), name, switches), reference_of(name, switches)
    memory, made = trainer.phases.method, []
    for epoch, batches in enumerate(epochs, 1):
        for x, y in batches:
            twin = copy.deepcopy(trainer.model)
            reference.step(twin, sgd(twin), x, y, seed=SEED, step=trainer.steps_done, epoch=epoch)
            trainer.train_step(x, y, epoch)
        end_epoch(trainer, epoch)
        reference.end_epoch()
        for buffer, attribute in states.items():
            ours, theirs = getattr(memory, buffer), torch.as_tensor(getattr(reference, attribute))
            torch.testing.assert_close(ours.double(), theirs.double(), rtol=0, atol=1e-6, msg=f"{buffer}, {epoch}")
        made.append({buffer: getattr(memory, buffer).clone() for buffer in states})
    assert not any(torch.equal(made[0][buffer], made[1][buffer]) for buffer in states)


# ---------------------------------------------------------------- FSR
@pytest.mark.parametrize("classes", [2, 10, 100])
def test_weights_of_confusions_are_of_the_leading_singular_vectors(classes, seed):
    shares = torch.rand(classes, classes, generator=torch.Generator().manual_seed(seed)).fill_diagonal_(0) / classes
    ours = fsr.confusion_weights(shares)
    torch.testing.assert_close(ours.double(), spectral_weights(shares.double()), rtol=1e-6, atol=1e-6)
    assert ours.min().item() == pytest.approx(0.01)
    assert ours.max().item() == pytest.approx(2.01)


def test_without_a_confusion_all_weigh_alike():
    assert fsr.confusion_weights(torch.zeros(4, 4)).tolist() == [[1.0] * 4] * 4
    one = torch.zeros(4, 4)
    one[2, 1] = 1e-20  # small shares do not underflow
    weights = fsr.confusion_weights(one)
    assert weights[2, 1].item() == pytest.approx(2.01)
    assert (weights > 0.1).sum() == 1


# ---------------------------------------------------------------- FAIR-TAT
def test_targets_are_drawn_by_their_odds_and_are_no_labels(seed):
    odds, y = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.arange(4).repeat(5000)
    targets = fair_tat.drawn_targets(odds, y, seed, 3)
    assert targets.sum(1).eq(1).all()
    drawn = targets.argmax(1)
    assert not (drawn == y).any()
    for label in range(4):
        share = torch.bincount(drawn[y == label], minlength=4) / 5000
        wanted = odds.clone()
        wanted[label] = 0
        torch.testing.assert_close(share, wanted / wanted.sum(), rtol=0, atol=0.04)  # more than 5 standard deviations


def test_an_attack_towards_a_class_raises_its_probability(epochs):  # noqa: F811
    model, (x, y) = smooth_net().eval(), epochs[0][0]
    target = torch.nn.functional.one_hot((y + 1) % CLASSES, CLASSES).float()
    pgd = PGD(**L2, loss="target", target=target)
    with PLAIN.attacking(model):
        attack = Attack(model, x, y, pgd, seed=SEED, step=0)
        attack.steps(4)
        after, before = (model(at).softmax(1)[target.bool()] for at in (attack.rows.x_adv, x))
        assert (after > before).all()
        with pytest.raises(ValueError, match="target: got None"):
            Attack(model, x, y, PGD(**L2, loss="target"), seed=SEED, step=0)
