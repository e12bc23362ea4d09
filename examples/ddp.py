"""HAM in a loop of one's own, on several processes, by torch's DistributedDataParallel.

    torchrun --standalone --nproc-per-node 2 examples/ddp.py

Without torchrun it trains the same model in one process. The loss is that of the whole batch: the wrapper's mean over
the processes gives its gradient, whatever rows fall to each.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

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
    device = "cuda" if torch.cuda.is_available() else "cpu"  # start() has made the process's own GPU the current one
    loaders = ham.data.loaders(images, 64, augment="none", device=device, rank=ranks.rank, world=ranks.world)
    torch.manual_seed(0)
    model = ham.models.create("small_cnn", 10, channels=1).to(device)
    wrapped = nn.parallel.DistributedDataParallel(model) if ranks.several else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    noise = torch.Generator().manual_seed(0)
    for epoch in range(1, told.epochs + 1):
        loaders.train.set_epoch(epoch)
        for x, y in loaders.train:
            loss = ham.ham_loss(wrapped, x, y, eps=EPS, step_size=STEP_SIZE, generator=noise)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    found = ham.evaluate(wrapped, loaders.test, ("clean", "pgd20"), eps=EPS, step_size=STEP_SIZE)
    if ranks.rank == 0:
        print("  ".join(f"{name} {100 * a.accuracy:.1f} %" for name, a in found.items()))
        if told.out:
            torch.save(model.state_dict(), told.out)
    ham.distributed.stop()


if __name__ == "__main__":
    main()
