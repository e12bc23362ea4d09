"""Files that are whole or not there, and what random generators they bring back."""

from __future__ import annotations

import errno
import os
import random

import numpy as np
import pytest
import torch

from ham_kernels.common import files
from ham_kernels.common.files import CheckpointError
from ham_kernels.runs import checkpoints
from ham_kernels.runs.checkpoints import Checkpoints

STATE = {"t": torch.arange(1000.0), "n": [1, 2.5, None, "x", (3, True)], "d": {"empty": torch.zeros(0)}}


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert torch.equal(a["t"], b["t"])
    assert a["n"] == b["n"]


def test_what_is_saved_comes_back_and_torch_reads_it_too(tmp_path):
    digest = files.save(tmp_path / "a.pt", STATE)
    assert_same(files.load(tmp_path / "a.pt"), STATE)
    assert_same(torch.load(tmp_path / "a.pt", weights_only=True), STATE)
    assert (tmp_path / "a.pt").read_bytes().endswith(digest.encode())
    assert os.listdir(tmp_path) == ["a.pt"]


def test_every_byte_counts(tmp_path, seed):
    """One bit anywhere: header, tensors, padding, zip directory, checksum."""
    path = tmp_path / "a.pt"
    files.save(path, {"t": torch.zeros(3)})
    good = path.read_bytes()
    for at in range(len(good)):
        bad = bytearray(good)
        bad[at] ^= 1 << (seed + at) % 8
        path.write_bytes(bad)
        with pytest.raises(CheckpointError, match=r"a\.pt"):
            files.load(path)
    for length in range(0, len(good), 7):
        path.write_bytes(good[:length])
        with pytest.raises(CheckpointError, match=r"a\.pt"):
            files.load(path)


def test_a_file_of_torch_alone_is_not_taken_for_checked(tmp_path):
    torch.save(STATE, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="was not written by ham_kernels"):
        files.load(tmp_path / "a.pt")


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_what_was_there(step, tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    files.save(path, STATE)
    before = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, step, full)
    with pytest.raises(OSError, match=r"No space left on device, writing: .*a\.pt"):
        files.save(path, {"t": torch.ones(5)})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.pt"]


def test_permissions_are_those_of_other_files(tmp_path):
    files.save(tmp_path / "a.pt", STATE)
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "a.pt").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_the_two_newest_stay(tmp_path):
    kept = Checkpoints(tmp_path)
    assert kept.load_newest() is None
    (tmp_path / ".step_0000000001.pt.x.partial").write_bytes(b"of a killed process")
    for step in (3, 12, 200):
        kept.save({"step": step}, step)
    assert [p.name for p in kept.newest_first()] == ["step_0000000200.pt", "step_0000000012.pt"]
    assert sorted(os.listdir(tmp_path)) == ["step_0000000012.pt", "step_0000000200.pt"]
    assert kept.load_newest()[1] == {"step": 200}


def test_random_generators_go_on_where_they_were(tmp_path):
    files.save(tmp_path / "a.pt", checkpoints.random_states())

    def draw():
        return random.random(), random.gauss(0, 1), np.random.normal(), float(torch.rand(()))  # noqa: NPY002

    expected = [draw() for _ in range(3)]
    checkpoints.set_random_states(files.load(tmp_path / "a.pt"))
    assert [draw() for _ in range(3)] == expected
