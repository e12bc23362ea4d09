"""judge: the same flags however often it is interrupted, and never flags of anything else."""

from __future__ import annotations

import json
import math
import os

import pytest
import torch
from judging_nets import varied_cnn
from nets import Broken, small_cnn
from torch.utils.data import DataLoader, TensorDataset

import ham_kernels as ham
from ham_kernels import engine
from ham_kernels.evaluation import StoreWarning, intervals, judge, partial_results

HOW = {"classes": 10, "eps": 0.01, "step_size": 0.004}
ATTACKS = ("clean", "pgd3")


@pytest.fixture
def model():
    return varied_cnn(torch.rand(100, 1, 8, 8))


@pytest.fixture
def loader(model):
    """About two images in three with the label that the model gives them."""
    x = torch.rand(40, 1, 8, 8)
    y = torch.where(torch.rand(40) < 0.67, model.eval()(x).argmax(1), torch.arange(40) % 10)
    model.train()
    return [(x[i : i + 16], y[i : i + 16]) for i in range(0, 40, 16)]


class Interrupt(Exception):
    pass


def stop_after(attack: str, images: int):
    def progress(name, done, total):
        if (name, done) == (attack, images):
            raise Interrupt

    return progress


def without_time(result: dict) -> dict:
    return {name: {k: v for k, v in of.items() if k != "seconds"} for name, of in result.items()}


def test_agrees_with_evaluate_and_intervals(model, loader):
    result = judge(model, loader, ATTACKS, **HOW)
    reference = ham.evaluate(model, loader, ATTACKS, eps=0.01, step_size=0.004)
    y = torch.cat([y for _, y in loader])
    assert reference["pgd3"].accuracy < reference["clean"].accuracy
    for name in ATTACKS:
        of = result[name]
        assert of["n"] == len(of["correct"]) == 40
        assert of["accuracy"]["value"] == pytest.approx(reference[name].accuracy)
        per_class = [math.nan if c["value"] is None else c["value"] for c in of["per_class"]]
        assert per_class == pytest.approx(list(reference[name].per_class), nan_ok=True)
        assert of["std"]["value"] == pytest.approx(reference[name].std)
        found = intervals([int(c) for c in of["correct"]], y, 10)
        assert of["worst_class"] == found["worst_class"].as_json()
        assert of["seconds"] > 0
    assert result["clean"]["settings"] == {"attack": "clean", "precision": "fp32", "seed": 0, "device": "cpu"}
    assert result["pgd3"]["settings"]["eps"] == 0.01


def test_flags_are_in_the_order_of_the_loader(model, loader):
    model.eval()
    flags = judge(model, loader, ["clean"], **HOW)["clean"]["correct"]
    expected = "".join(str(int(c)) for x, y in loader for c in model(x).argmax(1) == y)
    assert flags == expected


def test_answers_are_the_classes_at_the_judged_examples(model, loader):
    found = judge(model, loader, ATTACKS, **HOW)
    model.eval()
    assert found["clean"]["answers"] == " ".join(str(int(c)) for x, _ in loader for c in model(x).argmax(1))
    labels = [int(c) for _, y in loader for c in y]
    for name in ATTACKS:
        pairs = zip(map(int, found[name]["answers"].split()), labels, found[name]["correct"], strict=True)
        assert all((answer == label) == (flag == "1") for answer, label, flag in pairs)


def test_a_store_without_answers_stays_valid(model, loader, tmp_path):
    """Its flags are not made anew, and the attack has no answers, also where some batches were added later.

    Nor did it tell the place and the seconds of each batch.
    """
    store = tmp_path / "flags.json"
    with pytest.raises(Interrupt):
        judge(model, loader, ATTACKS, **HOW, store=store, progress=stop_after("pgd3", 16))
    body = json.loads(store.read_text())
    for entry in body["attacks"].values():
        entry["seconds"] = 7.0 * len(entry["batches"])
        for batch in entry["batches"]:
            del batch["answers"], batch["at"], batch["seconds"]
    body.pop("sha256")
    store.write_text(json.dumps({"sha256": partial_results._digest(body), **body}))
    assert count_rows(model, loader, store) == (3 + 1) * (40 - 16)
    found = judge(model, loader, (*ATTACKS, "fgsm"), **HOW, store=store)
    assert found["clean"]["seconds"] == 21.0
    assert 7.0 < found["pgd3"]["seconds"] < 14.0
    assert ["answers" in found[name] for name in ("clean", "pgd3", "fgsm")] == [False, False, True]


def test_result_is_json_with_null_for_what_is_not_there(model):
    x = torch.rand(6, 1, 8, 8)
    with torch.no_grad():
        wrong = (model.eval()(x).argmax(1) + 1) % 10
    result = judge(model, [(x, wrong)], ["clean"], **HOW)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["clean"]["nstd"] == {"value": None, "low": None, "high": None}
    assert {c["value"] for c in result["clean"]["per_class"]} == {0.0, None}


@pytest.mark.parametrize(("attack", "images"), [("clean", 16), ("pgd3", 16), ("pgd3", 32), ("pgd3", 40)])
def test_interrupted_run_goes_on_where_it_was(model, loader, tmp_path, attack, images):
    whole = judge(model, loader, ATTACKS, **HOW, restarts=2)
    store = tmp_path / "flags.json"
    with pytest.raises(Interrupt):
        judge(model, loader, ATTACKS, **HOW, restarts=2, store=store, progress=stop_after(attack, images))
    resumed = judge(model, loader, ATTACKS, **HOW, restarts=2, store=store)
    assert without_time(resumed) == without_time(whole)
    assert resumed["pgd3"]["seconds"] > 0
    assert os.listdir(tmp_path) == ["flags.json"]  # no temporary file is left


def count_rows(model, loader, store, **change) -> int:
    """Forwards of a run but for the first look, with its flags checked against a run without a store."""
    rows = 0

    def count(module, inputs):
        nonlocal rows
        rows += len(inputs[0])

    def look(*args, **how):
        nonlocal rows
        before = rows
        first_look(*args, **how)
        rows = before

    first_look = engine.first_look
    handle = model.register_forward_pre_hook(count)
    engine.first_look = look
    try:
        result = judge(model, loader, ATTACKS, **(HOW | change), store=store)
    finally:
        handle.remove()
        engine.first_look = first_look
    expected = judge(model, loader, ATTACKS, **{k: v for k, v in (HOW | change).items() if k != "identity"})
    assert {n: r["correct"] for n, r in result.items()} == {n: r["correct"] for n, r in expected.items()}
    return rows


def test_only_what_is_missing_is_attacked(model, loader, tmp_path):
    store = tmp_path / "flags.json"
    with pytest.raises(Interrupt):
        judge(model, loader, ATTACKS, **HOW, store=store, progress=stop_after("pgd3", 16))
    assert count_rows(model, loader, store) == (3 + 1) * (40 - 16)
    assert count_rows(model, loader, store) == 0


ALL_ROWS = 40 + 4 * 40


def test_flags_of_anything_else_are_made_anew(model, loader, tmp_path):
    store = tmp_path / "flags.json"
    one = {"identity": {"checkpoint": "a", "part": "test"}}
    assert count_rows(model, loader, store, **one) == ALL_ROWS
    assert count_rows(model, loader, store, **one) == 0
    assert count_rows(model, loader, store, identity={"checkpoint": "b", "part": "test"}) == ALL_ROWS
    assert count_rows(model, loader, store, **one, eps=0.06) == ALL_ROWS
    assert count_rows(model, loader, store, **one, seed=1) == ALL_ROWS
    assert count_rows(model, loader, store, **one, seed=1, eps=0.06) == 160  # clean does not depend on eps
    with torch.no_grad():
        model[-1].bias[3] += 0.5
    assert count_rows(model, loader, store, **one) == ALL_ROWS


def test_changed_images_are_judged_anew(model, loader, tmp_path):
    store = tmp_path / "flags.json"
    assert count_rows(model, loader, store) == ALL_ROWS
    loader[2] = (1 - loader[2][0], loader[2][1])
    assert count_rows(model, loader, store) == 8 + 4 * 8
    loader[1] = (loader[1][0][:10], loader[1][1][:10])
    assert count_rows(model, loader, store) == 5 * 10  # the one behind it is at its place, and as it was
    assert count_rows(model, loader[:1], store) == 0


def test_a_look_at_fewer_images_or_in_other_batches_keeps_what_is_done(model, loader, tmp_path):
    store = tmp_path / "flags.json"
    with pytest.raises(Interrupt):
        judge(model, loader, ATTACKS, **HOW, store=store, progress=stop_after("pgd3", 32))
    few = [loader[0], (loader[1][0][:4], loader[1][1][:4])]
    assert count_rows(model, few, store) == (1 + 4) * 4
    halves = [half for x, y in loader for half in zip(x.split(8), y.split(8), strict=True)]
    assert count_rows(model, halves, store) == ALL_ROWS
    assert count_rows(model, loader, store) == 4 * 8


@pytest.mark.parametrize(
    "alter",
    [
        lambda text: text,
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[1, 2]",
    ],
)
def test_altered_store_is_reported_and_made_anew(model, loader, tmp_path, alter):
    store = tmp_path / "flags.json"
    judge(model, loader, ATTACKS, **HOW, store=store)
    body = json.loads(store.read_text())
    entry = next(iter(body["attacks"].values()))
    flags = entry["batches"][0]["correct"]
    entry["batches"][0]["correct"] = flags.replace("0", "2").replace("1", "0").replace("2", "1")
    store.write_text(alter(json.dumps(body)))
    with pytest.warns(StoreWarning, match=r"store: .*flags\.json was altered or is damaged"):
        assert count_rows(model, loader, store) == ALL_ROWS
    assert count_rows(model, loader, store) == 0


def test_buffers_that_are_no_state_belong_to_the_model(loader, tmp_path):
    class Normed(torch.nn.Module):
        def __init__(self, mean):
            super().__init__()
            self.register_buffer("mean", torch.tensor(mean), persistent=False)

        def forward(self, x):
            return (x - self.mean).flatten(1)[:, :10].cumsum(1)

    def flags(mean):
        return judge(Normed(mean), loader, ("clean",), **{**HOW, "store": tmp_path / "store.json"})["clean"]["correct"]

    with_other = flags(0.0)
    assert flags(0.9) == judge(Normed(0.9), loader, ("clean",), **HOW)["clean"]["correct"] != with_other


def test_a_failing_write_leaves_the_old_file(model, loader, tmp_path, monkeypatch):
    store = tmp_path / "flags.json"
    judge(model, loader, ["clean"], **HOW, store=store)
    before = store.read_bytes()

    def full(fd):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        judge(model, loader, ATTACKS, **HOW, store=store)
    assert store.read_bytes() == before
    assert os.listdir(tmp_path) == ["flags.json"]


def test_flags_are_written_while_an_attack_runs(model, loader, tmp_path, monkeypatch):
    """A killed process runs no `finally`: what counts is what lies on the disk after each batch."""
    monkeypatch.setattr("ham_kernels.evaluation.partial_results.SECONDS_BETWEEN_WRITES", 0.0)
    store, on_disk = tmp_path / "flags.json", []

    def progress(name, done, total):
        entries = json.loads(store.read_text())["attacks"].values()
        on_disk.append((name, done, sum(len(b["correct"]) for e in entries for b in e["batches"])))

    judge(model, loader, ["clean", "fgsm"], **HOW, store=store, progress=progress)
    assert on_disk == [(n, d, d + 40 * i) for i, n in enumerate(("clean", "fgsm")) for d in (16, 32, 40)]


def test_progress_knows_how_many_where_it_can(model, loader):
    def totals(data) -> list[int | None]:
        seen = []
        judge(model, data, ["clean", "fgsm"], **HOW, progress=lambda name, done, total: seen.append(total))
        return seen

    class Stream:
        def __iter__(self):
            return iter(loader)

    x, y = (torch.cat(parts) for parts in zip(*loader, strict=True))
    assert totals(loader) == [40] * 6
    assert totals(DataLoader(TensorDataset(x, y), 16)) == [40] * 6
    assert totals(ham.data.Batches((x * 255).byte(), y, 16, shuffle=False)) == [40] * 6
    assert totals(DataLoader(TensorDataset(x, y), 16, drop_last=True)) == [None] * 2 + [32] * 2
    assert totals(Stream()) == [None] * 3 + [40] * 3


def test_loader_that_shuffles_is_refused(model, loader):
    x, y = (torch.cat(parts) for parts in zip(*loader, strict=True))
    shuffled = DataLoader(TensorDataset(x, y), 16, shuffle=True)
    with pytest.raises(ValueError, match="loader: gave other batches for the second attack"):
        judge(model, shuffled, ATTACKS, **HOW)
    with pytest.raises(TypeError, match="loader: is an iterator"):
        judge(model, iter(loader), ATTACKS, **HOW)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"classes": 1}, ValueError, "classes: got 1"),
        ({"classes": 7}, ValueError, "classes: got 7; the model gives logits of 10"),
        ({"seed": -1}, ValueError, "seed: got -1"),
        ({"precision": "fp64"}, ValueError, "precision: got 'fp64'"),
        ({"restarts": 2.0}, TypeError, "restarts: got 2.0"),
        ({"store": "no/such/folder/flags.json"}, FileNotFoundError, "store: the folder"),
        ({"store": "."}, ValueError, r"store: \. is a folder"),
        ({"identity": {"a": object()}}, TypeError, "identity: cannot be written as JSON"),
        ({"loader": []}, ValueError, "loader: gave no batch"),
        ({"attacks": ["apgdt"]}, ValueError, "attacks: got 'apgdt'"),
    ],
)
def test_bad_input(model, loader, change, error, message):
    with pytest.raises(error, match=message):
        judge(**({"model": model, "loader": loader, "attacks": ATTACKS} | HOW | change))


@pytest.mark.parametrize("fails", [False, True])
def test_model_is_left_as_it_was(loader, tmp_path, fails):
    inner = small_cnn()
    inner[2].eval()
    inner[1].weight.requires_grad_(False)

    def boom(z):
        raise RuntimeError("boom")

    model = Broken(inner, boom, after=5 if fails else 10**9)
    modes, learned = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    if fails:
        with pytest.raises(RuntimeError, match="boom"):
            judge(model, loader, ATTACKS, **HOW, store=tmp_path / "flags.json")
    else:
        judge(model, loader, ATTACKS, **HOW, store=tmp_path / "flags.json")
    assert modes == [m.training for m in model.modules()]
    assert learned == [p.requires_grad for p in model.parameters()]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
