"""Every command and option that a message or a page tells of is there, so that what it advises can be done."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from modelstore.cli.main import app
from tests.test_house import FILES, ROOT, parse, where

COMMAND: Any = typer.main.get_command(app)  # of the click that typer has, whichever that is
PAGES = [*sorted((ROOT.parent / "docs").rglob("*.md")), ROOT.parent / "README.md", ROOT.parent / "CONTRIBUTING.md"]
# A command and what follows it, up to the end of the quotation, the line, or what a shell would take for another command.
TOLD = re.compile(r"(?<!-n )(?<![\w./-])modelstore((?:[ ]+[^\s'`\"|;&#)]+)+)")
# Of the short form that messages have beside the whole one: 'cluster status', gc --compact.
SHORT = re.compile(
    r"['`]((?:cluster )?[a-z]+(?: [A-Z@:\[\]-]+)*(?: --?[a-z][a-z-]*)*)['`]|\b(?:see|run|by) ([a-z]+ --[a-z-]+)"
)
NO_VERB = {"as", "is", "has", "does", "import", "and", "a", "on", "host", "cluster"}  # what follows the package's name
NO_VERB |= {
    "builds",
    "computes",
    "decodes",
    "knows",
    "packs",
    "recognises",
    "refuses",
    "runs",
    "treats",
    "uses",
    "writes",
}


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Each text in a file of Python, with {} for what is put into it."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.JoinedStr):
            yield node.lineno, "".join(str(p.value) if isinstance(p, ast.Constant) else "{}" for p in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def told() -> Iterator[tuple[str, list[str]]]:
    """Where a command is told of, and its words."""
    for path in FILES:
        for line, text in texts(path):
            yield from ((f"{where(path)}:{line}", found) for found in _commands(text))
    for page in PAGES:
        for line, text in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
            yield from ((f"{page.name}:{line}", found) for found in _commands(text))


def _commands(text: str) -> Iterator[list[str]]:
    for found in TOLD.finditer(text):
        words = found[1].split()
        if words[0].rstrip(".,:") not in NO_VERB or (words[0] == "cluster" and len(words) > 1):
            yield words
    for found in SHORT.finditer(text):
        words = (found[1] or found[2]).split()
        if words[0] in COMMAND.commands and len(words) > 1:
            yield words


def wrong(words: list[str]) -> str:
    """What of a command is not there; "" where all of it is."""
    at = COMMAND
    rest = [word.rstrip(".,:") for word in words]
    while hasattr(at, "commands"):
        if not rest:
            return ""
        if rest[0].startswith("-"):
            return _unknown(at, rest)
        verb = rest.pop(0)
        if not re.fullmatch(r"[a-z]+", verb):
            return ""  # prose, or a name that is put in
        if verb not in at.commands:
            return f"there is no command {verb!r}"
        at = at.commands[verb]
    return _unknown(at, rest)


def _unknown(command: Any, words: list[str]) -> str:
    options = [p for p in command.params if p.param_type_name == "option"]
    known = {"-h", "--help"} | {name for one in options for name in (*one.opts, *one.secondary_opts)}
    given = [word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)]
    unknown = [option for option in given if option not in known]
    return f"{command.name} has no {unknown[0]}" if unknown else ""


def test_every_command_that_is_told_of_is_there() -> None:
    found = [f"{place}: modelstore {' '.join(words)}: {why}" for place, words in told() if (why := wrong(words))]
    assert not found, "\n".join(found)


def test_there_is_something_to_look_at() -> None:
    assert len(list(told())) > 150


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("repair --source URL", "has no --source"),
        ("delete m@1", "no command 'delete'"),
        ("cluster begin", "no command 'begin'"),
        ("cluster start --nodes 3", "has no --nodes"),
        ("gc --delete --grace 0", ""),
        ("--version", ""),
    ],
)
def test_what_is_not_there_is_found(words: str, says: str) -> None:
    assert says in wrong(words.split())
    assert bool(says) == bool(wrong(words.split()))
