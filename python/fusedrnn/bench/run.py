# SPDX-License-Identifier: Apache-2.0
"""The command: what is measured in which order, the progress bar, the JSON file."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from . import machine, report
from .rivals import OURS, OURS_TORCH, PEERS, RIVALS, environment
from .timing import Team, Truths
from .workloads import (
    BFLOAT16,
    CALLS,
    CELLS,
    ENSEMBLES,
    HALF,
    HESSIANS,
    NAMED,
    PASSES,
    RESETS,
    Answers,
    Data,
    Workload,
    grid,
    truth,
)

GROUPS = (
    *("grid", "call", "named", "backends", "recompute", "bf16"),
    *("cells", "lengths", "resets", "ensembles", "hessians"),  # of fusedrnn.torch
)
EVERY_COUNT = ("grid", "named")  # the other groups run on the first number of threads only
QUICK_FLOPS = 3e9  # --quick leaves out what needs more in training


@dataclass(frozen=True)
class Case:
    """One line of a table: a workload in one pass, and who runs it: ours first."""

    group: str
    workload: Workload
    which: str
    titles: tuple[str, ...]


def cases(
    groups: tuple[str, ...], cells: tuple[str, ...], sizes: list[tuple[int, int, int, int]], quick: bool
) -> Iterator[Case]:
    """What is measured, group by group."""
    sized = [Workload(f"{c} {','.join(map(str, s))}", c, *s) for c in cells for s in sizes] if sizes else grid(cells)
    several = [w for w in grid(cells) if w.B in (16, 32)]
    for group in groups:
        workloads, titles = {
            "grid": (sized, PEERS),
            "call": ([Workload(f"{c.upper()}, I = H = 64", c, 1, 1, 64, 64) for c in cells], PEERS),
            "named": (NAMED, PEERS),
            "backends": (several, (OURS, "fusedrnn numba", "numpy loop")),
            "recompute": ([replace(w, passes=("train",)) for w in several], (OURS, "fusedrnn recompute")),
            "bf16": (BFLOAT16, ("fusedrnn bf16", OURS)),
            "cells": (CALLS, (OURS_TORCH, "torch")),
            "lengths": (HALF, (OURS_TORCH, "fusedrnn.torch packed", "fusedrnn.torch plain", "torch")),
            "resets": (RESETS, (OURS_TORCH, "fusedrnn.torch plain", "torch")),
            "ensembles": (ENSEMBLES, (OURS_TORCH, "fusedrnn.torch loop", "torch")),
            "hessians": (HESSIANS, (OURS_TORCH, "torch")),
        }[group]
        for which in PASSES:
            for w in workloads:
                beside = (OURS_TORCH,) if group == "call" or (group, which) == ("grid", "train") else ()
                if (
                    w.cell in cells
                    and which in w.passes
                    and not (quick and not sizes and w.flops("train") > QUICK_FLOPS)
                ):
                    yield Case(group, w, which, (*titles, *beside))


def versions(titles: list[str]) -> dict[str, str]:
    """Of every library that is installed."""
    return {title: version for title in titles if (version := RIVALS[title].version()) is not None}


def _subprocess(module: str, threads: int, *arguments: str) -> Any:
    command = [sys.executable, "-m", f"fusedrnn.bench.{module}", *arguments]
    result = subprocess.run(command, env=os.environ | environment(threads), check=True, stdout=subprocess.PIPE)
    return json.loads(result.stdout)


class Run:
    """Everything measured so far; `document` is what the JSON file holds."""

    def __init__(self, options: argparse.Namespace, path: Path) -> None:
        import fusedrnn

        self.options = options
        self.path = path
        self.started = time.monotonic()
        self.folder = tempfile.TemporaryDirectory()
        self.truths: dict[tuple[Workload, str], Path] = {}
        self.versions = versions([title for title in RIVALS if title in options.rivals or title.startswith(OURS)])
        self.document: dict[str, Any] = {
            "machine": machine.facts() | {"name": path.parent.name},
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
            "versions": self.versions,
            "fusedrnn": fusedrnn.info(),
            "settings": {name: getattr(options, name) for name in ("quick", "seconds", "rounds", "clock")},
            "finished": False,
            "limits": {},
            "records": [],
        }

    def save(self) -> None:
        """Write the file; a run that is cut short keeps what it has."""
        self.document["minutes"] = round((time.monotonic() - self.started) / 60, 1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        records = ",\n".join("  " + json.dumps(record) for record in self.document["records"])
        head = json.dumps({name: value for name, value in self.document.items() if name != "records"}, indent=1)
        temporary.write_text(f'{head[:-2]},\n "records": [\n{records}\n ]\n}}\n')
        temporary.replace(self.path)

    def limits(self, threads: int) -> dict[str, Any]:
        """The machine's limits, which are measured at the start and at the end of each number of threads."""
        measured = _subprocess("machine", threads, str(threads))
        known = self.document["limits"].get(str(threads))
        self.document["limits"][str(threads)] = machine.merge(known, measured) if known else measured
        found: dict[str, Any] = self.document["limits"][str(threads)]
        return found

    def truth(self, w: Workload, which: str) -> Answers:
        """The right answers, kept in a file from one number of threads to the next."""
        path = self.truths.setdefault((w, which), Path(self.folder.name, f"{len(self.truths)}.npz"))
        if not path.exists():
            np.savez(path, **truth(Data(w), which))
        with np.load(path) as found:
            return dict(found)

    def threads(self, threads: int, todo: list[Case], advance: Any) -> None:
        """All cases on one number of threads."""
        limits = self.limits(threads)
        titles = [title for title in self.versions if any(title in case.titles for case in todo)]
        with Team(titles, threads, self.options.clock) as team:
            for case in todo:
                advance(f"{threads} thread{'s' * (threads > 1)}, {case.group}: {case.workload.name}, {case.which}", 0)
                w = case.workload
                wanted = [title for title in case.titles if title in titles]
                truths: Truths = {
                    taken: self.truth(taken, case.which) for taken in {RIVALS[t].takes(w) for t in wanted}
                }
                refused = {title: reason for title in wanted if (reason := RIVALS[title].refuses(w, case.which))}
                running = [title for title in wanted if title not in refused]
                results = team.measure(running, w, case.which, truths, self.options.rounds, self.options.seconds)
                record = {"group": case.group, "pass": case.which, "threads": threads, "size": w.size}
                record |= {name: value for name, value in asdict(w).items() if name != "passes"}
                record |= {"flops": w.flops(case.which), "limit": machine.limit_seconds(w, case.which, threads, limits)}
                record["ours"] = case.titles[0]
                self.document["records"].append(record | {"results": results, "refused": refused})
                self.save()
                advance("", 1)
            held = [worker.held for worker in team.workers.values() if worker.held is not None]
            self.document["cores_held"] = all(held)
        limits = self.limits(threads)
        done = (record for record in self.document["records"] if record["threads"] == threads)
        for case, record in zip(todo, done, strict=True):
            record["limit"] = machine.limit_seconds(case.workload, case.which, threads, limits)
        self.save()


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m fusedrnn bench",
        description="Measure this machine against the libraries installed here; answers are checked in the same run.",
        epilog="pip install 'fusedrnn[bench]' installs them. Whatever else the machine does is measured too.",
    )
    p.add_argument("--quick", action="store_true", help="small sizes and short slices: a minute or two, rough figures")
    p.add_argument("--threads", type=_integers, metavar="N,...", help="default: 1 and all cores up to 2")
    p.add_argument("--cells", type=_words(CELLS), default=CELLS, metavar="CELL,...", help=f"of {','.join(CELLS)}")
    p.add_argument("--groups", type=_words(GROUPS), metavar="GROUP,...", help=f"of {','.join(GROUPS)}")
    p.add_argument("--rivals", type=_words(tuple(RIVALS)), default=tuple(RIVALS), metavar="NAME,...")
    p.add_argument("--size", type=_integers, action="append", default=[], metavar="B,T,I,H", help="instead of the grid")
    p.add_argument("--seconds", type=float, help="per library and line, default 0.2 (quick: 0.05)")
    p.add_argument("--rounds", type=int, help="slices that these seconds are cut into, default 5 (quick: 2)")
    p.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: processor seconds, for a machine that is not quiet; one thread only",
    )
    p.add_argument("--out", type=Path, default=Path("bench/results"), help="default %(default)s")
    p.add_argument("--machine", default=machine.name(), help="folder in --out, default %(default)s")
    return p


def _integers(text: str) -> tuple[int, ...]:
    values = tuple(int(word) for word in text.split(","))
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected positive numbers")
    return values


def _words(known: tuple[str, ...]) -> Any:
    def words(text: str) -> tuple[str, ...]:
        chosen = tuple(text.split(","))
        for word in chosen:
            if word not in known:
                raise argparse.ArgumentTypeError(f"{word!r} is not one of {', '.join(known)}")
        return chosen

    return words


def main(arguments: list[str] | None = None) -> int:
    """Measure, save, print. Status 1 where one of our own answers was wrong or missing."""
    p = parser()
    options = p.parse_args(arguments)
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        p.exit(2, "bench: rich is not installed; pip install 'fusedrnn[bench]'\n")
    if any(len(size) != 4 for size in options.size):
        p.error("--size takes B,T,I,H")
    options.seconds = options.seconds or (0.05 if options.quick else 0.2)
    options.rounds = options.rounds or (2 if options.quick else 5)
    counts = options.threads or ((1,) if options.clock == "cpu" else sorted({1, min(2, len(machine.cores()))}))
    if options.clock == "cpu" and max(counts) > 1:
        p.error("--clock cpu adds up what all threads do: it compares on one thread only")
    if max(counts) > len(machine.cores()):
        p.error(f"--threads {max(counts)}: this process has {len(machine.cores())} cores")
    groups = options.groups or (("grid", "call") if options.quick or options.size else GROUPS)
    every = list(cases(groups, options.cells, options.size, options.quick))
    todo = {n: [case for case in every if n == counts[0] or case.group in EVERY_COUNT] for n in counts}
    console = Console()
    run = Run(options, options.out / options.machine / "bench.json")
    document = run.document
    console.print(
        f"{document['machine']['cpu']}, {len(machine.cores())} cores. "
        + ", ".join(f"{title} {version}" for title, version in run.versions.items())
    )
    if (document["machine"]["load"] or 0) > 0.5:
        console.print(
            f"[yellow]Load {document['machine']['load']:.1f}: other programs are running, figures will be noisy."
        )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("starting", total=sum(map(len, todo.values())))

            def advance(text: str, steps: int) -> None:
                progress.update(task, advance=steps, description=text or None)

            for threads, these in todo.items():
                run.threads(threads, these, advance)
                for table in report.rich_tables(document, threads):
                    console.print(table)
            advance("call overhead, tape, import", 0)
            document["overhead"] = _subprocess("overhead", 1)
            document["finished"] = True
    except KeyboardInterrupt:
        console.print("Interrupted: what was measured is kept.")
    run.save()
    console.print(report.rich_summary(document))
    if report.targets(document):
        console.print(report.rich_targets(document))
    console.print(
        f"{run.path} written after {document['minutes']} minutes; python -m fusedrnn.bench.plot {run.path} draws it"
    )
    wrong = [line for line in report.lines(document) if line.failed]
    for line in wrong:
        console.print(f"[red]fusedrnn: {line.record['name']}, {line.record['pass']}: {line.failed}")
    return 1 if wrong or not document["finished"] else 0
