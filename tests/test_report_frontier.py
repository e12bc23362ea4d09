"""The page of the frontier: who is compared, what dominates what, and what its figures and tables show."""

from __future__ import annotations

import json
import math
from itertools import combinations

import fake_runs
import pytest
from fake_runs import fake_run, write_json

from ham_kernels import report
from ham_kernels.methods.registry import class_of
from ham_kernels.report.comparing.frontier import as_compared
from ham_kernels.report.drawing import by_class, figure_list, figures, frontier
from ham_kernels.report.writing.frontier_tables import class_table, frontier_table

PLAIN = dict.fromkeys([f"method.{name}" for name in ("reweight", "early_drop", "rows", "freeze_bn", "bn_rows", "lam")])
T2 = 12.706  # of Student's t with one degree of freedom, 97.5 %


def run(root, name, method, per_class, seconds, seed=0, settings=None, epochs=4, **options):
    """A run judged by PGD-20 and AutoAttack, the same for both, in so many seconds."""
    own = {} if method == "ham" else {**PLAIN, "method.start_epoch": 1}
    accuracy = options.pop("accuracy", {"pgd20": per_class, "autoattack": per_class})
    return fake_run(
        root / f"{name}-seed{seed}", method, seed, accuracy=accuracy, seconds=[seconds / epochs] * epochs,
        settings=own | (settings or {}), **options,
    )  # fmt: skip


def section_of(runs, out, monkeypatch):
    """(section of data.json, styles), without drawing."""
    with monkeypatch.context() as patch:
        patch.setattr(figure_list, "ENTRIES", ())
        report.build(runs, out)
    data = json.loads((out / "data.json").read_text())
    return data["sections"][0], data["styles"]


def by_title(section):
    return {m["title"]: m for m in section["frontier"]["methods"]}


def text_of(table):
    """{method: {column: text}}, without the method's number."""
    names = [" ".join(filter(None, head)) for head in table.head]
    rows = [dict(zip(names, [cell.text + cell.error for cell in row], strict=True)) for row in table.rows]
    return {row["Method"].lstrip("0123456789 "): row for row in rows}


@pytest.fixture
def field(tmp_path):
    """PGD-AT: average 50, worst 20, 100 s. TRADES better at 120 s; N-FGSM worse at 30 s; natural below it at 35 s."""
    return [
        run(tmp_path, "p", "pgd_at", [0.8, 0.2], 100.0),
        run(tmp_path, "t", "trades", [0.8, 0.3], 120.0),
        run(tmp_path, "n", "n_fgsm", [0.6, 0.1], 30.0),
        run(tmp_path, "c", "natural", [0.1, 0.0], 35.0),
    ]


def test_dominance_takes_cost_average_and_worst_class(field, tmp_path, monkeypatch):
    section, _ = section_of(field, tmp_path / "out", monkeypatch)
    assert section["frontier"]["attack"] == "autoattack"
    found = by_title(section)
    by_time = {title: [one["title"] for one in m["dominated_by"]["time"]] for title, m in found.items()}
    assert by_time == {"PGD-AT": [], "TRADES": [], "N-FGSM": [], "natural": ["N-FGSM"]}
    # natural training costs the fewest forwards, whatever its time was
    assert found["natural"]["dominated_by"]["forwards"] == []
    assert {title: m["relative_time"] for title, m in found.items()} == pytest.approx(
        {"PGD-AT": 1.0, "TRADES": 1.2, "N-FGSM": 0.3, "natural": 0.35}
    )
    assert found["natural"]["dominated_by"]["time"][0]["clear"] is None  # one seed each tells nothing of chance


def test_cpus_are_compared_by_cpu_time(tmp_path, monkeypatch):
    """Where every epoch has it: the clock counts what else the machine did."""
    on_cpu = {"run.device": "auto"}
    field = [run(tmp_path, m, m, [0.8, 0.2], 100.0, settings=on_cpu) for m in ("pgd_at", "trades")]
    section, _ = section_of(field, tmp_path / "out", monkeypatch)
    assert section["frontier"]["clock"] == "time"  # logs of before have no CPU time
    for folder in field:
        log = folder / "metrics.jsonl"
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        log.write_text("".join(json.dumps({**line, "cpu_seconds": 2.0}) + "\n" for line in lines))
    section, styles = section_of(field, tmp_path / "again", monkeypatch)
    assert section["frontier"]["clock"] == "cpu_time"
    assert {m["time"]["mean"] for m in section["frontier"]["methods"]} == {8.0}
    assert "Training CPU time" in text_of(frontier_table(section))["TRADES"]
    figure = frontier.against_time(section, styles)
    assert figure.axes[1].get_xlabel().startswith("CPU time of the whole run")


def test_equal_in_all_is_not_dominated(tmp_path, monkeypatch):
    runs = [run(tmp_path, m, m, [0.8, 0.2], 100.0) for m in ("pgd_at", "trades")]
    found = by_title(section_of(runs, tmp_path / "out", monkeypatch)[0])
    assert all(m["dominated_by"]["time"] == [] for m in found.values())


def test_only_what_nothing_dominates_is_told_to_dominate(tmp_path, monkeypatch):
    runs = [run(tmp_path, "p", "pgd_at", [0.8, 0.2], 100.0)]
    for i, method in enumerate(("trades", "mart", "wat"), 1):  # each better than the one before, and faster
        runs.append(run(tmp_path, method, method, [0.8, 0.2 + 0.1 * i], 100.0 - i))
    found = by_title(section_of(runs, tmp_path / "out", monkeypatch)[0])
    assert {one["title"] for title in found for one in found[title]["dominated_by"]["time"]} == {class_of("wat").title}


def test_intervals_are_of_the_mean_over_seeds(tmp_path, monkeypatch):
    runs = [run(tmp_path, "p", "pgd_at", [0.6, worst], 100.0, seed) for seed, worst in enumerate((0.3, 0.34))]
    runs += [run(tmp_path, "t", "trades", [0.6, worst], 100.0, seed) for seed, worst in enumerate((0.4, 0.442))]
    section, _ = section_of(runs, tmp_path / "out", monkeypatch)
    base, ours = section["frontier"]["methods"]
    half = T2 * 0.02  # std of 0.3 and 0.34 over sqrt 2
    assert (base["worst"]["mean"], base["worst"]["high"]) == pytest.approx((0.32, 0.32 + half), rel=1e-3)
    assert base["worst"]["low"] == pytest.approx(max(0, 0.32 - half), abs=1e-4)
    assert base["time"]["low"] == base["time"]["high"] == 100.0
    same, other = ours["changes"]  # seed by seed: 0.1 and 0.102
    assert same == {"mean": 0, "low": None, "high": None}  # alike in all seeds
    half = T2 * 0.001
    assert (other["mean"], other["low"], other["high"]) == pytest.approx((0.101, 0.101 - half, 0.101 + half), rel=1e-3)
    assert [one["clear"] for one in base["dominated_by"]["time"]] == [True]
    assert text_of(class_table(section))["TRADES"] | {"Method": ""} == {"Method": "", "0": "0.0", "1": "+10.1 ± 1.3"}


def test_a_difference_that_seeds_do_not_agree_on_is_within_chance(tmp_path, monkeypatch):
    runs = [run(tmp_path, "p", "pgd_at", [0.6, worst], 100.0, seed) for seed, worst in enumerate((0.3, 0.34))]
    runs += [run(tmp_path, "t", "trades", [0.6, worst], 100.0, seed) for seed, worst in enumerate((0.29, 0.4))]
    section, _ = section_of(runs, tmp_path / "out", monkeypatch)
    assert by_title(section)["PGD-AT"]["dominated_by"]["time"] == [{"title": "TRADES", "clear": False}]
    assert text_of(frontier_table(section))["PGD-AT"]["Dominated by time"] == "TRADES (within chance)"


def test_worst_three(tmp_path, monkeypatch):
    runs = [run(tmp_path, m, m, [0.9, 0.1, 0.4, 0.2, None], 100.0) for m in ("pgd_at", "trades")]
    section, _ = section_of(runs, tmp_path / "out", monkeypatch)
    assert section["frontier"]["methods"][0]["worst_three"]["mean"] == pytest.approx(0.7 / 3)
    assert text_of(frontier_table(section))["PGD-AT"]["AutoAttack, % worst 3"] == "23.3"


# ---------------------------------------------------------------- cost
def test_forwards_are_of_the_method_of_each_epoch_at_its_hard_share(tmp_path, monkeypatch):
    """HAM of M=3, K=10: one epoch of PGD-AT, three with a quarter of the rows hard."""
    runs = [
        run(tmp_path, "p", "pgd_at", [0.8, 0.2], 100.0),
        run(tmp_path, "h", "ham", [0.8, 0.2], 60.0),
        run(tmp_path, "k", "pgd_at", [0.8, 0.2], 40.0, settings={"method.step_sizes": [1.0, 0.5, 0.25]}),
        run(tmp_path, "n", "natural", [0.8, 0.2], 10.0),
    ]
    section, _ = section_of(runs, tmp_path / "out", monkeypatch)
    told = [m["step_forwards"]["mean"] for m in section["frontier"]["methods"]]
    ham = (23 + 3 * (2 * 3 + 1 + 2 * 0.25 * 7 + 3 * 0.25)) / 4
    assert told == pytest.approx([23.0, ham, 9.0, 3.0])
    assert section["frontier"]["methods"][2]["relative_forwards"] == pytest.approx(9 / 23)


def test_a_longer_training_is_compared_by_what_all_of_it_costs(tmp_path, monkeypatch):
    fast = {"method.step_sizes": [2.0, 1.0, 0.5]}
    runs = [
        run(tmp_path, "p", "pgd_at", [0.8, 0.2], 100.0),
        run(tmp_path, "t", "trades", [0.8, 0.2], 120.0),
        run(tmp_path, "f", "pgd_at", [0.8, 0.3], 90.0, settings=fast | {"optim.epochs": 8}, epochs=8),
        run(tmp_path, "r", "free_at", [0.7, 0.2], 30.0, settings={"method.replays": 4, "optim.epochs": 1}, epochs=1),
    ]
    section, _ = section_of(runs, tmp_path / "out", monkeypatch)
    found = by_title(section)
    assert list(found) == ["PGD-AT", "TRADES", "PGD-AT, steps of 2 1 0.5 ε, 8 epochs", "Free-AT"]
    plain, _, longer, replayed = found.values()
    assert [m["forwards"]["mean"] for m in found.values()] == [23 * 4, 27 * 4, 9 * 8, 3 * 4]
    assert [m["step_forwards"]["mean"] for m in found.values()] == [23, 27, 9, 3]
    assert longer["relative_forwards"] == pytest.approx(72 / 92)
    assert longer["relative_time"] == pytest.approx(0.9)
    assert plain["baseline"]
    assert [one["title"] for one in plain["dominated_by"]["forwards"]] == [longer["title"]]
    assert replayed["relative_forwards"] == pytest.approx(3 / 23)


def test_forwards_are_not_told_where_a_method_is_not_known(tmp_path, monkeypatch):
    runs = [run(tmp_path, "p", "pgd_at", [0.8, 0.2], 100.0), run(tmp_path, "x", "unheard", [0.8, 0.3], 50.0)]
    section, styles = section_of(runs, tmp_path / "out", monkeypatch)
    (_, other) = section["frontier"]["methods"]
    assert (other["forwards"]["mean"], other["relative_forwards"]) == (None, None)
    assert frontier.against_forwards(section, styles) is None  # one method is no comparison
    assert frontier.against_time(section, styles) is not None


# ---------------------------------------------------------------- who is compared
def test_what_is_not_alike_is_left_out_and_said(field, tmp_path, monkeypatch):
    other = {"run.label": "other model", "model.name": "preact_resnet18"}
    field += [
        run(tmp_path, "begun", "mart", [0.9, 0.9], 1.0, state="stopped"),
        run(tmp_path, "weak", "wat", [0.9, 0.9], 1.0, settings=other),
        run(tmp_path, "far", "faal", [0.9, 0.9], 1.0),
    ]
    for folder in (*field[:4], field[4], field[6]):
        path = folder / "config.toml"
        path.write_text(f'{path.read_text()}label = "{folder.name.split("-")[0]}"\n')  # else all say their epochs
    environment = {**fake_runs.environment(), "machine": {"cpu": "Other", "gpu": "none"}}
    write_json(field[-1] / "environment.json", environment)
    out = tmp_path / "out"
    section, _ = section_of(field, out, monkeypatch)
    assert section["frontier"]["left_out"] == {
        "begun": "training is not finished", "other model": "trained unlike p in model (preact_resnet18 and small_cnn)",
    }  # fmt: skip
    far = by_title(section)["far"]
    assert far["time"]["mean"] is None
    assert far["forwards"]["mean"] is not None
    page = (out / "frontier.html").read_text()
    assert "Not compared: other model, trained unlike p in model (preact_resnet18 and small_cnn)." in page
    assert "no time, as it was trained unlike p in machine" in page


def test_one_method_has_no_page_and_an_old_one_goes(field, tmp_path, monkeypatch):
    monkeypatch.setattr(figure_list, "ENTRIES", ())
    out = tmp_path / "out"
    report.build(field, out)
    files = {"frontier.html", "frontier.md", "frontier.tex"}
    assert files <= {p.name for p in out.iterdir()}
    assert 'href="frontier.html#s0"' in (out / "index.html").read_text()
    report.build(field[:1], out)
    assert not files & {p.name for p in out.iterdir()}
    assert "frontier.html" not in (out / "index.html").read_text()


# ---------------------------------------------------------------- what is shown
def test_masking_stands_beside_each_method(tmp_path, monkeypatch):
    none = {"checks": [{"name": "transfer", "title": "Transfer", "values": None, "suspicious": False, "why": "alone"}]}
    parts = [
        {"masking": fake_runs.masking(False)},
        {"masking": fake_runs.masking(True, "why")},
        {"masking": none},
        None,
    ]
    runs = [
        run(tmp_path, m, m, [0.8, 0.2], 100.0, parts=part)
        for m, part in zip(("pgd_at", "trades", "n_fgsm", "natural"), parts, strict=True)
    ]
    out = tmp_path / "out"
    table = text_of(frontier_table(section_of(runs, out, monkeypatch)[0]))
    assert {title: row["Masking checks"] for title, row in table.items()} == {
        "PGD-AT": "1 run, passed", "TRADES": "1 of 1 suspicious: More steps are stronger (1 of 1 runs)",
        "N-FGSM": "not run", "natural": "not run",
    }  # fmt: skip
    assert "More steps are stronger" in (out / "frontier.html").read_text()


def test_many_classes_are_in_the_figure_alone(tmp_path, monkeypatch):
    runs = [run(tmp_path, m, m, [0.5] * 21, 100.0) for m in ("pgd_at", "trades")]
    section, styles = section_of(runs, tmp_path / "out", monkeypatch)
    assert class_table(section).rows == []
    assert by_class.class_differences(as_compared(section), styles) is not None


@pytest.mark.parametrize("draw", [frontier.against_time, frontier.against_forwards])
def test_names_are_inside_and_do_not_lie_on_each_other(field, tmp_path, monkeypatch, draw):
    section, styles = section_of(field, tmp_path / "out", monkeypatch)
    with figures.drawing():
        figure = draw(section, styles)
        figure.draw_without_rendering()
        renderer = figure.canvas.get_renderer()
        for axes in figure.axes:
            texts = {text.get_text(): text.get_window_extent(renderer) for text in axes.texts}
            best = {m["title"] for m in frontier.undominated(section["frontier"]["methods"], "time")}
            assert {"PGD-AT", "TRADES", "N-FGSM"} == best
            assert best <= set(texts)
            inside = axes.get_window_extent()
            for box in texts.values():
                assert inside.x0 <= box.x0 < box.x1 <= inside.x1
                assert inside.y0 <= box.y0 < box.y1 <= inside.y1
            assert not any(a.overlaps(b) for a, b in combinations(texts.values(), 2))


def test_the_dominated_are_grey_and_numbered_as_in_the_table(field, tmp_path, monkeypatch):
    section, styles = section_of(field, tmp_path / "out", monkeypatch)
    worst, average = frontier.against_time(section, styles).axes
    number = [i for i, row in enumerate(frontier_table(section).rows, 1) if row[0].text.endswith("natural")]
    assert str(number[0]) in [text.get_text() for text in worst.texts]
    assert f"{number[0]}: 5.0" in [text.get_text() for text in average.texts]  # at the edge, far below the others
    drawn = {line.get_color() for line in worst.lines if line.get_linestyle() == "None" and len(line.get_xdata()) == 1}
    assert frontier.GREY in drawn
    assert min(axis for axis in average.get_ylim()) > 5


def test_a_baseline_stands_at_its_value_however_low(tmp_path, monkeypatch):
    """Its dotted line is read against the axis."""
    runs = [run(tmp_path, "p", "pgd_at", [0.02, 0.0], 100.0), run(tmp_path, "t", "trades", [0.5, 0.4], 100.0)]
    section, styles = section_of(runs, tmp_path / "out", monkeypatch)
    _, average = frontier.against_time(section, styles).axes
    assert any(line.get_linestyle() == ":" and set(line.get_ydata()) == {1.0} for line in average.lines)


def test_each_that_nothing_dominates_is_named_and_where_it_leads(tmp_path, monkeypatch):
    """A leads in average, B in worst class, and C, between them, in neither: it is named in the upper panel."""
    values = {"pgd_at": [0.5, 0.1], "trades": [0.9, 0.2], "mart": [0.5, 0.4], "wat": [0.7, 0.3]}
    runs = [run(tmp_path, m, m, value, 100.0 + (m == "wat")) for m, value in values.items()]
    section, styles = section_of(runs, tmp_path / "out", monkeypatch)
    a, b, c = (class_of(name).title for name in ("trades", "mart", "wat"))
    worst, average = ({text.get_text() for text in axes.texts} for axes in frontier.against_time(section, styles).axes)
    assert {title in worst for title in (b, c, "PGD-AT")} == {True}
    assert a not in worst
    assert a in average
    assert not {b, c} & average


def test_a_model_without_robustness_does_not_pale_the_other_changes(tmp_path, monkeypatch):
    base, near = [0.5, 0.4, 0.6], [0.54, 0.43, 0.6]
    runs = [run(tmp_path, "p", "pgd_at", base, 100.0), run(tmp_path, "n", "natural", [0.0] * 3, 10.0)]
    runs += [run(tmp_path, f"t{i}", "trades", near, 100.0, settings={"method.beta": float(i)}) for i in range(1, 7)]
    section, styles = section_of(runs, tmp_path / "out", monkeypatch)
    image = by_class.class_differences(as_compared(section), styles).axes[0].images[0]
    assert image.get_clim() == pytest.approx((-4 * 4.0, 4 * 4.0))  # four times the usual change, 4 points


def test_a_frontier_under_an_attack_of_its_own_says_so_everywhere(tmp_path, monkeypatch):
    """A model trained elsewhere, which stands on no frontier, was not judged by AutoAttack."""
    judged = {"pgd20": [0.6, 0.4], "autoattack": [0.5, 0.3]}
    runs = [run(tmp_path, m, m, None, 100.0, accuracy=judged) for m in ("pgd_at", "trades")]
    theirs = fake_run(tmp_path / "theirs", "ham", accuracy={"pgd20": [0.7, 0.5]}, state="adopted")
    section, styles = section_of([*runs, theirs], tmp_path / "out", monkeypatch)
    assert (section["attack"], section["frontier"]["attack"]) == ("pgd20", "autoattack")
    assert section["frontier"]["attack_why"] == "the strongest attack that all these runs share"
    compared = as_compared(section)
    assert [g["title"] for g in compared["groups"]] == ["PGD-AT", "TRADES"]
    for figure in (frontier.against_time(compared, styles), by_class.class_differences(compared, styles)):
        assert "AutoAttack" in figure.axes[0].get_ylabel()
    page = (tmp_path / "out" / "frontier.html").read_text()
    assert "By AutoAttack, the strongest attack that all these runs share." in page
    assert "Points that each class gains over PGD-AT under AutoAttack" in page
    assert "PGD-20" not in page.split("<h3>Checks for gradient masking")[0].split("<h2>")[1]


def test_a_baseline_that_is_not_compared_has_no_changes_of_classes(tmp_path, monkeypatch):
    runs = [run(tmp_path, m, m, [0.6, 0.4], 100.0) for m in ("trades", "mart")]
    runs.append(fake_run(tmp_path / "p", "pgd_at", accuracy={"autoattack": [0.5, 0.3]}, state="running"))
    section, styles = section_of(runs, tmp_path / "out", monkeypatch)
    compared = as_compared(section)
    assert (section["baseline"], compared["baseline"]) == ("PGD-AT", None)
    assert by_class.class_differences(compared, styles) is None
    assert "gain" not in (tmp_path / "out" / "frontier.html").read_text().split("<h2>")[1]


def test_without_a_baseline_the_first_method_is_named(tmp_path):
    runs = [run(tmp_path, m, m, [0.6, 0.4], 100.0) for m in ("trades", "mart", "wat")]
    fake_runs.change_evaluation(runs[2], lambda raw: raw["attacks"]["autoattack"].update(n=40))
    report.build(runs, tmp_path / "out", attack="autoattack", pdf=False)
    (section,) = json.loads((tmp_path / "out" / "data.json").read_text())["sections"]
    assert section["frontier"]["left_out"] == {"WAT": "judged on 40 images against 200 of TRADES"}


def test_the_captions_attack_is_the_strongest(field, tmp_path, monkeypatch):
    section, _ = section_of(field, tmp_path / "out", monkeypatch)
    titles = [figure_list._titled(e.title, section) for e in figure_list.ENTRIES if e.frontier]
    assert titles[0] == "Accuracy against training time under AutoAttack"
    assert math.isclose(section["frontier"]["methods"][0]["average"]["mean"], 0.5)
