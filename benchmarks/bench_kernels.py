"""Each op against eager torch, torch.compile, CUB's DeviceSelect and torch.nonzero, and against the copy rate.

    python benchmarks/bench_kernels.py             all ops; about 3 minutes on a GPU, CPU sizes without one
    python benchmarks/bench_kernels.py --check     exit 1 when a goal is missed
    pytest benchmarks/bench_kernels.py             the same cases, few sizes, under pytest-benchmark

Goals, on a GPU: a PGD step (L-inf) reaches 85 % of the copy rate from 64 MB of traffic on (one step reads x_adv, x and
grad and writes x_adv: 16 bytes per fp32 element), and takes at most 1.5 times an empty launch for 128x3x32x32;
compaction is no slower than CUB's DeviceSelect, and 3 times as fast as torch.nonzero until the host knows the count.

Every time is the median over rounds in which all competitors take turns, with what lies between the fastest and the
slowest round as a share of it (±). On a GPU each call is timed in three ways, on random inputs that rotate through
more memory than the L2 cache holds (or 32 sets of them: small ones stay in it, for all competitors alike):
    call   Triton's do_bench: events around one call, the L2 cache flushed before it, the host ahead of the device
    graph  calls one after another in a CUDA graph, per call: no gap between launches, no host
    host   until the call has returned to Python; the device may still be at work
compact_to_host, and everything on a CPU, is timed by the host's clock until the result is there. GB/s counts each input
read once and each output written once, over the graph's time where there is one. Before it is timed, each competitor
is compared with plain torch; a wrong result gets no time, and one of ours ends the script with 1.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import math
import os
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from kernels import cases as k
from kernels import cub
from kernels.table import goal_lines, goals, table, unsteady
from readme import argument_types as kinds
from readme.machine import machine
from readme.output import write_json

from ham_kernels import ops
from ham_kernels.common import provenance
from ham_kernels.engine import keep_freed_memory
from ham_kernels.ops._library import TRITON

CPU_CACHE = 32 * 2**20  # bytes; a guess, since torch does not know it
Calls = list[Callable[[], object]]  # the same call, on each of the sets
Columns = dict[str, Callable[[], float]]


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ops", nargs="+", metavar="OP", help=f"which to time (default all: {', '.join(k.OPS)})")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    p.add_argument("--quick", action="store_true", help="fewer sizes and shorter rounds")
    p.add_argument("--rounds", type=int, metavar="N", help="(default 5, with --quick 3)")
    p.add_argument("--minutes", type=float, default=3.0, metavar="M", help="no case starts after M (default 3)")
    p.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    p.add_argument("--out", type=kinds.folder, default=Path("runs"), help="folder for the JSON (default runs)")
    p.add_argument("--check", action="store_true", help="exit 1 when a goal is missed")
    args = p.parse_args()
    args.ops = args.ops or list(k.OPS)
    args.rounds = (3 if args.quick else 5) if args.rounds is None else args.rounds
    if unknown := [name for name in args.ops if name not in k.OPS]:
        p.error(f"--ops: got {', '.join(unknown)}; there are {', '.join(k.OPS)}")
    if args.rounds < 1:
        p.error(f"--rounds: got {args.rounds}; it must be at least 1")
    if not args.minutes > 0:
        p.error(f"--minutes: got {args.minutes}; it must be more than 0")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda" and (problem := cuda_problem()):
        p.error(f"--device: got cuda; {problem}")
    return args


def cuda_problem() -> str | None:
    """Why nothing can be timed on a GPU here, or None."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device here"
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        return "TRITON_INTERPRET is set, and interpreted kernels have no speed"
    return None if TRITON[0] else TRITON[1]


# ---------------------------------------------------------------- clocks: µs per call, a function for each kind of time
SLEEP = 300_000  # cycles, some 0.15 ms: more than the host takes for a call


class CpuClock:
    """Bursts of calls of about `ms`."""

    cache, most_sets = CPU_CACHE, 8

    def __init__(self, ms: float):
        keep_freed_memory()  # as in training: else every large result costs fresh pages, or not, as glibc decides
        self.ms = ms

    def columns(self, calls: Calls, to_host: bool) -> tuple[Columns, str | None]:
        estimate = min(_burst(calls, 1) for _ in range(3))
        return {"call": partial(_burst, calls, max(1, min(1000, round(self.ms * 1e3 / estimate))))}, None


def _burst(calls: Calls, repeats: int) -> float:
    start = time.perf_counter()
    for i in range(repeats):
        calls[i % len(calls)]()
    return (time.perf_counter() - start) / repeats * 1e6


class _Sleeper:
    """Stands for a tensor whose gradient do_bench forgets before each call: the device then sleeps, so that a call that
    takes the host long is in its queue when the clock starts, and the time is the device's."""

    def __setattr__(self, name: str, value: None) -> None:
        torch.cuda._sleep(SLEEP)


class CudaClock:
    """Triton's do_bench, replays of CUDA graphs, and the host's clock, each for about `ms`."""

    most_sets = 32

    def __init__(self, ms: float):
        from triton.testing import do_bench

        self.ms, self._do_bench = ms, do_bench
        self.cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size

    def columns(self, calls: Calls, to_host: bool) -> tuple[Columns, str | None]:
        """The kinds of time that these calls have, and why there is no graph where one failed."""
        if to_host:
            return {"call": lambda: self._from_idle(calls, 50)}, None
        few = max(1, min(16, int(self.ms * 1e3 / self._from_idle(calls, 1))))  # a long queue would make the host wait
        columns = {"call": lambda: self._call(calls), "host": lambda: self._from_idle(calls, few)}
        if self._waits(calls[0]):
            return columns, None
        before = torch.cuda.current_stream()
        try:
            return columns | {"graph": self._graph(calls)}, None
        except RuntimeError as error:
            torch.cuda.set_stream(before)  # a capture that fails leaves its own stream as the current one
            return columns, f"no graph: {_first_line(error)}"

    def _from_idle(self, calls: Calls, repeats: int) -> float:
        torch.cuda.synchronize()
        return _burst(calls, repeats)

    def _call(self, calls: Calls) -> float:
        turn = itertools.cycle(calls)
        return 1e3 * self._do_bench(
            lambda: next(turn)(), warmup=1, rep=self.ms, grad_to_none=[_Sleeper()], return_mode="median"
        )

    def _waits(self, call: Callable) -> bool:
        """Whether the host waits for the device inside the call: no graph can hold such a call."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the mode calls itself a prototype
                torch.cuda.set_sync_debug_mode("error")
            call()
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            return True
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return False

    def _graph(self, calls: Calls) -> Callable[[], float]:
        """A graph of whole turns through the inputs: for about `ms`, and at most 200 calls or one turn."""

        def turn() -> None:
            # results stay until the end: one memory for all of them would not leave the cache
            kept = [call() for call in calls]
            del kept

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            turn()  # what a first call on a stream sets up must not be captured
            turn_us = self._between_events(turn)
        torch.cuda.current_stream().wait_stream(side)
        turns = max(1, min(200 // len(calls), int(self.ms * 1e3 / max(turn_us, 1.0))))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(turns):
                turn()

        def replay() -> float:
            graph.replay()  # not timed: the caches shall hold what this competitor leaves there
            return self._between_events(graph.replay) / (turns * len(calls))

        return replay

    @staticmethod
    def _between_events(work: Callable[[], None]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3


# ---------------------------------------------------------------- measuring
def measure(case: k.Case, device: torch.device, clock, rounds: int, compiled: bool) -> dict:
    """The case's row: "times" {who: {column: summary}}, "notes" {who: what is amiss}, "error" if ours has no time."""
    row = empty_row(case)
    try:
        sets = max(2, min(clock.most_sets, math.ceil(3 * clock.cache / case.traffic)))
        inputs = [case.inputs(torch.Generator(device).manual_seed(seed)) for seed in range(sets)]
        clocks = _ready(case, inputs, clock, compiled, row["notes"])
        row["times"] = _alternating(clocks, rounds)
    except Exception as error:  # the other cases are still worth their time
        row["error"] = _first_line(error)
    return row


def _ready(case: k.Case, inputs: list, clock, compiled: bool, notes: dict[str, str]) -> dict[str, Columns]:
    """The clocks of those competitors that run here and give the right result; what is amiss goes to `notes`."""
    competitors = dict(case.competitors)
    if compiled and case.headline and case.compiled is not None:
        competitors[k.COMPILED] = None
    clocks: dict[str, Columns] = {}
    for who, competitor in competitors.items():
        try:
            if who == k.COMPILED:
                torch.compiler.reset()  # each case has its own shapes, and the number of recompilations is limited
                competitor = case.compiled()
            case.check(who, competitor, inputs[0])
            calls = [partial(competitor, i) for i in inputs]
            for call in calls:
                call()
            clocks[who], note = clock.columns(calls, case.to_host)
        except Exception as error:
            if who in (k.OURS, k.DISPATCHED, k.EAGER) or not clocks:
                raise
            note = f"not timed, {_first_line(error)}"
        if note is not None:
            notes[who] = note
    return clocks


def _alternating(clocks: dict[str, Columns], rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    samples = {who: {column: [] for column in columns} for who, columns in clocks.items()}
    names = list(clocks)
    for r in range(rounds):
        for who in names[r % len(names) :] + names[: r % len(names)]:
            for column, once in clocks[who].items():
                samples[who][column].append(once())
    return {who: {column: _summary(v) for column, v in columns.items()} for who, columns in samples.items()}


def empty_row(case: k.Case, skipped: str | None = None) -> dict:
    known = {key: getattr(case, key) for key in ("op", "name", "traffic", "to_host", "headline")}
    return known | {"times": {}, "notes": {}, "error": None, "skipped": skipped}


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"


def _summary(v: list[float]) -> dict[str, float]:
    return {"median": statistics.median(v), "lowest": min(v), "highest": max(v)}


# ---------------------------------------------------------------- the script
def main() -> int:
    args = parse()
    logging.getLogger("torch").setLevel(logging.ERROR)  # torch.compile warns of what it does not fuse
    start = time.perf_counter()
    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device("cpu")
    ms = 2.0 if args.quick else 5.0
    clock = CudaClock(ms) if args.device == "cuda" else CpuClock(ms * 2)
    about = machine()
    found = provenance.versions("triton")
    about |= {"triton": found["triton"], "cuda": str(torch.version.cuda)}
    print("; ".join(f"{key} {value}" for key, value in about.items()))
    about["commit"] = provenance.commit()
    settings = {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()}
    backends = {op: kinds[args.device] for op, kinds in ops.backends().items()}
    result = {"machine": about, "device": args.device, "settings": settings, "backends": backends, "cases": []}
    print("; ".join(f"{op}: {backend}" for op, (backend, _) in backends.items()))
    print(f"medians of {args.rounds} rounds, ± the slowest minus the fastest of them; --help says more")
    if args.device == "cpu":
        print("no GPU: plain torch runs the ops, so ours differs from eager torch only in what a call costs")
    slug = re.sub(r"[^a-z0-9]+", "-", about["gpu"].lower()).strip("-") if args.device == "cuda" else "cpu"
    path = args.out / f"kernels_{slug}.json"
    chosen = [case for case in k.cases(args.device, args.quick) if case.op in ("copy", *args.ops)]
    for op, group in itertools.groupby(chosen, lambda case: case.op):
        for case in group:
            if time.perf_counter() - start > args.minutes * 60 and op != "copy":
                row = empty_row(case, f"not run, {args.minutes:g} minutes were over (--minutes)")
            else:
                row = measure(case, device, clock, args.rounds, not args.no_compile)
            result["cases"].append(row)
        print(f"\n{table(result, op)}", flush=True)
        result |= {"goals": goals(result), "seconds": time.perf_counter() - start}
        write_json(path, result)  # after each op: a run that is stopped keeps what it has
    print(f"\n{unsteady(result)}", *(f"goal: {line}" for line in goal_lines(result)), sep="\n")
    print(f"written: {path} ({result['seconds']:.0f} s)")
    errors = [f"{row['op']} {row['name']}: {row['error']}" for row in result["cases"] if row["error"]]
    missed = args.check and any(g["state"] == "missed" for g in result["goals"])
    for problem in [*errors, *["--check: a goal is missed"] * missed]:
        print(problem, file=sys.stderr)
    return 1 if errors or missed else 0


# ---------------------------------------------------------------- under pytest-benchmark
def pytest_generate_tests(metafunc) -> None:
    found = list(k.cases("cuda" if torch.cuda.is_available() else "cpu", quick=True))
    pairs = [(case, who) for case in found for who in case.competitors]
    metafunc.parametrize(("case", "who"), pairs, ids=[f"{case.op}-{case.name}-{who}" for case, who in pairs])


def test_kernel(request, case: k.Case, who: str) -> None:
    """One competitor of one case; compare within a group. torch.compile is left to the script."""
    import pytest

    if not request.config.pluginmanager.hasplugin("benchmark"):
        pytest.skip("needs pytest-benchmark: pip install pytest-benchmark")
    benchmark = request.getfixturevalue("benchmark")
    benchmark.group = f"{case.op} {case.name}"
    on_gpu = torch.cuda.is_available()
    inputs = case.inputs(torch.Generator("cuda" if on_gpu else "cpu").manual_seed(0))
    try:
        case.check(who, case.competitors[who], inputs)
    except cub.Unavailable as error:
        pytest.skip(str(error))

    def call() -> None:
        case.competitors[who](inputs)
        if on_gpu:
            torch.cuda.synchronize()

    benchmark.pedantic(call, rounds=20, warmup_rounds=3)


if __name__ == "__main__":
    sys.exit(main())
