"""Class folders and tars, and batches of files: layouts, worker processes, and what is wrong with a bad file."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path

import pictures
import pytest
import torch
from helpers import environment
from pictures import SPLIT, write_folder, write_photos, write_tar
from PIL import Image

from ham_kernels import data
from ham_kernels.data import files as data_files


def load(path: Path, **how):
    return data.load("digits", path, **({"cache": False} | how))


# ---------------------------------------------------------------- layouts
def test_class_folders_and_tar_are_the_same(tmp_path):
    write_folder(tmp_path / "set", SPLIT)
    folder, tar = load(tmp_path / "set"), load(write_tar(tmp_path / "set.tar.xz", tmp_path / "set"))
    assert folder.classes == tar.classes == ("cat", "dog")
    for name in ("x_train", "y_train", "x_test", "y_test"):
        assert torch.equal(getattr(folder, name), getattr(tar, name))
    assert folder.y_train.tolist() == [0, 0, 0, 1, 1, 1]
    assert folder.x_train[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]


def test_folder_without_split_gives_a_fifth_for_testing(tmp_path):
    images = load(write_folder(tmp_path, [f"{label}/{i}.png" for label in "ab" for i in range(10)]))
    assert images.counts == {"train": 16, "test": 4}
    assert images.y_test.tolist() == [0, 0, 1, 1]


def test_val_is_the_test_part_where_there_is_no_other(tmp_path):
    train, val, test = (f"{part}/cat/0.png" for part in ("train", "val", "test"))
    assert load(write_folder(tmp_path / "two", [train, val])).counts == {"train": 1, "test": 1}
    images = load(write_folder(tmp_path / "three", [train, val, test]))
    assert images.counts == {"train": 1, "val": 1, "test": 1}
    assert [images.part(p)[0].max().item() for p in ("train", "val", "test")] == [0, 1, 2]


def test_deeper_folders_and_hidden_files(tmp_path):
    """As Tiny-ImageNet nests its images, and as macOS litters tars."""
    names = ["train/cat/images/0.png", "test/cat/images/0.png"]
    write_folder(tmp_path, names)
    (tmp_path / "train/cat/._0.png").write_bytes(b"no image")
    images = load(tmp_path)
    assert images.classes == ("cat",)
    assert images.counts == {"train": 1, "test": 1}


def test_small_images_are_resized_to_one_size(tmp_path):
    write_photos(tmp_path / "set")
    folder = load(tmp_path / "set", size=32)
    tar = load(write_tar(tmp_path / "set.tar.xz", tmp_path / "set"), size=32)
    assert folder.x_train.shape == (10, 3, 32, 32)
    assert torch.equal(folder.x_train, tar.x_train)
    photo = Image.open(tmp_path / "set/train/church/0.JPEG").resize((32, 32), Image.Resampling.BILINEAR)
    assert bytes(folder.x_train[0].permute(1, 2, 0).flatten().tolist()) == photo.tobytes()


def test_large_or_varied_images_stay_files(tmp_path):
    photos = write_photos(tmp_path / "photos")
    images = load(photos)
    assert isinstance(images, data.FileSet)
    assert images.size == 224
    assert images.classes == ("church", "tench")
    assert images.files_train[0] == str(photos / "train/church/0.JPEG")
    assert load(photos, size=160).size == 160
    assert isinstance(load(write_folder(tmp_path / "64", SPLIT, 64)), data.ImageSet)
    assert isinstance(load(write_folder(tmp_path / "65", SPLIT, 65)), data.FileSet)
    (write_folder(tmp_path / "two", SPLIT) / "test/dog/2.png").write_bytes(pictures.png(0, 7))
    assert isinstance(load(tmp_path / "two"), data.FileSet)
    tar = write_tar(tmp_path / "photos.tar.xz", photos)
    with pytest.raises(ValueError, match=r"photos.tar.xz holds images of several sizes or .*JPEG has .*unpack it"):
        load(tar)
    with pytest.raises(ValueError, match="size: got 160 with a tar; it must be at most 64"):
        load(tar, size=160)


def test_bad_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"path: .*nowhere does not exist"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no image in a class folder"):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"needs train/ and test/"):
        load(write_folder(tmp_path / "a", ["train/cat/0.png"]))
    with pytest.raises(ValueError, match=r"has the folder cat .* beside train"):
        load(write_folder(tmp_path / "b", ["train/cat/0.png", "cat/0.png"]))
    with pytest.raises(ValueError, match=r"has images directly in .*each part needs class folders"):
        load(write_folder(tmp_path / "c", ["train/0.png", "test/0.png"]))
    with pytest.raises(ValueError, match=r"has class 'images' in its test part but not in train/"):
        load(write_folder(tmp_path / "d", ["train/cat/0.png", "val/images/0.png"]))
    with pytest.raises(ValueError, match=r"holds 0.png outside of any class folder"):
        load(write_folder(tmp_path / "e", ["0.png"]))
    with pytest.raises(ValueError, match=r"holds 4 images; at least 5 are needed"):
        load(write_folder(tmp_path / "f", [f"cat/{i}.png" for i in range(4)]))
    with pytest.raises(ValueError, match="size: got 0"):
        load(tmp_path / "f", size=0)


def test_bad_files(tmp_path):
    write_folder(tmp_path / "set", SPLIT)
    (tmp_path / "set/train/cat/1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"path: .*set/train/cat/1.png is not a readable image"):
        load(tmp_path / "set")
    tar = write_tar(tmp_path / "set.tar.xz", tmp_path / "set")
    with pytest.raises(ValueError, match=r"path: .*set.tar.xz:set/train/cat/1.png is not a readable image"):
        load(tar)
    tar.write_bytes(tar.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"path: .*set.tar.xz is not a readable tar"):
        load(tar)


# ---------------------------------------------------------------- batches
@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> data.FileSet:
    return load(write_photos(tmp_path_factory.mktemp("photos") / "set"))


def same(first: list, second: list) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("augment", ["none", "crop", "crop+flip"])
def test_epochs_do_not_depend_on_workers_or_position(photos, augment):
    def train(workers):
        loader = data.loaders(photos, 3, seed=7, augment=augment, size=24, workers=workers).train
        loader.set_epoch(2)
        return loader

    state = torch.get_rng_state()
    whole = list(train(0))
    assert [len(y) for _, y in whole] == [3, 3, 3, 1]
    x, y = whole[0]
    assert x.shape == (3, 3, 24, 24)
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    assert 0 <= x.min() < x.max() <= 1
    for workers in (0, 1, 2):
        loader = train(workers)
        assert len(loader) == 4
        loader.set_position(2)
        assert same(list(loader), whole[2:])
        assert same(list(loader), whole)
    assert torch.equal(state, torch.get_rng_state())
    loader.set_epoch(3)
    assert not same(list(loader), whole)


def test_every_file_comes_once_and_looks_different_each_epoch(photos):
    one_each = data.FileSet("x", photos.classes, photos.files_train, torch.arange(10), ["t"], torch.tensor([0]))
    loader = data.loaders(one_each, 4, augment="crop+flip", size=16).train
    seen = []
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        x, y = (torch.cat(parts) for parts in zip(*loader, strict=True))
        assert sorted(y.tolist()) == list(range(10))
        seen.append(x[y.argsort()])
    assert all(not torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_every_row_has_its_own_window(photos):
    twins = photos.files_train[:1] * 6
    loader = data.FileBatches(twins, torch.zeros(6).long(), 6, shuffle=False, augment="crop", size=16)
    ((x, _),) = loader
    assert len(x.unique(dim=0)) == 6


def test_a_row_drawn_twice_has_two_windows(photos):
    """One image as two classes of one row each: an epoch may draw a row twice, and shows two windows of it."""
    loader = data.FileBatches(
        photos.files_train[:1] * 2, torch.tensor([0, 1]), 2, shuffle=False, balanced=True, augment="crop", size=16
    )
    twice = 0
    for epoch in range(12):
        loader.set_epoch(epoch)
        ((x, y),) = loader
        assert not torch.equal(*x)
        twice += int(y[0] == y[1])
    assert 0 < twice < 12
    assert torch.equal(x, next(iter(loader))[0])


def test_evaluation_shows_the_centre(photos):
    loader = data.loaders(photos.hold_out(4), 3, augment="crop+flip", size=56).val
    (x, y) = next(iter(loader))
    assert len(loader) == 1
    image = Image.open(photos.hold_out(4).files_val[0])
    scale = 64 / min(image.size)
    small = image.resize([int(scale * side) for side in image.size], Image.Resampling.BILINEAR)
    left, top = (round((side - 56) / 2) for side in small.size)
    crop = small.crop((left, top, left + 56, top + 56))
    assert bytes((x[0] * 255).round().byte().permute(1, 2, 0).flatten().tolist()) == crop.tobytes()
    assert torch.equal(y, photos.hold_out(4).y_val)


def test_size_is_that_of_the_set_unless_given(photos):
    small = data.FileSet(
        "x", photos.classes, photos.files_test, photos.y_test, photos.files_test, photos.y_test, size=40
    )
    assert next(iter(data.part_loader(small, "test", 2)))[0].shape[2:] == (40, 40)
    assert next(iter(data.part_loader(small, "test", 2, size=30)))[0].shape[2:] == (30, 30)
    assert next(iter(data.part_loader(photos, "test", 2)))[0].shape[2:] == (224, 224)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_file_is_named(photos, tmp_path, workers):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(Path(photos.files_train[0]).read_bytes()[:500])
    files = data.FileSet(
        "x", ("a",), [*photos.files_train[:3], str(bad)], torch.zeros(4).long(), [], torch.ones(0).long()
    )
    loader = data.part_loader(files, "train", 2, size=16, workers=workers)
    batches = iter(loader)
    next(batches)
    with pytest.raises(ValueError, match=r"^path: .*bad.jpg is not a readable image"):
        next(batches)
    missing = data.FileSet("x", ("a",), ["nowhere.jpg"], torch.zeros(1).long(), [], torch.ones(0).long())
    with pytest.raises(ValueError, match=r"^path: nowhere.jpg is not a readable image"):
        next(iter(data.part_loader(missing, "train", 1, workers=workers)))
    with pytest.raises(ValueError, match="images: there are none in this part"):
        data.part_loader(missing, "test")


@pytest.mark.slow
def test_workers_do_not_hold_the_interpreter(photos):
    """An iteration that is given up in the middle, also one that is still referred to when the program ends."""
    folder = Path(photos.files_train[0]).parents[2]
    code = textwrap.dedent(f"""
        from ham_kernels import data
        images = data.load("digits", {str(folder)!r}, cache=False)
        loader = data.loaders(images, 1, augment="crop", size=16, workers=2).train
        for x, y in loader:
            break
        kept = iter(loader)
        next(kept)
        print("end", flush=True)
    """)
    env = environment(Path(__file__).resolve().parents[1], OMP_NUM_THREADS="1")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=60, env=env
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


@pytest.mark.slow
def test_workers_need_no_room_in_shared_memory(photos):
    """A container has 64 MB of it; a loader whose workers find it full would wait for ever."""
    within = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=512k tmpfs /dev/shm && exec "$@"', "sh"]
    if shutil.which("unshare") is None or subprocess.run([*within, "true"], capture_output=True).returncode:
        pytest.skip("no right to mount in a namespace of its own")
    folder = Path(photos.files_train[0]).parents[2]
    code = textwrap.dedent(f"""
        import time
        from ham_kernels import data
        images = data.load("digits", {str(folder)!r}, cache=False)
        for x, y in data.loaders(images, 5, augment="crop", size=200, workers=2).train:
            time.sleep(0.5)  # so that the next ones are ready
            print(x.nbytes // 4, flush=True)
    """)
    env = environment(Path(__file__).resolve().parents[1], OMP_NUM_THREADS="1")
    done = subprocess.run([*within, sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=env)
    assert done.stdout == "600000\n600000\n", done.stderr


def test_workers_that_cannot_be_started_are_told(photos, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(data_files.DataLoader, "__iter__", full)
    with pytest.raises(OSError, match=r"^workers: 2 processes cannot be started .*shared memory.*--workers 0"):
        next(iter(data.part_loader(photos, "test", 2, workers=2)))
    with pytest.raises(OSError, match="No space left"):
        next(iter(data.part_loader(photos, "test", 2)))


@pytest.mark.gpu
def test_the_same_files_on_a_gpu(photos):
    here, there = (
        list(data.loaders(photos, 3, augment="crop+flip", size=24, device=device, workers=2).train)
        for device in ("cpu", "cuda")
    )
    assert all(t.is_cuda for pair in there for t in pair)
    assert same(here, [(x.cpu(), y.cpu()) for x, y in there])


def test_a_tar_that_is_cut_short_is_no_smaller_data_set(tmp_path):
    """Wherever it is cut: tarfile itself takes half a header for the end."""
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        tar.add(write_folder(tmp_path / "set", SPLIT), arcname="set")
    whole = (tmp_path / "set.tar").read_bytes()
    assert load(tmp_path / "set.tar").counts == {"train": 6, "test": 6}
    end = len(whole.rstrip(b"\0"))
    for length in range(0, end, 211):
        (tmp_path / "cut.tar").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"path: .*cut\.tar is not a readable tar"):
            load(tmp_path / "cut.tar")


def test_a_class_that_a_part_lacks_is_named(tmp_path):
    names = [f"train/{label}/{i}.png" for label in "abc" for i in range(2)] + ["test/a/0.png", "test/c/0.png"]
    tar = write_tar(tmp_path / "set.tar.xz", write_folder(tmp_path / "set", names))
    for path in (tmp_path / "set", tar, tar):  # the second time from the cache
        with pytest.warns(UserWarning, match="has no image of class 'b' in its test part"):
            images = load(path, root=tmp_path, cache=True)
        assert images.classes == ("a", "b", "c")
