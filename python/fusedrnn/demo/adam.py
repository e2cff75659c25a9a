# SPDX-License-Identifier: Apache-2.0
"""Adam in NumPy, in place, with torch.optim.Adam's arithmetic."""

import math
from collections.abc import Iterator, Mapping

import numpy as np

BLOCK = 32768  # elements: the blocks of all five arrays stay in the second-level cache over all ten passes


class Adam:
    """`m` and `v` are the running sums of the gradients and of their squares, named as the parameters.

    Sums, not means: without the factors (1 - beta) a step is ten passes over the arrays instead of thirteen; they go
    into two numbers for the whole step.
    """

    def __init__(
        self, parameters: Mapping[str, np.ndarray], beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8
    ) -> None:
        self.parameters = parameters
        self.beta1, self.beta2, self.epsilon = beta1, beta2, epsilon
        self.count = 0
        self.m = {name: np.zeros_like(p) for name, p in parameters.items()}
        self.v = {name: np.zeros_like(p) for name, p in parameters.items()}
        self.scratch = {dtype: np.empty(BLOCK, dtype) for dtype in {p.dtype for p in parameters.values()}}

    def step(self, grads: Mapping[str, np.ndarray], rate: float) -> None:
        self.count += 1
        # rate * mean(g) / (sqrt(mean(g^2)) + epsilon), both means corrected for their beginning at zero
        mean = (1 - self.beta1) / (1 - self.beta1**self.count)
        root = math.sqrt((1 - self.beta2) / (1 - self.beta2**self.count))
        size, epsilon = rate * mean / root, self.epsilon / root
        for name, parameter in self.parameters.items():
            # Python floats: NumPy then computes in the arrays' own dtype
            for p, g, m, v in blocks(parameter, grads[name], self.m[name], self.v[name]):
                s = self.scratch[p.dtype]
                s = s[: p.size].reshape(p.shape) if p.size <= BLOCK else np.empty_like(p)
                m *= self.beta1
                m += g
                v *= self.beta2
                v += np.multiply(g, g, out=s)
                np.sqrt(v, out=s)
                s += epsilon
                np.divide(m, s, out=s)
                s *= size
                p -= s


def blocks(*arrays: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """The same few rows of every array at a time."""
    if all(array.flags.c_contiguous for array in arrays):
        arrays = tuple(array.reshape(-1) for array in arrays)
    length = len(arrays[0])
    rows = max(1, BLOCK * length // max(arrays[0].size, 1))
    for begin in range(0, length, rows):
        yield tuple(array[begin : begin + rows] for array in arrays)
