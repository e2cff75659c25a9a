# SPDX-License-Identifier: Apache-2.0
"""Truncated backpropagation through time in an ordinary torch training loop. k1, k2: as in fusedrnn.tbptt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import functional, gate


@dataclass(slots=True)
class Chunk:
    """Some new steps of the sequence, run forward, with a graph that reaches back to step `window`.

    start, stop   the new steps, counted from the beginning of the sequence
    y             the module's output at these steps
    state         the state after the last of them
    update        True when the gradients since the last update are complete: time for the optimizer
    """

    start: int
    stop: int
    window: int
    y: Tensor
    state: Any
    update: bool


def chunks(
    module: Any,
    x: Tensor,
    *,
    k1: int,
    k2: int | None = None,
    state: Any = None,
    lengths: Any = None,
    reset: Any = None,
) -> Iterator[Chunk]:
    """Walk through a long sequence: an update every k1 steps, gradients back through at least k2 (None: k1).

    module: a fusedrnn.torch RNN, LSTM or GRU of one direction; x, state, lengths and reset: as it takes them, whole.
    Steps that no row has are not run.
    With k2 > k1 the steps before the new ones run again, with the weights as they are then, from the state kept there.
    With k2 < k1 an update's steps come as several chunks, and `update` marks the last of them.
    Raises ValueError for k1 or k2 < 1, for a bidirectional module, and for lengths and reset that do not fit x;
    TypeError for x that is no tensor; both at once, before the first chunk is asked for.

    >>> layer = fusedrnn.torch.GRU(3, 4)
    >>> optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    >>> for chunk in fusedrnn.torch.tbptt.chunks(layer, torch.ones(100, 2, 3), k1=20):
    ...     chunk.y.square().mean().backward()
    ...     if chunk.update:
    ...         optimizer.step()
    ...         optimizer.zero_grad()
    >>> chunk.start, chunk.stop
    (80, 100)
    """
    k2 = k1 if k2 is None else k2
    _check(module, x, k1, k2)
    gate.check("tbptt", lambda: ("x", "lengths", "reset"), (x, lengths, reset))
    axis = 1 if module.batch_first and x.dim() == 3 else 0
    T, B = x.shape[axis], x.shape[1 - axis] if x.dim() == 3 else 1
    if reset is not None:
        reset = torch.as_tensor(reset, device=x.device)
        marks = reset.unsqueeze(1) if x.dim() == 2 and reset.dim() == 1 else reset
        functional.mask("tbptt", marks, T, B, axis == 1, x)
    if lengths is not None:
        lengths, T = _counts(lengths, T, B, x)

    def run(begin: int, end: int, state: Any) -> tuple[Tensor, Any]:
        options: dict[str, Any] = {}
        if lengths is not None:
            options["lengths"] = (lengths - begin).clamp(0, end - begin)
        if reset is not None:
            options["reset"] = reset.narrow(axis, begin, end - begin)
        result: tuple[Tensor, Any] = module(x.narrow(axis, begin, end - begin), state, **options)
        return result

    return _walk(run, state, axis, T, k1=int(k1), k2=int(k2))


def _check(module: Any, x: Any, k1: Any, k2: Any) -> None:
    """Raise for what `chunks` cannot take."""
    for name, k in (("k1", k1), ("k2", k2)):
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
            raise ValueError(f"tbptt: {name} is {k!r}; expected a number of steps >= 1")
    if not hasattr(module, "bidirectional"):
        raise TypeError(
            f"tbptt: module is a {type(module).__name__}; expected a fusedrnn.torch RNN, LSTM or GRU. Step a cell in a "
            "loop of your own."
        )
    if module.bidirectional:
        raise ValueError(
            "tbptt: the module is bidirectional; expected one direction, because the reverse direction begins at the "
            "end of the whole sequence"
        )
    if not isinstance(x, Tensor):
        raise TypeError(
            f"tbptt: x is a {type(x).__name__}; expected a tensor (T,B,I) as the module takes it. "
            "Rows of several lengths: pass them padded, with lengths"
        )
    if x.dim() not in (2, 3):
        raise ValueError(f"tbptt: x has shape {tuple(x.shape)}; expected (T,B,I), (B,T,I) with batch_first, or (T,I)")


def _counts(given: Any, T: int, B: int, x: Tensor) -> tuple[Tensor, int]:
    """lengths as int64 (B,), checked, and the longest."""
    lengths = torch.as_tensor(given)
    one = x.dim() == 2 and lengths.dim() == 0
    lengths = functional.counts("tbptt", lengths.reshape(1) if one else lengths, B, x)
    least, longest = map(int, lengths.aminmax()) if lengths.numel() else (0, 0)
    if least < 0 or longest > T:
        raise ValueError(
            f"tbptt: lengths lie in [{least}, {longest}]; expected 0 <= lengths <= {T}, the steps of x {tuple(x.shape)}"
        )
    return lengths, longest


def _walk(run: Any, state: Any, axis: int, T: int, *, k1: int, k2: int) -> Iterator[Chunk]:
    """The chunks of T steps; y has them along `axis`."""
    start = window = done = 0
    while start < T:
        stop = min(start + min(k1 - done, k2), T)
        done += stop - start
        update = done == k1 or stop == T
        # where the next window begins: the state there is kept
        split = min(max(min(stop + k1, T) - k2, window), stop) if k2 > k1 else stop
        parts, at, now = [], window, state
        for end in (split, stop):
            if at < end:
                y, now = run(at, end, now)
                if end > start:
                    parts.append(y.narrow(axis, max(start - at, 0), end - max(start, at)))
                at = end
            if end == split:
                state = _detached(now)
        yield Chunk(start, stop, window, parts[0] if len(parts) == 1 else torch.cat(parts, axis), now, update)
        start, window = stop, split
        done = 0 if update else done


def _detached(state: Any) -> Any:
    """The state without what computed it. A leaf has nothing behind it: a learned initial state keeps its gradient."""
    if state is None:
        return None
    if isinstance(state, tuple | list):
        return tuple(s if s.is_leaf else s.detach() for s in state)
    return state if state.is_leaf else state.detach()
