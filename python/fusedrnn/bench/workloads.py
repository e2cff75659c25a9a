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
PASSES = ("infer", "grad", "train", "hvp")  # grad: forward that records for backward; hvp: Hessian-vector product
BOTH = ("infer", "train")  # what every library is asked for
GATES = {"rnn": 1, "lstm": 4, "gru": 3}


@dataclass(frozen=True)
class Workload:
    """One recurrent network, or E side by side, on one input; biases on, zero initial state, time-major, float32."""

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
    E: int = 1  # models, each with weights of its own
    module: str = "layer"  # or "cell": torch's LSTMCell and its like, T = 1
    bf16: bool = False  # the weights' values are bfloat16's, so that storing them as such changes no answer
    passes: tuple[str, ...] = BOTH
    source: str = ""

    @property
    def size(self) -> str:
        """B,T,I,H and what else there is.

        >>> Workload("speech", "lstm", 8, 100, 80, 320, L=3, D=2).size
        '8,100,80,320 3 layers, bidirectional'
        """
        extra = [f"{self.L} layers"] * (self.L > 1) + ["bidirectional"] * (self.D > 1)
        extra += ["lengths"] * (self.lengths < 1) + [f"{self.reset:.0%} resets"] * (self.reset > 0)
        extra += [f"{self.E} models"] * (self.E > 1)
        return f"{self.B},{self.T},{self.I},{self.H}" + (" " + ", ".join(extra) if extra else "")

    def inputs(self, layer: int) -> int:
        """Input size of one layer."""
        return self.I if layer == 0 else self.D * self.H

    def product_flops(self) -> tuple[float, float]:
        """Of one forward pass: the input products, and the recurrent ones."""
        steps = self.E * self.B * self.T * (1 + self.lengths) / 2
        rows = 2.0 * steps * GATES[self.cell] * self.H * self.D
        return rows * sum(self.inputs(layer) for layer in range(self.L)), rows * self.H * self.L

    def flops(self, which: str) -> float:
        """Of one pass. Training is counted as three forward passes (cells, dx, dW), a Hessian-vector product as nine:
        each of the three has two factors that change."""
        return sum(self.product_flops()) * {"infer": 1, "grad": 1, "train": 3, "hvp": 9}[which]


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


# What fusedrnn.torch does beside the grid, and weights in 16 bits.
CALLS = tuple(
    Workload(f"{c.upper()}Cell, I = H = 64", c, 1, 1, 64, 64, module="cell", passes=("infer", "grad", "train"))
    for c in CELLS
)
HALF = tuple(
    Workload(f"{c.upper()}, half padding", c, *size, lengths=0.01)
    for c in CELLS
    for size in ((16, 100, 128, 128), (32, 100, 256, 256))
)
RESETS = tuple(
    Workload(f"{c.upper()} with resets", c, 128, 128, 256, 256, reset=0.03, passes=("train",)) for c in CELLS
)
ENSEMBLES = tuple(
    Workload(f"{c.upper()}, 16 models", c, *size, E=16) for c in CELLS for size in ((1, 10, 64, 64), (8, 25, 64, 64))
)
HESSIANS = tuple(
    Workload(f"{c.upper()}, Hessian", c, *size, passes=("hvp",))
    for c in CELLS
    for size in ((1, 50, 64, 64), (16, 100, 128, 128), (32, 100, 256, 256))
)
BFLOAT16 = tuple(
    Workload(f"{c.upper()}, bfloat16 weights", c, 1, 100, H, H, bf16=True, passes=("infer",))
    for c in CELLS
    for H in (256, 512, 1024)
)


class Data:
    """Weights under PyTorch's names and inputs of a workload; dy, the gradient that training starts from; v, the
    direction of a Hessian-vector product. With E models weights, y and dy have E in front."""

    def __init__(self, workload: Workload) -> None:
        w = workload
        self.workload = w
        rng = np.random.default_rng(zlib.crc32(repr(w).encode()))

        def uniform(bound: float, *shape: int) -> np.ndarray:
            return rng.uniform(-bound, bound, shape).astype(np.float32)

        rows = GATES[w.cell] * w.H
        models = (w.E,) if w.E > 1 else ()
        self.params: dict[str, np.ndarray] = {}
        for layer in range(w.L):
            for suffix in ("", "_reverse")[: w.D]:
                bound = w.H**-0.5
                self.params[f"weight_ih_l{layer}{suffix}"] = uniform(bound, *models, rows, w.inputs(layer))
                self.params[f"weight_hh_l{layer}{suffix}"] = uniform(bound, *models, rows, w.H)
                self.params[f"bias_ih_l{layer}{suffix}"] = uniform(bound, *models, rows)
                self.params[f"bias_hh_l{layer}{suffix}"] = uniform(bound, *models, rows)
        if w.bf16:
            for name in self.params:
                if name.startswith("weight"):
                    self.params[name] = (self.params[name].view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
        self.x = uniform(1.0, w.T, w.B, w.I)
        self.dy = uniform(1.0, *models, w.T, w.B, w.D * w.H)
        self.v = {name: uniform(1.0, *value.shape) for name, value in self.params.items()}
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
        other.dy[..., self.checked_rows, :] = self.dy[..., self.checked_rows, :]
        return other


Answers = dict[str, Any]  # "y" ([E,]T,B,D*H); in training also "x" and a gradient per parameter name; or products


def truth(data: Data, which: str) -> Answers:
    """The answers in float64, by the reference backend, on the checked rows.

    "hvp": with loss = sum(dy y y) / 2, the Hessian for all parameters times v.
    """
    E = data.workload.E
    if E == 1:
        return _truth(data, ..., which)
    each = [_truth(data, e, which) for e in range(E)]
    answers = {name: np.stack([one[name] for one in each]) for name in each[0]}
    return answers | ({"x": answers["x"].sum(0)} if "x" in answers else {})  # all models have the same x


def _truth(data: Data, e: Any, which: str) -> Answers:
    """Of one model."""
    import fusedrnn

    w, rows = data.workload, data.checked_rows
    forward = getattr(fusedrnn, w.cell)
    params = {name: value[e].astype(np.float64) for name, value in data.params.items()}
    dy = data.dy[e][:, rows].astype(np.float64)
    y, _, tape = forward(
        data.x[:, rows].astype(np.float64),
        params=params,
        num_layers=w.L,
        bidirectional=w.D == 2,
        lengths=None if data.lengths is None else data.lengths[rows],
        reset=None if data.reset is None else data.reset[:, rows],
        training=which in ("train", "hvp"),
        backend="reference",
    )
    if which == "hvp":
        v = {name: value[e].astype(np.float64) for name, value in data.v.items()}
        ty, _ = fusedrnn.ops.jvp(tape, v)
        products: Answers = fusedrnn.ops.hvp(tape, v, dy * y, tdy=dy * ty)
        return {name: products[name] for name in params}
    answers: Answers = {"y": y}
    if which == "train":
        grads = getattr(fusedrnn, w.cell + "_backward")(tape, dy)
        answers |= {name: value for name, value in grads.items() if name != "state"}
    return answers


def errors(answers: Answers, expected: Answers, rows: np.ndarray) -> dict[str, float]:
    """max |error| / max |expected| per array."""
    found = {}
    for name, right in expected.items():
        value = np.asarray(answers[name], np.float64)
        if name in ("x", "y"):
            value = value[..., rows, :]
        if value.shape != right.shape:
            raise ValueError(f"bench: {name} has shape {value.shape}; expected {right.shape}")
        worst = np.max(np.abs(value - right), initial=0.0)
        found[name] = float(worst / np.max(np.abs(right), initial=1e-30)) if np.isfinite(worst) else float("inf")
    return found
