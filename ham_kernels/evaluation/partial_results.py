"""Flags of a judgement under way, in one file that is whole at every moment."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from ..common import troubles
from ..common.files import write_atomically

FORMAT = 1
SECONDS_BETWEEN_WRITES = 2.0


class StoreWarning(UserWarning):
    """A file of flags could not be used; they are made anew."""


class FlagStore:
    """Flags batch by batch, for one identity (model, data set) and any number of attack settings.

    The file is JSON with a checksum. Flags of another identity are dropped; a file that was altered or cut short is
    reported and ignored. With path None everything stays in memory.
    """

    def __init__(self, path: str | Path | None, identity: dict):
        self.path = None if path is None else _writable(path)
        self.identity = json.loads(_canonical(identity))  # as it will be read back: tuples become lists
        self._entries: dict[str, dict] = {}
        self._written = time.monotonic()
        if self.path is not None and self.path.exists():
            self._entries = self._read()

    def entry(self, settings: dict) -> dict:
        """{"settings", "batches": [{"at": which batch, "data": fingerprint, "correct": "101...", "seconds", ...}]}.

        Filled in place; batches of other images, or of another size, stay in it.
        """
        return self._entries.setdefault(_digest(settings), {"settings": settings, "batches": []})

    def save(self, *, now: bool = False) -> None:
        """Writes the file: at once, or when the last time is a few seconds ago."""
        if self.path is None or not (now or time.monotonic() - self._written >= SECONDS_BETWEEN_WRITES):
            return
        body = {"format": FORMAT, "identity": self.identity, "attacks": self._entries}
        text = json.dumps({"sha256": _digest(body), **body}, allow_nan=False)
        write_atomically(self.path, text.encode())
        self._written = time.monotonic()

    def _read(self) -> dict[str, dict]:
        try:
            body = json.loads(self.path.read_text(encoding="utf-8"))
            if body.pop("sha256") != _digest(body):
                raise ValueError("its checksum is not that of its contents")
            if body["format"] != FORMAT:
                raise ValueError(f"its format is {body['format']}, not {FORMAT}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = str(error) or type(error).__name__
            troubles.warn("damaged_store", category=StoreWarning, path=self.path, reason=reason)
            return {}
        if body["identity"] != self.identity:
            return {}
        for entry in body["attacks"].values():
            before = entry.pop("seconds", 0.0) / max(len(entry["batches"]), 1)  # of all, in stores of before
            for at, batch in enumerate(entry["batches"]):
                batch.setdefault("at", at)
                batch.setdefault("seconds", before)
        return body["attacks"]


def fingerprint_of_model(model: nn.Module) -> str:
    """sha256 over the names and values of a model's state, and of buffers that are not part of it."""
    digest = hashlib.sha256()
    for name, value in {**model.state_dict(), **dict(model.named_buffers())}.items():
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
            digest.update(_bytes(value))
    return digest.hexdigest()


def fingerprint_of_batch(x: Tensor, y: Tensor) -> str:
    """sha256 over images and labels."""
    digest = hashlib.sha256(f"{x.dtype} {tuple(x.shape)};".encode())
    digest.update(_bytes(x))
    digest.update(_bytes(y))
    return digest.hexdigest()


def _bytes(t: Tensor) -> memoryview:
    return memoryview(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def _canonical(value) -> str:
    try:
        return json.dumps(value, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(f"identity: cannot be written as JSON ({error})") from error


def _digest(value) -> str:
    return hashlib.sha256(_canonical(value).encode()).hexdigest()


def _writable(path: str | Path) -> Path:
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"store: {path} is a folder; it must be a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"store: the folder {path.parent} does not exist")
    return path
