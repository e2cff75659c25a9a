# SPDX-License-Identifier: Apache-2.0
"""The stack of layers and directions, its tape, and the operations of a backend."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np

from ...cells import CELLS, dropout
from .. import Arguments, Problem, Results, dtype_of, holds_tokens, reference
from .walk import Run, Walk
from .walk_back import Backward

_log = logging.getLogger("fusedrnn")


def _tape_parts(problem: Problem) -> list[tuple[int, ...]]:
    """The shapes of kept, h and c of one layer in one direction."""
    cell = CELLS[problem.cell]
    N, H = problem.E * problem.B, problem.H
    return [
        (problem.T, N, 0 if problem.recompute else cell.kept, H),
        (problem.T, N, H),
        (problem.T if cell.cell_state else 0, N, H),
    ]


def tape_elements(problem: Problem) -> int:
    """kept + h + c of every step, layer and direction; h + c with recompute."""
    if problem.variant:
        return reference.tape_elements(problem)
    return problem.L * problem.D * sum(math.prod(shape) for shape in _tape_parts(problem))


def _cut(problem: Problem, tape: Any) -> list[tuple[Any, Any, Any]]:
    """The tape as (kept or None, h, c) per layer and direction; c is h for cells without."""
    cut, at = [], 0
    for _ in range(problem.L * problem.D):
        parts = []
        for shape in _tape_parts(problem):
            size = math.prod(shape)
            parts.append(tape[at : at + size].reshape(shape))
            at += size
        kept, hs, cs = parts
        cut.append((None if problem.recompute else kept, hs, cs if CELLS[problem.cell].cell_state else hs))
    return cut


def _rows(problem: Problem, state: Any, n: int, dtype: Any) -> Any:
    """Row n of a state as (N,H), contiguous; zeros where not given."""
    shape = (problem.E * problem.B, problem.H)
    return np.zeros(shape, dtype) if state is None else np.ascontiguousarray(state[n]).reshape(shape)


def _output(problem: Problem, kept: list[Any], masks: Any, layer: int, part: int) -> Any:
    """h (part 1) or c (part 2) of a layer, both directions side by side: (T,E,B,D*H), 0 past a row's length."""
    ends = [kept[layer * problem.D + d][part] for d in range(problem.D)]
    result = ends[0] if problem.D == 1 else np.concatenate(ends, -1)
    if problem.lengths is not None:
        result = np.where(masks[..., None], result, result.dtype.type(0))
    return result.reshape(problem.T, problem.E, problem.B, problem.D * problem.H)


def _safe(problem: Problem, tokens: Any) -> Any:
    """Tokens that can be indices: checked, and 0 past a row's length, where they may be anything."""
    if problem.lengths is not None:
        tokens = np.where(np.arange(problem.T)[:, None, None] < problem.lengths, tokens, tokens.dtype.type(0))
    if tokens.size and (tokens.min() < 0 or tokens.max() >= problem.I):
        raise ValueError(f"x has tokens {tokens.min()}..{tokens.max()}; expected 0 <= token < I = {problem.I}")
    return tokens.astype(np.intp)


def _context_product(problem: Problem, p: Arguments, d: int, dtype: Any) -> Any:
    """What the context adds to layer 0's products with x at every step: (N,G*H), or None."""
    if p.context is None:
        return None
    return np.ascontiguousarray(p.context @ p.context_weights[d].swapaxes(1, 2), dtype).reshape(
        problem.E * problem.B, -1
    )


def _walk(problem: Problem, p: Arguments, n: int, x: Any, kept: tuple[Any, Any, Any]) -> tuple[Walk, Run]:
    """Layer and direction n, and what goes through it."""
    layer, d = divmod(n, problem.D)
    dtype = dtype_of(problem, p)
    walk = Walk(problem, CELLS[problem.cell], p.params[n], problem.reverse or d == 1, dtype)
    if layer == 0:
        walk.extra = _context_product(problem, p, d, dtype)
    return walk, Run(x, _rows(problem, p.h0, n, dtype), _rows(problem, p.c0, n, dtype), *kept)


def _input(problem: Problem, p: Arguments, kept: list[Any], masks: Any, layer: int) -> Any:
    """What a layer takes in, and the dropout factors in it (None: none)."""
    if layer == 0:
        return _safe(problem, p.x) if holds_tokens(p.x) else p.x, None
    x = _output(problem, kept, masks, layer - 1, 1)
    if problem.dropout == 0:
        return x, None
    factors = dropout.scale(x.shape, problem.dropout, problem.seed, layer - 1).astype(x.dtype)
    return x * factors, factors


@np.errstate(all="ignore")  # NaN and inf go their way, as in the kernels
def forward(problem: Problem, p: Arguments, out: Results, tape: Any) -> None:
    """Fill out's arrays, and the tape."""
    if problem.variant:
        _log.info("numba: this variant's forward runs on the reference")
        return reference.forward(problem, p, out, tape)
    if problem.B == 0:
        return reference.forward(problem, p, out, tape)
    cell, dtype = CELLS[problem.cell], dtype_of(problem, p)
    shape = (problem.T, problem.E * problem.B, problem.H)
    kept: list[Any] = [] if tape is None else _cut(problem, tape)
    masks: Any = None
    for layer in range(problem.L):
        x, _ = _input(problem, p, kept, masks, layer)
        for d in range(problem.D):
            n = layer * problem.D + d
            if tape is None:
                hs = np.empty(shape, dtype)
                kept.append((None, hs, np.empty(shape, dtype) if cell.cell_state else hs))
            walk, run = _walk(problem, p, n, x, kept[n])
            masks = walk.active
            walk.run(run)
            last = 0 if walk.backwards else problem.T - 1
            for final, states, initial in ((out.hn, run.h, run.h0), (out.cn, run.c, run.c0)):
                if final is not None:
                    final[n] = (states[last] if problem.T else initial).reshape(final[n].shape)
        if out.cells is not None:
            out.cells[layer] = _output(problem, kept, masks, layer, 2)
        if tape is None and layer > 0:
            kept[(layer - 1) * problem.D : layer * problem.D] = [None] * problem.D  # its memory is free again
    if out.y is not None:
        out.y[...] = _output(problem, kept, masks, problem.L - 1, 1)


@np.errstate(all="ignore")  # NaN and inf go their way, as in the kernels
def backward(problem: Problem, p: Arguments, tape: Any, g: Results, dp: Arguments) -> None:
    """Fill dp's arrays with the gradients."""
    if problem.variant:
        _log.info("numba: this variant's backward runs on the reference")
        return reference.backward(problem, p, tape, g, dp)
    if problem.B == 0:
        return reference.backward(problem, p, tape, g, dp)
    dtype = dtype_of(problem, p)
    kept = _cut(problem, tape)
    E, B, H, D = problem.E, problem.B, problem.H, problem.D
    masks = None
    if problem.lengths is not None:
        masks = (np.arange(problem.T)[:, None, None] < problem.lengths).reshape(problem.T, E * B)
    states = (problem.L * D, E, B, H)
    result = Arguments(None, np.empty(states, dtype), np.empty(states, dtype), [(None,) * 4] * (problem.L * D))
    dy = g.y
    for layer in reversed(range(problem.L)):
        x, factors = _input(problem, p, kept, masks, layer)
        dx = np.zeros(0 if holds_tokens(x) else x.shape, dtype)
        for d in range(D):
            n = layer * D + d
            part = slice(d * H, (d + 1) * H)
            dy_part = None if dy is None else dy[..., part]
            dcells = None if g.cells is None else g.cells[layer][..., part]
            walk, run = _walk(problem, p, n, x, kept[n])
            back = Backward(walk, run, dy_part, dcells)
            back.go(_rows(problem, g.hn, n, dtype), _rows(problem, g.cn, n, dtype), dx)
            result.params[n] = back.params()
            if walk.extra is not None:
                dextra = back.dextra.reshape(E, B, -1)
                result.context = dextra @ p.context_weights[d] + (0 if d == 0 else result.context)
                result.context_weights = [*(result.context_weights or []), dextra.swapaxes(1, 2) @ p.context]
            result.h0[n], result.c0[n] = back.dh0.reshape(E, B, H), back.dc0.reshape(E, B, H)
        dy = dx if factors is None else dx * factors
    result.x = dy
    reference.store_arguments(dp, result)


def jvp(problem: Problem, p: Arguments, v: Arguments, tout: Results) -> None:
    """Fill tout's arrays with the tangents of the results."""
    _log.info("numba: jvp runs on the reference")
    reference.jvp(problem, p, v, tout)


def hvp(
    problem: Problem, p: Arguments, v: Arguments, g: Results, t: Results, tdp: Arguments, tout: Results | None = None
) -> None:
    """Fill tdp's arrays with the tangents of the gradients."""
    _log.info("numba: hvp runs on the reference")
    reference.hvp(problem, p, v, g, t, tdp, tout)
