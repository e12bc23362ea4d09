"""What the losses of methods are made of."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..common import checks
from ..ops import weighted_cross_entropy
from .class_weights import cross_entropy, labels_of
from .mining import Examples
from .settings import Method

# MART's: they keep the logarithms finite where a class has all of the probability, and a weight above 0
ABOVE_ONE, NEXT_ABOVE_ONE, TINY = 1.0001, 1.0000001, 1e-12


def logits_at(model: nn.Module, examples: Examples, x: Tensor) -> Tensor:
    """Logits in fp32 of images of examples; the rest of the batch passes through the model beside them."""
    rest = examples.rest_x if x is examples.x else examples.rest
    z = model(x if rest is None else torch.cat([x, rest]))
    checks.model_output(z, len(x) if rest is None else len(x) + len(rest))
    return z[: len(x)].float()


def weighted_mean(losses: Tensor, weights: Tensor | None) -> Tensor:
    """sum_i w_i * losses_i / n; 0 of no row."""
    losses = losses if weights is None else losses * weights
    return losses.mean() if len(losses) else losses.sum()


def row_ce(method: Method, z: Tensor, y: Tensor) -> Tensor:
    """(n,): the cross entropy that the method's `loss` and `label_smoothing` name, of logits in fp32."""
    ce, s = cross_entropy(z, y), method.label_smoothing
    if s:
        ce = (1 - s) * ce - s * F.log_softmax(z, 1).mean(1)
    if method.loss == "boosted_ce":
        ce = ce - torch.log(ABOVE_ONE - F.softmax(z, 1).masked_fill(labels_of(z, y), 0).amax(1))
    return ce


def adversarial_ce(method: Method, model: nn.Module, examples: Examples) -> Tensor:
    """sum_i w_i * CE_i / n_kept at x_adv; fused, where it is the plain one."""
    if method.loss == "ce" and not method.label_smoothing:
        return weighted_ce(model, examples)
    z = logits_at(model, examples, examples.x_adv)
    return weighted_mean(row_ce(method, z, examples.y), examples.weights)


def weighted_ce(model: nn.Module, examples: Examples) -> Tensor:
    """sum_i w_i * CE(f(x_adv_i), y_i) / n_kept, fused. Rows in `rest` pass through the model, and have no loss."""
    x = examples.x_adv if examples.rest is None else torch.cat([examples.x_adv, examples.rest])
    logits = model(x)
    checks.model_output(logits, len(x))
    return weighted_cross_entropy(logits[: examples.n_kept], examples.y, examples.weights)


def softened(z: Tensor, temperature: float | Tensor) -> Tensor:
    """(n, classes): log softmax of logits divided by a temperature, or by one for each row."""
    return F.log_softmax(z / (temperature[:, None] if isinstance(temperature, Tensor) else temperature), 1)


def divergence(clean: Tensor, adversarial: Tensor) -> Tensor:
    """(n,): KL(softmax(clean) || softmax(adversarial)), whose gradient stays finite where a clean probability is 0."""
    return F.kl_div(F.log_softmax(adversarial, 1), F.log_softmax(clean, 1), reduction="none", log_target=True).sum(1)


def unsure_divergence(clean: Tensor, adversarial: Tensor, y: Tensor) -> Tensor:
    """(n,): (1 - p_y(x)) KL(p(x) || p(x')) of logits in fp32, as MART has it."""
    log_q = F.log_softmax(clean, 1)
    q = log_q.exp()
    kl = (q * (log_q - torch.log(F.softmax(adversarial, 1) + TINY))).sum(1)
    return (NEXT_ABOVE_ONE - q.masked_fill(~labels_of(q, y), 0).sum(1)) * kl


def two_terms(method: Method, base: str, clean: Tensor, adversarial: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(n,) each, of logits in fp32: cross entropy and divergence, before beta, as TRADES or MART has them."""
    if base == "trades":
        return row_ce(method, clean, y), divergence(clean, adversarial)
    return row_ce(replace(method, loss="boosted_ce"), adversarial, y), unsure_divergence(clean, adversarial, y)
