# SPDX-License-Identifier: Apache-2.0
"""torch.nn.utils' gradient clipping in one pass of the native kernels, with float64 sums."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .. import clip
from . import gate


def _gradients(parameters: Tensor | Iterable[Tensor]) -> tuple[list[Tensor], bool]:
    """The gradients, and whether NumPy can see all of them."""
    given = [parameters] if isinstance(parameters, Tensor) else parameters
    gradients = [p.grad for p in given if p.grad is not None]
    # both functions do the same to numbers that stand in memory with the other sign
    gradients = [torch._neg_view(g) if gate.is_flipped(g) else g for g in gradients]
    if gate.is_plain(*gradients):
        return gradients, all(g.dtype in (torch.float32, torch.float64) for g in gradients)
    names = [f"gradient {n}" for n in range(len(gradients))]
    gate.check("clip", lambda: names, gradients)
    for name, gradient in zip(names, gradients, strict=True):
        if torch._is_functional_tensor(gradient):  # torch's own code aborts the process
            gate.refuse_foreign("clip", name, gradient)
    return gradients, False


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
) -> Tensor:
    """As torch.nn.utils.clip_grad_norm_, which it calls for gradients that are not plain CPU tensors.

    >>> w = torch.ones(4, requires_grad=True)
    >>> (3 * w).sum().backward()
    >>> fusedrnn.torch.clip.clip_grad_norm_(w, 1.0)
    tensor(6.)
    """
    gradients, plain = _gradients(parameters := [parameters] if isinstance(parameters, Tensor) else list(parameters))
    if not plain or not gradients:
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite)
    try:
        norm = clip.clip_grad_norm_(
            [gate.array("clip", "a gradient", g) for g in gradients], max_norm, norm_type, error_if_nonfinite
        )
    except FloatingPointError as error:
        raise RuntimeError(str(error)) from None  # torch's type
    return torch.tensor(norm, dtype=gradients[0].dtype)


def clip_grad_value_(parameters: Tensor | Iterable[Tensor], clip_value: float) -> None:
    """As torch.nn.utils.clip_grad_value_, which it calls for gradients that are not plain CPU tensors."""
    gradients, plain = _gradients(parameters := [parameters] if isinstance(parameters, Tensor) else list(parameters))
    if not plain:
        torch.nn.utils.clip_grad_value_(parameters, clip_value)
        return
    views: Any = [gate.array("clip", "a gradient", g) for g in gradients]
    clip.clip_grad_value_(views, float(clip_value))
