"""A data set and its parts: training, validation, test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ..common import checks
from .table import CROP_SIZE

PARTS = ("train", "val", "test")


class _Parts:
    """What both kinds of data set can do; their fields are `<kind>_train`, `y_train` and so on."""

    _kind: ClassVar[str]

    def part(self, part: str) -> tuple[Tensor | list[str], Tensor]:
        """Images and labels of "train", "val" or "test". ValueError where there is no such part."""
        checks.choice("part", part, PARTS)
        images, labels = getattr(self, f"{self._kind}_{part}"), getattr(self, f"y_{part}")
        if labels is None:
            raise ValueError(f"part: got 'val', but {self.name} has no validation images; call hold_out first")
        return images, labels

    def labels(self, part: str) -> Tensor:
        """Labels of "train", "val" or "test", (n,) int64."""
        return self.part(part)[1]

    @property
    def counts(self) -> dict[str, int]:
        """Images of each part that there is."""
        labels = {part: getattr(self, f"y_{part}") for part in PARTS}
        return {part: len(y) for part, y in labels.items() if y is not None}

    @property
    def class_counts(self) -> dict[str, dict[str, int]]:
        """{part: {class: images of it}} of each part that there is."""
        counts = {part: torch.bincount(self.labels(part), minlength=len(self.classes)).tolist() for part in self.counts}
        return {part: dict(zip(self.classes, n, strict=True)) for part, n in counts.items()}

    def subset(self, train: int | None, test: int | None, seed: int = 0):
        """At most so many images of the training and test part, drawn at random by seed, class shares kept."""
        return self.limit("train", train, seed).limit("test", test, seed)

    def limit(self, part: str, count: int | None, seed: int = 0):
        """At most `count` images of one part ("train", "val" or "test"), drawn at random by seed, class shares kept."""
        if count is None or checks.integer(part, count, 1) >= len(self.labels(part)):
            return self
        return replace(self, **self._rows(part, stratified(self.labels(part), count, seed)))

    def hold_out(self, count: int, seed: int = 0):
        """Moves `count` training images to the validation part, class shares kept; the test part stays as it is.

        The choice depends on the labels, count and seed only. Leave seed alone, so that runs with different training
        seeds share one split. ValueError where there is a validation part already or count is not in 1..n-1.
        """
        if self.y_val is not None:
            raise ValueError(f"hold_out: {self.name} has {len(self.y_val)} validation images already")
        y = self.y_train
        held = stratified(y, checks.integer("count", count, 1, len(y) - 1), seed)
        stays = torch.ones(len(y), dtype=torch.bool)
        stays[held] = False
        val = self._rows("train", held, into="val")
        return replace(self, **val, **self._rows("train", stays.nonzero()[:, 0]))

    def without_val(self):
        """Without the validation part."""
        return replace(self, **{f"{self._kind}_val": None, "y_val": None})

    def _rows(self, part: str, rows: Tensor, into: str | None = None) -> dict:
        images, labels = self.part(part)
        into = into or part
        return {f"{self._kind}_{into}": pick(images, rows), f"y_{into}": labels[rows]}


@dataclass(frozen=True)
class GeneratedImages:
    """Images of a generative model, to train on beside a set's own; `npz.read` gives them.

    images: uint8 (n, H, W, C), mapped from a file, so that a batch reads its rows and nothing else.
    labels: (n,) unsigned.  path: of the .npz.  crc32: of the two arrays, as the file tells them.
    """

    path: Path
    images: np.memmap
    labels: np.ndarray
    crc32: tuple[int, int]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass
class ImageSet(_Parts):
    """A data set in memory: uint8 images (n, C, H, W) and int64 labels."""

    _kind = "x"

    name: str
    classes: tuple[str, ...]
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    x_val: Tensor | None = None
    y_val: Tensor | None = None
    left_out: dict[str, int] = field(default_factory=dict)  # files where it was read that are no images, by kind
    empty: tuple[str, ...] = ()  # folders where it was read without an image
    generated: GeneratedImages | None = None  # beside x_train, and in none of the counts

    def __post_init__(self):
        for part in self.counts:
            x, y = self.part(part)
            check_images(f"x_{part}", x, f"y_{part}", y)

    @property
    def channels(self) -> int:
        return self.x_train.shape[1]


@dataclass
class FileSet(_Parts):
    """A data set of image files of any size, decoded when a batch needs them: paths and int64 labels."""

    _kind = "files"

    name: str
    classes: tuple[str, ...]
    files_train: list[str]
    y_train: Tensor
    files_test: list[str]
    y_test: Tensor
    files_val: list[str] | None = None
    y_val: Tensor | None = None
    size: int = CROP_SIZE  # height and width that loaders crop to
    left_out: dict[str, int] = field(default_factory=dict)  # files where it was read that are no images, by kind
    empty: tuple[str, ...] = ()  # folders where it was read without an image

    def __post_init__(self):
        checks.integer("size", self.size, 1)
        for part in self.counts:
            check_labels(f"y_{part}", *self.part(part))

    @property
    def channels(self) -> int:
        return 3  # files are decoded to RGB


def pick(images: Tensor | Sequence[str], rows: Tensor) -> Tensor | list[str]:
    """Some rows of a tensor or a list."""
    return images[rows] if isinstance(images, Tensor) else [images[i] for i in rows.tolist()]


def stratified(y: Tensor, count: int | None, seed: int) -> Tensor:
    """Positions of `count` rows in increasing order; every class keeps its share (less than two rows off)."""
    if count is None or count >= len(y):
        return torch.arange(len(y))
    shuffled = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    by_class = shuffled[torch.argsort(y[shuffled], stable=True)]
    even = torch.linspace(0, len(y) - 1, count, dtype=torch.float64).round().long()
    return by_class[even].sort().values


def check_images(images: str, x: Tensor, labels: str, y: Tensor) -> None:
    """Raises: TypeError, ValueError naming `images` or `labels` where x is not uint8 (n, C, H, W), y not int64 (n,)."""
    for name, value in ((images, x), (labels, y)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: got {type(value).__name__}; it must be a tensor")
    if x.dtype != torch.uint8 or x.dim() != 4:
        raise TypeError(
            f"{images}: got {x.dtype} of shape {tuple(x.shape)}; it must be uint8 (n, channels, height, width)"
        )
    check_labels(labels, x, y)


def check_labels(labels: str, x: Sequence, y: Tensor) -> None:
    """Raises: ValueError naming `labels` where y is not int64 (n,), as many as images."""
    if y.dtype != torch.int64 or y.shape != (len(x),):
        raise ValueError(
            f"{labels}: got {y.dtype} of shape {tuple(y.shape)}; it must be int64 ({len(x)},), one label per image"
        )
