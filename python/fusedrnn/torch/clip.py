# SPDX-License-Identifier: Apache-2.0
"""torch.nn.utils' gradient clipping in one pass of the native kernels, with float64 sums.

Signatures and results are torch's. What is no plain float32 or float64 tensor on a CPU goes to torch's own functions;
so do norms of order 0 and below. `foreach` chooses between two ways of torch's, and counts only there. A norm has
torch's dtype, the widest of the gradients'; but float64 where float32 cannot hold it (torch's is inf then, and the
clipped gradients are 0).
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .. import clip
from . import gate, private


def _listed(tensors: Tensor | Iterable[Tensor]) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def _arrays(names: list[str], tensors: list[Tensor]) -> Any:
    """The tensors as NumPy sees them; None where it cannot."""
    # norms and clipping do the same to numbers that stand in memory with the other sign
    tensors = [private.neg_view(t) if gate.is_flipped(t) else t for t in tensors]
    if not gate.is_plain(*tensors):
        gate.check("clip", lambda: names, tensors)
        for name, tensor in zip(names, tensors, strict=True):
            if private.is_functional(tensor):  # torch's own code aborts the process
                gate.refuse_foreign("clip", name, tensor)
        return None
    if any(t.dtype not in (torch.float32, torch.float64) for t in tensors):
        return None
    return [gate.array("clip", name, t) for name, t in zip(names, tensors, strict=True)]


def _gradients(parameters: list[Tensor]) -> tuple[list[Tensor], Any]:
    """The gradients that are there, and their arrays."""
    found = [(f"gradient {n}", p.grad) for n, p in enumerate(parameters) if p.grad is not None]
    gradients = [gradient for _, gradient in found]
    return gradients, _arrays([name for name, _ in found], gradients)


def _written(tensors: list[Tensor]) -> None:
    """Tell autograd, as every in-place operation does."""
    torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])


def _norm(function: str, arrays: Any, norm_type: float, error_if_nonfinite: bool) -> float:
    norm = clip.norm_of(arrays, norm_type)
    if error_if_nonfinite:
        try:
            clip.refuse_nonfinite(function, "all gradients together", norm)
        except FloatingPointError as error:
            raise RuntimeError(str(error)) from None  # torch's type
    return norm


def _tensor(norm: float, tensors: list[Tensor]) -> Tensor:
    if not tensors:
        return torch.tensor(0.0)
    wide = any(t.dtype == torch.float64 for t in tensors) or torch.finfo(torch.float32).max < norm < float("inf")
    return torch.tensor(norm, dtype=torch.float64 if wide else torch.float32, device="cpu")


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Scale the gradients so that their common norm is at most max_norm; the norm before. As torch.nn.utils has it.

    Raises RuntimeError for a norm that is not finite, with error_if_nonfinite; ValueError for max_norm < 0 or NaN.
    Nothing is changed then.

    >>> w = torch.ones(4, requires_grad=True)
    >>> (3 * w).sum().backward()
    >>> fusedrnn.torch.clip.clip_grad_norm_(w, 1.0)
    tensor(6.)
    """
    generator = isinstance(parameters, types.GeneratorType)
    parameters = _listed(parameters)
    if generator and not parameters:
        warnings.warn("clip_grad_norm_: parameters is an empty generator; nothing is clipped.", stacklevel=2)
    max_norm, norm_type = float(max_norm), float(norm_type)
    gradients, arrays = _gradients(parameters)
    if arrays is None or norm_type <= 0:
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach)
    clip.check_norm("clip_grad_norm_", max_norm, norm_type)
    arrays = [array for _, array in clip.leaves("clip_grad_norm_", arrays)]  # all are checked before one is changed
    norm = _norm("clip_grad_norm_", arrays, norm_type, error_if_nonfinite)
    clip.scale(arrays, norm, max_norm)
    _written(gradients)
    return _tensor(norm, gradients)


def get_total_norm(
    tensors: Tensor | Iterable[Tensor],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """The common norm of tensors, as torch.nn.utils.get_total_norm.

    >>> fusedrnn.torch.clip.get_total_norm([torch.tensor([3.0]), torch.tensor([4.0])])
    tensor(5.)
    """
    tensors, norm_type = _listed(tensors), float(norm_type)
    arrays = _arrays([f"tensor {n}" for n in range(len(tensors))], tensors)
    if arrays is None or norm_type <= 0:
        return torch.nn.utils.get_total_norm(tensors, norm_type, error_if_nonfinite, foreach)
    clip.check_norm("get_total_norm", 0.0, norm_type)
    return _tensor(_norm("get_total_norm", arrays, norm_type, error_if_nonfinite), tensors)


def clip_grads_with_norm_(
    parameters: Tensor | Iterable[Tensor], max_norm: float, total_norm: Tensor, foreach: bool | None = None
) -> None:
    """Scale the gradients, whose norm is known, as torch.nn.utils.clip_grads_with_norm_.

    >>> w = torch.ones(4, requires_grad=True)
    >>> (3 * w).sum().backward()
    >>> fusedrnn.torch.clip.clip_grads_with_norm_(w, 1.0, torch.tensor(6.0))
    >>> w.grad
    tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    parameters, max_norm = _listed(parameters), float(max_norm)
    gradients, arrays = _gradients(parameters)
    if arrays is None:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, total_norm, foreach)
        return
    clip.check_norm("clip_grads_with_norm_", max_norm, 2.0)
    arrays = [array for _, array in clip.leaves("clip_grads_with_norm_", arrays)]
    clip.scale(arrays, float(total_norm), max_norm)
    _written(gradients)


def clip_grad_value_(parameters: Tensor | Iterable[Tensor], clip_value: float, foreach: bool | None = None) -> None:
    """Clamp the gradients to [-clip_value, clip_value], as torch.nn.utils.clip_grad_value_.

    Raises ValueError for clip_value < 0 or NaN, before anything is changed.

    >>> w = torch.ones(2, requires_grad=True)
    >>> (3 * w).sum().backward()
    >>> fusedrnn.torch.clip.clip_grad_value_(w, 0.5)
    >>> w.grad
    tensor([0.5000, 0.5000])
    """
    parameters, clip_value = _listed(parameters), float(clip_value)
    gradients, arrays = _gradients(parameters)
    if arrays is None:
        torch.nn.utils.clip_grad_value_(parameters, clip_value, foreach)
        return
    clip.clip_grad_value_(arrays, clip_value)
    _written(gradients)
