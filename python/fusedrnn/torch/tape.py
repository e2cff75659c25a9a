# SPDX-License-Identifier: Apache-2.0
"""How long a tape is, from what the registry knows of the cell. Only here, because operators must tell it for symbolic
sizes, for which the extension cannot be asked; the tests compare with what it says of numbers."""

from __future__ import annotations

from typing import Any

import torch

from .. import backends
from .how import How


def computing(dtype: torch.dtype) -> torch.dtype:
    """What a dtype is computed in: the 16-bit ones are storage only."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def length(how: How, T: Any, B: Any, H: Any) -> Any:
    """Elements of a tape on the CPU for one weight set, one for the backend's number included."""
    if not how.tape:
        return 0
    cell = how.facts
    again = how.recompute and cell.kept > 0
    every = backends.choose().C_STEPS if again else 1
    c_steps = cell.cell_state * ((T + every - 1) // every)
    per_unit = T + c_steps + (0 if again else cell.kept * T)  # h, c, and what the cell keeps
    spared = T * (H - how.proj_size) if how.proj_size else 0  # h has fewer units
    return how.layers * how.directions * B * (H * per_unit - spared) + 1


def cuda_length(how: How, T: Any, B: Any, H: Any, dtype: torch.dtype) -> Any:
    """Elements of computing(dtype) of a tape on a GPU for one weight set: what the engine's `layers` takes, each array
    rounded up to 256 bytes."""
    if not how.tape:
        return 0
    cell, D = how.facts, how.directions
    parts = cell.gates + (cell.kept > cell.gates or cell.two_products) + cell.cell_state + 1  # 1: h before each step
    pitch, wide = (H + 7) // 8 * 8, (D * H + 7) // 8 * 8
    own, stored = computing(dtype).itemsize, dtype.itemsize
    elements = how.layers * D * T * B * parts * pitch + (how.layers - 1) * T * B * wide
    if how.recompute:  # marks of c are at least 16 steps apart, and are not rounded
        marks = D * B * H * ((T + 15) // 16) * (own // stored) * cell.cell_state
        elements = how.layers * (T * B * wide + marks)
    return (elements * stored + how.layers * 5 * 256 + own - 1) // own
