"""Decoded images on disk: read back without decoding, rebuilt when damaged, replaced when the source changes."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pictures
import pytest
import torch
from pictures import SPLIT, write_folder, write_photos, write_tar

from ham_kernels import data
from ham_kernels.data import folders


@pytest.fixture
def decoded(monkeypatch) -> list:
    """The files decoded so far."""
    done, decode = [], folders.decode

    def counting(file, *args):
        done.append(str(file))
        return decode(file, *args)

    monkeypatch.setattr(folders, "decode", counting)
    return done


@pytest.fixture(params=["folder", "tar"])
def source(request, tmp_path) -> Path:
    folder = write_folder(tmp_path / "set", SPLIT)
    return folder if request.param == "folder" else write_tar(tmp_path / "set.tar.xz", folder)


def load(source: Path, **how) -> data.ImageSet:
    """Under an empty data root beside the source; a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return data.load("digits", source, root=source.parent / "root", **how)


def cache_files(source: Path) -> list[Path]:
    return sorted((source.parent / "root" / "cache").iterdir())


def assert_equal(a: data.ImageSet, b: data.ImageSet) -> None:
    assert (a.name, a.classes, a.counts) == (b.name, b.classes, b.counts)
    assert all(torch.equal(s, t) for part in a.counts for s, t in zip(a.part(part), b.part(part), strict=True))


def test_second_load_decodes_nothing(source, decoded):
    first = load(source)
    assert len(decoded) == 12
    assert_equal(load(source), first)
    assert len(decoded) == 12
    (file,) = cache_files(source)
    assert file.name.startswith(source.name)
    assert file.suffix == ".pt"


def test_a_validation_part_is_kept_too(tmp_path):
    folder = write_folder(tmp_path / "set", [*SPLIT, "val/cat/0.png", "val/dog/0.png"])
    first = load(folder)
    assert first.counts["val"] == 2
    assert_equal(load(folder), first)


def test_cache_false_neither_reads_nor_writes(source, decoded):
    load(source, cache=False)
    assert not (source.parent / "root").exists()
    load(source)
    load(source, cache=False)
    assert len(decoded) == 36


def overwrite_the_end(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-300])


def change_one_pixel(file: Path) -> None:
    """torch.load would not notice."""
    content = bytearray(file.read_bytes())
    place = content.index(bytes([5] * 20))  # image number 5
    content[place] = 99
    file.write_bytes(content)


def hold_something_else(file: Path) -> None:
    torch.save({"model": torch.zeros(1)}, file)


@pytest.mark.parametrize("damage", [overwrite_the_end, change_one_pixel, hold_something_else])
def test_a_damaged_file_is_reported_once_and_rebuilt(source, decoded, damage):
    first = load(source)
    (file,) = cache_files(source)
    damage(file)
    with pytest.warns(UserWarning, match="is damaged") as caught:
        again = data.load("digits", source, root=source.parent / "root")
    assert len(caught) == 1
    assert f"cache: {file} is damaged" in str(caught[0].message)
    assert_equal(again, first)
    assert len(decoded) == 24
    assert_equal(load(source), first)
    assert len(decoded) == 24


def test_a_changed_folder_is_decoded_again(tmp_path, decoded):
    folder = write_folder(tmp_path / "set", SPLIT)
    load(folder)
    old = cache_files(folder)
    file = folder / "train/cat/0.png"
    stat = file.stat()
    file.write_bytes(pictures.png(77))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert load(folder).x_train[0].unique().tolist() == [77]
    (folder / "train/dog/2.png").unlink()
    assert load(folder).counts["train"] == 5
    assert len(cache_files(folder)) == 1  # those of former states are gone
    assert cache_files(folder) != old


def test_a_changed_tar_is_decoded_again(tmp_path):
    folder = write_folder(tmp_path / "set", SPLIT)
    tar = write_tar(tmp_path / "set.tar.xz", folder)
    load(tar)
    stat = tar.stat()
    (folder / "train/cat/0.png").write_bytes(pictures.png(77))
    write_tar(tar, folder)
    os.utime(tar, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert load(tar).x_train[0].unique().tolist() == [77]
    assert len(cache_files(tar)) == 1


def test_sizes_and_sources_are_kept_apart(tmp_path, decoded):
    one, two = (write_photos(tmp_path / name) for name in ("one", "two"))
    for _ in range(2):
        assert load(one, size=8).x_train.shape[2:] == (8, 8)
        assert load(one, size=9).x_train.shape[2:] == (9, 9)
        assert load(two, size=8).x_train.shape[2:] == (8, 8)
    assert len(decoded) == 3 * 14
    assert len(cache_files(one)) == 3


def test_files_that_stay_files_are_not_cached(tmp_path):
    assert isinstance(load(write_photos(tmp_path / "set")), data.FileSet)
    assert not (tmp_path / "root").exists()


def test_a_cache_that_cannot_be_written_is_no_failure(tmp_path):
    folder = write_folder(tmp_path / "set", SPLIT)
    (tmp_path / "root").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match=r"cache: .*set-.*pt could not be written") as caught:
        images = data.load("digits", folder, root=tmp_path / "root")
    assert len(caught) == 1
    assert images.counts == {"train": 6, "test": 6}


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "set", SPLIT)

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(folder)
    assert cache_files(folder) == []


def test_imagenette32_is_cached(tmp_path, decoded):
    pictures.write_imagenette(tmp_path, "imagenette2-160")
    first, again = (data.load("imagenette32", root=tmp_path, download=False) for _ in range(2))
    assert len(decoded) == 14
    assert_equal(first, again)
    assert first.name == "Imagenette 32x32"


def test_a_long_name_of_wide_characters_is_cut_by_its_bytes(tmp_path, decoded):
    folder = write_folder(tmp_path / ("\u732b" * 62), SPLIT)
    for _ in range(2):
        data.class_folders(folder, root=tmp_path / "root")
    assert len(decoded) == len(SPLIT)
