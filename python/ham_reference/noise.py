"""The random numbers of ham_kernels, written once more and plainly: Philox-4x32-10 in numpy."""

from __future__ import annotations

import math

import numpy as np
import torch

LOW = np.uint64(0xFFFFFFFF)


def philox(counter: list[np.ndarray], key: int) -> list[np.ndarray]:
    """Ten rounds on four 32-bit counter words with a 64-bit key (Salmon et al., SC 2011)."""
    c = [np.asarray(word, dtype=np.uint64) for word in counter]
    key0, key1 = key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF
    for _ in range(10):
        product0 = c[0] * np.uint64(0xD2511F53)
        product1 = c[2] * np.uint64(0xCD9E8D57)
        high0, low0 = product0 >> np.uint64(32), product0 & LOW
        high1, low1 = product1 >> np.uint64(32), product1 & LOW
        c = [high1 ^ c[1] ^ np.uint64(key0), low1, high0 ^ c[3] ^ np.uint64(key1), low0]
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return c


def uniform(rows: int, positions: int, seed: int, step: int, stream: int) -> list[torch.Tensor]:
    """Four planes (rows, positions) of uniform numbers in [0, 1), one per word of the generator."""
    row, position = np.meshgrid(np.arange(rows), np.arange(positions), indexing="ij")
    words = philox([position, row, np.full_like(row, step), np.full_like(row, stream)], seed)
    return [torch.from_numpy((word >> np.uint64(8)).astype(np.float32) / np.float32(2**24)) for word in words]


def in_cube(x: torch.Tensor, eps: float | torch.Tensor, seed: int, step: int) -> torch.Tensor:
    """Noise uniform in [-eps, eps], shape of x; eps is a number, or (n,)."""
    numel = x[0].numel()
    u = torch.cat(uniform(len(x), math.ceil(numel / 4), seed, step, stream=0), dim=1)[:, :numel]
    return ((2 * u - 1) * _of_rows(eps)).reshape(x.shape).to(x.device)


def in_ball(x: torch.Tensor, eps: float | torch.Tensor, seed: int, step: int) -> torch.Tensor:
    """Noise uniform in the L2 ball of radius eps, shape of x: Gaussian direction, radius eps * u^(1/dimension).

    Length and power are rounded once, from double precision, so that they are the same among any other rows.
    """
    numel = x[0].numel()
    a, b, c, d = uniform(len(x), math.ceil(numel / 4), seed, step, stream=0)
    planes = []
    for u, v in ((a, b), (c, d)):  # Box-Muller
        length = torch.sqrt(-2 * torch.log(1 - u))
        planes += [length * torch.cos(2 * math.pi * v), length * torch.sin(2 * math.pi * v)]
    gaussian = torch.cat(planes, dim=1)[:, :numel]
    size = gaussian.double().norm(dim=1, keepdim=True).float()
    radius = (uniform(len(x), 1, seed, step, stream=1)[0].double() ** (1 / numel)).float() * _of_rows(eps)
    return (gaussian * (radius / size.clamp_min(1e-12))).reshape(x.shape).to(x.device)


def _of_rows(eps: float | torch.Tensor) -> float | torch.Tensor:
    return eps.cpu().view(-1, 1) if isinstance(eps, torch.Tensor) else eps
