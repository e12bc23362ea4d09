"""What is not alike is neither ranked nor judged, and the page says why."""

from __future__ import annotations

import json
import re

import fake_runs
import pytest
from fake_runs import change_evaluation, fake_run, write_json

from ham_kernels import report

BASE = {"clean": [0.9, 0.8], "pgd20": [0.6, 0.3], "cw20": [0.6, 0.3]}
HAM = {"clean": [1.0, 0.9], "pgd20": [0.5, 0.4], "cw20": [0.5, 0.35]}


@pytest.fixture(autouse=True)
def without_figures(monkeypatch):
    """Most of a report's time is drawing; these tests read its words."""
    from ham_kernels.report.drawing import figure_list

    monkeypatch.setattr(figure_list, "ENTRIES", ())


FAR = {attack: [0.95 if attack == "clean" else 0.7, 0.94 if attack == "clean" else 0.6] for attack in BASE}


def pair(tmp_path, base=BASE, ours=HAM, base_settings=None, settings=None, **options):
    """PGD-AT in 4 s and HAM in 2 s, one seed each."""
    return [
        fake_run(tmp_path / "p", "pgd_at", accuracy=base, seconds=[1.0] * 4, settings=base_settings, **options),
        fake_run(tmp_path / "h", "ham", accuracy=ours, seconds=[0.5] * 4, settings=settings, **options),
    ]


def built(runs, out):
    """(index.html, its one section in data.json, table.md)."""
    report.build(runs, out)
    (section,) = json.loads((out / "data.json").read_text())["sections"]
    return (out / "index.html").read_text(), section, (out / "table.md").read_text()


def table_of(text):
    """(caption, {method: {column: cell}})."""
    caption, _, head, _, *rows = text.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in (head, *rows)]
    return caption, {row[0]: dict(zip(cells[0], row, strict=True)) for row in cells[1:]}


# ---------------------------------------------------------------- restarts
def test_an_attack_with_restarts_takes_the_place_of_the_attack(tmp_path):
    """As `ham evaluate --attacks clean pgd20 cw20 --restarts 3` names them."""
    renamed = {"clean": "clean", "pgd20": "pgd20-r3", "cw20": "cw20-r3"}
    page, section, text = built(
        pair(tmp_path, *({renamed[a]: values for a, values in each.items()} for each in (BASE, HAM))), tmp_path / "out"
    )
    assert section["attack"] == "cw20-r3"
    _, rows = table_of(text)
    assert list(rows["HAM"])[1:9] == [
        "Clean avg", "Clean worst", "PGD-20, 3 restarts avg", "PGD-20, 3 restarts worst", "CW-20, 3 restarts avg",
        "CW-20, 3 restarts worst", "CW-20, 3 restarts over classes std", "CW-20, 3 restarts over classes nstd",
    ]  # fmt: skip
    judged = [c["claim"] for c in section["claims"] if c["claim"].startswith("worst class")]
    assert [re.search(r", (.*)\)", claim)[1] for claim in judged] == ["CW-20, 3 restarts", "PGD-20, 3 restarts"]
    assert "“Robust” means CW-20, 3 restarts, the strongest attack that all these runs share." in page
    assert r"\multicolumn{3}{c}{CW-20, 3 restarts, \%}" in (tmp_path / "out" / "table.tex").read_text()


def test_a_fast_search_is_told(tmp_path):
    """Of which methods, where not of all; and in the command that makes the numbers again."""
    runs, words = pair(tmp_path), "looked for examples on a rounded, compiled form of the model"
    for run, says in ((runs[0], f"CW-20 of PGD-AT {words}"), (runs[1], f"CW-20 {words}")):
        change_evaluation(run, lambda raw: raw["attacks"]["cw20"].update(settings={"search": {"compile": True}}))
        page, section, _ = built(runs, tmp_path / "out")
        assert [note for note in section["notes"] if words in note] == [f"{says}; the model itself judged each."]
        assert "--attacks cw20 --search fast" in page


def test_the_stronger_of_two_attacks_that_both_were_judged_with(tmp_path):
    """More restarts before fewer; but what one method alone was judged with compares nothing."""
    both = {**HAM, "pgd20-r3": [0.5, 0.4], "cw20-r3": [0.5, 0.35]}
    _, section, text = built(pair(tmp_path / "a", both, both), tmp_path / "a" / "out")
    assert section["attack"] == "cw20-r3"
    assert "PGD-20, 3 restarts avg" in text
    assert "CW-20, 3 restarts avg" in text
    _, section, text = built(pair(tmp_path / "b", BASE, both), tmp_path / "b" / "out")
    assert section["attack"] == "cw20"
    assert "CW-20 avg" in text


# ---------------------------------------------------------------- images
def judged_on(runs, attack, counts):
    for run, n in zip(runs, counts, strict=True):
        change_evaluation(run, lambda raw, n=n: raw["attacks"][attack].update(n=n))


def test_accuracies_on_other_images_are_neither_ranked_nor_judged(tmp_path):
    runs = pair(tmp_path, BASE, FAR)
    judged_on(runs, "cw20", (60, 40))
    page, section, text = built(runs, tmp_path / "out")
    caption, rows = table_of(text)
    assert "; images: 200 (Clean, PGD-20), 40 to 60 (CW-20). Bold: " in caption
    bold = {column for row in rows.values() for column, cell in row.items() if "**" in cell}
    assert {"Clean avg", "PGD-20 avg", "PGD-20 worst"} <= bold
    assert not bold & {"CW-20 avg", "CW-20 worst"}
    claims = {c["claim"]: c for c in section["claims"]}
    for claim in ("worst class +3.2 points (weight average, CW-20)", "std over classes −22 % (weight average, CW-20)"):
        assert claims[claim]["holds"] is None
        assert claims[claim]["measured"] == "not judged: on 40 images against 60 of the baseline"
        assert claims[claim.replace("CW", "PGD")]["holds"] is not None
    assert "not judged: on 40 images against 60 of the baseline" in page


def test_an_attack_on_fewer_images_of_all_methods_is_ranked(tmp_path):
    runs = pair(tmp_path, BASE, FAR)
    judged_on(runs, "cw20", (60, 60))
    caption, rows = table_of(built(runs, tmp_path / "out")[2])
    assert "; images: 200 (Clean, PGD-20), 60 (CW-20). Bold: " in caption
    assert rows["HAM"]["CW-20 avg"] == "**65.0**"


def test_equal_images_leave_the_caption_alone(tmp_path):
    caption, _ = table_of(built(pair(tmp_path), tmp_path / "out")[2])
    assert caption.startswith("digits, ε 0.2 (L∞); one seed; weight average. Bold: ")


# ---------------------------------------------------------------- time
WORK = {  # what another run trained, and what is said of it
    "epochs": ({"optim.epochs": 8}, "epochs (4 and 8)"),
    "model": ({"model.name": "wrn_34_10"}, "model (small_cnn and wrn_34_10)"),
    "device": ({"run.device": "cuda"}, "device (cpu and cuda)"),
    "training images": ({"data.train_images": 500}, "training images (500 and all)"),
    "batch size": ({"data.batch_size": 64}, "batch size (64 and 320)"),
}


@pytest.mark.parametrize("what", WORK)
def test_times_of_other_work_are_neither_ranked_nor_judged(tmp_path, what):
    """Labels hide from the titles what differs."""
    change, words = WORK[what]
    settings = {"run.device": "auto", "run.label": "ours"}
    both = {"base_settings": settings | change | {"run.label": "theirs"}, "settings": settings}
    runs = [run for seed in (0, 1) for run in pair(tmp_path / str(seed), seed=seed, **both)]
    change_evaluation(runs[-1], lambda raw: raw["attacks"]["pgd20"]["worst_class"].update(value=0.41))
    page, section, text = built(runs, tmp_path / "out")
    times = [c for c in section["claims"] if c["claim"].startswith("training time")]
    assert [(c["measured"], c["holds"]) for c in times] == [(f"not judged: trained unlike in {words}", None)] * 2
    assert any(note.startswith(f"Trained unlike in {what}: ") for note in section["notes"])
    assert f"Trained unlike in {what}: " in page
    _, rows = table_of(text)
    assert [rows[m]["Training time"] for m in ("theirs", "ours")] == ["4.0 s ± 0.0 s", "2.0 s ± 0.0 s"]
    ratios = [] if what == "device" else ["1.00", "0.50"]  # of one place alone
    assert [rows[m]["Training / theirs"] for m in ("theirs", "ours") if "Training / theirs" in rows[m]] == ratios
    assert rows["ours"]["PGD-20 worst"] == "**40.5** ± 0.7"  # the rest is ranked


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"run.precision": "bf16"}, "precision (bf16 and fp32)"),
        ({"engine.compile": "require"}, "compile (off and on)"),
        ({"attack.steps": 7}, "attack steps (7 and 10)"),
    ],
)
def test_the_same_work_done_faster_is_ranked_but_is_not_what_the_method_gains(tmp_path, change, words):
    runs = [run for seed in (0, 1) for run in pair(tmp_path / str(seed), seed=seed, settings=change)]
    _, section, text = built(runs, tmp_path / "out")
    times = [c for c in section["claims"] if c["claim"].startswith("training time")]
    assert [(c["measured"], c["holds"]) for c in times] == [(f"not judged: trained unlike in {words}", None)] * 2
    assert "**2.0 s** ± 0.0 s | **0.50**" in text


def test_too_few_images_a_class_judge_nothing(tmp_path):
    """One of 31 images weighs more than the 3.2 points of the claim."""
    for count, holds in ((62, None), (64, True)):
        runs = pair(tmp_path / str(count), ours=HAM | {"cw20": [0.5, 0.5]})
        judged_on(runs, "cw20", (count, count))
        page, section, _ = built(runs, tmp_path / f"out{count}")
        claims = {c["claim"]: c for c in section["claims"]}
        found = claims["worst class +3.2 points (weight average, CW-20)"]
        assert found["holds"] is holds
        assert ("; not judged: 31 images a class" in found["measured"]) == (holds is None)
        assert claims["worst class +3.2 points (weight average, PGD-20)"]["holds"] is not None
        assert ("not judged: 31 images a class" in page) == (holds is None)


def test_ways_to_say_the_same(tmp_path):
    """A run from before an option was there; a device by name; "require" for "on"."""
    base = {"run.device": "cpu", "engine.compile": "on", "run.precision": "bf16"}
    ours = {
        "run.device": "auto", "engine.compile": "require", "run.precision": "require-bf16", "engine.winograd": "off",
    }  # fmt: skip
    _, section, _ = built(pair(tmp_path, base_settings=base, settings=ours), tmp_path / "out")
    assert [c["holds"] for c in section["claims"] if c["claim"].startswith("training time")] == [True, True]
    assert section["notes"] == []


def test_times_of_other_machines_are_neither_ranked_nor_judged(tmp_path):
    runs = pair(tmp_path)
    write_json(runs[1] / "environment.json", fake_runs.environment() | {"machine": {"cpu": "Other", "gpu": "H200"}})
    _, section, text = built(runs, tmp_path / "out")
    time = next(c for c in section["claims"] if c["claim"].startswith("training time"))
    assert (time["holds"], "machine (Other, GPU: H200 and Test CPU" in time["measured"]) == (None, True)
    assert "| 2.0 s |" in text
    assert "/ PGD-AT" not in text


@pytest.mark.parametrize(("threads", "alike"), [(1, True), (2, False)])
def test_one_thread_has_no_use_for_other_cores(threads, alike, tmp_path):
    """A process that may take one core is as fast as one that may take two, where it has one thread."""
    runs = pair(tmp_path)
    for run, cores in zip(runs, (2, 1), strict=True):
        machine = fake_runs.MACHINE | {"cores": f"{cores}, torch uses {threads} threads"}
        write_json(run / "environment.json", fake_runs.environment() | {"machine": machine})
    _, section, _ = built(runs, tmp_path / "out")
    time = next(c for c in section["claims"] if c["claim"].startswith("training time"))
    assert ("trained unlike in machine" not in time["measured"]) == alike
    assert any("Trained on different machines" in note for note in section["notes"]) != alike


def test_a_run_of_two_machines_is_of_both(tmp_path):
    """Its times compare with nobody's, not even with those of another run of the same two."""
    runs = pair(tmp_path)
    known = fake_runs.environment()
    other = {"cpu": "Other", "gpu": "H200"}
    sessions = [known["sessions"][0], {**known["sessions"][0], "from_epoch": 1, "machine": other}]
    for run in runs:
        sessions[0]["machine"] = known["machine"]
        write_json(run / "environment.json", known | {"machine": other, "sessions": sessions})
    page, section, _ = built(runs, tmp_path / "out")
    time = next(c for c in section["claims"] if c["claim"].startswith("training time"))
    assert (time["holds"], "machine (Other, GPU: H200 and Test CPU" in time["measured"]) == (None, True)
    assert any("Trained on different machines" in note for note in section["notes"])
    assert "; then Other, GPU: H200" in page


# ---------------------------------------------------------------- checks
def test_a_check_that_was_not_run_is_not_passed(tmp_path):
    parts = {"masking": fake_runs.masking(False, "as it should be")}
    parts["masking"]["checks"].append(
        {
            "name": "transfer",
            "title": "No stronger",
            "values": {},
            "suspicious": False,
            "why": "not run: no other model",
        }
    )
    page, section, _ = built(pair(tmp_path, parts=parts), tmp_path / "out")
    steps, transfer = section["groups"][0]["masking"]
    assert (steps["runs"], steps["not_run"]) == (1, [])
    assert (transfer["runs"], transfer["not_run"]) == (0, ["not run: no other model"])
    assert "<td>No stronger</td><td>not run in 1</td><td>not run: no other model</td>" in page
    assert "passed in 1</span> of 1</td>" in page
