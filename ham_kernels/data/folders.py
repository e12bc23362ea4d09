"""Class folders: a folder or tar of `train/CLASS/IMAGE` and `test/CLASS/IMAGE`, or of `CLASS/IMAGE`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..common import checks, troubles
from . import idx, layout, listing
from .cache import cached
from .files import decode
from .glance import glance
from .listing import IMAGE_SUFFIXES, Listing
from .sets import FileSet, ImageSet, pick, stratified
from .table import CROP_SIZE, IN_MEMORY

# the classes; and for each part the positions in a list of names, and the labels
Arranged = tuple[tuple[str, ...], dict[str, tuple[Tensor, Tensor]]]


class _Varied(ValueError):
    """Images that differ in size, or are too large for memory."""


def class_folders(
    path: str | Path, *, root: str | Path = "data", size: int | None = None, cache: bool = True
) -> ImageSet | FileSet:
    """Reads a folder or tar of class folders.

    Args:
        path: holds train/CLASS/... and test/CLASS/..., in any usual spelling such as Training/ and TEST/ (val/ is the
            test part where there is no test/, and the validation part where there is); or CLASS/IMAGE, of which a fifth
            becomes the test part, class shares kept. Images end in one of IMAGE_SUFFIXES; they are turned as their EXIF
            orientation says. Other files, and those whose name or folder begins with a dot, are left out and counted
            in a warning. What lies in folders below CLASS is of that class. A folder of IDX files (MNIST's format,
            packed by gzip or not) is read too.
        root: decoded images are kept in root/cache, so that the next start need not decode.
        size: up to 64: every image is resized to size x size (bilinear, antialiased) and kept in memory. Above: the
            FileSet's size, to which loaders crop.
        cache: False neither reads nor writes root/cache.
    Returns: an ImageSet where the images have one size of at most 64 pixels a side, or are resized to one; else a
        FileSet (from a folder only).
    Raises: FileNotFoundError, TypeError, ValueError naming the path or the file.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"path: {path} does not exist; give a folder or tar of class folders")
    if size is not None:
        checks.integer("size", size, 1)
    checks.flag("cache", cache)
    images = _read(path, Path(root) / "cache" if cache else None, size)
    _tell(path, images)
    return images


def _tell(path: Path, images: ImageSet | FileSet) -> None:
    """What of the path is not in the set, and which classes are thin."""
    if images.left_out:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(images.left_out.items()))
        troubles.warn("files_left_out", path=path, kinds=kinds)
    if images.empty:
        troubles.warn("empty_folders", path=path, folders=_some(images.empty))
    for part, counts in images.class_counts.items():
        missing = [name for name, n in counts.items() if n == 0]
        if missing:
            troubles.warn("class_without_images", path=path, classes=_some(map(repr, missing)), part=part)
    single = [name for name, n in images.class_counts["train"].items() if n == 1]
    if single:
        troubles.warn("class_of_one_image", path=path, classes=_some(map(repr, single)))


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _read(path: Path, folder: Path | None, size: int | None) -> ImageSet | FileSet:
    """`folder` keeps decoded images."""
    if not path.is_dir():
        stat = path.stat()
        if size is not None and size > IN_MEMORY:
            raise ValueError(f"size: got {size} with a tar; it must be at most {IN_MEMORY}, or unpack the tar first")
        return cached(folder, path, size, [stat.st_size, stat.st_mtime_ns], lambda: _from_tar(path, size))
    found = listing.of_folder(path)
    if not found.images and idx.files_in(path):
        return idx.read(path, size)
    arranged = _arranged(path, found)  # a wrong layout shows before anything is decoded
    images = None
    if size is None or size <= IN_MEMORY:
        with contextlib.suppress(_Varied):
            images = cached(folder, path, size, found.images, lambda: _from_folder(path, found.names, arranged, size))
    if images is None:
        classes, parts = arranged
        if size is None and (seen := glance(path)) is not None and seen.pixels <= IN_MEMORY:
            troubles.warn("small_files", path=path, pixels=seen.pixels, size=CROP_SIZE)
        files = [str(path / name) for name in found.names]
        images = FileSet(path.name, classes, **_fields("files", files, parts), size=size or CROP_SIZE)
    images.left_out, images.empty = dict(+found.left_out), tuple(found.empty)  # not the cache's: other files may be new
    return images


def _from_folder(path: Path, names: list[str], arranged: Arranged, size: int | None) -> ImageSet:
    classes, parts = arranged
    images = _decoded(path, ((name, path / name, None) for name in names), size)
    return ImageSet(path.name, classes, **_fields("x", torch.stack(list(images.values())), parts))


def _from_tar(path: Path, size: int | None) -> ImageSet:
    found = Listing()
    contents = ((name, listing.shown(f"{path}:{name}"), read()) for name, read in listing.in_tar(path, found))
    images = _decoded(path, contents, size)
    if len(images) < len(found.images):
        raise ValueError(f"path: {path} holds {len(found.images) - len(images)} images twice; pack it anew")
    classes, parts = _arranged(path, found)
    x = torch.stack([images[name] for name in found.names])
    fields = _fields("x", x, parts)
    return ImageSet(path.name, classes, **fields, left_out=dict(+found.left_out), empty=tuple(found.empty))


def _told(images: Iterable, path: Path) -> Iterable:
    """Images, and on standard error how many are decoded, where that takes longer than 10 seconds."""
    often = 0.1 if sys.stderr is not None and sys.stderr.isatty() else 60.0
    return tqdm(
        images, f"decoding {path.name}", unit=" images", delay=10.0, mininterval=often, disable=sys.stderr is None
    )


def _decoded(path: Path, images: Iterable[tuple[str, Path | str, bytes | None]], size: int | None) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    shape = None
    for name, file, data in _told(images, path):
        image = decode(file, data, size)
        shape = shape or image.shape
        if image.shape != shape or max(shape) > IN_MEMORY:
            raise _Varied(
                f"path: {path} holds images of several sizes or of more than {IN_MEMORY} pixels a side "
                f"({name} has {image.shape[2]}x{image.shape[1]}); unpack it and give the folder, or resize them to "
                f"size={IN_MEMORY} or less"
            )
        found[name] = image
    return found


def _fields(kind: str, images: Tensor | list[str], parts: dict[str, tuple[Tensor, Tensor]]) -> dict:
    fields = {f"{kind}_{part}": pick(images, rows) for part, (rows, _) in parts.items()}
    return fields | {f"y_{part}": y for part, (_, y) in parts.items()}


def _arranged(path: Path, found: Listing) -> Arranged:
    names = found.names
    if not names:
        others = ", ".join(f"{count} {kind}" for kind, count in sorted((+found.left_out).items())) or "nothing else"
        raise ValueError(
            f"path: {path} holds no image in a class folder (looked for {', '.join(IMAGE_SUFFIXES)}; there are "
            f"{others})"
        )
    places = layout.places(path, names)
    classes = tuple(sorted({label for _, label in places}))
    number = {label: i for i, label in enumerate(classes)}
    y = torch.tensor([number[label] for _, label in places])
    rows = {
        part: torch.tensor([i for i, (p, _) in enumerate(places) if p == part])
        for part in dict.fromkeys(part for part, _ in places)
    }
    if None in rows:
        rows = _fifth_tests(path, classes, y)
    elif "test" not in rows:
        rows["test"] = rows.pop("val")
    parts = {part: (r, y[r]) for part, r in rows.items()}
    for part, (_, labels) in parts.items():
        strange = sorted(set(labels.tolist()) - set(parts["train"][1].tolist()))
        if strange:
            raise ValueError(f"path: {path} has class {classes[strange[0]]!r} in its {part} part but not in train/")
    return classes, parts


def _fifth_tests(path: Path, classes: tuple[str, ...], y: Tensor) -> dict[str, Tensor]:
    if len(y) < 5:
        raise ValueError(f"path: {path} holds {len(y)} images; at least 5 are needed, as a fifth becomes the test part")
    single = [name for name, n in zip(classes, torch.bincount(y).tolist(), strict=True) if n < 2]
    if single:
        raise ValueError(
            f"path: {path} has one image of class {_some(map(repr, single))}; each class needs at least 2, one to "
            "train on and one to test"
        )
    test = stratified(y, len(y) // 5, seed=0)
    stays = torch.ones(len(y), dtype=torch.bool)
    stays[test] = False
    return {"train": stays.nonzero()[:, 0], "test": test}
