# SPDX-License-Identifier: Apache-2.0
"""The short way of an ordinary eager call: from the module to C++ and back, one autograd node, no torch operator.

It takes what is plain (CPU tensors, no transform, no mode, no autocast, the native backend) and returns None for all
else, which then goes through `functional`. Second derivatives of what ran here come from the operators' rules.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import backends, config
from . import operators
from .how import How

_native: Any = backends.load("native")


def _set_up() -> bool:
    interface = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if _native is None or interface is None:
        return False
    return bool(_native.torch_setup(interface, Tensor, torch.nn.Parameter))


_open = _set_up()


class _NotPlain(Exception):
    """C++ found something out of the ordinary."""


class FusedRNN(torch.autograd.Function):
    """What an ordinary training step needs, no more: the rules for transforms are in `operators`."""

    @staticmethod
    def forward(ctx: Any, settings: Any, x: Any, h0: Any, c0: Any, *weights: Any) -> Any:
        outputs = _native.torch_forward(settings, x, h0, c0, weights, True)
        if outputs is None:
            raise _NotPlain
        y, hn, cn, tape = outputs
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, h0, c0, tape, *weights)
        return y, hn, cn

    @staticmethod
    def backward(ctx: Any, dy: Any, dhn: Any, dcn: Any) -> Any:
        x, h0, c0, tape, *weights = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if not torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
            wanted = 0
            for n, need in enumerate(needs[1:]):
                wanted |= need << n
            gradients = _native.torch_backward(ctx.settings, x, h0, c0, weights, tape, dy, dhn, dcn, wanted)
            if gradients is not None:
                return None, *gradients
        return None, *_differentiable(ctx.settings, x, h0, c0, weights, tape, dy, dhn, dcn, needs[1:])


_apply = super(torch.autograd.Function, FusedRNN).apply  # without torch's look at transforms: `call` had one


def call(settings: Any, x: Any, h0: Any, c0: Any, weights: Any) -> Any:
    """(y or None, h_n, c_n or None); None where the call is not plain. `settings`: see torch_forward in _core.pyi."""
    if (
        not _open
        or len(weights) > operators.MOST_WEIGHTS
        or type(x) is not Tensor
        or config.backend not in (None, "native")
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack()
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._is_any_autocast_enabled()
        or torch._C._get_tracing_state() is not None
    ):
        return None
    if torch.is_grad_enabled() and torch._C._any_requires_grad(x, h0, c0, *weights):
        try:
            return _apply(settings, x, h0, c0, *weights)
        except _NotPlain:
            return None
    if x.dtype is torch.bfloat16:
        return _bfloat16(settings, x, h0, c0, weights)
    outputs = _native.torch_forward(settings, x, h0, c0, weights, False)
    return None if outputs is None else outputs[:3]


def _bfloat16(settings: Any, x: Any, h0: Any, c0: Any, weights: Any) -> Any:
    """Inference with W and R as they are stored; all else is widened here, and what comes out is rounded once."""
    if any(t is not None and t.dtype is not torch.bfloat16 for t in (h0, c0, *weights)):
        return None
    per = 4 if settings[3] else 2  # W, R and, with bias, two vectors
    widened = [w if n % per < 2 else w.float() for n, w in enumerate(weights)]
    states = (None if t is None else t.float() for t in (h0, c0))
    outputs = _native.torch_forward(settings, x.float(), *states, widened, False)
    return None if outputs is None else tuple(None if t is None else t.bfloat16() for t in outputs[:3])


def _differentiable(
    settings: Any, x: Any, h0: Any, c0: Any, weights: Any, tape: Any, dy: Any, dhn: Any, dcn: Any, needs: Any
) -> Any:
    """The gradients, as functions of all that goes in."""
    cell, layers, directions, bias, is_cell, batch_first, recompute, clip_cell, clip_grad = settings
    lstm = cell == "lstm"
    kept = [n for n in range(len(needs)) if lstm or n != 2]  # no c
    want = "".join("1" if needs[n] else "0" for n in kept)
    how = How(cell, layers, directions, bias, False, False, recompute, clip_cell, clip_grad, True, want=want)
    batched = x.dim() == (2 if is_cell else 3)

    def sequence(t: Any) -> Any:
        if t is None:
            return None
        if is_cell:
            return t[None, None] if batched else t[None, None, None]
        if not batched:
            return t[:, None, None]
        return (t.transpose(0, 1) if batch_first else t).unsqueeze(1)

    def state(t: Any) -> Any:
        if t is None:
            return None
        t = t if batched else t.unsqueeze(-2)
        return t[None, None] if is_cell else t.unsqueeze(1)

    p = [sequence(x), state(h0), *([state(c0)] if lstm else []), *(w.unsqueeze(0) for w in weights)]
    g = [sequence(dy), state(dhn), *([state(dcn)] if lstm else []), None]
    values = iter(operators.apply("backward", how, None, None, *p, tape, *g))
    shapes = [x.shape, *(None if t is None else t.shape for t in (h0, c0)), *(w.shape for w in weights)]
    results: list[Any] = []
    for n, need in enumerate(needs):
        value = next(values) if need and n in kept else None
        if value is not None:
            if n == 0 and batched and batch_first and not is_cell:
                value = value.squeeze(1).transpose(0, 1)
            value = value.reshape(shapes[n])
        results.append(value)
    return results
