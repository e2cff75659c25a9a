# SPDX-License-Identifier: Apache-2.0
"""GRU, one unit, one step (Cho et al. 2014; gate order r, z, n of PyTorch).

r, z = sigmoid(x W^T + bW + h' R^T + bR);  h = (1 - z) n + z h'
gru:              n = tanh(x Wn^T + bWn + r (h' Rn^T + bRn))    reset after the product: PyTorch, cuDNN
gru_reset_before: n = tanh(x Wn^T + bWn + (r h') Rn^T + bRn)    reset before it: the paper, Keras, ONNX
"""

from __future__ import annotations

from typing import Any

from .cell import Cell
from .functions import PLAIN, Functions


def forward(a: Any, h_prev: Any, c_prev: Any, clip: Any, f: Functions = PLAIN) -> Any:
    """One step. The sums are r, z, n's part of x and n's part of h'; the last one is kept for backward."""
    r = f.gate(a[0])
    z = f.gate(a[1])
    n = f.candidate(a[2] + r * a[3])
    return (r, z, n, a[3]), n + z * (h_prev - n), c_prev


def backward(
    kept: Any, h_prev: Any, h: Any, c_prev: Any, c: Any, clip: Any, dh: Any, dc: Any, f: Functions = PLAIN
) -> Any:
    """Gradients of the four sums, and of h' past the products."""
    r, z, n, a_h = kept
    da_n = f.candidate_back(dh * (1 - z), n)
    da_z = f.gate_back(dh * (h_prev - n), z)
    da_r = f.gate_back(da_n * a_h, r)
    return (da_r, da_z, da_n, da_n * r), dh * z, dc


GRU = Cell(
    name="gru",
    op="gru",
    gates=3,
    sums=4,
    kept=4,
    cell_state=False,
    x_sum=(0, 1, 2),
    h_sum=(0, 1, 3),
    forward=forward,
    backward=backward,
    activations=("Sigmoid", "Tanh"),
)


# Two products a step: first r and z from h', then n from r h'. The engine calls `gate`, multiplies rh by Rn, calls
# `forward`; backward in the other order: `backward`, multiply da_n by Rn, `backward_gate` with that product.


def gate(a_r: Any, a_z: Any, h_seen: Any, f: Functions = PLAIN) -> Any:
    """r, z, and what the second product multiplies. h_seen: h' as R sees it."""
    r = f.gate(a_r)
    return r, f.gate(a_z), r * h_seen


def reset_before_forward(a_n: Any, z: Any, h_prev: Any, f: Functions = PLAIN) -> Any:
    """n and h, once the second product is in a_n."""
    n = f.candidate(a_n)
    return n, n + z * (h_prev - n)


def reset_before_backward(z: Any, n: Any, h_prev: Any, dh: Any, f: Functions = PLAIN) -> Any:
    """da_z, da_n, and what reaches h' past the products."""
    return f.gate_back(dh * (h_prev - n), z), f.candidate_back(dh * (1 - z), n), dh * z


def backward_gate(r: Any, h_seen: Any, drh: Any, f: Functions = PLAIN) -> Any:
    """da_r, and what reaches h' through r h', where drh = da_n Rn."""
    return f.gate_back(drh * h_seen, r), drh * r


GRU_RESET_BEFORE = Cell(
    name="gru_reset_before",
    op="gru",
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
    options={"reset_after": False},
    activations=("Sigmoid", "Tanh"),
)
