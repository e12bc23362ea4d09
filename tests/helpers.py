"""Tensors in every memory layout, comparisons with their reasons, environments of processes."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("contiguous", "channels_last", "every other row", "every other channel", "transposed")


def every_pair(*values: Sequence) -> list[tuple]:
    """Combinations of one value of each, for parametrize, in which any two values of two of them meet.

    A small part of the full product. The first of those that hold the most new pairs is taken, so they are the same
    in each process.
    """
    product = list(itertools.product(*map(range, map(len, values))))
    pairs = {chosen: set(itertools.combinations(enumerate(chosen), 2)) for chosen in product}
    missing, taken = set().union(*pairs.values()), []
    while missing:
        taken.append(max(product, key=lambda chosen: len(pairs[chosen] & missing)))
        missing -= pairs[taken[-1]]
    return [tuple(v[i] for v, i in zip(values, chosen, strict=True)) for chosen in sorted(taken)]


def environment(*folders: Path, **more: str) -> dict[str, str]:
    """This process's, with these folders before those that PYTHONPATH has."""
    paths = [*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | more


def in_layout(t: Tensor, layout: str) -> Tensor:
    """A copy of t (n, C, H, W) with the same values in another memory layout; what lies between is NaN."""
    if layout == "contiguous":
        return t.clone(memory_format=torch.contiguous_format)
    if layout == "channels_last":
        return t.clone(memory_format=torch.channels_last)
    n, c, h, w = t.shape
    if layout == "every other row":  # rows dense inside, strided between: read as they are
        view = t.new_full((2 * n, c, h, w), torch.nan)[::2]
    elif layout == "every other channel":  # dense in no format: copied first
        view = t.new_full((n, 2 * c, h, w), torch.nan)[:, ::2]
    elif layout == "transposed":
        view = t.new_full((n, c, w, h), torch.nan).transpose(2, 3)
    else:
        raise ValueError(layout)
    return view.copy_(t)


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Equal values, and NaN where NaN is expected. The interpreter truncates to bf16: one unit apart."""
    actual, expected = actual.cpu(), expected.cpu()
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert torch.equal(actual.isnan(), expected.isnan())
    actual, expected = actual.nan_to_num(0.0) + 0.0, expected.nan_to_num(0.0) + 0.0  # -0.0 is 0.0
    if actual.dtype == torch.bfloat16 and not torch.cuda.is_available():
        # non-negative floats are ordered as their bit patterns, so neighbours differ by one
        apart = (actual.contiguous().view(torch.int16).int() - expected.contiguous().view(torch.int16).int()).abs()
        assert apart.max() <= 1 if apart.numel() else True
    else:
        assert torch.equal(actual, expected), f"largest difference {(actual - expected).abs().max()}"


def per_row(value: float | Tensor) -> tuple[float, Tensor | None]:
    """eps or step_size as the ops take them: (number, None) or (0.0, one value per row)."""
    return (0.0, value) if isinstance(value, Tensor) else (value, None)
