"""Memory on the CPU: torch frees every activation, and glibc gives large ones back to the system at once.

The next step asks for the same memory again, and the system hands it out page by page, zeroed. For activations above
32 MB (batch 128 of 32x32 images with 64 channels) this costs as much as the arithmetic.
"""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt(3)
_GLIBC_ENDS_AT = 32 << 20  # where glibc's own adjustment of the second stops; the first follows at twice that
_KEEP = (1 << 31) - 1  # mallopt takes an int


def keep_freed_memory() -> bool:
    """From now on this process keeps freed memory for itself, up to the most it ever used. False where it cannot."""
    return _set(_MMAP_THRESHOLD, _KEEP) and _set(_TRIM_THRESHOLD, _KEEP)


def return_freed_memory() -> bool:
    """Back to what a process of glibc does by itself once it has worked for a while. False where there is no glibc."""
    changed = _set(_MMAP_THRESHOLD, _GLIBC_ENDS_AT) and _set(_TRIM_THRESHOLD, 2 * _GLIBC_ENDS_AT)
    if changed:
        ctypes.CDLL(None).malloc_trim(0)
    return changed


def _set(parameter: int, value: int) -> bool:
    try:
        return ctypes.CDLL(None).mallopt(parameter, value) == 1
    except (AttributeError, OSError):  # no glibc
        return False
