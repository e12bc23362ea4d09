"""Checkpoints that are whole or are not there: written aside, flushed, renamed; every byte under a checksum.

A file is what torch.save writes (so torch.load reads it too), followed by the SHA-256 of all that precedes it. The
digest stands in the comment that a zip archive may end with, so that one rename moves data and checksum together.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

_MARK = b"ham_kernels sha256:"
_COMMENT_SIZE = len(_MARK) + 64
_ZIP_END = b"PK\x05\x06"  # starts the last 22 bytes of a zip archive without a comment; the last 2 are its length


class CheckpointError(ValueError):
    """A checkpoint that is truncated, altered, or none at all. The message names the file."""


class IncompatibleError(ValueError):
    """A checkpoint that is as it was written, and of no use here. The message names the file."""


def save(path: str | Path, state: dict[str, Any]) -> str:
    """Writes `state` (tensors, numbers, strings, None, dicts, lists, tuples) so that `path` is old or new, never torn.

    Returns: the SHA-256 of the file's content, as 64 hexadecimal digits.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    body = buffer.getbuffer()
    if bytes(body[-22:-18]) != _ZIP_END:
        raise RuntimeError("torch.save no longer ends with a zip record; the checksum has no place")
    body[-2:] = _COMMENT_SIZE.to_bytes(2, "little")
    digest = hashlib.sha256(body)
    digest.update(_MARK)
    write_atomically(path, body, _MARK, digest.hexdigest().encode())
    return digest.hexdigest()


def load(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint, to the CPU, after checking every byte.

    Raises: FileNotFoundError; CheckpointError naming the file if it is truncated or altered; IncompatibleError if it
        is whole, and this version of torch cannot read it.
    """
    return read(path)[0]


def read(path: str | Path) -> tuple[dict[str, Any], str]:
    """As `load`; the state and its SHA-256."""
    data = Path(path).read_bytes()
    digest = checksum(memoryview(data), path)
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True), digest
    except MemoryError:
        raise
    except Exception as error:  # whatever a pickle of another version raises
        raise IncompatibleError(f"checkpoint {path} is whole, but cannot be read here: {error}") from error


def checksum(data: bytes | memoryview, path: str | Path) -> str:
    """The verified SHA-256 of a checkpoint's bytes."""
    body, mark, written = data[:-_COMMENT_SIZE], bytes(data[-_COMMENT_SIZE:-64]), bytes(data[-64:])
    if mark != _MARK:
        raise CheckpointError(f"checkpoint {path} is truncated, or was not written by ham_kernels ({len(data)} bytes)")
    found = hashlib.sha256(body)
    found.update(mark)
    if found.hexdigest().encode() != written:
        raise CheckpointError(f"checkpoint {path} was altered: its SHA-256 does not match its content")
    return found.hexdigest()


def write_atomically(path: str | Path, *parts: bytes | memoryview) -> None:
    """After this returns, `path` holds the parts on the disk; if it does not return, it is as it was before."""
    write_parts(path, parts)


def write_parts(path: str | Path, parts: Iterable[bytes | memoryview]) -> None:
    """As `write_atomically`, of parts that need not be in memory together."""
    path = Path(path)
    try:
        _write_atomically(path, parts)
    except OSError as error:
        if error.errno is None:
            raise
        raise type(error)(error.errno, f"{error.strerror}, writing", str(path)) from error


def _write_atomically(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with aside.open("xb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):  # it may never have been there; the error that counts is the first
            aside.unlink()
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Makes a rename in the folder outlive a power cut, where the file system can be asked to."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # the file itself is written and flushed
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
