"""What a user names by MODULE:NAME, such as my_net:make_model."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any


def named(address: str, argument: str, form: str) -> Any:
    """What MODULE:NAME stands for, which is told as `form`; the module is looked for in the working folder first.

    Raises: ValueError, ImportError naming the argument.
    """
    module, _, name = address.partition(":")
    if not module or not name:
        raise ValueError(f"{argument}: got {address!r}; it must be {form}")
    sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{argument}: {module} cannot be imported ({error})") from error
    finally:
        sys.path.pop(0)
    if not hasattr(found, name):
        kind = form.partition(":")[2].partition(",")[0].lower()
        raise ValueError(f"{argument}: {module} has no {kind} {name!r}")
    return getattr(found, name)
