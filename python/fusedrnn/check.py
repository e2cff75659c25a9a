# SPDX-License-Identifier: Apache-2.0
"""Argument checks: everything is looked at, shapes and dtypes only, before anything is written.

Every message says which operation and argument, what came, what was expected, why, and how to mend it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import arrays
from . import params as parameters
from .backends import Problem, Variant
from .cells import CELLS
from .cells.activations import ACTIVATIONS
from .cells.cell import Cell
from .errors import fail as fail
from .errors import flag as flag
from .errors import integer as integer
from .errors import number as number
from .errors import text as text
from .errors import word as word

_FLOATS = (np.dtype(np.float32), np.dtype(np.float64))
_EXTRA_AXES = (arrays.WEIGHT_HR, arrays.WEIGHT_PH, arrays.BIAS, arrays.BIAS, arrays.NORM_C, arrays.NORM_C)
_WEIGHT_AXES = dict(zip(parameters.KINDS, (arrays.WEIGHT_IH, arrays.WEIGHT_HH, arrays.BIAS, arrays.BIAS), strict=True))
_WEIGHT_AXES |= dict(zip(parameters.EXTRAS, _EXTRA_AXES, strict=True))
_WEIGHT_AXES["weight_ch"] = arrays.WEIGHT_CH


NARROW = ("h", "state", "state[0]", "dy", "tdy", "dstate", "dstate[0]", "tdstate", "tdstate[0]")  # h's units, by name


@dataclass(slots=True)
class Call:
    """A checked call: the problem, and how the user's arrays lie."""

    op: str
    cell: Cell
    problem: Problem
    dtype: np.dtype[Any]
    names: list[str]  # of the parameters, flat
    params: list[np.ndarray]
    context: np.ndarray | None
    context_params: dict[str, np.ndarray]  # of layer 0's directions; empty without a context
    batch_first: bool
    unbatched: bool
    sets: bool  # whether results have an E axis
    x_axes: str
    y_axes: str
    state_axes: str
    sources: dict[str, str]  # size letter -> the argument that it was read from
    sizes: dict[str, int] = field(init=False)  # of every axis letter

    def __post_init__(self) -> None:
        p = self.problem
        self.sizes = {"T": p.T, "E": p.E, "B": p.B, "I": p.I, "H": p.H, "L": p.L, "J": p.D * p.H, "S": p.L * p.D}
        self.sizes["K"] = 0 if self.context is None else self.context.shape[-1]
        self.sizes |= {"G": self.cell.gates * p.H, "P": p.outputs, "N": (self.cell.gates - 1) * p.H}

    @property
    def on_cuda(self) -> bool:
        """Whether the arrays are on a CUDA device."""
        return isinstance(self.params[0], arrays.DeviceArray)

    @property
    def cells_axes(self) -> str:
        """How `cells` lies."""
        return "L" + self.y_axes

    def shape(self, axes: str, narrow: bool = False) -> tuple[int, ...]:
        """The shape of an array that lies as `axes`. narrow: its H, J count h's units, which a projection makes few."""
        sizes, P = self.sizes, self.problem.outputs
        if narrow and P != sizes["H"]:
            sizes = sizes | {"H": P, "J": self.problem.D * P}
        return tuple([sizes[a] for a in axes])

    def letters(self, axes: str) -> str:
        """The same in letters, for messages: (4*H, H)."""
        p = self.problem
        words = {"G": f"{self.cell.gates}*H" if self.cell.gates > 1 else "H", "J": f"{p.D}*H" if p.D > 1 else "H"}
        words["N"] = f"{self.cell.gates - 1}*H"
        words["S"] = f"{p.D}*L" if p.D > 1 else "L"
        parts = [words.get(a, a) for a in axes]
        return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"

    def expect(
        self, name: str, array: np.ndarray, axes: str, fix: str = "", layer: int = 0, op: str | None = None
    ) -> None:
        """Fail unless the array has the shape that `axes` says."""
        if layer > 0:
            axes = axes.replace("I", "J")  # what layers above the first take in
        narrow = name.startswith(("weight_ih", "weight_hh")) or name in NARROW
        expected = self.shape(axes, narrow)
        if narrow and self.problem.outputs != self.problem.H:
            axes = axes.replace("H", "P")
        if array.shape == expected:
            return
        sizes, letters = self.sizes, self.letters(axes)
        used = [a for a in "TEBIHPLK" if a in letters]
        where = ", ".join(f"{a}={sizes[a]}" + (f" from {self.sources[a]}" if a in self.sources else "") for a in used)
        if not fix and array.ndim == 2 and array.shape[::-1] == expected:
            fix = "Did you pass its transpose?"
        fail(op or self.op, name, f"has shape {array.shape}", f"{expected} = {letters} with {where}", fix)


def is_array(op: str, name: str, value: Any) -> np.ndarray:
    """The value, if it is a plain NumPy array, or one on a CUDA device beside others there."""
    if isinstance(value, arrays.DeviceArray):
        return value  # type: ignore[return-value]  # as much of an array as is asked for here
    if not isinstance(value, np.ndarray):
        fix = f"Pass numpy.asarray({name.split('[')[0]}, dtype=numpy.float32)."
        fail(op, name, f"is {arrays.kind(value)}", "a NumPy array", fix, TypeError)
    if isinstance(value, np.matrix):
        fix = f"Pass numpy.asarray({name.split('[')[0]})."
        fail(op, name, "is a numpy.matrix, whose axes are always two", "a plain NumPy array", fix, TypeError)
    if isinstance(value, np.ma.MaskedArray):
        fix = "Masks are not read: pass lengths for padding, and .filled() arrays."
        fail(op, name, "is a masked array", "a plain NumPy array", fix, TypeError)
    return value


def numbers(op: str, name: str, value: Any, expected: str) -> np.ndarray:
    """The value as an array, from anything that NumPy reads as one."""
    try:
        return np.asarray(value)
    except (ValueError, TypeError):  # rows of several lengths
        fail(op, name, f"is {arrays.kind(value)} that is no array", expected)


def is_float(op: str, name: str, value: Any, dtype: Any = None, like: str = "x") -> np.ndarray:
    """The value, if it is a NumPy array of `dtype` (None: either we compute in) that kernels can read in place."""
    if type(value) is np.ndarray and value.dtype is dtype and value.flags.carray:  # the usual case, at no cost
        return value
    array = is_array(op, name, value)
    if isinstance(value, arrays.DeviceArray):
        return _is_device_float(op, name, value, dtype, like)  # type: ignore[no-any-return]
    if dtype is None and array.dtype not in _FLOATS:
        fix = f"Convert it: {name}.astype(numpy.float32)."
        fail(op, name, f"has dtype {_dtype(array)}", "float32 or float64 in native byte order", fix, TypeError)
    if dtype is not None and array.dtype != dtype:
        fix = f"Kernels compute in one type: convert one of them, e.g. {name}.astype(numpy.{dtype})."
        fail(op, name, f"has dtype {_dtype(array)}", f"{dtype}, the dtype of {like}", fix, TypeError)
    return is_whole(op, name, array)


def is_whole(op: str, name: str, array: np.ndarray) -> np.ndarray:
    """The array, if its elements can be read in place."""
    if isinstance(array, arrays.DeviceArray):
        return _is_device_whole(op, name, array)
    if not array.flags.aligned or any(s % array.itemsize for s in array.strides):
        fix = f"Pass {name}.copy()."
        expected = f"whole elements of {array.itemsize} bytes"
        fail(op, name, f"is not aligned (strides {array.strides} bytes)", expected, fix)
    if not array.dtype.isnative:
        fail(op, name, f"has dtype {_dtype(array)}", "native byte order", error=TypeError)
    return array


def _is_device_float(op: str, name: str, array: Any, dtype: Any, like: str) -> Any:
    if dtype is None and array.kind not in ("float16", "bfloat16", "float32", "float64"):
        fix = f"Convert it: {name}.astype(numpy.float32)."
        fail(op, name, f"has dtype {array.kind}", "float16, bfloat16, float32 or float64", fix, TypeError)
    if dtype is not None and array.dtype != dtype:
        fix = f"Kernels compute in one type: convert one of them, e.g. {name}.astype(numpy.{dtype})."
        fail(op, name, f"has dtype {array.kind}", f"{dtype}, the dtype of {like}", fix, TypeError)
    return _is_device_whole(op, name, array)


def _is_device_whole(op: str, name: str, array: Any) -> Any:
    if array.pointer % array.itemsize or any(s % array.itemsize for s in array.strides):
        fix = f"Pass {name}.copy()."
        expected = f"whole elements of {array.itemsize} bytes"
        fail(op, name, f"is not aligned (strides {array.strides} bytes)", expected, fix)
    return array


def together(op: str, x: Any, given: Sequence[tuple[str, Any]], streams: bool = True) -> None:
    """Fail unless all arrays are where x is, and on its stream."""
    on_cuda = isinstance(x, arrays.DeviceArray)
    for name, array in given:
        if array is None:
            continue
        if isinstance(array, arrays.DeviceArray) != on_cuda:
            where = "a CUDA device, as x" if on_cuda else "the host, as x"
            fix = (
                "Copy it there, e.g. cupy.asarray(a)."
                if on_cuda
                else "Copy x to the device, or the others to the host."
            )
            fail(op, name, f"is {arrays.kind(array)}", f"an array on {where}", fix, TypeError)
        if streams and on_cuda and array.stream != x.stream:
            fix = "Make one of them wait for the other, and pass arrays of one stream."
            fail(op, name, f"is on stream {array.stream}", f"{x.stream}, the stream of x", fix)
        if on_cuda and x.number is not None and array.number not in (x.number, None):
            fix = "Copy it there: a kernel reads the memory of its own device."
            fail(op, name, f"is on CUDA device {array.number}", f"{x.number}, the device of x", fix)


def _dtype(array: np.ndarray) -> str:
    return f"{array.dtype}" + ("" if array.dtype.isnative else " in foreign byte order")


def float_type(op: str, name: str, value: Any) -> np.dtype[Any]:
    """The type that is named, if it is one that we compute in."""
    try:
        found: Any = None if value is None else np.dtype(value)
    except (TypeError, ValueError):
        found = None
    if found is None or found not in _FLOATS:  # None equals float64 to NumPy
        fail(op, name, f"is {found or repr(value)}", "float32 or float64 in native byte order", error=TypeError)
    result: np.dtype[Any] = found
    return result


def limit(op: str, name: str, value: Any) -> float:
    """A clipping limit: 0 for None (off), else a positive finite number."""
    if value is None:
        return 0.0
    result = number(op, name, value)
    if not 0 < result < np.inf:
        fail(op, name, f"is {value!r}", "a finite number > 0, or None for no clipping")
    return result


def probability(op: str, name: str, value: Any) -> float:
    """A dropout probability."""
    result = number(op, name, value)
    if not 0 <= result <= 1:
        fail(op, name, f"is {value!r}", "a probability in [0, 1]")
    return result


def state_parts(op: str, name: str, cell: Cell, state: Any) -> tuple[Any, Any]:
    """A state as (h, c); c is None for cells that have none. None stays (None, None)."""
    if state is None:
        return None, None
    if not cell.cell_state:
        if isinstance(state, tuple | list):
            fix = f"Only the LSTM has c: pass {name}[0]."
            fail(op, name, f"is {arrays.kind(state)}", "one array h", fix, TypeError)
        return state, None
    if not isinstance(state, tuple | list) or len(state) != 2:
        fail(op, name, f"is {arrays.kind(state)}", "a pair (h, c)", "The LSTM's state has two parts.", TypeError)
    return state[0], state[1]


# The options that choose a variant of a cell, with what leaves it plain.
VARIANTS: dict[str, Any] = {
    "proj_size": 0,
    "peepholes": False,
    "layer_norm": False,
    "zoneout": 0.0,
    "recurrent_dropout": 0.0,
    "activations": None,
    "clip_gates": None,
}


def _equals(value: Any, plain: Any) -> bool:
    return value is plain or (type(value) is type(plain) and value == plain)


def variant(op: str, cell: str, given: Mapping[str, Any], training: bool = False) -> Variant | None:
    """Those of `given`, checked; None where all are as usual."""
    if all(_equals(given.get(name, plain), plain) for name, plain in VARIANTS.items()):
        return None
    proj_size, peepholes, layer_norm, zoneout, recurrent_dropout, activations, clip_gates = (
        given.get(name, plain) for name, plain in VARIANTS.items()
    )
    usual = ["Sigmoid", "Tanh", "Tanh"] if CELLS[cell].cell_state else ["Sigmoid", "Tanh"]
    if cell.startswith("rnn"):
        usual = ["Tanh"] if cell == "rnn_tanh" else ["Relu"]
    P = integer(op, "proj_size", proj_size, 0)
    pair = zoneout if isinstance(zoneout, tuple | list) else (zoneout, zoneout)
    if len(pair) != 2:
        fail(op, "zoneout", f"is {zoneout!r}", "a probability, or a pair of them for h and c")
    zones = [probability(op, "zoneout", p) for p in pair]
    result = Variant(
        _activations(op, activations, usual),
        P,
        flag(op, "peepholes", peepholes),
        flag(op, "layer_norm", layer_norm),
        limit(op, "clip_gates", clip_gates),
        zones[0],
        zones[1] if CELLS[cell].cell_state or P else 0.0,
        probability(op, "recurrent_dropout", recurrent_dropout),
        training,
    )
    if cell == "gru_reset_before" and (P or layer_norm):
        name = "proj_size" if P else "layer_norm"
        fail(op, name, f"is {P or True}", "none of it with reset_after=False", "The two need r after the product.")
    return None if result == Variant(_activations(op, usual, usual), training=training) else result


def _activations(op: str, given: Any, usual: list[str]) -> tuple[tuple[str, float, float], ...]:
    """Each activation as (name, alpha, beta); given as a name or with its numbers."""
    listed = usual if given is None else given
    if isinstance(listed, str) or not isinstance(listed, Sequence) or len(listed) != len(usual):
        fail(op, "activations", f"is {given!r}", f"{len(usual)} of them, as in {usual!r}")
    result = []
    by_name = {name.lower(): name for name in ACTIVATIONS}
    for one in listed:
        parts: tuple[Any, ...] = tuple(one) if isinstance(one, tuple | list) and one else (one,)
        name, numbers = parts[0], list(parts[1:])
        if not isinstance(name, str) or name.lower() not in by_name:
            fail(op, "activations", f"has {name!r}", f"one of {', '.join(ACTIVATIONS)}")
        name = by_name[name.lower()]
        known = ACTIVATIONS[name]
        if len(numbers) > 2:
            fail(op, "activations", f"has {one!r}", "a name, alpha and beta at most")
        numbers = [number(op, f"activations: {name}'s alpha and beta", value) for value in numbers]
        alpha = numbers[0] if numbers else known.alpha
        beta = numbers[1] if len(numbers) > 1 else known.beta
        if (known.condition == ">= 0" and not alpha >= 0) or (known.condition == "!= 0" and alpha == 0):
            fix = "Its slope is taken from its value, which must tell the two sides apart."
            fail(op, "activations", f"has {name} with alpha {alpha}", f"alpha {known.condition}", fix)
        result.append((name, alpha, beta))
    return tuple(result)


def call(op: str, cell_name: str, given: Mapping[str, Any]) -> tuple[Call, np.ndarray | None, np.ndarray | None]:
    """Check the arguments, by name, of a function of ops. Returns the call, and the state's two parts as they came."""
    x, state, params = given["x"], given["state"], given["params"]
    lengths, reset, context = given["lengths"], given["reset"], given["context"]
    changed = variant(op, cell_name, given, flag(op, "training", given["training"]))
    cell = CELLS[cell_name]
    if changed and changed.proj_size:
        cell = dataclasses.replace(cell, cell_state=True)
    L = integer(op, "num_layers", given["num_layers"], 1)
    bidirectional, reverse = flag(op, "bidirectional", given["bidirectional"]), flag(op, "reverse", given["reverse"])
    batch_first, recompute = flag(op, "batch_first", given["batch_first"]), flag(op, "recompute", given["recompute"])
    D = 2 if bidirectional else 1
    if changed and changed.whole_rows and recompute:
        fail(op, "recompute", "is True", "False with layer_norm", "It keeps all.")
    if reverse and bidirectional:
        fail(op, "reverse", "is True beside bidirectional=True", "one of the two", "bidirectional has both directions.")
    reset_to = word(op, "reset_to", given["reset_to"], "zero", "initial")
    if type(x) is not np.ndarray and arrays.device_array(x) is not None:
        everything = (x, state, params, lengths, reset, context)
        x, state, params, lengths, reset, context = map(arrays.on_device, everything)
    on_cuda = isinstance(x, arrays.DeviceArray)
    tokens = isinstance(x, np.ndarray | arrays.DeviceArray) and x.dtype.kind in "iu"
    if not tokens:
        x = is_float(op, "x", x)
    x_rank = x.ndim + tokens
    if x_rank not in (2, 3, 4):
        order = "B,T" if batch_first else "T,B"
        shapes = (f"({order})", "(T,)", "three") if tokens else (f"({order},I)", "(T,I)", "four")
        expected = f"{shapes[0]}, or {shapes[1]} without a batch, or {shapes[2]} axes with E weight sets"
        fail(op, "x", f"has shape {x.shape}", expected)
    h0, c0 = state_parts(op, "state", cell, state)
    if changed and changed.whole_rows and (tokens or context is not None):
        name, got = ("x", f"has dtype {x.dtype}") if tokens else ("context", "is given")
        expected = f"{'float32 or float64' if tokens else 'none'} with layer_norm"
        fix = "Tokens and contexts are not built for it: give one-hot vectors, or the context as features of x."
        fail(op, name, got, expected, fix, TypeError)
    names, flat, context_params = _flatten(op, cell_name, params, L, D, context is not None, changed)
    if tokens:
        is_whole(op, "x", x)
        for name, array in (*zip(names, flat, strict=True), *context_params.items()):
            is_array(op, name, array)
        if x_rank == 4 and not any(a.ndim == len(weight_axes(n)) for n, a in zip(names, flat, strict=True)):
            fix = "Integers without an axis of features are tokens, that is one-hot vectors; convert others."
            fail(op, "x", f"has dtype {x.dtype}", "float32 or float64, or two axes", fix, TypeError)
        dtype, like = getattr(flat[0], "dtype", None), names[0]
        if dtype == np.uint16:
            dtype = np.dtype(np.float32)
        if on_cuda or dtype not in _FLOATS:
            dtype = is_float(op, names[0], flat[0]).dtype
    else:
        dtype, like = x.dtype, "x"
    halves = [n for n, a in zip(names, flat, strict=True) if isinstance(a, np.ndarray) and a.dtype == np.uint16]
    bf16 = dtype == np.float32 and len(halves) > 0
    for name, array in (*zip(names, flat, strict=True), *context_params.items()):
        if bf16 and name.startswith("weight"):
            if is_array(op, name, array).dtype != np.uint16:
                fix = "Weights are bfloat16 all or none: see fusedrnn.params.to_bfloat16."
                fail(op, name, f"has dtype {_dtype(array)}", f"uint16, as {halves[0]} has", fix, TypeError)
        else:
            is_float(op, name, array, dtype, like)
        if array.ndim - len(weight_axes(name)) not in (0, -1):
            expected = f"{len(weight_axes(name)) - 1} axes, or {len(weight_axes(name))} with weight sets E"
            fail(op, name, f"has shape {array.shape}", expected)
    if h0 is not None:
        is_float(op, "state" if c0 is None else "state[0]", h0, dtype, like)
    if c0 is not None:
        is_float(op, "state[1]", c0, dtype, like)
    if context is not None:
        is_float(op, "context", context, dtype, like)

    if type(x) is not np.ndarray:
        others = [("state" if c0 is None else "state[0]", h0), ("state[1]", c0), ("context", context)]
        together(op, x, [*zip(names, flat, strict=True), *context_params.items(), *others])

    unbatched = x_rank == 2
    x_axes = arrays.data_axes(arrays.TOKENS if tokens else arrays.X, batch_first, unbatched, x_rank == 4)
    found = dict(zip(x_axes, x.shape, strict=True))
    sources = dict.fromkeys(x_axes, "x")
    if tokens:
        found["I"], sources["I"] = flat[0].shape[-1], names[0]
    found.setdefault("B", 1)
    if cell.state_product:
        found["H"], sources["H"] = flat[1].shape[-1], names[1]
        if changed and changed.proj_size:
            found["H"], sources["H"] = flat[0].shape[-2] // cell.gates, names[0]
    else:
        found["H"], sources["H"] = flat[0].shape[-2] // cell.gates, names[0]
    if h0 is not None and h0.ndim >= 2 and not (changed and changed.proj_size):
        found["H"], sources["H"] = h0.shape[-1], "state"
    lengths = None if lengths is None else _lengths(op, lengths)
    reset = None if reset is None else _reset(op, reset)

    # The E axis: wherever an array has one axis more than it must.
    state_rank = 2 if unbatched else 3
    ranked = [("x", x, 3 - tokens), *((n, a, len(weight_axes(n)) - 1) for n, a in zip(names, flat, strict=True))]
    ranked += [("state", h0, state_rank), ("state", c0, state_rank)]
    ranked += [("lengths", lengths, state_rank - 2), ("reset", reset, state_rank - 1)]
    ranked += [("context", context, state_rank - 1), *((n, a, 2) for n, a in context_params.items())]
    for name, array, rank in ranked:
        if array is not None and array.ndim == rank + 1 and "E" not in found:
            lies = x_axes if name == "x" else _with_sets(name, batch_first, unbatched)
            found["E"], sources["E"] = array.shape[lies.index("E")], name
    sets = "E" in found
    found.setdefault("E", 1)
    if context is not None:
        found["K"], sources["K"] = context.shape[-1] if context.ndim else 0, "context"
    for letter, fix in (("I", "x has no features."), ("H", ""), ("E", ""), ("K", "")):
        if letter not in found:
            continue
        if found[letter] < 1:
            fail(op, sources[letter], f"has {letter}={found[letter]}", f"{letter} >= 1", fix)

    problem = Problem(
        cell_name,
        T=found["T"],
        E=found["E"],
        B=found["B"],
        I=found["I"],
        H=found["H"],
        L=L,
        D=D,
        reverse=reverse,
        reset_to_initial=reset_to == "initial",
        recompute=recompute,
        bf16_weights=bf16,
        clip_cell=limit(op, "clip_cell", given.get("clip_cell")),
        clip_grad=limit(op, "clip_grad", given["clip_grad"]),
        dropout=probability(op, "dropout", given["dropout"]),
        seed=integer(op, "seed", given["seed"], 0, 2**64 - 1),
        variant=changed,
    )
    result = Call(
        op,
        cell,
        problem,
        dtype,
        names,
        flat,
        context,
        context_params,
        batch_first,
        unbatched,
        sets,
        x_axes,
        y_axes=arrays.data_axes(arrays.Y, batch_first, unbatched, sets),
        state_axes=arrays.data_axes(arrays.STATE, False, unbatched, sets),
        sources=sources,
    )
    for n, (name, array) in enumerate(zip(names, flat, strict=True)):
        axes = weight_axes(name)
        layer = n // (D * (len(names) // (L * D)))
        result.expect(name, array, axes if array.ndim == len(axes) else axes[1:], layer=layer)
    for name, array in context_params.items():
        axes = weight_axes(name)
        result.expect(name, array, axes if array.ndim == len(axes) else axes[1:])
    if context is not None:
        axes = arrays.data_axes(arrays.CONTEXT, False, unbatched, sets)
        shared = axes.replace("E", "")
        fix = "The context is one vector for each row, the same at every step."
        result.expect("context", context, shared if context.ndim == len(shared) else axes, fix)
    for name, part in (("state" if c0 is None else "state[0]", h0), ("state[1]", c0)):
        if part is not None:
            axes = arrays.data_axes(arrays.STATE, False, unbatched, sets)
            shared = axes.replace("E", "")
            fix = "States lie as (layers * directions, B, H), also with batch_first." if batch_first else ""
            result.expect(name, part, shared if part.ndim == len(shared) else axes, fix)
    if lengths is not None:
        problem.lengths = _placed(result, "lengths", lengths, arrays.LENGTHS)
        host = isinstance(lengths, np.ndarray)  # on a device nothing waits for them: kernels clamp them to 0..T
        if host and lengths.size and (lengths.min() < 0 or lengths.max() > problem.T):
            got = f"lie in [{lengths.min()}, {lengths.max()}]"
            fail(op, "lengths", got, f"0 <= lengths <= T={problem.T}", "Lengths count time steps of x.")
    if reset is not None:
        problem.reset = _placed(result, "reset", reset, arrays.RESET)
    if tokens and not on_cuda:  # on a device nothing waits for them: kernels take zeros for what is out of range
        _in_range(result, x, arrays.view(x, x_axes, arrays.TOKENS, problem.E))
    return result, h0, c0


@functools.cache
def weight_axes(name: str) -> str:
    """The canonical axes of a parameter."""
    return _WEIGHT_AXES[name.partition("_l")[0]]


def _with_sets(name: str, batch_first: bool, unbatched: bool) -> str:
    """How an argument lies when it has an E axis."""
    if name == "state":
        return arrays.data_axes(arrays.STATE, False, unbatched, True)
    if name == "context":
        return arrays.data_axes(arrays.CONTEXT, False, unbatched, True)
    if name in ("lengths", "reset"):
        return arrays.data_axes(getattr(arrays, name.upper()), batch_first, unbatched, True)
    return weight_axes(name)


def _placed(result: Call, name: str, array: np.ndarray, canonical: str) -> Any:
    """lengths or reset as its canonical view, its shape checked."""
    full = arrays.data_axes(canonical, result.batch_first, result.unbatched, result.sets)
    shared = full.replace("E", "")
    axes = shared if array.ndim == len(shared) else full
    result.expect(name, array, axes)
    return arrays.view(array, axes, canonical, result.problem.E)


def _in_range(result: Call, x: np.ndarray, tokens: np.ndarray) -> None:
    """Fail unless every token (T,E,B) of a step that is run says which of the I inputs is 1."""
    problem = result.problem
    if not x.size or (x.min() >= 0 and x.max() < problem.I):
        return
    wrong = (tokens < 0) | (tokens >= problem.I)
    if problem.lengths is not None:
        wrong &= np.arange(problem.T)[:, None, None] < problem.lengths
    if wrong.any():
        t, e, b = (int(i) for i in np.argwhere(wrong)[0])
        where = f"step {t}, row {b}" + (f", set {e}" if result.sets else "")
        expected = f"0 <= token < {problem.I}, the inputs of {result.sources['I']}"
        fix = "Integers stand for one-hot vectors."
        fail(result.op, "x", f"has token {tokens[t, e, b]} (at {where})", expected, fix)


def _lengths(op: str, lengths: Any) -> Any:
    if isinstance(lengths, arrays.DeviceArray):
        if lengths.kind != "int64":
            fail(op, "lengths", f"has dtype {lengths.kind}", "int64 on a CUDA device", "Convert it.", TypeError)
        return lengths
    array = numbers(op, "lengths", lengths, "integers")
    if array.dtype.kind not in "iu" and (array.size or array.dtype != np.float64):  # an empty list is float64
        fail(op, "lengths", f"is {arrays.kind(lengths)}", "integers", "Lengths count time steps.", TypeError)
    return array.astype(np.int64)


def _reset(op: str, reset: Any) -> Any:
    if isinstance(reset, arrays.DeviceArray):
        if reset.kind not in ("bool", "uint8"):
            fail(op, "reset", f"has dtype {reset.kind}", "bool or uint8", "Convert it: reset.astype(bool).", TypeError)
        return reset.as_bytes()
    array = numbers(op, "reset", reset, "a mask of dtype bool or uint8")
    if array.dtype not in (np.dtype(bool), np.dtype(np.uint8)):
        fix = "Convert it: reset.astype(bool)."
        fail(op, "reset", f"is {arrays.kind(reset)}", "a mask of dtype bool or uint8", fix, TypeError)
    return array


def _flatten(
    op: str, cell: str, params: Any, L: int, D: int, context: bool, variant: Variant | None
) -> tuple[list[str], list[np.ndarray], dict[str, np.ndarray]]:
    """Parameters as names and arrays, flat in torch.nn's order, and those of the context."""
    options: dict[str, Any] = {}
    if variant:
        options = {name: getattr(variant, name) for name in ("proj_size", "peepholes", "layer_norm")}
    extra = parameters.context_names(D == 2) if context else []
    if isinstance(params, Mapping):
        bias = "bias_ih_l0" in params or "bias_hh_l0" in params
        named = min(L, len(params) + 1)  # one of these lacks a name, or all are there
        own = parameters.names(named, D == 2, bias, cell, **options)
        wanted = own + extra
        given = list(params)
        if given != wanted:
            for name in wanted:
                if name not in params:
                    fix = "Biases come both or not at all." if name not in extra else "It belongs to context."
                    fail(op, "params", f"has no {name}", f"all of {', '.join(wanted)}", fix)
            for name in given:
                if name not in wanted:
                    fix = f"num_layers={L} and bidirectional={D == 2} say how many there are."
                    if name.startswith("weight_ch"):
                        fix = "It belongs to a context: pass context=."
                    fail(op, "params", f"has {name!r}", f"only {', '.join(wanted)}", fix)
        return own, [params[name] for name in own], {name: params[name] for name in extra}
    if not isinstance(params, Sequence) or isinstance(params, str):
        fix = "fusedrnn.params.init makes new ones."
        expected = "a dict under torch.nn's names or a flat list in its order"
        fail(op, "params", f"is {arrays.kind(params)}", expected, fix, TypeError)
    with_bias, without = (len(parameters.kinds(cell, bias, **options)) * L * D + len(extra) for bias in (True, False))
    if len(params) not in (with_bias, without):
        expected = f"{with_bias} arrays (with biases) or {without} (without) for num_layers={L}, {D} direction(s)"
        if extra:
            expected += f", the last {len(extra)} for context"
        fail(op, "params", f"has {len(params)} arrays", expected)
    own = parameters.names(L, D == 2, len(params) == with_bias, cell, **options)
    return own, list(params[: len(own)]), dict(zip(extra, params[len(own) :], strict=True))
