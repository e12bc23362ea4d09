"""HAM in a LightningModule.

    python examples/lightning_loop.py --devices 2       (pip install lightning)

training_step returns ham_loss of the net that the module holds: Lightning's wrapper is around the module, and takes the
mean of the gradients over the processes. It never returns None, which Lightning forbids on several.
"""

from __future__ import annotations

import argparse

import lightning
import torch

import ham_kernels as ham

EPS, STEP_SIZE = 0.2, 0.05


class Robust(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = ham.models.create("small_cnn", 10, channels=1)
        self.noise = torch.Generator().manual_seed(0)

    def training_step(self, batch, _):
        return ham.ham_loss(self.net, *batch, eps=EPS, step_size=STEP_SIZE, generator=self.noise)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Digits(lightning.LightningDataModule):
    """Ham's loader, which gives each process its rows of every batch."""

    def __init__(self, images: int):
        super().__init__()
        self.images = ham.data.load("digits").subset(images, 100)

    def train_dataloader(self):
        of_this = {"rank": self.trainer.global_rank, "world": self.trainer.world_size}
        loader = ham.data.loaders(self.images, 64, augment="none", **of_this).train
        loader.set_epoch(self.trainer.current_epoch + 1)
        return loader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--out", help="where the weights go")
    told = parser.parse_args()

    robust = Robust()
    trainer = lightning.Trainer(
        max_epochs=told.epochs, devices=told.devices, strategy="ddp" if told.devices > 1 else "auto", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, reload_dataloaders_every_n_epochs=1,
    )  # fmt: skip
    trainer.fit(robust, Digits(told.images))
    if told.out and trainer.is_global_zero:
        torch.save(robust.net.state_dict(), told.out)


if __name__ == "__main__":
    main()
