# SPDX-License-Identifier: Apache-2.0
"""Connectionist temporal classification (Graves, Fernández, Gomez, Schmidhuber, ICML 2006): training on sequences of
labels whose places in time are not known.

    loss = ctc_loss(log_probs, targets, input_lengths, target_lengths)                  one number for each row
    loss, dlog_probs = ctc_loss_backward(log_probs, targets, input_lengths, target_lengths, dloss)
    words = ctc_greedy(log_probs, input_lengths)                                        labels along the best path
    words = ctc_beam(log_probs, input_lengths, beam_width=16)                           the most probable labels
    found = ctc_align(log_probs, targets, input_lengths, target_lengths)                where known labels are

log_probs is (T,B,C), what log_softmax over C classes gives; one class is the blank. Nothing is kept between the two
calls: the second gives the loss as well, so a training loop needs only that one.

NaN, inf and -inf mean the same in all functions here and in `fusedrnn.hmm`:

    -inf        impossible, as is all from -1e37 down. A row where no path is left has probability 0: its loss is inf,
                its log-probability -inf, and it has no path.
    NaN, inf    no log-probability, as is all from 1e37 up. A row that reads one has NaN for its loss, its gradient and
                its log-probability, and it has no path. Nothing hides it: neither zero_infinity nor a better path.

A row reads its own steps, not those past its length; ctc_loss and ctc_align read the blank and the row's labels there,
all others read all classes or states. No other row changes. "No path" is -1 at every step, or no labels. ctc_greedy,
which has no number to tell it by, raises ValueError that names step and row. On a CUDA device NaN and inf are seen only
where a path leads on from them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from . import arrays, backends, check, lattice

__all__ = ["Alignment", "Span", "ctc_align", "ctc_beam", "ctc_greedy", "ctc_loss", "ctc_loss_backward"]


def ctc_loss(
    log_probs: np.ndarray,
    targets: Any,
    input_lengths: Any,
    target_lengths: Any,
    blank: int = 0,
    zero_infinity: bool = False,
) -> Any:
    """The negative logarithm of the probability of each row's labels, summed over all ways to place them in time.

    log_probs       (T,B,C), float32 or float64, any strides, on the host or on a CUDA device (targets and lengths stay
                    on the host, the results are where log_probs is); or (T,C) for one row
    targets         integers: (B,S), of which row b's first target_lengths[b] count; or the labels of all rows one after
                    the other, (sum of target_lengths,); for one row (S,). Classes in [0, C), not the blank
    input_lengths   B integers in [0, T]: the steps that count; one integer for one row
    target_lengths  B integers >= 0; one integer for one row
    blank           the class that means "no label"
    zero_infinity   0 instead of inf where the labels do not fit into the steps (a blank must part two equal labels)

    Returns (B,) in the dtype of log_probs, or () for one row. As torch.nn.functional.ctc_loss with reduction="none".
    Sums do not underflow, and rounding errors do not grow with the size of the loss. NaN where the blank or a label of
    the row has NaN or inf (see the module's rule). Raises TypeError or ValueError for wrong types, shapes, lengths and
    classes.

    >>> log_probs = np.log(np.full((3, 1, 2), 0.5))           # 3 steps, 2 classes: blank and 1
    >>> float(np.exp(-fusedrnn.ctc_loss(log_probs, [[1]], [3], [1])[0]).round(6))  # 6 of 8 paths spell [1]
    0.75
    """
    log_probs = arrays.on_device(log_probs)
    call = checked("ctc_loss", log_probs, targets, input_lengths, target_lengths, blank, zero_infinity)
    loss, row = call.empty("B")
    call.run(row, None, None)
    return arrays.users(loss)


def ctc_loss_backward(
    log_probs: np.ndarray,
    targets: Any,
    input_lengths: Any,
    target_lengths: Any,
    dloss: Any = None,
    blank: int = 0,
    zero_infinity: bool = False,
) -> tuple[Any, np.ndarray]:
    """The loss and its gradient: (loss, dlog_probs), as ctc_loss gives the one and with log_probs' shape and dtype.

    targets, target_lengths and blank are as in ctc_loss.

    dloss  (B,) or one number for all rows: the gradient of the loss of each row; None: 1. Sums of losses need 1, means
           over rows 1 / B. torch's reduction="mean" has 1 / (B * max(target_lengths[b], 1)).

    dlog_probs[t,b,c] = dloss[b] * (exp(log_probs[t,b,c]) - share), where the share is that of the paths that are at
    class c at step t (equation 16). This is torch's gradient: it takes log_probs to come from log_softmax, and is at
    the same time the gradient with respect to what went into log_softmax. Past input_lengths it is 0. Where the labels
    do not fit it is NaN, or 0 with zero_infinity. Where the loss is NaN all of the row's gradient is NaN. NaN or inf at
    another class gives NaN at that place alone (see the module's rule).

    >>> log_probs = np.log(np.full((2, 1, 2), 0.5))
    >>> loss, dlog_probs = fusedrnn.ctc_loss_backward(log_probs, [[1]], [2], [1])  # paths 11, 01, 10
    >>> dlog_probs[:, 0].round(3)
    array([[ 0.167, -0.167],
           [ 0.167, -0.167]])
    """
    op, log_probs = "ctc_loss_backward", arrays.on_device(log_probs)
    call = checked(op, log_probs, targets, input_lengths, target_lengths, blank, zero_infinity)
    if dloss is not None:
        dloss = call.weights(op, dloss)
    loss, row = call.empty("B")
    dlog_probs, rows = call.empty("TBC")
    call.run(row, dloss, rows)
    return arrays.users((loss, dlog_probs))  # type: ignore[no-any-return]


def ctc_greedy(log_probs: np.ndarray, input_lengths: Any = None, blank: int = 0) -> list[np.ndarray]:
    """What the most probable class of each step spells, for each row: repeats made one, blanks left out.

    log_probs (T,B,C), or (T,C) for one row, as ctc_loss takes them (scores of any scale will do); input_lengths: None
    for T; blank as in ctc_loss. Of equal classes the lowest. Returns one int64 array of labels for each row. Raises
    ValueError where a step of a row has NaN or inf, or no class above -1e37 (see the module's rule).

    >>> path = np.array([1, 1, 0, 1, 2, 2])
    >>> fusedrnn.ctc_greedy(np.log(np.eye(3)[path] + 0.1))
    [array([1, 1, 2])]
    """
    op = "ctc_greedy"
    log_probs, lengths, blank, single = _decoded(op, log_probs, input_lengths, blank)
    T, B, _ = log_probs.shape
    path = log_probs.argmax(2) if T else np.empty((0, B), np.int64)
    best = np.take_along_axis(log_probs, path[:, :, None], 2)[:, :, 0]  # NaN is argmax's largest
    sound = (best > -lattice.LARGEST) & (best < lattice.LARGEST)
    lost = ~sound & (np.arange(T)[:, None] < lengths)
    if lost.any():
        b, t = np.argwhere(lost.T)[0]
        at = f"log_probs[{t}]" if single else f"log_probs[{t}, {b}]"
        fix = f"Mask or mend step {t} of row {b}; steps past input_lengths are not read."
        check.fail(
            op, at, f"has the largest number {best[t, b]}", "a log-probability: finite, for one class at least", fix
        )
    kept = path != blank
    kept[1:] &= path[1:] != path[:-1]
    return [path[:n, b][kept[:n, b]] for b, n in enumerate(lengths)]


def ctc_beam(
    log_probs: np.ndarray, input_lengths: Any = None, *, beam_width: int = 16, blank: int = 0, top: int = 1
) -> list[Any]:
    """The most probable labels of each row, as found by prefix search with a beam.

    Unlike ctc_greedy it adds up all paths that spell the same (Graves et al. 2006, section 3.2; at every step the
    `beam_width` most probable prefixes go on, as in Hannun et al. 2014, without a language model).

    log_probs (T,B,C), or (T,C) for one row, as ctc_loss takes them; input_lengths: None for T.

    Returns, for each row, (labels, log_probability): an int64 array and the logarithm of the sum over the paths that
    stayed in the beam, at most -ctc_loss. With top > 1, for each row a list of up to `top` such pairs, best first. A
    row where nothing is possible has (empty, -inf), or an empty list; one that has NaN or inf has (empty, NaN), or a
    list of that (see the module's rule).

    >>> log_probs = np.log([[0.6, 0.4], [0.6, 0.4]])  # blank, blank is the best path; but 11, 01, 10 all spell [1]
    >>> fusedrnn.ctc_greedy(log_probs)[0], fusedrnn.ctc_beam(log_probs)[0][0]
    (array([], dtype=int64), array([1]))
    """
    op = "ctc_beam"
    log_probs, lengths, blank, _ = _decoded(op, log_probs, input_lengths, blank)
    beam_width = check.integer(op, "beam_width", beam_width, 1, 1 << 24)
    top = check.integer(op, "top", top, 1)
    rows = backends.choose().ctc_beam(log_probs, lengths, blank, beam_width, top)
    found = [[(np.array(labels, np.int64), log_prob) for labels, log_prob in row] for row in rows]
    if top > 1:
        return found
    return [row[0] if row else (np.empty(0, np.int64), -np.inf) for row in found]


class Span(NamedTuple):
    """One label of an alignment, at steps start <= t < stop; score is the mean of its log-probabilities there."""

    label: int
    start: int
    stop: int
    score: float


@dataclass(frozen=True, slots=True)
class Alignment:
    """What `ctc_align` finds; arrays, or tensors from `fusedrnn.torch.ctc_align`. For one row all lack the axis B."""

    path: Any  # (T,B) integers: the class at each step, blank too; -1 past input_lengths, and where there is no path
    starts: Any  # (B,S) integers: label s of row b is at steps starts[b,s] <= t < stops[b,s]; -1 past target_lengths,
    stops: Any  # (B,S)               and where there is no path
    scores: Any  # (B,S): the mean of log_probs over these steps; 0 past target_lengths; log_probability for no path
    log_probability: Any  # (B,): of the path, the sum of log_probs over its steps; -inf or NaN for no path

    def spans(self) -> list[Any]:
        """For each row a list of `Span`s, one for each label; for one row that list. Empty where there is no path."""
        single = self.path.ndim == 1
        fields = [a[None] if single else a for a in (self.starts, self.stops, self.scores)]
        path = self.path[:, None] if single else self.path
        rows = [
            [
                Span(int(path[start, b]), start, stop, score)
                for start, stop, score in zip(*(a[b].tolist() for a in fields), strict=True)
                if start >= 0
            ]
            for b in range(path.shape[1])
        ]
        return rows[0] if single else rows


def ctc_align(
    log_probs: np.ndarray, targets: Any, input_lengths: Any = None, target_lengths: Any = None, blank: int = 0
) -> Alignment:
    """When each of the known labels is spoken: the most probable of all paths that spell them ("forced alignment").

    log_probs       (T,B,C), float32 or float64, any strides; or (T,C) for one row
    targets         as ctc_loss takes them: (B,S), or all labels one after the other, or for one row (S,)
    input_lengths   B integers in [0, T], the steps that count; None: all
    target_lengths  B integers in [0, S], the labels that count; None: all
    blank           the class that means "no label"

    Returns an `Alignment`: path (T,B), starts and stops and scores (B,S), log_probability (B,); .spans() has them as
    lists. S is that of targets, or the most labels of a row where they lie one after the other. The path is the one
    that ctc_loss has the most of: log_probability <= -ctc_loss.

    Labels that do not fit into their steps (a blank must part two equal ones) have log_probability -inf and no path,
    which is -1 everywhere, as have labels that -inf forbids; where the blank or a label of a row has NaN or inf, its
    log_probability is NaN (see the module's rule). So `numpy.isfinite(log_probability)` tells which rows are aligned.
    Of equal paths the choice is made from the end backwards: the last label, not the blank behind it; at each step to
    have stayed, else to have come from the neighbour (blank or label), else from the label before the blank. Where no
    two ways are equal it is the path of torchaudio.functional.forced_align. Sums are float64. For each row in work, the
    way back takes 1.5 bits of memory for each step times each label and blank. No gradient: the path is a choice.
    Raises TypeError or ValueError for wrong types, shapes, lengths and classes.

    >>> log_probs = np.log([[0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.2, 0.7, 0.1], [0.5, 0.1, 0.4]])
    >>> found = fusedrnn.ctc_align(log_probs, [1, 2])
    >>> found.path, float(np.exp(found.log_probability).round(4))
    (array([0, 1, 1, 2]), 0.1344)
    >>> for label, start, stop, score in found.spans():
    ...     print(label, start, stop, round(np.exp(score), 3))
    1 1 3 0.748
    2 3 4 0.4
    """
    call = checked("ctc_align", log_probs, targets, input_lengths, target_lengths, blank, False, whole=True)
    T, B, _ = call.log_probs.shape
    states, log_probability = np.empty((T, B), np.int64), np.empty(B, call.log_probs.dtype)
    backends.choose().ctc_align(
        call.log_probs, call.labels, call.first, call.label_counts, call.lengths, call.blank, states, log_probability
    )  # fmt: skip
    path, starts, stops, scores = _places(call, states, log_probability)
    if call.single:
        return Alignment(path[:, 0], starts[0], stops[0], scores[0], log_probability.reshape(()))
    return Alignment(path, starts, stops, scores, log_probability)


def _places(call: CtcCall, states: np.ndarray, log_probability: np.ndarray) -> tuple[np.ndarray, ...]:
    """An alignment's path, starts, stops and scores, from the state at each step."""
    B, S = len(call.lengths), call.most
    rows = states.T.copy()
    at_label = (rows > 0) & (rows & 1 == 1)
    b, t = np.nonzero(at_label)
    j = rows[at_label] >> 1
    label = call.labels[call.first[b] + j]
    path = np.where(states < 0, -1, call.blank)
    path[t, b] = label
    place = b * S + j  # never falls
    steps = np.bincount(place, minlength=B * S)
    starts = np.full(B * S, -1)
    begin = np.flatnonzero(np.diff(place, prepend=-1))
    starts[place[begin]] = t[begin]
    stops = np.where(steps > 0, starts + steps, -1)
    scores = np.bincount(place, call.log_probs[t, b, label], B * S) / np.maximum(steps, 1)
    scores = scores.reshape(B, S)
    lost = ~np.isfinite(log_probability)[:, None] & (np.arange(S) < call.label_counts[:, None])
    scores[lost] = np.broadcast_to(log_probability[:, None], (B, S))[lost]
    return path, starts.reshape(B, S), stops.reshape(B, S), scores.astype(call.log_probs.dtype)


def _decoded(op: str, log_probs: Any, input_lengths: Any, blank: Any) -> tuple[np.ndarray, np.ndarray, int, bool]:
    log_probs, single = scores_of(op, "log_probs", log_probs, "(T, B, C)")
    T, B, C = log_probs.shape
    blank = blank_of(op, blank, C)
    if input_lengths is None:
        return log_probs, np.full(B, T, np.int64), blank, single
    return log_probs, lengths_of(op, "input_lengths", input_lengths, B, T, "T", single), blank, single


@dataclass(slots=True)
class CtcCall:
    """Checked arguments, as backends take them."""

    log_probs: np.ndarray  # (T,B,C)
    labels: np.ndarray  # int64, of all rows
    first: np.ndarray  # (B) int64: where a row's labels begin
    label_counts: np.ndarray  # (B) int64
    lengths: np.ndarray  # (B) int64
    most: int  # labels that a row has, or has room for
    blank: int
    zero_infinity: bool
    single: bool  # one row without B

    def empty(self, axes: str) -> tuple[Any, Any]:
        """A new array where log_probs is, as the user gets it and with its axis B."""
        sizes = dict(zip("TBC", self.log_probs.shape, strict=True))
        shape = tuple(sizes[a] for a in axes if not (a == "B" and self.single))
        array = arrays.empty(shape, self.log_probs.dtype, self.log_probs)
        return array, array[tuple(None if a == "B" and self.single else slice(None) for a in axes)]

    def weights(self, op: str, dloss: Any) -> Any:
        """dloss as the kernels take it."""
        B, dtype = self.log_probs.shape[1], self.log_probs.dtype
        given = arrays.on_device(dloss)
        if isinstance(given, arrays.DeviceArray):
            if not isinstance(self.log_probs, arrays.DeviceArray):
                check.fail(op, "dloss", "is on a CUDA device", "numbers on the host, as log_probs is", error=TypeError)
            if (given.shape, given.dtype) != ((B,), dtype) or (B > 1 and given.strides != (given.itemsize,)):
                check.fail(op, "dloss", f"is {given.kind} {given.shape}", f"{dtype} ({B},) without gaps")
            return given
        numbers = numbers_of(op, "dloss", dloss, B, dtype)
        if isinstance(self.log_probs, arrays.DeviceArray):
            return backends.load("cuda").to_device(self.log_probs, numbers)
        return numbers

    def run(self, loss: Any, dloss: Any, dlog_probs: Any) -> None:
        backends.choose(on_cuda=isinstance(self.log_probs, arrays.DeviceArray)).ctc(
            self.log_probs, self.labels, self.first, self.label_counts, self.lengths, self.blank, self.zero_infinity,
            loss, dloss, dlog_probs,
        )  # fmt: skip


def _integers(op: str, name: str, value: Any, expected: str) -> np.ndarray:
    array = check.numbers(op, name, value, expected)
    if array.dtype.kind not in "iu" and (array.size or array.dtype != np.float64):  # an empty list is float64
        check.fail(op, name, f"is {arrays.kind(value)}", expected, error=TypeError)
    return array.astype(np.int64)


def lengths_of(op: str, name: str, value: Any, B: int, most: int, axis: str, single: bool) -> np.ndarray:
    """B integers in [0, most]; one integer will do for one row."""
    words = "one integer" if single else f"{B} integers, one for each of B rows"
    array = _integers(op, name, value, words)
    if array.shape != (B,) and not (single and array.shape == ()):
        check.fail(op, name, f"has shape {array.shape}", words)
    array = array.reshape(B)
    bad = (array < 0) | (array > most)
    if bad.any():
        b = int(bad.argmax())
        check.fail(op, f"{name}[{b}]", f"is {array[b]}", f"0 <= length <= {axis} = {most}")
    return array


def numbers_of(op: str, name: str, value: Any, B: int, dtype: Any) -> np.ndarray:
    """B numbers, from as many or from one."""
    given = check.numbers(op, name, value, f"a number, or {B} = B numbers")
    if given.dtype.kind not in "fiu":
        check.fail(op, name, f"is {arrays.kind(value)}", f"a number, or {B} = B numbers", error=TypeError)
    if given.shape not in ((), (B,)):
        check.fail(op, name, f"has shape {given.shape}", f"({B},) = (B,), or one number")
    return np.broadcast_to(given, (B,)).astype(dtype)  # new: aligned, in native byte order


def scores_of(op: str, name: str, value: Any, axes: str) -> tuple[np.ndarray, bool]:
    """(T,B,C), and whether it came as one row (T,C)."""
    array = check.is_float(op, name, value)
    if array.ndim not in (2, 3):
        one = axes.replace("B, ", "")
        check.fail(op, name, f"has shape {array.shape}", f"three axes {axes}, or {one} for one row")
    return (array[:, None, :], True) if array.ndim == 2 else (array, False)


def blank_of(op: str, blank: Any, C: int) -> int:
    """The blank's class."""
    if C == 0:
        check.fail(op, "log_probs", "has no classes", "C >= 1, as the blank is one")
    return check.integer(op, "blank", blank, 0, C - 1)


def checked(
    op: str,
    log_probs: Any,
    targets: Any,
    input_lengths: Any,
    target_lengths: Any,
    blank: Any,
    zero_infinity: Any,
    *,
    whole: bool = False,
) -> CtcCall:
    """The arguments of a function that knows a row's labels. `whole`: None as lengths means all steps, all labels."""
    log_probs, single = scores_of(op, "log_probs", log_probs, "(T, B, C)")
    if log_probs.dtype == np.float16:  # only on a device
        check.fail(op, "log_probs", "has dtype float16", "float32 or float64", error=TypeError)
    T, B, C = log_probs.shape
    blank = blank_of(op, blank, C)
    zero_infinity = check.flag(op, "zero_infinity", zero_infinity)
    if whole and input_lengths is None:
        input_lengths = np.full(B, T)
    lengths = lengths_of(op, "input_lengths", input_lengths, B, T, "T", single)
    labels, first, counts, most = _labels(op, targets, target_lengths, B, single, whole)
    rows = np.repeat(np.arange(B), counts)  # of every label that counts
    places = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    used = labels[np.repeat(first, counts) + places]
    bad = (used < 0) | (used >= C) | (used == blank)
    if bad.any():
        n = int(bad.argmax())
        expected = f"a class in [0, {C}) = [0, C) that is not blank = {blank}"
        fix = "Entries past target_lengths are not read."
        check.fail(op, "targets", f"has {used[n]} as label {places[n]} of row {rows[n]}", expected, fix)
    return CtcCall(log_probs, labels, first, counts, lengths, most, blank, zero_infinity, single)


def _labels(
    op: str, targets: Any, target_lengths: Any, B: int, single: bool, whole: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """All labels, where those of each row begin, how many a row has, and has room for."""
    labels = _integers(op, "targets", targets, "integers: classes of log_probs")
    if labels.ndim == 2 or single:
        if labels.ndim == 2 and single or labels.ndim not in (1, 2):
            check.fail(op, "targets", f"has shape {labels.shape}", "(S,), as log_probs is one row (T, C)")
        S = most = labels.shape[-1]
        if labels.ndim == 2 and len(labels) != B:
            check.fail(op, "targets", f"has shape {labels.shape}", f"({B}, S) = (B, S), or all labels in one axis")
        if whole and target_lengths is None:
            target_lengths = np.full(B, S)
        counts = lengths_of(op, "target_lengths", target_lengths, B, S, "S", single)
        first = np.arange(B, dtype=np.int64) * S
    else:
        if labels.ndim != 1:
            check.fail(op, "targets", f"has shape {labels.shape}", f"({B}, S) = (B, S), or all labels in one axis")
        if whole and target_lengths is None and B == 1:
            target_lengths = [labels.size]
        counts = lengths_of(op, "target_lengths", target_lengths, B, labels.size, "the number of targets", single)
        if counts.sum() != labels.size:
            fix = "Padded targets need two axes (B, S)."
            check.fail(op, "targets", f"has {labels.size} labels", f"{counts.sum()} = sum of target_lengths", fix)
        first, most = np.cumsum(counts) - counts, int(counts.max(initial=0))
    return labels.ravel(), first, counts, most
