"""The report's numbers against figures computed by hand, and the claims they decide."""

from __future__ import annotations

import json
import math
import statistics

import fake_runs
import pytest
from fake_runs import fake_run

from ham_kernels import report
from ham_kernels.report.comparing.claims import verdict
from ham_kernels.report.comparing.over_seeds import interval_of_ratio, mean_interval, spread
from ham_kernels.report.reading.evaluations import Interval

# two classes, so that std over classes is half their difference
PGD_AT = ([0.6, 0.2], [0.7, 0.3])  # of seeds 0 and 1: averages 0.4 and 0.5, worst 0.2 and 0.3, std 0.2 and 0.2
HAM = ([0.5, 0.3], [0.6, 0.5])  # averages 0.4 and 0.55, worst 0.3 and 0.5, std 0.1 and 0.05
CLEAN = [1.0, 0.9]


@pytest.fixture(scope="module")
def two_methods(tmp_path_factory):
    """PGD-AT in 4 s and 6 s, HAM in 2 s and 3 s, two seeds each. HAM's epochs from the second on mine."""
    root = tmp_path_factory.mktemp("two_methods")
    runs = []
    for seed in (0, 1):
        scale = (1.0, 1.5)[seed]
        parts = {
            "confidence": fake_runs.confidence([0.2, 0.4 + 0.2 * seed], [[1, 1], [0, 2]]),
            "easy": fake_runs.easy([0.5, 0.6, 0.7 + 0.1 * seed]),
            "masking": fake_runs.masking(seed == 1, "transfer is stronger"),
        }
        base = {"clean": CLEAN, "pgd20": PGD_AT[seed]}
        ours = {"clean": CLEAN, "pgd20": HAM[seed], "autoattack": [0.4, 0.3]}
        runs.append(fake_run(root / f"pgd{seed}", "pgd_at", seed, accuracy=base, seconds=[scale] * 4, parts=parts))
        times = [scale, scale / 3, scale / 3, scale / 3]
        runs.append(fake_run(root / f"ham{seed}", "ham", seed, accuracy=ours, seconds=times, parts=parts))
    out = root / "out"
    assert report.build(runs, out) == out / "index.html"
    return out


@pytest.fixture(scope="module")
def section(two_methods):
    (found,) = json.loads((two_methods / "data.json").read_text())["sections"]
    return found


def test_means_over_seeds(section):
    assert [g["title"] for g in section["groups"]] == ["PGD-AT", "HAM"]
    assert (section["attack"], section["baseline"]) == ("pgd20", "PGD-AT")
    robust = section["groups"][1]["accuracy"]["ema"]["pgd20"]
    assert robust["average"]["mean"] == pytest.approx(0.475)
    assert robust["average"]["std"] == pytest.approx(0.15 / math.sqrt(2))
    assert robust["worst"]["mean"] == pytest.approx(0.4)  # of each run's worst, here of the same class
    assert robust["std"]["mean"] == pytest.approx(0.075)
    assert robust["nstd"]["mean"] == pytest.approx((0.1 / 0.4 + 0.05 / 0.55) / 2)
    assert [s["mean"] for s in robust["per_class"]] == pytest.approx([0.55, 0.4])
    assert robust["per_class"][1]["low"] == pytest.approx(0.4 - 0.2 / math.sqrt(2))
    assert robust["per_class"][1]["values"] == [0.3, 0.5]


def test_times(section):
    base, ham = section["groups"]
    assert base["time"]["values"] == [4.0, 6.0]
    assert ham["time"]["mean"] == pytest.approx(2.5)
    assert ham["relative_time"] == pytest.approx(0.5)
    assert base["relative_time"] == 1.0


def test_differences_are_taken_seed_by_seed(section):
    first, second = section["groups"][1]["differences"]
    assert (first["mean"], first["std"]) == pytest.approx((-0.1, 0.0), abs=1e-12)
    assert second["mean"] == pytest.approx(0.15)  # of 0.1 and 0.2
    assert second["std"] == pytest.approx(0.1 / math.sqrt(2))
    assert section["groups"][0]["differences"] is None


def test_claims(section):
    found = {c["claim"]: c for c in section["claims"]}
    assert all(c["group"] == "HAM" for c in section["claims"])
    whole, phase, worst, std = found.values()
    assert list(found)[:2] == ["training time −45 %, whole run", "training time −45 %, mining epochs alone"]
    assert whole["value"] == pytest.approx(-0.5)
    assert phase["value"] == pytest.approx(1 / 3 - 1)
    assert worst["value"] == pytest.approx(0.15)
    assert std["value"] == pytest.approx(0.075 / 0.2 - 1)
    assert [c["holds"] for c in (whole, phase)] == [True, True]
    said = "+15.0 ± 7.1 points (average over all images +2.5); undecided: 95 % interval −48.5 to +78.5"
    assert (worst["measured"], worst["holds"]) == (said, None)  # two seeds leave much open
    assert std["measured"].startswith("−62 % (relative to the average −6")


def test_the_page_says_what_was_done_and_what_not_to_trust(two_methods):
    page = (two_methods / "index.html").read_text()
    assert "Settings of all: model small_cnn, " in page
    assert ", K 10, step size 0.05, " in page
    warning = "does not hold in 1 of 2 runs, so its accuracy under PGD alone proves little"
    assert page.index("What the models are worth") < page.index("The paper's claims") < page.index(warning)
    assert page.count(warning) == 2  # of both methods


@pytest.mark.parametrize(("n", "t"), [(2, 12.706), (4, 3.182), (10, 2.262), (11, 2.228), (31, 2.042)])
def test_intervals_are_students(n, t):
    values = [float(i) for i in range(n)]
    low, high = mean_interval(values)
    assert (high - low) / 2 == pytest.approx(t * statistics.stdev(values) / math.sqrt(n), rel=2e-3)
    assert (low + high) / 2 == pytest.approx((n - 1) / 2)
    assert mean_interval([1.0]) is None
    assert mean_interval([1.0, 1.0]) is None
    assert mean_interval([1.0, 1.0], exact=True) == (1.0, 1.0)


@pytest.mark.parametrize(("worst", "holds"), [([0.30, 0.31, 0.32], True), ([0.2, 0.201, 0.202], False),
                                              ([0.21, 0.23, 0.27], None)])  # fmt: skip
def test_a_claim_within_the_interval_over_seeds_is_undecided(tmp_path, worst, holds):
    runs = []
    for seed, value in enumerate(worst):
        for method, values in (("pgd_at", [0.4, 0.2]), ("ham", [0.4, value])):
            runs.append(fake_run(tmp_path / f"{method}{seed}", method, seed=seed, accuracy={"pgd20": values}))
    report.build(runs, tmp_path / "out")
    (section,) = json.loads((tmp_path / "out" / "data.json").read_text())["sections"]
    found = next(c for c in section["claims"] if c["claim"].startswith("worst class"))
    assert found["holds"] is holds
    assert ("undecided" in found["measured"]) == (holds is None)
    assert ("undecided" in (tmp_path / "out" / "index.html").read_text()) >= (holds is None)


def test_confidence_easy_and_masking(section):
    ham = section["groups"][1]
    assert ham["confidence"]["shares"] == pytest.approx([0.25, 0.75])
    assert [s["mean"] for s in ham["confidence"]["overconfident"]] == pytest.approx([0.2, 0.5])
    assert [(e["m"], e["stay_share"]["mean"]) for e in ham["easy"]["by_m"]] == [
        (1, 0.5), (2, 0.6), (3, pytest.approx(0.75)),
    ]  # fmt: skip
    (check,) = ham["masking"]
    assert (check["runs"], check["suspicious"], check["why"]) == (2, ["ham1"], ["transfer is stronger"])


def test_curves(section):
    curves = section["groups"][1]["curves"]
    assert curves["epoch"] == [1, 2, 3, 4]
    assert curves["hard_fraction"]["mean"] == [1.0, 0.25, 0.25, 0.25]
    assert curves["loss"]["mean"] == pytest.approx([2, 1, 2 / 3, 0.5])
    assert curves["val.pgd10.worst_class"]["mean"] == pytest.approx([0.22, 0.24, 0.26, 0.28])
    assert curves["val_ema.pgd10.accuracy"]["mean"][0] == pytest.approx(0.33)


def test_markdown(two_methods):
    lines = (two_methods / "table.md").read_text().splitlines()
    assert lines[0] == "digits, ε 0.2 (L∞); 2 seeds, mean ± standard deviation; weight average."
    head, _, base, ham = ([cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:])
    assert head[1:] == [
        "Clean avg", "Clean worst", "PGD-20 avg", "PGD-20 worst", "AutoAttack avg", "AutoAttack worst",
        "PGD-20 over classes std", "PGD-20 over classes nstd", "Training time", "Training / PGD-AT",
    ]  # fmt: skip
    # two seeds tell nothing apart, so nothing is best
    assert base == [
        "PGD-AT", "95.0 ± 0.0", "90.0 ± 0.0", "45.0 ± 7.1", "25.0 ± 7.1", "–", "–", "20.0 ± 0.0",
        "0.450 ± 0.071", "5.0 s ± 1.4 s", "1.00",
    ]  # fmt: skip
    assert ham == [
        "HAM", "95.0 ± 0.0", "90.0 ± 0.0", "47.5 ± 10.6", "40.0 ± 14.1", "35.0 ± 0.0", "30.0 ± 0.0",
        "7.5 ± 3.5", "0.170 ± 0.112", "2.5 s ± 0.7 s", "0.50",
    ]  # fmt: skip


def test_latex(two_methods):
    """Two tables, of accuracy and of cost, in numbers that siunitx aligns."""
    accuracy, cost = (two_methods / "table.tex").read_text().split(r"\end{table}")[:2]
    assert r"\label{tab:accuracy}" in accuracy
    assert r"\label{tab:cost}" in cost
    assert r"\multicolumn{3}{c}{PGD-20, \%}" in accuracy
    assert r"\cmidrule(lr){3-5}" in accuracy
    lines = accuracy.splitlines()
    rows = lines[lines.index(r"\midrule") + 1 : lines.index(r"\bottomrule")]
    assert len(rows) == 2
    assert rows[1] == r"{HAM} & 95.0 +- 0.0 & 47.5 +- 10.6 & 40.0 +- 14.1 & 7.5 +- 3.5 \\"
    columns = ["2.1(1)", "2.1(3)", "2.1(3)", "2.1(2)"]
    begun = next(line for line in lines if line.startswith(r"\begin{tabularx}"))
    assert begun.endswith(f"X{''.join(f'S[table-format={digits}]' for digits in columns)}@{{}}}}")
    assert r"{HAM} & 2.5 +- 0.7 & 0.50 & \bfseries 14.2 \\" in cost
    (two_methods / "table.tex").read_text().encode("latin-1")  # ± × λ ε and the rest are commands


def test_page_says_what_it_shows(two_methods):
    page = (two_methods / "index.html").read_text()
    for words in (
        "weight average", "200 test images of digits", "abc1234", "Test CPU", "torch 2.15.0", "2026-01-02T03:04:05",
        "holds here", "suspicious in 1", "ham1: transfer is stronger", "0123456789ab",
    ):  # fmt: skip
        assert words in page
    assert "does not hold here" not in page
    assert "Missing or unreadable" not in page


def test_page_needs_no_other_file(two_methods):
    import re

    page = (two_methods / "index.html").read_text()
    sources = re.findall(r'(?:src|srcset|poster|data)="([^"]*)"', page)
    assert len(sources) == 8
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert set(re.findall(r'https?://[^"<]*', page)) == {"https://arxiv.org/abs/2308.01823"}
    assert not re.search(r"<(script|link|iframe|object)\b|@import|url\(", page)
    figures = json.loads((two_methods / "data.json").read_text())["figures"]
    assert sorted(str(p.relative_to(two_methods)) for p in two_methods.glob("figures/*")) == sorted(figures)
    usual = {"index.html", "data.json", "table.md", "table.tex", "classes.csv", "figures"}
    frontier = {"frontier.html", "frontier.md", "frontier.tex"}
    assert {p.name for p in two_methods.iterdir()} == usual | frontier


def test_one_seed_shows_the_bootstrap_interval(tmp_path):
    runs = [
        fake_run(tmp_path / "p", "pgd_at", accuracy={"pgd20": [0.6, 0.3]}),
        fake_run(tmp_path / "h", "ham", accuracy={"pgd20": [0.5, 0.32]}),
    ]
    report.build(runs, tmp_path / "out")
    (section,) = json.loads((tmp_path / "out" / "data.json").read_text())["sections"]
    spread = section["groups"][1]["accuracy"]["ema"]["pgd20"]["per_class"][0]
    assert (spread["std"], spread["low"], spread["high"]) == (None, pytest.approx(0.46), pytest.approx(0.54))
    gain = section["groups"][1]["differences"][0]  # both intervals reach 0.04
    assert gain["low"] == pytest.approx(-0.1 - math.hypot(0.04, 0.04))
    assert "| 41.0 |" in (tmp_path / "out" / "table.md").read_text().replace("**", "")
    worst = next(c for c in section["claims"] if c["claim"].startswith("worst class"))
    assert worst["value"] == pytest.approx(0.02)
    said = "+2.0 points (average over all images −4.0); undecided: 95 % interval of runs that do not pair, −3.7 to +7.7"
    assert (worst["measured"], worst["holds"]) == (said, None)
    page = (tmp_path / "out" / "index.html").read_text()
    assert "one seed: an indication only" in page


def test_a_claim_met_exactly_holds():
    assert 0.142 - 0.11 < 0.032  # rounding
    assert verdict(0.142 - 0.11, None, 0.032, below=False) == (True, "")
    assert verdict(0.55 - 1, None, -0.45, below=True) == (True, "")


def test_accuracies_that_are_alike_in_all_seeds_decide_nothing_and_times_do(tmp_path):
    runs = []
    for seed in (0, 1):
        base, ours = {"pgd20": [0.6, 0.11]}, {"pgd20": [0.6, 0.142]}
        runs.append(fake_run(tmp_path / f"p{seed}", "pgd_at", seed, accuracy=base, seconds=[1.0] * 4))
        runs.append(fake_run(tmp_path / f"h{seed}", "ham", seed, accuracy=ours, seconds=[0.55] * 4))
    report.build(runs, tmp_path / "out")
    (section,) = json.loads((tmp_path / "out" / "data.json").read_text())["sections"]
    assert [c["holds"] for c in section["claims"]] == [True, True, None, None]
    assert section["claims"][2]["measured"].endswith("; undecided: all seeds alike, which says nothing of others")


def test_claims_are_held_against_every_attack_that_both_were_judged_with(tmp_path):
    """A gain under PGD that the CW loss takes back is no gain; an attack on fewer images says so."""
    base = {"pgd20": [0.6, 0.3], "cw20": [0.6, 0.3], "autoattack": [0.5, 0.2]}
    ham = {"pgd20": [0.6, 0.4], "cw20": [0.5, 0.25], "autoattack": [0.4, 0.1]}
    runs = [
        fake_run(tmp_path / "p", "pgd_at", accuracy=base),
        fake_run(tmp_path / "h", "ham", accuracy=ham),
    ]
    for run in runs:
        path = run / "evaluation" / "ema.json"
        raw = json.loads(path.read_text())
        raw["attacks"]["autoattack"]["n"] = raw["images"] - 1
        path.write_text(json.dumps(raw))
    report.build(runs, tmp_path / "out")
    (section,) = json.loads((tmp_path / "out" / "data.json").read_text())["sections"]
    worst = {c["claim"]: c["holds"] for c in section["claims"] if c["claim"].startswith("worst class")}
    assert worst == {
        "worst class +3.2 points (weight average, PGD-20)": True,
        "worst class +3.2 points (weight average, CW-20)": False,
        "worst class +3.2 points (weight average, AutoAttack)": False,
    }
    page = (tmp_path / "out" / "index.html").read_text()
    assert f"AutoAttack (on {raw['images'] - 1} images)" in page
    head = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert any("CW-20" in line and "AutoAttack" in line for line in head)


def test_a_folder_of_runs_stands_for_them(tmp_path):
    for name, method in (("p", "pgd_at"), ("h", "ham")):
        fake_run(tmp_path / "sweep" / name, method, accuracy={"pgd20": [0.6, 0.3]})
    fake_run(tmp_path / "sweep" / "warm-ups" / "seed0", "pgd_at", accuracy={"pgd20": [0.6, 0.3]})
    report.build([tmp_path / "sweep"], tmp_path / "out")
    data = json.loads((tmp_path / "out" / "data.json").read_text())
    assert sorted(run["name"] for run in data["runs"]) == ["h", "p"]


def judged_on_some_seeds(tmp_path, flags):
    """PGD-AT on three seeds under AutoAttack, HAM on the first alone; with flags, so that images pair."""
    base, ours = ([0.5, 0.1], [0.5, 0.4], [0.5, 0.4]), [0.5, 0.45]
    runs = []
    for seed, values in enumerate(base):
        attacks = {"pgd20": [0.6, 0.5]}
        runs.append(fake_run(tmp_path / f"p{seed}", "pgd_at", seed, accuracy=attacks | {"autoattack": values}))
        theirs = attacks | ({"autoattack": ours} if seed == 0 else {})
        runs.append(fake_run(tmp_path / f"h{seed}", "ham", seed, accuracy=theirs))
    for run, values in ((runs[0], base[0]), (runs[1], ours)) if flags else ():
        path = run / "evaluation" / "ema.json"
        raw = json.loads(path.read_text())
        right = [round(100 * value) for value in values]
        fake_runs.with_flags(raw["attacks"]["autoattack"], ["1" * n + "0" * (100 - n) for n in right])
        path.write_text(json.dumps(raw))
    return runs


@pytest.mark.parametrize("flags", [True, False])
def test_seeds_that_one_method_lacks_are_not_compared(tmp_path, flags):
    """The mean of HAM's one seed against that of PGD-AT's three would be a gain of 15 points; of the same seed it is
    35, and what seeds differ by is not known."""
    report.build(judged_on_some_seeds(tmp_path, flags), tmp_path / "out", attack="autoattack")
    (section,) = json.loads((tmp_path / "out" / "data.json").read_text())["sections"]
    worst, std = (c for c in section["claims"] if "AutoAttack" in c["claim"])
    assert worst["value"] == pytest.approx(0.35)
    assert (worst["seeds"], std["seeds"]) == (1, 1)
    assert std["value"] == pytest.approx(0.025 / 0.2 - 1)
    assert worst["holds"] is (True if flags else None)
    assert [m["seeds"] for m in section["frontier"]["methods"]] == [3, 1]
    assert "of fewer seeds: HAM under AutoAttack (1 of 3)" in (tmp_path / "out" / "table.md").read_text()
    assert "1 to 3 seeds" in (tmp_path / "out" / "frontier.md").read_text()


def test_an_interval_that_is_cut_at_zero_is_told_by_its_longer_side(tmp_path):
    runs = [
        fake_run(tmp_path / f"{method}{seed}", method, seed, accuracy={"pgd20": [0.5, value]})
        for method in ("pgd_at", "ham")
        for seed, value in enumerate((0.0, 0.0, 0.05))
    ]
    report.build(runs, tmp_path / "out")
    _, high = mean_interval([0.0, 0.0, 0.05])
    assert f"| 1.7 ± {100 * high - 5 / 3:.1f} |" in (tmp_path / "out" / "frontier.md").read_text()


def test_the_interval_of_a_ratio():
    """Of 0.1 ± 0.01 to 0.2 ± 0.04 in logarithms, by hand; of one that may be 0 it has no end."""
    low, high = interval_of_ratio(spread([Interval(0.1, 0.09, 0.11)]), spread([Interval(0.2, 0.16, 0.24)]))
    below, above = math.hypot(math.log(10 / 9), math.log(1.2)), math.hypot(math.log(1.1), math.log(1.25))
    assert (low, high) == pytest.approx((0.5 * math.exp(-below), 0.5 * math.exp(above)))
    low, high = interval_of_ratio(spread([Interval(0.1, 0.0, 0.2)]), spread([Interval(0.2, 0.16, 0.24)]))
    assert low == 0.0
    assert high > 1
    assert interval_of_ratio(spread([0.1]), spread([0.2])) is None
