"""`ham sweep methods` and `ham sweep frontier`: which runs they are made of, and how those are judged."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from runs_helper import TINY

from ham_kernels.commands import flags
from ham_kernels.commands import sweep as sweep_command
from ham_kernels.commands.experiments import FRONTIER, SCHEDULES, cells, planned
from ham_kernels.evaluation import autoattack
from ham_kernels.methods import names
from ham_kernels.methods.registry import class_of
from ham_kernels.report.comparing.sections import sections
from ham_kernels.report.reading.find_runs import read_runs
from ham_kernels.runs.folder import RunFolder
from ham_kernels.runs.presets import preset, rescaled

BASE = preset("digits")


def of(experiment, base=BASE):
    """({name without its seed: settings}, {name: why left out})."""
    found, left_out = planned(experiment, base, (0,))
    return {cell.name.removesuffix("-seed0"): cell.settings for cell in found}, left_out


def test_methods_are_all_of_the_registry_pgd_at_first():
    found, left_out = of("methods", replace(BASE, run=replace(BASE.run, teacher="RUN")))
    assert next(iter(found)) == "pgd_at"
    more = ("-jump", "-fast", "-long")
    plain = [s.method.name for name, s in found.items() if not name.endswith(more) and "-on-" not in name]
    assert sorted(plain) == sorted(name for name in names() if not class_of(name).tunes_only)
    assert found["cfa-on-pgd_at"].method.base == "pgd_at"  # what can be built on several is, on each
    jumping = {s.method.name for name, s in found.items() if name.endswith("-jump")}
    refused = {name.split("-")[0] for name in left_out}
    screening = {name for name in names() if class_of(name)().early_drop}
    assert jumping | refused | screening == set(names())
    assert not jumping & (refused | screening)
    assert {"pgd_at", "trades"} <= jumping
    assert {"natural", "fgsm_rs", "n_fgsm"} <= refused
    assert "give --from" in left_out["offsets"]
    assert "no attack" in left_out["natural-jump"]
    assert "nothing to screen" in left_out["n_fgsm-jump"]
    for settings in found.values():
        settings.check()


FAIR = ("pgd_at", "fair", "fair-fast", "fair-fast-long", "fair-jump")


def test_only_some_runs_by_name_or_pattern():
    found, left_out = planned("methods", BASE, (0, 1), only=("pgd_at", "fair", "fair-*", "natural-jump"))
    names_of_both = [f"{name}-seed{seed}" for seed in (0, 1) for name in FAIR]
    assert [cell.name for cell in found] == names_of_both
    assert list(left_out) == ["natural-jump"]
    assert set(map(repr, found)) < set(map(repr, cells("methods", BASE, (0, 1))))
    with pytest.raises(ValueError, match="only: 'FAIR' is no run of methods, which has pgd_at, "):
        planned("methods", BASE, (0,), only=("pgd_at", "FAIR"))


def test_runs_are_named_as_in_the_other_experiments():
    """So that one folder holds them all, and none is trained twice."""
    methods, papers = of("methods")[0], of("paper")[0]
    assert methods["ham-M3-lam1"] == papers["ham-M3-lam1"]
    assert methods["pgd_at"] == papers["pgd_at"] == of("frontier")[0]["pgd_at"]
    frontier = of("frontier")[0]
    shared = methods.keys() & frontier.keys()
    assert {name: methods[name] for name in shared} == {name: frontier[name] for name in shared}
    fast = [name for name in names() if hasattr(class_of(name)(), "fast")]
    assert {"pgd_at-jump", *(f"{name}-fast" for name in fast)} <= shared


def test_a_seed_is_a_whole_comparison():
    found = cells("frontier", BASE, (3, 1))
    assert found[0].name == "pgd_at-seed3"
    half = len(found) // 2
    assert {c.settings.run.seed for c in found[:half]} == {3}
    assert [c.name.replace("seed3", "seed1") for c in found[:half]] == [c.name for c in found[half:]]


def test_frontier_tries_schedules_and_screenings():
    found, _ = of("frontier")
    known = [name for name in FRONTIER if name in names()]
    for name in known:
        schedules = [s.method.schedule for called, s in found.items() if called.startswith(f"{name}-")]
        assert [sizes for sizes in schedules if sizes] == [*SCHEDULES, SCHEDULES[1]]
        screened = {easy: found[f"{name}-{easy}"].method for easy in ("drop", "stop", "jump")}
        for easy, method in screened.items():
            assert (method.early_drop, method.easy, method.start_epoch) == (True, easy, 1)
    assert len(found) == 9 * len(known)


def test_long_runs_take_the_forwards_of_pgd_at():
    for name, other in (("methods", "fair-fast"), ("frontier", "fair-fast"), ("frontier", "pgd_at-steps2-1-0.5")):
        found, _ = of(name)
        long, short, base = (found[called] for called in (f"{other}-long", other, "pgd_at"))
        assert rescaled(long, base.optim.epochs) == short
        total, whole = (s.optim.epochs * s.method.cost(s.attack.steps) for s in (long, base))
        assert whole == 23 * base.optim.epochs
        assert total == pytest.approx(0.95 * whole, abs=9 / 2)
        assert long.optim.milestones == rescaled(base, long.optim.epochs).optim.milestones


def test_what_a_budget_refuses_is_left_out():
    found, left_out = of("methods", replace(BASE, attack=replace(BASE.attack, norm="l2")))
    assert "fgsm_rs" not in found
    assert "linf" in left_out["fgsm_rs"]
    assert "trades-jump" in found
    short, left_out = of("methods", replace(BASE, attack=replace(BASE.attack, steps=3)))
    assert "less than steps" in left_out["trades-jump"]
    assert "trades" in short


def test_only_the_same_warm_up_is_shared():
    """A schedule of its own, or another loss, is PGD-AT's class still, and trains all its epochs."""
    found = of("frontier")[0] | of("methods")[0]
    shares = {name for name, settings in found.items() if sweep_command._starts_behind_pgd_at(settings)}
    assert {"pgd_at", "ham-M3-lam1"} <= shares
    assert not {name for name in shares if "-steps" in name or name.endswith("-jump")} & set(of("frontier")[0])
    assert not {"trades", "natural", "n_fgsm"} & shares
    changed = replace(found["pgd_at"], method=replace(found["pgd_at"].method, step_sizes=(1.0,)))
    assert not sweep_command._starts_behind_pgd_at(changed)


# ---------------------------------------------------------------- how they are judged
def parsed(*argv):
    return flags.parse_sweep([*argv, *TINY])


def test_methods_are_checked_for_masking_unless_told_otherwise():
    assert [parsed(e).masking for e in ("methods", "frontier", "ham", "cheaper")] == [True, True, False, False]
    assert not parsed("methods", "--no-masking").masking
    assert parsed("ham", "--masking").masking
    with pytest.raises(ValueError, match="masking_images: got 1"):
        sweep_command.sweep(parsed("methods", "--masking-images", "1", "--attacks", "clean"))


def test_autoattack_judges_methods_where_it_can(monkeypatch):
    monkeypatch.setattr(autoattack, "library", lambda: None)
    judged, said = sweep_command._judged_by(parsed("methods"))
    assert judged.attacks == ("clean", "pgd20", "cw20", "autoattack")
    assert said == "judged by clean, pgd20, cw20, autoattack"
    assert sweep_command._judged_by(parsed("ham"))[0].attacks == ("clean", "pgd20", "cw20")
    assert sweep_command._judged_by(parsed("methods", "--attacks", "pgd3"))[0].attacks == ("pgd3",)


def test_without_its_library_autoattack_is_left_out_and_that_is_said(monkeypatch):
    def missing():
        raise ImportError('attacks: "autoattack" needs torchattacks')

    monkeypatch.setattr(autoattack, "library", missing)
    judged, said = sweep_command._judged_by(parsed("frontier"))
    assert judged.attacks == ("clean", "pgd20", "cw20")
    assert said.endswith('AutoAttack, which is stronger, is left out: "autoattack" needs torchattacks')


def test_the_line_of_a_run_is_by_the_strongest_attack(tmp_path):
    """Not by the lowest number, which a weaker attack may have by chance, or on fewer images."""
    run = RunFolder.create(tmp_path / "run", BASE)
    told = {"clean": 0.9, "pgd20": 0.3, "cw20": 0.5, "autoattack": 0.4}
    judged = {name: {"accuracy": {"value": v}, "worst_class": {"value": v / 2}} for name, v in told.items()}
    (run.path / "evaluation").mkdir()
    (run.path / "evaluation" / "ema.json").write_text(json.dumps({"attacks": judged}))
    assert sweep_command._summary(run.path, ("clean", "pgd20", "cw20")) == "cw20 50.0 %, worst class 25.0 %"
    assert sweep_command._summary(run.path, ("pgd20", "autoattack")).startswith("autoattack 40.0 %")
    assert sweep_command._summary(run.path, ("clean",)).startswith("clean 90.0 %")


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("no_gpu")
def test_a_sweep_of_schedules_shares_no_warm_up_and_is_checked(tmp_path, one_thread, monkeypatch):
    """Its runs are begun behind no warm-up but PGD-AT's own; masking checks stand in each evaluation."""
    keep = ("pgd_at-seed0", "pgd_at-steps1-0.5-seed0")
    full = sweep_command.planned

    def two(*asked):
        found, left_out = full(*asked)
        return [cell for cell in found if cell.name in keep], left_out

    monkeypatch.setattr(sweep_command, "planned", two)
    wanted = parsed("frontier", "--attacks", "clean", "pgd2", "--masking-images", "8", "--out", str(tmp_path / "s"))
    assert sweep_command.sweep(wanted) == 0
    warm_up, plain, short = (
        [json.loads(line) for line in (tmp_path / "s" / path / "metrics.jsonl").read_text().splitlines()]
        for path in ("warm-ups/seed0", *keep)
    )
    assert plain[: len(warm_up)] == warm_up
    assert short[0]["loss"] != plain[0]["loss"]
    for name in keep:
        judged = json.loads((tmp_path / "s" / name / "evaluation" / "ema.json").read_text())
        assert judged["masking"]["n"] == 8
    (section,) = sections(read_runs([tmp_path / "s"]))
    assert not any("trained once per seed" in note for note in section.notes)
