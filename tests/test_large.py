# SPDX-License-Identifier: Apache-2.0
"""The native backend past 2**31 elements: strides, offsets on the tape and, where there is memory, whole arrays.

Most of the memory here is a file with holes: what is never touched costs nothing.
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

import numpy as np
import pytest

import close
from fusedrnn import backends
from fusedrnn.backends import Arguments, Problem, Results
from shapes import Case, build, empty_arguments, empty_results, expected, named

FAR = 2**31 + 17


@pytest.fixture
def sparse(tmp_path):
    """Zeros that take no memory: sparse(count, dtype)."""

    def make(count: int, dtype: Any) -> np.ndarray:
        with tempfile.TemporaryFile(dir=tmp_path) as file:
            return np.asarray(np.memmap(file, dtype, "w+", shape=(count,)))

    return make


@pytest.mark.slow
@pytest.mark.parametrize("axis", [0, -1], ids=["first axis", "last axis"])
@pytest.mark.parametrize("cell", ["lstm", "gru_reset_before"])
def test_strides_past_2_31_elements(kernels, sparse, cell, axis):
    """Every array of the call lies so; what is read and what is written."""
    case = Case(cell, T=3, E=2, B=2, I=2, H=3, L=2, D=2, lengths="any", reset=0.3, to_initial=True)

    def far(a: Any) -> Any:
        if a is None:
            return None
        strides = [a.itemsize * int(np.prod(a.shape[n + 1 :])) for n in range(a.ndim)]
        strides[axis] = a.itemsize * FAR
        if axis == -1:
            strides[:-1] = [s // a.shape[-1] for s in strides[:-1]]
        memory = sparse(FAR * (a.shape[axis] - 1) + a.size, a.dtype)
        out = np.lib.stride_tricks.as_strided(memory, a.shape, strides)
        out[...] = a
        return out

    def far_arguments(p: Arguments) -> Arguments:
        params: Any = [tuple(map(far, arrays)) for arrays in p.params]
        return Arguments(far(p.x), far(p.h0), far(p.c0), params)

    def far_results(r: Results) -> Results:
        return Results(far(r.y), far(r.hn), far(r.cn), far(r.cells))

    data = build(case, "float32")
    problem = data.problem
    problem.lengths, problem.reset = far(problem.lengths), far(problem.reset)
    p, v, g, t = far_arguments(data.p), far_arguments(data.v), far_results(data.g), far_results(data.t)
    out, tout = far_results(empty_results(problem, "float32")), far_results(empty_results(problem, "float32"))
    dp, tdp = far_arguments(empty_arguments(data, "float32")), far_arguments(empty_arguments(data, "float32"))
    tape = np.full(kernels.tape_elements(problem), np.nan, np.float32)
    kernels.forward(problem, p, out, tape)
    kernels.backward(problem, p, tape, g, dp)
    kernels.jvp(problem, p, v, tout)
    kernels.hvp(problem, p, v, g, t, tdp)
    for operation, got in {"forward": out, "backward": dp, "jvp": tout, "hvp": tdp}.items():
        close.check_all(str(case), named(got), expected(case, "float32")[operation], "float32", operation)


def test_a_tape_past_2_31_elements(kernels, sparse):
    """2**31 pairs of steps and rows, of which few are alive: c and the gates lie far behind h on the tape."""
    T, B = 2**16, 2**15 + 1
    alive = [0, 5, B - 1]
    rng = np.random.default_rng(0)
    lengths = np.zeros((1, B), np.int64)
    lengths[0, alive] = 1000, 7, 1200
    slide = rng.standard_normal(T + B).astype(np.float32)

    def sliding(rows: Any) -> np.ndarray:  # element (t, b) is slide[t + b]
        return np.lib.stride_tricks.as_strided(slide, (T, 1, B, 1), (4, 0, 4, 4))[:, :, rows]

    weights: Any = tuple(rng.standard_normal(s).astype(np.float32) for s in ((1, 4, 1), (1, 4, 1), (1, 4), (1, 4)))

    def run(rows: Any, tape: Any) -> dict[str, np.ndarray]:
        count = len(np.arange(B)[rows])
        problem = Problem("lstm", T, 1, count, 1, 1, lengths=np.ascontiguousarray(lengths[:, rows]))
        p = Arguments(sliding(rows), None, None, [weights])
        state = [np.full((1, 1, count, 1), np.nan, np.float32) for _ in range(4)]
        dW: Any = tuple(np.full_like(w, np.nan) for w in weights)
        kernels.forward(problem, p, Results(None, state[0], state[1]), tape(kernels.tape_elements(problem)))
        kernels.backward(problem, p, tapes[-1], Results(sliding(rows)), Arguments(None, state[2], state[3], [dW]))
        return {f"state {n}": a[:, :, alive] if count == B else a for n, a in enumerate(state)} | {
            f"weight {n}": a for n, a in enumerate(dW)
        }

    tapes = []

    def large(elements: int) -> np.ndarray:
        assert elements > 6 * 2**31
        tapes.append(sparse(elements, np.float32))
        return tapes[-1]

    def small(elements: int) -> np.ndarray:
        tapes.append(np.empty(elements, np.float32))
        return tapes[-1]

    few = run(alive, small)
    close.check_all("few rows alive", run(slice(None), large), few, "float32", "backward")


def test_an_input_past_2_31_elements(kernels):
    """By its shape: most steps lie past the rows' ends, and all rows in the same memory."""
    T, B, I, H = 2**12, 2**10, 2**9 + 1, 2
    rng = np.random.default_rng(0)
    one = rng.standard_normal((T, 1, 1, I)).astype(np.float32)
    x = np.broadcast_to(one, (T, 1, B, I))
    assert x.size > 2**31
    weights: Any = tuple(
        rng.standard_normal(s).astype(np.float32) / 20 for s in ((1, 3 * H, I), (1, 3 * H, H), (1, 3 * H), (1, 3 * H))
    )
    last = []
    for rows in (1, B):
        lengths = np.zeros((1, rows), np.int64)
        lengths[0, -1] = 33
        h = np.full((1, 1, rows, H), np.nan, np.float32)
        problem = Problem("gru", T, 1, rows, I, H, lengths=lengths)
        kernels.forward(problem, Arguments(x[:, :, :rows], None, None, [weights]), Results(hn=h), None)
        last.append(h[0, 0, -1])
        assert not h[0, 0, :-1].any()
    close.check("the last row", last[1], last[0], close.BUDGETS["float32", "forward"])


@pytest.mark.skipif("FUSEDRNN_LARGE" not in os.environ, reason="takes 11 GB and a minute or two: set FUSEDRNN_LARGE=1")
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm"])
def test_results_past_2_31_elements(cell):
    """All rows alive, y is written in full; then backward, without y. Rows are compared with runs of a few of them."""
    core: Any = backends.choose("native")
    T, B, H = 2**16, 2**11 + 1, 16
    rng = np.random.default_rng(0)
    slides = rng.standard_normal((2, T + B + H)).astype(np.float32)
    x, dy = (
        np.lib.stride_tricks.as_strided(s, (T, 1, B, n), (4, 0, 4, 4)) for s, n in zip(slides, (1, H), strict=True)
    )
    starts = rng.random(T + B) < 0.001
    reset = np.lib.stride_tricks.as_strided(starts, (T, 1, B), (1, 0, 1))
    GH = (4 if cell == "lstm" else 1) * H
    shapes = ((1, GH, 1), (1, GH, H), (1, GH), (1, GH))
    weights: Any = tuple(rng.uniform(-0.4, 0.4, shape).astype(np.float32) for shape in shapes)

    def run(lo: int, hi: int, want_y: bool) -> Any:
        problem = Problem(cell, T, 1, hi - lo, 1, H, reset=reset[:, :, lo:hi], recompute=True)
        p = Arguments(x[:, :, lo:hi], None, None, [weights])
        if want_y:
            y = np.full((T, 1, hi - lo, H), np.nan, np.float32)
            core.forward(problem, p, Results(y), None)
            return y
        tape = np.empty(core.tape_elements(problem), np.float32)
        core.forward(problem, p, Results(), tape)
        dh0 = np.full((1, 1, hi - lo, H), np.nan, np.float32)
        dW: Any = tuple(np.full_like(w, np.nan) for w in weights)
        core.backward(problem, p, tape, Results(dy[:, :, lo:hi]), Arguments(None, dh0, None, [dW]))
        assert all(np.isfinite(a).all() for a in dW)
        return dh0

    assert T * B * H > 2**31
    for want_y in (True, False):
        whole = run(0, B, want_y)
        for lo in (0, B // 2, B - 5):
            np.testing.assert_allclose(whole[:, :, lo : lo + 5], run(lo, lo + 5, want_y), rtol=0, atol=1e-4)
        del whole
