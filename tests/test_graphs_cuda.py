"""CUDA graphs on a GPU: the eager run's results, no waiting, failed captures, streams, memory."""

from __future__ import annotations

import copy
import gc
import warnings

import pytest
import torch
from engine_helpers import SETTINGS, ragged_batches
from graph_helpers import RAGGED, examples_of
from nets import sgd, small_cnn
from objectives import WithLoss
from torch import nn

import ham_kernels as ham
from ham_kernels.engine import Engine, EngineError, EngineOptions, EngineWarning, logits_of
from ham_kernels.methods import weighted_ce
from ham_kernels.methods.mining import Examples
from ham_kernels.training.update import Updater

pytestmark = pytest.mark.gpu
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
def on_gpu():
    return [(x.cuda(), y.cuda()) for x, y in ragged_batches(RAGGED)]


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
def test_graphs_are_the_eager_run(on_gpu, exact_convolutions, precision, choices):
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


@pytest.mark.parametrize(
    ("precision", "compiled"),
    [("fp32", False), ("bf16", False), ("fp16", False), pytest.param("bf16", True, marks=pytest.mark.slow)],
)
def test_replays_see_new_weights_and_images(on_gpu, exact_convolutions, precision, compiled):
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


@pytest.mark.parametrize(("epoch", "freeze_bn"), [(1, False), (2, True)], ids=["pgd_at", "ham"])
@pytest.mark.parametrize(
    ("precision", "compiled"),  # fp16 is not here: GradScaler waits for the device by itself
    [("fp32", False), ("bf16", False), pytest.param("bf16", True, marks=pytest.mark.slow)],
)
def test_a_replayed_step_never_waits(on_gpu, exact_convolutions, precision, epoch, freeze_bn, compiled):
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


@pytest.mark.parametrize("only_train", [False, True], ids=["attack", "update"])
def test_a_failed_capture_is_given_up_and_leaves_cuda_usable(on_gpu, exact_convolutions, only_train):
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


def test_a_spoiled_capture_leaves_random_numbers_and_other_graphs(on_gpu, exact_convolutions):
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


def test_a_required_capture_that_fails_raises(on_gpu):
    model = Waiting(False).cuda()
    trainer = ham.HAMTrainer(model, sgd(model), cuda_graphs="require", **ON_GPU)
    stream = torch.cuda.current_stream()
    with pytest.raises(EngineError, match="cuda_graphs: was required, but the capture failed"):
        trainer.train_step(*on_gpu[0], epoch=1)
    assert torch.cuda.current_stream() == stream
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_side_stream(on_gpu, exact_convolutions):
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


@pytest.mark.parametrize("updates", ["each", "one"])
def test_groups(on_gpu, exact_convolutions, updates):
    ours, theirs = gpu_pair(group=2, group_updates=updates, channels_last=True, precision="bf16")
    histories = [t.fit(on_gpu, 3) for t in (ours, theirs)]
    for a, b in zip(*histories, strict=True):
        assert a.n == b.n
        assert abs(a.n_hard - b.n_hard) <= 4 * ROWS_APART
        assert a.loss == pytest.approx(b.loss, rel=LOSS_APART["bf16"])


def test_dropout_draws_what_it_draws_without_graphs(on_gpu, exact_convolutions):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 10))
    pair, losses = gpu_pair(model), []
    for trainer in pair:
        torch.cuda.manual_seed(3)
        losses.append([trainer.train_step(*on_gpu[0], epoch=1).loss for _ in range(6)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert len(set(losses[0])) == 6


@pytest.mark.parametrize(("width", "size"), [(2048, 8), (16, 512)], ids=["large model", "large images"])
def test_many_numbers_of_rows_take_little_memory(exact_convolutions, width, size):
    """Twelve graphs, of a model of 16 MiB or of images of 1 MiB: one set of gradients, one batch, one pool."""
    torch.manual_seed(0)
    layers = [nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(64, width), nn.Linear(width, width)]
    model = nn.Sequential(*layers, nn.Linear(width, 10)).cuda()
    device = torch.device("cuda", torch.cuda.current_device())
    pgd_at = WithLoss(weighted_ce)
    update = Updater(sgd(model), Engine(EngineOptions(cuda_graphs="require"), device), device)

    def visit(n):
        e = examples_of(n, n)
        x_adv, x = (t.cuda().repeat(1, 1, size // 8, size // 8) for t in (e.x_adv, e.x))
        on_device = Examples(x_adv, x, e.y.cuda(), e.weights.cuda(), n, n, None)
        for _ in range(3):
            update(model, pgd_at, on_device, False)

    visit(64)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for n in range(20, 42, 2):
        visit(n)
    torch.cuda.synchronize()
    assert len(update._engine.graphs) == 12
    one = max(sum(p.numel() * p.element_size() for p in model.parameters()), 64 * size * size * 4)
    assert torch.cuda.memory_allocated() - before < 2 * one


def test_graphs_that_are_forgotten_give_their_memory_back(on_gpu):
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


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_logits_and_gradients_asked_apart(on_gpu, exact_convolutions, precision, compiled):
    """Forward and backward are two graphs; what passes between them outlives no other replay."""
    model, device = small_cnn().cuda(), torch.device("cuda")
    by = Engine(EngineOptions(precision, compile=compiled, cuda_graphs="require"), device)
    eager = Engine(EngineOptions(precision), device)
    rel = 1e-3 if precision == "fp32" else 0.05
    for x, _ in on_gpu * 2:
        weights = torch.randn(len(x), 10, device=device)
        gradients = []
        for e in (by, eager):
            with e.attacking(model):
                asked = logits_of(model, e, 64)
                points = [x.clone().requires_grad_(), x.flip(0).clone().requires_grad_()]
                z = [asked(p) for p in points]
                late = torch.autograd.grad(z[0], points[0], weights, retain_graph=True)[0]
                gradients.append([late, *(torch.autograd.grad(z[i], points[i], weights)[0] for i in (1, 0))])
        for ours, theirs in zip(*gradients, strict=True):
            assert (ours - theirs).norm() <= rel * theirs.norm()
