"""Adversarial examples from one gradient: FGSM-RS and N-FGSM."""

from __future__ import annotations

import torch

from . import noise as random
from .method import evaluating, input_gradient


def fgsm_rs(model, x, y, *, eps, seed, step):
    """Random start in the eps-ball, a step of 1.25 eps, back to the ball (arXiv 2001.03994)."""
    start = (x + random.in_cube(x, eps, seed, step)).clamp(0, 1)
    with evaluating(model):
        _, gradient = input_gradient(model, start, y)
    x_adv = start + 1.25 * eps * gradient.sign()
    return torch.min(torch.max(x_adv, x - eps), x + eps).clamp(0, 1)


def n_fgsm(model, x, y, *, eps, noise=2.0, seed, step):
    """Strong noise around the image, a step of eps from there, no projection (arXiv 2202.01181)."""
    start = (x + random.in_cube(x, noise * eps, seed, step)).clamp(0, 1)
    with evaluating(model):
        _, gradient = input_gradient(model, start, y)
    return (start + eps * gradient.sign()).clamp(0, 1)
