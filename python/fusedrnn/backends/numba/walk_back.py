# SPDX-License-Identifier: Apache-2.0
"""One layer in one direction: the way back."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import holds_tokens
from .walk import Moment, Run, Walk


class Backward:
    """Goes back over what a walk has run. dy, dcells (T,E,B,H): gradients of y and of the cells, or None."""

    def __init__(self, walk: Walk, run: Run, dy: Any, dcells: Any) -> None:
        self.walk, self.run, self.dy, self.dcells = walk, run, dy, dcells
        problem, cell, dtype = walk.problem, walk.cell, walk.dtype
        E, N, H = problem.E, walk.N, problem.H
        self.dh0, self.dc0 = np.zeros((N, H), dtype), np.zeros((N, H), dtype)
        self.dW = np.zeros((E, *walk.W.shape[1:]), dtype)
        self.dR = np.zeros((E, cell.gates * H, H), dtype)
        self.dbW, self.dbR = np.zeros((E, cell.gates * H), dtype), np.zeros((E, cell.gates * H), dtype)
        self.dextra = np.zeros((N, cell.gates * H), dtype)  # gradient of the context's part
        self.same = cell.x_sum == cell.h_sum or not cell.state_product  # da is one array for x and h

    def go(self, dhn: Any, dcn: Any, dx: Any) -> None:
        """All steps. dhn, dcn (N,H). dx (T,E,B,I_l) is added to, unless x is tokens."""
        walk, run = self.walk, self.run
        self.dh, self.dc = dhn.copy(), dcn.copy()
        first_h, first_c = (run.h0, run.c0) if walk.problem.reset_to_initial else (None, None)
        for chunk in walk.chunks()[::-1]:
            part = walk.ordered(chunk)
            h_prev = walk.before(run.h, run.h0, chunk, first_h)
            c_prev = walk.before(run.c, run.c0, chunk, first_c) if walk.cell.cell_state else h_prev
            x = self.visible(part)
            kept = walk.rebuild(chunk, x, h_prev, c_prev) if run.kept is None else run.kept[part]
            da_x, da_h = self.steps(chunk, kept, h_prev, c_prev)
            self.products(x, da_x, da_h, None if holds_tokens(x) else dx[part])
            walk.steps.weight_gradient(self.dR, da_h, h_prev, kept, walk.active[part])
        self.dh0 += self.dh
        self.dc0 += self.dc

    def visible(self, part: slice) -> Any:
        """x of some steps, 0 in rows that do not run, so that padding, NaN included, reaches nothing."""
        x, walk = self.run.x[part], self.walk
        if walk.problem.lengths is None or holds_tokens(x):
            return x
        return np.where(walk.by_sets(walk.active[part])[..., None], x, walk.dtype.type(0))

    def steps(self, chunk: range, kept: Any, h_prev: Any, c_prev: Any) -> tuple[Any, Any]:
        """A chunk's steps, the last one first: the gradients of the products, (n,N,G*H) each."""
        walk, run = self.walk, self.run
        part, n, N, H = walk.ordered(chunk), len(chunk), walk.N, walk.problem.H
        nothing = np.zeros((N, H), walk.dtype)
        dy = None if self.dy is None else np.ascontiguousarray(self.dy[part]).reshape(n, N, H)
        dcells = None if self.dcells is None else np.ascontiguousarray(self.dcells[part]).reshape(n, N, H)
        da_x = np.empty((n, N, walk.cell.gates * H), walk.dtype)
        da_h = da_x if self.same else np.empty_like(da_x)
        for t in reversed(chunk):
            k = t - part.start
            at = Moment(
                kept[k], h_prev[k], run.h[t], c_prev[k], run.c[t], nothing if dy is None else dy[k],
                nothing if dcells is None else dcells[k], dcells is not None, walk.active[t],
            )  # fmt: skip
            walk.steps.backward(at, self.dh, self.dc, da_x[k], da_h[k])
            if walk.restarts[t]:
                self.restart(walk.restart[t])
        return da_x, da_h

    def restart(self, rows: Any) -> None:
        """These rows came from the initial state, or from zero."""
        if self.walk.problem.reset_to_initial:
            self.dh0[rows] += self.dh[rows]
            self.dc0[rows] += self.dc[rows]
        self.dh[rows] = 0
        self.dc[rows] = 0

    def products(self, x: Any, da_x: Any, da_h: Any, dx: Any) -> None:
        """Adds what a chunk gives to the gradients of x, W and the biases."""
        walk = self.walk
        if walk.extra is not None:
            self.dextra += da_x.sum(0)
        if dx is None:
            walk.token_gradient(self.dW, da_x, x)
        else:
            dx += walk.times(walk.by_sets(da_x), walk.W).reshape(dx.shape)
            self.dW += walk.outer(da_x, x)
        self.dbW += walk.by_sets(da_x).sum((0, 2))
        if not self.same:
            self.dbR += walk.by_sets(da_h).sum((0, 2))

    def params(self) -> tuple[Any, Any, Any, Any]:
        """Gradients of W, R, bW, bR."""
        if not self.walk.cell.state_product:
            return self.dW, None, self.dbW, None
        return self.dW, self.dR, self.dbW, self.dbW if self.same else self.dbR
