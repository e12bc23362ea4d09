"""docs/tutorial.md: every command on it runs, in order, and leaves what the text says."""

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


@pytest.mark.timeout(1500)
def test_every_command_of_the_tutorial_runs(tmp_path):
    pytest.importorskip("pyautoattack")
    blocks = re.findall(r"^```bash\n(.*?)^```$", (ROOT / "docs/tutorial.md").read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 7
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, start in (("ham", "-m ham_kernels "), ("python", "")):
        shim = programs / name
        shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" {start}"$@"\n')
        shim.chmod(shim.stat().st_mode | stat.S_IXUSR)
    env = environment(ROOT, ROOT / "python", PATH=f"{programs}{os.pathsep}{os.environ['PATH']}")
    work = tmp_path / "work"
    work.mkdir()
    for block in blocks:
        done = subprocess.run(["bash", "-e", "-c", block], cwd=work, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
    data = json.loads((work / "report/data.json").read_text())
    (section,) = data["sections"]
    assert [g["title"] for g in section["groups"]] == ["PGD-AT", "HAM"]
    claims = {c["claim"] for c in section["claims"]}
    for attack in ("PGD-20", "CW-20", "AutoAttack"):
        assert f"worst class +3.2 points (weight average, {attack})" in claims
    assert "AutoAttack (on 60 images)" in (work / "report/index.html").read_text()
    three = json.loads((work / "report_of_three/data.json").read_text())
    assert [g["title"] for g in three["sections"][0]["groups"]] == ["PGD-AT", "HAM", "My loop"]
    assert len(three["sections"]) == 1
