# SPDX-License-Identifier: Apache-2.0
"""Sums over paths: lattice.py's functions as loops (its array expressions would take Numba a minute), compiled at the
first call."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from ... import lattice

_OPTIONS: dict[str, Any] = {"cache": True, "nogil": True, "error_model": "numpy"}


@njit(inline="always")
def _log_add(a: Any, b: Any) -> Any:
    if a < b:
        a, b = b, a
    return a if b == -np.inf else a + math.log1p(math.exp(b - a))


@njit(**_OPTIONS)
def _ctc_row(log_probs: Any, labels: Any, blank: Any, grad: Any) -> Any:
    T, states = len(log_probs), 2 * len(labels) + 1
    classes = np.full(states, blank)
    classes[1::2] = labels
    alpha = np.full((T + 1, states), -np.inf)
    alpha[0, 0] = 0.0
    for t in range(T):
        for s in range(states):
            a = alpha[t, s]
            if s > 0:
                a = _log_add(a, alpha[t, s - 1])
            if s > 1 and s % 2 == 1 and classes[s] != classes[s - 2]:
                a = _log_add(a, alpha[t, s - 2])
            alpha[t + 1, s] = a + log_probs[t, classes[s]]
    total = alpha[T, states - 1]
    if states > 1:
        total = _log_add(total, alpha[T, states - 2])
    if len(grad) == 0:
        return -total
    beta, after = np.full(states, -np.inf), np.empty(states)
    beta[-2:] = 0.0
    for t in range(T - 1, -1, -1):
        for c in range(grad.shape[1]):
            grad[t, c] = math.exp(log_probs[t, c])
        for s in range(states):
            grad[t, classes[s]] -= math.exp(alpha[t + 1, s] + beta[s] - total)
            after[s] = beta[s] + log_probs[t, classes[s]]
        for s in range(states):
            b = after[s]
            if s + 1 < states:
                b = _log_add(b, after[s + 1])
            if s + 2 < states and s % 2 == 1 and classes[s] != classes[s + 2]:
                b = _log_add(b, after[s + 2])
            beta[s] = b
    return -total


@njit(**_OPTIONS)
def _align_row(log_probs: Any, labels: Any, blank: Any, path: Any) -> Any:
    T, states = len(log_probs), 2 * len(labels) + 1
    classes = np.full(states, blank)
    classes[1::2] = labels
    came = np.zeros((T, states), np.int8)
    best, last = np.full(states, -np.inf), np.empty(states)
    best[0] = 0.0
    for t in range(T):
        last[:] = best
        for s in range(states):
            most = last[s]
            if s > 0 and last[s - 1] > most:
                most = last[s - 1]
                came[t, s] = 1
            if s > 1 and s % 2 == 1 and classes[s] != classes[s - 2] and last[s - 2] > most:
                most = last[s - 2]
                came[t, s] = 2
            best[s] = most + log_probs[t, classes[s]]
    state = states - 1
    if states > 1 and not best[state] > best[state - 1]:
        state -= 1
    total = best[state]
    for t in range(T - 1, -1, -1):
        path[t] = state
        state -= came[t, state]
    return total


@njit(**_OPTIONS)
def _hmm_row(scores: Any, initial: Any, transitions: Any, states: Any, pairs: Any) -> Any:
    T, N = scores.shape
    alpha, beta, after = np.empty((T, N)), np.zeros(N), np.empty(N)
    for t in range(T):
        for j in range(N):
            a = initial[j]
            if t > 0:
                a = alpha[t - 1, 0] + transitions[0, j]
                for i in range(1, N):
                    a = _log_add(a, alpha[t - 1, i] + transitions[i, j])
            alpha[t, j] = a + scores[t, j]
    total = alpha[T - 1, 0]
    for j in range(1, N):
        total = _log_add(total, alpha[T - 1, j])
    if len(states) == 0:
        return total
    pairs[:] = 0.0
    for t in range(T - 1, -1, -1):
        if t < T - 1:
            for j in range(N):
                after[j] = beta[j] + scores[t + 1, j]
            for i in range(N):
                b = -np.inf
                for j in range(N):
                    way = transitions[i, j] + after[j]
                    pairs[i, j] += math.exp(alpha[t, i] + way - total)
                    b = _log_add(b, way)
                beta[i] = b
        for i in range(N):
            states[t, i] = math.exp(alpha[t, i] + beta[i] - total)
    return total


@njit(**_OPTIONS)
def _viterbi_row(scores: Any, initial: Any, transitions: Any, path: Any) -> Any:
    T, N = scores.shape
    came, best, last = np.zeros((T, N), np.int64), initial + scores[0], np.empty(N)
    for t in range(1, T):
        last[:] = best
        for j in range(N):
            most = last[0] + transitions[0, j]
            for i in range(1, N):
                if last[i] + transitions[i, j] > most:
                    most = last[i] + transitions[i, j]
                    came[t, j] = i
            best[j] = most + scores[t, j]
    state = 0
    for j in range(1, N):
        if best[j] > best[state]:
            state = j
    for t in range(T - 1, -1, -1):
        path[t] = state if t == T - 1 else came[t + 1, path[t + 1]]
    return best[state]


def ctc(
    log_probs: Any, labels: Any, first: Any, label_counts: Any, lengths: Any, blank: int, zero_infinity: bool,
    loss: Any, dloss: Any = None, dlog_probs: Any = None,
) -> None:  # fmt: skip
    """As _core.ctc, in float64 whatever the dtype."""
    lattice.ctc(
        _ctc_row, log_probs, labels, first, label_counts, lengths, blank, zero_infinity, loss, dloss, dlog_probs
    )  # fmt: skip


def ctc_align(
    log_probs: Any, labels: Any, first: Any, label_counts: Any, lengths: Any, blank: int,
    states: Any, log_probability: Any,
) -> None:  # fmt: skip
    """As _core.ctc_align."""
    lattice.ctc_align(_align_row, log_probs, labels, first, label_counts, lengths, blank, states, log_probability)


ctc_beam = lattice.ctc_beam


def hmm(
    scores: Any, initial: Any, transitions: Any, lengths: Any, log_likelihood: Any, weights: Any = None,
    states: Any = None, dinitial: Any = None, dtransitions: Any = None,
) -> None:  # fmt: skip
    """As _core.hmm, in float64 whatever the dtype."""
    lattice.hmm(
        _hmm_row, scores, initial, transitions, lengths, log_likelihood, weights, states, dinitial, dtransitions
    )  # fmt: skip


def viterbi(scores: Any, initial: Any, transitions: Any, lengths: Any, paths: Any, log_probability: Any) -> None:
    """As _core.viterbi."""
    lattice.viterbi(_viterbi_row, scores, initial, transitions, lengths, paths, log_probability)
