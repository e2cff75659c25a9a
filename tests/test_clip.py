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
import fusedrnn.torch  # noqa: E402


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


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("norm_type", [0.5, 1.0, 2.0, 3.0, 40.0, "inf"])
@pytest.mark.parametrize("size", [1e-38, 1e-20, 1e20, 3e38, 1e-200, 1e200])
def test_norms_whose_powers_leave_the_range_of_their_dtype(size, norm_type, dtype):
    if size in (1e-200, 1e200) and dtype == np.float32:
        dtype = np.float64
    arrays = [np.full(100, size, dtype), np.array([[0.5 * size, -size]], dtype)]
    p = float(norm_type)
    unit = float(arrays[0][0])
    whole = np.concatenate([a.ravel().astype(np.float64) / unit for a in arrays])
    expected = unit * np.linalg.norm(whole, p) if p >= 1 else unit * (np.abs(whole) ** p).sum() ** (1 / p)
    assert clip_each_norm_([a.copy() for a in arrays], np.inf, norm_type)[1] > 0
    max_norm = 0.25 * expected if size < 1 else 1.0
    assert clip_grad_norm_(arrays, max_norm, norm_type) == pytest.approx(expected, rel=1e-6)
    if size > 1:  # below, 1e-6 counts beside the norm
        rtol = 1e-6 if dtype == np.float32 else 1e-13
        for got, old in zip(arrays, np.split(whole, [100]), strict=True):
            np.testing.assert_allclose(got.ravel(), old * (unit / expected), rtol=rtol)


def twins(*gradients):
    """Two lists of parameters with these gradients, None where there is none."""
    made = ([], [])
    for gradient in gradients:
        for parameters in made:
            parameters.append(torch.zeros(3 if gradient is None else gradient.shape))
            if gradient is not None:
                parameters[-1] = parameters[-1].to(gradient.dtype)
                parameters[-1].grad = gradient.clone()
    return made


def outcome(call, *arguments, **options):
    """What it returns, or the type of the error."""
    try:
        return call(*arguments, **options)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        return type(error)


A, Z = torch.tensor([[3.0, 0.0], [-4.0, 0.0]]), torch.zeros(2)
GRADIENTS = {
    "float32": [A, Z, None],
    "float64": [A.double(), Z.double()],
    "mixed": [A, None, A.double()],
    "half": [A.half(), A.half()],
    "bfloat16 and float32": [A.bfloat16(), A],
    "complex": [A.to(torch.complex64)],
    "0-d and empty": [torch.tensor(-2.0), torch.zeros(0, 3)],
    "strided": [torch.arange(12.0).view(3, 4).t()[::2]],
    "infinite": [A, torch.tensor([math.inf, 1.0])],
    "NaN": [torch.tensor([math.nan, math.inf]), A],
    "none has any": [None, None],
    "no parameters": [],
}


@pytest.mark.parametrize("foreach", [None, False, True])
@pytest.mark.parametrize("norm_type", [2, 1.0, 3.0, "inf", 0, "2", -1.0])
@pytest.mark.parametrize("which", GRADIENTS)
def test_the_torch_functions_are_torchs(which, norm_type, foreach):
    ours, theirs = fusedrnn.torch.clip, torch.nn.utils
    given = GRADIENTS[which]
    if which == "0-d and empty" and norm_type == "inf":
        given = given[:1]  # torch knows no largest element of an empty tensor
    for max_norm in (0.5, torch.tensor(0.5), torch.tensor([100.0], dtype=torch.float64), 0):
        for error_if_nonfinite in (False, True):
            a, b = twins(*given)
            options = {"foreach": foreach, "error_if_nonfinite": error_if_nonfinite}
            got = outcome(ours.clip_grad_norm_, iter(a), max_norm, norm_type, **options)
            expected = outcome(theirs.clip_grad_norm_, b, max_norm, norm_type, **options)
            close = {"rtol": 1e-2, "atol": 1e-2} if "16" in which or which == "half" else {"rtol": 1e-6, "atol": 1e-9}

            def same(got, expected, close=close):
                if isinstance(expected, torch.Tensor):
                    torch.testing.assert_close(got, expected, equal_nan=True, **close)
                else:
                    assert got is expected

            same(got, expected)
            gradients = [p.grad for p in a if p.grad is not None]
            for p, q in zip(a, b, strict=True):
                same(p.grad, q.grad)
            for t in (gradients, gradients[:1], *gradients[:1]):
                norm = outcome(ours.get_total_norm, t, norm_type, error_if_nonfinite, foreach)
                same(norm, outcome(theirs.get_total_norm, t, norm_type, error_if_nonfinite, foreach))
        a, b = twins(*given)
        total = torch.tensor(7.0)
        for functions, parameters in ((ours, a), (theirs, b)):
            functions.clip_grads_with_norm_(parameters, max_norm, total, foreach=foreach)
            if which != "complex" and any(p.grad is not None for p in parameters):  # torch's fails with none
                functions.clip_grad_value_(parameters, torch.tensor(0.25), foreach=foreach)
        for p, q in zip(a, b, strict=True):
            same(p.grad, q.grad)


@pytest.mark.parametrize("value", [2e19, 3e38])
def test_a_norm_that_float32_cannot_hold_is_told_in_float64(value):
    p = torch.zeros(200)
    p.grad = torch.full((200,), value)
    norm = fusedrnn.torch.clip.clip_grad_norm_(p, 2.0, error_if_nonfinite=True)
    assert norm.dtype == (torch.float32 if value < 1e20 else torch.float64)
    assert norm.item() == pytest.approx(value * math.sqrt(200), rel=1e-6)
    assert torch.linalg.vector_norm(p.grad).item() == pytest.approx(2.0, rel=1e-6)


def test_torch_parameters_of_every_kind():
    clip_norm = fusedrnn.torch.clip.clip_grad_norm_
    layer = torch.nn.Linear(2, 2)
    layer(torch.ones(1, 2)).sum().backward()
    for parameters in (layer.parameters(), layer.weight, dict(layer.named_parameters()).values()):
        assert clip_norm(parameters, 1e9) > 0
    with pytest.warns(UserWarning, match="empty generator"):
        assert clip_norm((p for p in ()), 1.0) == 0
    spread = torch.zeros(3)
    spread.grad = torch.ones(1).expand(3)
    with pytest.raises(ValueError, match=r"grads\[0\] has elements that share memory"):
        clip_norm(spread, 1.0)
    assert spread.grad.eq(1).all()
    for call in (
        lambda: clip_norm(layer.weight, -1.0),
        lambda: clip_norm(layer.weight, math.nan),
        lambda: clip_norm(layer.weight, 1.0, math.nan),
        lambda: fusedrnn.torch.clip.clip_grad_value_(layer.weight, -1.0),
    ):
        with pytest.raises(ValueError, match="expected a number"):
            call()


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_autograd_is_told_of_the_change():
    w = torch.ones(2, requires_grad=True)
    (w**3).sum().backward(create_graph=True)
    square = w.grad**2
    fusedrnn.torch.clip.clip_grad_norm_(w, 1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.sum().backward()
    with torch.inference_mode():
        w = torch.ones(2)
        w.grad = torch.tensor([3.0, 4.0])
        assert fusedrnn.torch.clip.clip_grad_norm_(w, 1.0) == 5


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
        ([np.ones(3), np.lib.stride_tricks.as_strided(np.ones(1), (2,), (0,))], r"grads\[1\] has elements that share"),
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
        lambda: clip_grad_norm_(array, 1.0, norm_type=math.nan),
        lambda: clip_grad_value_(array, -0.5),
    ):
        with pytest.raises(ValueError, match="expected a number"):
            call()
    np.testing.assert_array_equal(array, np.ones(3))
