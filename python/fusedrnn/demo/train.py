# SPDX-License-Identifier: Apache-2.0
"""The training loop, and checkpoints from which it goes on as if never interrupted."""

import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from .. import tbptt
from ..clip import clip_grad_norm_
from .adam import Adam
from .checkpoint import Checkpoint
from .model import CharacterModel
from .options import BITS, Options, Progress
from .text import Text, rows


class Trainer:
    """`steps()` trains; everything else can be called between two steps."""

    WARM = 20  # steps of rising rate; with `seconds`, also those whose time sets the number of steps
    EVALUATIONS = 8

    def __init__(self, options: Options, text: Text) -> None:
        self.options, self.text = options, text
        self.model = CharacterModel(
            len(text.vocabulary), options.cell, options.hidden, options.layers, options.seed, options.backend
        )
        self.adam = Adam(self.model.parameters)
        self.rng = np.random.default_rng([options.seed, 2])
        self.progress = Progress(total=options.steps)
        self.state: Any = None  # of the recurrent layer, carried from chunk to chunk
        self.state_is_pair = options.cell == "lstm"

    def steps(self) -> Iterator[float]:
        """Train to the end, giving the loss (nats per character) after each update."""
        self.model.layer.train()
        times: list[float] = []
        progress = self.progress
        begun = time.perf_counter()
        while not self.finished():
            if progress.position == 0:
                # every epoch begins somewhere else, so that rows and chunks are cut at other places
                progress.shift, self.state = int(self.rng.integers(len(self.text.train))), None
            columns = rows(np.roll(self.text.train, -progress.shift), self.options.batch)
            ids, targets = columns[progress.position : -1], columns[progress.position + 1 :]
            # one block at a time, embedded only when it is needed: after the update before it
            blocks = (self.model.embed(ids[t : t + self.options.chunk]) for t in range(0, len(ids), self.options.chunk))
            for chunk in tbptt.chunks(self.model.layer, blocks, k1=self.options.chunk, state=self.state):
                here = slice(chunk.start, chunk.stop)
                loss, grads = self.model.gradients(chunk, ids[here], targets[here])
                clip_grad_norm_(grads, self.options.clip, error_if_nonfinite=True)
                self.adam.step(grads, self.rate())
                self.state = chunk.state
                progress.step += 1
                progress.position += chunk.stop - chunk.start
                progress.characters += ids[here].size
                progress.losses.append(loss)
                now = time.perf_counter()
                progress.seconds += now - begun
                if progress.total is None:
                    times.append(now - begun)
                    if len(times) == self.WARM:
                        self.plan(float(np.median(times)))
                yield loss
                begun = time.perf_counter()
                if self.finished():
                    return
            progress.position = 0

    def finished(self) -> bool:
        return self.progress.total is not None and self.progress.step >= self.progress.total

    def plan(self, seconds_a_step: float) -> None:
        """Fix the number of steps, once: the rate depends on it, and so does every number from here on."""
        assert self.options.seconds is not None
        left = self.options.seconds - self.progress.seconds
        self.progress.total = self.progress.step + max(int(left / seconds_a_step), 1)

    def rate(self) -> float:
        """Adam's step size: up in a line, then down along half a cosine to a twentieth."""
        step, total = self.progress.step, self.progress.total
        if step < self.WARM or total is None:
            return self.options.rate * min((step + 1) / self.WARM, 1.0)
        done = (step - self.WARM) / max(total - self.WARM, 1)
        return self.options.rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))

    def evaluation_due(self) -> bool:
        step, total = self.progress.step, self.progress.total
        return total is not None and step * self.EVALUATIONS // total > (step - 1) * self.EVALUATIONS // total

    def evaluate(self) -> float:
        """Bits per character on the text that is never trained on."""
        columns = rows(self.text.held_out, min(16, len(self.text.held_out) // 50))
        self.model.layer.eval()
        total, state = 0.0, None
        for t in range(0, len(columns) - 1, 256):
            targets = columns[t + 1 : t + 257]
            y, state = self.model.layer(self.model.embed(columns[t : t + len(targets)]), state)
            total += self.model.loss(y, targets) * targets.size
        self.model.layer.train()
        bits = total / columns[1:].size * BITS
        self.progress.held_out.append((self.progress.step, bits))
        return bits

    def sample(self, length: int, temperature: float = 0.6) -> str:
        """What the model writes. Draws from random numbers of its own, so it changes nothing in training."""
        seed = np.random.default_rng([self.options.seed, 3, self.progress.step]).integers(2**63)
        prompt = self.text.encode("\n\n")  # the end of a paragraph
        return self.text.decode(self.model.sample(prompt, length, temperature, int(seed)))

    def save(self, path: Path) -> None:
        """All of it in one file, put in place only when it is complete."""
        meta = {
            "options": asdict(self.options),
            "progress": asdict(self.progress),
            "text": self.text.digest,
            "rng": self.rng.bit_generator.state,
            "adam": self.adam.count,
        }
        arrays = {f"p/{name}": array for name, array in self.model.parameters.items()}
        arrays |= {f"m/{name}": array for name, array in self.adam.m.items()}
        arrays |= {f"v/{name}": array for name, array in self.adam.v.items()}
        if self.state is not None:
            states = self.state if self.state_is_pair else (self.state,)
            arrays |= {f"state/{n}": array for n, array in enumerate(states)}
        partial = path.with_name(path.name + ".partial")
        with open(partial, "wb") as file:
            np.savez(file, meta=np.array(json.dumps(meta)), **arrays)
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path, read_text: Any) -> "Trainer":
        """The trainer that `save` wrote. `read_text` gives the text for the saved path.

        Raises ValueError for a file that is not whole, and for another text, before a model is made.
        """
        saved = Checkpoint(path)
        text = Text(read_text(saved.options.text))
        saved.check(text)
        trainer = cls(saved.options, text)
        for kind, arrays in (("p", trainer.model.parameters), ("m", trainer.adam.m), ("v", trainer.adam.v)):
            for name, array in arrays.items():
                array[...] = saved.arrays[f"{kind}/{name}"]
        if saved.states:
            trainer.state = saved.states if trainer.state_is_pair else saved.states[0]
        trainer.progress = saved.progress
        trainer.adam.count = saved.progress.step
        trainer.rng.bit_generator.state = saved.rng
        return trainer
