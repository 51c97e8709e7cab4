"""Errors have one voice: one sentence in lower case, that says what is wrong, where, and what to do."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import modelstore.errors
from tests.test_house import FILES, parse, where

ERRORS = {name for name in vars(modelstore.errors) if name.endswith("Error")} | {"ValueError", "TypeError", "usage"}
NAMES = {"Ray", "Zarr", "Hugging", "PyTorch", "Python"}  # begin a sentence as they begin elsewhere
# "X is no Y" for "X is not a Y", "is to be" for "must be", "has not" for "does not have", "mend" for "repair" and "anew"
# for "again": English of another time.
OLD = re.compile(
    r"(?<!there )\b(?:is|are) no (?!longer|more|other|export's)[a-zA-Z]"
    r"|\b(?:is|are) to be (?:a|an|the|\{|positive)"
    r"|\b(?:has|have) not(?: the| all| got|:)|\bmend\b|\banew\b"
)
NOT_OURS = {"modelstore/integrations/zarr.py"}  # says to Zarr what Zarr's own stores say


def messages() -> Iterator[tuple[str, str]]:
    """Where each error is made, and its message, with {} for what is put into it."""
    for path in FILES:
        for node in ast.walk(parse(path)):
            if not (isinstance(node, ast.Call) and node.args and where(path) not in NOT_OURS):
                continue
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            text = _text(node.args[0])
            if name in ERRORS and text:
                yield f"{where(path)}:{node.lineno}", text


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return _text(node.left) + _text(node.right) if isinstance(node, ast.BinOp) else ""


def test_errors_are_one_sentence_in_lower_case() -> None:
    wrong = []
    for place, text in messages():
        first = text.split()[0]
        capital = first[:1].isupper() and first[1:2].islower() and first not in NAMES
        if capital or text.endswith((".", "!")) or ". " in text.replace("{}. ", "") or "\n" in text:
            wrong.append(f"{place}: {text}")
    assert not wrong, "\n".join(wrong)


def test_errors_are_said_in_the_english_of_today() -> None:
    wrong = [f"{place}: {text}" for place, text in messages() if OLD.search(text)]
    assert not wrong, "\n".join(wrong)


def test_there_are_messages_to_look_at() -> None:
    assert len(list(messages())) > 300
