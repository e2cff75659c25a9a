# SPDX-License-Identifier: Apache-2.0
"""What a call is, beside its tensors: one short text, because torch's operators take numbers and text but no objects.

Tensors of a call, everywhere in this package, with an axis E of weight sets (extent 1 or E: broadcast):

    p        x (T,E,B,I), h0 (S,E,B,H) or None, c0 likewise (LSTM only), then per layer and direction W (E,G*H,I_l),
             R (E,G*H,H) and, with bias, bW, bR (E,G*H), with a projection Wr (E,P,H); S = layers * directions
    results  y (T,E,B,D*H), hn (S,E,B,H), cn likewise (LSTM only), cells (L,T,E,B,D*H) or None
    tape     (E, n): opaque, belongs to the backend whose number stands in its last element
    lengths  int64 (E,B) or None; reset bool or uint8 (T,E,B) or None

With a projection (LSTM only) h has P units instead of H: in y, hn, h0, R and I_l. c and cells keep H.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from ..cells import CELLS


class How(NamedTuple):
    """The settings of a call. `want` says which gradients are wanted, one digit for each of p; `each`: give them for
    every weight set, also where the argument is shared by all (else their sum). proj_size: P; 0: no projection."""

    cell: str
    layers: int = 1
    directions: int = 1
    bias: bool = True
    reverse: bool = False
    reset_to_initial: bool = False
    recompute: bool = False
    clip_cell: float = 0.0
    clip_grad: float = 0.0
    tape: bool = False
    cells: bool = False
    want: str = ""
    each: bool = False
    proj_size: int = 0

    @property
    def states(self) -> int:
        """1, or 2 where there is c."""
        return 2 if self.cell == "lstm" else 1

    @property
    def per_layer(self) -> int:
        """Weights of one layer in one direction."""
        return (4 if self.bias else 2) + (self.proj_size > 0)

    @property
    def weights(self) -> int:
        """Weights in all."""
        return self.layers * self.directions * self.per_layer

    @property
    def arguments(self) -> int:
        """How many tensors p has."""
        return 1 + self.states + self.weights

    @property
    def results(self) -> int:
        """How many results there are, the tape not counted."""
        return 1 + self.states + self.cells

    @property
    def argument_axes(self) -> tuple[int, ...]:
        """Where E is, for each of p."""
        return (1,) * (1 + self.states) + (0,) * self.weights

    @property
    def result_axes(self) -> tuple[int, ...]:
        """Where E is, for each result."""
        return (1,) * (1 + self.states) + (2,) * self.cells

    @property
    def argument_names(self) -> tuple[str, ...]:
        """Of all p. One layer may be any of a stack's, or a cell's: no number."""
        return _argument_names(self.states, self.layers, self.directions, self.bias, self.proj_size > 0)

    @property
    def result_names(self) -> tuple[str, ...]:
        """Of all results."""
        return ("y", "h_n", "c_n")[: 1 + self.states] + ("cells",) * self.cells

    def text(self) -> str:
        """As operators take it; `read` is the inverse."""
        flags = f"{self.bias:d} {self.reverse:d} {self.reset_to_initial:d} {self.recompute:d}"
        clips = f"{self.clip_cell!r} {self.clip_grad!r}"
        wants = f"{self.tape:d} {self.cells:d} {self.want or '-'} {self.each:d} {self.proj_size}"
        return f"{self.cell} {self.layers} {self.directions} {flags} {clips} {wants}"

    def tape_length(self, T: Any, B: Any, H: Any) -> Any:
        """Elements of a tape for one weight set, one for the backend's number included; sizes may be symbolic."""
        if not self.tape:
            return 0
        cell = CELLS[self.cell]
        per_unit = (1 + cell.cell_state + cell.kept) * T  # h, c, and what the cell keeps
        if self.recompute:
            per_unit = T + (T + 7) // 8 if self.cell == "lstm" else T
        spared = T * (H - self.proj_size) if self.proj_size else 0  # h has fewer units
        return self.layers * self.directions * B * (H * per_unit - spared) + 1


@lru_cache(maxsize=4096)
def read(text: str) -> How:
    """What `How.text` wrote."""
    cell, *rest = text.split(" ")
    n, m = (int(word) for word in rest[:2])
    bias, reverse, initial, recompute = (word == "1" for word in rest[2:6])
    return How(
        cell,
        n,
        m,
        bias,
        reverse,
        initial,
        recompute,
        float(rest[6]),
        float(rest[7]),
        rest[8] == "1",
        rest[9] == "1",
        "" if rest[10] == "-" else rest[10],
        rest[11] == "1",
        int(rest[12]) if len(rest) > 12 else 0,  # programs exported by earlier versions end before it
    )


def names(num_layers: int, directions: int, bias: bool, projected: bool = False) -> list[str]:
    """torch.nn's parameter names, in its order."""
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: 4 if bias else 2]
    kinds += ("weight_hr",) if projected else ()
    ends = ("", "_reverse")[:directions]
    return [f"{kind}_l{layer}{end}" for layer in range(num_layers) for end in ends for kind in kinds]


@lru_cache
def _argument_names(states: int, layers: int, directions: int, bias: bool, projected: bool) -> tuple[str, ...]:
    weights = names(layers, directions, bias, projected)
    weights = [name.replace("_l0", "") for name in weights] if layers == 1 else weights
    return ("x", "h0", "c0")[: 1 + states] + tuple(weights)


# An operator's tensors come in groups: p, then the tape or v, then g and t (which always have a place for cells).


def groups(name: str, states: int, weights: int) -> tuple[int, ...]:
    """How many tensors each group has."""
    p, g = 1 + states + weights, 2 + states
    return {"forward": (p,), "backward": (p, 1, g), "jvp": (p, p), "hvp": (p, p, g, g)}[name]


def cut(tensors: Sequence[Any], sizes: Sequence[int]) -> list[tuple[Any, ...]]:
    """The groups."""
    result, begin = [], 0
    for size in sizes:
        result.append(tuple(tensors[begin : begin + size]))
        begin += size
    return result


def parts(name: str, settings: How, tensors: Sequence[Any]) -> list[tuple[Any, ...]]:
    """The groups; cotangents without the place for cells where there are none."""
    result = cut(tensors, groups(name, settings.states, settings.weights))
    return result if settings.cells else [*result[:2], *(group[:-1] for group in result[2:])]
