# SPDX-License-Identifier: Apache-2.0
"""Derivatives and transforms of fusedrnn.torch against the composite definition, in every order and nesting.

That gradcheck passes shows little here: wrong numbers come out of second and third orders, of jvp of jvp, of linearize.
So all sequences of transforms up to three are run, on one function of one flat vector from which x, state and weights
are cut.
"""

import itertools

import pytest

torch = pytest.importorskip("torch", minversion="2.8")

from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap  # noqa: E402

import fusedrnn.torch  # noqa: E402
from fusedrnn.torch import composite, fast, operators  # noqa: E402
from fusedrnn.torch.how import How  # noqa: E402
from fusedrnn.torch.kernels import Sizes, argument_shapes  # noqa: E402

CELLS = ("lstm", "gru", "gru_reset_before", "rnn_tanh", "rnn_relu")


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def flat_function(
    road, cell, T=2, B=1, I=1, H=1, layers=1, directions=1, lengths=None, reset=None, cells=True, **options
):
    """A function of one vector, and a vector to begin with."""
    how = How(cell=cell, layers=layers, directions=directions, cells=cells, tape=road is operators.call, **options)
    shapes = argument_shapes(how, Sizes(T, 1, B, I, H))
    sizes = [torch.Size(shape).numel() for shape in shapes]

    def function(vector):
        p = [part.reshape(shape) for part, shape in zip(vector.split(sizes), shapes, strict=True)]
        return torch.cat([result.reshape(-1) for result in road(how, lengths, reset, p)])

    generator = torch.Generator().manual_seed(3)
    return function, torch.randn(sum(sizes), generator=generator, dtype=torch.float64) * 0.7


def constant(n, seed):
    return torch.sin(torch.arange(1, n + 1, dtype=torch.float64) * (1 + 0.37 * seed))  # vmap refuses random numbers


def rev(f):
    def g(v):
        out, pull = vjp(f, v)
        return pull(constant(out.numel(), 5).reshape(out.shape))[0]

    return g


def fwd(f):
    return lambda v: jvp(f, (v,), (constant(v.numel(), 6).reshape(v.shape),))[1]


def many(f):
    return lambda v: vmap(f)(torch.stack([v, v * 0.5, -v])).sum(0)


def straight(f):
    return lambda v: linearize(f, v)[1](constant(v.numel(), 7))


def columns(f):
    return lambda v: jacfwd(f)(v).sum(-1)


def rows(f):
    return lambda v: jacrev(f)(v).sum(0)


TRANSFORMS = (rev, fwd, many, columns, rows)
SEQUENCES = [s for n in (1, 2, 3) for s in itertools.product(TRANSFORMS, repeat=n)]


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS)
def test_every_sequence_of_transforms(cell):
    # the LSTM through all of them; the others through those without the two that are made of rev, fwd and many
    wanted = [s for s in SEQUENCES if cell == "lstm" or not {columns, rows} & set(s)]
    ours, v = flat_function(operators.call, cell)
    truth, _ = flat_function(composite.forward, cell)
    for sequence in wanted:
        f, g = ours, truth
        for transform in sequence:
            f, g = transform(f), transform(g)
        try:
            close(f(v), g(v))
        except AssertionError as error:
            names = " of ".join(t.__name__ for t in reversed(sequence))
            raise AssertionError(f"{cell}: {names}: {error}") from None


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_linearize(cell):
    ours, v = flat_function(operators.call, cell, T=3, B=2, I=2, H=2)
    truth, _ = flat_function(composite.forward, cell, T=3, B=2, I=2, H=2)
    for around in ((straight,), (straight, rev), (rev, straight)):  # torch refuses linearize with jvp
        f, g = ours, truth
        for transform in around:
            f, g = transform(f), transform(g)
        close(f(v), g(v))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("layers, directions", [(1, 2), (2, 1), (2, 2)])
def test_second_order_of_a_stack(cell, layers, directions):
    sizes = {"T": 3, "B": 2, "I": 2, "H": 3, "layers": layers, "directions": directions}
    lengths = torch.tensor([[3, 1]])
    reset = torch.tensor([[[0, 0]], [[1, 0]], [[0, 1]]], dtype=torch.uint8)
    ours, v = flat_function(operators.call, cell, **sizes, lengths=lengths, reset=reset, reset_to_initial=True)
    truth, _ = flat_function(composite.forward, cell, **sizes, lengths=lengths, reset=reset, reset_to_initial=True)
    close(ours(v), truth(v))
    for first, second in itertools.product((rev, fwd), repeat=2):
        close(second(first(ours))(v), second(first(truth))(v))


def test_clip_cell_to_second_order():
    ours, v = flat_function(operators.call, "lstm", T=4, B=2, H=3, clip_cell=0.3)
    truth, _ = flat_function(composite.forward, "lstm", T=4, B=2, H=3, clip_cell=0.3)
    close(ours(v), truth(v))
    for first, second in itertools.product((rev, fwd), repeat=2):
        close(second(first(ours))(v), second(first(truth))(v))


def test_recompute_changes_nothing():
    ours, v = flat_function(operators.call, "lstm", T=20, B=2, H=3, recompute=True)
    truth, _ = flat_function(composite.forward, "lstm", T=20, B=2, H=3)
    close(rev(ours)(v), rev(truth)(v))
    close(rev(rev(ours))(v), rev(rev(truth))(v))


def test_clip_grad_refuses_a_second_reverse_derivative():
    ours, v = flat_function(operators.call, "lstm", clip_grad=0.1)
    rev(ours)(v)
    with pytest.raises(RuntimeError, match="clip_grad"):
        rev(rev(ours))(v)


@pytest.mark.parametrize("cell", CELLS)
def test_gradcheck(cell):
    f, v = flat_function(operators.call, cell, T=3, B=2, I=2, H=2)
    v.requires_grad_()
    options = {"check_batched_grad": True, "check_forward_ad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(f, (v,), **options)
    assert torch.autograd.gradgradcheck(f, (v,), check_batched_grad=True, check_fwd_over_rev=True)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_is_grads_batched(cell):
    f, v = flat_function(operators.call, cell, T=3, B=2, I=2, H=2)
    v.requires_grad_()
    y = f(v)
    rows = torch.autograd.grad(y, v, torch.eye(y.numel(), dtype=v.dtype), is_grads_batched=True)[0]
    close(rows, jacrev(flat_function(composite.forward, cell, T=3, B=2, I=2, H=2)[0])(v.detach()))


# Modules.


def make(kind, *sizes, **options):
    torch.manual_seed(0)
    return getattr(fusedrnn.torch, kind)(*sizes, dtype=torch.float64, **options)


def call(layer):
    return lambda params, x: torch.func.functional_call(layer, params, (x,))[0]


def parameters(layer):
    return {name: p.detach() for name, p in layer.named_parameters()}


@pytest.fixture
def calls(monkeypatch):
    """Counts kernel calls by name."""
    counts = {name: 0 for name in ("forward", "backward", "jvp", "hvp")}
    for name in counts:
        kernel = getattr(operators.kernels, name)

        def counted(*arguments, name=name, kernel=kernel, **options):
            counts[name] += 1
            return kernel(*arguments, **options)

        monkeypatch.setattr(operators.kernels, name, counted)
    native = fast._native

    class ShortWay:
        @staticmethod
        def torch_forward(*arguments):
            counts["forward"] += 1
            return native.torch_forward(*arguments)

        @staticmethod
        def torch_backward(*arguments):
            counts["backward"] += 1
            return native.torch_backward(*arguments)

    monkeypatch.setattr(fast, "_native", ShortWay)
    return counts


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_an_ensemble_is_one_call(kind, calls):
    layers = [getattr(fusedrnn.torch, kind)(3, 4, 2, dtype=torch.float64) for _ in range(5)]
    params, buffers = torch.func.stack_module_state(layers)
    x = constant(5 * 2 * 3, 1).reshape(5, 2, 3)

    def model(params, buffers, x):
        return torch.func.functional_call(layers[0], (params, buffers), (x,))[0]

    y = vmap(model, (0, 0, None))(params, buffers, x)
    assert calls["forward"] == 1
    close(y, torch.stack([layer(x)[0] for layer in layers]))
    calls.update(dict.fromkeys(calls, 0))
    found = vmap(grad(lambda p, b, x: model(p, b, x).sin().sum()), (0, 0, None))(params, buffers, x)
    assert calls == {"forward": 1, "backward": 1, "jvp": 0, "hvp": 0}
    for n, layer in enumerate(layers):
        layer(x)[0].sin().sum().backward()
        for name, p in layer.named_parameters():
            close(found[name][n], p.grad)


@pytest.mark.parametrize("what", ["", "state", "lengths", "batch_first", "single", "x", "x alone", "x last", "cell"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_models_trained_side_by_side(kind, what, calls):
    """One vmap, gradients taken outside of it: one call of each kernel, and the gradient of a gradient is right."""
    options = {"batch_first": what == "batch_first", "num_layers": 2, "bidirectional": True}
    name, options = (f"{kind}Cell", {}) if what == "cell" else (kind, options)
    layers = [getattr(fusedrnn.torch, name)(3, 5, dtype=torch.float64, **options) for _ in range(4)]
    names = [key for key, _ in layers[0].named_parameters()]
    stacked = [torch.stack([p.detach() for p in each]) for each in zip(*(m.parameters() for m in layers), strict=True)]
    stacked = [stacked[n][0] if what == "x alone" else stacked[n] for n in range(len(names))]
    shape = {"batch_first": (2, 6, 3), "single": (6, 3), "cell": (2, 3)}.get(what, (6, 2, 3))
    shape = {"x": (4, *shape), "x alone": (4, *shape), "x last": (*shape, 4)}.get(what, shape)
    axis = {"x": 0, "x alone": 0, "x last": 3}.get(what)
    weight_axis = None if what == "x alone" else 0
    leaves = [constant(torch.Size(shape).numel(), 2).reshape(shape), *stacked]
    if what == "state":
        leaves += [constant(4 * 2 * 5, n).reshape(4, 2, 5) for n in range(2 if kind == "LSTM" else 1)]

    def run(x, *rest):
        weights, state = dict(zip(names, rest[: len(names)], strict=True)), rest[len(names) :]
        hx = (state if len(state) > 1 else state[0]) if state else None
        given = {"lengths": torch.tensor([6, 2])} if what == "lengths" else {}
        y, state = (
            torch.func.functional_call(layers[0], weights, (x, hx), given)[:2]
            if what != "cell"
            else (torch.func.functional_call(layers[0], weights, (x, hx)), ())
        )
        return torch.cat([t.reshape(-1) for part in (y, state) for t in (part if isinstance(part, tuple) else (part,))])

    def loop(x, *rest):
        return torch.stack(
            [
                run(
                    x if axis is None else x.select(axis, n),
                    *(w if weight_axis is None else w[n] for w in rest[: len(names)]),
                    *rest[len(names) :],
                )
                for n in range(4)
            ]
        )

    many = vmap(run, (axis, *[weight_axis] * len(names), *[None] * (len(leaves) - 1 - len(names))))
    found = []
    for f in (many, loop):
        given = [leaf.clone().requires_grad_() for leaf in leaves]
        calls.update(dict.fromkeys(calls, 0))
        y = f(*given)
        first = torch.autograd.grad((y * constant(y.numel(), 3).reshape(y.shape)).sum(), given)
        if f is many:
            assert calls == {"forward": 1, "backward": 1, "jvp": 0, "hvp": 0}
        second = torch.autograd.grad(f(*given).square().sum(), given, create_graph=True)
        found.append((y, first, second, torch.autograd.grad(sum(g.sin().sum() for g in second), given)))
    close(*found)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_gradients_per_sample_are_one_call(kind, calls):
    layer = make(kind, 3, 4, bidirectional=True)
    x = constant(6 * 5 * 3, 1).reshape(6, 5, 3)
    f = call(layer)
    per_sample = vmap(grad(lambda p, x: f(p, x).sin().sum()), (None, 0))(parameters(layer), x)
    assert calls == {"forward": 1, "backward": 1, "jvp": 0, "hvp": 0}
    for n in range(6):
        alone = grad(lambda p, x: f(p, x).sin().sum())(parameters(layer), x[n])
        for name in alone:
            close(per_sample[name][n], alone[name])


def test_an_ensemble_with_gradients_per_sample_is_one_call(calls):
    layers = [make("LSTM", 3, 4) for _ in range(3)]
    for n, layer in enumerate(layers):
        for p in layer.parameters():
            p.data += 0.1 * n
    params, _ = torch.func.stack_module_state(layers)
    x = constant(4 * 5 * 3, 1).reshape(4, 5, 3)
    f = call(layers[0])
    g = grad(lambda p, x: f(p, x).sin().sum())
    for both in (vmap(vmap(g, (None, 0)), (0, None)), lambda p, x: vmap(vmap(g, (0, None)), (None, 0), 1)(p, x)):
        calls.update(dict.fromkeys(calls, 0))
        found = both(params, x)
        assert calls == {"forward": 1, "backward": 1, "jvp": 0, "hvp": 0}
        for m, layer in enumerate(layers):
            for n in range(4):
                alone = g(parameters(layer), x[n])
                for name in alone:
                    close(found[name][m, n], alone[name])


def test_a_hessian_vector_product_is_one_pass(calls):
    layer = make("GRU", 3, 4)
    x = constant(5 * 2 * 3, 1).reshape(5, 2, 3)
    weights = list(layer.parameters())
    v = [constant(p.numel(), n).reshape(p.shape) for n, p in enumerate(weights)]

    def product(**options):
        first = torch.autograd.grad(layer(x)[0].square().sum(), weights, create_graph=True)
        return torch.autograd.grad(first, weights, v, **options)

    once = product()
    assert (calls["hvp"], calls["jvp"]) == (1, 0)
    close(once, product(create_graph=True))  # the same from the operators, one for each
    assert (calls["hvp"], calls["jvp"]) == (2, 1)


def test_hessian_of_a_module():
    layer = make("GRU", 1, 2)
    f = call(layer)
    x = constant(6, 1).reshape(3, 2, 1)
    h = hessian(lambda w: f({**parameters(layer), "weight_hh_l0": w}, x).square().sum())(layer.weight_hh_l0.detach())
    assert h.shape == (6, 2, 6, 2)
    close(h, h.permute(2, 3, 0, 1))


def test_vmap_over_lengths_and_reset():
    layer = make("LSTM", 2, 3)
    x = constant(4 * 5 * 2 * 2, 1).reshape(4, 5, 2, 2)
    lengths = torch.tensor([[5, 1], [0, 4], [3, 3], [2, 5]])
    reset = torch.rand(4, 5, 2, generator=torch.Generator().manual_seed(1)) < 0.3
    y = vmap(lambda x, n, r: layer(x, lengths=n, reset=r)[0])(x, lengths, reset)
    close(
        y,
        torch.stack([layer(*one, lengths=n, reset=r)[0] for one, n, r in zip(x[:, None], lengths, reset, strict=True)]),
    )


def test_only_wanted_gradients_are_computed(monkeypatch):
    wants = []
    kernel = operators.kernels.backward
    monkeypatch.setattr(operators.kernels, "backward", lambda how, *rest: wants.append(how.want) or kernel(how, *rest))
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    layer = make("LSTM", 3, 4)
    f = call(layer)
    grad(lambda x: f(parameters(layer), x).sum())(x)
    grad(lambda w: f({**parameters(layer), "weight_hh_l0": w}, x).sum())(layer.weight_hh_l0.detach())
    assert wants == ["1000000", "0000100"]


def test_backward_in_eval_mode():
    layer = make("LSTM", 3, 4).eval()
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    layer(x)[0].sum().backward()
    assert x.grad.abs().sum() > 0


def test_randomness_of_dropout_under_vmap():
    layer = make("LSTM", 3, 4, 2, dropout=0.5)
    x = torch.randn(5, 2, 3, dtype=torch.float64).expand(4, 5, 2, 3)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda x: layer(x)[0])(x)
    same = vmap(lambda x: layer(x)[0], randomness="same")(x)
    close(same, same[:1].expand_as(same))
    different = vmap(lambda x: layer(x)[0], randomness="different")(x)
    assert not torch.equal(different[0], different[1])
