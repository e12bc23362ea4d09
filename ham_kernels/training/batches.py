"""What a trainer draws from its loader: the rest of an epoch, in groups of batches; and what these must be."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ..common import checks


def rest_of_epoch(loader: Iterable, epoch: int, done: int) -> Iterator:
    """The batches of an epoch behind the first `done`."""
    if hasattr(loader, "set_epoch"):
        loader.set_epoch(epoch)
    if hasattr(loader, "set_position"):
        loader.set_position(done)
        return iter(loader)
    return itertools.islice(loader, done, None)


def first_of_epoch(loader: Iterable, epoch: int):
    """The first batch of an epoch, drawn once more."""
    return next(iter(rest_of_epoch(loader, epoch, 0)))


def in_groups(batches: Iterator, size: int) -> Iterator[list]:
    """Lists of `size` batches; the last may be shorter."""
    while group := list(itertools.islice(batches, size)):
        yield group


def check_group(batches: Sequence[tuple[Tensor, Tensor]], home: torch.device | None, *, empty: bool = False) -> None:
    """Pairs (x, y), images of one size and type, all on `home`; `empty`: a batch may have no row.

    Raises: TypeError, ValueError naming x, y, batches.
    """
    if not batches:
        raise ValueError("batches: got none; give at least one")
    first = batches[0][0]
    for x, y in batches:
        checks.batch(x, y, empty=empty)
        if x.shape[1:] != first.shape[1:] or x.dtype != first.dtype:
            raise ValueError(
                f"x: got {tuple(x.shape)}, {x.dtype} in a group with {tuple(first.shape)}, {first.dtype}; "
                "the images of a group are of one size and type"
            )
        if home is not None and x.device != home:
            raise ValueError(f"x: is on device {x.device}; it must be on the model's, {home}")
