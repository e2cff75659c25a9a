# SPDX-License-Identifier: Apache-2.0
"""Adam in NumPy, in place, with torch.optim.Adam's arithmetic."""

from collections.abc import Iterator, Mapping

import numpy as np

BLOCK = 8192  # elements: the five arrays' blocks stay in the second-level cache over all twelve passes


class Adam:
    """`m` and `v` are the running means of the gradients and of their squares, named as the parameters."""

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
        size = rate / (1 - self.beta1**self.count)
        root = 1 / np.sqrt(1 - self.beta2**self.count)
        for name, parameter in self.parameters.items():
            # Python floats: NumPy then computes in the arrays' own dtype
            for p, g, m, v in blocks(parameter, grads[name], self.m[name], self.v[name]):
                s = self.scratch[p.dtype]
                s = s[: p.size].reshape(p.shape) if p.size <= BLOCK else np.empty_like(p)
                m *= self.beta1
                m += np.multiply(g, 1 - self.beta1, out=s)
                np.multiply(g, g, out=s)
                s *= 1 - self.beta2
                v *= self.beta2
                v += s
                np.sqrt(v, out=s)
                s *= float(root)
                s += self.epsilon
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
