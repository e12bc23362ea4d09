"""Two processes, each with a GPU of its own: torch's SyncBatchNorm and NCCL give the weights of one."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from rank_helpers import on_ranks
from test_ranks_training import batches, far, mine, net

import ham_kernels as ham

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
ROWS = (24, 1, 7)  # of which the second leaves one process without


def updated(rank: int, precision: str, world: int | None = None) -> dict:
    """Weights after one update on each of these batches, each from the same weights."""
    alone, world = world == 1, world or dist.get_world_size()
    found = {}
    for rows in ROWS:
        model = net().to(torch.device("cuda", rank))
        trainer = ham.HAMTrainer(
            model, torch.optim.SGD(model.parameters(), 0.1), eps=1.0, step_size=0.3, steps=4, norm="l2",
            screen_steps=2, start_epoch=1, seed=3, precision=precision, group=None if alone else "auto",
        )  # fmt: skip
        batch = mine(batches(1, rows)[0], rank, world)
        trainer.train_step(*(t.to(model[0].weight.device) for t in batch), epoch=1)
        found[str(rows)] = {name: t.cpu() for name, t in model.state_dict().items()}
    return found


updated.backend = "nccl"


@pytest.mark.parametrize(("precision", "apart"), [("fp32", 1e-4), ("bf16", 3e-2)])
def test_two_gpus_update_as_one(precision, apart, tmp_path):
    one = updated(0, precision, world=1)
    first, second = on_ranks(2, updated, tmp_path, precision)
    for rows in one:
        assert all(torch.equal(first[rows][name], t) for name, t in second[rows].items()), rows
        assert far(first[rows], one[rows]) <= apart, rows
