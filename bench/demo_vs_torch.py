# SPDX-License-Identifier: Apache-2.0
"""The demo's training loop end to end against the same loop in torch, alternated, with the losses compared.

    python bench/demo_vs_torch.py     writes bench/results/<machine>/demo_vs_torch.json and the README's demo sentence

Both begin with the same weights and see the same batches: embedding, stacked recurrent layers, softmax cross entropy,
clipping by global norm, Adam (torch's fused one), truncated BPTT with carried state. Loading text is not counted.
"""

import argparse
import json
import math
import os
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as `python -m fusedrnn demo` has it; before NumPy is loaded

import numpy as np
import torch

import fusedrnn
from fusedrnn import tbptt
from fusedrnn.bench import machine
from fusedrnn.clip import clip_grad_norm_
from fusedrnn.demo.adam import Adam
from fusedrnn.demo.model import EMBEDDING, CharacterModel
from fusedrnn.demo.text import Text, read, rows

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- demo:begin -->", "<!-- demo:end -->"

Batch = tuple[np.ndarray, np.ndarray]  # characters (T,B) and the characters after them


def batches(columns: np.ndarray, chunk: int) -> Iterator[Batch]:
    """The text chunk by chunk, to its end."""
    for t in range(0, len(columns) - 1, chunk):
        stop = min(t + chunk, len(columns) - 1)
        yield columns[t:stop], columns[t + 1 : stop + 1]


def ours(model: CharacterModel, source: Iterator[Batch], chunk: int, rate: float, clip: float) -> Iterator[float]:
    """One update for each loss that is taken from here."""
    adam, current = Adam(model.parameters), []

    def embedded() -> Iterator[np.ndarray]:
        for batch in source:
            current[:] = batch
            yield model.embed(batch[0])

    for piece in tbptt.chunks(model.layer, embedded(), k1=chunk):
        loss, grads = model.gradients(piece, *current)
        clip_grad_norm_(grads, clip, error_if_nonfinite=True)
        adam.step(grads, rate)
        yield loss


class TorchModel(torch.nn.Module):
    """The demo's model in torch.nn, with the same weights."""

    def __init__(self, model: CharacterModel, cell: str) -> None:
        super().__init__()
        characters, hidden = model.weight.shape
        layers = model.layer.num_layers
        self.embedding = torch.nn.Embedding(characters, EMBEDDING)
        self.layer = getattr(torch.nn, cell.upper())(EMBEDDING, hidden, layers)
        self.output = torch.nn.Linear(hidden, characters)
        self.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in model.parameters.items()})

    def forward(self, ids: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        y, state = self.layer(self.embedding(ids), state)
        return self.output(y), state


def theirs(model: TorchModel, source: Iterator[Batch], rate: float, clip: float, fused: bool = True) -> Iterator[float]:
    adam, state = torch.optim.Adam(model.parameters(), rate, fused=fused), None
    for ids, targets in source:
        logits, state = model(torch.from_numpy(ids), state)
        state = tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(targets).long().flatten())
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        adam.step()
        yield loss.item()


def timed(loop: Iterator[float], count: int) -> tuple[float, list[float]]:
    begun = time.perf_counter()
    losses = [next(loop) for _ in range(count)]
    return time.perf_counter() - begun, losses


def compare(cell: str, hidden: int, layers: int, batch: int, chunk: int, rounds: int, steps: int) -> dict[str, Any]:
    """Alternate `rounds` times `steps` updates of either loop."""
    text = Text(read(None))
    columns = rows(text.train, batch)
    model = CharacterModel(len(text.vocabulary), cell, hidden, layers, seed=0)
    rate, clip = 2e-3, 1.0

    def again() -> Iterator[Batch]:
        while True:
            yield from (pair for pair in batches(columns, chunk) if len(pair[0]) == chunk)

    rival = TorchModel(model, cell)
    loops: dict[str, Iterator[float]] = {
        "fusedrnn": ours(model, again(), chunk, rate, clip),
        "torch": theirs(rival, again(), rate, clip),
    }
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    losses: dict[str, list[float]] = {name: [] for name in loops}
    for name, loop in loops.items():  # first calls allocate; they are compared, not timed
        losses[name] += timed(loop, 3)[1]
    for _ in range(rounds):
        for name, loop in loops.items():
            spent, new = timed(loop, steps)
            seconds[name].append(spent)
            losses[name] += new
    characters = batch * chunk * steps
    difference = np.abs(np.array(losses["fusedrnn"]) - np.array(losses["torch"]))
    speed: Callable[[str], dict[str, float]] = lambda name: {  # noqa: E731
        "best": round(characters / min(seconds[name])),
        "median": round(characters / float(np.median(seconds[name]))),
    }
    return {
        "cell": cell,
        "hidden": hidden,
        "layers": layers,
        "batch": batch,
        "chunk": chunk,
        "updates": len(difference),
        "characters_per_second": {name: speed(name) for name in loops},
        "ratio_best": round(min(seconds["torch"]) / min(seconds["fusedrnn"]), 3),
        "ratio_median": round(float(np.median(seconds["torch"]) / np.median(seconds["fusedrnn"])), 3),
        "largest_loss_difference_first_200": float(difference[:200].max()),
        "last_losses": {name: losses[name][-1] for name in loops},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", help="write nothing")
    parser.add_argument("--cells", nargs="+", default=["lstm", "gru"], choices=["lstm", "gru", "rnn"])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10, help="updates of either loop in a round")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    results = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        fusedrnn.set_num_threads(threads)
        for cell in options.cells:
            sizes = (options.hidden, options.layers, options.batch, options.chunk)
            result = {"threads": threads, **compare(cell, *sizes, options.rounds, options.steps)}
            results.append(result)
            print(json.dumps(result), flush=True)
    report = {
        "what": "demo training loop, fusedrnn against torch, alternated in one process",
        "torch": torch.__version__,
        "numpy": np.__version__,
        "backend": fusedrnn.backends.choose().__name__.rpartition(".")[2],
        "geometric_mean_ratio_best": math.exp(float(np.mean([math.log(r["ratio_best"]) for r in results]))),
        "results": results,
    }
    if not options.print:
        path = machine.save(report, ROOT / "bench" / "results", "demo_vs_torch")
        tell(report, path)
    return 0


def tell(report: dict[str, Any], path: Path) -> None:
    """Put the figures into the README's sentence about the demo."""
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    parts = [
        f"{r['cell'].upper()} on {r['threads']} thread{'s' * (r['threads'] > 1)} "
        f"{r['characters_per_second']['fusedrnn']['median']:,} characters a second, {r['ratio_median']:.2f} times torch"
        for r in report["results"]
    ]
    text = (
        f"The demo's training loop, end to end, beside the same loop in torch {report['torch']} "
        f"({machine.model()}, both with {report['results'][0]['hidden']} units in "
        f"{report['results'][0]['layers']} layers): {'; '.join(parts)} "
        f"([figures]({path.relative_to(ROOT).as_posix()}))."
    )
    lines = textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)
    readme.write_text(f"{before}{BEGIN}\n{lines}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    raise SystemExit(main())
