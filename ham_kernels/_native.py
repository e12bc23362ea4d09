"""All compiled libraries of the package: what setup.py and ``python -m ham_kernels build`` build.

Standard library, `_build` and `_build_cpu` only: setup.py loads it where torch may be missing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import _build, _build_cpu

FILES = (_build.LIBRARY, _build.BUILD_INFO, _build_cpu.LIBRARY, _build_cpu.BUILD_INFO)


def build(root: Path, out_dir: Path | None = None) -> bool:
    """Builds both. Whether the CUDA extension is built, and the CPU library unless it is not for this machine.

    Raises: as the two builders.
    """
    cpu = _build_cpu.build_library(root, out_dir=out_dir)
    cuda = _build.build_extension(root, out_dir=out_dir)
    return cuda["status"] == "built" and cpu["status"] != "failed"


def main(argv: Sequence[str] = ()) -> int:
    """``ham build``: compiles in place. Returns 0: built, 1: not, 2: wrong use."""
    parser = argparse.ArgumentParser(
        prog="ham build", description="Compiles the CUDA extension and the CPU's convolutions of a checkout in place."
    )
    parser.parse_args(argv)
    root = Path(__file__).resolve().parents[1]
    if not (root / "csrc" / "bindings.cu").is_file():
        print(f"ham_kernels build: needs a checkout; {root} is an installation without csrc", file=sys.stderr)
        return 2
    try:
        return 0 if build(root) else 1
    except (_build.BuildError, ValueError) as error:
        print(f"ham_kernels build: {error}", file=sys.stderr)
        return 1
