# SPDX-License-Identifier: Apache-2.0
"""Parameters: PyTorch's names and shapes, its initial distribution, and the orders of Keras and ONNX.

Per layer k and direction (suffix "" or "_reverse"), with G gates (LSTM 4: i, f, g, o; GRU 3: r, z, n; RNN 1):
`weight_ih_l{k}` (G*H, I_k), `weight_hh_l{k}` (G*H, H), `bias_ih_l{k}` (G*H), `bias_hh_l{k}` (G*H), where I_0 is the
input size and I_k = directions * H above. A dict under these names is what torch.nn's state_dict holds, so PyTorch
needs no conversion. `cell` is "rnn_tanh", "rnn_relu", "lstm", "gru", "gru_reset_before" (Keras's reset_after=False,
ONNX's linear_before_reset=0), "cifg" (the coupled LSTM, 3: i, g, o), "ligru" (2: z, n), "mingru" (2: z, n) or "minlstm"
(3: i, f, g). The last two have no weight_hh and no bias_hh. With a context of K numbers (see fusedrnn.ops) layer 0 also
has `weight_ch_l0` (G*H, K), and `weight_ch_l0_reverse`, behind all others.

What options add, in this order: `weight_hr_l{k}` (P, H) for proj_size P (weight_hh is then (G*H, P), and layers above
the first take in directions * P); `weight_ph_l{k}` (3*H) for peepholes of i, f, o ((2*H) for i, o where the gates are
coupled); for layer_norm `gain_ih_l{k}` and `gain_hh_l{k}` (G*H), and the LSTM's `gain_c_l{k}` and `bias_c_l{k}` (H).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .arrays import kind as kind_of
from .cells import CELLS
from .cells.cell import Cell
from .errors import fail, flag, integer

KINDS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
EXTRAS = ("weight_hr", "weight_ph", "gain_ih", "gain_hh", "gain_c", "bias_c")

# Where each gate of ours stands in theirs.
_ONNX: dict[str, Sequence[int]] = {"lstm": (0, 2, 3, 1), "gru": (1, 0, 2), "rnn": (0,)}  # i, o, f, c; z, r, h
_KERAS: dict[str, Sequence[int]] = {"lstm": (0, 1, 2, 3), "gru": (1, 0, 2), "rnn": (0,)}  # i, f, c, o; z, r, h


def _cell(op: str, name: Any) -> Cell:
    if not isinstance(name, str) or name not in CELLS:
        fail(op, "cell", f"is {name!r}", f"one of {', '.join(CELLS)}")
    return CELLS[name]


def _order(theirs: Mapping[str, Sequence[int]], cell: str) -> Sequence[int]:
    found = theirs.get(_cell("params", cell).name.partition("_")[0])
    if found is None:
        fail("params", "cell", f"is {cell!r}", f"one of {', '.join(theirs)}", "The others have no order there.")
    return found


def kinds(
    cell: str, bias: bool = True, proj_size: int = 0, peepholes: bool = False, layer_norm: bool = False
) -> tuple[str, ...]:
    """What a layer has in each direction.

    >>> fusedrnn.params.kinds("mingru")
    ('weight_ih', 'bias_ih')
    """
    spec = _cell("params.kinds", cell)
    found = KINDS if spec.state_product else (KINDS[0], KINDS[2])
    norm_of_c = layer_norm and spec.cell_state
    wanted = (proj_size > 0, peepholes, layer_norm, layer_norm, norm_of_c, norm_of_c)
    extras = tuple(kind for kind, want in zip(EXTRAS, wanted, strict=True) if want)
    return (found if bias else tuple(kind for kind in found if not kind.startswith("bias"))) + extras


def names(
    num_layers: int = 1, bidirectional: bool = False, bias: bool = True, cell: str = "lstm", **options: Any
) -> list[str]:
    """All parameter names, in the order of torch.nn's flat weights. options: proj_size, peepholes, layer_norm.

    >>> fusedrnn.params.names(bias=False, bidirectional=True)
    ['weight_ih_l0', 'weight_hh_l0', 'weight_ih_l0_reverse', 'weight_hh_l0_reverse']
    """
    integer("params.names", "num_layers", num_layers, 0)
    suffixes = ("", "_reverse") if flag("params.names", "bidirectional", bidirectional) else ("",)
    each = kinds(cell, bias, **options)
    return [f"{kind}_l{layer}{suffix}" for layer in range(num_layers) for suffix in suffixes for kind in each]


def context_names(bidirectional: bool = False) -> list[str]:
    """The names of the context's weights.

    >>> fusedrnn.params.context_names()
    ['weight_ch_l0']
    """
    return ["weight_ch_l0", "weight_ch_l0_reverse"] if bidirectional else ["weight_ch_l0"]


def shapes(
    cell: str,
    input_size: int,
    hidden_size: int,
    num_layers: int = 1,
    bidirectional: bool = False,
    bias: bool = True,
    context_size: int = 0,
    **options: Any,
) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter, by name. options: proj_size, peepholes, layer_norm.

    >>> fusedrnn.params.shapes("lstm", 3, 5)["weight_ih_l0"]
    (20, 3)
    """
    gates = _cell("params.shapes", cell).gates
    for name, size, least in (("input_size", input_size, 1), ("hidden_size", hidden_size, 1)):
        integer("params.shapes", name, size, least)
    integer("params.shapes", "context_size", context_size, 0)
    rows = gates * hidden_size
    outputs = options.get("proj_size", 0) or hidden_size
    of_kind: dict[str, tuple[int, ...]] = {
        "weight_hh": (rows, outputs),
        "weight_hr": (outputs, hidden_size),
        "weight_ph": ((gates - 1) * hidden_size,),
        "gain_c": (hidden_size,),
        "bias_c": (hidden_size,),
    }
    result: dict[str, tuple[int, ...]] = {}
    for name in names(num_layers, bidirectional, bias, cell, **options):
        below = input_size if name.startswith("weight_ih_l0") else outputs * (2 if bidirectional else 1)
        usual = (rows, below) if name.startswith("weight_ih") else (rows,)
        result[name] = of_kind.get(name.partition("_l")[0], usual)
    if context_size:
        result |= dict.fromkeys(context_names(bidirectional), (rows, context_size))
    return result


def init(
    cell: str,
    input_size: int,
    hidden_size: int,
    num_layers: int = 1,
    bidirectional: bool = False,
    bias: bool = True,
    dtype: Any = np.float32,
    seed: int | None = None,
    context_size: int = 0,
    **options: Any,
) -> dict[str, np.ndarray]:
    """New parameters, uniform in [-1/sqrt(H), 1/sqrt(H)] as in torch.nn (the same distribution, not the same numbers).
    Gains of layer_norm are 1 and bias_c is 0. options: proj_size, peepholes, layer_norm.

    >>> fusedrnn.params.init("gru", 3, 4, seed=0)["bias_hh_l0"].shape
    (12,)
    """
    wanted = shapes(cell, input_size, hidden_size, num_layers, bidirectional, bias, context_size, **options)
    rng = np.random.default_rng(seed)
    bound = hidden_size**-0.5
    made = {name: rng.uniform(-bound, bound, shape).astype(dtype) for name, shape in wanted.items()}
    for name, array in made.items():
        if name.startswith(("gain", "bias_c")):
            array[...] = name.startswith("gain")
    return made


def to_bfloat16(params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Parameters for inference with half the bytes: float32 weights rounded to bfloat16 (nearest, ties to even), biases
    as they are. NumPy has no such type, so the weights' bits come as uint16; `fusedrnn.lstm` and the like take them.
    Raises TypeError for weights that are no float arrays, ValueError for float64 ones beyond float32.

    One row at a time is limited by reading the weights, so it gets faster; y changes by about 3e-4.

    >>> params = fusedrnn.params.to_bfloat16(fusedrnn.params.init("lstm", 3, 4, seed=0))
    >>> params["weight_hh_l0"].dtype, params["bias_hh_l0"].dtype
    (dtype('uint16'), dtype('float32'))
    >>> y, state, _ = fusedrnn.lstm(np.ones((5, 2, 3), np.float32), None, params)
    """
    result = dict(_arrays("params.to_bfloat16", params))
    for name, array in params.items():
        if name.startswith("weight"):
            if not isinstance(array, np.ndarray):
                fail("params.to_bfloat16", name, f"is {kind_of(array)}", "a NumPy array", error=TypeError)
            if array.dtype not in (np.float32, np.float64):
                fail("params.to_bfloat16", name, f"has dtype {array.dtype}", "float32 weights", error=TypeError)
            result[name] = bfloat16_bits(rounded("params.to_bfloat16", name, array, np.dtype(np.float32)))
    return result


def rounded(op: str, name: str, array: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """The array in that dtype. NaN and infinities stay; a finite number that would become infinite is an error."""
    with np.errstate(over="ignore", under="ignore"):
        result = array.astype(dtype, copy=False)
    if dtype.kind == "f" and result is not array and (lost := np.isinf(result) & np.isfinite(array)).any():
        got = f"holds {array[lost].flat[0]:.6g}" + (f" and {lost.sum() - 1} more such" if lost.sum() > 1 else "")
        expected = f"numbers that {dtype} can hold, at most {float(np.finfo(dtype).max):.6g}"
        fail(op, name, got, expected, "It would become infinite: look at what made it, or keep dtype=numpy.float64.")
    return result


def _arrays(op: str, params: Any) -> Mapping[str, np.ndarray]:
    """The parameters, if they are a dict of arrays."""
    if not isinstance(params, Mapping):
        fail(op, "params", f"is a {type(params).__name__}", "a dict of arrays under torch.nn's names", error=TypeError)
    for name, array in params.items():
        if not hasattr(array, "dtype"):
            fail(op, str(name), f"is a {type(array).__name__}", "an array", error=TypeError)
    return params


def bfloat16_bits(a: np.ndarray) -> np.ndarray:
    """Rounded to bfloat16 (nearest, ties to even), as uint16."""
    bits = np.ascontiguousarray(a, np.float32).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(a), np.uint16(0x7FC0), rounded)


def from_bfloat16(params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The float32 values of what `to_bfloat16` returned.

    >>> half = fusedrnn.params.to_bfloat16({"weight_ih_l0": np.float32([[1.0, 1.00001]])})
    >>> fusedrnn.params.from_bfloat16(half)["weight_ih_l0"]
    array([[1., 1.]], dtype=float32)
    """
    arrays = _arrays("params.from_bfloat16", params)
    return {name: widen(a) if a.dtype == np.uint16 else a for name, a in arrays.items()}


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits (uint16, any shape) as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _reorder(a: np.ndarray, gates: int, order: Sequence[int]) -> np.ndarray:
    """Rows (G*H, ...) with gate g of the result taken from gate order[g]."""
    if a.ndim < 1 or not a.size or a.shape[0] % gates:
        fail("params", "a weight or bias", f"has shape {a.shape}", f"{gates} gates of rows, one below the other")
    blocks = a.reshape(gates, a.shape[0] // gates, *a.shape[1:])
    return np.concatenate([blocks[g] for g in order])


def _needs(op: str, params: Mapping[str, Any], wanted: Sequence[str]) -> None:
    for name in wanted:
        if name not in params:
            fail(op, "params", f"has no {name}", f"{', '.join(wanted)} at least, and the biases if there are any")


def _inverse(order: Sequence[int]) -> list[int]:
    return [order.index(g) for g in range(len(order))]


def to_onnx(
    cell: str, params: dict[str, np.ndarray], layer: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """One layer as ONNX's W (D, G*H, I), R (D, G*H, H), B (D, 2*G*H) or None, gates in ONNX's order.

    >>> W, R, B = fusedrnn.params.to_onnx("lstm", fusedrnn.params.init("lstm", 3, 5))
    >>> W.shape, R.shape, B.shape
    ((1, 20, 3), (1, 20, 5), (1, 40))
    """
    order = _inverse(_order(_ONNX, cell))
    gates = CELLS[cell].gates
    suffixes = [s for s in ("", "_reverse") if f"weight_ih_l{layer}{s}" in _arrays("params.to_onnx", params)]
    kinds_there = KINDS if f"bias_ih_l{layer}" in params else KINDS[:2]
    _needs("params.to_onnx", params, [f"{kind}_l{layer}{s}" for kind in kinds_there for s in suffixes or [""]])

    def part(kind: str, suffix: str) -> np.ndarray:
        return _reorder(np.asarray(params[f"{kind}_l{layer}{suffix}"]), gates, order)

    W = np.stack([part("weight_ih", s) for s in suffixes])
    R = np.stack([part("weight_hh", s) for s in suffixes])
    if f"bias_ih_l{layer}" not in params:
        return W, R, None
    return W, R, np.stack([np.concatenate([part("bias_ih", s), part("bias_hh", s)]) for s in suffixes])


def from_onnx(cell: str, W: np.ndarray, R: np.ndarray, B: np.ndarray | None = None, layer: int = 0) -> dict[str, Any]:
    """One layer of ONNX's W (D, G*H, I), R (D, G*H, H), B (D, 2*G*H) under PyTorch's names.

    >>> params = fusedrnn.params.init("gru", 3, 5)
    >>> again = fusedrnn.params.from_onnx("gru", *fusedrnn.params.to_onnx("gru", params))
    >>> all((again[name] == params[name]).all() for name in params)
    True
    """
    order, result = _order(_ONNX, cell), {}
    gates = CELLS[cell].gates
    given = [np.asarray(part) for part in ((W, R) if B is None else (W, R, B))]
    for name, part, axes in zip("WRB", given, (3, 3, 2), strict=False):
        if part.ndim != axes or len(part) != len(given[0]):
            expected = f"{axes} axes, the first one of D = {len(given[0]) if given[0].ndim else 1} directions"
            fail("params.from_onnx", name, f"has shape {part.shape}", expected)
    W, R, *rest = given
    B = rest[0] if rest else None
    for d, suffix in enumerate(("", "_reverse")[: len(W)]):
        parts = [W[d], R[d]] if B is None else [W[d], R[d], *np.split(B[d], 2)]
        for kind, part in zip(KINDS, parts, strict=False):
            result[f"{kind}_l{layer}{suffix}"] = _reorder(part, gates, order)
    return result


def to_keras(cell: str, params: dict[str, np.ndarray], layer: int = 0, reverse: bool = False) -> list[np.ndarray]:
    """One layer in one direction as Keras's `get_weights()`: kernel (I, G*H), recurrent_kernel (H, G*H), bias.

    Keras's bias is the sum of the two, but (2, 3*H) for GRU with reset_after (cell "gru"). Without biases: two arrays.

    >>> [w.shape for w in fusedrnn.params.to_keras("gru", fusedrnn.params.init("gru", 3, 5))]
    [(3, 15), (5, 15), (2, 15)]
    """
    order = _inverse(_order(_KERAS, cell))
    gates = CELLS[cell].gates
    end = f"_l{layer}{'_reverse' if reverse else ''}"
    _needs("params.to_keras", _arrays("params.to_keras", params), [kind + end for kind in KINDS[:2]])
    parts = [_reorder(np.asarray(params[kind + end]), gates, order) for kind in KINDS if kind + end in params]
    weights = [part.T for part in parts[:2]]
    if len(parts) == 4:
        weights.append(np.stack(parts[2:]) if cell == "gru" else parts[2] + parts[3])
    return weights


def from_keras(cell: str, weights: Sequence[np.ndarray], layer: int = 0, reverse: bool = False) -> dict[str, Any]:
    """One Keras layer's `get_weights()` under PyTorch's names. A single bias becomes bias_ih; bias_hh is then 0.

    >>> params = fusedrnn.params.init("gru", 3, 5)
    >>> again = fusedrnn.params.from_keras("gru", fusedrnn.params.to_keras("gru", params))
    >>> all((again[name] == params[name]).all() for name in params)
    True
    """
    order = _order(_KERAS, cell)
    gates = CELLS[cell].gates
    end = f"_l{layer}{'_reverse' if reverse else ''}"
    if not isinstance(weights, Sequence) or isinstance(weights, str) or len(weights) not in (2, 3):
        expected = "[kernel, recurrent_kernel] or [kernel, recurrent_kernel, bias]"
        fail("params.from_keras", "weights", f"is {weights!r:.80}", expected, "As Keras's layer.get_weights().")
    parts = [np.asarray(weights[0]).T, np.asarray(weights[1]).T]
    if len(weights) == 3:
        bias = np.asarray(weights[2])
        parts += list(bias) if bias.ndim == 2 else [bias, np.zeros_like(bias)]
    return {
        kind + end: np.ascontiguousarray(_reorder(part, gates, order)) for kind, part in zip(KINDS, parts, strict=False)
    }
