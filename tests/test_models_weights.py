"""Weights that were trained elsewhere: which files, names and prefixes are read, and what is refused."""

from __future__ import annotations

import sys
import types
from collections import OrderedDict
from importlib.util import find_spec

import pytest
import torch
from their_nets import TheirPreActResNet18, TheirWideResNet, at_random
from torch import nn

from ham_kernels import models
from ham_kernels.common import checks
from ham_kernels.common.troubles import HamWarning
from ham_kernels.models.keys import to_theirs
from ham_kernels.models.weights import brought, lay, read_weights

THEIRS = {
    "preact_resnet18": (lambda: TheirPreActResNet18(True), lambda **how: models.create("preact_resnet18", 10, **how)),
    "preact_resnet18_kuangliu": (
        lambda: TheirPreActResNet18(False),
        lambda **how: models.create("preact_resnet18_kuangliu", 10, **how),
    ),
    "preact_resnet18_wong": (
        lambda: TheirPreActResNet18(False, raw=True),
        lambda **how: models.create("preact_resnet18_wong", 10, **how),
    ),
    "wide": (lambda: TheirWideResNet(16, 2), lambda **how: models.WideResNet(16, 2, **how)),
}


def close(a: nn.Module, b: nn.Module, x: torch.Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(a.eval()(x), b.eval()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", THEIRS)
def test_names_of_the_field_both_ways(name, seed):
    theirs, make = at_random(THEIRS[name][0]()), THEIRS[name][1]
    ours, x = make(), torch.rand(2, 3, 16, 16)
    assert lay(ours, theirs.state_dict(), source="F") == []
    close(ours, theirs, x)
    back = THEIRS[name][0]()
    found = back.load_state_dict(to_theirs(ours, ours.state_dict()), strict=False)
    assert not found.unexpected_keys
    assert all(key.startswith("sub_block1.") for key in found.missing_keys)
    close(back, theirs, x)


def test_normalisation_stays_ours_on_the_way_out(seed):
    ours = models.create("preact_resnet18", 10, mean=[0.4] * 3, std=[0.2] * 3)
    assert to_theirs(ours, ours.state_dict()).keys() == TheirPreActResNet18(True).state_dict().keys()
    with pytest.raises(TypeError, match="names: SmallCNN has none of the field's; only PreActResNet18 and WideResNet"):
        to_theirs(models.SmallCNN(), {})


def prefixed(state: dict, prefix: str) -> dict:
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model.", "net.module."])
def test_prefixes(prefix, seed):
    one, two = at_random(models.SmallCNN(3, 4)), models.SmallCNN(3, 4)
    lay(two, brought(prefixed(one.state_dict(), prefix)).state, source="F")
    close(one, two, torch.rand(3, 3, 8, 8))


def test_an_average_of_torch_and_a_model_with_a_part_called_module(seed):
    one, two = at_random(models.SmallCNN(3, 4)), models.SmallCNN(3, 4)
    lay(two, torch.optim.swa_utils.AveragedModel(one).state_dict(), source="F")
    close(one, two, torch.rand(3, 3, 8, 8))
    wrapped = nn.Sequential()
    wrapped.module = models.SmallCNN(3, 4)
    lay(wrapped, nn.Sequential(OrderedDict(module=one)).state_dict(), source="F")
    close(wrapped, one, torch.rand(3, 3, 8, 8))


@pytest.mark.parametrize("names", [("mean", "std"), ("mu", "sigma"), ("normalize.mean", "normalize.std")])
def test_a_normalisation_among_the_weights_is_told(names, seed):
    """The model's own of that file, and of ours by `create`."""
    theirs = at_random(TheirPreActResNet18(True))
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    state = {names[0]: mean.view(1, 3, 1, 1), names[1]: std.view(1, 3, 1, 1), **prefixed(theirs.state_dict(), "model.")}
    found = brought(state)
    assert found.mean == pytest.approx(mean.tolist())
    assert found.std == pytest.approx(std.tolist())
    ours, x = models.create("preact_resnet18", 10, mean=found.mean, std=found.std), torch.rand(2, 3, 16, 16)
    lay(ours, found.state, source="F")
    close(ours, nn.Sequential(models.Normalize(mean.tolist(), std.tolist()), theirs), x)


def test_models_of_torchvision_behind_our_normalisation(seed):
    pytest.importorskip("torchvision")
    plain = at_random(models.create("resnet18", 5))
    ours = models.create("resnet18", 5, mean=[0.4] * 3, std=[0.2] * 3)
    for state in (plain.state_dict(), prefixed(plain.state_dict(), "1.")):
        lay(ours, state, source="F")
        close(ours[1], plain, torch.rand(2, 3, 32, 32))
    assert brought(ours.state_dict()).mean == pytest.approx([0.4] * 3)


def test_a_model_that_normalises_by_itself_keeps_its_own(seed):
    class Own(nn.Module):
        def __init__(self, mean: float):
            super().__init__()
            self.register_buffer("mean", torch.tensor([mean]))
            self.register_buffer("std", torch.tensor([0.5]))
            self.f = nn.Linear(4, 2)

    one, two = Own(0.25), Own(0.5)
    lay(two, brought(one.state_dict()).state, source="F")
    assert two.mean.item() == 0.25


def test_another_number_of_classes_is_a_new_head_only_where_asked(seed):
    one, two = at_random(models.SmallCNN(1, 10)), models.SmallCNN(1, 3)
    before = two[-1].weight.clone()
    with pytest.raises(
        ValueError, match=r"F: 12.weight has shape \(10, 256\), the model \(3, 256\): another width, or"
    ):
        lay(two, one.state_dict(), source="F")
    assert lay(two, one.state_dict(), source="F", new_head=True) == ["12.weight", "12.bias"]
    assert torch.equal(two[-1].weight, before)
    assert torch.equal(two[1].weight, one[1].weight)
    with pytest.raises(ValueError, match=r"F: 1.weight has shape \(32, 1, 3, 3\), the model \(16, 1, 3, 3\)"):
        lay(models.SmallCNN(1, 3, width=16), one.state_dict(), source="F", new_head=True)


def test_what_does_not_fit_is_named(seed):
    state = models.SmallCNN(1, 4).state_dict()
    wrong = {**{k: v for k, v in state.items() if not k.startswith("1.")}, "extra": torch.zeros(1)}
    with pytest.raises(
        ValueError, match=r"F: its weights are not those of this model: missing 1.weight; not known extra"
    ):
        lay(models.SmallCNN(1, 4), wrong, source="F")
    without = TheirPreActResNet18(False).state_dict()
    with pytest.raises(ValueError, match=r"missing 10.weight.* give --model preact_resnet18_kuangliu, or _wong"):
        lay(models.create("preact_resnet18", 10), without, source="F")
    state["1.weight"][0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"F: 1.weight holds NaN or infinite values"):
        lay(models.SmallCNN(1, 4), state, source="F")
    whole = {k: v.to(torch.int8) if k == "1.weight" else v for k, v in models.SmallCNN(1, 4).state_dict().items()}
    with pytest.raises(ValueError, match=r"F: 1.weight holds torch.int8, the model torch.float32; quantised"):
        lay(models.SmallCNN(1, 4), whole, source="F")


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight


def test_tied_weights_have_one_name_in_a_file(seed):
    theirs, ours = Tied(), Tied()
    lay(ours, {k: v for k, v in theirs.state_dict().items() if k != "b.weight"}, source="F")
    assert torch.equal(ours.b.weight, theirs.a.weight)
    assert torch.equal(ours.b.bias, theirs.b.bias)
    with pytest.raises(ValueError, match=r"F: .* missing b.bias"):
        lay(ours, {k: v for k, v in theirs.state_dict().items() if k != "b.bias"}, source="F")


class Extra(nn.Sequential):
    """Has a state that is no tensor."""

    extra = None

    def get_extra_state(self):
        return {"n": self.extra}

    def set_extra_state(self, state):
        self.extra = state["n"]


def test_a_state_that_is_no_tensor_goes_along(tmp_path, seed):
    theirs, ours = Extra(nn.Linear(4, 4)), Extra(nn.Linear(4, 4))
    theirs.extra = 3
    torch.save(theirs.state_dict(), tmp_path / "a.pt")
    lay(ours, read_weights(tmp_path / "a.pt").state, source="F")
    assert ours.extra == 3
    assert torch.equal(ours[0].weight, theirs[0].weight)
    checks.state_fits("ours", ours, theirs.state_dict())
    with pytest.raises(ValueError, match=r"1 entries differ, the first is _extra_state: missing"):
        checks.state_fits("ours", ours, nn.Sequential(nn.Linear(4, 4)).state_dict())


# ---------------------------------------------------------------- files
class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('ran')",))


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "net", "anything"])
def test_files_as_they_are_written(tmp_path, key, seed):
    state = models.SmallCNN(1, 4).state_dict()
    torch.save({"epoch": 3, key: state, "optimizer": {"lr": 0.1}}, tmp_path / "a.pt")
    torch.save(state, tmp_path / "b.pt")
    for name in ("a.pt", "b.pt"):
        found = read_weights(tmp_path / name).state
        assert all(torch.equal(found[k], v) for k, v in state.items())


def test_files_of_safetensors(tmp_path, seed):
    save = pytest.importorskip("safetensors.torch").save_file
    state = models.SmallCNN(1, 4).state_dict()
    save(state, tmp_path / "a.safetensors")
    assert read_weights(tmp_path / "a.safetensors").state.keys() == state.keys()
    (tmp_path / "b.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"checkpoint: .*b.safetensors is no file of safetensors"):
        read_weights(tmp_path / "b.safetensors")


def test_an_entry_by_its_name(tmp_path):
    last, best = {"w": torch.zeros(1)}, {"w": torch.ones(1)}
    torch.save({"last": last, "best": best, "epoch": 1}, tmp_path / "a.pt")
    assert read_weights(tmp_path / "a.pt", "best").state["w"] == 1
    with pytest.raises(ValueError, match=r"a.pt holds several state_dicts, last, best; name one by --checkpoint-key"):
        read_weights(tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"checkpoint_key: .*a.pt has no entry 'ema'; it holds last, best, epoch"):
        read_weights(tmp_path / "a.pt", "ema")
    with pytest.raises(ValueError, match=r"checkpoint_key: 'epoch' of .*a.pt is no state_dict"):
        read_weights(tmp_path / "a.pt", "epoch")


def test_the_usual_one_of_several_entries_is_named(tmp_path):
    torch.save({"model": {"w": torch.zeros(1)}, "ema": {"w": torch.ones(1)}}, tmp_path / "a.pt")
    with pytest.warns(HamWarning, match=r"a.pt holds model, ema; model is taken"):
        assert read_weights(tmp_path / "a.pt").state["w"] == 0


def test_no_code_of_a_file_runs(tmp_path):
    torch.save({"state_dict": {"w": torch.zeros(1)}, "more": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "text.pt").write_text("no checkpoint at all")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.pt")
    for name in ("evil.pt", "text.pt"):
        with pytest.raises(
            ValueError, match=f"checkpoint: .*{name} was not written by torch.save, or holds other objects"
        ):
            read_weights(tmp_path / name)
    with pytest.raises(ValueError, match=r"empty.pt is no file of torch.save"):
        read_weights(tmp_path / "empty.pt")
    with pytest.raises(ValueError, match=r"list.pt holds no state_dict"):
        read_weights(tmp_path / "list.pt")
    with pytest.raises(FileNotFoundError, match=r"checkpoint: .*nowhere.pt is not a file"):
        read_weights(tmp_path / "nowhere.pt")


# ---------------------------------------------------------------- names of others
def test_timm_by_name(seed):
    pytest.importorskip("timm")
    model = models.create("timm:resnet10t", 4, channels=1, mean=[0.5], std=[0.2])
    assert model.eval()(torch.rand(2, 1, 32, 32)).shape == (2, 4)
    with pytest.raises(ValueError, match="name: got 'timm:resnet10tt'; close are resnet10t"):
        models.create("timm:resnet10tt", 4)


def test_robustbench_by_name(monkeypatch, seed):
    """Its package fetches from Google Drive: a stand-in tells what it is asked for."""
    asked = []

    def load_model(name, **how):
        asked.append((name, how))
        if name == "Nobody":
            raise KeyError(name)
        if name == "Far":
            raise OSError("no network")
        return models.SmallCNN(3, 10)

    package, utils = types.ModuleType("robustbench"), types.ModuleType("robustbench.utils")
    utils.load_model = load_model
    monkeypatch.setitem(sys.modules, "robustbench", package)
    monkeypatch.setitem(sys.modules, "robustbench.utils", utils)
    models.create("robustbench:Rice2020Overfitting", 10)
    models.create("robustbench:cifar100/L2/Some", 100)
    assert asked == [
        ("Rice2020Overfitting", {"dataset": "cifar10", "threat_model": "Linf"}),
        ("Some", {"dataset": "cifar100", "threat_model": "L2"}),
    ]
    with pytest.raises(ValueError, match="name: RobustBench has no 'Nobody' for cifar10, Linf"):
        models.create("robustbench:Nobody", 10)
    with pytest.raises(FileNotFoundError, match=r"models/cifar10/Linf/Far.pt cannot be downloaded \(no network\)"):
        models.create("robustbench:Far", 10)
    with pytest.raises(ValueError, match="it must be NAME or DATASET/THREAT/NAME"):
        models.create("robustbench:L2/Some", 10)


def test_robustbench_is_imported_without_what_loading_does_not_use(tmp_path, monkeypatch):
    """Its package on PyPI imports AutoAttack by another name than PyPI's, and a module that setuptools has no more."""
    pytest.importorskip("pyautoattack")
    package = tmp_path / "robustbench"
    package.mkdir()
    imports = "import pkg_resources\nfrom autoattack import AutoAttack\nfrom autoattack.state import EvaluationState\n"
    (package / "__init__.py").write_text(imports)
    (package / "utils.py").write_text("from torch import nn\ndef load_model(name, **how): return nn.Linear(1, 1)\n")
    for name in [name for name in sys.modules if name.split(".")[0] in ("robustbench", "autoattack", "pkg_resources")]:
        monkeypatch.delitem(sys.modules, name)
    missing = {"autoattack", "pkg_resources"} - {name for name in ("autoattack", "pkg_resources") if find_spec(name)}
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert isinstance(models.create("robustbench:Some", 10), nn.Linear)
        assert not missing & set(sys.modules)
    finally:
        for name in ("robustbench", "robustbench.utils"):
            sys.modules.pop(name, None)


def test_functions_of_the_user(tmp_path, monkeypatch):
    (tmp_path / "nets_of_mine.py").write_text(
        "from torch import nn\ndef make(): return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))\nnumber = 3\n"
        "def wrong(): return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    assert models.create("nets_of_mine:make", 3, channels=1)(torch.rand(2, 1, 4, 4)).shape == (2, 3)
    for name, error, says in [
        ("nets_of_mine:number", ValueError, "nets_of_mine:number is no function"),
        ("nets_of_mine:wrong", TypeError, "nets_of_mine:wrong gave int; it must be a torch.nn.Module"),
        ("no_such_module:make", ImportError, "no_such_module cannot be imported"),
        (":make", ValueError, "got ':make'; it must be MODULE:FUNCTION"),
        ("object:Net", ValueError, "object:Net was given as an object, and is made by no name"),
    ]:
        with pytest.raises(error, match=f"name: {says}"):
            models.create(name, 3)
