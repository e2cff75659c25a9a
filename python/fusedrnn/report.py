# SPDX-License-Identifier: Apache-2.0
"""The doctor's report: what is installed, what it can do here, and what will run."""

from __future__ import annotations

import platform
import sys
from typing import Any


def info() -> dict[str, Any]:
    """What fusedrnn found here, as plain values. It always answers, also where the compiled extension is missing.

    >>> fusedrnn.info()["fusedrnn"] == fusedrnn.__version__
    True
    """
    import numpy as np

    from . import __version__, backends

    report: dict[str, Any] = {
        "fusedrnn": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "platform": f"{sys.platform} {platform.machine()}",
    }
    native = backends.load("native")
    if native:
        report["compiler"] = native.compiler
        report["instruction sets built"] = list(native.isas_built)
        report["instruction sets found"] = list(native.isas_found)
        report["instruction set used"] = native.isa()
    cuda: Any = backends.load("cuda")
    if cuda:
        found, why = cuda.devices()
        report["CUDA kernels for"] = cuda.architectures()
        report["CUDA devices"] = [
            f"{d['name']} ({d['compute'] / 10}, {d['multiprocessors']} multiprocessors, {d['bytes'] >> 30} GiB)"
            for d in found
        ] or f"none: {why}"
    else:
        report["no CUDA"] = backends.missing("cuda")
    report["threads"] = backends.get_num_threads()
    report["backends"] = backends.available()
    for name in backends.NAMES:
        if why := backends.missing(name):
            report[f"no {name}"] = why
    try:
        report["backend used"] = backends.choose().__name__.rpartition(".")[2]
    except (ImportError, ValueError) as error:
        report["backend used"] = f"none: {error}"
    return report


def text() -> str:
    """The same in lines, for a terminal.

    >>> fusedrnn.__version__ in fusedrnn.report.text()
    True
    """
    report = info()
    width = max(map(len, report))
    lines = []
    for name, value in report.items():
        shown = ", ".join(value) if isinstance(value, list) else value
        lines.append(f"{name:{width}}  {shown}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """`python -m fusedrnn info`: print the report."""
    import argparse

    argparse.ArgumentParser(prog="python -m fusedrnn info", description=__doc__).parse_args(arguments)
    print(text())
    return 0
