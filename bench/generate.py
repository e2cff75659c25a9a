# SPDX-License-Identifier: Apache-2.0
"""Tokens per second of fusedrnn.generate against the same loop in torch: embedding, nn.LSTM, nn.Linear, multinomial.

    python bench/generate.py     writes bench/results/<machine>/generate.json

One thread, the same weights; greedy texts of both are compared first.
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

V, H, WIDTH, STEPS = 100, 256, 64, 200


def in_torch(
    embedding: torch.nn.Embedding,
    lstm: torch.nn.LSTM,
    head: torch.nn.Linear,
    prompt: torch.Tensor,
    greedy: bool = False,
) -> torch.Tensor:
    """The loop that one writes."""
    with torch.inference_mode():
        token, state, out = prompt, None, []
        for _ in range(STEPS):
            y, state = lstm(embedding(token)[None], state)
            logits = head(y[0])
            token = logits.argmax(-1) if greedy else torch.multinomial(logits.softmax(-1), 1)[:, 0]
            out.append(token)
        return torch.stack(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="alternated; the median is kept")
    parser.add_argument("--print", action="store_true", help="write nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    fusedrnn.set_num_threads(1)
    rows = []
    for B in (1, 32):
        embedding, lstm, head = torch.nn.Embedding(V, WIDTH), torch.nn.LSTM(WIDTH, H), torch.nn.Linear(H, V)
        layer = fusedrnn.LSTM(WIDTH, H).eval()
        layer.load_state_dict(lstm.state_dict())
        weight, bias = head.weight.detach().numpy(), head.bias.detach().numpy()
        prompt = np.arange(B)[None]
        given: dict[str, Any] = {"embedding": embedding.weight.detach().numpy()}
        greedy = fusedrnn.generate(layer, weight, bias, prompt, STEPS, temperature=0, **given)
        agree = (greedy == in_torch(embedding, lstm, head, torch.from_numpy(prompt[0]), True).numpy()).mean()
        assert agree > 0.9, f"greedy texts agree in {agree:.0%} of the tokens"
        times: dict[str, list[float]] = {"fusedrnn": [], "torch": []}
        for _ in range(options.repeats):
            begun = time.perf_counter()
            fusedrnn.generate(layer, weight, bias, prompt, STEPS, **given)
            middle = time.perf_counter()
            in_torch(embedding, lstm, head, torch.from_numpy(prompt[0]))
            times["fusedrnn"].append(middle - begun)
            times["torch"].append(time.perf_counter() - middle)
        row: dict[str, Any] = {"B": B, "H": H, "V": V, "embedding": WIDTH, "steps": STEPS}
        row |= {f"{name}_tokens_per_second": round(B * STEPS / statistics.median(t)) for name, t in times.items()}
        rows.append(row)
        print(row)
    if not options.print:
        machine.save({"rows": rows}, Path(__file__).parent / "results", "generate")


if __name__ == "__main__":
    main()
