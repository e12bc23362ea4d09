"""Data sets and batches of them: images in [0, 1] on the training device, the same for the same seed and epoch.

    images = data.load("cifar10").hold_out(1000)
    train, val, test = data.loaders(images, 128, augment="crop+flip", device="cuda")

Names load on first use, so that `from ham_kernels.data.table import SETS` does not wait for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..common.lazy import names_of

if TYPE_CHECKING:
    from .batches import Batches
    from .files import FileBatches
    from .folders import class_folders
    from .loading import Loaders, loaders, part_loader
    from .mixed import MixedBatches
    from .named import digits
    from .sets import FileSet, GeneratedImages, ImageSet
    from .sources import load
    from .table import SETS, SetFacts

_HOMES = {
    "Batches": "batches",
    "FileBatches": "files",
    "FileSet": "sets",
    "GeneratedImages": "sets",
    "ImageSet": "sets",
    "Loaders": "loading",
    "MixedBatches": "mixed",
    "SETS": "table",
    "SetFacts": "table",
    "class_folders": "folders",
    "digits": "named",
    "load": "sources",
    "loaders": "loading",
    "part_loader": "loading",
}

__all__ = [
    "SETS",
    "Batches",
    "FileBatches",
    "FileSet",
    "GeneratedImages",
    "ImageSet",
    "Loaders",
    "MixedBatches",
    "SetFacts",
    "class_folders",
    "digits",
    "load",
    "loaders",
    "part_loader",
]


__getattr__, __dir__ = names_of(__name__, globals(), _HOMES)
