# SPDX-License-Identifier: Apache-2.0
"""The judge judged: against torch.nn, against finite differences, and against itself in pieces."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import close
from fusedrnn.backends import Arguments, Problem, Results, reference
from fusedrnn.cells import CELLS
from shapes import ALL_CELLS, Case, build, empty_arguments, empty_results, named

torch = pytest.importorskip("torch")

TORCH_CELLS = ["rnn_tanh", "rnn_relu", "lstm", "gru"]


def forward(problem: Problem, p: Arguments) -> dict[str, np.ndarray]:
    out = empty_results(problem, np.float64)
    reference.forward(problem, p, out, None)
    return named(out)


def torch_layer(cell: str, p: Arguments, I: int, H: int, L: int, D: int) -> Any:
    kind = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}.get(cell, torch.nn.RNN)
    extra = {"nonlinearity": cell[4:]} if cell.startswith("rnn") else {}
    layer = kind(I, H, L, bidirectional=D == 2, dtype=torch.float64, **extra)
    with torch.no_grad():
        for weight, array in zip(layer.parameters(), [a for arrays in p.params for a in arrays], strict=True):
            weight.copy_(torch.from_numpy(array[0].copy()))
    return layer


@pytest.mark.parametrize("lengths", ["", "any"])
@pytest.mark.parametrize(("L", "D"), [(1, 1), (3, 1), (2, 2)])
@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_against_torch(cell, L, D, lengths):
    """Forward and all gradients; packed sequences for lengths (torch knows no zero)."""
    data = build(Case(cell=cell, T=6, B=5, L=L, D=D), np.float64)
    problem, p, g = data.problem, data.p, data.g
    packed = None
    if lengths:
        problem.lengths = np.array([[4, 6, 1, 6, 3]])
        packed = torch.from_numpy(problem.lengths[0])
    layer = torch_layer(cell, p, problem.I, problem.H, L, D)
    x = torch.from_numpy(p.x[:, 0].copy()).requires_grad_()
    h0 = torch.from_numpy(p.h0[:, 0].copy()).requires_grad_()
    c0 = torch.from_numpy(p.c0[:, 0].copy()).requires_grad_() if p.c0 is not None else None
    run_on = x if packed is None else torch.nn.utils.rnn.pack_padded_sequence(x, packed, enforce_sorted=False)
    y, state = layer(run_on, h0 if c0 is None else (h0, c0))
    if packed is not None:
        y = torch.nn.utils.rnn.pad_packed_sequence(y, total_length=problem.T)[0]
    h, c = state if c0 is not None else (state, None)

    got = forward(problem, p)
    close.check("y", got["y"][:, 0], y.detach().numpy(), 1e-14)
    close.check("hn", got["hn"][:, 0], h.detach().numpy(), 1e-14)
    loss = (y * torch.from_numpy(g.y[:, 0])).sum() + (h * torch.from_numpy(g.hn[:, 0])).sum()
    if c is not None:
        close.check("cn", got["cn"][:, 0], c.detach().numpy(), 1e-14)
        loss = loss + (c * torch.from_numpy(g.cn[:, 0])).sum()
    loss.backward()
    dp = empty_arguments(data, np.float64)
    reference.backward(problem, p, None, Results(g.y, g.hn, g.cn), dp)
    close.check("dx", dp.x[:, 0], x.grad.numpy(), 1e-13)
    close.check("dh0", dp.h0[:, 0], h0.grad.numpy(), 1e-13)
    if c0 is not None:
        close.check("dc0", dp.c0[:, 0], c0.grad.numpy(), 1e-13)
    for weight, array in zip(layer.named_parameters(), [a for arrays in dp.params for a in arrays], strict=True):
        close.check(weight[0], array[0], weight[1].grad.numpy(), 1e-13)


@pytest.mark.parametrize("cell", ALL_CELLS)
def test_one_step_is_the_formula_in_the_docstring(cell):
    """In plain floats. A new cell needs its formula once more here."""
    data = build(Case(cell=cell, T=1, B=1, I=2, H=2), np.float64)
    (W, R, bW, bR), H = data.p.params[0], 2
    x, h = data.p.x[0, 0, 0], data.p.h0[0, 0, 0]
    from_x, from_h = W[0] @ x + bW[0], 0.0 if R is None else R[0] @ h + bR[0]

    def sigmoid(a: Any) -> Any:
        return 1 / (1 + np.exp(-a))

    a = from_x + from_h
    if cell == "lstm":
        i, f, g, o = sigmoid(a[:H]), sigmoid(a[H : 2 * H]), np.tanh(a[2 * H : 3 * H]), sigmoid(a[3 * H :])
        want = o * np.tanh(f * data.p.c0[0, 0, 0] + i * g)
    elif cell == "cifg":
        i, g, o = sigmoid(a[:H]), np.tanh(a[H : 2 * H]), sigmoid(a[2 * H :])
        want = o * np.tanh((1 - i) * data.p.c0[0, 0, 0] + i * g)
    elif cell == "ligru":
        want = (1 - sigmoid(a[:H])) * np.maximum(a[H:], 0) + sigmoid(a[:H]) * h
    elif cell == "mingru":
        want = (1 - sigmoid(a[:H])) * h + sigmoid(a[:H]) * a[H:]
    elif cell == "minlstm":
        i, f = sigmoid(a[:H]), sigmoid(a[H : 2 * H])
        want = (f * h + i * a[2 * H :]) / (f + i)
    elif cell.startswith("rnn"):
        want = np.tanh(a) if cell == "rnn_tanh" else np.maximum(a, 0)
    else:
        assert cell in ("gru", "gru_reset_before"), f"{cell} has no formula here yet"
        r, z = sigmoid(a[:H]), sigmoid(a[H : 2 * H])
        n_x, n_h = from_x[2 * H :], from_h[2 * H :]
        n_before = R[0, 2 * H :] @ (r * h) + bR[0, 2 * H :]
        n = np.tanh(n_x + (r * n_h if cell == "gru" else n_before))
        want = (1 - z) * n + z * h
    close.check("y", forward(data.problem, data.p)["y"][0, 0, 0], want, 1e-15)


def pieces_of(reset: np.ndarray, reverse: bool) -> list[tuple[int, int]]:
    """One row's boundaries as pieces [begin, end), in the order of the walk."""
    cuts = sorted({0, len(reset), *np.flatnonzero(reset)})
    pieces = [(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]
    return pieces[::-1] if reverse else pieces


@pytest.mark.parametrize("to_initial", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", ALL_CELLS)
def test_reset_is_pieces_run_one_by_one(cell, reverse, to_initial):
    """A row with resets, forward and backward, equals its pieces; the first piece starts from the given state."""
    case = Case(cell=cell, T=9, B=1, reset=0.4, reverse=reverse, to_initial=to_initial, seed=3)
    data = build(case, np.float64)
    problem, p, g = data.problem, data.p, data.g
    got = forward(problem, p)
    dp = empty_arguments(data, np.float64)
    reference.backward(problem, p, None, g, dp)
    reset = problem.reset[:, 0, 0]
    assert 2 < reset.sum() < 9
    total = {name: 0.0 for name in ("W[0]", "R[0]", "bW[0]", "bR[0]", "h0", "c0")}
    zero = np.zeros_like(p.h0)
    pieces = pieces_of(reset, reverse)
    for k, (begin, end) in enumerate(pieces):
        # forward direction: a boundary at step 0 replaces the given state; reverse: it has nothing before it
        starts_given = k == 0 and (reverse or not reset[0])
        from_given = starts_given or to_initial
        h0, c0 = (p.h0, p.c0) if from_given else (zero, None if p.c0 is None else zero)
        part = Problem(cell, end - begin, 1, 1, problem.I, problem.H, reverse=reverse)
        piece = Arguments(p.x[begin:end], h0, c0, p.params)
        values = forward(part, piece)
        close.check("y", got["y"][begin:end], values["y"], 1e-15)
        close.check("cells", got["cells"][:, begin:end], values["cells"], 1e-15)
        last = k == len(pieces) - 1
        if last:
            close.check("hn", got["hn"], values["hn"], 1e-15)
        grads = empty_arguments(data, np.float64)
        grads.x = np.empty_like(piece.x)
        given = Results(g.y[begin:end], g.hn if last else None, g.cn if last else None, g.cells[:, begin:end])
        reference.backward(part, piece, None, given, grads)
        close.check("dx", dp.x[begin:end], grads.x, 1e-14)
        for name, array in named(grads).items():
            if name in total and (from_given or name not in ("h0", "c0")):
                total[name] = total[name] + array
    for name, array in named(dp).items():
        if name != "x":
            close.check(name, array, np.broadcast_to(total[name], array.shape), 1e-14)


@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("cell", ALL_CELLS)
def test_lengths_are_rows_run_alone(cell, D):
    data = build(Case(cell=cell, T=7, B=6, D=D, lengths="any"), np.float64)
    problem, p = data.problem, data.p
    got = forward(problem, p)
    for b, n in enumerate(problem.lengths[0]):
        alone = Problem(cell, int(n), 1, 1, problem.I, problem.H, 1, D)
        c0 = None if p.c0 is None else p.c0[:, :, b : b + 1]
        row = Arguments(p.x[:n, :, b : b + 1], p.h0[:, :, b : b + 1], c0, p.params)
        values = forward(alone, row)
        close.check("y", got["y"][:n, :, b : b + 1], values["y"], 1e-15)
        close.check("hn", got["hn"][:, :, b : b + 1], values["hn"], 1e-15)
        assert not got["y"][n:, :, b].any()
        assert not got["cells"][:, n:, :, b].any()
        if n == 0:
            np.testing.assert_array_equal(got["hn"][:, :, b], p.h0[:, :, b])


@pytest.mark.parametrize("cell", ALL_CELLS)
def test_boundary_past_the_end_does_nothing(cell):
    data = build(Case(cell=cell, T=6, B=2, D=2), np.float64)
    data.problem.lengths = np.array([[3, 5]])
    plain = forward(data.problem, data.p)
    data.problem.reset = np.arange(6)[:, None, None] >= data.problem.lengths
    for name, array in forward(data.problem, data.p).items():
        np.testing.assert_array_equal(array, plain[name], err_msg=name)


@pytest.mark.parametrize("cell", ALL_CELLS)
def test_second_direction_is_the_first_on_reversed_time(cell):
    data = build(Case(cell=cell, T=5, reverse=True), np.float64)
    got = forward(data.problem, data.p)
    data.problem.reverse = False
    data.p.x = data.p.x[::-1]
    want = forward(data.problem, data.p)
    np.testing.assert_array_equal(got["y"], want["y"][::-1])
    np.testing.assert_array_equal(got["hn"], want["hn"])


@pytest.mark.parametrize("cell", ALL_CELLS)
def test_stack_is_layers_one_by_one(cell):
    data = build(Case(cell=cell, L=3, D=2), np.float64)
    problem, p = data.problem, data.p
    got = forward(problem, p)
    x = p.x
    for layer in range(3):
        part = slice(2 * layer, 2 * layer + 2)
        one = Problem(cell, problem.T, 1, problem.B, x.shape[-1], problem.H, 1, 2)
        c0 = None if p.c0 is None else p.c0[part]
        values = forward(one, Arguments(x, p.h0[part], c0, p.params[part]))
        close.check("cells", got["cells"][layer], values["cells"][0], 1e-15)
        close.check("hn", got["hn"][part], values["hn"], 1e-15)
        x = values["y"]
    close.check("y", got["y"], x, 1e-15)


@pytest.mark.parametrize("cell", ALL_CELLS)
def test_sets_are_models_one_by_one(cell):
    data = build(Case(cell=cell, E=3, lengths="any", reset=0.3), np.float64)
    problem, p = data.problem, data.p
    got = forward(problem, p)
    for e in range(3):
        part = slice(e, e + 1)
        one = Problem(cell, problem.T, 1, problem.B, problem.I, problem.H)
        one.lengths, one.reset = problem.lengths[part], problem.reset[:, part]
        c0 = None if p.c0 is None else p.c0[:, part]
        params: Any = [tuple(None if a is None else a[part] for a in p.params[0])]
        values = forward(one, Arguments(p.x[:, part], p.h0[:, part], c0, params))
        close.check("y", got["y"][:, part], values["y"], 1e-15)
        close.check("hn", got["hn"][:, part], values["hn"], 1e-15)


def test_clip_cell_limits_c():
    data = build(Case(T=8, B=5, clip_cell=0.3), np.float64)
    cells = forward(data.problem, data.p)["cells"]
    assert np.abs(cells).max() == 0.3
    assert (np.abs(cells) < 0.3).any()


@pytest.mark.parametrize("cell", ALL_CELLS)
def test_clip_grad_is_a_clamp_in_every_step(cell):
    """With T = 1 the clamp can be applied by hand: to dy + dhn, and for the LSTM to dcells + dcn."""
    data = build(Case(cell=cell, T=1, clip_grad=0.2), np.float64)
    g, limit = data.g, 0.2
    got, want = empty_arguments(data, np.float64), empty_arguments(data, np.float64)
    reference.backward(data.problem, data.p, None, g, got)
    data.problem.clip_grad = 0.0
    dh = g.y + g.hn
    if CELLS[cell].cell_state:
        by_hand = Results(np.clip(dh, -limit, limit), None, None, np.clip(g.cells + g.cn, -limit, limit))
    else:
        by_hand = Results(np.clip(dh + g.cells[0], -limit, limit))
    reference.backward(data.problem, data.p, None, by_hand, want)
    for name, array in named(got).items():
        close.check(name, array, named(want)[name], 1e-15)


def test_input_type_does_not_matter():
    """float32 in, float64 inside."""
    data = build(Case(), np.float32)
    a = forward(data.problem, data.p)
    wide: Any = [tuple(v.astype(np.float64) for v in arrays) for arrays in data.p.params]
    p = Arguments(data.p.x.astype(np.float64), data.p.h0.astype(np.float64), data.p.c0.astype(np.float64), wide)
    for name, array in forward(data.problem, p).items():
        np.testing.assert_array_equal(array, a[name])
