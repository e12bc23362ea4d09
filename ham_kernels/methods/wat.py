"""WAT (Li and Liu, AAAI 2023, arXiv 2302.04025): TRADES, classes weighed by their cost so far.

C + 1 experts, the classes and the average of all rows: w = C * softmax(eta * total cost) over them; a row's loss
CE + beta * KL has the weight w_y + w_average. Costs are the same two terms by class.

Differences from the authors' code: costs come from what the attack sees of the training rows in eval mode, and are
free, 2K + 7 (theirs: a TRADES attack on 300 held-out images per class after each epoch, + 1.5); they are means, so that
classes need not be of one size; the weights are in the checkpoint; the exponentials cannot overflow; and the first
epoch has the weights of the formula, which theirs has 1.1 times as large.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from ..common.field_types import Words
from .trades import TRADES


@dataclass(frozen=True)
class WAT(TRADES):
    """WAT."""

    name = "wat"
    title = "WAT"
    looks_at_classes = True
    treats_classes = True
    scales_weights = False
    course = 100

    eta: Annotated[float, Ge(0), Words("η={}")] = 0.1
    """Of the exponentials."""

    def remembers(self, classes):
        import torch

        own = {
            "wat_sums": torch.zeros(classes, 1),  # of the epoch under way
            "wat_counts": torch.zeros(classes),
            "wat_totals": torch.zeros(classes + 1),  # over the epochs done; the average of all rows last
        }
        return super().remembers(classes) | own

    def observe(self, examples, memory):
        from torch.nn import functional as F

        from .class_weights import by_class, labels_of

        super().observe(examples, memory)
        look = examples.look
        log_q = look.target.clamp_min(1e-30).log()
        ce = -log_q.masked_fill(~labels_of(look.z, look.y), 0).sum(1)
        kl = (look.target * (log_q - F.log_softmax(look.z, 1))).sum(1)
        sums, counts = by_class((ce + self.beta * kl)[:, None], look.y, len(memory.wat_counts), look.ranks)
        memory.wat_sums += sums
        memory.wat_counts += counts

    def weights(self, examples, memory):
        from .class_weights import expert_weights

        eta = self.eta if memory.epoch >= self.class_from else 0.0
        return self.weights_with(expert_weights(memory.wat_totals, eta), examples, memory)

    def end_epoch(self, end, memory):
        from .class_weights import add_epoch

        super().end_epoch(end, memory)
        add_epoch(memory.wat_totals, memory.wat_sums, memory.wat_counts)
