"""The images of a run: found where they lie now, and checked to be those that it was trained on."""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .. import data
from ..common import troubles
from ..runs.folder import RunFolder
from ..runs.places import found_again
from ..runs.settings import TrainSettings

_PLACES = ("path", "root", "generated")  # settings that say where images lie


def images_of(settings: TrainSettings) -> data.ImageSet | data.FileSet:
    """The data set, cut to size, with its validation images set aside (the same ones for every seed)."""
    d = settings.data
    images = data.load(d.dataset, d.path, root=d.root, download=d.download, size=d.size, generated=d.generated)
    if len(images.classes) < 2:
        raise ValueError(f"path: {d.path} has one class, {images.classes[0]!r}; a classifier needs two or more")
    if images.y_val is not None:  # a part of its own
        images = images.subset(d.train_images, d.test_images)
        images = images if d.val_images else images.without_val()
    else:
        train = None if d.train_images is None else d.train_images + d.val_images
        images = images.subset(train, d.test_images)
        n = images.counts["train"]
        if d.val_images >= n:
            raise ValueError(
                f"val_images: got {d.val_images}, but there are {n} training images to take them from (0 for none)"
            )
        images = images.hold_out(d.val_images) if d.val_images else images
    untrained = [repr(name) for name, n in images.class_counts["train"].items() if n == 0]
    if untrained:
        troubles.warn("class_untrained", classes=", ".join(untrained[:10]), count=len(untrained))
    return images


def find(
    settings: TrainSettings, run: RunFolder | None = None, path: str | None = None, *, generated: bool = True
) -> tuple[data.ImageSet | data.FileSet, dict[str, Any], dict[str, Any]]:
    """Images, what a run notes of them (`facts_of`), and where they lie.

    Args:
        run: one that goes on or is judged: its images are looked for where they were, then where its config.toml says.
        path: where they lie now instead.
        generated: those of a generated file too, which only a training needs.
    Raises: FileNotFoundError naming the line of config.toml and the flag; ValueError where they are not the run's.
    """
    before = {} if run is None else run.places()
    now = {name: getattr(settings.data, name) for name in _PLACES}
    now |= found_again(now, before)
    if path is not None:
        now["path"] = path
    elif run is not None and now["path"] is not None and not Path(now["path"]).exists():
        raise FileNotFoundError(_gone(run, now["path"], before))
    if not generated:
        now["generated"] = None
    images = images_of(replace(settings, data=replace(settings.data, **now)))
    # by the name that the run first knew it by: a data set may move as a whole
    named = before.get("path", {}).get("named", settings.data.path) or now["path"]
    facts = facts_of(images, now["path"], named)
    if run is not None and run.has_begun():
        run.check_data_facts(facts, now["path"])
    places = {}
    for name in _PLACES:
        if now[name] is not None:
            given = getattr(settings.data, name)
            first = before.get(name, {}).get("named", given)
            places[name] = {"named": first, "given": given, "absolute": os.path.abspath(now[name])}
    return images, facts, places


def _gone(run: RunFolder, path: str, before: dict[str, Any]) -> str:
    also = before["path"]["absolute"] if "path" in before else os.path.abspath(path)
    config = run.path / "config.toml"
    lines = config.read_text(encoding="utf-8-sig").splitlines()
    line = next((i for i, text in enumerate(lines, 1) if text.split("=")[0].strip() == "path"), None)
    return (
        f"path: {path}, where the images of {run.path} lay ({also}), does not exist; say where they are now by --path, "
        f"or in {shlex.quote(str(config))}, line {line}: {lines[line - 1] if line else 'path'}"
    )


def facts_of(images: data.ImageSet | data.FileSet, path: str | None = None, named: str | None = None) -> dict[str, Any]:
    """What a run notes of its images: classes, shape, counts, and a digest of pixels (or file names) and labels.

    Of files also one of the sizes of all and the bytes of some, since reading all takes as long as an epoch; of
    generated images the checksums that their file tells.

    Args:
        path: where class folders were read.
        named: the path that the digest takes them to lie at; None: where they do.
    """
    digest, held = hashlib.sha256(), hashlib.sha256()
    for part in images.counts:
        inputs, y = images.part(part)
        if isinstance(inputs, torch.Tensor):
            digest.update(inputs.contiguous().numpy())
        else:
            digest.update("\n".join(_below(inputs, path, named)).encode("utf-8", "surrogateescape"))
            held.update(" ".join(str(os.path.getsize(file)) for file in inputs).encode())
            for file in inputs[:: len(inputs) // 50 + 1]:
                held.update(Path(file).read_bytes())
        digest.update(y.numpy())
    facts = {
        "classes": list(images.classes), "channels": images.channels, "shape": list(shape_of(images)),
        "counts": images.counts,
        "class_counts": {part: list(counts.values()) for part, counts in images.class_counts.items()},
        "sha256": digest.hexdigest(),
    }  # fmt: skip
    if isinstance(images, data.FileSet):
        return {**facts, "files_sha256": held.hexdigest()}
    if (made := images.generated) is not None:
        facts["generated"] = {"images": len(made), "crc32": [f"{value:08x}" for value in made.crc32]}
    return facts


def shape_of(images: data.ImageSet | data.FileSet) -> tuple[int, int, int]:
    """(channels, height, width) that a model is given."""
    if isinstance(images, data.ImageSet):
        return tuple(images.x_test.shape[1:])
    return images.channels, images.size, images.size


def _below(files: Sequence[str], path: str | None, named: str | None) -> list[str]:
    """PART/CLASS/NAME of each file."""
    if path is not None and named is not None:
        files = [str(Path(named) / Path(file).relative_to(path)) for file in files]
    return ["/".join(Path(file).parts[-3:]) for file in files]


def task_in_words(facts: dict[str, Any]) -> str:
    """Classes and their images of each part, for the log: "3 classes (images to train/val/test): cat 80/8/20, ...".

    Of more than 12 classes the first 10 are named, and the fewest and most images that one has.
    """
    classes, counts = facts["classes"], facts["class_counts"]
    each = ["/".join(map(str, of_class)) for of_class in zip(*counts.values(), strict=True)]
    told = [f"{name} {n}" for name, n in zip(classes, each, strict=True)]
    if len(told) > 12:
        span = "/".join(f"{min(n)}-{max(n)}" for n in counts.values())
        told = [*told[:10], f"and {len(told) - 10} more; each has {span}"]
    of_all = "/".join(str(facts["counts"][part]) for part in counts)
    return f"{len(classes)} classes, images to {'/'.join(counts)} {of_all}: {', '.join(told)}"
