# SPDX-License-Identifier: Apache-2.0
"""How calls fare while other processes use the cores: fusedrnn on one thread and on all, beside torch and onnxruntime.

    python bench/busy.py            writes bench/results/<machine>/busy.json
    python bench/busy.py --callers  two Python threads call at once, on an otherwise quiet machine; prints only

k other processes spin. Each contender has a process of its own, and the same weights; answers are checked against
float64. The figures, in milliseconds, are the median of 40 calls and the slowest of them.
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
from pathlib import Path
from typing import Any

CALLS = 40
CONTENDERS = {"fusedrnn, 1 thread": "fusedrnn", "fusedrnn": "fusedrnn", "torch": "torch", "onnxruntime": "onnxruntime"}
CASES = [  # cell, B, T, H, what is timed
    ("lstm", 1, 80, 128, "infer"),
    ("lstm", 1, 50, 512, "infer"),
    ("lstm", 24, 40, 128, "infer"),
    ("lstm", 64, 20, 256, "infer"),
    ("gru", 1, 80, 64, "infer"),
    ("gru", 16, 40, 256, "infer"),
    ("rnn", 8, 100, 128, "infer"),
    ("lstm", 1, 80, 128, "train"),
    ("lstm", 32, 20, 256, "train"),
    ("gru", 8, 40, 128, "train"),
    ("rnn", 16, 40, 256, "train"),
]


def child(contender: str, threads: int) -> None:
    """Times one contender on all cases; prints JSON."""
    from fusedrnn.bench.rivals import RIVALS
    from fusedrnn.bench.timing import BUDGET
    from fusedrnn.bench.workloads import Data, Workload, errors, truth

    rival = RIVALS[CONTENDERS[contender]](threads)
    results: list[Any] = []
    for cell, B, T, H, which in CASES:
        workload = Workload("busy", cell, B, T, H, H)
        if rival.refuses(workload, which):
            results.append(None)
            continue
        data = Data(workload)
        answers = rival.answers(data, which, rival.build(data.masked(), which)())
        found = errors(answers, truth(data, which), data.checked_rows)
        worst = max(found.values())
        assert worst < BUDGET[which], f"{contender}: {found}"
        run = rival.build(data, which)
        time.sleep(0.5)  # NumPy's threads, which made the true answer, spin for some time
        for _ in range(4):
            run()
        times = []
        for _ in range(CALLS):
            begun = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - begun))
        results.append({"median": round(statistics.median(times), 3), "worst": round(max(times), 3)})
    print(json.dumps(results))


def measure(contender: str) -> list[Any]:
    """The child's results."""
    from fusedrnn.bench.rivals import environment

    threads = 1 if contender.endswith("1 thread") else len(os.sched_getaffinity(0))
    command = [sys.executable, __file__, "--child", contender, str(threads)]
    done = subprocess.run(command, env=os.environ | environment(threads), stdout=subprocess.PIPE, text=True, check=True)
    found: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def busy(k: int, names: list[str]) -> list[dict[str, Any]]:
    """All contenders while k processes spin."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(k)]
    try:
        time.sleep(0.3)
        found = {name: measure(name) for name in names}
    finally:
        for other in others:
            other.kill()
            other.wait()
    rows = []
    for n, case in enumerate(CASES):
        row: dict[str, Any] = {"k": k, "case": " ".join(map(str, case))}
        row |= {name: found[name][n] for name in names if found[name][n]}
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def callers() -> None:
    """Two Python threads, each with a layer of its own: calls a second of both, by the number of threads of a call."""
    import fusedrnn
    from fusedrnn.bench.rivals import RIVALS
    from fusedrnn.bench.workloads import Data, Workload

    for cell, B, T, H, which in CASES:
        rates = {}
        for threads in (1, len(os.sched_getaffinity(0))):
            rival = RIVALS["fusedrnn"](threads)
            fusedrnn.set_num_threads(threads)
            runs = [rival.build(Data(Workload("busy", cell, B, T, H, H)), which) for _ in range(2)]
            counts = [0, 0]
            end = time.perf_counter() + 1

            def call(n: int, runs: Any = runs, counts: Any = counts, end: float = end) -> None:
                while time.perf_counter() < end:
                    runs[n]()
                    counts[n] += 1

            workers = [threading.Thread(target=call, args=(n,)) for n in range(2)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            rates[threads] = sum(counts)
        print(json.dumps({"case": f"{cell} {B} {T} {H} {which}", "calls a second by threads": rates}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--print", action="store_true", help="write nothing")
    parser.add_argument("--ours", action="store_true", help="without rivals; write nothing")
    parser.add_argument("--callers", action="store_true")
    parser.add_argument("--k", type=int, nargs="*", default=[0, 1, 2, 4])
    options = parser.parse_args()
    if options.child:
        return child(options.child[0], int(options.child[1]))
    if options.callers:
        return callers()
    names = list(CONTENDERS)[: 2 if options.ours else None]
    rows = [row for k in options.k for row in busy(k, names)]
    if not (options.print or options.ours):
        from fusedrnn.bench import machine

        machine.save({"calls": CALLS, "rows": rows}, Path(__file__).parent / "results", "busy")


if __name__ == "__main__":
    main()
