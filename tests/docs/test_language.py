"""Pages are written in plain English of today: no clause hung in front of its sentence, no words of another time."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.test_house import FILES, ROOT, parse, where

TOP = ROOT.parent
PAGES = [*sorted((TOP / "docs").glob("*.md")), TOP / "README.md", TOP / "CONTRIBUTING.md"]
FENCED = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
ITEM = re.compile(r"\s*(?:[-*]|\d+\.) |\s*$|[#|!<]")
# A sentence, a part after a colon or semicolon, or a cell that starts with a clause in place of its subject:
# "What is read is checked" for "Every chunk is checked when it is read".
HUNG = re.compile(r"(?:^|[.:;] )[*(]*(?:What|Whatever|Who|Whoever|Whose|Of|Where|Wherever)\b(?![^.]*\?)")
OLD = re.compile(
    r"(?<![Tt]here )\b(?:is|are) no (?!more|worse|\w+er\b)\w"  # is not a
    r"|\b(?:is|are) (?:not )?to be\b"  # must be
    r"|\b(?:has|have) not(?: (?:the|a|all|any|got)\b|[.,;:])"  # does not have
    r"|\b(?:is|are) (?:said|told)\b"  # the result says
    r"|\b(?:mend(?:s|ed|ing)?|anew|whoever|whosoever|wants?|lies|lie|lay|beg[aiu]ns?|beginning|bears?)\b"
    r"|(?<!all )\bat once\b"  # immediately
)


def prose(text: str) -> Iterator[str]:
    """Each paragraph, list item and table cell, in one line, without headings, code and pictures."""
    part: list[str] = []
    for line in [*FENCED.sub("", text).splitlines(), ""]:
        if ITEM.match(line) and part:
            yield re.sub(r"`[^`]*`", "`…`", " ".join(part))
            part = []
        if line.startswith("|"):
            yield from (re.sub(r"`[^`]*`", "`…`", cell.strip()) for cell in line.split("|"))
        elif line.strip() and not line.startswith(("#", "!", "<")):
            part.append(re.sub(r"^(?:[-*]|\d+\.) ", "", line.strip()))


def found(text: str) -> list[str]:
    """Each phrase of a page that is hung or old, with the text around it."""
    return [
        f"…{part[max(hit.start() - 30, 0) : hit.end() + 50]}…"
        for part in prose(text)
        for pattern in (HUNG, OLD)
        for hit in pattern.finditer(part)
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_pages_are_in_plain_english(page: object) -> None:
    wrong = found((TOP / str(page)).read_text(encoding="utf-8"))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("text", "hits"),
    [
        ("Good. What is read is checked.", 1),
        ("- Of others only chunks are read: Where one is lost, it is sent.", 2),
        ("A file is no link, and must\nlie here at once.", 3),
        ("| a | Who has it can join |", 1),
        ("# Where the limits are\n\n```\nWhat lies here\n```\n\nThere is no link. `lies` is a name.", 0),
        ("What does it cost? A second.", 0),
    ],
)
def test_hung_and_old_sentences_are_found(text: str, hits: int) -> None:
    assert len(found(text)) == hits, found(text)


def docstrings() -> Iterator[tuple[str, str]]:
    """Each public module, class and function, and its docstring without quotations. A reader's "want" is a term."""
    for path in FILES:
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                name = "" if isinstance(node, ast.Module) else node.name
                text = re.sub(r'"[^"]*"|\bwants?\b', "…", ast.get_docstring(node) or "")
                if text and not name.startswith("_"):
                    yield f"{where(path)} {name}", text


def test_docstrings_are_in_plain_english() -> None:
    wrong = [f"{place}: {hit}" for place, text in docstrings() for hit in found(text)]
    assert not wrong, "\n".join(wrong)


def test_there_are_docstrings_to_look_at() -> None:
    assert len(list(docstrings())) > 1500
