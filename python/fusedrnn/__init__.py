# SPDX-License-Identifier: Apache-2.0
"""Fused RNN, LSTM and GRU kernels for NumPy arrays: forward, backward, and what torch.nn's cannot do.

    layer = fusedrnn.LSTM(input_size, hidden_size)          torch.nn's names and shapes
    y, state = layer(x)                                     x (T,B,I) float32 or float64
    grads = layer.backward(dy)                              a dict of arrays

The functions beneath are `fusedrnn.lstm`, `gru`, `rnn` and their `..._backward`. Nothing heavy is imported here.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import backends, clip, generation, hmm, ops, params, report, rtrl, sampling, tbptt
    from .backends import get_num_threads, set_backend, set_num_threads
    from .ctc import ctc_align, ctc_beam, ctc_greedy, ctc_loss, ctc_loss_backward
    from .generation import generate
    from .layers import GRU, LSTM, RNN, LiGRU, MinGRU, MinLSTM
    from .ops import (
        gru,
        gru_backward,
        ligru,
        ligru_backward,
        lstm,
        lstm_backward,
        mingru,
        mingru_backward,
        minlstm,
        minlstm_backward,
        rnn,
        rnn_backward,
    )
    from .report import info

__version__ = "0.1.0"

_HOMES = {
    "ops": tuple(
        f"{op}{end}" for end in ("", "_backward") for op in ("lstm", "gru", "rnn", "ligru", "mingru", "minlstm")
    ),
    "ctc": ("ctc_align", "ctc_beam", "ctc_greedy", "ctc_loss", "ctc_loss_backward"),
    "layers": ("LSTM", "GRU", "RNN", "LiGRU", "MinGRU", "MinLSTM"),
    "generation": ("generate",),
    "backends": ("set_backend", "set_num_threads", "get_num_threads"),
    "report": ("info",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
_MODULES = ("backends", "clip", "generation", "hmm", "ops", "params", "report", "rtrl", "sampling", "tbptt")

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "LiGRU",
    "MinGRU",
    "MinLSTM",
    "backends",
    "clip",
    "ctc_align",
    "ctc_beam",
    "ctc_greedy",
    "ctc_loss",
    "ctc_loss_backward",
    "generate",
    "generation",
    "get_num_threads",
    "gru",
    "gru_backward",
    "hmm",
    "info",
    "ligru",
    "ligru_backward",
    "lstm",
    "lstm_backward",
    "mingru",
    "mingru_backward",
    "minlstm",
    "minlstm_backward",
    "ops",
    "params",
    "report",
    "rnn",
    "rnn_backward",
    "rtrl",
    "sampling",
    "set_backend",
    "set_num_threads",
    "tbptt",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    elif name in _MODULES:
        value = importlib.import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module 'fusedrnn' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
