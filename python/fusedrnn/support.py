# SPDX-License-Identifier: Apache-2.0
"""What runs where: the table of docs/support.md, from the registry and the refusals.

python -m fusedrnn.support > docs/support.md
"""

from __future__ import annotations

from .cells import CELLS
from .variants import REFUSALS, TANGENTS_BY_REFERENCE, VARIANTS

_HEAD = """# What runs where

`python -m fusedrnn.support` makes this page, and a test keeps it true.

- **kernels**: the C++ kernels of the CPU, forward and backward.
- **reference**: NumPy computes it, and the log says so.
- **no**: an error says so, before anything is written.

Lengths, resets, both directions, layers, ensembles, dropout, gradient clipping and bfloat16 weights
work with every cell and every option.
"""


def _row(option: str) -> list[str]:
    def unless(what: str) -> str:
        return "no" if option in REFUSALS[what].options else "kernels"

    tangents = "reference" if option in TANGENTS_BY_REFERENCE else "kernels"
    kept = [unless(what) for what in ("tokens", "context", "recompute", "generate")]
    return ["kernels", *kept, tangents, "reference", unless("cuda")]


def page() -> str:
    """The page, in Markdown."""
    columns = ["forward, backward", "tokens", "context", "recompute", "generate", "jvp, hvp", "on Numba", "on CUDA"]
    lines = [_HEAD, f"| option | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    lines += [f"| `{option}` | {' | '.join(_row(option))} |" for option in VARIANTS]
    plain = ["kernels"] * 6 + ["Numba, tangents on the reference", "kernels"]
    lines += [f"| none: {', '.join(f'`{name}`' for name in CELLS)} | {' | '.join(plain)} |", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    print(page(), end="")
