"""Points of a path that an attack keeps, and rows that stay at one: against the whole path, in replays too."""

from __future__ import annotations

import math

import pytest
import torch
from graph_helpers import Recorder, give_graphs
from nets import sgd, small_cnn

import ham_kernels as ham
from ham_kernels.attack.pgd import PGD, Attack
from ham_kernels.engine import PLAIN
from ham_kernels.methods import BAT, Objective
from ham_kernels.methods.bat import from_uniform

ATTACK = {"eps": 0.2, "step_size": 0.04, "steps": 8}
SCREENED = {"early_drop": True, "screen_steps": 2}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def batch(seed):
    """A model that is right on most clean images, and sure of few."""
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(40, 1, 8, 8, generator=g)
    model = small_cnn()
    y = model.eval()(x).argmax(1)
    y[:4] = (y[:4] + 1) % 10
    return model.train(), x, y


def path_of(model, x, y, pgd: PGD):
    """[x^0, ..., x^K] and [right at x^0, ..., right at x^(K-1)] of an attack in which no row stays."""
    points, right = [], []
    with PLAIN.attacking(model):
        attack = Attack(model, x, y, pgd, seed=1, step=2)
        for _ in range(pgd.steps):
            points.append(attack.rows.x_adv.clone())
            attack.steps(1, lambda _, z: right.append(z.argmax(1) == y))
    return [*points, attack.rows.x_adv], torch.stack(right)


def two_points(points, right, i: int):
    """(x_lc, x_fa) of a row."""
    wrong = (~right[:, i]).nonzero()[:, 0].tolist()
    last_right = max(wrong[0] - 1, 0) if wrong else -1
    return points[last_right][i], points[wrong[1] if len(wrong) > 1 else -1][i]


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("graphs", [False, True])
def test_points_are_those_of_the_path(norm, graphs, batch):
    model, x, y = batch
    attack = ATTACK | ({"norm": "l2", "eps": 1.0, "step_size": 0.2} if norm == "l2" else {})
    trainer = ham.Trainer(model, sgd(model), BAT(), **attack)
    if graphs:
        give_graphs(trainer, Recorder())
    made = trainer.phases.method.examples(model, x, y, seed=1, step=2, engine=trainer.engine)
    points, right = path_of(model, x, y, PGD(**attack, loss="kl"))
    turned = (~right).sum(0)
    assert not right[0].all()
    assert (turned > 1).any()
    assert (turned == 0).any()
    for i in range(len(y)):
        last_right, past = two_points(points, right, i)
        assert torch.equal(made.last_right[i], last_right)
        assert torch.equal(made.x_adv[i], past)
    assert (len(trainer.engine.graphs) > 0) if graphs else trainer.engine.graphs is None


@pytest.mark.parametrize("easy", ["drop", "stop", "jump"])
@pytest.mark.parametrize("graphs", [False, True])
def test_rows_that_leave_have_one_point(easy, graphs, batch):
    model, x, y = batch
    trainer = ham.Trainer(model, sgd(model), BAT(**SCREENED, easy=easy), **ATTACK)
    if graphs:
        give_graphs(trainer, Recorder())
    made = trainer.phases.method.examples(model, x, y, seed=1, step=2, engine=trainer.engine)
    points, right = path_of(model, x, y, PGD(**ATTACK, loss="kl"))
    assert 0 < made.n_hard < made.n
    rows = range(len(y)) if made.index is None else made.index.tolist()
    for place, i in enumerate(rows):
        if made.hard[i]:
            last_right, past = two_points(points, right, i)
            assert torch.equal(made.last_right[place], last_right)
            assert torch.equal(made.x_adv[place], past)
        else:
            assert torch.equal(made.last_right[place], made.x_adv[place])
            if easy == "stop":
                assert torch.equal(made.x_adv[place], points[2][i])


def test_batches_attacked_together_keep_their_points(batch):
    model, x, y = batch
    objective = Objective(BAT(**SCREENED), PGD(**ATTACK))
    whole = objective.examples(model, x, y, seed=1, step=2)
    parts = objective.group_examples(model, x, y, (15, 25), seed=1, step=2)
    assert torch.equal(torch.cat([p.last_right for p in parts]), whole.last_right)


def test_the_rest_of_a_batch_passes_beside_each_point(batch):
    model, x, y = batch
    objective = Objective(BAT(**SCREENED, bn_rows="all"), PGD(**ATTACK))
    made = objective.examples(model, x, y, seed=1, step=2)
    seen = []
    handle = model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    assert objective.loss(model, made).isfinite()
    handle.remove()
    assert [len(images) for images in seen] == [len(y)] * 3
    for images, rest in zip(seen, (made.rest_x, made.rest, made.rest), strict=True):
        assert torch.equal(images[made.n_kept :], rest)


def test_the_divergence_from_uniform():
    z = torch.tensor([[0.0] * 4, [200.0, 0.0, 0.0, 0.0], [math.log(3.0), 0.0, -1e4, -1e4]])
    half = 0.75 * math.log(0.75) + 0.25 * math.log(0.25)
    assert from_uniform(z).tolist() == pytest.approx([0.0, math.log(4), math.log(4) + half], abs=1e-6)


def test_patience_is_a_count():
    with pytest.raises(ValueError, match="patience: got -1"):
        PGD(patience=-1)
    assert BAT().cost(10) == 30
