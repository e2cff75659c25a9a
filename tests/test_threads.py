# SPDX-License-Identifier: Apache-2.0
"""Threads: how many, several callers at once, the GIL, fork, a busy machine. Results have the same bits throughout."""

import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import fusedrnn

core = pytest.importorskip("fusedrnn._core", exc_type=ImportError)

SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")
LIMIT = 240 if SANITIZED else 60  # seconds after which something hangs


@pytest.fixture(autouse=True)
def restore_threads():
    before = fusedrnn.get_num_threads()
    yield
    fusedrnn.set_num_threads(before)


def lstm(T: int = 12, B: int = 8, H: int = 96, **options):
    layer = fusedrnn.LSTM(H, H, num_layers=2, bidirectional=True, seed=1, backend="native", **options)
    x = np.random.default_rng(0).standard_normal((T, B, H)).astype(layer.dtype)
    return layer, x


def everything(layer, x) -> list[np.ndarray]:
    """Forward and backward in training mode, forward in eval mode: all arrays that come out."""
    lengths = np.arange(x.shape[1]) % (x.shape[0] + 1)
    y, (h, c) = layer.train()(x, lengths=lengths)
    grads = layer.backward(np.cos(y), (h, c))
    out = [y, h, c, grads.pop("x"), *grads.pop("state"), *grads.values()]
    y, (h, c) = layer.eval()(x)
    return [*out, y, h, c]


def assert_same_bits(got, expected):
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def python(code: str, **environment: str) -> dict:
    """Runs code in a new interpreter; it prints one JSON object."""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=LIMIT
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


# ---- how many ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_any_number_of_threads_gives_the_same_bits(kind, dtype):
    for options, shape in (
        ({"num_layers": 2, "bidirectional": True}, (12, 8, 96)),
        ({"dropout": 0.3, "num_layers": 2}, (9, 33, 65)),
        ({}, (20, 1, 160)),
        ({"recompute": True}, (40, 3, 70)),
    ):
        results = []
        for threads in (1, 2, 3, 2, 7):
            fusedrnn.set_num_threads(threads)
            layer = getattr(fusedrnn, kind)(shape[-1], shape[-1], seed=1, dtype=dtype, backend="native", **options)
            x = np.random.default_rng(0).standard_normal(shape).astype(dtype)
            y, state = layer(x)
            grads = layer.backward(np.cos(y), state)
            dstate = grads.pop("state")
            results.append([y, *np.atleast_1d(*grads.values()), *(dstate if kind == "LSTM" else [dstate])])
        for other in results[1:]:
            assert_same_bits(other, results[0])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("kind", "options"), [("LSTM", {"recompute": True}), ("GRU", {}), ("GRU", {"reset_after": False}), ("RNN", {})]
)
def test_threads_that_share_the_rows_give_the_same_bits(kind, options, dtype):
    """Many rows and small weights: rows that end pass to another thread, at last one row is alive; restarts."""
    T, B, H = 11, 33, 40
    rng = np.random.default_rng(3)
    x = rng.standard_normal((T, B, H)).astype(dtype)
    lengths = np.r_[T, rng.integers(0, T, B - 3), T - 2, 0]
    reset = rng.random((T, B)) < 0.2
    results = []
    for threads in (1, 2, 2):
        fusedrnn.set_num_threads(threads)
        layer = getattr(fusedrnn, kind)(H, H, num_layers=2, seed=1, dtype=dtype, backend="native", **options)
        y, state = layer(x, lengths=lengths, reset=reset)
        grads = layer.backward(np.cos(y), state)
        again, last = layer.eval()(x)
        dstate = grads.pop("state")
        results.append([y, *grads.values(), again, *np.atleast_1d(*dstate), *np.atleast_1d(*state), last[0]])
    for other in results[1:]:
        assert_same_bits(other, results[0])


def test_set_num_threads():
    fusedrnn.set_num_threads(3)
    assert fusedrnn.get_num_threads() == 3
    seen = []
    thread = threading.Thread(target=lambda: seen.append(fusedrnn.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [3]  # it speaks for all Python threads
    with pytest.raises(ValueError, match="0"):
        core.set_num_threads(0)
    assert fusedrnn.get_num_threads() == 3


def test_environment_sets_the_number():
    code = "import json, fusedrnn._core as c; print(json.dumps(c.get_num_threads()))"
    assert python(code, OMP_NUM_THREADS="5") == 5
    assert python(code, OMP_NUM_THREADS="1") == 1


def test_threadpoolctl_sets_the_number():
    threadpoolctl = pytest.importorskip("threadpoolctl")
    fusedrnn.set_num_threads(2)
    layer, x = lstm()
    expected = everything(layer, x)
    with threadpoolctl.threadpool_limits(1):
        assert fusedrnn.get_num_threads() == 1
        assert_same_bits(everything(layer, x), expected)
    assert fusedrnn.get_num_threads() == 2
    assert any(pool["user_api"] == "openmp" for pool in threadpoolctl.threadpool_info())


def test_the_number_is_kept():
    """Nobody starts more threads than were asked for."""
    code = """
import json, os, numpy as np, fusedrnn
layer = fusedrnn.LSTM(128, 128, backend="native")
x = np.zeros((20, 32, 128), np.float32)
before = len(os.listdir("/proc/self/task"))
y, _ = layer(x)
layer.backward(y)
print(json.dumps(len(os.listdir("/proc/self/task")) - before))
"""
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("needs /proc")
    for threads in (1, 2, 3):
        assert python(code, OMP_NUM_THREADS=str(threads), OPENBLAS_NUM_THREADS="1") <= threads - 1


# ---- several callers -----------------------------------------------------------------------------------------------


def test_several_python_threads_at_once():
    layers = [lstm(T=9 + k, B=4 + k, H=40 + 16 * k) for k in range(4)]
    expected = [everything(layer, x) for layer, x in layers]
    failures: list[str] = []
    barrier = threading.Barrier(len(layers))

    def run(k: int) -> None:
        layer, x = layers[k]
        barrier.wait()
        try:
            for _ in range(5):
                assert_same_bits(everything(layer, x), expected[k])
        except BaseException as error:
            failures.append(repr(error))

    threads = [threading.Thread(target=run, args=(k,), daemon=True) for k in range(len(layers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
        assert not thread.is_alive(), "a call hangs"
    assert not failures, failures


def test_several_python_threads_share_a_lane():
    layer, x = lstm(T=10, B=16)
    layer.eval()
    expected = layer(x)[0].copy()
    single = fusedrnn.GRU(128, 128, seed=0, backend="native").eval()
    row = np.random.default_rng(0).standard_normal((64, 128)).astype(np.float32)
    expected_step = single.step(row)[0].copy()
    failures: list[str] = []

    def run() -> None:
        try:
            for _ in range(3 if SANITIZED else 20):
                np.testing.assert_array_equal(layer(x)[0], expected)
                single.step(row)  # whoever comes second takes the long way
        except BaseException as error:
            failures.append(repr(error))

    threads = [threading.Thread(target=run, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
        assert not thread.is_alive(), "a call hangs"
    assert not failures, failures
    np.testing.assert_allclose(single.step(row)[0], expected_step, atol=1e-6)


def test_large_work_releases_the_gil():
    """While one thread is inside a long call, another goes on."""
    fusedrnn.set_num_threads(1)
    layer = fusedrnn.LSTM(256, 256, num_layers=2, seed=0, backend="native")
    x = np.zeros((8 if SANITIZED else 200, 64, 256), np.float32)
    layer(x[:2])
    inside = threading.Event()
    spans: list[float] = []

    def run() -> None:
        inside.set()
        for call in (layer.train(), layer.eval()):
            begin = time.perf_counter()
            call(x)
            spans.append(time.perf_counter() - begin)

    thread = threading.Thread(target=run)
    ticks = 0
    interval = sys.getswitchinterval()
    thread.start()
    inside.wait(LIMIT)
    while thread.is_alive():
        time.sleep(0.001)
        ticks += 1
    # without the release there are at most a few switches around each call
    assert sum(spans) > 0.05, "the work is too small for this test"
    assert ticks > 10, (ticks, spans, interval)


def test_arrays_stay_alive_without_the_gil():
    """The weights leave the dict, and the caller's names end, while the kernels read them."""
    layer = fusedrnn.LSTM(128, 128, seed=0, backend="native").eval()
    x = np.random.default_rng(0).standard_normal((20 if SANITIZED else 200, 32, 128)).astype(np.float32)
    expected = layer(x)[0].copy()
    originals = layer.state_dict()
    for _ in range(5):
        layer.parameters.update({name: array.copy() for name, array in originals.items()})
        results: list[np.ndarray] = []
        thread = threading.Thread(target=lambda out=results: out.append(layer(x)[0]))
        thread.start()
        time.sleep(0.002)
        for name, array in originals.items():
            layer.parameters[name] = array  # drops the last reference to the copies
        _ = [np.full((512, 128), np.nan, np.float32) for _ in range(8)]  # would land in freed memory
        thread.join(LIMIT)
        np.testing.assert_array_equal(results[0], expected)


# ---- fork ----------------------------------------------------------------------------------------------------------


def in_child(queue, threads):
    layer, x = lstm()
    arrays = everything(layer, x)
    queue.put((fusedrnn.get_num_threads(), arrays))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("before", ["after a call", "before any call"])
def test_a_forked_child_works(before):
    fusedrnn.set_num_threads(2)
    layer, x = lstm()
    expected = everything(layer, x)
    context = multiprocessing.get_context("fork")
    if before == "before any call":  # from a thread that has no pool of its own
        out: list = []
        thread = threading.Thread(target=lambda: out.append(fork_once(context)))
        thread.start()
        thread.join(2 * LIMIT)
        threads, arrays = out[0]
    else:
        threads, arrays = fork_once(context)
    assert threads == 2
    assert_same_bits(arrays, expected)
    assert_same_bits(everything(layer, x), expected)  # the parent goes on


def fork_once(context):
    queue = context.Queue()
    child = context.Process(target=in_child, args=(queue, 2), daemon=True)
    child.start()
    try:
        result = queue.get(timeout=LIMIT)  # raises queue.Empty where the child hangs
    finally:
        child.join(5)
        if child.is_alive():
            child.kill()
    assert child.exitcode == 0
    return result


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_uses_its_threads():
    code = """
import json, os, numpy as np, fusedrnn
fusedrnn.set_num_threads(2)
layer = fusedrnn.LSTM(128, 128, backend="native")
x = np.zeros((20, 32, 128), np.float32)
layer(x)
fusedrnn._core.ignore_crowd(True)
read, write = os.pipe()
if os.fork() == 0:
    layer(x)
    os.write(write, str(len(os.listdir("/proc/self/task"))).encode())
    os._exit(0)
print(json.dumps(int(os.read(read, 10))))
"""
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("needs /proc")
    assert python(code, OPENBLAS_NUM_THREADS="1") == 2


# ---- a busy machine ------------------------------------------------------------------------------------------------


@pytest.fixture
def crowd():
    """Calls see how busy the machine is, as they do for users."""
    core.ignore_crowd(False)
    yield
    core.ignore_crowd(True)


@pytest.mark.slow
@pytest.mark.timing
@pytest.mark.usefixtures("crowd")
@pytest.mark.parametrize("spinning", [1, 2, 4])
def test_other_processes_do_not_slow_calls_beyond_one_thread(spinning):
    """A barrier that waits for a thread without a core would be thirty to a thousand times slower."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cases = [lstm(T=40, B=1, H=128), lstm(T=20, B=16, H=128)]
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(spinning * cores // 2)]
    try:
        time.sleep(0.2)
        for layer, x in cases:
            for call in (lambda: layer.eval()(x), lambda: layer.backward(layer.train()(x)[0])):  # noqa: B023
                medians = {}
                for threads in (1, cores):
                    fusedrnn.set_num_threads(threads)
                    times = []
                    for _ in range(30):
                        begin = time.perf_counter()
                        call()
                        times.append(time.perf_counter() - begin)
                    medians[threads] = sorted(times)[15]
                assert medians[cores] < 3 * medians[1] + 0.002, (spinning, medians)
    finally:
        for other in others:
            other.kill()
            other.wait()


# ---- signals -------------------------------------------------------------------------------------------------------

INTERRUPTED = """
import json, os, signal, threading, time
import numpy as np
import fusedrnn
{setup}
fusedrnn.set_num_threads({threads})
short()
expected = short()
pressed = []
def press():
    pressed.append(time.perf_counter())
    os.kill(os.getpid(), signal.SIGINT)
threading.Timer(0.1, press).start()
try:
    long()
    heard = None
except KeyboardInterrupt:
    heard = time.perf_counter() - pressed[0]
again = short()
print(json.dumps([heard, all(np.array_equal(a, b) for a, b in zip(expected, again, strict=True))]))
"""
LAYER = """
layer = fusedrnn.LSTM(128, 128, num_layers=2, bidirectional={both}, seed=0, backend="native")
few, many = (np.zeros((T, 8, 128), np.float32) for T in (20, 60_000 if {both} else 120_000))
"""
CALLS = {
    "forward": LAYER + "layer.eval()\nshort = lambda: [layer(few)[0]]\nlong = lambda: layer(many)\n",
    "torch": LAYER + "import torch\nimport fusedrnn.torch\nmodule = fusedrnn.torch.GRU(128, 128, num_layers=2)\n"
    "few, many = torch.from_numpy(few), torch.from_numpy(many)\n"
    "def run(x):\n    y, _ = module(x)\n    return torch.autograd.grad(y.sum(), module.weight_hh_l0)[0].numpy()\n"
    "short = lambda: [run(few)]\nlong = lambda: run(many)\n",
}


@pytest.mark.skipif(SANITIZED, reason="the calls are too short for the sanitizers' pace, or take too long")
@pytest.mark.parametrize("threads", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("call", ["forward", "torch"])
def test_ctrl_c_is_heard_inside_a_call(call, threads):
    """A call that would take many seconds ends within half of one; the next ones are right."""
    if call == "torch":
        pytest.importorskip("torch")
    setup = CALLS[call].format(both=threads == 2)
    heard, same = python(INTERRUPTED.format(setup=setup, threads=threads))
    assert heard is not None, "the call was over before the signal came"
    assert heard < (0.5 if "CI" not in os.environ else 2.0), heard
    assert same


LABELS = """
few, many = (np.log(np.full((T, 2, 40), 1 / 40, np.float32)) for T in (6000, 80_000))
labels = np.arange(5000)[None] % 39 + 1 + np.zeros((2, 1), int)
"""
LONG = {
    "ctc_loss": LABELS + "run = lambda x: [fusedrnn.ctc_loss(x, labels, [len(x)] * 2, [5000, 5000])]\n",
    "ctc_align": LABELS + "run = lambda x: [fusedrnn.ctc_align(x, labels).path]\n",
    "ctc_beam": "few, many = (np.log(np.full((T, 2, 40), 1 / 40, np.float32)) for T in (50, 20_000))\n"
    "run = lambda x: [np.array(fusedrnn.ctc_beam(x, beam_width=50)[0][0][0])]\n",
    "viterbi": "few, many = (np.zeros((T, 2, 64), np.float32) for T in (50, 400_000))\nfrom fusedrnn import hmm\n"
    "run = lambda x: [hmm.viterbi(x, np.zeros(64, np.float32), np.zeros((64, 64), np.float32))[0]]\n",
    "generate": "layer = fusedrnn.GRU(100, 256, backend='native')\nhead = np.zeros((100, 256), np.float32)\n"
    "few, many = 5, 1_000_000\nrun = lambda n: [fusedrnn.generate(layer, head, None, np.array([1]), n)]\n",
}


@pytest.mark.skipif(SANITIZED, reason="the calls are too short for the sanitizers' pace, or take too long")
@pytest.mark.parametrize("threads", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("call", LONG)
def test_ctrl_c_is_heard_in_other_long_calls(call, threads):
    setup = LONG[call] + "short = lambda: run(few)\nlong = lambda: run(many)\n"
    heard, same = python(INTERRUPTED.format(setup=setup, threads=threads))
    assert heard is not None, "the call was over before the signal came"
    assert heard < (0.5 if "CI" not in os.environ else 2.0), heard
    assert same


def test_a_training_call_that_a_signal_ends_leaves_no_tape():
    """Its tape took over the memory of the one before, and is half written."""
    code = """
import json, signal, numpy as np, fusedrnn
layer = fusedrnn.LSTM(64, 64, seed=0, backend="native"{options})
x = np.zeros(({steps}, 16, 64), np.float32)
y, _ = layer(x)
def handler(*_):
    raise TimeoutError
signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.12)
try:
    layer(x)
    said = "not ended"
except TimeoutError:
    try:
        layer.backward(y)
        said = "gradients"
    except RuntimeError as error:
        said = str(error)
y, _ = layer(x[:5])
layer.backward(y)
print(json.dumps(said))
"""
    for options in ("", ", dropout=0.5, num_layers=2"):
        said = python(code.format(options=options, steps=4000 if SANITIZED else 15_000))
        assert "the last call raised TimeoutError" in said, said


def test_a_handler_may_call_us():
    code = """
import json, os, signal, threading, time, numpy as np, fusedrnn
layer = fusedrnn.LSTM(64, 64, num_layers=2, seed=0, backend="native").eval()
few, many = np.zeros((20, 8, 64), np.float32), np.zeros(({steps}, 8, 64), np.float32)
expected, same = layer(few)[0].copy(), []
signal.signal(signal.SIGALRM, lambda *_: same.append(np.array_equal(layer(few)[0], expected)))
signal.setitimer(signal.ITIMER_REAL, 0.05, 0.15)
layer(many)
signal.setitimer(signal.ITIMER_REAL, 0)
print(json.dumps([len(same), all(same)]))
"""
    count, same = python(code.format(steps=2000 if SANITIZED else 20_000))
    assert count > 0 and same


def test_a_daemon_thread_in_a_call_does_not_disturb_the_end():
    """The interpreter ends while a call without the GIL goes on."""
    code = """
import json, threading, time, numpy as np, fusedrnn
layer = fusedrnn.LSTM(128, 128, num_layers=2, seed=0, backend="native").eval()
x = np.zeros((20_000, 8, 128), np.float32)
threading.Thread(target=layer, args=(x,), daemon=True).start()
time.sleep(0.25)
print(json.dumps("ended"))
"""
    assert python(code) == "ended"


# ---- other users of OpenMP -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["torch", "fusedrnn"])
def test_torch_beside_us(first):
    """torch brings its own libgomp under the same name: whoever comes first provides it for both."""
    pytest.importorskip("torch")
    code = f"""
import json, numpy as np
import {first}
import fusedrnn, torch
from fusedrnn import _core
torch.manual_seed(0)
theirs = torch.nn.LSTM(64, 64, num_layers=2)
ours = fusedrnn.LSTM(64, 64, num_layers=2, backend="native")
ours.load_state_dict({{name: p.detach().numpy() for name, p in theirs.named_parameters()}})
x = np.random.default_rng(0).standard_normal((50, 16, 64)).astype(np.float32)
worst = 0.0
for threads in (1, 2, 3):
    torch.set_num_threads(threads)
    fusedrnn.set_num_threads(threads)
    for _ in range(3):
        y, _ = ours(x)
        expected, _ = theirs(torch.from_numpy(x))
        worst = max(worst, float(abs(y - expected.detach().numpy()).max()))
    assert torch.get_num_threads() == threads == fusedrnn.get_num_threads()
print(json.dumps(worst))
"""
    assert python(code) < 1e-5
