"""Class offsets, our own: the last biases of a trained classifier move until no class lags behind, and nothing else does.

No paper has it. Of all offsets b of the logits that keep each class's robust share r_c at `floor` times their mean or
above, it looks for those of the highest mean: gradient ascent on sum_c (1 + price_c) r_c, where the price of a class
that lags grows as long as it does, and falls again to 0 (the multipliers of the constraints). r_c counts margins above
0 under an attack on the margin; for the gradient a sigmoid of the margin stands for the count, as wide as WIDTH of the
margins' standard deviation. All is read from the logits that the attack has before its last step, so that an update
costs no forward: 2K in all.

The optimiser's step is replaced by one of its own, in units of the margins, so that neither learning rate nor optimiser
matters. Its length falls with the updates, and the weight average takes the mean of where they went.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Le

from ..common.field_types import Words
from .settings import Method

if TYPE_CHECKING:
    from torch import Tensor, nn

WIDTH = 0.3  # of the sigmoid, in standard deviations of the margins
STEP, STEPS = 30.0, 50.0  # length of the first step, in squared widths; after so many updates it is half as long
KEEP = 0.9  # of the shares, from batch to batch
GROWTH, PUSH = 0.2, 2.0  # of a price, for a class that nothing resists in: at each update; and while it is so


@dataclass(frozen=True)
class Offsets(Method):
    """Class offsets (ours), of a model that is trained: `ham train --from RUN --method offsets`."""

    name = "offsets"
    title = "class offsets"
    tunes_only = True
    looks_at_classes = True
    update_forwards = 0

    floor: Annotated[float, Ge(0), Le(1), Words("floor {}")] = 0.5
    """Every class is to reach this share of the mean over classes; 0: the highest mean, whatever the classes."""
    freeze_bn: Annotated[bool, Words(by_value=((False, "BN of each batch"),))] = True
    """BatchNorm keeps the statistics that it was trained with."""

    def check(self) -> None:
        super().check()
        for name in ("early_drop", "reweight", "loss", "label_smoothing", "class_weights", "awp", "gate"):
            value, usual = getattr(self, name), Method.__dataclass_fields__[name].default
            if value != usual:
                raise ValueError(f"{name}: got {value!r}; class offsets have a loss of their own; leave it {usual!r}")
        if not self.freeze_bn:
            raise ValueError("freeze_bn: got False; class offsets train nothing but the last biases")

    def attack(self, pgd):
        return replace(pgd, loss="cw")

    # ------------------------------------------------------------ prices
    def remembers(self, classes):
        import torch

        names = ("class_right", "class_counts", "class_prices")
        return {**{name: torch.zeros(classes) for name in names}, "updates": torch.zeros(())}

    def observe(self, examples, memory):
        from .class_weights import by_class, is_hard

        z, y = examples.look.z, examples.look.y
        right, counts = by_class((~is_hard(z, y))[:, None], y, z.shape[1], examples.look.ranks)
        memory.class_right.mul_(KEEP).add_(right[:, 0])
        memory.class_counts.mul_(KEEP).add_(counts)
        memory.class_prices.add_(GROWTH * self._lag(memory)).clamp_(min=0)
        memory.updates.add_(1)

    def _lag(self, memory):
        """(C,): how far each class is below the floor, as a share of it; negative above it."""
        from .class_weights import mean_by_class

        shares = mean_by_class(memory.class_right[:, None], memory.class_counts)[:, 0]
        floor = self.floor * shares.mean()
        return ((floor - shares) / floor).nan_to_num(0, 0, -1).clamp(min=-1)

    def weights(self, examples, memory):
        import torch

        from .class_weights import for_rows

        y, classes = examples.look.y, len(memory.class_prices)
        prices = 1 + memory.class_prices + PUSH * self._lag(memory).clamp(min=0)
        counts = (y[:, None] == torch.arange(classes, device=y.device)).sum(0).clamp(min=1)
        return for_rows(prices / counts, y) * (len(y) / classes)

    # ------------------------------------------------------------ the update
    def loss_of(self, model, examples, memory):
        import torch

        from .losses import weighted_mean

        z = examples.look.z
        bias = last_bias(model, z.shape[1])
        margin = margins(z + (bias - bias.detach()), examples.y)
        return weighted_mean(torch.sigmoid(-margin / width_of(margin.detach())), examples.weights)

    @contextmanager
    def around(self, model, examples, memory, gradients):
        import torch

        bias = last_bias(model, examples.look.z.shape[1])
        before = bias.detach().clone()
        yield
        width = width_of(margins(examples.look.z, examples.y))
        with torch.no_grad():
            bias.copy_(before - STEP / (1 + memory.updates / STEPS) * width**2 * bias.grad)


def margins(z: Tensor, y: Tensor) -> Tensor:
    """(n,): the label's logit less the largest other, of (n, C)."""
    from .class_weights import labels_of

    of_label = labels_of(z, y)
    return z.masked_fill(~of_label, 0).sum(1) - z.masked_fill(of_label, float("-inf")).amax(1)


def width_of(margin: Tensor) -> Tensor:
    """0-dim, above 0."""
    return (WIDTH * margin.std(correction=0)).clamp_min(1e-30)


def last_bias(model: nn.Module, classes: int) -> nn.Parameter:
    """Of the last layer that has one for each class. Raises: ValueError naming the model."""
    from torch import nn

    heads = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and len(m.weight) == classes]
    if not heads or heads[-1].bias is None:
        raise ValueError(f"model: class offsets need a last linear layer with a bias for each of its {classes} classes")
    return heads[-1].bias
