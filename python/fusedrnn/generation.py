# SPDX-License-Identifier: Apache-2.0
"""Generation: the layer reads a token, a linear head makes logits, a token is drawn and read next; all of it in C++."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from . import arrays, backends, check, ops
from . import params as parameters
from .backends import Arguments, Problem, Results
from .cells import dropout

_SLICE = 0.1  # seconds between two returns to Python, where Ctrl-C is heard


def generate(
    layer: Any,
    head_weight: np.ndarray,
    head_bias: np.ndarray | None,
    prompt: np.ndarray,
    steps: int,
    *,
    embedding: np.ndarray | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    state: Any = None,
    stop: int | None = None,
    return_state: bool = False,
) -> Any:
    """Write `steps` tokens after a prompt, each drawn from softmax((h head_weight^T + head_bias) / temperature).

    layer: an LSTM, GRU or RNN of one direction that takes tokens (input_size V), or, with `embedding` (V,I), their
    vectors. head_weight (V,H), head_bias (V,) or None: a torch.nn.Linear's. prompt: integers (T0,B), or (T0,) for one
    row, T0 >= 1, also with batch_first. temperature: 0 takes the largest logit. top_k: draw among so many of the
    largest. state: before the prompt, as the layer takes it. stop: a token that ends a row, which then repeats it.

    Returns the tokens, int64 (steps,B) or (steps,); with return_state also the state before the last of them is read,
    so a next call whose prompt is that token goes on (with the same seed it would repeat the random numbers: give
    another). No dropout. The same arguments give the same tokens on every backend, up to rounding of the logits: the
    random number of step n and row b is Philox4x32-10's with key `seed` and counter (n, b, 1).
    Raises TypeError or ValueError with what came, what was expected and why.

    >>> layer = fusedrnn.LSTM(5, 8, seed=0)
    >>> head = np.random.default_rng(0).standard_normal((5, 8), np.float32)
    >>> fusedrnn.generate(layer, head, None, np.array([1, 2]), 6, temperature=0).shape
    (6,)
    >>> fusedrnn.generate(layer, head, None, np.zeros((1, 3), int), 6, seed=1, stop=4).shape
    (6, 3)
    """
    op = "generate"
    steps = check.integer(op, "steps", steps, 0)
    seed = check.integer(op, "seed", seed, 0, 2**64 - 1)
    temperature = check.number(op, "temperature", temperature)
    if not 0 <= temperature < np.inf:
        check.fail(op, "temperature", f"is {temperature}", "a finite number >= 0", "0 takes the largest logit.")
    top_k = 0 if top_k is None else check.integer(op, "top_k", top_k, 1, 2**63 - 1)
    return_state = check.flag(op, "return_state", return_state)
    if layer.bidirectional:
        check.fail(op, "layer", "is bidirectional", "one direction", "The other would have to see what comes.")
    if layer.context_size:
        check.fail(op, "layer", f"has context_size={layer.context_size}", "a layer without a context")
    if layer._variant is not None:
        check.fail(
            op, "layer", f"has {', '.join(layer.variants)}", "a layer without these options", "See csrc/README.md."
        )
    params = parameters.from_bfloat16(layer.parameters)
    like = "the layer"
    V, H = _head(op, head_weight, head_bias, layer)
    if embedding is not None:
        check.is_float(op, "embedding", embedding, layer.dtype, like)
        if embedding.shape != (V, layer.input_size):
            fix = "One vector for each token that the head can draw."
            check.fail(op, "embedding", f"has shape {embedding.shape}", f"{(V, layer.input_size)} = (V, I)", fix)
        params["weight_ih_l0"] = params["weight_ih_l0"] @ embedding.T  # what a token adds, looked up from here on
    elif layer.input_size != V:
        fix = "Or pass embedding (V,I)."
        check.fail(op, "layer", f"has input_size={layer.input_size}", f"{V}, head_weight's rows", fix)
    stop = -1 if stop is None else check.integer(op, "stop", stop, 0, V - 1)
    prompt = check.is_array(op, "prompt", np.asarray(prompt) if isinstance(prompt, list | tuple) else prompt)
    if prompt.dtype.kind not in "iu" or prompt.ndim not in (1, 2) or len(prompt) < 1:
        got = f"is {arrays.kind(prompt)}"
        check.fail(op, "prompt", got, "integers (T0,B) or (T0,), T0 >= 1", "The first token must come from somewhere.")

    def run(tokens: np.ndarray, state: Any) -> Any:
        options = {"num_layers": layer.num_layers, "backend": layer.backend, **layer._options()}
        return getattr(ops, layer._op)(tokens, state, params, **options)

    _, state, _ = run(prompt[:-1], state)  # also checks everything; without a step it gives the state back
    last = prompt[-1:]
    if last.size and (last.min() < 0 or last.max() >= V):
        check.fail(op, "prompt", f"has tokens {last.min()}..{last.max()} at its end", f"0 <= token < {V}")
    rows = last.reshape(1, -1).astype(np.int64)
    drawn = np.empty((steps, rows.shape[1]), np.int64)
    ended = np.zeros(rows.shape[1], bool)
    options = {"temperature": temperature, "top_k": top_k, "stop": stop}
    chosen = backends.choose(layer.backend)
    if hasattr(chosen, "generate"):
        state = _in_slices(chosen, layer, params, head_weight, head_bias, rows, state, drawn, ended, seed, options)
    else:
        state = _plainly(run, head_weight, head_bias, rows, state, drawn, ended, prompt.ndim == 1, seed, options)
    tokens = drawn[:, 0] if prompt.ndim == 1 else drawn
    return (tokens, state) if return_state else tokens


def _head(op: str, weight: Any, bias: Any, layer: Any) -> tuple[int, int]:
    check.is_float(op, "head_weight", weight, layer.dtype, "the layer")
    if weight.ndim != 2 or weight.shape[1] != layer.hidden_size or len(weight) < 1:
        expected = f"(V, {layer.hidden_size}) = (V, H), V >= 1"
        check.fail(op, "head_weight", f"has shape {weight.shape}", expected, "As torch.nn.Linear(H, V).weight.")
    if bias is not None:
        check.is_float(op, "head_bias", bias, layer.dtype, "the layer")
        if bias.shape != weight.shape[:1]:
            check.fail(op, "head_bias", f"has shape {bias.shape}", f"{weight.shape[:1]}, head_weight's rows")
    return len(weight), weight.shape[1]


def _in_slices(
    native: Any,
    layer: Any,
    params: Any,
    head_weight: Any,
    head_bias: Any,
    tokens: np.ndarray,
    state: Any,
    drawn: np.ndarray,
    ended: np.ndarray,
    seed: int,
    options: dict[str, Any],
) -> Any:
    """The loop in C++, some steps a call: about _SLICE seconds of them."""
    pair = isinstance(state, tuple)
    shape = (layer.num_layers, 1, tokens.shape[1], layer.hidden_size)
    names = dict(zip(("h0", "c0"), state if pair else (state,), strict=False))
    now = {name: np.ascontiguousarray(a).reshape(shape) for name, a in names.items()}
    sizes = {"T": 1, "E": 1, "B": tokens.shape[1], "I": len(head_weight), "H": layer.hidden_size, "L": layer.num_layers}
    problem = Problem(layer._cell, **sizes, clip_cell=layer._clip_cell or 0.0, seed=seed)
    weights: list[Any] = []
    for number in range(layer.num_layers):
        parts = (params.get(f"{kind}_l{number}") for kind in parameters.KINDS)
        weights.append(tuple(None if a is None else a[None] for a in parts))
    first, size = 0, 16
    while first < len(drawn):
        part = drawn[first : first + size]
        given = Arguments(tokens[:, None], now["h0"], now.get("c0"), weights)
        after = {name: np.empty_like(a) for name, a in now.items()}
        begun = time.perf_counter()
        out = Results(hn=after["h0"], cn=after.get("c0"))
        native.generate(problem, given, out, head_weight, head_bias, part, ended, first, **options)
        seconds = time.perf_counter() - begun
        now, tokens = after, part[-1:]
        first += len(part)
        size = max(1, min(2 * size, int(size * _SLICE / max(seconds, 1e-9))))
    last = tuple(a.reshape(np.shape(given)) for a, given in zip(now.values(), state if pair else (state,), strict=True))
    return last if pair else last[0]


def _plainly(
    run: Any,
    head_weight: Any,
    head_bias: Any,
    tokens: np.ndarray,
    state: Any,
    drawn: np.ndarray,
    ended: np.ndarray,
    unbatched: bool,
    seed: int,
    options: dict[str, Any],
) -> Any:
    """The same, step by step in NumPy: what C++ does, to be read."""
    for step in range(len(drawn)):
        y, state, _ = run(tokens[:, 0] if unbatched else tokens, state)
        logits = y.reshape(-1, y.shape[-1]) @ head_weight.T
        if head_bias is not None:
            logits = logits + head_bias
        for row in range(len(ended)):
            if not ended[row]:
                token = draw(logits[row], seed, step, row, options["temperature"], options["top_k"])
                ended[row] = token == options["stop"]
            drawn[step, row] = options["stop"] if ended[row] else token
        tokens = drawn[step : step + 1]
    return state


@np.errstate(invalid="ignore", over="ignore")  # logits that are NaN
def draw(logits: np.ndarray, seed: int, step: int, row: int, temperature: float = 1.0, top_k: int = 0) -> int:
    """One token from logits (V,): by the inverse of the cumulative distribution, in float64.

    >>> fusedrnn.generation.draw(np.array([0.0, 9.0, 1.0]), seed=0, step=0, row=0)
    1
    """
    logits = logits.astype(np.float64)
    best = int(np.argmax(logits))
    if temperature == 0:
        return best
    weights = np.exp((logits - logits[best]) / temperature)
    if 0 < top_k < len(logits):
        weights[np.argsort(-logits, kind="stable")[top_k:]] = 0  # of equal logits the earlier ones stay
    numbers = (np.uint64(n) for n in (step & 0xFFFFFFFF, step >> 32, row, 1, seed & 0xFFFFFFFF, seed >> 32))
    high, low = (int(word) for word in dropout.philox(*numbers)[:2])
    u = ((high >> 5) * 2**26 + (low >> 6)) / 2**53
    reached = np.cumsum(weights)
    return min(int(np.searchsorted(reached, u * reached[-1], side="right")), len(logits) - 1)
