# SPDX-License-Identifier: Apache-2.0
"""torch.nn's proj_size."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", minversion="2.8")

from torch import nn  # noqa: E402
from torch.nn.utils.rnn import pack_padded_sequence  # noqa: E402
from torch.utils import _pytree as pytree  # noqa: E402

import fusedrnn.torch  # noqa: E402
from fusedrnn.torch import how  # noqa: E402

I, H = 3, 5
STACK = {"num_layers": 2, "bidirectional": True}


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
    text = how.How("lstm", 2, 1, tape=True).text()
    old, _, last = text.rpartition(" ")
    assert last == "0"
    assert how.read(old) == how.read(text)
    assert how.read(how.How("lstm", proj_size=7).text()).proj_size == 7


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
