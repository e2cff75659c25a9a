# SPDX-License-Identifier: Apache-2.0
"""The cases that every backend is tested on: cells, sizes, options and how the arrays lie in memory."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np

from fusedrnn import layers
from fusedrnn.backends import Arguments, Problem, Results, reference
from fusedrnn.cells import CELLS

ALL_CELLS = list(CELLS)
LAYERS = {layer._op: layer for layer in layers._Layer.__subclasses__()}
OPS = {name: (cell.op, cell.options) for name, cell in CELLS.items()}  # the public function, and what chooses the cell


class Data(NamedTuple):
    """One problem, its arguments p, tangents v, gradients g and their tangents t; canonical arrays."""

    problem: Problem
    p: Arguments
    v: Arguments
    g: Results
    t: Results


@dataclass(frozen=True)
class Case:
    """One line of the tables below. What is not said has these values."""

    cell: str = "lstm"
    T: int = 4
    E: int = 1
    B: int = 3
    I: int = 4
    H: int = 6
    L: int = 1
    D: int = 1
    bias: bool = True
    state: bool = True
    lengths: str = ""  # "", "any" (0 and T among them), "zero" (all 0)
    reset: float = 0.0  # the share of True
    to_initial: bool = False
    reverse: bool = False
    recompute: bool = False
    clip_cell: float = 0.0
    clip_grad: float = 0.0
    dropout: float = 0.0
    layout: str = "plain"  # see `_lay`
    missing: tuple[str, ...] = ()  # results without gradient: y, hn, cn, cells
    seed: int = 0

    def __str__(self) -> str:
        said = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]
        return "-".join(said) or "default"


def _lay(a: np.ndarray, layout: str) -> np.ndarray:
    """The same values at other places in memory."""
    if layout == "strided":  # every other element of every axis, junk between them
        big = np.full([2 * n for n in a.shape], np.nan, a.dtype)
        view = big[tuple(slice(None, None, 2) for _ in a.shape)]
    elif layout == "negative":
        view = np.empty_like(a)[tuple(slice(None, None, -1) for _ in a.shape)]
    elif layout == "column":  # the last axis is the slowest
        view = np.empty(a.shape[::-1], a.dtype).transpose()
    elif layout == "batch":  # as batch_first leaves it: axes 0 and 2 change places
        view = np.empty(a.swapaxes(0, min(2, a.ndim - 1)).shape, a.dtype).swapaxes(0, min(2, a.ndim - 1))
    else:
        return a
    view[...] = a
    return view


def build(case: Case, dtype: Any) -> Data:
    """The case's arrays: the same numbers for every backend and, up to rounding, for both dtypes."""
    rng = np.random.default_rng([case.seed, case.T, case.B, case.H])
    T, E, B, I, H, L, D = case.T, case.E, case.B, case.I, case.H, case.L, case.D
    cell = CELLS[case.cell]
    shared = case.layout == "shared"  # one set of weights for all E

    def new(*shape: int, scale: float = 1.0, share: bool = False) -> np.ndarray:
        if share and shared:
            one = new(1, *shape[1:], scale=scale)
            return np.broadcast_to(one, shape)
        array = (rng.uniform(-1.7, 1.7, shape) * scale).astype(dtype)
        return _lay(array, case.layout)

    def arguments(everything: bool) -> Arguments:
        params = []
        for n in range(L * D):
            below = I if n < D else D * H
            W = new(E, cell.gates * H, below, scale=below**-0.5, share=True)
            R = new(E, cell.gates * H, H, scale=0.8 * H**-0.5, share=True)  # so that long walks forget
            biases = [new(E, cell.gates * H, scale=0.3, share=True) if case.bias else None for _ in range(2)]
            params.append((W, R, *biases) if cell.state_product else (W, None, biases[0], None))
        given = case.state or everything
        h0 = new(L * D, E, B, H) if given else None
        c0 = new(L * D, E, B, H) if given and cell.cell_state else None
        x = np.broadcast_to(new(T, 1, 1, I), (T, E, B, I)) if case.layout == "broadcast" else new(T, E, B, I)
        return Arguments(x, h0, c0, params)

    def results() -> Results:
        def one(name: str, *shape: int) -> Any:
            array = new(*shape)
            return None if name in case.missing or (name == "cn" and not cell.cell_state) else array

        return Results(
            one("y", T, E, B, D * H),
            one("hn", L * D, E, B, H),
            one("cn", L * D, E, B, H),
            one("cells", L, T, E, B, D * H),
        )

    problem = Problem(
        case.cell, T, E, B, I, H, L, D, case.reverse, case.to_initial, case.recompute, case.clip_cell, case.clip_grad,
        case.dropout, 2**63 + 12345,
    )  # fmt: skip
    p, v, g, t = arguments(False), arguments(True), results(), results()
    if case.lengths:
        lengths = np.zeros((E, B), np.int64)
        if case.lengths == "any":
            lengths[...] = rng.integers(0, T + 1, (E, B))
            lengths.flat[: min(B, 2)] = (T, 0)[: min(B, 2)]
        problem.lengths = _lay(lengths, case.layout if case.layout != "strided" else "plain")
        for array in (p.x, g.y):  # what lies past a row's end must reach nothing
            if array is not None and case.layout != "broadcast":
                array[np.arange(T)[:, None, None] >= lengths] = np.nan
    if case.reset:
        problem.reset = rng.random((T, E, B)) < case.reset
    return Data(problem, p, v, g, t)


def empty_results(problem: Problem, dtype: Any, fill: float = np.nan) -> Results:
    """New arrays for all results, poisoned."""
    p = problem
    state = (p.L * p.D, p.E, p.B, p.H)
    cn = np.full(state, fill, dtype) if CELLS[p.cell].cell_state else None
    y = np.full((p.T, p.E, p.B, p.D * p.H), fill, dtype)
    return Results(y, np.full(state, fill, dtype), cn, np.full((p.L, *y.shape), fill, dtype))


def empty_arguments(data: Data, dtype: Any, fill: float = np.nan) -> Arguments:
    """New arrays for all gradients, poisoned; of weights shared over E, one gradient with stride 0."""
    p = data.problem
    state = (p.L * p.D, p.E, p.B, p.H)

    def like(a: Any) -> Any:
        if a is None:
            return None
        if a.shape[0] > 1 and a.strides[0] == 0:
            one = np.full((1, *a.shape[1:]), fill, dtype)
            return np.lib.stride_tricks.as_strided(one, a.shape, (0, *one.strides[1:]))
        return np.full(a.shape, fill, dtype)

    c0 = np.full(state, fill, dtype) if CELLS[p.cell].cell_state else None
    params: Any = [tuple(like(a) for a in arrays) for arrays in data.p.params]
    return Arguments(np.full(data.p.x.shape, fill, dtype), np.full(state, fill, dtype), c0, params)


def named(values: Results | Arguments) -> dict[str, Any]:
    """The arrays by name, for messages; those that are None are left out."""
    if isinstance(values, Results):
        found = {"y": values.y, "hn": values.hn, "cn": values.cn, "cells": values.cells}
    else:
        found = {"x": values.x, "h0": values.h0, "c0": values.c0}
        for n, arrays in enumerate(values.params):
            found |= {f"{kind}[{n}]": a for kind, a in zip(("W", "R", "bW", "bR"), arrays, strict=True)}
    return {name: a for name, a in found.items() if a is not None}


@functools.lru_cache(maxsize=4096)
def expected(case: Case, dtype: str) -> dict[str, dict[str, np.ndarray]]:
    """What the reference says, in float64: of forward, backward, jvp and hvp."""
    data = build(case, dtype)
    out, tout = empty_results(data.problem, np.float64), empty_results(data.problem, np.float64)
    dp, tdp = empty_arguments(data, np.float64), empty_arguments(data, np.float64)
    reference.forward(data.problem, data.p, out, None)
    reference.backward(data.problem, data.p, None, data.g, dp)
    reference.jvp(data.problem, data.p, data.v, tout)
    reference.hvp(data.problem, data.p, data.v, data.g, data.t, tdp)
    return {"forward": named(out), "backward": named(dp), "jvp": named(tout), "hvp": named(tdp)}


# Sizes: one, primes, and one off every power of two and vector width that a kernel may be cut at.
SIZES = [
    Case(T=T, B=B, I=I, H=H)
    for T, B, I, H in [
        (1, 1, 1, 1),
        (1, 1, 64, 64),
        (2, 1, 1, 17),
        (3, 1, 33, 31),
        (5, 1, 7, 48),
        (7, 1, 16, 65),
        (3, 2, 5, 2),
        (2, 3, 15, 7),
        (4, 4, 8, 8),
        (3, 5, 17, 9),
        (3, 6, 16, 16),
        (2, 7, 31, 15),
        (5, 8, 3, 24),
        (2, 11, 1, 33),
        (2, 12, 13, 23),
        (3, 13, 40, 25),
        (2, 16, 32, 32),
        (2, 17, 9, 47),
        (3, 31, 6, 49),
        (2, 33, 64, 3),
        (1, 37, 127, 63),
        (2, 16, 130, 128),
        (23, 2, 3, 5),
        (65, 3, 2, 11),
        (300, 1, 2, 8),
        (0, 3, 4, 5),
        (3, 0, 4, 5),
    ]
]

OPTIONS = [
    Case(**({"T": 6} | options))
    for options in [
        {"bias": False},
        {"state": False},
        {"bias": False, "state": False, "B": 1, "H": 16},
        {"reverse": True},
        {"reverse": True, "B": 1, "H": 17},
        {"D": 2},
        {"L": 3},
        {"L": 2, "D": 2, "B": 5, "H": 9},
        {"L": 2, "D": 2, "B": 1, "H": 8},
        {"E": 3},
        {"E": 2, "L": 2, "D": 2},
        {"E": 3, "layout": "shared", "L": 2},
        {"E": 3, "layout": "shared", "D": 2, "B": 1},
        {"lengths": "any", "B": 7},
        {"lengths": "any", "B": 5, "D": 2, "L": 2, "E": 2},
        {"lengths": "any", "B": 6, "reverse": True},
        {"lengths": "zero"},
        {"lengths": "zero", "reverse": True, "state": False},
        {"lengths": "any", "B": 1, "H": 16},
        {"reset": 0.4, "B": 5},
        {"reset": 0.4, "B": 5, "to_initial": True},
        {"reset": 0.4, "reverse": True, "B": 4},
        {"reset": 0.4, "reverse": True, "B": 4, "to_initial": True},
        {"reset": 0.3, "L": 2, "D": 2, "to_initial": True, "B": 6},
        {"reset": 0.4, "B": 1, "H": 17},
        {"reset": 0.4, "lengths": "any", "B": 8, "D": 2, "E": 2, "to_initial": True},
        {"reset": 0.4, "lengths": "any", "B": 8, "state": False, "to_initial": True},
        {"reset": 1.0, "B": 2},
        {"recompute": True},
        {"recompute": True, "L": 2, "D": 2, "lengths": "any", "reset": 0.3, "B": 5, "T": 19},
        {"recompute": True, "B": 1, "H": 16, "T": 40},
        {"recompute": True, "clip_cell": 0.5, "T": 33, "E": 2},
        {"clip_cell": 0.4},
        {"clip_cell": 0.3, "B": 1, "H": 16, "reverse": True},
        {"clip_grad": 0.3},
        {"clip_grad": 0.2, "clip_cell": 0.5, "D": 2, "L": 2, "lengths": "any", "reset": 0.2, "to_initial": True},
        {"clip_grad": 0.3, "B": 1, "H": 17},
        {"dropout": 0.5, "L": 2, "B": 5},
        {"dropout": 0.3, "L": 3, "D": 2, "lengths": "any", "E": 2, "H": 5},
        {"dropout": 1.0, "L": 2},
        {"dropout": 0.4, "L": 2, "recompute": True, "reset": 0.3},
        {"layout": "strided"},
        {"layout": "strided", "B": 1, "H": 16},
        {"layout": "strided", "B": 9, "H": 16, "D": 2, "L": 2},
        {"layout": "negative", "lengths": "any", "reset": 0.3},
        {"layout": "negative", "B": 8, "H": 17},
        {"layout": "column", "B": 7, "H": 16},
        {"layout": "column", "B": 1, "H": 33, "L": 2},
        {"layout": "batch", "B": 6, "H": 16, "D": 2},
        {"layout": "broadcast", "E": 2, "B": 4},
        {"missing": ("y",)},
        {"missing": ("hn", "cn", "cells")},
        {"missing": ("y", "hn", "cells"), "L": 2},
        {"missing": ("y", "hn", "cn"), "L": 2, "D": 2},
        {"missing": ("y", "hn", "cn", "cells")},
        {"T": 0, "lengths": "zero", "D": 2},
        {"T": 0, "reset": 0.5},
        {"B": 0, "lengths": "zero", "reset": 0.5, "L": 2},
        {"T": 1, "reset": 1.0, "to_initial": True},
        {"T": 1, "D": 2, "reset": 1.0, "lengths": "any"},
    ]
]

# These take all ways through the engines; the other cells differ from them in their formulas.
PATHS = ("rnn_tanh", "rnn_relu", "lstm", "gru", "gru_reset_before")
CASES = [
    replace(case, cell=cell)
    for cell in ALL_CELLS
    for case in (SIZES if cell in PATHS else SIZES[::4]) + OPTIONS
    if CELLS[cell].cell_state or not case.clip_cell or case.clip_grad
]
