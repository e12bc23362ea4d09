"""pytest plugin of gpu_suite.py: each outcome is on disk at once, and tests that have one are not run again.

A CUDA error spoils every later test of its process, so the session ends at the first one; the suite starts another.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

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


def _path() -> Path:
    return Path(os.environ["HAM_SUITE_OUTCOMES"])


class _Recorder:
    def __init__(self, config):
        self.config, self.session = config, None

    def pytest_sessionstart(self, session) -> None:
        self.session = session

    def pytest_runtest_logstart(self, nodeid) -> None:
        write(_path(), test=nodeid, outcome="started")

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
        if any(word in text for word in SPOILED):
            self.session.shouldstop = "a CUDA error spoils this process"


def pytest_configure(config) -> None:
    if not hasattr(config, "workerinput"):  # under xdist the controller hears of every test
        config.pluginmanager.register(_Recorder(config))


def pytest_collection_modifyitems(config, items) -> None:
    done = set(Path(os.environ["HAM_SUITE_DONE"]).read_text().splitlines())
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
    items[:] = [item for item in items if item.nodeid not in done]
