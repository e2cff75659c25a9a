# SPDX-License-Identifier: Apache-2.0
"""What every example needs and none is about: options, the training loop, a linear layer, its loss, the picture."""

import argparse
import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..clip import clip_grad_norm_
from ..demo.adam import Adam
from ..demo.display import Bar

Arrays = dict[str, np.ndarray]


class Options:
    """The command line. `picture` is where the picture goes; `rng` draws everything that is not a layer's weight."""

    def __init__(self, file: str, doc: str | None, arguments: list[str] | None) -> None:
        self.name = Path(file).stem
        doc = " ".join((doc or "").split("\n\n")[0].split())
        p = argparse.ArgumentParser(prog=f"python -m fusedrnn.examples.{self.name}", description=doc)
        p.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="where the picture goes, default here")
        p.add_argument("--quick", action="store_true", help="a smoke run of seconds: less training, worse figures")
        p.add_argument("--seed", type=int, default=0, help="of weights, batches and data, default %(default)s")
        given = p.parse_args(arguments)
        self.quick: bool = given.quick
        self.seed: int = given.seed
        if self.seed < 0:
            p.error(f"--seed is {self.seed}; expected a number >= 0")
        self.rng = np.random.default_rng(self.seed)
        self.picture: Path = given.out / f"{self.name}.png"
        given.out.mkdir(parents=True, exist_ok=True)


def require(module: str) -> Any:
    """Import a module that an example needs, or leave with a word on where it comes from."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SystemExit(f"{error}. The examples' data come with: pip install 'fusedrnn[examples]'") from error


def join(**parts: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays of several parts of a model in one dict: join(layer=..., head=...)["layer.weight_ih_l0"]."""
    return {f"{part}.{name}": array for part, arrays in parts.items() for name, array in arrays.items()}


def train(
    parameters: Mapping[str, np.ndarray],
    gradients: Callable[[], tuple[float, Mapping[str, Any]]],
    updates: int,
    rate: float = 1e-2,
    clip: float = 1.0,
) -> Iterator[tuple[int, float]]:
    """Adam on the gradients that `gradients()` returns beside the loss of a new batch, named as `parameters`.

    Gives (number of the update, loss) after each one, and keeps a progress line. The gradients' common norm is clipped
    to `clip`; the rate rises over the first updates and falls along half a cosine to nothing.
    """
    adam, bar = Adam(parameters), Bar()
    losses: list[float] = []
    try:
        for update in range(1, updates + 1):
            loss, found = gradients()
            grads = {name: found[name] for name in parameters}  # a layer's gradients of x and state are not for Adam
            clip_grad_norm_(grads, clip, error_if_nonfinite=True)
            rise = min(1.0, update / (0.05 * updates))
            adam.step(grads, rate * rise * 0.5 * (1 + math.cos(math.pi * update / (updates + 1))))
            losses.append(loss)
            bar.update(update, updates, lambda: f"loss {np.mean(losses[-20:]):.4f}")
            yield update, loss
    finally:
        bar.close()


class Linear:
    """x W^T + b over the last axis of x; `backward` gives its gradients as a recurrent layer's does."""

    def __init__(self, inputs: int, outputs: int, seed: int, dtype: Any = np.float32) -> None:
        bound = inputs**-0.5
        weight = np.random.default_rng([seed, inputs, outputs]).uniform(-bound, bound, (outputs, inputs))
        self.parameters: Arrays = {"weight": weight.astype(dtype), "bias": np.zeros(outputs, dtype)}

    def __call__(self, x: np.ndarray) -> np.ndarray:
        weight, bias = self.parameters["weight"], self.parameters["bias"]
        y: np.ndarray = x.reshape(-1, x.shape[-1]) @ weight.T + bias
        return y.reshape(*x.shape[:-1], len(bias))

    def backward(self, x: np.ndarray, dy: np.ndarray) -> Arrays:
        """The gradients of "x", "weight" and "bias" for the x of the call and the gradient dy of what it returned."""
        rows, drows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        dx = (drows @ self.parameters["weight"]).reshape(x.shape)
        return {"x": dx, "weight": drows.T @ rows, "bias": drows.sum(axis=0)}


def softmax(logits: np.ndarray) -> np.ndarray:
    p: np.ndarray = np.exp(logits - logits.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    return p


def cross_entropy(logits: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean over all targets >= 0 of -log softmax(logits)[target], in nats, and its gradient in the logits.

    logits (...,C), targets (...) integers; where a target is negative, nothing is asked.
    """
    p = softmax(logits)
    asked = targets.reshape(-1) >= 0
    rows, chosen = np.flatnonzero(asked), targets.reshape(-1)[asked]
    dlogits = p.reshape(-1, p.shape[-1])
    loss = -np.log(dlogits[rows, chosen] + np.finfo(p.dtype).tiny).mean(dtype=np.float64)
    dlogits[rows, chosen] -= 1
    dlogits *= (asked / len(rows))[:, None].astype(p.dtype)
    return float(loss), p


def load_digits(rng: np.random.Generator, pixels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """scikit-learn's 1797 images of 8 by 8, shuffled, as sequences of so many pixels a step: x (64/pixels,N,pixels) and
    targets (N) of four fifths to train on, and those of the rest."""
    data = require("sklearn.datasets").load_digits()
    order = rng.permutation(len(data.target))
    split = len(order) * 4 // 5
    x = data.images[order].reshape(len(order), -1, pixels).transpose(1, 0, 2).astype(np.float32) / 16
    targets = data.target[order]
    return np.ascontiguousarray(x[:, :split]), targets[:split], np.ascontiguousarray(x[:, split:]), targets[split:]


def accuracy(scores: np.ndarray, targets: np.ndarray) -> float:
    """The share of rows whose largest score is the target's, in %."""
    return 100 * float((scores.argmax(axis=-1) == targets).mean())


@dataclass(frozen=True)
class Figure:
    """The figure that says it learned, with that of a naive way beside it."""

    what: str
    reached: float
    naive: str
    naively: float
    unit: str = "%"
    smaller: bool = False  # is better

    @property
    def learned(self) -> bool:
        return self.reached < self.naively if self.smaller else self.reached > self.naively

    def __str__(self) -> str:
        return f"{self.what}: {self.reached:.4g} {self.unit} ({self.naive}: {self.naively:.4g} {self.unit})"


@contextmanager
def picture(path: Path, width: float = 9, height: float = 4.5) -> Iterator[Any]:
    """An empty matplotlib figure to draw on, of so many inches; saved at the end."""
    figure = require("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
    yield figure
    figure.savefig(path, dpi=150)
    print(f"picture: {path}")
