"""Data: splits, batches that repeat, augmentation, class folders and tars, and what is wrong with a bad one."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from ham_kernels import data


def test_digits_are_split_with_class_shares():
    images = data.digits()
    assert (len(images.y_train), len(images.y_test)) == (1280, 517)
    assert images.x_train.shape[1:] == (1, 8, 8)
    assert images.x_train.dtype == torch.uint8
    assert images.x_train.max() == 255
    assert torch.equal(images.x_test, data.digits().x_test)
    shares = [torch.bincount(y, minlength=10) / len(y) for y in (images.y_train, images.y_test)]
    assert (shares[0] - shares[1]).abs().max() < 0.01
    everything = torch.cat([images.x_train, images.x_test]).flatten(1).double().sum()
    from sklearn.datasets import load_digits

    assert everything == np.rint(load_digits().images * (255 / 16)).sum()  # no image twice, none lost


def test_subset_keeps_class_shares():
    small = data.digits().subset(100, 50)
    assert (len(small.y_train), len(small.y_test)) == (100, 50)
    assert torch.bincount(small.y_train, minlength=10).min() >= 9


def test_batches_depend_on_seed_and_epoch_only():
    x, y = torch.randint(0, 256, (50, 1, 8, 8), dtype=torch.uint8), torch.arange(50)
    batches = data.Batches(x, y, 16, shuffle=True, augment=True, seed=3)
    batches.set_epoch(2)
    first, second = list(batches), list(batches)
    assert [len(b[1]) for b in first] == [16, 16, 16, 2]
    assert len(batches) == 4
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, second, strict=True))
    assert sorted(torch.cat([b[1] for b in first]).tolist()) == list(range(50))
    batches.set_epoch(3)
    assert not torch.equal(torch.cat([b[1] for b in first]), torch.cat([b[1] for b in batches]))
    assert 0 <= first[0][0].min() <= first[0][0].max() <= 1


def test_crop_and_flip_moves_each_image_as_a_whole():
    """Every window shows the image shifted by at most 4 pixels, mirrored or not, and zeros beyond its border."""
    x = torch.rand(20, 3, 10, 10) + 0.1
    out = data.crop_and_flip(x, torch.Generator().manual_seed(1))
    padded = torch.nn.functional.pad(x, (4, 4, 4, 4))
    kinds = set()
    for image, source in zip(out, padded, strict=True):
        matches = [
            (top, left, flip)
            for top in range(9)
            for left in range(9)
            for flip in (False, True)
            if torch.equal(
                image,
                source[:, top : top + 10, left : left + 10].flip(2)
                if flip
                else source[:, top : top + 10, left : left + 10],
            )
        ]
        assert len(matches) == 1
        kinds.add(matches[0])
    assert len(kinds) > 10


def png(value: int, size: int = 6) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((size, size, 3), value, np.uint8)).save(out, "PNG")
    return out.getvalue()


def write_folder(root, names):
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(i))


SPLIT = [f"{part}/{label}/{i}.png" for part in ("train", "test") for label in ("cat", "dog") for i in range(3)]


def test_class_folders_and_tar_are_the_same(tmp_path):
    write_folder(tmp_path / "set", SPLIT)
    with tarfile.open(tmp_path / "set.tar.xz", "w:xz") as tar:
        tar.add(tmp_path / "set", arcname="set")
    folder, tar = data.class_folders(tmp_path / "set"), data.class_folders(tmp_path / "set.tar.xz")
    assert folder.classes == tar.classes == ("cat", "dog")
    for name in ("x_train", "y_train", "x_test", "y_test"):
        assert torch.equal(getattr(folder, name), getattr(tar, name))
    assert folder.y_train.tolist() == [0, 0, 0, 1, 1, 1]
    assert folder.x_train[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]


def test_folder_without_split_gives_a_fifth_for_testing(tmp_path):
    write_folder(tmp_path, [f"{label}/{i}.png" for label in "ab" for i in range(10)])
    images = data.class_folders(tmp_path)
    assert (len(images.y_train), len(images.y_test)) == (16, 4)


def test_bad_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"path: .*nowhere does not exist"):
        data.load("digits", tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no image in a class folder"):
        data.class_folders(tmp_path)
    write_folder(tmp_path, ["train/cat/0.png"])
    with pytest.raises(ValueError, match=r"needs both train/ and test/"):
        data.class_folders(tmp_path)
    (tmp_path / "train/cat/1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"1.png is not a readable image"):
        data.class_folders(tmp_path)
    (tmp_path / "train/cat/1.png").write_bytes(png(0, size=7))
    (tmp_path / "test/cat").mkdir(parents=True)
    (tmp_path / "test/cat/0.png").write_bytes(png(0))
    with pytest.raises(ValueError, match=r"images of 2 sizes"):
        data.class_folders(tmp_path)
    with pytest.raises(ValueError, match=r"dataset: got 'mnist'; allowed are digits, cifar10"):
        data.load("mnist")


def test_cifar10_offline_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"CIFAR-10 is not in .*put cifar-10-batches-py there"):
        data.cifar10(tmp_path, download=False)
