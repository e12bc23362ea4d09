"""TRADES in a loop of one's own, its model sharded over the processes by torch's fully_shard (FSDP2).

    torchrun --standalone --nproc-per-node 2 examples/fsdp2.py

Every forward of a sharded model is a collective, also those of an attack: all processes take as many, whatever rows
fall to each.
"""

from __future__ import annotations

import argparse

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import ham_kernels as ham

EPS, STEP_SIZE = 0.2, 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--out", help="where the weights go")
    told = parser.parse_args()

    ranks = ham.distributed.start()
    images = ham.data.load("digits").subset(told.images, 100)
    alone = "cuda" if torch.cuda.is_available() else "cpu"
    device = alone if not ranks.several or torch.distributed.get_backend() == "nccl" else "cpu"
    loaders = ham.data.loaders(images, 64, augment="none", device=device, rank=ranks.rank, world=ranks.world)
    torch.manual_seed(0)
    model = ham.models.create("small_cnn", 10, channels=1).to(device)
    if ranks.several:
        fully_shard(model, mesh=init_device_mesh(device, (ranks.world,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    method = ham.methods.TRADES(beta=6.0, early_drop=True, easy="stop")
    noise = torch.Generator().manual_seed(0)
    for epoch in range(1, told.epochs + 1):
        loaders.train.set_epoch(epoch)
        for x, y in loaders.train:
            loss = ham.loss(method, model, x, y, eps=EPS, step_size=STEP_SIZE, generator=noise)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    whole = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in model.state_dict().items()}
    if ranks.rank == 0:
        print(f"loss {loss.item():.3f} on the last rows of process 0")
        if told.out:
            torch.save(whole, told.out)
    ham.distributed.stop()


if __name__ == "__main__":
    main()
