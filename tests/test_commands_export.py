"""Models for those who have torch alone: the formats, the card, RobustBench's entry, and classes of image files."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from runs_helper import TINY

import ham_kernels as ham
from ham_kernels import models
from ham_kernels.commands import cli, export, flags
from ham_kernels.commands import train as train_command
from ham_kernels.commands.export import _apart
from ham_kernels.commands.model_card import model_card, robustbench_entry
from ham_kernels.common import files
from ham_kernels.models.weights import lay, read_weights
from ham_kernels.runs.folder import RunFolder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.usefixtures("no_gpu", "one_thread")]


@pytest.fixture(scope="module")
def run(tmp_path_factory, one_thread):
    out = tmp_path_factory.mktemp("commands") / "digits-run"
    train_command.train(flags.parse_train([*TINY, "--method", "pgd_at"]).settings, out, quiet=True)
    cli.main(["evaluate", str(out), "--attacks", "clean", "pgd3", "--masking-images", "16", "--no-analyses", "--quiet"])
    return out


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("exports") / "model"
    assert cli.main(["export", str(run), "--out", str(out)]) == 0
    return out


ALONE = """
import json, sys
sys.modules["ham_kernels"] = None  # as where it is not installed
import torch
held = {"about.json": ""}
model = torch.export.load(sys.argv[1] + "/model.pt2", extra_files=held).module()
about = json.loads(held["about.json"])
x = torch.load(sys.argv[2])
torch.save({"logits": model(x), "one": model(x[:1]), "about": about}, sys.argv[3])
state = torch.load(sys.argv[1] + "/model.pt", weights_only=True)
assert all(isinstance(v, torch.Tensor) for v in state.values())
"""


def test_torch_alone_loads_it(run, exported, tmp_path, seed):
    x = torch.rand(7, 1, 8, 8)
    torch.save(x, tmp_path / "x.pt")
    command = [sys.executable, "-I", "-c", ALONE, str(exported), str(tmp_path / "x.pt"), str(tmp_path / "found.pt")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found.pt")
    with torch.no_grad():
        theirs = ham.load_model(run, "ema")(x)
    torch.testing.assert_close(found["logits"], theirs)
    torch.testing.assert_close(found["one"], theirs[:1])
    about = found["about"]
    assert about["classes"] == [str(i) for i in range(10)]
    assert (about["input"]["channels"], about["input"]["height"], about["input"]["width"]) == (1, 8, 8)
    assert about["threat_model"] == {"norm": "linf", "eps": 0.2}
    assert about == json.loads((exported / "about.json").read_text())


def test_no_path_of_the_machine_is_in_it(run, exported):
    for file in exported.glob("*.[jM]*"):
        assert str(run.parent) not in file.read_text()


def test_the_card_says_what_was_measured(run, exported):
    card = (exported / "MODEL_CARD.md").read_text()
    judged = json.loads((run / "evaluation/ema.json").read_text())
    robust = judged["attacks"]["pgd3"]
    value, low, high = (100 * robust["accuracy"][k] for k in ("value", "low", "high"))
    assert f"| PGD-3 | 60 | {value:.1f} [{low:.1f}, {high:.1f}] |" in card
    assert card.count("\n| ") == 2 + 2 + 10  # two heads, attacks, classes
    for said in ("changes each pixel value by at most 0.2 (L∞)", "PGD-AT", "Not judged by AutoAttack", "60 test"):
        assert said in card
    entry = json.loads((exported / "robustbench.json").read_text())
    assert (entry["clean_acc"], entry["autoattack_acc"]) == (
        f"{100 * judged['attacks']['clean']['accuracy']['value']:.2f}",
        "",
    )
    assert entry["eps"] == "51/255"


def judged_by(attack: dict, images: int) -> dict:
    """An evaluation with one attack on 60 of so many images."""
    interval = {"value": 0.5, "low": 0.4, "high": 0.6}
    found = {"n": 60, "accuracy": interval, "worst_class": interval, "std": interval, "per_class": [interval] * 10}
    return {"part": "test", "images": images, "attacks": {"autoattack": {**found, "settings": attack}}}


def test_a_figure_of_some_images_is_no_entry_and_a_fast_search_is_told(run, exported):
    about = json.loads((exported / "about.json").read_text())
    assert robustbench_entry(about, judged_by({}, 60))["autoattack_acc"] == "50.00"
    part, fast = judged_by({"search": {"compile": True}}, 61), judged_by({"search": {"compile": True}}, 60)
    for found in (part, fast, judged_by({}, 61)):
        assert robustbench_entry(about, found)["autoattack_acc"] == robustbench_entry(about, found)["reported"] == ""
    card = model_card(about, part, RunFolder.open(run))
    assert "AutoAttack saw 60 of 61 images." in card
    assert "AutoAttack: examples looked for on a rounded, compiled form of the model, each judged by the" in card


def test_first_weights_and_generated_images_are_told(run, tmp_path):
    tuned = tmp_path / "tuned"
    told = flags.parse_train(["--from", str(run), "--method", "pgd_at", "--epochs", "1"]).settings
    train_command.train(told, tuned, quiet=True)
    cli.main(["export", str(tuned), "--formats", "card", "robustbench", "--out", str(tmp_path / "out")])
    card = (tmp_path / "out/MODEL_CARD.md").read_text()
    assert "It began with the weights of another training: PGD-AT, " in card
    assert str(tmp_path) not in card
    (tuned / "begun_with.json").write_text("{}")
    with pytest.raises(ValueError, match=r"run: .*begun_with.json is damaged \(it tells no 'weights'\)"):
        export.about_of(RunFolder.open(tuned), "last", RunFolder.open(tuned).load_weights("last"))
    about = json.loads((tmp_path / "out/about.json").read_text())
    assert robustbench_entry(about, {})["additional_data"] == ""
    assert robustbench_entry(about | {"begun_with": None}, {})["additional_data"] is False
    assert robustbench_entry(about | {"begun_with": None, "teacher": "t"}, {})["additional_data"] == ""
    assert robustbench_entry(about | {"generated": True}, {})["additional_data"] is True
    assert robustbench_entry(about | {"begun_with": None, "method": None}, {})["additional_data"] == ""


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (("--method", "pgd_at"), "Attack: eps 0.2, step 0.05, K 10, linf."),
        (("--method", "natural"), "Attack: none."),
        (("--method", "n_fgsm"), "Attack: eps 0.2, one step, linf."),
        (("--method", "free_at"), "Attack: eps 0.2, by the gradients of the updates, linf."),
        (("--method", "fair", "--fast"), "Attack: eps 0.25 (1.25 of 0.2), steps of 2 1 0.5 eps, K 3, linf."),
        (("--method", "ham", "--warm-up", "n_fgsm", "--start-epoch", "5"), "Epochs before 5: N-FGSM."),
        (
            ("--method", "ham", "--natural-epochs", "2", "--start-epoch", "5"),
            "Epochs before 5: the first 2 by clean images, then PGD-AT.",
        ),
        (("--method", "pgd_at", "--balance", "sampler"), "augmentation none, balanced sampler."),
        (("--method", "pgd_at", "--grad-clip", "0.5"), "weight decay 0.0002, gradients clipped at 0.5, augm"),
        (("--method", "rslad", "--teacher", "/of/this machine"), "It learned from a teacher (this machine)."),
        (("--method", "offsets", "--weights", "x.pt"), "steps of the method's own in place of an optimiser's, augm"),
    ],
)
def test_the_card_tells_what_was_trained_with(told, said, run, monkeypatch):
    settings = flags.parse_train(["--dataset", "digits", *told]).settings
    monkeypatch.setattr(RunFolder, "settings", lambda _: settings)
    folder = RunFolder.open(run)
    about = export.about_of(folder, "last", folder.load_weights("last"))
    assert said in model_card(about, {}, folder)


def test_tied_weights_are_written_apart(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    first, second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    second.weight = first.weight
    safetensors.save_file(_apart(dict(torch.nn.Sequential(first, second).state_dict())), tmp_path / "m.safetensors")
    found = safetensors.load_file(tmp_path / "m.safetensors")
    assert torch.equal(found["0.weight"], found["1.weight"])


def test_weights_that_were_not_judged_say_so(run, tmp_path):
    cli.main(["export", str(run), "--weights", "last", "--formats", "card", "--out", str(tmp_path / "last")])
    card = (tmp_path / "last/MODEL_CARD.md").read_text()
    assert "Not judged: `ham evaluate` before `ham export`." in card
    assert [p.name for p in sorted((tmp_path / "last").iterdir())] == ["MODEL_CARD.md", "about.json"]


def test_other_formats(run, tmp_path, seed):
    pytest.importorskip("safetensors")
    out = tmp_path / "out"
    cli.main(["export", str(run), "--formats", "safetensors", "--out", str(out)])
    model = models.SmallCNN(1, 10, mean=None, std=None).eval()
    lay(model, read_weights(out / "model.safetensors").state, source="F")
    x = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(model(x), ham.load_model(run, "ema")(x))


def test_onnx_where_it_is_installed(run, tmp_path, capsys, seed):
    command = ["export", str(run), "--formats", "onnx", "--out", str(tmp_path / "out")]
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        assert cli.main(command) == 2
        assert "formats: onnx needs onnxscript; `pip install onnxscript`" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
        return
    assert cli.main(command) == 0
    runtime = pytest.importorskip("onnxruntime")
    x = torch.rand(5, 1, 8, 8)
    (found,) = runtime.InferenceSession(str(tmp_path / "out/model.onnx")).run(None, {"images": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), ham.load_model(run, "ema")(x).detach(), rtol=1e-4, atol=1e-4)


def test_names_of_the_field(tmp_path, seed):
    command = [
        "--dataset",
        "digits",
        "--model",
        "preact_resnet18",
        "--method",
        "natural",
        "--epochs",
        "1",
        "--start-epoch",
    ]
    settings = flags.parse_train(
        [*command, "1", "--train-images", "20", "--val-images", "0", "--test-images", "20", "--normalize", "0.3", "0.4"]
    ).settings
    train_command.train(settings, tmp_path / "run", quiet=True)
    names = ["--names", "field", "--formats", "state_dict", "card"]
    cli.main(["export", str(tmp_path / "run"), *names, "--out", str(tmp_path / "e")])
    about = json.loads((tmp_path / "e/about.json").read_text())
    assert (about["mean"], about["std"]) == ([0.3], [0.4])
    left_out = "left out of model.pt: give images normalised by mean and std"
    assert about["normalisation"] == left_out
    assert f"Normalisation (mean 0.3, std 0.4) is {left_out}." in (tmp_path / "e/MODEL_CARD.md").read_text()
    state = torch.load(tmp_path / "e/model.pt")
    assert {
        "conv1.weight",
        "layer4.1.bn2.running_var",
        "layer2.0.shortcut.0.weight",
        "bn.weight",
        "linear.bias",
    } <= set(state)
    ours = RunFolder.open(tmp_path / "run").load_weights("ema")["model"]
    assert torch.equal(state["conv1.weight"], ours["1.weight"])


def test_an_export_that_fails_leaves_nothing(run, tmp_path, monkeypatch, capsys):
    def fails(*_, **__):
        raise RuntimeError("no program")

    monkeypatch.setattr(torch.export, "export", fails)
    assert cli.main(["export", str(run), "--out", str(tmp_path / "e")]) == 2
    assert "formats: torch.export cannot take small_cnn (no program); leave pt2 out" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("format", "name"), list({**export._BARE, "pt2": "model.pt2"}.items()))
def test_a_full_disk_is_told_with_the_file(format, name, run, tmp_path, monkeypatch, capsys):
    if format == "safetensors":
        pytest.importorskip("safetensors")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    assert cli.main(["export", str(run), "--formats", format, "--out", str(tmp_path / "e")]) != 0
    said = capsys.readouterr().err
    assert "No space left on device, writing" in said
    assert f"/{name}'" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "wrapped",
    [
        torch.compile,
        torch.nn.DataParallel,
        lambda model: torch.nn.Sequential(torch.nn.Identity(), torch.nn.DataParallel(torch.compile(model))),
        lambda model: model.compile() or model,
    ],
    ids=["compiled", "parallel", "inside", "compiled in place"],
)
def test_a_wrapped_model_is_exported_without_its_wrapper(wrapped, run, tmp_path, monkeypatch, seed):
    bare = export.trained_model
    monkeypatch.setattr(export, "trained_model", lambda *how: wrapped(bare(*how)).eval())
    assert cli.main(["export", str(run), "--formats", "pt2", "--out", str(tmp_path / "e")]) == 0
    x = torch.rand(3, 1, 8, 8)
    found = torch.export.load(tmp_path / "e/model.pt2").module()(x)
    torch.testing.assert_close(found, ham.load_model(run, "ema")(x))


def test_what_is_wrong_is_told(run, exported, tmp_path, capsys):
    for arguments, says in [
        (("export", str(run), "--out", str(exported)), "is there already; give another folder"),
        (("export", str(tmp_path)), "is no run folder"),
        (("export", str(run), "--names", "field", "--formats", "state_dict", "--out", str(tmp_path / "x")), "SmallCNN"),
        (("predict", str(tmp_path), "a.png"), "is neither a run nor an export"),
        (("predict", str(run), "nowhere.png"), "files: nowhere.png is not a file"),
        (("predict", str(run)), "files: got none"),
        (("predict", str(run), __file__), "is not a readable image"),
        (("predict", str(run), "a.png", "--top", "0"), "top: got 0"),
        (("predict", str(exported), "a.png", "--weights", "last"), "weights: got 'last', but"),
    ]:
        assert cli.main(list(arguments)) == 2, arguments
        assert says in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_classes_of_files(run, exported, tmp_path, capsys):
    """By the run and by its export: as the model answers for the images that the files hold."""
    image = pytest.importorskip("PIL.Image")
    x, _ = ham.data.load("digits").part("test")
    files = []
    for i, size in enumerate((8, 8, 16)):
        files.append(str(tmp_path / f"{i}.png"))
        image.fromarray(np.asarray(x[i, 0])).resize((size, size), image.Resampling.NEAREST).save(files[-1])
    with torch.no_grad():
        theirs = ham.load_model(run, "ema")(x[:2].float() / 255).softmax(1)
    for source in (run, exported):
        assert cli.main(["predict", str(source), *files, "--json", "--top", "2", "--batch-size", "2"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert [f["file"] for f in found] == files
        for f, p in zip(found, theirs, strict=False):
            assert f["class"] == str(p.argmax().item())
            assert f["probability"] == pytest.approx(p.max().item(), abs=2e-3)
            assert len(f["top"]) == 2
    assert cli.main(["predict", str(run), files[0]]) == 0
    assert capsys.readouterr().out.startswith(f"{files[0]}: {theirs[0].argmax().item()} ")


def test_an_export_is_judged_by_autoattack_outside_the_package_as_inside(run, exported, tmp_path, seed):
    """On the same images with the same seed, by its authors' code alone."""
    pyautoattack = pytest.importorskip("pyautoattack")
    command = [
        "evaluate",
        str(run),
        "--attacks",
        "clean",
        "autoattack",
        "--images",
        "20",
        "--no-masking",
        "--no-analyses",
    ]
    assert cli.main([*command, "--eps", "0.1", "--step-size", "0.025", "--quiet", "--batch-size", "20"]) == 0
    (path,) = run.glob("evaluation/ema.test-eps0.1*.json")
    judged = json.loads(path.read_text())["attacks"]["autoattack"]
    program = torch.export.load(exported / "model.pt2").module()
    settings = RunFolder.open(run).settings()
    images = ham.data.load("digits").subset(None, settings.data.test_images).limit("test", 20)
    x, y = images.part("test")
    x = x.float() / 255
    theirs = pyautoattack.AutoAttack(program, norm="Linf", eps=0.1, seed=0)
    x_adv, _ = theirs.run_standard_evaluation(x, y, batch_size=20)
    with torch.no_grad():
        resists = program(x_adv).argmax(1) == y
    assert judged["correct"] == "".join(str(int(r)) for r in resists)
