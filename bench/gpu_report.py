# SPDX-License-Identifier: Apache-2.0
"""The table of a GPU's page: `python bench/gpu_report.py bench/results/nvidia-h200`.

Compiles bench/gpu_predicted.cpp (no GPU needed), writes what it says to predicted.json, and puts a table into the
folder's README.md, between its marks: predicted microseconds a step, and beside them what kernels.json (ours, and
cuDNN's in the same run) says where it is there.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BATCHES = (8, 16, 32, 64, 128)
BEGIN, END = "<!-- predicted:begin -->", "<!-- predicted:end -->"


def predicted() -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/predicted"
        sources = f"-I{ROOT}/csrc", f"-I{ROOT}/tests/csrc", str(ROOT / "bench" / "gpu_predicted.cpp")
        subprocess.run([os.environ.get("CXX", "g++"), "-std=c++20", "-O1", *sources, "-o", program], check=True)
        rows: list[dict[str, Any]] = json.loads(subprocess.run(program, capture_output=True, check=True).stdout)
        return rows


def table(rows: list[dict[str, Any]], measured: list[dict[str, Any]]) -> str:
    found = {(m["cell"], m["type"], m["H"], m["B"]): m for m in measured}
    lines = [
        "| cell, type | H | " + " | ".join(f"B={B}" for B in BATCHES) + " |",
        "|---|--:|" + "---|" * len(BATCHES),
    ]
    sizes: dict[tuple[str, str, int], dict[int, str]] = {}
    for row in rows:
        m = found.get((row["cell"], row["type"], row["H"], row["B"]))
        parts = []
        for way, place in (("forward", 0), ("backward", 1)):
            route, time = row[way]
            parts.append(f"{route} {time:.2f}")
            if m:
                ours = m["ours"][place] - (m["ours"][0] if place else 0)
                cudnn = m["cudnn"][place] - (m["cudnn"][0] if place else 0)
                parts[-1] += f" (**{ours:.2f}**, {cudnn:.2f})"
        sizes.setdefault((row["cell"], row["type"], row["H"]), {})[row["B"]] = " / ".join(parts)
    for (cell, kind, H), cells in sizes.items():
        lines.append(f"| {cell}, {kind} | {H} | " + " | ".join(cells[B] for B in BATCHES) + " |")
    return "\n".join(lines)


def main() -> None:
    folder = Path(sys.argv[1])
    rows = predicted()
    (folder / "predicted.json").write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    kernels = folder / "kernels.json"
    measured = json.loads(kernels.read_text()).get("apitime", []) if kernels.exists() else []
    page = folder / "README.md"
    before, rest = page.read_text().split(BEGIN)
    after = rest.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n{table(rows, measured)}\n{END}{after}")


if __name__ == "__main__":
    main()
