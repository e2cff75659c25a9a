# SPDX-License-Identifier: Apache-2.0
"""What `load_state_dict` takes: a dict of arrays or tensors, checked whole and cast before anything is written."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from . import arrays, params
from .errors import fail, text

SHOWN = 8  # names in an error, where a checkpoint has hundreds
NAME = re.compile(r"(?P<kind>(weight|bias|gain)_(ih|hh|ch|hr|ph|c))_l(?P<layer>\d{1,6})(?P<reverse>_reverse)?")


def read(op: str, state_dict: Any, wanted: Mapping[str, Any], prefix: Any = "") -> dict[str, np.ndarray]:
    """New values for the arrays `wanted`, in their shapes and dtypes, which share no memory with them.

    >>> layer = fusedrnn.RNN(3, 4, bias=False)
    >>> weights = {"rnn.weight_ih": np.ones((4, 3)), "rnn.weight_hh": np.eye(4), "head.bias": np.ones(2)}
    >>> {name: a.dtype.name for name, a in read("load", weights, layer.parameters, "rnn.").items()}
    {'weight_ih_l0': 'float32', 'weight_hh_l0': 'float32'}
    """
    for name, array in wanted.items():
        device = arrays.device_array(array)
        if device is None and not isinstance(array, np.ndarray):
            fail(op, f"{name} of the layer", f"is {arrays.kind(array)}", "an array to write to", error=TypeError)
        if not (array.flags.writeable if device is None else device.writeable):
            fix = f"Set layer.parameters[{name!r}] to a copy of it."
            fail(op, f"{name} of the layer", "is read-only", "an array to write to", fix)
    keys = _keys(op, state_dict, list(wanted), prefix)
    new = {name: _cast(op, keys[name], _value(op, state_dict, keys[name]), array) for name, array in wanted.items()}
    here = [array for array in wanted.values() if isinstance(array, np.ndarray)]
    return {name: a.copy() if any(np.may_share_memory(a, b) for b in here) else a for name, a in new.items()}


def copied(array: Any) -> Any:
    """A copy where the array is."""
    return array.copy() if hasattr(array, "copy") else array.detach().clone()  # torch's


def write(target: Any, new: np.ndarray) -> None:
    """Copy what `read` made into the layer's array, on the host or on a device."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(target, torch.Tensor):
        target.detach().copy_(torch.from_numpy(new))
    elif not isinstance(target, np.ndarray) and hasattr(target, "set"):  # CuPy's
        target.set(new)
    else:
        target[...] = new


# Which key is which parameter.


def _keys(op: str, state_dict: Any, names: Sequence[str], prefix: Any) -> dict[str, str]:
    """The state dict's key of every parameter."""
    if not isinstance(state_dict, Mapping):
        fix = "Pass what its state_dict() returns." if hasattr(state_dict, "state_dict") else ""
        fix = fix or "Of pairs make a dict: dict(module.named_parameters())."
        fail(op, "state_dict", f"is {arrays.kind(state_dict)}", "a dict of arrays by name", fix, TypeError)
    prefix = text(op, "prefix", prefix)
    if not prefix and (strange := [key for key in state_dict if not isinstance(key, str)]):
        fail(op, "state_dict", f"has the key {strange[0]!r}", "names for keys", error=TypeError)
    there: dict[str, str] = {}
    for key in state_dict:
        if isinstance(key, str) and key.startswith(prefix):
            there[key[len(prefix) :]] = key
    if not any(name in there for name in names):
        there = {_of_cell(names, name): key for name, key in there.items()}
    lost = [name for name in names if name not in there]
    unknown = [name for name in there if name not in names]
    if lost or unknown:
        got = "; ".join(
            f"{what} {_list(prefix + name for name in which)}"
            for what, which in (("lacks", lost), ("has", unknown))
            if which
        )
        fix = _hint(state_dict, names, list(there))
        fail(op, "state_dict", got, f"exactly {_list(names)}" + (f' behind "{prefix}"' if prefix else ""), fix)
    return there


def _of_cell(names: Sequence[str], name: str) -> str:
    """The name in a layer of what torch's cells call weight_ih."""
    one_layer = all(known.endswith("_l0") for known in names)
    return name + "_l0" if one_layer and name + "_l0" in names else name


def _list(names: Iterable[str]) -> str:
    every = list(names)
    return ", ".join(every[:SHOWN]) + (f" and {len(every) - SHOWN} more" if len(every) > SHOWN else "")


def _hint(state_dict: Mapping[str, Any], names: Sequence[str], there: Sequence[str]) -> str:
    """What may have been meant by names that do not fit."""
    if isinstance(state_dict, dict) and not any(name in there for name in names):
        inside = [key for key in state_dict if isinstance(state_dict[key], Mapping)]
        if inside:
            return f"Did you mean {' or '.join(f'state_dict[{key!r}]' for key in inside[:SHOWN])}?"
    keys = [key for key in state_dict if isinstance(key, str)]
    starts: list[str] = []
    for form in (names, [name.removesuffix("_l0") for name in names]):
        found = [key.removesuffix(form[0]) for key in keys if key.endswith(form[0])]
        starts += [start for start in found if all(start + name in state_dict for name in form)]
    if starts and any(name not in there for name in names):
        return f"Did you mean {' or '.join(f'prefix={start!r}' for start in dict.fromkeys(starts[:SHOWN]))}?"
    lost = [name for name in names if name not in there]
    of_cell = [name for name in there if name not in names and _of_cell(names, name) in lost]
    if of_cell:
        theirs, ours = _list(of_cell), _list(name for name in names if name in there)
        return f"Torch's cells say {theirs}, its layers {ours}: use the names of one of them for all."
    made, given = _options(names), _options(there)
    others = [f"{option}={given[option]}" for option in made if given and given[option] != made[option]]
    if others:
        return f"These weights are of a layer with {', '.join(others)}."
    unknown = [name for name in there if name not in names][:100]  # of a large checkpoint, enough
    near = [(name, match[0]) for name in unknown if (match := difflib.get_close_matches(name, lost, 1, 0.8))]
    return " ".join(f"Did you mean {match} by {name}?" for name, match in near[:SHOWN])


def _options(names: Iterable[str]) -> dict[str, Any]:
    """The options of a layer that has these parameters; none if these are no layer's."""
    parts = [found for name in names if (found := NAME.fullmatch(name))]
    kinds = {part["kind"] for part in parts}
    if not parts:
        return {}
    return {
        "num_layers": 1 + max(int(part["layer"]) for part in parts),
        "bidirectional": any(part["reverse"] for part in parts),
        "bias": "bias_ih" in kinds,
        "peepholes": "weight_ph" in kinds,
        "layer_norm": "gain_ih" in kinds,
        "proj_size": "P" if "weight_hr" in kinds else 0,
        "context_size": "K" if "weight_ch" in kinds else 0,
    }


# What a value holds.


def _value(op: str, state_dict: Mapping[str, Any], key: str) -> Any:
    try:
        return state_dict[key]
    except Exception as error:  # a file's: what it says
        fail(op, key, f"cannot be read ({_said(error)})", "an array or tensor of numbers", error=TypeError)


def _said(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")


def _cast(op: str, key: str, value: Any, target: Any) -> np.ndarray:
    """The value in the target's shape and dtype."""
    try:
        array, bfloat16 = _on_host(value)
    except Exception as error:
        what = f"is {arrays.kind(value)} that cannot be read ({_said(error)})"
        fail(op, key, what, "an array or tensor of numbers", error=TypeError)
    dtype = _dtype(target)
    if array.dtype.kind not in "fiub":
        what = f"has dtype {array.dtype}" if hasattr(value, "dtype") else f"is {arrays.kind(value)}"
        fix = "If these are bits of bfloat16, pass array.view(numpy.uint16)." if array.dtype.str[1:] == "V2" else ""
        fail(op, key, what, f"real numbers that {dtype} can hold", fix, TypeError)
    if array.shape != tuple(target.shape):
        transposed = array.ndim == 2 and array.shape[::-1] == tuple(target.shape)
        fix = "Did you pass its transpose?" if transposed else "The layer has other sizes, or another cell."
        fail(op, key, f"has shape {array.shape}", f"{tuple(target.shape)}", fix)
    if dtype != np.uint16:
        return params.rounded(op, key, params.widen(array) if array.dtype == np.uint16 else array, dtype)
    if not bfloat16 and array.dtype != np.uint16:
        fix = "A layer with bfloat16 weights takes what fusedrnn.params.to_bfloat16 makes."
        fail(op, key, f"has dtype {array.dtype}", "bfloat16 values or bits", fix, TypeError)
    return params.bfloat16_bits(array) if bfloat16 else array


def _dtype(target: Any) -> np.dtype[Any]:
    device = arrays.device_array(target)
    dtype = target.dtype if device is None else device.dtype
    return dtype if isinstance(dtype, np.dtype) else np.dtype(np.float32)  # bfloat16: its library rounds


def _on_host(value: Any) -> tuple[np.ndarray, bool]:
    """The value as a NumPy array, and whether it was bfloat16: that comes as float32, as do other types NumPy lacks."""
    tensor = getattr(sys.modules.get("torch"), "Tensor", ())  # who passes one has imported it
    if isinstance(value, tensor):
        return _of_torch(value), str(value.dtype) == "torch.bfloat16"
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError("masks are not read: pass .filled()")
    on_device = not isinstance(value, np.ndarray) and arrays.device_array(value) is not None
    array = np.asarray(value.get() if on_device and hasattr(value, "get") else value)
    name = array.dtype.name
    if array.dtype.kind == "V" and name.startswith(("bfloat16", "float")):  # of ml_dtypes
        return array.astype(np.float32), name == "bfloat16"
    return array, False


def _of_torch(value: Any) -> np.ndarray:
    tensor = value.detach()
    if tensor.device.type == "cpu" and tensor.numel() and not tensor._is_zerotensor():
        last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        if tensor.untyped_storage().nbytes() < (tensor.storage_offset() + last + 1) * tensor.element_size():
            raise ValueError("its memory was freed")
    if tensor.is_floating_point() and str(tensor.dtype) not in ("torch.float16", "torch.float32", "torch.float64"):
        tensor = tensor.float()
    array: np.ndarray = tensor.numpy(force=True)
    return array
