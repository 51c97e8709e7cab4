"""A commit as a client sends it: lines of JSON, first a header, then what becomes of each path; read within a bounded memory."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from modelstore.format.names import check_new_files
from modelstore.serve.refusals import RefusedError

REGULAR = 48 << 20  # bytes of a file that comes within the commit itself
_LINE = 2 * REGULAR
_OPERATIONS = 100_000


@dataclass(frozen=True)
class Operation:
    """The change of one path."""

    kind: Literal["file", "lfsFile", "deletedFile", "deletedFolder"]
    path: str
    content: bytes = b""
    oid: str = ""


@dataclass(frozen=True)
class CommitHeader:
    """The message of a commit; `parent`: the commit that it was made on, if it names one."""

    message: str
    parent: str


def read_commit(path: Path) -> Iterator[CommitHeader | Operation]:
    """The header, then the operations; one line is held at a time. `RefusedError` (422) if it is not a commit."""
    with path.open("rb") as lines:
        for number in range(_OPERATIONS + 2):
            line = lines.readline(_LINE)
            if not line:
                if number == 0:
                    raise RefusedError(422, "the commit is empty: it begins with a header")
                return
            if not line.strip():
                continue
            yield _parsed(line, first=number == 0)
    raise RefusedError(413, f"a commit has at most {_OPERATIONS} operations")


def _parsed(line: bytes, *, first: bool) -> CommitHeader | Operation:
    try:
        found = msgspec.json.decode(line)
        key, value = found["key"], found["value"]
        if first != (key == "header"):
            raise ValueError("a commit has one header, its first line")
        if first:
            return _header(value)
        return _operation(key, value)
    except (msgspec.DecodeError, KeyError, TypeError, ValueError, binascii.Error) as error:
        raise RefusedError(422, f"a line of the commit is not valid: {error}") from None


def _header(value: Any) -> CommitHeader:
    summary, parent = value.get("summary", ""), value.get("parentCommit", "")
    if not isinstance(summary, str) or not isinstance(parent, str):
        raise ValueError("summary and parentCommit are texts")
    return CommitHeader(summary[:1000], parent)


def _operation(key: str, value: Any) -> Operation:
    path = value["path"]
    if not isinstance(path, str):
        raise ValueError("a path is a text")
    if key == "file":
        if value.get("encoding", "base64") != "base64":
            raise ValueError("content is encoded in base64")
        return Operation("file", _checked(path), base64.b64decode(value["content"], validate=True))
    if key == "lfsFile":
        if value.get("algo", "sha256") != "sha256" or not isinstance(value["oid"], str):
            raise ValueError("an LFS file is named by its SHA-256")
        return Operation("lfsFile", _checked(path), oid=value["oid"])
    if key == "deletedFile":
        return Operation("deletedFile", path)
    if key == "deletedFolder":
        return Operation("deletedFolder", path.rstrip("/") + "/")
    raise ValueError(f"there is no operation {key!r}")


def _checked(path: str) -> str:
    try:
        check_new_files([path])
    except Exception as error:
        raise ValueError(str(error)) from None
    return path
