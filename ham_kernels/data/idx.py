"""IDX files, the format of MNIST, Fashion-MNIST, KMNIST and EMNIST, packed by gzip or not."""

from __future__ import annotations

import gzip
import os
import re
import zlib
from pathlib import Path

import torch
from torch import Tensor

from .layout import part_of
from .sets import ImageSet

_NAME = re.compile(
    r"(?P<stem>.*?)(?P<part>train(?:ing)?|t10k|test|val(?:id(?:ation)?)?)[-_.](?P<what>images|labels)[-_.]idx[13][-_.]ubyte"
    r"(?P<packed>\.gz)?",
    re.IGNORECASE,
)
WANTED = "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte"


def files_in(path: Path) -> dict[tuple[str, str], Path]:
    """{("train", "images"): file, ...} of the IDX files in a folder or below; unpacked ones before packed.

    Raises: ValueError where there are several sets of them.
    """
    found: dict[tuple[str, str], Path] = {}
    for folder, _, names in sorted(os.walk(path, followlinks=True)):
        for name in sorted(names):  # a packed one follows the unpacked one
            told = _NAME.fullmatch(name)
            if told is None:
                continue
            part = "test" if told["part"].lower() == "t10k" else part_of(told["part"])
            key, file = (part, told["what"].lower()), Path(folder, name)
            first = found.setdefault(key, file)
            if first != file and file.with_suffix("") != first:
                raise ValueError(
                    f"path: {path} has two sets of IDX files ({first.name}, {file.name}); give a folder of one"
                )
    return found


def read(path: Path, size: int | None) -> ImageSet:
    """An ImageSet of one channel; classes are the labels. Raises: ValueError naming the file."""
    files = files_in(path)
    parts = [part for part in ("train", "val", "test") if any(key[0] == part for key in files)]
    wanted = [(part, what) for part in (*parts, "train", "test") for what in ("images", "labels")]
    missing = [" ".join(key) for key in wanted if key not in files]
    if missing:
        raise ValueError(
            f"path: {path} lacks the IDX file of {missing[0]}; it needs {WANTED}, each with .gz or without"
        )
    x = {part: _array(files[part, "images"], 3) for part in parts}
    y = {part: _array(files[part, "labels"], 1).long() for part in parts}
    for part in parts:
        if len(x[part]) != len(y[part]):
            raise ValueError(
                f"path: {files[part, 'images']} holds {len(x[part])} images and {files[part, 'labels'].name} "
                f"{len(y[part])} labels; they must be as many"
            )
        if x[part].shape[1:] != x["train"].shape[1:]:
            raise ValueError(f"path: {files[part, 'images']} holds images of another size than those of training")
    if size is not None and x["train"].shape[1:] != (size, size):
        height, width = x["train"].shape[1:]
        raise ValueError(f"size: got {size} for IDX files, whose images are {width}x{height}; leave it out")
    labels = y["train"].unique()  # sorted; EMNIST's letters begin with 1
    for part in parts:
        strange = set(y[part].unique().tolist()) - set(labels.tolist())
        if strange:
            raise ValueError(f"path: {files[part, 'labels']} has label {min(strange)}, which no training image has")
    fields = {f"x_{part}": x[part][:, None] for part in parts}
    fields |= {f"y_{part}": torch.searchsorted(labels, y[part]) for part in parts}
    return ImageSet(path.resolve().name, tuple(map(str, labels.tolist())), **fields)


def _array(file: Path, dimensions: int) -> Tensor:
    """uint8 of so many dimensions: magic number 0x800 + dimensions, one length each, bytes."""
    try:
        data = bytearray(gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"path: {file} cannot be read ({error}); fetch it anew") from error
    head = 4 * (1 + dimensions)
    numbers = [int.from_bytes(data[at : at + 4], "big") for at in range(0, head, 4)]
    if len(data) < head or numbers[0] != 0x800 + dimensions:
        raise ValueError(f"path: {file} is no IDX file of bytes in {dimensions} dimensions; fetch it anew")
    shape = numbers[1:]
    if len(data) - head != torch.Size(shape).numel() or 0 in shape:
        raise ValueError(f"path: {file} is cut short or damaged: it tells {shape} bytes and holds {len(data) - head}")
    return torch.frombuffer(data, dtype=torch.uint8, offset=head).view(shape)
