"""Types of arguments that several scripts take: what is wrong is told before anything is measured."""

from __future__ import annotations

import os
from argparse import ArgumentTypeError
from pathlib import Path


def folder(text: str) -> Path:
    """One that files can be written to; it need not be there yet."""
    path = Path(text)
    nearest = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ArgumentTypeError(f"got {text}; {nearest} is not a folder that can be written")
    return path


def json_file(text: str) -> Path:
    """One that can be written."""
    path = Path(text)
    if path.is_dir():
        raise ArgumentTypeError(f"got {text}, a folder; it must be a file")
    folder(str(path.parent))
    return path


def there(text: str) -> Path:
    """A file or folder."""
    path = Path(text)
    if not path.exists():
        raise ArgumentTypeError(f"{text} is not there")
    return path


def device(text: str) -> str:
    """As torch names it."""
    import torch  # here, since the GPU suite, which has no --device, need not load it

    try:
        torch.device(text)
    except RuntimeError:
        raise ArgumentTypeError(f"got {text}; it must be one of torch's devices, such as cpu or cuda:0") from None
    return text
