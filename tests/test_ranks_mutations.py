"""What several processes could do wrong without an error is seen by comparing them with one, or is told."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import test_ranks_training
import torch
from rank_helpers import on_ranks
from test_ranks_training import far, trained

pytestmark = pytest.mark.slow


def mutated(rank: int, mutation: str, patch: pytest.MonkeyPatch) -> dict:
    from ham_kernels.distributed import ranks
    from ham_kernels.methods import mining, objective
    from ham_kernels.training import trainer

    patch.setattr(ranks.Ranks, "check_alike", lambda self, model: None)  # which would see some of them first
    if mutation == "no world in the loss":
        losses = objective.Objective.losses
        patch.setattr(objective.Objective, "losses", lambda *how: tuple(loss / 2 for loss in losses(*how)))
    elif mutation == "local rows":
        patch.setattr(
            mining.Examples, "everywhere", property(lambda e: mining.Everywhere(2 * e.n, 2 * e.n_hard, 2 * e.n_kept))
        )
        uneven = slice(8) if rank == 0 else slice(8, None)
        patch.setattr(test_ranks_training, "mine", lambda batch, *which: tuple(t[uneven] for t in batch))
    elif mutation == "random rows by local row":
        here = mining._random_here
        patch.setattr(mining, "_random_here", lambda place, *how: here(replace(place, first_row=0), *how))
    elif mutation == "local mean of the weights":
        patch.setattr(mining.Examples, "of_mean_one", lambda self, weights: weights / weights.mean())
    elif mutation == "noise by local row":
        attack = mining.Attack
        patch.setattr(mining, "Attack", lambda *args, first_row, **how: attack(*args, **how))
    elif mutation == "local BatchNorm":
        patch.setattr(objective, "synced_batchnorm", lambda model, ranks: nullcontext())
    elif mutation == "local class sums":
        patch.setattr(
            mining.Look, "__init__", lambda self, z, y, target, ranks: self.__dict__.update(z=z, y=y, target=target)
        )
    elif mutation == "gradients stay":
        patch.setattr(trainer, "wrapped", lambda model, ranks: model)
    elif mutation == "a row moved twice":
        move = mining.move
        patch.setattr(mining, "move", lambda tensors, *how: [torch.cat([t[-1:], t[1:]]) for t in move(tensors, *how)])
    elif mutation == "a slice is padded":
        own = test_ranks_training.mine
        patch.setattr(test_ranks_training, "mine", lambda *which: tuple(torch.cat([t, t[:1]]) for t in own(*which)))
    return trained(rank, METHOD_OF.get(mutation, "ham"))


METHOD_OF = {"local rows": "pgd_at", "random rows by local row": "ham_random", "local class sums": "ham_jump"}
MUTATIONS = [
    "no world in the loss", "local rows", "local mean of the weights", "noise by local row", "random rows by local row",
    "local BatchNorm", "local class sums",
    "gradients stay", "a row moved twice", "a slice is padded",
]  # fmt: skip


def each_mutated(rank: int) -> dict:
    found = {}
    for mutation in MUTATIONS:
        with pytest.MonkeyPatch.context() as patch:
            found[mutation] = mutated(rank, mutation, patch)["first"]
    found["none"] = trained(rank, "ham")["first"]
    return found


def test_a_mutation_is_seen(tmp_path):
    one = {key: trained(0, key, world=1)["first"] for key in ("ham", *METHOD_OF.values())}
    found = on_ranks(2, each_mutated, tmp_path)[0]
    seen = {mutation: far(first, one[METHOD_OF.get(mutation, "ham")]) for mutation, first in found.items()}
    assert seen.pop("none") <= 2e-6  # none of them outlasts its turn
    assert not {mutation: much for mutation, much in seen.items() if much <= 1e-4}


def drifting(rank: int) -> None:
    from ham_kernels.methods import objective

    objective.synced_batchnorm = lambda model, ranks: nullcontext()
    trained(rank, "ham")


def test_processes_that_drift_apart_are_told(tmp_path):
    with pytest.raises(AssertionError, match="the weights of process 1 are no longer those of process 0"):
        on_ranks(2, drifting, tmp_path)
