"""The GPU suite without a GPU: every stage with tiny sizes; skipping, stopping, killing; the table of what was held."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from helpers import environment

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu_suite  # noqa: E402
from gpu import claims as gpu_claims  # noqa: E402
from gpu import files as gpu_files  # noqa: E402
from gpu import runs as gpu_runs  # noqa: E402
from gpu.process import Failed, Shell, Slot  # noqa: E402
from gpu.stages import Options, Stage  # noqa: E402

pytestmark = pytest.mark.slow

SH = ["sh", "-c"]


def suite(out: Path, plan: list[Stage], seconds: float = 60.0, **options) -> gpu_suite.Suite:
    return gpu_suite.Suite(Options(out, seeds=(0,)), plan, Slot(seconds, 0.0), **options)


def says(word: str, counter: Path | None = None):
    """Work that notes how often it was done."""

    def work(shell: Shell) -> dict:
        if counter is not None:
            with counter.open("a") as file:
                file.write(f"{word}\n")
        return {"line": word}

    return work


def fails(shell: Shell) -> dict:
    raise Failed("as it must")


def script(folder: Path, body: str) -> list[str]:
    """A program that runs a suite of made-up stages below `folder`."""
    path = folder / "suite.py"
    path.write_text(
        "import sys\nfrom pathlib import Path\nimport gpu_suite\nfrom gpu.process import Shell, Slot\n"
        f"from gpu.stages import Options, Stage\nout = Path({str(folder)!r})\n{body}\n"
        "with Slot(60, 1.0) as slot:\n    sys.exit(gpu_suite.Suite(Options(out), plan, slot).run())\n"
    )
    return [sys.executable, str(path)]


def wait_for(condition) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it does not get there"
        time.sleep(0.01)


def state(out: Path, stage: str) -> dict | None:
    return gpu_claims.read(out / "stages" / f"{stage}.json")


# ---------------------------------------------------------------- the whole of it
def test_smoke_runs_every_stage_and_a_second_call_none(tmp_path):
    out, back = tmp_path / "out", tmp_path / "back"
    command = [sys.executable, str(BENCHMARKS / "gpu_suite.py"), "--smoke", "--minutes", "16"]
    command += ["--out", str(out), "--collect", str(back)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    first = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1000)
    logs = "".join(p.read_text() for p in (out / "logs").glob("*.log"))
    assert first.returncode == 0, first.stdout + first.stderr + logs
    plan = gpu_suite.plan_of(Options(out, smoke=True, seeds=(0,)))
    assert {stage.name: state(out, stage.name)["state"] for stage in plan} == {stage.name: "done" for stage in plan}

    summary = json.loads((back / "summary.json").read_text())
    assert [run["arm"] for run in summary["runs"]] == list(gpu_runs.ALL)
    shared = summary["runs"][: len(gpu_runs.ARMS)]
    assert len({run["epochs"][0]["seconds"] for run in shared}) == 1, "the warm-up was not shared"
    phases = [[e["phase"] for e in run["epochs"]] for run in summary["runs"]]
    assert phases[1:] == [["pgd_at", "ham"]] * 2 + [["pgd_at", "fair"]] * 3 + [["pgd_at", "trades"]]
    for run in summary["runs"]:
        assert set(run["judged"]["ema"]["attacks"]) == {"clean", "pgd20", "cw20", "autoattack"}
        assert set(run["judged"]["last"]["attacks"]) == {"clean", "pgd20", "cw20"}
        assert run["judged"]["ema"]["easy"]["m"] == 3
    claims = [row["goal"] for row in summary["table"] if row["section"] == gpu_claims.PAPER]
    for arm in ("HAM", "HAM, frozen BN"):
        if f"{arm}: all" in claims:  # after so few updates, a model may answer one class to all, which is not judged
            continue
        for attack in ("PGD-20", "CW-20", "AutoAttack"):
            assert f"{arm}: worst class +3.2 points (weight average, {attack})" in claims
    tests = {name: state(out, name)["counts"] for name in ("tests-gpu", "tests-rest")}
    assert tests["tests-rest"]["passed"] > 0
    assert tests["tests-gpu"].get("failed", 0) == 0
    with tarfile.open(back / "results.tar.gz") as archive:
        names = archive.getnames()
    assert {"stages/report.json", "report/data.json", "cifar/ham-seed0/metrics.jsonl", "logs/report.log"} <= set(names)
    assert not [name for name in names if name.endswith(".pt")]

    again = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0
    assert again.stdout.count("done already") == len(plan) - 2, again.stdout  # build and environment are of every call


# ---------------------------------------------------------------- stages
def test_what_is_done_is_skipped_and_a_failed_stage_stops_no_other(tmp_path, capsys):
    count = tmp_path / "count"
    plan = [
        Stage("one", 0, says("one", count)),
        Stage("bad", 0, fails),
        Stage("after-bad", 0, fails, after=("bad",)),
        Stage("behind-bad", 0, says("behind", count), behind=("bad",)),
        Stage("two", 0, says("two", count)),
    ]
    assert suite(tmp_path, plan).run() == 1
    assert count.read_text().split() == ["one", "behind", "two"]
    assert state(tmp_path, "bad")["reason"] == "as it must"
    assert state(tmp_path, "after-bad") is None
    plan[1] = Stage("bad", 0, says("mended", count))
    assert suite(tmp_path, plan).run() == 1
    assert count.read_text().split() == ["one", "behind", "two"]
    assert "failed before: as it must (--retry)" in capsys.readouterr().out
    assert suite(tmp_path, plan, only=["bad"]).run() == 0
    assert suite(tmp_path, plan, only=["on"], again=True).run() == 0
    assert count.read_text().split() == ["one", "behind", "two", "mended", "one"]


def test_what_is_behind_a_failed_stage_is_not_left_for_a_next_call(tmp_path, capsys):
    """Or calls would be repeated for ever; what one of several stages is enough for runs."""
    plan = [
        Stage("warm-up", 0, fails),
        Stage("train-a", 0, says("a"), after=("warm-up",)),
        Stage("judge-a", 0, says("a"), after=("train-a",)),
        Stage("judge-b", 0, says("b")),
        Stage("report", 0, says("report"), behind=("judge-a", "judge-b"), final=True),
        Stage("none", 0, says("none"), behind=("train-a", "judge-a"), final=True),
    ]
    for _ in range(2):
        assert suite(tmp_path, plan).run() == 1
    assert state(tmp_path, "report")["state"] == "done"
    assert state(tmp_path, "none") is None
    assert "[judge-a] waits for train-a, which does not run in this call" in capsys.readouterr().out
    assert suite(tmp_path / "new", plan, only=["judge-a"]).run() == 1
    plan[0] = Stage("warm-up", 1000, says("warm"))
    assert suite(tmp_path / "left", plan).run() == 3


def test_an_unexpected_error_in_a_stage_is_its_own(tmp_path):
    plan = [Stage("bad", 0, lambda shell: 1 / 0), Stage("good", 0, says("good"))]
    assert suite(tmp_path, plan).run() == 1
    assert state(tmp_path, "bad")["reason"] == "ZeroDivisionError: division by zero"
    assert state(tmp_path, "good")["state"] == "done"


def test_nothing_runs_behind_a_gate_that_is_closed(tmp_path):
    plan = [Stage("gate", 0, fails, always=True, gate=True), Stage("good", 0, says("good"))]
    assert suite(tmp_path, plan).run() == 1
    assert state(tmp_path, "good") is None


def test_another_stamp_makes_a_result_anew(tmp_path):
    count, stamp = tmp_path / "count", [1]
    plan = [Stage("one", 0, says("one", count), stamp=lambda: list(stamp))]
    for _ in range(2):
        assert suite(tmp_path, plan).run() == 0
    assert count.read_text().split() == ["one"]
    stamp.append(2)
    assert suite(tmp_path, plan).run() == 0
    assert count.read_text().split() == ["one", "one"]


# ---------------------------------------------------------------- time
def test_a_stage_that_outlives_the_slot_is_asked_to_stop_and_left(tmp_path, capsys):
    body = f"trap 'echo asked > {tmp_path}/asked; exit 143' TERM; sleep 60 & wait"
    plan = [Stage("long", 0, lambda shell: {"line": str(shell.run([*SH, body]))}), Stage("next", 30, says("next"))]
    start = time.monotonic()
    assert suite(tmp_path, plan, seconds=1.0).run() == 3
    assert time.monotonic() - start < 20
    assert (tmp_path / "asked").exists()
    assert state(tmp_path, "long") is None
    assert state(tmp_path, "next") is None
    assert "[next] left for the next call: it needs 30 s, 0 s are left" in capsys.readouterr().out
    rows = {row["goal"]: row for row in json.loads((tmp_path / "summary.json").read_text())["table"]}
    assert (rows["long"]["verdict"], rows["long"]["measured"]) == ("not measured", "not run yet")


def test_what_does_not_stop_when_asked_is_killed_with_its_children(tmp_path):
    pid = tmp_path / "pid"
    body = f"trap '' TERM; (trap '' TERM; echo $$ > {pid}; sleep 60) & echo $! > {pid}; wait; sleep 60"

    def work(shell: Shell) -> dict:
        return {"line": str(shell.run([*SH, body], grace=0.3))}

    assert suite(tmp_path, [Stage("deaf", 0, work)], seconds=1.0).run() == 3
    wait_for(lambda: not _alive(int(pid.read_text())))


def _alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_stage_past_its_own_limit_has_failed(tmp_path):
    plan = [Stage("slow", 0, lambda shell: {"line": str(shell.run([*SH, "sleep 60"]))}, limit=0.5)]
    assert suite(tmp_path, plan).run() == 1
    assert state(tmp_path, "slow")["reason"] == "did not end in 0 s"


SLEEPER = """
def quick(shell):
    shell.run(["sh", "-c", f"echo quick >> {out}/count"])
    return {"line": "quick"}

def long(shell):
    shell.run(["sh", "-c", f"echo $$ > {out}/pid; echo long >> {out}/count; test -e {out}/on || sleep 60"])
    return {"line": "long"}

plan = [Stage("quick", 0, quick), Stage("long", 0, long)]
"""


def test_a_killed_suite_loses_the_running_stage_only_and_leaves_no_command_behind(tmp_path):
    command = script(tmp_path, SLEEPER)
    process = subprocess.Popen(command, env=environment(BENCHMARKS), stdout=subprocess.DEVNULL)
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip())
    process.kill()
    process.wait()
    wait_for(lambda: not _alive(int((tmp_path / "pid").read_text())))
    assert state(tmp_path, "quick")["state"] == "done"
    assert state(tmp_path, "long") is None
    assert (tmp_path / "summary.md").exists()
    (tmp_path / "on").touch()
    assert subprocess.run(command, env=environment(BENCHMARKS), stdout=subprocess.DEVNULL).returncode == 0
    assert (tmp_path / "count").read_text().split() == ["quick", "long", "long"]


def test_a_signal_ends_the_slot_in_order(tmp_path):
    process = subprocess.Popen(
        script(tmp_path, SLEEPER), env=environment(BENCHMARKS), stdout=subprocess.PIPE, text=True
    )
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip())
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 3
    assert "[long] the slot is over" in out
    assert state(tmp_path, "long") is None


# ---------------------------------------------------------------- files and arguments
def test_a_restored_folder_keeps_what_stands_alone(tmp_path):
    out, back = tmp_path / "out", tmp_path / "back"
    names = [
        "stages/tests-gpu.json", "stages/train-ham-seed0.json", "stages/train-ham-seed1.json", "summary.json",
        "stages/warm-up-seed0.json", "cifar/fair-seed0/metrics.jsonl", "cifar/ham-seed2/metrics.jsonl",
        "cifar/options.json", "cifar/ham-seed0/metrics.jsonl", "cifar/ham-seed1/metrics.jsonl", "summary.md",
    ]  # fmt: skip
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text('{"state": "done"}')
    attacked = [("judge", 0, "done"), ("autoattack-ema", 0, "done"), ("judge", 1, "failed"), ("judge", 2, "done")]
    for what, seed, word in attacked:
        judged = {"stage": f"{what}-ham-seed{seed}", "state": word}
        (out / f"stages/{what}-ham-seed{seed}.json").write_text(json.dumps(judged))
    gpu_files.collect(out, back)
    gpu_files.restore(back / "results.tar.gz", tmp_path / "new")
    there = {str(p.relative_to(tmp_path / "new")) for p in (tmp_path / "new").rglob("*") if p.is_file()}
    assert there == {
        "stages/tests-gpu.json", "stages/train-ham-seed0.json", "stages/judge-ham-seed0.json",
        "stages/autoattack-ema-ham-seed0.json", "cifar/options.json", "cifar/ham-seed0/metrics.jsonl",
    }  # fmt: skip


def test_an_arm_is_judged_before_the_next_is_trained(tmp_path):
    names = [stage.name for stage in gpu_runs.stages(Options(tmp_path, seeds=(3,), arms=("fair_fast", "ham")))]
    assert names == [
        "warm-up-seed3", "train-ham-seed3", "judge-ham-seed3", "autoattack-ema-ham-seed3", "train-fair_fast-seed3",
        "judge-fair_fast-seed3", "autoattack-ema-fair_fast-seed3", "autoattack-last-ham-seed3",
        "autoattack-last-fair_fast-seed3", "report",
    ]  # fmt: skip
    alone = gpu_runs.stages(Options(tmp_path, seeds=(3,), arms=("trades",)))
    assert (alone[0].name, alone[0].after) == ("train-trades-seed3", ())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--out: give a folder"),
        (["--out", "x", "--data", "nowhere.tar"], "nowhere.tar is not there"),
        (["--out", "x", "--smoke", "--stage", "bench-nothing"], "--stage: got bench-nothing"),
        (["--out", "x", "--smoke", "--minutes", "0"], "--minutes: got 0.0"),
        (["--out", "x", "--smoke", "--again"], "--again: needs --stage"),
        (["--out", __file__], "is not a folder"),
        (["--out", "x", "--collect", __file__], "is not a folder"),
        (["--out", "x", "--restore", __file__], "is not a tar"),
        (["--out", "x", "--seeds", "0", "-1"], "--seeds: got -1"),
        (["--write-docs"], "is not there"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        gpu_suite.parse(arguments)
    assert message in capsys.readouterr().err
    assert gpu_suite.parse(["--out", "x", "--stage", "bench", "tests"]).data is None
