# SPDX-License-Identifier: Apache-2.0
"""The short way of an ordinary eager call: from the module to C++ and back, one autograd node, no torch operator.

It takes what is plain (CPU tensors, at most one vmap, no mode, no autocast, the native backend) and returns None for
all else, which then goes through `functional`. Second derivatives of what ran here come from the operators' rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import config
from . import gate, operators, private
from .how import How
from .private import any_requires_grad, pack_padded, pad_packed, transforms_active, unusual

_native = gate.native
_open = gate.is_open


class _NotPlain(Exception):
    """C++ found something out of the ordinary."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A module's call: what it is, and how its tensors lie."""

    how: How
    is_cell: bool = False
    batch_first: bool = False
    packed: bool = False
    models: int = 0
    each: int = 0

    @cached_property
    def native(self) -> tuple[Any, ...]:
        """As C++ takes them: see torch_forward in _core.pyi, which knows each by its place."""
        how = self.how
        what = how.cell, how.layers, how.directions, bool(how.bias)
        form = bool(self.is_cell), bool(self.batch_first), bool(how.recompute), how.clip_cell, how.clip_grad
        return *what, *form, bool(self.packed), self.models, self.each

    def has_models(self, n: int) -> bool:
        """Whether the n-th of x, h0, c0 and the weights has the axis of models in front."""
        return bool(self.each >> n & 1)


class FusedRNN(torch.autograd.Function):
    """What an ordinary training step needs, no more: the rules for transforms are in `operators`."""

    @staticmethod
    def forward(ctx: Any, settings: Settings, lengths: Any, x: Any, h0: Any, c0: Any, *weights: Any) -> Any:
        outputs = _native.torch_forward(settings.native, x, h0, c0, weights, lengths, True)
        if outputs is None:
            raise _NotPlain
        y, hn, cn, tape = outputs
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(lengths, x, h0, c0, tape, *weights)
        return y, hn, cn

    @staticmethod
    def backward(ctx: Any, dy: Any, dhn: Any, dcn: Any) -> Any:
        lengths, x, h0, c0, tape, *weights = ctx.saved_tensors
        needs = ctx.needs_input_grad[2:]
        if not torch.is_grad_enabled() and not transforms_active():
            wanted = 0
            for n, need in enumerate(needs):
                wanted |= need << n
            gradients = _native.torch_backward(
                ctx.settings.native, x, h0, c0, weights, lengths, tape, dy, dhn, dcn, wanted
            )
            if gradients is not None:
                return None, None, *gradients
        return None, None, *_differentiable(ctx.settings, (x, h0, c0, *weights), lengths, tape, (dy, dhn, dcn), needs)


_apply = super(torch.autograd.Function, FusedRNN).apply  # without torch's look at transforms: `call` had one


def call(settings: Settings, x: Any, h0: Any, c0: Any, weights: Any, lengths: Any = None) -> Any:
    """(y or None, h_n, c_n or None); None where the call is not plain. lengths: int64 (B,), or what lives at each step
    of a packed x. One vmap may be at work: its models become one call."""
    if (
        not _open
        or len(weights) > operators.MOST_WEIGHTS
        or type(x) is not Tensor
        or config.backend not in (None, "native")
        or unusual()
    ):
        return None
    if transforms_active():
        return None if settings.packed else _models(settings, x, h0, c0, weights, lengths)
    return _run(settings, x, h0, c0, weights, lengths)


def _run(settings: Settings, x: Any, h0: Any, c0: Any, weights: Any, lengths: Any) -> Any:
    if torch.is_grad_enabled() and any_requires_grad(x, h0, c0, *weights):
        try:
            return _apply(settings, lengths, x, h0, c0, *weights)
        except _NotPlain:
            return None
    if x.dtype is torch.bfloat16:
        return _bfloat16(settings, x, h0, c0, weights, lengths)
    outputs = _native.torch_forward(settings.native, x, h0, c0, weights, lengths, False)
    return None if outputs is None else outputs[:3]


def _models(settings: Settings, x: Any, h0: Any, c0: Any, weights: Any, lengths: Any) -> Any:
    """Under one vmap and nothing else: tensors with its axis in front, and back."""
    if private.transform_depth() != 1 or (lengths is not None and type(lengths) is not Tensor):
        return None
    vmap = private.innermost_vmap()
    if vmap is None:
        return None
    level, size = vmap
    if lengths is not None and private.is_batched(lengths):
        return None
    each = 0
    given: list[Any] = []
    stack = private.pop_transform()
    try:
        for n, tensor in enumerate((x, h0, c0, *weights)):
            if tensor is not None:
                tensor, dim = private.unwrap_batched(tensor, level)
                if dim is not None:
                    each |= 1 << n
                    tensor = tensor.movedim(dim, 0) if dim else tensor
            given.append(tensor)
        if each:
            settings = _of_models(settings, size, each)
        outputs = _run(settings, given[0], given[1], given[2], given[3:], lengths)
    finally:
        private.push_transform(stack)
    if outputs is None or not each:
        return outputs
    return tuple(None if t is None else private.add_batch_dim(t, 0, level) for t in outputs)


@lru_cache(maxsize=1024)
def _of_models(settings: Settings, models: int, each: int) -> Settings:
    return replace(settings, models=models, each=each)


def _bfloat16(settings: Settings, x: Any, h0: Any, c0: Any, weights: Any, lengths: Any) -> Any:
    """Inference with W and R as they are stored; all else is widened here, and what comes out is rounded once."""
    if any(t is not None and t.dtype is not torch.bfloat16 for t in (h0, c0, *weights)):
        return None
    if not gate.is_plain(x, h0, c0, *weights):
        return None
    per = settings.how.per_layer  # W, R and, with bias, two vectors
    widened = [w if n % per < 2 else w.float() for n, w in enumerate(weights)]
    states = (None if t is None else t.float() for t in (h0, c0))
    outputs = _native.torch_forward(settings.native, x.float(), *states, widened, lengths, False)
    return None if outputs is None else tuple(None if t is None else t.bfloat16() for t in outputs[:3])


def _looked_at(how: How, packed: bool, p: list[Any], g: tuple[Any, ...]) -> tuple[Any, ...]:
    """The gradients of y, h_n and c_n, in ordinary layout; p may have changed since forward, too."""
    door, names = f"backward of {how.cell}", ("dy", "dh_n", "dc_n")
    gate.check(door, lambda: [*how.argument_names, *names], [*p, *g])
    if packed:  # torch's padding reads them without looking
        for name, tensor in zip(names, g, strict=True):
            gate.refuse_foreign(door, name, tensor)
    return tuple(None if tensor is None else gate.dense(tensor) for tensor in g)


class _Layout:
    """The tensors of a module as those of an operator, and back: as functions that torch can differentiate."""

    def __init__(self, settings: Settings, x: Any, lengths: Any) -> None:
        self.is_cell, self.packed = settings.is_cell, settings.packed
        self.sizes, self.rows = lengths, lengths  # of a packed x; of all others
        if self.packed:
            _, self.rows = pad_packed(x, self.sizes)
        self.batched = self.packed or x.dim() - settings.has_models(0) == (2 if self.is_cell else 3)
        self.batch_first = settings.batch_first and self.batched and not self.packed  # unpacked it is (T,B,.)

    def sequence(self, t: Any, models: bool) -> Any:
        """(T,E,B,n) from a tensor like x."""
        if t is None:
            return None
        if self.packed:
            t, _ = pad_packed(t, self.sizes)
        t = t if models else t.unsqueeze(0)
        if not self.batched:
            t = t.unsqueeze(-2)
        if self.is_cell:
            return t.unsqueeze(0)
        return t.permute(2, 0, 1, 3) if self.batch_first else t.transpose(0, 1)

    def state(self, t: Any, models: bool) -> Any:
        """(S,E,B,H)."""
        if t is None:
            return None
        t = t if models else t.unsqueeze(0)
        t = t if self.batched else t.unsqueeze(-2)
        return t.unsqueeze(0) if self.is_cell else t.transpose(0, 1)

    def gradient(self, n: int, value: Any, like: Any) -> Any:
        """That of the n-th of x, h0, c0 and the weights, as it lies there."""
        if n == 0 and self.packed:
            value = pack_padded(value.squeeze(1), self.rows)
        elif n == 0 and not self.is_cell:
            value = value.permute(1, 2, 0, 3) if self.batch_first else value.transpose(0, 1)
        elif n < 3 and not self.is_cell:
            value = value.transpose(0, 1)
        return value.reshape(like.shape)


def _differentiable(
    settings: Settings, tensors: Sequence[Any], lengths: Any, tape: Any, g: tuple[Any, ...], needs: Any
) -> list[Any]:
    """The gradients of x, h0, c0 and the weights, as functions of all that goes in."""
    kept = [n for n in range(len(tensors)) if n != 2 or settings.how.states == 2]  # some cells have no c
    how = settings.how.but(tape=True, want="".join("1" if needs[n] else "0" for n in kept))
    dy, dhn, dcn = _looked_at(how, settings.packed, [tensors[n] for n in kept], g)
    layout = _Layout(settings, tensors[0], lengths)
    p: list[Any] = []
    for n in kept:
        models = settings.has_models(n)
        if n < 3:
            p.append((layout.state if n else layout.sequence)(tensors[n], models))
        else:
            p.append(tensors[n] if models else tensors[n].unsqueeze(0))
    together = settings.models > 0
    ends = (dhn, dcn)[: how.states]
    up = [layout.sequence(dy, together), *(layout.state(d, together) for d in ends), None]
    rows = None if layout.rows is None else layout.rows.unsqueeze(0)
    values = iter(operators.apply("backward", how, rows, None, *p, tape, *up))
    results: list[Any] = [None] * len(tensors)
    for n in kept:
        if needs[n] and (value := next(values)) is not None:
            results[n] = layout.gradient(n, value, tensors[n])
    return results
