# SPDX-License-Identifier: Apache-2.0
"""The judge of the variants: one layer in one direction, forward and backward, for reference.py.

Per row and step, with h', c' the state before it (see csrc/README.md, "The stepwise engine"):

    ax = norm(x W^T) + bW,  ah = norm((h' * mask) R^T) + bR          norm: layer norm times gain, or nothing
    LSTM   i, f = F(ax + ah + p c'),  g = G(ax + ah),  c~ = clip(f c' + i g),  o = F(ax + ah + p c~)
           m = o H(norm(c~));  coupled: f = 1 - i
    GRU    r, z = F(ax + ah),  n = G(ax + r ah) or G(ax + (r h' * mask) Rn^T)
           m = n + z (c' - n),  c' = h' unless projected
    RNN    m = F(ax + ah)
    out    h = k_h h' + (1 - k_h) (m Wr^T or m),  c = k_c c' + (1 - k_c) c~
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..cells import CELLS, dropout
from ..cells.activations import ACTIVATIONS
from ..cells.number import clamp, inside
from . import Problem

EPSILON = 1e-5  # of layer norm, as in torch


def has_c(problem: Problem) -> bool:
    """Whether the state has a second part."""
    return CELLS[problem.cell].cell_state or (problem.variant is not None and problem.variant.proj_size > 0)


def _norm(a: Any) -> tuple[Any, Any]:
    """a with mean 0 and variance 1 along the last axis, and 1 / its deviation."""
    centred = a - a.mean(-1, keepdims=True)
    scale = 1 / np.sqrt((centred * centred).mean(-1, keepdims=True) + EPSILON)
    return centred * scale, scale


def _norm_back(d: Any, hat: Any, scale: Any) -> Any:
    """The gradient of a from that of `hat`, where hat, scale = _norm(a)."""
    return scale * (d - d.mean(-1, keepdims=True) - hat * (d * hat).mean(-1, keepdims=True))


def _row(a: Any) -> Any:
    """(E,n) as (E,1,n)."""
    return a[:, None, :]


class Walk:
    """One layer (n = layer * D + direction) in one direction. All arrays as in reference.py."""

    def __init__(self, problem: Problem, n: int, params: Any, extras: Any) -> None:
        assert problem.variant is not None
        self.problem, self.variant, self.n = problem, problem.variant, n
        self.cell = CELLS[problem.cell]
        self.W, self.R, self.bW, self.bR = params
        self.hr, self.ph, self.gain_ih, self.gain_hh, self.gain_c, self.bias_c = extras
        self.lstm = self.cell.cell_state
        self.coupled = problem.cell == "cifg"
        rows, v = (problem.E, problem.B), self.variant
        self.mask: Any = 1.0
        if v.training and v.recurrent_dropout > 0:
            self.mask = dropout.scale((*rows, problem.outputs), v.recurrent_dropout, problem.seed, n, 4)

    def keep(self, t_all: int, p: float, stream: int, units: int) -> Any:
        """(T,E,B,units): how much of the old state stays."""
        shape = (t_all, self.problem.E, self.problem.B, units)
        if not self.variant.training or p == 0:
            return np.full(shape, p)
        return dropout.drawn(shape, p, self.problem.seed, self.n, stream).astype(np.float64)

    def act(self, k: int, a: Any) -> Any:
        name, alpha, beta = self.variant.activations[k]
        return ACTIVATIONS[name].f(clamp(a, self.variant.clip_gates), alpha, beta)

    def back(self, d: Any, k: int, a: Any, y: Any) -> Any:
        """d times the derivative of `act`: 0 where a is clipped, whatever d is."""
        name, alpha, beta = self.variant.activations[k]
        return inside(d * ACTIVATIONS[name].slope(y, alpha, beta), a, self.variant.clip_gates)

    def bare(self, k: int, a: Any) -> Any:
        """The last activation of the LSTM: its argument is not clipped."""
        name, alpha, beta = self.variant.activations[k]
        return ACTIVATIONS[name].f(a, alpha, beta)

    def product(self, x: Any, M: Any, gain: Any, bias: Any, extra: Any = 0.0) -> Any:
        """The product and `extra`, with layer norm and bias: value, and what `product_back` needs."""
        a = x @ M.swapaxes(-1, -2) + extra
        hat = scale = None
        if self.variant.layer_norm:
            hat, scale = _norm(a)
            a = hat * _row(gain)
        return (a if bias is None else a + _row(bias)), (hat, scale)

    def product_back(self, da: Any, norm: Any, gain: Any) -> Any:
        return da if norm[0] is None else _norm_back(da * _row(gain), *norm)

    # One step.

    def step(self, ax: Any, h_prev: Any, c_prev: Any, keep_h: Any, keep_c: Any) -> Any:
        """h, c and everything backward needs."""
        H, k = self.problem.H, {"h_prev": h_prev, "c_prev": c_prev}
        masked = h_prev * self.mask
        k["masked"] = masked
        before = self.problem.cell == "gru_reset_before"
        R, bR = (self.R[:, : 2 * H], None if self.bR is None else self.bR[:, : 2 * H]) if before else (self.R, self.bR)
        ah, k["norm_h"] = self.product(masked, R, self.gain_hh, bR)
        c_new = c_prev
        if self.lstm:
            gates = np.split(ax + ah, self.cell.gates, -1)
            a_i, a_g, a_o = gates[0], gates[-2], gates[-1]
            peep = [_row(p) for p in np.split(self.ph, self.cell.gates - 1, -1)] if self.ph is not None else None
            if peep:
                a_i = a_i + peep[0] * c_prev
            i = self.act(0, a_i)
            if self.coupled:
                a_f, f = None, 1 - i
            else:
                a_f = gates[1] + peep[1] * c_prev if peep else gates[1]
                f = self.act(0, a_f)
            g = self.act(1, a_g)
            c_new = clamp(f * c_prev + i * g, self.problem.clip_cell)
            if peep:
                a_o = a_o + peep[-1] * c_new
            o = self.act(0, a_o)
            v = c_new
            if self.variant.layer_norm:
                k["norm_c"] = _norm(c_new)
                v = k["norm_c"][0] * _row(self.gain_c) + _row(self.bias_c)
            y = self.bare(2, v)
            m = o * y
            k |= {"i": i, "f": f, "g": g, "o": o, "a_i": a_i, "a_f": a_f, "a_g": a_g, "a_o": a_o, "y": y, "v": v}
        elif self.cell.name.startswith("gru"):
            carried = c_prev if self.variant.proj_size else h_prev
            a_r, a_z = ax[..., :H] + ah[..., :H], ax[..., H : 2 * H] + ah[..., H : 2 * H]
            r, z = self.act(0, a_r), self.act(0, a_z)
            if before:
                k["rh"] = r * masked
                late = self.product(k["rh"], self.R[:, 2 * H :], None, None)[0]
                h_n = late if self.bR is None else late + _row(self.bR[:, 2 * H :])
                a_n = ax[..., 2 * H :] + h_n
            else:
                h_n = ah[..., 2 * H :]
                a_n = ax[..., 2 * H :] + r * h_n
            n = self.act(1, a_n)
            m = n + z * (carried - n)
            if self.variant.proj_size:
                c_new = m
            k |= {"r": r, "z": z, "n": n, "a_r": a_r, "a_z": a_z, "a_n": a_n, "h_n": h_n, "carried": carried}
        else:
            k["a"] = ax + ah
            m = k["y"] = self.act(0, k["a"])
        h_new = m @ self.hr.swapaxes(-1, -2) if self.variant.proj_size else m
        h = keep_h * h_prev + (1 - keep_h) * h_new
        c = keep_c * c_prev + (1 - keep_c) * c_new
        k |= {"m": m, "c_new": c_new, "keep_h": keep_h, "keep_c": keep_c}
        return h, c, k

    def step_back(self, k: dict[str, Any], dh: Any, dc: Any, total: dict[str, Any], live: Any) -> Any:
        """da_x (what the product with x gave, before bias and norm), dh', dc'; adds into total (live: (E,B,1))."""
        H = self.problem.H

        def add(name: str, value: Any) -> None:
            total[name] = total.get(name, 0) + np.where(live, value, 0).sum(1)

        def outer(name: str, left: Any, right: Any) -> None:
            left = np.where(live, left, 0)
            total[name] = total.get(name, 0) + left.swapaxes(-1, -2) @ np.where(live, right, 0)

        dh_prev, dh_new = k["keep_h"] * dh, (1 - k["keep_h"]) * dh
        dc_prev, dc_new = k["keep_c"] * dc, (1 - k["keep_c"]) * dc
        dm = dh_new
        if self.variant.proj_size:
            dm = dh_new @ self.hr
            outer("hr", dh_new, k["m"])
        drh: Any = 0.0
        if self.lstm:
            peep = [_row(p) for p in np.split(self.ph, self.cell.gates - 1, -1)] if self.ph is not None else None
            name, alpha, beta = self.variant.activations[2]
            dv = dm * k["o"] * ACTIVATIONS[name].slope(k["y"], alpha, beta)
            da_o = self.back(dm * k["y"], 0, k["a_o"], k["o"])
            if self.variant.layer_norm:
                add("gain_c", dv * k["norm_c"][0])
                add("bias_c", dv)
                dv = _norm_back(dv * _row(self.gain_c), *k["norm_c"])
            dc_new = dc_new + dv
            if peep:
                dc_new = dc_new + da_o * peep[-1]
            dc_new = inside(dc_new, k["c_new"], self.problem.clip_cell)
            c_prev = k["c_prev"]
            di = dc_new * (k["g"] - c_prev if self.coupled else k["g"])
            da = [self.back(di, 0, k["a_i"], k["i"])]
            if not self.coupled:
                da.append(self.back(dc_new * c_prev, 0, k["a_f"], k["f"]))
            da += [self.back(dc_new * k["i"], 1, k["a_g"], k["g"]), da_o]
            dc_prev = dc_prev + dc_new * k["f"]
            if peep:
                dc_prev = dc_prev + da[0] * peep[0] + (0 if self.coupled else da[1] * peep[1])
                parts = [da[0] * c_prev, *([] if self.coupled else [da[1] * c_prev]), da_o * k["c_new"]]
                add("ph", np.concatenate(parts, -1))
            da_x = da_h = np.concatenate(da, -1)
        elif self.cell.name.startswith("gru"):
            if self.variant.proj_size:
                dm = dm + dc_new
            da_n = self.back(dm * (1 - k["z"]), 1, k["a_n"], k["n"])
            da_z = self.back(dm * (k["carried"] - k["n"]), 0, k["a_z"], k["z"])
            if self.variant.proj_size:
                dc_prev = dc_prev + dm * k["z"]
            else:
                dh_prev = dh_prev + dm * k["z"]
            if self.problem.cell == "gru_reset_before":
                drh = da_n @ self.R[:, 2 * H :]
                da_r = self.back(drh * k["masked"], 0, k["a_r"], k["r"])
                drh = drh * k["r"]
                outer("R_late", da_n, k["rh"])
                add("bR_late", da_n)
                da_h = np.concatenate([da_r, da_z], -1)
            else:
                da_r = self.back(da_n * k["h_n"], 0, k["a_r"], k["r"])
                da_h = np.concatenate([da_r, da_z, da_n * k["r"]], -1)
            da_x = np.concatenate([da_r, da_z, da_n], -1)
        else:
            da_x = da_h = self.back(dm, 0, k["a"], k["y"])
        add("bW", da_x)
        add("bR", da_h)
        if self.variant.layer_norm:
            add("gain_ih", da_x * k["norm_x"][0])
            add("gain_hh", da_h * k["norm_h"][0])
        da_x = self.product_back(da_x, k["norm_x"], self.gain_ih)
        da_h = self.product_back(da_h, k["norm_h"], self.gain_hh)
        outer("R", da_h, k["masked"])
        return da_x, dh_prev + (da_h @ self.R[:, : da_h.shape[-1]] + drh) * self.mask, dc_prev

    # All steps.

    def forward(self, x: Any, extra: Any, h0: Any, c0: Any, active: Any, restart: Any, order: Any) -> Any:
        """y (T,E,B,P or H), cells (T,E,B,H), hn, cn, and what backward needs. extra: added to x W^T at every step."""
        problem = self.problem
        T, second = problem.T, has_c(problem)
        x = np.where(active, x, 0)
        ax, norm_x = self.product(x, self.W, self.gain_ih, self.bW, extra)
        first_h, first_c = (h0, c0) if problem.reset_to_initial else (0.0, 0.0)
        y = np.zeros((*x.shape[:3], problem.outputs), x.dtype)
        cells = np.zeros((*x.shape[:3], problem.H), x.dtype)
        keep_h = self.keep(T, self.variant.zoneout_h, 2, problem.outputs)
        keep_c = self.keep(T, self.variant.zoneout_c, 3, problem.H)
        steps: list[Any] = [None] * T
        h, c = h0, c0
        for t in order:
            h_prev, c_prev = np.where(restart[t], first_h, h), np.where(restart[t], first_c, c)
            h_new, c_new, kept = self.step(ax[t], h_prev, c_prev, keep_h[t], keep_c[t])
            kept["norm_x"] = (None, None) if norm_x[0] is None else (norm_x[0][t], norm_x[1][t])
            steps[t] = kept
            h, c = np.where(active[t], h_new, h), np.where(active[t], c_new, c)
            y[t] = np.where(active[t], h, 0)
            cells[t] = np.where(active[t], c if second else h, 0)
        return y, cells, h, c, (x, steps)

    def backward(
        self, kept: Any, dy: Any, dcells: Any, dhn: Any, dcn: Any, active: Any, restart: Any, order: Any
    ) -> Any:
        """dx, dh0, dc0, the gradients of W, R, bW, bR, da summed over the steps, and the gradients of the extras."""
        problem, second = self.problem, has_c(self.problem)
        x, steps = kept
        da_x = np.zeros((*x.shape[:3], self.W.shape[1]), dhn.dtype)
        dh0, dc0 = np.zeros_like(dhn), np.zeros_like(dcn)
        dh_next, dc_next = dhn, dcn
        total: dict[str, Any] = {}
        for t in reversed(order):
            dh, dc = dh_next + dy[t], dc_next
            if second:
                dc = dc + dcells[t]
            else:
                dh = dh + dcells[t]
            dh, dc = clamp(dh, problem.clip_grad), clamp(dc, problem.clip_grad)
            da, dh_prev, dc_prev = self.step_back(steps[t], dh, dc, total, active[t])
            da_x[t] = np.where(active[t], da, 0)
            if problem.reset_to_initial:
                dh0, dc0 = dh0 + np.where(restart[t], dh_prev, 0), dc0 + np.where(restart[t], dc_prev, 0)
            dh_next = np.where(active[t], np.where(restart[t], 0, dh_prev), dh_next)
            dc_next = np.where(active[t], np.where(restart[t], 0, dc_prev), dc_next)
        if problem.cell == "gru_reset_before":
            for name in ("R", "bR"):
                if name in total:
                    total[name] = np.concatenate([total[name], total[f"{name}_late"]], 1)
        E, GH = self.W.shape[:2]
        left = da_x.transpose(1, 3, 0, 2).reshape(E, GH, -1)
        dW = left @ x.transpose(1, 0, 2, 3).reshape(E, left.shape[-1], x.shape[-1])

        def found(name: str, like: Any) -> Any:
            return None if like is None else np.zeros(like.shape, dhn.dtype) + total.get(name, 0)

        params = (dW, found("R", self.R), found("bW", self.W[..., 0]), found("bR", self.W[..., 0]))
        given = (self.hr, self.ph, self.gain_ih, self.gain_hh, self.gain_c, self.bias_c)
        names = ("hr", "ph", "gain_ih", "gain_hh", "gain_c", "bias_c")
        extras = tuple(found(name, like) for name, like in zip(names, given, strict=True))
        return da_x @ self.W, dh0 + dh_next, dc0 + dc_next, params, da_x.sum(0), extras
