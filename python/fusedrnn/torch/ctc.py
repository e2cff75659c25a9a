# SPDX-License-Identifier: Apache-2.0
"""torch.nn.functional.ctc_loss on the native kernels, and forced alignment of tensors."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import ctc
from . import functional, gate

_READ = (torch.float32, torch.float64)


def ctc_loss(
    log_probs: Tensor,
    targets: Any,
    input_lengths: Any,
    target_lengths: Any,
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> Tensor:
    """As torch.nn.functional.ctc_loss, arguments and result; fusedrnn.ctc_loss explains them.

    Tensors that are not float32 or float64 on the CPU go to torch's own. The gradient is torch's, but 0 instead of NaN
    at a class whose log-probability is -inf. There are no second derivatives (torch has none either): asking for them
    is an error.

    >>> log_probs = torch.zeros(3, 1, 2).log_softmax(2).requires_grad_()
    >>> loss = fusedrnn.torch.ctc_loss(log_probs, torch.tensor([[1]]), [3], [1])
    >>> loss.backward()
    >>> log_probs.grad.shape
    torch.Size([3, 1, 2])
    """
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"ctc_loss: reduction is {reduction!r}; expected 'none', 'mean' or 'sum'.")
    given = log_probs, targets, input_lengths, target_lengths
    gate.check("ctc_loss", lambda: _NAMES, given)
    if log_probs.device.type != "cpu" or log_probs.dtype not in _READ or log_probs.layout != torch.strided:
        why = f"{log_probs.dtype} {log_probs.layout} on {log_probs.device.type}"
    else:
        tensors = [tensor for tensor in given if isinstance(tensor, Tensor)]
        why = "" if gate.has_memory_of_its_own(tensors) else "a tensor without memory of its own"
    if why:
        functional.set_route(f"torch.nn.functional: {why}")
        return torch.nn.functional.ctc_loss(*given, blank, reduction, zero_infinity)
    functional.set_route("fused")
    loss: Tensor = gate.call(_fused, given, *given, blank, reduction, zero_infinity)
    return loss


_NAMES = ("log_probs", "targets", "input_lengths", "target_lengths")


def _fused(log_probs: Tensor, targets: Any, input_lengths: Any, target_lengths: Any, *options: Any) -> Tensor:
    blank, reduction, zero_infinity = options
    scores, labels = gate.array("ctc_loss", "log_probs", log_probs), _numpy("ctc_loss", "targets", targets)
    lengths = _numpy("ctc_loss", "input_lengths", input_lengths), _numpy("ctc_loss", "target_lengths", target_lengths)
    call = ctc.checked("ctc_loss", scores, labels, *lengths, blank, zero_infinity)
    loss: Tensor = _Loss.apply(log_probs, call)
    if reduction == "sum":
        return loss.sum()
    if reduction == "mean":
        counts = torch.from_numpy(call.label_counts).clamp(min=1).to(loss.dtype)
        return (loss / (counts[0] if call.single else counts)).mean()
    return loss


def ctc_align(
    log_probs: Tensor, targets: Any, input_lengths: Any = None, target_lengths: Any = None, blank: int = 0
) -> ctc.Alignment:
    """fusedrnn.ctc_align, which explains it, for tensors: an `Alignment` of tensors on log_probs' device.

    log_probs float32 or float64 on the CPU is read where it lies. Any other is copied: to the CPU, and to float32 where
    it is of less than 32 bits; scores and log_probability are then float32. Nothing is recorded for gradients.

    >>> log_probs = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.5, 0.1, 0.4]]).log()
    >>> fusedrnn.torch.ctc_align(log_probs, torch.tensor([1, 2])).path
    tensor([0, 1, 2])
    """
    given = log_probs, targets, input_lengths, target_lengths
    gate.check("ctc_align", lambda: _NAMES, given)
    path, *rest = gate.call(_aligned, given, *given, blank)
    return ctc.Alignment(path, *rest)


def _aligned(
    log_probs: Tensor, targets: Any, input_lengths: Any, target_lengths: Any, blank: int
) -> tuple[Tensor, ...]:
    """The fields of an Alignment: gate.call knows tuples of tensors."""
    if log_probs.device.type == "cpu" and log_probs.dtype in _READ and log_probs.layout == torch.strided:
        functional.set_route("fused")
    else:
        functional.set_route(f"fused, on a copy: {log_probs.dtype} {log_probs.layout} on {log_probs.device.type}")
    data = gate.values("ctc_align", "log_probs", log_probs).cpu()
    data = data.float() if data.dtype.is_floating_point and data.dtype not in _READ else data
    others = zip(_NAMES[1:], (targets, input_lengths, target_lengths), strict=True)
    labels, *lengths = (_numpy("ctc_align", name, value) for name, value in others)
    found = ctc.ctc_align(data.numpy(), labels, lengths[0], lengths[1], blank)
    arrays = (getattr(found, field.name) for field in dataclasses.fields(found))
    return tuple(torch.from_numpy(array).clone().to(log_probs.device) for array in arrays)


def _numpy(door: str, name: str, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    value = gate.values(door, name, value).cpu()  # torch takes labels and lengths of any dtype
    return (value.long() if value.dtype.is_floating_point or value.dtype == torch.bool else value).numpy()


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_probs: Tensor, call: ctc.CtcCall) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(log_probs)  # this notices changes in place
        loss = torch.empty(call.log_probs.shape[1], dtype=log_probs.dtype)
        call.run(gate.array("ctc_loss", "loss", loss), None, None)
        return loss[0] if call.single else loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, None]:
        (log_probs,) = ctx.saved_tensors
        return _Gradient.apply(dloss, log_probs, ctx.call), None


class _Gradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dloss: Tensor, log_probs: Tensor, call: ctc.CtcCall) -> Tensor:
        shape, dtype = call.log_probs.shape, log_probs.dtype
        dlog_probs, loss = torch.empty(shape, dtype=dtype), torch.empty(shape[1], dtype=dtype)
        scores = gate.array("backward of ctc_loss", "log_probs", log_probs).reshape(shape)  # it may lie elsewhere now
        weights = np.ascontiguousarray(gate.array("backward of ctc_loss", "dloss", dloss).reshape(-1))
        dataclasses.replace(call, log_probs=scores).run(
            gate.array("ctc_loss", "loss", loss), weights, gate.array("ctc_loss", "dlog_probs", dlog_probs)
        )
        return dlog_probs[:, 0] if call.single else dlog_probs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            "ctc_loss: asked for second derivatives; expected first ones only, as CTC has no others here."
        )
