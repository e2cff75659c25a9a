# SPDX-License-Identifier: Apache-2.0
"""Objects of the tests' C++ are kept, and never stale."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import compiled

pytestmark = pytest.mark.skipif(sys.platform != "linux" or not compiled.COMPILER, reason="as tests that compile C++")

WATCHED = """#!/bin/sh
case " $* " in *" -c "*) echo "$*" >>"{log}"; sleep 0.3 ;; esac
exec {compiler} "$@"
"""
WORKER = """
import sys, compiled
from pathlib import Path
compiled.objects([Path(sys.argv[1], "source.cpp")], [], [Path(sys.argv[1], "inner")])
"""


class Room:
    """A checkout with one source and one header, a cache, and a compiler that is watched."""

    def __init__(self, folder: Path) -> None:
        self.log, self.compiler, self.program = folder / "log", folder / "c++", folder / "program"
        self.compiler.write_text(WATCHED.format(log=self.log, compiler=shutil.which(compiled.COMPILER)))
        self.compiler.chmod(0o755)
        self.log.touch()
        self.sources = folder / "a"
        (self.sources / "inner").mkdir(parents=True)
        (self.sources / "source.cpp").write_text('#include "value.h"\nint main() { return VALUE; }\n')
        (self.sources / "inner" / "value.h").write_text("#define VALUE 3\n")

    def value(self, *flags: str) -> int:
        """What the program returns."""
        parts = compiled.objects([self.sources / "source.cpp"], flags, [self.sources / "inner"])
        return compiled.call([compiled.linked(parts, self.program, [])], 60, ok=False).returncode

    @property
    def compilations(self) -> int:
        return len(self.log.read_text().splitlines())


@pytest.fixture
def room(tmp_path, monkeypatch):
    made = Room(tmp_path)
    monkeypatch.setattr(compiled, "COMPILER", str(made.compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    compiled._folder.cache_clear()
    yield made
    compiled._folder.cache_clear()


def test_the_same_source_is_compiled_once_for_all_checkouts(room):
    assert room.value() == 3
    room.sources = shutil.copytree(room.sources, room.sources.parent / "b")
    assert room.value() == 3 and room.compilations == 1


def test_headers_that_change_or_hide_one_another_and_flags_make_new_objects(room):
    assert room.value() == 3
    header = room.sources / "inner" / "value.h"
    before = header.stat()
    header.write_text("#define VALUE 4\n")
    os.utime(header, ns=(before.st_atime_ns, before.st_mtime_ns))  # same size, same time
    assert room.value() == 4
    (room.sources / "value.h").write_text("#ifndef VALUE\n#define VALUE 5\n#endif\n")
    assert [room.value(), room.value("-DVALUE=6")] == [5, 6]
    shutil.rmtree(room.sources / "inner")
    assert room.value() == 5 and room.compilations == 4


def test_what_does_not_compile_is_an_error_each_time(room):
    (room.sources / "source.cpp").write_text("int main() { return nothing; }\n")
    for _ in range(2):
        with pytest.raises(AssertionError, match=r"source.cpp:1:.*nothing"):
            room.value()


def test_workers_at_the_same_time_compile_once(room):
    environment = os.environ | {"CXX": str(room.compiler), "PYTHONPATH": str(Path(compiled.__file__).parent)}
    command = [sys.executable, "-c", WORKER, str(room.sources)]
    workers = [subprocess.Popen(command, env=environment) for _ in range(3)]
    assert [worker.wait(60) for worker in workers] == [0, 0, 0] and room.compilations == 1


def test_unused_objects_are_forgotten(room):
    room.value()
    [kept] = compiled._folder().glob("*.o")
    long_ago = kept.stat().st_mtime - (compiled.DAYS + 1) * 86400
    os.utime(kept, (long_ago, long_ago))
    room.value()  # it is used
    compiled._folder.cache_clear()
    assert [*compiled._folder().glob("*.o")] == [kept]
    os.utime(kept, (long_ago, long_ago))
    compiled._folder.cache_clear()
    assert not [*compiled._folder().glob("*.o")]


def test_without_a_right_to_write_the_folder_is_temporary(room, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert room.value() == 3 and not compiled._folder().is_relative_to("/proc")
