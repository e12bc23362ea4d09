"""Random calls of every op against its formula in fp64: python tests/fuzz_ops.py --calls 20000 [--seed N].

Valid calls go to the public op and, where no GPU is, to the Triton kernel in its interpreter too. About one call in six
is bad: it must be refused with an error that begins with the argument at fault, and must have changed nothing. A call
depends on the seed and its number alone: --only NUMBER repeats one. Exit status 1 if any call was wrong.
"""

from __future__ import annotations

import argparse
import os
import random
import secrets
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))
os.environ["TRITON_INTERPRET"] = str(int(not torch.cuda.is_available()))  # before Triton is imported

from fuzz_formulas import compared, cross_entropy, ends, jump_target, margin, pgd_target, start_target, step_weights
from fuzz_refusals import refusals
from helpers import DTYPES, LAYOUTS, in_layout

from ham_kernels import ops
from ham_kernels.ops import _library
from ham_kernels.ops.compact import compact_launch
from ham_kernels.ops.jump import jump_launch
from ham_kernels.ops.margin import margin_stats_launch
from ham_kernels.ops.pgd import pgd_step_launch
from ham_kernels.ops.weights import step_size_weights_launch, weighted_cross_entropy_launch

# by the name of the module, which in the package is that of the op
random_start_launch = sys.modules["ham_kernels.ops.random_start"].random_start_launch

GRADIENTS = (1e-45, 1e-42, 1e-40, 1e-38, 1e-30, 1e-20, 1e-13, 1e-6, 1.0, 1.0, 1.0, 1e6, 1e13, 1e19, 1e30, 3e38)
# The interpreter takes a number that is denormal in fp32 for one of fp64.
RADII = (0.0, 1.2e-38, 1e-20, 1e-12, 1e-4, 8 / 255, 8 / 255, 0.1, 0.5, 0.5, 3.0, 1e4, 1e10, 1e20, 3e38, 1e300)
LIMITS = ((0.0, 1.0),) * 6 + ((-1.0, 2.0), (0.2, 0.8), (-1e4, 1e4), (0, 255))


class Case:
    """The random choices of one call."""

    def __init__(self, seed: int, number: int, device: str, kernels: bool):
        self.kernels = kernels and device == "cpu"
        self.random = random.Random(f"{seed} {number}")
        torch.manual_seed(self.random.getrandbits(40))
        self.device, self.name = torch.device(device), ""

    def one(self, *values):
        return self.random.choice(values)

    def chance(self, p: float) -> bool:
        return self.random.random() < p

    def shape(self) -> tuple[int, ...]:
        n = self.one(0, 1, 2, 3, 5, 6)
        if self.chance(0.02):
            return (1, 3, 80, 80)  # a row beyond 16384 elements: the blocks of large rows
        if self.chance(0.15):
            return (n, *(self.random.randint(1, 6) for _ in range(self.one(1, 2, 4))))
        return (n, self.random.randint(1, 4), *(self.one(1, 2, 3, 5, 8, 9, 19) for _ in range(2)))

    def laid(self, t: torch.Tensor) -> torch.Tensor:
        """The same values in a random memory layout; what lies between is NaN."""
        t = t.to(self.device)
        if t.dim() == 4:
            return in_layout(t, self.one("contiguous", "contiguous", *LAYOUTS))
        if self.chance(0.3):
            return t.new_full((*t.shape[:-1], 2 * t.shape[-1]), torch.nan)[..., ::2].copy_(t)
        return t.clone()

    def images(self, shape, dtype, lo, hi) -> torch.Tensor:
        spread = self.one(1.0, 1.0, 1e-3, 1e-15, 1e-30)  # dark images, where a tiny eps is not lost in rounding
        return ((torch.rand(shape) * 1.2 - 0.1) * spread * (hi - lo) + lo).clamp(lo, hi).to(dtype)

    def near(self, x: torch.Tensor, lo, hi) -> torch.Tensor:
        reach = self.one(0.0, 1e-30, 1e-12, 1e-3, 0.1, 1.0)
        return (x.float() + torch.randn(x.shape) * reach).clamp(lo, hi).to(x.dtype)

    def gradient(self, shape) -> torch.Tensor:
        scale = torch.tensor([self.one(*GRADIENTS) for _ in range(shape[0])], dtype=torch.float64)
        t = torch.randn(shape, dtype=torch.float64) * (torch.rand(shape) > self.one(0.0, 0.1, 0.9))
        if t.numel():
            t /= t.flatten(1).abs().amax(1).clamp_min(1e-9).view(-1, *[1] * (t.dim() - 1))
        t = (t * scale.view(-1, *[1] * (t.dim() - 1))).to(self.one(*DTYPES))
        if self.chance(0.1):
            t[torch.rand(shape) < 0.1] = self.one(torch.nan, torch.inf, -torch.inf)
        if self.chance(0.1) and len(t):
            t[self.random.randrange(len(t))] = 0.0
        return t

    def radius(self, n: int) -> float | torch.Tensor:
        if self.chance(0.7):
            return self.one(*RADII)
        values = torch.tensor([min(self.one(*RADII), 3e38) for _ in range(n)]) * torch.rand(n)
        return values.to(self.device, self.one(torch.float32, torch.float32, torch.float64))

    def active(self, n: int) -> dict[str, torch.Tensor]:
        """index and count of a PGD step, and m, the rows of its gradient."""
        m, more = n, {}
        if self.chance(0.4):
            m = self.random.randint(0, n)
            index = torch.randperm(n)[: self.random.randint(m, n)]
            index[m:] = torch.randint(-(2**31), 2**31 - 1, (len(index) - m,))
            more["index"] = index.int().to(self.device)
        if self.chance(0.4):
            more["count"] = torch.tensor([self.random.randint(0, m)], dtype=torch.int32, device=self.device)
        return more | {"m": m}


def numbers(value) -> tuple[float, torch.Tensor | None]:
    """eps or step_size as a launcher takes it."""
    return (0.0, value.float()) if isinstance(value, torch.Tensor) else (min(value, 3.4e38), None)


def in_interpreter(case: Case, *tensors: torch.Tensor) -> bool:
    """Whether the kernel is to be run too. The interpreter garbles the denormal numbers of bf16."""
    tiny = torch.finfo(torch.bfloat16).tiny
    denormal = any(((t != 0) & (t.abs() < tiny)).any() for t in tensors if t.dtype == torch.bfloat16)
    return case.kernels and _library.TRITON[0] and os.environ["TRITON_INTERPRET"] == "1" and not denormal


# ---------------------------------------------------------------- one call of each op: what is wrong with it
def pgd_call(case: Case):
    shape, dtype, (lo, hi), norm = case.shape(), case.one(*DTYPES), case.one(*LIMITS), case.one("linf", "l2", "l2")
    x = case.images(shape, dtype, lo, hi)
    active = case.active(shape[0])
    x_adv, grad = case.near(x, lo, hi), case.gradient((active.pop("m"), *shape[1:]))
    eps, step = case.radius(shape[0]), case.radius(shape[0])
    wanted = pgd_target(x_adv, x, grad, eps, step, active, lo, hi, norm)
    tensors = [case.laid(t) for t in (x_adv, x, grad)]

    def public(a, x, g):
        ops.pgd_step(a, x, g, eps, step, **active, lo=lo, hi=hi, norm=norm)

    def launch(a, x, g):
        (e, e_rows), (s, s_rows) = numbers(eps), numbers(step)
        pgd_step_launch(a, x, g, active.get("index"), active.get("count"), e, s, e_rows, s_rows, lo, hi, norm == "l2")

    yield from in_place(case, tensors, wanted, public, launch)


def jump_call(case: Case):
    shape, dtype, (lo, hi), norm = case.shape(), case.one(*DTYPES), case.one(*LIMITS), case.one("linf", "l2", "l2")
    x = case.images(shape, dtype, lo, hi)
    x_adv, before = case.near(x, lo, hi), case.near(x, lo, hi)
    stays, factor, eps = torch.rand(shape[0]) > 0.6, case.one(0.0, 0.5, 1, 7.0, 1e6, 1e30), case.radius(shape[0])
    wanted = jump_target(x_adv, x, before, stays, factor, eps, lo, hi, norm)
    tensors, stays = [case.laid(t) for t in (x_adv, x, before)], stays.to(case.device)

    def public(a, x, b):
        ops.jump(a, x, b, stays, factor, eps, lo=lo, hi=hi, norm=norm)

    def launch(a, x, b):
        jump_launch(a, x, b, stays, factor, *numbers(eps), lo, hi, norm == "l2")

    yield from in_place(case, tensors, wanted, public, launch)


def in_place(case, tensors, wanted, public, launch):
    """Both ways to change tensors[0] into what is wanted; the others must stay."""
    for name, run in (("op", public), *((("kernel", launch),) if in_interpreter(case, *tensors) else ())):
        given = [case.laid(t) if i == 0 else t for i, t in enumerate(tensors)]
        kept = [t.clone() for t in given[1:]]
        run(*given)
        yield name, ends(given[0], *wanted)
        same = all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(given[1:], kept, strict=True))
        yield name, "" if same else "it changed an argument that it only reads"


def start_call(case: Case):
    shape, (lo, hi), norm = case.shape(), case.one(*LIMITS), case.one("linf", "l2")
    x, eps = case.images(shape, case.one(*DTYPES), lo, hi), case.radius(shape[0])
    seed, step = case.one(0, -1, case.random.randint(-(2**63), 2**63 - 1)), case.one(0, case.random.getrandbits(31))
    first_row = case.one(0, 0, 1, 7, 100)
    wanted, there = start_target(x, eps, seed, step, lo, hi, norm, first_row), case.laid(x)
    named = {"seed": seed, "step": step, "first_row": first_row}
    yield "op", ends(ops.random_start(there, eps, **named, lo=lo, hi=hi, norm=norm), *wanted)
    if in_interpreter(case, x):
        launched = random_start_launch(there, *numbers(eps), seed, step, lo, hi, norm == "l2", first_row)
        yield "kernel", ends(launched, *wanted)


def logits(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    n, classes = case.one(0, 1, 3, 17, 64), case.one(2, 3, 10, 10, 100, 300)
    scale = case.one(1e-30, 1e-3, 1.0, 4.0, 4.0, 100.0, 1e4, 1e30)
    z = (torch.randn(n, classes, dtype=torch.float64) * scale).to(case.one(*DTYPES)).to(case.device)
    z = z.nan_to_num(0.0, 6e4, -6e4)
    if case.chance(0.2):
        z = z.T.contiguous().T
    return z, torch.randint(classes, (n,)).to(case.device)


def margin_call(case: Case):
    z, y = logits(case)
    if case.chance(0.2):
        z[torch.rand(z.shape, device=z.device) < 0.05] = case.one(torch.nan, torch.inf, -torch.inf)
    if case.chance(0.2) and z.numel():  # a tie
        z[:, 0] = z[:, 1]
    prev = z + torch.randn_like(z) * case.one(0.0, 1e-20, 1.0, 1e4) if case.chance(0.6) else None
    max_step = torch.rand(len(z), device=z.device) * case.one(0.0, 1.0, 1e10) if case.chance(0.6) else None
    space = case.one("logits", "probs")
    wanted = margin(z, y, prev, max_step, space)
    yield "op", compared(ops.margin_stats(z, y, prev, max_step, space=space), wanted)
    if in_interpreter(case):
        launched = margin_stats_launch(z, y, prev, max_step, space == "probs")
        yield "kernel", compared(launched, wanted)


def weights_call(case: Case):
    steps = torch.rand(case.one(0, 1, 7, 200, 3000)) * case.one(0.0, 1e-30, 1.0, 4.0, 1e38)
    if case.chance(0.1) and len(steps):
        steps[0] = torch.inf
    steps, lam = steps.to(case.device), case.one(1e-30, 0.5, 1, 20.0, 1e30, 1e300)
    wanted = [step_weights(steps, lam)]
    yield "op", compared([ops.step_size_weights(steps, lam)], wanted)
    if in_interpreter(case):
        yield "kernel", compared([step_size_weights_launch(steps, min(lam, 3.4e38))], wanted)


def cross_entropy_call(case: Case):
    z, y = logits(case)
    weights = torch.rand(len(z), device=z.device) * 2 if case.chance(0.6) else None
    wanted = cross_entropy(z, y, weights)
    leaf = z.detach().requires_grad_()
    loss = ops.weighted_cross_entropy(leaf, y, weights)
    yield "op", compared([loss, *torch.autograd.grad(loss, leaf)], wanted)
    if in_interpreter(case):
        rows, grad = weighted_cross_entropy_launch(z, y, weights)
        yield "kernel", compared([rows.sum(), grad.to(z.dtype)], wanted)


def compact_call(case: Case):
    n = case.one(0, 1, 31, 33, 1000, 9000)
    flags = (torch.rand(2 * n) < case.one(0.0, 0.1, 0.5, 1.0)).to(case.device)
    flags = flags[::2] if case.chance(0.5) else flags[:n]
    yes = [i for i, flag in enumerate(flags.tolist()) if flag]
    no = [i for i, flag in enumerate(flags.tolist()) if not flag]
    for name, run in (("op", ops.compact), *((("kernel", compact_launch),) if in_interpreter(case) else ())):
        index, count = run(flags if name == "op" else flags.contiguous())
        right = index.tolist() == yes + no[::-1] and count.tolist() == [len(yes)]
        yield name, "" if right else f"{int(count)} of {len(yes)} flags, or their order"


def refused_call(case: Case):
    """A call that must be refused."""
    name, (run, error, argument) = case.random.choice(list(refusals(case).items()))
    case.name = f"refusal of {name}"
    kept = run.x_adv.clone()
    try:
        run()
    except (ValueError, TypeError) as refusal:
        told = type(refusal) is error and str(refusal).startswith(f"{argument}: ")
        yield "op", "" if told else f"said {type(refusal).__name__}: {refusal}"
    else:
        yield "op", "was not refused"
    yield "op", "" if torch.equal(run.x_adv, kept) else "x_adv changed"


CALLS = (pgd_call,) * 8 + (jump_call,) * 4 + (start_call,) * 3
CALLS += (margin_call, margin_call, weights_call, cross_entropy_call, compact_call) + (refused_call,) * 4


def run(calls: int, seed: int, device="cpu", only: int | None = None, kernels_every=1) -> tuple[Counter, list[str]]:
    """(how many calls of each kind, what was wrong); on a CPU the kernel is run at each `kernels_every`-th number."""
    kinds, wrong = Counter(), []
    for number in range(calls) if only is None else [only]:
        case = Case(seed, number, device, number % kernels_every == 0)
        call = case.random.choice(CALLS)
        kinds[call.__name__] += 1
        try:
            found = [f"{where}: {what}" for where, what in call(case) if what]
        except Exception as error:
            if only is not None:
                raise
            found = [f"{type(error).__name__}: {error}"]
        wrong += [f"call {number}, {case.name or call.__name__}, {what}" for what in found]
    return kinds, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=secrets.randbits(31), help="default: a fresh one, which is printed")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", type=int, help="the number of the one call to make, whose error is then raised")
    options = parser.parse_args()
    print(f"--seed {options.seed}", flush=True)
    warnings.simplefilter("ignore", RuntimeWarning)  # numpy, which interprets, on sums that are meant to overflow
    start = time.perf_counter()
    kinds, wrong = run(options.calls, options.seed, options.device, options.only)
    print(*wrong[:50], sep="\n")
    print(f"{kinds.total()} calls, {len(wrong)} wrong, {time.perf_counter() - start:.0f} s: {dict(kinds)}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
