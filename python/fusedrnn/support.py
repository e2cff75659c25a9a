# SPDX-License-Identifier: Apache-2.0
"""What runs where: the table of docs/support.md, from the registry and the options.

python -m fusedrnn.support > docs/support.md
"""

from __future__ import annotations

from .cells import CELLS
from .variants import NOT_ON_CUDA, VARIANTS

_HEAD = """# What runs where

`python -m fusedrnn.support` makes this page, and a test keeps it true.

- **kernels**: C++ kernels: forward, backward, jvp and hvp.
- **reference**: NumPy computes it, and the log says so.
- **no**: an error says so, before anything is written.

On the CPU everything else works with every cell and every option: tokens, contexts, recompute,
lengths, resets, both directions, layers, ensembles. So do dropout, gradient clipping, bfloat16
weights and generation.
"""


def _row(option: str) -> list[str]:
    return ["kernels", "reference", "no" if option in NOT_ON_CUDA else "kernels"]


def page() -> str:
    """The page, in Markdown."""
    columns = ["on the CPU", "on Numba", "on CUDA"]
    lines = [_HEAD, f"| option | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    lines += [f"| `{option}` | {' | '.join(_row(option))} |" for option in VARIANTS]
    plain = ["kernels", "Numba, tangents on the reference", "kernels"]
    lines += [f"| none: {', '.join(f'`{name}`' for name in CELLS)} | {' | '.join(plain)} |", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    print(page(), end="")
