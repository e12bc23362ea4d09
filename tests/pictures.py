"""Small data sets on disk for tests: class folders, tars, and the formats that torchvision reads."""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

SPLIT = [f"{part}/{label}/{i}.png" for part in ("train", "test") for label in ("cat", "dog") for i in range(3)]


def png(value: int, size: int | tuple[int, int] = 6) -> bytes:
    """One colour; size is (width, height) or one number."""
    width, height = (size, size) if isinstance(size, int) else size
    out = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), value, np.uint8)).save(out, "PNG")
    return out.getvalue()


def noise(seed: int, width: int, height: int) -> bytes:
    """A JPEG in which every place looks different."""
    out = io.BytesIO()
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(coarse).resize((width, height)).save(out, "JPEG")
    return out.getvalue()


def write_folder(root: Path, names: list[str], size: int | tuple[int, int] = 6) -> Path:
    """Image number i of `names` has the value i everywhere."""
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(i % 256, size))
    return root


def write_tar(path: Path, folder: Path) -> Path:
    with tarfile.open(path, "w:xz") as tar:
        tar.add(folder, arcname=folder.name)
    return path


def write_photos(root: Path, per_class: int = 5) -> Path:
    """Class folders of JPEGs of several sizes, train/ and val/ as in Imagenette."""
    seed = 0
    for part, count in (("train", per_class), ("val", 2)):
        for label in ("church", "tench"):
            (root / part / label).mkdir(parents=True)
            for i in range(count):
                seed += 1
                file = root / part / label / f"{i}.JPEG"
                file.write_bytes(noise(seed, 70 + 3 * seed, 90 - 2 * seed))
    return root


def write_cifar(root: Path, classes: int, per_file: int = 4) -> None:
    """CIFAR's pickles, of 10 or 100 classes; image i of a file is i everywhere."""
    folder = root / ("cifar-10-batches-py" if classes == 10 else "cifar-100-python")
    folder.mkdir(parents=True)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"] if classes == 10 else ["train", "test"]
    labels, meta = ("labels", "label_names") if classes == 10 else ("fine_labels", "fine_label_names")
    pixels = np.repeat(np.arange(per_file, dtype=np.uint8)[:, None], 3072, axis=1)
    for name in names:
        (folder / name).write_bytes(pickle.dumps({"data": pixels, labels: list(range(per_file))}))
    listing = {meta: [f"class {i}" for i in range(classes)]}
    (folder / ("batches.meta" if classes == 10 else "meta")).write_bytes(pickle.dumps(listing))


def write_svhn(root: Path) -> None:
    from scipy.io import savemat

    root.mkdir(parents=True, exist_ok=True)
    for part, n in (("train", 6), ("test", 3)):
        x = np.zeros((32, 32, 3, n), np.uint8) + np.arange(n, dtype=np.uint8)
        savemat(root / f"{part}_32x32.mat", {"X": x, "y": np.array([[10], [1], [2], [3], [4], [5]][:n])})


def write_fashion_mnist(root: Path) -> None:
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for part, n in (("train", 6), ("t10k", 3)):
        numbers = np.arange(n, dtype=np.uint8)
        head = b"".join(i.to_bytes(4, "big") for i in (0x803, n, 28, 28))
        images = head + np.repeat(numbers, 784).tobytes()
        (folder / f"{part}-images-idx3-ubyte").write_bytes(images)
        labels = b"".join(i.to_bytes(4, "big") for i in (0x801, n)) + numbers.tobytes()
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(labels)


def write_imagenette(root: Path, folder: str) -> None:
    """Two of its ten classes, named by WordNet as there."""
    write_photos(root / folder)
    for part in ("train", "val"):
        for name, wnid in (("church", "n03028079"), ("tench", "n01440764")):
            (root / folder / part / name).rename(root / folder / part / wnid)
