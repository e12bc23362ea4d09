"""Several processes judge as one: each image once, and by AutoAttack as by any other attack."""

from __future__ import annotations

import pytest
from judging_nets import EPS, STEP_SIZE, digit_batches, robust_cnn
from rank_helpers import on_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import ham_kernels as ham
from ham_kernels import data
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
    by_torch = DataLoader(TensorDataset(*digit_batches(40)[0]), 8)
    (clean,) = ham.evaluate(robust, by_torch, ("clean",), eps=EPS, group=None if world == 1 else "auto").values()
    return {
        "accuracies": accuracies(robust, world),
        "flags": flags(robust, world),
        "a loader of torch": (clean.n, clean.accuracy, clean.per_class),
    }


@pytest.fixture(scope="module")
def one(one_thread) -> dict:
    pytest.importorskip("pyautoattack")
    return judged(0, robust_cnn(), world=1)


@pytest.mark.parametrize("world", [2, 3])
def test_every_image_is_judged_once(one, world, tmp_path):
    assert on_ranks(world, judged, tmp_path, robust_cnn()) == [one] * world
    assert {n for n, *_ in one["accuracies"].values()} == {517}
    assert one["a loader of torch"][0] == 40
    correct = one["flags"]["autoattack"][0]
    assert len(correct) == 40
    assert 0 < correct.count("1") < one["flags"]["clean"][0].count("1")


# ---------------------------------------------------------------- loaders that cannot be shared out
def gives_bad_batch(rank: int):
    """Its second batch is process 1's."""
    x, y = digit_batches(16)[0]
    yield x[:8], y[:8]
    yield x[8:] + rank, y[8:]


def refused(rank: int) -> dict[str, list[str]]:
    """What `ham.evaluate` and `judge` raise on this process."""
    x, y = digit_batches(16)[0]
    bytes_, images = (x * 255).byte(), TensorDataset(x, y)
    loaders = {
        "of a rank": lambda: data.Batches(bytes_, y, 4, shuffle=False, rank=rank, world=2),
        "with a sampler": lambda: DataLoader(images, 4, sampler=DistributedSampler(images, 2, rank, shuffle=False)),
        "shuffled": lambda: DataLoader(images, 4, shuffle=True),
        "unlike": lambda: [(x, y)] * (2 if rank else 5),
        "none": list,
        "bad batch": lambda: gives_bad_batch(rank),
    }
    model, how, said = robust_cnn(), {"eps": EPS, "step_size": STEP_SIZE}, {}
    for name, loader in loaders.items():
        said[name] = []
        for call in (
            lambda given: ham.evaluate(model, given, ("pgd2",), **how),
            lambda given: judge(model, given, ("pgd2",), classes=10, ranks=ranks_of(), **how),
        ):
            with pytest.raises(ValueError, match=r"\w") as error:
                call(loader())
            said[name].append(str(error.value))
    fully_shard(model := robust_cnn(), mesh=init_device_mesh("cpu", (2,)))
    with pytest.raises(ValueError, match="group: FSDP gathers weights in each forward"):
        ham.evaluate(model, [(x, y)], ("clean",))
    (found,) = ham.evaluate(model, [(x, y)], ("clean",), group=None).values()
    assert found.n == 16
    return said


def test_loaders_that_cannot_be_shared_out(tmp_path):
    both = on_ranks(2, refused, tmp_path)
    for said in both:
        for name in ("of a rank", "with a sampler"):
            assert all("each must be able to get all of them" in words for words in said[name]), name
        assert all("all must get the same batches (shuffle=False)" in words for words in said["shuffled"])
        assert all("it must give the same on each" in words for words in said["unlike"])
    first, second = both
    assert all("gave no batch" in words for words in first["none"])
    assert all("process 0 failed" in words for words in second["none"])
    assert all("process 1 failed" in words for words in first["bad batch"])
    assert all("pixels run from" in words for words in second["bad batch"])
