# SPDX-License-Identifier: Apache-2.0
"""What is computed, and how far it is: plain values that a checkpoint keeps, and what each of them may be."""

import math
from dataclasses import dataclass, field
from typing import Any

from ..files import MOST, real, short, whole
from .model import CELLS, shapes
from .text import LARGEST_VOCABULARY

BITS = 1 / math.log(2)  # nats to bits
LARGEST_MODEL = 10**9  # weights; Adam keeps two more numbers for each
MOST_LAYERS = 1000


@dataclass
class Options:
    """All that decides what is computed. The command line sets a few of these; a checkpoint keeps them all."""

    text: str | None = None
    cell: str = "lstm"
    hidden: int = 256
    layers: int = 2
    batch: int = 16
    chunk: int = 64
    rate: float = 3e-3
    clip: float = 1.0
    seconds: float | None = 100.0
    steps: int | None = None
    seed: int = 0
    backend: str | None = None

    def problem(self) -> str:
        """What is wrong with the first value that is wrong; "" if none is."""
        counts: dict[str, tuple[int, int]] = {"hidden": (1, MOST), "layers": (1, MOST_LAYERS), "batch": (1, MOST)}
        counts |= {"chunk": (1, MOST), "seed": (0, 2**64 - 1)}
        rules = {name: (whole(getattr(self, name), *limits), between(*limits)) for name, limits in counts.items()}
        rules |= {
            "text": (self.text is None or isinstance(self.text, str), "a file's name"),
            "cell": (isinstance(self.cell, str) and self.cell in CELLS, f"one of {', '.join(CELLS)}"),
            "rate": (real(self.rate) and self.rate > 0, "a number > 0"),
            "clip": (real(self.clip) and self.clip >= 0, "a number >= 0"),
            "seconds": (self.seconds is None or real(self.seconds) and self.seconds > 0, "a number > 0"),
            "steps": (self.steps is None or whole(self.steps, 1), between(1, MOST)),
            "backend": (self.backend in (None, "native", "numba", "reference"), "a backend's name"),
        }
        for name, (right, expected) in rules.items():
            if not right:
                return f"{name} is {short(getattr(self, name))}; expected {expected}"
        if (self.seconds is None) == (self.steps is None):
            return f"seconds is {self.seconds} and steps is {self.steps}; expected one of the two"
        count = sum(map(math.prod, shapes(LARGEST_VOCABULARY, self.cell, self.hidden, self.layers).values()))
        if count > LARGEST_MODEL:
            return f"hidden is {self.hidden}, layers is {self.layers}; expected {LARGEST_MODEL:,} weights at most"
        return ""


@dataclass
class Progress:
    """Where the run is. Plain numbers, kept in the checkpoint beside the arrays."""

    step: int = 0
    total: int | None = None  # steps in all; with `seconds` known after the first few
    position: int = 0  # steps walked along the rows in this epoch
    shift: int = 0  # where in the text this epoch's rows begin
    seconds: float = 0.0  # spent training, over all sittings
    characters: int = 0
    losses: list[float] = field(default_factory=list)  # training loss in nats, one a step
    held_out: list[tuple[int, float]] = field(default_factory=list)  # (step, bits per character)

    def problem(self, options: Options, characters: int) -> str:
        """What is wrong with the first value that is wrong, for a text of so many characters to train on."""
        steps = (characters - 1) // options.batch  # along the rows
        if steps < 1:
            return f"batch is {options.batch}; expected fewer rows, for {characters} characters"
        rules = {
            "step": (whole(self.step), "a number of updates"),
            "total": (self.total is None or whole(self.total, 1), "a number of updates"),
            "position": (whole(self.position, 0, steps), between(0, steps)),
            "shift": (whole(self.shift, 0, characters - 1), between(0, characters - 1)),
            "seconds": (real(self.seconds) and (self.seconds > 0 or self.step == 0), "a number > 0"),
            "characters": (whole(self.characters), "a number of characters"),
            "losses": (isinstance(self.losses, list) and all(map(real, self.losses)), "a list of numbers"),
            "held_out": (isinstance(self.held_out, list) and all(map(self._evaluation, self.held_out)), "pairs"),
        }
        for name, (right, expected) in rules.items():
            if not right:
                return f"{name} is {short(getattr(self, name))}; expected {expected}"
        if len(self.losses) != self.step:
            return f"step is {self.step}; expected {len(self.losses)}, the number of losses"
        if options.steps is not None and self.total != options.steps:
            return f"total is {self.total}; expected {options.steps}, the option steps"
        if self.total is not None and self.step >= self.total and not self.held_out:
            return f"held_out is empty; expected an evaluation at the end, step {self.step}"
        return ""

    def _evaluation(self, pair: Any) -> bool:
        return isinstance(pair, list | tuple) and len(pair) == 2 and whole(pair[0], 0, self.step) and real(pair[1])


def between(low: int, high: int) -> str:
    return f"an integer >= {low}" if high >= MOST else f"an integer from {low} to {high}"
