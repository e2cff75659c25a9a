# SPDX-License-Identifier: Apache-2.0
"""LSTM with coupled input and forget gates, one unit, one step (Greff et al. 2017, "CIFG"; ONNX's input_forget).

a = x W^T + bW + h' R^T + bR;  the gates are i, g, o
i, o = sigmoid(a_i), sigmoid(a_o);  g = tanh(a_g);  f = 1 - i
c = clip(f c' + i g);  h = o tanh(c)
"""

from __future__ import annotations

from typing import Any

from .cell import Cell
from .functions import PLAIN, Functions
from .number import clamp, inside


def forward(a: Any, h_prev: Any, c_prev: Any, clip: Any, f: Functions = PLAIN) -> Any:
    """One step: the gates, h and c."""
    i = f.gate(f.peep(0, a[0], c_prev))
    g = f.candidate(a[1])
    c = clamp(c_prev + i * (g - c_prev), clip)
    o = f.gate(f.peep(2, a[2], c))
    return (i, g, o), o * f.state(c), c


def backward(
    kept: Any, h_prev: Any, h: Any, c_prev: Any, c: Any, clip: Any, dh: Any, dc: Any, f: Functions = PLAIN
) -> Any:
    """Gradients of the three sums, of h' past the products, and of c'."""
    i, g, o = kept
    seen = f.state(c)
    da_o = f.gate_back(dh * seen, o)
    dc = inside(f.peep_back(2, dc + f.state_back(dh * o, seen), da_o), c, clip)
    da_i = f.gate_back(dc * (g - c_prev), i)
    da_g = f.candidate_back(dc * i, g)
    return (da_i, da_g, da_o), 0.0, f.peep_back(0, dc * (1 - i), da_i)


CIFG = Cell(
    name="cifg",
    op="lstm",
    gates=3,
    sums=3,
    kept=3,
    cell_state=True,
    x_sum=(0, 1, 2),
    h_sum=(0, 1, 2),
    forward=forward,
    backward=backward,
    options={"coupled": True},
    activations=("Sigmoid", "Tanh", "Tanh"),
)
