# SPDX-License-Identifier: Apache-2.0
"""CTC loss and gradient against torch's on the CPU, alternated, with the answers of both checked.

    python bench/ctc.py     writes bench/results/<machine>/ctc.json

Both sides get torch tensors and run under autograd: torch.nn.functional.ctc_loss and fusedrnn.torch.ctc_loss. The
tensors are log-probabilities, so log_softmax is in neither time. Medians over calls that take turns.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fusedrnn
import fusedrnn.torch
from fusedrnn.bench import machine

ROOT = Path(__file__).parents[1]
SIZES = [(100, 16, 30, 20), (500, 32, 80, 60), (50, 64, 5000, 10), (1000, 4, 100, 150)]  # T, B, C, S


def call(function: Any, x: torch.Tensor, given: Any, backward: bool) -> Callable[[], Any]:
    if backward:

        def both() -> Any:
            return torch.autograd.grad(function(x, *given).sum(), x)

        return both
    data = x.detach()
    return lambda: function(data, *given)


def compare(size: tuple[int, int, int, int], backward: bool, seconds: float) -> dict[str, Any]:
    """Alternate for about `seconds`."""
    T, B, C, S = size
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(T, B, C, generator=generator).log_softmax(2).requires_grad_()
    targets = torch.randint(1, C, (B, S), generator=generator)
    given = targets, torch.full((B,), T), torch.full((B,), S), 0, "none"
    exact = call(torch.nn.functional.ctc_loss, x.detach().double().requires_grad_(), given, backward)()
    loops = {
        "fusedrnn": call(fusedrnn.torch.ctc_loss, x, given, backward),
        "torch": call(torch.nn.functional.ctc_loss, x, given, backward),
    }
    errors = {}
    for name, loop in loops.items():
        got, expected = (r[0] if backward else r for r in (loop(), exact))
        errors[name] = float((got.double() - expected).abs().max() / expected.abs().max().clamp(min=1))
    if not errors["fusedrnn"] < 1e-5:
        raise SystemExit(f"{size}: wrong by {errors['fusedrnn']}")
    times: dict[str, list[float]] = {name: [] for name in loops}
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds or len(times["torch"]) < 3:
        for name, loop in loops.items():
            for _ in range(1 if name == "torch" else 5):
                start = time.perf_counter()
                loop()
                times[name].append(time.perf_counter() - start)
    return {
        "T": T,
        "B": B,
        "C": C,
        "S": S,
        "pass": "forward and backward" if backward else "forward",
        "milliseconds": {name: round(1e3 * float(np.median(t)), 4) for name, t in times.items()},
        "best_milliseconds": {name: round(1e3 * min(t), 4) for name, t in times.items()},
        "calls": {name: len(t) for name, t in times.items()},
        "ratio": round(float(np.median(times["torch"]) / np.median(times["fusedrnn"])), 2),
        "largest_error_against_float64": errors,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", help="write nothing")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=2.0, help="for each size and pass")
    options = parser.parse_args()
    results = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        fusedrnn.set_num_threads(threads)
        for size in SIZES:
            for backward in (False, True):
                result = {"threads": threads, **compare(size, backward, options.seconds)}
                results.append(result)
                print(json.dumps(result), flush=True)
    report = {
        "what": "CTC in float32, fusedrnn.torch.ctc_loss against torch's own, alternated in one process",
        "torch": torch.__version__,
        "numpy": np.__version__,
        "backend": fusedrnn.backends.choose().__name__.rpartition(".")[2],
        "geometric_mean_ratio": math.exp(float(np.mean([math.log(r["ratio"]) for r in results]))),
        "results": results,
    }
    if not options.print:
        machine.save(report, ROOT / "bench" / "results", "ctc")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
