"""The ops as PyTorch sees them: schemas, fakes, torch.compile; and which backend runs where."""

from __future__ import annotations

import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from helpers import environment, in_layout

from ham_kernels import ops
from ham_kernels.ops import _library

ROOT = Path(__file__).resolve().parents[1]
raw = torch.ops.ham_kernels
X, GRAD, Z, Y = (
    torch.rand(4, 3, 6, 5),
    torch.randn(4, 3, 6, 5),
    torch.randn(4, 10),
    torch.tensor([1, 2, 3, 9]),
)
ROWS, INDEX, COUNT = torch.rand(4) * 0.1, torch.tensor([2, 0, 3]).int(), torch.tensor([2]).int()
LAST = X.to(memory_format=torch.channels_last)

SAMPLES = {  # name of the op: arguments
    "pgd_step_": [
        lambda: (X.clone(), X, GRAD, None, None, 0.1, 0.02, None, None, 0.0, 1.0, False),
        lambda: (X.clone(), X, GRAD, None, None, 0.1, 0.02, None, None, 0.0, 1.0, True),
        lambda: (LAST.clone(), LAST, GRAD[:3], INDEX, COUNT, 0.0, 0.0, ROWS, ROWS, 0.0, 1.0, False),
        lambda: (X.half(), X.half(), GRAD[:3], INDEX, None, 0.1, 0.0, None, ROWS, 0.0, 1.0, True),
    ],
    "jump_": [
        lambda: (X.clone(), X, X * 0.9, ROWS > 0.05, 3.0, 0.1, None, 0.0, 1.0, False),
        lambda: (LAST.clone(), LAST, LAST * 0.9, ROWS > 0.05, 3.0, 0.0, ROWS, 0.0, 1.0, True),
        lambda: (X[:0].clone(), X[:0], X[:0], ROWS[:0] > 0.05, 3.0, 0.1, None, 0.0, 1.0, False),
    ],
    "random_start": [
        lambda: (X, 0.1, None, 7, 3, 0.0, 1.0, False),
        lambda: (LAST, 0.0, ROWS, 7, 3, 0.0, 1.0, True),
        lambda: (in_layout(X.bfloat16(), "every other channel"), 0.1, None, 7, 3, 0.0, 1.0, False),
        lambda: (X[:0], 0.1, None, 7, 3, 0.0, 1.0, False),
        lambda: (X[1:], 0.1, None, 7, 3, 0.0, 1.0, True, 1),  # a slice of a global batch
    ],
    "margin_stats": [
        lambda: (Z, Y, None, None, False),
        lambda: (Z, Y, Z * 2, None, True),
        lambda: (Z, Y, Z * 2, ROWS, True, False),  # without the flags
        lambda: (Z, Y, None, ROWS, False),
        lambda: (Z.half(), Y, Z.half() * 2, ROWS, False),
        lambda: (Z.T.contiguous().T, Y, None, None, False),
        lambda: (Z[:0], Y[:0], Z[:0], None, False),
    ],
    "step_size_weights": [lambda: (ROWS, 1.0), lambda: (ROWS[:0], 1.0)],
    "weighted_cross_entropy": [
        lambda: (Z.clone().requires_grad_(), Y, ROWS),
        lambda: (Z.bfloat16().requires_grad_(), Y, None),
        lambda: (Z.T.contiguous().T, Y, None),
        lambda: (Z[:0], Y[:0], None),
    ],
    "compact": [lambda: (ROWS > 0.05,), lambda: (ROWS[:0] > 0.05,)],
}


@pytest.mark.parametrize(
    ("name", "sample"), [(name, i) for name, samples in SAMPLES.items() for i in range(len(samples))]
)
@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_opcheck(name, sample, where):
    arguments = [
        t.detach().to(where).requires_grad_(t.requires_grad) if isinstance(t, torch.Tensor) else t
        for t in SAMPLES[name][sample]()
    ]
    torch.library.opcheck(getattr(raw, name), tuple(arguments))


def test_every_op_is_sampled_and_reported():
    assert set(SAMPLES) == set(ops.backends())
    public = {name.rstrip("_") for name in SAMPLES}
    assert public <= set(ops.__all__)


# ---------------------------------------------------------------- torch.compile
WRAPPERS = {
    "pgd_step": lambda x, g, z, y: ops.pgd_step(x.clone(), x, g, 0.1, 0.02),
    "pgd_step, argument changed": lambda x, g, z, y: ops.pgd_step(x.mul_(0.5), x.clone(), g, 0.1, 0.02),
    "pgd_step, active set": lambda x, g, z, y: ops.pgd_step(
        x.clone(),
        x,
        g[:3],
        z[:, 0].abs(),
        z[:, 1].abs(),
        index=y[:3].argsort().int(),
        count=y[:1].int().clamp(max=3),
        norm="l2",
    ),
    "jump": lambda x, g, z, y: ops.jump(x.clone(), x, x * 0.9, y > 1, 3.0, 0.1),
    "jump, rows": lambda x, g, z, y: ops.jump(x.clone(), x, x * 0.9, y > 1, 3.0, z[:, 0].abs(), norm="l2"),
    "random_start": lambda x, g, z, y: ops.random_start(x, 0.1, seed=3, step=1),
    "random_start, rows": lambda x, g, z, y: ops.random_start(x, z[:, 0].abs(), seed=3, norm="l2"),
    "random_start, slice": lambda x, g, z, y: ops.random_start(x, 0.1, seed=3, first_row=5),
    "margin_stats": lambda x, g, z, y: ops.margin_stats(z, y)[:2],
    "margin_stats, step": lambda x, g, z, y: ops.margin_stats(z, y, z * 2, z[:, 0].abs(), space="probs"),
    "step_size_weights": lambda x, g, z, y: ops.step_size_weights(z[:, 0].abs(), 1.0),
    "weighted_cross_entropy": lambda x, g, z, y: ops.weighted_cross_entropy(z, y, z[:, 0].abs()),
    "compact": lambda x, g, z, y: ops.compact(z[:, 0] > 0),
}


def check_compiled(function, backend, device):
    torch.compiler.reset()
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    for n in (4, 3):  # the second batch has another size: shapes become symbols
        arguments = [t[:n].to(device) for t in (X, GRAD, Z, Y)]
        ours, theirs = [t.clone() for t in arguments], [t.clone() for t in arguments]
        torch.testing.assert_close(compiled(*ours), function(*theirs), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", WRAPPERS)
def test_compiles_without_a_break(name, device):
    check_compiled(WRAPPERS[name], "aot_eager", device)


def test_the_compiled_loss_has_its_gradient(device):
    compiled = torch.compile(ops.weighted_cross_entropy, backend="aot_eager", fullgraph=True)
    for dtype in (torch.float32, torch.bfloat16):
        z = Z.to(device, dtype).requires_grad_()
        y, w = Y.to(device), ROWS.to(device)
        ours, theirs = (torch.autograd.grad(loss(z, y, w), z)[0] for loss in (compiled, ops.weighted_cross_entropy))
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # of inductor itself
def test_inductor(device):
    def attack_step(x, g, z, y):
        x_adv = ops.random_start(x, 0.1, seed=3)
        grad, hard, step = ops.margin_stats(z * 1.5, y, z)
        index, count = ops.compact(hard)
        ops.pgd_step(x_adv, x, g * grad.norm(), 0.1, 0.02, index=index, count=count)
        return x_adv + 1.0, ops.weighted_cross_entropy(z, y, ops.step_size_weights(step, 1.0))

    check_compiled(attack_step, "inductor", device)


def test_bad_shapes_are_still_caught_while_compiling():
    compiled = torch.compile(lambda x: ops.pgd_step(x.clone(), x, x[:2], 0.1, 0.02), backend="eager")
    with pytest.raises(Exception, match="grad: got shape"):
        compiled(X)


# ---------------------------------------------------------------- backends
def in_new_process(code: str, **more: str) -> subprocess.CompletedProcess:
    env = environment(ROOT, **more)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)


STEP = """
import torch
from ham_kernels import ops
x = torch.full((2, 3), 0.5)
print(ops.pgd_step(x.clone(), x, x, 0.25, 0.125).tolist()[0], ops.compact(x[:, 0] > 0)[1].tolist())
print({row["cpu"][0] for row in ops.backends().values()}, {row["cuda"][0] for row in ops.backends().values()})
print(ops.backends()["margin_stats"]["cuda"][1])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prelude", "choice", "backend", "why"),
    [
        ("", "triton", "triton", "Triton "),
        ("", "torch", "torch", "chosen by HAM_BACKEND=torch"),
        ("import sys; sys.modules['triton'] = None", "auto", "torch", "Triton cannot be imported"),
    ],
    ids=["triton", "torch", "no Triton installed"],
)
def test_backend_choice(prelude, choice, backend, why):
    run = in_new_process(prelude + STEP, HAM_BACKEND=choice)
    assert run.returncode == 0, run.stderr
    results, backends, reason = run.stdout.splitlines()
    assert results == "[0.625, 0.625, 0.625] [2]"
    if prelude == "":
        assert backends == f"{{'torch'}} {{'{backend}'}}"
    assert why in reason


@pytest.mark.slow
def test_unknown_backend():
    run = in_new_process("import ham_kernels.ops", HAM_BACKEND="cudnn")
    assert "ValueError: HAM_BACKEND='cudnn': allowed are auto, triton and torch" in run.stderr


def test_a_fallback_warns_once(monkeypatch):
    monkeypatch.delenv("HAM_BACKEND", raising=False)
    call = _library._warned_once(lambda a: a + 1, "compact", "triton", "_C.so is not there")
    with pytest.warns(ops.BackendWarning, match="compact runs on triton: _C.so is not there"):
        assert call(1) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert call(2) == 3
    monkeypatch.setenv("HAM_BACKEND", "triton")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # asked for: no warning
        assert _library._warned_once(lambda a: a, "compact", "triton", "")(1) == 1
