# SPDX-License-Identifier: Apache-2.0
"""From the JSON document to tables: on the terminal, in bench/results/MACHINE/README.md, and in the README's block."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .rivals import OURS, OURS_TORCH

if TYPE_CHECKING:
    from rich.table import Table

Document = dict[str, Any]

TITLES = {
    "grid": "The ten sizes",
    "call": "A call with T = B = 1",
    "named": "Published and typical workloads",
    "backends": "Backends of this package and a NumPy loop",
    "recompute": "Gates rebuilt in backward instead of kept",
    "bf16": "Weights stored as bfloat16, beside float32",
    "cells": "fusedrnn.torch: a cell, one step",
    "lengths": "fusedrnn.torch: half of the steps are padding",
    "resets": "fusedrnn.torch: resets",
    "ensembles": "fusedrnn.torch: vmap over 16 models",
    "hessians": "fusedrnn.torch: Hessian-vector products",
}
PASS = {
    "infer": "inference",
    "grad": "forward that records for backward",
    "train": "training",
    "hvp": "Hessian times vector",
}
CELL = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN"}


@dataclass(frozen=True)
class Line:
    """One measured case, from our side."""

    record: dict[str, Any]
    title: str  # ours
    ours: dict[str, Any] | None
    others: dict[str, dict[str, Any]]  # those that ran and answered right

    @property
    def failed(self) -> str | None:
        """Why there is no figure of ours, or None."""
        mine = self.record["results"].get(self.title)
        return None if mine is None else mine.get("failed")

    @property
    def best(self) -> str | None:
        """The fastest of the others; this package's variants count where they are all there is."""
        rivals = [title for title in self.others if not title.startswith(OURS)] or list(self.others)
        return min(rivals, key=lambda title: self.others[title]["median"], default=None)

    def over(self, title: str | None) -> float | None:
        """How many times faster than another, by medians."""
        if self.ours is None or title not in self.others:
            return None
        return float(self.others[title]["median"] / self.ours["median"])

    @property
    def behind(self) -> bool:
        """Slower than the best of the others, by more than the spread of both: the middle halves of the calls part."""
        best = self.best
        return self.ours is not None and best is not None and self.ours["q1"] > self.others[best]["q3"]

    @property
    def share(self) -> float | None:
        """Of the limit: 1 = as fast as this machine's arithmetic allows."""
        limit = self.record["limit"]
        return None if self.ours is None or limit is None else float(limit / self.ours["median"])


def lines(document: Document, title: str | None = None, **wanted: Any) -> Iterator[Line]:
    """The measured cases, optionally only those whose record has these values. title: who counts as ours.

    >>> list(lines({"records": []}, group="grid"))
    []
    """
    for record in document["records"]:
        if all(record[name] == value for name, value in wanted.items()):
            ran = {title: result for title, result in record["results"].items() if "failed" not in result}
            ours = title or record.get("ours", OURS)
            yield Line(record, ours, ran.pop(ours, None), ran)


def mean(values: list[float | None]) -> float | None:
    """Geometric mean of those that are there.

    >>> mean([1.0, None, 4.0])
    2.0
    """
    there = [value for value in values if value is not None]
    return math.exp(math.fsum(map(math.log, there)) / len(there)) if there else None


def least(values: list[float | None]) -> float | None:
    """The smallest of those that are there.

    >>> least([2.0, None, 1.5])
    1.5
    """
    return min((value for value in values if value is not None), default=None)


# Cells of tables.


def _milliseconds(result: dict[str, Any] | None) -> str:
    return (
        "-"
        if result is None
        else f"{result['median'] * 1e3:.3g}"
        if result["median"] < 1
        else f"{result['median'] * 1e3:.0f}"
    )


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _rows(found: list[Line]) -> Iterator[tuple[Line, list[str]]]:
    """Name, ours, spread, best rival, its time, times faster, over torch, share of limit."""
    for line in found:
        spread = None if line.ours is None else (line.ours["q3"] - line.ours["q1"]) / line.ours["median"]
        best = line.best
        yield (
            line,
            [
                line.record["size" if line.record["group"] == "grid" else "name"],
                line.failed or _milliseconds(line.ours),
                _percent(spread),
                best or "-",
                _milliseconds(line.others.get(best or "")),
                _times(line.over(best)),
                _times(line.over("torch")),
                _percent(line.share),
            ],
        )


HEADS = ("", "ours ms", "spread", "best rival", "ms", "faster", "vs torch", "limit")


def groups(document: Document, threads: int) -> Iterator[tuple[str, list[Line]]]:
    """One table's worth of lines each, with its heading."""
    for group, title in TITLES.items():
        for which in PASS:
            for cell in CELL if group == "grid" else (None,):
                wanted: dict[str, Any] = {"group": group, "pass": which, "threads": threads} | (
                    {"cell": cell} if cell else {}
                )
                found = list(lines(document, **wanted))
                if found:
                    parts = [
                        title,
                        *([CELL[cell]] if cell else []),
                        PASS[which],
                        _threads(threads),
                    ]
                    yield ", ".join(parts), found


def rich_tables(document: Document, threads: int) -> Iterator[Table]:
    """The tables for the terminal."""
    from rich import box
    from rich.table import Table

    for heading, found in groups(document, threads):
        table = Table(title=heading, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for k, head in enumerate(HEADS):
            whole = k > 0 or heading.startswith(TITLES["grid"])  # long names may take two lines
            table.add_column(head, justify="left" if k in (0, 3) else "right", overflow="fold", no_wrap=whole)
        for line, cells in _rows(found):
            colour = "red" if line.behind or line.failed else "green" if (line.over(line.best) or 0) > 1 else ""
            cells[5] = f"[{colour}]{cells[5]}[/]" if colour else cells[5]
            table.add_row(*cells)
        table.add_section()
        over = (mean([line.over(line.best) for line in found]), mean([line.over("torch") for line in found]))
        table.add_row("mean", "", "", "", "", *map(_times, over), _percent(mean([line.share for line in found])))
        yield table


# The summary over the grid.


@dataclass(frozen=True)
class Summary:
    """The ten sizes of one cell, pass and number of threads."""

    cell: str
    which: str
    threads: int
    over_torch: float | None
    over_best: float | None
    least: float | None  # times faster than the best rival, at the worst size
    least_torch: float | None  # the same against torch
    share_batched: float | None  # of the multiply-add peak, B >= 16, geometric mean
    share_single: float | None  # of the two-part limit, B = 1, H <= 512
    behind: list[Line]


def summaries(document: Document) -> list[Summary]:
    """What the README shows."""
    found = []
    for threads in sorted({record["threads"] for record in document["records"]}):
        for which in PASS:
            for cell in CELL:
                these = list(lines(document, group="grid", cell=cell, threads=threads, **{"pass": which}))
                these = [line for line in these if line.ours is not None]
                if not these:
                    continue
                over = [line.over(line.best) for line in these]
                batched = [line.share for line in these if line.record["B"] >= 16]
                single = [line.share for line in these if line.record["B"] == 1 and line.record["H"] <= 512]
                found.append(
                    Summary(
                        cell,
                        which,
                        threads,
                        mean([line.over("torch") for line in these]),
                        mean(over),
                        least(over),
                        least([line.over("torch") for line in these]),
                        mean(batched),
                        mean(single),
                        [line for line in these if line.behind],
                    )
                )
    return found


@dataclass(frozen=True)
class Target:
    """What fusedrnn.torch must reach on one thread, and what it does reach."""

    what: str
    against: str
    reached: float
    worst: float
    wanted: float

    @property
    def met(self) -> bool:
        return self.reached >= self.wanted


def targets(document: Document) -> list[Target]:
    """The targets of fusedrnn.torch for which there are figures; times faster, so 0.95 = 5 % slower is allowed.

    The mean over the sizes counts for the grid, the worst size for all else.
    """
    found = []
    threads = min((record["threads"] for record in document["records"]), default=1)

    def add(what: str, against: str, wanted: float, where: dict[str, Any], average: bool = False) -> None:
        these = [line.over(against) for line in lines(document, OURS_TORCH, threads=threads, **where)]
        worst, middle = least(these), mean(these)
        if worst is not None and middle is not None:
            found.append(Target(what, against, middle if average else worst, worst, wanted))

    for cell, wanted in (("lstm", 1.35), ("gru", 2.5), ("rnn", 2.5)):
        where = {"group": "grid", "cell": cell, "pass": "train"}
        add(f"{CELL[cell]}, training, ten sizes: mean", "torch", wanted, where, average=True)
        add(f"{CELL[cell]}, training, ten sizes: every one", "torch", 1.0, where)
    add("LSTM call, T = B = 1, no gradients", "torch", 3.0, {"group": "call", "cell": "lstm", "pass": "infer"})
    add("LSTM call, T = B = 1, with backward", "torch", 2.0, {"group": "call", "cell": "lstm", "pass": "train"})
    for which in ("infer", "grad", "train"):
        add(f"cells, {PASS[which]}", "torch", 1.0, {"group": "cells", "pass": which})
    for which in ("infer", "train"):
        add(f"half padding, {PASS[which]}", "fusedrnn.torch plain", 1.5, {"group": "lengths", "pass": which})
        add(f"half padding, {PASS[which]}", "torch", 3.0, {"group": "lengths", "pass": which})
    add("resets, training", "fusedrnn.torch plain", 0.95, {"group": "resets"})
    add("resets, training", "torch", 5.0, {"group": "resets"})
    for which in ("infer", "train"):
        add(f"vmap over 16 models, {PASS[which]}", "torch", 4.0, {"group": "ensembles", "pass": which})
    add("Hessian-vector product", "torch", 2.0, {"group": "hessians"})
    return found


TARGET_HEADS = ("fusedrnn.torch, one thread", "against", "times faster", "worst size", "wanted", "")


def _target_rows(document: Document) -> Iterator[list[str]]:
    for one in targets(document):
        figures = [_times(one.reached), _times(one.worst), _times(one.wanted)]
        yield [one.what, one.against, *figures, "" if one.met else "missed"]


SUMMARY = (
    "Times faster by medians, as geometric means over the sizes; 'worst size' is the size where torch, or the best "
    "rival, comes closest. 'Behind' counts the sizes where a rival is faster beyond the spread of both. "
    "Limits: the multiply-add peak (B ≥ 16), or that and the cache's read bandwidth (B = 1, H ≤ 512)."
)


def _summary_rows(document: Document) -> Iterator[list[str]]:
    for one in summaries(document):
        yield [
            f"{CELL[one.cell]} {PASS[one.which]}, {_threads(one.threads)}",
            _times(one.over_torch),
            _times(one.least_torch),
            _times(one.over_best),
            _times(one.least),
            _percent(one.share_batched),
            _percent(one.share_single),
            str(len(one.behind)) if one.behind else "none",
        ]


SUMMARY_HEADS = (
    "",
    "vs torch",
    "worst size",
    "vs best rival",
    "worst size",
    "limit, B ≥ 16",
    "limit, B = 1",
    "behind",
)


def rich_summary(document: Document) -> Table:
    """The summary for the terminal."""
    from rich import box
    from rich.table import Table

    table = Table(title="Times faster", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for k, head in enumerate(SUMMARY_HEADS):
        table.add_column(head, justify="right" if k else "left", no_wrap=not k)
    for row in _summary_rows(document):
        table.add_row(*row)
    return table


def rich_targets(document: Document) -> Table:
    """What the modules for torch reach, for the terminal."""
    from rich import box
    from rich.table import Table

    table = Table(title="fusedrnn.torch", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for k, head in enumerate(TARGET_HEADS):
        table.add_column(head, justify="left" if k < 2 else "right")
    for row in _target_rows(document):
        row[-1] = f"[red]{row[-1]}[/]" if row[-1] else ""
        table.add_row(*row)
    return table


def _markdown(heads: tuple[str, ...], rows: Iterator[list[str]], left: tuple[int, ...] = (0,)) -> str:
    rule = "|".join("---" if k in left else "--:" for k in range(len(heads)))
    return "\n".join(["| " + " | ".join(heads) + " |", f"|{rule}|", *("| " + " | ".join(row) + " |" for row in rows)])


def _conditions(document: Document) -> str:
    versions = ", ".join(
        f"{name} {version}" for name, version in document["versions"].items() if not name.startswith(OURS)
    )
    m = document["machine"]
    return (
        f"{m['cpu']}, {m['cores']} cores, {' '.join(m['simd'])}; float32; {versions}, Python {m['python']}; "
        f"{document['date'][:10]}. Rivals take turns in one run, with the same weights and the same number of cores; "
        "every answer is checked against float64."
        + (" Processor seconds, not wall-clock time." if document["settings"]["clock"] == "cpu" else "")
    )


def behind(document: Document) -> str:
    """Where a rival was faster, in one sentence."""
    found = list(lines(document, group="grid"))
    lost = []
    for line in found:
        if line.behind:
            cell, which, threads = (line.record[name] for name in ("cell", "pass", "threads"))
            what = f"{CELL[cell]} {PASS[which]} {line.record['size']}, {_threads(threads)}"
            lost.append(f"{what} ({line.best} needs {_percent(line.over(line.best))} of our time)")
    close = [line for line in found if not line.behind and (line.over(line.best) or 1) < 1]
    within = ""
    if close:
        worst = least([line.over(line.best) for line in close])
        within = (
            f" Within the spread one has the lower median in {len(close)} more, at most to {_percent(worst)} of ours."
        )
    if not lost:
        return f"No rival is faster, beyond the spread, in any of the {len(found)} cases.{within}"
    which = "; ".join(lost)
    return f"A rival is faster, beyond the spread, in {len(lost)} of {len(found)} cases: {which}.{within}"


def readme_block(document: Document, folder: str) -> str:
    """What stands between the marks in the README; `folder` is where results lie, seen from the README."""
    return "\n\n".join(
        [
            SUMMARY,
            _markdown(SUMMARY_HEADS, _summary_rows(document)),
            f"![Times faster than torch]({folder}/speed.png)",
            behind(document),
            f"{_conditions(document)} [Every size and rival]({folder}/README.md); "
            "`python -m fusedrnn bench` measures your machine.",
        ]
    )


def _overhead(document: Document) -> Iterator[str]:
    overhead = document.get("overhead")
    if not overhead:
        return
    yield "## Calls, tape, import"
    rows = (
        [CELL[cell], *(f"{one[name]:.2f}" for name in ("layer", "step", "function"))]
        for cell, one in overhead["calls"].items()
    )
    yield "Microseconds for one call from Python, T = B = 1, I = H = 64, one thread."
    yield _markdown(("cell", "layer(x)", "layer.step(x_t, state)", "function"), rows)
    rows = (
        [CELL[cell], f"{one['tape']:.2f}", f"{one['recompute']:.2f}", f"{one['allowed']}"]
        for cell, one in overhead["tapes"].items()
    )
    yield "Elements that a training step keeps, per T*B*H."
    yield _markdown(("cell", "tape", "with recompute", "promised at most"), rows)
    times = overhead["imports"]
    yield (
        f"`import fusedrnn` takes {times['fusedrnn']:.3f} s; to a first layer it is {times['first layer']:.3f} s, "
        f"of which NumPy takes {times['numpy']:.3f} s."
    )


def page(document: Document) -> str:
    """bench/results/MACHINE/README.md: every figure."""
    parts = [
        f"# {document['machine']['cpu']}",
        "Made by `python -m fusedrnn.bench.plot` from bench.json; do not edit.",
        _conditions(document),
        "Times are medians; 'spread' is the middle half of our calls. 'Of limit' compares with the multiply-add peak "
        "and, where every step must read R, the read bandwidth of the cache that holds it, both from the same run.",
        SUMMARY,
        _markdown(SUMMARY_HEADS, _summary_rows(document)),
        behind(document),
        "![Times faster than torch](speed.png)",
    ]
    if targets(document):
        parts += ["## fusedrnn.torch", _markdown(TARGET_HEADS, _target_rows(document), left=(0, 1))]
    for threads, limits in document["limits"].items():
        bandwidth = ", ".join(f"{int(size) >> 10} KiB {value / 1e9:.0f}" for size, value in limits["bandwidth"].items())
        parts.append(
            f"Limits on {_threads(int(threads))} ({limits['method']}): "
            f"{limits['flops'] / 1e9:.1f} GFLOP/s; GB/s by bytes read per thread: {bandwidth}."
        )
    parts += _overhead(document)
    for threads in sorted({record["threads"] for record in document["records"]}):
        for heading, found in groups(document, threads):
            parts.append(f"## {heading}")
            parts.append(_markdown(HEADS, (cells for _, cells in _rows(found)), left=(0, 3)))
            titles = list(dict.fromkeys(title for line in found for title in line.others))
            if len(titles) > 1:
                rows = (
                    [line.record["size"], *(_milliseconds(line.others.get(title)) for title in titles)]
                    for line in found
                )
                parts.append(_markdown(("B,T,I,H: ms", *titles), rows))
            failures = {
                f"{title}: {result['failed']}"
                for line in found
                for title, result in line.record["results"].items()
                if "failed" in result
            }
            parts += sorted(failures)
    return "\n\n".join(parts) + "\n"
