# SPDX-License-Identifier: Apache-2.0
"""LSTM, one unit, one step (Hochreiter & Schmidhuber 1997, forget gate of Gers 2000; gate order i, f, g, o of PyTorch).

a = x W^T + bW + h' R^T + bR
i, f, o = sigmoid(a_i), sigmoid(a_f), sigmoid(a_o);  g = tanh(a_g)
c = clip(f c' + i g);  h = o tanh(c)
"""

from __future__ import annotations

from typing import Any

from .cell import Cell
from .number import clamp, inside, sigmoid, tanh


def forward(a: Any, h_prev: Any, c_prev: Any, clip: Any) -> Any:
    """One step: the gates, h and c."""
    i = sigmoid(a[0])
    f = sigmoid(a[1])
    g = tanh(a[2])
    o = sigmoid(a[3])
    c = clamp(f * c_prev + i * g, clip)
    return (i, f, g, o), o * tanh(c), c


def backward(kept: Any, h_prev: Any, h: Any, c_prev: Any, c: Any, clip: Any, dh: Any, dc: Any) -> Any:
    """Gradients of the four sums, of h' past the products, and of c'."""
    i, f, g, o = kept
    tanh_c = tanh(c)
    dc = inside(dc + dh * o * (1 - tanh_c * tanh_c), c, clip)
    da_i = dc * g * i * (1 - i)
    da_f = dc * c_prev * f * (1 - f)
    da_g = dc * i * (1 - g * g)
    da_o = dh * tanh_c * o * (1 - o)
    return (da_i, da_f, da_g, da_o), 0 * dh, dc * f


LSTM = Cell(
    name="lstm",
    gates=4,
    sums=4,
    kept=4,
    cell_state=True,
    x_sum=(0, 1, 2, 3),
    h_sum=(0, 1, 2, 3),
    forward=forward,
    backward=backward,
)
