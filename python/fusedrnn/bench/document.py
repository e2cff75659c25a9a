# SPDX-License-Identifier: Apache-2.0
"""bench.json, read whole and compared with what tables and pictures need of it, before either is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import files
from ..errors import fail
from .report import CELL, PASS, Document

EVERY = "*"  # stands for every key of an object


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _positive(value: Any) -> bool:
    return files.real(value) and value > 0


def _count(value: Any) -> bool:
    return files.whole(value, 1)


def _result(value: Any) -> bool:
    """Why there is none, or the median and the quarters beside it."""
    if not isinstance(value, dict):
        return False
    return _text(value["failed"]) if "failed" in value else all(_positive(value.get(n)) for n in ("median", "q1", "q3"))


# A function says whether a value is right; a list of one, what each item is. A key that ends with "?" may be missing.
RECORD = {
    **dict.fromkeys(("group", "size", "name", "ours?"), _text),
    **dict.fromkeys(("threads", "B", "H"), _count),
    "pass": lambda value: _text(value) and value in PASS,
    "cell": lambda value: _text(value) and value in CELL,
    "limit": lambda value: value is None or _positive(value),
    "results": {EVERY: _result},
}
NEEDED: dict[str, Any] = {
    "machine": {"cpu": _text, "cores": _count, "simd": [_text], "python": _text},
    "date": _text,
    "versions": {EVERY: _text},
    "settings": {"clock": _text},
    "limits": {EVERY: {"method": _text, "flops": _positive, "bandwidth": {EVERY: _positive}}},
    "overhead?": {
        "calls": {EVERY: dict.fromkeys(("layer", "step", "function"), _positive)},
        "tapes": {EVERY: {"tape": files.real, "recompute": files.real, "allowed": lambda value: True}},
        "imports": dict.fromkeys(("fusedrnn", "first layer", "numpy"), files.real),
    },
    "records": [RECORD],
}
NUMBERED = ("limits", "bandwidth")  # objects whose keys are numbers


def read(path: Path) -> Document:
    """The document of one run. Raises ValueError for a file that is none.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "bench.json").write_text('{"machine": []}')
    ...     try:
    ...         read(Path(folder, "bench.json"))
    ...     except ValueError as error:
    ...         print(str(error).partition("bench.json ")[2])
    is not whole (machine is []); expected what `python -m fusedrnn bench` writes.
    """
    found = files.document("bench", path)
    wrong = _misfit("", found, NEEDED)
    if not wrong and not found["records"]:
        wrong = "records is empty"
    if wrong:
        fail("bench", str(path), f"is not whole ({wrong})", "what `python -m fusedrnn bench` writes")
    return found


def _misfit(name: str, value: Any, needed: Any) -> str:
    """What is wrong with the first value that is wrong; "" if none is."""
    if callable(needed):
        return "" if needed(value) else f"{name} is {files.short(value)}"
    if not isinstance(value, type(needed)):
        return f"{name} is {files.short(value)}"
    if isinstance(needed, list):
        return next(filter(None, (_misfit(f"{name}[{n}]", item, needed[0]) for n, item in enumerate(value))), "")
    numbered = name.rpartition(".")[2] in NUMBERED
    for key, inner in needed.items():
        plain = key.removesuffix("?")
        if key == EVERY:
            for each, item in value.items():
                if numbered and not (each.isdecimal() and each.isascii() and len(each) < 20):
                    return f"{name} has the key {files.short(each)}"
                if wrong := _misfit(f"{name}.{each}", item, inner):
                    return wrong
        elif plain in value:
            if wrong := _misfit(f"{name}.{plain}".lstrip("."), value[plain], inner):
                return wrong
        elif plain == key:
            return f"{name or 'it'} has no {key}"
    return ""
