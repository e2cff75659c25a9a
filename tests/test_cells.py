# SPDX-License-Identifier: Apache-2.0
"""The spec: its functions at their ends, its registry, and the generator of dropout masks."""

from __future__ import annotations

import numpy as np
import pytest

import fusedrnn
from fusedrnn.cells import CELLS, dropout, number


def test_registry():
    for name, cell in CELLS.items():
        assert cell.name == name
        assert len(cell.x_sum) == cell.gates
        assert len(cell.h_sum) == (cell.gates if cell.state_product else 0)
        assert set(cell.x_sum) | set(cell.h_sum) == set(range(cell.sums))
        assert cell.two_products == (cell.backward_gate is not None)


@pytest.mark.parametrize("name", CELLS)
def test_the_public_function_with_its_options_runs_the_cell(name):
    cell, params = CELLS[name], fusedrnn.params.init(name, 3, 4, seed=0)
    run = getattr(fusedrnn, cell.op)
    tape = run(np.ones((2, 3), np.float32), None, params, training=True, backend="reference", **cell.options)[-1]
    assert tape.call.problem.cell == name


def test_sigmoid_and_tanh_at_their_ends():
    x = np.array([-np.inf, -1e4, -40.0, 0.0, 40.0, 1e4, np.inf])
    with np.errstate(all="raise", under="ignore"):
        got = number.sigmoid(x)
    np.testing.assert_allclose(got, [0, 0, np.exp(-40), 0.5, 1, 1, 1], rtol=1e-15)
    assert np.isnan(number.sigmoid(np.array(np.nan)))
    assert np.isnan(number.tanh(np.array(np.nan)))


@pytest.mark.parametrize("function", [number.sigmoid, number.tanh])
def test_functions_of_dual_numbers(function):
    """The imaginary part of a tiny step is the derivative."""
    x = np.linspace(-30, 30, 601)
    slope = function(x + 1e-40j).imag / 1e-40
    y = function(x)
    want = y * (1 - y) if function is number.sigmoid else 1 - y * y
    np.testing.assert_allclose(slope, want, atol=1e-15)


def test_corners():
    nan = np.nan
    x = np.array([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, nan])
    d = np.full_like(x, 3.0)
    np.testing.assert_array_equal(number.relu(x), [0, 0, 0, 0, 0.5, 1, 2, nan])
    np.testing.assert_array_equal(number.positive(d, x), [0, 0, 0, 0, 3, 3, 3, 3])
    np.testing.assert_array_equal(number.clamp(x, 1.0), [-1, -1, -0.5, 0, 0.5, 1, 1, nan])
    np.testing.assert_array_equal(number.clamp(x, 0), x)
    np.testing.assert_array_equal(number.inside(d, x, 1.0), [0, 0, 3, 3, 3, 0, 0, 3])
    np.testing.assert_array_equal(number.inside(d, x, 0), d)


# Published vectors of Philox4x32-10 (the generator's known-answer tests): counter, key, words.
PHILOX = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), PHILOX)
def test_philox(counter, key, words):
    assert tuple(int(w) for w in dropout.philox(*map(np.uint64, (*counter, *key)))) == words


def test_dropout_scale_is_what_the_rule_says():
    shape, p, seed, layer = (3, 1, 5, 7), 0.25, (9 << 32) + 5, 2
    got = dropout.scale(shape, p, seed, layer).ravel()
    for n in range(got.size):
        words = dropout.philox(*map(np.uint64, (n // 4, 0, layer, 0, 5, 9)))
        assert got[n] == (0 if int(words[n % 4]) < p * 2**32 else 1 / (1 - p))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_mean(p):
    n = 200_000
    scale = dropout.scale((n,), p, 3, 0)
    assert abs(scale.mean() - 1) < 5 * np.sqrt(p / (1 - p) / n)
    assert set(np.unique(scale)) == {0.0, 1 / (1 - p)}


def test_dropout_differs_by_seed_and_layer():
    masks = [dropout.scale((64,), 0.5, seed, layer).tobytes() for seed in (0, 1, 2**40) for layer in (0, 1)]
    assert len(set(masks)) == 6


def test_dropout_ends():
    assert (dropout.scale((100,), 0.0, 0, 0) == 1).all()
    assert (dropout.scale((100,), 1.0, 0, 0) == 0).all()


def test_numba_functions_are_accurate():
    """The compiled sigmoid and tanh against NumPy's, over their whole range."""
    if fusedrnn.backends.load("numba") is None:
        pytest.skip("numba is not installed")
    import numba

    from fusedrnn.backends.numba.functions import FUNCTIONS

    for dtype, kind, ulp in ((np.float32, numba.float32, 3), (np.float64, numba.float64, 4)):
        sigmoid, tanh, softplus = (numba.vectorize([kind(kind)])(f) for f in FUNCTIONS[kind])
        x = np.concatenate([np.linspace(-90, 90, 20001), np.logspace(-30, 0, 3001), -np.logspace(-30, 0, 3001)])
        x = x[x >= -85].astype(dtype)
        wide = x.astype(np.longdouble)
        eps = np.finfo(dtype).eps
        want = np.tanh(wide)
        assert np.max(np.abs(tanh(x) - want)[want != 0] / np.abs(want[want != 0])) < ulp * eps
        want = 1 / (1 + np.exp(-wide))
        assert np.max(np.abs(sigmoid(x) - want) / want) < ulp * eps
        want = np.logaddexp(0, wide)
        assert np.max(np.abs(softplus(x) - want) / np.maximum(want, eps)) < ulp * eps
        ends = np.array([-np.inf, np.inf, np.nan], dtype)
        np.testing.assert_array_equal(tanh(ends), np.array([-1, 1, np.nan], dtype))
        np.testing.assert_allclose(sigmoid(ends), np.array([0, 1, np.nan], dtype), atol=1e-30)
