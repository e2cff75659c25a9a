# SPDX-License-Identifier: Apache-2.0
"""Real-time recurrent learning: the exact gradient at every step, without going back in time (Williams & Zipser 1989).

Backpropagation keeps every step until the loss is known. RTRL carries forward, beside the state, what the state would
change by if a weight were another: the sensitivities d state / d weight. With them the gradient of a step's loss is
known at that step, and a sequence may go on for ever in the same memory. The price is arithmetic, see `RTRL`.

`chunks` walks through a sequence as `fusedrnn.tbptt.chunks` does, so one training loop serves three methods:

>>> from functools import partial
>>> from fusedrnn import rtrl, tbptt
>>> x = np.random.default_rng(0).standard_normal((1000, 4, 2)).astype(np.float32)   # 1000 steps of 4 rows
>>> target, _ = fusedrnn.GRU(2, 3, seed=1)(x)                                       # to learn: what another GRU does
>>> def train(chunks):
...     layer, error = fusedrnn.GRU(2, 3, seed=0), []
...     for chunk in chunks(layer, x):
...         dy = chunk.y - target[chunk.start : chunk.stop]               # the loss's gradient: here of half a square
...         error.append(float((dy**2).mean()))
...         grads = chunk.backward(dy / 40)
...         if chunk.update:
...             for name, weight in layer.parameters.items():
...                 weight -= grads[name]
...     return np.mean(error[-len(error) // 10 :]) / np.mean(error[: len(error) // 10 + 1])
>>> bool(train(partial(tbptt.chunks, k1=10, k2=30)) < 0.2)                          # truncated: looks 30 steps back
True
>>> bool(train(partial(rtrl.chunks, k1=10)) < 0.2)                                  # exact, back to the first step
True
>>> bool(train(partial(rtrl.chunks, k1=10, approximation="diagonal")) < 0.2)        # cheap
True

and `partial(tbptt.chunks, k1=len(x))` is backpropagation through the whole sequence. Where the weights change on the
way, sensitivities are those along the weights as they were at each step, which is what every online method has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import check, layers, tbptt
from . import params as parameters
from .arrays import kind as kind_of
from .cells import CELLS, dropout
from .cells.cell import Cell

__all__ = ["RTRL", "Chunk", "chunks"]

_Array = np.ndarray

BLOCK = 1 << 17  # bytes of sensitivities that one product takes at a time: they stay in the second-level cache


class RTRL:
    """A layer that learns while it runs: `step` goes one step on, `gradient` tells the gradient of that step's loss.

    layer          any of fusedrnn's of one direction, with any number of layers. Its `parameters` are read anew at
                   every step; change them in place whenever you like
    state          the state before the first step, as the layer takes it: h (L,B,H), or (h, c); None: zeros
    approximation  None: exact. "diagonal": keep only what a unit's own weights do to that unit's own state (SnAp-1 of
                   Menick et al. 2021); layers beneath learn from what reaches them within the step. Exact for one layer
                   whose recurrent weights connect no unit with another; one layer of MinGRU or MinLSTM, which have
                   none, is always kept so

    With n states a unit (2 for the LSTM, else 1) and P weights a layer (G*H*(I+H+1); the GRU keeps H more):

                 memory, numbers     arithmetic a step, flops                beside BPTT's step (6 B P flops)
    exact        B n H (P + n H)     2 B n H^2 P, products of matrices       n H^2 / 3 times
    "diagonal"   B n (P + n H)       about 4 B n P, passes over memory       about the same

    both without T. Each layer above keeps and moves sensitivities to the weights of every layer beneath as well, with
    one product more. So exact RTRL is for a few dozen units: an LSTM of 64 units with I = 8, B = 1, float32 takes
    9.6 MB and 0.31 Gflop a step. Steps run in NumPy: a small one takes 0.1 to 0.4 ms whatever its arithmetic, which is
    what "diagonal" mostly costs. `python bench/rtrl_cost.py` measures.

    >>> layer = fusedrnn.LSTM(3, 4, dtype=np.float64, seed=0)
    >>> x = np.random.default_rng(0).standard_normal((50, 2, 3))
    >>> learner, sums = fusedrnn.rtrl.RTRL(layer), 0
    >>> for x_t in x:
    ...     y_t = learner.step(x_t)
    ...     sums = sums + learner.gradient(y_t - 1)["weight_hh_l0"]
    >>> y, _ = layer(x)                                                    # the same by backpropagation
    >>> bool(np.allclose(sums, layer.backward(y - 1)["weight_hh_l0"], rtol=1e-10))
    True
    """

    def __init__(self, layer: Any, state: Any = None, *, approximation: str | None = None) -> None:
        if not isinstance(layer, layers._Layer):
            fix = "For a torch module: layer.load_state_dict(module.state_dict())."
            check.fail("RTRL", "layer", f"is {kind_of(layer)}", "a layer of fusedrnn, such as LSTM", fix, TypeError)
        for name, value in layer.variants.items():
            if value:
                check.fail("RTRL", "layer", f"has {name}={value!r}", f"no {name}", "RTRL does not know that option.")
        if layer.bidirectional:
            why = "The other begins at the end of the sequence, which an online method never sees."
            check.fail("RTRL", "layer", "is bidirectional", "one direction", why)
        if layer.clip_grad is not None:
            why = "It clips inside backpropagation, and there is none here. Clip what `gradient` returns."
            check.fail("RTRL", "layer", f"has clip_grad={layer.clip_grad}", "clip_grad=None", why)
        if approximation not in (None, "diagonal"):
            check.fail("RTRL", "approximation", f"is {approximation!r}", 'None (exact) or "diagonal"')
        self.layer = layer
        self.approximation = approximation
        self._cell: Cell = CELLS[layer._cell]
        self._shapes = parameters.shapes(
            layer._cell, layer.input_size, layer.hidden_size, layer.num_layers, bias=layer.bias
        )
        unknown = layer.parameters.keys() - self._shapes.keys()
        if unknown:
            fix = "A context can be given as more features of x."
            check.fail("RTRL", "layer", f"has {', '.join(sorted(unknown))}", f"only {', '.join(self._shapes)}", fix)
        sizes = [layer.input_size] + [layer.hidden_size] * (layer.num_layers - 1)
        self._columns = [Columns.of(self._cell, I, layer.hidden_size, layer.bias) for I in sizes]
        self._diagonal = approximation == "diagonal" or (layer.num_layers == 1 and not self._cell.state_product)
        self._weights()  # refuses what does not fit now, not at the first step
        self._given = self._initial(state)
        self._states: list[list[_Array]] = []  # per layer: h, and c for the LSTM, (B,H); made by the first step
        self._sensitivities: Exact | Diagonal | None = None
        self._active: _Array | None = None  # (B,1): the rows that the last step ran
        self._unbatched = False

    def _initial(self, state: Any) -> list[_Array] | None:
        """The given state's parts, checked but for B."""
        layer, found = self.layer, []
        parts = check.state_parts("RTRL", "state", self._cell, state)
        names = ("state[0]", "state[1]") if self._cell.cell_state else ("state", "")
        for name, part in zip(names, parts, strict=True):
            if part is not None:
                check.is_float("RTRL", name, part, layer.dtype, "the layer")
                L, H = layer.num_layers, layer.hidden_size
                if part.ndim not in (2, 3) or (part.shape[0], part.shape[-1]) != (L, H):
                    got = f"has shape {part.shape}"
                    check.fail("RTRL", name, got, f"(L, B, H), or (L, H) without a batch, with L={L}, H={H}")
                found.append(part.copy())
        if len({part.shape for part in found}) > 1:
            got = f"has shape {found[1].shape}"
            check.fail("RTRL", "state[1]", got, f"{found[0].shape}, the shape of state[0]")
        return found or None

    def _weights(self) -> list[list[Any]]:
        """Per layer: W, R and the two biases, None where the layer has none."""
        layer = self.layer
        for name, shape in self._shapes.items():
            array = layer.parameters[name]
            check.is_float("RTRL", name, array, layer.dtype, "the layer")
            if array.shape != shape:
                fix = "An axis E in front (an ensemble) is not learned online: take one learner for each model."
                check.fail("RTRL", name, f"has shape {array.shape}", str(shape), fix if array.ndim > len(shape) else "")
        return [[layer.parameters.get(f"{kind}_l{n}") for kind in parameters.KINDS] for n in range(layer.num_layers)]

    def _begin(self, x_t: _Array) -> None:
        """The first step says how many rows there are."""
        layer, cell = self.layer, self._cell
        self._unbatched = x_t.ndim == 1
        B, H = 1 if self._unbatched else len(x_t), layer.hidden_size
        count = 2 if cell.cell_state else 1
        given = self._given
        if given is None:
            given = [np.zeros((layer.num_layers, B, H), layer.dtype)] * count
        elif given[0].shape[1:-1] != x_t.shape[:-1]:
            got = f"has shape {x_t.shape}"
            expected = f"{(*given[0].shape[1:-1], layer.input_size)} from the state {given[0].shape}"
            check.fail("RTRL.step", "x_t", got, expected)
        self._states = [[part[n].reshape(B, H).copy() for part in given] for n in range(layer.num_layers)]
        kind = Diagonal if self._diagonal else Exact
        self._sensitivities = kind(self._columns, count, B, H, layer.dtype)
        self._given = None

    @property
    def state(self) -> Any:
        """The state after the last step, new arrays as the layer returns them; None before the first."""
        if not self._states:
            return None
        parts = [np.stack(parts) for parts in zip(*self._states, strict=True)]
        if self._unbatched:
            parts = [part[:, 0] for part in parts]
        return tuple(parts) if self._cell.cell_state else parts[0]

    @property
    def nbytes(self) -> int:
        """Bytes of sensitivities, which are all that is kept beside the state; 0 before the first step."""
        return 0 if self._sensitivities is None else self._sensitivities.nbytes

    def step(self, x_t: _Array, reset: Any = None, active: Any = None) -> _Array:
        """Run one step: y_t (B,H), a new array, from x_t (B,I); or (H,) from (I,), then at every step.

        reset   bool or uint8 (B,): these rows begin a new sequence, from the zero state; no gradient crosses that
        active  bool (B,): rows where it is False have ended: their y_t is 0, state and sensitivities stay as they are

        In training mode dropout between layers draws another mask at every step, as a call of the layer does.
        Raises TypeError or ValueError before anything is written.
        """
        layer = self.layer
        check.is_float("RTRL.step", "x_t", x_t, layer.dtype, "the layer")
        rows = x_t.shape[:-1]
        I = layer.input_size
        if x_t.ndim not in (1, 2) or x_t.shape[-1] != I:
            check.fail("RTRL.step", "x_t", f"has shape {x_t.shape}", f"(B, I) or (I,) with I={I}")
        if self._states:
            expected = () if self._unbatched else (len(self._states[0][0]),)
            if rows != expected:
                fix = "Rows that end: active. Another batch: a new learner."
                check.fail("RTRL.step", "x_t", f"has shape {x_t.shape}", f"{(*expected, I)} as at first", fix)
        marks = self._marks("reset", reset, rows), self._marks("active", active, rows)
        weights = self._weights()
        if self._sensitivities is None:
            self._begin(x_t)
        assert self._sensitivities is not None
        B = len(self._states[0][0])
        alive = np.ones((B, 1), bool) if marks[1] is None else marks[1].reshape(B, 1)
        if marks[0] is not None:
            restart = marks[0].reshape(B, 1) & alive
            for parts in self._states:
                for part in parts:
                    part[restart[:, 0]] = 0
            self._sensitivities.reset(restart[:, 0])
        seed = layer._mask_seed()
        y, linear, scales = np.where(alive, x_t.reshape(B, I), 0), [], []
        for n, (columns, arrays) in enumerate(zip(self._columns, weights, strict=True)):
            scale = None
            if n > 0 and seed is not None:
                scale = dropout.scale((1, 1, *y.shape), layer.dropout, seed, n - 1)[0, 0].astype(layer.dtype)
                y = y * scale
            step = linearise(self._cell, columns, y, self._states[n], arrays, alive, layer._clip_cell or 0.0)
            self._states[n] = step.state
            y = step.state[0]
            linear.append(step)
            scales.append(scale)
        self._sensitivities.advance(linear, scales)
        layer.draws += seed is not None
        self._active = alive
        y = np.where(alive, y, 0)
        return y[0] if self._unbatched else y

    def _marks(self, name: str, given: Any, rows: tuple[int, ...]) -> Any:
        if given is None:
            return None
        array = np.asarray(given)
        if array.dtype not in (np.dtype(bool), np.dtype(np.uint8)):
            check.fail("RTRL.step", name, f"has dtype {array.dtype}", "bool or uint8", error=TypeError)
        if array.shape != rows:
            check.fail("RTRL.step", name, f"has shape {array.shape}", f"{rows}, one for each row of x_t")
        return array != 0

    def gradient(self, dy_t: _Array | None, dstate: Any = None) -> dict[str, Any]:
        """The gradient of the last step's loss: new arrays, one for each parameter, and "state" for the initial state.

        dy_t (shaped as y_t) and dstate (shaped as the state) are the loss's gradients in what the step returned and in
        the state after it; None: zero. Rows that did not run have no y, so dy_t is ignored there. Sums over steps are
        what `layer.backward` returns for all of them at once. There is no "x": what past inputs changed is not kept.
        Raises RuntimeError before the first step, TypeError or ValueError for arrays that do not fit.
        """
        if self._sensitivities is None or self._active is None:
            raise RuntimeError("RTRL.gradient: there was no step yet. Call y_t = learner.step(x_t) first.")
        layer, count = self.layer, len(self._states[0])
        B, H, L = len(self._active), layer.hidden_size, layer.num_layers
        errors: list[list[Any]] = [[None] * count for _ in range(L)]
        if dy_t is not None:
            shape = (H,) if self._unbatched else (B, H)
            self._expect("dy_t", dy_t, shape)
            errors[-1][0] = np.where(self._active, dy_t.reshape(B, H), 0)
        names = ("dstate[0]", "dstate[1]") if self._cell.cell_state else ("dstate",)
        parts = check.state_parts("RTRL.gradient", "dstate", self._cell, dstate)[:count]
        for q, (name, part) in enumerate(zip(names, parts, strict=True)):
            if part is not None:
                self._expect(name, part, (L, H) if self._unbatched else (L, B, H))
                for n, own in enumerate(part.reshape(L, B, H)):
                    errors[n][q] = own if errors[n][q] is None else errors[n][q] + own
        found, state = self._sensitivities.gradient(errors)
        grads: dict[str, Any] = {}
        for n, (columns, blocks) in enumerate(zip(self._columns, found, strict=True)):
            for kind, array in columns.parameters(blocks).items():
                grads[f"{kind}_l{n}"] = array
        starts = [np.stack([own[q] for own in state]) for q in range(count)]
        if self._unbatched:
            starts = [start[:, 0] for start in starts]
        return {"state": tuple(starts) if self._cell.cell_state else starts[0], **grads}

    def _expect(self, name: str, array: Any, shape: tuple[int, ...]) -> None:
        check.is_float("RTRL.gradient", name, array, self.layer.dtype, "the layer")
        if array.shape != shape:
            check.fail("RTRL.gradient", name, f"has shape {array.shape}", f"{shape} from the last step")


# One step of one layer, and its derivatives. Below, n counts a unit's states (h, then c), S the cell's sums, and w what
# a sum is made of: x, h' and 1, as far as it takes them.


@dataclass(frozen=True, slots=True)
class Columns:
    """Where a layer's weights lie: the weights of a sum s, in the columns first[s]..first[s+1] of each unit."""

    cell: Cell
    I: int
    H: int
    bias: bool
    first: tuple[int, ...]

    @classmethod
    def of(cls, cell: Cell, I: int, H: int, bias: bool) -> Columns:
        """The columns of one layer."""
        first = [0]
        for s in range(cell.sums):
            first.append(first[-1] + I * (s in cell.x_sum) + H * (s in cell.h_sum) + bias)
        return cls(cell, I, H, bias, tuple(first))

    @property
    def total(self) -> int:
        """Columns of one unit."""
        return self.first[-1]

    def inputs(self, x: _Array, h: list[_Array]) -> list[_Array]:
        """(B,w) per sum, where h[s] is what its recurrent weights multiply."""
        one = [np.ones((len(x), 1), x.dtype)] if self.bias else []
        return [
            np.concatenate([x] * (s in self.cell.x_sum) + [h[s]] * (s in self.cell.h_sum) + one, axis=1)
            for s in range(self.cell.sums)
        ]

    def parameters(self, blocks: list[_Array]) -> dict[str, _Array]:
        """The gradients of a layer's parameters, by kind, from those of each sum's weights, (H,w) per sum."""
        of_x = [blocks[s] for s in self.cell.x_sum]
        of_h = [blocks[s] for s in self.cell.h_sum]
        parts = {"weight_ih": [block[:, : self.I] for block in of_x]}
        parts["weight_hh"] = [block[:, block.shape[1] - self.H - self.bias :][:, : self.H] for block in of_h]
        parts["bias_ih"] = [block[:, -1] for block in of_x]
        parts["bias_hh"] = [block[:, -1] for block in of_h]
        return {kind: np.concatenate(parts[kind]) for kind in parameters.kinds(self.cell.name, self.bias)}


@dataclass(slots=True)
class Linear:
    """One step of one layer, and what a small change does to the states after it; rows that do not run stay as is.

    `mixed` is for cells of two products only (see cells/gru.py): how r h' answers to h' and to r's sum, each (B,H);
    the first sum then reaches every unit's h, by way of the second product.
    """

    columns: Columns
    W: _Array  # (G,H,I)
    R: _Array  # (G,H,H), or (0,H,H) without a product of states
    state: list[_Array]  # n of (B,H)
    own: _Array  # (B,n,S,H): of a unit's states to its sums
    past: _Array  # (B,n,n,H): of a unit's states to those before, past the products
    inputs: list[_Array]  # per sum (B,w): what its weights multiply
    mixed: tuple[_Array, _Array] | None

    def across(self) -> _Array:
        """(B,H,H): of unit j's h to unit k's first sum, where that goes through the second product."""
        assert self.mixed is not None
        product: _Array = self.own[:, 0, 2, :, None] * self.R[2] * self.mixed[1][:, None, :]
        return product

    def to_state(self) -> _Array:
        """(B,n,H,H): of the states to h', all ways."""
        cell = self.columns.cell
        M: _Array
        if self.mixed is None:
            M = np.einsum("bqgk,gkj->bqkj", self.own[:, :, cell.h_sum], self.R)
        else:
            M = np.einsum("bqgk,gkj->bqkj", self.own[:, :, 1:2], self.R[1:2])
            M[:, 0] += self.own[:, 0, 2, :, None] * self.R[2] * self.mixed[0][:, None, :] + self.across() @ self.R[0]
        diagonal = np.einsum("bqkk->bqk", M)  # a view
        diagonal += self.past[:, :, 0]
        return M

    def to_own_state(self) -> _Array:
        """(B,n,H): the diagonal of `to_state`, without the rest."""
        cell, R = self.columns.cell, np.einsum("gkk->gk", self.R)
        K: _Array
        if self.mixed is None:
            K = np.einsum("bqgk,gk->bqk", self.own[:, :, cell.h_sum], R)
        else:
            K = self.own[:, :, 1] * R[1]
            K[:, 0] += self.own[:, 0, 2] * R[2] * self.mixed[0] + np.einsum("bkj,jk->bk", self.across(), self.R[0])
        K += self.past[:, :, 0]
        return K

    def to_input(self) -> _Array:
        """(B,n,H,I): of the states to x."""
        N: _Array = np.einsum("bqgk,gki->bqki", self.own[:, :, self.columns.cell.x_sum], self.W)
        if self.mixed is not None:
            N[:, 0] += self.across() @ self.W[0]
        return N


def linearise(
    cell: Cell, columns: Columns, x: _Array, before: list[_Array], arrays: list[Any], alive: _Array, clip: float
) -> Linear:
    """Run one step of one layer, x (B,I) to the states after it, and ask the cell for its derivatives."""
    W, R, bW, bR = arrays
    H, dtype = columns.H, x.dtype
    h_prev, c_prev = before[0], before[-1]
    n = len(before)
    # The derivatives of h, then of c, to everything: backward from (dh, dc) = (1, 0), then (0, 1).
    seeds = [np.eye(n, dtype=dtype)[:, q].reshape(n, 1, 1) for q in range(n)]
    dh, dc = seeds[0], seeds[-1] if n > 1 else np.zeros((1, 1, 1), dtype)
    a: list[Any] = [0.0] * cell.sums
    of_x = x @ W.T if bW is None else x @ W.T + bW
    for s, part in zip(cell.x_sum, np.split(of_x, cell.gates, axis=1), strict=True):
        a[s] = a[s] + part
    own = np.zeros((n, cell.sums, *h_prev.shape), dtype)
    past = np.zeros((n, n, *h_prev.shape), dtype)
    mixed = None
    multiplied = [h_prev] * cell.sums
    if cell.gate is not None and cell.backward_gate is not None:
        early = h_prev @ R[: 2 * H].T if bR is None else h_prev @ R[: 2 * H].T + bR[: 2 * H]
        r, z, rh = cell.gate(a[0] + early[:, :H], a[1] + early[:, H:], h_prev)
        late = rh @ R[2 * H :].T if bR is None else rh @ R[2 * H :].T + bR[2 * H :]
        new, h = cell.forward(a[2] + late, z, h_prev)
        after = [h]
        own[:, 1], own[:, 2], past[:, 0] = cell.backward(z, new, h_prev, dh)
        to_sum, to_h = cell.backward_gate(r, h_prev, np.ones_like(r))
        mixed = np.where(alive, to_h, 0), np.where(alive, to_sum, 0)
        multiplied[2] = rh
    else:
        if cell.state_product:
            of_h = h_prev @ R.T if bR is None else h_prev @ R.T + bR
            for s, part in zip(cell.h_sum, np.split(of_h, cell.gates, axis=1), strict=True):
                a[s] = a[s] + part
        kept, h, c = cell.forward(a, h_prev, c_prev, clip)
        after = [h, c][:n]
        da, dh_prev, dc_prev = cell.backward(kept, h_prev, h, c_prev, c, clip, dh, dc)
        for s in range(cell.sums):
            own[:, s] = da[s]
        past[:, 0] = dh_prev
        if n > 1:
            past[:, 1] = dc_prev
    unmoved = np.eye(n, dtype=dtype)[:, :, None, None]
    return Linear(
        columns,
        W.reshape(cell.gates, H, columns.I),
        np.zeros((0, H, H), dtype) if R is None else R.reshape(cell.gates, H, H),
        [np.where(alive, new, old) for new, old in zip(after, before, strict=True)],
        np.where(alive, own, 0).transpose(2, 0, 1, 3),
        np.where(alive, past, unmoved).transpose(2, 0, 1, 3),
        columns.inputs(x, multiplied),
        mixed,
    )


# What is carried beside the state: d state / d weights, all of it or each unit's own.


class Exact:
    """All sensitivities. Of layer m's states to layer l's weights: (n,B,H,P), in `of[m][l]`, for l <= m.

    P is the layer's weights, ordered by sum, unit and column, and then the initial states, ordered by state and unit.
    """

    def __init__(self, columns: list[Columns], count: int, B: int, H: int, dtype: Any) -> None:
        self.columns, self.H = columns, H
        self.weights = [H * c.total for c in columns]
        shape = (count, B, H)
        self.of = [
            [np.zeros((*shape, P + count * H), dtype) for P in self.weights[: m + 1]] for m in range(len(columns))
        ]
        for m, P in enumerate(self.weights):
            start = self.of[m][m][..., P:].reshape(*shape, count, H)
            np.einsum("qbkqk->qbk", start)[...] = 1  # the initial state to itself; einsum gives a view

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for row in self.of for array in row)

    def reset(self, rows: _Array) -> None:
        for row in self.of:
            for array in row:
                array[:, rows] = 0

    def advance(self, steps: list[Linear], scales: list[Any]) -> None:
        """One step on: S = (d state / d state') S', plus what comes from beneath, plus this step's own part."""
        H = self.H
        for m, step in enumerate(steps):
            n, B = len(step.state), len(step.state[0])
            M = step.to_state().reshape(B, n * H, H)
            c_past = step.past[:, :, 1, :, None] if n > 1 else None
            N = None
            if m > 0:
                N = step.to_input()
                N = (N if scales[m] is None else N * scales[m][:, None, None, :]).reshape(B, n * H, H)
            for l, S in enumerate(self.of[m]):
                beneath = self.of[m - 1][l] if l < m else None
                for rows, cols in self.blocks(S):
                    moved = M[rows] @ S[0, rows, :, cols]
                    if beneath is not None and N is not None:
                        moved += N[rows] @ beneath[0, rows, :, cols]
                    moved = moved.reshape(-1, n, H, moved.shape[-1])
                    if c_past is not None:
                        moved += c_past[rows] * S[1, rows, :, cols][:, None]
                    S[:, rows, :, cols] = moved.swapaxes(0, 1)
                flush(S[..., self.weights[l] :])
            self.add(self.of[m][m], step)

    def blocks(self, S: _Array) -> Iterator[tuple[slice, slice]]:
        """Rows and columns such that a block of one state's sensitivities has about BLOCK bytes."""
        _, B, H, P = S.shape
        line = H * S.itemsize
        cols = max(min(P, BLOCK // line), 64)
        rows = max(BLOCK // (line * P), 1) if cols >= P else 1
        for b in range(0, B, rows):
            for p in range(0, P, cols):
                yield slice(b, b + rows), slice(p, p + cols)

    def add(self, S: _Array, step: Linear) -> None:
        """This step's own part: a weight of unit k reaches the states of unit k only, but for `mixed`."""
        H, first = self.H, step.columns.first
        for s, u in enumerate(step.inputs):
            part = S[..., H * first[s] : H * first[s + 1]]
            part = part.reshape(*part.shape[:3], H, len(u.T))  # (n,B,H,H,w), a view
            if s == 0 and step.mixed is not None:
                for into, across, row in zip(part[0], step.across(), u, strict=True):
                    into += across[:, :, None] * row
            else:
                own = np.einsum("qbkkw->qbkw", part)  # a view
                own += step.own[:, :, s].swapaxes(0, 1)[..., None] * u[:, None, :]

    def gradient(self, errors: list[list[Any]]) -> tuple[list[list[_Array]], list[list[_Array]]]:
        """Per layer: the gradients of each sum's weights (H,w), and of the initial states (B,H)."""
        H, grads, states = self.H, [], []
        for l, (columns, P) in enumerate(zip(self.columns, self.weights, strict=True)):
            n, B = self.of[l][l].shape[:2]
            total = np.zeros(P, self.of[l][l].dtype)
            start = np.zeros((B, n * H), total.dtype)
            for m in range(l, len(self.columns)):
                for error, S in zip(errors[m], self.of[m][l], strict=True):
                    if error is not None:
                        total += error.reshape(-1) @ S.reshape(B * H, S.shape[-1])[:, :P]
                        start += (error[:, None] @ S[..., P:])[:, 0]
            blocks = np.split(total, [H * f for f in columns.first[1:-1]])
            grads.append([block.reshape(H, -1) for block in blocks])
            states.append(np.split(start, n, axis=1))
        return grads, states


class Diagonal:
    """Each unit's own sensitivities: (n,B,H,P) per layer, where P is the unit's own columns and its initial states."""

    def __init__(self, columns: list[Columns], count: int, B: int, H: int, dtype: Any) -> None:
        self.columns = columns
        self.of = [np.zeros((count, B, H, c.total + count), dtype) for c in columns]
        for array, c in zip(self.of, columns, strict=True):
            array[..., c.total :] = np.eye(count)[:, None, None]
        self.steps: list[Linear] = []
        self.scales: list[Any] = []

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.of)

    def reset(self, rows: _Array) -> None:
        for array in self.of:
            array[:, rows] = 0

    def advance(self, steps: list[Linear], scales: list[Any]) -> None:
        """One step on, each unit by itself."""
        for S, step in zip(self.of, steps, strict=True):
            K = step.to_own_state().swapaxes(0, 1)[..., None]
            if len(S) > 1:
                c_past = step.past[:, :, 1].swapaxes(0, 1)[..., None]
                moved = K[0] * S[0] + c_past[0] * S[1]
                S[1] *= c_past[1]
                S[1] += K[1] * S[0]
                S[0] = moved
            else:
                S *= K
            own = step.own
            if step.mixed is not None:
                own = own.copy()
                own[:, 0, 0] = np.einsum("bkk->bk", step.across())
            for s, u in enumerate(step.inputs):
                part = S[..., step.columns.first[s] : step.columns.first[s + 1]]
                part += own[:, :, s].swapaxes(0, 1)[..., None] * u[:, None, :]
            flush(S[..., step.columns.total :])
        self.steps, self.scales = steps, scales

    def gradient(self, errors: list[list[Any]]) -> tuple[list[list[_Array]], list[list[_Array]]]:
        """As Exact's. What reaches a layer from above goes down within this step."""
        grads: list[list[_Array]] = []
        states: list[list[_Array]] = []
        down: Any = 0
        for S, step, scale, given in reversed(list(zip(self.of, self.steps, self.scales, errors, strict=True))):
            n, columns = len(S), step.columns
            error = np.zeros(S.shape[:3], S.dtype)
            for q, part in enumerate(given):
                if part is not None:
                    error[q] = part
            error[0] += down
            total = np.einsum("qbk,qbkp->kp", error, S[..., : columns.total])
            start = np.einsum("qbk,qbkp->pbk", error, S[..., columns.total :])
            grads.insert(0, np.split(total, columns.first[1:-1], axis=1))
            states.insert(0, [start[q] for q in range(n)])
            down = np.einsum("qbk,bqki->bi", error, step.to_input())
            if scale is not None:
                down = down * scale
        return grads, states


def flush(start: _Array) -> None:
    """What the initial state does fades by the same factor at every step, and would stay a denormal number for ever
    (1.4e-45 * 0.9 rounds to 1.4e-45), with which processors are slow."""
    start[np.abs(start) < np.finfo(start.dtype).tiny] = 0


# The walk through a sequence.


class Chunk:
    """One new step of the sequence, run forward, with the attributes of `fusedrnn.tbptt.Chunk`.

    start, stop   the step, and the one after it
    y             the layer's output at this step, with its axis of time
    state         the state after it
    lengths       for each row whether it has this step (0 or 1), or None when all have
    update        True when the gradients that `backward` returns are complete: time for the optimizer
    window        0: gradients flow from the first step on
    """

    def __init__(self, walk: Walk, learner: RTRL, stop: int, update: bool) -> None:
        self.start, self.stop, self.update, self.window = walk.start, stop, update, 0
        self.walk: Walk | None = walk
        self.learner = learner
        self.axis = walk.steps.axis
        x, reset = walk.steps.x(self.start, stop), walk.steps.reset(self.start, stop)
        self.lengths = walk.lengths_between(self.start, stop)
        y = learner.step(
            x.squeeze(self.axis),
            None if reset is None else reset.squeeze(self.axis),
            None if self.lengths is None else self.lengths > 0,
        )
        self.y = np.expand_dims(y, self.axis)
        self.state = learner.state

    def backward(self, dy: _Array | None, dstate: Any = None) -> dict[str, Any]:
        """Gradients as `RTRL.gradient` returns them, summed since the last update, from dy and dstate."""
        walk, self.walk = self.walk, None
        if walk is None:
            raise RuntimeError(
                "rtrl: backward was called twice, or after the next chunk was taken; "
                "expected one call for each chunk while it is the current one. Add the losses' dy before the call"
            )
        if dy is not None and np.shape(dy) != self.y.shape:
            check.fail("rtrl", "dy", f"has shape {np.shape(dy)}", f"{self.y.shape}, the shape of this chunk's y")
        grads = self.learner.gradient(None if dy is None else dy.squeeze(self.axis), dstate)
        state = grads.pop("state")
        for name, gradient in grads.items():
            walk.sums[name] = gradient if name not in walk.sums else np.add(walk.sums[name], gradient, out=gradient)
        sums = walk.sums
        if self.update:
            walk.sums = {}
        return {"state": state, **sums}


def chunks(
    layer: Any,
    x: Any,
    *,
    k1: int = 1,
    state: Any = None,
    lengths: _Array | None = None,
    reset: _Array | None = None,
    approximation: str | None = None,
) -> Iterator[Chunk]:
    """Walk through a sequence of any length by RTRL, step by step; takes and gives what `fusedrnn.tbptt.chunks` does.

    An update comes every k1 steps; until then the gradients add up. layer, approximation: see `RTRL`. x, state,
    lengths, reset: see `fusedrnn.tbptt.chunks`; x may be an iterable of blocks, too. What `backward` returns has no
    "x", and "state" is the gradient of this step's loss in the state before the first step.
    """
    learner = RTRL(layer, state, approximation=approximation)
    return Walk("rtrl", layer, x, check.integer("rtrl", "k1", k1, 1), 1, None, lengths, reset).steps_of(learner)


class Walk(tbptt.Walk):
    """Where `chunks` is."""

    def steps_of(self, learner: RTRL) -> Iterator[Chunk]:
        done = 0  # steps since the last update
        while True:
            stop = self.steps.fetch(self.start + 1)
            if stop == self.start:
                return
            done += 1
            # Looking ahead for the end never happens across an update: the next block may depend on it.
            update = done == self.k1 or self.steps.fetch(stop + 1) == stop
            chunk = Chunk(self, learner, stop, update)
            yield chunk
            chunk.walk = None
            del chunk
            self.start = stop
            self.steps.forget(stop)
            if update:
                done = 0
