# SPDX-License-Identifier: Apache-2.0
"""C++ of the tests, compiled once: an object is kept under the hash of its preprocessed source, flags and compiler.

The compiler reads the very text that was hashed, so an object is never stale. Objects of all checkouts lie below
XDG_CACHE_HOME or ~/.cache.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]
CSRC, TESTS = ROOT / "csrc", ROOT / "tests" / "csrc"
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or ""
DAYS = 14  # an object that nobody has used for longer is deleted


def call(
    command: Sequence[object], seconds: int, ok: bool = True, text: str = "", **env: str
) -> subprocess.CompletedProcess[str]:
    """What a command that reads `text` did; with `ok`, it must succeed."""
    words = [str(word) for word in command]
    done = subprocess.run(words, input=text, text=True, capture_output=True, timeout=seconds, env=os.environ | env)
    assert done.returncode == 0 or not ok, f"{' '.join(words)}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    return done


def objects(
    sources: Sequence[Path], flags: Sequence[str], folders: Sequence[Path] = (CSRC,), system: Sequence[str] = ()
) -> list[Path]:
    """Each source's object. Headers are looked for in `folders`, in tests/csrc, and then in others' folders."""
    flags = ["-std=c++20", "-Wall", "-Wextra", "-Werror", *flags]
    where = [f"-ffile-prefix-map={folder}{os.sep}=" for folder in (ROOT, *system)]  # else __FILE__ differs by checkout
    where += [f"-I{folder}" for folder in (*folders, TESTS)] + [f"-isystem{folder}" for folder in system]
    _folder()  # before there are threads
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda source: _object(source, flags, where), sources))


def linked(parts: Sequence[Path], out: Path, flags: Sequence[str]) -> Path:
    call([COMPILER, *flags, *parts, "-o", out], 120)
    return out


def _object(source: Path, flags: list[str], where: list[str]) -> Path:
    import fcntl  # not on Windows, which skips these tests

    command = [COMPILER, *flags, *where]
    text = call([*command, "-E", source], 120).stdout
    names = re.sub(r'^# (\d+) ".*/', r'# \1 "', text, flags=re.M)  # of headers, wherever a checkout lies
    key = hashlib.sha256(repr((_version(COMPILER), flags, names)).encode()).hexdigest()
    kept = _folder() / f"{key}.o"
    with (_folder() / f"{key[:2]}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # who wants the same object waits for it
        try:
            os.utime(kept)
        except FileNotFoundError:
            new = kept.with_suffix(".new")  # whoever is killed leaves no half of an object
            call([*command, "-x", "c++-cpp-output", "-c", "-", "-o", new], 900, text=text)
            new.replace(kept)
    return kept


@functools.cache
def _version(compiler: str) -> str:
    return call([compiler, "-v"], 60).stderr


@functools.cache
def _folder() -> Path:
    """Where the objects lie, without those that nobody uses."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fusedrnn-tests"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "00.lock").touch()
    except OSError:  # no right to write there
        folder = Path(tempfile.mkdtemp())
        atexit.register(shutil.rmtree, folder)
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # another process was faster
            if path.stat().st_mtime < time.time() - DAYS * 86400:
                path.unlink()
    return folder
