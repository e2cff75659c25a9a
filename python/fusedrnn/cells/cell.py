# SPDX-License-Identifier: Apache-2.0
"""What the engines know of a cell: how many gates, which sums they feed, and the functions of one unit and one step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Cell:
    """One row of the registry. The functions take and return numbers: floats when compiled, arrays in NumPy.

    `forward(a, h_prev, c_prev, clip, f) -> kept, h, c` and
    `backward(kept, h_prev, h, c_prev, c, clip, dh, dc, f) -> da, dh_prev, dc_prev`, where `a` are the sums of products,
    `kept` is what the tape holds beside h and c, and `dh_prev` is what reaches h' past the products.
    `f` are the functions of the gates (see functions.py), by default the plain ones; cells without R take none.
    A cell of two products a step (see gru.py) has `gate` and `backward_gate` beside them, and other arguments.
    """

    name: str
    op: str  # the public function that runs it
    gates: int  # row blocks of W and R
    sums: int  # pre-activations, per unit
    kept: int  # values on the tape beside c and h
    cell_state: bool  # has c
    x_sum: tuple[int, ...]  # gate -> the sum that takes its rows of x W^T + bW
    h_sum: tuple[int, ...]  # gate -> the sum that takes its rows of h' R^T + bR
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    gate: Callable[..., Any] | None = None
    backward_gate: Callable[..., Any] | None = None
    options: dict[str, Any] = field(default_factory=dict, hash=False)  # of that function, which choose this cell
    state_product: bool = True  # has R; without it h_sum is empty
    activations: tuple[str, ...] = ()  # its usual ones, where options may put others in their places
    smooth: bool = True  # no gradient jumps: where rounding moves a sum over 0, relu's is another one

    @property
    def two_products(self) -> bool:
        """Whether the second product needs what the first one's gates say."""
        return self.gate is not None
