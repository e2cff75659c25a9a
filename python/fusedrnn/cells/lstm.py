# SPDX-License-Identifier: Apache-2.0
"""LSTM, one unit, one step (Hochreiter & Schmidhuber 1997, forget gate of Gers 2000; gate order i, f, g, o of PyTorch).

a = x W^T + bW + h' R^T + bR
i, f, o = sigmoid(a_i), sigmoid(a_f), sigmoid(a_o);  g = tanh(a_g)
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
    keep = f.gate(f.peep(1, a[1], c_prev))
    g = f.candidate(a[2])
    c = clamp(keep * c_prev + i * g, clip)
    o = f.gate(f.peep(2, a[3], c))
    return (i, keep, g, o), o * f.state(c), c


def backward(
    kept: Any, h_prev: Any, h: Any, c_prev: Any, c: Any, clip: Any, dh: Any, dc: Any, f: Functions = PLAIN
) -> Any:
    """Gradients of the four sums, of h' past the products, and of c'."""
    i, keep, g, o = kept
    seen = f.state(c)
    da_o = f.gate_back(dh * seen, o)
    dc = inside(f.peep_back(2, dc + f.state_back(dh * o, seen), da_o), c, clip)
    da_i = f.gate_back(dc * g, i)
    da_f = f.gate_back(dc * c_prev, keep)
    da_g = f.candidate_back(dc * i, g)
    return (da_i, da_f, da_g, da_o), 0.0, f.peep_back(0, f.peep_back(1, dc * keep, da_f), da_i)


LSTM = Cell(
    name="lstm",
    op="lstm",
    gates=4,
    sums=4,
    kept=4,
    cell_state=True,
    x_sum=(0, 1, 2, 3),
    h_sum=(0, 1, 2, 3),
    forward=forward,
    backward=backward,
    activations=("Sigmoid", "Tanh", "Tanh"),
)
