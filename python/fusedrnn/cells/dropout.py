# SPDX-License-Identifier: Apache-2.0
"""The dropout mask between layers: Philox4x32-10 (Salmon et al., SC 2011), so that a seed and a position are enough.

Element n of layer l's output draws word n % 4 of the block with key (low, high half of the seed) and counter
(low, high half of n // 4, l, 0); it is dropped where word < p * 2^32.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_MULTIPLIER = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))


def philox(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> Any:
    """The four words of one block. All arguments and results are uint64 that hold 32 bits, arrays or scalars."""
    for _ in range(10):
        p0 = _MULTIPLIER[0] * c0
        p1 = _MULTIPLIER[1] * c2
        c0, c1, c2, c3 = (p1 >> _HALF) ^ c1 ^ k0, p1 & _LOW, (p0 >> _HALF) ^ c3 ^ k1, p0 & _LOW
        k0 = (k0 + _WEYL[0]) & _LOW
        k1 = (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def drawn(shape: tuple[int, ...], p: float, seed: int, layer: int, stream: int = 0) -> np.ndarray:
    """Where the rule above says "dropped". The counter's last word tells the uses apart: 0 dropout between layers,
    1 drawing tokens, 2 zoneout of h, 3 of c, 4 recurrent dropout. For 2 to 4, `layer` is layer * directions + d."""
    size = int(np.prod(shape, dtype=np.int64))
    n = np.arange((size + 3) // 4, dtype=np.uint64)
    zero = np.zeros_like(n)
    key = np.uint64(seed & 0xFFFFFFFFFFFFFFFF)
    words = philox(n & _LOW, n >> _HALF, zero + np.uint64(layer), zero + np.uint64(stream), key & _LOW, key >> _HALF)
    word = np.stack(words, axis=-1).reshape(-1)[:size]
    return (word < p * 2.0**32).reshape(shape)


def scale(shape: tuple[int, ...], p: float, seed: int, layer: int, stream: int = 0) -> np.ndarray:
    """The factors of one layer's output (T,E,B,D*H), float64: 0 where dropped, else 1/(1-p); all 0 for p = 1."""
    return np.where(drawn(shape, p, seed, layer, stream), 0.0, 1 / (1 - p) if p < 1 else 0.0)
