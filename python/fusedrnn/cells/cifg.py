# SPDX-License-Identifier: Apache-2.0
"""LSTM with coupled input and forget gates, one unit, one step (Greff et al. 2017, "CIFG"; ONNX's input_forget).

a = x W^T + bW + h' R^T + bR;  the gates are i, g, o
i, o = sigmoid(a_i), sigmoid(a_o);  g = tanh(a_g);  f = 1 - i
c = clip(f c' + i g);  h = o tanh(c)
"""

from __future__ import annotations

from typing import Any

from .cell import Cell
from .number import clamp, inside, sigmoid, tanh


def forward(a: Any, h_prev: Any, c_prev: Any, clip: Any) -> Any:
    """One step: the gates, h and c."""
    i = sigmoid(a[0])
    g = tanh(a[1])
    o = sigmoid(a[2])
    c = clamp(c_prev + i * (g - c_prev), clip)
    return (i, g, o), o * tanh(c), c


def backward(kept: Any, h_prev: Any, h: Any, c_prev: Any, c: Any, clip: Any, dh: Any, dc: Any) -> Any:
    """Gradients of the three sums, of h' past the products, and of c'."""
    i, g, o = kept
    tanh_c = tanh(c)
    dc = inside(dc + dh * o * (1 - tanh_c * tanh_c), c, clip)
    da_i = dc * (g - c_prev) * i * (1 - i)
    da_g = dc * i * (1 - g * g)
    da_o = dh * tanh_c * o * (1 - o)
    return (da_i, da_g, da_o), 0 * dh, dc * (1 - i)


CIFG = Cell(
    name="cifg",
    gates=3,
    sums=3,
    kept=3,
    cell_state=True,
    x_sum=(0, 1, 2),
    h_sum=(0, 1, 2),
    forward=forward,
    backward=backward,
)
