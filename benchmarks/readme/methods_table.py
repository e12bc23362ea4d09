"""README's table of methods, from the registry: name, class, source, own settings."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from ham_kernels.methods.settings import Method, class_of, names


def methods(_: Path) -> str:
    lines = ["| `--method` | class | what it is | settings of its own |", "|---|---|---|---|"]
    shared = {f.name for f in dataclasses.fields(Method)}
    for name in names():
        kind = class_of(name)
        what = (sys.modules[kind.__module__].__doc__ or "").split("\n\n")[0].split(": ")[0]
        own = [f"`{f.name}={f.default!r}`" for f in dataclasses.fields(kind) if f.name not in shared]
        lines.append(f"| `{name}` | `{kind.__name__}` | {' '.join(what.split())} | {', '.join(own)} |")
    return "\n".join(lines)
