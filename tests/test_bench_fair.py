"""The choice of fair's defaults: folds, the strong attack against an exact answer, a run that goes on."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import bench_fair
from fair import candidates
from fair.folds import folds_of, multi_targeted

from ham_kernels import data, preset
from ham_kernels.commands.run_images import images_of


def test_folds_hold_each_class_evenly():
    images = images_of(preset("digits"))
    fold = folds_of(images, 4)
    for c in range(10):
        sizes = torch.bincount(fold[images.y_train == c], minlength=4)
        assert sizes.max() - sizes.min() <= 1
    assert torch.equal(fold, folds_of(images, 4))


def test_the_attack_finds_what_a_linear_model_has(seed):
    """A row of a linear model is robust where its margin is above eps * |w_t - w_y|_1 for each other class t."""
    g = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 5))
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(5, 16, generator=g))
    x = 0.3 + 0.4 * torch.rand(200, 1, 4, 4, generator=g)
    z, w = model(x).detach(), model[1].weight.detach()
    y = z.argmax(1)
    y[:20] = (y[:20] + 1) % 5  # wrong without an attack
    others = torch.arange(5) != y[:, None]
    lengths = (w[:, None] - w[None, :]).abs().sum(2)[y].clamp_min(1e-9)
    radius = ((z.gather(1, y[:, None]) - z) / lengths).masked_fill(~others, torch.inf).amin(1)
    eps = min(radius[20:].median().item(), 0.3)
    found, sure = multi_targeted(model, x, y, eps), (radius - eps).abs() > 1e-4
    assert 0 < int(found.sum()) < 180
    assert torch.equal(found[sure], (radius > eps)[sure])


def test_candidates_are_settings_of_fair_and_what_it_is_compared_with():
    assert candidates.ALL[candidates.BASELINE].name == "pgd_at"
    costs = {name: m.cost(10) for name, m in candidates.ALL.items()}
    assert {costs[name] for name in candidates.FULL} == {23}
    assert costs["PGD-AT, steps 2 1 ½ ε"] == 9


def test_longer_candidates_take_the_forwards_of_pgd_at(tmp_path, monkeypatch):
    trained = []

    def note(settings, images, held_out):
        trained.append(settings)
        return {"by_class": [(1, 1)] * 10, "hard": 1.0}

    monkeypatch.setattr(bench_fair, "train_and_judge", note)
    name = "PGD-AT, steps 2 1 ½ ε"
    assert bench_fair.main(["--out", str(tmp_path / "a.json"), "--only", name, f"{name}, time 0.95"]) == 0
    assert [s.optim.epochs for s in trained] == [24] * 4 + [58] * 4  # 0.95 * 24 * 23 / 9
    assert {s.method for s in trained} == {candidates.ALL[name]}
    result = json.loads((tmp_path / "a.json").read_text())
    costs = [bench_fair.summary(result, one)["forwards"] for one in (name, f"{name}, time 0.95")]
    assert costs == pytest.approx([9 / 23, 9 * 58 / (23 * 24)])
    assert [s.run.seed for s in trained] == [0, 1, 2, 3] * 2


@pytest.mark.slow
def test_results_are_kept_and_completed(tmp_path, capsys, monkeypatch):
    images = images_of(preset("digits"))
    few = data.ImageSet(
        "few", images.classes, images.x_train[:80], images.y_train[:80], images.x_test[:20], images.y_test[:20]
    )
    monkeypatch.setattr(bench_fair, "images_of", lambda _: few)
    out = tmp_path / "fair.json"
    flags = ["--epochs", "2", "--folds", "2", "--out", str(out)]
    assert bench_fair.main([*flags, "--only", "PGD-AT, steps 2 1 ½ ε"]) == 0
    first = json.loads(out.read_text())["candidates"]["PGD-AT, steps 2 1 ½ ε"]
    assert len(first) == 2
    assert sum(n for run in first for n, _ in run["by_class"]) == 80  # each image judged once
    assert bench_fair.main([*flags, "--only", "PGD-AT, steps 2 1 ½ ε", "PGD-AT"]) == 0
    result = json.loads(out.read_text())
    assert result["candidates"]["PGD-AT, steps 2 1 ½ ε"] == first
    s = bench_fair.summary(result, "PGD-AT")
    assert s["forwards"] == 1.0
    assert s["worst"] <= s["worst_3"] <= s["average"] <= 100
    assert "PGD-AT, steps 2 1 ½ ε" in capsys.readouterr().out
    assert "in 2 folds, 2 epochs" in bench_fair.readme_section(result)
    assert bench_fair.main(["--epochs", "3", "--folds", "2", "--out", str(out)]) == 2
    others = replace(few, y_train=few.y_train.roll(1))
    monkeypatch.setattr(bench_fair, "images_of", lambda _: others)
    assert bench_fair.main(flags) == 2
    assert json.loads(out.read_text()) == result
    with pytest.raises(SystemExit):
        bench_fair.parse(["--only", "nonsense"])
