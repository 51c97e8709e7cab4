"""The header of a safetensors file, for checkpoints that are read and for packs: parse, check, build.

A file is an 8-byte little-endian header length, the header (JSON: name → dtype, shape, offsets), then the data, which the
tensors cover without a gap or an overlap. Offsets count from the first byte of the data, which is at `8 + header length`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from modelstore.errors import FormatError, UnsupportedError
from modelstore.format.dtypes import DTYPES, FROM_SAFETENSORS, dtype
from modelstore.format.region import Shape

PREFIX = 8
MAX_HEADER = 100_000_000  # the safetensors library's own limit
MAX_DIMENSIONS = 64  # torch's limit
MAX_BYTES = 2**63 - 1
METADATA = "__metadata__"
ALIGNMENT = 8

# Valid in a header, with no counterpart in torch: named, so that the error says the file is sound.
_SUB_BYTE = frozenset({"F6_E2M3", "F6_E3M2"})


@dataclass(frozen=True, slots=True)
class HeaderEntry:
    """One tensor of a header.

    `dtype` is torch's name for it and `shape` torch's shape (for `float4_e2m1fn_x2` the header counts numbers, torch
    and `shape` count bytes of two). The bytes are `start` to `stop`, counted from the first byte of the data.
    """

    name: str
    dtype: str
    shape: Shape
    start: int
    stop: int


def header_length(prefix: bytes, file_size: int | None = None) -> int:
    """The header's length in bytes, from the first 8 bytes of the file.

    `FormatError` if it is beyond the limit of 100 MB, below 2 (an empty JSON object), or beyond the file's end.
    """
    if len(prefix) < PREFIX:
        raise FormatError(f"a safetensors file has at least {PREFIX} bytes, this one has {len(prefix)}")
    length = int.from_bytes(prefix[:PREFIX], "little")
    if not 2 <= length <= MAX_HEADER:
        raise FormatError(f"the header's length is {length}, where 2 to {MAX_HEADER} is valid: not a safetensors file")
    if file_size is not None and PREFIX + length > file_size:
        raise FormatError(f"the header is {length} bytes long but the file has {file_size}: the file was cut short")
    return length


def parse_header(header: bytes, file_size: int) -> tuple[list[HeaderEntry], dict[str, str]]:
    """Entries in the order of their data, and the file's own metadata, of a header (without its 8-byte prefix).

    `file_size` is that of the whole file. `FormatError` if anything is not valid: JSON, a repeated name, an
    unknown dtype, a size that is not shape times dtype, an overlap, a hole, data beyond the end or left over.
    `UnsupportedError` for dtypes that are valid and have no counterpart here.
    """
    table = _decode(header)
    metadata = _parse_metadata(table.pop(METADATA, {}))
    entries = [_parse_entry(name, fields) for name, fields in table.items()]
    entries.sort(key=lambda e: (e.start, e.stop))
    at = 0
    for entry in entries:
        if entry.start != at:
            kind = "overlaps the tensor before it" if entry.start < at else "leaves a hole before it"
            raise FormatError(f"tensor {entry.name!r} begins at {entry.start}, not {at}: it {kind}", tensor=entry.name)
        at = entry.stop
    data = file_size - PREFIX - len(header)
    if at != data:
        what = "was cut short" if at > data else "has bytes that belong to no tensor"
        raise FormatError(f"the tensors take {at} bytes and the file has {data} of data: it {what}")
    return entries, metadata


def build_header(entries: Iterable[HeaderEntry], metadata: Mapping[str, str] | None = None) -> bytes:
    """A whole header, its 8-byte prefix included, padded with spaces so that the data starts at a multiple of 8.

    The same entries in the same order, and the same metadata in any order, give the same bytes. `ValueError` if
    the entries do not follow one another without a gap, in order; `UnsupportedError` for a dtype safetensors lacks.
    """
    table: dict[str, Any] = {}
    if metadata:
        table[METADATA] = dict(sorted(metadata.items()))
    at = 0
    for entry in entries:
        if entry.name in table or entry.name == METADATA:
            raise ValueError(f"the name {entry.name!r} is taken: give every tensor another")
        kind = dtype(entry.dtype)
        if kind.safetensors is None:
            raise UnsupportedError(f"safetensors has no dtype for {kind.name}", tensor=entry.name)
        if entry.start != at or entry.stop - entry.start != math.prod(entry.shape) * kind.itemsize:
            raise ValueError(f"{entry} does not begin at {at}, or its size is not shape times dtype")
        at = entry.stop
        shape = list(entry.shape)
        if kind.safetensors == "F4":
            if not shape:
                raise UnsupportedError("a 0-d float4_e2m1fn_x2 has no shape in safetensors", tensor=entry.name)
            shape[-1] *= 2
        table[entry.name] = {"dtype": kind.safetensors, "shape": shape, "data_offsets": [entry.start, entry.stop]}
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-(PREFIX + len(text)) % ALIGNMENT)
    if len(text) > MAX_HEADER:
        raise UnsupportedError(f"a header of {len(text)} bytes is beyond the limit of {MAX_HEADER}: use more files")
    return len(text).to_bytes(PREFIX, "little") + text


def _decode(header: bytes) -> dict[str, Any]:
    if not header.startswith(b"{"):
        raise FormatError("a safetensors header begins with '{'; this file is something else")
    try:
        table = json.loads(header.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise FormatError("the header's JSON is nested too deeply") from None
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are both
        raise FormatError(f"the header is not valid JSON: {error}") from None
    return table  # type: ignore[no-any-return]  # it starts with '{'


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for name, value in pairs:
        if name in table:
            raise FormatError(f"the name {name[:200]!r} appears twice in the header")
        table[name] = value
    return table


def _no_constant(text: str) -> None:
    raise FormatError(f"{text} is not valid in a header")


def _parse_metadata(metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError(f"{METADATA} must map text to text")
    return metadata


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_BYTES


def _parse_entry(name: str, fields: Any) -> HeaderEntry:
    def bad(what: str) -> FormatError:
        return FormatError(f"tensor {name[:200]!r}: {what}", tensor=name)

    if not isinstance(fields, dict) or not fields.keys() >= {"dtype", "shape", "data_offsets"}:
        raise bad("an entry has 'dtype', 'shape' and 'data_offsets'")
    label, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if isinstance(label, str) and label in _SUB_BYTE:
        raise UnsupportedError(f"tensor {name!r} has dtype {label}, which torch lacks", tensor=name)
    if not isinstance(label, str) or label not in FROM_SAFETENSORS:
        named = repr(label[:40]) if isinstance(label, str) else f"of type {type(label).__name__}"
        raise bad(f"unknown dtype {named}; known are {', '.join(FROM_SAFETENSORS)}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(_is_size(n) for n in shape):
        raise bad(f"the shape must be at most {MAX_DIMENSIONS} whole numbers, none negative")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(n) for n in offsets):
        raise bad("'data_offsets' must be two whole numbers, none negative")
    start, stop = offsets
    kind = FROM_SAFETENSORS[label]
    if label == "F4":
        if not shape or shape[-1] % 2:
            raise UnsupportedError(f"tensor {name!r} is F4 with an odd last dimension; torch packs pairs", tensor=name)
        shape = [*shape[:-1], shape[-1] // 2]
    # Factors can be huge while another is 0: then nothing is stored, and the strides are of no use to anyone.
    size = math.prod(shape) * DTYPES[kind.name].itemsize
    if size > MAX_BYTES or math.prod(n for n in shape if n) > MAX_BYTES:
        raise bad("the shape is beyond 2**63 bytes")
    if stop - start != size:
        raise bad(f"{stop - start} bytes where shape {shape} of {kind.name} takes {size}")
    return HeaderEntry(name, kind.name, tuple(shape), start, stop)
