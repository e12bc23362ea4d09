"""Winograd convolutions: reference, kernel at both vector widths, gradients, and what they refuse."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch.nn import functional as F

from ham_kernels.ops import winograd as ops
from ham_kernels.ops.native import cpu, cuda
from ham_kernels.ops.winograd import winograd_launch, winograd_reference, winograd_weights, winograd_weights_launch

raw = torch.ops.ham_kernels
there, why = ops.status()
needs_library = pytest.mark.skipif(there is None, reason=why)
WIDTHS = [w for w in (8, 16) if there is not None and w <= ops.lanes()]
# torch's parallel_for, and the work that it is given
KIND = ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_int64] * 3, ctypes.c_void_p, ctypes.c_void_p)
WORK = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)

# (n, c_in, c_out, h, w)
SHAPES = {
    "whole tiles": (2, 16, 32, 8, 8),
    "one pixel": (3, 16, 16, 1, 1),
    "edges of 1 to 3 pixels": (2, 32, 16, 7, 13),
    "narrow": (5, 16, 16, 2, 30),
    "an odd number of panels": (1, 48, 80, 4, 4),
    "several blocks, the last one short": (9, 16, 16, 16, 12),
    "sums of several chunks, weights above a cache": (2, 352, 352, 4, 4),
    "fewer tiles than a strip": (1, 64, 64, 4, 8),
    "no rows": (0, 16, 16, 8, 8),
}


def case(shape, dtype=torch.float32):
    n, c_in, c_out, h, w = shape
    x = torch.randn(n, c_in, h, w).relu().to(dtype)
    return x, torch.randn(c_out, c_in, 3, 3) / (9 * c_in) ** 0.5


def exact(x, weight):
    return F.conv2d(x.double(), weight.double(), padding=1)


def rms(t):
    return t.double().pow(2).mean().sqrt().item()


# ---------------------------------------------------------------- right
@pytest.mark.parametrize("name", SHAPES)
def test_the_reference_is_a_convolution(name):
    x, weight = case(SHAPES[name])
    y = winograd_reference(x, winograd_weights(weight))
    torch.testing.assert_close(y, exact(x, weight).float(), rtol=0, atol=2e-5)
    assert y.is_contiguous(memory_format=torch.channels_last)


@needs_library
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
def test_the_kernel_is_the_reference(name, dtype, width, poisoned_memory):
    x, weight = case(SHAPES[name], dtype)
    c_out, c_in = weight.shape[:2]
    u = winograd_weights_launch(weight, False, torch.full((36, c_out // 16, c_in * 16), torch.nan), width)
    torch.testing.assert_close(u, ops.winograd_weights_reference(weight, False), rtol=1e-5, atol=1e-6)
    y = winograd_launch(x, u, width)
    expected = winograd_reference(x, u)
    # bf16: the same sum rounded; where two fp32 sums lie on both sides of a boundary, one unit (2^-8) apart
    torch.testing.assert_close(y, expected, rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=2e-5)
    assert (y.shape, y.dtype) == (expected.shape, dtype)
    assert y.permute(0, 2, 3, 1).is_contiguous()


@needs_library
@pytest.mark.parametrize("channels", [64, 320])
def test_how_much_it_rounds(channels):
    """fp32: at most 1e-6 of what y varies by, whatever the number of channels. bf16: less than torch's own error, since
    only x and y are rounded.
    """
    x, weight = case((8, channels, channels, 8, 8))
    u = winograd_weights(weight)
    right = exact(x, weight)
    assert rms(winograd_launch(x, u) - right) <= 1e-6 * right.std()
    half = x.bfloat16()
    right = exact(half, weight)
    torchs = F.conv2d(half, weight.bfloat16(), padding=1)
    assert rms(winograd_launch(half, u) - right) <= rms(torchs - right)


def test_its_points_round_half_as_much_as_the_usual_ones(monkeypatch):
    x, weight = case((8, 64, 64, 8, 8))
    right = exact(x, weight)
    own = rms(winograd_reference(x, winograd_weights(weight)) - right)
    monkeypatch.setattr(ops, "_POINTS", (0.0, 1.0, -1.0, 2.0, -2.0))
    usual = rms(winograd_reference(x, ops.winograd_weights_reference(weight, False)) - right)
    assert own < 0.6 * usual


@needs_library
@pytest.mark.parametrize(
    "lay", [
        lambda x: x.contiguous(),
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[:, : x.shape[1]],
        lambda x: x.repeat_interleave(2, 0)[::2],
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    ], ids=["contiguous", "channels_last", "half the channels", "every other row", "columns first"],
)  # fmt: skip
@pytest.mark.parametrize("shape", [(3, 16, 16, 5, 6), (3, 16, 16, 1, 1), (1, 16, 16, 4, 4)], ids=str)
def test_any_layout_of_images_and_weights(lay, shape):
    x, weight = case(shape)
    y = winograd_launch(x, winograd_weights(weight))
    last = weight.contiguous(memory_format=torch.channels_last)
    assert torch.equal(winograd_launch(lay(x), winograd_weights(last)), y)


@needs_library
@pytest.mark.parametrize("threads", [1, 3, 16, 64])
@pytest.mark.parametrize("shape", [(4, 16, 80, 8, 8), (1, 32, 48, 4, 4), (40, 16, 16, 8, 8)], ids=str)
def test_any_number_of_threads_gives_the_same_bits(threads, shape, monkeypatch, two_threads):
    """More threads than blocks of tiles share the output panels of a block. Two threads take what is cut for many."""
    x, weight = case(shape)
    u = winograd_weights(weight)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    y = winograd_launch(x, u)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert torch.equal(winograd_launch(x, u), y)


@needs_library
def test_both_widths_and_any_batch_give_the_same_bits():
    """A row's result does not depend on its neighbours, so that mining may regroup rows."""
    x, weight = case((33, 32, 48, 6, 10))
    u = winograd_weights(weight)
    y = winograd_launch(x, u)
    for width in WIDTHS:
        assert torch.equal(winograd_launch(x, u, width), y)
    rows = torch.tensor([32, 5, 17])
    assert torch.equal(winograd_launch(x[rows], u), y[rows])


@needs_library
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so_and_in_its_row(value, dtype, width):
    x, weight = case((3, 16, 16, 8, 8), dtype)
    x[1, 3, 2, 2] = value
    y = winograd_launch(x, winograd_weights(weight), width)
    assert not y[1, :, 1:4, 1:4].isfinite().any()
    assert y[[0, 2]].isfinite().all()


@needs_library
@pytest.mark.parametrize("width", WIDTHS)
def test_bf16_is_fp32_rounded_once(width):
    """Arithmetic is fp32 whatever the images are, so that bf16 is that result to nearest, ties to even (about 16)."""
    torch.manual_seed(0)  # which has a tie
    x = torch.randn(16, 16, 64, 64).bfloat16()
    u = winograd_weights(torch.randn(16, 16, 3, 3) / 12)
    y = winograd_launch(x.float(), u, width)
    assert ((y.view(torch.int32) & 0x1FFFF) == 0x8000).any()  # a tie that goes down
    assert torch.equal(winograd_launch(x, u, width), y.bfloat16())


@needs_library
@pytest.mark.parametrize("width", WIDTHS)
def test_nan_of_any_payload_stays_nan_in_bf16(width):
    """Rounded like a number, a NaN whose bits are all ones would become zero."""
    weight = torch.randn(16, 16, 3, 3)
    weight[0] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    y = winograd_launch(torch.randn(1, 16, 4, 4).bfloat16(), winograd_weights(weight), width)
    assert y[:, 0].isnan().all()


@needs_library
def test_large_numbers_do_not_become_infinite():
    weight = torch.zeros(16, 16, 3, 3)
    weight[range(16), range(16), 1, 1] = 1
    huge = torch.full((1, 16, 4, 4), 1e30).bfloat16()
    assert winograd_launch(huge, winograd_weights(weight)).isfinite().all()


@needs_library
@pytest.mark.parametrize(
    ("shape", "threads", "units"),
    [
        ((4, 16, 80, 8, 8), 1, 1),  # (n, c_in, c_out, h, w): 16 tiles, five panels
        ((4, 16, 80, 8, 8), 3, 3),  # one block, in groups of 2, 2 and 1 panels
        ((1, 16, 80, 4, 4), 4, 3),  # four groups would leave one without panels
        ((4, 16, 80, 8, 8), 16, 20),  # no more groups than panels: four blocks in five groups
        ((40, 16, 16, 8, 8), 1, 6),  # 160 tiles of 28
        ((40, 16, 16, 8, 8), 4, 8),  # as many blocks for each thread
        ((14, 352, 352, 8, 8), 1, 1),  # weights above a cache
    ],
    ids=str,
)
def test_how_work_is_cut(shape, threads, units, monkeypatch):
    counts = []

    def parallel_for(begin, end, grain, work, context):
        counts.append(end - begin)
        WORK(work)(begin, end, context)
        return 0

    n, c_in, c_out, h, w = shape
    x, u = torch.randn(n, c_in, h, w), winograd_weights(torch.randn(c_out, c_in, 3, 3))
    expected = winograd_launch(x, u)
    call = KIND(parallel_for)
    monkeypatch.setattr(ops, "_torch_parallel_for", lambda: call)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert torch.equal(winograd_launch(x, u), expected)
    assert counts == [units]


# ---------------------------------------------------------------- gradients
@pytest.mark.parametrize("library", [pytest.param(True, marks=needs_library), False], ids=["kernel", "reference"])
@pytest.mark.parametrize("name", ["whole tiles", "edges of 1 to 3 pixels", "an odd number of panels", "no rows"])
def test_gradients_are_those_of_a_convolution(name, library, monkeypatch):
    if not library:
        monkeypatch.setattr(ops, "status", lambda: (None, "switched off"))
    x, weight = (t.requires_grad_() for t in case(SHAPES[name]))
    u, u_back = winograd_weights(weight), winograd_weights(weight, back=True)
    y = raw.winograd(x, weight, u, u_back)
    g = torch.randn_like(y)
    ours = torch.autograd.grad(y, (x, weight), g)
    theirs = torch.autograd.grad(F.conv2d(x, weight, padding=1), (x, weight), g)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    (alone,) = torch.autograd.grad(raw.winograd(x, weight.detach(), u, u_back), x, g)
    assert torch.equal(alone, ours[0])


def test_whose_gradient_goes_which_way(monkeypatch):
    """To x by the op alone; to the weights by torch's convolution, in one precision with the images."""
    seen = []
    torchs = torch.ops.aten.convolution_backward

    def spy(grad, x, weight, *rest):
        seen.append((weight.dtype, rest[-1]))
        return torchs(grad, x, weight, *rest)

    monkeypatch.setattr(torch.ops.aten, "convolution_backward", spy)
    x, weight = case(SHAPES["whole tiles"], torch.bfloat16)
    u, u_back = winograd_weights(weight), winograd_weights(weight, back=True)
    for learns in (False, True):
        a, w = x.clone().requires_grad_(), weight.clone().requires_grad_(learns)
        raw.winograd(a, w, u, u_back).sum().backward()
    assert seen == [(torch.bfloat16, [False, True, False])]
    assert not winograd_weights(w).requires_grad


@pytest.mark.parametrize("wanted", ["x and weights", "x", "weights"])
def test_gradients_of_gradients(wanted):
    """As of a gradient penalty: through torch's own convolution, which can be differentiated again."""
    given = case(SHAPES["whole tiles"])
    found = []
    for convolve in (
        lambda x, w: raw.winograd(x, w, winograd_weights(w), winograd_weights(w, back=True)),
        lambda x, w: F.conv2d(x, w, padding=1),
    ):
        x, weight = (t.clone().requires_grad_(name in wanted) for t, name in zip(given, ("x", "weights"), strict=True))
        inputs = [t for t in (x, weight) if t.requires_grad]
        first = torch.autograd.grad((convolve(x, weight) ** 3).sum(), inputs, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


@pytest.mark.parametrize("differentiated_again", [False, True])
def test_gradients_in_bf16(differentiated_again):
    """Each in the dtype of what it belongs to, with torch's values."""
    x = torch.randn(2, 16, 8, 8).bfloat16().requires_grad_()
    weight = (torch.randn(32, 16, 3, 3) / 12).requires_grad_()
    y = raw.winograd(x, weight, winograd_weights(weight), winograd_weights(weight, back=True))
    g = torch.randn_like(y)
    ours = torch.autograd.grad(y, (x, weight), g, create_graph=differentiated_again)
    theirs = torch.autograd.grad(F.conv2d(x, weight.bfloat16(), padding=1), (x, weight), g)
    for a, b, t in zip(ours, theirs, (x, weight), strict=True):
        assert a.dtype == t.dtype
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 * b.abs().max().item())


@pytest.mark.parametrize("library", [pytest.param(True, marks=needs_library), False], ids=["kernel", "reference"])
def test_the_output_may_be_changed_in_place(library, monkeypatch):
    if not library:
        monkeypatch.setattr(ops, "status", lambda: (None, "switched off"))
    x, weight = case(SHAPES["whole tiles"])
    u, u_back = winograd_weights(weight), winograd_weights(weight, back=True)
    x.requires_grad_()
    y = raw.winograd(x, weight, u, u_back)
    y += 1
    (ours,) = torch.autograd.grad(torch.relu_(y).sum(), x)
    (theirs,) = torch.autograd.grad(torch.relu(F.conv2d(x, weight, padding=1) + 1).sum(), x)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("library", [pytest.param(True, marks=needs_library), False], ids=["kernel", "reference"])
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64, "meta"], ids=str)
def test_torchs_defaults_do_not_matter(default, library, monkeypatch):
    if not library:
        monkeypatch.setattr(ops, "status", lambda: (None, "switched off"))
    x, weight = case(SHAPES["edges of 1 to 3 pixels"])
    y = winograd_reference(x, winograd_weights(weight))
    before = torch.get_default_dtype()
    try:
        torch.set_default_device(default) if default == "meta" else torch.set_default_dtype(default)
        assert torch.allclose(raw.winograd(x, weight, winograd_weights(weight), y), y, atol=2e-5)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    x, weight = case(SHAPES["edges of 1 to 3 pixels"], dtype)
    u, u_back = winograd_weights(weight), winograd_weights(weight, back=True)
    for t in (x, x.contiguous(memory_format=torch.channels_last)):
        torch.library.opcheck(raw.winograd, (t.clone().requires_grad_(), weight, u, u_back))
        torch.library.opcheck(raw.winograd_backward, (t[:, :16].clone(), t, u_back[:, :, :256].contiguous()))


# ---------------------------------------------------------------- refused
@needs_library
def test_wrong_arguments_never_reach_the_kernel():
    x, weight = case(SHAPES["whole tiles"])
    u = winograd_weights(weight)
    for bad, message in (
        (x.double(), "x: got torch.float64"),
        (x.half(), "x: got torch.float16"),
        (x[0], r"x: got torch.float32 \(16, 8, 8\)"),
    ):
        with pytest.raises(TypeError, match=message):
            raw.winograd(bad, weight, u, u)
    with pytest.raises(ValueError, match=r"u: got .* for 8 channels"):
        raw.winograd(x[:, :8], weight, u, u)
    with pytest.raises(ValueError, match=r"u: got \(35, 2, 256\)"):
        raw.winograd(x, weight, u[:35], u)
    with pytest.raises(TypeError, match=r"x: got .* on meta"):
        winograd_launch(x.to("meta"), u)
    with pytest.raises(TypeError, match=r"u: got .* on meta"):
        winograd_launch(x, u.to("meta"))
    for bad in (u.double(), u[None], u.transpose(1, 2)):
        with pytest.raises(TypeError, match=r"u: got .* it must come from winograd_weights"):
            raw.winograd(x, weight, bad, u)
    for shape in ((16, 16, 5, 5), (8, 16, 3, 3), (16, 3, 3, 3), (16, 0, 3, 3), (16, 16, 3)):
        with pytest.raises(ValueError, match=r"weight: got .* multiples of 16"):
            winograd_weights(torch.zeros(shape))
    with pytest.raises(ValueError, match="weight: got one on meta"):
        winograd_weights(torch.zeros(16, 16, 3, 3, device="meta"))
    for out in (u[:, :1], u.double(), u.to("meta"), u.transpose(0, 1).contiguous().transpose(0, 1)):
        with pytest.raises(TypeError, match=r"out: got .* dense fp32 \(36, 2, 256\)"):
            winograd_weights(weight, out=out)


@pytest.mark.parametrize("library", [pytest.param(True, marks=needs_library), False], ids=["kernel", "reference"])
def test_transformed_weights_have_no_graph(library, monkeypatch):
    if not library:
        monkeypatch.setattr(ops, "status", lambda: (None, "switched off"))
    weight = torch.randn(16, 16, 3, 3).requires_grad_()
    assert not winograd_weights(weight).requires_grad
    assert not winograd_weights(weight, out=torch.empty(36, 1, 256)).requires_grad


@needs_library
def test_failures_inside_are_told(monkeypatch):
    x, weight = case(SHAPES["whole tiles"])
    u = winograd_weights(weight)
    call = KIND(lambda *_: 1)
    monkeypatch.setattr(ops, "_torch_parallel_for", lambda: call)
    with pytest.raises(RuntimeError, match="parallel_for failed"):
        winograd_launch(x, u)
    with pytest.raises(RuntimeError, match="parallel_for failed"):
        winograd_weights(weight)
    with pytest.raises(MemoryError, match="no memory for the tiles"):
        ops._raise_for(1)


@needs_library
def test_no_memory_is_told():
    """A tile of 2^42 channels has no memory anywhere; nothing of x, u or y is touched before that is known."""
    x, u = torch.randn(1, 16, 4, 4), torch.empty(36, 1, 256)
    shape = (ctypes.c_int64 * 5)(1, 4, 4, 2**42, 16)
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in (x, u, torch.empty(256)))
    code = ops.status()[0].ham_winograd_convolve(
        *pointers, shape, 0, ops.lanes(), ctypes.c_int64(1), ops._torch_parallel_for()
    )
    assert code == 1


raw = torch.ops.ham_kernels


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_other_dtypes(dtype):
    weight = torch.randn(32, 16, 3, 3).to(dtype)
    assert torch.equal(winograd_weights(weight), winograd_weights(weight.float()))


@pytest.fixture
def anew():
    """status as a new process would find it."""
    ops.status.cache_clear()
    yield
    ops.status.cache_clear()


def test_why_the_library_does_not_serve(anew, tmp_path, monkeypatch):
    monkeypatch.setattr(ops, "LIBRARY", tmp_path / "_cpu.so")
    assert "doctor" in ops.status()[1]
    (tmp_path / "_cpu.so").write_text("cut off")
    ops.status.cache_clear()
    assert "no library with a record of its build" in ops.status()[1]
    (tmp_path / cpu.BUILD_INFO).write_text('{"library_bytes": 7}')
    ops.status.cache_clear()
    assert ops.status() == (None, ops.status()[1])
    assert "_cpu.so does not load" in ops.status()[1]


@needs_library
def test_processors_and_torches_that_cannot_serve(anew, monkeypatch):
    monkeypatch.setattr(ops, "lanes", lambda: 0)
    assert "neither AVX-512 nor AVX2" in ops.status()[1]
    monkeypatch.undo()
    ops.status.cache_clear()
    monkeypatch.setattr(ops, "_torch_parallel_for", lambda: None)
    assert "offers no parallel_for" in ops.status()[1]
    assert cuda.library_problem(ops.LIBRARY.parent, ops.LIBRARY.name, cpu.BUILD_INFO) is None
