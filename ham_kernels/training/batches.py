"""What a trainer draws from its loader: the rest of an epoch, in groups of batches; and what these must be."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..common import checks
from ..distributed import Meeting, RankError, Ranks
from ..engine import NonFiniteError, model_device


class Feed:
    """Batches of a loader, and how many rows of each every process has; what is wrong on one raises on all.

    The processes meet for that, unless their loaders know what the others give: what goes wrong with a batch is then
    told where they meet in its step.
    """

    def __init__(self, ranks: Ranks, model: nn.Module, device: torch.device):
        self.ranks, self.model, self.device = ranks, model, device

    def groups(
        self, loader: Iterable, epoch: int, done: int, size: int
    ) -> Iterator[tuple[list[tuple[Tensor, Tensor]], list[float]]]:
        """Groups of `size` batches behind the first `done` of an epoch, each with the rows of it on each process."""
        groups = in_groups(rest_of_epoch(loader, epoch, done), size)
        while True:
            with self._meeting() as meeting:
                batches = next(groups, [])
                with errors_say_where(epoch, done, len(batches)):
                    batches = [self._unpacked(batch) for batch in batches]
                    if batches:
                        self._check(batches)
                rows = self._known(loader, done, batches) or _rows(meeting, batches)
            if not batches:
                return
            yield batches, rows
            done += len(batches)

    def first(self, loader: Iterable, epoch: int) -> tuple[tuple[Tensor, Tensor], list[float]]:
        """The first batch of an epoch, drawn once more."""
        with self._meeting() as meeting:
            batch = self._unpacked(next(iter(rest_of_epoch(loader, epoch, 0))))
            return batch, _rows(meeting, [batch])

    def rows_of(self, batches: Sequence[tuple[Tensor, Tensor]]) -> list[float]:
        """Of batches that no loader gave."""
        with self._meeting() as meeting:
            self._check(batches)
            if self.ranks.several and len(batches) > 1:
                raise ValueError(f"batches: got {len(batches)}; several processes train on one at a time")
            return _rows(meeting, batches)

    def _meeting(self) -> Meeting:
        return Meeting(self.ranks, self.device, what="this batch")

    def _known(self, loader: Iterable, done: int, batches: Sequence[tuple[Tensor, Tensor]]) -> list[int]:
        """How many rows each process has of a batch behind the first `done`, where the loader knows; else none."""
        place = getattr(loader, "rank", None), getattr(loader, "world", None)
        if (
            not self.ranks.several
            or not batches
            or place != (self.ranks.rank, self.ranks.world)
            or not hasattr(loader, "rows_of_each")
        ):
            return []
        rows, here = loader.rows_of_each(done), len(batches[0][1])
        if rows[self.ranks.rank] != here:
            raise ValueError(f"train_loader: gave {here} rows, and its rows_of_each told {rows[self.ranks.rank]}")
        return rows

    def _check(self, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        check_group(batches, model_device(self.model), empty=self.ranks.several)

    def _unpacked(self, batch) -> tuple[Tensor, Tensor]:
        x, y = checks.pair("train_loader", batch, empty=self.ranks.several)
        return x.to(self.device), y.to(self.device)


def _rows(meeting: Meeting, batches: Sequence[tuple[Tensor, Tensor]]) -> list[float]:
    """How many rows each process has of this batch; none where their loader has ended."""
    heard = meeting.table([sum(len(y) for _, y in batches), len(batches)])
    there = {bool(n) for _, n in heard}
    if len(there) > 1:
        ended = next(r for r, (_, n) in enumerate(heard) if not n)
        raise RankError(
            f"train_loader: process {ended} has given its last batch, and others go on; give as many on each"
        )
    if there == {True} and not sum(rows := [n for n, _ in heard]):
        raise ValueError("x: no process has a row of this batch; an empty batch cannot be trained on")
    return rows if there == {True} else []


@contextmanager
def errors_say_where(epoch: int, done: int, batches: int) -> Iterator[None]:
    """Errors say in which batches they arose: in so many behind the first `done`."""
    try:
        yield
    except (TypeError, ValueError) as error:
        first, last = done + 1, done + batches
        where = f"epoch {epoch}, batch {first}" if first >= last else f"epoch {epoch}, batches {first} to {last}"
        if isinstance(error, RankError):
            raise RankError(f"{where}: {error}", left=error.left) from error
        kind = type(error) if type(error) in (TypeError, NonFiniteError) else ValueError
        raise kind(f"{where}: {error}") from error


def rest_of_epoch(loader: Iterable, epoch: int, done: int) -> Iterator:
    """The batches of an epoch behind the first `done`."""
    for part in (loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)):
        if hasattr(part, "set_epoch"):  # DistributedSampler; a DataLoader has none of its own
            part.set_epoch(epoch)
    if hasattr(loader, "set_position"):
        loader.set_position(done)
        return iter(loader)
    return itertools.islice(loader, done, None)


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
