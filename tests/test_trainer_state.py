"""What a trainer goes on from, and BatchNorm over all rows of a batch."""

from __future__ import annotations

import copy

import pytest
import torch
from nets import Counting, sgd, small_cnn
from objectives import ham as ham_objective
from torch.nn import functional as F

import ham_kernels as ham

HOW = {"eps": 0.2, "step_size": 0.1, "steps": 3, "screen_steps": 1}


def trainer(seed: int = 0, **more) -> ham.HAMTrainer:
    model = small_cnn(seed)
    return ham.HAMTrainer(model, sgd(model), **{**HOW, "start_epoch": 2, "ema_decay": 0.9, **more})


def batches(n: int = 4) -> list:
    g = torch.Generator().manual_seed(3)
    return [(torch.rand(12, 1, 8, 8, generator=g), torch.randint(0, 10, (12,), generator=g)) for _ in range(n)]


class Stop(Exception):
    pass


@pytest.mark.parametrize("after", [1, 4, 6])
def test_a_list_of_batches_goes_on_where_it_was(after):
    """A loader without set_position: what is done is passed over."""
    reference = trainer()
    reference.fit(batches(), 2)
    stopped, done = trainer(), 0

    def stop(_):
        nonlocal done
        done += 1
        if done == after:
            raise Stop

    with pytest.raises(Stop):
        stopped.fit(batches(), 2, on_batch_end=stop)
    assert stopped.position == (1 + (after - 1) // 4, 1 + (after - 1) % 4)
    state = copy.deepcopy(stopped.state_dict())
    stopped.fit(batches(), 2)  # the same object goes on
    resumed = trainer(seed=1)
    resumed.load_state_dict(state)  # and so does another one
    resumed.fit(batches(), 2)
    for other in (stopped, resumed):
        for name in ("model", "ema_model"):
            ours, theirs = getattr(other, name).state_dict(), getattr(reference, name).state_dict()
            assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
        assert [(r.loss, r.n, r.n_hard) for r in other.history] == [(r.loss, r.n, r.n_hard) for r in reference.history]


def test_history_comes_back_with_its_accuracies():
    first = trainer(start_epoch=1)
    first.fit(batches(1), 1, val_loader=batches(1), val_attacks=("clean", "pgd2"))
    second = trainer()
    second.load_state_dict(first.state_dict())
    assert second.history == first.history
    assert second.history[0].val["pgd2"].per_class == pytest.approx(first.history[0].val["pgd2"].per_class, nan_ok=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("optimizer"), "state: lacks optimizer"),
        (lambda s: s.update(ema=None), "ema_decay: this trainer is with a weight average, the state without one"),
        (lambda s: s["model"].pop("1.weight"), r"state: model has another architecture .*1\.weight: missing"),
        (lambda s: s["ema"].update({"1.weight": torch.zeros(1)}), r"state: ema has another architecture"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change, message):
    source, target = trainer(seed=1), trainer()
    source.train_step(*batches(1)[0], 1)
    state = copy.deepcopy(source.state_dict())
    change(state)
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(ValueError, match=message):
        target.load_state_dict(state)
    after = target.state_dict()
    assert all(torch.equal(before["model"][k], after["model"][k]) for k in before["model"])
    assert after["steps_done"] == 0


@pytest.mark.parametrize("kind", ["groups", "kind"])
def test_a_state_of_another_optimizer_changes_nothing(kind):
    """The watch over the warm-up, above all: it has been the first to move once."""
    model, other = small_cnn(seed=1), small_cnn()
    source = ham.HAMTrainer(model, sgd(model), **SMALL, start_epoch=3, warm_up="n_fgsm")
    source.fit(batches(2), epochs=3)
    source.phases._checks["n_fgsm"].overfitted_at = 1
    wrong = (
        torch.optim.Adam(other.parameters())
        if kind == "kind"
        else torch.optim.SGD([{"params": [p]} for p in other.parameters()], 0.1)
    )
    target = ham.HAMTrainer(other, wrong, **SMALL, start_epoch=3, warm_up="n_fgsm")
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(ValueError, match="state: its optimizer"):
        target.load_state_dict(source.state_dict())
    after = target.state_dict()
    assert target.phases.objective(1).method.name == "n_fgsm"
    assert after["overfitting"] == before["overfitting"]
    assert after["optimizer"] == before["optimizer"]
    assert all(torch.equal(before["model"][k], after["model"][k]) for k in before["model"])


@pytest.mark.parametrize("more", [{}, {"awp": 0.01}])
def test_adamw_and_clipping_go_on_to_the_bit(more):
    def made(seed: int) -> ham.HAMTrainer:
        model = small_cnn(seed)
        optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1)
        return ham.HAMTrainer(model, optimizer, **HOW, start_epoch=1, ema_decay=0.9, grad_clip=0.5, **more)

    reference, stopped, resumed = made(0), made(0), made(1)
    reference.fit(batches(), 2)
    stopped.fit(batches(), 1)
    resumed.load_state_dict(copy.deepcopy(stopped.state_dict()))
    resumed.fit(batches(), 2)
    ours, theirs = resumed.model.state_dict(), reference.model.state_dict()
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    sgd_trainer = trainer()
    with pytest.raises(ValueError, match="state: its optimizer knows no"):
        sgd_trainer.load_state_dict(reference.state_dict())


def test_gradients_are_clipped_as_torch_clips_them():
    """One update of SGD without momentum is lr times the gradient."""
    x, y = batches(1)[0]
    moved = {}
    for clip in (0.0, 0.1, 100.0):
        model = small_cnn()
        before = [p.detach().clone() for p in model.parameters()]
        optimizer = torch.optim.SGD(model.parameters(), 1.0)
        ham.Trainer(model, optimizer, ham.methods.PGDAT(), steps=1, grad_clip=clip).train_step(x, y, 1)
        moved[clip] = torch.cat([(a - b.detach()).flatten() for a, b in zip(before, model.parameters(), strict=True)])
    assert moved[0.0].norm() > 0.2
    assert torch.equal(moved[0.0], moved[100.0])
    torch.testing.assert_close(moved[0.1], moved[0.0] * 0.1 / moved[0.0].norm())
    with pytest.raises(ValueError, match=r"grad_clip: got -1.0; it must be finite and >= 0"):
        ham.Trainer(model, optimizer, ham.methods.PGDAT(), grad_clip=-1.0)


# ---------------------------------------------------------------- bn_rows
SMALL = {"eps": 0.01, "step_size": 0.005, "steps": 3, "screen_steps": 1}


def half_hard(model) -> tuple[torch.Tensor, torch.Tensor]:
    """Twelve images, six with the class that the model sees in them, six with another one."""
    x, _ = batches(1)[0]
    y = copy.deepcopy(model).eval()(x).argmax(1)
    return x, torch.where(torch.arange(12) % 2 == 0, y, (y + 1) % 10)


def test_batchnorm_of_all_rows_is_that_of_one_forward_over_the_batch():
    model = small_cnn()
    twin = copy.deepcopy(model)
    x, y = half_hard(model)
    t = ham.HAMTrainer(model, sgd(model), **SMALL, start_epoch=1, bn_rows="all")
    objective = ham_objective(ham.PGD(0.01, 0.005, 3), 1, bn_rows="all")
    examples = objective.examples(twin, x, y, seed=t.seed, step=0)
    assert 6 <= examples.n_hard < 12
    assert examples.rest.shape[0] == 12 - examples.n_hard
    twin.train()
    logits = twin(torch.cat([examples.x_adv, examples.rest]))[: examples.n_hard]
    loss = (F.cross_entropy(logits, examples.y, reduction="none") * examples.weights).mean()
    optimizer = sgd(twin)
    loss.backward()
    optimizer.step()
    report = t.train_step(x, y, epoch=1)
    assert report.loss == pytest.approx(loss.item(), rel=1e-5)
    for ours, theirs in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("rows", "trained"), [("hard", "n_hard"), ("all", "n")])
def test_rows_in_the_update(rows, trained):
    model = Counting(small_cnn())
    x, y = half_hard(model)
    t = ham.HAMTrainer(model, sgd(model), **SMALL, start_epoch=1, bn_rows=rows)
    model.training_rows = 0
    report = t.train_step(x, y, epoch=1)
    assert 6 <= report.n_hard < 12
    assert model.training_rows == getattr(report, trained)


def test_random_rows_leave_the_others_as_rest():
    objective = ham_objective(ham.PGD(0.01, 0.005, 3), 1, rows="random", bn_rows="all")
    model = small_cnn()
    x, y = half_hard(model)
    examples = objective.examples(model, x, y, seed=0, step=0)
    assert 6 <= examples.n_hard < 12
    near = (examples.rest[:, None] - x[None]).abs().flatten(2).amax(2) <= 0.01 + 1e-6
    assert near.sum(1).tolist() == [1] * (12 - examples.n_hard)  # each is one of the images, slightly moved
    kept, left = examples.index.tolist(), near.nonzero()[:, 1].tolist()
    assert sorted(kept + left) == list(range(12))


def test_frozen_statistics_come_from_no_rows():
    with pytest.raises(ValueError, match="bn_rows: got 'all' with freeze_bn"):
        trainer(freeze_bn=True, bn_rows="all")
    with pytest.raises(ValueError, match="bn_rows: got 'none'"):
        trainer(bn_rows="none")
