"""The header of a GGUF file (version 2 and 3): metadata and the places of its tensors, every count checked before it is used.

A file is "GGUF", a version, two counts, the metadata (key, type, value), the tensors' names, dimensions, types and offsets,
padding, then their blocks. Dimensions start with the innermost.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from modelstore.errors import FormatError, UnsupportedError
from modelstore.format.names import check_tensor
from modelstore.format.region import Shape

MAGIC = b"GGUF"
MAX_HEADER = 256 << 20  # vocabularies of a million tokens take a tenth of it
ALIGNMENT = 32
_DIMENSIONS = 8
_MAX_ALIGNMENT = 1 << 20
_STRING, _ARRAY = 8, 9
_NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
TYPES = {0: "u8", 1: "i8", 2: "u16", 3: "i16", 4: "u32", 5: "i32", 6: "f32", 7: "bool", 8: "string", 9: "array", 10: "u64", 11: "i64", 12: "f64"}  # fmt: skip  # noqa: E501


@dataclass(frozen=True, slots=True)
class MetadataValue:
    """A value of the metadata: its type's name, that of an array's items, and a number, a text, or many of them."""

    type: str
    value: Any
    items: str | None = None


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """A tensor: its shape (outermost first), type, and the place of its bytes in the file.

    `block` numbers of a row are stored in `size` bytes.
    """

    name: str
    shape: Shape
    type: str
    start: int
    block: int
    size: int

    @property
    def stored(self) -> Shape:
        """The shape of its bytes."""
        return (*self.shape[:-1], self.shape[-1] // self.block * self.size)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.stored)


@dataclass(frozen=True, slots=True)
class Header:
    """A file's metadata and tensors in the order of their bytes, the length of all before these, and what they align to."""

    metadata: Mapping[str, MetadataValue]
    tensors: tuple[GGUFTensor, ...]
    length: int
    alignment: int

    def get(self, key: str, default: Any = None) -> Any:
        """A metadata value."""
        found = self.metadata.get(key)
        return default if found is None else found.value


def parse_header(read: Callable[[int, int], bytes], file_size: int) -> Header:
    """The header of a file of which `read(start, length)` gives bytes.

    `FormatError` if it is not valid: counts and lengths beyond the file, names that repeat, tensors that overlap, are not a
    whole number of blocks, or are outside the file. `UnsupportedError` for other versions, byte orders and types, and split
    files.
    """
    cursor = _Cursor(read, min(file_size, MAX_HEADER))
    if cursor.take(4) != MAGIC:
        raise FormatError("it does not begin as a GGUF file does")
    version = cursor.number("<u4")
    if version not in (2, 3):
        what = "is big-endian" if version & 0xFFFF == 0 else f"has version {version}, where 2 and 3 are read"
        raise UnsupportedError(f"the GGUF file {what}: convert it again")
    count, entries = cursor.number("<u8"), cursor.number("<u8")
    cursor.check(24 * count + 13 * entries)
    metadata: dict[str, MetadataValue] = {}
    for _ in range(entries):
        key = cursor.text()
        if key in metadata:
            raise FormatError(f"the key {key[:80]!r} appears twice")
        metadata[key] = cursor.value(cursor.number("<u4"))
    if _whole(metadata, "split.count", 1) > 1:
        raise UnsupportedError(
            "it is one part of a split GGUF file: put the parts together with llama-gguf-split first"
        )
    alignment = _whole(metadata, "general.alignment", ALIGNMENT)
    if not 1 <= alignment <= _MAX_ALIGNMENT or alignment % 8:
        raise FormatError(f"its alignment is {alignment}, which is not valid")
    infos = [_info(cursor) for _ in range(count)]
    data = -(-cursor.at // alignment) * alignment
    sizes = _sizes()
    tensors = sorted((_tensor(info, data, alignment, sizes) for info in infos), key=lambda t: (t.start, t.nbytes))
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise FormatError("the name of a tensor appears twice")
    at = data
    for tensor in tensors:
        if tensor.start < at or tensor.start + tensor.nbytes > file_size:
            what = (
                "overlaps the one before it" if tensor.start < at else "reaches beyond the end: the file was cut short"
            )
            raise FormatError(f"tensor {tensor.name!r} {what}", tensor=tensor.name)
        at = tensor.start + tensor.nbytes
    return Header(metadata, tuple(tensors), cursor.at, alignment)


def _whole(metadata: Mapping[str, MetadataValue], key: str, default: int) -> int:
    value = metadata[key].value if key in metadata else default
    if type(value) is not int:
        raise FormatError(f"{key} is not a whole number")
    return value


_Info = tuple[str, Shape, int, int]


def _info(cursor: _Cursor) -> _Info:
    name = check_tensor(cursor.text())
    dimensions = cursor.number("<u4")
    if dimensions > _DIMENSIONS:
        raise FormatError(f"tensor {name!r} has {dimensions} dimensions, where {_DIMENSIONS} is the limit", tensor=name)
    shape = tuple(reversed([cursor.number("<u8") for _ in range(dimensions)])) or (1,)
    return name, shape, cursor.number("<u4"), cursor.number("<u8")


def _tensor(info: _Info, data: int, alignment: int, sizes: Mapping[int, tuple[str, int, int]]) -> GGUFTensor:
    name, shape, number, offset = info
    if number not in sizes:
        raise UnsupportedError(
            f"tensor {name!r} has type {number}, which is not known: update the gguf package", tensor=name
        )
    kind, block, size = sizes[number]
    if math.prod(n for n in shape if n) >= 1 << 60 or shape[-1] % block or offset % alignment:
        raise FormatError(
            f"tensor {name!r} of shape {shape} is not a whole number of {kind} blocks at a place of theirs", tensor=name
        )
    return GGUFTensor(name, shape, kind, data + offset, block, size)


def _sizes() -> dict[int, tuple[str, int, int]]:
    """Types by number: name, numbers in a block, bytes of it."""
    try:
        import gguf
    except ImportError:
        raise UnsupportedError("GGUF needs the package gguf: pip install 'modelstore[gguf]'") from None
    return {int(kind): (kind.name, block, size) for kind, (block, size) in gguf.GGML_QUANT_SIZES.items()}


class _Cursor:
    """Reads a header from its start, no further than it needs."""

    def __init__(self, read: Callable[[int, int], bytes], limit: int) -> None:
        self._read = read
        self._limit = limit
        self._data = b""
        self.at = 0

    def check(self, length: int) -> None:
        """`FormatError` unless that much can still come."""
        if length > self._limit - self.at:
            raise FormatError(
                f"its header asks for {length} bytes, and {self._limit - self.at} are left: it was cut short"
            )

    def take(self, length: int) -> bytes:
        self.check(length)
        stop = self.at + length
        if stop > len(self._data):
            self._data += self._read(
                len(self._data), min(self._limit, max(stop, 2 * len(self._data), 1 << 20)) - len(self._data)
            )
        data = self._data[self.at : stop]
        self.at = stop
        return data

    def number(self, kind: str) -> Any:
        dtype = np.dtype(kind)
        return np.frombuffer(self.take(dtype.itemsize), dtype)[0].item()

    def text(self) -> str:
        (length,) = struct.unpack("<Q", self.take(8))
        return self.take(length).decode("utf-8", "surrogateescape")

    def value(self, kind: int) -> MetadataValue:
        if kind == _STRING:
            return MetadataValue("string", self.text())
        if kind == _ARRAY:
            of, count = self.number("<u4"), self.number("<u8")
            if of == _STRING:
                self.check(8 * count)
                return MetadataValue("array", [self.text() for _ in range(count)], "string")
            dtype = self._dtype(of)
            return MetadataValue("array", np.frombuffer(self.take(count * dtype.itemsize), dtype), TYPES[of])
        return MetadataValue(TYPES.get(kind, ""), self.number(self._dtype(kind).str))

    @staticmethod
    def _dtype(kind: int) -> np.dtype[Any]:
        if kind not in _NUMBERS:
            raise FormatError(f"a value of its metadata has type {kind}, which is not valid here")
        return np.dtype(_NUMBERS[kind])
