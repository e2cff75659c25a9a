# SPDX-License-Identifier: Apache-2.0
"""How time is taken: rivals in turn, round after round, in processes of their own that sleep while others run.

Machines change speed from one second to the next, so what is compared must be measured side by side: in each round
every rival gets a short slice, and every round begins with another one. Medians are over all calls.
"""

from __future__ import annotations

import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np

from .rivals import RIVALS, environment
from .workloads import Answers, Workload

ANSWER_SECONDS = 300.0
SLOW = 0.1  # seconds a call: fewer rounds

# max |error| / max |true value|, against float64; a rival over it has another answer, not the same one faster
BUDGET = {"infer": 2e-5, "grad": 2e-5, "train": 1e-4, "hvp": 2e-4}


Truths = dict[Workload, Answers]


class WorkerError(Exception):
    """A rival failed on a workload, or its process ended."""


class Worker:
    """The parent's end of a worker process."""

    def __init__(self, title: str, threads: int) -> None:
        self.log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fusedrnn.bench.worker", title, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env=os.environ | environment(threads),
            bufsize=0,
        )
        self.buffer = b""
        self.held: bool | None = None  # known when it has started

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send a request and wait for its answer."""
        if self.held is None:
            self.held = self._answer()["held"]
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"do": do} | arguments).encode() + b"\n")
        except BrokenPipeError:
            raise WorkerError(self._end()) from None
        answer = self._answer()
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        pipe = self.process.stdout.fileno()
        end = time.monotonic() + ANSWER_SECONDS
        while b"\n" not in self.buffer:
            if not select.select([pipe], [], [], max(0.0, end - time.monotonic()))[0]:
                self.process.kill()
                raise WorkerError(f"no answer in {ANSWER_SECONDS:.0f} s")
            piece = os.read(pipe, 1 << 16)
            if not piece:
                raise WorkerError(self._end())
            self.buffer += piece
        line, _, self.buffer = self.buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _end(self) -> str:
        code = self.process.wait()
        self.log.seek(0)
        tail = self.log.read().decode(errors="replace").strip().splitlines()[-1:]
        return f"process ended with {code}: {' '.join(tail)}"

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.log.close()


class Team:
    """The workers of all rivals, on one number of threads."""

    def __init__(self, titles: list[str], threads: int, clock: str = "wall") -> None:
        self.threads = threads
        self.clock = clock
        self.workers = {title: Worker(title, threads) for title in titles}

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers.values():
            worker.close()

    def ask(self, title: str, do: str, **arguments: Any) -> dict[str, Any]:
        """Ask one worker, after starting it anew if its process has ended."""
        if not self.workers[title].alive:
            self.workers[title].close()
            self.workers[title] = Worker(title, self.threads)
        return self.workers[title].ask(do, **arguments)

    def measure(
        self, titles: list[str], w: Workload, which: str, truths: Truths, rounds: int, seconds: float
    ) -> dict[str, dict[str, Any]]:
        """Per rival: `median`, `best`, `q1`, `q3` and `rounds` (a median each), in seconds; `calls`; `busy`, the CPU
        seconds of a call, all threads together; `error` against float64. Or `failed`, with a reason.

        `seconds` is about what each rival gets in all rounds together. `truths`: for each workload that one of them
        makes of w.
        """
        found: dict[str, dict[str, Any]] = {}
        with tempfile.TemporaryDirectory() as folder:
            paths = {taken: Path(folder, f"{n}.npz") for n, taken in enumerate(truths)}
            for taken, path in paths.items():
                np.savez(path, **truths[taken])
            for title in titles:
                taken = RIVALS[title].takes(w)
                try:
                    built = self.ask(title, "build", workload=asdict(taken), which=which, truth=str(paths[taken]))
                except WorkerError as error:
                    found[title] = {"failed": str(error)}
                    continue
                worst = max(built["errors"], key=built["errors"].__getitem__)
                found[title] = {"error": built["errors"][worst], "error_in": worst, "first": built["first"]}
                if not built["errors"][worst] <= BUDGET[which]:
                    found[title]["failed"] = f"wrong: {worst} is off by {built['errors'][worst]:.1e}"
        running = [title for title in titles if "failed" not in found[title]]
        slowest = max((found[title]["first"] for title in running), default=0.0)
        rounds = min(rounds, 3) if slowest > SLOW else rounds
        times: dict[str, list[list[float]]] = {title: [] for title in running}
        busy: dict[str, list[float]] = {title: [] for title in running}
        for turn in range(rounds):
            k = turn % max(1, len(running))
            for title in running[k:] + running[:k]:
                if "failed" in found[title]:
                    continue
                try:
                    slice_ = self.ask(title, "time", seconds=seconds / rounds, calls=200, clock=self.clock)
                except WorkerError as error:
                    found[title] |= {"failed": str(error)}
                    continue
                times[title].append(slice_["times"])
                busy[title].append(slice_["busy"])
                if self.threads > 1:  # its threads must not share a core with what comes next
                    time.sleep(RIVALS[title].spins)
        for title in running:
            if "failed" not in found[title]:
                found[title] |= summary(times[title]) | {"busy": statistics.median(busy[title])}
            if self.workers[title].alive:
                self.ask(title, "drop")
        return found


def summary(rounds: list[list[float]]) -> dict[str, Any]:
    """Figures of the calls of all rounds.

    >>> summary([[3.0, 1.0], [2.0]])["median"]
    2.0
    """
    calls = sorted(time for one in rounds for time in one)
    quarter = len(calls) // 4
    return {
        "median": statistics.median(calls),
        "best": calls[0],
        "q1": calls[quarter],
        "q3": calls[-1 - quarter],
        "calls": len(calls),
        "rounds": [statistics.median(one) for one in rounds],
    }
