# SPDX-License-Identifier: Apache-2.0
"""Clipping against torch.nn.utils, which is the definition."""

import doctest
import math

import numpy as np
import pytest

import fusedrnn
from fusedrnn import clip
from fusedrnn.clip import clip_each_norm_, clip_grad_norm_, clip_grad_value_

torch = pytest.importorskip("torch")


@pytest.fixture(autouse=True, params=["native", "reference"])
def backend(request):
    """Once in C++, once in NumPy."""
    if fusedrnn.backends.missing(request.param):
        pytest.skip(f"no {request.param} backend here")
    fusedrnn.set_backend(request.param)
    yield
    fusedrnn.set_backend(None)


SHAPES = [(512, 128), (512,), (1,), (3, 1), (37, 5, 2)]


def make(seed: int = 0, dtype: type = np.float32) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(dtype) * 10.0**k for k, shape in enumerate(SHAPES)]


def as_torch(arrays: list[np.ndarray]) -> list["torch.Tensor"]:
    parameters = [torch.zeros(a.shape, dtype=torch.from_numpy(a).dtype) for a in arrays]
    for parameter, array in zip(parameters, arrays, strict=True):
        parameter.grad = torch.from_numpy(array.copy())
    return parameters


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3.0, math.inf])
@pytest.mark.parametrize("max_norm", [1.0, 1e9, 0.0])
def test_global_norm_equals_torch(dtype, norm_type, max_norm):
    arrays = make(dtype=dtype)
    parameters = as_torch(arrays)
    before = [a.copy() for a in arrays]
    norm = clip_grad_norm_(arrays, max_norm, norm_type)
    expected = torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)
    rtol = 3e-6 if dtype == np.float32 else 1e-13  # torch sums float32 in float32
    assert norm == pytest.approx(float(expected), rel=rtol)
    for got, parameter, old in zip(arrays, parameters, before, strict=True):
        np.testing.assert_allclose(got, parameter.grad.numpy(), rtol=rtol)
        if max_norm == 1e9:
            np.testing.assert_array_equal(got, old)


def test_norm_is_accumulated_in_float64():
    # one element per thousand carries the sum; float32 accumulation would lose the small ones
    array = np.full(4_000_000, 1e-4, np.float32)
    array[0] = 4096.0
    expected = math.sqrt(float((array.astype(np.float64) ** 2).sum()))
    assert clip_grad_norm_([array], math.inf) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("norm_type", [2.0, 1.5, math.inf])
def test_strided_arrays_in_nested_containers(norm_type):
    rng = np.random.default_rng(1)
    base = rng.standard_normal((6, 40, 50))
    views = [base[0].T, base[1, ::2], base[2, ::-1, 3:7], base[3][:, ::-3], base[4:6].transpose(2, 0, 1)]
    untouched = base.copy()
    copies = [v.copy() for v in views]
    grads = {
        "weight_ih_l0": views[0],
        "bias_ih_l0": None,
        "x": views[1],
        "state": (views[2], views[3]),
        "more": [views[4]],
    }
    norm = clip_grad_norm_(grads, 0.5, norm_type)
    assert norm == pytest.approx(clip_grad_norm_(copies, 0.5, norm_type), rel=1e-13)
    for view, copy in zip(views, copies, strict=True):
        np.testing.assert_allclose(view, copy, rtol=1e-13)
    np.testing.assert_array_equal(base[1, 1::2], untouched[1, 1::2])  # what lies between the views stays
    np.testing.assert_array_equal(base[2, :, :3], untouched[2, :, :3])


def test_each_norm_equals_torch_one_by_one():
    arrays = make(2)
    parameters = as_torch(arrays)
    grads = {"a": arrays[0], "state": (arrays[1], arrays[2]), "rest": arrays[3:], "none": None}
    norms = clip_each_norm_(grads, 2.0)
    assert list(norms) == ["a", "state", "rest", "none"] and norms["none"] is None
    flat = [norms["a"], *norms["state"], *norms["rest"]]
    for got, norm, parameter in zip(arrays, flat, parameters, strict=True):
        expected = torch.nn.utils.clip_grad_norm_([parameter], 2.0)
        assert norm == pytest.approx(float(expected), rel=3e-6)
        np.testing.assert_allclose(got, parameter.grad.numpy(), rtol=3e-6)


def test_value_equals_torch():
    arrays = make(3)
    arrays[0][0, :3] = [np.nan, np.inf, -np.inf]
    parameters = as_torch(arrays)
    clip_grad_value_(arrays, 0.7)
    torch.nn.utils.clip_grad_value_(parameters, 0.7)
    for got, parameter in zip(arrays, parameters, strict=True):
        np.testing.assert_array_equal(got, parameter.grad.numpy())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_nonfinite(bad, norm_type):
    arrays = make(4)
    arrays[4][3, 2, 1] = bad
    before = [a.copy() for a in arrays]
    with pytest.raises(FloatingPointError, match="Nothing was changed"):
        clip_grad_norm_(arrays, 1.0, norm_type, error_if_nonfinite=True)
    with pytest.raises(FloatingPointError, match=r"grads\[4\]"):
        clip_each_norm_(arrays, 1.0, norm_type, error_if_nonfinite=True)
    for array, old in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, old)
    parameters = as_torch(arrays)
    norm = clip_grad_norm_(arrays, 1.0, norm_type)
    expected = float(torch.nn.utils.clip_grad_norm_(parameters, 1.0, norm_type))
    np.testing.assert_equal(norm, expected)
    for array, parameter in zip(arrays, parameters, strict=True):
        np.testing.assert_array_equal(array, parameter.grad.numpy())


def test_one_array_and_nothing():
    array = np.array([3.0, 4.0])
    assert clip_grad_norm_(array, 1.0) == 5.0
    np.testing.assert_allclose(array, [0.6, 0.8], rtol=1e-6)
    assert clip_grad_norm_({}, 1.0) == 0.0
    assert clip_grad_norm_([np.zeros((0, 3)), np.full(1, -2.0)], 9.0, math.inf) == 2.0
    assert clip_grad_norm_([np.zeros((0, 3)), np.full(1, -2.0)], 9.0) == 2.0
    assert clip_each_norm_(np.array([3.0, 4.0]), 1.0) == 5.0


@pytest.mark.parametrize(
    ("grads", "match"),
    [
        ([np.zeros(3), 1.0], r"grads\[1\] is a float; expected a NumPy array"),
        ({"weight": np.zeros(3, np.int32)}, r"grads\['weight'\] has dtype int32; expected float32 or float64"),
        ([np.ones(3), np.broadcast_to(np.float32(1), (2, 3))], r"grads\[1\] is read-only"),
    ],
)
@pytest.mark.parametrize("function", [clip_grad_norm_, clip_grad_value_, clip_each_norm_])
def test_bad_grads_are_refused_before_anything_is_written(function, grads, match):
    first = next(iter(grads.values())) if isinstance(grads, dict) else grads[0]
    before = first.copy()
    with pytest.raises((TypeError, ValueError), match=match):
        function(grads, 0.1)
    np.testing.assert_array_equal(first, before)


def test_the_documented_examples_run():
    result = doctest.testmod(clip, extraglobs={"fusedrnn": fusedrnn})
    assert result.attempted > 5 and result.failed == 0


def test_bad_limits():
    array = np.ones(3)
    for call in (
        lambda: clip_grad_norm_(array, -1.0),
        lambda: clip_grad_norm_(array, math.nan),
        lambda: clip_grad_norm_(array, 1.0, norm_type=0.0),
        lambda: clip_each_norm_(array, 1.0, norm_type=-2.0),
        lambda: clip_grad_value_(array, -0.5),
    ):
        with pytest.raises(ValueError, match="expected a number"):
            call()
    np.testing.assert_array_equal(array, np.ones(3))
