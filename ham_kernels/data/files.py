"""Batches of image files of any size, decoded by worker processes."""

from __future__ import annotations

import contextlib
import errno
import io
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..common import checks, troubles
from .batches import EpochLoader, epoch_generator, mixed_seed
from .listing import shown
from .table import AUGMENTATIONS

# shorter side before the centre crop, as torchvision's references do it: 256 for 224
RESIZE = 256 / 224


class FileBatches(EpochLoader):
    """Batches (x float32 (b, 3, size, size) in [0, 1], y int64 (b,)) of image files, on `device`.

    The order of epoch e comes from (seed, e), the crop and flip of an image from (seed, e, its row in `files`): the
    same numbers whatever the number of workers and of ranks, the device and the batch that an iteration starts at.

    Args:
        files: paths.  y: (n,) int64.
        batch_size: rows of each global batch, of all ranks together; the last one may have fewer.
        shuffle: a new order each epoch.
        balanced: rows drawn anew each epoch, with replacement, so that classes are equally likely; in place of shuffle.
            A row that comes twice looks different each time.
        augment: "none": resized to size * 256/224 at the shorter side, centre crop. "crop": torchvision's
            RandomResizedCrop. "crop+flip": and RandomHorizontalFlip.
        size: height and width of x.
        seed: >= 0.
        workers: processes that decode; 0 decodes in this one. They live for one iteration.
        rank, world: give, and decode, rows `slice_of(b, rank, world)` of each global batch of b rows, perhaps none;
            0 <= rank < world.
    Raises: TypeError, ValueError naming the argument; ValueError naming the file that is no readable image, when its
        batch is due.
    """

    def __init__(
        self, files: Sequence[str], y: Tensor, batch_size: int, *, shuffle: bool, balanced: bool = False,
        augment: str = "none", size: int = 224, seed: int = 0, device: torch.device | str = "cpu", workers: int = 0,
        rank: int = 0, world: int = 1,
    ):  # fmt: skip
        super().__init__(y, batch_size, seed, shuffle, balanced, rank, world)
        checks.choice("augment", augment, AUGMENTATIONS)
        self.workers = checks.integer("workers", workers, 0)
        self.device = torch.device(device)
        self._decoder = _Decoder(list(files), y, augment, checks.integer("size", size, 1), seed)
        self._white = torch.tensor(255.0, device=self.device)

    def _batches(self, numbers: range, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = epoch_generator(self.seed, epoch)
        loader = DataLoader(
            _EpochOfBatches(self._decoder, epoch, self._order(generator), self.balanced),
            batch_size=None,  # an item is a batch already
            sampler=[self._places(b) for b in numbers],
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            collate_fn=_as_it_is,  # or tensors would be made of arrays in the worker
            generator=generator,  # or it would draw from torch's global one
        )
        for batch in self._iterate(loader):
            if isinstance(batch, _Unreadable):  # raised in a worker it would arrive behind the worker's traceback
                raise ValueError(batch.message)
            x, y = (t.to(self.device, non_blocking=True) for t in batch.tensors())
            yield torch.div(x, self._white), y

    def _iterate(self, loader: DataLoader) -> Iterator[_Batch | _Unreadable]:
        try:
            yield from loader
        except OSError as error:
            # locks and queues of worker processes need some shared memory and files, however little
            if self.workers and error.errno in (errno.ENOSPC, errno.ENOMEM, errno.EMFILE, errno.EACCES):
                raise OSError(troubles.text("no_workers", workers=self.workers, error=error)) from error
            raise


@dataclass
class _Unreadable:
    message: str

    def pin_memory(self) -> _Unreadable:
        return self


@dataclass
class _Batch:
    """Images uint8 (b, 3, size, size) and labels.

    A worker sends arrays, through its pipe. Tensors would go through shared memory, of which containers have 64 MB: a
    worker that finds it full loses its batch, and the loader waits for it for ever.
    """

    x: np.ndarray | Tensor
    y: np.ndarray | Tensor

    def tensors(self) -> tuple[Tensor, Tensor]:
        return torch.as_tensor(self.x), torch.as_tensor(self.y)

    def pin_memory(self) -> _Batch:
        """Called by the loader's thread, for a GPU."""
        return _Batch(*(t.pin_memory() for t in self.tensors()))


def _as_it_is(item: _Batch | _Unreadable) -> _Batch | _Unreadable:
    return item


@dataclass
class _EpochOfBatches(Dataset):
    """The batch of some places, as uint8, of one epoch. It travels to the workers."""

    decoder: _Decoder
    epoch: int
    order: Tensor
    repeats: bool  # rows may come several times

    def __getitem__(self, here: slice) -> _Batch | _Unreadable:
        rows = self.order[here]
        places = enumerate(rows.tolist(), here.start)
        try:
            images = [self.decoder.image(row, self.epoch, *[i] * self.repeats) for i, row in places]
        except ValueError as error:
            return _Unreadable(str(error))
        size = self.decoder.size
        x = torch.stack(images) if images else torch.empty(0, 3, size, size, dtype=torch.uint8)
        return _Batch(x.numpy(), self.decoder.y[rows].numpy())


class _Decoder:
    """Row and epoch, and its place in the epoch where it may come twice -> one image, uint8 (3, size, size)."""

    def __init__(self, files: list[str], y: Tensor, augment: str, size: int, seed: int):
        from torchvision.transforms import v2  # imported here: data sets in memory do without torchvision

        self.files, self.y, self.size, self.seed = files, y, size, seed
        self.random = augment != "none"
        steps = [v2.RandomResizedCrop(size)] if self.random else [v2.Resize(round(size * RESIZE)), v2.CenterCrop(size)]
        if augment == "crop+flip":
            steps.append(v2.RandomHorizontalFlip())
        self.transform = v2.Compose([*steps, v2.PILToTensor()])

    def image(self, row: int, epoch: int, *place: int) -> Tensor:
        image = open_image(self.files[row])
        if not self.random:
            return self.transform(image)
        with torch.random.fork_rng(devices=[]):  # torchvision draws from torch's global generator
            torch.default_generator.manual_seed(mixed_seed(self.seed, epoch, row, *place))
            return self.transform(image)


def open_image(file, data: bytes | None = None):
    """A file (or its bytes) as an RGB PIL image. ValueError naming the file where it is none."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        image = Image.open(file if data is None else io.BytesIO(data))
        # PIL scales what is finer than 8 bits in a PGM to 16, and keeps it as 32
        sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PPM", "PNG"))
        with contextlib.suppress(ArithmeticError, LookupError, SyntaxError, TypeError, struct.error):  # damaged EXIF
            ImageOps.exif_transpose(image, in_place=True)
        if sixteen:  # PIL's conversion would clip at 255
            image = _of_eight_bits(image)
        elif image.mode in ("I", "F"):
            raise ValueError("32-bit grey values have no fixed white; convert it to 8 or 16 bits")
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:  # seen on white, as viewers show it
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "of no format that Pillow reads" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"path: {shown(str(file))} is not a readable image ({reason})") from error


def _of_eight_bits(image):
    """Grey values of 16 bits, one of which may stand for what is transparent."""
    from PIL import Image

    values, through = np.asarray(image), image.info.get("transparency")
    grey = Image.fromarray((values >> 8).astype(np.uint8))
    if isinstance(through, int):
        grey = Image.merge("LA", [grey, Image.fromarray(np.where(values == through, 0, 255).astype(np.uint8))])
    return grey


def decode(file, data: bytes | None = None, size: int | tuple[int, int] | None = None) -> Tensor:
    """A file (or its bytes) as uint8 (3, H, W), resized to size x size, or (height, width), where one is given."""
    image = open_image(file, data)
    height, width = (size, size) if isinstance(size, int) else size or image.size[::-1]
    if image.size != (width, height):
        from PIL import Image

        image = image.resize((width, height), Image.Resampling.BILINEAR)  # PIL's is antialiased
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
