"""MAIL: its weights by hand, and where they begin, in captured updates too."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from graph_helpers import Recorder, give_graphs
from nets import Constant, sgd, small_cnn

import ham_kernels as ham
from ham_kernels.attack.pgd import PGD
from ham_kernels.common.troubles import HamWarning
from ham_kernels.methods import MAIL, Objective
from ham_kernels.methods.registry import class_of
from ham_kernels.runs.presets import preset

ATTACK = {"eps": 0.2, "step_size": 0.05, "steps": 3}
BASES = ("trades", "pgd_at", "mart")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def batches(seed):
    g = torch.Generator().manual_seed(seed)
    return [(torch.rand(12, 1, 8, 8, generator=g), torch.randint(0, 10, (12,), generator=g)) for _ in range(3)]


def trainer_of(method):
    torch.manual_seed(0)
    model = small_cnn()
    return ham.Trainer(model, sgd(model), method, **ATTACK)


def test_weights_by_hand():
    p = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    w = MAIL().margin_weights(p.log(), torch.tensor([0, 2, 0, 0]))
    expected = [3 / (1 + 2.718281828 ** (1.5 - m)) for m in (-0.5, 0.3, -1.0, 1.0)]
    assert w.tolist() == pytest.approx(expected, rel=1e-5)
    assert expected[2:] == pytest.approx([0.2276, 1.1326], abs=1e-4)  # the least and the most
    assert MAIL(slope=0.0).margin_weights(p.log(), torch.zeros(4, dtype=torch.int64)).tolist() == [1.5] * 4


def test_no_gradient_passes_through_the_weights(batches):
    """Of a model that answers alike everywhere, all weights are one number, and the gradient is that times PGD-AT's."""
    x, y = batches[0]
    y = torch.zeros_like(y)
    model = Constant([1.0] + [0.0] * 9)
    found = {}
    for method in (MAIL(base="pgd_at", mail_from=1), ham.methods.PGDAT(start_epoch=1)):
        objective = Objective(method, PGD(**ATTACK))
        loss = objective.loss(model, objective.examples(model, x, y, seed=0, step=0))
        found[method.name] = (loss, *torch.autograd.grad(loss, list(model.parameters())))
    w = MAIL().margin_weights(model(x[:1]).detach(), y[:1])
    for ours, plain in zip(*found.values(), strict=True):
        torch.testing.assert_close(ours, w[0] * plain)


@pytest.mark.parametrize("base", BASES)
def test_weights_begin_with_their_epoch(base, batches):
    """Also in updates that are replayed; before it the method is its base."""
    x, y = batches[0]
    eager, graphed = (trainer_of(MAIL(base=base, mail_from=3)) for _ in range(2))
    plain = trainer_of(class_of(base)(start_epoch=1))
    give_graphs(graphed, Recorder())
    for epoch in (1, 2, 3, 4):
        for _ in range(3):
            losses = [t.train_step(x, y, epoch=epoch).loss for t in (eager, graphed)]
            assert losses[0] == pytest.approx(losses[1], rel=1e-4)
            if epoch < 3:
                assert plain.train_step(x, y, epoch=epoch).loss == pytest.approx(losses[0], rel=1e-4)
        if epoch == 3:
            assert plain.train_step(x, y, epoch=epoch).loss != pytest.approx(losses[0], rel=1e-3)
    assert len(graphed.engine.graphs) > 0


def test_the_course_and_what_never_begins(batches):
    assert MAIL().in_course(24).mail_from == 16
    assert MAIL(mail_from=1).in_course(24).mail_from == 1
    with pytest.warns(HamWarning, match="mail_from: is 76, and MAIL ends with epoch 1; it treats all rows alike"):
        trainer_of(MAIL()).fit(batches, epochs=1)
    settings = preset("digits")
    settings = replace(settings, method=MAIL(mail_from=settings.optim.epochs + 1))
    with pytest.raises(ValueError, match=r"mail_from: got \d+ with epochs=\d+, so mail would never tell rows apart"):
        settings.check()


def test_settings_that_do_nothing_are_refused():
    with pytest.raises(ValueError, match=r"beta: got 2\.0 with base='pgd_at'"):
        MAIL(base="pgd_at", beta=2.0)
    assert MAIL(base="mart").cost(10) == 26
    assert MAIL(base="pgd_at").cost(10) == 23
    assert MAIL().cost(10) == 27
