# SPDX-License-Identifier: Apache-2.0
"""What torch.nn.LSTM, GRU and RNN (that is, cuDNN) cost per time step on this GPU.

    python bench/gpu_cudnn.py --out bench/results/MACHINE/cudnn.json --budget-seconds 300

Each point is the median over several calls queued one behind the other, with a CUDA event between two calls, after
warm-up: the rate a training loop sees, launch gaps included. `graph` points replay a captured CUDA graph of the same
call, without Python and without launch gaps. The most important points come first and the file is rewritten as the
points come in, so a run that is cut short keeps what it has.

Passes: `forward` is eval() under no_grad; `forward+backward` is train() and the gradients of input, weights and
biases. Input and hidden size are equal. T is 256, less where a pass would take longer than about 60 ms: every record
says its T. Inputs are random: zeros would run faster than real data.

`algorithm` is what PyTorch's rules ask cuDNN for (ATen/native/cudnn/RNN.cpp, get_algo); the `kernels` records show
what then ran. With --device cpu the script only checks itself, on tiny sizes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import time
import warnings

import torch

CELLS = {"lstm": (torch.nn.LSTM, 4), "gru": (torch.nn.GRU, 3), "rnn": (torch.nn.RNN, 1)}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}
RATES = {"fp16": 400e12, "bf16": 400e12, "tf32": 200e12, "fp32": 40e12}  # for a guess at the time, no more
PASSES = ("forward", "forward+backward")

ALL_H = (32, 64, 100, 128, 200, 256, 384, 500, 512, 650, 768, 1024, 1536, 2048)
ALL_B = (1, 8, 16, 32, 64, 100, 128, 256, 1024)
T = 256
LONGEST_MS = 60.0


def algorithm(cell: str, dtype: str, variant: str, B: int, H: int, device: dict) -> dict:
    """The cuDNN algorithm PyTorch asks for, by its own conditions in their order, forward and backward."""

    def ask(forward: bool) -> str:
        if variant.startswith("packed"):
            return "STANDARD"
        if device["major"] >= 6:
            small = (384 if forward else 256) if cell == "rnn" else (192 if forward else 128)
            if H <= small:
                return "PERSIST_STATIC_SMALL_H"
        shape = variant in ("dense", "graph") and H <= 1024 and H % 128 == 0 and B % 8 == 0 and B <= 128
        chip = device["major"] >= 8 and device["minor"] != 6 and device["multiprocessors"] >= 98
        kind = cell == "lstm" or (cell == "rnn" and (B < 96 or H < 896))
        return "PERSIST_STATIC" if dtype == "fp16" and shape and chip and kind else "STANDARD"

    return {"forward": ask(True), "backward": ask(False)}


def set_precision(dtype: str) -> None:
    loose = dtype != "fp32"
    torch.backends.cudnn.allow_tf32 = loose
    torch.backends.cuda.matmul.allow_tf32 = loose


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.cuda = args.device == "cuda"
        self.device = torch.device(args.device)
        self.out = args.out
        self.tiny = not self.cuda
        self.started = time.perf_counter()
        self.budget = args.budget_seconds
        self.saved = 0.0
        self.records: list[dict] = []
        self.done: set[tuple] = set()
        self.modules: dict[tuple, torch.nn.Module] = {}
        self.buffers: dict[torch.dtype, torch.Tensor] = {}
        self.info = {"major": 0, "minor": 0, "multiprocessors": 0}
        self.meta = {
            "what": "torch.nn recurrent layers (cuDNN), microseconds per time step",
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": driver_version() if self.cuda else None,
            "device": torch.cuda.get_device_name() if self.cuda else "cpu",
            "input_size": "equal to hidden_size",
            "timing": "median over queued calls, CUDA events between them",
        }
        if self.cuda:
            p = torch.cuda.get_device_properties(0)
            self.info = {"major": p.major, "minor": p.minor, "multiprocessors": p.multi_processor_count}
            self.meta |= self.info

    # ---- bookkeeping ----
    def left(self) -> float:
        return self.budget - (time.perf_counter() - self.started)

    def add(self, **record) -> None:
        self.records.append(record)
        if time.perf_counter() - self.saved > 2:
            self.save()

    def save(self, finished: bool = False) -> None:
        self.meta["seconds"] = round(time.perf_counter() - self.started, 1)
        self.meta["finished"] = finished
        self.meta["points"] = len(self.records)
        lines = ",\n".join("  " + json.dumps(r) for r in self.records)
        text = '{"meta": ' + json.dumps(self.meta) + ',\n "records": [\n' + lines + "\n ]}\n"
        with open(self.out + ".tmp", "w") as f:
            f.write(text)
        os.replace(self.out + ".tmp", self.out)
        self.saved = time.perf_counter()

    def random(self, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """A random tensor cut from one buffer per dtype: drawing anew for each point would eat the budget."""
        n = math.prod(shape)
        if dtype not in self.buffers or self.buffers[dtype].numel() < n:
            size = max(n, 1 << 26 if self.cuda else 1 << 16)
            self.buffers[dtype] = torch.randn(size, device=self.device).to(dtype)
        return self.buffers[dtype][:n].view(*shape)

    def module(self, cell: str, dtype: str, H: int, layers: int, bidirectional: bool) -> torch.nn.Module:
        key = (cell, DTYPES[dtype], H, layers, bidirectional)
        if key not in self.modules:
            if len(self.modules) > 4:
                self.modules.clear()
            kind = CELLS[cell][0]
            self.modules[key] = kind(H, H, layers, bidirectional=bidirectional, device=self.device, dtype=DTYPES[dtype])
        return self.modules[key]

    # ---- one call ----
    def call(self, cell: str, dtype: str, which: str, variant: str, B: int, H: int, steps: int):
        """A function that runs one pass."""
        layers = 2 if variant == "two layers" else 1
        both = variant == "bidirectional"
        rnn = self.module(cell, dtype, H, layers, both)
        train = which == "forward+backward"
        rnn.train(train)
        x = self.random(DTYPES[dtype], steps, B, H).detach()
        if train:
            x.requires_grad_()
        lengths = None
        if variant.startswith("packed"):
            g = torch.Generator().manual_seed(B * 4099 + H)
            lengths = torch.randint(1, steps + 1, (B,), generator=g)
            lengths = lengths.sort(descending=True).values
            lengths[0] = steps  # the longest row reaches T
        pack = torch.nn.utils.rnn.pack_padded_sequence
        pad = torch.nn.utils.rnn.pad_packed_sequence
        fixed = None
        if variant == "packed":
            with torch.no_grad():
                fixed = pack(x, lengths)
            if train:
                fixed = fixed._replace(data=fixed.data.requires_grad_())
        leaf = fixed.data if fixed is not None else x
        inputs = [leaf, *rnn.parameters()]
        dy = None

        def run():
            nonlocal dy
            if variant == "packed":
                y = rnn(fixed)[0].data
            elif variant == "packed, with packing and padding":
                y = pad(rnn(pack(x, lengths))[0], total_length=steps)[0]
            else:
                y = rnn(x)[0]
            if not train:
                return y
            if dy is None:
                dy = self.random(y.dtype, *y.shape).detach()
            return torch.autograd.grad(y, inputs, dy)

        def forward_only():
            with torch.no_grad():
                return run()

        return run if train else forward_only

    def steps_for(self, cell: str, dtype: str, which: str, variant: str, B: int, H: int) -> int:
        """T, shortened by halves while one pass would take longer than LONGEST_MS by a rough guess."""
        if self.tiny:
            return 6
        factor = 2 if variant in ("two layers", "bidirectional") else 1
        work = 2 * 2 * CELLS[cell][1] * H * H * B * factor * (3 if which != "forward" else 1)
        per_step = max(10e-6 * factor, work / RATES[dtype])
        steps = T
        while steps > 16 and steps * per_step * 1e3 > LONGEST_MS:
            steps //= 2
        return steps

    # ---- timing ----
    def sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def queue(self, run, n: int) -> list[float]:
        """Seconds of n calls in a row, each."""
        if not self.cuda:
            marks = [time.perf_counter()]
            for _ in range(n):
                run()
                marks.append(time.perf_counter())
            return [b - a for a, b in itertools.pairwise(marks)]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]
        events[0].record()
        for e in events[1:]:
            run()
            e.record()
        events[-1].synchronize()
        return [a.elapsed_time(b) * 1e-3 for a, b in itertools.pairwise(events)]

    def measure(self, run, warm: int = 2, target: float = 0.018, most: int = 60) -> tuple[float, float, int]:
        """Median and spread (quartile distance) in seconds, and how many calls."""
        for _ in range(warm):
            run()
        self.sync()
        first = min(self.queue(run, 2))
        n = max(3, min(most, math.ceil(target / max(first, 1e-6))))
        times = self.queue(run, n)
        if n >= 8:
            times = times[1:]  # the first one finds an idle GPU
        q = statistics.quantiles(times, n=4) if len(times) > 3 else [min(times), 0.0, max(times)]
        return statistics.median(times), q[2] - q[0], len(times)

    def point(self, cell: str, dtype: str, which: str, variant: str, B: int, H: int) -> None:
        key = (cell, dtype, which, variant, B, H)
        if key in self.done:
            return
        self.done.add(key)
        set_precision(dtype)
        steps = self.steps_for(*key)
        record = {"cell": cell, "dtype": dtype, "pass": which, "variant": variant, "T": steps, "B": B, "I": H, "H": H}
        try:
            run = self.call(cell, dtype, which, variant, B, H, steps)
            if variant == "graph":
                run = self.capture(run)
            median, spread, n = self.measure(run)
            record |= {
                "us_per_step": round(median / steps * 1e6, 4),
                "spread_us": round(spread / steps * 1e6, 4),
                "calls": n,
            }
        except Exception as e:
            record["error"] = f"{type(e).__name__}: {e}"[:300]
            self.modules.clear()
            if self.cuda:
                torch.cuda.empty_cache()
        asked = algorithm(cell, dtype, variant, B, H, self.info)
        record["algorithm"] = asked["forward"] if which == "forward" else f"{asked['forward']} / {asked['backward']}"
        record |= {k: self.meta[k] for k in ("torch", "cudnn", "driver")}
        self.add(**record)
        if self.cuda and torch.cuda.memory_reserved() > 60e9:
            torch.cuda.empty_cache()

    def capture(self, run):
        if not self.cuda:
            return run
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.kept = run()
        return graph.replay

    def sweep(self, name: str, cells, dtypes, Hs, Bs, variants=("dense",), passes=PASSES) -> None:
        """Points of one tier, one module at a time."""
        start = time.perf_counter()
        before = len(self.records)
        if self.tiny:
            Hs, Bs = (16,), (2, 4)
        for H in Hs:
            for cell in cells:
                for dtype in dtypes:
                    for variant in variants:
                        for B in Bs:
                            for which in passes:
                                if self.left() < 0:
                                    print(f"{name}: the budget was spent", flush=True)
                                    return
                                self.point(cell, dtype, which, variant, B, H)
        spent = time.perf_counter() - start
        print(f"{name}: {len(self.records) - before} points in {spent:.1f} s", flush=True)

    # ---- is it right, what ran, what could the products do ----
    def check(self) -> None:
        """Answers and gradients against float64 on the CPU; also tells strict fp32 from TF32."""
        for cell in CELLS:
            for dtype in DTYPES:
                set_precision(dtype)
                for H, B, steps in ((16, 2, 4),) if self.tiny else ((64, 8, 16), (256, 16, 24)):
                    record = {"kind": "check", "cell": cell, "dtype": dtype, "T": steps, "B": B, "I": H, "H": H}
                    try:
                        torch.manual_seed(H)
                        kind = CELLS[cell][0]
                        rnn = kind(H, H, device=self.device, dtype=DTYPES[dtype])
                        ref = kind(H, H, dtype=torch.float64)
                        ref.load_state_dict({k: v.detach().cpu().double() for k, v in rnn.state_dict().items()})
                        x = torch.randn(steps, B, H, device=self.device).to(DTYPES[dtype]).requires_grad_()
                        dy = torch.randn(steps, B, H, device=self.device).to(DTYPES[dtype])
                        xr = x.detach().cpu().double().requires_grad_()
                        y, yr = rnn(x)[0], ref(xr)[0]
                        got = torch.autograd.grad(y, [x, *rnn.parameters()], dy)
                        want = torch.autograd.grad(yr, [xr, *ref.parameters()], dy.cpu().double())
                        record["y_error"] = relative(y, yr)
                        record["dx_error"] = relative(got[0], want[0])
                        record["dR_error"] = relative(got[2], want[2])
                    except Exception as e:
                        record["error"] = f"{type(e).__name__}: {e}"[:300]
                    self.add(**record)

    def products(self) -> None:
        """What one large matrix product reaches: the ceiling of the time-parallel half of an RNN."""
        shapes = [(8192, 8192, 8192), (T * 64, 4096, 1024), (T * 16, 2048, 512)]
        for dtype in DTYPES:
            set_precision(dtype)
            for m, n, k in [(64, 64, 64)] if self.tiny else shapes:
                a = self.random(DTYPES[dtype], m, k)
                b = torch.randn(n, k, device=self.device).to(DTYPES[dtype])
                median, _, calls = self.measure(lambda a=a, b=b: torch.nn.functional.linear(a, b), target=0.03)
                self.add(
                    kind="product", dtype=dtype, m=m, n=n, k=k, calls=calls, us=round(median * 1e6, 2),
                    tflops=round(2 * m * n * k / median * 1e-12, 1),
                )  # fmt: skip

    def kernels(self) -> None:
        """Names of the kernels behind a dozen points. Last of all: a profiler may slow what follows it."""
        points = [
            ("lstm", "fp16", "forward+backward", "dense", 16, 768),
            ("lstm", "fp16", "forward", "dense", 1, 768),
            ("lstm", "bf16", "forward+backward", "dense", 16, 768),
            ("gru", "fp16", "forward+backward", "dense", 16, 768),
            ("lstm", "tf32", "forward", "dense", 16, 512),
            ("lstm", "fp32", "forward", "dense", 16, 512),
            ("lstm", "fp16", "forward+backward", "dense", 16, 128),
            ("lstm", "bf16", "forward", "dense", 64, 128),
            ("gru", "bf16", "forward+backward", "dense", 16, 64),
            ("gru", "tf32", "forward", "dense", 16, 128),
            ("lstm", "fp16", "forward", "bidirectional", 16, 512),
            ("lstm", "fp16", "forward", "packed", 16, 512),
            ("rnn", "fp16", "forward", "dense", 16, 512),
        ]
        from torch.profiler import ProfilerActivity, profile

        activity = ProfilerActivity.CUDA if self.cuda else ProfilerActivity.CPU
        for cell, dtype, which, variant, B, H in points:
            record = {"kind": "kernels", "cell": cell, "dtype": dtype, "pass": which, "variant": variant}
            steps = 6 if self.tiny else 64
            H = 16 if self.tiny else H
            record |= {
                "T": steps,
                "B": B,
                "I": H,
                "H": H,
                "algorithm": algorithm(cell, dtype, variant, B, H, self.info),
            }
            try:
                set_precision(dtype)
                run = self.call(cell, dtype, which, variant, B, H, steps)
                run()
                self.sync()
                with profile(activities=[activity]) as p:
                    run()
                    self.sync()
                names: dict[str, list] = {}
                for e in p.events():
                    if self.cuda and "CUDA" not in str(e.device_type):
                        continue
                    entry = names.setdefault(e.name[:200], [0, 0.0])
                    entry[0] += 1
                    entry[1] += e.time_range.elapsed_us()
                top = sorted(names.items(), key=lambda kv: -kv[1][1])[:8]
                record["kernels"] = [{"name": k, "count": c, "us": round(us, 1)} for k, (c, us) in top]
                record["launches"] = sum(c for c, _ in names.values())
            except Exception as e:
                record["error"] = f"{type(e).__name__}: {e}"[:300]
            self.add(**record)
            if self.left() < -40:
                return


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    got = got.detach().cpu().double()
    return float(f"{((got - want).norm() / want.norm()).item():.3g}")


def driver_version() -> str | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        v = pynvml.nvmlSystemGetDriverVersion()
        return v.decode() if isinstance(v, bytes) else v
    except Exception:
        return driver_version_from_proc()


def driver_version_from_proc() -> str | None:
    try:
        with open("/proc/driver/nvidia/version") as f:
            return f.read().split("Kernel Module")[1].split()[0].strip()
    except Exception:
        return None


def table(records: list[dict]) -> str:
    """The most important sizes, microseconds per step, forward / forward+backward."""
    found = {
        (r["cell"], r["dtype"], r["H"], r["B"], r["pass"]): r["us_per_step"]
        for r in records
        if r.get("variant") == "dense" and "us_per_step" in r
    }
    rows = ["cell dtype    H  " + "".join(f"{'B=' + str(b):>16}" for b in (1, 16, 64, 128))]
    for cell in CELLS:
        for dtype in DTYPES:
            for H in (128, 256, 512, 768, 1024):
                row = f"{cell:4} {dtype:4} {H:5}  "
                for B in (1, 16, 64, 128):
                    f, fb = (found.get((cell, dtype, H, B, p)) for p in PASSES)
                    row += f"{f:7.2f} /{fb:7.2f}" if f is not None and fb is not None else f"{'-':>16}"
                rows.append(row)
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="cudnn.json")
    parser.add_argument("--budget-seconds", type=float, default=300.0)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*TF32.*")
    torch.manual_seed(1)
    b = Bench(args)
    profile_time = min(25.0, 0.1 * args.budget_seconds)
    b.budget -= profile_time
    b.check()
    b.products()
    two, main_h, main_b = ("lstm", "gru"), (512, 768, 1024, 256, 128), (16, 64, 1, 128)
    b.sweep("main", two, DTYPES, main_h, main_b)
    b.sweep("graph", two, ("fp16", "bf16", "tf32"), (512, 1024, 256, 128, 64), (16, 64, 1), ("graph",))
    b.sweep("other batches", two, DTYPES, main_h, (8, 32, 100))
    b.sweep(
        "variants", two, ("fp16", "bf16", "tf32"), (256, 512, 1024, 128), (16, 64),
        ("packed", "bidirectional", "two layers", "packed, with packing and padding"),
    )  # fmt: skip
    b.sweep("small H", two, DTYPES, (64, 32), (16, 64, 1, 128, 8, 32, 256, 1024))
    b.sweep("odd H", two, DTYPES, (200, 384, 500, 650, 100), (16, 64, 1, 128, 100))
    b.sweep("large B", two, DTYPES, main_h, (256, 1024))
    b.sweep("large H", two, DTYPES, (1536, 2048), (16, 64, 1, 128, 8, 32, 100, 256, 1024))
    b.sweep("graph fp32", two, ("fp32",), (512, 256, 128), (16, 64, 1), ("graph",))
    b.sweep("rnn", ("rnn",), DTYPES, (512, 256, 1024, 128, 64, 768), (16, 64, 1, 128))
    b.sweep("rnn graph", ("rnn",), ("fp16", "bf16", "tf32"), (512, 256, 128), (16, 1), ("graph",))
    b.sweep("packed fp32", two, ("fp32",), (256, 512, 1024), (16, 64), ("packed", "bidirectional", "two layers"))
    b.sweep("all", CELLS, DTYPES, ALL_H, ALL_B)
    b.save()
    b.budget += profile_time
    b.kernels()
    b.save(finished=True)
    print(table(b.records))
    bad = [r for r in b.records if "error" in r]
    print(f"{len(b.records)} records, {len(bad)} errors, {b.meta['seconds']} s")
    for r in bad[:5]:
        print(r)
    for r in b.records:
        if r.get("kind") == "check":
            print("check", r["cell"], r["dtype"], r["H"], r.get("y_error"), r.get("dx_error"), r.get("dR_error"))


if __name__ == "__main__":
    main()
