"""Files of gpu_suite.py: written as a whole, collected from one machine, restored on another, made up for --smoke."""

from __future__ import annotations

import json
import re
import tarfile
import tempfile
from pathlib import Path

STAGE = re.compile(r"stages/(warm-up|train|judge|autoattack-ema|autoattack-last)-(?P<run>.+?)\.json$")  # of a run
LARGEST = 2 * 2**20  # bytes of a file that is collected
COLLECTED = (
    "stages/*.json*", "bench/*/*.json", "report/*.*", "report/figures/*.png", "cifar/options.json", "cifar/*/*.json*",
    "cifar/*/config.toml", "cifar/*/evaluation/[!.]*.json", "logs/*.log",
)  # fmt: skip


def write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_bytes(content)
    temporary.replace(path)


def to_json(value: dict) -> bytes:
    return json.dumps(value, indent=1).encode() + b"\n"


def collect(out: Path, to: Path) -> None:
    """The small files: all results and logs in one archive, the summary beside it."""
    to.mkdir(parents=True, exist_ok=True)
    temporary = to / ".results.partial"
    with tarfile.open(temporary, "w:gz", compresslevel=3) as archive:
        for path in sorted({path for pattern in COLLECTED for path in out.glob(pattern) if path.is_file()}):
            if path.stat().st_size <= LARGEST:
                archive.add(path, path.relative_to(out))
    temporary.replace(to / "results.tar.gz")
    for name in ("summary.md", "summary.json"):
        write(to / name, (out / name).read_bytes())


def restore(file: Path, out: Path) -> None:
    """Results of another machine, as far as they stand alone: runs whose weights are not here begin anew.

    A run that was judged, by AutoAttack too, is kept, since its accuracies need no weights any more.
    """
    with tarfile.open(file) as archive:
        done = {m.name for m in archive.getmembers() if STAGE.match(m.name) and _is_done(archive, m)}
        for member in archive.getmembers():
            stage = STAGE.match(member.name)
            run = stage["run"] if stage else member.name.split("/")[1] if member.name.startswith("cifar/") else None
            kept = {f"stages/judge-{run}.json", f"stages/autoattack-ema-{run}.json"} <= done
            lost = run is not None and not kept and member.name != "cifar/options.json"
            if not lost and not (out / member.name).exists():
                archive.extract(member, out, filter="data")


def _is_done(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bool:
    return json.load(archive.extractfile(member))["state"] == "done"


def fabricate(folder: Path) -> Path:
    """A tar of class folders of random 32x32 pictures, for --smoke."""
    import numpy as np
    from PIL import Image

    path, noise = folder / "pictures.tar", np.random.default_rng(0)
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            for part, count in (("train", 10), ("test", 4)):
                for label in ("ant", "bee", "cat", "dog"):  # AutoAttack needs four classes
                    (Path(work) / part / label).mkdir(parents=True)
                    for i in range(count):
                        image = Image.fromarray(noise.integers(0, 256, (32, 32, 3), np.uint8))
                        image.save(Path(work) / part / label / f"{i}.png")
            with tarfile.open(path.with_suffix(".partial"), "w") as tar:
                for part in ("train", "test"):
                    tar.add(Path(work) / part, part)
        path.with_suffix(".partial").replace(path)
    return path
