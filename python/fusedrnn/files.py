# SPDX-License-Identifier: Apache-2.0
"""Files that were written by somebody else: read whole or refused, with one ValueError that names the file.

Nothing is taken on trust: a pipe would wait for ever, a header may promise more than the file holds, a name may stand
there twice. What comes back is no larger than the file.
"""

from __future__ import annotations

import io
import json
import math
import os
import stat
import zipfile
from collections.abc import Container
from pathlib import Path
from typing import Any

import numpy as np

from .errors import fail

LARGEST_TEXT = 1 << 28  # bytes
MOST = 2**63  # of an integer
STRANGE = 0.1  # the share of a text that may be no UTF-8: an old encoding's accents


def size(op: str, path: str | Path, fix: str = "") -> int:
    """The bytes of a file that is there and can be read."""
    try:
        found = os.stat(path)
        if stat.S_ISREG(found.st_mode):
            with open(path, "rb"):
                return found.st_size
    except FileNotFoundError:
        fail(op, str(path), "is not there", "a file", fix)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        fail(op, repr(str(path)), f"cannot be opened ({getattr(error, 'strerror', None) or error})", "a file", fix)
    fail(op, str(path), "is a directory" if stat.S_ISDIR(found.st_mode) else "is no regular file", "a file", fix)


def text(op: str, path: str | Path, fix: str = "", largest: int = LARGEST_TEXT) -> str:
    """A text in UTF-8; a few bytes that are none become U+FFFD."""
    count = size(op, path, fix)
    if count > largest:
        fail(op, str(path), f"has {count:,} bytes", f"a text of {largest:,} at most", fix)
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        fail(op, str(path), f"cannot be read ({error.strerror})", "a file", fix)
    found = content.decode("utf-8", "replace")
    if "\0" in found or found.count("\ufffd") > STRANGE * len(found):
        what = "holds zero bytes" if "\0" in found else "is no UTF-8"
        fail(op, str(path), f"is no text ({what})", "a text in UTF-8", fix)
    return found.replace("\r\n", "\n").replace("\r", "\n")  # as text files are read everywhere


def arrays(
    op: str, path: str | Path, fix: str = "", *, only: Container[str] | None = None, largest: int = LARGEST_TEXT
) -> dict[str, np.ndarray]:
    """What numpy.savez wrote: arrays by name, of numbers or characters, in memory of their own. Pickles are not read.

    only: names to read, None for all; largest: the bytes that these may have together.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.savez(f"{folder}/a.npz", weight=np.ones((2, 3)))
    ...     arrays("example", f"{folder}/a.npz")["weight"].shape
    (2, 3)
    """
    count = size(op, path, fix)
    try:
        with zipfile.ZipFile(path) as archive:
            every = [(member.filename.removesuffix(".npy"), member) for member in archive.infolist()]
            if len(dict(every)) < len(every):
                raise ValueError("it holds two arrays of one name")
            chosen = {name: member for name, member in every if only is None or name in only}
            members = chosen.values()
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                raise ValueError("its arrays are compressed, as numpy.savez does not")
            if (total := sum(member.file_size for member in members)) > count:
                raise ValueError("its arrays are larger than the file")
            if total > largest:
                raise ValueError(f"its arrays have {total:,} bytes, more than {largest:,}")
            return {name: _array(archive.read(member)) for name, member in chosen.items()}
    except Exception as error:  # zipfile raises many kinds for what it cannot understand
        why = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
        fail(op, str(path), f"is damaged ({why})", "a file of arrays as numpy.savez writes it", fix)


def _array(content: bytes) -> np.ndarray:
    """An array in NumPy's format; a header that promises what does not follow is refused before memory is taken."""
    stream = io.BytesIO(content)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("an array's format is not 1.0")
    shape, by_columns, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype.kind not in "biufcU":
        raise ValueError(f"an array has dtype {dtype}")
    begin = stream.tell()
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(content) - begin:
        raise ValueError("an array's header and its length do not fit")
    flat = np.frombuffer(content, dtype, math.prod(shape), begin)
    return flat.reshape(shape, order="F" if by_columns else "C").copy()


def document(op: str, path: str | Path, fix: str = "") -> dict[str, Any]:
    """A JSON object."""
    try:
        found = json.loads(text(op, path, fix))
    except (json.JSONDecodeError, RecursionError) as error:
        fail(op, str(path), f"is no JSON ({error})", "a JSON object", fix)
    if not isinstance(found, dict):
        fail(op, str(path), f"holds a JSON {type(found).__name__}", "a JSON object", fix)
    return found


# Values of a file.


def whole(value: Any, low: int = 0, high: int = MOST) -> bool:
    """Whether it is an integer from low to high."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def real(value: Any) -> bool:
    """Whether it is a finite number."""
    return whole(value, -MOST) or isinstance(value, float) and math.isfinite(value)


def short(value: Any) -> str:
    """The value for an error: a file may hold a million of them."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
