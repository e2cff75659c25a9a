# SPDX-License-Identifier: Apache-2.0
"""Token input against dense one-hot vectors and against an embedding with dense input, forward and training.

    python bench/tokens.py     writes bench/results/<machine>/tokens.json

One LSTM layer on one thread. `dense` is given its one-hot vectors ready-made and does not ask for their gradient's sum;
`embedding` looks rows of width 128 up, runs the layer, and in training adds dx up into the embedding's gradient.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy is loaded

import numpy as np

import fusedrnn
from fusedrnn.bench import machine

WIDTH = 128


def ways(V: int, T: int, B: int, H: int, training: bool) -> dict[str, Callable[[], Any]]:
    """One call of each way, on the same tokens."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, V, (T, B))
    dy = rng.standard_normal((T, B, H)).astype(np.float32)
    layer, narrow = fusedrnn.LSTM(V, H, seed=0), fusedrnn.LSTM(WIDTH, H, seed=0)
    for each in (layer, narrow):
        each.train(training)
    hot = np.zeros((T, B, V), np.float32)
    np.put_along_axis(hot, tokens[..., None], 1, -1)
    embedding = rng.standard_normal((V, WIDTH)).astype(np.float32)

    def run(x: np.ndarray, on: Any) -> Any:
        y, _ = on(x)
        return on.backward(dy) if training else y

    def embedded() -> Any:
        result = run(embedding[tokens], narrow)
        if training:
            gradient = np.zeros_like(embedding)
            np.add.at(gradient, tokens.ravel(), result["x"].reshape(-1, WIDTH))
            return gradient
        return result

    a, b = run(tokens, layer), run(hot, layer)
    pairs = [(a[k], b[k]) for k in layer.parameters] if training else [(a, b)]
    worst = max(float(np.abs(one - other).max() / (1 + np.abs(other).max())) for one, other in pairs)
    assert worst < 1e-4, f"tokens and one-hot vectors differ by {worst}"
    return {"tokens": lambda: run(tokens, layer), "dense": lambda: run(hot, layer), "embedding": embedded}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="alternated; the median is kept")
    parser.add_argument("--print", action="store_true", help="write nothing")
    options = parser.parse_args()
    fusedrnn.set_num_threads(1)
    rows = []
    for V in (256, 10000):
        for training in (False, True):
            named = ways(V, 100, 32, 256, training)
            times: dict[str, list[float]] = {name: [] for name in named}
            for _ in range(options.repeats):
                for name, call in named.items():
                    begun = time.perf_counter()
                    call()
                    times[name].append(time.perf_counter() - begun)
            row: dict[str, Any] = {"V": V, "T": 100, "B": 32, "H": 256, "training": training}
            row |= {f"{name}_ms": round(1e3 * statistics.median(t), 3) for name, t in times.items()}
            rows.append(row)
            print(row)
    if not options.print:
        machine.save({"rows": rows}, Path(__file__).parent / "results", "tokens")


if __name__ == "__main__":
    main()
