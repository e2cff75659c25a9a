# SPDX-License-Identifier: Apache-2.0
"""The four operations on CPU tensors: views for a backend, memory for what it writes. See `how` for the tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import backends
from ..backends import Arguments, Problem, Results, Variant
from . import gate
from .how import How
from .tape import computing, length

Tensors = Sequence[Tensor | None]

_LSTM = (("Sigmoid", 0.0, 0.0), ("Tanh", 0.0, 0.0), ("Tanh", 0.0, 0.0))  # activations as usual

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def extent(tensors: Tensors, axes: Sequence[int]) -> Any:
    """E of a call: the extent that is not 1."""
    for tensor, axis in zip(tensors, axes, strict=True):
        if tensor is not None and tensor.shape[axis] != 1:
            return tensor.shape[axis]
    return 1


def spread(tensor: Tensor, axis: int, E: Any) -> Tensor:
    """The tensor with E weight sets: a view."""
    if tensor.shape[axis] == E:
        return tensor
    shape = list(tensor.shape)
    shape[axis] = E
    return tensor.expand(shape)


class Sizes(NamedTuple):
    """Sizes that may be symbolic."""

    T: Any
    E: Any
    B: Any
    I: Any  # noqa: E741
    H: Any


class TensorCall:
    """One call: the problem, and how its tensors become arrays."""

    def __init__(
        self,
        how: How,
        p: Tensors,
        extra: Tensors,
        extra_axes: Sequence[int],
        lengths: Any,
        reset: Any,
        bf16_weights: bool = False,
    ) -> None:
        x, R = p[0], p[how.states + 2]
        assert x is not None and R is not None
        self.how = how
        self.dtype, self.kind = x.dtype, computing(x.dtype)
        self.E = extent((*p, *extra), (*how.argument_axes, *extra_axes))
        if lengths is not None:
            self.E = max(self.E, lengths.shape[0])
        if reset is not None:
            self.E = max(self.E, reset.shape[1])
        T, _, B, I = x.shape  # noqa: E741
        self.problem = Problem(
            how.cell,
            T,
            self.E,
            B,
            I,
            R.shape[-2] // how.facts.gates,
            how.layers,
            how.directions,
            reverse=how.reverse,
            reset_to_initial=how.reset_to_initial,
            recompute=how.recompute,
            clip_cell=how.clip_cell,
            clip_grad=how.clip_grad,
            bf16_weights=bf16_weights,
            variant=Variant(_LSTM, how.proj_size) if how.proj_size else None,
        )
        if lengths is not None:
            self.problem.lengths = _lengths(gate.array(how.cell, "lengths", spread(lengths, 0, self.E)), T)
        if reset is not None:
            self.problem.reset = gate.array(how.cell, "reset", spread(reset, 1, self.E))
        self.p = self.arguments(p)

    def array(self, tensor: Tensor | None, axis: int, name: str) -> Any:
        """A view (16-bit: a wider copy) for reading."""
        if tensor is None:
            return None
        tensor = gate.values(self.how.cell, name, tensor)
        tensor = tensor if tensor.dtype is self.kind else tensor.to(self.kind)  # a cast to the same takes 0.4 us
        return spread(tensor, axis, self.E).numpy()

    def arguments(self, p: Tensors, prefix: str = "") -> Arguments:
        """Of all p, or of tangents of p: each may be None."""
        first, per = 1 + self.how.states, self.how.per_layer
        arrays: list[Any] = []
        for n, (tensor, axis, name) in enumerate(zip(p, self.how.argument_axes, self.how.argument_names, strict=True)):
            half = self.problem.bf16_weights and n >= first and (n - first) % per < 2
            arrays.append((self._bits if half else self.array)(tensor, axis, prefix + name))
        return self._pack(arrays)

    def _bits(self, weight: Tensor | None, axis: int, name: str) -> np.ndarray:
        """A view of a bfloat16 weight as the kernels take it: NumPy has no such numbers."""
        assert weight is not None
        weight = gate.values(self.how.cell, name, weight)
        return spread(weight.view(torch.int16), axis, self.E).numpy().view(np.uint16)

    def _pack(self, arrays: list[Any]) -> Arguments:
        states = self.how.states
        per = self.how.per_layer
        sets = [arrays[n : n + per] for n in range(1 + states, len(arrays), per)]
        extras: list[Any] = []
        if self.how.proj_size:
            extras = [(each.pop(), None, None, None, None, None) for each in sets]
        weights = [(*each, None, None)[:4] for each in sets]
        return Arguments(arrays[0], arrays[1], arrays[2] if states == 2 else None, weights, extras=extras)

    def given(self, g: Tensors) -> Results:
        """Cotangents of the results, or tangents of those: each may be None."""
        parts = zip(g, self.how.result_axes, self.how.result_names, strict=True)
        return self._results([self.array(tensor, axis, f"d{name}") for tensor, axis, name in parts])

    def _results(self, arrays: list[Any]) -> Results:
        cells = arrays[-1] if self.how.cells else None
        return Results(arrays[0], arrays[1], arrays[2] if self.how.states == 2 else None, cells)

    def new_results(self) -> tuple[list[Tensor], Results]:
        """Memory for all results, and the views of it."""
        tensors = [torch.empty(shape, dtype=self.kind) for shape in result_shapes(self.how, self.problem)]
        return tensors, self._results([gate.array(self.how.cell, "a result", tensor) for tensor in tensors])

    def new_arguments(self, p: Tensors) -> tuple[list[Tensor], Arguments]:
        """Memory for the wanted gradients, and the views of it: what all weight sets share gets their sum."""
        tensors: list[Tensor] = []
        arrays: list[Any] = []
        for wanted, tensor, axis, shape in zip(
            self.how.want, p, self.how.argument_axes, argument_shapes(self.how, self.problem), strict=True
        ):
            if wanted == "0":
                arrays.append(None)
                continue
            if not self.how.each and tensor is not None and tensor.shape[axis] == 1:
                shape = (*shape[:axis], 1, *shape[axis + 1 :])
            tensors.append(torch.empty(shape, dtype=self.kind))
            arrays.append(gate.array(self.how.cell, "a gradient", spread(tensors[-1], axis, self.E)))
        return tensors, self._pack(arrays)

    def stored(self, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        """What was written, in the caller's dtype."""
        return tuple(tensors if self.dtype is self.kind else [tensor.to(self.dtype) for tensor in tensors])


def _lengths(lengths: np.ndarray, T: int) -> np.ndarray:
    if lengths.size and not (lengths.min() >= 0 and lengths.max() <= T):
        raise ValueError(f"lengths: got {lengths.min()}..{lengths.max()}; expected 0 <= length <= T = {T}")
    return lengths


def result_shapes(how: How, problem: Any) -> list[tuple[Any, ...]]:
    """Shapes of all results; `problem` has the sizes."""
    T, E, B, H = problem.T, problem.E, problem.B, problem.H
    S, D, P = how.layers * how.directions, how.directions, how.proj_size or H
    shapes: list[tuple[Any, ...]] = [(T, E, B, D * P), (S, E, B, P), (S, E, B, H)][: 1 + how.states]
    return [*shapes, (how.layers, T, E, B, D * H)] if how.cells else shapes


def argument_shapes(how: How, problem: Any) -> list[tuple[Any, ...]]:
    """Shapes of all p with E weight sets."""
    T, E, B, I, H = problem.T, problem.E, problem.B, problem.I, problem.H  # noqa: E741
    GH, S, P = how.facts.gates * H, how.layers * how.directions, how.proj_size or H
    shapes: list[tuple[Any, ...]] = [(T, E, B, I), (S, E, B, P), (S, E, B, H)][: 1 + how.states]
    for layer in range(how.layers):
        inputs = I if layer == 0 else how.directions * P
        for _ in range(how.directions):
            shapes += [(E, GH, inputs), (E, GH, P)]
            shapes += [(E, GH), (E, GH)] if how.bias else []
            shapes += [(E, P, H)] if how.proj_size else []
    return shapes


def _new_tape(call: TensorCall) -> Tensor:
    problem = call.problem
    return torch.empty((call.E, length(call.how, problem.T, problem.B, problem.H)), dtype=call.kind)


def _run_forward(call: TensorCall, out: Results, tape: Tensor) -> None:
    backend: Any = backends.choose()
    flat = None
    if tape.numel():
        flat = gate.array(call.how.cell, "the tape", tape).reshape(-1)
        flat[-1] = backends.NAMES.index(backend.__name__.rpartition(".")[2])
        if backend.tape_elements(call.problem) >= flat.size:
            raise RuntimeError(f"fusedrnn: {backend.__name__}'s tape is longer than torch/tape.py says")
        flat = flat[:-1]
    backend.forward(call.problem, call.p, out, flat)


def forward(how: How, lengths: Any, reset: Any, p: Tensors) -> tuple[Tensor, ...]:
    """The results and the tape (empty unless how.tape)."""
    assert p[0] is not None
    plain = not (how.tape or how.proj_size)
    half = p[0].dtype == torch.bfloat16 and plain and backends.choose() is backends.load("native")
    call = TensorCall(how, p, (), (), lengths, reset, half)
    tensors, out = call.new_results()
    tape = _new_tape(call)
    _run_forward(call, out, tape)
    return (*call.stored(tensors), tape)


def backward(how: How, lengths: Any, reset: Any, p: Tensors, tape: Tensor | None, g: Tensors) -> tuple[Tensor, ...]:
    """The wanted gradients. Without a tape that fits, forward runs again."""
    call = TensorCall(how, p, g, how.result_axes, lengths, reset)
    tensors, out = call.new_arguments(p)
    if tape is None or tape.shape[0] != call.E or not tape.numel():
        call.how = how.but(tape=True)
        tape = _new_tape(call)
        call.how = how
        _run_forward(call, Results(), tape)
    flat = gate.array(how.cell, "the tape", tape).reshape(-1)
    backend: Any = backends.load(backends.NAMES[int(flat[-1])])
    backend.backward(call.problem, call.p, flat[:-1], call.given(g), out)
    return call.stored(tensors)


def _tangents(how: How) -> Any:
    """The backend of tangents: those of a projection are the reference's."""
    if how.proj_size:
        backends.log.info("tangents of a projection run on the reference")
        return backends.load("reference")
    return backends.choose()


def jvp(how: How, lengths: Any, reset: Any, p: Tensors, v: Tensors) -> tuple[Tensor, ...]:
    """Tangents of the results along v."""
    call = TensorCall(how, p, v, how.argument_axes, lengths, reset)
    tensors, out = call.new_results()
    backend = _tangents(how)
    backend.jvp(call.problem, call.p, call.arguments(v, "tangent of "), out)
    return call.stored(tensors)


def hvp(
    how: How, lengths: Any, reset: Any, p: Tensors, v: Tensors, g: Tensors, t: Tensors, tout: bool = False
) -> tuple[Tensor, ...]:
    """Tangents of the wanted gradients, along v of p and t of g; with tout then what jvp returns, in the same pass."""
    axes = (*how.argument_axes, *how.result_axes, *how.result_axes)
    call = TensorCall(how, p, (*v, *g, *t), axes, lengths, reset)
    tensors, out = call.new_arguments(p)
    more, results = call.new_results() if tout else ([], None)
    backend = _tangents(how)
    backend.hvp(call.problem, call.p, call.arguments(v, "tangent of "), call.given(g), call.given(t), out, results)
    return call.stored([*tensors, *more])
