# SPDX-License-Identifier: Apache-2.0
"""The PyTorch adapter's operations for CUDA tensors, on tensors of the host over the CPU twin of the device, and on
CUDA tensors where there is a GPU. (That torch calls them for CUDA tensors, no test without a GPU can show.)"""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

import cuda_twin  # noqa: E402
from fusedrnn.torch import cuda, kernels  # noqa: E402
from fusedrnn.torch.how import How  # noqa: E402

BUDGETS = {torch.float32: 3e-2, torch.float64: 1e-11, torch.bfloat16: 1e-1, torch.float16: 2e-2}  # float32: as TF32


def tensors(how: How, E: int, shared: bool, dtype: Any, T: int = 5, B: int = 3, I: int = 4, H: int = 9) -> Any:  # noqa: E741
    generator = torch.Generator().manual_seed(3)
    shapes = kernels.argument_shapes(how, kernels.Sizes(T, E, B, I, H))
    for n, axis in enumerate(how.argument_axes):
        if shared and n >= 1 + how.states:
            shapes[n] = (*shapes[n][:axis], 1, *shapes[n][axis + 1 :])
    p = [(torch.rand(s, generator=generator, dtype=torch.float64) - 0.5).to(dtype) for s in shapes]
    g = [torch.rand(s, generator=generator, dtype=torch.float64).to(dtype)
         for s in kernels.result_shapes(how, kernels.Sizes(T, E, B, I, H))]  # fmt: skip
    lengths = torch.tensor([[5, 0, 3]] * E)
    reset = torch.rand((T, 1, B), generator=generator) < 0.3
    return p, g, lengths, reset


def there(values: Any) -> list[Any]:
    """On the device: for the twin, the host."""
    return [t.to(cuda_twin.memory.device) for t in values]


CALLS = [
    (How(cell="lstm", tape=True, cells=True), 1, False),
    (How(cell="lstm", layers=2, directions=2, tape=True), 2, True),
    (How(cell="gru", layers=2, bias=False, reverse=True, reset_to_initial=True, tape=True), 1, False),
    (How(cell="gru_reset_before", tape=True), 2, False),
    (How(cell="rnn_tanh", directions=2, tape=True), 1, False),
    (How(cell="lstm", recompute=True, tape=True), 1, False),
]


@pytest.mark.parametrize("dtype", list(BUDGETS), ids=str)
@pytest.mark.parametrize("how, E, shared", CALLS, ids=lambda v: v.text if isinstance(v, How) else str(v))
def test_forward_and_backward(twin, how, E, shared, dtype):
    p, g, lengths, reset = tensors(how, E, shared, dtype)
    wide, wide_g = [t.double() for t in p], [t.double() for t in g]
    *got, tape = cuda.run("forward", how, *there([lengths, reset]), [there(p)])
    *expected, kept = kernels.forward(how, lengths, reset, wide)
    assert tape.shape[0] == E
    down = how.but(want="1" * how.arguments)
    for each in (False, True):
        down = down.but(each=each)
        grads = cuda.run("backward", down, *there([lengths, reset]), [there(p), (tape,), there(g)])
        wanted = kernels.backward(down, lengths, reset, wide, kept, wide_g)
        again = cuda.run("backward", down, *there([lengths, reset]), [there(p), (None,), there(g)])
        assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))
        got, expected = [*got, *grads], [*expected, *wanted]
    for n, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.dtype == dtype and a.shape == b.shape
        torch.testing.assert_close(
            a.cpu().double(), b, rtol=4 * BUDGETS[dtype], atol=4 * BUDGETS[dtype], msg=f"output {n}"
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_tangents(twin, dtype):
    """By kernels, or of 16-bit tensors by torch's own operators."""
    how = How(cell="gru", cells=True)
    p, g, lengths, reset = tensors(how, 1, False, dtype)
    along = [torch.ones_like(t) if n != 2 else None for n, t in enumerate(p)]
    t = [None, *(2 * a for a in g[1:])]

    def placed(group: list[Any]) -> list[Any]:
        return [None if a is None else there([a])[0] for a in group]

    def wide(group: list[Any]) -> list[Any]:
        return [None if a is None else a.double() for a in group]

    budget = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-2}[dtype]
    for name, groups in (("jvp", [p, along]), ("hvp", [p, along, g, t])):
        down = how.but(want="1" * how.arguments) if name == "hvp" else how
        got = cuda.run(name, down, *there([lengths, reset]), [placed(group) for group in groups])
        expected = getattr(kernels, name)(down, lengths, reset, *(wide(group) for group in groups))
        for a, b in zip(got, expected, strict=True):
            assert a.dtype == dtype
            torch.testing.assert_close(a.cpu().double(), b, rtol=budget, atol=budget)


def test_off_until_switched_on(twin):
    assert "use_cuda_kernels(True)" in cuda.why_not()
    cuda.use_cuda_kernels(True)
    try:
        assert cuda.why_not() == ""
    finally:
        cuda.use_cuda_kernels(False)
