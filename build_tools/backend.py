"""setuptools' build backend, plus one question: does this build need torch in its environment?

Only where there is an nvcc and no torch (2.10 or later) to build against: pip then brings one.
Everywhere else an installation downloads nothing that it does not keep.
"""

import importlib.util
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks that stay as they are)


def get_requires_for_build_wheel(config_settings=None):
    requires = build_meta.get_requires_for_build_wheel(config_settings)
    return [*requires, *torch_if_missing(load_build_module())]


def get_requires_for_build_editable(config_settings=None):
    requires = build_meta.get_requires_for_build_editable(config_settings)
    return [*requires, *torch_if_missing(load_build_module())]


def torch_if_missing(build):
    if build.build_mode() is False or build.find_nvcc() is None:
        return []
    torch = build.find_torch()
    return [] if torch is not None and torch.usable else ["torch>=2.10"]


def load_build_module():
    """ham_kernels/ops/native/cuda.py by its path: the package itself needs torch."""
    path = Path(__file__).resolve().parents[1] / "ham_kernels" / "ops" / "native" / "cuda.py"
    spec = importlib.util.spec_from_file_location("_ham_build", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
