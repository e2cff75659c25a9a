# SPDX-License-Identifier: Apache-2.0
"""Tokens per second of fusedrnn.generate against the same loop in torch: embedding, nn.LSTM, nn.Linear, multinomial.

    python bench/generate.py     writes bench/results/<machine>/generate.json

One thread, the same weights; greedy texts of both are compared first. Then what filters cost, for few tokens and many.
"""

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy is loaded

import numpy as np
import torch

import fusedrnn
from fusedrnn.bench import machine

H, WIDTH = 256, 64
STEPS = {100: 200, 10_000: 40}  # for V tokens
OPTIONS: list[dict[str, Any]] = [
    {},
    {"top_k": 40},
    {"top_p": 0.9},
    {"top_k": 40, "top_p": 0.9, "repetition_penalty": 1.2},
]


def in_torch(
    model: tuple[torch.nn.Embedding, torch.nn.LSTM, torch.nn.Linear],
    prompt: torch.Tensor,
    steps: int,
    greedy: bool = False,
    **options: Any,
) -> torch.Tensor:
    """The loop that one writes."""
    embedding, lstm, head = model
    with torch.inference_mode():
        token, state, out = prompt, None, []
        seen = torch.zeros(len(prompt), head.out_features, dtype=torch.bool).scatter_(1, prompt[:, None], True)
        for _ in range(steps):
            y, state = lstm(embedding(token)[None], state)
            logits = filtered(head(y[0]), seen, **options) if options else head(y[0])
            token = logits.argmax(-1) if greedy else torch.multinomial(logits.softmax(-1), 1)[:, 0]
            if "repetition_penalty" in options:
                seen.scatter_(1, token[:, None], True)
            out.append(token)
        return torch.stack(out)


def filtered(
    logits: torch.Tensor, seen: torch.Tensor, top_k: int = 0, top_p: float = 1.0, repetition_penalty: float = 1.0
) -> torch.Tensor:
    """By the definitions, as text libraries do it: a threshold, and a sort."""
    if repetition_penalty != 1:
        smaller = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
        logits = torch.where(seen, smaller, logits)
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        values, order = logits.sort(descending=True)
        mass = values.softmax(-1).cumsum(-1)
        gone = torch.zeros_like(mass, dtype=torch.bool)
        gone[:, 1:] = mass[:, :-1] >= top_p
        logits = logits.masked_fill(gone.scatter(1, order, gone), -torch.inf)
    return logits


def measure(B: int, V: int, repeats: int) -> list[dict[str, Any]]:
    model = torch.nn.Embedding(V, WIDTH), torch.nn.LSTM(WIDTH, H), torch.nn.Linear(H, V)
    embedding, lstm, head = model
    layer = fusedrnn.LSTM(WIDTH, H).eval()
    layer.load_state_dict(lstm.state_dict())
    weight, bias = head.weight.detach().numpy(), head.bias.detach().numpy()
    prompt, steps = np.arange(B)[None], STEPS[V]
    given: dict[str, Any] = {"embedding": embedding.weight.detach().numpy()}
    greedy = fusedrnn.generate(layer, weight, bias, prompt, steps, temperature=0, **given)
    agree = (greedy == in_torch(model, torch.from_numpy(prompt[0]), steps, True).numpy()).mean()
    assert agree > 0.9, f"greedy texts agree in {agree:.0%} of the tokens"
    rows = []
    for options in OPTIONS:
        times: dict[str, list[float]] = {"fusedrnn": [], "torch": []}
        for _ in range(repeats):
            begun = time.perf_counter()
            fusedrnn.generate(layer, weight, bias, prompt, steps, **given, **options)
            middle = time.perf_counter()
            in_torch(model, torch.from_numpy(prompt[0]), steps, **options)
            times["fusedrnn"].append(middle - begun)
            times["torch"].append(time.perf_counter() - middle)
        row: dict[str, Any] = {"B": B, "H": H, "V": V, "embedding": WIDTH, "steps": steps, **options}
        row |= {f"{name}_tokens_per_second": round(B * steps / statistics.median(t)) for name, t in times.items()}
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="alternated; the median is kept")
    parser.add_argument("--print", action="store_true", help="write nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    fusedrnn.set_num_threads(1)
    rows = [row for V in STEPS for B in (1, 32) for row in measure(B, V, options.repeats)]
    if not options.print:
        machine.save({"rows": rows}, Path(__file__).parent / "results", "generate")


if __name__ == "__main__":
    main()
