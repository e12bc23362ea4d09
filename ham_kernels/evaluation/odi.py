"""ODI: many restarts of PGD on the margin, each from where a random direction of the logits leads.

Output Diversified Initialisation (Tashiro, Song and Ermon, NeurIPS 2020, arXiv 2003.06878), as A3 goes on with it (Liu
et al., CVPR 2022, arXiv 2203.05154): each restart prefers one wrong class, and steps fall from eps by a cosine. A3's
statistics of directions, its tables per data set and its discarding of rows that seem hopeless are left out, so that
this is not A3. A row leaves as soon as it is lost, so that later restarts cost little.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import engine
from ..attack.pgd import PGD
from ..common import checks
from ..engine import largest_entries
from ..ops import random_start
from .class_accuracy import answers, correct_rows, logits_at

_ops = torch.ops.ham_kernels

DIRECTED, STEPS = 7, 25  # steps along a direction, each of eps; steps on the margin
SMALLEST = 0.001  # step, in units of eps, that the cosine falls to
PREFERENCE = 0.8  # weight of the wrong class that a restart prefers, in tenths of the number of classes
OWN = (-0.5, 0.1)  # from and to which the weight of the label is drawn, in the same unit


def settings() -> dict:
    """What decides its flags besides the budget and the restarts; JSON-ready."""
    return {
        "directed": DIRECTED, "steps": STEPS, "smallest": SMALLEST, "preference": PREFERENCE, "own": list(OWN),
    }  # fmt: skip


class Judged(NamedTuple):
    correct: Tensor  # (n,) bool, the rows that survive
    answers: Tensor  # (n,) int64, the class at the example that took a row, else the label
    classes: int  # that the model knows
    no_gradient: int  # rows whose margin had no gradient at its first step


def survivors(
    model: nn.Module, x: Tensor, y: Tensor, pgd: PGD, restarts: int, *, seed: int, batch: int, stride: int,
    precision: str, search: engine.Engine | None = None,
) -> Judged:  # fmt: skip
    """Which rows survive; model in attack_mode. Every verdict is the plain model's.

    Noise and directions of a row depend on its place in the batch, not on which others are left. `stride`: what tells
    the noise of restarts apart, more than there are batches.
    """
    guard = engine.BatchGuard(x, y)
    z = logits_at(model, x, precision)
    guard.logits(z)
    guard.read()
    classes = z.shape[1]
    correct = correct_rows(z, y)
    answer = answers(z, y, correct)
    others = z.masked_fill(y[:, None] == torch.arange(classes, device=z.device), -torch.inf).argsort(1, descending=True)
    blind = 0
    for restart in range(restarts if pgd.eps > 0 and classes > 1 else 0):
        rows = correct.nonzero()[:, 0]
        if not len(rows):
            break
        step = batch + restart * stride
        preferred = others[:, (restart - 1) % (classes - 1)] if restart else None
        toward = _directions(y, preferred, classes, seed, step)[rows]
        begun = random_start(x, pgd.eps, norm=pgd.norm, seed=seed, step=step)[rows]
        walk = _Walk(model, x[rows], y[rows], begun, toward, pgd, search or engine.plain(precision))
        blind = blind if restart else walk.blind
        right, now = _verdict(model, walk.points, y[rows], precision, guard)
        if search is not None and (again := (right & ~walk.resisted).nonzero()[:, 0]).numel():
            # the form searched on took them for lost, and so they were not attacked to the end
            at = rows[again]
            walk = _Walk(model, x[at], y[at], begun[again], toward[again], pgd, engine.plain(precision))
            right[again], now[again] = _verdict(model, walk.points, y[at], precision, guard)
        correct[rows], answer[rows] = right, now
    guard.read()
    return Judged(correct, answer, classes, blind)


def _verdict(
    model: nn.Module, x_adv: Tensor, y: Tensor, precision: str, guard: engine.BatchGuard
) -> tuple[Tensor, Tensor]:
    """Flags and answers of the plain model."""
    z = logits_at(model, x_adv, precision)
    guard.logits(z)
    right = correct_rows(z, y)
    return right, answers(z, y, right)


def _directions(y: Tensor, preferred: Tensor | None, classes: int, seed: int, step: int) -> Tensor:
    """(n, classes), weights of the logits: random, but for the preferred class and the label."""
    draw = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
    toward = 2 * torch.rand(len(y), classes, generator=draw, device="cpu") - 1
    own = OWN[0] + (OWN[1] - OWN[0]) * torch.rand(len(y), generator=draw, device="cpu")
    toward, own = toward.to(y.device), own.to(y.device)
    if preferred is not None:
        toward.scatter_(1, y[:, None], own[:, None] * classes / 10)
        toward.scatter_(1, preferred[:, None], PREFERENCE * classes / 10)
    return toward


class _Walk:
    """One restart of some rows, to its end; a row that the model searched on takes for another class stops there."""

    def __init__(
        self, model: nn.Module, x: Tensor, y: Tensor, x_adv: Tensor, toward: Tensor, pgd: PGD, by: engine.Engine
    ):
        self.points = x_adv.clone()  # where each row stopped
        self.resisted = torch.ones_like(y, dtype=torch.bool)
        self.blind = 0  # rows whose margin had no gradient at its first step
        self._left = torch.arange(len(y), device=y.device)
        # before the weights are rounded: those that it moves are the model's own
        self._x, self._y, self._toward = by.place(model, x), y, toward
        self._x_adv = by.place(model, x_adv)
        with by.attacking(model):
            logits = engine.logits_of(model, by, len(x))
            for k in range(DIRECTED + STEPS):
                if len(self._left):
                    self._step(logits, pgd, k)
            self.points[self._left] = self._x_adv.to(self.points.dtype)

    def _step(self, logits: Callable[[Tensor], Tensor], pgd: PGD, k: int) -> None:
        point = self._x_adv.detach().requires_grad_()
        asked = logits(point)
        checks.model_output(asked, len(point))
        z = asked.detach()
        (grad,) = torch.autograd.grad(asked, point, self._toward if k < DIRECTED else _margin_gradient(z, self._y))
        if k == DIRECTED:
            self.blind = int(engine.no_gradient(largest_entries(grad)).sum())
        stay = correct_rows(z, self._y)
        if not stay.all():
            grad = grad[stay]
            self._leave(stay)
        _ops.pgd_step_(
            self._x_adv, self._x, grad, None, None, pgd.eps, pgd.eps * _size(k), None, None, 0.0, 1.0, pgd.norm == "l2"
        )

    def _leave(self, stay: Tensor) -> None:
        gone = self._left[~stay]
        self.points[gone] = self._x_adv[~stay].to(self.points.dtype)
        self.resisted[gone] = False
        for name in ("_x", "_y", "_x_adv", "_toward", "_left"):
            setattr(self, name, getattr(self, name)[stay])


def _size(k: int) -> float:
    """Of a step, in units of eps."""
    if k < DIRECTED:
        return 1.0
    falls = (1 + math.cos(math.pi * (k - DIRECTED) / (STEPS + 1))) / 2
    return SMALLEST + (1 - SMALLEST) * falls


def _margin_gradient(z: Tensor, y: Tensor) -> Tensor:
    """Of max_{j != y} z_j - z_y by the logits."""
    is_label = y[:, None] == torch.arange(z.shape[1], device=z.device)
    best = z.masked_fill(is_label, -torch.inf).argmax(1, keepdim=True)
    return torch.zeros_like(z).scatter_(1, best, 1.0).masked_fill_(is_label, -1.0)
