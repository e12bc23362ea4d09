"""The commands under torchrun: one run folder, the same flags, ends and restarts."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from rank_helpers import on_ranks
from torch import distributed as dist

from ham_kernels import report
from ham_kernels.commands import evaluate as evaluate_command
from ham_kernels.commands import sweep as sweep_command
from ham_kernels.commands import train as train_command
from ham_kernels.commands.flags import parse_evaluate, parse_sweep, parse_train
from ham_kernels.common.files import load
from ham_kernels.distributed import ranks

pytestmark = pytest.mark.slow

SETTINGS = "--dataset digits --train-images 256 --val-images 40 --test-images 60 --batch-size 64 --epochs 3 --lr 0.02"
# An L2 attack, since rounding may turn the sign of a gradient, and then a pixel.
SMOOTH = f"{SETTINGS} --norm l2 --eps 1.5 --step-size 0.4"
HAM = [*SMOOTH.split(), "--start-epoch", "2", "--ema-decay", "0.5", "--device", "cpu"]
JUDGED = ["--attacks", "clean", "pgd5", "cw3", "--batch-size", "16", "--no-analyses", "--seed", "7", "--device", "cpu"]


def ham(world: int | str, *arguments: str, cwd: Path, wait: bool = True, status: int | None = 0):
    """`ham ...` in `world` processes; without torchrun where that is the number 1."""
    launcher = [] if world == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, *launcher, "-m", "ham_kernels", *map(str, arguments)], cwd=cwd, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    if not wait:
        return process
    said, _ = process.communicate(timeout=1000)
    assert status is None or process.returncode == status, said
    return said


# Without torchrun, which takes a few seconds for each process:
def begun(rank: int, run: str) -> None:
    train_command.train(parse_train(HAM).settings, run, quiet=True)


def resumed(rank: int, run: str) -> None:
    train_command.resume(run, quiet=True)


def judged(rank: int, run: str) -> None:
    evaluate_command.evaluate_run(run, parse_evaluate([run, *JUDGED]).settings, quiet=True)


def newest(run: Path) -> dict:
    return load(sorted((run / "checkpoints").glob("step_*.pt"))[-1])


def far(a: dict, b: dict) -> float:
    ours, theirs = a["trainer"]["model"], b["trainer"]["model"]
    return max(float((ours[k].double() - theirs[k].double()).abs().max()) for k in ours)


def until(what, process, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)


def writing(rank: int, folder: str) -> list[str]:
    """What this process writes in a folder while it trains there and judges."""
    written = []

    def watch(event: str, args: tuple) -> None:
        if event == "open" and (set(str(args[1])) & set("wax+") or (args[2] or 0) & (os.O_WRONLY | os.O_RDWR)):
            written.append(str(args[0]))
        elif event in ("os.rename", "os.mkdir", "os.remove", "os.utime", "os.chmod", "os.link", "os.symlink"):
            written.extend(map(str, args[:2]))

    sys.addaudithook(watch)  # there is no taking it off: the process ends behind the test
    run = f"{folder}/run"
    begun(rank, run)
    judged(rank, run)
    return [path for path in written if path.startswith(folder)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """one: of one process; two: of two."""
    folder = tmp_path_factory.mktemp("ranks")
    on_ranks(1, begun, folder, str(folder / "one"))
    said = ham(2, "train", *HAM, "--out", "two", cwd=folder)
    assert said.count("two: digits") == 1  # the second process says nothing
    assert "2 processes, each 32 rows of a batch of 64" in said
    return folder


def test_one_folder_as_of_one_process(runs):
    assert sorted(p.name for p in (runs / "one").iterdir()) == sorted(p.name for p in (runs / "two").iterdir())
    assert (runs / "one/config.toml").read_text() == (runs / "two/config.toml").read_text()
    lines = [[json.loads(line) for line in (runs / name / "metrics.jsonl").open()] for name in ("one", "two")]
    for one, two in zip(*lines, strict=True):
        assert one["n"] == two["n"] == 256
        assert abs(one["n_hard"] - two["n_hard"]) <= 3
        assert one["loss"] == pytest.approx(two["loss"], rel=2e-2)
    assert json.loads((runs / "two/status.json").read_text())["state"] == "finished"


def test_one_process_writes(tmp_path):
    first, second = on_ranks(2, writing, tmp_path, str(tmp_path / "here"))
    assert {Path(path).name for path in first} >= {"config.toml", "metrics.jsonl"}
    assert not second


def test_one_process_of_torchrun_is_none_of_several(runs):
    ham("1", "train", *HAM, "--out", "launched", "--quiet", cwd=runs)
    assert far(newest(runs / "launched"), newest(runs / "one")) == 0.0


def test_the_same_flags_by_any_number_of_processes(runs, tmp_path):
    flags = {}
    for world in (1, 2, 3):
        if world == 2:
            ham(world, "evaluate", "one", *JUDGED, "--quiet", cwd=runs)
        else:
            on_ranks(world, judged, tmp_path, str(runs / "one"))
        (path,) = (runs / "one/evaluation").glob("*seed7.json")
        flags[world] = json.loads(path.read_text())["attacks"]
        for found in flags[world].values():
            del found["seconds"]
        path.unlink()
        for store in (runs / "one/evaluation").glob(".*.flags.json"):
            store.unlink()
    assert flags[1] == flags[2] == flags[3]
    assert len(flags[1]["clean"]["correct"]) == 60


def test_a_run_goes_on_with_another_number_of_processes(runs, tmp_path):
    for name, world in (("four", 4), ("back", 1)):
        shutil.copytree(runs / "two", runs / name)
        text = (runs / name / "config.toml").read_text()
        (runs / name / "config.toml").write_text(re.sub(r"(?m)^epochs = 3$", "epochs = 4", text))
        on_ranks(world, resumed, tmp_path, str(runs / name))
    four, back = newest(runs / "four"), newest(runs / "back")
    assert four["trainer"]["steps_done"] == back["trainer"]["steps_done"] == 16
    assert far(four, back) < 1e-3  # a ReLU may turn by rounding; test_ranks_exact.py has a smooth model


def test_sigterm_to_the_launcher_ends_with_a_checkpoint(tmp_path):
    process = ham(2, "train", *HAM, "--epochs", "200", "--out", "long", cwd=tmp_path, wait=False)
    until(lambda: (tmp_path / "long/metrics.jsonl").exists() and (tmp_path / "long/metrics.jsonl").read_text(), process)
    os.kill(process.pid, signal.SIGTERM)
    began = time.monotonic()
    said, _ = process.communicate(timeout=60)
    assert time.monotonic() - began < 10, said  # a step takes milliseconds
    assert process.returncode != 0
    assert json.loads((tmp_path / "long/status.json").read_text())["state"] == "interrupted", said
    assert said.count("stopped by SIGTERM") == 1, said
    ended = len((tmp_path / "long/metrics.jsonl").read_text().splitlines())
    assert 4 * ended <= newest(tmp_path / "long")["trainer"]["steps_done"] <= 4 * ended + 4  # of 4 an epoch, none lost


def test_one_process_killed_ends_all(tmp_path):
    """That nothing is lost then: test_ranks_kills.py."""
    process = ham(2, "train", *HAM, "--epochs", "200", "--out", "hit", cwd=tmp_path, wait=False)
    until(lambda: (tmp_path / "hit/metrics.jsonl").exists() and (tmp_path / "hit/metrics.jsonl").read_text(), process)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    began = time.monotonic()
    process.communicate(timeout=60)
    assert time.monotonic() - began < 60
    assert process.returncode != 0
    assert newest(tmp_path / "hit")["trainer"]["steps_done"] > 0


def swept(rank: int, folder: str) -> list[str]:
    """What this process says of a sweep of two runs."""
    said = []
    os.environ.update(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank))  # as torchrun does
    reported = []

    def build(folders, out, **how):
        reported.append(out)
        return out

    briefly = ["--epochs", "1", "--attacks", "clean", "pgd5", "--no-masking", "--device", "cpu", "--out", folder]
    with mock.patch.object(sweep_command, "say", said.append), mock.patch.object(report, "build", build):
        assert sweep_command.sweep(parse_sweep(["ham", "--seeds", "0", "1", *SETTINGS.split(), *briefly])) == 0
    assert len(reported) == (rank == 0)
    return said


def test_a_sweep_is_shared_out(tmp_path):
    folder = tmp_path / "swept"
    said = on_ranks(2, swept, tmp_path, str(folder))
    assert [sum(line.endswith(" ...") for line in lines) for lines in said] == [1, 1]  # a run each
    noted = json.loads((folder / "sweep.json").read_text())
    assert set(noted["runs"].values()) == {"finished"}, said
    assert len(noted["runs"]) == 2


def cannot_be(rank: int, run: str) -> None:
    with pytest.raises(ValueError, match="round_to: got 8 on several processes"):
        train_command.train(parse_train([*HAM, "--round-to", "8"]).settings, run, quiet=True)


def test_what_cannot_be_is_said_by_each(tmp_path):
    on_ranks(2, cannot_be, tmp_path, str(tmp_path / "no"))
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("gpus", "backend"),
    [(["a", "b"], "nccl"), (["a", "a"], "gloo"), (["a", ""], "gloo"), (["", ""], "gloo")],
    ids=["own", "shared", "one without", "none"],
)
def test_all_processes_choose_one_backend(gpus, backend):
    store = dist.HashStore()
    for rank, gpu in enumerate(gpus):
        store.set(f"ham_gpu_{rank}", gpu)
    assert [ranks._agreed_backend(store, rank, 2, gpu) for rank, gpu in enumerate(gpus)] == [backend] * 2


@pytest.mark.parametrize(
    ("seen", "local", "here", "own"),
    [(2, 1, 2, 1), (8, 3, 4, 3), (1, 1, 2, 0), (1, 0, 1, 0), (2, 3, 4, None), (0, 0, 2, None)],
)
def test_the_gpu_of_a_process(seen, local, here, own, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: seen > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    monkeypatch.setenv("LOCAL_RANK", str(local))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
    assert ranks._gpu_of_this_process() == own
