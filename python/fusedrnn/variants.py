# SPDX-License-Identifier: Apache-2.0
"""The options that make a variant of a cell: what they may be, and where they run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from operator import attrgetter, is_
from typing import Any

from .backends import Variant
from .cells import CELLS
from .cells.activations import ACTIVATIONS
from .errors import fail, flag, integer, limit, number, probability
from .options import LSTMVariants, Settings

# The options, with what leaves a cell plain.
VARIANTS: dict[str, Any] = {
    option.name: option.default for option in fields(Settings) if option.name in LSTMVariants.__optional_keys__
}
_ALL = tuple(VARIANTS)
_values = attrgetter(*_ALL)


# What is not built on CUDA. An engine that learns one of them takes its name out.
NOT_ON_CUDA = _ALL


def refuse_on_cuda(op: str, cell: str, variant: Variant | None) -> None:
    """Fail where the variant has an option that NOT_ON_CUDA names."""
    if variant is None or not used(cell, variant).intersection(NOT_ON_CUDA):
        return
    fix = f"{', '.join(NOT_ON_CUDA[:-1])} and {NOT_ON_CUDA[-1]} run on the CPU."
    fail(op, "x", "is on a CUDA device", "a NumPy array with these options", fix)


def used(cell: str, variant: Variant) -> set[str]:
    """The options that make this variant."""
    found = {
        "proj_size": variant.proj_size > 0,
        "peepholes": variant.peepholes,
        "layer_norm": variant.layer_norm,
        "zoneout": variant.zoneout_h > 0 or variant.zoneout_c > 0,
        "recurrent_dropout": variant.recurrent_dropout > 0,
        "activations": variant.activations != _activations("", None, CELLS[cell].activations),
        "clip_gates": variant.clip_gates > 0,
    }
    return {name for name, there in found.items() if there}


def _equals(value: Any, plain: Any) -> bool:
    return value is plain or (type(value) is type(plain) and value == plain)


def variant(op: str, cell: str, options: Settings) -> Variant | None:
    """Those of `options`, checked; None where all are as usual."""
    values = _values(options)
    if all(map(is_, values, VARIANTS.values())) or all(map(_equals, values, VARIANTS.values())):
        return None
    has_c, zoneout = CELLS[cell].cell_state, options.zoneout
    P = integer(op, "proj_size", options.proj_size, 0)
    pair = zoneout if isinstance(zoneout, tuple | list) else (zoneout, zoneout)
    if len(pair) != 2:
        fail(op, "zoneout", f"is {zoneout!r}", "a probability, or a pair of them for h and c")
    zones = [probability(op, "zoneout", p) for p in pair]
    usual = CELLS[cell].activations
    result = Variant(
        _activations(op, options.activations, usual),
        P,
        flag(op, "peepholes", options.peepholes),
        flag(op, "layer_norm", options.layer_norm),
        limit(op, "clip_gates", options.clip_gates),
        zones[0],
        zones[1] if has_c or P else 0.0,
        probability(op, "recurrent_dropout", options.recurrent_dropout),
        options.training,
    )
    if cell == "gru_reset_before" and (P or result.layer_norm):
        name = "proj_size" if P else "layer_norm"
        fail(op, name, f"is {P or True}", "none of it with reset_after=False", "The two need r after the product.")
    return result if used(cell, result) else None


def _activations(op: str, given: Any, usual: tuple[str, ...]) -> tuple[tuple[str, float, float], ...]:
    """Each activation as (name, alpha, beta); given as a name or with its numbers."""
    listed = usual if given is None else given
    if isinstance(listed, str) or not isinstance(listed, Sequence) or len(listed) != len(usual):
        fail(op, "activations", f"is {given!r}", f"{len(usual)} of them, as in {list(usual)!r}")
    result = []
    by_name = {name.lower(): name for name in ACTIVATIONS}
    for one in listed:
        parts: tuple[Any, ...] = tuple(one) if isinstance(one, tuple | list) and one else (one,)
        name, numbers = parts[0], list(parts[1:])
        if not isinstance(name, str) or name.lower() not in by_name:
            fail(op, "activations", f"has {name!r}", f"one of {', '.join(ACTIVATIONS)}")
        name = by_name[name.lower()]
        known = ACTIVATIONS[name]
        if len(numbers) > 2:
            fail(op, "activations", f"has {one!r}", "a name, alpha and beta at most")
        numbers = [number(op, f"activations: {name}'s alpha and beta", value) for value in numbers]
        alpha = numbers[0] if numbers else known.alpha
        beta = numbers[1] if len(numbers) > 1 else known.beta
        if (known.condition == ">= 0" and not alpha >= 0) or (known.condition == "!= 0" and alpha == 0):
            fix = "Its slope is taken from its value, which must tell the two sides apart."
            fail(op, "activations", f"has {name} with alpha {alpha}", f"alpha {known.condition}", fix)
        result.append((name, alpha, beta))
    return tuple(result)
