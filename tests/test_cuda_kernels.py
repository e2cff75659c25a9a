# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels without a GPU: their source runs on the CPU twin of the device (tests/csrc/device_cpu.h)."""

import functools
import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from compiled import COMPILER, CSRC, ROOT, TESTS, call, linked, objects

SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")
DEVICE = ["device_cpu", "device_fiber", "cuda_primitives", "cuda_kernels"]
CELLS = ["cuda_lstm", "cuda_gru", "cuda_rnn", "cuda_ctc", "cuda_inputs"]

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the CPU twin of the device is written for Linux"),
    pytest.mark.skipif(not COMPILER, reason="no C++ compiler"),
    pytest.mark.skipif(SANITIZED, reason="a program of its own, with sanitizers of its own"),
]


FLAGS = ["-O1", "-g1"]


@functools.cache
def parts(*flags: str) -> list[Path]:
    """The program's objects: first those with kernels, then those that any kernels run in."""
    sources = [TESTS / f"{name}.cpp" for name in [*CELLS, *DEVICE]] + [CSRC / "cpu" / "threads" / "fiber.cpp"]
    return objects(sources, [*FLAGS, *flags])


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Links the program once for every set of flags."""

    @functools.cache
    def build(*flags: str) -> Path:
        return linked(parts(*flags), tmp_path_factory.mktemp("cuda") / "cuda_kernels", flags)

    return build


def test_products_follow_from_their_operands(tmp_path):
    flags = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    call([linked(objects([TESTS / "cuda_matrix.cpp"], flags), tmp_path / "cuda_matrix", flags)], 60)


@pytest.mark.slow
def test_primitives(built):
    call([built(), "--primitives"], 120)


@pytest.mark.slow
def test_kernels_agree_with_float64(built):
    call([built(), "--quiet"], 400)


@pytest.mark.slow
@pytest.mark.parametrize("only,calls", [("lstm/f", 28), ("gru/f16", 25), ("ctc/", 5), ("inputs/", 2)])
def test_every_barrier_and_wait_is_needed(built, only, calls):
    """Each call of a primitive that orders anything is broken on its own; some case, schedule or seed must go wrong."""
    out = call([built(), "--break", "--only", only], 400, ok=False).stdout
    assert out.count("noticed ") >= calls, out
    missed = re.findall(r"^MISSED .*", out, re.M)
    assert not missed, "\n".join(missed)


@pytest.mark.slow
def test_address_sanitizer(built):
    program = built("-fsanitize=address", "-DFUSEDRNN_FEW")
    call([program, "--quiet", "--policy", "random"], 400, ASAN_OPTIONS="detect_leaks=0")


@pytest.mark.slow
def test_thread_sanitizer(built):
    """Every access of a kernel to memory, against the order that its barriers give; the schedule does not matter."""
    program = built("-fsanitize=thread", "-DFUSEDRNN_FEW")
    for only, case in (("/f16/", "3"), ("/f32/", "3"), ("ctc/", "1"), ("inputs/", "3")):
        call([program, "--quiet", "--policy", "random", "--case", case, "--only", only], 400)


NVCC = shutil.which("nvcc") or ""
READER = importlib.util.spec_from_file_location("cuda_build", ROOT / "bench" / "cuda_build.py")
cuda_build = sys.modules["cuda_build"] = importlib.util.module_from_spec(READER)
READER.loader.exec_module(cuda_build)

ALL_OF = """#include "cuda/gpu.h"
namespace fusedrnn::cuda {
template <class... S>
void forwards(List<S...>, cudaStream_t s) { (launch(Forward<S>{}, 1, 0, false, s), ...); }
template <class... S>
void backwards(List<S...>, cudaStream_t s) { (launch(Backward<S>{}, 1, 0, false, s), ...); }
template <class Cell, class T>
void both(cudaStream_t s) {
  forwards(typename Shapes<Cell, T>::Forward{}, s);
  backwards(typename Shapes<Cell, T>::Backward{}, s);
}
LISTS}
"""


@pytest.mark.slow
@pytest.mark.skipif(not NVCC, reason="no nvcc")
@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90a"])
def test_nvcc_compiles_without_spills(tmp_path, arch):
    """What is built of LSTM in float16 (FUSEDRNN_TEST_NVCC=all: of everything), read from `ptxas -v`."""
    cells = ["Lstm", "Gru", "Rnn<false>", "Rnn<true>"] if os.environ.get("FUSEDRNN_TEST_NVCC") == "all" else ["Lstm"]
    types = ["dev::F16", "dev::BF16", "dev::TF32", "TF32x3", "F32"] if len(cells) > 1 else ["dev::F16"]
    lists = "".join(f"template void both<cells::{cell}, {kind}>(cudaStream_t);\n" for cell in cells for kind in types)
    source = tmp_path / "kernels.cu"
    source.write_text(ALL_OF.replace("LISTS", lists))
    code = f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}"
    command = [
        NVCC,
        "-std=c++20",
        "-O3",
        "-Xptxas",
        "-v",
        code,
        f"-I{CSRC}",
        "-c",
        str(source),
        "-o",
        str(tmp_path / "o"),
    ]
    report = call(command, 1200 if len(cells) > 1 else 300).stderr
    persistent = [kernel for kernel in cuda_build.kernels(report) if kernel.persistent]
    if arch == "sm_75":  # what it has no products for is an empty kernel, and its registers would say nothing
        routes = {k.route for k in persistent if k.type == "F16" and k.registers > 60}
        assert routes == {"single", "grid"}, report[-3000:]
    for k in sorted(persistent, key=lambda k: k.place):
        print(arch, *k.place, f"{k.registers} registers, {k.spilled} bytes spilled")
    assert len(persistent) >= 10 and {k.architecture for k in persistent} == {arch}, report[-3000:]
    spilled = [k.name for k in persistent if k.spilled]
    assert not spilled, "\n".join(spilled)
    assert not re.findall(".*serialized.*", report)  # what ptxas says where products of a warpgroup wait for each other


def test_the_cost_model_is_told():
    """bench/gpu_predicted.cpp, which no build of ours holds, against today's cuts."""
    objects([ROOT / "bench" / "gpu_predicted.cpp"], [])


def test_the_report_is_read():
    """An excerpt of `ptxas -v`: bench/cuda_build.py must see who spills, whatever nvcc is here."""
    report = "".join(
        f"""ptxas info    : Compiling entry function '_ZN8fusedrnn4cuda5entry{name}EEvT_' for '{arch}'
ptxas info    : Function properties for _ZN8fusedrnn4cuda5entry{name}EEvT_
    {stores + 8} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used {registers} registers, used 1 barriers{static}
"""
        for name, arch, stores, loads, registers, static in (
            ("INS0_7ForwardINS0_5ShapeINS_5cells4LstmENS_3dev3F16ELNS0_5RouteE2ELi1ELi8ELi2ELi4ELi1EEEEE",)
            + ("sm_90a", 12, 4, 255, ""),
            ("INS0_7ForwardINS0_9WideShapeINS_5cells3GruENS_3dev4BF16ELi1ELi2ELi16ELi8EEEEE",)
            + ("sm_90a", 0, 0, 251, ""),
            ("INS0_11PackForwardINS0_5ShapeINS_5cells3RnnILb1EEENS_3dev4TF32ELNS0_5RouteE0ELi4ELi1EEEEE",)
            + ("sm_75", 0, 0, 40, ", 16 bytes smem"),
        )
    )
    forward, wide, pack = cuda_build.kernels(report)
    assert forward.place == ("Lstm", "F16", "grid", "Forward", "1,8,2,4,1")
    assert (forward.architecture, forward.registers, forward.spilled, forward.shared) == ("sm_90a", 255, 16, 0)
    assert wide.place == ("Gru", "BF16", "grid", "Forward", "wide 1,2,16,8")
    assert pack.place == ("Rnn relu", "TF32", "single", "PackForward", "4,1")
    assert (pack.architecture, pack.registers, pack.spilled, pack.shared) == ("sm_75", 40, 0, 16)
    assert forward.persistent and wide.persistent and not pack.persistent


FORWARD = {
    "single": "add_forward<cuda::Shape<cells::Lstm, dev::F16, cuda::Route::single, 3, 2, 1, 1, 1>>",
    "cluster": "add_forward<cuda::Shape<cells::Lstm, dev::F16, cuda::Route::cluster, 1, 2, 1, 1, 2>>",
    "grid": "add_forward<cuda::Shape<cells::Lstm, dev::F16, cuda::Route::grid, 2, 3, 1, 1, 1>>",
    "wide": "add_forward<cuda::WideShape<cells::Lstm, dev::F16, 1, 2, 1, 2>>",
}
BACKWARD = {
    "single": "add_backward<cuda::BackwardShape<cells::Lstm, dev::F16, cuda::Route::single, 2, 1, 32, 4, 1>>",
    "cluster": "add_backward<cuda::BackwardShape<cells::Lstm, dev::F16, cuda::Route::cluster, 3, 1, 16, 2, 1>>",
    "grid": "add_backward<cuda::BackwardShape<cells::Lstm, dev::F16, cuda::Route::grid, 2, 1, 16, 3, 1>>",
}


@dataclass
class Fault:
    """A slip of the pen in a kernel: `old`, which stands there once, becomes `new`."""

    name: str
    route: str
    old: str
    new: str
    file: str = "forward.h"
    type: str = "dev::F16"


FAULTS = [
    Fault("h of the wrong phase", "single", "h_lines + (s & 1) * (kH / 2)", "h_lines + (~s & 1) * (kH / 2)"),
    Fault("parity of the message barrier", "cluster", "(s - 1) >> 1 & 1, late", "s >> 1 & 1, late"),
    Fault(
        "more bytes expected than come", "cluster", "expected = lines * S::kTiles", "expected = S::kLines * S::kTiles"
    ),
    Fault(
        "every warp arrives, not one thread",
        "cluster",
        "if (dev::tid() == 0) dev::mbar_arrive_expect(bar + (s & 1)",
        "if (lane == 0) dev::mbar_arrive_expect(bar + (s & 1)",
    ),
    Fault("one buffer for the sums of a grid", "grid", "(kOnChip ? 0 : (s & 1) *", "(kOnChip ? 0 : 0 *"),
    Fault("stage of the input off by one", "single", "now = ring + s % kStages", "now = ring + (s + 1) % kStages"),
    Fault(
        "y behind the last unit", "single", "if (unit + j < a.H) row[unit + j]", "if (unit + j < a.H + 1) row[unit + j]"
    ),
    Fault("rows behind the last", "single", "if (row >= a.B || unit >= a.H) continue;", "if (unit >= a.H) continue;"),
    Fault("units behind the last", "single", "if (row >= a.B || unit >= a.H) continue;", "if (row >= a.B) continue;"),
    Fault(
        "sums one place off",
        "single",
        "* 32 + lane) * 2;\n          to[0]",
        "* 32 + lane + 1) * 2;\n          to[0]",
    ),
    Fault("restart a step early", "single", "backwards ? len - 1 - s : s + 1)", "backwards ? len - s : s)"),
    Fault(
        "restart a step late in reverse", "grid", "backwards ? len - 1 - s : s + 1)", "backwards ? len - 2 - s : s + 1)"
    ),
    Fault("strides of the operand exchanged", "wide", "S::kTiles * 128, 128)", "128, S::kTiles * 128)"),
    Fault("the second product's operand", "wide", "+ p * (kChunk / 2)", "+ p * (kChunk / 4)"),
    Fault("half tiles of the other part", "wide", "half = part * 8 +", "half = (S::kDepths - 1) * 8 +"),
    Fault("one buffer for da", "cluster", "kBuffers = 2;", "kBuffers = 1;", "backward.h"),
    Fault("parity in backward", "cluster", "(turn - 1) >> 1 & 1, late", "turn >> 1 & 1, late", "backward.h"),
    Fault(
        "stage of the tape off by one",
        "grid",
        "now = ring + s % kStages",
        "now = ring + (s + 1) % kStages",
        "backward.h",
    ),
    Fault(
        "a restart's share of dh0 lost",
        "single",
        "dh_first[i][p] += dh[i][p];",
        "dh_first[i][p] = dh[i][p];",
        "backward.h",
    ),
    Fault(
        "a weight's small part lost",
        "single",
        "(sum, w_small, big",
        "(sum, w_big[p], small",
        "product.h",
        "cuda::TF32x3",
    ),
    Fault("h's small part lost", "grid", "(sum, w_big[p], small", "(sum, w_small, big", "product.h", "cuda::TF32x3"),
    Fault(
        "halves of a tile's rows mixed up",
        "cluster",
        "upper ? v[n] : v[n + 4]",
        "upper ? v[n + 4] : v[n]",
        "product.h",
        "cuda::F32",
    ),
    Fault(
        "rows left out",
        "single",
        "if (rows <= kFrom) return",
        "if (rows <= kFrom + 1) return",
        "product.h",
        "cuda::F32",
    ),
    Fault(
        "rows passed on as others",
        "grid",
        "pass[piece<1>(4 * k + q, 0, g)] =",
        "pass[piece<1>(4 * k + q, 0, g ^ 1)] =",
        type="cuda::F32",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.name} ({fault.route}, {fault.file})")
def test_planted_fault_is_noticed(tmp_path, fault):
    text = (CSRC / "cuda" / fault.file).read_text()
    assert text.count(fault.old) == 1, f"{fault.file} has changed: adapt this fault, which looks for {fault.old!r}"
    shutil.copytree(CSRC / "cuda", tmp_path / "csrc" / "cuda")
    shutil.copytree(CSRC / "cells", tmp_path / "csrc" / "cells")
    shutil.copy(CSRC / "api.h", tmp_path / "csrc")
    (tmp_path / "csrc" / "cuda" / fault.file).write_text(text.replace(fault.old, fault.new))
    what = (BACKWARD if fault.file == "backward.h" else FORWARD)[fault.route].replace("dev::F16", fault.type)
    source = tmp_path / "fault.cpp"
    source.write_text(
        '#include "cuda_cuts.h"\nnamespace fusedrnn::test {\n'
        f'void add_lstm(std::vector<Run>& runs) {{ {what}(runs, "fault"); }}\n'
        + "".join(f"void add_{other}(std::vector<Run>&) {{}}\n" for other in ("gru", "rnn", "ctc", "inputs"))
        + "}\n"
    )
    faulty = objects([source], FLAGS, [tmp_path / "csrc"])
    program = linked([*faulty, *parts()[len(CELLS) :]], tmp_path / "faulty", [])
    done = call([program, "--quiet", "--seeds", "6"], 300, ok=False)
    assert done.returncode != 0, f"nothing noticed:\n{done.stdout}"
