"""Tables of methods from the registry: name, class, source, cost, own settings; and what their files say of them."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from ham_kernels.methods.registry import class_of, names
from ham_kernels.methods.settings import Method

K = 10


def methods(_: Path) -> str:
    lines = ["| `--method` | class | what it is | forwards a step |", "|---|---|---|---:|"]
    lines += [f"| `{name}` | `{class_of(name).__name__}` | {_title(name)} | {_cost(name)} |" for name in names()]
    return "\n".join(lines)


def details(_: Path) -> str:
    """Of each method what it is, its cost, and the defaults in which it differs from the others."""
    return "\n\n".join(_detail(name) for name in names())


def _detail(name: str) -> str:
    kind = class_of(name)
    about = (sys.modules[kind.__module__].__doc__ or "").split("\n\n")
    shared = {f.name: f.default for f in dataclasses.fields(Method)}
    own = [f for f in dataclasses.fields(kind) if shared.get(f.name, dataclasses.MISSING) != f.default]
    told = ", ".join(f"`{f.name}={f.default!r}`" for f in own) or "those that every method has"
    cost = f"{_cost(name)} full-batch forwards a step, {kind().cost(K):g} at K = {K}. Settings of its own: {told}."
    return "\n\n".join([f"### {kind.title} (`{name}`)", *(" ".join(part.split()) for part in about), cost])


def _title(name: str) -> str:
    first = (sys.modules[class_of(name).__module__].__doc__ or "").split("\n\n")[0]
    return " ".join(first.split()).rstrip(".")


def _cost(name: str) -> str:
    """In terms of K; of a method that screens, at the share h of rows attacked to the end."""
    method = class_of(name)()
    at, more = method.cost(K), method.cost(K + 1)
    if method.early_drop:
        none = method.cost(K, 0.0)
        return f"{none:g} + {at - none:g}h at K = {K}"
    return f"{at:g}" if at == more else f"{more - at:g}K + {at - K * (more - at):g}"
