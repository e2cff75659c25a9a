# SPDX-License-Identifier: Apache-2.0
"""Every backend against the reference, over all cells, options, sizes and memory layouts; and which backend runs."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import close
import fusedrnn
import shapes
from fusedrnn import backends, config
from fusedrnn.backends import Arguments, Results, reference
from fusedrnn.cells import CELLS
from shapes import ALL_CELLS, CASES, Case, build, empty_arguments, empty_results, expected, named

DTYPES = ["float32", "float64"]


def run(route: Any, case: Case, dtype: str) -> dict[str, dict[str, np.ndarray]]:
    """Forward and backward on a route, into poisoned arrays."""
    data = build(case, dtype)
    out, dp = empty_results(data.problem, dtype), empty_arguments(data, dtype)
    tape = np.full(route.tape_elements(data.problem), np.nan, dtype)
    route.forward(data.problem, data.p, out, tape)
    route.backward(data.problem, data.p, tape, data.g, dp)
    return {"forward": named(out), "backward": named(dp)}


def compare(route: Any, case: Case, dtype: str) -> None:
    got = run(route, case, dtype)
    for operation, values in got.items():
        close.check_all(str(case), values, expected(case, dtype)[operation], dtype, operation)
    data = build(case, dtype)
    out = empty_results(data.problem, dtype)
    route.forward(data.problem, data.p, out, None)  # inference takes other ways than training
    close.check_all(f"no tape: {case}", named(out), expected(case, dtype)["forward"], dtype, "forward")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_backward(judged, case, dtype):
    compare(judged, case, dtype)


@st.composite
def cases(draw: Any) -> Case:
    """Any case, with every option on or off."""
    D = draw(st.sampled_from([1, 1, 2]))
    cell = draw(st.sampled_from(ALL_CELLS))
    return Case(
        cell=cell,
        T=draw(st.integers(0, 12)),
        E=draw(st.sampled_from([1, 1, 2, 3])),
        B=draw(st.one_of(st.integers(0, 3), st.integers(4, 20))),
        I=draw(st.integers(1, 20)),
        H=draw(st.one_of(st.integers(1, 20), st.integers(20, 70))),
        L=draw(st.sampled_from([1, 1, 2, 3])),
        D=D,
        bias=draw(st.booleans()),
        state=draw(st.booleans()),
        lengths=draw(st.sampled_from(["", "any", "zero"])),
        reset=draw(st.sampled_from([0, 0.3, 0.9])),
        to_initial=draw(st.booleans()),
        reverse=D == 1 and draw(st.booleans()),
        recompute=draw(st.booleans()),
        clip_cell=draw(st.sampled_from([0, 0.3])) if CELLS[cell].cell_state else 0.0,
        clip_grad=draw(st.sampled_from([0, 0.3])),
        dropout=draw(st.sampled_from([0, 0.5])),
        layout=draw(st.sampled_from(["plain", "strided", "negative", "column", "batch", "shared", "broadcast"])),
        missing=draw(st.sampled_from([(), ("y",), ("hn", "cn"), ("cells",)])),
        seed=draw(st.integers(0, 3)),
    )


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases(), dtype=st.sampled_from(DTYPES))
def test_any_case(judged, case, dtype):
    compare(judged, case, dtype)


@pytest.mark.parametrize("cell", ALL_CELLS)
@pytest.mark.parametrize("recompute", [False, True])
def test_only_what_is_wanted(route, cell, recompute):
    """Outputs that are None are skipped, and the others do not change."""
    case = Case(cell=cell, L=2, D=2, recompute=recompute)
    data = build(case, np.float64)
    tape = np.full(route.tape_elements(data.problem), np.nan)
    want = expected(case, "float64")
    route.forward(data.problem, data.p, Results(), tape)
    for n, name in enumerate(want["forward"]):
        out = empty_results(data.problem, np.float64)
        only = Results(**{name: getattr(out, name)})
        route.forward(data.problem, data.p, only, tape if n % 2 else None)
        close.check_all(str(case), named(only), {name: want["forward"][name]}, "float64", "forward")
    whole = empty_arguments(data, np.float64)
    nothing: Any = [(None,) * 4 for _ in data.p.params]
    for name in ("x", "h0", "c0"):
        if getattr(whole, name) is not None:
            only_one = Arguments(params=list(nothing), **{name: getattr(whole, name)})
            route.backward(data.problem, data.p, tape, data.g, only_one)
    for n in range(len(nothing)):
        for k in range(4):
            one = list(nothing)
            one[n] = tuple(a if i == k else None for i, a in enumerate(whole.params[n]))
            route.backward(data.problem, data.p, tape, data.g, Arguments(params=one))
    close.check_all(str(case), named(whole), want["backward"], "float64", "backward")


@pytest.mark.parametrize("cell", ALL_CELLS)
def test_same_bits_again(route, cell):
    case = Case(cell=cell, T=9, B=7, H=19, L=2, D=2, reset=0.2, lengths="any")
    first, second = run(route, case, "float32"), run(route, case, "float32")
    for operation in first:
        for name, array in first[operation].items():
            np.testing.assert_array_equal(array, second[operation][name], err_msg=name)


@pytest.mark.parametrize("cell", ALL_CELLS)
@pytest.mark.parametrize("B", [1, 16])
def test_tape_is_small(route, cell, B):
    problem = build(Case(cell=cell, T=32, B=B, H=16), np.float32).problem
    unit = problem.T * B * problem.H
    whole = route.tape_elements(problem)
    assert whole <= (CELLS[cell].gates + 2) * unit
    problem.recompute = True
    assert route.tape_elements(problem) <= max(whole / 2, 1.5 * unit if CELLS[cell].kept == 0 else 0)


@pytest.mark.parametrize("cell", ALL_CELLS)
@pytest.mark.parametrize("case", [Case(T=5, B=4, H=5), Case(T=5, B=1, H=17), Case(T=5, B=17, H=16)], ids=str)
def test_nan_flows_and_stays_in_its_row(route, cell, case):
    case = replace(case, cell=cell)
    data = build(case, np.float64)
    data.p.x[2, 0, 0, 0] = np.nan
    got, want = empty_results(data.problem, np.float64), empty_results(data.problem, np.float64)
    reference.forward(data.problem, data.p, want, None)
    tape = np.empty(route.tape_elements(data.problem))
    route.forward(data.problem, data.p, got, tape)
    assert np.isnan(got.y[2:, 0, 0]).all()
    close.check_all(str(case), named(got), named(want), "float64", "forward")
    dp, dwant = empty_arguments(data, np.float64, 0.0), empty_arguments(data, np.float64, 0.0)
    route.backward(data.problem, data.p, tape, data.g, dp)
    reference.backward(data.problem, data.p, None, data.g, dwant)
    assert np.isnan(dp.params[0][0]).any()
    close.check("x of the other rows", dp.x[:, 0, 1:], dwant.x[:, 0, 1:], 1e-13)


@pytest.mark.parametrize("cell", ALL_CELLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B", [1, 8])
def test_large_inputs_saturate(route, cell, dtype, B):
    """Gates at their ends, where a careless exp overflows."""
    data = build(Case(cell=cell, T=3, B=B, H=16), dtype)
    data.p.x[...] *= 1e4
    got, want = empty_results(data.problem, dtype), empty_results(data.problem, np.float64)
    tape = np.empty(route.tape_elements(data.problem), dtype)
    route.forward(data.problem, data.p, got, tape)
    reference.forward(data.problem, data.p, want, None)
    close.check_all(cell, named(got), named(want), dtype, "forward")
    dp, dwant = empty_arguments(data, dtype), empty_arguments(data, np.float64)
    route.backward(data.problem, data.p, tape, data.g, dp)
    reference.backward(data.problem, data.p, None, data.g, dwant)
    # a sum of 1e4 has a rounding error that a gate near its middle multiplies
    for name, array in named(dp).items():
        close.check(name, array, named(dwant)[name], 2e-2 if dtype == "float32" else 1e-10)


@pytest.mark.parametrize("cell", ALL_CELLS)
def test_many_steps_and_rows(route, cell):
    """Sizes at which engines cut time and rows into pieces, at the cost of little arithmetic."""
    for case in (Case(T=1500, B=2, I=1, H=3), Case(T=2, B=700, I=2, H=3), Case(T=2, B=2, I=700, H=3)):
        compare(route, replace(case, cell=cell, lengths="any"), "float64")


@pytest.mark.parametrize("cell", ALL_CELLS)
@pytest.mark.parametrize("B", [1, 6])
def test_wide_layers(route, cell, B):
    compare(route, Case(cell=cell, T=2, B=B, I=300, H=259), "float32")


@pytest.mark.parametrize("H", [1, 7, 16, 83])
@pytest.mark.parametrize("border", [False, True])
def test_dropout_masks_are_the_same_everywhere(route, H, border):
    """A relu layer of identity weights passes the mask through. border: p * 2^32 is no whole number, and the first word
    drawn is the last that lies below it."""
    T, B, p, seed = 7, 5, 0.3, 987654321987654321
    if border:
        key = (np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32))
        zero = np.uint64(0)
        p = (int(fusedrnn.cells.dropout.philox(zero, zero, zero, zero, *key)[0]) + 0.5) / 2**32
        assert fusedrnn.cells.dropout.drawn((1,), p, seed, 0)[0]
    problem = backends.Problem("rnn_relu", T, 1, B, H, H, 2, dropout=p, seed=seed)
    eye, zero = np.eye(H, dtype=np.float32)[None], np.zeros((1, H, H), np.float32)
    x = np.ones((T, 1, B, H), np.float32)
    y = np.empty_like(x)
    arguments = Arguments(x, params=[(eye, zero, None, None)] * 2)
    route.forward(problem, arguments, Results(y), np.empty(route.tape_elements(problem), np.float32))
    np.testing.assert_array_equal(y, fusedrnn.cells.dropout.scale(y.shape, p, problem.seed, 0).astype(np.float32))


# Which backend runs.


def test_all_backends_are_here():
    """A missing extension is a failure, unless FUSEDRNN_BACKEND says what to test."""
    wanted = [config.backend] if config.backend else list(backends.NAMES)
    assert {name: backends.missing(name) for name in wanted} == dict.fromkeys(wanted)


def test_choose():
    assert backends.choose("reference") is reference
    with pytest.raises(ValueError, match=r"backend is 'cuda'; expected one of native, numba, reference"):
        backends.choose("cuda")


def test_set_backend(monkeypatch):
    monkeypatch.setattr(config, "backend", None)
    fusedrnn.set_backend("reference")
    assert backends.choose() is reference
    with pytest.raises(ValueError, match="backend is 'fast'"):
        fusedrnn.set_backend("fast")
    assert backends.choose() is reference
    fusedrnn.set_backend(None)
    assert backends.choose().__name__.rpartition(".")[2] == backends.available()[0]


def test_missing_backend_says_why(monkeypatch):
    monkeypatch.setattr(backends, "_loaded", {"reference": reference})
    monkeypatch.setattr(backends, "_missing", {"native": "no compiler", "numba": "no numba"})
    with pytest.raises(ImportError, match=r"'native' cannot run here: no compiler. Available: reference"):
        backends.choose("native")
    monkeypatch.setattr(config, "backend", None)
    assert backends.choose() is reference
    report = fusedrnn.info()
    assert report["backends"] == ["reference"]
    assert report["no native"] == "no compiler"


def test_log_tells_what_runs(monkeypatch, caplog):
    monkeypatch.setattr(backends, "announced", False)
    with caplog.at_level(logging.INFO, logger="fusedrnn"):
        backends.choose("reference")
        backends.choose("reference")
    assert [r.getMessage() for r in caplog.records] == ["running on the reference backend"]


def test_environment_chooses_the_backend():
    code = "import fusedrnn; print(fusedrnn.info()['backend used'])"
    environment = os.environ | {"FUSEDRNN_BACKEND": "reference"}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert found.stdout.strip() == "reference"


def test_threads():
    before = fusedrnn.get_num_threads()
    assert before >= 1
    for bad in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="expected an integer >= 1"):
            fusedrnn.set_num_threads(bad)
    fusedrnn.set_num_threads(before)
    assert fusedrnn.get_num_threads() == before


def test_report_has_text():
    text = fusedrnn.report.text()
    assert fusedrnn.__version__ in text
    assert "backends" in text


def test_import_is_light():
    """`import fusedrnn` needs NumPy at most, starts no thread and prints nothing."""
    code = (
        "import sys, threading, fusedrnn\n"
        "heavy = {'numba', 'torch', 'matplotlib', 'scipy', 'jax', 'cupy', 'fusedrnn._core'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert threading.active_count() == 1\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


def test_shapes_cover_every_option():
    """The table is not narrower than what a Problem can say."""
    for name in ("reverse", "recompute", "clip_cell", "clip_grad", "dropout", "lengths", "reset", "to_initial"):
        assert any(getattr(case, name) for case in shapes.CASES), name
