"""What a folder or tar holds, seen without decoding it: enough to choose settings by. Imports no torch for images."""

from __future__ import annotations

import io
import statistics
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from . import layout, listing

SEEN = 50  # images whose headers are read


@dataclass(frozen=True)
class Glance:
    """train: images to train on, before any is set aside. pixels: of the shorter side, as most images have it.

    varied: whether sizes differ. idx: whether they are IDX files. tar: whether they are packed.
    """

    train: int
    pixels: int
    varied: bool = False
    idx: bool = False
    tar: bool = False


def glance(path: str | Path) -> Glance | None:
    """None for what cannot be read; `data.load` tells why."""
    path = Path(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # given again where the images are read
            return _folder(path) if path.is_dir() else _tar(path)
    except (ImportError, OSError, ValueError, SyntaxError):
        return None


def _folder(path: Path) -> Glance:
    names = listing.of_folder(path).names
    if not names:
        from . import idx

        images = idx.read(path, None)
        return Glance(len(images.y_train), min(images.x_train.shape[2:]), idx=True)
    step = -(-len(names) // SEEN)
    return Glance(_train(path, names), *_sizes(path / name for name in names[::step]))


def _tar(path: Path) -> Glance:
    found, first = listing.Listing(), []
    for _, read in listing.in_tar(path, found):
        if len(first) < SEEN:
            first.append(io.BytesIO(read()))
    return Glance(_train(path, found.names), *_sizes(first), tar=True)


def _train(path: Path, names: list[str]) -> int:
    parts = [part for part, _ in layout.places(path, names)]
    return parts.count("train") if "train" in parts else len(parts) - len(parts) // 5


def _sizes(files) -> tuple[int, bool]:
    from PIL import Image

    sizes = []
    for file in files:  # a broken one is named when it is read
        with suppress(OSError, ValueError, SyntaxError), Image.open(file) as image:
            sizes.append(image.size)
    if not sizes:
        raise ValueError("none can be read")
    return int(statistics.median(map(min, sizes))), len(set(sizes)) > 1
