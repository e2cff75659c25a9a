# SPDX-License-Identifier: Apache-2.0
"""The compiled backend. The only importer of _core: everything else asks here."""

from fusedrnn import _core
from fusedrnn._core import (
    Lane,
    backward,
    clip_value_,
    compiler,
    forward,
    get_num_threads,
    global_norm,
    hvp,
    isa,
    isas_built,
    isas_found,
    jvp,
    scale_,
    set_isa,
    set_num_threads,
    tape_elements,
    version,
)

torch_setup, torch_forward, torch_backward = (
    getattr(_core, name, None) for name in ("torch_setup", "torch_forward", "torch_backward")
)

__all__ = [
    "Lane",
    "backward",
    "clip_value_",
    "compiler",
    "forward",
    "get_num_threads",
    "global_norm",
    "hvp",
    "isa",
    "isas_built",
    "isas_found",
    "jvp",
    "scale_",
    "set_isa",
    "set_num_threads",
    "tape_elements",
    "torch_backward",
    "torch_forward",
    "torch_setup",
    "version",
]
