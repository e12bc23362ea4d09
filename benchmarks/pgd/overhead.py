"""How much of a training step is not the model's forward and backward."""

from __future__ import annotations

import argparse
import statistics
import time
from unittest import mock

import torch

import ham_kernels as ham
from ham_kernels.data import FileSet, ImageSet, part_loader
from ham_kernels.models import SmallCNN

STEPS = 20


def overhead(images: ImageSet | FileSet, args: argparse.Namespace) -> dict:
    """Share of a PGD-AT step of SmallCNN on the CPU that passes outside the model's forwards and backwards.

    A clock around each forward of the model, each torch.autograd.grad and the backward of the loss adds up the inside
    of a step, while another one times the whole step: both see the same moment of the machine.
    """
    x, y = next(iter(part_loader(images, "train", args.batch_size)))
    torch.manual_seed(0)
    model = SmallCNN(x.shape[1], len(images.classes))
    trainer = ham.HAMTrainer(
        model, torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=2e-4), eps=args.eps,
        step_size=args.step_size, steps=args.steps, screen_steps=args.screen_steps, early_drop=False, reweight=False,
    )  # fmt: skip
    inside = 0.0

    def clocked(work):
        def call(*args, **kwargs):
            nonlocal inside
            start = time.perf_counter()
            try:
                return work(*args, **kwargs)
            finally:
                inside += time.perf_counter() - start

        return call

    shares = []
    model.forward = clocked(model.forward)
    with (
        mock.patch.object(torch.autograd, "grad", clocked(torch.autograd.grad)),
        mock.patch.object(torch.Tensor, "backward", clocked(torch.Tensor.backward)),
    ):
        for _ in range(STEPS + 2):
            inside, start = 0.0, time.perf_counter()
            trainer.train_step(x, y, epoch=1)
            shares.append(1 - inside / (time.perf_counter() - start))
    return {
        "share": statistics.median(shares[2:]),
        "quartiles": statistics.quantiles(shares[2:], n=4)[::2],
        "how": f"SmallCNN on the CPU, batch {len(y)}, median of {STEPS} steps with a clock around each forward and "
        "backward of the model",
    }
