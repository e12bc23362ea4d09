"""Terms of losses, one number per row, (n,); logits are (n, classes)."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def cross_entropy(logits, y, label_smoothing=0.0):
    """- sum_k t_k log p_k, where t = (1 - s) * onehot(y) + s / C."""
    classes = logits.shape[1]
    target = (1 - label_smoothing) * F.one_hot(y, classes) + label_smoothing / classes
    return -(target * F.log_softmax(logits, 1)).sum(1)


def largest_wrong(p, y):
    """max of p_k over k != y."""
    return p.scatter(1, y[:, None], -torch.inf).amax(1)


def boosted_cross_entropy(logits, y, label_smoothing=0.0):
    """CE - log(1.0001 - max_{k != y} p_k): MART's first term, which also lowers the strongest wrong class."""
    rival = largest_wrong(F.softmax(logits, 1), y)
    return cross_entropy(logits, y, label_smoothing) - torch.log(1.0001 - rival)


def row_divergence(q, logits):
    """KL(q || softmax(logits)) of each row, (n,), by its definition; 0 * log 0 is 0."""
    log_q = torch.where(q > 0, q, 1.0).log()
    return (q * (log_q - F.log_softmax(logits, 1))).sum(1)


CLASSIFICATION = {"ce": cross_entropy, "boosted_ce": boosted_cross_entropy}
