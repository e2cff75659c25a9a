# SPDX-License-Identifier: Apache-2.0
"""What load_state_dict takes and refuses: names, prefixes, kinds of arrays and tensors; nothing is written in part."""

from __future__ import annotations

import io
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import fusedrnn
from fusedrnn import exchange, params

torch = pytest.importorskip("torch")

W = "weight_ih_l0"


def layer_and_weights(**options: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """A layer, and the weights of another one like it."""
    return fusedrnn.LSTM(3, 4, seed=0, **options), fusedrnn.LSTM(3, 4, seed=1, **options).state_dict()


def refused(layer: Any, given: Any, error: Any, match: str, **options: Any) -> None:
    """Loading it raises, and no bit of the layer has changed."""
    before = {name: array.tobytes() for name, array in layer.parameters.items()}
    with pytest.raises(error, match=rf"{type(layer).__name__}.load_state_dict: {match}"):
        layer.load_state_dict(given, **options)
    assert before == {name: array.tobytes() for name, array in layer.parameters.items()}


def test_a_prefix_there_and_back():
    layer, other = fusedrnn.GRU(3, 4, 2, bidirectional=True, seed=0), fusedrnn.GRU(3, 4, 2, bidirectional=True, seed=1)
    saved = layer.state_dict(prefix="encoder.rnn.")
    assert list(saved) == ["encoder.rnn." + name for name in layer.parameters]
    other.load_state_dict({"head.bias": "anything", 5: None, **saved}, prefix="encoder.rnn.")
    for name, array in layer.parameters.items():
        np.testing.assert_array_equal(other.parameters[name], array)
    model = torch.nn.ModuleDict({"encoder": torch.nn.ModuleDict({"rnn": torch.nn.GRU(3, 4, 2, bidirectional=True)})})
    model.load_state_dict({name: torch.from_numpy(array) for name, array in saved.items()})
    layer.load_state_dict(other.state_dict(prefix=""))


@pytest.mark.parametrize(
    ("cell", "kind"), [(torch.nn.LSTMCell, "LSTM"), (torch.nn.GRUCell, "GRU"), (torch.nn.RNNCell, "RNN")]
)
@pytest.mark.parametrize("bias", [True, False])
def test_torchs_cells_have_names_without_a_layer(cell, kind, bias):
    theirs = torch.nn.ModuleList([cell(3, 4, bias=bias)])
    layer = getattr(fusedrnn, kind)(3, 4, bias=bias)
    layer.load_state_dict(theirs.state_dict(), prefix="0.")
    layer.load_state_dict(dict(theirs[0].named_parameters()))
    for name, value in theirs[0].named_parameters():
        np.testing.assert_array_equal(layer.parameters[name + "_l0"], value.detach().numpy())


FORMS = {
    "float32": lambda a: a,
    "float64": lambda a: a.astype(np.float64),
    "float16": lambda a: a.astype(np.float16),
    "long double": lambda a: a.astype(np.longdouble),
    "other byte order": lambda a: a.astype(">f8"),
    "read-only": lambda a: np.broadcast_to(a, (2, *a.shape))[1],
    "strided": lambda a: np.repeat(a, 2, axis=0)[::2],
    "list": lambda a: a.tolist(),
    "bfloat16 bits": params.bfloat16_bits,
    "whole numbers": lambda a: np.rint(9 * a).astype(np.int64),
    "tensor": torch.from_numpy,
    "parameter": lambda a: torch.nn.Parameter(torch.from_numpy(a)),
    "what requires gradients": lambda a: torch.from_numpy(a).requires_grad_() * 1,
    "bfloat16 tensor": lambda a: torch.from_numpy(a).bfloat16(),
    "float8 tensor": lambda a: torch.from_numpy(a).to(torch.float8_e4m3fn),
    "float64 tensor": lambda a: torch.from_numpy(a).double().mT if a.ndim == 2 else torch.from_numpy(a).double(),
    "negative bit": lambda a: torch._neg_view(torch.from_numpy(a)),
    "zero tensor": lambda a: torch._efficientzerotensor(a.shape),
    "NaN": lambda a: np.full(a.shape, np.nan),
    "infinite": lambda a: torch.full(a.shape, -np.inf, dtype=torch.float64),
    "too small": lambda a: a.astype(np.float64) * 1e-60,
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_real_numbers_is_rounded_to_the_layers_dtype(form, dtype):
    layer, weights = layer_and_weights(dtype=dtype)
    given = {name: FORMS[form](array.astype(np.float32)) for name, array in weights.items()}
    if form == "float64 tensor":
        given = {name: value.mT if value.ndim == 2 else value for name, value in given.items()}
    layer.load_state_dict(given)
    for name, value in given.items():
        if isinstance(value, torch.Tensor):
            want = value.detach().double().resolve_neg().clone().numpy()
        else:
            want = params.widen(value) if form == "bfloat16 bits" else np.asarray(value)
        np.testing.assert_array_equal(layer.parameters[name], want.astype(dtype), strict=False)
        assert layer.parameters[name].dtype == dtype


def test_ml_dtypes_arrays():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    layer, weights = layer_and_weights()
    for kind in (ml_dtypes.bfloat16, ml_dtypes.float8_e5m2):
        given = {name: array.astype(kind) for name, array in weights.items()}
        layer.load_state_dict(given)
        for name, array in layer.parameters.items():
            np.testing.assert_array_equal(array, given[name].astype(np.float32))


def test_bfloat16_values_keep_their_bits_in_a_layer_that_stores_bits():
    layer, weights = layer_and_weights()
    layer.parameters = params.to_bfloat16(layer.parameters)
    given = {name: torch.from_numpy(array).bfloat16() for name, array in weights.items()}
    layer.load_state_dict(given)
    np.testing.assert_array_equal(layer.parameters[W], given[W].contiguous().view(torch.int16).numpy().view(np.uint16))
    layer.load_state_dict(params.to_bfloat16(weights))
    refused(layer, weights, TypeError, r"weight_ih_l0 has dtype float32; expected bfloat16 .*to_bfloat16 makes")


def test_a_layers_own_arrays_may_change_places():
    layer = fusedrnn.RNN(3, 3, seed=0)
    a, b = "weight_ih_l0", "weight_hh_l0"
    before = layer.state_dict()
    layer.load_state_dict(layer.parameters | {a: layer.parameters[b].T, b: layer.parameters[a]})
    np.testing.assert_array_equal(layer.parameters[a], before[b].T)
    np.testing.assert_array_equal(layer.parameters[b], before[a])


def freed() -> Any:
    tensor = torch.ones(16, 4, dtype=torch.bfloat16)
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (
            lambda a: a * 1e40,
            ValueError,
            r"weight_hh_l0 holds -?\d.*e\+\d\d and \d+ more such; expected numbers that float32 can",
        ),
        (
            lambda a: torch.full(a.shape, 1e39, dtype=torch.float64),
            ValueError,
            r"weight_hh_l0 holds 1e\+39 and 63 more such",
        ),
        (lambda a: a + 0j, TypeError, r"weight_hh_l0 has dtype complex128; expected real numbers"),
        (lambda a: torch.ones(a.shape, dtype=torch.complex64).conj(), TypeError, r"weight_hh_l0 has dtype complex64;"),
        (lambda a: a.astype(object), TypeError, r"weight_hh_l0 has dtype object; expected real numbers"),
        (lambda a: a.astype("U9"), TypeError, r"weight_hh_l0 has dtype <U9; expected real numbers"),
        (lambda a: np.zeros(a.shape, "V2"), TypeError, r"weight_hh_l0 has dtype \|V2; .*\.view\(numpy.uint16\)"),
        (lambda a: np.ma.masked_array(a), TypeError, r"weight_hh_l0 is a NumPy .* cannot be read \(masks are not read"),
        (
            lambda a: [[1.0], [1.0, 2.0]],
            TypeError,
            r"weight_hh_l0 is a list that cannot be read \(setting an array element",
        ),
        (lambda a: None, TypeError, r"weight_hh_l0 is None; expected real numbers"),
        (lambda a: {}, TypeError, r"weight_hh_l0 is a dict; expected real numbers"),
        (lambda a: 1.0, ValueError, r"weight_hh_l0 has shape \(\); expected \(16, 4\)"),
        (
            lambda a: a.T,
            ValueError,
            r"weight_hh_l0 has shape \(4, 16\); expected \(16, 4\). Did you pass its transpose",
        ),
        (
            lambda a: a[:12],
            ValueError,
            r"weight_hh_l0 has shape \(12, 4\); expected \(16, 4\). The layer has other sizes",
        ),
        (
            lambda a: torch.ones(a.shape, device="meta"),
            TypeError,
            r"weight_hh_l0 is a torch.Tensor that cannot be read \(",
        ),
        (
            lambda a: torch.ones(a.shape).to_sparse(),
            TypeError,
            r"weight_hh_l0 is a torch.Tensor that cannot be read \(",
        ),
        (lambda a: freed(), TypeError, r"weight_hh_l0 is a torch.Tensor that cannot be read \(its memory was freed\)"),
    ],
)
def test_what_is_no_real_number_changes_nothing(make, error, match):
    layer, weights = layer_and_weights()
    value = make(weights["weight_hh_l0"].astype(np.float64))  # the second of four
    refused(layer, weights | {"weight_hh_l0": value}, error, match)


def test_names_that_do_not_fit():
    layer, weights = layer_and_weights()
    module = torch.nn.LSTM(3, 4)
    two = {f"{n}.{name}": value for n in "01" for name, value in weights.items()}
    cells = {f"cell.{name.removesuffix('_l0')}": value for name, value in weights.items()}
    for given, options, error, match in (
        (
            {k: v for k, v in weights.items() if k != "bias_hh_l0"},
            {},
            ValueError,
            "state_dict lacks bias_hh_l0; expected",
        ),
        (weights | {"extra": 1}, {}, ValueError, "state_dict has extra; expected exactly weight_ih_l0, weight_hh_l0"),
        (weights | {"weight_ih": 1}, {}, ValueError, "state_dict has weight_ih; expected exactly"),
        ({"a." + k: v for k, v in weights.items()}, {}, ValueError, r".*Did you mean prefix='a\.'\?"),
        (two, {}, ValueError, r".*Did you mean prefix='0\.' or prefix='1\.'\?"),
        (two, {"prefix": "0"}, ValueError, r'.*lacks 0weight_ih_l0.* behind "0"\. Did you mean prefix=.0\.'),
        (cells, {}, ValueError, r".*Did you mean prefix='cell\.'\?"),
        (weights, {"prefix": "rnn."}, ValueError, r".*Did you mean prefix=''\?"),
        ({"model": weights, "epoch": 3}, {}, ValueError, r".*Did you mean state_dict\['model'\]\?"),
        ({k.replace("ei", "ie"): v for k, v in weights.items()}, {}, ValueError, ".*mean weight_ih_l0 by wieght_ih_l0"),
        ({f"layer{n}": 1 for n in range(99)}, {}, ValueError, ".* and 91 more; expected"),
        (torch.nn.LSTM(3, 4, 2).state_dict(), {}, ValueError, ".*are of a layer with num_layers=2.$"),
        (torch.nn.LSTM(3, 4, bias=False).state_dict(), {}, ValueError, ".*are of a layer with bias=False.$"),
        (
            {name.removesuffix("_l0") if "bias" in name else name: value for name, value in weights.items()},
            {},
            ValueError,
            ".*Torch's cells say bias_ih, bias_hh, its layers weight_ih_l0, weight_hh_l0: use the names of one of them",
        ),
        (torch.nn.LSTM(3, 4, bidirectional=True).state_dict(), {}, ValueError, ".*with bidirectional=True.$"),
        (torch.nn.LSTM(3, 4, proj_size=2).state_dict(), {}, ValueError, ".*of a layer with proj_size=P.$"),
        ({}, {}, ValueError, "state_dict lacks weight_ih_l0, weight_hh_l0, bias_ih_l0, bias_hh_l0; expected exactly"),
        (
            module,
            {},
            TypeError,
            "state_dict is a torch.LSTM; expected a dict of arrays by name. Pass what its state_dict",
        ),
        (module.named_parameters(), {}, TypeError, r"state_dict is a generator; .*dict\(module.named_parameters\(\)\)"),
        (list(weights.items()), {}, TypeError, "state_dict is a list; expected a dict"),
        (None, {}, TypeError, "state_dict is None; expected a dict"),
        (weights | {0: 1}, {}, TypeError, "state_dict has the key 0; expected names"),
        (weights, {"prefix": None}, TypeError, "prefix is None; expected a string"),
    ):
        refused(layer, given, error, match, **options)
    with pytest.raises(TypeError, match="LSTM.state_dict: prefix is 3; expected a string"):
        layer.state_dict(prefix=3)
    deep = fusedrnn.LSTM(3, 4, 2)
    refused(deep, torch.nn.LSTMCell(3, 4).state_dict(), ValueError, "state_dict lacks weight_ih_l0.*has weight_ih, ")


def test_a_file_of_arrays_is_read_where_it_is_needed():
    layer, weights = layer_and_weights()
    file = io.BytesIO()
    np.savez(file, **{f"rnn.{name}": array for name, array in weights.items()}, other=np.array([None], object))
    file.seek(0)
    with np.load(file) as saved:
        layer.load_state_dict(saved, prefix="rnn.")  # `other` is a pickle: it is not opened
    np.testing.assert_array_equal(layer.parameters[W], weights[W])
    np.savez(file := io.BytesIO(), **weights | {W: weights[W].astype(object)})
    file.seek(0)
    with np.load(file) as saved:
        refused(layer, saved, TypeError, r"weight_ih_l0 cannot be read \(Object arrays cannot be loaded")


def test_a_layer_that_cannot_be_written_to():
    layer, weights = layer_and_weights()
    layer.parameters["bias_hh_l0"].flags.writeable = False
    refused(
        layer, weights, ValueError, "bias_hh_l0 of the layer is read-only; expected an array to write to. Set layer"
    )
    layer.parameters["bias_hh_l0"] = [0.0] * 16
    with pytest.raises(TypeError, match="bias_hh_l0 of the layer is a list; expected an array"):
        layer.load_state_dict(weights)


class OnDevice:
    """An array as CuPy has them: NumPy sees it through `get` and `set` only."""

    def __init__(self, values: np.ndarray) -> None:
        self._values = values.copy()
        self.shape, self.dtype = values.shape, values.dtype

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        data = (self._values.ctypes.data, False)
        return {"shape": self.shape, "typestr": self.dtype.str, "data": data, "version": 3, "stream": 1}

    def get(self) -> np.ndarray:
        return self._values.copy()

    def set(self, values: np.ndarray) -> None:
        assert values.dtype == self.dtype and values.shape == self.shape
        self._values[...] = values

    def copy(self) -> OnDevice:
        return OnDevice(self._values)


def test_weights_on_a_device_are_loaded_from_the_host_and_from_there():
    layer, weights = layer_and_weights()
    layer.to(OnDevice)
    arrays = dict(layer.parameters)
    layer.load_state_dict({name: torch.from_numpy(a).double() for name, a in weights.items()})
    for name, array in layer.parameters.items():
        assert array is arrays[name]
        np.testing.assert_array_equal(array.get(), weights[name])
    other = fusedrnn.LSTM(3, 4)
    other.load_state_dict(layer.state_dict(prefix="a."), prefix="a.")
    np.testing.assert_array_equal(other.parameters[W], weights[W])
    tensor = torch.zeros(3, dtype=torch.bfloat16, requires_grad=True)  # stands for one on a device
    exchange.write(tensor, np.float32([1, 2, 3]))
    assert tensor.tolist() == exchange.copied(tensor).tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="bias_hh_l0 holds 1e"):
        layer.load_state_dict(weights | {"bias_hh_l0": np.full(16, 1e40)})
    np.testing.assert_array_equal(layer.parameters[W].get(), weights[W])


def test_weights_that_bfloat16_cannot_hold():
    with pytest.raises(ValueError, match=r"params.to_bfloat16: weight_ih_l0 holds 1e\+300 and 1 more such; expected"):
        params.to_bfloat16({W: np.array([[1e300, 1.0, -1e300]])})
    with pytest.raises(TypeError, match="params.to_bfloat16: weight_ih_l0 is a torch.Tensor; expected a NumPy array"):
        params.to_bfloat16({W: torch.ones(4, 3)})


def test_torch_is_not_imported():
    code = (
        "import sys, fusedrnn; a = fusedrnn.GRU(3, 4); a.load_state_dict(a.state_dict(prefix='x.'), prefix='x.');"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
