"""Objectives from a few words, and one of any loss."""

from __future__ import annotations

from ham_kernels.attack.pgd import PGD
from ham_kernels.methods import FGSMRS, NFGSM, PGDAT, Natural, Objective
from ham_kernels.methods.batch_loss import ham_or_pgd_at
from ham_kernels.methods.mining import Examples


def ham(pgd: PGD, screen_steps: int = 3, lam: float = 1.0, **switches) -> Objective:
    """HAM; with early_drop and reweight off, PGD-AT."""
    switches = {"early_drop": True, "reweight": True, **switches}
    return Objective(ham_or_pgd_at(screen_steps=screen_steps, lam=lam, **switches), pgd)


def fgsm_rs(pgd: PGD) -> Objective:
    return Objective(FGSMRS(), pgd)


def n_fgsm(pgd: PGD, noise: float = 2.0) -> Objective:
    return Objective(NFGSM(noise=noise), pgd)


def natural() -> Objective:
    return Objective(Natural(), PGD())


class WithLoss(Objective):
    """PGD-AT with another loss(model, examples)."""

    def __init__(self, loss):
        super().__init__(PGDAT(), PGD())
        self.loss = loss


def keep(rows: str = "all", screen_steps: int = 3, rest: bool = False, **switches) -> dict:
    """Which rows stay, as switches of HAM."""
    if rows == "all":
        return {"early_drop": False}
    return {"rows": rows, "screen_steps": screen_steps, "bn_rows": "all" if rest else "hard", **switches}


def mine_group(model, x, y, pgd: PGD, kept: dict, lam: float | None, *, sizes, **how) -> list[Examples]:
    """What HAM makes of several batches, one after the other in x and y; weights by lam, or none."""
    switches = {**kept, "reweight": lam is not None, "lam": 1.0 if lam is None else lam}
    return ham(pgd, **{"screen_steps": 1, **switches}).group_examples(model, x, y, sizes, **how)


def mine(model, x, y, pgd: PGD, kept: dict, lam: float | None, **how) -> Examples:
    return mine_group(model, x, y, pgd, kept, lam, sizes=(len(y),), **how)[0]
