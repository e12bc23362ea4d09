"""channels_last and compile: the reference's training, and models that cannot have them."""

from __future__ import annotations

import copy
import shutil
import warnings

import pytest
import torch
from engine_helpers import (
    Compiler,
    Viewing,
    assert_reference,
    assert_same_model,
    engine_warnings,
    ragged_batches,
    refuses_at_once,
    refuses_to_run,
    serve_any_half,
    tiny,
    trainer_of,
)
from nets import sgd, small_cnn
from torch import nn

from ham_kernels.engine import (
    EngineError,
)


@pytest.fixture(scope="module")
def batches():
    return ragged_batches()


@pytest.fixture
def any_half(monkeypatch):
    serve_any_half(monkeypatch)


# ---------------------------------------------------------------- channels_last
@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"norm": "l2", "eps": 1.0, "step_size": 0.25},
        {"reweight": False},
        {"freeze_bn": True, "ema_decay": 0.9},
    ],
    ids=lambda c: ",".join(c) or "defaults",
)
def test_channels_last_is_the_reference(batches, choices):
    """Coloured images, since with one channel both orders are one."""
    model = small_cnn(channels=3)
    twin = copy.deepcopy(model)
    coloured = [(x.expand(-1, 3, -1, -1) * torch.tensor([1.0, 0.7, 0.4]).view(3, 1, 1), y) for x, y in batches]
    ours = trainer_of(model, channels_last="require", **choices)
    assert_reference(ours, twin, coloured[:4], choices, step_by_step=True)
    assert model[4].weight.is_contiguous(memory_format=torch.channels_last)
    assert not model[4].weight.is_contiguous()
    if ours.ema_model is not None:  # torch averages lists of weights in one launch where their orders agree
        assert ours.ema_model[4].weight.stride() == model[4].weight.stride()


def test_channels_last_reaches_the_model_in_attack_and_update():
    seen = []

    class Looking(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = small_cnn(channels=3)

        def forward(self, x):
            seen.append((self.training, len(x), x.is_contiguous(memory_format=torch.channels_last)))
            return self.inner(x)

    model = Looking()
    trainer = trainer_of(model, channels_last="require", group=2)
    g = torch.Generator().manual_seed(0)
    group = [(torch.rand(16, 3, 8, 8, generator=g), torch.randint(0, 10, (16,), generator=g)) for _ in range(2)]
    for epoch in (1, 2):
        trainer.train_group(group, epoch)
    assert {training for training, *_ in seen} == {True, False}
    assert all(last for *_, last in seen)
    assert {rows for _, rows, _ in seen} > {2, 32}  # the trial, the group, its hard rows
    other = Looking()
    trainer.model, trainer.optimizer = other, sgd(other)
    trainer.train_group(group, 2)
    assert other.inner[4].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("wanted", [True, "require"])
@pytest.mark.parametrize("asserts", [False, True], ids=["views", "asserts"])
def test_a_model_that_cannot_run_channels_last(batches, wanted, asserts):
    model = Viewing(asserts)
    model.bn.eval()
    model.conv.weight.requires_grad_(False)
    twin = copy.deepcopy(model)
    ours, theirs = trainer_of(model, channels_last=wanted), trainer_of(twin)
    modes = [m.training for m in model.modules()]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if wanted == "require":
            with pytest.raises(
                EngineError, match=r"channels_last: was required, but the model cannot run with it .*view"
            ):
                ours.train_step(*batches[0], epoch=1)
        else:
            for epoch in (1, 2, 2):
                for x, y in batches:
                    assert ours.train_step(x, y, epoch=epoch).loss == theirs.train_step(x, y, epoch=epoch).loss
    if wanted is True:
        (message,) = engine_warnings(caught)
        error = "AssertionError: not viewable" if asserts else "RuntimeError: view"
        assert message.startswith(f"channels_last: the model cannot run with it ({error}")
        assert ours.engine.active["channels_last"] is False
    assert_same_model(model, twin, rtol=0, atol=0)
    assert all(p.is_contiguous() for p in model.parameters())
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in twin.parameters()]


def test_images_that_are_not_four_dimensional():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    twin = copy.deepcopy(model)
    g = torch.Generator().manual_seed(0)
    batches = [(torch.rand(24, 64, generator=g), torch.randint(0, 10, (24,), generator=g)) for _ in range(2)]
    ours, theirs = trainer_of(model, channels_last=True), trainer_of(twin)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        histories = [t.fit(batches, 3) for t in (ours, theirs)]
    assert [r.loss for r in histories[0]] == [r.loss for r in histories[1]]
    (message,) = engine_warnings(caught)
    assert message.startswith("channels_last: it is an order of (n, C, H, W), and the images are (24, 64)")
    with pytest.raises(EngineError, match="channels_last: was required"):
        trainer_of(twin, channels_last="require").train_step(*batches[0], epoch=1)


@pytest.mark.slow
def test_another_model_is_placed_and_compiled_anew(batches, any_half, monkeypatch):
    """trainer.model = other, with an optimizer of its own: nothing of the first model is used any more."""
    Compiler().install(monkeypatch)
    ours = trainer_of(tiny(), channels_last=True, compile="require", precision="bf16")
    theirs = trainer_of(tiny(1), precision="bf16", seed=0)
    for _ in range(2):
        ours.train_step(*batches[0], epoch=1)
    ours.model = tiny(1)
    ours.optimizer = sgd(ours.model)
    ours.steps_done = 0
    for epoch in (1, 1, 2):
        a, b = ours.train_step(*batches[0], epoch=epoch), theirs.train_step(*batches[0], epoch=epoch)
        assert a.n_hard == b.n_hard
        assert a.loss == pytest.approx(b.loss, rel=2e-2)
    assert_same_model(ours.model, theirs.model, rtol=0.05, atol=0.02)
    assert not torch.equal(ours.model[0].weight, tiny(1)[0].weight)


# ---------------------------------------------------------------- compile
needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("g++", "clang++", "c++")), reason="torch.compile needs a C++ compiler"
)


@needs_compiler
@pytest.mark.slow
def test_compiled_attack_is_the_reference(batches):
    """Really compiled; numbers of rows that change, fewer than are worth it, and one."""
    torch._dynamo.reset()
    model = tiny()
    twin = copy.deepcopy(model)
    assert_reference(trainer_of(model, compile="require"), twin, batches, step_by_step=True)


@pytest.mark.parametrize("choices", [{}, {"freeze_bn": True, "channels_last": True}], ids=["", "channels_last"])
def test_any_number_of_rows_is_compiled_once(batches, choices, monkeypatch):
    """A step and a look are two forms; neither other rows nor other weights are a reason for a third."""
    compiler = Compiler().install(monkeypatch)
    model = tiny()
    twin = copy.deepcopy(model)
    ours = trainer_of(model, compile="require", **choices)
    choices = {n: v for n, v in choices.items() if n != "channels_last"}
    assert_reference(ours, twin, batches, choices)
    assert compiler.compiled == 2


def test_half_weights_are_compiled_once(batches, any_half, monkeypatch):
    compiler = Compiler().install(monkeypatch)
    model = tiny()
    ours = trainer_of(model, compile="require", precision="bf16")
    theirs = trainer_of(copy.deepcopy(model), precision="bf16")
    for epoch in (1, 1, 2, 2):
        for x, y in batches:
            a, b = ours.train_step(x, y, epoch=epoch), theirs.train_step(x, y, epoch=epoch)
            assert abs(a.n_hard - b.n_hard) <= 1
            assert a.loss == pytest.approx(b.loss, rel=1e-2)
    assert compiler.compiled == 2


REFUSALS = {
    "at once": refuses_at_once,
    "at the first call": refuses_to_run,
    "for the step": lambda patch: Compiler(1).install(patch),
    "for the look": lambda patch: Compiler(2).install(patch),
}


@pytest.mark.parametrize("wanted", [True, "require"])
@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_model_that_cannot_be_compiled(batches, refusal, wanted, monkeypatch):
    REFUSALS[refusal](monkeypatch)
    model = tiny()
    twin = copy.deepcopy(model)
    model[1].eval()
    ours, theirs = trainer_of(model, compile=wanted), trainer_of(twin)
    twin[1].eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if wanted == "require":
            with pytest.raises(EngineError, match=r"compile: was required, but .*no compiler here"):
                ours.fit(batches[:2], 2)
        else:
            for epoch in (1, 2, 2):
                for x, y in batches:
                    a, b = ours.train_step(x, y, epoch=epoch), theirs.train_step(x, y, epoch=epoch)
                    assert a.n_hard == b.n_hard
                    assert a.loss == pytest.approx(b.loss, rel=1e-5)
    if wanted is True:
        (message,) = engine_warnings(caught)
        assert message.startswith("compile: ")
        assert "no compiler here" in message
        assert ours.engine.active["compile"] is False
        assert_same_model(model, twin, rtol=1e-5, atol=1e-6)
    assert [m.training for m in model] == [True, False, True, True, True]
    assert all(p.requires_grad for p in model.parameters())
    assert "forward" not in vars(model[1])
