"""Mining of one batch: screen, look, let the easy rows leave, finish the hard ones (arXiv 2308.01823)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..attack.pgd import PGD, ActiveSet, Attack
from ..distributed import ALONE, Meeting, Ranks
from ..distributed.balance import Plan, back, move, pays, plan
from ..engine import PLAIN, Engine
from ..ops._philox import ROWS, philox_uniform
from .settings import Method

_ops = torch.ops.ham_kernels


TINY = 1e-30  # in place of a mean of weights that are all 0


class Everywhere(NamedTuple):
    """Rows over all processes."""

    n: int  # of the whole batch
    n_hard: int
    n_kept: int  # in the loss


@dataclass(frozen=True)
class Place:
    """The part of a batch that this process has: its rows follow one another, those of lower processes before them."""

    ranks: Ranks = ALONE
    first_row: int = 0
    n: int | None = None  # rows of the whole batch; None: as many as are here
    meeting: Meeting | None = None  # where the processes meet when they have looked
    rebalances: bool = True  # hard rows move to processes that have fewer, for the rest of the attack and the update


WHOLE = Place()  # of a batch that this process has alone


@contextmanager
def place_of(ranks: Ranks, rows: Sequence[float], device: torch.device, rebalances: bool = True) -> Iterator[Place]:
    """The place of this process in a batch of which process r has rows[r]; an error within is told to the others."""
    if not ranks.several:
        yield WHOLE
        return
    sizes = [int(n) for n in rows]
    with Meeting(ranks, device, alike=sum(sizes)) as meeting:
        yield Place(ranks, sum(sizes[: ranks.rank]), sum(sizes), meeting, rebalances)


@dataclass
class Look:
    """What the attack saw of the whole batch, in eval mode, at the last point where it looked at all rows.

    That is x^M where rows are screened, else the point before the last step. It costs nothing.
    """

    z: Tensor  # (n, classes), logits in fp32
    y: Tensor  # (n,)
    target: Tensor | None = None  # (n, classes), the prediction of the clean images, where the attack follows that
    ranks: Ranks = ALONE  # the processes that look, each at its rows


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
    label_ce: Tensor | None = None  # (n_kept,) fp32, cross entropy at the look, where trust weighs rows
    hard: Tensor | None = None  # (n,) bool, the flags of the look; None where nothing was screened
    hard_counts: Sequence[int] | None = None  # of each batch, where several were attacked as one
    no_gradient: int = 0  # rows whose attack began without a gradient to follow
    look: Look | None = None  # where the method looks at classes
    teacher: Tensor | None = None  # (n_kept, classes) fp32, logits of the teacher at x, where there is one
    right: Tensor | None = None  # (n_kept,) fp32, at how many of the attack's K points a row was right, where counted
    # (n_kept, C, H, W), the last point before the attack turned a row, x_adv where it did not; where it is kept
    last_right: Tensor | None = None
    ranks: Ranks = field(default=ALONE, repr=False)  # each has some of the rows; n and n_hard are of this one
    weight_sum: Tensor | None = None  # 0-dim, by which the processes still have to divide; see `of_mean_one`
    of_all: Everywhere | None = None  # where there are others

    @property
    def everywhere(self) -> Everywhere:
        """Rows over all processes."""
        return self.of_all or Everywhere(self.n, self.n_hard, self.n_kept)

    def of_mean_one(self, weights: Tensor) -> Tensor:
        """(n_kept,): weights divided by their mean; rows that all weigh nothing stay so.

        Those of several processes stay as they are, and their loss is divided by the mean over all of them, since it
        can then be summed together with their losses.
        """
        if not self.ranks.several:
            return weights / weights.mean().clamp_min(TINY)
        self.weight_sum = weights.detach().sum()
        return weights

    @property
    def without_statistics(self) -> bool:
        """Whether BatchNorm has one row alone to take them of."""
        return (self.everywhere.n_kept if self.ranks.several else self.n_forward) == 1

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
    engine: Engine = PLAIN, sizes: Sequence[int] | None = None, place: Place = WHOLE,
) -> Examples:  # fmt: skip
    """Makes the adversarial examples of one batch, without weights, as `method` screens them.

    `sizes`: it is several batches, one after the other, which `split` takes apart; None for one.
    `place`: x and y are the rows of this process. All meet at the look, or where there is none at the end.

    Cost in full-batch forwards, h the share of rows attacked to the end and M = screen_steps: 2K without screening,
    else 2M + 1 + 2h(K - M). The step size of row i is the largest |f(x^k) - f(x^(k-1))|_1 over k = 1..K-1: the points
    that the attack looks at anyway. f(x^K) is only ever computed in train mode, where it is no step of the attack.
    """
    ranks = place.ranks
    with engine.attacking(model):
        attack = Attack(
            model, x, y, pgd, seed=seed, step=step, engine=engine, track=method.reweight,
            count_right=method.counts_right, first_row=place.first_row, meeting=place.meeting,
            keep_right=method.keeps_last_right,
        )  # fmt: skip
        if not method.early_drop:
            attack.steps(pgd.steps)
            attack.guard.read()
            _note_label_ce(attack.rows, method)
            examples = _examples(attack.rows, len(y), attack.guard.no_gradient)
            return _placed(replace(examples, look=_look(method, attack, ranks)), method, place, place.n)
        before = _screen(attack, method)
        hard, z = attack.look()
        look = _look(method, attack, ranks)
        order, count = _ops.compact(hard)
        counts = attack.guard.read(count if sizes is None else _of_each(hard, sizes))  # the one read of the step
        _note_label_ce(attack.rows, method)
        n_hard, even = sum(counts), None
        if ranks.several:  # they are those of each process
            even = _even(counts, place, method)
            counts = [counts[ranks.rank]]
        if ranks.several and method.rows == "random":
            order, n_finished = _random_here(place, len(y), n_hard, seed, step, y.device)
        else:
            order, n_finished = _finished(method, order, counts, sizes or (len(y),), z, y, hard, seed, step)
        index, whole = order[:n_finished], attack.rows
        if before is not None:
            _jump(whole, before, _flags_of(index, hard), pgd, method)
        if n_finished or (ranks.several and n_hard):  # no row here, but a sharded model's forward takes all processes
            attack.keep(index)
            if even is not None:
                attack.rows = _moved(attack.rows, even, ranks)
            attack.steps(pgd.steps - method.screen_steps)
    found = {"n_hard": sum(counts), "hard": hard, "hard_counts": counts, "no_gradient": attack.guard.no_gradient}
    found["look"] = look
    if method.easy != "drop":
        if even is not None:
            attack.rows = _moved(attack.rows, even, ranks, home=True)
        if whole.right is not None:
            whole.right.fill_(pgd.steps)  # what a row resists at M it mostly resists to the end
        if whole.wrong is not None:
            whole.wrong.zero_()
        if n_finished:
            _put_back(whole, attack.rows, index.long())
        return _placed(replace(_examples(whole, len(y)), **found), method, place, n_hard)
    kept = attack.rows if n_finished or even is not None else whole.named(index)
    if method.bn_rows == "all":
        left = order[n_finished:].long()
        found |= {"rest": whole.x_adv[left], "rest_x": whole.x[left]}
    index = index if even is None else None  # rows of other processes may be among them, and some of these with others
    return _placed(replace(_examples(kept, len(y)), index=index, **found), method, place, n_hard)


# ---------------------------------------------------------------- hard rows on several processes
def _even(counts: Sequence[int], place: Place, method: Method) -> Plan | None:
    """The plan by which hard rows move, the same on each process; None where they stay. No process is left without one
    where there are enough: not every model takes a batch of none.
    """
    if not place.rebalances or method.rows == "random":
        return None
    starved = 0 in counts and sum(counts) >= len(counts)
    return plan(counts) if starved or pays(counts, place.n // len(counts)) else None


_TRAVELS = (
    "x_adv", "x", "y", "eps_rows", "step_rows", "max_step", "target", "right", "wrong", "last_right", "label_ce",
)  # fmt: skip


def _moved(rows: ActiveSet, even: Plan, ranks: Ranks, home: bool = False) -> ActiveSet:
    """The hard rows that are here after the move; with `home`, those that were here before it, as they have become."""
    have = {name: t for name in _TRAVELS if (t := getattr(rows, name)) is not None}
    go = back if home else move
    arrived = go(list(have.values()), even, ranks.rank, ranks.group)
    return replace(rows, **dict(zip(have, arrived, strict=True)), largest=None, z=None, prev=None)


def _placed(examples: Examples, method: Method, place: Place, n_hard: int | None) -> Examples:
    """With what is known of the rows of other processes."""
    if not place.ranks.several:
        return examples
    n_kept = n_hard if method.early_drop and method.easy == "drop" else place.n
    return replace(examples, ranks=place.ranks, of_all=Everywhere(place.n, n_hard, n_kept))


def _examples(rows: ActiveSet, n: int, no_gradient: int = 0) -> Examples:
    last_right = rows.last_right
    if last_right is not None:
        never = (rows.wrong == 0).view(-1, *[1] * (last_right.dim() - 1))
        last_right = torch.where(never, rows.x_adv, last_right)
    return Examples(
        rows.x_adv, rows.x, rows.y, None, n, n, max_step=rows.max_step, no_gradient=no_gradient, right=rows.right,
        last_right=last_right, label_ce=rows.label_ce,
    )  # fmt: skip


def _look(method: Method, attack: Attack, ranks: Ranks) -> Look | None:
    rows = attack.rows
    if not method.looks_at_classes or rows.z is None:
        return None
    return Look(rows.z.float(), rows.y, rows.target, ranks)


def _note_label_ce(rows: ActiveSet, method: Method) -> None:
    """For `trust`, at the look; labels have been judged."""
    if method.trust:
        rows.label_ce = F.cross_entropy(rows.z.float(), rows.y, reduction="none")


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
    for name in ("x_adv", "right", "wrong", "last_right"):
        if (t := getattr(finished, name)) is not None:
            getattr(whole, name)[index] = t
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


def _random_here(place: Place, rows: int, count: int, seed: int, step: int, device: torch.device) -> tuple[Tensor, int]:
    """The same of the rows of one process: `count` are chosen of the whole batch, as one process would."""
    chosen = _random_order([place.n], [count], seed, step, device)[:count].long() - place.first_row
    first = chosen[(chosen >= 0) & (chosen < rows)]
    others = torch.ones(rows, dtype=torch.bool, device=device).index_fill_(0, first, False).nonzero()[:, 0]
    return torch.cat([first, others]).int(), len(first)


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

    of_kept = ("x_adv", "x", "y", "index", "max_step", "label_ce", "right", "last_right")
    parts = {name: cut(name, kept) for name in of_kept}
    parts |= {"hard": cut("hard", sizes), "n": sizes, "n_hard": hard}
    if examples.look is not None:
        of = examples.look
        look = [t if t is None else t.split(list(sizes)) for t in (of.z, of.y, of.target)]
        parts["look"] = [Look(*(None if t is None else t[b] for t in look)) for b in range(len(sizes))]
    parts["no_gradient"] = [examples.no_gradient] + [0] * (len(sizes) - 1)  # counted for all of them
    parts |= {name: cut(name, gone[::-1])[::-1] for name in ("rest", "rest_x")}  # those of the last batch first
    return [
        replace(examples, hard_counts=None, **{name: part[b] for name, part in parts.items()})
        for b in range(len(sizes))
    ]
