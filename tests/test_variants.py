# SPDX-License-Identifier: Apache-2.0
"""The variants of the cells against those who have them: onnxruntime's operators, torch, plain NumPy loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import close
import fusedrnn

T, B, I, H = 7, 5, 6, 9


def onnx_run(op: str, inputs: dict[str, np.ndarray], hidden: int, **attributes: Any) -> list[np.ndarray]:
    """One ONNX operator on onnxruntime; inputs by ONNX's names."""
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
