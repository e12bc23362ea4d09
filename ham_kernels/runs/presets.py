"""Settings per data set: the paper's where it has them (arXiv 2308.01823), else what the field uses."""

from __future__ import annotations

import math
from dataclasses import replace

from ..common import field_types
from ..data.glance import glance
from ..data.table import CROP_SIZE, IN_MEMORY, SETS
from ..methods.ham import HAM
from ..methods.pgd_at import PGDAT
from .settings import (
    AttackSettings,
    DataSettings,
    ModelSettings,
    OptimSettings,
    RunSettings,
    TrainSettings,
)

LONG = 0.95  # of PGD-AT's forwards: three large steps and more updates take a little more time than the model says
PAPER_ATTACK = AttackSettings(eps=0.031, step_size=0.007, steps=10)


def _natural(
    dataset: str, *, start_epoch: int = 50, screen_steps: int = 3, lr: float = 0.1, val_images: int = 1000,
    model: str = "preact_resnet18", attack: AttackSettings = PAPER_ATTACK,
) -> TrainSettings:  # fmt: skip
    """The paper's course of 120 epochs, with what differs from data set to data set."""
    facts = SETS[dataset]
    return TrainSettings(
        data=DataSettings(dataset, val_images=val_images, augment=facts.augment),
        model=ModelSettings(model, normalize=facts.mean is not None),
        attack=attack,
        method=HAM(start_epoch=start_epoch, screen_steps=screen_steps),
        optim=OptimSettings(lr=lr),
    )


PRESETS: dict[str, TrainSettings] = {
    "digits": TrainSettings(
        data=DataSettings("digits"),
        attack=AttackSettings(eps=0.2, step_size=0.05),
        method=HAM(start_epoch=9),
        optim=OptimSettings(epochs=24, lr=0.05, milestones=(18,), lr_decay=(0.2,)),
        run=RunSettings(ema_decay=0.97),
    ),
    "cifar10": _natural("cifar10"),
    "cifar100": _natural("cifar100", start_epoch=60),
    "svhn": _natural("svhn", screen_steps=5, lr=0.01),
    "imagenette32": _natural("imagenette32", val_images=500),
    # Not in the paper: its budget at the images' own size, and the budget usual for Fashion-MNIST.
    "imagenette": _natural("imagenette", val_images=500, model="resnet18"),
    "fashion_mnist": _natural("fashion_mnist", attack=AttackSettings(eps=0.1, step_size=0.02)),
    # As robust ImageNet models are usually trained (Salman et al., arXiv 2007.08489; ARES 2.0): K 3, 90 epochs.
    "imagenet": TrainSettings(
        data=DataSettings("imagenet", batch_size=256, val_images=10_000, augment="crop+flip", workers=8),
        model=ModelSettings("resnet50", normalize=True),
        attack=AttackSettings(eps=4 / 255, step_size=8 / 3 / 255, steps=3),
        method=HAM(start_epoch=31, screen_steps=1),
        optim=OptimSettings(epochs=90, weight_decay=1e-4, milestones=(31, 61), lr_decay=(0.1, 0.1)),
    ),
}


def preset(dataset: str, epochs: int | None = None) -> TrainSettings:
    """The settings of a data set; with other `epochs`, start_epoch and milestones keep their share of the run.

    Raises: TypeError, ValueError naming the argument.
    """
    if dataset not in PRESETS:
        raise ValueError(f"dataset: got {dataset!r}; allowed are {', '.join(PRESETS)}")
    settings = PRESETS[dataset]
    return settings if epochs is None else rescaled(settings, epochs)


def for_folder(
    path: str, size: int | None = None, train_images: int | None = None, batch_size: int | None = None
) -> TrainSettings:
    """Settings that fit a folder or tar of images; `preset("cifar10")` where it cannot be read.

    Of images above 64 pixels those of imagenette, at the images' own size where that is below 224; of IDX files those
    of fashion_mnist, without flips, since they are often of digits; else those of cifar10, with the small CNN up to 16
    pixels. At most a tenth of the training images validate. The learning rate follows the batch size.

    Args: size, train_images, batch_size: as the user gave them.
    """
    found = glance(path)
    if found is None:
        return PRESETS["cifar10"]
    pixels = size or found.pixels
    s = PRESETS["fashion_mnist" if found.idx else "imagenette" if pixels > IN_MEMORY else "cifar10"]
    told = {"val_images": min(s.data.val_images, min(found.train, train_images or found.train) // 10)}
    if found.idx:
        told["augment"] = "crop"
    elif found.varied or pixels > IN_MEMORY:
        told["size"] = min(pixels, CROP_SIZE) if not found.tar or pixels <= IN_MEMORY else None
    lr = s.optim.lr
    if pixels <= 16:
        lr = PRESETS["digits"].optim.lr
        s = replace(s, model=replace(s.model, name="small_cnn"))
    lr *= (batch_size or s.data.batch_size) / s.data.batch_size
    return replace(s, data=replace(s.data, **told), optim=replace(s.optim, lr=lr))


def with_fewer_epochs(settings: TrainSettings, replays: int | None = None) -> TrainSettings:
    """The same course in as many updates, where the method makes several of each batch (`replays`; None: its own)."""
    replays = settings.method.replays if replays is None else replays
    return settings if replays == 1 else rescaled(settings, math.ceil(settings.optim.epochs / replays))


def epochs_in_time(settings: TrainSettings, share: float) -> float:
    """Epochs that cost `share` of one of PGD-AT by the cost model, a teacher taken as large as the model.

    Where a method screens, as if all rows were hard.
    """
    steps, method = settings.attack.steps, settings.method
    return share * PGDAT().cost(steps) / (method.cost(steps) + method.needs_teacher)


def in_time(settings: TrainSettings, share: float) -> TrainSettings:
    """The same course in as many epochs, in place of PGD-AT's, as that share of the time allows."""
    return rescaled(settings, stretched(settings.optim.epochs, epochs_in_time(settings, share)))


def stretched(epochs: int, factor: float | None) -> int:
    """So many times the epochs, at least 1; None: as they are."""
    return epochs if factor is None else max(1, round(epochs * factor))


def rescaled(settings: TrainSettings, epochs: int) -> TrainSettings:
    """The same course in another number of epochs: epoch e of E becomes 1 + (e - 1) * epochs / E, rounded."""
    if not isinstance(epochs, int) or isinstance(epochs, bool):
        raise TypeError(f"epochs: got {epochs!r}; it must be an integer")
    if epochs < 1:
        raise ValueError(f"epochs: got {epochs}; it must be >= 1")
    factor = epochs / settings.optim.epochs

    def moved(epoch: int) -> int:
        return 1 + round((epoch - 1) * factor)

    def within(value: int | tuple[int, ...]) -> int | tuple[int, ...]:
        """An epoch behind the end is the last; of several, it is left out."""
        return tuple(e for e in value if e <= epochs) if isinstance(value, tuple) else min(value, epochs)

    method = settings.method
    named = [name for name, words in field_types.words(type(method)).items() if words.scales]
    scaled = {name: within(field_types.of_each(moved, getattr(method, name))) for name in named}
    if method.class_from > method.start_epoch:  # some have an epoch of their own before
        scaled["class_from"] = max(scaled["class_from"], scaled["start_epoch"] + 1)
    return replace(
        settings,
        method=replace(method, **scaled),
        warm_up=replace(settings.warm_up, natural_epochs=round(settings.warm_up.natural_epochs * factor)),
        optim=replace(settings.optim, epochs=epochs, milestones=tuple(moved(m) for m in settings.optim.milestones)),
    )
