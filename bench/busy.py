# SPDX-License-Identifier: Apache-2.0
"""How calls fare while other processes use the cores: fusedrnn on one thread and on all, beside torch and onnxruntime.

    python bench/busy.py            writes bench/results/<machine>/busy.json
    python bench/busy.py --callers  two Python threads call at once, on an otherwise quiet machine; prints only

k other processes spin. Each contender has a process of its own, and the same weights; answers are compared. The figures,
in milliseconds, are the median of 40 calls and the slowest of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CALLS = 40
CONTENDERS = ("fusedrnn, 1 thread", "fusedrnn", "torch", "onnxruntime")
CASES = [  # cell, B, T, H, what is timed
    ("LSTM", 1, 80, 128, "inference"),
    ("LSTM", 1, 50, 512, "inference"),
    ("LSTM", 24, 40, 128, "inference"),
    ("LSTM", 64, 20, 256, "inference"),
    ("GRU", 1, 80, 64, "inference"),
    ("GRU", 16, 40, 256, "inference"),
    ("RNN", 8, 100, 128, "inference"),
    ("LSTM", 1, 80, 128, "training"),
    ("LSTM", 32, 20, 256, "training"),
    ("GRU", 8, 40, 128, "training"),
    ("RNN", 16, 40, 256, "training"),
]
SPIN = "while True: pass"


def _ours(cell: str, B: int, T: int, H: int, what: str) -> Callable[[], Any]:
    import numpy as np

    import fusedrnn

    layer = getattr(fusedrnn, cell)(H, H, seed=0)
    x = np.random.default_rng(0).standard_normal((T, B, H), np.float32)
    if what == "inference":
        layer.eval()
        return lambda: layer(x)[0]

    def train() -> Any:
        y, _ = layer(x)
        return layer.backward(y)["x"]

    return train


def _torch(cell: str, B: int, T: int, H: int, what: str) -> Callable[[], Any]:
    import numpy as np
    import torch

    import fusedrnn

    module = getattr(torch.nn, cell)(H, H)
    state = getattr(fusedrnn, cell)(H, H, seed=0).state_dict()
    module.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((T, B, H), np.float32))
    if what == "inference":

        def infer() -> Any:
            with torch.inference_mode():
                return module(x)[0].numpy()

        return infer
    x.requires_grad_()

    def train() -> Any:
        x.grad = None
        module.zero_grad()
        y, _ = module(x)
        y.backward(y.detach())
        return x.grad.numpy()

    return train


def _onnxruntime(cell: str, B: int, T: int, H: int, what: str) -> Callable[[], Any] | None:
    if what == "training":
        return None
    from fusedrnn.bench import rivals
    from fusedrnn.bench.workloads import Workload

    return rivals.onnx_call(Workload(cell, B=B, T=T, H=H)) if hasattr(rivals, "onnx_call") else None


def child(name: str, cases: list[Any]) -> None:
    """Times one contender on all cases; prints JSON."""
    import numpy as np

    makers = {"torch": _torch, "onnxruntime": _onnxruntime}
    results = []
    for case in cases:
        call = makers.get(name, _ours)(*case)
        if call is None:
            results.append(None)
            continue
        answer = np.array(call())
        for _ in range(4):
            call()
        times = []
        for _ in range(CALLS):
            begun = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - begun))
        norm = float(np.sqrt((answer.astype(np.float64) ** 2).sum()))
        results.append({"median": statistics.median(times), "worst": max(times), "norm": norm})
    print(json.dumps(results))


def measure(name: str, cases: list[Any]) -> list[Any]:
    """The child's results."""
    threads = "1" if name.endswith("1 thread") else str(len(os.sched_getaffinity(0)))
    settings = {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--child", name, json.dumps(cases)]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=True)
    found: list[Any] = json.loads(done.stdout)
    return found


def busy(k: int, names: list[str], cases: list[Any]) -> list[dict[str, Any]]:
    """All contenders while k processes spin."""
    others = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(k)]
    try:
        time.sleep(0.3)
        found = {name: measure(name, cases) for name in names}
    finally:
        for other in others:
            other.kill()
            other.wait()
    rows = []
    for n, case in enumerate(cases):
        row: dict[str, Any] = {"k": k, "case": " ".join(map(str, case))}
        expected = found[names[0]][n]["norm"]
        for name in names:
            result = found[name][n]
            if result is None:
                continue
            assert abs(result["norm"] - expected) < 1e-3 * expected, (name, case, result["norm"], expected)
            row[name] = {"median": round(result["median"], 3), "worst": round(result["worst"], 3)}
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def callers(cases: list[Any]) -> None:
    """Two Python threads, each with a layer of its own: calls a second of both, by the number of threads of a call."""
    import fusedrnn

    for case in cases:
        rates = {}
        for threads in (1, len(os.sched_getaffinity(0))):
            fusedrnn.set_num_threads(threads)
            calls = [_ours(*case) for _ in range(2)]
            counts = [0, 0]
            end = time.perf_counter() + 1

            def run(n: int, calls: Any = calls, counts: Any = counts, end: float = end) -> None:
                while time.perf_counter() < end:
                    calls[n]()
                    counts[n] += 1

            workers = [threading.Thread(target=run, args=(n,)) for n in range(2)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            rates[f"{threads} threads"] = sum(counts)
        print(json.dumps({"case": " ".join(map(str, case)), "calls a second": rates}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--print", action="store_true", help="write nothing")
    parser.add_argument("--ours", action="store_true", help="without rivals")
    parser.add_argument("--callers", action="store_true")
    parser.add_argument("--k", type=int, nargs="*", default=[0, 1, 2, 4])
    options = parser.parse_args()
    if options.child:
        return child(options.child[0], json.loads(options.child[1]))
    if options.callers:
        return callers(CASES)
    names = list(CONTENDERS[:2] if options.ours else CONTENDERS)
    rows = [row for k in options.k for row in busy(k, names, CASES)]
    if not (options.print or options.ours):
        from fusedrnn.bench import machine

        machine.save({"calls": CALLS, "rows": rows}, Path(__file__).parent / "results", "busy")


if __name__ == "__main__":
    main()
