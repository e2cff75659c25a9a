# SPDX-License-Identifier: Apache-2.0
"""CTC on a CUDA device, without a GPU: the kernels run on the CPU twin (cuda_twin.py), the reference is NumPy's."""

import numpy as np
import pytest

import close
import fusedrnn
from cuda_twin import Chip, host
from fusedrnn import config

# T, B, C, S, blank; the last one has more states than a block has threads
SIZES = [(1, 1, 2, 1, 0), (6, 3, 4, 2, 3), (20, 2, 5, 7, 1), (5, 4, 3, 2, 0), (3, 2, 7, 70, 4)]


def case(T, B, C, S, blank, dtype, seed, steep):
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((T, B, C)) * steep
    log_probs = logits - np.log(np.exp(logits - logits.max(2, keepdims=True)).sum(2, keepdims=True))
    log_probs = (log_probs - logits.max(2, keepdims=True)).astype(dtype)
    targets = rng.integers(0, C - 1, (B, S))
    targets += targets >= blank
    lengths, counts = rng.integers(0, T + 1, B), rng.integers(0, S + 1, B)
    lengths[0], counts[0] = T, S
    return (log_probs, targets, lengths, counts), rng.standard_normal(B).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equals_the_reference(twin, monkeypatch, dtype):
    monkeypatch.setattr(config, "backend", "reference")
    for seed, size in enumerate(SIZES):
        twin._extension.schedule(seed)
        for zero_infinity in (False, True):
            (log_probs, *rest), dloss = case(*size, dtype, seed, 1 + 99 * (seed % 2))
            options = {"blank": size[4], "zero_infinity": zero_infinity}
            exact = log_probs.astype(np.float64), *rest
            expected = fusedrnn.ctc_loss_backward(*exact, dloss.astype(np.float64), **options)
            wide = np.full((size[1], size[0] * 2, size[2] * 2), np.nan, dtype)
            wide[:, ::2, ::-2] = log_probs.transpose(1, 0, 2)
            there = Chip(wide[:, ::2, ::-2].transpose(1, 0, 2))
            got = host(fusedrnn.ctc_loss_backward(there, *rest, dloss, **options))
            alone = host(fusedrnn.ctc_loss(there, *rest, **options))
            np.testing.assert_array_equal(alone, got[0])
            for name, a, b in zip(("loss", "dlog_probs"), got, expected, strict=True):
                close.check(f"{size}: {name}", a, b, 3e-6 if dtype == np.float32 else 1e-12)


def test_ways_to_pass_it(twin, monkeypatch):
    monkeypatch.setattr(config, "backend", "reference")
    (log_probs, targets, lengths, counts), dloss = case(6, 3, 4, 2, 0, np.float64, 1, 1)
    expected = fusedrnn.ctc_loss_backward(log_probs, targets, lengths, counts, dloss)
    got = fusedrnn.ctc_loss_backward(Chip(log_probs), targets, lengths, counts, Chip(dloss))
    assert all(isinstance(a, Chip) for a in got)
    close.check("dlog_probs", host(got[1]), expected[1], 1e-12)
    one = fusedrnn.ctc_loss_backward(Chip(log_probs[:, 0]), targets[0], lengths[0], counts[0], dloss[0])
    assert one[0].shape == () and one[1].shape == (6, 4)
    close.check("one row", host(one[1]), expected[1][:, 0], 1e-12)
    empty = fusedrnn.ctc_loss_backward(Chip(np.zeros((4, 0, 3))), np.zeros((0, 2), int), [], [])
    assert empty[0].shape == (0,) and empty[1].shape == (4, 0, 3)


def test_errors(twin):
    given = Chip(np.zeros((4, 2, 3))), [[1], [2]], [4, 4], [1, 1]
    with pytest.raises(TypeError, match="float16"):
        fusedrnn.ctc_loss(Chip(np.zeros((4, 2, 3), np.float16)), *given[1:])
    with pytest.raises(ValueError, match="targets has 3"):
        fusedrnn.ctc_loss(given[0], [[1], [3]], *given[2:])
    with pytest.raises(ValueError, match="dloss is float32"):
        fusedrnn.ctc_loss_backward(*given, Chip(np.zeros(2, np.float32)))
    with pytest.raises(TypeError, match="dloss is on a CUDA device"):
        fusedrnn.ctc_loss_backward(np.zeros((4, 2, 3)), *given[1:], Chip(np.zeros(2)))
    twin._extension.pretend(broken="the queue is broken")
    with pytest.raises(RuntimeError, match="the queue is broken"):
        fusedrnn.ctc_loss(*given)
