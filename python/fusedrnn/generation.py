# SPDX-License-Identifier: Apache-2.0
"""Generation: the layer reads a token, a linear head makes logits, a token is drawn and read next; all of it in C++."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from . import arrays, backends, check, layers, ops, sampling
from . import params as parameters
from .backends import Arguments, Generation, Problem, Results


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
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    state: Any = None,
    stop: Any = None,
    return_lengths: bool = False,
    return_log_probs: str | None = None,
    return_state: bool = False,
) -> Any:
    """Write `steps` tokens after a prompt, each drawn from softmax((h head_weight^T + head_bias) / temperature).

    layer: an LSTM, GRU, RNN, LiGRU, MinGRU or MinLSTM of one direction that takes tokens (input_size V), or, with
    `embedding` (V,I), their vectors. head_weight (V,H), or (V,P) with proj_size; head_bias (V,) or None: a
    torch.nn.Linear's. prompt: integers (T0,B), or (T0,) for one row, T0 >= 1, also with batch_first. state: before the
    prompt, as the layer takes it.

    How a token is drawn, in this order (sources and details: fusedrnn.sampling). repetition_penalty: logits of tokens
    that the row has seen, in this call's prompt or drawn, are divided by it where > 0 and multiplied by it elsewhere.
    temperature: 0 takes the largest logit. top_k: draw among so many of the largest (all, where there are not so many).
    top_p: of these among the fewest, largest first, whose probabilities sum to so much. Of equal logits the earlier are
    the larger ones. A logit of -inf is a token that is never drawn; NaN or inf, or -inf everywhere, are an error.

    stop: a token, or several. A row that has drawn one is finished: it repeats that token and costs nothing more, and
    the call ends when all rows are finished.

    Returns the tokens, int64 (steps,B) or (steps,); or a tuple of them and what is asked for, in this order:
    return_lengths: int64 (B,) or (): how many tokens each row has written, the stop token included.
    return_log_probs: float64 like the tokens, the logarithm of each token's probability in softmax(logits) as the model
    gives them ("model"), or in what it was drawn from after penalty, temperature and filters ("drawn"; 0 where
    temperature is 0). 0 where a row has finished, so the sum over steps is that of the row's text.
    return_state: of each row before its last token is read, so a next call whose prompt is that token goes on (with the
    same seed it would repeat the random numbers: give another).

    Ensembles: parameters with a leading axis E are E models, each of which writes a text of its own: tokens
    (steps,E,B), or (steps,E). head_weight, head_bias and embedding may then have the axis in front, prompt is (T0,E,B)
    or shared, and state as the layer takes it.

    No dropout. The same arguments give the same tokens on every backend, up to rounding of the logits: the random
    number of step n and row b (of set e: e * B + b) is Philox4x32-10's with key `seed` and counter (n, b, 1).
    Raises TypeError or ValueError with what came, what was expected and why.

    >>> layer = fusedrnn.LSTM(5, 8, seed=0)
    >>> head = np.random.default_rng(0).standard_normal((5, 8), np.float32)
    >>> fusedrnn.generate(layer, head, None, np.array([1, 2]), 6, temperature=0).shape
    (6,)
    >>> prompt = np.zeros((1, 3), int)
    >>> tokens, lengths = fusedrnn.generate(layer, head, None, prompt, 6, seed=1, stop=[3, 4], return_lengths=True)
    >>> tokens.shape, lengths.shape
    ((6, 3), (3,))
    """
    op = "generate"
    steps = check.integer(op, "steps", steps, 0)
    return_lengths = check.flag(op, "return_lengths", return_lengths)
    return_state = check.flag(op, "return_state", return_state)
    model = _model(op, layer, head_weight, head_bias, embedding)
    how = sampling.checked(
        op, model.V, temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty,
        seed=seed, stop=stop, return_log_probs=return_log_probs,
    )  # fmt: skip
    prompt = _prompt(op, prompt, model)
    state = model.run(prompt[:-1], state)  # also checks everything; without a step it gives the state back
    texts = model.texts(prompt, state, steps, how)
    chosen = backends.choose(layer.backend)
    for text in texts:
        _in_kernels(chosen, model, text, how) if hasattr(chosen, "generate") else _plainly(model, text, how)
    axes = (slice(None) if model.E else 0, 0 if prompt.ndim == 1 else slice(None))  # of E and B
    drawn = np.stack([text.drawn for text in texts], 1)
    results: list[Any] = [drawn[:, *axes]]
    if return_lengths:
        results.append(_lengths(drawn, how)[axes])
    if how.log_probs:
        results.append(np.stack([text.kept for text in texts], 1)[:, *axes])
    if return_state:
        parts = [np.stack(part, 1)[:, *axes] for part in zip(*(text.state for text in texts), strict=True)]
        results.append(tuple(parts) if isinstance(state, tuple) else parts[0])
    return results[0] if len(results) == 1 else tuple(results)


def _lengths(drawn: np.ndarray, how: sampling.Sampling) -> np.ndarray:
    ends = np.isin(drawn, how.stop)
    return np.where(ends.any(0), ends.argmax(0) + 1, len(drawn)) if len(drawn) else ends.sum(0)


@dataclass(slots=True)
class _Text:
    """What the rows of one weight set have written so far, and what they read next."""

    number: int  # of the set
    params: dict[str, np.ndarray]
    head_weight: np.ndarray
    head_bias: np.ndarray | None
    tokens: np.ndarray  # int64 (1,B): what is read next
    state: list[np.ndarray]  # h (L,B,H or P), and what else is carried (L,B,H): c, or a projected GRU's m
    drawn: np.ndarray  # int64 (steps,B)
    kept: np.ndarray  # float64: log-probabilities (steps,B), or (0,B) where they are not wanted
    seen: np.ndarray | None  # bool (B,V)
    ended: np.ndarray  # bool (B,)


@dataclass(slots=True)
class _Model:
    """A layer with its head, checked."""

    op: str
    layer: Any
    params: dict[str, np.ndarray]  # weight_ih_l0 takes tokens
    head_weight: np.ndarray  # (V,H) or (E,V,H)
    head_bias: np.ndarray | None  # (V,) or (E,V)
    E: int  # 0: no such axis

    @property
    def V(self) -> int:
        """How many tokens there are."""
        return int(self.head_weight.shape[-2])

    def run(self, tokens: np.ndarray, state: Any, params: Any = None) -> Any:
        """The state after the tokens."""
        layer = self.layer
        options = {"num_layers": layer.num_layers, "backend": layer.backend, **layer.variants, **layer._options()}
        return getattr(ops, layer._op)(tokens, state, self.params if params is None else params, **options)[1]

    def texts(self, prompt: np.ndarray, state: Any, steps: int, how: sampling.Sampling) -> list[_Text]:
        """One for each weight set, before anything is drawn."""
        return [self._text(e, prompt, state, steps, how) for e in range(self.E or 1)]

    def _text(self, e: int, prompt: np.ndarray, state: Any, steps: int, how: sampling.Sampling) -> _Text:
        def of_set(array: Any, axes: int) -> Any:
            return array[e] if array is not None and array.ndim > axes else array

        read = prompt[:, e] if prompt.ndim == 3 else prompt.reshape(len(prompt), -1)
        B, seen = read.shape[1], None
        if how.repetition_penalty != 1:
            seen = np.zeros((B, self.V), bool)
            seen[np.arange(B), read] = True
        parts = state if isinstance(state, tuple) else (state,)
        return _Text(
            number=e,
            params={name: of_set(a, len(check.weight_axes(name)) - 1) for name, a in self.params.items()},
            head_weight=of_set(self.head_weight, 2),
            head_bias=of_set(self.head_bias, 1),
            tokens=read[-1:].astype(np.int64),
            state=[(part[:, e] if self.E else part).reshape(len(part), B, part.shape[-1]) for part in parts],
            drawn=np.empty((steps, B), np.int64),
            kept=np.zeros((steps if how.log_probs else 0, B)),
            seen=seen,
            ended=np.zeros(B, bool),
        )

    def refuse(self, text: _Text, what: str, row: int, step: int) -> None:
        """Raise the error for a row from whose logits nothing can be drawn."""
        sampling.refuse(self.op, what, f"{row} of set {text.number}" if self.E else f"{row}", step)


def _model(op: str, layer: Any, head_weight: Any, head_bias: Any, embedding: Any) -> _Model:
    if not isinstance(layer, layers._Layer):
        fix = "For a torch module: layer.load_state_dict(module.state_dict())."
        check.fail(op, "layer", f"is {arrays.kind(layer)}", "a layer of fusedrnn, such as LSTM", fix, TypeError)
    if layer.bidirectional:
        check.fail(op, "layer", "is bidirectional", "one direction", "The other would have to see what comes.")
    if layer.context_size:
        check.fail(op, "layer", f"has context_size={layer.context_size}", "a layer without a context")
    params = parameters.from_bfloat16(layer.parameters)
    peepholes = layer._variant is not None and layer._variant.peepholes
    names = parameters.names(layer.num_layers, False, layer.bias, layer._cell, peepholes=peepholes)
    known = {name: params[name] for name in names if name in params}
    E = next((len(a) for name, a in known.items() if a.ndim == len(check.weight_axes(name))), None)
    if E == 0:
        check.fail(op, "layer", "has parameters of E = 0 weight sets", "E >= 1")
    if "weight_ih_l0" not in known or known["weight_ih_l0"].shape[-1:] != (layer.input_size,):
        got = f"has parameters {', '.join(f'{name} {a.shape}' for name, a in params.items())}"
        check.fail(op, "layer", got, f"weight_ih_l0 with input_size={layer.input_size} columns")
    V = _head(op, head_weight, head_bias, layer, E)
    if embedding is not None:
        check.is_float(op, "embedding", embedding, layer.dtype, "the layer")
        fix = "One vector for each token that the head can draw."
        _fits(op, "embedding", embedding, (V, layer.input_size), "V, I", E, fix)
        params["weight_ih_l0"] = params["weight_ih_l0"] @ embedding.swapaxes(-1, -2)  # what a token adds, looked up
    elif layer.input_size != V:
        fix = "Or pass embedding (V,I)."
        check.fail(op, "layer", f"has input_size={layer.input_size}", f"{V}, head_weight's rows", fix)
    return _Model(op, layer, params, head_weight, head_bias, E or 0)


def _fits(op: str, name: str, array: Any, shape: tuple[int, ...], letters: str, E: int | None, fix: str) -> None:
    """Fail unless an array has this shape, or that with the axis E in front where the parameters have one."""
    if array.shape == shape or (E and array.shape == (E, *shape)):
        return
    expected = f"{shape} = ({letters}{',' if len(shape) == 1 else ''})"
    if E:
        expected += f", or {(E, *shape)} = (E, {letters})"
    check.fail(op, name, f"has shape {array.shape}", expected, fix)


def _head(op: str, weight: Any, bias: Any, layer: Any, E: int | None) -> int:
    """How many tokens there are."""
    check.is_float(op, "head_weight", weight, layer.dtype, "the layer")
    projected = layer._variant.proj_size if layer._variant else 0
    units = projected or layer.hidden_size
    if (
        weight.ndim not in (2, 3)
        or weight.shape[-1] != units
        or weight.shape[-2] < 1
        or (weight.ndim == 3 and len(weight) != E)
    ):
        expected = f"(V, {units}) = (V, {'P' if projected else 'H'}), V >= 1"
        if E:
            expected += f", or with E = {E} in front"
        check.fail(op, "head_weight", f"has shape {weight.shape}", expected, f"As torch.nn.Linear({units}, V).weight.")
    V = int(weight.shape[-2])
    if bias is not None:
        check.is_float(op, "head_bias", bias, layer.dtype, "the layer")
        _fits(op, "head_bias", bias, (V,), "V", E, "One for each of head_weight's rows.")
    return V


def _prompt(op: str, prompt: Any, model: _Model) -> np.ndarray:
    if isinstance(prompt, list | tuple):
        prompt = check.numbers(op, "prompt", prompt, "integers (T0,B) or (T0,)")
    array = check.is_whole(op, "prompt", check.is_array(op, "prompt", prompt))
    fix = "The first token must come from somewhere."
    most = 3 if model.E else 2
    if array.dtype.kind not in "iu" or not 1 <= array.ndim <= most or len(array) < 1:
        expected = "integers (T0,B) or (T0,), T0 >= 1" + (", or (T0,E,B)" if model.E else "")
        check.fail(op, "prompt", f"is {arrays.kind(array)}", expected, fix)
    if array.ndim == 3 and array.shape[1] != model.E:
        expected = f"(T0, {model.E}, B) = (T0, E, B)"
        check.fail(op, "prompt", f"has shape {array.shape}", expected, "One axis for the weight sets.")
    wrong = (array < 0) | (array >= model.V)
    if wrong.any():
        place = tuple(int(n) for n in np.argwhere(wrong)[0])
        got = f"has token {array[place]} (at {list(place)})"
        check.fail(op, "prompt", got, f"0 <= token < {model.V}, head_weight's rows")
    return array


def _in_kernels(native: Any, model: _Model, text: _Text, how: sampling.Sampling) -> None:
    """The loop in C++."""
    layer, B = model.layer, len(text.ended)
    sizes = {"T": 1, "E": 1, "B": B, "I": model.V, "H": layer.hidden_size, "L": layer.num_layers}
    problem = Problem(layer._cell, **sizes, clip_cell=layer._clip_cell or 0.0, seed=how.seed, variant=layer._variant)

    def of_layers(kinds: tuple[str, ...]) -> list[Any]:
        found = [[text.params.get(f"{kind}_l{number}") for kind in kinds] for number in range(layer.num_layers)]
        return [tuple(None if a is None else a[None] for a in parts) for parts in found]

    stop = np.array(how.stop, np.int64)
    g = Generation(text.head_weight, text.head_bias, text.drawn, text.ended[None], stop, text.seen)
    g.log_probs = text.kept if how.log_probs else None
    g.of_model, g.first_row = how.log_probs == "model", text.number * B
    g.temperature, g.top_k, g.top_p, g.repetition_penalty = (
        how.temperature, how.top_k, how.top_p, how.repetition_penalty,
    )  # fmt: skip
    given = Arguments(text.tokens[:, None], params=of_layers(parameters.KINDS))
    if layer._variant is not None:
        given.extras = of_layers(parameters.EXTRAS)
    given.h0, given.c0 = [*(a[:, None] for a in text.state), None][:2]
    after = [np.empty_like(a) for a in text.state]
    failure = native.generate(problem, given, Results(None, *(a[:, None] for a in after)), g)
    if failure:
        step, row, what = failure
        model.refuse(text, what, row, step)
    text.state = after


@np.errstate(invalid="ignore", over="ignore")  # `draw` tells of it
def _plainly(model: _Model, text: _Text, how: sampling.Sampling) -> None:
    """The same, step by step in NumPy: what C++ does, to be read."""
    head = text.head_weight.T
    text.state = [a.copy() for a in text.state]
    for step in range(len(text.drawn)):
        live = np.flatnonzero(~text.ended)
        if not len(live):
            text.drawn[step:] = text.tokens
            return
        before = [a[:, live] for a in text.state]
        after = model.run(text.tokens[:, live], tuple(before) if len(before) == 2 else before[0], text.params)
        for whole, part in zip(text.state, after if len(before) == 2 else (after,), strict=True):
            whole[:, live] = part
        logits = text.state[0][-1, live] @ head
        if text.head_bias is not None:
            logits = logits + text.head_bias
        text.drawn[step] = text.tokens[0]
        for row, line in zip(live.tolist(), logits, strict=True):
            seen = None if text.seen is None else text.seen[row]
            token, log_prob, what = sampling.draw(line, how, step, text.number * len(text.ended) + row, seen)
            if what:
                model.refuse(text, what, row, step)
            text.drawn[step, row] = token
            text.ended[row] = token in how.stop
            if seen is not None:
                seen[token] = True
            if how.log_probs:
                text.kept[step, row] = log_prob
        text.tokens = text.drawn[step : step + 1]
