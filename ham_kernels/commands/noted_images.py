"""What `ham evaluate` keeps of the images it judges, so that a report can verify and pair its results."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import data
from ..common.troubles import text
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
