"""The kernel benchmark: its cases, clocks, verdicts and tables, all that shows without a GPU, and a run on one."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ham_kernels.ops.native import cuda

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_kernels as bench  # noqa: E402
from kernels import cases as k  # noqa: E402
from kernels import cub  # noqa: E402
from kernels import table as shown  # noqa: E402

pytestmark = pytest.mark.slow
TINY = {"images": [(4, 8), (6, 8)], "logits": [(8, 10), (9, 10)], "rows": [16, 40], "copy": [2**20]}
SHORT = ["--device", "cpu", "--rounds", "2", "--no-compile"]


@pytest.fixture
def tiny(monkeypatch):
    """Cases that take microseconds, and short rounds."""
    for device in ("cpu", "cuda"):
        monkeypatch.setitem(k.SIZES, device, TINY)
    monkeypatch.setattr(bench, "CpuClock", lambda _, clock=bench.CpuClock: clock(0.05))


def run(monkeypatch, *args) -> int:
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py", *map(str, args)])
    return bench.main()


# ---------------------------------------------------------------- the script
def test_a_run_on_the_cpu_times_everything_and_claims_no_goal(tiny, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, *SHORT, "--check", "--out", tmp_path / "new") == 0
    out = capsys.readouterr().out
    assert out.count("not measured: needs a GPU") == 4
    assert ": held" not in out
    assert ": missed" not in out
    result = json.loads((tmp_path / "new" / "kernels_cpu.json").read_text())
    assert {row["op"] for row in result["cases"]} == {"copy", *k.OPS}
    for row in result["cases"]:
        assert row["error"] is None
        assert set(row["times"]) >= ({k.COPY} if row["op"] == "copy" else {k.OURS, k.DISPATCHED, k.EAGER})
        for columns in row["times"].values():
            assert 0 < columns["call"]["lowest"] <= columns["call"]["median"] <= columns["call"]["highest"]
    for name in ("torch", "triton", "commit", "cpu", "date"):
        assert result["machine"][name]
    assert result["backends"]["compact"][0] == "torch"
    section = shown.readme_section(result)
    assert "no GPU: plain torch runs the ops" in section
    assert "`compact` 40 |" in section


def test_what_cannot_be_compiled_is_said_and_left_out(tiny, tmp_path, monkeypatch, capsys):
    def broken(*_, **__):
        raise RuntimeError("no compiler here\nand more")

    monkeypatch.setattr(torch, "compile", broken)
    args = ["--device", "cpu", "--rounds", "1", "--ops", "compact", "--out", tmp_path]
    assert run(monkeypatch, *args) == 0
    assert "16: torch.compile: not timed, RuntimeError: no compiler here\n" in capsys.readouterr().out


def test_torch_compile_runs_along(tiny, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda fn, **_: lambda *args: fn(*args))
    for case in k.cases("cpu", False):
        row = bench.measure(case, torch.device("cpu"), bench.CpuClock(0), 1, compiled=True)
        assert (k.COMPILED in row["times"]) == (case.headline and case.compiled is not None), row


def test_a_wrong_result_of_ours_gets_no_time_and_exit_code_1(tiny, tmp_path, monkeypatch, capsys):
    right = k.ops.compact
    monkeypatch.setattr(k.ops, "compact", lambda flags: (right(flags)[0].flip(0), right(flags)[1]))
    assert run(monkeypatch, *SHORT, "--ops", "compact", "step_size_weights", "--out", tmp_path) == 1
    assert "compact 16: WrongResult: ours: Tensor-likes are not equal" in capsys.readouterr().err
    result = json.loads((tmp_path / "kernels_cpu.json").read_text())
    assert all((row["times"] == {}) == (row["op"] == "compact") for row in result["cases"])
    assert "`compact`" not in shown.readme_section(result)


def test_a_wrong_competitor_is_not_timed(tiny):
    case = k.compact(40, False)
    case = replace(case, competitors=case.competitors | {k.NONZERO: lambda i: torch.nonzero(~i["flags"])})
    row = bench.measure(case, torch.device("cpu"), bench.CpuClock(0), 1, compiled=False)
    assert row["error"] is None
    assert set(row["times"]) == {*case.competitors} - {k.NONZERO}
    assert row["notes"][k.NONZERO].startswith("not timed, WrongResult: torch.nonzero:")


def test_time_that_is_over_is_said(tiny, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, *SHORT, "--ops", "compact", "--minutes", "1e-9", "--out", tmp_path) == 0
    assert "40: not run, 1e-09 minutes were over (--minutes)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--ops", "pgd_step", "softmax"], "--ops: got softmax; there are pgd_step, compact, "),
        (["--rounds", "0"], "--rounds: got 0; it must be at least 1"),
        (["--minutes", "0"], "--minutes: got 0.0; it must be more than 0"),
        (["--out", __file__], f"--out: got {__file__}; {__file__} is not a folder that can be written"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_measured(args, message, monkeypatch, capsys):
    monkeypatch.setattr(bench, "measure", None)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "--device", "cpu", *args)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, "--device", "cuda")
    assert "--device: got cuda; torch sees no CUDA device here" in capsys.readouterr().err


@pytest.mark.gpu
def test_a_run_on_the_gpu(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "CudaClock", lambda _, clock=bench.CudaClock: clock(0.5))
    assert run(monkeypatch, "--device", "cuda", "--rounds", "2", "--no-compile", "--out", tmp_path) == 0
    result = json.loads(next(tmp_path.glob("kernels_*.json")).read_text())
    for row in result["cases"]:
        assert {who: note for who, note in row["notes"].items() if who != k.CUB or cuda.find_nvcc()} == {}
        if not row["to_host"]:
            assert {"call", "graph", "host"} <= set(row["times"][k.COPY if row["op"] == "copy" else k.OURS])
    for row in (row for row in result["cases"] if row["op"] == "compact"):
        assert "graph" not in row["times"][k.NONZERO]  # it waits for the device, and must not end up in a graph


# ---------------------------------------------------------------- cases
def nbytes(tensors) -> int:
    return sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))


def test_traffic_is_every_input_read_and_every_output_written_once(tiny):
    for case in k.cases("cpu", False):
        inputs = case.inputs(torch.Generator().manual_seed(0))
        if case.op == "copy":
            assert case.traffic == nbytes(inputs.values())
        elif not case.to_host and "half the rows" not in case.name:
            result = case.competitors[k.OURS](inputs)
            results = result if isinstance(result, tuple) else (result,)
            moved = nbytes(results) + nbytes(t for name, t in inputs.items() if name not in ("to", "from"))
            assert case.traffic == moved, (case.op, case.name)
    whole, half = k.pgd_step(4, 8), k.pgd_step(4, 8, indexed=True)
    assert half.traffic == whole.traffic // 2 + 2 * 4  # two active rows, each named by an int32


def test_cases_for_a_gpu_have_what_the_goals_need():
    for quick in (False, True):
        found = list(k.cases("cuda", quick))
        assert len({(case.op, case.name) for case in found}) == len(found)
        assert found[0].op == "copy"
        steps = [case for case in found if case.op == "pgd_step"]
        assert [case.name for case in steps if k.EMPTY in case.competitors] == ["linf fp32 128x3x32x32"]
        assert {case.name for case in steps if case.traffic >= shown.RATE_FROM} >= {
            "linf fp32 1536x3x32x32",
            "linf fp32 256x3x224x224",
            "linf bf16 256x3x224x224",
        }
        assert all(k.COPY in case.competitors for case in steps)
        for op in ("compact", "compact_to_host"):
            rows = [case for case in found if case.op == op]
            assert [rows[0].name, rows[-1].name] == ["128", "65536"]
            assert all({k.OURS, k.CUB, k.NONZERO} <= set(case.competitors) for case in rows)


def test_inputs_are_random_fresh_and_as_the_names_say():
    case = k.pgd_step(8, 4, dtype="bf16", channels_last=True, indexed=True)
    first, second = (case.inputs(torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert first["x"].dtype == torch.bfloat16
    assert first["grad"].is_contiguous(memory_format=torch.channels_last)
    assert sorted(first["index"].tolist()) == list(range(8))
    assert first["count"].tolist() == [4]
    assert not torch.equal(first["grad"], second["grad"])
    assert (first["grad"] != 0).all()


def test_the_empty_kernel_launches(device):
    pytest.importorskip("triton")
    x = torch.rand(4, device=device)
    before = x.clone()
    k.empty_launch({"x": x})
    assert torch.equal(x, before)


# ---------------------------------------------------------------- the GPU's clock, on a device that only counts
class CountingGPU:
    """Device time is the sum of what was launched, in µs; a graph replays what was launched into it."""

    def __init__(self, monkeypatch):
        self.now, self.mode, self.capture, self.current = 0.0, "default", None, "main"
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = gpu.now

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return (end.at - self.at) / 1e3

        class Graph(list):
            def replay(self):
                gpu.now += sum(self)

        @contextmanager
        def stream(new):
            before, gpu.current = gpu.current, new
            yield
            gpu.current = before

        @contextmanager
        def graph(captured):
            gpu.current, gpu.capture = "capture", captured  # torch's own leaves the stream so when a capture fails
            try:
                yield
            finally:
                gpu.capture = None
            gpu.current = "main"

        def do_bench(fn, warmup, rep, grad_to_none, return_mode):
            for sleeper in grad_to_none:
                sleeper.grad = None
            assert gpu.slept >= 100_000
            start = gpu.now
            fn()
            return (gpu.now - start) / 1e3

        fakes = {
            "Event": Event, "CUDAGraph": Graph, "graph": graph, "stream": stream, "synchronize": lambda: None,
            "Stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
            "current_stream": lambda: SimpleNamespace(name=gpu.current, wait_stream=lambda other: None),
            "_sleep": lambda cycles: setattr(gpu, "slept", cycles),
            "set_stream": lambda s: setattr(gpu, "current", s.name), "current_device": lambda: 0,
            "set_sync_debug_mode": lambda mode: setattr(gpu, "mode", mode),
            "get_device_properties": lambda _: SimpleNamespace(L2_cache_size=2**20),
        }  # fmt: skip
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(pytest.importorskip("triton").testing, "do_bench", do_bench)

    def launch(self, us: float, waits: bool = False, captures: bool = True) -> None:
        if waits and self.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        if self.capture is None:
            self.now += us
        elif captures:
            self.capture.append(us)
        else:
            raise RuntimeError("operation not permitted when stream is capturing")


@pytest.mark.parametrize(("us", "turns"), [(2.0, 40), (1000.0, 1)])
def test_call_graph_and_host_time_the_same_work(us, turns, monkeypatch):
    gpu = CountingGPU(monkeypatch)
    clock = bench.CudaClock(5.0)
    calls = [lambda i=i: gpu.launch(us + i) for i in range(5)]  # five sets, each a little slower
    columns, note = clock.columns(calls, to_host=False)
    assert note is None
    assert set(columns) == {"call", "graph", "host"}
    assert columns["graph"]() == pytest.approx(us + 2)  # the mean over whole turns
    assert columns["call"]() == pytest.approx(us)
    before = gpu.now
    columns["graph"]()
    assert (gpu.now - before) / (5 * (us + 2)) == pytest.approx(2 * turns)  # one replay unwatched, one timed
    assert columns["host"]() > 0
    assert set(clock.columns(calls, to_host=True)[0]) == {"call"}


def test_a_call_that_waits_gets_no_graph(monkeypatch):
    gpu = CountingGPU(monkeypatch)
    columns, note = bench.CudaClock(5.0).columns([lambda: gpu.launch(2.0, waits=True)], to_host=False)
    assert set(columns) == {"call", "host"}
    assert note is None
    assert gpu.mode == "default"


def test_a_capture_that_fails_costs_the_graph_only(monkeypatch):
    gpu = CountingGPU(monkeypatch)
    columns, note = bench.CudaClock(5.0).columns([lambda: gpu.launch(2.0, captures=False)], to_host=False)
    assert set(columns) == {"call", "host"}
    assert note == "no graph: RuntimeError: operation not permitted when stream is capturing"
    assert gpu.current == "main"


def test_competitors_take_turns():
    order = []
    clocks = {who: {"call": lambda who=who: order.append(who) or float(len(order))} for who in "abc"}
    times = bench._alternating(clocks, 3)
    assert "".join(order) == "abcbcacab"
    assert times["a"]["call"] == {"median": 6.0, "lowest": 1.0, "highest": 8.0}


# ---------------------------------------------------------------- verdicts and tables, from known times
def case_row(op: str, name: str, traffic: int, to_host: bool = False, **us) -> dict:
    """us: competitor=(call, graph, host)."""
    times = {
        getattr(k, who): {
            column: {"median": v, "lowest": v, "highest": v * 1.1}
            for column, v in zip(("call", "graph", "host"), values, strict=False)
            if v
        }
        for who, values in us.items()
    }
    known = {"op": op, "name": name, "traffic": traffic, "to_host": to_host, "headline": True}
    return known | {"times": times, "notes": {}, "error": None, "skipped": None}


def gpu_result(step=18.8, first=5.9, cub=5.0, nonzero=45.1) -> dict:
    """A copy rate of 4 000 GB/s; with these times every goal is just held."""
    about = {"gpu": "NVIDIA H200", "cpu": "a CPU", "cores": "16", "python": "3.12", "torch": "2.11", "triton": "3.6"}
    rows = [
        case_row("copy", "1,908 MiB", 2_000_000_000, COPY=(510.0, 500.0, 5.0)),
        case_row("pgd_step", "linf fp32 128x3x32x32", 6_000_000, OURS=(first, 3.0, 30.0), EAGER=(40.0, 12.0, 50.0),
                 EMPTY=(4.0, 1.5, 10.0), COPY=(5.0, 2.5, 5.0)),
        case_row("pgd_step", "linf bf16 9x9", 64_000_000, OURS=(20.0, step, 30.0), COPY=(12.0, 16.0, 5.0)),
        case_row("pgd_step", "l2 fp32 9x9", 80_000_000, OURS=(99.0, 99.0, 30.0), COPY=(12.0, 11.0, 5.0)),
        case_row("compact", "128", 644, OURS=(4.0, 2.0, 9.0), CUB=(6.0, 4.0, 4.0), NONZERO=(50.0, None, 50.0)),
        case_row("compact", "65536", 327684, OURS=(5.0, 4.9, 9.0), CUB=(6.0, cub, 4.0), NONZERO=(50.0, None, 50.0)),
        case_row("compact_to_host", "128", 644, True, OURS=(15.0,), NONZERO=(nonzero,)),
    ]  # fmt: skip
    return {"machine": about | {"cuda": "13.0", "commit": "abc", "date": "2026-01-01"}, "device": "cuda", "cases": rows}


def states(result: dict) -> list[str]:
    return [goal["state"] for goal in shown.goals(result)]


def test_goals_are_judged_on_their_worst_case():
    assert states(gpu_result()) == ["held"] * 4
    changes = [{"step": 18.9}, {"first": 6.1}, {"cub": 4.8}, {"nonzero": 44.9}]
    for i, change in enumerate(changes):
        assert states(gpu_result(**change)) == ["missed" if i == j else "held" for j in range(4)], change
    rate, launch, cub, nonzero = (goal["measured"] for goal in shown.goals(gpu_result()))
    assert rate == "85.1%, 85.1% of the rate of a copy of its size (linf bf16 9x9, the worst of 1)"
    assert launch.startswith("1.48 × by do_bench (2.00 × in a graph, 3.00 × for the host)")
    assert cub == "0.83 × CUB's time by do_bench, 0.98 × in a graph (65536, the worst of 2)"
    assert nonzero == "3.01 × as fast (128, the worst of 1)"


def test_what_was_not_measured_is_never_held():
    result = gpu_result()
    del result["cases"][5]["times"][k.CUB]
    assert states(result)[2] == "not measured"  # one of two sizes
    assert "1 of 2 sizes not measured" in shown.goals(result)[2]["measured"]
    del result["cases"][4]["times"][k.CUB]
    result["cases"][4]["notes"][k.CUB] = "not timed, Unavailable: no nvcc"
    assert shown.goals(result)[2]["measured"] == "not timed, Unavailable: no nvcc"
    assert states(result | {"cases": result["cases"][:1]}) == ["not measured"] * 4
    assert states(gpu_result() | {"device": "cpu"}) == ["not measured"] * 4
    for column in ("call", "graph"):  # CUB must not win where only one kind of time is there
        result = gpu_result()
        del result["cases"][5]["times"][k.CUB][column]
        assert states(result)[2] == "not measured"


@pytest.mark.parametrize(("first", "code"), [(5.9, 0), (6.1, 1)])
def test_check_ends_with_1_when_a_goal_is_missed(first, code, tmp_path, monkeypatch, capsys):
    result = gpu_result(first=first)
    found = {(row["op"], row["name"]): row for row in result["cases"]}
    cases = [SimpleNamespace(op=op, name=name) for op, name in found]
    monkeypatch.setattr(k, "cases", lambda device, quick: iter(cases))
    monkeypatch.setattr(bench, "measure", lambda case, *_: found[case.op, case.name])
    monkeypatch.setattr(bench, "CudaClock", lambda ms: None)
    monkeypatch.setattr(bench, "cuda_problem", lambda: None)
    monkeypatch.setattr(bench, "machine", lambda: dict(result["machine"]))
    assert run(monkeypatch, "--device", "cuda", "--check", "--out", tmp_path) == code
    out, err = capsys.readouterr()
    assert ("--check: a goal is missed" in err) == bool(code)
    assert out.count(": held: ") == 4 - code
    assert json.loads((tmp_path / "kernels_nvidia-h200.json").read_text())["goals"][1]["state"] != "not measured"


def test_the_table_says_how_ours_compares():
    result = gpu_result()
    text = shown.table(result, "pgd_step")
    eager = next(line.split() for line in text.splitlines() if line.strip().startswith(k.EAGER))
    assert eager[-9:] == ["40.00", "10%", "12.00", "10%", "50.00", "10%", "500", "12.5%", "4.00"]  # 12 µs against 3
    empty = next(line.split() for line in text.splitlines() if line.strip().startswith(k.EMPTY))
    assert empty[-1] == "0.50"  # and no rate
    nonzero = next(line.split() for line in shown.table(result, "compact").splitlines() if k.NONZERO in line)
    assert nonzero[-1] == "12.50"  # 50 µs against 4 per call: it has no graph


def test_the_section_for_readme():
    result = gpu_result()
    result["goals"] = shown.goals(result)
    section = shown.readme_section(result)
    assert section.startswith("NVIDIA H200, cores: 16; Python 3.12, torch 2.11, Triton 3.6, CUDA 13.0; commit abc")
    assert "Copy rate 4,000 GB/s" in section
    assert "| `pgd_step` linf fp32 128x3x32x32 | 5.90 | 3.00 | 2,000 | 50.0% | 4.0× | - | - |" in section
    others = f"{k.CUB} 2.0×, {k.NONZERO} 12.5×"
    assert f"| `compact` 128 | 4.00 | 2.00 | 0.322 | 0.0% | - | - | {others} |" in section
    assert section.count("\n- ") == 4
    assert "- compact is no slower than CUB's DeviceSelect: held: 0.83 ×" in section


# ---------------------------------------------------------------- CUB
needs_nvcc = pytest.mark.skipif(cuda.find_nvcc() is None, reason="no nvcc to build CUB's DeviceSelect with")


@needs_nvcc
def test_cub_is_built_once_and_loads(tmp_path, monkeypatch):
    library = cub.build("sm_90", tmp_path / "cache")
    assert cub.load(library).cub_select.restype is ctypes.c_int
    assert [path.name for path in library.parent.iterdir()] == [library.name]
    monkeypatch.setattr(cub, "SOURCE", tmp_path / "cub_select.cu")
    (tmp_path / "cub_select.cu").write_text("this is no C++")
    with pytest.raises(cub.Unavailable, match=r"nvcc ended with code \d+: .*error"):
        cub.build("sm_90", library.parent)
    assert [path.name for path in library.parent.iterdir()] == [library.name]
    monkeypatch.undo()
    before = library.stat().st_mtime_ns
    assert cub.build("sm_90", library.parent).stat().st_mtime_ns == before


def test_why_there_is_no_cub(tmp_path, monkeypatch):
    (tmp_path / "no.so").write_text("")
    with pytest.raises(cub.Unavailable, match=r"no\.so does not load"):
        cub.load(tmp_path / "no.so")
    monkeypatch.setattr(cuda, "find_nvcc", lambda: None)
    with pytest.raises(cub.Unavailable, match="no nvcc"):
        cub.build("sm_90", tmp_path)


# ---------------------------------------------------------------- pytest-benchmark
def test_under_pytest_benchmark(tmp_path):
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "-q", str(ROOT / "benchmarks" / "bench_kernels.py")]
    command += ["-k", "step_size_weights-128", "-p", "no:cacheprovider", f"--benchmark-storage=file://{tmp_path}"]
    env = {k: v for k, v in os.environ.items() if k != "PYTEST_XDIST_WORKER"}  # with it nothing is timed
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "benchmark 'step_size_weights 128': 3 tests" in done.stdout


def test_without_pytest_benchmark_its_form_is_skipped_with_a_word():
    request = SimpleNamespace(config=SimpleNamespace(pluginmanager=SimpleNamespace(hasplugin=lambda name: False)))
    with pytest.raises(pytest.skip.Exception, match="pip install pytest-benchmark"):
        bench.test_kernel(request, k.step_size_weights(16), k.OURS)
