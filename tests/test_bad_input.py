"""Bad input: an error that names the argument, the value and what is allowed, and nothing half-done."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from nets import Broken, sgd, small_cnn

import ham_kernels as ham

X, Y = torch.rand(8, 1, 8, 8), torch.arange(8)
NAN = X.clone()
NAN[3, 0, 0, 0] = math.nan

CALLS = {
    "pgd_attack": lambda model, x, y: ham.pgd_attack(model, x, y, steps=2),
    "ham_loss": lambda model, x, y: ham.ham_loss(model, x, y, steps=2, screen_steps=1),
    "train_step": lambda model, x, y: ham.HAMTrainer(model, sgd(model), steps=2, screen_steps=1).train_step(x, y, 60),
    "fit": lambda model, x, y: ham.HAMTrainer(model, sgd(model), start_epoch=1).fit([(x, y)], 1),
    "evaluate": lambda model, x, y: ham.evaluate(model, [(x, y)]),
}

BATCHES = {
    "images are no tensor": (X.numpy(), Y, TypeError, r"x: got ndarray; it must be a torch.Tensor"),
    "images uint8": ((X * 255).byte(), Y, TypeError, r"x: got torch.uint8; .*divide by 255"),
    "images float64": (X.double(), Y, TypeError, r"x: got torch.float64; images must be float32"),
    "one dimension": (X.flatten(), Y, ValueError, r"x: got shape \(512,\)"),
    "empty batch": (X[:0], Y[:0], ValueError, r"x: got shape \(0, 1, 8, 8\); an empty batch"),
    "above 1": (X * 255, Y, ValueError, r"x: pixels run from .* must be in \[0, 1\]"),
    "below 0": (X - 0.5, Y, ValueError, r"x: pixels run from -0"),
    "NaN": (NAN, Y, ValueError, r"x: holds NaN"),
    "infinite": (X / 0, Y, ValueError, r"x: "),
    "labels float": (X, Y.float(), TypeError, r"y: got torch.float32; labels must be int64"),
    "labels one-hot": (X, torch.eye(8, dtype=torch.int64), ValueError, r"y: got shape \(8, 8\); it must be \(8,\)"),
    "soft labels": (X, torch.eye(8) * 0.9 + 0.0125, TypeError, r"y: got soft labels, torch.float32 \(8, 8\), as mixup"),
    "too few labels": (X, Y[:7], ValueError, r"y: got shape \(7,\)"),
    "label too high": (X, Y + 3, ValueError, r"y: labels run from 3 to 10; the model knows classes 0..9"),
    "label negative": (X, Y - 1, ValueError, r"y: labels run from -1 to 6"),
    "labels elsewhere": (X, Y.to("meta"), ValueError, r"y: is on device meta"),
    "images elsewhere": (X.to("meta"), Y, ValueError, r"x: is on device meta"),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("case", BATCHES)
def test_bad_batch(call, case):
    x, y, error, message = BATCHES[case]
    model = small_cnn()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        CALLS[call](model, x, y)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        (lambda z: (z, z), TypeError, r"model: returned tuple; it must return one tensor of logits"),
        (lambda z: z[:-1], ValueError, r"model: returned shape \(7, 10\) for 8 images"),
        (lambda z: z[:, 0], ValueError, r"model: returned shape \(8,\)"),
        (lambda z: z[:, :1], ValueError, r"classes >= 2"),
        (lambda z: z.double(), TypeError, r"model: returned torch.float64"),
        (lambda z: z * math.nan, ham.NonFiniteError, r"model: returned NaN or infinite logits"),
    ],
    ids=["tuple", "fewer rows", "one dimension", "one class", "float64", "NaN"],
)
def test_bad_model(call, how, error, message):
    inner = small_cnn()
    model = Broken(inner, how)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        CALLS[call](model, X, Y)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


SETTINGS = [
    ({"eps": -0.1}, ValueError, r"eps: got -0.1; it must be finite and >= 0"),
    ({"eps": math.nan}, ValueError, r"eps: got nan"),
    ({"eps": "8/255"}, TypeError, r"eps: got '8/255' \(str\); it must be a number"),
    ({"step_size": -1}, ValueError, r"step_size: got -1"),
    ({"step_size": math.inf}, ValueError, r"step_size: got inf"),
    ({"steps": 0}, ValueError, r"steps: got 0; it must be >= 1"),
    ({"steps": 2.5}, TypeError, r"steps: got 2.5 \(float\); it must be an integer"),
    ({"steps": 3, "screen_steps": 3}, ValueError, r"screen_steps: got 3 with steps=3; it must be less than steps"),
    ({"screen_steps": 0}, ValueError, r"screen_steps: got 0; it must be >= 1"),
    ({"screen_steps": True}, TypeError, r"screen_steps: got True"),
    ({"lam": -1.0}, ValueError, r"lam: got -1.0"),
    ({"norm": "l1"}, ValueError, r"norm: got 'l1'; allowed are 'linf', 'l2'"),
    ({"reweight": 1}, TypeError, r"reweight: got 1 \(int\); it must be True or False"),
    ({"early_drop": None}, TypeError, r"early_drop: got None"),
]

TRAINER_SETTINGS = [
    *SETTINGS,
    ({"start_epoch": 0}, ValueError, r"start_epoch: got 0; it must be >= 1"),
    ({"freeze_bn": "yes"}, TypeError, r"freeze_bn: got 'yes'"),
    ({"ema_decay": 1.0}, ValueError, r"ema_decay: got 1.0; it must be below 1"),
    ({"ema_decay": 1.5}, ValueError, r"ema_decay: got 1.5; it must be finite and in \[0.0, 1.0\]"),
    ({"precision": "fp8"}, ValueError, r"precision: got 'fp8'; allowed are 'fp32', 'bf16'"),
    ({"seed": -1}, ValueError, r"seed: got -1"),
    ({"rows": "easy"}, ValueError, r"rows: got 'easy'; allowed are 'hard', 'random'"),
    ({"eps": torch.full((8,), 0.1)}, TypeError, r"eps: got .*it must be a number"),
]


@pytest.mark.parametrize(("choices", "error", "message"), TRAINER_SETTINGS, ids=lambda v: str(v)[:30])
def test_bad_trainer_settings(choices, error, message):
    model = small_cnn()
    with pytest.raises(error, match=message):
        ham.HAMTrainer(model, sgd(model), **choices)


@pytest.mark.parametrize(("choices", "error", "message"), SETTINGS, ids=lambda v: str(v)[:30])
def test_bad_ham_loss_settings(choices, error, message):
    with pytest.raises(error, match=message):
        ham.ham_loss(small_cnn(), X, Y, **choices)


@pytest.mark.parametrize(
    ("choices", "error", "message"),
    [
        ({"eps": -0.1}, ValueError, r"eps: got -0.1"),
        ({"eps": torch.full((7,), 0.1)}, ValueError, r"eps: got a tensor of shape \(7,\); .* shape \(8,\)"),
        ({"eps": torch.full((8,), -0.1)}, ValueError, r"eps: got values from -0.1"),
        ({"step_size": torch.ones(8, dtype=torch.int64)}, TypeError, r"step_size: got a tensor of torch.int64"),
        ({"step_size": torch.full((8,), math.nan)}, ValueError, r"step_size: "),
        ({"steps": -1}, ValueError, r"steps: got -1; it must be >= 0"),
        ({"norm": "linfty"}, ValueError, r"norm: got 'linfty'"),
        ({"random_start": 1}, TypeError, r"random_start: got 1"),
        ({"precision": "fp64"}, ValueError, r"precision: got 'fp64'"),
        ({"generator": 1}, TypeError, r"generator: got int; it must be a torch.Generator"),
    ],
    ids=lambda v: str(v)[:30],
)
def test_bad_attack_settings(choices, error, message):
    with pytest.raises(error, match=message):
        ham.pgd_attack(small_cnn(), X, Y, **choices)


def test_model_and_optimizer_of_the_wrong_kind():
    model = small_cnn()
    with pytest.raises(TypeError, match=r"method: got 'fair'; it must be a method, such as"):
        ham.Trainer(model, sgd(model), "fair")
    around = lambda x: model(x)  # noqa: E731
    for call in (
        lambda: ham.pgd_attack(around, X, Y, eps=0.1, step_size=0.02, steps=2),
        lambda: ham.ham_loss(around, X, Y, eps=0.1, step_size=0.02, steps=2, screen_steps=1),
        lambda: ham.evaluate(around, [(X, Y)], ("clean",)),
    ):
        with pytest.raises(TypeError, match=r"model: got function; it must be a torch.nn.Module"):
            call()
    with pytest.raises(TypeError, match=r"model: got function; it must be a torch.nn.Module"):
        ham.HAMTrainer(lambda x: x, sgd(model))
    with pytest.raises(TypeError, match=r"optimizer: got generator"):
        ham.HAMTrainer(model, model.parameters())
    with pytest.raises(ValueError, match=r"optimizer: holds none of the model's parameters"):
        ham.HAMTrainer(model, sgd(small_cnn()))


def trainer(**choices):
    model = small_cnn()
    return ham.HAMTrainer(model, sgd(model), **{"steps": 2, "screen_steps": 1, "start_epoch": 1} | choices)


@pytest.mark.parametrize(
    ("loader", "epochs", "error", "message"),
    [
        ([], 1, ValueError, r"train_loader: gave no batch in epoch 1"),
        (iter([(X, Y)]), 2, ValueError, r"train_loader: gave no batch in epoch 2.*generator is spent"),
        ([X], 1, TypeError, r"epoch 1, batch 1: train_loader: gave a Tensor; each batch must be a pair"),
        ([(X, Y), (X, Y + 9)], 1, ValueError, r"epoch 1, batch 2: y: labels run from 9 to 16"),
        ([(X, Y)], 0, ValueError, r"epochs: got 0; it must be >= 1"),
        ([(X, Y)], 1.5, TypeError, r"epochs: got 1.5"),
    ],
    ids=["empty", "spent generator", "no pair", "bad batch", "no epochs", "half epoch"],
)
def test_bad_fit(loader, epochs, error, message):
    with pytest.raises(error, match=message):
        trainer().fit(loader, epochs)


@pytest.mark.parametrize(
    ("val_loader", "val_attacks", "choices", "message"),
    [
        ([(X, Y)], ("clean", "foo"), {}, "attacks: got 'foo'"),
        (iter([(X, Y)]), ("clean",), {"ema_decay": 0.9}, "val_loader: is an iterator, which is spent after one of 2"),
    ],
    ids=["no such attack", "spent"],
)
def test_bad_validation_is_told_before_anything_is_trained(val_loader, val_attacks, choices, message):
    t = trainer(**choices)
    before = [p.detach().clone() for p in t.model.parameters()]
    with pytest.raises(ValueError, match=message):
        t.fit([(X, Y)], 1, val_loader, val_attacks=val_attacks)
    assert t.position == (1, 0)
    assert all(torch.equal(p, q) for p, q in zip(t.model.parameters(), before, strict=True))


def test_eps_in_units_of_255_is_asked_about():
    with pytest.warns(UserWarning, match="eps: got 8, but images are in"):
        ham.pgd_attack(small_cnn(), X, Y, eps=8, step_size=2, steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ham.pgd_attack(small_cnn(), X, Y, eps=1.0, step_size=0.1, steps=1)
        ham.pgd_attack(small_cnn(), X, Y, eps=2.0, step_size=0.1, steps=1, norm="l2")


def test_start_epoch_beyond_epochs():
    message = r"start_epoch: is 9, beyond epochs=3, so ham would never start"
    with pytest.raises(ValueError, match=message):
        trainer(start_epoch=9).fit([(X, Y)], 3)
    plain = trainer(start_epoch=9, early_drop=False, reweight=False)  # PGD-AT has no start
    assert len(plain.fit([(X, Y)], 1)) == 1


def test_epoch_of_a_step():
    with pytest.raises(ValueError, match=r"epoch: got 0; it must be >= 1"):
        trainer().train_step(X, Y, epoch=0)


@pytest.mark.parametrize(
    ("choices", "error", "message"),
    [
        ({"attacks": ()}, ValueError, r"attacks: got none"),
        ({"attacks": ("pgd",)}, ValueError, r"attacks: got 'pgd'; allowed are 'clean' and 'pgdK'"),
        ({"attacks": ("cleen",)}, ValueError, r"attacks: got 'cleen'"),
        ({"eps": -1}, ValueError, r"eps: got -1"),
        ({"norm": "l3"}, ValueError, r"norm: got 'l3'"),
        ({"loader": []}, ValueError, r"loader: gave no batch"),
    ],
    ids=lambda v: str(v)[:25],
)
def test_bad_evaluate(choices, error, message):
    with pytest.raises(error, match=message):
        ham.evaluate(small_cnn(), **{"loader": [(X, Y)]} | choices)


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["above 1", "NaN", "label too high", "label negative"])
@pytest.mark.parametrize("call", CALLS)
def test_bad_data_on_cuda_is_judged_before_the_update(call, case):
    x, y, error, message = BATCHES[case]
    model = small_cnn().cuda()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        CALLS[call](model, x.cuda(), y.cuda())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


@pytest.mark.gpu
def test_batch_on_another_device_than_the_model():
    model = small_cnn().cuda()
    with pytest.raises(ValueError, match=r"x: is on device cpu; it must be on the model's, cuda:0"):
        ham.HAMTrainer(model, sgd(model)).train_step(X, Y, epoch=1)
