"""What is known about each data set by name, in one table. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

AUGMENTATIONS = ("none", "crop", "crop+flip")
CROP_SIZE = 224  # of files, ImageNet's usual one
IN_MEMORY = 64  # pixels per side up to which images of one size are kept as tensors
GENERATED_SHARE = 0.7  # of a batch, as Rebuffi et al. and Wang et al. have it with a million generated images


@dataclass(frozen=True)
class SetFacts:
    """A data set: what a model has to fit, and how the field trains on it.

    Attributes:
        title: as papers write it.
        classes, channels: how many.
        size: height and width in pixels of what a model sees. Where `in_memory` is False the files differ in size
            and are cropped to this by default.
        augment: of training images: "none", "crop" (zero padding of 4; in files a random resized crop), "crop+flip"
            (and a horizontal flip).
        mean, std: per channel, of images in [0, 1], where the paper normalises; None where it does not.
        in_memory: whether `load` gives an ImageSet (uint8 tensors) or a FileSet.
    """

    title: str
    classes: int
    channels: int
    size: int
    augment: str
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    in_memory: bool = True


SETS: dict[str, SetFacts] = {
    "digits": SetFacts("Digits", 10, 1, 8, "none"),
    "cifar10": SetFacts(
        "CIFAR-10", 10, 3, 32, "crop+flip", mean=(0.4914, 0.4822, 0.4465), std=(0.2471, 0.2435, 0.2616)
    ),
    "cifar100": SetFacts("CIFAR-100", 100, 3, 32, "crop+flip"),
    "svhn": SetFacts("SVHN", 10, 3, 32, "crop"),  # a mirrored 2 or 5 is no digit
    "fashion_mnist": SetFacts("Fashion-MNIST", 10, 1, 28, "crop+flip"),
    "imagenette": SetFacts("Imagenette", 10, 3, 224, "crop+flip", in_memory=False),
    "imagenette32": SetFacts("Imagenette 32x32", 10, 3, 32, "crop+flip"),
    "imagenet": SetFacts(
        "ImageNet", 1000, 3, 224, "crop+flip", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), in_memory=False
    ),
}


def generated_rows(batch_size: int, share: float) -> int:
    """Rows of a batch that are generated images: the integer nearest to share * batch_size (of two the even one).

    Raises: ValueError naming generated_share where no generated or no real row would be left.
    """
    rows = round(share * batch_size)
    if not 1 <= rows < batch_size:
        raise ValueError(
            f"generated_share: got {share:g} with batch_size={batch_size}, so {rows} rows of a batch would be "
            "generated; there must be at least one, and one real"
        )
    return rows
