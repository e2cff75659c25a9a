# SPDX-License-Identifier: Apache-2.0
"""The ways out of torch: what torch.onnx, torch.jit, torch.fx, torch.ao and exported programs make of our modules.

torch.onnx.export writes ONNX's own nodes (see onnx_nodes). torch.jit.trace records torch's operators, so that the
trace runs where fusedrnn is not installed. To torch.fx our modules are leaves, as torch.nn's are. Whoever
looks for torch.nn's classes themselves (torch.jit.script, torch.ao) needs `restore` first, and is told so.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import composite, how, onnx_nodes, operators, private
from .how import How

ONNX, TRACE, FX = "torch.onnx.export", "torch.jit.trace", "torch.fx"

# The tracer warns of every size that Python looks at. Ours only check; torch silences its own modules in the same way.
warnings.filterwarnings("ignore", category=torch.jit.TracerWarning, module=r"fusedrnn\.torch")  # type: ignore[attr-defined]


def exit_of(input: Any) -> str:
    """By which way out a call leaves torch; "" if by none."""
    if torch.compiler.is_compiling():
        return ONNX if not torch.compiler.is_dynamo_compiling() and onnx_nodes.writing() else ""
    if private.tracing_state() is not None:
        return ONNX if onnx_nodes.writing() else TRACE
    return FX if isinstance(input, fx.Proxy) else ""


def leaf(module: nn.Module, input: fx.Proxy, hx: Any, **options: Any) -> fx.Proxy:
    """The call of a module as one node of torch.fx's graph."""
    tracer: Any = input.tracer
    target = tracer.path_of_module(module)
    if not target:
        raise TypeError(
            f"torch.fx: {type(module).__name__} is the model itself; expected a model that holds it. "
            "A leaf cannot be looked into: wrap it, e.g. torch.nn.Sequential(module)."
        )
    given = {name: value for name, value in options.items() if value is not None}
    proxy: fx.Proxy = tracer.create_proxy("call_module", target, (input,) if hx is None else (input, hx), given)
    return proxy


def record(
    settings: How, x: Tensor, states: Sequence[Tensor | None], weights: Sequence[Tensor], more: Any, dropout: float
) -> tuple[Tensor, ...]:
    """For torch.jit.trace: all results by torch's own operators. more: lengths and reset, which those do not have."""
    missing = {
        "clip_cell": settings.clip_cell,
        "clip_grad": settings.clip_grad,
        "lengths": more[0] is not None,
        "reset": more[1] is not None,
        "return_cells": settings.cells,
        "reverse": settings.reverse,
        "reset_after=False": settings.facts.two_products,
    }
    for name, given in missing.items():
        if given:
            raise ValueError(
                f"{TRACE}: {name} is set; expected none: a trace holds torch's own operators, which do not have it. "
                "Use torch.export.export, or for rows of different lengths a PackedSequence."
            )
    S, B = settings.layers * settings.directions, x.shape[1]
    units = (weights[1].shape[-1], weights[1].shape[0] // settings.facts.gates)
    first = [x.new_zeros(S, B, n) if s is None else s for s, n in zip(states, units, strict=False)]
    operator = private.recurrent_operator(settings.cell)
    options = (settings.bias, settings.layers, dropout, dropout > 0, settings.directions == 2, False)
    results: tuple[Tensor, ...] = operator(x, first if settings.states == 2 else first[0], list(weights), *options)
    return results


class Scriptable:
    """What torch.jit.script and torch.ao ask modules for."""

    qconfig: Any

    def __prepare_scriptable__(self) -> Any:
        raise RuntimeError(
            f"torch.jit.script: the model has a fusedrnn.torch.{type(self).__name__}, which cannot be scripted. Call "
            "fusedrnn.torch.restore(model) first: it is torch.nn's again, with the same parameters."
        )


class _QConfig:
    """The attribute that torch.ao.quantization sets on every module of a model: the place to say what it cannot see."""

    def __get__(self, module: Any, owner: Any) -> Any:
        try:
            return module.__dict__["qconfig"]
        except (AttributeError, KeyError):
            raise AttributeError("qconfig") from None

    def __set__(self, module: Any, value: Any) -> None:
        module.__dict__["qconfig"] = value
        name = type(module).__name__
        warnings.warn(
            f"torch.ao.quantization leaves fusedrnn.torch.{name} as it is, because it looks for torch.nn.{name}. Call "
            "fusedrnn.torch.restore(model) first where it is to be quantized.",
            stacklevel=3,
        )

    def __delete__(self, module: Any) -> None:
        del module.__dict__["qconfig"]


Scriptable.qconfig = _QConfig()


def decompositions() -> dict[Any, Callable[..., tuple[Tensor, ...]]]:
    """{operator of fusedrnn: function of torch's own operators}, for ExportedProgram.run_decompositions: what comes
    out runs in every tool that reads ATen operators (ExecuTorch, OpenVINO, ...), without fusedrnn. The loop over time
    steps is unrolled, as torch.nn's is, so T must not be dynamic.

    >>> program = torch.export.export(fusedrnn.torch.GRU(3, 4), (torch.ones(5, 2, 3),))
    >>> plain = program.run_decompositions(fusedrnn.torch.decompositions())
    >>> "fusedrnn" in str(plain.graph)
    False
    """
    return {op: _decomposition for (name, _, _), op in operators._OPERATORS.items() if name == "forward"}


def _decomposition(*arguments: Any) -> tuple[Tensor, ...]:
    *p, lengths, reset, text = arguments
    settings = how.read(text)
    if isinstance(p[0].shape[0], torch.SymInt):
        raise ValueError(
            "decompositions: T is dynamic; expected a fixed number of steps: the loop is unrolled. "
            "Export without a dynamic T, or use torch.onnx.export, which keeps T free."
        )
    results = composite.forward(settings, lengths, reset, p)
    return operators.whole("forward", settings, (*results, None), p[0])
