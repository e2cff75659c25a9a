# SPDX-License-Identifier: Apache-2.0
"""The readable spec of sums over paths: CTC, one row at a time, in logarithms. The reference runs it.

Graves, Fernández, Gomez, Schmidhuber, "Connectionist temporal classification", ICML 2006, equations 5 to 16. A path
walks through the states blank, label 0, blank, label 1, ..., blank. It begins, before the first step, at state 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def ctc_row(log_probs: Any, labels: Any, blank: int, grad: Any) -> float:
    """The loss of one row: log_probs (T,C) float64, labels (S,). Writes its gradient into grad (T,C), unless grad has
    no rows."""
    T = len(log_probs)
    states = 2 * len(labels) + 1
    classes = np.full(states, blank)
    classes[1::2] = labels
    jump = np.full(states, -np.inf)  # 0 where a path may come from two states before: the labels differ
    for s in range(3, states, 2):
        if classes[s] != classes[s - 2]:
            jump[s] = 0.0

    alpha = np.full((T + 1, states), -np.inf)  # alpha[t + 1]: all beginnings up to step t, with step t's probability
    alpha[0, 0] = 0.0
    for t in range(T):
        now = alpha[t].copy()
        now[1:] = np.logaddexp(now[1:], alpha[t, :-1])
        now[2:] = np.logaddexp(now[2:], alpha[t, :-2] + jump[2:])
        alpha[t + 1] = now + log_probs[t][classes]
    total = alpha[T, states - 1]
    if states > 1:
        total = np.logaddexp(total, alpha[T, states - 2])
    if len(grad) == 0:
        return float(-total)

    beta = np.full(states, -np.inf)  # all ends after step t
    beta[-2:] = 0.0
    for t in range(T - 1, -1, -1):
        share = np.exp(alpha[t + 1] + beta - total)
        grad[t] = np.exp(log_probs[t])
        for s in range(states):
            grad[t, classes[s]] -= share[s]
        after = beta + log_probs[t][classes]
        beta = after.copy()
        beta[:-1] = np.logaddexp(beta[:-1], after[1:])
        beta[:-2] = np.logaddexp(beta[:-2], after[2:] + jump[2:])
    return float(-total)


def ctc(
    row: Any, log_probs: Any, labels: Any, first: Any, label_counts: Any, lengths: Any, blank: int, zero_infinity: bool,
    loss: Any, dloss: Any, dlog_probs: Any,
) -> None:  # fmt: skip
    """All rows through `row`, which is ctc_row or its compiled form; arguments as _core.ctc takes them."""
    C = log_probs.shape[2]
    for b in range(len(loss)):
        T = lengths[b]
        mine = labels[first[b] : first[b] + label_counts[b]]
        grad = np.empty((0 if dlog_probs is None else T, C))
        value = row(np.ascontiguousarray(log_probs[:T, b], np.float64), mine, blank, grad)
        cancelled = zero_infinity and value == np.inf
        loss[b] = 0.0 if cancelled else value
        if dlog_probs is None:
            continue
        if cancelled:
            grad[:] = 0.0
        elif not np.isfinite(value):
            grad[:] = np.nan
        elif dloss is not None:
            grad *= dloss[b]
        dlog_probs[:T, b] = grad
        dlog_probs[T:, b] = 0.0
