"""Which part and which class each image of a folder or tar belongs to, by its name. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

SPELLINGS = {
    "train": "train", "training": "train", "trainset": "train", "trainingset": "train",
    "val": "val", "valid": "val", "validation": "val", "valset": "val", "validset": "val", "validationset": "val",
    "test": "test", "testing": "test", "testset": "test", "testingset": "test",
}  # fmt: skip
WANTED = "train/ and test/ (or val/), each with class folders, or class folders only"


def part_of(folder: str) -> str | None:
    """ "train", "val" or "test" where a folder's name is a usual spelling of it: Training, VALID, test_set."""
    return SPELLINGS.get(re.sub(r"[ _-]", "", folder).casefold())


def places(path: Path, names: Sequence[str]) -> list[tuple[str | None, str]]:
    """(part, class) of each image, which are named relative to `path`; the part is None in a set of class folders only.

    Parts are the folders below what all images share: train/CLASS/..., set/Test/CLASS/.... Where there are none, the
    classes are. Raises: ValueError naming the folder or the file that fits in neither.
    """
    images = [PurePosixPath(name) for name in names]
    depth = _shared(images)
    folders = _first_of_each(images, depth)
    parts = {folder: part for folder in folders if (part := part_of(folder)) is not None}
    of_trains = len(folders) > 1 and [folder.casefold() for folder in parts] == ["train"]
    if of_trains and all(len(image.parts) == depth + 2 for image in images if image.parts[depth] in parts):
        parts = {}  # pictures of trains, beside those of ships and planes
    if parts:
        return _of_parts(path, images, depth, folders, parts)
    above = [folder for folder in images[0].parts[:depth] if part_of(folder)]
    if above:
        raise ValueError(
            f"path: {path} has images in {above[0]}/ only; it needs {WANTED}. To set a part of these aside, give the "
            f"folder {above[0]} itself"
        )
    return _of_classes(path, images, depth, folders)


def _shared(images: list[PurePosixPath]) -> int:
    """The depth to which the folders of all images agree; at least the last folder is left to be the class."""
    above = [image.parts[:-1] for image in images]
    agree = 0
    for column in zip(*above, strict=False):
        if len(set(column)) > 1:
            break
        agree += 1
    if len(set(above)) == 1:
        agree -= 1
    return max(agree, 0)


def _first_of_each(images: Iterable[PurePosixPath], depth: int) -> dict[str, PurePosixPath]:
    """{folder at this depth: its first image}."""
    found: dict[str, PurePosixPath] = {}
    for image in images:
        if len(image.parts) > depth + 1:
            found.setdefault(image.parts[depth], image)
    return found


def _of_parts(path, images, depth, folders, parts) -> list[tuple[str, str]]:
    spelt: dict[str, str] = {}
    for folder, part in parts.items():
        if spelt.setdefault(part, folder) != folder:
            raise ValueError(
                f"path: {path} has the folders {spelt[part]} and {folder}, two spellings of one part; put their images "
                "into one of them"
            )
    for folder, image in folders.items():
        if folder not in parts:
            raise ValueError(
                f"path: {path} has the folder {folder} (with {image}) beside {_listed(parts)}; it needs {WANTED}. Move "
                f"{folder} away, or rename what is no part"
            )
    inside = {folder: _same_again(images, depth, folder, part) for folder, part in parts.items()}
    found = []
    for image in images:
        if len(image.parts) == depth + 1:
            raise ValueError(
                f"path: {path} holds {image} beside {_listed(parts)}, outside of any class folder; move it away"
            )
        folder = image.parts[depth]
        label = depth + 1 + inside[folder]
        if len(image.parts) <= label + 1:
            raise ValueError(
                f"path: {path} has images directly in {folder}/ (such as {image}); each part needs class folders in it"
            )
        found.append((parts[folder], image.parts[label]))
    have = set(parts.values())
    if "train" not in have or have == {"train"}:
        raise ValueError(f"path: {path} has images in {_listed(parts)} only; it needs {WANTED}")
    return found


def _same_again(images: list[PurePosixPath], depth: int, folder: str, part: str) -> int:
    """1 where all of a part lies in one more folder of its name, as archives unpack: test_set/test_set/CLASS."""
    below = [
        image.parts[depth + 1 : -1] for image in images if len(image.parts) > depth + 1 and image.parts[depth] == folder
    ]
    again = {names[0] if names else "" for names in below}
    return int(len(again) == 1 and part_of(*again) == part and all(len(names) > 1 for names in below))


def _of_classes(path, images, depth, folders) -> list[tuple[None, str]]:
    for image in images:
        if len(image.parts) <= depth + 1:
            raise ValueError(f"path: {path} holds {image} outside of any class folder; move it away")
    like = {part: folder for folder in folders for part in _words_like_parts(folder)}
    if "train" in like and len(like) > 1:
        raise ValueError(
            f"path: {path} has the folders {_listed(like.values())}, which look like parts and not like classes; "
            "rename them train, test, val"
        )
    within = {part_of(image.parts[depth + 1]) or "": image for image in images if len(image.parts) > depth + 2}
    if "train" in within and ("test" in within or "val" in within):
        raise ValueError(f"path: {path} has parts within a class ({within['train'].parent}); it needs {WANTED}")
    return [(None, image.parts[depth]) for image in images]


def _words_like_parts(folder: str) -> set[str]:
    """The parts that a word of a folder's name spells: seg_train, train2017, MyTestImages."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", folder)
    return {SPELLINGS[word.casefold()] for word in words if word.casefold() in SPELLINGS}


def _listed(folders: Iterable[str]) -> str:
    return ", ".join(f"{folder}/" for folder in sorted(folders))
