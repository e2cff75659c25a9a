# SPDX-License-Identifier: Apache-2.0
"""Text as numbers: English that every Python carries, or the user's file."""

import hashlib
from collections import Counter
from collections.abc import Iterable

import numpy as np

from .. import files

HELD_OUT = 0.05  # the end of the text, never trained on
LARGEST_VOCABULARY = 256
OTHER = "\ufffd"  # stands for every character beyond the commonest


def read(path: str | None) -> str:
    """The file's text, or Python's own language reference (`pydoc_data.topics`)."""
    if path is None:
        from pydoc_data.topics import topics

        # The topics quote one another. Every paragraph is taken once, or the held-out end would be known already.
        paragraphs: dict[str, str] = {}
        for topic in topics.values():
            for paragraph in topic.split("\n\n"):
                paragraphs.setdefault(" ".join(paragraph.split()), paragraph.rstrip())
        return "\n\n".join(paragraph for key, paragraph in paragraphs.items() if key)
    text = files.text("demo", path)
    if len(text) < 1000:
        raise ValueError(f"demo: {path} has {len(text)} characters; expected at least 1000 to learn from")
    return text


class Text:
    """The characters as numbers: `train` and `held_out`, int32 arrays into `vocabulary`."""

    def __init__(self, text: str) -> None:
        self.digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        characters = sorted(set(text))
        if len(characters) > LARGEST_VOCABULARY:
            common = Counter(text).most_common(LARGEST_VOCABULARY - 1)
            characters = sorted({OTHER, *(character for character, _ in common)})
        self.vocabulary = "".join(characters)
        ids = self.encode(text)
        cut = len(ids) - max(int(len(ids) * HELD_OUT), 100)
        self.train, self.held_out = ids[:cut], ids[cut:]

    def encode(self, text: str) -> np.ndarray:
        number = {character: n for n, character in enumerate(self.vocabulary)}
        other = number.get(OTHER, 0)
        return np.fromiter((number.get(character, other) for character in text), np.int32, len(text))

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.vocabulary[n] for n in ids)


def rows(ids: np.ndarray, count: int) -> np.ndarray:
    """The stream cut into `count` long columns to walk along together: (steps + 1, count), time-major."""
    steps = (len(ids) - 1) // count
    if steps < 1:
        raise ValueError(f"demo: {len(ids)} characters cannot be cut into {count} rows; use a longer text")
    starts = np.arange(count) * steps
    return np.ascontiguousarray(ids[starts[None, :] + np.arange(steps + 1)[:, None]])
