"""The engine: runs a model's passes as its options say, and goes on without those that cannot be served."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from .graphs import Graphs, cuda_capture
from .half_weights import HalfWeights, MadeFor
from .memory import keep_freed_memory
from .modes import DTYPES, attack_mode, autocast, model_device, update_mode
from .options import REQUIRE, SWITCHES, EngineOptions, half_problem, reason, refuse
from .winograd import WinogradLayers, winograd_problem

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
        self._required = {n for n in SWITCHES if getattr(self.options, n) == REQUIRE}
        self._on = {n for n in SWITCHES if getattr(self.options, n)}
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
        if "winograd" in self._on and device is not None:
            problem = winograd_problem(device, self.precision)
            if problem is not None:
                self.give_up("winograd", problem)
        if self.options.keep_memory and device is not None and device.type == "cpu":
            keep_freed_memory()
        self._placed = self._compiled_model = None
        self._was: Sequence[nn.Parameter] = ()
        half = DTYPES.get(self.precision)
        self._halves = MadeFor(lambda model: HalfWeights(model, half))
        self._winograd = MadeFor(WinogradLayers)

    def __reduce__(self):
        return Engine, (self.options, self.device)  # a copy compiles and captures for itself

    @property
    def active(self) -> dict[str, str | bool]:
        """The options as they are served now."""
        return {"precision": self.precision, **{n: n in self._on for n in SWITCHES}}

    def give_up(self, option: str, reason: str) -> None:
        """From now on without this option. Raises: EngineError where it was required."""
        self._on.discard(option)
        if option == "precision":
            self.precision = "fp32"
        if option == "cuda_graphs" and self.graphs is not None:
            self.graphs.forget()  # callers still hold it, and what follows may need the memory
            self.graphs = None
        refuse(option, reason, option in self._required)  # last: warnings may be errors

    # ------------------------------------------------------------ before a step
    def place(self, model: nn.Module, x: Tensor, average: nn.Module | None = None) -> Tensor:
        """The images in the memory format that the model is to see; its weights, and those of their average, follow."""
        if "channels_last" not in self._on:
            return x
        if x.dim() != 4:
            self.give_up("channels_last", f"it is an order of (n, C, H, W), and the images are {tuple(x.shape)}")
            return x
        if model is not self._placed:
            moved = [p for p in model.parameters() if p.is_contiguous()]
            problem = _channels_last_problem(model, x[:2], self.precision)
            if problem is not None:
                self.give_up("channels_last", problem)
                return x
            self._placed, self._was = model, moved
            if average is not None:
                average.to(memory_format=torch.channels_last)
        return x.contiguous(memory_format=torch.channels_last)

    def put_back(self) -> None:
        """The weights of the model that was placed lie in the order that they had."""
        for p in self._was:
            p.data = p.data.contiguous()
        self._placed, self._was = None, ()

    # ------------------------------------------------------------ in an attack, in an update
    @contextmanager
    def attacking(self, model: nn.Module) -> Iterator[None]:
        """attack_mode, with the weights rounded or transformed once where the options want them so."""
        with attack_mode(model, fast_batchnorm="compile" not in self._on), ExitStack() as inside:
            if self.graphs is not None:
                self.graphs.follow(model)
            inside.enter_context(self._own_convolutions(model))  # transforms the weights before they are rounded
            if self.precision != "fp32":
                inside.enter_context(self._halves(model).in_place())
            yield

    @contextmanager
    def updating(self, model: nn.Module, freeze_bn: bool) -> Iterator[None]:
        """update_mode, with this engine's convolutions."""
        with update_mode(model, freeze_bn), self._own_convolutions(model):
            yield

    def _own_convolutions(self, model: nn.Module) -> AbstractContextManager[None]:
        if "winograd" not in self._on:
            return nullcontext()
        device = model_device(model) if self.device is None else None  # else it has been judged
        problem = device and winograd_problem(device, self.precision)
        layers = self._winograd(model)
        problem = problem or layers.problem
        if problem is None:
            return layers.in_place()
        self.give_up("winograd", problem)
        return nullcontext()

    def forward(self, model: nn.Module, x: Tensor) -> Tensor:
        """Logits of a model in attack mode."""
        with autocast(self.precision, x.device):
            if "compile" in self._on and len(x) >= COMPILED_ROWS:
                return self._compiled_forward(model, x)
            return model(x)

    def autocast(self, device: torch.device):
        return autocast(self.precision, device)

    def _compiled_forward(self, model: nn.Module, x: Tensor) -> Tensor:
        """Compiles where that has not been done: for a step, forward and backward; for a look, the forward alone."""
        try:
            if model is not self._compiled_model:
                self._compiled_model, self._compiled = model, torch.compile(_function_of(model))
                self._compiled_step = False
            if torch.is_grad_enabled() and not self._compiled_step:
                point = _any_number_of_rows(x.detach().requires_grad_())
                z = self._compiled(point)
                torch.autograd.grad(z, point, torch.ones_like(z))
                self._compiled_step = True
            return self._compiled(_any_number_of_rows(x))
        except Exception as error:  # whatever a compiler raises
            z = model(x)  # raises what the model raises by itself
            self._compiled_model = self._compiled = None
            self.give_up("compile", reason("torch.compile failed", error))
            return z


PLAIN = Engine(EngineOptions(keep_memory=False))


def plain(precision: str) -> Engine:
    """An engine of no options but the precision. One that rounds weights holds the model, so it is not kept."""
    return PLAIN if precision == "fp32" else Engine(EngineOptions(precision, keep_memory=False))


def fast(device: torch.device) -> Engine:
    """All that makes an attack fast on this device and leaves its examples to be judged by the plain model."""
    cpu = device.type == "cpu"
    precision = "fp32" if half_problem("bf16", device) else "bf16"
    winograd = cpu and winograd_problem(device, precision) is None
    options = EngineOptions(precision, channels_last=True, compile=True, cuda_graphs=not cpu, winograd=winograd)
    return Engine(options, device)


def _function_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """model as a function with a code object of its own: torch counts recompilations per code object."""

    def forward(x: Tensor) -> Tensor:
        return model(x)

    return types.FunctionType(forward.__code__.replace(), forward.__globals__, "forward", None, forward.__closure__)


def _any_number_of_rows(x: Tensor) -> Tensor:
    torch._dynamo.maybe_mark_dynamic(x, 0)
    return x


def _channels_last_problem(model: nn.Module, x: Tensor, precision: str) -> str | None:
    """Moves the model's weights; moves them back where it then cannot run. Raises what it raises by itself."""
    x = x.detach()
    with attack_mode(model), torch.no_grad(), autocast(precision, x.device):
        try:
            model.to(memory_format=torch.channels_last)
            model(x.contiguous(memory_format=torch.channels_last))
        except Exception as error:
            model.to(memory_format=torch.contiguous_format)
            model(x.contiguous())
            return reason("the model cannot run with it", error)
    return None
