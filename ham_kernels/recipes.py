"""The old name of `ham_kernels.methods`, for one version."""

from __future__ import annotations

import warnings

from .methods import *  # noqa: F403

warnings.warn("ham_kernels.recipes is called ham_kernels.methods now", DeprecationWarning, stacklevel=2)
