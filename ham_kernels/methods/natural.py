"""Natural training: cross entropy of the clean images, 3 full-batch forwards a batch."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .settings import Method


@dataclass(frozen=True)
class Natural(Method):
    """Natural training, no attack. Bad images raise as they do before one; the logits are judged by their loss."""

    name = "natural"
    title = "natural"

    def check(self) -> None:
        super().check()
        for field in ("early_drop", "reweight", "step_sizes"):
            if getattr(self, field):
                raise ValueError(
                    f"{field}: got {getattr(self, field)!r}; natural training has no attack to apply it to"
                )

    def attack_steps(self, steps: int) -> int:
        return 0

    def attack(self, pgd):
        return replace(pgd, eps=0.0, step_size=0.0, steps=0, step_sizes=(), random_start=False)

    def loss(self, model, examples, memory):
        """Mean cross entropy; NaN where a label on a GPU is none that the model knows, so that nothing is updated.

        In other methods the attack's forward has told the number of classes, and the labels were judged by it. Reading
        them here would wait for the GPU, and cannot be captured in a CUDA graph. Negative ones were judged before.
        """
        import torch

        from ..common import checks
        from ..ops import weighted_cross_entropy

        logits = model(examples.x_adv)
        checks.model_output(logits, len(examples.y))
        loss = weighted_cross_entropy(logits, examples.y, examples.weights)
        return loss.masked_fill((examples.y >= logits.shape[1]).any(), torch.nan)
