# SPDX-License-Identifier: Apache-2.0
"""The fallback: the spec's functions compiled by Numba, between products by NumPy's BLAS.

Time is walked in Python; at each step one product and one compiled call for all rows. The products with x, and those
for the gradients of weights, are done for many steps at once, in chunks that stay in the cache.

    functions.py                  sigmoid, tanh and their kin
    blocks.py                     what compiled steps have in common
    plain.py, two_products.py     one step of all rows, made from a cell of the registry
    walk.py, walk_back.py         one layer in one direction
    stack.py                      layers and directions, the tape
    paths.py                      sums over paths

Tangents (jvp, hvp) are computed by the reference, in float64.
"""

from __future__ import annotations

from .paths import ctc, ctc_align, ctc_beam, hmm, viterbi
from .stack import backward, forward, hvp, jvp, tape_elements

C_STEPS = 1  # c of every step stays on the tape

__all__ = [
    "C_STEPS",
    "backward",
    "ctc",
    "ctc_align",
    "ctc_beam",
    "forward",
    "hmm",
    "hvp",
    "jvp",
    "tape_elements",
    "viterbi",
]
