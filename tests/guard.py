"""Bounds checks for Triton's interpreter: loads and stores must hit a tensor that the kernel was given."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import torch
from triton.runtime import interpreter


@contextmanager
def guard_interpreter():
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store = builder.create_masked_load, builder.create_masked_store
    to_host = executor._init_args_hst
    spans = np.zeros((0, 2), np.uint64)  # [first byte, end) of each tensor of the launch under way

    def remember(self, args_dev, kwargs):
        nonlocal spans
        args, named = to_host(self, args_dev, kwargs)
        tensors = [t for t in (*args, *named.values()) if isinstance(t, torch.Tensor) and t.numel()]
        spans = np.array([_span(t) for t in tensors], np.uint64).reshape(-1, 2)
        return args, named

    def check(pointers, mask, what):
        start = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].reshape(-1, 1)
        end = start + np.uint64(max(1, pointers.get_element_ty().primitive_bitwidth // 8))
        inside = ((start >= spans[:, 0]) & (end <= spans[:, 1])).any(axis=1)
        if not inside.all():
            raise IndexError(f"{what} of {int((~inside).sum())} elements outside the tensors of the kernel")

    def guarded_load(self, ptrs, mask, *rest, **named):
        check(ptrs, mask, "load")
        return load(self, ptrs, mask, *rest, **named)

    def guarded_store(self, ptrs, value, mask, *rest, **named):
        check(ptrs, mask, "store")
        return store(self, ptrs, value, mask, *rest, **named)

    executor._init_args_hst = remember
    builder.create_masked_load, builder.create_masked_store = guarded_load, guarded_store
    try:
        yield
    finally:
        executor._init_args_hst = to_host
        builder.create_masked_load, builder.create_masked_store = load, store


def _span(t: torch.Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()
