"""Loaders for the parts of a data set, whichever kind it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..common import checks
from .batches import Batches
from .files import FileBatches
from .mixed import MixedBatches
from .sets import FileSet, ImageSet
from .table import AUGMENTATIONS, GENERATED_SHARE

EVAL_BATCH_SIZE = 256


@dataclass(frozen=True)
class Loaders:
    """Training batches, shuffled and augmented, those of generated images mixed in; validation (None without hold_out)
    and test batches, in order."""

    train: Batches | FileBatches  # MixedBatches are Batches
    val: Batches | FileBatches | None
    test: Batches | FileBatches

    def __iter__(self) -> Iterator[Batches | FileBatches | None]:
        """train, val, test = loaders(...)"""
        return iter((self.train, self.val, self.test))


def loaders(
    images: ImageSet | FileSet, batch_size: int, *, seed: int = 0, augment: str, balanced: bool = False,
    device: torch.device | str = "cpu", workers: int = 0, size: int | None = None,
    eval_batch_size: int = EVAL_BATCH_SIZE, generated_share: float = GENERATED_SHARE, rank: int = 0, world: int = 1,
) -> Loaders:  # fmt: skip
    """Loaders of (x float32 in [0, 1], y int64) on `device` for all parts of a data set.

    Each has len(), set_epoch(e) and set_position(batches): the next iteration starts after so many batches, as an
    uninterrupted one would have gone on. The epochs depend on (seed, e) only, not on device, workers or world: the
    training batches of the ranks, one behind the other, are those of one process, bit by bit.

    Args:
        images: what `load` gives. An ImageSet is moved to the device as uint8.
        batch_size: of the global training batches, of all ranks together; the last one of an epoch may be smaller.
        seed: >= 0, of order and augmentation.
        augment: "none", "crop" or "crop+flip", of the training images; `data.SETS[name].augment` is the usual one.
        balanced: training rows are drawn with replacement, so that classes are equally likely; an epoch has as many
            rows as without. A class without images is never drawn.
        workers: processes that decode a FileSet's images; an ImageSet needs none.
        size: height and width that a FileSet's images are cropped to; None: what it was loaded with, else 224.
        eval_batch_size: of the other parts.
        generated_share: in (0, 1): of a training batch, where the set has generated images; `mixed.MixedBatches` says
            what an epoch then is. It cannot be `balanced` too.
        rank, world: which of how many processes this is; 0 <= rank < world. Its training batches are rows
            `batches.slice_of(b, rank, world)` of each global batch of b rows, perhaps none. Validation and test batches
            are whole on every rank.
    Raises: TypeError, ValueError naming the argument.
    """
    checks.choice("augment", augment, AUGMENTATIONS)
    how, mine = {"device": device, "workers": workers, "size": size}, {"rank": rank, "world": world}
    if isinstance(images, ImageSet) and images.generated is not None:
        if checks.flag("balanced", balanced):
            raise ValueError(
                "balanced: got True with generated images, which a batch has a fixed share of; leave it out"
            )
        train = MixedBatches(
            images.x_train, images.y_train, batch_size, generated=images.generated, generated_share=generated_share,
            augment=augment, seed=seed, device=device, **mine,
        )  # fmt: skip
    else:
        shuffled = {"shuffle": True, "augment": augment, "seed": seed, "balanced": balanced}
        train = _loader(images, "train", batch_size, **shuffled, **how, **mine)
    return Loaders(
        train,
        None if images.y_val is None else part_loader(images, "val", eval_batch_size, **how),
        part_loader(images, "test", eval_batch_size, **how),
    )


def part_loader(
    images: ImageSet | FileSet, part: str, batch_size: int = EVAL_BATCH_SIZE, *, device: torch.device | str = "cpu",
    workers: int = 0, size: int | None = None,
) -> Batches | FileBatches:  # fmt: skip
    """One part ("train", "val", "test") without augmentation and in its own order; arguments as for `loaders`."""
    return _loader(
        images, part, batch_size, shuffle=False, augment="none", seed=0, device=device, workers=workers, size=size
    )


def _loader(
    images, part, batch_size, *, shuffle, augment, seed, device, workers, size, balanced=False, rank=0, world=1
) -> Batches | FileBatches:
    if not isinstance(images, ImageSet | FileSet):
        raise TypeError(f"images: got {type(images).__name__}; it must be what data.load gives")
    checks.integer("workers", workers, 0)
    inputs, y = images.part(part)
    how = {"shuffle": shuffle, "balanced": balanced, "augment": augment, "seed": seed, "device": device}
    how |= {"rank": rank, "world": world}
    if isinstance(images, FileSet):
        return FileBatches(inputs, y, batch_size, size=images.size if size is None else size, workers=workers, **how)
    return Batches(inputs, y, batch_size, **how)
