# SPDX-License-Identifier: Apache-2.0
"""Builds the wheel with CUDA for all GPUs, and says what that cost and what came out: time, sizes, libraries needed;
registers, spills and shared memory of every kernel on every architecture, as ptxas reports them. Needs nvcc, no GPU.

    python bench/cuda_build.py                        writes bench/results/cuda-build.json and .md
    python bench/cuda_build.py --architectures 90a-real --out /tmp/one

Time is that of the whole build (three instruction sets of the CPU as well); `cores` is processor time over clock time.
"""

import argparse
import ctypes
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ROUTES = ("single", "cluster", "grid", "stepwise")
# the least a multiprocessor of each architecture lends one block
SHARED_LIMIT = {"sm_75": 64, "sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90a": 227}


@dataclass
class Kernel:
    """One kernel on one architecture. `name` is the functor's C++ type; cell, type, route and cut are read from it."""

    name: str
    architecture: str
    registers: int
    spilled: int  # bytes, stores and loads
    shared: int  # bytes; what a launch asks for is added by `with_shared`
    threads: int = 0
    cell: str = ""
    type: str = ""
    kernel: str = ""
    route: str = ""
    cut: str = ""

    def __post_init__(self) -> None:
        short = self.name.replace("fusedrnn::", "").replace("cuda::", "").replace("cells::", "").replace("dev::", "")
        self.kernel = short.split("<")[0]
        if cell := re.search(r"\b(Lstm|Gru|Rnn<\w+>)", short):
            self.cell = {"Rnn<false>": "Rnn", "Rnn<true>": "Rnn relu"}.get(cell[1], cell[1])
        if shape := re.search(r"Shape\w*<[\w<>]+, (\w+), (?:\(Route\)(\d), )?([\w, ()]+)>", short):
            self.type, self.route = shape[1], ROUTES[int(shape[2])] if shape[2] else "grid"
            self.cut = ("" if shape[2] else "wide ") + shape[3].replace(" ", "")
        else:
            self.cut = short.partition("<")[2].removesuffix(">")

    @property
    def place(self) -> tuple[str, ...]:  # in the table
        return self.cell, self.type, self.route, self.kernel, self.cut

    @property
    def persistent(self) -> bool:
        return bool(self.route) and not self.kernel.startswith("Pack")


def demangled(symbols: Iterable[str]) -> Iterator[str]:
    library = ctypes.CDLL("libstdc++.so.6")
    library.__cxa_demangle.restype = ctypes.c_void_p
    for symbol in symbols:
        status = ctypes.c_int()
        text = library.__cxa_demangle(symbol.encode(), None, None, ctypes.byref(status))
        if status.value:
            raise ValueError(f"{symbol} is no C++ name")
        yield ctypes.string_at(text).decode().replace("> >", ">>").replace("> >", ">>")  # twice: they overlap
        ctypes.CDLL(None).free(ctypes.c_void_p(text))


def kernels(report: str) -> list[Kernel]:
    """What `nvcc -Xptxas -v` says of the kernels that launch.h's `entry` runs."""
    found = re.findall(
        r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers([^\n]*)",
        report,
        re.S,
    )
    names = demangled(symbol for symbol, *_ in found)
    result = []
    for (_, architecture, stores, loads, registers, rest), name in zip(found, names, strict=True):
        functor = re.search(r"\bentry<(.*)>\(", name)
        static = re.search(r"(\d+) bytes smem", rest)
        spilled, shared = int(stores) + int(loads), int(static[1]) if static else 0
        result.append(Kernel(functor[1] if functor else name, architecture, int(registers), spilled, shared))
    return result


def with_shared(found: list[Kernel], nvcc: str) -> None:
    """Adds the shared memory and the threads that launches ask for: a program made of the kernels' own constants."""
    names = sorted({kernel.name for kernel in found})
    source = '#include "cuda/gpu.h"\n#include "cuda/clip.h"\n#include "cuda/ctc.h"\n#include <cstdio>\nint main() {\n'
    for name in names:
        source += f'  std::printf("%d %d\\n", fusedrnn::cuda::shared_of<{name}>(), {name}::kThreads);\n'
    with tempfile.TemporaryDirectory() as folder:
        file, program = Path(folder, "shared.cu"), Path(folder, "shared")
        file.write_text(source + "}\n")
        subprocess.run(
            [nvcc, "-std=c++20", "-arch=sm_80", f"-I{ROOT / 'csrc'}", str(file), "-o", str(program)], check=True
        )
        said = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout.split()
    numbers = {name: (int(said[2 * i]), int(said[2 * i + 1])) for i, name in enumerate(names)}
    for kernel in found:
        shared, kernel.threads = numbers[kernel.name]
        kernel.shared += shared


def build(architectures: str, folder: Path) -> tuple[dict[str, Any], str]:
    environment = {**os.environ, "FUSEDRNN_CUDA": "ON", "CUDAFLAGS": "-Xptxas=-v"}
    environment.setdefault("CMAKE_BUILD_PARALLEL_LEVEL", "2")
    if architectures:
        environment["CUDAARCHS"] = architectures
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "-w", str(folder), str(ROOT)],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    clock, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(done.stdout[-8000:])
    wheel = next(folder.glob("fusedrnn-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if "/_core." in name)
        archive.extract(name, folder)
    core = folder / name
    needed = ""
    if shutil.which("objdump"):
        needed = subprocess.run(["objdump", "-p", str(core)], check=True, capture_output=True, text=True).stdout
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "built_for": (re.findall(r"fusedrnn: CUDA ON \(.* for ([\w ]+)\)", done.stdout) or [""])[0],
        "processor_seconds": round(processor, 1),
        "clock_seconds": round(clock, 1),
        "cores": round(processor / clock, 2),
        "wheel_bytes": wheel.stat().st_size,
        "core_bytes": core.stat().st_size,
        "needed": re.findall(r"NEEDED +(\S+)", needed),
    }, done.stdout


def table(facts: dict[str, Any], found: list[Kernel]) -> str:
    architectures = list(dict.fromkeys(sorted(kernel.architecture for kernel in found)))
    text = f"""# What `FUSEDRNN_CUDA=ON` builds

Made by `python bench/cuda_build.py`: {facts["nvcc"]}; {facts["built_for"]}.
{facts["processor_seconds"]:.0f} s of processor time, {facts["processor_seconds"] / 120:.1f} minutes on two cores.
Wheel {facts["wheel_bytes"] / 1e6:.1f} MB, `_core` {facts["core_bytes"] / 1e6:.1f} MB.
Libraries needed: {", ".join(facts["needed"])}.

## Persistent kernels
Registers of a thread on each architecture, with the bytes spilled behind a + where there are any; KB of shared memory
and threads of a block. '-': not built there (a cluster needs sm_90; bfloat16 and TF32 sm_80), or it wants more shared
memory than the architecture has.

| {" | ".join(["cell", "type", "route", "kernel", "cut", *architectures, "KB", "threads"])} |
{"|---" * (len(architectures) + 7)}|
"""
    rows: dict[str, dict[str, Kernel]] = {}
    for kernel in found:
        if kernel.persistent:
            rows.setdefault(kernel.name, {})[kernel.architecture] = kernel
    for k, row in sorted(((next(iter(row.values())), row) for row in rows.values()), key=lambda pair: pair[0].place):
        cells = []
        for architecture in architectures:
            on = row.get(architecture)
            fits = k.shared <= 1024 * SHARED_LIMIT.get(architecture, 1 << 20)
            empty = on is None or on.registers < 16 or not fits
            cells.append("-" if empty else f"{on.registers}" + (f" + {on.spilled}" if on.spilled else ""))
        columns = (*k.place, *cells, f"{k.shared / 1024:.1f}", str(k.threads))
        text += "| " + " | ".join(columns) + " |\n"
    text += "\n## The others\nThe most registers of each kind, over all cells, types and architectures.\n\n"
    text += "| kernel | instances | registers | spilled |\n|---|---|---|---|\n"
    others: dict[str, list[Kernel]] = {}
    for kernel in found:
        if not kernel.persistent:
            others.setdefault(kernel.kernel, []).append(kernel)
    for name, group in sorted(others.items()):
        text += f"| {name} | {len(group)} | {max(k.registers for k in group)} | {max(k.spilled for k in group)} |\n"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", default="", help="as in CUDAARCHS; empty: all")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "cuda-build", help="without .json")
    given = parser.parse_args()
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if not nvcc:
        sys.exit("there is no nvcc on PATH or in CUDACXX")
    version = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        facts, log = build(given.architectures, Path(folder))
    facts["nvcc"] = next(line for line in version.splitlines() if "release" in line).strip()
    found = kernels(log)
    with_shared(found, nvcc)
    found.sort(key=lambda kernel: (kernel.name, kernel.architecture))
    given.out.with_suffix(".json").write_text(
        json.dumps(facts, indent=1)[:-2]
        + ',\n "kernels": [\n  '
        + ",\n  ".join(json.dumps(asdict(k)) for k in found)
        + "\n ]\n}\n"
    )
    given.out.with_suffix(".md").write_text(table(facts, found))
    spilled = [k for k in found if k.persistent and k.spilled]
    print(json.dumps(facts, indent=1), f"\n{len(found)} kernels, {len(spilled)} persistent ones spill registers")
    for k in spilled:
        print(f"{k.architecture} {k.registers} registers, {k.spilled} bytes spilled: {k.name}")


if __name__ == "__main__":
    main()
