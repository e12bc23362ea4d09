"""Several processes train as one: the same examples, losses, class sums and weights as one process on whole batches."""

from __future__ import annotations

import copy
import functools
import itertools

import pytest
import torch
import torch.distributed as dist
from rank_helpers import on_ranks
from torch import nn

import ham_kernels as ham
from ham_kernels.data.batches import Batches
from ham_kernels.distributed import RankError
from ham_kernels.methods.registry import names

pytestmark = pytest.mark.slow

CLASSES, ROWS = 4, 24
ATTACK = {"eps": 0.2, "step_size": 0.05, "steps": 4}
SWITCHES = {
    "ham": {"start_epoch": 1, "screen_steps": 2},
    "ham_random": {"start_epoch": 1, "screen_steps": 2, "rows": "random"},
    "ham_jump": {"start_epoch": 1, "screen_steps": 2, "easy": "jump", "class_weights": "hard_share"},
    "ham_frozen": {"start_epoch": 1, "screen_steps": 2, "freeze_bn": True},
    "ham_trust": {"start_epoch": 1, "screen_steps": 2, "trust": 0.5, "eps_factor": 1.25},
    "pgd_at": {"start_epoch": 1},
    "pgd_at_awp": {"start_epoch": 1, "awp": 0.01},
    "gairat": {"start_epoch": 1},
    "dafa": {"class_from": 2},
    "cfa": {"class_from": 2},
    "mail": {"mail_from": 1},
    "fat": {"tau_from": (2,)},
    "trades_stop": {"early_drop": True, "easy": "stop", "screen_steps": 2},
    "gairat_stop": {"start_epoch": 1, "early_drop": True, "easy": "stop", "screen_steps": 2, "reweight": True},
    "bat_drop": {"early_drop": True, "screen_steps": 2},
    "bat_stop": {"early_drop": True, "easy": "stop", "screen_steps": 2},
    "ham_at_home": {"start_epoch": 1, "screen_steps": 2},  # hard rows do not move
}


def method_of(key: str):
    from ham_kernels.methods.registry import class_of

    name = next(n for n in sorted(names(), key=len, reverse=True) if key == n or key.startswith(f"{n}_"))
    return class_of(name)(**SWITCHES.get(key, {}))


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.Tanh(),
        nn.AvgPool2d(4),
        nn.Flatten(),
        nn.Linear(24, CLASSES),
    )


def batches(count: int, rows: int = ROWS) -> list:
    g = torch.Generator().manual_seed(5)
    made = []
    for _ in range(count):
        y = torch.randint(CLASSES, (rows,), generator=g)
        x = torch.rand(rows, 1, 8, 8, generator=g) * 0.5
        x[torch.arange(rows), 0, y, y] += 0.5
        made.append((x, y))
    return made


def mine(batch, rank: int, world: int):
    x, y = batch
    here = slice(rank * len(y) // world, (rank + 1) * len(y) // world)
    return x[here], y[here]


def trained(rank: int, key: str, updates: int = 2, world: int | None = None, **further) -> dict:
    """The state after two epochs of some updates, on this process's rows of each batch; "first": after one of them."""
    alone = world == 1
    world = world or dist.get_world_size()
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    method = method_of(key)
    trainer = ham.Trainer(
        model, optimizer, method, **ATTACK, ema_decay=0.9, seed=3, group=None if alone else "auto",
        teacher=net(9) if method.needs_teacher else None, **further,
    )  # fmt: skip
    loader = [mine(batch, rank, world) for batch in batches(updates)]
    firsts = []

    def note(step) -> None:
        if not firsts:
            firsts.append(copy.deepcopy({k: trainer.state_dict()[k] for k in ("model", "ema", "memory")}))
            firsts[0]["report"] = [step.loss, step.n, step.n_hard, step.n_kept]

    looks = method.gate or key == "ham"  # judging takes a third of the time, and no other method goes by it
    judged = {"val_loader": batches(3), "val_attacks": ("clean", "pgd3")} if looks else {}
    report = trainer.fit(loader, 1, on_batch_end=note, **judged)[-1]
    trainer.fit(loader, 2)  # a method with classes from epoch 2 on treats them apart
    state = trainer.state_dict()
    return {
        "first": firsts[0],
        **{name: state[name] for name in ("model", "ema", "memory")},
        "loss": [r.loss for r in trainer.history],
        "counts": [(r.n, r.n_hard, r.n_kept, r.skipped) for r in trainer.history],
        "val": {name: a.per_class for name, a in (report.val or {}).items()},
    }  # fmt: skip


def all_trained(rank: int, keys, world: int | None = None) -> dict:
    return {key: trained(rank, key, world=world, rebalance=key != "ham_at_home") for key in keys}


def far(a, b) -> float:
    """The largest difference of two states, relative to the largest entry of each tensor, or to 0.01 where it begins
    with zeros."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return max((far(a[k], b[k]) for k in a), default=0.0)
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-2)) if a.numel() else 0.0


def alike(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[k], b[k]) for k in a)
    return torch.equal(torch.as_tensor(a), torch.as_tensor(b))


@pytest.fixture(scope="module")
def one(one_thread) -> dict:
    keys = [n for n in names() if n not in ("free_at", "atta", "offsets")]
    return all_trained(0, keys + [k for k in SWITCHES if k not in keys], world=1)


@pytest.mark.parametrize("world", [2, 3])
def test_every_method_trains_as_one_process(one, world, tmp_path):
    ranks = on_ranks(world, all_trained, tmp_path, list(one))
    wrong = {}
    for key in one:
        if not all(alike(rank[key], ranks[0][key]) for rank in ranks):
            wrong[key] = "the processes differ"
        elif ranks[0][key]["counts"] != one[key]["counts"] or ranks[0][key]["val"] != one[key]["val"]:
            wrong[key] = ranks[0][key]["counts"], one[key]["counts"], ranks[0][key]["val"], one[key]["val"]
        else:
            worst = {k: far(ranks[0][key][k], one[key][k]) for k in ("first", "model", "ema", "memory", "loss")}
            # a rounding may turn the sign of a gradient later on, and one pixel of one row is then another
            if worst.pop("first") > 2e-6 or max(worst.values()) > 5e-3:
                wrong[key] = worst
    assert not wrong


# ---------------------------------------------------------------- what is sent
def sent(rank: int, loads: bool, norm: bool, bucket_mb: float | None) -> dict:
    """What one update sends: sums of a few numbers, messages of moved rows, passes over the gradients.

    `loads`: its batch is from a loader of ours.  `norm`: of a model with BatchNorm.  `bucket_mb`: of gradients.
    """
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    sums, moves, buckets, in_attack = [], [], [], []
    all_reduce, all_to_all = dist.all_reduce, dist.all_to_all_single

    def summed(t, *args, **how):
        if not how.get("async_op"):  # those of the gradients are
            sums.append(t.numel())
        return all_reduce(t, *args, **how)

    dist.all_reduce = summed
    dist.all_to_all_single = lambda *args, **how: (moves.append(1), all_to_all(*args, **how))[1]
    model = net()
    if not norm:
        del model[1]
    ddp = nn.parallel.DistributedDataParallel
    wrap = ddp.__init__
    if bucket_mb is not None:
        ddp.__init__ = functools.wraps(wrap)(lambda *args, **how: wrap(*args, bucket_cap_mb=bucket_mb, **how))
    attack = {"eps": 1e-4, "step_size": 1e-4, "steps": 4}
    trainer = ham.HAMTrainer(
        model, torch.optim.SGD(model.parameters(), 0.1), **attack, screen_steps=2, start_epoch=1, seed=3
    )
    images = (batches(1)[0][0] * 255).byte()
    x = images / 255
    y = copy.deepcopy(model).eval()(x).argmax(1)
    y[16:] = (y[16:] + 1) % CLASSES  # the last third is hard, and all of process 1
    for name in ("broadcast", "all_gather", "all_gather_into_tensor", "_broadcast_coalesced"):
        setattr(dist, name, lambda *args, name=name, **how: pytest.fail(f"{name} was called"))

    def hook(state, bucket):
        buckets.append(bucket.index())
        return allreduce_hook(state, bucket)

    trainer._update._through.register_comm_hook(None, hook)
    model.register_forward_pre_hook(
        lambda m, x: in_attack.append((len(sums), len(buckets))) if not m.training else None
    )
    trainer.train_step(*mine((x, y), rank, 2), epoch=1)  # the wrapper makes its buckets by the first backward
    for noted in (sums, moves, buckets, in_attack):
        noted.clear()
    if loads:
        loader = Batches(images, y, ROWS, shuffle=False, rank=rank, world=2)

        def leave(step) -> None:
            raise InterruptedError

        with pytest.raises(InterruptedError):
            trainer.fit(loader, 1, on_batch_end=leave)
        sums.pop()  # that both leave
    else:
        trainer.train_step(*mine((x, y), rank, 2), epoch=1)
    found = {"sums": list(sums), "moves": len(moves), "buckets": list(buckets), "in_attack": list(in_attack)}
    loss = ham.ham_loss(trainer._update._through, *mine((x, y), rank, 2), eps=0.2, step_size=0.05)
    assert loss.dtype == torch.float32
    return found


@pytest.mark.parametrize(
    ("loads", "norm", "bucket_mb"), [(False, False, None), (True, False, 1e-4), (True, True, None)]
)
def test_an_attack_sends_nothing_and_an_update_little(loads, norm, bucket_mb, tmp_path):
    for found in on_ranks(2, sent, tmp_path, loads, norm, bucket_mb):
        # rows of each, which a loader of ours knows beforehand, facts of each at the look, and loss with weights; on
        # the CPU two in the forward of a BatchNorm and one in its backward
        assert len(found["sums"]) == 3 - loads + 3 * norm
        assert max(found["sums"]) <= 2 * 10
        assert found["moves"] == 1
        buckets = found["buckets"]
        assert sorted(buckets) == list(range(len(buckets)))  # one pass over the gradients
        assert (len(buckets) > 1) == (bucket_mb is not None)
        assert {buckets for _, buckets in found["in_attack"]} == {0}
        steps = [sums for sums, _ in found["in_attack"]]
        assert len(set(steps)) <= 2  # nothing between the steps but the look


# ---------------------------------------------------------------- ranks without rows, bad data, ends
def uneven(rank: int, world: int | None = None) -> list:
    """States after updates in which processes have few rows or none, hard or not, of this or that."""
    alone, world = world == 1, world or dist.get_world_size()
    found = []
    cases = ((1, 0), (2, 0), (ROWS, 12), (ROWS, 23), (ROWS, 24), (7, 3))
    for (rows, easy), moves in itertools.product(cases, (True, False)):  # where none move, some have no hard row
        model = net(1)
        with torch.no_grad():
            model[-1].weight.mul_(8)  # sure of what it says
        trainer = ham.HAMTrainer(
            model, torch.optim.SGD(model.parameters(), 0.1), eps=1e-4, step_size=1e-4, steps=3, screen_steps=1,
            start_epoch=1, seed=1, group=None if alone else "auto", ema_decay=0.5,
            rebalance=moves,
        )  # fmt: skip
        x = torch.rand(rows, 1, 8, 8, generator=torch.Generator().manual_seed(rows))
        y = copy.deepcopy(model).eval()(x).argmax(1)
        y[easy:] = (y[easy:] + 1) % CLASSES  # the first are easy
        before = copy.deepcopy(trainer.state_dict())
        report = trainer.train_step(*mine((x, y), rank, world), epoch=1)
        assert (report.n, report.n_hard, report.n_kept) == (rows, *[rows - min(easy, rows)] * 2)
        if not report.n_kept:
            assert all(alike(before[part], trainer.state_dict()[part]) for part in ("model", "ema"))
        found.append({"model": trainer.state_dict()["model"], "loss": report.loss, "steps": trainer.steps_done})
    return found


@pytest.mark.parametrize("world", [2, 3, 4])
def test_processes_without_rows(world, tmp_path):
    one, ranks = uneven(0, world=1), on_ranks(world, uneven, tmp_path)
    for i, alone in enumerate(one):
        assert all(alike(rank[i], ranks[0][i]) for rank in ranks)
        assert far(ranks[0][i], alone) <= 2e-6, i


class Known(list):
    """Batches that tell what every process gives, as those of the package do."""

    def __init__(self, batches: list, rank: int, rows: int = ROWS):
        super().__init__(batches)
        self.rank, self.world, self.rows = rank, 2, rows

    def rows_of_each(self, b: int) -> list[int]:
        return [self.rows // 2] * 2


def with_bad(rank: int, known: bool) -> dict:
    """What process 0 and 1 raise when something is wrong on process 1 alone, and that nothing has moved."""
    said = {}
    good = mine(batches(1)[0], rank, 2)
    names = (
        "nan", "nan in the update", "label", "pixel", "shape", "draw", "callback", "epoch", "short", "rank", "told",
        "rows",
    )  # fmt: skip
    nets = {name: net() for name in names[: None if known else 9]}
    for name, model in nets.items():
        trainer = ham.HAMTrainer(
            model, torch.optim.SGD(model.parameters(), 0.1), **ATTACK, screen_steps=2, start_epoch=1
        )
        before = copy.deepcopy(trainer.state_dict()["model"])
        x, y = good[0].clone(), good[1].clone()
        batch, count = (x, y), 1
        ends = {}
        if rank == 1:
            if name == "nan":
                model.register_forward_hook(lambda m, a, z: z * float("nan"))
            elif name == "nan in the update":
                model.register_forward_hook(lambda m, a, z: z * float("nan") if m.training else z)
            elif name == "label":
                y[0] = CLASSES
            elif name == "pixel":
                x[0, 0, 0, 0] = 1.5
            elif name == "shape":
                batch = (x, y[:-1])
            elif name == "draw":
                batch = None
            elif name in ("callback", "epoch"):
                when = "on_batch_end" if name == "callback" else "on_epoch_end"
                ends = {when: lambda report: (_ for _ in ()).throw(KeyError("stop"))}
            elif name == "short":
                count = 0
        loader = [batch] * count if name != "short" else [good] * (2 - rank)
        if known:
            loader = Known(loader, 0 if name == "rank" else rank, ROWS - 2 * rank if name in ("told", "rows") else ROWS)
            if name == "rows" and rank == 1:
                loader[0] = x[1:], y[1:]  # as many as it told, and process 0 another number
        try:
            trainer.fit(loader, 3, **ends)
        except Exception as error:
            said[name] = (type(error).__name__, str(error), getattr(error, "left", None))
        if name not in ("callback", "epoch", "short"):
            assert alike(trainer.state_dict()["model"], before), name
        assert trainer.steps_done == (name in ("callback", "epoch", "short")), name
    return said


@pytest.mark.parametrize("known", [False, True])
def test_what_is_wrong_on_one_process_raises_on_all(known, tmp_path):
    first, second = on_ranks(2, with_bad, tmp_path, known)
    elsewhere = "process {} is not where this one is"
    if known:
        for name in ("short", "rank", "rows"):
            for r, said in enumerate((first, second)):
                assert elsewhere.format(1 - r) in said[name][1], name
        assert "process 1 failed" in first["told"][1]
        assert "train_loader: gave 12 rows, and its rows_of_each told 11" in second["told"][1]
    for name, words in {
        "nan": "process 1 failed before the end of this step", "label": "process 1 failed", "pixel": "process 1 failed",
        "shape": "process 1 failed", "draw": "process 1 failed", "callback": "process 1 ended the training",
        "epoch": "process 1 ended the training",
        "short": elsewhere.format(1) if known else "process 1 has given its last batch",
    }.items():  # fmt: skip
        kind, said, left = first[name]
        assert (kind, left) == (RankError.__name__, name in ("callback", "epoch"))
        assert words in said, name
    assert {said["nan in the update"][0] for said in (first, second)} == {"NonFiniteError"}  # a mean over both
    assert (second["nan"][0], second["callback"][0]) == ("NonFiniteError", "KeyError")
    assert "labels run from" in second["label"][1]
    assert "pixels run from" in second["pixel"][1]
