# SPDX-License-Identifier: Apache-2.0
"""fusedrnn.torch's modules against torch.nn's: the same in everything torch.nn can do, and right beyond it."""

import copy
import dataclasses
import doctest
import importlib
import inspect
import io
import itertools
import math
import pickle
import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest

torch = pytest.importorskip("torch", minversion="2.8")

from torch import nn  # noqa: E402
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence  # noqa: E402
from torch.utils import _pytree as pytree  # noqa: E402

import fusedrnn  # noqa: E402
import fusedrnn.torch  # noqa: E402
from fusedrnn.backends import Problem  # noqa: E402
from fusedrnn.torch import composite, tape  # noqa: E402
from fusedrnn.torch.how import How, read  # noqa: E402

LAYERS = ("RNN", "LSTM", "GRU")
CELLS = ("RNNCell", "LSTMCell", "GRUCell")


def pair(kind, *arguments, **options):
    """torch.nn's module and ours, made from the same random numbers."""
    torch.manual_seed(0)
    theirs = getattr(nn, kind)(*arguments, **options)
    torch.manual_seed(0)
    return theirs, getattr(fusedrnn.torch, kind)(*arguments, **options)


def flat(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for part in value if part is not None for tensor in flat(part)]


def same(a, b, **tolerance):
    a, b = flat(a), flat(b)
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, **tolerance)


def gradients(module, outputs, inputs=()):
    loss = sum(torch.sin(t).sum() for t in flat(outputs))
    return torch.autograd.grad(loss, [*inputs, *module.parameters()])


def states(kind, shape, dtype=torch.float32):
    made = [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(2 if "LSTM" in kind else 1)]
    return tuple(made) if "LSTM" in kind else made[0]


# The same as torch.nn.


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("layers, bidirectional, bias, batch_first", [*itertools.product((1, 3), *[(False, True)] * 3)])
def test_options(kind, layers, bidirectional, bias, batch_first):
    options = {"num_layers": layers, "bidirectional": bidirectional, "bias": bias, "batch_first": batch_first}
    theirs, ours = pair(kind, 3, 5, **options, dtype=torch.float64)
    same(list(theirs.state_dict().values()), list(ours.state_dict().values()), rtol=0, atol=0)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    assert repr(theirs) == repr(ours)
    D = 2 if bidirectional else 1
    x = torch.randn((2, 7, 3) if batch_first else (7, 2, 3), dtype=torch.float64, requires_grad=True)
    for hx in (None, states(kind, (layers * D, 2, 5), torch.float64)):
        given = [x, *(flat(hx) if hx is not None else [])]
        y, z = theirs(x, hx), ours(x, hx)
        assert fusedrnn.torch.route() == "fused"
        same(y, z)
        same(gradients(theirs, y, given), gradients(ours, z, given))
        with torch.no_grad():
            same(y, ours(x, hx))
    single = x[0] if batch_first else x[:, 0]
    same(theirs(single), ours(single))
    hx = states(kind, (layers * D, 5), torch.float64)
    same(theirs(single, hx), ours(single, hx))


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("bias", [False, True])
def test_cells(kind, bias):
    theirs, ours = pair(kind, 3, 5, bias=bias, dtype=torch.float64)
    for shape in ((4, 3), (3,)):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for hx in (None, states(kind, (*shape[:-1], 5), torch.float64)):
            given = [x, *(flat(hx) if hx is not None else [])]
            y, z = theirs(x, hx), ours(x, hx)
            assert fusedrnn.torch.route() == "fused"
            same(y, z)
            same(gradients(theirs, y, given), gradients(ours, z, given))


def test_relu():
    theirs, ours = pair("RNN", 3, 5, nonlinearity="relu")
    x = torch.randn(7, 2, 3)
    same(theirs(x), ours(x))
    theirs, ours = pair("RNNCell", 3, 5, nonlinearity="relu")
    same(theirs(x[0]), ours(x[0]))


@pytest.mark.parametrize("kind", LAYERS)
def test_dropout_draws_the_same_numbers(kind):
    theirs, ours = pair(kind, 3, 6, 3, dropout=0.4, bidirectional=True)
    x = torch.randn(7, 4, 3)
    torch.manual_seed(7)
    y = theirs(x)
    torch.manual_seed(7)
    z = ours(x)
    same(y, z)
    same(theirs.eval()(x), ours.eval()(x))
    assert not torch.equal(y[0], ours(x)[0])


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_samples_that_torch_ships(kind):
    modules = pytest.importorskip("torch.testing._internal.common_modules", reason="needs expecttest")
    info = next(info for info in modules.module_db if info.module_cls is getattr(nn, kind))
    ran = 0
    for training in (True, False):
        options = {"device": "cpu", "dtype": torch.float64, "requires_grad": True, "training": training}
        for sample in info.module_inputs_func(info, **options):
            made, given = sample.constructor_input, sample.forward_input
            theirs, ours = pair(kind, *made.args, **made.kwargs)
            theirs, ours = theirs.double().train(training), ours.double().train(training)
            torch.manual_seed(3)
            y = theirs(*given.args, **given.kwargs)
            torch.manual_seed(3)
            z = ours(*given.args, **given.kwargs)
            same(y, z)
            same(gradients(theirs, y), gradients(ours, z))
            ran += 1
    assert ran >= 4
    if info.module_error_inputs_func is not None:
        options = {"device": "cpu", "dtype": torch.float64, "requires_grad": False, "training": True}
        for error in info.module_error_inputs_func(info, **options):
            made, given = error.module_error_input.constructor_input, error.module_error_input.forward_input
            with pytest.raises(error.error_type, match=error.error_regex):
                module = getattr(fusedrnn.torch, kind)(*made.args, **made.kwargs)
                module(*given.args, **given.kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_gradients_of_samples_that_torch_ships(kind):
    modules = pytest.importorskip("torch.testing._internal.common_modules", reason="needs expecttest")
    info = next(info for info in modules.module_db if info.module_cls is getattr(nn, kind))
    options = {"device": "cpu", "dtype": torch.float64, "requires_grad": True, "training": True}
    ran = 0
    for sample in info.module_inputs_func(info, **options):
        made, given = sample.constructor_input, sample.forward_input
        ours = pair(kind, *made.args, **made.kwargs)[1].double()
        if "dropout" in made.kwargs or getattr(ours, "proj_size", 0):
            continue  # random; torch.nn's own code
        names, parameters = zip(*ours.named_parameters(), strict=True)
        leaves, form = pytree.tree_flatten((given.args, given.kwargs))
        free = [n for n, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]

        def function(*tensors, ours=ours, names=names, leaves=leaves, form=form, free=free):
            weights = dict(zip(names, tensors, strict=False))
            inputs = list(leaves)
            for n, tensor in zip(free, tensors[len(names) :], strict=True):
                inputs[n] = tensor
            args, kwargs = pytree.tree_unflatten(inputs, form)
            out = torch.func.functional_call(ours, weights, args, kwargs)
            return tuple(t for t in flat(out) if t.is_floating_point())

        tensors = [t.detach().clone().requires_grad_() for t in (*parameters, *(leaves[n] for n in free))]
        torch.manual_seed(5)
        assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)
        ran += 1
    assert ran >= 2


WRONG = [
    lambda m: m(torch.randn(5, 2, 4)),
    lambda m: m(torch.randn(5, 2, 3, 1)),
    lambda m: m(torch.randn(3)),
    lambda m: m(torch.randn(5, 2, 3, dtype=torch.float64)),
    lambda m: m(torch.ones(5, 2, 3, dtype=torch.int64)),
    lambda m: m(torch.randn(5, 2, 3), torch.randn(1, 3, 4)),
    lambda m: m(torch.randn(5, 2, 3), torch.randn(2, 4)),
    lambda m: m(torch.randn(5, 2, 3), torch.randn(1, 2, 5)),
    lambda m: m(torch.randn(5, 3), torch.randn(1, 1, 4)),
    lambda m: m(torch.randn(5, 2, 3), (torch.randn(1, 2, 4), torch.randn(1, 2, 5))),
    lambda m: m(torch.randn(5, 2, 3), (torch.randn(1, 3, 4), torch.randn(1, 3, 4))),
    lambda m: m(pack_padded_sequence(torch.randn(5, 2, 4), [5, 3])),
    lambda m: m(pack_padded_sequence(torch.randn(5, 2, 3), [5, 3]), torch.randn(1, 3, 4)),
    lambda m: m(None),
]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("wrong", range(len(WRONG)))
def test_errors_are_torchs(kind, wrong):
    theirs, ours = pair(kind, 3, 4)
    try:
        WRONG[wrong](theirs)
    except Exception as error:
        expected = error
    else:
        pytest.skip("torch.nn takes this")
    with pytest.raises(type(expected)) as caught:
        WRONG[wrong](ours)
    assert str(caught.value) == str(expected).replace(f"torch.nn.{kind}", kind)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    "arguments, options",
    [
        ((0, 4), {}),
        ((3, 0), {}),
        ((3, 4, 0), {}),
        ((3.0, 4), {}),
        ((3, 4.0), {}),
        ((3, 4), {"dropout": 2.0}),
        ((3, 4), {"dropout": True}),
        ((3, 4), {"bias": 1}),
        ((3, 4), {"batch_first": 1}),
        ((3, 4), {"proj_size": 5}),
        ((3, 4), {"proj_size": -1}),
        ((3, 4), {"unknown": 1}),
    ],
)
def test_constructor_errors_are_torchs(kind, arguments, options):
    try:
        getattr(nn, kind)(*arguments, **options)
    except (ValueError, TypeError) as error:
        expected = error
    else:
        pytest.skip("this torch.nn takes it")
    with pytest.raises(type(expected), match=re.escape(str(expected))):
        getattr(fusedrnn.torch, kind)(*arguments, **options)


# Packed sequences, lengths, resets, cells.


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("lengths, options", [([7, 5, 5, 1], {}), ([2, 7, 1, 4], {"enforce_sorted": False})])
def test_packed(kind, lengths, options):
    theirs, ours = pair(kind, 3, 5, 2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(7, 4, 3, dtype=torch.float64, requires_grad=True)
    for hx in (None, states(kind, (4, 4, 5), torch.float64)):
        packed = pack_padded_sequence(x, lengths, **options)
        (y, y_state), (z, z_state) = theirs(packed, hx), ours(packed, hx)
        assert isinstance(z, PackedSequence)
        same(tuple(y), tuple(z))
        same(y_state, z_state)
        loss = [sum(t.sin().sum() for t in flat(out)) for out in ([y.data, y_state], [z.data, z_state])]
        found = [torch.autograd.grad(one, x, retain_graph=True)[0] for one in loss]
        same(*found)
        padded, padded_state = ours(x, hx, lengths=torch.tensor(lengths))
        same(pad_packed_sequence(y)[0], padded)
        same(y_state, padded_state)


def counted(monkeypatch):
    """What the short way's kernels answered, call by call: True, or False where they left it to the long way."""
    fast, answers = fusedrnn.torch.fast, []
    if not fast._open:
        pytest.skip("this torch has no exchange interface of version 1")

    def watch(function):
        def watched(*arguments):
            result = function(*arguments)
            answers.append(result is not None)
            return result

        return watched

    class Watched:
        torch_forward = staticmethod(watch(fast._native.torch_forward))
        torch_backward = staticmethod(watch(fast._native.torch_backward))

    monkeypatch.setattr(fast, "_native", Watched)
    return answers


@pytest.mark.parametrize("lengths", [[7, 7, 7], [7, 6, 6, 5, 3, 3, 1], [1], [1, 1], [9], [13, 4]])
@pytest.mark.parametrize("layers, bidirectional", [(1, False), (2, True)])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_short_way_of_lengths_and_packed(kind, layers, bidirectional, lengths, monkeypatch):
    """In inference, training and the derivative of a gradient: where rows end is nowhere read and nowhere written."""
    answers = counted(monkeypatch)
    theirs, ours = pair(kind, 3, 17, layers, bidirectional=bidirectional, dtype=torch.float64)
    T, B = max(lengths), len(lengths)
    data = torch.randn(sum(lengths), 3, dtype=torch.float64)
    sizes = torch.tensor([sum(n > t for n in lengths) for t in range(T)])
    hx = states(kind, (layers * (1 + bidirectional), B, 17), torch.float64)
    with torch.no_grad():
        (y, final), (z, end) = (module(PackedSequence(data, sizes), hx) for module in (theirs, ours))
        same([y.data, final], [z.data, end])
        padded = torch.full((T, B, 3), math.nan, dtype=torch.float64)
        for b, n in enumerate(lengths):
            padded[:n, b] = pad_packed_sequence(PackedSequence(data, sizes))[0][:n, b]
        u, end = ours(padded, hx, lengths=torch.tensor(lengths))
        same([pad_packed_sequence(y)[0], final], [u, end])
    assert answers == [True, True]
    found = []
    for module in (theirs, ours):
        x = data.clone().requires_grad_()
        y, final = module(PackedSequence(x, sizes), hx)
        found.append(gradients(module, [y.data, final], [x, *flat(hx)]))
    same(*found)
    x = padded.clone().requires_grad_()
    y, final = ours(x, hx, lengths=torch.tensor(lengths))
    values = [pack_padded_sequence(y, lengths).data, final]
    dx, *rest = gradients(ours, values, [x, *flat(hx)])
    same([pack_padded_sequence(dx, lengths).data, *rest], found[0])
    assert all(not dx[n:, b].any() for b, n in enumerate(lengths))
    assert answers == [True] * 6


@pytest.mark.parametrize("kind", LAYERS)
def test_double_backward_of_packed(kind):
    theirs, ours = pair(kind, 2, 3, bidirectional=True, dtype=torch.float64)
    found = []
    for module in (theirs, ours):
        x = torch.randn(8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y, final = module(PackedSequence(x, torch.tensor([3, 2, 2, 1])))
        loss = sum(t.sin().sum() for t in flat((y.data, final)))
        first = torch.autograd.grad(loss, [x, *module.parameters()], create_graph=True)
        second = torch.autograd.grad(sum(g.sin().sum() for g in first), [x, *module.parameters()])
        found.append((first, second))
    same(*found)


@pytest.mark.parametrize("sizes", [[], [0], [2, 3], [3, 2, 0], [3, 3], [3, 1], [-1, 6], [2**62, 2**62]])
def test_the_short_way_leaves_wrong_batch_sizes_alone(sizes):
    fast = fusedrnn.torch.fast
    if not fast._open:
        pytest.skip("this torch has no exchange interface of version 1")
    layer = fusedrnn.torch.GRU(2, 3)
    settings = fast.Settings(how=How(cell="gru"), packed=True)
    weights = [w.detach() for w in layer.parameters()]
    given = (torch.ones(5, 2), None, None, weights, torch.tensor(sizes, dtype=torch.int64))
    assert fast._native.torch_forward(settings.native, *given, False) is None


@pytest.mark.parametrize("lengths", [[8, 1], [-1, 1], [1, 1, 1], [1.0, 1.0], [True, True]])
def test_wrong_lengths_raise_on_every_way(lengths):
    with pytest.raises((ValueError, TypeError), match="lengths"):
        fusedrnn.torch.LSTM(2, 3)(torch.ones(7, 2, 2), lengths=torch.tensor(lengths))


@pytest.mark.parametrize("kind", LAYERS)
def test_lengths_of_zero_carry_the_state(kind):
    ours = getattr(fusedrnn.torch, kind)(3, 4, batch_first=True)
    hx = states(kind, (1, 3, 4))
    x = torch.full((3, 5, 3), math.nan)
    x[1, :3] = 1
    y, state = ours(x, hx, lengths=[0, 3, 0])
    assert not y[0].any() and not y[2].any() and not y[1, 3:].any() and y[1, :3].all()
    for initial, final in zip(flat(hx), flat(state), strict=True):
        same(initial[:, [0, 2]], final[:, [0, 2]])
    sum(t.sum() for t in flat((y, state))).backward()
    assert all(p.grad.isfinite().all() for p in ours.parameters())


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("initial", [False, True])
def test_reset_begins_a_new_sequence(kind, initial):
    theirs, ours = pair(kind, 3, 4, 2, dtype=torch.float64)
    ours.reset_to = "initial" if initial else "zero"
    x = torch.randn(9, 2, 3, dtype=torch.float64, requires_grad=True)
    hx = states(kind, (2, 2, 4), torch.float64)
    reset = torch.zeros(9, 2, dtype=torch.bool)
    reset[4] = True
    y, state = ours(x, hx, reset=reset)
    first, _ = theirs(x[:4], hx)
    second, final = theirs(x[4:], hx if initial else None)
    same(y, torch.cat([first, second]))
    same(state, final)
    given = [x, *flat(hx)]
    same(gradients(theirs, [first, second, final], given), gradients(ours, [y, state], given))


@pytest.mark.parametrize("kind", LAYERS)
def test_cells_of_every_step(kind):
    ours = getattr(fusedrnn.torch, kind)(3, 4, 2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    y, state, cells = ours(x, return_cells=True)
    assert cells.shape == (2, 5, 2, 8)
    last = (state[1] if kind == "LSTM" else state).unflatten(0, (2, 2))
    same(cells[:, -1, :, :4], last[:, 0])
    same(cells[:, 0, :, 4:], last[:, 1])
    cells.sin().sum().backward()
    numpy = getattr(fusedrnn, kind)(3, 4, 2, bidirectional=True, dtype=np.float64, backend="reference")
    numpy.load_state_dict(ours.state_dict())
    expected = numpy(x.numpy(), return_cells=True)[2]
    same(cells, torch.from_numpy(expected))
    grads = numpy.backward(dcells=np.cos(expected))
    for name, p in ours.named_parameters():
        same(p.grad, torch.from_numpy(grads[name]))


def test_unbatched_and_batch_first_with_everything():
    ours = fusedrnn.torch.LSTM(3, 4, batch_first=True)
    x = torch.randn(2, 6, 3)
    reset = torch.rand(2, 6) < 0.4
    y, state, cells = ours(x, lengths=[4, 6], reset=reset, return_cells=True)
    for n, length in enumerate((4, 6)):
        one = ours(x[n], lengths=length, reset=reset[n], return_cells=True)
        same(one, (y[n], (state[0][:, n], state[1][:, n]), cells[:, n]))


@pytest.mark.parametrize(
    "options, error, match",
    [
        ({"lengths": [1, 2]}, ValueError, "lengths has shape"),
        ({"lengths": [1.0, 2.0, 3.0]}, TypeError, "lengths has dtype"),
        ({"lengths": [1, 2, 6]}, ValueError, "expected 0 <= length <= T = 5"),
        ({"lengths": [1, 2, -1]}, ValueError, "expected 0 <= length <= T = 5"),
        ({"reset": torch.zeros(3, 5)}, ValueError, "reset has shape"),
    ],
)
def test_errors_of_what_is_new(options, error, match):
    with pytest.raises(error, match=match):
        fusedrnn.torch.LSTM(3, 4)(torch.randn(5, 3, 3), **options)


def test_more_than_sixty_weights():
    """As many as a set of 64 bits could not tell apart."""
    theirs, ours = nn.LSTM(3, 4, 17), fusedrnn.torch.LSTM(3, 4, 17)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 2, 3)
    same(gradients(theirs, theirs(x)), gradients(ours, ours(x)))


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_recompute_on_numba(kind):
    """Numba keeps every c, where the others set marks."""
    ours, x = getattr(fusedrnn.torch, kind)(3, 4, 2, dtype=torch.float64), torch.randn(11, 2, 3, dtype=torch.float64)
    want = gradients(ours, ours(x))
    fusedrnn.set_backend("numba")
    try:
        same(gradients(ours, ours(x, recompute=True)), want)
    finally:
        fusedrnn.set_backend(None)


def test_recompute_and_clips():
    ours = fusedrnn.torch.LSTM(3, 4, dtype=torch.float64)
    x = torch.randn(20, 2, 3, dtype=torch.float64) * 4
    same(gradients(ours, ours(x)), gradients(ours, ours(x, recompute=True)))
    ours.clip_cell = 0.5
    assert ours(x, return_cells=True)[2].abs().max() == 0.5
    ours.clip_cell, ours.clip_grad = None, 1e-3
    clipped = gradients(ours, ours(x))
    numpy = fusedrnn.LSTM(3, 4, dtype=np.float64, clip_grad=1e-3, backend="reference")
    numpy.load_state_dict(ours.state_dict())
    y, (h, c) = numpy(x.numpy())
    grads = numpy.backward(np.cos(y), (np.cos(h), np.cos(c)))
    same(clipped, [torch.from_numpy(grads[name]) for name, _ in ours.named_parameters()])


# Packed sequences, with everything crossed; and those that someone made by hand.


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    "batch_first, bidirectional, layers", [*itertools.product((False, True), (False, True), (1, 2))]
)
def test_packed_differentiated_twice_with_everything(kind, batch_first, bidirectional, layers):
    projections = (0, 2) if kind == "LSTM" else (0,)
    lengths_and_order = (([2, 1], True), ([3, 2, 2, 1], True), ([1, 3, 2], False), ([2, 2], True), ([1], True))
    for proj_size, (lengths, is_sorted), with_state in itertools.product(projections, lengths_and_order, (False, True)):
        options = {"proj_size": proj_size} if proj_size else {}
        options |= {"batch_first": batch_first, "bidirectional": bidirectional, "num_layers": layers}
        theirs, ours = pair(kind, 2, 3, **options, dtype=torch.float64)
        T, B, S = max(lengths), len(lengths), layers * (1 + bidirectional)
        torch.manual_seed(sum(lengths))
        x = torch.randn((B, T, 2) if batch_first else (T, B, 2), dtype=torch.float64, requires_grad=True)
        hx = None
        if with_state:
            h = torch.randn(S, B, proj_size or 3, dtype=torch.float64, requires_grad=True)
            hx = (h, torch.randn(S, B, 3, dtype=torch.float64, requires_grad=True)) if kind == "LSTM" else h
        given = [x, *(flat(hx) if hx is not None else [])]
        found = []
        for module in (theirs, ours):
            packed = pack_padded_sequence(x, lengths, batch_first, is_sorted)
            y, final = module(packed, hx)
            y = pad_packed_sequence(y, batch_first)[0] if with_state else y.data
            out = [y, *flat(final)]
            leaves = [*given, *module.parameters()]
            first = torch.autograd.grad(sum(t.sin().sum() for t in out), leaves, create_graph=True)
            second = torch.autograd.grad(sum(g.sin().sum() for g in first), leaves)
            found.append((*out, *first, *second))
        try:
            same(*found)
        except AssertionError as error:
            raise AssertionError(f"{options}, {lengths}, state {with_state}: {error}") from None


def test_the_example_of_packed_and_batch_first():
    torch.manual_seed(0)
    theirs, ours = pair("GRU", 1, 1, batch_first=True)
    x = torch.randn(2, 2, 1)
    found = []
    for module in (theirs, ours):
        y, _ = module(pack_padded_sequence(x, [2, 1], batch_first=True))
        found.append(torch.autograd.grad(y.data.sum(), [*module.parameters()], create_graph=True))
    same(*found)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_dropout_of_packed_draws_the_same_numbers(kind, bidirectional):
    theirs, ours = pair(kind, 3, 6, 3, dropout=0.4, bidirectional=bidirectional)
    x = torch.randn(7, 4, 3, requires_grad=True)
    for lengths, is_sorted in (([7, 5, 5, 1], True), ([2, 7, 1, 4], False)):
        found = []
        for module in (theirs, ours):
            packed = pack_padded_sequence(x, lengths, enforce_sorted=is_sorted)
            torch.manual_seed(7)
            y, final = module(packed)
            found.append((y.data, final, torch.rand(3), *gradients(module, [y.data, final], [x])))
        assert fusedrnn.torch.route() == "fused"
        same(*found)


BY_HAND = {
    "sizes": [[3, -1], [-1, 6], [], [0], [5, 0], [2, 3], [3, 1], [3, 3], [6], [2**62, 2**62], [[3, 2]], 5],
    "size types": [torch.int32, torch.float32, torch.bool, torch.uint8, torch.complex64],
    "indices": [[0, 1, 7], [0, 1, -1], [0, 1, -(2**62)], [[0, 1, 2]], [0.0, 1.0, 2.0], 0, [True, False, True]],
    "objects": [None, [3, 2], "text", torch.tensor([3, 2], device="meta"), torch.tensor([3, 2]).to_sparse()],
}


def sequences_by_hand():
    good = {"sizes": torch.tensor([3, 2]), "order": torch.tensor([2, 0, 1]), "back": torch.tensor([1, 2, 0])}
    for sizes in BY_HAND["sizes"]:
        yield good | {"sizes": torch.tensor(sizes, dtype=torch.int64)}
        yield {"sizes": torch.tensor(sizes, dtype=torch.int64), "order": None, "back": None}
    for dtype in BY_HAND["size types"]:
        yield good | {"sizes": good["sizes"].to(dtype)}
    for indices, which in itertools.product(BY_HAND["indices"], ("order", "back")):
        yield good | {which: torch.tensor(indices)}
    for value, which in itertools.product(BY_HAND["objects"], good):
        if value is not None or which == "sizes":
            yield good | {which: value}


@pytest.mark.parametrize("short", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_packed_sequences_made_by_hand_are_computed_right_or_refused(kind, short, monkeypatch):
    monkeypatch.setattr(fusedrnn.torch.fast, "_open", short and fusedrnn.torch.fast._open)
    theirs, ours = pair(kind, 3, 4)
    refused = 0
    for made, hx in itertools.product(sequences_by_hand(), (None, states(kind, (1, 3, 4)))):
        packed = PackedSequence._make((torch.randn(5, 3), *made.values()))
        try:
            found = ours(packed, hx)
        except (ValueError, TypeError, RuntimeError, IndexError) as error:
            assert str(error)
            refused += 1
            continue
        sizes = packed.batch_sizes.to_dense() if packed.batch_sizes.is_sparse else packed.batch_sizes
        expected = theirs(packed._replace(batch_sizes=sizes), hx)
        same([found[0].data, found[1]], [expected[0].data, expected[1]])
    assert refused > 60
    data = torch.randn(5, 3)
    for wrong in ([3, -1], [2, 3], [3, 1], [5, 0]):
        with pytest.raises(ValueError, match=re.escape(f"batch_sizes of the PackedSequence is {wrong}; expected")):
            ours(PackedSequence(data, torch.tensor(wrong)))
    for data in (torch.randn(5, 1, 3), torch.randn(5), torch.tensor(1.0), torch.randn(5, 4)):
        with pytest.raises((ValueError, RuntimeError)):
            ours(PackedSequence._make((data, torch.tensor([3, 2]), None, None)))


# No steps, no rows.


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("T, B", [(0, 2), (4, 0), (0, 0), (0, None)])
def test_no_steps_and_no_rows(kind, T, B):
    """No step: h_n = h_0, as in the NumPy layers (torch.nn refuses it). No row: as torch.nn."""
    for batch_first, bidirectional, layers in itertools.product((False, True), (False, True), (1, 2)):
        options = {"num_layers": layers, "batch_first": batch_first, "bidirectional": bidirectional}
        theirs, ours = pair(kind, 3, 4, **options, dtype=torch.float64)
        D = 1 + bidirectional
        shape = (T, 3) if B is None else (B, T, 3) if batch_first else (T, B, 3)
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        rows = () if B is None else (B,)
        for hx in (None, states(kind, (layers * D, *rows, 4), torch.float64)):
            given = [x, *(flat(hx) if hx is not None else [])]
            y, final = ours(x, hx)
            assert fusedrnn.torch.route() == "fused" and y.shape == (*shape[:-1], 4 * D)
            if T == 0:
                zeros = torch.zeros((layers * D, *rows, 4), dtype=torch.float64)
                expected = hx if hx is not None else (zeros, zeros) if kind == "LSTM" else zeros
                same(final, expected)
                dx, *rest = gradients(ours, [y, final], given)
                same(rest[: len(given) - 1], [t.cos() for t in given[1:]])
                assert dx.shape == shape and not any(g.any() for g in rest[len(given) - 1 :])
            else:
                same((y, final), theirs(x, hx))
                same(gradients(ours, [y, final], given), gradients(theirs, theirs(x, hx), given))
            first = torch.autograd.grad(sum(t.sin().sum() for t in flat(ours(x, hx))), given, create_graph=True)
            torch.autograd.grad(sum(g.sin().sum() for g in first if g.requires_grad), given, allow_unused=True)
            if B is not None:
                lengths, reset = torch.zeros(B, dtype=torch.int64), torch.zeros(shape[:-1], dtype=torch.bool)
                y, again, cells = ours(x, hx, lengths=lengths, reset=reset, return_cells=True)
                assert cells.shape == (layers, *y.shape) and [t.shape for t in flat(again)] == [
                    t.shape for t in flat(final)
                ]
            jvp = torch.func.jvp(lambda x, m=ours: flat(m(x))[1], (x.detach(),), (x.detach(),))[1]
            assert not jvp.any()


@pytest.mark.parametrize("kind", CELLS)
def test_cells_without_rows(kind):
    theirs, ours = pair(kind, 3, 4)
    x = torch.randn(0, 3, requires_grad=True)
    same(ours(x), theirs(x))
    same(gradients(ours, ours(x), [x]), gradients(theirs, theirs(x), [x]))


def test_functions_without_steps():
    params = dict(nn.LSTM(3, 4).named_parameters())
    h, c = states("LSTM", (1, 2, 4))
    y, (hn, cn) = fusedrnn.torch.lstm(torch.randn(0, 2, 3), (h, c), params)
    assert y.shape == (0, 2, 4)
    same((hn, cn), (h, c))


# Weights are ordinary tensors.


def test_functions_and_odd_weights():
    layer = nn.LSTM(3, 4, 2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    params = dict(layer.named_parameters())
    same(layer(x), fusedrnn.torch.lstm(x, None, params, num_layers=2, bidirectional=True))
    strided = [p.detach().repeat_interleave(2, -1)[..., ::2] for p in params.values()]
    same(layer(x), fusedrnn.torch.lstm(x, None, strided, num_layers=2, bidirectional=True))
    gru = nn.GRU(3, 3, dtype=torch.float64)
    y, h = fusedrnn.torch.gru(x, None, dict(gru.named_parameters()), lengths=[5, 2])
    same(y[:, 0], gru(x[:, 0])[0])
    back, _ = fusedrnn.torch.gru(x, None, dict(gru.named_parameters()), reverse=True)
    same(back, gru(x.flip(0))[0].flip(0))
    tied = gru.weight_ih_l0.detach().requires_grad_()
    fusedrnn.torch.gru(x, None, [tied, tied, gru.bias_ih_l0, gru.bias_hh_l0])[0].sum().backward()
    both = [tied.detach().requires_grad_() for _ in range(2)]
    fusedrnn.torch.gru(x, None, [*both, gru.bias_ih_l0, gru.bias_hh_l0])[0].sum().backward()
    same(tied.grad, both[0].grad + both[1].grad)
    with pytest.raises(ValueError, match="weight_ih_l0 has shape"):
        fusedrnn.torch.gru(x, None, [tied, tied.T, gru.bias_ih_l0, gru.bias_hh_l0])
    with pytest.raises(ValueError, match="params has 3 tensors"):
        fusedrnn.torch.rnn(x, None, [tied] * 3)


def test_parametrized_weights():
    for kind in ("LSTM", "LSTMCell"):
        theirs, ours = pair(kind, 3, 4)
        for module in (theirs, ours):
            name = "weight_hh" if kind == "LSTMCell" else "weight_hh_l0"
            nn.utils.parametrizations.weight_norm(module, name)
        x = torch.randn(5, 2, 3) if kind == "LSTM" else torch.randn(2, 3)
        y, z = theirs(x), ours(x)
        assert fusedrnn.torch.route() == "fused"
        same(y, z)
        same(gradients(theirs, y), gradients(ours, z))


def test_weights_changed_in_place_and_replaced():
    theirs, ours = pair("GRU", 3, 4)
    x = torch.randn(5, 2, 3)
    for module in (theirs, ours):
        with torch.no_grad():
            module.weight_ih_l0.mul_(2)
        module.weight_hh_l0 = nn.Parameter(module.weight_hh_l0.detach() * 3)
    same(theirs(x), ours(x))
    for change in (  # the first two leave no trace in the tensor's version: nothing of a weight may be kept
        lambda m: m.weight_hh_l0.data.mul_(0.5),
        lambda m: np.negative(m.bias_hh_l0.detach().numpy(), out=m.bias_hh_l0.detach().numpy()),
        lambda m: setattr(m.weight_ih_l0, "data", m.weight_ih_l0.data.clone() * 2),
    ):
        with torch.no_grad():
            before = ours(x)[0]
            for module in (theirs, ours):
                change(module)
            assert not torch.equal(before, ours(x)[0])
            same(theirs(x), ours(x))
    y = ours(x)[0]
    with torch.no_grad():
        ours.weight_hh_l0.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_replace_and_restore():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.LSTM(3, 4, 2, dropout=0.3)
            self.b = nn.Sequential(nn.GRU(4, 4, batch_first=True))
            self.c = nn.LSTMCell(4, 4)
            self.d = type("Own", (nn.RNN,), {})(4, 4)
            self.e = nn.utils.parametrizations.weight_norm(nn.GRU(4, 4), "weight_hh_l0")
            self.f = nn.LSTM(3, 4, proj_size=2)

    torch.manual_seed(0)
    model = Model()
    x = torch.randn(5, 2, 3)
    before = list(model.named_parameters())
    model.eval()
    y = model.b(model.a(x)[0])
    report = fusedrnn.torch.replace(model)
    assert report.swapped == ["a", "b.0", "c", "f"]
    assert set(report.kept) == {"d", "e"}
    assert "Own" in report.kept["d"] and "parametrized" in report.kept["e"]
    assert "swapped a" in str(report)
    assert all(p is q for (_, p), (_, q) in zip(before, model.named_parameters(), strict=True))
    same(y, model.b(model.a(x)[0]))
    assert fusedrnn.torch.route() == "fused"
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.b(model.a(x)[0])[0].sum().backward()
    optimizer.step()
    z = model.b(model.a(x)[0])
    back = fusedrnn.torch.restore(model)
    assert type(model.a) is nn.LSTM and "a" in back.swapped
    same(z, model.b(model.a(x)[0]))
    assert str(fusedrnn.torch.replace(nn.Linear(2, 2))) == "no recurrent modules found"


# Copies, files, processes.


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_copies_and_files(kind):
    theirs, ours = pair(kind, 3, 4)
    ours.recompute = True
    x = torch.randn(5, 2, 3) if kind in LAYERS else torch.randn(2, 3)
    y = ours(x)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(file, weights_only=False)):
        same(y, other(x))
        assert other.recompute
        assert all(p is not q for p, q in zip(ours.parameters(), other.parameters(), strict=True))
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    theirs.load_state_dict(torch.load(file, weights_only=True))
    same(y, theirs(x))
    ours.load_state_dict(theirs.state_dict())
    same(y, ours(x))


def test_a_pickle_loads_in_a_fresh_process(tmp_path):
    layer = fusedrnn.torch.LSTM(3, 4, 7, bias=False)  # more weights than operators are made for at once
    torch.save(layer, tmp_path / "layer")
    code = (
        "import torch; layer = torch.load(r'{}', weights_only=False);"
        "torch.func.vmap(lambda x: layer(x)[0])(torch.ones(2, 5, 1, 3)); print('fine')"
    )
    run = subprocess.run([sys.executable, "-c", code.format(tmp_path / "layer")], capture_output=True, text=True)
    assert run.stdout == "fine\n", run.stderr


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", LAYERS)
def test_16_bit(kind, dtype):
    ours = getattr(fusedrnn.torch, kind)(8, 16, dtype=dtype)
    x = torch.randn(10, 4, 8, dtype=dtype)
    y, state = ours(x)
    assert fusedrnn.torch.route() == "fused" and y.dtype == dtype and flat(state)[0].dtype == dtype
    wide = copy.deepcopy(ours).float()
    expected, _ = wide(x.float())
    same(y, expected.to(dtype), rtol=0, atol=0)  # computed in 32 bits and rounded once
    y.float().square().sum().backward()
    expected.square().sum().backward()
    for p, q in zip(ours.parameters(), wide.parameters(), strict=True):
        assert p.grad.dtype == dtype
        same(p.grad.float(), q.grad, rtol=0.05, atol=0.05 * float(q.grad.abs().max()))


def by_hand(layer, x, hx, rounds):
    """A stack in float64, step by step; where h meets a weight it is `rounds` to bfloat16."""
    kind, D = type(layer).__name__, 2 if layer.bidirectional else 1
    p = {name: value.detach().double() for name, value in layer.named_parameters()}
    round_ = (lambda t: t.bfloat16().double()) if rounds else (lambda t: t)
    h0, c0 = (*((hx,) if kind != "LSTM" else hx), None)[:2]
    y, last = x.double(), []
    for layer_ in range(layer.num_layers):
        both = []
        for d in range(D):
            end, row = f"_l{layer_}" + "_reverse" * d, layer_ * D + d
            h = h0[row].double()
            c = None if c0 is None else c0[row].double()
            outputs = [None] * len(x)
            for t in range(len(x))[:: -1 if d else 1]:
                a = round_(y[t]) @ p["weight_ih" + end].T + p.get("bias_ih" + end, 0)
                b = round_(h) @ p["weight_hh" + end].T + p.get("bias_hh" + end, 0)
                if kind == "LSTM":
                    i, f, g, o = (a + b).chunk(4, 1)
                    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                    h = o.sigmoid() * c.tanh()
                elif kind == "GRU":
                    (ar, az, an), (br, bz, bn) = a.chunk(3, 1), b.chunk(3, 1)
                    z = (az + bz).sigmoid()
                    h = (1 - z) * (an + (ar + br).sigmoid() * bn).tanh() + z * h
                else:
                    h = (a + b).tanh()
                outputs[t] = h
            both.append(torch.stack(outputs))
            last.append((h, c))
        y = torch.cat(both, -1)
    final = [torch.stack(each) for each in zip(*last, strict=True) if each[0] is not None]
    return [y, *final]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("B, H", [(1, 19), (2, 33), (3, 1), (5, 19), (7, 16), (33, 47), (40, 32)])
@pytest.mark.parametrize("kind", LAYERS)
def test_bfloat16_in_inference(kind, B, H, threads):
    """Sums in 32 bits; h is rounded on its way to the weights where the CPU multiplies pairs of bfloat16, else not."""
    torch.manual_seed(B + H)
    I, T = 7 if B % 2 else 16, 6  # noqa: E741
    ours = getattr(fusedrnn.torch, kind)(I, H, 2, bias=kind != "GRU", bidirectional=True, dtype=torch.bfloat16)
    x = torch.randn(T, B, I, dtype=torch.bfloat16)
    hx = states(kind, (4, B, H), torch.bfloat16)
    before = fusedrnn.get_num_threads()
    fusedrnn.set_num_threads(threads)
    try:
        with torch.no_grad():
            found = flat(ours(x, hx))
            worst = []
            for rounds in (False, True):
                expected = by_hand(ours, x, hx, rounds)
                off = [(a.double() - b).abs() - 2**-8 * b.abs() - 4e-6 for a, b in zip(found, expected, strict=True)]
                over = torch.cat([each.reshape(-1) for each in off])
                # sums in 32 bits may round an h to bfloat16's other neighbour, hence a few elements
                worst.append((float((over > 0).double().mean()), float(over.max())))
    finally:
        fusedrnn.set_num_threads(before)
    assert min(worst)[0] < 0.01 and min(worst)[1] < 2**-7, worst


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_bfloat16_weights_are_read_as_they_lie(kind, monkeypatch):
    torch.manual_seed(1)
    sizes = (7, 19) if kind in CELLS else (7, 19, 2)
    ours = getattr(fusedrnn.torch, kind)(*sizes, bias=kind != "GRU", dtype=torch.bfloat16)
    wide = copy.deepcopy(ours).double()
    shape = (5, 7) if kind in CELLS else (6, 5, 7)
    x = torch.randn(shape, dtype=torch.bfloat16)
    hx = states(kind, (5, 19) if kind in CELLS else (2, 5, 19), torch.bfloat16)
    wider = tuple(t.double() for t in hx) if isinstance(hx, tuple) else hx.double()
    expected = wide(x.double(), wider)
    made = []
    call = fusedrnn.torch.kernels.TensorCall.__init__
    monkeypatch.setattr(
        fusedrnn.torch.kernels.TensorCall, "__init__", lambda self, *a: (call(self, *a), made.append(self.problem))[0]
    )
    with torch.no_grad():
        for way in (True, False):  # the short way, and the general one
            monkeypatch.setattr(fusedrnn.torch.fast, "_open", way and fusedrnn.torch.fast._open)
            found = ours(x, hx)
            assert fusedrnn.torch.route() == "fused"
            for got, exact in zip(flat(found), flat(expected), strict=True):
                assert got.dtype == torch.bfloat16
                # rounded once, from 32 bits: half a unit of bfloat16 (2**-8 at most), and a little of float32;
                # on the short way h may be rounded at every step, too
                loose = 2**-7 if way and kind in LAYERS else 2e-6
                same(got.double(), exact, rtol=2**-8 + 2e-6, atol=loose)
        assert made and all(problem.bf16_weights for problem in made)
        mixed = copy.deepcopy(ours)
        strided = [p.detach().repeat_interleave(2, -1)[..., ::2] for p in mixed.parameters()]
        for p, q in zip(mixed.parameters(), strided, strict=True):
            p.data = q
        same(ours(x, hx), mixed(x, hx), rtol=2**-8, atol=1e-6)
    ours(x, hx)  # with a tape: widened
    assert not made[-1].bf16_weights


@pytest.mark.parametrize("lengths", [[2, 2, 2], [3, 2, 2]])
@pytest.mark.parametrize("kind", LAYERS)
def test_states_of_packed_rows_are_checked(kind, lengths):
    """torch.nn's LSTM reads beyond such a state where all lengths are equal."""
    module = getattr(fusedrnn.torch, kind)(3, 4)
    packed = pack_padded_sequence(torch.randn(3, 3, 3), lengths)
    for shape in ((1, 1, 4), (1, 5, 4), (2, 3, 4), (1, 3, 3), (1, 3, 40), (1, 1, 3, 4)):
        h = torch.zeros(shape)
        with pytest.raises(RuntimeError, match="xpected hidden"):
            module(packed, (h, h) if kind == "LSTM" else h)


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_weights_of_other_shapes_are_refused(kind):
    """torch.nn reads beyond some of them, and takes others for what they are not."""
    end = "" if kind in CELLS else "_l0"
    for name in ("weight_ih", "weight_hh", "bias_ih"):
        for cut in (slice(0, 0), slice(0, 1), slice(None, None, 2)):
            module = getattr(fusedrnn.torch, kind)(3, 4)
            weight = getattr(module, name + end)
            setattr(module, name + end, nn.Parameter(weight.detach()[cut].clone()))
            x = torch.randn(2, 3) if kind in CELLS else torch.randn(5, 2, 3)
            for given in (x,) if kind in CELLS else (x, pack_padded_sequence(x, [5, 5])):
                with pytest.raises(RuntimeError, match=f"{kind}: {name}{end} has shape .* expected .* input_size=3"):
                    module(given)


def test_projections_without_steps_and_under_autocast():
    theirs, ours = nn.LSTM(3, 4, proj_size=2), fusedrnn.torch.LSTM(3, 4, proj_size=2)
    y, (h, c) = ours(torch.randn(0, 2, 3))
    assert y.shape == (0, 2, 2) and h.shape == (1, 2, 2) and c.shape == (1, 2, 4)
    for T in (5, 9):
        x = torch.randn(T, 2, 3)
        for given in (x, pack_padded_sequence(x, [T, T - 1])):
            with torch.autocast("cpu", torch.bfloat16):
                found, expected = flat(ours(given)), flat(theirs(given))
            assert [t.dtype for t in found] == [t.dtype for t in expected]


def test_autocast():
    theirs, ours = pair("LSTM", 8, 16, 2)
    x = torch.randn(10, 4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        z, _ = ours(x)
    assert z.dtype == torch.bfloat16
    same(z.float(), theirs(x)[0], rtol=0.05, atol=0.02)
    z.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in ours.parameters())


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_results_under_autocast_have_torchs_dtypes(kind, autocast):
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    for weight, x_dtype, h_dtype in itertools.product(kinds[:2], kinds, (None, *kinds)):
        theirs, ours = pair(kind, 3, 4, dtype=weight)
        x = torch.randn((2, 3) if kind in CELLS else (5, 2, 3), dtype=x_dtype)
        h = None if h_dtype is None else torch.randn((2, 4) if kind in CELLS else (1, 2, 4), dtype=h_dtype)
        hx = (h, h) if "LSTM" in kind and h is not None else h
        for grad, packed, training in ((False, False, False), (True, False, True), (True, True, False)):
            if packed and kind in CELLS:
                continue
            given = pack_padded_sequence(x, [5, 3]) if packed else x
            with torch.autocast("cpu", autocast), torch.set_grad_enabled(grad):
                found = flat(ours.train(training)(given, hx))
                onednn = kind == "LSTM" and not grad and autocast == torch.bfloat16
                onednn = onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported()
                assert fusedrnn.torch.route() == ("torch.nn: oneDNN under autocast" if onednn else "fused")
                try:
                    expected = flat(theirs.train(training)(given, hx))
                except RuntimeError as error:
                    assert "primitive" in str(error)  # oneDNN does not train an LSTM in float16
                    continue
            found = [t for t in found if t.is_floating_point()]
            expected = [t for t in expected if t.is_floating_point()]
            assert [t.dtype for t in found] == [t.dtype for t in expected]
            same([t.float() for t in found], [t.float() for t in expected], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", ["lstm", "gru", "rnn"])
def test_functions_under_autocast_are_like_the_modules(name):
    theirs = getattr(nn, name.upper())(3, 4)
    params = dict(theirs.named_parameters())
    for x_dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(5, 2, 3, dtype=x_dtype)
        with torch.autocast("cpu", torch.bfloat16):
            found, expected = getattr(fusedrnn.torch, name)(x, None, params), theirs(x)
        assert [t.dtype for t in flat(found)] == [t.dtype for t in flat(expected)]
        first, second = (torch.autograd.grad(flat(t)[0].float().sum(), theirs.weight_hh_l0) for t in (found, expected))
        same(first, second, rtol=0.05, atol=0.05)


def test_states_keep_their_precision_under_autocast():
    """Small steps that bfloat16 would lose add up in a GRU's state."""
    cell = fusedrnn.torch.GRUCell(1, 1)
    with torch.no_grad():
        for p in cell.parameters():
            p.zero_()
        cell.bias_ih.copy_(torch.tensor([0.0, 7.0, 5.0]))  # z = 0.9991, n = 1
    h = torch.zeros(1, 1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for _ in range(600):
            h = cell(torch.zeros(1, 1), h)
    assert h.dtype == torch.float32 and 0.4 < h.item() < 0.44


def test_a_torch_without_the_exchange_interface(tmp_path):
    """As torch 2.8 and 2.9 are: no DLPack exchange API, so all goes the general way, with the same answers."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import torch
            name = "__dlpack_c_exchange_api__"
            for owner in torch.Tensor.__mro__:
                if name in vars(owner):
                    delattr(owner, name)
            assert not hasattr(torch.Tensor, name)
            import fusedrnn.torch
            assert not fusedrnn.torch.fast._open
            for kind in ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"):
                torch.manual_seed(0)
                theirs = getattr(torch.nn, kind)(3, 4, dtype=torch.float64)
                ours = getattr(fusedrnn.torch, kind)(3, 4, dtype=torch.float64)
                ours.load_state_dict(theirs.state_dict())
                x = torch.randn((2, 3) if "Cell" in kind else (5, 2, 3), dtype=torch.float64, requires_grad=True)
                found = []
                for module in (theirs, ours):
                    with torch.no_grad():
                        module(x)
                    y = module(x)
                    y = y[0] if isinstance(y, tuple) else y
                    first = torch.autograd.grad(y.sin().sum(), [x, *module.parameters()], create_graph=True)
                    second = torch.autograd.grad(sum(g.sin().sum() for g in first), [x, *module.parameters()])
                    found.append((y, *first, *second))
                assert fusedrnn.torch.route() == "fused"
                torch.testing.assert_close(found[0], found[1])
            print("fine")
            """
        )
    )
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert run.stdout == "fine\n", run.stderr


def test_meta_device():
    layer = fusedrnn.torch.LSTM(3, 4, device="meta")
    assert layer(torch.empty(5, 2, 3, device="meta"))[0].shape == (5, 2, 4)


def test_another_backend_gives_the_same():
    layer = fusedrnn.torch.GRU(3, 4, 2, dtype=torch.float64)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    y = layer(x)
    grads = gradients(layer, y)
    try:
        fusedrnn.set_backend("reference")
        z = layer(x)
        same(y, z)
        fusedrnn.set_backend(None)
        same(grads, gradients(layer, z))  # a tape goes back to the backend that wrote it
    finally:
        fusedrnn.set_backend(None)


def test_double_backward_of_the_short_way():
    for kind, shape in (("LSTM", (5, 2, 3)), ("GRU", (5, 3)), ("LSTMCell", (2, 3)), ("RNNCell", (3,))):
        for options in ({}, {"batch_first": True}) if kind in LAYERS else ({},):
            theirs, ours = pair(kind, 3, 4, **options, dtype=torch.float64)
            x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
            found = []
            for module in (theirs, ours):
                first = torch.autograd.grad(
                    sum(t.sin().sum() for t in flat(module(x))), [x, *module.parameters()], create_graph=True
                )
                second = torch.autograd.grad(sum(g.sin().sum() for g in first), [x, *module.parameters()])
                found.append((first, second))
            same(*found)


def test_nothing_is_computed_that_nobody_asked_for():
    layer = fusedrnn.torch.LSTM(3, 4)
    for p in layer.parameters():
        p.requires_grad_(False)
    assert layer(torch.randn(5, 2, 3))[0].grad_fn is None
    layer.bias_hh_l0.requires_grad_()
    layer(torch.randn(5, 2, 3))[0].sum().backward()
    assert layer.bias_hh_l0.grad is not None and layer.weight_hh_l0.grad is None


# In training loops.


@pytest.mark.parametrize("k1, k2", [(5, 5), (5, 12), (6, 2), (30, 30)])
@pytest.mark.parametrize("kind", LAYERS)
def test_tbptt(kind, k1, k2):
    layer = getattr(fusedrnn.torch, kind)(2, 3, dtype=torch.float64)
    x = torch.randn(23, 2, 2, dtype=torch.float64)
    lengths = torch.tensor([23, 11])
    ys, updates, expected_start = [], [], 0
    for chunk in fusedrnn.torch.tbptt.chunks(layer, x, k1=k1, k2=k2, lengths=lengths):
        assert chunk.start == expected_start
        expected_start = chunk.stop
        ys.append(chunk.y.detach())
        layer.zero_grad()
        chunk.y.sin().sum().backward()
        alone = copy.deepcopy(layer)
        alone.zero_grad()
        with torch.no_grad():
            state = alone(x[: chunk.window], lengths=lengths.clamp(max=chunk.window))[1] if chunk.window else None
        rows = (lengths - chunk.window).clamp(0, chunk.stop - chunk.window)
        y = alone(x[chunk.window : chunk.stop], state, lengths=rows)[0]
        y[chunk.start - chunk.window :].sin().sum().backward()
        same([p.grad for p in layer.parameters()], [p.grad for p in alone.parameters()])
        if chunk.update:
            updates.append(chunk.stop)
        assert chunk.update == (chunk.stop % k1 == 0 or chunk.stop == 23)
        if chunk.start >= k2 > k1:
            assert chunk.stop - chunk.window >= min(k2, chunk.stop)
    same(torch.cat(ys), layer(x, lengths=lengths)[0])
    assert updates == [*range(k1, 23, k1), 23]


def test_tbptt_errors():
    with pytest.raises(ValueError, match="k1 is 0"):
        fusedrnn.torch.tbptt.chunks(fusedrnn.torch.GRU(2, 3), torch.randn(5, 2, 2), k1=0)
    with pytest.raises(ValueError, match="bidirectional"):
        fusedrnn.torch.tbptt.chunks(fusedrnn.torch.GRU(2, 3, bidirectional=True), torch.randn(5, 2, 2), k1=2)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
def test_clipping_is_torchs(norm_type):
    layer = fusedrnn.torch.LSTM(3, 4)
    layer(torch.randn(5, 2, 3))[0].sum().backward()
    other = copy.deepcopy(layer)
    for p, q in zip(layer.parameters(), other.parameters(), strict=True):
        q.grad = p.grad.clone()
    norm = fusedrnn.torch.clip.clip_grad_norm_(layer.parameters(), 0.5, norm_type)
    same(norm, nn.utils.clip_grad_norm_(other.parameters(), 0.5, norm_type))
    same([p.grad for p in layer.parameters()], [p.grad for p in other.parameters()])
    fusedrnn.torch.clip.clip_grad_value_(layer.parameters(), 1e-3)
    nn.utils.clip_grad_value_(other.parameters(), 1e-3)
    same([p.grad for p in layer.parameters()], [p.grad for p in other.parameters()])
    layer.weight_hh_l0.grad[0, 0] = math.inf
    with pytest.raises(RuntimeError, match="expected a finite number"):
        fusedrnn.torch.clip.clip_grad_norm_(layer.parameters(), 0.5, norm_type, error_if_nonfinite=True)


def test_learns():
    torch.manual_seed(0)
    layer, out = fusedrnn.torch.LSTM(1, 16), nn.Linear(16, 1)
    optimizer = torch.optim.Adam([*layer.parameters(), *out.parameters()], 0.02)
    errors = []
    for _ in range(60):
        x = torch.randn(12, 16, 1)
        error = (out(layer(x)[0]) - x.cumsum(0)).square().mean()
        errors.append(error.item())
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    assert sum(errors[-5:]) < 0.3 * sum(errors[:5])


@pytest.mark.parametrize("name", ["", ".functional", ".modules", ".replace", ".tbptt", ".clip", ".exits"])
def test_examples_in_docstrings(name):
    importlib.import_module("fusedrnn.torch" + name)
    module = sys.modules["fusedrnn.torch" + name]  # not the function `replace`
    result = doctest.testmod(module, extraglobs={"fusedrnn": fusedrnn, "torch": torch})
    assert result.attempted > 0 and result.failed == 0


# What a call is.


def test_every_setting_survives_the_way_through_text():
    """Whatever setting a `How` gets must be among the words that operators take, or it is lost there."""
    odd = {"cell": "gru", "want": "0110", "clip_cell": 1 / 3, "clip_grad": 7.25}
    for field in dataclasses.fields(How):
        other = odd.get(field.name, {bool: not field.default, int: 7}.get(type(field.default)))
        how = How(cell="lstm").but(**{field.name: other})
        assert how != How(cell="lstm") and read(how.text) == how


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("cell", composite._STEPS)
def test_a_tape_is_as_long_as_the_extension_says(cell, recompute):
    native = pytest.importorskip("fusedrnn._core", reason="the extension is not built")
    for T, B, H, L, D in ((1, 1, 1, 1, 1), (7, 3, 5, 2, 2), (17, 33, 8, 1, 2), (300, 2, 3, 3, 1)):
        how = How(cell=cell, layers=L, directions=D, recompute=recompute, tape=True)
        problem = Problem(cell, T, 1, B, H, H, L, D, recompute=recompute)
        there, ours = native.tape_elements(problem), tape.length(how, T, B, H) - 1  # one for the backend's number
        assert there == ours or (recompute and there < ours < 1.2 * there)


def test_functions_show_their_options():
    for function in (fusedrnn.torch.lstm, fusedrnn.torch.gru, fusedrnn.torch.rnn):
        shown = inspect.signature(function).parameters
        own, theirs = set(shown), set(inspect.signature(getattr(fusedrnn, function.__name__)).parameters)
        assert {"num_layers", "lengths", "dropout"} < own <= theirs | {"training"}
        assert ("clip_cell" in own) == (function is fusedrnn.torch.lstm)
        assert shown["reset_to"].default == "zero" and shown["clip_grad"].annotation == float | None
        wrong = "numlayers" if function is fusedrnn.torch.lstm else "clip_cell"
        with pytest.raises(TypeError, match=rf"^{function.__name__}\(\) got an unexpected keyword argument '{wrong}'"):
            function(torch.ones(2, 1, 1), None, [torch.ones(4, 1)] * 4, **{wrong: 1})
