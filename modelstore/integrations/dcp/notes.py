"""The file of a version that says what DCP knows beside tensors: where plain values are, and how names were flattened.

Plain values (learning rates, step counters, …) are pickles that torch makes and reads. The store keeps their bytes, one file for
each rank that saved some, and does not look into them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from modelstore.errors import FormatError, UnsupportedError
from modelstore.format.objects.decoding import prepared

FILE = "dcp/checkpoint.json"
VERSION = 1
Path = tuple[str | int, ...]


class BytesPlace(msgspec.Struct, frozen=True, array_like=True):
    """The place of a plain value: a file of the version, and the range in it."""

    file: str
    start: int
    stop: int


class CheckpointNotes(msgspec.Struct, frozen=True):
    """`values`: name → place of a plain value; `paths`: flattened name → keys that lead to it in the state dict."""

    format: int
    values: dict[str, BytesPlace]
    paths: dict[str, Path]


def bytes_file(rank: int) -> str:
    """The file with the plain values that a rank saved."""
    return f"dcp/values-{rank}.bin"


def encoded(values: Mapping[str, BytesPlace], planner_data: Any) -> bytes:
    """The file's bytes; `UnsupportedError` if a planner keeps something of its own in the metadata."""
    paths = planner_data if planner_data is not None else {}
    if not isinstance(paths, Mapping) or not all(_is_path(name, path) for name, path in paths.items()):
        raise UnsupportedError(
            "the planner keeps data of its own in the checkpoint's metadata, which cannot be stored: save with a "
            "DefaultSavePlanner, or with a planner whose planner_data is like its"
        )
    return msgspec.json.encode(CheckpointNotes(VERSION, dict(values), dict(paths)), order="sorted")


def _is_path(name: object, path: object) -> bool:
    return isinstance(name, str) and isinstance(path, tuple) and all(type(key) in (str, int) for key in path)


def decoded(data: bytes, files: Iterable[str]) -> CheckpointNotes:
    """The content of the file; `FormatError` if it is not valid, or names a file that the version does not have."""
    try:
        notes = msgspec.json.decode(data, type=prepared(CheckpointNotes))
    except (msgspec.DecodeError, RecursionError) as error:
        raise FormatError(f"{FILE} is not valid ({str(error)[:200]}): restore the version", object=FILE) from None
    if notes.format != VERSION:
        raise FormatError(
            f"{FILE} has format {notes.format}, where {VERSION} is known: use a later release", object=FILE
        )
    known = set(files)
    for name, place in notes.values.items():
        if place.file not in known or not 0 <= place.start <= place.stop:
            raise FormatError(
                f"{FILE} gives a place for {name[:80]!r} that is not there: restore the version", object=FILE
            )
    return notes
