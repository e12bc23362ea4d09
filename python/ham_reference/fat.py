"""Friendly-AT (Zhang et al., ICML 2020, arXiv 2002.11242): rows stay at the first points that the model is wrong at."""

from __future__ import annotations

from dataclasses import dataclass

from .base import PGDAT
from .mart import MART
from .trades import TRADES


@dataclass
class FAT(PGDAT):
    """The loss of PGD-AT, TRADES or MART, each row at its wrong look number tau + 1.

    tau is how many of the epochs tau_from have come.
    """

    base: str = "pgd_at"
    beta: float | None = None
    tau_from: tuple[int, ...] = (51, 91)

    def __post_init__(self):
        super().__post_init__()
        self.raises = "kl" if self.base == "trades" else "ce"
        if self.base != "pgd_at":
            kind, beta = {"trades": (TRADES, 6.0), "mart": (MART, 5.0)}[self.base]
            loss = "boosted_ce" if self.base == "mart" else self.loss
            self.other = kind(
                self.classes, self.eps, self.step_size, self.steps, loss=loss, label_smoothing=self.label_smoothing,
                beta=beta if self.beta is None else self.beta,
            )  # fmt: skip

    def patience(self, epoch):
        return len([e for e in self.tau_from if epoch >= e])

    def each(self, model, x, x_adv, y, w, epoch):
        loss = super() if self.base == "pgd_at" else self.other
        return loss.each(model, x, x_adv, y, w, epoch)
