"""What a method remembers: put back to an earlier state, moved elsewhere, read by captured steps; its course."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from graph_helpers import Recorder, give_graphs
from nets import sgd, small_cnn
from torch import nn

import ham_kernels as ham
from ham_kernels.attack.pgd import PGD
from ham_kernels.commands.flags import parse_train
from ham_kernels.common.troubles import HamWarning
from ham_kernels.methods import EpochEnd, Objective
from ham_kernels.runs.presets import preset, rescaled

ATTACK = {"eps": 0.2, "step_size": 0.05, "steps": 3}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def batches(seed):
    g = torch.Generator().manual_seed(seed)
    return [(torch.rand(12, 1, 8, 8, generator=g), torch.randint(0, 10, (12,), generator=g)) for _ in range(3)]


def trainer_of(method, **options):
    torch.manual_seed(0)
    model = small_cnn()
    return ham.Trainer(model, sgd(model), method, **ATTACK | options)


@pytest.mark.slow
@pytest.mark.parametrize("method", [ham.methods.CFA(class_from=2, gate=0.0), ham.methods.DAFA(class_from=2)])
def test_captured_updates_read_what_was_loaded(method, batches):
    """A state of before the first batch has no memory; what is made anew lies elsewhere."""
    graphed, eager = trainer_of(method), trainer_of(method)
    give_graphs(graphed, Recorder())
    first = copy.deepcopy(eager.state_dict())
    for trainer in (graphed, eager):
        trainer.fit(batches, 5)
        trainer.load_state_dict(copy.deepcopy(first))
        trainer.fit(batches, 5)
    assert len(graphed.engine.graphs) > 0
    for (name, a), b in zip(graphed.model.state_dict().items(), eager.model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", [n for n in ham.methods.names() if n not in ("natural", "offsets", "atta")])
def test_a_first_batch_that_was_undone_leaves_a_training_that_goes_on(name, batches):
    kind = ham.methods.class_of(name)
    switches = {} if name == "free_at" else {"trust": 0.5, "class_weights": "hedge"}
    teacher = {"teacher": small_cnn(seed=3)} if kind.needs_teacher else {}
    trainer = trainer_of(kind(start_epoch=1, screen_steps=1, **switches), **teacher)
    bad = trainer.model.register_forward_hook(lambda module, args, z: z * torch.nan if module.training else z)
    with pytest.raises(ham.NonFiniteError):
        trainer.train_step(*batches[0], epoch=1)
    bad.remove()
    fresh = trainer_of(kind(start_epoch=1, screen_steps=1, **switches), **teacher)
    for of in (trainer, fresh):
        of.train_step(*batches[1], epoch=1)
    for a, b in zip(trainer.model.state_dict().values(), fresh.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


class Wider(nn.Module):
    """A model whose head has more outputs, which are never predicted."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return nn.functional.pad(self.model(x), (0, 30), value=-1e3)


# of the others FAIR-TAT draws targets from all outputs, and the sum of WAT's weights is of how many there are
@pytest.mark.parametrize("name", ["cfa", "cfol", "dafa", "faal", "fair", "frl", "fsr", "absld", "fair_ard"])
def test_outputs_that_no_image_is_of_change_nothing(name, batches):
    """Of the loss, epoch by epoch, while the model rests: training would magnify what is rounded."""
    kind, losses = ham.methods.class_of(name), []
    for wrap in (lambda model: model, Wider):
        teacher = {"teacher": wrap(small_cnn(seed=3))} if kind.needs_teacher else {}
        torch.manual_seed(0)
        model = small_cnn()
        at_rest = torch.optim.SGD(model.parameters(), 0.0)
        trainer = ham.Trainer(wrap(model), at_rest, kind(start_epoch=1, class_from=2), **ATTACK, **teacher)
        trainer.fit(batches, 4, batches, val_attacks=("clean",))
        losses.append([report.loss for report in trainer.history])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_frl_takes_a_step_size_by_row(batches):
    budget = PGD(torch.full((12,), 0.1), torch.full((12,), 0.03), 3)
    model = small_cnn()
    by_row, plain = Objective(ham.methods.FRL(), budget), Objective(ham.methods.FRL(), PGD(0.1, 0.03, 3))
    for step, batch in enumerate(batches):
        a, b = (o.examples(model, *batch, seed=0, step=step).x_adv for o in (by_row, plain))
        torch.testing.assert_close(a, b)


def test_an_objective_is_saved_and_loaded_as_a_module(batches):
    model = small_cnn()
    one, other = (Objective(ham.methods.Fair(class_from=3), PGD(**ATTACK)) for _ in range(2))
    ham.loss(one, model, *batches[0])
    one.end_epoch(EpochEnd(2, model, None, None))
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    assert other.epoch == 3
    assert torch.equal(other.class_counts, one.class_counts)
    assert other.examples(model, *batches[1], seed=0, step=0).weights is not None


def test_a_gate_is_in_force_from_the_methods_first_epoch(batches):
    """The warm-up, which has none, does not open it for the method."""
    method = ham.methods.HAM(start_epoch=3, gate=1.0, screen_steps=1)
    trainer, seen = trainer_of(method, ema_decay=0.5), []
    trainer.fit(batches, 4, batches, val_attacks=("clean",), on_epoch_end=lambda _: seen.append(trainer._averages))
    assert seen == [True, False, False, False]


def test_no_attack_to_look_at(batches):
    for method in (ham.methods.FAAL(), ham.methods.WAT(), ham.methods.GAIRAT(start_epoch=1)):
        with pytest.raises(ValueError, match="steps: got 0; it must be >= 1"):
            ham.loss(method, small_cnn(), *batches[0], **ATTACK | {"steps": 0})


@pytest.mark.parametrize(
    "screening", [{}, {"early_drop": True, "easy": "stop", "screen": "one_step", "screen_steps": 2}]
)
def test_right_points_are_counted_out_of_k(screening, batches):
    """A stride stands for the steps that it replaces."""
    x, _ = batches[0]
    model = small_cnn()
    y = model.eval()(x).argmax(1)
    method = ham.methods.GAIRAT(start_epoch=1, **screening)
    made = Objective(method, PGD(1e-6, 1e-7, 5)).examples(model, x, y, seed=0, step=0)
    assert made.right.tolist() == [5.0] * len(y)
    wrong = Objective(method, PGD(1e-6, 1e-7, 5)).examples(model, x, (y + 1) % 10, seed=0, step=0)
    assert wrong.right.tolist() == [0.0] * len(y)
    assert wrong.weights.mean().item() == pytest.approx(1.0)


# ---------------------------------------------------------------- courses
def test_fast_is_switched_off_again():
    fast = ham.methods.Fair(fast=True)
    assert fast.schedule == (2.0, 1.0, 0.5)
    assert fast.cost(10) == 9
    assert dataclasses.replace(fast, fast=False).cost(10) == 23
    assert ham.methods.Fair(fast=True, step_sizes=(1.0,)).schedule == (1.0,)
    assert fast.describe() == "fair (fast)"


@pytest.mark.parametrize("epochs", [2, 3, 10, 200])
def test_dafa_keeps_an_epoch_of_its_own_in_any_course(epochs):
    for method in (ham.methods.DAFA(class_from=2), ham.methods.DAFA(start_epoch=3, class_from=4)):
        settings = rescaled(dataclasses.replace(preset("digits"), method=method), epochs)
        assert settings.method.class_from > settings.method.start_epoch
        assert settings.optim.epochs == epochs
    told = parse_train(["--method", "dafa", "--epochs", "10"]).settings
    assert (told.optim.epochs, told.optim.milestones) == (10, rescaled(preset("digits"), 10).optim.milestones)


def test_a_warm_up_that_ends_before_it_tells_classes_apart_says_so(batches):
    trainer = trainer_of(ham.methods.HAM(start_epoch=3, screen_steps=1), warm_up="dafa")
    with pytest.warns(HamWarning, match="class_from: is 71, and DAFA ends with epoch 2"):
        trainer.fit(batches, 3)
    trainer_of(ham.methods.HAM(start_epoch=80, screen_steps=1), warm_up="dafa")
    assert ham.methods.FAAL(class_strength=None).describe() != ham.methods.FAAL().describe()
