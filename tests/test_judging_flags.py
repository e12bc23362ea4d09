"""Flags: accuracies by hand, and intervals by what they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import binom

import ham_kernels as ham
from ham_kernels.common.class_measures import gini, value_range, worst_mean
from ham_kernels.evaluation import Interval, intervals
from ham_kernels.evaluation.class_accuracy import answers, correct_rows, summary


def flags(*of_each: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(correct, images) of each class -> flags and labels in random order."""
    correct = torch.cat([torch.arange(n) < k for k, n in of_each])
    labels = torch.cat([torch.full((n,), c) for c, (_, n) in enumerate(of_each)])
    order = torch.randperm(len(labels))
    return correct[order], labels[order]


def test_summary_by_hand():
    result = summary(*flags((1, 4), (3, 4), (0, 0)), 3)
    assert result.accuracy == 0.5
    assert result.per_class[:2] == (0.25, 0.75)
    assert math.isnan(result.per_class[2])
    assert result.worst_class == 0.25
    assert (result.std, result.n) == (0.25, 8)
    assert result.nstd == 0.5  # std 0.25, mean over the classes 0.5
    assert result["nstd"] == result.nstd


def test_nstd_is_of_the_classes_and_needs_a_mean():
    """The mean over the classes, not over the images; and 0/0 where every image fails."""
    assert summary(*flags((10, 10), (0, 90)), 2).nstd == pytest.approx(0.5 / 0.5)
    assert math.isnan(summary(*flags((0, 3), (0, 3)), 2).nstd)


def test_measures_of_inequality_by_hand():
    """Gini of (0.2, 0.4, 0.6, 0.8): the pairs differ by 2 in all, twice; over 2 * 16 * 0.5."""
    uneven = [0.8, None, 0.2, 0.6, math.nan, 0.4]
    assert worst_mean(uneven) == pytest.approx(0.4)
    assert worst_mean(uneven, k=1) == 0.2
    assert worst_mean(uneven, k=9) == pytest.approx(0.5)
    assert value_range(uneven) == pytest.approx(0.6)
    assert gini(uneven) == pytest.approx(0.25)
    assert gini([0.0, 0.0, 0.0, 0.9]) == pytest.approx(1 - 1 / 4)
    assert (value_range([0.5] * 3), gini([0.5] * 3)) == (0, 0)
    assert math.isnan(gini([0.0, 0.0]))
    assert all(math.isnan(measure([None, math.nan])) for measure in (worst_mean, value_range, gini))


def test_gini_is_that_of_its_definition(seed):
    a = np.random.default_rng(seed).random(17)
    assert gini(a.tolist()) == pytest.approx(np.abs(a[:, None] - a).sum() / (2 * 17**2 * a.mean()))


def test_class_accuracy_by_position_as_before():
    made = ham.ClassAccuracy(0.5, (0.25, 0.75, math.nan), 0.25, 0.25, 8)
    assert made.nstd == 0.5
    assert made == ham.ClassAccuracy(0.5, made.per_class, 0.25, 0.25, 8)


def test_intervals_of_accuracies_are_exact():
    """Clopper and Pearson's: at its low end so many or more have a probability of 2.5 %, at its high end so few."""
    found = intervals(*flags((14, 20), (180, 200)), 2)
    for interval, k, n in ((found["accuracy"], 194, 220), *zip(found["per_class"], (14, 180), (20, 200), strict=True)):
        assert interval.value == k / n
        assert binom.sf(k - 1, n, interval.low) == pytest.approx(0.025)
        assert binom.cdf(k, n, interval.high) == pytest.approx(0.025)


@pytest.mark.parametrize("right", [0, 6])
def test_no_interval_of_few_images_has_no_width(right):
    found = intervals(*flags((right, 6), (right, 6)), 2)
    for interval in (*found["per_class"], found["worst_class"], found["accuracy"]):
        assert (interval.high if right else interval.low) == right / 6
        assert interval.high - interval.low > 0.2
    assert found["std"].high > 0.05


def test_the_true_worst_class_is_inside(seed):
    """Whichever class it is: any of nearly equal ones may be the smallest by chance."""
    rng = np.random.default_rng(seed)
    truth, n = np.array([0.4, *[0.45] * 8, 0.9]), np.array([30] * 5 + [60] * 5)
    held = 0
    for _ in range(300):
        found = intervals(*flags(*zip(rng.binomial(n, truth).tolist(), n.tolist(), strict=True)), 10, resamples=1)
        held += found["worst_class"].low <= 0.4 <= found["worst_class"].high
    assert held >= 0.88 * 300  # 95 % or more; 5 standard deviations below


@pytest.mark.parametrize(
    ("truth", "images"),
    [
        (np.full(10, 0.5), 50),  # alike: all that classes seem to differ by is counting
        (np.linspace(0.45, 0.6, 10), 50),
        (np.linspace(0.0, 0.6, 10), 50),
        (np.linspace(0.2, 0.75, 10), 1000),
        (np.linspace(0.2, 0.9, 100), 10),
        (np.array([0.2, 0.5, 0.8]), 100),
    ],
)
def test_the_true_spread_over_classes_is_inside(truth, images, seed):
    rng, held = np.random.default_rng(seed), {}
    mean = truth.mean()
    true = {"std": truth.std(), "nstd": truth.std() / mean, "range": np.ptp(truth), "worst3": np.sort(truth)[:3].mean()}
    true["gini"] = np.abs(truth[:, None] - truth).mean() / mean / 2
    for _ in range(100):
        right = rng.binomial(images, truth).tolist()
        found = intervals(*flags(*((k, images) for k in right)), len(truth), resamples=500)
        for name, value in true.items():
            interval = found[name]
            if math.isnan(interval.low):
                assert (name in ("range", "worst3"), len(truth)) == (True, 100)  # of the luckiest
                continue
            assert interval.low <= interval.value <= interval.high
            held[name] = held.get(name, 0) + (interval.low - 1e-12 <= value <= interval.high + 1e-12)
    assert min(held.values()) >= 75, held  # 90 to 100 in simulations of many more; 5 standard deviations below


def test_with_many_images_the_spread_is_as_drawn(seed):
    rng = np.random.default_rng(seed)
    found = intervals(*flags((300, 400), (100, 250)), 2, resamples=20000)
    drawn = np.stack([rng.beta(300.5, 100.5, 20000), rng.beta(100.5, 150.5, 20000)], axis=1)
    expected = {
        "std": drawn.std(1), "nstd": drawn.std(1) / drawn.mean(1), "worst3": drawn.mean(1), "range": np.ptp(drawn, 1),
        "gini": np.ptp(drawn, 1) / drawn.mean(1) / 4,
    }  # fmt: skip
    for name, values in expected.items():
        assert [found[name].low, found[name].high] == pytest.approx(np.quantile(values, [0.025, 0.975]), abs=0.01)
        assert found[name].low < found[name].value < found[name].high


def test_values_are_those_of_the_summary():
    correct, labels = torch.rand(300) < 0.6, torch.randint(0, 5, (300,))
    found, result = intervals(correct, labels, 6), summary(correct, labels, 6)
    for name in ("accuracy", "worst_class", "std", "nstd", "worst3", "range", "gini"):
        assert found[name].value == pytest.approx(result[name])
    assert [i.value for i in found["per_class"][:5]] == pytest.approx(list(result.per_class[:5]))


def test_class_without_images_is_nan_and_never_the_worst():
    found = intervals(*flags((3, 6), (0, 0), (5, 6)), 3)
    assert all(math.isnan(v) for v in vars(found["per_class"][1]).values())
    assert found["worst_class"].value == 0.5
    assert found["worst_class"].low <= 0.5 < found["worst_class"].high
    assert found["per_class"][1].as_json() == {"value": None, "low": None, "high": None}


def test_all_wrong():
    found = intervals([0, 0, 0, 0], [0, 0, 1, 1], 2)
    assert found["accuracy"] == Interval(0.0, 0.0, pytest.approx(1 - 0.025**0.25))
    assert all(math.isnan(v) for name in ("nstd", "gini") for v in vars(found[name]).values())
    assert found["worst3"].value == 0


def test_same_seed_same_intervals_and_a_wider_level_is_wider():
    correct, labels = flags((30, 60), (50, 60))
    first = intervals(correct, labels, 2)
    assert first == intervals(correct.tolist(), labels.numpy(), 2)
    assert first != intervals(correct, labels, 2, seed=1)
    wide = intervals(correct, labels, 2, level=0.99)["accuracy"]
    assert wide.low < first["accuracy"].low
    assert wide.high > first["accuracy"].high


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"correct": []}, ValueError, "correct: got shape"),
        ({"correct": [1, 0]}, ValueError, "correct: got shape"),
        ({"correct": [1, 0, 2]}, ValueError, "correct: holds something besides 0 and 1"),
        ({"correct": "110"}, TypeError, "correct: got a str"),
        ({"labels": [0, 1, 2]}, ValueError, "labels: run from 0 to 2"),
        ({"labels": [0.0, 1.0, 0.5]}, TypeError, "labels: got float64"),
        ({"classes": 0}, ValueError, "classes: got 0"),
        ({"level": 1.5}, ValueError, "level: got 1.5"),
        ({"resamples": 0}, ValueError, "resamples: got 0"),
    ],
)
def test_bad_flags(change, error, message):
    with pytest.raises(error, match=message):
        intervals(**({"correct": [1, 0, 1], "labels": [0, 1, 1], "classes": 2} | change))


def test_a_tie_is_lost_whichever_class_is_first():
    """argmax would give it to the lower number: in bf16, where ties are common, low classes would look robust."""
    z = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [2.0, 1.0, 0.0], [0.0, 1.0, 2.0]], dtype=torch.bfloat16)
    assert correct_rows(z, torch.tensor([0, 1, 0, 2])).tolist() == [False, False, True, True]


def test_the_answer_is_the_label_exactly_where_a_row_is_correct():
    """A tie is lost, and its answer is the other class, whichever comes first."""
    z = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [2.0, 1.0, 0.0], [0.0, 1.0, 2.0]], dtype=torch.bfloat16)
    y = torch.tensor([0, 1, 0, 1])
    assert answers(z, y, correct_rows(z, y)).tolist() == [1, 0, 0, 2]
