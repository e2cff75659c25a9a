# SPDX-License-Identifier: Apache-2.0
"""The front door: `lstm`, `gru`, `rnn`, `ligru`, `mingru`, `minlstm`, their backward, and the tangents of both.

Arrays (float32 or float64, all of one dtype, any strides; nothing large is copied):

    x        (T,B,I), or (B,T,I) with batch_first, or (T,I) without a batch; or tokens (see below)
    state    h (layers*directions, B, H), or (h, c) for the LSTM; None: zeros; (layers*directions, H) without a batch
    y        as x, with directions*H in place of I
    cells    (layers,) + y's shape: c of every layer and step for the LSTM, h for the others
    lengths  integers (B,): row b ends before step lengths[b]; any order, 0 allowed (the state is carried through)
    reset    bool or uint8 (T,B), (B,T) with batch_first: row b begins a new sequence at step t
    context  (B,K), or (K,) without a batch: what layer 0 sees at every step beside x, through weights of its own
    params   a dict under torch.nn's names, or a flat list in torch.nn's order (see fusedrnn.params)

Ensembles: parameters with one more axis in front, (E, ...), are E models in one call. Then y has an E axis too,
(T,E,B,H) or (E,B,T,H) with batch_first, and a state (layers*directions, E, B, H). x, states, lengths, resets and
parameters without an E axis are shared; the gradient of what is shared is the sum over E.

Context: a vector for each row, the same at every step: an image's features, an encoder's summary. weight_ch_l0 (G*H, K)
(and weight_ch_l0_reverse) is among the parameters, behind the others in a flat list, and W_c context joins W x. The
product is made once a call; backward has an entry "context". Resets do not touch it.

CUDA: arrays on a CUDA device, of CuPy, torch (without requires_grad), JAX, Numba or anything that speaks DLPack, all in
one place and on one stream; float16 and bfloat16, too. Results are the library's own arrays (CuPy's for JAX), and
nothing waits for the device: lengths there are clamped to 0..T, and a token there that is no input counts as the zero
vector, of which a later call tells by its error (CudaError).

Tokens: an integer x (of any integer type) without its last axis, (T,B), (B,T) or (T,), stands for the one-hot vectors
of its values: x[t, b] = k is a 1 at input k, 0 <= k < I = weight_ih_l0.shape[1]. Then x W^T is a column of W, looked up
and never multiplied, and no entry "x" comes from backward, because tokens have no gradient. Values past a row's length
are not read. An embedding in front is the same look-up: with vectors e_k = embedding[k], the column is W e_k, so
`weight_ih_l0 = W @ embedding.T` folds the two into one (for inference, or as the one thing that is learned).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np

from . import arrays, backends, check
from . import params as parameters
from .backends import Arguments, Results
from .options import GRUOptions, LSTMOptions, Options, RNNOptions, Settings, settle, spelled_out
from .variants import refuse_on_cuda

_Array = np.ndarray

_CALL = """Returns (y, state, tape), or (y, state, cells, tape) with return_cells; tape is None unless training.
Raises TypeError or ValueError with what came, what was expected and why, before anything is written."""
_BACKWARD = """Returns a dict of new arrays, each in its argument's shape: "x" (not for tokens), "state" (as the call
takes it), "context" (where there was one), and one entry per parameter name.
Raises TypeError or ValueError as the call does."""


@dataclass(slots=True)
class Tape:
    """What a training call leaves for backward: opaque. It refers to x, state and parameters, which must not change.

    One tape serves any number of calls of backward, jvp and hvp, until a call takes over its memory (`reuse`).
    """

    call: check.Call
    backend: backends.Backend
    arguments: Arguments
    inputs: dict[str, Any]  # the user's x, h, c, context and parameters by name, None where not given
    buffer: Any  # None: another tape has it

    @property
    def nbytes(self) -> int:
        """Bytes kept beside x, state and parameters."""
        return 0 if self.buffer is None else int(self.buffer.nbytes)


@spelled_out(LSTMOptions, ending=_CALL)
def lstm(
    x: _Array,
    state: tuple[_Array, _Array] | None = None,
    params: Any = None,
    *,
    coupled: bool = False,
    **options: Unpack[LSTMOptions],
) -> Any:
    """Run an LSTM over a whole sequence.

    coupled: the forget gate is 1 - i, so there are three gates i, g, o (Greff et al. 2017; ONNX's input_forget).

    >>> params = fusedrnn.params.init("lstm", 3, 4, seed=0)
    >>> x = np.ones((5, 2, 3), np.float32)
    >>> y, (h, c), tape = fusedrnn.lstm(x, None, params, training=True)
    >>> y.shape, h.shape, c.shape
    ((5, 2, 4), (1, 2, 4), (1, 2, 4))
    >>> grads = fusedrnn.lstm_backward(tape, np.ones_like(y))
    >>> grads["x"].shape, grads["weight_ih_l0"].shape
    ((5, 2, 3), (16, 3))
    """
    settings = settle("lstm", LSTMOptions, options)
    cell = "cifg" if check.flag("lstm", "coupled", coupled) else "lstm"
    return _forward("lstm", cell, x, state, params, settings=settings)


@spelled_out(GRUOptions, ending=_CALL)
def gru(
    x: _Array,
    state: Any = None,
    params: Any = None,
    *,
    reset_after: bool = True,
    **options: Unpack[GRUOptions],
) -> Any:
    """Run a GRU; the state is one array h.

    With proj_size, m is what z carries over. Then the state is a pair (h, m), as the LSTM's (h, c), and return_cells
    gives m. proj_size and layer_norm need reset_after.

    reset_after: the reset gate acts after the product (PyTorch, cuDNN) or before it (the paper, ONNX).

    >>> params = fusedrnn.params.init("gru", 3, 4, seed=0)
    >>> y, h, tape = fusedrnn.gru(np.ones((5, 2, 3), np.float32), None, params, reset_after=False)
    >>> y.shape, h.shape, tape
    ((5, 2, 4), (1, 2, 4), None)
    """
    settings = settle("gru", GRUOptions, options)
    cell = "gru" if check.flag("gru", "reset_after", reset_after) else "gru_reset_before"
    return _forward("gru", cell, x, state, params, settings=settings)


@spelled_out(RNNOptions, ending=_CALL)
def rnn(
    x: _Array,
    state: _Array | None = None,
    params: Any = None,
    *,
    nonlinearity: str = "tanh",
    **options: Unpack[RNNOptions],
) -> Any:
    """Run a vanilla RNN; the state is one array h.

    nonlinearity: "tanh" or "relu".

    >>> params = fusedrnn.params.init("rnn_relu", 3, 4, seed=0)
    >>> y, h, _ = fusedrnn.rnn(np.ones((5, 2, 3)), None, {k: v.astype(float) for k, v in params.items()})
    >>> y.dtype
    dtype('float64')
    """
    settings = settle("rnn", RNNOptions, options)
    cell = f"rnn_{check.word('rnn', 'nonlinearity', nonlinearity, 'tanh', 'relu')}"
    return _forward("rnn", cell, x, state, params, settings=settings)


@spelled_out(RNNOptions, ending=_CALL)
def ligru(x: _Array, state: _Array | None = None, params: Any = None, **options: Unpack[RNNOptions]) -> Any:
    """Run a Li-GRU (Ravanelli et al. 2018, without batch norm): a GRU with no reset gate, and relu for tanh.

    z = sigmoid(x Wz^T + bz + h' Rz^T), n = relu(x Wn^T + bn + h' Rn^T), h = (1 - z) n + z h'. The rows of weights are
    in the order z, n. (SpeechBrain has n first.) The state is one array h.

    >>> params = fusedrnn.params.init("ligru", 3, 4, seed=0)
    >>> y, h, tape = fusedrnn.ligru(np.ones((5, 2, 3), np.float32), None, params, training=True)
    >>> y.shape, fusedrnn.ligru_backward(tape, np.ones_like(y))["weight_hh_l0"].shape
    ((5, 2, 4), (8, 4))
    """
    return _forward("ligru", "ligru", x, state, params, settings=settle("ligru", RNNOptions, options))


@spelled_out(Options, ending=_CALL)
def mingru(x: _Array, state: _Array | None = None, params: Any = None, **options: Unpack[Options]) -> Any:
    """Run a minGRU (Feng et al. 2024): z = sigmoid(x Wz^T + bz), n = x Wn^T + bn, h = (1 - z) h' + z n.

    The gates look at x alone, so there is no weight_hh: one product for all steps, then a cheap walk over time.
    The state is one array h.

    >>> params = fusedrnn.params.init("mingru", 3, 4, seed=0)
    >>> y, h, tape = fusedrnn.mingru(np.ones((5, 2, 3), np.float32), None, params, training=True)
    >>> sorted(fusedrnn.mingru_backward(tape, np.ones_like(y)))
    ['bias_ih_l0', 'state', 'weight_ih_l0', 'x']
    """
    return _forward("mingru", "mingru", x, state, params, settings=settle("mingru", Options, options))


@spelled_out(Options, ending=_CALL)
def minlstm(x: _Array, state: _Array | None = None, params: Any = None, **options: Unpack[Options]) -> Any:
    """Run a minLSTM (Feng et al. 2024): i, f = sigmoid(x Wi^T + bi, x Wf^T + bf), g = x Wg^T + bg,
    h = (f h' + i g) / (f + i).

    The gates look at x alone, so there is no weight_hh: one product for all steps, then a cheap walk over time.
    The state is one array h.

    >>> params = fusedrnn.params.init("minlstm", 3, 4, seed=0)
    >>> y, h, tape = fusedrnn.minlstm(np.ones((5, 2, 3), np.float32), None, params, training=True)
    >>> sorted(fusedrnn.minlstm_backward(tape, np.ones_like(y)))
    ['bias_ih_l0', 'state', 'weight_ih_l0', 'x']
    """
    return _forward("minlstm", "minlstm", x, state, params, settings=settle("minlstm", Options, options))


@spelled_out(ending=_BACKWARD)
def lstm_backward(tape: Tape, dy: _Array | None = None, dstate: Any = None, dcells: _Array | None = None) -> Any:
    """Gradients from those of the results of `lstm`. dstate is a pair (h, c), either of which may be None.

    >>> params = fusedrnn.params.init("lstm", 3, 4, bias=False, seed=0)
    >>> y, state, tape = fusedrnn.lstm(np.ones((5, 3), np.float32), None, params, training=True)
    >>> sorted(fusedrnn.lstm_backward(tape, dstate=state))
    ['state', 'weight_hh_l0', 'weight_ih_l0', 'x']
    """
    return _backward("lstm", tape, dy, dstate, dcells)


@spelled_out(ending=_BACKWARD)
def gru_backward(tape: Tape, dy: _Array | None = None, dstate: Any = None, dcells: _Array | None = None) -> Any:
    """Gradients from those of the results of `gru`."""
    return _backward("gru", tape, dy, dstate, dcells)


@spelled_out(ending=_BACKWARD)
def rnn_backward(tape: Tape, dy: _Array | None = None, dstate: Any = None, dcells: _Array | None = None) -> Any:
    """Gradients from those of the results of `rnn`."""
    return _backward("rnn", tape, dy, dstate, dcells)


@spelled_out(ending=_BACKWARD)
def ligru_backward(tape: Tape, dy: _Array | None = None, dstate: Any = None, dcells: _Array | None = None) -> Any:
    """Gradients from those of the results of `ligru`."""
    return _backward("ligru", tape, dy, dstate, dcells)


@spelled_out(ending=_BACKWARD)
def mingru_backward(tape: Tape, dy: _Array | None = None, dstate: Any = None, dcells: _Array | None = None) -> Any:
    """Gradients from those of the results of `mingru`."""
    return _backward("mingru", tape, dy, dstate, dcells)


@spelled_out(ending=_BACKWARD)
def minlstm_backward(tape: Tape, dy: _Array | None = None, dstate: Any = None, dcells: _Array | None = None) -> Any:
    """Gradients from those of the results of `minlstm`."""
    return _backward("minlstm", tape, dy, dstate, dcells)


@spelled_out()
def jvp(tape: Tape, tangents: Mapping[str, Any], return_cells: bool = False) -> Any:
    """Tangents of the results of the call that made the tape, along tangents of its arguments (forward mode).

    tangents: a dict with any of "x", "state", "context" and the parameters' names, each in its argument's shape. The
        rest is zero.

    Returns (ty, tstate), or (ty, tstate, tcells) with return_cells.
    Raises TypeError or ValueError as `lstm` does.

    >>> params = fusedrnn.params.init("gru", 3, 4, seed=0)
    >>> x = np.ones((5, 2, 3), np.float32)
    >>> y, h, tape = fusedrnn.gru(x, None, params, training=True)
    >>> ty, th = fusedrnn.ops.jvp(tape, {"x": x})
    >>> ty.shape
    (5, 2, 4)
    """
    call = _tape("jvp", tape).call
    return_cells = check.flag("jvp", "return_cells", return_cells)
    public, out = _new_results(call, return_cells)
    tape.backend.jvp(call.problem, tape.arguments, _tangents("jvp", tape, tangents), out)
    return _state_last(call, public, return_cells)


@spelled_out()
def hvp(
    tape: Tape,
    tangents: Mapping[str, Any],
    dy: _Array | None = None,
    dstate: Any = None,
    dcells: _Array | None = None,
    *,
    tdy: _Array | None = None,
    tdstate: Any = None,
    tdcells: _Array | None = None,
) -> Any:
    """Tangents of what backward(tape, dy, dstate, dcells) returns: second derivatives times a vector.

    tangents: of the arguments of forward, as in `jvp`.
    tdy, tdstate, tdcells: tangents of the gradients that went in. None: zero.

    Returns a dict as backward does. Raises TypeError or ValueError as `lstm` does.

    >>> params = fusedrnn.params.init("lstm", 3, 4, seed=0)
    >>> x = np.ones((5, 2, 3), np.float32)
    >>> y, h, tape = fusedrnn.lstm(x, None, params, training=True)
    >>> fusedrnn.ops.hvp(tape, {"weight_hh_l0": params["weight_hh_l0"]}, dy=y)["x"].shape
    (5, 2, 3)
    """
    call = _tape("hvp", tape).call
    v = _tangents("hvp", tape, tangents)
    g = _given_results("hvp", call, "d", dy, dstate, dcells)
    t = _given_results("hvp", call, "td", tdy, tdstate, tdcells)
    grads, out, finish = _new_arguments(tape)
    tape.backend.hvp(call.problem, tape.arguments, v, g, t, out)
    return finish(grads)


# The way of every call.


def _forward(op: str, cell: str, x: Any, state: Any, params: Any, *, settings: Settings) -> Any:
    """A call of the function `op`, whose options chose this cell."""
    settings.training = training = check.flag(op, "training", settings.training)
    settings.return_cells = check.flag(op, "return_cells", settings.return_cells)
    reuse = settings.reuse
    if reuse is not None and not isinstance(reuse, Tape):
        check.fail(op, "reuse", f"is {arrays.kind(reuse)}", "an old tape, or None", error=TypeError)
    call = check.call(op, cell, x, state, params, options=settings)
    problem = call.problem
    if call.on_cuda:
        refuse_on_cuda(op, cell, call.variant)
    chosen: Any = backends.choose(settings.backend, on_cuda=call.on_cuda)
    if call.bf16:
        _bfloat16_weights(call, chosen, training)
    inputs = {"x": call.x, "h": call.h0, "c": call.c0} | dict(call.named)
    if call.context is not None:
        inputs["context"] = call.context
    arguments = _arguments(call, inputs)
    public, out = _new_results(call, settings.return_cells)
    if not training:
        buffer = None
    elif call.on_cuda:
        buffer = chosen.new_tape(problem, arguments)
    else:
        buffer = _tape_memory(chosen.tape_elements(problem), call.dtype, reuse)
    chosen.forward(problem, arguments, out, buffer)
    tape = Tape(call, chosen, arguments, inputs, buffer) if training else None
    return (*_state_last(call, public, settings.return_cells), tape)


def _bfloat16_weights(call: check.Call, chosen: backends.Backend, training: bool) -> None:
    """Leave them to kernels that read them; widen them for the others."""
    if training:
        fix = "Train with float32 weights; fusedrnn.params.from_bfloat16 makes them."
        check.fail(call.op, "params", "hold bfloat16 weights", "float32 or float64 weights with training=True", fix)
    if not chosen.__name__.endswith("native"):
        backends.log.info("%s computes with bfloat16 weights as float32", chosen.__name__.rpartition(".")[2])
        call.params = [parameters.widen(a) if a.dtype == np.uint16 else a for a in call.params]
        call.context_params = parameters.from_bfloat16(call.context_params)
        call.problem.bf16_weights = False
    else:  # the kernels read W and R as bfloat16, and what options add as float32
        call.params = [
            parameters.widen(a) if name.startswith(("weight_ph", "weight_hr")) else a
            for name, a in zip(call.names, call.params, strict=True)
        ]


def _tape_memory(size: int, dtype: Any, reuse: Tape | None) -> _Array:
    """An old tape's, because new memory has to be cleared by the system page by page; not twice as much as needed.

    It begins with a line of the cache, so that threads that own neighbouring units write no line in common.
    """
    dtype, whole = np.dtype(dtype), None
    line = 64 // dtype.itemsize
    if reuse is not None and reuse.buffer is not None and reuse.buffer.dtype == dtype:
        old = reuse.buffer.base
        if size + line <= old.size <= 2 * (size + line):
            whole, reuse.buffer = old, None
    if whole is None:
        whole = np.empty(size + line, dtype)
    first = -whole.__array_interface__["data"][0] % 64 // dtype.itemsize
    memory: _Array = whole[first : first + size]
    return memory


def _tape(op: str, tape: Any) -> Tape:
    if not isinstance(tape, Tape):
        function = op.removesuffix("_backward") if "_" in op else "lstm"
        fix = f"Call {function}(..., training=True): the last thing it returns."
        check.fail(op, "tape", f"is {arrays.kind(tape)}", "a tape", fix, TypeError)
    return tape


def _backward(op: str, tape: Tape, dy: Any, dstate: Any, dcells: Any) -> Any:
    name = f"{op}_backward"
    _tape(name, tape)
    if tape.call.op != op:
        check.fail(name, "tape", f"comes from {tape.call.op}", op, f"Call {tape.call.op}_backward.")
    if tape.buffer is None:
        check.fail(name, "tape", "lost its memory to a later call", "the latest tape", "Don't give it as reuse=.")
    g = _given_results(name, tape.call, "d", dy, dstate, dcells)
    grads, out, finish = _new_arguments(tape)
    tape.backend.backward(tape.call.problem, tape.arguments, tape.buffer, g, out)
    return finish(grads)


# Between the user's arrays and the canonical ones.


def _axes(call: check.Call, name: str, ndim: int) -> tuple[str, str]:
    """How an argument with ndim axes lies, and its canonical axes."""
    if name == "x":
        return call.x_axes, arrays.X if "I" in call.x_axes else arrays.TOKENS
    if name in ("h", "c"):
        canonical, full = arrays.STATE, call.state_axes
    elif name == "context":
        canonical, full = arrays.CONTEXT, arrays.data_axes(arrays.CONTEXT, False, call.unbatched, call.sets)
    else:
        full = canonical = check.weight_axes(name)
    return (full if ndim == len(full) else full.replace("E", "")), canonical


def _arguments(call: check.Call, given: Mapping[str, Any]) -> Arguments:
    """The canonical views of x, h, c and parameters by name; None stays None."""

    def place(name: str) -> Any:
        array = given.get(name)
        if array is None:
            return None
        axes, canonical = _axes(call, name, array.ndim)
        return arrays.view(array, axes, canonical, call.problem.E)

    placed = {name: place(name) for name in call.names}
    weights = [place(name) for name in call.context_params] or None
    params, extras = _params(call, placed), _extras(call, placed)
    return Arguments(place("x"), place("h"), place("c"), params, place("context"), weights, extras)


def _extras(call: check.Call, arrays_by_name: Mapping[str, Any]) -> list[Any]:
    """What a variant adds to the parameters."""
    return _params(call, arrays_by_name, parameters.EXTRAS) if call.problem.variant else []


def _params(
    call: check.Call, arrays_by_name: Mapping[str, Any], kinds: tuple[str, ...] = parameters.KINDS
) -> list[Any]:
    """The canonical arrays of every layer and direction; what a cell does not have is None."""
    count = call.problem.L * call.problem.D
    each = len(call.names) // count
    groups = [call.names[n * each : (n + 1) * each] for n in range(count)]
    by_kind = [{name.partition("_l")[0]: arrays_by_name[name] for name in group} for group in groups]
    return [tuple(group.get(kind) for kind in kinds) for group in by_kind]


def _new_results(call: check.Call, want_cells: bool) -> tuple[Results, Results]:
    """New arrays for all results: as the user gets them, and their canonical views."""

    def new(axes: str, narrow: bool = False) -> Any:
        return arrays.empty(call.shape(axes, narrow), call.dtype, call.params[0])

    public = Results(
        new(call.y_axes, True),
        new(call.state_axes, True),
        new(call.state_axes) if call.cell.cell_state else None,
        new(call.cells_axes) if want_cells else None,
    )
    return public, _canonical_results(call, public)


def _canonical_results(call: check.Call, public: Results) -> Results:
    def place(array: Any, axes: str, canonical: str) -> Any:
        return None if array is None else arrays.view(array, axes, canonical)

    return Results(
        place(public.y, call.y_axes, arrays.Y),
        place(public.hn, call.state_axes, arrays.STATE),
        place(public.cn, call.state_axes, arrays.STATE),
        place(public.cells, call.cells_axes, arrays.CELLS),
    )


def _state_last(call: check.Call, public: Results, want_cells: bool) -> tuple[Any, ...]:
    state = (public.hn, public.cn) if call.cell.cell_state else public.hn
    results: tuple[Any, ...] = (public.y, state, public.cells) if want_cells else (public.y, state)
    return arrays.users(results) if call.on_cuda else results


def _given_results(op: str, call: check.Call, prefix: str, y: Any, state: Any, cells: Any) -> Results:
    """Gradients (or their tangents) that the user gives for y, state and cells, checked, as canonical views."""
    if call.on_cuda:
        y, state, cells = map(arrays.on_device, (y, state, cells))
    hn, cn = check.state_parts(op, f"{prefix}state", call.cell, state)
    pair = f"{prefix}state[{{}}]" if call.cell.cell_state else f"{prefix}state"
    for name, array, axes in (
        (f"{prefix}y", y, call.y_axes),
        (pair.format(0), hn, call.state_axes),
        (pair.format(1), cn, call.state_axes),
        (f"{prefix}cells", cells, call.cells_axes),
    ):
        if array is not None:
            check.is_float(op, name, array, call.dtype)
            if call.on_cuda:
                check.together(op, call.params[0], [(name, array)], streams=False)
            call.expect(name, array, axes, op=op)
    return _canonical_results(call, Results(y, hn, cn, cells))


def _tangents(op: str, tape: Tape, tangents: Mapping[str, Any]) -> Arguments:
    """Tangents by name, checked against the arguments they belong to, as canonical views."""
    call = tape.call
    if not isinstance(tangents, Mapping):
        fix = "Such as {'x': tx}."
        check.fail(op, "tangents", f"is {arrays.kind(tangents)}", "a dict of arrays by name", fix, TypeError)
    given = dict(arrays.on_device(tangents) if call.on_cuda else tangents)
    if "state" in given:
        given["h"], given["c"] = check.state_parts(op, "tangents['state']", call.cell, given.pop("state"))
    for name, array in given.items():
        if name not in tape.inputs:
            expected = ", ".join([*(name for name in tape.inputs if name not in ("h", "c")), "state"])
            check.fail(op, "tangents", f"has {name!r}", f"some of {expected}")
        if array is None:
            continue
        if name == "x" and "I" not in call.x_axes:
            fix = "Tokens are integers: they have no tangent."
            check.fail(op, "tangents", "has 'x'", f"some of {', '.join(['state', *call.names])}", fix)
        label = f"tangents[{name if name not in 'hc' else 'state'!r}]"
        check.is_float(op, label, array, call.dtype)
        like = tape.inputs[name]
        axes = call.state_axes if like is None else _axes(call, name, like.ndim)[0]
        expected_shape = call.shape(axes, name == "h") if like is None else like.shape
        if array.shape != expected_shape:
            check.fail(op, label, f"has shape {array.shape}", f"{expected_shape}, its argument's shape")
    return _arguments(call, given)


def _new_arguments(tape: Tape) -> Any:
    """New arrays for the gradients of all arguments: by name as the user gets them, their canonical views, and what
    sums the gradients of a shared x or state over E at the end and names them."""
    call = tape.call
    E = call.problem.E
    public: dict[str, Any] = {}
    canonical: dict[str, Any] = {}
    for name, given in tape.inputs.items():
        if (name == "c" and not call.cell.cell_state) or (name == "x" and "I" not in call.x_axes):
            continue
        if given is None:
            axes, target = call.state_axes, arrays.STATE
        else:
            axes, target = _axes(call, name, given.ndim)
        if name in ("x", "h", "c") and E > 1 and "E" not in axes and not call.on_cuda:
            canonical[name] = np.empty(call.shape(target, name == "h"), call.dtype)
            continue
        shape = call.shape(axes, name == "h") if given is None else given.shape
        public[name] = arrays.empty(shape, call.dtype, call.params[0])
        canonical[name] = arrays.view(public[name], axes, target, E, write=True)

    def finish(grads: dict[str, Any]) -> dict[str, Any]:
        for name in ("x", "h", "c"):
            if name in canonical and name not in grads:
                axes, target = _axes(call, name, tape.inputs[name].ndim)
                total = canonical[name].sum(axis=target.index("E"), keepdims=True)
                grads[name] = total.transpose([target.index(a) for a in axes + "".join(set(target) - set(axes))])
                grads[name] = grads[name].reshape(tape.inputs[name].shape)
        if call.on_cuda:
            grads = arrays.users(grads)
        h = grads.pop("h")
        state = (h, grads.pop("c")) if call.cell.cell_state else h
        x = {"x": grads.pop("x")} if "x" in grads else {}
        return {**x, "state": state, **grads}

    params, extras = _params(call, canonical), _extras(call, canonical)
    weights = [canonical[name] for name in call.context_params] or None
    state = canonical["h"], canonical.get("c")
    return public, Arguments(canonical.get("x"), *state, params, canonical.get("context"), weights, extras), finish
