"""Philox-4x32-10, the counter-based generator behind every random number drawn here.

Key: the 64-bit seed. Counter: (position, row, step, stream). A number depends on its place and on nothing else, so
it is the same on CPU and GPU, for any block size, launch or order of work. Rows count in the global batch, so it is
the same for any number of processes that share the batch, too.
Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import jit, tl

# streams, the last counter word: noise of a random start, radius of an L2 start, choice of random rows, of targets
START, RADIUS, ROWS, TARGETS = 0, 1, 2, 3
_LOW = 0xFFFFFFFF


def philox_uniform(
    n: int, positions: int, seed: int, step: int, stream: int, device, first_row: int = 0
) -> tuple[Tensor, ...]:
    """Four planes of shape (n, positions), fp32, uniform on the multiples of 2**-24 in [0, 1).

    They are those of the rows first_row, ..., first_row + n - 1, all below 2**32.
    """
    # int64 holds the unsigned 32-bit words; a product may wrap, but its bits are those of the unsigned product
    c0 = torch.arange(positions, device=device).expand(n, positions)
    c1 = torch.arange(first_row, first_row + n, device=device)[:, None].expand(n, positions)
    # filled on the device: torch.tensor would copy from the host and wait
    c2, c3 = (torch.full((), word, dtype=torch.int64, device=device) for word in (step & _LOW, stream))
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((b >> 32) & _LOW) ^ c1 ^ k0, b & _LOW
        c2, c3 = ((a >> 32) & _LOW) ^ c3 ^ k1, a & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return tuple((word >> 8).float().mul_(2.0**-24).expand(n, positions) for word in (c0, c1, c2, c3))


@jit
def uniform4(seed, position, row, step, stream):
    """The same four planes for a block of positions of one row."""
    words = tl.philox(seed, position, row, step, stream)
    scale: tl.constexpr = 5.9604644775390625e-08  # 2**-24
    a = (words[0] >> 8).to(tl.float32) * scale
    b = (words[1] >> 8).to(tl.float32) * scale
    c = (words[2] >> 8).to(tl.float32) * scale
    d = (words[3] >> 8).to(tl.float32) * scale
    return a, b, c, d
