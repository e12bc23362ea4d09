"""The rows under attack, and one PGD step on them (Madry et al., "Towards deep learning models resistant ...")."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..common import checks, troubles
from ..engine import Engine, largest_entries
from ..ops import random_start

_ops = torch.ops.ham_kernels

LOSSES = ("ce", "cw", "kl", "target")


@dataclass(frozen=True)
class PGD:
    """Settings of an attack: budget eps and step size in units of the images (floats, or one value per row).

    loss is what the attack raises: "ce", the cross entropy; "cw", the margin max_{j != y} z_j - z_y (Carlini and
    Wagner, arXiv 1608.04644), whose gradient does not vanish where softmax saturates; "kl", the divergence
    KL(q || p) from the prediction q of the clean image (TRADES, arXiv 1901.08573), whose gradient is p - q; or
    "target", which lowers the cross entropy to a target, q - p. `target` is that target, or q in place of the clean
    prediction: one distribution per row.
    step_sizes replaces steps and step_size: one size per step, in units of eps.
    start: a perturbation of each row that the attack begins with, in place of a random one or none.
    patience: a row stays where the look before a step finds it wrong for the time number patience + 1; None: none
    stays. Its forwards go on, so that nothing is saved.
    """

    eps: float | Tensor = 8 / 255
    step_size: float | Tensor = 2 / 255
    steps: int = 10
    norm: str = "linf"
    random_start: bool = True
    loss: str = "ce"
    start_eps: float | None = None  # radius of the random start, where it is not eps
    step_sizes: tuple[float, ...] = ()
    target: Tensor | None = None  # (n, classes)
    patience: int | None = None
    start: Tensor | None = None  # (n, C, H, W)

    def __post_init__(self):
        if self.step_sizes:
            for size in self.step_sizes:
                checks.real("step_sizes", size)
            object.__setattr__(self, "steps", len(self.step_sizes))
        for name in ("eps", "step_size"):
            value = getattr(self, name)
            if not isinstance(value, Tensor):  # a tensor is checked against the batch that it belongs to
                checks.real(name, value)
        if self.norm == "linf" and not isinstance(self.eps, Tensor) and self.eps > 1:
            troubles.warn("large_eps", eps=self.eps)
        checks.integer("steps", self.steps, 0)
        checks.norm(self.norm)
        checks.flag("random_start", self.random_start)
        checks.choice("loss", self.loss, LOSSES)
        if self.start_eps is not None:
            checks.real("start_eps", self.start_eps)
        if self.patience is not None:
            checks.integer("patience", self.patience, 0)

    def share(self, first: int, last: int) -> float:
        """How far the steps first, ..., last - 1 (counted from 0) reach together, in step sizes; or in eps."""
        return math.fsum(self.step_sizes[first:last]) if self.step_sizes else float(last - first)


@dataclass
class ActiveSet:
    """The rows still under attack. `x_adv` moves in place; the other tensors stay."""

    x_adv: Tensor  # (n, C, H, W)
    x: Tensor  # (n, C, H, W), clean
    y: Tensor  # (n,)
    eps: float
    eps_rows: Tensor | None  # (n,) where eps differs from row to row
    step_size: float  # of the next step
    step_rows: Tensor | None
    batch: int  # rows of the whole batch, of which these are some
    track: bool = False  # whether steps keep the largest L1 change of the logits between consecutive points
    z: Tensor | None = None  # (n, classes), logits at the last point that was looked at
    prev: Tensor | None = None  # z, where steps are tracked and the next look is a step away
    max_step: Tensor | None = None  # (n,), maximum adversarial step size so far
    target: Tensor | None = None  # (n, classes), q of the losses "kl" and "target"
    right: Tensor | None = None  # (n,) fp32, at how many of its steps' points a row was right; None: not counted
    wrong: Tensor | None = None  # (n,) fp32, at how many of its steps' points a row was not right; None: not counted
    last_right: Tensor | None = None  # (n, C, H, W), the point before the first of these, x0 at least; None: not kept
    largest: Tensor | None = None  # (n,), largest |gradient| of the first step
    label_ce: Tensor | None = None  # (n,) fp32, cross entropy at a look that somebody took note of

    def named(self, index: Tensor) -> ActiveSet:
        """The named rows as an active set of their own, gathered once so that later steps are dense."""
        index = index.long()

        def pick(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[index]  # index_select would forget the memory format

        return replace(
            self, x_adv=pick(self.x_adv), x=pick(self.x), y=pick(self.y), eps_rows=pick(self.eps_rows),
            step_rows=pick(self.step_rows), max_step=pick(self.max_step), target=pick(self.target),
            right=pick(self.right), wrong=pick(self.wrong), last_right=pick(self.last_right),
            label_ce=pick(self.label_ce), largest=None, z=None,
            prev=None,  # the next forward is at the same point: there is no step to measure yet
        )  # fmt: skip


def begin(
    x: Tensor, y: Tensor, pgd: PGD, seed: int, step: int, track: bool = False, count_right: bool = False,
    first_row: int = 0, keep_right: bool = False,
) -> ActiveSet:  # fmt: skip
    """The starting points x0: random in the ball, or the images themselves.

    `first_row`: place of the first image in the global batch, whose rows' noise is named by their place there.
    """
    x = x.detach()
    eps, eps_rows = checks.per_row("eps", pgd.eps, x)
    step_size, step_rows = checks.per_row("step_size", pgd.step_size, x)
    if pgd.start is not None:
        x_adv = (x + pgd.start).clamp_(0, 1)
    elif pgd.random_start:
        radius = pgd.eps if pgd.start_eps is None else pgd.start_eps
        x_adv = random_start(x, radius, seed=seed, step=step, norm=pgd.norm, first_row=first_row)
    else:
        x_adv = x.clone()
    right = torch.zeros(len(y), device=x.device) if count_right else None
    wrong = torch.zeros(len(y), device=x.device) if keep_right or pgd.patience is not None else None
    return ActiveSet(
        x_adv, x, y, eps, eps_rows, step_size, step_rows, batch=len(y), track=track, right=right, wrong=wrong,
        last_right=x_adv.clone() if keep_right else None,
    )  # fmt: skip


def set_step_size(rows: ActiveSet, pgd: PGD, share: float) -> None:
    """The next step reaches as far as `share` step sizes (or eps, see PGD.share)."""
    if pgd.step_sizes:
        rows.step_size, rows.step_rows = share * rows.eps, None if rows.eps_rows is None else share * rows.eps_rows
    elif isinstance(pgd.step_size, Tensor):
        rows.step_rows = rows.step_rows * share
    else:
        rows.step_size = share * pgd.step_size


def take_step(model: nn.Module, rows: ActiveSet, pgd: PGD, engine: Engine, measure: bool = False) -> Tensor:
    """One PGD step. Returns the logits at the point that it leaves. `measure`: keeps the gradient's largest entries.

    The gradient with respect to the logits comes from margin_stats, not from a loss graph. The step writes the next
    forward's input: the same tensor, in the dtype and memory format that the images came in.
    """
    point = rows.x_adv.detach().requires_grad_()
    logits = engine.forward(model, point)
    checks.model_output(logits, point.shape[0])
    half = logits.dtype == torch.float16
    z = logits.detach().float() if half else logits.detach()
    counts = rows.right is not None or rows.wrong is not None
    if pgd.loss == "ce" or rows.track or counts:
        prev, largest = (rows.prev, rows.max_step) if rows.track else (None, None)
        z_grad, hard, max_step = _ops.margin_stats(z, rows.y, prev, largest, probs=False, want_hard=counts)
    if rows.right is not None:
        rows.right += ~hard  # in place, as captured steps need it
    if rows.wrong is not None:
        rows.wrong += hard
    if rows.last_right is not None:
        rows.last_right.copy_(torch.where(_of_images(rows.wrong == 0, point), point.detach(), rows.last_right))
    rows.z = z
    if rows.track:
        rows.prev, rows.max_step = z, max_step if max_step.numel() else z.new_zeros(len(z)).float()
    if pgd.loss == "cw":
        z_grad = cw_gradient(z, rows.y)
    elif pgd.loss == "kl":
        z_grad = (torch.softmax(z.float(), 1) - rows.target).to(z.dtype)
    elif pgd.loss == "target":
        z_grad = (rows.target - torch.softmax(z.float(), 1)).to(z.dtype)
    if half:
        z_grad = _lifted(z_grad).to(logits.dtype)
    if not logits.requires_grad:
        raise troubles.error("no_way_to_the_images")
    (grad,) = torch.autograd.grad(logits, point, z_grad)
    if measure:
        rows.largest = largest_entries(grad)
    before = None if pgd.patience is None else rows.x_adv.clone()
    _ops.pgd_step_(
        rows.x_adv, rows.x, grad, None, None, rows.eps, rows.step_size, rows.eps_rows, rows.step_rows, 0.0, 1.0,
        pgd.norm == "l2",
    )  # fmt: skip
    if before is not None:  # a step of size 0 could round, where it projects
        rows.x_adv.copy_(torch.where(_of_images(rows.wrong > pgd.patience, before), before, rows.x_adv))
    return z


def _of_images(flags: Tensor, images: Tensor) -> Tensor:
    """Flags of rows, so that they choose among images."""
    return flags.view(-1, *[1] * (images.dim() - 1))


@torch.no_grad()
def take_look(model: nn.Module, rows: ActiveSet, engine: Engine) -> tuple[Tensor, Tensor]:
    """(hard flags, logits) at the current points; where steps are tracked, the one that led here counts too."""
    z = engine.forward(model, rows.x_adv)
    checks.model_output(z, rows.x_adv.shape[0])
    z = z.float() if z.dtype == torch.float16 else z
    _, hard, max_step = _ops.margin_stats(z, rows.y, rows.prev if rows.track else None, rows.max_step, probs=False)
    rows.z = z
    if rows.track:
        rows.prev, rows.max_step = z, max_step
    return hard, z


@torch.no_grad()
def clean_prediction(model: nn.Module, x: Tensor, engine: Engine) -> tuple[Tensor, Tensor]:
    """(q = softmax of the logits at x in fp32, logits): the target of the loss "kl"."""
    z = engine.forward(model, x)
    checks.model_output(z, x.shape[0])
    return torch.softmax(z.float(), 1), z


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
