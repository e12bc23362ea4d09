"""The jump: rows whose attack ends early go at once where repetitions of their last step would lead.

No forward is needed. Layouts and rounding are those of the PGD step (pgd.py).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..common import checks
from ._layout import as_layout, row_layout
from ._library import jit, on_device_of, register, tl, triton
from .l2 import LARGEST, add_squares, row_norm, row_shrink, shorten


def jump_reference(
    x_adv: Tensor, x: Tensor, before: Tensor, stays: Tensor, factor: float, eps: float, eps_rows: Tensor | None,
    lo: float, hi: float, l2: bool,
) -> None:  # fmt: skip
    """x_adv[r] = clip(project(x_adv[r] + factor * (x_adv[r] - before[r]))) for the rows r that do not stay."""
    column = (-1,) + (1,) * (x.dim() - 1)
    eps = eps if eps_rows is None else eps_rows.view(column)
    adv, clean = x_adv.float(), x.float()
    new = (adv - before.float()) * factor + adv
    if l2:
        new = clean + shorten(new - clean, eps)
    else:
        new = torch.clamp(new, clean - eps, clean + eps)
    x_adv.copy_(torch.where(stays.view(column), x_adv, new.clamp_(lo, hi).to(x_adv.dtype)))


@jit
def _jump_kernel(
    adv_ptr, x_ptr, before_ptr, stays_ptr, eps_ptr, adv_row_stride, x_row_stride, before_row_stride, numel, factor, eps,
    lo, hi, EPS_ROWS: tl.constexpr, L2: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Program (i, piece) for linf: a piece of row i. Program i for l2: row i in two passes, the norm and the write."""
    pieces = 1 if L2 else tl.cdiv(numel, BLOCK_SIZE)
    row = (tl.program_id(0) // pieces).to(tl.int64)
    numel = tl.where(tl.load(stays_ptr + row) != 0, 0, numel)
    if EPS_ROWS:
        eps = tl.load(eps_ptr + row)
    adv_ptr += row * adv_row_stride
    x_ptr += row * x_row_stride
    before_ptr += row * before_row_stride
    if L2:
        zero = tl.zeros([BLOCK_SIZE], tl.float32)
        low, middle, high = zero, zero, zero
        for start in range(0, numel, BLOCK_SIZE):
            offset = start + tl.arange(0, BLOCK_SIZE)
            x, new = _ahead(adv_ptr, x_ptr, before_ptr, offset, offset < numel, factor)
            low, middle, high = add_squares(low, middle, high, new - x)
        k, length = row_norm(low, middle, high)
        shrink = row_shrink(eps, k, length)
        for start in range(0, numel, BLOCK_SIZE):
            offset = start + tl.arange(0, BLOCK_SIZE)
            x, new = _ahead(adv_ptr, x_ptr, before_ptr, offset, offset < numel, factor)
            new = tl.minimum(tl.maximum(x + (new - x) * k * shrink, lo), hi)
            tl.store(adv_ptr + offset, new.to(adv_ptr.dtype.element_ty), mask=offset < numel)
    else:
        offset = (tl.program_id(0) % pieces) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
        x, new = _ahead(adv_ptr, x_ptr, before_ptr, offset, offset < numel, factor)
        new = tl.minimum(tl.maximum(new, x - eps), x + eps)
        new = tl.minimum(tl.maximum(new, lo), hi)
        tl.store(adv_ptr + offset, new.to(adv_ptr.dtype.element_ty), mask=offset < numel)


@jit
def _ahead(adv_ptr, x_ptr, before_ptr, offset, mask, factor):
    adv = tl.load(adv_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    before = tl.load(before_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    return x, (adv - before) * factor + adv


def jump_launch(
    x_adv: Tensor, x: Tensor, before: Tensor, stays: Tensor, factor: float, eps: float, eps_rows: Tensor | None,
    lo: float, hi: float, l2: bool,
) -> None:  # fmt: skip
    if x_adv.numel() == 0:
        return
    layout = row_layout(x_adv) or "contiguous"
    adv, x, before = (as_layout(t, layout) for t in (x_adv, x, before))
    rows, numel = x.shape[0], math.prod(x.shape[1:])
    large = l2 and numel > 16384  # one program per row: a large one gets as many threads as it can
    block = 4096 if large else min(1024, max(16, triton.next_power_of_2(numel)))
    with on_device_of(x_adv):
        _jump_kernel[(rows if l2 else rows * triton.cdiv(numel, block),)](
            adv, x, before, stays.contiguous().view(torch.int8), eps_rows, adv.stride(0), x.stride(0), before.stride(0),
            numel, factor, eps, lo, hi, EPS_ROWS=eps_rows is not None, L2=l2, BLOCK_SIZE=block,
            num_warps=16 if large else 4, enable_fp_fusion=False,
        )  # fmt: skip
    if adv is not x_adv:
        x_adv.copy_(adv)
    else:  # autograd must hear of a write that it did not make
        torch.autograd.graph.increment_version(x_adv)


register(
    "jump_",
    "(Tensor(a!) x_adv, Tensor x, Tensor before, Tensor stays, float factor, float eps, Tensor? eps_rows, float lo,"
    " float hi, bool l2) -> ()",
    reference=jump_reference,
    launcher=jump_launch,
    fake=lambda *_: None,
)


def jump(
    x_adv: Tensor, x: Tensor, before: Tensor, stays: Tensor, factor: float, eps: float | Tensor, lo: float = 0.0,
    hi: float = 1.0, norm: str = "linf",
) -> Tensor:  # fmt: skip
    """Moves rows in place by `factor` times their last step, x_adv - before; projects on the ball; clips.

    Under linf this is where `factor` repetitions of that step lead, each projected and clipped. Returns x_adv.

    Args:
        x_adv, x, before: images (n, ...) of one dtype (fp32, fp16, bf16), any strides: the points now, the clean
            images, and the points one step earlier. x_adv is changed; no two of its elements may share memory.
        stays: (n,) bool, rows that stay where they are (hard ones, whose attack goes on).
        factor: >= 0.
        eps: >= 0 in units of the images; a float, or a tensor (n,) with one value per row.
        lo, hi: range of valid pixels.  norm: "linf" or "l2".
    Raises: TypeError, ValueError naming the argument.
    """
    checks.images("x_adv", x_adv)
    checks.own_memory("x_adv", x_adv)
    checks.same("x", x, "x_adv", x_adv)
    checks.same("before", before, "x_adv", x_adv)
    checks.row_flags("stays", stays, x_adv)
    l2 = checks.norm(norm)
    factor = min(checks.real("factor", factor), LARGEST)
    eps, eps_rows = checks.per_row("eps", eps, x)
    checks.limits(lo, hi)
    torch.ops.ham_kernels.jump_(x_adv.detach(), x.detach(), before.detach(), stays, factor, eps, eps_rows, lo, hi, l2)
    return x_adv
