# SPDX-License-Identifier: Apache-2.0
"""Whose array is this, and how its axes lie: from what users pass to the canonical views that backends take, and back.

Axes are written as letters: T steps, E weight sets, B rows, I inputs, H units, G gate rows (gates * H), J outputs
(directions * H), S state rows (layers * directions), L layers. Every function makes views; nothing large is copied.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

X, Y, STATE, CELLS, LENGTHS, RESET = "TEBI", "TEBJ", "SEBH", "LTEBJ", "EB", "TEB"
WEIGHT_IH, WEIGHT_HH, BIAS = "EGI", "EGH", "EG"


def kind(value: Any) -> str:
    """What to call a value in an error: its library and type, and its dtype and shape where it has them.

    >>> kind(np.zeros((2, 3)))
    'a NumPy float64 array of shape (2, 3)'
    >>> kind([1.0])
    'a list'
    """
    if isinstance(value, np.ndarray):
        return f"a NumPy {value.dtype} array of shape {value.shape}"
    if value is None:
        return "None"
    module = type(value).__module__.partition(".")[0]
    name = type(value).__name__
    return f"a {name}" if module == "builtins" else f"a {module}.{name}"


@functools.cache
def data_axes(axes: str, batch_first: bool, unbatched: bool, sets: bool) -> str:
    """How x, y, cells or reset lie for the user: T is behind E and B for batch_first, and axes may be left out.

    >>> data_axes(X, batch_first=False, unbatched=False, sets=False), data_axes(X, True, False, True)
    ('TBI', 'EBTI')
    """
    if batch_first:
        axes = axes.replace("TEB", "EBT")
    return "".join(a for a in axes if not (a == "B" and unbatched) and not (a == "E" and not sets))


@functools.cache
def _plan(axes: str, target: str) -> tuple[Any, Any]:
    """The transposition (None: none) and the index that make `view`."""
    order = [axes.index(a) for a in target if a in axes]
    index = tuple(slice(None) if a in axes else None for a in target)
    return (None if order == sorted(order) else order), index


def view(array: Any, axes: str, target: str, sets: int = 1, *, write: bool = False) -> Any:
    """A view of an array that lies as `axes`, with the axes of `target`. Axes it lacks have size 1, but E has size
    `sets` and stride 0.

    >>> view(np.zeros((5, 7, 2)), "BTI", "TEBI").shape
    (7, 1, 5, 2)
    """
    if axes == target:
        return array
    order, index = _plan(axes, target)
    result = (array if order is None else array.transpose(order))[index]
    if sets != 1 and "E" in target and "E" not in axes:
        shape = tuple(sets if a == "E" else n for a, n in zip(target, result.shape, strict=True))
        strides = tuple(0 if a == "E" else s for a, s in zip(target, result.strides, strict=True))
        result = np.lib.stride_tricks.as_strided(result, shape, strides, writeable=write)
    return result
