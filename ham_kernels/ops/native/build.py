"""All compiled libraries of the package: what setup.py and ``python -m ham_kernels build`` build.

Standard library, `cuda` and `cpu` only: setup.py loads it where torch may be missing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import cpu, cuda

FILES = (cuda.LIBRARY, cuda.BUILD_INFO, cpu.LIBRARY, cpu.BUILD_INFO)


def build(root: Path, out_dir: Path | None = None) -> bool:
    """Builds both. Whether the CUDA extension is built, and the CPU library unless it is not for this machine.

    Raises: as the two builders.
    """
    for_cpu = cpu.build_library(root, out_dir=out_dir)
    for_cuda = cuda.build_extension(root, out_dir=out_dir)
    return for_cuda["status"] == "built" and for_cpu["status"] != "failed"


def main(argv: Sequence[str] = ()) -> int:
    """``ham build``: compiles in place. Returns 0: built, 1: not, 2: wrong use."""
    parser = argparse.ArgumentParser(
        prog="ham build", description="Compiles the CUDA extension and the CPU's convolutions of a checkout in place."
    )
    parser.parse_args(argv)
    root = Path(__file__).resolve().parents[3]
    if not (root / "csrc" / "bindings.cu").is_file():
        print(f"ham_kernels build: needs a checkout; {root} is an installation without csrc", file=sys.stderr)
        return 2
    try:
        return 0 if build(root) else 1
    except (cuda.BuildError, ValueError) as error:
        print(f"ham_kernels build: {error}", file=sys.stderr)
        return 1
