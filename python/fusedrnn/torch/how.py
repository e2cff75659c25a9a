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

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from ..cells import CELLS
from ..cells.cell import Cell

if TYPE_CHECKING:
    from functools import cached_property as _kept
else:

    class _kept:  # noqa: N801
        """A property that is computed once: functools' has a lock, which torch.compile refuses."""

        def __init__(self, function):
            self.function, self.__doc__ = function, function.__doc__

        def __get__(self, instance, owner=None):
            value = instance.__dict__[self.function.__name__] = self.function(instance)
            return value


@dataclass(frozen=True, kw_only=True)
class How:
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

    def __hash__(self) -> int:
        return hash(self.text)

    def but(self, **changes: Any) -> How:
        """These settings with changes."""
        # torch.compile looks through caches, and says so
        return replace(self, **changes) if torch.compiler.is_compiling() else _changed(self, **changes)

    @_kept
    def facts(self) -> Cell:
        """What the registry knows of the cell."""
        return CELLS[self.cell]

    @_kept
    def states(self) -> int:
        """1, or 2 where there is c."""
        return 1 + self.facts.cell_state

    @_kept
    def per_layer(self) -> int:
        """Weights of one layer in one direction."""
        return (4 if self.bias else 2) + (self.proj_size > 0)

    @_kept
    def weights(self) -> int:
        """Weights in all."""
        return self.layers * self.directions * self.per_layer

    @_kept
    def arguments(self) -> int:
        """How many tensors p has."""
        return 1 + self.states + self.weights

    @_kept
    def results(self) -> int:
        """How many results there are, the tape not counted."""
        return 1 + self.states + self.cells

    @_kept
    def argument_axes(self) -> tuple[int, ...]:
        """Where E is, for each of p."""
        return (1,) * (1 + self.states) + (0,) * self.weights

    @_kept
    def result_axes(self) -> tuple[int, ...]:
        """Where E is, for each result."""
        return (1,) * (1 + self.states) + (2,) * self.cells

    @_kept
    def weight_names(self) -> tuple[str, ...]:
        """torch.nn's, in its order."""
        return tuple(names(self.layers, self.directions, self.bias, self.proj_size > 0))

    @_kept
    def argument_names(self) -> tuple[str, ...]:
        """Of all p. One layer may be any of a stack's, or a cell's: no number."""
        weights = self.weight_names
        weights = tuple(name.replace("_l0", "") for name in weights) if self.layers == 1 else weights
        return ("x", "h0", "c0")[: 1 + self.states] + weights

    @_kept
    def result_names(self) -> tuple[str, ...]:
        """Of all results."""
        return ("y", "h_n", "c_n")[: 1 + self.states] + ("cells",) * self.cells

    @_kept
    def text(self) -> str:
        """As operators take it; `read` is the inverse."""
        return " ".join([write(getattr(self, name)) for name, (write, _) in _WORDS.items()])


_made = lru_cache(maxsize=4096)(How)


def how_of(**settings: Any) -> How:
    """A `How`, made once for the same settings."""
    return How(**settings) if torch.compiler.is_compiling() else _made(**settings)


@lru_cache(maxsize=4096)
def _changed(how: How, **changes: Any) -> How:
    return replace(how, **changes)


_TEXT: Any = (lambda text: text or "-", lambda word: "" if word == "-" else word)
_WHOLE: Any = (str, int)
_FLAG: Any = (lambda flag: f"{flag:d}", lambda word: word == "1")
_REAL: Any = (lambda number: repr(float(number)), float)

# The words of a text, and how each is written and read. A new one goes to the end: exported programs hold older texts.
_WORDS: dict[str, tuple[Callable[[Any], str], Callable[[str], Any]]] = {
    "cell": _TEXT,
    "layers": _WHOLE,
    "directions": _WHOLE,
    "bias": _FLAG,
    "reverse": _FLAG,
    "reset_to_initial": _FLAG,
    "recompute": _FLAG,
    "clip_cell": _REAL,
    "clip_grad": _REAL,
    "tape": _FLAG,
    "cells": _FLAG,
    "want": _TEXT,
    "each": _FLAG,
    "proj_size": _WHOLE,
}


@lru_cache(maxsize=4096)
def read(text: str) -> How:
    """What `How.text` wrote, or an earlier version, which knew fewer words."""
    words = zip(_WORDS.items(), text.split(" "), strict=False)
    return How(**{name: read(word) for (name, (_, read)), word in words})


def names(num_layers: int, directions: int, bias: bool, projected: bool = False) -> list[str]:
    """torch.nn's parameter names, in its order."""
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: 4 if bias else 2]
    kinds += ("weight_hr",) if projected else ()
    ends = ("", "_reverse")[:directions]
    return [f"{kind}_l{layer}{end}" for layer in range(num_layers) for end in ends for kind in kinds]


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
