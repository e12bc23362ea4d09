"""Batches of images in memory: the same for the same seed and epoch, true windows, every row once."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from ham_kernels import data


def images(n: int = 50, channels: int = 3, size: int = 10) -> data.ImageSet:
    """Random images; the label is the row."""
    x, test = (torch.randint(0, 256, (k, channels, size, size), dtype=torch.uint8) for k in (n, 7))
    return data.ImageSet("random", tuple(map(str, range(n))), x, torch.arange(n), test, torch.arange(7))


def train(source: data.ImageSet, batch_size: int = 16, **how) -> data.Batches:
    return data.loaders(source, batch_size, **({"augment": "crop+flip"} | how)).train


def same(first: list, second: list) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, second, strict=True)
    )


def test_batches_depend_on_seed_and_epoch_only():
    source = images()
    loader = train(source, seed=3)
    loader.set_epoch(2)
    first = list(loader)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert same(first, list(loader))
    assert torch.equal(state, torch.get_rng_state())  # nor do they draw from the global generator
    other = train(source, seed=3)
    list(other)
    other.set_epoch(2)
    assert same(first, list(other))
    loader.set_epoch(3)
    assert not same(first, list(loader))


def test_every_seed_and_epoch_has_its_own_order():
    """Also seeds that agree in their low bits, of which torch's generator would read 32 only."""
    source, orders = images(), set()
    for seed in (0, 1, 4096, 2**32, 2**63 - 1):
        loader = train(source, seed=seed)
        for epoch in (0, 1, 2):
            loader.set_epoch(epoch)
            orders.add(tuple(torch.cat([y for _, y in loader]).tolist()))
    assert len(orders) == 15


@pytest.mark.parametrize(("n", "batch_size", "sizes"), [(50, 16, [16, 16, 16, 2]), (32, 16, [16, 16]), (5, 9, [5])])
def test_every_row_comes_once(n, batch_size, sizes):
    loader = train(images(n), batch_size)
    got = list(loader)
    assert [len(y) for _, y in got] == sizes
    assert len(loader) == len(sizes)
    assert sorted(torch.cat([y for _, y in got]).tolist()) == list(range(n))
    x, y = got[0]
    assert x.dtype == torch.float32
    assert x.is_contiguous()
    assert y.dtype == torch.int64
    assert 0 <= x.min() <= x.max() <= 1


def test_balanced_rows_are_of_every_class_equally_often():
    """600 rows of class 0, 60 of 1, none of 2, 6 of 3: each of three is drawn 222 times, give or take 5 deviations."""
    y = torch.cat([torch.full((n,), c) for c, n in ((0, 600), (1, 60), (3, 6))])
    row = torch.arange(len(y))
    x = torch.stack([row % 256, row // 256], 1).byte()[:, :, None, None]
    loader = data.Batches(x, y, 100, shuffle=False, balanced=True, seed=5)
    drawn = []
    for epoch in (1, 2):
        loader.set_epoch(epoch)
        pixels, labels = (torch.cat(t) for t in zip(*loader, strict=True))
        assert len(labels) == len(y)
        counts = torch.bincount(labels, minlength=4).tolist()
        assert counts[2] == 0
        assert all(abs(counts[c] - 222) < 5 * (222 * 2 / 3) ** 0.5 for c in (0, 1, 3))
        rows = (pixels * 255).round().view(-1, 2) @ torch.tensor([1.0, 256.0])
        assert torch.equal(y[rows.long()], labels)  # an image keeps its label
        assert len(set(rows[labels == 3].tolist())) == 6
        drawn.append(rows.tolist())
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("augment", ["none", "crop", "crop+flip"])
def test_a_position_gives_the_rest_of_an_uninterrupted_epoch(augment, balanced):
    loader = train(images(), augment=augment, balanced=balanced)
    loader.set_epoch(4)
    whole = list(loader)
    for position in range(len(loader) + 1):
        loader.set_position(position)
        assert same(list(loader), whole[position:])
        assert same(list(loader), whole)  # once only
    assert len(loader) == 4
    with pytest.raises(ValueError, match=r"batches: got 5; it must be in \[0, 4\]"):
        loader.set_position(5)


def test_without_augmentation_batches_are_the_images():
    source = images()
    for x, y in train(source, augment="none"):
        assert torch.equal(x, source.x_train[y].float() / 255)


@pytest.mark.parametrize(("channels", "height", "width"), [(3, 10, 10), (1, 8, 5)])
@pytest.mark.parametrize("augment", ["crop", "crop+flip"])
def test_augmentation_moves_each_image_as_a_whole(augment, channels, height, width):
    """Every window shows the image shifted by at most 4 pixels, mirrored or not, and zeros beyond its border."""
    x = torch.randint(1, 256, (60, channels, height, width), dtype=torch.uint8)
    source = data.ImageSet("x", ("a",), x, torch.arange(60), x[:1], torch.tensor([0]))
    padded = F.pad(x.float() / 255, (4, 4, 4, 4))
    kinds = []
    for windows, rows in train(source, 7, augment=augment):
        for window, row in zip(windows, rows, strict=True):
            matches = [
                (top, left, flip)
                for top in range(9)
                for left in range(9)
                for flip in (False, True)
                if torch.equal(
                    window.flip(2) if flip else window, padded[row, :, top : top + height, left : left + width]
                )
            ]
            assert len(matches) == 1
            kinds += matches
    assert len(set(kinds)) > 25
    assert {top for top, _, _ in kinds} == {left for _, left, _ in kinds} == set(range(9))
    assert {flip for _, _, flip in kinds} == ({False, True} if augment == "crop+flip" else {False})


def test_evaluation_parts_come_in_order_and_whole():
    source = images(300).hold_out(20)
    parts = data.loaders(source, 16, augment="crop+flip", eval_batch_size=6)
    assert [len(y) for _, y in parts.val] == [6, 6, 6, 2]
    assert torch.equal(torch.cat([x for x, _ in parts.val]), source.x_val / 255)
    assert torch.equal(torch.cat([y for _, y in parts.test]), source.y_test)
    plain = data.part_loader(source, "train", 100)
    assert torch.equal(torch.cat([x for x, _ in plain]), source.x_train / 255)
    assert data.loaders(images(), 16, augment="none").val is None
    train_, val, test = parts
    assert (train_, val, test) == (parts.train, parts.val, parts.test)


def test_bad_loaders():
    source = images()
    with pytest.raises(ValueError, match="augment: got 'flip'; allowed are 'none', 'crop', 'crop"):
        data.loaders(source, 16, augment="flip")
    with pytest.raises(ValueError, match="batch_size: got 0"):
        data.loaders(source, 0, augment="none")
    with pytest.raises(ValueError, match="seed: got -1"):
        data.loaders(source, 16, augment="none", seed=-1)
    with pytest.raises(ValueError, match="workers: got -1"):
        data.loaders(source, 16, augment="none", workers=-1)
    with pytest.raises(TypeError, match=r"images: got list; it must be what data.load gives"):
        data.part_loader([], "test")
    with pytest.raises(ValueError, match="part: got 'val', but random has no validation images"):
        data.part_loader(source, "val")
    with pytest.raises(TypeError, match=r"epoch: got 1\.5"):
        train(source).set_epoch(1.5)


@pytest.mark.gpu
@pytest.mark.parametrize("augment", ["none", "crop", "crop+flip"])
def test_the_same_epoch_on_a_gpu(augment):
    """Bit for bit, and without a wait for the GPU between batches."""
    source = images()
    here, there = train(source, augment=augment), train(source, augment=augment, device="cuda")
    batches = iter(there)
    got = [next(batches)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        got += list(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(t.is_cuda for pair in got for t in pair)
    assert same(list(here), [(x.cpu(), y.cpu()) for x, y in got])
