"""Friendly-AT: where rows stay, by epoch and in replays; its epochs in courses of other lengths."""

from __future__ import annotations

import pytest
import torch
from graph_helpers import Recorder, give_graphs
from nets import sgd
from test_bat import ATTACK, batch, path_of  # noqa: F401

import ham_kernels as ham
from ham_kernels.attack.pgd import PGD
from ham_kernels.commands.flags import parse_train
from ham_kernels.methods import FAT
from ham_kernels.runs.presets import preset, rescaled
from ham_kernels.runs.settings import TrainSettings

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("base", ["pgd_at", "trades", "mart"])
def test_rows_stay_by_epoch(base, graphs, batch):  # noqa: F811
    model, x, y = batch
    trainer = ham.Trainer(model, sgd(model), FAT(base=base, tau_from=(2, 4)), **ATTACK)
    if graphs:
        give_graphs(trainer, Recorder())
    points, right = path_of(model, x, y, PGD(**ATTACK, loss="kl" if base == "trades" else "ce"))
    objective, stayed = trainer.phases.method, []
    for epoch, tau in ((1, 0), (2, 1), (3, 1), (4, 2), (5, 2), (1, 0)):
        objective.epoch = epoch
        made = objective.examples(model, x, y, seed=1, step=2, engine=trainer.engine)
        past = (~right).cumsum(0) > tau
        for i in range(len(y)):
            where = past[:, i].nonzero()[:1].flatten().tolist()
            assert torch.equal(made.x_adv[i], points[where[0] if where else -1][i])
        stayed.append(int(past.any(0).sum()))
    assert stayed[0] >= stayed[1] >= stayed[3] > 0
    assert stayed[0] < len(y)


def test_the_course(tmp_path):
    assert FAT().in_course(24).tau_from == (11, 19)
    assert FAT(tau_from=()).in_course(24).tau_from == ()
    assert FAT(tau_from=(1, 61)).in_course(60).tau_from == (1, 31)
    assert parse_train(["--method", "fat", "--tau-from", "5", "9"]).settings.method.tau_from == (5, 9)
    settings = TrainSettings(method=FAT(tau_from=(51, 91)))
    assert rescaled(settings, settings.optim.epochs) == settings
    assert rescaled(settings, 12).method.tau_from == tuple(1 + round(e * 12 / settings.optim.epochs) for e in (50, 90))
    assert rescaled(preset("digits"), 12).optim.epochs == 12
    assert rescaled(settings, 2).method.tau_from == (2,)  # an epoch behind the end is none, not the last
    assert FAT().begins() == (("tau_from", 51, "rows"),)
    assert FAT(tau_from=()).begins() == ()
    with pytest.raises(ValueError, match=r"tau_from: got 0; it must be >= 1"):
        FAT(tau_from=(0, 3))


def test_costs_and_settings_that_do_nothing():
    assert [FAT(base=base).cost(10) for base in ("pgd_at", "trades", "mart")] == [23, 27, 26]
    with pytest.raises(ValueError, match=r"beta: got 2\.0 with base='pgd_at'"):
        FAT(beta=2.0)
