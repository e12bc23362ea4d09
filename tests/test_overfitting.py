"""Catastrophic overfitting: found in real and made-up collapses, and nowhere else; the model and training untouched."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from nets import Broken, Counting, sgd, small_cnn
from objectives import fgsm_rs, n_fgsm
from torch import nn

import ham_kernels as ham
from ham_kernels import data
from ham_kernels.attack import pgd as pgd_module
from ham_kernels.attack.pgd import PGD
from ham_kernels.training.overfitting import OverfittingCheck, Past, Reading, judge
from ham_reference import method
from ham_reference import one_step as reference

EPS = 0.2
CHECK = {"one_step": fgsm_rs(PGD(EPS)).pgd, "multi_step": PGD(EPS, EPS / 4, 10)}


def first_alarm(counts, rows: int = 256) -> int | None:
    """Which of the readings (one_step, multi_step) first finds overfitting."""
    past = Past()
    for i, (one_step, multi_step) in enumerate(counts):
        overfitted, past = judge(Reading(rows, int(one_step), int(multi_step)), past)
        if overfitted:
            return i
    return None


def percent(text: str) -> list[tuple[float, float]]:
    """Readings of 256 images from "one_step/multi_step" in percent."""
    return [tuple(2.56 * float(p) for p in pair.split("/")) for pair in text.split()]


# ---------------------------------------------------------------- the rule
@pytest.mark.parametrize(
    ("readings", "expected"),
    [
        ("35/32 41/38 45/41 47/43 50/44 49/43 52/45 53/44 85/1 92/0", 8),
        ("35/32 41/38 45/41 47/43 50/44 49/43 62/20 80/5", 7),  # the first half of a fall is not yet one
        ("40/1 62/0 80/0", 1),  # in the first epoch: there never was any robustness
        ("12/0 20/0 26/0 32/0 41/0", 3),  # not before the one-step attack is resisted at all
        ("40/1 30/20 40/28 45/31", None),  # it came in the second epoch
        ("40/1 30/20 35/0 40/28 45/31", 2),
        ("3/0 9/5 12/0 21/0 25/0 24/0 28/0 25/0 30/0", 7),  # digits, FGSM-RS at eps 0.5
    ],
)
def test_collapses_are_found(readings, expected):
    assert first_alarm(percent(readings)) == expected


@pytest.mark.parametrize(
    "readings",
    [
        "10/10 10/9 11/3 10/0 14/9 16/2 19/12 24/19 30/27",  # near chance, where PGD may turn each image
        "10/10 10/10 10/1 9/0 10/0 11/1 10/0 10/0",  # a model that learns nothing
        "12/4 26/10 32/13 40/14 44/17 42/19 58/29 58/31",  # digits, FGSM-RS at eps 0.3
        "17/6 23/9 33/12 35/10 44/15 39/12 46/16 52/22 46/20 65/31 75/24 61/23 71/23 73/34 69/30 76/29 64/14 65/22",
        "12/15 23/31 23/34 30/50 32/53 31/46",  # digits, N-FGSM: its examples lie further away than PGD's
        "45/40 50/44 52/45 20/15 11/8 10/10 10/10",  # divergence: neither attack is resisted any more
        "45/40 50/44 30/26 48/42",
        "0/0 0/0 1/0 0/0",
        "100/100 100/100 100/100",  # eps = 0
    ],
)
def test_nothing_else_is_found(readings):
    assert first_alarm(percent(readings)) is None


@pytest.mark.parametrize("rows", [1, 16, 32, 64, 128, 256])
def test_batch_noise_is_no_alarm(rows, seed):
    """400 healthy trainings of 50 epochs: of the images that resist one step, a share resists PGD."""
    rng = np.random.default_rng(seed)
    for top in (0.3, 0.6, 0.9):
        one_step = 0.1 + (top - 0.1) * (1 - np.exp(-np.arange(50) / 8))
        for share in (0.9, 0.7, 0.5, 0.4):
            for _ in range(33):
                counts = rng.binomial(rows, one_step)
                assert first_alarm(zip(counts, rng.binomial(counts, share), strict=True), rows) is None


@pytest.mark.parametrize(("rows", "surely_within"), [(64, 8), (128, 2), (256, 1)])
def test_collapse_is_found_in_spite_of_batch_noise(rows, surely_within, seed):
    """From the tenth epoch on, PGD leaves 2 % of the images."""
    rng = np.random.default_rng(seed)
    late = []
    for _ in range(200):
        one_step = np.concatenate([rng.binomial(rows, 0.6, 10), rng.binomial(rows, 0.85, 20)])
        multi_step = np.concatenate([rng.binomial(one_step[:10], 0.8), rng.binomial(rows, 0.02, 20)])
        late.append(first_alarm(zip(one_step, multi_step, strict=True), rows) - 10)
    assert min(late) == 0
    assert max(late) < surely_within
    assert np.mean(np.array(late) == 0) > 0.8


def test_too_few_rows_never_tell():
    assert first_alarm([(18, 18), (18, 0), (18, 0)], 18) is None
    assert first_alarm([(19, 19), (19, 0)], 19) == 1


def test_rule_has_no_memory_but_the_past():
    """A reading is judged by the best share and the doubts; both are as documented."""
    _, past = judge(Reading(100, 80, 60), Past())
    assert past == Past(0.6, 0)
    _, past = judge(Reading(200, 160, 100), past)
    assert past == Past(0.6, 0)
    assert judge(Reading(200, 160, 10), past) == (True, Past(0.6, 1))
    assert judge(Reading(200, 160, 10), Past()) == (False, Past(0.05, 1))
    assert judge(Reading(200, 160, 10), Past(0.05, 1)) == (True, Past(0.05, 2))


# ---------------------------------------------------------------- models
class Valley(nn.Module):
    """Two classes that depend on how far the mean pixel is from 1/2, in units of eps: right, wrong, right again.

    A step of eps leads to the far side of the valley, small steps lead into it: the distortion that a collapse leaves
    behind (Kim, Lee and Lee, arXiv 2010.01799). With `depth` 0 the class is right everywhere.
    """

    def __init__(self, eps: float, depth: float):
        super().__init__()
        self.eps = eps
        self.depth = nn.Parameter(torch.tensor(depth))

    def forward(self, x):
        away = (x.flatten(1).mean(1) - 0.5) / self.eps
        margin = 1 + self.depth * (torch.cos(2 * math.pi * away) - 1)
        return torch.stack([margin, -margin], 1)


def grey(rows: int = 64):
    return torch.full((rows, 1, 32, 32), 0.5), torch.zeros(rows, dtype=torch.int64)


@pytest.mark.parametrize("objective", [fgsm_rs, n_fgsm])
def test_fall_into_a_valley_is_found_at_once(objective):
    check = OverfittingCheck(objective(PGD(EPS)).pgd, PGD(EPS, EPS / 10, 10))
    healthy = check(Valley(EPS, 0.0), *grey(), epoch=1)
    assert (healthy.one_step, healthy.multi_step) == (64, 64)
    assert check.overfitted_at is None
    collapsed = check(Valley(EPS, 1.0), *grey(), epoch=2)
    assert collapsed.one_step >= 60
    assert collapsed.multi_step == 0
    assert check.overfitted_at == 2
    check(Valley(EPS, 1.0), *grey(), epoch=3)
    assert check.overfitted_at == 2


def test_too_few_steps_of_pgd_are_made_ten():
    """Three small steps would not reach the valley."""
    reading = OverfittingCheck(fgsm_rs(PGD(EPS)).pgd, PGD(EPS, EPS / 10, 3))(Valley(EPS, 1.0), *grey(), epoch=1)
    assert reading.multi_step == 0


@pytest.fixture(scope="module")
def digits():
    images = data.digits()
    return images.x_train.float() / 255, images.y_train


def watched(eps: float, epochs: int, digits, width: int = 16) -> tuple[OverfittingCheck, list[Reading]]:
    """A small CNN trained by FGSM-RS, with a reading after each epoch."""
    model = small_cnn(width=width)
    optimizer, objective = sgd(model, 0.1), fgsm_rs(PGD(eps))
    check, readings, (x, y) = OverfittingCheck(objective.pgd, PGD(eps, eps / 4, 10)), [], digits
    shuffle = torch.Generator().manual_seed(0)
    for epoch in range(1, epochs + 1):
        order = torch.randperm(1280, generator=shuffle)
        for step, rows in enumerate(order.split(64)):
            made = objective.examples(model, x[rows], y[rows], seed=0, step=20 * epoch + step)
            optimizer.zero_grad()
            objective.loss(model, made).backward()
            optimizer.step()
        readings.append(check(model, x[order[:256]], y[order[:256]], epoch=epoch))
        if check.overfitted_at is not None:
            break
    return check, readings


@pytest.mark.slow
def test_training_that_overfits_is_found(digits):
    """FGSM-RS at eps 0.5 learns to resist itself, and PGD not at all."""
    check, readings = watched(0.5, 14, digits, width=32)
    assert check.overfitted_at is not None
    assert readings[-1].one_step > 64
    assert readings[-1].multi_step < 8


@pytest.mark.slow
def test_training_that_goes_well_is_not(digits):
    check, readings = watched(0.2, 6, digits)
    assert check.overfitted_at is None
    assert readings[-1].multi_step > 90


# ---------------------------------------------------------------- the check as a guest
@pytest.fixture
def batch():
    return torch.rand(40, 1, 8, 8), torch.randint(0, 10, (40,))


def test_model_and_random_generators_are_as_before(batch):
    model = small_cnn()
    model[1].eval()
    modes = [m.training for m in model.modules()]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    generator = torch.get_rng_state()
    OverfittingCheck(**CHECK)(model, *batch, epoch=1)
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(generator, torch.get_rng_state())


@pytest.mark.parametrize("seed", [0, 3, 2**63 - 1])
def test_noise_is_no_training_noise(seed, batch, monkeypatch):
    """Its seeds are negative; those of trainings, evaluations and losses are not."""
    seen = []

    def spy(x, y, pgd, seed, step, *told):
        seen.append((seed, step))
        return begin(x, y, pgd, seed, step, *told)

    begin = pgd_module.begin
    monkeypatch.setattr(pgd_module, "begin", spy)
    OverfittingCheck(**CHECK, seed=seed)(small_cnn(), *batch, epoch=7)
    assert seen == [(-1 - seed, 7)] * 2


@pytest.fixture(scope="module")
def learner(digits):
    """A model that has begun to resist, and the images it trained on."""
    model = small_cnn(width=16)
    optimizer, objective = sgd(model, 0.1), fgsm_rs(PGD(EPS))
    x, y = digits[0][:256], digits[1][:256]
    for step in range(30):
        optimizer.zero_grad()
        objective.loss(model, objective.examples(model, x, y, seed=0, step=step)).backward()
        optimizer.step()
    return model, x, y


@pytest.mark.slow
def test_readings_repeat_and_differ_by_seed_and_epoch(learner):
    def reading(seed, epoch):
        return OverfittingCheck(fgsm_rs(PGD(EPS)).pgd, PGD(EPS, 0.0, 10), seed)(*learner, epoch=epoch)

    assert reading(0, 1) == reading(0, 1)
    assert len({str(reading(0, epoch)) for epoch in range(1, 6)}) > 1
    assert len({str(reading(seed, 1)) for seed in range(5)}) > 1


def test_reading_counts_what_the_reference_counts(learner):
    """Its noise too. A pixel whose gradient is all but 0 may turn an image that is on the edge."""
    model, x, y = learner
    reading = OverfittingCheck(**CHECK, seed=5)(model, x, y, epoch=3)
    one_step = reference.fgsm_rs(model, x, y, eps=EPS, seed=~5, step=3)
    multi_step = method.start_point(x, EPS, "linf", ~5, 3)
    with method.evaluating(model):
        for _ in range(10):
            _, gradient = method.input_gradient(model, multi_step, y)
            multi_step = method.pgd_step(multi_step, x, gradient, EPS, EPS / 4, "linf")
        resist = [(~method.is_hard(model(x_adv), y)).sum().item() for x_adv in (one_step, multi_step)]
    assert (reading.one_step, reading.multi_step) == pytest.approx(resist, abs=2)
    assert reading.rows == 256
    assert 25 < reading.multi_step < reading.one_step < 250


def test_cost_is_24_forwards_of_at_most_256_rows():
    model = Counting(small_cnn())
    OverfittingCheck(**CHECK)(model, torch.rand(300, 1, 8, 8), torch.zeros(300, dtype=torch.int64), epoch=1)
    assert model.full_batch_forwards(256) == 2 + 1 + 2 * 10 + 1
    assert {rows for rows, _ in model.batches} == {256}
    assert not any(training for _, training in model.batches)


def test_reading_in_words():
    text = str(Reading(128, 110, 2))
    assert text == "85.9 % of 128 training images resist the one-step attack, 1.6 % resist PGD"


# ---------------------------------------------------------------- state
def test_state_is_plain_and_goes_on_as_if_never_left():
    sequence = [Reading(96, a, m) for a, m in ((60, 41), (70, 50), (50, 2), (80, 1), (90, 60), (91, 3))]
    for stop in range(len(sequence) + 1):
        whole, first, second = (OverfittingCheck(**CHECK) for _ in range(3))
        for epoch, reading in enumerate(sequence, 1):
            whole.add(reading, epoch)
            (first if epoch <= stop else second).add(reading, epoch)
            if epoch == stop:
                state = first.state_dict()
                assert json.loads(json.dumps(state)) == state
                second.load_state_dict(state)
        if stop < len(sequence):
            assert second.state_dict() == whole.state_dict()
    assert whole.overfitted_at == 3


def test_incomplete_state_is_refused_and_changes_nothing():
    check = OverfittingCheck(**CHECK)
    check.add(Reading(100, 50, 40), 1)
    before = check.state_dict()
    with pytest.raises(ValueError, match="state: lacks doubts, overfitted_at"):
        check.load_state_dict({"best": 0.1})
    assert check.state_dict() == before


# ---------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"epoch": 0}, ValueError, "epoch: got 0"),
        ({"epoch": 1.0}, TypeError, "epoch: got 1.0"),
        ({"precision": "fp8"}, ValueError, "precision: got 'fp8'"),
        ({"x": torch.rand(0, 1, 8, 8), "y": torch.zeros(0, dtype=torch.int64)}, ValueError, "x: got shape"),
        ({"x": torch.full((40, 1, 8, 8), 1.5)}, ValueError, "x: pixels run from"),
        ({"y": torch.full((40,), 10)}, ValueError, "y: labels run from"),
        ({"y": torch.zeros(40)}, TypeError, "y: got torch.float32"),
        ({"model": Broken(small_cnn(), lambda z: z * math.nan)}, ham.NonFiniteError, "model: returned NaN"),
    ],
)
def test_bad_input_is_named_and_leaves_no_trace(change, error, message, batch):
    check = OverfittingCheck(**CHECK)
    before = check.state_dict()
    with pytest.raises(error, match=message):
        check(**{"model": small_cnn(), "x": batch[0], "y": batch[1], "epoch": 1} | change)
    assert check.state_dict() == before


def test_bad_seed_is_named():
    with pytest.raises(ValueError, match="seed: got -1"):
        OverfittingCheck(**CHECK, seed=-1)


# ---------------------------------------------------------------- GPU
@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_collapse_is_found_on_a_gpu(precision):
    check = OverfittingCheck(CHECK["one_step"], PGD(EPS, EPS / 10, 10))
    batch = [t.cuda() for t in grey()]
    for epoch, depth in ((1, 0.0), (2, 1.0)):
        check(Valley(EPS, depth).cuda(), *batch, epoch=epoch, precision=precision)
    assert check.overfitted_at == 2
