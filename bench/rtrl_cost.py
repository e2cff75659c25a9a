# SPDX-License-Identifier: Apache-2.0
"""What real-time recurrent learning costs beside backpropagation: bytes kept, flops and time of one step.

    python bench/rtrl_cost.py     writes bench/results/<machine>/rtrl_cost.json

One thread, float32. A step is `step` and `gradient` of `fusedrnn.rtrl.RTRL`, exact and diagonal, and for BPTT a step's
share of forward and backward over T steps. They take turns; the best time of many counts. The exact gradient is
compared with BPTT's first.
"""

import argparse
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy is loaded

import numpy as np

import fusedrnn
from fusedrnn.bench import machine
from fusedrnn.rtrl import RTRL

ROOT = Path(__file__).parents[1]
I, T = 8, 100
SIZES = ((1, 16), (1, 32), (1, 64), (16, 16), (16, 32))  # B, H
CELLS: dict[str, Any] = {"RNN": fusedrnn.RNN, "LSTM": fusedrnn.LSTM, "GRU": fusedrnn.GRU}


def correct(layer: Any, x: np.ndarray, dy: np.ndarray) -> float:
    """The largest difference of the exact gradient from BPTT's, as a part of BPTT's largest element."""
    layer(x)
    expected, learner = layer.backward(dy), RTRL(layer)
    sums = dict.fromkeys(layer.parameters, 0.0)
    for x_t, dy_t in zip(x, dy, strict=True):
        learner.step(x_t)
        grads = learner.gradient(dy_t)
        sums = {name: sums[name] + grads[name] for name in sums}
    return max(float(np.abs(sums[name] - expected[name]).max() / np.abs(expected[name]).max()) for name in sums)


def cost(cell: str, B: int, H: int, rounds: int, calls: int) -> dict[str, Any]:
    layer = CELLS[cell](I, H, seed=0)
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((T, B, I), np.float32), rng.standard_normal((T, B, H), np.float32)
    off = correct(layer, x, dy)
    if not off < 1e-4:
        raise ArithmeticError(f"rtrl_cost: {cell} B={B} H={H}: the gradient is {off:.1e} off BPTT's")
    learners = {"exact": RTRL(layer), "diagonal": RTRL(layer, approximation="diagonal")}
    seconds: dict[str, list[float]] = {name: [] for name in ("bptt", *learners)}
    for _ in range(rounds):
        begun = time.perf_counter()
        layer(x)
        layer.backward(dy)
        seconds["bptt"].append((time.perf_counter() - begun) / T)
        for name, learner in learners.items():
            for n in range(calls):
                begun = time.perf_counter()
                learner.step(x[n])
                learner.gradient(dy[n])
                seconds[name].append(time.perf_counter() - begun)
    weights = sum(a.size for name, a in layer.parameters.items() if name != "bias_hh_l0") + H * (cell == "GRU")
    states = 2 if cell == "LSTM" else 1
    flops = 2 * B * states * H * H * weights
    microseconds = {name: round(1e6 * min(taken), 2) for name, taken in seconds.items()}
    return {
        "cell": cell,
        "B": B,
        "I": I,
        "H": H,
        "bytes": {name: learner.nbytes for name, learner in learners.items()},
        "exact_flops": flops,
        "microseconds_a_step": microseconds,
        "exact_gflops_a_second": round(flops / microseconds["exact"] / 1e3, 1),
        "times_bptt": {name: round(microseconds[name] / microseconds["bptt"], 1) for name in learners},
        "gradient_off_bptt": off,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", help="write nothing")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--calls", type=int, default=3, help="steps of RTRL in a round")
    options = parser.parse_args()
    fusedrnn.set_num_threads(1)
    results = []
    print("cell   B   H   exact: MB  Mflop   us a step  x BPTT   diagonal: MB  us a step  x BPTT")
    for cell in CELLS:
        for B, H in SIZES:
            r = cost(cell, B, H, options.rounds, options.calls)
            results.append(r)
            own, us, times = r["bytes"], r["microseconds_a_step"], r["times_bptt"]
            print(
                f"{cell:4} {B:3} {H:3} {own['exact'] / 1e6:11.2f} {r['exact_flops'] / 1e6:6.1f} {us['exact']:11.0f}"
                f" {times['exact']:7.0f} {own['diagonal'] / 1e6:14.3f} {us['diagonal']:10.0f} {times['diagonal']:7.0f}",
                flush=True,
            )
    report = {
        "what": "one step of RTRL, exact and diagonal, beside BPTT's; one thread, float32",
        "numpy": np.__version__,
        "backend": fusedrnn.backends.choose().__name__.rpartition(".")[2],
        "T": T,
        "results": results,
    }
    if not options.print:
        machine.save(report, ROOT / "bench" / "results", "rtrl_cost")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
