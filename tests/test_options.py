# SPDX-License-Identifier: Apache-2.0
"""Options: what the signatures say, what `help` says, what mypy sees and what the checks read is one and the same."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fusedrnn
import shapes
from fusedrnn import layers, ops, options, support, variants
from fusedrnn.backends import Variant
from fusedrnn.cells import CELLS

OPS = {cell.op: options.RNNOptions if cell.state_product else options.Options for cell in CELLS.values()} | {
    "lstm": options.LSTMOptions,
    "gru": options.GRUOptions,
}
LAYERS = {
    shapes.LAYERS[cell.op].__name__: layers.RNNLayerOptions if cell.state_product else layers.LayerOptions
    for cell in CELLS.values()
} | {"LSTM": layers.LSTMLayerOptions, "GRU": layers.GRULayerOptions}


def public() -> dict[str, Callable[..., Any]]:
    """What users call, by name: functions, classes, methods of layers."""
    found = {name: getattr(fusedrnn, name) for name in fusedrnn.__all__}
    found |= {f"ops.{name}": getattr(ops, name) for name in ("jvp", "hvp")}
    methods = {name: f for name, f in vars(layers._Layer).items() if inspect.isfunction(f)}
    found |= {f"LSTM.{name}": f for name, f in methods.items() if name == "__call__" or not name.startswith("_")}
    return {name: value for name, value in found.items() if not inspect.ismodule(value)}


def parameters(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(function).parameters) - {"self"}


@pytest.mark.parametrize("name", public())
def test_help_explains_every_parameter_and_no_other(name):
    function = public()[name]
    text, wanted = inspect.getdoc(function) or "", parameters(function)
    entries = set(options.entries(text))
    assert entries <= wanted
    if name in OPS or name in LAYERS or name.removesuffix("_backward") in OPS or name.startswith("ops."):
        assert entries == wanted
    assert {one for one in wanted if not re.search(rf"\b{one}\b", text)} == set()


@pytest.mark.parametrize("name", OPS)
def test_functions_take_what_their_signature_says(name):
    """By name alone, with these defaults; and Python's own error for another."""
    function = getattr(fusedrnn, name)
    shown = inspect.signature(function).parameters
    x, state, params, *rest = shown.values()
    assert [x.name, state.name, params.name] == ["x", "state", "params"]
    assert {one.kind for one in (x, state, params)} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    assert {one.kind for one in rest} == {inspect.Parameter.KEYWORD_ONLY}
    usual = {"num_layers": 1, "reset_to": "zero", "reset_after": True, "nonlinearity": "tanh"}
    assert {one.name: one.default for one in rest if one.default}.items() <= usual.items()  # all others are off
    own = {*(function.__kwdefaults__ or ())}
    assert {one.name for one in rest} == own | OPS[name].__optional_keys__
    cell = next(cell.name for cell in CELLS.values() if cell.op == name and not cell.options)
    data = np.ones((3, 2, 4)), None, fusedrnn.params.init(cell, 4, 5, dtype=np.float64, seed=0)
    same, plain = (function(*data, **given)[0] for given in ({one.name: one.default for one in rest}, {}))
    np.testing.assert_array_equal(same, plain)
    with pytest.raises(TypeError, match=rf"^{name}\(\) takes from 1 to 3 positional arguments but 4 were given"):
        function(*data, 1)
    others = {option for known in OPS.values() for option in known.__optional_keys__} - OPS[name].__optional_keys__
    for wrong in others | {"hidden", "bias"}:
        with pytest.raises(TypeError, match=rf"^{name}\(\) got an unexpected keyword argument '{wrong}'$"):
            function(*data, **{wrong: 1})


@pytest.mark.parametrize("known", dict.fromkeys(OPS.values()), ids=lambda known: known.__name__)
def test_mypy_sees_the_types_of_the_settings(known):
    names = {"Tape": ops.Tape}
    wanted = typing.get_type_hints(options.Settings, localns=names)
    assert typing.get_type_hints(known, localns=names).items() <= wanted.items()


def test_every_setting_is_an_option_and_has_a_text():
    settings, shown = (inspect.signature(one).parameters for one in (options.Settings, fusedrnn.lstm))
    assert set(settings) == options.LSTMOptions.__optional_keys__
    assert set(settings) <= set(options.TEXTS)
    assert {name: shown[name].default for name in settings} == {name: one.default for name, one in settings.items()}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_take_what_their_signature_says(name):
    layer = getattr(fusedrnn, name)
    shown = inspect.signature(layer).parameters
    sizes = ["input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional"]
    assert [one.name for one in shown.values() if one.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD] == sizes
    own = {*(layer.__init__.__kwdefaults__ or ())}
    assert set(shown) == {"input_size", "hidden_size"} | own | LAYERS[name].__optional_keys__
    given = {one.name: one.default for one in shown.values() if one.name not in sizes[:2]} | {"seed": 0}
    y, plain = (layer(4, 5, **each)(np.ones((3, 2, 4), np.float32))[0] for each in (given, {"seed": 0}))
    np.testing.assert_array_equal(y, plain)
    assert repr(layer(4, 5, 2, False, True, 0.5, True)) == (
        f"{name}(4, 5, num_layers=2, bias=False, batch_first=True, dropout=0.5, bidirectional=True)"
    )
    for wrong in variants.VARIANTS.keys() - LAYERS[name].__optional_keys__:
        with pytest.raises(TypeError, match=rf"^{name}: {wrong} is unknown; expected an option it has: "):
            layer(4, 5, **{wrong: 1})


MAKERS: dict[str, dict[str, Any]] = {
    "proj_size": {"proj_size": 2},
    "peepholes": {"peepholes": True},
    "layer_norm": {"layer_norm": True},
    "zoneout": {"zoneout": (0.0, 0.5)},
    "recurrent_dropout": {"recurrent_dropout": 0.5},
    "activations": {"activations": ["Sigmoid", "Tanh", "Softsign"]},
    "clip_gates": {"clip_gates": 1.0},
}


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_cuda_refuses_the_options_it_names(name, monkeypatch):
    """An engine that learns an option takes it out of the list, and the words follow."""
    made = variants.variant("lstm", "lstm", options.Settings(**MAKERS[name]))
    assert isinstance(made, Variant)
    assert variants.used("lstm", made) == {name}
    monkeypatch.setattr(variants, "NOT_ON_CUDA", (name, "proj_size"))
    with pytest.raises(ValueError, match=f"^lstm: x is on a CUDA device; .*these options. {name} and proj_size run"):
        variants.refuse_on_cuda("lstm", "lstm", made)
    monkeypatch.setattr(variants, "NOT_ON_CUDA", tuple(one for one in variants.VARIANTS if one != name))
    variants.refuse_on_cuda("lstm", "lstm", made)
    for cell in CELLS:
        assert variants.variant(cell, cell, options.Settings(zoneout=0, clip_gates=None)) is None


def test_the_page_of_what_runs_where_is_up_to_date():
    """`python -m fusedrnn.support > docs/support.md` makes it."""
    page = Path(__file__).parents[1] / "docs" / "support.md"
    assert page.read_text() == support.page()
