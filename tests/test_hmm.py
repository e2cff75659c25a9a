# SPDX-License-Identifier: Apache-2.0
"""Hidden Markov models against hmmlearn, against the sum over all paths, and against finite differences."""

import doctest
import itertools
import math

import numpy as np
import pytest

import close
import fusedrnn
from fusedrnn import config, hmm

# T, B, N: one step, one state, primes, a register of 4, 8, 16 states and one more or less
SIZES = [(1, 1, 1), (1, 3, 2), (6, 1, 1), (11, 3, 3), (7, 2, 5), (13, 9, 8), (9, 2, 15), (12, 3, 17), (5, 10, 33)]


@pytest.fixture
def on(route):
    """Every call runs on the route's backend."""
    before = config.backend
    fusedrnn.set_backend(route.__name__.rpartition(".")[2])
    yield route
    config.backend = before


def log(x):
    with np.errstate(divide="ignore"):
        return np.log(x)


def model(T, B, N, dtype=np.float64, seed=0, zeros=0.0, steep=1.0):
    """scores, initial, transitions, lengths; `zeros` of the probabilities are 0, but one way from each state stays."""
    rng = np.random.default_rng(seed)
    transitions = rng.random((N, N)) * (rng.random((N, N)) >= zeros) + np.eye(N)
    initial = rng.random(N) * (rng.random(N) >= zeros) + (np.arange(N) == 0)
    scores = rng.standard_normal((T, B, N)) * steep - 3
    lengths = rng.integers(0, T + 1, B)
    lengths[0] = T
    logs = log(initial / initial.sum()), log(transitions / transitions.sum(1, keepdims=True))
    return scores.astype(dtype), *(a.astype(dtype) for a in logs), lengths


def brute(scores, initial, transitions):
    """Log-likelihood, expectations and best path of one row (T,N), path by path."""
    T, N = scores.shape
    total, states, first, pairs = 0.0, np.zeros((T, N)), np.zeros(N), np.zeros((N, N))
    best, weight = (), -math.inf
    for path in itertools.product(range(N), repeat=T):
        value = initial[path[0]] + sum(scores[t, s] for t, s in enumerate(path))
        value += sum(transitions[pair] for pair in itertools.pairwise(path))
        if value > weight:
            best, weight = path, value
        p = math.exp(value)
        total += p
        first[path[0]] += p
        for t, s in enumerate(path):
            states[t, s] += p
        for pair in itertools.pairwise(path):
            pairs[pair] += p
    return math.log(total), states / total, first / total, pairs / total, best, weight


@pytest.mark.parametrize("zeros", [0.0, 0.6])
@pytest.mark.parametrize("size", [(1, 3), (5, 1), (6, 3), (4, 5)])
def test_equals_the_sum_over_all_paths(on, size, zeros):
    scores, initial, transitions, _ = model(size[0], 1, size[1], zeros=zeros, seed=2)
    given = scores[:, 0], initial, transitions
    expected = brute(*given)
    assert float(hmm.likelihood(*given)) == pytest.approx(expected[0], rel=1e-13)
    for name, got, right in zip(("logp", "states", "first", "pairs"), hmm.posteriors(*given), expected, strict=False):
        close.check(name, got, right, 1e-13)
    path, weight = hmm.viterbi(*given)
    assert tuple(path) == expected[4]
    assert float(weight) == pytest.approx(expected[5], rel=1e-13)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("options", [{}, {"zeros": 0.7}, {"steep": 100.0}], ids=str)
def test_equals_the_reference(judged, dtype, options):
    before = config.backend
    try:
        for seed, size in enumerate(SIZES):
            scores, initial, transitions, lengths = model(*size, dtype=dtype, seed=seed, **options)
            weights = np.random.default_rng(seed).standard_normal(size[1]).astype(dtype)
            wide = np.full((size[1], size[0] * 2, size[2] * 3), np.nan, dtype)
            wide[:, ::2, ::-3] = scores.transpose(1, 0, 2)
            results = []
            for backend in (judged.__name__.rpartition(".")[2], "reference"):
                fusedrnn.set_backend(backend)
                kind = dtype if backend != "reference" else np.float64
                model64 = initial.astype(kind), transitions.astype(kind), lengths
                given = wide[:, ::2, ::-3].transpose(1, 0, 2).astype(kind, copy=False), *model64
                alone = hmm.likelihood(*given)
                posterior = hmm.posteriors(*given, weights.astype(kind))
                np.testing.assert_array_equal(alone, posterior[0])
                results.append((*posterior, *hmm.viterbi(*given)))
            names = ("log_likelihood", "states", "first", "pairs", "paths", "log_weight")
            budget = 1e-5 if dtype == np.float32 else 1e-12
            for name, got, expected in zip(names, *results, strict=True):
                close.check(f"{size}: {name}", got, expected, 0 if name == "paths" else budget)
    finally:
        config.backend = before


def test_equals_hmmlearn(on):
    hmmlearn = pytest.importorskip("hmmlearn.hmm")
    rng = np.random.default_rng(0)
    N, symbols, T = 4, 6, 50
    theirs = hmmlearn.CategoricalHMM(N, implementation="log")
    theirs.n_features = symbols
    theirs.startprob_ = rng.dirichlet(np.ones(N))
    theirs.transmat_ = rng.dirichlet(np.ones(N), N)
    theirs.emissionprob_ = rng.dirichlet(np.ones(symbols), N)
    x = rng.integers(0, symbols, (T, 3))
    lengths = [50, 17, 1]
    scores = np.log(theirs.emissionprob_.T)[x]
    given = scores, np.log(theirs.startprob_), np.log(theirs.transmat_), lengths
    logp, states, _, pairs = hmm.posteriors(*given)
    paths, weight = hmm.viterbi(*given)
    for b, n in enumerate(lengths):
        expected, gamma = theirs.score_samples(x[:n, b, None])
        assert logp[b] == pytest.approx(expected, rel=1e-12)
        close.check("states", states[:n, b], gamma, 1e-12)
        assert not states[n:, b].any() and (paths[n:, b] == -1).all()
        expected, path = theirs.decode(x[:n, b, None], algorithm="viterbi")
        assert weight[b] == pytest.approx(expected, rel=1e-12)
        np.testing.assert_array_equal(paths[:n, b], path)
    assert pairs.sum() == pytest.approx(sum(n - 1 for n in lengths), rel=1e-12)


def test_posteriors_are_the_gradient(on):
    *given, lengths = model(5, 3, 3, seed=6)
    weights = np.array([0.7, -1.3, 2.0])
    lengths[:] = [5, 3, 0]
    gradients = hmm.posteriors(*given, lengths, weights)[1:]
    for n, name in enumerate(("scores", "initial", "transitions")):
        expected = np.empty_like(given[n])
        for index in np.ndindex(expected.shape):
            ends = []
            for step in (1e-5, -1e-5):
                moved = [a.copy() for a in given]
                moved[n][index] += step
                ends.append(float(weights @ hmm.likelihood(*moved, lengths)))
            expected[index] = (ends[0] - ends[1]) / 2e-5
        close.check(name, gradients[n], expected, 1e-8)


def test_what_is_impossible_adds_nothing(on):
    scores, initial, transitions, _ = model(6, 3, 4)
    clean = hmm.posteriors(scores, initial, transitions, [6, 0, 6])
    scores[3, 1] = -np.inf
    logp, states, first, pairs = hmm.posteriors(scores, initial, transitions, [6, 6, 6])
    assert np.isneginf(logp[1]) and not states[:, 1].any()
    for got, expected in ((first, clean[2]), (pairs, clean[3])):
        close.check("expectations", got, expected, 1e-14)
    paths, weight = hmm.viterbi(scores, initial, transitions)
    assert np.isneginf(weight[1]) and (paths[:, 1] == -1).all() and (paths[:, ::2] >= 0).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value", [np.nan, np.inf, 2e37])
def test_what_is_no_logarithm_is_seen_in_its_row_alone(on, value, dtype):
    lengths = [6, 4, 1]
    for t, state in itertools.product((0, 2, 3, 4), (0, 2)):
        scores, *given, _ = model(6, 3, 3, dtype, seed=8)
        right = *hmm.posteriors(scores, *given, lengths), *hmm.viterbi(scores, *given, lengths)
        scores[t, 1, state] = value
        got = *hmm.posteriors(scores, *given, lengths), *hmm.viterbi(scores, *given, lengths)
        np.testing.assert_array_equal(got[0], hmm.likelihood(scores, *given, lengths))
        if t >= 4:  # behind the row's end
            assert [a.tobytes() for a in got] == [a.tobytes() for a in right]
            continue
        logp, states, first, pairs, paths, weight = got
        assert np.isnan(first).all() and np.isnan(pairs).all()
        assert np.isnan(states[:4, 1]).all() and not states[4:, 1].any() and (paths[:, 1] == -1).all()
        assert np.isnan(logp[1]) and np.isnan(weight[1])
        for n in (0, 1, 4, 5):
            np.testing.assert_array_equal(got[n][..., ::2, :] if n == 1 else got[n][..., ::2],
                                          right[n][..., ::2, :] if n == 1 else right[n][..., ::2])  # fmt: skip
        path, alone = hmm.viterbi(scores[:, 1], *given, 4)
        assert (path == -1).all() and np.isnan(alone) and np.isnan(hmm.likelihood(scores[:, 1], *given, 4))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_model_that_is_no_logarithm_is_seen_by_all_rows_that_read_it(on, value, dtype):
    scores, initial, transitions, _ = model(3, 3, 3, dtype, seed=8)
    initial[1] = transitions[2, 0] = value
    for given, seen in (
        ((initial, np.zeros_like(transitions)), [True, True, False]),
        ((np.zeros_like(initial), transitions), [True, False, False]),
    ):
        for logarithm in (hmm.likelihood(scores, *given, [3, 1, 0]), hmm.viterbi(scores, *given, [3, 1, 0])[1]):
            np.testing.assert_array_equal(np.isnan(logarithm), seen)


@pytest.mark.parametrize("value", [-np.inf, np.finfo(np.float32).min])
def test_impossible_and_not_a_number(on, value):
    scores, initial, transitions, _ = model(4, 2, 3, np.float32)
    scores[1, 1] = value
    given = scores, initial, transitions
    np.testing.assert_array_equal(np.isneginf(hmm.likelihood(*given)), [False, True])
    np.testing.assert_array_equal(np.isneginf(hmm.viterbi(*given)[1]), [False, True])
    states, first = hmm.posteriors(*given, weights=[1.0, np.nan])[1:3]  # an impossible row adds nothing
    assert np.isfinite(first).all() and not states[:, 1].any()
    scores[3, 1, 0] = np.nan  # nothing is possible already, but NaN wins
    assert np.isnan(hmm.likelihood(*given)[1]) and np.isnan(hmm.viterbi(*given)[1][1])


def test_the_only_way_leads_through_the_improbable(judged):
    # far below what float32, or float64, can hold beside the rest: a common scale for all states would lose it
    N, T = 3, 40
    transitions = np.full((N, N), -np.inf, np.float32)
    transitions[0, 0] = transitions[1, 1] = transitions[2, 2] = 0
    scores = np.zeros((T, 1, N), np.float32)
    scores[:-1, :, 1:] = [-1000, -2000]
    scores[-1, :, 0] = -np.inf
    scores[-1, :, 2] = 5.0
    initial = np.zeros(N, np.float32)
    logp, states, _, pairs = hmm.posteriors(scores, initial, transitions)
    assert float(logp[0]) == pytest.approx(-39000.0, rel=1e-7)
    close.check("states", states[:, 0], np.tile([0.0, 1.0, 0.0], (T, 1)), 1e-6)
    assert pairs[1, 1] == pytest.approx(T - 1, rel=1e-6) and pairs.sum() == pytest.approx(T - 1, rel=1e-6)


def test_same_bits_for_any_number_of_threads(kernels):
    before = fusedrnn.get_num_threads()
    given = model(60, 11, 20, dtype=np.float32)
    try:
        results = []
        for threads in (1, 2, 3):
            fusedrnn.set_num_threads(threads)
            results.append((*hmm.posteriors(*given), *hmm.viterbi(*given)))
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                assert a.tobytes() == b.tobytes()
    finally:
        fusedrnn.set_num_threads(before)


def test_ties_go_to_the_lower_state(on):
    paths, _ = hmm.viterbi(np.zeros((4, 2, 20)), np.zeros(20), np.zeros((20, 20)), [4, 2])
    np.testing.assert_array_equal(paths, [[0, 0], [0, 0], [0, -1], [0, -1]])


def test_empty_batches(on):
    logp, states, first, pairs = hmm.posteriors(np.zeros((4, 0, 3)), np.zeros(3), np.zeros((3, 3)))
    assert logp.shape == (0,) and states.shape == (4, 0, 3) and not first.any() and not pairs.any()
    assert hmm.viterbi(np.zeros((0, 2, 3)), np.zeros(3), np.zeros((3, 3)))[1].tolist() == [0.0, 0.0]


BAD = [
    ({"scores": np.zeros((4, 2, 3), np.float16)}, TypeError, "scores has dtype float16"),
    ({"scores": np.zeros(4)}, ValueError, r"scores has shape \(4,\); expected three axes \(T, B, N\)"),
    ({"scores": np.zeros((4, 2, 0))}, ValueError, "scores has no states"),
    ({"initial": np.zeros(2)}, ValueError, r"initial has shape \(2,\); expected \(3,\) = \(N,\)"),
    ({"initial": np.zeros(3, np.float32)}, TypeError, "initial has dtype float32; expected float64"),
    ({"transitions": np.zeros((3, 2))}, ValueError, r"transitions has shape \(3, 2\)"),
    ({"transitions": [[0.0]]}, TypeError, "transitions is a list"),
    ({"lengths": [4, 5]}, ValueError, r"lengths\[1\] is 5; expected 0 <= length <= T = 4"),
    ({"lengths": [4]}, ValueError, "lengths has shape"),
    ({"weights": [1.0]}, ValueError, r"weights has shape \(1,\)"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[f"{n}" for n in range(len(BAD))])
def test_errors_name_what_is_wrong(change, error, message):
    given = {"scores": np.zeros((4, 2, 3)), "initial": np.zeros(3), "transitions": np.zeros((3, 3)), **change}
    with pytest.raises(error, match=message):
        hmm.posteriors(**given)


def test_the_extension_trusts_nobody():
    core = pytest.importorskip("fusedrnn._core", exc_type=ImportError)
    model = {
        "scores": np.zeros((4, 2, 3)),
        "initial": np.zeros(3),
        "transitions": np.zeros((3, 3)),
        "lengths": np.array([4, 2]),
    }
    good = {
        **model,
        "log_likelihood": np.full(2, np.nan),
        "weights": np.ones(2),
        "states": np.full((4, 2, 3), np.nan),
        "dinitial": np.full(3, np.nan),
        "dtransitions": np.full((3, 3), np.nan),
    }
    best = {**model, "paths": np.full((4, 2), -5), "log_probability": np.full(2, np.nan)}
    for function, given, name, value in (
        (core.hmm, good, "scores", np.zeros((4, 3))),
        (core.hmm, good, "initial", np.zeros(6)[::2]),
        (core.hmm, good, "initial", None),
        (core.hmm, good, "transitions", np.zeros((3, 3)).T[::-1]),
        (core.hmm, good, "lengths", np.array([4, 5])),
        (core.hmm, good, "lengths", np.array([4])),
        (core.hmm, good, "log_likelihood", None),
        (core.hmm, good, "weights", np.ones(3)),
        (core.hmm, good, "states", None),
        (core.hmm, good, "states", np.zeros((4, 2, 6))[:, :, ::2]),
        (core.hmm, good, "dinitial", np.zeros(3, np.float32)),
        (core.hmm, good, "dtransitions", np.zeros((3, 4))),
        (core.viterbi, best, "paths", None),
        (core.viterbi, best, "paths", np.zeros((4, 2), np.int32)),
        (core.viterbi, best, "paths", np.zeros((2, 4), int).T),
        (core.viterbi, best, "log_probability", np.zeros(3)),
    ):
        with pytest.raises((TypeError, ValueError)):
            function(**{**given, name: value})
    for name in ("log_likelihood", "states", "dinitial", "dtransitions"):
        assert np.isnan(good[name]).all()
    assert (best["paths"] == -5).all() and np.isnan(best["log_probability"]).all()
    core.hmm(**good)
    core.viterbi(**best)
    assert np.isfinite(good["states"]).all() and np.isfinite(good["dtransitions"]).all()
    assert (best["paths"] >= -1).all()


def test_docstrings_run():
    result = doctest.testmod(hmm, extraglobs={"fusedrnn": fusedrnn, "np": np})
    assert result.attempted and not result.failed
