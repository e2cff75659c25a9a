# SPDX-License-Identifier: Apache-2.0
"""A CUDA device without a GPU: the bindings of the CUDA backend, compiled over the CPU twin of the device, and arrays
whose 'device memory' is NumPy's. Linked once per run of pytest (see `twin` in conftest.py). Where there is a GPU, the
same tests run on it too: `memory` is then the GPU's."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np

from compiled import COMPILER, CSRC, TESTS, linked, objects
from fusedrnn import arrays, dlpack
from fusedrnn.cells import CELLS

# sources, the slowest first
SOURCES = [
    *(TESTS / f"cuda_twin_{cell}.cpp" for cell in ("rnn", "gru", "lstm")),
    CSRC / "bindings" / "cuda.cpp",
    TESTS / "cuda_twin.cpp",
    *(TESTS / f"{name}.cpp" for name in ("device_cpu", "device_fiber")),
    CSRC / "cpu" / "threads" / "fiber.cpp",
    CSRC / "cuda" / "entry.cpp",
]


ROUTES = ("single", "cluster", "grid", "stepwise")
PERSISTENT = ("rnn_tanh", "rnn_relu", "lstm", "gru")  # the others run step by step, and so does float64


def kinds(budgets: dict[str, float]) -> list[tuple[str, str, str]]:
    """Cell, type and route of all that runs, for types with these error budgets. Coarse types leave out cells whose
    gradient jumps: where rounding moves a sum over 0, the gradient is another one."""
    return [
        (name, dtype, route)
        for name, cell in CELLS.items()
        for dtype, budget in budgets.items()
        for route in ROUTES
        if cell.smooth or budget < 1e-3
        if route == "stepwise" or (name in PERSISTENT and dtype != "float64")
    ]


def why_not() -> str:
    """Why it cannot be built here; "" if it can."""
    if sys.platform != "linux":
        return "the CPU twin of the device is written for Linux"
    if not COMPILER:
        return "no C++ compiler"
    if "libasan" in os.environ.get("LD_PRELOAD", ""):
        return "the twin switches stacks under ASan's feet"
    return "" if importlib.util.find_spec("pybind11") else "no pybind11"


def build(folder: Path) -> Any:
    """The extension module's submodule `cuda`."""
    import pybind11

    flags = ["-O1", "-fPIC", "-fvisibility=hidden", "-DFUSEDRNN_HAVE_CUDA"]
    parts = objects(SOURCES, flags, system=[pybind11.get_include(), sysconfig.get_path("include")])
    path = linked(parts, folder / "fusedrnn_cuda_twin.so", ["-shared"])
    spec = importlib.util.spec_from_file_location("fusedrnn_cuda_twin", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.cuda


class Memory:
    """The twin's: an array's own."""

    device = "cpu"  # torch's name

    def put(self, values: np.ndarray) -> Any:
        return None

    def address(self, values: np.ndarray, there: Any) -> int:
        return values.ctypes.data

    def read(self, values: np.ndarray, there: Any) -> None:
        """What lies there, into the array."""

    def write(self, values: np.ndarray, there: Any) -> None:
        """The inverse."""


class MemoryOfTorch(Memory):
    """A GPU's: all bytes between an array's first and last element, so that it lies there with the same strides."""

    def __init__(self, device: str) -> None:
        import torch

        self.device, self.torch = device, torch

    def _bytes(self, values: np.ndarray) -> tuple[int, Any]:
        if not values.size:
            return values.ctypes.data, self.torch.empty(0, dtype=self.torch.uint8)
        first, last = np.lib.array_utils.byte_bounds(values)
        raw = (ctypes.c_uint8 * (last - first)).from_address(first)
        return first, self.torch.frombuffer(raw, dtype=self.torch.uint8)

    def put(self, values: np.ndarray) -> Any:
        first, raw = self._bytes(values)
        return first, raw.to(self.device, copy=True)

    def address(self, values: np.ndarray, there: Any) -> int:
        return int(there[1].data_ptr() + values.ctypes.data - there[0])

    def read(self, values: np.ndarray, there: Any) -> None:
        first, raw = self._bytes(values)
        raw.copy_(there[1][first - there[0] :][: raw.numel()])

    def write(self, values: np.ndarray, there: Any) -> None:
        first, raw = self._bytes(values)
        there[1][first - there[0] :][: raw.numel()].copy_(raw)


memory = Memory()


class Chip:
    """An array of a library that NumPy cannot read: what it holds is seen through its interface only."""

    def __init__(self, values: np.ndarray, stream: int | None = None, there: Any = None) -> None:
        self._mirror, self.stream = values, stream
        self._there = memory.put(values) if there is None else there

    @property
    def _values(self) -> np.ndarray:
        memory.read(self._mirror, self._there)
        return self._mirror

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        a = self._mirror
        contiguous = a.flags.c_contiguous
        return {
            "shape": a.shape,
            "typestr": a.dtype.str,
            "data": (memory.address(a, self._there), False),
            "strides": None if contiguous else a.strides,
            "version": 3,
            "stream": self.stream,
        }

    @property
    def shape(self) -> tuple[int, ...]:
        return self._mirror.shape

    @property
    def ndim(self) -> int:
        return self._mirror.ndim

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._mirror.dtype

    def __getitem__(self, index: Any) -> Chip:
        return Chip(self._mirror[index], there=self._there)

    def __setitem__(self, index: Any, value: Any) -> None:
        self._values[index] = value._values if isinstance(value, Chip) else value
        memory.write(self._mirror, self._there)

    def __iadd__(self, other: Chip) -> Chip:
        mine = self._values
        mine += other._values
        memory.write(self._mirror, self._there)
        return self

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("an array on a device is not NumPy's to read")

    def copy(self) -> Chip:
        return Chip(self._values.copy())


class Pack:
    """An array on the device that speaks DLPack only. bfloat16: what it holds is the upper halves of float32s. streams:
    those that were made to wait for an array, of all."""

    streams: list[int] = []

    def __init__(self, values: np.ndarray, kind: str = "", place: int = dlpack.CUDA) -> None:
        self._chip, self._place = Chip(values), place
        self._kind = kind or values.dtype.name

    @property
    def _values(self) -> np.ndarray:
        return self._chip._values

    @property
    def shape(self) -> tuple[int, ...]:
        return self._chip.shape

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._place, 0

    def __dlpack__(self, stream: int, max_version: Any = None) -> Any:
        Pack.streams.append(stream)
        version = {} if max_version is None else {"max_version": max_version}
        values = self._chip._mirror.view(np.uint8) if self._kind == "bool" else self._chip._mirror
        capsule = values.__dlpack__(**version)  # NumPy's, changed in some places
        name = b"dltensor_versioned" if version else b"dltensor"
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        start = pointer(capsule, name) + (32 if version else 0)
        ctypes.c_void_p.from_address(start).value = memory.address(values, self._chip._there)
        ctypes.c_uint64.from_address(start + 40).value = 0  # bytes between there and the first element
        ctypes.c_int32.from_address(start + 8).value = self._place
        if self._kind in ("bfloat16", "bool"):
            ctypes.c_uint8.from_address(start + 20).value = 4 if self._kind == "bfloat16" else 6
        return capsule


class OldPack(Pack):
    """The same of a library that knows no versions: it cannot say that an array may be written."""

    def __dlpack__(self, stream: int) -> Any:  # type: ignore[override]
        return super().__dlpack__(stream)


def chip(value: Any) -> Any:
    """A nesting of NumPy arrays on the device; and back."""
    if isinstance(value, dict):
        return {k: chip(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(chip, value))
    return Chip(value.copy("K")) if isinstance(value, np.ndarray) else value


def host(value: Any) -> Any:
    """The inverse of `chip`."""
    if isinstance(value, dict):
        return {k: host(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(host, value))
    return value._values if isinstance(value, Chip | Pack) else value


def make(shape: tuple[int, ...], dtype: Any, like: Any) -> Any:
    """As a library's empty: of exactly this size, 256-byte aligned, and full of NaN (0xFF)."""
    if dtype == arrays.BFLOAT16:
        return Pack(make(shape, np.uint16, like)._values, "bfloat16")
    dtype = np.dtype(dtype)
    n = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.full(n + 512, 0xFF, np.uint8)
    start = -raw.ctypes.data % 256
    return Chip(raw[start : start + n].view(dtype).reshape(shape))


class OnGpu:
    """The extension's own `cuda`, for tests written for the twin's."""

    def __init__(self, extension: Any) -> None:
        self._extension = extension

    def __getattr__(self, name: str) -> Any:
        return getattr(self._extension, name)

    def schedule(self, seed: int) -> None:
        """A GPU has its own."""

    def pretend(self, **what: Any) -> None:
        import pytest

        if what:
            pytest.skip("a GPU cannot be told to be broken")


def why_no_gpu() -> str:
    """Why the tests cannot run on a GPU; "" if they can."""
    from fusedrnn import backends

    native = backends.load("native")
    if native is None or native.cuda is None:
        return "this build has no CUDA kernels"
    why = native.cuda.devices()[1]
    if why or not importlib.util.find_spec("torch"):
        return why or "no torch, which has the memory"
    import torch

    return "" if torch.cuda.is_available() else "this torch has no CUDA"
