"""Mining of one batch: screen, look, let the easy rows leave, finish the hard ones (arXiv 2308.01823)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..attack.pgd import PGD, ActiveSet, Attack
from ..engine import PLAIN, Engine
from ..ops._philox import ROWS, philox_uniform
from .settings import Method

_ops = torch.ops.ham_kernels


@dataclass
class Look:
    """What the attack saw of the whole batch, in eval mode, at the last point where it looked at all rows.

    That is x^M where rows are screened, else the point before the last step. It costs nothing.
    """

    z: Tensor  # (n, classes), logits in fp32
    y: Tensor  # (n,)
    target: Tensor | None = None  # (n, classes), the prediction of the clean images, where the attack follows that


@dataclass
class Examples:
    """What a batch became: the rows in the loss with their adversarial examples and weights."""

    x_adv: Tensor  # (n_kept, C, H, W)
    x: Tensor  # (n_kept, C, H, W), clean
    y: Tensor  # (n_kept,)
    weights: Tensor | None  # (n_kept,); None for ones
    n: int  # rows of the whole batch
    n_hard: int  # of which hard; all where nothing was screened
    index: Tensor | None = None  # int32 (n_kept,), which rows of the batch are in the loss; None for all
    rest: Tensor | None = None  # (n - n_kept, C, H, W), the other rows as they left; only where bn_rows is "all"
    rest_x: Tensor | None = None  # the same rows, clean
    max_step: Tensor | None = None  # (n_kept,), largest step of the logits, where steps are tracked
    hard: Tensor | None = None  # (n,) bool, the flags of the look; None where nothing was screened
    hard_counts: Sequence[int] | None = None  # of each batch, where several were attacked as one
    no_gradient: int = 0  # rows whose attack began without a gradient to follow
    look: Look | None = None  # where the method looks at classes
    teacher: Tensor | None = None  # (n_kept, classes) fp32, logits of the teacher at x, where there is one
    right: Tensor | None = None  # (n_kept,) fp32, at how many of the attack's K points a row was right, where counted

    @property
    def n_kept(self) -> int:
        """Rows in the loss: the hard ones and those that round_to adds; all where easy rows stop or jump."""
        return self.y.shape[0]

    @property
    def n_forward(self) -> int:
        """Rows that pass through the model in the update."""
        return self.n_kept if self.rest is None else self.n


def mine(
    model: nn.Module, x: Tensor, y: Tensor, pgd: PGD, method: Method, *, seed: int, step: int,
    engine: Engine = PLAIN, sizes: Sequence[int] | None = None,
) -> Examples:  # fmt: skip
    """Makes the adversarial examples of one batch, without weights, as `method` screens them.

    `sizes`: it is several batches, one after the other, which `split` takes apart; None for one.

    Cost in full-batch forwards, h the share of rows attacked to the end and M = screen_steps: 2K without screening,
    else 2M + 1 + 2h(K - M). The step size of row i is the largest |f(x^k) - f(x^(k-1))|_1 over k = 1..K-1: the points
    that the attack looks at anyway. f(x^K) is only ever computed in train mode, where it is no step of the attack.
    """
    with engine.attacking(model):
        attack = Attack(
            model, x, y, pgd, seed=seed, step=step, engine=engine, track=method.reweight,
            count_right=method.counts_right,
        )  # fmt: skip
        if not method.early_drop:
            attack.steps(pgd.steps)
            attack.guard.read()
            return replace(_examples(attack.rows, len(y), attack.guard.no_gradient), look=_look(method, attack))
        before = _screen(attack, method)
        hard, z = attack.look()
        look = _look(method, attack)
        order, count = _ops.compact(hard)
        counts = attack.guard.read(count if sizes is None else _of_each(hard, sizes))  # the one read of the step
        order, n_finished = _finished(method, order, counts, sizes or (len(y),), z, y, hard, seed, step)
        index, whole = order[:n_finished], attack.rows
        if before is not None:
            _jump(whole, before, _flags_of(index, hard), pgd, method)
        if n_finished:
            attack.keep(index)
            attack.steps(pgd.steps - method.screen_steps)
    found = {"n_hard": sum(counts), "hard": hard, "hard_counts": counts, "no_gradient": attack.guard.no_gradient}
    found["look"] = look
    if method.easy != "drop":
        if whole.right is not None:
            whole.right.fill_(pgd.steps)  # what a row resists at M it mostly resists to the end
        if n_finished:
            _put_back(whole, attack.rows, index.long())
        return replace(_examples(whole, len(y)), **found)
    kept = attack.rows if n_finished else whole.named(index)
    if method.bn_rows == "all":
        left = order[n_finished:].long()
        found |= {"rest": whole.x_adv[left], "rest_x": whole.x[left]}
    return replace(_examples(kept, len(y)), index=index, **found)


def _examples(rows: ActiveSet, n: int, no_gradient: int = 0) -> Examples:
    return Examples(
        rows.x_adv, rows.x, rows.y, None, n, n, max_step=rows.max_step, no_gradient=no_gradient, right=rows.right
    )


def _look(method: Method, attack: Attack) -> Look | None:
    rows = attack.rows
    return Look(rows.z.float(), rows.y, rows.target) if method.looks_at_classes and rows.z is not None else None


def _of_each(flags: Tensor, sizes: Sequence[int]) -> Tensor:
    """How many flags each batch has, (batches,)."""
    return torch.stack([part.sum() for part in flags.split(list(sizes))])


def _screen(attack: Attack, method: Method) -> Tensor | None:
    """The first M steps. Returns the points before the last of them, where easy rows will jump."""
    m = method.screen_steps
    if method.screen == "steps":
        attack.steps(m - 1)
    before = attack.rows.x_adv.clone() if method.easy == "jump" else None
    if method.screen == "steps":
        attack.steps(1)
    else:
        attack.stride(m)
    return before


def _jump(rows: ActiveSet, before: Tensor, stays: Tensor, pgd: PGD, method: Method) -> None:
    """Easy rows go on as far as the steps left reach, along their last one."""
    m = method.screen_steps
    last = pgd.share(m - 1 if method.screen == "steps" else 0, m)
    factor = pgd.share(m, pgd.steps) / last
    _ops.jump_(rows.x_adv, rows.x, before, stays, factor, rows.eps, rows.eps_rows, 0.0, 1.0, pgd.norm == "l2")


def _flags_of(index: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(like).index_fill_(0, index.long(), True)


def _put_back(whole: ActiveSet, finished: ActiveSet, index: Tensor) -> None:
    """The rows attacked to the end, in their places among all."""
    whole.x_adv[index] = finished.x_adv
    if finished.right is not None:
        whole.right[index] = finished.right
    if finished.max_step is not None:
        whole.max_step = whole.max_step.index_copy(0, index, finished.max_step)


# ---------------------------------------------------------------- which rows are attacked to the end
def _finished(
    method: Method, order: Tensor, counts: Sequence[int], sizes: Sequence[int], z: Tensor, y: Tensor, hard: Tensor,
    seed: int, step: int,
) -> tuple[Tensor, int]:  # fmt: skip
    """(all rows, int32, those to finish first; how many those are). Rows are rounded for one batch only."""
    if method.round_to > 1:
        counts = [min(-(-counts[0] // method.round_to) * method.round_to, len(y))]
        order = _hardest_first(z, y, hard)
    if method.rows == "random":
        order = _random_order(sizes, counts, seed, step, y.device)
    return order, sum(counts)


def _random_order(sizes: Sequence[int], counts: Sequence[int], seed: int, step: int, device: torch.device) -> Tensor:
    """All rows, int32: first as many random ones of each batch as are finished, in order, then the others."""
    keys = philox_uniform(sum(sizes), 1, seed, step, ROWS, device)[0][:, 0]
    first, others, start = [], [], 0
    for size, count in zip(sizes, counts, strict=True):
        order = start + torch.argsort(keys[start : start + size], stable=True)
        first.append(order[:count].sort().values)
        others.append(order[count:].sort(descending=True).values)
        start += size
    return torch.cat(first + others[::-1]).int()


def _hardest_first(z: Tensor, y: Tensor, hard: Tensor) -> Tensor:
    """All rows, int32: the hard ones in order, then the easy ones by their margin z_y - max_{j != y} z_j."""
    is_label = y[:, None] == torch.arange(z.shape[1], device=z.device)
    margin = z.masked_fill(~is_label, -torch.inf).amax(1) - z.masked_fill(is_label, -torch.inf).amax(1)
    return torch.argsort(margin.float().masked_fill(hard, -torch.inf), stable=True).int()


# ---------------------------------------------------------------- batches attacked together
def split(examples: Examples, sizes: Sequence[int]) -> list[Examples]:
    """The examples of batches that were attacked as one, batch by batch."""
    if len(sizes) == 1:
        return [examples]
    hard = sizes if examples.hard_counts is None else examples.hard_counts
    kept = sizes if examples.index is None else hard
    gone = [n - k for n, k in zip(sizes, kept, strict=True)]

    def cut(name: str, by: Sequence[int]) -> Sequence[Tensor | None]:
        t = getattr(examples, name)
        return [None] * len(sizes) if t is None else t.split(list(by))

    parts = {name: cut(name, kept) for name in ("x_adv", "x", "y", "index", "max_step", "right")}
    parts |= {"hard": cut("hard", sizes), "n": sizes, "n_hard": hard}
    if examples.look is not None:
        look = [t if t is None else t.split(list(sizes)) for t in vars(examples.look).values()]
        parts["look"] = [Look(*(None if t is None else t[b] for t in look)) for b in range(len(sizes))]
    parts["no_gradient"] = [examples.no_gradient] + [0] * (len(sizes) - 1)  # counted for all of them
    parts |= {name: cut(name, gone[::-1])[::-1] for name in ("rest", "rest_x")}  # those of the last batch first
    return [
        replace(examples, hard_counts=None, **{name: part[b] for name, part in parts.items()})
        for b in range(len(sizes))
    ]
