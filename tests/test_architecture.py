# SPDX-License-Identifier: Apache-2.0
"""Who may know whom, in C++ and in Python; and what the extension must not contain."""

import ast
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "python" / "fusedrnn"
CORE = importlib.util.find_spec("fusedrnn._core")
SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")

needs_core = pytest.mark.skipif(CORE is None, reason="the extension is not built")


def sources(*patterns: str) -> list[Path]:
    found = [path for pattern in patterns for path in ROOT.glob(pattern) if "results" not in path.parts]
    assert found, patterns
    return sorted(found)


def text_without_comments(path: Path) -> str:
    text = re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.S)
    return re.sub(r"//[^\n]*", "", text)


def includes(path: Path) -> list[str]:
    """What a C++ file includes: ours as paths below csrc, others as they are written."""
    out = []
    for bracket, name in re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', text_without_comments(path), re.M):
        beside, below = (path.parent / name).resolve(), ROOT / "csrc" / name
        ours = beside if beside.exists() else below if below.exists() else None
        out.append(str(ours.relative_to(ROOT / "csrc")) if bracket == '"' and ours else name)
    return out


# ---- every file ----------------------------------------------------------------------------------------------------


SUFFIXES = (".h", ".cpp", ".cu", ".py", ".pyi", ".cmake")


def test_first_line_of_every_file_is_the_licence():
    files = [p for p in sources("csrc/**/*", "python/**/*", "tests/**/*", "bench/*") if p.suffix in SUFFIXES]
    assert len(files) > 100

    def first(path: Path) -> str:
        return next(line for line in path.read_text().splitlines() if not line.startswith("#!"))

    assert [str(p.relative_to(ROOT)) for p in files if "SPDX-License-Identifier: Apache-2.0" not in first(p)] == []


# ---- C++ -----------------------------------------------------------------------------------------------------------


def test_comments_end_at_column_120():
    """The formatter leaves prose alone."""
    files = [p for p in sources("csrc/**/*", "tests/csrc/**/*") if p.suffix in (".h", ".cpp", ".cu")]
    wide = [f"{p}:{n}" for p in files for n, line in enumerate(p.read_text().splitlines(), 1) if len(line) > 120]
    assert wide == []


@pytest.mark.parametrize(
    ("folder", "ours"),
    [
        ("api.h", r"$^"),
        ("cells", r"cells/functions\.h"),
        ("cpu", r"api\.h|cells/.*|cpu/.*"),
        ("cpu/threads", r"cpu/cpu\.h|cpu/threads/.*"),
        ("cpu/arithmetic", r"cpu/(threads|arithmetic)/.*"),
        ("cpu/recurrence", r"api\.h|cpu/isa\.h|cpu/(threads|arithmetic|recurrence)/.*"),
        ("cpu/cells", r"cells/.*|cpu/arithmetic/vec\.h|cpu/recurrence/cell\.h"),
        ("cpu/generation", r"api\.h|cpu/(arithmetic|recurrence|generation)/.*"),
        ("cpu/alignment", r"cpu/(cpu|isa)\.h|cpu/(threads|arithmetic)/.*"),
        ("cuda", r"api\.h|cells/.*|cuda/.*"),
        ("bindings", r"api\.h|cpu/cpu\.h|cuda/cuda\.h|bindings/.*"),
    ],
)
def test_who_includes_whom(folder, ours):
    base = ROOT / "csrc" / folder
    files = [base] if base.is_file() else [p for p in base.rglob("*") if p.suffix in (".h", ".cpp", ".cu")]
    assert files
    for path in files:
        for name in includes(path):
            if (ROOT / "csrc" / name).exists():
                assert re.fullmatch(ours, name), f"{path.relative_to(ROOT)} includes {name}"
            elif folder != "bindings":
                assert not re.search(r"python|pybind11|numpy|dlpack|torch|jax", name, re.I), f"{path}: {name}"
            if folder == "cells" and not name.startswith("cells/"):
                pytest.fail(f"{path.relative_to(ROOT)} includes {name}; the formulas include nothing else")


def test_one_file_for_each_kind_of_array():
    """NumPy's headers: tensor.h. torch's tensors, by DLPack's C interface (dlpack.h): torch_gate."""
    for path in sources("csrc/bindings/*"):
        text = text_without_comments(path)
        assert path.name == "tensor.h" or not re.search(r"numpy/|pybind11/numpy", text), path
        assert path.name in ("dlpack.h", "torch_gate.h", "torch_gate.cpp") or "dlpack" not in text.lower(), path


def test_only_bindings_know_python():
    for path in sources("csrc/cells/*", "csrc/cpu/**/*.*", "csrc/cuda/*"):
        assert not re.search(r"\bPy[A-Z_]\w+|pybind11|\bpy::", text_without_comments(path)), path


def test_code_compiled_per_instruction_set_uses_no_library_templates():
    """One weak symbol from an AVX-512 object can be chosen for the whole library and crash older machines."""
    cmake = (ROOT / "CMakeLists.txt").read_text()
    cells = re.search(r"set\(CELLS ([^)]*)\)", cmake)[1].split()
    names = [*re.search(r"set\(per_isa ([^)]*)\)", cmake)[1].split(), *(f"cells/{cell}.cpp" for cell in cells)]
    seen, todo = set(), [ROOT / "csrc" / "cpu" / name for name in names]
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        todo += [ROOT / "csrc" / name for name in includes(path) if (ROOT / "csrc" / name).exists()]
    assert len(seen) > len(names)
    for path in seen:
        if path.name == "cpu.h":  # declarations for dispatch.cpp
            continue
        found = re.findall(r"std::(?!size_t|u?int\d+_t|nullptr_t)\w+", text_without_comments(path))
        assert not found, f"{path.relative_to(ROOT)} uses {sorted(set(found))}"


# ---- the extension -------------------------------------------------------------------------------------------------


@needs_core
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the instruction sets are x86's")
@pytest.mark.skipif(SANITIZED, reason="sanitizers put their own functions into the extension")
@pytest.mark.skipif(not shutil.which("objdump"), reason="objdump is missing")
def test_wide_instructions_stay_in_their_namespace():
    """A function with ymm, zmm or VEX code, in the extension's disassembly, must belong to an instruction set."""
    lines = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", "-j", ".text", CORE.origin], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    wide: dict[str, str] = {}
    sets = {"avx2": 0, "avx512": 0}
    name = ""
    for line in lines:
        if line.endswith(">:"):
            name = line.split("<", 1)[1][:-2]
        elif name and re.search(r"%[yz]mm|\tv[a-z]+\d*[sp][sd]\b", line):
            wide.setdefault(name, line.strip())
            if "%zmm" in line and "4avx2" in name:
                pytest.fail(f"AVX-512 code in {name}: {line.strip()}")
    for name, line in wide.items():
        match = re.search(r"fusedrnn3cpu\d(avx2|6avx512|avx512)", name)
        assert match, f"{name}: {line}"
        sets[match[1].lstrip("6")] += 1
    assert all(sets.values()), sets  # both sets are there, with names


@needs_core
@pytest.mark.skipif(not shutil.which("nm"), reason="nm is missing")
def test_extension_exports_its_init_function_only():
    out = subprocess.run(["nm", "-D", "--defined-only", CORE.origin], capture_output=True, text=True, check=True).stdout
    names = {line.split()[-1] for line in out.splitlines()}
    if SANITIZED:
        names = {name for name in names if not name.startswith("__")}
    assert names == {"PyInit__core"}


# ---- Python --------------------------------------------------------------------------------------------------------


def imports(path: Path, *, top_only: bool = False) -> set[str]:
    """Absolute names of the modules that a file imports; with top_only, those that importing the file imports."""
    package = ["fusedrnn", *path.relative_to(PACKAGE).parts[:-1]]
    out: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            out.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            out.update({module, *(f"{module}.{alias.name}" for alias in node.names)})
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            return
        if top_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return out


def modules() -> list[Path]:
    return sources("python/fusedrnn/**/*.py")


def has(names: set[str], *wanted: str) -> set[str]:
    return {name for name in names for want in wanted if name == want or name.startswith(want + ".")}


def test_only_native_imports_the_extension():
    users = {path.relative_to(PACKAGE).as_posix() for path in modules() if has(imports(path), "fusedrnn._core")}
    assert users == {"backends/native.py"}


@pytest.mark.parametrize(
    "path",
    [*PACKAGE.glob("cells/*.py"), *(PACKAGE / "backends" / name for name in ("reference.py", "variants.py"))],
    ids=lambda path: path.name,
)
def test_the_judge_does_not_use_the_judged(path):
    bad = has(imports(path), "numba", "fusedrnn._core", "fusedrnn.backends.native", "fusedrnn.backends.numba")
    assert not bad


def activates(path: Path) -> bool:
    """Whether a file calls an activation or its slope outside of classes of Functions, which formulas take."""

    def calls(node: ast.AST) -> bool:
        if isinstance(node, ast.ClassDef) and "Functions" in map(ast.unparse, node.bases):
            return False
        name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        return bool(re.search(r"\b(sigmoid|tanh|relu|slope|ACTIVATIONS\[.*\]\.f)$", name)) or any(
            map(calls, ast.iter_child_nodes(node))
        )

    return calls(ast.parse(path.read_text()))


def test_formulas_of_cells_stand_in_one_folder():
    """Once in C++, once in Python, told by who activates. torch/composite.py has those that torch differentiates."""
    users = {path.relative_to(PACKAGE).as_posix() for path in modules() if activates(path)}
    ours = {user for user in users if user.split("/")[0] not in ("examples", "bench")}
    assert {user for user in ours if not user.startswith("cells/")} == {"torch/composite.py"}
    assert {"cells/functions.py", "cells/mingru.py", "cells/minlstm.py"} <= ours
    for path in sources("csrc/**/*.h", "csrc/**/*.cpp", "csrc/**/*.cu"):
        numbers = ("vec.h", "gates.h", "jvp.h", "activations.h")  # sigmoid and tanh themselves
        found = re.search(r"\b(sigmoid|tanh)\(", text_without_comments(path))
        assert not found or path.name in numbers or path.parent.name == "cells", path


def test_imports_have_no_circle():
    """Imports inside functions count, too. Those of the package that a file lies in do not: `from . import beside`."""
    paths = {".".join(("fusedrnn", *path.relative_to(PACKAGE).with_suffix("").parts)): path for path in modules()}
    paths = {name.removesuffix(".__init__"): path for name, path in paths.items()}
    needs = {}
    for name, path in paths.items():
        needs[name] = {other for other in imports(path) & paths.keys() if not f"{name}.".startswith(f"{other}.")}
    while free := [name for name, wanted in needs.items() if not wanted & needs.keys()]:
        for name in free:
            del needs[name]
    assert not needs


HEAVY = (
    "torch",
    "jax",
    "cupy",
    "numba",
    "tensorflow",
    "keras",
    "onnx",
    "onnxruntime",
    "openvino",
    "matplotlib",
    "scipy",
)


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_nothing_heavy_is_imported_at_import_time(path):
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    own = "numba" if path.parent == PACKAGE / "backends" / "numba" else name
    bad = {module for module in has(imports(path, top_only=True), *HEAVY) if module.split(".")[0] != own}
    assert not bad
    if name in HEAVY:  # an adapter: it knows its framework and ours, and no other adapter
        assert not has(imports(path), *(f"fusedrnn.{other}" for other in HEAVY if other != own))


def private_names(path: Path, ours: set[str]) -> set[str]:
    """Names with one underscore in front that a file uses and that are not `ours`, and modules below such names."""
    out: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            out.add(node.attr)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [alias.name for alias in node.names]
            module = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            out.update(part for name in [*names, *module] for part in name.split("."))
    return {name for name in out if re.match(r"_(?!_)", name)} - ours


def test_private_names_of_torch_stand_in_one_file():
    files = sources("python/fusedrnn/torch/*.py")
    ours = {"_asdict", "_replace", "_fields"}  # of named tuples: their underscore is no privacy
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                ours.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                ours.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                ours.add(node.attr)  # of self
    found = {path.name: private_names(path, ours - {"_C", "_VF", "_functorch"}) for path in files}
    assert {"_C", "_functorch", "_VF", "_current_level", "_parameters"} <= found.pop("private.py")
    assert {name: names for name, names in found.items() if names} == {}


IMPORT = """
import json, os, sys, time
def threads(): return len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 0
before = set(sys.modules), dict(os.environ), threads()
begin = time.perf_counter()
import fusedrnn
seconds = time.perf_counter() - begin
print(json.dumps({
    "seconds": seconds,
    "modules": sorted({name.split(".")[0] for name in set(sys.modules) - before[0]} - set(sys.stdlib_module_names)),
    "environment": dict(os.environ) == before[1],
    "threads": threads() - before[2],
}))
"""


def test_import_is_light():
    runs = [
        subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True) for _ in range(5)
    ]
    assert all(run.stderr == "" and run.stdout.count("\n") == 1 for run in runs)  # it prints nothing
    reports = [json.loads(run.stdout) for run in runs]
    assert set(reports[0]["modules"]) - {"fusedrnn"} <= {"numpy"}
    assert reports[0]["environment"]
    assert reports[0]["threads"] == 0
    if not SANITIZED:
        assert min(report["seconds"] for report in reports) < 0.2
