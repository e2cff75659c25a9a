# SPDX-License-Identifier: Apache-2.0
"""Generation: every backend against a loop written here, and against the distribution that was asked for."""

from __future__ import annotations

import doctest
import functools
import math
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest

import fusedrnn
import shapes
from fusedrnn import backends, generation, sampling
from fusedrnn.cells import CELLS

DEEP = [
    ("LSTM", {"num_layers": 3, "clip_cell": 0.3}),
    ("GRU", {"num_layers": 2, "reset_after": False}),
]
LAYERS: list[tuple[str, dict[str, Any]]] = [
    *((shapes.LAYERS[cell.op].__name__, cell.options) for cell in CELLS.values()),
    *DEEP,
    ("LSTM", {"coupled": True, "bias": False}),
    ("LiGRU", {"num_layers": 2}),
    ("MinGRU", {"num_layers": 2}),
]
SEED = 2**63 + 5


def new(name: str, options: dict[str, Any], V: int = 11, H: int = 19, dtype: Any = np.float64) -> Any:
    rng = np.random.default_rng(3)
    layer = getattr(fusedrnn, name)(V, H, seed=0, dtype=dtype, **options).eval()
    for array in layer.parameters.values():
        array *= 3  # so that what was read matters
    return layer, rng.standard_normal((V, H)).astype(dtype), rng.standard_normal(V).astype(dtype)


def constant(logits: Any, rows: int, dtype: Any = np.float64) -> Any:
    """What `generate` needs to draw from these logits at every step: layer, head_weight, head_bias, prompt."""
    V = len(logits)
    layer = fusedrnn.RNN(V, 2, seed=0, dtype=dtype)
    return layer, np.zeros((V, 2), dtype), np.array(logits, dtype), np.zeros((1, rows), int)


def uniform(seed: int, step: int, row: int) -> float:
    """Philox4x32-10 on Python's integers."""
    c, k = [step & 0xFFFFFFFF, step >> 32, row, 1], [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return ((c[0] >> 5) * 2**26 + (c[1] >> 6)) / 2**53


def left(
    logits: list[float],
    seen: set[int],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
) -> dict[int, float]:
    """The probability of every token that can be drawn, by the definitions: sorted, in Python's floats."""
    scores = list(logits)
    for v in seen:
        scores[v] = scores[v] / repetition_penalty if scores[v] > 0 else scores[v] * repetition_penalty
    ranks = sorted((v for v in range(len(scores)) if scores[v] > -math.inf), key=lambda v: (-scores[v], v))
    ranks = ranks[: 1 if temperature == 0 else top_k]
    weights = {v: math.exp((scores[v] - scores[ranks[0]]) / (temperature or 1)) for v in ranks}
    total, mass, kept = sum(weights.values()), 0.0, []
    for v in ranks:
        kept.append(v)
        mass += weights[v]
        if mass >= top_p * total and top_p < 1:
            break
    return {v: weights[v] / mass for v in sorted(kept)}


def pick(probabilities: dict[int, float], u: float) -> int:
    """The place of u, looked for from the left."""
    reached = 0.0
    for v, p in probabilities.items():
        reached += p
        if reached > u:
            return v
    return v


def by_hand(
    layer: Any, head: Any, bias: Any, prompt: Any, steps: int, seed: int, stop: Any = (), first: int = 0, **options: Any
) -> Any:
    """Tokens, lengths, log-probabilities of the model and of what was drawn from, and the texts, prompt included.

    Each row alone: the whole text so far is read again for every token.
    """
    B = prompt.shape[1]
    tokens, of_model, drawn = np.zeros((steps, B), int), np.zeros((steps, B)), np.zeros((steps, B))
    lengths, texts = [], []
    for b in range(B):
        text = prompt[:, b : b + 1]
        for step in range(steps):
            logits = (layer(text)[0][-1, 0] @ head.T + bias).astype(np.float64)
            probabilities = left(logits.tolist(), set(text.ravel().tolist()), **options)
            token = pick(probabilities, uniform(seed, step, first + b))
            tokens[step:, b] = token
            drawn[step, b] = math.log(probabilities[token])
            of_model[step, b] = logits[token] - np.logaddexp.reduce(logits)
            text = np.concatenate([text, [[token]]])
            if token in stop:
                break
        texts.append(text)
        lengths.append(len(text) - len(prompt))
    return tokens, np.array(lengths), {"model": of_model, "drawn": drawn}, texts


@pytest.mark.parametrize(("name", "options"), LAYERS)
@pytest.mark.parametrize("B", [1, 5])
def test_as_by_hand(backend, name, options, B):
    layer, head, bias = new(name, options)
    prompt = np.random.default_rng(0).integers(0, 11, (3, B))
    want = by_hand(layer, head, bias, prompt, 12, seed=SEED)[0]
    got, state = fusedrnn.generate(layer, head, bias, prompt, 12, seed=SEED, return_state=True)
    np.testing.assert_array_equal(got, want)
    # what comes after n tokens is the same as in one piece
    _, after = layer(np.concatenate([prompt, got[:-1]]))
    for a, b in zip(np.atleast_1d(state), np.atleast_1d(after), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


@pytest.mark.parametrize(("name", "options"), DEEP)
def test_other_ways_in(backend, name, options):
    layer, head, bias = new(name, options, H=37)
    prompt = np.array([1, 4, 2], np.uint8)
    given: dict[str, Any] = {"seed": 4, "repetition_penalty": 1.1}
    want = fusedrnn.generate(layer, head, bias, prompt[:, None].astype(int), 9, **given)
    for way in (prompt, [1, 4, 2], prompt.astype(np.uint64), prompt[::-1].copy()[::-1]):
        np.testing.assert_array_equal(fusedrnn.generate(layer, head, bias, way, 9, **given), want[:, 0])
    plain = fusedrnn.generate(layer, head, bias, prompt, 9, seed=4)
    _, state = layer(prompt[:2])
    got = fusedrnn.generate(layer, head, bias, prompt[2:], 9, seed=4, state=state)
    np.testing.assert_array_equal(got, plain)
    strided = np.asfortranarray(head)
    np.testing.assert_array_equal(fusedrnn.generate(layer, strided, bias[::-1][::-1], prompt, 9, seed=4), plain)
    # any part of the results, of one row or of none
    everything: dict[str, Any] = {"return_lengths": True, "return_log_probs": "model", "return_state": True}
    tokens, length, log_probs, after = fusedrnn.generate(layer, head, bias, prompt, 9, seed=4, **everything)
    np.testing.assert_array_equal(tokens, plain)
    assert length == 9 and length.shape == () and log_probs.shape == (9,) and log_probs.dtype == np.float64
    assert np.shape(after) == np.shape(state)
    tokens, length, log_probs, after = fusedrnn.generate(layer, head, None, prompt, 0, **everything)
    assert tokens.shape == log_probs.shape == (0,) and length == 0
    for a, b in zip(np.atleast_1d(after), np.atleast_1d(state), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)
    nobody = fusedrnn.generate(layer, head, None, np.zeros((2, 0), int), 5, stop=3, **everything)
    assert nobody[0].shape == nobody[2].shape == (5, 0) and nobody[1].shape == (0,)


def test_embedding(backend):
    rng = np.random.default_rng(1)
    layer = fusedrnn.GRU(6, 12, 2, seed=0, dtype=np.float64).eval()
    embedding, head = rng.standard_normal((9, 6)), rng.standard_normal((9, 12))
    prompt = np.array([[3, 1], [2, 8]])
    got = fusedrnn.generate(layer, head, None, prompt, 8, embedding=embedding, seed=1)
    want = by_hand(lambda text: layer(embedding[text]), head, 0.0, prompt, 8, seed=1)[0]
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("temperature", [0.0, 1.3])
@pytest.mark.parametrize("repetition_penalty", [1.0, 1.7, 0.5])
@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_every_option_with_every_other(backend, dtype, temperature, repetition_penalty, top_k, top_p):
    """Rows that end at different steps, or never; the texts, their lengths, log-probabilities and states."""
    layer, head, bias = new("LSTM", {"num_layers": 2}, H=9, dtype=dtype)
    options = {"temperature": temperature, "repetition_penalty": repetition_penalty, "top_k": top_k, "top_p": top_p}
    for T0, stop in ((1, ()), (4, (5,)), (2, (7, 2, 0))):
        prompt = np.random.default_rng(T0).integers(0, 11, (T0, 3))
        want, lengths, log_probs, texts = by_hand(layer, head, bias, prompt, 7, SEED, stop, **options)
        for kind in ("model", "drawn"):
            got = fusedrnn.generate(
                layer, head, bias, prompt, 7, seed=SEED, stop=list(stop), **options,
                return_lengths=True, return_log_probs=kind, return_state=True,
            )  # fmt: skip
            message = f"prompt of {T0}, stop={stop}, {kind}"
            np.testing.assert_array_equal(got[0], want, message)
            np.testing.assert_array_equal(got[1], lengths, message)
            atol = 1e-11 if dtype == np.float64 else 1e-5
            np.testing.assert_allclose(got[2], log_probs[kind], atol=atol, err_msg=message)
        for b, text in enumerate(texts):
            _, state = layer(text[:-1, 0])
            for whole, of_row in zip(got[3], state, strict=True):
                np.testing.assert_allclose(whole[:, b], of_row, atol=atol, err_msg=message)


def test_texts_do_not_depend_on_the_number_of_threads(kernels):
    """The same bits, with rows that end on the way."""
    layer, head, bias = new("LSTM", {"num_layers": 2}, V=50, H=64, dtype=np.float32)
    prompt = np.random.default_rng(0).integers(0, 50, (3, 13))
    options: dict[str, Any] = {"repetition_penalty": 1.4, "top_k": 20, "top_p": 0.9, "stop": [1, 2, 3], "seed": 7}
    options |= {"return_lengths": True, "return_log_probs": "drawn", "return_state": True}
    before, found = fusedrnn.get_num_threads(), []
    try:
        for threads in (1, 3, 2):
            fusedrnn.set_num_threads(threads)
            found.append(fusedrnn.generate(layer, head, bias, prompt, 60, **options))
    finally:
        fusedrnn.set_num_threads(before)
    lengths = found[0][1]
    assert (lengths < 16).any() and ((lengths > 17) & (lengths < 60)).any()
    for other in found[1:]:
        for a, b in zip((*found[0][:3], *found[0][3]), (*other[:3], *other[3]), strict=True):
            np.testing.assert_array_equal(a, b)


def text_of_many_rows(layer: Any, head: np.ndarray, bias: np.ndarray) -> Any:
    return fusedrnn.generate(layer, head, bias, np.zeros((1, 33), int), 40, seed=7)


@functools.cache
def text_of_the_judge() -> Any:
    layer, head, bias = new("LSTM", {"num_layers": 2}, V=50, H=64, dtype=np.float32)
    layer.backend = "reference"
    return text_of_many_rows(layer, head, bias)


def test_same_text_everywhere(kernels):
    """Float32, long, many rows: any number of threads, and the readable loop."""
    model = new("LSTM", {"num_layers": 2}, V=50, H=64, dtype=np.float32)
    before, texts = fusedrnn.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            fusedrnn.set_num_threads(threads)
            texts.append(text_of_many_rows(*model))
    finally:
        fusedrnn.set_num_threads(before)
    np.testing.assert_array_equal(texts[0], texts[1])
    np.testing.assert_array_equal(texts[0], texts[2])
    agree = text_of_the_judge() == texts[0]
    assert agree.mean() > 0.95  # a row may part where a draw is within rounding of a border


def many_logits() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    flat = rng.standard_normal(1003) * 1e-3
    masked = np.where(rng.random(1003) < 0.97, -np.inf, rng.standard_normal(1003))
    few = rng.integers(0, 4, 1003).astype(float)  # most are equal to many others
    return {"flat": flat, "steep": rng.standard_normal(1003) * 8, "masked": masked, "few": few, "equal": 0 * flat}


@pytest.mark.parametrize("kind", many_logits())
@pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=["float64", "float32"])
def test_filters_of_many_tokens(backend, kind, dtype):
    """Where selections are partial: the same tokens and probabilities as by sorting."""
    logits = many_logits()[kind].astype(dtype)
    for top_k, top_p in [(None, 0.9), (None, 1e-9), (None, 0.02), (1, 1.0), (40, 1.0), (700, 1.0), (1002, 0.999999),
                         (40, 0.5), (333, 0.9), (1003, 0.3), (2**40, 1.0)]:  # fmt: skip
        options = {"top_k": top_k, "top_p": top_p, "temperature": 0.7}
        probabilities = left(logits.astype(float).tolist(), set(), **options)
        keep: dict[str, Any] = {"return_log_probs": "drawn"}
        given = constant(logits, 3, dtype)
        tokens, log_probs = fusedrnn.generate(*given, 4, seed=SEED, **options, **keep)
        for step, row in np.ndindex(4, 3):
            token = pick(probabilities, uniform(SEED, step, row))
            assert tokens[step, row] == token, (top_k, top_p)
            assert abs(log_probs[step, row] - math.log(probabilities[token])) < 1e-10, (top_k, top_p)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"temperature": 0}, {1}),
        ({"top_k": 1}, {1}),
        ({"top_k": 3}, {1, 2, 4}),
        ({"top_k": 2, "temperature": 1e-300}, {1, 2}),
        ({"top_p": 1e-300}, {1}),
        ({"top_p": 0.5}, {1, 2}),  # exactly half
        ({"top_p": np.nextafter(0.5, 1)}, {1, 2, 4}),
        ({"top_k": 3, "top_p": 0.5}, {1, 2}),  # half of what top_k has left is between one and two
        ({"repetition_penalty": 2.0, "temperature": 0}, {1}),  # 0 / 2 and 0 * 2
    ],
    ids=str,
)
def test_of_equal_logits_the_earlier_are_the_larger(backend, options, kept):
    given = constant([-np.inf, 0, 0, -np.inf, 0, 0], 40)
    assert set(fusedrnn.generate(*given, 4, **options).ravel().tolist()) == kept


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 3, "temperature": 2.0},
        {"top_p": 0.8},
        {"top_k": 4, "top_p": 0.9, "repetition_penalty": 1.5},
    ],
    ids=str,
)
def test_frequencies_are_probabilities(backend, options):
    """A layer that always gives the same logits: the first tokens' frequencies are what is asked for."""
    logits = [0.0, 1.0, -1.0, 0.5, 0.9]
    want = left(logits, {0}, **options)
    drawn = np.concatenate(
        [fusedrnn.generate(*constant(logits, 400), 1, seed=seed, **options)[0] for seed in range(10)]
    )
    seen = np.bincount(drawn, minlength=5) / drawn.size
    for v in range(5):
        p = want.get(v, 0.0)
        assert abs(seen[v] - p) <= 4.5 * (p * (1 - p) / drawn.size) ** 0.5, (v, p)


@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"top_k": 1}, {"top_p": 0.1}, {"top_k": 9}], ids=str)
def test_a_vocabulary_of_one(backend, options):
    tokens, log_probs = fusedrnn.generate(*constant([-3.0], 2), 3, return_log_probs="drawn", **options)
    assert not tokens.any() and not log_probs.any()


def test_any_way_to_name_stops(backend):
    given = constant([0.0, 0.1, 0.2, 0.3], 9)
    want = fusedrnn.generate(*given, 6, stop=[1, 3])
    for stop in ((3, 1), {1, 3}, np.array([1, 3], np.uint8), [np.int64(1), 3, 3], frozenset((1, 3))):
        np.testing.assert_array_equal(fusedrnn.generate(*given, 6, stop=stop), want)
    np.testing.assert_array_equal(fusedrnn.generate(*given, 6, stop=[]), fusedrnn.generate(*given, 6))


def test_steps_are_drawn_independently(backend):
    drawn = fusedrnn.generate(*constant([0.0, 0.0], 2000), 2)
    assert abs((drawn[0] == drawn[1]).mean() - 0.5) < 4.5 * 0.5 / 2000**0.5
    assert abs((drawn[0, 1:] == drawn[0, :-1]).mean() - 0.5) < 4.5 * 0.5 / 2000**0.5


def test_a_call_ends_when_all_rows_have(backend):
    """A hundred thousand steps, of which some ten are made."""
    begun = time.monotonic()
    text, lengths = fusedrnn.generate(*constant([0.0, 0, 0], 5), 100_000, stop=(2, 1), return_lengths=True)
    assert time.monotonic() - begun < 2
    assert lengths.max() < 50
    for b, n in enumerate(lengths):
        assert (text[: n - 1, b] == 0).all() and text[n - 1, b] in (1, 2) and (text[n:, b] == text[n - 1, b]).all()


def test_a_next_call_goes_on(backend):
    layer, head, bias = new("GRU", {"num_layers": 2})
    prompt = np.random.default_rng(0).integers(0, 11, (2, 4))
    whole = fusedrnn.generate(layer, head, bias, prompt, 25, temperature=0, stop=[])
    first, state = fusedrnn.generate(layer, head, bias, prompt, 9, temperature=0, return_state=True)
    rest = fusedrnn.generate(layer, head, bias, first[-1:], 16, temperature=0, state=state)
    np.testing.assert_array_equal(np.concatenate([first, rest]), whole)


# ---- logits from which nothing can be drawn ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bias", "what"),
    [
        ([0.0, np.nan, 1.0], "hold NaN; expected numbers below inf"),
        ([np.nan, 0.0, np.inf], "hold NaN"),
        ([np.nan, np.nan, np.nan], "hold NaN"),
        ([0.0, -np.inf, np.inf], "hold inf"),
        ([-np.inf, -np.inf, -np.inf], "are all -inf; .*One token at least must be left"),
    ],
    ids=str,
)
@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"top_k": 1}, {"top_p": 0.5}], ids=str)
@pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=["float64", "float32"])
def test_logits_without_a_softmax_are_refused(backend, bias, what, options, dtype):
    with pytest.raises(ValueError, match=f"generate: the logits of row 0 at step 0 {what}"):
        fusedrnn.generate(*constant(bias, 3, dtype), 4, **options)


def test_a_penalty_that_makes_inf_is_refused(backend):
    with pytest.raises(ValueError, match="the logits of row 0 at step 0 hold inf"):
        fusedrnn.generate(*constant([1e300, 0.0], 1), 4, repetition_penalty=1e-10)
    assert (fusedrnn.generate(*constant([-1e300, 0.0], 5), 4, repetition_penalty=1e10) == 1).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("seed", "options"), [(8, {}), (2, {"repetition_penalty": 1.2, "top_k": 9, "top_p": 0.98})], ids=str
)
def test_the_first_bad_step_and_row_are_named(backend, value, seed, options):
    """Token 5's vector is bad: the row that is the first to read it. Rows that have ended read nothing."""
    layer, head, bias = new("RNN", {"nonlinearity": "relu"}, H=7)
    for array in layer.parameters.values():
        array /= 4
    bias[5] -= 1.5
    prompt = np.random.default_rng(2).integers(0, 5, (2, 4))
    good = by_hand(layer, head, bias, prompt, 40, seed, **options)[0]
    step, row = np.argwhere(good == 5)[0]
    assert 16 < step < 38
    layer.parameters["weight_ih_l0"][:, 5] = value
    with pytest.raises(ValueError, match=rf"the logits of row {row} at step {step + 1} hold"):
        fusedrnn.generate(layer, head, bias, prompt, 40, seed=seed, **options)
    text = fusedrnn.generate(layer, head, bias, prompt, step + 1, seed=seed, **options)
    np.testing.assert_array_equal(text, good[: step + 1])
    stopped = fusedrnn.generate(layer, head, bias, prompt, 40, seed=seed, stop=5, **options)
    assert (stopped[step:, row] == 5).all()


def test_masked_tokens_are_never_drawn(backend):
    layer, head, bias = new("LSTM", {})
    bias[[0, 3, 4, 10]] = -np.inf
    prompt = np.random.default_rng(0).integers(0, 11, (2, 9))
    for options in ({}, {"temperature": 0}, {"top_k": 9}, {"top_p": 0.999}, {"repetition_penalty": 1.5}):
        tokens, log_probs = fusedrnn.generate(
            layer, head, bias, prompt, 30, seed=1, return_log_probs="model", **options
        )
        assert not np.isin(tokens, [0, 3, 4, 10]).any() and np.isfinite(log_probs).all()


# ---- ensembles -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", ["", "head", "embedding", "prompt", "state", "head embedding prompt state"])
def test_each_of_an_ensemble_writes_its_own_text(backend, own):
    rng = np.random.default_rng(4)
    E, B, V, width, H = 3, 2, 9, 4, 6
    layer = fusedrnn.LSTM(width, H, 2, seed=0, dtype=np.float64).eval()
    sets = [{name: a + rng.standard_normal(a.shape) for name, a in layer.parameters.items()} for _ in range(E)]
    layer.parameters = {name: np.stack([one[name] for one in sets]) for name in sets[0]}
    layer.parameters["bias_hh_l1"] = sets[0]["bias_hh_l1"]  # shared

    def array(name: str, *shape: int, axis: int = 0) -> Any:
        full = rng.standard_normal((E, *shape))
        return (np.moveaxis(full, 0, axis), full) if name in own.split() else (full[0], full[[0] * E])

    (head, heads), (bias, biases) = array("head", V, H), array("head", V)
    embedding, embeddings = array("embedding", V, width)
    prompt, prompts = array("prompt", 3, B, axis=1)
    prompt, prompts = np.abs(prompt).astype(int), np.abs(prompts).astype(int)
    (h, hs), (c, cs) = array("state", 2, B, H, axis=1), array("state", 2, B, H, axis=1)
    keep: dict[str, Any] = {"return_lengths": True, "return_log_probs": "drawn", "return_state": True}
    options: dict[str, Any] = {"embedding": embedding, "seed": SEED, "stop": 4, "repetition_penalty": 1.3, "top_k": 6}
    tokens, lengths, log_probs, state = fusedrnn.generate(layer, head, bias, prompt, 8, state=(h, c), **options, **keep)
    assert tokens.shape == log_probs.shape == (8, E, B) and lengths.shape == (E, B) and state[0].shape == (2, E, B, H)
    for e in range(E):
        one = fusedrnn.LSTM(width, H, 2, dtype=np.float64).eval()
        one.parameters = sets[e] | {"bias_hh_l1": sets[0]["bias_hh_l1"]}
        start = hs[e], cs[e]
        want, n, logs, texts = by_hand(
            lambda text, one=one, e=e, start=start: one(
                embeddings[e][text], tuple(a[:, [row_of(text, prompts[e])]] for a in start)
            ),
            heads[e], biases[e], prompts[e], 8, SEED, (4,), e * B, repetition_penalty=1.3, top_k=6,
        )  # fmt: skip
        np.testing.assert_array_equal(tokens[:, e], want)
        np.testing.assert_array_equal(lengths[e], n)
        np.testing.assert_allclose(log_probs[:, e], logs["drawn"], atol=1e-10)
        for b, text in enumerate(texts):
            _, after = one(embeddings[e][text[:-1]], tuple(a[:, b : b + 1] for a in start))
            np.testing.assert_allclose(state[1][:, e, b], after[1][:, 0], atol=1e-10)


def row_of(text: np.ndarray, prompts: np.ndarray) -> int:
    """Which row of the prompts a text of one row began with."""
    return int((prompts == text[: len(prompts)]).all(0).argmax())


def test_one_row_of_an_ensemble(backend):
    layer, head, bias = new("GRU", {})
    alone = fusedrnn.generate(layer, head, bias, [1, 2], 6, seed=3, return_lengths=True, return_state=True)
    layer.parameters = {name: np.stack([a, 2 * a]) for name, a in layer.parameters.items()}
    both = fusedrnn.generate(layer, head, bias, [1, 2], 6, seed=3, return_lengths=True, return_state=True)
    assert [a.shape for a in both] == [(6, 2), (2,), (1, 2, 19)]
    np.testing.assert_array_equal(both[0][:, 0], alone[0])
    np.testing.assert_allclose(both[2][:, 0], alone[2], atol=1e-12)
    bias = np.stack([bias, np.where(np.arange(11) == 4, np.nan, bias)])
    with pytest.raises(ValueError, match="the logits of row 0 of set 1 at step 0 hold NaN"):
        fusedrnn.generate(layer, head, bias, [1, 2], 6)


# ---- errors --------------------------------------------------------------------------------------------------------

SETS = fusedrnn.LSTM(11, 19, dtype=np.float64)
SETS.parameters = {name: np.stack([a, a]) for name, a in SETS.parameters.items()}
NOBODY = fusedrnn.LSTM(11, 19, dtype=np.float64)
NOBODY.parameters = {name: np.stack([a])[:0] for name, a in NOBODY.parameters.items()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": -1}, r"steps is -1; expected an integer >= 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": np.nan}, "temperature is nan"),
        ({"temperature": np.inf}, "temperature is inf"),
        ({"temperature": True}, "temperature is True; expected a number"),
        ({"temperature": None}, "temperature is None; expected a number"),
        ({"top_k": 0}, "top_k is 0; expected an integer in"),
        ({"top_k": -3}, "top_k is -3"),
        ({"top_k": True}, "top_k is True"),
        ({"top_k": 2.0}, "top_k is 2.0"),
        ({"top_k": "4"}, "top_k is '4'"),
        ({"top_p": 0}, "top_p is 0.0; expected 0 < top_p <= 1"),
        ({"top_p": -0.1}, "top_p is -0.1"),
        ({"top_p": 1.0001}, "top_p is 1.0001"),
        ({"top_p": np.nan}, "top_p is nan"),
        ({"top_p": True}, "top_p is True"),
        ({"top_p": None}, "top_p is None"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0.0; expected a finite number > 0"),
        ({"repetition_penalty": -1.5}, "repetition_penalty is -1.5"),
        ({"repetition_penalty": np.inf}, "repetition_penalty is inf"),
        ({"repetition_penalty": np.nan}, "repetition_penalty is nan"),
        ({"repetition_penalty": "1"}, "repetition_penalty is '1'"),
        ({"stop": 11}, r"stop is 11; expected an integer in \[0, 10\]"),
        ({"stop": -1}, r"stop is -1"),
        ({"stop": True}, r"stop is True"),
        ({"stop": "ab"}, r"stop is 'ab'"),
        ({"stop": 1.0}, r"stop is 1.0"),
        ({"stop": [1, 11]}, r"stop\[1\] is 11; expected an integer in \[0, 10\]"),
        ({"stop": (False,)}, r"stop\[0\] is False"),
        ({"stop": np.array([0, -1])}, r"stop\[1\] is -1"),
        ({"stop": np.zeros((1, 1), int)}, r"stop is array"),
        ({"return_lengths": 2}, "return_lengths is 2; expected True or False"),
        ({"return_log_probs": True}, 'return_log_probs is True; expected "model" or "drawn"'),
        ({"return_log_probs": "raw"}, "return_log_probs is 'raw'"),
        ({"head_weight": np.zeros((11, 3))}, r"head_weight has shape \(11, 3\); expected \(V, 19\)"),
        ({"head_weight": np.zeros((2, 11, 19))}, r"head_weight has shape \(2, 11, 19\); expected \(V, 19\)"),
        ({"head_weight": np.zeros((0, 19))}, r"head_weight has shape \(0, 19\)"),
        ({"head_weight": None}, "head_weight is None"),
        ({"head_bias": np.zeros(3)}, r"head_bias has shape \(3,\); expected \(11,\) = \(V,\)"),
        ({"head_bias": np.zeros((2, 11))}, r"head_bias has shape \(2, 11\)"),
        ({"head_weight": np.zeros((7, 19)), "head_bias": None}, r"layer has input_size=11; expected 7"),
        ({"embedding": np.zeros((11, 3))}, r"embedding has shape \(11, 3\); expected \(11, 11\) = \(V, I\)"),
        ({"prompt": np.zeros((0, 2), int)}, "prompt is a NumPy int64 array of shape"),
        ({"prompt": np.zeros((3, 2))}, "prompt is a NumPy float64 array"),
        ({"prompt": np.zeros((3, 2, 2), int)}, r"prompt is a NumPy int64 array of shape \(3, 2, 2\)"),
        ({"prompt": [[1, 2], [3]]}, "prompt is a list that is no array"),
        ({"prompt": np.array([1, 11])}, r"prompt has token 11 \(at \[1\]\); expected 0 <= token < 11"),
        ({"prompt": np.array([[1, 2], [1, -1], [2, 2]])}, r"prompt has token -1 \(at \[1, 1\]\)"),
        ({"layer": NOBODY}, "layer has parameters of E = 0 weight sets; expected E >= 1"),
        ({"layer": None}, "layer is None; expected a layer of fusedrnn"),
        ({"layer": fusedrnn.LSTM(11, 19, bidirectional=True, dtype=np.float64)}, "layer is bidirectional"),
        ({"layer": fusedrnn.LSTM(11, 19, context_size=2, dtype=np.float64)}, "layer has context_size=2"),
        ({"state": (np.zeros((1, 3, 19)), np.zeros((1, 3, 19)))}, "state"),
        ({"layer": SETS, "head_weight": np.zeros((3, 11, 19))}, r"expected \(V, 19\) = .* or with E = 2 in front"),
        ({"layer": SETS, "head_bias": np.zeros((3, 11))}, r"expected \(11,\) = \(V,\), or \(2, 11\) = \(E, V\)"),
        ({"layer": SETS, "embedding": np.zeros((3, 11, 11))}, r"or \(2, 11, 11\) = \(E, V, I\)"),
        ({"layer": SETS, "prompt": np.zeros((2, 3, 2), int)}, r"prompt has shape \(2, 3, 2\); expected \(T0, 2, B\)"),
        ({"layer": SETS, "state": (np.zeros((1, 3, 2, 19)),) * 2}, "state"),
    ],
)
def test_errors(backend, changes, message):
    layer, head, bias = new("LSTM", {})
    given = {"layer": layer, "head_weight": head, "head_bias": bias, "prompt": np.zeros((2, 2), int), "steps": 3}
    with pytest.raises((ValueError, TypeError), match=message):
        fusedrnn.generate(**(given | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drawn": np.zeros((3, 2), np.int32)}, "drawn has dtype int32"),
        ({"drawn": np.zeros((3, 4), int)[:, ::2]}, "drawn must be C-contiguous"),
        ({"drawn": np.zeros(3, int)}, r"drawn has shape \(3,\)"),
        ({"drawn": None}, "drawn is None"),
        ({"log_probs": np.zeros((2, 2))}, r"log_probs has shape \(2, 2\)"),
        ({"log_probs": np.zeros((3, 2), np.float32)}, "log_probs has dtype float32"),
        ({"ended": None}, "ended is None"),
        ({"ended": np.zeros((1, 3), bool)}, "ended has shape"),
        ({"seen": np.zeros((2, 10), bool)}, r"seen has shape \(2, 10\); expected \(2, 11\)"),
        ({"stop": np.array([11])}, "stop has 11; expected 0 <= token < I = 11"),
        ({"stop": [1]}, "stop is a list"),
        ({"head": None}, "head is None"),
        ({"first_row": -1}, "first_row is -1"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "0 < top_p <= 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty > 0"),
    ],
)
def test_the_extension_checks_for_itself(changes, message):
    native: Any = backends.load("native")
    W, R, head, h = np.zeros((1, 19, 11)), np.zeros((1, 19, 19)), np.zeros((11, 19)), np.zeros((1, 1, 2, 19))
    problem = backends.Problem("rnn_tanh", 1, 1, 2, 11, 19)
    given = backends.Arguments(np.zeros((1, 1, 2), int), h, None, [(W, R, None, None)])
    g = backends.Generation(head, None, np.zeros((3, 2), int), np.zeros((1, 2), bool), np.array([], int))
    assert native.generate(problem, given, backends.Results(hn=h.copy()), g) is None
    for name, value in changes.items():
        setattr(g, name, value)
    with pytest.raises((ValueError, TypeError), match=message):
        native.generate(problem, given, backends.Results(hn=h.copy()), g)


@pytest.mark.parametrize("module", [generation, sampling], ids=lambda module: module.__name__)
def test_examples_in_texts(module):
    result = doctest.testmod(module, extraglobs={"fusedrnn": fusedrnn, "np": np})
    assert result.attempted and not result.failed


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


def test_borders_of_top_k_and_forms_of_stop(backend):
    layer, head, bias = new("GRU", {})
    prompt = np.array([1, 2])
    plain = fusedrnn.generate(layer, head, bias, prompt, 20, seed=3)
    np.testing.assert_array_equal(fusedrnn.generate(layer, head, bias, prompt, 20, seed=3, top_k=2**62), plain)
    expected = fusedrnn.generate(layer, head, bias, prompt, 20, seed=3, stop=[0, 1])
    for stop in ((0, 1), {0, 1}, range(2), np.array([0, 1])):
        np.testing.assert_array_equal(fusedrnn.generate(layer, head, bias, prompt, 20, seed=3, stop=stop), expected)
    one = fusedrnn.generate(layer, head, bias, prompt, 20, seed=3, stop=1)
    np.testing.assert_array_equal(fusedrnn.generate(layer, head, bias, prompt, 20, seed=3, stop=np.array(1)), one)
