# SPDX-License-Identifier: Apache-2.0
"""Every private name of torch that this package uses, behind a word of ours: the one file to mend for another torch.

Most are the functions themselves, because a call in between would cost as much as they do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._C import _functorch
from torch._functorch import utils as _functorch_utils
from torch.autograd import forward_ad

_C: Any = torch._C

# What looks on, so that a call must go the long way. torch has no public question for any of these.

transforms_active = _C._are_functorch_transforms_active  # torch.func's
any_requires_grad = _C._any_requires_grad  # in C++, where a Python loop over the weights takes 0.5 us
torch_functions_enabled = _C._is_torch_function_enabled  # not inside of a __torch_function__
forward_grad_enabled = _C._is_fwd_grad_enabled  # inside of derivative rules it is off
_dispatch_modes, _function_mode = _C._len_torch_dispatch_stack, _C._is_torch_function_mode_enabled
_any_autocast, tracing_state = _C._is_any_autocast_enabled, _C._get_tracing_state


def in_dual_level() -> bool:
    """Whether forward-mode derivatives may be at work: tensors do not tell of tangents as cheaply."""
    return forward_ad._current_level >= 0


def watched() -> bool:
    """Whether a mode or a tracer looks on, which must see operators."""
    return bool(_dispatch_modes()) or tracing_state() is not None


def unusual() -> bool:
    """Whether anything but torch.func may look on or change dtypes: one call for all, made before every short one."""
    return (
        forward_ad._current_level >= 0
        or _dispatch_modes()
        or _function_mode()
        or _any_autocast()
        or tracing_state() is not None
    )


# vmap, unwrapped by hand: torch's own way over trees takes longer than a small kernel.

transform_depth = _functorch.get_dynamic_layer_stack_depth
pop_transform, push_transform = _functorch.pop_dynamic_layer_stack, _functorch.push_dynamic_layer_stack
is_batched = _functorch.is_batchedtensor
unwrap_batched, add_batch_dim = _functorch._unwrap_batched, _functorch._add_batch_dim
unwrap_dead = _functorch_utils.unwrap_dead_wrappers  # of transforms that have ended, in a tuple
unwrap = _functorch.get_unwrapped  # of one transform
is_wrapped = _functorch.is_functorch_wrapped_tensor  # by any transform
is_wrapped_by_old_vmap = _functorch.is_legacy_batchedtensor  # gradcheck still uses torch's first one


def innermost_vmap() -> tuple[int, Any] | None:
    """Level and batch size of the innermost transform if it is a vmap, else None."""
    interpreter = _functorch.peek_interpreter_stack()
    if interpreter.key() != _functorch.TransformType.Vmap:
        return None
    vmap = _functorch.CVmapInterpreterPtr(interpreter)  # points into `interpreter`, which must live as long
    return vmap.level(), vmap.batchSize()


# Tensors whose memory does not hold their numbers: what the gate must know.

neg_view = torch._neg_view  # the same memory, read with the other sign
is_functional = torch._is_functional_tensor  # in the making of a functional program; reading it aborts the process
to_dlpack = _C._to_dlpack  # without the refusals of the public one
WithoutSubclasses = _C.DisableTorchFunctionSubclass  # a subclass must not hear that we measure its storage
no_dispatch, no_function = _C._disabled_torch_dispatch_impl, _C._disabled_torch_function_impl  # of no subclass


def is_zero_tensor(tensor: Any) -> bool:
    """Whether it stands for zeros and has no memory: forward-mode AD makes such."""
    return tensor._is_zerotensor()  # type: ignore[no-any-return]


def dispatch_keys(tensor: Any) -> int:
    """The bits by which C++ tells plain tensors from others."""
    return _C._dispatch_keys(tensor).raw_repr()  # type: ignore[no-any-return]


def address(tensor_or_storage: Any) -> int:
    """Of the C++ object, in which torch_setup finds where torch keeps what."""
    return tensor_or_storage._cdata  # type: ignore[no-any-return]


# Operators below autograd: what torch.library.register_autograd does not do inside of transforms.

BelowAutograd, below_autograd_keys = _C._AutoDispatchBelowAutograd, _C._after_autograd_keyset

# torch.nn's own operators, which are functions of no public module, and what its modules keep.

_VF: Any = torch._VF  # type: ignore[attr-defined]


def pad_packed(data: Any, batch_sizes: Any) -> tuple[Any, Any]:
    """(T,B,n) and lengths from the data of a PackedSequence."""
    return _VF._pad_packed_sequence(data, batch_sizes, False, 0.0, len(batch_sizes))  # type: ignore[no-any-return]


def pack_padded(padded: Any, lengths: Any) -> Any:
    """The data of a PackedSequence from (T,B,n)."""
    return _VF._pack_padded_sequence(padded, lengths, False)[0]


def recurrent_operator(cell: str) -> Any:
    """torch's own lstm, gru, rnn_tanh or rnn_relu."""
    return getattr(_VF, cell)


def weight_names(module: nn.RNNBase) -> list[str]:
    """In torch.nn's order. A module that is parametrized has no parameters of these names, but attributes."""
    return module._flat_weights_names


def weights(module: nn.RNNBase) -> list[Any]:
    """The parameters themselves, without nn.Module's slow look-up; KeyError where it is parametrized."""
    parameters = module._parameters
    return [parameters[name] for name in module._flat_weights_names]


def cell_weights(module: nn.RNNCellBase) -> list[Any]:
    """The same of a cell: W, R and, with bias, bW, bR."""
    parameters = module._parameters
    found = [parameters["weight_ih"], parameters["weight_hh"], parameters["bias_ih"], parameters["bias_hh"]]
    return found if found[2] is not None else found[:2]


def on_gpu(module: nn.RNNBase) -> bool:
    """Whether cuDNN, which wants its weights in one piece, may run the module."""
    kept = module._flat_weights
    return bool(kept and isinstance(kept[0], torch.Tensor) and kept[0].is_cuda)


def onednn_multiplies_bfloat16() -> bool:
    """Whether this processor has the instructions that oneDNN asks for."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()  # type: ignore[no-any-return]


# torch.jit's tracer.

set_tracing_state = _C._set_tracing_state  # None: it does not see what happens next


def set_absent(value: Any) -> Any:
    """A constant of the exporter's graph as the optional input that is not there."""
    value.setType(_C.OptionalType.ofTensor())
    return value
