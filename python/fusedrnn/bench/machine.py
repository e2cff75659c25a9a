# SPDX-License-Identifier: Apache-2.0
"""This machine: its name, its cores, and the limits that a network's speed is divided by.

`python -m fusedrnn.bench.machine THREADS` measures the limits and prints them as JSON.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .workloads import GATES, Workload

# AMD's server chips say no more than "AMD EPYC" in a virtual machine: family and model tell the generation
_ZEN = (
    (0x17, 0x00, 0x2F, 1),
    (0x17, 0x30, 0xFF, 2),
    (0x19, 0x00, 0x0F, 3),
    (0x19, 0x10, 0x1F, 4),
    (0x19, 0x20, 0x5F, 3),
    (0x19, 0x60, 0xAF, 4),
    (0x1A, 0x00, 0xFF, 5),
)


def _cpuinfo() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def model() -> str:
    """The CPU's name, with the generation where the name hides it."""
    info = _cpuinfo()
    text = info.get("model name") or platform.processor() or platform.machine()
    if info.get("vendor_id") == "AuthenticAMD":
        family, number = int(info["cpu family"]), int(info["model"])
        text += "".join(f" Zen{g}" for f, low, high, g in _ZEN if f == family and low <= number <= high)
    return text


def cores() -> list[int]:
    """One processor number per core that this process may use; hyperthreads count once."""
    if not hasattr(os, "sched_getaffinity"):
        return list(range(os.cpu_count() or 1))
    found: dict[str, int] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        found.setdefault(siblings.read_text() if siblings.exists() else str(cpu), cpu)
    return list(found.values())


def name() -> str:
    """The folder that results go to: cpu-amd-epyc-zen4-2c."""
    words = re.sub(r"\((r|tm)\)|@.*|\b(cpu|processor|\d+-core)\b", " ", model().lower())
    return f"cpu-{re.sub(r'[^a-z0-9]+', '-', words).strip('-')}-{len(cores())}c"


def facts() -> dict[str, Any]:
    """What a reader of the results must know of the machine."""
    info = _cpuinfo()
    wanted = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_tile", "asimd")
    return {
        "cpu": model(),
        "cores": len(cores()),
        "simd": [flag for flag in wanted if flag in (info.get("flags") or info.get("Features") or "").split()],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def save(report: dict[str, Any], results: Path, title: str) -> Path:
    """Write a report to results/<machine>/<title>.json, with what a reader must know of the machine."""
    path = results / name() / f"{title}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": facts()} | report, indent=1) + "\n")
    return path


def hold(threads: int) -> bool:
    """Keep this process on its first cores, so that no library can use more. False where the system cannot."""
    if not hasattr(os, "sched_setaffinity"):
        return False
    os.sched_setaffinity(0, cores()[:threads])
    return True


# Limits.

_SIZES = [1 << k for k in range(14, 27)]  # 16 KiB to 64 MiB a thread


def _probe() -> Any:
    """limits.cpp, compiled for this machine; None without a compiler."""
    source = Path(__file__).with_name("limits.cpp")
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder, "limits.so")
        flags = ["-std=c++20", "-O3", "-march=native", "-shared", "-fPIC", "-pthread"]
        for compiler in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
            try:
                subprocess.run([compiler, *flags, source, "-o", built], check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError):
                continue
            library = ctypes.CDLL(str(built))
            library.fusedrnn_flops.restype = library.fusedrnn_bandwidth.restype = ctypes.c_double
            library.fusedrnn_flops.argtypes = [ctypes.c_int, ctypes.c_long]
            library.fusedrnn_bandwidth.argtypes = [ctypes.c_size_t, ctypes.c_int, ctypes.c_size_t]
            return library
    return None


def measure(threads: int) -> dict[str, Any]:
    """Multiply-add peak (flop/s) and read bandwidth (B/s, all threads together) by bytes per thread."""
    library = _probe()
    if library is not None:
        bandwidth = {size: library.fusedrnn_bandwidth(size, threads, max(1 << 27, size)) for size in _SIZES}
        return {
            "method": "compiled probe",
            "flops": library.fusedrnn_flops(threads, 2_000_000),
            "bandwidth": {str(size): value for size, value in bandwidth.items()},
        }
    import numpy as np

    a = np.ones((1024, 1024), np.float32)

    def best(run: Any, trials: int) -> float:
        times = []
        for _ in range(trials):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return min(times)

    sizes = {size: np.ones(size // 4, np.float32) for size in _SIZES}
    return {
        "method": "no C++ compiler: NumPy's matrix product and sum, below the true limits",
        "flops": 2 * 1024**3 / best(lambda: a @ a, 10),
        "bandwidth": {str(n): threads * n / best(array.sum, 20) for n, array in sizes.items()},
    }


def merge(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The better figures of two measurements: a limit is what was seen at least once."""
    both = zip(first["bandwidth"].items(), second["bandwidth"].values(), strict=True)
    return first | {
        "flops": max(first["flops"], second["flops"]),
        "bandwidth": {size: max(a, b) for (size, a), b in both},
    }


def limit_seconds(w: Workload, which: str, threads: int, measured: dict[str, Any]) -> float | None:
    """The shortest time in which the arithmetic could run here; None for a Hessian-vector product.

    Products over all steps at once run at the multiply-add peak. The recurrence runs at that peak, or at the speed at
    which every step can read R once from where it fits, whichever takes longer. Training has the input product three
    times (x W^T, dx, dW), the recurrence twice (forward, backward), and dR as one more product over all steps.
    """
    if which == "hvp":
        return None
    peak: float = measured["flops"]
    inputs, recurrent = (flops / peak for flops in w.product_flops())
    held = (2.0 if w.bf16 else 4.0) * GATES[w.cell] * w.H * w.H
    points = [(math.log2(int(size)), value) for size, value in measured["bandwidth"].items()]
    at = min(max(math.log2(held / threads), points[0][0]), points[-1][0])
    (left, low), (right, high) = next(pair for pair in itertools.pairwise(points) if at <= pair[1][0])
    bandwidth: float = low + (high - low) * (at - left) / (right - left)
    walk = max(recurrent, w.E * w.T * (1 + w.lengths) / 2 * w.L * w.D * held / bandwidth)
    return inputs + walk if which in ("infer", "grad") else 3 * inputs + 2 * walk + recurrent


if __name__ == "__main__":
    hold(int(sys.argv[1]))
    print(json.dumps(measure(int(sys.argv[1]))))
