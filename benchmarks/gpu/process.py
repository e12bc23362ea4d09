"""Commands of a stage: run side by side, logged, and stopped in time."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

GRACE = 15.0  # seconds between asking a command to stop and killing it
PR_SET_PDEATHSIG = 1


class OutOfTime(Exception):
    """The slot is over: the stage has no result yet and goes on in the next call."""


class Failed(Exception):
    """The stage has no result; the message says why."""


class Slot:
    """The time of one call. SIGTERM, SIGINT and SIGHUP end it early."""

    def __init__(self, seconds: float, reserve: float):
        self.end = time.monotonic() + seconds
        self.reserve = reserve  # kept for what has to be done at the end

    def left(self, final: bool = False) -> float:
        """Seconds that a stage still has; the final ones may use the reserve."""
        return self.end - (0.0 if final else self.reserve) - time.monotonic()

    def __enter__(self) -> Slot:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._finish)
        return self

    def __exit__(self, *_) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)

    def _finish(self, *_) -> None:
        self.end = min(self.end, time.monotonic() + self.reserve)


class Shell:
    """Runs the commands of one stage. Their output goes to `log`.

    Args: limit: seconds after which the stage has failed, however much is left of the slot.
    """

    def __init__(self, slot: Slot, log: Path, env: dict[str, str], cwd: Path, limit: float, final: bool):
        self.slot, self.log, self.env, self.cwd, self.final = slot, log, env, cwd, final
        self.limit, self.give_up = limit, time.monotonic() + limit

    def run(
        self, *commands: Sequence[str], ask: int = signal.SIGTERM, grace: float = GRACE, env: dict | None = None,
        cwd: Path | None = None,
    ) -> list[int]:  # fmt: skip
        """Exit statuses of these commands, run side by side; minus the signal where one died of it.

        ask: the signal that asks them to stop in time, what is left of each is killed `grace` seconds later.
        Raises: OutOfTime, Failed after the limit.
        """
        processes = [self._start(command, env or {}, cwd=cwd) for command in commands]
        try:
            while any(process.poll() is None for process in processes):
                if min(self.slot.left(self.final), self.give_up - time.monotonic()) <= 0:
                    self._ask(processes, ask, grace)
                    if self.slot.left(self.final) <= 0:
                        raise OutOfTime
                    raise Failed(f"did not end in {self.limit:.0f} s")
                time.sleep(0.05)
        finally:
            for process in processes:
                _kill_group(process)
        return [process.returncode for process in processes]

    def output(self, command: Sequence[str]) -> tuple[int, str]:
        """Exit status and standard output of a short command, run as `run` does."""
        path = self.log.with_suffix(".out")
        with path.open("w") as out:
            process = self._start(command, {}, out)
            try:
                process.wait(max(1.0, min(self.slot.left(self.final), self.give_up - time.monotonic())))
            except subprocess.TimeoutExpired:
                if self.slot.left(self.final) <= 0:
                    raise OutOfTime from None
                raise Failed(f"did not end in {self.limit:.0f} s") from None
            finally:
                _kill_group(process)
        text = path.read_text(errors="replace")
        path.unlink()
        return process.returncode, text

    def last_line(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "it said nothing"

    def _start(self, command: Sequence[str], env: dict[str, str], out=None, cwd=None) -> subprocess.Popen:
        with self.log.open("a") as log:
            log.write(f"\n$ {shlex.join(map(str, command))}\n")
            log.flush()
            return subprocess.Popen(
                list(map(str, command)), cwd=cwd or self.cwd, env=self.env | env, stdin=subprocess.DEVNULL,
                stdout=out or log, stderr=log, start_new_session=True, preexec_fn=_end_with_parent,
            )  # fmt: skip

    @staticmethod
    def _ask(processes: list[subprocess.Popen], ask: int, grace: float) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(ask)
        end = time.monotonic() + grace
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))


def _end_with_parent() -> None:
    """In the child: a killed suite must not leave a command that holds the GPU."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _kill_group(process: subprocess.Popen) -> None:
    """The command and whatever it has left behind, such as workers."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
