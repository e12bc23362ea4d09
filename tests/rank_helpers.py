"""Several processes in one test: each runs a function of a test module, and an error of one is the test's."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

COMMANDS = [f"ham_kernels.commands.{name}" for name in ("train", "evaluate", "sweep")]
NEEDED = ["torch._dynamo", "torch.distributed.fsdp", "pytest", "sklearn.datasets", *COMMANDS]
_OF_PROCESSES = r"(?i).*(distributed|process.?group|collective|all_?reduce|broadcast|barrier|gloo|DDP|FSDP|rank)"
SECONDS = 60  # a deadlock is a red test, not a job that hangs


def on_ranks(world: int, function, folder: Path, *args) -> list:
    """What `function(rank, *args)` of a test module returned on each of `world` processes, joined by gloo, or by its
    `backend`."""
    store, processes = started(world, function, folder, *args)
    for process in processes:
        process.join(4 * SECONDS)
        if process.is_alive():
            process.kill()
    said = [Path(f"{store}-{rank}.txt") for rank in range(world)]
    errors = [f"process {r}:\n{p.read_text()}" for r, p in enumerate(said) if p.exists()]
    assert not errors, "\n".join(errors)
    assert [p.exitcode for p in processes] == [0] * world
    return [torch.load(f"{store}-{rank}.pt", weights_only=False) for rank in range(world)]


def started(world: int, function, folder: Path, *args) -> tuple[Path, list[mp.Process]]:
    """The processes at work, and the start of the names of the files in which they leave what they return or raise."""
    # a server of processes has imported what all of them need, and has no threads that a fork would lose
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(NEEDED)
    sys_path = [p for p in sys.path if p]
    store = folder / f"store-{len(list(folder.iterdir()))}"
    names = (function.__module__, function.__qualname__)
    processes = [
        context.Process(target=_one, args=(rank, world, str(store), names, sys_path, args)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    return store, processes


def _one(rank: int, world: int, store: str, names, sys_path, args) -> None:
    sys.path[:0] = [p for p in sys_path if p not in sys.path]
    torch.set_num_threads(1)
    for told in ({"message": _OF_PROCESSES}, {"category": FutureWarning}, {"category": DeprecationWarning}):
        warnings.filterwarnings("error", **told)
    warnings.filterwarnings("ignore", "Grad strides do not match")  # of images of one channel, whose strides are alike
    try:
        function = getattr(importlib.import_module(names[0]), names[1])
        backend = getattr(function, "backend", "gloo")
        if backend == "nccl":
            torch.cuda.set_device(rank)
        dist.init_process_group(
            backend, init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=SECONDS)
        )
        found = function(rank, *args)
        dist.barrier()
        dist.destroy_process_group()
        torch.save(found, f"{store}-{rank}.pt")
        os._exit(0)  # torch's threads may abort a process that unloads them
    except BaseException:
        Path(f"{store}-{rank}.txt").write_text(traceback.format_exc())
        os._exit(1)
