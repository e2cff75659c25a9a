# SPDX-License-Identifier: Apache-2.0
"""Recurrent layers as functions of tensors, for modules of your own. Weights are ordinary tensors, taken at each call:
tied, generated, non-contiguous, normed or dropped out; nothing is flattened, nothing kept.

Shapes are torch.nn's; for lengths, reset and cells see fusedrnn.ops. For ensembles use torch.vmap: one kernel call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypedDict, TypeVar, Unpack, get_type_hints

import torch
from torch import Tensor
from torch.nn.functional import dropout as draw

from ..cells import CELLS
from ..cells.cell import Cell
from . import composite, cuda, exits, gate, onnx_nodes, operators
from .how import How, how_of, names
from .kernels import DTYPES, Sizes, argument_shapes
from .private import any_requires_grad, pack_padded, pad_packed, transforms_active, watched

_Function = TypeVar("_Function", bound=Callable[..., Any])

_ONEDNN = torch.backends.mkldnn.is_available()
_route = "none: nothing ran yet"


def route() -> str:
    """Which road the last eager call took (in any thread): "fused", "torch.nn: why", "torch.nn.functional: why",
    "torch operators: why", or "ONNX nodes: torch.onnx.export".

    Under torch.compile it tells the road taken while tracing.

    >>> fusedrnn.torch.LSTM(3, 4)(torch.ones(5, 2, 3))[0].shape, fusedrnn.torch.route()
    (torch.Size([5, 2, 4]), 'fused')
    """
    return _route


def set_route(text: str) -> None:
    """For the modules of this package."""
    global _route
    _route = text


def why_not(tensors: Sequence[Tensor | None], proj_size: int = 0, dtypes: Sequence[Any] | None = None) -> str:
    """Why the kernels cannot take these tensors; "" if they can. dtypes: those that `autocast` will give them."""
    first = next(tensor for tensor in tensors if tensor is not None)
    if first.device.type == "cuda":
        if why := cuda.why_not() or (proj_size and "no kernels for proj_size on cuda"):
            return why
    elif first.device.type not in ("cpu", "meta"):
        return f"no kernels for {first.device.type}"
    dtypes = [None if t is None else t.dtype for t in tensors] if dtypes is None else dtypes
    common = next(dtype for dtype in dtypes if dtype is not None)
    for tensor, dtype in zip(tensors, dtypes, strict=True):
        if tensor is None:
            continue
        if dtype not in DTYPES:
            return f"no kernels for {dtype}"
        if dtype != common or tensor.device != first.device:
            return "tensors differ in dtype or device"
        if tensor.layout != torch.strided:
            return f"no kernels for {tensor.layout}"
    if torch.compiler.is_compiling() or gate.is_plain(*tensors) or watched():
        return ""
    return next((f"no kernels for {type(t).__name__}" for t in tensors if gate.is_foreign(t)), "")


def by_onednn(cell: str, x: Tensor, whole: bool) -> bool:
    """Whether autocast is on and torch has oneDNN run this: an LSTM over a padded batch, not trained on float16."""
    if x.device.type != "cpu" or not (_ONEDNN and whole and cell == "lstm" and torch.is_autocast_enabled("cpu")):
        return False
    return not (x.dtype == torch.float16 and torch.is_grad_enabled())


def cast_dtypes(cell: str, tensors: Sequence[Tensor | None], whole: bool) -> list[Any]:
    """The dtypes in which torch.nn would have x, the states and the weights under torch.autocast, if it is on.

    On a CPU only the products of torch.nn are in autocast's dtype. A GRU and an LSTM add them to a state, which stays
    in its own dtype if that is wider, and so do all results. Where oneDNN runs it, all of it is cast. whole: a padded
    batch, all of it in one call.
    """
    x = next(tensor for tensor in tensors if tensor is not None)
    kind = x.device.type
    dtypes = [None if t is None else t.dtype for t in tensors]
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return dtypes
    out = torch.get_autocast_dtype(kind)
    added = CELLS[cell].gates > 1  # products are added to a state
    if kind == "cpu" and added and not (by_onednn(cell, x, whole) or torch.float64 in dtypes):
        last = tensors[1 + CELLS[cell].cell_state]
        out = torch.promote_types(out, x.dtype if last is None else last.dtype)
    return [out if d is not None and d.is_floating_point and d != torch.float64 else d for d in dtypes]


def autocast(cell: str, tensors: Sequence[Tensor | None], whole: bool) -> list[Any]:
    """The tensors in the dtypes of `cast_dtypes`; x and weights rounded to autocast's, as for torch.nn's products."""
    kind = next(tensor for tensor in tensors if tensor is not None).device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return list(tensors)
    rounded = torch.get_autocast_dtype(kind)
    states = range(1, 2 + CELLS[cell].cell_state)

    def cast(n: int, t: Tensor | None, dtype: Any) -> Tensor | None:
        if t is None or not t.is_floating_point() or t.dtype == torch.float64:
            return t
        return t.to(dtype) if n in states else t.to(rounded).to(dtype)

    dtypes = cast_dtypes(cell, tensors, whole)
    return [cast(n, t, dtype) for n, (t, dtype) in enumerate(zip(tensors, dtypes, strict=True))]


def run(
    settings: How,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    dropout: float,
    sizes: Tensor | None = None,
    whole: bool = True,
) -> tuple[Tensor, ...]:
    """All results of a stack, from x (T,B,I) and the rest without an axis E. Dropout: drawn as torch.nn draws it.
    sizes: the batch_sizes of an x that was packed; whole: as `autocast` has it."""
    states = (h0, c0) if settings.states == 2 else (h0,)
    if way := exits.exit_of(x):
        set_route(f"{'torch operators' if way == exits.TRACE else 'ONNX nodes'}: {way}")
        if way == exits.TRACE:
            return exits.record(settings, x, states, weights, (lengths, reset), dropout)
        return onnx_nodes.write(settings, x, states, weights, lengths, reset)
    tensors = autocast(settings.cell, (x, *states, *weights), whole)
    if settings.proj_size:
        settings = settings.but(recompute=False)  # the engine of projections always keeps all
    if (why := why_not(tensors, settings.proj_size)) == "":
        set_route("fused")
        grad = torch.is_grad_enabled() and (
            not torch.compiler.is_exporting()
            if torch.compiler.is_compiling()
            else transforms_active() or any_requires_grad(*tensors)
        )
        settings = settings.but(tape=grad)
        call: Any = operators.call
    else:
        set_route(f"torch operators: {why}")
        call = composite.forward
    p = [None if t is None else t.unsqueeze(1) for t in tensors[: 1 + len(states)]]
    p += [t.unsqueeze(0) for t in tensors[1 + len(states) :]]
    lengths = None if lengths is None else lengths.unsqueeze(0)
    reset = None if reset is None else reset.unsqueeze(1)
    if settings.layers > 1 and (dropout or settings.weights > operators.MOST_WEIGHTS):
        results = _layers(call, settings, lengths, reset, p, dropout, sizes)
    else:
        results = call(settings, lengths, reset, p)
    return tuple(result.squeeze(axis) for result, axis in zip(results, settings.result_axes, strict=True))


def _layers(
    call: Any, settings: How, lengths: Any, reset: Any, p: list[Any], dropout: float, sizes: Tensor | None
) -> tuple[Tensor, ...]:
    """Layer by layer, with dropout between: its random numbers, vmap's randomness and compile are
    torch's own affair. torch.nn draws no numbers for the padding of a packed x."""
    one = settings.but(layers=1)
    y, states, weights = p[0], p[1 : 1 + settings.states], p[1 + settings.states :]
    kept: list[Any] = []
    for layer in range(settings.layers):
        if layer and dropout:
            y = draw(y, dropout, True) if sizes is None else _draw_packed(y, dropout, lengths, sizes)
        rows = slice(layer * settings.directions, (layer + 1) * settings.directions)
        part = weights[layer * one.weights : (layer + 1) * one.weights]
        y, *rest = call(one, lengths, reset, [y, *(None if s is None else s[rows] for s in states), *part])
        kept.append(rest)
    return (y, *(torch.cat(parts) for parts in zip(*kept, strict=True)))


def _draw_packed(y: Tensor, dropout: float, lengths: Tensor, sizes: Tensor) -> Tensor:
    packed = pack_padded(y.squeeze(1), lengths[0])
    padded: Tensor = pad_packed(draw(packed, dropout, True), sizes)[0]
    return padded.unsqueeze(1)


def mask(name: str, given: Any, T: int, B: int, batch_first: bool, x: Tensor) -> Tensor:
    """reset as (T,B), checked."""
    reset = _read(name, "reset", given).to(x.device)
    expected = (B, T) if batch_first else (T, B)
    if tuple(reset.shape) != expected:
        axes = "(B, T)" if batch_first else "(T, B)"
        raise ValueError(f"{name}: reset has shape {tuple(reset.shape)}; expected {expected} = {axes}, as x has it")
    if reset.dtype not in (torch.bool, torch.uint8):
        reset = reset.ne(0)
    return reset.t() if batch_first else reset


def _read(door: str, name: str, given: Any) -> Tensor:
    """A tensor of what was given, which other operators may read."""
    tensor = torch.as_tensor(given)
    gate.check(door, lambda: [name], (tensor,))
    return tensor


def counts(name: str, given: Any, B: int, x: Tensor) -> Tensor:
    """lengths as int64 (B,), checked (their values: where they are used)."""
    lengths = _read(name, "lengths", given)
    if lengths.is_floating_point() or lengths.is_complex() or lengths.is_quantized or lengths.dtype == torch.bool:
        raise TypeError(f"{name}: lengths has dtype {lengths.dtype}; expected integers, one for each row")
    if tuple(lengths.shape) != (B,):
        raise ValueError(
            f"{name}: lengths has shape {tuple(lengths.shape)}; expected {(B,)} = (B,), one for each row of x"
        )
    return lengths.to(x.device, torch.int64)


class Options(TypedDict, total=False):
    """What lstm, gru and rnn take. Every one has its default in `_DEFAULTS`."""

    num_layers: int
    bidirectional: bool
    reverse: bool
    batch_first: bool
    lengths: Any
    reset: Any
    reset_to: str
    dropout: float
    training: bool
    clip_grad: float | None
    recompute: bool
    return_cells: bool


class LSTMOptions(Options, total=False):
    """What lstm takes."""

    clip_cell: float | None


_DEFAULTS: LSTMOptions = {
    "num_layers": 1,
    "bidirectional": False,
    "reverse": False,
    "batch_first": False,
    "lengths": None,
    "reset": None,
    "reset_to": "zero",
    "dropout": 0.0,
    "training": True,
    "clip_cell": None,
    "clip_grad": None,
    "recompute": False,
    "return_cells": False,
}


def _takes(known: Any) -> Callable[[_Function], _Function]:
    """The options of a function in its signature, where `help` and editors look for them."""

    def spell_out(function: Any) -> Any:
        own = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
        types = get_type_hints(known)
        options = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=types[name])
            for name, default in _DEFAULTS.items()
            if name in types
        ]
        function.__signature__ = inspect.Signature([*own, *options], return_annotation=Any)
        return function

    return spell_out


@_takes(LSTMOptions)
def lstm(
    x: Tensor,
    state: tuple[Tensor, Tensor] | None = None,
    params: Mapping[str, Tensor] | Sequence[Tensor] = (),
    **options: Unpack[LSTMOptions],
) -> Any:
    """Run an LSTM: (y, (h, c)), or (y, (h, c), cells) with return_cells. The arguments are those of fusedrnn.lstm.

    params: tensors by torch.nn's names (weight_ih_l0, ...) or in torch.nn's order; with weight_hr_l0 (P,H), ... h has P
    units, as with torch.nn's proj_size (recompute then has no effect). dropout acts while `training`, with torch's
    random numbers.

    >>> layer = torch.nn.LSTM(3, 4)
    >>> y, (h, c) = fusedrnn.torch.lstm(torch.ones(5, 2, 3), None, dict(layer.named_parameters()))
    >>> y.shape, c.shape
    (torch.Size([5, 2, 4]), torch.Size([1, 2, 4]))
    """
    return _function("lstm", "lstm", x, state, params, options)


@_takes(Options)
def gru(
    x: Tensor,
    state: Tensor | None = None,
    params: Mapping[str, Tensor] | Sequence[Tensor] = (),
    *,
    reset_after: bool = True,
    **options: Unpack[Options],
) -> Any:
    """Run a GRU; reset_after as in fusedrnn.gru, all else as in `lstm`; the state is one tensor h."""
    return _function("gru", "gru" if reset_after else "gru_reset_before", x, state, params, options)


@_takes(Options)
def rnn(
    x: Tensor,
    state: Tensor | None = None,
    params: Mapping[str, Tensor] | Sequence[Tensor] = (),
    *,
    nonlinearity: str = "tanh",
    **options: Unpack[Options],
) -> Any:
    """Run a vanilla RNN with nonlinearity "tanh" or "relu"; all else as in `lstm`; the state is one tensor h."""
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f'rnn: nonlinearity is {nonlinearity!r}; expected "tanh" or "relu"')
    return _function("rnn", f"rnn_{nonlinearity}", x, state, params, options)


def _flat(name: str, facts: Cell, params: Any, num_layers: int, directions: int) -> list[Tensor]:
    stacks, projects = num_layers * directions, facts.cell_state
    if isinstance(params, Mapping):
        expected = names(num_layers, directions, "bias_ih_l0" in params, projects and "weight_hr_l0" in params)
        if set(expected) != set(params):
            raise ValueError(f"{name}: params has {', '.join(params)}; expected {', '.join(expected)}")
        return [params[key] for key in expected]
    if len(params) not in [n * stacks for n in ((2, 3, 4, 5) if projects else (2, 4))]:
        more = f" (with weight_hr {5 * stacks} or {3 * stacks})" if projects else ""
        raise ValueError(
            f"{name}: params has {len(params)} tensors; expected {4 * stacks}, or {2 * stacks} without biases{more}, "
            f"for num_layers={num_layers} and {directions} direction(s)"
        )
    return list(params)


def _function(name: str, cell: str, x: Tensor, state: Any, params: Any, options: Mapping[str, object]) -> Any:
    facts = CELLS[cell]
    for key in options:
        if key not in _DEFAULTS or (key == "clip_cell" and not facts.cell_state):
            raise TypeError(f"{name}() got an unexpected keyword argument {key!r}")
    given: dict[str, Any] = {**_DEFAULTS, **options}
    directions = 2 if given["bidirectional"] else 1
    weights = _flat(name, facts, params, given["num_layers"], directions)
    if given["reset_to"] not in ("zero", "initial"):
        raise ValueError(f'{name}: reset_to is {given["reset_to"]!r}; expected "zero" or "initial"')
    if given["reverse"] and directions == 2:
        raise ValueError(f"{name}: reverse is set; expected one direction with it, but bidirectional is set too")
    if x.dim() not in (2, 3):
        raise ValueError(f"{name}: x has {x.dim()} dimensions; expected 3, or 2 without a batch")
    per_layer = len(weights) // (given["num_layers"] * directions)
    settings = how_of(
        cell=cell,
        layers=given["num_layers"],
        directions=directions,
        bias=per_layer >= 4,
        reverse=given["reverse"],
        reset_to_initial=given["reset_to"] == "initial",
        recompute=given["recompute"],
        clip_cell=float(given["clip_cell"] or 0),
        clip_grad=float(given["clip_grad"] or 0),
        cells=given["return_cells"],
        proj_size=int(weights[per_layer - 1].shape[0]) if per_layer % 2 else 0,
    )
    if not torch.compiler.is_compiling():
        operators.make_operators(settings.states, settings.weights)
    parts = (state if facts.cell_state else (state,)) if state is not None else (None, None)
    if facts.cell_state and not (isinstance(parts, tuple | list) and len(parts) == 2):
        raise TypeError(f"{name}: state is a {type(state).__name__}; expected a pair (h, c)")
    h0, c0 = (*parts, None)[:2]
    _check(name, x, h0, c0, weights, settings, given["batch_first"])
    tensors = (x, h0, c0, *weights)
    gate.check(name, lambda: ["x", "h", "c", *settings.weight_names], tensors)
    rest = given["batch_first"], given["lengths"], given["reset"], given["dropout"] * given["training"]
    return gate.call(batched, tensors, name, settings, x, h0, c0, weights, *rest)


def _check(name: str, x: Tensor, h0: Any, c0: Any, weights: Any, settings: How, batch_first: bool) -> None:
    P = settings.proj_size
    source = "weight_hr_l0" if P else "weight_hh_l0"
    H = weights[settings.per_layer - 1 if P else 1].shape[-1]
    rows = x.shape[0 if batch_first else 1] if x.dim() == 3 else None
    S = settings.layers * settings.directions
    for what, given, units in (("h", h0, P or H), ("c", c0, H)):
        state = (S, units) if rows is None else (S, rows, units)
        if given is not None and tuple(given.shape) != state:
            raise ValueError(
                f"{name}: {what} of state has shape {tuple(given.shape)}; expected {state}, from x and params"
            )
    shapes = weight_shapes(settings, x.shape[-1], H)
    for key, weight, shape in zip(settings.weight_names, weights, shapes, strict=True):
        if tuple(weight.shape) != shape:
            raise ValueError(
                f"{name}: {key} has shape {tuple(weight.shape)}; expected {shape}, with I={x.shape[-1]} from x "
                f"and H={H} from {source}"
            )


def weight_shapes(settings: How, I: Any, H: Any) -> tuple[tuple[int, ...], ...]:  # noqa: E741
    """Of all weights, in order."""
    # torch.compile looks through caches; symbolic sizes are no keys
    known = not torch.compiler.is_compiling() and type(I) is type(H) is int
    return _shapes(settings, I, H) if known else _make_shapes(settings, I, H)


def _make_shapes(settings: How, I: Any, H: Any) -> tuple[tuple[int, ...], ...]:  # noqa: E741
    shapes = argument_shapes(settings, Sizes(1, 1, 1, I, H))
    return tuple([shape[1:] for shape in shapes[1 + settings.states :]])


_shapes = lru_cache(maxsize=1024)(_make_shapes)


def batched(
    name: str,
    settings: How,
    x: Tensor,
    h0: Any,
    c0: Any,
    weights: Sequence[Tensor],
    batch_first: bool,
    lengths: Any,
    reset: Any,
    dropout: float,
) -> Any:
    """`run` on torch.nn's shapes: with or without a batch axis, batch first or not."""
    single = x.dim() == 2
    if single:
        x = x.unsqueeze(1)
        h0, c0 = (None if s is None else s.unsqueeze(1) for s in (h0, c0))
        batch_first = False
    elif batch_first:
        x = x.transpose(0, 1)
    T, B = x.shape[0], x.shape[1]
    if lengths is not None:
        lengths = torch.as_tensor(lengths)
        lengths = counts(name, lengths.reshape(1) if single and lengths.dim() == 0 else lengths, B, x)
    if reset is not None:
        reset = torch.as_tensor(reset)
        reset = mask(name, reset.unsqueeze(1) if single and reset.dim() == 1 else reset, T, B, batch_first, x)
    y, *state = run(settings, x, h0, c0, weights, lengths, reset, dropout)
    cells = state.pop() if settings.cells else None
    if single:
        y, state = y.squeeze(1), [s.squeeze(1) for s in state]
        cells = None if cells is None else cells.squeeze(2)
    elif batch_first:
        y = y.transpose(0, 1)
        cells = None if cells is None else cells.transpose(1, 2)
    final = tuple(state) if settings.states == 2 else state[0]
    return (y, final) if cells is None else (y, final, cells)
