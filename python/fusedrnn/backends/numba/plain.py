# SPDX-License-Identifier: Apache-2.0
"""One step of all rows, for a cell of one product and an elementwise part: made from the cell, whichever it is."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
from numba import njit, types
from numba.extending import overload

from ...cells import CELLS
from ...cells.cell import Cell
from .blocks import BLOCK, add, cached, limit, load, save, stamp
from .functions import OPTIONS

if TYPE_CHECKING:
    from .walk import Moment, Walk

# A slot that a cell has no use for holds anything; nobody saves it.


def _forward_slots(cell: Cell) -> tuple[int, int, int]:
    """Forward reads the sums from slot 0 on, h' and c', and writes kept, h and c: the slots of h', kept and h."""
    return cell.sums, cell.sums + 2, cell.sums + cell.kept + 2


def _backward_slots(cell: Cell) -> tuple[int, int, int]:
    """Backward reads kept from slot 0 on, h', h, c', c, dh, dc, and writes da, dh' and dc': those of h', da and dh'."""
    return cell.kept, cell.kept + 6, cell.kept + cell.sums + 6


# Tuples are taken apart one element at a time: their elements may differ in type, which a loop over them could not.


def _take(slot: int, count: int) -> Any:
    """The function (w, j) that gives element j of so many slots, from `slot` on, as a tuple."""
    if count == 0:
        return njit(lambda w, j: (), **OPTIONS)
    rest, last = _take(slot, count - 1), (slot + count - 1) * BLOCK
    return njit(lambda w, j: rest(w, j) + (w[last + j],), **OPTIONS)


def _put(slot: int, count: int) -> Any:
    """The function (w, j, values) that writes a tuple of so many to the slots from `slot` on."""
    if count == 0:
        return njit(lambda w, j, values: None, **OPTIONS)
    rest, last, to = _put(slot, count - 1), count - 1, (slot + count - 1) * BLOCK

    def put(w: Any, j: Any, values: Any) -> None:
        rest(w, j, values)
        w[to + j] = values[last]

    return njit(put, **OPTIONS)


# The cell on a block. A compiled step must not close over functions: what it closes over is a part of its name in the
# cache on disk, and functions have another name in every process. So it closes over the cell's name, and calls these.


def forward_block(name: Any, w: Any, clip: Any) -> Any: ...


def backward_block(name: Any, w: Any, clip: Any) -> Any: ...


@overload(forward_block, jit_options=OPTIONS, prefer_literal=True)
def _forward_block(name: Any, w: Any, clip: Any) -> Any:
    if not isinstance(name, types.StringLiteral):  # Numba's second try, where the cell did not compile
        return None
    cell, n = CELLS[name.literal_value], BLOCK
    state, kept_at, new = _forward_slots(cell)
    step, sums, keep = njit(cell.forward, **OPTIONS), _take(0, cell.sums), _put(kept_at, cell.kept)

    def block(name: Any, w: Any, clip: Any) -> None:
        for j in range(n):
            kept, h, c = step(sums(w, j), w[state * n + j], w[(state + 1) * n + j], clip)
            keep(w, j, kept)
            w[new * n + j] = h
            w[(new + 1) * n + j] = c

    return block


@overload(backward_block, jit_options=OPTIONS, prefer_literal=True)
def _backward_block(name: Any, w: Any, clip: Any) -> Any:
    if not isinstance(name, types.StringLiteral):
        return None
    cell, n = CELLS[name.literal_value], BLOCK
    state, da_at, new = _backward_slots(cell)
    back, kept, read, give = (
        njit(cell.backward, **OPTIONS),
        _take(0, cell.kept),
        _take(state, 6),
        _put(da_at, cell.sums),
    )

    def block(name: Any, w: Any, clip: Any) -> None:
        for j in range(n):
            h_prev, h, c_prev, c, dh, dc = read(w, j)
            da, dh, dc = back(kept(w, j), h_prev, h, c_prev, c, clip, dh, dc)
            give(w, j, da)
            w[new * n + j] = dh
            w[(new + 1) * n + j] = dc

    return block


# A cell's steps for all rows (N, ...) of one time, every array C-contiguous.


@functools.cache
def _compiled_forward(name: str) -> Any:
    cell, sources = CELLS[name], stamp()
    sums, kept_count, has_c, slots = cell.sums, cell.kept, cell.cell_state, cell.sums + cell.kept + 8
    state, kept_at, new = _forward_slots(cell)

    @cached(name)
    def forward(
        x_sum: Any, h_sum: Any, rows: Any, ax: Any, hr: Any, b: Any, h_prev: Any, c_prev: Any, clip: Any, active: Any,
        kept: Any, h: Any, c: Any,
    ) -> Any:  # fmt: skip
        """ax, hr (N,G*H): x W^T, h' R^T. b (E,sums*H). Written: kept (N,K,H), h, c (N,H). rows: of one weight set."""
        _ = sources
        N, H = h.shape
        gates = len(x_sum)
        w = np.zeros(slots * BLOCK, h.dtype)
        ax, hr, b, kept = ax.ravel(), hr.ravel(), b.ravel(), kept.ravel()
        h, c, h_prev, c_prev = h.ravel(), c.ravel(), h_prev.ravel(), c_prev.ravel()
        for row in range(N):
            at = row * H
            if not active[row]:
                h[at : at + H] = h_prev[at : at + H]
                if has_c:
                    c[at : at + H] = c_prev[at : at + H]
                continue
            for j in range(0, H, BLOCK):
                n = min(BLOCK, H - j)
                for s in range(sums):
                    load(w, s, b, (row // rows * sums + s) * H + j, n)
                for g in range(gates):
                    add(w, x_sum[g], ax, (row * gates + g) * H + j, n)
                for g in range(len(h_sum)):
                    add(w, h_sum[g], hr, (row * gates + g) * H + j, n)
                load(w, state, h_prev, at + j, n)
                if has_c:
                    load(w, state + 1, c_prev, at + j, n)
                forward_block(name, w, clip)
                for k in range(kept_count):
                    save(w, kept_at + k, kept, (row * kept_count + k) * H + j, n)
                save(w, new, h, at + j, n)
                if has_c:
                    save(w, new + 1, c, at + j, n)

    return forward


@functools.cache
def _compiled_backward(name: str) -> Any:
    cell, sources = CELLS[name], stamp()
    kept_count, has_c, slots = cell.kept, cell.cell_state, cell.sums + cell.kept + 8
    state, da_at, new = _backward_slots(cell)

    @cached(name)
    def backward(
        x_sum: Any, h_sum: Any, kept: Any, h_prev: Any, h: Any, c_prev: Any, c: Any, clip_cell: Any, clip_grad: Any,
        dy: Any, dcells: Any, has_dcells: Any, active: Any, dh: Any, dc: Any, da_x: Any, da_h: Any,
    ) -> Any:  # fmt: skip
        """dh, dc (N,H): what comes from the step after; overwritten by what goes to the step before, less the product.
        Written: da_x, da_h (N,G*H), 0 in rows that are not active."""
        _ = sources
        N, H = h.shape
        gates = len(x_sum)
        w = np.zeros(slots * BLOCK, h.dtype)
        kept, da_x, da_h, dy, dcells = kept.ravel(), da_x.ravel(), da_h.ravel(), dy.ravel(), dcells.ravel()
        h, c, h_prev, c_prev, dh, dc = h.ravel(), c.ravel(), h_prev.ravel(), c_prev.ravel(), dh.ravel(), dc.ravel()
        for row in range(N):
            at = row * H
            if not active[row]:
                da_x[at * gates : (at + H) * gates] = 0
                da_h[at * gates : (at + H) * gates] = 0
                continue
            for j in range(0, H, BLOCK):
                n = min(BLOCK, H - j)
                for k in range(kept_count):
                    load(w, k, kept, (row * kept_count + k) * H + j, n)
                load(w, state, h_prev, at + j, n)
                load(w, state + 1, h, at + j, n)
                load(w, state + 4, dh, at + j, n)
                add(w, state + 4, dy, at + j, n)
                if has_c:
                    load(w, state + 2, c_prev, at + j, n)
                    load(w, state + 3, c, at + j, n)
                    load(w, state + 5, dc, at + j, n)
                if has_dcells:
                    add(w, state + (5 if has_c else 4), dcells, at + j, n)
                if clip_grad > 0:
                    limit(w, state + 4, clip_grad)
                    limit(w, state + 5, clip_grad)
                backward_block(name, w, clip_cell)
                for g in range(gates):
                    save(w, da_at + x_sum[g], da_x, (row * gates + g) * H + j, n)
                for g in range(len(h_sum)):
                    save(w, da_at + h_sum[g], da_h, (row * gates + g) * H + j, n)
                save(w, new, dh, at + j, n)
                if has_c:
                    save(w, new + 1, dc, at + j, n)

    return backward


class Plain:
    """The steps of a walk."""

    def __init__(self, walk: Walk) -> None:
        self.walk, self.cell = walk, walk.cell
        self.forward_rows, self.backward_rows = _compiled_forward(self.cell.name), _compiled_backward(self.cell.name)
        self.sums = np.array(walk.cell.x_sum), np.array(walk.cell.h_sum, np.intp)
        self.back = np.empty((walk.N, walk.problem.H), walk.dtype)

    def forward(self, t: int, ax: Any, before: tuple[Any, Any], after: tuple[Any, Any, Any]) -> None:
        """ax (N,G*H); before: h', c'. Written: after, which is kept, h, c."""
        walk = self.walk
        hr = walk.multiply(before[0], walk.RT) if self.cell.state_product else np.empty((walk.N, 0), walk.dtype)
        self.forward_rows(
            *self.sums, walk.problem.B, ax, hr, walk.bias, *before, walk.clip_cell, walk.active[t], *after
        )  # fmt: skip

    def backward(self, at: Moment, dh: Any, dc: Any, da_x: Any, da_h: Any) -> None:
        """dh, dc (N,H) go one step back in place. Written: da_x, da_h (N,G*H)."""
        walk = self.walk
        self.backward_rows(
            *self.sums, at.kept, at.h_prev, at.h, at.c_prev, at.c, walk.clip_cell, walk.clip_grad, at.dy, at.dcells,
            at.has_dcells, at.active, dh, dc, da_x, da_h,
        )  # fmt: skip
        if self.cell.state_product:
            dh += walk.multiply(da_h, walk.R, out=self.back)

    def weight_gradient(self, dR: Any, da_h: Any, h_prev: Any, kept: Any, active: Any) -> None:
        """Adds to dR (E,G*H,H) what many steps (n, ...) give."""
        if self.cell.state_product:
            dR += self.walk.outer(da_h, self.walk.by_sets(h_prev))
