"""Ending well: SIGINT, SIGTERM and SIGHUP are noted, and obeyed where nothing is half done."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType


class Stopped(Exception):
    """A signal asked the process to end. `code` is the exit status that shells expect."""

    run: Path | None = None  # which one can go on
    ends_well = True  # other processes of a training are told that nothing has failed

    def __init__(self, number: int):
        self.number = signal.Signals(number)
        self.code = 128 + number
        super().__init__(f"stopped by {self.number.name}")


class StopRequest:
    """Within `with`, SIGINT, SIGTERM and SIGHUP set a flag that `check` turns into Stopped. A second acts at once.

    The first says so on standard error, with what is waited for. Under nohup SIGHUP stays ignored.
    """

    def __init__(self, after: str = "this batch"):
        self.number: int | None = None
        self._after = after
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            before = signal.getsignal(number)
            if before is None or (number == signal.SIGHUP and before == signal.SIG_IGN):  # as nohup has it
                continue
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread: signals are somebody else's
                break
        return self

    def __exit__(self, *_) -> None:
        self._restore()

    def check(self) -> None:
        if self.number is not None:
            raise Stopped(self.number)

    def watch(self, loader: Iterable) -> Iterable:
        """The loader, checked before each batch."""
        return _Watched(loader, self)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()
        with contextlib.suppress(OSError):  # nobody reads; and print may be interrupted in itself
            os.write(2, f"\n{signal.Signals(number).name}: stops after {self._after}; again: at once\n".encode())

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


class _Watched:
    def __init__(self, loader: Iterable, stop: StopRequest):
        self._loader, self._stop = loader, stop

    def __iter__(self) -> Iterator:
        for batch in self._loader:
            self._stop.check()
            yield batch
