"""What a training run or a judgement says while it runs: a bar on a terminal, elsewhere a line per epoch or attack."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
from typing import TextIO

from tqdm import tqdm

from ..training.reports import EpochReport, StepReport

WAITED = 0.1  # share of an epoch from which on it is told that images are what limits


def say(text: str = "", file: TextIO | None = None) -> None:
    """Prints a line to `file` (None: standard output). Where nobody reads any more, it and all after it are dropped:
    the work is in files, and goes on.
    """
    file = sys.stdout if file is None else file
    try:
        print(text, file=file, flush=True)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):  # a pipe without a reader, a terminal that is gone
            raise
        with contextlib.suppress(OSError):  # else what is still in the buffer would fail again at exit
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, file.fileno())
            os.close(nowhere)


def on_terminal() -> bool:
    """Whether somebody can see a bar."""
    return sys.stderr is not None and sys.stderr.isatty()


class Heartbeat:
    """Whether a minute has passed since the last line, where lines are all there is to see."""

    def __init__(self, seconds: float = 60.0):
        self._seconds = seconds
        self.spoken()

    def spoken(self) -> None:
        self._last = time.monotonic()

    def due(self) -> bool:
        if time.monotonic() - self._last < self._seconds:
            return False
        self.spoken()
        return True


class TrainProgress:
    """Epoch, loss, hard fraction, images/s, time left.

    Args: epochs in all; batches of one epoch; done: batches done before this process; quiet: say nothing.
    """

    def __init__(self, epochs: int, batches: int, done: int = 0, *, quiet: bool = False):
        self._epochs, self._batches, self._done = epochs, batches, done
        self._quiet = quiet
        self._started = time.perf_counter()
        self._new = 0  # batches done by this process
        self._images = 0
        self._lines, self._heartbeat = not quiet and not on_terminal(), Heartbeat()
        self._bar = tqdm(
            total=epochs * batches, initial=done, unit="batch", dynamic_ncols=True, smoothing=0.05,
            disable=quiet or self._lines,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed} < {remaining}{postfix}",
        )  # fmt: skip

    def batch(self, step: StepReport, epoch: int) -> None:
        self._new += step.batches
        self._images += step.n
        if self._lines and self._heartbeat.due():
            batch = (self._done + self._new - 1) % self._batches + 1
            say(
                f"epoch {epoch}/{self._epochs}  batch {batch}/{self._batches}  loss {step.loss:.3f}  "
                f"left {duration(self._left())}"
            )
        if self._bar.disable:
            return
        rate = self._images / (time.perf_counter() - self._started)
        self._bar.set_description_str(f"epoch {epoch}/{self._epochs}", refresh=False)
        self._bar.set_postfix_str(
            f"loss {step.loss:.3f}, hard {step.hard_fraction:.0%}, {rate:.0f} images/s", refresh=False
        )
        self._bar.update(step.batches)

    def epoch(self, report: EpochReport, best: bool) -> None:
        if self._quiet:
            return
        line = f"epoch {report.epoch}/{self._epochs}  {epoch_line(report)}"
        self._heartbeat.spoken()
        if self._lines:
            say(f"{line}  left {duration(self._left())}{'  (best)' if best else ''}")
        else:
            with self._bar.external_write_mode():
                say(f"{line}{'  (best)' if best else ''}")

    def close(self) -> None:
        self._bar.close()

    def _left(self) -> float:
        left = self._epochs * self._batches - self._done - self._new
        return left * (time.perf_counter() - self._started) / max(self._new, 1)


class JudgeProgress:
    """A bar per attack on a terminal, else a line per attack, and one a minute."""

    def __init__(self, quiet: bool, where: str = ""):
        self._where = where  # the attacks are, behind their names
        self._quiet, self._bars, self._heartbeat = quiet, on_terminal(), Heartbeat()
        self._bar: tqdm | None = None
        self._name = ""

    def __enter__(self) -> JudgeProgress:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def begin(self, name: str) -> None:
        """A line for what comes next, behind the bar before it."""
        if self._quiet or name == self._name:
            return
        self._name = name
        self.close()
        self._heartbeat.spoken()
        say(f"{name} ...", sys.stderr)

    def __call__(self, name: str, done: int, total: int | None) -> None:
        if self._quiet:
            return
        name += self._where
        if not self._bars:
            self.begin(name)
            if self._heartbeat.due():
                say(f"{name}: {done} of {total or '?'} done", sys.stderr)
            return
        if self._bar is None or name != self._name:
            self._name = name
            self.close()
            unit = "check" if name.startswith("masking") else "image"
            self._bar = tqdm(total=total, desc=name, unit=unit, dynamic_ncols=True)
        self._bar.total = total or self._bar.total  # known after the first attack
        self._bar.update(done - self._bar.n)


def epoch_line(report: EpochReport) -> str:
    """One epoch in one line."""
    parts = [
        f"{report.phase:7}",
        f"loss {report.loss:.3f}",
        f"hard {report.hard_fraction:4.0%}",
        f"{report.n / report.seconds:.0f} images/s" if report.seconds else "",
    ]
    if report.waited and report.waited >= WAITED * report.seconds:
        parts.append(f"{report.waited / report.seconds:.0%} of it waiting for images (--workers)")
    if report.skipped:
        parts.append(f"{report.skipped} batches without a hard row")
    for name, judged in (("val", report.val), ("val ema", report.val_ema)):
        if judged:
            parts.append(
                f"{name} "
                + ", ".join(
                    f"{attack} {100 * r.accuracy:.1f}"
                    + ("" if attack == "clean" else f" (worst {100 * r.worst_class:.1f})")
                    for attack, r in judged.items()
                )
            )
    return "  ".join(p for p in parts if p)


def duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"
