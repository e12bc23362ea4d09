"""What compute-sanitizer watches: the CUDA extension's `compact` at many sizes, alignments and densities.

Inputs are made, and results compared, on the CPU, so that the extension's kernel is nearly all that is watched.
"""

from __future__ import annotations

import sys

import torch

from ham_kernels import ops

# none, one, around a 16-byte load, a warp's loads, a tile of 1024 threads, several tiles
SIZES = (0, 1, 15, 16, 17, 31, 33, 127, 128, 511, 513, 1023, 1025, 16383, 16384, 16385, 40_000, 65_536, 100_003)
OFFSETS = (0, 1, 7, 15)  # of the first flag, in bytes, from an address that 16 divides
DENSITIES = (0.0, 0.3, 1.0)


def main() -> int:
    backend, reason = ops.backends()["compact"]["cuda"]
    if backend != "cuda-ext":
        print(f"compact runs on {backend}: {reason}", file=sys.stderr)
        return 2
    generator = torch.Generator().manual_seed(0)
    for n in SIZES:
        for offset in OFFSETS:
            for density in DENSITIES:
                flags = torch.rand(n + offset, generator=generator) < density
                index, count = (t.cpu() for t in torch.ops.ham_kernels.compact(flags.cuda()[offset:]))
                flags = flags[offset:]
                expected = torch.cat([flags.nonzero()[:, 0], (~flags).nonzero()[:, 0].flip(0)]).int()
                if not (torch.equal(index, expected) and int(count) == int(flags.sum())):
                    print(f"compact: wrong result at n={n}, offset {offset}, density {density}", file=sys.stderr)
                    return 3
    print(f"compact: {len(SIZES) * len(OFFSETS) * len(DENSITIES)} calls, all right")
    return 0


if __name__ == "__main__":
    sys.exit(main())
