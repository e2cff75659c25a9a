# SPDX-License-Identifier: Apache-2.0
"""What a call can be told beside x, state and params: the type, default and text of every option, each in one place.

A function takes its options as `**options: Unpack[Options]`, or one of the other dicts: so mypy and editors know them.
`settle` makes `Settings` of them, which the checks read by name. `spelled_out` shows every option in `help`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from inspect import Parameter
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

if TYPE_CHECKING:
    from .ops import Tape

_Function = TypeVar("_Function", bound=Callable[..., Any])


class RNNVariants(TypedDict, total=False):
    """What makes a variant of any cell that has weight_hh."""

    zoneout: float | tuple[float, float]
    recurrent_dropout: float
    activations: Any
    clip_gates: float | None


class GRUVariants(RNNVariants, total=False):
    """What makes a variant of a GRU."""

    proj_size: int
    layer_norm: bool


class LSTMVariants(GRUVariants, total=False):
    """What makes a variant of an LSTM: all there is."""

    peepholes: bool


class Options(TypedDict, total=False):
    """What every cell takes."""

    num_layers: int
    bidirectional: bool
    reverse: bool
    batch_first: bool
    lengths: Any
    reset: Any
    reset_to: str
    context: Any
    dropout: float
    seed: int
    clip_grad: float | None
    training: bool
    recompute: bool
    return_cells: bool
    backend: str | None
    reuse: Tape | None


class RNNOptions(Options, RNNVariants, total=False):
    """What `rnn` takes."""


class GRUOptions(Options, GRUVariants, total=False):
    """What `gru` takes."""


class LSTMOptions(Options, LSTMVariants, total=False):
    """What `lstm` takes."""

    clip_cell: float | None


@dataclass(slots=True)
class Settings:
    """The options of one call of any cell, with their defaults. The checks put what an option means in its place."""

    proj_size: int = 0
    peepholes: bool = False
    layer_norm: bool = False
    zoneout: float | tuple[float, float] = 0.0
    recurrent_dropout: float = 0.0
    activations: Any = None
    clip_gates: float | None = None
    num_layers: int = 1
    bidirectional: bool = False
    reverse: bool = False
    batch_first: bool = False
    lengths: Any = None
    reset: Any = None
    reset_to: str = "zero"
    context: Any = None
    dropout: float = 0.0
    seed: int = 0
    clip_cell: float | None = None
    clip_grad: float | None = None
    training: bool = False
    recompute: bool = False
    return_cells: bool = False
    backend: str | None = None
    reuse: Tape | None = None


def settle(op: str, known: Any, options: Mapping[str, Any]) -> Settings:
    """The options of a call of `op`, which takes those of the dict `known`; Python's TypeError for another."""
    if not options.keys() <= known.__optional_keys__:
        wrong = next(name for name in options if name not in known.__optional_keys__)
        raise TypeError(f"{op}() got an unexpected keyword argument {wrong!r}")
    return Settings(**options)


# What `help` says. An entry begins at the left edge with one name or several.

_ENTRY = re.compile(r"([a-z]\w*(?:, [a-z]\w*)*): ")


def entries(text: str) -> dict[str, str]:
    """The entries of a text, by every name that they explain.

    >>> entries("a: one\\n    and more\\nb, c: two")
    {'a': 'a: one\\n    and more', 'b': 'b, c: two', 'c': 'b, c: two'}
    """
    found: list[tuple[list[str], list[str]]] = []
    for line in inspect.cleandoc(text).splitlines():
        if match := _ENTRY.match(line):
            found.append((match[1].split(", "), [line]))
        elif found and line.startswith(" "):
            found[-1][1].append(line)
    return {name: "\n".join(lines) for names, lines in found for name in names}


TEXTS = entries("""
x: (T,B,I), or (B,T,I) with batch_first, or (T,I) without a batch. Or tokens: integers of one axis less.
state: h (layers * directions, B, H), or (h, c) for cells that have c. None: zeros. Without a batch there is no B.
params: a dict under torch.nn's names, or a flat list in torch.nn's order; see fusedrnn.params.
proj_size: h and y have so many units, m has H: h = m Wr^T through weight_hr. 0: no projection. For the LSTM
    m = o tanh(c) (Sak et al. 2014; torch's proj_size).
peepholes: i and f see c', o sees c, through weight_ph (Gers & Schmidhuber 2000; ONNX's P).
layer_norm: x W^T, h' R^T and the LSTM's c before its tanh are normalised over all their units (eps 1e-5). Gain and
    bias follow (Ba et al. 2016); the biases of the sums are those of the gates.
zoneout: the probability that a unit keeps its old value while training. Otherwise it keeps that share of it
    (Krueger et al. 2017). A pair is for h and c.
recurrent_dropout: the probability that a unit of h' is dropped on its way into R while training. One mask serves all
    steps (Gal & Ghahramani 2016).
activations: names of ONNX's list, or (name, alpha, beta), in ONNX's order: of the gates, of g (or n), of c.
clip_gates: what goes into the activations of gates and g (or n) is limited to [-clip_gates, clip_gates] (ONNX's clip).
num_layers: how many layers there are, each on top of the last.
bidirectional: every layer also walks from the last step to the first. y has both directions side by side.
reverse: walk from the last step to the first.
batch_first: B stands before T in x, y, cells and reset. States lie as ever.
lengths: integers (B,). Row b ends before step lengths[b] and carries its state through; 0 is allowed.
reset: bool or uint8 (T,B), or (B,T) with batch_first. Row b begins a new sequence at step t.
reset_to: what a reset goes back to: "zero", or "initial" for the given state.
context: (B,K), or (K,) without a batch. Layer 0 sees it at every step beside x, through weight_ch_l0.
dropout: the probability that a value is dropped on its way up between layers, while training.
seed: of all masks: dropout, zoneout, recurrent dropout. The same seed gives the same masks everywhere.
clip_cell: |c| <= clip_cell after every step. None: no limit.
clip_grad: |dh|, |dc| <= clip_grad at every step of backward. None: no limit.
training: also make the tape for backward.
recompute: the tape has half the size or less, and backward takes longer.
return_cells: also return cells, c of every layer and step for the LSTM, h for the others.
backend: "native", "numba", "reference", or None for the best that is there. On a CUDA device: "cuda" or None.
reuse: an old tape that is not needed any more. The new one takes over its memory where that is large enough.
tape: what the call with training=True returned last.
dy, dstate, dcells: gradients of y, of the final state and of cells. None: zero.
""")


def explained(text: str | None, names: Iterable[str], texts: Mapping[str, str] = TEXTS, ending: str = "") -> str:
    """A docstring with the entries of all names, its own first, and then `ending`, before what it returns or shows."""
    text = inspect.cleandoc(text or "")
    own = entries(text)
    new = "\n".join(dict.fromkeys(texts[name] for name in names if name in texts and name not in own))
    end = re.search("^(Returns|Raises|>>>)", text, re.MULTILINE)
    at = end.start() if end else len(text)
    head, tail = text[:at].rstrip(), text[at:]
    if new and _ENTRY.match(head.rpartition("\n\n")[2]):
        head, new = f"{head}\n{new}", ""
    return "\n\n".join(part for part in (head, new, ending, tail) if part)


def signed(known: Any = None, before: Callable[..., Any] | None = None) -> Callable[[_Function], _Function]:
    """Give a function the signature that its callers see. * stands for the parameters of `before`, ** for `known`."""

    def sign(function: _Function) -> _Function:
        signature = inspect.signature(function)
        given = [*(inspect.signature(before).parameters.values() if before else ()), *signature.parameters.values()]
        shown = {one.name: one for one in given if one.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)}
        for option in fields(Settings):
            if known and option.name in known.__optional_keys__:
                kind, default = Parameter.KEYWORD_ONLY, option.default
                shown[option.name] = Parameter(option.name, kind, default=default, annotation=option.type)
        function.__signature__ = signature.replace(parameters=list(shown.values()))  # type: ignore[attr-defined]
        return function

    return sign


def spelled_out(known: Any = None, *, ending: str = "") -> Callable[[_Function], _Function]:
    """The same, and a docstring that explains every parameter."""

    def show(function: _Function) -> _Function:
        names = inspect.signature(signed(known)(function)).parameters
        function.__doc__ = explained(function.__doc__, names, ending=ending)
        return function

    return show
