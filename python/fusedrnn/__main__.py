# SPDX-License-Identifier: Apache-2.0
"""python -m fusedrnn {info,demo,bench}"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys

COMMANDS = {
    "info": "print version, compiler, instruction sets, threads and backends",
    "demo": "train a character language model on this machine, in under two minutes",
    "bench": "measure this machine against other libraries",
}


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m fusedrnn", formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.epilog = "\n".join(f"  {name:6} {text}" for name, text in COMMANDS.items())
    parser.add_argument("command", choices=COMMANDS)
    command, rest = parser.parse_args(arguments[:1]).command, arguments[1:]
    # each command reads its own options; nothing heavy is imported before it is known which one runs
    if command == "demo":
        if importlib.util.find_spec("fusedrnn._core"):
            # NumPy has little to do beside the kernels, and its threads would spin on the cores that they need
            os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        from .demo import cli

        return cli.main(rest)
    if command == "bench":
        from . import bench

        return bench.main(rest)
    from . import report

    argparse.ArgumentParser(prog="python -m fusedrnn info", description=COMMANDS["info"]).parse_args(rest)
    print(report.text())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
