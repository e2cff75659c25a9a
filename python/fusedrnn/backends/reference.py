# SPDX-License-Identifier: Apache-2.0
"""The judge: NumPy, float64 whatever comes in, every feature of csrc/README.md, as plain as it gets.

It shares no code with the kernels, only the formulas of fusedrnn.cells with the numba backend. It needs no tape:
backward runs forward again. Derivatives of forward and backward come from complex numbers: evaluated at p + i s v
with a tiny s, the imaginary part is s times the tangent, exact to float64's rounding because nothing is subtracted.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .. import lattice
from ..cells import CELLS, dropout
from ..cells.functions import Functions
from ..cells.number import clamp
from . import Arguments, Problem, Results, holds_tokens
from .variants import Options, mixed, norm, norm_back, parted, row

_QUIET = np.errstate(all="ignore")  # NaN and inf go their way, as in the kernels
C_STEPS = 8  # no c is kept: any number does
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


def _product(x: Any, W: Any, b: Any, gain: Any = None, extra: Any = 0.0) -> tuple[Any, Any]:
    """x (...,E,B,I), W (E,G*H,I), b (E,G*H) or None: norm(x W^T + extra) + b, (...,E,B,G*H), and what norm's way back
    needs."""
    a, normed = x @ W.swapaxes(-1, -2) + extra, None
    if gain is not None:
        normed = norm(a)
        a = normed[0] * row(gain)
    return (a if b is None else a + row(b)), normed


def _feed(sums: list[Any], product: Any, places: tuple[int, ...], H: int) -> list[Any]:
    """The sums with the blocks of a product, (...,n*H), added where they belong."""
    for gate, s in enumerate(places[: product.shape[-1] // H]):
        sums[s] = sums[s] + product[..., gate * H : (gate + 1) * H]
    return sums


def _outer(da: Any, x: Any) -> Any:
    """da (T,E,B,G*H), x (T,E,B,I): the gradient of W in x W^T, (E,G*H,I)."""
    T, E, B, GH = da.shape
    left = da.transpose(1, 3, 0, 2).reshape(E, GH, T * B)
    right = x.transpose(1, 0, 2, 3).reshape(E, T * B, x.shape[-1])
    return left @ right


class _Step(NamedTuple):
    """What a step keeps for its backward pass. A part of it is of no use to some cells."""

    functions: tuple[Functions, ...]
    seen: Any  # h' as R sees it
    carried: Any  # h' as the cell's formula carries it over
    c_prev: Any
    kept: Any  # the gates
    m: Any  # the cell's output before projection and zoneout
    c: Any  # ... and its state
    rh: Any  # r h', of two products
    normed: Any


class _Walk:
    """One layer in one direction (n = layer * D + direction): forward, then backward."""

    def __init__(self, problem: Problem, n: int, params: Any, extras: Any) -> None:
        self.problem, self.cell = problem, CELLS[problem.cell]
        self.W, self.R, self.bW, self.bR = params
        self.options = Options(problem, n, extras)
        backwards = problem.reverse or n % problem.D == 1
        self.order = range(problem.T)[:: -1 if backwards else 1]
        self.active = _active(problem)
        self.restart = _restart(problem, self.active, backwards)
        self.early = slice(2 * problem.H if self.cell.two_products else None)  # the gates of the first product
        self.late = slice(2 * problem.H, None)  # ... and of the second, if there are two

    def forward(self, x: Any, extra: Any, h0: Any, c0: Any) -> Any:
        """y (T,E,B,P or H), cells (T,E,B,H), hn, cn. extra: what is added to x W^T: (E,B,G*H), with T or not, or 0."""
        problem, options, active, restart = self.problem, self.options, self.active, self.restart
        self.x = np.where(active, x, 0)  # so that padding, NaN included, reaches nothing
        ax, self.normed = _product(self.x, self.W, self.bW, options.gain_ih, extra)
        sums = _feed([0.0] * self.cell.sums, ax, self.cell.x_sum, problem.H)
        first_h, first_c = (h0, c0) if problem.reset_to_initial else (0.0, 0.0)
        y = np.zeros((*x.shape[:3], problem.outputs), x.dtype)
        cells = np.zeros((*x.shape[:3], problem.H), x.dtype)
        self.steps: list[Any] = [None] * problem.T
        h, c = h0, c0
        for t in self.order:
            h_prev, c_prev = np.where(restart[t], first_h, h), np.where(restart[t], first_c, c)
            step = self.steps[t] = self.step([0.0 if isinstance(a, float) else a[t] for a in sums], h_prev, c_prev)
            projected = step.m if options.hr is None else step.m @ options.hr.swapaxes(-1, -2)
            h = np.where(active[t], mixed(options.keep_h[t], h_prev, projected), h)
            c = np.where(active[t], mixed(options.keep_c[t], c_prev, step.c), c)
            y[t] = np.where(active[t], h, 0)
            cells[t] = np.where(active[t], c if options.has_c else h, 0)
        return y, cells, h, c

    def step(self, a: list[Any], h_prev: Any, c_prev: Any) -> _Step:
        """a: the sums so far, without the products with h'."""
        cell, options, early, late = self.cell, self.options, self.early, self.late
        functions = options.functions()
        seen, carried = h_prev * options.mask, c_prev if options.carries_m else h_prev
        rh = normed = None
        if cell.state_product:
            bR, b_late = (None, None) if self.bR is None else (self.bR[:, early], self.bR[:, late])
            ah, normed = _product(seen, self.R[:, early], bR, options.gain_hh)
            _feed(a, ah, cell.h_sum, self.problem.H)
        if cell.gate is not None:
            r, z, rh = cell.gate(a[0], a[1], seen, *functions)
            n, m = cell.forward(a[2] + _product(rh, self.R[:, late], b_late)[0], z, carried, *functions)
            kept, c = (r, z, n), c_prev
        else:
            kept, m, c = cell.forward(a, carried, c_prev, self.problem.clip_cell, *functions)
        return _Step(functions, seen, carried, c_prev, kept, m, m if options.carries_m else c, rh, normed)

    def backward(self, dy: Any, dcells: Any, dhn: Any, dcn: Any) -> Any:
        """dx (T,E,B,I_l), dh0, dc0, the gradients of W, R, bW, bR, of `extra` (E,B,G*H) and of the extras."""
        problem, options, active, restart = self.problem, self.options, self.active, self.restart
        kind, clip = dhn.dtype, problem.clip_grad
        options.begin_back(kind)
        if self.cell.state_product:
            self.dR, self.dbR = np.zeros(self.R.shape, kind), np.zeros(self.R.shape[:2], kind)
        da_x = np.zeros((*self.x.shape[:3], self.W.shape[1]), kind)
        dh0, dc0 = np.zeros_like(dhn), np.zeros_like(dcn)
        dh_next, dc_next = dhn, dcn
        for t in reversed(self.order):
            dh = dh_next + dy[t] + (0 if options.has_c else dcells[t])
            dc = dc_next + (dcells[t] if options.has_c else 0)
            options.live = active[t]
            da, dh_prev, dc_prev = self.back(t, clamp(dh, clip), clamp(dc, clip))
            da_x[t] = np.where(active[t], da, 0)
            if problem.reset_to_initial:
                dh0, dc0 = dh0 + np.where(restart[t], dh_prev, 0), dc0 + np.where(restart[t], dc_prev, 0)
            dh_next = np.where(active[t], np.where(restart[t], 0, dh_prev), dh_next)
            dc_next = np.where(active[t], np.where(restart[t], 0, dc_prev), dc_next)
        dbW = da_x.sum((0, 2))
        if self.normed:
            options.dgain_ih += (da_x * self.normed[0]).sum((0, 2))
            da_x = norm_back(da_x * row(options.gain_ih), *self.normed)
        of_state = (self.dR, self.dbR) if self.cell.state_product else (None, None)
        params = (_outer(da_x, self.x), of_state[0], dbW, of_state[1])
        return da_x @ self.W, dh0 + dh_next, dc0 + dc_next, params, da_x.sum(0), options.gradients

    def back(self, t: int, dh: Any, dc: Any) -> Any:
        """One step: the gradients of ax, h' and c'. Adds to those of R, bR and the extras."""
        cell, options, step = self.cell, self.options, self.steps[t]
        past_h, dm = parted(options.keep_h[t], dh)
        past_c, dc = parted(options.keep_c[t], dc)
        if options.hr is not None:
            options.add(options.dhr, dm, step.m)
            dm = dm @ options.hr
        if options.carries_m:
            dm, dc = dm + dc, 0.0
        dseen: Any = 0.0
        if cell.backward_gate is not None:
            r, z, n = step.kept
            da_z, da_n, dcarried = cell.backward(z, n, step.carried, dm, *step.functions)
            da_r, dseen = cell.backward_gate(r, step.seen, da_n @ self.R[:, self.late], *step.functions)
            da, dc_prev = (da_r, da_z, da_n), dc
        else:
            given = (step.kept, step.carried, step.m, step.c_prev, step.c, self.problem.clip_cell, dm, dc)
            da, dcarried, dc_prev = cell.backward(*given, *step.functions)
        if cell.state_product:
            dseen = dseen + self.product_back(np.concatenate([da[s] for s in cell.h_sum], -1), step)
        dh_prev = dseen * options.mask
        if options.carries_m:
            dc_prev = dc_prev + dcarried
        else:
            dh_prev = dh_prev + dcarried
        return np.concatenate([da[s] for s in cell.x_sum], -1), dh_prev + past_h, dc_prev + past_c

    def product_back(self, da: Any, step: _Step) -> Any:
        """The gradient of h' as R sees it, from that of the sums. Adds to those of R, bR and the gain."""
        options, early, late = self.options, self.early, self.late
        options.add(self.dbR, da)
        if step.normed is not None:
            options.add(options.dgain_hh, da * step.normed[0])
            da = norm_back(da * row(options.gain_hh), *step.normed)
        options.add(self.dR[:, early], da[..., early], step.seen)
        if self.cell.two_products:
            options.add(self.dR[:, late], da[..., late], step.rh)
        return da[..., early] @ self.R[:, early]


# The stack of layers and directions.


def _state(problem: Problem, given: Any, like: Any, units: int = 0) -> Any:
    shape = (problem.L * problem.D, problem.E, problem.B, units or problem.H)
    return np.zeros(shape, like.dtype) if given is None else given


def _context_product(p: Arguments, d: int) -> Any:
    """What the context adds to layer 0's sums at every step: (E,B,G*H), or 0."""
    return 0.0 if p.context is None else p.context @ p.context_weights[d].swapaxes(-1, -2)


def _columns(W: Any, tokens: Any) -> Any:
    """The columns of W (E,G*H,I) that tokens (T,E,B) name: (T,E,B,G*H). NaN in others reaches nothing."""
    return W.swapaxes(-1, -2)[np.arange(len(W))[:, None], tokens]


def _forward(problem: Problem, p: Arguments) -> tuple[Results, list[_Walk]]:
    h0, c0 = _state(problem, p.h0, p.x, problem.outputs), _state(problem, p.c0, p.x)
    hn, cn = np.empty_like(h0), np.empty_like(c0)
    walks: list[_Walk] = []
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
            walks.append(_Walk(problem, n, (W, *others), p.extras[n] if problem.variant else (None,) * 6))
            y_d, cells_d, hn[n], cn[n] = walks[n].forward(y, extra, h0[n], c0[n])
            ys.append(y_d)
            cells.append(cells_d)
        y = np.concatenate(ys, -1)
        all_cells.append(np.concatenate(cells, -1))
    return Results(y, hn, cn, np.stack(all_cells)), walks


def _backward(problem: Problem, p: Arguments, g: Results) -> Arguments:
    walks = _forward(problem, p)[1]
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
            dx_d, dh0[n], dc0[n], params[n], dextra, dextras = walks[n].backward(*dys, dhn[n], dcn[n])
            dx = dx + dx_d
            if problem.variant:
                extras[n] = dextras
            if layer == 0 and p.context is not None:
                dcontext = dcontext + dextra @ p.context_weights[d]
                dweights.append(dextra.swapaxes(-1, -2) @ p.context)
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
