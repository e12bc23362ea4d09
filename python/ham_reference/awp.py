"""Adversarial weight perturbation (Wu et al., NeurIPS 2020)."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import torch


@contextmanager
def perturbed(model, loss_of, gamma):
    """The weights are moved up the loss inside a with block, each by gamma times its norm, and back by as much after.

    `loss_of(model)` is the loss of the update. It is taken of a copy, so that no running statistics move.
    """
    if gamma == 0:
        yield
        return
    proxy = copy.deepcopy(model)
    parameters = {name: p for name, p in proxy.named_parameters() if "weight" in name and p.dim() > 1}
    gradients = torch.autograd.grad(loss_of(proxy), list(parameters.values()))
    shifts = {
        name: gamma * p.detach().norm() / (g.norm() + 1e-20) * g
        for (name, p), g in zip(parameters.items(), gradients, strict=True)
    }
    move(model, shifts, 1)
    try:
        yield
    finally:
        move(model, shifts, -1)


@torch.no_grad()
def move(model, shifts, sign):
    for name, p in model.named_parameters():
        if name in shifts:
            p.add_(shifts[name], alpha=sign)
