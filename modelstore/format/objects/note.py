"""Notes on a version, such as who made it from what: kept in its record, for people."""

from __future__ import annotations

import getpass
import os
import re
import socket
from collections.abc import Mapping
from typing import Any

import msgspec

MAX_MESSAGE = 4096  # characters
MAX_META = 64  # entries
MAX_VALUE = 1024  # characters
_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9._/-]{0,63}")
_SECRET = re.compile(r"(?<=://)[^/@\s]*@")  # user and password in an address


class Note(msgspec.Struct, frozen=True, omit_defaults=True):
    """`by` made a version of `source`, against `parent`, and said `message` and `meta` of it; all may be empty."""

    by: str = ""
    message: str = ""
    meta: dict[str, str] = {}
    source: str = ""
    parent: str = ""


def note(message: str | None, meta: Mapping[str, Any] | None, source: object, parent: str = "") -> Note:
    """The note of a version that this process makes; `ValueError` if a message or an entry is too long or misnamed."""
    text = message or ""
    if len(text) > MAX_MESSAGE:
        raise ValueError(f"message has {len(text):,} characters: at most {MAX_MESSAGE:,} are kept")
    return Note(_author(), _text(text, "message"), _meta(meta or {}), _named(source), parent)


def _meta(meta: Mapping[str, Any]) -> dict[str, str]:
    if len(meta) > MAX_META:
        raise ValueError(f"meta has {len(meta)} entries: at most {MAX_META} are kept")
    made = {}
    for key, value in meta.items():
        if not isinstance(key, str) or not _KEY.fullmatch(key):
            raise ValueError(
                f"meta key {str(key)[:80]!r} is not valid: begin with a letter, go on with letters, digits, '.', '_', '-' and "
                "'/', at most 64"
            )
        if not isinstance(value, str | int | float | bool):
            raise TypeError(f"meta {key!r} must be a text or a number, not {type(value).__name__}")
        if len(str(value)) > MAX_VALUE:
            raise ValueError(f"meta {key!r} has {len(str(value)):,} characters: at most {MAX_VALUE:,} are kept")
        made[key] = _text(str(value), f"meta {key!r}")
    return made


def _text(text: str, what: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what} is not valid Unicode: give a text without halves of pairs") from None
    return text


def _author() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container's user has no name
        user = str(os.getuid()) if hasattr(os, "getuid") else ""
    return f"{user}@{socket.gethostname()}"[:256].encode(errors="replace").decode()


def _named(source: object) -> str:
    """A source in a few words: its address, or what it is."""
    if isinstance(source, str | os.PathLike):
        return (
            _SECRET.sub("", os.fspath(source) if not isinstance(source, str) else source)[:MAX_VALUE]
            .encode(errors="replace")
            .decode()
        )
    # Not of whatever has a length: `len` of a wrapped module may fail.
    count = f" of {len(source)}" if isinstance(source, Mapping) else ""
    return f"{type(source).__name__}{count} in memory"[:MAX_VALUE]
