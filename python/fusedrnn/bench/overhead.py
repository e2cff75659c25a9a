# SPDX-License-Identifier: Apache-2.0
"""What is not a kernel's speed: a call from Python, an import, the size of the tape.

`python -m fusedrnn.bench.overhead` prints it as JSON.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from . import machine
from .workloads import CELLS, GATES

IMPORT = "import time; a = time.perf_counter(); import {}; print(time.perf_counter() - a)"


def microseconds(call: Callable[[], Any]) -> float:
    """Median of batches of calls, in processor time: nothing here waits or has a second thread."""
    for _ in range(200):
        call()
    batches = []
    for _ in range(50):
        start = time.process_time()
        for _ in range(100):
            call()
        batches.append((time.process_time() - start) / 100)
    return statistics.median(batches) * 1e6


def calls() -> dict[str, Any]:
    """T = B = 1, I = H = 64, one thread: the whole layer, one streaming step, and the function; microseconds."""
    import fusedrnn

    fusedrnn.set_num_threads(1)
    found: dict[str, Any] = {}
    x, x_t = np.ones((1, 1, 64), np.float32), np.ones((1, 64), np.float32)
    for cell in CELLS:
        layer = getattr(fusedrnn, cell.upper())(64, 64, seed=0)
        layer.eval()
        function, params = getattr(fusedrnn, cell), list(layer.parameters.values())
        _, state = layer.step(x_t, None)
        found[cell] = {
            "layer": microseconds(partial(layer, x)),
            "step": microseconds(partial(layer.step, x_t, state)),
            "function": microseconds(partial(function, x, params=params)),
        }
    return found


def tapes() -> dict[str, Any]:
    """Elements kept per T*B*H, without and with recompute, beside what is allowed."""
    from fusedrnn import backends

    found = {}
    T, B, H = 100, 32, 256
    for cell in CELLS:
        kind = "rnn_tanh" if cell == "rnn" else cell
        kept = {
            recompute: backends.choose().tape_elements(backends.Problem(kind, T, 1, B, H, H, recompute=recompute))
            for recompute in (False, True)
        }
        found[cell] = {
            "tape": kept[False] / (T * B * H),
            "recompute": kept[True] / (T * B * H),
            "allowed": GATES[cell] + 2,
        }
    return found


def imports() -> dict[str, float]:
    """Seconds to import this package, until its first layer can be made, and NumPy's part; fresh interpreters."""
    found = {}
    for name, what in (("numpy", "numpy"), ("fusedrnn", "fusedrnn"), ("first layer", "fusedrnn; fusedrnn.LSTM(1, 1)")):
        command = [sys.executable, "-c", IMPORT.format(what)]
        times = [float(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(5)]
        found[name] = statistics.median(times)
    return found


if __name__ == "__main__":
    machine.hold(1)
    print(json.dumps({"calls": calls(), "tapes": tapes(), "imports": imports()}))
