# SPDX-License-Identifier: Apache-2.0
"""The front door: layouts of the user's arrays, ensembles, gradients by name. Every backend, against the reference."""

from __future__ import annotations

import copy
import doctest
import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import close
import fusedrnn
from fusedrnn import ops
from fusedrnn import params as parameters
from fusedrnn.cells import CELLS
from shapes import OPS

T, B, I, H = 5, 3, 4, 6


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def run(cell: str, x: np.ndarray, state: Any, params: Any, **options: Any) -> Any:
    op, extra = OPS[cell]
    return getattr(fusedrnn, op)(x, state, params, **extra, **options)


def back(cell: str, tape: Any, *given: Any, **named: Any) -> dict[str, Any]:
    return getattr(fusedrnn, f"{OPS[cell][0]}_backward")(tape, *given, **named)


def new_state(cell: str, *shape: int, seed: int = 5) -> Any:
    parts = tuple(rng(seed + k).standard_normal(shape) for k in range(2))
    return parts if CELLS[cell].cell_state else parts[0]


def each(function: Any, state: Any) -> Any:
    return tuple(map(function, state)) if isinstance(state, tuple) else function(state)


def same(name: str, a: Any, b: Any, budget: float = 1e-13) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            same(f"{name}.{key}", a[key], b[key], budget)
    elif isinstance(a, tuple):
        for k, (left, right) in enumerate(zip(a, b, strict=True)):
            same(f"{name}[{k}]", left, right, budget)
    else:
        close.check(name, a, b, budget)


def init(cell: str, L: int = 1, bidirectional: bool = False, bias: bool = True, seed: int = 1) -> dict[str, Any]:
    return parameters.init(cell, I, H, L, bidirectional, bias, np.float64, seed)


@pytest.mark.parametrize("cell", CELLS)
def test_batch_first_is_only_strides(backend, cell):
    x, params, state = rng().standard_normal((B, T, I)), init(cell, 2, True), new_state(cell, 4, B, H)
    lengths, reset = np.array([2, 5, 0]), rng().random((B, T)) < 0.3
    options: dict[str, Any] = {"num_layers": 2, "bidirectional": True, "training": True, "return_cells": True}
    options |= {"lengths": lengths, "reset_to": "initial"}
    y, last, cells, tape = run(cell, x, state, params, batch_first=True, reset=reset, **options)
    assert y.shape == (B, T, 2 * H)
    assert cells.shape == (2, B, T, 2 * H)
    assert y.flags.c_contiguous
    time_x = np.ascontiguousarray(x.swapaxes(0, 1))
    want_y, want_last, want_cells, want_tape = run(cell, time_x, state, params, reset=reset.T, **options)
    same("y", y, want_y.swapaxes(0, 1))
    same("state", last, want_last)
    same("cells", cells, want_cells.swapaxes(1, 2))
    dy, dcells = rng(3).standard_normal(y.shape), rng(4).standard_normal(cells.shape)
    got = back(cell, tape, dy, last, dcells)
    want = back(cell, want_tape, dy.swapaxes(0, 1), want_last, dcells.swapaxes(1, 2))
    want["x"] = want["x"].swapaxes(0, 1)
    same("grads", got, want)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_unbatched(backend, cell, batch_first):
    x, params, state = rng().standard_normal((T, I)), init(cell, 2), new_state(cell, 2, H)
    reset = np.array([0, 1, 0, 1, 0], np.uint8)
    options: dict[str, Any] = {"num_layers": 2, "training": True, "return_cells": True}
    y, last, cells, tape = run(
        cell, x, state, params, batch_first=batch_first, lengths=np.array(4), reset=reset, **options
    )
    batched = each(lambda a: a[:, None], state)
    want_y, want_last, want_cells, want_tape = run(
        cell, x[:, None], batched, params, lengths=[4], reset=reset[:, None], **options
    )
    same("y", y, want_y[:, 0])
    same("state", last, each(lambda a: a[:, 0], want_last))
    same("cells", cells, want_cells[:, :, 0])
    got, want = back(cell, tape, y, last), back(cell, want_tape, want_y, want_last)
    assert got["x"].shape == (T, I)
    want |= {"x": want["x"][:, 0], "state": each(lambda a: a[:, 0], want["state"])}
    same("grads", got, want)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_ensemble_is_models_one_by_one(backend, cell, batch_first):
    """x and lengths shared or not; what is shared gets the sum of the gradients."""
    E = 3
    models = [init(cell, 2, True, seed=k) for k in range(E)]
    params = {name: np.stack([m[name] for m in models]) for name in models[0]}
    state = new_state(cell, 4, E, B, H)
    shared = rng().standard_normal((T, B, I))
    own = rng(1).standard_normal((T, E, B, I))
    options: dict[str, Any] = {"num_layers": 2, "bidirectional": True, "training": True}
    for x in (shared, own):
        for lengths in (np.array([5, 0, 2]), rng(2).integers(0, T + 1, (E, B))):
            given = x
            if batch_first:
                given = x.transpose(1, 0, 2) if x.ndim == 3 else x.transpose(1, 2, 0, 3)
            y, last, tape = run(cell, given, state, params, batch_first=batch_first, lengths=lengths, **options)
            dy = rng(3).standard_normal(y.shape)
            got = back(cell, tape, dy, last)
            if batch_first:
                y, dy = (a.transpose(2, 0, 1, 3) for a in (y, dy))
                dx = got["x"].transpose(1, 0, 2) if x.ndim == 3 else got["x"].transpose(2, 0, 1, 3)
            else:
                dx = got["x"]
            assert got["x"].shape == given.shape
            total = np.zeros_like(x)
            for e, model in enumerate(models):
                one = each(lambda a, e=e: a[:, e], state)
                ends = lengths if lengths.ndim == 1 else lengths[e]
                want_y, want_last, want_tape = run(
                    cell, x if x.ndim == 3 else x[:, e], one, model, lengths=ends, **options
                )
                same("y", y[:, e], want_y)
                same("state", each(lambda a, e=e: a[:, e], last), want_last)
                want = back(cell, want_tape, dy[:, e], want_last)
                for name in model:
                    same(name, got[name][e], want[name])
                same("dstate", each(lambda a, e=e: a[:, e], got["state"]), want["state"])
                if x.ndim == 3:
                    total += want["x"]
                else:
                    total[:, e] = want["x"]
            same("x", dx, total)


@pytest.mark.parametrize("cell", CELLS)
def test_shared_weights_get_one_gradient(backend, cell):
    """x with an E axis, weights and state without: the gradients are summed over E."""
    E = 3
    x, params, state = rng().standard_normal((T, E, B, I)), init(cell), new_state(cell, 1, B, H)
    y, last, tape = run(cell, x, state, params, training=True)
    assert y.shape == (T, E, B, H)
    assert each(lambda a: a.shape, last) == each(lambda a: (1, E, B, H), state)
    dy = rng(3).standard_normal(y.shape)
    got = back(cell, tape, dy, last)
    total: dict[str, Any] = {}
    for e in range(E):
        want_y, want_last, want_tape = run(cell, x[:, e], state, params, training=True)
        same("y", y[:, e], want_y)
        want = back(cell, want_tape, dy[:, e], want_last)
        same("dx", got["x"][:, e], want.pop("x"))
        for name, value in want.items():
            before = total.get(name, each(np.zeros_like, value))
            total[name] = (
                tuple(a + b for a, b in zip(before, value, strict=True)) if isinstance(value, tuple) else before + value
            )
    got.pop("x")
    same("grads", got, total)


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_per_row(backend, cell):
    """Rows as sets, with one set of weights broadcast over them: a gradient of the weights for every row."""
    x, params = rng().standard_normal((T, B, I)), init(cell)
    spread = {name: np.broadcast_to(a, (B, *a.shape)) for name, a in params.items()}
    y, _, tape = run(cell, x[:, :, None], None, spread, training=True)
    got = back(cell, tape, y)
    for b in range(B):
        want_y, _, want_tape = run(cell, x[:, b : b + 1], None, params, training=True)
        want = back(cell, want_tape, want_y)
        for name in params:
            same(name, got[name][b], want[name])


@pytest.mark.parametrize("cell", CELLS)
def test_params_as_a_list(backend, cell):
    x = rng().standard_normal((T, B, I))
    for bias in (True, False):
        params = init(cell, 2, True, bias)
        options: dict[str, Any] = {"num_layers": 2, "bidirectional": True, "training": True}
        y, last, tape = run(cell, x, None, params, **options)
        again = run(cell, x, None, tuple(params.values()), **options)
        same("y", y, again[0], 0)
        same("grads", back(cell, tape, y, last), back(cell, again[2], y, last), 0)


@pytest.mark.parametrize("cell", CELLS)
def test_any_strides(backend, cell):
    """Reversed, transposed, spread and broadcast views in all places give what copies give."""
    x = rng().standard_normal((B, 2 * T, I))[::-1, ::2].swapaxes(0, 1)
    params = {name: np.asfortranarray(a)[::-1][::-1] for name, a in init(cell).items()}
    y, last, tape = run(cell, x, None, params, training=True)
    plain = {name: a.copy() for name, a in params.items()}
    want_y, want_last, want_tape = run(cell, x.copy(), None, plain, training=True)
    same("y", y, want_y)
    one = np.broadcast_to(np.array(0.5), y.shape)  # stride 0 on every axis
    same("grads", back(cell, tape, one, last), back(cell, want_tape, np.full(y.shape, 0.5), want_last))


@pytest.mark.parametrize("cell", CELLS)
def test_inputs_are_not_written(backend, cell):
    x, params, state = rng().standard_normal((T, B, I)), init(cell, 2), new_state(cell, 2, B, H)
    before = copy.deepcopy((x, params, state))
    for a in (x, *params.values(), *(state if isinstance(state, tuple) else (state,))):
        a.flags.writeable = False
    y, last, tape = run(cell, x, state, params, num_layers=2, training=True, dropout=0.5, seed=3)
    y.flags.writeable = False
    back(cell, tape, y, last)
    ops.jvp(tape, {"x": x})
    ops.hvp(tape, {"x": x}, y)
    same("inputs", (x, params, state), before, 0)


@pytest.mark.parametrize("cell", CELLS)
def test_nothing_given_is_zero(backend, cell):
    x, params = rng().standard_normal((T, B, I)), init(cell, 2)
    zero = each(np.zeros_like, new_state(cell, 2, B, H))
    y, last, tape = run(cell, x, None, params, num_layers=2, training=True)
    same("y", y, run(cell, x, zero, params, num_layers=2)[0], 0)
    same("state only", back(cell, tape, None, last), back(cell, tape, np.zeros_like(y), last), 0)
    for value in back(cell, tape).values():
        assert not np.any(value)
    if CELLS[cell].cell_state:
        same("h only", back(cell, tape, None, (last[0], None)), back(cell, tape, None, (last[0], zero[1])), 0)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("shape", [(0, B, I), (T, 0, I), (0, 0, I)], ids=str)
def test_no_steps_or_no_rows(backend, cell, shape):
    """y is empty, the state is carried, the gradient of the state comes back, the others are zero."""
    x, params, state = np.zeros(shape), init(cell, 2, True), new_state(cell, 4, shape[1], H)
    y, last, tape = run(cell, x, state, params, num_layers=2, bidirectional=True, training=True)
    assert y.shape == (*shape[:2], 2 * H)
    same("state", last, state, 0)
    grads = back(cell, tape, y, state)
    same("dstate", grads["state"], state, 0)
    for name in params:
        assert grads[name].shape == params[name].shape
        assert not grads[name].any()


@pytest.mark.parametrize("cell", CELLS)
def test_dropout_only_while_training(backend, cell):
    x, params = rng().standard_normal((T, B, I)), init(cell, 2)
    options: dict[str, Any] = {"num_layers": 2, "dropout": 0.5}
    plain = run(cell, x, None, params, num_layers=2)[0]
    same("inference", run(cell, x, None, params, seed=1, **options)[0], plain, 0)
    one, again, other = (
        run(cell, x, None, params, seed=seed, training=True, **options)[0] for seed in (1, 1, 2**64 - 1)
    )
    same("same seed", one, again, 0)
    assert not np.array_equal(one, other)
    assert not np.array_equal(one, plain)


@pytest.mark.parametrize("cell", CELLS)
def test_recompute_gives_the_same(backend, cell):
    x, params = rng().standard_normal((40, B, I)), init(cell, 2, True)
    options: dict[str, Any] = {"num_layers": 2, "bidirectional": True, "training": True, "dropout": 0.3}
    y, last, tape = run(cell, x, None, params, **options)
    less_y, less_last, less = run(cell, x, None, params, recompute=True, **options)
    same("y", less_y, y)
    same("grads", back(cell, less, y, last), back(cell, tape, y, less_last))
    if CELLS[cell].kept and backend != "reference":
        assert less.nbytes <= tape.nbytes / 2


def test_clip_cell_and_clip_grad(backend):
    x, params = 3 * rng().standard_normal((T, B, I)), init("lstm")
    y, (_, c), cells, tape = fusedrnn.lstm(
        x, None, params, clip_cell=0.3, clip_grad=0.1, training=True, return_cells=True
    )
    assert np.abs(cells).max() == np.abs(c).max() == 0.3
    free = fusedrnn.lstm(x, None, params, clip_cell=0.3, training=True)[2]
    dy = 100 * np.ones_like(y)
    got, want = fusedrnn.lstm_backward(tape, dy), fusedrnn.lstm_backward(free, dy)
    assert np.abs(got["bias_ih_l0"]).max() < np.abs(want["bias_ih_l0"]).max() / 10


def test_tape_outlives_its_maker(backend):
    """Several tapes at once, used more than once and in any order."""
    params = init("gru")
    xs = [rng(k).standard_normal((T, B, I)) for k in range(3)]
    tapes = [fusedrnn.gru(x, None, params, training=True) for x in xs]
    first = [fusedrnn.gru_backward(tape, y) for y, _, tape in tapes]
    for (y, _, tape), want in reversed(list(zip(tapes, first, strict=True))):
        same("grads", fusedrnn.gru_backward(tape, y), want, 0)


def test_float32_in_float32_out(backend):
    params = parameters.init("lstm", I, H, seed=0)
    y, (h, c), cells, tape = fusedrnn.lstm(
        np.ones((T, B, I), np.float32), None, params, training=True, return_cells=True
    )
    grads = fusedrnn.lstm_backward(tape, y)
    for array in (y, h, c, cells, grads["x"], *grads["state"], grads["bias_hh_l0"]):
        assert array.dtype == np.float32


def with_examples() -> list[str]:
    """Every module with an example in its text. test_torch.py runs the adapter's; CUDA needs its build."""
    package = Path(fusedrnn.__file__).parent
    files = [path.relative_to(package) for path in package.rglob("*.py") if ">>>" in path.read_text(encoding="utf-8")]
    names = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in files]
    return sorted(name for name in names if name.partition(".")[0] != "torch" and name != "backends.cuda")


@pytest.mark.parametrize("name", with_examples())
def test_examples(name):
    module = importlib.import_module(f"fusedrnn.{name}")
    result = doctest.testmod(module, extraglobs={"fusedrnn": fusedrnn, "np": np})
    assert result.attempted > 0
    assert result.failed == 0
