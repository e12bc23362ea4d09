"""A method at work: what a trainer, a loss in somebody's loop and a checkpoint deal with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..attack.pgd import PGD
from ..common import checks
from ..distributed import ALONE, Ranks, synced_batchnorm
from ..engine import PLAIN, Engine, LastWrite, attack_mode
from .awp import Gradients
from .class_weights import for_rows
from .mining import TINY, WHOLE, Examples, Place, mine, split
from .settings import Method


@dataclass(frozen=True)
class EpochEnd:
    """What a method may read after an epoch."""

    epoch: int  # 1-based
    model: nn.Module
    val: Mapping[str, Any] | None = None  # {attack: ClassAccuracy} of the validation images
    val_ema: Mapping[str, Any] | None = None  # of the weight average


class Objective(nn.Module):
    """A method, the attack that it trains with, and what it remembers: buffers that move, are saved and undone.

    Args:
        method: see `Method`.
        pgd: the attack that the training was told.
        loss_weights: (classes,), multiplied with the method's own weights of the rows, by label; None for ones. They
            are settings, and no memory.
        teacher: a classifier of as many classes, for methods that learn from one (`needs_teacher`). It is put in eval
            mode for its forward of each batch, is never trained, and is no part of the state.
        ranks: processes that each give some rows of every batch. What it remembers is then the same on all of them.
    Raises: TypeError, ValueError naming the argument.
    """

    def __init__(
        self, method: Method, pgd: PGD, loss_weights: Tensor | None = None, teacher: nn.Module | None = None,
        ranks: Ranks = ALONE,
    ):  # fmt: skip
        super().__init__()
        if not isinstance(method, Method):
            raise TypeError(f"method: got {method!r}; it must be a method, such as ham_kernels.methods.HAM()")
        if teacher is not None:
            checks.module("teacher", teacher)
        if method.needs_teacher != (teacher is not None):
            raise ValueError(
                f"teacher: got None; {method.title} learns from one: give Trainer or Objective teacher=MODEL"
                if teacher is None
                else f"teacher: got one, and {method.title} learns from none"
            )
        if method.schedule:
            pgd = replace(pgd, step_sizes=method.schedule)
        if method.eps_factor != 1:
            pgd = replace(pgd, eps=method.eps_factor * pgd.eps, step_size=method.eps_factor * pgd.step_size)
        method.attack_steps(pgd.steps)
        if ranks.several:
            _check_for_several(method)
        self.ranks = ranks
        self.method, self.pgd = method, method.attack(pgd)
        self.loss_weights = loss_weights
        self._teacher = (teacher,)  # a tuple keeps it out of the state
        self._teacher_fits = teacher is None
        self._weights_fit = loss_weights is None  # not known before the model has told how many classes there are
        self.epoch = 1  # under way; a trainer sets it, a loop of one's own does so by `end_epoch`
        self.shown = None  # which images the batch under way is of, where its loader tells (data.batches.Shown)
        self.noise = 0, 0, 0  # seed, step and first row of the batch under way, which name its random numbers
        self.memories = 0  # how often the buffers were made anew: what was captured with others must not be replayed
        self._remembers = bool(method.remembers(2))
        self.rows_written = {name: LastWrite() for name in method.writes_rows_of}

    def examples(
        self, model: nn.Module, x: Tensor, y: Tensor, *, seed: int, step: int, engine: Engine = PLAIN
    ) -> Examples:
        """Of one batch, weights included."""
        return self.group_examples(model, x, y, (len(y),), seed=seed, step=step, engine=engine)[0]

    def group_examples(
        self, model: nn.Module, x: Tensor, y: Tensor, sizes: Sequence[int], *, seed: int, step: int,
        engine: Engine = PLAIN, place: Place = WHOLE,
    ) -> list[Examples]:  # fmt: skip
        """Of several batches that are attacked as one: x and y hold them one after the other, `sizes` rows each.

        `place`: of several processes; `sizes` is then of one batch.
        """
        rounds = self.method.round_to
        if rounds > 1 and len(sizes) > 1:
            raise ValueError(f"round_to: got {rounds} for {len(sizes)} updates; rows are rounded for one")
        if not self.method.looks_at_classes or self.method.remembers_first or not self._teacher_fits:
            self._prepare(model, x)
        if not self._weights_fit:
            self._fit_weights(model, x)
        self.noise, self.shown = (seed, step, place.first_row), getattr(x, "shown", None)
        pgd, taught = self.method.attack_on(self.pgd, y, self), None
        if self.teacher is not None:
            taught = self._teacher_logits(x, engine)
            pgd = replace(pgd, target=self.method.teacher_target(taught, y, self))
            place = replace(place, rebalances=False)  # what the teacher says of a row stays where it is
        several = sizes if len(sizes) > 1 else None
        mined = mine(model, x, y, pgd, self.method, seed=seed, step=step, engine=engine, sizes=several, place=place)
        parts = split(mined, sizes)
        if taught is not None:
            for part, own in zip(parts, taught.split(list(sizes)), strict=True):
                part.teacher = own if part.index is None else taught[part.index.long()]
        for part in parts:
            if part.look is not None:
                self._remember(part.look.z)
            self.method.observe(part, self)
            part.weights = self.method.weights(part, self)
            if self.loss_weights is not None:
                own = for_rows(self.loss_weights, part.y)
                part.weights = own if part.weights is None else own * part.weights
        return parts

    def loss(self, model: nn.Module, examples: Examples) -> Tensor:
        """0-dim. Of several processes, the mean over them is the loss of the batch, and that of their gradients its
        gradient: a mean over the rows of one is scaled to its share of what they weigh in the loss.
        """
        return self.losses(model, examples)[0] if self.ranks.several else self.method.loss_of(model, examples, self)

    def losses(self, model: nn.Module, examples: Examples) -> tuple[Tensor, Tensor]:
        """0-dim: the loss as in `loss`, and that of the whole batch, without gradient."""
        if not self.ranks.several:
            loss = self.loss(model, examples)
            return loss, loss.detach()
        with synced_batchnorm(model, self.ranks):
            own = self.method.loss_of(model, examples, self) * examples.n_kept
        weight = own.new_zeros(()) if examples.weight_sum is None else examples.weight_sum
        # every loss is a sum of rows times their weights, so that the mean of these may come behind it
        total, weight = self.ranks.sum_(torch.stack([own.detach().double(), weight.double()]))
        weight = max(examples.everywhere.n_kept, 1) if examples.weight_sum is None else weight.clamp_min(TINY)
        return (own * (self.ranks.world / weight)).to(own.dtype), total / weight

    def around(self, model: nn.Module, examples: Examples, gradients: Gradients):
        """Context of an update; see `Method.around`."""
        return self.method.around(model, examples, self, gradients)

    def end_epoch(self, end: EpochEnd) -> None:
        """After an epoch that it has trained."""
        if not isinstance(end, EpochEnd):
            raise TypeError(f"end: got {type(end).__name__}; it must be ham_kernels.methods.EpochEnd(epoch, model)")
        if self.has_memory or not self._remembers:  # else no batch has been seen yet
            self.method.end_epoch(end, self)
        self.epoch = end.epoch + 1

    def keeps_average(self, end: EpochEnd) -> bool:
        """Whether the updates of its next epoch enter the weight average."""
        return self.method.keeps_average(end, self)

    # ------------------------------------------------------------ the teacher
    @property
    def teacher(self) -> nn.Module | None:
        return self._teacher[0]

    def _teacher_logits(self, x: Tensor, engine: Engine) -> Tensor:
        """(n, classes) fp32 at the clean images."""
        with attack_mode(self.teacher), torch.no_grad(), engine.autocast(x.device):
            z = self.teacher(x.detach())
        checks.model_output(z, len(x))
        return z.float()

    # ------------------------------------------------------------ what it remembers
    def _prepare(self, model: nn.Module, x: Tensor) -> None:
        """Buffers for as many classes as the model knows, before the first batch."""
        if not self._teacher_fits:
            own, taught = (_logits_of_one(net, x).shape[1] for net in (model, self.teacher))
            if own != taught:
                raise ValueError(f"teacher: it knows {taught} classes, and the model {own}")
            self._teacher_fits = True
        if self._remembers and not self.has_memory:
            self._remember(_logits_of_one(model, x))

    def _fit_weights(self, model: nn.Module, x: Tensor) -> None:
        classes = _logits_of_one(model, x).shape[1]
        if len(self.loss_weights) != classes:
            raise ValueError(f"loss_weights: got {len(self.loss_weights)} for {classes} classes; give one each")
        self.loss_weights, self._weights_fit = self.loss_weights.to(x.device), True

    @property
    def has_memory(self) -> bool:
        """Whether the buffers are there. Where a method looks at classes, its first attack tells how many there are."""
        return bool(self._buffers)

    def _remember(self, z: Tensor) -> None:
        if not self._remembers or self.has_memory:
            return
        self.memories += 1
        for name, value in self.method.remembers(z.shape[1]).items():
            self.register_buffer(name, value.to(z.device))

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        """Raises: ValueError where a state is none of this method."""
        wanted = set(self.method.remembers(2)) if self._remembers else set()
        if state and set(state) != wanted:
            raise ValueError(
                f"state: its method remembers {', '.join(sorted(state)) or 'nothing'}, {self.method.name} "
                f"{', '.join(sorted(wanted)) or 'nothing'}"
            )

    def memory(self) -> dict[str, Tensor]:
        """What it remembers, by name."""
        return {name: b.detach() for name, b in self.named_buffers()}

    def load_memory(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """Takes over what `memory` gave, checked by `check_state`."""
        for name in list(self._buffers):
            delattr(self, name)
        for name, value in state.items():
            self.register_buffer(name, value.detach().clone().to(device))
        self.memories += 1

    # ------------------------------------------------------------ as a module of somebody's loop
    def get_extra_state(self) -> dict[str, int]:
        return {"epoch": self.epoch}

    def set_extra_state(self, state: Mapping[str, int]) -> None:
        self.epoch = state["epoch"]

    def _load_from_state_dict(self, state_dict, prefix, *others) -> None:
        """Buffers are made by the first batch, or here."""
        known = set(self.method.remembers(2)) if self._remembers else set()
        for name in known:
            if prefix + name in state_dict and name not in self._buffers:
                self.register_buffer(name, torch.zeros_like(state_dict[prefix + name]))
                self.memories += 1
        super()._load_from_state_dict(state_dict, prefix, *others)


def _check_for_several(method: Method) -> None:
    """Raises: ValueError naming what chooses rows within one process, so that results would depend on how many."""
    if method.remembers_rows:
        raise ValueError(f"method: got {method.name!r} on several processes, each of which would remember its own rows")
    if method.tunes_only:
        raise ValueError(f"method: got {method.name!r} on several processes; it moves so little that one is enough")
    for name, alone in (("group", 1), ("round_to", 1), ("bn_rows", "hard")):
        if getattr(method, name) != alone:
            raise ValueError(
                f"{name}: got {getattr(method, name)!r} on several processes, each of which would choose by itself; "
                f"leave it {alone!r}"
            )


def _logits_of_one(model: nn.Module, x: Tensor) -> Tensor:
    """(1, classes); (0, classes) where there is no row."""
    with attack_mode(model), torch.no_grad():
        z = model(x[:1].detach())
    checks.model_output(z, len(x[:1]))
    return z
