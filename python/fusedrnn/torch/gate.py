# SPDX-License-Identifier: Apache-2.0
"""The gate to torch's memory: every pointer that a kernel gets was asked for here, or by the same rules in C++.

A torch tensor need not be what its memory holds. Its numbers may stand there with the other sign (the negative bit,
from `torch.conj(z).imag`) or not at all (zeros that forward-mode AD makes). Its storage may be shorter than it needs:
offloading frees weights by `untyped_storage().resize_(0)`. A subclass or a wrapper may have no memory of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import handle_torch_function
from torch.utils.dlpack import from_dlpack

from .. import backends
from . import private

native: Any = backends.load("native")
_Plain = (Tensor, torch.nn.Parameter)


def _samples() -> tuple[tuple[Any, ...], ...]:
    """Tensors of many kinds, each with what torch says of it: see torch_setup in _core.pyi."""
    given = torch.arange(41.0)
    tensors = [given, given[3:], torch.nn.Parameter(torch.ones(5, 7))]
    tensors += [
        torch.frombuffer(bytearray(264), dtype=torch.int8),
        private.neg_view(torch.ones(17)),
        torch.ones(3, dtype=torch.complex64).conj(),
        torch.ones(2, 9).T,
    ]
    with torch.inference_mode():
        tensors.append(torch.ones(11, dtype=torch.float64))
    samples = []
    for tensor in tensors:
        storage = tensor.untyped_storage()
        places = private.address(tensor), private.dispatch_keys(tensor), private.address(storage)
        samples.append((tensor, *places, storage.data_ptr(), storage.nbytes()))
    return tuple(samples)


def _set_up() -> bool:
    interface = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if native is None or interface is None:
        return False
    ordinary = private.dispatch_keys(torch.ones(1))
    return bool(native.torch_setup(interface, *_Plain, _samples(), ordinary))


is_open = _set_up()
"""Whether C++ can read torch's tensors by itself."""


def is_plain(*tensors: Any) -> bool:
    """Whether each is None or a CPU tensor, of no subclass, that is what its memory holds."""
    if is_open:
        return native.torch_plain(*tensors)  # type: ignore[no-any-return]
    return all(t is None or _is_plain(t) for t in tensors)


def _is_plain(tensor: Any) -> bool:
    if type(tensor) not in _Plain or is_foreign(tensor) or _is_wrapped(tensor):
        return False
    if tensor.device.type != "cpu" or tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized:
        return False
    if tensor.is_neg() or tensor.is_conj() or private.is_zero_tensor(tensor):
        return False
    needed, there = _bytes(tensor)
    return needed <= there


def _is_wrapped(tensor: Any) -> bool:
    """By a transform of torch.func, or by torch's first vmap, which gradcheck still uses."""
    return private.is_wrapped(tensor) or private.is_wrapped_by_old_vmap(tensor)


def is_flipped(tensor: Tensor) -> bool:
    """Whether the numbers stand in memory with the other sign, and nothing else is unusual."""
    return type(tensor) in _Plain and tensor.is_neg() and not tensor.is_complex() and is_plain(private.neg_view(tensor))


def is_foreign(tensor: Any) -> bool:
    """Whether the tensor's numbers are the affair of other code: a subclass with __torch_dispatch__, as torch's
    FakeTensor is, or a tensor in the making of a functional program."""
    if not isinstance(tensor, Tensor) or (type(tensor) in _Plain and not private.is_functional(tensor)):
        return False
    return type(tensor).__torch_dispatch__ is not private.no_dispatch or private.is_functional(tensor)


def has_memory_of_its_own(tensors: Sequence[Any]) -> bool:
    """Whether `values` can give all of them: they are neither foreign nor wrapped by a transform."""
    return is_plain(*tensors) or not any(t is not None and (is_foreign(t) or _is_wrapped(t)) for t in tensors)


def call(function: Callable[..., Any], tensors: Sequence[Any], *arguments: Any) -> Any:
    """function(*arguments), as torch calls its own: a subclass among the tensors that has a say in torch's functions
    (__torch_function__) is asked, and makes of the results what it makes of torch's."""
    if torch.compiler.is_compiling() or is_plain(*tensors) or not private.torch_functions_enabled():
        return function(*arguments)
    overriding = [
        t
        for t in tensors
        if isinstance(t, Tensor) and type(t) not in _Plain and type(t).__torch_function__ is not private.no_function
    ]
    return handle_torch_function(function, overriding, *arguments) if overriding else function(*arguments)


def check(door: str, names: Callable[[], Sequence[str]], tensors: Sequence[Any]) -> None:
    """Raise RuntimeError for a tensor whose storage is shorter than it needs, and for one on the meta device beside a
    first one that has numbers: torch would read what is not there. All else may pass; `values` reads it.
    names: makes the tensors' names, when they are needed."""
    if torch.compiler.is_compiling() or is_plain(*tensors):
        return
    first = tensors[0] if tensors else None
    for name, tensor in zip(names(), tensors, strict=True):
        if not isinstance(tensor, Tensor):
            continue
        if tensor.is_nested and tensor is not first:
            refuse_foreign(door, name, tensor)
        if tensor.is_meta and isinstance(first, Tensor) and not (first.is_meta or is_foreign(first)):
            raise RuntimeError(
                f"{door}: {name} is on the meta device, without numbers; expected {first.device}, where {names()[0]} "
                "is. Give it numbers before the call: to_empty, or load_state_dict(assign=True)."
            )
        while private.is_wrapped(tensor):
            tensor = private.unwrap(tensor)
        with private.WithoutSubclasses():
            needed, there = _bytes(tensor)
        if needed > there:
            raise RuntimeError(
                f"{door}: {name} of shape {tuple(tensor.shape)} has a storage of {there} bytes; expected {needed} at "
                "least. Its memory was freed or cut (untyped_storage().resize_, as offloading does it): bring it back "
                "before the call, and keep it until after backward."
            )


def _bytes(tensor: Tensor) -> tuple[int, int]:
    """What the elements reach up to, and what the storage has."""
    if (
        is_foreign(tensor)
        or tensor.device.type == "meta"
        or tensor.layout != torch.strided
        or tensor.is_nested
        or private.is_zero_tensor(tensor)
        or not tensor.numel()
    ):
        return 0, 0
    reach: int = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    storage = tensor.untyped_storage()
    return (int(tensor.storage_offset()) + reach + 1) * tensor.element_size(), storage.nbytes()


def refuse_foreign(door: str, name: str, tensor: Any) -> None:
    """Raise TypeError for a tensor that has no numbers to read."""
    if isinstance(tensor, Tensor) and (is_foreign(tensor) or tensor.is_nested or tensor.is_quantized):
        raise TypeError(
            f"{door}: {name} is a {type(tensor).__name__} with no numbers in memory that a kernel could read; expected "
            "an ordinary dense tensor. Make one of it before the call."
        )


def dense(tensor: Tensor) -> Tensor:
    """The tensor in ordinary layout: a gradient may come in as a sparse one."""
    return tensor if tensor.layout == torch.strided else tensor.to_dense()


def values(door: str, name: str, tensor: Tensor) -> Tensor:
    """A tensor like this one, detached, whose memory holds its numbers: now pointers to it may be taken.

    It has the same memory where that is possible, but a storage of its own: one that NumPy has looked at cannot be
    resized any more, and offloading resizes those of weights.
    """
    alias: Tensor | None = native.torch_alias(tensor) if is_open else None
    if alias is not None:
        return alias
    refuse_foreign(door, name, tensor)
    check(door, lambda: [name], (tensor,))
    with private.WithoutSubclasses():
        tensor = dense(tensor.detach())
        tensor = tensor.clone() if private.is_zero_tensor(tensor) else tensor.resolve_conj().resolve_neg()
        return from_dlpack(private.to_dlpack(tensor)) if tensor.is_cpu else tensor  # type: ignore[no-any-return]


def array(door: str, name: str, tensor: Tensor) -> np.ndarray:
    """A view of a CPU tensor for reading; a copy where its memory holds other numbers."""
    return values(door, name, tensor).numpy()
