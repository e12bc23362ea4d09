"""Random start of an attack, uniform in the eps-ball, from a counter-based generator."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..common import checks
from ._layout import as_layout, row_layout
from ._library import jit, on_device_of, register, tl, triton
from ._philox import RADIUS, START, philox_uniform, uniform4
from .l2 import ratio, row_ratio


def random_start_reference(
    x: Tensor, eps: float, eps_rows: Tensor | None, seed: int, step: int, lo: float, hi: float, l2: bool,
    first_row: int = 0,
) -> Tensor:  # fmt: skip
    """clip(x + d) with d uniform in the eps-ball of the norm: a cube for L-inf, a ball for L2.

    A row has the same bits in any batch and slice of one: every operation here treats each number by itself.
    """
    n, numel = x.shape[0], math.prod(x.shape[1:])
    radius = eps if eps_rows is None else eps_rows[:, None]
    planes = philox_uniform(n, (numel + 3) // 4, seed, step, START, x.device, first_row)
    if l2:
        a, b, c, d = planes
        planes = (*_normal_pair(a, b), *_normal_pair(c, d))
        direction = torch.cat(planes, dim=1)[:, :numel]
        u = philox_uniform(n, 1, seed, step, RADIUS, x.device, first_row)[0]
        # no power: torch's rounds the last numbers of a tensor by another routine than those before them
        shrink = torch.exp(torch.log(u.double()) / max(numel, 1)).float()
        noise = direction * ratio(shrink * radius, _length(direction))
    else:
        noise = (2.0 * torch.cat(planes, dim=1)[:, :numel] - 1.0) * radius
    return torch.empty_like(x).copy_((x.float() + noise.view(x.shape)).clamp_(lo, hi))


def _length(normal: Tensor) -> Tensor:
    """(n, 1), |normal| of each row rounded once, which is 0, or from 1e-12 to 1e6.

    The squares are added half to half: the order of torch's own sum may depend on the number of rows.
    """
    total = normal.double().square_()
    while total.shape[1] > 1:
        half = total.shape[1] // 2
        odd = total[:, 2 * half :]  # none or one
        total = torch.cat((total[:, :half] + total[:, half : 2 * half], odd), dim=1)
    return total.sum(1, keepdim=True).sqrt_().float()  # of one number, or of none


def _normal_pair(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    r = torch.sqrt(-2.0 * torch.log(1.0 - u))  # 1 - u is in (0, 1], so the logarithm is finite
    return r * torch.cos(2.0 * math.pi * v), r * torch.sin(2.0 * math.pi * v)


@jit
def _normal4(seed, c0, row, step):
    a, b, c, d = uniform4(seed, c0, row, step, 0)
    r, s = tl.sqrt(-2.0 * tl.log(1.0 - a)), tl.sqrt(-2.0 * tl.log(1.0 - c))
    t, u = 6.283185307179586 * b, 6.283185307179586 * d
    return r * tl.cos(t), r * tl.sin(t), s * tl.cos(u), s * tl.sin(u)


@jit
def _start_lane(out_ptr, x_ptr, noise, element, mask, channels, area, lo, hi, CHANNELS_LAST: tl.constexpr):
    # `element` counts in C,H,W order, so that a row's noise is the same picture in either memory format
    if CHANNELS_LAST:
        offset = (element % area) * channels + element // area
    else:
        offset = element
    x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    value = tl.minimum(tl.maximum(x + noise, lo), hi)
    tl.store(out_ptr + offset, value.to(out_ptr.dtype.element_ty), mask=mask)


@jit(do_not_specialize=["seed", "step", "first_row"])
def _random_start_linf_kernel(
    out_ptr, x_ptr, eps_ptr, out_row_stride, x_row_stride, numel, quarter, channels, area,
    eps, seed, step, lo, hi, first_row, EPS_ROWS: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Program (row, block): BLOCK_SIZE Philox counters, each giving one element in each quarter of the row."""
    row = tl.program_id(0)
    c0 = tl.program_id(1) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    radius = tl.load(eps_ptr + row) if EPS_ROWS else eps
    out_ptr += row.to(tl.int64) * out_row_stride
    x_ptr += row.to(tl.int64) * x_row_stride
    u = uniform4(seed, c0, first_row + row, step, 0)  # 32 bits; beyond 2**31 the sum wraps to the same bits
    for lane in tl.static_range(4):
        element = c0 + lane * quarter
        mask = (c0 < quarter) & (element < numel)  # two comparisons that the compiler sees through: wide accesses
        noise = (2.0 * u[lane] - 1.0) * radius
        _start_lane(out_ptr, x_ptr, noise, element, mask, channels, area, lo, hi, CHANNELS_LAST)


@jit(do_not_specialize=["seed", "step", "first_row"])
def _random_start_l2_kernel(
    out_ptr, x_ptr, eps_ptr, out_row_stride, x_row_stride, numel, quarter, channels, area,
    eps, seed, step, lo, hi, first_row, EPS_ROWS: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Program row: the length of its Gaussian first, then the same Gaussian again, scaled into the ball."""
    row = tl.program_id(0)
    radius = tl.load(eps_ptr + row) if EPS_ROWS else eps
    out_ptr += row.to(tl.int64) * out_row_stride
    x_ptr += row.to(tl.int64) * x_row_stride
    total = tl.zeros([BLOCK_SIZE], tl.float32)
    for start in range(0, quarter, BLOCK_SIZE):
        c0 = start + tl.arange(0, BLOCK_SIZE)
        g = _normal4(seed, c0, first_row + row, step)
        for lane in tl.static_range(4):
            mask = (c0 < quarter) & (c0 + lane * quarter < numel)
            total += tl.where(mask, g[lane] * g[lane], 0.0)
    zero = tl.zeros([1], tl.int32)
    u, _, _, _ = uniform4(seed, zero, first_row + row, step, 1)
    shrink = tl.exp(tl.log(tl.sum(u)) / numel)
    scale = row_ratio(shrink * radius, tl.sqrt(tl.sum(total)))
    for start in range(0, quarter, BLOCK_SIZE):
        c0 = start + tl.arange(0, BLOCK_SIZE)
        g = _normal4(seed, c0, first_row + row, step)
        for lane in tl.static_range(4):
            element = c0 + lane * quarter
            mask = (c0 < quarter) & (element < numel)
            _start_lane(out_ptr, x_ptr, g[lane] * scale, element, mask, channels, area, lo, hi, CHANNELS_LAST)


def random_start_launch(
    x: Tensor, eps: float, eps_rows: Tensor | None, seed: int, step: int, lo: float, hi: float, l2: bool,
    first_row: int = 0,
) -> Tensor:  # fmt: skip
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    layout = row_layout(out) or "contiguous"
    source, target = as_layout(x, layout), as_layout(out, layout)
    numel = math.prod(x.shape[1:])
    quarter = (numel + 3) // 4
    channels = x.shape[1] if layout == "channels_last" else 1
    large = l2 and quarter > 4096  # one program per row: a large one gets as many threads as it can
    most = 256 if l2 and not large else 1024  # sine and cosine need the registers
    block = min(most, triton.next_power_of_2(quarter))
    grid = (x.shape[0],) if l2 else (x.shape[0], triton.cdiv(quarter, block))
    kernel = _random_start_l2_kernel if l2 else _random_start_linf_kernel
    with on_device_of(x):
        kernel[grid](
            target, source, eps_rows, target.stride(0), source.stride(0), numel, quarter, channels,
            numel // channels, eps, seed, step, lo, hi, first_row, EPS_ROWS=eps_rows is not None,
            CHANNELS_LAST=layout == "channels_last", BLOCK_SIZE=block, num_warps=16 if large else 4,
            enable_fp_fusion=False,  # x + d*eps must round as on the CPU, so that both start at the same point
        )  # fmt: skip
    return out if target is out else out.copy_(target)


register(
    "random_start",
    "(Tensor x, float eps, Tensor? eps_rows, int seed, int step, float lo, float hi, bool l2, int first_row=0) "
    "-> Tensor",
    reference=random_start_reference,
    launcher=random_start_launch,
    fake=lambda x, eps, eps_rows, seed, step, lo, hi, l2, first_row=0: torch.empty_like(x),
)


def random_start(
    x: Tensor, eps: float | Tensor, *, seed: int, step: int = 0, lo: float = 0.0, hi: float = 1.0, norm: str = "linf",
    first_row: int = 0,
) -> Tensor:  # fmt: skip
    """clip(x + d), d uniform in the eps-ball of `norm` around each image.

    Args:
        x: images (n, ...) in fp32, fp16 or bf16; n may be 0.
        eps: radius, >= 0, in units of the images; a float, or a tensor (n,) with one value per row.
        seed, step: name the noise: seed of 64 bits (signed), step of 31 bits. The noise of a row depends on them
            and on the row's place in the global batch only: same on CPU and GPU (bit for bit for linf).
        lo, hi: range of valid pixels.
        norm: "linf" or "l2".
        first_row: place of x's first row in the global batch, of 31 bits, where x is a slice of one. Slices put
            together are the whole batch's result, bit for bit.
    Returns: a new tensor like x.
    Raises: TypeError, ValueError naming the argument.
    """
    checks.images("x", x)
    l2 = checks.norm(norm)
    eps, eps_rows = checks.per_row("eps", eps, x)
    seed = checks.integer("seed", seed, -(2**63), 2**63 - 1)
    step = checks.integer("step", step, 0, 2**31 - 1)
    checks.limits(lo, hi)
    first_row = checks.integer("first_row", first_row, 0, 2**31 - 1)  # the last row's place then fits 32 bits
    return torch.ops.ham_kernels.random_start(x.detach(), eps, eps_rows, seed, step, lo, hi, l2, first_row)
