"""A CUDA graph without a GPU, and the batches and examples that tests of graphs work on."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ham_kernels import data
from ham_kernels.engine import graphs as graphs_module
from ham_kernels.mining import Examples

SETTINGS = {"eps": 0.2, "step_size": 0.05, "steps": 5, "screen_steps": 2, "start_epoch": 2}
RAGGED = (64, 40, 64, 37)
NOT_CAPTURABLE = "operation not permitted when stream is capturing"


def digits(n: int) -> tuple[Tensor, Tensor]:
    images = data.digits()
    return images.x_train[:n].float() / 255, images.y_train[:n]


def ragged_batches() -> list[tuple[Tensor, Tensor]]:
    """Digits in batches of RAGGED rows."""
    x, y = digits(sum(RAGGED))
    return list(zip(x.split(RAGGED), y.split(RAGGED), strict=True))


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

    def __init__(self):
        super().__init__()
        self._calls = []

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
        self.spoil()

    @torch.no_grad()
    def spoil(self) -> None:
        for *_, made in self._calls:
            for _, t in made:
                t.fill_(torch.nan if t.is_floating_point() else 1)


class Recorder:
    """As cuda_capture: two runs, then the recording. Counts captures, and refuses from number `fails_at` on."""

    def __init__(self, fails_at: int | None = None):
        self.captures, self._fails_at = 0, fails_at

    def __call__(self, fn, device, pool):
        self.captures += 1
        for _ in range(graphs_module.WARM_UP_RUNS):
            fn()
        tape = Tape()
        with tape:
            if self._fails_at is not None and self.captures >= self._fails_at:
                raise RuntimeError(f"CUDA error: {NOT_CAPTURABLE}\nCompile with `TORCH_USE_CUDA_DSA`")
            fn()
        tape.spoil()
        return tape.replay


def rerun(fn, device, pool):
    """Runs the Python again at each replay."""
    for _ in range(graphs_module.WARM_UP_RUNS):
        fn()
    return fn
