"""BatchNorm over the rows of all processes, within the forward of an update.

A GPU has torch's SyncBatchNorm; on the CPU, which that refuses, the same is computed here, for the tests. Processes may
have different numbers of rows, or none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm as _OnGPU
from torch.nn.modules.batchnorm import _BatchNorm

from .ranks import Ranks


@contextmanager
def synced_batchnorm(model: nn.Module, ranks: Ranks) -> Iterator[None]:
    """Layers in train mode take mean and variance over all processes; their running statistics stay alike on each."""
    layers = [] if not ranks.several else [m for m in model.modules() if _is_local(m)]
    for m in layers:
        m.forward = _Synced(m, ranks)
    try:
        yield
    finally:
        for m in layers:
            del m.forward


def _is_local(m: nn.Module) -> bool:
    uses_batch = m.training or getattr(m, "running_mean", 0) is None
    return isinstance(m, _BatchNorm) and not isinstance(m, nn.SyncBatchNorm) and uses_batch


class _Synced:
    """The forward of one layer."""

    def __init__(self, layer: _BatchNorm, ranks: Ranks):
        self.layer, self.ranks = layer, ranks

    def __call__(self, x: Tensor) -> Tensor:
        layer, ranks = self.layer, self.ranks
        layer._check_input_dim(x)
        momentum = layer.momentum or 0.0
        tracks = layer.training and layer.track_running_stats
        if tracks:
            layer.num_batches_tracked.add_(1)
            if layer.momentum is None:  # a plain average over the batches
                momentum = 1.0 / float(layer.num_batches_tracked)
        mean, var = (layer.running_mean, layer.running_var) if tracks else (None, None)
        if x.is_cuda:
            x = x.contiguous(memory_format=torch.channels_last) if _is_nhwc(x) else x.contiguous()
            if not x.numel():  # torch sends sums of no rows in their own dtype, and those of others in fp32
                x = x.to(torch.promote_types(x.dtype, torch.float32))
            return _OnGPU.apply(x, layer.weight, layer.bias, mean, var, layer.eps, momentum, ranks.group, ranks.world)
        y, batch_mean, batch_var, n = _Normalised.apply(x, layer.eps, ranks)
        if tracks:
            with torch.no_grad():
                mean.lerp_(batch_mean.to(mean.dtype), momentum)
                var.lerp_((batch_var * (n / (n - 1).clamp_min(1))).to(var.dtype), momentum)
        shape = (1, -1, *[1] * (x.dim() - 2))
        if layer.weight is not None:
            y = y * layer.weight.view(shape)
        return (y if layer.bias is None else y + layer.bias.view(shape)).to(x.dtype)


def _is_nhwc(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


class _Normalised(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) over rows and positions of all processes, in fp32 or fp64; mean and var in fp64."""

    @staticmethod
    def forward(ctx, x: Tensor, eps: float, ranks: Ranks):
        axes, shape = [0, *range(2, x.dim())], (1, -1, *[1] * (x.dim() - 2))
        wide = x.double()
        n = x.numel() // x.shape[1]
        sums = ranks.sum_(torch.cat([wide.sum(axes), wide.new_full((1,), float(n))]))
        n_all = sums[-1]
        mean = sums[:-1] / n_all
        var = ranks.sum_((wide - mean.view(shape)).square().sum(axes)) / n_all
        inverse = (var + eps).rsqrt()
        y = ((wide - mean.view(shape)) * inverse.view(shape)).to(torch.promote_types(x.dtype, torch.float32))
        ctx.save_for_backward(y, inverse, n_all)
        ctx.ranks, ctx.shape, ctx.axes, ctx.dtype = ranks, shape, axes, x.dtype
        ctx.mark_non_differentiable(mean, var, n_all)
        return y, mean, var, n_all

    @staticmethod
    def backward(ctx, gradient: Tensor, *_):
        y, inverse, n_all = ctx.saved_tensors
        g, wide = gradient.double(), y.double()
        both = torch.stack([g.sum(ctx.axes), (g * wide).sum(ctx.axes)])
        g_mean, gy_mean = ctx.ranks.sum_(both) / n_all
        own = (g - g_mean.view(ctx.shape) - wide * gy_mean.view(ctx.shape)) * inverse.view(ctx.shape)
        return own.to(ctx.dtype), None, None
