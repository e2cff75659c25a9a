# SPDX-License-Identifier: Apache-2.0
"""Tokens and contexts on a CUDA device, from fusedrnn's functions to the kernels, on the CPU twin."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

import close
import fusedrnn
from cuda_twin import Chip, Pack, chip, host
from fusedrnn import params as parameters

BUDGETS = {"float64": 1e-12, "float32": 2e-5, "tf32": 2e-2, "float16": 2e-2}
KINDS = [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64]
CELLS = {"rnn": "rnn_tanh", "lstm": "lstm", "gru": "gru"}
WAYS = [(o, "float64", "stepwise") for o in CELLS] + [
    ("lstm", "float32", "stepwise"),
    ("gru", "float16", "stepwise"),
    ("lstm", "float16", "single"),
    ("gru", "tf32", "cluster"),
    ("rnn", "float16", "grid"),
]


class Case:
    """A random call with tokens, a context or both."""

    def __init__(self, op: str, dtype: str, seed: int) -> None:
        pick, numbers = random.Random(seed), np.random.default_rng(seed)
        self.op = op
        kind = np.dtype("float32" if dtype == "tf32" else dtype)
        T, B, H = pick.choice([1, 5, 9]), pick.choice([1, 3, 8]), pick.choice([1, 8, 13])
        I = pick.choice([1, 3, 17, 40])  # noqa: E741
        L, D, E = pick.choice([1, 1, 2]), pick.choice([1, 2]), pick.choice([0, 0, 2])
        K = pick.choice([0, 1, 5])
        tokens = K == 0 or pick.random() < 0.6
        batch_first, own = pick.random() < 0.4, E > 0 and pick.random() < 0.5

        def lie(axes: str, sets: bool) -> tuple[int, ...]:
            sizes = {"T": T, "E": E, "B": B, "I": I, "K": K}
            axes = axes.replace("TEB", "EBT") if batch_first else axes
            return tuple(sizes[a] for a in axes if a != "E" or sets)

        lengths = numbers.integers(0, T + 1, lie("EB", own)) if pick.random() < 0.6 else None
        if tokens:
            x = numbers.integers(0, I, lie("TEB", own))
            if lengths is not None:  # past a row's end nobody looks
                steps = np.arange(T) if batch_first else np.arange(T).reshape(T, *[1] * (x.ndim - 1))
                x[steps >= (lengths[..., None] if batch_first else lengths)] = 99
            x = x.astype(pick.choice(KINDS))
        else:
            x = numbers.uniform(-1, 1, lie("TEBI", own)).astype(kind)
        self.x = x if not tokens or pick.random() < 0.6 else np.repeat(x, 2, -1)[..., ::2]
        self.tokens = tokens
        weights = parameters.init(CELLS[op], I, H, L, D == 2, pick.random() < 0.7, kind, seed, context_size=K)
        sets = [w for _, w in weights.items()]
        if E:
            sets = [np.stack([w * (1 - 0.2 * e) for e in range(E)]).astype(kind) for w in sets]
        self.params = dict(zip(weights, sets, strict=True))
        self.options: dict[str, Any] = {
            "num_layers": L, "bidirectional": D == 2, "batch_first": batch_first, "lengths": lengths,
            "reverse": D == 1 and pick.random() < 0.4, "training": True,
        }  # fmt: skip
        if K:
            self.options["context"] = numbers.uniform(-1, 1, lie("EBK", E > 0 and pick.random() < 0.5)).astype(kind)
        if pick.random() < 0.5:
            self.options["reset"] = numbers.random(lie("TEB", own)) < 0.3

    def run(self, place: Any, wide: Any, **more: Any) -> dict[str, Any]:
        """All results and gradients by name."""
        x = place(self.x if self.tokens else wide(self.x))
        options = {k: place(wide(v)) if k == "context" else v for k, v in self.options.items()}
        y, state, tape = getattr(fusedrnn, self.op)(
            x, None, {k: place(wide(v)) for k, v in self.params.items()}, **options, **more
        )
        dy = np.random.default_rng(7).uniform(-1, 1, y.shape).astype(next(iter(self.params.values())).dtype)
        grads = getattr(fusedrnn, f"{self.op}_backward")(tape, place(wide(dy)), state)
        assert ("x" in grads) != self.tokens
        results = {"y": y, "state": state, "grad of state": grads.pop("state")}
        flat = {f"{n}[{i}]": a for n, v in results.items() for i, a in enumerate(v if isinstance(v, tuple) else [v])}
        return flat | grads


@pytest.mark.parametrize("op, dtype, route", WAYS)
def test_equals_the_reference(twin, twin_extension, op, dtype, route):
    twin.set_route(route)
    twin.set_float32("tf32" if dtype == "tf32" else "strict")
    for seed in range(14 if dtype == "float64" else 6):
        case = Case(op, dtype, seed)
        twin_extension.schedule(seed)
        got = case.run(chip, lambda a: a)
        assert twin.last_route() == route
        expected = case.run(lambda a: a, lambda a: a.astype(np.float64), backend="reference")
        assert got.keys() == expected.keys()
        for name in expected:
            assert type(got[name]) is Chip
            close.check(f"seed {seed}: {name}", host(got[name]).astype(np.float64), expected[name], 4 * BUDGETS[dtype])


def long_case(I: int, T: int = 97, B: int = 89, H: int = 3) -> Any:  # noqa: E741
    """More steps than a block of the gradient looks at in one go, and more than one block of the vocabulary."""
    params = parameters.init("rnn_tanh", I, H, dtype=np.float64, seed=0)
    return np.random.default_rng(0).integers(0, I, (T, B)), params


@pytest.mark.parametrize("I", [2, 37])
def test_many_steps(twin, I):  # noqa: E741
    x, params = long_case(I)
    y, _, tape = fusedrnn.rnn(chip(x), None, chip(params), training=True)
    expected, _, on_host = fusedrnn.rnn(x, None, params, training=True)
    close.check("y", host(y), expected, 1e-12)
    got, wanted = fusedrnn.rnn_backward(tape, y), fusedrnn.rnn_backward(on_host, expected)
    for name in params:
        close.check(name, host(got[name]), wanted[name], 1e-12)


def test_same_bits_every_run(twin, twin_extension):
    x, params = long_case(5)
    params = {name: a.astype(np.float32) for name, a in params.items()}
    runs = []
    for seed in range(2):
        twin_extension.schedule(seed)
        y, _, tape = fusedrnn.rnn(chip(x), None, chip(params), training=True)
        runs.append(host(fusedrnn.rnn_backward(tape, y)["weight_ih_l0"]))
    assert np.array_equal(*runs)


def test_tokens_that_are_no_input_count_as_zeros_and_are_told_of(twin):
    x, params = np.array([[0, 5], [-1, 2], [1, 3]]), parameters.init("gru", 5, 4, dtype=np.float64, seed=0)
    y, _, tape = fusedrnn.gru(chip(x), None, chip(params), training=True)
    vectors = np.eye(6)[np.where(x < 0, 5, x)][..., :5]
    expected, _, on_host = fusedrnn.gru(vectors, None, params, training=True)
    close.check("y", host(y), expected, 1e-12)
    with pytest.raises(twin.CudaError, match="had a token that is no input; expected 0 <= token < I"):
        fusedrnn.gru_backward(tape, y)
    got, wanted = fusedrnn.gru_backward(tape, y), fusedrnn.gru_backward(on_host, expected)  # told once
    for name in params:
        close.check(name, host(got[name]), wanted[name], 1e-12)


def test_bfloat16(twin):
    params = {k: np.round(a * 8) / 8 for k, a in parameters.init("gru", 5, 4, seed=0).items()}  # bfloat16 has these
    there = {k: Pack((a.view(np.uint32) >> 16).astype(np.uint16), "bfloat16") for k, a in params.items()}
    x = np.random.default_rng(0).integers(0, 5, (6, 2))
    y, _, _ = fusedrnn.gru(Pack(x), None, there)
    got = (host(y).astype(np.uint32) << 16).view(np.float32)
    close.check("y", got, fusedrnn.gru(x, None, params)[0], 1e-2)


@pytest.mark.parametrize("T, B", [(0, 3), (3, 0)])
def test_nothing_to_do(twin, T, B):
    params = parameters.init("lstm", 4, 6, dtype=np.float64, context_size=2)
    context = np.ones((B, 2))
    _, _, tape = fusedrnn.lstm(
        chip(np.zeros((T, B), np.int64)), None, chip(params), context=chip(context), training=True
    )
    grads = host(fusedrnn.lstm_backward(tape))
    assert not grads["context"].any() and grads["context"].shape == (B, 2)
    assert not grads["weight_ch_l0"].any() and grads["weight_ch_l0"].shape == (24, 2)


def test_errors(twin):
    params = chip(parameters.init("gru", 4, 6, dtype=np.float64, context_size=2))
    plain = {k: v for k, v in params.items() if k != "weight_ch_l0"}
    x = chip(np.zeros((5, 3), np.int64))
    with pytest.raises(TypeError, match="context is a NumPy float64 array .* expected an array on a CUDA device"):
        fusedrnn.gru(x, None, params, context=np.ones((3, 2)))
    with pytest.raises(ValueError, match=r"context has shape \(3, 1\)|weight_ch_l0 has shape"):
        fusedrnn.gru(x, None, params, context=chip(np.ones((3, 1))))
    with pytest.raises(TypeError, match="weight_ih_l0 is a NumPy float64 array"):
        fusedrnn.gru(x, None, host(plain))
    with pytest.raises(TypeError, match="weight_ih_l0 is a cuda_twin.Chip; expected a NumPy array"):
        fusedrnn.gru(host(x), None, plain)
    with pytest.raises(TypeError, match="weight_ih_l0 has dtype int64; expected float16"):
        fusedrnn.gru(x, None, plain | {"weight_ih_l0": chip(np.ones((18, 4), np.int64))})
    with pytest.raises(ValueError, match="context is on stream 7; expected 0"):
        fusedrnn.gru(x, None, params, context=Chip(np.ones((3, 2)), stream=7))
