# SPDX-License-Identifier: Apache-2.0
"""The layer objects: torch.nn's behaviour and numbers, streaming, copies, seeds."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest

import close
import fusedrnn

torch = pytest.importorskip("torch")

LAYERS: list[tuple[str, dict[str, Any]]] = [
    ("LSTM", {}),
    ("LSTM", {"clip_cell": 0.5}),
    ("GRU", {}),
    ("GRU", {"reset_after": False}),
    ("RNN", {}),
    ("RNN", {"nonlinearity": "relu"}),
]
WITH_TORCH = [pair for pair in LAYERS if "clip_cell" not in pair[1] and "reset_after" not in pair[1]]


def make(kind: str, *sizes: int, **options: Any) -> Any:
    return getattr(fusedrnn, kind)(*(sizes or (4, 6)), **({"seed": 0, "dtype": np.float64} | options))


def new(*shape: int, seed: int = 0, dtype: Any = np.float64) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def parts(state: Any) -> tuple[np.ndarray, ...]:
    return state if isinstance(state, tuple) else (state,)


def same(name: str, a: Any, b: Any, budget: float = 0) -> None:
    for k, (left, right) in enumerate(zip(parts(a), parts(b), strict=True)):
        close.check(f"{name}[{k}]", left, right, budget)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(("L", "bidirectional", "bias"), [(1, False, True), (2, True, False), (3, False, True)])
@pytest.mark.parametrize(("kind", "extra"), WITH_TORCH)
def test_numbers_of_torch(backend, kind, extra, L, bidirectional, bias, batch_first, dtype):
    """The same state_dict, input, state and gradients: the same results; batched and not, training and eval."""
    options = {"num_layers": L, "bias": bias, "batch_first": batch_first, "bidirectional": bidirectional, **extra}
    layer = make(kind, dtype=dtype, **options)
    theirs = getattr(torch.nn, kind)(4, 6, dtype=torch.from_numpy(np.zeros(1, dtype)).dtype, **options)
    theirs.load_state_dict({name: torch.from_numpy(a) for name, a in layer.state_dict().items()})
    D = 2 if bidirectional else 1
    forward, backward = (2e-6, 1e-5) if dtype == np.float32 else (1e-14, 1e-13)
    for shape, rows in (((5, 3, 4), (3,)), ((5, 4), ())):
        batch = ((3, 5, 4) if batch_first else shape) if rows else shape
        x, h = new(*batch, dtype=dtype), new(L * D, *rows, 6, seed=1, dtype=dtype)
        state = (h, new(L * D, *rows, 6, seed=2, dtype=dtype)) if kind == "LSTM" else h
        tx = torch.from_numpy(x).requires_grad_()
        tstate = tuple(torch.from_numpy(s).requires_grad_() for s in parts(state))
        ty, tlast = theirs(tx, tstate if kind == "LSTM" else tstate[0])
        y, last = layer(x, state)
        same("y", y, ty.detach().numpy(), forward)
        same("state", last, tuple(s.detach().numpy() for s in parts(tlast)), forward)
        pairs = [(ty, y), *zip(parts(tlast), parts(last), strict=True)]
        loss = sum((a * torch.from_numpy(b)).sum() for a, b in pairs)
        theirs.zero_grad()
        loss.backward()
        grads = layer.backward(y, last)
        same("dx", grads["x"], tx.grad.numpy(), backward)
        same("dstate", grads["state"], tuple(s.grad.numpy() for s in tstate), backward)
        for name, value in theirs.named_parameters():
            same(name, grads[name], value.grad.numpy(), backward)
        layer.eval()
        same("eval", layer(x, state)[0], y, forward)
        same("eval without state", layer(x)[0], theirs(tx)[0].detach().numpy(), forward)
        layer.train()


@pytest.mark.parametrize(("kind", "extra"), WITH_TORCH)
def test_weights_from_torch(kind, extra):
    theirs = getattr(torch.nn, kind)(4, 6, 2, bidirectional=True, **extra)
    layer = make(kind, num_layers=2, bidirectional=True, dtype=np.float32, **extra)
    layer.load_state_dict(theirs.state_dict())
    assert list(layer.parameters) == [name for name, _ in theirs.named_parameters()]
    x = new(5, 3, 4, dtype=np.float32)
    close.check("y", layer(x)[0], theirs(torch.from_numpy(x))[0].detach().numpy(), 2e-6)


def test_parameters_are_live(backend):
    """Changed in place or replaced, they count at the next call."""
    layer, x = make("GRU"), new(5, 3, 4)
    for mode in (layer.train, layer.eval):
        mode()
        first = layer(x)[0]
        layer.parameters["weight_hh_l0"] *= 0.5
        second = layer(x)[0]
        assert not np.array_equal(first, second)
        layer.parameters["weight_hh_l0"] = layer.parameters["weight_hh_l0"] * 2
        same("y", layer(x)[0], first, 1e-15)
        assert layer.state_dict()["weight_hh_l0"] is not layer.parameters["weight_hh_l0"]


def test_lengths_resets_and_cells(backend):
    layer, x = make("LSTM", num_layers=2, batch_first=True), new(3, 5, 4)
    lengths, reset = np.array([5, 0, 2]), new(3, 5) > 0.5
    for _ in range(2):
        y, state, cells = layer(x, lengths=lengths, reset=reset, return_cells=True)
        want = fusedrnn.lstm(
            x, None, layer.parameters, num_layers=2, batch_first=True, lengths=lengths, reset=reset, return_cells=True
        )
        same("y", y, want[0], 1e-15)
        same("state", state, want[1], 1e-15)
        same("cells", cells, want[2], 1e-15)
        layer.eval()


def test_options_reach_the_kernels(backend):
    """clip_cell, clip_grad and recompute are what ops is told."""
    options = {"clip_cell": 0.3, "clip_grad": 0.1}
    layer, x = make("LSTM", recompute=True, **options), 3 * new(9, 3, 4)
    assert layer.clip_cell == 0.3
    y, _, tape = fusedrnn.lstm(x, None, layer.parameters, training=True, **options)
    assert np.abs(layer(x, return_cells=True)[2]).max() == 0.3
    dy = np.ones_like(y)
    want = fusedrnn.lstm_backward(tape, dy)
    for name, value in layer.backward(dy).items():
        same(name, value, want[name], 1e-13)
    same("eval", layer.eval()(x)[0], y, 1e-15)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("rows", [(), (1,), (7,)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("kind", "extra"), LAYERS)
def test_step_is_forward(backend, kind, extra, dtype, rows, batch_first):
    """Step by step, over changing states, gives what the whole sequence gives."""
    layer = make(kind, num_layers=2, dtype=dtype, batch_first=batch_first, dropout=0.5, **extra)
    x = new(6, *rows, 4, dtype=dtype)
    budget = 2e-6 if dtype == np.float32 else 1e-14
    whole = x.swapaxes(0, 1) if batch_first and rows else x
    want, last = layer.eval()(whole)
    if batch_first and rows:
        want = want.swapaxes(0, 1)
    for mode in (layer.eval, layer.train):  # no dropout in either
        mode()
        state = None
        for t in range(6):
            y, state = layer.step(x[t], state)
            assert y.shape == (*rows, 6)
            same("y", y, want[t], budget)
        same("state", state, last, budget)


def test_steps_do_not_overwrite_what_they_read(backend):
    """Two streams through one layer, states passed back and forth; a stored copy stays."""
    layer = make("LSTM", num_layers=2)
    x = new(8, 2, 3, 4)
    want = [layer.eval()(x[:, k])[0] for k in range(2)]
    states: list[Any] = [None, None]
    for t in range(8):
        for k in range(2):
            y, state = layer.step(x[t, k], states[k])
            same("y", y, want[k][t], 1e-14)
            states[k] = tuple(s.copy() for s in state)
    one = layer.step(x[0, 0])[1]
    again = [layer.step(x[1, 0], one)[0].copy() for _ in range(3)]  # the same state, three times
    same("y", again[0], again[2], 0)


def test_step_makes_no_arrays():
    """On the native backend the same buffers come back in turns."""
    if fusedrnn.backends.missing("native"):
        pytest.skip("no native backend here")
    layer, x = make("LSTM", backend="native"), new(3, 4)
    state, seen = None, set()
    for _ in range(10):
        y, state = layer.step(x, state)
        seen.add((y.ctypes.data, state[0].ctypes.data, state[1].ctypes.data))
    assert len(seen) == 2


def test_wrong_steps():
    with pytest.raises(ValueError, match=r"GRU.step: layer is bidirectional; expected one direction"):
        make("GRU", bidirectional=True).step(new(3, 4))
    with pytest.raises(ValueError, match=r"GRU.step: x_t has shape \(5, 3, 4\); expected \(B,I\) or \(I,\)"):
        make("GRU").step(new(5, 3, 4))
    with pytest.raises(TypeError, match=r"GRU.step: x_t has dtype float32; expected float64, the dtype of the layer"):
        make("GRU").step(new(3, 4, dtype=np.float32))
    with pytest.raises(ValueError, match=r"weight_ih_l0 has shape \(18, 4\); expected \(18, 5\)"):
        make("GRU").step(new(3, 5))


def test_wrong_calls_in_eval_mode(backend):
    """The short way into the kernels declines what it does not know, and the full way words the error."""
    layer = make("LSTM").eval()
    x, h = new(5, 3, 4), new(1, 3, 6)
    with pytest.raises(TypeError, match=r"weight_ih_l0 has dtype float64; expected float32, the dtype of x"):
        layer(x.astype(np.float32))
    with pytest.raises(TypeError, match="expected a pair"):
        layer(x, h)
    with pytest.raises(ValueError, match=r"state\[1\] has shape"):
        layer(x, (h, h[:, :2]))
    with pytest.raises(TypeError, match="expected a NumPy array"):
        layer(x.tolist())
    assert layer(x[:0])[0].shape == (0, 3, 6)
    assert layer(x[:, :0])[0].shape == (5, 0, 6)


def test_backward_says_why_there_is_no_tape(backend):
    """Each way of having none, in training and in eval mode, by the short way into the kernels and by the long one."""

    def why(layer: Any) -> str:
        with pytest.raises(RuntimeError, match=r"RNN.backward: no tape, because ") as error:
            layer.backward(y)
        return str(error.value)

    x = new(5, 3, 4)
    for long in ({}, {"return_cells": True}):
        for mode in (True, False):
            layer = make("RNN").train(mode)
            y, state = layer.step(x[0])
            assert "there was no layer(x) since it was made" in why(layer)
            assert "there was no layer(x) since it was made" in why(copy.copy(layer))
            with pytest.raises(ValueError, match="weight_ih_l0 has shape"):
                layer(x[..., :2], **long)
            assert ("the last call raised ValueError" if mode else "the last call ran in eval mode") in why(layer)
            y, *_ = layer.eval()(x, **long)
            assert "the last call ran in eval mode. Call layer.train(), then layer(x)" in why(layer)
            assert "the last call ran in eval mode" in why(layer.train())
        y, *_ = layer(x, **long)
        want = layer.backward(y)
        layer.step(x[0])
        with pytest.raises(ValueError, match="weight_ih_l0 has shape"):
            layer(x[..., :2])  # a call that fails leaves the old tape whole
        layer.parameters["weight_hh_l0"] = np.zeros((6, 6))  # replaced: the gradient is of the array that was there
        for mode in (True, False):
            got = layer.train(mode).backward(y)
            for name in want:
                same(name, got[name], want[name])
        layer.load_state_dict(layer.state_dict())
        assert "load_state_dict changed the parameters after the last call" in why(layer)


@pytest.mark.parametrize(("kind", "extra"), LAYERS)
@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["copy", "pickle"]
)
def test_copies(backend, kind, extra, how):
    """A copy computes the same, goes on with the same dropout masks, and is its own."""
    layer = make(kind, num_layers=2, dropout=0.5, bidirectional=True, **extra)
    x = new(5, 3, 4)
    layer(x)
    other = how(layer)
    with pytest.raises(RuntimeError, match="no tape"):
        other.backward(x)
    assert repr(other) == repr(layer)
    assert other.draws == layer.draws == 1
    same("y", other(x)[0], layer(x)[0])
    same("y", other.eval()(x)[0], layer.eval()(x)[0])
    other.parameters["weight_ih_l0"][...] = 0
    assert layer.parameters["weight_ih_l0"].any()
    assert not other.training


def test_shallow_copy_shares_weights(backend):
    layer, x = make("GRU"), new(5, 3, 4)
    other = copy.copy(layer)
    y, _ = layer(x)
    other(2 * x)
    other.parameters["weight_ih_l0"][...] *= 2
    assert not np.array_equal(layer(x)[0], y)
    layer.backward(y)


def test_dropout_masks_differ_and_repeat(backend):
    x = new(5, 3, 4)
    layer, twin = (make("GRU", num_layers=2, dropout=0.5) for _ in range(2))
    first = [layer(x)[0] for _ in range(3)]
    assert not np.array_equal(first[0], first[1])
    for y in first:
        same("twin", twin(x)[0], y)
    layer.draws = 1  # resumed after one call
    same("resumed", layer(x)[0], first[1])
    assert layer.draws == 2
    layer.eval()(x)
    assert layer.draws == 2
    other = make("GRU", num_layers=2, dropout=0.5, seed=1)
    other.load_state_dict(layer.state_dict())
    assert not np.array_equal(other(x)[0], first[0])


def test_dropout_gradient_is_of_the_mask_drawn(backend):
    layer = make("RNN", num_layers=2, dropout=0.5, nonlinearity="relu")
    x, s = new(5, 3, 4), 1e-6
    y, _ = layer(x)
    grads = layer.backward(np.ones_like(y))
    v = new(5, 3, 4, seed=1)
    ends = []
    for sign in (1, -1):
        layer.draws = 0
        ends.append(layer(x + sign * s * v)[0].sum())
    assert (ends[0] - ends[1]) / (2 * s) == pytest.approx((grads["x"] * v).sum(), rel=1e-6)


def test_repr():
    assert repr(make("LSTM")) == "LSTM(4, 6)"
    assert repr(make("GRU", num_layers=2, batch_first=True)) == "GRU(4, 6, num_layers=2, batch_first=True)"


def test_backend_of_a_layer_and_of_all(backend):
    layer, x = make("GRU", backend="reference").eval(), new(5, 3, 4)
    y = layer(x)[0]
    same("y", make("GRU").eval()(x)[0], y, 1e-14)
    layer.backend = "no such"
    with pytest.raises(ValueError, match="backend is 'no such'"):
        layer(x)


def test_threads_share_a_layer():
    """Several Python threads call one layer at once, whole and step by step."""
    layer = make("LSTM", 16, 64, num_layers=2).eval()
    x = new(20, 8, 16)
    want, errors = layer(x)[0].copy(), []

    def work() -> None:
        try:
            for _ in range(10):
                close.check("y", layer(x)[0], want, 0)
                state = None
                for t in range(3):
                    y, state = (lambda r: (r[0].copy(), tuple(s.copy() for s in r[1])))(layer.step(x[t], state))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_layer_in_a_fresh_process():
    """A pickle made here runs there, to the same bits."""
    layer, x = make("LSTM", num_layers=2).eval(), new(5, 3, 4)
    code = (
        "import pickle, sys; layer, x = pickle.load(sys.stdin.buffer); "
        "sys.stdout.buffer.write(pickle.dumps(layer(x)[0]))"
    )
    sent = pickle.dumps((layer, x))
    found = subprocess.run([sys.executable, "-c", code], input=sent, capture_output=True, check=True)
    same("y", pickle.loads(found.stdout), layer(x)[0])


@pytest.mark.parametrize("recompute", [False, True])
def test_a_tape_takes_over_the_memory_of_the_last(backend, recompute):
    """Where that is large enough, and not for a call that fails. The numbers are those of a new layer."""

    def memory(tape: Any) -> Any:
        return tape.memory if isinstance(tape, fusedrnn.layers.Recorded) else tape.buffer.base

    layer, x = make("LSTM", recompute=recompute), new(9, 3, 4)
    layer(x)
    before = memory(layer._tape)
    for T, kept in ((9, True), (7, True), (9, True), (3, False), (9, False), (9, True)):
        y, _ = layer(x[:T])
        whole = memory(layer._tape)
        nothing = backend == "reference"  # it keeps nothing
        assert (whole is before) == kept or nothing, T
        before = whole
        with pytest.raises(ValueError, match="weight_ih_l0 has shape"):
            layer(x[..., :2])
        other = make("LSTM", recompute=recompute)
        same("y", y, other(x[:T])[0])
        got, want = layer.backward(y), other.backward(y)
        for name in want:
            same(name, got[name], want[name])
    *_, tape = fusedrnn.lstm(x, None, layer.parameters, training=True)
    fusedrnn.lstm(x, None, layer.parameters, training=True, reuse=tape)
    with pytest.raises(ValueError, match="tape lost its memory to a later call; expected the latest tape"):
        fusedrnn.lstm_backward(tape, y)


@pytest.mark.parametrize("shape", ["batched", "unbatched", "strided"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 2, "bidirectional": True, "bias": False, "batch_first": True, "dtype": np.float32},
        {"num_layers": 3, "recompute": True, "clip_grad": 0.1},
        {"batch_first": True, "clip_grad": 1, "dtype": np.float32},
    ],
)
@pytest.mark.parametrize(("kind", "extra"), LAYERS)
def test_training_the_short_way_is_the_long_way(kind, extra, options, shape):
    """The same bits, names and order as of the function that takes every option, into arrays of the same shapes."""
    layer = make(kind, backend="native", **options, **extra)
    dtype, rows = layer.dtype, () if shape == "unbatched" else (3,)
    x = new(*((3, 5) if layer.batch_first and rows else (5, *rows)), 4, dtype=dtype)
    if shape == "strided":
        x = np.repeat(x, 2, axis=-1)[::-1, :, ::2]
    count = layer.num_layers * (1 + layer.bidirectional)
    h, c, dh, dc = (new(count, *rows, 6, seed=n, dtype=dtype) for n in range(4))
    lstm = kind == "LSTM"
    for state, dstate in ((None, None), ((h, c) if lstm else h, [dh, dc] if lstm else dh)):
        y, last = layer(x, state)
        assert type(layer._tape) is fusedrnn.layers.Recorded
        *expected, tape = layer._run(x, state, training=True)
        assert type(tape) is fusedrnn.ops.Tape
        same("results", (y, *parts(last)), (expected[0], *parts(expected[1])))
        for dy in (None, np.cos(y), np.cos(y)[::-1]):
            got = layer.backward(dy, dstate)
            assert type(layer._tape) is fusedrnn.layers.Recorded
            want = getattr(fusedrnn, f"{layer._op}_backward")(tape, dy, dstate)
            assert list(got) == list(want)
            for name in want:
                same(name, got[name], want[name])
    cells = np.ones((layer.num_layers, *y.shape), dtype)  # the short way does not know them
    for name, grad in getattr(fusedrnn, f"{layer._op}_backward")(tape, None, None, cells).items():
        same(name, layer.backward(None, None, cells)[name], grad)


def test_a_recorded_call_keeps_its_weights():
    """New arrays in `parameters` between call and backward are the next call's; wrong gradients get their message."""
    layer, x = make("GRU", backend="native"), new(5, 3, 4)
    y, _ = layer(x)
    expected = layer.backward(np.cos(y))
    old = layer.parameters
    layer.parameters = {name: 2 * a for name, a in reversed(old.items())}
    for name, grad in layer.backward(np.cos(y)).items():
        same(name, grad, expected[name])
    with pytest.raises(ValueError, match=r"gru_backward: dy has shape \(4, 3, 6\); expected \(5, 3, 6\)"):
        layer.backward(y[1:])
    with pytest.raises(TypeError, match="gru_backward: dstate is a tuple; expected one array h"):
        layer.backward(y, (y, y))
    for name, grad in layer.backward(np.cos(y)).items():  # by now on the long way
        same(name, grad, expected[name])
    layer.clip_grad = -1.0
    with pytest.raises(ValueError, match="clip_grad is -1.0"):
        layer(x)
    layer.clip_grad, layer.parameters = None, old
    y, _ = layer(x)
    with pytest.raises(TypeError, match="weight_ih_l0 has dtype float64; expected float32"):
        layer(x.astype(np.float32))
    same("weights", layer.backward(np.cos(y))["weight_hh_l0"], expected["weight_hh_l0"])


def test_a_clipped_cell_state_lets_no_nan_back(backend):
    """Where |c| was clipped its gradient is 0, whatever comes in; the other rows' are what they were."""
    params = {"weight_ih_l0": np.ones((4, 1), np.float32), "weight_hh_l0": np.zeros((4, 1), np.float32)}
    x = np.array([[[9.0], [0.1]]], np.float32)
    y, state, tape = fusedrnn.lstm(x, None, params, training=True, clip_cell=0.5)
    dc = np.array([[[np.nan], [1.0]]], np.float32)
    dx = fusedrnn.lstm_backward(tape, dstate=(np.zeros_like(dc), dc))["x"]
    assert dx[0, 0] == 0 and dx[0, 1] > 0


def test_relu_selects(backend):
    """relu(-inf) is 0, and a unit at 0 lets no NaN back."""
    params = {"weight_ih_l0": np.ones((1, 1), np.float32), "weight_hh_l0": np.zeros((1, 1), np.float32)}
    x = np.array([[[-np.inf], [-1.0], [2.0]]], np.float32)
    y, _, tape = fusedrnn.rnn(x, None, params, nonlinearity="relu", training=True)
    assert y.ravel().tolist() == [0, 0, 2]
    dy = np.array([[[np.nan], [np.nan], [3.0]]], np.float32)
    assert fusedrnn.rnn_backward(tape, dy)["x"].ravel().tolist() == [0, 0, 3]
