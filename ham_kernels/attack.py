"""PGD over an active set of rows (Madry et al., "Towards deep learning models resistant to adversarial attacks")."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from . import _check, engine
from .ops import random_start as random_start_op

_ops = torch.ops.ham_kernels

LOSSES = ("ce", "cw")


@dataclass(frozen=True)
class PGD:
    """Settings of an attack: budget eps and step size in units of the images (floats, or one value per row).

    loss is what the attack raises: "ce", the cross entropy; or "cw", the margin max_{j != y} z_j - z_y (Carlini and
    Wagner, arXiv 1608.04644), whose gradient does not vanish where softmax saturates.
    """

    eps: float | Tensor = 8 / 255
    step_size: float | Tensor = 2 / 255
    steps: int = 10
    norm: str = "linf"
    random_start: bool = True
    loss: str = "ce"

    def __post_init__(self):
        for name in ("eps", "step_size"):
            value = getattr(self, name)
            if not isinstance(value, Tensor):  # a tensor is checked against the batch that it belongs to
                _check.real(name, value)
        _check.integer("steps", self.steps, 0)
        _check.norm(self.norm)
        _check.flag("random_start", self.random_start)
        _check.choice("loss", self.loss, LOSSES)


@dataclass
class ActiveSet:
    """The rows still under attack. `x_adv` moves in place; the other tensors stay."""

    x_adv: Tensor  # (n, C, H, W)
    x: Tensor  # (n, C, H, W), clean
    y: Tensor  # (n,)
    eps: float
    eps_rows: Tensor | None  # (n,) where eps differs from row to row
    step_size: float
    step_rows: Tensor | None
    prev: Tensor | None = None  # (n, classes), logits at the last point that was looked at
    max_step: Tensor | None = None  # (n,), maximum adversarial step size so far

    def rows(self, index: Tensor) -> ActiveSet:
        """The named rows as an active set of their own, gathered once so that later steps are dense."""

        def pick(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.index_select(0, index)

        return replace(
            self, x_adv=pick(self.x_adv), x=pick(self.x), y=pick(self.y), eps_rows=pick(self.eps_rows),
            step_rows=pick(self.step_rows), max_step=pick(self.max_step),
            prev=None,  # the next forward is at the same point: there is no step to measure yet
        )  # fmt: skip


def begin(x: Tensor, y: Tensor, pgd: PGD, seed: int, step: int) -> ActiveSet:
    """The starting points x0: random in the ball, or the images themselves."""
    x = x.detach()
    eps, eps_rows = _check.per_row("eps", pgd.eps, x)
    step_size, step_rows = _check.per_row("step_size", pgd.step_size, x)
    if pgd.random_start:
        x_adv = random_start_op(x, pgd.eps, seed=seed, step=step, norm=pgd.norm)
    else:
        x_adv = x.clone()
    return ActiveSet(x_adv, x, y, eps, eps_rows, step_size, step_rows)


def advance(
    model: nn.Module, active: ActiveSet, steps: int, pgd: PGD, guard: engine.BatchGuard,
    *, track: bool = False, precision: str = "fp32", on_logits: Callable[[int, Tensor], None] | None = None,
) -> None:  # fmt: skip
    """`steps` PGD steps on the active rows: one forward and one backward to the input each.

    The CE gradient with respect to the logits comes from margin_stats, not from a loss graph. With `track` the same
    launch keeps the largest L1 change of the logits between consecutive points. `on_logits(k, z)` sees the logits at
    the point before step k = 0, 1, ..., which the attack computes anyway.
    """
    l2 = pgd.norm == "l2"
    for k in range(steps):
        point = active.x_adv.detach().requires_grad_()
        with engine.autocast(precision, point.device):
            logits = model(point)
        _check.model_output(logits, point.shape[0])
        z = logits.detach()
        if k == 0:
            guard.logits(z)
        if on_logits is not None:
            on_logits(k, z)
        if pgd.loss == "ce" or track:
            prev = active.prev if track else None
            z_grad, _, max_step = _ops.margin_stats(
                z, active.y, prev, active.max_step if track else None, probs=False, want_hard=False
            )
        if track:
            active.prev, active.max_step = z, max_step if max_step.numel() else z.new_zeros(len(z)).float()
        if pgd.loss == "cw":
            z_grad = cw_gradient(z, active.y)
        (grad,) = torch.autograd.grad(logits, point, z_grad)
        _ops.pgd_step_(
            active.x_adv, active.x, grad, None, None, active.eps, active.step_size, active.eps_rows,
            active.step_rows, 0.0, 1.0, l2,
        )  # fmt: skip


def cw_gradient(z: Tensor, y: Tensor) -> Tensor:
    """d(max_{j != y} z_j - z_y)/dz = onehot(j*) - onehot(y), (n, classes); of equal largest others the first is j*.

    Compares instead of indexing: on CUDA the labels are judged only later, and a bad one must not reach an address.
    """
    column = torch.arange(z.shape[1], device=z.device)
    is_label = y[:, None] == column
    other = z.masked_fill(is_label, -torch.inf).argmax(1, keepdim=True)
    return (other == column).to(z.dtype) - is_label.to(z.dtype)


@torch.no_grad()
def look(
    model: nn.Module, active: ActiveSet, guard: engine.BatchGuard, *, track: bool = False, precision: str = "fp32"
) -> Tensor:
    """One forward without a graph at the current points. Returns the hard flags, (n,) bool."""
    with engine.autocast(precision, active.x_adv.device):
        z = model(active.x_adv)
    _check.model_output(z, active.x_adv.shape[0])
    guard.logits(z)
    _, hard, max_step = _ops.margin_stats(z, active.y, active.prev if track else None, active.max_step, probs=False)
    if track:
        active.prev, active.max_step = z, max_step
    return hard


def pgd_attack(
    model: nn.Module, x: Tensor, y: Tensor, *, eps: float | Tensor = 8 / 255, step_size: float | Tensor = 2 / 255,
    steps: int = 10, random_start: bool = True, norm: str = "linf", generator: torch.Generator | None = None,
    precision: str = "fp32",
) -> Tensor:  # fmt: skip
    """Untargeted PGD on the cross entropy, model in eval mode.

    Args:
        model: classifier, images (n, C, H, W) in [0, 1] -> logits (n, classes); normalisation inside it.
        x: images in [0, 1], fp32, fp16 or bf16.  y: (n,) int64 labels.
        eps, step_size: >= 0, in units of the images; floats, or tensors (n,) with one value per row.
        steps: >= 0. 0 gives the starting point.
        random_start: start uniformly in the eps-ball instead of at x.
        norm: "linf" or "l2".
        generator: draws the seed of the start; None takes torch's default generator, so torch.manual_seed holds.
        precision: "fp32" or "bf16" (autocast).
    Returns: x_adv like x, in [0, 1] and in the eps-ball (up to one rounding of its dtype), detached.
    Raises: TypeError, ValueError naming the argument. The model's modes, requires_grad and .grad are the same
        afterwards, also then.
    """
    _check.batch(x, y)
    pgd = PGD(eps, step_size, steps, norm, random_start)
    _check.choice("precision", precision, engine.PRECISIONS)
    guard = engine.BatchGuard(x, y)
    with engine.attack_mode(model):
        active = begin(x, y, pgd, draw_seed(generator), 0)
        advance(model, active, steps, pgd, guard, precision=precision)
    guard.read()
    return active.x_adv


def draw_seed(generator: torch.Generator | None) -> int:
    """A 62-bit seed from a generator (one on a GPU costs a sync; torch's default generator is on the CPU)."""
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(0, 2**62, (1,), generator=generator, device=device))
