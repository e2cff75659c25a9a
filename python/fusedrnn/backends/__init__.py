# SPDX-License-Identifier: Apache-2.0
"""The backends, what they all take (the mirror of csrc/api.h), and which one runs.

Every backend is a module with the same functions on canonical arrays of one dtype, any strides:

    tape_elements(problem) -> int
    forward(problem, p, out, tape)            out  = F(p)
    backward(problem, p, tape, g, dp)         dp   = J(p)^T g
    jvp(problem, p, v, tout)                  tout = J(p) v
    hvp(problem, p, v, g, t, tdp, tout)       tdp  = d/ds [J(p + s v)^T (g + s t)] at s = 0; tout, if given, as jvp

and, for sums over paths (arguments as in _core.pyi),

    ctc(log_probs, labels, first, label_counts, lengths, blank, zero_infinity, loss, dloss, dlog_probs)
    ctc_align(log_probs, labels, first, label_counts, lengths, blank, states, log_probability)
    ctc_beam(log_probs, lengths, blank, beam_width, top)
    hmm(scores, initial, transitions, lengths, log_likelihood, weights, states, dinitial, dtransitions)
    viterbi(scores, initial, transitions, lengths, paths, log_probability)

Arrays are written, not added to. None means: not given (zero), or not wanted. Where an array that is written has
stride 0 on an E axis longer than 1, the sum over E is written.
"""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from .. import config

NAMES = ("native", "numba", "reference")

Params = tuple[Any, Any, Any, Any]  # W (E,G*H,I_l), R (E,G*H,H), bW (E,G*H), bR (E,G*H); the biases may be None


Extras = tuple[Any, Any, Any, Any, Any, Any]  # weight_hr, weight_ph, gain_ih, gain_hh, gain_c, bias_c: see `Variant`


@dataclass(slots=True)
class Variant:
    """What goes beyond a plain cell: see docs/semantics.md, "Options"."""

    activations: tuple[tuple[str, float, float], ...]  # name, alpha, beta of f, g, h (LSTM), f, g (GRU) or f (RNN)
    proj_size: int = 0  # h and y have so many units, c has H; weight_hr (E,P,H); 0: none
    peepholes: bool = False  # weight_ph (E,3*H): i, f, o; (E,2*H) without f where the gates are coupled
    layer_norm: bool = False  # gain_ih, gain_hh (E,G*H); LSTM: gain_c, bias_c (E,H)
    clip_gates: float = 0.0  # what goes into the gates' activations lies in [-clip_gates, clip_gates]; 0: off
    zoneout_h: float = 0.0
    zoneout_c: float = 0.0
    recurrent_dropout: float = 0.0
    training: bool = False  # zoneout and recurrent dropout draw; otherwise their expectations act


@dataclass(slots=True)
class Problem:
    """Which cell, what sizes, which options."""

    cell: str
    T: int
    E: int
    B: int
    I: int  # noqa: E741
    H: int
    L: int = 1
    D: int = 1
    reverse: bool = False
    reset_to_initial: bool = False
    recompute: bool = False
    clip_cell: float = 0.0
    clip_grad: float = 0.0
    dropout: float = 0.0
    seed: int = 0
    lengths: np.ndarray | None = None  # int64 (E,B)
    reset: np.ndarray | None = None  # bool or uint8 (T,E,B)
    bf16_weights: bool = False  # W and R are the bits of bfloat16 in uint16, the rest float32: forward without a tape
    variant: Variant | None = None

    @property
    def outputs(self) -> int:
        """Units of h and of y in one direction."""
        return self.variant.proj_size or self.H if self.variant else self.H


@dataclass(slots=True)
class Arguments:
    """What goes in; and so also its tangents and its gradients."""

    x: Any = None  # (T,E,B,I); or tokens, integers (T,E,B) for one-hot vectors: these have no tangent, no gradient
    h0: Any = None  # (L*D,E,B,H)
    c0: Any = None
    params: list[Params] = field(default_factory=list)  # [L*D], layer-major, forward direction first
    context: Any = None  # (E,B,K): what layer 0 sees at every step beside x
    context_weights: Any = None  # [D] of (E,G*H,K), where there is a context
    extras: list[Extras] = field(default_factory=list)  # [L*D], of problems with a variant


@dataclass(slots=True)
class Results:
    """What comes out; and so also its tangents and gradients."""

    y: Any = None  # (T,E,B,D*H)
    hn: Any = None  # (L*D,E,B,H)
    cn: Any = None
    cells: Any = None  # (L,T,E,B,D*H)


@dataclass(slots=True)
class Generation:
    """What is drawn, and how: see csrc/cpu/generation/generate.h."""

    head: Any  # (I,H), or (I,P) with a projection
    head_bias: Any  # (I,)
    drawn: Any  # int64 (steps,B), written
    ended: Any  # bool (E,B), read and written: rows that have drawn a token of `stop`, which they repeat
    stop: Any  # int64 (n,)
    seen: Any = None  # bool (B,I), read and written: tokens that a row has seen; with a penalty
    log_probs: Any = None  # float64 (steps,B), written
    of_model: bool = False  # log_probs are those of softmax(logits), not of what the tokens were drawn from
    first_row: int = 0  # number of the first row: random numbers depend on it
    temperature: float = 1.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    repetition_penalty: float = 1.0


def holds_tokens(x: Any) -> bool:
    """Whether x is tokens: integers in place of one-hot vectors.

    >>> fusedrnn.backends.holds_tokens(np.zeros((5, 1, 2), np.uint8))
    True
    """
    return x is not None and x.dtype.kind in "iu"


def dtype_of(problem: Problem, p: Arguments) -> np.dtype[Any]:
    """The type that a call computes in."""
    kind: np.dtype[Any] = (p.params[0][0] if holds_tokens(p.x) else p.x).dtype
    return np.dtype(np.float32) if kind == np.uint16 else kind


class Backend(Protocol):
    """What `choose` returns."""

    __name__: str
    C_STEPS: int  # with `recompute`, c of at most every so many steps is on the tape

    def tape_elements(self, problem: Problem) -> int: ...
    def forward(self, problem: Problem, p: Arguments, out: Results, tape: Any) -> None: ...
    def backward(self, problem: Problem, p: Arguments, tape: Any, g: Results, dp: Arguments) -> None: ...
    def jvp(self, problem: Problem, p: Arguments, v: Arguments, tout: Results) -> None: ...
    def hvp(
        self,
        problem: Problem,
        p: Arguments,
        v: Arguments,
        g: Results,
        t: Results,
        tdp: Arguments,
        tout: Results | None = None,
    ) -> None: ...
    def ctc(
        self, log_probs: Any, labels: Any, first: Any, label_counts: Any, lengths: Any, blank: int, zero_infinity: bool,
        loss: Any, dloss: Any = None, dlog_probs: Any = None,
    ) -> None: ...  # fmt: skip
    def ctc_align(
        self, log_probs: Any, labels: Any, first: Any, label_counts: Any, lengths: Any, blank: int,
        states: Any, log_probability: Any,
    ) -> None: ...  # fmt: skip
    def ctc_beam(self, log_probs: Any, lengths: Any, blank: int, beam_width: int, top: int) -> list[Any]: ...
    def hmm(
        self, scores: Any, initial: Any, transitions: Any, lengths: Any, log_likelihood: Any, weights: Any = None,
        states: Any = None, dinitial: Any = None, dtransitions: Any = None,
    ) -> None: ...  # fmt: skip
    def viterbi(
        self, scores: Any, initial: Any, transitions: Any, lengths: Any, paths: Any, log_probability: Any
    ) -> None: ...


_loaded: dict[str, Any] = {}
_missing: dict[str, str] = {}
log = logging.getLogger("fusedrnn")
announced = False  # whether the log has told which backend ran first


def load(name: str) -> Any:
    """The backend's module, or None if it cannot run here; then `missing` says why."""
    if name not in _loaded and name not in _missing:
        try:
            _loaded[name] = importlib.import_module(f".{name}", __name__)
        except ImportError as error:
            _missing[name] = str(error)
    return _loaded.get(name)


def missing(name: str) -> str | None:
    """Why a backend cannot run here, or None if it can.

    >>> fusedrnn.backends.missing("reference") is None
    True
    """
    return None if load(name) else _missing[name]


def available() -> list[str]:
    """The backends that can run here, best first.

    >>> "reference" in fusedrnn.backends.available()
    True
    """
    return [name for name in NAMES if load(name)]


def choose(name: str | None = None, *, on_cuda: bool = False) -> Backend:
    """The backend to run: `name`, else `fusedrnn.set_backend`'s, else FUSEDRNN_BACKEND's, else the best that is there.
    For arrays on a CUDA device: the CUDA backend, whatever the settings say of arrays on the host.

    >>> fusedrnn.backends.choose("reference").__name__
    'fusedrnn.backends.reference'
    """
    global announced
    if on_cuda:
        return _choose_cuda(name)
    name = config.backend if name is None else name
    chosen: Any = None
    if name is None:
        chosen = next(filter(None, map(load, NAMES)))
    elif not isinstance(name, str) or name not in NAMES:
        raise ValueError(f"fusedrnn: backend is {name!r}; expected one of {', '.join(NAMES)}.")
    else:
        chosen = load(name)
        if chosen is None:
            others = ", ".join(available())
            raise ImportError(
                f"fusedrnn: backend {name!r} cannot run here: {_missing[name]}. Available: {others}. "
                "`python -m fusedrnn info` tells more."
            )
    if not announced:
        announced = True
        log.info("running on the %s backend", chosen.__name__.rpartition(".")[2])
        if _missing.get("native") and name is None:
            log.warning("the compiled extension is missing (%s): slower", _missing["native"])
    result: Backend = chosen
    return result


def _choose_cuda(name: str | None) -> Backend:
    if name not in (None, "cuda"):
        raise ValueError(
            f"fusedrnn: backend is {name!r} for arrays on a CUDA device; expected 'cuda' or None. "
            "Copy the arrays to the host to run another."
        )
    result: Any = load("cuda")
    if result is None:
        raise ImportError(f"fusedrnn: x is on a CUDA device, and {_missing['cuda']}. Or copy the arrays to the host.")
    return result  # type: ignore[no-any-return]


def set_backend(name: str | None) -> None:
    """Make every later call run on "native", "numba" or "reference"; None: the best that is there.

    Raises ValueError for another name, ImportError when that backend cannot run here.

    >>> fusedrnn.set_backend("reference")
    >>> fusedrnn.set_backend(None)
    """
    global announced
    if name is not None:
        choose(name)
    config.backend = name
    announced = False


def get_num_threads() -> int:
    """How many threads the native kernels use (OpenMP's own setting); 1 without the extension.

    >>> fusedrnn.get_num_threads() >= 1
    True
    """
    native = load("native")
    return native.get_num_threads() if native else 1


def set_num_threads(n: int) -> None:
    """Set how many threads the native kernels use from now on. The other backends leave threads to NumPy's BLAS.

    Raises ValueError unless n is an integer >= 1.

    >>> fusedrnn.set_num_threads(fusedrnn.get_num_threads())
    """
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n < 2**31:
        raise ValueError(f"fusedrnn: n is {n!r}; expected an integer >= 1 (threads).")
    native = load("native")
    if native:
        native.set_num_threads(n)
