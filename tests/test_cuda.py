# SPDX-License-Identifier: Apache-2.0
"""The whole way of arrays on a CUDA device, from fusedrnn's functions to the kernels: the device is the CPU twin, and
a GPU where there is one, the arrays are cuda_twin.Chip."""

from __future__ import annotations

import logging
import random
import sys
from typing import Any

import numpy as np
import pytest

import close
import fusedrnn
from cuda_twin import Chip, chip, host, kinds
from fusedrnn import backends, tbptt
from fusedrnn import params as parameters
from fusedrnn.cells import CELLS
from shapes import OPS

BUDGETS = {"float64": 1e-12, "float32": 5e-6, "3xtf32": 5e-6, "tf32": 2e-2, "float16": 2e-2}


class Case:
    """A random call of the front door: NumPy arrays, and options."""

    def __init__(self, cell: str, dtype: str, seed: int) -> None:
        pick, self.numbers = random.Random(seed), np.random.default_rng(seed)
        self.cell, self.dtype = cell, np.dtype("float32" if "tf32" in dtype else dtype)
        exact = BUDGETS[dtype] < 1e-5
        T, B, I = pick.choice([1, 4, 6]), pick.choice([1, 3, 9]), pick.choice([1, 5, 8])  # noqa: E741
        H, L, D = pick.choice([1, 7, 16, 21]), pick.choice([1, 1, 2]), pick.choice([1, 1, 2])
        E = pick.choice([0, 0, 0, 2])  # 0: no axis
        self.unbatched, batch_first = pick.random() < 0.15, pick.random() < 0.4
        bias, state, has_c = pick.random() < 0.7, pick.random() < 0.6, CELLS[cell].cell_state
        if self.unbatched:
            B = 1

        def lie(axes: str, sets: int = E) -> tuple[int, ...]:  # as the user has it
            sizes = {"T": T, "E": E, "B": B, "I": I, "H": H, "S": L * D}
            axes = axes.replace("TEB", "EBT") if batch_first else axes
            return tuple(sizes[a] for a in axes if not (a == "E" and not sets) and not (a == "B" and self.unbatched))

        self.x = self.draw(*lie("TEBI", E * pick.choice([0, 1])))  # shared by all sets, or one for each
        weights = parameters.init(cell, I, H, L, D == 2, bias, self.dtype, seed)
        self.params = {
            name: np.stack([w * (1 - 0.2 * e) for e in range(E)]).astype(w.dtype) if E else w
            for name, w in weights.items()
        }
        states = [self.draw(*lie("SEBH")) for _ in range(1 + has_c)]
        self.state = (tuple(states) if has_c else states[0]) if state else None
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
        if has_c and exact:
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


@pytest.mark.parametrize("cell, dtype, route", kinds(BUDGETS))
def test_front_door(twin: Any, twin_extension: Any, cell: str, dtype: str, route: str) -> None:
    twin.set_route(route)
    twin.set_float32(dtype if "tf32" in dtype else "strict")
    for seed in range(4):
        case = Case(cell, dtype, seed)
        twin_extension.schedule(seed)
        got = case.run(chip, lambda a: a)
        assert (twin.last_route(), twin.last_route(backward=True)) == (route, route)
        expected = case.run(lambda a: a, lambda a: a.astype(np.float64), backend="reference")
        compare(f"{cell} {dtype} {route} seed {seed} forward", got[0], expected[0], BUDGETS[dtype])
        compare(f"{cell} {dtype} {route} seed {seed} backward", got[1], expected[1], 4 * BUDGETS[dtype])


# ---- what is not arithmetic


def lstm_case(dtype: Any = np.float64, T: int = 5, B: int = 3, I: int = 4, H: int = 6, L: int = 1) -> Any:  # noqa: E741
    x = np.random.default_rng(0).standard_normal((T, B, I)).astype(dtype)
    return x, parameters.init("lstm", I, H, L, dtype=dtype, seed=1)


def test_dropout_mask_is_the_same_as_on_the_cpu(twin):
    x, params = lstm_case(L=3, T=7)
    options: dict[str, Any] = {"num_layers": 3, "dropout": 0.5, "seed": 2**63 + 11, "training": True}
    y, _, tape = fusedrnn.lstm(chip(x), None, chip(params), **options)
    expected, _, on_cpu = fusedrnn.lstm(x, None, params, **options)
    close.check("y", host(y), expected, 1e-12)
    dx = fusedrnn.lstm_backward(tape, chip(expected))["x"]
    close.check("dx", host(dx), fusedrnn.lstm_backward(on_cpu, expected)["x"], 1e-12)


@pytest.mark.parametrize("T, B", [(0, 3), (3, 0)])
def test_nothing_to_do(twin, T, B):
    x, params = lstm_case(T=T, B=B)
    state = (np.ones((1, B, 6)), np.full((1, B, 6), 2.0))
    y, (h, c), tape = fusedrnn.lstm(chip(x), chip(state), chip(params), training=True)
    assert host(y).shape == (T, B, 6)
    assert np.array_equal(host(h), state[0]) and np.array_equal(host(c), state[1])
    grads = host(fusedrnn.lstm_backward(tape, None, chip(state)))
    assert np.array_equal(grads["state"][0], state[0])
    assert not grads["weight_hh_l0"].any() and grads["weight_ih_l0"].shape == (24, 4)


@pytest.mark.parametrize("call", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("tokens", [False, True])
def test_recompute(twin, call, tokens):
    """Three parts of the walk, of another length at the end; with all that layer 0 can see."""
    numbers, (T, B, D, V, K) = np.random.default_rng(3), (131, 2, 2, 5, 3)
    x = numbers.integers(0, V, (T, B)).astype(np.int32) if tokens else numbers.standard_normal((T, B, V))
    cell = "rnn_tanh" if call == "rnn" else call
    params = parameters.init(cell, V, 6, 2, bidirectional=True, context_size=K, dtype=np.float64, seed=1)
    dy, lengths, reset = numbers.standard_normal((T, B, 12)), np.array([131, 70]), numbers.random((T, B)) < 0.05
    options: dict[str, Any] = {"num_layers": 2, "bidirectional": True, "dropout": 0.4, "seed": 5, "training": True}
    options |= {"lengths": lengths, "reset": reset, "reset_to": "initial", "clip_grad": 0.7}
    context, state = numbers.standard_normal((B, K)), numbers.standard_normal((2 * D, B, 6))
    run, back = getattr(fusedrnn, call), getattr(fusedrnn, call + "_backward")
    given = (state, state / 2) if call == "lstm" else state
    y, last, tape = run(x, given, params, context=context, **options)
    expected = back(tape, dy, last)
    there, got_last, kept = run(chip(x), chip(given), chip(params), context=chip(context), recompute=True, **options)
    close.check("y", host(there), y, 1e-10)
    got = host(back(kept, chip(dy), got_last))
    for name, a, b in zip(expected, flat(got), flat(expected), strict=False):
        close.check(name, a, b, 1e-9)
    assert kept.nbytes <= 2 * T * B * 2 * 8 * 8 * (1.1 if call == "lstm" else 1) + 1024


def test_lengths_and_resets_on_the_device(twin):
    x, params = lstm_case()
    lengths, reset = np.array([5, 0, 2]), np.random.default_rng(1).random((5, 3)) < 0.4
    here = fusedrnn.lstm(chip(x), None, chip(params), lengths=lengths, reset=reset)[0]
    there = fusedrnn.lstm(chip(x), None, chip(params), lengths=chip(lengths), reset=chip(reset))[0]
    assert np.array_equal(host(here), host(there))
    close.check("y", host(here), fusedrnn.lstm(x, None, params, lengths=lengths, reset=reset)[0], 1e-12)
    wild = fusedrnn.lstm(chip(x), None, chip(params), lengths=chip(np.array([99, -3, 2])))[0]  # nobody has looked
    expected = fusedrnn.lstm(x, None, params, lengths=np.array([5, 0, 2]))[0]
    close.check("clamped", host(wild), expected, 1e-12)


def test_strides_of_any_kind(twin):
    x, params = lstm_case()
    big = np.zeros((5, 6, 8))
    big[:, ::2, ::-2] = x
    odd = Chip(big)[:, ::2, ::-2]
    turned = {name: Chip(np.asfortranarray(a)) for name, a in params.items()}
    y, _, tape = fusedrnn.lstm(odd, None, turned, training=True)
    expected, _, on_cpu = fusedrnn.lstm(x, None, params, training=True)
    close.check("y", host(y), expected, 1e-12)
    got, wanted = fusedrnn.lstm_backward(tape, y), fusedrnn.lstm_backward(on_cpu, expected)
    for name in params:
        close.check(name, host(got[name]), wanted[name], 1e-11)


@pytest.mark.parametrize("layer_type", [fusedrnn.LSTM, fusedrnn.GRU, fusedrnn.RNN])
def test_layers(twin, layer_type):
    x = np.random.default_rng(0).standard_normal((6, 3, 4)).astype(np.float32)
    layer = layer_type(4, 5, num_layers=2, dropout=0.5, seed=3)
    twice = layer_type(4, 5, num_layers=2, dropout=0.5, seed=3).to(chip)
    y, got = layer(x)[0], twice(chip(x))[0]
    close.check("y", host(got), y, 1e-5)
    grads, on_device = layer.backward(y), twice.backward(got)
    for name in layer.parameters:
        close.check(name, host(on_device[name]), grads[name], 1e-5)
    layer.eval(), twice.eval()
    close.check("eval", host(twice(chip(x))[0]), layer(x)[0], 1e-5)
    state = expected = None
    for x_t in x[:2]:
        y_t, expected = layer.step(x_t, expected)
        got, state = twice.step(chip(x_t), state)
        close.check("step", host(got), y_t, 1e-5)
    assert isinstance(twice.state_dict()["weight_ih_l0"], Chip)
    back = twice.to(host)
    close.check("back", back(x)[0], layer(x)[0], 1e-6)


@pytest.mark.parametrize("k1, k2", [(4, 4), (3, 5), (6, 2)])
def test_tbptt(twin, k1, k2):
    x = np.random.default_rng(0).standard_normal((11, 2, 3))
    layer = fusedrnn.GRU(3, 4, dtype=np.float64, seed=0)
    there = fusedrnn.GRU(3, 4, dtype=np.float64, seed=0).to(chip)
    walks = zip(tbptt.chunks(layer, x, k1=k1, k2=k2), tbptt.chunks(there, chip(x), k1=k1, k2=k2), strict=True)
    for chunk, on_device in walks:
        assert (chunk.start, chunk.stop, chunk.update) == (on_device.start, on_device.stop, on_device.update)
        close.check("y", host(on_device.y), chunk.y, 1e-12)
        got, expected = on_device.backward(on_device.y), chunk.backward(chunk.y)
        for name in expected:
            close.check(name, host(got[name]), expected[name], 1e-11)


GRADS = {
    "weights": np.random.default_rng(0).standard_normal((70, 300)),
    "half": np.random.default_rng(1).standard_normal((5, 3)).astype(np.float16),
    "single": np.random.default_rng(2).standard_normal(9001).astype(np.float32),
    "many": [np.full(3, float(n)) for n in range(130)],
    "none": None,
    "empty": np.zeros((0, 4)),
}


@pytest.mark.parametrize("norm_type", [1, 2, np.inf])
def test_clip_norm(twin, norm_type):
    on_host = {k: v for k, v in GRADS.items() if k != "half"} | {"half": GRADS["half"].astype(np.float64)}
    on_host = {
        k: [a.copy() for a in v] if isinstance(v, list) else None if v is None else v.copy() for k, v in on_host.items()
    }
    on_device = chip(GRADS)
    norm = fusedrnn.clip.clip_grad_norm_(on_device, 2.0, norm_type)
    expected = fusedrnn.clip.clip_grad_norm_(on_host, 2.0, norm_type)
    assert isinstance(norm, Chip) and host(norm).shape == ()
    close.check("norm", host(norm), expected, 1e-13 * expected)
    for name, budget in (("weights", 1e-14), ("single", 1e-7), ("half", 1e-3), ("many", 1e-14)):
        for a, b in zip(flat(on_device[name]), flat(on_host[name]), strict=True):
            close.check(name, host(a).astype(np.float64), b, budget)


def test_clip_in_other_ways(twin):
    before = np.random.default_rng(0).standard_normal((4, 6))
    strided = Chip(before.copy())[::2, ::-3]
    fusedrnn.clip.clip_grad_value_([strided], 0.25)
    clamped = before.copy()
    clamped[::2, ::-3] = np.clip(before[::2, ::-3], -0.25, 0.25)
    assert np.array_equal(host(strided), clamped[::2, ::-3])
    grads = chip({"a": np.array([3.0, 4.0]), "b": np.array([0.5])})
    norms = fusedrnn.clip.clip_each_norm_(grads, 1.0)
    assert (float(host(norms["a"])), float(host(norms["b"]))) == (5.0, 0.5)
    close.check("a", host(grads["a"]), np.array([0.6, 0.8]), 1e-6)
    assert float(host(grads["b"])[0]) == 0.5  # its norm is below the limit: untouched
    bad = chip([np.array([1.0, np.nan])])
    fusedrnn.clip.clip_grad_value_(bad, 0.5)
    assert host(bad[0])[0] == 0.5 and np.isnan(host(bad[0])[1])
    with pytest.raises(FloatingPointError, match="all gradients together is nan"):
        fusedrnn.clip.clip_grad_norm_(bad, 1.0, error_if_nonfinite=True)
    assert host(bad[0])[0] == 0.5
    fusedrnn.clip.clip_grad_norm_(bad, 1.0)
    assert np.isnan(host(bad[0])).all()  # as torch.nn.utils
    with pytest.raises(TypeError, match="some of grads are on a CUDA device"):
        fusedrnn.clip.clip_grad_norm_([np.ones(2), Chip(np.ones(2))], 1.0)
    with pytest.raises(ValueError, match="norm_type is 3"):
        fusedrnn.clip.clip_grad_norm_(Chip(np.ones(2)), 1.0, 3)


def test_routes_can_be_asked_forced_and_read_in_the_log(twin, caplog):
    x, params = lstm_case(np.float64)
    with caplog.at_level(logging.DEBUG, "fusedrnn"):
        fusedrnn.lstm(chip(x), None, chip(params))
    assert twin.last_route() == "stepwise"  # float64 has no other
    assert "lstm forward float64 T=5 E=1 B=3 I=4 H=6 L=1 D=1 took route stepwise" in caplog.text
    x, params = lstm_case(np.float16)
    _, _, tape = fusedrnn.lstm(chip(x), None, chip(params), training=True)
    assert twin.last_route() != "stepwise"  # the cost model's choice
    twin.set_route("grid")
    fusedrnn.lstm_backward(tape, chip(np.zeros((5, 3, 6), np.float16)))
    assert twin.last_route(backward=True) == "grid"
    with pytest.raises(ValueError, match="route is 'warp'; expected one of single, cluster"):
        twin.set_route("warp")
    with pytest.raises(ValueError, match="float32 is 'fast'"):
        twin.set_float32("fast")


@pytest.mark.parametrize("compute", [75, 80, 90])
@pytest.mark.parametrize("precision", ["half", "strict", "tf32", "3xtf32"])
def test_what_each_generation_of_gpus_runs(twin, twin_extension, compute, precision):
    """Turing multiplies float16 only, clusters came with Hopper; a route that is not there gives way to stepwise."""
    twin_extension.pretend(compute=compute)
    x, params = lstm_case(np.float16 if precision == "half" else np.float32)
    if precision != "half":
        twin.set_float32(precision)
    for route in ("single", "cluster", "grid"):
        twin.set_route(route)
        _, _, tape = fusedrnn.lstm(chip(x), None, chip(params), training=True)
        fusedrnn.lstm_backward(tape, chip(np.zeros((5, 3, 6), x.dtype)))
        oldest = 90 if route == "cluster" else 75 if precision == "half" else 80
        expected = route if compute >= oldest else "stepwise"
        assert (twin.last_route(), twin.last_route(backward=True)) == (expected, expected)


def test_errors_come_before_anything_is_written(twin, twin_extension):
    x, params = lstm_case()
    there = chip(params)
    with pytest.raises(TypeError, match="weight_ih_l0 is a NumPy float64 array .* expected an array on a CUDA device"):
        fusedrnn.lstm(chip(x), None, params)
    with pytest.raises(TypeError, match="weight_ih_l0 is a cuda_twin.Chip; expected a NumPy array"):
        fusedrnn.lstm(x, None, there)
    with pytest.raises(ValueError, match="weight_hh_l0 is on stream 7; expected 0, the stream of x"):
        fusedrnn.lstm(chip(x), None, there | {"weight_hh_l0": Chip(params["weight_hh_l0"], stream=7)})
    with pytest.raises(ValueError, match="backend is 'native' for arrays on a CUDA device"):
        fusedrnn.lstm(chip(x), None, there, backend="native")
    with pytest.raises(TypeError, match="lengths has dtype int32; expected int64"):
        fusedrnn.lstm(chip(x), None, there, lengths=Chip(np.ones(3, np.int32)))
    with pytest.raises(TypeError, match="x has dtype complex128; expected float16, bfloat16, float32 or float64"):
        fusedrnn.lstm(Chip(np.ones((5, 3, 4), complex)), None, there)
    with pytest.raises(TypeError, match="x has dtype int64; expected float32 or float64, or two axes"):
        fusedrnn.lstm(Chip(np.ones((5, 3, 4), np.int64)), None, there)
    with pytest.raises(ValueError, match=r"weight_hh_l0 has shape \(24, 5\); expected \(24, 6\)"):
        fusedrnn.lstm(chip(x), chip((np.zeros((1, 3, 6)),) * 2), there | {"weight_hh_l0": Chip(np.ones((24, 5)))})
    _, _, tape = fusedrnn.lstm(chip(x), None, there, training=True)
    with pytest.raises(TypeError, match="dy is a NumPy float64 array"):
        fusedrnn.lstm_backward(tape, np.zeros((5, 3, 6)))

    twin_extension.pretend(broken="launch of a kernel: no kernel image")
    with pytest.raises(twin.CudaError, match="launch of a kernel: no kernel image"):
        fusedrnn.lstm(chip(x), None, there)
    twin_extension.pretend(late=True)
    with pytest.raises(twin.CudaError, match="gave up waiting"):
        fusedrnn.lstm(chip(x), None, there)
    fusedrnn.lstm(chip(x), None, there)  # told once
    twin_extension.pretend(compute=0)
    with pytest.raises(twin.CudaError, match="no CUDA device"):
        fusedrnn.lstm(chip(x), None, there)


class Stranger:
    """An array of a library that nobody knows."""

    __cuda_array_interface__ = Chip(np.ones((5, 3, 4))).__cuda_array_interface__


Stranger.__module__ = "strange.arrays"


def test_library_that_makes_no_arrays(twin, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    params = lstm_case()[1]
    with pytest.raises(
        TypeError, match=r"strange.Stranger on a CUDA device; expected one of cuda_twin, cupy, numba, torch: nothing"
    ):
        fusedrnn.lstm(Stranger(), None, chip(params))


def test_bindings_check_what_they_get(twin, twin_extension):
    from fusedrnn.arrays import device_array
    from fusedrnn.backends import Arguments, Problem, Results

    x, params = device_array(Chip(np.ones((2, 1, 3, 4)))), [Chip(np.ones(n)) for n in ((1, 24, 4), (1, 24, 6))]
    weights = (*map(device_array, params), None, None)

    def make(problem: Problem, p: Arguments, **options: Any) -> Any:
        return twin_extension.Forward(problem, p, Results(), True, -1, False, **options)

    good = Problem("lstm", 2, 1, 3, 4, 6)
    assert make(good, Arguments(x, None, None, [weights])).tape_bytes > 0
    with pytest.raises(ValueError, match=r"x has shape \(2, 1, 3, 4\); expected \(2, 1, 3, 5\)"):
        make(Problem("lstm", 2, 1, 3, 5, 6), Arguments(x, None, None, [weights]))
    with pytest.raises(TypeError, match=r"params\[0\].R has dtype float32; expected float64"):
        bad = device_array(Chip(np.ones((1, 24, 6), np.float32)))
        make(good, Arguments(x, None, None, [(weights[0], bad, None, None)]))
    with pytest.raises(ValueError, match="params lack W or R"):
        make(good, Arguments(x, None, None, [(weights[0], None, None, None)]))
    with pytest.raises(ValueError, match="too large"):
        make(Problem("lstm", 2**20, 1, 2**20, 4, 6), Arguments(x, None, None, [weights]))
    with pytest.raises(ValueError, match="cell is 'wheel'"):
        make(Problem("wheel", 2, 1, 3, 4, 6), Arguments(x, None, None, [weights]))


def test_report(twin, twin_extension):
    twin_extension.pretend(compute=90)
    report = fusedrnn.info()
    assert report["CUDA kernels for"] == ["twin"]
    assert report["CUDA devices"] == ["CPU twin (9.0, 7 multiprocessors, 1 GiB)"]
    twin_extension.pretend(compute=0)
    assert "twin was told so" in fusedrnn.info()["CUDA devices"]


def test_build_without_cuda(monkeypatch):
    native = backends.load("native")
    if native is None or native.cuda is not None:
        pytest.skip("this build has CUDA kernels, or no extension")
    x, params = lstm_case()
    with pytest.raises(
        ImportError, match="x is on a CUDA device, and this build has no CUDA kernels.*FUSEDRNN_CUDA=ON"
    ):
        fusedrnn.lstm(Chip(x), None, chip(params))
    assert "FUSEDRNN_CUDA=ON" in fusedrnn.info()["no CUDA"]
