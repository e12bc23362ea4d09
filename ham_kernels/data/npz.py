"""Generated images in an .npz, mapped from the disk: the file itself, or its decompressed images in the cache.

DeepMind (Rebuffi et al., arXiv 2103.01946) and Wang et al. (arXiv 2302.04638) publish 1 to 50 million generated images
in this form: 3 to 154 GB, which numpy.load would read whole.
"""

from __future__ import annotations

import shutil
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
from tqdm import tqdm

from .cache import cached_file
from .sets import GeneratedImages

WANTED = "an .npz file with arrays image (n, height, width, channels) of uint8 and label (n,)"
CHUNK = 2**24  # bytes decompressed at once
_LOCAL_HEADER = struct.Struct("<26x2H")  # before a member of a zip: the lengths of its name and of its extra field


def check_there(path: Path) -> None:
    """Raises: FileNotFoundError naming generated."""
    if not path.is_file():
        raise FileNotFoundError(f"generated: {path} is not there; give {WANTED}")


def read(path: Path, shape: tuple[int, int, int], classes: int, folder: Path | None) -> GeneratedImages:
    """The images of an .npz for a data set; neither they nor the file are read whole, only the labels are.

    Images that are stored as they are (numpy.savez) are mapped where they lie in the file. Compressed ones
    (numpy.savez_compressed) are decompressed once, into a file of `folder`.

    Args:
        shape: (channels, height, width) of the set's images.
        classes: labels are 0 to classes - 1, in the order of the set's classes.
        folder: of the cache; None: there is none, and compressed images are refused.
    Raises: FileNotFoundError, OSError, ValueError naming generated.
    """
    check_there(path)
    try:
        with zipfile.ZipFile(path) as archive:
            image, label = (_member(archive, path, name) for name in ("image", "label"))
            labels = _labels(archive, label, path, classes)
            with archive.open(image) as file:
                start, stored = _header(file, path)
            _check_images(path, start, stored, shape, len(labels), image.file_size)
            if image.compress_type == zipfile.ZIP_STORED:
                file, start = path, _offset(path, image) + start
            else:
                file = _decompressed(archive, image, path, folder)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise ValueError(f"generated: {path} cannot be read ({error}); fetch it anew, or give {WANTED}") from error
    images = np.memmap(file, np.uint8, "r", start, stored)
    return GeneratedImages(path, images, labels, (image.CRC, label.CRC))


def _member(archive: zipfile.ZipFile, path: Path, name: str) -> zipfile.ZipInfo:
    try:
        return archive.getinfo(f"{name}.npy")
    except KeyError:
        there = ", ".join(sorted(n.removesuffix(".npy") for n in archive.namelist())) or "nothing"
        raise ValueError(f"generated: {path} has no array {name} (it has {there}); give {WANTED}") from None


def _header(file: IO[bytes], path: Path) -> tuple[int, tuple[int, ...]]:
    """Where the bytes of the images begin in their array's file, and their shape."""
    try:
        version = np.lib.format.read_magic(file)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, by_columns, dtype = read_header[version](file)
    except (KeyError, ValueError) as error:
        raise ValueError(f"generated: {path}: image is no array that numpy wrote ({error}); give {WANTED}") from error
    if dtype != np.uint8:
        raise ValueError(f"generated: {path}: image is of {dtype}; it must be of uint8, values 0 to 255")
    if by_columns:
        raise ValueError(f"generated: {path}: image is in Fortran's order; save numpy.ascontiguousarray of it")
    return file.tell(), shape


def _check_images(path, start, stored, shape, labels, size) -> None:
    channels, height, width = shape
    if stored[1:] != (height, width, channels) or len(stored) != 4:
        raise ValueError(
            f"generated: {path}: image has shape {stored}; it must be (n, {height}, {width}, {channels}), as the "
            "training images are"
        )
    if stored[0] != labels:
        raise ValueError(f"generated: {path} has {stored[0]} images and {labels} labels; they must be as many")
    if stored[0] == 0:
        raise ValueError(f"generated: {path} holds no image; it must have at least one")
    if size != start + np.prod(stored, dtype=np.int64):
        raise ValueError(f"generated: {path}: image is cut short or damaged; fetch it anew")


def _labels(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path, classes: int) -> np.ndarray:
    """In as few bytes as the classes need, for there may be hundreds of millions."""
    try:
        with archive.open(member) as file:
            labels = np.lib.format.read_array(file, allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"generated: {path}: label is no array that numpy wrote ({error}); give {WANTED}") from error
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise ValueError(
            f"generated: {path}: label is {labels.dtype} of shape {labels.shape}; it must be of integers, (n,)"
        )
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        strange = labels.min() if labels.min() < 0 else labels.max()
        raise ValueError(
            f"generated: {path} has label {strange}; labels must be in [0, {classes - 1}], the set's classes"
        )
    return labels.astype(np.min_scalar_type(classes - 1))


def _offset(path: Path, member: zipfile.ZipInfo) -> int:
    """Where the bytes of a member that is not compressed begin in the file."""
    with path.open("rb") as file:
        file.seek(member.header_offset)
        name, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    return member.header_offset + _LOCAL_HEADER.size + name + extra


def _decompressed(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path, folder: Path | None) -> Path:
    gigabytes = f"{member.file_size / 1e9:.3g} GB"
    if folder is None:
        raise ValueError(
            f"generated: {path} is compressed, and its images ({gigabytes}) are mapped from the cache, which is off; "
            "switch it on (cache=True), or save them by numpy.savez"
        )
    stat = path.stat()
    state = [stat.st_size, stat.st_mtime_ns, member.CRC]
    try:
        return cached_file(folder, path, ".npy", state, member.file_size, _bytes_of(archive, member, path, folder))
    except OSError as error:
        raise OSError(
            f"generated: the images of {path} ({gigabytes} decompressed) cannot be kept in {folder} ({error}); make "
            "room, give another root, or save them by numpy.savez"
        ) from error


def _bytes_of(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path, folder: Path) -> Iterator[bytes]:
    """Checked against the checksum in the file. Tells how far it is where that takes longer than 10 seconds."""
    free = shutil.disk_usage(folder).free
    if free < member.file_size:  # before minutes of work
        raise OSError(f"{free / 1e9:.3g} GB are free there")
    quiet, often = sys.stderr is None, 0.1 if sys.stderr is not None and sys.stderr.isatty() else 60.0
    how = {"unit": "B", "unit_scale": True, "delay": 10.0, "mininterval": often, "disable": quiet}
    with archive.open(member) as file, tqdm(desc=f"decompressing {path.name}", total=member.file_size, **how) as told:
        while chunk := file.read(CHUNK):
            yield chunk
            told.update(len(chunk))
