"""ATTA (Zheng et al., CVPR 2020, arXiv 1912.11969): attacks go on from epoch to epoch, k steps for each image in each.

An image's attack begins where that of the epoch before ended: its perturbation is kept in the coordinates of the padded
image, so that it moves with the random window and mirrors with it, and is written back there. In epochs that
reset_every divides all perturbations begin anew. The loss is that of PGD-AT: 2k + 3.

As released (the training on CIFAR-10), with its step and reset; its paper's name ATTA-k has k = 1 here, its script's
default is 10. Differences: perturbations begin with 0 (theirs: 0.001 * N(0, 1)), are kept in half precision (1e-5 of a
pixel's range at eps 8/255), and are taken in eval mode as everywhere here. Images must come from a loader that tells
which they are (`data.Batches`, as of all sets in memory), of one process, one batch at a time. The kept perturbations
take as much memory, and as much of a checkpoint, as the padded training images do as 16-bit numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge

from ..common.field_types import Words
from .settings import Method

if TYPE_CHECKING:
    from ..data.batches import Shown


@dataclass(frozen=True)
class ATTA(Method):
    """ATTA: each image keeps its perturbation from epoch to epoch."""

    name = "atta"
    title = "ATTA"
    remembers_rows = True
    knows_images = True
    remembers_first = True
    writes_rows_of = ("perturbations",)

    k: Annotated[int, Ge(1), Words("{} steps an epoch")] = 1
    """Steps of the attack in each epoch, of the size that the training was told, or as many as step_sizes."""
    reset_every: Annotated[int, Ge(1), Words("reset every {} epochs")] = 10
    """In each epoch whose number this divides, perturbations begin anew."""

    def check(self) -> None:
        super().check()
        if self.group > 1:
            raise ValueError(f"group: got {self.group}; ATTA takes batches one at a time")

    def attack_steps(self, steps: int) -> int:
        return super().attack_steps(self.k)

    def attack(self, pgd):
        return replace(pgd, steps=len(pgd.step_sizes) or self.k, random_start=False)

    def attack_on(self, pgd, y, memory):
        shown = _shown(memory)
        kept = memory.perturbations
        if kept.shape != shown.shape:
            kept = memory.perturbations = kept.new_zeros(shown.shape, device=y.device)
        return replace(pgd, start=shown.of(kept).float())

    def remembers(self, classes):
        import torch

        kept = torch.zeros(0, dtype=torch.float16)  # (images, C, H, W) from the first batch on, padded
        return {**super().remembers(classes), "perturbations": kept}

    def observe(self, examples, memory):
        """What rows that are not attacked further have gone is kept too, where they stay in the loss."""
        super().observe(examples, memory)
        rows = slice(None) if examples.index is None else examples.index.long()
        shown, kept = _shown(memory), memory.perturbations
        memory.rows_written["perturbations"].note(kept, shown.numbers[rows])
        shown.write(kept, examples.x_adv - examples.x, rows)

    def end_epoch(self, end, memory):
        super().end_epoch(end, memory)
        if (end.epoch + 1) % self.reset_every == 0:
            memory.perturbations.zero_()


def _shown(memory) -> Shown:
    if memory.shown is None:
        raise ValueError(
            "x: ATTA goes on from what it remembers of each image, and nothing tells which images these are; train on "
            "batches of ham_kernels.data.Batches (images in memory, on the device of the training)"
        )
    return memory.shown
