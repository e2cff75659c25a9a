# SPDX-License-Identifier: Apache-2.0
"""Weights stored as bfloat16, for inference."""

import functools

import numpy as np
import pytest

import fusedrnn


@pytest.mark.parametrize("backend", fusedrnn.backends.available())
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("B", [1, 5, 33])
def test_bfloat16_weights_give_what_their_values_give(cell, B, backend):
    rng = np.random.default_rng(0)
    layer = getattr(fusedrnn, cell.upper())(7, 19, 2, bidirectional=True, seed=0)
    x = rng.standard_normal((6, B, 7), np.float32)
    half = fusedrnn.params.to_bfloat16(layer.parameters)
    run = functools.partial(getattr(fusedrnn, cell), num_layers=2, bidirectional=True)
    exact, *_ = run(x, None, fusedrnn.params.from_bfloat16(half), backend="reference")
    y, *_ = run(x, None, half, backend=backend)
    np.testing.assert_allclose(y, exact, rtol=0, atol=2e-6)
    layer.parameters = half  # the short way of a layer in eval mode
    np.testing.assert_allclose(layer.eval()(x)[0], exact, rtol=0, atol=2e-6)


def test_bfloat16_weights_stream():
    layer = fusedrnn.GRU(7, 19, seed=0).eval()
    layer.parameters = fusedrnn.params.to_bfloat16(layer.parameters)
    x = np.random.default_rng(0).standard_normal((4, 1, 7), np.float32)
    y, last = layer(x)
    state = None
    for t in range(4):
        y_t, state = layer.step(x[t], state)
        np.testing.assert_allclose(y_t, y[t], rtol=0, atol=1e-6)
    np.testing.assert_allclose(state, last, rtol=0, atol=1e-6)


def test_bfloat16_rounds_to_nearest_even():
    values = np.float32([1, -2.5, 1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, np.inf, np.nan, 0.0])
    half = fusedrnn.params.to_bfloat16({"weight_ih_l0": values, "bias_ih_l0": values})
    assert half["bias_ih_l0"] is values
    back = fusedrnn.params.from_bfloat16(half)["weight_ih_l0"]
    np.testing.assert_array_equal(back, np.float32([1, -2.5, 1, 1 + 2**-6, np.inf, np.inf, np.nan, 0.0]))


def test_bfloat16_weights_are_for_inference():
    layer = fusedrnn.LSTM(3, 4, seed=0)
    exact = layer.state_dict()
    layer.parameters = fusedrnn.params.to_bfloat16(layer.parameters)
    x = np.ones((2, 1, 3), np.float32)
    with pytest.raises(ValueError, match="bfloat16 weights; expected float32"):
        layer(x)
    with pytest.raises(TypeError, match="expected float64"):
        fusedrnn.lstm(x.astype(float), None, layer.parameters)
    with pytest.raises(TypeError, match="all or none"):
        fusedrnn.lstm(x, None, layer.parameters | {"weight_ih_l0": exact["weight_ih_l0"]})
    with pytest.raises(TypeError, match="to_bfloat16"):
        layer.load_state_dict(exact)
    plain = fusedrnn.LSTM(3, 4)
    plain.load_state_dict(layer.state_dict())
    np.testing.assert_allclose(plain.parameters["weight_ih_l0"], exact["weight_ih_l0"], rtol=2**-8)
