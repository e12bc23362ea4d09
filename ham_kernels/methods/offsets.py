"""Class offsets, our own: the last biases of a trained classifier move until no class lags behind.

No paper has it. Of all offsets of the logits that keep the robust share r_c of each class at `floor` times their mean
or above, it looks for those with the highest mean: gradient ascent on sum_c (1 + price_c) r_c, where the price of a
class grows as long as it lags, and then falls to 0 again (the multipliers of the constraints). r_c counts margins above
0 under an attack on the margin; for the gradient a sigmoid of the margin stands for the count, as wide as 0.3 of the
margins' standard deviation. Shares and width are read from the logits that the attack has before its last step, and
the loss takes one forward in eval mode: 2K + 1 in all.

The optimiser's step is replaced by one in units of the margins, so that neither learning rate nor optimiser matters.
Its length falls with the updates, and the weight average is the mean of where they went.
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
GROWTH, PUSH = 0.2, 2.0  # of a price, for a class in which nothing resists: at each update; and while it is so
_NO_EFFECT = (
    "early_drop", "reweight", "trust", "freeze_bn", "loss", "label_smoothing", "class_weights", "awp", "gate",
)  # fmt: skip


@dataclass(frozen=True)
class Offsets(Method):
    """Class offsets (ours), of a model that is trained: `ham train --from RUN --method offsets`."""

    name = "offsets"
    title = "class offsets"
    tunes_only = True
    looks_at_classes = True
    update_forwards = 1

    floor: Annotated[float, Ge(0), Le(1), Words("floor {}")] = 0.5
    """Every class is to reach this share of the mean over classes; 0: the highest mean, whatever the classes."""

    def check(self):
        super().check()
        for name in _NO_EFFECT:
            value, usual = getattr(self, name), getattr(Method, name)
            if value != usual:
                raise ValueError(
                    f"{name}: got {value!r}; {self.title} move the last biases alone, by a loss of their own: leave it "
                    f"{usual!r}"
                )

    def attack(self, pgd):
        return replace(pgd, loss="cw")

    # ------------------------------------------------------------ what it remembers
    def remembers(self, classes):
        import torch

        of_classes = ("class_right", "class_counts", "class_prices")
        return {name: torch.zeros(classes) for name in of_classes} | {
            name: torch.zeros(()) for name in ("margin_width", "offset_updates")
        }

    def observe(self, examples, memory):
        from .class_weights import by_class

        z, y = examples.look.z, examples.look.y
        margin = margins(z, y)
        right, counts = by_class((margin > 0)[:, None], y, z.shape[1])
        memory.class_right.mul_(KEEP).add_(right[:, 0])
        memory.class_counts.mul_(KEEP).add_(counts)
        memory.class_prices.add_(GROWTH * self._lag(memory)).clamp_(min=0)
        memory.margin_width.copy_((WIDTH * margin.std(correction=0)).clamp(min=1e-15))
        memory.offset_updates.add_(1)

    def _lag(self, memory):
        """(C,): how far each class is below the floor, as a share of it; above it negative, -1 at the least."""
        from .class_weights import mean_by_class

        shares = mean_by_class(memory.class_right[:, None], memory.class_counts)[:, 0]
        floor = self.floor * shares.mean()
        return (1 - shares / floor).nan_to_num(0, 0, -1).clamp(min=-1)

    def weights(self, examples, memory):
        """Each class weighs as much as its price says, however many rows it has in the batch."""
        from .class_weights import for_rows, labels_of

        look = examples.look
        prices = 1 + memory.class_prices + PUSH * self._lag(memory).clamp(min=0)
        counts = labels_of(look.z, look.y).sum(0).clamp(min=1)
        return for_rows(prices / counts, look.y) * (len(look.y) / len(counts))

    # ------------------------------------------------------------ the update
    def loss_of(self, model, examples, memory):
        import torch

        from ..engine import attack_mode
        from .losses import logits_at, weighted_mean

        device = examples.x_adv.device.type
        if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
            raise ValueError(
                f"precision: got 'fp16'; its loss is scaled, and {self.title} step by the gradient itself: take bf16"
            )
        with attack_mode(model), torch.no_grad():
            z = logits_at(model, examples, examples.x_adv)
        bias = last_bias(model, z.shape[1])
        margin = margins(z + (bias - bias.detach()), examples.y)  # no gradient but that of the bias
        return weighted_mean(torch.sigmoid(-margin / memory.margin_width), examples.weights)

    @contextmanager
    def around(self, model, examples, memory, gradients):
        import torch

        bias = last_bias(model, len(memory.class_prices))
        before = bias.detach().clone()
        yield
        length = STEP / (1 + memory.offset_updates / STEPS) * memory.margin_width**2
        with torch.no_grad():
            bias.copy_(before - length * bias.grad)


def margins(z: Tensor, y: Tensor) -> Tensor:
    """(n,): the label's logit less the largest other, of (n, C)."""
    from .class_weights import labels_of

    of_label = labels_of(z, y)
    return z.masked_fill(~of_label, 0).sum(1) - z.masked_fill(of_label, float("-inf")).amax(1)


def last_bias(model: nn.Module, classes: int) -> nn.Parameter:
    """Of the last layer that has one for each class. Raises: ValueError naming the model."""
    from torch import nn

    heads = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and len(m.weight) == classes]
    if not heads or heads[-1].bias is None:
        raise ValueError(f"model: class offsets need a last linear layer with a bias for each of its {classes} classes")
    return heads[-1].bias
