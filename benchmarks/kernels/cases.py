"""What bench_kernels.py times: each op at several sizes, its competitors, its traffic, and whether results agree.

A competitor is a function of one set of inputs, a dict; one set serves all competitors of a case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ham_kernels import ops
from ham_kernels.engine import start_read
from ham_kernels.ops._library import jit
from ham_kernels.ops.compact import compact_reference
from ham_kernels.ops.margin import margin_stats_reference
from ham_kernels.ops.pgd import pgd_step_reference
from ham_kernels.ops.random_start import random_start_reference
from ham_kernels.ops.weights import step_size_weights_reference
from kernels import cub

Inputs = dict[str, Any]
Competitor = Callable[[Inputs], Any]

OPS = (
    "pgd_step", "compact", "compact_to_host", "margin_stats", "weighted_cross_entropy", "step_size_weights",
    "random_start",
)  # fmt: skip
OURS, DISPATCHED, EAGER, COMPILED = "ours", "ours, torch.ops", "eager torch", "torch.compile"
CUB, NONZERO, STATIC, UNIFORM = "CUB DeviceSelect", "torch.nonzero", "nonzero_static", "uniform_ and clamp"
COPY, EMPTY = "copy_, as many bytes", "empty launch"
YARDSTICKS = (COPY, EMPTY)
NOT_COMPARED = (*YARDSTICKS, UNIFORM)  # they compute something else, or draw random numbers of their own

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
EXACT = {"rtol": 0.0, "atol": 0.0}
CLOSE = {"fp32": {"rtol": 1e-5, "atol": 4e-6}, "bf16": {"rtol": 2**-7, "atol": 1e-4}}  # bf16: one unit
CALL_BOUND = 8e6  # bytes; below, the way from Python to the kernel shows, so the op is called in both ways
COPIED = 1e6  # bytes; from here on a copy of as many runs along
HARD = 0.3  # of the rows

SIZES: dict[str, dict[str, list]] = {  # the ends of each list are the headlines; --quick takes every other entry
    "cuda": {
        "images": [(128, 32), (512, 32), (1536, 32), (64, 224), (256, 224)],  # (n, side): n x 3 x side x side
        "logits": [(128, 10), (65536, 10), (4096, 100), (128, 1000), (16384, 1000)],  # (n, classes)
        "rows": [128, 1024, 4096, 16384, 65536],
        "copy": [2**31],  # bytes read and written
    },
    "cpu": {
        "images": [(128, 32), (16, 224)],
        "logits": [(128, 10), (1024, 1000)],
        "rows": [128, 4096, 65536],
        "copy": [2**28],
    },
}


class WrongResult(Exception):
    """A competitor does not compute what eager torch computes."""


@dataclass(frozen=True)
class Case:
    """One op at one size."""

    op: str
    name: str
    traffic: int  # bytes: each input read once, each output written once, whatever a competitor really moves
    inputs: Callable[[torch.Generator], Inputs]  # random, on the generator's device
    competitors: dict[str, Competitor]
    tolerance: dict[str, float]
    compiled: Callable[[], Competitor] | None = None
    view: Callable[[Any], Any] = lambda result: result  # what of a result is compared
    to_host: bool = False  # timed until the host knows the result, with the host's clock
    headline: bool = False  # in README, and against torch.compile, which takes seconds per case

    def check(self, who: str, competitor: Competitor, inputs: Inputs) -> None:
        """Raises WrongResult where a result is not that of eager torch. Leaves `inputs` as they are."""
        got = competitor(_copied(inputs))
        if who in NOT_COMPARED:
            return
        expected = self.competitors[EAGER](_copied(inputs))
        try:
            torch.testing.assert_close(self.view(got), self.view(expected), **self.tolerance)
        except AssertionError as error:
            raise WrongResult(f"{who}: {' '.join(str(error).split())}") from None


def _copied(inputs: Inputs) -> Inputs:
    return {
        name: t.detach().clone().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t
        for name, t in inputs.items()
    }


def cases(device: str, quick: bool) -> Iterator[Case]:
    """All cases for "cpu" or "cuda": first the copy that rates are compared with, then the ops the goals are about."""
    sizes = {kind: entries[:: 2 if quick else 1] for kind, entries in SIZES[device].items()}
    on_gpu = device == "cuda"
    yield copy_rate(sizes["copy"][0])
    images, logits, rows = (_ends(sizes[kind]) for kind in ("images", "logits", "rows"))
    for size in sizes["images"]:
        case = pgd_step(*size, headline=size in images)
        yield _with(case, EMPTY, empty_launch) if on_gpu and size == images[0] else case
    for variant in ({"dtype": "bf16"}, {"channels_last": True}, {"indexed": True}, {"norm": "l2"}):
        for size in images:
            yield pgd_step(*size, **variant, headline=size == images[-1])
    for to_host in (False, True):
        for n in sizes["rows"]:
            yield compact(n, on_gpu, to_host=to_host, headline=n in rows)
    for size in sizes["logits"]:
        yield margin_stats(*size, headline=size in logits)
    yield margin_stats(*logits[-1], dtype="bf16")
    for size in sizes["logits"]:
        yield weighted_cross_entropy(*size, headline=size in logits)
    for n in rows:
        yield step_size_weights(n, headline=True)
    for variant in ({}, {"dtype": "bf16"}, {"norm": "l2"}):
        for size in images:
            yield random_start(*size, **variant, headline=size == images[-1])


def _ends(sizes: list) -> list:
    return list(dict.fromkeys([sizes[0], sizes[-1]]))


def _with(case: Case, who: str, competitor: Competitor) -> Case:
    return replace(case, competitors=case.competitors | {who: competitor})


def _case(
    op: str, name: str, traffic: int, inputs, args: Callable[[Inputs], tuple],
    *, ours: Competitor, dispatched, reference, tolerance, others=(), **more,
) -> Case:  # fmt: skip
    """A case of an op: args(inputs) are the arguments of the dispatched op and of its reference alike."""

    def eager(i):
        return reference(*args(i))

    def compiled():
        run = torch.compile(reference, dynamic=False)
        return lambda i: run(*args(i))

    competitors = {OURS: ours}
    if traffic < CALL_BOUND:
        competitors[DISPATCHED] = lambda i: dispatched(*args(i))
    more = {"compiled": compiled} | more
    case = Case(op, name, traffic, inputs, competitors | {EAGER: eager} | dict(others), tolerance, **more)
    return case if traffic < COPIED else _with_copy(case)


def _with_copy(case: Case) -> Case:
    def inputs(g: torch.Generator) -> Inputs:
        return case.inputs(g) | {k: torch.rand(case.traffic // 8, generator=g, device=g.device) for k in ("to", "from")}

    return replace(_with(case, COPY, _copy), inputs=inputs)


def _copy(i: Inputs) -> Tensor:
    return i["to"].copy_(i["from"])


@jit
def _empty_kernel(x_ptr):
    pass


def empty_launch(i: Inputs) -> None:
    """The least that a Triton launch costs: one program that does nothing."""
    _empty_kernel[(1,)](i["x"], num_warps=4)


# ---------------------------------------------------------------- the cases of each op
def copy_rate(traffic: int) -> Case:
    """What memory gives: a large copy, bytes read and written."""
    return _with_copy(Case("copy", f"{traffic / 2**20:,.0f} MiB", traffic, lambda g: {}, {}, EXACT))


def pgd_step(n, side, *, dtype="fp32", norm="linf", channels_last=False, indexed=False, headline=False) -> Case:
    """16 bytes per element in fp32. `indexed`: half of the rows are active, named by index and count."""
    l2, kind = norm == "l2", DTYPES[dtype]
    eps, step = (0.5, 0.1) if l2 else (8 / 255, 2 / 255)
    active = n // 2 if indexed else n

    def inputs(g):
        def images(draw):
            t = draw(n, 3, side, side, generator=g, device=g.device).to(kind)
            return t.contiguous(memory_format=torch.channels_last) if channels_last else t

        x, noise = images(torch.rand), images(torch.rand)
        made = {"x": x, "x_adv": (x + (2 * noise - 1) * 8 / 255).clamp_(0, 1), "grad": images(torch.randn)}
        return made | {
            "index": torch.randperm(n, generator=g, device=g.device).int() if indexed else None,
            "count": torch.full((1,), active, dtype=torch.int32, device=g.device) if indexed else None,
        }

    def in_place(step_):
        def run(x_adv, *args):
            step_(x_adv, *args)
            return x_adv

        return run

    def args(i):
        return i["x_adv"], i["x"], i["grad"], i["index"], i["count"], eps, step, None, None, 0.0, 1.0, l2

    name = f"{norm} {dtype} {n}x3x{side}x{side}" + ", channels_last" * channels_last + ", half the rows" * indexed
    traffic = active * (3 * side * side * kind.itemsize * 4 + 4 * indexed)
    return _case(
        "pgd_step", name, traffic, inputs, args,
        ours=lambda i: ops.pgd_step(i["x_adv"], i["x"], i["grad"], eps, step, i["index"], i["count"], norm=norm),
        dispatched=in_place(torch.ops.ham_kernels.pgd_step_), reference=in_place(pgd_step_reference),
        tolerance=EXACT if dtype == "fp32" and not l2 else CLOSE[dtype], headline=headline,
    )  # fmt: skip


def random_start(n, side, *, dtype="fp32", norm="linf", headline=False) -> Case:
    """Eager torch draws the same numbers; `uniform_` its own, as one would write it without this package."""
    eps, kind, l2 = 8 / 255 if norm == "linf" else 0.5, DTYPES[dtype], norm == "l2"
    own = {UNIFORM: lambda i: torch.empty_like(i["x"]).uniform_(-eps, eps).add_(i["x"]).clamp_(0, 1)}
    return _case(
        "random_start", f"{norm} {dtype} {n}x3x{side}x{side}", n * 3 * side * side * kind.itemsize * 2,
        lambda g: {"x": torch.rand(n, 3, side, side, generator=g, device=g.device).to(kind)},
        lambda i: (i["x"], eps, None, 3, 0, 0.0, 1.0, l2),
        ours=lambda i: ops.random_start(i["x"], eps, seed=3, norm=norm),
        dispatched=torch.ops.ham_kernels.random_start, reference=random_start_reference, tolerance=CLOSE[dtype],
        others={} if l2 else own, headline=headline,
    )  # fmt: skip


def margin_stats(n, classes, *, dtype="fp32", headline=False) -> Case:
    """With the logits of the step before and the largest step so far, as in HAM's attack."""
    kind = DTYPES[dtype]

    def inputs(g):
        return _logits(g, n, classes, kind) | {
            "prev": torch.randn(n, classes, generator=g, device=g.device).to(kind),
            "max_step": torch.rand(n, generator=g, device=g.device) * classes,
        }

    return _case(
        "margin_stats", f"{dtype} {n}x{classes}", n * (classes * kind.itemsize * 3 + 8 + 4 + 4 + 1), inputs,
        lambda i: (i["z"], i["y"], i["prev"], i["max_step"], False),
        ours=lambda i: ops.margin_stats(i["z"], i["y"], i["prev"], i["max_step"]),
        dispatched=torch.ops.ham_kernels.margin_stats, reference=margin_stats_reference, tolerance=CLOSE[dtype],
        headline=headline,
    )  # fmt: skip


def weighted_cross_entropy(n, classes, *, headline=False) -> Case:
    """Loss and its gradient, forward and backward; eager torch is F.cross_entropy, as one would write it."""

    def inputs(g):
        made = _logits(g, n, classes, torch.float32)
        made["z"].requires_grad_(True)
        return made | {"weights": torch.rand(n, generator=g, device=g.device) + 0.5}

    def args(i):
        return i["z"], i["y"], i["weights"]

    def plain(z, y, weights):
        return (F.cross_entropy(z, y, reduction="none") * weights).mean()

    def with_gradient(loss_of):
        def run(z, *rest):
            loss = loss_of(z, *rest)
            return loss.detach(), *torch.autograd.grad(loss, z)

        return run

    def compiled():
        run = with_gradient(torch.compile(plain, dynamic=False))
        return lambda i: run(*args(i))

    public = with_gradient(ops.weighted_cross_entropy)
    return _case(
        "weighted_cross_entropy", f"fp32 {n}x{classes}", n * (classes * 4 * 2 + 8 + 4) + 4, inputs, args,
        ours=lambda i: public(*args(i)),
        dispatched=with_gradient(lambda *a: torch.ops.ham_kernels.weighted_cross_entropy(*a)[0].sum()),
        reference=with_gradient(plain), tolerance=CLOSE["fp32"], compiled=compiled,
        view=lambda result: (result[0], result[1] * n), headline=headline,  # the gradient of a mean is of size 1/n
    )  # fmt: skip


def _logits(g: torch.Generator, n: int, classes: int, kind: torch.dtype) -> Inputs:
    return {
        "z": torch.randn(n, classes, generator=g, device=g.device).to(kind),
        "y": torch.randint(classes, (n,), generator=g, device=g.device),
    }


def step_size_weights(n, *, headline=False) -> Case:
    return _case(
        "step_size_weights", f"{n}", n * 8, lambda g: {"max_step": torch.rand(n, generator=g, device=g.device) * 4},
        lambda i: (i["max_step"], 1.0),
        ours=lambda i: ops.step_size_weights(i["max_step"], 1.0), dispatched=torch.ops.ham_kernels.step_size_weights,
        reference=step_size_weights_reference, tolerance=CLOSE["fp32"], headline=headline,
    )  # fmt: skip


def compact(n, on_gpu, *, to_host=False, headline=False) -> Case:
    """Positions of the true flags and their count. CUB and torch write no positions of false flags.

    `to_host`: from the call until the host holds the kept positions as a tensor, so that it knows how many.
    torch.nonzero waits for the number inside. All others, CUB too, read their count as a training step does:
    `start_read` copies it to pinned memory behind an event, which the host waits for.
    """

    def read(compaction):
        def run(*args):
            index, count = compaction(*args)
            return index[: int(start_read(count)()[0])]

        return run if to_host else compaction

    others = {NONZERO: lambda i: torch.nonzero(i["flags"])}
    if not to_host:
        others[STATIC] = lambda i: torch.nonzero_static(i["flags"], size=n, fill_value=-1)
    if on_gpu:
        others[CUB] = read(_cub_select)
    public = read(ops.compact)
    return _case(
        "compact_to_host" if to_host else "compact", f"{n}", n * 5 + 4,
        lambda g: {"flags": torch.rand(n, generator=g, device=g.device) < HARD}, lambda i: (i["flags"],),
        ours=lambda i: public(i["flags"]), dispatched=read(torch.ops.ham_kernels.compact),
        reference=read(compact_reference), tolerance=EXACT, others=others, view=_kept, to_host=to_host,
        headline=headline, **({"compiled": None} if to_host else {}),
    )  # fmt: skip


def _cub_select(i: Inputs) -> tuple[Tensor, Tensor]:
    if "select" not in i:  # made by the first, untimed, call
        i["select"] = cub.Select(i["flags"])
    return i["select"]()


def _kept(result) -> Tensor:
    """The kept positions, whatever form a competitor gives them."""
    if isinstance(result, tuple):
        index, count = result
        return index[: int(count)].long()
    rows = result.flatten().long()
    return rows[rows >= 0]
