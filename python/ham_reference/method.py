"""One batch of hard adversarial example mining, step by step as the paper tells it."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch.nn import functional as F

from . import noise


def column(value):
    """A number as it is; a tensor (n,), one value per row, so that it multiplies images."""
    return value.view(-1, 1, 1, 1) if isinstance(value, torch.Tensor) else value


def start_point(x, eps, norm, seed, step):
    """x0 = clip(x + noise), noise uniform in the eps-ball; eps is a number, or (n,)."""
    in_ball = noise.in_cube if norm == "linf" else noise.in_ball
    return (x + in_ball(x, eps, seed, step)).clamp(0, 1)


def input_gradient(model, x_adv, y):
    """(logits, gradient of the summed cross entropy with respect to the images)."""
    x_adv = x_adv.detach().requires_grad_()
    logits = model(x_adv)
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), x_adv)
    return logits.detach(), gradient


def pgd_step(x_adv, x, gradient, eps, step_size, norm):
    """Move along the gradient, project on the eps-ball around x, clip to [0, 1]; eps and step_size may be (n,)."""
    if norm == "linf":
        return project(x_adv + column(step_size) * gradient.sign(), x, eps, norm)
    return shortened(x, x_adv - x + column(step_size) * direction(gradient.nan_to_num(0, 0, 0))[0], eps)


def project(x_adv, x, eps, norm):
    """The nearest points in the eps-ball around x, clipped to [0, 1]."""
    if norm == "linf":
        return torch.min(torch.max(x_adv, x - column(eps)), x + column(eps)).clamp(0, 1)
    return shortened(x, x_adv - x, eps)


def shortened(x, delta, eps):
    """x + delta, where delta is not longer than eps, clipped to [0, 1]."""
    towards, length = direction(delta)
    return (x + torch.where(length > column(eps), column(eps) * towards, delta)).clamp(0, 1)


def direction(t):
    """(t / |t|, |t|) of each image; divided by its largest entry first, so that no square is too small or too large."""
    per_image = (-1, 1, 1, 1)
    largest = t.flatten(1).abs().amax(1).view(per_image)
    t = t / largest.where(largest > 0, 1)
    length = t.flatten(1).norm(dim=1).clamp_min(1).view(per_image)  # 1 at least, but where all is 0
    return t / length, largest * length


def is_hard(logits, y):
    """not (z_y > max of the others): misclassified, tied or NaN."""
    return ~(margin(logits, y) > 0)


def margin(logits, y):
    """z_y - max of the others, (n,)."""
    z_y = logits.gather(1, y[:, None]).squeeze(1)
    return z_y - logits.scatter(1, y[:, None], -torch.inf).amax(1)


def step_size_weights(max_step, lam):
    """sigmoid(lam * s), scaled to mean 1."""
    w = torch.sigmoid(lam * max_step)
    return w / w.mean()


class evaluating:
    """Eval mode inside a with block; every module's own mode afterwards."""

    def __init__(self, model):
        self.modes = [(module, module.training) for module in model.modules()]
        self.model = model

    def __enter__(self):
        self.model.eval()

    def __exit__(self, *_):
        for module, training in self.modes:
            module.training = training


def hard_examples(
    model, x, y, *, eps, step_size, steps, screen_steps, lam, reweight, early_drop, norm, seed, step, rows="hard"
):
    """(x_adv, y, weights, rows) of the examples to train on; rows are their places in the batch."""
    with evaluating(model):
        x_adv = start_point(x, eps, norm, seed, step)
        points = [x_adv]  # x0, x1, ...
        logits = []  # f(x0), f(x1), ...
        for _ in range(screen_steps if early_drop else steps):
            z, gradient = input_gradient(model, points[-1], y)
            logits.append(z)
            points.append(pgd_step(points[-1], x, gradient, eps, step_size, norm))

        kept = torch.arange(len(x), device=x.device)
        if early_drop:
            with torch.no_grad():
                z = model(points[-1])
            logits.append(z)
            kept = is_hard(z, y).nonzero().squeeze(1)
            if rows == "random":
                keys = noise.uniform(len(x), 1, seed, step, stream=2)[0][:, 0]
                kept = keys.argsort(stable=True)[: len(kept)].sort().values.to(x.device)
        x, y, x_adv = x[kept], y[kept], points[-1][kept]
        logits = [z[kept] for z in logits]

        if early_drop and len(kept) > 0:
            for k in range(screen_steps, steps):
                z, gradient = input_gradient(model, x_adv, y)
                if k > screen_steps:  # f(x^M) is known from the screening
                    logits.append(z)
                x_adv = pgd_step(x_adv, x, gradient, eps, step_size, norm)

    weights = torch.ones(len(kept), device=x.device)
    if reweight and len(kept) > 0:
        # the step size over the points that the attack looked at, x0 to x^(K-1)
        step_sizes = [(after - before).abs().sum(1) for before, after in pairwise(logits)]
        max_step = torch.stack(step_sizes).amax(0) if step_sizes else torch.zeros(len(kept), device=x.device)
        weights = step_size_weights(max_step, lam)
    return x_adv, y, weights, kept


def weighted_loss(model, x_adv, y, weights):
    """Mean over the hard rows of weight * cross entropy."""
    return (weights * F.cross_entropy(model(x_adv), y, reduction="none")).sum() / len(y)


def draw_seed(generator):
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(0, 2**62, (1,), generator=generator, device=device))


def pgd_attack(
    model, x, y, *, eps=8 / 255, step_size=2 / 255, steps=10, random_start=True, norm="linf", generator=None
):
    """K steps of PGD in eval mode."""
    with evaluating(model):
        seed = draw_seed(generator)
        x_adv = start_point(x, eps, norm, seed, step=0) if random_start else x.clone()
        for _ in range(steps):
            _, gradient = input_gradient(model, x_adv, y)
            x_adv = pgd_step(x_adv, x, gradient, eps, step_size, norm)
    return x_adv


def ham_loss(
    model, x, y, *, eps=8 / 255, step_size=2 / 255, steps=10, screen_steps=3, lam=1.0, reweight=True,
    early_drop=True, norm="linf", generator=None,
):  # fmt: skip
    """The loss of one batch; 0 when no example is hard."""
    x_adv, y, weights, _ = hard_examples(
        model, x, y, eps=eps, step_size=step_size, steps=steps, screen_steps=screen_steps, lam=lam,
        reweight=reweight, early_drop=early_drop, norm=norm, seed=draw_seed(generator), step=0,
    )  # fmt: skip
    if len(y) == 0:
        return torch.zeros((), device=x.device, requires_grad=True)
    return weighted_loss(model, x_adv, y, weights)
