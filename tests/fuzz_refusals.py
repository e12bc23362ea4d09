"""Calls that an op must refuse, and the argument that its error must begin with."""

from __future__ import annotations

import math

import torch

from ham_kernels import ops


class Bad:
    """One call; `x_adv` is what it must leave as it was."""

    def __init__(self, op, **arguments):
        self.op, self.arguments = op, arguments
        self.x_adv = arguments.get("x_adv", torch.zeros(0))

    def __call__(self):
        self.op(**self.arguments)


def refusals(case) -> dict[str, tuple[Bad, type, str]]:
    """{name: (call, type of the error, argument that it names)}; what takes a look at the data on the CPU only."""
    n, c, h, w = (case.random.randint(2, 6) for _ in range(4))
    dtype, device = case.one(torch.float32, torch.float16, torch.bfloat16), case.device
    x = torch.rand(n, c, h, w, device=device).to(dtype)
    norm, classes = case.one("linf", "l2"), case.random.randint(2, 9)
    z, y = torch.randn(n, classes, device=device), torch.randint(classes, (n,), device=device)
    steps, bad_step = torch.rand(n, device=device), case.random.randrange(n)
    index = torch.randperm(n).int().to(device)
    twice, outside = index.clone(), index.clone()
    twice[0] = twice[-1]
    outside[case.random.randrange(n)] = case.one(-1, -(2**31), n, n + 7, 2**31 - 1)
    bad_values = steps.clone()
    bad_values[bad_step] = case.one(-1.0, -1e-30, math.nan, -math.inf)
    bad_number = case.one(-0.1, -1e-300, math.nan, math.inf, -math.inf)
    shared = {
        "expanded rows": x[:1].expand_as(x), "expanded channels": x[:, :1].expand_as(x),
        "expanded pixels": x[..., :1].expand_as(x), "one number": x[:1, :1, :1, :1].expand_as(x),
        "a sliding window": x.flatten()[: n + c * h * w - 1].unfold(0, c * h * w, 1).view(n, c, h, w),
    }  # fmt: skip

    images = {"x": x, "eps": 0.1, "norm": norm}

    def pgd(**change):
        return Bad(ops.pgd_step, **images | {"x_adv": x.clone(), "grad": x, "step_size": 0.1} | change)

    def jump(**change):
        more = {"x_adv": x.clone(), "before": x, "stays": steps > 0.5, "factor": 1.0}
        return Bad(ops.jump, **images | more | change)

    def start(**change):
        return Bad(ops.random_start, **images | {"seed": 1} | change)

    def margin(**change):
        return Bad(ops.margin_stats, **{"logits": z, "y": y} | change)

    def weights(**change):
        return Bad(ops.step_size_weights, **{"max_step": steps, "lam": 1.0} | change)

    def cross_entropy(**change):
        return Bad(ops.weighted_cross_entropy, **{"logits": z, "y": y} | change)

    def count(value):
        return torch.tensor([value], dtype=torch.int32, device=device)

    less = case.random.randint(0, n - 1)
    found = {f"pgd_step, x_adv: {name}": (pgd(x_adv=t), ValueError, "x_adv") for name, t in shared.items()}
    found |= {f"jump, x_adv: {name}": (jump(x_adv=t), ValueError, "x_adv") for name, t in shared.items()}
    found |= {
        "pgd_step, shape of x": (pgd(x=x[1:]), ValueError, "x"),
        "pgd_step, dtype of x": (pgd(x=x.double()), TypeError, "x"),
        "pgd_step, rows of grad": (pgd(grad=x[1:]), ValueError, "grad"),
        "pgd_step, dtype of grad": (pgd(grad=x.long()), TypeError, "grad"),
        "pgd_step, no tensor": (pgd(grad=None), TypeError, "grad"),
        "pgd_step, index shorter than grad": (pgd(index=index[1:]), ValueError, "grad"),
        "pgd_step, dtype of index": (pgd(index=index.long()), TypeError, "index"),
        "pgd_step, shape of count": (pgd(count=count(1)[0]), ValueError, "count"),
        "pgd_step, dtype of count": (pgd(count=count(1).long()), TypeError, "count"),
        "pgd_step, eps": (pgd(eps=bad_number), ValueError, "eps"),
        "pgd_step, step_size": (pgd(step_size=bad_number), ValueError, "step_size"),
        "pgd_step, rows of eps": (pgd(eps=steps[1:]), ValueError, "eps"),
        "pgd_step, norm": (pgd(norm="l1"), ValueError, "norm"),
        "pgd_step, lo": (pgd(lo=1.0, hi=case.one(1.0, 0.0)), ValueError, "lo"),
        "jump, factor": (jump(factor=bad_number), ValueError, "factor"),
        "jump, eps": (jump(eps=bad_number), ValueError, "eps"),
        "jump, stays": (jump(stays=steps), TypeError, "stays"),
        "jump, before": (jump(before=x[1:]), ValueError, "before"),
        "random_start, eps": (start(eps=bad_number), ValueError, "eps"),
        "random_start, seed": (start(seed=case.one(2**63, -(2**63) - 1)), ValueError, "seed"),
        "random_start, step": (start(step=case.one(-1, 2**31)), ValueError, "step"),
        "random_start, first_row": (start(first_row=case.one(-1, 2**31)), ValueError, "first_row"),
        "margin_stats, prev": (margin(prev=z[1:]), ValueError, "prev"),
        "margin_stats, labels": (margin(y=y.int()), TypeError, "y"),
        "margin_stats, rows of max_step": (margin(max_step=steps[1:]), ValueError, "max_step"),
        "step_size_weights, lam": (weights(lam=bad_number), ValueError, "lam"),
        "weighted_cross_entropy, weights": (cross_entropy(weights=steps[1:]), ValueError, "weights"),
        "compact, dtype": (Bad(ops.compact, flags=steps), TypeError, "flags"),
        "compact, shape": (Bad(ops.compact, flags=z > 0), ValueError, "flags"),
    }  # fmt: skip
    if device.type == "cpu":
        found |= {
            "pgd_step, a row twice": (pgd(index=twice), ValueError, "index"),
            "pgd_step, a row outside": (pgd(index=outside), ValueError, "index"),
            "pgd_step, a negative count": (pgd(count=count(case.one(-1, -(2**31)))), ValueError, "count"),
            "pgd_step, count beyond x": (pgd(count=count(case.one(n + 1, 2**31 - 1))), ValueError, "count"),
            "pgd_step, count beyond grad": (pgd(grad=x[:less], index=index, count=count(n)), ValueError, "count"),
            "pgd_step, values of eps": (pgd(eps=bad_values), ValueError, "eps"),
            "pgd_step, values of step_size": (pgd(step_size=bad_values), ValueError, "step_size"),
            "jump, values of eps": (jump(eps=bad_values), ValueError, "eps"),
            "random_start, values of eps": (start(eps=bad_values), ValueError, "eps"),
            "margin_stats, values of max_step": (margin(max_step=bad_values), ValueError, "max_step"),
            "step_size_weights, values": (weights(max_step=bad_values), ValueError, "max_step"),
            "margin_stats, a label": (margin(y=y - classes), ValueError, "y"),
            "weighted_cross_entropy, a label": (cross_entropy(y=y + classes), ValueError, "y"),
        }  # fmt: skip
    return found
