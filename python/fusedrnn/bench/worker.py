# SPDX-License-Identifier: Apache-2.0
"""The process that one rival runs in: `python -m fusedrnn.bench.worker RIVAL THREADS`, driven by timing.Worker.

One JSON object per line comes in and one goes out. A process of its own for each keeps thread pools, allocators and
crashes apart, and lets the core count be set before a library starts.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from typing import Any

import numpy as np

from . import machine
from .rivals import RIVALS, Rival, Run
from .workloads import Data, Workload, errors

COMPILING = 2.0  # seconds: a first call that may have spent them on compiling more than on work
LONG = 0.05  # seconds: a call that needs no call before it to fill caches and wake cores


class Server:
    """One rival and the workload it has at hand."""

    def __init__(self, rival: Rival) -> None:
        self.rival = rival
        self.run: Run | None = None
        self.last = 0.0

    def build(self, workload: dict[str, Any], which: str, truth: str) -> dict[str, Any]:
        """Make the function that will be timed, and compare its answers with the truth."""
        self.run = None
        gc.collect()
        w = Workload(**(workload | {"passes": tuple(workload["passes"])}))
        data = Data(w)
        check = self.rival.build(data.masked(), which)
        start = time.perf_counter()
        result = check()
        self.last = time.perf_counter() - start
        with np.load(truth) as expected:
            found = errors(self.rival.answers(data, which, result), dict(expected), data.checked_rows)
        del check, result
        gc.collect()
        self.run = self.rival.build(data, which)
        if self.last < LONG or (self.rival.compiles and self.last < COMPILING):
            start = time.perf_counter()
            self.run()
            self.last = time.perf_counter() - start
        return {"errors": found, "first": self.last}

    def time(self, seconds: float, calls: int, clock: str) -> dict[str, Any]:
        """Call it for about that long, at least once and at most so many times. `clock`: "wall", or "cpu" seconds."""
        run = self.run
        assert run is not None
        if self.last < LONG:
            run()
        times: list[float] = []
        now = time.perf_counter if clock == "wall" else time.process_time
        gc.disable()
        busy, start = time.process_time(), now()
        while True:
            before = now()
            run()
            after = now()
            times.append(after - before)
            if after - start >= seconds or len(times) >= calls:
                break
        busy = time.process_time() - busy
        gc.enable()
        self.last = times[-1]
        return {"times": times, "busy": busy / len(times)}

    def drop(self) -> dict[str, Any]:
        self.run = None
        gc.collect()
        return {}


def main() -> None:
    title, threads = sys.argv[1], int(sys.argv[2])
    # what libraries print goes to stderr, so that stdout carries answers only
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    held = machine.hold(threads)
    server = Server(RIVALS[title](threads))
    gc.freeze()  # what the library is made of need not be looked through at every collection
    answers.write(json.dumps({"held": held}) + "\n")
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = getattr(server, request.pop("do"))(**request)
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(reply) + "\n")


if __name__ == "__main__":
    main()
