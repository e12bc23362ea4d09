"""Runs the example $EXAMPLE with the arguments given, and leaves the gradients of its updates in $GRADIENTS."""

from __future__ import annotations

import os
import runpy

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

noted = []


def note(optimizer: torch.optim.Optimizer, args: tuple, how: dict) -> None:
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
    # those of FSDP are shards of each process, and all of them are asked here
    noted.append([getattr(g, "full_tensor", lambda g=g: g)().clone() for g in gradients])


register_optimizer_step_post_hook(note)
runpy.run_path(os.environ["EXAMPLE"], run_name="__main__")
if int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0))) == 0:
    torch.save(noted, os.environ["GRADIENTS"])
