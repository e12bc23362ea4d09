"""`ham doctor --model MODULE:FUNCTION`: the first look at a user's model, on random images."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from ..common import checks, troubles
from ..engine import ROWS, attack_mode, findings, model_device, runnable
from ..models.named import made_by

CLEAN = "nothing: its outputs repeat, and gradients reach every image"


def look_at(name: str, size: str) -> dict[str, Any]:
    """What is wrong with a model: {"ok", "model", "lines", "findings": [{"name", "says", "cause", "remedy"}]}.

    The images are random, so that nothing here depends on what the model has learned. Raises: ValueError, TypeError,
    ImportError naming the argument.
    """
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){2}", size):
        raise ValueError(f"--input: got {size!r}; it must be like 3x32x32")
    model = model_named(name)
    device = model_device(model) or torch.device("cpu")
    g = torch.Generator().manual_seed(0)
    x = torch.rand(ROWS, *map(int, size.split("x")), generator=g).to(device)
    try:
        with attack_mode(model), runnable(model, x), torch.no_grad():
            z = model(x)
            checks.model_output(z, ROWS)
            y = z.argmax(1)  # rows that are not fooled
        found = findings(model, x, y)
    except Exception as error:  # whatever a user's forward may raise
        if not hasattr(error, "trouble"):
            why = f"{type(error).__name__}: {error}" if isinstance(error, LookupError) else error
            raise ValueError(f"model: {name} cannot take images of {size} (--input): {why}") from error
        found = [error.trouble]
    told = [troubles.told(n, **facts) for n, facts in found]
    parameters = sum(p.numel() for p in model.parameters())
    lines = [f"{name}: {type(model).__name__}, {parameters:,} parameters, {ROWS} random images {size}"]
    for entry in told:
        lines += [f"  found   {entry['says']}", f"  cause   {entry['cause']}", f"  remedy  {entry['remedy']}"]
    lines += [] if told else [f"  found   {CLEAN}"]
    return {"ok": not told, "model": name, "lines": lines, "findings": told}


def model_named(name: str) -> nn.Module:
    """The model that MODULE:FUNCTION makes, in eval mode. Raises: ValueError, TypeError, ImportError naming --model."""
    try:
        return made_by(name).eval()
    except (ValueError, TypeError, ImportError) as error:
        raise type(error)(f"--model: {str(error).removeprefix('name: ')}") from error
