"""Images as tensors in [0, 1], and batches of them that are the same for the same seed and epoch."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


@dataclass
class ImageSet:
    """A data set in memory: uint8 images (n, C, H, W) and int64 labels."""

    name: str
    classes: tuple[str, ...]
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor

    def subset(self, train: int | None, test: int | None, seed: int = 0) -> ImageSet:
        """At most so many images of each part, drawn at random by seed, class shares kept."""
        pick_train = _stratified(self.y_train, train, seed)
        pick_test = _stratified(self.y_test, test, seed)
        return ImageSet(
            self.name, self.classes, self.x_train[pick_train], self.y_train[pick_train],
            self.x_test[pick_test], self.y_test[pick_test],
        )  # fmt: skip


def digits(test_images: int = 517) -> ImageSet:
    """scikit-learn's 1 797 handwritten digits, 1x8x8, split at random (fixed seed) with class shares kept."""
    from sklearn.datasets import load_digits  # imported here: half a second that other data sets do not need

    raw = load_digits()
    x = torch.from_numpy(np.rint(raw.images * (255 / 16)).astype(np.uint8))[:, None]
    y = torch.from_numpy(raw.target.astype(np.int64))
    return _split("digits", tuple(str(c) for c in range(10)), x, y, test_images)


def cifar10(root: str | Path = "data", download: bool = True) -> ImageSet:
    """torchvision's CIFAR-10, 3x32x32, downloaded to `root` where it is missing."""
    from torchvision.datasets import CIFAR10

    try:
        parts = [CIFAR10(root, train=train, download=download) for train in (True, False)]
    except (RuntimeError, OSError) as error:
        raise FileNotFoundError(
            f"CIFAR-10 is not in {root} and cannot be downloaded ({error}); put cifar-10-batches-py there, or give "
            "a folder or tar of class folders instead"
        ) from error
    x = [torch.from_numpy(p.data).permute(0, 3, 1, 2).contiguous() for p in parts]
    y = [torch.tensor(p.targets) for p in parts]
    return ImageSet("CIFAR-10", tuple(parts[0].classes), x[0], y[0], x[1], y[1])


def class_folders(path: str | Path) -> ImageSet:
    """A folder or tar of `train/CLASS/IMAGE` and `test/CLASS/IMAGE`, or of `CLASS/IMAGE` (then a fifth is test)."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"path: {path} does not exist; give a folder or tar of class folders")
    parts: dict[str, list[tuple[str, Tensor]]] = {}
    for name, image in sorted(_images_in(path), key=lambda item: item[0].as_posix()):
        split = "train" if "train" in name.parts[:-2] else "test" if "test" in name.parts[:-2] else "all"
        parts.setdefault(split, []).append((name.parent.name, image))
    if not parts:
        raise ValueError(f"path: {path} holds no image in a class folder (looked for {', '.join(IMAGE_SUFFIXES)})")
    classes = tuple(sorted({label for part in parts.values() for label, _ in part}))
    tensors = {split: _stack(path, part, classes) for split, part in parts.items()}
    if set(tensors) == {"train", "test"}:
        return ImageSet(path.name, classes, *tensors["train"], *tensors["test"])
    if set(tensors) == {"all"}:
        x, y = tensors["all"]
        return _split(path.name, classes, x, y, len(y) // 5)
    raise ValueError(f"path: {path} has images in {sorted(tensors)}; it needs both train/ and test/, or neither")


def _images_in(path: Path) -> Iterator[tuple[PurePosixPath, Tensor]]:
    if path.is_dir():
        for file in path.glob("**/*"):
            if file.suffix.lower() in IMAGE_SUFFIXES:
                yield PurePosixPath(file.relative_to(path).as_posix()), _decode(file.read_bytes(), file)
        return
    with tarfile.open(path) as tar:
        for member in tar:
            name = PurePosixPath(member.name)
            if member.isfile() and name.suffix.lower() in IMAGE_SUFFIXES:
                yield name, _decode(tar.extractfile(member).read(), name)


def _decode(data: bytes, name) -> Tensor:
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(data)).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"path: {name} is not a readable image ({error})") from error
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _stack(path: Path, part: list[tuple[str, Tensor]], classes: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    sizes = {tuple(image.shape) for _, image in part}
    if len(sizes) > 1:
        raise ValueError(
            f"path: {path} holds images of {len(sizes)} sizes ({sorted(sizes)[:3]} ...); resize them to one"
        )
    number = {label: i for i, label in enumerate(classes)}
    return torch.stack([image for _, image in part]), torch.tensor([number[label] for label, _ in part])


def _split(name: str, classes: tuple[str, ...], x: Tensor, y: Tensor, test_images: int) -> ImageSet:
    test = _stratified(y, test_images, seed=0)
    train = torch.ones(len(y), dtype=torch.bool)
    train[test] = False
    return ImageSet(name, classes, x[train], y[train], x[test], y[test])


def _stratified(y: Tensor, count: int | None, seed: int) -> Tensor:
    """Positions of `count` rows, class shares kept to within one row, in increasing order."""
    if count is None or count >= len(y):
        return torch.arange(len(y))
    shuffled = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    by_class = shuffled[torch.argsort(y[shuffled], stable=True)]
    even = torch.linspace(0, len(y) - 1, count, dtype=torch.float64).round().long()
    return by_class[even].sort().values


class Batches:
    """Shuffled (and, for training on natural images, cropped and flipped) batches of (x in [0, 1], y).

    The order and the augmentation of epoch e depend on (seed, e) only.

    Args: x uint8 (n, C, H, W); y int64 (n,); augment: random crop with 4 pixels of padding, and horizontal flip.
    """

    def __init__(self, x: Tensor, y: Tensor, batch_size: int, *, shuffle: bool, augment: bool = False, seed: int = 0):
        self.x, self.y, self.batch_size = x, y, batch_size
        self.shuffle, self.augment, self.seed = shuffle, augment, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.y) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        order = torch.randperm(len(self.y), generator=generator) if self.shuffle else torch.arange(len(self.y))
        for rows in order.split(self.batch_size):
            x = self.x[rows].float().div_(255)
            yield (crop_and_flip(x, generator) if self.augment else x), self.y[rows]


def crop_and_flip(x: Tensor, generator: torch.Generator, pad: int = 4) -> Tensor:
    """A random H x W window of each padded image, mirrored with probability 1/2."""
    n, _, height, width = x.shape
    top, left = torch.randint(0, 2 * pad + 1, (2, n), generator=generator)
    flip = torch.rand(n, generator=generator) < 0.5
    rows = top[:, None] + torch.arange(height)
    columns = left[:, None] + torch.arange(width)
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    padded = F.pad(x, (pad, pad, pad, pad))
    image = torch.arange(n)[:, None, None]
    return padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def load(dataset: str, path: str | Path | None = None) -> ImageSet:
    """ "digits" or "cifar10" by name, or class folders where a path is given."""
    if path is not None:
        return class_folders(path)
    known = {"digits": digits, "cifar10": cifar10}
    if dataset not in known:
        raise ValueError(f"dataset: got {dataset!r}; allowed are {', '.join(known)}, or a path")
    return known[dataset]()


def loaders(images: ImageSet, batch_size: int, seed: int, augment: bool) -> tuple[Iterable, Iterable]:
    """(shuffled training batches, test batches in order)."""
    train = Batches(images.x_train, images.y_train, batch_size, shuffle=True, augment=augment, seed=seed)
    return train, Batches(images.x_test, images.y_test, 256, shuffle=False)
