"""Free-AT: the reference's updates, what it remembers, its cost and course, what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from graph_helpers import Recorder, give_graphs
from nets import Counting, sgd, small_cnn
from torch import nn

import ham_kernels as ham
from ham_kernels.attack.pgd import PGD
from ham_kernels.commands.experiments import cells
from ham_kernels.commands.flags import parse_train
from ham_kernels.distributed import Ranks
from ham_kernels.methods import FreeAT, Objective
from ham_kernels.runs.presets import preset
from ham_reference import FreeAT as Reference

EPS = 0.1
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def batches(seed):
    """The second has more rows than the first, the last fewer."""
    g = torch.Generator().manual_seed(seed)
    return [(torch.rand(n, 1, 8, 8, generator=g), torch.randint(0, 10, (n,), generator=g)) for n in (20, 24, 9)]


def smooth_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.GELU(), nn.Flatten(), nn.Linear(6 * 64, 10)
    )


def trainer_of(model: nn.Module, replays: int = 3, **options) -> ham.Trainer:
    return ham.Trainer(model, sgd(model), FreeAT(replays=replays), eps=EPS, **options)


def delta_of(trainer: ham.Trainer) -> torch.Tensor:
    return trainer.phases.method.delta


def test_same_updates_as_the_reference(batches):
    """Each batch from the same weights: the sign of a gradient near 0 is rounding, and may move a pixel by 2 eps."""
    trainer, reference = trainer_of(smooth_net()), Reference(EPS, 3)
    for x, y in batches:
        twin = copy.deepcopy(trainer.model)
        optimizer = sgd(twin)
        optimizer.load_state_dict(copy.deepcopy(trainer.optimizer.state_dict()))
        if reference.delta is not None:
            reference.delta = delta_of(trainer).clone()
        losses = reference.step(twin, optimizer, x, y)
        report = trainer.train_step(x, y, 1)
        assert report.loss == pytest.approx(sum(losses) / 3, abs=2e-6)
        for ours, theirs in zip(trainer.model.state_dict().values(), twin.state_dict().values(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)
        apart = (delta_of(trainer) - reference.delta).abs() > 1e-6
        assert apart.float().mean() <= 1e-3
    assert delta_of(trainer).shape == (24, 1, 8, 8)
    assert delta_of(trainer).abs().max() == torch.tensor(EPS)


def test_the_perturbation_goes_on_from_batch_to_batch(batches):
    trainer = trainer_of(smooth_net(), replays=1)
    (x, y), (_, _), (few, labels) = batches
    trainer.train_step(x, y, 1)
    first = delta_of(trainer).clone()
    assert torch.isclose(first.abs(), torch.tensor(EPS)).logical_or(first == 0).all()
    assert first.abs().mean() > 0.5 * EPS
    trainer.train_step(few, labels, 1)
    assert torch.equal(delta_of(trainer)[9:], first[9:])
    assert not torch.equal(delta_of(trainer)[:9], first[:9])


def test_no_gradient_outside_the_range_of_images(batches):
    """Where x + delta is cut off, the perturbation stays."""
    trainer = trainer_of(smooth_net(), replays=1)
    x, y = batches[0]
    trainer.train_step(x, y, 1)
    delta = delta_of(trainer).clone()
    outside = (x + delta < 0) | (x + delta > 1)
    assert outside.any()
    trainer.train_step(x, y, 1)
    assert torch.equal(delta_of(trainer)[outside], delta[outside])
    assert not torch.equal(delta_of(trainer)[~outside], delta[~outside])


def test_cost(batches):
    model = Counting(small_cnn())
    trainer = trainer_of(model, replays=4)
    x, y = batches[0]
    trainer.train_step(x, y, 1)  # looks at one row, once, to learn how many classes there are
    model.forward_rows = 0
    trainer.train_step(x, y, 1)
    assert model.forward_rows == 4 * len(x)
    assert FreeAT(replays=4).cost(10) == 12


def test_a_failed_update_leaves_those_before_it(batches):
    """Of a batch whose third update fails, two have been made, and the perturbation is that of two."""
    x, y = batches[0]
    two = trainer_of(smooth_net(), replays=2)
    ours = trainer_of(copy.deepcopy(two.model), replays=3)
    objective = ours.phases.method
    usual, made = objective.loss, []

    def failing(model, examples):
        made.append(usual(model, examples))
        if len(made) == 3:
            made[-1].backward()  # moves the perturbation
            raise ham.NonFiniteError("loss: got nan")
        return made[-1]

    objective.loss = failing
    two.train_step(x, y, 1)
    with pytest.raises(ham.NonFiniteError):
        ours.train_step(x, y, 1)
    assert torch.equal(delta_of(ours), delta_of(two))
    for (name, a), b in zip(ours.model.named_buffers(), two.model.buffers(), strict=True):
        assert torch.equal(a, b), name


def test_graphs_move_it_too(batches):
    ours, theirs = trainer_of(smooth_net()), trainer_of(smooth_net())
    theirs.model.load_state_dict(ours.model.state_dict())
    give_graphs(ours, Recorder())
    for x, y in batches * 3:
        assert ours.train_step(x, y, 1).loss == pytest.approx(theirs.train_step(x, y, 1).loss, rel=1e-5)
    torch.testing.assert_close(delta_of(ours), delta_of(theirs))


def test_in_a_loop_of_ones_own(batches):
    """One Objective, called m times on each batch."""
    trainer = trainer_of(smooth_net())
    model = copy.deepcopy(trainer.model)
    objective, optimizer = Objective(FreeAT(), PGD(EPS)), sgd(model)
    for x, y in batches:
        trainer.train_step(x, y, 1)
        for _ in range(3):
            loss = ham.loss(objective, model, x, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    torch.testing.assert_close(objective.delta, delta_of(trainer))
    for ours, theirs in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_refusals():
    for told in ({"early_drop": True}, {"reweight": True}, {"class_weights": "hedge"}, {"step_sizes": (1.0,)}):
        with pytest.raises(ValueError, match=f"{next(iter(told))}: got .*Free-AT has no attack to apply it to"):
            FreeAT(**told)
    with pytest.raises(ValueError, match="replays: got 0"):
        FreeAT(replays=0)
    with pytest.raises(ValueError, match="norm: got 'l2'; Free-AT is defined for 'linf' only"):
        Objective(FreeAT(), PGD(norm="l2"))
    with pytest.raises(TypeError, match="eps: got Tensor"):
        Objective(FreeAT(), PGD(torch.full((4,), 0.1)))
    with pytest.raises(ValueError, match="method: got 'free_at' on several processes"):
        Objective(FreeAT(), PGD(), ranks=Ranks(0, 2))


# ---------------------------------------------------------------- its course
@pytest.mark.parametrize(
    ("flags", "epochs"),
    [([], 3), (["--replays", "4"], 6), (["--replays", "5"], 5), (["--epochs", "10"], 10)],
)
def test_as_many_updates_as_the_preset_has(flags, epochs):
    told = parse_train(["--method", "free_at", *flags]).settings
    assert told.optim.epochs == epochs
    assert all(m <= epochs + 1 for m in told.optim.milestones)
    with pytest.raises(SystemExit):
        parse_train(["--method", "free_at", "--replays", "0"])


def test_a_file_says_how_many_epochs(tmp_path):
    (tmp_path / "c.toml").write_text("[optim]\nepochs = 7\nmilestones = []\nlr_decay = []\n")
    assert parse_train(["--config", str(tmp_path / "c.toml"), "--method", "free_at"]).settings.optim.epochs == 7


def test_in_a_sweep():
    found = {cell.name: cell.settings for cell in cells("methods", preset("digits"), (0,))}
    assert found["free_at-seed0"].optim.epochs == 3
    assert found["pgd_at-seed0"].optim.epochs == 24
