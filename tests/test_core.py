# SPDX-License-Identifier: Apache-2.0
"""The extension by itself: it trusts nobody, and the short way of layer objects gives what the long way gives."""

import gc
import math
import os
import subprocess
import sys

import numpy as np
import pytest

import fusedrnn
from fusedrnn.backends import Arguments, Problem, Results
from fusedrnn.cells import CELLS
from shapes import LAYERS

core = pytest.importorskip("fusedrnn._core", exc_type=ImportError)

LANES = [name for name, cell in CELLS.items() if cell.state_product]
T, E, B, I, H, L, D = 3, 2, 4, 5, 6, 2, 2


class Case:
    """One complete call of every kind."""

    def __init__(self, cell: str = "lstm", dtype: type = np.float32) -> None:
        rng = np.random.default_rng(0)
        spec = CELLS[cell]
        rows = spec.gates * H

        def new(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape).astype(dtype)

        def arguments() -> Arguments:
            of_h = spec.state_product
            params = [
                (
                    new(E, rows, I if k < D else D * H), new(E, rows, H) if of_h else None,
                    new(E, rows), new(E, rows) if of_h else None,
                )
                for k in range(L * D)
            ]  # fmt: skip
            c0 = new(L * D, E, B, H) if spec.cell_state else None
            return Arguments(new(T, E, B, I), new(L * D, E, B, H), c0, params)

        def results() -> Results:
            cn = new(L * D, E, B, H) if spec.cell_state else None
            return Results(new(T, E, B, D * H), new(L * D, E, B, H), cn, new(L, T, E, B, D * H))

        self.problem = Problem(cell, T, E, B, I, H, L, D)
        self.problem.lengths = np.array([[3, 0, 2, 1], [1, 2, 3, 3]])
        self.problem.reset = np.zeros((T, E, B), bool)
        self.p, self.v, self.dp, self.tdp = arguments(), arguments(), arguments(), arguments()
        self.out, self.g, self.t, self.tout = results(), results(), results(), results()
        self.tape = np.empty(core.tape_elements(self.problem), dtype)

    def written(self) -> list[np.ndarray]:
        arrays = [self.tape]
        for group in (self.out, self.tout):
            arrays += [group.y, group.hn, group.cn, group.cells]
        for group in (self.dp, self.tdp):
            arrays += [group.x, group.h0, group.c0, *(array for entry in group.params for array in entry)]
        return [array for array in arrays if array is not None]

    def forward(self) -> None:
        core.forward(self.problem, self.p, self.out, self.tape)

    def backward(self) -> None:
        core.backward(self.problem, self.p, self.tape, self.g, self.dp)

    def jvp(self) -> None:
        core.jvp(self.problem, self.p, self.v, self.tout)

    def hvp(self) -> None:
        core.hvp(self.problem, self.p, self.v, self.g, self.t, self.tdp)

    def all(self) -> None:
        self.forward()
        self.backward()
        self.jvp()
        self.hvp()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("cell", CELLS)
def test_a_right_call_works(cell, dtype):
    case = Case(cell, dtype)
    for array in case.written():
        array.fill(np.nan)
    case.all()
    for array in case.written():
        if array is not case.tape:
            assert np.isfinite(array).all()


def set_problem(**changes):
    def change(case):
        for name, value in changes.items():
            setattr(case.problem, name, value)

    return change


def set_array(group, name, make):
    def change(case):
        setattr(getattr(case, group), name, make(getattr(getattr(case, group), name)))

    return change


def set_param(group, entry, part, make):
    def change(case):
        params = getattr(case, group).params
        parts = list(params[entry])
        parts[part] = make(parts[part])
        params[entry] = tuple(parts)

    return change


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


def folded(array):
    return np.lib.stride_tricks.as_strided(array, array.shape, (0, *array.strides[1:]))


def misaligned(array):
    return np.frombuffer(b"\0" + array.tobytes(), np.uint8)[1:].view(array.dtype).reshape(array.shape)


def huge(array):
    return np.broadcast_to(np.zeros(1, array.dtype), (2**40, *array.shape[1:]))


PROBLEMS = {
    "unknown cell": (set_problem(cell="lstn"), ValueError, "cell is 'lstn'; expected one of rnn_tanh"),
    "cell no text": (set_problem(cell=3), ValueError, "cell is 3"),
    "T wrong": (set_problem(T=4), ValueError, None),
    "T negative": (set_problem(T=-1), ValueError, "T is -1; expected an int >= 0"),
    "T no int": (set_problem(T=2.5), ValueError, r"T is 2\.5"),
    "E 0": (set_problem(E=0), ValueError, "E is 0; expected an int >= 1"),
    "H 0": (set_problem(H=0), ValueError, "H is 0"),
    "L 0": (set_problem(L=0), ValueError, "L is 0"),
    "D 3": (set_problem(D=3), ValueError, "D is 3; expected an int >= 1 and <= 2"),
    "sizes too large": (set_problem(T=2**50, H=2**40), ValueError, "more than any memory holds"),
    "T past 64 bits": (set_problem(T=2**70), ValueError, "T is 1180591620717411303424"),
    "reverse and two directions": (set_problem(reverse=True), ValueError, "D is 2"),
    "clip_cell negative": (set_problem(clip_cell=-1.0), ValueError, r"clip_cell is -1\.0"),
    "clip_grad NaN": (set_problem(clip_grad=math.nan), ValueError, "clip_grad is nan"),
    "dropout 2": (set_problem(dropout=2.0), ValueError, "dropout is 2"),
    "seed negative": (set_problem(seed=-1), ValueError, "seed is -1"),
    "seed large": (set_problem(seed=2**64), ValueError, "seed is 18446744073709551616"),
    "length past T": (
        set_problem(lengths=np.full((E, B), T + 1)),
        ValueError,
        r"lengths\[0, 0\] is 4; expected 0 <= length <= T = 3",
    ),
    "length negative": (set_problem(lengths=np.full((E, B), -1)), ValueError, r"lengths\[0, 0\] is -1"),
    "lengths of another type": (
        set_problem(lengths=np.full((E, B), 1, np.int32)),
        TypeError,
        "dtype int32; expected int64",
    ),
    "lengths of another shape": (set_problem(lengths=np.ones(B, np.int64)), ValueError, r"\(4,\); expected \(2, 4\)"),
    "lengths a list": (set_problem(lengths=[[1] * B] * E), TypeError, "lengths is a list; expected numpy.ndarray"),
    "reset of another type": (set_problem(reset=np.zeros((T, E, B), np.float32)), TypeError, "reset has dtype float32"),
    "reset of another shape": (set_problem(reset=np.zeros((T, B), bool)), ValueError, r"expected \(3, 2, 4\)"),
}


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("call", ["forward", "backward", "jvp", "hvp"])
def test_bad_problems_are_refused(call, name):
    change, error, match = PROBLEMS[name]
    refused(call, change, error, match)


ARRAYS = {
    "x a list": (set_array("p", "x", lambda a: a.tolist()), TypeError, "x is a list; expected numpy.ndarray"),
    "x None": (set_array("p", "x", lambda a: None), TypeError, "x is a NoneType"),
    "x of integers": (
        set_array("p", "x", lambda a: a.astype(int)),
        ValueError,  # integers are tokens, and have no axis I
        r"x has shape \(3, 2, 4, 5\); expected \(3, 2, 4\) = \(T, E, B\)",
    ),
    "x of another type": (set_array("p", "x", lambda a: a.astype(np.float64)), TypeError, "expected float64"),
    "x half": (set_array("p", "x", lambda a: a.astype(np.float16)), TypeError, "float16"),
    "x too short": (
        set_array("p", "x", lambda a: a[1:]),
        ValueError,
        r"x has shape \(2, 2, 4, 5\); expected \(3, 2, 4, 5\)",
    ),
    "x endless": (set_array("p", "x", huge), ValueError, "x has shape"),
    "x of another rank": (set_array("p", "x", lambda a: a[0]), ValueError, r"= \(T, E, B, I\)"),
    "x swapped": (set_array("p", "x", lambda a: a.astype(">f4")), ValueError, "byte order"),
    "x misaligned": (set_array("p", "x", misaligned), ValueError, "aligned"),
    "h0 of another type": (set_array("p", "h0", lambda a: a.astype(np.float64)), TypeError, "h0 has dtype float64"),
    "c0 of another shape": (set_array("p", "c0", lambda a: a[:1]), ValueError, "c0 has shape"),
    "params short": (
        set_array("p", "params", lambda a: a[:-1]),
        ValueError,
        r"params has 3 entries; expected L\*D = 4",
    ),
    "params None": (set_array("p", "params", lambda a: None), ValueError, "params has 0 entries"),
    "params of lists": (
        set_array("p", "params", lambda a: [list(e) for e in a]),
        TypeError,
        r"params\[0\] is no tuple",
    ),
    "W None": (set_param("p", 1, 0, lambda a: None), TypeError, r"params\[1\] lacks W or R"),
    "W transposed": (set_param("p", 0, 0, lambda a: a.transpose(0, 2, 1)), ValueError, r"params\[0\].W has shape"),
    "R of another shape": (set_param("p", 3, 1, lambda a: a[..., 1:]), ValueError, r"params\[3\].R has shape"),
    "bias of another type": (
        set_param("p", 2, 3, lambda a: a.astype(np.float64)),
        TypeError,
        r"params\[2\].bR has dtype",
    ),
}


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("call", ["forward", "backward", "jvp", "hvp"])
def test_bad_arguments_are_refused(call, name):
    change, error, match = ARRAYS[name]
    refused(call, change, error, match)


WRITTEN = {
    "y read-only": ("forward", set_array("out", "y", read_only), "out.y is read-only"),
    "y folded": ("forward", set_array("out", "y", folded), "out.y has elements that share memory"),
    "y short": ("forward", set_array("out", "y", lambda a: a[1:]), "out.y has shape"),
    "cn folded": ("forward", set_array("out", "cn", folded), "out.cn has elements that share memory"),
    "cells short": ("forward", set_array("out", "cells", lambda a: a[:, 1:]), "out.cells has shape"),
    "g.y short": ("backward", set_array("g", "y", lambda a: a[1:]), "g.y has shape"),
    "dx read-only": ("backward", set_array("dp", "x", read_only), "dp.x is read-only"),
    "dx folded in T": ("backward", set_array("dp", "x", folded), "dp.x has elements that share memory"),
    "dW short": ("backward", set_param("dp", 1, 0, lambda a: a[:, 1:]), r"dp.params\[1\].W has shape"),
    "dR read-only": ("backward", set_param("dp", 0, 1, read_only), r"dp.params\[0\].R is read-only"),
    "tangent of another type": ("jvp", set_array("v", "x", lambda a: a.astype(np.float64)), "v.x has dtype float64"),
    "tout read-only": ("jvp", set_array("tout", "hn", read_only), "tout.hn is read-only"),
    "t.y short": ("hvp", set_array("t", "y", lambda a: a[1:]), "t.y has shape"),
    "tdp folded": ("hvp", set_array("tdp", "x", folded), "tdp.x has elements that share memory"),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_bad_results_are_refused(name):
    call, change, match = WRITTEN[name]
    refused(call, change, (TypeError, ValueError), match)


@pytest.mark.parametrize("call", ["forward", "backward"])
@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda a: a[:-1], "elements; expected"),
        (lambda a: np.empty(2 * a.size, a.dtype)[::2], "tape is not contiguous"),
        (lambda a: a.astype(np.float64), "tape has dtype float64"),
        (lambda a: a.reshape(1, -1), "tape has shape"),
        (lambda a: a.tolist(), "tape is a list"),
    ],
)
def test_bad_tapes_are_refused(call, make, match):
    def change(case):
        case.tape = make(case.tape)

    refused(call, change, (TypeError, ValueError), match)


def test_backward_needs_a_tape():
    def change(case):
        case.tape = None

    refused("backward", change, TypeError, "tape is a NoneType")


def refused(call, change, error, match):
    case = Case()
    case.forward()
    change(case)
    arrays = case.written()[1:]
    before = [array.copy() for array in arrays]
    with pytest.raises(error, match=match):
        getattr(case, call)()
    for array, old in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, old)


def test_state_of_a_cell_without_c():
    case = Case("gru")
    case.p.c0 = case.p.h0
    with pytest.raises(ValueError, match="c0 is given; only cells with c have it"):
        case.forward()


def test_gradients_may_be_summed_over_sets():
    one, two = Case(), Case()
    for case in (one, two):
        case.forward()
    shared = []
    for k, entry in enumerate(two.dp.params):
        shared.append(tuple(np.lib.stride_tricks.as_strided(a[:1], a.shape, (0, *a.strides[1:])) for a in entry))
        two.dp.params[k] = shared[-1]
    one.backward()
    two.backward()
    for entry, sums in zip(one.dp.params, shared, strict=True):
        for full, total in zip(entry, sums, strict=True):
            np.testing.assert_allclose(total[0], full.sum(0), rtol=1e-4, atol=1e-4)


def test_any_strides_are_read():
    case, strided = Case(), Case()
    case.all()

    def spread(array):
        if array is None:
            return None
        big = np.full([3 * n for n in array.shape], np.nan, array.dtype)
        view = big[tuple(slice(2, None, 3) for _ in array.shape)][tuple(slice(None, None, -1) for _ in array.shape)]
        view[...] = array
        return view

    for name in ("p", "v", "dp", "tdp"):
        group = getattr(strided, name)
        group.x, group.h0, group.c0 = spread(group.x), spread(group.h0), spread(group.c0)
        group.params = [tuple(spread(a) for a in entry) for entry in group.params]
    for name in ("out", "g", "t", "tout"):
        group = getattr(strided, name)
        group.y, group.hn, group.cn, group.cells = map(spread, (group.y, group.hn, group.cn, group.cells))
    strided.problem.lengths = np.repeat(np.repeat(case.problem.lengths, 2, 0), 3, 1)[::2, ::3]
    strided.all()
    for got, expected in zip(strided.written()[1:], case.written()[1:], strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


# ---- the short way -------------------------------------------------------------------------------------------------


def layer_of(cell, **options):
    return LAYERS[CELLS[cell].op](I, H, **CELLS[cell].options, **options)


def flat(result):
    y, state = result
    return [y, *(state if isinstance(state, tuple) else (state,))]


def same(got, expected):
    for a, b in zip(flat(got), flat(expected), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 3, "bidirectional": True},
        {"batch_first": True, "num_layers": 2},
        {"bias": False},
        {"dtype": np.float64},
    ],
    ids=str,
)
@pytest.mark.parametrize("cell", LANES)
def test_lane_forward_is_the_long_way(cell, options, batched):
    layer = layer_of(cell, seed=1, backend="native", **options).eval()
    rng = np.random.default_rng(2)
    x = rng.standard_normal((7, 4, I) if batched else (7, I)).astype(layer.dtype)
    rows = 4 if not layer.batch_first else 7
    states = (1 + layer.bidirectional) * layer.num_layers
    state = rng.standard_normal((states, rows, H) if batched else (states, H)).astype(layer.dtype)
    if CELLS[cell].cell_state:
        state = (state, state[::-1] * 0.5)
    lane = core.Lane(cell, layer.num_layers, 1 + layer.bidirectional, layer.batch_first)
    for given in (None, state):
        long_way = layer._run(x, given)[:2]
        short_way = lane.forward(x, given, layer.parameters)
        same(short_way, long_way)
        same(lane.forward(x, given, list(layer.parameters.values())), long_way)
        same(lane.forward(x, given, tuple(layer.parameters.values())), long_way)


def test_lane_reads_strided_and_reversed_arrays():
    layer = fusedrnn.LSTM(I, H, seed=1, backend="native").eval()
    lane = core.Lane("lstm")
    x = np.random.default_rng(0).standard_normal((4, 14, 2 * I)).astype(np.float32).transpose(1, 0, 2)[::-2, :, ::2]
    params = {name: np.asfortranarray(a) for name, a in layer.parameters.items()}
    same(lane.forward(x, None, params), layer._run(np.ascontiguousarray(x), None)[:2])


def test_lane_sees_weights_change():
    layer = fusedrnn.GRU(I, H, seed=1)
    lane = core.Lane("gru")
    x = np.ones((2, 3, I), np.float32)
    first = lane.forward(x, None, layer.parameters)[0]
    layer.parameters["weight_hh_l0"] *= 2
    second = lane.forward(x, None, layer.parameters)[0]
    assert (first != second).any()
    layer.parameters["weight_hh_l0"] = layer.parameters["weight_hh_l0"] / 2
    np.testing.assert_array_equal(lane.forward(x, None, layer.parameters)[0], first)


@pytest.mark.parametrize("cell", LANES)
@pytest.mark.parametrize("batched", [True, False])
def test_lane_step_is_the_long_way(cell, batched):
    layer = layer_of(cell, num_layers=2, seed=1, backend="native").eval()
    lane = core.Lane(cell, 2)
    x = np.random.default_rng(2).standard_normal((9, 4, I) if batched else (9, I)).astype(np.float32)
    expected = layer(x)
    state, ys = None, []
    for x_t in x:
        y, state = lane.step(x_t, state, layer.parameters)
        ys.append(y.copy())
    for a, b in zip(flat((np.stack(ys), state)), flat(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_lane_step_keeps_its_arrays():
    layer, lane = fusedrnn.LSTM(I, H, num_layers=2, seed=1), core.Lane("lstm", 2)
    x = np.ones((3, I), np.float32)
    seen = set()
    state = None
    for _ in range(10):
        y, state = lane.step(x, state, layer.parameters)
        seen.add(tuple(a.ctypes.data for a in (y, *state)))
    assert len(seen) == 2  # two sets of arrays in turn
    blocks = sys.getallocatedblocks()
    for _ in range(1000):
        y, state = lane.step(x, state, layer.parameters)
    assert abs(sys.getallocatedblocks() - blocks) < 50
    # feeding y back in as x must not overwrite what is read
    feed = core.Lane("gru")
    gru = fusedrnn.GRU(H, H, seed=1)
    y, h = feed.step(np.ones((3, H), np.float32), None, gru.parameters)
    expected = gru(y[None].copy(), h.copy())[0][0]
    np.testing.assert_allclose(feed.step(y, h, gru.parameters)[0], expected, atol=1e-6)


def test_lane_step_changes_batch_and_dtype():
    lane = core.Lane("gru")
    layer = fusedrnn.GRU(I, H, seed=1)
    wide = {name: a.astype(np.float64) for name, a in layer.parameters.items()}
    old = lane.step(np.ones((3, I), np.float32), None, layer.parameters)
    copy = [a.copy() for a in old]
    assert lane.step(np.ones((5, I), np.float32), None, layer.parameters)[0].shape == (5, H)
    assert lane.step(np.ones(I, np.float32), None, layer.parameters)[0].shape == (H,)
    assert lane.step(np.ones((3, I)), None, wide)[0].dtype == np.float64
    del lane
    gc.collect()
    for a, b in zip(old, copy, strict=True):  # what was handed out stays alive
        np.testing.assert_array_equal(a, b)


def test_lane_declines_what_is_not_plain():
    layer, lane = fusedrnn.LSTM(I, H, seed=1), core.Lane("lstm")
    p = layer.parameters
    x = np.ones((2, 3, I), np.float32)
    h = np.zeros((1, 3, H), np.float32)
    assert lane.forward(x, (h, h), p) is not None

    class Sub(np.ndarray):
        pass

    for bad in (
        (x.astype(np.float64), None, p),
        (x.astype(int), None, p),
        (x.tolist(), None, p),
        (None, None, p),
        (x[..., 1:], None, p),
        (x[0, 0], None, p),
        (x[:0], None, p),
        (x[:, :0], None, p),
        (x[None], None, p),
        (x.view(Sub), None, p),
        (x.astype(">f4"), None, p),
        (misaligned(x), None, p),
        (x, h, p),
        (x, (h,), p),
        (x, (h, None), p),
        (x, (h, h[:, :2]), p),
        (x, (h, h.astype(np.float64)), p),
        (x, None, {}),
        (x, None, None),
        (x, None, list(p.values())[:3]),
        (x, None, dict(p, weight_hh_l0=p["weight_hh_l0"][1:])),
        (x, None, dict(p, weight_ih_l0=p["weight_ih_l0"][None])),
        (x, None, dict(p, bias_hh_l0=p["bias_hh_l0"].astype(np.float64))),
    ):
        assert lane.forward(*bad) is None
        if isinstance(bad[0], np.ndarray) and bad[0].ndim == 3:
            assert lane.step(bad[0][0] if len(bad[0]) else x[0][:0], *bad[1:]) is None
    assert core.Lane("lstm", 1, 2).step(x[0], None, p) is None
    with pytest.raises(TypeError, match="exactly 3 arguments"):
        lane.forward(x)
    with pytest.raises(ValueError, match="expected a cell"):
        core.Lane("lstn")
    with pytest.raises(ValueError, match="num_layers"):
        core.Lane("lstm", 0)


def test_lane_leaks_nothing():
    layer, lane = fusedrnn.LSTM(I, H, num_layers=2, seed=1), core.Lane("lstm", 2)
    x = np.ones((2, 3, I), np.float32)
    arrays = [x, *layer.parameters.values()]
    before = [sys.getrefcount(a) for a in arrays]
    for _ in range(100):
        _, state = lane.forward(x, None, layer.parameters)
        lane.forward(x, state, layer.parameters)
        lane.step(x[0], state, layer.parameters)
        core.Lane("gru", 3)
        lane.forward(x.astype(int), None, layer.parameters)
    assert [sys.getrefcount(a) for a in arrays] == before


def test_checked_route_leaks_nothing():
    case = Case()
    case.all()
    before = [sys.getrefcount(a) for a in case.written()]
    for _ in range(20):
        case.all()
    assert [sys.getrefcount(a) for a in case.written()] == before


# ---- instruction sets, clipping ------------------------------------------------------------------------------------


def test_instruction_sets_can_be_switched():
    assert set(core.isas_found) <= set(core.isas_built) and core.isas_built[0] == "baseline"
    before = core.isa()
    results = []
    try:
        for name in core.isas_found:
            core.set_isa(name)
            assert core.isa() == name
            case = Case()
            case.all()
            results.append(case.written())
    finally:
        core.set_isa(before)
    for other in results[1:]:
        for a, b in zip(results[0][1:], other[1:], strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)
    with pytest.raises(ValueError, match="set_isa: name is 'sse9'; expected one of baseline"):
        core.set_isa("sse9")
    assert core.isa() == before


def test_environment_chooses_the_instruction_set():
    for name in core.isas_found:
        code = "import fusedrnn._core as c; print(c.isa())"
        out = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "FUSEDRNN_ISA": name}, capture_output=True, text=True
        )
        assert out.stdout.strip() == name, out.stderr


def test_clipping_takes_any_layout():
    rng = np.random.default_rng(0)
    base = rng.standard_normal((6, 40, 50))
    views = [
        base[0].T,
        base[1, ::2],
        base[2, ::-1, 3:7],
        base[3][:, ::-3],
        base[4:6].transpose(2, 0, 1),
        base[0, 0, :0],
    ]
    views += [rng.standard_normal(7).astype(np.float32), np.array(3.0)]
    for norm_type in (1.0, 2.0, math.inf):
        expected = np.linalg.norm(np.concatenate([v.ravel().astype(np.float64) for v in views]), norm_type)
        assert core.global_norm(views, norm_type) == pytest.approx(expected, rel=1e-12)
    copies = [v.copy() for v in views]
    core.scale_(views, 0.5)
    for view, copy in zip(views, copies, strict=True):
        np.testing.assert_array_equal(view, copy * view.dtype.type(0.5))
    core.clip_value_(views, 0.25)
    for view, copy in zip(views, copies, strict=True):
        np.testing.assert_array_equal(view, np.clip(copy * view.dtype.type(0.5), -0.25, 0.25))


def test_clipping_refuses():
    with pytest.raises(ValueError, match="norm_type is 3"):
        core.global_norm([np.ones(3)], 3.0)
    with pytest.raises(TypeError, match=r"arrays\[1\] has dtype int64"):
        core.global_norm([np.ones(3), np.ones(3, int)])
    with pytest.raises(TypeError, match=r"arrays\[0\] is a list"):
        core.scale_([[1.0]], 0.5)
    with pytest.raises(ValueError, match=r"arrays\[0\] is read-only"):
        core.scale_([read_only(np.ones(3))], 0.5)
    with pytest.raises(ValueError, match="share memory"):
        core.clip_value_([folded(np.ones((2, 2)))], 0.5)
    with pytest.raises(ValueError, match="limit is -1"):
        core.clip_value_([np.ones(3)], -1.0)
    assert core.global_norm([]) == 0.0
