"""Free-AT (Shafahi et al., "Adversarial training for free!", NeurIPS 2019, arXiv 1904.12843): m updates of each batch
in 1/m of the epochs, 3 forwards each.

Each batch is trained on m times in a row, at x' = clip(x + delta, 0, 1), and the backward of an update gives the
gradient to delta too: delta <- clip(delta + eps sign(grad), -eps, eps), which the next update sees. delta belongs to a
place in the batch, not to an image: it begins with zeros, and goes on from batch to batch and from epoch to epoch. So
its gradient is in train mode, of weights that the update changes at once, and zero where x + delta leaves [0, 1].

As the authors' PyTorch code for ImageNet, whose step is eps. They divide the epochs by m, and so do `ham train` and
`ham sweep`, unless --epochs says how many. There is no attack to screen, and nothing that tells of classes. Several
processes are refused: what one remembers of its rows is not what another does. In a loop of your own, call ham.loss
with one Objective m times on each batch, with an update behind each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from annotated_types import Ge

from ..common.field_types import Words
from .fgsm_rs import check_linf
from .natural import Natural


@dataclass(frozen=True)
class FreeAT(Natural):
    """Free-AT: a perturbation that goes on from update to update, by the gradients of the updates themselves."""

    name = "free_at"
    title = "Free-AT"
    remembers_rows = True
    without_effect = tuple(name for name in Natural.without_effect if name != "eps_factor")

    replays: Annotated[int, Ge(1), Words("{} updates a batch")] = 8
    """m, updates of each batch, one behind the other. The epochs of presets are divided by it."""

    def attack(self, pgd):
        check_linf(self, pgd)
        if not isinstance(pgd.eps, (int, float)):
            raise TypeError(f"eps: got {type(pgd.eps).__name__}; Free-AT takes one number for all rows")
        return replace(super().attack(pgd), eps=pgd.eps)

    def remembers(self, classes):
        import torch

        return {"delta": torch.zeros(0)}  # (places in a batch, C, H, W) from the first batch on

    def observe(self, examples, memory):
        """Makes room for a batch of more rows than any before, or of images of another size."""
        known, x = memory.delta, examples.x
        if known.shape[1:] != x.shape[1:] or len(known) < len(x):
            grown = x.new_zeros(x.shape)
            if known.shape[1:] == x.shape[1:]:
                grown[: len(known)] = known
            memory.delta = grown
            memory.memories += 1

    def loss_of(self, model, examples, memory):
        """Its backward moves delta; gradients of the weights alone do not."""
        import torch

        delta, eps = memory.delta[: examples.n_kept], memory.pgd.eps
        leaf = delta.detach().requires_grad_()

        @torch.no_grad()
        def ascend(gradient):
            delta.copy_((delta + eps * gradient.sign().nan_to_num(0.0)).clamp_(-eps, eps))

        leaf.register_hook(ascend)
        return super().loss_of(model, replace(examples, x_adv=(examples.x + leaf).clamp(0, 1)), memory)
