"""The benchmark of training steps: what follows from given seconds, who takes turns how, and one tiny run."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import environment
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_training  # noqa: E402
from pgd.results import predicted_ratio  # noqa: E402
from readme.output import markdown  # noqa: E402
from training import contest as turns  # noqa: E402
from training import floor, steps  # noqa: E402
from training import table as training_table  # noqa: E402

pytestmark = pytest.mark.slow

MACHINE = {
    "cpu": "a CPU", "cores": "2", "gpu": "none", "system": "Linux", "python": "3.12", "torch": "2.11", "date": "today",
    "ham_kernels": "0.1.0, commit abc", "torchattacks": "3.5.1",
}  # fmt: skip
CPU = {"type": "cpu", "name": "a CPU", "threads": 2, "capability": 0}
GPU = {"type": "cuda", "name": "a GPU", "threads": 16, "capability": 9}
FP32, GRAPHS = steps.FP32_CPU, "bf16+channels_last+cuda_graphs"


def lane(arm: str, kind: str, seconds: list, h: float = 1.0, unit: float | None = 0.1) -> dict:
    return {"arm": arm, "kind": kind, "seconds": seconds, "h": h, "unit_s": [unit] * len(seconds)}


def case(*lanes: dict, model: str = "preact_resnet18", n: int = 128, wrong: dict | None = None, **more) -> dict:
    out = {"model": model, "batch_size": n, "lanes": list(lanes), "left_out": {}, "warm_up_s": {}, **more}
    floor.derive(out, wrong or {})
    return out


def result_of(device: dict, *cases: dict) -> dict:
    out = {
        "machine": MACHINE, "device": device, "cases": list(cases), "counts": [], "seconds": 1.0,
        "wrong": {}, "broken": {},
        "settings": {"images": "random images", "hard": 0.3, "minutes": 14.0, "quick": False},
    }  # fmt: skip
    out["goals"] = floor.judge(out)
    return out


def states(result: dict, device: str) -> list[str]:
    return [goal["state"] for goal in result["goals"] if goal["device"] == device]


# ------------------------------------------------------------ prediction, ratios
def test_forwards_are_the_cost_model():
    assert floor.forwards("pgd_at") == 23
    assert floor.forwards("natural") == 3
    for h in (0.0, 0.3, 1.0):
        predicted = predicted_ratio(h, steps.K, steps.M)
        assert floor.forwards("ham", h) / 23 == pytest.approx(predicted)


def test_ratios_are_of_steps_of_the_same_round():
    """The machine is three times slower in the last round; the arms were left out of one round each."""
    ours = lane("plain", "pgd_at", [2.3, None, 6.9])
    ham = lane("plain", "ham", [1.21, None, 3.63], h=0.3)
    theirs = lane("torchattacks", "pgd_at", [4.6, 4.6, 13.8])
    half = lane("torchattacks_bf16", "pgd_at", [None, 4.6, None])
    natural = lane("natural", "natural", [0.3, 0.3, 0.9], unit=None)
    made = case(ours, ham, theirs, half, natural)
    assert ham["predicted_ratio"] == pytest.approx(12.1 / 23)
    assert ham["measured_ratio"] == pytest.approx(1.21 / 2.3)
    assert ham["over_prediction"] == pytest.approx(1.0)
    assert ours["over_torchattacks"] == pytest.approx(2.0)
    assert ham["over_torchattacks"] == pytest.approx(4.6 / 1.21)
    assert ours["over_torchattacks_bf16"] is None  # never in the same round
    assert ours["over_floor"] == pytest.approx((2.3 + 6.9) / 2 / (23 * 0.1))
    assert natural["over_floor"] is None
    assert natural["over_torchattacks"] is None  # it does something else
    assert (theirs["lowest_s"], theirs["median_s"], theirs["highest_s"]) == (4.6, 4.6, 13.8)
    assert theirs["images_per_s"] == pytest.approx(128 / 4.6)
    assert made["lanes"][0] is ours


def test_a_group_is_predicted_from_single_batches_of_its_options():
    base, group = lane(GRAPHS, "pgd_at", [2.3]), lane(f"{GRAPHS}+group4", "ham", [1.0], h=0.3)
    case(base, group)
    assert group["over_prediction"] == pytest.approx((1.0 / 2.3) / (12.1 / 23))
    lonely = lane("bf16+group4", "ham", [1.0], h=0.3)
    case(base, lonely)
    assert lonely["over_prediction"] is None


def test_wrong_results_are_not_said_to_be_fast():
    quick, right = lane("bf16", "pgd_at", [1.0]), lane("plain", "pgd_at", [2.0])
    made = case(lane("torchattacks", "pgd_at", [4.0]), quick, right, wrong={"bf16": "update 1: ..."})
    assert quick["over_torchattacks"] is None
    assert right["over_torchattacks"] == 2.0
    assert floor.fastest(made, "pgd_at") is right
    assert "WRONG" in markdown(training_table.cells(made))


# ------------------------------------------------------------ goals
def cpu_cases(ham: float, fp32: float, bf16: float) -> list[dict]:
    """ham: over its prediction; fp32, bf16: seconds of PGD-AT where torchattacks takes 6."""
    large = case(
        lane("torchattacks", "pgd_at", [6.0] * 3),
        lane(FP32, "pgd_at", [fp32] * 3), lane(FP32, "ham", [ham * fp32 * 12.1 / 23] * 3, h=0.3),
        lane(steps.BEST_CPU, "pgd_at", [bf16] * 3), lane(steps.BEST_CPU, "ham", [ham * bf16 * 12.1 / 23] * 3, h=0.3),
    )  # fmt: skip
    small = case(
        lane("plain", "pgd_at", [1.0]), lane("plain", "ham", [ham * 12.1 / 23], h=0.3), model="small_cnn"
    )  # fmt: skip
    return [small, large]


def test_goals_of_a_cpu():
    good = result_of(CPU, *cpu_cases(1.04, 3.1, 1.9))
    assert states(good, "cpu") == ["held"] * 4
    assert set(states(good, "cuda")) == {"not measured here"}
    assert "1.04 × with ours, bf16, channels_last, compile, winograd" in good["goals"][1]["measured"]
    assert states(result_of(CPU, *cpu_cases(1.06, 3.1, 1.9)), "cpu") == ["missed", "missed", "held", "held"]
    assert states(result_of(CPU, *cpu_cases(1.04, 3.2, 2.1)), "cpu") == ["held", "held", "missed", "missed"]


def test_goals_that_this_run_cannot_judge_say_why():
    one_thread = result_of({**CPU, "threads": 1}, *cpu_cases(2.0, 6.0, 6.0))
    assert {g["why"] for g in one_thread["goals"] if g["device"] == "cpu"} == {"torch uses 1 threads here"}
    assert "missed" not in states(one_thread, "cpu")
    small, large = cpu_cases(1.0, 3.0, 1.5)
    without = case(*large["lanes"][:3], left_out={steps.BEST_CPU: "this CPU has no bf16 arithmetic"})
    judged = result_of(CPU, without)["goals"][:4]
    assert [g["state"] for g in judged] == ["not measured here", "held", "held", "not measured here"]
    assert judged[0]["why"] == "this model and batch size did not run"
    assert judged[3]["why"] == "this CPU has no bf16 arithmetic"
    assert small["lanes"]


def gpu_case(n: int, pgd_at: float, ham: float, share: float) -> dict:
    """Seconds where torchattacks takes 6, and 3 in bf16. Groups are faster and do not count."""
    attack = {"arm": GRAPHS, "seconds": 0.1, "flops_per_s": share * 7e14, "matrix_flops_per_s": 7e14, "share": share}
    return case(
        lane("torchattacks", "pgd_at", [6.0]), lane("torchattacks_bf16", "pgd_at", [3.0]),
        lane(GRAPHS, "pgd_at", [pgd_at]), lane(GRAPHS, "ham", [ham], h=0.3),
        lane(f"{GRAPHS}+group2", "ham", [ham / 9], h=0.3), n=n, attack=attack,
    )  # fmt: skip


def test_goals_of_a_gpu():
    good = result_of(GPU, gpu_case(128, 2.0, 1.1, 0.2), gpu_case(512, 2.0, 1.1, 0.31))
    assert states(good, "cuda") == ["held"] * 11
    assert set(states(good, "cpu")) == {"not measured here"}
    bad = result_of(GPU, gpu_case(128, 2.3, 1.25, 0.2), gpu_case(512, 2.0, 1.1, 0.29))
    assert states(bad, "cuda") == ["held", "missed", "missed", "missed", "missed", *["held"] * 5, "missed"]
    older = result_of({**GPU, "capability": 8}, gpu_case(512, 9.0, 9.0, 0.1))
    assert set(states(older, "cuda")) == {"not measured here"}


# ------------------------------------------------------------ tables
def test_readme_section():
    made = result_of(CPU, *cpu_cases(1.06, 3.1, 1.9))
    made["cases"][1]["left_out"]["reference"] = "too slow"
    text = training_table.readme_section(json.loads(json.dumps(made)))
    tables = [block for block in text.split("\n\n") if block.startswith("| ")]
    assert len(tables) == 2
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1
    assert "| ours, channels_last, compile, winograd: HAM | 1,729 |" in tables[1]
    assert "3.5.1" in text
    assert "commit abc" in text
    assert text.count("**missed**") == 2
    assert "GPU of the H200's class" not in text  # goals of another device are not this run's
    assert "- preact_resnet18, batch 128, left out: ham_reference: too slow" in text


@pytest.mark.parametrize(
    ("flags", "ham", "problem", "code"),
    [
        ([], 1.06, {}, 0), (["--check"], 1.06, {}, 1), (["--check"], 1.0, {}, 0),
        ([], 1.0, {"wrong": {"plain": "update 1"}}, 1), ([], 1.0, {"broken": {"plain": "RuntimeError: no"}}, 1),
    ],
)  # fmt: skip
def test_exit_code(flags, ham, problem, code, tmp_path, monkeypatch, capsys):
    made = result_of(CPU, *cpu_cases(ham, 3.0, 1.5)) | problem
    monkeypatch.setattr(bench_training, "run", lambda args: made)
    monkeypatch.setattr(sys, "argv", ["bench_training.py", *flags, "--out", str(tmp_path)])
    assert bench_training.main() == code
    assert bool(capsys.readouterr().err) == bool(code)
    assert json.loads((tmp_path / "bench_training_cpu.json").read_text())["machine"] == MACHINE


# ------------------------------------------------------------ who takes turns, and how
def test_a_tight_round_leaves_out_the_slowest_that_no_goal_needs():
    cost = {"a": 5.0, "needed": 10.0, "b": 1.0, "c": 3.0}
    assert turns.plan(cost, ("needed",), 19.0) == ["a", "needed", "b", "c"]
    assert turns.plan(cost, ("needed",), 14.5) == ["needed", "b", "c"]
    assert turns.plan(cost, ("needed", "absent"), 0.0) == ["needed"]


class Fake(steps.Arm):
    """Takes no time, and tells of all that happens to it."""

    def __init__(self, name: str, keeps: bool, log: list):
        self.name, self.keeps_memory, self.log = name, keeps, log

    def step(self, kind, x, y):
        if len(x) == 32:  # else an estimate
            self.log.append(self.name)
        return len(x) // 4, len(x)

    def fill_memory(self, x, y):
        self.log.append("fill")


def contest_of(log: list, *arms: tuple[str, bool]) -> turns.Contest:
    contest = turns.Contest("small_cnn", torch.rand(32, 3, 32, 32), [32], 0.3, [], {}, ("torchattacks",))
    contest._memory = FakeMemory(log)
    contest.arms = {name: Fake(name, keeps, log) for name, keeps in arms}
    return contest


class FakeMemory:
    def __init__(self, log: list):
        self.kept, self.log = None, log

    def keep(self):
        self.kept = True
        self.log.append("keep")

    def give_back(self):
        self.kept = False
        self.log.append("return")


def test_memory_is_kept_for_ours_and_returned_for_the_others(monkeypatch):
    log: list[str] = []
    monkeypatch.setattr(turns, "times_for", lambda *_: 1)
    contest = contest_of(log, ("torchattacks", False), ("reference", False), ("natural", True))
    made = contest.case(32, 2, float("inf"))
    first = ["return", "fill", "torchattacks", "reference", "keep", "fill", "natural"]
    again = ["return", "fill", "reference", "keep", "fill", "natural", "return", "fill", "torchattacks"]
    assert log == [*first, *again, "keep"]
    assert [len(found["seconds"]) for found in made["lanes"]] == [2, 2, 2]
    assert {found["h"] for found in made["lanes"]} == {0.25}


class Breaks(Fake):
    """Works for some steps, then no more."""

    def __init__(self, name: str, log: list, steps: int):
        super().__init__(name, True, log)
        self.steps = steps

    def step(self, kind, x, y):
        if self.steps == 0:
            raise RuntimeError("CUDA error: out of patience\nwith more lines")
        self.steps -= 1
        return super().step(kind, x, y)


@pytest.mark.parametrize("steps", [0, 1, 3], ids=["its estimate", "its first step", "a later round"])
def test_an_arm_that_breaks_costs_no_other_its_times(steps, monkeypatch):
    log: list[str] = []
    monkeypatch.setattr(turns, "times_for", lambda *_: 1)
    contest = contest_of(log, ("natural", True))
    contest.arms["torchattacks"] = Breaks("torchattacks", log, steps)
    made = contest.case(32, 4, float("inf"))
    assert [(found["arm"], len(found["seconds"])) for found in made["lanes"]] == [("natural", 4)]
    assert made["left_out"] == contest.broken == {"torchattacks": "RuntimeError: CUDA error: out of patience"}


def test_an_arm_that_cannot_be_built_breaks_no_other():
    def build(name, model, trainers):
        if name == "plain":
            raise RuntimeError("no")
        return Fake(name, True, [])

    contest = contest_of([])
    contest.make = build
    contest.names = ["plain", "natural"]
    contest.warm_up(float("inf"))
    assert list(contest.arms) == ["natural"]
    assert contest.broken == {"plain": "RuntimeError: no"}


PAGES = """
import resource
import torch
from training import steps

def faults():  # of a block that glibc takes from the system, in a process that never kept memory
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(10 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.ones(10 << 20)
fresh, memory = faults(), steps.FreedMemory()
memory.keep()
blocks = [torch.ones(15 << 20 if i % 2 else 1 << 20) for i in range(9)]
del blocks[1::2]  # the large ones leave holes between the others
kept = min(faults() for _ in range(5))
memory.give_back()
returned = min(faults() for _ in range(5))
memory.keep()
print(fresh, kept, returned, min(faults() for _ in range(5)))
"""


def test_returned_memory_is_as_if_none_had_been_kept():
    env = environment(ROOT, ROOT / "python", ROOT / "benchmarks", OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, "-c", PAGES], capture_output=True, text=True, timeout=1000, env=env)
    fresh, kept, returned, again = map(int, done.stdout.split())
    assert returned > 0.9 * fresh > 0, done
    assert max(kept, again) < 0.1 * fresh, done


def test_without_time_only_needed_arms_run():
    contest = contest_of([], ("torchattacks", False), ("reference", False))
    made = contest.case(32, 2, 0.0)
    assert [found["arm"] for found in made["lanes"]] == ["torchattacks"]
    assert made["left_out"] == {"reference": "no time left"}


def test_names():
    assert [steps.group_of(name) for name in ("plain", "bf16+group4", "torchattacks")] == [1, 4, 1]
    assert steps.setting_of("no_keep_memory") == steps.setting_of("torchattacks") == "plain"
    assert steps.setting_of("bf16+channels_last+compile+cuda_graphs+group2") == "bf16+channels_last+compile"
    assert steps.setting_of("torchattacks_bf16") == "bf16+channels_last"
    assert all(steps.is_arm(name) for names in steps.ARMS.values() for name in names)
    assert all(steps.is_arm(goal.arm) for goal in floor.GOALS if goal.arm)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--arms", "plain+fast"], "--arms: got plain+fast"),
        (["--hard", "1"], "--hard: got 1.0"),
        (["--rounds", "0"], "--rounds: got 0"),
        (["--batch-sizes", "128", "2"], "--batch-sizes: got 2"),
        (["--device", "meta"], "--device: got meta"),
    ],
)
def test_bad_arguments(flags, message, capsys):
    with pytest.raises(SystemExit):
        bench_training.parse(flags)
    assert message in capsys.readouterr().err


# ------------------------------------------------------------ what is measured
def test_the_wanted_share_of_rows_is_hard_for_each_arm_and_stays():
    x = torch.rand(20, 3, 32, 32)
    model = steps.model_of("small_cnn", x)
    y = steps.labels_of(model, x, 0.3)
    for name in ("plain", "reference", "plain+group2"):
        arm = steps.build(name, model, {})
        for _ in range(2):
            assert arm.step("ham", x, y) == (6 * arm.group, 20 * arm.group)
    for arm_parameter, parameter in zip(arm.model.state_dict().values(), model.state_dict().values(), strict=True):
        if parameter.is_floating_point():  # the other counts batches
            assert torch.equal(arm_parameter, parameter)


def test_a_forward_too_many_is_counted(monkeypatch):
    x = torch.rand(8, 3, 16, 16)
    model = steps.model_of("small_cnn", x)
    y = steps.labels_of(model, x, 0.25)
    names = ["natural_bf16", "plain", "bf16+cuda_graphs", "plain+group2"]
    found = {(c["arm"], c["kind"]): c["counted"] for c in floor.count(names, model, x, y)}
    ham = 7 + 17 * 0.25
    assert found == {
        ("natural", "natural"): 3, ("plain", "pgd_at"): 23, ("plain", "ham"): ham, ("plain+group2", "ham"): ham,
    }  # fmt: skip
    step = steps.Ours.step

    def with_one_more(self, kind, x, y):
        self.model.eval()(x)
        return step(self, kind, x, y)

    monkeypatch.setattr(steps.Ours, "step", with_one_more)
    assert [c["right"] for c in floor.count(["natural", "plain"], model, x, y)] == [True, False, False]


def test_wrong_results_are_found(monkeypatch):
    check = steps.Check(torch.rand(32, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert check("plain") is None
    settings = steps._settings
    monkeypatch.setattr(steps, "_settings", lambda eps: settings(eps) | {"screen_steps": 1})
    assert "update 1" in check("plain")


def test_difference():
    right = [(10, 2.0), (64, 1.0)]
    assert steps.difference([(10, 2.0001), (64, 1.0)], right, 0, 1e-4) is None
    assert "update 1: 11 hard rows" in steps.difference([(11, 2.0), (64, 1.0)], right, 0, 1e-4)
    assert "update 2" in steps.difference([(10, 2.0), (64, 1.001)], right, 0, 1e-4)
    assert "update 2" in steps.difference([(10, 2.0), (64, float("nan"))], right, 3, 1e-4)


def test_the_floor_is_half_a_pass_at_the_best_batch(monkeypatch):
    arm = steps.build("plain", nn.Sequential(nn.Flatten(), nn.Linear(12, 10)), {})
    bare = floor.BarePass(arm, torch.rand(4, 3, 2, 2))
    per_row = {16: 0.3, 32: 0.1, 64: 0.2, 128: 0.2}
    monkeypatch.setattr(bare, "_row_seconds", per_row.__getitem__)
    assert bare.forward_seconds(128) == pytest.approx(0.1 * 128 / 2)
    assert bare.rows == 32
    assert 0 < floor.BarePass(arm, torch.rand(4, 3, 2, 2)).forward_seconds(128) < 1


def test_rate_of_the_attack(monkeypatch):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 10))
    x, y = torch.rand(4, 3, 2, 2), torch.zeros(4, dtype=torch.int64)
    assert floor.flops_per_row(model, x) == 2 * (2 * 12 * 10)  # there and back, a product and a sum each
    monkeypatch.setattr(floor, "MATRIX", 16)
    monkeypatch.setattr(floor, "clock", lambda work, *_: (work(), 0.5)[1])
    rate = floor.attack_rate(steps.build("plain", model, {}), x, y, repeats=1)
    assert rate["flops_per_s"] == 480 * 4 * steps.K / 0.5
    assert rate["matrix_flops_per_s"] == 2 * 16**3 / 0.5
    assert rate["share"] == rate["flops_per_s"] / rate["matrix_flops_per_s"]


# ------------------------------------------------------------ all of it
def test_end_to_end(tmp_path):
    foreign = ["torchattacks"] if importlib.util.find_spec("torchattacks") else []
    arms = ["natural", *foreign, "plain"]
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_training.py"), "--quick", "--batch-sizes", "8"]
    command += ["--rounds", "1", "--device", "cpu", "--arms", *arms, "--out", str(tmp_path), "--check"]
    env = environment(ROOT, ROOT / "python", OMP_NUM_THREADS="1")
    done = subprocess.run(command, capture_output=True, text=True, timeout=1000, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "bench_training_cpu.json").read_text())
    (only,) = result["cases"]
    assert {(found["arm"], found["kind"]) for found in only["lanes"]} == {
        ("natural", "natural"), *((name, "pgd_at") for name in foreign), ("plain", "pgd_at"), ("plain", "ham"),
    }  # fmt: skip
    assert all(found["median_s"] > 0 and found["over_floor"] > 0 for found in only["lanes"])
    assert {found["h"] for found in only["lanes"] if found["kind"] == "ham"} == {0.25}
    assert all(count["right"] for count in result["counts"])
    assert result["wrong"] == {}
    assert len(result["goals"]) == len(floor.GOALS)
    assert "ours, plain: HAM" in done.stdout
    assert "random images" in training_table.readme_section(result)
