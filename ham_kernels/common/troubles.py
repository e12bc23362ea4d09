"""Faults of models, data and machines that a training or a judgement would hide: what is said, why, what to do.

docs/troubleshooting.md is made from this table (benchmarks/update_readme.py). A text is "argument: what was seen; what
to do"; words in braces are the facts of a case.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass


class HamWarning(UserWarning):
    """Something that makes a result worth less than it looks."""


@dataclass(frozen=True)
class Trouble:
    says: str
    cause: str
    remedy: str


TROUBLES: dict[str, Trouble] = {
    # ------------------------------------------------------------ models
    # ------------------------------------------------------------ training
    # ------------------------------------------------------------ data
    # ------------------------------------------------------------ ops
    # ------------------------------------------------------------ runs and reports
    # ------------------------------------------------------------ machines
}


def text(name: str, **facts) -> str:
    """The words of a trouble, for an error or a log."""
    trouble = TROUBLES[name]
    return f"{trouble.says}; {trouble.remedy}".format(**facts)


def warn(name: str, **facts) -> None:
    """Tells a trouble as a HamWarning; Python shows the same words once per place."""
    warnings.warn(text(name, **facts), HamWarning, stacklevel=3)
