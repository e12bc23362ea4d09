"""One-step adversarial training: 2 + 3 full-batch forwards a batch, where PGD-AT takes 2K + 3.

Both recipes can overfit to their own attack and lose all robustness within an epoch (overfitting.py tells). The model
is in eval mode during the attack, as everywhere here; the authors' code leaves it in train mode, where the attack sees
the batch's own BatchNorm statistics and moves the running ones.
"""

from __future__ import annotations

from dataclasses import replace

from .. import _check
from ..active import PGD
from .base import Recipe

RS_STEP = 1.25  # times eps
EVERYWHERE = 1.0  # an L-inf ball of this radius around an image holds all images


def fgsm_rs(pgd: PGD) -> Recipe:
    """FGSM-RS (Wong, Rice and Kolter, "Fast is better than free", ICLR 2020, arXiv 2001.03994).

    Starts uniformly in the eps-ball, takes one step of 1.25 eps along the gradient's sign, goes back to the eps-ball
    and to [0, 1]. Overfits at large eps (Andriushchenko and Flammarion, arXiv 2007.02617): prefer n_fgsm there.

    Args:
        pgd: its eps (>= 0, in units of the images; 0 trains on clean images) and loss are used; step size, number of
            steps and start are replaced.
    Raises: ValueError naming norm where it is not "linf".
    """
    _check_linf(pgd)
    return Recipe(replace(pgd, step_size=RS_STEP * pgd.eps, steps=1, random_start=True, start_eps=None))


def n_fgsm(pgd: PGD, noise: float = 2.0) -> Recipe:
    """N-FGSM (de Jorge et al., "Make some noise", NeurIPS 2022, arXiv 2202.01181).

    Adds noise uniform in [-noise * eps, noise * eps], clips to [0, 1], takes one step of eps along the gradient's
    sign, clips to [0, 1]. It is not projected: an example may be (noise + 1) * eps away from its image. So the `pgd`
    of the recipe is no budget to evaluate at: its radius is one at which the projection does nothing.

    Args:
        pgd: its eps (a number >= 0, in units of the images; 0 trains on clean images) and loss are used.
        noise: >= 0, in units of eps. The paper takes 2, and 3 for SVHN at eps = 12/255; 0 is FGSM.
    Raises: TypeError, ValueError naming noise; TypeError naming eps where it differs from row to row; ValueError naming
        norm where it is not "linf".
    """
    _check_linf(pgd)
    eps, noise = _check.real("eps", pgd.eps), _check.real("noise", noise)
    return Recipe(replace(pgd, eps=EVERYWHERE, step_size=eps, steps=1, random_start=True, start_eps=noise * eps))


def _check_linf(pgd: PGD) -> None:
    if pgd.norm != "linf":
        raise ValueError(f"norm: got {pgd.norm!r}; FGSM-RS and N-FGSM are defined for 'linf' only")
