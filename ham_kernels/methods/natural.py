"""Natural training: cross entropy of the clean images, 3 full-batch forwards a batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from .settings import Method


@dataclass(frozen=True)
class Natural(Method):
    """Natural training, no attack. Bad images raise as they do before one; the logits are judged by their loss."""

    name = "natural"
    title = "natural"
    without_effect: ClassVar[tuple[str, ...]] = (
        "early_drop", "reweight", "trust", "class_weights", "step_sizes", "eps_factor",
    )  # fmt: skip

    def check(self) -> None:
        super().check()
        for field in self.without_effect:
            if getattr(self, field) != getattr(Method, field):
                raise ValueError(f"{field}: got {getattr(self, field)!r}; {self.title} has no attack to apply it to")

    def attack_steps(self, steps: int) -> int:
        return 0

    def attack(self, pgd):
        return replace(pgd, eps=0.0, step_size=0.0, steps=0, step_sizes=(), random_start=False)

    def loss_of(self, model, examples, memory):
        """Mean cross entropy; NaN where a label on a GPU is none that the model knows, so that nothing is updated.

        In other methods the attack's forward has told the number of classes, and the labels were judged by it. Reading
        them here would wait for the GPU, and cannot be captured in a CUDA graph. Negative ones were judged before.
        """
        import torch

        from .losses import adversarial_ce

        classes = 0

        def counted(x):
            nonlocal classes
            logits = model(x)
            classes = logits.shape[1] if logits.dim() == 2 else 0
            return logits

        loss = adversarial_ce(self, counted, examples)
        return loss.masked_fill((examples.y >= classes).any(), torch.nan)
