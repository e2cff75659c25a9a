# SPDX-License-Identifier: Apache-2.0
"""The activations of ONNX's RNN, GRU and LSTM operators, by name, with their alpha and beta.

`slope` gives f' from y = f(x) alone, so that no pre-activation is kept; the conditions on alpha make that possible.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .number import sigmoid, softplus, tanh


class Activation(NamedTuple):
    """f(x, alpha, beta) and f' as a function of y = f(x); both for arrays of real or complex numbers."""

    f: Callable[[Any, float, float], Any]
    slope: Callable[[Any, float, float], Any]
    alpha: float = 0.0  # ONNX's defaults
    beta: float = 0.0
    condition: str = ""  # on alpha: "", ">= 0" or "!= 0"


def _elu(x: Any, a: float, b: float) -> Any:
    below = np.where(x.real > 0, 0, x)
    return np.where(x.real > 0, x, a * (np.exp(below) - 1))


def _size(x: Any) -> Any:
    return np.where(x.real < 0, -x, x)


def _hard(x: Any, a: float, b: float) -> Any:
    y = a * x + b
    return np.where(y.real <= 0, 0, np.where(y.real >= 1, 1, y))


def _one(y: Any) -> Any:
    return np.ones_like(y)


# The order is that of csrc/api.h's ActivationKind.
ACTIVATIONS: dict[str, Activation] = {
    "Sigmoid": Activation(lambda x, a, b: sigmoid(x), lambda y, a, b: y * (1 - y)),
    "Tanh": Activation(lambda x, a, b: tanh(x), lambda y, a, b: 1 - y * y),
    "Relu": Activation(lambda x, a, b: np.where(x.real <= 0, 0, x), lambda y, a, b: np.where(y.real <= 0, 0, _one(y))),
    "Affine": Activation(lambda x, a, b: a * x + b, lambda y, a, b: a * _one(y), 1.0),
    "LeakyRelu": Activation(
        lambda x, a, b: np.where(x.real <= 0, a * x, x),
        lambda y, a, b: np.where(y.real <= 0, a, _one(y)),
        0.01,
        condition=">= 0",
    ),
    "ThresholdedRelu": Activation(
        lambda x, a, b: np.where(x.real > a, x, 0),
        lambda y, a, b: np.where(y.real <= 0, 0, _one(y)),
        1.0,
        condition=">= 0",
    ),
    "ScaledTanh": Activation(
        lambda x, a, b: a * tanh(b * x), lambda y, a, b: b * (a - y * y / a), 1.0, 1.0, condition="!= 0"
    ),
    "HardSigmoid": Activation(_hard, lambda y, a, b: np.where((y.real <= 0) | (y.real >= 1), 0, a * _one(y)), 0.2, 0.5),
    "Elu": Activation(_elu, lambda y, a, b: np.where(y.real > 0, _one(y), y + a), 1.0, condition=">= 0"),
    "Softsign": Activation(lambda x, a, b: x / (1 + _size(x)), lambda y, a, b: (1 - _size(y)) * (1 - _size(y))),
    "Softplus": Activation(lambda x, a, b: softplus(x), lambda y, a, b: 1 - np.exp(-y)),
}
