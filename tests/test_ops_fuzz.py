"""A few hundred random calls of all ops; `python tests/fuzz_ops.py` makes 20,000."""

from __future__ import annotations

import fuzz_ops
import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, which interprets, on sums that overflow


@pytest.mark.slow
def test_random_calls(seed, device):
    kinds, wrong = fuzz_ops.run(300, seed, device.type, kernels_every=6)
    assert not wrong, f"--seed {seed}\n" + "\n".join(wrong)
    assert set(kinds) == {call.__name__ for call in fuzz_ops.CALLS}


def test_wrong_results_and_missing_refusals_are_found(seed, monkeypatch):
    """The fuzz itself: half a step, and an op that refuses nothing, do not pass."""

    def half_a_step(x_adv, x, grad, eps, step_size, **rest):
        torch.ops.ham_kernels.pgd_step_(x_adv, x, grad, *[None] * 2, 0.1, 0.01, None, None, 0.0, 1.0, False)

    monkeypatch.setattr(fuzz_ops.ops, "pgd_step", half_a_step)
    monkeypatch.setattr(fuzz_ops, "CALLS", (fuzz_ops.pgd_call,))
    assert len(fuzz_ops.run(40, seed, kernels_every=1000)[1]) > 10
    monkeypatch.setattr(fuzz_ops.ops, "jump", lambda x_adv, **rest: x_adv)
    monkeypatch.setattr(fuzz_ops, "CALLS", (fuzz_ops.refused_call,))
    assert any("jump" in line and "was not refused" in line for line in fuzz_ops.run(200, seed)[1])
