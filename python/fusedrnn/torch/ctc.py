# SPDX-License-Identifier: Apache-2.0
"""torch.nn.functional.ctc_loss on the native kernels."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import ctc
from . import functional, gate


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
    if log_probs.device.type != "cpu" or log_probs.dtype not in _DTYPES or log_probs.layout != torch.strided:
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
_DTYPES = (torch.float32, torch.float64)


def _fused(log_probs: Tensor, targets: Any, input_lengths: Any, target_lengths: Any, *options: Any) -> Tensor:
    blank, reduction, zero_infinity = options
    scores, labels = gate.array("ctc_loss", "log_probs", log_probs), _numpy("targets", targets)
    lengths = _numpy("input_lengths", input_lengths), _numpy("target_lengths", target_lengths)
    call = ctc.checked("ctc_loss", scores, labels, *lengths, blank, zero_infinity)
    loss: Tensor = _Loss.apply(log_probs, call)
    if reduction == "sum":
        return loss.sum()
    if reduction == "mean":
        counts = torch.from_numpy(call.label_counts).clamp(min=1).to(loss.dtype)
        return (loss / (counts[0] if call.single else counts)).mean()
    return loss


def _numpy(name: str, value: Any) -> Any:
    return gate.values("ctc_loss", name, value).cpu().numpy() if isinstance(value, Tensor) else value


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_probs: Tensor, call: ctc.Call) -> Tensor:
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
    def forward(ctx: Any, dloss: Tensor, log_probs: Tensor, call: ctc.Call) -> Tensor:
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
