# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: B023, E501  (what is timed is called at once, inside its own loop; tables are wide)
"""Check and time the CUDA kernels on a GPU: `python bench/gpu_kernels.py api check time`.

api: the whole backend (csrc/cuda/cuda.h) against the float64 reference, every cell, type and route, forward and
backward, twice for the same bits. apitime: forward and forward+backward, with and without recompute, beside torch.nn
(cuDNN); and their tapes. check, time: the forward kernels variant by variant, for choosing among them. sanitize: a few
small sizes, for compute-sanitizer. Every time is a median beside torch's in the same run, with the input product
included on both sides. Writes kernels.json into $OUT. Needs torch and NumPy; builds the library if it is not there.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import time

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
SINGLE, CLUSTER, GRID = 0, 1, 2
DEV = "cuda"


def build() -> ctypes.CDLL:
    path = ROOT / ".gpu" / "libkernels.so"
    sources = [ROOT / "bench" / "gpu_kernels.cu", ROOT / "bench" / "gpu_kernels.inc", *(ROOT / "csrc").rglob("*.h")]
    if not path.exists() or ("build" in sys.argv and max(s.stat().st_mtime for s in sources) > path.stat().st_mtime):
        path.parent.mkdir(exist_ok=True)
        flags = ["-std=c++20", "-O3", "-gencode", "arch=compute_90a,code=sm_90a", "-lineinfo", "-Xcompiler", "-fPIC"]
        flags += [f"-I{ROOT / 'csrc' / 'cuda'}", f"-I{ROOT / 'bench'}"]
        flags.append('-DFUSEDRNN_CUDA_ARCHITECTURES="sm_90a"')
        cuda = ROOT / "csrc" / "cuda"
        units = [ROOT / "bench" / "gpu_kernels.cu", *cuda.glob("*.cu"), cuda / "entry.cpp"]
        objects = [path.parent / (u.stem + ".o") for u in units]
        running = [subprocess.Popen(["nvcc", *flags, "-c", u, "-o", o]) for u, o in zip(units, objects, strict=True)]
        assert all([p.wait() == 0 for p in running]), "nvcc failed"
        subprocess.run(["nvcc", "-shared", *map(str, objects), "-o", str(path), "-ldl"], check=True)
    lib = ctypes.CDLL(str(path))
    lib.name.restype = ctypes.c_char_p
    lib.pieces.restype = ctypes.c_int64
    return lib


P, I, L64, F, B8 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_bool


class Walk(ctypes.Structure):
    _fields_ = [
        *[(n, I) for n in "T B H pitch sets directions s".split()],
        ("reverse", B8), ("reset_to_initial", B8),
        ("lengths", P), ("len_e", L64), ("len_b", L64),
        ("reset", P), ("reset_t", L64), ("reset_e", L64), ("reset_b", L64),
        ("begin", I), ("begin_d", I),
    ]  # fmt: skip


class ForwardArgs(Walk):
    _fields_ = [
        *[(n, I) for n in "peers row_tiles first_team".split()],
        ("keep", B8), ("wide", B8), ("clip_cell", F),
        *[(n, P) for n in "weights bias gx extra cells prev h0 c0 y hn cn".split()],
        *[(n, L64) for n in "y_t y_b y_e y_d".split()],
        ("marks", P), ("marks_shift", I), ("slots", I), ("hand_off", P), ("late", P),
    ]  # fmt: skip


def ptr(t: torch.Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def stream() -> P:
    return P(torch.cuda.current_stream().cuda_stream)


CELLS = {"Lstm": 4, "Gru": 3, "Tanh": 1, "Relu": 1}
SUMS = {"Lstm": 4, "Gru": 4, "Tanh": 1, "Relu": 1}
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16} | dict.fromkeys(("TF32", "TF32x3", "F32"), torch.float32)


class Kernel:
    def __init__(self, lib: ctypes.CDLL, index: int) -> None:
        self.lib, self.index = lib, index
        self.name = lib.name(index).decode()
        parts = [p.strip() for p in self.name.split(",")]
        self.cell, self.type, self.dtype = parts[0], parts[1], DTYPES[parts[1]]
        out = (ctypes.c_int64 * 7)()
        lib.info(index, out)
        self.route, self.gates, self.rows, self.units, self.depth, self.bytes, self.shared = out

    def peers(self, H: int) -> int:
        return 1 if self.route == SINGLE else -(-H // self.units)

    def fits(self, H: int, B: int, sets: int = 1) -> bool:
        peers = self.peers(H)
        if H > self.depth or (self.route == SINGLE and H > self.units):
            return False
        if self.route == CLUSTER:
            return peers <= 16
        return self.route == SINGLE or peers * -(-B // self.rows) * sets <= 132


class Run:
    """One forward call with all its buffers."""

    def __init__(self, k: Kernel, T: int, B: int, H: int, D: int = 1, keep: bool = False) -> None:
        self.k, self.T, self.B, self.H, self.D = k, T, B, H, D
        self.pitch, self.peers = -(-H // 8) * 8, k.peers(H)
        G, nan = k.gates, float("nan")

        def make(*shape: int) -> torch.Tensor:
            return torch.full(shape, nan, dtype=k.dtype, device=DEV)

        self.gx = make(D, T, B, G, self.pitch)
        self.y = make(T, B, D * H)
        self.hn, self.cn = make(D, B, H), make(D, B, H)
        self.extra, self.cells, self.prev = (make(D, T, B, self.pitch) for _ in range(3))
        self.packed = torch.empty(D * k.lib.pieces(k.index, self.peers) * 4, dtype=torch.int32, device=DEV)
        self.late = torch.zeros(1, dtype=torch.int32, device=DEV)
        tiles = -(-B // k.rows)
        self.hand_off = None
        if k.route == GRID:
            self.hand_off = torch.empty(D * (T + 1) * tiles * k.rows * self.pitch, dtype=k.dtype, device=DEV).view(
                torch.uint8
            )
        a = self.args = ForwardArgs()
        a.T, a.B, a.H, a.pitch, a.sets, a.directions, a.peers, a.row_tiles = (
            T,
            B,
            H,
            self.pitch,
            D,
            D,
            self.peers,
            tiles,
        )
        a.keep, a.wide = keep, H % 8 == 0
        a.weights, a.gx, a.extra, a.cells, a.prev = (
            ptr(t) for t in (self.packed, self.gx, self.extra, self.cells, self.prev)
        )
        a.y, a.hn, a.cn = ptr(self.y), ptr(self.hn), ptr(self.cn)
        a.y_t, a.y_b, a.y_e, a.y_d = B * D * H, D * H, 0, H
        a.hand_off, a.late = ptr(self.hand_off), ptr(self.late)

    def pack(self, R: torch.Tensor) -> None:  # (D, G*H, H)
        k = self.k
        status = k.lib.pack(
            k.index,
            P(ptr(R)),
            L64(R.stride(0)),
            L64(R.stride(1)),
            P(ptr(self.packed)),
            self.H,
            self.peers,
            self.D,
            stream(),
        )
        assert status == 0, f"pack {status}"

    def launch(self) -> None:
        if self.hand_off is not None:
            self.hand_off.fill_(255)
        status = self.k.lib.forward(self.k.index, ctypes.byref(self.args), stream())
        assert status == 0, f"{self.k.name} H={self.H} B={self.B}: CUDA status {status}"


def reference(cell, gx, R, bias, h0, c0, lengths, reset, to_initial, reverse, clip):
    """One direction in float64. gx (T,B,G,H); bias (sums,H). Returns y, hn, cn (differentiable)."""
    T, B, G, H = gx.shape
    R = R.view(G, H, H)
    h, c = h0, c0
    rows = torch.arange(B, device=gx.device)
    lens = lengths if lengths is not None else torch.full((B,), T, device=gx.device)
    contrib = torch.zeros(T, B, H, dtype=gx.dtype, device=gx.device)
    for s in range(T):
        on = (s < lens)[:, None]
        t = torch.where(s < lens, lens - 1 - s, s) if reverse else torch.full_like(lens, s)
        if reset is not None:
            b = t + 1 if reverse else t
            inside = (b < lens) & (s < lens)
            cut = inside & (reset[b.clamp(max=T - 1), rows] != 0)
            if reverse:
                cut &= s > 0
            cut = cut[:, None]
            h = torch.where(cut, h0 if to_initial else torch.zeros_like(h), h)
            c = torch.where(cut, c0 if to_initial else torch.zeros_like(c), c)
        x = gx[t, rows]
        p = torch.einsum("bk,gjk->bgj", h, R)
        if cell == "Lstm":
            a = x + p + bias
            i, f, o = torch.sigmoid(a[:, 0]), torch.sigmoid(a[:, 1]), torch.sigmoid(a[:, 3])
            cn = f * c + i * torch.tanh(a[:, 2])
            if clip > 0:
                cn = cn.clamp(-clip, clip)
            hn = o * torch.tanh(cn)
        elif cell == "Gru":
            r, z = torch.sigmoid(x[:, 0] + p[:, 0] + bias[0]), torch.sigmoid(x[:, 1] + p[:, 1] + bias[1])
            n = torch.tanh(x[:, 2] + bias[2] + r * (p[:, 2] + bias[3]))
            hn, cn = n + z * (h - n), c
        else:
            a = x[:, 0] + p[:, 0] + bias[0]
            hn, cn = (torch.tanh(a) if cell == "Tanh" else torch.relu(a)), c
        h, c = torch.where(on, hn, h), torch.where(on, cn, c)
        contrib = contrib.index_put((t, rows), torch.where(on, hn, torch.zeros_like(hn)))
    return contrib, h, c


def rel(out: torch.Tensor, ref: torch.Tensor) -> float:
    out = out.double()
    if not torch.isfinite(out).all():
        return float("inf")
    return ((out - ref).norm() / ref.norm().clamp_min(1e-30)).item()


BUDGET = {"BF16": 1.2e-2, "F16": 2e-3, "TF32": 2e-3, "TF32x3": 2e-6, "F32": 2e-6}


def check_one(k: Kernel, T: int, B: int, H: int, D: int, mode: str, seed: int) -> tuple[float, str]:
    gen = torch.Generator(device=DEV).manual_seed(seed)

    def rnd(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=gen, device=DEV) * scale).to(k.dtype)

    G, S = k.gates, SUMS[k.cell]
    r = Run(k, T, B, H, D, keep="keep" in mode)
    gx, R = rnd(D, T, B, G, H), rnd(D, G * H, H, scale=1 / math.sqrt(H))
    h0, c0 = rnd(D, B, H), rnd(D, B, H)
    bias = torch.zeros(D, S, r.pitch, device=DEV)
    bias[:, :, :H] = torch.randn(D, S, H, generator=gen, device=DEV) * 0.5
    r.gx[..., :H] = gx
    a = r.args
    if "state" in mode:
        a.h0, a.c0 = ptr(h0), ptr(c0)
    else:
        h0, c0 = torch.zeros_like(h0), torch.zeros_like(c0)
    a.bias = ptr(bias)
    lengths = reset = None
    if "len" in mode:
        lengths = torch.randint(0, T + 1, (B,), generator=gen, device=DEV)
        a.lengths, a.len_b = ptr(lengths), 1
    if "reset" in mode:
        reset = (torch.rand(T, B, generator=gen, device=DEV) < 0.3).to(torch.uint8)
        a.reset, a.reset_t, a.reset_b = ptr(reset), B, 1
    a.reset_to_initial = "initial" in mode
    a.reverse = "reverse" in mode
    a.clip_cell = 0.7 if "clip" in mode else 0.0
    r.pack(R)
    r.launch()
    torch.cuda.synchronize()
    worst = 0.0
    for d in range(D):
        y, hn, cn = reference(
            k.cell, gx[d].double(), R[d].double(), bias[d, :, :H].double(), h0[d].double(), c0[d].double(), lengths, reset,
            "initial" in mode, d == 1 or "reverse" in mode, a.clip_cell,
        )  # fmt: skip
        worst = max(worst, rel(r.y[:, :, d * H : d * H + H], y), rel(r.hn[d], hn))
        if k.cell == "Lstm":
            worst = max(worst, rel(r.cn[d], cn))
        # the tape, against itself: y can be had back from it
        if "keep" in mode:
            t = r.gx[d, ..., :H].double()
            on = (
                torch.arange(T, device=DEV)[:, None]
                < (lengths if lengths is not None else torch.full((B,), T, device=DEV))[None]
            )
            prev = r.prev[d, ..., :H].double()
            if k.cell == "Lstm":
                again = t[:, :, 3] * torch.tanh(r.cells[d, ..., :H].double())
            elif k.cell == "Gru":
                again = t[:, :, 2] + t[:, :, 1] * (prev - t[:, :, 2])
            else:
                again = t[:, :, 0]
            worst = max(worst, rel(torch.where(on[..., None], again, 0.0), y))
    if int(r.late):
        return float("inf"), "a wait was given up"
    return worst, ""


MODES = ["", "state keep", "state len reset initial reverse keep clip", "state len reset keep", "state reset reverse"]


def check(kernels: list[Kernel], few: bool) -> list[dict]:
    rows = []
    for k in kernels:
        worst, note, n = 0.0, "", 0
        cap = min(k.depth, k.units if k.route == SINGLE else k.units * (16 if k.route == CLUSTER else 128))
        sizes = (
            [(cap, k.rows), (cap - 5, k.rows + 3), (max(3, cap * 2 // 3 + 1), 1)] if not few else [(min(cap, 45), 3)]
        )
        for i, mode in enumerate(MODES):
            for j, (H, B) in enumerate(sizes):
                D = 2 if (i + j) % 3 == 1 and "reverse" not in mode else 1
                if not few and (i + j) % 2 and i:
                    continue
                if not k.fits(H, B, D):
                    continue
                try:
                    err, why = check_one(k, 7, B, H, D, mode, 17 * i + j)
                except Exception as ex:
                    err, why = float("inf"), str(ex).splitlines()[0][:90]
                    if "CUDA error" in str(ex):
                        print(k.name, H, B, D, mode, why, flush=True)
                        raise
                n += 1
                if not err <= worst:
                    worst, note = err, f"H={H} B={B} D={D} '{mode}' {why}"
        ok = worst <= BUDGET[k.type]
        rows.append({"kernel": k.name, "cases": n, "error": worst, "ok": ok, "where": note})
        if not ok:
            print(f"FAIL {k.name:46s} {n:2d} {worst:9.2e} {note}", flush=True)
    good = [r for r in rows if r["ok"]]
    print(f"check: {len(good)} of {len(rows)} kernels within budget, {sum(r['cases'] for r in rows)} cases")
    for t in DTYPES:
        e = [r["error"] for r in good if r["kernel"].split(",")[1].strip() == t]
        if e:
            print(f"  {t}: worst relative error {max(e):.2e}")
    return rows


def timed(fn, reps: int = 11, graph: bool = True) -> float:
    """Median time of fn in microseconds, by events, replayed as a CUDA graph where that can be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            fn()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    call = fn
    if graph:
        try:
            g = torch.cuda.CUDAGraph()
            with torch.cuda.graph(g):
                fn()
            call = g.replay
        except Exception as ex:
            print("no graph:", str(ex).splitlines()[0])
    times = []
    for _ in range(reps):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        call()
        b.record()
        b.synchronize()
        times.append(a.elapsed_time(b) * 1e3)
    return statistics.median(times)


def rival(cell: str, dtype: torch.dtype, T: int, B: int, H: int, grad: bool) -> dict:
    cls = {"Lstm": torch.nn.LSTM, "Gru": torch.nn.GRU, "Tanh": torch.nn.RNN}[cell]
    m = cls(H, H).to(DEV, dtype)
    x = torch.randn(T, B, H, device=DEV, dtype=dtype)
    out = {}
    with torch.no_grad():
        out["forward"] = timed(lambda: m(x)) / T
        out["eager"] = timed(lambda: m(x), graph=False) / T
    if grad:
        x.requires_grad_()
        dy = torch.randn(T, B, H, device=DEV, dtype=dtype)

        def both() -> None:
            y, _ = m(x)
            torch.autograd.grad(y, [x, *m.parameters()], dy)

        out["both"] = timed(both, graph=False) / T
    return out


def bench(kernels: list[Kernel], sizes: list[tuple[str, str, int, int]], T: int, deadline: float) -> list[dict]:
    rows = []
    for cell, dtype, H, B in sizes:
        if time.time() > deadline:
            print("out of time")
            break
        best = None
        torch_times = rival(cell, DTYPES[dtype], T, B, H, grad=False)
        W = torch.randn(kernels[0].gates * 0 + CELLS[cell] * H, H, device=DEV).to(DTYPES[dtype]) / math.sqrt(H)
        x = torch.randn(T * B, H, device=DEV).to(DTYPES[dtype])
        mine = [k for k in kernels if k.cell == cell and k.type == dtype and k.fits(H, B) and k.depth < 2 * max(H, 64)]
        line = []
        for k in mine:
            r = Run(k, T, B, H)
            R = torch.randn(1, k.gates * H, H, device=DEV).to(k.dtype) / math.sqrt(H)
            r.pack(R)
            r.gx.normal_()
            kernel_only = (
                timed(
                    lambda: (
                        r.k.lib.forward(r.k.index, ctypes.byref(r.args), stream()) if r.hand_off is None else r.launch()
                    ),
                    7,
                )
                / T
            )
            line.append((kernel_only, k))
            if int(r.late):
                print("LATE", k.name)
        line.sort(key=lambda v: v[0])
        if line:
            k = line[0][1]
            r = Run(k, T, B, H)
            R = torch.randn(1, k.gates * H, H, device=DEV).to(k.dtype) / math.sqrt(H)

            def whole() -> None:
                r.pack(R)
                if r.pitch == H:
                    torch.mm(x, W.t(), out=r.gx.view(T * B, k.gates * H))
                r.launch()

            best = timed(whole) / T
        rows.append(
            {"cell": cell, "type": dtype, "H": H, "B": B, "T": T, "cudnn": torch_times, "best": best,
             "kernels": [{"name": k.name, "us": t} for t, k in line]}
        )  # fmt: skip
        names = "  ".join(
            f"{t:.2f} {'SCG'[k.route]}{k.peers(H)}r{k.rows}[{k.name.split('k', 1)[1].split(',', 1)[1].strip().replace(', ', '.')}]"
            for t, k in line[:4]
        )
        if best:
            print(
                f"{cell:5s}{dtype:5s} H={H:5d} B={B:4d} cuDNN {torch_times['forward']:6.2f} ours {best:6.2f} x{torch_times['forward'] / best:5.2f} | {names}",
                flush=True,
            )
    return rows


# ---- the whole backend ------------------------------------------------------------------------------------------------

ROUTES = ("single", "cluster", "grid", "stepwise")
API_CELLS = ("rnn_tanh", "rnn_relu", "lstm", "gru", "gru_reset_before")
API_TYPES = {
    "f32": (0, torch.float32),
    "tf32": (0, torch.float32),
    "3xtf32": (0, torch.float32),
    "f64": (1, torch.float64),
    "bf16": (2, torch.bfloat16),
    "f16": (3, torch.float16),
}
FLOAT32 = ("f32", "tf32", "3xtf32")  # in the order of cuda.h's Precision
API_BUDGET = {"f32": 5e-6, "3xtf32": 5e-6, "tf32": 2e-2, "f64": 1e-12, "bf16": 1e-1, "f16": 2e-2}


def array(rank: int) -> type[ctypes.Structure]:
    return type(f"Array{rank}", (ctypes.Structure,), {"_fields_": [("data", P), ("stride", L64 * rank)]})


Array2, Array3, Array4, Array5 = (array(n) for n in (2, 3, 4, 5))


class ApiProblem(ctypes.Structure):
    _fields_ = [
        ("cell", ctypes.c_int32), ("dtype", ctypes.c_int32), *[(n, L64) for n in "TEBIH"], ("L", ctypes.c_int32), ("D", ctypes.c_int32), ("K", L64),
        *[(n, B8) for n in ("reverse", "reset_to_initial", "recompute", "bf16_weights", "packed")], *[(n, ctypes.c_double) for n in ("clip_cell", "clip_grad", "dropout")],
        ("seed", ctypes.c_uint64), ("lengths", Array2), ("reset", Array3), ("variant", L64 * 17),
    ]  # fmt: skip


class ApiParams(ctypes.Structure):
    _fields_ = [("W", Array3), ("R", Array3), ("bW", Array2), ("bR", Array2)]


class ApiArguments(ctypes.Structure):
    _fields_ = [
        ("x", Array4), ("tokens", Array3), ("h0", Array4), ("c0", Array4), ("params", ctypes.POINTER(ApiParams)),
        ("context", Array3), ("context_weights", Array3 * 2), ("extras", P),
    ]  # fmt: skip


class ApiResults(ctypes.Structure):
    _fields_ = [("y", Array4), ("hn", Array4), ("cn", Array4), ("cells", Array5)]


def put(field: ctypes.Structure, t: torch.Tensor | None) -> None:
    if t is not None:
        field.data = t.data_ptr()
        for i, s in enumerate(t.stride()):
            field.stride[i] = s


class Api:
    """One problem with contiguous CUDA tensors (E = 1), its tape and its workspaces."""

    def __init__(self, lib, cell, kind, T, B, I, H, L=1, D=1, route=-1, **options) -> None:  # noqa: E741
        self.lib, self.kind, self.route = lib, kind, route
        number, dtype = API_TYPES[kind]
        G = {"lstm": 4, "gru": 3, "gru_reset_before": 3}.get(cell, 1)
        self.cell, self.size, self.dtype = cell, (T, B, I, H, L, D, G), dtype
        q = self.problem = ApiProblem(API_CELLS.index(cell), number, T, 1, B, I, H, L, D)
        self.lengths, self.reset = options.pop("lengths", None), options.pop("reset", None)
        self.options = options
        for name, value in options.items():
            setattr(q, name, value)
        put(q.lengths, self.lengths)
        put(q.reset, self.reset)
        has_c = cell == "lstm"

        def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return ((torch.rand(*shape, device=DEV) * 2 - 1) * scale).to(dtype)

        def empty(*shape: int) -> torch.Tensor:
            return torch.full(shape, float("nan"), device=DEV, dtype=dtype)

        shapes = [[(1, G * H, I if n < D else D * H), (1, G * H, H), (1, G * H), (1, G * H)] for n in range(L * D)]
        self.p = [draw(T, 1, B, I), draw(L * D, 1, B, H), draw(L * D, 1, B, H) if has_c else None,
                  [[draw(*s, scale=(3 / s[-1]) ** 0.5 if len(s) == 3 else 0.5) for s in group] for group in shapes]]  # fmt: skip
        self.dp = [
            empty(T, 1, B, I),
            empty(L * D, 1, B, H),
            empty(L * D, 1, B, H) if has_c else None,
            [[empty(*s) for s in group] for group in shapes],
        ]
        self.out = [empty(T, 1, B, D * H), empty(L * D, 1, B, H), empty(L * D, 1, B, H) if has_c else None]
        self.g = [draw(T, 1, B, D * H), draw(L * D, 1, B, H), draw(L * D, 1, B, H) if has_c else None]
        self.structs = [self.arguments(self.p), self.results(self.out), self.results(self.g), self.arguments(self.dp)]
        self.tape = torch.empty(max(self.call(0), 1), dtype=torch.uint8, device=DEV)
        self.work = [torch.empty(self.call(k), dtype=torch.uint8, device=DEV) for k in (1, 2)]
        routes = self.call(5)
        self.routes = (ROUTES[routes // 10], ROUTES[routes % 10])

    @staticmethod
    def arguments(a: list) -> ApiArguments:
        out = ApiArguments()
        for name, t in zip(("x", "h0", "c0"), a[:3], strict=True):
            put(getattr(out, name), t)
        out.params = (ApiParams * len(a[3]))()
        for i, group in enumerate(a[3]):
            for name, t in zip(("W", "R", "bW", "bR"), group, strict=True):
                put(getattr(out.params[i], name), t)
        return out

    @staticmethod
    def results(r: list) -> ApiResults:
        out = ApiResults()
        for name, t in zip(("y", "hn", "cn"), r, strict=True):
            put(getattr(out, name), t)
        return out

    def call(self, kind: int, keep: bool = True) -> int:
        p, out, g, dp = self.structs
        n, why = L64(0), ctypes.create_string_buffer(512)
        work = self.work[kind - 3] if kind in (3, 4) else None
        bad = self.lib.api(
            kind, ctypes.byref(self.problem), ctypes.byref(p), ctypes.byref(out), ctypes.byref(g), ctypes.byref(dp), P(ptr(getattr(self, "tape", None))),
            P(ptr(work)), int(keep), FLOAT32.index(self.kind) if self.kind in FLOAT32 else 0, self.route, ctypes.byref(n), stream(), why,
        )  # fmt: skip
        assert not bad, why.value.decode()
        return n.value

    def forward(self, keep: bool = True) -> None:
        self.call(3, keep)

    def backward(self) -> None:
        self.call(4)

    def late(self) -> bool:
        return any(int(w[32 << 20 :][:4].view(torch.int32)) for w in self.work)

    def named(self) -> dict[str, torch.Tensor]:
        out = dict(zip(("y", "hn", "cn"), self.out, strict=True)) | dict(
            zip(("dx", "dh0", "dc0"), self.dp[:3], strict=True)
        )
        out |= {
            f"d{n}[{i}]": t
            for i, group in enumerate(self.dp[3])
            for n, t in zip(("W", "R", "bW", "bR"), group, strict=True)
        }
        return {n: t for n, t in out.items() if t is not None}

    def expected(self) -> dict:
        import numpy as np

        sys.path.insert(0, str(ROOT / "python"))
        from fusedrnn.backends import Arguments, Problem, Results, reference

        T, B, I, H, L, D, _ = self.size  # noqa: E741

        def wide(t):
            return None if t is None else t.double().cpu().numpy()

        def like(t):
            return None if t is None else np.full(t.shape, np.nan)

        problem = Problem(self.cell, T, 1, B, I, H, L, D, **self.options)
        problem.lengths = None if self.lengths is None else self.lengths.cpu().numpy()
        problem.reset = None if self.reset is None else self.reset.cpu().numpy()
        p = Arguments(*map(wide, self.p[:3]), [tuple(map(wide, group)) for group in self.p[3]])
        g = Results(*map(wide, self.g), None)
        out = Results(*map(like, self.out), None)
        dp = Arguments(*map(like, self.dp[:3]), [tuple(map(like, group)) for group in self.dp[3]])
        reference.forward(problem, p, out, None)
        reference.backward(problem, p, None, g, dp)
        named = {"y": out.y, "hn": out.hn, "cn": out.cn, "dx": dp.x, "dh0": dp.h0, "dc0": dp.c0}
        named |= {
            f"d{n}[{i}]": t
            for i, group in enumerate(dp.params)
            for n, t in zip(("W", "R", "bW", "bR"), group, strict=True)
        }
        return named


def check_api(lib: ctypes.CDLL, deadline: float, few: bool = False) -> list[dict]:
    import random

    pick, rows, seen = random.Random(1), [], {}
    sizes = [(45, 3), (64, 8), (128, 33), (200, 7), (256, 16), (512, 8), (768, 5), (1000, 16), (1024, 8)]
    for cell in API_CELLS:
        for kind in API_TYPES:
            for route in range(4):
                if route < 3 and (kind == "f64" or cell == "gru_reset_before"):
                    continue
                if cell == "rnn_relu" and kind in ("bf16", "f16"):
                    continue
                for H, B in sizes[:1] if few else sizes:
                    if time.time() > deadline or (route == 3 or kind == "f64") and H > 300:
                        continue
                    T, L, D = 5, pick.choice([1, 1, 2]), pick.choice([1, 1, 2])
                    options = {
                        "reverse": D == 1 and pick.random() < 0.3,
                        "reset_to_initial": pick.random() < 0.5,
                        "dropout": pick.choice([0.0, 0.3]),
                        "seed": 7,
                        "recompute": pick.random() < 0.4,
                    }
                    if pick.random() < 0.5:
                        options["lengths"] = torch.randint(0, T + 1, (1, B), device=DEV)
                    if pick.random() < 0.5:
                        options["reset"] = (torch.rand(T, 1, B, device=DEV) < 0.3).to(torch.uint8)
                    a = Api(lib, cell, kind, T, B, 40, H, L, D, route, **options)
                    if a.routes == ("stepwise", "stepwise") and route != 3:
                        continue  # this route has no kernel for this size
                    a.forward()
                    a.backward()
                    torch.cuda.synchronize()
                    first = {n: t.clone() for n, t in a.named().items()}
                    a.forward()
                    a.backward()
                    torch.cuda.synchronize()
                    same = all(
                        torch.equal(t.view(torch.uint8), first[n].view(torch.uint8)) for n, t in a.named().items()
                    )
                    expected = a.expected()
                    errors = {
                        n: float(
                            (t.double().cpu() - torch.from_numpy(expected[n])).abs().max()
                            / max(1.0, abs(expected[n]).max())
                        )
                        for n, t in a.named().items()
                    }
                    name, worst = max(errors.items(), key=lambda v: v[1] if v[1] == v[1] else math.inf)
                    ok = worst <= API_BUDGET[kind] and same and not a.late()
                    key = (cell, kind, *a.routes)
                    n, bad, most = seen.get(key, (0, 0, 0.0))
                    seen[key] = (n + 1, bad + (not ok), max(most, worst))
                    if not ok:
                        print(
                            f"FAIL {key} T={T} B={B} H={H} L={L} D={D} {sorted(options)}: {name} {worst:.2e} same bits {same} late {a.late()}",
                            flush=True,
                        )
                    rows.append(
                        {
                            "cell": cell,
                            "type": kind,
                            "routes": a.routes,
                            "H": H,
                            "B": B,
                            "error": worst,
                            "where": name,
                            "same_bits": same,
                            "ok": ok,
                        }
                    )
    for key, (n, bad, most) in sorted(seen.items()):
        print(f"{'/'.join(key):44s} {n:3d} calls, {bad} wrong, error {most:.1e}")
    return rows


def time_api(lib: ctypes.CDLL, T: int, deadline: float) -> list[dict]:
    rows = []
    modules = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}
    for cell, kind in (
        ("lstm", "bf16"),
        ("lstm", "f16"),
        ("gru", "bf16"),
        ("lstm", "tf32"),
        ("gru", "tf32"),
        ("lstm", "3xtf32"),
        ("lstm", "f32"),
        ("gru", "f32"),
    ):
        for H in (64, 128, 256, 512, 768, 1024):
            for B in (8, 16, 32, 64, 128):
                if time.time() > deadline:
                    print("out of time")
                    return rows
                torch.backends.cudnn.allow_tf32 = kind not in ("f32", "3xtf32")
                a, less = (Api(lib, cell, kind, T, B, H, H, recompute=r) for r in (False, True))
                m = modules[cell](H, H).to(DEV, a.dtype)
                x = a.p[0][:, 0].detach().clone().requires_grad_()
                dy = a.g[0][:, 0]

                def theirs() -> None:
                    torch.autograd.grad(m(x)[0], [x, *m.parameters()], dy)

                def ours(a: Api = a) -> None:
                    a.forward()
                    a.backward()

                before = torch.cuda.memory_allocated()
                y = m(x)[0]
                reserve = torch.cuda.memory_allocated() - before - y.nbytes
                del y

                with torch.no_grad():
                    t = [timed(lambda: m(x)) / T, timed(lambda: a.forward(keep=False)) / T]
                t += [timed(theirs, graph=False) / T, timed(ours) / T, timed(lambda: ours(less)) / T]
                torch.backends.cudnn.allow_tf32 = True
                rows.append({"cell": cell, "type": kind, "H": H, "B": B, "T": T, "routes": a.routes, "late": a.late() or less.late(),
                             "cudnn": [t[0], t[2]], "ours": [t[1], t[3]], "recompute": t[4],
                             "tapes": [reserve, a.tape.nbytes, less.tape.nbytes]})  # fmt: skip
                print(f"{cell:5s}{kind:5s} H={H:5d} B={B:4d} {a.routes[0]:8s}/{a.routes[1]:8s} forward {t[0]:6.2f} {t[1]:6.2f} x{t[0] / t[1]:5.2f}  "
                      f"both {t[2]:6.2f} {t[3]:6.2f} x{t[2] / t[3]:5.2f}  recompute {t[4]:6.2f} "
                      f"tape {a.tape.nbytes / reserve:4.2f} {less.tape.nbytes / reserve:4.2f} of cuDNN's{' LATE' if a.late() else ''}", flush=True)  # fmt: skip
    return rows


def main() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    lib = build()
    sizes = (L64 * 3)()
    lib.api_sizes(sizes)
    assert list(sizes) == [ctypes.sizeof(s) for s in (ApiProblem, ApiArguments, ApiResults)], list(sizes)
    assert lib.args_size() == ctypes.sizeof(ForwardArgs), (lib.args_size(), ctypes.sizeof(ForwardArgs))
    kernels = [Kernel(lib, i) for i in range(lib.count())]
    start, budget = time.time(), float(os.environ.get("SECONDS_MAX", "240"))
    out: dict = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
    }
    print(out)
    if "sanitize" in sys.argv:
        check([k for k in kernels if k.type != "F16"][::3], few=True)
        check_api(lib, start + budget, few=True)
        return
    if "api" in sys.argv:
        out["api"] = check_api(lib, start + budget / 2)
        print(f"{time.time() - start:.0f} s")
    if "apitime" in sys.argv:
        out["apitime"] = time_api(lib, int(os.environ.get("STEPS", "512")), start + budget)
    if "check" in sys.argv:
        out["check"] = check(kernels, few=False)
        bad = {r["kernel"] for r in out["check"] if not r["ok"]}
        kernels = [k for k in kernels if k.name not in bad]
        print(f"{time.time() - start:.0f} s")
    if "clusters" in sys.argv:
        for k in kernels:
            if k.route == CLUSTER and k.type == "BF16":
                print("resident clusters", k.name, {n: lib.clusters(k.index, n) for n in (2, 4, 8, 16)})
    if "time" in sys.argv:
        sizes = [("Lstm", "BF16", H, B) for H in (64, 128, 256, 512, 768, 1024) for B in (8, 16, 32, 64, 128)]
        sizes += [("Lstm", "F16", H, B) for H in (256, 512, 768, 1024) for B in (8, 16, 32, 64, 128)]
        sizes += [("Gru", "BF16", H, B) for H in (128, 256, 512, 1024) for B in (16, 64)]
        sizes += [
            ("Lstm", t, H, B) for t in ("TF32", "TF32x3", "F32") for H in (64, 128, 256, 512, 1024) for B in (8, 16)
        ]
        sizes += [("Lstm", "F32", H, 1) for H in (64, 128, 256, 512, 1024)]
        sizes += [
            *(("Gru", t, 256, 16) for t in ("TF32", "TF32x3", "F32")),
            ("Tanh", "BF16", 128, 16),
            ("Tanh", "BF16", 1024, 16),
        ]
        out["time"] = bench(kernels, sizes, int(os.environ.get("STEPS", "512")), start + budget)
    path = pathlib.Path(os.environ.get("OUT", ROOT / ".gpu")) / "kernels.json"
    path.write_text(json.dumps(out, indent=1))
    print(f"{time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
