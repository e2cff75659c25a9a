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
from .cells.cell import Cell
from .errors import fail as fail
from .errors import flag as flag
from .errors import integer as integer
from .errors import limit as limit
from .errors import number as number
from .errors import probability as probability
from .errors import text as text
from .errors import word as word
from .options import Settings
from .variants import variant

_FLOATS = (np.dtype(np.float32), np.dtype(np.float64))
_EXTRA_AXES = (arrays.WEIGHT_HR, arrays.WEIGHT_PH, arrays.BIAS, arrays.BIAS, arrays.NORM_C, arrays.NORM_C)
_WEIGHT_AXES = dict(zip(parameters.KINDS, (arrays.WEIGHT_IH, arrays.WEIGHT_HH, arrays.BIAS, arrays.BIAS), strict=True))
_WEIGHT_AXES |= dict(zip(parameters.EXTRAS, _EXTRA_AXES, strict=True))
_WEIGHT_AXES["weight_ch"] = arrays.WEIGHT_CH
_kinds = functools.lru_cache(64)(parameters.kinds)
_names = functools.lru_cache(64)(parameters.names)  # small calls ask for the same ones again and again

NARROW = ("h", "state", "state[0]", "dy", "tdy", "dstate", "dstate[0]", "tdstate", "tdstate[0]")  # h's units, by name


@dataclass(slots=True)
class Call:
    """A call on its way through the checks: what came, and what each of the four steps of `call` finds out."""

    op: str
    cell: Cell
    variant: Variant | None
    batch_first: bool
    L: int
    D: int
    # the arrays, by the first step
    x: Any
    h0: Any
    c0: Any
    lengths: Any
    reset: Any
    context: Any
    tokens: bool = False
    names: list[str] = field(init=False)  # of the parameters, flat
    params: list[Any] = field(init=False)
    context_params: dict[str, Any] = field(init=False)  # of layer 0's directions; empty without a context
    dtype: np.dtype[Any] = field(init=False)
    bf16: bool = False  # whether the weights are bfloat16
    # how they lie, by the second
    unbatched: bool = False
    sets: bool = False  # whether results have an E axis
    x_axes: str = ""
    y_axes: str = ""
    state_axes: str = ""
    sizes: dict[str, int] = field(default_factory=dict)  # of every axis letter
    sources: dict[str, str] = field(default_factory=dict)  # size letter -> the argument that it was read from
    # by the third
    problem: Problem = field(init=False)

    @property
    def on_cuda(self) -> bool:
        """Whether the arrays are on a CUDA device."""
        return isinstance(self.x, arrays.DeviceArray)

    @property
    def named(self) -> list[tuple[str, Any]]:
        """All parameters with their names."""
        return [*zip(self.names, self.params, strict=True), *self.context_params.items()]

    @property
    def states(self) -> list[tuple[str, Any]]:
        """h and c, where they are given, as messages call them."""
        parts = ("state" if self.c0 is None else "state[0]", self.h0), ("state[1]", self.c0)
        return [(name, part) for name, part in parts if part is not None]

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

    def expect_data(self, name: str, array: Any, canonical: str, fix: str = "") -> str:
        """The same for what comes with x, with or without the E axis. Returns how the array lies."""
        axes = arrays.data_axes(canonical, self.batch_first, self.unbatched, self.sets)
        shared = axes.replace("E", "")
        axes = shared if array.ndim == len(shared) else axes
        self.expect(name, array, axes, fix)
        return axes


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


def call(op: str, cell_name: str, x: Any, state: Any, params: Any, *, options: Settings) -> Call:
    """Check a call of the function `op` of ops, in four steps: arrays, sizes, problem, shapes."""
    changed = _switches(op, cell_name, options)
    cell = CELLS[cell_name]
    if changed and changed.proj_size:
        cell = dataclasses.replace(cell, cell_state=True)
    result = _arrays(op, cell, x, state, params, options=options, changed=changed)
    _ranks_and_sizes(result)
    _problem(result, options)
    _shapes(result)
    return result


def _switches(op: str, cell_name: str, options: Settings) -> Variant | None:
    """The switches and numbers that the arrays are read by, put in their place; and the variant they make."""
    changed = variant(op, cell_name, options)
    options.num_layers = integer(op, "num_layers", options.num_layers, 1)
    options.bidirectional = flag(op, "bidirectional", options.bidirectional)
    options.reverse = flag(op, "reverse", options.reverse)
    options.batch_first = flag(op, "batch_first", options.batch_first)
    options.recompute = flag(op, "recompute", options.recompute)
    if options.reverse and options.bidirectional:
        fail(op, "reverse", "is True beside bidirectional=True", "one of the two", "bidirectional has both directions.")
    word(op, "reset_to", options.reset_to, "zero", "initial")
    return changed


def _arrays(
    op: str, cell: Cell, x: Any, state: Any, params: Any, *, options: Settings, changed: Variant | None
) -> Call:
    """The first step: every array by name, in one place with the others, of one type, and which these are."""
    lengths, reset, context = options.lengths, options.reset, options.context
    if type(x) is not np.ndarray and arrays.device_array(x) is not None:
        everything = (x, state, params, lengths, reset, context)
        x, state, params, lengths, reset, context = map(arrays.on_device, everything)
    tokens = isinstance(x, np.ndarray | arrays.DeviceArray) and x.dtype.kind in "iu"
    if not tokens:
        x = is_float(op, "x", x)
    if x.ndim + tokens not in (2, 3, 4):
        order = "B,T" if options.batch_first else "T,B"
        shapes = (f"({order})", "(T,)", "three") if tokens else (f"({order},I)", "(T,I)", "four")
        expected = f"{shapes[0]}, or {shapes[1]} without a batch, or {shapes[2]} axes with E weight sets"
        fail(op, "x", f"has shape {x.shape}", expected)
    h0, c0 = state_parts(op, "state", cell, state)
    D = 2 if options.bidirectional else 1
    call = Call(
        op, cell, changed, options.batch_first, options.num_layers, D, x, h0, c0, lengths, reset, context, tokens
    )
    call.names, call.params, call.context_params = _flatten(call, params)
    like = "x"
    if tokens:
        like = call.names[0]
        _tokens_and_parameters(call)
    else:
        call.dtype = x.dtype
    _parameters(call, like)
    for name, array in call.states:
        is_float(op, name, array, call.dtype, like)
    if context is not None:
        is_float(op, "context", context, call.dtype, like)
    if type(x) is not np.ndarray:
        together(op, x, [*call.named, *call.states, ("context", context)])
    return call


def _tokens_and_parameters(call: Call) -> None:
    """Tokens are whole and mean tokens; the type is that of the parameters."""
    op, first = call.op, call.params[0]
    is_whole(op, "x", call.x)
    for name, array in call.named:
        is_array(op, name, array)
    pairs = zip(call.names, call.params, strict=True)
    if call.x.ndim == 3 and not any(a.ndim == len(weight_axes(n)) for n, a in pairs):
        fix = "Integers without an axis of features are tokens, that is one-hot vectors; convert others."
        fail(op, "x", f"has dtype {call.x.dtype}", "float32 or float64, or two axes", fix, TypeError)
    dtype = getattr(first, "dtype", None)
    if dtype == np.uint16:
        dtype = np.dtype(np.float32)
    if call.on_cuda or dtype not in _FLOATS:
        dtype = is_float(op, call.names[0], first).dtype
    call.dtype = dtype


def _parameters(call: Call, like: str) -> None:
    """Parameters of the call's type, or weights of bfloat16, with as many axes as they may have."""
    op = call.op
    pairs = zip(call.names, call.params, strict=True)
    half = [name for name, array in pairs if isinstance(array, np.ndarray) and array.dtype == np.uint16]
    call.bf16 = call.dtype == np.float32 and len(half) > 0
    for name, array in call.named:
        if call.bf16 and name.startswith("weight"):
            if is_array(op, name, array).dtype != np.uint16:
                fix = "Weights are bfloat16 all or none: see fusedrnn.params.to_bfloat16."
                fail(op, name, f"has dtype {_dtype(array)}", f"uint16, as {half[0]} has", fix, TypeError)
        else:
            is_float(op, name, array, call.dtype, like)
        axes = len(weight_axes(name))
        if array.ndim not in (axes, axes - 1):
            fail(op, name, f"has shape {array.shape}", f"{axes - 1} axes, or {axes} with weight sets E")


def _ranks_and_sizes(call: Call) -> None:
    """The second step: which axes the arrays have, and how long these are. Sizes are read off, not yet compared."""
    op, x, sources = call.op, call.x, call.sources
    x_rank = x.ndim + call.tokens
    call.unbatched = x_rank == 2
    call.x_axes = arrays.data_axes(
        arrays.TOKENS if call.tokens else arrays.X, call.batch_first, call.unbatched, x_rank == 4
    )
    call.sizes = found = dict(zip(call.x_axes, x.shape, strict=True))
    sources.update(dict.fromkeys(call.x_axes, "x"))
    W, R = 0, 1
    if call.tokens:
        found["I"], sources["I"] = call.params[W].shape[-1], call.names[W]
    found.setdefault("B", 1)
    projected = call.variant is not None and call.variant.proj_size > 0
    if call.cell.state_product and not projected:
        found["H"], sources["H"] = call.params[R].shape[-1], call.names[R]
    else:
        found["H"], sources["H"] = call.params[W].shape[-2] // call.cell.gates, call.names[W]
    if call.h0 is not None and call.h0.ndim >= 2 and not projected:
        found["H"], sources["H"] = call.h0.shape[-1], "state"
    call.lengths = None if call.lengths is None else _lengths(op, call.lengths)
    call.reset = None if call.reset is None else _reset(op, call.reset)
    _weight_sets(call)
    if call.context is not None:
        found["K"], sources["K"] = call.context.shape[-1] if call.context.ndim else 0, "context"
    for letter, fix in (("I", "x has no features."), ("H", ""), ("E", ""), ("K", "")):
        if letter in found and found[letter] < 1:
            fail(op, sources[letter], f"has {letter}={found[letter]}", f"{letter} >= 1", fix)
    call.y_axes = arrays.data_axes(arrays.Y, call.batch_first, call.unbatched, call.sets)
    call.state_axes = arrays.data_axes(arrays.STATE, False, call.unbatched, call.sets)


def _weight_sets(call: Call) -> None:
    """The E axis: the first array that has one axis more than it must says how long it is."""
    state_rank = 2 if call.unbatched else 3
    ranked = [("x", call.x, 3 - call.tokens)]
    ranked += [(name, array, len(weight_axes(name)) - 1) for name, array in zip(call.names, call.params, strict=True)]
    ranked += [("state", call.h0, state_rank), ("state", call.c0, state_rank)]
    ranked += [("lengths", call.lengths, state_rank - 2), ("reset", call.reset, state_rank - 1)]
    ranked += [("context", call.context, state_rank - 1), *((n, a, 2) for n, a in call.context_params.items())]
    for name, array, rank in ranked:
        if array is not None and array.ndim == rank + 1 and "E" not in call.sizes:
            lies = call.x_axes if name == "x" else _with_sets(name, call.batch_first, call.unbatched)
            call.sizes["E"], call.sources["E"] = array.shape[lies.index("E")], name
    call.sets = "E" in call.sizes
    call.sizes.setdefault("E", 1)


def _problem(call: Call, options: Settings) -> None:
    """The third step: what the backends are told, and all other sizes."""
    op, sizes, cell = call.op, call.sizes, call.cell
    call.problem = Problem(
        cell.name,
        T=sizes["T"],
        E=sizes["E"],
        B=sizes["B"],
        I=sizes["I"],
        H=sizes["H"],
        L=call.L,
        D=call.D,
        reverse=options.reverse,
        reset_to_initial=options.reset_to == "initial",
        recompute=options.recompute,
        bf16_weights=call.bf16,
        clip_cell=limit(op, "clip_cell", options.clip_cell),
        clip_grad=limit(op, "clip_grad", options.clip_grad),
        dropout=probability(op, "dropout", options.dropout),
        seed=integer(op, "seed", options.seed, 0, 2**64 - 1),
        variant=call.variant,
    )
    if not options.training:
        call.problem.dropout = 0.0
    H, G = sizes["H"], cell.gates
    sizes |= {"L": call.L, "J": call.D * H, "S": call.L * call.D, "P": call.problem.outputs}
    sizes |= {"G": G * H, "N": (G - 1) * H}
    sizes.setdefault("K", 0)


def _shapes(call: Call) -> None:
    """The last step: every array has the shape that the sizes say, and what counts steps or inputs is in range."""
    op, problem, each = call.op, call.problem, len(call.names) // call.L
    for n, (name, array) in enumerate(call.named):
        axes = weight_axes(name)
        layer = n // each if n < len(call.names) else 0
        call.expect(name, array, axes if array.ndim == len(axes) else axes[1:], layer=layer)
    if call.context is not None:
        fix = "The context is one vector for each row, the same at every step."
        call.expect_data("context", call.context, arrays.CONTEXT, fix)
    for name, part in call.states:
        fix = "States lie as (layers * directions, B, H), also with batch_first." if call.batch_first else ""
        call.expect_data(name, part, arrays.STATE, fix)
    if call.lengths is not None:
        problem.lengths = lengths = _placed(call, "lengths", call.lengths, arrays.LENGTHS)
        host = isinstance(lengths, np.ndarray)  # on a device nothing waits for them: kernels clamp them to 0..T
        if host and lengths.size and (lengths.min() < 0 or lengths.max() > problem.T):
            got = f"lie in [{lengths.min()}, {lengths.max()}]"
            fail(op, "lengths", got, f"0 <= lengths <= T={problem.T}", "Lengths count time steps of x.")
    if call.reset is not None:
        problem.reset = _placed(call, "reset", call.reset, arrays.RESET)
    if call.tokens and not call.on_cuda:  # on a device kernels take zeros for what is out of range
        _in_range(call, call.x, arrays.view(call.x, call.x_axes, arrays.TOKENS, problem.E))


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


def _placed(call: Call, name: str, array: Any, canonical: str) -> Any:
    """lengths or reset as its canonical view, its shape checked."""
    axes = call.expect_data(name, array, canonical)
    return arrays.view(array, axes, canonical, call.problem.E)


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


def _flatten(call: Call, params: Any) -> tuple[list[str], list[Any], dict[str, Any]]:
    """Parameters as names and arrays, flat in torch.nn's order, and those of the context."""
    op, cell, L, D = call.op, call.cell.name, call.L, call.D
    options: dict[str, Any] = {}
    if call.variant:
        options = {name: getattr(call.variant, name) for name in ("proj_size", "peepholes", "layer_norm")}
    extra = parameters.context_names(D == 2) if call.context is not None else []
    if isinstance(params, Mapping):
        bias = "bias_ih_l0" in params or "bias_hh_l0" in params
        named = min(L, len(params) + 1)  # one of these lacks a name, or all are there
        own = _names(named, D == 2, bias, cell, **options)
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
    with_bias, without = (len(_kinds(cell, bias, **options)) * L * D + len(extra) for bias in (True, False))
    if len(params) not in (with_bias, without):
        expected = f"{with_bias} arrays (with biases) or {without} (without) for num_layers={L}, {D} direction(s)"
        if extra:
            expected += f", the last {len(extra)} for context"
        fail(op, "params", f"has {len(params)} arrays", expected)
    own = _names(L, D == 2, len(params) == with_bias, cell, **options)
    return own, list(params[: len(own)]), dict(zip(extra, params[len(own) :], strict=True))
