# SPDX-License-Identifier: Apache-2.0
"""The context: every backend against the same numbers as constant inputs, with weights of their own."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import close
import fusedrnn
from fusedrnn import backends, ops
from fusedrnn import params as parameters
from fusedrnn.backends import Arguments, reference
from fusedrnn.cells import CELLS
from shapes import ALL_CELLS, Case, build, empty_arguments, empty_results, named

CASES = [
    Case(**({"T": 4} | options))
    for options in [
        {"B": 3, "H": 5},
        {"B": 17, "H": 17},
        {"B": 1, "H": 33, "T": 1},
        {"B": 4, "reverse": True, "layout": "strided"},
        {"B": 5, "L": 2, "D": 2, "lengths": "any", "reset": 0.3, "dropout": 0.4, "H": 9},
        {"B": 5, "D": 2, "recompute": True, "lengths": "any", "T": 19},
        {"B": 4, "E": 3, "lengths": "any", "clip_grad": 0.3},
        {"B": 2, "E": 3, "layout": "shared", "D": 2},
        {"B": 2, "T": 0},
        {"B": 3, "lengths": "zero", "D": 2},
        {"B": 0, "T": 2},
    ]
]


def with_context(case: Case, dtype: Any, K: int, transposed: bool = False) -> Any:
    """The case's arrays, a context and its weights, and tangents of both."""
    data = build(case, dtype)
    p, gates = data.problem, CELLS[case.cell].gates
    rng = np.random.default_rng([case.B, K])

    def new(*shape: int, share: bool = False) -> np.ndarray:
        if share and case.layout == "shared":
            return np.broadcast_to(new(1, *shape[1:]), shape)
        array = rng.uniform(-1, 1, shape).astype(dtype)
        return np.ascontiguousarray(array.swapaxes(1, 2)).swapaxes(1, 2) if transposed else array

    for arguments in (data.p, data.v):
        arguments.context = new(p.E, p.B, K)
        arguments.context_weights = [new(p.E, gates * p.H, K, share=True) for _ in range(p.D)]
    return data


def as_inputs(data: Any) -> Any:
    """The same as one more piece of x and of W, without a context."""
    p = data.problem
    problem = replace(p, I=p.I + data.p.context.shape[-1])

    def joined(a: Arguments) -> Arguments:
        again = np.broadcast_to(a.context, (p.T, *a.context.shape))
        params = list(a.params)
        for d in range(p.D):
            params[d] = (np.concatenate([params[d][0], a.context_weights[d]], -1), *params[d][1:])
        return Arguments(np.concatenate([a.x, again], -1), a.h0, a.c0, params)

    return problem, joined(data.p), joined(data.v)


@functools.cache
def expected(case: Case, dtype: str, K: int) -> dict[str, dict[str, np.ndarray]]:
    """What the reference says of the inputs, cut into x's part and the context's."""
    data = with_context(case, dtype, K)
    problem, p, v = as_inputs(data)
    I = data.problem.I  # noqa: E741
    out, tout = (empty_results(data.problem, np.float64) for _ in range(2))
    grads, tgrads = (empty_arguments(data, np.float64) for _ in range(2))
    for g in (grads, tgrads):
        g.x = np.full(p.x.shape, np.nan)
        g.params = [(np.full(W[0].shape, np.nan), *rest) for W, (_, *rest) in zip(p.params, g.params, strict=True)]
    reference.forward(problem, p, out, None)
    reference.jvp(problem, p, v, tout)
    reference.backward(problem, p, None, data.g, grads)
    reference.hvp(problem, p, v, data.g, data.t, tgrads)
    parts = {"forward": named(out), "jvp": named(tout)}
    for operation, g in (("backward", grads), ("hvp", tgrads)):
        found = named(g)
        found["context"] = g.x[..., I:].sum(0)
        found["x"] = g.x[..., :I]
        for d in range(problem.D):
            whole = g.params[d][0]
            if case.layout == "shared":
                whole = np.broadcast_to(whole.sum(0), whole.shape)
            found[f"context_weights[{d}]"], found[f"W[{d}]"] = whole[..., I:], whole[..., :I]
        for n in range(problem.D, problem.D * problem.L):
            if case.layout == "shared":
                whole = g.params[n][0]
                found[f"W[{n}]"] = np.broadcast_to(whole.sum(0), whole.shape)
        parts[operation] = found
    return parts


def all_named(g: Arguments) -> dict[str, np.ndarray]:
    return named(g) | {"context": g.context} | {f"context_weights[{d}]": a for d, a in enumerate(g.context_weights)}


def results(route: Any, data: Any, dtype: Any) -> dict[str, dict[str, np.ndarray]]:
    """All four operations, into poisoned arrays."""
    out, plain, tout = (empty_results(data.problem, dtype) for _ in range(3))
    dp, tdp = (empty_arguments(data, dtype) for _ in range(2))
    for g in (dp, tdp):
        g.context = np.full(data.p.context.shape, np.nan, dtype)
        g.context_weights = []
        for a in data.p.context_weights:
            new = np.full(a.shape, np.nan, dtype)
            if a.shape[0] > 1 and a.strides[0] == 0:
                new = np.lib.stride_tricks.as_strided(new[:1], a.shape, (0, *new.strides[1:]))
            g.context_weights.append(new)
    tape = np.full(route.tape_elements(data.problem), np.nan, dtype)
    route.forward(data.problem, data.p, plain, None)
    route.forward(data.problem, data.p, out, tape)
    route.backward(data.problem, data.p, tape, data.g, dp)
    route.jvp(data.problem, data.p, data.v, tout)
    route.hvp(data.problem, data.p, data.v, data.g, data.t, tdp)
    parts = {"plain": named(plain), "forward": named(out), "jvp": named(tout)}
    return parts | {"backward": all_named(dp), "hvp": all_named(tdp)}


@pytest.mark.parametrize("case", [replace(case, cell=cell) for case in CASES for cell in ALL_CELLS], ids=str)
def test_as_inputs(route, case):
    dtype = "float64" if case.H == 9 else "float32"
    K = {3: 1, 17: 35, 5: 16}.get(case.B, 3)
    data = with_context(case, dtype, K)
    want = expected(case, dtype, K)
    for operation, values in results(route, data, dtype).items():
        budget = "forward" if operation == "plain" else operation
        close.check_all(str(case), values, want[budget], dtype, budget)


def test_other_strides(kernels):
    case = Case(B=6, H=17, D=2, T=3)
    plain = results(kernels, with_context(case, np.float64, 5), np.float64)
    other = results(kernels, with_context(case, np.float64, 5, transposed=True), np.float64)
    for operation in plain:
        close.check_all("transposed", other[operation], plain[operation], np.float64, "hvp")


@pytest.mark.parametrize("cell", ALL_CELLS)
def test_same_bits_for_any_number_of_threads(kernels, cell):
    data = with_context(Case(cell=cell, B=7, H=37, D=2, lengths="any", recompute=True), np.float32, 19)
    before, every = fusedrnn.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            fusedrnn.set_num_threads(threads)
            every.append(results(kernels, data, np.float32))
    finally:
        fusedrnn.set_num_threads(before)
    for other in every[1:]:
        for operation, arrays in every[0].items():
            for name, array in arrays.items():
                np.testing.assert_array_equal(other[operation][name], array, err_msg=f"{operation}: {name}")


# The front door.


@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("tokens", [False, True])
def test_layer(backend, cell, tokens):
    rng = np.random.default_rng(0)
    layer = getattr(fusedrnn, cell)(5, 6, 2, bidirectional=True, context_size=3, seed=0, dtype=np.float64)
    assert layer.parameters["weight_ch_l0_reverse"].shape[1] == 3
    x = rng.integers(0, 5, (4, 2)) if tokens else rng.standard_normal((4, 2, 5))
    context, lengths = rng.standard_normal((2, 3)), np.array([4, 2])
    y, _ = layer(x, lengths=lengths, context=context)
    dy = rng.standard_normal(y.shape)
    grads = layer.backward(dy)
    assert set(grads) == {"state", "context", *layer.parameters} | (set() if tokens else {"x"})
    # the context as more inputs of a layer without
    plain = getattr(fusedrnn, cell)(8, 6, 2, bidirectional=True, seed=0, dtype=np.float64)
    for name, array in plain.parameters.items():
        own = layer.parameters[name]
        if name.startswith("weight_ih_l0"):
            own = np.concatenate([own, layer.parameters[name.replace("ih", "ch")]], 1)
        array[...] = own
    hot = np.eye(5)[x] if tokens else x
    want, _ = plain(np.concatenate([hot, np.broadcast_to(context, (4, 2, 3))], -1), lengths=lengths)
    want_grads = plain.backward(dy)
    close.check("y", y, want, 1e-14)
    close.check("context", grads["context"], want_grads["x"][..., 5:].sum(0), 1e-14)
    close.check("weight_ch", grads["weight_ch_l0_reverse"], want_grads["weight_ih_l0_reverse"][:, 5:], 1e-14)
    close.check("weight_ih", grads["weight_ih_l0"], want_grads["weight_ih_l0"][:, :5], 1e-14)
    close.check("without a batch", layer(x[:, 0], context=context[0])[0], layer(x, context=context)[0][:, 0], 1e-14)


def test_step_and_bfloat16(backend):
    rng = np.random.default_rng(0)
    layer = fusedrnn.GRU(5, 6, context_size=3, seed=0)
    assert "context_size=3" in repr(layer)
    x, context = rng.standard_normal((4, 2, 5), np.float32), rng.standard_normal((2, 3), np.float32)
    y, _ = layer(x, context=context)
    state = None
    for t in range(4):
        y_t, state = layer.step(x[t], state, context=context)
        close.check("step", y_t, y[t], 2e-6)
    half = parameters.to_bfloat16(layer.parameters)
    got, *_ = fusedrnn.gru(x, None, half, context=context)
    want, *_ = fusedrnn.gru(x, None, parameters.from_bfloat16(half), context=context)
    close.check("bfloat16", got, want, 2e-6)


def test_ensemble_and_flat_parameters(backend):
    rng = np.random.default_rng(1)
    sets = [parameters.init("lstm", 4, 5, dtype=np.float64, seed=k, context_size=2) for k in range(3)]
    x, context = rng.standard_normal((3, 2, 4)), rng.standard_normal((2, 2))
    own = rng.standard_normal((3, 2, 2))  # (E,B,K)
    params = [np.stack([one[name] for one in sets]) for name in sets[0]]
    y, _, tape = fusedrnn.lstm(x, None, params, context=context, training=True)
    dy = rng.standard_normal(y.shape)
    grads = fusedrnn.lstm_backward(tape, dy)
    y_own, *_ = fusedrnn.lstm(x, None, params, context=own)
    total = np.zeros_like(context)
    for k, one in enumerate(sets):
        want, _, tape = fusedrnn.lstm(x, None, one, context=context, training=True)
        close.check("y", y[:, k], want, 1e-14)
        close.check("own", y_own[:, k], fusedrnn.lstm(x, None, one, context=own[k])[0], 1e-14)
        want_grads = fusedrnn.lstm_backward(tape, dy[:, k])
        total += want_grads["context"]
        close.check("weight_ch_l0", grads["weight_ch_l0"][k], want_grads["weight_ch_l0"], 1e-14)
    close.check("context", grads["context"], total, 1e-14)


def test_derivatives(backend):
    rng = np.random.default_rng(2)
    params = parameters.init("gru", 4, 5, dtype=np.float64, seed=0, context_size=3)
    x, context = rng.standard_normal((3, 2, 4)), rng.standard_normal((2, 3))
    y, _, tape = fusedrnn.gru(x, None, params, context=context, training=True)
    weight = rng.standard_normal(y.shape)
    grads = fusedrnn.gru_backward(tape, weight)
    v = {"context": rng.standard_normal((2, 3)), "weight_ch_l0": rng.standard_normal((15, 3))}

    def at(step: float) -> Any:
        moved = params | {"weight_ch_l0": params["weight_ch_l0"] + step * v["weight_ch_l0"]}
        y, _, tape = fusedrnn.gru(x, None, moved, context=context + step * v["context"], training=True)
        return y, fusedrnn.gru_backward(tape, weight)

    (y_up, g_up), (y_down, g_down) = at(1e-5), at(-1e-5)
    tangent = (y_up - y_down) / 2e-5
    close.check("jvp", ops.jvp(tape, v)[0], tangent, 1e-8)
    slope = (grads["context"] * v["context"]).sum() + (grads["weight_ch_l0"] * v["weight_ch_l0"]).sum()
    assert slope == pytest.approx((tangent * weight).sum(), abs=1e-8)
    second = ops.hvp(tape, v, dy=weight)
    for name in ("context", "weight_ch_l0", "weight_ih_l0", "x"):
        close.check(name, second[name], (g_up[name] - g_down[name]) / 2e-5, 1e-7)


def test_errors():
    layer = fusedrnn.LSTM(4, 5, context_size=3, seed=0)
    x, context = np.zeros((3, 2, 4), np.float32), np.zeros((2, 3), np.float32)
    with pytest.raises(ValueError, match="params has 'weight_ch_l0'.*pass context="):
        layer(x)
    with pytest.raises(ValueError, match=r"context has shape \(2, 2\); expected \(2, 3\)|weight_ch_l0 has shape"):
        layer(x, context=context[:, :2])
    with pytest.raises(ValueError, match=r"lstm: context has shape \(3, 3\); expected \(2, 3\) = \(B, K\)"):
        layer(x, context=np.zeros((3, 3), np.float32))
    with pytest.raises(TypeError, match="context has dtype float64; expected float32"):
        layer(x, context=context.astype(float))
    with pytest.raises(TypeError, match="context is a list"):
        layer(x, context=[1.0])
    with pytest.raises(ValueError, match="params has no weight_ch_l0"):
        fusedrnn.LSTM(4, 5)(x, context=context)
    with pytest.raises(ValueError, match="context has K=0"):
        layer(x, context=context[:, :0])


def test_kernels_check_for_themselves(kernels):
    data = with_context(Case(B=3, D=2), np.float64, 4)
    out = empty_results(data.problem, np.float64)

    def refuses(error: type[Exception], text: str, **changes: Any) -> None:
        p = replace(data.p, **changes)
        with pytest.raises(error, match=text):
            kernels.forward(data.problem, p, out, None)

    refuses(TypeError, "come both or not at all", context_weights=None)
    refuses(ValueError, r"a list of D = 2", context_weights=data.p.context_weights[:1])
    one = [data.p.context_weights[0], np.zeros((1, 2, 3))]
    refuses(ValueError, "context_weights.1. has shape", context_weights=one)
    refuses(ValueError, "context has shape", context=np.zeros((1, 4, 4)))
    assert all(np.isnan(a).all() for a in named(out).values())
    plain = replace(data.p, context=None, context_weights=None)
    dp = Arguments(context=np.zeros((1, 3, 4)))
    tape = np.zeros(kernels.tape_elements(data.problem))
    with pytest.raises(ValueError, match="the call has no context"):
        kernels.backward(data.problem, plain, tape, backends.Results(), dp)
