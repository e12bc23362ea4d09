"""Slices of global batches, one a rank: together what one process gives, bit by bit, and each row once."""

from __future__ import annotations

import pytest
import torch
from pictures import write_photos

from ham_kernels import data
from ham_kernels.data.batches import slice_of

WORLDS = (1, 2, 3, 4, 8)


def images(n: int = 53) -> data.ImageSet:
    """Random images; the label is the row."""
    x, test = (torch.randint(0, 256, (k, 3, 6, 5), dtype=torch.uint8) for k in (n, 7))
    return data.ImageSet("random", tuple(map(str, range(n))), x, torch.arange(n), test, torch.arange(7))


def ranks(source, batch_size: int, world: int, **how) -> list:
    """The training loader of each rank, in epoch 2."""
    how = {"augment": "crop+flip", "seed": 3} | how
    loaders = [data.loaders(source, batch_size, rank=rank, world=world, **how).train for rank in range(world)]
    for loader in loaders:
        loader.set_epoch(2)
    return loaders


def given(loaders: list) -> list[list]:
    """The batches of each rank, of which all know how many rows the others give."""
    parts = [list(loader) for loader in loaders]
    rows = [[len(y) for _, y in batches] for batches in zip(*parts, strict=True)] + [[]]
    assert all([loader.rows_of_each(b) for b in range(len(rows))] == rows for loader in loaders)
    return parts


def check_union(whole: list, parts: list[list]) -> None:
    """parts: batches of each rank."""
    for (x, y), *slices in zip(whole, *parts, strict=True):
        world = len(slices)
        lengths = [len(labels) for _, labels in slices]
        assert lengths == [end - first for first, end in (slice_of(len(y), rank, world) for rank in range(world))]
        assert max(lengths) - min(lengths) <= 1
        assert all(pixels.shape == (k, *x.shape[1:]) for k, (pixels, _) in zip(lengths, slices, strict=True))
        assert all(t.dtype == w.dtype for pair in slices for t, w in zip(pair, (x, y), strict=True))
        assert torch.equal(torch.cat([pixels for pixels, _ in slices]), x)
        assert torch.equal(torch.cat([labels for _, labels in slices]), y)


def test_a_slice_is_contiguous_and_slices_are_the_batch():
    for n in (0, 1, 2, 7, 8, 31, 33, 128):
        for world in (*WORLDS, 64):
            ends = [slice_of(n, rank, world) for rank in range(world)]
            assert [row for first, end in ends for row in range(first, end)] == list(range(n))
            assert {end - first for first, end in ends} <= {n // world, -(-n // world)}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("how", [{}, {"balanced": True}, {"augment": "crop"}, {"augment": "none"}], ids=str)
def test_slices_of_images_in_memory_are_the_batch_of_one_process(world, how):
    """Batches of 16, the last of 5; of 3, the last of 2, which leave ranks without a row; and one of all 53."""
    source = images()
    for batch_size in (16, 3, 100):
        whole = list(ranks(source, batch_size, 1, **how)[0])
        loaders = ranks(source, batch_size, world, **how)
        assert [len(loader) for loader in loaders] == [len(whole)] * world
        check_union(whole, given(loaders))
        if not how.get("balanced"):
            drawn = torch.cat([y for loader in loaders for _, y in loader])
            assert sorted(drawn.tolist()) == list(range(53))


@pytest.mark.parametrize("world", WORLDS)
def test_a_set_of_two_images(world):
    source = images(2)
    check_union(list(ranks(source, 16, 1)[0]), given(ranks(source, 16, world)))


def test_slices_in_the_order_of_the_set():
    x, y = images().part("train")
    whole = list(data.Batches(x, y, 16, shuffle=False))
    check_union(whole, given([data.Batches(x, y, 16, shuffle=False, rank=rank, world=3) for rank in range(3)]))


def test_a_position_counts_global_batches():
    source = images()
    whole = list(ranks(source, 16, 1)[0])
    for position in range(5):
        loaders = ranks(source, 16, 3)
        for loader in loaders:
            loader.set_position(position)
        check_union(whole[position:], [list(loader) for loader in loaders])
    with pytest.raises(ValueError, match=r"batches: got 5; it must be in \[0, 4\]"):
        loader.set_position(5)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> data.FileSet:
    """10 training images."""
    return data.load("digits", write_photos(tmp_path_factory.mktemp("photos") / "set"), cache=False)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("balanced", [False, True])
def test_slices_of_files_are_the_batch_of_one_process(photos, world, balanced):
    """Batches of 4, 4 and 2."""
    how = {"size": 12, "balanced": balanced}
    whole = list(ranks(photos, 4, 1, **how)[0])
    check_union(whole, given(ranks(photos, 4, world, **how)))
    loaders = ranks(photos, 4, world, **how)
    for loader in loaders:
        loader.set_position(2)
    check_union(whole[2:], [list(loader) for loader in loaders])


def test_slices_of_files_by_workers(photos):
    """Of four ranks two have no row of the last batch."""
    whole = list(ranks(photos, 4, 1, size=12)[0])
    check_union(whole, [list(loader) for loader in ranks(photos, 4, 4, size=12, workers=2)])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_rank_decodes_its_rows_only(photos, tmp_path, workers):
    """Each other's files are gone."""
    missing, order = str(tmp_path / "gone.jpg"), torch.arange(10)
    plain = {"shuffle": False, "size": 12}
    whole = list(data.FileBatches(photos.files_train, order, 4, **plain))
    parts = []
    for rank in range(3):
        mine = {
            row for start in (0, 4, 8) for row in range(*(start + k for k in slice_of(min(4, 10 - start), rank, 3)))
        }
        files = [file if row in mine else missing for row, file in enumerate(photos.files_train)]
        parts.append(list(data.FileBatches(files, order, 4, workers=workers, rank=rank, world=3, **plain)))
    check_union(whole, parts)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_turn_decodes_its_batches_only(photos, tmp_path, workers):
    """Batches of 3, 3, 3 and 1; the files of the others are gone."""
    missing, order = str(tmp_path / "gone.jpg"), torch.arange(10)
    whole = list(data.FileBatches(photos.files_train, order, 3, shuffle=False, size=12))
    for turn in range(3):
        files = [file if row // 3 % 3 == turn else missing for row, file in enumerate(photos.files_train)]
        loader = data.FileBatches(files, order, 3, shuffle=False, size=12, workers=workers)
        check_union(whole[turn::3], [list(loader.turns(turn, 3))])


@pytest.mark.parametrize("batch_size", [16, 7, 100])
def test_turns_are_every_third_batch(batch_size):
    (loader,) = ranks(images(), batch_size, 1)
    whole = list(loader)
    for turn in range(3):
        check_union(whole[turn::3], [list(loader.turns(turn, 3))])


def test_a_rank_gathers_its_rows_only(monkeypatch):
    gathered, index_select = [], torch.Tensor.index_select
    loader = ranks(images(), 16, 8)[7]

    def noted(tensor, dim, index):
        gathered.append(len(index))
        return index_select(tensor, dim, index)

    monkeypatch.setattr(torch.Tensor, "index_select", noted)
    lengths = [len(y) for _, y in loader]
    assert lengths == [2, 2, 2, 1]
    assert max(gathered) == 2 * 3 * 6  # lines of a batch's windows


def test_evaluation_parts_are_whole_on_every_rank():
    source = images().hold_out(10)
    one, two = (data.loaders(source, 16, augment="none", rank=rank, world=2) for rank in range(2))
    for part in ("val", "test"):
        first, second = ([y for _, y in getattr(loaders, part)] for loaders in (one, two))
        assert torch.equal(torch.cat(first), torch.cat(second))
        assert torch.equal(torch.cat(first), source.labels(part))


def test_the_loader_says_which_rank_it_is_of(photos):
    for source in (images(), photos):
        loader = data.loaders(source, 4, augment="none", rank=1, world=3).train
        assert (loader.rank, loader.world) == (1, 3)
        assert (data.part_loader(source, "test").rank, data.part_loader(source, "test").world) == (0, 1)


@pytest.mark.parametrize(
    ("rank", "world", "error", "message"),
    [
        (2, 2, ValueError, r"rank: got 2; it must be in \[0, 1\]"),
        (-1, 2, ValueError, r"rank: got -1; it must be in \[0, 1\]"),
        (0, 0, ValueError, "world: got 0"),
        (0.0, 2, TypeError, r"rank: got 0.0"),
        (0, "2", TypeError, "world: got '2'"),
        (True, 2, TypeError, "rank: got True"),
    ],
)
def test_bad_ranks(photos, rank, world, error, message):
    for source in (images(), photos):
        with pytest.raises(error, match=f"^{message}"):
            data.loaders(source, 4, augment="none", rank=rank, world=world)
