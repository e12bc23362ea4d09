"""Flags: accuracies by hand, and bootstrap intervals against the binomial and against resampling image by image."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import binom

import ham_kernels as ham
from ham_kernels.evaluation import Interval, intervals
from ham_kernels.evaluation.class_accuracy import correct_rows, summary


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


def test_class_accuracy_by_position_as_before():
    made = ham.ClassAccuracy(0.5, (0.25, 0.75, math.nan), 0.25, 0.25, 8)
    assert made.nstd == 0.5
    assert made == ham.ClassAccuracy(0.5, made.per_class, 0.25, 0.25, 8)


def test_intervals_are_the_quantiles_of_the_binomial():
    """One class: its accuracy resampled is Binomial(n, p)/n, so are accuracy and worst class."""
    found = intervals(*flags((140, 200)), 1, resamples=40000)
    exact = binom.ppf([0.025, 0.975], 200, 0.7) / 200
    for interval in (found["accuracy"], found["worst_class"], found["per_class"][0]):
        assert interval.value == 0.7
        assert [interval.low, interval.high] == pytest.approx(exact, abs=0.0051)  # one image
    assert (found["std"].low, found["std"].high) == (0.0, 0.0)


def test_intervals_are_those_of_resampled_images(seed):
    correct, labels = flags((30, 40), (10, 25), (22, 30))
    found = intervals(correct, labels, 3, resamples=20000)
    rng, c, y = np.random.default_rng(seed), correct.numpy(), labels.numpy()
    parts = [c[y == k] for k in range(3)]
    per_class = np.stack([rng.choice(p, (20000, len(p))).mean(1) for p in parts], axis=1)
    direct = {
        "accuracy": per_class @ np.array([40, 25, 30]) / 95,
        "worst_class": per_class.min(1),
        "std": per_class.std(1),
        "nstd": per_class.std(1) / per_class.mean(1),
    }
    for name, values in direct.items():
        low, high = np.quantile(values, [0.025, 0.975])
        assert [found[name].low, found[name].high] == pytest.approx([low, high], abs=0.015), name
    for k in range(3):
        low, high = np.quantile(per_class[:, k], [0.025, 0.975])
        one = 1 / len(parts[k])
        assert [found["per_class"][k].low, found["per_class"][k].high] == pytest.approx([low, high], abs=1.01 * one)


def test_values_are_those_of_the_summary():
    correct, labels = torch.rand(300) < 0.6, torch.randint(0, 5, (300,))
    found, result = intervals(correct, labels, 6), summary(correct, labels, 6)
    for name in ("accuracy", "worst_class", "std", "nstd"):
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
    assert found["accuracy"] == Interval(0.0, 0.0, 0.0)
    assert all(math.isnan(v) for v in vars(found["nstd"]).values())


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
