# SPDX-License-Identifier: Apache-2.0
"""Truncated backpropagation through time: train on sequences of any length in constant memory.

>>> import numpy as np, fusedrnn
>>> from fusedrnn import tbptt
>>> x = np.random.default_rng(0).standard_normal((1000, 4, 2)).astype(np.float32)    # 1000 steps of 4 rows
>>> target, _ = fusedrnn.GRU(2, 3, seed=1)(x)                                        # to learn: what another GRU does
>>> layer, error = fusedrnn.GRU(2, 3, seed=0), []
>>> for chunk in tbptt.chunks(layer, x, k1=10, k2=30):                    # update every 10 steps, look 30 back
...     dy = chunk.y - target[chunk.start : chunk.stop]                   # the loss's gradient: here of half a square
...     error.append(float((dy**2).mean()))
...     grads = chunk.backward(dy / dy[..., 0].size)
...     for name, weight in layer.parameters.items():
...         weight -= grads[name]
>>> error[0] > 0.5, error[-1] < 0.02
(True, True)

The sequence is cut into chunks; the state goes from chunk to chunk, gradients do not. `k1` is how often an update
happens, `k2` (k1 if not given) is how far back gradients flow, both in steps:

- k2 == k1: chunks of k1 steps, one update each.
- k2 > k1: every chunk brings k1 new steps, and its gradients flow on to k2 steps before the chunk's end. The steps
  before the new ones are run again, with the weights as they are now, from the state that the window before had there:
  what `backward` returns is the exact gradient of the new steps' loss, cut at that point. Kept between chunks: k2 steps
  of x and one state. (A shorter last chunk whose end nobody could know, x being an iterable and lengths not given,
  reaches back to where a full one would have.)
- k2 < k1: the k1 steps of one update come as chunks of k2 steps or fewer; `backward` returns the sum of the weights'
  gradients since the last update, and `chunk.update` says when that sum is complete.

Every step's loss counts exactly once. The last chunk may be shorter and always has `update` set.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from . import arrays

__all__ = ["Chunk", "chunks"]


class Chunk:
    """Some new steps of the sequence, run forward; `backward` may be called once, before the next chunk is taken.

    start, stop   the new steps, counted from the beginning of the sequence
    y             the layer's output at these steps (shaped as the layer gives it)
    state         the state after the last of them
    lengths       how many of the new steps each row has, or None when all have all
    update        True when the gradients that `backward` returns are complete: time for the optimizer
    window        the first step that gradients flow back to: grads["x"] is for the steps window..stop, and
                  grads["state"] for the state before step `window`
    """

    def __init__(self, walk: "Walk", stop: int, split: int, update: bool) -> None:
        self.start, self.stop, self.update = walk.start, stop, update
        self.window = walk.first
        self.walk: Walk | None = walk
        axis = walk.steps.axis
        # A layer keeps the tape of its last call only, so the steps before `split` run on a shallow copy, which
        # shares the weights and has a tape of its own. `split` is where the next window begins.
        state = walk.state
        self.runs: list[tuple[Any, Any, int, int]] = []  # layer, its tape, first and last step
        outputs = []
        for begin, end in ((self.window, split), (split, stop)):
            if begin < end:
                layer = walk.layer if end == stop else copy.copy(walk.layer)
                lengths = walk.lengths_between(begin, end)
                options = {"lengths": lengths, "reset": walk.steps.reset(begin, end), "context": walk.context}
                y, state = layer(walk.steps.x(begin, end), state, **options)
                walk.layer.draws = layer.draws  # the next run draws another dropout mask
                self.runs.append((layer, layer._tape, begin, end))
                if end > self.start:
                    outputs.append(cut(y, axis, max(self.start - begin, 0), end - begin))
            if end == split:
                walk.state = state
        self.y = outputs[0] if len(outputs) == 1 else arrays.concatenate(outputs, axis)
        self.state = state
        self.lengths = walk.lengths_between(self.start, stop)

    def backward(self, dy: np.ndarray | None, dstate: Any = None) -> dict[str, Any]:
        """Gradients as `layer.backward` returns them, from dy (shaped as `y`) and dstate (shaped as `state`)."""
        walk = self.walk
        if walk is None:
            raise RuntimeError(
                "tbptt: backward was called twice, or after the next chunk was taken; "
                "expected one call for each chunk while it is the current one. Add the losses' dy before the call"
            )
        if dy is not None and np.shape(dy) != self.y.shape:
            raise ValueError(
                f"tbptt: dy has shape {np.shape(dy)}; expected {self.y.shape}, the shape of this chunk's y "
                f"(steps {self.start}..{self.stop})"
            )
        if any(layer._tape is not tape for layer, tape, _, _ in self.runs):
            raise RuntimeError(
                "tbptt: the layer was called, or given other parameters by load_state_dict, since this chunk was run; "
                "expected backward before that, because a layer keeps the tape of its last call only. "
                "Let copy.copy(layer) run what comes between"
            )
        self.walk = None
        sums, dxs = walk.sums, []
        for layer, _, begin, end in reversed(self.runs):
            grads = layer.backward(self.padded(dy, begin, end, walk.steps.axis), dstate)
            dstate = grads["state"]
            if "x" in grads:
                dxs.append(grads["x"])
            for name, gradient in grads.items():
                if name not in ("x", "state"):
                    if name in sums:
                        sums[name] += gradient
                    else:
                        sums[name] = gradient
        x = {}  # tokens have no gradient
        if dxs:
            x["x"] = dxs[0] if len(dxs) == 1 else arrays.concatenate(dxs[::-1], walk.steps.axis)
        if self.update:
            walk.sums = {}
        return {**x, "state": dstate, **sums}

    def padded(self, dy: np.ndarray | None, begin: int, end: int, axis: int) -> np.ndarray | None:
        """dy for the steps begin..end: the new steps' own, zero before them."""
        if dy is None or end <= self.start:
            return None
        own = cut(dy, axis, max(begin - self.start, 0), end - self.start)
        if begin >= self.start:
            return own
        shape = list(own.shape)
        shape[axis] = self.start - begin
        return arrays.concatenate([arrays.zeros(tuple(shape), own), own], axis)  # type: ignore[no-any-return]


def chunks(
    layer: Any,
    x: np.ndarray | Iterable[Any],
    *,
    k1: int,
    k2: int | None = None,
    state: Any = None,
    lengths: np.ndarray | None = None,
    reset: np.ndarray | None = None,
    context: np.ndarray | None = None,
) -> Iterator[Chunk]:
    """Walk through a long sequence: run it chunk by chunk, and give each `Chunk` out before the next is run.

    layer    an RNN, LSTM or GRU of one direction
    x        the whole sequence (T,B,I) (a memory map will do), shaped as the layer takes it (batch_first, unbatched,
             tokens); or any iterable of blocks of it, each with any number of steps, taken one by one when needed: a
             generator can so embed the next block with the weights after the last update. A block is x, or a
             pair (x, reset). Blocks must stay unchanged for the k2 steps in which they are used.
    state    the state before the first step (zero if not given)
    lengths  (B) steps of each row, counted from the beginning; steps that no row has are not run
    reset    shaped as the first two axes of x: where not zero, the row begins a new sequence at that step
    context  (B,K) for a layer with context_size K: the same at every step; its gradient adds up as the weights' do
    """
    k2 = k1 if k2 is None else k2
    for name, k in (("k1", k1), ("k2", k2)):
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
            raise ValueError(f"tbptt: {name} is {k!r}; expected a number of steps >= 1")
    if layer.bidirectional:
        raise ValueError(
            "tbptt: the layer is bidirectional; expected one direction, because the reverse direction begins at the "
            "end of the whole sequence. Use two layers, or full backpropagation"
        )
    return Walk("tbptt", layer, x, int(k1), int(k2), state, lengths, reset, context).run()


class Walk:
    """Where `chunks` is: what is kept from one chunk to the next. `op` reports errors: fusedrnn.rtrl walks too."""

    def __init__(
        self,
        op: str,
        layer: Any,
        x: Any,
        k1: int,
        k2: int,
        state: Any,
        lengths: Any,
        reset: Any,
        context: np.ndarray | None = None,
    ) -> None:
        self.layer, self.k1, self.k2, self.context = layer, k1, k2, context
        self.state = state  # before step `first`, where the next window begins
        self.first = self.start = 0  # `start` is the next new step
        self.sums: dict[str, np.ndarray] = {}  # gradients since the last update
        if reset is not None and not arrays.is_array(x):
            raise ValueError(f"{op}: reset is given beside an iterable x; expected (x, reset) pairs from the iterable")
        if isinstance(x, str | bytes | memoryview | Mapping) or not (arrays.is_array(x) or isinstance(x, Iterable)):
            raise TypeError(f"{op}: x is {arrays.kind(x)}; expected an array (T,B,I), or an iterable of blocks of it")
        blocks = [(x, reset)] if arrays.is_array(x) else x
        self.lengths = None if lengths is None else np.asarray(lengths)
        longest = None
        if self.lengths is not None:
            if self.lengths.dtype.kind not in "iu" or self.lengths.size and self.lengths.min() < 0:
                raise ValueError(f"{op}: lengths is {self.lengths}; expected integers >= 0, one for each row")
            longest = int(self.lengths.max(initial=0))
        self.steps = Steps(op, iter(blocks), layer.batch_first, longest)
        if arrays.is_array(x):
            self.steps.fetch(1 if longest is None else longest)  # refuses wrong shapes before the first chunk
            self.steps.longest = self.steps.end if longest is None else longest

    def run(self) -> Iterator[Chunk]:
        done = 0  # steps since the last update
        while True:
            stop = self.steps.fetch(self.start + min(self.k1 - done, self.k2))
            if stop == self.start:
                return
            done += stop - self.start
            # Looking ahead for the end never happens across an update: the next block may depend on it.
            update = done == self.k1 or self.steps.fetch(stop + 1) == stop
            split = stop
            if self.k2 > self.k1:
                split = min(max(self.steps.known(stop + self.k1) - self.k2, self.first), stop)
            chunk = Chunk(self, stop, split, update)
            yield chunk
            chunk.walk = None
            del chunk
            self.start, self.first = stop, split
            self.steps.forget(split)
            if update:
                done = 0

    def lengths_between(self, begin: int, end: int) -> np.ndarray | None:
        return None if self.lengths is None else np.clip(self.lengths.astype(np.int64) - begin, 0, end - begin)


class Steps:
    """The steps of the source that are still needed, as the blocks they came in."""

    def __init__(self, op: str, source: Iterator[Any], batch_first: bool, longest: int | None) -> None:
        self.op = op
        self.source, self.batch_first, self.longest = source, batch_first, longest
        self.axis = 0  # which axis counts the steps; known with the first block
        self.blocks: list[tuple[int, np.ndarray, np.ndarray | None]] = []  # first step, x, reset
        self.end = 0

    def known(self, stop: int) -> int:
        """`stop`, or where the sequence ends before it as far as is known."""
        return stop if self.longest is None else min(stop, self.longest)

    def fetch(self, stop: int) -> int:
        """Take blocks until step `stop - 1` is there; returns `stop`, or where the sequence ends before it."""
        stop = self.known(stop)
        while self.end < stop:
            block = next(self.source, None)
            if block is None:
                if self.longest is not None:
                    raise ValueError(f"{self.op}: x ended after {self.end} steps; expected {self.longest} from lengths")
                return self.end
            x, reset = block if isinstance(block, tuple) and len(block) == 2 else (block, None)
            if not arrays.is_array(x) or x.ndim < 1:
                raise TypeError(f"{self.op}: a block of x is {arrays.kind(x)}; expected (T,B,I), or a pair (x, reset)")
            marks = steps_and_rows(x)
            self.axis = 1 if self.batch_first and len(marks) == 2 else 0
            if reset is not None and np.shape(reset) != marks:
                raise ValueError(f"{self.op}: reset has shape {np.shape(reset)}; expected {marks} from x {x.shape}")
            self.blocks.append((self.end, x, reset))
            self.end += x.shape[self.axis]
        return stop

    def x(self, begin: int, end: int) -> np.ndarray:
        return self.joined([(t, x) for t, x, _ in self.blocks], begin, end)

    def reset(self, begin: int, end: int) -> np.ndarray | None:
        if all(reset is None for _, _, reset in self.blocks):
            return None
        none = np.zeros(1, np.uint8)
        marks = [
            np.broadcast_to(none, steps_and_rows(x))
            if reset is None
            else reset
            if arrays.is_array(reset)
            else np.asarray(reset)
            for _, x, reset in self.blocks
        ]
        return self.joined([(t, mark) for (t, _, _), mark in zip(self.blocks, marks, strict=True)], begin, end)

    def joined(self, blocks: list[tuple[int, np.ndarray]], begin: int, end: int) -> np.ndarray:
        """The steps begin..end, copied only where they lie in several blocks."""
        parts = [cut(a, self.axis, begin - t, end - t) for t, a in blocks if t < end and t + a.shape[self.axis] > begin]
        return parts[0] if len(parts) == 1 else arrays.concatenate(parts, self.axis)

    def forget(self, begin: int) -> None:
        self.blocks = [block for block in self.blocks if block[0] + block[1].shape[self.axis] > begin]


def steps_and_rows(x: np.ndarray) -> tuple[int, ...]:
    """The shape of x without its features, which tokens have none of."""
    tokens = isinstance(x, np.ndarray) and x.dtype.kind in "iu"
    return tuple(x.shape) if tokens else tuple(x.shape[:-1])


def cut(array: np.ndarray, axis: int, begin: int, end: int) -> np.ndarray:
    begin = max(begin, 0)
    return array[begin:end] if axis == 0 else array[:, begin:end]
