"""CUDA graphs: what is captured, replayed and forgotten, on the CPU with a stand-in for a graph; and the real ones."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref

import pytest
import torch
from nets import Broken, sgd, small_cnn
from test_engine import Compiler
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import ham_kernels as ham
import ham_reference as reference
from ham_kernels import data
from ham_kernels.buckets import Bucket
from ham_kernels.engine import PLAIN, Engine, EngineError, EngineOptions, EngineWarning
from ham_kernels.engine import graphs as graphs_module
from ham_kernels.engine.graphs import BUCKETS, Graphs, bucket_of
from ham_kernels.mining import Examples, Keep, StepSizeWeights, mine
from ham_kernels.recipes import weighted_ce
from ham_kernels.update import Updater

CPU = torch.device("cpu")
SETTINGS = {"eps": 0.2, "step_size": 0.05, "steps": 5, "screen_steps": 2, "start_epoch": 2}
RAGGED = (64, 40, 64, 37)
NOT_CAPTURABLE = "operation not permitted when stream is capturing"


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


def test_tape_is_a_graph():
    """It repeats what was done on the same memory, not the Python; its own tensors do not outlive a replay."""
    x, out, factor, seen = torch.ones(3), torch.zeros(3), 2.0, []

    def fn():
        z = x * factor
        seen.append(z)
        out.copy_(z + 1)

    replay = Recorder()(fn, CPU, None)
    x, factor = x.fill_(5.0), 3.0
    replay()
    assert out.tolist() == [11.0] * 3
    assert len(seen) == 3
    assert seen[-1].isnan().all()


# ---------------------------------------------------------------- trainers
@pytest.fixture(scope="module")
def digits():
    images = data.digits()
    return images.x_train[:320].float() / 255, images.y_train[:320]


@pytest.fixture(scope="module")
def batches(digits):
    x, y = digits
    starts = [sum(RAGGED[:i]) for i in range(len(RAGGED))]
    return [(x[i : i + n], y[i : i + n]) for i, n in zip(starts, RAGGED, strict=True)]


def trainer_of(model: nn.Module, capture=None, **choices) -> ham.HAMTrainer:
    """A trainer; with `capture`, one whose graphs are made by it."""
    trainer = ham.HAMTrainer(model, sgd(model), **SETTINGS | choices)
    if capture is not None:
        wanted = {n: choices[n] for n in ("precision", "channels_last", "compile") if n in choices}
        give_graphs(trainer, capture, **wanted)
    return trainer


def give_graphs(trainer: ham.HAMTrainer, capture, cuda_graphs: bool | str = True, **options) -> None:
    trainer.engine = Engine(EngineOptions(cuda_graphs=cuda_graphs, **options), CPU, capture=capture)
    trainer._update = Updater(trainer.optimizer, trainer.engine, CPU)


def twins(model: nn.Module, capture=None, **choices) -> tuple[ham.HAMTrainer, ham.HAMTrainer]:
    """One trainer with graphs and one without, on equal models."""
    twin = copy.deepcopy(model)
    return trainer_of(model, capture or Recorder(), **choices), trainer_of(twin, **choices)


def assert_same_steps(ours, theirs, batches, epochs=(1, 1, 2, 2), rel=1e-4):
    for epoch in epochs:
        for x, y in batches:
            a, b = ours.train_step(x, y, epoch=epoch), theirs.train_step(x, y, epoch=epoch)
            assert (a.n, a.n_hard) == (b.n, b.n_hard)
            assert a.loss == pytest.approx(b.loss, rel=rel)
    assert_same_model(ours.model, theirs.model)


def assert_same_model(ours: nn.Module, theirs: nn.Module):
    """Weights and BatchNorm's statistics. The padded rows may change the order of sums in a convolution."""
    for (name, p), q in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("choices", "capture"),
    [
        ({}, rerun),
        ({}, Recorder()),
        ({"norm": "l2", "eps": 1.0, "step_size": 0.25}, Recorder()),
        ({"reweight": False}, Recorder()),
        ({"early_drop": False, "lam": 0.1}, Recorder()),
        ({"rows": "random", "seed": 11}, Recorder()),
        ({"freeze_bn": True, "ema_decay": 0.9}, Recorder()),
    ],
    ids=lambda v: (",".join(v) or "defaults") if isinstance(v, dict) else type(v).__name__,
)
def test_graphs_give_the_references_training(batches, choices, capture):
    model = small_cnn()
    twin = copy.deepcopy(model)
    ours = trainer_of(model, capture, **choices)
    theirs = reference.HAMTrainer(twin, sgd(twin), **SETTINGS | choices)
    assert_same_steps(ours, theirs, batches)
    if ours.ema_model is not None:
        assert_same_model(ours.ema_model, theirs.ema_model)


@pytest.mark.parametrize(
    "choices",
    [
        {"screen": "one_step"},
        {"round_to": 16},
        {"bn_rows": "all"},
        {"channels_last": True},
        {"group": 2, "group_updates": "one"},
        {"warm_up": "n_fgsm"},
        {"natural_epochs": 1},
    ],
    ids=lambda c: ",".join(c),
)
def test_graphs_change_nothing(batches, choices):
    """What the reference does not know, against the same trainer without graphs."""
    model = small_cnn(channels=3)
    coloured = [(x.expand(-1, 3, -1, -1) * torch.tensor([1.0, 0.7, 0.4]).view(3, 1, 1), y) for x, y in batches]
    ours, theirs = twins(model, **choices)
    histories = [t.fit(coloured, 3) for t in (ours, theirs)]
    for a, b in zip(*histories, strict=True):
        assert (a.n, a.n_hard, a.n_kept, a.skipped) == (b.n, b.n_hard, b.n_kept, b.skipped)
        assert a.loss == pytest.approx(b.loss, rel=1e-4)
    assert_same_model(ours.model, theirs.model)
    assert len(ours.engine.graphs) > 3


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_graphs_change_nothing_in_half_precision(batches, precision, monkeypatch):
    """Also that the graphs read the rounded weights where the next batch puts them. Half a percent: other blocks of
    rows in a half-precision product round otherwise.
    """
    monkeypatch.setattr("ham_kernels.engine.core.half_problem", lambda *_: None)
    ours, theirs = twins(small_cnn(), precision=precision)
    for epoch in (1, 1, 2, 2):
        for x, y in batches[:2]:
            a, b = ours.train_step(x, y, epoch=epoch), theirs.train_step(x, y, epoch=epoch)
            assert abs(a.n_hard - b.n_hard) <= 1
            assert a.loss == pytest.approx(b.loss, rel=5e-3)
    other = small_cnn(seed=5).state_dict()
    for t in (ours, theirs):
        t.model.load_state_dict(other)
    a, b = ours.train_step(*batches[0], epoch=2), theirs.train_step(*batches[0], epoch=2)
    assert a.loss == pytest.approx(b.loss, rel=5e-3)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("loss", ["ce", "cw"])
def test_budgets_per_row_follow_into_the_graphs(digits, norm, loss):
    """Twice with other budgets: the first ones must not have been captured."""
    x, y = digits[0][:48], digits[1][:48]
    model = small_cnn()
    engine = Engine(EngineOptions(cuda_graphs=True), CPU, capture=Recorder())
    for low, high in ((0.05, 0.4), (0.3, 0.01)):
        eps = torch.linspace(low, high, 48) * (5 if norm == "l2" else 1)
        pgd = ham.PGD(eps, eps / 4, 5, norm, loss=loss)
        a, b = (mine(model, x, y, pgd, Keep("hard", 2), StepSizeWeights(), seed=1, step=0, engine=e)
                for e in (engine, PLAIN))  # fmt: skip
        assert 0 < a.n_hard == b.n_hard
        assert torch.equal(a.index, b.index)
        assert ((a.x_adv - b.x_adv).abs() > 1e-5).float().mean() < 0.01
        torch.testing.assert_close(a.weights, b.weights, rtol=1e-3, atol=1e-4)


def test_steps_are_captured_once(batches):
    """Per number of rows: one step for the attack, one look, one update; then nothing any more."""
    recorder = Recorder()
    trainer = trainer_of(small_cnn(), recorder)
    x, y = batches[0]
    trainer.train_step(x, y, epoch=1)
    assert recorder.captures == 1  # the update's number of rows has not come back yet
    trainer.train_step(x, y, epoch=1)
    assert recorder.captures == 2
    for _ in range(3):
        trainer.train_step(x, y, epoch=1)
    assert recorder.captures == 2


def test_a_step_runs_no_python_of_the_model_once_captured(batches):
    model = Broken(small_cnn(), lambda z: z)
    trainer = trainer_of(model, Recorder())
    for _ in range(2):
        trainer.train_step(*batches[0], epoch=1)
    before = model.calls
    trainer.train_step(*batches[0], epoch=1)
    assert model.calls == before


# ---------------------------------------------------------------- buckets
@pytest.mark.parametrize("full", [1, 2, 7, 16, 37, 128, 1000])
def test_buckets_hold_every_number_of_rows(full):
    buckets = [bucket_of(rows, full) for rows in range(1, full + 1)]
    assert all(rows <= bucket <= full for rows, bucket in enumerate(buckets, 1))
    assert buckets == sorted(buckets)
    assert len(set(buckets)) <= len(BUCKETS)
    assert all(bucket - rows <= full / 8 + 1 for rows, bucket in enumerate(buckets, 1))  # what padding costs at most


def test_unused_rows_do_not_matter(batches):
    """All that buckets hold between two batches may be garbage: NaN in images and logits, labels of no class."""
    ours, theirs = twins(small_cnn())
    buckets = 0
    for epoch in (1, 2, 2, 3):
        for x, y in batches:
            a, b = ours.train_step(x, y, epoch=epoch), theirs.train_step(x, y, epoch=epoch)
            assert a.n_hard == b.n_hard
            assert a.loss == pytest.approx(b.loss, rel=1e-4)
            for bucket in ours.engine.graphs._kept.values():
                if isinstance(bucket, Bucket):
                    buckets += 1
                    for t in (*vars(bucket.rows).values(), bucket.logits, bucket.max_step):
                        if isinstance(t, Tensor):
                            t.fill_(torch.nan if t.is_floating_point() else 10**6)
    assert buckets > 10
    assert_same_model(ours.model, theirs.model)


def test_rows_that_meet_in_the_model_are_not_padded(batches):
    """BatchNorm without running statistics normalises an attack by the batch, so that padding would change the rows."""

    def model():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU(), nn.Flatten(),
            nn.Linear(144, 10),
        )  # fmt: skip

    ours, theirs = trainer_of(model(), Recorder()), trainer_of(model())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EngineWarning)
        assert_same_steps(ours, theirs, batches, epochs=(2, 2))


# ---------------------------------------------------------------- traces of a capture
def test_captures_leave_no_trace_in_batchnorm(batches):
    ours, theirs = twins(small_cnn())
    for _ in range(3):
        for t in (ours, theirs):
            t.train_step(*batches[0], epoch=1)
        for a, b in zip(ours.model.buffers(), theirs.model.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert ours.model[2].num_batches_tracked == 3


def test_captures_leave_no_trace_in_random_numbers(batches):
    """Dropout draws in an update what it would draw without graphs, so that a resumed run is the run."""

    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 10))

    losses = []
    for capture in (None, Recorder()):
        trainer = trainer_of(model(), capture)
        torch.manual_seed(3)
        losses.append([trainer.train_step(*batches[0], epoch=1).loss for _ in range(5)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_parameters_that_the_loss_does_not_reach_get_no_gradient(batches):
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = small_cnn(), nn.Linear(3, 3)

        def forward(self, x):
            return self.used(x)

    ours, theirs = twins(Partly())  # weight decay would shrink a weight whose gradient is zero and not None
    start = ours.model.unused.weight.detach().clone()
    assert_same_steps(ours, theirs, batches[:1], epochs=(1, 1, 1, 1))
    assert ours.model.unused.weight.grad is None
    assert torch.equal(ours.model.unused.weight, start)


@pytest.mark.parametrize("at_first", [True, False], ids=["frozen later", "thawed later"])
def test_weights_frozen_or_thawed_between_steps(batches, at_first):
    ours, theirs = twins(small_cnn())
    for t in (ours, theirs):
        t.model[4].weight.requires_grad_(at_first)
        for _ in range(3):
            t.train_step(*batches[0], epoch=1)
        t.model[4].weight.requires_grad_(not at_first)
        for _ in range(3):
            t.train_step(*batches[0], epoch=1)
    assert_same_model(ours.model, theirs.model)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_inside_autocast_of_the_caller(batches, precision, monkeypatch):
    """autocast keeps the weights that it cast until its outermost block ends: a capture must not take those over."""
    monkeypatch.setattr("ham_kernels.engine.core.half_problem", lambda *_: None)
    ours, theirs = twins(small_cnn(), precision=precision)
    for t in (ours, theirs):
        for group in t.optimizer.param_groups:
            group["lr"] = 0.3  # old weights should show
    for _ in range(6):
        losses = []
        for t in (ours, theirs):
            with torch.autocast("cpu", torch.bfloat16):
                losses.append(t.train_step(*batches[0], epoch=1).loss)
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)


# ---------------------------------------------------------------- the update alone
def examples_of(n: int, seed: int, weighted: bool = True) -> Examples:
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 1, 8, 8, generator=g)
    x_adv = (x + 0.1 * torch.rand(n, 1, 8, 8, generator=g)).clamp(0, 1)
    y = torch.randint(0, 10, (n,), generator=g)
    return Examples(x_adv, x, y, torch.rand(n, generator=g) + 0.5 if weighted else None, n, n, None)


def updater_of(model: nn.Module, capture=None) -> Updater:
    options = EngineOptions(cuda_graphs=capture is not None)
    return Updater(sgd(model), Engine(options, CPU, capture=capture), CPU)


def pulled_together(model: nn.Module, examples: Examples) -> Tensor:
    """A loss of clean and adversarial logits, as TRADES has."""
    return weighted_ce(model, examples) + (model(examples.x_adv) - model(examples.x)).square().mean()


@pytest.mark.parametrize("loss", [weighted_ce, pulled_together])
@pytest.mark.parametrize("weighted", [True, False])
def test_an_update_reads_its_own_examples(loss, weighted):
    """Whatever of the examples a loss looks at is that of this update, not of the one that was captured."""
    model = small_cnn()
    twin = copy.deepcopy(model)
    ours, theirs = updater_of(model, Recorder()), updater_of(twin)
    for seed in range(6):
        examples = examples_of(24, seed, weighted)
        losses = ours(model, loss, examples, False), theirs(twin, loss, examples, False)
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert_same_model(model, twin)


def test_frozen_statistics_are_a_graph_of_their_own():
    model = small_cnn()
    twin = copy.deepcopy(model)
    ours, theirs = updater_of(model, Recorder()), updater_of(twin)
    for seed, frozen in enumerate((False, False, False, True, True, True, False, True)):
        for update, m in ((ours, model), (theirs, twin)):
            update(m, weighted_ce, examples_of(24, seed), frozen)
    assert model[2].num_batches_tracked == 4
    assert_same_model(model, twin)


def test_gradients_of_another_loss_do_not_stay():
    """Two losses in turn, of which one reaches one head only: the other head then has no gradient."""

    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.body, self.main, self.other = nn.Linear(64, 16), nn.Linear(16, 10), nn.Linear(16, 10)

        def forward(self, x):
            return self.main(self.body(x.flatten(1)))

    def both(model, examples):
        return weighted_ce(model, examples) + model.other(model.body(examples.x_adv.flatten(1))).square().mean()

    model = TwoHeads()
    twin = copy.deepcopy(model)
    ours, theirs = updater_of(model, Recorder()), updater_of(twin)
    for seed in range(5):
        for loss in (both, weighted_ce):
            ours(model, loss, examples_of(24, seed), False)
            theirs(twin, loss, examples_of(24, seed), False)
    assert_same_model(model, twin)


def test_graphs_of_an_update_share_their_gradients():
    """One set of gradients per graph would be up to 128 times the model's memory."""
    model = small_cnn()
    update = updater_of(model, Recorder())
    for n in (20, 20, 24, 24, 28, 28):  # the first of each is eager, and makes gradients anew
        update(model, weighted_ce, examples_of(n, n), False)
    assert len(update._engine.graphs) == 3
    where = set()
    for n in (20, 24, 28):
        update(model, weighted_ce, examples_of(n, n), False)
        where.add(model[1].weight.grad.data_ptr())
    assert len(where) == 1


def test_graphs_of_an_update_share_their_images():
    """One batch of images per graph would be up to 256 batches on the device."""
    model = small_cnn()
    update = updater_of(model, Recorder())
    for n in (28, 28, 24, 24, 20, 20):
        update(model, weighted_ce, examples_of(n, n), False)
    graphed = list(update._engine.graphs._kept.values())
    assert len(graphed) == 3
    assert len({g._examples.x_adv.untyped_storage().data_ptr() for g in graphed}) == 1


def test_an_update_that_failed_once_is_captured_later():
    """What a caller survives, such as a batch that did not fit into memory."""
    failures = iter([RuntimeError("once")])

    def fail_once(z):
        for error in failures:
            raise error
        return z

    model = Broken(small_cnn(), fail_once, only_train=True)
    twin = copy.deepcopy(model.inner)
    ours, theirs = updater_of(model, Recorder()), updater_of(twin)
    with pytest.raises(RuntimeError, match="once"):
        ours(model, weighted_ce, examples_of(24, 0), False)
    for seed in range(4):
        ours(model, weighted_ce, examples_of(24, seed), False)
        theirs(twin, weighted_ce, examples_of(24, seed), False)
    assert len(ours._engine.graphs) == 1
    assert_same_model(model.inner, twin)


def test_more_numbers_of_rows_than_graphs_are_not_captured_over_and_over(monkeypatch):
    """A capture costs as much as many updates."""
    monkeypatch.setattr(graphs_module, "LIMIT", 3)
    recorder = Recorder()
    model = small_cnn()
    update = updater_of(model, recorder)
    for _ in range(5):
        for n in range(20, 26):
            update(model, weighted_ce, examples_of(n, n), False)
    assert 0 < len(update._engine.graphs) <= 3
    assert recorder.captures <= 6


def test_nan_in_a_replay_changes_nothing():
    model = small_cnn()
    update = updater_of(model, Recorder())
    for seed in range(3):
        update(model, weighted_ce, examples_of(24, seed), False)
    before = copy.deepcopy((model.state_dict(), update.optimizer.state_dict()))
    bad = examples_of(24, 9)
    bad.weights[3] = torch.nan
    with pytest.raises(ham.NonFiniteError, match="nothing was updated"):
        update(model, weighted_ce, bad, False)
    assert str(before) == str((model.state_dict(), update.optimizer.state_dict()))
    assert torch.isfinite(torch.tensor(update(model, weighted_ce, examples_of(24, 5), False)))


def test_gradients_cleared_by_the_caller(batches):
    """on_batch_end or a caller's own loop may call zero_grad; frozen statistics are a graph of their own."""
    ours, theirs = twins(small_cnn(), freeze_bn=True)
    for epoch in (1, 1, 1, 2, 2, 2, 1):
        reports = [t.train_step(*batches[0], epoch=epoch) for t in (ours, theirs)]
        assert reports[0].loss == pytest.approx(reports[1].loss, rel=1e-4)
        for t in (ours, theirs):
            t.optimizer.zero_grad()
    assert_same_model(ours.model, theirs.model)


# ---------------------------------------------------------------- forgetting
def test_graphs_of_another_model_are_not_replayed(batches):
    ours, theirs = twins(small_cnn())
    others = small_cnn(seed=1), small_cnn(seed=1)
    for _ in range(3):
        for t in (ours, theirs):
            t.train_step(*batches[0], epoch=1)
    for t, other in zip((ours, theirs), others, strict=True):
        t.model, t.optimizer = other, sgd(other)
    assert_same_steps(ours, theirs, batches, epochs=(1, 1, 2))


def test_weights_that_move_end_the_graphs(batches):
    """load_state_dict(assign=True) puts other tensors in the place of the parameters."""
    ours, theirs = twins(small_cnn())
    for t in (ours, theirs):
        for _ in range(3):
            t.train_step(*batches[0], epoch=1)
        state = copy.deepcopy(small_cnn(seed=2).state_dict())
        t.model.load_state_dict(state, assign=True)
        t.optimizer = sgd(t.model)
    assert_same_steps(ours, theirs, batches, epochs=(1, 1, 2))


def test_weights_that_were_replaced_are_not_kept(batches):
    trainer = trainer_of(small_cnn(), Recorder())
    for _ in range(3):
        trainer.train_step(*batches[0], epoch=1)
    old = weakref.ref(trainer.model[1].weight)
    trainer.model.load_state_dict(copy.deepcopy(small_cnn(seed=2).state_dict()), assign=True)
    trainer.optimizer = sgd(trainer.model)
    for _ in range(3):
        trainer.train_step(*batches[0], epoch=1)
    gc.collect()
    assert old() is None


def test_weights_loaded_in_place_are_seen(batches):
    recorder = Recorder()
    ours, theirs = twins(small_cnn(), recorder)
    for t in (ours, theirs):
        for _ in range(3):
            t.train_step(*batches[0], epoch=1)
    captured = recorder.captures
    for t in (ours, theirs):
        t.model.load_state_dict(small_cnn(seed=2).state_dict())
    assert_same_steps(ours, theirs, batches[:1], epochs=(1, 1))
    assert recorder.captures == captured


@pytest.mark.parametrize("size", [(1, 8, 8), (1, 12, 12), (3, 8, 8)])
def test_images_of_another_size(size):
    model = nn.Sequential(nn.AdaptiveAvgPool3d((1, 8, 8)), small_cnn())
    ours, theirs = twins(model)
    g = torch.Generator().manual_seed(1)
    for shape in ((1, 8, 8), size, (1, 8, 8)):
        for _ in range(3):
            x, y = torch.rand(20, *shape, generator=g), torch.randint(0, 10, (20,), generator=g)
            a, b = ours.train_step(x, y, epoch=2), theirs.train_step(x, y, epoch=2)
            assert a.n_hard == b.n_hard
            assert a.loss == pytest.approx(b.loss, rel=1e-4)


def test_follow_forgets_another_model_and_moved_tensors():
    graphs = Graphs(CPU, rerun)
    model = small_cnn()

    def fill():
        graphs.kept("a", object)
        graphs.sighting("a")

    graphs.follow(model)
    fill()
    graphs.follow(model)
    assert len(graphs) == 1
    assert graphs.sighting("a") == 2
    graphs.follow(small_cnn())
    assert len(graphs) == 0
    assert graphs.sighting("a") == 1
    graphs.follow(model)
    fill()
    model[2].running_mean = model[2].running_mean.clone()
    graphs.follow(model)
    assert len(graphs) == 0


def test_the_graph_least_used_leaves(monkeypatch):
    monkeypatch.setattr(graphs_module, "LIMIT", 2)
    graphs = Graphs(CPU, rerun)
    made = []
    for key in "abacb":
        graphs.kept(key, lambda key=key: made.append(key))
    assert made == ["a", "b", "c", "b"]
    assert len(graphs) == 2


# ---------------------------------------------------------------- where a capture fails
@pytest.mark.parametrize(
    "fails_at", range(1, 6), ids=["attack", "update", "screening", "look", "update from hard rows"]
)
def test_a_capture_that_fails_is_given_up(batches, fails_at):
    """One warning, then as without graphs; the runs before the capture have left no trace."""
    recorder = Recorder(fails_at)
    ours, theirs = twins(small_cnn(), recorder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_same_steps(ours, theirs, batches[:1], epochs=(1, 1, 2, 2), rel=1e-5)
    messages = [str(w.message) for w in caught if issubclass(w.category, EngineWarning)]
    assert len(messages) == 1
    assert messages[0].startswith("cuda_graphs: ")
    assert NOT_CAPTURABLE in messages[0]
    assert recorder.captures == fails_at
    assert ours.engine.graphs is None
    assert ours.engine.active["cuda_graphs"] is False


@pytest.mark.parametrize("fails_at", [1, 2], ids=["attack", "update"])
def test_a_required_capture_that_fails_raises(batches, fails_at):
    model = small_cnn()
    trainer = trainer_of(model)
    give_graphs(trainer, Recorder(fails_at), "require")
    model[1].train(False)
    model[1].weight.requires_grad_(False)
    if fails_at == 2:
        trainer.train_step(*batches[0], epoch=1)
    before = copy.deepcopy((model.state_dict(), trainer.optimizer.state_dict()))
    with pytest.raises(EngineError, match=f"cuda_graphs: was required, but .*{NOT_CAPTURABLE}"):
        trainer.train_step(*batches[0], epoch=1)
    assert str(before) == str((model.state_dict(), trainer.optimizer.state_dict()))
    assert [m.training for m in list(model)[:3]] == [True, False, True]
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * (len(list(model.parameters())) - 1)


def test_the_warning_names_what_went_wrong_first(batches):
    """The end of a capture that failed raises an error of its own; what the caller is handling is no cause."""

    def capture(fn, device, pool):
        try:
            raise RuntimeError("the cause")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    trainer = trainer_of(small_cnn(), capture)
    try:
        raise KeyError("the caller's")
    except KeyError:
        with pytest.warns(EngineWarning, match=r"the capture failed \(RuntimeError: the cause\)"):
            trainer.train_step(*batches[0], epoch=1)


def test_a_compiled_model_has_one_form_for_what_is_captured(batches, monkeypatch):
    """The look at a new bucket, the runs before its captures and the captures compile nothing anew."""

    def rerun_as_captured(fn, device, pool):
        for _ in range(graphs_module.WARM_UP_RUNS + 1):
            fn()

        def replay():
            with graphs_module.no_autocast_cache():
                fn()

        return replay

    compiler = Compiler().install(monkeypatch)
    trainer = trainer_of(small_cnn(), rerun_as_captured, compile="require")
    for epoch in (1, 1, 2, 2):
        for x, y in batches:
            trainer.train_step(x, y, epoch=epoch)
    assert compiler.compiled == 2  # forward alone, and with its backward


@pytest.mark.parametrize("wanted", [True, "require"])
@pytest.mark.parametrize("only_train", [False, True], ids=["attack", "update"])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_what_the_model_raises_is_not_blamed_on_graphs(batches, wanted, only_train, after):
    """From the first forward on, in the runs before a capture, in the capture: its own error, and no other."""

    def mine_raises(z):
        raise RuntimeError("the model's own")

    model = Broken(small_cnn(), mine_raises, after=10**9, only_train=only_train)
    trainer = trainer_of(model)
    give_graphs(trainer, Recorder(), wanted)
    if only_train:
        trainer.train_step(*batches[0], epoch=1)
    model.after = model.calls + after
    with warnings.catch_warnings():
        warnings.simplefilter("error", EngineWarning)
        with pytest.raises(RuntimeError, match="the model's own") as caught:
            trainer.fit(batches[:1] * 2, 2)
    assert type(caught.value) is RuntimeError


def test_what_another_option_raises_is_not_blamed_on_graphs(batches, monkeypatch):
    def cannot(*_, **__):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", lambda fn: cannot)
    trainer = trainer_of(small_cnn())
    give_graphs(trainer, Recorder(), True, compile="require")
    with warnings.catch_warnings():
        warnings.simplefilter("error", EngineWarning)
        with pytest.raises(EngineError, match="compile: was required"):
            trainer.train_step(*batches[0], epoch=1)


def test_on_a_cpu_there_are_none():
    model = small_cnn()
    with pytest.warns(EngineWarning, match="cuda_graphs: the model is on cpu, and CUDA graphs need a GPU"):
        trainer = ham.HAMTrainer(model, sgd(model), cuda_graphs=True)
    assert trainer.engine.graphs is None
    with pytest.raises(EngineError, match="cuda_graphs: was required, but the model is on cpu"):
        ham.HAMTrainer(model, sgd(model), cuda_graphs="require")


# ---------------------------------------------------------------- on a GPU
ON_GPU = {**SETTINGS, "device": "cuda"}
# Padded rows may choose another algorithm, whose rounding turns the sign of gradients that are all but zero: what a
# trainer without graphs does on another batch size as well. Ten steps carry that on.
ROWS_APART, LOSS_APART = 3, {"fp32": 0.02, "bf16": 0.05, "fp16": 0.05}


@pytest.fixture
def exact_convolutions():
    kept = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = False, True
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = kept[:2]
    torch.backends.cuda.matmul.allow_tf32 = kept[2]


@pytest.fixture
def on_gpu(batches):
    return [(x.cuda(), y.cuda()) for x, y in batches]


def gpu_pair(model: nn.Module | None = None, **choices) -> tuple[ham.HAMTrainer, ham.HAMTrainer]:
    """One trainer with graphs and one without any option but the precision, on equal models."""
    model = (small_cnn() if model is None else model).cuda()
    twin = copy.deepcopy(model)
    engine_only = ("channels_last", "compile")
    plain = {n: v for n, v in choices.items() if n not in engine_only}
    return (
        ham.HAMTrainer(model, sgd(model), cuda_graphs="require", **ON_GPU | choices),
        ham.HAMTrainer(twin, sgd(twin), **ON_GPU | plain),
    )


def assert_close_steps(ours, theirs, batches, epochs, precision="fp32"):
    for epoch in epochs:
        for x, y in batches:
            a, b = ours.train_step(x, y, epoch=epoch), theirs.train_step(x, y, epoch=epoch)
            assert abs(a.n_hard - b.n_hard) <= ROWS_APART
            assert a.loss == pytest.approx(b.loss, rel=LOSS_APART[precision])


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"channels_last": True},
        pytest.param({"channels_last": True, "compile": True}, marks=pytest.mark.slow),
        {"norm": "l2", "eps": 1.0, "step_size": 0.25},
        {"freeze_bn": True, "ema_decay": 0.9},
        {"screen": "one_step"},
        {"round_to": 16},
        {"bn_rows": "all"},
    ],
    ids=lambda c: ",".join(c) or "defaults",
)
def test_on_a_gpu_graphs_are_the_eager_run(on_gpu, exact_convolutions, precision, choices):
    """Ten steps, ragged batches, hard counts that change. An empty graph, or a gradient that is accumulated on a
    stream that is not captured, tells of itself by a warning of torch.
    """
    ours, theirs = gpu_pair(precision=precision, **choices)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*AccumulateGrad node's stream.*")
        warnings.filterwarnings("error", ".*CUDA Graph is empty.*")
        warnings.simplefilter("error", EngineWarning)
        assert_close_steps(ours, theirs, on_gpu[:2], (1, 1, 2, 2, 3), precision)
    assert len(ours.engine.graphs) >= 4
    assert ours.engine.active["cuda_graphs"]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("precision", "compiled"),
    [("fp32", False), ("bf16", False), ("fp16", False), pytest.param("bf16", True, marks=pytest.mark.slow)],
)
def test_on_a_gpu_replays_see_new_weights_and_images(on_gpu, exact_convolutions, precision, compiled):
    """Whatever a graph had kept of its capture would give another loss by far."""
    ours, theirs = gpu_pair(precision=precision, compile=compiled)
    for t in (ours, theirs) if precision == "fp16" else ():  # no update is to be skipped for an overflow
        t._update.load_state_dict({**t.state_dict()["loss_scale"], "scale": 1024.0})
    for epoch in (1, 1, 1, 2, 2, 2):
        for t in (ours, theirs):
            t.train_step(*on_gpu[0], epoch=epoch)
    captured = len(ours.engine.graphs)
    other = small_cnn(seed=9)
    with torch.no_grad():
        other[-1].weight.mul_(4.0)
    for t in (ours, theirs):
        t.model.load_state_dict(other.state_dict())
    x, y = on_gpu[2]
    before = [p.detach().clone() for p in ours.model.parameters()]
    a, b = ours.train_step(x, y, epoch=1), theirs.train_step(x, y, epoch=1)
    assert a.loss == pytest.approx(b.loss, rel=LOSS_APART[precision])
    moves = [
        [p.detach() - q for p, q in zip(t.model.parameters(), before, strict=True)] for t in (ours, theirs)
    ]  # fmt: skip
    for p, q in zip(*moves, strict=True):
        assert torch.nn.functional.cosine_similarity(p.flatten(), q.flatten(), 0) > 0.9
    assert len(ours.engine.graphs) == captured  # the step was a replay


@pytest.mark.gpu
@pytest.mark.parametrize(("epoch", "freeze_bn"), [(1, False), (2, True)], ids=["pgd_at", "ham"])
@pytest.mark.parametrize(
    ("precision", "compiled"),  # fp16 is not here: GradScaler waits for the device by itself
    [("fp32", False), ("bf16", False), pytest.param("bf16", True, marks=pytest.mark.slow)],
)
def test_on_a_gpu_a_replayed_step_never_waits(on_gpu, exact_convolutions, precision, epoch, freeze_bn, compiled):
    """Learning rate 0, one noise and frozen statistics: the same hard rows each time, so that the last step replays."""
    model = small_cnn().cuda()
    trainer = ham.HAMTrainer(
        model, sgd(model, lr=0.0), cuda_graphs="require", precision=precision, freeze_bn=freeze_bn, compile=compiled,
        **ON_GPU,
    )  # fmt: skip
    counts = []
    for _ in range(4):
        trainer.steps_done = 0
        counts.append(trainer.train_step(*on_gpu[0], epoch=epoch).n_hard)
    assert len(set(counts)) == 1
    trainer.steps_done = 0
    captured = len(trainer.engine.graphs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.train_step(*on_gpu[0], epoch=epoch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(trainer.engine.graphs) == captured


class Waiting(nn.Module):
    """Reads a number from the device in forward, which no capture allows; in train mode only, or always."""

    def __init__(self, only_train: bool):
        super().__init__()
        self.inner, self.only_train = small_cnn(), only_train

    def forward(self, x):
        if (self.training or not self.only_train) and x.mean().item() > 2:
            raise AssertionError("images are in [0, 1]")
        return self.inner(x)


@pytest.mark.gpu
@pytest.mark.parametrize("only_train", [False, True], ids=["attack", "update"])
def test_on_a_gpu_a_failed_capture_is_given_up_and_leaves_cuda_usable(on_gpu, exact_convolutions, only_train):
    model = Waiting(only_train).cuda()
    twin = copy.deepcopy(model)
    ours = ham.HAMTrainer(model, sgd(model), cuda_graphs=True, **ON_GPU)
    theirs = ham.HAMTrainer(twin, sgd(twin), **ON_GPU)
    stream = torch.cuda.current_stream()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_close_steps(ours, theirs, on_gpu[:1], (1, 1, 1, 2, 2))
    messages = [str(w.message) for w in caught if issubclass(w.category, EngineWarning)]
    assert len(messages) == 1
    assert messages[0].startswith("cuda_graphs: the capture failed")
    assert torch.cuda.current_stream() == stream
    assert not torch.cuda.is_current_stream_capturing()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # asserts that no capture is under way
    for a, b in zip(ours.model.buffers(), theirs.model.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.02)
    assert int(ours.model.inner[2].num_batches_tracked) == int(theirs.model.inner[2].num_batches_tracked)
    another, eager = gpu_pair()  # and graphs of other models can still be captured
    assert_close_steps(another, eager, on_gpu[:1], (1, 1, 1, 2, 2))


class Spoiling(nn.Module):
    """Waits for the device within a capture only, which ends it from inside."""

    def __init__(self):
        super().__init__()
        self.inner = small_cnn()

    def forward(self, x):
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()
        return self.inner(x)


@pytest.mark.gpu
def test_on_a_gpu_a_spoiled_capture_leaves_random_numbers_and_other_graphs(on_gpu, exact_convolutions):
    other, eager = gpu_pair()
    assert_close_steps(other, eager, on_gpu[:1], (1, 1, 1, 2, 2))
    model = Spoiling().cuda()
    ours = ham.HAMTrainer(model, sgd(model), cuda_graphs=True, **ON_GPU)
    with pytest.warns(EngineWarning, match="cuda_graphs: the capture failed") as caught:
        ours.train_step(*on_gpu[0], epoch=1)
    assert "previous error" not in str(caught[0].message)
    assert torch.isfinite(torch.rand(8, device="cuda")).all()
    captured = len(other.engine.graphs)
    assert_close_steps(other, eager, on_gpu[:1], (1, 2))
    assert len(other.engine.graphs) == captured


@pytest.mark.gpu
def test_on_a_gpu_a_required_capture_that_fails_raises(on_gpu):
    model = Waiting(False).cuda()
    trainer = ham.HAMTrainer(model, sgd(model), cuda_graphs="require", **ON_GPU)
    stream = torch.cuda.current_stream()
    with pytest.raises(EngineError, match="cuda_graphs: was required, but the capture failed"):
        trainer.train_step(*on_gpu[0], epoch=1)
    assert torch.cuda.current_stream() == stream
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.gpu
def test_on_a_gpu_side_stream(on_gpu, exact_convolutions):
    """Captured on one stream and replayed on another, whose work must all be waited for by then."""
    ours, theirs = gpu_pair()
    for epoch in (1, 1, 2, 2):
        for t in (ours, theirs):
            t.train_step(*on_gpu[0], epoch=epoch)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert_close_steps(ours, theirs, on_gpu, (1, 2, 2))
    torch.cuda.current_stream().wait_stream(stream)
    assert_close_steps(ours, theirs, on_gpu, (2,))


@pytest.mark.gpu
@pytest.mark.parametrize("updates", ["each", "one"])
def test_on_a_gpu_groups(on_gpu, exact_convolutions, updates):
    ours, theirs = gpu_pair(group=2, group_updates=updates, channels_last=True, precision="bf16")
    histories = [t.fit(on_gpu, 3) for t in (ours, theirs)]
    for a, b in zip(*histories, strict=True):
        assert a.n == b.n
        assert abs(a.n_hard - b.n_hard) <= 4 * ROWS_APART
        assert a.loss == pytest.approx(b.loss, rel=LOSS_APART["bf16"])


@pytest.mark.gpu
def test_on_a_gpu_dropout_draws_what_it_draws_without_graphs(on_gpu, exact_convolutions):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 10))
    pair, losses = gpu_pair(model), []
    for trainer in pair:
        torch.cuda.manual_seed(3)
        losses.append([trainer.train_step(*on_gpu[0], epoch=1).loss for _ in range(6)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert len(set(losses[0])) == 6


@pytest.mark.gpu
@pytest.mark.parametrize(("width", "size"), [(2048, 8), (16, 512)], ids=["large model", "large images"])
def test_on_a_gpu_many_numbers_of_rows_take_little_memory(exact_convolutions, width, size):
    """Twelve graphs, of a model of 16 MiB or of images of 1 MiB: one set of gradients, one batch, one pool."""
    torch.manual_seed(0)
    layers = [nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(64, width), nn.Linear(width, width)]
    model = nn.Sequential(*layers, nn.Linear(width, 10)).cuda()
    device = torch.device("cuda", torch.cuda.current_device())
    update = Updater(sgd(model), Engine(EngineOptions(cuda_graphs="require"), device), device)

    def visit(n):
        e = examples_of(n, n)
        x_adv, x = (t.cuda().repeat(1, 1, size // 8, size // 8) for t in (e.x_adv, e.x))
        on_device = Examples(x_adv, x, e.y.cuda(), e.weights.cuda(), n, n, None)
        for _ in range(3):
            update(model, weighted_ce, on_device, False)

    visit(64)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for n in range(20, 42, 2):
        visit(n)
    torch.cuda.synchronize()
    assert len(update._engine.graphs) == 12
    one = max(sum(p.numel() * p.element_size() for p in model.parameters()), 64 * size * size * 4)
    assert torch.cuda.memory_allocated() - before < 2 * one


@pytest.mark.gpu
def test_on_a_gpu_graphs_that_are_forgotten_give_their_memory_back(on_gpu):
    trainer, _ = gpu_pair()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        trainer.train_step(*on_gpu[0], epoch=2)
    other = small_cnn().cuda()
    held = torch.cuda.memory_allocated()
    assert held > before
    trainer.engine.graphs.follow(other)
    gc.collect()
    assert torch.cuda.memory_allocated() < held
