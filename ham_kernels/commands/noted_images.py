"""What `ham evaluate` keeps of the images it judges: to verify and pair its results, and a few to look at."""

from __future__ import annotations

import hashlib
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import data
from ..common.files import write_atomically
from ..common.troubles import text
from ..evaluation.example_images import Examples
from ..report.reading.evaluations import Attack
from ..report.reading.flags import contradiction
from ..report.reading.json_types import MALFORMED, read_as
from .progress import say


class NotedLoader:
    """A loader; `noted` is what its images were once they have passed: {"labels", "images_sha256"}.

    The digest is of pixels of 8 bits and labels, whatever the batch size and the device.
    """

    def __init__(self, loader: data.Batches | data.FileBatches):
        self._loader, self.rows, self.noted = loader, loader.rows, {}

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        digest, labels = hashlib.sha256(), []
        for x, y in self._loader:
            digest.update((255 * x).round().to(torch.uint8).cpu().contiguous().numpy())
            labels += y.tolist()
            yield x, y
        told = " ".join(map(str, labels))
        digest.update(f"{tuple(x.shape[1:])} {told}".encode())
        self.noted = {"labels": told, "images_sha256": digest.hexdigest()}


def drop_altered(attacks: dict[str, Any], path: Path) -> None:
    """Drops attacks whose accuracies do not follow from their flags, and says so of the file, to be judged anew."""
    for name, attack in list(attacks.items()):
        try:
            why = contradiction(read_as(Attack, attack))
        except MALFORMED as error:
            why = f"{type(error).__name__}: {error}"
        if why:
            say(text("flags_contradict", file=path, attack=name, why=why), sys.stderr)
            del attacks[name]


def write_examples(path: Path, found: Examples) -> dict[str, Any]:
    """Writes the arrays x and x_adv, (n, C, H, W) float16 in [0, 1]. Returns {"file", "sha256", "rows"}, for JSON."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, x=found.x, x_adv=found.x_adv)
    write_atomically(path, buffer.getbuffer())
    return {"file": path.name, "sha256": hashlib.sha256(buffer.getbuffer()).hexdigest(), "rows": found.rows}


def has_examples(path: Path, noted: Any) -> bool:
    """Whether the file is there as it was written with these rows."""
    known = noted.get("sha256") if isinstance(noted, dict) else None
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == known
