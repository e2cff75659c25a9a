# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend: checked calls on arrays.DeviceArray, for `ops`, `clip` and the PyTorch adapter.

Everything is put on the stream that the arrays' library works on, and nothing waits for it. Workspace and tape are
arrays of that library. `set_float32` or FUSEDRNN_CUDA_FLOAT32 says how float32 is multiplied, on every route: "strict"
(as IEEE has it; unless told otherwise), "3xtf32" (as accurate, faster for more than a few rows) or "tf32" (ten bits of
fraction). A cost model chooses the route of a call, unless `set_route` or FUSEDRNN_CUDA_ROUTE names it. Each call's
route is logged, at level DEBUG of "fusedrnn".
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..arrays import DeviceArray
from . import Arguments, Problem, Results, log, native

_extension: Any = native.cuda
if _extension is None:
    raise ImportError(
        "this build has no CUDA kernels: there was no GPU or no nvcc when it was built. "
        "With nvcc, install with FUSEDRNN_CUDA=ON in the environment"
    )

ROUTES = ("single", "cluster", "grid", "stepwise")
FLOAT32 = ("strict", "tf32", "3xtf32")


class CudaError(RuntimeError):
    """A kernel, a CUDA call or a library call failed: which, for what sizes, and the status, are in its text."""


def _setting(name: str, value: str | None, known: tuple[str, ...]) -> str | None:
    if value is not None and value not in known:
        raise ValueError(f"fusedrnn: {name} is {value!r}; expected one of {', '.join(known)}")
    return value


_route = _setting("FUSEDRNN_CUDA_ROUTE", os.environ.get("FUSEDRNN_CUDA_ROUTE") or None, ROUTES)
_float32 = _setting("FUSEDRNN_CUDA_FLOAT32", os.environ.get("FUSEDRNN_CUDA_FLOAT32") or "strict", FLOAT32)
_last = threading.local()


def set_route(name: str | None) -> None:
    """Force a route for every later call: "single", "cluster", "grid", "stepwise"; None: the cost model chooses.

    Where the route does not fit (type, sizes, device), "stepwise" is taken; `last_route` tells. Raises ValueError for
    another name.
    """
    global _route
    _route = _setting("route", name, ROUTES)


def set_float32(name: str) -> None:
    """How float32 is multiplied from now on: "strict", "3xtf32" or "tf32". Raises ValueError for another name.

    "strict": IEEE float32, fused multiply-adds or a library's products. "3xtf32": as accurate (2e-6 in 100 steps, like
    the CPU), but not the same bits, and an infinite number among the operands gives NaN: two TF32 numbers for each one,
    three products of theirs on the tensor cores (Ootomo and Yokota 2022), where that is faster; time-parallel products
    are strict. "tf32": ten bits of fraction. In `fusedrnn.torch`, torch.backends.cudnn.allow_tf32 (True unless set)
    means "tf32"; set it to False for the others.

    >>> set_float32("3xtf32")
    >>> set_float32("strict")
    """
    global _float32
    _float32 = _setting("float32", name, FLOAT32)


def last_route(backward: bool = False) -> str | None:
    """The route that this thread's last forward (or backward) call took; None before the first."""
    return getattr(_last, "backward" if backward else "forward", None)


def architectures() -> list[str]:
    """What the kernels were compiled for.

    >>> all(name.startswith(("sm_", "compute_", "twin")) for name in architectures())
    True
    """
    return str(_extension.architectures).split()


def devices() -> tuple[list[dict[str, Any]], str]:
    """The CUDA devices that the driver shows (name, compute, multiprocessors, bytes), and if there is none, why."""
    found, why = _extension.devices()
    return [dict(zip(("name", "compute", "multiprocessors", "bytes"), each, strict=True)) for each in found], str(why)


def _call(function: Any, *args: Any) -> Any:
    try:
        return function(*args)
    except RuntimeError as error:
        raise CudaError(f"fusedrnn: {error}") from None


def bytes_like(like: DeviceArray, n: int) -> DeviceArray:
    """So many bytes of memory."""
    return like.new((max(int(n), 256),), np.uint8)


def to_device(like: DeviceArray, host: np.ndarray) -> DeviceArray:
    """A copy of an array of the host, made by the library of `like`, on its stream."""
    host = np.ascontiguousarray(host)
    result = like.new(host.shape, host.dtype)
    if host.size:
        _call(_extension.upload, result.pointer, host, like.current_stream())
    return result


def to_host(array: DeviceArray) -> np.ndarray:
    """A copy on the host. Waits for the stream."""
    if array.strides != np.empty(array.shape, array.dtype).strides and array.size:
        raise ValueError("fusedrnn: an array on a CUDA device has gaps; expected a contiguous one")
    host = np.empty(array.shape, array.dtype)
    if host.size:
        _call(_extension.download, host, array.pointer, array.current_stream())
    return host


def _place_rows(problem: Any, like: DeviceArray) -> None:
    """lengths and reset on the device. They are copied once; the tape's later calls find them there."""
    if isinstance(problem.lengths, np.ndarray):
        problem.lengths = to_device(like, problem.lengths)
    if isinstance(problem.reset, np.ndarray):
        problem.reset = to_device(like, problem.reset.view(np.uint8))


def _kind(p: Arguments) -> str:
    """The type that a call computes in; x may be tokens."""
    return str(p.params[0][0].kind)


def _settings(tf32: bool) -> tuple[int, int]:
    """The route and how float32 is multiplied, in numbers."""
    return (-1 if _route is None else ROUTES.index(_route)), FLOAT32.index("tf32" if tf32 else _float32)


def _enough(call: Any, tape: DeviceArray | None) -> None:
    if tape is not None and tape.nbytes < call.tape_bytes:
        raise ValueError(f"fusedrnn: tape has {tape.nbytes} bytes; expected {call.tape_bytes}")


def _took(call: Any, problem: Problem, p: Arguments, which: str) -> None:
    setattr(_last, which, call.route)
    log.debug(
        "cuda: %s %s %s T=%d E=%d B=%d I=%d H=%d L=%d D=%d took route %s",
        *(problem.cell, which, _kind(p), problem.T, problem.E, problem.B, problem.I, problem.H, problem.L, problem.D),
        call.route,
    )


def new_tape(problem: Problem, p: Arguments) -> DeviceArray:
    """Memory for the tape of a call."""
    _place_rows(problem, p.x)
    call = _call(_extension.Forward, problem, p, Results(), True, *_settings(False))
    return bytes_like(p.x, call.tape_bytes)


def forward(problem: Problem, p: Arguments, out: Results, tape: DeviceArray | None, tf32: bool = False) -> None:
    _place_rows(problem, p.x)
    call = _call(_extension.Forward, problem, p, out, tape is not None, *_settings(tf32))
    _enough(call, tape)
    memory = bytes_like(p.x, call.workspace_bytes)
    _call(call.run, tape.pointer if tape else 0, memory.pointer, p.x.current_stream())
    _took(call, problem, p, "forward")


def backward(problem: Problem, p: Arguments, tape: DeviceArray, g: Results, dp: Arguments, tf32: bool = False) -> None:
    call = _call(_extension.Backward, problem, p, g, dp, *_settings(tf32))
    _enough(call, tape)
    memory = bytes_like(p.x, call.workspace_bytes)
    _call(call.run, tape.pointer, memory.pointer, p.x.current_stream())
    _took(call, problem, p, "backward")


def _tangents(name: str, problem: Problem, p: Arguments, *args: Any) -> None:
    kind = _kind(p)
    if kind not in ("float32", "float64"):
        raise NotImplementedError(
            f"fusedrnn: {name} of {kind} on a CUDA device: the CUDA kernels have tangents in float32 and float64"
        )
    _place_rows(problem, p.x)
    call = _call(getattr(_extension, name.capitalize()), problem, p, *args)
    memory = bytes_like(p.x, call.workspace_bytes)
    _call(call.run, memory.pointer, p.x.current_stream())


def jvp(problem: Problem, p: Arguments, v: Arguments, tout: Results) -> None:
    _tangents("jvp", problem, p, v, tout)


def hvp(
    problem: Problem, p: Arguments, v: Arguments, g: Results, t: Results, tdp: Arguments, tout: Results | None = None
) -> None:
    _tangents("hvp", problem, p, v, g, t, tdp, tout)


# Clipping.


def clip_norm(arrays: Sequence[DeviceArray], norm_type: float, max_norm: float) -> DeviceArray:
    """The common norm, as a float64 array () on the device; with max_norm >= 0 the arrays are scaled."""
    like = arrays[0]
    norm = like.new((), np.float64)
    memory = bytes_like(like, _extension.clip_workspace_bytes(arrays))
    _call(_extension.clip_norm, arrays, norm_type, max_norm, norm.pointer, memory.pointer, like.stream)
    return norm


def clip_value(arrays: Sequence[DeviceArray], limit: float) -> None:
    _call(_extension.clip_value, arrays, limit, arrays[0].stream)


def ctc(
    log_probs: DeviceArray, labels: Any, first: Any, label_counts: Any, lengths: Any, blank: int, zero_infinity: bool,
    loss: DeviceArray, dloss: Any = None, dlog_probs: Any = None,
) -> None:  # fmt: skip
    """As _core.ctc; labels and the lists of rows come from the host."""
    host = labels if len(labels) else np.zeros(1, np.int64), first, label_counts, lengths
    lists = tuple(to_device(log_probs, a) for a in host)
    most, longest = (int(a.max(initial=0)) for a in (label_counts, lengths))
    call = _call(
        _extension.Ctc, log_probs, lists, blank, zero_infinity, loss, dloss, dlog_probs, most, longest
    )  # fmt: skip
    memory = bytes_like(log_probs, call.workspace_bytes)
    _call(call.run, memory.pointer, log_probs.stream)
