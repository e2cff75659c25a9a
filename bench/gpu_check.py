# SPDX-License-Identifier: Apache-2.0
"""The PyTorch modules on a GPU: random calls against float64 on the CPU, and a soak on several streams.

    python bench/gpu_check.py random --count 1000 --seconds 300
    python bench/gpu_check.py soak --seconds 600

`random` takes cells, types, routes, sizes, lengths and resets at random; every answer and gradient is compared with the
same module in float64 on the CPU. `soak` repeats calls of mixed sizes on four streams at once; every answer must have
the bits of the first. Prints what failed, then a summary as JSON; the exit status is 1 if anything did. Put `timeout`
in front: a hang is a failure, too. (--device cpu tries the script itself.)
"""

import argparse
import collections
import contextlib
import json
import random
import sys
import time
from typing import Any

import torch

import fusedrnn.torch
from fusedrnn import backends

CELLS = ("LSTM", "GRU", "RNN")
# of the largest value of an answer; gradients four times as much
BUDGETS = {"float32": 2e-5, "3xtf32": 2e-5, "tf32": 2e-2, "float16": 2e-2, "bfloat16": 1e-1, "float64": 1e-11}
ROUTES = (None, "single", "cluster", "grid", "stepwise")


class Case:
    """A module, its input and the gradient of its output."""

    def __init__(self, seed: int, device: str) -> None:
        pick = random.Random(seed)
        torch.manual_seed(seed)
        self.seed, self.device = seed, device
        self.cell, self.kind = pick.choice(CELLS), pick.choice(list(BUDGETS))
        self.route = pick.choice(ROUTES)
        T, B = pick.choice([1, 2, 7, 33, 64]), pick.choice([1, 2, 5, 8, 16, 31, 64, 130])
        I = pick.choice([1, 8, 40, 77])  # noqa: E741
        H = pick.choice([1, 8, 33, 64, 100, 128, 200, 256, 384, 500, 512, 650, 768, 1000, 1024])
        if self.kind == "float64":
            H = min(H, 256)
        self.options = {"num_layers": pick.choice([1, 1, 2]), "bidirectional": pick.random() < 0.3}
        dtype = getattr(torch, "float32" if "tf32" in self.kind else self.kind)
        self.module = getattr(fusedrnn.torch, self.cell)(I, H, **self.options).to(device, dtype)
        self.x = torch.randn(T, B, I).to(device, dtype).requires_grad_()
        self.call: dict[str, Any] = {}
        if pick.random() < 0.4:
            self.call["lengths"] = torch.randint(0, T + 1, (B,))
        if pick.random() < 0.3:
            self.call["reset"] = torch.rand(T, B) < 0.1
        self.dy = torch.randn(T, B, H * (1 + self.options["bidirectional"])).to(device, dtype)

    def __str__(self) -> str:
        T, B, I = self.x.shape  # noqa: E741
        H = self.module.hidden_size
        return f"seed {self.seed}: {self.cell} {self.kind} T={T} B={B} I={I} H={H} {self.options} {sorted(self.call)}"

    def run(self) -> list[torch.Tensor]:
        """y and the gradients of x and of every parameter."""
        torch.backends.cudnn.allow_tf32 = self.kind == "tf32"
        cuda = backends.load("cuda")
        if cuda:
            cuda.set_route(self.route)
            cuda.set_float32("3xtf32" if self.kind == "3xtf32" else "strict")
        y, _ = self.module(self.x, **{k: v.to(self.device) for k, v in self.call.items()})
        return [y.detach(), *torch.autograd.grad(y, [self.x, *self.module.parameters()], self.dy)]

    def expected(self) -> list[torch.Tensor]:
        T, B, I = self.x.shape  # noqa: E741
        wide = getattr(fusedrnn.torch, self.cell)(I, self.module.hidden_size, **self.options).double()
        wide.load_state_dict({k: v.double().cpu() for k, v in self.module.state_dict().items()})
        x = self.x.detach().double().cpu().requires_grad_()
        y, _ = wide(x, **self.call)
        return [y.detach(), *torch.autograd.grad(y, [x, *wide.parameters()], self.dy.double().cpu())]

    def routes(self) -> str:
        cuda = backends.load("cuda")
        if self.device == "cpu" or not cuda:
            return fusedrnn.torch.route()
        return f"{cuda.last_route()}/{cuda.last_route(backward=True)}"


def same_bits(got: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(got, expected, strict=True))


def check_random(device: str, count: int, deadline: float) -> dict[str, Any]:
    seen: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0, 0.0])
    wrong = []
    for seed in range(count):
        if time.time() > deadline:
            break
        case = Case(seed, device)
        got, expected = case.run(), case.expected()
        row = seen[f"{case.cell} {case.kind} {case.routes()}"]
        worst = 0.0
        for n, (a, b) in enumerate(zip(got, expected, strict=True)):
            error = float((a.double().cpu() - b).abs().max()) if b.numel() else 0.0
            share = error / (BUDGETS[case.kind] * (4 if n else 1) * max(1.0, float(b.abs().max()) if b.numel() else 0))
            worst = max(worst, share if share == share else float("inf"))
        same = same_bits(got, case.run())
        row[0], row[2] = row[0] + 1, max(row[2], worst)
        if worst > 1 or not same:
            row[1] += 1
            wrong.append(f"{case} took {case.routes()}: {worst:.2g} of the budget, same bits {same}")
            print("WRONG", wrong[-1], flush=True)
    calls = int(sum(r[0] for r in seen.values()))
    return {"calls": calls, "wrong": wrong, "calls, wrong, worst share of the budget": dict(sorted(seen.items()))}


def soak(device: str, deadline: float) -> dict[str, Any]:
    cases = [Case(seed, device) for seed in range(1000, 1024)]
    first = [case.run() for case in cases]
    streams = [torch.cuda.Stream() for _ in range(4)] if device == "cuda" else [None]
    pick, calls, changed = random.Random(1), 0, []
    while time.time() < deadline:
        batch = [pick.randrange(len(cases)) for _ in range(64)]
        results = []
        for n, index in enumerate(batch):
            stream = streams[n % len(streams)]
            with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
                results.append(cases[index].run())
        if device == "cuda":
            torch.cuda.synchronize()
        for index, got in zip(batch, results, strict=True):
            calls += 1
            if not same_bits(got, first[index]):
                changed.append(str(cases[index]))
                print("CHANGED", changed[-1], flush=True)
    return {"calls": calls, "changed": changed}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["random", "soak"])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    deadline = time.time() + options.seconds
    fusedrnn.torch.use_cuda_kernels(True)
    if options.device == "cuda" and not backends.load("cuda"):
        sys.exit(f"no CUDA kernels here: {backends.missing('cuda')}")
    if options.what == "random":
        result = check_random(options.device, options.count, deadline)
    else:
        result = soak(options.device, deadline)
    print(json.dumps(result, indent=1))
    return 1 if result.get("wrong") or result.get("changed") else 0


if __name__ == "__main__":
    sys.exit(main())
