# SPDX-License-Identifier: Apache-2.0
"""The readable spec of sums over paths: CTC and hidden Markov models, one row at a time, in logarithms. The reference
runs it.

Graves, Fernández, Gomez, Schmidhuber, "Connectionist temporal classification", ICML 2006, equations 5 to 16. A path
walks through the states blank, label 0, blank, label 1, ..., blank. It begins, before the first step, at state 0.

What NaN, inf and -inf mean is in ctc.py. Functions of one row get scores from `exact`, and none that has a NaN.
"""

from __future__ import annotations

from typing import Any

import numpy as np

LARGEST = float(np.float32(1e37))  # numbers from here on are no scores, in float32 and float64


def exact(scores: Any) -> Any:
    """A contiguous copy in float64: NaN for what is no score, -inf for what counts as impossible."""
    result = np.array(scores, np.float64, order="C")
    result[~(scores < LARGEST)] = np.nan
    result[scores <= -LARGEST] = -np.inf
    return result


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
        scores = exact(log_probs[:T, b])
        unsound = np.isnan(scores[:, np.append(mine, blank)]).any()
        value = np.nan if unsound else row(scores, mine, blank, grad)
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
        with np.errstate(over="ignore"):  # float32 has inf for it
            dlog_probs[:T, b] = grad
        dlog_probs[T:, b] = 0.0


def align_row(log_probs: Any, labels: Any, blank: int, states: Any) -> float:
    """The log-probability of the best path of one row: log_probs (T,C) float64, labels (S,). Writes states (T,), where
    the path is at each step. As ctc_row, with the largest in place of the sum. The first of equal ways is taken: to
    stay, from the state before, from two before; and of equal ends the label."""
    T, n = len(log_probs), 2 * len(labels) + 1
    classes = np.full(n, blank)
    classes[1::2] = labels
    ways = np.full((3, n), -np.inf)
    jumps = np.zeros(n, bool)  # whether a path may come from two states before
    jumps[3::2] = classes[3::2] != classes[1:-2:2]
    came, best = np.zeros((T, n), np.int8), np.full(n, -np.inf)
    best[0] = 0.0
    for t in range(T):
        ways[0], ways[1, 1:] = best, best[:-1]
        ways[2, 2:] = np.where(jumps[2:], best[:-2], -np.inf)
        came[t] = ways.argmax(0)
        best = ways.max(0) + log_probs[t][classes]
    state = n - 1 if n == 1 or best[n - 1] > best[n - 2] else n - 2
    total = best[state]
    for t in range(T - 1, -1, -1):
        states[t] = state
        state -= int(came[t, state])
    return float(total)


def ctc_align(
    row: Any, log_probs: Any, labels: Any, first: Any, label_counts: Any, lengths: Any, blank: int,
    states: Any, log_probability: Any,
) -> None:  # fmt: skip
    """All rows through `row`, which is align_row or its compiled form; arguments as _core.ctc_align takes them."""
    for b, T in enumerate(lengths):
        mine = labels[first[b] : first[b] + label_counts[b]]
        path, scores = np.full(len(states), -1), exact(log_probs[:T, b])
        unsound = np.isnan(scores[:, np.append(mine, blank)]).any()
        value = np.nan if unsound else row(scores, mine, blank, path[:T])
        if not value > -np.inf:
            path[:] = -1
        states[:, b] = path
        log_probability[b] = value


def beam_row(log_probs: Any, blank: int, width: int, top: int) -> list[tuple[list[int], float]]:
    """Prefix search with a beam: the `top` best of it, best first. Of equal prefixes the one that sorts first stays."""
    if np.isnan(log_probs).any():
        return [([], np.nan)]
    beam: dict[tuple[int, ...], tuple[float, float]] = {(): (0.0, -np.inf)}  # paths that end in blank, in the label
    for step in log_probs:
        grown: dict[tuple[int, ...], tuple[float, float]] = {}

        def add(prefix: tuple[int, ...], ends_blank: float, ends_label: float, grown: Any = grown) -> None:
            old = grown.get(prefix, (-np.inf, -np.inf))
            grown[prefix] = (float(np.logaddexp(old[0], ends_blank)), float(np.logaddexp(old[1], ends_label)))

        for prefix, (ends_blank, ends_label) in beam.items():
            either = float(np.logaddexp(ends_blank, ends_label))
            for label, log_prob in enumerate(step):
                if label == blank:
                    add(prefix, either + log_prob, -np.inf)
                elif prefix and prefix[-1] == label:
                    add(prefix, -np.inf, ends_label + log_prob)
                    add((*prefix, label), -np.inf, ends_blank + log_prob)
                else:
                    add((*prefix, label), -np.inf, either + log_prob)
        ranked = sorted(grown.items(), key=lambda item: (-np.logaddexp(*item[1]), item[0]))
        beam = dict(item for item in ranked[:width] if max(item[1]) > -np.inf)
    return [(list(prefix), float(np.logaddexp(*ends))) for prefix, ends in list(beam.items())[:top]]


def ctc_beam(
    log_probs: Any, lengths: Any, blank: int, beam_width: int, top: int
) -> list[list[tuple[list[int], float]]]:
    """Every row through beam_row; arguments as _core.ctc_beam takes them."""
    rows = enumerate(lengths)
    return [beam_row(exact(log_probs[:T, b]), blank, beam_width, top) for b, T in rows]


def hmm_row(scores: Any, initial: Any, transitions: Any, states: Any, pairs: Any) -> float:
    """The log-likelihood of one row: scores (T,N), T >= 1, all float64. Writes the expectations into states (T,N) and
    pairs (N,N), unless states has no rows. Rabiner 1989, equations 19 to 27 and 37."""
    T = len(scores)
    alpha = np.empty_like(scores)
    alpha[0] = initial + scores[0]
    for t in range(1, T):
        alpha[t] = np.logaddexp.reduce(alpha[t - 1][:, None] + transitions, 0) + scores[t]
    total = np.logaddexp.reduce(alpha[-1])
    if len(states) == 0:
        return float(total)
    beta = np.zeros_like(initial)
    pairs[:] = 0.0
    for t in range(T - 1, -1, -1):
        if t < T - 1:
            ways = transitions + (scores[t + 1] + beta)
            pairs += np.exp(alpha[t][:, None] + ways - total)
            beta = np.logaddexp.reduce(ways, 1)
        states[t] = np.exp(alpha[t] + beta - total)
    return float(total)


def hmm(
    row: Any, scores: Any, initial: Any, transitions: Any, lengths: Any, log_likelihood: Any, weights: Any, states: Any,
    dinitial: Any, dtransitions: Any,
) -> None:  # fmt: skip
    """All rows through `row`, which is hmm_row or its compiled form; arguments as _core.hmm takes them."""
    N = len(initial)
    model = exact(initial), exact(transitions)
    first, pairs = np.zeros(N), np.zeros((N, N))
    for b, T in enumerate(lengths):
        mine, taken = np.zeros((0 if states is None else T, N)), np.zeros((N, N))
        given = exact(scores[:T, b]), *model
        value = np.nan if _unsound(*given) else row(*given, mine, taken) if T else 0.0
        log_likelihood[b] = value
        if states is None:
            continue
        if not np.isfinite(value):
            mine[:] = taken[:] = np.nan if np.isnan(value) else 0.0
        weight = 1.0 if weights is None or value == -np.inf else weights[b]
        states[:T, b] = mine * weight
        states[T:, b] = 0.0
        if T:
            first += mine[0] * weight
            pairs += taken * weight
    if states is not None:
        dinitial[:], dtransitions[:] = first, pairs


def _unsound(scores: Any, initial: Any, transitions: Any) -> bool:
    """Whether a row reads a NaN: without steps it reads nothing, with one step no transitions."""
    read = (scores, initial, transitions)[: min(len(scores) + 1, 3)]
    return any(np.isnan(array).any() for array in read)


def viterbi_row(scores: Any, initial: Any, transitions: Any, path: Any) -> float:
    """The logarithm of the best path's weight: scores (T,N), T >= 1, all float64. Writes path (T,). Rabiner 1989,
    equations 32 to 35."""
    T = len(scores)
    came = np.zeros(scores.shape, np.int64)
    best = initial + scores[0]
    for t in range(1, T):
        ways = best[:, None] + transitions
        came[t] = ways.argmax(0)
        best = ways.max(0) + scores[t]
    path[-1] = best.argmax()
    for t in range(T - 1, 0, -1):
        path[t - 1] = came[t, path[t]]
    return float(best.max())


def viterbi(
    row: Any, scores: Any, initial: Any, transitions: Any, lengths: Any, paths: Any, log_probability: Any
) -> None:
    """All rows through `row`, which is viterbi_row or its compiled form; arguments as _core.viterbi takes them."""
    model = exact(initial), exact(transitions)
    for b, T in enumerate(lengths):
        path = np.full(len(paths), -1)
        given = exact(scores[:T, b]), *model
        value = np.nan if _unsound(*given) else row(*given, path[:T]) if T else 0.0
        if not value > -np.inf:
            path[:] = -1
        paths[:, b] = path
        log_probability[b] = value
