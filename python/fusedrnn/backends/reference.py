# SPDX-License-Identifier: Apache-2.0
"""The judge: NumPy, float64 whatever comes in, every feature of csrc/README.md, as plain as it gets.

It shares no code with the kernels, only the formulas of fusedrnn.cells with the numba backend. It needs no tape:
backward runs forward again. Derivatives of forward and backward come from complex numbers: evaluated at p + i s v
with a tiny s, the imaginary part is s times the tangent, exact to float64's rounding because nothing is subtracted.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import lattice
from ..cells import CELLS, dropout
from ..cells.cell import Cell
from ..cells.number import clamp
from . import Arguments, Problem, Results, holds_tokens
from .variants import Walk

_QUIET = np.errstate(all="ignore")  # NaN and inf go their way, as in the kernels
_STEP = 1e-40  # its square vanishes beside 1, and products with tiny tangents do not underflow


def tape_elements(problem: Problem) -> int:
    """Nothing is kept."""
    return 0


@_QUIET
def forward(problem: Problem, p: Arguments, out: Results, tape: Any) -> None:
    """Fill out's arrays."""
    store_results(out, _forward(problem, _wide_arguments(problem, p))[0])


@_QUIET
def backward(problem: Problem, p: Arguments, tape: Any, g: Results, dp: Arguments) -> None:
    """Fill dp's arrays with the gradients."""
    store_arguments(dp, _backward(problem, _wide_arguments(problem, p), _wide_results(g)))


@_QUIET
def jvp(problem: Problem, p: Arguments, v: Arguments, tout: Results) -> None:
    """Fill tout's arrays with the tangents of the results."""
    store_results(tout, _forward(problem, _wide_arguments(problem, p, v))[0], tangent=True)


@_QUIET
def hvp(
    problem: Problem, p: Arguments, v: Arguments, g: Results, t: Results, tdp: Arguments, tout: Results | None = None
) -> None:
    """Fill tdp's arrays with the tangents of the gradients, and tout's with those of the results."""
    if tout is not None:
        jvp(problem, p, v, tout)
    wide = _wide_arguments(problem, p, v)
    store_arguments(tdp, _backward(problem, wide, _wide_results(g, t)), tangent=True)


# Numbers in and out.


def _wide(a: Any, tangent: Any, dual: bool) -> Any:
    if a is None and tangent is None:
        return None
    if not dual:
        return np.asarray(a, np.float64)
    value = np.zeros(np.shape(tangent if a is None else a), np.complex128)
    if a is not None:
        value.real = a
    if tangent is not None:
        value.imag = np.asarray(tangent, np.float64) * _STEP
    return value


@dataclass
class _OneHot(Arguments):
    """Arguments whose x is what tokens stand for."""

    tokens: Any = None  # (T,E,B), 0 past a row's length


def _one_hot(problem: Problem, tokens: Any) -> tuple[Any, Any]:
    """What tokens (T,E,B) stand for, (T,E,B,I), and themselves. Past a row's length, where they may be anything: 0."""
    here = _active(problem)[..., 0]
    safe = np.where(here, tokens, 0).astype(np.int64)
    if safe.size and (safe.min() < 0 or safe.max() >= problem.I):
        raise ValueError(f"x has tokens {safe.min()}..{safe.max()}; expected 0 <= token < I = {problem.I}")
    return (safe[..., None] == np.arange(problem.I)) * here[..., None].astype(np.float64), safe


def _wide_arguments(problem: Problem, p: Arguments, v: Arguments | None = None) -> Arguments:
    dual = v is not None
    tangents = v or Arguments()
    x, tokens = _one_hot(problem, p.x) if holds_tokens(p.x) else (p.x, None)
    wide = Arguments if tokens is None else functools.partial(_OneHot, tokens=tokens)
    return wide(
        _wide(x, tangents.x, dual),
        _wide(p.h0, tangents.h0, dual),
        _wide(p.c0, tangents.c0, dual),
        [
            (
                _wide(W, vW, dual),
                _wide(R, vR, dual),
                _wide(bW, vbW, dual),
                _wide(bR, vbR, dual),
            )
            for (W, R, bW, bR), (vW, vR, vbW, vbR) in zip(
                p.params, tangents.params or [(None,) * 4] * len(p.params), strict=True
            )
        ],
        _wide(p.context, tangents.context, dual),
        [
            _wide(W, vW, dual)
            for W, vW in zip(p.context_weights or [], tangents.context_weights or [None] * problem.D, strict=False)
        ],
        [
            tuple(_wide(a, b, dual) for a, b in zip(given, given_v, strict=True))
            for given, given_v in zip(p.extras, tangents.extras or [(None,) * 6] * len(p.extras), strict=True)
        ],
    )


def _wide_results(g: Results, t: Results | None = None) -> Results:
    dual = t is not None
    tangents = t or Results()
    return Results(*(_wide(getattr(g, name), getattr(tangents, name), dual) for name in ("y", "hn", "cn", "cells")))


def _store(to: Any, value: Any, e_axis: int, tangent: bool) -> None:
    if to is None:
        return
    if tangent:
        value = value.imag / _STEP
    if to.shape[e_axis] > 1 and to.strides[e_axis] == 0:
        value = value.sum(axis=e_axis, keepdims=True)
        to = to[(slice(None),) * e_axis + (slice(1),)]
    to[...] = value


def store_results(to: Results, value: Results, tangent: bool = False) -> None:
    for name, e_axis in (("y", 1), ("hn", 1), ("cn", 1), ("cells", 2)):
        _store(getattr(to, name), getattr(value, name), e_axis, tangent)


def store_arguments(to: Arguments, value: Arguments, tangent: bool = False) -> None:
    for name in ("x", "h0", "c0"):
        _store(getattr(to, name), getattr(value, name), 1, tangent)
    _store(to.context, value.context, 0, tangent)
    for array, array_value in zip(to.context_weights or [], value.context_weights or [], strict=False):
        _store(array, array_value, 0, tangent)
    pairs = [*zip(to.params, value.params, strict=False), *zip(to.extras, value.extras, strict=False)]
    for arrays, values in pairs:
        for array, array_value in zip(arrays, values, strict=True):
            _store(array, array_value, 0, tangent)


# The walk over time.


@dataclass
class _Kept:
    """What one layer in one direction keeps for its backward pass."""

    x: Any  # (T,E,B,I_l), 0 past a row's length
    steps: list[Any]  # per step: kept gates, h_prev, h, c_prev, c, r h' (two products)


def _order(problem: Problem, backwards: bool) -> range:
    return range(problem.T - 1, -1, -1) if backwards else range(problem.T)


def _active(problem: Problem) -> Any:
    """(T,E,B,1): whether a row still runs at step t."""
    if problem.lengths is None:
        return np.ones((problem.T, problem.E, problem.B, 1), bool)
    return (np.arange(problem.T)[:, None, None] < np.asarray(problem.lengths))[..., None]


def _restart(problem: Problem, active: Any, backwards: bool) -> Any:
    """(T,E,B,1): whether a row's state starts anew before its step t, in the order of the walk."""
    restart = np.zeros_like(active)
    if problem.reset is not None:
        boundary = (np.asarray(problem.reset) != 0)[..., None] & active
        if backwards:
            restart[:-1] = boundary[1:]
        else:
            restart = boundary
    return restart


def _blocks(a: Any, gates: int) -> Any:
    """(...,G*H) as G arrays (...,H)."""
    return np.split(a, gates, axis=-1)


def _product(x: Any, W: Any, b: Any) -> Any:
    """x (...,E,B,I), W (E,G*H,I), b (E,G*H) or None: x W^T + b, (...,E,B,G*H)."""
    a = x @ W.swapaxes(-1, -2)
    return a if b is None else a + b[:, None, :]


def _outer(da: Any, x: Any) -> Any:
    """da (T,E,B,G*H), x (T,E,B,I): the gradient of W in x W^T, (E,G*H,I)."""
    T, E, B, GH = da.shape
    left = da.transpose(1, 3, 0, 2).reshape(E, GH, T * B)
    right = x.transpose(1, 0, 2, 3).reshape(E, T * B, x.shape[-1])
    return left @ right


def _walk(problem: Problem, cell: Cell, x: Any, params: Any, extra: Any, h0: Any, c0: Any, backwards: bool) -> Any:
    """One layer, one direction: y (T,E,B,H), cells (T,E,B,H), hn, cn, and what backward needs. extra: the context's
    part of the sums (E,B,G*H), or 0."""
    W, R, bW, bR = params
    active = _active(problem)
    restart = _restart(problem, active, backwards)
    x = np.where(active, x, 0)  # so that padding, NaN included, reaches nothing
    sums = [0.0] * cell.sums
    for block, s in zip(_blocks(_product(x, W, bW) + extra, cell.gates), cell.x_sum, strict=True):
        sums[s] = sums[s] + block
    first_h, first_c = (h0, c0) if problem.reset_to_initial else (0.0, 0.0)
    y = np.zeros((*x.shape[:3], problem.H), x.dtype)
    cells = np.zeros_like(y)
    steps: list[Any] = [None] * problem.T
    h, c = h0, c0
    for t in _order(problem, backwards):
        h_prev = np.where(restart[t], first_h, h)
        c_prev = np.where(restart[t], first_c, c)
        a = [s if isinstance(s, float) else s[t] for s in sums]
        if cell.gate is not None:
            early, late = slice(2 * problem.H), slice(2 * problem.H, None)
            b_early, b_late = (None, None) if bR is None else (bR[:, early], bR[:, late])
            a_r, a_z = _blocks(_product(h_prev, R[:, early], b_early), 2)
            r, z, rh = cell.gate(a[0] + a_r, a[1] + a_z, h_prev)
            n, h_new = cell.forward(a[2] + _product(rh, R[:, late], b_late), z, h_prev)
            kept, c_new = (r, z, n), c_prev
        else:
            rh = None
            if cell.state_product:
                for block, s in zip(_blocks(_product(h_prev, R, bR), cell.gates), cell.h_sum, strict=True):
                    a[s] = a[s] + block
            kept, h_new, c_new = cell.forward(a, h_prev, c_prev, problem.clip_cell)
        steps[t] = (kept, h_prev, h_new, c_prev, c_new, rh)
        h = np.where(active[t], h_new, h)
        c = np.where(active[t], c_new, c)
        y[t] = np.where(active[t], h, 0)
        cells[t] = np.where(active[t], c if cell.cell_state else h, 0)
    return y, cells, h, c, _Kept(x, steps)


def _walk_back(
    problem: Problem, cell: Cell, kept: _Kept, params: Any, dy: Any, dcells: Any, dhn: Any, dcn: Any, backwards: bool
) -> Any:
    """The other way: dx (T,E,B,I_l), dh0, dc0, the gradients of W, R, bW, bR, and of `extra`."""
    W, R, _, _ = params
    H = problem.H
    active = _active(problem)
    restart = _restart(problem, active, backwards)
    kind = dy.dtype
    rows = (problem.T, problem.E, problem.B)
    da_x = np.zeros((*rows, cell.gates * H), kind)
    da_h = np.zeros_like(da_x)
    h_prevs = np.zeros((*rows, H), kind)
    rhs = np.zeros_like(h_prevs)
    dh0, dc0 = np.zeros_like(dhn), np.zeros_like(dcn)
    dh_next, dc_next = dhn, dcn
    for t in reversed(_order(problem, backwards)):
        gates, h_prev, h, c_prev, c, rh = kept.steps[t]
        dh, dc = dh_next + dy[t], dc_next
        if cell.cell_state:
            dc = dc + dcells[t]
        else:
            dh = dh + dcells[t]
        dh, dc = clamp(dh, problem.clip_grad), clamp(dc, problem.clip_grad)
        if cell.backward_gate is not None:
            r, z, n = gates
            da_z, da_n, dh_prev = cell.backward(z, n, h_prev, dh)
            da_r, past = cell.backward_gate(r, h_prev, da_n @ R[:, 2 * H :])
            dh_prev = dh_prev + past + np.concatenate([da_r, da_z], -1) @ R[:, : 2 * H]
            da, dc_prev = (da_r, da_z, da_n), dc
            rhs[t] = np.where(active[t], rh, 0)
        else:
            da, dh_prev, dc_prev = cell.backward(gates, h_prev, h, c_prev, c, problem.clip_cell, dh, dc)
            if cell.state_product:
                dh_prev = dh_prev + np.concatenate([da[s] for s in cell.h_sum], -1) @ R
        da_x[t] = np.where(active[t], np.concatenate([da[s] for s in cell.x_sum], -1), 0)
        if cell.state_product:
            da_h[t] = np.where(active[t], np.concatenate([da[s] for s in cell.h_sum], -1), 0)
        h_prevs[t] = np.where(active[t], h_prev, 0)
        if problem.reset_to_initial:
            dh0 = dh0 + np.where(restart[t], dh_prev, 0)
            dc0 = dc0 + np.where(restart[t], dc_prev, 0)
        dh_next = np.where(active[t], np.where(restart[t], 0, dh_prev), dh_next)
        dc_next = np.where(active[t], np.where(restart[t], 0, dc_prev), dc_next)
    dR = _outer(da_h, h_prevs)
    if cell.two_products:
        dR[:, 2 * H :] = _outer(da_h[..., 2 * H :], rhs)
    state_gradients = (dR, da_h.sum((0, 2))) if cell.state_product else (None, None)
    gradients = (_outer(da_x, kept.x), state_gradients[0], da_x.sum((0, 2)), state_gradients[1])
    return da_x @ W, dh0 + dh_next, dc0 + dc_next, gradients, da_x.sum(0)


# The stack of layers and directions.


def _backwards(problem: Problem, d: int) -> bool:
    return problem.reverse or d == 1


def _times(problem: Problem, d: int) -> Any:
    """What a walk must know of time: active, restart, order."""
    active, backwards = _active(problem), _backwards(problem, d)
    return active, _restart(problem, active, backwards), _order(problem, backwards)


def _state(problem: Problem, given: Any, like: Any, units: int = 0) -> Any:
    shape = (problem.L * problem.D, problem.E, problem.B, units or problem.H)
    return np.zeros(shape, like.dtype) if given is None else given


def _context_product(p: Arguments, d: int) -> Any:
    """What the context adds to layer 0's sums at every step: (E,B,G*H), or 0."""
    return 0.0 if p.context is None else p.context @ p.context_weights[d].swapaxes(-1, -2)


def _columns(W: Any, tokens: Any) -> Any:
    """The columns of W (E,G*H,I) that tokens (T,E,B) name: (T,E,B,G*H). NaN in others reaches nothing."""
    return W.swapaxes(-1, -2)[np.arange(len(W))[:, None], tokens]


def _forward(problem: Problem, p: Arguments) -> tuple[Results, list[_Kept]]:
    cell = CELLS[problem.cell]
    h0, c0 = _state(problem, p.h0, p.x, problem.outputs), _state(problem, p.c0, p.x)
    hn, cn = np.empty_like(h0), np.empty_like(c0)
    kept: list[_Kept] = []
    all_cells = []
    y = p.x
    for layer in range(problem.L):
        if layer > 0 and problem.dropout > 0:
            y = y * dropout.scale(y.shape, problem.dropout, problem.seed, layer - 1)
        ys, cells = [], []
        for d in range(problem.D):
            n = layer * problem.D + d
            extra = _context_product(p, d) if layer == 0 else 0.0
            W, *others = p.params[n]
            if layer == 0 and isinstance(p, _OneHot):
                W, extra = np.zeros_like(W), extra + _columns(W, p.tokens)
            if problem.variant:
                walk = Walk(problem, n, (W, *others), p.extras[n])
                walked = walk.forward(y, extra, h0[n], c0[n], *_times(problem, d))
            else:
                walked = _walk(problem, cell, y, (W, *others), extra, h0[n], c0[n], _backwards(problem, d))
            ys.append(walked[0])
            cells.append(walked[1])
            hn[n], cn[n] = walked[2], walked[3]
            kept.append(walked[4])
        y = np.concatenate(ys, -1)
        all_cells.append(np.concatenate(cells, -1))
    return Results(y, hn, cn, np.stack(all_cells)), kept


def _backward(problem: Problem, p: Arguments, g: Results) -> Arguments:
    cell = CELLS[problem.cell]
    kept = _forward(problem, p)[1]
    dhn, dcn = _state(problem, g.hn, p.x, problem.outputs), _state(problem, g.cn, p.x)
    dh0, dc0 = np.empty_like(dhn), np.empty_like(dcn)
    rows, Q = (problem.T, problem.E, problem.B), problem.outputs
    dy = np.zeros((*rows, problem.D * Q), p.x.dtype) if g.y is None else g.y
    params: list[Any] = [None] * len(p.params)
    extras: list[Any] = [None] * len(p.extras)
    for layer in reversed(range(problem.L)):
        dcells = np.zeros((*rows, problem.D * problem.H), p.x.dtype) if g.cells is None else g.cells[layer]
        dx: Any = 0.0
        dcontext: Any = 0.0
        dweights: list[Any] = []
        for d in range(problem.D):
            n = layer * problem.D + d
            dys = dy[..., d * Q : (d + 1) * Q], dcells[..., d * problem.H : (d + 1) * problem.H]
            if problem.variant:
                walk = Walk(problem, n, p.params[n], p.extras[n])
                walked = walk.backward(kept[n], *dys, dhn[n], dcn[n], *_times(problem, d))
                extras[n] = walked[5]
            else:
                walked = _walk_back(problem, cell, kept[n], p.params[n], *dys, dhn[n], dcn[n], _backwards(problem, d))
            dx = dx + walked[0]
            dh0[n], dc0[n], params[n] = walked[1], walked[2], walked[3]
            if layer == 0 and p.context is not None:
                dcontext = dcontext + walked[4] @ p.context_weights[d]
                dweights.append(walked[4].swapaxes(-1, -2) @ p.context)
        dy = dx
        if layer > 0 and problem.dropout > 0:
            dy = dy * dropout.scale(dy.shape, problem.dropout, problem.seed, layer - 1)
    return Arguments(dy, dh0, dc0, params, dcontext, dweights, extras)


# Sums over paths.


def ctc(
    log_probs: Any, labels: Any, first: Any, label_counts: Any, lengths: Any, blank: int, zero_infinity: bool,
    loss: Any, dloss: Any = None, dlog_probs: Any = None,
) -> None:  # fmt: skip
    """As _core.ctc, in float64 whatever the dtype."""
    with np.errstate(invalid="ignore"):
        lattice.ctc(
            lattice.ctc_row, log_probs, labels, first, label_counts, lengths, blank, zero_infinity, loss, dloss,
            dlog_probs,
        )  # fmt: skip


def ctc_align(
    log_probs: Any, labels: Any, first: Any, label_counts: Any, lengths: Any, blank: int,
    states: Any, log_probability: Any,
) -> None:  # fmt: skip
    """As _core.ctc_align."""
    lattice.ctc_align(
        lattice.align_row, log_probs, labels, first, label_counts, lengths, blank, states, log_probability
    )  # fmt: skip


ctc_beam = lattice.ctc_beam


def hmm(
    scores: Any, initial: Any, transitions: Any, lengths: Any, log_likelihood: Any, weights: Any = None,
    states: Any = None, dinitial: Any = None, dtransitions: Any = None,
) -> None:  # fmt: skip
    """As _core.hmm, in float64 whatever the dtype."""
    with np.errstate(invalid="ignore"):
        lattice.hmm(
            lattice.hmm_row, scores, initial, transitions, lengths, log_likelihood, weights, states, dinitial,
            dtransitions,
        )  # fmt: skip


def viterbi(scores: Any, initial: Any, transitions: Any, lengths: Any, paths: Any, log_probability: Any) -> None:
    """As _core.viterbi."""
    lattice.viterbi(lattice.viterbi_row, scores, initial, transitions, lengths, paths, log_probability)
