# SPDX-License-Identifier: Apache-2.0
"""The compiled half: C++ kernels behind NumPy arrays. Only backends/native.py imports this.

Nothing here trusts its caller: a wrong type raises TypeError, a wrong shape, size, layout or range ValueError, before
anything is written. The long explanations (what to pass instead) are the front door's business, see check.py.

Layout. Arrays are canonical (see Problem, Arguments, Results in backends/__init__.py), float32 or float64, all of one
dtype, aligned, in native byte order, with strides that are whole elements: any such strides, 0 and negative included,
on what is read; what is written must be writable and must not overlap itself (gradients of weights may have stride 0 on
E: the sum over E is written). Entries may be None where csrc/api.h says that null has a meaning.

Threads. Large calls release the GIL; arrays are kept alive meanwhile. Any number of Python threads may call at once.
"""

from collections.abc import Sequence
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from fusedrnn.backends import Arguments, Generation, Problem, Results

_Array = NDArray[Any]

version: str
compiler: str
isas_built: list[str]  # from the plainest to the widest
isas_found: list[str]  # those of isas_built that this machine can run

def isa() -> str: ...
def set_isa(name: str) -> None: ...  # ValueError where it is not in isas_found; not while another thread computes
def get_num_threads() -> int: ...  # of a call made now from this Python thread: OpenMP's own setting
def ignore_crowd(ignored: bool) -> None: ...  # whether calls use all threads on a busy machine, too: for tests
def set_num_threads(n: int) -> None: ...  # for all Python threads; threadpoolctl's later limits win

cuda: Any  # the CUDA backend, csrc/bindings/cuda.cpp, for backends/cuda.py; None in a build without it

def tape_elements(problem: Problem) -> int: ...
def forward(problem: Problem, p: Arguments, out: Results, tape: _Array | None = None) -> None: ...
def backward(problem: Problem, p: Arguments, tape: _Array, g: Results, dp: Arguments) -> None: ...
def jvp(problem: Problem, p: Arguments, v: Arguments, tout: Results) -> None: ...

# Draws g.drawn.shape[0] tokens for each row: csrc/cpu/generation/generate.h. T = E = D = 1, p.x (1,1,B) integers,
# out.hn (and cn).
# None, or the first (step, row, what is wrong with its logits), and then nothing that was written is of use.
def generate(problem: Problem, p: Arguments, out: Results, g: Generation) -> tuple[int, int, str] | None: ...
def hvp(
    problem: Problem, p: Arguments, v: Arguments, g: Results, t: Results, tdp: Arguments, tout: Results | None = None
) -> None: ...

# Over all elements of all arrays (each its own dtype, any strides): (sum |a|^p)^(1/p), p = norm_type = 1, 2 or inf (the
# largest |a|), summed in float64 in one pass. NaN gives NaN.
def global_norm(arrays: Sequence[_Array], norm_type: float = 2.0) -> float: ...
def scale_(arrays: Sequence[_Array], factor: float) -> None: ...  # factor is rounded to each array's dtype
def clip_value_(arrays: Sequence[_Array], limit: float) -> None: ...  # clamp to [-limit, limit]; NaN stays NaN

# CTC. log_probs (T,B,C), any strides; row b spells labels[first[b] : first[b] + label_counts[b]], classes but blank.
# Written: loss (B) and, if given, dlog_probs (T,B,C), contiguous along C, for dloss (B; None = 1). See csrc/api.h.
def ctc(
    log_probs: _Array,
    labels: NDArray[np.int64],
    first: NDArray[np.int64],
    label_counts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    blank: int,
    zero_infinity: bool,
    loss: _Array,
    dloss: _Array | None = None,
    dlog_probs: _Array | None = None,
) -> None: ...

# The best path. Written: states (T,B), of row b 2j at the blank before its label j and 2j+1 at that label, -1 past its
# length and where there is no path; log_probability (B).
def ctc_align(
    log_probs: _Array,
    labels: NDArray[np.int64],
    first: NDArray[np.int64],
    label_counts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    blank: int,
    states: NDArray[np.int64],
    log_probability: _Array,
) -> None: ...

# Of each row, best first: (labels, log-probability).
def ctc_beam(
    log_probs: _Array, lengths: NDArray[np.int64], blank: int, beam_width: int, top: int
) -> list[list[tuple[list[int], float]]]: ...

# Hidden Markov models. scores (T,B,N), any strides; initial (N), transitions (N,N) contiguous. Written: log_likelihood
# (B) and, all three or none, states (T,B,N), dinitial (N), dtransitions (N,N), rows weighted by weights (B; None = 1);
# or paths (T,B), -1 where there is none, and log_probability (B).
def hmm(
    scores: _Array,
    initial: _Array,
    transitions: _Array,
    lengths: NDArray[np.int64],
    log_likelihood: _Array,
    weights: _Array | None = None,
    states: _Array | None = None,
    dinitial: _Array | None = None,
    dtransitions: _Array | None = None,
) -> None: ...
def viterbi(
    scores: _Array,
    initial: _Array,
    transitions: _Array,
    lengths: NDArray[np.int64],
    paths: NDArray[np.int64],
    log_probability: _Array,
) -> None: ...

# The short way from torch's tensors to the kernels. torch_setup opens it once (False: this torch is another inside).
# capsule: torch.Tensor.__dlpack_c_exchange_api__; tensor, parameter: torch.Tensor, torch.nn.Parameter; samples:
# tuples (tensor, its _cdata, its dispatch keys, its storage's _cdata, data_ptr and nbytes), by which it finds where
# torch keeps these; keys: those that a plain tensor may have. torch_plain: whether each is None or a plain tensor: on
# the CPU, no subclass, its numbers in memory as they are, its storage as long as it needs. torch_alias: another
# tensor with the memory of a plain one, in a storage of its own; None: not plain. Then, with settings = (cell,
# num_layers, num_directions, bias, whether x is one step (B,I) or (I,) of a cell module, batch_first, recompute,
# clip_cell, clip_grad, whether x is a PackedSequence's data, models, each): torch_forward(settings, x, h0, c0,
# weights, lengths, tape wanted) -> (y, h_n, c_n, tape), None where there is none; torch_backward(settings, x, h0, c0,
# weights, lengths, tape, dy, dh_n, dc_n, wanted) -> (dx, dh0, dc0, *gradients of weights), `wanted` one bit for each
# of x, h0, c0 and the weights. lengths: int64 (B,), or the batch_sizes of a packed x, or None. models = E > 0:
# results and their gradients have an axis E in front, and so have those of x, h0, c0 and the weights (and their
# gradients) whose bits `each` has; the others are shared, and get the sum. The plain case only: CPU tensors (no
# subclass) of one dtype, float32 or float64, of torch.nn's shapes, any strides; h0, c0 and the last three may be
# None; without a tape W and R may be bfloat16 where the rest is float32, and x and h are then rounded to bfloat16 in
# products. Anything else: None, and nothing written.
def torch_setup(
    capsule: object, tensor: type, parameter: type, samples: tuple[tuple[Any, ...], ...], keys: int, /
) -> bool: ...
def torch_plain(*tensors: Any) -> bool: ...
def torch_alias(tensor: Any, /) -> Any: ...
def torch_forward(
    settings: tuple[Any, ...], x: Any, h0: Any, c0: Any, weights: Sequence[Any], lengths: Any, tape: bool, /
) -> tuple[Any, ...] | None: ...
def torch_backward(
    settings: tuple[Any, ...],
    x: Any,
    h0: Any,
    c0: Any,
    weights: Sequence[Any],
    lengths: Any,
    tape: Any,
    dy: Any,
    dh_n: Any,
    dc_n: Any,
    wanted: int,
    /,
) -> tuple[Any, ...] | None: ...

@final
class Lane:
    """The short way from a layer object to the kernels: no Python between the call and C++ (about 1 us around them).

    One Lane per layer; it keeps what never changes and nothing of the weights, which are read anew at every call.
    A Lane answers the plain case and returns None for everything else, having written nothing; then the caller takes
    the full route (ops), which also words the errors. So layers.py reads:

        class LSTM:
            def __init__(...):  self._lane = native.Lane("lstm", num_layers, directions, batch_first, clip_cell or 0.0)
            def __call__(self, x, state=None, lengths=None, reset=None, return_cells=False):
                if self._lane is not None and lengths is None and reset is None and not (self.training or return_cells):
                    result = self._lane.forward(x, state, self.parameters)
                    if result is not None:
                        return result
                ... the full route ...
            def step(self, x, state=None):
                result = self._lane.step(x, state, self.parameters)
                if result is not None:
                    return result
                ... the full route with T = 1 ...

    The plain case: every array is a numpy.ndarray (no subclass) of one dtype, float32 or float64, aligned, with any
    strides; `params` is a dict under PyTorch's names (weight_ih_l0, ...; biases may be missing, both or none) or a flat
    list or tuple in PyTorch's order; weights are 2-D; sizes fit each other and none is 0; no lengths, resets, dropout
    or cells. Leave the Lane out of pickles and copies and make a new one: it holds nothing of value.
    """

    def __new__(
        cls,
        cell: str,  # as Problem.cell
        num_layers: int = 1,
        num_directions: int = 1,
        batch_first: bool = False,
        clip_cell: float = 0.0,
    ) -> Lane: ...
    # x (T,B,I), (B,T,I) if batch_first, or (T,I); state None, h, or (h, c) for "lstm", shaped as torch.nn's.
    # Returns (y, h) or (y, (h, c)) in new arrays.
    def forward(self, x: object, state: object, params: object, /) -> tuple[_Array, Any] | None: ...
    # The same with a tape: (y, h, weights, memory) or (y, (h, c), weights, memory), weights being the arrays found, in
    # PyTorch's order. `memory`: that of an old tape, taken over where it is large enough, or None. Then backward:
    # gradients by name, "x", "state" and the weights', in new arrays. dy as y or None; dstate as the state or None.
    def record(
        self, x: object, state: object, params: object, recompute: object, clip_grad: object, memory: object, /
    ) -> tuple[Any, ...] | None: ...
    def backward(
        self,
        x: object,
        state: object,
        weights: object,
        memory: object,
        recompute: object,
        clip_grad: object,
        dy: object,
        dstate: object,
        /,
    ) -> dict[str, Any] | None: ...
    # x (B,I) or (I,); state None (zeros), h, or (h, c), each (L,B,H) or (L,H). Returns (y, h) or (y, (h, c)), with
    # y (B,H) or (H,), in arrays that belong to the Lane: the next call but one overwrites them. Pass the returned state
    # to the next call. Nothing is allocated while batch size and dtype stay. One direction only. None while another
    # thread is inside.
    def step(self, x: object, state: object, params: object, /) -> tuple[_Array, Any] | None: ...
