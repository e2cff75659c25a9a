# SPDX-License-Identifier: Apache-2.0
"""Whole calls of the CUDA backend on canonical arrays: engine and kernels on the device's CPU twin, or on a GPU.

Random sizes and options; every cell, type and route; odd strides; workspace and tape of exactly the size asked for.
"""

import os
import random
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from cuda_twin import ROUTES, Chip, kinds
from fusedrnn.arrays import DeviceArray, device_array
from fusedrnn.backends import Arguments, Problem, Results, reference
from fusedrnn.cells import CELLS

FLOAT32 = {"float32": 0, "tf32": 1, "3xtf32": 2}  # how it is multiplied
BUDGETS = {"float64": 1e-12, "float32": 2e-5, "3xtf32": 2e-5, "tf32": 2e-2, "float16": 2e-2, "bfloat16": 1e-1}


def seen(value: Any, kind: str) -> Any:
    """A nesting of NumPy arrays as the bindings see it."""
    if isinstance(value, np.ndarray):
        there = device_array(Chip(value))
        assert there
        there.kind = kind
        return there
    if isinstance(value, list | tuple):
        return type(value)(seen(v, kind) for v in value)
    if isinstance(value, Arguments):
        return Arguments(*(seen(v, kind) for v in (value.x, value.h0, value.c0, value.params)))
    if isinstance(value, Results):
        return Results(*(seen(v, kind) for v in (value.y, value.hn, value.cn, value.cells)))
    return value


def read(value: Any) -> None:
    """What lies on the device into the arrays that it was made of."""
    if isinstance(value, DeviceArray):
        value.owner._values  # noqa: B018
    elif isinstance(value, list | tuple):
        for v in value:
            read(v)
    elif isinstance(value, Arguments | Results):
        read([getattr(value, field.name) for field in fields(value)])


def flat(value: Any) -> list[Any]:
    """The arrays in a nesting of them."""
    if isinstance(value, Arguments | Results):
        value = [getattr(value, field.name) for field in fields(value)]
    if isinstance(value, list | tuple):
        return [a for v in value for a in flat(v)]
    return [value] if isinstance(value, np.ndarray) else []


class Memory:
    """So many bytes, full of NaN and aligned, with a mark behind them."""

    MARK = 0xA5

    def __init__(self, size: int) -> None:
        raw = np.full(size + 1024, self.MARK, np.uint8)
        raw = raw[-raw.ctypes.data % 256 :]
        raw[:size] = 0xFF
        self.size, self.there = size, Chip(raw)

    @property
    def pointer(self) -> int:
        return int(self.there.__cuda_array_interface__["data"][0])

    def bytes(self) -> np.ndarray:
        return self.there._values

    def check(self, label: str) -> None:
        beyond = self.bytes()[self.size :] != self.MARK
        assert not beyond.any(), (
            f"{label}: byte {int(np.argmax(beyond))} behind the memory that was asked for is written"
        )


class Types:
    """Arrays of one type: NumPy's, or bfloat16 as uint16."""

    def __init__(self, name: str) -> None:
        self.bfloat16 = name == "bfloat16"
        self.numpy = np.dtype("f4" if name in FLOAT32 else {"bfloat16": "u2"}.get(name, name))

    def store(self, a: Any) -> np.ndarray:
        if not self.bfloat16:
            return np.asarray(a).astype(self.numpy)
        bits = np.ascontiguousarray(a, np.float32).view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)

    def load(self, a: Any) -> Any:
        if a is None:
            return None
        return ((a.astype(np.uint32) << 16).view(np.float32) if self.bfloat16 else a).astype(np.float64)


class Case:
    """One random call, its answer and its gradients."""

    def __init__(
        self, cell: str, dtype: str, route: str, seed: int, steps: Sequence[int] = (1, 4, 6), recompute: bool = False,
        cut: bool = False,
    ) -> None:  # fmt: skip
        """cut: two directions, rows of several lengths, and resets."""
        pick, numbers = random.Random(seed), np.random.default_rng(seed)
        self.types, exact = Types(dtype), BUDGETS[dtype] < 1e-3
        G, has_c = CELLS[cell].gates, CELLS[cell].cell_state
        T, E, B = pick.choice(steps), pick.choice([1, 1, 2]), pick.choice([3, 8] if cut else [1, 3, 8, 17])
        I, H = pick.choice([1, 5, 8, 16]), pick.choice([1, 7, 8, 16, 21, 24])  # noqa: E741
        L, D = pick.choice([1, 1, 2]), 2 if cut else pick.choice([1, 1, 2])
        odd, shared = pick.random() < 0.3, E > 1 and pick.random() < 0.5

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
            recompute=recompute,
            reverse=D == 1 and pick.random() < 0.4,
            reset_to_initial=seed % 2 == 1 if cut else pick.random() < 0.5,
            clip_cell=maybe(0.5, 0.3, 0.0) if has_c and exact else 0.0,
            clip_grad=maybe(0.6, 0.3, 0.0) if exact else 0.0,
            dropout=maybe(0.4, 0.5, 0.0),
            seed=pick.getrandbits(64),
            lengths=maybe(numbers.integers(0, T + 1, (E, B)), 1.0 if cut else 0.5),
            reset=maybe((numbers.random((T, E, B)) < 0.3).astype(np.uint8), 1.0 if cut else 0.5),
        )
        if cut:  # of one row, at both directions' ends of 64 steps
            self.problem.lengths[:, 0] = T
            self.problem.reset[64::64, :, 0] = self.problem.reset[T % 64 :: 64, :, 0] = 1
        state, bias, cells = pick.random() < 0.7, pick.random() < 0.7, pick.random() < 0.5
        shapes = [
            [(G * H, I if layer == 0 else D * H), (G * H, H), (G * H,), (G * H,)]
            for layer in range(L)
            for _ in range(D)
        ]
        size = [[(3 / s[-1]) ** 0.5 if len(s) == 2 else 0.5 for s in group] for group in shapes]
        wanted = [True, not cell.startswith("min"), bias, bias and not cell.startswith("min")]
        self.p = Arguments(
            draw(T, E, B, I),
            draw(L * D, E, B, H) if state else None,
            draw(L * D, E, B, H) if state and has_c else None,
            [
                tuple(
                    weights(lambda *n, s=s: draw(*n, scale=s), *n) if wanted[i] else None
                    for i, (n, s) in enumerate(zip(g, k, strict=True))
                )
                for g, k in zip(shapes, size, strict=True)
            ],
        )
        self.dp = Arguments(
            empty(T, E, B, I),
            empty(L * D, E, B, H),
            empty(L * D, E, B, H) if has_c else None,
            [tuple(weights(empty, *n) if wanted[i] else None for i, n in enumerate(g)) for g in shapes],
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

    def run(self, extension: Any) -> int:
        """Both calls. The bytes of the tape."""
        q = self.problem
        extension.schedule(self.seed)
        kind = "float32" if self.dtype in FLOAT32 else self.dtype
        problem = replace(q, lengths=seen(q.lengths, "int64"), reset=seen(q.reset, "uint8"))
        p, dp, out, g = (seen(v, kind) for v in (self.p, self.dp, self.out, self.g))
        settings = (ROUTES.index(self.route), FLOAT32.get(self.dtype, 0))
        forward = extension.Forward(problem, p, out, True, *settings)
        backward = extension.Backward(problem, p, g, dp, *settings)
        assert forward.tape_bytes == backward.tape_bytes
        tape, first, second = map(Memory, (forward.tape_bytes, forward.workspace_bytes, backward.workspace_bytes))
        forward.run(tape.pointer, first.pointer, 0)
        kept = tape.bytes().copy()
        backward.run(tape.pointer, second.pointer, 0)
        assert np.array_equal(kept, tape.bytes()), f"{self}: backward wrote to the tape"
        for name, memory in (("tape", tape), ("forward", first), ("backward", second)):
            memory.check(f"{self}: {name}")
        read([dp, out])
        assert forward.route == backward.route == self.route, f"{self}: took {forward.route}, {backward.route}"
        return int(forward.tape_bytes)

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

    def same(self, other: "Case") -> None:
        """Against the same call in another way, within part of what may lie between it and float64."""
        # r h' was made of an h that no rounding had touched, and is made again of one of 16 bits
        part = 1 / 2 if self.problem.cell == "gru_reset_before" and self.dtype.endswith("16") else 1 / 8
        for a, b in zip(flat(self.out), flat(other.out), strict=True):
            assert np.array_equal(a, b), f"{self}: results differ"
        for n, (a, b) in enumerate(zip(flat(self.dp), flat(other.dp), strict=True)):
            got, expected = self.types.load(a), self.types.load(b)
            allowed = BUDGETS[self.dtype] * part * max(1.0, float(np.abs(expected).max(initial=0)))
            worst = float(np.abs(got - expected).max(initial=0))
            assert worst <= allowed, f"{self}: gradient {n} is off by {worst:.2e}; allowed {allowed:.1e}"

    def __str__(self) -> str:
        q = self.problem
        options = [
            n
            for n in ("reverse", "reset_to_initial", "clip_cell", "clip_grad", "dropout", "recompute")
            if getattr(q, n)
        ]
        options += [n for n in ("lengths", "reset") if getattr(q, n) is not None]
        return f"seed {self.seed}: T={q.T} E={q.E} B={q.B} I={q.I} H={q.H} L={q.L} D={q.D} {' '.join(options)}"


@pytest.mark.parametrize("cell, dtype, route", kinds(BUDGETS))
def test_call(twin_extension: Any, cell: str, dtype: str, route: str) -> None:
    for seed in range(int(os.environ.get("FUSEDRNN_CASES", "12"))):
        case = Case(cell, dtype, route, seed)
        case.run(twin_extension)
        case.check()


# T: one step; a prime number of them; around the end of a part of the walk; three parts, the last one short
STEPS = (1, 37, 63, 64, 65, 131)


@pytest.mark.slow
@pytest.mark.parametrize("cell, dtype, route", kinds(BUDGETS))
def test_recompute(twin_extension: Any, cell: str, dtype: str, route: str) -> None:
    """As the ordinary tape of the same call: results in every bit, gradients but for the order of sums; and float64."""
    for seed in range(int(os.environ.get("FUSEDRNN_CASES", "4"))):
        # the first two: every option that has to do with where a part begins and ends
        cut, steps = seed < 2, STEPS if seed > 1 else (131,)
        one, other = (Case(cell, dtype, route, seed, steps, recompute, cut) for recompute in (True, False))
        tape, whole = one.run(twin_extension), other.run(twin_extension)
        assert tape <= whole / 2 + 256 * one.problem.L * CELLS[cell].cell_state, (
            f"{one}: tape of {tape} bytes, {whole} without"
        )
        one.same(other)
        if BUDGETS[dtype] < 1e-3:  # what rounding does to a gradient over 131 steps has no bound
            one.check()


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("T, B", [(256, 16), (1000, 64), (100, 300), (37, 1), (64, 4)])
def test_recompute_keeps_half_the_tape(twin_extension: Any, cell: str, T: int, B: int) -> None:
    def bytes_of(recompute: bool, L: int) -> int:  # noqa: N803
        G, H, I = CELLS[cell].gates, 24, 8  # noqa: E741
        some = Memory(64)

        def array(*shape: int) -> Any:
            return DeviceArray(some, some.pointer, shape, np.empty(shape, np.uint16).strides, "float16", 2, 0)

        R = array(1, G * H, H) if CELLS[cell].state_product else None
        weights = [(array(1, G * H, H if n else I), R, None, None) for n in range(L)]
        problem, p = (
            Problem(cell, T, 1, B, I, H, L, recompute=recompute),
            Arguments(array(T, 1, B, I), None, None, weights),
        )
        return int(twin_extension.Forward(problem, p, Results(), True, 3, False).tape_bytes)

    for L in (1, 3):
        elements = T * B * 24 * 2 * L
        less, whole = bytes_of(True, L), bytes_of(False, L)
        assert less <= whole / 2
        assert elements <= less <= elements * (1.25 if CELLS[cell].cell_state else 1) + 512 * L
