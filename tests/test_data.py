"""Data sets by name, their parts and splits, and what a missing or wrong one says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pictures
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ham_kernels import data
from ham_kernels.data.files import open_image


# ---------------------------------------------------------------- the table
def test_table_of_facts_is_light_and_complete():
    code = (
        "import sys; from ham_kernels.data.table import SETS; import ham_kernels.data; print(*SETS); "
        "print(*{'torch', 'torchvision', 'sklearn', 'numpy'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    names, heavy = out.split("\n")[:2]
    assert names == "digits cifar10 cifar100 svhn fashion_mnist imagenette imagenette32 imagenet"
    assert heavy == ""


def test_cifar10_is_normalised_as_in_the_paper_and_imagenet_as_everywhere():
    assert [name for name, facts in data.SETS.items() if facts.mean or facts.std] == ["cifar10", "imagenet"]
    assert {name: facts.augment for name, facts in data.SETS.items() if facts.augment != "crop+flip"} == {
        "digits": "none",
        "svhn": "crop",
    }


def test_every_public_name_loads():
    assert set(data.__all__) <= set(dir(data))
    assert all(getattr(data, name) is not None for name in data.__all__)
    with pytest.raises(AttributeError, match="no attribute 'imagenet'"):
        data.imagenet  # noqa: B018


# ---------------------------------------------------------------- digits and parts
def test_digits_are_split_with_class_shares():
    images = data.load("digits")
    assert images.counts == {"train": 1280, "test": 517}
    assert images.x_train.shape[1:] == (1, 8, 8)
    assert images.channels == 1
    assert images.x_train.dtype == torch.uint8
    assert images.x_train.max() == 255
    assert torch.equal(images.x_test, data.digits().x_test)
    shares = [torch.bincount(images.labels(part), minlength=10) / images.counts[part] for part in ("train", "test")]
    assert (shares[0] - shares[1]).abs().max() < 0.01
    everything = torch.cat([images.x_train, images.x_test]).flatten(1).double().sum()
    from sklearn.datasets import load_digits

    assert everything == np.rint(load_digits().images * (255 / 16)).sum()  # no image twice, none lost


def test_subset_keeps_class_shares():
    small = data.digits().subset(100, 50)
    assert small.counts == {"train": 100, "test": 50}
    assert torch.bincount(small.y_train, minlength=10).min() >= 9


def numbered(labels: list[int], test: int = 3) -> data.ImageSet:
    """Image i of the training part is i everywhere, those of the test part 255."""
    n = len(labels)
    x = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 1, 2, 2)
    x_test = torch.full((test, 1, 2, 2), 255, dtype=torch.uint8)
    return data.ImageSet("numbered", ("a", "b", "c"), x, torch.tensor(labels), x_test, torch.zeros(test).long())


@given(st.lists(st.integers(0, 2), min_size=2, max_size=200), st.data())
def test_hold_out_moves_images_and_keeps_class_shares(labels, draw):
    images = numbered(labels)
    count, seed = draw.draw(st.integers(1, len(labels) - 1)), draw.draw(st.integers(0, 5))
    split = images.hold_out(count, seed)
    assert split.counts == {"train": len(labels) - count, "val": count, "test": 3}
    number = {part: split.part(part)[0][:, 0, 0, 0].tolist() for part in ("train", "val")}
    assert sorted(number["train"] + number["val"]) == list(range(len(labels)))
    for part in number:
        assert split.labels(part).tolist() == [labels[i] for i in number[part]]
    for c in range(3):
        assert abs((split.y_val == c).sum() - labels.count(c) * count / len(labels)) < 2
    assert torch.equal(split.x_test, images.x_test)
    assert torch.equal(split.y_test, images.y_test)
    assert torch.equal(split.x_val, numbered(labels).hold_out(count, seed).x_val)
    assert images.y_val is None  # the set it was taken from is as it was


def test_hold_out_is_the_same_for_every_training_seed():
    splits = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        splits.append(data.digits().hold_out(100).x_val)
    assert torch.equal(*splits)
    assert not torch.equal(splits[0], data.digits().hold_out(100, seed=1).x_val)


def test_hold_out_of_files():
    names = [f"{i}.jpg" for i in range(10)]
    files = data.FileSet("files", ("a", "b"), names, torch.arange(10) % 2, ["t.jpg"], torch.tensor([0]))
    split = files.hold_out(4)
    assert sorted(split.files_train + split.files_val) == names
    assert [int(name[0]) % 2 for name in split.files_val] == split.y_val.tolist()
    assert split.y_val.sum() == 2
    assert split.files_test == ["t.jpg"]
    assert split.subset(2, None).counts == {"train": 2, "val": 4, "test": 1}
    assert split.channels == 3


def test_bad_splits_and_parts():
    images = numbered([0, 1, 2] * 4)
    for count in (0, 12, 13):
        with pytest.raises(ValueError, match=rf"count: got {count}; it must be in \[1, 11\]"):
            images.hold_out(count)
    with pytest.raises(TypeError, match=r"count: got 0\.1"):
        images.hold_out(0.1)
    with pytest.raises(ValueError, match="hold_out: numbered has 3 validation images already"):
        images.hold_out(3).hold_out(3)
    with pytest.raises(ValueError, match="part: got 'val', but numbered has no validation images; call hold_out"):
        images.labels("val")
    with pytest.raises(ValueError, match="part: got 'dev'"):
        images.part("dev")
    with pytest.raises(ValueError, match="train: got 0"):
        images.subset(0, 1)
    with pytest.raises(TypeError, match=r"x_train: got torch.float32 .* must be uint8"):
        data.ImageSet("x", ("a",), images.x_train.float(), images.y_train, images.x_test, images.y_test)
    with pytest.raises(ValueError, match=r"y_test: got torch.int64 of shape \(12,\); it must be int64 \(3,\)"):
        data.ImageSet("x", ("a",), images.x_train, images.y_train, images.x_test, images.y_train)


# ---------------------------------------------------------------- torchvision's
@pytest.fixture
def no_checksums(monkeypatch):
    """torchvision compares files with the published ones, which these are not."""
    from torchvision.datasets import cifar, svhn

    for module in (cifar, svhn):
        monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: Path(path).is_file())


@pytest.fixture
def no_network(monkeypatch):
    """Every download ends as it does without a network; returns how many were tried."""
    import torchvision.datasets as sets

    tried = []

    def fail(self, *_, **__):
        tried.append(type(self).__name__)
        raise URLError("no network")

    for kind in (sets.CIFAR10, sets.SVHN, sets.FashionMNIST):
        monkeypatch.setattr(kind, "download", fail)
    monkeypatch.setattr(sets.MNIST, "download", fail)
    monkeypatch.setattr(sets.Imagenette, "_download", fail)
    return tried


WRITERS = {
    "cifar10": lambda root: pictures.write_cifar(root, 10),
    "cifar100": lambda root: pictures.write_cifar(root, 100),
    "svhn": pictures.write_svhn,
    "fashion_mnist": pictures.write_fashion_mnist,
    "imagenette": lambda root: pictures.write_imagenette(root, "imagenette2"),
    "imagenette32": lambda root: pictures.write_imagenette(root, "imagenette2-160"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_what_is_there_is_read_and_never_downloaded(name, tmp_path, no_checksums, no_network):
    WRITERS[name](tmp_path)
    images, facts = data.load(name, root=tmp_path), data.SETS[name]
    assert no_network == []
    assert images.name == facts.title
    assert images.channels == facts.channels
    assert isinstance(images, data.ImageSet) == facts.in_memory
    if name.startswith("imagenette"):
        assert images.classes == ("tench", "church")  # in the order of their WordNet numbers
        assert images.counts == {"train": 10, "test": 4}
    else:
        assert len(images.classes) == facts.classes
        # the value of each image is its number in its file
        per_file = 4 if name == "cifar10" else len(images.y_train)
        assert images.x_train[:, 0, 0, 0].tolist() == [i % per_file for i in range(len(images.y_train))]
    if name == "svhn":
        assert images.y_train.tolist() == [0, 1, 2, 3, 4, 5]  # its label 10 is the digit 0
    if facts.in_memory:
        assert images.x_train.shape[1:] == (facts.channels, facts.size, facts.size)
        x, y = next(iter(data.loaders(images, 2, augment=facts.augment).train))
        assert x.shape == (2, facts.channels, facts.size, facts.size)
        assert y.dtype == torch.int64


PUT = {
    "cifar10": "the folder cifar-10-batches-py with data_batch_1",
    "cifar100": "the folder cifar-100-python with train, test and meta",
    "svhn": "the files train_32x32.mat and test_32x32.mat",
    "fashion_mnist": "the folder FashionMNIST/raw with train-images-idx3-ubyte",
    "imagenette": "the folder imagenette2 with train/ and val/",
    "imagenette32": "the folder imagenette2-160 with train/ and val/",
}


@pytest.mark.parametrize("name", PUT)
def test_a_missing_set_says_what_to_put_where(name, tmp_path, no_network):
    title, root = data.SETS[name].title, tmp_path / "none"
    with pytest.raises(FileNotFoundError, match=rf"root: {title} is not in {root} .*download=False; put {PUT[name]}"):
        data.load(name, root=root, download=False)
    assert no_network == []
    message = f"cannot be downloaded .*no network.*; put {PUT[name]}.* there, or give path=, a folder or tar of class"
    with pytest.raises(FileNotFoundError, match=message):
        data.load(name, root=root)
    assert len(no_network) == 1


def test_imagenet_is_read_where_somebody_put_it(tmp_path, no_network):
    with pytest.raises(
        FileNotFoundError, match=rf"root: ImageNet is not in {tmp_path}, .*put the folder imagenet with"
    ):
        data.load("imagenet", root=tmp_path)
    pictures.write_imagenette(tmp_path, "imagenet")
    images = data.load("imagenet", root=tmp_path)
    assert (images.name, images.classes, images.size) == ("ImageNet", ("n01440764", "n03028079"), 224)
    assert images.counts == {"train": 10, "test": 4}
    assert isinstance(data.load("imagenet", root=tmp_path, size=32), data.ImageSet)
    assert no_network == []


def test_a_missing_set_is_downloaded_where_allowed(tmp_path, no_checksums, monkeypatch):
    from torchvision.datasets import CIFAR10

    def download(self):
        if not any(tmp_path.iterdir()):  # called for each part
            pictures.write_cifar(tmp_path, 10)

    monkeypatch.setattr(CIFAR10, "download", download)
    assert data.load("cifar10", root=tmp_path).counts == {"train": 20, "test": 4}


def test_wrong_requests(tmp_path):
    with pytest.raises(ValueError, match=r"dataset: got 'mnist'; allowed are digits, cifar10, .* or give path="):
        data.load("mnist")
    with pytest.raises(ValueError, match="size: got 16 for cifar10, whose images have one size already"):
        data.load("cifar10", root=tmp_path, size=16)
    with pytest.raises(TypeError, match="download: got 1"):
        data.load("digits", download=1)


def saved(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def test_images_of_every_mode_look_as_viewers_show_them(tmp_path):
    """16 bits are scaled and not clipped; what is transparent lies on white."""
    from PIL import Image

    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    saved(tmp_path / "16bit.png", Image.fromarray(ramp))
    grey = open_image(tmp_path / "16bit.png")
    assert np.array_equal(np.asarray(grey)[..., 0], ramp >> 8)
    alpha = np.zeros((8, 8, 4), np.uint8)
    alpha[2:6, 2:6, 3] = 255  # a black square that only its opacity shows
    saved(tmp_path / "alpha.png", Image.fromarray(alpha))
    seen = np.asarray(open_image(tmp_path / "alpha.png"))
    assert (seen[2:6, 2:6] == 0).all()
    assert (seen[:2] == 255).all()
    for mode in ("L", "P", "CMYK", "LA", "1"):
        suffix = "tif" if mode == "CMYK" else "png"
        saved(tmp_path / f"{mode}.{suffix}", Image.new("RGB", (8, 8), "white").convert(mode))
        assert (np.asarray(open_image(tmp_path / f"{mode}.{suffix}")) == 255).all(), mode
    saved(tmp_path / "float.tif", Image.fromarray(np.ones((8, 8), np.float32)))
    with pytest.raises(ValueError, match=r"float.tif is not a readable image \(32-bit grey values"):
        open_image(tmp_path / "float.tif")


@pytest.mark.parametrize("top", ["", "set/"])
def test_folders_below_a_class_belong_to_it(tmp_path, top):
    names = [f"{top}{c}/{when}/{i}.png" for c in ("cat", "dog") for when in ("day", "night") for i in range(5)]
    images = data.class_folders(pictures.write_folder(tmp_path / "photos", names), cache=False)
    assert images.classes == ("cat", "dog")
    assert images.counts == {"train": 16, "test": 4}


def test_an_image_beside_the_class_folders_is_named(tmp_path):
    folder = pictures.write_folder(tmp_path / "photos", ["cat/0.png", "dog/1.png", "stray.png"])
    with pytest.raises(ValueError, match=r"stray.png outside of any class folder"):
        data.class_folders(folder, cache=False)


def test_hidden_folders_of_a_tar_are_left_out(tmp_path):
    names = [f"{c}/{i}.png" for c in ("cat", "dog") for i in range(5)] + [".thumbs/1.png", "cat/.t/2.png"]
    folder = pictures.write_folder(tmp_path / "photos", names)
    tar = pictures.write_tar(tmp_path / "photos.tar", folder)
    for source in (folder, tar):
        assert data.class_folders(source, cache=False).classes == ("cat", "dog")
        assert sum(data.class_folders(source, cache=False).counts.values()) == 10
