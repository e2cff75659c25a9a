# SPDX-License-Identifier: Apache-2.0
"""Vanilla RNN, one unit, one step (Elman 1990).

a = x W^T + bW + h' R^T + bR;  h = tanh(a) or relu(a)
"""

from __future__ import annotations

from typing import Any

from .cell import Cell
from .number import positive, relu, tanh


def tanh_forward(a: Any, h_prev: Any, c_prev: Any, clip: Any) -> Any:
    """One step; h itself tells the slope, so nothing else is kept."""
    return (), tanh(a[0]), c_prev


def tanh_backward(kept: Any, h_prev: Any, h: Any, c_prev: Any, c: Any, clip: Any, dh: Any, dc: Any) -> Any:
    """Gradient of the sum; nothing reaches h' past the product."""
    return (dh * (1 - h * h),), 0 * dh, dc


def relu_forward(a: Any, h_prev: Any, c_prev: Any, clip: Any) -> Any:
    """One step."""
    return (), relu(a[0]), c_prev


def relu_backward(kept: Any, h_prev: Any, h: Any, c_prev: Any, c: Any, clip: Any, dh: Any, dc: Any) -> Any:
    """Gradient of the sum."""
    return (positive(dh, h),), 0 * dh, dc


RNN_TANH = Cell(
    name="rnn_tanh",
    gates=1,
    sums=1,
    kept=0,
    cell_state=False,
    x_sum=(0,),
    h_sum=(0,),
    forward=tanh_forward,
    backward=tanh_backward,
)
RNN_RELU = Cell(
    name="rnn_relu",
    gates=1,
    sums=1,
    kept=0,
    cell_state=False,
    x_sum=(0,),
    h_sum=(0,),
    forward=relu_forward,
    backward=relu_backward,
)
