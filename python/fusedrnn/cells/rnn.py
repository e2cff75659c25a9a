# SPDX-License-Identifier: Apache-2.0
"""Vanilla RNN, one unit, one step (Elman 1990).

a = x W^T + bW + h' R^T + bR;  h = tanh(a) or relu(a)
"""

from __future__ import annotations

from typing import Any

from .cell import Cell
from .functions import Functions, ReluUnit, TanhUnit


def _cell(name: str, plain: Functions, **facts: Any) -> Cell:
    def forward(a: Any, h_prev: Any, c_prev: Any, clip: Any, f: Functions = plain) -> Any:
        """One step; h itself tells the slope, so nothing else is kept."""
        return (), f.gate(a[0]), c_prev

    def backward(
        kept: Any, h_prev: Any, h: Any, c_prev: Any, c: Any, clip: Any, dh: Any, dc: Any, f: Functions = plain
    ) -> Any:
        """Gradient of the sum; nothing reaches h' past the product."""
        return (f.gate_back(dh, h),), 0.0, dc

    return Cell(
        name=name,
        op="rnn",
        gates=1,
        sums=1,
        kept=0,
        cell_state=False,
        x_sum=(0,),
        h_sum=(0,),
        forward=forward,
        backward=backward,
        **facts,
    )


RNN_TANH = _cell("rnn_tanh", TanhUnit(), activations=("Tanh",))
RNN_RELU = _cell("rnn_relu", ReluUnit(), activations=("Relu",), options={"nonlinearity": "relu"}, smooth=False)
