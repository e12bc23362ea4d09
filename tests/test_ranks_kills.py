"""kill -9 of one of two processes, at ten moments of a run: the other ends, and no update is lost or made twice."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from rank_helpers import SECONDS, on_ranks, started
from runs_helper import assert_same_weights
from tqdm import tqdm

from ham_kernels.attack.pgd import Attack
from ham_kernels.commands import train as train_command
from ham_kernels.commands.flags import parse_train
from ham_kernels.runs.checkpoints import Checkpoints
from ham_kernels.training.trainer import Trainer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_gpu")]

# 3 batches an epoch, a checkpoint behind each, and as many epochs as ten kills may come to
RUN = (
    "--dataset", "digits", "--train-images", "72", "--val-images", "20", "--test-images", "20", "--batch-size", "24",
    "--epochs", "14", "--start-epoch", "3", "--steps", "3", "--screen-steps", "1", "--val-attack", "pgd2",
    "--ema-decay", "0.9", "--checkpoint-minutes", "0", "--device", "cpu",
)  # fmt: skip


def of_checkpoint(name: str) -> bool:
    return Path(name).name.lstrip(".").startswith("step_")


# where: (who has it, its name, what it must be called with, in which processes it happens)
PLACES = {
    "in an attack": (Attack, "steps", None, (0, 1)),
    "before an update": (torch.optim.SGD, "step", None, (0, 1)),
    "behind a batch": (train_command._Job, "_batch_end", None, (0, 1)),
    "a checkpoint is half written": (os, "fsync", lambda fd: of_checkpoint(os.readlink(f"/proc/self/fd/{fd}")), (0,)),
    "a checkpoint has no name yet": (os, "replace", lambda aside, path: of_checkpoint(path), (0,)),
    "before a checkpoint": (Checkpoints, "save", None, (0, 1)),
    "in validation": (Trainer, "judged", None, (0, 1)),
    "at the end of an epoch": (Trainer, "_end_epoch", None, (0, 1)),
    "behind the end of an epoch": (train_command._Job, "_keep_best", None, (0, 1)),
}


def work(rank: int, run: str, kill: tuple[str, int, int] | None) -> None:
    """Begins the run, or goes on with it; `kill`: where, at the how many-th time, in which process."""
    if kill is not None and kill[2] == rank:
        kill_at(*kill[:2])
    tqdm.set_lock(threading.RLock())  # one for several processes would be left behind by a kill
    if Path(run).exists():
        train_command.resume(run, quiet=True)
    else:
        train_command.train(parse_train(list(RUN)).settings, run, quiet=True)


def kill_at(place: str, times: int) -> None:
    owner, name, counts, _ = PLACES[place]
    original, left = getattr(owner, name), [times]

    def dying(*args, **how):
        if counts is None or counts(*args):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **how)

    setattr(owner, name, dying)


def ten_kills(rng: random.Random) -> list[tuple[str, int, int]]:
    """Each place once, one twice, in any order, within two epochs of the last."""
    places = [*PLACES, rng.choice(list(PLACES))]
    rng.shuffle(places)
    return [(place, rng.randint(1, 2 if "epoch" in place else 3), rng.choice(PLACES[place][3])) for place in places]


@pytest.mark.timeout(900)
def test_ten_kills_lose_nothing(tmp_path, seed):
    on_ranks(2, work, tmp_path, str(tmp_path / "whole"), None)
    kills = ten_kills(random.Random(seed))
    for number, kill in enumerate(kills):
        _, processes = started(2, work, tmp_path, str(tmp_path / "run"), kill)
        dies, lives = processes[kill[2]], processes[1 - kill[2]]
        dies.join(2 * SECONDS)
        assert dies.exitcode == -signal.SIGKILL, (kills, number)
        began = time.monotonic()
        lives.join(SECONDS)
        assert lives.exitcode == 1, (kills, number)
        print(kill, f"the other ended after {time.monotonic() - began:.1f} s")
    on_ranks(2, work, tmp_path, str(tmp_path / "run"), None)
    assert_same_weights(tmp_path / "run", tmp_path / "whole")
    assert not list((tmp_path / "run/checkpoints").glob(".*"))  # what a kill tore is swept up
