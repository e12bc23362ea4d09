"""python -m ham_kernels: help, unknown commands."""

from __future__ import annotations

import pytest

from ham_kernels.commands import cli


def test_help(capsys):
    assert cli.main([]) == 0
    assert "doctor" in capsys.readouterr().out


def test_unknown_command(capsys):
    assert cli.main(["trian"]) == 2
    assert "no command 'trian'" in capsys.readouterr().err


@pytest.mark.parametrize("args", [["doctor"], ["doctor", "--json"]])
def test_doctor_is_reachable(args, capsys):
    assert cli.main(args) in (0, 1)
    assert "pgd_step_" in capsys.readouterr().out
