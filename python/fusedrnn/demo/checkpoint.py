# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's file, read whole and checked before a model is made of it: names, shapes, types, sizes, numbers."""

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from .. import files
from ..errors import fail
from ..files import short, whole
from .model import shapes
from .options import Options, Progress
from .text import Text

META = {"options", "progress", "text", "rng", "adam"}
MISSING = "--resume needs the checkpoint of an earlier run in --out."


class Checkpoint:
    """What `Trainer.save` wrote. `check`, with the text, reads `arrays` and `states`.

    options, progress   as they were
    rng                 the state of the random numbers
    arrays              p/NAME, m/NAME, v/NAME: parameters and Adam's sums
    states              of the recurrent layer: none before the first update, h, or h and c
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        fix = MISSING if not path.exists() else ""
        meta = self._meta(files.arrays("demo", path, fix, only=("meta",)).get("meta"))
        self.options: Options = self._made(Options, meta["options"])
        self.progress: Progress = self._made(Progress, meta["progress"])
        self.digest, self.rng, adam = meta["text"], meta["rng"], meta["adam"]
        if problem := self.options.problem():
            self.refuse(problem)
        if not isinstance(self.digest, str):
            self.refuse(f"text is {short(self.digest)}; expected a digest")
        self._check_rng(self.rng)
        if not whole(adam) or adam != self.progress.step:
            self.refuse(f"adam is {short(adam)}; expected {short(self.progress.step)}, the number of updates")

    def refuse(self, why: str) -> NoReturn:
        """Leave with what is wrong."""
        fix = "Begin anew without --resume."
        fail("demo", str(self.path), f"is damaged ({why})", "a checkpoint as this demo saves it", fix)

    def check(self, text: Text) -> None:
        """Compare everything with the text that is to be learnt further, and look at every number."""
        options = self.options
        if text.digest != self.digest:
            raise ValueError(
                f"demo: the text is not the one that {self.path} was trained on (sha256 {text.digest[:12]}, expected "
                f"{self.digest[:12]}); resume with the same file and Python, or begin anew without --resume"
            )
        if problem := self.progress.problem(options, len(text.train)):
            self.refuse(problem)
        of_model = shapes(len(text.vocabulary), options.cell, options.hidden, options.layers)
        wanted = {f"{kind}/{name}": shape for kind in "pmv" for name, shape in of_model.items()}
        count = (2 if options.cell == "lstm" else 1) if self.progress.step else 0
        of_state = [f"state/{n}" for n in range(count)]
        wanted |= dict.fromkeys(of_state, (options.layers, options.batch, options.hidden))
        # Read now that it is known how large they may be. With each array comes a header; with all of them, meta.
        largest = sum(4 * math.prod(shape) + 256 for shape in wanted.values()) + files.LARGEST_TEXT
        self.arrays = files.arrays("demo", self.path, largest=largest)
        del self.arrays["meta"]
        for name in [*wanted, *self.arrays]:
            if name not in self.arrays or name not in wanted:
                self.refuse(f"it {'has no' if name in wanted else 'has'} {short(name)}")
        for name, array in self.arrays.items():
            if array.dtype != np.float32 or array.shape != wanted[name]:
                self.refuse(f"{name} is {array.dtype} {array.shape}; expected float32 {wanted[name]}")
            if not np.isfinite(array).all() or (name.startswith("v/") and array.min() < 0):
                self.refuse(f"{name} has numbers that no training gives: NaN, infinite, or squares below 0")
        self.progress.held_out = [(step, bits) for step, bits in self.progress.held_out]
        self.states = tuple(self.arrays[name] for name in of_state)

    def _meta(self, array: np.ndarray | None) -> dict[str, Any]:
        try:
            if array is None or array.shape != () or array.dtype.kind != "U":
                raise ValueError("it has no meta")
            meta = json.loads(str(array))
            if not isinstance(meta, dict) or set(meta) != META:
                raise ValueError(f"its meta does not hold {', '.join(sorted(META))}")
        except (ValueError, RecursionError, UnicodeError, SystemError) as error:
            self.refuse(str(error))
        return meta

    def _made(self, kind: Any, saved: Any) -> Any:
        names = {field.name for field in fields(kind)}
        if not isinstance(saved, dict) or set(saved) != names:
            self.refuse(f"its {kind.__name__.lower()} do not hold {', '.join(sorted(names))}")
        return kind(**saved)

    def _check_rng(self, rng: Any) -> None:
        """PCG64's state, as NumPy gives and takes it."""
        parts = rng.get("state") if isinstance(rng, dict) else None
        right = (
            isinstance(parts, dict)
            and set(rng) == {"bit_generator", "state", "has_uint32", "uinteger"}
            and rng.get("bit_generator") == "PCG64"
            and set(parts) == {"state", "inc"}
            and all(whole(part, 0, 2**128 - 1) for part in parts.values())
            and whole(rng.get("has_uint32"), 0, 1)
            and whole(rng.get("uinteger"), 0, 2**32 - 1)
        )
        if not right:
            self.refuse("its random numbers' state is none of PCG64")
