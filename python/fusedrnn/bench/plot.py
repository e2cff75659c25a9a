# SPDX-License-Identifier: Apache-2.0
"""python -m fusedrnn.bench.plot bench/results/MACHINE/bench.json [--readme README.md]

Draws speed.png beside the file, writes README.md there with every figure, and fills the README's block.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from .. import files
from . import report
from .document import read
from .rivals import OURS
from .workloads import BOTH

BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"
COLOURS = {OURS: "#1b6ca8", "onnxruntime": "#e08214", "openvino": "#7a4fa3", "jax": "#4d9221", "torch": "#888888"}


def picture(document: report.Document, path: Path) -> None:
    """Times faster than torch, by size: ours as bars, the others as marks. One row per pass and number of threads."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    sizes = list(dict.fromkeys(line.record["size"] for line in report.lines(document, group="grid")))
    counts = sorted({record["threads"] for record in document["records"]})
    rows = [(which, threads) for which in BOTH for threads in counts]
    figure, axes = plt.subplots(len(rows), 3, figsize=(13, 2.6 * len(rows)), squeeze=False, sharex=True)
    for (which, threads), row in zip(rows, axes, strict=True):
        for cell, axis in zip(("lstm", "gru", "rnn"), row, strict=True):
            found = list(report.lines(document, group="grid", cell=cell, threads=threads, **{"pass": which}))
            _panel(axis, sizes, [line for line in found if "torch" in line.others and line.ours is not None])
            axis.set_title(
                f"{report.CELL[cell]} {report.PASS[which]}, {threads} thread{'s' * (threads > 1)}", fontsize=10
            )
        row[0].set_ylabel("times torch's speed")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=6, frameon=False)
    figure.suptitle(f"{document['machine']['cpu']}, float32; sizes are B,T,I,H", fontsize=11)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel(axis: Any, sizes: list[str], found: list[report.Line]) -> None:
    at = [sizes.index(line.record["size"]) for line in found]
    beyond = [(line.over("torch") or 1) - 1 for line in found]
    axis.bar(at, beyond, bottom=1, color=COLOURS[OURS], width=0.7, label=OURS)
    axis.axhline(1, color=COLOURS["torch"], linewidth=1.2, label="torch")
    for title, colour in COLOURS.items():
        if title not in (OURS, "torch"):
            speeds = [
                line.others["torch"]["median"] / line.others[title]["median"] if title in line.others else None
                for line in found
            ]
            if any(speeds):
                marks = [speed if speed is not None else float("nan") for speed in speeds]
                axis.plot(at, marks, "o", color=colour, markeredgecolor="white", label=title)
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_xticks(range(len(sizes)), sizes, rotation=45, ha="right", fontsize=7)
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)


def around(readme: Path) -> tuple[str, str]:
    """What stands before and behind the marks of a README."""
    text = files.text("bench", readme)
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or text.count(BEGIN) + text.count(END) != 2:
        raise ValueError(
            f"bench: {readme} has no {BEGIN} and {END} on lines of their own. Add both where the table goes"
        )
    return before, after


def fill(readme: Path, block: str) -> None:
    """Put the block between the marks of a README."""
    before, after = around(readme)
    readme.write_text(f"{before}{BEGIN}\n{block}\n{END}{after}", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Draw and write."""
    p = argparse.ArgumentParser(prog="python -m fusedrnn.bench.plot", description=__doc__.splitlines()[2])
    p.add_argument("json", type=Path)
    p.add_argument("--readme", type=Path, help="also fill the block between the speed marks of this file")
    options = p.parse_args(arguments)
    try:
        document = read(options.json)
        if options.readme:
            around(options.readme)
    except ValueError as error:
        p.exit(2, f"{error}\n")
    folder = options.json.parent
    picture(document, folder / "speed.png")
    (folder / "README.md").write_text(report.page(document), encoding="utf-8")
    print(f"{folder}/speed.png and {folder}/README.md written")
    if options.readme:
        seen_from = os.path.relpath(folder, options.readme.parent)
        fill(options.readme, report.readme_block(document, seen_from))
        print(f"{options.readme} filled")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
