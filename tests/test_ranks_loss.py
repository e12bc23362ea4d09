"""The loss of a batch in somebody's loop, by torch's wrappers: the gradient of one process, whatever rows each has."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from rank_helpers import on_ranks
from test_ranks_training import CLASSES, batches, mine
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import ham_kernels as ham

pytestmark = pytest.mark.slow

ROWS = (1, 24, 7, 2)  # of the first batch one process has none, and its model has not been looked at yet
WRAPPERS = {
    "ddp": nn.parallel.DistributedDataParallel,
    "fsdp2": lambda model: fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),))),
}
METHODS = {
    "ham": lambda *batch, **how: ham.ham_loss(*batch, screen_steps=2, **how),
    "trades": lambda *batch, **how: ham.loss(ham.methods.TRADES(), *batch, **how),
}


def gradients(rank: int, method: str, wrapper: str | None = None) -> list[list[torch.Tensor]]:
    """Of each batch, those of all weights."""
    world = dist.get_world_size() if wrapper else 1
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.Tanh(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(24, CLASSES)
    )
    model = WRAPPERS[wrapper](model) if wrapper else model
    noise, found = torch.Generator().manual_seed(0), []
    for rows in ROWS:
        x, y = mine(batches(1, rows)[0], rank, world)
        model.zero_grad()
        loss = METHODS[method](model, x, y, eps=0.2, step_size=0.05, steps=4, generator=noise)
        loss.backward()
        found.append([getattr(g := p.grad, "full_tensor", lambda g=g: g)().clone() for p in model.parameters()])
    return found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_gradient_is_that_of_one_process(wrapper, method, tmp_path, one_thread):
    one = gradients(0, method)
    for found in on_ranks(2, gradients, tmp_path, method, wrapper):
        for rows, alone, together in zip(ROWS, one, found, strict=True):
            for a, b in zip(together, alone, strict=True):
                # 5e-6 of the largest entry: fp32 sums in another order
                assert float((a - b).abs().max()) <= min(1e-6, 5e-6 * float(b.abs().max())), rows
