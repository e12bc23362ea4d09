"""CUB's DeviceSelect::Flagged as a competitor of `compact`: built by nvcc, kept in a cache, called through ctypes."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from ham_kernels.ops.native import cuda

SOURCE = Path(__file__).with_name("cub_select.cu")


class Unavailable(RuntimeError):
    """CUB cannot be timed here; the message says why."""


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ham_kernels"


def build(arch: str, folder: Path) -> Path:
    """Compiles cub_select.cu for one architecture, "sm_90" say, unless `folder` has it. Returns the library.

    Raises: Unavailable where there is no nvcc, the compiler fails, or the folder cannot be written.
    """
    nvcc = cuda.find_nvcc()
    if nvcc is None:
        raise Unavailable("no nvcc to build CUB's DeviceSelect with")
    try:
        version = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=True).stdout
        state = f"{version}\0{arch}\0{SOURCE.read_text()}"  # a newer toolkit brings a newer CUB
        library = folder / f"cub_select-{arch}-{hashlib.sha256(state.encode()).hexdigest()[:16]}.so"
        if library.exists():
            return library
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(f".{os.getpid()}.tmp")
        flags = ["-O3", "-std=c++17", "-shared", "-Xcompiler=-fPIC", "-cudart=static", f"-arch={arch}"]
        command = [str(nvcc), *flags, str(SOURCE), "-o", str(unfinished)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            lines = (done.stderr or done.stdout).strip().splitlines() or ["it says nothing"]
            error = next((line for line in lines if "error" in line), lines[-1])
            raise Unavailable(f"nvcc ended with code {done.returncode}: {error}")
        unfinished.replace(library)
    except (OSError, subprocess.CalledProcessError) as error:
        raise Unavailable(f"CUB's DeviceSelect could not be built: {error}") from None
    return library


def load(library: Path) -> ctypes.CDLL:
    try:
        loaded = ctypes.CDLL(str(library))
    except OSError as error:
        raise Unavailable(f"{library.name} does not load: {error}") from None
    pointer = ctypes.c_void_p
    loaded.cub_select.argtypes = [
        pointer, ctypes.POINTER(ctypes.c_size_t), pointer, pointer, pointer, ctypes.c_int32, pointer,
    ]  # fmt: skip
    loaded.cub_select.restype = ctypes.c_int
    return loaded


def library_for(device: int) -> ctypes.CDLL:
    """The library for a CUDA device, built on first use (some seconds). Raises: Unavailable."""
    found = _attempt(*torch.cuda.get_device_capability(device))
    if isinstance(found, Unavailable):
        raise found
    return found


@functools.cache
def _attempt(major: int, minor: int) -> ctypes.CDLL | Unavailable:
    try:
        return load(build(f"sm_{major}{minor}", cache_folder()))
    except Unavailable as error:  # what failed once is not tried again for every case
        return error


class Select:
    """DeviceSelect::Flagged over the positions of `flags`; workspace and outputs are allocated here, not per call.

    Calling it returns (index, count) as `ham_kernels.ops.compact` does, but index[count:] is not written.
    """

    def __init__(self, flags: Tensor):
        device = flags.device
        self.flags, self.n = flags, flags.numel()
        self.index = torch.empty(self.n, dtype=torch.int32, device=device)
        self.count = torch.empty(1, dtype=torch.int32, device=device)
        self._select = library_for(device.index).cub_select
        self._bytes = ctypes.c_size_t(0)
        self._temp = None
        self()
        self._temp = torch.empty(max(1, self._bytes.value), dtype=torch.uint8, device=device)

    def __call__(self) -> tuple[Tensor, Tensor]:
        error = self._select(
            None if self._temp is None else self._temp.data_ptr(), ctypes.byref(self._bytes), self.flags.data_ptr(),
            self.index.data_ptr(), self.count.data_ptr(), self.n, torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
        if error:
            raise RuntimeError(f"cub::DeviceSelect::Flagged returned CUDA error {error}")
        return self.index, self.count
