# SPDX-License-Identifier: Apache-2.0
"""The whole way of arrays on a CUDA device, from fusedrnn's functions to the kernels, without a GPU: the device is the
CPU twin, the arrays are cuda_twin.Chip."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

import close
import fusedrnn
from cuda_twin import Chip, chip, host
from fusedrnn import params as parameters

OPS: dict[str, tuple[str, dict[str, Any]]] = {
    "rnn_tanh": ("rnn", {}),
    "rnn_relu": ("rnn", {"nonlinearity": "relu"}),
    "lstm": ("lstm", {}),
    "gru": ("gru", {}),
    "gru_reset_before": ("gru", {"reset_after": False}),
}
BUDGETS = {"float64": 1e-12, "float32": 2e-5, "tf32": 2e-2, "float16": 2e-2}
ROUTES = ("single", "cluster", "grid", "stepwise")


def kinds() -> list[tuple[str, str, str]]:
    every = [(c, d, r) for c in OPS for d in BUDGETS for r in ROUTES]
    # relu's slope jumps: where rounding moves a sum over 0, the gradient is another one
    every = [k for k in every if k[0] != "rnn_relu" or k[1] in ("float32", "float64")]
    return [k for k in every if k[2] == "stepwise" or (k[0] != "gru_reset_before" and k[1] in ("tf32", "float16"))]


class Case:
    """A random call of the front door: NumPy arrays, and options."""

    def __init__(self, cell: str, dtype: str, seed: int) -> None:
        pick, self.numbers = random.Random(seed), np.random.default_rng(seed)
        self.cell, self.dtype = cell, np.dtype("float32" if dtype == "tf32" else dtype)
        exact = dtype.startswith("float") and dtype != "float16"
        T, B, I = pick.choice([1, 4, 6]), pick.choice([1, 3, 9]), pick.choice([1, 5, 8])  # noqa: E741
        H, L, D = pick.choice([1, 7, 16, 21]), pick.choice([1, 1, 2]), pick.choice([1, 1, 2])
        E = pick.choice([0, 0, 0, 2])  # 0: no axis
        self.unbatched, batch_first = pick.random() < 0.15, pick.random() < 0.4
        bias, state = pick.random() < 0.7, pick.random() < 0.6
        if self.unbatched:
            B = 1

        def lie(axes: str, sets: int = E) -> tuple[int, ...]:  # as the user has it
            sizes = {"T": T, "E": E, "B": B, "I": I, "H": H, "S": L * D}
            axes = axes.replace("TEB", "EBT") if batch_first else axes
            return tuple(sizes[a] for a in axes if not (a == "E" and not sets) and not (a == "B" and self.unbatched))

        self.x = self.draw(*lie("TEBI", E * pick.choice([0, 1])))  # shared by all sets, or one for each
        weights = parameters.init(cell.removesuffix("_reset_before"), I, H, L, D == 2, bias, self.dtype, seed)
        self.params = {
            name: np.stack([w * (1 - 0.2 * e) for e in range(E)]).astype(w.dtype) if E else w
            for name, w in weights.items()
        }
        states = [self.draw(*lie("SEBH")) for _ in range(1 + (cell == "lstm"))]
        self.state = (tuple(states) if cell == "lstm" else states[0]) if state else None
        self.options: dict[str, Any] = {
            "num_layers": L,
            "bidirectional": D == 2,
            "batch_first": batch_first,
            "reverse": D == 1 and pick.random() < 0.4,
            "dropout": 0.4 if pick.random() < 0.5 else 0.0,
            "seed": pick.getrandbits(64),
            "reset_to": pick.choice(["zero", "initial"]),
            "clip_grad": 0.6 if exact and pick.random() < 0.3 else None,
        }
        if pick.random() < 0.5:
            self.options["lengths"] = self.numbers.integers(0, T + 1, lie("EB"))
        if pick.random() < 0.5:
            self.options["reset"] = self.numbers.random(lie("TEB")) < 0.3
        if cell == "lstm" and exact:
            self.options["clip_cell"] = 0.5 if pick.random() < 0.3 else None

    def draw(self, *shape: int) -> np.ndarray:
        return self.numbers.uniform(-1, 1, shape).astype(self.dtype)

    def run(self, place: Any, wide: Any, **options: Any) -> tuple[Any, Any]:
        """Results and gradients of all of them; `place` and `wide` make the arguments."""
        op, extra = OPS[self.cell]
        args = place(tuple(map(wide_all(wide), (self.x, self.state, self.params))))
        y, state, cells, tape = getattr(fusedrnn, op)(
            *args, **extra, **self.options, **options, training=True, return_cells=True
        )
        seeds = np.random.default_rng(7)
        g = [seeds.uniform(-1, 1, a.shape).astype(self.dtype) for a in flat((y, state, cells))]
        dy, *dstate, dcells = place(wide_all(wide)(g))
        grads = getattr(fusedrnn, f"{op}_backward")(tape, dy, tuple(dstate) if len(dstate) > 1 else dstate[0], dcells)
        return (y, state, cells), grads


def flat(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [a for v in value.values() for a in flat(v)]
    return [a for v in value for a in flat(v)] if isinstance(value, tuple | list) else [value]


def wide_all(wide: Any) -> Any:
    def each(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: each(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(map(each, value))
        return None if value is None else wide(value)

    return each


def compare(label: str, got: Any, expected: Any, budget: float) -> None:
    for n, (a, b) in enumerate(zip(flat(got), flat(expected), strict=True)):
        assert type(a) is Chip, f"{label}: result {n} is a {type(a).__name__}"
        close.check(f"{label}: {n}", host(a).astype(np.float64), b, budget)


@pytest.mark.parametrize("cell, dtype, route", kinds())
def test_front_door(twin: Any, twin_extension: Any, cell: str, dtype: str, route: str) -> None:
    twin.set_route(route)
    twin.set_float32("tf32" if dtype == "tf32" else "strict")
    for seed in range(4):
        case = Case(cell, dtype, seed)
        twin_extension.schedule(seed)
        got = case.run(chip, lambda a: a)
        assert (twin.last_route(), twin.last_route(backward=True)) == (route, route)
        expected = case.run(lambda a: a, lambda a: a.astype(np.float64), backend="reference")
        compare(f"{cell} {dtype} {route} seed {seed} forward", got[0], expected[0], BUDGETS[dtype])
        compare(f"{cell} {dtype} {route} seed {seed} backward", got[1], expected[1], 4 * BUDGETS[dtype])
