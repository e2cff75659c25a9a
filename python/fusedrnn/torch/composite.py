# SPDX-License-Identifier: Apache-2.0
"""The definition of a call in torch's own operators: on any device, in any dtype, differentiable any number of times.

Slow (a loop over time steps). It runs third and higher derivatives, and what no kernel and no torch.nn module can do.
`forward` is the definition; `jvp` and `hvp` are derived from it by torch.func; `Derivative` is their derivatives of any
order, nested in any way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .how import How, parts, read
from .kernels import extent, spread

Tensors = Sequence[Tensor | None]
_vjp: Any = torch.func.vjp


def _product(h: Tensor, R: Tensor, b: Tensor | None) -> Tensor:
    s = h @ R.transpose(-1, -2)
    return s if b is None else s + b.unsqueeze(-2)


# One step of each cell, from a = x W^T + bW: h and c.


def _lstm(how: How, a: Tensor, h: Tensor, c: Any, R: Tensor, b: Tensor | None) -> tuple[Tensor, Any]:
    i, f, g, o = (a + _product(h, R, b)).chunk(4, -1)
    c = _clip(torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g), how.clip_cell)
    return torch.sigmoid(o) * torch.tanh(c), c


def _gru(how: How, a: Tensor, h: Tensor, c: Any, R: Tensor, b: Tensor | None) -> tuple[Tensor, Any]:
    ar, az, an = a.chunk(3, -1)
    hr, hz, hn = _product(h, R, b).chunk(3, -1)
    n = torch.tanh(an + torch.sigmoid(ar + hr) * hn)
    return n + torch.sigmoid(az + hz) * (h - n), None


def _gru_reset_before(how: How, a: Tensor, h: Tensor, c: Any, R: Tensor, b: Tensor | None) -> tuple[Tensor, Any]:
    ar, az, an = a.chunk(3, -1)
    H = h.shape[-1]
    hr, hz = _product(h, R[..., : 2 * H, :], None if b is None else b[..., : 2 * H]).chunk(2, -1)
    rh = torch.sigmoid(ar + hr) * h
    n = torch.tanh(an + _product(rh, R[..., 2 * H :, :], None if b is None else b[..., 2 * H :]))
    return n + torch.sigmoid(az + hz) * (h - n), None


def _rnn_tanh(how: How, a: Tensor, h: Tensor, c: Any, R: Tensor, b: Tensor | None) -> tuple[Tensor, Any]:
    return torch.tanh(a + _product(h, R, b)), None


def _rnn_relu(how: How, a: Tensor, h: Tensor, c: Any, R: Tensor, b: Tensor | None) -> tuple[Tensor, Any]:
    return torch.relu(a + _product(h, R, b)), None


_STEPS: dict[str, Callable[..., tuple[Tensor, Any]]] = {
    "lstm": _lstm,
    "gru": _gru,
    "gru_reset_before": _gru_reset_before,
    "rnn_tanh": _rnn_tanh,
    "rnn_relu": _rnn_relu,
}


def _stack(steps: list[Any], none: Tensor) -> Tensor:
    """The steps; `none` where there are none."""
    return torch.stack(steps) if steps else none


def _clip(c: Tensor, limit: float) -> Tensor:
    if limit == 0:
        return c
    return torch.where(c.detach().abs() >= limit, torch.copysign(torch.full_like(c, limit), c.detach()), c)


class _Rows:
    """Which rows live at each step, and which begin a new sequence there."""

    def __init__(self, lengths: Tensor | None, reset: Tensor | None, x: Tensor) -> None:
        T = x.shape[0]
        self.active: list[Any] = [None] * T
        if lengths is not None:
            self.active = list((torch.arange(T, device=x.device)[:, None, None] < lengths.to(x.device)).unsqueeze(-1))
        self.boundary: list[Any] = [None] * (T + 1)
        if reset is not None:
            given = reset.ne(0).to(x.device).unsqueeze(-1)
            begins = [b if a is None else b & a for b, a in zip(given, self.active, strict=True)]
            self.boundary = [*begins, None]

    def restarted(self, t: int, first: Any, state: Any) -> Any:
        """The state in front of step t."""
        return state if self.boundary[t] is None or state is None else torch.where(self.boundary[t], first, state)

    def running(self, t: int, new: Any, old: Any) -> Any:
        """What step t makes of a state: nothing, for rows that have ended."""
        return new if self.active[t] is None or new is None else torch.where(self.active[t], new, old)


def _direction(
    how: How,
    rows: _Rows,
    x: Tensor,
    weights: Sequence[Any],
    begin: Sequence[Any],
    zeros: Sequence[Any],
    backwards: bool,
) -> tuple[Tensor, Tensor, Any, Any]:
    """One layer in one direction: y, the cell's states and the final h and c. begin, zeros: h and c."""
    W, R, *more = weights
    Wr = more.pop() if how.proj_size else None
    bW, bR = more or (None, None)
    gates = x @ W.transpose(-1, -2)
    gates = gates if bW is None else gates + bW.unsqueeze(-2)
    step, T = _STEPS[how.cell], x.shape[0]
    h, c = begin
    zero, zero_c = zeros
    first_h, first_c = (h, c) if how.reset_to_initial else (zero, None if c is None else zero_c)
    row_y: list[Any] = [None] * T
    row_c: list[Any] = [None] * T
    for t in reversed(range(T)) if backwards else range(T):
        cut = t + 1 if backwards else t  # where a sequence ends, seen from this side
        before = rows.restarted(cut, first_h, h), rows.restarted(cut, first_c, c)
        h_new, c_new = step(how, gates[t], *before, R, bR)
        h_new = h_new if Wr is None else h_new @ Wr.transpose(-1, -2)
        h, c = rows.running(t, h_new, h), rows.running(t, c_new, c)
        row_y[t] = rows.running(t, h, zero)
        row_c[t] = row_y[t] if c is None else rows.running(t, c, zero_c)
    y = _stack(row_y, zero.new_empty((0, *zero.shape)))
    return y, _stack(row_c, zero_c.new_empty((0, *zero_c.shape))), h, c


def forward(how: How, lengths: Tensor | None, reset: Tensor | None, p: Tensors) -> tuple[Tensor, ...]:
    """All results, as csrc/README.md defines them."""
    x, *starts = p[: 1 + how.states]
    weights: Sequence[Any] = p[1 + how.states :]
    assert x is not None
    E, B, P, H = extent(p, how.argument_axes), x.shape[2], weights[1].shape[-1], weights[1].shape[-2] // how.facts.gates
    E = E if lengths is None else max(E, lengths.shape[0])
    E = E if reset is None else max(E, reset.shape[1])
    rows = _Rows(lengths, reset, x)
    zero = torch.zeros((E, B, P), dtype=x.dtype, device=x.device)
    zero_c = torch.zeros((E, B, H), dtype=x.dtype, device=x.device) if how.proj_size else zero
    y = x
    finals: list[list[Any]] = []
    all_cells = []
    for layer in range(how.layers):
        if lengths is not None:
            y = _stack([torch.where(a, row, 0.0) for a, row in zip(rows.active, y, strict=True)], y)
        ys, kept = [], []
        for d in range(how.directions):
            n = layer * how.directions + d
            own = weights[n * how.per_layer : (n + 1) * how.per_layer]
            given = [z if s is None else spread(s[n], 0, E) for s, z in zip(starts, (zero, zero_c), strict=False)]
            begin = [*given, None][:2]
            one_y, one_c, *final = _direction(how, rows, y, own, begin, (zero, zero_c), how.reverse or d == 1)
            ys.append(one_y)
            kept.append(one_c)
            finals.append(final[: how.states])
        y = torch.cat(ys, -1)
        all_cells.append(torch.cat(kept, -1))
    results = (y, *(torch.stack(states) for states in zip(*finals, strict=True)))
    return (*results, torch.stack(all_cells)) if how.cells else results


def jvp(how: How, lengths: Any, reset: Any, p: Tensors, v: Tensors) -> tuple[Tensor, ...]:
    """Tangents of the results along v."""
    axes = how.argument_axes
    E = extent((*p, *v), (*axes, *axes))
    given, tangents, rebuild = _dense(p, v, axes, E)

    def function(*given: Tensor) -> tuple[Tensor, ...]:
        return forward(how, lengths, reset, rebuild(given))

    result: tuple[Tensor, ...] = torch.func.jvp(function, given, tangents)[1]
    return result


def hvp(how: How, lengths: Any, reset: Any, p: Tensors, v: Tensors, g: Tensors, t: Tensors) -> tuple[Tensor, ...]:
    """Tangents of the wanted gradients, along v of p and t of g."""
    axes, result_axes = how.argument_axes, how.result_axes
    E = extent((*p, *v, *g, *t), (*axes, *axes, *result_axes, *result_axes))
    given, tangents, rebuild = _dense(p, v, axes, E)
    up, up_tangents, rebuild_up = _dense(g, t, result_axes, E)

    def function(given: tuple[Tensor, ...], up: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        results, pull = _vjp(lambda *given: forward(how, lengths, reset, rebuild(given)), *given)
        full = rebuild_up(up)
        cotangents = tuple(torch.zeros_like(r) if c is None else c for r, c in zip(results, full, strict=True))
        gradients: tuple[Tensor, ...] = pull(cotangents)
        return gradients

    dense = torch.func.jvp(function, (given, up), (tangents, up_tangents))[1]
    result = []
    for wanted, tensor, gradient, axis in zip(how.want, p, rebuild(dense), axes, strict=True):
        if wanted == "1":
            assert tensor is not None
            shared = not how.each and tensor.shape[axis] == 1
            result.append(gradient.sum(axis, keepdim=True) if shared and E != 1 else gradient)
    return tuple(result)


def _dense(values: Tensors, tangents: Tensors, axes: Sequence[int], E: Any) -> tuple[Any, Any, Any]:
    """Values and tangents with E weight sets and without the missing ones, and what puts those back in."""
    pairs = list(zip(values, tangents, axes, strict=True))
    # a cotangent that is missing while its tangent is there is zero
    there = [value is not None or tangent is not None for value, tangent, _ in pairs]
    full, full_tangents = [], []
    for value, tangent, axis in pairs:
        if value is None and tangent is None:
            continue
        value = torch.zeros_like(tangent) if value is None else value  # type: ignore[arg-type]
        value = spread(value, axis, E).contiguous()  # torch.func.jvp refuses elements that share memory
        full.append(value)
        full_tangents.append(torch.zeros_like(value) if tangent is None else spread(tangent, axis, E).contiguous())

    def rebuild(dense: Sequence[Tensor]) -> Any:
        each = iter(dense)
        return [next(each) if here else None for here in there]

    return tuple(full), tuple(full_tangents), rebuild


# Derivatives of jvp and hvp. A derivative rule of a Function runs where torch has turned derivatives off, so that
# torch's own operators in it would lose those that are still wanted outside. Hence each rule here is one Function
# again, and a derivative of any order is a path of steps down to "jvp" or "hvp", taken where no transform is active any
# more.


def _build(settings: How, path: tuple[Any, ...]) -> Callable[..., tuple[Tensor, ...]]:
    """The function (lengths, reset, *tensors) at the end of a path."""
    step, *rest = path
    if step == "jvp" or step == "hvp":
        base = jvp if step == "jvp" else hvp
        return lambda lengths, reset, *tensors: base(settings, lengths, reset, *parts(step, settings, tensors))
    inner = _build(settings, rest[0])
    if step == "vmap":
        return torch.func.vmap(inner, rest[1])
    moving = rest[1]

    def held(lengths: Any, reset: Any, tensors: Sequence[Any]) -> Callable[..., tuple[Tensor, ...]]:
        def function(*given: Tensor) -> tuple[Tensor, ...]:
            replaced = dict(zip(moving, given, strict=True))
            return inner(lengths, reset, *(replaced.get(n, tensor) for n, tensor in enumerate(tensors)))

        return function

    if step == "push":

        def pushed(lengths: Any, reset: Any, *tensors: Any) -> tuple[Tensor, ...]:
            tensors, tangents = tensors[: -len(moving)], tensors[-len(moving) :]
            primals = tuple(tensors[n] for n in moving)
            result: tuple[Tensor, ...] = torch.func.jvp(held(lengths, reset, tensors), primals, tangents)[1]
            return result

        return pushed

    given = rest[2]

    def pulled(lengths: Any, reset: Any, *tensors: Any) -> tuple[Tensor, ...]:
        tensors, cotangents = tensors[: -len(given)], tensors[-len(given) :]
        results, back = _vjp(held(lengths, reset, tensors), *(tensors[n] for n in moving))
        there = dict(zip(given, cotangents, strict=True))
        gradients: tuple[Tensor, ...] = back(
            tuple(there[n] if n in there else torch.zeros_like(result) for n, result in enumerate(results))
        )
        return gradients

    return pulled


class Derivative(torch.autograd.Function):
    """The function at the end of a path."""

    @staticmethod
    def forward(text: str, path: tuple[Any, ...], lengths: Any, reset: Any, *tensors: Any) -> tuple[Tensor, ...]:  # type: ignore[override]
        return _build(read(text), path)(lengths, reset, *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        text, path, *tensors = inputs
        ctx.settings, ctx.path = read(text), path
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *u: Any) -> tuple[Any, ...]:
        lengths, reset, *saved = ctx.saved_tensors
        needs = ctx.needs_input_grad[4:]
        wanted = tuple(n for n, need in enumerate(needs) if need)
        values = iter(pull(ctx.settings, ctx.path, lengths, reset, saved, wanted, u))
        return (None, None, None, None, *(next(values) if need else None for need in needs))

    @staticmethod
    def jvp(ctx: Any, _: Any, __: Any, ___: Any, ____: Any, *tangents: Any) -> tuple[Any, ...]:
        lengths, reset, *saved = ctx.saved_tensors
        result: tuple[Any, ...] = push(ctx.settings, ctx.path, lengths, reset, saved, tangents)
        return result

    @staticmethod
    def vmap(info: Any, in_dims: Any, text: str, path: Any, *tensors: Any) -> tuple[Any, Any]:  # type: ignore[override]
        outputs = Derivative.apply(text, ("vmap", path, in_dims[2:]), *tensors)  # type: ignore[no-untyped-call]
        return outputs, (0,) * len(outputs)


def push(settings: How, path: Any, lengths: Any, reset: Any, tensors: Sequence[Any], tangents: Sequence[Any]) -> Any:
    """Tangents of what a path returns, from those of its tensors."""
    moving = tuple(n for n, tangent in enumerate(tangents) if tangent is not None)
    path = ("push", path, moving)
    return Derivative.apply(settings.text, path, lengths, reset, *tensors, *(tangents[n] for n in moving))  # type: ignore[no-untyped-call]


def pull(
    settings: How, path: Any, lengths: Any, reset: Any, tensors: Sequence[Any], wanted: Any, u: Sequence[Any]
) -> Any:
    """Gradients of the wanted ones of a path's tensors, from those of what it returns; none of these: None."""
    given = tuple(n for n, cotangent in enumerate(u) if cotangent is not None)
    if not given:
        return (None,) * len(wanted)
    path = ("pull", path, wanted, given)
    return Derivative.apply(settings.text, path, lengths, reset, *tensors, *(u[n] for n in given))  # type: ignore[no-untyped-call]
