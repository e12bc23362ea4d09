"""Class folders: a folder or tar of `train/CLASS/IMAGE` and `test/CLASS/IMAGE`, or of `CLASS/IMAGE`."""

from __future__ import annotations

import lzma
import os
import tarfile
import warnings
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from ..common import checks
from .cache import cached
from .files import decode
from .sets import CROP_SIZE, PARTS, FileSet, ImageSet, pick, stratified

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
IN_MEMORY = 64  # pixels per side up to which images of one size are kept as tensors

# the classes; and for each part the positions in a list of names, and the labels
Arranged = tuple[tuple[str, ...], dict[str, tuple[Tensor, Tensor]]]


class _Varied(ValueError):
    """Images that differ in size, or are too large for memory."""


def class_folders(
    path: str | Path, *, root: str | Path = "data", size: int | None = None, cache: bool = True
) -> ImageSet | FileSet:
    """Reads a folder or tar of class folders.

    Args:
        path: holds train/CLASS/... and test/CLASS/... (val/ is the test part where there is no test/, and the
            validation part where there is); or CLASS/IMAGE, of which a fifth becomes the test part, class shares kept.
            Images end in one of IMAGE_SUFFIXES; files and folders that begin with a dot are left out. What lies in
            folders below CLASS is of that class.
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
    for part in images.counts:
        there = set(getattr(images, f"y_{part}").tolist())
        missing = [repr(name) for i, name in enumerate(images.classes) if i not in there]
        if missing:
            warnings.warn(
                f"path: {path} has no image of class {', '.join(missing)} in its {part} part; what is said of classes "
                "leaves it out",
                stacklevel=2,
            )
    return images


def _read(path: Path, folder: Path | None, size: int | None) -> ImageSet | FileSet:
    """`folder` keeps decoded images."""
    if not path.is_dir():
        stat = path.stat()
        if size is not None and size > IN_MEMORY:
            raise ValueError(f"size: got {size} with a tar; it must be at most {IN_MEMORY}, or unpack the tar first")
        return cached(folder, path, size, [stat.st_size, stat.st_mtime_ns], lambda: _from_tar(path, size))
    listing = sorted(_listing(path))
    names = [name for name, *_ in listing]
    arranged = _arranged(path, names)  # a wrong layout shows before anything is decoded
    if size is None or size <= IN_MEMORY:
        try:
            return cached(folder, path, size, listing, lambda: _from_folder(path, names, arranged, size))
        except _Varied:
            pass
    classes, parts = arranged
    files = [str(path / name) for name in names]
    return FileSet(path.name, classes, **_fields("files", files, parts), size=size or CROP_SIZE)


def _listing(path: Path) -> Iterator[tuple[str, int, int]]:
    """(name relative to path, bytes, modification time) of each image."""
    for folder, subfolders, names in os.walk(path, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            file = Path(folder, name)
            if _is_image(file):
                stat = file.stat()
                yield file.relative_to(path).as_posix(), stat.st_size, stat.st_mtime_ns


def _is_image(name: Path | PurePosixPath) -> bool:
    return name.suffix.lower() in IMAGE_SUFFIXES and not name.name.startswith(".")


def _from_folder(path: Path, names: list[str], arranged: Arranged, size: int | None) -> ImageSet:
    classes, parts = arranged
    images = _decoded(path, ((name, path / name, None) for name in names), size)
    return ImageSet(path.name, classes, **_fields("x", torch.stack(list(images.values())), parts))


def _from_tar(path: Path, size: int | None) -> ImageSet:
    images = _decoded(path, _in_tar(path), size)
    names = sorted(images)
    classes, parts = _arranged(path, names)
    return ImageSet(path.name, classes, **_fields("x", torch.stack([images[name] for name in names]), parts))


class _Header(tarfile.TarInfo):
    """tarfile takes a header that is cut off or damaged for the end, and what lies behind for nothing."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> _Header:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # the mark at the end
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error}, {tar.offset} bytes from its beginning: cut short or damaged") from error


def _in_tar(path: Path) -> Iterator[tuple[str, str, bytes]]:
    try:
        with tarfile.open(path, tarinfo=_Header) as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                hidden = any(p.startswith(".") and p != "." for p in name.parts)
                if member.isfile() and _is_image(name) and not hidden:
                    yield member.name, f"{path}:{member.name}", tar.extractfile(member).read()
    except (tarfile.TarError, EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(
            f"path: {path} is not a readable tar ({error}); give a folder or tar of class folders"
        ) from error


def _decoded(path: Path, images: Iterable[tuple[str, Path | str, bytes | None]], size: int | None) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    shape = None
    for name, file, data in images:
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


def _arranged(path: Path, names: list[str]) -> Arranged:
    if not names:
        raise ValueError(f"path: {path} holds no image in a class folder (looked for {', '.join(IMAGE_SUFFIXES)})")
    places = _places(path, [PurePosixPath(name) for name in names])
    classes = tuple(sorted({label for _, label in places}))
    if set(classes) <= set(PARTS):
        raise ValueError(f"path: {path} has images directly in {', '.join(classes)}; each needs class folders in it")
    number = {label: i for i, label in enumerate(classes)}
    y = torch.tensor([number[label] for _, label in places])
    rows = {
        part: torch.tensor([i for i, (p, _) in enumerate(places) if p == part])
        for part in dict.fromkeys(part for part, _ in places)
    }
    if set(rows) == {"all"}:
        if len(y) < 5:
            raise ValueError(
                f"path: {path} holds {len(y)} images; at least 5 are needed, as a fifth becomes the test part"
            )
        test = stratified(y, len(y) // 5, seed=0)
        stays = torch.ones(len(y), dtype=torch.bool)
        stays[test] = False
        rows = {"train": stays.nonzero()[:, 0], "test": test}
    elif set(rows) == {"train", "val"}:
        rows["test"] = rows.pop("val")
    elif set(rows) not in ({"train", "test"}, set(PARTS)):
        raise ValueError(
            f"path: {path} has images in {sorted(rows)}; it needs train/ and test/ (or val/), each with class folders, "
            "or class folders only"
        )
    parts = {part: (r, y[r]) for part, r in rows.items()}
    for part, (_, labels) in parts.items():
        strange = sorted(set(labels.tolist()) - set(parts["train"][1].tolist()))
        if strange:
            raise ValueError(f"path: {path} has class {classes[strange[0]]!r} in its {part} part but not in train/")
    return classes, parts


def _places(path: Path, names: list[PurePosixPath]) -> list[tuple[str, str]]:
    """(part, class) of each image: the folder below train/, test/ or val/; without these, below what all share."""
    split = [_part_and_class(name) for name in names]
    if any(part is not None for part, _ in split):
        return [(part or "all", label) for part, label in split]
    above = [name.parts[:-1] for name in names]
    if len(set(above)) > 1:  # the depth to which all agree
        shared = next((i for i, column in enumerate(zip(*above, strict=False)) if len(set(column)) > 1), None)
        shared = min(map(len, above)) if shared is None else shared
    else:
        shared = max(len(above[0]) - 1, 0)
    for name, folders in zip(names, above, strict=True):
        if len(folders) <= shared:
            raise ValueError(f"path: {path} holds {name} outside of any class folder")
    return [("all", folders[shared]) for folders in above]


def _part_and_class(name: PurePosixPath) -> tuple[str | None, str]:
    above = name.parts[:-2]
    part = next((folder for folder in above if folder in PARTS), None)
    return part, name.parts[above.index(part) + 1] if part is not None else ""
