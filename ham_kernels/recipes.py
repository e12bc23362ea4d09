"""The old name of `ham_kernels.methods`, for one version: what a recipe was, an Objective is."""

from __future__ import annotations

import warnings

from .attack.pgd import PGD
from .methods import FGSMRS, NFGSM, PGDAT, Natural, Objective, ham_loss, weighted_ce
from .methods.batch_loss import ham_or_pgd_at

__all__ = ["fgsm_rs", "ham", "ham_loss", "n_fgsm", "natural", "pgd_at", "weighted_ce"]

_MOVED = "ham_kernels.recipes is ham_kernels.methods now, and goes with the next version"
warnings.warn(_MOVED, DeprecationWarning, stacklevel=2)


def ham(
    pgd: PGD, screen_steps: int = 3, lam: float = 1.0, *, early_drop: bool = True, reweight: bool = True, **switches
) -> Objective:
    method = ham_or_pgd_at(screen_steps=screen_steps, lam=lam, early_drop=early_drop, reweight=reweight, **switches)
    return Objective(method, pgd)


def pgd_at(pgd: PGD) -> Objective:
    return Objective(PGDAT(), pgd)


def natural() -> Objective:
    return Objective(Natural(), PGD(0.0, 0.0, 0))


def fgsm_rs(pgd: PGD) -> Objective:
    return Objective(FGSMRS(), pgd)


def n_fgsm(pgd: PGD, noise: float = 2.0) -> Objective:
    return Objective(NFGSM(noise=noise), pgd)
