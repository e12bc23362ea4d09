"""Several processes judge as one: each image once, and by AutoAttack as by any other attack."""

from __future__ import annotations

import pytest
from judging_nets import EPS, STEP_SIZE, digit_batches, robust_cnn
from rank_helpers import on_ranks
from torch import nn

import ham_kernels as ham
from ham_kernels.distributed import ranks_of
from ham_kernels.evaluation import autoattack, judge

pytestmark = pytest.mark.slow


def accuracies(model: nn.Module, world: int | None) -> dict:
    """Of all test images of the digits."""
    found = ham.evaluate(
        nn.parallel.DistributedDataParallel(model) if world is None else model, digit_batches(),
        ("clean", "pgd20", "cw20"), eps=EPS, step_size=STEP_SIZE, group="auto" if world is None else None,
    )  # fmt: skip
    return {name: (a.n, a.accuracy, a.per_class, a.no_gradient) for name, a in found.items()}


def flags(model: nn.Module, world: int | None) -> dict:
    """Of 40 images in batches of 8, under a tenth of AutoAttack's work."""
    x, y = digit_batches(40)[0]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("STEPS", 5), ("TARGETS", 2), ("QUERIES", 50)):
            patch.setattr(autoattack, name, value)
        found = judge(
            model, list(zip(x.split(8), y.split(8), strict=True)), ("clean", "autoattack"), classes=10, eps=EPS,
            step_size=STEP_SIZE, ranks=ranks_of(None if world == 1 else "auto"),
        )  # fmt: skip
    return {name: (a["correct"], a["answers"], a["per_class"], a["no_gradient"]) for name, a in found.items()}


def judged(rank: int, robust: nn.Module, world: int | None = None) -> dict:
    return {"accuracies": accuracies(robust, world), "flags": flags(robust, world)}


@pytest.fixture(scope="module")
def one(one_thread) -> dict:
    pytest.importorskip("pyautoattack")
    return judged(0, robust_cnn(), world=1)


@pytest.mark.parametrize("world", [2, 3])
def test_every_image_is_judged_once(one, world, tmp_path):
    assert on_ranks(world, judged, tmp_path, robust_cnn()) == [one] * world
    assert {n for n, *_ in one["accuracies"].values()} == {517}
    correct = one["flags"]["autoattack"][0]
    assert len(correct) == 40
    assert 0 < correct.count("1") < one["flags"]["clean"][0].count("1")
