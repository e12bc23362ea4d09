"""Models that were trained elsewhere: judged, kept, compared in a report, and begun with."""

from __future__ import annotations

import json

import pytest
import torch
from runs_helper import TINY
from torch import nn

import ham_kernels as ham
from ham_kernels import models, report
from ham_kernels.commands import cli, flags
from ham_kernels.commands import train as train_command
from ham_kernels.runs.folder import RunFolder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.usefixtures("no_gpu", "one_thread")]
FEW = ("--attacks", "clean", "fgsm", "--images", "60", "--no-masking", "--quiet")


@pytest.fixture(scope="module")
def run(tmp_path_factory, one_thread):
    out = tmp_path_factory.mktemp("commands") / "run"
    train_command.train(flags.parse_train([*TINY, "--method", "pgd_at"]).settings, out, quiet=True)
    cli.main(["evaluate", str(out), *FEW, "--weights", "last", "--no-analyses"])
    return out


@pytest.fixture
def checkpoint(run, tmp_path):
    """The run's last weights as an ordinary loop on two GPUs would have saved them."""
    state = ham.load_model(run, "last").state_dict()
    torch.save({"epoch": 1, "state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "theirs.pt")
    return tmp_path / "theirs.pt"


def attacks_of(folder) -> dict:
    return json.loads((folder / "evaluation/last.json").read_text())["attacks"]


def test_a_checkpoint_is_judged_as_the_run_it_came_from(run, checkpoint, tmp_path, capsys):
    out = tmp_path / "theirs"
    command = [
        "evaluate",
        "--model",
        "small_cnn",
        "--checkpoint",
        str(checkpoint),
        "--label",
        "TRADES",
        "--out",
        str(out),
    ]
    assert cli.main([*command, *FEW]) == 0
    ours, theirs = attacks_of(run), attacks_of(out)
    for attack in ("clean", "fgsm"):
        assert theirs[attack]["accuracy"] == ours[attack]["accuracy"]
        assert theirs[attack]["images_sha256"] == ours[attack]["images_sha256"]
    origin = json.loads((out / "origin.json").read_text())
    assert (origin["model"], origin["class"], origin["checkpoint"]) == ("small_cnn", "SmallCNN", str(checkpoint))
    # the same command adds to it, and so does `ham evaluate` of the folder
    assert cli.main([*command, *FEW[3:], "--attacks", "pgd2"]) == 0
    assert cli.main(["evaluate", str(out), "--attacks", "cw2", *FEW[3:], "--no-analyses"]) == 0
    assert attacks_of(out).keys() == {"clean", "fgsm", "pgd2", "cw2"}
    assert cli.main(["train", "--resume", str(out)]) == 2
    assert "trained elsewhere" in capsys.readouterr().err


def test_a_report_compares_it_with_runs(run, checkpoint, tmp_path):
    outs = [tmp_path / "theirs", tmp_path / "theirs2"]
    for label, out in zip(("TRADES", "MART"), outs, strict=True):
        source = ("--model", "small_cnn", "--checkpoint", str(checkpoint))
        cli.main(["evaluate", *source, "--label", label, "--out", str(out), *FEW])
    report.build([run, *outs], tmp_path / "report")
    data = json.loads((tmp_path / "report/data.json").read_text())
    assert len(data["sections"]) == 1
    section = data["sections"][0]
    assert [g["title"] for g in section["groups"]] == ["PGD-AT", "TRADES", "MART"]
    assert [g["time"]["mean"] is None for g in section["groups"]] == [False, True, True]
    clean = [g["accuracy"]["last"]["clean"]["average"]["mean"] for g in section["groups"]]
    assert clean[0] == clean[1] == clean[2]
    assert [note.split(" has ")[0] for note in section["notes"]] == ["The smallest class judged"]  # of 60 images
    assert [entry["missing"] for entry in data["runs"]] == [[], [], []]
    table = (tmp_path / "report/table.md").read_text().splitlines()
    row = next(line for line in table if line.startswith("| TRADES |"))
    assert row.endswith("| – |")  # its time
    page = (tmp_path / "report/index.html").read_text()
    assert "Settings of all that were trained here: " in page
    assert f"Weights: last weights (of epoch {data['runs'][0]['epoch']})." in page


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def forward(self, x):
        return self.f(x)


class Shifted(nn.Module):
    """Normalises by plain attributes, which are no weights."""

    def __init__(self, mean):
        super().__init__()
        self.net, self.mean = Net(), mean

    def forward(self, x):
        return self.net((x - self.mean) / 0.1)


def test_another_model_of_the_same_weights_is_refused(tmp_path, seed):
    how = {"attacks": ("clean",), "images": 40, "masking": False}
    first = Shifted(0.0)
    out = ham.adopt(first, tmp_path / "out", **how)
    ham.adopt(first, out, **how)
    mended = Shifted(0.5)
    mended.load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match=r"out: .* holds the verdict on another model"):
        ham.adopt(mended, out, **how)


class Pair(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :10], x


def test_a_model_that_returns_no_logits_leaves_no_folder(tmp_path):
    with pytest.raises(TypeError, match="model: returned tuple; it must return one tensor of logits"):
        ham.adopt(Pair(), tmp_path / "out", attacks=("clean",))
    assert not (tmp_path / "out").exists()


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, x):
        return self.net(torch.relu_(x))


def test_a_model_that_writes_into_its_images_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError, match=r"model: .* writes into its images; it must leave them"):
        ham.adopt(InPlace(), tmp_path / "out", attacks=("clean",))
    assert not (tmp_path / "out").exists()


class Extra(Net):
    """Has a state that is no tensor."""

    def get_extra_state(self):
        return {"n": 0}

    def set_extra_state(self, state):
        assert state == {"n": 0}


def test_a_state_that_is_no_tensor(tmp_path, seed):
    how, model = {"attacks": ("clean",), "images": 40, "masking": False}, Extra()
    out = ham.adopt(model, tmp_path / "out", **how)
    assert ham.adopt(model, out, **how) == out


def test_a_model_as_an_object(tmp_path, seed):
    net, how = Net().train(), {"images": 60, "masking": False}
    net.f.eval()
    out = ham.adopt(net, tmp_path / "net", attacks=("clean",), label="Mine", **how)
    assert (net.training, net.f.training) == (True, False)
    ham.adopt(net, out, attacks=["fgsm"], workers=1, root=str(tmp_path), **how)  # neither the name nor where images lie
    assert attacks_of(out).keys() == {"clean", "fgsm"}
    begun = RunFolder.open(out).settings()
    assert (begun.run.label, begun.data.workers) == ("Mine", 1)
    ham.adopt(net, out, attacks=["clean"], analyses=True, analysis_images=40, **how)
    assert [row["label"] for row in json.loads((out / "evaluation/last.json").read_text())["examples"]["rows"]] == [
        *range(10)
    ]
    assert (out / "evaluation/last.examples.npz").exists()
    found = ham.evaluate(net, loader_of_60(), ("clean",), eps=0.2, step_size=0.05)["clean"]
    assert attacks_of(out)["clean"]["accuracy"]["value"] == pytest.approx(found.accuracy)
    for make, says in [
        (lambda: ham.adopt(Net(), out, attacks=("clean",), **how), "out: .* holds other weights"),
        (lambda: ham.adopt(net, out, attacks=("clean",), eps=0.1, **how), "out: .* was begun with other settings"),
        (lambda: ham.adopt(net, tmp_path / "b", attacks=("bogus",), **how), "attacks: got 'bogus'"),
        (
            lambda: ham.adopt(nn.Sequential(nn.Flatten(), nn.Linear(64, 7)), tmp_path / "b", **how),
            r"gives \(2, 7\) for 2",
        ),
        (lambda: ham.adopt(net, tmp_path / "b", dataset="digit", **how), "dataset: got 'digit'"),
    ]:
        with pytest.raises(ValueError, match=says):
            make()
    with pytest.raises(TypeError, match="epsilon: is no setting of an adopted model; allowed are analyses, "):
        ham.adopt(net, tmp_path / "b", epsilon=0.1)
    with pytest.raises(TypeError, match="model: got str"):
        ham.adopt("net", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def loader_of_60():
    images = ham.data.load("digits").limit("test", 60)
    return ham.data.part_loader(images, "test", 60)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--model", "small_cnn"), "checkpoint: got None, but small_cnn alone has random weights"),
        (("--model", "small_cnn", "--checkpoint", "nowhere.pt"), "checkpoint: nowhere.pt is not a file"),
        (("--model", "small_cnn", "--checkpoint", "THEIRS", "--mean", "0.5"), "std: got None; give both"),
        (("--model", "small_cn", "--checkpoint", "THEIRS"), "model: got 'small_cn'; close are small_cnn"),
        (("--model", "preact_resnet18", "--checkpoint", "THEIRS"), "its weights are not those of this model: missing "),
        (("--model", "small_cnn", "--checkpoint", "THEIRS", "--out", "RUN"), "holds a training; give another folder"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_written(more, says, run, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    more = [{"THEIRS": str(checkpoint), "RUN": str(run)}.get(word, word) for word in more]
    before = sorted(p.name for p in run.iterdir())
    assert cli.main(["evaluate", *more, *FEW]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    assert sorted(p.name for p in run.iterdir()) == before


def test_a_normalisation_of_the_checkpoint_goes_before_the_model(tmp_path, seed):
    inner = models.SmallCNN(1, 10, mean=None, std=None).eval()
    state = {"mu": torch.tensor([0.3]), "sigma": torch.tensor([0.6])} | {
        f"model.{k}": v for k, v in inner.state_dict().items()
    }
    torch.save(state, tmp_path / "a.pt")
    cli.main(
        ["evaluate", "--model", "small_cnn", "--checkpoint", str(tmp_path / "a.pt"), "--out", str(tmp_path / "a"), *FEW]
    )
    model = ham.load_model(tmp_path / "a", "last")
    x = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(model(x), inner((x - 0.3) / 0.6), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- what a training begins with
def test_a_normalisation_is_told_in_one_flag_or_in_two(capsys):
    def model(*more):
        return flags.parse_evaluate(["--model", "resnet18", "--dataset", "cifar10", *more]).model

    mean, std = ["0.1", "0.2", "0.3"], ["0.4", "0.5", "0.6"]
    both = model("--normalize", *mean, *std)
    assert both == model("--mean", *mean, "--std", *std)
    assert (both.mean, both.std, both.normalize) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), False)
    assert model("--normalize", "--checkpoint", "F").normalize
    assert flags.parse_train(["--normalize", "0.5", "1/4", "--quiet"]).settings.model.std == (0.25,)
    assert cli.main(["evaluate", "--model", "resnet18", "--normalize", "0.1", "0.2", "0.3"]) == 2
    assert "normalize: got 0.1 0.2 0.3; give a mean, then a std" in capsys.readouterr().err


def test_a_training_begins_with_weights(run, checkpoint, tmp_path, capsys):
    for name, source in (("file", checkpoint), ("run", run)):
        wanted = flags.parse_train([*TINY, "--method", "natural", "--weights", str(source)])
        assert wanted.settings.optim.lr == pytest.approx(flags.parse_train([*TINY]).settings.optim.lr / 10)
        still = flags.parse_train([*TINY, "--method", "natural", "--weights", str(source), "--lr", "0"])
        trainer = train_command.train(still.settings, tmp_path / name)
        assert f"begins with the weights of {source}" in capsys.readouterr().out
        theirs = RunFolder(run).load_weights("last" if name == "file" else "ema")["model"]
        for key, p in trainer.model.named_parameters():
            assert torch.equal(p, theirs[key])
        checkpoint.unlink(missing_ok=True)  # what goes on has weights of its own
        train_command.resume(tmp_path / name, quiet=True)


def test_other_classes_get_a_new_head(tmp_path, seed, capsys):
    torch.save(models.SmallCNN(1, 4).state_dict(), tmp_path / "four.pt")
    settings = flags.parse_train([*TINY, "--method", "natural", "--weights", str(tmp_path / "four.pt")]).settings
    train_command.train(settings, tmp_path / "run")
    assert "new, for other classes: 12.weight, 12.bias" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--weights", "nowhere"), "weights: nowhere is not a file"),
        (("--weights", "."), "weights: . is no run folder"),
        (("--weights", "imagenet"), "weights: imagenet has none for small_cnn"),
        (("--weights", "wrong.pt"), "weights: wrong.pt: its weights are not those of this model"),
    ],
)
def test_weights_that_do_not_fit_leave_no_folder(more, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save({"w": torch.zeros(1)}, "wrong.pt")
    assert cli.main(["train", *TINY, *more, "--out", "run"]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_imagenet_weights_without_a_network_name_the_place(tmp_path, monkeypatch, capsys):
    models_of = pytest.importorskip("torchvision").models
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    assert (
        cli.main(["train", *TINY, "--model", "resnet18", "--weights", "imagenet", "--out", str(tmp_path / "run")]) == 2
    )
    name = models_of.get_model_weights("resnet18").DEFAULT.url.rsplit("/", 1)[-1]
    assert f"put it at {tmp_path / 'hub/checkpoints' / name}" in capsys.readouterr().err
