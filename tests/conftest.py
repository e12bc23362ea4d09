"""What the test files share: the interpreter where no GPU is, seeds, poisoned memory, guarded kernels."""

from __future__ import annotations

import importlib.util
import os
import secrets
from importlib import metadata

import pytest

# One core for each of pytest's processes and for those that tests start. Torch and MKL read this when they are loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", os.environ["OMP_NUM_THREADS"])

import torch
from hypothesis import HealthCheck, settings

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:  # before anything imports Triton, whose own functions are decorated at import
    os.environ.setdefault("TRITON_INTERPRET", "1")


def _interprets() -> bool:
    """Triton's interpreter of before 3.7 fails where numpy 2.4 or later is."""
    if importlib.util.find_spec("triton") is None:
        return True  # its tests know
    versions = (metadata.version(name).split(".")[:2] for name in ("triton", "numpy"))
    triton, numpy = (tuple(map(int, version)) for version in versions)
    return triton >= (3, 7) or numpy < (2, 4)


settings.register_profile(
    "ham",
    deadline=None,  # a kernel in the interpreter has no steady speed
    max_examples=25,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("ham")


# ---------------------------------------------------------------- two processes
@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads these options
def pytest_cmdline_main(config):
    """Two processes unless the command line says otherwise, and a file's tests in one of them, for their fixtures."""
    option, files = config.option, {arg.split("::")[0] for arg in config.args}
    if not config.pluginmanager.hasplugin("xdist") or "PYTEST_XDIST_WORKER" in os.environ:
        return  # the processes of pytest-xdist, which call this too, start no others
    single = len(files) == 1 and files.pop().endswith(".py")
    if option.numprocesses is None and not (single or option.usepdb or option.trace or option.capture == "no"):
        option.numprocesses = 2
    if option.numprocesses and option.dist == "no":
        option.dist = "loadfile"
        option.loadscopereorder = False  # in the order below, not by the number of tests


def _long_files_first(items) -> None:
    """So that two processes end at about the same time."""
    items.sort(key=lambda item: not any(mark.name == "slow" for mark in item.parent.iter_markers()))


# ---------------------------------------------------------------- slow tests
# A test of one CPU second or more is slow, and from three on is named at the end where it does not say so. It does not
# fail: processors differ by more than twice, and beside other work the same test takes up to 1.7 times the CPU time.
MOST_CPU_SECONDS = 3.0
SLOW = "slow and not marked"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    before = _cpu_seconds()
    result = yield
    used = _cpu_seconds() - before
    # On a GPU the first test of a kernel compiles it.
    if used > MOST_CPU_SECONDS and not HAS_GPU and not any(map(item.get_closest_marker, ("slow", "thorough"))):
        item.user_properties.append((SLOW, round(used, 1)))
    return result


def _cpu_seconds() -> float:
    """Of this process and of those it has waited for. Time on the clock would depend on who else is at work."""
    return sum(os.times()[:4])


# ---------------------------------------------------------------- GPU tests
@pytest.hookimpl(tryfirst=True)  # before -m chooses by markers
def pytest_collection_modifyitems(config, items):
    if hasattr(config, "workerinput"):
        _long_files_first(items)
    skip = pytest.mark.skip(reason="needs a CUDA device")
    blind = pytest.mark.skip(
        reason='needs a CUDA device, or pip install "numpy<2.4" for the interpreter of this Triton'
    )
    interprets = HAS_GPU or _interprets()
    for item in items:
        if HAS_GPU and "device" in item.fixturenames and _is_fixture(item):
            item.add_marker(pytest.mark.gpu)
        elif not HAS_GPU and item.get_closest_marker("gpu"):
            item.add_marker(skip)
        elif not interprets and "device" in item.fixturenames and _is_fixture(item):
            item.add_marker(blind)


def _is_fixture(item) -> bool:
    """Whether its `device` is the fixture below, and no parameter of its own."""
    return "device" not in getattr(getattr(item, "callspec", None), "params", ())


def pytest_terminal_summary(terminalreporter):
    reports = terminalreporter.stats.get("skipped", ())
    skipped = [report for report in reports if "gpu" in getattr(report, "keywords", ())]  # a whole file's has none
    if skipped:
        terminalreporter.write_line(f"{len(skipped)} GPU tests skipped: no CUDA device here")
    reports = [report for report in terminalreporter.stats.get("passed", ()) if report.when == "call"]
    told = [(dict(report.user_properties).get(SLOW), report.nodeid) for report in reports]
    for seconds, test in sorted((found for found in told if found[0]), reverse=True):
        terminalreporter.write_line(f"{seconds} CPU seconds, above {MOST_CPU_SECONDS:g} and not marked slow: {test}")


@pytest.fixture
def device() -> torch.device:
    """Where launchers run: on the GPU, or in Triton's interpreter on CPU tensors. There its tests are GPU tests."""
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(scope="module")
def no_gpu():
    """Device "auto" is the CPU, in processes started too: for what is compared bit by bit, or with a CPU's run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


# ---------------------------------------------------------------- seeds
@pytest.fixture(autouse=True)
def seed() -> int:
    """A fresh seed for each test, shown when it fails; HAM_TEST_SEED=... repeats one."""
    value = int(os.environ.get("HAM_TEST_SEED") or secrets.randbits(31))
    print(f"HAM_TEST_SEED={value}")
    torch.manual_seed(value)
    return value


@pytest.fixture(scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes that are compared with it
    yield
    torch.set_num_threads(before)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)  # for what must be right, or be noticed, with more than one
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------- memory
@pytest.fixture
def poisoned_memory():
    """torch.empty and its kin hold NaN or the largest integer, so that whatever is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, scope="session")
def guarded_interpreter():
    """The interpreter reads and writes out of bounds in silence; with this it raises IndexError."""
    if HAS_GPU or importlib.util.find_spec("triton") is None:
        yield
        return
    from guard import guard_interpreter

    with guard_interpreter():
        yield
