"""What a trainer draws from its loader: the rest of an epoch, in groups of batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

from torch import Tensor

from . import _check


def rest_of_epoch(loader: Iterable, epoch: int, done: int) -> Iterator:
    """The batches of an epoch behind the first `done`."""
    if hasattr(loader, "set_epoch"):
        loader.set_epoch(epoch)
    if hasattr(loader, "set_position"):
        loader.set_position(done)
        return iter(loader)
    return itertools.islice(loader, done, None)


def in_groups(batches: Iterator, size: int) -> Iterator[list]:
    """Lists of `size` batches; the last may be shorter."""
    while group := list(itertools.islice(batches, size)):
        yield group


def unpack(batch) -> tuple[Tensor, Tensor]:
    """(x, y) of a batch. Raises: TypeError, ValueError."""
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
        raise TypeError(f"train_loader: gave {type(batch).__name__}; each batch must be a pair (x, y)")
    x, y = batch
    _check.batch(x, y)
    return x, y
