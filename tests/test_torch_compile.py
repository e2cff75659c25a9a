# SPDX-License-Identifier: Apache-2.0
"""fusedrnn.torch under torch.compile and torch.export, and in several processes."""

import os
import subprocess
import sys
import textwrap

import pytest

torch = pytest.importorskip("torch", minversion="2.8")

from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap  # noqa: E402
from torch.utils import _pytree as pytree  # noqa: E402

import fusedrnn.torch  # noqa: E402


def make(kind, *sizes, **options):
    torch.manual_seed(0)
    return getattr(fusedrnn.torch, kind)(*sizes, dtype=torch.float64, **options)


def same(a, b):
    a, b = pytree.tree_leaves(a), pytree.tree_leaves(b)
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-10)


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()


class Counter:
    """A compiler backend that compiles to ATen and counts."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        from torch._dynamo.backends.debugging import aot_eager

        self.graphs += 1
        return aot_eager(graph, inputs)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_training_with_changing_sizes(kind):
    layer = make(kind, 3, 4, 2, bidirectional=True)
    counter = Counter()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    once = None
    for T, B in ((5, 2), (6, 3), (9, 4)):
        x = torch.randn(T, B, 3, dtype=torch.float64, requires_grad=True)
        y, z = compiled(x), layer(x)
        same(y, z)
        grads = [
            torch.autograd.grad(sum(t.sin().sum() for t in pytree.tree_leaves(o)), [x, *layer.parameters()])
            for o in (y, z)
        ]
        same(*grads)
        once = once or counter.graphs
        assert counter.graphs == once  # never compiled again


def test_the_default_compiler():
    layer = make("LSTM", 3, 4)
    compiled = torch.compile(lambda x: layer(x.sin())[0].relu(), fullgraph=True)
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    y, z = compiled(x), layer(x.sin())[0].relu()
    same(y, z)
    same(*(torch.autograd.grad(o.sum(), [x, *layer.parameters()]) for o in (y, z)))
    with torch.no_grad():
        same(compiled(x), z)


def test_keywords_dropout_and_cells():
    layer = make("GRU", 3, 4, 2)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    options = {"lengths": torch.tensor([3, 5]), "reset": torch.rand(5, 2) < 0.3, "return_cells": True}
    same(torch.compile(layer, fullgraph=True, backend="aot_eager")(x, **options), layer(x, **options))
    layer.dropout = 0.5
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)[0]
    y.sum().backward()
    for kind in ("LSTMCell", "GRUCell", "RNNCell"):
        cell = make(kind, 3, 4)
        same(torch.compile(cell, fullgraph=True, backend="aot_eager")(x[0]), cell(x[0]))


def test_packed_is_a_graph_break_but_right():
    layer = make("LSTM", 3, 4)

    def model(x, lengths):
        packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
        return layer(packed)[1][0]

    x, lengths = torch.randn(5, 3, 3, dtype=torch.float64), torch.tensor([3, 5, 1])
    same(torch.compile(model, backend="aot_eager")(x, lengths), model(x, lengths))


one = make("LSTM", 2, 3)
weights = {name: p.detach() for name, p in one.named_parameters()}


def run(x):
    return functional_call(one, weights, (x,))[0]


def loss(w, x):
    return functional_call(one, w, (x,))[0].sin().sum()


INSIDE = {
    "grad": lambda x: grad(loss)(weights, x),
    "jvp": lambda x: jvp(run, (x,), (x.sin(),))[1],
    "jacfwd": lambda x: jacfwd(run)(x),
    "jacrev": lambda x: jacrev(run)(x),
    "vmap of grad": lambda x: vmap(grad(loss), (None, 0))(weights, torch.stack([x, 2 * x])),
    "grad of vmap": lambda x: grad(lambda w: vmap(loss, (None, 0))(w, torch.stack([x, 2 * x])).sum())(weights),
    "hessian": lambda x: hessian(lambda x: run(x).sin().sum())(x[:2]),
    "grad of grad": lambda x: grad(lambda x: grad(lambda x: run(x).sin().sum())(x).sin().sum())(x),
    "jvp of grad": lambda x: jvp(grad(lambda x: run(x).sin().sum()), (x,), (x.cos(),))[1],
    "grad of jvp": lambda x: grad(lambda x: jvp(run, (x,), (x.sin(),))[1].sin().sum())(x),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", INSIDE)
def test_transforms_inside(name):
    function = INSIDE[name]
    x = torch.randn(3, 1, 2, dtype=torch.float64)
    same(torch.compile(function, fullgraph=True, backend="aot_eager")(x), function(x))


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict, tmp_path):
    layer = make("LSTM", 3, 4, 2)
    sizes = {0: torch.export.Dim("T", min=2, max=500), 1: torch.export.Dim("B", min=2, max=500)}
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    program = torch.export.export(layer, (x,), dynamic_shapes={"input": sizes}, strict=strict)
    torch.export.save(program, tmp_path / "program.pt2")
    longer = torch.randn(8, 3, 3, dtype=torch.float64, requires_grad=True)
    same(program.module()(longer), layer(longer))
    # an exported program can be differentiated and transformed like the module
    module = program.module()
    same(*(torch.autograd.grad(m(longer)[0].sin().sum(), longer) for m in (module, layer)))
    same(*(hessian(lambda x, m=m: m(x)[0].sin().sum())(x) for m in (module, layer)))
    torch.save((longer.detach(), layer(longer)[0].detach()), tmp_path / "truth.pt")
    code = """
        import sys, torch, fusedrnn.torch
        x, y = torch.load(sys.argv[1] + "/truth.pt")
        torch.testing.assert_close(torch.export.load(sys.argv[1] + "/program.pt2").module()(x)[0], y)
        print("fine")
    """
    call = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    result = subprocess.run(call, capture_output=True, text=True)
    assert result.stdout == "fine\n", result.stderr


def test_opcheck():
    from fusedrnn.torch.how import How
    from fusedrnn.torch.kernels import Sizes, argument_shapes

    how = How(cell="gru", tape=True)
    p = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in argument_shapes(how, Sizes(3, 1, 2, 2, 3))]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.fusedrnn.forward_1_4.default, (*p, None, None, how.text), test_utils=tests)


# Processes. Each test is a script, so that nothing of this process is in the way.


def script(code, tmp_path, **environment):
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(code))
    call = [sys.executable, str(path), str(tmp_path)]
    result = subprocess.run(call, capture_output=True, text=True, timeout=240, env=os.environ | environment)
    assert result.returncode == 0 and "fine" in result.stdout, result.stderr


@pytest.mark.slow
def test_distributed_data_parallel_is_one_process_with_the_joined_batch(tmp_path):
    script(
        """
        import sys, torch, torch.distributed as dist, torch.multiprocessing as mp
        import fusedrnn.torch

        def model():
            torch.manual_seed(0)
            return fusedrnn.torch.LSTM(3, 4, 2, dtype=torch.float64)

        def train(model, layer, x):
            optimizer = torch.optim.SGD(layer.parameters(), 0.1)
            for _ in range(3):
                optimizer.zero_grad()
                model(x)[0].square().mean().backward()
                optimizer.step()
            return layer.state_dict()

        def work(rank, x, folder):
            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
            layer = model()
            state = train(torch.nn.parallel.DistributedDataParallel(layer), layer, x[:, rank * 2 : rank * 2 + 2])
            if rank == 0:
                torch.save(state, folder + "/state.pt")
            dist.destroy_process_group()

        if __name__ == "__main__":
            x = torch.randn(5, 4, 3, dtype=torch.float64)
            mp.spawn(work, (x, sys.argv[1]), 2)
            layer = model()
            expected = train(layer, layer, x)
            for name, found in torch.load(sys.argv[1] + "/state.pt").items():
                torch.testing.assert_close(found, expected[name])
            print("fine")
        """,
        tmp_path,
        OMP_NUM_THREADS="1",
    )


@pytest.mark.slow
@pytest.mark.parametrize("way", ["fork", "spawn"])
def test_data_loader_workers(way, tmp_path):
    script(
        f"""
        import torch, fusedrnn.torch

        class Data(torch.utils.data.Dataset):
            def __init__(self):
                torch.manual_seed(0)
                self.layer = fusedrnn.torch.GRU(3, 4)

            def __len__(self):
                return 6

            def __getitem__(self, n):
                with torch.no_grad():
                    return self.layer(torch.full((5, 300, 3), float(n)))[0]

        if __name__ == "__main__":
            data = Data()
            expected = torch.stack([data[n] for n in range(6)])  # the kernels' threads are there before the fork
            loader = torch.utils.data.DataLoader(data, 2, num_workers=2, multiprocessing_context="{way}")
            torch.testing.assert_close(torch.cat(list(loader)), expected)
            print("fine")
        """,
        tmp_path,
    )
