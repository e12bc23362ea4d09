"""The process keeps the memory that torch frees."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from engine_helpers import (
    CPU,
)

from ham_kernels.engine import (
    Engine,
    EngineOptions,
    engine,
    memory,
    plain,
)

# ---------------------------------------------------------------- memory
PAGE_FAULTS = """
import ctypes, importlib.util, resource, sys
spec = importlib.util.spec_from_file_location("memory", sys.argv[1])
memory = importlib.util.module_from_spec(spec)
spec.loader.exec_module(memory)
libc = ctypes.CDLL(None)
libc.malloc.restype, size = ctypes.c_void_p, 64 << 20

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        block = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(size)))
        ctypes.memset(block, 1, size)
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

counts = [faults()]
for change in (memory.keep_freed_memory, memory.return_freed_memory):
    if not change():
        sys.exit(77)
    faults()  # the first block of the kept memory has to be asked for
    counts.append(faults())
print(*counts)
"""


def test_freed_memory_stays_and_goes_back():
    """Pages that the system has to hand out for four blocks of 64 MiB: by default, kept, and by default again."""
    run = subprocess.run([sys.executable, "-c", PAGE_FAULTS, memory.__file__], capture_output=True, text=True)
    if run.returncode == 77:
        pytest.skip("this C library takes no advice")
    default, kept, back = map(int, run.stdout.split())
    assert kept < 0.05 * default
    assert back > 0.5 * default


@pytest.mark.parametrize(
    ("keep", "device", "kept"),
    [(True, CPU, 1), (False, CPU, 0), (True, torch.device("cuda"), 0), (True, None, 0)],
    ids=["asked for", "not asked for", "on a GPU", "nobody knows where"],
)
def test_who_keeps_memory(keep, device, kept, monkeypatch):
    calls = []
    monkeypatch.setattr(engine, "keep_freed_memory", lambda: calls.append(1))
    Engine(EngineOptions(keep_memory=keep), device)
    assert len(calls) == kept
    assert plain("fp32").options.keep_memory is False  # an attack alone leaves the process as it is
