# SPDX-License-Identifier: Apache-2.0
"""A call as ONNX's operators LSTM, GRU and RNN, for both exporters of torch.onnx: one node for each layer.

The exporters fold what reorders the weights into initializers. Sizes stay free: T and B of the model are those of its
inputs. What ONNX has no attribute for raises ValueError.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import composite, private
from .how import How, read

_GATES: dict[str, tuple[int, ...]] = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}
"""ONNX's gates iofc and zrh, as places among torch's ifgo and rzn."""

_OPS: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm": ("LSTM", {}),
    "gru": ("GRU", {"linear_before_reset": 1}),
    "gru_reset_before": ("GRU", {"linear_before_reset": 0}),
    "rnn_tanh": ("RNN", {}),
    "rnn_relu": ("RNN", {"activations": ["Relu"]}),  # of each direction
}


def writing() -> bool:
    """Whether torch.onnx exports now."""
    return "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export()


def write(
    how: How,
    x: Tensor,
    states: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, ...]:
    """All results, from x (T,B,I) and the rest without an axis E. No dropout: ONNX's models are for inference."""
    missing = {
        "reset": reset is not None,
        "return_cells": how.cells,
        "clip_cell": how.clip_cell,
        "proj_size": how.proj_size,
    }
    for name, given in missing.items():
        if given:
            raise ValueError(
                f"torch.onnx.export: {name} is set; expected none, because ONNX's {_op(how)} has no counterpart. "
                "Export a model that does without it."
            )
    rows = None if lengths is None else lengths.to(torch.int32)
    y, *states = (_of_type(t, weights[0].dtype) for t in (x, *states))
    D, finals = how.directions, []
    for layer in range(how.layers):
        part = slice(layer * D, (layer + 1) * D)
        first = [s if s is None or how.layers == 1 else s[part] for s in states]
        own = weights[layer * D * how.per_layer : (layer + 1) * D * how.per_layer]
        y, *final = _node(how, y, *_onnx_weights(how, own), rows, first)
        y = y.squeeze(1) if D == 1 else torch.cat([y.select(1, 0), y.select(1, 1)], -1)
        if lengths is not None:  # runtimes give a row of length 0 zeros, not its initial state
            none = lengths.eq(0).unsqueeze(-1)
            final = [a if b is None else torch.where(none, b, a) for a, b in zip(final, first, strict=True)]
        finals.append(final)
    return (y, *(parts[0] if how.layers == 1 else torch.cat(parts) for parts in zip(*finals, strict=True)))


def written(how: How, lengths: Any, reset: Any, p: Sequence[Any]) -> tuple[Tensor, ...]:
    """The same with the axes E of an operator's tensors, and its empty tape: for programs exported before."""
    axes = how.argument_axes
    if any(t is not None and t.shape[axis] != 1 for t, axis in zip(p, axes, strict=True)):
        raise ValueError("torch.onnx.export: the program runs several models in one call (vmap); expected one model")
    one: list[Any] = [None if t is None else t.squeeze(axis) for t, axis in zip(p, axes, strict=True)]
    x, states, weights = one[0], one[1 : 1 + how.states], one[1 + how.states :]
    results = write(how, x, states, weights, None if lengths is None else lengths.squeeze(0), reset)
    return (*(t.unsqueeze(axis) for t, axis in zip(results, how.result_axes, strict=True)), x.new_empty(0))


def _of_type(tensor: Any, dtype: torch.dtype) -> Any:
    """Under autocast types differ; a cast that changes nothing would be a node all the same."""
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


def _op(how: How) -> str:
    return _OPS[how.cell][0]


def _attributes(how: How, hidden_size: int) -> dict[str, Any]:
    direction = "bidirectional" if how.directions == 2 else "reverse" if how.reverse else "forward"
    own = _OPS[how.cell][1]
    own = {name: value * how.directions if isinstance(value, list) else value for name, value in own.items()}
    return {"hidden_size": hidden_size, "direction": direction, **own}


def _onnx_weights(how: How, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    """W (D,G*H,I), R (D,G*H,H) and B (D,2*G*H) of one layer, from torch's."""
    order, per = _GATES[_op(how)], how.per_layer

    def sorted_gates(weight: Tensor) -> Tensor:
        H = weight.shape[0] // len(order)
        gates = [weight[n * H : (n + 1) * H] for n in order]  # slices: the exporters do not fold chunk
        return torch.cat(gates) if len(order) > 1 else weight

    W, R, *biases = (torch.stack([sorted_gates(w) for w in weights[n::per]]) for n in range(per))
    return W, R, torch.cat(biases, 1) if biases else None


def _torch_weights(how: How, W: Tensor, R: Tensor, B: Tensor | None) -> list[Tensor]:
    """The way back, with an axis E in front."""
    order = _GATES[_op(how)]
    kinds = [W, R, *(() if B is None else B.chunk(2, 1))]
    back = [torch.cat([kind.chunk(len(order), 1)[order.index(n)] for n in range(len(order))], 1) for kind in kinds]
    return [kind[d : d + 1] for d in range(how.directions) for kind in back]


def _node(how: How, x: Tensor, W: Tensor, R: Tensor, B: Any, lengths: Any, states: Sequence[Any]) -> Sequence[Tensor]:
    """Y (T,D,B,H), Y_h (D,B,H) and, of an LSTM, Y_c."""
    inputs = (x, W, R, B, lengths, *states)
    if private.tracing_state() is not None:
        with torch.no_grad():
            outputs: tuple[Tensor, ...] = _Node.apply(how.text, *inputs)  # type: ignore[no-untyped-call]
        return outputs
    T, rows, H = x.shape[0], x.shape[1], R.shape[-1]
    results = 1 + how.states
    return torch.onnx.ops.symbolic_multi_out(
        _op(how),
        inputs,
        _attributes(how, H),
        dtypes=[x.dtype] * results,
        shapes=[(T, how.directions, rows, H)] + [(how.directions, rows, H)] * how.states,
        version=22 if x.dtype == torch.bfloat16 else 14,  # nothing else has changed since 14
    )


class _Node(torch.autograd.Function):
    """What the exporter that traces turns into a node. It has the values too: whoever traces may look at them."""

    @staticmethod
    def forward(ctx: Any, text: str, x: Any, W: Any, R: Any, B: Any, lengths: Any, *states: Any) -> Any:
        how = read(text).but(layers=1)
        with _paused():
            first = [None if s is None else s.unsqueeze(1) for s in states]
            rows = None if lengths is None else lengths.unsqueeze(0)
            p = [x.unsqueeze(1), *first, *_torch_weights(how, W, R, B)]
            y, *final = (t.squeeze(1) for t in composite.forward(how, rows, None, p))
            return (y.unflatten(-1, (how.directions, -1)).transpose(1, 2), *final)

    @staticmethod
    def symbolic(g: Any, text: str, *inputs: Any) -> Any:
        how = read(text)
        absent = private.set_absent(g.op("prim::Constant"))
        given = [absent if value is None else value for value in inputs]
        H = inputs[2].type().sizes()[-1]
        attributes = {f"{k}_{'i' if isinstance(v, int) else 's'}": v for k, v in _attributes(how, H).items()}
        return g.op(_op(how), *given, outputs=1 + how.states, **attributes)


@contextmanager
def _paused() -> Iterator[None]:
    """torch.jit's tracer does not see what happens inside."""
    state = private.tracing_state()
    private.set_tracing_state(None)
    try:
        yield
    finally:
        private.set_tracing_state(state)
