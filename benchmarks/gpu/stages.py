"""Stages of gpu_suite.py: what each runs, and what of it goes into its JSON. Those of the CIFAR runs: runs.py."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from gpu import pytest_runs as gpu_pytest
from gpu.process import Failed, Shell

BENCHMARKS = Path(__file__).resolve().parents[1]
ROOT = BENCHMARKS.parent
HELD = {True: "held", False: "missed", None: "not measured"}


@dataclass(frozen=True)
class Options:
    """What the caller chose."""

    out: Path
    data: Path | None = None
    smoke: bool = False
    seeds: tuple[int, ...] = (0, 1)
    epochs: int = 30
    engine: str = "bf16"
    autoattack_images: int = 1000  # 0: all
    arms: tuple[str, ...] | None = None  # None: all
    commit: str | None = None  # where there is no git to ask

    def partial(self, stage: str) -> Path:
        """Where a stage keeps what it has before it is done."""
        return self.out / "stages" / f"{stage}.partial.jsonl"


@dataclass(frozen=True)
class Stage:
    """`work` returns the result: "line" in words, "goals", and whatever else is worth keeping."""

    name: str
    least: float  # seconds without which it does not start
    work: Callable[[Shell], dict[str, Any]]
    after: tuple[str, ...] = ()  # stages that must be done
    behind: tuple[str, ...] = ()  # stages of which one must have ended, well or badly
    limit: float = 3600.0  # seconds after which it has failed
    stamp: Callable[[], Any] | None = None  # what its result belongs to; another one makes it anew
    always: bool = False  # in every call
    gate: bool = False  # where it fails, no other runs
    final: bool = False  # may use the time kept for the end


def goal(what: str, held: bool | None, measured: str) -> dict[str, str]:
    return {"goal": what, "measured": measured, "state": HELD[held]}


# ---------------------------------------------------------------- the machine
FACTS = """
import json, torch
import ham_kernels.commands.train, ham_kernels.report  # what they need is missing here, or in every later stage
from ham_kernels.commands import doctor
from ham_kernels.common import provenance
print(json.dumps({"machine": provenance.machine(),
                  "versions": provenance.versions("triton", "torchattacks", "pyautoattack"),
                  "commit": provenance.commit(), "cuda": torch.version.cuda, "gpu": torch.cuda.is_available(),
                  "doctor": doctor.collect()}))
"""


def build(o: Options, shell: Shell) -> dict:
    """In place, where csrc has changed since the last build or there is none. Never imports the package."""
    spec = importlib.util.spec_from_file_location("_ham_build", ROOT / "ham_kernels" / "ops" / "native" / "cuda.py")
    builder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(builder)
    package = ROOT / "ham_kernels"

    def problem() -> str | None:
        if found := builder.library_problem(package):
            return found
        info = json.loads((package / builder.BUILD_INFO).read_text())
        return None if info.get("csrc_sha256") == builder.csrc_hash(ROOT) else "csrc has changed since the build"

    before = problem()
    if before is None or o.smoke:
        return {"line": "the extension is there and current" if before is None else f"left alone: {before}"}
    commands = {
        "pip install": [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", str(ROOT)],
        "ham build": [sys.executable, "-m", "ham_kernels", "build"],  # where pip or setuptools are too old
    }
    for name, command in commands.items():
        (status,) = shell.run(command)
        if status == 0 and problem() is None:
            return {"line": f"built by {name}"}
    raise Failed(f"no extension: {problem()}; {shell.last_line()}")


def not_installed(extras: Sequence[str] = ()) -> list[str]:
    """What pyproject.toml asks for and is not here, of the package itself or of these extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [r for extra in extras for r in project["optional-dependencies"][extra]] or project["dependencies"]
    names = [re.split(r"[^\w.-]", r)[0] for r in wanted if "python_version" not in r]
    return [name for name in names if not any(True for _ in metadata.Distribution.discover(name=name))]


def environment(o: Options, shell: Shell) -> dict:
    if missing := not_installed():
        raise Failed(
            f"not installed: {', '.join(missing)}; without a network, bring them: `pip install --target DIR ...` where "
            "there is one, and PYTHONPATH=DIR here"
        )
    idle = not_installed(["torchattacks", "autoattack"])
    status, text = shell.output([sys.executable, "-c", FACTS])
    if status:
        raise Failed(f"the package cannot be imported: {shell.last_line()}")
    facts = json.loads(text)
    if not facts["gpu"] and not o.smoke:
        raise Failed("torch sees no GPU here; --smoke is for machines without one")
    facts["commit"] = o.commit or facts["commit"]
    doctor = facts.pop("doctor")
    loaded, reason = doctor["extension"]["loaded"], doctor["extension"]["reason"]
    held = loaded and doctor["ok"] if facts["gpu"] else None
    backends = {op: row["cuda"]["backend"] for op, row in doctor["backends"].items()}
    return {
        "line": f"{facts['machine']['gpu']}; torch {facts['versions']['torch']}; extension: {reason}"
        + (f"; not installed, so that nothing is measured by them: {', '.join(idle)}" if idle else ""),
        "facts": facts, "gpus": doctor["gpus"], "driver": doctor["versions"]["driver"], "backends": backends,
        "goals": [goal("doctor: the CUDA extension is loaded", held, reason)],
    }  # fmt: skip


# ---------------------------------------------------------------- tests
ROUNDS = 30  # processes: one more after each that a test took along
PATIENCE = 200.0  # seconds for one GPU test, compilers included
CUT_OFF = "cut off"  # outcome of a test that the end of a slot has ended


def tests(o: Options, name: str, what: str, choice: list[str], env: dict[str, str], parts: int, shell: Shell) -> dict:
    """Runs what has no outcome yet, in so many processes; a test that ends its own, or hangs, has failed, and the
    others go on."""
    outcomes, done = o.partial(name), shell.log.with_suffix(".done")
    for test in _under_way(outcomes):  # the last slot's end cut them off: no process of this one is to blame
        gpu_pytest.write(outcomes, test=test, outcome=CUT_OFF)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu.pytest_runs", "-p", "no:cacheprovider"]
    command += ["-o", "addopts=", "--continue-on-collection-errors", *choice]
    for _ in range(ROUNDS):
        before = _finished(outcomes)
        done.write_text("\n".join(before))
        told = {"HAM_SUITE_OUTCOMES": str(outcomes), "HAM_SUITE_DONE": str(done), "OMP_NUM_THREADS": "2"}
        each = [["env", f"HAM_SUITE_PART={i}/{parts}", *command] for i in range(parts)]
        statuses = shell.run(*each, ask=signal.SIGINT, env=told | env, cwd=ROOT)
        status = next((s for s in statuses if s not in (0, 1, 5)), max(statuses))
        died = _blame(outcomes, statuses)
        if (status in (0, 1, 5) and not died) or len(_finished(outcomes)) == len(before):
            break
    else:
        count = Counter(entry["outcome"] for entry in gpu_pytest.read(outcomes).values())
        raise Failed(f"tests ended {ROUNDS} processes; so far {dict(count)}, and --retry goes on")
    found = gpu_pytest.read(outcomes)
    if not found and status not in (0, 5):
        raise Failed(f"pytest ended with {status}: {shell.last_line()}")
    count = Counter(entry["outcome"] for entry in found.values())
    line = ", ".join(f"{count[word]} {word}" for word in ("passed", "failed", "skipped"))
    failures = [{"test": test, "text": e["text"]} for test, e in found.items() if e["outcome"] == "failed"]
    complete = status in (0, 1, 5)
    reasons = Counter(str(e.get("text"))[:120] for e in found.values() if e["outcome"] == "skipped")
    slowest = sorted(((e.get("seconds", 0.0), test) for test, e in found.items()), reverse=True)[:5]
    held = False if failures else True if complete and count["passed"] else None
    return {
        "line": line + ("" if complete else f"; pytest ended with {status}: {shell.last_line()}"),
        "counts": dict(count), "failures": failures[:60], "skipped": reasons.most_common(12),
        "slowest": [{"test": test, "seconds": round(s, 1)} for s, test in slowest], "goals": [goal(what, held, line)],
    }  # fmt: skip


def _finished(outcomes: Path) -> list[str]:
    return [test for test, entry in gpu_pytest.read(outcomes).items() if entry["outcome"] not in ("started", CUT_OFF)]


def _under_way(outcomes: Path) -> dict[str, int]:
    """{test: the part that began it}"""
    return {test: e["part"] for test, e in gpu_pytest.read(outcomes).items() if e["outcome"] == "started"}


def _blame(outcomes: Path, statuses: list[int]) -> bool:
    """Those tests that were under way when their processes ended. Returns: whether there was one."""
    found = _under_way(outcomes)
    for test, part in found.items():
        status = statuses[part]
        how = f"died of {signal.Signals(-status).name}" if status < 0 else f"ended with {status}"
        gpu_pytest.write(outcomes, test=test, outcome="failed", text=f"the process {how}; see the log")
    return bool(found)


# ---------------------------------------------------------------- compute-sanitizer
def sanitizer(o: Options, tool: str, shell: Shell) -> dict:
    what = f"compute-sanitizer {tool}: no error in the CUDA extension"
    program, why = _sanitizer(), None
    if o.smoke:
        why = "no GPU"
    elif program is None:
        why = "compute-sanitizer is not installed"
    if why:
        return {"line": f"not measured: {why}", "goals": [goal(what, None, why)]}
    command = [program, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
    command += ["--report-api-errors", "no"] if tool == "memcheck" else []  # torch asks what may be refused
    shell.log.unlink(missing_ok=True)
    # without torch's cache each tensor is an allocation of its own, so that its end is seen
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    (status,) = shell.run([*command, sys.executable, "-m", "gpu.sanitize"], env=alone)
    lines = shell.log.read_text(errors="replace").splitlines()
    summary = next((line for line in reversed(lines) if "SUMMARY" in line), "").strip("= ")
    told = [line for line in lines if line.startswith("=========")]
    refused = next((line.strip("= ") for line in told if "not supported" in line), None)
    if refused and not re.search(r"[1-9]\d* (error|hazard)", summary):
        return {"line": f"not measured: {refused}", "goals": [goal(what, None, refused)]}
    if status == 9:
        return {"line": summary, "errors": told[:40], "goals": [goal(what, False, summary)]}
    if status or not summary:
        raise Failed(f"{tool} ended with {status}: {shell.last_line()}")
    calls = next((line for line in lines if line.startswith("compact:")), "")
    return {"line": summary, "goals": [goal(what, True, f"{summary}; {calls}")]}


def _sanitizer() -> str | None:
    places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    path = os.pathsep.join([os.environ.get("PATH", ""), *(f"{place}/bin" for place in places if place)])
    return shutil.which("compute-sanitizer", path=path)


# ---------------------------------------------------------------- benchmarks
def benchmark(o: Options, script: str, flags: list[str], shell: Shell) -> dict:
    """A script of this folder that writes a JSON with its goals. With --check its status 1 may only say that one is
    missed; any other has failed, with the goals that it had written."""
    if not (BENCHMARKS / script).exists():
        raise Failed(f"{script} is not in this checkout")
    folder = o.out / "bench" / script.removesuffix(".py")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (status,) = shell.run([sys.executable, str(BENCHMARKS / script), "--out", str(folder), *flags])
    files = sorted(folder.glob("*.json"))
    if not files:
        raise Failed(f"{script} ended with {status}: {shell.last_line()}")
    goals = [g for file in files for g in goals_of(json.loads(file.read_text()))]
    count = Counter(g["state"] for g in goals)
    line = ", ".join(f"{count[word]} {word}" for word in HELD.values() if count[word]) or "no goals"
    ended = f"ended with {status}: {shell.last_line()}" if status else ""
    bad = {"state": "failed", "reason": ended} if status not in ((0, 1) if "--check" in flags else (0,)) else {}
    return bad | {
        "line": line + (f"; {ended}" if ended else ""),
        "status": status, "files": [str(file.relative_to(o.out)) for file in files], "goals": goals,
    }  # fmt: skip


def goals_of(result: dict) -> Iterator[dict]:
    """The goals of a benchmark's JSON, however it spells them."""
    for entry in result.get("goals", []):
        known = entry["state"] in ("held", "missed")
        measured = entry.get("measured") if known else entry.get("why") or entry.get("measured")
        yield {
            "goal": entry["goal"], "measured": str(measured or ""), "state": entry["state"] if known else HELD[None],
        }  # fmt: skip
    verdicts = result.get("verdicts", [])
    if "verdict" in result:  # of bench_input: two numbers
        v = result["verdict"]
        rates = {"goal": f"{v['goal']:,} images/s from memory", "measured": f"{v['measured']:,.0f} images/s"}
        verdicts = [*verdicts, {**v, **rates}]
    for entry in verdicts:
        yield goal(entry["goal"], entry["held"], str(entry["measured"]))


# ---------------------------------------------------------------- all but the CIFAR runs
def stages(o: Options) -> list[Stage]:
    parts = 2 if o.smoke else max(1, min(8, (os.cpu_count() or 1) // 2))
    choice = [*_few(o), "-p", "no:xdist", "-m", "gpu and not thorough"]  # each process sees when its CUDA is lost
    patient = {"HAM_SUITE_PATIENCE": str(PATIENCE)}
    gpu_tests = partial(tests, o, "tests-gpu", "the GPU tests pass", choice, patient, parts)
    kernels = ["--minutes", "3"]
    training = ["--minutes", "3.5", "--models", "preact_resnet18"]  # the other has no goal on a GPU
    images = ["--check", "--files", "200", "--workers", "0", "8"]
    run = ["--check", "--steps", "10", "--repetitions", "3"]
    if o.smoke:
        tiny = ["--device", "cpu"]
        kernels = [*tiny, "--quick", "--rounds", "1", "--no-compile", "--ops", "step_size_weights", "--minutes", "0.1"]
        training = [*tiny, "--quick", "--rounds", "1", "--batch-sizes", "8", "--arms", "reference", "--minutes", "0.2"]
        images = [*tiny, "--images", "256", "--files", "0", "--repetitions", "2"]
        run = [*tiny, "--model", "small_cnn", "--batch-size", "4", "--repetitions", "1"]
    short = 0.0 if o.smoke else 1.0  # nothing is too short for tiny sizes
    return [
        Stage("build", 5 * short, partial(build, o), always=True, limit=240),
        Stage("environment", 5 * short, partial(environment, o), always=True, gate=True, limit=200),
        Stage("tests-gpu", 30 * short, gpu_tests),
        Stage("bench-training", 330 * short, partial(benchmark, o, "bench_training.py", training), limit=420),
        Stage("bench-kernels", 240 * short, partial(benchmark, o, "bench_kernels.py", kernels), limit=330),
        Stage("memcheck", 40 * short, partial(sanitizer, o, "memcheck"), limit=120),
        Stage("racecheck", 40 * short, partial(sanitizer, o, "racecheck"), limit=120),
        Stage("bench-input", 20 * short, partial(benchmark, o, "bench_input.py", images), limit=120),
        Stage("bench-run", 30 * short, partial(benchmark, o, "bench_run.py", run), limit=120),
    ]


def last_stages(o: Options) -> list[Stage]:
    """Behind what only a GPU can tell: the tests that need none, as on a machine without one."""
    workers = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    rest = [*_few(o), "-m", "not gpu and not thorough", *workers]
    work = partial(tests, o, "tests-rest", "the other tests pass", rest, {"CUDA_VISIBLE_DEVICES": ""}, 1)
    return [Stage("tests-rest", 0.0 if o.smoke else 30.0, work)]


def _few(o: Options) -> list[str]:
    return ["tests/test_ops_library.py", "-k", "sampled or (opcheck and cuda)"] if o.smoke else ["tests"]
