"""CUDA graphs: what is captured, replayed and forgotten, on the CPU with a stand-in for a graph."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref

import pytest
import torch
from graph_helpers import NOT_CAPTURABLE, SETTINGS, Recorder, digits, examples_of, ragged_batches, rerun
from nets import Broken, sgd, small_cnn
from test_engine import Compiler
from torch import Tensor, nn

import ham_kernels as ham
import ham_reference as reference
from ham_kernels.buckets import Bucket
from ham_kernels.engine import PLAIN, Engine, EngineError, EngineOptions, EngineWarning
from ham_kernels.engine import graphs as graphs_module
from ham_kernels.engine.graphs import BUCKETS, Graphs, bucket_of
from ham_kernels.mining import Examples, Keep, StepSizeWeights, mine
from ham_kernels.recipes import weighted_ce
from ham_kernels.update import Updater

CPU = torch.device("cpu")


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
def batches():
    return ragged_batches()


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
def test_budgets_per_row_follow_into_the_graphs(norm, loss):
    """Twice with other budgets: the first ones must not have been captured."""
    x, y = digits(48)
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
