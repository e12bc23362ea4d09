"""Builds the CPU library (csrc/winograd.cpp) with one direct call of a C++ compiler, and writes down what happened.

It needs neither torch nor its headers. Standard library and `cuda` only.

``HAM_BUILD_CPU``  unset: build where possible; 0: skip; 1: it is an error if nothing gets built.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .cuda import Stop, build_mode, compile_in_place, csrc_hash, run, written_down

LIBRARY = "_cpu.so"
BUILD_INFO = "_build_cpu_info.json"
SOURCES = "winograd.*"
MACHINE = "x86_64"


def build_library(
    root: Path, *, out_dir: Path | None = None, required: bool | None = None, log: Callable = print
) -> dict[str, Any]:
    """Compiles ``root/csrc/winograd.cpp`` into ``out_dir/_cpu.so`` and writes ``out_dir/_build_cpu_info.json``.

    After any status other than ``built`` there is no ``_cpu.so``. Arguments as of ``cuda.build_extension``; what is
    required by default ``HAM_BUILD_CPU`` says.

    Returns:
        What was written: ``status`` (``built``, ``skipped``, ``failed``), ``reason``, ``compiler``, ``command``,
        ``csrc_sha256``, ``library_bytes``, ``output`` (of a compiler that failed).

    Raises:
        ValueError: ``HAM_BUILD_CPU`` holds something else than what is allowed.
        BuildError: nothing was built, and ``required``.
    """
    root = Path(root).resolve()
    out_dir = root / "ham_kernels" if out_dir is None else Path(out_dir).resolve()
    out_dir.mkdir(parents=True, exist_ok=True)
    mode = build_mode("HAM_BUILD_CPU") if required is None else required
    info: dict[str, Any] = {"status": "", "reason": "", "compiler": None, "command": None}
    info |= {"csrc_sha256": csrc_hash(root, SOURCES), "library_bytes": None, "output": []}

    def work() -> str:
        if mode is False:
            raise Stop("skipped", "HAM_BUILD_CPU=0 asks for no CPU library")
        if platform.machine() != MACHINE or not sys.platform.startswith("linux"):
            raise Stop("skipped", f"it is written for x86-64 and Linux; this is {sys.platform}, {platform.machine()}")
        compiler = find_compiler()
        if compiler is None:
            raise Stop("skipped", "no C++ compiler ($CXX, g++ or clang++); install one, then run "
                                  "`python -m ham_kernels build` in the checkout")  # fmt: skip
        info["compiler"] = (run([*compiler, "--version"]).stdout.splitlines() or ["unknown"])[0]
        compile_in_place(lambda library: compile_command(compiler, library), out_dir / LIBRARY, root, info)
        return f"compiled with {info['compiler']}"

    return written_down(work, info, out_dir / LIBRARY, out_dir / BUILD_INFO, mode, "HAM_BUILD_CPU", log)


def find_compiler() -> list[str] | None:
    """$CXX (which may hold flags), g++ or clang++, whichever is first there. Raises Stop."""
    try:
        own = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise Stop("failed", f"CXX={os.environ['CXX']!r} cannot be read: {error}") from None
    candidates = [own, ["g++"], ["clang++"], ["c++"]]
    return next((c for c in candidates if c and shutil.which(c[0])), None)


def compile_command(compiler: list[str], library: Path) -> list[str]:
    """The one call that compiles and links. Each instruction set is asked for in the source, none here."""
    flags = ["-O3", "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden"]
    return [*compiler, *flags, "csrc/winograd.cpp", "-o", str(library)]
