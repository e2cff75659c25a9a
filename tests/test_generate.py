# SPDX-License-Identifier: Apache-2.0
"""Generation: every backend against a loop written here, and against the distribution that was asked for."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest

import fusedrnn
from fusedrnn import generation

LAYERS: list[tuple[str, dict[str, Any]]] = [
    ("LSTM", {}),
    ("LSTM", {"num_layers": 3, "clip_cell": 0.3}),
    ("LSTM", {"coupled": True, "bias": False}),
    ("GRU", {"num_layers": 2}),
    ("GRU", {"num_layers": 2, "reset_after": False}),
    ("RNN", {"nonlinearity": "relu"}),
    ("RNN", {}),
]


def new(name: str, options: dict[str, Any], V: int = 11, H: int = 19, dtype: Any = np.float64) -> Any:
    rng = np.random.default_rng(3)
    layer = getattr(fusedrnn, name)(V, H, seed=0, dtype=dtype, **options)
    for array in layer.parameters.values():
        array *= 3  # so that what was read matters
    return layer, rng.standard_normal((V, H)).astype(dtype), rng.standard_normal(V).astype(dtype)


def by_hand(layer: Any, head: Any, bias: Any, prompt: Any, steps: int, seed: int, temperature: float = 1.0) -> Any:
    """The whole text so far is read again for every token; the draw looks for its place from the left."""
    text = np.array(prompt)
    for step in range(steps):
        logits = (layer(text)[0][-1] @ head.T + bias).astype(np.float64)
        row = []
        for b, line in enumerate(logits):
            p = np.exp((line - line.max()) / temperature)
            u = uniform(seed, step, b) * p.sum()
            row.append(next(v for v in range(len(p)) if p[: v + 1].sum() > u))
        text = np.concatenate([text, [row]])
    return text[len(prompt) :]


def uniform(seed: int, step: int, row: int) -> float:
    """Philox4x32-10 on Python's integers."""
    c, k = [step & 0xFFFFFFFF, step >> 32, row, 1], [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return ((c[0] >> 5) * 2**26 + (c[1] >> 6)) / 2**53


@pytest.mark.parametrize(("name", "options"), LAYERS)
@pytest.mark.parametrize("B", [1, 5])
def test_as_by_hand(backend, name, options, B):
    layer, head, bias = new(name, options)
    prompt = np.random.default_rng(0).integers(0, 11, (3, B))
    want = by_hand(layer, head, bias, prompt, 12, seed=2**63 + 5)
    got, state = fusedrnn.generate(layer, head, bias, prompt, 12, seed=2**63 + 5, return_state=True)
    np.testing.assert_array_equal(got, want)
    # what comes after n tokens is the same as in one piece
    _, after = layer(np.concatenate([prompt, got[:-1]]))
    for a, b in zip(np.atleast_1d(state), np.atleast_1d(after), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


@pytest.mark.parametrize(("name", "options"), [LAYERS[1], LAYERS[4]])
def test_other_ways_in(backend, name, options):
    layer, head, bias = new(name, options, H=37)
    prompt = np.array([1, 4, 2], np.uint8)
    want = fusedrnn.generate(layer, head, bias, prompt[:, None].astype(int), 9, seed=4)
    np.testing.assert_array_equal(fusedrnn.generate(layer, head, bias, prompt, 9, seed=4), want[:, 0])
    np.testing.assert_array_equal(fusedrnn.generate(layer, head, bias, [1, 4, 2], 9, seed=4), want[:, 0])
    _, state = layer(prompt[:2])
    got = fusedrnn.generate(layer, head, bias, prompt[2:], 9, seed=4, state=state)
    np.testing.assert_array_equal(got, want[:, 0])
    strided = np.asfortranarray(head)
    np.testing.assert_array_equal(fusedrnn.generate(layer, strided, bias[::-1][::-1], prompt, 9, seed=4), want[:, 0])
    assert fusedrnn.generate(layer, head, None, prompt, 0).shape == (0,)


def test_embedding(backend):
    rng = np.random.default_rng(1)
    layer = fusedrnn.GRU(6, 12, 2, seed=0, dtype=np.float64)
    embedding, head = rng.standard_normal((9, 6)), rng.standard_normal((9, 12))
    prompt = np.array([[3, 1], [2, 8]])
    got = fusedrnn.generate(layer, head, None, prompt, 8, embedding=embedding, seed=1)
    text = prompt
    for step in range(8):
        logits = layer(embedding[text])[0][-1] @ head.T
        row = [generation.draw(line, 1, step, b) for b, line in enumerate(logits)]
        text = np.concatenate([text, [row]])
    np.testing.assert_array_equal(got, text[2:])


def test_greedy_top_k_and_stop(backend):
    layer, head, bias = new("LSTM", {})
    prompt = np.random.default_rng(0).integers(0, 11, (2, 6))
    greedy = fusedrnn.generate(layer, head, bias, prompt, 20, temperature=0)
    text = prompt
    for _ in range(20):
        text = np.concatenate([text, (layer(text)[0][-1:] @ head.T + bias).argmax(-1)])
    np.testing.assert_array_equal(greedy, text[2:])
    np.testing.assert_array_equal(fusedrnn.generate(layer, head, bias, prompt, 20, top_k=1, seed=9), greedy)
    few = fusedrnn.generate(layer, head, bias, prompt, 20, top_k=3, temperature=2.0, seed=1)
    text = np.concatenate([prompt, few])
    for step in range(20):
        best = np.argsort(-(layer(text[: 2 + step])[0][-1] @ head.T + bias), -1)[:, :3]
        assert all(few[step, b] in best[b] for b in range(6))
    free = fusedrnn.generate(layer, head, bias, prompt, 20, seed=1)
    stopped = fusedrnn.generate(layer, head, bias, prompt, 20, seed=1, stop=int(free[3, 0]))
    for b in range(6):
        ends = np.flatnonzero(free[:, b] == free[3, 0])
        n = ends[0] + 1 if len(ends) else 20
        np.testing.assert_array_equal(stopped[:n, b], free[:n, b])
        assert (stopped[n:, b] == free[3, 0]).all()


def test_same_text_everywhere(kernels):
    """Float32, long, many rows: any number of threads, and the readable loop."""
    layer, head, bias = new("LSTM", {"num_layers": 2}, V=50, H=64, dtype=np.float32)
    prompt = np.zeros((1, 33), int)
    before, texts = fusedrnn.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            fusedrnn.set_num_threads(threads)
            texts.append(fusedrnn.generate(layer, head, bias, prompt, 40, seed=7))
    finally:
        fusedrnn.set_num_threads(before)
    np.testing.assert_array_equal(texts[0], texts[1])
    np.testing.assert_array_equal(texts[0], texts[2])
    layer.backend = "reference"
    agree = fusedrnn.generate(layer, head, bias, prompt, 40, seed=7) == texts[0]
    assert agree.mean() > 0.95  # a row may part where a draw is within rounding of a border


def test_distribution(backend):
    """A layer that always gives the same logits: the tokens' frequencies are their softmax."""
    layer = fusedrnn.RNN(4, 2, seed=0)
    bias = np.array([0.0, 1.0, -1.0, 0.5], np.float32)
    drawn = fusedrnn.generate(layer, np.zeros((4, 2), np.float32), bias, np.zeros((1, 200), int), 20, temperature=0.7)
    want = np.exp(bias / 0.7) / np.exp(bias / 0.7).sum()
    seen = np.bincount(drawn.ravel(), minlength=4) / drawn.size
    assert np.abs(seen - want).max() < 4 * (0.25 / drawn.size) ** 0.5
    assert not (drawn[0] == drawn[1]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": -1}, r"steps is -1; expected an integer >= 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": np.nan}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"stop": 11}, r"stop is 11; expected an integer in \[0, 10\]"),
        ({"head_weight": np.zeros((11, 3))}, r"head_weight has shape \(11, 3\); expected \(V, 19\)"),
        ({"head_bias": np.zeros(3)}, r"head_bias has shape \(3,\)"),
        ({"head_weight": np.zeros((7, 19)), "head_bias": None}, r"layer has input_size=11; expected 7"),
        ({"embedding": np.zeros((11, 3))}, r"embedding has shape \(11, 3\); expected \(11, 11\)"),
        ({"prompt": np.zeros((0, 2), int)}, "prompt is a NumPy int64 array of shape"),
        ({"prompt": np.zeros((3, 2))}, "prompt is a NumPy float64 array"),
        ({"prompt": np.array([1, 11])}, r"prompt has tokens 11..11 at its end"),
        ({"prompt": np.array([-1, 1])}, r"x has token -1"),
        ({"layer": fusedrnn.LSTM(11, 19, bidirectional=True, dtype=np.float64)}, "layer is bidirectional"),
        ({"layer": fusedrnn.LSTM(11, 19, context_size=2, dtype=np.float64)}, "layer has context_size=2"),
        ({"state": (np.zeros((1, 3, 19)), np.zeros((1, 3, 19)))}, "state"),
    ],
)
def test_errors(backend, changes, message):
    layer, head, bias = new("LSTM", {})
    given = {"layer": layer, "head_weight": head, "head_bias": bias, "prompt": np.zeros((2, 2), int), "steps": 3}
    with pytest.raises((ValueError, TypeError), match=message):
        fusedrnn.generate(**(given | changes))


LONG = """
import numpy as np, fusedrnn, sys
layer = fusedrnn.LSTM(50, 64, seed=0, backend=sys.argv[1])
head = np.zeros((50, 64), np.float32)
fusedrnn.generate(layer, head, None, np.zeros((1, 4), int), 10)
print("begins", flush=True)
try:
    fusedrnn.generate(layer, head, None, np.zeros((1, 4), int), 2_000_000)
except KeyboardInterrupt:
    print("interrupted", fusedrnn.generate(layer, head, None, np.zeros((1, 4), int), 3).shape)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for a child")
def test_ctrl_c_is_heard(backend):
    """A text that takes a minute or more is left within two seconds, and the next call works."""
    command = [sys.executable, "-c", LONG, backend]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "begins\n"
        time.sleep(0.3)
        assert child.poll() is None
        begun = time.monotonic()
        child.send_signal(signal.SIGINT)
        rest, _ = child.communicate(timeout=60)
        seconds = time.monotonic() - begun
    assert rest == "interrupted (3, 4)\n" and child.returncode == 0
    assert seconds < 2, f"Ctrl-C was heard after {seconds:.1f} s"
