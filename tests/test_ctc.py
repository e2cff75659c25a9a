# SPDX-License-Identifier: Apache-2.0
"""CTC against torch in float64, against the sum over all paths, and against finite differences."""

import doctest
import itertools
import math

import numpy as np
import pytest

import close
import fusedrnn
from fusedrnn import config, ctc

torch = pytest.importorskip("torch")

# T, B, C, S, blank: one step, primes, a register of 4, 8, 16 labels and one more or less, more than a renewal of steps
SIZES = [
    (1, 1, 2, 1, 0),
    (1, 2, 1, 0, 0),
    (7, 5, 4, 3, 3),
    (16, 3, 5, 7, 1),
    (17, 2, 37, 8, 36),
    (33, 3, 11, 15, 0),
    (40, 2, 16, 16, 5),
    (70, 2, 100, 17, 0),
    (90, 1, 6, 33, 2),
]


@pytest.fixture
def on(route):
    """Every call runs on the route's backend."""
    before = config.backend
    fusedrnn.set_backend(route.__name__.rpartition(".")[2])
    yield route
    config.backend = before


class Case:
    """Random log-probabilities and labels, with lengths of every kind."""

    def __init__(self, T, B, C, S, blank=0, dtype=np.float64, seed=0, sharp=1.0, few=False):
        rng = np.random.default_rng(seed)
        logits = torch.tensor(rng.standard_normal((T, B, C)) * sharp)
        self.log_probs = logits.log_softmax(2).numpy().astype(dtype)
        self.targets = rng.integers(0, max(C - 1, 1), (B, S))
        if few:
            self.targets = np.minimum(self.targets, 1)  # many repeats
        self.targets = self.targets + (self.targets >= blank)
        self.input_lengths = rng.integers(0, T + 1, B)
        self.target_lengths = rng.integers(0, S + 1, B)
        self.input_lengths[0], self.target_lengths[0] = T, S
        self.dloss = rng.standard_normal(B).astype(dtype)
        self.blank, self.dtype = blank, dtype

    @property
    def arguments(self):
        return self.log_probs, self.targets, self.input_lengths, self.target_lengths

    def torch(self, zero_infinity=True):
        """Loss and gradient in float64."""
        x = torch.tensor(self.log_probs.astype(np.float64), requires_grad=True)
        given = [torch.tensor(a) for a in self.arguments[1:]]
        loss = torch.nn.functional.ctc_loss(x, *given, blank=self.blank, reduction="none", zero_infinity=zero_infinity)
        loss.backward(torch.tensor(self.dloss.astype(np.float64)))
        return loss.detach().numpy(), x.grad.numpy()

    def check(self, label, zero_infinity=True):
        options = {"blank": self.blank, "zero_infinity": zero_infinity}
        loss = fusedrnn.ctc_loss(*self.arguments, **options)
        again, dlog_probs = fusedrnn.ctc_loss_backward(*self.arguments, self.dloss, **options)
        np.testing.assert_array_equal(loss, again)
        assert loss.dtype == dlog_probs.dtype == self.dtype
        expected, gradient = self.torch(zero_infinity)
        f32 = self.dtype == np.float32
        close.check(f"{label}: loss", loss, expected, 3e-7 if f32 else 1e-14)
        close.check(f"{label}: dlog_probs", dlog_probs, gradient, 5e-6 if f32 else 2e-11)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equals_torch(on, dtype):
    for seed, size in enumerate(SIZES):
        Case(*size, dtype=dtype, seed=seed).check(f"{size}")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_repeated_labels_and_steep_scores_equal_torch(on, dtype):
    Case(60, 4, 5, 12, 1, dtype, few=True).check("repeats")
    Case(50, 3, 9, 16, 0, dtype, sharp=300).check("steep")  # a step's odds reach e^1000: far below the smallest number


def test_labels_that_do_not_fit(on):
    case = Case(5, 6, 4, 3)
    case.targets = np.array([[1, 1, 2], [1, 1, 1], [1, 2, 3], [1, 2, 3], [2, 2, 2], [3, 3, 3]])
    case.input_lengths = np.array([3, 4, 2, 0, 0, 5])
    case.target_lengths = np.array([3, 3, 3, 1, 0, 3])
    case.check("inf", zero_infinity=False)
    case.check("zero", zero_infinity=True)
    loss = fusedrnn.ctc_loss(*case.arguments)
    np.testing.assert_array_equal(np.isinf(loss), [True, True, True, True, False, False])
    assert loss[4] == 0


def test_losses_in_float32_are_as_good_as_their_type(judged):
    # log(p) in float32 would be rounded at 1000 steps near e^-4600
    case = Case(1000, 1, 100, 60, dtype=np.float32, seed=3)
    loss, dlog_probs = fusedrnn.ctc_loss_backward(*case.arguments, case.dloss)
    expected, gradient = case.torch()
    assert abs(expected[0]) > 3000
    assert loss[0] == pytest.approx(expected[0], rel=1.2e-7)
    close.check("dlog_probs", dlog_probs, gradient, 5e-6)


def collapse(path, blank):
    """What a path spells."""
    return tuple(label for label, _ in itertools.groupby(path) if label != blank)


def spellings(log_probs, blank):
    """All that can be spelled, with its probability: the definition."""
    found: dict[tuple[int, ...], float] = {}
    for path in itertools.product(range(log_probs.shape[1]), repeat=len(log_probs)):
        word = collapse(path, blank)
        found[word] = found.get(word, 0.0) + math.exp(sum(log_probs[t, c] for t, c in enumerate(path)))
    return found


@pytest.mark.parametrize("blank", [0, 2])
def test_equals_the_sum_over_all_paths(on, blank):
    log_probs = Case(5, 1, 3, 1, seed=4).log_probs[:, 0]
    found = spellings(log_probs, blank)
    words = list(itertools.chain(*(itertools.product(range(3), repeat=n) for n in range(5))))
    words = [word for word in words if blank not in word]
    assert sum(math.exp(-fusedrnn.ctc_loss(log_probs, list(w), 5, len(w), blank)) for w in words) <= 1 + 1e-12
    for word in words:
        got = math.exp(-float(fusedrnn.ctc_loss(log_probs, list(word), 5, len(word), blank)))
        assert got == pytest.approx(found.get(word, 0.0), rel=1e-12), word


def test_gradient_is_that_of_what_went_into_log_softmax(on):
    rng = np.random.default_rng(5)
    logits = rng.standard_normal((6, 2, 4))
    targets, T, S = [[1, 1, 3], [2, 0, 0]], [6, 4], [3, 1]

    def log_softmax(x):
        return x - np.log(np.exp(x).sum(2, keepdims=True))

    gradient = fusedrnn.ctc_loss_backward(log_softmax(logits), targets, T, S, 1.0)[1]
    expected = np.empty_like(logits)
    for index in np.ndindex(logits.shape):
        ends = []
        for step in (1e-5, -1e-5):
            moved = logits.copy()
            moved[index] += step
            ends.append(fusedrnn.ctc_loss(log_softmax(moved), targets, T, S).sum())
        expected[index] = (ends[0] - ends[1]) / 2e-5
    close.check("dlog_probs", gradient, expected, 1e-9)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_impossible_classes_have_no_gradient(on, dtype):
    case = Case(9, 2, 5, 2, dtype=dtype)
    case.log_probs[:, :, 4] = -np.inf
    case.targets[:] = [[1, 2], [3, 1]]
    case.log_probs[2:4, 0, 1] = -np.inf
    case.log_probs[5, 1, 0] = -1e30  # finite, and never taken
    loss, dlog_probs = fusedrnn.ctc_loss_backward(*case.arguments, case.dloss)
    expected, gradient = case.torch()  # NaN at -inf
    close.check("loss", loss, expected, 3e-7)
    assert not dlog_probs[:, :, 4].any()
    possible = np.isfinite(case.log_probs) & np.isfinite(gradient)
    assert possible.sum() > 20
    close.check("dlog_probs", dlog_probs[possible], gradient[possible], 5e-6)
    # the only way is very improbable
    case.log_probs[:, :, :3] = -1e9
    close.check("far", fusedrnn.ctc_loss(*case.arguments), case.torch()[0], 1e-6)
    case.log_probs[:] = -np.inf
    assert np.isinf(fusedrnn.ctc_loss(*case.arguments)).all()


def test_nan_stays_in_its_row(on):
    case = Case(20, 3, 5, 4)
    case.input_lengths[:] = 20
    case.target_lengths[:] = 2
    clean = fusedrnn.ctc_loss_backward(*case.arguments)
    case.log_probs[7, 1, case.blank] = np.nan
    loss, dlog_probs = fusedrnn.ctc_loss_backward(*case.arguments, zero_infinity=True)
    np.testing.assert_array_equal(np.isnan(loss), [False, True, False])
    assert np.isnan(dlog_probs[:, 1]).all()
    for b in (0, 2):
        np.testing.assert_array_equal(dlog_probs[:, b], clean[1][:, b])


# Where row 1 of `spoilt` can be hit: its first, middle and last step, or behind it; at the blank, labels, or another
PLACES = list(itertools.product((0, 2, 3, 4, 5), range(4)))


def spoilt(t, c, value, dtype):
    """Log-probabilities (6,3,4) with one bad number in row 1, and the same without it; the rest of ctc_loss's
    arguments: rows have 6, 4, 5 steps and spell 1, 2."""
    clean = Case(6, 3, 4, 2, dtype=dtype, seed=11).log_probs
    bad = clean.copy()
    bad[t, 1, c] = value
    return bad, clean, ([[1, 2]] * 3, [6, 4, 5], [2, 2, 2])


def same_but(got, expected, b=None):
    """Equal bits, but for row b."""
    rows = [row for row in range(expected.shape[-1]) if row != b]
    np.testing.assert_array_equal(got[..., rows], expected[..., rows])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value", [np.nan, np.inf, 2e37])
def test_what_is_no_log_probability_is_seen_in_its_row_alone(on, value, dtype):
    for t, c in PLACES:
        bad, clean, given = spoilt(t, c, value, dtype)
        inside, row = t < 4, 1 if t < 4 else None
        loss, gradient = fusedrnn.ctc_loss_backward(bad, *given, zero_infinity=True)
        right = fusedrnn.ctc_loss_backward(clean, *given)
        lost = inside and c != 3  # class 3 is in no word
        np.testing.assert_array_equal(np.isnan(loss), [False, lost, False])
        np.testing.assert_array_equal(loss, fusedrnn.ctc_loss(bad, *given))
        same_but(loss, right[0], row)
        same_but(gradient.swapaxes(1, 2), right[1].swapaxes(1, 2), row)
        if lost:
            assert np.isnan(gradient[:4, 1]).all() and not gradient[4:, 1].any()
        elif inside:  # the gradient reads what the loss does not
            np.testing.assert_array_equal(np.argwhere(np.isnan(gradient)), [[t, 1, c]])
        one = fusedrnn.ctc_loss_backward(bad[:, 1], [1, 2], 4, 2)
        np.testing.assert_array_equal(one[0], loss[1])
        np.testing.assert_array_equal(one[1], gradient[:, 1])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value", [np.nan, np.inf, 2e37])
def test_decoders_find_no_path_where_a_row_has_no_log_probability(on, value, dtype):
    for t, c in PLACES:
        bad, clean, (_, lengths, _) = spoilt(t, c, value, dtype)
        for top in (1, 3):
            got, right = (fusedrnn.ctc_beam(x, lengths, beam_width=2, top=top) for x in (bad, clean))
            if t < 4:
                ((labels, log_prob),) = got[1] if top > 1 else [got[1]]
                assert labels.size == 0 and math.isnan(log_prob)
                got[1] = right[1]
            assert repr(got) == repr(right)
        if t < 4:
            for x, steps, at in ((bad, lengths, rf"log_probs\[{t}, 1\]"), (bad[:, 1], 4, rf"log_probs\[{t}\]")):
                with pytest.raises(ValueError, match=rf"ctc_greedy: {at} has .*step {t} of row"):
                    fusedrnn.ctc_greedy(x, steps)
        else:
            assert repr(fusedrnn.ctc_greedy(bad, lengths)) == repr(fusedrnn.ctc_greedy(clean, lengths))


@pytest.mark.parametrize("value", [-np.inf, np.finfo(np.float32).min])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_step_where_nothing_is_possible(on, value, dtype):
    bad, clean, given = spoilt(2, slice(None), value, dtype)
    loss, gradient = fusedrnn.ctc_loss_backward(bad, *given)
    np.testing.assert_array_equal(np.isposinf(loss), [False, True, False])
    assert np.isnan(gradient[:4, 1]).all() and np.isfinite(gradient[:, ::2]).all()
    rows = fusedrnn.ctc_beam(bad, given[1])
    assert rows[1][0].size == 0 and rows[1][1] == -np.inf
    assert repr(rows[::2]) == repr(fusedrnn.ctc_beam(clean, given[1])[::2])
    with pytest.raises(ValueError, match=r"log_probs\[2, 1\] has .*step 2 of row 1"):
        fusedrnn.ctc_greedy(bad, given[1])
    bad[3, 1, 0] = np.nan  # nothing is possible already, but NaN wins
    assert np.isnan(fusedrnn.ctc_loss(bad, *given, zero_infinity=True)[1])
    assert np.isnan(fusedrnn.ctc_beam(bad, given[1])[1][1])


def test_numbers_above_one_have_the_gradient_of_their_exponential(on):
    log_probs = np.zeros((1, 1, 3), np.float32)
    log_probs[0, 0, 2] = 100  # exp(100) is no float32
    gradient = fusedrnn.ctc_loss_backward(log_probs, [[1]], [1], [1])[1]
    np.testing.assert_array_equal(gradient, [[[1, 0, np.inf]]])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_way_to_pass_the_same(on, dtype):
    case = Case(21, 4, 7, 5, blank=3, dtype=dtype)
    expected = fusedrnn.ctc_loss_backward(*case.arguments, case.dloss, blank=3)

    def same(label, got):
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=label)

    rows = zip(case.targets, case.target_lengths, strict=True)
    joined = [int(label) for row, n in rows for label in row[:n]]
    lists = case.input_lengths.tolist(), tuple(case.target_lengths)
    same("concatenated", fusedrnn.ctc_loss_backward(case.log_probs, joined, *lists, case.dloss, 3))
    padded = case.targets.astype(np.int32)
    for row, n in zip(padded, case.target_lengths, strict=True):
        row[n:] = -7  # not read
    same("padding", fusedrnn.ctc_loss_backward(case.log_probs, padded, *lists, case.dloss, 3))
    wide = np.full((4, 21 * 2, 7 * 3), np.nan, dtype)
    wide[:, ::2, ::-3] = case.log_probs.transpose(1, 0, 2)
    strided = wide[:, ::2, ::-3].transpose(1, 0, 2)
    same("strided", fusedrnn.ctc_loss_backward(strided, padded, *lists, case.dloss, 3))
    for b in range(4):
        word = case.targets[b, : case.target_lengths[b]]
        loss, gradient = fusedrnn.ctc_loss_backward(
            case.log_probs[:, b], word, lists[0][b], len(word), case.dloss[b], 3
        )
        assert loss.shape == () and loss == expected[0][b]
        np.testing.assert_array_equal(gradient, expected[1][:, b])


def test_empty_batches_and_no_steps(on):
    loss, gradient = fusedrnn.ctc_loss_backward(np.zeros((4, 0, 3)), np.zeros((0, 2), int), [], [])
    assert loss.shape == (0,) and gradient.shape == (4, 0, 3)
    loss, gradient = fusedrnn.ctc_loss_backward(np.zeros((0, 2, 3)), [[1], [1]], [0, 0], [0, 1])
    np.testing.assert_array_equal(loss, [0, np.inf])
    assert gradient.shape == (0, 2, 3)


def test_same_bits_for_any_number_of_threads(kernels):
    before = fusedrnn.get_num_threads()
    try:
        for B in (1, 7):
            case = Case(300, B, 90, 30, dtype=np.float32)
            results = []
            for threads in (1, 2, 3):
                fusedrnn.set_num_threads(threads)
                results.append(fusedrnn.ctc_loss_backward(*case.arguments, case.dloss))
            for other in results[1:]:
                for a, b in zip(results[0], other, strict=True):
                    assert a.tobytes() == b.tobytes()
    finally:
        fusedrnn.set_num_threads(before)


BAD = [
    ({"log_probs": np.zeros((5, 2, 4), int)}, TypeError, "dtype int64"),
    ({"log_probs": [[0.0]]}, TypeError, "expected a NumPy array"),
    ({"log_probs": np.zeros((5, 2, 4, 1))}, ValueError, "three axes"),
    ({"log_probs": np.zeros((5, 2, 0))}, ValueError, "no classes"),
    ({"blank": 4}, ValueError, "blank is 4"),
    ({"blank": True}, TypeError, "blank is True"),
    ({"blank": 3}, ValueError, "targets has 3 as label 1 of row 1.*not blank = 3"),
    ({"targets": [[1, 2], [1, 4]]}, ValueError, r"targets has 4 as label 1 of row 1; expected a class in \[0, 4\)"),
    ({"targets": [[1, 2], [-1, 2]]}, ValueError, "targets has -1 as label 0 of row 1"),
    ({"targets": [[1.0, 2.0], [1.0, 2.0]]}, TypeError, "targets is a list"),
    ({"targets": [[1, 2]]}, ValueError, r"targets has shape \(1, 2\)"),
    ({"targets": [1, 2, 3]}, ValueError, "4 = sum of target_lengths"),
    ({"targets": [[[1]]]}, ValueError, r"targets has shape \(1, 1, 1\)"),
    ({"input_lengths": [5, 6]}, ValueError, r"input_lengths\[1\] is 6; expected 0 <= length <= T = 5"),
    ({"input_lengths": [5]}, ValueError, r"input_lengths has shape \(1,\); expected 2 integers"),
    ({"input_lengths": [5.0, 5.0]}, TypeError, "input_lengths is a list"),
    ({"target_lengths": [2, -1]}, ValueError, r"target_lengths\[1\] is -1"),
    ({"target_lengths": [2, 3]}, ValueError, r"target_lengths\[1\] is 3; expected 0 <= length <= S = 2"),
    ({"dloss": [1.0, 2.0, 3.0]}, ValueError, r"dloss has shape \(3,\)"),
    ({"dloss": "a"}, TypeError, "dloss is a str"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[f"{n}" for n in range(len(BAD))])
def test_errors_name_what_is_wrong(change, error, message):
    given = {
        "log_probs": np.zeros((5, 2, 4)),
        "targets": [[1, 2], [1, 3]],
        "input_lengths": [5, 5],
        "target_lengths": [2, 2],
        **change,
    }
    with pytest.raises(error, match=message):
        fusedrnn.ctc_loss_backward(**given)


def test_the_extension_trusts_nobody():
    core = pytest.importorskip("fusedrnn._core", exc_type=ImportError)
    good = {
        "log_probs": np.zeros((4, 2, 3)),
        "labels": np.array([1, 2, 1]),
        "first": np.array([0, 2]),
        "label_counts": np.array([2, 1]),
        "lengths": np.array([4, 3]),
        "blank": 0,
        "zero_infinity": False,
        "loss": np.full(2, np.nan),
        "dloss": np.ones(2),
        "dlog_probs": np.full((4, 2, 3), np.nan),
    }
    readonly = np.zeros(2)
    readonly.flags.writeable = False
    for name, value in (
        ("log_probs", np.zeros((4, 2))),
        ("log_probs", np.zeros((4, 2, 3), np.float16)),
        ("labels", np.array([1, 0, 1])),
        ("labels", np.array([1, 3, 1])),
        ("labels", np.array([1, 2, 1], np.int32)),
        ("labels", np.array([1, 2])),
        ("first", np.array([0, -1])),
        ("first", np.array([0, 2**62])),
        ("label_counts", np.array([2, 2])),
        ("label_counts", np.array([-1, 1])),
        ("lengths", np.array([4, 5])),
        ("lengths", np.array([4])),
        ("blank", 3),
        ("blank", -1),
        ("loss", readonly),
        ("loss", np.zeros(2, np.float32)),
        ("loss", np.zeros(4)[::2]),
        ("dloss", np.zeros(3)),
        ("dlog_probs", np.zeros((4, 2, 6))[:, :, ::2]),
        ("dlog_probs", np.broadcast_to(np.zeros(3), (4, 2, 3))),
    ):
        with pytest.raises((TypeError, ValueError)):
            core.ctc(**{**good, name: value})
    assert np.isnan(good["loss"]).all() and np.isnan(good["dlog_probs"]).all()
    core.ctc(**good)
    assert np.isfinite(good["loss"]).all() and np.isfinite(good["dlog_probs"]).all()


# ---- decoding ------------------------------------------------------------------------------------------------------


def prefix_search(log_probs, blank, width):
    """Prefix search in probabilities over a dictionary: the published algorithm, in another form than ours."""
    probs = np.exp(log_probs)
    beam = {(): np.array([1.0, 0.0])}
    for step in probs:
        grown: dict[tuple[int, ...], np.ndarray] = {}
        for word, p in beam.items():
            for label, y in enumerate(step):
                if label == blank:
                    moves = [(word, (p.sum() * y, 0))]
                elif word[-1:] == (label,):
                    moves = [(word, (0, p[1] * y)), ((*word, label), (0, p[0] * y))]
                else:
                    moves = [((*word, label), (0, p.sum() * y))]
                for to, more in moves:
                    grown[to] = grown.get(to, np.zeros(2)) + more
        beam = dict(sorted(grown.items(), key=lambda item: -item[1].sum())[:width])
    return [(word, math.log(p.sum())) for word, p in beam.items()]


def test_greedy_collapses_the_best_path(on):
    case = Case(30, 7, 4, 1, few=True, sharp=3)
    for blank in (0, 3):
        words = fusedrnn.ctc_greedy(case.log_probs.astype(np.float32), case.input_lengths, blank)
        for b, T in enumerate(case.input_lengths):
            assert tuple(words[b]) == collapse(case.log_probs[:T, b].argmax(1), blank)
            assert words[b].dtype == np.int64
    assert [len(w) for w in fusedrnn.ctc_greedy(np.zeros((0, 2, 3)))] == [0, 0]


@pytest.mark.parametrize("blank", [0, 2])
def test_a_wide_beam_finds_all_that_can_be_spelled(on, blank):
    log_probs = Case(5, 1, 3, 1, seed=7).log_probs[:, 0]
    found = spellings(log_probs, blank)
    (hypotheses,) = fusedrnn.ctc_beam(log_probs, beam_width=1000, blank=blank, top=1000)
    assert {tuple(labels) for labels, _ in hypotheses} == set(found)
    for labels, log_prob in hypotheses:
        assert math.exp(log_prob) == pytest.approx(found[tuple(labels)], rel=1e-12)
    best = max(found, key=lambda word: found[word])
    (labels, log_prob) = fusedrnn.ctc_beam(log_probs, beam_width=1000, blank=blank)[0]
    assert tuple(labels) == best and math.exp(log_prob) == pytest.approx(found[best], rel=1e-12)
    assert sum(math.exp(p) for _, p in hypotheses) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("width", "C", "sharp"), [(1, 5, 2), (2, 3, 1), (5, 4, 1), (16, 30, 2), (7, 60, 0.3)])
def test_beam_equals_prefix_search(on, width, C, sharp, dtype):
    case = Case(20, 3, C, 1, blank=C // 2, seed=width, sharp=sharp, dtype=dtype)
    rows = fusedrnn.ctc_beam(case.log_probs, case.input_lengths, beam_width=width, blank=C // 2, top=3)
    for b, T in enumerate(case.input_lengths):
        expected = prefix_search(case.log_probs[:T, b].astype(np.float64), C // 2, width)[:3]
        assert [tuple(labels) for labels, _ in rows[b]] == [word for word, _ in expected]
        for (labels, log_prob), (_, right) in zip(rows[b], expected, strict=True):
            assert log_prob == pytest.approx(right, rel=1e-9)
            full = -fusedrnn.ctc_loss(case.log_probs[:T, b], labels, T, len(labels), C // 2)
            assert log_prob <= full + 1e-4


def test_a_prefix_that_fell_out_of_the_beam_comes_back(on):
    # width 2: () and [1], then () and [2], and at the last step nothing but 1 is possible: [1] again, or [2, 1]
    log_probs = np.log([[0.9, 0.06, 0.04], [0.6, 0.001, 0.399], [1e-9, 1 - 2e-9, 1e-9]])
    ((labels, log_prob),) = fusedrnn.ctc_beam(log_probs, beam_width=2)
    assert labels.tolist() == [1] and log_prob == pytest.approx(math.log(0.9 * 0.6), abs=1e-6)


def test_beam_without_a_way(on):
    log_probs = np.full((3, 2, 2), -np.inf)
    log_probs[:, 1, 1] = 0
    rows = fusedrnn.ctc_beam(log_probs)
    assert rows[0][0].size == 0 and rows[0][1] == -np.inf
    assert rows[1][0].tolist() == [1] and rows[1][1] == 0
    assert [len(row) for row in fusedrnn.ctc_beam(log_probs, top=5)] == [0, 1]
    assert [w.size for w, p in fusedrnn.ctc_beam(np.zeros((0, 2, 3)))] == [0, 0]


@pytest.mark.parametrize(
    ("options", "error"),
    [({"beam_width": 0}, ValueError), ({"top": 0}, ValueError), ({"blank": 3}, ValueError), ({"top": 1.0}, TypeError)],
)
def test_beam_names_what_is_wrong(options, error):
    with pytest.raises(error, match=next(iter(options))):
        fusedrnn.ctc_beam(np.zeros((4, 2, 3)), **options)


def test_the_extensions_beam_trusts_nobody():
    core = pytest.importorskip("fusedrnn._core", exc_type=ImportError)
    good = {"log_probs": np.zeros((4, 2, 3)), "lengths": np.array([4, 3]), "blank": 0, "beam_width": 2, "top": 1}
    for name, value in (
        ("log_probs", np.zeros((4, 2))),
        ("lengths", np.array([4, 5])),
        ("lengths", np.array([4])),
        ("blank", 3),
        ("beam_width", 0),
        ("top", 0),
    ):
        with pytest.raises((TypeError, ValueError)):
            core.ctc_beam(**{**good, name: value})
    assert len(core.ctc_beam(**good)) == 2


# ---- alignment -----------------------------------------------------------------------------------------------------


def all_paths(labels, T):
    """Every way through the states blank 0, label 0, blank 1, ... in T steps, state by state."""
    end = 2 * len(labels)
    paths = [(s,) for s in (0, 1) if s <= end]
    for _ in range(T - 1):
        paths = [
            (*path, s)
            for path in paths
            for s in range(path[-1], min(path[-1] + 2, end) + 1)
            if s < path[-1] + 2 or (s % 2 == 1 and labels[s // 2] != labels[s // 2 - 1])
        ]
    return [path for path in paths if path[-1] >= end - 1]


def best_of_all(log_probs, labels, blank):
    """The best path and its log-probability, by the definition: of equal ones the label at the end, and from there back
    the state that is farther on."""
    T, end = len(log_probs), 2 * len(labels)
    found = []
    for path in all_paths(labels, T):
        classes = [labels[s // 2] if s % 2 else blank for s in path]
        total = sum(log_probs[t, c] for t, c in enumerate(classes))
        found.append((total, (path[-1] % 2, *path[::-1]) if end else path, classes))
    return max(found, default=(-math.inf, (), [-1] * T))


@pytest.mark.parametrize("blank", [0, 2])
@pytest.mark.parametrize("tied", [False, True])
def test_alignment_is_the_best_of_all_paths(on, blank, tied):
    rng = np.random.default_rng(blank)
    a, b = (c for c in range(3) if c != blank)
    for labels in ([], [a], [a, b], [b, b], [a, b, a], [a, a, b], [b, b, b], [a, b, a, b]):
        for T in (1, 2, 4, 7):
            log_probs = Case(T, 1, 3, 1, seed=T).log_probs[:, 0]
            if tied:
                log_probs = -rng.integers(0, 3, log_probs.shape).astype(np.float64)  # exact sums
            total, _, path = best_of_all(log_probs, labels, blank)
            got = fusedrnn.ctc_align(log_probs, np.array(labels, int), T, len(labels), blank)
            assert got.path.tolist() == path, (labels, T)
            assert float(got.log_probability) == pytest.approx(total, rel=1e-13), (labels, T)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_alignment_equals_the_reference_to_the_bit(judged, dtype):
    before = config.backend
    try:
        for seed, (T, B, C, S, blank) in enumerate(SIZES):
            case = Case(T, B, C, S, blank, dtype, seed, few=seed % 2 == 1)
            if seed % 3 == 2:
                case.log_probs = np.round(case.log_probs)  # ties
            wide = np.full((B, T * 2, C * 3), np.nan, dtype)
            wide[:, ::2, ::-3] = case.log_probs.transpose(1, 0, 2)
            given = wide[:, ::2, ::-3].transpose(1, 0, 2), *case.arguments[1:], blank
            results = []
            for backend in (judged.__name__.rpartition(".")[2], "reference"):
                fusedrnn.set_backend(backend)
                results.append(fusedrnn.ctc_align(*given))
            for name in ("path", "starts", "stops", "scores", "log_probability"):
                got, expected = (getattr(result, name) for result in results)
                np.testing.assert_array_equal(got, expected, err_msg=f"{name} of {T, B, C, S, blank}")
                assert got.dtype == (np.int64 if name in ("path", "starts", "stops") else dtype)
    finally:
        config.backend = before


def test_alignment_tells_of_its_path(on):
    case = Case(50, 5, 6, 9, blank=3, few=True, seed=2, sharp=3)
    case.input_lengths = np.array([50, 30, 0, 40, 17])
    case.target_lengths = np.array([9, 0, 0, 5, 9])
    case.targets[4] = [0, 0, 1, 1, 0, 0, 1, 1, 0]  # fits into 9 + 4 steps
    found = fusedrnn.ctc_align(*case.arguments, blank=3)
    loss = fusedrnn.ctc_loss(*case.arguments, blank=3)
    assert found.starts.shape == found.stops.shape == found.scores.shape == case.targets.shape
    for b, (T, S) in enumerate(zip(case.input_lengths, case.target_lengths, strict=True)):
        path, labels, spans = found.path[:, b], case.targets[b, :S].tolist(), found.spans()[b]
        assert collapse(path[:T].tolist(), 3) == tuple(labels) and (path[T:] == -1).all()
        scores = case.log_probs[np.arange(T), b, path[:T]]
        assert found.log_probability[b] == pytest.approx(scores.sum(), rel=1e-13)
        assert found.log_probability[b] <= -loss[b]
        assert [span.label for span in spans] == labels
        end = 0
        for s, (label, start, stop, score) in enumerate(spans):
            assert end <= start < stop and (path[start:stop] == label).all() and (path[end:start] == 3).all()
            assert (start, stop, score) == (found.starts[b, s], found.stops[b, s], found.scores[b, s])
            assert score == pytest.approx(scores[start:stop].mean(), rel=1e-13)
            end = stop
        assert (path[end:T] == 3).all()
        assert (found.starts[b, S:] == -1).all() and (found.stops[b, S:] == -1).all() and not found.scores[b, S:].any()


def test_alignment_of_as_many_steps_as_it_takes(on):
    # forced_align's own examples have one path: no step to spare
    for labels, path in (([0, 1, 2, 1, 0], [0, 1, 2, 1, 0]), ([0, 1, 1, 0], [0, 1, 5, 1, 0])):
        found = fusedrnn.ctc_align(Case(5, 1, 6, 1).log_probs[:, 0], labels, blank=5)
        assert found.path.tolist() == path
        assert [span[:3] for span in found.spans()] == [(c, t, t + 1) for t, c in enumerate(path) if c != 5]


def test_alignment_of_labels_that_do_not_fit(on):
    case = Case(5, 4, 4, 3)
    case.targets = np.array([[1, 1, 2], [1, 1, 1], [1, 2, 3], [3, 2, 1]])
    case.input_lengths, case.target_lengths = np.array([5, 4, 0, 3]), np.array([3, 3, 1, 3])
    case.log_probs[2, 3] = -np.inf
    found = fusedrnn.ctc_align(*case.arguments)
    np.testing.assert_array_equal(found.log_probability > -np.inf, [True, False, False, False])
    np.testing.assert_array_equal(np.isneginf(found.log_probability), np.isinf(fusedrnn.ctc_loss(*case.arguments)))
    assert (found.path[:, 1:] == -1).all() and (found.starts[1:] == -1).all() and (found.stops[1:] == -1).all()
    assert np.isneginf(found.scores[1]).all() and found.scores[2].tolist() == [-np.inf, 0, 0]
    assert [len(spans) for spans in found.spans()] == [3, 0, 0, 0]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value", [np.nan, np.inf, 2e37])
def test_alignment_finds_no_path_where_a_row_has_no_log_probability(on, value, dtype):
    for t, c in PLACES:
        bad, clean, given = spoilt(t, c, value, dtype)
        got, right = (fusedrnn.ctc_align(x, *given) for x in (bad, clean))
        lost = t < 4 and c != 3
        np.testing.assert_array_equal(np.isnan(got.log_probability), [False, lost, False])
        same_but(got.path, right.path, 1 if lost else None)
        same_but(got.scores.T, right.scores.T, 1 if lost else None)
        if lost:
            assert (got.path[:, 1] == -1).all() and (got.starts[1] == -1).all() and np.isnan(got.scores[1]).all()
        one = fusedrnn.ctc_align(bad[:, 1], [1, 2], 4)
        np.testing.assert_array_equal(one.log_probability, got.log_probability[1])
        np.testing.assert_array_equal(one.path, got.path[:, 1])


@pytest.mark.parametrize("value", [-np.inf, np.finfo(np.float32).min])
def test_alignment_goes_round_what_is_impossible(on, value):
    log_probs = np.zeros((4, 1, 3), np.float32)
    log_probs[[0, 3], 0, 1] = value
    found = fusedrnn.ctc_align(log_probs, [[1, 2]])
    assert found.path[:, 0].tolist() == [0, 1, 2, 2]
    log_probs[1:3, 0, 1] = value
    assert fusedrnn.ctc_align(log_probs, [[1, 2]]).log_probability == -np.inf
    log_probs[0, 0, 2] = np.nan
    assert np.isnan(fusedrnn.ctc_align(log_probs, [[1, 2]]).log_probability)


def test_every_way_to_pass_what_is_aligned(on):
    case = Case(21, 4, 7, 5, blank=3)
    expected = fusedrnn.ctc_align(*case.arguments, 3)
    rows = list(zip(case.targets, case.target_lengths, strict=True))
    joined = [int(label) for row, n in rows for label in row[:n]]
    found = fusedrnn.ctc_align(case.log_probs, joined, case.input_lengths.tolist(), tuple(case.target_lengths), blank=3)
    assert repr(found) == repr(expected)
    whole = fusedrnn.ctc_align(case.log_probs, case.targets, blank=3)
    assert repr(whole) == repr(fusedrnn.ctc_align(case.log_probs, case.targets, [21] * 4, [5] * 4, 3))
    assert repr(fusedrnn.ctc_align(case.log_probs[:, :1], case.targets[0], blank=3).spans()[0]) == repr(
        whole.spans()[0]
    )
    for b, (word, n) in enumerate(rows):
        one = fusedrnn.ctc_align(case.log_probs[:, b], word[:n], case.input_lengths[b], blank=3)
        assert one.path.shape == (21,) and one.scores.shape == (n,) and one.log_probability.shape == ()
        np.testing.assert_array_equal(one.path, expected.path[:, b])
        np.testing.assert_array_equal(one.scores, expected.scores[b, :n])
        assert one.spans() == expected.spans()[b]
    empty = fusedrnn.ctc_align(np.zeros((4, 0, 3)), np.zeros((0, 2), int))
    assert empty.path.shape == (4, 0) and empty.starts.shape == (0, 2) and empty.spans() == []
    empty = fusedrnn.ctc_align(np.zeros((0, 2, 3)), [[1], [1]], None, [0, 1])
    assert empty.log_probability.tolist() == [0, -np.inf] and empty.path.shape == (0, 2)


def test_a_long_recording_is_aligned(on):
    # most steps have one likely class: the path is known
    rng = np.random.default_rng(0)
    labels = rng.integers(1, 40, 700)
    starts = 2 + np.arange(700) * 5 + rng.integers(0, 3, 700)
    path = np.zeros(3600, int)
    path[starts], path[starts + 1] = labels, labels
    log_probs = rng.standard_normal((3600, 40)).astype(np.float32) - 20
    log_probs[np.arange(3600), path] = -0.1
    found = fusedrnn.ctc_align(log_probs, labels)
    np.testing.assert_array_equal(found.path, path)
    np.testing.assert_array_equal(found.starts, starts)
    np.testing.assert_array_equal(found.stops, starts + 2)
    assert float(found.log_probability) == pytest.approx(-360, rel=1e-6)


def test_alignment_has_the_same_bits_for_any_number_of_threads(kernels):
    before = fusedrnn.get_num_threads()
    case = Case(300, 7, 90, 60, dtype=np.float32)
    try:
        results = []
        for threads in (1, 2, 3):
            fusedrnn.set_num_threads(threads)
            found = fusedrnn.ctc_align(*case.arguments)
            results.append([a.tobytes() for a in (found.path, found.scores, found.log_probability)])
        assert results[0] == results[1] == results[2]
    finally:
        fusedrnn.set_num_threads(before)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"log_probs": np.zeros((5, 2, 4), int)}, TypeError, "ctc_align: log_probs has dtype int64"),
        ({"log_probs": np.zeros((5, 2, 0))}, ValueError, "no classes"),
        ({"blank": 3}, ValueError, "targets has 3 as label 1 of row 1.*not blank = 3"),
        ({"targets": [[1, 2], [1, 4]]}, ValueError, "targets has 4 as label 1 of row 1"),
        ({"targets": [1, 2, 3]}, TypeError, "target_lengths is None; expected 2 integers"),
        ({"targets": [[1, 2]]}, ValueError, r"targets has shape \(1, 2\)"),
        ({"input_lengths": [5, 6]}, ValueError, r"input_lengths\[1\] is 6"),
        ({"target_lengths": [2, 3]}, ValueError, r"target_lengths\[1\] is 3"),
    ],
)
def test_alignment_names_what_is_wrong(change, error, message):
    given = {"log_probs": np.zeros((5, 2, 4)), "targets": [[1, 2], [1, 3]], **change}
    with pytest.raises(error, match=message):
        fusedrnn.ctc_align(**given)


def test_the_extensions_alignment_trusts_nobody():
    core = pytest.importorskip("fusedrnn._core", exc_type=ImportError)
    good = {
        "log_probs": np.zeros((4, 2, 3)),
        "labels": np.array([1, 2, 1]),
        "first": np.array([0, 2]),
        "label_counts": np.array([2, 1]),
        "lengths": np.array([4, 3]),
        "blank": 0,
        "states": np.full((4, 2), -5),
        "log_probability": np.full(2, np.nan),
    }
    for name, value in (
        ("log_probs", np.zeros((4, 2))),
        ("labels", np.array([1, 0, 1])),
        ("first", np.array([0, 2, 3])),
        ("label_counts", np.array([2, 2])),
        ("lengths", np.array([4, 5])),
        ("blank", 3),
        ("states", None),
        ("states", np.zeros((4, 2), np.int32)),
        ("states", np.zeros((2, 4), int).T),
        ("log_probability", None),
        ("log_probability", np.zeros(4)[::2]),
        ("log_probability", np.zeros(2, np.float32)),
    ):
        with pytest.raises((TypeError, ValueError)):
            core.ctc_align(**{**good, name: value})
    assert (good["states"] == -5).all() and np.isnan(good["log_probability"]).all()
    core.ctc_align(**good)
    assert (good["states"] >= -1).all() and (good["log_probability"] == 0).all()


# ---- torch ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("single", [False, True])
def test_adapter_equals_torch(reduction, single):
    import fusedrnn.torch

    case = Case(13, 3, 6, 4, dtype=np.float32)
    given = [torch.tensor(case.targets), torch.tensor(case.input_lengths), torch.tensor(case.target_lengths)]
    if single:
        given = [given[0][0], given[1][0], given[2][0]]
    results = []
    for function in (fusedrnn.torch.ctc_loss, torch.nn.functional.ctc_loss):
        x = torch.tensor(case.log_probs[:, 0] if single else case.log_probs, requires_grad=True)
        loss = function(x.log_softmax(-1), *given, reduction=reduction, zero_infinity=True)
        (loss * torch.arange(1, 1 + loss.numel()).reshape(loss.shape)).sum().backward()
        results.append((loss.detach(), x.grad))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=3e-6, atol=3e-6)


def test_adapter_tells_who_computed():
    import fusedrnn.torch

    x = torch.randn(5, 1, 3).log_softmax(2).to_sparse()
    given = torch.tensor([[1, 2]]), torch.tensor([5]), torch.tensor([2])
    with pytest.raises((RuntimeError, NotImplementedError)):  # torch's own cannot either: asked for, and it says so
        fusedrnn.torch.ctc_loss(x, *given)
    assert fusedrnn.torch.route() == "torch.nn.functional: torch.float32 torch.sparse_coo on cpu"
    fusedrnn.torch.ctc_loss(x.to_dense(), *given)
    assert fusedrnn.torch.route() == "fused"


@pytest.mark.parametrize("single", [False, True])
def test_adapter_aligns_tensors(single):
    import fusedrnn.torch

    case = Case(13, 3, 6, 4, dtype=np.float32)
    given = case.arguments
    if single:
        given = case.log_probs[:, 0], case.targets[0], int(case.input_lengths[0]), int(case.target_lengths[0])
    expected = fusedrnn.ctc_align(*given)
    log_probs = torch.tensor(given[0], requires_grad=True)
    found = fusedrnn.torch.ctc_align(log_probs, *(torch.tensor(a) for a in given[1:]))
    assert fusedrnn.torch.route() == "fused"
    for name in ("path", "starts", "stops", "scores", "log_probability"):
        got = getattr(found, name)
        assert isinstance(got, torch.Tensor) and not got.requires_grad
        np.testing.assert_array_equal(got.numpy(), getattr(expected, name))
    assert found.spans() == expected.spans()
    lists = [a.tolist() if isinstance(a, np.ndarray) else a for a in given[1:]]
    assert fusedrnn.torch.ctc_align(log_probs, *lists).spans() == expected.spans()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapter_aligns_a_copy_of_what_kernels_do_not_read(dtype):
    import fusedrnn.torch

    log_probs = torch.randn(9, 5).log_softmax(1).to(dtype)
    for given in (log_probs, log_probs.to_sparse()):
        found = fusedrnn.torch.ctc_align(given, torch.tensor([1, 2]))
        assert fusedrnn.torch.route() == f"fused, on a copy: {dtype} {given.layout} on cpu"
        expected = fusedrnn.ctc_align(log_probs.float().numpy(), [1, 2])
        assert found.spans() == expected.spans() and found.scores.dtype == torch.float32
    with pytest.raises(TypeError, match="log_probs has dtype int64"):
        fusedrnn.torch.ctc_align(torch.zeros(3, 2, dtype=torch.int64), [1])


def test_adapter_refuses_what_it_cannot_do():
    import fusedrnn.torch

    x = torch.randn(5, 1, 3, dtype=torch.float64).log_softmax(2).requires_grad_()
    loss = fusedrnn.torch.ctc_loss(x, torch.tensor([[1, 2]]), [5], [2])
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        gradient.sum().backward()
    with pytest.raises(ValueError, match="reduction is 'max'"):
        fusedrnn.torch.ctc_loss(x, torch.tensor([[1, 2]]), [5], [2], reduction="max")
    loss = fusedrnn.torch.ctc_loss(x, torch.tensor([[1, 2]]), [5], [2])
    with torch.no_grad():
        x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_docstrings_run():
    import fusedrnn.torch.ctc

    names = {"fusedrnn": fusedrnn, "np": np, "torch": torch}
    for module in (ctc, fusedrnn.torch.ctc):
        result = doctest.testmod(module, extraglobs=names)
        assert result.attempted and not result.failed
