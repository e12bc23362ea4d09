"""The course of a training: natural, warm-up, mining; the watch over one-step methods, also across a stop."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from nets import Counting, sgd, small_cnn

import ham_kernels as ham
from ham_kernels import data
from ham_kernels.training.overfitting import OverfittingWarning

SMALL = {"eps": 0.1, "step_size": 0.03, "steps": 4, "screen_steps": 2}
COLLAPSE = {"eps": 0.5, "step_size": 0.1, "steps": 4, "screen_steps": 2, "start_epoch": 13, "warm_up": "fgsm_rs"}


@pytest.fixture(scope="module")
def digits():
    images = data.digits()
    return images.x_train[:1280].float() / 255, images.y_train[:1280]


def batches_of(digits, rows: int = 128) -> list:
    return list(zip(*(part.split(rows) for part in digits), strict=True))


@pytest.mark.parametrize(("warm_up", "cost"), [("pgd_at", 11), ("n_fgsm", 5), ("fgsm_rs", 5)])
def test_each_phase_trains_by_its_method(digits, warm_up, cost):
    """In full-batch forwards: natural 3, one step 5, PGD-AT 2K + 3."""
    counting = Counting(small_cnn())
    trainer = ham.HAMTrainer(counting, sgd(counting), **SMALL, start_epoch=3, warm_up=warm_up, natural_epochs=1)
    x, y = digits[0][:64], digits[1][:64]
    for epoch, expected in ((1, 3), (2, cost)):
        counting.__init__(counting.inner)
        trainer.train_step(x, y, epoch)
        assert counting.full_batch_forwards(64) == expected
    history = ham.HAMTrainer(m := small_cnn(), sgd(m), **SMALL, start_epoch=3, warm_up=warm_up, natural_epochs=1).fit(
        batches_of((x, y), 32), epochs=3
    )
    assert [r.phase for r in history] == ["natural", warm_up, "ham"]


def collapsing():
    """FGSM-RS at this eps learns to resist its own attack on the digits, and nothing else, within ten epochs."""
    model = small_cnn(seed=0, width=32)
    return ham.HAMTrainer(model, sgd(model), **COLLAPSE, seed=0)


class Stop(Exception):
    pass


@pytest.mark.slow
def test_a_collapse_is_found_and_a_stop_changes_nothing(digits, one_thread):
    loader = batches_of(digits)
    whole = collapsing()
    with pytest.warns(
        OverfittingWarning, match="fgsm_rs: epoch .* has overfitted to its attack .*; PGD-AT takes its place"
    ) as caught:
        whole.fit(loader, epochs=13)
    assert len([w for w in caught if w.category is OverfittingWarning]) == 1
    phases = [r.phase for r in whole.history]
    found = phases.index("pgd_at")  # the first epoch behind the one that was found out
    assert phases == ["fgsm_rs"] * found + ["pgd_at"] * (12 - found) + ["ham"]
    last = whole.history[found - 1].watch
    assert last["multi_step"] < last["one_step"] / 2

    stop_after, stopped = 10 * found - 1, collapsing()  # within the epoch that is found out

    def stop(_):
        if stopped.steps_done == stop_after:
            raise Stop

    with pytest.raises(Stop):
        stopped.fit(loader, epochs=13, on_batch_end=stop)
    resumed = collapsing()
    resumed.load_state_dict(stopped.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OverfittingWarning)
        resumed.fit(loader, epochs=13)
    assert [r.phase for r in resumed.history] == phases
    assert [r.watch for r in resumed.history] == [r.watch for r in whole.history]
    for a, b in zip(whole.model.state_dict().values(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_bad_label_in_natural_training_changes_nothing(digits):
    model = small_cnn()
    trainer = ham.HAMTrainer(model, sgd(model), **SMALL, start_epoch=3, natural_epochs=2)
    x, y = digits[0][:32], digits[1][:32]
    trainer.train_step(x, y, 1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"^y: "):
        trainer.train_step(x, y + 10, 1)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"warm_up": "fgsm"}, "warm_up: got 'fgsm'"),
        ({"natural_epochs": 3}, "natural_epochs: got 3; it must be in"),
        ({"natural_epochs": -1}, "natural_epochs: got -1"),
        ({"warm_up": "n_fgsm", "norm": "l2"}, "norm: got 'l2'"),
    ],
)
def test_bad_choices(choice, message):
    model = small_cnn()
    with pytest.raises(ValueError, match=message):
        ham.HAMTrainer(model, sgd(model), **SMALL | choice, start_epoch=3)


def test_a_state_that_lacks_something_changes_nothing():
    trainer = collapsing()
    state = trainer.state_dict()
    del state["overfitting"]["fgsm_rs"]["best"]
    state["model"] = {k: torch.zeros_like(v) for k, v in state["model"].items()}
    with pytest.raises(ValueError, match="state: lacks best"):
        trainer.load_state_dict(state)
    assert any(p.abs().sum() > 0 for p in trainer.model.parameters())


def test_a_one_step_method_is_watched_wherever_it_trains(digits):
    """As the method itself, too: its first batch of each epoch is drawn once more, whole."""
    model = small_cnn()
    trainer = ham.Trainer(model, sgd(model), ham.methods.NFGSM(), eps=0.1, step_size=0.03, steps=4)
    loader = batches_of((digits[0][:160], digits[1][:160]), 64)
    first, second = trainer.fit(loader, epochs=2)
    assert (first.phase, first.watch["rows"]) == ("n_fgsm", 64)
    assert second.watch is not None
    with pytest.raises(ValueError, match="train_loader: is an iterator"):
        trainer.fit(iter(loader), epochs=3)


def test_a_warm_up_is_the_method_without_mining(digits):
    model = small_cnn()
    method = ham.methods.TRADES(beta=2.0, start_epoch=2, early_drop=True, screen_steps=2)
    budget = {"eps": 0.1, "step_size": 0.03, "steps": 4}
    trainer = ham.Trainer(model, sgd(model), method, **budget, warm_up="trades")
    history = trainer.fit(batches_of((digits[0][:128], digits[1][:128]), 64), epochs=2)
    assert [(r.phase, r.mined, r.hard_fraction == 1) for r in history] == [
        ("trades", False, True),
        ("trades", True, history[1].hard_fraction == 1),
    ]
    with pytest.raises(ValueError, match="start_epoch: is 3, beyond epochs=2, so trades would never start"):
        ham.Trainer(model, sgd(model), ham.methods.TRADES(start_epoch=3), **budget).fit([], epochs=2)
    with pytest.raises(ValueError, match="warm_up: got 'ham'; it would mine"):
        ham.Trainer(model, sgd(model), method, **budget, warm_up="ham")


# ---------------------------------------------------------------- what the classes have taught, from phase to phase
HEDGE = {"class_weights": "hedge"}
BUDGET = {"eps": 0.1, "step_size": 0.03, "steps": 4}


@pytest.mark.parametrize(
    ("method", "warm_up"),
    [
        (ham.methods.PGDAT(early_drop=True, easy="jump", screen_steps=2, start_epoch=3, **HEDGE), "pgd_at"),
        (ham.methods.WAT(early_drop=True, easy="jump", screen_steps=2, start_epoch=3), "wat"),
        (ham.methods.CFA(early_drop=True, easy="jump", screen_steps=2, start_epoch=3, class_from=2, gate=0.0), "cfa"),
    ],
    ids=["pgd_at", "wat", "cfa"],
)
def test_a_method_goes_on_from_what_its_warm_up_remembers(method, warm_up, digits):
    def made():
        return ham.Trainer(model := small_cnn(), sgd(model), method, **BUDGET, warm_up=warm_up)

    loader, trainer = batches_of((digits[0][:128], digits[1][:128]), 64), made()

    def stop(report):
        if report.epoch == 2:
            raise Stop

    with pytest.raises(Stop):
        trainer.fit(loader, 4, on_epoch_end=stop)
    before = {k: v.clone() for k, v in trainer.phases.objective(2).memory().items()}
    assert trainer.phases.objective(3) is not trainer.phases.objective(2)
    resumed = made()
    resumed.load_state_dict(copy.deepcopy(trainer.state_dict()))  # or they would share their momentum
    for goes_on in (trainer, resumed):
        assert not goes_on.phases.objective(3).has_memory
        taken = goes_on.phases.begin(3).memory()
        assert all(torch.equal(taken[k], v) for k, v in before.items())
        goes_on.fit(loader, 4)
    for a, b in zip(trainer.model.state_dict().values(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_pgd_at_in_place_of_one_step_keeps_its_switches(digits):
    method = ham.methods.FGSMRS(awp=0.01, eps_factor=1.25, gate=0.1, trust=0.5, loss="boosted_ce", **HEDGE)
    trainer = ham.Trainer(model := small_cnn(), sgd(model), method, **BUDGET)
    loader = batches_of((digits[0][:128], digits[1][:128]), 64)
    trainer.fit(loader, 1)
    one_step = trainer.phases.objective(2)
    trainer.phases._checks["fgsm_rs"].overfitted_at = 1
    now = trainer.phases.begin(2)
    assert now.method == ham.methods.PGDAT(
        start_epoch=1, awp=0.01, eps_factor=1.25, gate=0.1, trust=0.5, loss="boosted_ce", **HEDGE
    )
    assert now.pgd.eps == pytest.approx(0.125)
    assert torch.equal(now.class_totals, one_step.class_totals)
    trainer.train_step(*loader[0], epoch=2)
    resumed = ham.Trainer(model := small_cnn(), sgd(model), method, **BUDGET)
    resumed.load_state_dict(trainer.state_dict())
    assert torch.equal(resumed.phases.objective(2).class_sums, now.class_sums)


def test_a_state_of_another_class_rule_is_refused(digits):
    def made(rule):
        method = ham.methods.PGDAT(start_epoch=1, class_weights=rule)
        return ham.Trainer(model := small_cnn(), sgd(model), method, **BUDGET)

    trainer = made("hard_share")
    trainer.train_step(digits[0][:32], digits[1][:32], epoch=1)
    with pytest.raises(ValueError, match="state: its class_weights are 'hard_share', pgd_at has 'chi2'"):
        made("chi2").load_state_dict(trainer.state_dict())
