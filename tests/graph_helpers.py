"""A CUDA graph without a GPU, trainers with and without graphs, and examples."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from engine_helpers import CPU, SETTINGS
from nets import sgd
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import ham_kernels as ham
from ham_kernels.engine import Engine, EngineOptions
from ham_kernels.engine import graphs as graphs_module
from ham_kernels.methods.mining import Examples
from ham_kernels.training.update import Updater

RAGGED = (64, 40, 64, 37)
NOT_CAPTURABLE = "operation not permitted when stream is capturing"


def examples_of(n: int, seed: int, weighted: bool = True) -> Examples:
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 1, 8, 8, generator=g)
    x_adv = (x + 0.1 * torch.rand(n, 1, 8, 8, generator=g)).clamp(0, 1)
    y = torch.randint(0, 10, (n,), generator=g)
    return Examples(x_adv, x, y, torch.rand(n, generator=g) + 0.5 if weighted else None, n, n, None)


# ---------------------------------------------------------------- a graph without a GPU
class Tape(TorchDispatchMode):
    """What a CUDA graph does, on the CPU: the operations of a function are kept with the tensors they worked on, and
    done again without its Python. Between replays all memory of its own is NaN, since other graphs share the pool.
    """

    def __init__(self, together: list[Tape]):
        super().__init__()
        self._calls = []
        self._together = together  # with it in one capture; every other tape writes in the same memory

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        args, kwargs, kept = (tree_map_only(Tensor, Tensor.detach, t) for t in (args, kwargs or {}, out))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = [
            (i, t)
            for i, t in enumerate(tree_leaves(kept))
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in given
        ]
        self._calls.append((func, args, kwargs, made))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        with torch.autocast("cpu", enabled=False):  # the casts are on the tape
            for func, args, kwargs, made in self._calls:
                new = tree_leaves(func(*args, **kwargs))
                for i, t in made:
                    t.copy_(new[i])
        if self is self._together[-1]:
            self.spoil_all()

    @torch.no_grad()
    def spoil_all(self) -> None:
        for tape in self._together:
            for *_, made in tape._calls:
                for _, t in made:
                    t.fill_(torch.nan if t.is_floating_point() else 1)


class Recorder:
    """As cuda_capture: two runs, then the recording. Counts captures, and refuses from number `fails_at` on."""

    def __init__(self, fails_at: int | None = None):
        self.captures, self._fails_at = 0, fails_at
        self._tapes: list[Tape] = []

    def __call__(self, fns, device, pool):
        self.captures += 1
        for _ in range(graphs_module.WARM_UP_RUNS):
            graphs_module.run(fns)
        tapes: list[Tape] = []
        for fn in fns:
            tapes.append(Tape(tapes))
            with tapes[-1]:
                if self._fails_at is not None and self.captures >= self._fails_at:
                    raise RuntimeError(f"CUDA error: {NOT_CAPTURABLE}\nCompile with `TORCH_USE_CUDA_DSA`")
                fn()
        tapes[-1].spoil_all()
        self._tapes.extend(tapes)
        return [partial(self._replay, tape) for tape in tapes]

    def _replay(self, tape: Tape) -> None:
        """One pool: what this writes was another's."""
        for other in self._tapes:
            if other not in tape._together:
                other.spoil_all()
        tape.replay()


def rerun(fns, device, pool):
    """Runs the Python again at each replay."""
    for _ in range(graphs_module.WARM_UP_RUNS):
        graphs_module.run(fns)
    return list(fns)


# ---------------------------------------------------------------- trainers
def trainer_of(model: nn.Module, capture=None, **choices) -> ham.HAMTrainer:
    """A trainer; with `capture`, one whose graphs are made by it."""
    trainer = ham.HAMTrainer(model, sgd(model), **SETTINGS | choices)
    if capture is not None:
        wanted = {n: choices[n] for n in ("precision", "channels_last", "compile") if n in choices}
        give_graphs(trainer, capture, **wanted)
    return trainer


def give_graphs(trainer: ham.HAMTrainer, capture, cuda_graphs: bool | str = True, **options) -> None:
    trainer.engine = Engine(EngineOptions(cuda_graphs=cuda_graphs, **options), CPU, capture=capture)
    trainer._update = Updater(trainer.optimizer, trainer.engine, CPU)


def twins(model: nn.Module, capture=None, **choices) -> tuple[ham.HAMTrainer, ham.HAMTrainer]:
    """One trainer with graphs and one without, on equal models."""
    twin = copy.deepcopy(model)
    return trainer_of(model, capture or Recorder(), **choices), trainer_of(twin, **choices)


def assert_same_steps(ours, theirs, batches, epochs=(1, 1, 2, 2), rel=1e-4):
    for epoch in epochs:
        for x, y in batches:
            a, b = ours.train_step(x, y, epoch=epoch), theirs.train_step(x, y, epoch=epoch)
            assert (a.n, a.n_hard) == (b.n, b.n_hard)
            assert a.loss == pytest.approx(b.loss, rel=rel)
    assert_same_model(ours.model, theirs.model)


def assert_same_model(ours: nn.Module, theirs: nn.Module):
    """Weights and BatchNorm's statistics. The padded rows may change the order of sums in a convolution."""
    for (name, p), q in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=name)
