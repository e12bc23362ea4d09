"""Locks on files, which the system lets go of when their process ends, however it ends. Imports no torch."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import IO


def take(file: IO) -> bool:
    """Holds the lock while this file is open; False where another process holds it."""
    return _flock(file, fcntl.LOCK_EX)


def held(path: Path) -> bool:
    """Whether a process holds the lock at this moment. Writes nothing."""
    try:
        with path.open("rb") as file:
            return not _flock(file, fcntl.LOCK_SH)
    except FileNotFoundError:
        return False


def _flock(file: IO, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
