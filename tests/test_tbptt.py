# SPDX-License-Identifier: Apache-2.0
"""Truncated backpropagation through time against a loop over single steps in torch, and against whole sequences."""

import copy
import doctest
import tracemalloc

import numpy as np
import pytest

import fusedrnn
from fusedrnn import tbptt

torch = pytest.importorskip("torch")
import fusedrnn.torch  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread():
    """Single steps of a few rows: more threads only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


CELLS = ["LSTM", "GRU", "RNN"]
I, H, L, B, RATE = 3, 5, 2, 4, 0.3


def make_layer(cell: str, seed: int = 3, **options):
    return getattr(fusedrnn, cell)(I, H, options.pop("num_layers", L), dtype=np.float64, seed=seed, **options)


def make_data(T: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((T, B, I)), rng.standard_normal((T, B, H))


def weights_of(layer) -> dict[str, np.ndarray]:
    return {name: array.copy() for name, array in layer.parameters.items()}


def as_tuple(state):
    return state if isinstance(state, tuple) else (state,)


def train(layer, x, target, k1, k2, rate=RATE, **options):
    """Gradients of every update, and y of all steps, with a gradient-descent update after each."""
    updates, ys = [], []
    for chunk in tbptt.chunks(layer, x, k1=k1, k2=k2, **options):
        ys.append(chunk.y.copy())
        grads = chunk.backward(chunk.y - target[chunk.start : chunk.stop])
        if chunk.update:
            updates.append({name: grads[name].copy() for name in layer.parameters})
            for name, weight in layer.parameters.items():
                weight -= rate * grads[name]
    return updates, np.concatenate(ys)


def naive(layer, cell, x, target, k1, k2, rate=RATE, lengths=None, reset=None):
    """The same by its definition: one step at a time in torch, every state kept, everything masked by row."""
    net = getattr(torch.nn, cell)(I, H, L, dtype=torch.float64)
    net.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in layer.parameters.items()})
    x, target = torch.from_numpy(x), torch.from_numpy(target)
    zero = torch.zeros(L, B, H, dtype=torch.float64)
    zero = (zero, zero) if cell == "LSTM" else (zero,)
    lengths = np.full(B, len(x)) if lengths is None else lengths
    states = {0: zero}  # the state before a step, as the latest run over it left it

    def run(first, stop, new):
        state = tuple(s.detach() for s in states[first])
        loss, ys = 0.0, []
        for t in range(first, stop):
            if reset is not None:
                keep = torch.from_numpy(reset[t] == 0)[:, None]
                state = tuple(torch.where(keep, s, 0.0) for s in state)
            y, after = net(x[t : t + 1], state if cell == "LSTM" else state[0])
            alive = torch.from_numpy(t < lengths)[:, None]
            state = tuple(
                torch.where(alive, a, s) for a, s in zip(after if cell == "LSTM" else (after,), state, strict=True)
            )
            y = torch.where(alive, y[0], 0.0)
            states[t + 1] = state
            if t >= new:
                loss = loss + 0.5 * torch.where(alive, (y - target[t]) ** 2, 0.0).sum()
                ys.append(y.detach().numpy())
        loss.backward()
        return ys

    updates, ys = [], []
    end = int(max(lengths))
    for begin in range(0, end, k1):
        stop = min(begin + k1, end)
        if k2 >= k1:
            ys += run(max(stop - k2, 0) if k2 > k1 else begin, stop, begin)
        else:
            for piece in range(begin, stop, k2):
                ys += run(piece, min(piece + k2, stop), piece)
        updates.append({name: p.grad.numpy().copy() for name, p in net.named_parameters()})
        with torch.no_grad():
            for p in net.parameters():
                p -= rate * p.grad
                p.grad = None
    return updates, np.stack(ys)


def assert_same_training(got, expected, rtol=1e-9):
    assert len(got[0]) == len(expected[0])
    for n, (ours, theirs) in enumerate(zip(got[0], expected[0], strict=True)):
        for name in theirs:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=rtol, atol=1e-11, err_msg=f"update {n}: {name}")
    np.testing.assert_allclose(got[1], expected[1], rtol=rtol, atol=1e-11)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(
    ("k1", "k2"), [(5, 5), (4, 6), (4, 8), (4, 11), (3, 4), (1, 5), (2, 40), (9, 3), (10, 4), (7, 1), (30, 30)]
)
def test_training_equals_the_naive_loop(cell, k1, k2):
    layer = make_layer(cell)
    x, target = make_data(23)
    expected = naive(layer, cell, x, target, k1, k2, rate=0.01)
    assert_same_training(train(layer, x, target, k1, k2, rate=0.01), expected)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("k1", "k2"), [(5, 5), (4, 7), (3, 9), (9, 4)])
def test_rows_that_end_and_reset_at_different_times(cell, k1, k2):
    layer = make_layer(cell)
    x, target = make_data(23)
    lengths = np.array([17, 0, 20, 9])
    reset = np.random.default_rng(1).random((23, B)) < 0.15
    reset[[0, k1, 2 * k1], [0, 2, 3]] = True  # at chunk boundaries too
    expected = naive(layer, cell, x, target, k1, k2, rate=0.01, lengths=lengths, reset=reset)
    got = train(layer, x, target, k1, k2, rate=0.01, lengths=lengths, reset=reset)
    assert len(got[1]) == 20  # the steps past every row's end are not run
    assert_same_training(got, expected)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("k1", "k2"), [(40, 40), (7, 40), (5, 31), (31, 31), (1, 33)])
def test_reaching_over_the_whole_sequence_is_full_backpropagation(cell, k1, k2):
    layer = make_layer(cell)
    x, target = make_data(31)
    y, _ = layer(x)
    expected = layer.backward(y - target)
    updates, ys = train(layer, x, target, k1, k2, rate=0.0)
    np.testing.assert_allclose(ys, y, rtol=1e-12)
    for name in layer.parameters:
        np.testing.assert_allclose(sum(u[name] for u in updates), expected[name], rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.parametrize(("k1", "k2"), [(40, 40), (7, 40), (10, 10), (10, 4)])
def test_context_reaches_every_step(k1, k2):
    """The context's gradient is added up as the weights' are; in chunks of full reach it is that of the whole call."""
    K, lengths = 2, np.array([40, 31, 0, 7])
    layer = make_layer("LSTM", context_size=K)
    x, target = make_data(40)
    context = np.random.default_rng(5).standard_normal((B, K))
    ys, total = [], np.zeros((B, K))
    for chunk in tbptt.chunks(layer, x, k1=k1, k2=k2, lengths=lengths, context=context):
        ys.append(chunk.y)
        grads = chunk.backward(chunk.y - target[chunk.start : chunk.stop])
        if chunk.update:
            total += grads["context"]
    y, _ = layer(x, lengths=lengths, context=context)
    np.testing.assert_allclose(np.concatenate(ys), y, atol=1e-13)
    if k2 == 40:
        want = layer.backward(y - target)["context"]
    else:  # cut where chunks begin: the state before is given and does not know the context
        want, state, reach = np.zeros((B, K)), None, min(k1, k2)
        for a in range(0, 40, k1):
            for b in range(a, a + k1, reach):
                end = min(b + reach, a + k1)
                part, state = layer(x[b:end], state, lengths=np.clip(lengths - b, 0, end - b), context=context)
                want += layer.backward(part - target[b:end])["context"]
    np.testing.assert_allclose(total, want, atol=1e-12)
    assert np.abs(want[[0, 1, 3]]).min() > 1e-3 and not want[2].any()


@pytest.mark.parametrize("cell", CELLS)
def test_input_and_state_gradients_and_what_is_carried(cell):
    layer = make_layer(cell)
    x, target = make_data(24)
    rng = np.random.default_rng(5)
    start = tuple(rng.standard_normal((L, B, H)) for _ in as_tuple(layer(x[:1])[1]))
    start = start if cell == "LSTM" else start[0]
    y, final = layer(x, start)
    expected = layer.backward(y - target)
    # three windows, all reaching back to step 0: their dx and dstate add up to those of the whole sequence
    dx, dstate = np.zeros_like(x), [np.zeros((L, B, H)) for _ in as_tuple(start)]
    for chunk in tbptt.chunks(layer, x, k1=8, k2=100, state=start):
        assert chunk.window == 0
        grads = chunk.backward(chunk.y - target[chunk.start : chunk.stop])
        assert grads["x"].shape == x[: chunk.stop].shape
        dx[: chunk.stop] += grads["x"]
        for total, part in zip(dstate, as_tuple(grads["state"]), strict=True):
            total += part
    np.testing.assert_allclose(dx, expected["x"], rtol=1e-9, atol=1e-12)
    for total, whole in zip(dstate, as_tuple(expected["state"]), strict=True):
        np.testing.assert_allclose(total, whole, rtol=1e-9, atol=1e-12)
    for got, whole in zip(as_tuple(chunk.state), as_tuple(final), strict=True):
        np.testing.assert_allclose(got, whole, rtol=1e-12)


def test_a_gradient_into_the_last_state():
    layer = make_layer("LSTM")
    x, target = make_data(12)
    y, final = layer(x)
    dstate = tuple(np.ones_like(s) for s in final)
    expected = layer.backward(y - target, dstate)
    for k1, k2 in ((12, 12), (5, 12)):
        sums = dict.fromkeys(layer.parameters, 0.0)
        for chunk in tbptt.chunks(layer, x, k1=k1, k2=k2):
            grads = chunk.backward(chunk.y - target[chunk.start : chunk.stop], dstate if chunk.stop == 12 else None)
            sums = {name: sums[name] + grads[name] for name in sums}
        for name in sums:
            np.testing.assert_allclose(sums[name], expected[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("k1", "k2"), [(6, 6), (4, 10), (10, 4)])
def test_every_kind_of_source_gives_the_same_bits(k1, k2):
    x, target = make_data(29)
    reset = (np.random.default_rng(2).random((29, B)) < 0.1).astype(np.uint8)
    known = {"lengths": np.full(B, 29)}
    expected = train(make_layer("GRU"), x, target, k1, k2, reset=reset, rate=0.01)
    cuts = [(0, 1), (1, 1), (1, 9), (9, 20), (20, 29)]  # one block is empty
    sources = [
        [(x[a:b], reset[a:b]) for a, b in cuts],
        ((x[a:b].copy(), reset[a:b].astype(bool)) for a, b in cuts),
        ((x[t : t + 1], reset[t : t + 1] if reset[t].any() else None) for t in range(29)),
    ]
    for source in sources:
        updates, ys = train(make_layer("GRU"), source, target, k1, k2, rate=0.01, **known)
        np.testing.assert_array_equal(ys, expected[1])
        for ours, theirs in zip(updates, expected[0], strict=True):
            for name in theirs:
                np.testing.assert_array_equal(ours[name], theirs[name])


def test_an_end_that_nobody_could_know():
    x, target = make_data(30)
    for k1, k2, windows in (
        (4, 10, [0, 0, 2, 6, 10, 14, 18, 22]),
        (6, 6, [0, 6, 12, 18, 24]),
        (7, 3, [0, 3, 6, 7, 10, 13]),
    ):
        layer = make_layer("LSTM")
        chunks = list(tbptt.chunks(layer, (x[t : t + 5] for t in range(0, 30, 5)), k1=k1, k2=k2))
        assert [chunk.window for chunk in chunks][: len(windows)] == windows
        assert [chunk.start for chunk in chunks[1:]] == [chunk.stop for chunk in chunks[:-1]]
        assert chunks[-1].stop == 30 and chunks[-1].update
        assert [chunk.stop for chunk in chunks if chunk.update] == [*range(k1, 30, k1), 30]


def test_batch_first_and_unbatched():
    x, target = make_data(19)
    for k1, k2 in ((5, 5), (4, 9), (9, 4)):
        plain = train(make_layer("LSTM"), x, target, k1, k2, rate=0.0)
        layer = make_layer("LSTM", batch_first=True)
        lengths, sums = np.full(B, 19), dict.fromkeys(layer.parameters, 0.0)
        for chunk in tbptt.chunks(layer, x.transpose(1, 0, 2), k1=k1, k2=k2, lengths=lengths):
            assert chunk.y.shape == (B, chunk.stop - chunk.start, H)
            grads = chunk.backward(chunk.y - target.transpose(1, 0, 2)[:, chunk.start : chunk.stop])
            if chunk.update:
                sums = {name: sums[name] + grads[name] for name in sums}
        for name in sums:
            np.testing.assert_allclose(sums[name], sum(u[name] for u in plain[0]), rtol=1e-9, atol=1e-12)
        one = train(make_layer("LSTM"), x[:, 1], target[:, 1], k1, k2, rate=0.0)
        row = train(make_layer("LSTM"), x[:, 1:2], target[:, 1:2], k1, k2, rate=0.0)
        np.testing.assert_allclose(one[1], row[1][:, 0], rtol=1e-12)
        for name in sums:
            np.testing.assert_allclose(one[0][0][name], row[0][0][name], rtol=1e-9, atol=1e-12)


def test_the_next_block_is_taken_after_the_update():
    layer = make_layer("RNN")
    order = []

    def source():
        for n in range(4):
            order.append(f"block {n}")
            yield make_data(6, seed=n)[0]

    for n, chunk in enumerate(tbptt.chunks(layer, source(), k1=6)):
        chunk.backward(chunk.y)
        order.append(f"update {n}")
    assert order == [f"{what} {n}" for n in range(4) for what in ("block", "update")]


@pytest.mark.parametrize(("k1", "k2"), [(20, 20), (20, 50), (50, 20)])
def test_memory_does_not_grow_with_the_sequence(k1, k2):
    layer = fusedrnn.GRU(8, 16, seed=0)
    block = np.random.default_rng(0).standard_normal((10, 8, 8)).astype(np.float32)

    def peak(blocks: int) -> int:
        source = (block.copy() for _ in range(blocks))
        tracemalloc.start()
        for chunk in tbptt.chunks(layer, source, k1=k1, k2=k2):
            chunk.backward(chunk.y)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(15)
    assert peak(90) < peak(15) * 1.1


def test_every_run_draws_another_dropout_mask():
    layer = make_layer("GRU", dropout=0.5)
    x = np.ones((12, B, I))
    ys = [chunk.y.copy() for chunk in tbptt.chunks(layer, x, k1=4, k2=6)]
    assert layer.draws == 5  # the windows 0..4 and 2..8 run in two parts each, 6..12 in one
    state = None
    for draw, (a, b) in enumerate([(0, 2), (2, 4)]):  # the first window again, by hand
        layer.draws = draw
        y, state = layer(x[a:b], state)
        np.testing.assert_array_equal(ys[0][a:b], y)


def test_evaluation_needs_no_backward():
    layer = make_layer("LSTM").eval()
    x, _ = make_data(20)
    y, final = layer(x)
    parts = [(chunk.y, chunk.state) for chunk in tbptt.chunks(layer, x, k1=7)]
    np.testing.assert_allclose(np.concatenate([y for y, _ in parts]), y, rtol=1e-12)
    np.testing.assert_allclose(parts[-1][1][0], final[0], rtol=1e-12)


def test_nothing_to_do():
    layer = make_layer("LSTM")
    assert list(tbptt.chunks(layer, np.zeros((0, B, I)), k1=5)) == []
    assert list(tbptt.chunks(layer, iter([]), k1=5, k2=9)) == []
    assert list(tbptt.chunks(layer, np.zeros((6, B, I)), k1=5, lengths=np.zeros(B, int))) == []


def test_backward_once_and_in_time():
    layer = make_layer("LSTM")
    x, _ = make_data(20)
    walk = tbptt.chunks(layer, x, k1=5)
    first = next(walk)
    chunk = next(walk)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"dy has shape \(4, 4, 5\); expected \(5, 4, 5\)"):
            chunk.backward(np.zeros((4, B, H)))
    chunk.backward(chunk.y)
    with pytest.raises(RuntimeError, match="after the next chunk was taken"):
        first.backward(first.y)
    for between in (lambda: layer(x[:5]), lambda: layer.load_state_dict(layer.state_dict())):
        chunk = next(tbptt.chunks(layer, x, k1=5))
        copy.copy(layer)(x)
        between()
        with pytest.raises(RuntimeError, match="the layer was called, .* Let copy.copy"):
            chunk.backward(chunk.y)
    walk = tbptt.chunks(layer, x, k1=5)
    chunk = next(walk)
    copy.copy(layer).eval()(x)
    chunk.backward(chunk.y)
    with pytest.raises(RuntimeError, match="called twice"):
        chunk.backward(chunk.y)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"k1": 0}, "k1 is 0; expected a number of steps >= 1"),
        ({"k1": 5, "k2": -1}, "k2 is -1; expected"),
        ({"k1": 2.5}, "k1 is 2.5; expected"),
        ({"k1": 5, "lengths": np.array([1, 2, -3, 4])}, "expected integers >= 0"),
        ({"k1": 5, "lengths": np.array([1.0, 2, 3, 4])}, "expected integers >= 0"),
        ({"k1": 5, "lengths": np.array([1, 2, 3, 11])}, "x ended after 10 steps; expected 11 from lengths"),
        ({"k1": 5, "reset": np.zeros((9, B))}, r"reset has shape \(9, 4\); expected \(10, 4\)"),
    ],
)
def test_bad_arguments_are_refused_at_once(options, match):
    with pytest.raises(ValueError, match=match):
        tbptt.chunks(make_layer("LSTM"), np.zeros((10, B, I)), **options)


def test_other_bad_arguments():
    with pytest.raises(ValueError, match="bidirectional; expected one direction"):
        tbptt.chunks(make_layer("LSTM", bidirectional=True), np.zeros((10, B, I)), k1=5)
    with pytest.raises(ValueError, match=r"expected \(x, reset\) pairs"):
        tbptt.chunks(make_layer("LSTM"), [np.zeros((10, B, I))], k1=5, reset=np.zeros((10, B)))


def torch_twin(layer):
    """fusedrnn.torch's module with the layer's weights."""
    twin = getattr(fusedrnn.torch, type(layer).__name__)(
        I, H, layer.num_layers, batch_first=layer.batch_first, dtype=torch.float64
    )
    twin.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in layer.parameters.items()})
    return twin


def assert_twins_walk_alike(layer, x, k1, k2, *, lengths, theirs, state=None, reset=None):
    """The same chunks and gradients (of weights, x and the initial state) from NumPy and from torch."""
    twin = torch_twin(layer)
    tx = torch.from_numpy(x.copy()).requires_grad_()
    tstate = None if state is None else torch.from_numpy(state.copy()).requires_grad_()
    ours = tbptt.chunks(layer, x, k1=k1, k2=k2, lengths=lengths, state=state, reset=reset)
    axis = 1 if layer.batch_first and x.ndim == 3 else 0
    walk = fusedrnn.torch.tbptt.chunks(twin, tx, k1=k1, k2=k2, lengths=theirs, state=tstate, reset=reset)
    for a, b in zip(ours, walk, strict=True):
        assert (a.window, a.start, a.stop, a.update) == (b.window, b.start, b.stop, b.update)
        np.testing.assert_allclose(a.y, b.y.detach().numpy(), rtol=1e-12, atol=1e-14)
        grads = a.backward(np.cos(a.y))
        b.y.sin().sum().backward()
        window = tx.grad.narrow(axis, a.window, a.stop - a.window)
        np.testing.assert_allclose(grads["x"], window.numpy(), rtol=1e-10, atol=1e-14)
        window.zero_()
        assert not tx.grad.any()
        if state is not None and a.window == 0:
            np.testing.assert_allclose(grads["state"], tstate.grad.numpy(), rtol=1e-10, atol=1e-14)
            tstate.grad = None
        if a.update:
            for name, p in twin.named_parameters():
                np.testing.assert_allclose(grads[name], p.grad.numpy(), rtol=1e-10, atol=1e-14, err_msg=name)
            twin.zero_grad()


@pytest.mark.parametrize("lengths", [None, [11, 11], [3, 5], [5, 0], [0, 0]])
@pytest.mark.parametrize("T", [0, 1, 2, 11])
def test_torch_takes_the_same_chunks_for_every_k1_and_k2(T, lengths):
    layer = fusedrnn.RNN(I, H, dtype=np.float64, seed=1)
    x = np.random.default_rng(0).standard_normal((T, 2, I))
    lengths = None if lengths is None else np.minimum(lengths, T)
    for k1 in (1, 2, 3, 4, 12):
        for k2 in (None, 1, 2, 4, 5, 9, 12):
            assert_twins_walk_alike(
                layer, x, k1, k2, lengths=lengths, theirs=None if lengths is None else lengths.tolist()
            )


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("rows", [None, 1, 3])
@pytest.mark.parametrize("cell", CELLS)
def test_torch_takes_the_same_chunks_however_the_data_lie(cell, rows, batch_first):
    layer = make_layer(cell, batch_first=batch_first)
    rng = np.random.default_rng(rows)
    x = rng.standard_normal((11, I) if rows is None else (rows, 11, I) if batch_first else (11, rows, I))
    reset = rng.random(x.shape[:-1]) < 0.2
    lengths = np.array(5) if rows is None else np.array([3, 5, 1])[-rows:]
    state = None if cell == "LSTM" else rng.standard_normal((L, H) if rows is None else (L, rows, H))
    forms = [lengths.tolist(), torch.from_numpy(lengths), lengths.astype(np.int32)]
    for theirs in [*forms, torch.tensor([5])] if rows is None else forms:
        for k1, k2 in ((4, 5), (4, 4), (4, 3), (2, 40)):
            assert_twins_walk_alike(layer, x, k1, k2, lengths=lengths, theirs=theirs, state=state, reset=reset)


@pytest.mark.parametrize(
    ("x", "options", "error", "words"),
    [
        ((10, 2, I), {"k1": True}, ValueError, "k1 is True; expected a number of steps"),
        ((10, 2, I), {"k1": 3, "lengths": [3, 11]}, ValueError, r"lengths lie in \[3, 11\]; expected 0 <= lengths"),
        ((10, 2, I), {"k1": 3, "lengths": [-1, 4]}, ValueError, r"lengths lie in \[-1, 4\]; expected 0 <= lengths"),
        ((10, 2, I), {"k1": 3, "lengths": [4]}, ValueError, r"lengths has shape \(1,\); expected \(2,\)"),
        ((10, 2, I), {"k1": 3, "lengths": [4.0, 1.0]}, TypeError, "lengths has dtype torch.float32; expected integers"),
        ((10, 2, I), {"k1": 3, "reset": np.zeros((2, 10))}, ValueError, r"reset has shape \(2, 10\); expected"),
        ((10, 2, I, 1), {"k1": 3}, ValueError, r"x has shape \(10, 2, 3, 1\); expected \(T,B,I\)"),
        (None, {"k1": 3}, TypeError, "x is a ndarray; expected a tensor"),
    ],
)
def test_torch_refuses_bad_arguments_at_once(x, options, error, words):
    x = np.zeros((10, 2, I)) if x is None else torch.zeros(x, dtype=torch.float64)
    with pytest.raises(error, match=words):
        fusedrnn.torch.tbptt.chunks(torch_twin(make_layer("GRU")), x, **options)


def test_the_documented_example_runs():
    result = doctest.testmod(tbptt)
    assert result.attempted > 5 and result.failed == 0
