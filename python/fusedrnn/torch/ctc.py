# SPDX-License-Identifier: Apache-2.0
"""torch.nn.functional.ctc_loss on the native kernels, and forced alignment of tensors."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from .. import ctc
from . import functional
from .kernels import DTYPES

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
    if log_probs.device.type != "cpu" or log_probs.dtype not in DTYPES or log_probs.layout != torch.strided:
        functional.set_route(f"torch.nn.functional: {log_probs.dtype} {log_probs.layout} on {log_probs.device.type}")
        return torch.nn.functional.ctc_loss(
            log_probs, targets, input_lengths, target_lengths, blank, reduction, zero_infinity
        )
    functional.set_route("fused")
    given = _numpy(targets), _numpy(input_lengths), _numpy(target_lengths)
    call = ctc.checked("ctc_loss", log_probs.detach().numpy(), *given, blank, zero_infinity)
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
    data = log_probs.detach()
    if data.device.type == "cpu" and data.dtype in _READ and data.layout == torch.strided:
        functional.set_route("fused")
    else:
        functional.set_route(f"fused, on a copy: {data.dtype} {data.layout} on {data.device.type}")
        data = (data if data.layout == torch.strided else data.to_dense()).cpu()
        data = data.float() if data.dtype.is_floating_point and data.dtype not in _READ else data
    given = _numpy(targets), _numpy(input_lengths), _numpy(target_lengths)
    found = ctc.ctc_align(data.numpy(), *given, blank)
    made = {f.name: torch.from_numpy(getattr(found, f.name)).to(log_probs.device) for f in fields(found)}
    return ctc.Alignment(**made)


def _numpy(value: Any) -> Any:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else value


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_probs: Tensor, call: ctc.Call) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(log_probs)  # call.log_probs lies in its memory; this notices changes in place
        loss = log_probs.new_empty(call.log_probs.shape[1])
        call.run(loss.numpy(), None, None)
        return loss[0] if call.single else loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, None]:
        (log_probs,) = ctx.saved_tensors
        return _Gradient.apply(dloss, log_probs, ctx.call), None


class _Gradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dloss: Tensor, log_probs: Tensor, call: ctc.Call) -> Tensor:
        shape = call.log_probs.shape
        dlog_probs, loss = log_probs.new_empty(shape), log_probs.new_empty(shape[1])
        call.run(loss.numpy(), dloss.detach().reshape(-1).contiguous().numpy(), dlog_probs.numpy())
        return dlog_probs[:, 0] if call.single else dlog_probs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            "ctc_loss: asked for second derivatives; expected first ones only, as CTC has no others here."
        )
