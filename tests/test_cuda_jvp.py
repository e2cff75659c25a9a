# SPDX-License-Identifier: Apache-2.0
"""Tangents on a CUDA device, from fusedrnn's functions to the kernels on the CPU twin, against the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import close
import fusedrnn
from cuda_twin import chip, host
from fusedrnn import ops
from fusedrnn import params as parameters
from shapes import OPS
from test_cuda import Case, flat
from test_cuda_inputs import Case as InputsCase


def tangents(tape: ops.Tape, host_inputs: dict[str, Any], seed: int) -> dict[str, Any]:
    """Of some of the arguments, at random."""
    numbers = np.random.default_rng(seed)
    chosen = {}
    for name, array in host_inputs.items():
        if array is not None and array.dtype.kind == "f" and numbers.random() < 0.7:
            chosen[name] = numbers.uniform(-1, 1, array.shape).astype(array.dtype)
    h, c = chosen.pop("h", None), chosen.pop("c", None)
    if h is not None or c is not None:
        chosen["state"] = (h, c) if tape.call.cell.cell_state else h
    return chosen


def seeds(results: Any, seed: int) -> tuple[Any, Any, Any]:
    """Gradients of all results, some of them None."""
    numbers = np.random.default_rng(seed)

    def one(like: np.ndarray) -> Any:
        return numbers.uniform(-1, 1, like.shape).astype(like.dtype) if numbers.random() < 0.8 else None

    y, state, cells = results
    return one(y), tuple(map(one, state)) if isinstance(state, tuple) else one(state), one(cells)


def both(call: Any, seed: int) -> list[tuple[str, Any, Any]]:
    """Tangents by the device and by the reference. call(place, **options) makes the tape."""
    expected_tape, there = call(lambda a: a, backend="reference"), call(chip)
    v = tangents(expected_tape, expected_tape.inputs, seed)
    got, expected = ops.jvp(there, chip(v), True), ops.jvp(expected_tape, v, True)
    pairs = [(f"result {n}", host(a), b) for n, (a, b) in enumerate(zip(flat(got), flat(expected), strict=True))]
    (dy, dstate, dcells), (tdy, tdstate, tdcells) = (seeds(expected, 2 * seed + n) for n in range(2))
    options = {"tdy": tdy, "tdstate": tdstate, "tdcells": tdcells}
    grads = ops.hvp(there, chip(v), *chip((dy, dstate, dcells)), **chip(options))
    wanted = ops.hvp(expected_tape, v, dy, dstate, dcells, **options)
    assert grads.keys() == wanted.keys()
    for name in wanted:
        for n, (a, b) in enumerate(zip(flat([grads[name]]), flat([wanted[name]]), strict=True)):
            pairs.append((f"hvp {name}[{n}]", host(a), b))
    return pairs


@pytest.mark.parametrize("cell", list(OPS))
def test_equals_the_reference(twin, twin_extension, cell):
    op, extra = OPS[cell]
    for seed in range(10):
        case = Case(cell, "float64", seed)
        twin_extension.schedule(seed)

        def call(place: Any, case: Case = case, **more: Any) -> Any:
            args = place((case.x, case.state, case.params))
            return getattr(fusedrnn, op)(*args, **extra, **case.options, **more, training=True)[-1]

        for name, got, expected in both(call, seed):
            close.check(f"{cell} seed {seed}: {name}", got, expected, 1e-12)


@pytest.mark.parametrize("op", ["lstm", "gru"])
def test_tokens_and_contexts(twin, twin_extension, op):
    for seed in range(14):
        case = InputsCase(op, "float64", seed)
        twin_extension.schedule(seed)

        def call(place: Any, case: InputsCase = case, **more: Any) -> Any:
            options = {k: place(v) if k == "context" else v for k, v in case.options.items()}
            return getattr(fusedrnn, op)(place(case.x), None, place(case.params), **options, **more)[-1]

        for name, got, expected in both(call, seed):
            close.check(f"{op} seed {seed}: {name}", got, expected, 1e-12)


def gru_tape(dtype: Any, place: Any = chip) -> tuple[Any, ops.Tape]:
    x = np.random.default_rng(0).standard_normal((6, 3, 4)).astype(dtype)
    params = {k: a.astype(dtype) for k, a in parameters.init("gru", 4, 5, seed=0).items()}
    return x, fusedrnn.gru(place(x), None, place(params), training=True)[-1]


@pytest.mark.parametrize("float32", ["strict", "tf32"])  # tangents of float32 are strict all the same
def test_float32_and_finite_differences(twin, float32):
    twin.set_float32(float32)
    x, tape = gru_tape(np.float32)
    got = ops.jvp(tape, {"x": chip(x)})
    expected = ops.jvp(gru_tape(np.float64, lambda a: a)[1], {"x": x.astype(np.float64)})
    for a, b in zip(flat(got), flat(expected), strict=True):
        close.check("jvp", host(a), b, 1e-6)
    seconds = host(ops.hvp(tape, {"x": chip(x)}, got[0], tdy=got[0]))
    ty = expected[0]
    wanted = ops.hvp(gru_tape(np.float64, lambda a: a)[1], {"x": x.astype(np.float64)}, ty, tdy=ty)
    for name in wanted:
        close.check(f"hvp {name}", seconds[name], wanted[name], 1e-5)
    x, tape = gru_tape(np.float64)
    params = chip(host({name: tape.inputs[name].owner for name in tape.call.names}))
    up, down = (host(fusedrnn.gru(chip(x * (1 + e)), None, params)[0]) for e in (1e-5, -1e-5))
    close.check("difference", host(ops.jvp(tape, {"x": chip(x)})[0]), (up - down) / 2e-5, 1e-8)


def test_nothing_to_do_and_errors(twin):
    params = chip(parameters.init("gru", 4, 5, dtype=np.float64))
    tape = fusedrnn.gru(chip(np.zeros((0, 3, 4))), None, params, training=True)[-1]
    ty, th = ops.jvp(tape, {"state": chip(np.ones((1, 3, 5)))})
    assert host(ty).shape == (0, 3, 5) and np.array_equal(host(th), np.ones((1, 3, 5)))
    grads = host(ops.hvp(tape, {}, tdstate=chip(np.ones((1, 3, 5)))))
    assert np.array_equal(grads["state"], np.ones((1, 3, 5))) and not grads["weight_hh_l0"].any()
    x, tape = gru_tape(np.float16)
    with pytest.raises(NotImplementedError, match="jvp of float16 on a CUDA device.*float32 and float64"):
        ops.jvp(tape, {"x": chip(x)})
    with pytest.raises(NotImplementedError, match="hvp of float16 on a CUDA device"):
        ops.hvp(tape, {"x": chip(x)})
