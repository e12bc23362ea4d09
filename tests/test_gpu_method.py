"""What only a GPU can show of the method: one host read per step, CPU and CUDA alike, streams, no silent wait."""

from __future__ import annotations

import copy

import pytest
import torch
from nets import sgd, small_cnn

import ham_kernels as ham

pytestmark = [pytest.mark.slow, pytest.mark.gpu]

SETTINGS = {"eps": 0.2, "step_size": 0.05, "steps": 5, "screen_steps": 2, "start_epoch": 2}


@pytest.fixture
def batch():
    return torch.rand(64, 1, 8, 8).cuda(), torch.randint(0, 10, (64,)).cuda()


def trainer_on(device: str, **choices) -> ham.HAMTrainer:
    model = small_cnn(width=16).to(device)
    return ham.HAMTrainer(model, sgd(model), **SETTINGS | choices)


@pytest.fixture
def exact_convolutions():
    before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = False, True
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = before


CLIPPED = {"grad_clip": 0.01, "loss_weights": [0.5] * 10}


@pytest.mark.parametrize("optimizer", [None, torch.optim.AdamW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("choices", [{}, {"freeze_bn": True, "ema_decay": 0.9}, {"rows": "random"}, CLIPPED], ids=str)
@pytest.mark.parametrize("epoch", [1, 2])
def test_no_hidden_sync_in_a_step(batch, epoch, choices, optimizer):
    """The reads of count and loss wait on events; everything else that would stop the host is an error here."""
    trainer = trainer_on("cuda", **choices)
    if optimizer is not None:
        trainer.optimizer = optimizer(trainer.model.parameters(), 1e-3)
    for _ in range(2):  # compiled kernels and allocated memory first
        trainer.train_step(*batch, epoch=epoch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.train_step(*batch, epoch=epoch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_step_on_cuda_is_the_step_on_the_cpu(batch, exact_convolutions):
    """Same noise, so the same start; sums in another order may turn single signs, hence the tolerance."""
    here, there = trainer_on("cpu"), trainer_on("cuda")
    for epoch in (1, 2):
        a = here.train_step(batch[0].cpu(), batch[1].cpu(), epoch=epoch)
        b = there.train_step(*batch, epoch=epoch)
        assert abs(a.n_hard - b.n_hard) <= 1
        assert a.loss == pytest.approx(b.loss, rel=1e-2)


def test_repeatable(batch, exact_convolutions):
    runs = []
    for _ in range(3):
        trainer = trainer_on("cuda")
        runs.append([trainer.train_step(*batch, epoch=2).loss for _ in range(3)])
    assert runs[0] == runs[1] == runs[2]


def test_side_stream(batch, exact_convolutions):
    trainer = trainer_on("cuda")
    twin = copy.deepcopy(trainer)
    expected = trainer.train_step(*batch, epoch=2).loss
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert twin.train_step(*batch, epoch=2).loss == expected


def test_seconds_are_those_of_the_device(batch):
    assert 0 < trainer_on("cuda").train_step(*batch, epoch=2).seconds < 60
