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


PAGE = """# A head

One `code; span` and
a [link](a.md).

- item one
  goes on
- item two

Run

    code; here

| a; | table |

```
fenced;
```
<!-- speed:begin -->
made; by a program
<!-- speed:end -->
End
"""


def test_prose_is_found():
    found = [plain(paragraph) for _, paragraph in paragraphs(PAGE)]
    assert found == ["One code and a link.", "item one goes on", "item two", "Run", "End"]
    assert words(found[0]) == 5


# ---- what the pages name -------------------------------------------------------------------------------------------

SUFFIXES = ("c", "cmake", "cpp", "cu", "h", "inc", "ini", "json", "md", "py", "pyi", "sh", "toml", "txt")
FOLDERS = ("csrc", "python", "tests", "bench", "docs", ".ci", ".github")
MADE_UP = re.compile(r"<|\.\.\.|(?<![A-Z])(?:NAME|MACHINE)(?![A-Z])")  # stands for many names


@functools.cache
def files() -> frozenset[str]:
    """All files, below the root."""
    inside = [
        p for folder in FOLDERS for p in (ROOT / folder).rglob("*") if p.is_file() and "__pycache__" not in p.parts
    ]
    return frozenset(str(p.relative_to(ROOT)) for p in [*inside, *(p for p in ROOT.iterdir() if p.is_file())])


def exists(name: str, page: Path) -> bool:
    """Whether there is such a file or folder: below the root, beside the page, or anywhere by the end of its path."""
    name = name.rstrip("/")
    for options in re.findall(r"\{([^}]*)\}", name)[:1]:  # a_{b,c}.h
        return all(exists(name.replace(f"{{{options}}}", one), page) for one in options.split(","))
    if "*" in name:
        pattern = re.compile(r"(?:.*/)?" + re.escape(name).replace(r"\*", "[^/]*"))
        return any(pattern.fullmatch(file) for file in files())
    return (ROOT / name).exists() or (page.parent / name).exists() or any(f.endswith("/" + name) for f in files())


def file_names(text: str) -> set[str]:
    """What in code spans, and in blocks of the kind `tree`, is meant as a file or a folder."""
    spans = [span for _, span in SPAN.findall(blanked(FENCE, text))]
    spans += re.findall(r"^```tree\n(.*?)^```", text, re.S | re.M)
    names = {word.strip("'\"(),:;") for span in spans for word in span.split()}
    end = re.compile(rf"[\w./*{{}},<>-]*(?:[\w*}}]\.(?:{'|'.join(SUFFIXES)})|[\w*]/)")
    return {name for name in names if end.fullmatch(name) and not MADE_UP.search(name)}


@by_page
def test_files_exist(page):
    missing = sorted(name for name in file_names(page.read_text()) if not exists(name, page))
    assert not missing


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    heads = re.findall(r"^#+ +(.*?) *$", blanked(FENCE, page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@by_page
def test_links_lead_somewhere(page):
    for _, target in LINK.findall(blanked(FENCE, page.read_text())):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        to = (page.parent / name).resolve() if name else page
        assert to.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(to), f"{page.name}: {target}"


ENTRY = re.compile(r"^- \*\*([\w-]+)\*\*[^:]*:(.*?)(?=^- |^#|\Z)", re.S | re.M)
PLACE = re.compile(r"`(\w+)`\s+in\s+`([^`]+)`")


@functools.cache
def code_of(place: str) -> str:
    """The text of a file, or of all source files in a folder."""
    at = ROOT / place
    paths = [at] if at.is_file() else [p for p in at.rglob("*") if p.suffix[1:] in ("h", "cpp", "cu", "py")]
    return "\n".join(path.read_text() for path in paths)


def test_words_of_the_glossary_stand_in_the_code():
    entries = ENTRY.findall((ROOT / "docs" / "glossary.md").read_text())
    assert len(entries) > 25
    for word, meaning in entries:
        places = PLACE.findall(meaning)
        assert places, f"{word}: no `name` in `place`"
        for name, place in places:
            assert re.search(rf"\b{name}\b", code_of(place)), f"{word}: no {name} in {place}"
        used = re.compile(word.replace("-", "[-_ ]"), re.I)
        assert any(used.search(code_of(place)) for place in ("csrc", "python", "tests")), f"{word} stands nowhere"


SPANS = """`a.h` and `b/c.cpp`, `run it.py --x`, `d/`, `NAME.py`, `x.y`, `.h`
```
not_this.h
```
```tree
this.h  that/
```
"""


@pytest.mark.parametrize("name", ["engine.h", "csrc/cpu", "opt*.h", "nor{m,med}.h", "glossary.md"])
def test_what_is_there_is_found(name):
    assert exists(name, ROOT / "docs" / "cpu.md")


@pytest.mark.parametrize("name", ["engines.h", "csrc/gpu", "opts*.h", "nor{m,th}.h", "gine.h"])
def test_what_is_missing_is_missed(name):
    assert not exists(name, ROOT / "docs" / "cpu.md")


def test_file_names_are_found():
    assert file_names(SPANS) == {"a.h", "b/c.cpp", "it.py", "d/", "this.h", "that/"}
