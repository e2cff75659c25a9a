# SPDX-License-Identifier: Apache-2.0
"""Truncated backpropagation through time in an ordinary torch training loop. k1, k2: as in fusedrnn.tbptt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import gate


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
    reset: Tensor | None = None,
) -> Iterator[Chunk]:
    """Walk through a long sequence: an update every k1 steps, gradients back through at least k2 (None: k1).

    module: a fusedrnn.torch RNN, LSTM or GRU of one direction; x, state, lengths and reset: as it takes them, whole.
    With k2 > k1 the steps before the new ones run again, with the weights as they are then, from the state kept there.
    With k2 < k1 an update's steps come as several chunks, and `update` marks the last of them.
    Raises ValueError for k1 or k2 < 1 and for a bidirectional module.

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
    for name, k in (("k1", k1), ("k2", k2)):
        if not isinstance(k, int) or k < 1:
            raise ValueError(f"tbptt: {name} is {k!r}; expected a number of steps >= 1")
    if module.bidirectional:
        raise ValueError(
            "tbptt: the module is bidirectional; expected one direction, because the reverse direction begins at the "
            "end of the whole sequence"
        )
    lengths = None if lengths is None else torch.as_tensor(lengths)
    gate.check("tbptt", lambda: ("x", "lengths", "reset"), (x, lengths, reset))
    return _walk(module, x, k1, k2, state, lengths, reset)


def _walk(
    module: Any, x: Tensor, k1: int, k2: int, state: Any, lengths: Tensor | None, reset: Tensor | None
) -> Iterator[Chunk]:
    axis = 1 if module.batch_first and x.dim() == 3 else 0
    T = x.shape[axis]

    def run(begin: int, end: int, state: Any) -> tuple[Tensor, Any]:
        options: dict[str, Any] = {}
        if lengths is not None:
            options["lengths"] = (lengths - begin).clamp(0, end - begin)
        if reset is not None:
            options["reset"] = reset.narrow(axis, begin, end - begin)
        result: tuple[Tensor, Any] = module(x.narrow(axis, begin, end - begin), state, **options)
        return result

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
    if state is None:
        return None
    return tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()
