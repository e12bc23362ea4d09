"""The rows under attack, and one PGD step on them (Madry et al., "Towards deep learning models resistant ...")."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from . import _check
from .engine import Engine
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
    start_eps: float | None = None  # radius of the random start, where it is not eps

    def __post_init__(self):
        for name in ("eps", "step_size"):
            value = getattr(self, name)
            if not isinstance(value, Tensor):  # a tensor is checked against the batch that it belongs to
                _check.real(name, value)
        if self.norm == "linf" and not isinstance(self.eps, Tensor) and self.eps > 1:
            warnings.warn(
                f"eps: got {self.eps:g}, but images are in [0, 1], where an L-inf eps of 1 allows anything; is it in "
                "units of 1/255?",
                stacklevel=2,
            )
        _check.integer("steps", self.steps, 0)
        _check.norm(self.norm)
        _check.flag("random_start", self.random_start)
        _check.choice("loss", self.loss, LOSSES)
        if self.start_eps is not None:
            _check.real("start_eps", self.start_eps)


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
    batch: int = 0  # rows of the whole batch, of which these are some

    def rows(self, index: Tensor) -> ActiveSet:
        """The named rows as an active set of their own, gathered once so that later steps are dense."""
        index = index.long()

        def pick(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[index]  # index_select would forget the memory format

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
        radius = pgd.eps if pgd.start_eps is None else pgd.start_eps
        x_adv = random_start_op(x, radius, seed=seed, step=step, norm=pgd.norm)
    else:
        x_adv = x.clone()
    return ActiveSet(x_adv, x, y, eps, eps_rows, step_size, step_rows, batch=len(y))


def take_step(model: nn.Module, active: ActiveSet, pgd: PGD, track: bool, engine: Engine) -> Tensor:
    """One PGD step. Returns the logits at the point that it leaves.

    The gradient with respect to the logits comes from margin_stats, not from a loss graph. The step writes the next
    forward's input: the same tensor, in the dtype and memory format that the images came in.
    """
    point = active.x_adv.detach().requires_grad_()
    logits = engine.forward(model, point)
    _check.model_output(logits, point.shape[0])
    half = logits.dtype == torch.float16
    z = logits.detach().float() if half else logits.detach()
    if pgd.loss == "ce" or track:
        prev = active.prev if track else None
        z_grad, _, max_step = _ops.margin_stats(
            z, active.y, prev, active.max_step if track else None, probs=False, want_hard=False
        )
    if track:
        active.prev, active.max_step = z, max_step if max_step.numel() else z.new_zeros(len(z)).float()
    if pgd.loss == "cw":
        z_grad = cw_gradient(z, active.y)
    if half:
        z_grad = _lifted(z_grad).to(logits.dtype)
    (grad,) = torch.autograd.grad(logits, point, z_grad)
    _ops.pgd_step_(
        active.x_adv, active.x, grad, None, None, active.eps, active.step_size, active.eps_rows,
        active.step_rows, 0.0, 1.0, pgd.norm == "l2",
    )  # fmt: skip
    return z


def _lifted(z_grad: Tensor) -> Tensor:
    """Each row scaled to a largest entry of 1, so that the gradient of a row that is right by far does not vanish.

    It is then as large as that of a row that is wrong by far, and overflows only where that would. Neither sign nor
    direction of a row's gradient depends on its scale.
    """
    return z_grad / z_grad.abs().amax(1, keepdim=True).clamp_min(1e-30)


def cw_gradient(z: Tensor, y: Tensor) -> Tensor:
    """d(max_{j != y} z_j - z_y)/dz = onehot(j*) - onehot(y), (n, classes); of equal largest others the first is j*.

    Compares instead of indexing: on CUDA the labels are judged only later, and a bad one must not reach an address.
    """
    column = torch.arange(z.shape[1], device=z.device)
    is_label = y[:, None] == column
    other = z.masked_fill(is_label, -torch.inf).argmax(1, keepdim=True)
    return (other == column).to(z.dtype) - is_label.to(z.dtype)


@torch.no_grad()
def take_look(model: nn.Module, active: ActiveSet, track: bool, engine: Engine) -> tuple[Tensor, Tensor]:
    """(hard flags, logits) at the current points; with `track` the step that led here counts too."""
    z = engine.forward(model, active.x_adv)
    _check.model_output(z, active.x_adv.shape[0])
    z = z.float() if z.dtype == torch.float16 else z
    _, hard, max_step = _ops.margin_stats(z, active.y, active.prev if track else None, active.max_step, probs=False)
    if track:
        active.prev, active.max_step = z, max_step
    return hard, z
