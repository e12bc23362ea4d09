"""What a folder is taken for: parts by any usual spelling, classes, and what of it is refused or told."""

from __future__ import annotations

import gzip
import os
import sys
import tarfile
import warnings

import numpy as np
import pictures
import pytest
import torch
from pictures import write_folder, write_tar
from PIL import Image

from ham_kernels import data
from ham_kernels.commands.run_images import facts_of
from ham_kernels.common.troubles import HamWarning
from ham_kernels.data import folders
from ham_kernels.data.files import open_image


def load(path, **how):
    return data.class_folders(path, cache=False, **how)


def names(*folders: str, each: int = 3) -> list[str]:
    return [f"{folder}/{label}/{i}.png" for folder in folders for label in ("cat", "dog") for i in range(each)]


# ---------------------------------------------------------------- parts
@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("Train", "Test"), ("TRAIN", "TESTING"), ("training", "validation"), ("train", "Valid"),
        ("training_set", "test_set"),
        ("set/Training", "set/val"), ("train/train", "test/test"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("pack", [False, True])
def test_parts_in_any_usual_spelling(train, test, pack, tmp_path):
    source = write_folder(tmp_path / "photos", names(train, test))
    images = load(write_tar(tmp_path / "photos.tar", source) if pack else source)
    assert images.classes == ("cat", "dog")
    assert images.counts == {"train": 6, "test": 6}
    assert images.class_counts == {part: {"cat": 3, "dog": 3} for part in ("train", "test")}


def test_three_parts_in_any_spelling(tmp_path):
    images = load(write_folder(tmp_path / "set", names("TRAIN", "Valid", "testing")))
    assert images.counts == {"train": 6, "val": 6, "test": 6}


REFUSED = {
    "two spellings": (names("train", "Training", "test"), "folders Training and train, two spellings of one part"),
    "a folder beside": (names("train", "test", "extra"), r"the folder extra \(with extra/cat/0.png\) beside"),
    "a stray image": ([*names("train", "valid"), "preview.png"], "holds preview.png beside train/, valid/"),
    "images in a part": ([*names("Train"), "Test/0.png"], r"images directly in Test/ \(such as Test/0.png\)"),
    "one part": (names("Training"), "images in Training/ only; it needs train/ and test/"),
    "no training": (names("test", "val"), "images in test/, val/ only"),
    "odd names": (names("seg_train", "seg_test"), "seg_test/, seg_train/, which look like parts"),
    "years": (names("train2017", "val2017"), "train2017/, val2017/, which look like parts"),
    "parts in classes": (["a/train/0.png", "a/test/0.png", "b/train/0.png"], r"parts within a class \([ab]/train\)"),
    "a class only tested": ([*names("train", "test"), "test/cow/0.png"], "class 'cow' in its test part but not"),
    "one image of a class": ([*names("."), "cow/0.png"], "one image of class 'cow'; each class"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_layout_that_is_none_names_the_folder_or_file(case, tmp_path):
    files, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as error:
        load(write_folder(tmp_path / "photos", files))
    assert "'all'" not in str(error.value)


@pytest.mark.parametrize("classes", [("train", "ship", "plane"), ("testbed", "bench"), ("Trainer", "Tester")])
def test_classes_that_sound_like_parts(classes, tmp_path):
    images = load(write_folder(tmp_path / "set", [f"{c}/{i}.png" for c in classes for i in range(5)]))
    assert images.classes == tuple(sorted(classes))


# ---------------------------------------------------------------- what is left out, and thin classes
@pytest.mark.parametrize("pack", [False, True])
def test_what_is_left_out_is_counted_by_kind(pack, tmp_path):
    source = write_folder(tmp_path / "photos", names("train", "test"))
    for name in ("train/cat/9.HEIC", "train/dog/9.heic", "train/dog/notes", "test/.hidden.png", "labels.csv"):
        (source / name).write_bytes(b"?")
    (source / "train/fish").mkdir()
    source = write_tar(tmp_path / "photos.tar", source) if pack else source
    for _ in range(2):  # the second time from the cache
        with pytest.warns(HamWarning) as told:
            images = data.class_folders(source, root=tmp_path)
        said = " ".join(str(w.message) for w in told)
        assert "left out: 1 .csv, 2 .heic, 1 hidden, 1 no suffix;" in said
        assert "folders without an image: " in said
        assert "train/fish;" in said
        assert images.left_out == {".heic": 2, "no suffix": 1, "hidden": 1, ".csv": 1}
    assert images.classes == ("cat", "dog")


def test_a_folder_without_images_says_what_there_is(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat/0.heic").write_bytes(b"?")
    with pytest.raises(ValueError, match=r"holds no image in a class folder .*there are 1 .heic"):
        load(tmp_path)


def test_a_class_of_one_training_image_is_told(tmp_path):
    source = write_folder(tmp_path / "photos", [*names("train", "test"), "train/cow/0.png", "test/cow/0.png"])
    with pytest.warns(HamWarning, match="one training image of class 'cow'"):
        assert load(source).class_counts["train"]["cow"] == 1


# ---------------------------------------------------------------- links and names
def test_a_folder_reached_twice_is_refused(tmp_path):
    source = write_folder(tmp_path / "photos", names("train", "test"))
    loop = source / "train/cat/again"
    loop.symlink_to(source, target_is_directory=True)
    with pytest.raises(
        ValueError, match=r"path: .*\. and train/cat/again are the same folder; remove one of the links"
    ):
        load(source)
    loop.unlink()
    (source / "train/kitten").symlink_to(source / "train/cat", target_is_directory=True)
    with pytest.raises(ValueError, match="train/cat and train/kitten are the same folder"):
        load(source)
    (source / "train/kitten").unlink()
    (source / "train/cat/gone.png").symlink_to(source / "nowhere.png")
    with pytest.raises(ValueError, match=r"gone\.png cannot be read"):
        load(source)


def test_a_folder_of_links_is_read(tmp_path):
    source = write_folder(tmp_path / "photos", names("train", "test"))
    (tmp_path / "view").mkdir()
    for part in ("train", "test"):
        (tmp_path / "view" / part).symlink_to(source / part, target_is_directory=True)
    assert load(tmp_path / "view").counts == {"train": 6, "test": 6}


def test_links_within_a_tar_are_counted(tmp_path):
    source = write_folder(tmp_path / "photos", names("train", "test"))
    (source / "train/cat/link.png").symlink_to("0.png")
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        tar.add(source, arcname="photos")
    with pytest.warns(HamWarning, match="left out: 1 links"):
        assert load(tmp_path / "set.tar").counts == {"train": 6, "test": 6}


def test_names_that_are_not_utf8(tmp_path):
    source = write_folder(tmp_path / "photos", names("train", "test"), size=70)
    os.rename(source / "train/cat/0.png", os.fsencode(source / "train/cat") + b"/caf\xe9.png")
    assert facts_of(load(source))["counts"] == {"train": 6, "test": 6}
    os.rename(source / "train/cat", os.fsencode(source / "train") + b"/ch\xe2t")
    with pytest.raises(ValueError, match=r"the folder .*ch\\xe2t has a name that is not UTF-8; rename it"):
        load(source)


# ---------------------------------------------------------------- pictures
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_their_exif_says(orientation, tmp_path):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :8] = 255  # white above on the left
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # PIL's transpositions, undone by the orientation
    image = Image.fromarray(upright)
    image = image if orientation == 1 else image.transpose(Image.Transpose(back[orientation]))
    exif = image.getexif()
    exif[0x0112] = orientation
    for name in ("a.jfif", "a.png", "a.tif"):
        image.save(tmp_path / name, format="JPEG" if name == "a.jfif" else None, exif=exif)
        assert np.abs(np.asarray(open_image(tmp_path / name)).astype(int) - upright).max() < 60, name


@pytest.mark.parametrize(("magic", "body"), [("P5", None), ("P2", "text")])
def test_grey_of_16_bits_is_read_as_png_is(magic, body, tmp_path):
    grey = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "a.png")
    pixels = " ".join(map(str, grey.ravel())).encode() if body else grey.astype(">u2").tobytes()
    (tmp_path / "a.pgm").write_bytes(f"{magic}\n8 8\n65535\n".encode() + pixels)
    assert np.array_equal(open_image(tmp_path / "a.pgm"), open_image(tmp_path / "a.png"))


# ---------------------------------------------------------------- IDX
def pack(folder, keep: bool):
    for file in [f for f in folder.iterdir() if f.suffix != ".gz"]:
        file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
        if not keep:
            file.unlink()


@pytest.mark.parametrize("how", ["plain", "packed", "both"])
def test_idx_files(how, tmp_path):
    pictures.write_fashion_mnist(tmp_path)
    raw = tmp_path / "FashionMNIST/raw"
    if how != "plain":
        pack(raw, keep=how == "both")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HamWarning)  # classes of one image
        sets = [load(raw, size=28), load(tmp_path)]
    for images in sets:
        assert images.classes == tuple("012345")
        assert images.counts == {"train": 6, "test": 3}
        assert images.x_train.shape == (6, 1, 28, 28)
        assert images.x_train[:, 0, 0, 0].tolist() == images.y_train.tolist() == list(range(6))
        assert images.x_test.dtype == torch.uint8


TRAIN, LABELS = "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"


def changed(name: str, change):
    return lambda raw: (raw / name).write_bytes(change((raw / name).read_bytes()))


def cut_packed(raw) -> None:
    pack(raw, keep=False)
    changed(f"{TRAIN}.gz", lambda b: b[:30])(raw)


BROKEN = {
    "cut": (changed(TRAIN, lambda b: b[:-1]), "train-images-idx3-ubyte is cut short"),
    "head": (changed(LABELS, lambda b: b[:5]), "t10k-labels-idx1-ubyte is no IDX file"),
    "swapped": (lambda raw: (raw / LABELS).replace(raw / TRAIN), "lacks the IDX file"),
    "lacking": (lambda raw: (raw / LABELS).unlink(), "lacks the IDX file of test labels"),
    "fewer": (changed(LABELS, lambda b: b[:7] + b"\2" + b[8:-1]), "holds 3 images and t10k-labels"),
    "strange": (changed(LABELS, lambda b: b[:-1] + b"\x63"), "has label 99, which no"),
    "packed": (cut_packed, "cannot be read"),
    "two sets": (lambda raw: (raw / f"emnist-{TRAIN}").write_bytes(b""), "two sets of IDX files"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_damaged_idx_files_are_named(case, tmp_path):
    pictures.write_fashion_mnist(tmp_path)
    change, message = BROKEN[case]
    change(tmp_path / "FashionMNIST/raw")
    with pytest.raises(ValueError, match=f"path: .*{message}"):
        load(tmp_path / "FashionMNIST/raw")


def test_idx_files_have_their_own_size(tmp_path):
    pictures.write_fashion_mnist(tmp_path)
    with pytest.raises(ValueError, match="size: got 32 for IDX files, whose images are 28x28"):
        load(tmp_path, size=32)


def test_long_decoding_says_where_it_is(tmp_path, monkeypatch, capsys):
    plain = folders.tqdm
    for delay, told in ((0.0, True), (10.0, False)):  # seconds before it is long
        monkeypatch.setattr(folders, "tqdm", lambda *a, delay, at=delay, **k: plain(*a, delay=at, **k))
        assert list(folders._told(iter([1, 2, 3]), tmp_path / "pictures")) == [1, 2, 3]
        assert ("decoding pictures: 3 images" in capsys.readouterr().err) is told
    monkeypatch.setattr(sys, "stderr", None)
    assert list(folders._told([1], tmp_path)) == [1]


def test_transparency_in_grey_of_16_bits(tmp_path):
    file = tmp_path / "grey.png"
    Image.fromarray(np.array([[700, 0x8000]], np.uint16)).save(file, transparency=700)
    assert np.asarray(open_image(file))[0].tolist() == [[255] * 3, [128] * 3]  # on white, as viewers show it


def test_idx_files_behind_a_link(tmp_path):
    pictures.write_fashion_mnist(tmp_path)
    (tmp_path / "set").mkdir()
    (tmp_path / "set/raw").symlink_to(tmp_path / "FashionMNIST/raw")
    assert load(tmp_path / "set").counts == {"train": 6, "test": 3}
