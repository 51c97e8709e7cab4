"""Structs, made ready to be decoded by several threads.

msgspec learns how a struct is decoded when it is decoded for the first time, and shows what it has learned before that is all:
a second thread that decodes the same struct meanwhile, or another one that has it as a member, ends the process with a
segmentation fault (msgspec 0.22). So it learns every struct here, one after another, before anything is decoded.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from modelstore.format.locks import Lock

T = TypeVar("T")

_learned: set[Any] = set()
_one = Lock()


def prepared(kind: type[T]) -> type[T]:
    """The type as it is, from now on safe to decode in any thread: `msgspec.json.decode(data, type=prepared(Record))`."""
    if kind not in _learned:
        with _one:
            msgspec.json.Decoder(kind)
            _learned.add(kind)
    return kind
