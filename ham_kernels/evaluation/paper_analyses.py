"""The paper's own looks at adversarial examples: over-confident ones, and easy ones that stay easy."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

import torch
from torch import Tensor, nn

from .. import engine
from ..attack.pgd import PGD
from ..common import checks
from .named_attacks import batches, resolve_device, walk

_ops = torch.ops.ham_kernels


def confidence(
    model: nn.Module, loader: Iterable, *, steps: int = 20, eps: float = 8 / 255, step_size: float = 2 / 255,
    norm: str = "linf", threshold: float = 0.9, bins: int = 20, device: torch.device | str | None = None,
    precision: str = "fp32", seed: int = 0,
) -> dict:  # fmt: skip
    """How sure a model is of the adversarial examples of each class (arXiv 2308.01823, Figure 3).

    An AE is over-confident when the model gives its true class a softmax probability of `threshold` or more: the
    attack got nowhere near. It is wrong with confidence when another class gets that much.

    Args:
        model, loader, eps, step_size, norm, device, precision, seed: as in `evaluate`.
        steps: of one PGD attack with a random start.
        threshold: in (0.5, 1], so that at most one class can reach it.
        bins: of the histograms, equal widths from 0 to 1.
    Returns: JSON-ready {"threshold", "steps", "edges": [bins + 1], "classes", "n": images per class,
        "overconfident": share of each class's AEs, "overconfident_all", "wrong_confident", "wrong_confident_all",
        "histogram": AEs of each class by their true class's probability, "histogram_all"}; None is the share of a
        class without images.
    Raises: TypeError, ValueError naming the argument.
    """
    pgd = PGD(eps, step_size, checks.integer("steps", steps, 1), norm)
    if checks.real("threshold", threshold, 0.5, 1.0) == 0.5:
        raise ValueError("threshold: got 0.5; it must be more, so that only one class can reach it")
    checks.integer("bins", bins, 1)
    checks.choice("precision", precision, engine.JUDGING_PRECISIONS)
    own, highest, wrong, labels = [], [], [], []
    with engine.attack_mode(model):
        for y, at in _walks(model, loader, pgd, (), device, precision, seed):
            p = torch.softmax(at[steps].float(), dim=1)
            own.append(p.gather(1, y[:, None])[:, 0])
            top = p.max(1)
            highest.append(top.values)
            wrong.append(top.indices != y)
            labels.append(y)
            classes = p.shape[1]
    p, y = torch.cat(own).cpu(), torch.cat(labels).cpu()
    sure_and_wrong = (torch.cat(wrong) & (torch.cat(highest) >= threshold)).cpu()
    column = (p.double() * bins).long().clamp_max(bins - 1)  # a probability of 1 belongs to the last bin
    histogram = torch.bincount(y * bins + column, minlength=classes * bins).view(classes, bins)
    total = torch.bincount(y, minlength=classes).tolist()
    overconfident, wrong_confident = _by_class(p >= threshold, y, classes), _by_class(sure_and_wrong, y, classes)
    return {
        "threshold": threshold, "steps": steps, "edges": [i / bins for i in range(bins + 1)], "classes": classes,
        "n": total, "overconfident": _shares(overconfident, total),
        "overconfident_all": sum(overconfident) / len(y), "wrong_confident": _shares(wrong_confident, total),
        "wrong_confident_all": sum(wrong_confident) / len(y), "histogram": histogram.tolist(),
        "histogram_all": histogram.sum(0).tolist(),
    }  # fmt: skip


def easy_stays_easy(
    model: nn.Module, loader: Iterable, *, steps: int = 10, eps: float = 8 / 255, step_size: float = 2 / 255,
    norm: str = "linf", device: torch.device | str | None = None, precision: str = "fp32", seed: int = 0,
) -> dict:  # fmt: skip
    """Of the images that resist the first M steps of an attack, how many resist all K (arXiv 2308.01823).

    The paper: "75 % of the AEs that fail to attack within the first M = 3 steps cannot attack successfully in the
    end". Easy at step k means what HAM's screening means by it: at x^k the true logit is strictly the largest.

    Args:
        model, loader, eps, step_size, norm, device, precision, seed: as in `evaluate`.
        steps: K >= 2, of one PGD attack with a random start; every image gets all of them.
    Returns: JSON-ready {"steps": K, "n", "classes", "easy": images easy at x^0 .. x^K, "by_m": [{"m",
        "easy": images easy at x^m, "easy_fraction", "stay": of these, those easy at x^K, "stay_share",
        "per_class": stay_share of each class} for m = 1 .. K-1]}; None is the share of no images.
    Raises: TypeError, ValueError naming the argument.
    """
    pgd = PGD(eps, step_size, checks.integer("steps", steps, 2), norm)
    checks.choice("precision", precision, engine.JUDGING_PRECISIONS)
    flags, labels = [], []
    with engine.attack_mode(model):
        for y, at in _walks(model, loader, pgd, range(steps), device, precision, seed):
            hard = [_ops.margin_stats(at[k], y, None, None, probs=False)[1] for k in range(steps + 1)]
            flags.append(~torch.stack(hard, dim=1))
            labels.append(y)
            classes = at[0].shape[1]
    easy, y = torch.cat(flags).cpu(), torch.cat(labels).cpu()  # (n, K + 1)
    return {
        "steps": steps, "n": len(y), "classes": classes, "easy": easy.sum(0).tolist(),
        "by_m": [{"m": m, **_stay(easy[:, m], easy[:, steps], y, classes)} for m in range(1, steps)],
    }  # fmt: skip


def _stay(easy: Tensor, easy_at_end: Tensor, y: Tensor, classes: int) -> dict:
    of, stay = _by_class(easy, y, classes), _by_class(easy & easy_at_end, y, classes)
    return {
        "easy": sum(of), "easy_fraction": sum(of) / len(y), "stay": sum(stay),
        "stay_share": _share(sum(stay), sum(of)), "per_class": _shares(stay, of),
    }  # fmt: skip


def _walks(
    model: nn.Module, loader: Iterable, pgd: PGD, look_at: Collection[int], device, precision: str, seed: int
) -> Iterator[tuple[Tensor, dict[int, Tensor]]]:
    """(labels, {k: logits at x^k}) of each batch, its data already judged; the model must be in attack_mode."""
    for b, x, y in batches(loader, resolve_device(model, device)):
        _, at = walk(model, x, y, pgd, seed=seed, batch=b, precision=precision, look_at=look_at)
        yield y, at


def _by_class(flags: Tensor, y: Tensor, classes: int) -> list[int]:
    return torch.bincount(y[flags], minlength=classes).tolist()


def _share(part: int, of: int) -> float | None:
    return part / of if of else None


def _shares(parts: list[int], of: list[int]) -> list[float | None]:
    return [_share(p, n) for p, n in zip(parts, of, strict=True)]
