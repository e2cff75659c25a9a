# SPDX-License-Identifier: Apache-2.0
"""Options of `python -m fusedrnn demo`, and what happens in which order."""

import argparse
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from .. import backends, get_num_threads
from .display import Display, picture
from .options import BITS, Options
from .text import Text, read
from .train import Trainer

CHECKPOINT_SECONDS = 15.0
INTERRUPTED = 130  # exit status of a program ended by Ctrl-C


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m fusedrnn demo",
        description="Train a character language model on this machine and let it write.",
        epilog="Ctrl-C saves and leaves; --resume goes on from there, with the same numbers as if never interrupted.",
    )
    default = Options()
    p.add_argument("--text", metavar="FILE", help="learn from this text (default: Python's own language reference)")
    p.add_argument("--cell", choices=["lstm", "gru", "rnn"], help=f"default {default.cell}")
    p.add_argument("--hidden", type=positive, metavar="H", help=f"units in a layer, default {default.hidden}")
    p.add_argument("--layers", type=positive, metavar="L", help=f"default {default.layers}")
    length = p.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=positive, help=f"train for about this long, default {default.seconds:.0f}")
    length.add_argument("--steps", type=positive, help="train for this many updates instead")
    p.add_argument("--out", type=Path, default=Path("fusedrnn-demo"), metavar="DIR", help="default %(default)s")
    p.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    p.add_argument("--backend", choices=["native", "numba", "reference"], help="default: the fastest there is")
    p.add_argument("--seed", type=int, help=f"default {default.seed}")
    return p


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def main(arguments: list[str] | None = None) -> int:
    p = parser()
    chosen = vars(p.parse_args(arguments))
    out, resume = chosen.pop("out"), chosen.pop("resume")
    given = {name: value for name, value in chosen.items() if value is not None}
    if "steps" in given:
        given["seconds"] = None
    checkpoint = out / "checkpoint.npz"
    try:
        if resume:
            trainer = Trainer.load(checkpoint, read)
            refuse_changes(trainer.options, given)
        else:
            options = Options(**given)
            if problem := options.problem():
                raise ValueError(f"demo: {problem}.")
            trainer = Trainer(options, Text(read(options.text)))
        backends.choose(trainer.options.backend)
        out.mkdir(parents=True, exist_ok=True)
        return run(trainer, checkpoint)
    except (ValueError, ImportError) as error:
        p.exit(2, f"{error}\n")
    except FloatingPointError as error:
        p.exit(2, f"demo: training has left the finite numbers: {error}\n")
    except MemoryError:
        p.exit(2, "demo: there is not enough memory for this model and text; expected smaller ones.\n")
    except OSError as error:
        p.exit(2, f"demo: {error.filename or out} cannot be written or read ({error.strerror or error}).\n")


def refuse_changes(options: Options, given: dict[str, Any]) -> None:
    saved = asdict(options)
    for name, value in given.items():
        if value != saved[name]:
            raise ValueError(
                f"demo: --{name} is {value}, but the checkpoint was made with {saved[name]}; a resumed run goes on as "
                f"it began. Leave --{name} out, or begin anew without --resume"
            )


def run(trainer: Trainer, checkpoint: Path) -> int:
    options, progress, out = trainer.options, trainer.progress, checkpoint.parent
    weights = sum(array.size for array in trainer.model.parameters.values())
    source = options.text or "the Python language reference"
    name = f"{options.layers}-layer {options.cell.upper()}, {options.hidden} units"
    print(
        f"{name}, {weights:,} weights, {get_num_threads()} threads; "
        f"{len(trainer.text.train):,} characters to learn from ({source}), "
        f"{len(trainer.text.held_out):,} held out",
        flush=True,
    )
    if progress.step:
        print(f"resumed after step {progress.step}")
    elif checkpoint.exists():
        print(f"(begins anew and will replace {checkpoint}; --resume would have gone on from there)")
    display = Display(progress)
    saved = time.monotonic()
    with interrupts() as interrupted:
        for _ in trainer.steps():
            display.show()
            if trainer.evaluation_due():
                bits = trainer.evaluate()
                line = " ".join(trainer.sample(70).split())
                display.line(f"step {progress.step}: {bits:.3f} bits/char held out | {line}")
            if interrupted or time.monotonic() - saved > CHECKPOINT_SECONDS:
                trainer.save(checkpoint)
                saved = time.monotonic()
            if interrupted:
                break
        display.close()
    if interrupted:
        print(f"Interrupted after step {progress.step}. Saved {checkpoint}; the same command with --resume goes on.")
        return INTERRUPTED
    trainer.save(checkpoint)
    sample = trainer.sample(600)
    (out / "sample.txt").write_text(sample + "\n", encoding="utf-8")
    drawn = picture(progress, out / "loss.png", f"{name}, {source}")
    print(f"\n--- what it writes ---\n{sample}\n----------------------")
    step, bits = progress.held_out[-1]
    tail = np.mean(progress.losses[-50:]) * BITS
    print(
        f"{step} updates, {progress.characters:,} characters in {progress.seconds:.1f} s of training "
        f"({progress.characters / progress.seconds:,.0f} characters/s)\n"
        f"held out: {bits:.3f} bits per character; training, last 50 updates: {tail:.3f}\n"
        f"in {out}: checkpoint.npz, sample.txt" + (", loss.png" if drawn else "; loss.png needs matplotlib")
    )
    return 0


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """A list that fills at the first Ctrl-C, so that the step in work is finished; the second interrupts at once."""
    seen: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)
