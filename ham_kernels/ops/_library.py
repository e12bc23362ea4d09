"""What every op shares: the op library, the choice of backend, and the loading of the CUDA extension.

An op file registers itself with `register`; this module decides what runs where:

    CPU tensors   the plain-torch reference of the op
    CUDA tensors  the CUDA C++ extension (compact only), else Triton, else the plain-torch reference

`HAM_BACKEND` narrows the choice on CUDA: `auto` (default), `triton` (no extension), `torch` (references only).
Winograd convolutions (`register_for_cpu`) are the CPU's alone; `winograd.status` tells what serves them.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path

import torch

from ..common import troubles
from .native import cuda

NAMESPACE = "ham_kernels"
EXTENSION = Path(__file__).resolve().parents[1] / "_C.so"

try:
    import triton
    import triton.language as tl

    jit = triton.jit
    TRITON = (True, f"Triton {triton.__version__}")
except ImportError as error:  # CPU builds of torch come without Triton; every op still has its reference
    triton = None
    TRITON = (False, f"Triton cannot be imported: {error}")

    class tl:
        constexpr = object

    def jit(fn=None, **_):
        return fn if fn is not None else jit


class BackendWarning(UserWarning):
    """An op runs on CUDA with a slower backend than the one this package was built for."""


_library = torch.library.Library(NAMESPACE, "DEF")
_backends: dict[str, dict[str, tuple[str, str]]] = {}


def backend_choice() -> str:
    """The value of HAM_BACKEND, checked."""
    choice = os.environ.get("HAM_BACKEND", "auto")
    if choice not in ("auto", "triton", "torch"):
        raise ValueError(f"HAM_BACKEND={choice!r}: allowed are auto, triton and torch")
    return choice


@functools.cache
def extension_status() -> tuple[bool, str]:
    """Loads the CUDA extension once. Returns (loaded, why or why not)."""
    if backend_choice() != "auto":
        return False, f"switched off by HAM_BACKEND={backend_choice()}"
    if not EXTENSION.exists():
        return False, f"{EXTENSION.name} is not there: 'python -m ham_kernels doctor' shows what the build said"
    problem = cuda.library_problem(EXTENSION.parent)  # a truncated file must not even be tried
    if problem is not None:
        return False, f"{EXTENSION.name} is not loaded: {problem}"
    try:
        torch.ops.load_library(str(EXTENSION))
    except (OSError, RuntimeError) as error:
        return False, f"{EXTENSION.name} does not load: {error}"
    return True, f"{EXTENSION.name} loaded"


def register(
    name: str,
    schema: str,
    *,
    reference: Callable,
    launcher: Callable,
    fake: Callable,
    in_extension: bool = False,
) -> None:
    """Defines op `name`: `reference` on CPU, the fastest backend at hand on CUDA, `fake` for tracing."""
    tag = () if "!" in schema else (torch.Tag.pt2_compliant_tag,)
    _library.define(f"{name}{schema}", tags=tag)
    _library.impl(name, reference, "CPU")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)

    extension, why_not_extension = extension_status() if in_extension else (False, "")
    if extension:  # the extension has registered its own CUDA implementation
        cuda = ("cuda-ext", why_not_extension)
    elif TRITON[0] and backend_choice() != "torch":
        cuda = ("triton", why_not_extension or TRITON[1])
        _library.impl(name, _warned_once(launcher, name, *cuda) if in_extension else launcher, "CUDA")
    else:
        why = TRITON[1] if not TRITON[0] else "chosen by HAM_BACKEND=torch"
        cuda = ("torch", why)
        _library.impl(name, _warned_once(reference, name, *cuda), "CUDA")
    _backends[name] = {"cpu": ("torch", "the plain-torch reference"), "cuda": cuda}


def register_for_cpu(name: str, schema: str, *, implementation: Callable, fake: Callable) -> None:
    """Defines an op of the engine that only the CPU needs."""
    _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, implementation, "CPU")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)


def backends() -> dict[str, dict[str, tuple[str, str]]]:
    """{op: {"cpu": (backend, why), "cuda": (backend, why)}}: what runs now, and why."""
    return {name: dict(row) for name, row in _backends.items()}


def _warned_once(fn: Callable, name: str, backend: str, why: str) -> Callable:
    if backend_choice() != "auto":  # asked for: nothing to warn about
        return fn
    warned = False

    @functools.wraps(fn)
    def call(*args):
        nonlocal warned
        if not warned:
            warned = True
            troubles.warn("other_backend", category=BackendWarning, op=name, backend=backend, why=why)
        return fn(*args)

    return call


def on_device_of(tensor: torch.Tensor):
    """Makes the tensor's GPU the current one for a Triton launch (Triton launches on the current device)."""
    return torch.cuda.device_of(tensor)
