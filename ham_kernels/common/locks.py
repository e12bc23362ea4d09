"""Locks on files, which the system lets go of when their process ends, however it ends. Imports no torch."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import IO

from . import troubles


def take(file: IO) -> bool:
    """Holds the lock while this file is open; False where another process holds it.

    On a file system without locks (some NFS, Lustre, FUSE) there is a warning in its place.
    """
    try:
        return _flock(file, fcntl.LOCK_EX)
    except OSError as error:
        troubles.warn("no_locks", folder=Path(file.name).parent, reason=error.strerror)
        return True


def held(path: Path) -> bool:
    """Whether a process holds the lock at this moment, as far as the file system knows. Writes nothing."""
    try:
        with path.open("rb") as file:
            return not _flock(file, fcntl.LOCK_SH)
    except OSError:  # no such file, or no locks
        return False


def _flock(file: IO, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
