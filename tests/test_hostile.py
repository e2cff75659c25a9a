# SPDX-License-Identifier: Apache-2.0
"""What nobody should pass: every public function says what came, what was expected and why, or computes the same."""

from __future__ import annotations

import pickle
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest

import fusedrnn
from fusedrnn import clip, hmm, ops, rtrl, tbptt
from fusedrnn import params as parameters

T, B, I, H = 4, 3, 5, 6


def x(dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((T, B, I)).astype(dtype)


PARAMS = {op: parameters.init("rnn_tanh" if op == "rnn" else op, I, H, seed=0) for op in ("lstm", "gru", "rnn")}
TAPE = fusedrnn.gru(x(), None, PARAMS["gru"], training=True)[-1]
LIKE_A_NUMBER = [np.array([1, 2]), "yes", None, 1.5, 2, (), object]


@pytest.mark.parametrize("value", LIKE_A_NUMBER, ids=str)
@pytest.mark.parametrize(
    ("op", "name"),
    [
        *(("lstm", name) for name in ("bidirectional", "reverse", "batch_first", "training", "recompute")),
        *(("lstm", name) for name in ("return_cells", "coupled", "peepholes", "layer_norm")),
        ("gru", "reset_after"),
    ],
)
def test_switches_are_true_or_false(op, name, value):
    with pytest.raises(TypeError, match=rf"{op}: {name} is .*; expected True or False"):
        getattr(fusedrnn, op)(x(), None, PARAMS[op], **{name: value})


@pytest.mark.parametrize("name", ["bias", "batch_first", "bidirectional", "recompute", "reset_after"])
def test_switches_of_layers(name):
    with pytest.raises(TypeError, match=rf"GRU: {name} is .*; expected True or False"):
        fusedrnn.GRU(I, H, **{name: np.array([1, 2])})
    assert fusedrnn.GRU(I, H, **{name: np.True_})(x() if name != "batch_first" else x().swapaxes(0, 1))


CALLS: list[tuple[str, type[Exception], Any]] = [
    (r"lstm: reset_to is array.*expected", ValueError, lambda: lstm(reset_to=np.array([1, 2]))),
    (r"rnn: nonlinearity is array", ValueError, lambda: fusedrnn.rnn(x(), None, {}, nonlinearity=np.array([1, 2]))),
    (r"lstm: reuse is a dict; expected an old tape", TypeError, lambda: lstm(training=True, reuse={})),
    (r"lstm: params has no weight_ih_l1", ValueError, lambda: lstm(num_layers=2**31)),
    (r"lstm: lengths is .*complex128.*expected integers", TypeError, lambda: lstm(lengths=np.zeros(0, complex))),
    (r"x is a numpy.matrix", TypeError, lambda: fusedrnn.lstm(np.matrix(x()[0]), None, PARAMS["lstm"])),
    (r"weight_ih_l0 is a list; expected a NumPy array", TypeError, lambda: lstm(weight_ih_l0=[1.0])),
    (r"jvp: tangents is a int; expected a dict", TypeError, lambda: ops.jvp(TAPE, 3)),
    (r"jvp: tape is None; expected a tape", TypeError, lambda: ops.jvp(None, {})),
    (r"hvp: tape is a dict; expected a tape", TypeError, lambda: ops.hvp({}, {})),
    (r"GRU: dtype is 'none'; expected float32", TypeError, lambda: fusedrnn.GRU(I, H, dtype="none")),
    (r"GRU: dtype is >f4; expected float32", TypeError, lambda: fusedrnn.GRU(I, H, dtype=">f4")),
    (r"GRU: dtype is None; expected float32", TypeError, lambda: fusedrnn.GRU(I, H, dtype=None)),
    (r"load_state_dict: state_dict is a float", TypeError, lambda: fusedrnn.GRU(I, H).load_state_dict(1.5)),
    (r"clip_grad_norm_: max_norm is 'a'; expected a number", TypeError, lambda: clip.clip_grad_norm_([], "a")),
    (r"clip_grad_norm_: norm_type is \(\)", TypeError, lambda: clip.clip_grad_norm_([], 1.0, ())),
    (r"clip_grad_value_: clip_value is 1j", TypeError, lambda: clip.clip_grad_value_([], 1j)),
    (r"grads\[0\] is not aligned", ValueError, lambda: clip.clip_grad_value_([unaligned(np.ones(3))], 1.0)),
    (r"tbptt: x is None; expected an array", TypeError, lambda: tbptt.chunks(fusedrnn.GRU(I, H), None, k1=2)),
    (r"tbptt: x is a str; expected an array", TypeError, lambda: tbptt.chunks(fusedrnn.GRU(I, H), "abc", k1=2)),
    (r"tbptt: a block of x is a int", TypeError, lambda: next(tbptt.chunks(fusedrnn.GRU(I, H), [1], k1=2))),
    (r"tbptt: a block of x is a NumPy float32 array of shape \(\)", TypeError, lambda: chunk_of(np.float32(1)[...])),
    (r"ctc_loss: zero_infinity is array", TypeError, lambda: ctc(zero_infinity=np.array([1, 2]))),
    (r"ctc_loss: input_lengths is .*complex128", TypeError, lambda: ctc(B=0, lengths=np.zeros(0, complex))),
    (r"ctc_loss: input_lengths is a list that is no array", ValueError, lambda: ctc(lengths=[[1], 2])),
    (r"lstm: lengths is a list that is no array", ValueError, lambda: lstm(lengths=[[1], 2, 3])),
    (r"ctc_greedy: log_probs is a numpy.matrix", TypeError, lambda: fusedrnn.ctc_greedy(np.matrix(np.ones((3, 2))))),
    (r"lstm: activations has 3; expected one of Sigmoid", ValueError, lambda: lstm(activations=["Tanh", 3, "Tanh"])),
    (r"lstm: activations has \(\); expected one of", ValueError, lambda: lstm(activations=["Tanh", (), "Tanh"])),
    (r"cell is 'x'; expected one of rnn_tanh", ValueError, lambda: parameters.init("x", 3, 4)),
    (r"cell is \[\]; expected one of rnn_tanh", ValueError, lambda: parameters.kinds([])),
    (r"hidden_size is 0; expected an integer >= 1", ValueError, lambda: parameters.init("gru", 3, 0)),
    (r"input_size is 2.5; expected an integer", TypeError, lambda: parameters.shapes("gru", 2.5, 4)),
    (r"to_bfloat16: params is a float", TypeError, lambda: parameters.to_bfloat16(1.5)),
    (r"to_bfloat16: weight_ih_l0 has dtype complex", TypeError, lambda: bfloat16(np.ones((8, 2), complex))),
    (r"from_bfloat16: a is a list", TypeError, lambda: parameters.from_bfloat16({"a": []})),
    (r"cell is 'cifg'; expected one of lstm, gru, rnn", ValueError, lambda: parameters.to_onnx("cifg", {})),
    (r"to_onnx: params has no weight_ih_l0", ValueError, lambda: parameters.to_onnx("lstm", {})),
    (r"to_keras: params has no weight_ih_l3", ValueError, lambda: parameters.to_keras("gru", PARAMS["gru"], 3)),
    (r"from_onnx: R has shape \(2, 3\); expected 3 axes", ValueError, lambda: from_onnx(np.ones((2, 3)))),
    (r"has shape \(5, 3\); expected 4 gates of rows", ValueError, lambda: from_onnx(np.ones((1, 5, 3)))),
    (r"from_keras: weights is 3; expected \[kernel", ValueError, lambda: parameters.from_keras("gru", 3)),
    (r"generate: top_k is 9223372036854775808", ValueError, lambda: generate(top_k=2**63)),
    (r"generate: return_state is 'no'", TypeError, lambda: generate(return_state="no")),
]


def lstm(weight_ih_l0: Any = None, **options: Any) -> Any:
    params = PARAMS["lstm"] if weight_ih_l0 is None else PARAMS["lstm"] | {"weight_ih_l0": weight_ih_l0}
    return fusedrnn.lstm(x(), None, params, **options)


def ctc(B: int = 2, lengths: Any = None, **options: Any) -> Any:
    lengths = [3] * B if lengths is None else lengths
    return fusedrnn.ctc_loss(np.zeros((3, B, 4)), np.ones((B, 1), int), lengths, [1] * B, **options)


def bfloat16(weight: np.ndarray) -> Any:
    return parameters.to_bfloat16({"weight_ih_l0": weight})


def from_onnx(R: np.ndarray) -> Any:
    return parameters.from_onnx("lstm", np.ones((1, 8, 3)), R)


def generate(**options: Any) -> Any:
    return fusedrnn.generate(fusedrnn.GRU(4, H), np.ones((4, H), np.float32), None, [1], 3, **options)


def chunk_of(given: Any) -> Any:
    return next(tbptt.chunks(fusedrnn.GRU(I, H), given, k1=2))


def unaligned(a: np.ndarray) -> np.ndarray:
    return np.zeros(a.nbytes + 1, np.uint8)[1:].view(a.dtype).reshape(a.shape)


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")  # of numpy.matrix
@pytest.mark.parametrize(("message", "error", "call"), CALLS, ids=[message for message, *_ in CALLS])
def test_errors_say_what_came(message, error, call):
    with pytest.raises(error, match=message):
        call()


def test_odd_but_right_arrays():
    """Read-only, Fortran's order, negative strides, subclasses, big-endian lists of numbers."""
    want = fusedrnn.lstm(x(), None, PARAMS["lstm"])[0]

    class Mine(np.ndarray):
        pass

    frozen = x()
    frozen.flags.writeable = False
    for given in (frozen, np.asfortranarray(x()), x()[::-1].copy()[::-1], x().view(Mine)):
        np.testing.assert_allclose(fusedrnn.lstm(given, None, PARAMS["lstm"])[0], want, atol=1e-6)
    scores, half = np.zeros((3, 2, 2), np.float32), np.log(np.full((2, 2), 0.5, np.float32))
    weights = np.array([1.0, 2.0], np.float32)
    want = hmm.posteriors(scores, half[0], half, weights=weights)[3]
    for given in (weights.astype(">f4"), [1, 2], unaligned(weights)):
        if isinstance(given, np.ndarray):
            given[...] = weights
        np.testing.assert_array_equal(hmm.posteriors(scores, half[0], half, weights=given)[3], want)
        loss, gradient = fusedrnn.ctc_loss_backward(scores, [[1], [1]], [3, 3], [1, 1], given)
        np.testing.assert_allclose(gradient[:, 1], 2 * gradient[:, 0], atol=1e-6)


def test_nothing_at_all():
    """No steps, no rows: results without elements, gradients of zeros."""
    for shape in ((0, B, I), (T, 0, I), (0, 0, I)):
        layer = fusedrnn.GRU(I, H, seed=0)
        y, h = layer(np.zeros(shape, np.float32))
        assert y.shape == (*shape[:2], H) and h.shape == (1, shape[1], H)
        assert not layer.backward(y)["weight_hh_l0"].any()
    for chunk in rtrl.chunks(fusedrnn.GRU(I, H, seed=0), np.zeros((T, 0, I), np.float32)):
        assert not chunk.backward(np.zeros((1, 0, H), np.float32))["weight_hh_l0"].any()


@pytest.mark.parametrize("norm_type", [1e-300, 1e-3, 300.0, 2.0**63])
def test_norms_of_any_order_are_numbers(norm_type):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert clip.clip_grad_norm_([np.full(3, 2.0)], 1.0, norm_type) >= 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_inf_warn_nobody(backend, value):
    data = x()
    data[1, 1] = value
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y, _, tape = fusedrnn.gru(data, None, PARAMS["gru"], training=True)
        grads = fusedrnn.gru_backward(tape, np.ones_like(y))
    assert not np.isfinite(grads["weight_ih_l0"]).all()
    assert np.isfinite(y[:, [0, 2]]).all() and np.isfinite(grads["x"][:, [0, 2]]).all()


OPTIMISED = """
import pickle, copy, numpy as np, fusedrnn
layer = fusedrnn.LSTM(3, 4, 2, dropout=0.2, seed=1, zoneout=0.1)
x = np.ones((5, 2, 3), np.float32)
y, state = layer(x)
grads = layer.backward(y)
for other in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
    other.draws = 0
    assert other.parameters["weight_hh_l1"] is not layer.parameters["weight_hh_l1"]
    if not (other(x)[0] == y).all() or not (other.backward(y)["x"] == grads["x"]).all():
        raise SystemExit("a copy computes something else")
try:
    fusedrnn.lstm(x, None, {})
except ValueError as error:
    print(type(error).__name__)
"""


@pytest.mark.parametrize("flags", [["-W", "error"], ["-O"], ["-OO"], ["-bb", "-X", "dev", "-W", "error"]], ids=str)
def test_under_other_flags(flags):
    """No warning anywhere, and no check is an assert."""
    done = subprocess.run([sys.executable, *flags, "-c", OPTIMISED], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "ValueError\n"), done.stderr


def test_seeds_of_numpy_are_numbers():
    """A seed of a fixed width does not wrap round."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = [fusedrnn.GRU(I, H, 2, dropout=0.5, seed=kind(2**63))(x())[0] for kind in (int, np.uint64)]
    np.testing.assert_array_equal(*y)


def test_tapes_are_not_pickled_with_layers():
    layer = fusedrnn.GRU(I, H, seed=0)
    layer(x())
    size = len(pickle.dumps(layer))
    layer(np.zeros((100, B, I), np.float32))
    assert len(pickle.dumps(layer)) == size
