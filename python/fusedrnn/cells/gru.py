# SPDX-License-Identifier: Apache-2.0
"""GRU, one unit, one step (Cho et al. 2014; gate order r, z, n of PyTorch).

r, z = sigmoid(x W^T + bW + h' R^T + bR);  h = (1 - z) n + z h'
gru:              n = tanh(x Wn^T + bWn + r (h' Rn^T + bRn))    reset after the product: PyTorch, cuDNN
gru_reset_before: n = tanh(x Wn^T + bWn + (r h') Rn^T + bRn)    reset before it: the paper, Keras, ONNX
"""

from __future__ import annotations

from typing import Any

from .cell import Cell
from .number import sigmoid, tanh


def forward(a: Any, h_prev: Any, c_prev: Any, clip: Any) -> Any:
    """One step. The sums are r, z, n's part of x and n's part of h'; the last one is kept for backward."""
    r = sigmoid(a[0])
    z = sigmoid(a[1])
    n = tanh(a[2] + r * a[3])
    return (r, z, n, a[3]), n + z * (h_prev - n), c_prev


def backward(kept: Any, h_prev: Any, h: Any, c_prev: Any, c: Any, clip: Any, dh: Any, dc: Any) -> Any:
    """Gradients of the four sums, and of h' past the products."""
    r, z, n, a_h = kept
    da_n = dh * (1 - z) * (1 - n * n)
    da_z = dh * (h_prev - n) * z * (1 - z)
    da_r = da_n * a_h * r * (1 - r)
    return (da_r, da_z, da_n, da_n * r), dh * z, dc


GRU = Cell(
    name="gru",
    gates=3,
    sums=4,
    kept=4,
    cell_state=False,
    x_sum=(0, 1, 2),
    h_sum=(0, 1, 3),
    forward=forward,
    backward=backward,
)


# Two products a step: first r and z from h', then n from r h'. The engine calls `gate`, multiplies rh by Rn, calls
# `forward`; backward in the other order: `backward`, multiply da_n by Rn, `backward_gate` with that product.


def gate(a_r: Any, a_z: Any, h_prev: Any) -> Any:
    """r, z, and what the second product multiplies."""
    r = sigmoid(a_r)
    return r, sigmoid(a_z), r * h_prev


def reset_before_forward(a_n: Any, z: Any, h_prev: Any) -> Any:
    """n and h, once the second product is in a_n."""
    n = tanh(a_n)
    return n, n + z * (h_prev - n)


def reset_before_backward(z: Any, n: Any, h_prev: Any, dh: Any) -> Any:
    """da_z, da_n, and what reaches h' past the products."""
    return dh * (h_prev - n) * z * (1 - z), dh * (1 - z) * (1 - n * n), dh * z


def backward_gate(r: Any, h_prev: Any, drh: Any) -> Any:
    """da_r, and what reaches h' through r h', where drh = da_n Rn."""
    return drh * h_prev * r * (1 - r), drh * r


GRU_RESET_BEFORE = Cell(
    name="gru_reset_before",
    gates=3,
    sums=3,
    kept=3,
    cell_state=False,
    x_sum=(0, 1, 2),
    h_sum=(0, 1, 2),
    forward=reset_before_forward,
    backward=reset_before_backward,
    gate=gate,
    backward_gate=backward_gate,
)
