# SPDX-License-Identifier: Apache-2.0
"""RNN, LSTM and GRU objects with torch.nn's names and shapes, for NumPy arrays. See fusedrnn.ops for all shapes."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any, NamedTuple, TypedDict, Unpack

import numpy as np

from . import arrays, backends, check, config, exchange, ops
from . import params as parameters
from .cells import CELLS
from .options import TEXTS, GRUVariants, LSTMVariants, RNNVariants, Settings, entries, explained, signed, spelled_out
from .variants import VARIANTS, variant

_Array = np.ndarray


class LayerOptions(TypedDict, total=False):
    """What every layer takes beside its two sizes."""

    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    clip_grad: float | None
    recompute: bool
    context_size: int
    dtype: Any
    seed: int | None
    backend: str | None


class RNNLayerOptions(LayerOptions, RNNVariants, total=False):
    """What `RNN` takes."""


class GRULayerOptions(LayerOptions, GRUVariants, total=False):
    """What `GRU` takes."""


class LSTMLayerOptions(LayerOptions, LSTMVariants, total=False):
    """What `LSTM` takes."""


_TEXTS = TEXTS | entries("""
input_size: features of x, I.
hidden_size: units, H.
bias: whether there are bias_ih and bias_hh.
dropout: the probability that a value is dropped on its way up between layers, in training mode.
recompute: keep half the tape or less, and rebuild the gates in backward.
context_size: K, for a layer that takes a context (B,K). 0: it takes none.
dtype: float32 or float64, of the parameters and of x.
seed: of the initial weights and of all masks. None: one is drawn.
""")

# Why there is no tape, and what to do: what stands in the tape's place.
_AGAIN = "Call layer.train(), then layer(x), then layer.backward(dy)."
_NOT_CALLED = f"there was no layer(x) since it was made or copied (step keeps no tape). {_AGAIN}"
_IN_EVAL = f"the last call ran in eval mode. {_AGAIN}"
_RAISED = "the last call raised {}. Call layer(x) again, with what it asks for, then layer.backward(dy)."
_LOADED = f"load_state_dict changed the parameters after the last call. {_AGAIN}"


class Recorded(NamedTuple):
    """What a plain training call leaves for backward: what the lane takes, in its order."""

    lane: Any
    x: Any
    state: Any
    weights: tuple[Any, ...]  # in torch.nn's order
    memory: Any  # of the tape
    recompute: bool
    clip_grad: float | None


class _Layer:
    """What the three have in common.

    Attributes: `parameters`, a dict of live arrays under torch.nn's names, read anew at every call, so changing them in
    place is all an optimizer does (for inference with half the bytes, set it to what `fusedrnn.params.to_bfloat16`
    makes of it); `training`; `seed` and `draws`, which make the dropout masks: the n-th training call of a layer with
    a given seed has the same mask on every machine, and setting both resumes a run.

    In eval mode one layer may be called by any number of threads at once. Training, `backward` and `step` keep what
    belongs to the last call in the layer: one thread at a time, or a copy.copy of the layer (which shares the
    parameters) for each thread.
    """

    _op: str  # the function in ops
    _cell: str
    _variants: frozenset[str] = frozenset()  # those of its options that make one
    _tape: ops.Tape | Recorded | str = _NOT_CALLED

    def __init_subclass__(cls) -> None:
        if cls.__doc__:
            cls.__doc__ = explained(cls.__doc__, signature(cls.__init__).parameters, _TEXTS)

    @signed()
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        clip_grad: float | None = None,
        recompute: bool = False,
        context_size: int = 0,
        dtype: Any = np.float32,
        seed: int | None = None,
        backend: str | None = None,
        **variants: Unpack[LSTMVariants],
    ) -> None:
        op = type(self).__name__
        for name in variants:
            if name not in self._variants:
                known = ", ".join(option for option in VARIANTS if option in self._variants)
                check.fail(op, name, "is unknown", f"an option it has: {known or 'see its text'}", error=TypeError)
        self.variants = variants
        self._variant = variant(op, self._cell, Settings(**variants))
        self.input_size = check.integer(op, "input_size", input_size, 1)
        self.hidden_size = check.integer(op, "hidden_size", hidden_size, 1)
        self.num_layers = check.integer(op, "num_layers", num_layers, 1)
        self.bias = check.flag(op, "bias", bias)
        self.batch_first = check.flag(op, "batch_first", batch_first)
        self.dropout = check.probability(op, "dropout", dropout)
        self.bidirectional = check.flag(op, "bidirectional", bidirectional)
        self.clip_grad = clip_grad
        check.limit(op, "clip_grad", clip_grad)
        self.recompute = check.flag(op, "recompute", recompute)
        self.context_size = check.integer(op, "context_size", context_size, 0)
        self.dtype = check.float_type(op, "dtype", dtype)
        drawn = np.random.SeedSequence().generate_state(1, np.uint64)[0] if seed is None else seed
        self.seed = check.integer(op, "seed", drawn, 0, 2**64 - 1)
        self.draws = 0
        self.backend = backend
        self.training = True
        self._clip_cell: float | None = None
        self.parameters: dict[str, _Array] = parameters.init(
            self._cell,
            self.input_size,
            self.hidden_size,
            self.num_layers,
            self.bidirectional,
            self.bias,
            self.dtype,
            self.seed,
            self.context_size,
            **{name: variants[name] for name in ("proj_size", "peepholes", "layer_norm") if name in variants},
        )
        self._forget()

    def _forget(self) -> None:
        """Drop what is neither copied nor pickled: the tape, and the short way into the kernels."""
        self._tape = _NOT_CALLED
        self._lane: Any = None
        self._lane_for: Any = _Layer  # the settings that the lane was made for; nothing equals a class

    def _find_lane(self) -> Any:
        """The short way for plain calls, where the native backend runs; remade when the settings change."""
        settings = (self.backend, config.backend)
        if settings != self._lane_for:
            native: Any = backends.load("native")
            self._lane = None
            make: Any = native.Lane if native else None
            plain = CELLS[self._cell].state_product and self._variant is None and not self.context_size
            if backends.choose(self.backend) is native and plain:
                directions, clip_cell = 2 if self.bidirectional else 1, self._clip_cell or 0.0
                self._lane = make(self._cell, self.num_layers, directions, self.batch_first, clip_cell)
            self._lane_for = settings
        return self._lane

    def _options(self) -> dict[str, Any]:
        return {}

    @spelled_out()
    def __call__(
        self,
        x: _Array,
        state: Any = None,
        lengths: Any = None,
        reset: Any = None,
        return_cells: bool = False,
        *,
        context: Any = None,
    ) -> Any:
        """Run the layer: (y, state), or (y, state, cells) with return_cells. In training mode `backward` may follow.

        Tokens stand for one-hot vectors of input_size: `fusedrnn.LSTM(vocabulary, H)(tokens)` looks columns of
        weight_ih_l0 up (see fusedrnn.ops). A context has K = context_size numbers; `backward` has its gradient.

        Raises TypeError or ValueError before anything is written.
        """
        plain = lengths is None and reset is None and not return_cells and context is None
        lane = self._find_lane() if plain else None
        if not self.training:
            self._tape = _IN_EVAL
            if lane is not None:
                result = lane.forward(x, state, self.parameters)
                if result is not None:
                    return result
        # The new tape takes over the old one's memory. A call that is refused leaves the old one whole. One that a
        # signal ends does not: the lane raises for no other reason, and the long way takes the old buffer first.
        tape = self.__dict__.pop("_tape", _NOT_CALLED)
        old, memory = tape, tape.memory if type(tape) is Recorded else None
        try:
            if lane is not None and self.training and not self.dropout:
                settings = self.recompute, self.clip_grad
                tape = _NOT_CALLED
                result = lane.record(x, state, self.parameters, *settings, memory)
                tape = old
                if result is not None:
                    y, last, weights, memory = result
                    state = tuple(state) if isinstance(state, list) else state
                    tape = Recorded(lane, x, state, weights, memory, *settings)
                    return y, last
            seed = self._mask_seed()
            options = {"lengths": lengths, "reset": reset, "return_cells": return_cells, "context": context}
            options |= {"seed": seed or 0, "training": self.training, "reuse": tape if type(tape) is ops.Tape else None}
            *result, new = self._run(x, state, **options)
            tape = new or tape
        except BaseException as error:
            if self.training and (isinstance(tape, str) or getattr(tape, "buffer", tape) is None):
                tape = _RAISED.format(type(error).__name__)
            raise
        finally:
            self._tape = tape
        self.draws += seed is not None
        return tuple(result)

    def _mask_seed(self) -> int | None:
        """The seed of the next call's dropout masks; None when it draws none."""
        v = self._variant
        draws = self.dropout > 0 or (v is not None and (v.zoneout_h > 0 or v.zoneout_c > 0 or v.recurrent_dropout > 0))
        if not self.training or not draws:
            return None
        return (int(self.seed) * 0x9E3779B97F4A7C15 + self.draws) % 2**64

    def _run(self, x: _Array, state: Any, params: Any = None, **options: Any) -> Any:
        return getattr(ops, self._op)(
            x,
            state,
            self.parameters if params is None else params,
            num_layers=self.num_layers,
            bidirectional=self.bidirectional,
            batch_first=self.batch_first,
            dropout=self.dropout,
            clip_grad=self.clip_grad,
            recompute=self.recompute,
            backend=self.backend,
            **self.variants,
            **self._options(),
            **options,
        )

    @spelled_out()
    def backward(self, dy: _Array | None = None, dstate: Any = None, dcells: _Array | None = None) -> dict[str, Any]:
        """Gradients of the last training call: a dict with "x", "state" and one entry per parameter.

        x, state and the parameters must still hold what they held then. A parameter that was replaced by another array
        counts as it was. May be called again, until the next call.

        Raises RuntimeError that says why there is no tape; ValueError or
        TypeError for arrays that do not fit.

        >>> layer = fusedrnn.GRU(3, 4, seed=0)
        >>> y, h = layer(np.ones((5, 2, 3), np.float32))
        >>> layer.backward(np.ones_like(y))["weight_hh_l0"].shape
        (12, 4)
        """
        tape = self._tape
        if isinstance(tape, str):
            raise RuntimeError(f"{type(self).__name__}.backward: no tape, because {tape}")
        result: dict[str, Any] | None = None
        if isinstance(tape, Recorded):
            if dcells is None:
                result = tape.lane.backward(*tape[1:], dy, dstate)
            if result is None:  # odd, or wrong: the same call once more, on the full route
                tape = self._tape = self._run(tape.x, tape.state, tape.weights, training=True)[-1]
        return result or getattr(ops, f"{self._op}_backward")(tape, dy, dstate, dcells)

    @spelled_out()
    def step(self, x_t: Any, state: Any = None, *, context: Any = None) -> Any:
        """One time step of streaming inference: (y_t, state). No dropout, no tape, one direction only.

        y_t is (B,H) or (H,). The arrays that come back belong to the layer: they hold until the next step but one. Copy
        what you keep.

        x_t: (B,I) or (I,), or tokens (B,) or one integer.
        state: None (zeros), or what the last step returned.

        Raises TypeError or ValueError as the layer call does.

        >>> layer = fusedrnn.LSTM(3, 4, seed=0)
        >>> state = None
        >>> for x_t in np.ones((5, 2, 3), np.float32):
        ...     y_t, state = layer.step(x_t, state)
        >>> bool(np.allclose(y_t, layer(np.ones((5, 2, 3), np.float32))[0][-1], atol=1e-6))
        True
        """
        lane = self._lane
        if lane is None or self._lane_for != (self.backend, config.backend):
            lane = self._find_lane()
        if lane is not None and context is None:
            result = lane.step(x_t, state, self.parameters)
            if result is not None:
                return result
        op = f"{type(self).__name__}.step"
        if self.bidirectional:
            fix = "The other needs the whole sequence: layer(x)."
            check.fail(op, "layer", "is bidirectional", "one direction", fix)
        tokens = isinstance(x_t, int | np.integer | np.ndarray) and np.asarray(x_t).dtype.kind in "iu"
        if tokens:
            x_t = np.asarray(x_t)
        else:
            check.is_float(op, "x_t", arrays.on_device(x_t), self.dtype, "the layer")
        if x_t.ndim not in (1 - tokens, 2 - tokens):
            expected = "(B,) or one integer" if tokens else "(B,I) or (I,)"
            check.fail(op, "x_t", f"has shape {x_t.shape}", expected, "One time step has no time axis.")
        time = 1 if self.batch_first and x_t.ndim == 2 - tokens else 0
        y, state, _ = self._run(x_t[:, None] if time else x_t[None], state, context=context)[:3]
        return (y[:, 0] if time else y[0]), state

    def train(self, mode: bool = True) -> Any:
        """Calls keep a tape and apply dropout from now on; with mode=False as after `eval`. Returns the layer."""
        self.training = check.flag(type(self).__name__, "mode", mode)
        return self

    def eval(self) -> Any:
        """Calls keep no tape and apply no dropout from now on. Returns the layer."""
        return self.train(False)

    def to(self, place: Any) -> Any:
        """Put `place(array)` in every parameter's place. Returns the layer.

        With cupy.asarray the layer runs on the GPU, and takes and gives CuPy arrays; cupy.asnumpy brings it back. An
        optimizer that holds the arrays must take the new ones from `parameters`.

        >>> layer = fusedrnn.RNN(3, 4).to(lambda array: array.astype(np.float64))
        >>> layer(np.ones((5, 2, 3)))[0].dtype
        dtype('float64')
        """
        self.parameters = {name: place(array) for name, array in self.parameters.items()}
        first = next(iter(self.parameters.values()))
        device = arrays.device_array(first)
        self.dtype = np.dtype(first.dtype) if device is None else device.dtype
        return self

    def state_dict(self, *, prefix: str = "") -> dict[str, _Array]:
        """Copies of all parameters, under torch.nn's names with the prefix before them.

        >>> {name: a.shape for name, a in fusedrnn.RNN(3, 4, bias=False).state_dict(prefix="rnn.").items()}
        {'rnn.weight_ih_l0': (4, 3), 'rnn.weight_hh_l0': (4, 4)}
        """
        prefix = check.text(f"{type(self).__name__}.state_dict", "prefix", prefix)
        return {prefix + name: exchange.copied(array) for name, array in self.parameters.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], *, prefix: str = "") -> None:
        """Copy parameters in, from arrays, torch tensors or what NumPy can read, rounded to the layer's dtype.

        Only names that begin with `prefix` count, without it. A layer of one direction also takes the names of torch's
        cells (weight_ih for weight_ih_l0). Tensors may require gradients, be on any device and of any float type; NaN
        and infinities are loaded as they are, as torch.nn does; uint16 stands for bfloat16 bits.
        Raises ValueError for missing or unknown names, wrong shapes, and finite numbers that the dtype cannot hold;
        TypeError for what holds no real numbers; both before anything is written.

        >>> a, b = fusedrnn.LSTM(3, 4), fusedrnn.LSTM(3, 4)
        >>> b.load_state_dict(a.state_dict())
        >>> checkpoint = a.state_dict(prefix="encoder.rnn.") | {"head.bias": np.zeros(2)}
        >>> b.load_state_dict(checkpoint, prefix="encoder.rnn.")
        """
        new = exchange.read(f"{type(self).__name__}.load_state_dict", state_dict, self.parameters, prefix)
        for name, array in self.parameters.items():
            exchange.write(array, new[name])
        if not isinstance(self._tape, str):
            self._tape = _LOADED

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_tape", "_lane", "_lane_for")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __repr__(self) -> str:
        parts = [str(self.input_size), str(self.hidden_size)]
        plain = {"num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0, "bidirectional": False}
        plain["context_size"] = 0
        parts += [f"{name}={getattr(self, name)}" for name, usual in plain.items() if getattr(self, name) != usual]
        return f"{type(self).__name__}({', '.join(parts)})"


class LSTM(_Layer):
    """A stack of LSTM layers, as torch.nn.LSTM, on NumPy arrays. See `fusedrnn.lstm`.

    coupled: the forget gate is 1 - i, so there are three gates i, g, o (Greff et al. 2017; ONNX's input_forget).

    >>> layer = fusedrnn.LSTM(3, 4, num_layers=2, seed=0)
    >>> y, (h, c) = layer(np.ones((5, 2, 3), np.float32))
    >>> y.shape, h.shape, c.shape
    ((5, 2, 4), (2, 2, 4), (2, 2, 4))
    """

    _op = "lstm"
    _variants = LSTMVariants.__optional_keys__

    @signed(LSTMVariants, before=_Layer.__init__)
    def __init__(
        self,
        *sizes: Any,
        clip_cell: float | None = None,
        coupled: bool = False,
        **options: Unpack[LSTMLayerOptions],
    ) -> None:
        self.coupled = check.flag("LSTM", "coupled", coupled)
        self._cell = "cifg" if self.coupled else "lstm"
        super().__init__(*sizes, **options)
        check.limit("LSTM", "clip_cell", clip_cell)
        self._clip_cell = clip_cell

    @property
    def clip_cell(self) -> float | None:
        """The limit of |c|, fixed when the layer was made."""
        return self._clip_cell

    def _options(self) -> dict[str, Any]:
        return {"clip_cell": self._clip_cell, "coupled": self.coupled}


class GRU(_Layer):
    """A stack of GRU layers, as torch.nn.GRU, on NumPy arrays. See `fusedrnn.gru`.

    reset_after: the reset gate acts after the product (PyTorch, cuDNN) or before it (the paper, ONNX, older Keras).

    >>> y, h = fusedrnn.GRU(3, 4, bidirectional=True)(np.ones((5, 2, 3), np.float32))
    >>> y.shape, h.shape
    ((5, 2, 8), (2, 2, 4))
    """

    _op = "gru"
    _variants = GRUVariants.__optional_keys__

    @signed(GRUVariants, before=_Layer.__init__)
    def __init__(self, *sizes: Any, reset_after: bool = True, **options: Unpack[GRULayerOptions]) -> None:
        self.reset_after = check.flag("GRU", "reset_after", reset_after)
        self._cell = "gru" if self.reset_after else "gru_reset_before"
        super().__init__(*sizes, **options)

    def _options(self) -> dict[str, Any]:
        return {"reset_after": self.reset_after}


class RNN(_Layer):
    """A stack of vanilla RNN layers, as torch.nn.RNN, on NumPy arrays. See `fusedrnn.rnn`.

    nonlinearity: "tanh" or "relu".

    >>> y, h = fusedrnn.RNN(3, 4, nonlinearity="relu", batch_first=True)(np.ones((2, 5, 3), np.float32))
    >>> y.shape, h.shape
    ((2, 5, 4), (1, 2, 4))
    """

    _op = "rnn"
    _variants = RNNVariants.__optional_keys__

    @signed(RNNVariants, before=_Layer.__init__)
    def __init__(self, *sizes: Any, nonlinearity: str = "tanh", **options: Unpack[RNNLayerOptions]) -> None:
        self.nonlinearity = check.word("RNN", "nonlinearity", nonlinearity, "tanh", "relu")
        self._cell = f"rnn_{nonlinearity}"
        super().__init__(*sizes, **options)

    def _options(self) -> dict[str, Any]:
        return {"nonlinearity": self.nonlinearity}


class LiGRU(_Layer):
    """A stack of Li-GRU layers (Ravanelli et al. 2018): no reset gate, and relu for tanh, see `fusedrnn.ligru`.

    >>> y, h = fusedrnn.LiGRU(3, 4, bidirectional=True)(np.ones((5, 2, 3), np.float32))
    >>> y.shape, h.shape
    ((5, 2, 8), (2, 2, 4))
    """

    _op = "ligru"
    _cell = "ligru"
    _variants = RNNVariants.__optional_keys__

    @signed(RNNVariants, before=_Layer.__init__)
    def __init__(self, *sizes: Any, **options: Unpack[RNNLayerOptions]) -> None:
        super().__init__(*sizes, **options)


class MinGRU(_Layer):
    """A stack of minGRU layers (Feng et al. 2024): gates from x alone, see `fusedrnn.mingru`.

    >>> y, h = fusedrnn.MinGRU(3, 4, seed=0)(np.ones((5, 2, 3), np.float32))
    >>> y.shape, h.shape
    ((5, 2, 4), (1, 2, 4))
    """

    _op = "mingru"
    _cell = "mingru"


class MinLSTM(_Layer):
    """A stack of minLSTM layers (Feng et al. 2024): gates from x alone, see `fusedrnn.minlstm`.

    >>> y, h = fusedrnn.MinLSTM(3, 4, seed=0)(np.ones((5, 2, 3), np.float32))
    >>> y.shape, h.shape
    ((5, 2, 4), (1, 2, 4))
    """

    _op = "minlstm"
    _cell = "minlstm"
