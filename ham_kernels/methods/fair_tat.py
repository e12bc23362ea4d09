"""FAIR-TAT (Medi, Jung and Keuper, WACV 2025, arXiv 2410.23142): PGD-AT on attacks towards the classes that mislead.

Each row is attacked towards another class, drawn from softmax(temperature * f), f_c the share of the last epoch's
errors under attack that fell on class c; uniformly in the first epoch. eps of a class is (lam_eps + r_c) * eps, r_c the
share of its rows that resisted in the last epoch, and the weight average is gated, as in CFA. The loss is the cross
entropy of the label. Cost: as PGD-AT, 2K + 3, and one row's forward once, which tells how many classes there are.

The formulas are those of the authors' code for PGD-AT, with the options that its README names; its TRADES and FAT are
commented out there, and left out here. Differences from it: f and r_c are of the attack's last look in eval mode, and
shares of classes, so that those need not be of one size (theirs: counts, of the update's logits); their attack runs in
train mode, and moves BatchNorm. Since attacks towards a class are weak, eps_c is mostly above eps: judge at eps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from annotated_types import Ge, Le

from ..common.field_types import Words
from .settings import Method


@dataclass(frozen=True)
class FAIRTAT(Method):
    """FAIR-TAT. With screening, rows that resist M steps towards their class leave."""

    name = "fair_tat"
    title = "FAIR-TAT"
    looks_at_classes = True
    treats_classes = True
    remembers_first = True
    course = 200

    temperature: Annotated[float, Ge(0), Words("targets by {}")] = 2.0
    """Of the shares in the softmax that targets are drawn from; 0: uniformly."""
    adaptive_eps: Annotated[bool, Words(by_value=((False, "ε alike"),))] = True
    """Classes have an eps of their own."""
    lam_eps: Annotated[float, Ge(0), Words("λ of ε={}", needs="adaptive_eps")] = 0.5
    """eps of a class = (lam_eps + its accuracy) * eps."""
    class_from: Annotated[int, Ge(1), Words("classes from epoch {}", off=1, scales=True)] = 2
    """First epoch (1-based) with targets and eps by class."""
    gate: Annotated[float, Ge(0), Le(1), Words("gate {}", off=0.0)] = 0.2
    """The weight average takes the next epoch's updates where the worst class of the validation images reaches this."""

    def attack(self, pgd):
        return replace(pgd, loss="target")

    def remembers(self, classes):
        import torch

        own = {
            "tat_confused": torch.zeros(classes, classes),  # of the epoch under way: row j, the rows of class j
            "tat_counts": torch.zeros(classes),
            "tat_odds": torch.ones(classes),  # of targets
            "tat_eps": torch.ones(classes),  # times eps
        }
        return super().remembers(classes) | own

    def attack_on(self, pgd, y, memory):
        from .class_weights import for_rows

        pgd = replace(pgd, target=drawn_targets(memory.tat_odds, y, *memory.noise))
        return replace(pgd, eps=for_rows(memory.tat_eps, y) * pgd.eps) if self.adaptive_eps else pgd

    def observe(self, examples, memory):
        from torch.nn import functional as F

        from .class_weights import by_class, is_hard

        super().observe(examples, memory)
        z, y = examples.look.z, examples.look.y
        taken = F.one_hot(z.argmax(1), z.shape[1]) * is_hard(z, y)[:, None]
        confused, counts = by_class(taken, y, len(memory.tat_counts), examples.ranks)
        memory.tat_confused += confused
        memory.tat_counts += counts

    def end_epoch(self, end, memory):
        import torch

        super().end_epoch(end, memory)
        if end.epoch + 1 >= self.class_from:
            counts = memory.tat_counts
            shares = memory.tat_confused / counts[:, None].clamp_min(1)
            fallen = shares.sum(0) / shares.sum().clamp_min(1e-30)
            memory.tat_odds.copy_(torch.softmax(self.temperature * fallen, 0))
            memory.tat_eps.copy_(torch.where(counts > 0, self.lam_eps + 1 - shares.sum(1), 1.0))
        memory.tat_confused.zero_()
        memory.tat_counts.zero_()


def drawn_targets(odds, y, seed, step, first_row=0):
    """(n, classes), one 1 in each row, at a class that is not the label, drawn by the odds (classes,)."""
    import torch
    from torch.nn import functional as F

    from ..ops._philox import TARGETS, philox_uniform

    classes = len(odds)
    is_label = y[:, None] == torch.arange(classes, device=odds.device)
    reached = odds.double().expand(len(y), classes).masked_fill(is_label, 0).cumsum(1)
    u = philox_uniform(len(y), 1, seed, step, TARGETS, odds.device, first_row)[0].double()
    drawn = (reached <= u * reached[:, -1:]).sum(1).clamp_max(classes - 1)
    return F.one_hot(drawn, classes).float()
