# SPDX-License-Identifier: Apache-2.0
"""minGRU, one unit, one step (Feng et al. 2024, "Were RNNs All We Needed?"): gates z, n from x alone.

z = sigmoid(x Wz^T + bz);  n = x Wn^T + bn;  h = (1 - z) h' + z n
"""

from __future__ import annotations

from typing import Any

from .cell import Cell
from .number import sigmoid


def forward(a: Any, h_prev: Any, c_prev: Any, clip: Any) -> Any:
    """One step."""
    z = sigmoid(a[0])
    return (z, a[1]), h_prev + z * (a[1] - h_prev), c_prev


def backward(kept: Any, h_prev: Any, h: Any, c_prev: Any, c: Any, clip: Any, dh: Any, dc: Any) -> Any:
    """Gradients of the two sums, and of h'."""
    z, n = kept
    return (dh * (n - h_prev) * z * (1 - z), dh * z), dh * (1 - z), dc


MINGRU = Cell(
    name="mingru",
    op="mingru",
    gates=2,
    sums=2,
    kept=2,
    cell_state=False,
    x_sum=(0, 1),
    h_sum=(),
    forward=forward,
    backward=backward,
    state_product=False,
)
