# SPDX-License-Identifier: Apache-2.0
"""sigmoid, tanh and their kin, compiled: they vectorise, and are right to about 2 units in the last place."""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
from numba import njit, types
from numba.core.imputils import lower_constant
from numba.extending import intrinsic, models, overload, overload_method, register_model, typeof_impl

from ...cells import number
from ...cells.functions import Functions

OPTIONS: dict[str, Any] = {
    "error_model": "numpy",
    "fastmath": {"contract"},
    "forceinline": True,
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
}


@intrinsic
def _bits(context: Any, x: Any) -> Any:
    """The bits of a float, as an integer."""
    to = types.int32 if x == types.float32 else types.int64
    return to(x), lambda target, builder, sig, args: builder.bitcast(args[0], target.get_value_type(to))


@intrinsic
def _from_bits(context: Any, x: Any) -> Any:
    """The float with these bits."""
    to = types.float32 if x == types.int32 else types.float64
    return to(x), lambda target, builder, sig, args: builder.bitcast(args[0], target.get_value_type(to))


def _polynomial(coefficients: list[float], kind: Any) -> Any:
    """Horner's rule, unrolled: the function x -> c0 + c1 x + c2 x^2 + ..."""
    step: Any = None
    for c in reversed(coefficients):
        step = _constant(kind(c)) if step is None else _horner(kind(c), step)
    return step


def _constant(c: Any) -> Any:
    return njit(lambda x: c, **OPTIONS)


def _horner(c: Any, rest: Any) -> Any:
    return njit(lambda x: c + x * rest(x), **OPTIONS)


def _functions(kind: Any, whole: Any, mantissa: int, low: float, exp_fit: list[float], tanh_fit: list[float]) -> Any:
    """sigmoid and tanh for one type. exp_fit: (exp(r) - 1 - r) / r^2 for |r| <= ln(2)/2; tanh_fit: (tanh(x)/x - 1) / z
    in z = x^2 for |x| <= 0.625; both interpolate at Chebyshev's points."""
    one, two, near_zero = kind(1), kind(2), kind(0.625)
    least, most = kind(low), kind(-low)
    log2_e = kind(1 / math.log(2))
    ln2_high, ln2_low = kind(355 / 512), kind(-0.00021219444005469058277)  # n * ln2_high is exact
    magic = kind(1.5 * 2.0**mantissa)  # adding it leaves the nearest integer in the lowest bits
    exponent, shift = whole(np.array(1, kind).view(whole)), whole(mantissa)
    exp_tail, tanh_tail = _polynomial(exp_fit, kind), _polynomial(tanh_fit, kind)

    @njit(**OPTIONS)
    def exp(x: Any) -> Any:
        x = least if x < least else x
        x = most if x > most else x
        shifted = x * log2_e + magic
        n = shifted - magic
        r = x - n * ln2_high
        r = r - n * ln2_low
        power = _from_bits(whole((_bits(shifted) << shift) + exponent))  # 2^n
        return (exp_tail(r) * r * r + (r + one)) * power

    def tanh(x: Any) -> Any:
        near = tanh_tail(x * x) * (x * x) * x + x
        far = one - two / (exp(x + x) + one)
        return near if abs(x) < near_zero else far

    def sigmoid(x: Any) -> Any:
        return one / (one + exp(-x))

    def softplus(x: Any) -> Any:
        return max(x, kind(0)) + kind(math.log1p(exp(-abs(x))))

    return sigmoid, tanh, softplus


FUNCTIONS = {
    types.float32: _functions(
        np.float32,
        np.int32,
        23,
        -87.0,
        [0.5000000013457727, 0.16666666681614256, 0.04166646500604005, 0.008333310934448869]
        + [0.0013933641031986701, 0.00019890980869750327],
        [-0.33333333172140334, 0.13333303556914372, -0.05395925957700947, 0.02176891864989293]
        + [-0.008343945512944958, 0.0022927448134928757],
    ),
    types.float64: _functions(
        np.float64,
        np.int64,
        52,
        -708.0,
        [0.5, 0.1666666666666667, 0.04166666666666667, 0.008333333333326141, 0.0013888888888883752]
        + [0.00019841269874800493, 2.4801587325533363e-05, 2.7557255425746435e-06, 2.7557273661348637e-07]
        + [2.510520637395701e-08, 2.0914679376583935e-09],
        [-0.3333333333333333, 0.13333333333333042, -0.05396825396789699, 0.021869488519008305, -0.008863235103240856]
        + [0.003592121751154739, -0.0014557754120463136, 0.0005896606577691733, -0.00023759064958691012]
        + [9.257116126213532e-05, -3.1201101391622794e-05, 6.4851634676022395e-06],
    ),
}


@overload(number.sigmoid, jit_options=OPTIONS)
def _sigmoid(x: Any) -> Any:
    return FUNCTIONS[x][0]


@overload(number.tanh, jit_options=OPTIONS)
def _tanh(x: Any) -> Any:
    return FUNCTIONS[x][1]


@overload(number.softplus, jit_options=OPTIONS)
def _softplus(x: Any) -> Any:
    return FUNCTIONS[x][2]


@overload(number.relu, jit_options=OPTIONS)
def _relu(x: Any) -> Any:
    def relu(x: Any) -> Any:
        return type(x)(0) if x <= 0 else x

    return relu


@overload(number.positive, jit_options=OPTIONS)
def _positive(d: Any, x: Any) -> Any:
    def positive(d: Any, x: Any) -> Any:
        return type(d)(0) if x <= 0 else d

    return positive


@overload(number.clamp, jit_options=OPTIONS)
def _clamp(x: Any, limit: Any) -> Any:
    def clamp(x: Any, limit: Any) -> Any:
        bound = limit if limit > 0 else type(limit)(np.inf)
        low = -bound if x < -bound else x
        return bound if low > bound else low

    return clamp


@overload(number.inside, jit_options=OPTIONS)
def _inside(d: Any, x: Any, limit: Any) -> Any:
    def inside(d: Any, x: Any, limit: Any) -> Any:
        return type(d)(0) if limit > 0 and abs(x) >= limit else d

    return inside


# The functions that a formula takes: an object without data, whose methods are compiled where they are called.


class _FunctionsType(types.Opaque):  # type: ignore[misc]
    """The type of such an object. Every class of functions is a type of its own."""

    def __init__(self, kind: type[Functions]) -> None:
        self.kind = kind
        super().__init__(f"{kind.__module__}.{kind.__qualname__}")


register_model(_FunctionsType)(models.OpaqueModel)


@typeof_impl.register(Functions)
def _type_of_functions(functions: Functions, context: Any) -> Any:
    return _FunctionsType(type(functions))


@lower_constant(_FunctionsType)
def _functions_as_constant(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    return context.get_dummy_value()


def _compile_method(name: str) -> None:
    def method(self: Any, *args: Any) -> Any:
        return getattr(self.kind, name)

    method.__signature__ = inspect.signature(getattr(Functions, name))  # type: ignore[attr-defined]
    overload_method(_FunctionsType, name, jit_options=OPTIONS)(method)


for _name in [name for name in vars(Functions) if not name.startswith("_")]:
    _compile_method(_name)
