# SPDX-License-Identifier: Apache-2.0
"""How many operations torch.utils.flop_counter counts: those of the products, as for torch's own operators."""

from __future__ import annotations

from typing import Any

from torch.utils.flop_counter import register_flop_formula

from .how import How, read


def _products(how: How, shapes: Any) -> tuple[int, int, int]:
    """Operations of a forward pass: all, those of the first layer's products with x, those with h at one step. Rows
    count in full, whatever lengths say."""
    states, weights = shapes[1 : 1 + how.states], shapes[1 + how.states :]
    T, E, B, _ = shapes[0]
    E = max(E, *(shape[0] for shape in weights), *(shape[1] for shape in states if shape is not None))
    costs = [2 * E * B * w[1] * w[2] for w in weights if len(w) == 3]
    per = 2 + (how.proj_size > 0)  # matrices of a layer in one direction
    return T * sum(costs), T * sum(costs[: per * how.directions : per]), sum(costs[1::per])


def forward(*arguments: Any, out_shape: Any = None, **_: Any) -> int:
    """Of `forward`."""
    *shapes, _, _, text = arguments
    return _products(read(text), shapes)[0]


def backward(*arguments: Any, out_shape: Any = None, **_: Any) -> int:
    """Of `backward`: each product has one for each of its sides, where that gradient is wanted."""
    *shapes, _, _, text = arguments
    how = read(text)
    whole, first, begin = _products(how, shapes[: how.arguments])
    unwanted = first * (how.want[0] == "0") + begin * (how.want[1] == "0")
    return whole - unwanted + whole * ("1" in how.want[1 + how.states :]) + whole * how.recompute


def register(name: str, operator: Any) -> None:
    """The formula of an operator of this kind, if there is one."""
    formula = {"forward": forward, "backward": backward}.get(name)
    if formula is not None:
        register_flop_formula(operator.overloadpacket)(formula)
