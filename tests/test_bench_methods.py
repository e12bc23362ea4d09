"""The benchmark of methods: what steps cost, whether loops agree with them, and what follows from given seconds."""

from __future__ import annotations

import builtins
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_methods  # noqa: E402
from methods import loops, steps, table  # noqa: E402
from readme.output import markdown  # noqa: E402
from training.steps import CLASSES, labels_of, model_of  # noqa: E402

from ham_kernels import methods  # noqa: E402

MACHINE = {
    "cpu": "a CPU", "cores": "2", "gpu": "none", "system": "Linux", "python": "3.12", "torch": "2.11", "date": "today",
    "ham_kernels": "0.1.0, commit abc", "torchattacks": "3.5.1", "cvxpy": "1.9",
}  # fmt: skip


def images(n: int) -> torch.Tensor:
    return torch.rand(n, 3, 32, 32)


# ------------------------------------------------------------ what a step is
@pytest.mark.parametrize("name", sorted(steps.LOOPS.keys() - {"faal"}))
def test_a_loop_makes_the_passes_that_it_states(name):
    x = images(4)
    model = model_of("small_cnn", x)
    y = model.eval()(x).argmin(1)  # no attack turns a row, as BAT's count has it
    assert steps.count(name + steps.LOOP, model, x, y)["right"]


@pytest.mark.slow
@pytest.mark.parametrize("name", steps.METHODS)
def test_a_method_makes_the_passes_that_it_states(name):
    x = images(8)
    model = model_of("small_cnn", x)
    y = labels_of(model, x, 0.25)
    for arm in (name, name + steps.JUMP) if name in steps.SCREENED else (name,):
        assert steps.count(arm, model, x, y)["right"]


@pytest.mark.slow
@pytest.mark.parametrize("name", steps.LOOPS)
def test_a_loop_with_our_definitions_has_our_losses(name):
    if name == "faal":
        pytest.importorskip("cvxpy")
    generator = torch.Generator().manual_seed(0)  # a sign that rounding turns is a matter of luck
    assert steps.check(name, torch.rand(20, 3, 32, 32, generator=generator)) is None


WRONG = {
    "mart": lambda: methods.MART(beta=6.0),
    "at_awp": lambda: methods.PGDAT(awp=0.02),
    "gairat": lambda: methods.GAIRAT(shift=0.0),
    "cfa_at": lambda: methods.CFA(base="pgd_at", class_from=2, gate=0.0, lam_eps=0.3),
    "cfa_trades": lambda: methods.CFA(class_from=2, gate=0.0, lam_beta=0.2),
    "dafa": lambda: methods.DAFA(class_from=2, strength=0.5),
    "wat": lambda: methods.WAT(eta=0.3),
    "fsr": lambda: methods.FSR(lowered=0.3),
    "faal": lambda: methods.FAAL(class_strength=0.3),
    "bat": lambda: methods.BAT(entropy=0.5),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_other_results_are_found(name, monkeypatch):
    if name == "faal":
        pytest.importorskip("cvxpy")
    monkeypatch.setitem(steps.METHODS, name, WRONG[name])
    generator = torch.Generator().manual_seed(0)
    assert "the authors' way" in steps.check(name, torch.rand(20, 3, 32, 32, generator=generator))


@pytest.mark.slow  # cvxpy takes seconds to import
def test_the_solver_and_the_closed_form_agree():
    pytest.importorskip("cvxpy")
    from ham_kernels.methods.class_weights import kl_ball_weights

    loop = loops.FAAL("faal", model_of("small_cnn", images(4)))
    margins = torch.rand(CLASSES) - 0.5
    theirs = CLASSES * loop.solved(margins)
    torch.testing.assert_close(theirs, kl_ball_weights(margins, loop.radius), rtol=0.01, atol=0.01)


def test_a_loop_without_its_package_is_left_out_with_the_reason(monkeypatch):
    imported = builtins.__import__

    def without(name, *args, **more):
        if name == "cvxpy":
            raise ImportError("No module named 'cvxpy'")
        return imported(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    x = images(4)
    wrong, unchecked = bench_methods.compared(["faal"], x)
    assert (wrong, unchecked) == ({}, {"faal": "ImportError: No module named 'cvxpy'"})
    assert bench_methods.counts_of(["faal loop"], x, 0.25) == ([], {})
    contest = steps.MethodContest("small_cnn", x, [4], 0.25, ["faal loop"], {}, (), steps.build)
    contest.warm_up(float("inf"))
    assert contest.left_out == {"faal loop": "No module named 'cvxpy'"}
    assert contest.broken == {}


@pytest.mark.slow
def test_class_statistics_act_in_the_steps_that_are_timed():
    x = images(16)
    names = ["dafa", "dafa loop", "cfa_at", "cfa_at loop"]
    contest = steps.MethodContest("small_cnn", x, [16], 0.3, names, {}, (), steps.build)
    contest.warm_up(float("inf"))
    assert contest.broken == {}
    theirs, ours = contest.arms["dafa loop"], contest.arms["dafa"].trainer.phases.method
    assert theirs.class_weights.std() > 0
    assert ours.dafa_weights.std() > 0
    assert (contest.arms["cfa_at loop"].factors(0.5) != 1).any()
    assert (contest.arms["cfa_at"].trainer.phases.method.cfa_eps != 1).any()


def test_arms_of_a_method():
    assert steps.arms_of(["trades", "fair", "gairat"]) == [
        "trades", "fair", "gairat", "trades+jump", "fair+jump", "trades loop", "gairat loop",
    ]  # fmt: skip
    assert {steps.base_of(arm) for arm in steps.arms_of(["trades"])} == {"trades"}
    assert steps.TITLES.keys() == steps.METHODS.keys()
    assert steps.method_of("gairat").start_epoch == 1
    assert steps.method_of("trades+jump").easy == "jump"


# ------------------------------------------------------------ ratios, goals, tables
def lane(arm: str, *seconds: float | None, h: float = 1.0) -> dict:
    return {"arm": arm, "kind": "step", "seconds": list(seconds), "h": h, "unit_s": [None] * len(seconds)}


def result_of(*lanes: dict, wrong: dict | None = None, left_out: dict | None = None, **device) -> dict:
    case = {"model": "small_cnn", "batch_size": 128, "lanes": list(lanes), "left_out": left_out or {}}
    table.derive(case, wrong or {})
    out = {
        "machine": MACHINE, "case": case, "wrong": wrong or {}, "unchecked": {}, "broken": {}, "counts": [],
        "device": {"type": "cpu", "name": "a CPU", "threads": 2} | device, "seconds": 1.0,
        "settings": {
            "images": "random images", "hard": 0.3, "rounds": 2, "quick": False, "load": 0.5, "cpu_time": False,
        },
    }  # fmt: skip
    return out | {"goals": table.judge(out)}


def states(result: dict) -> dict[str, str]:
    return {goal["goal"]: goal["state"] for goal in result["goals"]}


def measured(trades: float = 2.7) -> list[dict]:
    """Two rounds; the machine is three times slower in the second."""
    return [
        lane("pgd_at", 2.3, 6.9), lane("trades", trades, 3 * trades), lane("trades+jump", 1.89, 5.67, h=0.3),
        lane("trades loop", 3.9, 11.7),
    ]  # fmt: skip


def test_ratios_are_of_steps_of_the_same_round():
    lanes = {found["arm"]: found for found in result_of(*measured())["case"]["lanes"]}
    assert lanes["trades"]["over_lean"] == pytest.approx(1.0)
    assert lanes["trades"]["speed_up"] == pytest.approx(39 / 27)
    screened = lanes["trades+jump"]
    assert screened["forwards"] == pytest.approx(2 * 3 + 2 + 0.3 * 14 + 6)  # the look, and q
    assert screened["over_lean"] == pytest.approx((1.89 / 2.3) / (18.2 / 23))
    assert screened["speed_up"] == pytest.approx(3.9 / 1.89)
    assert lanes["trades loop"]["over_lean"] is lanes["trades loop"]["speed_up"] is None


def test_goals():
    lean, faster = "TRADES within 1.10 × its lean cost", "TRADES ≥ 1.3 × faster than the authors' way"
    good = states(result_of(*measured()))
    assert (good[lean], good[faster]) == ("held", "held")
    bad = states(result_of(*measured(3.1)))
    assert (bad[lean], bad[faster]) == ("missed", "missed")
    assert bad["WAT within 1.10 × its lean cost"] == "not measured here"
    assert set(states(result_of(*measured(), type="cuda")).values()) == {"not measured here"}


def test_wrong_results_are_not_said_to_be_fast():
    made = result_of(*measured(), wrong={"trades": "update 1: ..."})
    assert {found["speed_up"] for found in made["case"]["lanes"] if "trades" in found["arm"]} == {None}
    (goal,) = (goal for goal in made["goals"] if goal["goal"].startswith("TRADES ≥"))
    assert (goal["state"], goal["why"]) == ("not measured here", "wrong results: update 1: ...")
    assert "WRONG" in markdown(table.cells(made["case"]))


def test_a_missing_loop_leaves_its_method_with_a_reason():
    made = result_of(lane("pgd_at", 2.3), lane("faal", 2.4), left_out={"faal loop": "No module named 'cvxpy'"})
    (goal,) = (goal for goal in made["goals"] if goal["goal"].startswith("FAAL ≥"))
    assert goal["why"] == "No module named 'cvxpy'"
    text = table.readme_section(json.loads(json.dumps(made)))
    assert "- left out: FAAL, the authors' way: No module named 'cvxpy'" in text
    (rows,) = (block for block in text.split("\n\n") if block.startswith("| "))
    assert len({line.count("|") for line in rows.splitlines()}) == 1
    assert "| FAAL | 2,400 | 2,400 to 2,400 | – | – | – | 23 | – | 1.04 |" in rows


@pytest.mark.parametrize(
    ("flags", "seconds", "problem", "code"),
    [
        ([], 3.1, {}, 0), (["--check"], 3.1, {}, 1), (["--check"], 2.7, {}, 0),
        ([], 2.7, {"broken": {"wat": "RuntimeError: no"}}, 1), ([], 2.7, {"wrong": {"wat": "update 1"}}, 1),
        ([], 2.7, {"counts": [{"arm": "wat", "counted": 28.0, "stated": 27, "right": False}]}, 1),
    ],
)  # fmt: skip
def test_exit_code(flags, seconds, problem, code, tmp_path, monkeypatch, capsys):
    made = result_of(*measured(seconds)) | problem
    monkeypatch.setattr(bench_methods, "run", lambda args: made)
    monkeypatch.setattr(sys, "argv", ["bench_methods.py", *flags, "--out", str(tmp_path)])
    assert bench_methods.main() == code
    assert bool(capsys.readouterr().err) == bool(code)
    assert json.loads((tmp_path / "bench_methods_cpu.json").read_text())["machine"] == MACHINE


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--methods", "sovr"], "'sovr'"), (["--hard", "1"], "--hard: got 1.0"), (["--rounds", "0"], "--rounds: got 0"),
        (["--batch-size", "2"], "--batch-size: got 2"), (["--device", "meta"], "--device: got meta"),
    ],
)  # fmt: skip
def test_bad_arguments(flags, message, capsys):
    with pytest.raises(SystemExit):
        bench_methods.parse(flags)
    assert message in capsys.readouterr().err


def test_cpu_time_is_of_one_thread(monkeypatch, capsys):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(SystemExit):
        bench_methods.parse(["--cpu-time", "--device", "cpu"])
    assert "--cpu-time: got cpu with 2 threads" in capsys.readouterr().err
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert bench_methods.parse(["--cpu-time", "--device", "cpu"]).cpu_time


def test_all_is_compared_with_pgd_at():
    assert bench_methods.parse(["--methods", "wat", "trades", "wat"]).methods == ["pgd_at", "wat", "trades"]


@pytest.mark.slow
def test_a_tiny_run():
    result = bench_methods.run(
        bench_methods.parse(["--quick", "--methods", "trades", "--batch-size", "8", "--rounds", "1", "--device", "cpu"])
    )
    assert (result["wrong"], result["broken"], result["unchecked"]) == ({}, {}, {})
    assert [found["arm"] for found in result["case"]["lanes"]] == steps.arms_of(["pgd_at", "trades"])
    assert all(count["right"] for count in result["counts"])
    assert "TRADES, HAM's screening" in table.readme_section(json.loads(json.dumps(result)))
