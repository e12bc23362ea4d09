"""The engine: runs a model's passes as its options say, and goes on without those that cannot be served."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from .graphs import Graphs, cuda_capture
from .halves import HalfWeights
from .memory import keep_freed_memory
from .modes import DTYPES, attack_mode, autocast
from .options import REQUIRE, EngineOptions, half_problem, refuse

COMPILED_ROWS = 16  # fewer run eagerly: one row would be compiled anew, and a few do not fill compiled loops


class Engine:
    """How one model's passes run. Holds its compiled form, its weights in half precision and its CUDA graphs.

    Args:
        options: see EngineOptions.
        device: where the model will run; None leaves what depends on it unchecked.
        capture: makes a replay from a function (tests pass their own, to run the graphs' bookkeeping on a CPU).
    Raises: EngineError where an option was required and cannot be served; others warn, here or at the first batch.
    """

    def __init__(
        self, options: EngineOptions | None = None, device: torch.device | None = None, *,
        capture: Callable | None = None,
    ):  # fmt: skip
        self.options = options or EngineOptions()
        self.device = device
        self.precision = self.options.precision.removeprefix(f"{REQUIRE}-")
        self._required = {n for n in ("channels_last", "compile", "cuda_graphs") if getattr(self.options, n) == REQUIRE}
        self._on = {n for n in ("channels_last", "compile", "cuda_graphs") if getattr(self.options, n)}
        if self.options.precision.startswith(REQUIRE):
            self._required.add("precision")
        if self.precision != "fp32" and device is not None and (problem := half_problem(self.precision, device)):
            self.give_up("precision", problem)
        self.graphs: Graphs | None = None
        if "cuda_graphs" in self._on and device is not None:
            if capture is None and device.type != "cuda":
                self.give_up("cuda_graphs", f"the model is on {device.type}, and CUDA graphs need a GPU")
            else:
                self.graphs = Graphs(device, capture or cuda_capture)
        if self.options.keep_memory and device is not None and device.type == "cpu":
            keep_freed_memory()
        self._placed = self._compiled_model = self._half_model = None

    def __reduce__(self):
        return Engine, (self.options, self.device)  # a copy compiles and captures for itself

    @property
    def active(self) -> dict[str, str | bool]:
        """The options as they are served now."""
        return {"precision": self.precision, **{n: n in self._on for n in ("channels_last", "compile", "cuda_graphs")}}

    def give_up(self, option: str, reason: str) -> None:
        """From now on without this option. Raises: EngineError where it was required."""
        refuse(option, reason, option in self._required)
        self._on.discard(option)
        if option == "precision":
            self.precision = "fp32"
        if option == "cuda_graphs":
            self.graphs = None

    def graph_failure(self, error: RuntimeError) -> None:
        """Gives up CUDA graphs; what the model raises by itself is raised by the next, eager, call."""
        self.give_up("cuda_graphs", _reason("the capture failed", error))

    # ------------------------------------------------------------ before a step
    def place(self, model: nn.Module, x: Tensor) -> Tensor:
        """The images in the memory format that the model is to see; the model's weights follow, once."""
        if "channels_last" not in self._on:
            return x
        if x.dim() != 4:
            self.give_up("channels_last", f"it is an order of (n, C, H, W), and the images are {tuple(x.shape)}")
            return x
        if model is not self._placed:
            problem = _channels_last_problem(model, x[:2], self.precision)
            if problem is not None:
                self.give_up("channels_last", problem)
                return x
            self._placed = model
        return x.contiguous(memory_format=torch.channels_last)

    # ------------------------------------------------------------ in an attack
    @contextmanager
    def attacking(self, model: nn.Module) -> Iterator[None]:
        """attack_mode, with the weights rounded once where the precision is a half."""
        with attack_mode(model, fast_batchnorm="compile" not in self._on):
            if self.graphs is not None:
                self.graphs.follow(model)
            with nullcontext() if self.precision == "fp32" else self._halves_of(model).in_place():
                yield

    def forward(self, model: nn.Module, x: Tensor) -> Tensor:
        """Logits of a model in attack mode."""
        run = model
        if "compile" in self._on and len(x) >= COMPILED_ROWS:
            run = self._compiled_form_of(model, x)
        with autocast(self.precision, x.device):
            return run(x)

    def autocast(self, device: torch.device):
        return autocast(self.precision, device)

    def _halves_of(self, model: nn.Module) -> HalfWeights:
        if model is not self._half_model:
            self._half_model, self._halves = model, HalfWeights(model, DTYPES[self.precision])
        return self._halves

    def _compiled_form_of(self, model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
        if model is not self._compiled_model:
            compiled = torch.compile(_function_of(model))
            problem = self._compile_problem(compiled, model, x)
            if problem is not None:
                self.give_up("compile", problem)
                return model
            self._compiled_model, self._compiled = model, compiled
        _any_number_of_rows(x)
        return self._compiled

    def _compile_problem(self, compiled: Callable, model: nn.Module, x: Tensor) -> str | None:
        """Compiles forward and backward. Raises what the model raises by itself."""
        point = x.detach().requires_grad_()
        _any_number_of_rows(point)
        with torch.enable_grad(), autocast(self.precision, x.device):
            try:
                z = compiled(point)
                torch.autograd.grad(z, point, torch.ones_like(z))
            except Exception as error:  # whatever a compiler raises
                model(point)
                return _reason("torch.compile failed", error)
        return None


@functools.cache
def plain(precision: str) -> Engine:
    """An engine of no options but the precision."""
    return Engine(EngineOptions(precision, keep_memory=False))


PLAIN = plain("fp32")


def _function_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """model as a function with a code object of its own: torch counts recompilations per code object."""

    def forward(x: Tensor) -> Tensor:
        return model(x)

    return types.FunctionType(forward.__code__.replace(), forward.__globals__, "forward", None, forward.__closure__)


def _any_number_of_rows(x: Tensor) -> None:
    torch._dynamo.maybe_mark_dynamic(x, 0)


def _channels_last_problem(model: nn.Module, x: Tensor, precision: str) -> str | None:
    """Moves the model's weights; moves them back where it then cannot run. Raises what it raises by itself."""
    x = x.detach()
    with attack_mode(model), torch.no_grad(), autocast(precision, x.device):
        try:
            model.to(memory_format=torch.channels_last)
            model(x.contiguous(memory_format=torch.channels_last))
        except RuntimeError as error:
            model.to(memory_format=torch.contiguous_format)
            model(x.contiguous())
            return _reason("the model cannot run with it", error)
    return None


def _reason(what: str, error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{what} ({type(error).__name__}: {lines[0][:200] if lines else 'no message'})"
