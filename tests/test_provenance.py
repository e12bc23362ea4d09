"""The machine that a figure was measured on, told apart from others."""

from __future__ import annotations

import platform

from ham_kernels.common import provenance


def test_processors_of_one_name_are_told_apart(tmp_path):
    """Hosts call unlike processors "AMD EPYC", one of them half as fast as another."""
    file = tmp_path / "cpuinfo"
    core = "processor\t: {}\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: {}\nmodel name\t: AMD EPYC\n\n"
    told = []
    for model in (1, 17):
        file.write_text(core.format(0, model) + core.format(1, model))
        told.append(provenance._cpu(file))
    assert told == ["AMD EPYC (family 25, model 1)", "AMD EPYC (family 25, model 17)"]


def test_a_processor_without_a_name(tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nCPU implementer\t: 0x41\n")  # ARM
    assert provenance._cpu(file) == platform.machine()
    assert provenance._cpu(tmp_path / "none") in (platform.processor(), platform.machine())
    assert provenance.machine()["cpu"] == provenance._cpu()
