"""Faults of models, data and machines that a training or a judgement would hide: what is said, why, what to do.

docs/troubleshooting.md is made from this table (benchmarks/update_readme.py). A text is "argument: what was seen; what
to do"; words in braces are the facts of a case.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass


class HamWarning(UserWarning):
    """Something that makes a result worth less than it looks."""


@dataclass(frozen=True)
class Trouble:
    says: str
    cause: str
    remedy: str


TROUBLES: dict[str, Trouble] = {
    # ------------------------------------------------------------ models
    # ------------------------------------------------------------ training
    # ------------------------------------------------------------ data
    "files_left_out": Trouble(
        "path: {path} has files that are left out: {kinds}",
        "Only files that end as images do are read, and no hidden ones.",
        "convert or rename what should be trained on",
    ),
    "empty_folders": Trouble(
        "path: {path} has folders without an image: {folders}",
        "A class whose folder is empty, or holds files of another kind only, is no class of the task.",
        "fill them, or remove them",
    ),
    "class_without_images": Trouble(
        "path: {path} has no image of class {classes} in its {part} part",
        "Its accuracy cannot be measured there.",
        "what is said of classes leaves it out; give it images",
    ),
    "class_of_one_image": Trouble(
        "path: {path} has one training image of class {classes}",
        "Nothing can be learned of a class from a single image, nor can one of it be set aside for validation.",
        "add images, or leave the class out",
    ),
    "class_untrained": Trouble(
        "data: there is no training image of {count} classes: {classes}",
        "The training part was cut to few images, or all images of a class were set aside to validate.",
        "the model cannot learn them; take more training images (train_images) or fewer to validate (val_images)",
    ),
    "few_batches": Trouble(
        "batch_size: an epoch has fewer than 10 batches ({batches}: {images} images, {size} a batch)",
        "Epochs and learning rates of the presets are meant for hundreds of updates an epoch.",
        "give a smaller --batch-size with a smaller --lr, or more --epochs",
    ),
    "no_workers": Trouble(
        "workers: {workers} processes cannot be started ({error})",
        "Their locks lie in shared memory (/dev/shm), which is full, or too many files are open.",
        "free or enlarge the shared memory (docker run --shm-size), or decode in this process by --workers 0",
    ),
    "cache_not_written": Trouble(
        "cache: {file} could not be written ({error})",
        "The folder of decoded images is read-only, or its disk is full.",
        "the next start decodes again; give another --root to avoid it",
    ),
    "cache_damaged": Trouble(
        "cache: {file} is damaged ({error})",
        "Decoded images on disk were changed or cut short; the source is there all the same.",
        "writing it anew, there is nothing to do",
    ),
    "folder_twice": Trouble(
        "path: {path}: {one} and {other} are the same folder",
        "Links lead to one folder in two ways, or in a circle; its images would count twice, perhaps as two classes.",
        "remove one of the links",
    ),
    # ------------------------------------------------------------ ops
    # ------------------------------------------------------------ runs and reports
    # ------------------------------------------------------------ machines
}


def text(name: str, **facts) -> str:
    """The words of a trouble, for an error or a log."""
    trouble = TROUBLES[name]
    return f"{trouble.says}; {trouble.remedy}".format(**facts)


def warn(name: str, **facts) -> None:
    """Tells a trouble as a HamWarning; Python shows the same words once per place."""
    warnings.warn(text(name, **facts), HamWarning, stacklevel=3)
