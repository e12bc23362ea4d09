"""HAM in a loop of Hugging Face Accelerate.

    torchrun --standalone --nproc-per-node 2 examples/accelerate_loop.py       (or: accelerate launch)

`pip install accelerate` first.

Accelerate joins the processes and wraps the model; ham_loss attacks the model inside, and its loss is that of the whole
batch. The loader is ham's, which gives each process its rows of every batch; a DataLoader that Accelerate prepares
serves as well.
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator

import ham_kernels as ham

EPS, STEP_SIZE = 0.2, 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--out", help="where the weights go")
    told = parser.parse_args()

    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    rank, world = accelerator.process_index, accelerator.num_processes
    images = ham.data.load("digits").subset(told.images, 100)
    train = ham.data.loaders(images, 64, augment="none", device=accelerator.device, rank=rank, world=world).train
    torch.manual_seed(0)
    model = ham.models.create("small_cnn", 10, channels=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    model, optimizer = accelerator.prepare(model, optimizer)
    noise = torch.Generator().manual_seed(0)
    for epoch in range(1, told.epochs + 1):
        train.set_epoch(epoch)
        for x, y in train:
            loss = ham.ham_loss(model, x, y, eps=EPS, step_size=STEP_SIZE, generator=noise)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
    accelerator.print(f"loss {loss.item():.3f} on the last rows of process 0")
    if told.out and accelerator.is_main_process:
        torch.save(accelerator.unwrap_model(model).state_dict(), told.out)
    accelerator.end_training()


if __name__ == "__main__":
    main()
