"""How much of a training step is not the model: a PGD-AT step against the same forwards and backwards alone."""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch
from torch import Tensor, nn

import ham_kernels as ham
from ham_kernels.data import ImageSet
from ham_kernels.engine import attack_mode
from ham_kernels.models import SmallCNN

ROUNDS = 11


def overhead(images: ImageSet, args: argparse.Namespace) -> dict:
    """Share of a step of SmallCNN that is not its K input gradients and its one training forward and backward.

    The bare model runs with the attack's own BatchNorm, so that what that one saves does not hide anything here.
    """
    x = images.x_train[: args.batch_size].float().div(255).to(args.device)
    y = images.y_train[: args.batch_size].to(args.device)
    torch.manual_seed(0)
    model = SmallCNN(x.shape[1], len(images.classes)).to(args.device)
    trainer = ham.HAMTrainer(
        copy.deepcopy(model), torch.optim.SGD(model.parameters(), 0.0), eps=args.eps, step_size=args.step_size,
        steps=args.steps, screen_steps=args.screen_steps, early_drop=False, reweight=False,
    )  # fmt: skip
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), 0.01, momentum=0.9, weight_decay=2e-4)
    whole, bare = [], []
    for _ in range(ROUNDS + 2):
        whole.append(_seconds(lambda: trainer.train_step(x, y, epoch=1), x))
        bare.append(_seconds(lambda: _bare_step(model, x, args.steps), x))
    share = [1 - b / w for w, b in zip(whole[2:], bare[2:], strict=True)]
    return {
        "share": statistics.median(share),
        "quartiles": statistics.quantiles(share, n=4)[::2],
        "how": f"SmallCNN, batch {len(y)}, median of {ROUNDS} pairs of a step and the bare model's work in turn",
    }


def _bare_step(model: nn.Module, x: Tensor, steps: int) -> None:
    with attack_mode(model):
        for _ in range(steps):
            point = x.detach().requires_grad_()
            logits = model(point)
            torch.autograd.grad(logits, point, torch.ones_like(logits))
    model.zero_grad(set_to_none=True)
    logits = model(x)
    logits.backward(torch.ones_like(logits))


def _seconds(work, x: Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
