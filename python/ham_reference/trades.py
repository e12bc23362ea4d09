"""TRADES (Zhang et al., arXiv 1901.08573) as its paper writes it: attack on a divergence, two terms in the loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from .base import PGDAT
from .losses import row_divergence
from .method import draw_seed, evaluating, is_hard, pgd_step, start_point


def divergence(q, logits):
    """Sum over rows of KL(q || softmax(logits))."""
    return row_divergence(q, logits).sum()


def trades_examples(model, x, *, eps, step_size, steps, norm, seed, step):
    """K steps that raise KL(p(x) || p(x')), from a uniform start."""
    with evaluating(model):
        with torch.no_grad():
            q = F.softmax(model(x), 1)
        x_adv = start_point(x, eps, norm, seed, step)
        for _ in range(steps):
            x_adv = x_adv.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(divergence(q, model(x_adv)), x_adv)
            x_adv = pgd_step(x_adv.detach(), x, gradient, eps, step_size, norm)
    return x_adv


def stopped_examples(model, x, y, *, eps, step_size, steps, screen_steps, norm, seed, step):
    """(x_adv, hard): rows that resist the first M steps stop there, and stay in the loss."""
    attack = {"eps": eps, "step_size": step_size, "norm": norm, "seed": seed, "step": step}
    early = trades_examples(model, x, steps=screen_steps, **attack)
    late = trades_examples(model, x, steps=steps, **attack)  # rows do not meet in eval mode
    with evaluating(model), torch.no_grad():
        hard = is_hard(model(early), y)
    return torch.where(hard.view(-1, 1, 1, 1), late, early), hard


def two_terms(model, x, x_adv, y, beta):
    """Mean of CE(f(x), y) + beta * KL(p(x) || p(x')), gradients through both predictions; clean images first."""
    clean, adversarial = model(x), model(x_adv)
    return F.cross_entropy(clean, y) + beta * divergence(F.softmax(clean, 1), adversarial) / len(y)


def trades_loss(model, x, y, *, beta=6.0, eps=8 / 255, step_size=2 / 255, steps=10, norm="linf", generator=None):
    """The loss of one batch."""
    attack = {"eps": eps, "step_size": step_size, "steps": steps, "norm": norm}
    x_adv = trades_examples(model, x, **attack, seed=draw_seed(generator), step=0)
    return two_terms(model, x, x_adv, y, beta)


@dataclass
class TRADES(PGDAT):
    """TRADES with every switch that methods have in common; row weights multiply both terms."""

    beta: float = 6.0

    raises = "kl"

    def each(self, model, x, x_adv, y, w, epoch):
        ce, kl = self.terms(model, x, x_adv, y)
        return w * (ce + self.beta * kl)

    def terms(self, model, x, x_adv, y):
        """(n,) each: cross entropy of the clean images, and divergence from their prediction; clean images first."""
        clean, adversarial = model(x).float(), model(x_adv).float()
        return self.classification(clean, y), row_divergence(F.softmax(clean, 1), adversarial)
