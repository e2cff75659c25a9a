# SPDX-License-Identifier: Apache-2.0
"""The judge of the options: what each of them does in a step of reference.py's walk.

Per row and step, with h', c' the state before it:

    sums   norm(x W^T + context) + bW,  norm((h' * mask) R^T) + bR    norm: layer norm times gain, or nothing
    cell   m, c~ = fusedrnn.cells' formulas of the sums, with these functions in them (`Chosen`):
               gate, candidate = F, G(clip(a));  state = H(norm(c));  peep = a + p c
    out    h = k_h h' + (1 - k_h) (m Wr^T or m),  c = k_c c' + (1 - k_c) c~
           A GRU with a projection carries m as its c, in the place of h'.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..cells import CELLS, dropout
from ..cells.activations import ACTIVATIONS
from ..cells.functions import Functions
from ..cells.number import clamp, inside
from . import Extras, Problem

EPSILON = 1e-5  # of layer norm, as in torch


def norm(a: Any) -> tuple[Any, Any]:
    """a with mean 0 and variance 1 along the last axis, and 1 / its deviation."""
    centred = a - a.mean(-1, keepdims=True)
    scale = 1 / np.sqrt((centred * centred).mean(-1, keepdims=True) + EPSILON)
    return centred * scale, scale


def norm_back(d: Any, hat: Any, scale: Any) -> Any:
    """The gradient of a from that of `hat`, where hat, scale = norm(a)."""
    return scale * (d - d.mean(-1, keepdims=True) - hat * (d * hat).mean(-1, keepdims=True))


def row(a: Any) -> Any:
    """(E,n) as (E,1,n)."""
    return a[:, None, :]


def mixed(keep: Any, old: Any, fresh: Any) -> Any:
    """Zoneout: `keep` of the old state stays. None: nothing."""
    return fresh if keep is None else keep * old + (1 - keep) * fresh


def parted(keep: Any, d: Any) -> tuple[Any, Any]:
    """A gradient's parts that `mixed` sends past the step, and into it."""
    return (0.0, d) if keep is None else (keep * d, (1 - keep) * d)


class Options:
    """The options of one layer in one direction (n = layer * D + direction). Without a variant they do nothing."""

    def __init__(self, problem: Problem, n: int, extras: Extras) -> None:
        self.problem, self.variant, self.n = problem, problem.variant, n
        self.extras = extras
        self.hr, self.ph, self.gain_ih, self.gain_hh, self.gain_c, self.bias_c = extras
        with_c = CELLS[problem.cell].cell_state
        self.carries_m = self.hr is not None and not with_c
        self.has_c = with_c or self.carries_m
        self.mask: Any = 1.0
        self.keep_h = self.keep_c = [None] * problem.T
        if (v := self.variant) is not None:
            if v.training and v.recurrent_dropout > 0:
                shape = (problem.E, problem.B, problem.outputs)
                self.mask = dropout.scale(shape, v.recurrent_dropout, problem.seed, n, 4)
            self.keep_h = self._keep(v.zoneout_h, 2, problem.outputs, v.training)
            self.keep_c = self._keep(v.zoneout_c, 3, problem.H, v.training)

    def _keep(self, p: float, stream: int, units: int, training: bool) -> Any:
        """(T,E,B,units): how much of the old state stays."""
        problem = self.problem
        shape = (problem.T, problem.E, problem.B, units)
        if p == 0 or not training:
            return [p or None] * problem.T
        return dropout.drawn(shape, p, problem.seed, self.n, stream).astype(np.float64)

    def functions(self) -> tuple[Functions, ...]:
        """What a step's formulas take beside their numbers."""
        return () if self.variant is None else (Chosen(self),)

    def begin_back(self, kind: Any) -> None:
        """Gradients of the extras, to be added to: those of one step come from its rows in `live` (E,B,1)."""
        self.live: Any = None
        self.gradients = tuple(None if a is None else np.zeros(a.shape, kind) for a in self.extras)
        self.dhr, self.dph, self.dgain_ih, self.dgain_hh, self.dgain_c, self.dbias_c = self.gradients

    def add(self, to: Any, d: Any, by: Any = None) -> None:
        """Adds the sum of d over the rows that are live, or d^T by."""
        d = np.where(self.live, d, 0)
        to += d.sum(1) if by is None else d.swapaxes(-1, -2) @ np.where(self.live, by, 0)

    def peephole(self, of: Any, k: int) -> Any:
        """Number k of i, f, o in weight_ph or its gradient, (E,H): a view. Coupled gates have none for f."""
        parts = np.split(of, CELLS[self.problem.cell].gates - 1, -1)
        return parts[-1 if k == 2 else k]


class Chosen(Functions):
    """A cell's functions as the options have them, in one step. Backward asks the object that forward has asked."""

    def __init__(self, options: Options) -> None:
        assert options.variant is not None
        self.options, self.activations, self.limit = options, options.variant.activations, options.variant.clip_gates
        self.sums: dict[int, Any] = {}  # by the identity of what was made from them
        self.states: dict[int, Any] = {}  # what peephole k has seen

    def _clipped(self, k: int, a: Any) -> Any:
        name, alpha, beta = self.activations[k]
        y = ACTIVATIONS[name].f(clamp(a, self.limit), alpha, beta)
        self.sums[id(y)] = a
        return y

    def _slope(self, k: int, d: Any, y: Any) -> Any:
        name, alpha, beta = self.activations[k]
        return d * ACTIVATIONS[name].slope(y, alpha, beta)

    def gate(self, a: Any) -> Any:
        return self._clipped(0, a)

    def gate_back(self, d: Any, y: Any) -> Any:
        return inside(self._slope(0, d, y), self.sums[id(y)], self.limit)

    def candidate(self, a: Any) -> Any:
        return self._clipped(1, a)

    def candidate_back(self, d: Any, y: Any) -> Any:
        return inside(self._slope(1, d, y), self.sums[id(y)], self.limit)

    def state(self, c: Any) -> Any:
        """Not clipped."""
        name, alpha, beta = self.activations[2]
        if self.options.gain_c is not None:
            self.norm = norm(c)
            c = self.norm[0] * row(self.options.gain_c) + row(self.options.bias_c)
        return ACTIVATIONS[name].f(c, alpha, beta)

    def state_back(self, d: Any, y: Any) -> Any:
        d, options = self._slope(2, d, y), self.options
        if options.gain_c is None:
            return d
        options.add(options.dgain_c, d * self.norm[0])
        options.add(options.dbias_c, d)
        return norm_back(d * row(options.gain_c), *self.norm)

    def peep(self, k: int, a: Any, c: Any) -> Any:
        if self.options.ph is None:
            return a
        self.states[k] = c
        return a + row(self.options.peephole(self.options.ph, k)) * c

    def peep_back(self, k: int, dc: Any, da: Any) -> Any:
        options = self.options
        if options.ph is None:
            return dc
        options.add(options.peephole(options.dph, k), da * self.states[k])
        return dc + row(options.peephole(options.ph, k)) * da
