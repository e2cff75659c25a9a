# SPDX-License-Identifier: Apache-2.0
"""fusedrnn for PyTorch: torch.nn's recurrent modules on fused kernels, with every derivative, transform and compiler.

>>> layer = fusedrnn.torch.LSTM(3, 4)                       # instead of torch.nn.LSTM
>>> y, (h, c) = layer(torch.ones(5, 2, 3), lengths=[5, 3])  # and what torch.nn cannot do
>>> y.sum().backward()

or `fusedrnn.torch.replace(model)` for a model that is there already; or `lstm`, `gru`, `rnn` as functions of tensors.
"""

from . import clip, tbptt
from .ctc import ctc_align, ctc_loss
from .cuda import use_cuda_kernels
from .exits import decompositions
from .functional import gru, lstm, rnn, route
from .modules import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from .replace import Report, replace, restore

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "Report",
    "clip",
    "ctc_align",
    "ctc_loss",
    "decompositions",
    "gru",
    "lstm",
    "replace",
    "restore",
    "rnn",
    "route",
    "tbptt",
    "use_cuda_kernels",
]
