"""The PGD step, L-inf and L2, over all rows or over an active set of rows.

One image is one row. A row may be contiguous or channels_last, and rows may be strided (a slice of a batch);
anything else is copied first. Arithmetic is fp32 inside, with one rounding to the dtype of the images at the end.
The step reads x_adv, x and grad once and writes x_adv once: 16 bytes per element in fp32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..common import checks
from ._layout import as_layout, row_layout
from ._library import jit, on_device_of, register, tl, triton
from .l2 import add_squares, move, row_norm, row_ratio, row_shrink, shorten


def pgd_step_reference(
    x_adv: Tensor, x: Tensor, grad: Tensor, index: Tensor | None, count: Tensor | None,
    eps: float, step_size: float, eps_rows: Tensor | None, step_rows: Tensor | None, lo: float, hi: float, l2: bool,
) -> None:  # fmt: skip
    """x_adv[r] = clip(project(x_adv[r] + step * direction(grad[i]))) for r = index[i], i < count."""
    rows, any_active = _active_rows(index, count, grad.shape[0], x.shape[0])
    if rows is None:
        adv, clean = x_adv, x
    else:
        source, rows = rows
        adv, clean, grad = x_adv.index_select(0, rows), x.index_select(0, rows), grad.index_select(0, source)
        eps_rows = eps_rows if eps_rows is None else eps_rows.index_select(0, rows)
        step_rows = step_rows if step_rows is None else step_rows.index_select(0, rows)
    column = (-1,) + (1,) * (x.dim() - 1)
    eps = eps if eps_rows is None else eps_rows.view(column)
    step_size = step_size if step_rows is None else step_rows.view(column)
    old, adv, clean, grad = adv, adv.float(), clean.float(), grad.float()
    if l2:
        delta = adv - clean + move(grad.where(grad.isfinite(), 0.0), step_size)
        new = clean + shorten(delta, eps)
    else:
        new = torch.sign(grad).mul_(step_size).add_(adv)  # sign(NaN) is 0: such a pixel stays where it is
        new = torch.clamp(new, clean - eps, clean + eps)
    if rows is None:
        x_adv.copy_(new.clamp_(lo, hi))
        return
    new = new.clamp_(lo, hi).to(x_adv.dtype)
    x_adv.index_copy_(0, rows, new if any_active is None else torch.where(any_active, new, old))


def _active_rows(index: Tensor | None, count: Tensor | None, m: int, n: int):
    """((positions in grad, rows of x), any row active), each None where it does not restrict anything.

    On CUDA the count is not read: positions from `count` on repeat position 0, so that they write what it writes.
    """
    if index is None and count is None:
        return None, None
    device = (count if index is None else index).device
    if count is not None and device.type == "cpu":
        m = min(m, int(count))
    source = torch.arange(m, device=device)
    if count is not None and device.type != "cpu":
        source = torch.where(source < count, source, 0)
    rows = source if index is None else index.index_select(0, source).long()
    if count is None or device.type == "cpu":
        return (source, rows), None
    return (source, rows.clamp(0, n - 1)), count > 0


@jit
def _row_of(program, index_ptr, count_ptr, numel, HAS_INDEX: tl.constexpr, HAS_COUNT: tl.constexpr):
    """(row of x, elements to work on): program i works for row index[i]; from `count` on it has nothing to do."""
    row = program
    if HAS_INDEX:
        row = tl.load(index_ptr + program)
    if HAS_COUNT:
        active = program < tl.load(count_ptr)
        numel = tl.where(active, numel, 0)
        row = tl.where(active, row, 0)  # entries of index from `count` on may be anything
    return row.to(tl.int64), numel


@jit
def _pgd_linf_kernel(
    adv_ptr, x_ptr, grad_ptr, index_ptr, count_ptr, eps_ptr, step_ptr,
    adv_row_stride, x_row_stride, grad_row_stride, numel, eps, step_size, lo, hi,
    HAS_INDEX: tl.constexpr, HAS_COUNT: tl.constexpr, EPS_ROWS: tl.constexpr, STEP_ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Program (i, piece): adv = clip(min(max(adv + step*sign(grad), x - eps), x + eps)) on a piece of row i."""
    pieces = tl.cdiv(numel, BLOCK_SIZE)
    i = tl.program_id(0) // pieces
    offset = (tl.program_id(0) % pieces) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    row, numel = _row_of(i, index_ptr, count_ptr, numel, HAS_INDEX, HAS_COUNT)
    mask = offset < numel
    if EPS_ROWS:
        eps = tl.load(eps_ptr + row)
    if STEP_ROWS:
        step_size = tl.load(step_ptr + row)
    adv_ptr += row * adv_row_stride
    x = tl.load(x_ptr + row * x_row_stride + offset, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grad_ptr + i.to(tl.int64) * grad_row_stride + offset, mask=mask, other=0.0).to(tl.float32)
    adv = tl.load(adv_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    move = tl.where(g > 0, step_size, 0.0) - tl.where(g < 0, step_size, 0.0)
    adv = tl.minimum(tl.maximum(adv + move, x - eps), x + eps)
    adv = tl.minimum(tl.maximum(adv, lo), hi)
    tl.store(adv_ptr + offset, adv.to(adv_ptr.dtype.element_ty), mask=mask)


@jit
def _pgd_l2_kernel(
    adv_ptr, x_ptr, grad_ptr, index_ptr, count_ptr, eps_ptr, step_ptr,
    adv_row_stride, x_row_stride, grad_row_stride, numel, eps, step_size, lo, hi,
    HAS_INDEX: tl.constexpr, HAS_COUNT: tl.constexpr, EPS_ROWS: tl.constexpr, STEP_ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Program i: three passes over row i, for |grad|, for |delta|, and to write; the later two hit the cache."""
    i = tl.program_id(0)
    row, numel = _row_of(i, index_ptr, count_ptr, numel, HAS_INDEX, HAS_COUNT)
    if EPS_ROWS:
        eps = tl.load(eps_ptr + row)
    if STEP_ROWS:
        step_size = tl.load(step_ptr + row)
    adv_ptr += row * adv_row_stride
    x_ptr += row * x_row_stride
    grad_ptr += i.to(tl.int64) * grad_row_stride

    zero = tl.zeros([BLOCK_SIZE], tl.float32)
    low, middle, high = zero, zero, zero
    for start in range(0, numel, BLOCK_SIZE):
        offset = start + tl.arange(0, BLOCK_SIZE)
        low, middle, high = add_squares(low, middle, high, _finite_grad(grad_ptr, offset, offset < numel))
    k_grad, length = row_norm(low, middle, high)
    scale = row_ratio(step_size, length)

    low, middle, high = zero, zero, zero
    for start in range(0, numel, BLOCK_SIZE):
        offset = start + tl.arange(0, BLOCK_SIZE)
        _, delta = _moved(adv_ptr, x_ptr, grad_ptr, offset, offset < numel, k_grad, scale)
        low, middle, high = add_squares(low, middle, high, delta)
    k, length = row_norm(low, middle, high)
    shrink = row_shrink(eps, k, length)

    for start in range(0, numel, BLOCK_SIZE):
        offset = start + tl.arange(0, BLOCK_SIZE)
        mask = offset < numel
        x, delta = _moved(adv_ptr, x_ptr, grad_ptr, offset, mask, k_grad, scale)
        adv = tl.minimum(tl.maximum(x + delta * k * shrink, lo), hi)
        tl.store(adv_ptr + offset, adv.to(adv_ptr.dtype.element_ty), mask=mask)


@jit
def _moved(adv_ptr, x_ptr, grad_ptr, offset, mask, k_grad, scale):
    adv = tl.load(adv_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    return x, adv - x + _finite_grad(grad_ptr, offset, mask) * k_grad * scale


@jit
def _finite_grad(grad_ptr, offset, mask):
    g = tl.load(grad_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    return tl.where(tl.abs(g) < float("inf"), g, 0.0)


def pgd_step_launch(
    x_adv: Tensor, x: Tensor, grad: Tensor, index: Tensor | None, count: Tensor | None,
    eps: float, step_size: float, eps_rows: Tensor | None, step_rows: Tensor | None, lo: float, hi: float, l2: bool,
) -> None:  # fmt: skip
    if grad.numel() == 0:
        return
    layout = row_layout(x_adv) or "contiguous"
    adv, x, grad = (as_layout(t, layout) for t in (x_adv, x, grad))
    rows, numel = grad.shape[0], math.prod(grad.shape[1:])
    strides = [t.stride(0) for t in (adv, x, grad)]
    per_row = (index, count, eps_rows, step_rows)
    flat = all(t is None for t in per_row) and all(stride == numel for stride in strides)
    if not l2 and flat and rows * numel <= 2**30:  # offsets inside a row are 32-bit
        rows, numel = 1, rows * numel  # one long row: no program is left half empty by small images
    large = l2 and numel > 16384  # one program per row: a large one gets as many threads as it can
    block = 4096 if large else min(1024, max(16, triton.next_power_of_2(numel)))
    grid = (rows if l2 else rows * triton.cdiv(numel, block),)  # one axis: the others end at 65535 programs
    kernel = _pgd_l2_kernel if l2 else _pgd_linf_kernel
    with on_device_of(x_adv):
        kernel[grid](
            adv, x, grad, index, count, eps_rows, step_rows, *strides, numel, eps, step_size, lo, hi,
            HAS_INDEX=index is not None, HAS_COUNT=count is not None, EPS_ROWS=eps_rows is not None,
            STEP_ROWS=step_rows is not None, BLOCK_SIZE=block, num_warps=16 if large else 4,
            enable_fp_fusion=False,
        )  # fmt: skip
    if adv is not x_adv:
        x_adv.copy_(adv)
    else:  # autograd must hear of a write that it did not make
        torch.autograd.graph.increment_version(x_adv)


register(
    "pgd_step_",
    "(Tensor(a!) x_adv, Tensor x, Tensor grad, Tensor? index, Tensor? count, float eps, float step_size,"
    " Tensor? eps_rows, Tensor? step_rows, float lo, float hi, bool l2) -> ()",
    reference=pgd_step_reference,
    launcher=pgd_step_launch,
    fake=lambda *_: None,
)


def pgd_step(
    x_adv: Tensor, x: Tensor, grad: Tensor, eps: float | Tensor, step_size: float | Tensor,
    index: Tensor | None = None, count: Tensor | None = None, lo: float = 0.0, hi: float = 1.0, norm: str = "linf",
) -> Tensor:  # fmt: skip
    """One PGD step in place (Madry et al., ICLR 2018): move along the gradient, project, clip. Returns x_adv.

    linf: x_adv + step_size * sign(grad), projected on |x_adv - x| <= eps. A NaN in grad moves nothing.
    l2:   x_adv + step_size * grad / |grad|, projected on |x_adv - x| <= eps, norms per row: a full step whatever
          the size of grad, down to the smallest denormal number (which counts as 0 only under
          torch.set_flush_denormal), and none where grad is 0. A NaN or an infinity in grad counts as 0.
    A NaN in the images comes out as one on the CPU, as `lo` on CUDA.
    Nothing is differentiated through: x_adv may be a leaf that requires grad.

    Args:
        x_adv, x: images (n, ...) of one dtype (fp32, fp16, bf16), any strides. x_adv is changed; no two of its
            elements may share memory, as those of an expanded tensor do. x may be x_adv itself; other overlaps of
            x_adv with x or grad are right on the CPU only.
        grad: (m, ...) in fp32, fp16 or bf16. Without index m = n. With index it is compact: row i belongs to
            row index[i] of x, and m <= len(index).
        eps, step_size: floats >= 0 in units of the images, or tensors (n,) with one value per row of x.
        index: int32 (k,), distinct rows of x. Rows not named stay as they are.
        count: int32 (1,) on the device of x, in 0..m: only the first `count` rows of grad are active.
            Entries of index and count are read, and checked, on the CPU only. On a GPU that would wait for it: there
            a negative count is 0, one beyond m is m, a row named twice ends at one of its steps or, in part, at
            each, and an index outside x is undefined.
        lo, hi: range of valid pixels.  norm: "linf" or "l2".
    Raises: TypeError, ValueError naming the argument.
    """
    checks.images("x_adv", x_adv)
    checks.own_memory("x_adv", x_adv)
    checks.same("x", x, "x_adv", x_adv)
    l2 = checks.norm(norm)
    checks.step_gradient(grad, x, index, count)
    eps, eps_rows = checks.per_row("eps", eps, x)
    step_size, step_rows = checks.per_row("step_size", step_size, x)
    checks.limits(lo, hi)
    torch.ops.ham_kernels.pgd_step_(
        x_adv.detach(), x.detach(), grad.detach(), index, count, eps, step_size, eps_rows, step_rows, lo, hi, l2
    )
    return x_adv
