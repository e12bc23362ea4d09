"""Generated images: mapped from an .npz, never read whole; an exact share of each batch, wherever it begins."""

from __future__ import annotations

import io
import os
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import SPLIT, write_folder, write_photos

from ham_kernels import data
from ham_kernels.common import locks
from ham_kernels.data import npz
from ham_kernels.data.batches import slice_of
from ham_kernels.data.mixed import Walk
from ham_kernels.data.table import generated_rows

SAVE = {"stored": np.savez, "compressed": np.savez_compressed}
REAL, MADE = 41, 137  # primes: no pass ends with an epoch


def arrays(n: int = MADE, size: int = 6, channels: int = 3, classes: int = 2) -> dict[str, np.ndarray]:
    """Generated image i is numbered in its first two pixels; its label is i % classes."""
    made = np.random.default_rng(n).integers(0, 256, (n, size, size, channels), np.uint8)
    made[:, 0, 0, 0], made[:, 0, 1, 0] = np.arange(n) % 256, 100 + np.arange(n) // 256
    return {"image": made, "label": np.arange(n) % classes}


def real(n: int = REAL) -> data.ImageSet:
    """Random images, whose number is in their first pixel, and 0 in their second one."""
    x = torch.randint(0, 256, (n, 3, 6, 6), dtype=torch.uint8)
    x[:, 0, 0, 0], x[:, 0, 0, 1] = torch.arange(n), 0
    return data.ImageSet("real", ("a", "b"), x, torch.arange(n) % 2, x[:4], torch.arange(4) % 2)


@pytest.fixture(params=list(SAVE))
def source(request, tmp_path) -> Path:
    SAVE[request.param](tmp_path / "made.npz", **arrays())
    return tmp_path / "made.npz"


def read(path: Path, **how) -> data.GeneratedImages:
    how = {"shape": (3, 6, 6), "classes": 2, "folder": path.parent / "cache"} | how
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return npz.read(path, **how)


def loader(path: Path, batch_size: int = 16, **how) -> data.MixedBatches:
    how = {"augment": "none", "seed": 3, "generated_share": 0.7} | how
    return data.loaders(replace(real(), generated=read(path)), batch_size, **how).train


def rows_of(batch) -> tuple[list[int], list[int]]:
    """Numbers of the real and of the generated rows, as they come."""
    first, second = ((batch[0][:, 0, 0, place] * 255).round().int().tolist() for place in (0, 1))
    return [a for a, b in zip(first, second, strict=True) if not b], [
        a + 256 * (b - 100) for a, b in zip(first, second, strict=True) if b
    ]


def same(first: list, second: list) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, b) for pair in zip(first, second, strict=True) for a, b in zip(*pair, strict=True)
    )


# ---------------------------------------------------------------- the file
def test_images_are_mapped_and_not_read(source, monkeypatch):
    """Stored ones where they lie in the file; decompressed ones in the cache, once."""
    opened, open_member = [], zipfile.ZipFile.open

    def noted(archive, member, *args, **options):
        file = open_member(archive, member, *args, **options)
        file.close_, file.close = file.close, lambda: (opened.append((member.filename, file.tell())), file.close_())
        return file

    monkeypatch.setattr(zipfile.ZipFile, "open", noted)
    found, wanted = read(source), arrays()
    assert isinstance(found.images, np.memmap)
    assert not found.images.flags.writeable
    assert np.array_equal(found.images, wanted["image"])
    assert np.array_equal(found.labels, wanted["label"])
    assert found.labels.dtype == np.uint8
    assert len(found) == MADE
    stored = found.images.filename == source
    most = {name: max(n for other, n in opened if other == name) for name, _ in opened}
    assert (most["image.npy"] < 200) == stored  # the header, or all
    opened.clear()
    again = read(source)
    assert max(n for name, n in opened if name == "image.npy") < 200
    assert np.array_equal(again.images, wanted["image"])
    cached = [file for file in (source.parent / "cache").glob("*") if file.suffix == ".npy"]
    assert len(cached) == (not stored)
    if not stored:
        assert Path(found.images.filename) == cached[0]
        assert np.array_equal(np.load(cached[0]), wanted["image"])  # what numpy reads too


def test_a_changed_file_is_decompressed_again(tmp_path):
    path = tmp_path / "made.npz"
    np.savez_compressed(path, **arrays())
    read(path)
    stat = path.stat()
    np.savez_compressed(path, **arrays(20))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert np.array_equal(read(path).images, arrays(20)["image"])
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 1


def test_a_damaged_cache_is_written_anew(tmp_path):
    np.savez_compressed(tmp_path / "made.npz", **arrays())
    file = Path(read(tmp_path / "made.npz").images.filename)
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.warns(UserWarning, match=r"cache: .*made\.npz-.*\.npy is damaged \(14919 bytes of 14924\)"):
        found = npz.read(tmp_path / "made.npz", (3, 6, 6), 2, tmp_path / "cache")
    assert np.array_equal(found.images, arrays()["image"])


def test_of_several_processes_one_decompresses(tmp_path):
    """The others wait for it, and take what it wrote."""
    np.savez_compressed(tmp_path / "made.npz", **arrays())
    file = Path(read(tmp_path / "made.npz").images.filename)
    content = file.read_bytes()
    file.unlink()
    (lock,) = (tmp_path / "cache").glob("*.lock")
    with ThreadPoolExecutor(1) as other:
        with lock.open("w") as held:
            assert locks.take(held)
            found = other.submit(read, tmp_path / "made.npz")
            time.sleep(0.3)
            assert not found.done()
            file.write_bytes(content)
            number = file.stat().st_ino
        assert len(found.result(timeout=10)) == MADE
    assert file.stat().st_ino == number


def test_a_cache_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "made.npz", **arrays())
    (tmp_path / "file").write_text("")
    with pytest.raises(
        OSError, match=r"^generated: the images of .*made.npz \(1.49e-05 GB decompressed\) cannot be kept"
    ):
        read(tmp_path / "made.npz", folder=tmp_path / "file")
    monkeypatch.setattr(npz.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(OSError, match=r"^generated: .*\(1e-06 GB are free there\); make room"):
        read(tmp_path / "made.npz")
    assert not list((tmp_path / "cache").glob("*.npy")) + list((tmp_path / "cache").glob("*.partial"))
    with pytest.raises(ValueError, match=r"^generated: .*made.npz is compressed, .*the cache, which is off"):
        read(tmp_path / "made.npz", folder=None)


BAD = {
    "sizes": (
        {"image": np.zeros((5, 6, 7, 3), np.uint8)},
        r"image has shape \(5, 6, 7, 3\); it must be \(n, 6, 6, 3\)",
    ),
    "channels first": ({"image": np.zeros((5, 3, 6, 6), np.uint8)}, r"must be \(n, 6, 6, 3\)"),
    "flat": ({"image": np.zeros((5, 108), np.uint8)}, r"image has shape \(5, 108\)"),
    "floats": ({"image": np.zeros((5, 6, 6, 3))}, "image is of float64; it must be of uint8"),
    "by columns": ({"image": np.asfortranarray(np.zeros((5, 6, 6, 3), np.uint8))}, "image is in Fortran's order"),
    "none": ({"image": np.zeros((0, 6, 6, 3), np.uint8), "label": np.zeros(0, int)}, "holds no image"),
    "fewer labels": ({"label": np.zeros(4, int)}, "has 5 images and 4 labels"),
    "columns of labels": (
        {"label": np.zeros((5, 1), int)},
        r"label is int64 of shape \(5, 1\); it must be of integers",
    ),
    "float labels": ({"label": np.zeros(5)}, "label is float64"),
    "a class too many": ({"label": np.array([0, 1, 2, 1, 0])}, r"has label 2; labels must be in \[0, 1\]"),
    "no class": ({"label": np.array([0, -1, 0, 1, 0])}, "has label -1"),
    "objects": ({"label": np.array([None] * 5)}, "label is no array that numpy wrote"),
    "other names": ({"image": None, "x": np.zeros(3)}, r"has no array image \(it has label, x\)"),
}


@pytest.mark.parametrize("save", SAVE.values(), ids=SAVE)
@pytest.mark.parametrize("bad", BAD)
def test_bad_arrays(save, bad, tmp_path):
    changes, message = BAD[bad]
    save(tmp_path / "made.npz", **{k: v for k, v in (arrays(5) | changes).items() if v is not None})
    with pytest.raises(ValueError, match=f"^generated: .*made.npz.*{message}"):
        read(tmp_path / "made.npz")


def test_bad_files(tmp_path, source):
    with pytest.raises(FileNotFoundError, match=r"^generated: .*nowhere.npz is not there; give an .npz"):
        data.load("digits", generated=tmp_path / "nowhere.npz")
    whole = source.read_bytes()
    for name, content in (("text", b"no zip"), ("cut", whole[:-40]), ("half", whole[: len(whole) // 2])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"^generated: .*{name} cannot be read"):
            read(tmp_path / name)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("image.npy", b"\x93NUMPY\x01\x00nothing")
        label = io.BytesIO()
        np.save(label, np.zeros(2, int))
        archive.writestr("label.npy", label.getvalue())
    (tmp_path / "odd").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match=r"^generated: .*odd: image is no array that numpy wrote"):
        read(tmp_path / "odd")


@pytest.mark.parametrize("packed", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_array_that_is_shorter_than_it_says(packed, tmp_path):
    """Mapped, it would end within the labels, or beyond the file."""
    with zipfile.ZipFile(tmp_path / "made.npz", "w", packed) as archive:
        for name, array in arrays(5).items():
            content = io.BytesIO()
            np.save(content, array)
            archive.writestr(f"{name}.npy", content.getvalue()[: -1 if name == "image" else None])
    with pytest.raises(ValueError, match=r"^generated: .*made.npz: image is cut short or damaged"):
        read(tmp_path / "made.npz")


def test_altered_bytes_of_compressed_images_are_noticed(tmp_path):
    np.savez_compressed(tmp_path / "made.npz", **arrays())
    content = bytearray((tmp_path / "made.npz").read_bytes())
    content[5000] ^= 255
    (tmp_path / "made.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"^generated: .*made.npz cannot be read"):
        read(tmp_path / "made.npz")
    assert not list((tmp_path / "cache").glob("*.npy"))


def test_load_takes_them_with_images_in_memory(tmp_path):
    np.savez(tmp_path / "made.npz", **arrays())
    how = {"root": tmp_path, "generated": tmp_path / "made.npz"}
    images = data.load("digits", write_folder(tmp_path / "set", SPLIT), **how)
    assert len(images.generated) == MADE
    assert images.counts == {"train": 6, "test": 6}  # in none of them
    assert images.hold_out(2).subset(3, 2).generated is images.generated
    with pytest.raises(ValueError, match=r"^generated: .*the images of photos stay files"):
        data.load("digits", write_photos(tmp_path / "photos"), **how)
    with pytest.raises(ValueError, match=r"^generated: .*must be \(n, 7, 7, 3\), as the training images are"):
        data.load("digits", write_folder(tmp_path / "seven", SPLIT, 7), **how)


# ---------------------------------------------------------------- the walk through rows
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 15, 16, 17, 64, 65, 1000])
def test_a_pass_has_each_row_once_and_is_entered_anywhere(n):
    walk = Walk(n, 3, 1)
    passes = walk.rows(0, 4 * n)
    assert all(sorted(passes[k * n : (k + 1) * n].tolist()) == list(range(n)) for k in range(4))
    for first in (0, 1, n - 1, n, 2 * n + n // 2):
        assert np.array_equal(walk.rows(first, n), passes[first : first + n])
    assert walk.rows(5, 0).shape == (0,)


def test_walks_differ_by_seed_name_and_pass():
    orders = {tuple(Walk(50, seed, name).rows(at, 50)) for seed in (0, 1, 2**40) for name in (0, 1) for at in (0, 50)}
    assert len(orders) == 12


def test_orders_are_as_if_drawn():
    """Chi-squared, at most at its mean and 5 deviations: of 10 rows at each place, of neighbours, of orders of 4."""
    passes = Walk(10, 0, 0).rows(0, 10_000).reshape(-1, 10)
    orders = Walk(4, 0, 0).rows(0, 4_000).reshape(-1, 4) @ (64, 16, 4, 1)
    pairs = np.bincount(passes[:, 3] * 10 + passes[:, 4], minlength=100)
    assert not pairs[::11].any()
    counts = [np.bincount(passes[:, place], minlength=10) for place in range(10)]
    counts += [pairs[np.arange(100) % 11 != 0], np.unique(orders, return_counts=True)[1]]
    assert len(counts[-1]) == 24
    for count in counts:
        freedom = len(count) - 1
        assert ((count - count.mean()) ** 2 / count.mean()).sum() < freedom + 5 * (2 * freedom) ** 0.5


def test_a_walk_through_very_many_rows():
    rows = Walk(500_000_000, 0, 1).rows(10**12, 1000)
    assert len(set(rows.tolist())) == 1000
    assert 0 <= rows.min() <= rows.max() < 500_000_000
    assert abs(rows.mean() / 500_000_000 - 0.5) < 0.05


# ---------------------------------------------------------------- batches
@pytest.mark.parametrize(("batch_size", "share", "made"), [(16, 0.7, 11), (16, 0.5, 8), (3, 0.5, 2), (50, 0.9, 45)])
def test_every_batch_has_its_share(source, batch_size, share, made):
    """Also the last one, and one of more rows than there are real images; an epoch is as long as without."""
    batches = loader(source, batch_size, generated_share=share)
    assert generated_rows(batch_size, share) == batches.generated_rows == made
    assert len(batches) == len(data.loaders(real(), batch_size, augment="none").train)
    assert batches.rows == len(batches) * batch_size
    got = list(batches)
    assert len(got) == len(batches)
    for x, y in got:
        assert x.shape == (batch_size, 3, 6, 6)
        assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
        assert [len(rows) for rows in rows_of((x, y))] == [batch_size - made, made]


def test_rows_are_those_of_their_source(source):
    images, wanted = real(), arrays()
    images.generated = read(source)
    for x, y in data.loaders(images, 16, augment="none", seed=3).train:
        for pixels, label in zip((x * 255).round().byte(), y.tolist(), strict=True):
            own, made = rows_of((pixels[None] / 255, label))
            kept = images.x_train[own[0]] if own else torch.from_numpy(wanted["image"][made[0]]).permute(2, 0, 1)
            assert torch.equal(pixels, kept)
            assert label == (own or made)[0] % 2


def test_both_sources_are_seen_in_whole_passes(source):
    """Over epochs: no row a second time before all have come, however long an epoch is."""
    batches, own, made = loader(source), [], []
    for epoch in range(30):
        batches.set_epoch(epoch)
        for batch in batches:
            for seen, rows in zip((own, made), rows_of(batch), strict=True):
                seen += rows
    for seen, n in ((own, REAL), (made, MADE)):
        assert len(seen) > 3 * n
        for start in range(0, len(seen) - n, n):
            assert sorted(seen[start : start + n]) == list(range(n))
        assert seen[:n] != seen[n : 2 * n]


def test_epochs_depend_on_seed_and_number_only(source):
    batches = loader(source, augment="crop+flip")
    batches.set_epoch(2)
    state = torch.get_rng_state()
    whole = list(batches)
    assert torch.equal(state, torch.get_rng_state())
    other = loader(source, augment="crop+flip")
    other._x = batches._x  # images of `real` are random
    other.set_epoch(2)
    for position in range(len(whole) + 1):
        other.set_position(position)
        assert same(list(other), whole[position:])
        assert same(list(other), whole)
    other.set_epoch(3)
    assert not same(list(other), whole)
    assert rows_of(next(iter(loader(source, seed=4)))) != rows_of(next(iter(loader(source))))


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8, 20])
def test_slices_of_ranks_are_the_batch_of_one_process(source, world):
    """Bit by bit; a rank reads its generated rows alone, and every rank has its share of them."""
    images = replace(real(), generated=read(source))
    how = {"augment": "crop+flip", "seed": 3}
    whole = list(data.loaders(images, 16, **how).train)
    ranks = [data.loaders(images, 16, rank=rank, world=world, **how).train for rank in range(world)]
    parts = [list(rank) for rank in ranks]
    for (x, y), *slices in zip(whole, *parts, strict=True):
        rows = [len(part[1]) for part in slices]
        assert rows == [b - a for a, b in (slice_of(16, r, world) for r in range(world))] == ranks[0].rows_of_each(0)
        assert torch.equal(torch.cat([part[0] for part in slices]), x)
        assert torch.equal(torch.cat([part[1] for part in slices]), y)
    for rank in ranks:
        first, end = slice_of(16, rank.rank, world)
        pixels, labels = rank._read(7)
        assert len(pixels) == len(labels)
        assert abs(len(pixels) - (end - first) * 11 / 16) < 1


def test_one_generated_image_comes_again_and_again(tmp_path):
    np.savez(tmp_path / "made.npz", **arrays(1))
    (x, y), *_ = loader(tmp_path / "made.npz")
    assert rows_of((x, y))[1] == [0] * 11


def test_a_batch_is_given_up_in_the_middle(source):
    batches = iter(loader(source))
    next(batches)
    batches.close()


def test_bad_shares(source):
    for share, rows in ((0.0, 0), (0.01, 0), (0.99, 16), (1.0, 16)):
        with pytest.raises(
            ValueError, match=rf"generated_share: got {share:g} with batch_size=16, so {rows} rows of a"
        ):
            loader(source, generated_share=share)
    with pytest.raises(ValueError, match=r"generated_share: got 1\.5"):
        loader(source, generated_share=1.5)
    with pytest.raises(TypeError, match=r"generated_share: got '0\.7'"):
        loader(source, generated_share="0.7")
    with pytest.raises(ValueError, match="balanced: got True with generated images"):
        loader(source, balanced=True)
    with pytest.raises(ValueError, match="rank: got 2"):
        loader(source, rank=2, world=2)
    grey = data.ImageSet(
        "grey", ("a", "b"), *(t for _ in "xx" for t in (torch.zeros(4, 1, 6, 6).byte(), torch.zeros(4).long()))
    )
    with pytest.raises(ValueError, match=r"generated: its images are \(6, 6, 3\); they must be \(6, 6, 1\)"):
        data.loaders(replace(grey, generated=read(source)), 2, augment="none")


@pytest.mark.gpu
def test_the_same_mixed_epoch_on_a_gpu(source):
    """Bit for bit, and without a wait for the GPU between batches."""
    images = replace(real(), generated=read(source))
    here, there = (data.loaders(images, 16, augment="crop+flip", device=d).train for d in ("cpu", "cuda"))
    batches = iter(there)
    got = [next(batches)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        got += list(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert same(list(here), [(x.cpu(), y.cpu()) for x, y in got])
