# SPDX-License-Identifier: Apache-2.0
"""Gradient clipping, in place, with the meaning of torch.nn.utils: by global norm, by value, by each array's own norm.

`grads` is an array, or any nesting of dicts, lists and tuples of arrays (None entries are skipped), so what `backward`
returns can be passed as it is. Everything passed counts: leave out `x` and `state` where only the weights shall count.
Arrays may be non-contiguous. Sums are float64. Nothing is written before every check has passed. The native backend
does the work in one pass over memory, NumPy otherwise.

Arrays on a CUDA device are clipped there, all in two launches and without waiting for them: then a norm is a float64
array () on the device; error_if_nonfinite has to wait for it, and norm_type is 1, 2 or inf.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from . import backends
from .arrays import DeviceArray, device_array
from .errors import number

__all__ = ["clip_each_norm_", "clip_grad_norm_", "clip_grad_value_"]

BLOCK = 16384  # elements of float64 that stay in the first caches between conversion and sum
NORMAL = float(np.finfo(np.float32).tiny)  # float32 factors below lose bits


def clip_grad_norm_(grads: Any, max_norm: float, norm_type: float | str = 2.0, error_if_nonfinite: bool = False) -> Any:
    """Scale all gradients together so that their common norm is at most `max_norm`; returns the norm before.

    `norm_type` is any p > 0, inf or "inf". With `error_if_nonfinite` an infinite or NaN norm raises and nothing is
    changed.

    >>> grads = {"weight": np.array([3.0, 0.0]), "bias": np.array([4.0])}
    >>> fusedrnn.clip.clip_grad_norm_(grads, 1.0)
    5.0
    >>> grads["bias"].round(3)
    array([0.8])
    """
    arrays = [array for _, array in leaves("clip_grad_norm_", grads)]
    norm_type = check_norm("clip_grad_norm_", max_norm, norm_type)
    if on_cuda("clip_grad_norm_", arrays):
        return device_norm("clip_grad_norm_", "all gradients together", arrays, max_norm, norm_type, error_if_nonfinite)
    total = norm_of(arrays, norm_type)
    if error_if_nonfinite:
        refuse_nonfinite("clip_grad_norm_", "all gradients together", total)
    scale(arrays, total, max_norm)
    return total


def clip_each_norm_(grads: Any, max_norm: float, norm_type: float | str = 2.0, error_if_nonfinite: bool = False) -> Any:
    """Scale every array by itself so that its own norm is at most `max_norm`; returns the norms, nested as `grads`.

    >>> grads = {"weight": np.array([3.0, 4.0]), "bias": np.array([0.5])}
    >>> fusedrnn.clip.clip_each_norm_(grads, 1.0)
    {'weight': 5.0, 'bias': 0.5}
    """
    pairs = list(leaves("clip_each_norm_", grads))
    norm_type = check_norm("clip_each_norm_", max_norm, norm_type)
    if on_cuda("clip_each_norm_", [array for _, array in pairs]):
        if error_if_nonfinite:  # all are looked at before one is changed
            for name, array in pairs:
                device_norm("clip_each_norm_", name, [array], -1, norm_type, True)
        return like(grads, iter([device_norm("clip_each_norm_", n, [a], max_norm, norm_type, False) for n, a in pairs]))
    norms = [norm_of([array], norm_type) for _, array in pairs]
    if error_if_nonfinite:
        for (name, _), norm in zip(pairs, norms, strict=True):
            refuse_nonfinite("clip_each_norm_", name, norm)
    for (_, array), norm in zip(pairs, norms, strict=True):
        scale([array], norm, max_norm)
    return like(grads, iter(norms))


def clip_grad_value_(grads: Any, clip_value: float) -> None:
    """Clamp every element to [-clip_value, clip_value]; NaN stays NaN.

    >>> grads = [np.array([3.0, -0.1])]
    >>> fusedrnn.clip.clip_grad_value_(grads, 0.5)
    >>> grads[0]
    array([ 0.5, -0.1])
    """
    arrays = [array for _, array in leaves("clip_grad_value_", grads)]
    clip_value = number("clip_grad_value_", "clip_value", clip_value)
    if not clip_value >= 0:
        raise ValueError(f"clip_grad_value_: clip_value is {clip_value}; expected a number >= 0")
    if on_cuda("clip_grad_value_", arrays):
        cuda: Any = backends.choose(on_cuda=True)
        cuda.clip_value(arrays, float(clip_value))
        return
    native = getattr(backends.choose(), "clip_value_", None)
    if native:
        native(arrays, float(clip_value))
        return
    for array in arrays:
        np.clip(array, -clip_value, clip_value, out=array)


def on_cuda(function: str, arrays: Sequence[Any]) -> bool:
    there = [isinstance(array, DeviceArray) for array in arrays]
    if any(there) and not all(there):
        raise TypeError(
            f"{function}: some of grads are on a CUDA device and some on the host; expected all in one place. "
            "Clip them in two calls if two norms are what you want, else copy"
        )
    return any(there)


def device_norm(
    function: str, what: str, arrays: Sequence[Any], max_norm: float, norm_type: float, error_if_nonfinite: bool
) -> Any:
    cuda: Any = backends.choose(on_cuda=True)
    if norm_type not in (1, 2, np.inf):
        raise ValueError(f"{function}: norm_type is {norm_type}; expected 1, 2 or inf on a CUDA device")
    if error_if_nonfinite:
        refuse_nonfinite(function, what, float(cuda.to_host(cuda.clip_norm(arrays, norm_type, -1.0))))
    return cuda.clip_norm(arrays, norm_type, float(max_norm)).owner


def norm_of(arrays: Sequence[np.ndarray], norm_type: float) -> float:
    native = getattr(backends.choose(), "global_norm", None)
    if native and norm_type in (1, 2, np.inf):  # the norms that are written in C++
        norm = float(native(arrays, float(norm_type)))
    elif norm_type == np.inf:
        norm = largest_size(arrays)
    else:
        norm = norm_of_powers(arrays, norm_type, 1.0)
    if norm_type in (1, np.inf) or 0 < norm < np.inf or np.isnan(norm):
        return norm
    # Powers may have left float64's range, up or down, where the norm itself does not.
    largest = norm_of(arrays, np.inf)
    return norm_of_powers(arrays, norm_type, largest) if 0 < largest < np.inf else largest


def largest_size(arrays: Sequence[np.ndarray]) -> float:
    largest = 0.0
    for array in arrays:
        if array.size:
            # not np.abs(array).max(): that would copy the whole array. NaN passes through both.
            largest = float(np.maximum(largest, np.maximum(array.max(), -array.min())))
    return largest


def norm_of_powers(arrays: Sequence[np.ndarray], p: float, unit: float) -> float:
    """(sum |a|^p)^(1/p), summed up in that unit."""
    total = 0.0
    for array in arrays:
        # nditer hands out 1-D float64 blocks of any strided array without copying more than one block at a time
        blocks = np.nditer(
            array,
            flags=["external_loop", "buffered", "zerosize_ok"],
            op_dtypes=[np.float64],
            order="K",
            buffersize=BLOCK,
        )
        block: Any
        for block in blocks:
            with np.errstate(over="ignore", under="ignore", invalid="ignore"):
                scaled = block if unit == 1 else block / unit
                total += float(scaled @ scaled) if p == 2 else float((np.abs(scaled) ** p).sum())
    with np.errstate(over="ignore"):
        return unit * float(np.sqrt(total) if p == 2 else np.power(total, 1.0 / p))


def scale(arrays: Sequence[np.ndarray], norm: float, max_norm: float) -> None:
    factor = max_norm / (norm + 1e-6)  # 1e-6 as torch.nn.utils has it
    if factor >= 1:
        return
    narrow = any(array.dtype == np.float32 for array in arrays)
    while narrow and 0 < factor < NORMAL:  # the power of two changes no digit, but where the result is 0 anyway
        multiply(arrays, 2.0**-64)
        factor *= 2.0**64
    multiply(arrays, factor)


def multiply(arrays: Sequence[np.ndarray], factor: float) -> None:
    native = getattr(backends.choose(), "scale_", None)
    if native:
        native(arrays, factor)
        return
    with np.errstate(invalid="ignore", under="ignore"):  # a NaN norm gives NaN, an infinite one 0 * inf: as torch does
        for array in arrays:
            np.multiply(array, array.dtype.type(factor), out=array)


def leaves(function: str, grads: Any, name: str = "grads") -> Iterator[tuple[str, np.ndarray]]:
    if grads is None:
        return
    if isinstance(grads, Mapping):
        for key, value in grads.items():
            yield from leaves(function, value, f"{name}[{key!r}]")
    elif isinstance(grads, list | tuple):
        for index, value in enumerate(grads):
            yield from leaves(function, value, f"{name}[{index}]")
    elif (device := device_array(grads)) is not None:
        if device.kind not in ("float16", "bfloat16", "float32", "float64"):
            expected = "float16, bfloat16, float32 or float64"
            raise TypeError(f"{function}: {name} has dtype {device.kind}; expected {expected}")
        if not device.writeable:
            raise ValueError(f"{function}: {name} is read-only; clipping works in place, pass a writeable array")
        yield name, device  # type: ignore[misc]
    elif not isinstance(grads, np.ndarray):
        raise TypeError(
            f"{function}: {name} is a {type(grads).__name__}; expected a NumPy array, or a dict, list or tuple of them"
        )
    elif grads.dtype not in (np.float32, np.float64):
        raise TypeError(f"{function}: {name} has dtype {grads.dtype}; expected float32 or float64 in native byte order")
    elif not grads.flags.writeable:
        raise ValueError(f"{function}: {name} is read-only; clipping works in place, pass a writeable array")
    elif not grads.flags.aligned:
        raise ValueError(f"{function}: {name} is not aligned; expected whole elements in memory, such as {name}.copy()")
    elif grads.size and any(not step and size > 1 for step, size in zip(grads.strides, grads.shape, strict=True)):
        raise ValueError(
            f"{function}: {name} has elements that share memory; expected one place for each, because clipping works "
            "in place: pass a copy"
        )
    else:
        yield name, grads


def like(grads: Any, values: Iterator[float]) -> Any:
    if grads is None:
        return None
    if isinstance(grads, Mapping):
        return {key: like(value, values) for key, value in grads.items()}
    if isinstance(grads, list | tuple):
        return type(grads)(like(value, values) for value in grads)
    return next(values)


def check_norm(function: str, max_norm: float, norm_type: float | str) -> float:
    """norm_type as a number."""
    number(function, "max_norm", max_norm)
    norm_type = np.inf if norm_type == "inf" else number(function, "norm_type", norm_type)
    if not max_norm >= 0:
        raise ValueError(f"{function}: max_norm is {max_norm}; expected a number >= 0")
    if not norm_type > 0:
        raise ValueError(f"{function}: norm_type is {norm_type}; expected a number > 0, or inf")
    return norm_type


def refuse_nonfinite(function: str, what: str, norm: float) -> None:
    if not np.isfinite(norm):
        raise FloatingPointError(
            f"{function}: the norm of {what} is {norm}; expected a finite number. Nothing was changed. "
            "Skip this update, or pass error_if_nonfinite=False to scale anyway"
        )
