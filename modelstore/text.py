"""Text as a terminal or a log may have it: nothing in it steers, reorders, hides or breaks what is shown.

Names of tensors, files and variants come from checkpoints and stores that anybody may have made. `shown` is what every
message, table and log passes through: what cannot be seen is written as an escape, as `repr` writes it.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from typing import Any

# Beside what `str.isprintable` refuses (controls, bidi and other format characters, halves of pairs, separators, what is
# not assigned): characters that are printable by their category, and yet are shown as nothing.
_BLANK = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")


def is_plain(text: str) -> bool:
    """Whether every character is seen where it stands."""
    return text.isprintable() and not _BLANK.search(text)


def shown(text: object, keep: str = "") -> str:
    """The text with what cannot be seen as escapes (`\\x1b`, `\\u202e`); characters of `keep` stay as they are."""
    text = str(text)
    if is_plain(text):
        return text
    return "".join(c if c in keep or is_plain(c) else c.encode("unicode_escape").decode() for c in text)


def json_line(value: Any) -> str:
    """A value as one line of JSON; what cannot be seen is written as JSON's own escapes, so the value stays the same.

    Halves of pairs, which JSON cannot hold, become their escape's text.
    """
    import msgspec

    try:
        text = msgspec.json.encode(value).decode()
    except UnicodeEncodeError:
        text = msgspec.json.encode(_whole(msgspec.to_builtins(value))).decode()
    return text if is_plain(text) else "".join(c if is_plain(c) else _units(c) for c in text)


def _whole(value: Any) -> Any:
    """Plain data without halves of pairs."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_whole(key): _whole(item) for key, item in value.items()}
    return [_whole(item) for item in value] if isinstance(value, list | tuple) else value


def _units(character: str) -> str:
    data = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{data[i : i + 2].hex()}" for i in range(0, len(data), 2))


def cells(text: str) -> int:
    """Columns of a terminal that the text takes."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.category(c) in ("Mn", "Me") for c in text)


def shortened(text: str, width: int) -> str:
    """The text, with its middle left out if it takes more than `width` columns: start and end distinguish names."""
    if cells(text) <= width:
        return text
    if width < 2:
        return "…"[:width]
    tail = _fitting(text[::-1], width // 2)[::-1]
    return _fitting(text, width - 1 - cells(tail)) + "…" + tail


def _fitting(text: str, width: int) -> str:
    """As much of the text's start as fits."""
    taken = text[:width]
    while cells(taken) > width:
        taken = taken[:-1]
    return taken


class ShownRecords(logging.Filter):
    """Lets what a log record names be shown, whatever handler writes it."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Escape the record's arguments; the message itself is the program's own, and stays what records are grouped by."""
        if isinstance(record.args, tuple):
            record.args = tuple(a if isinstance(a, int | float) else shown(a) for a in record.args)
        return True


logging.getLogger("modelstore").addFilter(ShownRecords())
