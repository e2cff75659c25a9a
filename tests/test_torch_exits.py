# SPDX-License-Identifier: Apache-2.0
"""The ways out of torch (ONNX, traces, torch.fx, decompositions, quantization), and torch.nn's proj_size."""

import copy
import io
import subprocess
import sys
import textwrap
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch", minversion="2.8")

from torch import nn  # noqa: E402
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence  # noqa: E402
from torch.utils import _pytree as pytree  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import fusedrnn.torch  # noqa: E402
from fusedrnn.torch import how  # noqa: E402

I, H = 3, 5
LAYERS = ("RNN", "LSTM", "GRU")
CELLS = ("RNNCell", "LSTMCell", "GRUCell")
DYNAMIC = torch.export.Dim.DYNAMIC

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch.jit, torch.ao, the exporter that traces
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


def pair(kind, *arguments, **options):
    """torch.nn's module and ours, made from the same random numbers."""
    torch.manual_seed(0)
    theirs = getattr(nn, kind)(*arguments, **options)
    torch.manual_seed(0)
    return theirs, getattr(fusedrnn.torch, kind)(*arguments, **options)


def same(a, b, **tolerance):
    a, b = pytree.tree_leaves(a), pytree.tree_leaves(b)
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, **tolerance)


def states_of(module, B, dtype=torch.float32):
    """Random initial states, as torch.nn takes them."""
    S = module.num_layers * (2 if module.bidirectional else 1)
    h = torch.randn(S, B, module.proj_size or H, dtype=dtype)
    return (h, torch.randn(S, B, H, dtype=dtype)) if module.mode == "LSTM" else h


def rows_of(module, x, hx, lengths):
    """torch.nn's module, row by row: what `lengths` means."""
    if module.batch_first:
        x = x.transpose(0, 1)
    hx = states_of(module, x.shape[1], x.dtype) if hx is None else hx
    width = (module.proj_size or H) * (2 if module.bidirectional else 1)
    y, finals = x.new_zeros(*x.shape[:2], width), []
    for b, n in enumerate(lengths.tolist()):
        final = pytree.tree_map(lambda s, b=b: s[:, b], hx)
        if n:
            out, final = nn.Module.__call__(module, x[:n, b], final)
            y[:n, b] = out
        finals.append(final)
    final = pytree.tree_map(lambda *parts: torch.stack(parts, 1), *finals)
    return (y.transpose(0, 1) if module.batch_first else y), final


# ONNX.


class Net(nn.Module):
    """A layer whose further inputs are named: "h", "c", "n" (lengths)."""

    def __init__(self, rnn, names):
        super().__init__()
        self.rnn, self.names = rnn, names

    def forward(self, x, *more):
        given = dict(zip(self.names, more, strict=True))
        lengths = given.pop("n", None)
        hx = tuple(given.values()) if len(given) == 2 else next(iter(given.values()), None)
        return self.rnn(x, hx) if lengths is None else self.rnn(x, hx, lengths=lengths)


def inputs_of(module, names, T, B):
    torch.manual_seed(T)
    state = pytree.tree_leaves(states_of(module, B))
    lengths = torch.randint(0, T + 1, (B,))
    lengths[:2] = torch.tensor([T, 0])
    more = [lengths if name == "n" else state["hc".index(name)] for name in names]
    return (torch.randn(B, T, I) if module.batch_first else torch.randn(T, B, I), *more)


def export(model, inputs, dynamo, axes=None, **options):
    """The bytes of an ONNX model. axes: for each input, its dynamic axes."""
    pytest.importorskip("onnx")
    names = [f"input{n}" for n in range(len(inputs))]
    file = io.BytesIO()
    if dynamo:
        shapes = None
        if axes is not None:
            first, *rest = ({axis: DYNAMIC for axis in each} for each in axes)
            shapes = (first, tuple(rest)) if rest else (first,)  # Net takes them as *more
        program = torch.onnx.export(
            model, inputs, dynamo=True, verbose=False, input_names=names, dynamic_shapes=shapes, **options
        )
        return program.model_proto.SerializeToString()
    axes = axes and {name: {axis: f"{name}_{axis}" for axis in each} for name, each in zip(names, axes, strict=True)}
    torch.onnx.export(model, inputs, file, dynamo=False, input_names=names, dynamic_axes=axes, **options)
    return file.getvalue()


def nodes(data):
    import onnx

    return [node.op_type for node in onnx.load_from_string(data).graph.node if node.op_type != "Constant"]


def run(data, inputs):
    ort = pytest.importorskip("onnxruntime")
    session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
    given = zip(session.get_inputs(), inputs, strict=True)
    return [torch.from_numpy(a) for a in session.run(None, {to.name: t.numpy() for to, t in given})]


STACK = {"num_layers": 2, "bidirectional": True}
MODELS = [  # covers: kind, layers, directions, bias, batch_first, inputs, opset, training mode, each with most others
    ("LSTM", {}, "", None),
    ("LSTM", {**STACK, "batch_first": True}, "hcn", 18),
    ("LSTM", {"bias": False}, "hc", 22),
    ("GRU", {"num_layers": 2, "dropout": 0.5, "batch_first": True}, "", 14),
    ("GRU", {"bidirectional": True, "bias": False}, "hn", None),
    ("RNN", {**STACK, "nonlinearity": "relu"}, "n", None),
    ("RNN", {"bias": False, "batch_first": True}, "h", 20),
]


@pytest.mark.parametrize(
    "dynamo", [pytest.param(False, id="traced"), pytest.param(True, id="dynamo", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("kind, options, names, opset", MODELS)
def test_onnx_models_are_right_at_every_size(kind, options, names, opset, dynamo):
    theirs, ours = pair(kind, I, H, **options)
    time = 1 if ours.batch_first else 0
    axes = [(0, 1), *((0,) if name == "n" else (1,) for name in names)]
    example = inputs_of(ours, names, 6, 3)
    data = export(Net(ours, names), example, dynamo, axes, **({"opset_version": opset} if opset else {}))
    kind_of_node, found = ours.mode.partition("_")[0], nodes(data)
    assert found.count(kind_of_node) == ours.num_layers
    assert set(found) <= {kind_of_node, *"Squeeze Gather Concat Transpose Slice Cast Equal Unsqueeze Where".split()}
    theirs.eval()
    for inputs in (example, inputs_of(ours, names, 9, 4)):
        given = dict(zip(names, inputs[1:], strict=True))
        hx = (given["h"], given["c"]) if "c" in given else given.get("h")
        if "n" in given:
            B = inputs[0].shape[1 - time]
            zero = pytree.tree_map(torch.zeros_like, states_of(ours, B))
            want = rows_of(theirs, inputs[0], zero if hx is None else hx, given["n"])
        else:
            want = theirs(inputs[0], hx)
        same(run(data, inputs), [t.detach() for t in pytree.tree_leaves(want)], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dynamo", [False, True], ids=["traced", "dynamo"])
def test_onnx_of_a_bare_layer_and_of_cells(dynamo):
    x = torch.randn(6, 2, I)
    theirs, ours = pair("LSTM", I, H)
    same(run(export(ours, (x,), dynamo), (x,)), theirs(x))
    for kind in ("GRUCell",) if dynamo else CELLS:
        theirs, ours = pair(kind, I, H)
        data = export(ours, (x[0],), dynamo, [(0,)])
        for step in (x[0], torch.randn(5, I)):
            same(run(data, (step,)), theirs(step))


@pytest.mark.parametrize("kind, options, names", [("LSTM", STACK, "hcn"), ("GRU", {"bias": False}, "")])
def test_onnx_of_a_program_that_was_exported_before(kind, options, names):
    theirs, ours = pair(kind, I, H, **options)
    shapes = [{0: DYNAMIC, 1: DYNAMIC}, tuple({0 if name == "n" else 1: DYNAMIC} for name in names)]
    shapes = tuple(shapes if names else shapes[:1])
    program = torch.export.export(Net(ours, names), inputs_of(ours, names, 6, 3), dynamic_shapes=shapes)
    assert "fusedrnn" in str(program.graph)
    data = torch.onnx.export(program, dynamo=True, verbose=False).model_proto.SerializeToString()
    assert nodes(data).count(kind) == ours.num_layers
    inputs = inputs_of(ours, names, 9, 4)
    want = rows_of(theirs, inputs[0], inputs[1:3], inputs[3]) if names else theirs(inputs[0])
    same(run(data, inputs), want, rtol=1e-5, atol=1e-6)


def test_onnx_of_functions():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(I, H)

        def forward(self, x):
            return fusedrnn.torch.gru(x, None, dict(self.rnn.named_parameters()), reverse=True)

    model, x = Own(), torch.randn(6, 2, I)
    data = export(model, (x,), False, [(0, 1)])
    assert nodes(data) == ["GRU", "Squeeze"]
    for given in (x, torch.randn(4, 3, I)):
        y, h = model.rnn(given.flip(0))
        same(run(data, (given,)), [y.flip(0), h])


def test_onnx_under_autocast_keeps_the_types_of_the_model():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = fusedrnn.torch.GRU(I, H)

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.rnn(x * 2)

    model, x = Own(), torch.randn(6, 2, I)
    same(run(export(model, (x,), False), (x,)), model.rnn(x * 2))


class Reset(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.rnn, self.options = fusedrnn.torch.LSTM(I, H), options

    def forward(self, x):
        return self.rnn(x, **self.options)


def refused():
    clipped = fusedrnn.torch.LSTM(I, H)
    clipped.clip_cell = 1.0
    return {
        "reset": Reset(reset=torch.zeros(6, 2, dtype=torch.bool)),
        "return_cells": Reset(return_cells=True),
        "clip_cell": clipped,
        "proj_size": fusedrnn.torch.LSTM(I, H, proj_size=2),
    }


@pytest.mark.parametrize("name", ["reset", "return_cells", "clip_cell", "proj_size"])
def test_what_onnx_cannot_say_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"torch.onnx.export: {name} is set"):
        export(refused()[name], (torch.randn(6, 2, I),), False)
    if name == "proj_size":  # the other exporter wraps what a model raises
        with pytest.raises(Exception, match=name) as caught:
            export(refused()[name], (torch.randn(6, 2, I),), True)
        assert isinstance(caught.value.__cause__, ValueError)


class Packed(nn.Module):
    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, x, lengths):
        y, state = self.rnn(pack_padded_sequence(x, lengths))
        return pad_packed_sequence(y)[0], state


def test_packed_sequences_leave_by_torchs_own_code():
    theirs, ours = pair("GRU", I, H)
    inputs = torch.randn(6, 2, I), torch.tensor([6, 3])
    same(run(export(Packed(ours), inputs, False), inputs), Packed(theirs)(*inputs))
    traced = torch.jit.trace(Packed(ours), inputs)
    same(traced(inputs[0], torch.tensor([6, 5])), Packed(theirs)(inputs[0], torch.tensor([6, 5])))
    with pytest.raises(Exception, match="PackedSequence") as caught:
        export(Packed(ours), inputs, True)
    assert "lengths=" in str(caught.value.__cause__)


# torch.jit.


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_a_trace_is_torchs_own(kind):
    cell = kind in CELLS
    theirs, ours = pair(kind, I, H, **({} if cell else STACK))
    x, other = torch.randn(6, 2, I), torch.randn(9, 3, I)
    x, other = (x[0], other[0]) if cell else (x, other)
    graphs = []
    for module in (theirs, ours):
        traced = torch.jit.trace(module, (x,), check_trace=False)
        graphs.append([node.kind() for node in traced.inlined_graph.nodes()])
    assert graphs[0] == graphs[1]
    assert fusedrnn.torch.route() == "torch.nn: torch.jit.trace"
    same(traced(other), theirs(other))
    same(torch.jit.trace(ours, (x,))(other), theirs(other))  # with torch's check of the trace


class Function(nn.Module):
    def __init__(self, layer, **options):
        super().__init__()
        self.layer, self.options = layer, options

    def forward(self, x):
        return fusedrnn.torch.lstm(x, None, dict(self.layer.named_parameters()), **self.options)


def test_a_trace_of_functions_and_what_it_cannot_hold():
    layer = nn.LSTM(I, H, proj_size=2)
    x, other = torch.randn(6, 2, I), torch.randn(9, 3, I)
    same(torch.jit.trace(Function(layer), (x,))(other), layer(other))
    with pytest.raises(ValueError, match=r"torch.jit.trace: reverse is set"):
        torch.jit.trace(Function(layer, reverse=True), (x,))
    for name in ("reset", "return_cells", "clip_cell"):
        with pytest.raises(ValueError, match=f"torch.jit.trace: {name} is set"):
            torch.jit.trace(refused()[name], (x,))
    clipped = fusedrnn.torch.GRU(I, H)
    clipped.clip_grad = 0.1
    with pytest.raises(ValueError, match="torch.jit.trace: clip_grad is set"):
        torch.jit.trace(clipped, (x,))


def test_a_saved_trace_needs_no_fusedrnn_and_nothing_warns(tmp_path):
    """In new processes: warnings are as a user sees them."""
    path = str(tmp_path / "trace.pt")
    make = f"""
        import io, torch, fusedrnn.torch
        torch.manual_seed(0)
        model = torch.nn.Sequential(fusedrnn.torch.GRU(3, 5))
        x = torch.ones(4, 2, 3)
        trace = torch.jit.trace(model, (x,))
        trace.save({path!r})
        axes = {{"dynamic_axes": {{"x": [0]}}, "input_names": ["x"]}}
        torch.onnx.export(fusedrnn.torch.LSTM(3, 5), (x,), io.BytesIO(), dynamo=False, **axes)
        print(model(x)[0].double().sum().item())
    """
    load = f"""
        import sys, torch
        sys.modules["fusedrnn"] = None
        print(torch.jit.load({path!r})(torch.ones(4, 2, 3))[0].double().sum().item())
    """
    found = []
    for script in (make, load):
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "TracerWarning" not in done.stderr
        found.append(float(done.stdout))
    assert found[0] == pytest.approx(found[1], abs=1e-5)


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_scripting_names_restore(kind):
    _, ours = pair(kind, I, H)
    for model in (ours, nn.Sequential(ours)):
        with pytest.raises(RuntimeError, match=r"fusedrnn.torch.restore\(model\)"):
            torch.jit.script(model)

    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = ours

        def forward(self, x):
            return self.rnn(x)

    x = torch.randn(6, 2, I) if kind in LAYERS else torch.randn(2, I)
    y = ours(x)
    fusedrnn.torch.restore(ours)
    same(torch.jit.script(Holder())(x), y)


# torch.fx and torch.ao.


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.cell = fusedrnn.torch.GRU(I, H), fusedrnn.torch.LSTMCell(H, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x, lengths, h=None):
        y, h = self.rnn(x, h, lengths=lengths)
        return self.head(self.cell(y[-1])[0]), h


def test_modules_are_leaves_of_fx():
    model = Model()
    model.rnn.recompute = True
    inputs = torch.randn(6, 2, I), torch.tensor([6, 2]), torch.randn(1, 2, H)
    graph = torch.fx.symbolic_trace(model)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["rnn", "cell", "head"]
    same(graph(*inputs), model(*inputs), rtol=0, atol=0)
    same(torch.fx.Interpreter(graph).run(*inputs), model(*inputs), rtol=0, atol=0)
    assert fusedrnn.torch.route() == "fused"
    with pytest.raises(TypeError, match="torch.fx: GRU is the model itself"):
        torch.fx.symbolic_trace(model.rnn)


def test_quantization_says_what_it_leaves():
    quantization = pytest.importorskip("torch.ao.quantization")
    quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    model, x, lengths = Model().eval(), torch.randn(6, 2, I), torch.tensor([6, 2])
    assert not hasattr(model.rnn, "qconfig")
    with pytest.warns(UserWarning, match=r"leaves fusedrnn.torch.GRU as it is.*fusedrnn.torch.restore\(model\)"):
        left = quantization.quantize_dynamic(model, {nn.GRU, nn.LSTMCell, nn.Linear})
    assert type(left.rnn) is fusedrnn.torch.GRU
    assert type(left.head) is not nn.Linear
    same(left(x, lengths)[1], model(x, lengths)[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mapping = quantization.get_default_qconfig_mapping()
        prepared = quantize_fx.prepare_fx(copy.deepcopy(model), mapping, (x, lengths))
        prepared(x, lengths)
        same(quantize_fx.convert_fx(prepared)(x, lengths)[1], model(x, lengths)[1], rtol=0, atol=0.05)
        fusedrnn.torch.restore(model)
        done = quantization.quantize_dynamic(model, {nn.GRU, nn.LSTMCell})
    assert [type(done.rnn).__name__, type(done.cell).__name__] == ["GRU", "LSTMCell"]
    assert not isinstance(done.rnn, nn.RNNBase)
    assert not isinstance(done.cell, nn.RNNCellBase)


# torch's own operators.


class Everything(nn.Module):
    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, x, lengths, reset):
        return self.rnn(x, lengths=lengths, reset=reset, return_cells=True)


@pytest.mark.parametrize(
    "module",
    [
        lambda: Everything(fusedrnn.torch.LSTM(I, H, 2, bidirectional=True, proj_size=2)),
        lambda: Everything(fusedrnn.torch.GRU(I, H, 2, bias=False)),
        lambda: fusedrnn.torch.RNN(I, H, nonlinearity="relu", bidirectional=True),
        lambda: fusedrnn.torch.LSTMCell(I, H),
    ],
)
def test_decomposed_programs_have_no_operator_of_ours(module):
    model = module()
    x = torch.randn(4, 3, I)
    inputs = (x, torch.tensor([4, 0, 2]), torch.rand(4, 3) < 0.3) if isinstance(model, Everything) else (x,)
    inputs = (x[0],) if isinstance(model, fusedrnn.torch.LSTMCell) else inputs
    program = torch.export.export(model, inputs)
    assert "fusedrnn" in str(program.graph)
    plain = program.run_decompositions(fusedrnn.torch.decompositions())
    assert "fusedrnn" not in str(plain.graph)
    given = tuple(t + torch.randn_like(t) if t.is_floating_point() else t for t in inputs)
    same(plain.module()(*given), model(*given))


def test_decompositions_refuse_a_dynamic_number_of_steps():
    program = torch.export.export(
        fusedrnn.torch.GRU(I, H), (torch.randn(4, 3, I),), dynamic_shapes={"input": {0: DYNAMIC, 1: DYNAMIC}}
    )
    with pytest.raises(ValueError, match="decompositions: T is dynamic"):
        program.run_decompositions(fusedrnn.torch.decompositions())


def flops(module, x, hx=None):
    with FlopCounterMode(display=False) as counter:
        y, _ = module(x, hx)
        forward = counter.get_total_flops()
        if y.requires_grad:
            y.sum().backward()
    return forward, counter.get_total_flops() - forward


@pytest.mark.parametrize("options", [{}, STACK])
@pytest.mark.parametrize("kind", ["GRU", "RNN"])
def test_flops_are_those_of_torchs_operators(kind, options):
    theirs, ours = pair(kind, I, H, **options)
    x = torch.randn(6, 2, I)
    for wanted in (False, True):
        hx = states_of(ours, 2).requires_grad_(wanted)
        counted = [flops(module, x.clone().requires_grad_(wanted), hx) for module in (theirs, ours)]
        assert counted[0] == counted[1]
    with torch.no_grad():
        assert flops(ours, x) == flops(theirs, x) != (0, 0)


def test_flops_of_an_lstm():
    """torch counts none where oneDNN runs its LSTM."""
    x = torch.randn(6, 2, I, requires_grad=True)
    products = 2 * 6 * 2 * 4 * H * (I + H)
    last = 2 * 2 * 4 * H * H  # into the initial state, which wants no gradient
    assert flops(fusedrnn.torch.LSTM(I, H), x) == (products, 2 * products - last)


def test_all_arguments_may_be_positional():
    layer, x = fusedrnn.torch.LSTM(I, H), torch.randn(6, 2, I)
    reset = torch.rand(6, 2) < 0.3
    same(layer(x, None, [6, 2], reset, True, True), layer(x, lengths=[6, 2], reset=reset, return_cells=True))


# proj_size.


def gradients(outputs, inputs):
    return torch.autograd.grad(sum(t.sin().sum() for t in pytree.tree_leaves(outputs)), inputs)


@pytest.mark.parametrize("options", [{}, {**STACK, "bias": False}, {**STACK, "batch_first": True}])
def test_a_projection_with_lengths_is_torchs_row_by_row(options):
    theirs, ours = pair("LSTM", I, H, proj_size=2, **options, dtype=torch.float64)
    x = torch.randn(9, 4, I, dtype=torch.float64)
    x = (x.transpose(0, 1) if ours.batch_first else x).requires_grad_()
    hx = [s.requires_grad_() for s in states_of(ours, 4, torch.float64)]
    lengths = torch.tensor([9, 0, 4, 7])
    want, got = rows_of(theirs, x, tuple(hx), lengths), ours(x, tuple(hx), lengths=lengths)
    assert fusedrnn.torch.route() == "fused"
    same(got, want)
    leaves = [x, *hx]
    wanted = gradients(want, [*leaves, *theirs.parameters()])
    same(gradients(got, [*leaves, *ours.parameters()]), wanted)
    more = {name: getattr(ours, name) for name in ("num_layers", "bidirectional", "batch_first")}
    for params in (list(ours.parameters()), dict(ours.named_parameters())):
        same(fusedrnn.torch.lstm(x, tuple(hx), params, lengths=lengths, **more), want)


def test_a_projection_with_resets_is_torchs_piece_by_piece():
    theirs, ours = pair("LSTM", I, H, proj_size=2, dtype=torch.float64)
    x = torch.randn(9, 2, I, dtype=torch.float64, requires_grad=True)
    hx = states_of(ours, 2, torch.float64)
    reset = torch.zeros(9, 2, dtype=torch.bool)
    reset[4, 0] = reset[6, 0] = reset[2, 1] = True
    rows, cells = [], []
    for b, cuts in enumerate(([0, 4, 6, 9], [0, 2, 9])):
        ys, cs = [], []
        for begin, end in zip(cuts, cuts[1:], strict=False):
            state = tuple(s[:, b] for s in hx) if begin == 0 else None
            for t in range(begin, end):  # one step at a time: every c
                y, state = theirs(x[t : t + 1, b], state)
                ys.append(y[0])
                cs.append(state[1][0])
        rows.append(torch.stack(ys))
        cells.append(torch.stack(cs))
    want = torch.stack(rows, 1), torch.stack(cells, 1)[None]
    y, _, c = ours(x, hx, reset=reset, return_cells=True)
    same((y, c), want)
    same(gradients((y, c), [x, *ours.parameters()]), gradients(want, [x, *theirs.parameters()]))


def test_a_plain_projection_takes_the_faster_way():
    theirs, ours = pair("LSTM", I, H, **STACK, proj_size=2)
    for T, way in ((9, "fused"), (3, "torch.nn: proj_size in fewer than 8 steps")):
        x = torch.randn(T, 2, I)
        hx = states_of(ours, 2)
        same(ours(x, hx), theirs(x, hx))
        assert fusedrnn.torch.route() == way
        packed = pack_padded_sequence(x, [T, 2])
        (y, y_state), (z, z_state) = theirs(packed, hx), ours(packed, hx)
        assert fusedrnn.torch.route() == way
        same((y.data, y_state), (z.data, z_state))


def test_a_projection_differentiates_maps_and_compiles():
    _, ours = pair("LSTM", I, 4, proj_size=2, dtype=torch.float64)
    x = torch.randn(3, 2, I, dtype=torch.float64, requires_grad=True)

    def function(x):
        return ours(x, lengths=[3, 2])[0]

    assert torch.autograd.gradgradcheck(function, x)
    v = torch.randn_like(x)
    along = torch.func.jvp(function, (x,), (v,))[1]
    step = 1e-6
    same(along, (function(x + step * v) - function(x - step * v)) / (2 * step), rtol=1e-6, atol=1e-8)
    torch.manual_seed(1)
    models = [ours, fusedrnn.torch.LSTM(I, 4, proj_size=2, dtype=torch.float64)]
    stacked, _ = torch.func.stack_module_state(models)
    y = torch.vmap(lambda weights: torch.func.functional_call(ours, weights, (x,))[0])(stacked)
    same(y, torch.stack([model(x)[0] for model in models]))
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (9, 11):
        x = torch.randn(T, 2, I, dtype=torch.float64, requires_grad=True)
        same(gradients(compiled(x), [x]), gradients(ours(x), [x]))


def test_errors_of_projections_name_what_is_wrong():
    layer = nn.LSTM(I, H, proj_size=2)
    x, params = torch.randn(6, 2, I), dict(layer.named_parameters())
    with pytest.raises(ValueError, match=r"lstm: h of state has shape \(1, 2, 5\); expected \(1, 2, 2\)"):
        fusedrnn.torch.lstm(x, (torch.zeros(1, 2, 5), torch.zeros(1, 2, 5)), params)
    with pytest.raises(ValueError, match=r"weight_hh_l0 has shape \(20, 3\); expected \(20, 2\)"):
        fusedrnn.torch.lstm(x, None, {**params, "weight_hh_l0": torch.zeros(20, 3)})
    with pytest.raises(ValueError, match="params has 5 tensors"):
        fusedrnn.torch.gru(x, None, list(params.values()))
    with pytest.raises(ValueError, match=r"LSTM: lengths, reset and return_cells .* hx's shape"):
        fusedrnn.torch.LSTM(I, H, proj_size=2)(x, (torch.zeros(1, 2, 5), torch.zeros(1, 2, 5)), lengths=[6, 2])


def test_programs_of_earlier_versions_are_read():
    text = how.How(cell="lstm", layers=2, tape=True).text
    old, _, last = text.rpartition(" ")
    assert last == "0"
    assert how.read(old) == how.read(text)
    assert how.read(how.How(cell="lstm", proj_size=7).text).proj_size == 7


def test_errors_of_a_projected_layer_are_torchs():
    theirs, ours = pair("LSTM", I, H, proj_size=2)
    x = torch.randn(9, 2, I)
    wrong = [
        (x[..., :2],),
        (x.double(),),
        (x, (torch.zeros(1, 2, H), torch.zeros(1, 2, H))),
        (x, (torch.zeros(1, 2, 2), torch.zeros(1, 2, 2))),
    ]
    for arguments in wrong:
        with pytest.raises((ValueError, RuntimeError)) as expected:
            theirs(*arguments)
        with pytest.raises(expected.type) as found:
            ours(*arguments)
        assert str(found.value) == str(expected.value)


def test_numpys_layer_has_the_same_projection():
    theirs = nn.LSTM(I, H, proj_size=2)
    layer = fusedrnn.LSTM(I, H, proj_size=2)
    layer.load_state_dict({name: tensor.numpy() for name, tensor in theirs.state_dict().items()})
    x = np.random.default_rng(0).standard_normal((9, 2, I), np.float32)
    y, _ = layer(x, lengths=np.array([9, 4]))
    ours = fusedrnn.torch.lstm(torch.from_numpy(x), None, dict(theirs.named_parameters()), lengths=[9, 4])
    same(torch.from_numpy(y), ours[0].detach(), rtol=0, atol=0)
