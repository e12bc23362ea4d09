"""Settings: presets, TOML, bounds, what is wrong with bad ones, and that they cover what the trainers take."""

from __future__ import annotations

import dataclasses
import inspect
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import Annotated

import pytest
from annotated_types import Ge, Gt, Le, Lt
from nets import sgd, small_cnn

import ham_kernels as ham
from ham_kernels.commands.flags import parse_train
from ham_kernels.common import field_types
from ham_kernels.data.table import SETS
from ham_kernels.engine.options import SWITCHES, EngineOptions
from ham_kernels.methods.registry import class_of
from ham_kernels.runs.config_file import from_toml, merge, method_of, to_dict, to_toml
from ham_kernels.runs.judge_settings import EvaluateSettings
from ham_kernels.runs.presets import PRESETS, preset, rescaled
from ham_kernels.runs.settings import TrainSettings, lr_factor


def test_every_data_set_has_a_preset_that_is_sound():
    assert set(PRESETS) == set(SETS)
    for name, settings in PRESETS.items():
        settings.check()
        assert settings.data.dataset == name
        assert settings.data.augment == SETS[name].augment


@pytest.mark.parametrize(
    ("name", "start", "screen", "lr"),
    [("cifar10", 50, 3, 0.1), ("cifar100", 60, 3, 0.1), ("svhn", 50, 5, 0.01), ("imagenette32", 50, 3, 0.1)],
)
def test_presets_are_the_papers(name, start, screen, lr):
    s = preset(name)
    assert (s.attack.eps, s.attack.step_size, s.attack.steps) == (0.031, 0.007, 10)
    assert (s.method.start_epoch, s.method.screen_steps, s.optim.epochs) == (start, screen, 120)
    assert (s.optim.lr, s.optim.momentum, s.optim.weight_decay, s.data.batch_size) == (lr, 0.9, 2e-4, 128)
    assert s.model.name == "preact_resnet18"
    assert s.model.normalize == (name == "cifar10")
    factors = {e: lr_factor(s.optim, e) for e in (1, 59, 60, 89, 90, 109, 110, 120)}
    expected = {1: 1, 59: 1, 60: 0.1, 89: 0.1, 90: 0.01, 109: 0.01, 110: 0.005, 120: 0.005}
    assert factors == pytest.approx(expected)


def test_imagenet_is_trained_as_the_field_does():
    s = preset("imagenet")
    assert (s.data.dataset, s.model.name, s.model.normalize) == ("imagenet", "resnet50", True)
    assert (s.attack.eps, s.attack.step_size, s.attack.steps) == (4 / 255, 8 / 3 / 255, 3)
    assert (s.method.name, s.method.screen_steps) == ("ham", 1)


def test_fewer_epochs_keep_the_shape_of_the_course():
    s = preset("cifar10", epochs=30)
    assert (s.method.start_epoch, s.optim.milestones, s.optim.epochs) == (13, (16, 23, 28), 30)
    assert rescaled(preset("cifar10"), 120) == preset("cifar10")
    for epochs in (1, 2, 3):
        preset("cifar10", epochs).check()


@pytest.mark.parametrize("schedule", ["cosine", "one_cycle"])
def test_smooth_schedules(schedule):
    optim = dataclasses.replace(preset("cifar10").optim, schedule=schedule, epochs=50)
    factors = [lr_factor(optim, e) for e in range(1, 51)]
    assert all(0 < f <= 1 for f in factors)
    assert factors[-1] < 0.05
    peak = factors.index(max(factors))
    assert peak == (0 if schedule == "cosine" else 20)
    assert factors[:peak] == sorted(factors[:peak])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)


def test_adamw_has_a_learning_rate_of_its_own(tmp_path):
    assert preset("svhn").optim.lr == parse_train(["--dataset", "svhn"]).settings.optim.lr == 0.01
    told = parse_train(["--dataset", "svhn", "--optimizer", "adamw"]).settings.optim
    assert (told.optimizer, told.lr) == ("adamw", 1e-3)
    assert parse_train(["--optimizer", "adamw", "--lr", "0.02"]).settings.optim.lr == 0.02
    (tmp_path / "c.toml").write_text('[optim]\noptimizer = "adamw"')
    assert parse_train(["--config", str(tmp_path / "c.toml")]).settings.optim.lr == 1e-3
    (tmp_path / "c.toml").write_text('[optim]\noptimizer = "adamw"\nlr = 0.003\nadam_betas = [0.9, 0.95]')
    told = parse_train(["--config", str(tmp_path / "c.toml")]).settings.optim
    assert (told.lr, told.adam_betas) == (0.003, (0.9, 0.95))
    (tmp_path / "c.toml").write_text("[optim]\nlr = 0.05")
    with pytest.raises(ValueError, match=r"lr: .*c\.toml has 0\.05, for sgd; give --lr for adamw"):
        parse_train(["--config", str(tmp_path / "c.toml"), "--optimizer", "adamw"])
    told = parse_train(["--config", str(tmp_path / "c.toml"), "--optimizer", "adamw", "--lr", "0.001"])
    assert told.settings.optim.lr == 0.001
    for bad, message in (
        ({"optimizer": "adamw", "adam_betas": (0.9,)}, r"adam_betas: got \(0.9,\); it must be two numbers"),
        ({"optimizer": "adamw", "adam_betas": (0.9, 1.0)}, "adam_betas: got 1.0; it must be >= 0 and below 1"),
        ({"adam_eps": 1e-4}, "adam_eps: got 0.0001, which has no effect with optimizer=sgd"),
        ({"optimizer": "adamw", "momentum": 0.5}, "momentum: got 0.5, which has no effect with optimizer=adamw"),
        ({"grad_clip": -1.0}, "grad_clip: got -1.0; it must be >= 0"),
        ({"optimizer": "adam"}, "optim.optimizer: got 'adam'; allowed are 'sgd', 'adamw'"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(preset("digits"), optim=replace(preset("digits").optim, **bad)).check()


def test_settings_are_what_the_trainer_takes():
    """Attack, engine and what a run tells: each is an argument of the trainer, by the same name."""
    taken = inspect.signature(ham.Trainer.__init__).parameters
    told = {f.name for section in (TrainSettings().attack, TrainSettings().engine) for f in dataclasses.fields(section)}
    told |= {"ema_decay", "precision", "seed", "warm_up", "natural_epochs", "grad_clip", "loss_weights"}
    assert told == set(taken) - {"self", "model", "optimizer", "method", "device", "teacher", "group", "rebalance"}


def test_ham_from_flat_arguments():
    """HAMTrainer takes every field of HAM, and every argument of Trainer."""
    others = {
        "start_epoch": 2, "easy": "stop", "screen_steps": 2, "screen": "one_step", "rows": "random", "round_to": 4,
        "freeze_bn": True, "reweight": False, "lam": 2.0, "step_sizes": (1.0, 0.5, 0.25), "group": 2,
        "group_updates": "one", "loss": "boosted_ce", "label_smoothing": 0.1, "class_weights": "chi2",
        "class_strength": 0.3, "class_memory": 0.5, "class_from": 3, "awp": 0.01, "gate": 0.1, "trust": 0.5,
        "eps_factor": 1.25,
    }  # fmt: skip
    for told in (others, {"bn_rows": "all"}, {"early_drop": False}):
        wanted = ham.methods.HAM(**told)
        model = small_cnn()
        trainer = ham.HAMTrainer(model, sgd(model), **dataclasses.asdict(wanted), warm_up="n_fgsm", winograd="off")
        assert trainer.method == wanted
    default = ham.methods.HAM()
    assert all(getattr(default, name) != value for name, value in others.items())
    kept = ham.HAMTrainer(model, sgd(model), early_drop=False, reweight=False, awp=0.01, class_weights="chi2").method
    assert kept == ham.methods.PGDAT(awp=0.01, class_weights="chi2")
    assert others.keys() | {"bn_rows", "early_drop"} == {f.name for f in dataclasses.fields(default)}


@pytest.mark.parametrize("name", SWITCHES)
def test_engine_options_reach_the_trainer(name):
    for choice, wanted in (("off", False), ("on", True), ("require", "require")):
        told = merge(TrainSettings(), {"engine": {name: choice}}).engine
        options = EngineOptions(**dataclasses.asdict(told))
        assert getattr(options, name) == wanted
        assert all(getattr(options, o) is False for o in SWITCHES if o != name)


def test_a_method_that_starts_late_takes_its_share_of_the_course_of_one_that_does_not(tmp_path):
    """Of HAM's 120 epochs 50 to 120 mine; one that has a start keeps it."""
    (tmp_path / "c.toml").write_text('[method]\nname = "trades"\n[optim]\nepochs = 60')
    for told, start in ((["--epochs", "24"], 11), ([], 25), (["--epochs", "1"], 1), (["--start-epoch", "7"], 7)):
        wanted = parse_train(["--config", str(tmp_path / "c.toml"), "--method", "ham", *told]).settings
        wanted.check()
        assert wanted.method.start_epoch == start


def test_a_method_is_named_in_toml(tmp_path):
    (tmp_path / "c.toml").write_text('[method]\nname = "trades"\nbeta = 3\nearly_drop = true')
    read = from_toml(tmp_path / "c.toml", preset("svhn")).method
    assert read == ham.methods.TRADES(beta=3.0, early_drop=True, screen_steps=5)  # M is the preset's
    (tmp_path / "c.toml").write_text('[method]\nname = "trades"\nbeta = 3')
    read = from_toml(tmp_path / "c.toml", TrainSettings()).method
    assert read == ham.methods.TRADES(beta=3.0)
    assert isinstance(read.beta, float)
    assert not merge(preset("svhn"), {"method": {"name": "pgd_at"}}).method.mines
    with pytest.raises(ValueError, match="method: got 'HAM'; allowed are 'pgd_at', 'ham', 'fair', 'trades', "):
        merge(preset("digits"), {"method": {"name": "HAM"}})
    with pytest.raises(TypeError, match=r"method\.name: got 3"):
        merge(preset("digits"), {"method": {"name": 3}})


@pytest.mark.parametrize("name", ham.methods.names())
def test_an_unknown_key_names_the_methods_own(name, tmp_path):
    own = [f.name for f in dataclasses.fields(class_of(name))]
    assert ("beta" in own) == (name in ("trades", "mart", "cfa", "dafa", "wat", "fsr", "frl", "mail", "bat", "fat"))
    assert ("noise" in own) == (name == "n_fgsm")
    (tmp_path / "c.toml").write_text(f'[method]\nname = "{name}"\nlambda = 1.0')
    with pytest.raises(ValueError, match=r"c\.toml: ") as error:
        from_toml(tmp_path / "c.toml", preset("digits"))
    assert str(error.value).endswith(f": method.lambda: is no setting of {name}; allowed are {', '.join(own)}")


# What version 0.1.0 wrote for every method, at commit 36ad03f.
OLD_METHOD = """
[method]
name = "{name}"
screen_steps = 5
start_epoch = 9
lam = 2.0
reweight = {mines}
early_drop = true
rows = "random"
freeze_bn = true
bn_rows = "hard"
screen = "one_step"
group = 2
group_updates = "one"
round_to = 32
"""


@pytest.mark.parametrize("mines", ["true", "false"])
def test_an_old_config_of_pgd_at_is_plain_pgd_at(mines, tmp_path):
    """It listed HAM's switches, which had no effect."""
    path = tmp_path / "config.toml"
    path.write_text(OLD_METHOD.format(name="pgd_at", mines=mines))
    assert from_toml(path, TrainSettings()) == TrainSettings(method=ham.methods.PGDAT(start_epoch=9))
    path.write_text(OLD_METHOD.format(name="ham", mines=mines))
    assert from_toml(path, TrainSettings()).method == ham.methods.HAM(
        start_epoch=9, screen_steps=5, lam=2.0, reweight=mines == "true", rows="random", freeze_bn=True,
        screen="one_step", group=2, group_updates="one", round_to=32,
    )  # fmt: skip


def test_a_file_without_a_name_is_of_the_flags_method(tmp_path):
    (tmp_path / "c.toml").write_text("[method]\nbeta = 3\n")
    told = ["--config", str(tmp_path / "c.toml")]
    assert parse_train([*told, "--method", "trades"]).settings.method.beta == 3.0
    with pytest.raises(ValueError, match=r"method\.beta: is no setting of ham"):
        parse_train(told)
    (tmp_path / "c.toml").write_text(to_toml(preset("digits")))
    assert not parse_train([*told, "--method", "pgd_at"]).settings.method.mines  # HAM's switches stay HAM's


def test_pgd_at_of_a_time_when_hams_switches_stood_beside_it():
    hams = {"screen_steps": 3, "start_epoch": 9, "lam": 1.0, "reweight": True, "early_drop": True, "rows": "hard"}
    assert method_of({"name": "pgd_at", **hams}) == ham.methods.PGDAT(start_epoch=9)
    assert method_of({"name": "pgd_at", "early_drop": True}).early_drop
    assert method_of({"name": "pgd_at", **hams, "easy": "stop"}).mines
    assert method_of({"name": "ham", **hams}) == ham.methods.HAM(start_epoch=9)


def test_a_run_of_a_time_when_fair_had_fewer_switches():
    """Its config.toml has every switch that there was: it neither trusted rows nor trained at another eps."""
    was = ham.methods.Fair(loss="boosted_ce", class_strength=None, trust=0.0, eps_factor=1.0)
    section = to_dict(dataclasses.replace(TrainSettings(), method=was))["method"]
    before = {name: value for name, value in section.items() if name not in ("trust", "eps_factor")}
    assert method_of(before) == was
    assert was.describe() == "fair (trust 0, boosted CE, strength None, trained at 1 ε)"
    assert method_of({"name": "fair", "fast": True}) == ham.methods.Fair(fast=True)  # as a user writes it


@pytest.mark.parametrize(
    ("argv", "shown", "hidden"),
    [
        ([], "--lam", "--beta"),
        (["--method", "ham"], "--lam", "--beta"),
        (["--method=trades"], "--beta", "--noise"),
        (["--method", "trades"], "--beta", "--noise"),
        (["--method", "n_fgsm"], "--noise", "--beta"),
    ],
)
def test_help_shows_the_flags_of_one_method_without_torch(argv, shown, hidden):
    code = f"""
import sys
from ham_kernels.commands.cli import main
try:
    main(["train", *{argv!r}, "--help"])
except SystemExit:
    pass
print("torch" in sys.modules)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown in out
    assert hidden not in out
    assert "One of pgd_at, ham, fair, trades" in " ".join(out.replace("│", " ").split())
    assert out.split()[-1] == "False"


@pytest.mark.parametrize("dataset", PRESETS)
def test_toml_gives_back_what_was_written(dataset, tmp_path):
    s = merge(preset(dataset), {"run": {"ema_decay": False, "label": "mine"}, "data": {"path": "x.tar"}})
    assert s.run.ema_decay is None
    (tmp_path / "c.toml").write_text(to_toml(s))
    assert from_toml(tmp_path / "c.toml", TrainSettings()) == s


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[optim]\nepochs = '3'", r"optim.epochs: got '3' \(str\); it must be int"),
        ("[optim]\nepochs = true", r"optim.epochs: got True"),
        ("[optim]\nepoch = 3", "optim.epoch: is no setting; allowed are epochs"),
        ("[optimiser]\nlr = 1", "optimiser: is no section; allowed are data"),
        ("data = 3", "data: got 3; it is a section"),
        ("[attack]\nnorm = 'l1'", "attack.norm: got 'l1'; allowed are 'linf', 'l2'"),
        ("[optim]\nmilestones = 3", "optim.milestones: got 3; it must be a list"),
        ("[data]\npath = ''", "data.path: got an empty string"),
        ("[run]\nweights = ''", "run.weights: got an empty string"),
        ("[optim", "config: "),
    ],
)
def test_bad_toml_names_file_and_key(text, message, tmp_path):
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        from_toml(tmp_path / "c.toml", TrainSettings())
    assert "c.toml" in str(error.value)


def test_missing_toml():
    with pytest.raises(FileNotFoundError, match=r"config: nowhere\.toml is not a file"):
        from_toml("nowhere.toml", TrainSettings())


# ---------------------------------------------------------------- bounds
@dataclass(frozen=True)
class Bounded:
    count: Annotated[int, Ge(1)] = 1
    share: Annotated[float, Gt(0.5), Le(1)] = 1.0
    decay: Annotated[float | None, Ge(0), Lt(1)] = None
    sizes: Annotated[tuple[float, ...], Gt(0)] = ()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, "count: got 0; it must be >= 1"),
        ({"share": 0.5}, "share: got 0.5; it must be above 0.5 and <= 1"),
        ({"share": 1.5}, "share: got 1.5; it must be above 0.5 and <= 1"),
        ({"share": float("nan")}, "share: got nan; it must be finite"),
        ({"decay": 1}, "decay: got 1.0; it must be >= 0 and below 1"),
        ({"decay": -0.5}, "decay: got -0.5; it must be >= 0 and below 1"),
        ({"sizes": (1.0, 0.0)}, "sizes: got 0.0; it must be above 0"),
        ({"sizes": [float("inf")]}, "sizes: got inf; it must be finite"),
    ],
)
def test_bounds_come_from_the_fields(values, message):
    with pytest.raises(ValueError, match=rf"^{re.escape(message)}$"):
        field_types.check(Bounded(**values))


def test_values_at_their_bounds():
    for values in ({}, {"share": 1}, {"decay": 0.0}, {"decay": 0.999}, {"sizes": (1e-9,)}, {"count": 10**9}):
        field_types.check(Bounded(**values))


AT_LEAST = {
    "data": {"train_images": 1, "test_images": 1, "val_images": 0, "batch_size": 1, "workers": 0, "size": 1},
    "attack": {"eps": 0.0, "step_size": 0.0, "steps": 1},
    "optim": {"epochs": 1, "lr": 0.0, "momentum": 0.0, "weight_decay": 0.0},
    "warm_up": {"natural_epochs": 0},
    "run": {"seed": 0, "checkpoint_minutes": 0.0, "ema_decay": 0.0},
    "evaluate": {
        "images": 1, "restarts": 1, "batch_size": 1, "seed": 0, "masking_images": 2, "analysis_images": 1, "eps": 0.0,
        "step_size": 0.0,
    },
}  # fmt: skip
OF_METHODS = {"start_epoch": 1, "screen_steps": 1, "lam": 0.0, "group": 1, "round_to": 1}
OWN = {"trades": {"beta": 0.0}, "n_fgsm": {"noise": 0.0}}


@pytest.mark.parametrize("where", [*AT_LEAST, *ham.methods.names()])
def test_each_setting_has_its_bound(where):
    if where in AT_LEAST:
        settings = EvaluateSettings() if where == "evaluate" else getattr(TrainSettings(), where)
        bounds = AT_LEAST[where]
    else:
        settings, bounds = class_of(where)(), OF_METHODS | OWN.get(where, {})
    for name, low in bounds.items():
        field_types.check(replace(settings, **{name: low}))
        with pytest.raises(ValueError, match=rf"^{name}: got {low - 1}; it must be >= {int(low)}\b"):
            field_types.check(replace(settings, **{name: low - 1}))


@pytest.mark.parametrize("threshold", [0.5, 1.01])
def test_threshold_of_confidence(threshold):
    with pytest.raises(ValueError, match=rf"^threshold: got {threshold}; it must be above 0\.5 and <= 1$"):
        EvaluateSettings(threshold=threshold).check()
    EvaluateSettings(threshold=1.0).check()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim": {"epochs": 0}}, "epochs: got 0; it must be >= 1"),
        ({"data": {"batch_size": 0}}, "batch_size: got 0"),
        ({"optim": {"momentum": 1.0}}, "momentum: got 1.0; it must be >= 0 and below 1"),
        ({"optim": {"lr": float("inf")}}, "lr: got inf; it must be finite"),
        ({"run": {"ema_decay": 1.0}}, "ema_decay: got 1.0; it must be >= 0 and below 1"),
        ({"method": {"screen_steps": 10}}, "screen_steps: got 10 with steps=10; it must be less than steps"),
        ({"method": {"step_sizes": [1.0, 0.0]}}, "step_sizes: got 0.0; it must be above 0"),
        ({"warm_up": {"name": "ham"}, "method": {"name": "trades"}}, "warm_up: got 'ham'; it would mine"),
        ({"optim": {"lr_decay": [0.1]}}, "lr_decay: got 1 factors for 3 milestones"),
        ({"method": {"start_epoch": 121}}, "start_epoch: got 121 with epochs=120"),
        (
            {"method": {"name": "trades", "early_drop": True, "start_epoch": 121}, "warm_up": {"name": "trades"}},
            "start_epoch: got 121 with epochs=120, so trades would never start",
        ),
        ({"method": {"reweight": False, "early_drop": False}}, "method: ham without early_drop and reweight"),
        ({"method": {"freeze_bn": True, "bn_rows": "all"}}, "bn_rows: got 'all' with freeze_bn"),
        ({"run": {"val_attack": "autoattack"}}, "val_attack: got 'autoattack'"),
    ],
)
def test_unsound_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        merge(preset("cifar10"), changes).check()


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("optim", {"schedule": "foo"}, "optim.schedule: got 'foo'; allowed are 'step'"),
        ("run", {"best_by": "foo"}, "run.best_by: got 'foo'"),
        ("optim", {"epochs": "3"}, r"optim.epochs: got '3' \(str\); it must be int"),
        ("attack", {"eps": "0.1"}, "attack.eps: got '0.1'"),
        ("data", {"workers": True}, "data.workers: got True"),
        ("data", {"generated": ""}, "data.generated: got an empty string"),
        ("run", {"teacher": ""}, "run.teacher: got an empty string"),
    ],
)
def test_settings_of_python_are_checked_as_those_of_a_file(section, change, message):
    s = preset("digits")
    wrong = replace(s, **{section: replace(getattr(s, section), **change)})
    with pytest.raises((TypeError, ValueError), match=message):
        wrong.check()


def test_bad_settings_objects():
    with pytest.raises(TypeError, match="data: got 'digits'"):
        TrainSettings(data="digits").check()
    with pytest.raises(ValueError, match="part: got 'all'"):
        EvaluateSettings(part="all").check()
    with pytest.raises(TypeError, match="epochs: got '4'; it must be an integer"):
        preset("digits", epochs="4")
    EvaluateSettings(transfer_from="runs/other", eps=1).check()


def test_settings_and_flags_wait_for_no_torch():
    code = (
        "import sys, ham_kernels, ham_kernels.commands.cli, ham_kernels.runs.settings, ham_kernels.runs.presets, "
        "ham_kernels.commands.flags, ham_kernels.report; print('torch' in sys.modules, 'matplotlib' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["False", "False"]


def test_sections_are_all_dataclasses_with_help():
    """tyro shows the text under a field; those without one speak for themselves."""
    for f in dataclasses.fields(TrainSettings):
        section = getattr(TrainSettings(), f.name)
        assert dataclasses.is_dataclass(section)
        assert type(section).__doc__
    assert EvaluateSettings().attacks == ("clean", "fgsm", "pgd20", "cw20")


def test_train_takes_settings_only():
    with pytest.raises(TypeError, match="settings: got 'digits'; it must be TrainSettings"):
        ham.train("digits")
