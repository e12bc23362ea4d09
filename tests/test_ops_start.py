"""Random start: the generator against published vectors, the kernel against the reference, the statistics."""

from __future__ import annotations

import importlib

import pytest
import torch
from helpers import DTYPES, LAYOUTS, assert_same_bits, every_pair, in_layout, per_row
from hypothesis import given
from hypothesis import strategies as st

from ham_kernels import ops
from ham_kernels.ops._philox import philox_uniform
from ham_kernels.ops.random_start import random_start_reference

pytest.importorskip("triton")
import triton

start = importlib.import_module("ham_kernels.ops.random_start")  # the package has the op by this name
pytestmark = pytest.mark.usefixtures("poisoned_memory")

SHAPES = [
    (0, 3, 8, 8),  # no rows
    (1, 1, 1, 1),  # one pixel: three of its four numbers go unused
    (31, 1, 3, 3),  # 9 pixels: quarters of 3, 3, 3 and 0
    (3, 3, 7, 5),  # 105 pixels: quarters of 27, the last short
    (2, 1, 1, 4095),  # a block of 1024 counters less one pixel, exactly, and one more
    (2, 1, 1, 4096),
    (2, 1, 1, 4097),
    (4, 3, 32, 32),
    (1, 3, 96, 96),  # many blocks; in L2 a large row
]
# L2: logarithm, cosine and the sum of squares differ in their last bits between libraries, by some 1e-6 of a
# noise below 0.5, and a number near 0 under the logarithm is known to about 1e-4 of its (tiny) self; then one
# rounding.
L2_TOLERANCE = {torch.float32: 4e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def start_both(x, device, *, eps=0.1, seed=1, step=0, norm="linf", layout="contiguous"):
    eps, eps_rows = per_row(eps)
    numbers = (seed, step, 0.0, 1.0, norm == "l2")
    x_there = in_layout(x.to(device), layout)
    rows_there = None if eps_rows is None else eps_rows.to(device)
    by_kernel = start.random_start_launch(x_there, eps, rows_there, *numbers)
    assert_same_bits(x_there, x)
    assert by_kernel.stride() == torch.empty_like(x_there).stride()
    return by_kernel, random_start_reference(x, eps, eps_rows, *numbers)


def check(by_kernel, by_reference, norm):
    if norm == "linf":
        assert_same_bits(by_kernel, by_reference)
    else:
        tolerance = L2_TOLERANCE[by_reference.dtype]
        torch.testing.assert_close(by_kernel.cpu(), by_reference, rtol=0, atol=tolerance, check_stride=False)


# ---------------------------------------------------------------- the generator
def philox_4x32_10(counter, key):
    """Philox as published (Salmon et al., SC 2011), in Python integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & 0xFFFFFFFF, (a >> 32) ^ c3 ^ k1, a & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


KNOWN_ANSWERS = [  # of Random123, file kat_vectors
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_as_published(counter, key, answer):
    counter, key, answer = ([int(word, 16) for word in text.split()] for text in (counter, key, answer))
    assert list(philox_4x32_10(counter, key)) == answer


def test_the_first_known_answer():
    planes = philox_uniform(1, 1, 0, 0, 0, "cpu")
    assert [int(p.item() * 2**24) for p in planes] == [0x6627E8, 0xE169C5, 0xBC57AC, 0x9B00DB]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**31, 2**40 + 5, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize(("step", "first_row"), [(0, 0), (2**31 - 1, 0), (1, 2**31 - 2)])
def test_the_numbers_are_philox(seed, step, first_row, device):
    numel, rows, stream = 4 * 6, 3, start.START
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    expected = [
        [philox_4x32_10((c, row, step, stream), key)[lane] >> 8 for lane in range(4) for c in range(numel // 4)]
        for row in range(first_row, first_row + rows)
    ]
    expected = torch.tensor(expected) / 2.0**24
    by_torch = philox_uniform(rows, numel // 4, seed, step, stream, "cpu", first_row)
    assert torch.equal(torch.cat(by_torch, 1), expected)
    half = torch.full((rows, numel), 0.5, device=device)
    by_kernel = start.random_start_launch(half, 0.5, None, seed, step, 0.0, 1.0, False, first_row)
    assert torch.equal(by_kernel.cpu(), 0.5 + (2 * expected - 1) * 0.5)


@pytest.mark.parametrize("block", [16, 64, 256, 1024])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_any_block_size_gives_the_same_numbers(norm, block, device):
    x = torch.rand(3, 3, 16, 13, device=device)
    numel, quarter, out = 624, 156, torch.empty_like(x)
    grid, kernel = (3, triton.cdiv(quarter, block)), start._random_start_linf_kernel
    if norm == "l2":
        grid, kernel = (3,), start._random_start_l2_kernel
    kernel[grid](
        out, x, None, numel, numel, numel, quarter, 1, numel, 0.25, 7, 9, 0.0, 1.0, 0, EPS_ROWS=False,
        CHANNELS_LAST=False, BLOCK_SIZE=block, enable_fp_fusion=False,
    )  # fmt: skip
    check(out, random_start_reference(x.cpu(), 0.25, None, 7, 9, 0.0, 1.0, norm == "l2"), norm)


# ---------------------------------------------------------------- kernel and reference
@pytest.mark.parametrize(("shape", "norm", "dtype"), every_pair(SHAPES, ("linf", "l2"), DTYPES), ids=str)
def test_kernel_is_reference(shape, norm, dtype, device, seed):
    eps = 0.1 if norm == "linf" else 1.0
    for radius in (eps, torch.rand(shape[0]) * eps):
        check(*start_both(torch.rand(shape).to(dtype), device, eps=radius, seed=seed, step=3, norm=norm), norm)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_picture_in_any_layout(layout, norm, device, seed):
    check(*start_both(torch.rand(5, 3, 9, 7), device, seed=seed, norm=norm, layout=layout), norm)


@given(data=st.data())
def test_any_start(device, data):
    draw = data.draw
    seed = draw(st.integers(-(2**63), 2**63 - 1), "seed")
    torch.manual_seed(seed % 2**31)
    shape = draw(st.tuples(st.integers(0, 4), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)))
    norm, layout = draw(st.sampled_from(["linf", "l2"])), draw(st.sampled_from(LAYOUTS))
    # between, noise can be subnormal, which Triton's interpreter rounds wrongly to bf16
    some = st.just(0.0) | st.floats(2.0**-90, 1, width=32)
    eps = torch.rand(shape[0]) if draw(st.booleans()) else draw(some)
    x = torch.rand(shape).to(draw(st.sampled_from(DTYPES)))
    step = draw(st.integers(0, 2**31 - 1))
    check(*start_both(x, device, eps=eps, seed=seed, step=step, norm=norm, layout=layout), norm)


# ---------------------------------------------------------------- what users rely on
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_row_does_not_know_its_batch(norm, seed, device):
    x = torch.rand(9, 3, 8, 8, device=device)
    whole = ops.random_start(x, 0.1, seed=seed, norm=norm)
    assert torch.equal(ops.random_start(x[:4], 0.1, seed=seed, norm=norm), whole[:4])


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_seed_and_step_name_the_noise(norm, seed, device):
    x = torch.full((4, 3, 8, 8), 0.5, device=device)

    def noise(**kwargs):
        return ops.random_start(x, 0.1, norm=norm, **kwargs)

    first = noise(seed=seed, step=1)
    assert torch.equal(first, noise(seed=seed, step=1))
    for other in (noise(seed=seed, step=2), noise(seed=seed + 1, step=1), noise(seed=seed + 2**32, step=1)):
        assert (other == first).float().mean() < 0.05
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_inside_ball_and_range(norm, seed, device):
    x = torch.rand(64, 3, 8, 8, device=device)
    eps = torch.linspace(0, 2, 64, device=device)
    moved = ops.random_start(x, eps, seed=seed, norm=norm, lo=0.1, hi=0.9)
    assert moved.min() >= 0.1 - 1e-7
    assert moved.max() <= 0.9 + 1e-7
    inside = x.clamp(0.1, 0.9)  # clipping cannot take a point further away from a valid image
    delta = (ops.random_start(inside, eps, seed=seed, norm=norm, lo=0.1, hi=0.9) - inside).flatten(1)
    size = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    assert (size <= eps + 1e-6).all()
    assert torch.equal(ops.random_start(x, 0.0, seed=seed, norm=norm), x)


def test_linf_noise_is_uniform(seed, device):
    n, d = 64, 4096
    noise = ops.random_start(torch.zeros(n, d, device=device), 0.5, seed=seed, lo=-1.0).double().cpu()
    counts = torch.histc(noise, 64, -0.5, 0.5)
    expected = n * d / 64
    chi_squared = ((counts - expected) ** 2 / expected).sum()  # mean 63, deviation sqrt(126)
    assert counts.sum() == n * d
    assert abs(chi_squared - 63) < 7 * 126**0.5
    sigma = (1 / 12) ** 0.5
    assert abs(noise.mean()) < 6 * sigma / (n * d) ** 0.5
    assert noise.mean(0).abs().max() < 6 * sigma / n**0.5  # each pixel
    rho = (noise[:, 1:] * noise[:, :-1]).mean() / sigma**2  # neighbours are not related
    assert abs(rho) < 6 / (n * d) ** 0.5


@pytest.mark.parametrize("d", [1, 2, 3, 48])
def test_l2_noise_is_uniform_in_the_ball(d, seed, device):
    n = 20_000
    noise = ops.random_start(torch.zeros(n, d, device=device), 0.5, seed=seed, lo=-1.0, norm="l2").double().cpu()
    mass = (noise.norm(dim=1) / 0.5) ** d  # share of the ball within this radius: uniform in [0, 1]
    steps = torch.linspace(0, 1, n, dtype=torch.float64)
    assert (mass.sort().values - steps).abs().max() < 2.6 / n**0.5  # Kolmogorov-Smirnov, p = 3e-6
    assert (noise.mean(0).abs() < 6 * 0.5 / (d + 2) ** 0.5 / n**0.5).all()  # variance of a coordinate: r²/(d+2)
    second = (noise.T @ noise) / n * (d + 2) / 0.25  # identity matrix: no direction is preferred
    assert (second - torch.eye(d)).abs().max() < 12 / n**0.5


def test_nothing_is_differentiated(device):
    x = torch.rand(2, 3, 8, 8, device=device, requires_grad=True)
    moved = ops.random_start(x, 0.1, seed=1)
    assert not moved.requires_grad
    assert moved.dtype == x.dtype


X = torch.rand(4, 3, 8, 8)
BAD = [
    ({"x": [0.5]}, TypeError, r"x: got \[0.5\]"),
    ({"x": X.double()}, TypeError, "x: got torch.float64"),
    ({"x": X[0, 0, 0]}, ValueError, r"x: got shape \(8,\)"),
    ({"eps": -1}, ValueError, "eps: got -1.0"),
    ({"eps": torch.rand(4, 1)}, ValueError, r"eps: got a tensor of shape \(4, 1\)"),
    ({"seed": 1.5}, TypeError, "seed: got 1.5"),
    ({"seed": 2**63}, ValueError, "seed: got 9223372036854775808"),
    ({"step": -1}, ValueError, "step: got -1"),
    ({"step": 2**31}, ValueError, "step: got 2147483648"),
    ({"norm": None}, ValueError, "norm: got None"),
    ({"lo": "0"}, TypeError, "lo: got '0'"),
    ({"lo": 0.5, "hi": 0.25}, ValueError, "lo: got 0.5 with hi=0.25"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=lambda v: v if isinstance(v, str) else None)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=f"^{message}"):
        ops.random_start(**{"x": X, "eps": 0.1, "seed": 1, **change})
