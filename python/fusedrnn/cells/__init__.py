# SPDX-License-Identifier: Apache-2.0
"""The cells' formulas, once and readable: NumPy runs them as the reference, Numba compiles them as the fallback."""

from __future__ import annotations

from .cell import Cell
from .cifg import CIFG
from .gru import GRU, GRU_RESET_BEFORE
from .ligru import LIGRU
from .lstm import LSTM
from .mingru import MINGRU
from .minlstm import MINLSTM
from .rnn import RNN_RELU, RNN_TANH

CELLS: dict[str, Cell] = {
    cell.name: cell for cell in (RNN_TANH, RNN_RELU, LSTM, GRU, GRU_RESET_BEFORE, CIFG, LIGRU, MINGRU, MINLSTM)
}
