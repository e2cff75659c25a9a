# SPDX-License-Identifier: Apache-2.0
"""Token input: every backend against the one-hot vectors that tokens stand for, and against torch's embedding."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import close
import fusedrnn
from fusedrnn import backends, ops, tbptt
from fusedrnn import params as parameters
from fusedrnn.backends import Arguments, reference
from shapes import ALL_CELLS, Case, build, empty_arguments, empty_results, named

# I is the vocabulary. Columns are packed unless I is more than tokens times the rows of W; then they are read where
# they lie: 3000 > 5 * 3 * 4 * H.
CASES = [
    Case(**({"T": 5} | options))
    for options in [
        {"I": 7, "B": 3},
        {"I": 200, "B": 3},
        {"I": 200, "B": 3, "layout": "column"},
        {"I": 3000, "B": 3},
        {"I": 3000, "B": 3, "layout": "column", "lengths": "any", "L": 2},
        {"I": 101, "B": 9, "H": 35, "layout": "strided", "lengths": "any"},
        {"I": 3, "B": 17, "H": 17},
        {"I": 1, "B": 1, "H": 33},
        {"I": 50, "B": 1, "H": 16, "bias": False, "state": False},
        {"I": 40, "B": 4, "reverse": True, "layout": "strided"},
        {"I": 9, "B": 5, "L": 2, "D": 2, "lengths": "any", "reset": 0.3, "dropout": 0.4, "H": 9},
        {"I": 90, "B": 5, "D": 2, "recompute": True, "lengths": "any", "T": 19},
        {"I": 9, "B": 5, "recompute": True, "layout": "negative", "reset": 0.3, "to_initial": True},
        {"I": 9, "B": 4, "E": 3, "lengths": "any", "clip_grad": 0.3},
        {"I": 60, "B": 2, "E": 3, "layout": "shared", "D": 2},
        {"I": 11, "B": 2, "E": 2, "L": 2, "D": 2},
        {"I": 6, "B": 100, "T": 13, "H": 3},
        {"I": 6, "B": 2, "T": 0},
        {"I": 6, "B": 3, "lengths": "zero", "D": 2},
    ]
]


def tokens_for(case: Case, dtype: Any, kind: Any = np.int64) -> tuple[Any, np.ndarray]:
    """The case's arrays with one-hot vectors for x, and the tokens; those past a row's length are nonsense."""
    data = build(case, dtype)
    p = data.problem
    tokens = np.random.default_rng(case.T + case.I).integers(0, p.I, (p.T, p.E, p.B)).astype(kind)
    x = np.eye(p.I, dtype=dtype)[tokens]
    if p.lengths is not None:
        past = np.arange(p.T)[:, None, None] >= p.lengths
        tokens[past] = 99 if kind == np.uint8 else -7
    data.p.x, data.v.x = x, None
    return data, tokens


def results(route: Any, data: Any, x: np.ndarray, dtype: Any) -> dict[str, dict[str, np.ndarray]]:
    """All four operations into poisoned arrays, without the gradient of x."""
    p = Arguments(x, data.p.h0, data.p.c0, data.p.params)
    out, plain, tout = (empty_results(data.problem, dtype) for _ in range(3))
    dp, tdp = empty_arguments(data, dtype), empty_arguments(data, dtype)
    dp.x = tdp.x = None
    tape = np.full(route.tape_elements(data.problem), np.nan, dtype)
    route.forward(data.problem, p, plain, None)
    route.forward(data.problem, p, out, tape)
    route.backward(data.problem, p, tape, data.g, dp)
    route.jvp(data.problem, p, data.v, tout)
    route.hvp(data.problem, p, data.v, data.g, data.t, tdp)
    parts = {"plain": plain, "forward": out, "backward": dp, "jvp": tout, "hvp": tdp}
    return {operation: named(arrays) for operation, arrays in parts.items()}


@functools.cache
def one_hot_results(case: Case, dtype: str) -> dict[str, dict[str, np.ndarray]]:
    """What the reference says of the vectors."""
    data, _ = tokens_for(case, dtype)
    return results(reference, data, data.p.x, np.float64)


@pytest.mark.parametrize("case", [replace(case, cell=cell) for case in CASES for cell in ALL_CELLS], ids=str)
def test_as_one_hot(judged, case):
    dtype = "float64" if case.I == 9 else "float32"
    data, tokens = tokens_for(case, dtype)
    want = one_hot_results(case, dtype)
    for operation, values in results(judged, data, tokens, dtype).items():
        budget = "forward" if operation == "plain" else operation
        close.check_all(f"{case}", values, want[operation], dtype, budget)


@pytest.mark.parametrize("kind", ["b", "B", "h", "H", "i", "I", "l", "L", "q", "Q"])
def test_every_integer_type(judged, kind):
    data, tokens = tokens_for(Case(I=9, B=4, lengths="any"), np.float32, np.uint8)
    values = [np.where(tokens == 99, 0, tokens).astype(kind), tokens.astype(np.dtype(kind))[:, :, ::-1][:, :, ::-1]]
    want = results(judged, data, data.p.x, np.float32)["forward"]
    for given in values:
        got = results(judged, data, given, np.float32)["forward"]
        close.check_all(kind, got, want, np.float32, "forward")


@pytest.mark.parametrize("cell", ALL_CELLS)
@pytest.mark.parametrize("case", [CASES[10], CASES[11], CASES[14]], ids=str)
def test_same_bits_for_any_number_of_threads(kernels, cell, case):
    data, tokens = tokens_for(replace(case, cell=cell), np.float32)
    before = fusedrnn.get_num_threads()
    every = []
    try:
        for threads in (1, 2, 3):
            fusedrnn.set_num_threads(threads)
            every.append(results(kernels, data, tokens, np.float32))
    finally:
        fusedrnn.set_num_threads(before)
    for other in every[1:]:
        for operation, arrays in every[0].items():
            for name, array in arrays.items():
                np.testing.assert_array_equal(other[operation][name], array, err_msg=f"{operation}: {name}")


@pytest.mark.parametrize("rows_too", [False, True])
def test_shared_weights_with_gradients_apart(judged, rows_too):
    """W is shared over E, its gradient is not: as a caller of the backends may ask for."""
    data, tokens = tokens_for(Case(I=9, B=3, E=3, D=2, layout="shared", lengths="any"), np.float64)
    want, got = (empty_arguments(data, np.float64) for _ in range(2))
    for arrays in (want, got):
        apart = [np.full(W.shape, np.nan) for W, *_ in arrays.params]
        arrays.params = [(W, *rest) for W, (_, *rest) in zip(apart, arrays.params, strict=True)]
        if rows_too:
            arrays.params[1] = (None, *arrays.params[1][1:])
        arrays.x = None
    for route, x, arrays in ((reference, data.p.x, want), (judged, tokens, got)):
        p = Arguments(x, data.p.h0, data.p.c0, data.p.params)
        tape = np.full(route.tape_elements(data.problem), np.nan)
        route.forward(data.problem, p, backends.Results(), tape)
        route.backward(data.problem, p, tape, data.g, arrays)
    close.check_all("apart", named(got), named(want), np.float64, "backward")


# The front door.


def test_layouts(backend):
    rng = np.random.default_rng(0)
    tokens, reset, lengths = rng.integers(0, 11, (6, 3)), rng.random((6, 3)) < 0.3, np.array([6, 0, 4])
    params = parameters.init("lstm", 11, 5, 2, True, dtype=np.float64, seed=1)
    options: dict[str, Any] = {"num_layers": 2, "bidirectional": True, "training": True}
    hot = np.eye(11)[tokens]
    want, want_state, tape = fusedrnn.lstm(hot, None, params, reset=reset, lengths=lengths, **options)
    dy = rng.standard_normal(want.shape)
    want_grads = fusedrnn.lstm_backward(tape, dy)
    assert want_grads.pop("x").shape == hot.shape
    y, state, tape = fusedrnn.lstm(tokens, None, params, reset=reset, lengths=lengths, **options)
    grads = fusedrnn.lstm_backward(tape, dy)
    assert "x" not in grads
    close.check("y", y, want, 4e-15)
    close.check("c", state[1], want_state[1], 4e-15)
    for name in params:
        close.check(name, grads[name], want_grads[name], 1e-14)
    first = np.ascontiguousarray(tokens.T).astype(np.uint8)
    y, *_ = fusedrnn.lstm(first, None, params, reset=reset.T, lengths=lengths, batch_first=True, **options)
    close.check("batch first", y.swapaxes(0, 1), want, 4e-15)
    y, *_ = fusedrnn.lstm(tokens[:, 0], None, params, reset=reset[:, 0], **options)
    close.check("unbatched", y, want[:, 0], 4e-15)


def test_ensemble(backend):
    rng = np.random.default_rng(3)
    one = [parameters.init("gru", 8, 5, dtype=np.float64, seed=k) for k in range(3)]
    params = {name: np.stack([p[name] for p in one]) for name in one[0]}
    tokens = rng.integers(0, 8, (4, 2))
    y, h, tape = fusedrnn.gru(tokens, None, params, training=True)
    dy = rng.standard_normal(y.shape)
    grads = fusedrnn.gru_backward(tape, dy)
    for k in range(3):
        want, _, tape = fusedrnn.gru(np.eye(8)[tokens], None, one[k], training=True)
        close.check(f"y[{k}]", y[:, k], want, 4e-15)
        want_grads = fusedrnn.gru_backward(tape, dy[:, k])
        for name in params:
            close.check(f"{name}[{k}]", grads[name][k], want_grads[name], 1e-14)
    each = rng.integers(0, 8, (4, 3, 2))  # (T,E,B)
    y, *_ = fusedrnn.gru(each, None, params)
    close.check("own tokens", y[:, 1], fusedrnn.gru(each[:, 1], None, one[1])[0], 4e-15)


@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_layer_step_and_tbptt(backend, cell):
    rng = np.random.default_rng(1)
    layer = getattr(fusedrnn, cell)(13, 6, 2, seed=0, dtype=np.float64)
    tokens = rng.integers(0, 13, (9, 2))
    hot = np.eye(13)[tokens]
    y, last = layer(tokens)
    close.check("y", y, layer(hot)[0], 4e-15)
    state = None
    for t in range(9):
        y_t, state = layer.step(tokens[t], state)
        close.check(f"step {t}", y_t, y[t], 4e-15)
    y_0, _ = layer.step(3)
    close.check("one integer", y_0, layer.step(np.eye(13)[3])[0], 4e-15)
    for k2 in (3, 5, 2):
        both = []
        for x in (tokens, hot):
            grads = [c.backward(np.ones_like(c.y)) for c in tbptt.chunks(layer, x, k1=3, k2=k2, reset=tokens == 0)]
            both.append(grads)
        for got, want in zip(*both, strict=True):
            assert "x" not in got
            for name in layer.parameters:
                close.check(name, got[name], want[name], 1e-14)


def test_torch_embedding(backend):
    """An embedding in front is the same look-up: folded into weight_ih_l0 it gives torch's numbers and gradients."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    embedding, lstm = torch.nn.Embedding(12, 5).double(), torch.nn.LSTM(5, 7).double()
    tokens = np.random.default_rng(0).integers(0, 12, (6, 3))
    want, _ = lstm(embedding(torch.from_numpy(tokens)))
    params = {name: tensor.detach().numpy() for name, tensor in lstm.named_parameters()}
    E, W = embedding.weight.detach().numpy(), params["weight_ih_l0"]
    y, _, tape = fusedrnn.lstm(tokens, None, params | {"weight_ih_l0": W @ E.T}, training=True)
    close.check("y", y, want.detach().numpy(), 1e-14)
    want.sum().backward()
    grads = fusedrnn.lstm_backward(tape, np.ones_like(y))
    close.check("dE", (grads["weight_ih_l0"].T @ W), embedding.weight.grad.numpy(), 1e-13)
    close.check("dW", grads["weight_ih_l0"] @ E, lstm.weight_ih_l0.grad.numpy(), 1e-13)
    close.check("dR", grads["weight_hh_l0"], lstm.weight_hh_l0.grad.numpy(), 1e-13)


def test_finite_differences(backend):
    params = parameters.init("gru_reset_before", 6, 4, dtype=np.float64, seed=2)
    tokens = np.array([[1, 5], [1, 0], [2, 5]])
    y, _, tape = fusedrnn.gru(tokens, None, params, reset_after=False, training=True)
    grads = fusedrnn.gru_backward(tape, np.ones_like(y))
    for name, at in (
        ("weight_ih_l0", (2, 1)),
        ("weight_ih_l0", (9, 5)),
        ("weight_ih_l0", (3, 3)),
        ("bias_ih_l0", (8,)),
    ):
        ends = []
        for step in (1e-6, -1e-6):
            moved = {key: value.copy() for key, value in params.items()}
            moved[name][at] += step
            ends.append(fusedrnn.gru(tokens, None, moved, reset_after=False)[0].sum())
        assert grads[name][at] == pytest.approx((ends[0] - ends[1]) / 2e-6, abs=1e-8), (name, at)


def test_jvp_and_hvp(backend):
    rng = np.random.default_rng(5)
    params = parameters.init("lstm", 6, 4, dtype=np.float64, seed=2)
    tokens = rng.integers(0, 6, (5, 2))
    v = {"weight_ih_l0": rng.standard_normal((16, 6))}
    found = []
    for x in (tokens, np.eye(6)[tokens]):
        y, _, tape = fusedrnn.lstm(x, None, params, training=True)
        second = ops.hvp(tape, v, dy=np.ones_like(y))
        found.append((ops.jvp(tape, v)[0], second["weight_ih_l0"], second["weight_hh_l0"]))
    for got, want in zip(*found, strict=True):
        close.check("tangent", got, want, 4e-14)
    tape = fusedrnn.lstm(tokens, None, params, training=True)[2]
    with pytest.raises(ValueError, match="Tokens are integers: they have no tangent"):
        ops.jvp(tape, {"x": np.zeros((5, 2, 6))})


@pytest.mark.parametrize("V", [5, 300])
def test_bfloat16_weights(backend, V):
    params = parameters.to_bfloat16(parameters.init("lstm", V, 17, seed=0))
    tokens = np.random.default_rng(0).integers(0, V, (6, 3))
    y, *_ = fusedrnn.lstm(tokens, None, params)
    want, *_ = fusedrnn.lstm(np.eye(V, dtype=np.float32)[tokens], None, params)
    assert y.dtype == np.float32
    close.check("y", y, want, 2e-6)


# Errors.


@pytest.mark.parametrize("bad", [-1, 8, 2**40])
def test_out_of_range(backend, bad):
    layer = fusedrnn.LSTM(8, 4, batch_first=True, seed=0)
    tokens = np.zeros((2, 5), np.int64)
    tokens[1, 3] = bad
    with pytest.raises(ValueError, match=rf"lstm: x has token {bad} \(at step 3, row 1\); expected 0 <= token < 8"):
        layer(tokens)
    y, _ = layer(tokens, lengths=[5, 3])  # past the row's length it is not read
    assert np.isfinite(y).all()
    with pytest.raises(ValueError, match="token"):
        layer.step(tokens[:, 3])


def test_nothing_is_written(route):
    data, tokens = tokens_for(Case(I=9, B=4), np.float64)
    out = empty_results(data.problem, np.float64)
    for bad in (-1, 9):
        tokens[2, 0, 1] = bad
        with pytest.raises(ValueError, match="token"):
            route.forward(data.problem, Arguments(tokens, data.p.h0, data.p.c0, data.p.params), out, None)
    assert all(np.isnan(a).all() for a in named(out).values())


def test_other_errors():
    params = parameters.init("rnn_tanh", 4, 3, seed=0)
    with pytest.raises(ValueError, match=r"x has shape \(\); expected \(T,B\), or \(T,\) without a batch"):
        fusedrnn.rnn(np.array(3), None, params)
    with pytest.raises(TypeError, match="native byte order"):
        fusedrnn.rnn(np.zeros((2, 3), ">i4"), None, params)
    with pytest.raises(TypeError, match="x has dtype bool"):
        fusedrnn.rnn(np.zeros((2, 3), bool), None, params)
    with pytest.raises(ValueError, match=r"x_t has shape \(2, 3\); expected \(B,\) or one integer"):
        fusedrnn.RNN(4, 3).step(np.zeros((2, 3), int))


def test_kernels_refuse_gradients_of_tokens(kernels):
    data, tokens = tokens_for(Case(I=9, B=4), np.float64)
    p = Arguments(tokens, data.p.h0, data.p.c0, data.p.params)
    tape = np.zeros(kernels.tape_elements(data.problem))
    kernels.forward(data.problem, p, empty_results(data.problem, np.float64), tape)
    with pytest.raises(ValueError, match=r"dp.x is given; expected None: tokens have no tangent and no gradient"):
        kernels.backward(data.problem, p, tape, data.g, empty_arguments(data, np.float64))


def test_columns_that_no_token_names_are_not_read(backend):
    """NaN and inf there reach nothing, and in a column that is named only the rows that name it."""
    layer = fusedrnn.LSTM(9, 5, seed=0).eval()
    tokens = np.array([[0, 3, 1], [2, 2, 1], [0, 5, 7]])
    want, _ = layer(tokens)
    layer.parameters["weight_ih_l0"][:, [4, 6]] = np.nan, np.inf
    layer.parameters["weight_ih_l0"][:, 5] = np.nan
    got, _ = layer(tokens)
    np.testing.assert_array_equal(got[:, [0, 2]], want[:, [0, 2]])
    np.testing.assert_array_equal(got[:2, 1], want[:2, 1])
    assert np.isnan(got[2, 1]).all()
