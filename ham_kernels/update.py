"""One update of a model from its examples: forward, backward, optimiser; undone where the loss is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import _check
from .engine import Engine, NonFiniteError, attack_mode, start_read, update_mode
from .mining import Examples

GRAPH_FROM = 2  # a number of rows is captured when it comes for the second time

Loss = Callable[[nn.Module, Examples], Tensor]


class Updater:
    """Steps an optimiser. With CUDA graphs, forward and backward of a number of rows that repeats are replayed."""

    def __init__(self, optimizer: torch.optim.Optimizer, engine: Engine, device: torch.device):
        self.optimizer, self._engine = optimizer, engine
        # gradients in fp16 vanish below 6e-8; the scaler lifts them, and skips an update where they overflow
        self._scaler = torch.amp.GradScaler(device.type) if engine.precision == "fp16" else None

    def __call__(self, model: nn.Module, loss_of: Loss, examples: Examples, freeze_bn: bool) -> float:
        """Returns the loss. Raises: NonFiniteError; parameters, buffers and optimiser are then as before."""
        freeze_bn = freeze_bn or examples.n_forward == 1  # one row has no statistics of its own
        buffers = list(model.buffers())
        before = [torch.empty_like(b) for b in buffers]
        _copy(before, buffers)  # BatchNorm's statistics move in the forward, before the loss is judged
        try:
            replayed = self._replayed(model, loss_of, examples, freeze_bn)
            (value,) = (replayed or self._eager(model, loss_of, examples, freeze_bn))()
            if not math.isfinite(value):
                _judge_labels(model, examples)
                raise NonFiniteError(f"model: the training loss is {value}; nothing was updated")
        except BaseException:
            self.optimizer.zero_grad(set_to_none=True)
            _copy(buffers, before)
            raise
        if self._scaler is None:
            self.optimizer.step()
        else:
            self._scaler.step(self.optimizer)
            self._scaler.update()
        return value

    def _eager(self, model: nn.Module, loss_of: Loss, examples: Examples, freeze_bn: bool) -> Callable[[], list[float]]:
        with update_mode(model, freeze_bn):
            with self._engine.autocast(examples.x_adv.device):
                loss = loss_of(model, examples)
            self.optimizer.zero_grad(set_to_none=True)
            read = start_read(loss.detach().reshape(1))  # arrives while the device is busy with the backward
            (loss if self._scaler is None else self._scaler.scale(loss)).backward()
        return read

    def _replayed(self, model: nn.Module, loss_of: Loss, examples: Examples, freeze_bn: bool):
        """As _eager where there is a graph for so many rows, else None. Padding never comes in: rows are exact."""
        graphs = self._engine.graphs
        if graphs is None or self._scaler is not None or examples.rest is not None:
            return None
        graphs.follow(model)
        x = examples.x_adv
        key = ("update", x.shape, x.stride(), x.dtype, examples.weights is None, freeze_bn, loss_of)
        if graphs.sighting(key) < GRAPH_FROM or all(p.grad is None for p in model.parameters()):
            return None  # the gradients of an update before say which parameters have one

        def make() -> _Graphed:
            return _Graphed(model, loss_of, examples, freeze_bn, self._engine, graphs.capture)

        try:
            return graphs.kept(key, make).replay(examples)
        except RuntimeError as error:
            self.optimizer.zero_grad(set_to_none=True)
            self._engine.graph_failure(error)
            return None

    # ------------------------------------------------------------ state
    def state_dict(self) -> dict | None:
        """The loss scale of fp16; None in other precisions."""
        return None if self._scaler is None else self._scaler.state_dict()

    def load_state_dict(self, state: dict | None) -> None:
        if self._scaler is not None and state is not None:
            self._scaler.load_state_dict(state)


class _Graphed:
    """Forward and backward over examples, gradients and a loss that stay in place."""

    def __init__(
        self, model: nn.Module, loss_of: Loss, examples: Examples, freeze_bn: bool, engine: Engine, capture: Callable
    ):
        def twin(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.clone()

        self._examples = Examples(
            twin(examples.x_adv), examples.x, twin(examples.y), twin(examples.weights), examples.n, examples.n_hard,
            index=None,
        )  # fmt: skip
        # a parameter that the loss does not reach has no gradient, and none is invented for it
        learned = [p for p in model.parameters() if p.grad is not None]
        self._gradients = [(p, p.grad) for p in learned]
        self._loss = torch.zeros(1, device=examples.x_adv.device)
        grads = [g for _, g in self._gradients]

        def run() -> None:
            torch._foreach_zero_(grads)
            with update_mode(model, freeze_bn):
                with engine.autocast(examples.x_adv.device):
                    loss = loss_of(model, self._examples)
                loss.backward()
            self._loss.copy_(loss.detach().reshape(1))

        buffers = list(model.buffers())
        before = [b.clone() for b in buffers]
        self._replay = capture(run)
        _copy(buffers, before)  # the runs before the capture moved BatchNorm's statistics

    def replay(self, examples: Examples) -> Callable[[], list[float]]:
        for own, theirs in (
            (self._examples.x_adv, examples.x_adv),
            (self._examples.y, examples.y),
            (self._examples.weights, examples.weights),
        ):
            if own is not None:
                own.copy_(theirs)
        for p, gradient in self._gradients:
            p.grad = gradient
        self._replay()
        return start_read(self._loss)


def _judge_labels(model: nn.Module, examples: Examples) -> None:
    """Natural training has no forward before the update's that could tell how many classes there are."""
    with attack_mode(model), torch.no_grad():
        classes = model(examples.x_adv[:1]).shape[1]
    _check.data_facts(0.0, 1.0, *map(float, examples.y.aminmax()), classes)


@torch.no_grad()
def _copy(to: list[Tensor], source: list[Tensor]) -> None:
    """One launch per dtype where there is a device."""
    for dtype in {t.dtype for t in to}:
        mine = [i for i, t in enumerate(to) if t.dtype == dtype]
        torch._foreach_copy_([to[i] for i in mine], [source[i] for i in mine])
