# SPDX-License-Identifier: Apache-2.0
"""The variants of the cells against those who have them: onnxruntime's operators, torch, plain NumPy loops."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import close
import fusedrnn
from fusedrnn import params as parameters
from fusedrnn.backends import Arguments, Results, Variant, reference
from fusedrnn.cells import CELLS
from shapes import Case, build

T, B, I, H = 7, 5, 6, 9


def onnx_run(op: str, inputs: dict[str, np.ndarray], hidden: int, **attributes: Any) -> list[np.ndarray]:
    """One ONNX operator on onnxruntime; inputs by ONNX's names."""
    if "libasan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("onnxruntime is not for sanitizers")
    onnx = pytest.importorskip("onnx")
    ort = pytest.importorskip("onnxruntime")
    order = ["X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P"]
    outputs = ["Y", "Y_h", "Y_c"] if op == "LSTM" else ["Y", "Y_h"]
    names = [name if name in inputs else "" for name in order[: 8 if op == "LSTM" else 6]]
    node = onnx.helper.make_node(op, names, outputs, hidden_size=hidden, **attributes)
    types = {np.dtype(np.float32): onnx.TensorProto.FLOAT, np.dtype(np.int32): onnx.TensorProto.INT32}
    graph = onnx.helper.make_graph(
        [node],
        "one",
        [onnx.helper.make_tensor_value_info(n, types[a.dtype], a.shape) for n, a in inputs.items()],
        [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in outputs],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 14)], ir_version=8)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: list[np.ndarray] = session.run(None, inputs)
    return found


def random(*shape: int, seed: int = 0, scale: float = 0.5) -> np.ndarray:
    return (np.random.default_rng([seed, *shape]).uniform(-1, 1, shape) * scale).astype(np.float32)


def lstm_weights(gates: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {
        "weight_ih_l0": random(gates * H, I, seed=seed),
        "weight_hh_l0": random(gates * H, H, seed=seed + 1),
        "bias_ih_l0": random(gates * H, seed=seed + 2),
        "bias_hh_l0": random(gates * H, seed=seed + 3),
    }


def with_forget_gate(params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """ONNX keeps the forget gate's rows, which input_forget makes it ignore: junk."""

    def widen(a: np.ndarray) -> np.ndarray:
        i, g, o = np.split(a, 3)
        return np.concatenate([i, random(*i.shape, seed=99), g, o])

    return {name: widen(a) for name, a in params.items()}


@pytest.mark.parametrize("lengths", [None, [7, 3, 5, 1, 7]])
def test_coupled_against_onnx(backend, lengths):
    params, x = lstm_weights(3), random(T, B, I, seed=4, scale=2)
    h0, c0 = random(1, B, H, seed=5), random(1, B, H, seed=6)
    W, R, bias = fusedrnn.params.to_onnx("lstm", with_forget_gate(params))
    inputs = {"X": x, "W": W, "R": R, "B": bias, "initial_h": h0, "initial_c": c0}
    if lengths:
        inputs["sequence_lens"] = np.array(lengths, np.int32)
    want_y, want_h, want_c = onnx_run("LSTM", inputs, H, input_forget=1)
    y, (h, c), _ = fusedrnn.lstm(x, (h0, c0), params, coupled=True, lengths=lengths)
    close.check("y", y, want_y[:, 0], 2e-6)
    close.check("h", h, want_h, 2e-6)
    close.check("c", c, want_c, 2e-6)


# ---- the options against the judge, and the judge against those who have these cells ----

ODD = (("Elu", 0.5, 0.0), ("Softsign", 0.0, 0.0), ("ScaledTanh", 1.3, 0.7))
GENTLE = (("HardSigmoid", 0.3, 0.4), ("Softsign", 0.0, 0.0), ("ScaledTanh", 0.9, 0.7))  # bounded: errors stay small
DRAWN = {"zoneout_h": 0.2, "zoneout_c": 0.3, "recurrent_dropout": 0.4, "training": True}
LSTM_VARIANTS: list[dict[str, Any]] = [
    {},
    {"proj_size": 3},
    {"peepholes": True},
    {"layer_norm": True},
    {"clip_gates": 0.6},
    {"activations": ODD},
    DRAWN,
    {"zoneout_h": 0.2, "zoneout_c": 0.3},
    {"proj_size": 5, "peepholes": True, "layer_norm": True, "clip_gates": 1.5, "activations": GENTLE, **DRAWN},
]
VARIANTS = [(cell, v) for cell in ("lstm", "cifg") for v in LSTM_VARIANTS]
VARIANTS += [
    ("gru", {k: v for k, v in one.items() if k != "peepholes"}) for one in LSTM_VARIANTS if one != {"peepholes": True}
]
VARIANTS += [
    (cell, one)
    for cell in ("gru_reset_before", "rnn_tanh", "rnn_relu")
    for one in ({}, DRAWN, {"clip_gates": 0.6, "activations": GENTLE, **DRAWN})
]
SHAPES = [
    Case(T=6, B=5, I=4, H=7),
    Case(T=5, B=1, I=3, H=17),
    Case(T=7, B=6, I=3, H=9, L=2, D=2, lengths="any", reset=0.3, clip_grad=0.3, dropout=0.4, layout="strided"),
    Case(T=6, B=4, I=5, H=16, E=2, L=2, lengths="any", reset=0.3, to_initial=True, layout="shared", bias=False),
]


def variant_data(case: Case, cell: str, options: dict[str, Any], dtype: Any) -> Any:
    """The arrays of a case with a variant: problem, p, g, and empty results and gradients."""
    options = dict(options)
    usual = tuple((name, 0.0, 0.0) for name in CELLS[cell].activations)
    count, has_c = len(usual), CELLS[cell].cell_state
    variant = Variant(tuple(options.pop("activations", usual))[-count if count == 1 else 0 :][:count], **options)
    clip_cell = 0.8 if case.clip_grad and has_c else 0.0
    data = build(replace(case, cell=cell, clip_cell=clip_cell), dtype)
    problem, p, g = data.problem, data.p, data.g
    problem.variant = variant
    P, H, G = variant.proj_size or problem.H, problem.H, CELLS[cell].gates
    rng = np.random.default_rng(7)
    E, S, D = problem.E, problem.L * problem.D, problem.D

    def new(*shape: int, scale: float = 0.5, about: float = 0.0, share: bool = True) -> np.ndarray:
        if share and case.layout == "shared":
            return np.broadcast_to((about + rng.uniform(-1, 1, (1, *shape[1:])) * scale).astype(dtype), shape)
        return (about + rng.uniform(-1, 1, shape) * scale).astype(dtype)

    p.params = [
        (W if n < D else new(E, G * H, D * P), new(E, G * H, P), bW, bR) for n, (W, _, bW, bR) in enumerate(p.params)
    ]
    if p.h0 is not None:
        p.h0 = new(S, E, problem.B, P, share=False)
    second = has_c or variant.proj_size > 0
    p.c0 = new(S, E, problem.B, H, share=False) if second and p.h0 is not None else None
    norm, norm_c = variant.layer_norm, variant.layer_norm and has_c
    p.extras = [
        (
            new(E, P, H) if variant.proj_size else None,
            new(E, (G - 1) * H) if variant.peepholes else None,
            new(E, G * H, about=1.0) if norm else None,
            new(E, G * H, about=1.0) if norm else None,
            new(E, H, about=1.0) if norm_c else None,
            new(E, H) if norm_c else None,
        )
        for _ in range(S)
    ]
    T, B, L = problem.T, problem.B, problem.L
    g = Results(
        new(T, E, B, D * P, share=False),
        new(S, E, B, P, share=False),
        new(S, E, B, H, share=False) if second else None,
        new(L, T, E, B, D * H, share=False),
    )
    return problem, p, g


def variant_run(route: Any, problem: Any, p: Any, g: Any, dtype: Any) -> dict[str, np.ndarray]:
    """Forward (with and without a tape) and backward into poisoned arrays."""

    def like(a: Any) -> Any:
        if a is None:
            return None
        if a.ndim and a.shape[0] > 1 and a.strides[0] == 0:
            one = np.full((1, *a.shape[1:]), np.nan, dtype)
            return np.lib.stride_tricks.as_strided(one, a.shape, (0, *one.strides[1:]))
        return np.full(a.shape, np.nan, dtype)

    out, plain = (Results(*(like(a) for a in (g.y, g.hn, g.cn, g.cells))) for _ in range(2))
    tape = np.full(route.tape_elements(problem), np.nan, dtype)
    route.forward(problem, p, out, tape)
    route.forward(problem, p, plain, None)
    dp = Arguments(
        np.full(p.x.shape, np.nan, dtype),
        like(g.hn),
        like(g.cn),
        [tuple(map(like, one)) for one in p.params],
        extras=[tuple(map(like, one)) for one in p.extras],
    )
    route.backward(problem, p, tape, g, dp)
    found = {"y": out.y, "hn": out.hn, "cn": out.cn, "cells": out.cells}
    found |= {f"inference {name}": a for name, a in (("y", plain.y), ("hn", plain.hn), ("cells", plain.cells))}
    found |= {"dx": dp.x, "dh0": dp.h0, "dc0": dp.c0}
    for n, (params, extras) in enumerate(zip(dp.params, dp.extras, strict=True)):
        for name, a in zip(("W", "R", "bW", "bR", *parameters.EXTRAS), (*params, *extras), strict=True):
            found[f"d{name}[{n}]"] = a
    return {name: a for name, a in found.items() if a is not None}


@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("cell", "options"), VARIANTS, ids=lambda v: v if isinstance(v, str) else "-".join(v) or "plain"
)
def test_variant_against_the_judge(kernels, cell, options, case):
    for dtype in ("float64", "float32") if case.T == 6 else ("float64",):
        problem, p, g = variant_data(case, cell, options, dtype)
        got, want = (
            variant_run(route, problem, p, g, kind) for route, kind in ((kernels, dtype), (reference, "float64"))
        )
        assert got.keys() == want.keys()
        for name, array in want.items():
            close.check(
                f"{cell} {options} {case} {dtype}: {name}", got[name], array, 1e-12 if dtype == "float64" else 5e-5
            )


@pytest.mark.parametrize("cell", ["lstm", "gru", "gru_reset_before"])
def test_threads_change_no_bit(kernels, cell):
    """One to three threads, on work large enough to use them."""
    options = {**DRAWN} if cell == "gru_reset_before" else {"proj_size": 33, "layer_norm": True, **DRAWN}
    problem, p, g = variant_data(Case(T=12, B=13, I=40, H=70, L=2, lengths="any"), cell, options, "float32")
    before, results = fusedrnn.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            fusedrnn.set_num_threads(threads)
            results.append(variant_run(kernels, problem, p, g, "float32"))
    finally:
        fusedrnn.set_num_threads(before)
    for other in results[1:]:
        for name, array in results[0].items():
            np.testing.assert_array_equal(array, other[name], err_msg=name)


def torch_loss(y: Any, *states: Any) -> Any:
    return (y * y).sum() + sum((s * s * s).sum() for s in states)


@pytest.mark.parametrize("lengths", [None, [4, 6, 1, 6, 3]])
def test_projection_against_torch(backend, lengths):
    torch = pytest.importorskip("torch")
    layer = torch.nn.LSTM(4, 7, 2, bidirectional=True, proj_size=3, dtype=torch.float64)
    ours = fusedrnn.LSTM(4, 7, 2, bidirectional=True, proj_size=3, dtype=np.float64)
    ours.load_state_dict({name: a.detach() for name, a in layer.named_parameters()})
    assert list(ours.parameters) == [name for name, _ in layer.named_parameters()]
    x = torch.randn(6, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    packed = x
    if lengths:
        packed = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
    y, (h, c) = layer(packed)
    if lengths:
        y = torch.nn.utils.rnn.pad_packed_sequence(y)[0]
    torch_loss(y, h, c).backward()
    got_y, (got_h, got_c) = ours(x.detach().numpy(), lengths=lengths)
    close.check("y", got_y, y.detach(), 1e-14)
    close.check("h", got_h, h.detach(), 1e-14)
    close.check("c", got_c, c.detach(), 1e-14)
    grads = ours.backward(2 * got_y, (3 * got_h**2, 3 * got_c**2))
    close.check("dx", grads["x"], x.grad, 1e-13)
    for name, weight in layer.named_parameters():
        close.check(name, grads[name], weight.grad, 1e-13)


def torch_norm_loop(kind: str, x: Any, p: dict[str, Any], h: Any, c: Any) -> Any:
    """LayerNorm cells as Ba et al. write them, in torch."""
    import torch

    def norm(a: Any, gain: Any, bias: Any) -> Any:
        return torch.nn.functional.layer_norm(a, a.shape[-1:], gain, bias)

    ys = []
    for x_t in x:
        ax = norm(x_t @ p["weight_ih_l0"].T, p["gain_ih_l0"], p["bias_ih_l0"])
        ah = norm(h @ p["weight_hh_l0"].T, p["gain_hh_l0"], p["bias_hh_l0"])
        if kind == "LSTM":
            i, f, g, o = (ax + ah).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * norm(c, p["gain_c_l0"], p["bias_c_l0"]).tanh()
        else:
            (rx, zx, nx), (rh, zh, nh) = ax.chunk(3, -1), ah.chunk(3, -1)
            z = (zx + zh).sigmoid()
            h = (1 - z) * (nx + (rx + rh).sigmoid() * nh).tanh() + z * h
        ys.append(h)
    return torch.stack(ys), h, c


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_layer_norm_against_torch(backend, kind):
    torch = pytest.importorskip("torch")
    ours = getattr(fusedrnn, kind)(4, 9, layer_norm=True, dtype=np.float64, seed=2)
    rng = np.random.default_rng(0)
    for array in ours.parameters.values():
        array += rng.uniform(-0.3, 0.3, array.shape)
    p = {name: torch.from_numpy(a.copy()).requires_grad_() for name, a in ours.parameters.items()}
    x = torch.from_numpy(rng.standard_normal((6, 3, 4))).requires_grad_()
    zero = torch.zeros(3, 9, dtype=torch.float64)
    y, h, c = torch_norm_loop(kind, x, p, zero, zero)
    states = (h, c) if kind == "LSTM" else (h,)
    torch_loss(y, *states).backward()
    got, state = ours(x.detach().numpy())
    close.check("y", got, y.detach(), 1e-13)
    parts = state if kind == "LSTM" else (state,)
    dstate = tuple(3 * s**2 for s in parts)
    grads = ours.backward(2 * got, dstate if kind == "LSTM" else dstate[0])
    close.check("dx", grads["x"], x.grad, 1e-12)
    for name, weight in p.items():
        close.check(name, grads[name], weight.grad, 1e-12)


ONNX_ACTIVATIONS = [
    ("Relu", None, None), ("Affine", 0.7, 0.1), ("LeakyRelu", 0.2, None), ("ThresholdedRelu", 0.3, None),
    ("ScaledTanh", 0.8, 0.6), ("HardSigmoid", 0.3, 0.4), ("Elu", 0.7, None), ("Softsign", None, None),
    ("Softplus", None, None),
]  # fmt: skip


def onnx_attributes(activations: list[Any]) -> dict[str, Any]:
    """As ONNX wants them: alpha and beta only of those that have one, in order."""
    found: dict[str, Any] = {"activations": [one[0] for one in activations]}
    for place, key in ((1, "activation_alpha"), (2, "activation_beta")):
        values = [one[place] for one in activations if one[place] is not None]
        if values:
            found[key] = values
    return found


@pytest.mark.parametrize("one", ONNX_ACTIVATIONS, ids=lambda one: one[0])
def test_activations_against_onnx(one):
    """onnxruntime's RNN, with each activation of ONNX's list."""
    params, x = lstm_weights(1), random(T, B, I, seed=4, scale=2)
    W, R, bias = fusedrnn.params.to_onnx("rnn_tanh", params)
    want = onnx_run("RNN", {"X": x, "W": W, "R": R, "B": bias}, H, **onnx_attributes([one]))[0][:, 0]
    ours = (one[0], *[a for a in one[1:] if a is not None])
    y, _, _ = fusedrnn.rnn(x, None, params, activations=[ours])
    close.check(one[0], y, want, 5e-6)


@pytest.mark.parametrize("coupled", [False, True])
def test_lstm_against_onnx(coupled):
    """Peepholes, activations, clip and lengths at once."""
    gates, lengths = (3 if coupled else 4), [7, 3, 5, 1, 7]
    params, x = lstm_weights(gates), random(T, B, I, seed=4, scale=2)
    W, R, bias = fusedrnn.params.to_onnx("lstm", with_forget_gate(params) if coupled else params)
    i, f, o = random(3, H, seed=8)
    params["weight_ph_l0"] = np.concatenate([i, o] if coupled else [i, f, o])
    h0, c0 = random(1, B, H, seed=5), random(1, B, H, seed=6)
    inputs = {"X": x, "W": W, "R": R, "B": bias, "sequence_lens": np.array(lengths, np.int32)}
    inputs |= {"initial_h": h0, "initial_c": c0, "P": np.concatenate([i, o, f])[None]}
    activations = [("HardSigmoid", 0.3, 0.4), ("Softsign", None, None), ("ScaledTanh", 0.8, 0.6)]
    attributes = onnx_attributes(activations) | {"clip": 0.7, "input_forget": int(coupled)}
    want_y, want_h, want_c = onnx_run("LSTM", inputs, H, **attributes)
    ours = [("HardSigmoid", 0.3, 0.4), "Softsign", ("ScaledTanh", 0.8, 0.6)]
    options: dict[str, Any] = {"peepholes": True, "activations": ours, "clip_gates": 0.7, "coupled": coupled}
    y, (h, c), _ = fusedrnn.lstm(x, (h0, c0), params, lengths=lengths, **options)
    close.check("y", y, want_y[:, 0], 5e-6)
    close.check("h", h, want_h, 5e-6)
    close.check("c", c, want_c, 5e-6)


@pytest.mark.parametrize("reset_after", [False, True])
def test_gru_against_onnx(reset_after):
    params, x, lengths = lstm_weights(3), random(T, B, I, seed=4, scale=2), [7, 3, 5, 1, 7]
    W, R, bias = fusedrnn.params.to_onnx("gru", params)
    inputs = {"X": x, "W": W, "R": R, "B": bias, "sequence_lens": np.array(lengths, np.int32)}
    inputs["initial_h"] = h0 = random(1, B, H, seed=5)
    attributes = onnx_attributes([("HardSigmoid", 0.3, 0.4), ("Softsign", None, None)])
    want_y, want_h = onnx_run("GRU", inputs, H, linear_before_reset=int(reset_after), **attributes)
    ours: Any = [("HardSigmoid", 0.3, 0.4), "Softsign"]
    y, h, _ = fusedrnn.gru(x, h0, params, lengths=lengths, activations=ours, reset_after=reset_after)
    close.check("y", y, want_y[:, 0], 5e-6)
    close.check("h", h, want_h, 5e-6)


EVERYTHING: list[tuple[str, dict[str, Any]]] = [
    ("LSTM", {"peepholes": True, "layer_norm": True, "proj_size": 3, "zoneout": (0.2, 0.1), "recurrent_dropout": 0.3}),
    ("LSTM", {"coupled": True, "activations": ["HardSigmoid", ("Elu", 0.5), "Softplus"], "clip_gates": 2.0}),
    ("GRU", {"proj_size": 3, "layer_norm": True, "zoneout": 0.2}),
    ("GRU", {"reset_after": False, "recurrent_dropout": 0.3, "zoneout": 0.1}),
    ("RNN", {"zoneout": 0.3, "recurrent_dropout": 0.2}),
]


@pytest.mark.parametrize(("kind", "options"), EVERYTHING, ids=lambda v: v if isinstance(v, str) else "-".join(v))
def test_gradients_by_differences(backend, kind, options):
    """Every parameter and x, along a random direction."""
    rng = np.random.default_rng(3)
    layer = getattr(fusedrnn, kind)(4, 5, num_layers=2, dtype=np.float64, seed=1, **options)
    x = rng.standard_normal((6, 3, 4))
    way = {name: rng.standard_normal(a.shape) for name, a in (layer.parameters | {"x": x}).items()}

    def loss(s: float) -> tuple[float, np.ndarray]:
        kept = layer.state_dict()
        layer.draws = 0  # the same masks again
        for name, array in layer.parameters.items():
            array += s * way[name]
        y = layer(x + s * way["x"])[0]
        layer.load_state_dict(kept)
        return float((y * y).sum()), y

    slope = (loss(1e-6)[0] - loss(-1e-6)[0]) / 2e-6
    layer.draws = 0
    grads = layer.backward(2 * layer(x)[0])
    total = sum(float((grads[name] * w).sum()) for name, w in way.items())
    assert abs(total - slope) < 1e-6 * max(1.0, abs(slope))


def test_zoneout_and_recurrent_dropout_draw_and_expect():
    """In evaluation nothing is drawn, in training every call draws anew; all kept: the state stays what it was."""
    x = random(5, 3, 4)
    layer = fusedrnn.LSTM(4, 6, zoneout=0.5, recurrent_dropout=0.5, seed=0)
    assert not np.array_equal(layer(x)[0], layer(x)[0])
    layer.eval()
    np.testing.assert_array_equal(layer(x)[0], layer(x)[0])
    frozen = fusedrnn.GRU(4, 6, zoneout=1.0, seed=0)
    start = random(1, 3, 6)
    y, h = frozen(x, start)
    np.testing.assert_array_equal(y, np.broadcast_to(start, y.shape))
    # the expectation: an evaluation step of zoneout p moves 1 - p of the way
    plain, half = fusedrnn.GRU(4, 6, seed=0).eval(), fusedrnn.GRU(4, 6, zoneout=0.25, seed=0).eval()
    a, b = plain(x[:1], start)[0], half(x[:1], start)[0]
    close.check("expected", b, 0.75 * a + 0.25 * start, 1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fusedrnn.GRU(3, 4, reset_after=False, layer_norm=True), "layer_norm is True; expected none of it"),
        (lambda: fusedrnn.GRU(3, 4, peepholes=True), "peepholes is unknown; expected an option it has: proj_size"),
        (lambda: fusedrnn.LSTM(3, 4, activations=["Sigmoid"]), "expected 3 of them"),
        (lambda: fusedrnn.LSTM(3, 4, activations=["Sigmoid", "Tanh", "Sine"]), "has 'Sine'; expected one of Sigmoid"),
        (lambda: fusedrnn.RNN(3, 4, activations=[("Elu", -1.0)]), r"Elu with alpha -1.0; expected alpha >= 0"),
        (lambda: fusedrnn.LSTM(3, 4, zoneout=(0.1, 1.5)), r"zoneout is 1.5; expected a probability"),
        (
            lambda: fusedrnn.generate(fusedrnn.GRU(5, 4, proj_size=3), random(5, 4), None, np.array([1]), 3),
            r"generate: head_weight has shape \(5, 4\); expected \(V, 3\) = \(V, P\)",
        ),
        (
            lambda: fusedrnn.lstm(random(2, 2, 3), None, fusedrnn.params.init("lstm", 3, 4), proj_size=2),
            "params has no weight_hr_l0",
        ),
    ],
)
def test_wrong_options(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


# ---- the options of the elementwise part, with everything else ----

TOGETHER = [
    (
        "lstm",
        {
            "peepholes": True,
            "clip_gates": 0.3,
            "zoneout": (0.2, 0.3),
            "recurrent_dropout": 0.4,
            "activations": ["Sigmoid", "ScaledTanh", "Softplus"],
        },
    ),
    ("lstm", {"coupled": True, "peepholes": True, "zoneout": (0.2, 0.3)}),
    ("gru", {"recurrent_dropout": 0.3, "activations": ["HardSigmoid", "Softsign"]}),
    ("gru", {"reset_after": False, "clip_gates": 0.4, "zoneout": 0.3, "recurrent_dropout": 0.3}),
    ("rnn", {"zoneout": 0.3, "recurrent_dropout": 0.3, "activations": [("Elu", 0.7)]}),
]
PROJECTED = [
    ("lstm", {"proj_size": 13, "peepholes": True, "zoneout": (0.2, 0.3), "recurrent_dropout": 0.4}),
    ("lstm", {"proj_size": 40, "coupled": True, "activations": ["HardSigmoid", "Tanh", "Softsign"]}),
    ("gru", {"proj_size": 13, "zoneout": (0.2, 0.3), "recurrent_dropout": 0.3, "clip_gates": 0.4}),
    ("gru", {"proj_size": 35}),
]
NORMED = [
    ("lstm", {"layer_norm": True, "peepholes": True, "clip_gates": 0.4, "zoneout": (0.2, 0.3)}),
    ("lstm", {"layer_norm": True, "coupled": True, "proj_size": 13, "recurrent_dropout": 0.3}),
    ("gru", {"layer_norm": True, "activations": ["HardSigmoid", "Softsign"], "zoneout": 0.3}),
    ("gru", {"layer_norm": True, "proj_size": 40, "recurrent_dropout": 0.3}),
]
ALL_OPTIONS = TOGETHER + PROJECTED + NORMED
WALKS: list[dict[str, Any]] = [
    {},
    {"num_layers": 2, "bidirectional": True, "lengths": np.array([3, 7, 0, 5, 7])},
    {"reverse": True, "reset": np.random.default_rng(0).random((T, B)) < 0.3, "reset_to": "initial", "clip_grad": 0.1},
]


class Together:
    """One cell with options and a walk: float64 arrays for it, and its results by name."""

    def __init__(self, op: str, options: dict[str, Any], walk: dict[str, Any], hidden: int = 33) -> None:
        kind = {"gru": "gru_reset_before"} if options.get("reset_after") is False else {"lstm": "cifg"}
        coupled = "coupled" in options or "reset_after" in options
        self.op, self.options, self.walk = op, {**options, **walk}, walk
        L, self.D = walk.get("num_layers", 1), 1 + walk.get("bidirectional", False)
        make = {name: options[name] for name in ("peepholes", "proj_size", "layer_norm") if name in options}
        cell = kind[op] if coupled else {"rnn": "rnn_tanh"}.get(op, op)
        sizes = {"num_layers": L, "bidirectional": self.D == 2, "seed": 1}
        self.params = fusedrnn.params.init(cell, I, hidden, dtype=np.float64, **sizes, **make)
        projected = options.get("proj_size", 0)
        h = random(L * self.D, B, projected or hidden, seed=2).astype(np.float64)
        self.state: Any = h
        if op == "lstm" or projected:
            self.state = h, random(L * self.D, B, hidden, seed=3).astype(np.float64)
        for name in self.params:
            if "gain" in name or "bias" in name:  # init's ones and zeros would hide what is multiplied or left out
                self.params[name] += 0.3 * random(*self.params[name].shape, seed=len(name))
        self.x = random(T, B, I, seed=4).astype(np.float64)

    def run(self, x: Any, params: Any = None, **more: Any) -> tuple[dict[str, np.ndarray], Any, np.ndarray]:
        call = getattr(fusedrnn.ops, self.op)
        given = self.params if params is None else params
        y, state, tape = call(x, self.state, given, training=True, **self.options, **more)
        dy = random(*y.shape, seed=5).astype(np.float64)
        grads = getattr(fusedrnn.ops, f"{self.op}_backward")(tape, dy, dstate=state)
        return named({"y": y, "last": state, **grads}), tape, dy


def named(results: dict[str, Any]) -> dict[str, np.ndarray]:
    """Pairs of arrays by name and number."""
    found = {}
    for name, value in results.items():
        found |= {f"{name}{n}": a for n, a in enumerate(value)} if isinstance(value, tuple) else {name: value}
    return found


def same(label: str, got: dict[str, np.ndarray], want: dict[str, np.ndarray], budget: float = 1e-11) -> None:
    assert got.keys() == want.keys(), label
    for name, array in want.items():
        close.check(f"{label}: {name}", got[name], array, budget)


@pytest.mark.parametrize("walk", WALKS, ids=lambda w: "-".join(w) or "plain")
@pytest.mark.parametrize(("op", "options"), ALL_OPTIONS, ids=lambda v: v if isinstance(v, str) else "-".join(v))
def test_options_with_tokens_context_and_recompute(backend, op, options, walk):
    it = Together(op, options, walk)
    plain = it.run(it.x)[0]
    same("recompute", it.run(it.x, recompute=True)[0], plain)
    tokens = np.random.default_rng(6).integers(0, I, (T, B))
    hot = it.run(np.eye(I)[tokens])[0]
    del hot["x"]
    for recompute in (False, True):
        same("tokens", it.run(tokens, recompute=recompute)[0], hot)
    K, params, wide = 3, dict(it.params), dict(it.params)
    context = random(B, K, seed=7).astype(np.float64)
    for name in ["weight_ih_l0", "weight_ih_l0_reverse"][: it.D]:
        more = random(len(params[name]), K, seed=8).astype(np.float64)
        params[name.replace("ih", "ch")] = more
        wide[name] = np.concatenate([params[name], more], 1)
    features = np.concatenate([it.x, np.broadcast_to(context, (T, B, K))], 2)
    want = it.run(features, wide)[0]
    want["context"] = want["x"][..., I:].sum(0)
    for name in ["weight_ih_l0", "weight_ih_l0_reverse"][: it.D]:
        want[name.replace("ih", "ch")], want[name] = want[name][:, I:], want[name][:, :I]
    want["x"] = want["x"][..., :I]
    for recompute in (False, True):
        same("context", it.run(it.x, params, context=context, recompute=recompute)[0], want)


@pytest.mark.parametrize("walk", WALKS, ids=lambda w: "-".join(w) or "plain")
@pytest.mark.parametrize(("op", "options"), ALL_OPTIONS, ids=lambda v: v if isinstance(v, str) else "-".join(v))
def test_tangents_of_options_are_the_kernels_own(kernels, caplog, op, options, walk):
    it = Together(op, options, walk)
    along = {name: random(*a.shape, seed=9).astype(np.float64) for name, a in {"x": it.x, **it.params}.items()}
    found = []
    for name in (None, "reference"):
        _, tape, dy = it.run(it.x, backend=name)
        with caplog.at_level("INFO", logger="fusedrnn"):
            jvp = fusedrnn.ops.jvp(tape, along)
        hvp = fusedrnn.ops.hvp(tape, along, dy, tdy=0.3 * dy)
        found.append(named({"y": jvp[0], "last": jvp[1], **hvp}))
    assert "runs on the reference" not in caplog.text
    same("tangents", *found, budget=1e-9)


@pytest.mark.parametrize(("op", "options"), ALL_OPTIONS, ids=lambda v: v if isinstance(v, str) else "-".join(v))
def test_ensembles_and_bfloat16_weights_with_options(backend, op, options):
    it = Together(op, options, {"lengths": np.array([3, 7, 0, 5, 7])})
    many = {name: np.stack([a, 1.1 * a, 0.7 * a]) for name, a in it.params.items()}
    same("ensemble", it.run(it.x, many)[0], it.run(it.x, many, backend="reference")[0])
    call, narrow = getattr(fusedrnn.ops, op), {n: a.astype(np.float32) for n, a in it.params.items()}
    halves = fusedrnn.params.to_bfloat16(narrow)
    x = it.x.astype(np.float32)
    got, want = (call(x, None, p, **it.options)[0] for p in (halves, fusedrnn.params.from_bfloat16(halves)))
    close.check("bfloat16 weights", got, want, 1e-5)


@pytest.mark.parametrize(("op", "options"), ALL_OPTIONS, ids=lambda v: v if isinstance(v, str) else "-".join(v))
def test_generation_with_options(kernels, op, options):
    layer = {"lstm": fusedrnn.LSTM, "gru": fusedrnn.GRU, "rnn": fusedrnn.RNN}[op](11, 20, 2, seed=0, **options).eval()
    for name in layer.parameters:
        if "gain" in name or "bias" in name:
            layer.parameters[name] += 0.3 * random(*layer.parameters[name].shape, seed=len(name))
    head, prompt = random(11, options.get("proj_size", 20), scale=3), np.array([[1, 2], [3, 4]])
    found = []
    for backend in (None, "reference"):
        layer.backend = backend
        more = {"return_log_probs": "model", "return_state": True}
        tokens, log_probs, state = fusedrnn.generate(layer, head, None, prompt, 30, seed=3, **more)
        found.append({"tokens": tokens, "log_probs": log_probs, **named({"state": state})})
    same("generated", *found, budget=1e-4)


def test_a_clipped_sum_lets_no_nan_back(backend):
    """clip_gates as clip_cell: what was clipped has the gradient 0, whatever comes in."""
    params = {"weight_ih_l0": np.ones((2, 1)), "weight_hh_l0": np.zeros((2, 2))}
    y, _, tape = fusedrnn.rnn(np.full((1, 1, 1), 50.0), None, params, training=True, clip_gates=0.01)
    assert fusedrnn.rnn_backward(tape, np.full_like(y, np.nan))["x"].item() == 0


def test_a_dead_unit_lets_no_infinity_back(backend):
    """Nothing reaches h' past the product: not 0 * inf either."""
    params = {"weight_ih_l0": np.ones((1, 1)), "weight_hh_l0": np.ones((1, 1))}
    y, _, tape = fusedrnn.rnn(np.full((1, 1, 1), -5.0), None, params, training=True, nonlinearity="relu")
    assert fusedrnn.rnn_backward(tape, np.full_like(y, np.inf))["state"].item() == 0


@pytest.mark.parametrize("name", ["Relu", "LeakyRelu", "ThresholdedRelu", "HardSigmoid", "Elu", "Softsign"])
def test_slopes_at_zero_agree_in_both_directions(backend, name):
    params = {"weight_ih_l0": np.ones((1, 1)), "weight_hh_l0": np.ones((1, 1))}
    alpha = (0.0,) if name == "ThresholdedRelu" else (0.25,) if name == "LeakyRelu" else ()
    options = {"activations": [(name, *alpha)], "training": True}
    y, _, tape = fusedrnn.rnn(np.zeros((1, 1, 1)), None, params, **options)
    back = fusedrnn.rnn_backward(tape, np.ones_like(y))["x"].item()
    forth = fusedrnn.ops.jvp(tape, {"x": np.ones((1, 1, 1))})[0].item()
    assert back == forth
