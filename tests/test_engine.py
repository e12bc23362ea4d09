"""The engine's options together: what they cost, whose errors they meet, copies, bad input."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from engine_helpers import (
    CPU,
    Compiler,
    Viewing,
    assert_same_model,
    engine_warnings,
    ragged_batches,
    refuses_to_run,
    serve_any_half,
    tiny,
    trainer_of,
)
from nets import Broken, Counting, small_cnn

from ham_kernels.attack.pgd import pgd_attack
from ham_kernels.engine import (
    Engine,
    EngineError,
    EngineOptions,
    EngineWarning,
)


@pytest.fixture(scope="module")
def batches():
    return ragged_batches()


@pytest.fixture
def any_half(monkeypatch):
    serve_any_half(monkeypatch)


# ---------------------------------------------------------------- cost
@pytest.mark.parametrize(
    "options",
    [{"channels_last": True}, {"precision": "bf16"}, {"channels_last": True, "precision": "bf16", "compile": True}],
    ids=lambda o: ",".join(o),
)
def test_options_cost_no_forward(batches, options, any_half, monkeypatch):
    """2K+3 for PGD-AT, 2M+1+2h(K-M)+3h for HAM, in full-batch forwards, once the first batch has judged the options.

    The compiler gives back what it got, since the counters of a traced model would be compiled anew at every call.
    """
    monkeypatch.setattr(torch, "compile", lambda fn: fn)
    x = torch.cat([x for x, _ in batches[:3]])[:128]
    y = torch.cat([y for _, y in batches[:3]])[:128]
    counting = Counting(small_cnn())
    trainer = trainer_of(counting, **options)
    for _ in range(25):
        trainer.train_step(x, y, epoch=1)
    assert [name for name, on in trainer.engine.active.items() if on not in (False, "fp32")] == [
        name for name in ("precision", "channels_last", "compile") if name in options
    ]
    counting.__init__(counting.inner)
    trainer.train_step(x, y, epoch=1)
    assert counting.full_batch_forwards(128) == 2 * 5 + 3
    counting.__init__(counting.inner)
    h = trainer.train_step(x, y, epoch=2).hard_fraction
    assert 0 < h < 1
    assert counting.full_batch_forwards(128) == pytest.approx(2 * 2 + 1 + 2 * h * (5 - 2) + 3 * h)


# ---------------------------------------------------------------- whose error it is
@pytest.mark.parametrize("kind", [RuntimeError, KeyError])
@pytest.mark.parametrize("wanted", [True, "require"])
@pytest.mark.parametrize("option", ["channels_last", "compile", "precision"])
def test_what_the_model_raises_is_its_own(batches, option, wanted, kind, any_half, monkeypatch):
    Compiler().install(monkeypatch)

    def fail(z):
        raise kind("the model's own")

    model = Broken(tiny(), fail)
    wanted = {True: "bf16", "require": "require-bf16"}[wanted] if option == "precision" else wanted
    trainer = trainer_of(model, **{option: wanted})
    with warnings.catch_warnings():
        warnings.simplefilter("error", EngineWarning)
        with pytest.raises(kind, match="the model's own") as caught:
            trainer.train_step(*batches[0], epoch=1)
    assert type(caught.value) is kind
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())


def test_options_together_warn_once_each(batches, monkeypatch):
    refuses_to_run(monkeypatch)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    model = Viewing()
    twin = copy.deepcopy(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = trainer_of(model, channels_last=True, compile=True, cuda_graphs=True, precision="bf16")
        ours.fit(batches, 3)
    assert sorted(m.split(":")[0] for m in engine_warnings(caught)) == [
        "channels_last", "compile", "cuda_graphs", "precision",
    ]  # fmt: skip
    assert ours.engine.active == {
        "precision": "fp32", "channels_last": False, "compile": False, "cuda_graphs": False, "winograd": False,
    }  # fmt: skip
    theirs = trainer_of(twin)
    assert [r.loss for r in theirs.fit(batches, 3)] == pytest.approx([r.loss for r in ours.history], rel=1e-5)


# ---------------------------------------------------------------- copies
def test_a_copied_trainer_has_an_engine_of_its_own(batches, any_half, monkeypatch):
    compiler = Compiler().install(monkeypatch)
    first = trainer_of(tiny(), precision="bf16", compile="require", channels_last=True, ema_decay=0.9)
    first.train_step(*batches[0], epoch=1)
    second = copy.deepcopy(first)
    assert second.engine is not first.engine
    assert second._update._engine is second.engine
    assert second.engine.options == first.engine.options
    compiled = compiler.compiled
    pairs = [[t.train_step(*batches[0], epoch=epoch).loss for epoch in (1, 2)] for t in (first, second)]
    assert pairs[0] == pairs[1]
    assert compiler.compiled > compiled
    assert_same_model(first.model, second.model, rtol=0, atol=0)
    assert not any(
        p.data_ptr() == q.data_ptr() for p, q in zip(first.model.parameters(), second.model.parameters(), strict=True)
    )


def test_a_pickled_engine_is_a_new_one(any_half):
    first = Engine(EngineOptions("bf16", True, "require", False, False), CPU)
    first._on.discard("channels_last")
    second = pickle.loads(pickle.dumps(first))
    assert second.options == first.options
    assert second.device == CPU
    assert second.precision == "bf16"
    assert second.active["channels_last"] is True  # it will find out for itself
    with pytest.raises(EngineError, match="compile: was required, but why"):
        second.give_up("compile", "why")


# ---------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("choices", "kind", "message"),
    [
        ({"precision": "require-fp32"}, ValueError, "precision: got 'require-fp32'"),
        ({"precision": "fp64"}, ValueError, "precision: got 'fp64'"),
        ({"precision": True}, ValueError, "precision: got True"),
        (
            {"channels_last": "yes"},
            ValueError,
            "channels_last: got 'yes'; allowed are False, True, 'off', 'on', 'require'",
        ),
        ({"compile": "max-autotune"}, ValueError, "compile: got 'max-autotune'"),
        ({"cuda_graphs": None}, ValueError, "cuda_graphs: got None"),
        ({"keep_memory": "no"}, TypeError, "keep_memory: got 'no'"),
        ({"group": 0}, ValueError, "group: got 0; it must be >= 1"),
        ({"group": 1.5}, TypeError, "group: got 1.5"),
        ({"group_updates": "both"}, ValueError, "group_updates: got 'both'; allowed are 'each', 'one'"),
        ({"round_to": 0}, ValueError, "round_to: got 0; it must be >= 1"),
        ({"round_to": "8"}, TypeError, "round_to: got '8'"),
        ({"round_to": 8, "group": 2}, ValueError, "round_to: got 8 with group=2"),
        ({"screen": "x"}, ValueError, "screen: got 'x'; allowed are 'steps', 'one_step'"),
    ],
    ids=lambda v: ",".join(v) if isinstance(v, dict) else "",
)
def test_bad_options_are_named(choices, kind, message):
    with pytest.raises(kind, match=message):
        trainer_of(small_cnn(), **choices)


def test_a_bad_precision_of_an_attack_is_named(batches):
    with pytest.raises(ValueError, match="precision: got 'require-bf16'; allowed are 'fp32', 'bf16', 'fp16'"):
        pgd_attack(small_cnn(), *batches[0], precision="require-bf16")
