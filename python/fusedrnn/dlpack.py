# SPDX-License-Identifier: Apache-2.0
"""Reading arrays of other libraries by DLPack (https://dmlc.github.io/dlpack): where they lie, not what they hold.

Nothing is copied. The memory belongs to the capsule: whoever uses it keeps the capsule (`Found.capsule`), which is not
marked as used, so that its own end tells the library.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

CPU, CUDA, CUDA_MANAGED = 1, 2, 13  # DLDeviceType
_KINDS = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex", 6: "bool"}  # DLDataTypeCode
_READ_ONLY = 1  # bit of `flags`


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),  # in elements; null: contiguous
        ("byte_offset", ctypes.c_uint64),
    )


class _Versioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


class Found(NamedTuple):
    """An array: strides in bytes, the dtype's name. Without word from its library it is not writeable."""

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    kind: str
    itemsize: int
    writeable: bool
    capsule: Any


def device(value: Any) -> tuple[int, int]:
    """The kind and number of the device that a value lies on; (CPU, 0) for what knows no DLPack.

    >>> import numpy as np
    >>> device(np.zeros(3)), device([1.0])
    ((1, 0), (1, 0))
    """
    if not hasattr(type(value), "__dlpack__") or not hasattr(type(value), "__dlpack_device__"):
        return CPU, 0
    kind, number = value.__dlpack_device__()
    return int(kind), int(number)


def read(value: Any, stream: int | None = None) -> Found:
    """What lies there. stream: the CUDA stream that will use it; its library makes that one wait for the values (None:
    the array is on the host). Raises BufferError where the library does not give it.

    >>> import numpy as np
    >>> read(np.zeros((2, 3), np.float32)).strides
    (12, 4)
    """
    options: dict[str, Any] = {} if stream is None else {"stream": stream or 1}  # DLPack's 1 is CUDA's 0
    try:
        capsule = value.__dlpack__(**options, max_version=(1, 0))
    except TypeError:  # written before there were versions
        capsule = value.__dlpack__(**options)
    name = ctypes.pythonapi.PyCapsule_GetName
    name.restype, name.argtypes = ctypes.c_char_p, [ctypes.py_object]
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    label: bytes = name(capsule)
    if label == b"dltensor_versioned":
        head = ctypes.cast(pointer(capsule, label), ctypes.POINTER(_Versioned)).contents
        if head.major != 1:
            raise BufferError(f"it speaks DLPack {head.major}.{head.minor}; expected 1")
        tensor, writeable = head.tensor, not head.flags & _READ_ONLY
    elif label == b"dltensor":
        tensor, writeable = ctypes.cast(pointer(capsule, label), ctypes.POINTER(_Tensor)).contents, False
    else:
        raise BufferError(f"its capsule is called {label.decode()!r}; expected dltensor or dltensor_versioned")
    bits, lanes = tensor.bits, tensor.lanes
    word = _KINDS.get(tensor.code, f"type{tensor.code}_")
    kind = word if word == "bool" else f"{word}{bits}"
    if lanes != 1 or bits % 8:
        raise BufferError(f"its elements are {lanes} x {kind}; expected one whole number of bytes each")
    size = bits // 8
    shape = tuple(tensor.shape[n] for n in range(tensor.ndim))
    if tensor.strides:
        strides = tuple(tensor.strides[n] * size for n in range(tensor.ndim))
    else:
        strides = contiguous(shape, size)
    return Found((tensor.data or 0) + tensor.byte_offset, shape, strides, kind, size, writeable, capsule)


def contiguous(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Strides in bytes of an array without gaps, the last axis innermost.

    >>> contiguous((2, 3), 4)
    (12, 4)
    """
    strides: list[int] = []
    step = itemsize
    for n in reversed(shape):
        strides.insert(0, step)
        step *= n
    return tuple(strides)
