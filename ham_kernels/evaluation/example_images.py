"""A few images and what an attack makes of them, to be looked at."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .. import engine
from ..attack.pgd import PGD
from ..common import checks
from .class_accuracy import answers, correct_rows, logits_at
from .named_attacks import batches, resolve_device, walk

SHOWN = 10  # classes at most


class Examples(NamedTuple):
    rows: list[dict]  # JSON-ready, one per image
    x: np.ndarray  # (n, C, H, W) float16 in [0, 1]
    x_adv: np.ndarray  # likewise; the ball holds up to the rounding of float16


def examples(
    model: nn.Module, loader: Iterable, classes: Collection[int], *, steps: int = 20, eps: float = 8 / 255,
    step_size: float = 2 / 255, norm: str = "linf", device: torch.device | str | None = None, precision: str = "fp32",
    seed: int = 0,
) -> Examples:  # fmt: skip
    """One image of each class and its adversarial example, by PGD on the cross entropy from a random start.

    It is the first image of its class that the model classifies correctly without an attack, where none is the first
    of all. The loader is read until each class has its image, one forward of each image on the way.

    Args:
        model, loader, eps, step_size, norm, device, precision, seed: as in `evaluate`.
        classes: class numbers; of more than 10 ten evenly spaced ones are taken. One without images is left out.
        steps: >= 1, of the attack.
    Returns: `Examples` by rising class; each row is {"label", "answer" and its "probability" (softmax, in [0, 1])
        without an attack, "answer_adv", "probability_adv" at the adversarial example}. A tie is answered wrong.
    Raises: TypeError, ValueError naming the argument.
    """
    pgd = PGD(eps, step_size, checks.integer("steps", steps, 1), norm)
    checks.choice("precision", precision, engine.JUDGING_PRECISIONS)
    numbers = sorted(set(classes))
    spaced = np.linspace(0, len(numbers) - 1, min(SHOWN, len(numbers))).round().astype(int)
    device = resolve_device(model, device)
    with engine.attack_mode(model):
        chosen = _chosen(model, loader, {numbers[i] for i in spaced}, device, precision)
        x, y = torch.stack(list(chosen.values())), torch.tensor(list(chosen), device=device)
        attack, at = walk(model, x, y, pgd, seed=seed, batch=0, precision=precision)
        clean, adv = _answered(logits_at(model, x, precision), y), _answered(at[steps], y)
    names = ("label", "answer", "probability", "answer_adv", "probability_adv")
    rows = [dict(zip(names, row, strict=True)) for row in zip(chosen, *clean, *adv, strict=True)]
    return Examples(rows, *(t.half().cpu().numpy() for t in (x, attack.rows.x_adv)))


def _chosen(
    model: nn.Module, loader: Iterable, wanted: set[int], device: torch.device, precision: str
) -> dict[int, Tensor]:
    """{class: image (C, H, W)} by rising class."""
    first: dict[int, Tensor] = {}
    right: dict[int, Tensor] = {}
    for _, x, y in batches(loader, device):
        guard = engine.BatchGuard(x, y)
        z = logits_at(model, x, precision)
        guard.logits(z)
        guard.read()
        for i, (label, correct) in enumerate(zip(y.tolist(), correct_rows(z, y).tolist(), strict=True)):
            for found in (first, right) if correct else (first,):
                if label in wanted and label not in found:
                    found[label] = x[i].clone()  # a view would keep its whole batch
        if len(right) == len(wanted):
            break
    if not first:
        raise ValueError(f"classes: got {sorted(wanted)}; the loader has no image of them")
    return {c: right.get(c, first[c]) for c in sorted(first)}


def _answered(z: Tensor, y: Tensor) -> tuple[list[int], list[float]]:
    answer = answers(z, y, correct_rows(z, y))
    return answer.tolist(), torch.softmax(z.float(), dim=1).gather(1, answer[:, None])[:, 0].tolist()
