# SPDX-License-Identifier: Apache-2.0
"""Every check: the error, its words, and that nothing ran."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

import fusedrnn
from fusedrnn import arrays, backends, check

X = np.zeros((5, 3, 4), np.float32)
PARAMS = fusedrnn.params.init("lstm", 4, 6, seed=0)
GRU = fusedrnn.params.init("gru", 4, 6, seed=0)
H = np.zeros((1, 3, 6), np.float32)


def without(name: str) -> dict[str, Any]:
    return {k: v for k, v in PARAMS.items() if k != name}


def changed(name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    return PARAMS | {name: np.zeros(shape, np.float32)}


def packed_floats() -> np.ndarray:
    """Floats that do not begin at multiples of four bytes."""
    rows = np.zeros((5, 3, 4), np.dtype([("flag", "u1"), ("value", "f4")]))
    return rows["value"]


WRONG: list[tuple[str, type[Exception], dict[str, Any]]] = [
    # x
    (
        "lstm: x is a list; expected a NumPy array. Pass numpy.asarray(x, dtype=numpy.float32).",
        TypeError,
        {"x": [[1.0]]},
    ),
    ("lstm: x is None; expected a NumPy array.", TypeError, {"x": None}),
    ("lstm: x has dtype float16; expected float32 or float64 in native", TypeError, {"x": X.astype(np.float16)}),
    ("lstm: x has dtype int64; expected float32 or float64, or two axes", TypeError, {"x": X.astype(np.int64)}),
    ("lstm: x has dtype object; expected float32 or float64", TypeError, {"x": X.astype(object)}),
    ("lstm: x has dtype complex64; expected float32", TypeError, {"x": X.astype(np.complex64)}),
    ("lstm: x has dtype >f4 in foreign byte order; expected", TypeError, {"x": X.astype(">f4")}),
    ("lstm: x is a masked array; expected a plain", TypeError, {"x": np.ma.masked_array(X)}),
    (
        "lstm: x is not aligned (strides (60, 20, 5) bytes); expected whole elements of 4",
        ValueError,
        {"x": packed_floats()},
    ),
    ("lstm: x has shape (4,); expected (T,B,I), or (T,I) without a batch", ValueError, {"x": X[0, 0]}),
    ("lstm: x has shape (5, 3); expected (B,T,I), or", ValueError, {"x": X[0, 0], "batch_first": True}),
    ("lstm: x has I=0; expected I >= 1. x has no features.", ValueError, {"x": X[..., :0]}),
    # parameters
    ("lstm: params is None; expected a dict under torch.nn's names", TypeError, {"params": None}),
    ("lstm: params has no bias_hh_l0; expected all of weight_ih_l0", ValueError, {"params": without("bias_hh_l0")}),
    ("lstm: params has no weight_hh_l0; expected all of", ValueError, {"params": without("weight_hh_l0")}),
    ("lstm: params has 'weight_ih_l1'; expected only", ValueError, {"params": PARAMS | {"weight_ih_l1": X}}),
    ("lstm: params has no weight_ih_l1; expected all of", ValueError, {"num_layers": 2}),
    ("lstm: params has no weight_ih_l0_reverse; expected", ValueError, {"bidirectional": True}),
    (
        "lstm: params has 3 arrays; expected 4 arrays (with biases) or 2",
        ValueError,
        {"params": list(PARAMS.values())[:3]},
    ),
    (
        "lstm: weight_hh_l0 has shape (24, 5); expected (24, 6) = (4*H, H) with H=6 from state",
        ValueError,
        {"params": changed("weight_hh_l0", (24, 5)), "state": (H, H)},
    ),
    (
        "lstm: weight_ih_l0 has shape (4, 24); expected (24, 4) = (4*H, I) with I=4 from x, H=6 from weight_hh_l0. "
        "Did you pass its transpose?",
        ValueError,
        {"params": changed("weight_ih_l0", (4, 24))},
    ),
    (
        "lstm: weight_ih_l0 has shape (24, 4); expected (24, 3) = (4*H, I) with I=3 from x",
        ValueError,
        {"x": X[..., :3]},
    ),
    ("lstm: bias_ih_l0 has shape (18,); expected (24,) = (4*H,)", ValueError, {"params": changed("bias_ih_l0", (18,))}),
    (
        "lstm: weight_ih_l0 has shape (24,); expected 2 axes, or 3",
        ValueError,
        {"params": changed("weight_ih_l0", (24,))},
    ),
    ("lstm: weight_hh_l0 has H=0; expected H >= 1", ValueError, {"params": changed("weight_hh_l0", (0, 0))}),
    (
        "lstm: bias_hh_l0 has dtype float64; expected float32, the dtype of x. Kernels compute in one type",
        TypeError,
        {"params": PARAMS | {"bias_hh_l0": np.zeros(24)}},
    ),
    ("lstm: weight_ih_l0 is a list; expected a NumPy array", TypeError, {"params": PARAMS | {"weight_ih_l0": [1.0]}}),
    # state
    ("lstm: state is a NumPy float32 array of shape (1, 3, 6); expected a pair (h, c)", TypeError, {"state": H}),
    ("lstm: state is a tuple; expected a pair (h, c)", TypeError, {"state": (H, H, H)}),
    ("gru: state is a tuple; expected one array h. Only the LSTM has c: pass state[0].", TypeError, {"state": (H, H)}),
    (
        "lstm: state[1] has shape (1, 2, 6); expected (1, 3, 6) = (L, B, H) with B=3 from x, H=6 from state, L=1",
        ValueError,
        {"state": (H, H[:, :2])},
    ),
    (
        "lstm: state[0] has shape (1, 6); expected (1, 3, 6)",
        ValueError,
        {"state": (H[:, 0], H[:, 0])},
    ),
    ("lstm: state[0] has dtype float64; expected float32", TypeError, {"state": (H.astype(float), H)}),
    (
        "States lie as (layers * directions, B, H), also with batch_first.",
        ValueError,
        {"x": X.swapaxes(0, 1), "state": (H.swapaxes(0, 1),) * 2, "batch_first": True},
    ),
    # ensembles
    (
        "lstm: weight_hh_l0 has shape (2, 24, 6); expected (3, 24, 6) = (E, 4*H, H) with E=3 from weight_ih_l0",
        ValueError,
        {"params": changed("weight_ih_l0", (3, 24, 4)) | {"weight_hh_l0": np.zeros((2, 24, 6), np.float32)}},
    ),
    ("lstm: weight_ih_l0 has E=0; expected E >= 1", ValueError, {"params": changed("weight_ih_l0", (0, 24, 4))}),
    # lengths and resets
    ("lstm: lengths lie in [1, 6]; expected 0 <= lengths <= T=5", ValueError, {"lengths": [1, 6, 2]}),
    ("lstm: lengths lie in [-1, 3]; expected 0 <= lengths", ValueError, {"lengths": [-1, 3, 2]}),
    ("lstm: lengths has shape (2,); expected (3,) = (B,) with B=3 from x", ValueError, {"lengths": [1, 2]}),
    ("lstm: lengths is a NumPy float64 array of shape (3,); expected integers", TypeError, {"lengths": np.ones(3)}),
    ("lstm: reset has shape (3, 5); expected (5, 3) = (T, B)", ValueError, {"reset": np.zeros((3, 5), bool)}),
    ("expected a mask of dtype bool or uint8. Convert it: reset.astype(bool)", TypeError, {"reset": np.zeros((5, 3))}),
    # options
    ('lstm: reset_to is \'start\'; expected "zero" or "initial"', ValueError, {"reset_to": "start"}),
    ("lstm: num_layers is 0; expected an integer >= 1", ValueError, {"num_layers": 0}),
    ("lstm: num_layers is 1.5; expected an integer >= 1", TypeError, {"num_layers": 1.5}),
    ("lstm: num_layers is True; expected an integer >= 1", TypeError, {"num_layers": True}),
    (
        "lstm: reverse is True beside bidirectional=True; expected one",
        ValueError,
        {"reverse": True, "bidirectional": True},
    ),
    ("lstm: dropout is 1.5; expected a probability in [0, 1]", ValueError, {"dropout": 1.5}),
    ("lstm: dropout is nan; expected a probability", ValueError, {"dropout": float("nan")}),
    ("lstm: dropout is 'half'; expected a number", TypeError, {"dropout": "half"}),
    ("lstm: seed is -1; expected an integer in [0, 18446744073709551615]", ValueError, {"seed": -1}),
    ("lstm: clip_cell is 0; expected a finite number > 0, or None", ValueError, {"clip_cell": 0}),
    ("lstm: clip_cell is inf; expected a finite number > 0", ValueError, {"clip_cell": float("inf")}),
    ("lstm: clip_grad is -2.0; expected a finite number > 0", ValueError, {"clip_grad": -2.0}),
    ("lstm: clip_grad is '1'; expected a number", TypeError, {"clip_grad": "1"}),
    ("fusedrnn: backend is 'cuda'; expected one of native, numba, reference", ValueError, {"backend": "cuda"}),
    ('rnn: nonlinearity is \'sin\'; expected "tanh" or "relu"', ValueError, {"nonlinearity": "sin"}),
]


@pytest.mark.parametrize(("message", "error", "given"), WRONG, ids=[w[0][:60] for w in WRONG])
def test_forward(message, error, given, monkeypatch):
    """The message names what, got, expected, why; and no backend was called."""
    arguments: dict[str, Any] = {"x": X, "state": None, "params": PARAMS, **given}
    if "batch_first" in given and arguments["x"].ndim == 1:
        arguments["x"] = np.zeros(5, np.float32)
        message = message.replace("(5, 3)", "(5,)")
    op = message.partition(":")[0]
    run = getattr(fusedrnn, op if op in ("gru", "rnn") else "lstm")
    if op == "gru":
        arguments["params"] = GRU
    for name in ("native", "numba", "reference"):
        module = backends.load(name)
        if module:
            monkeypatch.setattr(module, "forward", lambda *_: pytest.fail("it ran"))
    with pytest.raises(error, match=re.escape(message)):
        run(**arguments)


def tape_of(op: str = "lstm", **options: Any) -> Any:
    return getattr(fusedrnn, op)(X, None, PARAMS if op == "lstm" else GRU, training=True, **options)[-1]


@pytest.mark.parametrize(
    ("message", "error", "given"),
    [
        ("lstm_backward: dy has shape (5, 3); expected (5, 3, 6) = (T, B, H)", ValueError, {"dy": X[..., 0]}),
        ("lstm_backward: dy has dtype float64; expected float32, the dtype", TypeError, {"dy": np.zeros((5, 3, 6))}),
        ("lstm_backward: dy is a list; expected a NumPy array", TypeError, {"dy": [1.0]}),
        (
            "lstm_backward: dstate is a NumPy float32 array of shape (1, 3, 6); expected a pair",
            TypeError,
            {"dstate": H},
        ),
        ("lstm_backward: dstate[1] has shape (1, 2, 6); expected (1, 3, 6)", ValueError, {"dstate": (H, H[:, :2])}),
        ("lstm_backward: dcells has shape (5, 3, 4); expected (1, 5, 3, 6) = (L, T, B, H)", ValueError, {"dcells": X}),
    ],
)
def test_backward(message, error, given):
    with pytest.raises(error, match=re.escape(message)):
        fusedrnn.lstm_backward(tape_of(), **given)


def test_backward_of_another_tape():
    with pytest.raises(ValueError, match=r"gru_backward: tape comes from lstm; expected gru. Call lstm_backward"):
        fusedrnn.gru_backward(tape_of())
    with pytest.raises(TypeError, match=r"lstm_backward: tape is None; expected a tape. Call lstm\(..., training"):
        fusedrnn.lstm_backward(None)


@pytest.mark.parametrize(
    ("message", "error", "make"),
    [
        ("LSTM: input_size is 0; expected an integer >= 1", ValueError, lambda: fusedrnn.LSTM(0, 3)),
        ("GRU: hidden_size is 2.0; expected an integer >= 1", TypeError, lambda: fusedrnn.GRU(3, 2.0)),
        ("RNN: num_layers is 0; expected", ValueError, lambda: fusedrnn.RNN(3, 2, 0)),
        ("LSTM: dropout is 2; expected a probability", ValueError, lambda: fusedrnn.LSTM(3, 2, dropout=2)),
        ("LSTM: dtype is float16; expected float32 or float64", TypeError, lambda: fusedrnn.LSTM(3, 2, dtype="e")),
        ("LSTM: clip_cell is 0; expected", ValueError, lambda: fusedrnn.LSTM(3, 2, clip_cell=0)),
        ("GRU: clip_grad is -1; expected", ValueError, lambda: fusedrnn.GRU(3, 2, clip_grad=-1)),
        ("GRU: seed is -1; expected an integer in", ValueError, lambda: fusedrnn.GRU(3, 2, seed=-1)),
        ("RNN: nonlinearity is 'sin'; expected \"tanh\"", ValueError, lambda: fusedrnn.RNN(3, 2, nonlinearity="sin")),
        ("GRU.__init__", TypeError, lambda: fusedrnn.GRU(3, 2, clip_cell=1.0)),
    ],
)
def test_layer_arguments(message, error, make):
    with pytest.raises(error, match=re.escape(message) if not message.endswith("__") else "clip_cell"):
        make()


def test_sizes_past_2_to_the_31():
    """Views with stride 0: the sizes are real, the memory is not. Checks see them; a wrong one is named."""
    wide = np.broadcast_to(np.float32(0), (2**20, 2**12, 4))
    with pytest.raises(ValueError, match=r"lengths has shape \(3,\); expected \(4096,\)"):
        fusedrnn.lstm(wide, None, PARAMS, lengths=[1, 2, 3])


def test_arrays_of_one_call_are_on_one_device():
    class There:
        """What a library's array tells of its place; kernels are not reached."""

        def __init__(self, number: int) -> None:
            self.number = number

        def __dlpack__(self, **_: Any) -> Any:
            raise BufferError("not to be read")

        def __dlpack_device__(self) -> tuple[int, int]:
            return 2, self.number

    def at(owner: Any) -> arrays.DeviceArray:
        return arrays.DeviceArray(owner, 4096, (2,), (4,), "float32", 4, 0)

    check.together("lstm", at(There(1)), [("h0", at(There(1))), ("c0", None), ("lengths", at(object()))])
    check.together("lstm", at(object()), [("h0", at(There(1)))])  # what does not tell is not asked
    with pytest.raises(ValueError, match="lstm: h0 is on CUDA device 0; expected 1, the device of x. Copy it there"):
        check.together("lstm", at(There(1)), [("h0", at(There(0)))])
