# SPDX-License-Identifier: Apache-2.0
"""How close is close: one table of error budgets, and the comparison that names what is wrong."""

from __future__ import annotations

from typing import Any

import numpy as np

# (dtype, operation) -> the largest |got - expected|, as a part of the largest |expected| of that array, or of 1 where
# that is larger: small numbers are often differences of numbers near 1. Backends in float32 are compared with float64.
BUDGETS = {
    ("float32", "forward"): 2e-6,
    ("float32", "backward"): 5e-6,
    ("float32", "jvp"): 5e-6,
    ("float32", "hvp"): 2e-5,
    ("float64", "forward"): 4e-15,
    ("float64", "backward"): 1e-14,
    ("float64", "jvp"): 1e-14,
    ("float64", "hvp"): 4e-14,
}


def check(label: str, got: Any, expected: Any, budget: float) -> None:
    """Fail unless two arrays are close; NaN must meet NaN. The message has the first bad coordinate and both values."""
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape, f"{label}: shape {got.shape}, expected {expected.shape}"
    finite = np.abs(expected[np.isfinite(expected)])
    allowed = budget * max(1.0, float(finite.max(initial=0)))
    with np.errstate(invalid="ignore"):
        error = np.abs(got.astype(np.float64) - expected)
        fine = (error <= allowed) | (got == expected) | (np.isnan(got) & np.isnan(expected))
    if not fine.all():
        first = tuple(int(i) for i in np.argwhere(~fine)[0])
        raise AssertionError(
            f"{label}{list(first)} is {got[first]!r}, expected {expected[first]!r} "
            f"(error {error[first]:.2e} > {allowed:.2e}); {np.sum(~fine)} of {fine.size} are wrong"
        )


def check_all(label: str, got: dict[str, Any], expected: dict[str, Any], dtype: Any, operation: str) -> None:
    """Compare arrays by name within the budget of the operation."""
    assert got.keys() == expected.keys()
    for name in expected:
        check(f"{label}: {operation}: {name}", got[name], expected[name], BUDGETS[np.dtype(dtype).name, operation])
