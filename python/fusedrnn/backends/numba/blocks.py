# SPDX-License-Identifier: Apache-2.0
"""What compiled steps have in common.

They copy BLOCK units of everything a cell reads into one small block, run the cell on the block and copy the results
out: within one block LLVM knows that nothing overlaps, so it vectorises the cell's formula whatever it is. Slot s of
the block w is w[s * BLOCK : (s + 1) * BLOCK].
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit

from ... import cells
from ...cells import number
from .functions import OPTIONS

BLOCK = 32  # units


@functools.cache
def stamp() -> str:
    """A digest of the sources that are compiled. Steps close over it, so that a cache on disk serves no others."""
    folders = Path(__file__).parent, Path(cells.__file__).parent
    sources = [path for folder in folders for path in sorted(folder.glob("*.py"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


def cached(cell: str) -> Callable[[Any], Any]:
    """Compiles a step of a cell. What is kept on disk is named after both: two cells never write the same file."""
    options = {"error_model": "numpy", "fastmath": {"contract"}, "cache": True, "nogil": True, "no_cfunc_wrapper": True}

    def compile_step(step: Any) -> Any:
        step.__qualname__ = f"{cell}.{step.__name__}"
        return njit(step, **options)

    return compile_step


# Indices below are unsigned: Numba would test signed ones for negative values, and LLVM could not vectorise the loops.


@njit(**OPTIONS)
def load(w: Any, slot: Any, a: Any, start: Any, n: Any) -> Any:
    to, at = np.uintp(slot * BLOCK), np.uintp(start)
    for j in range(np.uintp(n)):
        w[to + j] = a[at + j]


@njit(**OPTIONS)
def add(w: Any, slot: Any, a: Any, start: Any, n: Any) -> Any:
    to, at = np.uintp(slot * BLOCK), np.uintp(start)
    for j in range(np.uintp(n)):
        w[to + j] += a[at + j]


@njit(**OPTIONS)
def save(w: Any, slot: Any, a: Any, start: Any, n: Any) -> Any:
    of, at = np.uintp(slot * BLOCK), np.uintp(start)
    for j in range(np.uintp(n)):
        a[at + j] = w[of + j]


@njit(**OPTIONS)
def limit(w: Any, slot: Any, most: Any) -> Any:
    for j in range(BLOCK):
        w[slot * BLOCK + j] = number.clamp(w[slot * BLOCK + j], most)
