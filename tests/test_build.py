# SPDX-License-Identifier: Apache-2.0
"""What is installed, what it needs from the machine, and what the build's options do."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import fusedrnn

core = pytest.importorskip("fusedrnn._core", exc_type=ImportError)

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CMAKE = (ROOT / "CMakeLists.txt").read_text()
SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads ELF files")


def run(*command: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def test_one_version_everywhere():
    version = PROJECT["project"]["version"]
    assert version == core.version == fusedrnn.__version__ == importlib.metadata.version("fusedrnn")


def test_what_is_installed():
    package = Path(fusedrnn.__file__).parent
    for name in ("py.typed", "_core.pyi", "__main__.py", "backends/native.py"):
        assert (package / name).is_file(), name
    assert any(str(path).endswith("licenses/LICENSE") for path in importlib.metadata.files("fusedrnn"))
    metadata = importlib.metadata.metadata("fusedrnn")
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    needed = [line for line in importlib.metadata.requires("fusedrnn") if "extra ==" not in line]
    assert [re.split(r"[^a-z]", line)[0] for line in needed] == ["numpy"]
    assert set(metadata.get_all("Provides-Extra")) == {"numba", "cuda", "torch", "demo", "examples", "test", "bench"}


def test_licence():
    text = (ROOT / "LICENSE").read_text()
    assert text.split()[:3] == ["Apache", "License", "Version"] and "END OF TERMS AND CONDITIONS" in text


def test_the_readme_says_what_ci_runs():
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    assert 'pip install ".[demo]" && python -m fusedrnn demo' in readme
    command = re.search(
        r'^ *(pip install torch==\S+) && (pip install "\.\[test\]") && (python -m pytest -n 2 -m "")$', readme, re.M
    )
    assert command
    for part in command.groups():
        assert part.replace("pip install", "pip install -q") in ci, part


def test_all_instruction_sets_are_in_one_build():
    expected = {"x86_64": ["baseline", "avx2", "avx512"], "aarch64": ["baseline", "neon"]}
    assert core.isas_built == expected.get(platform.machine(), ["baseline"])


@linux
@pytest.mark.skipif(not shutil.which("objdump"), reason="objdump is missing")
def test_needs_nothing_unusual():
    out = run("objdump", "-p", core.__file__, check=True).stdout
    needed = {name.split(".so")[0] for name in re.findall(r"NEEDED +(\S+)", out)}
    usual = {"libc", "libm", "libgcc_s", "libstdc++", "libgomp", "libpthread", "ld-linux-x86-64", "ld-linux-aarch64"}
    assert needed - usual <= ({"libasan", "libubsan"} if SANITIZED else set())
    assert "libgomp" in needed  # as a library of its own, so that threadpoolctl sees it
    # torch's libgomp, under the same name, has nothing newer; whoever is imported first provides it for both
    assert set(re.findall(r"\bG?OMP_[\d.]+", out)) <= {"GOMP_4.0", "GOMP_1.0", "OMP_1.0", "OMP_5.0"}
    assert not re.search("RPATH|RUNPATH", out)


@linux
def test_size():
    if not SANITIZED:
        assert Path(core.__file__).stat().st_size < 20e6


@pytest.mark.slow
def test_stub_is_true(tmp_path):
    if not importlib.util.find_spec("mypy") or SANITIZED:
        pytest.skip("needs mypy, without sanitizers")
    result = run(sys.executable, "-m", "mypy.stubtest", "fusedrnn._core", "--ignore-disjoint-bases", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


# ---- CMake's options -----------------------------------------------------------------------------------------------

needs_cmake = pytest.mark.skipif(not shutil.which("cmake") or SANITIZED, reason="needs cmake, without sanitizers")


def configure(folder: Path, *options: str) -> subprocess.CompletedProcess:
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    return run("cmake", *generator, "-S", str(ROOT), "-B", str(folder), "-DFUSEDRNN_PYTHON=OFF", *options)


@needs_cmake
def test_cuda_option(tmp_path):
    bad = configure(tmp_path / "bad", "-DFUSEDRNN_CUDA=MAYBE")
    assert bad.returncode != 0 and "expected AUTO, ON or OFF" in " ".join(bad.stderr.split())
    off = configure(tmp_path / "off", "-DFUSEDRNN_CUDA=OFF")
    assert off.returncode == 0, off.stderr
    assert "fusedrnn: CUDA OFF" in off.stdout
    if not Path("/dev/nvidiactl").exists():
        auto = configure(tmp_path / "auto")
        assert auto.returncode == 0, auto.stderr
        assert "fusedrnn: CUDA OFF" in auto.stdout


@pytest.mark.slow
@needs_cmake
def test_cuda_auto(tmp_path, monkeypatch):
    """What a GPU, or what tells of one, makes of FUSEDRNN_CUDA=AUTO; nothing is compiled but CMake's own questions."""

    def begin(name: str, says: str, *options: str, **environment: str) -> subprocess.Popen:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{says}\n")
        (folder / "nvidia-smi").chmod(0o755)
        environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", **environment}
        command = ["cmake", "-S", str(ROOT), "-B", str(folder / "out"), "-DFUSEDRNN_PYTHON=OFF", *options]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def end(process: subprocess.Popen, status: int = 0) -> str:
        said = process.communicate(timeout=300)[0]
        assert process.returncode == status, said
        return " ".join(said.split())

    for name in ("CUDAARCHS", "CUDACXX"):
        monkeypatch.delenv(name, raising=False)
    hangs = begin("hangs", "exec sleep 600")  # found out while the others run
    assert "CUDA OFF (FUSEDRNN_CUDA=AUTO: nvidia-smi ended with '9')" in end(begin("fails", "exit 9"))
    assert "CUDA OFF (FUSEDRNN_CUDA=AUTO: no GPU here)" in end(begin("old", "echo 6.1"))
    nowhere = {"CUDACXX": str(tmp_path / "nvcc")}
    assert "CUDA OFF (FUSEDRNN_CUDA=AUTO: a GPU, but no nvcc that works" in end(begin("gpu", "echo 9.0", **nowhere))
    refused = end(begin("on", "exit 9", "-DFUSEDRNN_CUDA=ON", **nowhere), 1)
    assert "FUSEDRNN_CUDA=ON: there is no nvcc that works on PATH or in CUDACXX. Put one on PATH" in refused
    if shutil.which("nvcc"):
        several = end(begin("several", "echo 9.0; echo 8.6; echo 9.0; echo 6.1"))
        assert "CUDA ON (FUSEDRNN_CUDA=AUTO for sm_90a sm_86)" in several
        newer = end(begin("newer", "echo 99.0"))
        assert re.search(r"CUDA OFF \(FUSEDRNN_CUDA=AUTO: nvcc [\d.]+ does not know 990-real\)", newer)
        own = end(begin("own", "echo 99.0", CUDAARCHS="80-real"))
        assert "CUDA ON (FUSEDRNN_CUDA=AUTO for sm_80)" in own
    assert "CUDA OFF (FUSEDRNN_CUDA=AUTO: nvidia-smi ended with 'Process terminated due to timeout')" in end(hangs)


@needs_cmake
def test_flags(tmp_path):
    """Nothing global changes arithmetic, and each instruction set gets its own flags only."""
    result = configure(tmp_path)
    assert result.returncode == 0, result.stderr
    commands = {}
    for entry in json.loads((tmp_path / "compile_commands.json").read_text()):
        flags = entry["command"].split()
        isa = next((flag.split("=")[1] for flag in flags if flag.startswith("-DFUSEDRNN_ISA=")), "")
        commands[Path(entry["file"]).name, isa] = flags
    assert {isa for _, isa in commands} == {"", *core.isas_built}
    for (name, isa), flags in commands.items():
        assert "-O3" in flags and "-fvisibility=hidden" in flags and "-Werror" in flags, name
        for fast in ("-ffast-math", "-Ofast", "-funsafe-math-optimizations", "-ffinite-math-only", "-march=native"):
            assert fast not in flags, (name, fast)
        if isa != "avx512":
            assert not any(flag.startswith("-mavx512") for flag in flags), name
        if isa in ("", "baseline"):
            assert not any(flag.startswith(("-mavx", "-mfma", "-march")) for flag in flags), name
