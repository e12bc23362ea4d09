"""N-FGSM (de Jorge et al., "Make some noise", NeurIPS 2022, arXiv 2202.01181): 2 + 3 forwards a batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from annotated_types import Ge

from ..common.field_types import Words
from .fgsm_rs import check_linf
from .settings import Method

EVERYWHERE = 1.0  # an L-inf ball of this radius around an image holds all images


@dataclass(frozen=True)
class NFGSM(Method):
    """N-FGSM: noise around the image, clipped to [0, 1], then one step of eps along the gradient's sign, clipped.

    It is not projected: an example may be (noise + 1) * eps away from its image. So its attack is no budget to
    evaluate at: the radius of that is one at which the projection does nothing.
    """

    name = "n_fgsm"
    title = "N-FGSM"
    one_step = True

    noise: Annotated[float, Ge(0), Words("noise {} ε")] = 2.0
    """Radius of the noise, in units of eps: 2 in the paper, 3 for SVHN at eps 12/255; 0 is FGSM."""

    def attack(self, pgd):
        check_linf(self, pgd)
        if not isinstance(pgd.eps, (int, float)):
            raise TypeError(f"eps: got {type(pgd.eps).__name__}; N-FGSM takes one number for all rows")
        return replace(
            pgd, eps=EVERYWHERE, step_size=pgd.eps, steps=1, step_sizes=(), random_start=True,
            start_eps=self.noise * pgd.eps,
        )  # fmt: skip
