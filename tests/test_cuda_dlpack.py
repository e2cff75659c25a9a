# SPDX-License-Identifier: Apache-2.0
"""Arrays that come by DLPack: what capsules say, and calls on a device (the CPU twin) that is reached by them alone."""

from __future__ import annotations

import contextlib
import ctypes
import sys
import types
from typing import Any

import numpy as np
import pytest

import close
import cuda_twin
import fusedrnn
from cuda_twin import Chip, OldPack, Pack, host
from fusedrnn import arrays, dlpack
from fusedrnn import params as parameters


def content(found: dlpack.Found) -> np.ndarray:
    """What lies at an array, element by element."""
    result = np.empty((*found.shape, found.itemsize), np.uint8)
    for index in np.ndindex(found.shape):
        at = found.pointer + sum(i * s for i, s in zip(index, found.strides, strict=True))
        result[index] = np.frombuffer(ctypes.string_at(at, found.itemsize), np.uint8)
    return result


NUMPY = [
    np.arange(24.0).reshape(2, 3, 4),
    np.arange(24, dtype=np.int64).reshape(4, 6)[1::2, ::-2],
    np.arange(7, dtype=np.float16)[3:],
    np.zeros((0, 3), np.uint8),
    np.array([True, False]),
    np.array(2, np.int32),
]


@pytest.mark.parametrize("array", NUMPY, ids=lambda a: f"{a.dtype}{a.shape}")
def test_capsules_of_numpy(array):
    found = dlpack.read(array)
    assert (found.shape, found.kind, found.itemsize) == (array.shape, array.dtype.name, array.itemsize)
    assert np.array_equal(content(found), array[..., None].copy().view(np.uint8).reshape(*array.shape, array.itemsize))
    assert found.writeable


def test_a_capsule_keeps_the_memory_and_its_end_gives_it_back():
    array = np.zeros(5)
    before = sys.getrefcount(array)
    found = dlpack.read(array)
    assert sys.getrefcount(array) > before
    del found
    assert sys.getrefcount(array) == before
    array.flags.writeable = False
    assert not dlpack.read(array).writeable


def test_capsules_of_other_libraries():
    torch = pytest.importorskip("torch")
    tensor = torch.arange(12, dtype=torch.bfloat16).reshape(3, 4)[1:, ::2].t()
    found = dlpack.read(tensor)
    assert found.shape == (2, 2) and found.strides == (4, 8) and found.kind == "bfloat16"
    assert np.array_equal(content(found).view(np.uint16)[..., 0], tensor.contiguous().view(torch.uint16).numpy())
    assert dlpack.device(tensor) == (dlpack.CPU, 0) and arrays.device_array(tensor) is None
    with pytest.raises(BufferError, match="require gradient"):
        dlpack.read(torch.ones(2, requires_grad=True))
    made = arrays.MAKERS["torch"]((2, 3), arrays.BFLOAT16, tensor)
    assert made.dtype == torch.bfloat16 and made.shape == (2, 3)
    assert arrays.MAKERS["torch"]((2,), np.dtype(np.uint8), tensor).dtype == torch.uint8


def test_capsules_of_jax():
    jax = pytest.importorskip("jax.numpy")
    array = jax.arange(6, dtype=jax.bfloat16).reshape(2, 3)
    found = dlpack.read(array)
    assert (found.shape, found.strides, found.kind, found.writeable) == ((2, 3), (6, 2), "bfloat16", False)
    assert np.array_equal(content(found).view(np.uint16)[..., 0], np.asarray(array).view(np.uint16))
    assert array.dtype == arrays.BFLOAT16 and arrays.BFLOAT16 == array.dtype


# ---- calls


@pytest.fixture
def library(twin: Any, monkeypatch: Any) -> Any:
    """The twin; its library works on stream 7."""
    if cuda_twin.memory.device != "cpu":
        pytest.skip("there is no stream 7")
    monkeypatch.setitem(arrays.STREAMS, "cuda_twin", lambda like: 7)
    Pack.streams.clear()
    return twin


def bfloat16(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def wide(values: Any) -> np.ndarray:
    bits = host(values)
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64) if bits.dtype == np.uint16 else bits


def gru_case(dtype: Any = np.float32) -> Any:
    rng = np.random.default_rng(0)
    params = {k: np.asarray(v, dtype) for k, v in parameters.init("gru", 4, 7, seed=1).items()}
    return rng.standard_normal((5, 3, 4)).astype(dtype), rng.standard_normal((1, 3, 7)).astype(dtype), params


@pytest.mark.skipif(bool(cuda_twin.why_no_gpu()), reason=cuda_twin.why_no_gpu() or "-")
def test_torchs_tensors_on_a_gpu():
    torch = pytest.importorskip("torch")
    x, _, params = gru_case()
    with torch.cuda.stream(torch.cuda.Stream()):
        tensors = {k: torch.tensor(v, device="cuda") for k, v in params.items()}
        y, _, tape = fusedrnn.gru(torch.tensor(x, device="cuda"), None, tensors, training=True)
        grads = fusedrnn.gru_backward(tape, y)
        expected, _, on_host = fusedrnn.gru(x, None, params, training=True)
        close.check("y", y.cpu().numpy(), expected, 1e-5)
        wanted = fusedrnn.gru_backward(on_host, expected)
        close.check("dx", grads["x"].cpu().numpy(), wanted["x"], 1e-4)
    with pytest.raises(TypeError, match="pass tensor.detach"):
        fusedrnn.gru(torch.tensor(x, device="cuda").requires_grad_(), None, tensors)


@pytest.mark.parametrize("kind", ["float32", "float64", "bfloat16"])
def test_forward_and_backward(library, kind):
    x, h, params = gru_case()
    if kind == "bfloat16":
        x, h, *rest = (bfloat16(a) for a in (x, h, *params.values()))
        params = dict(zip(params, rest, strict=True))
    else:
        x, h, params = x.astype(kind), h.astype(kind), {k: v.astype(kind) for k, v in params.items()}
    lengths, reset = np.array([5, 0, 3]), np.random.default_rng(1).random((5, 3)) < 0.3
    there = {name: Pack(a, kind) for name, a in params.items()}
    calls = {"lengths": Pack(lengths), "reset": Pack(reset)}
    y, hn, tape = fusedrnn.gru(Pack(x, kind), Pack(h, kind), there, **calls, training=True)
    assert type(y) is type(hn) is (Pack if kind == "bfloat16" else Chip)
    assert set(Pack.streams) == {7}
    grads = fusedrnn.gru_backward(tape, y if kind == "bfloat16" else Pack(host(y)), hn)
    args = wide(x).astype(np.float64), wide(h).astype(np.float64), {k: wide(v).astype(float) for k, v in params.items()}
    y64, h64, tape64 = fusedrnn.gru(*args, lengths=lengths, reset=reset, training=True, backend="reference")
    expected = fusedrnn.gru_backward(tape64, wide(y).astype(float), wide(hn).astype(float))
    budget = {"float64": 1e-12, "float32": 2e-5, "bfloat16": 5e-2}[kind]
    close.check("y", wide(y), y64, budget)
    close.check("hn", wide(hn), h64, budget)
    for name in expected:
        close.check(name, wide(grads[name]), expected[name], 4 * budget)


def test_streams(library, monkeypatch):
    x, _, params = gru_case()
    there = {name: Pack(a) for name, a in params.items()}
    with pytest.raises(ValueError, match="weight_ih_l0 is on stream 0; expected 7, the stream of x"):
        fusedrnn.gru(Pack(x), None, there | {"weight_ih_l0": Chip(params["weight_ih_l0"])})
    fusedrnn.gru(Pack(x), None, there | {"weight_ih_l0": Chip(params["weight_ih_l0"], stream=7)})
    monkeypatch.setitem(arrays.STREAMS, "cuda_twin", lambda like: 0)
    Pack.streams.clear()
    assert arrays.device_array(Pack(x)).stream == 1 and Pack.streams == [1]  # DLPack has no stream 0


class Both(Pack):
    """As JAX: an interface that says nothing of streams, and DLPack."""

    @property
    def __cuda_array_interface__(self) -> Any:
        return {k: v for k, v in Chip(self._values).__cuda_array_interface__.items() if k != "stream"} | {"version": 2}


Both.__module__ = "cuda_twin"


def test_which_way_is_taken(library):
    assert arrays.device_array(Both(np.ones(3))).capsule is not None
    assert arrays.device_array(Chip(np.ones(3))).capsule is None
    managed, on_host = Pack(np.ones(3), place=dlpack.CUDA_MANAGED), Pack(np.ones((5, 3, 4)), place=dlpack.CPU)
    assert arrays.device_array(managed) is not None
    with pytest.raises(TypeError, match="x is a cuda_twin.Pack; expected a NumPy array"):
        fusedrnn.gru(on_host, None, gru_case()[2])


def test_layer(library):
    layer = fusedrnn.GRU(4, 7, seed=0).to(lambda a: Pack(bfloat16(a), "bfloat16"))
    x = gru_case()[0]
    y, _ = layer(Pack(bfloat16(x), "bfloat16"))
    close.check("y", wide(y), fusedrnn.GRU(4, 7, seed=0)(wide(bfloat16(x)).astype(np.float32))[0], 2e-2)
    assert layer.dtype == arrays.BFLOAT16


def test_only_what_may_be_written_is_clipped(library):
    grads = [Pack(np.array([3.0, 4.0])), Pack(bfloat16(np.array([12.0, 0.0])), "bfloat16")]
    norm = fusedrnn.clip.clip_grad_norm_(grads, 1.3)
    assert float(host(norm)) == 13.0
    close.check("a", host(grads[0]), np.array([0.3, 0.4]), 1e-6)
    close.check("b", wide(grads[1]), np.array([1.2, 0.0]), 1e-2)
    with pytest.raises(ValueError, match=r"grads\[0\] is read-only"):
        fusedrnn.clip.clip_grad_value_([OldPack(np.ones(3))], 0.5)


class Recorded(Pack):
    def __dlpack__(self, stream: int, max_version: Any = None) -> Any:
        raise BufferError("Can't export tensors that require gradient")


Recorded.__module__ = "cuda_twin"


def test_errors(library, monkeypatch):
    x, _, params = gru_case()
    there = {name: Pack(a) for name, a in params.items()}
    with pytest.raises(TypeError, match="cuda_twin.Recorded on a CUDA device cannot be read.*detach"):
        fusedrnn.gru(Recorded(x), None, there)
    with pytest.raises(TypeError, match="x has dtype complex128; expected float16, bfloat16, float32 or float64"):
        fusedrnn.gru(Pack(x.astype(complex)), None, there)
    monkeypatch.delitem(arrays.MAKERS, "cuda_twin")
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(TypeError, match="x is a cuda_twin.Pack on a CUDA device; expected one of cupy, numba, torch"):
        fusedrnn.gru(Pack(x), None, there)


def test_results_for_a_library_without_a_maker_are_cupys(library, monkeypatch):
    stream = types.SimpleNamespace(ptr=9)
    cuda = types.SimpleNamespace(Device=contextlib.nullcontext, get_current_stream=lambda: stream)
    cupy = types.SimpleNamespace(cuda=cuda, empty=lambda shape, dtype: Chip(np.empty(shape, dtype), stream=9))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.delitem(arrays.MAKERS, "cuda_twin")
    x, _, params = gru_case()
    y, _, _ = fusedrnn.gru(Pack(x), None, {name: Pack(a) for name, a in params.items()})
    assert y.stream == 9 and set(Pack.streams) == {9}
    close.check("y", host(y), fusedrnn.gru(x, None, params)[0], 1e-5)
