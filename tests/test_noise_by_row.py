"""Noise is named by the row in the global batch: slices of it, put together, are the whole bit for bit."""

from __future__ import annotations

import importlib

import pytest
import torch
from helpers import DTYPES, every_pair, in_layout, per_row
from nets import small_cnn

from ham_kernels import engine, ops
from ham_kernels.attack.pgd import PGD, Attack
from ham_kernels.ops._philox import ROWS, philox_uniform
from ham_kernels.ops.random_start import random_start_reference

start = importlib.import_module("ham_kernels.ops.random_start")  # the package has the op by this name
pytestmark = pytest.mark.usefixtures("poisoned_memory")

NORMS = ("linf", "l2")
PARTS = (1, 2, 3, 4, 8)
SHAPES = [  # fewer rows than parts: some are empty
    (5, 1, 1, 1),
    (5, 3, 9, 7),
    (4, 3, 19, 20),  # two blocks of an L2 row
    (2, 1, 1, 4099),  # two blocks of an L-inf row, of a length that no vector divides
]
LARGE = [(33, 1, 3, 3), (65, 3, 7, 5), (17, 3, 32, 32), (3, 3, 112, 112)]  # rows end inside a vector, and a row alone


def slices(n: int, parts: int) -> list[slice]:
    """`parts` neighbours of random sizes, 0 among them."""
    ends = [0, *sorted(torch.randint(0, n + 1, (parts - 1,)).tolist()), n]
    return [slice(ends[i], ends[i + 1]) for i in range(parts)]


def even_slices(n: int, parts: int) -> list[slice]:
    """As a batch is shared among processes: the last parts are a row shorter, or empty."""
    sizes = [len(part) for part in torch.arange(n).tensor_split(parts)]
    return [slice(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(parts)]


def check_slices(run, x, eps, *cuts, first_row=0):
    """`run(x, eps, first_row)` on the whole batch, and on its slices by each of the cuts."""
    whole = run(x, eps, first_row)
    for cut in cuts:
        parts = [run(x[s], eps[s] if isinstance(eps, torch.Tensor) else eps, first_row + s.start) for s in cut]
        together = torch.cat(parts)
        assert together.dtype == x.dtype
        assert torch.equal(together, whole), f"cut into {[(s.start, s.stop) for s in cut]}"


def batch_and_radius(shape, dtype, layout, radius, norm, device="cpu"):
    x = in_layout(torch.rand(shape).to(dtype), layout).to(device)
    eps = 0.1 if norm == "linf" else 1.0
    return x, eps if radius == "number" else torch.rand(shape[0], device=device) * eps


CHOICES = (NORMS, DTYPES, ("contiguous", "channels_last"), ("number", "per row"))


# ---------------------------------------------------------------- random_start
@pytest.mark.parametrize(("shape", "norm", "dtype", "layout", "radius"), every_pair(SHAPES + LARGE, *CHOICES), ids=str)
def test_reference(shape, norm, dtype, layout, radius, seed):
    x, eps = batch_and_radius(shape, dtype, layout, radius, norm)

    def run(x, eps, first_row):
        return random_start_reference(x, *per_row(eps), seed, 3, 0.0, 1.0, norm == "l2", first_row)

    check_slices(run, x, eps, *(how(len(x), parts) for how in (slices, even_slices) for parts in PARTS))


@pytest.mark.parametrize(("shape", "norm", "dtype", "layout", "radius"), every_pair(SHAPES, *CHOICES), ids=str)
def test_kernel(shape, norm, dtype, layout, radius, device, seed):
    pytest.importorskip("triton")
    x, eps = batch_and_radius(shape, dtype, layout, radius, norm, device)

    def run(x, eps, first_row):
        return start.random_start_launch(x, *per_row(eps), seed, 3, 0.0, 1.0, norm == "l2", first_row)

    cuts = (even_slices(len(x), parts) if parts == 8 else slices(len(x), parts) for parts in PARTS)
    check_slices(run, x, eps, *cuts)


@pytest.mark.parametrize("norm", NORMS)
def test_op(norm, device, seed):
    x = torch.rand(12, 3, 8, 8, device=device)

    def run(x, eps, first_row):
        return ops.random_start(x, eps, seed=seed, step=1, norm=norm, first_row=first_row)

    check_slices(run, x, 0.1, *(slices(12, parts) for parts in PARTS))
    assert torch.equal(run(x, 0.1, 0), ops.random_start(x, 0.1, seed=seed, step=1, norm=norm))
    for at in (5, 1000, 2**31 - 13):  # itself a slice of a larger batch, the last time as far back as one can be
        check_slices(run, x, 0.1, slices(12, 3), first_row=at)
    assert not torch.equal(run(x, 0.1, 0), run(x, 0.1, 1))


def test_the_radius_knows_no_neighbours(seed):
    """The radius is a power u^(1/3); torch rounds one in eight of them otherwise at the end of a tensor."""

    def run(x, eps, first_row):
        return ops.random_start(x, eps, seed=seed, lo=-1.0, norm="l2", first_row=first_row)

    check_slices(run, torch.zeros(65, 3), 1.0, *(even_slices(65, parts) for parts in (2, 4, 8, 65)))


def test_with_two_threads(two_threads, seed):
    """A tensor is then divided among them at a place that depends on its size."""
    x = torch.rand(19, 3, 48, 48)
    check_slices(
        lambda x, eps, first_row: ops.random_start(x, eps, seed=seed, norm="l2", first_row=first_row),
        x, 0.5, slices(19, 4),
    )  # fmt: skip


@pytest.mark.parametrize("norm", NORMS)
def test_kernel_is_reference_in_a_slice(norm, device, seed):
    pytest.importorskip("triton")
    x, numbers = torch.rand(5, 3, 9, 7), (seed, 3, 0.0, 1.0, norm == "l2")
    for first_row in (1, 4096, 2**31 - 2):  # the last rows of the last are beyond 2**31
        by_kernel = start.random_start_launch(x.to(device), 0.1, None, *numbers, first_row).cpu()
        expected = random_start_reference(x, 0.1, None, *numbers, first_row)
        torch.testing.assert_close(by_kernel, expected, rtol=0, atol=0 if norm == "linf" else 4e-6)


def test_uniform_numbers_of_a_slice(seed):
    whole = philox_uniform(9, 4, seed, 2, ROWS, "cpu")
    for rows in slices(9, 4):
        part = philox_uniform(rows.stop - rows.start, 4, seed, 2, ROWS, "cpu", rows.start)
        assert all(torch.equal(a, b[rows]) for a, b in zip(part, whole, strict=True))


@pytest.mark.parametrize(
    ("first_row", "error"), [(-1, ValueError), (2**31, ValueError), (1.5, TypeError), (True, TypeError)]
)
def test_bad_first_row(first_row, error):
    x, y = torch.rand(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(error, match=f"^first_row: got {first_row}"):
        ops.random_start(x, 0.1, seed=1, first_row=first_row)
    with pytest.raises(error, match=f"^first_row: got {first_row}"):
        Attack(small_cnn().eval(), x, y, PGD(0.1, 0.02, 1), seed=1, step=0, first_row=first_row)


# ---------------------------------------------------------------- attack
def attacked(model, x, y, pgd, rows, **more):
    with engine.attack_mode(model):
        attack = Attack(model, x[rows], y[rows], pgd, seed=5, step=2, **more)
        begun = attack.rows.x_adv.clone()
        attack.steps(pgd.steps)
    return begun, attack.rows.x_adv


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("parts", [2, 3, 4])
def test_attack_on_slices(norm, parts, seed):
    model, x, y = small_cnn(seed), torch.rand(22, 1, 8, 8), torch.randint(0, 10, (22,))
    pgd = PGD(0.2, 0.05, 4) if norm == "linf" else PGD(1.0, 0.25, 4, norm)
    whole = attacked(model, x, y, pgd, slice(None))
    cuts = even_slices(22, parts)
    begun, ended = zip(*[attacked(model, x, y, pgd, rows, first_row=rows.start) for rows in cuts], strict=True)
    assert torch.equal(torch.cat(begun), whole[0])
    # A convolution may add in another order for another number of rows; where a pixel's gradient is all but 0 its sign
    # may then differ.
    assert ((torch.cat(ended) - whole[1]).abs() > 1e-5).float().mean() < 0.01


def test_attack_on_some_rows_of_a_slice():
    model, x, y = small_cnn(), torch.rand(9, 1, 8, 8), torch.randint(0, 10, (9,))
    pgd, only = PGD(0.2, 0.05, 0, start_eps=0.3), torch.tensor([3, 1])
    whole, _ = attacked(model, x, y, pgd, slice(None))
    begun, _ = attacked(model, x, y, pgd, slice(4, 9), only=only, first_row=4)
    assert torch.equal(begun, whole[4 + only])
