# SPDX-License-Identifier: Apache-2.0
"""Names, shapes and first values of parameters, and the orders of PyTorch, Keras and ONNX."""

from __future__ import annotations

import numpy as np
import pytest

import fusedrnn
from fusedrnn import params
from fusedrnn.cells import CELLS

torch = pytest.importorskip("torch")

THEIRS = ["rnn_tanh", "rnn_relu", "lstm", "gru", "gru_reset_before"]
TORCH = {"rnn_tanh": torch.nn.RNN, "lstm": torch.nn.LSTM, "gru": torch.nn.GRU}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("L", [1, 3])
@pytest.mark.parametrize("cell", TORCH)
def test_names_and_shapes_are_torchs(cell, L, bidirectional, bias):
    layer = TORCH[cell](3, 5, L, bias=bias, bidirectional=bidirectional)
    want = {name: tuple(value.shape) for name, value in layer.named_parameters()}
    got = params.shapes(cell, 3, 5, L, bidirectional, bias)
    assert got == want
    assert list(got) == list(want) == params.names(L, bidirectional, bias)


@pytest.mark.parametrize("cell", CELLS)
def test_init(cell):
    made = params.init(cell, 7, 50, 2, True, seed=3, dtype=np.float64)
    values = np.concatenate([a.ravel() for a in made.values()])
    bound = 50**-0.5
    assert np.abs(values).max() <= bound
    assert abs(values.mean()) < 5 * bound / np.sqrt(3 * values.size)
    assert values.std() == pytest.approx(bound / np.sqrt(3), rel=0.05)
    again = params.init(cell, 7, 50, 2, True, seed=3)
    for name, array in made.items():
        assert again[name].dtype == np.float32
        np.testing.assert_array_equal(array.astype(np.float32), again[name])
    assert not np.array_equal(params.init(cell, 7, 50)["weight_ih_l0"], params.init(cell, 7, 50)["weight_ih_l0"])


def sigmoid(a: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-a))


def gates(a: np.ndarray, n: int) -> list[np.ndarray]:
    return np.split(a, n, axis=-1)


def onnx_step(cell: str, x, h, c, W, R, B):
    """One step by the text of ONNX's operators (LSTM: gates i, o, f, c; GRU: z, r, h)."""
    Wb, Rb = np.split(B[0], 2)
    a_x, a_h = x @ W[0].T + Wb, h @ R[0].T + Rb
    if cell.startswith("rnn"):
        return np.tanh(a_x + a_h)
    if cell == "lstm":
        i, o, f, g = gates(a_x + a_h, 4)
        return sigmoid(o) * np.tanh(sigmoid(f) * c + sigmoid(i) * np.tanh(g))
    (zx, rx, hx), (zh, rh, hh) = gates(a_x, 3), gates(a_h, 3)
    z, r = sigmoid(zx + zh), sigmoid(rx + rh)
    if cell == "gru":  # linear_before_reset = 1
        n = np.tanh(hx + r * hh)
    else:
        H = h.shape[-1]
        n = np.tanh(hx + (r * h) @ R[0, 2 * H :].T + Rb[2 * H :])
    return (1 - z) * n + z * h


def keras_step(cell: str, x, h, c, kernel, recurrent, bias):
    """One step as Keras's cells compute it (LSTM: gates i, f, c, o; GRU: z, r, h)."""
    if cell.startswith("rnn"):
        return np.tanh(x @ kernel + h @ recurrent + bias)
    if cell == "lstm":
        i, f, g, o = gates(x @ kernel + h @ recurrent + bias, 4)
        return sigmoid(o) * np.tanh(sigmoid(f) * c + sigmoid(i) * np.tanh(g))
    H = h.shape[-1]
    if cell == "gru":  # reset_after=True
        (zx, rx, hx), (zh, rh, hh) = gates(x @ kernel + bias[0], 3), gates(h @ recurrent + bias[1], 3)
        z = sigmoid(zx + zh)
        n = np.tanh(hx + sigmoid(rx + rh) * hh)
    else:
        zx, rx, hx = gates(x @ kernel + bias, 3)
        z, r = sigmoid(zx + h @ recurrent[:, :H]), sigmoid(rx + h @ recurrent[:, H : 2 * H])
        n = np.tanh(hx + (r * h) @ recurrent[:, 2 * H :])
    return z * h + (1 - z) * n


@pytest.mark.parametrize("theirs", ["onnx", "keras"])
@pytest.mark.parametrize("cell", [cell for cell in THEIRS if cell != "rnn_relu"])
def test_their_formulas_with_converted_weights(cell, theirs):
    made = params.init(cell, 3, 5, dtype=np.float64, seed=1)
    rng = np.random.default_rng(0)
    x, h, c = rng.standard_normal((2, 3)), rng.standard_normal((2, 5)), rng.standard_normal((2, 5))
    options = {"reset_after": cell == "gru"} if cell.startswith("gru") else {}
    run = getattr(fusedrnn, cell.partition("_")[0])
    state = (h[None], c[None]) if cell == "lstm" else h[None]
    want = run(x[None], state, made, backend="reference", **options)[0][0]
    if theirs == "onnx":
        got = onnx_step(cell, x, h, c, *params.to_onnx(cell, made))
    else:
        got = keras_step(cell, x, h, c, *params.to_keras(cell, made))
    np.testing.assert_allclose(got, want, rtol=1e-13)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cell", THEIRS)
def test_there_and_back(cell, bias):
    made = params.init(cell, 3, 5, 2, True, bias, seed=1)
    back = {}
    for layer in range(2):
        back |= params.from_onnx(cell, *params.to_onnx(cell, made, layer), layer=layer)
    assert back.keys() == made.keys()
    for name, array in made.items():
        np.testing.assert_array_equal(back[name], array)
    for layer in range(2):
        for reverse in (False, True):
            weights = params.to_keras(cell, made, layer, reverse)
            again = params.to_keras(cell, params.from_keras(cell, weights, layer, reverse), layer, reverse)
            for a, b in zip(weights, again, strict=True):
                np.testing.assert_array_equal(a, b)


def test_keras_gives_usable_layers():
    weights = params.to_keras("lstm", params.init("lstm", 3, 5, seed=0))
    layer = fusedrnn.LSTM(3, 5)
    layer.load_state_dict(params.from_keras("lstm", weights))
    assert layer(np.ones((2, 1, 3), np.float32))[0].shape == (2, 1, 5)


def test_cells_that_others_do_not_have():
    made = params.init("cifg", 3, 4)
    for convert in (params.to_onnx, params.to_keras):
        with pytest.raises(ValueError, match="cell is 'cifg'; expected one of lstm, gru, rnn"):
            convert("cifg", made)
