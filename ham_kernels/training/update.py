"""One update of a model from its examples: forward, backward, and the optimiser where both are finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..common import checks, troubles
from ..engine import Buffers, Engine, NonFiniteError, attack_mode, note_resting, start_read, update_mode
from ..engine.graphs import Captured, CaptureError, ambient
from ..methods.mining import Examples
from ..methods.objective import Objective

Read = Callable[[], list[float]]  # waits for the loss

SMALLEST_SCALE = 2.0**-20  # of the loss in fp16: 36 halvings from the first
GRAPH_FROM = 2  # a number of rows is captured when it comes for the second time


class Updater:
    """Steps an optimiser. With CUDA graphs, forward and backward of a number of rows that repeats are replayed.

    `through`: the wrapper that makes the gradients of several processes one; the forward of an update passes through
    it, and is then never replayed.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, engine: Engine, device: torch.device, grad_clip: float = 0.0,
        through: nn.Module | None = None,
    ):  # fmt: skip
        self.optimizer, self._engine, self._grad_clip, self._through = optimizer, engine, grad_clip, through
        # gradients in fp16 vanish below 6e-8; the scaler lifts them, and skips an update where they overflow
        self._scaler = torch.amp.GradScaler(device.type) if engine.precision == "fp16" else None

    def __call__(self, model: nn.Module, objective: Objective, examples: Examples, freeze_bn: bool) -> float:
        """Returns the loss. Raises: NonFiniteError; parameters and optimiser are then as before, buffers have moved."""
        freeze_bn = freeze_bn or examples.without_statistics

        def gradients(parameters: list[nn.Parameter]) -> Sequence[Tensor | None]:
            moved = Buffers(model, objective)
            try:
                with self._forward(model, model, objective, examples, freeze_bn) as (loss, _):
                    found = torch.autograd.grad(self._scaled(loss), parameters, allow_unused=True)
                return objective.ranks.mean_of(found)
            finally:
                moved.undo()

        with objective.around(model, examples, gradients):
            value = self._gradients(model, objective, examples, freeze_bn)
            if self._grad_clip:
                if self._scaler is not None:
                    self._scaler.unscale_(self.optimizer)
                parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
                nn.utils.clip_grad_norm_(parameters, self._grad_clip)  # of a norm that stays on the device
            if self._scaler is None:
                self.optimizer.step()
            else:
                self._scaler.step(self.optimizer)
                self._scaler.update()
                if (scale := self._scaler.get_scale()) < SMALLEST_SCALE:
                    raise troubles.error("loss_scale_gone", NonFiniteError, scale=scale)
        return value

    def _gradients(self, model: nn.Module, objective: Objective, examples: Examples, freeze_bn: bool) -> float:
        """Forward and backward, judged before the optimiser may step."""
        try:
            read = self._replayed(model, objective, examples, freeze_bn)
            value, size = (read or self._eager(model, objective, examples, freeze_bn))()
            if not math.isfinite(value):
                _judge_labels(model, examples)
                raise troubles.error("loss_not_finite", NonFiniteError, loss=value)
            if not math.isfinite(size) and not all(bool(g.isfinite().all()) for g in _gradients_of(model)):
                raise troubles.error("weight_gradient_not_finite", NonFiniteError, loss=value)
        except BaseException:
            self._drop_gradients(model)
            raise
        return value

    def _drop_gradients(self, model: nn.Module) -> None:
        """Those of weights that the optimiser does not hold too: they would add up, and one NaN would stay."""
        self.optimizer.zero_grad(set_to_none=True)
        model.zero_grad(set_to_none=True)

    def _eager(
        self, model: nn.Module, objective: Objective, examples: Examples, freeze_bn: bool
    ) -> Callable[[], list[float]]:
        with self._forward(model, self._through or model, objective, examples, freeze_bn) as (loss, of_batch):
            self._drop_gradients(model)
            self._scaled(loss).backward()
        if not any(p.grad is not None for group in self.optimizer.param_groups for p in group["params"]):
            raise troubles.error("nothing_to_train")
        judged = _gradients_of(model) if self._scaler is None else []  # the scaler skips what is not finite
        return start_read(_loss_and_size(of_batch, judged))  # the same on all processes, finite or not

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss if self._scaler is None else self._scaler.scale(loss)

    @contextmanager
    def _forward(
        self, model: nn.Module, through: nn.Module, objective: Objective, examples: Examples, freeze_bn: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The loss, in a block that its backward belongs to, and that of the whole batch."""
        with self._engine.updating(model, freeze_bn):
            with self._engine.autocast(examples.x_adv.device):
                loss, of_batch = objective.losses(through, examples)
            if not loss.requires_grad:
                raise troubles.error("nothing_to_train")
            yield loss, of_batch

    def _replayed(self, model: nn.Module, objective: Objective, examples: Examples, freeze_bn: bool):
        """Loss of a replay where there is a graph for so many rows, else None. There is no padding: rows are exact."""
        graphs = self._engine.graphs
        if graphs is None or self._scaler is not None or examples.rest is not None or self._through is not None:
            return None
        graphs.follow(model)
        x, parameters = examples.x_adv, list(model.parameters())
        learned = tuple(p.requires_grad for p in parameters)
        resting = frozenset(map(id, note_resting(model)))
        key = (
            "update", x.shape, x.stride(), x.dtype, examples.n, examples.weights is None, freeze_bn,
            objective, objective.memories, objective.method.loss_form(objective), learned,
            resting, ambient(x.device),
        )  # fmt: skip
        reached = graphs.shared.setdefault("reached", {})
        if graphs.sighting(key) < GRAPH_FROM or key not in reached or not graphs.has_room_for(key):
            read = self._eager(model, objective, examples, freeze_bn)
            # a parameter that the loss does not reach has no gradient, and none is invented for it
            reached[key] = [p.grad is not None for p in parameters]
            return read

        def make() -> _Graphed:
            has_gradient = [p for p, has in zip(parameters, reached[key], strict=True) if has]
            return _Graphed(model, has_gradient, objective, examples, freeze_bn, self._engine)

        try:
            return graphs.kept(key, make).update(examples)
        except CaptureError as error:
            self._drop_gradients(model)
            self._engine.give_up("cuda_graphs", str(error))
            return None

    # ------------------------------------------------------------ state
    def state_dict(self) -> dict | None:
        """The loss scale of fp16; None in other precisions."""
        return None if self._scaler is None else self._scaler.state_dict()

    def load_state_dict(self, state: dict | None) -> None:
        if self._scaler is not None and state is not None:
            self._scaler.load_state_dict(state)


class _Graphed(Captured):
    """Forward and backward over examples, gradients and a loss that stay in place."""

    def __init__(
        self, model: nn.Module, reached: list[nn.Parameter], objective: Objective, examples: Examples, freeze_bn: bool,
        engine: Engine,
    ):  # fmt: skip
        like = {name: getattr(examples, name) for name in _LOOKED_AT}
        super().__init__(engine.graphs, like, examples.n_kept, examples.n)
        stays = replace(examples, **self.places, index=None, hard=None, max_step=None)
        self.load(like)
        gradients = engine.graphs.shared.setdefault("gradients", {})
        for p in reached:
            if p not in gradients:
                gradients[p] = torch.zeros_like(p)
        has_gradient = set(reached)
        self._gradients = [(p, gradients[p] if p in has_gradient else None) for p in model.parameters()]
        self._loss = torch.zeros(2, device=examples.x_adv.device)
        written = [gradients[p] for p in reached]

        def run() -> None:
            torch._foreach_zero_(written)
            with update_mode(model, freeze_bn):
                with engine.autocast(examples.x_adv.device):
                    loss = objective.loss(model, stays)
                loss.backward()
            self._loss.copy_(_loss_and_size(loss, written))

        self._set_gradients()
        moved = Buffers(model, objective)
        try:
            self.capture({"update": run})
        finally:
            moved.undo()  # by the runs before the capture

    def update(self, examples: Examples) -> Read:
        self.load({name: getattr(examples, name) for name in _LOOKED_AT})
        self._set_gradients()
        self.replay("update")
        return start_read(self._loss)

    def _set_gradients(self) -> None:
        for p, gradient in self._gradients:
            p.grad = gradient


_LOOKED_AT = ("x_adv", "x", "y", "weights", "teacher", "last_right")  # what a loss may read of its examples


def _judge_labels(model: nn.Module, examples: Examples) -> None:
    """Natural training has no forward before the update's that could tell how many classes there are."""
    if not len(examples.y):
        return
    with attack_mode(model), torch.no_grad():
        classes = model(examples.x_adv[:1]).shape[1]
    checks.data_facts(0.0, 1.0, *map(float, examples.y.aminmax()), classes)


def _gradients_of(model: nn.Module) -> list[Tensor]:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [g._values() if g.is_sparse else g for g in gradients]


@torch.no_grad()
def _loss_and_size(loss: Tensor, gradients: list[Tensor]) -> Tensor:
    """(2,) fp32: the loss, and the largest norm of a gradient, which is NaN or infinite where one of its entries is.

    A norm may also overflow; a finite one settles the matter, and nearly all are.
    """
    norms = [n.to(loss.device, torch.float32) for n in torch._foreach_norm(gradients)] if gradients else []
    size = torch.stack(norms).amax() if norms else loss.new_zeros(())
    return torch.stack([loss.detach().float(), size.float()])
