"""One way in: a data set by name, or class folders by path."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..common import checks
from . import npz
from .folders import class_folders
from .named import digits, from_torchvision, is_files
from .sets import FileSet, ImageSet
from .table import IN_MEMORY, SETS


def load(
    dataset: str, path: str | Path | None = None, *, root: str | Path = "data", download: bool = True,
    size: int | None = None, cache: bool = True, generated: str | Path | None = None,
) -> ImageSet | FileSet:  # fmt: skip
    """A data set by name, or a folder or tar of class folders.

    Args:
        dataset: one of `data.SETS`. The training part is the published one; nothing is held out of it yet.
        path: read this folder or tar (see `class_folders`) instead of what `dataset` names.
        root: where data sets by name lie, and where decoded images are cached (root/cache).
        download: fetch what is missing below root. Never fetches what is there.
        size: of images that come as files (path, "imagenette", "imagenette32"). Up to 64 they are resized to
            size x size and kept in memory ("imagenette32" is 32 by itself); above, loaders crop them to it.
        cache: keep decoded images in root/cache.
        generated: an .npz of generated images to train on beside the training part, as DeepMind and Wang et al. publish
            them: image uint8 (n, H, W, C) of the set's size, label (n,) in the order of its classes. They stay on the
            disk (see `npz.read`), and are in none of the set's parts; `loaders` mixes them into training batches.
    Returns: an ImageSet, or a FileSet where the files differ in size or are large.
    Raises: FileNotFoundError where a data set is missing and not to be had, saying what to put where; OSError,
        TypeError, ValueError naming the argument.
    """
    checks.flag("download", download)
    if generated is not None:
        npz.check_there(Path(generated))  # before a data set is fetched
    images = _load(dataset, path, root, download, size, cache)
    if generated is None:
        return images
    if isinstance(images, FileSet):
        raise ValueError(
            f"generated: got {generated}, but the images of {images.name} stay files, and it is mixed with images in "
            f"memory only; resize them to at most {IN_MEMORY} pixels (size=)"
        )
    folder = Path(root) / "cache" if cache else None
    found = npz.read(Path(generated), tuple(images.x_train.shape[1:]), len(images.classes), folder)
    return replace(images, generated=found)


def _load(
    dataset: str, path: str | Path | None, root: str | Path, download: bool, size: int | None, cache: bool
) -> ImageSet | FileSet:
    if path is not None:
        return class_folders(path, root=root, size=size, cache=cache)
    if dataset not in SETS:
        raise ValueError(f"dataset: got {dataset!r}; allowed are {', '.join(SETS)}, or give path=")
    if dataset == "imagenet":
        return _imagenet(Path(root), size, cache)
    if dataset == "imagenette32" and size is None:
        size = SETS[dataset].size
    elif size is not None and not is_files(dataset):
        raise ValueError(f"size: got {size} for {dataset}, whose images have one size already; leave it out")
    if dataset == "digits":
        return digits()
    return from_torchvision(dataset, Path(root), download, size, cache)


def _imagenet(root: Path, size: int | None, cache: bool) -> ImageSet | FileSet:
    """Its files are to be had by hand alone; the published validation part is the test part."""
    title, folder = SETS["imagenet"].title, root / "imagenet"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"root: {title} is not in {root}, and nobody may hand it on; put the folder imagenet with train/CLASS/ "
            "and val/CLASS/ there, or give path=, a folder or tar of class folders, instead"
        )
    return replace(class_folders(folder, root=root, size=size, cache=cache), name=title)
