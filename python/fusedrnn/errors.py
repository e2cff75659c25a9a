# SPDX-License-Identifier: Apache-2.0
"""How errors are worded, and the checks of single values: numbers, switches, words."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np


def fail(op: str, name: str, got: str, expected: str, fix: str = "", error: type[Exception] = ValueError) -> NoReturn:
    """Raise the error, worded as all errors are."""
    raise error(f"{op}: {name} {got}; expected {expected}." + (f" {fix}" if fix else ""))


def integer(op: str, name: str, value: Any, low: int, high: int | None = None) -> int:
    """The value, if it is an integer in [low, high]."""
    expected = f"an integer >= {low}" if high is None else f"an integer in [{low}, {high}]"
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
        fail(op, name, f"is {value!r}", expected, error=TypeError)
    if value < low or (high is not None and value > high):
        fail(op, name, f"is {value}", expected)
    return int(value)


def number(op: str, name: str, value: Any) -> float:
    """The value, if it is a real number."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.integer | np.floating):
        fail(op, name, f"is {value!r}", "a number", error=TypeError)
    return float(value)


def limit(op: str, name: str, value: Any) -> float:
    """A clipping limit: 0 for None (off), else a positive finite number."""
    if value is None:
        return 0.0
    result = number(op, name, value)
    if not 0 < result < np.inf:
        fail(op, name, f"is {value!r}", "a finite number > 0, or None for no clipping")
    return result


def probability(op: str, name: str, value: Any) -> float:
    """A dropout probability."""
    result = number(op, name, value)
    if not 0 <= result <= 1:
        fail(op, name, f"is {value!r}", "a probability in [0, 1]")
    return result


def flag(op: str, name: str, value: Any) -> bool:
    """The value, if it is True or False (or 1 or 0)."""
    if value is True or value is False:  # the usual case, at no cost
        return value
    if isinstance(value, np.bool_ | int | np.integer) and value in (0, 1):
        return bool(value)
    fail(op, name, f"is {value!r}", "True or False", error=TypeError)


def text(op: str, name: str, value: Any) -> str:
    """The value, if it is a string."""
    if not isinstance(value, str):
        fail(op, name, f"is {value!r}", "a string", error=TypeError)
    return value


def word(op: str, name: str, value: Any, *words: str) -> str:
    """The value, if it is one of these words."""
    if isinstance(value, str) and value in words:
        return value
    fail(op, name, f"is {value!r}", " or ".join(f'"{one}"' for one in words))
