"""Training on all folds of the training images but one, and judging that one by a strong attack."""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from torch import Tensor, nn

from ham_kernels import data
from ham_kernels.commands.from_settings import loaders_of, model_of, scheduler_of, trainer_of
from ham_kernels.common.troubles import HamWarning
from ham_kernels.runs.settings import TrainSettings

STEPS, LAST_STEP = 25, 0.05  # of the attack; its last step, in units of eps


def folds_of(images: data.ImageSet, folds: int) -> Tensor:
    """(n,) the fold of each training image: of each class as many as of any other, one more at most."""
    g = torch.Generator().manual_seed(0)
    fold = torch.empty(len(images.y_train), dtype=torch.int64)
    for c in range(len(images.classes)):
        rows = (images.y_train == c).nonzero().squeeze(1)
        fold[rows[torch.randperm(len(rows), generator=g)]] = torch.arange(len(rows)) % folds
    return fold


def train_and_judge(settings: TrainSettings, images: data.ImageSet, held_out: Tensor) -> dict:
    """One training without the images held out: who resists among those, by class; the share of hard rows."""
    kept = replace(images, x_train=images.x_train[~held_out], y_train=images.y_train[~held_out], x_val=None, y_val=None)
    device = torch.device("cpu")
    model = model_of(settings, len(images.classes), images.channels)
    trainer = trainer_of(settings, model, device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HamWarning)
        history = trainer.fit(
            loaders_of(settings, kept, device).train, settings.optim.epochs, scheduler=scheduler_of(settings, trainer)
        )
    x, y = images.x_train[held_out].float() / 255, images.y_train[held_out]
    judged = trainer.model if trainer.ema_model is None else trainer.ema_model
    eps, parts = settings.attack.eps, zip(x.split(256), y.split(256), strict=True)
    right = torch.cat([multi_targeted(judged.eval(), *part, eps) for part in parts])
    by_class = [(int((y == c).sum()), int(right[y == c].sum())) for c in range(len(images.classes))]
    n = sum(report.n for report in history)
    return {"by_class": by_class, "hard": sum(report.n_hard for report in history) / n}


def multi_targeted(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """(n,) bool: right, and right at every point of a PGD towards each other class (margin, L-inf, falling steps).

    Close to AutoAttack's targeted parts, at a small share of its cost, and with nothing to install.
    """
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        classes = model(x[:1]).shape[1]
        right = model(x).argmax(1) == y
    for shift in range(1, classes):
        alive = right.nonzero().squeeze(1)
        if not len(alive):
            break
        clean, label = x[alive], y[alive]
        target = (label + shift) % classes
        point = (clean + eps * (2 * torch.rand(clean.shape, generator=g) - 1)).clamp(0, 1)
        for k in range(STEPS):
            point.requires_grad_()
            z = model(point)
            margin = z.gather(1, target[:, None]) - z.gather(1, label[:, None])
            (gradient,) = torch.autograd.grad(margin.sum(), point)
            with torch.no_grad():
                right[alive] &= z.argmax(1) == label
                step = eps * (LAST_STEP + (1 - LAST_STEP) * (1 - k / STEPS))
                point = torch.min(torch.max(point + step * gradient.sign(), clean - eps), clean + eps).clamp(0, 1)
        with torch.no_grad():
            right[alive] &= model(point).argmax(1) == label
    return right
