"""Batches of a data set in memory, shuffled, cropped and flipped on the training device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..common import checks, troubles
from .sets import check_images
from .table import AUGMENTATIONS

PAD = 4  # pixels of zeros around an image that is cropped


def mixed_seed(*numbers: int) -> int:
    """One seed of 32 bits (torch's CPU generator reads no more) out of several numbers below 2^64."""
    words = [word for number in numbers for word in divmod(number, 2**32)]  # (2^32, 0) and (0, 1) must not look alike
    return int(np.random.SeedSequence(words).generate_state(1)[0])


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """The CPU generator that an epoch's order (and in memory its augmentation) is drawn from."""
    return torch.Generator().manual_seed(mixed_seed(seed, epoch))


def balanced_order(y: Tensor, generator: torch.Generator) -> Tensor:
    """(n,) rows, drawn with replacement: each class that has rows is equally likely, and each row of a class."""
    by_class, counts = torch.argsort(y, stable=True), torch.bincount(y)
    known = counts.nonzero()[:, 0]
    classes = known[torch.randint(len(known), (len(y),), generator=generator)]
    within = torch.rand(len(y), generator=generator, dtype=torch.float64) * counts[classes]
    return by_class[(counts.cumsum(0) - counts)[classes] + within.long()]


def slice_of(n: int, rank: int, world: int) -> tuple[int, int]:
    """Where the rows of rank `rank` of `world` begin and end in a batch of n rows: first, and one past the last.

    The slices of all ranks in their order are the batch. Their lengths differ by one at most; where n < world some are
    empty. n >= 0; 0 <= rank < world.
    """
    return rank * n // world, (rank + 1) * n // world


class EpochLoader:
    """The epoch and the position of a loader, and the order of its rows.

    Global batches hold places b * batch_size and following of the order; none are dropped. A rank gives its slice of
    each, the empty ones too, so that all ranks give as many.
    """

    def __init__(
        self, y: Tensor, batch_size: int, seed: int, shuffle: bool, balanced: bool, rank: int = 0, world: int = 1
    ):
        self.rows = len(y)
        if self.rows == 0:
            raise ValueError("images: there are none in this part; it must have at least one")
        self.shuffle = checks.flag("shuffle", shuffle)
        self.balanced = checks.flag("balanced", balanced)
        self._labels = y.cpu()
        self.batch_size = checks.integer("batch_size", batch_size, 1)
        self.seed = checks.integer("seed", seed, 0, 2**63 - 1)
        self.world = checks.integer("world", world, 1)
        self.rank = checks.integer("rank", rank, 0, self.world - 1)
        self.epoch = 0
        self._position = 0
        self._passes: int | None = 0  # whole ones, as long as nobody has told an epoch

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iterations give."""
        self.epoch = checks.integer("epoch", epoch, 0)
        self._passes = None

    def set_position(self, batches: int) -> None:
        """The next iteration (only that one) starts after so many global batches of its epoch, without making them."""
        self._position = checks.integer("batches", batches, 0, len(self))

    def __len__(self) -> int:
        """Global batches of an epoch: the same on all ranks."""
        return -(-self.rows // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        first, self._position = self._position, 0
        if self._passes == 1 and (self.shuffle or self.balanced):
            troubles.warn("same_epoch_again", epoch=self.epoch)
        return self._counted(self._batches(range(first, len(self)), self.epoch))

    def _counted(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        yield from batches
        if self._passes is not None:
            self._passes += 1

    def turns(self, turn: int, of: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Global batches turn, turn + of, ... of the epoch; the others are not made."""
        return self._batches(range(turn, len(self), of), self.epoch)

    def _batches(self, numbers: range, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        raise NotImplementedError

    def rows_of_each(self, b: int) -> list[int]:
        """How many rows each rank gives of global batch b, from 0; [] of one behind the last."""
        if b >= len(self):
            return []
        return [end - first for first, end in (self._slice(b, rank) for rank in range(self.world))]

    def _slice(self, b: int, rank: int) -> tuple[int, int]:
        return slice_of(min(self.batch_size, self.rows - b * self.batch_size), rank, self.world)

    def _places(self, b: int) -> slice:
        """The places in the order that this rank gives of global batch b."""
        first, end = self._slice(b, self.rank)
        return slice(b * self.batch_size + first, b * self.batch_size + end)

    def _order(self, generator: torch.Generator) -> Tensor:
        """(rows,) int64, on the CPU: the first that an epoch draws."""
        if self.balanced:
            return balanced_order(self._labels, generator)
        return torch.randperm(self.rows, generator=generator) if self.shuffle else torch.arange(self.rows)


@dataclass(frozen=True)
class Shown:
    """Which images of a set a batch shows, and the window of each: what lies at a pixel of an image is found again."""

    shape: tuple[int, int, int, int]  # of all images, (n, C, H, W), padded where windows are drawn
    size: tuple[int, int]  # of a window: height, width
    numbers: Tensor  # (b,) int64, of the images
    windows: Tensor | None  # (3, b) int64, as `Batches` draws them: top, left, step; None: whole images

    def of(self, kept: Tensor) -> Tensor:
        """(b, C, *size): the windows of what is kept for each pixel of each image, `shape`."""
        rows = kept.index_select(0, self.numbers)
        if self.windows is None:
            return rows
        found = rows.flatten(2).gather(2, self._pixels(rows))
        return found.view(*rows.shape[:2], *self.size)

    def write(self, kept: Tensor, values: Tensor, rows: Tensor | slice = slice(None)) -> None:
        """Puts values (r, C, *size) of these rows of the batch into `kept`, where `of` reads them."""
        if self.windows is None:
            kept[self.numbers[rows]] = values.to(kept.dtype)
            return
        whole = kept.index_select(0, self.numbers[rows])
        pixels = self._pixels(whole, rows)
        whole.flatten(2).scatter_(2, pixels, values.flatten(2).to(kept.dtype))
        kept[self.numbers[rows]] = whole

    def _pixels(self, like: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        """(r, C, height * width): places of a window's pixels in an image that is read line by line."""
        top, left, step = (t.view(-1, 1, 1) for t in self.windows[:, rows])
        down, right = (torch.arange(n, device=like.device) for n in self.size)
        places = (top + down.view(-1, 1)) * self.shape[3] + left + step * right
        return places.flatten(1).unsqueeze(1).expand(-1, like.shape[1], -1)


class Batches(EpochLoader):
    """Batches (x float32 (b, C, H, W) in [0, 1], y int64 (b,)) of images in memory, made on `device`.

    Order, windows and flips of epoch e are drawn at its start for all rows, on the CPU, from (seed, e) only, and
    moved to the device once: the same numbers whatever the device, the number of ranks and wherever an iteration
    starts. Each x has an attribute `shown` that tells which images it is of.

    Args:
        x: uint8 (n, C, H, W).  y: (n,) int64.  Both are moved to `device`.
        batch_size: rows of each global batch, of all ranks together; the last one may have fewer.
        shuffle: a new order each epoch.
        balanced: rows drawn anew each epoch, with replacement, so that classes are equally likely; in place of shuffle.
        augment: "none"; "crop": a random H x W window of the image with 4 pixels of zeros around; "crop+flip": and
            mirrored left to right with probability 1/2.
        seed: >= 0.
        rank, world: give rows `slice_of(b, rank, world)` of each global batch of b rows, perhaps none; 0 <= rank <
            world.
    Raises: TypeError, ValueError naming the argument.
    """

    def __init__(
        self, x: Tensor, y: Tensor, batch_size: int, *, shuffle: bool, balanced: bool = False, augment: str = "none",
        seed: int = 0, device: torch.device | str = "cpu", rank: int = 0, world: int = 1,
    ):  # fmt: skip
        check_images("x", x, "y", y)
        super().__init__(y, batch_size, seed, shuffle, balanced, rank, world)
        self.augment = checks.choice("augment", augment, AUGMENTATIONS)
        self.device = torch.device(device)
        self._x, self._y = x.to(self.device), y.to(self.device)
        # a tensor: divided by a number, a GPU multiplies by its inverse, which rounds differently
        self._white = torch.tensor(255.0, device=self.device)
        most = -(-min(batch_size, len(x)) // self.world)
        self._windows = None if augment == "none" else Windows(x.shape, most, self.device)

    def _batches(self, numbers: range, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = epoch_generator(self.seed, epoch)
        order = self._order(generator).to(self.device)
        draws = self._draws(generator)
        for b in numbers:
            here = self._places(b)
            if self.shuffle or self.balanced:
                x, y = self._x.index_select(0, order[here]), self._y.index_select(0, order[here])
            else:
                x, y = self._x[here], self._y[here]
            x = self._seen(x, draws[:, here])
            x.shown = self._shown(order[here], draws[:, here])
            yield x, y

    def _shown(self, numbers: Tensor, draws: Tensor) -> Shown:
        n, channels, height, width = self._x.shape
        if self._windows is None:
            return Shown((n, channels, height, width), (height, width), numbers, None)
        return Shown((n, channels, height + 2 * PAD, width + 2 * PAD), (height, width), numbers, draws)

    def _draws(self, generator: torch.Generator) -> Tensor:
        """(3, rows) int64, by place in the order: the window's top line, its first column, and the step from a column
        to the next: 1, or -1 where the window is read from right to left."""
        n, width = self.rows, self._x.shape[3]
        top, left = torch.randint(0, 2 * PAD + 1, (2, n), generator=generator)
        mirrored = torch.randint(0, 2, (n,), generator=generator)
        if self.augment != "crop+flip":
            mirrored = torch.zeros_like(mirrored)
        return torch.stack([top, left + (width - 1) * mirrored, 1 - 2 * mirrored]).to(self.device)

    def _seen(self, x: Tensor, draws: Tensor) -> Tensor:
        """uint8 (b, C, H, W) -> its windows in [0, 1]; draws (3, b)."""
        return torch.div(x if self._windows is None else self._windows.read(x, *draws), self._white)


class Windows:
    """Windows of padded images, in bytes: whole lines are gathered first, then columns within them."""

    def __init__(self, shape: torch.Size, batch_size: int, device: torch.device):
        _, self.channels, self.height, self.width = shape
        planes = torch.arange(batch_size * self.channels, device=device).view(batch_size, self.channels, 1)
        self._lines = planes * (self.height + 2 * PAD) + torch.arange(self.height, device=device)
        self._columns = torch.arange(self.width, device=device)

    def read(self, x: Tensor, top: Tensor, left: Tensor, step: Tensor) -> Tensor:
        """x uint8 (b, C, H, W) -> the same shape; top, left, step (b,) as Batches draws them."""
        b = len(x)
        padded = F.pad(x, (PAD,) * 4).view(-1, self.width + 2 * PAD)
        lines = padded.index_select(0, (self._lines[:b] + top.view(-1, 1, 1)).view(-1))
        columns = torch.addcmul(left.view(-1, 1, 1), step.view(-1, 1, 1), self._columns)
        lines = lines.view(b, self.channels * self.height, self.width + 2 * PAD)
        windows = lines.gather(2, columns.expand(-1, self.channels * self.height, -1))
        return windows.view(b, self.channels, self.height, self.width)
