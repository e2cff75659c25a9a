# SPDX-License-Identifier: Apache-2.0
"""Whole calls of the CUDA backend without a GPU: engine and kernels on the device's CPU twin.

Random sizes and options; every cell, type and route; odd strides; workspace and tape of exactly the size asked for.
"""

import ctypes
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusedrnn.backends import Arguments, Problem, Results, reference

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests" / "csrc"
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or ""

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the CPU twin of the device is written for Linux"),
    pytest.mark.skipif(not COMPILER, reason="no C++ compiler"),
    pytest.mark.skipif(
        "libasan" in os.environ.get("LD_PRELOAD", ""), reason="the twin switches stacks under ASan's feet"
    ),
]

ROUTES = ("single", "cluster", "grid", "stepwise")
CELLS = ("rnn_tanh", "rnn_relu", "lstm", "gru", "gru_reset_before")  # CellKind
DTYPES = {"float32": 0, "tf32": 0, "float64": 1, "bfloat16": 2, "float16": 3}  # Dtype
BUDGETS = {"float64": 1e-12, "float32": 2e-5, "tf32": 2e-2, "float16": 2e-2, "bfloat16": 1e-1}


# The structs of csrc/api.h.


def _array(rank: int) -> type[ctypes.Structure]:
    fields = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64 * rank)]
    return type(f"Array{rank}", (ctypes.Structure,), {"_fields_": fields})


_Array2, _Array3, _Array4, _Array5 = (_array(n) for n in (2, 3, 4, 5))


class _Problem(ctypes.Structure):
    _fields_ = [
        *[(n, ctypes.c_int32) for n in ("cell", "dtype")],
        *[(n, ctypes.c_int64) for n in "TEBIH"],
        *[(n, ctypes.c_int32) for n in "LD"],
        *[(n, ctypes.c_bool) for n in ("reverse", "reset_to_initial", "recompute")],
        *[(n, ctypes.c_double) for n in ("clip_cell", "clip_grad", "dropout")],
        ("seed", ctypes.c_uint64),
        ("lengths", _Array2),
        ("reset", _Array3),
    ]


class _Params(ctypes.Structure):
    _fields_ = [("W", _Array3), ("R", _Array3), ("bW", _Array2), ("bR", _Array2)]


class _Arguments(ctypes.Structure):
    _fields_ = [("x", _Array4), ("h0", _Array4), ("c0", _Array4), ("params", ctypes.POINTER(_Params))]


class _Results(ctypes.Structure):
    _fields_ = [("y", _Array4), ("hn", _Array4), ("cn", _Array4), ("cells", _Array5)]


class _Call(ctypes.Structure):
    _fields_ = [
        *[(n, ctypes.c_void_p) for n in ("problem", "p", "out", "g", "dp")],
        *[(n, ctypes.c_int32) for n in ("tf32", "route")],
        ("seed", ctypes.c_uint64),
        ("failure", ctypes.c_char_p),
    ]


def _put(field: Any, array: np.ndarray | None) -> None:
    if array is not None:
        field.data = array.ctypes.data
        for i, stride in enumerate(array.strides):
            field.stride[i] = stride // array.itemsize


def _arguments(a: Arguments) -> _Arguments:
    out = _Arguments()
    for name in ("x", "h0", "c0"):
        _put(getattr(out, name), getattr(a, name))
    out.params = (_Params * len(a.params))()
    for i, arrays in enumerate(a.params):
        for name, array in zip(("W", "R", "bW", "bR"), arrays, strict=True):
            _put(getattr(out.params[i], name), array)
    return out


def _results(r: Results) -> _Results:
    out = _Results()
    for name in ("y", "hn", "cn", "cells"):
        _put(getattr(out, name), getattr(r, name))
    return out


class Types:
    """Arrays of one type: NumPy's, or bfloat16 as uint16."""

    def __init__(self, name: str) -> None:
        self.bfloat16 = name == "bfloat16"
        self.numpy = np.dtype({"bfloat16": "u2", "tf32": "f4"}.get(name, name))

    def store(self, a: Any) -> np.ndarray:
        if not self.bfloat16:
            return np.asarray(a).astype(self.numpy)
        bits = np.ascontiguousarray(a, np.float32).view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)

    def load(self, a: Any) -> Any:
        if a is None:
            return None
        return ((a.astype(np.uint32) << 16).view(np.float32) if self.bfloat16 else a).astype(np.float64)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("cuda_engine") / "engine.so"
    sources = [str(TESTS / f"{name}.cpp") for name in ("cuda_engine", "device_cpu", "device_fiber")]
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}", f"-I{TESTS}"]
    done = subprocess.run([COMPILER, *flags, *sources, "-o", str(path)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-6000:]
    return ctypes.CDLL(str(path))


class Case:
    """One random call, its answer and its gradients."""

    def __init__(self, cell: str, dtype: str, route: str, seed: int) -> None:
        pick, numbers = random.Random(seed), np.random.default_rng(seed)
        self.types, exact = Types(dtype), dtype.startswith("float") and dtype != "float16"
        G = {"lstm": 4, "gru": 3, "gru_reset_before": 3}.get(cell, 1)
        T, E, B = pick.choice([1, 4, 6]), pick.choice([1, 1, 2]), pick.choice([1, 3, 8, 17])
        I, H = pick.choice([1, 5, 8, 16]), pick.choice([1, 7, 8, 16, 21, 24])  # noqa: E741
        L, D = pick.choice([1, 1, 2]), pick.choice([1, 1, 2])
        has_c, odd, shared = cell == "lstm", pick.random() < 0.3, E > 1 and pick.random() < 0.5

        def maybe(value: Any, often: float, otherwise: Any = None) -> Any:
            return value if pick.random() < often else otherwise

        def strided(a: np.ndarray) -> np.ndarray:
            if not odd:
                return a
            wide = np.zeros((*(n + 1 for n in a.shape[:-1]), 2 * a.shape[-1]), a.dtype)
            view = wide[(*(slice(n) for n in a.shape[:-1]), slice(None, None, 2))]
            view[...] = a
            return view

        def draw(*shape: int, scale: float = 1.0) -> np.ndarray:
            return strided(self.types.store(numbers.uniform(-scale, scale, shape)))

        def empty(*shape: int) -> np.ndarray:
            return strided(self.types.store(np.full(shape, np.nan)))

        def weights(make: Any, *shape: int) -> np.ndarray:
            one = make(1 if shared else E, *shape)
            return np.lib.stride_tricks.as_strided(one, (E, *shape), (0, *one.strides[1:])) if shared else one

        self.problem = Problem(
            cell,
            T,
            E,
            B,
            I,
            H,
            L,
            D,
            reverse=D == 1 and pick.random() < 0.4,
            reset_to_initial=pick.random() < 0.5,
            clip_cell=maybe(0.5, 0.3, 0.0) if has_c and exact else 0.0,
            clip_grad=maybe(0.6, 0.3, 0.0) if exact else 0.0,
            dropout=maybe(0.4, 0.5, 0.0),
            seed=pick.getrandbits(64),
            lengths=maybe(numbers.integers(0, T + 1, (E, B)), 0.5),
            reset=maybe((numbers.random((T, E, B)) < 0.3).astype(np.uint8), 0.5),
        )
        state, bias, cells = pick.random() < 0.7, pick.random() < 0.7, pick.random() < 0.5
        shapes = [
            [(G * H, I if layer == 0 else D * H), (G * H, H), (G * H,), (G * H,)]
            for layer in range(L)
            for _ in range(D)
        ]
        size = [[(3 / s[-1]) ** 0.5 if len(s) == 2 else 0.5 for s in group] for group in shapes]
        wanted = 4 if bias else 2
        self.p = Arguments(
            draw(T, E, B, I),
            draw(L * D, E, B, H) if state else None,
            draw(L * D, E, B, H) if state and has_c else None,
            [
                tuple(
                    weights(lambda *n, s=s: draw(*n, scale=s), *n) if i < wanted else None
                    for i, (n, s) in enumerate(zip(g, k, strict=True))
                )
                for g, k in zip(shapes, size, strict=True)
            ],
        )
        self.dp = Arguments(
            empty(T, E, B, I),
            empty(L * D, E, B, H),
            empty(L * D, E, B, H) if has_c else None,
            [tuple(weights(empty, *n) if i < wanted else None for i, n in enumerate(g)) for g in shapes],
        )
        self.out = Results(
            empty(T, E, B, D * H),
            empty(L * D, E, B, H),
            empty(L * D, E, B, H) if has_c else None,
            empty(L, T, E, B, D * H) if cells else None,
        )
        self.g = Results(
            draw(T, E, B, D * H),
            maybe(draw(L * D, E, B, H), 0.7),
            maybe(draw(L * D, E, B, H), 0.7) if has_c else None,
            draw(L, T, E, B, D * H) if cells else None,
        )
        self.dtype, self.route, self.seed = dtype, route, seed

    def run(self, library: ctypes.CDLL) -> str:
        q = self.problem
        problem = _Problem(CELLS.index(q.cell), DTYPES[self.dtype], q.T, q.E, q.B, q.I, q.H, q.L, q.D)
        for name in ("reverse", "reset_to_initial", "clip_cell", "clip_grad", "dropout", "seed"):
            setattr(problem, name, getattr(q, name))
        _put(problem.lengths, q.lengths)
        _put(problem.reset, q.reset)
        p, dp, out, g = _arguments(self.p), _arguments(self.dp), _results(self.out), _results(self.g)
        failure = ctypes.create_string_buffer(256)
        call = _Call(*map(ctypes.addressof, (problem, p, out, g, dp)))
        call.tf32, call.route, call.seed = self.dtype == "tf32", ROUTES.index(self.route), self.seed
        call.failure = ctypes.cast(failure, ctypes.c_char_p)
        routes = library.fusedrnn_cuda_on_cpu(ctypes.byref(call))
        assert routes >= 0, f"{self}: {failure.value.decode()}"
        assert routes == 11 * ROUTES.index(self.route), f"{self}: took routes {routes}"
        return ""

    def check(self) -> None:
        wide = self.types.load

        def like(a: Any) -> Any:
            if a is None:
                return None
            one = np.full(tuple(1 if s == 0 else n for n, s in zip(a.shape, a.strides, strict=True)), np.nan)
            return np.lib.stride_tricks.as_strided(
                one, a.shape, [0 if s == 0 else t for s, t in zip(a.strides, one.strides, strict=True)]
            )

        names = ("y", "hn", "cn", "cells")
        p = Arguments(wide(self.p.x), wide(self.p.h0), wide(self.p.c0), [tuple(map(wide, w)) for w in self.p.params])
        g = Results(*(wide(getattr(self.g, n)) for n in names))
        out = Results(*(like(getattr(self.out, n)) for n in names))
        dp = Arguments(
            like(self.dp.x), like(self.dp.h0), like(self.dp.c0), [tuple(map(like, w)) for w in self.dp.params]
        )
        reference.forward(self.problem, p, out, None)
        reference.backward(self.problem, p, None, g, dp)
        pairs = [(n, getattr(self.out, n), getattr(out, n)) for n in names]
        pairs += [("d" + n, getattr(self.dp, n), getattr(dp, n)) for n in ("x", "h0", "c0")]
        for i, (got, expected) in enumerate(zip(self.dp.params, dp.params, strict=True)):
            pairs += [(f"d{n}[{i}]", a, b) for n, a, b in zip(("W", "R", "bW", "bR"), got, expected, strict=True)]
        for name, got, expected in pairs:
            if got is None:
                continue
            error = np.abs(wide(got) - expected)
            allowed = BUDGETS[self.dtype] * max(1.0, float(np.abs(expected).max(initial=0)))
            bad = ~(error <= allowed)  # NaN is bad
            if bad.any():
                at = tuple(int(i) for i in np.argwhere(bad)[0])
                raise AssertionError(
                    f"{self}: {name}{list(at)} is {wide(got)[at]:.8g}, "
                    f"expected {expected[at]:.8g}; allowed {allowed:.1e}"
                )

    def __str__(self) -> str:
        q = self.problem
        options = [n for n in ("reverse", "reset_to_initial", "clip_cell", "clip_grad", "dropout") if getattr(q, n)]
        options += [n for n in ("lengths", "reset") if getattr(q, n) is not None]
        return f"seed {self.seed}: T={q.T} E={q.E} B={q.B} I={q.I} H={q.H} L={q.L} D={q.D} {' '.join(options)}"


def kinds() -> list[tuple[str, str, str]]:
    every = [(c, d, r) for c in CELLS for d in DTYPES for r in ROUTES]
    # relu's slope jumps: where rounding moves a sum over 0, the gradient is another one
    every = [k for k in every if k[0] != "rnn_relu" or k[1] in ("float32", "float64")]
    return [
        k for k in every if k[2] == "stepwise" or (k[0] != "gru_reset_before" and k[1] not in ("float32", "float64"))
    ]


@pytest.mark.parametrize("cell, dtype, route", kinds())
def test_call(library: ctypes.CDLL, cell: str, dtype: str, route: str) -> None:
    for seed in range(int(os.environ.get("FUSEDRNN_CASES", "12"))):
        case = Case(cell, dtype, route, seed)
        case.run(library)
        case.check()
