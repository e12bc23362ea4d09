"""Every command of the tutorials runs, in order, and leaves what the text says."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import environment

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def follow(tmp_path):
    """Runs the bash blocks of a page of docs/ in a folder of its own, and returns that."""
    pytest.importorskip("pyautoattack")
    programs, work = tmp_path / "bin", tmp_path / "work"
    programs.mkdir()
    work.mkdir()
    for name, start in (("ham", "-m ham_kernels "), ("python", "")):
        shim = programs / name
        shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" {start}"$@"\n')
        shim.chmod(shim.stat().st_mode | stat.S_IXUSR)
    env = environment(ROOT, ROOT / "python", PATH=f"{programs}{os.pathsep}{os.environ['PATH']}")

    def run(page):
        blocks = re.findall(r"^```bash\n(.*?)^```$", (ROOT / "docs" / page).read_text(), re.DOTALL | re.MULTILINE)
        assert len(blocks) >= 5
        for block in blocks:
            done = subprocess.run(["bash", "-e", "-c", block], cwd=work, env=env, capture_output=True, text=True)
            assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        return work

    return run


def sections(report):
    return json.loads((report / "data.json").read_text())["sections"]


@pytest.mark.timeout(1500)
def test_every_command_of_the_tutorial_runs(follow):
    work = follow("tutorial.md")
    (section,) = sections(work / "report")
    assert [g["title"] for g in section["groups"]] == ["PGD-AT", "HAM"]
    claims = {c["claim"] for c in section["claims"]}
    for attack in ("PGD-20", "CW-20", "AutoAttack"):
        assert f"worst class +3.2 points (weight average, {attack})" in claims
    assert "AutoAttack (on 60 images)" in (work / "report/index.html").read_text()
    (three,) = sections(work / "report_of_three")
    assert [g["title"] for g in three["groups"]] == ["PGD-AT", "HAM", "My loop"]


@pytest.mark.timeout(1500)
def test_the_paper_has_its_tables_and_figures(follow):
    work = follow("for_a_paper.md")
    (section,) = sections(work / "paper")
    assert sorted(g["title"] for g in section["groups"]) == ["PGD-AT", "TRADES, beta 3", "TRADES, β=6", "fair"]
    assert [len(g["seeds"]) for g in section["groups"]] == [3, 3, 3, 1]
    assert section["attack"] == "pgd20"
    assert section["groups"][0]["over_eps"]["eps"] == [0.0, 0.05, 0.1, 0.2, 0.3]
    assert r"\label{tab:cost}" in (work / "paper/table.tex").read_text()
    assert "PGD-20 Gini" in (work / "paper/table.md").read_text()
    assert (work / "paper/figures/confusion.pdf").is_file()


@pytest.mark.timeout(1500)
def test_the_audit_has_its_verdicts(follow):
    """Of a model of TRADES that an ordinary loop trained, beside a run of ours."""
    work = follow("for_an_audit.md")
    (section,) = sections(work / "audit")
    assert {g["title"] for g in section["groups"]} == {"Their TRADES", "fair"}
    theirs = next(g for g in section["groups"] if g["title"] == "Their TRADES")
    assert theirs["adopted"]
    assert theirs["time"]["mean"] is None
    assert [check["runs"] for check in theirs["masking"]].count(1) >= 4
    assert {one["requirement"] for one in section["audit"]} == {
        "autoattack.accuracy>=5", "clean.class 8>=20", "gini<=0.9",
    }  # fmt: skip
    assert all(one["value"] is not None for one in section["audit"])
    assert not sections(work / "strict")[0]["audit"][0]["passes"]
    page = (work / "audit/index.html").read_text()
    for words in ("Requirements", "Which class is taken for which", "Accuracy over", "Images and their perturbation"):
        assert f"<h3>{words}" in page
