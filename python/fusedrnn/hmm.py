# SPDX-License-Identifier: Apache-2.0
"""Hidden Markov models over scores that come from elsewhere, an RNN for instance (Rabiner, "A tutorial on hidden Markov
models", Proc. IEEE 77(2), 1989, section III).

    logp = likelihood(scores, initial, transitions)                           forward algorithm
    logp, states, first, pairs = posteriors(scores, initial, transitions)     forward-backward; also the gradient
    paths, logp = viterbi(scores, initial, transitions)                       the best state sequence

    scores       (T,B,N), float32 or float64, any strides: log p(observation at t | state), or any logarithms such as
                 log p(state | observation) - log p(state) of a hybrid model; or (T,N) for one row
    initial      (N,): logarithms of the probabilities of the first state
    transitions  (N,N): logarithms, from the row's state to the column's
    lengths      B integers in [0, T]: the steps that count; None: all; one integer for one row

A path's weight is exp(initial[s0] + scores[0,b,s0] + transitions[s0,s1] + scores[1,b,s1] + ...). The logarithms need
not be normalised, and -inf forbids: what is then a "likelihood" is the partition sum of a linear-chain CRF. Nothing
underflows. What NaN, inf and -inf do is said in `fusedrnn.ctc`: in short, -inf is impossible, and a row that reads NaN
or inf has NaN for its logarithm and no path. NaN or inf in initial is read by all rows with steps, in transitions by
all rows with two steps or more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from . import backends, check
from .ctc import lengths_of, numbers_of, scores_of

__all__ = ["likelihood", "posteriors", "viterbi"]


def likelihood(scores: np.ndarray, initial: Any, transitions: Any, lengths: Any = None) -> Any:
    """The logarithm of the sum of the weights of all paths: (B,) in the dtype of scores, or () for one row.

    -inf where no path is possible; NaN where a row reads NaN or inf; 0 for a row without steps. Raises TypeError or
    ValueError for wrong types, shapes and lengths.

    >>> half = np.log(np.full((2, 2), 0.5))
    >>> float(fusedrnn.hmm.likelihood(np.zeros((3, 2)), half[0], half).round(6))  # all paths together have weight 1
    0.0
    """
    call = _check("hmm.likelihood", scores, initial, transitions, lengths)
    result = np.empty(call.B, call.scores.dtype)
    backends.choose().hmm(*call.arguments, result)
    return result.reshape(()) if call.single else result


def posteriors(
    scores: np.ndarray, initial: Any, transitions: Any, lengths: Any = None, weights: Any = None
) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray]:
    """What is expected given the scores: (log_likelihood, states, first, pairs).

    weights  (B,) or one number for all rows: how much each row counts in the last three; None: 1

    states  (T,B,N)  the probability of each state at each step; 0 past lengths
    first   (N,)     how often a row begins in each state, summed over rows
    pairs   (N,N)    how often each transition is taken, summed over rows and steps

    They are also the gradients of sum(weights * log_likelihood) with respect to scores, initial and transitions. A row
    that is impossible has zeros and adds nothing. A row that reads NaN or inf has NaN in states, and so have first and
    pairs, which it is a part of.

    >>> half = np.log(np.full((2, 2), 0.5))
    >>> logp, states, first, pairs = fusedrnn.hmm.posteriors(np.zeros((3, 2)), half[0], half)
    >>> pairs.round(3)
    array([[0.5, 0.5],
           [0.5, 0.5]])
    """
    op = "hmm.posteriors"
    call = _check(op, scores, initial, transitions, lengths)
    dtype, B, N = call.scores.dtype, call.B, call.scores.shape[2]
    if weights is not None:
        weights = numbers_of(op, "weights", weights, B, dtype)
    result, states = np.empty(B, dtype), np.empty(call.scores.shape, dtype)
    first, pairs = np.empty(N, dtype), np.empty((N, N), dtype)
    backends.choose().hmm(*call.arguments, result, weights, states, first, pairs)
    return (result.reshape(()), states[:, 0], first, pairs) if call.single else (result, states, first, pairs)


def viterbi(scores: np.ndarray, initial: Any, transitions: Any, lengths: Any = None) -> tuple[np.ndarray, Any]:
    """The path of the greatest weight: (paths, log_weight), paths (T,B) int64 and log_weight (B,); (T,) and () for one
    row.

    Past lengths, everywhere where no path is possible (log_weight is -inf then), and everywhere where a row reads NaN
    or inf (log_weight is NaN then), paths is -1. Of equal paths it is the one with the lowest state at the last step
    where they differ. Sums are float64.

    >>> scores = np.log([[0.9, 0.1], [0.4, 0.6], [0.9, 0.1]])
    >>> stay = np.log([[0.8, 0.2], [0.2, 0.8]])
    >>> fusedrnn.hmm.viterbi(scores, np.log([0.5, 0.5]), stay)[0]
    array([0, 0, 0])
    """
    call = _check("hmm.viterbi", scores, initial, transitions, lengths)
    paths, result = np.empty((len(call.scores), call.B), np.int64), np.empty(call.B, call.scores.dtype)
    backends.choose().viterbi(*call.arguments, paths, result)
    return (paths[:, 0], result.reshape(())) if call.single else (paths, result)


@dataclass(slots=True)
class _Call:
    """Checked arguments, as backends take them."""

    scores: np.ndarray  # (T,B,N)
    initial: np.ndarray
    transitions: np.ndarray
    lengths: np.ndarray
    single: bool

    @property
    def B(self) -> int:
        """How many rows."""
        return len(self.lengths)

    @property
    def arguments(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """What every function of a backend begins with."""
        return self.scores, self.initial, self.transitions, self.lengths


def _check(op: str, scores: Any, initial: Any, transitions: Any, lengths: Any) -> _Call:
    scores, single = scores_of(op, "scores", scores, "(T, B, N)")
    T, B, N = scores.shape
    if N == 0:
        check.fail(op, "scores", "has no states", "N >= 1")
    given = []
    for name, value, shape, letters in (
        ("initial", initial, (N,), "(N,)"),
        ("transitions", transitions, (N, N), "(N, N)"),
    ):
        array = check.is_float(op, name, value, scores.dtype, "scores")
        if array.shape != shape:
            check.fail(op, name, f"has shape {array.shape}", f"{shape} = {letters} with N={N} from scores")
        given.append(np.ascontiguousarray(array))
    if lengths is None:
        steps = np.full(B, T, np.int64)
    else:
        steps = lengths_of(op, "lengths", lengths, B, T, "T", single)
    return _Call(scores, given[0], given[1], steps, single)
