# SPDX-License-Identifier: Apache-2.0
"""Real-time recurrent learning against backpropagation by the kernels, against differences, and its approximation
against a recursion of dense Jacobians."""

from __future__ import annotations

import copy
import doctest
import tracemalloc
from functools import partial
from typing import Any

import numpy as np
import pytest

import fusedrnn
from close import BUDGETS, check
from fusedrnn import rtrl, tbptt
from fusedrnn.cells import CELLS
from shapes import LAYERS

KINDS = {name: (LAYERS[cell.op], cell.options) for name, cell in CELLS.items()}
KINDS["lstm_clipped"] = fusedrnn.LSTM, {"clip_cell": 0.3}
I, H, B, T = 3, 5, 4, 20
BUDGET = BUDGETS["float64", "backward"]


def make(kind: str, L: int = 1, I: int = I, H: int = H, dtype: Any = np.float64, **options: Any) -> Any:
    """A layer with weights large enough that every part of a gradient counts."""
    cell, own = KINDS[kind]
    layer = cell(I, H, L, dtype=dtype, seed=3, **own, **options)
    for weight in layer.parameters.values():
        weight *= 1.7
    return layer


def cell_of(kind: str) -> Any:
    return CELLS[kind.removesuffix("_clipped")]


def numbers(*shape: int, seed: int = 0, dtype: Any = np.float64) -> Any:
    return np.random.default_rng([seed, *shape]).uniform(-1.7, 1.7, shape).astype(dtype)


def states(kind: str, *shape: int, seed: int, dtype: Any = np.float64) -> Any:
    h, c = numbers(2, *shape, seed=seed, dtype=dtype)
    return (h, c) if cell_of(kind).cell_state else h


def flat(grads: dict[str, Any]) -> dict[str, Any]:
    """The state's parts by name, and no x."""
    state = grads["state"] if isinstance(grads["state"], tuple) else (grads["state"],)
    own = {name: array for name, array in grads.items() if name not in ("x", "state")}
    return own | {f"state[{n}]": part for n, part in enumerate(state)}


def online(layer: Any, x: Any, dy: Any, dstate: Any = None, state: Any = None, reset: Any = None, lengths: Any = None,
           approximation: str | None = None) -> tuple[dict[str, Any], Any, Any, rtrl.RTRL]:  # fmt: skip
    """Gradients summed over all steps, y, the last state and the learner."""
    learner = rtrl.RTRL(layer, state, approximation=approximation)
    sums: dict[str, Any] = {}
    ys = []
    for t in range(len(x)):
        ys.append(learner.step(x[t], None if reset is None else reset[t], None if lengths is None else t < lengths))
        for name, gradient in flat(learner.gradient(dy[t], dstate if t == len(x) - 1 else None)).items():
            sums[name] = sums.get(name, 0) + gradient
    return sums, np.stack(ys), learner.state, learner


def same(got: dict[str, Any], expected: dict[str, Any], budget: float = BUDGET) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        check(name, got[name], expected[name], budget)


# ---- exact ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("L", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_backpropagation(kind, L, bias):
    layer = make(kind, L, bias=bias)
    x, dy = numbers(T, B, I), numbers(T, B, H, seed=1)
    start, dstate = states(kind, L, B, H, seed=2), states(kind, L, B, H, seed=3)
    lengths = np.array([T, 0, 13, 7])
    reset = np.random.default_rng(4).random((T, B)) < 0.15
    reset[0, 0] = reset[7, 3] = True  # at the beginning, and where a row has ended
    x[np.arange(T)[:, None] >= lengths] = np.nan  # reaches nothing
    y, final = layer(x, start, lengths=lengths, reset=reset)
    expected = flat(layer.backward(dy, dstate))
    dy[np.arange(T)[:, None] >= lengths] = np.nan
    got, ys, state, _ = online(layer, x, dy, dstate, start, reset, lengths)
    check("y", ys, y, BUDGETS["float64", "forward"])
    check("state", np.asarray(state), np.asarray(final), BUDGETS["float64", "forward"])
    same(got, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("I", "H", "B", "block"), [(1, 1, 1, 0), (2, 1, 3, 0), (7, 17, 2, 1 << 10), (1, 16, 3, 1 << 17), (33, 15, 1, 1)]
)
def test_sizes_and_how_the_work_is_cut(monkeypatch, kind, I, H, B, block):
    if block:
        monkeypatch.setattr(rtrl, "BLOCK", block)
    layer = make(kind, 2, I, H)
    x, dy = numbers(6, B, I), numbers(6, B, H, seed=1)
    layer(x)
    same(online(layer, x, dy)[0], flat(layer.backward(dy)))


@pytest.mark.parametrize("kind", ["lstm", "gru", "gru_reset_before"])
def test_against_differences(kind):
    """The loss of the last step only, by numbers that nobody differentiated."""
    layer = make(kind, 2)
    x, dy = numbers(9, B, I), numbers(B, H, seed=1)
    start = states(kind, 2, B, H, seed=2)
    learner = rtrl.RTRL(layer, start)
    for x_t in x:
        learner.step(x_t)
    grads = flat(learner.gradient(dy))
    h0 = start[0] if kind == "lstm" else start
    rng, step = np.random.default_rng(0), 1e-6
    for name, array in {**layer.parameters, "state[0]": h0}.items():
        for _ in range(3):
            at = tuple(rng.integers(array.shape))
            kept, losses = array[at], []
            for move in (-step, step):
                array[at] = kept + move
                losses.append(float((layer(x, start)[0][-1] * dy).sum()))
            array[at] = kept
            difference = (losses[1] - losses[0]) / (2 * step)
            assert abs(grads[name][at] - difference) < 1e-8, (name, at, grads[name][at], difference)


@pytest.mark.parametrize("approximation", [None, "diagonal"])
@pytest.mark.parametrize("kind", KINDS)
def test_float32(kind, approximation):
    wide, narrow = make(kind, 2), make(kind, 2, dtype=np.float32)
    for name, weight in narrow.parameters.items():
        wide.parameters[name][...] = weight  # the same numbers
    x, dy, start = numbers(T, B, I), numbers(T, B, H, seed=1), states(kind, 2, B, H, seed=2)
    x32, dy32 = x.astype(np.float32), dy.astype(np.float32)
    start32 = tuple(s.astype(np.float32) for s in start) if isinstance(start, tuple) else start.astype(np.float32)
    start = tuple(s.astype(float) for s in start32) if isinstance(start, tuple) else start32.astype(float)
    got, y, _, learner = online(narrow, x32, dy32, None, start32, approximation=approximation)
    expected = online(wide, x32.astype(float), dy32.astype(float), None, start, approximation=approximation)[0]
    assert y.dtype == np.float32 and all(array.dtype == np.float32 for array in got.values())
    assert learner.nbytes * 2 == online(wide, x[:1], dy[:1], None, start, approximation=approximation)[3].nbytes
    same(got, expected, 4 * BUDGETS["float32", "backward"])  # sums of T gradients, each rounded


def test_unbatched():
    layer = make("lstm", 2)
    x, dy = numbers(T, 1, I), numbers(T, 1, H, seed=1)
    start = states("lstm", 2, 1, H, seed=2)
    batch, y, state, _ = online(layer, x, dy, start, start)
    one = tuple(part[:, 0] for part in start)
    row, y_row, state_row, _ = online(layer, x[:, 0], dy[:, 0], one, one)
    np.testing.assert_array_equal(y_row, y[:, 0])
    np.testing.assert_array_equal(np.asarray(state_row), np.asarray(state)[:, :, 0])
    assert row["state[0]"].shape == (2, H)
    same({name: array.reshape(batch[name].shape) for name, array in row.items()}, batch, 0)


@pytest.mark.parametrize("kind", ["rnn_tanh", "lstm", "gru_reset_before"])
def test_dropout_draws_what_single_steps_of_the_layer_draw(kind):
    layer = make(kind, 3, dropout=0.4)
    x, dy = numbers(6, B, I), numbers(6, B, H, seed=1)
    got, ys, _, _ = online(layer, x, dy)
    assert layer.draws == 6
    state, steps = None, []
    for t in range(6):
        steps.append(copy.copy(layer))  # the same weights, a tape of its own
        steps[t].draws = t
        y, state = steps[t](x[t : t + 1], state)
        check("y", ys[t], y[0], BUDGETS["float64", "forward"])
    sums: dict[str, Any] = {}
    dstate = None
    for t in reversed(range(6)):
        grads = steps[t].backward(dy[t : t + 1], dstate)
        dstate = grads["state"]
        for name in layer.parameters:
            sums[name] = sums.get(name, 0) + grads[name]
    same({name: got[name] for name in sums}, sums)
    layer.eval()
    y, _ = layer(x)
    check("y in eval mode", online(layer, x, dy)[1], y, BUDGETS["float64", "forward"])


def test_weights_may_change_at_any_time():
    """A step uses the weights as they are, in place or replaced, and the sensitivities go on."""
    layer = make("gru")
    x = numbers(10, B, I)
    learner = rtrl.RTRL(layer)
    state = None
    for t in range(10):
        y_t = learner.step(x[t])
        y, state = layer(x[t : t + 1], state)
        check(f"y[{t}]", y_t, y[0], BUDGETS["float64", "forward"])
        grads = learner.gradient(y_t)
        for name, weight in layer.parameters.items():
            layer.parameters[name] = weight - 0.1 * grads[name]


@pytest.mark.parametrize("approximation", [None, "diagonal"])
@pytest.mark.parametrize("kind", KINDS)
def test_memory_does_not_grow_with_the_sequence(kind, approximation):
    cell, L = cell_of(kind), 2
    states_, G = 1 + cell.cell_state, cell.gates
    layer = make(kind, L)
    for weight in layer.parameters.values():
        weight *= 0.3  # numbers that stay of an ordinary size
    learner = rtrl.RTRL(layer, approximation=approximation)
    assert learner.nbytes == 0
    x = numbers(B, I)
    learner.step(x)

    arrays = [tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)]  # Python itself keeps what it may need again

    def walk(steps: int) -> None:
        for _ in range(steps):
            learner.gradient(learner.step(x.copy()))

    def kept(steps: int) -> int:
        walk(steps)
        return sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces(arrays).traces)

    walk(150)  # NumPy keeps small arrays for the next ones, more and more of them at first
    tracemalloc.start()
    first, last = kept(5), kept(20)
    tracemalloc.stop()
    assert 0 < last == first  # not even x is kept
    # the weights of each layer, a column of biases once; the GRU's n has the biases of both its sums
    recurrent = H if cell.state_product else 0
    P = [G * H * (below + recurrent + 1) + (cell.sums - G) * H for below in (I, H)]
    if approximation:
        expected = sum(states_ * B * (p + states_ * H) for p in P)
    else:
        expected = states_ * B * H * sum((L - n) * (p + states_ * H) for n, p in enumerate(P))
    assert learner.nbytes == 8 * expected


@pytest.mark.parametrize("approximation", [None, "diagonal"])
def test_what_fades_becomes_zero(approximation):
    """No denormal numbers, with which processors are slow."""
    layer = fusedrnn.LSTM(1, 2, seed=0)
    for weight in layer.parameters.values():
        weight[:] = 0
    layer.parameters["bias_ih_l0"][2:4] = 2.0  # f = 0.88
    learner, x = rtrl.RTRL(layer, approximation=approximation), np.zeros((1, 1), np.float32)
    before = 1.0
    for _ in range(900):
        learner.step(x)
        after = float(learner.gradient(np.ones((1, 2), np.float32))["state"][1].max())
        assert 0 < after < before or (after == 0 and before < 1e-36)
        before = after
    assert before == 0


# ---- the approximation ---------------------------------------------------------------------------------------------


def only_own_units(layer: Any, scale: float) -> None:
    """Recurrent weights that connect no unit with another."""
    for name, weight in layer.parameters.items():
        if name.startswith("weight_hh"):
            blocks = weight.reshape(-1, H, H)
            blocks *= scale * np.eye(H)


@pytest.mark.parametrize("scale", [1.0, 0.0])
@pytest.mark.parametrize("kind", KINDS)
def test_diagonal_is_exact_without_a_product_of_states(kind, scale):
    layer = make(kind)
    x, dy = numbers(T, B, I), numbers(T, B, H, seed=1)
    start, dstate = states(kind, 1, B, H, seed=2), states(kind, 1, B, H, seed=3)
    lengths, reset = np.array([T, 0, 13, 7]), np.random.default_rng(4).random((T, B)) < 0.15

    def both() -> tuple[dict[str, Any], dict[str, Any]]:
        layer(x, start, lengths=lengths, reset=reset)
        got = online(layer, x, dy, dstate, start, reset, lengths, "diagonal")[0]
        return got, flat(layer.backward(dy, dstate))

    if "weight_hh_l0" in layer.parameters:
        got, expected = both()
        assert np.abs(got["weight_hh_l0"] - expected["weight_hh_l0"]).max() > 1e-3  # the approximation is one
        only_own_units(layer, scale)
    got, expected = both()
    same(got, expected)


def test_diagonal_is_exact_in_a_stack_without_recurrence():
    layer = make("rnn_tanh", 3, dropout=0.3)
    only_own_units(layer, 0.0)
    x, dy = numbers(T, B, I), numbers(T, B, H, seed=1)
    got = online(layer, x, dy, approximation="diagonal")[0]
    layer.draws = 0
    expected = online(layer, x, dy)[0]
    same({name: got[name] for name in layer.parameters}, {name: expected[name] for name in layer.parameters})


@pytest.mark.parametrize("kind", KINDS)
def test_diagonal_keeps_what_it_says(kind):
    """S = kept(D S + J) with dense Jacobians D (to the state before) and J (to the weights), by differences."""
    layer = make(kind)
    names = list(layer.parameters)
    x, dy = numbers(8, 1, I), numbers(8, 1, H, seed=1)
    count = 1 + cell_of(kind).cell_state

    state = np.zeros(count * H)

    def run(x_t: Any) -> Any:
        given = state.reshape(count, 1, 1, H)
        after = layer(x_t[None], tuple(given) if count == 2 else given[0])[1]
        return np.concatenate([part.reshape(-1) for part in (after if count == 2 else (after,))])

    def jacobian(array: Any, f: Any, step: float = 1e-6) -> Any:
        columns = []
        for at in np.ndindex(array.shape):
            kept = array[at]
            array[at] = kept + step
            up = f()
            array[at] = kept - step
            columns.append((up - f()) / (2 * step))
            array[at] = kept
        return np.stack(columns, axis=1)

    unit = np.arange(count * H) % H
    owner = np.concatenate([np.repeat(np.arange(len(a)) % H, a[0].size) for a in layer.parameters.values()])
    keep = unit[:, None] == owner
    sensitivities: Any = np.zeros(keep.shape)
    learner = rtrl.RTRL(layer, approximation="diagonal")
    for t in range(8):
        D = jacobian(state, lambda t=t: run(x[t]))
        J = np.concatenate([jacobian(layer.parameters[name], lambda t=t: run(x[t])) for name in names], axis=1)
        sensitivities = keep * (D @ sensitivities + J)
        state[:] = run(x[t])
        learner.step(x[t])
        got = learner.gradient(dy[t])
        expected = dy[t, 0] @ sensitivities[:H]
        check(f"step {t}", np.concatenate([got[name].reshape(-1) for name in names]), expected, 1e-8)


# ---- one loop for three methods ------------------------------------------------------------------------------------


def train(layer: Any, x: Any, target: Any, chunks: Any, rate: float) -> tuple[list[dict[str, Any]], list[float]]:
    """The gradients of every update, and the losses."""
    updates, losses = [], []
    axis = 1 if layer.batch_first and x.ndim == 3 else 0
    for chunk in chunks(layer, x):
        error = chunk.y - target.take(range(chunk.start, chunk.stop), axis)
        losses.append(float((error**2).mean()))
        grads = chunk.backward(error)
        if chunk.update:
            updates.append({name: grads[name].copy() for name in layer.parameters})
            for name, weight in layer.parameters.items():
                weight -= rate * grads[name]
    return updates, losses


@pytest.mark.parametrize("kind", KINDS)
def test_three_methods_in_one_loop(kind):
    x, target = numbers(T, B, I), numbers(T, B, H, seed=1)
    layer = make(kind, 2)
    backpropagation = train(layer, x, target, partial(tbptt.chunks, k1=T), 0.0)[0]
    assert len(backpropagation) == 1
    for k1 in (1, 6, T, T + 5):
        updates, _ = train(layer, x, target, partial(rtrl.chunks, k1=k1), 0.0)
        truncated, _ = train(layer, x, target, partial(tbptt.chunks, k1=k1, k2=T + 5), 0.0)  # reaches back to the start
        assert len(updates) == len(truncated) == -(-T // k1)
        for ours, theirs in zip(updates, truncated, strict=True):  # update by update, while the weights stay
            same(ours, theirs)
        same({name: sum(u[name] for u in updates) for name in layer.parameters}, backpropagation[0])


@pytest.mark.parametrize("approximation", [None, "diagonal"])
@pytest.mark.parametrize("kind", ["rnn_tanh", "lstm", "gru"])
def test_it_learns_online(kind, approximation):
    x = numbers(400, B, I)
    target, _ = make(kind)(x)
    layer = KINDS[kind][0](I, H, dtype=np.float64, seed=9)
    _, losses = train(layer, x, target, partial(rtrl.chunks, approximation=approximation), 0.02)
    assert np.mean(losses[-40:]) < 0.5 * np.mean(losses[:40])


def test_every_kind_of_source():
    x, target = numbers(T, B, I), numbers(T, B, H, seed=1)
    lengths = np.array([17, 0, 13, 7])
    reset = (np.random.default_rng(2).random((T, B)) < 0.2).astype(np.uint8)
    start = states("lstm", 1, B, H, seed=5)
    options = {"k1": 4, "lengths": lengths, "state": start}
    layer = make("lstm")
    expected = train(layer, x, target, partial(rtrl.chunks, reset=reset, **options), 0.0)
    y, final = layer(x, start, lengths=lengths, reset=reset)
    whole = layer.backward(np.where(np.arange(T)[:, None, None] < lengths[:, None], y - target, 0))
    same({n: sum(u[n] for u in expected[0]) for n in layer.parameters}, {n: whole[n] for n in layer.parameters})
    walked = list(rtrl.chunks(layer, ((x[a:b], reset[a:b]) for a, b in [(0, 1), (1, 1), (1, 9), (9, 20)]), **options))
    assert [chunk.start for chunk in walked] == list(range(17))  # steps past every row's end are not run
    assert [chunk.stop for chunk in walked if chunk.update] == [4, 8, 12, 16, 17]
    np.testing.assert_allclose(np.concatenate([chunk.y for chunk in walked]), y[:17], atol=1e-14)
    np.testing.assert_allclose(np.asarray(walked[-1].state), np.asarray(final), atol=1e-14)
    np.testing.assert_array_equal([chunk.lengths for chunk in walked], np.arange(17)[:, None] < lengths)

    turned = make("lstm", batch_first=True)
    swapped = partial(rtrl.chunks, reset=reset.T, **options)
    updates, losses = train(turned, x.swapaxes(0, 1), target.swapaxes(0, 1), swapped, 0.0)
    np.testing.assert_allclose(losses, expected[1], rtol=1e-14)
    same(updates[0], expected[0][0])

    row = train(layer, x[:, 0], target[:, 0], partial(rtrl.chunks, k1=4, reset=reset[:, 0]), 0.0)[0]
    alone = train(layer, x[:, :1], target[:, :1], partial(rtrl.chunks, k1=4, reset=reset[:, :1]), 0.0)[0]
    same(row[0], alone[0])


def test_the_next_block_is_taken_after_the_update():
    order = []

    def source() -> Any:
        for n in range(3):
            order.append(f"block {n}")
            yield numbers(2, B, I, seed=n)

    for chunk in rtrl.chunks(make("gru"), source(), k1=2):
        chunk.backward(chunk.y)
        if chunk.update:
            order.append("update")
    assert order == ["block 0", "update", "block 1", "update", "block 2", "update"]


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "options", "match"),
    [
        (object(), {}, "layer is a object; expected a layer of fusedrnn, such as LSTM"),
        (fusedrnn.GRU(I, H, bidirectional=True), {}, "layer is bidirectional; expected one direction"),
        (fusedrnn.GRU(I, H, clip_grad=1.0), {}, "layer has clip_grad=1.0; expected clip_grad=None"),
        (fusedrnn.GRU(I, H, context_size=2), {}, "layer has weight_ch_l0; expected only weight_ih_l0, .*features of x"),
        (fusedrnn.GRU(I, H), {"approximation": "snap"}, "approximation is 'snap'; expected None"),
        (fusedrnn.GRU(I, H), {"state": np.zeros((1, B, H))}, "state has dtype float64; expected float32"),
        (fusedrnn.GRU(I, H), {"state": np.zeros((2, B, H), np.float32)}, r"state has shape \(2, 4, 5\); expected"),
        (fusedrnn.LSTM(I, H), {"state": np.zeros((1, B, H), np.float32)}, r"state is .*; expected a pair \(h, c\)"),
        (
            fusedrnn.LSTM(I, H),
            {"state": (np.zeros((1, B, H), np.float32), np.zeros((1, 1, H), np.float32))},
            r"state\[1\] has shape \(1, 1, 5\); expected \(1, 4, 5\), the shape of state\[0\]",
        ),
    ],
)
def test_bad_learners(layer, options, match):
    with pytest.raises((ValueError, TypeError), match=match):
        rtrl.RTRL(layer, **options)


def test_a_variant_of_a_cell_is_refused():
    """Whatever changes the formula and is not in the cell's own functions."""
    layer = fusedrnn.LSTM(I, H)
    layer.variants = {"zoneout": 0.1}
    with pytest.raises(ValueError, match="layer has zoneout=0.1; expected no zoneout. RTRL does not know that option"):
        rtrl.RTRL(layer)


def test_bad_weights():
    layer = make("lstm")
    learner = rtrl.RTRL(layer)
    layer.parameters["weight_hh_l0"] = np.zeros((2, 4 * H, H))
    for call in (lambda: learner.step(numbers(B, I)), lambda: rtrl.RTRL(layer)):
        with pytest.raises(ValueError, match=r"weight_hh_l0 has shape \(2, 20, 5\); expected \(20, 5\).*axis E"):
            call()
    layer.parameters["weight_hh_l0"] = np.zeros((4 * H, H), np.float32)
    with pytest.raises(TypeError, match="weight_hh_l0 has dtype float32; expected float64"):
        learner.step(numbers(B, I))


def test_bad_steps_change_nothing():
    layer = make("gru")
    learner = rtrl.RTRL(layer, numbers(1, B, H))
    with pytest.raises(RuntimeError, match="there was no step yet"):
        learner.gradient(None)
    assert learner.state is None
    with pytest.raises(ValueError, match=r"x_t has shape \(3, 3\); expected \(4, 3\) from the state \(1, 4, 5\)"):
        learner.step(numbers(3, I))
    learner.step(numbers(B, I))
    before, grads = learner.state, learner.gradient(np.ones((B, H)))
    for arguments, match in (
        ((numbers(B, I).astype(np.float32),), "x_t has dtype float32; expected float64"),
        ((numbers(1, B, I),), r"x_t has shape \(1, 4, 3\); expected \(B, I\) or \(I,\) with I=3"),
        ((numbers(3, I),), r"x_t has shape \(3, 3\); expected \(4, 3\) as at first"),
        ((numbers(I),), r"x_t has shape \(3,\); expected \(4, 3\) as at first"),
        ((numbers(B, I), np.ones(B)), "reset has dtype float64; expected bool or uint8"),
        ((numbers(B, I), np.ones(3, bool)), r"reset has shape \(3,\); expected \(4,\)"),
        ((numbers(B, I), np.ones(B, bool), np.ones((B, 1), bool)), r"active has shape \(4, 1\); expected \(4,\)"),
    ):
        with pytest.raises((ValueError, TypeError), match=match):
            learner.step(*arguments)
    for arguments, match in (
        ((numbers(1, H),), r"dy_t has shape \(1, 5\); expected \(4, 5\)"),
        ((numbers(B, H).astype(np.float32),), "dy_t has dtype float32; expected float64"),
        ((None, numbers(B, H)), r"dstate has shape \(4, 5\); expected \(1, 4, 5\)"),
    ):
        with pytest.raises((ValueError, TypeError), match=match):
            learner.gradient(*arguments)
    np.testing.assert_array_equal(learner.state, before)
    same(flat(learner.gradient(np.ones((B, H)))), flat(grads), 0)
    same(flat(learner.gradient(None)), {name: 0 * array for name, array in flat(grads).items()}, 0)


def test_bad_walks():
    layer, x = make("lstm"), numbers(T, B, I)
    with pytest.raises(ValueError, match="rtrl: k1 is 0; expected an integer >= 1"):
        rtrl.chunks(layer, x, k1=0)
    with pytest.raises(ValueError, match=r"rtrl: reset has shape \(3, 4\); expected \(20, 4\)"):
        rtrl.chunks(layer, x, reset=np.zeros((3, B), bool))
    with pytest.raises(ValueError, match=r"rtrl: reset is given beside an iterable x; expected \(x, reset\) pairs"):
        rtrl.chunks(layer, [x], reset=np.zeros((T, B), bool))
    with pytest.raises(ValueError, match="expected integers >= 0"):
        rtrl.chunks(layer, x, lengths=np.array([1, 2, -3, 4]))
    walk = rtrl.chunks(layer, x)
    first = next(walk)
    with pytest.raises(ValueError, match=r"dy has shape \(4, 5\); expected \(1, 4, 5\)"):
        next(walk).backward(np.zeros((B, H)))
    with pytest.raises(RuntimeError, match="after the next chunk was taken"):
        first.backward(first.y)
    chunk = next(walk)
    chunk.backward(chunk.y)
    with pytest.raises(RuntimeError, match="called twice"):
        chunk.backward(chunk.y)
    assert list(rtrl.chunks(layer, x[:0])) == []


def test_the_documented_examples_run():
    result = doctest.testmod(rtrl, extraglobs={"fusedrnn": fusedrnn, "np": np})
    assert result.attempted > 10 and result.failed == 0
