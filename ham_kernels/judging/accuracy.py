"""What a model is worth, class by class: clean accuracy and accuracy under attack."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import _check, engine
from ..attack import PGD, advance, begin


@dataclass(frozen=True)
class ClassAccuracy:
    """Accuracies in [0, 1]; also readable by key, as in result["worst_class"]."""

    accuracy: float  # over all images
    per_class: tuple[float, ...]  # NaN for a class without images
    worst_class: float  # smallest of per_class
    std: float  # standard deviation over the classes (population)
    n: int  # images

    def __getitem__(self, key: str):
        if key not in self.__dataclass_fields__:
            raise KeyError(key)
        return getattr(self, key)


def evaluate(
    model: nn.Module, loader: Iterable, attacks: Sequence[str] = ("clean", "pgd20"), *, eps: float = 8 / 255,
    step_size: float = 2 / 255, norm: str = "linf", device: torch.device | str | None = None,
    precision: str = "fp32", seed: int = 0,
) -> dict[str, ClassAccuracy]:  # fmt: skip
    """Accuracy of a model over a data set, for each attack. The model is in eval mode and left as it was.

    Args:
        model: classifier, images (n, C, H, W) in [0, 1] -> logits (n, classes).
        loader: any iterable of (x in [0, 1], y).
        attacks: "clean", or "pgdK" for K steps of PGD from a random start ("pgd20"); every image is attacked with
            all K steps and judged at the last point.
        eps, step_size, norm: of the attacks, in units of the images.
        device: where to run; None takes the model's.
        seed: of the random starts; batch b draws the same noise in every call.
    Returns: {attack: ClassAccuracy}.
    Raises: TypeError, ValueError naming the argument.
    """
    plans = {name: _plan(name, eps, step_size, norm) for name in attacks}
    if not plans:
        raise ValueError('attacks: got none; give at least one, such as ("clean", "pgd20")')
    _check.choice("precision", precision, engine.PRECISIONS)
    device = torch.device(device) if device is not None else engine.model_device(model) or torch.device("cpu")
    tallies: dict[str, list[Tensor]] = {name: [] for name in plans}
    b = -1
    with engine.attack_mode(model):
        for b, (x, y) in enumerate(loader):
            _check.batch(x, y)
            x, y = x.to(device), y.to(device)
            for name, pgd in plans.items():
                z = _logits_under(model, x, y, pgd, seed, b, precision)
                tallies[name].append(_count(z, y))
    if b < 0:
        raise ValueError("loader: gave no batch")
    return {name: _summary(torch.stack(tally).sum(0)) for name, tally in tallies.items()}


def _plan(name: str, eps: float, step_size: float, norm: str) -> PGD:
    if name == "clean":
        return PGD(0.0, 0.0, 0, norm, random_start=False)
    match = re.fullmatch(r"pgd([1-9]\d*)", name) if isinstance(name, str) else None
    if match is None:
        raise ValueError(f"attacks: got {name!r}; allowed are 'clean' and 'pgdK' such as 'pgd20'")
    return PGD(_check.real("eps", eps), _check.real("step_size", step_size), int(match[1]), norm)


def _logits_under(model, x: Tensor, y: Tensor, pgd: PGD, seed: int, step: int, precision: str) -> Tensor:
    guard = engine.BatchGuard(x, y)
    active = begin(x, y, pgd, seed, step)
    advance(model, active, pgd.steps, pgd, guard, precision=precision)
    with torch.no_grad(), engine.autocast(precision, x.device):
        z = model(active.x_adv)
    _check.model_output(z, x.shape[0])
    guard.logits(z)
    guard.read()
    return z


def _count(z: Tensor, y: Tensor) -> Tensor:
    """(2, classes): correct ones and all, per class."""
    correct = (z.argmax(1) == y).double()
    return torch.stack([torch.bincount(y, w, minlength=z.shape[1]) for w in (correct, torch.ones_like(correct))])


def _summary(tally: Tensor) -> ClassAccuracy:
    correct, total = tally.cpu()
    per_class = correct / total  # 0/0 is NaN: the class has no images
    present = per_class[total > 0]
    return ClassAccuracy(
        accuracy=float(correct.sum() / total.sum()),
        per_class=tuple(per_class.tolist()),
        worst_class=float(present.min()),
        std=float(present.std(correction=0)),
        n=int(total.sum()),
    )
