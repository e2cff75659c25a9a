# SPDX-License-Identifier: Apache-2.0
"""The definition of a call in torch's own operators: on any device, in any dtype, differentiable any number of times.

Slow (a loop over time steps). It runs third and higher derivatives, and what no kernel and no torch.nn module can do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .how import How
from .kernels import extent, spread

Tensors = Sequence[Tensor | None]


def _cell(how: How, a: Tensor, h: Tensor, c: Any, R: Tensor, b: Tensor | None) -> tuple[Tensor, Any]:
    """One step from a = x W^T + bW: h and c."""

    def product(h: Tensor, R: Tensor, b: Tensor | None) -> Tensor:
        s = h @ R.transpose(-1, -2)
        return s if b is None else s + b.unsqueeze(-2)

    if how.cell == "lstm":
        i, f, g, o = (a + product(h, R, b)).chunk(4, -1)
        c = _clip(torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g), how.clip_cell)
        return torch.sigmoid(o) * torch.tanh(c), c
    if how.cell == "gru":
        ar, az, an = a.chunk(3, -1)
        hr, hz, hn = product(h, R, b).chunk(3, -1)
        n = torch.tanh(an + torch.sigmoid(ar + hr) * hn)
    elif how.cell == "gru_reset_before":
        ar, az, an = a.chunk(3, -1)
        H = h.shape[-1]
        hr, hz = product(h, R[..., : 2 * H, :], None if b is None else b[..., : 2 * H]).chunk(2, -1)
        rh = torch.sigmoid(ar + hr) * h
        n = torch.tanh(an + product(rh, R[..., 2 * H :, :], None if b is None else b[..., 2 * H :]))
    else:
        a = a + product(h, R, b)
        return (torch.tanh(a) if how.cell == "rnn_tanh" else torch.relu(a)), None
    return n + torch.sigmoid(az + hz) * (h - n), None


def _clip(c: Tensor, limit: float) -> Tensor:
    if limit == 0:
        return c
    return torch.where(c.detach().abs() >= limit, torch.copysign(torch.full_like(c, limit), c.detach()), c)


def forward(how: How, lengths: Tensor | None, reset: Tensor | None, p: Tensors) -> tuple[Tensor, ...]:
    """All results, as csrc/README.md defines them."""
    x, h0 = p[0], p[1]
    c0 = p[2] if how.states == 2 else None
    weights = p[1 + how.states :]
    assert x is not None
    E = extent(p, how.argument_axes)
    T, B, H = x.shape[0], x.shape[2], weights[1].shape[-1]  # type: ignore[union-attr]
    active: Any = [None] * T
    if lengths is not None:
        E = max(E, lengths.shape[0])
        active = list((torch.arange(T, device=x.device)[:, None, None] < lengths.to(x.device)).unsqueeze(-1))
    boundary: Any = [None] * T
    if reset is not None:
        E = max(E, reset.shape[1])
        boundary = [b & a if a is not None else b for b, a in zip(reset.ne(0).to(x.device).unsqueeze(-1), active, strict=True)]
    zero = x.new_zeros((E, B, H))

    def where(mask: Any, a: Any, b: Any) -> Any:
        return b if mask is None or a is None else torch.where(mask, a, b)

    def initial(state: Tensor | None, n: int) -> Tensor:
        return zero if state is None else spread(state[n], 0, E)

    y = x
    hns, cns, all_cells = [], [], []
    for layer in range(how.layers):
        if lengths is not None:
            y = torch.stack([torch.where(a, row, 0.0) for a, row in zip(active, y, strict=True)])
        ys: list[Any] = []
        kept: list[Any] = []
        for d in range(how.directions):
            n = layer * how.directions + d
            W, R, *bias = weights[n * how.per_layer : (n + 1) * how.per_layer]
            bW, bR = bias or (None, None)
            assert W is not None and R is not None
            gates = y @ W.transpose(-1, -2)
            gates = gates if bW is None else gates + bW.unsqueeze(-2)
            backwards = how.reverse or d == 1
            h, c = initial(h0, n), initial(c0, n) if how.states == 2 else None
            first_h, first_c = (h, c) if how.reset_to_initial else (zero, zero if c is not None else None)
            row_y: list[Any] = [None] * T
            row_c: list[Any] = [None] * T
            for t in reversed(range(T)) if backwards else range(T):
                cut = (boundary[t + 1] if t + 1 < T else None) if backwards else boundary[t]
                h_new, c_new = _cell(how, gates[t], where(cut, first_h, h), where(cut, first_c, c), R, bR)
                h, c = where(active[t], h_new, h), where(active[t], c_new, c)
                row_y[t] = where(active[t], h, zero)
                row_c[t] = where(active[t], c, zero) if c is not None else row_y[t]
            ys.append(torch.stack(row_y))
            kept.append(torch.stack(row_c))
            hns.append(h)
            cns.append(c)
        y = torch.cat(ys, -1)
        all_cells.append(torch.cat(kept, -1))
    results = [y, torch.stack(hns)]
    if how.states == 2:
        results.append(torch.stack(cns))
    return (*results, torch.stack(all_cells)) if how.cells else tuple(results)


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
        results, pull = torch.func.vjp(lambda *given: forward(how, lengths, reset, rebuild(given)), *given)
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
        value = spread(value, axis, E)
        full.append(value)
        full_tangents.append(torch.zeros_like(value) if tangent is None else spread(tangent, axis, E))

    def rebuild(dense: Sequence[Tensor]) -> Any:
        each = iter(dense)
        return [next(each) if here else None for here in there]

    return tuple(full), tuple(full_tangents), rebuild
