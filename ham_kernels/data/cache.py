"""Decoded images kept on disk: decoding 60 000 files takes 15 seconds to a minute, reading them back less than one.

A cache file is named after its source, a hash of where that lies and how it is resized, and a hash of what it holds
(sizes and modification times), so a changed source gets a new file, and the old one goes.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor

from ..common import files, locks, troubles
from .sets import ImageSet

VERSION = 4  # of what a file holds, and of how class folders are read and resized


def cached(folder: Path | None, source: Path, size: int | None, state: list, build: Callable[[], ImageSet]) -> ImageSet:
    """What `build` gives, from the cache file where there is one, and kept there where there was none.

    Args:
        folder: of the cache files; None switches caching off.
        source, size: what is decoded, and the size it is resized to.
        state: what changes when the source does: numbers and strings.
    A file that cannot be read or does not hold what was written is reported with one warning and written anew.
    """
    if folder is None:
        return build()
    where = _digest([VERSION, str(source.resolve()), size])
    file = folder / f"{_short(source.name)}-{where[:12]}-{_digest(state)[:20]}.pt"
    images = _read(file) if file.exists() else None
    if images is None:
        images = build()
        _write(file, images)
        for old in folder.glob(f"*-{where[:12]}-*.pt"):
            if old != file:
                old.unlink(missing_ok=True)
    return images


def cached_file(folder: Path, source: Path, suffix: str, state: list, size: int, parts: Iterable[bytes]) -> Path:
    """The file of `size` bytes that `parts` are: written where there is none yet, and to be mapped where it lies.

    Args:
        folder: of the cache files.
        source, state: as for `cached`.
        parts: what the file holds; read only where it is not there.
    A file of another size is reported with one warning and written anew. Of several processes one writes, and the
    others wait for it. Raises: OSError.
    """
    where = _digest([VERSION, str(source.resolve()), suffix])
    file = folder / f"{_short(source.name)}-{where[:12]}-{_digest(state)[:20]}{suffix}"
    if _is_whole(file, size):
        return file
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".{where[:12]}.lock").open("w") as lock:
        while not locks.take(lock):
            time.sleep(0.1)
        if not _is_whole(file, size):
            if file.exists():
                troubles.warn("cache_damaged", file=file, error=f"{file.stat().st_size} bytes of {size}")
            files.write_parts(file, parts)
        for old in folder.glob(f"*-{where[:12]}-*{suffix}"):
            if old != file:
                old.unlink(missing_ok=True)  # a process that has it mapped keeps it
    return file


def _is_whole(file: Path, size: int) -> bool:
    return file.exists() and file.stat().st_size == size


def _digest(value: list) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _read(file: Path) -> ImageSet | None:
    try:
        held = files.load(file)
        fields = {name: t for name, t in held.items() if isinstance(t, Tensor)}
        also = {"left_out": dict(held["left_out"]), "empty": tuple(held["empty"])}
        return ImageSet(held["name"], tuple(held["classes"]), **fields, **also)
    except (OSError, KeyError, TypeError, ValueError) as error:  # the source is there all the same
        reason = str(error).split("\n")[0]
        troubles.warn("cache_damaged", file=file, error=f"{type(error).__name__}: {reason}")
        return None


def _write(file: Path, images: ImageSet) -> None:
    tensors = {f"{kind}_{part}": getattr(images, f"{kind}_{part}") for part in images.counts for kind in "xy"}
    try:
        told = {"name": images.name, "classes": list(images.classes), "left_out": dict(images.left_out)}
        files.save(file, {**told, "empty": list(images.empty), **tensors})
    except (OSError, RuntimeError) as error:  # a full or read-only disk; the images are there all the same
        troubles.warn("cache_not_written", file=file, error=error)


def _short(name: str) -> str:
    """Its first 60 bytes: file systems count those of a name."""
    return os.fsencode(name)[:60].decode("utf-8", "ignore")
