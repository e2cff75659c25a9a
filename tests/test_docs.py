# SPDX-License-Identifier: Apache-2.0
"""The documents: sentences are short, links and files exist, and the glossary's words stand in the code.

What is no prose is not counted: code, tables (they have cells, no sentences), headings, and what a program writes
between its marks (`speed`, `demo`: bench.plot and bench/demo_vs_torch.py have their own tests).
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("docs/*.md")), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "csrc/README.md"))]
MOST_WORDS, MOST_COLUMNS = 25, 100

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))

# ---- prose ---------------------------------------------------------------------------------------------------------

ABBREVIATIONS = {"al", "approx", "cf", "e.g", "eq", "etc", "fig", "i.e", "sec", "vs"}
GENERATED = re.compile(r"<!-- (\w+):begin -->.*?<!-- \1:end -->", re.S)
COMMENT = re.compile(r"<!--.*?-->", re.S)
FENCE = re.compile(r"^ *```.*?^ *```[^\n]*$", re.S | re.M)
SPAN = re.compile(r"(`+)(.+?)\1", re.S)
IMAGE = re.compile(r"!\[[^]]*\]\([^)]*\)")
LINK = re.compile(r"\[([^]]*)\]\(([^)]*)\)")
ITEM = re.compile(r"^ *(?:[-*]|\d+\.) +")


def blanked(pattern: re.Pattern[str], text: str) -> str:
    """The text without what matches, and with as many lines as before."""
    return pattern.sub(lambda match: "\n" * match[0].count("\n"), text)


def prose_lines(text: str) -> list[str]:
    """The lines of a page, those emptied that are no prose."""
    for pattern in (GENERATED, COMMENT, FENCE):
        text = blanked(pattern, text)
    lines = text.split("\n")
    inside_list = False
    for n, line in enumerate(lines):
        if ITEM.match(line):
            inside_list = True
        elif line and not line.startswith(" "):
            inside_list = False
        code = line.startswith("    ") and not inside_list
        if code or line.startswith("#") or line.lstrip().startswith("|"):
            lines[n] = ""
    return lines


def paragraphs(text: str) -> list[tuple[int, str]]:
    """Each paragraph and each item of a list, in one line, with the number of its first line."""
    found: list[tuple[int, str]] = []
    open_ = False
    for n, line in enumerate(prose_lines(text), 1):
        if not line.strip():
            open_ = False
        elif open_ and not ITEM.match(line):
            found[-1] = found[-1][0], f"{found[-1][1]} {line.strip()}"
        else:
            found.append((n, ITEM.sub("", line).strip()))
            open_ = True
    return found


def plain(paragraph: str) -> str:
    """Code is one word, a link is its text."""
    paragraph = SPAN.sub("code", paragraph)
    return LINK.sub(r"\1", IMAGE.sub("", paragraph)).replace("**", "")


def sentences(paragraph: str) -> list[str]:
    """Cut behind each full stop that belongs to no abbreviation."""
    out, begin = [], 0
    for stop in re.finditer(r"[.!?]['\")*]*\s+", paragraph):
        word = re.search(r"[\w.]*$", paragraph[begin : stop.start()])[0].lstrip("(")
        if word.lower() in ABBREVIATIONS:
            continue
        out.append(paragraph[begin : stop.end()].strip())
        begin = stop.end()
    return [*out, paragraph[begin:].strip()] if paragraph[begin:].strip() else out


def words(sentence: str) -> int:
    return len(re.findall(r"\S*\w\S*", sentence))


@by_page
def test_sentences_are_short(page):
    long = [
        f"{page.relative_to(ROOT)}:{line}: {words(sentence)} words: {sentence}"
        for line, paragraph in paragraphs(page.read_text())
        for sentence in sentences(plain(paragraph))
        if words(sentence) > MOST_WORDS
    ]
    assert not long, f"more than {MOST_WORDS} words\n" + "\n".join(long)


@by_page
def test_a_semicolon_is_a_full_stop(page):
    found = [f"{page.name}:{line}: {text}" for line, text in paragraphs(page.read_text()) if ";" in plain(text)]
    assert not found, "\n".join(found)


@by_page
def test_lines_are_narrow(page):
    """A line that is one long link cannot be cut."""
    wide = [
        f"{page.name}:{n}: {len(line)} columns"
        for n, line in enumerate(prose_lines(page.read_text()), 1)
        if len(line) > MOST_COLUMNS and " " in LINK.sub("link", line).strip()
    ]
    assert not wide, "\n".join(wide)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two.", ["One.", "Two."]),
        ("See Ba et al. 2016, e.g. their table. And more.", ["See Ba et al. 2016, e.g. their table.", "And more."]),
        ("They wrote it (i.e. in 2000). It holds.", ["They wrote it (i.e. in 2000).", "It holds."]),
        ("There are B. The rest takes 1.5 us.", ["There are B.", "The rest takes 1.5 us."]),
        ('He said "no." We say yes!', ['He said "no."', "We say yes!"]),
        ("torch 2.13.0 or newer", ["torch 2.13.0 or newer"]),
    ],
)
def test_sentences_are_found(text, expected):
    assert sentences(text) == expected


def test_prose_is_found():
    text = "# A head\n\nOne `code; span` and\na [link](a.md).\n\n- item one\n  goes on\n- item two\n\nRun\n\n    code; here\n"
    text += "\n| a; | table |\n\n```\nfenced;\n```\n<!-- speed:begin -->\nmade; by a program\n<!-- speed:end -->\nEnd"
    assert [p for _, p in paragraphs(text)][1:3] == ["item one goes on", "item two"]
    assert not any(";" in plain(p) for _, p in paragraphs(text))
    assert words(plain(paragraphs(text)[0][1])) == 5
    assert paragraphs(text)[-1][1] == "End"
