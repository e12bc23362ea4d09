"""3x3 convolution by Winograd's F(4x4, 3x3) on the CPU: a quarter of the multiplications of the direct sum.

y = A^T [(G w G^T) . (B^T d B)] A for every 4x4 tile y of the output and the 6x6 tile d of the input that it depends on
(Lavin & Gray, arXiv 1509.09308). The points are 0, +-11/16, +-3/2 and infinity: their rounding error in fp32 is half
that of the usual 0, +-1, +-2. The kernel is csrc/winograd.cpp; it is called through a C interface and brings no threads
of its own, but is handed torch's parallel_for.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ._library import NAMESPACE, register_for_cpu
from .native import cpu, cuda

LIBRARY = Path(__file__).resolve().parents[1] / cpu.LIBRARY
PANEL = 16  # channels of the output that lie together in transformed weights
DTYPES = (torch.float32, torch.bfloat16)

# ================================================================ reference
_POINTS = (0.0, 0.6875, -0.6875, 1.5, -1.5)


def _matrices(like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(A^T, G, B^T) of Toom and Cook from the points and infinity, in the dtype of `like`."""
    to_y, to_u, to_v = (torch.zeros(size, dtype=torch.float64, device="cpu") for size in ((4, 6), (6, 3), (6, 6)))
    for j, p in enumerate(_POINTS):
        others = [q for q in _POINTS if q != p]
        scale = 1.0
        for q in others:
            scale *= p - q
        to_y[:, j] = _cpu([p**i for i in range(4)])
        to_u[j] = _cpu([p**i / scale for i in range(3)])
        to_v[j, :5] = _product_of_roots(others)
    to_y[3, 5] = to_u[5, 2] = 1.0
    to_v[5] = _product_of_roots(_POINTS)
    return to_y.to(like), to_u.to(like), to_v.to(like)


def _product_of_roots(roots: Sequence[float]) -> Tensor:
    """Coefficients of prod (t - root), lowest power first."""
    coefficients = [1.0]
    for root in roots:
        shifted, scaled = [0.0, *coefficients], [-root * c for c in (*coefficients, 0.0)]
        coefficients = [a + b for a, b in zip(shifted, scaled, strict=True)]
    return _cpu(coefficients)


def _cpu(values: Sequence[float]) -> Tensor:
    """Whatever torch's default device and dtype are."""
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def winograd_weights_reference(weight: Tensor, back: bool) -> Tensor:
    w = weight.transpose(0, 1).flip(2, 3) if back else weight
    _, to_u, _ = _matrices(w.float())
    u = torch.einsum("ia,ocab,jb->ijoc", to_u, w.float(), to_u)
    return u.reshape(36, -1, PANEL, u.shape[3]).transpose(2, 3).flatten(2)


def winograd_reference(x: Tensor, u: Tensor) -> Tensor:
    """y (n, c_out, h, w) in channels_last order; tiles that reach over the edge see zeros and are cut off."""
    (n, c, h, w), c_out = x.shape, u.shape[1] * PANEL
    down, across = -(-h // 4), -(-w // 4)
    to_y, _, to_v = _matrices(x.new_empty(0, dtype=torch.float32))
    padded = F.pad(x.float(), (1, 4 * across - w + 1, 1, 4 * down - h + 1))
    tiles = padded.unfold(2, 6, 4).unfold(3, 6, 4)  # (n, c, down, across, 6, 6)
    v = torch.einsum("ia,nctsab,jb->ijntsc", to_v, tiles, to_v).reshape(36, n * down * across, c)
    m = torch.bmm(v, u.view(36, -1, c, PANEL).transpose(1, 2).reshape(36, c, c_out)).view(6, 6, n, down, across, c_out)
    y = torch.einsum("ai,ijntsc,bj->nctasb", to_y, m, to_y).reshape(n, c_out, 4 * down, 4 * across)
    return _result(x, u).copy_(y[:, :, :h, :w])


# ================================================================ kernel
@functools.cache
def _torch_parallel_for() -> Callable | None:
    """torch's parallel_for of its stable ABI, in the library that torch has loaded; None where it has none."""
    try:
        return ctypes.CDLL("libtorch_cpu.so", mode=os.RTLD_NOLOAD | os.RTLD_LAZY).torch_parallel_for
    except (OSError, AttributeError):
        return None


@functools.cache
def status() -> tuple[ctypes.CDLL | None, str]:
    """(the library, why or why not): None where it is not built, or this processor or torch cannot serve it."""
    if not LIBRARY.exists():
        return None, f"{LIBRARY.name} is not there: 'python -m ham_kernels doctor' shows what the build said"
    problem = cuda.library_problem(LIBRARY.parent, LIBRARY.name, cpu.BUILD_INFO)
    if problem is not None:
        return None, f"{LIBRARY.name} is not loaded: {problem}"
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        return None, f"{LIBRARY.name} does not load: {error}"
    if lanes() == 0:
        return None, "this processor has neither AVX-512 nor AVX2 with FMA"
    if _torch_parallel_for() is None:
        return None, f"torch {torch.__version__} offers no parallel_for; it comes with torch 2.10"
    return library, f"{LIBRARY.name} loaded, vectors of {32 * lanes()} bits"


@functools.cache
def lanes() -> int:
    """Floats of the widest vectors that this processor serves: 16, 8, or 0."""
    return ctypes.CDLL(str(LIBRARY)).ham_winograd_lanes()


def winograd_weights_launch(weight: Tensor, back: bool, u: Tensor, width: int | None = None) -> Tensor:
    weight = weight.float()
    c_out, c_in = weight.shape[:2]
    strides = (ctypes.c_int64 * 4)(*weight.stride())
    code = status()[0].ham_winograd_weights(
        ctypes.c_void_p(weight.data_ptr()), strides, ctypes.c_int64(c_out), ctypes.c_int64(c_in), int(back),
        ctypes.c_void_p(u.data_ptr()), width or lanes(), _torch_parallel_for(),
    )  # fmt: skip
    _raise_for(code)
    return u


def winograd_launch(x: Tensor, u: Tensor, width: int | None = None) -> Tensor:
    _check_arguments(x, u)
    x = x.contiguous(memory_format=torch.channels_last)
    n, c_in, h, w = x.shape
    y = _result(x, u)
    if y.numel():
        shape = (ctypes.c_int64 * 5)(n, h, w, c_in, y.shape[1])
        code = status()[0].ham_winograd_convolve(
            ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(u.data_ptr()), ctypes.c_void_p(y.data_ptr()), shape,
            int(x.dtype == torch.bfloat16), width or lanes(), ctypes.c_int64(torch.get_num_threads()),
            _torch_parallel_for(),
        )  # fmt: skip
        _raise_for(code)
    return y


def _check_arguments(x: Tensor, u: Tensor) -> None:
    if x.dtype not in DTYPES or x.device.type != "cpu" or x.dim() != 4:
        what = f"{x.dtype} {tuple(x.shape)} on {x.device}"
        raise TypeError(f"x: got {what}; it must be fp32 or bf16 (n, c, h, w) on the CPU")
    if u.dtype != torch.float32 or u.device.type != "cpu" or u.dim() != 3 or not u.is_contiguous():
        raise TypeError(f"u: got {u.dtype} {tuple(u.shape)} on {u.device}; it must come from winograd_weights")
    if u.shape[0] != 36 or u.shape[2] != x.shape[1] * PANEL:
        wanted = f"(36, c_out / 16, {x.shape[1] * PANEL})"
        raise ValueError(f"u: got {tuple(u.shape)} for {x.shape[1]} channels; it must be {wanted}")


def _result(x: Tensor, u: Tensor) -> Tensor:
    """Not a permuted view: autograd lets nobody add to a view that an op returns."""
    (n, _, h, w), c = x.shape, u.shape[1] * PANEL
    return x.new_empty_strided((n, c, h, w), (h * w * c, 1, w * c, c))


def _raise_for(code: int) -> None:
    if code == 1:
        raise MemoryError("ham_kernels: no memory for the tiles of a Winograd convolution")
    if code:
        raise RuntimeError("ham_kernels: torch's parallel_for failed in a Winograd convolution")


def winograd_weights(weight: Tensor, *, back: bool = False, out: Tensor | None = None) -> Tensor:
    """Weights (c_out, c_in, 3, 3) as `winograd` takes them: u (36, c_out / 16, c_in * 16), fp32.

    back: of the convolution that takes gradients from the output to the input, (36, c_in / 16, c_out * 16).
    out: written to and returned. (Three dimensions, since compilers put those of four in channels_last order.)
    Raises: ValueError, TypeError naming the argument: channels are multiples of 16, all is on the CPU.
    """
    if weight.dim() != 4 or weight.shape[2:] != (3, 3) or any(c % PANEL or not c for c in weight.shape[:2]):
        raise ValueError(f"weight: got {tuple(weight.shape)}; it must be (c_out, c_in, 3, 3), channels multiples of 16")
    if weight.device.type != "cpu":
        raise ValueError(f"weight: got one on {weight.device}; it must be on the CPU")
    weight = weight.detach()
    outer, inner = weight.shape[:2][:: -1 if back else 1]
    shape = (36, outer // PANEL, inner * PANEL)
    u = torch.empty(shape, dtype=torch.float32, device="cpu") if out is None else out
    if u.shape != shape or u.dtype != torch.float32 or u.device.type != "cpu" or not u.is_contiguous():
        raise TypeError(f"out: got {u.dtype} {tuple(u.shape)} on {u.device}; it must be dense fp32 {shape} on the CPU")
    if status()[0] is None:
        return u.copy_(winograd_weights_reference(weight, back))
    return winograd_weights_launch(weight, back, u)


# ================================================================ registration
def _either(x: Tensor, u: Tensor) -> Tensor:
    return winograd_reference(x, u) if status()[0] is None else winograd_launch(x, u)


register_for_cpu(
    "winograd",
    "(Tensor x, Tensor weight, Tensor u, Tensor u_back) -> Tensor",
    implementation=lambda x, weight, u, u_back: _either(x, u),
    fake=lambda x, weight, u, u_back: _result(x, u),
)
# x is not looked at. Compilers keep what a backward asks for: with x they compute the mask of a ReLU before the
# convolution from it, where they would otherwise write and read the mask, in slow loops.
register_for_cpu(
    "winograd_backward",
    "(Tensor grad, Tensor x, Tensor u_back) -> Tensor",
    implementation=lambda grad, x, u_back: _either(grad, u_back),
    fake=lambda grad, x, u_back: _result(grad, u_back),
)


def _keep(ctx, inputs, output):
    x, weight, _, u_back = inputs
    ctx.save_for_backward(x, weight, u_back)


def _backward(ctx, grad: Tensor):
    """Gradients go to the input as the output came from it; those of the weights are torch's.

    So are both where they are to be differentiated again.
    """
    x, weight, u_back = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:2])
    to_x = to_weight = None
    if wanted[0] and not torch.is_grad_enabled():
        to_x = torch.ops.ham_kernels.winograd_backward(grad, x, u_back)
        wanted[0] = False
    if any(wanted):
        ones, zeros = [1, 1], [0, 0]
        theirs = torch.ops.aten.convolution_backward(
            grad, x, weight.to(x.dtype), None, ones, ones, ones, False, zeros, 1, [*wanted, False]
        )
        to_x = theirs[0] if wanted[0] else to_x
        to_weight = theirs[1].to(weight.dtype) if wanted[1] else None
    return to_x, to_weight, None, None


torch.library.register_autograd(f"{NAMESPACE}::winograd", _backward, setup_context=_keep)
