"""What one look at the logits tells: CE gradient, hard flag, and the running maximum adversarial step size."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import checks
from ._library import jit, on_device_of, register, tl, triton


def margin_stats_reference(
    logits: Tensor, y: Tensor, prev: Tensor | None, max_step: Tensor | None, probs: bool, want_hard: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """grad = softmax(z) - onehot(y); hard = not (z_y > max other); max_step = max(max_step, |z - prev|_1)."""
    z = logits.float()
    is_label = y[:, None] == torch.arange(z.shape[1], device=z.device)
    # the very op behind cross_entropy's backward: bit for bit the gradient that a loss graph would give
    grad = torch.ops.aten._log_softmax_backward_data(-is_label.float(), torch.log_softmax(z, dim=1), 1, torch.float32)
    hard = torch.empty(0, dtype=torch.bool, device=z.device)
    if want_hard:  # the steps of an attack do not use it, and on the CPU it is work of its own
        z_y = z.masked_fill(~is_label, -torch.inf).amax(1)
        other = z.masked_fill(is_label, -torch.inf).amax(1)
        hard = ~(z_y > other)  # written so that a tie and a NaN are hard
    if prev is not None:
        before = prev.float()
        if probs:
            z, before = torch.softmax(z, 1), torch.softmax(before, 1)
        step = (z - before).abs_().sum(1)
        max_step = step if max_step is None else torch.maximum(max_step, step)
    elif max_step is not None:
        max_step = max_step.clone()
    grad = grad.to(logits.dtype)
    return grad, hard, logits.new_empty(0, dtype=torch.float32) if max_step is None else max_step


@jit
def _softmax(z):
    e = tl.exp(z - tl.max(z, axis=1)[:, None])
    return e / tl.sum(e, axis=1)[:, None]


@jit
def _margin_kernel(
    logits_ptr, y_ptr, prev_ptr, max_in_ptr, grad_ptr, hard_ptr, max_out_ptr, logits_row_stride, prev_row_stride,
    n, classes, HAS_PREV: tl.constexpr, HAS_MAX: tl.constexpr, PROBS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Program: ROWS rows of up to BLOCK_SIZE classes, all in registers. Formulas as in the reference."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK_SIZE)
    in_rows = row < n
    mask = in_rows[:, None] & (col < classes)[None, :]
    z = tl.load(logits_ptr + row[:, None] * logits_row_stride + col[None, :], mask=mask, other=-float("inf"))
    z = z.to(tl.float32)
    z = tl.where(in_rows[:, None], z, 0.0)  # rows past the end: any finite number keeps NaN out of the arithmetic
    y = tl.load(y_ptr + row, mask=in_rows, other=0)
    is_label = col[None, :] == y[:, None]

    p = _softmax(z)
    grad = p - tl.where(is_label, 1.0, 0.0)
    tl.store(grad_ptr + row[:, None] * classes + col[None, :], grad.to(grad_ptr.dtype.element_ty), mask=mask)

    z_y = tl.max(tl.where(is_label, z, -float("inf")), axis=1)
    other = tl.max(tl.where(is_label, -float("inf"), z), axis=1)
    has_nan = tl.max(tl.where(z != z, 1, 0), axis=1) > 0  # tl.max drops NaN
    easy = (z_y > other) & (has_nan == 0)
    tl.store(hard_ptr + row, tl.where(easy, 0, 1).to(tl.int8), mask=in_rows)

    if HAS_PREV:
        before = tl.load(prev_ptr + row[:, None] * prev_row_stride + col[None, :], mask=mask, other=-float("inf"))
        before = tl.where(in_rows[:, None], before.to(tl.float32), 0.0)
        if PROBS:
            change = tl.abs(p - _softmax(before))
        else:
            change = tl.abs(z - before)
        step = tl.sum(tl.where(mask, change, 0.0), axis=1)
        if HAS_MAX:
            largest = tl.load(max_in_ptr + row, mask=in_rows, other=0.0)
            keep = (largest >= step) | (largest != largest)  # NaN, once there, stays; a NaN step is taken
            step = tl.where(keep, largest, step)
        tl.store(max_out_ptr + row, step, mask=in_rows)


def margin_stats_launch(
    logits: Tensor, y: Tensor, prev: Tensor | None, max_step: Tensor | None, probs: bool, want_hard: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    n, classes = logits.shape
    logits, y = _rows(logits), y.contiguous()
    prev = prev if prev is None else _rows(prev)
    grad = torch.empty((n, classes), dtype=logits.dtype, device=logits.device)
    hard = torch.empty(n, dtype=torch.bool, device=logits.device)
    if prev is not None:
        new_max = torch.empty(n, dtype=torch.float32, device=logits.device)
    else:
        new_max = logits.new_empty(0, dtype=torch.float32) if max_step is None else max_step.clone()
    if n == 0:
        return grad, hard, new_max
    block = max(2, triton.next_power_of_2(classes))
    rows = max(1, min(2048 // block, triton.next_power_of_2(n)))
    with on_device_of(logits):
        _margin_kernel[(triton.cdiv(n, rows),)](
            logits, y, prev, max_step if max_step is None else max_step.contiguous(), grad, hard.view(torch.int8),
            new_max, logits.stride(0), 0 if prev is None else prev.stride(0), n, classes,
            HAS_PREV=prev is not None, HAS_MAX=max_step is not None, PROBS=probs, ROWS=rows, BLOCK_SIZE=block,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return grad, hard if want_hard else hard[:0], new_max


def _rows(t: Tensor) -> Tensor:
    return t if t.stride(1) == 1 else t.contiguous()


def _margin_stats_fake(logits, y, prev, max_step, probs, want_hard=True):
    n = logits.shape[0]
    grad = logits.new_empty(logits.shape)
    entries = n if prev is not None or max_step is not None else 0
    hard = logits.new_empty(n if want_hard else 0, dtype=torch.bool)
    return grad, hard, logits.new_empty(entries, dtype=torch.float32)


register(
    "margin_stats",
    "(Tensor logits, Tensor y, Tensor? prev, Tensor? max_step, bool probs, bool want_hard=True)"
    " -> (Tensor, Tensor, Tensor)",
    reference=margin_stats_reference,
    launcher=margin_stats_launch,
    fake=_margin_stats_fake,
)


def margin_stats(
    logits: Tensor, y: Tensor, prev: Tensor | None = None, max_step: Tensor | None = None, *, space: str = "logits"
) -> tuple[Tensor, Tensor, Tensor | None]:
    """CE gradient, hard flags and running maximum step size from one batch of logits, in one launch.

    Args:
        logits: (n, classes), fp32, fp16 or bf16, 2 to 1000s of classes, n may be 0. Not differentiated through.
        y: (n,) int64 labels. Range-checked on the CPU; on CUDA a row whose label is no class comes back hard.
        prev: logits of the step before, (n, classes); without it there is no step to measure.
        max_step: (n,) fp32, >= 0, the largest step so far; None counts as zeros. Its values are read on the CPU only.
        space: measure the step between "logits" or between "probs" (softmax).
    Returns:
        grad: d(sum of cross entropies)/d(logits) = softmax - onehot, dtype of logits.
        hard: (n,) bool, not (z_y > max other z): misclassified, tied, or NaN.
        max_step: (n,) fp32, max(max_step, |logits - prev|_1), HAM's maximum adversarial step size
            (arXiv 2308.01823); None when neither prev nor max_step was given. NaN stays NaN.
    Raises: TypeError, ValueError naming the argument.
    """
    checks.logits("logits", logits)
    checks.labels(y, logits, "logits")
    checks.label_range(y, logits.shape[1])
    probs = checks.choice("space", space, ("logits", "probs")) == "probs"
    if prev is not None:
        checks.same("prev", prev, "logits", logits)
    if max_step is not None:
        checks.max_step(max_step, logits.shape[0], logits)
        max_step = max_step.detach().float()
    grad, hard, new_max = torch.ops.ham_kernels.margin_stats(
        logits.detach(), y, prev if prev is None else prev.detach(), max_step, probs
    )
    return grad, hard, None if prev is None and max_step is None else new_max
