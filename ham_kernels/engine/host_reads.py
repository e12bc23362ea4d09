"""What the host reads from the device and when: the facts of a batch, the loss, clocks."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from ..common import checks, troubles
from ..distributed import Meeting, RankError


class NonFiniteError(ValueError):
    """The model produced NaN or infinity; nothing was updated."""


_free: defaultdict[tuple, list[tuple[Tensor, torch.cuda.Event]]] = defaultdict(list)  # pinned memory and its event


def start_read(values: Tensor) -> Callable[[], list[float]]:
    """Starts to copy a small tensor to the host; the returned function waits for it and gives the numbers, once.

    On CUDA the copy goes to pinned memory behind an event, so that the wait ends as soon as the values are there
    and not when all the work launched since has finished. Both serve again: to make them takes longer than to copy.
    """
    if values.device.type != "cuda":
        return values.tolist
    free = _free[values.device, values.dtype, values.shape]
    try:
        host, arrived = free.pop()
    except IndexError:
        with torch.inference_mode(False):  # it is used again, by trainings too
            host = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
        arrived = torch.cuda.Event()
    host.copy_(values, non_blocking=True)
    arrived.record(torch.cuda.current_stream(values.device))

    def wait() -> list[float]:
        arrived.synchronize()
        numbers = host.tolist()
        free.append((host, arrived))
        return numbers

    return wait


class BatchGuard:
    """Judges what only the data can tell: pixels in [0, 1], labels the model knows, finite logits.

    On the CPU each is judged at once. On CUDA they stay on the device and travel with `read`, the one read of a
    step, which comes before anything is updated. Of several processes that read is where they meet: each hears the
    facts of all, and what is wrong on one raises on all.

    Args: x, y: the rows of this process; only where there are others may it have none.
    """

    no_gradient = 0  # rows whose first step had no gradient to follow, on all processes; known after `read`

    def __init__(self, x: Tensor, y: Tensor, meeting: Meeting | None = None):
        self._y = y
        self._classes: int | None = None
        self._immediate = x.device.type != "cuda"
        self._meeting = meeting
        x = x.detach()
        self._facts = [*x.aminmax(), *y.aminmax()] if len(y) else [x.new_zeros(())] * 4
        self._finite = torch.ones((), dtype=torch.bool, device=x.device)
        self._no_gradient = self._facts[0].new_zeros(())
        if self._immediate:
            checks.data_facts(*(float(f) for f in self._facts), None)

    def logits(self, z: Tensor) -> None:
        """Takes note of logits: how many classes there are, and whether all are finite."""
        self._classes = z.shape[1]
        self._finite = self._finite & z.detach().isfinite().all()
        if self._immediate and len(self._y):
            checks.label_range(self._y, z.shape[1])
            if not self._finite:
                _raise_not_finite()

    def gradient(self, largest: Tensor) -> None:
        """Takes note of the largest |gradient| of each row, (n,), at the first step of an attack."""
        self._no_gradient = no_gradient(largest).sum()

    def read(self, counts: Tensor | None = None) -> list[int]:
        """Waits for the facts (and the counts of active rows, which it returns) and judges them."""
        if self._meeting is not None:
            return self._read_all(counts)
        if self._immediate:
            self.no_gradient = int(self._no_gradient)
            return [] if counts is None else counts.tolist()
        x_min, x_max, y_min, y_max, finite, no_gradient, *rest = start_read(self._so_far(counts))()
        checks.data_facts(x_min, x_max, y_min, y_max, self._classes)
        if not finite:
            _raise_not_finite()
        self.no_gradient = int(no_gradient)
        return [int(n) for n in rest]

    def _so_far(self, counts: Tensor | None) -> Tensor:
        facts = torch.stack([f.double() for f in (*self._facts, self._finite, self._no_gradient)])
        return facts if counts is None else torch.cat([facts, counts.double()])

    def _read_all(self, counts: Tensor | None) -> list[int]:
        """The count of active rows of each process; of its rows, where none was taken."""
        counts = torch.tensor([len(self._y)]) if counts is None else counts
        found = []
        for r, (x_min, x_max, y_min, y_max, finite, no_gradient, count) in enumerate(
            self._meeting.table(self._so_far(counts.to(self._facts[0].device)))
        ):
            try:
                checks.data_facts(x_min, x_max, y_min, y_max, self._classes)
                if not finite:
                    _raise_not_finite()
            except ValueError as error:
                raise (NonFiniteError if not finite else RankError)(f"process {r}: {error}") from error
            self.no_gradient += int(no_gradient)
            found.append(int(count))
        return found


def largest_entries(gradient: Tensor) -> Tensor:
    """(n,), the largest absolute value of each row; NaN where a row holds one."""
    return gradient.abs().amax(tuple(range(1, gradient.dim())))


def no_gradient(largest: Tensor) -> Tensor:
    """(n,) bool, rows without a gradient to follow: NaN, infinite, or zero everywhere."""
    return ~((largest > 0) & (largest < torch.inf))


def _raise_not_finite() -> None:
    raise troubles.error("logits_not_finite", NonFiniteError)


class Stopwatch:
    """Seconds of work on a device; on CUDA the end is waited for only when `seconds` is asked."""

    def __init__(self, device: torch.device):
        self._device = device
        self._cuda = device.type == "cuda"
        self._start = self._now()
        self._end = None

    def stop(self) -> Stopwatch:
        self._end = self._now()
        return self

    @property
    def seconds(self) -> float:
        if not self._cuda:
            return self._end - self._start
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1000.0

    def _now(self):
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
