# SPDX-License-Identifier: Apache-2.0
"""The functions that a formula of this folder takes for its gates, its candidate (g or n) and its cell state.

y = f(x);  back(d, y) = d f'(x), which every f here tells from y
These are the ones of a plain cell, and the defaults. An engine with options gives the formulas an object with the same
methods. `peep` adds a peephole to a sum, and `peep_back` gives the state its gradient; a plain cell has none.
"""

from __future__ import annotations

from typing import Any

from .number import positive, relu, sigmoid, tanh


class Functions:
    """Those of a plain cell."""

    def gate(self, a: Any) -> Any:
        return sigmoid(a)

    def gate_back(self, d: Any, y: Any) -> Any:
        return d * y * (1 - y)

    def candidate(self, a: Any) -> Any:
        return tanh(a)

    def candidate_back(self, d: Any, y: Any) -> Any:
        return d * (1 - y * y)

    def state(self, c: Any) -> Any:
        return tanh(c)

    def state_back(self, d: Any, y: Any) -> Any:
        return d * (1 - y * y)

    def peep(self, k: int, a: Any, c: Any) -> Any:
        """a: sum number k of i, f, o."""
        return a

    def peep_back(self, k: int, dc: Any, da: Any) -> Any:
        return dc


class TanhUnit(Functions):
    """The RNN's unit takes the place of its gate."""

    def gate(self, a: Any) -> Any:
        return tanh(a)

    def gate_back(self, d: Any, y: Any) -> Any:
        return d * (1 - y * y)


class ReluUnit(Functions):
    """The same with relu."""

    def gate(self, a: Any) -> Any:
        return relu(a)

    def gate_back(self, d: Any, y: Any) -> Any:
        return positive(d, y)


class ReluCandidate(Functions):
    """The Li-GRU's."""

    def candidate(self, a: Any) -> Any:
        return relu(a)

    def candidate_back(self, d: Any, y: Any) -> Any:
        return positive(d, y)


PLAIN, RELU_CANDIDATE = Functions(), ReluCandidate()
