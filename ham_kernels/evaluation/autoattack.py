"""AutoAttack, standard version (Croce and Hein, arXiv 2003.01690), by its authors' package, pyautoattack.

The parts search one after another, each among the images that still stand; the package is asked for examples alone.
Every verdict is the plain model's, at an example brought back into the ball. A fast search (`engine.fast`) looks for
examples on a rounded, compiled form of the model. Where that form takes an image for lost and the plain model does not,
the part searches once more on the plain model, so that rounding makes no image robust.

What has to be put right around pyautoattack 0.2: it seeds torch's global generator, asks for more targets than a model
of few classes has, and logs what is no news here.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import engine
from ..attack.pgd import PGD
from ..common import checks
from ..ops import l2
from .class_accuracy import answers, correct_rows

Logits = Callable[[Tensor], Tensor]

NAMES = ("apgd", "autoattack")  # apgd: the parts of that name, an upper bound of what AutoAttack leaves
STEPS = 100
TARGETS = 9
QUERIES = 5000
L2_SIDE = 5  # Square tiles images with a fifth of their height


def library() -> ModuleType:
    """pyautoattack, or an ImportError that says how to get it."""
    try:
        return importlib.import_module("pyautoattack")
    except ImportError as error:
        raise ImportError(
            f'attacks: "autoattack" and "apgd" need pyautoattack ({error}); pip install "ham_kernels[autoattack]"'
        ) from error


def parts(name: str, classes: int) -> tuple[str, ...]:
    """What runs, in this order. The DLR loss compares three logits, its targeted form four."""
    dlr = ("apgd-t",) if classes >= 4 else ("apgd-dlr",) if classes == 3 else ()
    return ("apgd-ce", *dlr, *(("fab-t", "square") if name == "autoattack" else ()))


def settings() -> dict:
    """What decides its flags besides the budget; JSON-ready."""
    return {
        "version": "standard", "steps": STEPS, "targets": TARGETS, "queries": QUERIES,
        "pyautoattack": importlib.metadata.version(library().__name__),
    }  # fmt: skip


class Judged(NamedTuple):
    correct: Tensor  # (n,) bool, the rows that survive
    answers: Tensor  # (n,) int64, the class at the example that took a row; without one the clean image's
    classes: int  # that the model knows
    lost: dict[str, int]  # rows that each part took


def survivors(
    model: nn.Module, x: Tensor, y: Tensor, pgd: PGD, *, name: str, seed: int, precision: str,
    search: engine.Engine | None = None,
) -> Judged:  # fmt: skip
    """Which rows survive AutoAttack or its APGD parts; model in attack_mode.

    Rows that the model gets wrong without an attack are not attacked: they are lost already.
    """
    guard = engine.BatchGuard(x, y)

    @torch.no_grad()
    def right(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, int]:
        z = _plain(model, precision)(x)
        checks.model_output(z, x.shape[0])
        guard.logits(z)
        correct = correct_rows(z, y)
        return correct, answers(z, y, correct), z.shape[1]

    correct, answer, classes = right(x, y)
    guard.read()
    _check_problem(x, classes, pgd)
    lost = {}
    for part in parts(name, classes) if pgd.eps > 0 else ():
        rows = correct.nonzero()[:, 0]
        if not len(rows):
            break
        clean, labels = x[rows].float().contiguous(), y[rows]
        with _searching(model, clean, precision, search) as logits:
            x_adv = examples(part, logits, clean, labels, classes, pgd, seed)
            disputed = None if search is None else _taken_for_lost(logits, clean, labels, x_adv)
        still, now, _ = right(projected(x_adv, clean, pgd), labels)
        if disputed is not None and (again := (still & disputed).nonzero()[:, 0]).numel():
            x_adv = examples(part, _plain(model, precision), clean[again], labels[again], classes, pgd, seed)
            still[again], now[again], _ = right(projected(x_adv, clean[again], pgd), labels[again])
        guard.read()
        correct[rows], answer[rows], lost[part] = still, now, int((~still).sum())
    return Judged(correct, answer, classes, lost)


def examples(part: str, logits: Logits, x: Tensor, y: Tensor, classes: int, pgd: PGD, seed: int) -> Tensor:
    """The adversarial examples that one part finds; a row that it could not turn comes back as it was."""
    targets = min(TARGETS, classes - 1)
    norm = "L2" if pgd.norm == "l2" else "Linf"
    attack = library().AutoAttack(logits, norm=norm, eps=pgd.eps, seed=seed, version="standard", device=x.device)
    search = {"apgd-t": attack.apgd_targeted, "fab-t": attack.fab, "square": attack.square}.get(part, attack.apgd)
    search.seed = seed
    if part == "square":
        search.n_queries = QUERIES
    else:
        search.n_iter, search.n_target_classes, search.targeted = STEPS, targets, part == "fab-t"
    if part.startswith("apgd"):
        search.loss = {"apgd-ce": "ce", "apgd-dlr": "dlr", "apgd-t": "dlr-targeted"}[part]
    with _own_generators(x.device), _quiet(attack.logger):
        return search.perturb(x, y).detach()


def projected(x_adv: Tensor, x: Tensor, pgd: PGD) -> Tensor:
    """Into the ball and [0, 1], if only for the last rounding: what lies outside is no adversarial example."""
    delta = (x_adv - x).nan_to_num(0.0)
    delta = l2.shorten(delta, pgd.eps) if pgd.norm == "l2" else delta.clamp(-pgd.eps, pgd.eps)
    return (x + delta).clamp(0.0, 1.0)


@torch.no_grad()
def _taken_for_lost(logits: Logits, x: Tensor, y: Tensor, x_adv: Tensor) -> Tensor:
    """(n,) bool: the rows that the searched model gets wrong without an attack, or that it gave an example for."""
    return ~correct_rows(logits(x), y) | (x_adv != x).flatten(1).any(1)


@contextmanager
def _searching(model: nn.Module, x: Tensor, precision: str, search: engine.Engine | None) -> Iterator[Logits]:
    """What the parts ask, fp32 logits with a gradient to the images."""
    if search is None:
        yield _plain(model, precision)
        return
    search.place(model, x)
    with search.attacking(model):
        yield engine.logits_of(model, search, len(x))


def _plain(model: nn.Module, precision: str) -> Logits:
    def logits(x: Tensor) -> Tensor:
        with engine.autocast(precision, x.device):
            return model(x).float()

    return logits


def _check_problem(x: Tensor, classes: int, pgd: PGD) -> None:
    if x.dtype != torch.float32:
        raise TypeError(
            f"x: got {str(x.dtype).removeprefix('torch.')}; AutoAttack needs images and weights in float32, and "
            'precision="bf16" where the model is to be judged in bf16'
        )
    if x.dim() != 4:
        raise ValueError(f"x: got shape {tuple(x.shape)}; AutoAttack needs images (n, channels, height, width)")
    if classes < 2:
        raise ValueError(f"model: knows {classes} class; there is nothing to attack")
    if pgd.norm == "l2" and x.shape[2] < L2_SIDE:
        raise ValueError(f"x: got images {x.shape[2]} high; Square under l2 needs at least {L2_SIDE}")


@contextmanager
def _own_generators(device: torch.device) -> Iterator[None]:
    """torch's global generators inside are a copy."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


@contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    """It warns of points without a gradient, once per target; `masking` and `no_gradient` of PGD tell of them."""
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
