# SPDX-License-Identifier: Apache-2.0
"""The operations on CUDA tensors: the CUDA backend on torch's current stream, with torch's memory.

Off unless `use_cuda_kernels` or FUSEDRNN_TORCH_CUDA=1 says otherwise, because no GPU has run these kernels yet, and
torch.nn, which runs instead, is known to be right there. float32 is multiplied as TF32 where torch lets cuDNN do so.
jvp and hvp (and so second derivatives) run on the kernels in float32 (always strict) and float64; those of 16-bit
tensors take torch's own operators.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import backends
from ..arrays import DeviceArray
from ..backends import Problem, Results
from . import composite, gate, kernels
from .how import How
from .tape import cuda_length

Tensors = Sequence[Tensor | None]

_on = os.environ.get("FUSEDRNN_TORCH_CUDA") == "1"


def use_cuda_kernels(on: bool) -> None:
    """Whether modules and functions run CUDA tensors on the CUDA kernels from now on, where this build has them.

    >>> fusedrnn.torch.use_cuda_kernels(False)
    """
    global _on
    _on = bool(on)


def why_not() -> str:
    """Why CUDA tensors do not come here; "" if they do."""
    if not _on:
        return "no kernels for cuda (fusedrnn.torch.use_cuda_kernels(True) switches them on)"
    return "" if backends.load("cuda") else f"no kernels for cuda ({backends.missing('cuda')})"


class TensorArray(DeviceArray):
    """A tensor as kernels see it."""

    __slots__ = ()

    def new(self, shape: tuple[int, ...], dtype: Any) -> DeviceArray:
        kinds: dict[str, torch.dtype] = {"uint8": torch.uint8, "float64": torch.float64}
        return seen(torch.empty(shape, dtype=kinds[np.dtype(dtype).name], device=self.owner.device))

    def current_stream(self) -> int:
        return _stream(self.owner)


def _stream(tensor: Tensor) -> int:
    return int(torch.cuda.current_stream(tensor.device).cuda_stream) if tensor.is_cuda else 0


def seen(tensor: Tensor, kind: str = "") -> TensorArray:
    size = tensor.element_size()
    return TensorArray(
        tensor,
        tensor.data_ptr(),
        tuple(tensor.shape),
        tuple(step * size for step in tensor.stride()),
        kind or str(tensor.dtype).partition(".")[2],
        size,
        _stream(tensor),
    )


class DeviceCall(kernels.TensorCall):
    """The same call with its tensors where they are, in the type that they have."""

    def __init__(self, how: How, p: Tensors, extra: Tensors, axes: Sequence[int], lengths: Any, reset: Any) -> None:
        super().__init__(how, p, extra, axes, None, None)
        if lengths is not None:
            lengths = gate.values(how.cell, "lengths", lengths)
        if reset is not None:
            reset = gate.values(how.cell, "reset", reset)
        for given, axis in ((lengths, 0), (reset, 1)):
            if given is not None and given.shape[axis] != self.E and given.shape[axis] != 1:
                super().__init__(how, p, (*extra, given), (*axes, axis), None, None)
        problem: Any = self.problem
        if lengths is not None:
            problem.lengths = seen(kernels.spread(lengths, 0, self.E), "int64")
        if reset is not None:
            problem.reset = seen(kernels.spread(reset, 1, self.E), "uint8")

    def array(self, tensor: Tensor | None, axis: int, name: str) -> Any:
        if tensor is None:
            return None
        return seen(kernels.spread(gate.values(self.how.cell, name, tensor), axis, self.E))

    def new_results(self) -> tuple[list[Tensor], Results]:
        shapes = kernels.result_shapes(self.how, self.problem)
        tensors = [torch.empty(shape, dtype=self.dtype, device=self.p.x.owner.device) for shape in shapes]
        return tensors, self._results([seen(tensor) for tensor in tensors])

    def new_arguments(self, p: Tensors) -> tuple[list[Tensor], Any]:
        tensors: list[Tensor] = []
        arrays: list[Any] = []
        shapes = kernels.argument_shapes(self.how, self.problem)
        for wanted, tensor, axis, shape in zip(self.how.want, p, self.how.argument_axes, shapes, strict=True):
            if wanted == "0":
                arrays.append(None)
                continue
            if not self.how.each and tensor is not None and tensor.shape[axis] == 1:
                shape = (*shape[:axis], 1, *shape[axis + 1 :])
            tensors.append(torch.empty(shape, dtype=self.dtype, device=self.p.x.owner.device))
            arrays.append(seen(kernels.spread(tensors[-1], axis, self.E)))
        return tensors, self._pack(arrays)


def _tf32() -> bool:
    cudnn: Any = torch.backends.cudnn
    rnn: Any = getattr(cudnn, "rnn", None)  # torch 2.9 or later
    return bool(cudnn.allow_tf32 if rnn is None else rnn.fp32_precision == "tf32")


def _new_tape(call: DeviceCall) -> Tensor:
    problem: Problem = call.problem
    length = cuda_length(call.how, problem.T, problem.B, problem.H, call.dtype)
    return torch.empty((call.E, length), dtype=call.kind, device=call.p.x.owner.device)


def _forward(call: DeviceCall, out: Results, tape: Tensor) -> None:
    backend: Any = backends.choose(on_cuda=True)
    backend.forward(call.problem, call.p, out, seen(tape) if tape.numel() else None, tf32=_tf32())


def forward(how: How, lengths: Any, reset: Any, p: Tensors) -> tuple[Tensor, ...]:
    call = DeviceCall(how, p, (), (), lengths, reset)
    tensors, out = call.new_results()
    tape = _new_tape(call)
    _forward(call, out, tape)
    return (*tensors, tape)


def backward(how: How, lengths: Any, reset: Any, p: Tensors, tape: Tensor | None, g: Tensors) -> tuple[Tensor, ...]:
    call = DeviceCall(how, p, g, how.result_axes, lengths, reset)
    tensors, out = call.new_arguments(p)
    if tape is None or tape.shape[0] != call.E or not tape.numel():
        call.how = call.how.but(tape=True)
        tape = _new_tape(call)
        _forward(call, Results(), tape)
    backend: Any = backends.choose(on_cuda=True)
    backend.backward(call.problem, call.p, seen(tape.contiguous()), call.given(g), out, tf32=_tf32())
    return tuple(tensors)


def jvp(how: How, lengths: Any, reset: Any, p: Tensors, v: Tensors) -> tuple[Tensor, ...]:
    call = DeviceCall(how, p, v, how.argument_axes, lengths, reset)
    tensors, out = call.new_results()
    backend: Any = backends.choose(on_cuda=True)
    backend.jvp(call.problem, call.p, call.arguments(v, "tangent of "), out)
    return tuple(tensors)


def hvp(how: How, lengths: Any, reset: Any, p: Tensors, v: Tensors, g: Tensors, t: Tensors) -> tuple[Tensor, ...]:
    call = DeviceCall(how, p, (*v, *g, *t), (*how.argument_axes, *how.result_axes, *how.result_axes), lengths, reset)
    tensors, out = call.new_arguments(p)
    backend: Any = backends.choose(on_cuda=True)
    backend.hvp(call.problem, call.p, call.arguments(v, "tangent of "), call.given(g), call.given(t), out)
    return tuple(tensors)


def dtype_of(p: Tensors) -> torch.dtype:
    assert p[0] is not None
    return p[0].dtype


def run(name: str, how: How, lengths: Any, reset: Any, parts: Sequence[Tensors]) -> tuple[Tensor, ...]:
    """An operation, as kernels has it."""
    if name == "forward":
        return forward(how, lengths, reset, parts[0])
    if name == "backward":
        p, (tape,), g = parts
        return backward(how, lengths, reset, p, tape, g)
    if dtype_of(parts[0]) in (torch.float32, torch.float64):
        tangents: Any = jvp if name == "jvp" else hvp
        return tangents(how, lengths, reset, *parts)  # type: ignore[no-any-return]
    backends.log.info("cuda: %s has no CUDA kernel: torch's own operators", name)
    operation: Any = composite.jvp if name == "jvp" else composite.hvp
    result: tuple[Tensor, ...] = operation(how, lengths, reset, *parts)
    return result
