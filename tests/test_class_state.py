"""What methods remember of classes, against the reference over epochs, and by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from nets import sgd
from test_reference_methods import CLASSES, L2, SEED, end_epoch, epochs, reference_of, smooth_net, trainer_of  # noqa: F401

from ham_kernels.methods import fsr
from ham_reference.fsr import spectral_weights

# by method: settings, and which of the reference's attributes each buffer is
STATES = [
    ("cfol", {"eta": 3.0}, {"cfol_scores": "scores"}),
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
