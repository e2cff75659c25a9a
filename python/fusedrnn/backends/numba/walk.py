# SPDX-License-Identifier: Apache-2.0
"""One layer in one direction: what a walk over time must know, and the way forward."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ...cells.cell import Cell
from .. import Params, Problem, holds_tokens
from .plain import Plain
from .two_products import TwoProducts

CHUNK = 512  # rows (steps * E * B) of one product over many steps


class Run(NamedTuple):
    """What goes through a layer in one direction, and what comes out."""

    x: Any  # (T,E,B,I), or tokens (T,E,B)
    h0: Any  # (N,H), where N = E * B
    c0: Any
    kept: Any  # (T,N,K,H), or None
    h: Any  # (T,N,H)
    c: Any  # the same array as h for cells without


class Moment(NamedTuple):
    """What backward needs of one step, (N, ...)."""

    kept: Any
    h_prev: Any
    h: Any
    c_prev: Any
    c: Any
    dy: Any
    dcells: Any
    has_dcells: bool
    active: Any


class Walk:
    """Sizes, weights as the products want them, and which rows run when."""

    def __init__(self, problem: Problem, cell: Cell, params: Params, backwards: bool, dtype: Any) -> None:
        self.problem, self.cell, self.backwards, self.dtype = problem, cell, backwards, dtype
        W, R, bW, bR = params
        E, H = problem.E, problem.H
        self.N = E * problem.B
        self.W, self.R = W, np.ascontiguousarray(np.zeros((E, 0, H), dtype) if R is None else R)
        self.WT = W.swapaxes(1, 2)
        self.RT = np.ascontiguousarray(self.R.swapaxes(1, 2))
        self.bias = np.zeros((E, cell.sums, H), dtype)
        for bias, sums in ((bW, cell.x_sum), (bR, cell.h_sum)):
            if bias is not None:
                for g, s in enumerate(sums):
                    self.bias[:, s] += bias[:, g * H : (g + 1) * H]
        T, N = problem.T, self.N
        self.active: Any = np.ones((T, N), bool)
        if problem.lengths is not None:
            self.active = (np.arange(T)[:, None, None] < problem.lengths).reshape(T, N)
        self.restart: Any = np.zeros((T, N), bool)
        if problem.reset is not None:
            boundary = (np.asarray(problem.reset) != 0).reshape(T, N) & self.active
            if backwards:
                self.restart[:-1] = boundary[1:]
            else:
                self.restart = boundary
        self.restarts: Any = self.restart.any(1)
        self.extra: Any = None  # the context's part of the products with x, (N,G*H)
        self.clip_cell, self.clip_grad = dtype.type(problem.clip_cell), dtype.type(problem.clip_grad)
        self.steps = TwoProducts(self) if cell.two_products else Plain(self)

    def chunks(self) -> list[range]:
        """The steps in walking order, cut into pieces of about CHUNK rows."""
        n = max(1, CHUNK // self.N)
        T = self.problem.T
        pieces = [range(t, min(T, t + n)) for t in range(0, T, n)]
        return [piece[::-1] for piece in pieces[::-1]] if self.backwards else pieces

    def multiply(self, a: Any, M: Any, out: Any = None) -> Any:
        """a (N,K) times M (E,K,J), set by set: (N,J)."""
        if len(M) == 1:
            return np.dot(a, M[0], out=out)
        shape = (len(M), -1)
        target = None if out is None else out.reshape(*shape, out.shape[-1])
        return np.matmul(a.reshape(*shape, a.shape[-1]), M, out=target).reshape(len(a), -1)

    def input_product(self, x: Any) -> Any:
        """x W^T of many steps, (n,N,G*H): a product, or for tokens (n,E,B) the columns of W that they stand for."""
        if not holds_tokens(x):
            product = self.times(x, self.WT)
        else:
            columns = self.WT[np.arange(self.problem.E)[:, None], x] if len(self.W) > 1 else self.WT[0][x]
            product = columns.reshape(len(x), self.N, -1)
        if self.extra is not None:
            product += self.extra
        return product

    def token_gradient(self, dW: Any, da: Any, tokens: Any) -> None:
        """da (n,N,G*H) added into the columns of dW (E,G*H,I) that tokens (n,E,B) stand for."""
        da = da.reshape(*tokens.shape, -1)
        for e in range(self.problem.E):
            kinds, which = np.unique(tokens[:, e], return_inverse=True)
            hot = (np.arange(len(kinds))[:, None] == which.reshape(-1)).astype(self.dtype)
            dW[e][:, kinds] += (hot @ da[:, e].reshape(which.size, -1)).T

    def times(self, a: Any, M: Any) -> Any:
        """a (n,E,B,K), many steps, times M (E,K,J): (n,N,J), contiguous."""
        n, E, B, K = a.shape
        if E == 1:
            product = a.reshape(n * B, K) @ M[0]
        else:
            product = np.ascontiguousarray(np.matmul(a, M))
        return product.reshape(n, E * B, -1)

    def outer(self, da: Any, x: Any) -> Any:
        """The gradient of W in x W^T over many steps: da (n,N,G*H), x (n,E,B,K) -> (E,G*H,K)."""
        n, E, B, K = x.shape
        if E == 1:
            return (da.reshape(n * B, -1).T @ x.reshape(n * B, K))[None]
        left = da.reshape(n, E, B, -1).transpose(1, 3, 0, 2).reshape(E, -1, n * B)
        return left @ x.transpose(1, 0, 2, 3).reshape(E, n * B, K)

    def by_sets(self, a: Any) -> Any:
        """(n,N,...) as (n,E,B,...)."""
        return a.reshape(len(a), self.problem.E, self.problem.B, *a.shape[2:])

    def ordered(self, chunk: range) -> slice:
        """The chunk as a slice of rising steps."""
        return slice(min(chunk), max(chunk) + 1)

    def before(self, states: Any, initial: Any, chunk: range, init_rows: Any) -> Any:
        """(n,N,H): the state before each step of a chunk, restarts applied; 0 in rows that do not run."""
        part = self.ordered(chunk)
        result = np.empty((len(chunk), self.N, self.problem.H), self.dtype)
        first = chunk[0]
        came_from = first + 1 if self.backwards else first - 1
        edge = states[came_from] if 0 <= came_from < self.problem.T else initial
        if self.backwards:
            result[:-1], result[-1] = states[part.start + 1 : part.stop], edge
        else:
            result[1:], result[0] = states[part.start : part.stop - 1], edge
        if self.restarts[part].any():
            restart = self.restart[part]
            result[restart] = np.broadcast_to(init_rows, result.shape)[restart] if init_rows is not None else 0
        if self.problem.lengths is not None:
            result[~self.active[part]] = 0
        return result

    def run(self, run: Run) -> None:
        """Forward: writes run.kept, unless it is None, run.h and run.c."""
        N, H = self.N, self.problem.H
        zeros = np.zeros((N, H), self.dtype)
        first_h, first_c = (run.h0, run.c0) if self.problem.reset_to_initial else (zeros, zeros)
        h, c = run.h0, run.c0
        for chunk in self.chunks():
            ax = self.input_product(run.x[self.ordered(chunk)])
            scratch = np.empty((N, self.cell.kept, H), self.dtype) if run.kept is None else None
            for t in chunk:
                if self.restarts[t]:
                    rows = self.restart[t][:, None]
                    h, c = np.where(rows, first_h, h), np.where(rows, first_c, c)
                kept = scratch if run.kept is None else run.kept[t]
                self.steps.forward(t, ax[t - min(chunk)], (h, c), (kept, run.h[t], run.c[t]))
                h, c = run.h[t], run.c[t]

    def rebuild(self, chunk: range, x: Any, h_prev: Any, c_prev: Any) -> Any:
        """The kept values (n,N,K,H) of a chunk, from the states before its steps."""
        n, N, H = h_prev.shape
        kept = np.empty((n, N, self.cell.kept, H), self.dtype)
        ax = self.input_product(x)
        h, c = np.empty((N, H), self.dtype), np.empty((N, H), self.dtype)
        for k in range(n):
            self.steps.forward(min(chunk) + k, ax[k], (h_prev[k], c_prev[k]), (kept[k], h, c))
        return kept
