"""ATTA: the reference's updates through crops and flips, what is kept of each image, resume, refusals."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from graph_helpers import Recorder, give_graphs
from nets import Counting, sgd, small_cnn
from torch import nn

import ham_kernels as ham
from ham_kernels.attack.pgd import PGD
from ham_kernels.data import Batches
from ham_kernels.data.batches import PAD
from ham_kernels.distributed import Ranks
from ham_kernels.methods import ATTA, HAM, Objective
from ham_kernels.methods.objective import EpochEnd
from ham_kernels.runs.presets import preset
from ham_kernels.runs.settings import WarmUpSettings
from ham_reference import ATTA as Reference

EPS, STEP = 0.1, 0.04
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def images(seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (30, 2, 8, 6), dtype=torch.uint8, generator=g)
    return x, torch.randint(0, 10, (30,), generator=g)


def loader_of(images, augment: str = "crop+flip") -> Batches:
    return Batches(*images, 12, shuffle=True, augment=augment, seed=3)


def smooth_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.GELU(), nn.Flatten(), nn.Linear(6 * 48, 10)
    )


def trainer_of(model: nn.Module | None = None, **fields) -> ham.Trainer:
    model = smooth_net() if model is None else model
    return ham.Trainer(model, sgd(model), ATTA(**fields), eps=EPS, step_size=STEP)


def kept_of(trainer: ham.Trainer) -> torch.Tensor:
    return trainer.phases.method.perturbations


@pytest.mark.parametrize(("augment", "k"), [("crop+flip", 1), ("crop", 2), ("none", 1)])
def test_same_updates_as_the_reference(augment, k, images):
    """Each batch from the same weights: the sign of a gradient near 0 is rounding, and moves a pixel by two steps."""
    x, _ = images
    trainer = trainer_of(k=k, reset_every=3)
    pad = 0 if augment == "none" else PAD
    reference = Reference(x.float() / 255, pad, EPS, STEP, k, reset_every=3)
    loader = loader_of(images, augment)
    for epoch in (1, 2, 3, 4):
        loader.set_epoch(epoch)
        for batch, y in loader:
            twin = copy.deepcopy(trainer.model)
            optimizer = sgd(twin)
            optimizer.load_state_dict(copy.deepcopy(trainer.optimizer.state_dict()))
            shown = batch.shown
            windows = [(0, 0, False)] * len(y)
            if pad:
                windows = [(t, left if s == 1 else left - 5, s == -1) for t, left, s in shown.windows.T.tolist()]
            loss, _ = reference.step(twin, optimizer, shown.numbers.tolist(), windows, y)
            assert trainer.train_step(batch, y, epoch).loss == pytest.approx(loss, abs=1e-5)
            for ours, theirs in zip(trainer.model.parameters(), twin.parameters(), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
            apart = (kept_of(trainer) - reference.kept).abs() > 1e-3
            assert apart.float().mean() <= 1e-3
            reference.kept = kept_of(trainer).float()
        assert kept_of(trainer).abs().max() == pytest.approx(min(EPS, STEP * k * (2 - epoch % 2)), abs=1e-4)
        trainer.phases.method.end_epoch(EpochEnd(epoch, trainer.model, None, None))
        reference.end_epoch(epoch)
        assert (kept_of(trainer) == 0).all() == (epoch == 2)


def test_what_is_not_in_the_window_stays(images):
    """A pixel that no window shows keeps its perturbation, and one that is shown again goes on from it."""
    shown = next(iter(loader_of(images)))[0].shown
    kept = torch.rand(shown.shape).half()
    before, values = kept.clone(), torch.full((12, 2, 8, 6), -1.0)
    seen = shown.of(kept)
    shown.write(kept, values)
    assert (shown.of(kept) == -1).all()
    changed = (kept != before).sum((1, 2, 3))
    assert sorted(changed.unique().tolist()) == [0, 2 * 8 * 6]
    assert set(changed.nonzero()[:, 0].tolist()) == set(shown.numbers.tolist())
    shown.write(kept, seen)
    assert torch.equal(kept, before)
    few = torch.tensor([7, 2])
    shown.write(kept, values[:2], few)
    assert (kept != before).any(3).any(2).any(1).nonzero()[:, 0].tolist() == sorted(shown.numbers[few].tolist())


def test_a_batch_shows_what_it_says(images):
    x, y = images
    for augment in ("none", "crop", "crop+flip"):
        batch, labels = next(iter(loader_of(images, augment)))
        shown = batch.shown
        pad = 0 if augment == "none" else PAD
        whole = torch.nn.functional.pad(x.float() / 255, (pad,) * 4)
        torch.testing.assert_close(shown.of(whole), batch)
        assert torch.equal(y[shown.numbers], labels)


def test_goes_on_bit_by_bit(images):
    whole = trainer_of(k=1, reset_every=2)
    whole.fit(loader_of(images), 3)
    for stop_at in (2, 3, 5):
        first, second = trainer_of(k=1, reset_every=2), trainer_of(k=1, reset_every=2)

        def stop(_, trainer=first, stop_at=stop_at):
            if trainer.steps_done == stop_at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            first.fit(loader_of(images), 3, on_batch_end=stop)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        second.fit(loader_of(images), 3)
        for ours, theirs in zip(second.model.parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(ours, theirs)
        assert torch.equal(kept_of(second), kept_of(whole))


@pytest.mark.parametrize("augment", ["crop+flip", "none"])
def test_an_update_that_fails_leaves_what_is_kept(augment, images):
    trainer = trainer_of()
    trainer.fit(loader_of(images, augment), 2)
    before = kept_of(trainer).clone()
    loader = loader_of(images, augment)
    loader.set_epoch(3)
    batch, y = next(iter(loader))
    hook = next(trainer.model.parameters()).register_hook(lambda g: g * torch.nan)
    with pytest.raises(ham.NonFiniteError):
        trainer.train_step(batch, y, 3)
    assert torch.equal(kept_of(trainer), before)
    hook.remove()
    trainer.train_step(batch, y, 3)
    changed = (kept_of(trainer) != before).any(3).any(2).any(1)
    assert set(changed.nonzero()[:, 0].tolist()) == set(batch.shown.numbers.tolist())


def test_a_step_copies_the_rows_of_its_batch_alone(images, monkeypatch):
    trainer = trainer_of()
    trainer.fit(loader_of(images), 1)
    copied = []
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda t, **how: copied.append(t) or empty_like(t, **how))
    trainer.fit(loader_of(images), 2)
    assert copied
    assert not [t for t in copied if t.shape == kept_of(trainer).shape]


@pytest.mark.parametrize("rule", ["hard_share", "hedge", "dafa"])
def test_with_class_weights(rule, images):
    """What it keeps of images stands beside what the switches keep of classes, also over a checkpoint."""
    trainer = trainer_of(class_weights=rule, class_strength=3.0)
    trainer.fit(loader_of(images), 3)
    state = copy.deepcopy(trainer.state_dict())
    batch, y = next(iter(loader_of(images)))
    weights = trainer.phases.method.examples(trainer.model, batch, y, seed=0, step=0).weights
    assert weights.mean() == pytest.approx(1.0, rel=1e-5)
    assert weights.max() > weights.min()
    other = trainer_of(class_weights=rule, class_strength=3.0)
    other.load_state_dict(state)
    assert torch.equal(other.phases.method.examples(trainer.model, batch, y, seed=0, step=0).weights, weights)


@pytest.mark.parametrize("easy", ["drop", "stop", "jump"])
def test_with_screening(easy, images):
    """Rows that stop or jump are kept where they ended; of rows that are dropped nothing is."""
    trainer = trainer_of(k=4, early_drop=True, screen_steps=1, easy=easy)
    batch, y = next(iter(loader_of(images)))
    with torch.no_grad():
        y = torch.where(torch.arange(12) < 8, trainer.model.eval()(batch).argmax(1), y)
    trainer.model.train()
    report = trainer.train_step(batch, y, 1)
    assert 0 < report.n_hard < 12
    moved = (kept_of(trainer) != 0).any(3).any(2).any(1).sum()
    assert moved == (report.n_hard if easy == "drop" else 12)


def test_cost(images):
    model = Counting(smooth_net())
    trainer = trainer_of(model, k=2)
    batch, y = next(iter(loader_of(images)))
    trainer.train_step(batch, y, 1)  # looks at one row, once, to learn how many classes there are
    model.forward_rows = model.input_backward_rows = model.training_rows = 0
    trainer.phases.method.examples(model, batch, y, seed=1, step=2)
    assert model.full_batch_forwards(12) == ATTA(k=2).cost(10) - 3 == 4


def test_graphs_change_nothing(images):
    ours, theirs = trainer_of(), trainer_of()
    theirs.model.load_state_dict(ours.model.state_dict())
    give_graphs(ours, Recorder())
    ours.fit(loader_of(images), 3)
    theirs.fit(loader_of(images), 3)
    torch.testing.assert_close(kept_of(ours), kept_of(theirs))


def test_channels_last(images):
    model = smooth_net()
    twin = copy.deepcopy(model)
    ours = ham.Trainer(model, sgd(model), ATTA(), eps=EPS, step_size=STEP, channels_last=True)
    theirs = trainer_of(twin)
    for trainer in (ours, theirs):
        trainer.fit(loader_of(images), 2)
    apart = (kept_of(ours) - kept_of(theirs)).abs() > 1e-3
    assert apart.float().mean() <= 1e-2


def test_refusals(images):
    x, y = next(iter(loader_of(images)))
    with pytest.raises(ValueError, match="x: ATTA goes on from what it remembers of each image, and nothing tells"):
        trainer_of().train_step(x.clone(), y, 1)
    with pytest.raises(ValueError, match="group: got 2; ATTA takes batches one at a time"):
        ATTA(group=2)
    with pytest.raises(ValueError, match="screen_steps: got 3 with steps=1"):
        Objective(ATTA(early_drop=True), PGD())
    with pytest.raises(ValueError, match="method: got 'atta' on several processes"):
        Objective(ATTA(), PGD(), ranks=Ranks(0, 2))
    usual = replace(preset("digits"), method=ATTA())
    warmed = replace(usual, method=HAM(start_epoch=2), warm_up=WarmUpSettings("atta"))
    for settings, setting in ((usual, "method"), (warmed, "warm_up")):
        settings.check()
        for change, which in (
            ({"generated": "some.npz"}, "generated images"), ({"dataset": "imagenet"}, "images of files"),
            ({"dataset": "imagenette", "size": 160}, "images of files"),
        ):  # fmt: skip
            elsewhere = replace(settings, data=replace(settings.data, **change))
            with pytest.raises(ValueError, match=f"{setting}: got 'atta', which goes on .*; {which} come without a"):
                elsewhere.check()
        with pytest.raises(ValueError, match=f"{setting}: got 'atta', which goes on .*; images of files come"):
            settings.check_numbered(in_files=True)  # of a folder, as its images tell
        small = replace(settings, data=replace(settings.data, dataset="imagenette", size=32))
        small.check()
    for name in ("k", "reset_every"):
        with pytest.raises(ValueError, match=f"{name}: got 0"):
            ATTA(**{name: 0})


@pytest.mark.slow
def test_it_learns_to_resist():
    """On the digits, k=1: more robust than natural training after as many updates."""
    from ham_kernels.evaluation import evaluate
    from ham_kernels.methods import Natural

    images = ham.data.load("digits")
    train = Batches(images.x_train[:600], images.y_train[:600], 60, shuffle=True, seed=0)
    test = Batches(images.x_test[:200], images.y_test[:200], 200, shuffle=False)
    robust = {}
    for method in (ATTA(), Natural()):
        torch.manual_seed(0)
        model = small_cnn()
        ham.Trainer(model, sgd(model), method, eps=0.2, step_size=0.1).fit(train, 4)
        robust[method.name] = evaluate(model, test, attacks=("pgd10",), eps=0.2, step_size=0.05)["pgd10"].accuracy
    assert robust["atta"] > robust["natural"] + 0.1
