"""Stages of the GPU suite one by one: tests, sanitizer, build, benchmarks, runs; and the table made of them."""

from __future__ import annotations

import json
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_suite  # noqa: E402
from gpu import claims as gpu_claims  # noqa: E402
from gpu import runs as gpu_runs  # noqa: E402
from gpu import stages as gpu_stages  # noqa: E402
from gpu.process import Failed, Shell, Slot  # noqa: E402
from gpu.stages import Options, Stage  # noqa: E402

pytestmark = pytest.mark.slow


def fails(shell: Shell) -> dict:
    raise Failed("as it must")


# ---------------------------------------------------------------- tests, sanitizer, build, benchmarks
ALONE = "; one run each: other work on the machine would change it"
CASES = """
import os, signal, sys, time, types, pytest
def test_good(): pass
def test_bad(): assert 1 == 2
def test_skipped(): pytest.skip("no reason")
def test_dies(): os.kill(os.getpid(), signal.SIGSEGV)
def test_after(): pass
def test_fails_alone(): raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
def test_same_process(): os.environ["HERE"] = "yes"
def test_spoils():
    assert os.environ.pop("HERE") == "yes"
    def refuse(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
    sys.modules["torch"] = types.SimpleNamespace(
        cuda=types.SimpleNamespace(is_initialized=lambda: True, synchronize=refuse))
    refuse()
def test_in_another(): assert "HERE" not in os.environ
def test_hangs():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])  # as a call that Python cannot interrupt
    time.sleep(600)
def test_last(): pass
"""


def shell_for(tmp_path: Path, **env: str) -> Shell:
    (tmp_path / "stages").mkdir(exist_ok=True)
    found = gpu_suite._environment(Options(tmp_path)) | env
    return Shell(Slot(120, 0.0), tmp_path / "stage.log", found, tmp_path, 120, False)


@pytest.mark.parametrize("parts", [1, 3])
def test_a_test_that_ends_or_spoils_its_process_costs_no_other(parts, tmp_path):
    (tmp_path / "test_cases.py").write_text(CASES)
    o = Options(tmp_path)
    cases, patient = [str(tmp_path / "test_cases.py")], {"HAM_SUITE_PATIENCE": "5"}
    run = partial(gpu_stages.tests, o, "tests-gpu", "they pass", cases, patient, parts)
    result = run(shell_for(tmp_path))
    assert result["line"] == "5 passed, 5 failed, 1 skipped"
    texts = {f["test"].rpartition("::")[2]: f["text"] for f in result["failures"]}
    assert set(texts) == {"test_bad", "test_dies", "test_fails_alone", "test_spoils", "test_hangs"}
    assert "assert 1 == 2" in texts["test_bad"]
    assert texts["test_dies"] == "the process died of SIGSEGV; see the log"
    assert texts["test_hangs"] == "the process ended with 1; see the log"
    assert "Timeout (0:00:05)!" in (tmp_path / "stage.log").read_text()
    assert "in test_hangs" in (tmp_path / "stage.log").read_text()
    assert result["goals"][0]["state"] == "missed"
    assert result["skipped"] == [("no reason", 1)]
    log = (tmp_path / "stage.log").read_text()
    assert run(shell_for(tmp_path))["line"] == result["line"]
    added = (tmp_path / "stage.log").read_text().removeprefix(log)
    assert added.count("11 deselected") == parts, "tests that have an outcome were run again"


def test_a_suite_of_tests_that_cannot_start_has_failed(tmp_path):
    with pytest.raises(Failed, match="pytest ended with 4"):
        gpu_stages.tests(Options(tmp_path), "tests", "", [str(tmp_path / "none.py")], {}, 1, shell_for(tmp_path))


def test_tests_that_end_one_process_after_another_are_not_done(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_stages, "ROUNDS", 2)
    (tmp_path / "test_cases.py").write_text(
        "import os, pytest\n@pytest.mark.parametrize('i', range(4))\ndef test_dies(i): os._exit(7)\n"
    )
    run = partial(gpu_stages.tests, Options(tmp_path), "tests", "", [str(tmp_path / "test_cases.py")], {}, 1)
    for failed in (2, 4):
        with pytest.raises(Failed, match=rf"ended 2 processes; so far {{'failed': {failed}}}"):
            run(shell_for(tmp_path))
    assert run(shell_for(tmp_path))["counts"] == {"failed": 4}


def test_a_test_that_the_end_of_a_slot_cut_off_is_run_again_and_blamed_for_nothing(tmp_path):
    """Of a slot with more processes than this one has."""
    (tmp_path / "test_cases.py").write_text("import os\ndef test_good(): pass\ndef test_dies(): os._exit(7)\n")
    o, choice = Options(tmp_path), [str(tmp_path / "test_cases.py")]
    run = partial(gpu_stages.tests, o, "tests", "", choice, {}, 1)
    whole = run(shell_for(tmp_path))
    assert whole["counts"] == {"passed": 1, "failed": 1}
    good, _ = (test for test in gpu_stages.gpu_pytest.read(o.partial("tests")))
    o.partial("tests").unlink()
    gpu_stages.gpu_pytest.write(o.partial("tests"), test=good, outcome="started", part=5)
    assert run(shell_for(tmp_path))["counts"] == whole["counts"]


def test_a_short_command_that_hangs_has_failed(tmp_path):
    shell = Shell(Slot(120, 0.0), tmp_path / "stage.log", gpu_suite._environment(Options(tmp_path)), tmp_path, 1, False)
    with pytest.raises(Failed, match="did not end in 1 s"):
        shell.output(["sleep", "60"])


@pytest.mark.parametrize(
    ("said", "status", "verdict"),
    [
        ("ERROR SUMMARY: 0 errors", 0, "held"),
        ("ERROR SUMMARY: 2 errors", 9, "missed"),
        ("operation not supported'; echo '========= ERROR SUMMARY: 2 errors", 9, "missed"),
        ("ERROR SUMMARY: 0 errors'; echo 'UserWarning: this is not supported", 0, "held"),
        ("Device not supported", 9, "not measured"),
        ("no such file", 1, None),
    ],
)
def test_the_sanitizer_is_taken_at_its_word(tmp_path, monkeypatch, said, status, verdict):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\necho '========= {said}'\nexit {status}\n")
    tool.chmod(0o755)
    monkeypatch.setattr(gpu_stages, "_sanitizer", lambda: str(tool))
    work = partial(gpu_stages.sanitizer, Options(tmp_path), "memcheck", shell_for(tmp_path))
    if verdict is None:
        with pytest.raises(Failed, match="memcheck ended with 1"):
            work()
    else:
        assert work()["goals"][0]["state"] == verdict
    monkeypatch.setattr(gpu_stages, "_sanitizer", lambda: None)
    assert work()["goals"][0] | {"goal": ""} == {
        "goal": "", "measured": "compute-sanitizer is not installed", "state": "not measured",
    }  # fmt: skip


def test_the_extension_is_built_without_a_network_where_it_is_not_current(tmp_path, monkeypatch):
    native = tmp_path / "ham_kernels" / "ops" / "native"
    native.mkdir(parents=True)
    shutil.copy(ROOT / "ham_kernels" / "ops" / "native" / "cuda.py", native)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    monkeypatch.setattr(gpu_stages, "ROOT", tmp_path)
    commands = []

    class Deaf(Shell):
        def run(self, *given, **_):
            commands.extend(given)
            return [1]

    shell = Deaf(Slot(60, 0.0), tmp_path / "log", {}, tmp_path, 60, False)
    shell.log.write_text("nvcc: no\n")
    with pytest.raises(Failed, match=r"no extension: .*nvcc: no"):
        gpu_stages.build(Options(tmp_path), shell)
    assert [c[2:4] for c in commands] == [["pip", "install"], ["ham_kernels", "build"]]
    assert {"--no-build-isolation", "--no-deps"} <= set(commands[0])


def test_goals_of_every_benchmark_are_read():
    found = list(gpu_stages.goals_of({
        "goals": [
            {"goal": "a", "measured": "1", "state": "held"},
            {"goal": "b", "measured": None, "state": "not measured here", "why": "no GPU"},
        ],
        "verdicts": [{"goal": "c", "measured": "3 %", "held": False}],
        "verdict": {"goal": 200_000, "measured": 123_456.7, "held": False},
    }))  # fmt: skip
    assert [(g["goal"], g["measured"], g["state"]) for g in found] == [
        ("a", "1", "held"), ("b", "no GPU", "not measured"), ("c", "3 %", "missed"),
        ("200,000 images/s from memory", "123,457 images/s", "missed"),
    ]  # fmt: skip


def test_a_benchmark_that_is_not_there_or_writes_nothing_has_failed(tmp_path, monkeypatch):
    with pytest.raises(Failed, match=r"bench_none\.py is not in this checkout"):
        gpu_stages.benchmark(Options(tmp_path), "bench_none.py", [], shell_for(tmp_path))
    (tmp_path / "bench_bad.py").write_text("raise SystemExit('it broke')")
    monkeypatch.setattr(gpu_stages, "BENCHMARKS", tmp_path)
    with pytest.raises(Failed, match=r"bench_bad\.py ended with 1: it broke"):
        gpu_stages.benchmark(Options(tmp_path), "bench_bad.py", [], shell_for(tmp_path))


@pytest.mark.parametrize(
    ("flags", "status", "state"), [([], 0, None), ([], 1, "failed"), (["--check"], 1, None), (["--check"], 7, "failed")]
)
def test_a_benchmark_that_broke_has_failed_with_what_it_had(tmp_path, monkeypatch, flags, status, state):
    found = {"goals": [{"goal": "twice as fast", "measured": "3 times", "state": "held"}]}
    (tmp_path / "bench_some.py").write_text(
        f"import json, pathlib, sys\npathlib.Path(sys.argv[2], 'some.json').write_text({json.dumps(found)!r})\n"
        f"sys.exit({status})\n"
    )
    monkeypatch.setattr(gpu_stages, "BENCHMARKS", tmp_path)
    result = gpu_stages.benchmark(Options(tmp_path), "bench_some.py", flags, shell_for(tmp_path))
    assert (result.get("state"), result["goals"][0]["state"]) == (state, "held")
    assert (f"ended with {status}" in result["line"]) == (status != 0)


# ---------------------------------------------------------------- runs
def test_images_are_downloaded_where_none_are_given(tmp_path):
    from ham_kernels.commands.flags import parse_train

    told = {data: parse_train(gpu_runs.flags(Options(tmp_path, data=data), 0)).settings.data for data in (None, ROOT)}
    assert (told[None].dataset, told[None].path, told[None].download) == ("cifar10", None, True)
    assert (told[ROOT].dataset, told[ROOT].path, told[ROOT].download) == ("cifar10", str(ROOT), False)
    assert told[None].root == told[ROOT].root == str(tmp_path / "data")


@pytest.mark.parametrize("engine", gpu_runs.ENGINES)
def test_the_flags_of_a_run_are_the_papers(tmp_path, engine):
    from ham_kernels.commands.flags import parse_train

    o = Options(tmp_path, data=tmp_path / "cifar.tar.xz", engine=engine)
    told = {
        arm: parse_train([*gpu_runs.flags(o, 1), *choice]).settings for arm, choice in gpu_runs.ARMS.items()
    }  # fmt: skip
    for settings in told.values():
        settings.check()
        assert (settings.attack.eps, settings.attack.step_size, settings.attack.steps) == (0.031, 0.007, 10)
        assert (settings.optim.epochs, settings.method.start_epoch, settings.method.screen_steps) == (30, 13, 3)
        assert settings.model.name == "preact_resnet18"
        assert settings.run.seed == 1
    assert [s.method.name for s in told.values()] == ["pgd_at", "ham", "ham"]
    assert [s.method.freeze_bn for s in told.values()] == [False, False, True]
    assert (told["ham"].run.precision, told["ham"].engine.cuda_graphs) == {
        "bf16": ("bf16", "on"), "fp32": ("fp32", "on"), "plain": ("fp32", "off"),
    }[engine]  # fmt: skip


def test_runs_of_other_settings_do_not_mix(tmp_path):
    gpu_runs._check_options(Options(tmp_path, data=tmp_path / "a.tar"))
    other = Options(tmp_path, data=tmp_path / "a.tar", engine="plain")
    with pytest.raises(Failed, match="give another --out"):
        gpu_runs.train(other, "fair", 0, shell_for(tmp_path))


def test_a_training_that_cannot_begin_says_why(tmp_path):
    o = Options(tmp_path, data=tmp_path / "nowhere.tar")
    with pytest.raises(Failed, match=r"ham train ended with 2, not begun: .*nowhere\.tar"):
        gpu_runs.train(o, "fair", 0, shell_for(tmp_path))


# ---------------------------------------------------------------- the table
def write(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def fabricated_run(
    out: Path, arm: str, seconds: list[float], hard: float, easy: tuple[int, int], sessions=((1, 0, "A"),), seed=0
) -> None:
    folder = out / "cifar" / f"{arm}-seed{seed}"
    write(folder / "environment.json", {"sessions": [
        {"from_epoch": epoch, "from_batch": batch, "machine": {"gpu": gpu}} for epoch, batch, gpu in sessions
    ]})  # fmt: skip
    write(folder / "status.json", {"state": "finished", "epoch": 3, "epochs": 3})
    write(folder / "data.json", {"classes": ["a", "b"], "counts": {"test": 10}})
    phases = ["pgd_at", *(["pgd_at"] * 3 if arm == "pgd_at" else ["ham"] * 3)]
    lines = [
        {
            "epoch": i,
            "phase": phase,
            "mined": phase == "ham",
            "seconds": s,
            "hard_fraction": 1.0 if phase == "pgd_at" else hard,
        }
        for i, (phase, s) in enumerate(zip(phases, seconds, strict=True), 1)
    ]
    write(folder / "metrics.jsonl", "".join(f"{json.dumps(line)}\n" for line in lines))
    value = {"value": 0.5, "low": 0.4, "high": 0.6}
    attack = {"n": 10, "accuracy": value, "worst_class": value, "std": None, "per_class": [value, {"value": None}]}
    by_m = [{"m": 3, "easy": easy[1], "stay": easy[0]}]
    write(folder / "evaluation" / "ema.json", {"attacks": {"pgd20": attack}, "easy": {"steps": 10, "by_m": by_m}})


def rows_of(out: Path, plan: list[Stage]) -> dict[str, tuple[str, str]]:
    summary = gpu_claims.summarise(Options(out, seeds=(0,)), plan, "command")
    assert gpu_claims.markdown(summary)
    return {row["goal"]: (row["measured"], row["verdict"]) for row in summary["table"]}


def test_the_table_says_what_was_measured_and_nothing_else(tmp_path):
    plan = [Stage(name, 0, fails) for name in ("bench-run", "bench-input", "memcheck")]
    write(tmp_path / "stages/bench-run.json",
          {"state": "done", "goals": [{"goal": "quick", "measured": "3 s", "state": "held"}]})  # fmt: skip
    write(tmp_path / "stages/bench-input.json", {"state": "failed", "reason": "it broke", "line": ""})
    rows = rows_of(tmp_path, plan)
    assert rows["quick"] == ("3 s", "held")
    assert rows["bench-input"] == ("failed: it broke", "not measured")
    assert rows["memcheck"] == ("not run yet", "not measured")
    paper = {goal: row for goal, row in rows.items() if "−" in goal or "+" in goal or "%" in goal}
    assert len(paper) == 9
    assert {verdict for _, verdict in paper.values()} == {"not measured"}
    assert {goal.partition(":")[0] for goal in paper} >= {"PGD-20", "CW-20", "AutoAttack", "training time"}


def test_claims_come_from_the_runs_and_their_report(tmp_path):
    fabricated_run(tmp_path, "pgd_at", [20, 30.0, 10.0, 10.0], 1.0, (80, 100))
    fabricated_run(tmp_path, "ham", [20, 40.0, 5.0, 5.0], 0.25, (70, 100))
    claim = {"group": "HAM", "claim": "worst class +3.2 points (weight average, PGD-20)", "value": 0.05, "seeds": 1}
    claims = [claim | {"measured": "+5.0 points", "holds": True}]
    write(tmp_path / "report/data.json", {"sections": [{"claims": claims}]})
    rows = rows_of(tmp_path, [])
    assert rows["HAM: worst class +3.2 points (weight average, PGD-20)"] == ("+5.0 points (1 seed)", "holds")
    median = "HAM: training time −45 %, median epoch of the HAM phase"
    assert rows[median] == (f"−50 % (5.00 s against 10.00 s, 1 seed){ALONE}", "holds")  # the first epoch compiles
    easy = "{}: 75% of the examples easy at M = 3 stay easy (weight average)"
    assert rows[easy.format("PGD-AT")][1] == "holds"
    assert rows[easy.format("HAM")] == (
        "70.0% (70 of 100 training images stay, 30 succeed by K = 10)", "does not hold",
    )  # fmt: skip
    assert rows[easy.format("HAM, frozen BN")] == ("not judged", "not measured")
    assert rows["AutoAttack: worst class +3.2 points, std over classes −22 %"][1] == "not measured"
    page = gpu_claims.markdown(gpu_claims.summarise(Options(tmp_path, seeds=(0,)), [], "command"))
    assert "| HAM, seed 0 | 4 | 70.0 | 50.0 | 5.00 |" in page
    assert "| PGD-AT, seed 0 | 4 | 70.0 | 50.0 | 10.00 |" in page
    assert "| HAM, seed 0 | weight average | PGD-20 | 10 | 50.0 | 50.0 | – | 50.0 | – |" in page


@pytest.mark.parametrize(
    ("base", "ours", "verdict"),
    [
        ([(1, 0, "A"), (2, 0, "B")], [(1, 0, "C"), (2, 0, "B"), (3, 40, "B")], "holds"),  # other warm-ups
        ([(1, 0, "A")], [(1, 0, "B")], "not measured"),
        ([(1, 0, "A")], [(1, 0, "A"), (4, 7, "B")], "not measured"),
        ([(1, 0, "A")], [(1, 0, "B"), (2, 7, "A")], "not measured"),  # B began the first epoch that mines
        ([(1, 0, "A")], [(1, 0, "B"), (1, 0, "A")], "holds"),  # what B did was thrown away
    ],
)
def test_times_on_two_gpus_are_not_compared(tmp_path, base, ours, verdict):
    fabricated_run(tmp_path, "pgd_at", [20, 10.0, 10.0, 10.0], 1.0, (80, 100), base)
    fabricated_run(tmp_path, "ham", [20, 5.0, 5.0, 5.0], 0.25, (70, 100), ours)
    measured = rows_of(tmp_path, [])["HAM: training time −45 %, median epoch of the HAM phase"]
    assert (
        measured
        == {
            "holds": (f"−50 % (5.00 s against 10.00 s, 1 seed){ALONE}", "holds"),
            "not measured": ("trained on A and B", "not measured"),
        }[verdict]
    )


@pytest.mark.parametrize(("second", "verdict"), [(7.0, "undecided"), (5.0, "holds")])
def test_a_time_that_seeds_do_not_decide_is_undecided(tmp_path, second, verdict):
    for seed, ours in enumerate((5.0, second)):
        fabricated_run(tmp_path, "pgd_at", [20, 10.0, 10.0, 10.0], 1.0, (80, 100), seed=seed)
        fabricated_run(tmp_path, "ham", [20, ours, ours, ours], 0.25, (70, 100), seed=seed)
    table = gpu_claims.summarise(Options(tmp_path, seeds=(0, 1)), [], "command")["table"]
    (row,) = (row for row in table if row["goal"].startswith("HAM: training time"))
    assert (row["verdict"], "2 seeds" in row["measured"]) == (verdict, True)
    assert ("undecided: 95 % interval" in row["measured"]) == (verdict == "undecided")


def test_the_page_names_every_gpu(tmp_path):
    plan = [Stage(name, 0, fails) for name in ("first", "second", "third")]
    done = {"state": "done", "line": "it went well", "seconds": 3.0}
    write(tmp_path / "stages/first.json", done | {"gpu": "A"})
    page = gpu_claims.markdown(gpu_claims.summarise(Options(tmp_path, seeds=(0,)), plan, "command"))
    assert "\n\nA, " in page
    assert "| first | done | 3 | it went well |" in page
    write(tmp_path / "stages/second.json", done | {"gpu": "B"})
    page = gpu_claims.markdown(gpu_claims.summarise(Options(tmp_path, seeds=(0,)), plan, "command"))
    assert "\n\nA and B (which stage ran where: below), " in page
    assert "| second | done | 3 | B | it went well |" in page
    assert "| third | not run |  |  |  |" in page


def test_the_page_is_made_of_a_kept_summary(tmp_path, monkeypatch):
    summary = gpu_claims.summarise(Options(tmp_path, seeds=(0,)), [], "the command")
    write(tmp_path / "gpu/summary.json", summary)
    (tmp_path / "gpu" / "figure.png").touch()
    for name, path in {"ROOT": tmp_path, "RESULTS": tmp_path / "gpu", "PAGE": tmp_path / "page.md"}.items():
        monkeypatch.setattr(gpu_suite, name, path)
    gpu_suite.write_docs()
    page = (tmp_path / "page.md").read_text()
    assert "Made by `the command`" in page
    assert "![figure](../gpu/figure.png)" in page


def test_what_is_not_installed_is_named_before_anything_is_imported(tmp_path, monkeypatch):
    assert gpu_stages.not_installed() == []
    root = tmp_path / "checkout"
    root.mkdir()
    (root / "pyproject.toml").write_text(
        '[project]\ndependencies = ["torch>=2", "no-such-thing>=1", "nor.this", "old; python_version < \'3\'"]\n'
        'optional-dependencies = {torchattacks = ["nowhere"], autoattack = ["numpy"]}\n'
    )
    monkeypatch.setattr(gpu_stages, "ROOT", root)
    assert gpu_stages.not_installed(["torchattacks", "autoattack"]) == ["nowhere"]
    with pytest.raises(Failed, match=r"not installed: no-such-thing, nor.this; .* PYTHONPATH=DIR here"):
        gpu_stages.environment(Options(tmp_path), shell_for(tmp_path))
