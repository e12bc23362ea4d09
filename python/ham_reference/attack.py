"""One batch under attack, with every number that a method takes from it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from .losses import row_divergence
from .method import column, evaluating, is_hard, margin, pgd_step, project, start_point


@dataclass
class Attacked:
    """All rows of a batch, each attacked as far as its method lets it."""

    x_adv: Tensor  # (n, C, H, W)
    hard: Tensor  # (n,) bool: wrong at the last point at which all rows are seen
    seen: Tensor  # (n, classes), logits at that point: x^M where rows are screened, else x^(K-1)
    q: Tensor | None  # (n, classes), prediction of the clean images, which the attack on the KL raises from
    right_looks: Tensor  # (n,) how often of x^0, ..., x^(K-1) the row was right; K where it left at x^M
    max_step: Tensor  # (n,) largest L1 change of the logits between points that were looked at
    last_right: Tensor | None = None  # (n, C, H, W) the last point before the first wrong look; x^0 where that is wrong
    least_margin: float = math.inf  # the nearest that a label was to a tie, at any look


def attack(
    model, x, y, *, eps, step_size, steps, norm, seed, step, step_sizes=(), raises="ce", early_drop=False,
    easy="drop", screen_steps=3, target=None, patience=None,
):  # fmt: skip
    """K steps of PGD in eval mode that raise the cross entropy ("ce") or KL(q || p) ("kl"), lower it to a "target",
    or raise the largest other logit less the label's ("cw").

    target (n, classes) is that target; with "kl" it is q, in place of the prediction of the clean images. A row moves
    no further once it was wrong at more than `patience` looks.

    All rows take all steps: rows do not meet in eval mode, so those that would have left are put back to where they
    leave. eps and step_size are numbers, or (n,); step_sizes, in units of eps, replace steps and step_size.
    """
    sizes = [size * eps for size in step_sizes] or [step_size] * steps
    with evaluating(model):
        q = target
        if raises == "kl" and target is None:
            with torch.no_grad():
                q = F.softmax(model(x).float(), 1)
        points, looks = [start_point(x, eps, norm, seed, step)], []  # x^0, ..., x^K; f(x^0), ..., f(x^(K-1))
        for size in sizes:
            z, gradient = gradient_of(model, points[-1], y, q, raises)
            looks.append(z)
            moved = pgd_step(points[-1], x, gradient, eps, size, norm)
            if patience is not None:
                stays = sum(is_hard(z, y).long() for z in looks) > patience
                moved = torch.where(column(stays), points[-1], moved)
            points.append(moved)
    moves = [(after - before).abs().sum(1) for before, after in pairwise(looks)] or [x.new_zeros(len(x))]
    right = [(~is_hard(z, y)).long() for z in looks]
    x_adv, max_step, right_looks = points[-1], torch.stack(moves).amax(0), torch.stack(right).sum(0)
    least_margin = min(margin(z, y).abs().min().item() for z in looks)
    last_right = x_adv.clone()
    for row in range(len(x)):
        turned = [k for k, at in enumerate(right) if not at[row]]
        if turned:
            last_right[row] = points[max(turned[0] - 1, 0)][row]
    whole = Attacked(x_adv, is_hard(looks[-1], y), looks[-1], q, right_looks, max_step, last_right, least_margin)
    if not early_drop:
        return whole

    m = screen_steps
    hard = is_hard(looks[m], y)
    left = points[m]
    if easy == "jump":  # as far as the steps that are left would reach along the last one
        left = project(left + reach(sizes[m:]) / reach(sizes[m - 1 : m]) * (left - points[m - 1]), x, eps, norm)
    return replace(
        whole, hard=hard, seen=looks[m], x_adv=torch.where(column(hard), x_adv, left),
        max_step=torch.where(hard, max_step, torch.stack(moves[:m]).amax(0)),
        right_looks=torch.where(hard, right_looks, len(sizes)), last_right=torch.where(column(hard), last_right, left),
    )  # fmt: skip


def gradient_of(model, x_adv, y, q, raises):
    """(logits, gradient of the attack's loss with respect to the images)."""
    x_adv = x_adv.detach().requires_grad_()
    logits = model(x_adv).float()
    if raises == "kl":
        of_rows = row_divergence(q, logits)
    elif raises == "cw":
        of_rows = -margin(logits, y)
    elif raises == "target":
        of_rows = (q * F.log_softmax(logits, 1)).sum(1)
    else:
        of_rows = F.cross_entropy(logits, y, reduction="none")
    (gradient,) = torch.autograd.grad(of_rows.sum(), x_adv)
    return logits.detach(), gradient


def reach(sizes):
    """Length of several steps together; where rows have sizes of their own, any row tells their ratio."""
    return sum(float(size.flatten()[0]) if isinstance(size, Tensor) else size for size in sizes)
