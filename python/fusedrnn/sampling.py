# SPDX-License-Identifier: Apache-2.0
"""How `generate` draws a token from logits: the options, checked, and the draw in NumPy.

csrc/cpu/generation/draw.cpp repeats it.

In this order, as in Hugging Face's transformers:

1. Repetition penalty p (Keskar et al., CTRL, arXiv:1909.05858, 2019): the logit of a token that the row has seen, in
   the prompt or drawn, is divided by p where it is > 0 and multiplied by p elsewhere (the paper divides only, which
   would raise logits below zero). How often it was seen does not matter.
2. Temperature: logits are divided by it.
3. top_k (Fan, Lewis, Dauphin, ACL 2018): the k largest stay. Of equal logits the earlier ones are the larger.
4. top_p (nucleus; Holtzman et al., ICLR 2020): of those that stay, the fewest, largest first, whose probabilities sum
   to p or more: at least one.

-inf is a logit like any other: a token that is never drawn. NaN and inf are none, and neither are -inf everywhere:
then no row gets a token, and an error names the first step and in it the first row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from . import check
from .cells import dropout


@dataclass(frozen=True, slots=True)
class Sampling:
    """The options of a call, checked."""

    temperature: float = 1.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[int, ...] = ()
    log_probs: str | None = None  # "model", "drawn"


def checked(
    op: str, V: int, *,
    temperature: Any, top_k: Any, top_p: Any, repetition_penalty: Any, seed: Any, stop: Any, return_log_probs: Any,
) -> Sampling:  # fmt: skip
    """Sampling's fields from what users pass; V tokens."""
    temperature = check.number(op, "temperature", temperature)
    if not 0 <= temperature < np.inf:
        check.fail(op, "temperature", f"is {temperature}", "a finite number >= 0", "0 takes the largest logit.")
    top_k = 0 if top_k is None else min(check.integer(op, "top_k", top_k, 1, 2**63 - 1), V)
    top_p = check.number(op, "top_p", top_p)
    if not 0 < top_p <= 1:
        check.fail(op, "top_p", f"is {top_p}", "0 < top_p <= 1", "1 leaves all tokens; temperature=0 the largest.")
    penalty = check.number(op, "repetition_penalty", repetition_penalty)
    if not 0 < penalty < np.inf:
        check.fail(op, "repetition_penalty", f"is {penalty}", "a finite number > 0", "1 is no penalty.")
    if return_log_probs is not None:
        check.word(op, "return_log_probs", return_log_probs, "model", "drawn")
    seed = check.integer(op, "seed", seed, 0, 2**64 - 1)
    return Sampling(temperature, top_k, top_p, penalty, seed, _stop(op, stop, V), return_log_probs)


def _stop(op: str, stop: Any, V: int) -> tuple[int, ...]:
    if stop is None:
        return ()
    if isinstance(stop, np.ndarray) and stop.ndim < 2:
        stop = list(stop) if stop.ndim else stop[()]
    if not isinstance(stop, list | tuple | set | frozenset | range):
        return (check.integer(op, "stop", stop, 0, V - 1),)
    return tuple(sorted({check.integer(op, f"stop[{n}]", token, 0, V - 1) for n, token in enumerate(stop)}))


def refuse(op: str, what: str, row: str, step: int) -> NoReturn:
    """The error for logits from which nothing can be drawn."""
    fix = "Look for it in the parameters, head_weight, head_bias, embedding and state."
    if what == "are all -inf":
        fix = "One token at least must be left to draw."
    expected = "numbers below inf, one of them above -inf"
    check.fail(op, f"the logits of row {row} at step {step}", what, expected, fix)


@np.errstate(over="ignore")  # differences of huge logits
def draw(
    logits: np.ndarray, how: Sampling, step: int, row: int, seen: np.ndarray | None = None
) -> tuple[int, float, str]:
    """One token from logits (V,), its log-probability where that is kept, and what is wrong with the logits, if so.

    By the inverse of the cumulative distribution, in float64. seen: bool (V,), what the penalty falls on.

    >>> fusedrnn.sampling.draw(np.array([0.0, 9.0, 1.0]), fusedrnn.sampling.Sampling(top_k=1), step=0, row=0)
    (1, 0.0, '')
    """
    model = logits.astype(np.float64)
    values = model
    if seen is not None:
        smaller = np.where(model > 0, model / how.repetition_penalty, model * how.repetition_penalty)
        values = np.where(seen, smaller, model)
    what = trouble(values)
    if what:
        return 0, 0.0, what
    best = int(np.argmax(values))
    token, log_prob = best, 0.0
    if how.temperature > 0:
        weights = _weights(values, how)
        reached = np.cumsum(weights)
        token = int(np.searchsorted(reached, _uniform(how.seed, step, row) * reached[-1], side="right"))
        log_prob = (values[token] - values[best]) / how.temperature - np.log(reached[-1])
    if how.log_probs == "model":
        largest = model.max()
        log_prob = model[token] - largest - np.log(np.exp(model - largest).sum())
    return token, float(log_prob) if how.log_probs else 0.0, ""


def trouble(logits: np.ndarray) -> str:
    """Why no token can be drawn; empty if one can."""
    if np.isnan(logits).any():
        return "hold NaN"
    largest = logits.max()
    return "hold inf" if largest == np.inf else "are all -inf" if largest == -np.inf else ""


def _weights(values: np.ndarray, how: Sampling) -> np.ndarray:
    """Probabilities times a number, 0 for what the filters take."""
    weights: np.ndarray = np.exp((values - values.max()) / how.temperature)
    order = np.argsort(-values, kind="stable")  # of equal ones the earlier come first
    if how.top_k:
        weights[order[how.top_k :]] = 0
    if how.top_p < 1:
        mass = np.cumsum(weights[order])
        weights[order[np.searchsorted(mass, how.top_p * np.cumsum(weights)[-1]) + 1 :]] = 0
    return weights


def _uniform(seed: int, step: int, row: int) -> float:
    numbers = (np.uint64(n) for n in (step & 0xFFFFFFFF, step >> 32, row, 1, seed & 0xFFFFFFFF, seed >> 32))
    high, low = (int(word) for word in dropout.philox(*numbers)[:2])
    return ((high >> 5) * 2**26 + (low >> 6)) / 2**53
