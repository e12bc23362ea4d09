"""Models by name: sizes, normalisation, and that attacks and training steps run through each kind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ham_kernels as ham
from ham_kernels import models

# convolutions, BatchNorms and head counted by hand from the published architectures; the papers say 11.2, 46.2, 36.5 M
PARAMETERS = {"preact_resnet18": 11_172_170, "wrn_34_10": 46_160_474, "wrn_28_10": 36_479_194, "vit_b_16": 85_806_346}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    with torch.device("meta"):
        model = models.create(name, 10)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def preact_parameters(stem: int, widths: list[int], blocks: int, classes: int) -> int:
    """3x3 convolutions without bias, two BatchNorms per block, 1x1 shortcuts where the width changes, head."""
    total, c_in = 3 * stem * 9, stem
    for width in widths:
        for _ in range(blocks):
            total += 2 * c_in + 9 * c_in * width + 2 * width + 9 * width * width
            total += c_in * width if c_in != width else 0
            c_in = width
    return total + 2 * c_in + c_in * classes + classes


def test_parameter_counts_follow_from_the_architectures():
    assert preact_parameters(64, [64, 128, 256, 512], 2, 10) == PARAMETERS["preact_resnet18"]
    assert preact_parameters(16, [160, 320, 640], 5, 10) == PARAMETERS["wrn_34_10"]
    assert preact_parameters(16, [160, 320, 640], 4, 10) == PARAMETERS["wrn_28_10"]


OWN_NAMES = [
    "small_cnn", "preact_resnet18", "wrn_34_10", "wrn_28_10", "preact_resnet18_kuangliu", "preact_resnet18_wong",
]  # fmt: skip
OWN = [("small_cnn", 1), ("small_cnn", 3), ("preact_resnet18", 1), ("preact_resnet18", 3)]
THEIRS = ["resnet18", "efficientnet_b0", "mobilenet_v3_small"]


@pytest.mark.parametrize(("name", "channels"), [*OWN, *((name, 3) for name in THEIRS)])
def test_attack_and_training_step(name, channels):
    """Through in-place activations, too."""
    model = models.create(name, 4, channels=channels, mean=[0.4] * channels, std=[0.2] * channels)
    x, y = torch.rand(2, channels, 32, 32), torch.tensor([0, 3])
    x_adv = ham.pgd_attack(model, x, y, eps=0.03, step_size=0.01, steps=2)
    assert 0 < (x_adv - x).abs().max() <= 0.03 + 1e-6
    # Adam's steps are bounded: through many BatchNorms over two rows of 1x1 pixels gradients reach 1e12
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    trainer = ham.HAMTrainer(model, optimizer, steps=2, screen_steps=1, start_epoch=2)
    before = [p.detach().clone() for p in model.parameters()]
    report = trainer.train_step(x, y, epoch=1)
    assert report.n_hard == 2
    assert any(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    trainer.train_step(x, y, epoch=2)
    assert model(x).shape == (2, 4)


def test_a_small_wide_resnet_runs():
    model = models.WideResNet(10, 1, 5, channels=1)
    x_adv = ham.pgd_attack(model, torch.rand(2, 1, 16, 16), torch.tensor([0, 4]), steps=2)
    assert model(x_adv).shape == (2, 5)
    assert isinstance(model[0], nn.Identity)
    assert model[-1].bias.abs().sum() == 0


@pytest.mark.parametrize("name", ["small_cnn", "preact_resnet18", "resnet18"])
def test_normalisation_is_inside(name):
    """A model with mean and std sees what one without sees of images normalised outside."""
    mean, std = (0.1, 0.5, 0.3), (0.2, 0.3, 0.5)
    inside, outside = models.create(name, 3, mean=mean, std=std).eval(), models.create(name, 3).eval()
    own = outside.state_dict()
    learned = {k: v for k, v in inside.state_dict().items() if not k.startswith(("0.mean", "0.std"))}
    outside.load_state_dict(dict(zip(own, learned.values(), strict=True)))
    x = torch.rand(2, 3, 32, 32)
    column = (1, 3, 1, 1)
    normalised = (x - torch.tensor(mean).view(column)) / torch.tensor(std).view(column)
    torch.testing.assert_close(inside(x), outside(normalised))


def test_defaults_of_the_classes():
    assert models.PreActResNet18()[0].mean.flatten().tolist() == pytest.approx([0.4914, 0.4822, 0.4465])
    assert models.PreActResNet18()[0].std.flatten().tolist() == pytest.approx([0.2471, 0.2435, 0.2616])
    assert models.SmallCNN(2)[0].mean.flatten().tolist() == [0.5, 0.5]
    assert models.SmallCNN()[-1].out_features == models.PreActResNet18()[-1].out_features == 10


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_models_with_auxiliary_heads_return_one_tensor(name, recwarn):
    with torch.device("meta"):
        model = models.create(name, 7)
    assert model(torch.empty(2, 3, 96, 96, device="meta")).shape == (2, 7)  # in train mode
    assert not recwarn.list


def test_every_name_is_known():
    names = models.names()
    assert names[: len(OWN_NAMES)] == OWN_NAMES
    assert {"resnet50", "vgg16_bn", "convnext_tiny", "swin_t", *THEIRS} <= set(names)
    assert len(set(names)) == len(names)
    assert models.is_known("resnet50")
    assert not models.is_known("wrn-34-1")


def test_an_own_name_is_known_without_a_look_at_torchvision(monkeypatch):
    monkeypatch.setattr(models.named, "_torchvision_names", lambda: pytest.fail("it takes seconds to import"))
    assert models.is_known("small_cnn")


@pytest.mark.parametrize("name", ["convnext_tiny", "vit_b_16"])
def test_imagenets_models_take_a_batch_without_rows(name):
    """As a process gets it that has no hard rows: its loss is 0, and so is every gradient."""
    model = models.create(name, 10, mean=(0.5,) * 3, std=(0.5,) * 3)
    x, y = torch.empty(0, 3, 224, 224), torch.empty(0, dtype=torch.int64)
    nn.functional.cross_entropy(model(x), y, reduction="sum").backward()
    assert all(not p.grad.any() for p in model.parameters())


def test_bad_requests():
    with pytest.raises(ValueError, match=r"name: got 'wrn-34-1'; close are wrn_34_10.*names\(\) lists all"):
        models.create("wrn-34-1", 10)
    with pytest.raises(ValueError, match="name: got 'qqq'; allowed are small_cnn, preact_resnet18"):
        models.create("qqq", 10)
    with pytest.raises(ValueError, match="channels: got 1; torchvision's resnet18 takes 3"):
        models.create("resnet18", 10, channels=1)
    with pytest.raises(ValueError, match="classes: got 1"):
        models.create("small_cnn", 1)
    with pytest.raises(ValueError, match="mean: got None; give both mean and std, or neither"):
        models.create("small_cnn", 10, std=(1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="std: got 1 values; it must have one per channel, 3"):
        models.create("resnet18", 10, mean=(0.0, 0.0, 0.0), std=(1.0,))
    with pytest.raises(ValueError, match=r"std: got 0\.0"):
        models.create("small_cnn", 10, channels=1, mean=(0.0,), std=(0.0,))
    with pytest.raises(ValueError, match="depth: got 33; it must be 6n"):
        models.WideResNet(33)


def test_without_torchvision_the_own_models_remain(monkeypatch):
    monkeypatch.setattr(models.named, "_torchvision_names", list)
    assert models.names() == OWN_NAMES
    assert not models.is_known("resnet18")
    with pytest.raises(ValueError, match=r"name: got 'resnet18'; .*torchvision, which has many more, is not installed"):
        models.create("resnet18", 10)
