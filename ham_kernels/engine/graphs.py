"""CUDA graphs: a function over tensors that stay in place, captured once and replayed."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import nn

from .halves import addresses

# Shares of the full batch that an attack is captured for. Rows are padded up to the next one.
BUCKETS = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 5 / 16, 3 / 8, 7 / 16, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 1.0)
LIMIT = 128  # graphs kept; of each only its launches take memory, the rest lies in one pool
WARM_UP_RUNS = 2  # before a capture: kernels compile, libraries choose algorithms and allocate

Replay = Callable[[], None]


def cuda_capture(fn: Callable[[], None], device: torch.device, pool) -> Replay:
    """Captures fn, which must only read and write tensors that stay where they are. Runs it WARM_UP_RUNS times."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(WARM_UP_RUNS):
            fn()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        fn()
    return graph.replay


def bucket_of(rows: int, full: int) -> int:
    """The least captured number of rows that holds `rows` of a batch of `full`."""
    return next(b for share in BUCKETS if (b := math.ceil(full * share)) >= rows)


class Graphs:
    """What was captured of one model. It ends when the model's tensors move: then the addresses in it are wrong."""

    def __init__(self, device: torch.device, capture: Callable[[Callable[[], None], torch.device, Any], Replay]):
        self._device, self._capture = device, capture
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()
        self._seen: dict[Hashable, int] = {}
        self._model: nn.Module | None = None
        self._addresses: tuple[int, ...] = ()
        self._pool = None

    def follow(self, model: nn.Module) -> None:
        """Forgets everything where this is another model, or its tensors have moved."""
        where = addresses(model)
        if model is self._model and where == self._addresses:
            return
        self._kept.clear()
        self._seen.clear()
        self._pool = None
        self._model, self._addresses = model, where

    def sighting(self, key: Hashable) -> int:
        """How often this has been asked for, this time included."""
        self._seen[key] = self._seen.get(key, 0) + 1
        return self._seen[key]

    def kept(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What is kept under this key, made where there is none. Of more than LIMIT the one least used leaves."""
        if key not in self._kept:
            self._kept[key] = make()
            if len(self._kept) > LIMIT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def capture(self, fn: Callable[[], None]) -> Replay:
        """fn, which must only read and write tensors that stay where they are, as a replay. fn runs a few times.

        All captures share one pool of memory: what fn leaves in tensors of its own is lost with the next replay.
        """
        if self._pool is None and self._device.type == "cuda":
            self._pool = torch.cuda.graph_pool_handle()
        return self._capture(fn, self._device, self._pool)

    def __len__(self) -> int:
        return len(self._kept)
