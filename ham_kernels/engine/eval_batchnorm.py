"""BatchNorm in eval mode as an attack needs it on the CPU: one pass forward, one pass back, nothing else.

torch's CPU backward sums over the batch for the gradients of weight and bias even where nobody asks for them, as in an
attack. The results here are torch's bit for bit
where the processor has fused multiply-add.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# Elements per thread up to which torch's own layer is as fast: threads share its passes, not the Python call here.
SMALL = 65536
_KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class _Affine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, inverse_std: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        ctx.save_for_backward(weight, inverse_std)
        return torch.addcmul(shift, x, scale)

    @staticmethod
    def backward(ctx, grad: Tensor):
        weight, inverse_std = ctx.saved_tensors
        return (grad * inverse_std).mul_(weight), None, None, None, None  # in torch's order of rounding


@contextmanager
def fast_eval_batchnorm(model: nn.Module) -> Iterator[None]:
    """Inside, BatchNorm layers of a model in eval mode on the CPU run as above; afterwards they are as they were.

    Left alone: layers without running statistics, subclasses, layers with a forward of their own, sharded weights,
    compiled models.
    """
    layers = [] if _is_compiled(model) else [m for m in model.modules() if _can_serve(m)]
    try:
        for m in layers:
            m.forward = _forward_of(m)
        yield
    finally:
        for m in layers:
            m.__dict__.pop("forward", None)


def _can_serve(m: nn.Module) -> bool:
    return (
        type(m) in _KINDS
        and not hasattr(m.weight, "placements")  # a DTensor
        and "forward" not in m.__dict__
        and m.running_mean is not None
        and m.running_mean.device.type == "cpu"
        and m.running_mean.dtype == torch.float32
    )


def _is_compiled(model: nn.Module) -> bool:
    return any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules())


def _forward_of(m: nn.Module) -> Callable[[Tensor], Tensor]:
    with torch.no_grad():
        # torch's forward takes the root in fp32, its backward in fp64
        inverse_std = torch.rsqrt(m.running_var.double() + m.eps).float()
        weight = torch.ones_like(inverse_std) if m.weight is None else m.weight.detach()
        bias = torch.zeros_like(inverse_std) if m.bias is None else m.bias.detach()
        scale = weight * torch.rsqrt(m.running_var + m.eps)
        shift = torch.addcmul(bias, m.running_mean, scale, value=-1)
    own, small = type(m).forward, SMALL * torch.get_num_threads()

    def forward(x: Tensor) -> Tensor:
        if x.numel() <= small or x.dtype != scale.dtype or m.training:
            return own(m, x)
        m._check_input_dim(x)
        column = (-1,) + (1,) * (x.dim() - 2)
        return _Affine.apply(x, *(t.view(column) for t in (weight, inverse_std, scale, shift)))

    return forward
