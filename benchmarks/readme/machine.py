"""The machine and the versions that a figure was measured with, as benchmarks print them."""

from __future__ import annotations

import datetime

import torch

from ham_kernels.common import provenance


def machine() -> dict[str, str]:
    """What has to stand beside a number for it to mean anything."""
    versions = provenance.versions("torchattacks")
    return {
        **provenance.machine(),
        "python": versions["python"],
        "torch": torch.__version__,
        "ham_kernels": f"{versions['ham_kernels']}, commit {provenance.commit()}",
        "date": datetime.date.today().isoformat(),
        "torchattacks": versions["torchattacks"],
    }
