# SPDX-License-Identifier: Apache-2.0
"""Tangents of forward and of backward: backends against the reference, the reference against finite differences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import close
import fusedrnn
from fusedrnn.backends import Arguments, Results, reference
from fusedrnn.cells import CELLS
from shapes import ALL_CELLS, CASES, OPS, Case, build, empty_arguments, empty_results, expected, named

DTYPES = ["float32", "float64"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_jvp_and_hvp(kernels, case, dtype):
    data = build(case, dtype)
    want = expected(case, dtype)
    tout, tdp = empty_results(data.problem, dtype), empty_arguments(data, dtype)
    kernels.jvp(data.problem, data.p, data.v, tout)
    close.check_all(str(case), named(tout), want["jvp"], dtype, "jvp")
    again = empty_results(data.problem, dtype)
    kernels.hvp(data.problem, data.p, data.v, data.g, data.t, tdp, again)
    close.check_all(str(case), named(again), want["jvp"], dtype, "jvp")
    close.check_all(str(case), named(tdp), want["hvp"], dtype, "hvp")


def moved(a: Any, v: Any, s: float) -> Any:
    """p + s v, or g + s t."""

    def add(x: Any, dx: Any) -> Any:
        if x is None and dx is None:
            return None
        return (0 if x is None else x) + s * (0 if dx is None else dx)

    if isinstance(a, Results):
        return Results(*(add(getattr(a, n), getattr(v, n)) for n in ("y", "hn", "cn", "cells")))
    params: Any = [tuple(map(add, x, dx)) for x, dx in zip(a.params, v.params, strict=True)]
    return Arguments(add(a.x, v.x), add(a.h0, v.h0), add(a.c0, v.c0), params)


# Clipping has corners, so a finite step may cross one; these cases have none near by, or none at all.
SMOOTH = [
    Case(T=4, H=3, I=2, B=2),
    Case(T=4, H=3, I=2, B=2, D=2, L=2),
    Case(T=4, H=3, I=2, B=3, lengths="any", reset=0.4, to_initial=True, D=2),
    Case(T=4, H=3, I=2, B=3, lengths="any", reset=0.4, reverse=True),
    Case(T=3, H=2, I=2, B=2, E=2, L=2, dropout=0.5),
    Case(T=3, H=2, I=2, B=2, bias=False, state=False),
    Case(T=5, H=3, I=2, B=2, recompute=True),
]


@pytest.mark.parametrize("cell", ALL_CELLS)
@pytest.mark.parametrize("case", SMOOTH, ids=str)
def test_reference_against_finite_differences(cell, case):
    """jvp of forward, hvp of backward, by central differences; and backward against jvp by the dot product."""
    case = Case(**{**case.__dict__, "cell": cell})
    data = build(case, np.float64)
    problem, s = data.problem, 1e-5

    def forward(p: Arguments) -> dict[str, Any]:
        out = empty_results(problem, np.float64)
        reference.forward(problem, p, out, None)
        return named(out)

    def backward(p: Arguments, g: Results) -> dict[str, Any]:
        dp = empty_arguments(data, np.float64)
        reference.backward(problem, p, None, g, dp)
        return named(dp)

    want = expected(case, "float64")
    up, down = forward(moved(data.p, data.v, s)), forward(moved(data.p, data.v, -s))
    for name, tangent in want["jvp"].items():
        close.check(f"jvp {name}", (up[name] - down[name]) / (2 * s), tangent, 1e-8)
    up = backward(moved(data.p, data.v, s), moved(data.g, data.t, s))
    down = backward(moved(data.p, data.v, -s), moved(data.g, data.t, -s))
    for name, tangent in want["hvp"].items():
        close.check(f"hvp {name}", (up[name] - down[name]) / (2 * s), tangent, 1e-7)

    # <g, J v> = <J^T g, v>, over everything that is not NaN padding
    g, v = named(data.g), named(data.v)
    left = sum(np.sum(np.where(np.isnan(g[n]), 0, g[n]) * want["jvp"][n]) for n in g)
    right = sum(np.sum(want["backward"][n] * v[n]) for n in want["backward"])
    assert left == pytest.approx(right, rel=1e-12)


@pytest.mark.parametrize("option", [{"clip_cell": 0.4}, {"clip_grad": 0.3}])
def test_reference_clipping_against_finite_differences(option):
    """Corners are rare: nearly all coordinates agree, and some are clipped."""
    case = Case(T=5, B=4, H=5, **option)
    data = build(case, np.float64)
    s = 1e-7
    want = expected(case, "float64")
    plain = expected(Case(T=5, B=4, H=5), "float64")
    operation = "jvp" if "clip_cell" in option else "hvp"
    if operation == "jvp":
        ends = [empty_results(data.problem, np.float64) for _ in range(2)]
        for sign, out in zip((1, -1), ends, strict=True):
            reference.forward(data.problem, moved(data.p, data.v, sign * s), out, None)
    else:
        ends = [empty_arguments(data, np.float64) for _ in range(2)]
        for sign, out in zip((1, -1), ends, strict=True):
            p, g = moved(data.p, data.v, sign * s), moved(data.g, data.t, sign * s)
            reference.backward(data.problem, p, None, g, out)
    for name, tangent in want[operation].items():
        slope = (named(ends[0])[name] - named(ends[1])[name]) / (2 * s)
        close.check(name, slope, tangent, 1e-6)
    assert any(np.abs(want[operation][n] - plain[operation][n]).max() > 0.1 for n in plain[operation])


@pytest.mark.parametrize("cell", ALL_CELLS)
def test_missing_tangents_are_zero(route, cell):
    data = build(Case(cell=cell, L=2), np.float64)
    nothing = Arguments(params=[(None,) * 4] * 2)
    tout, tdp = empty_results(data.problem, np.float64), empty_arguments(data, np.float64)
    route.jvp(data.problem, data.p, nothing, tout)
    route.hvp(data.problem, data.p, nothing, data.g, Results(), tdp)
    for name, array in (named(tout) | named(tdp)).items():
        assert not array.any(), name
    # along g alone, the tangent of backward is backward
    route.hvp(data.problem, data.p, nothing, data.g, data.g, tdp)
    close.check_all(cell, named(tdp), expected(Case(cell=cell, L=2), "float64")["backward"], "float64", "hvp")


# The front door.


def door(cell: str, **options: Any) -> tuple[Any, Any, dict[str, np.ndarray], np.ndarray]:
    rng = np.random.default_rng(0)
    name, extra = OPS[cell]
    op = getattr(fusedrnn, name)
    params = fusedrnn.params.init(cell, 3, 4, 2, True, seed=1, dtype=np.float64)
    x = rng.standard_normal((5, 2, 3))

    def call(x: np.ndarray, params: Any, state: Any = None) -> Any:
        return op(
            x, state, params, num_layers=2, bidirectional=True, training=True, return_cells=True, **extra, **options
        )

    return call, getattr(fusedrnn, f"{name}_backward"), params, x


@pytest.mark.parametrize("cell", ALL_CELLS)
def test_ops_jvp_and_hvp(backend, cell):
    call, backward, params, x = door(cell)
    rng = np.random.default_rng(1)
    tangents: dict[str, Any] = {name: rng.standard_normal(a.shape) for name, a in params.items()}
    tangents["x"] = rng.standard_normal(x.shape)
    s = 1e-6
    ends = [call(x + d * tangents["x"], {name: a + d * tangents[name] for name, a in params.items()}) for d in (s, -s)]
    y, state, cells, tape = call(x, params)
    ty, tstate, tcells = fusedrnn.ops.jvp(tape, tangents, return_cells=True)
    close.check("ty", (ends[0][0] - ends[1][0]) / (2 * s), ty, 1e-7)
    close.check("tcells", (ends[0][2] - ends[1][2]) / (2 * s), tcells, 1e-7)
    dstate = tuple(map(np.ones_like, state)) if isinstance(state, tuple) else np.ones_like(state)
    got = fusedrnn.ops.hvp(tape, tangents, y, dstate, cells, tdy=ty, tdstate=None, tdcells=tcells)
    grads = [backward(end[3], y + d * ty, dstate, cells + d * tcells) for end, d in zip(ends, (s, -s), strict=True)]
    for name in ("x", *params):
        close.check(name, (grads[0][name] - grads[1][name]) / (2 * s), got[name], 1e-6)
    assert isinstance(tstate, tuple) == CELLS[cell].cell_state


def test_ops_tangents_of_state():
    """A state that was not given is zero, and has a tangent all the same."""
    call, _, params, x = door("lstm")
    zero, one = np.zeros((4, 2, 4)), np.ones((4, 2, 4))
    absent, present = call(x, params)[-1], call(x, params, (zero, zero))[-1]
    for a, b in zip(
        fusedrnn.ops.jvp(absent, {"state": (one, None)}), fusedrnn.ops.jvp(present, {"state": (one, zero)}), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_ops_wrong_tangents():
    call, _, params, x = door("gru")
    tape = call(x, params)[-1]
    with pytest.raises(ValueError, match=r"jvp: tangents has 'weight'; expected some of x, weight_ih_l0"):
        fusedrnn.ops.jvp(tape, {"weight": x})
    with pytest.raises(ValueError, match=r"jvp: tangents\['x'\] has shape \(5, 2\); expected \(5, 2, 3\)"):
        fusedrnn.ops.jvp(tape, {"x": x[..., 0]})
    with pytest.raises(TypeError, match=r"hvp: tangents\['x'\] has dtype float32; expected float64"):
        fusedrnn.ops.hvp(tape, {"x": x.astype(np.float32)})
