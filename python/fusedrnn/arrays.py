# SPDX-License-Identifier: Apache-2.0
"""Whose array is this, and how its axes lie: from what users pass to the canonical views that backends take, and back.

Axes are written as letters: T steps, E weight sets, B rows, I inputs, H units, G gate rows (gates * H), J outputs
(directions * H), S state rows (layers * directions), L layers, K context, P outputs of a projection, N peepholes. Every
function makes views; nothing large is copied.

Arrays on a CUDA device come from any library that speaks `__cuda_array_interface__` or DLPack (CuPy, JAX, Numba, torch,
...); inside they are `DeviceArray`s. Results are made by the user's library where MAKERS has it, else by CuPy, and all
work is put on the stream that this library works on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from . import dlpack

X, Y, STATE, CELLS, LENGTHS, RESET = "TEBI", "TEBJ", "SEBH", "LTEBJ", "EB", "TEB"
TOKENS, CONTEXT = "TEB", "EBK"
WEIGHT_IH, WEIGHT_HH, BIAS, WEIGHT_CH = "EGI", "EGH", "EG", "EGK"
WEIGHT_HR, WEIGHT_PH, NORM_C = "EPH", "EN", "EH"


def kind(value: Any) -> str:
    """What to call a value in an error: its library and type, and its dtype and shape where it has them.

    >>> kind(np.zeros((2, 3)))
    'a NumPy float64 array of shape (2, 3)'
    >>> kind([1.0])
    'a list'
    """
    if isinstance(value, np.ndarray):
        return f"a NumPy {value.dtype} array of shape {value.shape}"
    if value is None:
        return "None"
    if isinstance(value, DeviceArray):
        value = value.owner
    module = type(value).__module__.partition(".")[0]
    name = type(value).__name__
    return f"a {name}" if module == "builtins" else f"a {module}.{name}"


@functools.cache
def data_axes(axes: str, batch_first: bool, unbatched: bool, sets: bool) -> str:
    """How x, y, cells or reset lie for the user: T is behind E and B for batch_first, and axes may be left out.

    >>> data_axes(X, batch_first=False, unbatched=False, sets=False), data_axes(X, True, False, True)
    ('TBI', 'EBTI')
    """
    if batch_first:
        axes = axes.replace("TEB", "EBT")
    return "".join(a for a in axes if not (a == "B" and unbatched) and not (a == "E" and not sets))


@functools.cache
def _plan(axes: str, target: str) -> tuple[Any, Any]:
    """The transposition (None: none) and the index that make `view`."""
    order = [axes.index(a) for a in target if a in axes]
    index = tuple(slice(None) if a in axes else None for a in target)
    return (None if order == sorted(order) else order), index


def view(array: Any, axes: str, target: str, sets: int = 1, *, write: bool = False) -> Any:
    """A view of an array that lies as `axes`, with the axes of `target`. Axes it lacks have size 1, but E has size
    `sets` and stride 0.

    >>> view(np.zeros((5, 7, 2)), "BTI", "TEBI").shape
    (7, 1, 5, 2)
    """
    if axes == target:
        return array
    order, index = _plan(axes, target)
    result = (array if order is None else array.transpose(order))[index]
    if sets != 1 and "E" in target and "E" not in axes:
        if isinstance(result, DeviceArray):
            return result.spread(target.index("E"), sets)
        shape = tuple(sets if a == "E" else n for a, n in zip(target, result.shape, strict=True))
        strides = tuple(0 if a == "E" else s for a, s in zip(target, result.strides, strict=True))
        result = np.lib.stride_tricks.as_strided(result, shape, strides, writeable=write)
    return result


# Arrays on a CUDA device.


class Bfloat16:
    """What stands for the dtype that NumPy lacks; equal to those of that name in other libraries."""

    name, itemsize, kind = "bfloat16", 2, "f"

    def __eq__(self, other: object) -> bool:
        return getattr(other, "name", None) == self.name

    def __hash__(self) -> int:
        return hash(self.name)

    def __repr__(self) -> str:
        return self.name


BFLOAT16: Any = Bfloat16()


class DeviceArray:
    """Where an array lies on a CUDA device, as kernels see it, and whose it is. Indexing and transposing make views.

    pointer, shape, strides (bytes), kind (the dtype's name; "bfloat16" too), stream (that its library works on), owner
    (the array of the user's library that keeps the memory), writeable, capsule (what keeps the memory that came by
    DLPack).
    """

    __slots__ = ("capsule", "kind", "itemsize", "owner", "pointer", "shape", "stream", "strides", "writeable")

    def __init__(
        self,
        owner: Any,
        pointer: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        kind: str,
        size: int,
        stream: int,
        writeable: bool = True,
        capsule: Any = None,
    ) -> None:
        self.owner, self.pointer, self.shape, self.strides = owner, pointer, shape, strides
        self.kind, self.itemsize, self.stream = kind, size, stream
        self.writeable, self.capsule = writeable, capsule

    @property
    def number(self) -> int | None:
        """Of several devices, the one it is on; None where its library does not tell."""
        place, number = dlpack.device(self.owner)
        return number if place in (dlpack.CUDA, dlpack.CUDA_MANAGED) else None

    @property
    def dtype(self) -> np.dtype[Any]:
        return BFLOAT16 if self.kind == "bfloat16" else np.dtype(self.kind)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        return self.size * self.itemsize

    def _view(self, shape: Any, strides: Any) -> DeviceArray:
        return self._like(tuple(shape), tuple(strides), self.kind)

    def _like(self, shape: tuple[int, ...], strides: tuple[int, ...], kind: str) -> DeviceArray:
        rest = (kind, self.itemsize, self.stream, self.writeable, self.capsule)
        return type(self)(self.owner, self.pointer, shape, strides, *rest)

    def transpose(self, order: Any) -> DeviceArray:
        return self._view((self.shape[n] for n in order), (self.strides[n] for n in order))

    def __getitem__(self, index: tuple[Any, ...]) -> DeviceArray:
        """As `view` indexes: slice(None) keeps an axis, None makes one."""
        shape, strides, axis = [], [], 0
        for part in index:
            shape.append(1 if part is None else self.shape[axis])
            strides.append(0 if part is None else self.strides[axis])
            axis += part is not None
        return self._view(shape, strides)

    def spread(self, axis: int, sets: int) -> DeviceArray:
        """With stride 0 on an axis of so many weight sets."""
        shape, strides = list(self.shape), list(self.strides)
        shape[axis], strides[axis] = sets, 0
        return self._view(shape, strides)

    def as_bytes(self) -> DeviceArray:
        """A bool array as uint8."""
        return self._like(self.shape, self.strides, "uint8")

    def current_stream(self) -> int:
        """The stream that its library works on now."""
        if self.capsule is not None:
            return _stream(self.owner)
        again = device_array(self.owner)
        return self.stream if again is None else again.stream

    def new(self, shape: tuple[int, ...], dtype: Any) -> DeviceArray:
        """A new array of the same library on the same device, with undefined contents."""
        kind = BFLOAT16 if dtype == BFLOAT16 else np.dtype(dtype)
        result = device_array(MAKERS[_library(self.owner)](tuple(shape), kind, self.owner))
        assert result is not None
        return result


def _cupy(shape: tuple[int, ...], dtype: Any, like: Any) -> Any:
    import cupy

    if dtype is BFLOAT16:
        import ml_dtypes

        dtype = np.dtype(ml_dtypes.bfloat16)
    with _cupy_device(like):
        return cupy.empty(shape, dtype)


def _cupy_device(like: Any) -> Any:
    """The device that an array is on, as CuPy has it; the current one where it does not tell."""
    import cupy

    place, number = dlpack.device(like)
    return cupy.cuda.Device() if place == dlpack.CPU else cupy.cuda.Device(number)


def _numba(shape: tuple[int, ...], dtype: Any, like: Any) -> Any:
    from numba import cuda

    return cuda.device_array(shape, dtype)


def _torch(shape: tuple[int, ...], dtype: Any, like: Any) -> Any:
    import torch

    return torch.empty(shape, dtype=getattr(torch, dtype.name), device=like.device)


# Library (the package that a type comes from) -> what makes an array of it: f(shape, dtype, like); dtype is NumPy's or
# BFLOAT16. More may be added.
MAKERS: dict[str, Callable[[tuple[int, ...], Any, Any], Any]] = {"cupy": _cupy, "numba": _numba, "torch": _torch}


def _cupy_stream(like: Any) -> int:
    import cupy

    with _cupy_device(like):
        return int(cupy.cuda.get_current_stream().ptr)


def _torch_stream(like: Any) -> int:
    import torch

    return int(torch.cuda.current_stream(like.device).cuda_stream)


# Library -> the stream that it works on now, f(like): for arrays that come by DLPack, which does not tell.
STREAMS: dict[str, Callable[[Any], int]] = {"cupy": _cupy_stream, "torch": _torch_stream}


def _library(value: Any) -> str:
    """Whose arrays the results of a call with this one are."""
    for base in type(value).__mro__:
        if (name := base.__module__.partition(".")[0]) in MAKERS:
            return name
    try:
        import cupy  # noqa: F401
    except ImportError:
        raise TypeError(
            f"fusedrnn: x is {kind(value)} on a CUDA device; expected one of {', '.join(sorted(MAKERS))}: nothing is "
            "known that makes results of its library. Install CuPy, whose arrays they will then be, or add the library "
            "to fusedrnn.arrays.MAKERS."
        ) from None
    return "cupy"


def _stream(value: Any) -> int:
    """The stream that work on an array that came by DLPack is put on. CUDA's stream 0 is called 1, as CuPy does."""
    name = _library(value)
    return (STREAMS[name](value) if name in STREAMS else 0) or 1


def device_array(value: Any) -> DeviceArray | None:
    """What lies on a CUDA device, as kernels see it; None for everything else.

    By `__cuda_array_interface__` where it tells the stream and the type, else by DLPack: then its library makes the
    stream that we work on wait for it.

    >>> device_array(np.zeros(3)) is None
    True
    """
    if isinstance(value, DeviceArray):
        return value
    if isinstance(value, np.ndarray):
        return None
    face = None
    if hasattr(type(value), "__cuda_array_interface__") and type(value).__module__.partition(".")[0] != "torch":
        face = getattr(value, "__cuda_array_interface__", None)  # the type may have it while this array is on the host
    if face is None or face.get("version", 0) < 3 or np.dtype(face["typestr"]).kind == "V":
        if dlpack.device(value)[0] in (dlpack.CUDA, dlpack.CUDA_MANAGED):
            return _by_dlpack(value)
        if face is None:
            return None
    dtype = np.dtype(face["typestr"])
    if face.get("mask") is not None:
        raise TypeError(
            "fusedrnn: an array on a CUDA device has a mask; expected plain values. Pass lengths for padding."
        )
    shape = tuple(face["shape"])
    strides = face.get("strides")
    pointer, read_only = face["data"]
    return DeviceArray(
        value,
        int(pointer or 0),
        shape,
        dlpack.contiguous(shape, dtype.itemsize) if strides is None else tuple(strides),
        dtype.name,
        dtype.itemsize,
        face.get("stream") or 0,
        not read_only,
    )


def _by_dlpack(value: Any) -> DeviceArray:
    stream = _stream(value)
    try:
        found = dlpack.read(value, stream)
    except BufferError as error:  # torch: what takes gradients
        raise TypeError(
            f"fusedrnn: {kind(value)} on a CUDA device cannot be read: {error}. Nothing is recorded for "
            "gradients here: pass tensor.detach(), or use fusedrnn.torch."
        ) from None
    rest = (found.kind, found.itemsize, stream, found.writeable, found.capsule)
    return DeviceArray(value, found.pointer, found.shape, found.strides, *rest)


def on_device(value: Any) -> Any:
    """A nesting of mappings and sequences with its arrays on CUDA devices as `DeviceArray`s, the rest as it is."""
    if isinstance(value, Mapping):
        return {key: on_device(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(map(on_device, value))
    found = device_array(value)
    return value if found is None else found


def users(value: Any) -> Any:
    """The inverse, for results."""
    if isinstance(value, DeviceArray):
        return value.owner
    if isinstance(value, dict):
        return {key: users(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(map(users, value))
    return value


def is_array(value: Any) -> bool:
    """Whether it is an array of NumPy's or one on a CUDA device."""
    return isinstance(value, np.ndarray) or device_array(value) is not None


def concatenate(parts: Sequence[Any], axis: int) -> Any:
    """The parts behind each other, in a new array of their library.

    >>> concatenate([np.zeros((2, 1)), np.ones((2, 2))], 1).shape
    (2, 3)
    """
    like = device_array(parts[0])
    if like is None:
        return np.concatenate(parts, axis)
    shape = list(like.shape)
    shape[axis] = sum(part.shape[axis] for part in parts)
    whole = like.new(tuple(shape), like.dtype).owner
    begin = 0
    for part in parts:
        end = begin + part.shape[axis]
        whole[(slice(None),) * axis + (slice(begin, end),)] = part
        begin = end
    return whole


def zeros(shape: tuple[int, ...], like: Any) -> Any:
    """Zeros of the library and dtype of `like`."""
    device = device_array(like)
    if device is None:
        return np.zeros(shape, like.dtype)
    new = device.new(shape, device.dtype).owner
    new[...] = 0
    return new


def empty(shape: tuple[int, ...], dtype: Any, like: Any) -> Any:
    """A new array with undefined contents where `like` is."""
    return like.new(shape, dtype) if isinstance(like, DeviceArray) else np.empty(shape, dtype)
