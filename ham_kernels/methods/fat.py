"""Friendly-AT (Zhang et al., ICML 2020, arXiv 2002.11242): rows stay at their first errors, and none is attacked far.

A row stays where the look before a step finds it wrong for the time number tau + 1; tau begins with 0 and grows by 1
in each epoch of tau_from. The loss is that of PGD-AT, TRADES or MART at these points. HAM spends its steps on the
rows that this one stops: a baseline, whose worst class is among the lowest under AutoAttack. Rows that stay are
masked, and not taken out of the attack, so that it costs what its base does, 2K + 3, 2K + 7 or 2K + 6; taken out, 2K
would be twice the sum of the shares that go on.

As released; the paper itself was not read. Differences from the authors' code: no noise of 0.001 N(0, 1) is added after
each step on PGD-AT; the attack on TRADES and MART starts uniformly in the eps-ball as everywhere here (theirs:
0.001 * N(0, 1)); rows keep their order. The default of tau_from is theirs on PGD-AT, of 120 epochs, on every base; on
TRADES they have 31 51 71 of 85 epochs, on MART 21 41 61 81 of 90.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from annotated_types import Ge

from ..common.field_types import Words
from .settings import Method


@dataclass(frozen=True)
class FAT(Method):
    """Friendly-AT. With early_drop, rows wrong at x^M stay there while tau is 0: all train on their weakest points."""

    name = "fat"
    title = "Friendly-AT"
    course = 120

    base: Annotated[
        Literal["pgd_at", "trades", "mart"], Words(by_value=(("trades", "on TRADES"), ("mart", "on MART")))
    ] = "pgd_at"
    """Whose attack and loss it has. On mart the cross entropy is the boosted one, whatever loss says."""
    beta: Annotated[float | None, Ge(0), Words("β={}")] = None
    """Weight of the divergence. None (TOML: false): 6 on trades, 5 on mart; pgd_at has none."""
    tau_from: Annotated[tuple[int, ...], Ge(1), Words("τ from epochs {}", off=(), scales=True)] = (51, 91)
    """Epochs (1-based) from each of which on a row may be wrong once more before it stays; none: it stays at once."""

    @property
    def target_forwards(self) -> float:
        return 1 if self.base == "trades" else 0

    @property
    def update_forwards(self) -> float:
        return 3 if self.base == "pgd_at" else 6

    def check(self) -> None:
        super().check()
        if self.base == "pgd_at" and self.beta is not None:
            raise ValueError(f"beta: got {self.beta} with base='pgd_at', whose loss has no divergence")

    def attack(self, pgd):
        return replace(pgd, loss="kl" if self.base == "trades" else "ce", patience=0)

    def attack_on(self, pgd, y, memory):
        return replace(pgd, patience=sum(memory.epoch >= epoch for epoch in self.tau_from))

    def loss_of(self, model, examples, memory):
        from .losses import BETAS, adversarial_ce, logits_at, two_terms, weighted_mean

        if self.base == "pgd_at":
            return adversarial_ce(self, model, examples)
        clean, adversarial = logits_at(model, examples, examples.x), logits_at(model, examples, examples.x_adv)
        ce, divergence = two_terms(self, self.base, clean, adversarial, examples.y)
        beta = BETAS[self.base] if self.beta is None else self.beta
        return weighted_mean(ce + beta * divergence, examples.weights)
