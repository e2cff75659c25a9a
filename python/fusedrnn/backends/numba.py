# SPDX-License-Identifier: Apache-2.0
"""The fallback: the spec's functions compiled by Numba, between products by NumPy's BLAS.

Time is walked in Python; at each step one product and one compiled call for all rows. The products with x, and those
for the gradients of weights, are done for many steps at once, in chunks that stay in the cache.

The compiled loops copy 32 units of everything a cell reads into one small block, run the cell on the block and copy the
results out: within one block LLVM knows that nothing overlaps, so it vectorises the cell's formula whatever it is.
Tangents (jvp, hvp) are computed by the reference, in float64.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit, types
from numba.core.imputils import lower_constant
from numba.extending import intrinsic, models, overload, overload_method, register_model, typeof_impl

from .. import cells, lattice
from ..cells import CELLS, cifg, dropout, gru, lstm, mingru, minlstm, number, rnn
from ..cells.cell import Cell
from ..cells.functions import Functions
from . import Arguments, Problem, Results, dtype_of, holds_tokens, reference

_OPTIONS: dict[str, Any] = {"error_model": "numpy", "fastmath": {"contract"}, "forceinline": True}
_BLOCK = 32  # units
_CHUNK = 512  # rows (steps * E * B) of one product over many steps
_log = logging.getLogger("fusedrnn")


# Numbers: sigmoid and tanh that vectorise, to about 2 units in the last place.


@intrinsic
def _bits(context: Any, x: Any) -> Any:
    """The bits of a float, as an integer."""
    to = types.int32 if x == types.float32 else types.int64
    return to(x), lambda target, builder, sig, args: builder.bitcast(args[0], target.get_value_type(to))


@intrinsic
def _from_bits(context: Any, x: Any) -> Any:
    """The float with these bits."""
    to = types.float32 if x == types.int32 else types.float64
    return to(x), lambda target, builder, sig, args: builder.bitcast(args[0], target.get_value_type(to))


def _polynomial(coefficients: list[float], kind: Any) -> Any:
    """Horner's rule, unrolled: the function x -> c0 + c1 x + c2 x^2 + ..."""
    step: Any = None
    for c in reversed(coefficients):
        step = _constant(kind(c)) if step is None else _horner(kind(c), step)
    return step


def _constant(c: Any) -> Any:
    return njit(lambda x: c, **_OPTIONS)


def _horner(c: Any, rest: Any) -> Any:
    return njit(lambda x: c + x * rest(x), **_OPTIONS)


def _functions(kind: Any, whole: Any, mantissa: int, low: float, exp_fit: list[float], tanh_fit: list[float]) -> Any:
    """sigmoid and tanh for one type. exp_fit: (exp(r) - 1 - r) / r^2 for |r| <= ln(2)/2; tanh_fit: (tanh(x)/x - 1) / z
    in z = x^2 for |x| <= 0.625; both interpolate at Chebyshev's points."""
    one, two, near_zero = kind(1), kind(2), kind(0.625)
    least, most = kind(low), kind(-low)
    log2_e = kind(1 / math.log(2))
    ln2_high, ln2_low = kind(355 / 512), kind(-0.00021219444005469058277)  # n * ln2_high is exact
    magic = kind(1.5 * 2.0**mantissa)  # adding it leaves the nearest integer in the lowest bits
    exponent, shift = whole(np.array(1, kind).view(whole)), whole(mantissa)
    exp_tail, tanh_tail = _polynomial(exp_fit, kind), _polynomial(tanh_fit, kind)

    @njit(**_OPTIONS)
    def exp(x: Any) -> Any:
        x = least if x < least else x
        x = most if x > most else x
        shifted = x * log2_e + magic
        n = shifted - magic
        r = x - n * ln2_high
        r = r - n * ln2_low
        power = _from_bits(whole((_bits(shifted) << shift) + exponent))  # 2^n
        return (exp_tail(r) * r * r + (r + one)) * power

    def tanh(x: Any) -> Any:
        near = tanh_tail(x * x) * (x * x) * x + x
        far = one - two / (exp(x + x) + one)
        return near if abs(x) < near_zero else far

    def sigmoid(x: Any) -> Any:
        return one / (one + exp(-x))

    def softplus(x: Any) -> Any:
        return max(x, kind(0)) + kind(math.log1p(exp(-abs(x))))

    return sigmoid, tanh, softplus


_FUNCTIONS = {
    types.float32: _functions(
        np.float32,
        np.int32,
        23,
        -87.0,
        [0.5000000013457727, 0.16666666681614256, 0.04166646500604005, 0.008333310934448869]
        + [0.0013933641031986701, 0.00019890980869750327],
        [-0.33333333172140334, 0.13333303556914372, -0.05395925957700947, 0.02176891864989293]
        + [-0.008343945512944958, 0.0022927448134928757],
    ),
    types.float64: _functions(
        np.float64,
        np.int64,
        52,
        -708.0,
        [0.5, 0.1666666666666667, 0.04166666666666667, 0.008333333333326141, 0.0013888888888883752]
        + [0.00019841269874800493, 2.4801587325533363e-05, 2.7557255425746435e-06, 2.7557273661348637e-07]
        + [2.510520637395701e-08, 2.0914679376583935e-09],
        [-0.3333333333333333, 0.13333333333333042, -0.05396825396789699, 0.021869488519008305, -0.008863235103240856]
        + [0.003592121751154739, -0.0014557754120463136, 0.0005896606577691733, -0.00023759064958691012]
        + [9.257116126213532e-05, -3.1201101391622794e-05, 6.4851634676022395e-06],
    ),
}


@overload(number.sigmoid, jit_options=_OPTIONS)
def _sigmoid(x: Any) -> Any:
    return _FUNCTIONS[x][0]


@overload(number.tanh, jit_options=_OPTIONS)
def _tanh(x: Any) -> Any:
    return _FUNCTIONS[x][1]


@overload(number.softplus, jit_options=_OPTIONS)
def _softplus(x: Any) -> Any:
    return _FUNCTIONS[x][2]


@overload(number.relu, jit_options=_OPTIONS)
def _relu(x: Any) -> Any:
    def relu(x: Any) -> Any:
        return type(x)(0) if x <= 0 else x

    return relu


@overload(number.positive, jit_options=_OPTIONS)
def _positive(d: Any, x: Any) -> Any:
    def positive(d: Any, x: Any) -> Any:
        return type(d)(0) if x <= 0 else d

    return positive


@overload(number.clamp, jit_options=_OPTIONS)
def _clamp(x: Any, limit: Any) -> Any:
    def clamp(x: Any, limit: Any) -> Any:
        bound = limit if limit > 0 else type(limit)(np.inf)
        low = -bound if x < -bound else x
        return bound if low > bound else low

    return clamp


@overload(number.inside, jit_options=_OPTIONS)
def _inside(d: Any, x: Any, limit: Any) -> Any:
    def inside(d: Any, x: Any, limit: Any) -> Any:
        return type(d)(0) if limit > 0 and abs(x) >= limit else d

    return inside


# The functions that a formula takes: an object without data, whose methods are compiled where they are called.


class _FunctionsType(types.Opaque):  # type: ignore[misc]
    """The type of such an object. Every class of functions is a type of its own."""

    def __init__(self, kind: type[Functions]) -> None:
        self.kind = kind
        super().__init__(f"{kind.__module__}.{kind.__qualname__}")


register_model(_FunctionsType)(models.OpaqueModel)


@typeof_impl.register(Functions)
def _type_of_functions(functions: Functions, context: Any) -> Any:
    return _FunctionsType(type(functions))


@lower_constant(_FunctionsType)
def _functions_as_constant(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    return context.get_dummy_value()


def _compile_method(name: str) -> None:
    def method(self: Any, *args: Any) -> Any:
        return getattr(self.kind, name)

    method.__signature__ = inspect.signature(getattr(Functions, name))  # type: ignore[attr-defined]
    overload_method(_FunctionsType, name, jit_options=_OPTIONS)(method)


for _name in [name for name in vars(Functions) if not name.startswith("_")]:
    _compile_method(_name)


# Cells on one block: slot s of the block w is w[s * _BLOCK : (s + 1) * _BLOCK].

_rnn_tanh, _rnn_tanh_back = njit(rnn.RNN_TANH.forward, **_OPTIONS), njit(rnn.RNN_TANH.backward, **_OPTIONS)
_rnn_relu, _rnn_relu_back = njit(rnn.RNN_RELU.forward, **_OPTIONS), njit(rnn.RNN_RELU.backward, **_OPTIONS)
_lstm, _lstm_back = njit(lstm.forward, **_OPTIONS), njit(lstm.backward, **_OPTIONS)
_gru, _gru_back = njit(gru.forward, **_OPTIONS), njit(gru.backward, **_OPTIONS)
_cifg, _cifg_back = njit(cifg.forward, **_OPTIONS), njit(cifg.backward, **_OPTIONS)
_mingru, _mingru_back = njit(mingru.forward, **_OPTIONS), njit(mingru.backward, **_OPTIONS)
_minlstm, _minlstm_back = njit(minlstm.forward, **_OPTIONS), njit(minlstm.backward, **_OPTIONS)
_gate, _gate_back = njit(gru.gate, **_OPTIONS), njit(gru.backward_gate, **_OPTIONS)
_late, _late_back = njit(gru.reset_before_forward, **_OPTIONS), njit(gru.reset_before_backward, **_OPTIONS)

_RNN_TANH, _RNN_RELU, _LSTM, _GRU, _CIFG, _MINGRU, _MINLSTM = range(7)
_KINDS = {"rnn_tanh": _RNN_TANH, "rnn_relu": _RNN_RELU, "lstm": _LSTM, "gru": _GRU}
_KINDS |= {"cifg": _CIFG, "mingru": _MINGRU, "minlstm": _MINLSTM}

# Slots: forward reads sums 0-3, h' 4, c' 5 and writes kept 6-9, h 10, c 11;
# backward reads kept 0-3, h' 4, h 5, c' 6, c 7, dh 8, dc 9 and writes da 10-13, dh' 14, dc' 15.


@njit(**_OPTIONS)
def _forward_block(kind: Any, w: Any, clip: Any) -> Any:
    n = _BLOCK
    if kind == _LSTM:
        for j in range(n):
            kept, h, c = _lstm((w[j], w[n + j], w[2 * n + j], w[3 * n + j]), w[4 * n + j], w[5 * n + j], clip)
            w[6 * n + j], w[7 * n + j], w[8 * n + j], w[9 * n + j] = kept
            w[10 * n + j] = h
            w[11 * n + j] = c
    elif kind == _GRU:
        for j in range(n):
            kept, h, c = _gru((w[j], w[n + j], w[2 * n + j], w[3 * n + j]), w[4 * n + j], w[5 * n + j], clip)
            w[6 * n + j], w[7 * n + j], w[8 * n + j], w[9 * n + j] = kept
            w[10 * n + j] = h
    elif kind == _CIFG:
        for j in range(n):
            kept, h, c = _cifg((w[j], w[n + j], w[2 * n + j]), w[4 * n + j], w[5 * n + j], clip)
            w[6 * n + j], w[7 * n + j], w[8 * n + j] = kept
            w[10 * n + j] = h
            w[11 * n + j] = c
    elif kind == _MINGRU:
        for j in range(n):
            kept, h, c = _mingru((w[j], w[n + j]), w[4 * n + j], w[5 * n + j], clip)
            w[6 * n + j], w[7 * n + j] = kept
            w[10 * n + j] = h
    elif kind == _MINLSTM:
        for j in range(n):
            kept, h, c = _minlstm((w[j], w[n + j], w[2 * n + j]), w[4 * n + j], w[5 * n + j], clip)
            w[6 * n + j], w[7 * n + j], w[8 * n + j], w[9 * n + j] = kept
            w[10 * n + j] = h
    elif kind == _RNN_TANH:
        for j in range(n):
            w[10 * n + j] = _rnn_tanh((w[j],), w[4 * n + j], w[5 * n + j], clip)[1]
    else:
        for j in range(n):
            w[10 * n + j] = _rnn_relu((w[j],), w[4 * n + j], w[5 * n + j], clip)[1]


@njit(**_OPTIONS)
def _backward_block(kind: Any, w: Any, clip: Any) -> Any:
    n = _BLOCK
    if kind == _LSTM:
        for j in range(n):
            kept = (w[j], w[n + j], w[2 * n + j], w[3 * n + j])
            da, dh, dc = _lstm_back(
                kept, w[4 * n + j], w[5 * n + j], w[6 * n + j], w[7 * n + j], clip, w[8 * n + j], w[9 * n + j]
            )
            w[10 * n + j], w[11 * n + j], w[12 * n + j], w[13 * n + j] = da
            w[14 * n + j] = dh
            w[15 * n + j] = dc
    elif kind == _GRU:
        for j in range(n):
            kept = (w[j], w[n + j], w[2 * n + j], w[3 * n + j])
            da, dh, dc = _gru_back(
                kept, w[4 * n + j], w[5 * n + j], w[6 * n + j], w[7 * n + j], clip, w[8 * n + j], w[9 * n + j]
            )
            w[10 * n + j], w[11 * n + j], w[12 * n + j], w[13 * n + j] = da
            w[14 * n + j] = dh
    elif kind == _CIFG:
        for j in range(n):
            three = (w[j], w[n + j], w[2 * n + j])
            da, dh, dc = _cifg_back(
                three, w[4 * n + j], w[5 * n + j], w[6 * n + j], w[7 * n + j], clip, w[8 * n + j], w[9 * n + j]
            )
            w[10 * n + j], w[11 * n + j], w[12 * n + j] = da
            w[14 * n + j] = dh
            w[15 * n + j] = dc
    elif kind == _MINGRU:
        for j in range(n):
            two = (w[j], w[n + j])
            da, dh, dc = _mingru_back(
                two, w[4 * n + j], w[5 * n + j], w[6 * n + j], w[7 * n + j], clip, w[8 * n + j], w[9 * n + j]
            )
            w[10 * n + j], w[11 * n + j] = da
            w[14 * n + j] = dh
    elif kind == _MINLSTM:
        for j in range(n):
            kept = (w[j], w[n + j], w[2 * n + j], w[3 * n + j])
            da, dh, dc = _minlstm_back(
                kept, w[4 * n + j], w[5 * n + j], w[6 * n + j], w[7 * n + j], clip, w[8 * n + j], w[9 * n + j]
            )
            w[10 * n + j], w[11 * n + j], w[12 * n + j] = da
            w[14 * n + j] = dh
    elif kind == _RNN_TANH:
        for j in range(n):
            h, dh = w[5 * n + j], w[8 * n + j]
            da, dh_prev, dc = _rnn_tanh_back((), h, h, h, h, clip, dh, dh)
            w[10 * n + j] = da[0]
            w[14 * n + j] = dh_prev
    else:
        for j in range(n):
            h, dh = w[5 * n + j], w[8 * n + j]
            da, dh_prev, dc = _rnn_relu_back((), h, h, h, h, clip, dh, dh)
            w[10 * n + j] = da[0]
            w[14 * n + j] = dh_prev


# Indices below are unsigned: Numba would test signed ones for negative values, and LLVM could not vectorise the loops.


@njit(**_OPTIONS)
def _load(w: Any, slot: Any, a: Any, start: Any, n: Any) -> Any:
    to, at = np.uintp(slot * _BLOCK), np.uintp(start)
    for j in range(np.uintp(n)):
        w[to + j] = a[at + j]


@njit(**_OPTIONS)
def _add(w: Any, slot: Any, a: Any, start: Any, n: Any) -> Any:
    to, at = np.uintp(slot * _BLOCK), np.uintp(start)
    for j in range(np.uintp(n)):
        w[to + j] += a[at + j]


@njit(**_OPTIONS)
def _save(w: Any, slot: Any, a: Any, start: Any, n: Any) -> Any:
    of, at = np.uintp(slot * _BLOCK), np.uintp(start)
    for j in range(np.uintp(n)):
        a[at + j] = w[of + j]


@njit(**_OPTIONS)
def _limit(w: Any, slot: Any, limit: Any) -> Any:
    for j in range(_BLOCK):
        w[slot * _BLOCK + j] = number.clamp(w[slot * _BLOCK + j], limit)


def _compile(stamp: str) -> dict[str, Any]:
    """The compiled steps: all rows (N, ...) of one time step, every array C-contiguous. They close over the stamp of
    the sources that they are made from, so that a cache on disk is not used for other sources."""
    options = {"error_model": "numpy", "fastmath": {"contract"}, "cache": True, "nogil": True}

    @njit(**options)
    def forward(
        kind: Any, x_sum: Any, h_sum: Any, sums: Any, kept_count: Any, has_c: Any, rows: Any, ax: Any, hr: Any, b: Any,
        h_prev: Any, c_prev: Any, clip: Any, active: Any, kept: Any, h: Any, c: Any,
    ) -> Any:  # fmt: skip
        """ax, hr (N,G*H): x W^T, h' R^T. b (E,sums*H). Written: kept (N,K,H), h, c (N,H). rows: of one weight set."""
        _ = stamp
        N, H = h.shape
        gates = len(x_sum)
        w = np.zeros(16 * _BLOCK, h.dtype)
        ax, hr, b, kept = ax.ravel(), hr.ravel(), b.ravel(), kept.ravel()
        h, c, h_prev, c_prev = h.ravel(), c.ravel(), h_prev.ravel(), c_prev.ravel()
        for row in range(N):
            at = row * H
            if not active[row]:
                h[at : at + H] = h_prev[at : at + H]
                if has_c:
                    c[at : at + H] = c_prev[at : at + H]
                continue
            for j in range(0, H, _BLOCK):
                n = min(_BLOCK, H - j)
                for s in range(sums):
                    _load(w, s, b, (row // rows * sums + s) * H + j, n)
                for g in range(gates):
                    _add(w, x_sum[g], ax, (row * gates + g) * H + j, n)
                for g in range(len(h_sum)):
                    _add(w, h_sum[g], hr, (row * gates + g) * H + j, n)
                _load(w, 4, h_prev, at + j, n)
                if has_c:
                    _load(w, 5, c_prev, at + j, n)
                _forward_block(kind, w, clip)
                for k in range(kept_count):
                    _save(w, 6 + k, kept, (row * kept_count + k) * H + j, n)
                _save(w, 10, h, at + j, n)
                if has_c:
                    _save(w, 11, c, at + j, n)

    @njit(**options)
    def backward(
        kind: Any, x_sum: Any, h_sum: Any, kept_count: Any, has_c: Any, kept: Any, h_prev: Any, h: Any, c_prev: Any,
        c: Any, clip_cell: Any, clip_grad: Any, dy: Any, dcells: Any, has_dcells: Any, active: Any, dh: Any, dc: Any,
        da_x: Any, da_h: Any,
    ) -> Any:  # fmt: skip
        """dh, dc (N,H): what comes from the step after; overwritten by what goes to the step before, less the product.
        Written: da_x, da_h (N,G*H), 0 in rows that are not active."""
        _ = stamp
        N, H = h.shape
        gates = len(x_sum)
        w = np.zeros(16 * _BLOCK, h.dtype)
        kept, da_x, da_h, dy, dcells = kept.ravel(), da_x.ravel(), da_h.ravel(), dy.ravel(), dcells.ravel()
        h, c, h_prev, c_prev, dh, dc = h.ravel(), c.ravel(), h_prev.ravel(), c_prev.ravel(), dh.ravel(), dc.ravel()
        for row in range(N):
            at = row * H
            if not active[row]:
                da_x[at * gates : (at + H) * gates] = 0
                da_h[at * gates : (at + H) * gates] = 0
                continue
            for j in range(0, H, _BLOCK):
                n = min(_BLOCK, H - j)
                for k in range(kept_count):
                    _load(w, k, kept, (row * kept_count + k) * H + j, n)
                _load(w, 4, h_prev, at + j, n)
                _load(w, 5, h, at + j, n)
                _load(w, 8, dh, at + j, n)
                _add(w, 8, dy, at + j, n)
                if has_c:
                    _load(w, 6, c_prev, at + j, n)
                    _load(w, 7, c, at + j, n)
                    _load(w, 9, dc, at + j, n)
                if has_dcells:
                    _add(w, 9 if has_c else 8, dcells, at + j, n)
                if clip_grad > 0:
                    _limit(w, 8, clip_grad)
                    _limit(w, 9, clip_grad)
                _backward_block(kind, w, clip_cell)
                for g in range(gates):
                    _save(w, 10 + x_sum[g], da_x, (row * gates + g) * H + j, n)
                for g in range(len(h_sum)):
                    _save(w, 10 + h_sum[g], da_h, (row * gates + g) * H + j, n)
                _save(w, 14, dh, at + j, n)
                if has_c:
                    _save(w, 15, dc, at + j, n)

    # The GRU of two products a step. Slots as they come.

    @njit(**options)
    def gate(rows: Any, ax: Any, hr: Any, b: Any, h_prev: Any, kept: Any, rh: Any) -> Any:
        """ax (N,3*H), hr (N,2*H), b (E,3*H), h_prev (N,H). Written: r and z in kept (N,3,H), rh (N,H)."""
        _ = stamp
        N, H = h_prev.shape
        m = _BLOCK
        w = np.zeros(16 * m, rh.dtype)
        ax, hr, b, kept, h_prev, rh = ax.ravel(), hr.ravel(), b.ravel(), kept.ravel(), h_prev.ravel(), rh.ravel()
        for row in range(N):
            for j in range(0, H, m):
                n = min(m, H - j)
                for g in range(2):
                    _load(w, g, ax, (row * 3 + g) * H + j, n)
                    _add(w, g, hr, (row * 2 + g) * H + j, n)
                    _add(w, g, b, (row // rows * 3 + g) * H + j, n)
                _load(w, 2, h_prev, row * H + j, n)
                for i in range(m):
                    w[3 * m + i], w[4 * m + i], w[5 * m + i] = _gate(w[i], w[m + i], w[2 * m + i])
                _save(w, 3, kept, row * 3 * H + j, n)
                _save(w, 4, kept, (row * 3 + 1) * H + j, n)
                _save(w, 5, rh, row * H + j, n)

    @njit(**options)
    def late(rows: Any, ax: Any, hn: Any, b: Any, h_prev: Any, active: Any, kept: Any, h: Any) -> Any:
        """hn (N,H): rh Rn^T. Written: n in kept (N,3,H), h (N,H)."""
        _ = stamp
        N, H = h.shape
        m = _BLOCK
        w = np.zeros(16 * m, h.dtype)
        ax, hn, b, kept, h_prev, h = ax.ravel(), hn.ravel(), b.ravel(), kept.ravel(), h_prev.ravel(), h.ravel()
        for row in range(N):
            at = row * H
            if not active[row]:
                h[at : at + H] = h_prev[at : at + H]
                continue
            for j in range(0, H, m):
                n = min(m, H - j)
                _load(w, 0, ax, (row * 3 + 2) * H + j, n)
                _add(w, 0, hn, at + j, n)
                _add(w, 0, b, (row // rows * 3 + 2) * H + j, n)
                _load(w, 1, kept, (row * 3 + 1) * H + j, n)
                _load(w, 2, h_prev, at + j, n)
                for i in range(m):
                    w[3 * m + i], w[4 * m + i] = _late(w[i], w[m + i], w[2 * m + i])
                _save(w, 3, kept, (row * 3 + 2) * H + j, n)
                _save(w, 4, h, at + j, n)

    @njit(**options)
    def late_back(
        kept: Any, h_prev: Any, clip_grad: Any, dy: Any, dcells: Any, has_dcells: Any, active: Any, dh: Any, da: Any,
        da_n: Any,
    ) -> Any:  # fmt: skip
        """Written: da_z, da_n in da (N,3*H), da_n (N,H) once more for the product, dh (N,H)."""
        _ = stamp
        N, H = h_prev.shape
        m = _BLOCK
        w = np.zeros(16 * m, dh.dtype)
        kept, h_prev, dy, dcells = kept.ravel(), h_prev.ravel(), dy.ravel(), dcells.ravel()
        dh, da, da_n = dh.ravel(), da.ravel(), da_n.ravel()
        for row in range(N):
            at = row * H
            if not active[row]:
                da[3 * at : 3 * (at + H)] = 0
                da_n[at : at + H] = 0
                continue
            for j in range(0, H, m):
                n = min(m, H - j)
                _load(w, 0, kept, (row * 3 + 1) * H + j, n)
                _load(w, 1, kept, (row * 3 + 2) * H + j, n)
                _load(w, 2, h_prev, at + j, n)
                _load(w, 3, dh, at + j, n)
                _add(w, 3, dy, at + j, n)
                if has_dcells:
                    _add(w, 3, dcells, at + j, n)
                if clip_grad > 0:
                    _limit(w, 3, clip_grad)
                for i in range(m):
                    w[4 * m + i], w[5 * m + i], w[6 * m + i] = _late_back(w[i], w[m + i], w[2 * m + i], w[3 * m + i])
                _save(w, 4, da, (row * 3 + 1) * H + j, n)
                _save(w, 5, da, (row * 3 + 2) * H + j, n)
                _save(w, 5, da_n, at + j, n)
                _save(w, 6, dh, at + j, n)

    @njit(**options)
    def gate_back(kept: Any, h_prev: Any, drh: Any, active: Any, da: Any, dh: Any) -> Any:
        """drh (N,H): da_n Rn. Written: da_r in da (N,3*H); dh (N,H) is added to."""
        _ = stamp
        N, H = h_prev.shape
        m = _BLOCK
        w = np.zeros(16 * m, dh.dtype)
        kept, h_prev, drh, da, dh = kept.ravel(), h_prev.ravel(), drh.ravel(), da.ravel(), dh.ravel()
        for row in range(N):
            if not active[row]:
                continue
            at = row * H
            for j in range(0, H, m):
                n = min(m, H - j)
                _load(w, 0, kept, row * 3 * H + j, n)
                _load(w, 1, h_prev, at + j, n)
                _load(w, 2, drh, at + j, n)
                for i in range(m):
                    w[3 * m + i], w[4 * m + i] = _gate_back(w[i], w[m + i], w[2 * m + i])
                _add(w, 4, dh, at + j, n)
                _save(w, 3, da, row * 3 * H + j, n)
                _save(w, 4, dh, at + j, n)

    return {
        "forward": forward,
        "backward": backward,
        "gate": gate,
        "late": late,
        "late_back": late_back,
        "gate_back": gate_back,
    }


def _stamp() -> str:
    """A digest of the sources that are compiled."""
    sources = [Path(__file__), *sorted(Path(cells.__file__).parent.glob("*.py"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


_STEPS = _compile(_stamp())


# The walk over time.


class _Walk:
    """One layer in one direction: its sizes, its weights as the products want them, and which rows run when."""

    def __init__(self, problem: Problem, cell: Cell, params: Any, backwards: bool, dtype: Any) -> None:
        self.problem, self.cell, self.backwards, self.dtype = problem, cell, backwards, dtype
        W, R, bW, bR = params
        E, H = problem.E, problem.H
        self.N = E * problem.B
        self.W, self.R = W, np.ascontiguousarray(np.zeros((E, 0, H), dtype) if R is None else R)
        self.WT = W.swapaxes(1, 2)
        self.RT = np.ascontiguousarray(self.R.swapaxes(1, 2))
        self.bias = np.zeros((E, cell.sums, H), dtype)
        for bias, sums in ((bW, cell.x_sum), (bR, cell.h_sum)):
            if bias is not None:
                for g, s in enumerate(sums):
                    self.bias[:, s] += bias[:, g * H : (g + 1) * H]
        self.kind = -1 if cell.two_products else _KINDS[cell.name]
        self.x_sum, self.h_sum = np.array(cell.x_sum), np.array(cell.h_sum, np.intp)
        T, N = problem.T, self.N
        self.active: Any = np.ones((T, N), bool)
        if problem.lengths is not None:
            self.active = (np.arange(T)[:, None, None] < problem.lengths).reshape(T, N)
        self.restart: Any = np.zeros((T, N), bool)
        if problem.reset is not None:
            boundary = (np.asarray(problem.reset) != 0).reshape(T, N) & self.active
            if backwards:
                self.restart[:-1] = boundary[1:]
            else:
                self.restart = boundary
        self.restarts: Any = self.restart.any(1)
        self.extra: Any = None  # the context's part of the products with x, (N,G*H)
        self.clip_cell, self.clip_grad = dtype.type(problem.clip_cell), dtype.type(problem.clip_grad)

    def chunks(self) -> list[range]:
        """The steps in walking order, cut into pieces of about _CHUNK rows."""
        n = max(1, _CHUNK // self.N)
        T = self.problem.T
        pieces = [range(t, min(T, t + n)) for t in range(0, T, n)]
        return [piece[::-1] for piece in pieces[::-1]] if self.backwards else pieces

    def multiply(self, a: Any, M: Any, out: Any = None) -> Any:
        """a (N,K) times M (E,K,J), set by set: (N,J)."""
        if len(M) == 1:
            return np.dot(a, M[0], out=out)
        shape = (len(M), -1)
        target = None if out is None else out.reshape(*shape, out.shape[-1])
        return np.matmul(a.reshape(*shape, a.shape[-1]), M, out=target).reshape(len(a), -1)

    def input_product(self, x: Any) -> Any:
        """x W^T of many steps, (n,N,G*H): a product, or for tokens (n,E,B) the columns of W that they stand for."""
        if not holds_tokens(x):
            product = self.times(x, self.WT)
        else:
            columns = self.WT[np.arange(self.problem.E)[:, None], x] if len(self.W) > 1 else self.WT[0][x]
            product = columns.reshape(len(x), self.N, -1)
        if self.extra is not None:
            product += self.extra
        return product

    def token_gradient(self, dW: Any, da: Any, tokens: Any) -> None:
        """da (n,N,G*H) added into the columns of dW (E,G*H,I) that tokens (n,E,B) stand for."""
        da = da.reshape(*tokens.shape, -1)
        for e in range(self.problem.E):
            kinds, which = np.unique(tokens[:, e], return_inverse=True)
            hot = (np.arange(len(kinds))[:, None] == which.reshape(-1)).astype(self.dtype)
            dW[e][:, kinds] += (hot @ da[:, e].reshape(which.size, -1)).T

    def times(self, a: Any, M: Any) -> Any:
        """a (n,E,B,K), many steps, times M (E,K,J): (n,N,J), contiguous."""
        n, E, B, K = a.shape
        if E == 1:
            product = a.reshape(n * B, K) @ M[0]
        else:
            product = np.ascontiguousarray(np.matmul(a, M))
        return product.reshape(n, E * B, -1)

    def outer(self, da: Any, x: Any) -> Any:
        """The gradient of W in x W^T over many steps: da (n,N,G*H), x (n,E,B,K) -> (E,G*H,K)."""
        n, E, B, K = x.shape
        if E == 1:
            return (da.reshape(n * B, -1).T @ x.reshape(n * B, K))[None]
        left = da.reshape(n, E, B, -1).transpose(1, 3, 0, 2).reshape(E, -1, n * B)
        return left @ x.transpose(1, 0, 2, 3).reshape(E, n * B, K)

    def ordered(self, chunk: range) -> slice:
        """The chunk as a slice of rising steps."""
        return slice(min(chunk), max(chunk) + 1)

    def before(self, states: Any, initial: Any, chunk: range, init_rows: Any) -> Any:
        """(n,N,H): the state before each step of a chunk, restarts applied; 0 in rows that do not run."""
        part = self.ordered(chunk)
        result = np.empty((len(chunk), self.N, self.problem.H), self.dtype)
        first = chunk[0]
        came_from = first + 1 if self.backwards else first - 1
        edge = states[came_from] if 0 <= came_from < self.problem.T else initial
        if self.backwards:
            result[:-1], result[-1] = states[part.start + 1 : part.stop], edge
        else:
            result[1:], result[0] = states[part.start : part.stop - 1], edge
        if self.restarts[part].any():
            restart = self.restart[part]
            result[restart] = np.broadcast_to(init_rows, result.shape)[restart] if init_rows is not None else 0
        if self.problem.lengths is not None:
            result[~self.active[part]] = 0
        return result

    def run(self, x: Any, h0: Any, c0: Any, kept: Any, hs: Any, cs: Any) -> None:
        """Forward. x (T,E,B,I); h0, c0 (N,H). Written: kept (T,N,K,H) or None, hs, cs (T,N,H)."""
        problem, cell = self.problem, self.cell
        N, H = self.N, problem.H
        zeros = np.zeros((N, H), self.dtype)
        h, c = h0, c0
        for chunk in self.chunks():
            ax = self.input_product(x[self.ordered(chunk)])
            scratch = np.empty((N, cell.kept, H), self.dtype) if kept is None else None
            for t in chunk:
                if self.restarts[t]:
                    rows = self.restart[t][:, None]
                    h = np.where(rows, h0 if problem.reset_to_initial else zeros, h)
                    c = np.where(rows, c0 if problem.reset_to_initial else zeros, c)
                self.step(ax[t - min(chunk)], h, c, t, scratch if kept is None else kept[t], hs[t], cs[t])
                h, c = hs[t], cs[t]

    def step(self, ax: Any, h: Any, c: Any, t: int, kept: Any, h_new: Any, c_new: Any) -> None:
        cell, H = self.cell, self.problem.H
        rows = self.problem.B
        if cell.two_products:
            rh = np.empty_like(h_new)
            _STEPS["gate"](rows, ax, self.multiply(h, self.RT[:, :, : 2 * H]), self.bias, h, kept, rh)
            _STEPS["late"](
                rows, ax, self.multiply(rh, self.RT[:, :, 2 * H :]), self.bias, h, self.active[t], kept, h_new
            )
            return
        hr = self.multiply(h, self.RT) if cell.state_product else np.empty((self.N, 0), self.dtype)
        _STEPS["forward"](
            self.kind, self.x_sum, self.h_sum, cell.sums, cell.kept, cell.cell_state, rows, ax, hr, self.bias, h, c,
            self.clip_cell, self.active[t], kept, h_new, c_new,
        )  # fmt: skip

    def rebuild(self, chunk: range, x: Any, hp: Any, cp: Any) -> Any:
        """The kept values (n,N,K,H) of a chunk, from the states before its steps."""
        n, N, H = hp.shape
        kept = np.empty((n, N, self.cell.kept, H), self.dtype)
        ax = self.input_product(x)
        h, c = np.empty((N, H), self.dtype), np.empty((N, H), self.dtype)
        for k in range(n):
            self.step(ax[k], hp[k], cp[k], min(chunk) + k, kept[k], h, c)
        return kept

    def run_back(
        self, x: Any, h0: Any, c0: Any, kept: Any, hs: Any, cs: Any, dy: Any, dcells: Any, dhn: Any, dcn: Any, dx: Any
    ) -> Any:
        """Backward. dy, dcells (T,E,B,H) or None; dhn, dcn (N,H). dx (T,E,B,I_l) is added to.
        Returns dh0, dc0 (N,H), the gradients of W, R, bW, bR and that of `extra`."""
        problem, cell = self.problem, self.cell
        E, N, H = problem.E, self.N, problem.H
        to_initial = problem.reset_to_initial
        dh, dc = dhn.copy(), dcn.copy()
        dh0, dc0 = np.zeros_like(dh), np.zeros_like(dc)
        dW = np.zeros((E, *self.W.shape[1:]), self.dtype)
        dR = np.zeros((E, cell.gates * H, H), self.dtype)
        dbW, dbR = np.zeros((E, cell.gates * H), self.dtype), np.zeros((E, cell.gates * H), self.dtype)
        dextra = np.zeros((N, cell.gates * H), self.dtype)
        nothing = np.zeros((N, H), self.dtype)
        back = np.empty((N, H), self.dtype)
        for chunk in self.chunks()[::-1]:
            part = self.ordered(chunk)
            n, start = len(chunk), part.start
            hp = self.before(hs, h0, chunk, h0 if to_initial else None)
            cp = self.before(cs, c0, chunk, c0 if to_initial else None) if cell.cell_state else hp
            x_part = x[part]
            tokens = holds_tokens(x)
            if problem.lengths is not None and not tokens:  # so that padding, NaN included, reaches nothing
                x_part = np.where(self.active[part].reshape(n, E, -1, 1), x_part, self.dtype.type(0))
            gates = self.rebuild(chunk, x_part, hp, cp) if kept is None else kept[part]
            dy_part = nothing if dy is None else np.ascontiguousarray(dy[part]).reshape(n, N, H)
            dcells_part = nothing if dcells is None else np.ascontiguousarray(dcells[part]).reshape(n, N, H)
            da_x = np.empty((n, N, cell.gates * H), self.dtype)
            same = cell.x_sum == cell.h_sum or not cell.state_product
            da_h = da_x if same else np.empty_like(da_x)
            rhs = np.empty((n, N, H), self.dtype) if cell.two_products else None
            for t in reversed(chunk):
                k = t - start
                dy_t = nothing if dy is None else dy_part[k]
                dcells_t = nothing if dcells is None else dcells_part[k]
                if rhs is not None:
                    np.multiply(gates[k, :, 0], hp[k], out=rhs[k])
                    rhs[k][~self.active[t]] = 0  # nothing was kept for these rows
                    da_n = np.empty((N, H), self.dtype)
                    _STEPS["late_back"](
                        gates[k], hp[k], self.clip_grad, dy_t, dcells_t, dcells is not None, self.active[t], dh,
                        da_x[k], da_n,
                    )  # fmt: skip
                    drh = self.multiply(da_n, self.R[:, 2 * H :])
                    _STEPS["gate_back"](gates[k], hp[k], drh, self.active[t], da_x[k], dh)
                    dh += self.multiply(da_x[k, :, : 2 * H], self.R[:, : 2 * H])
                else:
                    _STEPS["backward"](
                        self.kind, self.x_sum, self.h_sum, cell.kept, cell.cell_state, gates[k], hp[k], hs[t], cp[k],
                        cs[t], self.clip_cell, self.clip_grad, dy_t, dcells_t, dcells is not None, self.active[t], dh,
                        dc, da_x[k], da_h[k],
                    )  # fmt: skip
                    if cell.state_product:
                        dh += self.multiply(da_h[k], self.R, out=back)
                if self.restarts[t]:
                    rows = self.restart[t]
                    if to_initial:
                        dh0[rows] += dh[rows]
                        dc0[rows] += dc[rows]
                    dh[rows] = 0
                    dc[rows] = 0
            if self.extra is not None:
                dextra += da_x.sum(0)
            if tokens:
                self.token_gradient(dW, da_x, x_part)
            else:
                dx[part] += self.times(da_x.reshape(n, E, -1, cell.gates * H), self.W).reshape(dx[part].shape)
                dW += self.outer(da_x, x_part)
            sets = (n, E, problem.B, H)
            if rhs is None and cell.state_product:
                dR += self.outer(da_h, hp.reshape(sets))
            elif rhs is not None:
                dR[:, : 2 * H] += self.outer(da_h[..., : 2 * H], hp.reshape(sets))
                dR[:, 2 * H :] += self.outer(da_h[..., 2 * H :], rhs.reshape(sets))
            dbW += da_x.reshape(n, E, problem.B, -1).sum((0, 2))
            if da_h is not da_x:
                dbR += da_h.reshape(n, E, problem.B, -1).sum((0, 2))
        if not cell.state_product:
            return dh0 + dh, dc0 + dc, (dW, None, dbW, None), dextra
        return dh0 + dh, dc0 + dc, (dW, dR, dbW, dbW if cell.x_sum == cell.h_sum else dbR), dextra


# The stack of layers and directions.


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
            walk = _Walk(problem, cell, p.params[n], problem.reverse or d == 1, dtype)
            masks = walk.active
            if layer == 0:
                walk.extra = _context_product(problem, p, d, dtype)
            gates, hs, cs = kept[n]
            h0, c0 = _rows(problem, p.h0, n, dtype), _rows(problem, p.c0, n, dtype)
            walk.run(x, h0, c0, gates, hs, cs)
            last = 0 if walk.backwards else problem.T - 1
            for final, states, initial in ((out.hn, hs, h0), (out.cn, cs, c0)):
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
    cell, dtype = CELLS[problem.cell], dtype_of(problem, p)
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
            walk = _Walk(problem, cell, p.params[n], problem.reverse or d == 1, dtype)
            if layer == 0:
                walk.extra = _context_product(problem, p, d, dtype)
            h0, c0 = _rows(problem, p.h0, n, dtype), _rows(problem, p.c0, n, dtype)
            dhn, dcn = _rows(problem, g.hn, n, dtype), _rows(problem, g.cn, n, dtype)
            dy_part = None if dy is None else dy[..., part]
            dcells = None if g.cells is None else g.cells[layer][..., part]
            walked = walk.run_back(x, h0, c0, *kept[n], dy_part, dcells, dhn, dcn, dx)
            dh0, dc0, result.params[n], dextra = walked
            if walk.extra is not None:
                dextra = dextra.reshape(E, B, -1)
                result.context = dextra @ p.context_weights[d] + (0 if d == 0 else result.context)
                result.context_weights = [*(result.context_weights or []), dextra.swapaxes(1, 2) @ p.context]
            result.h0[n], result.c0[n] = dh0.reshape(E, B, H), dc0.reshape(E, B, H)
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


# Sums over paths: lattice.py's functions as loops (its array expressions would take Numba a minute), compiled at the
# first call.


@functools.cache
def _path_steps() -> dict[str, Any]:
    options = {"cache": True, "nogil": True, "error_model": "numpy"}

    @njit(inline="always")
    def log_add(a: Any, b: Any) -> Any:
        if a < b:
            a, b = b, a
        return a if b == -np.inf else a + math.log1p(math.exp(b - a))

    @njit(**options)
    def ctc_row(log_probs: Any, labels: Any, blank: Any, grad: Any) -> Any:
        T, states = len(log_probs), 2 * len(labels) + 1
        classes = np.full(states, blank)
        classes[1::2] = labels
        alpha = np.full((T + 1, states), -np.inf)
        alpha[0, 0] = 0.0
        for t in range(T):
            for s in range(states):
                a = alpha[t, s]
                if s > 0:
                    a = log_add(a, alpha[t, s - 1])
                if s > 1 and s % 2 == 1 and classes[s] != classes[s - 2]:
                    a = log_add(a, alpha[t, s - 2])
                alpha[t + 1, s] = a + log_probs[t, classes[s]]
        total = alpha[T, states - 1]
        if states > 1:
            total = log_add(total, alpha[T, states - 2])
        if len(grad) == 0:
            return -total
        beta, after = np.full(states, -np.inf), np.empty(states)
        beta[-2:] = 0.0
        for t in range(T - 1, -1, -1):
            for c in range(grad.shape[1]):
                grad[t, c] = math.exp(log_probs[t, c])
            for s in range(states):
                grad[t, classes[s]] -= math.exp(alpha[t + 1, s] + beta[s] - total)
                after[s] = beta[s] + log_probs[t, classes[s]]
            for s in range(states):
                b = after[s]
                if s + 1 < states:
                    b = log_add(b, after[s + 1])
                if s + 2 < states and s % 2 == 1 and classes[s] != classes[s + 2]:
                    b = log_add(b, after[s + 2])
                beta[s] = b
        return -total

    @njit(**options)
    def align_row(log_probs: Any, labels: Any, blank: Any, path: Any) -> Any:
        T, states = len(log_probs), 2 * len(labels) + 1
        classes = np.full(states, blank)
        classes[1::2] = labels
        came = np.zeros((T, states), np.int8)
        best, last = np.full(states, -np.inf), np.empty(states)
        best[0] = 0.0
        for t in range(T):
            last[:] = best
            for s in range(states):
                most = last[s]
                if s > 0 and last[s - 1] > most:
                    most = last[s - 1]
                    came[t, s] = 1
                if s > 1 and s % 2 == 1 and classes[s] != classes[s - 2] and last[s - 2] > most:
                    most = last[s - 2]
                    came[t, s] = 2
                best[s] = most + log_probs[t, classes[s]]
        state = states - 1
        if states > 1 and not best[state] > best[state - 1]:
            state -= 1
        total = best[state]
        for t in range(T - 1, -1, -1):
            path[t] = state
            state -= came[t, state]
        return total

    @njit(**options)
    def hmm_row(scores: Any, initial: Any, transitions: Any, states: Any, pairs: Any) -> Any:
        T, N = scores.shape
        alpha, beta, after = np.empty((T, N)), np.zeros(N), np.empty(N)
        for t in range(T):
            for j in range(N):
                a = initial[j]
                if t > 0:
                    a = alpha[t - 1, 0] + transitions[0, j]
                    for i in range(1, N):
                        a = log_add(a, alpha[t - 1, i] + transitions[i, j])
                alpha[t, j] = a + scores[t, j]
        total = alpha[T - 1, 0]
        for j in range(1, N):
            total = log_add(total, alpha[T - 1, j])
        if len(states) == 0:
            return total
        pairs[:] = 0.0
        for t in range(T - 1, -1, -1):
            if t < T - 1:
                for j in range(N):
                    after[j] = beta[j] + scores[t + 1, j]
                for i in range(N):
                    b = -np.inf
                    for j in range(N):
                        way = transitions[i, j] + after[j]
                        pairs[i, j] += math.exp(alpha[t, i] + way - total)
                        b = log_add(b, way)
                    beta[i] = b
            for i in range(N):
                states[t, i] = math.exp(alpha[t, i] + beta[i] - total)
        return total

    @njit(**options)
    def viterbi_row(scores: Any, initial: Any, transitions: Any, path: Any) -> Any:
        T, N = scores.shape
        came, best, last = np.zeros((T, N), np.int64), initial + scores[0], np.empty(N)
        for t in range(1, T):
            last[:] = best
            for j in range(N):
                most = last[0] + transitions[0, j]
                for i in range(1, N):
                    if last[i] + transitions[i, j] > most:
                        most = last[i] + transitions[i, j]
                        came[t, j] = i
                best[j] = most + scores[t, j]
        state = 0
        for j in range(1, N):
            if best[j] > best[state]:
                state = j
        for t in range(T - 1, -1, -1):
            path[t] = state if t == T - 1 else came[t + 1, path[t + 1]]
        return best[state]

    return {"ctc_row": ctc_row, "align_row": align_row, "hmm_row": hmm_row, "viterbi_row": viterbi_row}


def ctc(
    log_probs: Any, labels: Any, first: Any, label_counts: Any, lengths: Any, blank: int, zero_infinity: bool,
    loss: Any, dloss: Any = None, dlog_probs: Any = None,
) -> None:  # fmt: skip
    """As _core.ctc, in float64 whatever the dtype."""
    row = _path_steps()["ctc_row"]
    lattice.ctc(
        row, log_probs, labels, first, label_counts, lengths, blank, zero_infinity, loss, dloss, dlog_probs
    )  # fmt: skip


def ctc_align(
    log_probs: Any, labels: Any, first: Any, label_counts: Any, lengths: Any, blank: int,
    states: Any, log_probability: Any,
) -> None:  # fmt: skip
    """As _core.ctc_align."""
    row = _path_steps()["align_row"]
    lattice.ctc_align(row, log_probs, labels, first, label_counts, lengths, blank, states, log_probability)


ctc_beam = lattice.ctc_beam


def hmm(
    scores: Any, initial: Any, transitions: Any, lengths: Any, log_likelihood: Any, weights: Any = None,
    states: Any = None, dinitial: Any = None, dtransitions: Any = None,
) -> None:  # fmt: skip
    """As _core.hmm, in float64 whatever the dtype."""
    row = _path_steps()["hmm_row"]
    lattice.hmm(
        row, scores, initial, transitions, lengths, log_likelihood, weights, states, dinitial, dtransitions
    )  # fmt: skip


def viterbi(scores: Any, initial: Any, transitions: Any, lengths: Any, paths: Any, log_probability: Any) -> None:
    """As _core.viterbi."""
    lattice.viterbi(_path_steps()["viterbi_row"], scores, initial, transitions, lengths, paths, log_probability)
