"""Step-size weights, and the weighted cross entropy whose gradient is made in the forward."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import checks
from ._library import NAMESPACE, jit, on_device_of, register, tl, triton
from .l2 import LARGEST


# ================================================================ weights
def step_size_weights_reference(max_step: Tensor, lam: float) -> Tensor:
    """w = sigmoid(lam * s) / mean(sigmoid(lam * s))."""
    w = torch.sigmoid(max_step * lam)
    return w / w.mean() if w.numel() else w


@jit
def _step_size_weights_kernel(step_ptr, out_ptr, n, lam, BLOCK_SIZE: tl.constexpr):
    """One program: the mean over all rows first, then the scaled weights. Batches are short."""
    total = tl.zeros([BLOCK_SIZE], tl.float32)
    for start in range(0, n, BLOCK_SIZE):
        i = start + tl.arange(0, BLOCK_SIZE)
        w = tl.sigmoid(tl.load(step_ptr + i, mask=i < n, other=0.0) * lam)
        total += tl.where(i < n, w, 0.0)
    mean = tl.div_rn(tl.sum(total), n * 1.0)  # `/` is off by two units, and lam = 0 must give ones
    for start in range(0, n, BLOCK_SIZE):
        i = start + tl.arange(0, BLOCK_SIZE)
        w = tl.sigmoid(tl.load(step_ptr + i, mask=i < n, other=0.0) * lam)
        tl.store(out_ptr + i, tl.div_rn(w, mean), mask=i < n)


def step_size_weights_launch(max_step: Tensor, lam: float) -> Tensor:
    out = torch.empty_like(max_step)
    n = max_step.numel()
    if n:
        block = min(2048, max(16, triton.next_power_of_2(n)))
        with on_device_of(max_step):
            _step_size_weights_kernel[(1,)](
                max_step, out, n, lam, BLOCK_SIZE=block, num_warps=16 if n > block else 4, enable_fp_fusion=False
            )
    return out


register(
    "step_size_weights",
    "(Tensor max_step, float lam) -> Tensor",
    reference=step_size_weights_reference,
    launcher=step_size_weights_launch,
    fake=lambda max_step, lam: torch.empty_like(max_step),
)


def step_size_weights(max_step: Tensor, lam: float) -> Tensor:
    """HAM's weights: sigmoid(lam * max_step), scaled to mean 1. A higher lam makes them more uniform.

    Args:
        max_step: (n,) maximum adversarial step sizes, >= 0, from `margin_stats`; n may be 0. On a GPU they are not
            read beforehand: a NaN makes all weights NaN.
        lam: >= 0, in 1 / units of max_step.
    Returns: (n,) fp32. Source: arXiv 2308.01823; norm and scale are this package's choice (README, "open choices").
    Raises: TypeError, ValueError naming the argument.
    """
    checks.tensor("max_step", max_step)
    checks.max_step(max_step, max_step.numel(), max_step)
    lam = min(checks.real("lam", lam), LARGEST)  # infinity, in fp32, times 0 would be NaN
    return torch.ops.ham_kernels.step_size_weights(max_step.detach().float().contiguous(), lam)


# ================================================================ weighted cross entropy
def weighted_cross_entropy_reference(logits: Tensor, y: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """(loss of each row, d(sum of them)/d(logits) in fp32), each row's loss being w_i * CE_i / n."""
    n, classes = logits.shape
    is_label = y[:, None] == torch.arange(classes, device=logits.device)
    log_p = torch.log_softmax(logits.float(), dim=1)
    scale = 1.0 / max(n, 1)
    toward = -is_label.float() * (scale if weights is None else (weights * scale)[:, None])
    rows = torch.where(is_label, log_p * toward, 0.0).sum(1)
    # the very op behind cross_entropy's backward, so that both train alike, bit for bit
    return rows, torch.ops.aten._log_softmax_backward_data(toward, log_p, 1, torch.float32)


@jit
def _weighted_ce_kernel(
    logits_ptr, y_ptr, weight_ptr, loss_ptr, grad_ptr, logits_row_stride, n, classes,
    HAS_WEIGHT: tl.constexpr, ROWS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Program: ROWS rows. loss = w*(log sum exp z - z_y)/n and grad = w*(softmax - onehot)/n from one read."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK_SIZE)
    in_rows = row < n
    mask = in_rows[:, None] & (col < classes)[None, :]
    z = tl.load(logits_ptr + row[:, None] * logits_row_stride + col[None, :], mask=mask, other=-float("inf"))
    z = tl.where(in_rows[:, None], z.to(tl.float32), 0.0)
    is_label = col[None, :] == tl.load(y_ptr + row, mask=in_rows, other=0)[:, None]
    scale = tl.full([ROWS], 1.0, tl.float32) / n
    if HAS_WEIGHT:
        scale = tl.load(weight_ptr + row, mask=in_rows, other=0.0) / n
    z -= tl.max(z, axis=1)[:, None]
    e = tl.exp(z)
    total = tl.sum(e, axis=1)
    loss = (tl.log(total) - tl.sum(tl.where(is_label, z, 0.0), axis=1)) * scale
    # `/` is off by two units, which is all that is left of p - 1 where p is near 1
    p = tl.div_rn(e, tl.broadcast_to(total[:, None], e.shape))
    grad = (p - tl.where(is_label, 1.0, 0.0)) * scale[:, None]
    tl.store(loss_ptr + row, loss, mask=in_rows)
    tl.store(grad_ptr + row[:, None] * classes + col[None, :], grad, mask=mask)


def weighted_cross_entropy_launch(logits: Tensor, y: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    n, classes = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    loss = torch.empty(n, dtype=torch.float32, device=logits.device)
    grad = torch.empty((n, classes), dtype=torch.float32, device=logits.device)
    if n:
        block = max(2, triton.next_power_of_2(classes))
        rows = max(1, min(2048 // block, triton.next_power_of_2(n)))
        with on_device_of(logits):
            _weighted_ce_kernel[(triton.cdiv(n, rows),)](
                logits, y.contiguous(), weights, loss, grad, logits.stride(0), n, classes,
                HAS_WEIGHT=weights is not None, ROWS=rows, BLOCK_SIZE=block, num_warps=4,
                enable_fp_fusion=False,
            )  # fmt: skip
    return loss, grad


register(
    "weighted_cross_entropy",
    "(Tensor logits, Tensor y, Tensor? weights) -> (Tensor, Tensor)",
    reference=weighted_cross_entropy_reference,
    launcher=weighted_cross_entropy_launch,
    fake=lambda z, y, w: (
        z.new_empty(z.shape[0], dtype=torch.float32),
        z.new_empty(z.shape, dtype=torch.float32),
    ),
)


def _keep_gradient(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])
    ctx.logits_dtype = inputs[0].dtype


def _scale_gradient(ctx, row_grad, _):
    (grad,) = ctx.saved_tensors
    if torch.is_grad_enabled():  # what is saved has no graph, so that a part would go missing quietly
        raise RuntimeError(
            "weighted_cross_entropy: is differentiable once; where gradients are differentiated (create_graph=True), "
            "use torch.nn.functional.cross_entropy"
        )
    # rounded only now: in fp16 w * p / n would be lost below 6e-8 before a loss scale can lift it
    return (grad * row_grad[:, None]).to(ctx.logits_dtype), None, None


torch.library.register_autograd(f"{NAMESPACE}::weighted_cross_entropy", _scale_gradient, setup_context=_keep_gradient)


def weighted_cross_entropy(logits: Tensor, y: Tensor, weights: Tensor | None = None) -> Tensor:
    """sum_i w_i * CE(logits_i, y_i) / n, differentiable with respect to logits, once, in reverse mode.

    Args:
        logits: (n, classes), fp32, fp16 or bf16; n = 0 gives a loss of 0 (with a zero gradient), not NaN.
        y: (n,) int64 labels, range-checked on the CPU.
        weights: (n,) weights; None for ones. No gradient flows to them.
    Returns: 0-dim fp32 tensor.
    Raises: TypeError, ValueError naming the argument; RuntimeError where its gradient is differentiated.
    """
    checks.logits("logits", logits)
    checks.labels(y, logits, "logits")
    checks.label_range(y, logits.shape[1])
    if weights is not None:
        checks.vector("weights", weights, logits.shape[0], logits)
        weights = weights.detach().float().contiguous()
    rows, _ = torch.ops.ham_kernels.weighted_cross_entropy(logits, y, weights)
    return rows.sum()
