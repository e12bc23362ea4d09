"""When graphs are given up: another model, moved or replaced weights, and captures that fail."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref

import pytest
import torch
from engine_helpers import CPU, Compiler, ragged_batches
from graph_helpers import (
    NOT_CAPTURABLE,
    RAGGED,
    Recorder,
    assert_same_steps,
    give_graphs,
    rerun,
    trainer_of,
    twins,
)
from nets import Broken, sgd, small_cnn
from torch import nn

import ham_kernels as ham
from ham_kernels.engine import EngineError, EngineWarning
from ham_kernels.engine import graphs as graphs_module
from ham_kernels.engine.graphs import Graphs


@pytest.fixture(scope="module")
def batches():
    return ragged_batches(RAGGED)


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


@pytest.mark.parametrize("how", ["another model", "given up", "the trainer goes"])
def test_memory_is_given_back_without_the_collector(batches, how):
    """A capture that ran out of memory is followed by a step without graphs, and nothing collects in between."""

    def capture(fns, device, pool):
        graphs_module.run(fns)
        return [lambda: None for _ in fns]  # as of a GPU, a replay holds none of the functions

    trainer = trainer_of(small_cnn(), capture)
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            trainer.train_step(*batches[0], epoch=2)
        graphs = trainer.engine.graphs
        places = [weakref.ref(t) for k in graphs._kept.values() for t in k.places.values() if t is not None]
        assert {type(k).__name__ for k in graphs._kept.values()} == {"Bucket", "_Graphed"}
        if how == "another model":
            graphs.follow(small_cnn(seed=1))
        elif how == "given up":
            with pytest.warns(EngineWarning, match="cuda_graphs: no memory"):
                trainer.engine.give_up("cuda_graphs", "no memory")
        else:
            del graphs, trainer
        assert places
        assert not any(place() is not None for place in places)
    finally:
        gc.enable()


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

    def capture(fns, device, pool):
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

    def rerun_as_captured(fns, device, pool):
        for _ in range(graphs_module.WARM_UP_RUNS + 1):
            graphs_module.run(fns)

        def replay():
            with graphs_module.no_autocast_cache():
                graphs_module.run(fns)

        return [replay]

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
