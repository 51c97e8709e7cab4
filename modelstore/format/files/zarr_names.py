"""The names of files in a Zarr hierarchy: Zarr's own, and others beside them.

Zarr v3: a node is a folder with a `zarr.json`; an array's chunks are in it as `c/1/0` (or `c.1.0`), that of a scalar as `c`.
In format 2, and where `chunk_key_encoding` is "v2", they are `1.0` (or `1/0`), of a scalar `0`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

DOCUMENT = "zarr.json"
LOCK = "__lock"  # of an export that writes a hierarchy; a node never starts with "__"
FRESH = ".partial"  # ends the names of an export's files that are not whole
MARKS = (DOCUMENT, ".zarray", ".zgroup", ".zmetadata")  # at the top of a folder: readers take it for Zarr
_CHUNK = re.compile(r"(.+)/c(?:[./](?:0|[1-9]\d*))*", re.ASCII)


def foreign(names: Iterable[str], *, unfinished: bool = False) -> list[str]:
    """The files ('/'-separated, from the top) that are not part of a Zarr v3 group, in order.

    A chunk is one where the folder before its `c` has a document. In an `unfinished` hierarchy, documents may be missing, and
    files may end in ".partial".
    """
    there = sorted(names)
    arrays = {name.rpartition("/")[0] for name in there if name.rpartition("/")[2] == DOCUMENT}

    def known(name: str) -> bool:
        plain = name.removesuffix(FRESH) if unfinished else name
        if name == LOCK or plain.rpartition("/")[2] == DOCUMENT:
            return True
        chunk = _CHUNK.fullmatch(plain)
        return chunk is not None and (unfinished or chunk[1] in arrays)

    return [name for name in there if not known(name)]


@dataclass(frozen=True, slots=True)
class ChunkNames:
    """How an array names the files of its chunks: the prefix, the separator of the numbers, and how many these are."""

    first: tuple[str, ...]
    separator: str
    numbers: int

    def chunk(self, name: str) -> bool:
        """Whether a file of that name, from the array's folder, is a chunk."""
        parts = name.split(self.separator)
        return len(parts) == len(self.first) + self.numbers and self._begins(parts)

    def leads(self, name: str) -> bool:
        """Whether a folder of that name leads to chunks."""
        parts = name.split("/")
        return self.separator == "/" and len(parts) < len(self.first) + self.numbers and self._begins(parts)

    def _begins(self, parts: list[str]) -> bool:
        expected = self.first[: len(parts)]
        rest = parts[len(expected) :]
        return tuple(parts[: len(expected)]) == expected and all(p.isascii() and p.isdigit() for p in rest)


def chunk_names(document: Mapping[str, Any], version: Literal[2, 3]) -> ChunkNames | None:
    """How the array of a `.zarray` or `zarr.json` names its chunks; None if that is none that is known."""
    shape = document.get("shape")
    if not isinstance(shape, list):
        return None
    separator: Any
    if version == 2:
        prefixed, separator = False, document.get("dimension_separator", ".")
    else:
        encoding = document.get("chunk_key_encoding")
        encoding = {"name": encoding} if isinstance(encoding, str) else encoding
        if not isinstance(encoding, dict) or encoding.get("name") not in ("default", "v2"):
            return None
        prefixed, options = encoding["name"] == "default", encoding.get("configuration") or {}
        separator = options.get("separator", "/" if prefixed else ".") if isinstance(options, dict) else None
    if separator not in (".", "/"):
        return None
    if prefixed:
        return ChunkNames(("c",), separator, len(shape))
    return ChunkNames((), separator, len(shape)) if shape else ChunkNames(("0",), separator, 0)
