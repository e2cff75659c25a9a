# SPDX-License-Identifier: Apache-2.0
"""Four operators, closed under differentiation, as torch wants them.

| operator | gives | reverse rule | forward rule |
|---|---|---|---|
| forward(p) | results, tape | backward | jvp |
| backward(p, tape, g) | gradients of p | hvp for p, jvp for g | hvp |
| jvp(p, v) | tangents of the results | hvp for p, backward for v | composite.Derivative |
| hvp(p, v, g, t) | tangents of the gradients | composite.Derivative | composite.Derivative |

(hvp serves backward's reverse rule too, because a Hessian is symmetric.) Each is an autograd.Function, which has the
rules, around an operator of torch.library, which has the kernel. Eager code applies the Function; torch.compile and
export see the operator, which applies the Function itself where derivatives or transforms are at work: so the rules are
the same everywhere. What must not change, because torch then gives wrong numbers in silence: a Function calls the
operator and not the kernel (linearize); each jvp rule is one apply (jvp of jvp); schemas are flat (is_grads_batched).

vmap is one call too: the new axis goes into E, outermost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import composite, cuda, flops, gate, how, kernels, onnx_nodes, private
from .how import How
from .private import any_requires_grad, transforms_active, unwrap_dead, watched
from .tape import computing, cuda_length, length

Tensors = tuple[Tensor | None, ...]

_library = torch.library.Library("fusedrnn", "DEF")
_NAMES = ("forward", "backward", "jvp", "hvp")


# What an operator's arguments are: (how, lengths, reset, *tensors); tensors in groups.


def _padded(settings: How, g: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(g) if settings.cells else (*g, None)


def _run(name: str, settings: How, lengths: Any, reset: Any, tensors: Sequence[Any]) -> tuple[Tensor, ...]:
    """The kernel."""
    parts = how.parts(name, settings, tensors)
    if tensors[0].is_cuda:
        return cuda.run(name, settings, lengths, reset, parts)
    if name == "backward":
        p, (tape,), g = parts
        return kernels.backward(settings, lengths, reset, p, tape, g)
    function: Callable[..., tuple[Tensor, ...]] = getattr(kernels, name)
    return function(settings, lengths, reset, *parts)


# Rules.


def _reduced(tensor: Any, like: Any, axis: int) -> Any:
    """A gradient over all weight sets as the gradient of an argument that they share."""
    if tensor is None or like is None or tensor.shape[axis] == like.shape[axis]:
        return tensor
    return tensor.sum(axis, keepdim=True)


def _placed(settings: How, wanted: str, values: Sequence[Any]) -> tuple[Any, ...]:
    """Wanted gradients, at their places among all p."""
    each = iter(values)
    return tuple(next(each) if digit == "1" else None for digit in wanted)


def _digits(needs: Sequence[bool]) -> str:
    return "".join("1" if need else "0" for need in needs)


def _once(settings: How) -> None:
    if settings.clip_grad:
        raise RuntimeError(
            "fusedrnn: clip_grad is set, and a clipped gradient has no second derivative in reverse mode. "
            "Use clip_grad=None where gradients of gradients are needed."
        )


def _reverse(
    name: str, settings: How, lengths: Any, reset: Any, saved: Tensors, needs: Any, u: Tensors
) -> tuple[Any, ...]:
    """Gradients of an operator's tensors from those of what it returns; `needs` says which."""
    if all(gradient is None for gradient in u):
        return (None,) * len(needs)
    if name == "forward":
        p, tape = saved[:-1], saved[-1]
        want = _digits(needs)
        g = u[: settings.results]
        if all(gradient is None for gradient in g):
            return (None,) * len(needs)
        down = settings.but(want=want)
        return _placed(settings, want, apply("backward", down, lengths, reset, *p, tape, *_padded(settings, g)))
    parts = how.parts(name, settings, saved)
    cut = how.cut(needs, how.groups(name, settings.states, settings.weights))
    if name == "backward":
        _once(settings)
        p, _, g = parts
        p, g = unwrap_dead(p), unwrap_dead(g)
        along = unwrap_dead(_placed(settings, settings.want, u))
        dp: tuple[Any, ...] = (None,) * len(p)
        dg: tuple[Any, ...] = (None,) * len(cut[2])
        none = (None,) * len(cut[2])
        want = _digits(cut[0])
        down = settings.but(want=want, each=False)
        alone = any(cut[0]) and _is_alone((*p, *along, *g)) and not watched()
        if alone:  # nobody asks for more derivatives: one pass for both
            both = kernels.hvp(down, lengths, reset, p, along, g, none[: len(g)], tout=any(cut[2]))
            dp, dg = _placed(settings, want, both), both[want.count("1") :] or dg
        elif any(cut[0]):
            dp = _placed(settings, want, apply("hvp", down, lengths, reset, *p, *along, *_padded(settings, g), *none))
        if any(cut[2]):
            if not alone:
                dg = apply("jvp", settings.but(want="", each=False), lengths, reset, *p, *along)
            dg = tuple(_reduced(*item) for item in zip(dg, g, settings.result_axes, strict=True))
            dg = tuple(d if need else None for d, need in zip(_padded(settings, dg), cut[2], strict=True))
        return (*dp, None, *dg)
    if name == "jvp":
        p, v = parts
        dp = dv = (None,) * len(p)
        none = (None,) * (2 + settings.states)
        u = _padded(settings, u)
        if any(cut[0]):
            want = _digits(cut[0])
            down = settings.but(want=want, each=False)
            dp = _placed(settings, want, apply("hvp", down, lengths, reset, *p, *v, *u, *none))
        if any(cut[1]):
            want = _digits(cut[1])
            down = settings.but(want=want, each=True)
            dv = _placed(settings, want, apply("backward", down, lengths, reset, *p, None, *u))
            dv = tuple(_reduced(*item) for item in zip(dv, v, settings.argument_axes, strict=True))
        return (*dp, *dv)
    wanted = tuple(n for n, need in enumerate(needs) if need)
    values = composite.pull(settings, (name,), lengths, reset, saved, wanted, u)
    return _placed(settings, _digits(needs), values)


def _forwards(name: str, settings: How, lengths: Any, reset: Any, saved: Tensors, tangents: Tensors) -> tuple[Any, ...]:
    """Tangents of what an operator returns from those of its tensors."""
    if name == "forward":
        down = settings.but(tape=False)
        return (*apply("jvp", down, lengths, reset, *saved[:-1], *tangents), None)
    if name == "backward":
        p, _, g = how.parts(name, settings, saved)
        v, _, t = how.parts(name, settings, tangents)
        result = apply("hvp", settings, lengths, reset, *p, *v, *_padded(settings, g), *_padded(settings, t))
        return result
    moved: tuple[Any, ...] = composite.push(settings, (name,), lengths, reset, saved, tangents)
    return moved


def _axes(name: str, settings: How) -> tuple[int, ...]:
    """Where E is, for each of an operator's tensors."""
    p = settings.argument_axes
    g = (1,) * (1 + settings.states) + (2,)
    return {"forward": p, "backward": (*p, 0, *g), "jvp": (*p, *p), "hvp": (*p, *p, *g, *g)}[name]


def _fold(tensor: Any, dim: int | None, axis: int, N: Any, E: Any) -> Any:
    """A tensor with a vmapped axis (or none) as one of N*E weight sets; a shared one stays shared."""
    if tensor is None or (dim is None and tensor.shape[axis] == 1):
        return tensor
    if dim is None:
        tensor = tensor.unsqueeze(axis)
        shape = list(tensor.shape)
        shape[axis] = N
        tensor = tensor.expand(shape)
    else:
        tensor = tensor.movedim(dim, axis)
    return kernels.spread(tensor, axis + 1, E).flatten(axis, axis + 1)


def _batched(
    name: str, N: Any, dims: Sequence[Any], settings: How, lengths: Any, reset: Any, tensors: Any
) -> tuple[Any, Any]:
    """vmap's rule; `dims` are those of lengths, reset and the tensors."""
    axes = (0, 1, *_axes(name, settings))
    everything = (lengths, reset, *tensors)
    E = 1
    for tensor, dim, axis in zip(everything, dims, axes, strict=True):
        if tensor is not None:
            at = axis if dim is None or dim > axis else axis + 1
            if tensor.shape[at] != 1:
                E = tensor.shape[at]
                break
    folded = [_fold(*item, N, E) for item in zip(everything, dims, axes, strict=True)]
    down = settings
    if name == "backward":
        place = 2 + settings.arguments
        tape = folded[place]
        if dims[place] is None or tape is None or tape.shape[0] != N * E:
            folded[place] = None  # made outside of this vmap, so of another shape: forward runs again
    if name in ("backward", "hvp"):
        down = settings.but(each=True)
    outputs = apply(name, down, *folded)
    if name in ("backward", "hvp"):
        p, p_dims = tensors[: settings.arguments], dims[2 : 2 + settings.arguments]
        kept = [n for n, digit in enumerate(settings.want) if digit == "1"]
        out_axes = [settings.argument_axes[n] for n in kept]
    else:
        out_axes = [*settings.result_axes, *([0] if name == "forward" else [])]
    results: list[Any] = []
    for n, (output, axis) in enumerate(zip(outputs, out_axes, strict=True)):
        if output is None:
            results.append(None)
            continue
        output = output.unflatten(axis, (N, output.shape[axis] // N))
        if name in ("backward", "hvp") and not settings.each and E != 1:
            like, dim = p[kept[n]], p_dims[kept[n]]
            if like.shape[axis if dim is None or dim > axis else axis + 1] == 1:
                output = output.sum(axis + 1, keepdim=True)
        results.append(output)
    return tuple(results), tuple(out_axes)


# Eager: Functions.


def _make_function(name: str) -> Any:
    def forward(text: str, lengths: Any, reset: Any, *tensors: Any) -> tuple[Any, ...]:
        settings = how.read(text)
        with private.BelowAutograd():
            return _call_operator(name, settings, lengths, reset, *tensors)

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        text, lengths, reset, *tensors = inputs
        ctx.text = text
        ctx.set_materialize_grads(False)
        if name == "forward":
            tensors.append(output[-1])
            ctx.mark_non_differentiable(output[-1])
        ctx.save_for_backward(lengths, reset, *tensors)
        ctx.save_for_forward(lengths, reset, *tensors)

    def backward(ctx: Any, *u: Any) -> tuple[Any, ...]:
        lengths, reset, *saved = ctx.saved_tensors
        needs = ctx.needs_input_grad[3:]
        gradients = _reverse(name, how.read(ctx.text), lengths, reset, tuple(saved), needs, u)
        return (None, None, None, *gradients)

    def jvp(ctx: Any, _: Any, __: Any, ___: Any, *tangents: Any) -> tuple[Any, ...]:
        lengths, reset, *saved = ctx.saved_tensors
        return _forwards(name, how.read(ctx.text), lengths, reset, tuple(saved), tangents)

    def vmap(info: Any, in_dims: Any, text: str, lengths: Any, reset: Any, *tensors: Any) -> tuple[Any, Any]:
        return _batched(name, info.batch_size, in_dims[1:], how.read(text), lengths, reset, tensors)

    functions = (forward, setup_context, backward, jvp, vmap)
    members = {function.__name__: staticmethod(function) for function in functions}
    return type(f"FusedRNN{name.capitalize()}", (torch.autograd.Function,), members)


_FUNCTIONS = {name: _make_function(name) for name in _NAMES}


def _is_plain(tensors: Sequence[Any]) -> bool:
    """Whether the kernel can read them: on the CPU, under no vmap, and not under torch's first one, which gradcheck
    still uses."""
    return not transforms_active() and tensors[0].is_cpu and gate.has_memory_of_its_own(tensors)


def _is_alone(tensors: Sequence[Any]) -> bool:
    """Whether they are plain and no derivative is wanted of what is made of them."""
    needed = torch.is_grad_enabled() and any_requires_grad(*tensors)
    return not needed and not private.in_dual_level() and _is_plain(tensors)


def apply(name: str, settings: How, lengths: Any, reset: Any, *tensors: Any) -> tuple[Any, ...]:
    """An operation with its rules, under whatever transforms are at work."""
    function = _FUNCTIONS[name]
    apply: Any = function.apply
    if not watched():
        if not (gate.is_open and gate.is_plain(lengths, reset, *tensors)):  # which asks in C++ whether any is wrapped
            lengths, reset, *rest = unwrap_dead((lengths, reset, *tensors))
            tensors = tuple(rest)
        if transforms_active():
            if (vmap := private.innermost_vmap()) is not None:
                return _vmapped(*vmap, name, settings, lengths, reset, tensors)
        else:
            if _is_alone(tensors):
                return _run(name, settings, lengths, reset, tensors)
            apply = super(torch.autograd.Function, function).apply  # without its second look at all that
    outputs: tuple[Any, ...] = apply(settings.text, lengths, reset, *tensors)
    return outputs


def _vmapped(
    level: int, N: Any, name: str, settings: How, lengths: Any, reset: Any, tensors: Sequence[Any]
) -> tuple[Any, ...]:
    """What a Function under vmap does, on a flat list: torch's way over trees takes longer than a small kernel."""
    given: list[Any] = [None] * (2 + len(tensors))
    dims: list[int | None] = [None] * len(given)
    for n, tensor in enumerate((lengths, reset, *tensors)):
        if tensor is not None:
            given[n], dims[n] = private.unwrap_batched(tensor, level)
    stack = private.pop_transform()
    try:
        if all(dim is None for dim in dims):
            return apply(name, settings, *given)
        outputs, out_dims = _batched(name, N, dims, settings, given[0], given[1], given[2:])
    finally:
        private.push_transform(stack)
    return tuple(
        None if output is None else private.add_batch_dim(output, dim, level)
        for output, dim in zip(outputs, out_dims, strict=True)
    )


# Compile and export: operators.


_OPERATORS: dict[tuple[str, int, int], Any] = {}


MOST_WEIGHTS = 20  # of one call: torch takes 64 arguments in a schema, and hvp has every tensor twice


def make_operators(states: int, weights: int) -> None:
    """Make the four operators for this many tensors, if they are not there: never while torch.compile looks on."""
    if ("hvp", states, weights) not in _OPERATORS and weights <= MOST_WEIGHTS:
        for name in _NAMES:
            _OPERATORS[name, states, weights] = _make_operator(name, states, weights)


def _make_operator(name: str, states: int, weights: int) -> Any:
    full = f"{name}_{states}_{weights}"
    optional = iter(range(10000))
    groups = how.groups(name, states, weights)
    arguments = []
    for n, size in enumerate(groups):
        for m in range(size):
            needed = n == 0 and (m == 0 or m > states)
            arguments.append(f"Tensor{'' if needed else '?'} a{next(optional)}")
    if name in ("forward", "jvp"):
        returns = 2 + states + (name == "forward")
    else:
        returns = groups[0]
    schema = f"{full}({', '.join(arguments)}, Tensor? lengths, Tensor? reset, str how)"
    _library.define(f"{schema} -> ({', '.join(['Tensor'] * returns)})")
    overload = getattr(torch.ops.fusedrnn, full).default

    def unpack(arguments: Sequence[Any]) -> tuple[How, Any, Any, tuple[Any, ...]]:
        *tensors, lengths, reset, text = arguments
        return how.read(text), lengths, reset, tuple(tensors)

    def kernel(*arguments: Any) -> tuple[Tensor, ...]:
        settings, lengths, reset, tensors = unpack(arguments)
        return whole(name, settings, _run(name, settings, lengths, reset, tensors), tensors[0])

    def fake(*arguments: Any) -> tuple[Tensor, ...]:
        settings, lengths, reset, tensors = unpack(arguments)
        return whole(name, settings, _fake(name, settings, lengths, reset, tensors), tensors[0])

    def below(keyset: Any, *arguments: Any) -> tuple[Tensor, ...]:
        with private.BelowAutograd():
            outputs: tuple[Tensor, ...] = overload.redispatch(keyset & private.below_autograd_keys, *arguments)
        return outputs

    def autograd(keyset: Any, *arguments: Any) -> tuple[Tensor, ...]:
        if name == "forward" and type(arguments[0]) is not Tensor and onnx_nodes.writing():  # a program is exported
            settings, lengths, reset, tensors = unpack(arguments)
            return whole(name, settings, onnx_nodes.written(settings, lengths, reset, tensors), tensors[0])
        differentiated = torch.is_grad_enabled() and any_requires_grad(*arguments)
        if differentiated or private.forward_grad_enabled():  # whether there are tangents costs more to ask
            return transformed(*arguments)
        return below(keyset, *arguments)

    def transformed(*arguments: Any) -> tuple[Tensor, ...]:
        settings, lengths, reset, tensors = unpack(arguments)
        return whole(name, settings, apply(name, settings, lengths, reset, *tensors), tensors[0])

    _library.impl(full, kernel, "CPU")
    _library.impl(full, kernel, "CUDA")
    torch.library.register_fake(f"fusedrnn::{full}", fake, lib=_library)
    _library.impl(full, autograd, "Autograd", with_keyset=True)
    _library.impl(full, transformed, "FuncTorchDynamicLayerFrontMode")
    flops.register(name, overload)
    return overload


def whole(name: str, settings: How, outputs: Sequence[Any], like: Tensor) -> tuple[Tensor, ...]:
    """All that an operator's schema promises: empty tensors for what is not there."""
    if name in ("backward", "hvp"):
        outputs = _placed(settings, settings.want, outputs)
    elif not settings.cells:
        outputs = (*outputs[: 1 + settings.states], None, *outputs[1 + settings.states :])
    return tuple(like.new_empty(0) if output is None else output for output in outputs)


def _present(name: str, settings: How, outputs: Sequence[Any]) -> tuple[Any, ...]:
    """The others."""
    if name in ("backward", "hvp"):
        return tuple(output for output, digit in zip(outputs, settings.want, strict=True) if digit == "1")
    if settings.cells:
        return tuple(outputs)
    return (*outputs[: 1 + settings.states], *outputs[2 + settings.states :])


def _call_operator(name: str, settings: How, lengths: Any, reset: Any, *tensors: Any) -> tuple[Any, ...]:
    if not watched() and _is_plain(tensors):
        return _run(name, settings, lengths, reset, tensors)  # nobody looks on
    op = _OPERATORS[name, settings.states, settings.weights]
    return _present(name, settings, op(*tensors, lengths, reset, settings.text))


def _fake(name: str, settings: How, lengths: Any, reset: Any, tensors: Sequence[Any]) -> tuple[Tensor, ...]:
    """What `_run` returns, by shape."""
    axes = list(zip((lengths, reset, *tensors), (0, 1, *_axes(name, settings)), strict=True))
    if name == "backward":
        del axes[2 + settings.arguments]  # the tape may be of another shape
    E = kernels.extent(*zip(*axes, strict=True))
    p = tensors[: settings.arguments]
    x, R = p[0], p[settings.states + 2]
    T, _, B, I = x.shape  # noqa: E741
    sizes = kernels.Sizes(T, E, B, I, R.shape[-2] // settings.facts.gates)
    if name in ("forward", "jvp"):
        outputs = [x.new_empty(shape) for shape in kernels.result_shapes(settings, sizes)]
        if name == "forward":
            elements = length(settings, T, B, sizes.H)
            if x.device.type == "cuda":
                elements = cuda_length(settings, T, B, sizes.H, x.dtype)
            outputs.append(x.new_empty((E, elements), dtype=computing(x.dtype)))
        return tuple(outputs)
    outputs = []
    for digit, tensor, axis, shape in zip(
        settings.want, p, settings.argument_axes, kernels.argument_shapes(settings, sizes), strict=True
    ):
        if digit == "1":
            shared = not settings.each and tensor.shape[axis] == 1
            outputs.append(x.new_empty((*shape[:axis], 1, *shape[axis + 1 :]) if shared else shape))
    return tuple(outputs)


def call(settings: How, lengths: Any, reset: Any, p: Sequence[Any]) -> tuple[Any, ...]:
    """The results, without the tape, by the road that fits: the operator while torch.compile or export looks on."""
    if torch.compiler.is_compiling():
        op = _OPERATORS["forward", settings.states, settings.weights]
        outputs = _present("forward", settings, op(*p, lengths, reset, settings.text))
    else:
        outputs = apply("forward", settings, lengths, reset, *p)
    return outputs[:-1]


# Those of usual sizes at once, so that an exported program can be loaded before any module is made.
for _states, _counts in ((1, (2, 4, 6, 8, 10, 12, 16, 20)), (2, (2, 3, 4, 5, 6, 8, 10, 12, 16, 20))):
    for _weights in _counts:
        make_operators(_states, _weights)
