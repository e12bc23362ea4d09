"""Data sets by name: scikit-learn's digits, and torchvision's, downloaded only where they are missing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .folders import class_folders
from .sets import FileSet, ImageSet, stratified
from .table import SETS


def digits(test_images: int = 517) -> ImageSet:
    """scikit-learn's 1 797 handwritten digits, 1x8x8, split at random (fixed seed) with class shares kept."""
    from sklearn.datasets import load_digits  # imported here: half a second that other data sets do not need

    raw = load_digits()
    x = torch.from_numpy(np.rint(raw.images * (255 / 16)).astype(np.uint8))[:, None]
    y = torch.from_numpy(raw.target.astype(np.int64))
    test = stratified(y, test_images, seed=0)
    train = torch.ones(len(y), dtype=torch.bool)
    train[test] = False
    return ImageSet(SETS["digits"].title, tuple("0123456789"), x[train], y[train], x[test], y[test])


@dataclass(frozen=True)
class _Source:
    """A class of torchvision.datasets: its name, how its parts are asked for, what lies below root, how it is read."""

    kind: str
    parts: tuple[dict, dict]  # training and test
    put: str
    read: Callable[[list], tuple[list, list, list]] | None  # -> classes, images, labels; None for class folders
    folder: str | None = None


def _cifar(parts: list) -> tuple[list, list, list]:
    x = [torch.from_numpy(p.data).permute(0, 3, 1, 2).contiguous() for p in parts]
    return parts[0].classes, x, [torch.tensor(p.targets) for p in parts]


def _svhn(parts: list) -> tuple[list, list, list]:
    x = [torch.from_numpy(np.ascontiguousarray(p.data)) for p in parts]
    return list("0123456789"), x, [torch.from_numpy(p.labels) for p in parts]


def _fashion_mnist(parts: list) -> tuple[list, list, list]:
    return parts[0].classes, [p.data[:, None].contiguous() for p in parts], [p.targets for p in parts]


_TRAIN_OR_NOT = {"train": True}, {"train": False}
_MNIST_FILES = "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte"


def _imagenette(edition: str, folder: str) -> _Source:
    parts = {"split": "train", "size": edition}, {"split": "val", "size": edition}
    return _Source("Imagenette", parts, f"the folder {folder} with train/ and val/", None, folder)


SOURCES = {
    "cifar10": _Source(
        "CIFAR10", _TRAIN_OR_NOT, "the folder cifar-10-batches-py with data_batch_1 to 5, test_batch and batches.meta",
        _cifar,
    ),
    "cifar100": _Source("CIFAR100", _TRAIN_OR_NOT, "the folder cifar-100-python with train, test and meta", _cifar),
    "svhn": _Source(
        "SVHN", ({"split": "train"}, {"split": "test"}), "the files train_32x32.mat and test_32x32.mat", _svhn
    ),
    "fashion_mnist": _Source(
        "FashionMNIST", _TRAIN_OR_NOT, f"the folder FashionMNIST/raw with {_MNIST_FILES}", _fashion_mnist
    ),
    "imagenette": _imagenette("full", "imagenette2"),
    # the smallest edition: 95 MB instead of 1.5 GB to download, and it is scaled down to 32 pixels anyway
    "imagenette32": _imagenette("160px", "imagenette2-160"),
}  # fmt: skip


def is_files(dataset: str) -> bool:
    """Whether a data set is a folder of image files below root, which can be resized and cached."""
    return dataset in SOURCES and SOURCES[dataset].read is None


def from_torchvision(dataset: str, root: Path, download: bool, size: int | None, cache: bool) -> ImageSet | FileSet:
    """One of SOURCES; `size` and `cache` are for those made of files."""
    source, title = SOURCES[dataset], SETS[dataset].title
    parts = _parts(source, title, root, download)
    if source.read is not None:
        classes, (x_train, x_test), (y_train, y_test) = source.read(parts)
        return ImageSet(title, tuple(classes), x_train, y_train, x_test, y_test)
    images = class_folders(root / source.folder, root=root, size=size, cache=cache)
    images.name, images.classes = title, tuple(names[0] for names in parts[0].classes)
    return images


def _parts(source: _Source, title: str, root: Path, download: bool) -> list:
    try:
        from torchvision import datasets
    except ImportError as error:
        raise ImportError(
            f"dataset: {title} is read by torchvision, which is not installed ({error}): pip install torchvision"
        ) from error
    kind = getattr(datasets, source.kind)
    instead = f"put {source.put} there, or give path=, a folder or tar of class folders, instead"
    try:
        return [kind(root, **part) for part in source.parts]
    except (RuntimeError, OSError) as error:
        if not download:
            raise FileNotFoundError(
                f"root: {title} is not in {root} (or not complete), and download=False; {instead}"
            ) from error
    try:
        return [kind(root, **part, download=True) for part in source.parts]
    except (RuntimeError, OSError) as error:
        raise FileNotFoundError(
            f"root: {title} is not in {root} (or not complete) and cannot be downloaded ({error}); {instead}"
        ) from error
