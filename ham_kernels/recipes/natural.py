"""Natural training: cross entropy of the clean images, 3 full-batch forwards a batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import _check
from ..active import PGD
from ..mining import Examples
from ..ops import weighted_cross_entropy
from .base import Recipe


def natural() -> Recipe:
    """No attack. Bad images raise as they do before one; the logits are judged by the loss that comes of them."""
    return Recipe(PGD(0.0, 0.0, 0, random_start=False), loss=clean_ce)


def clean_ce(model: nn.Module, examples: Examples) -> Tensor:
    """Mean cross entropy; NaN where a label on a GPU is none that the model knows, so that nothing is updated.

    In other recipes the attack's forward has told the number of classes, and the labels were judged by it. Reading
    them here would wait for the GPU, and cannot be captured in a CUDA graph. Negative ones were judged with the images.
    """
    logits = model(examples.x_adv)
    _check.model_output(logits, len(examples.y))
    loss = weighted_cross_entropy(logits, examples.y, examples.weights)
    return loss.masked_fill((examples.y >= logits.shape[1]).any(), torch.nan)
