# SPDX-License-Identifier: Apache-2.0
"""One step of all rows of the GRU that resets before the product: two products, the second with r h'.

Slots of a block are numbered as they come.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
from numba import njit

from ...cells.gru import GRU_RESET_BEFORE
from .blocks import BLOCK, add, cached, limit, load, save, stamp
from .functions import OPTIONS

if TYPE_CHECKING:
    from .walk import Moment, Walk

_gate, _gate_back = njit(GRU_RESET_BEFORE.gate, **OPTIONS), njit(GRU_RESET_BEFORE.backward_gate, **OPTIONS)
_late, _late_back = njit(GRU_RESET_BEFORE.forward, **OPTIONS), njit(GRU_RESET_BEFORE.backward, **OPTIONS)


# The parts of a step, for all rows (N, ...), every array C-contiguous.


@functools.cache
def _compiled_forward() -> tuple[Any, Any]:
    """gate and late."""
    sources, compile_step = stamp(), cached(GRU_RESET_BEFORE.name)

    @compile_step
    def gate(rows: Any, ax: Any, hr: Any, b: Any, h_prev: Any, kept: Any, rh: Any) -> Any:
        """ax (N,3*H), hr (N,2*H), b (E,3*H), h_prev (N,H). Written: r and z in kept (N,3,H), rh (N,H)."""
        _ = sources
        N, H = h_prev.shape
        m = BLOCK
        w = np.zeros(16 * m, rh.dtype)
        ax, hr, b, kept, h_prev, rh = ax.ravel(), hr.ravel(), b.ravel(), kept.ravel(), h_prev.ravel(), rh.ravel()
        for row in range(N):
            for j in range(0, H, m):
                n = min(m, H - j)
                for g in range(2):
                    load(w, g, ax, (row * 3 + g) * H + j, n)
                    add(w, g, hr, (row * 2 + g) * H + j, n)
                    add(w, g, b, (row // rows * 3 + g) * H + j, n)
                load(w, 2, h_prev, row * H + j, n)
                for i in range(m):
                    w[3 * m + i], w[4 * m + i], w[5 * m + i] = _gate(w[i], w[m + i], w[2 * m + i])
                save(w, 3, kept, row * 3 * H + j, n)
                save(w, 4, kept, (row * 3 + 1) * H + j, n)
                save(w, 5, rh, row * H + j, n)

    @compile_step
    def late(rows: Any, ax: Any, hn: Any, b: Any, h_prev: Any, active: Any, kept: Any, h: Any) -> Any:
        """hn (N,H): rh Rn^T. Written: n in kept (N,3,H), h (N,H)."""
        _ = sources
        N, H = h.shape
        m = BLOCK
        w = np.zeros(16 * m, h.dtype)
        ax, hn, b, kept, h_prev, h = ax.ravel(), hn.ravel(), b.ravel(), kept.ravel(), h_prev.ravel(), h.ravel()
        for row in range(N):
            at = row * H
            if not active[row]:
                h[at : at + H] = h_prev[at : at + H]
                continue
            for j in range(0, H, m):
                n = min(m, H - j)
                load(w, 0, ax, (row * 3 + 2) * H + j, n)
                add(w, 0, hn, at + j, n)
                add(w, 0, b, (row // rows * 3 + 2) * H + j, n)
                load(w, 1, kept, (row * 3 + 1) * H + j, n)
                load(w, 2, h_prev, at + j, n)
                for i in range(m):
                    w[3 * m + i], w[4 * m + i] = _late(w[i], w[m + i], w[2 * m + i])
                save(w, 3, kept, (row * 3 + 2) * H + j, n)
                save(w, 4, h, at + j, n)

    return gate, late


@functools.cache
def _compiled_backward() -> tuple[Any, Any]:
    """late_back and gate_back."""
    sources, compile_step = stamp(), cached(GRU_RESET_BEFORE.name)

    @compile_step
    def late_back(
        kept: Any, h_prev: Any, clip_grad: Any, dy: Any, dcells: Any, has_dcells: Any, active: Any, dh: Any, da: Any,
        da_n: Any,
    ) -> Any:  # fmt: skip
        """Written: da_z, da_n in da (N,3*H), da_n (N,H) once more for the product, dh (N,H)."""
        _ = sources
        N, H = h_prev.shape
        m = BLOCK
        w = np.zeros(16 * m, dh.dtype)
        kept, h_prev, dy, dcells = kept.ravel(), h_prev.ravel(), dy.ravel(), dcells.ravel()
        dh, da, da_n = dh.ravel(), da.ravel(), da_n.ravel()
        for row in range(N):
            at = row * H
            if not active[row]:
                da[3 * at : 3 * (at + H)] = 0
                da_n[at : at + H] = 0
                continue
            for j in range(0, H, m):
                n = min(m, H - j)
                load(w, 0, kept, (row * 3 + 1) * H + j, n)
                load(w, 1, kept, (row * 3 + 2) * H + j, n)
                load(w, 2, h_prev, at + j, n)
                load(w, 3, dh, at + j, n)
                add(w, 3, dy, at + j, n)
                if has_dcells:
                    add(w, 3, dcells, at + j, n)
                if clip_grad > 0:
                    limit(w, 3, clip_grad)
                for i in range(m):
                    w[4 * m + i], w[5 * m + i], w[6 * m + i] = _late_back(w[i], w[m + i], w[2 * m + i], w[3 * m + i])
                save(w, 4, da, (row * 3 + 1) * H + j, n)
                save(w, 5, da, (row * 3 + 2) * H + j, n)
                save(w, 5, da_n, at + j, n)
                save(w, 6, dh, at + j, n)

    @compile_step
    def gate_back(kept: Any, h_prev: Any, drh: Any, active: Any, da: Any, dh: Any) -> Any:
        """drh (N,H): da_n Rn. Written: da_r in da (N,3*H); dh (N,H) is added to."""
        _ = sources
        N, H = h_prev.shape
        m = BLOCK
        w = np.zeros(16 * m, dh.dtype)
        kept, h_prev, drh, da, dh = kept.ravel(), h_prev.ravel(), drh.ravel(), da.ravel(), dh.ravel()
        for row in range(N):
            if not active[row]:
                continue
            at = row * H
            for j in range(0, H, m):
                n = min(m, H - j)
                load(w, 0, kept, row * 3 * H + j, n)
                load(w, 1, h_prev, at + j, n)
                load(w, 2, drh, at + j, n)
                for i in range(m):
                    w[3 * m + i], w[4 * m + i] = _gate_back(w[i], w[m + i], w[2 * m + i])
                add(w, 4, dh, at + j, n)
                save(w, 3, da, row * 3 * H + j, n)
                save(w, 4, dh, at + j, n)

    return late_back, gate_back


class TwoProducts:
    """The steps of a walk."""

    def __init__(self, walk: Walk) -> None:
        self.walk = walk
        (self.gate, self.late), (self.late_back, self.gate_back) = _compiled_forward(), _compiled_backward()

    def forward(self, t: int, ax: Any, before: tuple[Any, Any], after: tuple[Any, Any, Any]) -> None:
        """ax (N,3*H); before: h' and anything. Written: kept and h of `after`."""
        walk, (h, _), (kept, h_new, _) = self.walk, before, after
        rows, early, late = walk.problem.B, slice(2 * walk.problem.H), slice(2 * walk.problem.H, None)
        rh = np.empty_like(h_new)
        self.gate(rows, ax, walk.multiply(h, walk.RT[:, :, early]), walk.bias, h, kept, rh)
        self.late(rows, ax, walk.multiply(rh, walk.RT[:, :, late]), walk.bias, h, walk.active[t], kept, h_new)

    def backward(self, at: Moment, dh: Any, dc: Any, da_x: Any, da_h: Any) -> None:
        """dh (N,H) goes one step back in place. Written: da_x (N,3*H), which is da_h."""
        walk, H = self.walk, self.walk.problem.H
        da_n = np.empty_like(dh)
        self.late_back(at.kept, at.h_prev, walk.clip_grad, at.dy, at.dcells, at.has_dcells, at.active, dh, da_x, da_n)
        self.gate_back(at.kept, at.h_prev, walk.multiply(da_n, walk.R[:, 2 * H :]), at.active, da_x, dh)
        dh += walk.multiply(da_x[:, : 2 * H], walk.R[:, : 2 * H])

    def weight_gradient(self, dR: Any, da_h: Any, h_prev: Any, kept: Any, active: Any) -> None:
        """Adds to dR (E,3*H,H) what many steps (n, ...) give."""
        walk, H = self.walk, self.walk.problem.H
        rh = kept[:, :, 0] * h_prev
        rh[~active] = 0  # nothing was kept for these rows
        dR[:, : 2 * H] += walk.outer(da_h[..., : 2 * H], walk.by_sets(h_prev))
        dR[:, 2 * H :] += walk.outer(da_h[..., 2 * H :], walk.by_sets(rh))
