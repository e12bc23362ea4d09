"""Example images: which are chosen, that they are those of an attack, and how few forwards they take."""

from __future__ import annotations

import json

import pytest
import torch
from judging_nets import varied_cnn
from nets import Constant, Counting

from ham_kernels.evaluation import examples

HOW = {"steps": 3, "eps": 0.1, "step_size": 0.04}


class Light(torch.nn.Module):
    """Class 1 where the mean pixel is above 0.5."""

    def forward(self, x):
        return torch.stack([torch.full_like(x[:, 0, 0, 0], 0.5), x.flatten(1).mean(1)], dim=1)


def test_the_first_correct_image_of_each_class_else_the_first():
    """A model that always answers class 1: right for its images alone."""
    x = torch.rand(8, 1, 4, 4)
    y = torch.tensor([2, 1, 0, 1, 0, 2, 1, 0])
    found = examples(Constant([0.0, 1.0, 0.5]), [(x[:3], y[:3]), (x[3:], y[3:])], range(4), **HOW)
    assert [row["label"] for row in found.rows] == [0, 1, 2]  # class 3 has no image
    assert torch.equal(torch.from_numpy(found.x), x[[2, 1, 0]].half())
    assert {(row["answer"], row["answer_adv"]) for row in found.rows} == {(1, 1)}
    p = torch.tensor([0.0, 1.0, 0.5]).softmax(0)[1].item()
    assert [row["probability_adv"] for row in found.rows] == pytest.approx([p] * 3)
    light = Light()
    x, y = torch.tensor([0.1, 0.9, 0.1, 0.8, 0.1]).view(5, 1, 1, 1).expand(5, 1, 4, 4), torch.tensor([1, 0, 1, 1, 0])
    found = examples(light, [(x[:2], y[:2]), (x[2:], y[2:])], [0, 1], **HOW)
    assert found.x[:, 0, 0, 0] == pytest.approx([0.1, 0.8], abs=1e-3)
    tied = examples(Constant([1.0, 1.0]), [(x[:2], y[:2].clamp_max(1) * 0)], [0, 1], **HOW)
    assert tied.rows == [{"label": 0, "answer": 1, "probability": 0.5, "answer_adv": 1, "probability_adv": 0.5}]


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.1), ("l2", 0.8)])
def test_they_are_examples_of_an_attack(norm, eps):
    x = torch.rand(60, 1, 8, 8)
    model = varied_cnn(x)
    y = model.eval()(x).argmax(1)
    classes = sorted(set(y.tolist()))
    found = examples(model, [(x, y)], classes, steps=10, eps=eps, step_size=eps / 4, norm=norm)
    a, b = (torch.from_numpy(t).float() for t in (found.x, found.x_adv))
    assert (found.x.dtype, found.x.shape) == ("float16", (len(classes), 1, 8, 8))
    assert 0 <= b.min() <= b.max() <= 1
    size = (b - a).flatten(1).norm(dim=1) if norm == "l2" else (b - a).abs().amax((1, 2, 3))
    assert ((size > eps / 2) & (size < eps + 2e-3)).all()
    for row, z, z_adv in zip(found.rows, model(a).softmax(1), model(b).softmax(1), strict=True):
        assert row["label"] == row["answer"]
        assert row["probability"] == pytest.approx(z[row["answer"]].item(), abs=0.01)
        assert row["probability_adv"] == pytest.approx(z_adv[row["answer_adv"]].item(), abs=0.01)
    assert any(row["answer_adv"] != row["label"] for row in found.rows)
    assert json.loads(json.dumps(found.rows, allow_nan=False)) == found.rows
    again = examples(model, [(x, y)], classes, steps=10, eps=eps, step_size=eps / 4, norm=norm)
    assert (again.x_adv == found.x_adv).all()


def test_ten_of_many_classes_and_no_more_of_the_loader_than_it_takes():
    labels = torch.arange(100)
    x = torch.rand(100, 1, 4, 4)

    def batches():
        yield x, labels
        raise AssertionError("each class has its image")

    model = Counting(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 100)))
    with torch.no_grad():
        model.inner[1].weight.zero_()
    right = Constant([0.0] * 100)
    right.forward = lambda x: 9.0 * torch.nn.functional.one_hot(labels[: len(x)], 100) + 0 * x.sum()
    found = examples(right, batches(), labels.tolist(), **HOW)
    assert [row["label"] for row in found.rows] == [0, 11, 22, 33, 44, 55, 66, 77, 88, 99]
    examples(model, [(x, labels)], labels.tolist(), **HOW)
    assert model.forward_rows == 100 + 10 + (3 + 1) * 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps: got 0"),
        ({"precision": "fp16"}, "precision: got 'fp16'"),
        ({"eps": -1.0}, "eps: got -1"),
        ({"loader": []}, "loader: gave no batch"),
        ({"classes": [2, 3]}, r"classes: got \[2, 3\]; the loader has no image of them"),
        ({"classes": []}, r"classes: got \[\]"),
    ],
)
def test_bad_input(change, message):
    data = [(torch.rand(2, 1, 4, 4), torch.tensor([0, 1]))]
    with pytest.raises(ValueError, match=message):
        examples(**({"model": Constant([0.0, 1.0]), "loader": data, "classes": [0, 1]} | HOW | change))
