"""HAM in a loop of Lightning Fabric.

    python examples/fabric_loop.py --devices 2

Fabric starts the processes and wraps the model; ham_loss attacks the model inside, and its loss is that of the whole
batch.
"""

from __future__ import annotations

import argparse

import torch
from lightning.fabric import Fabric

import ham_kernels as ham

EPS, STEP_SIZE = 0.2, 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--out", help="where the weights go")
    told = parser.parse_args()

    fabric = Fabric(accelerator="auto", devices=told.devices, strategy="ddp" if told.devices > 1 else "auto")
    fabric.launch()
    images = ham.data.load("digits").subset(told.images, 100)
    of_this = {"rank": fabric.global_rank, "world": fabric.world_size}
    train = ham.data.loaders(images, 64, augment="none", device=fabric.device, **of_this).train
    torch.manual_seed(0)
    model = ham.models.create("small_cnn", 10, channels=1)
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9))
    noise = torch.Generator().manual_seed(0)
    for epoch in range(1, told.epochs + 1):
        train.set_epoch(epoch)
        for x, y in train:
            loss = ham.ham_loss(model, x, y, eps=EPS, step_size=STEP_SIZE, generator=noise)
            optimizer.zero_grad()
            fabric.backward(loss)
            optimizer.step()
    fabric.print(f"loss {loss.item():.3f} on the last rows of process 0")
    if told.out and fabric.global_rank == 0:
        torch.save(model.module.state_dict(), told.out)


if __name__ == "__main__":
    main()
