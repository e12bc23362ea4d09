"""Batches that mix real images in memory with generated ones on the disk."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from ..common import checks
from .batches import Batches, Windows, epoch_generator, slice_of
from .sets import GeneratedImages
from .table import GENERATED_SHARE, generated_rows

ROUNDS = 8  # of the permutation: few rows, such as 10, need more of them than many
_REAL, _GENERATED = 0, 1  # name the two walks


class MixedBatches(Batches):
    """Batches as of `Batches`, of which a share of the rows are generated images.

    Every batch has batch_size rows, `table.generated_rows(batch_size, generated_share)` of them generated and the rest
    real, and an epoch is as many batches as the real images alone would make: ceil(n / batch_size). So Rade's code and
    that of Wang et al. (arXiv 2302.04638) count them: how long a training is does not depend on how many images were
    generated, and with a share of 0.7 an epoch shows 0.3 of the real ones.

    Real and generated rows are drawn without replacement, through passes of their own that go on from epoch to epoch,
    each in a new order: all images of a kind are seen equally often, but for one time. (In the code of both papers real
    rows begin anew in each epoch, and generated ones are drawn with replacement.) Which rows batch b of epoch e has
    follows from the seed and its number in the run, e * len(self) + b: an iteration may start anywhere, and every rank
    reads its own rows alone. Generated rows are spread evenly over a batch, so that every rank has its share of them.

    Args:
        x, y, batch_size, augment, seed, device, rank, world: as for `Batches`. Both kinds of images are augmented.
        generated: of the size and channels of x. A thread reads the rows of the next batch while this one is used.
        generated_share: in (0, 1).
    Raises: TypeError, ValueError naming the argument.
    """

    def __init__(
        self, x: Tensor, y: Tensor, batch_size: int, *, generated: GeneratedImages,
        generated_share: float = GENERATED_SHARE, augment: str = "none", seed: int = 0,
        device: torch.device | str = "cpu", rank: int = 0, world: int = 1,
    ):  # fmt: skip
        super().__init__(
            x, y, batch_size, shuffle=True, augment=augment, seed=seed, device=device, rank=rank, world=world
        )
        channels, height, width = x.shape[1:]
        if generated.images.shape[1:] != (height, width, channels):
            raise ValueError(
                f"generated: its images are {generated.images.shape[1:]}; they must be {(height, width, channels)}, as "
                "the real ones"
            )
        self.generated = generated
        self.generated_share = checks.real("generated_share", generated_share, 0.0, 1.0)
        self.generated_rows = generated_rows(self.batch_size, self.generated_share)
        self._real_rows = self.batch_size - self.generated_rows
        self._real_walk = Walk(len(x), self.seed, _REAL)
        self._generated_walk = Walk(len(generated), self.seed, _GENERATED)
        self.rows = len(self) * self.batch_size  # of an epoch: the last batch is as large as the others
        # so every batch has the same places for generated rows, and a rank the same slice of them
        here = slice_of(self.batch_size, self.rank, self.world)
        self._own_generated = slice(*(place * self.generated_rows // self.batch_size for place in here))
        self._own_real = slice(*(place - place * self.generated_rows // self.batch_size for place in here))
        before = torch.arange(here[0], here[1] + 1) * self.generated_rows // self.batch_size
        is_generated = before.diff() == 1
        self._at = [kind.nonzero()[:, 0].to(self.device) for kind in (~is_generated, is_generated)]
        if self._windows is not None:
            self._windows = Windows(x.shape, here[1] - here[0], self.device)

    def _batches(self, numbers: range, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        draws = self._draws(epoch_generator(self.seed, epoch))
        step = epoch * len(self)  # batches of the run before this epoch
        real = self._real_walk.rows(step * self._real_rows, len(self) * self._real_rows)
        real = torch.from_numpy(real).view(len(self), -1)[:, self._own_real].to(self.device)
        with ThreadPoolExecutor(1, "generated") as reader:
            due = reader.submit(self._read, step + numbers[0]) if numbers else None
            for b in numbers:
                pixels, labels = (t.to(self.device, non_blocking=True) for t in due.result())
                due = reader.submit(self._read, step + b + numbers.step) if b != numbers[-1] else None
                x = self._together(self._x.index_select(0, real[b]), pixels.permute(0, 3, 1, 2))
                y = self._together(self._y.index_select(0, real[b]), labels)
                yield self._seen(x, draws[:, self._places(b)]), y

    def _read(self, step: int) -> tuple[Tensor, Tensor]:
        """This rank's generated rows of a batch: uint8 (g, H, W, C) and int64 (g,), on the CPU."""
        own = self._own_generated
        rows = self._generated_walk.rows(step * self.generated_rows + own.start, own.stop - own.start)
        images, labels = self.generated.images[rows], self.generated.labels[rows].astype(np.int64)
        found = torch.from_numpy(images), torch.from_numpy(labels)
        return tuple(t.pin_memory() for t in found) if self.device.type == "cuda" else found

    def _together(self, real: Tensor, generated: Tensor) -> Tensor:
        out = real.new_empty(len(real) + len(generated), *real.shape[1:])
        for at, part in zip(self._at, (real, generated), strict=True):
            out.index_copy_(0, at, part)
        return out


class Walk:
    """An endless walk through rows 0 to n - 1: pass after pass over all of them, each in an order of its own.

    The row at any position is computed from it, so that a walk is entered anywhere and holds nothing; the shuffled
    numbers of 500 million rows would take 4 GB in every process. A pass sends its positions through a Feistel network
    of the next power of four, and again where that leaves n (cycle walking: Black and Rogaway, CT-RSA 2002).
    """

    def __init__(self, n: int, seed: int, name: int):
        self.n, self.seed, self.name = n, seed, name
        self._half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))  # bits
        self._low = np.uint64((1 << int(self._half)) - 1)

    def rows(self, first: int, count: int) -> np.ndarray:
        """(count,) int64: the rows at positions first and following."""
        out, done = np.empty(count, np.int64), 0
        while done < count:
            number, place = divmod(first + done, self.n)
            here = min(count - done, self.n - place)
            out[done : done + here] = self._order(number, place, here)
            done += here
        return out

    def _order(self, number: int, place: int, count: int) -> np.ndarray:
        """Of pass `number`, rows `place` and following."""
        words = [*divmod(self.seed, 2**32), self.name, *divmod(number, 2**32)]
        keys = np.random.SeedSequence(words).generate_state(ROUNDS, np.uint64)
        row = self._sent(np.arange(place, place + count, dtype=np.uint64), keys)
        while (outside := row >= self.n).any():
            row[outside] = self._sent(row[outside], keys)
        return row

    def _sent(self, value: np.ndarray, keys: np.ndarray) -> np.ndarray:
        left, right = value >> self._half, value & self._low
        for key in keys:
            left, right = right, left ^ (_mixed(right + key) & self._low)
        return left << self._half | right


def _mixed(value: np.ndarray) -> np.ndarray:
    """Each bit depends on all: the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
