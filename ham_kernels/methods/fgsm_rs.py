"""FGSM-RS (Wong, Rice and Kolter, "Fast is better than free", ICLR 2020, arXiv 2001.03994): 2 + 3 forwards a batch.

It can overfit to its own attack and lose all robustness within an epoch, at large eps most of all (Andriushchenko and
Flammarion, arXiv 2007.02617): prefer N-FGSM there. The model is in eval mode during the attack, as everywhere here; the
authors' code leaves it in train mode, where the attack moves BatchNorm's running statistics.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .settings import Method

STEP = 1.25  # times eps


@dataclass(frozen=True)
class FGSMRS(Method):
    """FGSM-RS: a uniform start, one step of 1.25 eps along the gradient's sign, back to the ball and to [0, 1]."""

    name = "fgsm_rs"
    title = "FGSM-RS"
    one_step = True

    def attack(self, pgd):
        check_linf(self, pgd)
        return replace(pgd, step_size=STEP * pgd.eps, steps=1, step_sizes=(), random_start=True, start_eps=None)


def check_linf(method: Method, pgd) -> None:
    if pgd.norm != "linf":
        raise ValueError(f"norm: got {pgd.norm!r}; {method.title} is defined for 'linf' only")
