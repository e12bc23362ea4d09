"""Several batches screened and attacked together, numbers of rows rounded up, and screening in one step."""

from __future__ import annotations

import copy

import pytest
import torch
from nets import Broken, Constant, Counting, sgd, small_cnn
from objectives import keep, mine, mine_group
from torch.nn import functional as F

import ham_kernels as ham
import ham_reference as reference
from ham_kernels import data
from ham_kernels.methods.mining import Examples
from ham_reference.method import evaluating, input_gradient, is_hard, pgd_step, start_point

K, M = 5, 2
HOW = {"eps": 0.2, "step_size": 0.05, "steps": K}
SETTINGS = {**HOW, "screen_steps": M, "start_epoch": 2}
RAGGED = (24, 31, 1, 16)


@pytest.fixture(scope="module")
def digits():
    images = data.digits()
    return images.x_train[:320].float() / 255, images.y_train[:320]


@pytest.fixture(scope="module")
def group(digits):
    """Batches of several sizes."""
    x, y = digits
    starts = [sum(RAGGED[:i]) for i in range(len(RAGGED))]
    return [(x[i : i + n], y[i : i + n]) for i, n in zip(starts, RAGGED, strict=True)]


@pytest.fixture(scope="module")
def trained(digits):
    """A model that knows the digits about by half, so that some rows are hard."""
    model = small_cnn()
    trainer = ham.HAMTrainer(model, sgd(model), **SETTINGS)
    for _ in range(12):
        for i in range(0, 320, 80):
            trainer.train_step(digits[0][i : i + 80], digits[1][i : i + 80], epoch=1)
    return model


def joined(group) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.cat(part) for part in zip(*group, strict=True))


def mined(model, group, kept=None, weigh=1.0, one=False, **how) -> list[Examples]:
    x, y = joined(group)
    sizes = [len(y)] if one else [len(labels) for _, labels in group]
    kept = keep("hard", M) if kept is None else kept
    return mine_group(model, x, y, ham.PGD(**HOW | how), kept, weigh, sizes=sizes, seed=4, step=9)


def trainer_of(model, **choices) -> ham.HAMTrainer:
    return ham.HAMTrainer(model, sgd(model), **SETTINGS | choices)


class Stop(Exception):
    pass


def stop(_):
    raise Stop


# ---------------------------------------------------------------- mining a group
@pytest.mark.parametrize("rows", ["all", "hard"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_group_is_mined_as_one_batch(trained, group, rows, norm):
    """The reference's rows and examples of the batches together; each batch has its own, and weights of mean 1."""
    how = {"norm": "linf"} if norm == "linf" else {"norm": "l2", "eps": 1.0, "step_size": 0.25}
    x, y = joined(group)
    parts = mined(trained, group, keep("hard", M) if rows == "hard" else keep(), **how)
    x_adv, _, weights, kept = reference.hard_examples(
        trained, x, y, **HOW | how, screen_steps=M, lam=1.0, reweight=True, early_drop=rows == "hard", seed=4, step=9
    )
    start = done = 0
    for part, size in zip(parts, RAGGED, strict=True):
        own_rows = slice(done, done + part.n_hard)
        expected = kept[(kept >= start) & (kept < start + size)]
        assert part.n == size
        assert part.n_hard == part.n_kept == len(expected)
        if rows == "hard":
            assert torch.equal(part.index.long(), expected)
        assert torch.equal(part.y, y[expected])
        assert torch.equal(part.x, x[expected])
        if part.n_kept:
            assert ((part.x_adv - x_adv[own_rows]).abs() > 1e-5).float().mean() < 0.01
            assert part.weights.mean() == pytest.approx(1.0, abs=1e-5)
            torch.testing.assert_close(part.weights, weights[own_rows] / weights[own_rows].mean(), rtol=1e-3, atol=1e-4)
        start, done = start + size, done + part.n_kept
    assert done == len(kept)
    if rows == "hard":
        assert 0 < done < len(y)


def test_a_group_for_one_update_is_one_batch(trained, group):
    x, y = joined(group)
    (one,) = mined(trained, group, one=True)
    alone = mine(trained, x, y, ham.PGD(**HOW), keep("hard", M), 1.0, seed=4, step=9)
    for name in ("x_adv", "x", "y", "weights", "index"):
        assert torch.equal(getattr(one, name), getattr(alone, name))
    assert (one.n, one.n_hard) == (alone.n, alone.n_hard)


def test_random_rows_are_as_many_in_each_batch(trained, group):
    hard, random = mined(trained, group), mined(trained, group, keep("random", M, rest=True))
    starts = [sum(RAGGED[:i]) for i in range(len(RAGGED))]
    x, y = joined(group)
    for a, b, start in zip(hard, random, starts, strict=True):
        assert (a.n, a.n_hard) == (b.n, b.n_hard) == (b.n, b.n_kept)
        rows = b.index.long()
        assert torch.equal(rows, rows.sort().values)
        assert ((rows >= start) & (rows < start + b.n)).all()
        assert torch.equal(b.y, y[rows])
        assert torch.equal(b.x, x[rows])
        assert len(b.rest) == b.n - b.n_kept
    assert not torch.equal(torch.cat([p.index for p in hard]), torch.cat([p.index for p in random]))


def test_each_batch_draws_its_own_random_rows():
    """Of two equal batches, half of each hard, not the same places."""
    y = torch.arange(64) % 2
    batch = torch.rand(64, 1, 8, 8), y
    a, b = mined(Constant([5.0, 0.0]), [batch, batch], keep("random", M))
    assert a.n_kept == b.n_kept == 32
    assert not torch.equal(a.index, b.index - 64)


@pytest.mark.parametrize("rows", ["hard", "random"])
def test_the_rest_of_each_batch_is_its_own(trained, group, rows):
    """BatchNorm over all rows: those that leave are images of the same batch, one screening away."""
    starts = [sum(RAGGED[:i]) for i in range(len(RAGGED))]
    x, _ = joined(group)
    for part, start in zip(mined(trained, group, keep(rows, M, rest=True)), starts, strict=True):
        gone = sorted(set(range(start, start + part.n)) - set(part.index.tolist()))
        assert len(part.rest) == len(gone)
        assert part.n_forward == part.n
        away = (part.rest[:, None] - x[gone][None]).abs().flatten(2).amax(2)
        assert (away <= HOW["eps"] + 1e-6).any(1).all()
        assert (away <= HOW["eps"] + 1e-6).any(0).all()


def test_budgets_per_row_in_a_group(trained, group):
    eps = torch.linspace(0.05, 0.4, sum(RAGGED))
    for part in mined(trained, group, eps=eps, step_size=eps / 4):
        delta = (part.x_adv - part.x).flatten(1).abs().amax(1)
        assert (delta <= eps[part.index.long()] + 1e-5).all()
        assert (delta > 0.5 * eps[part.index.long()]).all()


def test_cost_of_a_group(trained, group):
    """2M + 1 + 2h(K - M) forwards of all its batches together: none is screened by itself."""
    model = Counting(copy.deepcopy(trained))
    n = sum(RAGGED)
    h = sum(p.n_hard for p in mined(model, group)) / n
    assert 0 < h < 1
    assert model.full_batch_forwards(n) == pytest.approx(2 * M + 1 + 2 * h * (K - M))
    assert {rows for rows, _ in model.batches} == {n, round(h * n)}


# ---------------------------------------------------------------- a multiple of rows
@pytest.mark.parametrize("multiple", [1, 7, 16, 1000])
@pytest.mark.parametrize("rest", [False, True])
def test_rounding_fills_up_with_the_rows_of_least_margin(trained, group, multiple, rest):
    x, y = joined(group)
    plain = mined(trained, group, one=True)[0]
    (part,) = mined(trained, group, keep("hard", M, rest=rest, round_to=multiple), one=True)
    assert part.n_hard == plain.n_hard
    assert part.n_kept == min(-(-plain.n_hard // multiple) * multiple, len(y))
    screened = reference_screening(trained, x, y, [HOW["step_size"]] * M)
    with evaluating(trained), torch.no_grad():
        z = trained(screened)
    margin = z.gather(1, y[:, None])[:, 0] - z.scatter(1, y[:, None], -torch.inf).amax(1)
    easy = [r for r in margin.argsort(stable=True).tolist() if r not in plain.index.tolist()]
    fill = part.n_kept - part.n_hard
    assert part.index[: part.n_hard].tolist() == plain.index.tolist()
    assert part.index[part.n_hard :].tolist() == easy[:fill]
    assert torch.equal(part.y, y[part.index.long()])
    assert torch.equal(part.x, x[part.index.long()])
    assert part.weights.shape == (part.n_kept,)
    assert part.weights.mean() == pytest.approx(1.0, abs=1e-5)
    if rest:
        assert len(part.rest) == len(y) - part.n_kept
        left = screened[easy[fill:]]
        assert all(any(torch.allclose(a, b, atol=1e-5) for b in left) for a in part.rest)
    # the rows that fill up are attacked to the end like the hard ones
    with evaluating(trained), torch.no_grad():
        before, after = (F.cross_entropy(trained(t), part.y, reduction="none") for t in (part.x, part.x_adv))
    assert (after[part.n_hard :] > before[part.n_hard :]).float().mean() > 0.8 if fill else True


def reference_screening(model, x, y, step_sizes, norm="linf", eps=HOW["eps"]):
    with evaluating(model):
        point = start_point(x, eps, norm, seed=4, step=9)
        for step_size in step_sizes:
            _, gradient = input_gradient(model, point, y)
            point = pgd_step(point, x, gradient, eps, step_size, norm)
    return point


@pytest.mark.parametrize(("label", "hard"), [(0, 0), (1, 12)], ids=["none hard", "all hard"])
def test_rounding_where_none_or_all_are_hard(label, hard):
    """Nothing is added to nothing; and there is nothing to add to a whole batch."""
    x, y = torch.rand(12, 1, 8, 8), torch.full((12,), label)
    kept = keep("hard", M, round_to=5)
    part = mine(Constant([9.0, 0.0]), x, y, ham.PGD(**HOW), kept, 1.0, seed=0, step=0)
    assert (part.n_hard, part.n_kept) == (hard, hard)


def test_rounded_random_rows(trained, group):
    (part,) = mined(trained, group, keep("random", M, rest=True, round_to=16), one=True)
    rows = part.index.long()
    assert part.n_kept % 16 == 0
    assert part.n_kept > part.n_hard > 0
    assert torch.equal(rows, rows.sort().values)
    assert len(rows.unique()) == part.n_kept
    assert len(part.rest) == part.n - part.n_kept


def test_rounding_is_for_one_update():
    with pytest.raises(ValueError, match="round_to: got 4 with group=2; rows are rounded for one update of a group"):
        ham.methods.HAM(round_to=4, group=2)


def test_rounding_is_for_one_update_also_of_batches_given_together(trained, group):
    trainer = trainer_of(copy.deepcopy(trained), round_to=4)
    with pytest.raises(ValueError, match="round_to: got 4"):
        trainer.train_group(group, epoch=2)


def test_rounding_in_a_trainer(trained, group):
    """n_hard counts the hard rows, n_kept those trained on; the epoch's loss is their mean."""
    model = copy.deepcopy(trained)
    counting = Counting(model)
    trainer = trainer_of(counting, round_to=8, start_epoch=1)
    steps = []
    (report,) = trainer.fit(group[:2], 1, on_batch_end=steps.append)
    assert all(s.n_kept % 8 == 0 or s.n_kept == s.n for s in steps)
    assert report.n_kept == sum(s.n_kept for s in steps) > report.n_hard == sum(s.n_hard for s in steps)
    assert counting.training_rows == report.n_kept
    assert report.loss == pytest.approx(sum(s.loss * s.n_kept for s in steps) / report.n_kept)
    assert steps[0].hard_fraction == steps[0].n_hard / 24


# ---------------------------------------------------------------- screening in one step
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("per_row", [False, True])
def test_one_step_screening_is_one_step_of_their_length(trained, digits, norm, per_row):
    """Screened at start + M * step; the hard rows go on from there with K - M steps of the usual length."""
    x, y = digits[0][:64], digits[1][:64]
    eps, step_size = (0.2, 0.05) if norm == "linf" else (1.0, 0.25)
    screened = reference_screening(trained, x, y, [M * step_size], norm, eps)
    with evaluating(trained):
        with torch.no_grad():
            z = trained(screened)
        kept = is_hard(z, y).nonzero().squeeze(1)
        point, clean, label = screened[kept], x[kept], y[kept]
        with torch.no_grad():
            steps = [(z - trained(start_point(x, eps, norm, 4, 9))).abs().sum(1)[kept]]
        last = z[kept]
        for k in range(K - M):
            z, gradient = input_gradient(trained, point, label)
            if k:
                steps.append((z - last).abs().sum(1))
            last = z
            point = pgd_step(point, clean, gradient, eps, step_size, norm)
    assert 0 < len(kept) < 64
    if per_row:
        eps, step_size = torch.full((64,), eps), torch.full((64,), step_size)
    pgd = ham.PGD(eps, step_size, K, norm)
    ours = mine(trained, x, y, pgd, keep("hard", M, screen="one_step"), 0.3, seed=4, step=9)
    assert torch.equal(ours.index.long(), kept)
    assert ((ours.x_adv - point).abs() > 1e-5).float().mean() < 0.01
    expected = reference.step_size_weights(torch.stack(steps).amax(0), 0.3)
    torch.testing.assert_close(ours.weights, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("batches", [1, 3])
def test_cost_of_one_step_screening(trained, digits, batches):
    """2 + 1 + 2h(K - M) + 3h forwards of all batches, and of the trainer the update's."""
    counting = Counting(copy.deepcopy(trained))
    trainer = trainer_of(counting, screen="one_step", group=batches, start_epoch=1)
    x, y = digits[0][:96], digits[1][:96]
    reports = trainer.train_group(list(zip(x.chunk(batches), y.chunk(batches), strict=True)), 1)
    h = sum(r.n_hard for r in reports) / 96
    assert 0 < h < 1
    assert counting.full_batch_forwards(96) == pytest.approx(2 + 1 + 2 * h * (K - M) + 3 * h)


# ---------------------------------------------------------------- training by groups
def reference_group(theirs: reference.HAMTrainer, group, one: bool) -> list[tuple[float, int, int]]:
    """(loss, n, n_hard) of each update, all examples made by the weights before the first."""
    x, y = joined(group)
    sizes = [len(y)] if one else [len(labels) for _, labels in group]
    x_adv, y_kept, weights, kept = reference.hard_examples(
        theirs.model, x, y, **theirs.attack, lam=theirs.lam, reweight=True, early_drop=True, seed=theirs.seed,
        step=theirs.steps_done,
    )  # fmt: skip
    theirs.steps_done += len(group)
    updates, start = [], 0
    for size in sizes:
        rows = (kept >= start) & (kept < start + size)
        loss, n_hard = 0.0, int(rows.sum())
        if n_hard:
            scaled = weights[rows] / weights[rows].mean()
            loss = theirs.update(x_adv[rows], y_kept[rows], scaled, freeze_bn=n_hard == 1)
        updates.append((loss, size, n_hard))
        start += size
    return updates


@pytest.mark.parametrize("updates", ["each", "one"])
def test_training_by_groups_is_the_references(trained, group, updates):
    model, twin = copy.deepcopy(trained), copy.deepcopy(trained)
    ours = trainer_of(model, group=4, group_updates=updates, ema_decay=0.9)
    theirs = reference.HAMTrainer(twin, sgd(twin), **SETTINGS, ema_decay=0.9)
    for _ in range(4):
        reports = ours.train_group(group, 2)
        expected = reference_group(theirs, group, updates == "one")
        assert [(r.n, r.n_hard) for r in reports] == [(n, n_hard) for _, n, n_hard in expected]
        assert [r.loss for r in reports] == pytest.approx([loss for loss, *_ in expected], rel=1e-3)
        assert sum(r.batches for r in reports) == 4
    assert ours.steps_done == 16
    for name in ("model", "ema_model"):
        a, b = getattr(ours, name).state_dict(), getattr(theirs, name).state_dict()
        for k in a:
            torch.testing.assert_close(a[k], b[k], rtol=1e-3, atol=1e-4, msg=k)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("epoch", [1, 2])
def test_cost_of_groups_in_training(trained, digits, size, epoch):
    """2K+3 and 2M+1+2h(K-M)+3h, whatever the number of batches that share an attack."""
    counting = Counting(copy.deepcopy(trained))
    trainer = trainer_of(counting, group=size)
    x, y = digits[0][:96], digits[1][:96]
    reports = trainer.train_group(list(zip(x.chunk(size), y.chunk(size), strict=True)), epoch)
    h = sum(r.n_hard for r in reports) / 96
    assert 0 < h < 1 or epoch == 1
    expected = 2 * K + 3 if epoch == 1 else 2 * M + 1 + 2 * h * (K - M) + 3 * h
    assert counting.full_batch_forwards(96) == pytest.approx(expected)


@pytest.mark.parametrize("updates", ["each", "one"])
def test_fit_by_groups(trained, digits, updates):
    """Seven batches: groups of three, three and one. Warm-up epochs go batch by batch."""
    counting = Counting(copy.deepcopy(trained))
    batches = list(zip(digits[0][:112].split(16), digits[1][:112].split(16), strict=True))
    trainer = trainer_of(counting, group=3, group_updates=updates)
    steps, attacked = [], []
    with pytest.raises(Stop):  # fit would not begin a training that ends before it mines
        trainer.fit(batches, 2, on_epoch_end=stop)
    attacked.append({rows for rows, training in counting.batches if not training})
    counting.batches.clear()
    trainer.fit(batches, 2)
    attacked.append({rows for rows, training in counting.batches if not training})
    warm_up, mining = trainer.history
    assert attacked[0] == {16}
    assert {48, 16} <= attacked[1]
    assert trainer.steps_done == 14
    assert (warm_up.n, mining.n) == (112, 112)
    assert 0 < mining.n_hard < 112
    assert mining.n_kept == mining.n_hard
    trainer.fit(batches, 3, on_batch_end=steps.append)
    assert len(steps) == (7 if updates == "each" else 3)
    assert [s.n for s in steps] == ([16] * 7 if updates == "each" else [48, 48, 16])
    assert sum(s.batches for s in steps) == 7
    assert trainer.history[2].loss == pytest.approx(
        sum(s.loss * s.n_hard for s in steps) / sum(s.n_hard for s in steps)
    )


@pytest.mark.parametrize("updates", ["each", "one"])
def test_batches_without_a_hard_row_are_counted(updates):
    """Of a group's batches only those with a hard row make an update; each one without counts as skipped."""
    model = Constant([5.0, 0.0, 0.0])
    x = torch.rand(4, 1, 8, 8)
    easy, hard = (x, torch.zeros(4, dtype=torch.int64)), (x, torch.ones(4, dtype=torch.int64))
    trainer = trainer_of(model, group=2, group_updates=updates, start_epoch=1, ema_decay=0.5)
    (report,) = trainer.fit([easy, hard, easy, easy], 1)
    assert report.n == 16
    assert report.n_hard == 4
    assert report.skipped == (3 if updates == "each" else 2)
    assert trainer.position == (2, 0)


@pytest.mark.parametrize("updates", ["each", "one"])
@pytest.mark.parametrize("after", [1, 3, 4, 6])
def test_a_run_by_groups_goes_on_where_it_was(trained, digits, updates, after):
    """Stopped at some report of an epoch: on_batch_end hears of a group when all of it is done."""
    batches = list(zip(digits[0][:112].split(16), digits[1][:112].split(16), strict=True))

    def new(seed):
        model = copy.deepcopy(trained) if seed == 0 else small_cnn(seed)
        return trainer_of(model, group=3, group_updates=updates, ema_decay=0.9, start_epoch=1)

    whole, stopped, resumed, heard = new(0), new(0), new(1), 0

    def stop_after(_):
        nonlocal heard
        heard += 1
        if heard == after:
            raise Stop

    whole.fit(batches, 2)
    with pytest.raises(Stop):
        stopped.fit(batches, 2, on_batch_end=stop_after)
    epoch, done = stopped.position
    assert done in (3, 6, 7)
    assert stopped.steps_done == 7 * (epoch - 1) + done
    resumed.load_state_dict(copy.deepcopy(stopped.state_dict()))
    for other in (stopped, resumed):
        other.fit(batches, 2)
        for name in ("model", "ema_model"):
            a, b = getattr(other, name).state_dict(), getattr(whole, name).state_dict()
            assert all(torch.equal(a[k], b[k]) for k in b)
        assert [(r.loss, r.n, r.n_hard, r.skipped) for r in other.history] == [
            (r.loss, r.n, r.n_hard, r.skipped) for r in whole.history
        ]


def test_an_error_names_the_batches_of_its_group(trained, digits):
    batches = list(zip(digits[0][:64].split(16), digits[1][:64].split(16), strict=True))
    batches[2] = (batches[2][0] + 2.0, batches[2][1])
    trainer = trainer_of(copy.deepcopy(trained), group=2, start_epoch=1)
    with pytest.raises(ValueError, match=r"epoch 1, batches 3 to 4: x: pixels run from 0 to 3"):
        trainer.fit(batches, 1)
    assert trainer.position == (1, 2)


def test_nan_in_a_group_changes_nothing(trained, group):
    model = Broken(copy.deepcopy(trained), lambda z: z * torch.nan, after=10**9)
    trainer = trainer_of(model, group=4, start_epoch=1)
    trainer.train_group(group, 1)
    before = copy.deepcopy((model.state_dict(), trainer.optimizer.state_dict()))
    model.after = 0
    with pytest.raises(ham.NonFiniteError, match=r"epoch 1, batches 1 to 4: model: .*nothing was updated"):
        trainer.fit(group, 1)
    assert str(before) == str((model.state_dict(), trainer.optimizer.state_dict()))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ((torch.rand(4, 1, 9, 9), torch.zeros(4, dtype=torch.int64)), r"x: .*\(4, 1, 9, 9\)"),
        ((torch.rand(4, 1, 8, 8, dtype=torch.float16), torch.zeros(4, dtype=torch.int64)), "x: .*float16"),
    ],
    ids=["size", "type"],
)
def test_batches_of_a_group_are_alike(trained, group, other, message):
    """They are put together, so that their images are of one size and type."""
    trainer = trainer_of(copy.deepcopy(trained), group=2, start_epoch=1)
    with pytest.raises((TypeError, ValueError), match=message):
        trainer.train_group([group[0], other], 1)


def test_a_group_of_nothing(trained):
    with pytest.raises(ValueError, match="batches: got none"):
        trainer_of(copy.deepcopy(trained)).train_group([], 1)
