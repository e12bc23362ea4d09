"""CFA (Wei et al., CVPR 2023, arXiv 2303.14460): eps and beta of each class by its accuracy, and a gated average.

r_c is the share of class c's training rows that resisted in the last epoch, under the eps of the class. Then
eps_c = (lam_eps + r_c) * eps, and on TRADES beta_c = (lam_beta + r_c) * beta in (CE + beta_c KL) / (1 + beta_c).
`gate` is its FAWA: the weight average takes updates only where the worst class of the validation images is good enough;
the paper's ablation has as much from it as from the classes. Cost: as its base, 2K + 7 or 2K + 3. On TRADES the loss is
about 1 / (1 + beta) of that of TRADES itself, so that the same learning rate moves the weights that much less.

Differences from the authors' code: r_c is of the attack's last look in eval mode (theirs: the update's logits; on AT
their attack runs in train mode, and moves BatchNorm); the average is taken per update (theirs: per epoch); lam_eps is
the paper's, 0.3 on TRADES and 0.5 on AT (theirs: 0.5 for both). Where eps_c is above eps, judge at eps all the same.
Steps stay as they are told; with step_sizes they are in units of the class's own eps.
With screening, rows that stop or jump suit it: a smaller eps lets hard classes leave sooner, and drop takes their
weight.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from annotated_types import Ge, Le

from ..common.field_types import Words
from .trades import TRADES

_LAM_EPS = {"trades": 0.3, "pgd_at": 0.5}


@dataclass(frozen=True)
class CFA(TRADES):
    """CFA."""

    name = "cfa"
    title = "CFA"
    looks_at_classes = True
    treats_classes = True
    course = 200

    base: Annotated[Literal["trades", "pgd_at"], Words(by_value=(("pgd_at", "on PGD-AT"),))] = "trades"
    """Whose attack and loss it has; beta is of trades alone."""
    lam_eps: Annotated[float | None, Ge(0), Words("λ of ε={}")] = None
    """eps of a class = (lam_eps + its accuracy) * eps. None (TOML: false): 0.3 on trades, 0.5 on pgd_at."""
    lam_beta: Annotated[float, Ge(0), Words("λ of β={}")] = 0.5
    """beta of a class = (lam_beta + its accuracy) * beta."""
    class_from: Annotated[int, Ge(1), Words("classes from epoch {}", scales=True)] = 10
    """First epoch (1-based) with eps and beta by class."""
    gate: Annotated[float, Ge(0), Le(1), Words("gate {}", off=0.0)] = 0.2
    """The weight average takes the next epoch's updates where the worst class of the validation images reaches this."""

    def idle(self):
        return super().idle() | ({"beta", "lam_beta"} if self.base == "pgd_at" else set())

    @property
    def target_forwards(self) -> float:
        return 1 if self.base == "trades" else 0

    @property
    def update_forwards(self) -> float:
        return 6 if self.base == "trades" else 3

    def attack(self, pgd):
        return super().attack(pgd) if self.base == "trades" else pgd

    def remembers(self, classes):
        import torch

        own = {
            "cfa_right": torch.zeros(classes, 1),  # of the epoch under way
            "cfa_counts": torch.zeros(classes),
            "cfa_eps": torch.ones(classes),  # times eps, in the next
            "cfa_beta": torch.ones(classes),
        }
        return super().remembers(classes) | own

    def attack_on(self, pgd, y, memory):
        from .class_weights import for_rows

        return replace(pgd, eps=for_rows(memory.cfa_eps, y) * pgd.eps) if memory.has_memory else pgd

    def observe(self, examples, memory):
        from .class_weights import by_class, is_hard

        super().observe(examples, memory)
        look = examples.look
        right, counts = by_class(~is_hard(look.z, look.y)[:, None], look.y, len(memory.cfa_counts), look.ranks)
        memory.cfa_right += right
        memory.cfa_counts += counts

    def loss_of(self, model, examples, memory):
        from .class_weights import for_rows
        from .losses import adversarial_ce, weighted_mean

        if self.base == "pgd_at":
            return adversarial_ce(self, model, examples)
        ce, kl = self.terms(model, examples)
        beta = self.beta * for_rows(memory.cfa_beta, examples.y)
        return weighted_mean((ce + beta * kl) / (1 + beta), examples.weights)

    def end_epoch(self, end, memory):
        import torch

        super().end_epoch(end, memory)
        if end.epoch + 1 >= self.class_from:
            counts = memory.cfa_counts
            accuracy = memory.cfa_right[:, 0] / counts.clamp_min(1)
            lam_eps = _LAM_EPS[self.base] if self.lam_eps is None else self.lam_eps
            memory.cfa_eps.copy_(torch.where(counts > 0, lam_eps + accuracy, 1.0))
            memory.cfa_beta.copy_(torch.where(counts > 0, self.lam_beta + accuracy, 1.0))
        memory.cfa_right.zero_()
        memory.cfa_counts.zero_()
