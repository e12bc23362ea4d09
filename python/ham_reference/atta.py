"""ATTA (Zheng et al., CVPR 2020, arXiv 1912.11969): attacks that go on from epoch to epoch, through crops and flips."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .base import training
from .method import evaluating, input_gradient, pgd_step


class ATTA:
    """`step` makes one update; what each image's attack has reached is kept in the coordinates of the padded image."""

    def __init__(self, images, pad, eps, step_size, k=1, reset_every=10):
        """images: all of them, (n, C, H, W) in [0, 1]; pad: zeros around them that a window may show."""
        self.images, self.pad = images, pad
        self.eps, self.step_size, self.k, self.reset_every = eps, step_size, k, reset_every
        self.kept = torch.zeros_like(F.pad(images, (pad,) * 4))

    def step(self, model, optimizer, numbers, windows, y):
        """numbers: which images; windows: of each its top line, its left column, and whether it is mirrored."""
        clean = F.pad(self.images, (self.pad,) * 4)
        x = torch.stack([self.window(clean[i], *w) for i, w in zip(numbers, windows, strict=True)])
        start = torch.stack([self.window(self.kept[i], *w) for i, w in zip(numbers, windows, strict=True)])
        x_adv = (x + start).clamp(0, 1)
        with evaluating(model):
            for _ in range(self.k):
                _, gradient = input_gradient(model, x_adv, y)
                x_adv = pgd_step(x_adv, x, gradient, self.eps, self.step_size, "linf")
        for i, (top, left, mirrored), delta in zip(numbers, windows, x_adv - x, strict=True):
            delta = delta.flip(2) if mirrored else delta
            height, width = delta.shape[1:]
            self.kept[i][:, top : top + height, left : left + width] = delta.half().float()
        with training(model):
            loss = F.cross_entropy(model(x_adv), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item(), x_adv

    def window(self, image, top, left, mirrored):
        height, width = self.images.shape[2:]
        seen = image[:, top : top + height, left : left + width]
        return seen.flip(2) if mirrored else seen

    def end_epoch(self, epoch):
        if (epoch + 1) % self.reset_every == 0:
            self.kept.zero_()
