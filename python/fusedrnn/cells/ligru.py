# SPDX-License-Identifier: Apache-2.0
"""Li-GRU, one unit, one step (Ravanelli et al. 2018, without batch norm): no reset gate, and relu for tanh.

a = x W^T + bW + h' R^T + bR
z = sigmoid(a_z);  n = relu(a_n);  h = (1 - z) n + z h'
"""

from __future__ import annotations

from typing import Any

from .cell import Cell
from .functions import RELU_CANDIDATE, Functions


def forward(a: Any, h_prev: Any, c_prev: Any, clip: Any, f: Functions = RELU_CANDIDATE) -> Any:
    """One step: z and n, and h."""
    z = f.gate(a[0])
    n = f.candidate(a[1])
    return (z, n), n + z * (h_prev - n), c_prev


def backward(
    kept: Any, h_prev: Any, h: Any, c_prev: Any, c: Any, clip: Any, dh: Any, dc: Any, f: Functions = RELU_CANDIDATE
) -> Any:
    """Gradients of the two sums, and of h' past the products."""
    z, n = kept
    return (f.gate_back(dh * (h_prev - n), z), f.candidate_back(dh * (1 - z), n)), dh * z, dc


LIGRU = Cell(
    name="ligru",
    op="ligru",
    gates=2,
    sums=2,
    kept=2,
    cell_state=False,
    x_sum=(0, 1),
    h_sum=(0, 1),
    forward=forward,
    backward=backward,
    activations=("Sigmoid", "Relu"),
    smooth=False,
)
