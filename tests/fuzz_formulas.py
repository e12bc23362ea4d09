"""What each op should give, in fp64: for every entry the smallest and the largest value that is right.

The bounds allow for fp32 inside and one rounding to the dtype of the result, and for nothing else. Where a formula is
monotone (L-inf) the errors go through it as they are; under L2 they are lengths, which a projection scales.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ham_reference.noise import uniform

# One rounding (Triton's interpreter truncates to bf16), and the smallest number (in bf16 the smallest that is not
# denormal: the interpreter garbles those below), or a few of fp32.
UNIT = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
SMALLEST = {torch.float32: 1e-43, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-126}
ONE = 2.0**-22  # two roundings in fp32
SUM = 4e-6  # a length, a logarithm or a cosine in fp32, relative


def ends(got: Tensor, lower: Tensor, upper: Tensor) -> str:
    """Where `got` is not in [lower, upper], in words; NaN must be NaN."""
    got, lower, upper = (t.detach().double().cpu() for t in (got, lower, upper))
    if got.shape != lower.shape:
        return f"shape {tuple(got.shape)}, not {tuple(lower.shape)}"
    wrong = ~((got >= lower) & (got <= upper)) & ~(got.isnan() & lower.isnan())
    if not wrong.any():
        return ""
    i = tuple(wrong.nonzero()[0].tolist())
    return f"{int(wrong.sum())} of {wrong.numel()} wrong, at {i} {got[i]!r}, not in [{lower[i]!r}, {upper[i]!r}]"


def compared(got, wanted) -> str:
    """`wanted`: (lower, upper) for each result, None where nothing is promised."""
    return "; ".join(filter(None, (ends(g, *w) for g, w in zip(got, wanted, strict=True) if w is not None)))


def rounded(lower: Tensor, upper: Tensor, dtype) -> tuple[Tensor, Tensor]:
    unit, smallest = UNIT[dtype], SMALLEST[dtype]
    return lower - unit * lower.abs() - smallest, upper + unit * upper.abs() + smallest


def fp32(value: float | Tensor, like: Tensor) -> float | Tensor:
    """eps or step_size as the ops reckon with it, in fp64: a number, or a column."""
    if isinstance(value, Tensor):
        return value.cpu().float().double().view(-1, *[1] * (like.dim() - 1))
    return torch.tensor(min(value, torch.finfo(torch.float32).max)).double().item()


def length(t: Tensor) -> Tensor:
    return t.flatten(1).norm(dim=1).view(-1, *[1] * (t.dim() - 1))


# ---------------------------------------------------------------- into the ball and the range of pixels
def in_cube(v: Tensor, error: Tensor, x: Tensor, eps, lo, hi, dtype) -> tuple[Tensor, Tensor]:
    """v, known up to `error`, projected and clipped."""
    slack = ONE * (x.abs() + eps)
    sides = [(v + s * error).clamp(x - eps + s * slack, x + eps + s * slack) for s in (-1, 1)]
    return rounded(*(clipped(side, lo, hi) for side in sides), dtype)


def in_ball(delta: Tensor, error: Tensor, x: Tensor, eps, lo, hi, dtype) -> tuple[Tensor, Tensor]:
    """x + delta projected and clipped; `error` is the length by which delta may be off."""
    size = length(delta)
    eps = torch.as_tensor(eps, dtype=torch.float64)
    shrink = (eps / size).where(size > 0, 1.0).clamp_max(1.0)
    # off by this much before the projection, at least size - error long: so much is left of it after
    left = (eps / (size - error).clamp_min(1e-300)).clamp_max(1.0)
    off = torch.minimum(2 * error * left, 2 * eps) + SUM * torch.minimum(size, eps)
    point = x + delta * shrink
    slack = off + ONE * (x.abs() + (point - x).abs()) + SMALLEST[torch.float32]
    return rounded(*(clipped(point + s * slack, lo, hi) for s in (-1, 1)), dtype)


def clipped(t: Tensor, lo, hi) -> Tensor:
    lo, hi = (torch.tensor(float(v)).double().item() for v in (lo, hi))
    return t.clamp(lo, hi)


# ---------------------------------------------------------------- ops on images
def pgd_target(x_adv, x, grad, eps, step, active: dict, lo, hi, norm) -> tuple[Tensor, Tensor]:
    rows = active["index"].cpu().long() if "index" in active else torch.arange(len(x))
    rows = rows[: int(active["count"]) if "count" in active else len(grad)]
    eps, step = (v[rows] if isinstance(v, Tensor) else v for v in (fp32(eps, x), fp32(step, x)))
    a, c, g = x_adv[rows].double(), x[rows].double(), grad[: len(rows)].double()
    lower, upper = x_adv.double(), x_adv.double()
    if norm == "linf":
        new = in_cube(a + step * g.nan_to_num(0.0).sign(), ONE * (a.abs() + step), c, eps, lo, hi, x.dtype)
    else:
        g = g.where(g.isfinite(), 0.0)
        size = length(g)
        moved = step * (g / size.where(size > 0, 1.0))
        error = SUM * (length(a - c) + length(moved)) + SMALLEST[torch.float32] * math.sqrt(g[:1].numel())
        new = in_ball(a - c + moved, error, c, eps, lo, hi, x.dtype)
    return tuple(t.index_copy(0, rows, side) for t, side in zip((lower, upper), new, strict=True))


def jump_target(x_adv, x, before, stays, factor, eps, lo, hi, norm) -> tuple[Tensor, Tensor]:
    a, c, b, eps = x_adv.double(), x.double(), before.double(), fp32(eps, x)
    factor = fp32(factor, x)
    v, error = a + (a - b) * factor, ONE * (a.abs() + (a - b).abs() * factor)
    if norm == "linf":
        new = in_cube(v, error, c, eps, lo, hi, x.dtype)
    else:
        new = in_ball(v - c, length(error + ONE * (v - c).abs()) + 1e-43, c, eps, lo, hi, x.dtype)
    stays = stays.view(-1, *[1] * (x.dim() - 1))
    return tuple(a.where(stays, side) for side in new)


def start_target(x, eps, seed: int, step: int, lo, hi, norm, first_row=0) -> tuple[Tensor, Tensor]:
    numel, c, eps, n = math.prod(x.shape[1:]), x.double(), fp32(eps, x), first_row + len(x)
    planes = uniform(n, math.ceil(numel / 4), seed, step, stream=0)
    a, b, d, e = (u[first_row:].double() for u in planes)
    if norm == "linf":
        noise = (2 * torch.cat((a, b, d, e), 1)[:, :numel] - 1).view(x.shape) * eps
        slack = ONE * (c.abs() + eps)
    else:
        planes = []
        for u, v in ((a, b), (d, e)):  # Box-Muller
            far = torch.sqrt(-2 * torch.log(1 - u))
            planes += [far * torch.cos(2 * math.pi * v), far * torch.sin(2 * math.pi * v)]
        gaussian = torch.cat(planes, 1)[:, :numel].view(x.shape)
        size = length(gaussian).clamp_min(1e-12)
        radius = uniform(n, 1, seed, step, stream=1)[0][first_row:].double()
        radius = length(radius.view(c[:, :1].flatten(1)[:, :1].shape))
        radius = radius.view(size.shape) ** (1 / numel) * eps
        noise = gaussian / size * radius
        # cosine and sine are off by some 1e-6 of the largest number, which is at most 5.8
        slack = radius * (SUM + 6e-6 * (1 + math.sqrt(numel)) / size) + ONE * (c.abs() + noise.abs())
    return rounded(*(clipped(c + noise + s * slack, lo, hi) for s in (-1, 1)), x.dtype)


# ---------------------------------------------------------------- ops on logits
def about(t: Tensor, relative: float, absolute, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    """Bounds around t, which overflows where fp32 does."""
    off = relative * t.abs() + absolute
    lower, upper = rounded(t - off, t + off, dtype)
    beyond, most = t.abs() > 3.4e38, torch.finfo(torch.float32).max
    lower, upper = (side.where(~beyond, t.float().double()) for side in (lower, upper))
    return lower.clamp_max(most).where(t.isfinite(), lower), upper.clamp_min(-most).where(t.isfinite(), upper)


def margin(z, y, prev, max_step, space) -> list:
    """Bounds of (grad, hard, max_step); rows whose logits are not all finite have no gradient that counts."""
    one_hot = torch.nn.functional.one_hot(y, z.shape[1]).bool() if len(y) else torch.zeros_like(z).bool()
    wide = z.double()
    grad = torch.softmax(wide, 1) - one_hot.double()
    finite = wide.isfinite().all(1, keepdim=True)
    lower, upper = about(grad, SUM, 1e-6, z.dtype)
    bounds = [(lower.where(finite, -torch.inf), upper.where(finite, torch.inf))]
    if not bool(finite.all()):
        bounds[0] = None  # what softmax makes of infinities is not promised
    hard = ~(wide.masked_fill(~one_hot, -torch.inf).amax(1) > wide.masked_fill(one_hot, -torch.inf).amax(1))
    hard |= wide.isnan().any(1)
    bounds.append((hard.double(), hard.double()))
    if prev is None and max_step is None:
        return [*bounds, None]
    step = torch.zeros(len(z), dtype=torch.float64, device=z.device)
    absolute = 0.0
    if prev is not None:
        now, then = (t.double() for t in (z, prev))
        if space == "probs":
            now, then, absolute = torch.softmax(now, 1), torch.softmax(then, 1), 1e-5
        step = (now - then).abs().sum(1)
    if max_step is not None:
        step = torch.maximum(step, max_step.double())
    return [*bounds, about(step, SUM, absolute)]


def step_weights(steps: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    w = torch.sigmoid(steps.double() * lam)
    return about(w / w.mean() if len(w) else w, SUM, 0.0)


def cross_entropy(z, y, weights) -> list:
    """Bounds of (loss, its gradient with respect to the logits)."""
    n, wide = max(len(z), 1), z.double()
    weights = torch.ones(len(z), device=z.device) if weights is None else weights
    scale = weights.double()[:, None] / n
    log_p = torch.log_softmax(wide, 1)
    terms = -log_p.gather(1, y[:, None]) * scale
    one_hot = torch.zeros_like(wide).scatter(1, y[:, None], 1.0)
    spread = ((wide.abs().amax(1, keepdim=True) + 10) * scale).sum() if len(z) else 0.0
    lower, upper = about((torch.softmax(wide, 1) - one_hot) * scale, SUM, 0.0, z.dtype)
    return [about(terms.sum(), SUM, 1e-6 * spread), (lower - 1e-6 * scale, upper + 1e-6 * scale)]
