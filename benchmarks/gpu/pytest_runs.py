"""pytest plugin of gpu_suite.py: each outcome is on disk at once, and tests that have one are not run again.

A CUDA error can spoil every later test of its process: then the session ends, and the suite starts another. So it does
where one test hangs, which no Python exception ends that waits for a device: after HAM_SUITE_PATIENCE seconds.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

LINES = 15  # of a failure that are kept
SPOILED = ("CUDA error", "cudaError", "CUDA driver error", "device-side assert")


def read(path: Path) -> dict[str, dict]:
    """{test: {"outcome", "seconds", "text"}}; "started" is the outcome of a test that was cut off."""
    found: dict[str, dict] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:  # torn by a kill
            continue
        before = found.get(entry["test"], {}).get("outcome")
        if before != "failed" or entry["outcome"] == "failed":  # a failed teardown follows a passed test
            found[entry["test"]] = entry
    return found


def write(path: Path, **entry) -> None:
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")


def _part() -> tuple[int, int]:
    """Which of how many processes, that share the tests, this one is."""
    part, parts = os.environ.get("HAM_SUITE_PART", "0/1").split("/")
    return int(part), int(parts)


def _path() -> Path:
    return Path(os.environ["HAM_SUITE_OUTCOMES"])


class _Recorder:
    def __init__(self, config):
        self.config, self.session = config, None

    def pytest_sessionstart(self, session) -> None:
        self.session = session

    def pytest_runtest_logstart(self, nodeid) -> None:
        write(_path(), test=nodeid, outcome="started", part=_part()[0])

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self._failed(report)

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            self._failed(report)
        elif report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else getattr(report, "wasxfail", "")
            write(_path(), test=report.nodeid, outcome="skipped", text=str(reason).removeprefix("Skipped: "))
        elif report.when == "call":
            write(_path(), test=report.nodeid, outcome="passed", seconds=report.duration)

    def _failed(self, report) -> None:
        text = str(report.longreprtext)
        write(_path(), test=report.nodeid, outcome="failed", text="\n".join(text.splitlines()[-LINES:]))
        if any(word in text for word in SPOILED) and _cuda_is_lost():
            self.session.shouldstop = "a CUDA error spoils this process"


def _cuda_is_lost() -> bool:
    """Most errors end with their call, such as those of a capture; after the others every call raises."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


class _Watch:
    """Ends the process of a test that takes longer, with the stacks of its threads on the standard error."""

    def __init__(self, patience: float):
        self.patience, self.stderr = patience, os.dup(2)  # before pytest captures it

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self) -> Iterator[None]:
        faulthandler.dump_traceback_later(self.patience, exit=True, file=self.stderr)
        try:
            return (yield)
        finally:
            faulthandler.cancel_dump_traceback_later()


def pytest_configure(config) -> None:
    if not hasattr(config, "workerinput"):  # under xdist the controller hears of every test
        config.pluginmanager.register(_Recorder(config))
    if patience := os.environ.get("HAM_SUITE_PATIENCE"):
        config.pluginmanager.register(_Watch(float(patience)))


def pytest_collection_modifyitems(config, items) -> None:
    done = set(Path(os.environ["HAM_SUITE_DONE"]).read_text().splitlines())
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
    part, parts = _part()
    items[:] = [item for item in items if item.nodeid not in done][part::parts]
