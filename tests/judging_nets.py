"""Models worth judging."""

from __future__ import annotations

import functools

import torch
from nets import sgd, small_cnn
from torch import Tensor, nn

import ham_kernels as ham

EPS, STEP_SIZE = 0.2, 0.05  # on the digits


def varied_cnn(x: Tensor, seed: int = 0) -> nn.Module:
    """Untrained, in train mode, but with different classes for different images: its mean logits are taken off."""
    model = small_cnn(seed).eval()
    with torch.no_grad():
        model[-1].bias -= model(x).mean(0)
    return model.train()


@functools.cache
def digits() -> ham.data.ImageSet:
    return ham.data.digits()


def digit_batches(images: int = 517) -> list[tuple[Tensor, Tensor]]:
    """Test images, in batches of 256."""
    x, y = digits().x_test[:images].float() / 255, digits().y_test[:images]
    return list(zip(x.split(256), y.split(256), strict=True))


@functools.cache
def robust_cnn(seed: int = 0) -> nn.Module:
    """A small CNN after some epochs of PGD-AT on the digits. Shared: leave it as it is."""
    model = small_cnn(seed)
    trainer = ham.HAMTrainer(
        model, sgd(model, 0.1), eps=EPS, step_size=STEP_SIZE, steps=4, screen_steps=1, early_drop=False,
        reweight=False, seed=seed,
    )  # fmt: skip
    x, y = digits().x_train, digits().y_train
    trainer.fit(ham.data.Batches(x, y, 64, shuffle=True, seed=seed), epochs=5)
    return model
