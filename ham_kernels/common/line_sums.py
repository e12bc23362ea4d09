"""Lines of JSON objects, each with a checksum of itself and of all lines before it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence

_SUM = re.compile(rb', "sum": "([0-9a-f]{16})"}$')


def with_sums(lines: Iterable[str]) -> Iterator[str]:
    """The lines, each an object that is not empty, with "sum" as their last entry."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode())
        yield f'{line[:-1]}, "sum": "{digest.hexdigest()[:16]}"}}'


def first_altered(lines: Sequence[bytes]) -> int | None:
    """The first line, from 1, that is not as `with_sums` gave it, after the same lines; None where none has a sum."""
    digest = hashlib.sha256()
    sums = [_SUM.search(line) for line in lines]
    for i, (line, found) in enumerate(zip(lines, sums, strict=True), 1):
        digest.update(_SUM.sub(b"}", line))
        if any(sums) and (found is None or found[1] != digest.hexdigest()[:16].encode()):
            return i
    return None
