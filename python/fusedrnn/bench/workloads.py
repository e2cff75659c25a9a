# SPDX-License-Identifier: Apache-2.0
"""What is measured: sizes, with the weights and inputs that every library gets.

The same name and seed give the same numbers in every process, so weights need not be sent around.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

CELLS = ("lstm", "gru", "rnn")
PASSES = ("infer", "train")
GATES = {"rnn": 1, "lstm": 4, "gru": 3}


@dataclass(frozen=True)
class Workload:
    """One recurrent network on one input; biases on, zero initial state, time-major, float32."""

    name: str
    cell: str
    B: int
    T: int
    I: int
    H: int
    L: int = 1
    D: int = 1
    lengths: float = 1.0  # the shortest row's share of T; rows are spread evenly up to T
    reset: float = 0.0  # share of (step, row) pairs at which a new sequence begins
    passes: tuple[str, ...] = PASSES
    source: str = ""

    @property
    def size(self) -> str:
        """B,T,I,H and what else there is.

        >>> Workload("speech", "lstm", 8, 100, 80, 320, L=3, D=2).size
        '8,100,80,320 3 layers, bidirectional'
        """
        extra = [f"{self.L} layers"] * (self.L > 1) + ["bidirectional"] * (self.D > 1)
        extra += ["lengths"] * (self.lengths < 1) + [f"{self.reset:.0%} resets"] * (self.reset > 0)
        return f"{self.B},{self.T},{self.I},{self.H}" + (" " + ", ".join(extra) if extra else "")

    def inputs(self, layer: int) -> int:
        """Input size of one layer."""
        return self.I if layer == 0 else self.D * self.H

    def product_flops(self) -> tuple[float, float]:
        """Of one forward pass: the input products, and the recurrent ones."""
        steps = self.B * self.T * (1 + self.lengths) / 2
        rows = 2.0 * steps * GATES[self.cell] * self.H * self.D
        return rows * sum(self.inputs(layer) for layer in range(self.L)), rows * self.H * self.L

    def flops(self, which: str) -> float:
        """Of one pass; training is counted as three forward passes (cells, dx, dW)."""
        return sum(self.product_flops()) * (3 if which == "train" else 1)


# B, T, I, H: five at batch 1, five batched (256,25 is wide and short)
GRID = (
    (1, 100, 64, 64),
    (1, 100, 128, 128),
    (1, 200, 256, 256),
    (1, 100, 512, 512),
    (1, 50, 1024, 1024),
    (16, 100, 128, 128),
    (32, 100, 256, 256),
    (64, 100, 512, 512),
    (256, 25, 256, 256),
    (128, 50, 1024, 1024),
)


def grid(cells: tuple[str, ...] = CELLS) -> list[Workload]:
    """The ten sizes for each cell: the figures that the summary is made of."""
    return [Workload(f"{cell} {B},{T},{I},{H}", cell, B, T, I, H) for cell in cells for B, T, I, H in GRID]


# Sizes that benchmark suites, frameworks and users' issues published, shortened where T or B only repeats the work.
NAMED = (
    Workload("char-LM", "lstm", 32, 64, 64, 256, L=2, source="this package's demo"),
    Workload("speech", "lstm", 8, 150, 80, 256, L=2, D=2, lengths=0.5, source="acoustic model on 80 filter banks"),
    Workload("OCR", "lstm", 32, 26, 512, 256, L=2, D=2, source="CRNN text recogniser, 26 columns"),
    Workload("RL with resets", "lstm", 128, 128, 256, 256, reset=0.03, source="torchrl pull request 3816"),
    Workload("RL with resets, GRU", "gru", 128, 128, 256, 256, reset=0.03, source="torchrl pull request 3816"),
    Workload("audio, batch 1", "gru", 1, 128, 384, 256, D=2, passes=("infer",), source="PyTorch issue 123148"),
    Workload("keyword, batch 1", "lstm", 1, 63, 24, 32, D=2, passes=("infer",), source="oneDNN issue 837"),
    Workload("DeepBench device", "lstm", 1, 150, 256, 256, passes=("infer",), source="DeepBench inference_device_set"),
    Workload(
        "DeepBench device, RNN", "rnn", 1, 672, 32, 32, passes=("infer",), source="DeepBench inference_device_set"
    ),
    Workload("DeepBench training", "lstm", 64, 25, 512, 512, passes=("train",), source="DeepBench training_set"),
    Workload(
        "DeepBench server",
        "gru",
        4,
        187,
        1024,
        1024,
        passes=("infer",),
        source="DeepBench inference_server_set, T=1500",
    ),
    Workload("benchdnn pytorch", "gru", 64, 50, 500, 500, source="benchdnn shapes_training"),
    Workload("benchdnn paddle", "lstm", 1, 629, 128, 128, passes=("infer",), source="benchdnn shapes_inference"),
    Workload("haste", "gru", 32, 250, 128, 256, passes=("train",), source="haste validation/pytorch.py"),
)


class Data:
    """Weights under PyTorch's names and inputs of a workload, and dy, the gradient that training starts from."""

    def __init__(self, workload: Workload) -> None:
        w = workload
        self.workload = w
        rng = np.random.default_rng(zlib.crc32(repr(w).encode()))

        def uniform(bound: float, *shape: int) -> np.ndarray:
            return rng.uniform(-bound, bound, shape).astype(np.float32)

        rows = GATES[w.cell] * w.H
        self.params: dict[str, np.ndarray] = {}
        for layer in range(w.L):
            for suffix in ("", "_reverse")[: w.D]:
                bound = w.H**-0.5
                self.params[f"weight_ih_l{layer}{suffix}"] = uniform(bound, rows, w.inputs(layer))
                self.params[f"weight_hh_l{layer}{suffix}"] = uniform(bound, rows, w.H)
                self.params[f"bias_ih_l{layer}{suffix}"] = uniform(bound, rows)
                self.params[f"bias_hh_l{layer}{suffix}"] = uniform(bound, rows)
        self.x = uniform(1.0, w.T, w.B, w.I)
        self.dy = uniform(1.0, w.T, w.B, w.D * w.H)
        self.lengths: np.ndarray | None = None
        if w.lengths < 1:
            self.lengths = np.linspace(round(w.lengths * w.T), w.T, w.B).round().astype(np.int64)
        self.reset: np.ndarray | None = None
        if w.reset:
            self.reset = rng.random((w.T, w.B)) < w.reset
            self.reset[0] = False

    @cached_property
    def checked_rows(self) -> np.ndarray:
        """The rows that answers are checked on: all of them, or four spread over the batch where all take too long."""
        w = self.workload
        return np.arange(w.B) if w.flops("train") < 1e9 else np.unique(np.linspace(0, w.B - 1, 4).astype(int))

    def masked(self) -> Data:
        """The same with dy zero outside the checked rows, which makes every gradient a function of those rows only."""
        other = object.__new__(Data)
        other.__dict__.update(self.__dict__)
        other.dy = np.zeros_like(self.dy)
        other.dy[:, self.checked_rows] = self.dy[:, self.checked_rows]
        return other


Answers = dict[str, Any]  # "y" (T,B,D*H); in training also "x" and a gradient per parameter name


def truth(data: Data, which: str) -> Answers:
    """The answers in float64, by the reference backend, on the checked rows."""
    import fusedrnn

    w, rows = data.workload, data.checked_rows
    forward = getattr(fusedrnn, w.cell)
    params = {name: value.astype(np.float64) for name, value in data.params.items()}
    y, _, tape = forward(
        data.x[:, rows].astype(np.float64),
        params=params,
        num_layers=w.L,
        bidirectional=w.D == 2,
        lengths=None if data.lengths is None else data.lengths[rows],
        reset=None if data.reset is None else data.reset[:, rows],
        training=which == "train",
        backend="reference",
    )
    answers: Answers = {"y": y}
    if which == "train":
        grads = getattr(fusedrnn, w.cell + "_backward")(tape, data.dy[:, rows].astype(np.float64))
        answers |= {name: value for name, value in grads.items() if name != "state"}
    return answers


def errors(answers: Answers, expected: Answers, rows: np.ndarray) -> dict[str, float]:
    """max |error| / max |expected| per array."""
    found = {}
    for name, right in expected.items():
        value = np.asarray(answers[name], np.float64)
        if name in ("x", "y"):
            value = value[:, rows]
        if value.shape != right.shape:
            raise ValueError(f"bench: {name} has shape {value.shape}; expected {right.shape}")
        worst = np.max(np.abs(value - right), initial=0.0)
        found[name] = float(worst / np.max(np.abs(right), initial=1e-30)) if np.isfinite(worst) else float("inf")
    return found
