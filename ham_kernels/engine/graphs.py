"""CUDA graphs: a function over tensors that stay in place, captured once and replayed."""

from __future__ import annotations

import functools
import math
import sys
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .half_weights import addresses
from .options import reason

# Shares of the full batch that an attack is captured for. Rows are padded up to the next one.
BUCKETS = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 5 / 16, 3 / 8, 7 / 16, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 1.0)
LIMIT = 128  # graphs kept; of each only its launches take memory, the rest lies in one pool
WARM_UP_RUNS = 2  # before a capture: kernels compile, libraries choose algorithms and allocate

Replay = Callable[[], None]


def cuda_capture(fns: Sequence[Callable[[], None]], device: torch.device, pool) -> list[Replay]:
    """Captures fns, each of which must only read tensors that stay where they are or that the one before it made, and
    write ones that stay. Runs all WARM_UP_RUNS times, in their order.

    Raises: what fns or the capture raise; stream and allocator are then as before.
    """
    with torch.cuda.device(device):
        index, here = torch.cuda.current_device(), torch.cuda.current_stream()
        side = _side_stream(index)  # one for all: each stream keeps workspaces of its own
        side.wait_stream(here)
        try:
            with torch.cuda.stream(side):
                for _ in range(WARM_UP_RUNS - 1):
                    run(fns)
                with _waiting_raises():  # before a capture has begun, where it would leave more behind
                    run(fns)
        finally:
            here.wait_stream(side)
        graphs = [torch.cuda.CUDAGraph() for _ in fns]
        try:
            for graph, fn in zip(graphs, fns, strict=True):
                with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                    fn()
        except BaseException:  # torch before 2.15 leaves all as it was in the capture
            torch.cuda.set_stream(here)
            with suppress(AttributeError, RuntimeError):
                torch._C._cuda_endAllocateToPool(index, pool)
                torch._C._cuda_releasePool(index, pool)
            _end_capture_of_generators(side, device)
            raise
    return [graph.replay for graph in graphs]


def run(fns: Sequence[Callable[[], None]]) -> None:
    for fn in fns:
        fn()


def _end_capture_of_generators(side: torch.cuda.Stream, device: torch.device) -> None:
    """CUDA's random generator takes a capture that failed for one under way, and refuses numbers to everybody, until
    another one has ended well.
    """
    with suppress(Exception):  # what led here is the error to tell of
        another = torch.cuda.graph(torch.cuda.CUDAGraph(), stream=side, capture_error_mode="thread_local")
        with another:
            torch.zeros(1, device=device)


@functools.cache
def _side_stream(index: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(index)


@contextmanager
def _waiting_raises() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch tells once that this is a prototype, which is no user's business
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class CaptureError(Exception):
    """A function that runs by itself could not be captured."""


def bucket_of(rows: int, full: int) -> int:
    """The least captured number of rows that holds `rows` of a batch of `full`."""
    return next(b for share in BUCKETS if (b := math.ceil(full * share)) >= rows)


class Graphs:
    """What was captured of one model. It ends when the model's tensors move: then the addresses in it are wrong."""

    def __init__(self, device: torch.device, capture: Callable[[Sequence, torch.device, Any], list[Replay]]):
        self._device, self._capture = device, capture
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()
        self._seen: dict[Hashable, int] = {}
        self.shared: dict[Hashable, Any] = {}  # what several graphs read or write; forgotten with them
        self.replays = 0
        self._model: nn.Module | None = None
        self._addresses: tuple[int, ...] = ()
        self._pool = None
        self._rows_meet = False
        self._full = 0

    def follow(self, model: nn.Module) -> None:
        """Forgets everything where this is another model, or its tensors have moved."""
        where = addresses(model)
        if model is self._model and where == self._addresses:
            return
        self.forget()
        self._model, self._addresses = model, where
        # such a layer normalises an attack by the batch, where padding would be seen
        self._rows_meet = any(isinstance(m, _BatchNorm) and m.running_mean is None for m in model.modules())

    def forget(self) -> None:
        """Gives back the memory of all graphs."""
        self._kept.clear()
        self._seen.clear()
        self.shared.clear()
        self._pool = None
        self._full = 0

    def rows_for(self, rows: int, full: int) -> int:
        """How many rows to capture for `rows` of a batch of `full`: a share of the largest batch so far."""
        self._full = max(self._full, full)
        if 2 * full > self._full:  # the last batch of an epoch is served by the graphs of the others
            full = self._full
        return rows if self._rows_meet else bucket_of(rows, full)

    def sighting(self, key: Hashable) -> int:
        """How often this has been asked for, this time included."""
        self._seen[key] = self._seen.get(key, 0) + 1
        return self._seen[key]

    def has_room_for(self, key: Hashable) -> bool:
        return key in self._kept or len(self._kept) < LIMIT

    def kept(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What is kept under this key, made where there is none. Of more than LIMIT the one least used leaves."""
        if key not in self._kept:
            self._kept[key] = make()
            if len(self._kept) > LIMIT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def capture(self, fns: Sequence[Callable[[], None]]) -> list[Replay]:
        """Functions over tensors that stay where they are, as replays. They run a few times, in this order.

        All captures share one pool of memory: what one leaves in tensors of its own is lost with the next replay, but
        for that of the next function. Random generators stay where they were. Raises: CaptureError; what a function
        raises by itself is raised as it is.
        """
        on_gpu = self._device.type == "cuda"
        if self._pool is None and on_gpu:
            self._pool = torch.cuda.graph_pool_handle()
        devices = [self._device] if on_gpu else []
        before = sys.exc_info()[1]
        with torch.random.fork_rng(devices=devices, device_type="cuda"), no_autocast_cache():
            try:
                return self._capture(fns, self._device, self._pool)
            except Exception as error:
                self._pool = None
                if not isinstance(error, torch.OutOfMemoryError):
                    run(fns)
                raise CaptureError(reason("the capture failed", _first(error, before))) from error

    def __len__(self) -> int:
        return len(self._kept)


def _first(error: BaseException, before: BaseException | None) -> BaseException:
    """What went wrong first: the end of a capture that failed raises an error of its own, which names no cause.

    `before` was under way already.
    """
    while error.__context__ is not None and error.__context__ is not before:
        error = error.__context__
    return error


@contextmanager
def no_autocast_cache() -> Iterator[None]:
    """Within a caller's autocast, weights may have been cast before: a capture must not take those over."""
    enabled = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


def ambient(device: torch.device) -> tuple:
    """What a caller's own autocast does to what is captured."""
    kind = device.type
    return torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)


class Captured:
    """Functions over tensors that stay in place: loaded, replayed, read. What attack and update build on.

    `places` are the first `rows` rows of tensors that all graphs of a model share: what one holds is loaded anew for
    each use, so that a number of rows costs no more than its launches.
    """

    def __init__(self, graphs: Graphs, like: dict[str, Tensor | None], rows: int, capacity: int):
        self._graphs = weakref.proxy(graphs)  # which keep this: in a circle a GPU's memory would wait for the collector
        self.places = {name: _place(graphs.shared, name, t, rows, capacity) for name, t in like.items()}
        self._replays: dict[str, Replay] = {}

    def capture(self, functions: dict[str, Callable[[], None]]) -> None:
        """Several together: each may read what the one before it left, where it is replayed right after it."""
        if not self._replays.keys() >= functions.keys():
            replays = self._graphs.capture(list(functions.values()))
            self._replays.update(zip(functions, replays, strict=True))

    def load(self, values: dict[str, Tensor | None]) -> None:
        for name, own in self.places.items():
            if own is not None:
                own[: len(values[name])].copy_(values[name])

    def replay(self, name: str) -> None:
        self._graphs.replays += 1
        self._replays[name]()


def _place(shared: dict, name: str, like: Tensor | None, rows: int, capacity: int) -> Tensor | None:
    """The first `rows` rows of a tensor that stays, in the layout of `like`; made for `capacity` rows if need be."""
    if like is None:
        return None
    key = name, like.shape[1:], like.stride()[1:], like.dtype
    if key not in shared or len(shared[key]) < rows:
        whole = like.new_zeros((max(capacity, rows), *like.shape[1:]))
        if like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous():
            whole = whole.contiguous(memory_format=torch.channels_last)
        shared[key] = whole
    return shared[key][:rows]
