"""What lies in a folder or tar: its images, and what is left out. Imports no torch."""

from __future__ import annotations

import contextlib
import lzma
import os
import stat
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath

from ..common import troubles

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip
HIDDEN = "hidden"  # files and folders whose name begins with a dot


@dataclass
class Listing:
    """Images by their names relative to the path, and what is left out.

    Attributes:
        images: (name, bytes, modification time in ns) of each, sorted.
        left_out: files by suffix ("no suffix" without one), and what is hidden.
        empty: the topmost folders without an image in them.
    """

    images: list[tuple[str, int, int]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    empty: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        return [name for name, *_ in self.images]

    def end(self, folders: Iterable[str]) -> Listing:
        """Sorted, and `empty` told from all folders there are."""
        self.images.sort()
        direct = {PurePosixPath(folder) for folder in {name.rpartition("/")[0] for name in self.names}}
        filled = {str(above) for folder in direct for above in (folder, *folder.parents)}
        self.empty = sorted(f for f in folders if f not in filled and str(PurePosixPath(f).parent) in filled)
        return self


def kind(name: str) -> str | None:
    """None for an image's file name, else what `left_out` counts it as."""
    if name.startswith("."):
        return HIDDEN
    suffix = os.path.splitext(name)[1].lower()
    return None if suffix in IMAGE_SUFFIXES else suffix or "no suffix"


def of_folder(path: Path) -> Listing:
    """Raises: ValueError naming a folder that is reached twice, a link that leads nowhere, a name that is not UTF-8;
    OSError naming a folder that cannot be read."""
    found, folders = Listing(), []
    reached: dict[tuple[int, int], str] = {}
    for folder, subfolders, files in os.walk(path, followlinks=True, onerror=_cannot_be_read):
        here = Path(os.path.relpath(folder, path)).as_posix()
        about = os.stat(folder)
        before = reached.setdefault((about.st_dev, about.st_ino), here)
        if before != here:
            raise ValueError(troubles.text("folder_twice", path=path, one=before, other=here))
        folders.append(here)
        found.left_out[HIDDEN] += sum(name.startswith(".") for name in subfolders)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in files:
            what = kind(name)
            if what is not None:
                found.left_out[what] += 1
                continue
            try:
                about = os.stat(os.path.join(folder, name))
            except OSError as error:
                file = shown(os.path.join(folder, name))
                raise ValueError(f"path: {file} cannot be read ({error.strerror}); mend or remove it") from error
            if not stat.S_ISREG(about.st_mode):
                file = shown(os.path.join(folder, name))
                raise ValueError(f"path: {file} is named like an image and is no file; rename or remove it")
            found.images.append((name if here == "." else f"{here}/{name}", about.st_size, about.st_mtime_ns))
    _check_utf8(path, folders)
    return found.end(folders)


def _cannot_be_read(error: OSError) -> None:
    raise type(error)(error.errno, f"path: cannot be read ({error.strerror})", error.filename) from error


def _check_utf8(path: Path, folders: Iterable[str]) -> None:
    """Folders name classes, which reports write; a file may be called anything."""
    for folder in folders:
        try:
            f"{path}/{folder}".encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"path: the folder {shown(f'{path}/{folder}')} has a name that is not UTF-8; rename it"
            ) from error


def shown(name: str) -> str:
    """A name that may hold bytes which are no UTF-8, as text."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


class _Header(tarfile.TarInfo):
    """tarfile takes a header that is cut off or damaged for the end, and what lies behind for nothing."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> _Header:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # the mark at the end
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error}, {tar.offset} bytes from its beginning: cut short or damaged") from error


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        reason = str(error).split("\n")[0].rstrip(":")  # not what each way of unpacking says
        raise ValueError(
            f"path: {path} is not a readable tar ({reason}); give a folder or tar of class folders"
        ) from error


def _content(path: Path, tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    with _readable(path):
        return tar.extractfile(member).read()


def in_tar(path: Path, found: Listing) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """(name, what reads its content) of each image of a tar, in its order; what is seen on the way is noted in `found`.

    Raises: ValueError naming the tar that cannot be read.
    """
    folders = []
    with _readable(path), tarfile.open(path, tarinfo=_Header) as tar:
        for member in tar:
            name = PurePosixPath(member.name)
            hidden = any(part.startswith(".") for part in name.parts)  # a "." is no part of a name
            if member.isdir():
                found.left_out[HIDDEN] += name.name.startswith(".")
                folders += [] if hidden else [name.as_posix()]
                continue
            if hidden or not member.isreg():
                # what lies in a hidden folder is counted with it
                found.left_out[HIDDEN if hidden else "links"] += not hidden or name.name.startswith(".")
                continue
            folders += [above.as_posix() for above in name.parents]
            what = kind(name.name)
            if what is not None:
                found.left_out[what] += 1
                continue
            found.images.append((name.as_posix(), member.size, int(member.mtime)))
            yield name.as_posix(), partial(_content, path, tar, member)
    _check_utf8(path, folders)
    found.end(dict.fromkeys(folders))
