"""Every warning and error of the table of troubles, with its cause and remedy."""

from __future__ import annotations

from pathlib import Path

from ham_kernels.common.troubles import TROUBLES


def troubles(here: Path) -> str:
    entries = [f"**`{trouble.says}`**\n\n{trouble.cause}\n\nRemedy: {trouble.remedy}." for trouble in TROUBLES.values()]
    return "\n" + "\n\n".join(entries) + "\n"
