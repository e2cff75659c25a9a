# SPDX-License-Identifier: Apache-2.0
"""torch.nn's recurrent modules on the fused kernels: the same constructors, parameters, outputs and errors.

What the kernels do not cover (another device, arguments that are wrong) goes through torch.nn's own code;
fusedrnn.torch.route() tells. They are no subclasses of nn.RNN, nn.LSTM and nn.GRU, because torch.compile refuses those.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..cells import CELLS
from . import exits, fast, functional, gate, operators, private
from .how import How, how_of

_FEW_STEPS = 8  # of a projection, in which torch.nn's own code is as fast as the kernels or faster

_CELLS = {"LSTM": "lstm", "GRU": "gru", "RNN_TANH": "rnn_tanh", "RNN_RELU": "rnn_relu"}


_ATTRIBUTES = (
    "mode",
    "num_layers",
    "bidirectional",
    "bias",
    "batch_first",
    "proj_size",
    "recompute",
    "reset_to",
    "clip_cell",
    "clip_grad",
)
_attributes = attrgetter(*_ATTRIBUTES)


def _make_how(attributes: tuple[Any, ...], recompute: bool | None) -> How:
    """What a call of a layer with these attributes is; recompute: for this call."""
    own = dict(zip(_ATTRIBUTES, attributes, strict=True))
    return How(
        cell=_CELLS[own["mode"]],
        layers=own["num_layers"],
        directions=2 if own["bidirectional"] else 1,
        bias=own["bias"],
        reset_to_initial=own["reset_to"] == "initial",
        recompute=own["recompute"] if recompute is None else recompute,
        clip_cell=own["clip_cell"] or 0.0,
        clip_grad=own["clip_grad"] or 0.0,
        proj_size=own["proj_size"],
    )


_how = lru_cache(maxsize=1024)(_make_how)


@lru_cache(maxsize=1024)
def _short(attributes: tuple[Any, ...], recompute: bool | None, packed: bool) -> fast.Settings:
    batch_first = attributes[_ATTRIBUTES.index("batch_first")]
    return fast.Settings(how=_how(attributes, recompute), batch_first=batch_first, packed=packed)


class _Layer(exits.Scriptable, nn.RNNBase):
    """What RNN, LSTM and GRU share.

    Attributes that torch.nn does not have, to be set when wanted: recompute (keep half the tape or less, for a slower
    backward; no effect with proj_size), reset_to ("zero" or "initial": what a reset goes back to), clip_cell (LSTM:
    limits |c| after every step) and clip_grad (limits |dh|, |dc| at every step of backward), both None = off.
    """

    _torch: Any
    recompute: bool = False
    reset_to: str = "zero"
    clip_cell: float | None = None
    clip_grad: float | None = None

    def _settings(self, recompute: bool | None, cells: bool) -> How:
        if torch.compiler.is_compiling():  # it cannot look into attrgetter, and looks through caches
            how = _make_how(tuple([getattr(self, name) for name in _ATTRIBUTES]), recompute)
        else:
            how = _how(_attributes(self), recompute)
        return how.but(cells=cells) if cells else how

    def forward(  # type: ignore[override]
        self,
        input: Any,
        hx: Any = None,
        lengths: Any = None,
        reset: Any = None,
        return_cells: bool = False,
        recompute: bool | None = None,
    ) -> Any:
        """As torch.nn's, and: lengths (B,) of rows, in any order, 0 allowed; reset (T,B) or as input lies: True where a
        row begins a new sequence; return_cells: also the state of every layer and step (L,T,B,D*H); recompute: for this
        call."""
        if torch.compiler.is_compiling() or reset is not None or return_cells:
            return self._general(input, hx, lengths, reset, return_cells, recompute)
        out = self._fast(input, hx, lengths, recompute)
        return self._general(input, hx, lengths, None, False, recompute) if out is None else out

    def _fast(self, input: Any, hx: Any, lengths: Any, recompute: bool | None, packed: bool = False) -> Any:
        """The short way: (y, final state), or None. packed: `lengths` tells what lives at each step."""
        mode = self.mode
        if self.proj_size or (self.training and self.dropout and self.num_layers > 1):
            return None
        h0, c0 = hx, None
        if mode == "LSTM" and hx is not None:
            if type(hx) is not tuple or len(hx) != 2:
                return None
            h0, c0 = hx
        try:
            weights = private.weights(self)
        except KeyError:  # parametrized
            return None
        settings = _short(_attributes(self), recompute, packed)
        out = fast.call(settings, input, h0, c0, weights, lengths)
        if out is None:
            return None
        functional.set_route("fused")
        y, h, c = out
        return (y, (h, c)) if mode == "LSTM" else (y, h)

    def _general(
        self, input: Any, hx: Any, lengths: Any, reset: Any, return_cells: bool, recompute: bool | None
    ) -> Any:
        way, name = exits.exit_of(input), type(self).__name__
        if way == exits.FX:
            cells = None if return_cells is False else return_cells
            return exits.leaf(self, input, hx, lengths=lengths, reset=reset, return_cells=cells, recompute=recompute)
        more = not (lengths is None and reset is None) or return_cells
        bare = not (more or self.clip_cell)  # the results are torch.nn's
        if isinstance(input, PackedSequence):
            if way == exits.ONNX and torch.compiler.is_compiling():
                raise ValueError(f"{name}: got a PackedSequence in {way}; expected a padded tensor. Use lengths=.")
            if way and bare and not self.clip_grad:
                return self._fall_back(way, input, hx)
            return self._packed(input, hx, lengths, reset, return_cells, recompute)
        if way == exits.TRACE and bare and not self.clip_grad:
            return self._fall_back(way, input, hx)
        states = hx if self.mode == "LSTM" and isinstance(hx, tuple | list) else (hx,)
        weights = [getattr(self, name) for name in private.weight_names(self)]
        self._check_memory({"input": input}, states, weights)
        why = self._why_not(input, states, weights)
        if bare and not (why or way):
            why = self._faster(input.shape[1 if self.batch_first and input.dim() == 3 else 0], input)
        if why and not ((not bare or self.clip_grad) and why.startswith("no kernels for")):
            if more:
                raise ValueError(f"{name}: lengths, reset and return_cells need the fused kernels; not for {why}")
            return self._fall_back(why, input, hx)
        h0, c0 = (*states, None, None)[:2]
        settings = self._settings(recompute, return_cells)
        dropout = self.dropout if self.training else 0.0
        rest = h0, c0, weights, self.batch_first, lengths, reset, dropout
        return gate.call(functional.batched, (input, h0, c0, *weights), name, settings, input, *rest)

    def _check_memory(self, inputs: dict[str, Any], states: Any, weights: list[Tensor]) -> None:
        """See gate.check."""
        tensors = [*inputs.values(), *states, *weights]
        gate.check(type(self).__name__, lambda: [*inputs, *_state_names(states), *private.weight_names(self)], tensors)

    def _why_not(self, input: Tensor, states: Any, weights: list[Tensor], rows: int | None = None) -> str:
        """Why torch.nn's own code must run; "" if the kernels can. Wrong arguments too: torch.nn words the errors.
        rows: of a packed input."""
        if input.dim() not in (2, 3) or input.is_nested or input.shape[-1] != self.input_size:
            return "input's shape"
        if not self.input_size:
            return "an empty input"
        S, H = self.num_layers * (2 if self.bidirectional else 1), self.hidden_size
        whole = rows is None
        if input.dim() == 3:
            rows = input.shape[0 if self.batch_first else 1]
        expected = [(S, units) if rows is None else (S, rows, units) for units in (self.proj_size or H, H)]
        if states[0] is not None or len(states) != 1:
            if len(states) != (2 if self.mode == "LSTM" else 1):
                return "hx's type"
            for state, size in zip(states, expected, strict=False):
                if not isinstance(state, Tensor) or state.shape != size:
                    return "hx's shape"
        for weight, shape in zip(
            weights,
            functional.weight_shapes(self._settings(None, False), self.input_size, self.hidden_size),
            strict=True,
        ):
            if weight.shape != shape:
                return "a weight's shape"
        if input.dtype != weights[0].dtype and not torch.is_autocast_enabled(input.device.type):
            return "input's dtype"
        given = [input, *((*states, None)[:2] if self.mode == "LSTM" else states), *weights]
        dtypes = functional.cast_dtypes(_CELLS[self.mode], given, whole)
        return functional.why_not(given, self.proj_size, dtypes)

    def _faster(self, T: int, input: Any = None) -> str:
        """Why torch.nn's own code should run a call that asks for no more than it can, because it is faster; "" if the
        kernels should. input: of one call that asks for no gradients."""
        if self.clip_cell or self.clip_grad or torch.compiler.is_compiling():
            return ""
        if private.transforms_active() or private.in_dual_level():
            return ""
        if self.proj_size and torch.is_autocast_enabled("cpu"):
            return "proj_size under autocast" if T else ""
        if self.proj_size:
            return f"proj_size in fewer than {_FEW_STEPS} steps" if 0 < T < _FEW_STEPS else ""
        if input is None or torch.is_grad_enabled() or not functional.by_onednn(_CELLS[self.mode], input, True):
            return ""
        wide = torch.get_autocast_dtype("cpu") != torch.bfloat16 or not private.onednn_multiplies_bfloat16()
        return "" if wide else "oneDNN under autocast"

    def _fall_back(self, why: str, input: Any, hx: Any) -> Any:
        # what torch.nn does not check itself, and reads beyond the end
        if why == "hx's shape" and isinstance(input, PackedSequence):
            self.check_forward_args(input.data, hx, input.batch_sizes)
        if why == "a weight's shape":
            shapes = functional.weight_shapes(self._settings(None, False), self.input_size, self.hidden_size)
            _check_weights(self, zip(private.weight_names(self), shapes, strict=True))
        functional.set_route(f"torch.nn: {why}")
        return self._torch.forward(self, input, hx)

    @torch.compiler.disable  # lengths are values: a PackedSequence is one graph break, as with torch.nn
    def _packed(
        self, input: PackedSequence, hx: Any, lengths: Any, reset: Any, return_cells: bool, recompute: bool | None
    ) -> Any:
        if lengths is not None or reset is not None or return_cells:
            raise ValueError(
                f"{type(self).__name__}: lengths, reset and return_cells were given with a PackedSequence; expected a "
                "padded tensor with them. Use torch.nn.utils.rnn.pad_packed_sequence, which gives both."
            )
        data, sizes, order, back = input
        weights = [getattr(self, name) for name in private.weight_names(self)]
        states = hx if self.mode == "LSTM" and isinstance(hx, tuple | list) else (hx,)
        if not gate.is_plain(sizes, order, back, *states):
            _check_order(type(self).__name__, input)
            self._check_memory(input._asdict(), states, weights)
        if order is not None:
            states = tuple(s.index_select(1, order) if isinstance(s, Tensor) and s.dim() == 3 else s for s in states)
        out = self._fast(data, states if self.mode == "LSTM" and hx is not None else states[0], sizes, recompute, True)
        if out is None:
            _check_order(type(self).__name__, input)
            self._check_memory(input._asdict(), states, weights)
            sizes = _checked_sizes(type(self).__name__, data, sizes)
            why = self._why_not(data, states, weights, int(sizes[0])) or self._faster(len(sizes))
            if why and not ((self.clip_cell or self.clip_grad) and why.startswith("no kernels for")):
                return self._fall_back(why, input._replace(batch_sizes=sizes), hx)
            tensors = (data, input.batch_sizes, *states, *weights)
            out = gate.call(self._general_packed, tensors, data, sizes, states, weights, recompute)
        y, final = out
        return PackedSequence(y, input.batch_sizes, order, back), self.permute_hidden(final, back)

    def _general_packed(self, data: Tensor, sizes: Tensor, states: Any, weights: list[Tensor], recompute: Any) -> Any:
        """The data of y, and the final state; rows sorted."""
        x, rows = private.pad_packed(data, sizes)
        h0, c0 = (*states, None, None)[:2]
        dropout = self.dropout if self.training else 0.0
        settings = self._settings(recompute, False)
        y, *final = functional.run(settings, x, h0, c0, weights, rows, None, dropout, sizes, whole=False)
        packed = private.pack_padded(y, rows)
        return packed, tuple(final) if self.mode == "LSTM" else final[0]

    def flatten_parameters(self) -> None:
        """Nothing: weights are read where they lie (on a GPU torch.nn's own code still finds them in one piece)."""
        if private.on_gpu(self):
            super().flatten_parameters()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._prepare()

    def _prepare(self) -> None:
        settings = self._settings(None, False)
        operators.make_operators(settings.states, settings.weights)
        one = settings.but(layers=1)
        operators.make_operators(one.states, one.weights)


class RNN(_Layer):
    """torch.nn.RNN on the fused kernels; see its documentation, and `_Layer` for what is new.

    >>> y, h = fusedrnn.torch.RNN(3, 4, nonlinearity="relu")(torch.ones(5, 2, 3), lengths=[5, 2])
    >>> y.shape, h.shape
    (torch.Size([5, 2, 4]), torch.Size([1, 2, 4]))
    """

    _torch = nn.RNN
    nonlinearity: str

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _no_projection(kwargs)
        if len(args) > 3:
            self.nonlinearity = args[3]
            args = args[:3] + args[4:]
        else:
            self.nonlinearity = kwargs.pop("nonlinearity", "tanh")
        if self.nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{self.nonlinearity}'. Select from 'tanh' or 'relu'.")
        super().__init__(f"RNN_{self.nonlinearity.upper()}", *args, **kwargs)
        self._prepare()


class LSTM(_Layer):
    """torch.nn.LSTM on the fused kernels; see its documentation, and `_Layer` for what is new.

    >>> layer = fusedrnn.torch.LSTM(3, 4, batch_first=True)
    >>> y, (h, c), cells = layer(torch.ones(2, 5, 3), return_cells=True)
    >>> y.shape, cells.shape
    (torch.Size([2, 5, 4]), torch.Size([1, 2, 5, 4]))
    """

    _torch = nn.LSTM
    get_expected_cell_size = nn.LSTM.get_expected_cell_size
    check_forward_args = nn.LSTM.check_forward_args  # type: ignore[assignment]
    permute_hidden = nn.LSTM.permute_hidden  # type: ignore[assignment]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("LSTM", *args, **kwargs)
        self._prepare()


class GRU(_Layer):
    """torch.nn.GRU on the fused kernels; see its documentation, and `_Layer` for what is new.

    >>> layer = fusedrnn.torch.GRU(3, 4)
    >>> y, h = layer(torch.ones(5, 2, 3), reset=torch.zeros(5, 2, dtype=torch.bool))
    >>> y.shape, h.shape
    (torch.Size([5, 2, 4]), torch.Size([1, 2, 4]))
    """

    _torch = nn.GRU

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _no_projection(kwargs)
        super().__init__("GRU", *args, **kwargs)
        self._prepare()


def _no_projection(options: dict[str, Any]) -> None:
    if "proj_size" in options:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")


def _state_names(states: Any) -> list[str]:
    return ["hx"] if len(states) == 1 else [f"hx[{n}]" for n in range(len(states))]


def _check_order(name: str, input: PackedSequence) -> None:
    """What torch itself does not look at before it reads."""
    for what, given in input._asdict().items():
        if not isinstance(given, Tensor) and (given is not None or not what.endswith("indices")):
            raise TypeError(
                f"{name}: {what} of the PackedSequence is a {type(given).__name__}; expected a tensor. Use "
                "torch.nn.utils.rnn.pack_padded_sequence, which makes all four."
            )
        if given is not None and what.endswith("indices") and given.device != input.data.device:
            raise ValueError(
                f"{name}: {what} of the PackedSequence is on {given.device}; expected {input.data.device}, where its "
                "data is. PackedSequence.to moves all of them."
            )


def _checked_sizes(name: str, data: Tensor, sizes: Tensor) -> Tensor:
    """batch_sizes, to be read by anyone."""
    if sizes.device.type != "cpu" or sizes.dtype != torch.int64 or sizes.dim() != 1:
        raise ValueError(
            f"{name}: batch_sizes of the PackedSequence is {sizes.dtype} of shape {tuple(sizes.shape)} on "
            f"{sizes.device}; expected int64 of one dimension on the CPU. Use torch.nn.utils.rnn.pack_padded_sequence."
        )
    sizes = gate.values(name, "batch_sizes", sizes)
    rows = data.shape[0] if data.dim() else 0
    given = sizes.tolist()
    if not given or given[-1] < 1 or sum(given) != rows or given != sorted(given, reverse=True):
        raise ValueError(
            f"{name}: batch_sizes of the PackedSequence is {given}; expected how many rows live at each step: at least "
            f"1, never more than before, {rows} in all, as its data has. Use torch.nn.utils.rnn.pack_padded_sequence."
        )
    return sizes


def _step(module: Any, cell: str, input: Any, hx: Any) -> Any:
    """One step of a cell module; None where torch.nn's own code must run."""
    out = None if torch.compiler.is_compiling() else _fast_step(module, cell, input, hx)
    return _general_step(module, cell, input, hx) if out is None else out


@lru_cache
def _step_settings(cell: str, bias: bool) -> fast.Settings:
    return fast.Settings(how=How(cell=cell, bias=bias), is_cell=True)


def _fast_step(module: Any, cell: str, input: Any, hx: Any) -> Any:
    h0, c0 = hx, None
    if CELLS[cell].cell_state and hx is not None:
        if type(hx) is not tuple or len(hx) != 2:
            return None
        h0, c0 = hx
    try:
        weights = private.cell_weights(module)
    except KeyError:  # parametrized
        return None
    settings = _step_settings(cell, len(weights) == 4)
    out = fast.call(settings, input, h0, c0, weights)
    if out is None:
        return None
    functional.set_route("fused")
    return out[1:] if CELLS[cell].cell_state else out[1]


def _general_step(module: Any, cell: str, input: Any, hx: Any) -> Any:
    if way := exits.exit_of(input):
        return exits.leaf(module, input, hx) if way == exits.FX else _refuse(way)
    facts = CELLS[cell]
    states = hx if facts.cell_state and isinstance(hx, tuple | list) else (hx,)
    weights = [module.weight_ih, module.weight_hh]
    H = module.hidden_size
    gates = facts.gates * H
    if module.bias_ih is not None:
        weights += [module.bias_ih, module.bias_hh]
    parameters = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: len(weights)]
    tensors = (input, *states, *weights)
    gate.check(type(module).__name__, lambda: ["input", *_state_names(states), *parameters], tensors)
    if input.dim() not in (1, 2) or input.is_nested or input.shape[-1] != module.input_size or not module.input_size:
        return _refuse("input's shape")
    single = input.dim() == 1
    expected = (H,) if single else (input.shape[0], H)
    if hx is not None:
        if len(states) != 1 + facts.cell_state:
            return _refuse("hx's type")
        if any(not isinstance(state, Tensor) or state.shape != expected for state in states):
            return _refuse("hx's shape")
    shapes = [(gates, module.input_size), (gates, H), (gates,), (gates,)][: len(weights)]
    if [w.shape for w in weights] != shapes:
        _check_weights(module, zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), shapes, strict=False))
    if input.dtype != weights[0].dtype and not torch.is_autocast_enabled(input.device.type):
        return _refuse("input's dtype")
    h0, c0 = (*states, None)[:2]
    given = [*(input, h0, c0)[: 2 + facts.cell_state], *weights]
    if why := functional.why_not(given, 0, functional.cast_dtypes(cell, given, whole=False)):
        return _refuse(why)
    return gate.call(_run_step, given, cell, input, h0, c0, weights)


def _run_step(cell: str, input: Tensor, h0: Any, c0: Any, weights: list[Tensor]) -> Any:
    single = input.dim() == 1
    at: Any = (None, None) if single else (None,)
    h0, c0 = (None if state is None else state[at] for state in (h0, c0))
    settings = how_of(cell=cell, bias=len(weights) == 4)
    _, *final = functional.run(settings, input[at], h0, c0, weights, None, None, 0.0, whole=False)
    final = [state.squeeze(0).squeeze(0) if single else state.squeeze(0) for state in final]
    return tuple(final) if settings.states == 2 else final[0]


def _check_weights(module: nn.Module, shapes: Iterable[tuple[str, tuple[int, ...]]]) -> None:
    """Raise RuntimeError for a weight of another shape than the module's sizes ask for."""
    for name, shape in shapes:
        got = tuple(getattr(module, name).shape)
        if got != shape:
            raise RuntimeError(
                f"{type(module).__name__}: {name} has shape {got}; expected {shape}, with input_size="
                f"{module.input_size} and hidden_size={module.hidden_size}. Was it replaced, pruned or sharded?"
            )


def _refuse(why: str) -> None:
    functional.set_route(f"torch.nn: {why}")


class RNNCell(exits.Scriptable, nn.RNNCell):
    """torch.nn.RNNCell on the fused kernels.

    >>> fusedrnn.torch.RNNCell(3, 4)(torch.ones(2, 3)).shape
    torch.Size([2, 4])
    """

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """As torch.nn's."""
        if self.nonlinearity not in ("tanh", "relu"):
            return super().forward(input, hx)
        out = _step(self, f"rnn_{self.nonlinearity}", input, hx)
        return super().forward(input, hx) if out is None else out


class LSTMCell(exits.Scriptable, nn.LSTMCell):
    """torch.nn.LSTMCell on the fused kernels.

    >>> h, c = fusedrnn.torch.LSTMCell(3, 4)(torch.ones(2, 3))
    >>> h.shape, c.shape
    (torch.Size([2, 4]), torch.Size([2, 4]))
    """

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """As torch.nn's."""
        out = _step(self, "lstm", input, hx)
        return super().forward(input, hx) if out is None else out


class GRUCell(exits.Scriptable, nn.GRUCell):
    """torch.nn.GRUCell on the fused kernels.

    >>> fusedrnn.torch.GRUCell(3, 4)(torch.ones(2, 3)).shape
    torch.Size([2, 4])
    """

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """As torch.nn's."""
        out = _step(self, "gru", input, hx)
        return super().forward(input, hx) if out is None else out
