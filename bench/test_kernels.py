# SPDX-License-Identifier: Apache-2.0
"""Each kernel by itself, for regressions between two commits (rivals are `python -m fusedrnn bench`'s business):

pytest bench --benchmark-autosave                  before
pytest bench --benchmark-compare --benchmark-compare-fail=median:5%
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fusedrnn
from fusedrnn import clip, ops
from fusedrnn.bench.workloads import CELLS, Data, Workload

pytest.importorskip("pytest_benchmark")

SIZES = ((1, 100, 64, 64), (1, 100, 512, 512), (16, 100, 128, 128), (32, 100, 256, 256))
sizes = pytest.mark.parametrize("size", SIZES, ids=lambda size: ",".join(map(str, size)))
cells = pytest.mark.parametrize("cell", CELLS)
dtypes = pytest.mark.parametrize("dtype", ("float32", "float64"))


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = fusedrnn.get_num_threads()
    fusedrnn.set_num_threads(1)
    yield
    fusedrnn.set_num_threads(before)


def data(cell: str, size: tuple[int, ...], dtype: str) -> tuple[Any, Any, Any]:
    found = Data(Workload("kernel", cell, *size))
    return found.x.astype(dtype), found.dy.astype(dtype), {name: a.astype(dtype) for name, a in found.params.items()}


@dtypes
@sizes
@cells
def test_forward(benchmark: Any, cell: str, size: tuple[int, ...], dtype: str) -> None:
    x, _, params = data(cell, size, dtype)
    benchmark(getattr(fusedrnn, cell), x, params=params)


@pytest.mark.parametrize("recompute", (False, True), ids=("kept", "recompute"))
@sizes
@cells
def test_backward(benchmark: Any, cell: str, size: tuple[int, ...], recompute: bool) -> None:
    x, dy, params = data(cell, size, "float32")
    tape = getattr(fusedrnn, cell)(x, params=params, training=True, recompute=recompute)[-1]
    benchmark(getattr(fusedrnn, cell + "_backward"), tape, dy)


@sizes
@cells
def test_jvp(benchmark: Any, cell: str, size: tuple[int, ...]) -> None:
    x, _, params = data(cell, size, "float32")
    tape = getattr(fusedrnn, cell)(x, params=params, training=True)[-1]
    benchmark(ops.jvp, tape, {"x": x} | params)


@cells
def test_step(benchmark: Any, cell: str) -> None:
    layer = getattr(fusedrnn, cell.upper())(64, 64, seed=0)
    layer.eval()
    x = np.ones((1, 64), np.float32)
    state = layer.step(x)[1]
    benchmark(layer.step, x, state)


def test_clip_by_norm(benchmark: Any) -> None:
    grads = data("lstm", (1, 1, 512, 512), "float32")[2]
    benchmark(clip.clip_grad_norm_, grads, 1e9)
