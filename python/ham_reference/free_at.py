"""Free-AT (Shafahi et al., NeurIPS 2019, arXiv 1904.12843): a perturbation moved by the gradients of the updates."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .base import training


class FreeAT:
    """`step` makes `replays` updates of one batch; the perturbation of each place in a batch stays."""

    def __init__(self, eps, replays=8):
        self.eps, self.replays = eps, replays
        self.delta = None  # (places, C, H, W)

    def step(self, model, optimizer, x, y):
        """Returns the loss of each update."""
        self.make_room(x)
        losses = []
        for _ in range(self.replays):
            delta = self.delta[: len(x)].clone().requires_grad_()
            with training(model, frozen_bn=len(x) == 1):
                loss = F.cross_entropy(model((x + delta).clamp(0, 1)), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            moved = delta.detach() + self.eps * delta.grad.sign()
            self.delta[: len(x)] = moved.clamp(-self.eps, self.eps)
            losses.append(loss.item())
        return losses

    def make_room(self, x):
        known = 0 if self.delta is None else len(self.delta)
        if known < len(x):
            more = torch.zeros_like(x[known:])
            self.delta = more if self.delta is None else torch.cat([self.delta, more])
