# SPDX-License-Identifier: Apache-2.0
"""python -m fusedrnn bench: this machine's figures beside torch, onnxruntime, OpenVINO, JAX and a NumPy loop.

workloads.py  what is measured, and the true answers      worker.py   the process that one library runs in
rivals.py     the libraries                                timing.py   slices in turn, medians, spread
machine.py    its name, its cores, its limits              run.py      the command
overhead.py   what a call, a tape and an import cost       report.py, plot.py   tables and the picture, from the JSON
"""

from __future__ import annotations


def main(arguments: list[str] | None = None) -> int:
    """Run the command; everything is imported only then."""
    from . import run

    return run.main(arguments)
