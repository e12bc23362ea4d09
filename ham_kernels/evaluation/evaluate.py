"""What a model is worth, class by class: clean accuracy and accuracy under attack."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from .. import engine
from ..common import checks
from .class_accuracy import ClassAccuracy, summary
from .named_attacks import batches, plans, resolve_device, survivors

__all__ = ["ClassAccuracy", "evaluate"]


def evaluate(
    model: nn.Module, loader: Iterable, attacks: Sequence[str] = ("clean", "pgd20"), *, eps: float = 8 / 255,
    step_size: float = 2 / 255, norm: str = "linf", device: torch.device | str | None = None,
    precision: str = "fp32", seed: int = 0, restarts: int = 1,
) -> dict[str, ClassAccuracy]:  # fmt: skip
    """Accuracy of a model over a data set, for each attack. The model is in eval mode and left as it was.

    Args:
        model: classifier, images (n, C, H, W) in [0, 1] -> logits (n, classes).
        loader: any iterable of (x in [0, 1], y).
        attacks: "clean"; "fgsm", one step of eps from the image itself; "pgdK" for K steps of PGD on the cross
            entropy from a random start ("pgd20"), "cwK" for the same on the margin loss; "autoattack", the standard
            version (arXiv 2003.01690), which needs torchattacks. Every image gets all K steps and is judged at the
            last point.
        eps, step_size, norm: of the attacks, in units of the images. AutoAttack chooses its own steps.
        device: where to run; None takes the model's.
        precision: "fp32", or "bf16" or "fp16" (autocast); AutoAttack takes no fp16.
        seed: of the random starts; batch b draws the same noise in every call.
        restarts: random starts of "pgdK" and "cwK"; an image is lost when any of them turns it.
    Returns: {attack: ClassAccuracy}.
    Raises: TypeError, ValueError naming the argument; ImportError for "autoattack" without torchattacks.
    """
    wanted = plans(attacks, eps=eps, step_size=step_size, norm=norm, restarts=restarts)
    autoattack = any(plan.is_autoattack for plan in wanted.values())  # whose losses would vanish in fp16
    checks.choice("precision", precision, engine.JUDGING_PRECISIONS if autoattack else engine.PRECISIONS)
    device = resolve_device(model, device)
    flags: dict[str, list[Tensor]] = {name: [] for name in wanted}
    labels, classes = [], 0
    with engine.attack_mode(model):
        for b, x, y in batches(loader, device):
            labels.append(y)
            for name, plan in wanted.items():
                correct, classes = survivors(model, x, y, plan, seed=seed, batch=b, precision=precision)
                flags[name].append(correct)
    y = torch.cat(labels).cpu()
    return {name: summary(torch.cat(parts).cpu(), y, classes) for name, parts in flags.items()}
