# SPDX-License-Identifier: Apache-2.0
"""The settings, in one place: which backend runs (or FUSEDRNN_BACKEND in the environment), on how many threads."""

from __future__ import annotations

import os

backend: str | None = os.environ.get("FUSEDRNN_BACKEND") or None
announced = False  # whether the log has told which backend ran first


def set_backend(name: str | None) -> None:
    """Make every later call run on "native", "numba" or "reference"; None: the best that is there.

    Raises ValueError for another name, ImportError when that backend cannot run here.

    >>> fusedrnn.set_backend("reference")
    >>> fusedrnn.set_backend(None)
    """
    global backend, announced
    from . import backends

    if name is not None:
        backends.choose(name)
    backend = name
    announced = False


def get_num_threads() -> int:
    """How many threads the native kernels use (OpenMP's own setting); 1 without the extension.

    >>> fusedrnn.get_num_threads() >= 1
    True
    """
    from . import backends

    native = backends.load("native")
    return native.get_num_threads() if native else 1


def set_num_threads(n: int) -> None:
    """Set how many threads the native kernels use from now on. The other backends leave threads to NumPy's BLAS.

    Raises ValueError unless n is an integer >= 1.

    >>> fusedrnn.set_num_threads(fusedrnn.get_num_threads())
    """
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n < 2**31:
        raise ValueError(f"fusedrnn: n is {n!r}; expected an integer >= 1 (threads).")
    from . import backends

    native = backends.load("native")
    if native:
        native.set_num_threads(n)
