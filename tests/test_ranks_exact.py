"""Processes against one: 60 updates in fp64, single ones from random states; and against each other, bit by bit."""

from __future__ import annotations

import copy
import hashlib
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from rank_helpers import on_ranks
from test_ranks_training import CLASSES, far, mine
from torch import nn
from torch.nn import functional as F

import ham_kernels as ham
from ham_kernels.methods import HAM, NFGSM, PGDAT, Natural, mining
from ham_kernels.methods.losses import weighted_mean
from ham_kernels.methods.objective import Objective

pytestmark = pytest.mark.slow


# ---------------------------------------------------------------- 60 updates in fp64
class Exact(HAM):
    """HAM with weights and loss in fp64. The package's are in fp32, where the order of a sum shows."""

    def weights(self, examples, memory):
        return examples.of_mean_one(torch.sigmoid(self.lam * examples.max_step.double()))

    def loss_of(self, model, examples, memory):
        z = model(examples.x_adv)
        return weighted_mean(F.cross_entropy(z, examples.y, reduction="none"), examples.weights)


class InDouble(nn.Sequential):
    """The ops take images and logits in fp32 at most. An attack sees those, and rounding keeps the sign of a gradient;
    an update stays in fp64.
    """

    def forward(self, x):
        z = super().forward(x.double())
        return z if self.training else z.float()


def exact_net(norm: str) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(6) if norm == "batch" else nn.GroupNorm(2, 6)
    return InDouble(
        nn.Conv2d(1, 6, 3, padding=1), layer, nn.Tanh(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(24, CLASSES)
    ).double()


def uneven_batches() -> list:
    """19 batches of 24 rows, the last third without a pattern, and one of 3: the last process has most hard rows, and
    in the end one may have none.
    """
    g = torch.Generator().manual_seed(7)
    made = []
    for rows in (*[24] * 19, 3):
        y = torch.randint(CLASSES, (rows,), generator=g)
        x = torch.rand(rows, 1, 8, 8, generator=g) * 0.5
        easy = torch.arange(rows - rows // 3)
        x[easy, 0, y[easy]] += 0.5
        made.append((x, y))
    return made


def exact(rank: int, norm: str, rebalance: bool, world: int | None = None) -> dict:
    """The state after 60 updates of one process's rows, and how many rows have moved."""
    alone, world = world == 1, world or dist.get_world_size()
    model = exact_net(norm)
    trainer = ham.Trainer(
        model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), Exact(start_epoch=1, screen_steps=2),
        eps=0.1, step_size=0.03, steps=4, ema_decay=0.9, seed=3, group=None if alone else "auto", rebalance=rebalance,
    )  # fmt: skip
    moved, move = [0], mining.move

    def counted(tensors, even, *how):
        moved[0] += even.moved
        return move(tensors, even, *how)

    with mock.patch.object(mining, "move", counted):
        trainer.fit([mine(batch, rank, world) for batch in uneven_batches()], 3)
    state = trainer.state_dict()
    momentum = {k: s["momentum_buffer"] for k, s in state["optimizer"]["state"].items()}
    counts = [(r.n, r.n_hard, r.n_kept, r.skipped) for r in trainer.history]
    return {"state": {"model": state["model"], "ema": state["ema"], "momentum": momentum}, "counts": counts,
            "moved": moved[0], "updates": trainer.steps_done}  # fmt: skip


CASES = [("batch", True), ("batch", False), ("group", True)]


# ---------------------------------------------------------------- one update from a random state
STATES = 20
KINDS = {
    "ham": HAM(start_epoch=1, screen_steps=2),
    "ham, l2": HAM(start_epoch=1, screen_steps=2),
    "ham, random rows": HAM(start_epoch=1, screen_steps=2, rows="random"),
    "pgd_at": PGDAT(start_epoch=1),
    "natural": Natural(),
    "n_fgsm": NFGSM(),
}


def random_state(seed: int, g: torch.Generator) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A net of random width, its BatchNorm's running statistics too, and 1 to 32 images, of which it knows some."""
    width, rows, known = (int(torch.randint(low, high, (), generator=g)) for low, high in ((2, 9), (1, 33), (0, 4)))
    torch.manual_seed(seed)
    layer = nn.BatchNorm2d(width) if seed % 2 else nn.GroupNorm(1, width)
    model = nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), layer, nn.Tanh(), nn.AvgPool2d(4), nn.Flatten(),
        nn.Linear(4 * width, CLASSES),
    )  # fmt: skip
    with torch.no_grad():
        model[-1].weight.mul_(1 + 3 * torch.rand((), generator=g))
        if seed % 2:
            layer.running_mean.copy_(0.1 * torch.randn(width, generator=g))
            layer.running_var.copy_(0.1 + torch.rand(width, generator=g))
    x = torch.rand(rows, 1, 8, 8, generator=g)
    y = torch.randint(CLASSES, (rows,), generator=g)
    with torch.no_grad():
        says = model.eval()(x).argmax(1)
    return model.train(), x, torch.where(torch.randint(4, (rows,), generator=g) < known, says, y)


def one_update(rank: int, kind: str, seed: int, world: int | None = None) -> dict:
    """The weights after an update, its loss, and of the rows of this process which are hard and which are finished."""
    alone, world = world == 1, world or dist.get_world_size()
    g = torch.Generator().manual_seed(seed)
    model, x, y = random_state(seed, g)
    eps = 0.5 * float(torch.rand((), generator=g))
    budget = (
        {"eps": 4 * eps, "step_size": eps, "norm": "l2"} if kind.endswith("l2") else {"eps": eps, "step_size": eps / 3}
    )
    trainer = ham.Trainer(
        model, torch.optim.SGD(model.parameters(), 0.1), KINDS[kind], **budget, steps=4, seed=seed,
        group=None if alone else "auto",
    )  # fmt: skip
    made, group_examples = [], Objective.group_examples

    def noted(*args, **how):
        made.extend(group_examples(*args, **how))
        return made

    with mock.patch.object(Objective, "group_examples", noted):
        report = trainer.train_step(*mine((x, y), rank, world), epoch=1)
    (examples,) = made
    rows = {} if examples.hard is None else {"hard": examples.hard}
    if kind.endswith("random rows"):
        rows["finished"] = torch.zeros_like(examples.hard).index_fill_(0, examples.index.long(), True)
    counts = report.n, report.n_hard, report.n_kept
    return {"model": model.state_dict(), "loss": report.loss, "counts": counts, "rows": rows}


# ---------------------------------------------------------------- 6 updates in fp32
def six(rank: int, world: int | None = None, midway: dict | None = None) -> dict:
    """The weights after 6 updates by the package's own arithmetic, the last three from the state `midway` on. An L2
    attack has no sign that rounding could turn.
    """
    alone, world = world == 1, world or dist.get_world_size()
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Tanh(), nn.AvgPool2d(4), nn.Flatten(),
        nn.Linear(24, CLASSES),
    )  # fmt: skip
    trainer = ham.HAMTrainer(
        model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), eps=1.0, step_size=0.3, steps=4, norm="l2",
        screen_steps=2, start_epoch=1, ema_decay=0.5, seed=3, group=None if alone else "auto",
    )  # fmt: skip
    batches = [mine(batch, rank, world) for batch in uneven_batches()[-6:]]
    if midway is None:
        trainer.fit(batches[:3], 1)
        midway = copy.deepcopy(trainer.state_dict())
    else:
        trainer.load_state_dict(copy.deepcopy(midway))  # the processes share its memory
    trainer.fit(batches[3:], 2)
    state, last = trainer.state_dict(), trainer.history[-1]
    weights = {"model": state["model"], "ema": state["ema"]}
    return {"weights": weights, "midway": midway, "counts": (last.n, last.n_hard, last.skipped)}


# ---------------------------------------------------------------- 100 updates, by their bits
def digests(rank: int, precision: str) -> dict[str, str]:
    """Of all that a training goes on from, after 100 updates."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.AvgPool2d(4), nn.Flatten(),
        nn.Linear(16, CLASSES),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    trainer = ham.HAMTrainer(
        model, optimizer, eps=0.1, step_size=0.05, steps=3, screen_steps=1, start_epoch=2, ema_decay=0.9, seed=3,
        precision=precision,
    )  # fmt: skip
    trainer.fit([mine(batch, rank, dist.get_world_size()) for batch in uneven_batches()], 5)
    state = trainer.state_dict()
    assert sum(r.n_kept > 0 for r in trainer.history) == 5
    adam = {f"{k}.{name}": t for k, s in state["optimizer"]["state"].items() for name, t in s.items()}
    assert adam["0.step"] + sum(r.skipped for r in trainer.history) == trainer.steps_done == 100
    return {
        name: hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors.values())).hexdigest()
        for name, tensors in (("model", state["model"]), ("ema", state["ema"]), ("optimizer", adam))
    }


# ---------------------------------------------------------------- all of it in one group of processes
def trained(rank: int, world: int | None = None, midway: dict | None = None) -> dict:
    """Four processes take a case less of those with most messages."""
    cases = CASES[:1] if world is None and dist.get_world_size() > 2 else CASES
    found = {"exact": {case: exact(rank, *case, world=world) for case in cases}}
    found["one"] = {(kind, seed): one_update(rank, kind, seed, world) for kind in KINDS for seed in range(STATES)}
    found["six"] = six(rank, world)
    found["went on"] = six(rank, world, midway)
    if world is None and len(cases) == len(CASES):
        found["digests"] = {precision: digests(rank, precision) for precision in ("fp32", "bf16")}
    return found


@pytest.fixture(scope="module")
def one(one_thread) -> dict:
    return trained(0, world=1)


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict]:
    return on_ranks(2, trained, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(two, tmp_path_factory) -> list[dict]:
    return on_ranks(4, trained, tmp_path_factory.mktemp("four"), None, two[0]["six"]["midway"])


@pytest.mark.parametrize(("world", "norm", "rebalance"), [*(("two", *case) for case in CASES), ("four", *CASES[0])])
def test_60_updates_in_fp64(one, world, norm, rebalance, request):
    alone = one["exact"][norm, rebalance]
    for rank in request.getfixturevalue(world):
        found = rank["exact"][norm, rebalance]
        assert found["updates"] == alone["updates"] == 60
        assert found["counts"] == alone["counts"]
        assert (found["moved"] > 20) == rebalance
        assert far(found["state"], alone["state"]) <= 1e-12


def test_6_updates_in_fp32(one, two, four):
    """By other numbers of processes, and begun by two and ended by others."""
    alone, of_two = one["six"], two[0]["six"]
    went_on = six(0, world=1, midway=of_two["midway"])
    for found in (of_two, *(rank["six"] for rank in four), went_on, *(rank["went on"] for rank in four)):
        assert found["counts"] == alone["counts"]
        assert far(found["weights"], alone["weights"]) <= 1e-5


@pytest.mark.parametrize("world", ["two", "four"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_update_from_a_random_state(one, world, kind, request):
    """The states are the same ones each time: in others the sign of a gradient may turn by rounding, though among 600
    it never did."""
    ranks = request.getfixturevalue(world)
    for seed in range(STATES):
        alone, found = one["one"][kind, seed], [rank["one"][kind, seed] for rank in ranks]
        for name, rows in alone["rows"].items():
            assert torch.equal(torch.cat([f["rows"][name] for f in found]), rows), (seed, name)
        for f in found:
            assert f["counts"] == alone["counts"], seed
            assert f["loss"] == pytest.approx(alone["loss"], rel=1e-6), seed
            assert far(f["model"], alone["model"]) <= 2e-6, seed


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_processes_are_the_same_bit_by_bit(two, precision):
    first, second = (rank["digests"][precision] for rank in two)
    assert first == second
