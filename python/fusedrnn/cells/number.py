# SPDX-License-Identifier: Apache-2.0
"""The functions of one number that cells are written in.

NumPy runs them on float64 and complex128 arrays (a complex number with a tiny imaginary part is a dual number, so
every comparison looks at the real part); the numba backend gives the same names compiled versions for floats.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def sigmoid(x: Any) -> Any:
    """1 / (1 + exp(-x)), without overflow on either side."""
    positive_side = x.real >= 0
    e = np.exp(np.where(positive_side, -x, x))
    return np.where(positive_side, 1, e) / (1 + e)


def tanh(x: Any) -> Any:
    """Hyperbolic tangent."""
    return np.tanh(x)


def softplus(x: Any) -> Any:
    """log(1 + exp(x)), without overflow."""
    positive_side = x.real > 0
    return np.where(positive_side, x, 0) + np.log1p(np.exp(np.where(positive_side, -x, x)))


def relu(x: Any) -> Any:
    """x where x > 0, else 0; NaN stays NaN."""
    return np.where(x.real <= 0, 0, x)


def positive(d: Any, x: Any) -> Any:
    """d where x > 0, else 0: relu's derivative times d. NaN counts as positive, as in `relu`."""
    return np.where(x.real <= 0, 0, d)


def clamp(x: Any, limit: float) -> Any:
    """x limited to [-limit, limit]; limit 0 = off; NaN stays NaN."""
    if limit == 0:
        return x
    return np.where(abs(x.real) >= limit, np.copysign(limit, x.real), x)


def inside(d: Any, x: Any, limit: float) -> Any:
    """clamp's derivative at a clamped x, times d: d where |x| < limit, else 0; limit 0 = off."""
    if limit == 0:
        return d
    return np.where(abs(x.real) >= limit, 0, d)
