# SPDX-License-Identifier: Apache-2.0
"""minLSTM, one unit, one step (Feng et al. 2024, "Were RNNs All We Needed?"): gates i, f, g from x alone, normalised.

i, f = sigmoid(x Wi^T + bi), sigmoid(x Wf^T + bf);  g = x Wg^T + bg;  h = f / (f + i) h' + i / (f + i) g
The share of f is sigmoid(log f - log i), and log sigmoid(a) = -softplus(-a): right where both gates underflow, too.
"""

from __future__ import annotations

from typing import Any

from .cell import Cell
from .number import sigmoid, softplus


def forward(a: Any, h_prev: Any, c_prev: Any, clip: Any) -> Any:
    """One step; kept: the share of f, g, 1 - i, 1 - f."""
    share = sigmoid(softplus(-a[0]) - softplus(-a[1]))
    return (share, a[2], sigmoid(-a[0]), sigmoid(-a[1])), a[2] + share * (h_prev - a[2]), c_prev


def backward(kept: Any, h_prev: Any, h: Any, c_prev: Any, c: Any, clip: Any, dh: Any, dc: Any) -> Any:
    """Gradients of the three sums, and of h'."""
    share, g, not_i, not_f = kept
    d = dh * (h_prev - g) * share * (1 - share)
    return (-d * not_i, d * not_f, dh * (1 - share)), dh * share, dc


MINLSTM = Cell(
    name="minlstm",
    op="minlstm",
    gates=3,
    sums=3,
    kept=4,
    cell_state=False,
    x_sum=(0, 1, 2),
    h_sum=(),
    forward=forward,
    backward=backward,
    state_product=False,
)
