"""A model as a read-only Zarr v3 group, for `zarr`, xarray and whatever else reads one.

group = zarr.open_group(ModelArrays(reader), mode="r")
group["model.embed_tokens.weight"][1000:1010]           # reads the chunks of these rows, and no others
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any, Protocol

import numpy as np
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype

from modelstore.format.buffers import Buffer as Raw
from modelstore.format.buffers import as_bytes
from modelstore.format.region import Region, Shape, extent
from modelstore.integrations.zarr_nodes import METADATA, Node, Nodes, TensorLike, shown


class TensorReader(Protocol):
    """The least that a model must offer to be seen as Zarr. Called from several threads in parallel."""

    @property
    def tensors(self) -> Mapping[str, TensorLike]:
        """Every tensor, in the order of the model."""
        ...

    @property
    def attributes(self) -> Mapping[str, Any]:
        """The attributes of the root group; plain JSON."""
        ...

    def read(self, name: str, region: Region) -> Raw:
        """The region's bytes: row-major, little-endian, checked; it is always one chunk of the tensor's grid."""
        ...


class ModelArrays(Store):
    """A model's tensors as a Zarr v3 store; one Zarr chunk is one chunk of the model's grid.

    dtypes that zarr-python cannot express appear as float32 (bfloat16, fp8, fp4: exact) or complex64 (complex32:
    exact), or with `bits=True` as unsigned integers of their width; the attribute `dtype` names the stored one. The
    payload of a NaN is kept for bfloat16 only. With `consolidated` the root's document carries the metadata of all
    tensors: listing is then free, and opening takes about 0.1 ms a tensor; without it, opening is instant. Blocking
    reads run in threads. Anything that writes raises `ValueError`.
    """

    def __init__(
        self, reader: TensorReader, *, bits: bool = False, consolidated: bool = True, read_only: bool = True
    ) -> None:
        if not read_only:
            raise ValueError("a model is read-only: open it with mode='r'")
        super().__init__(read_only=True)
        self.reader = reader
        self.bits = bits
        self.consolidated = consolidated
        self._nodes = Nodes(reader.tensors, reader.attributes, bits=bits, consolidated=consolidated)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ModelArrays):
            return False
        return (self.reader, self.bits, self.consolidated) == (other.reader, other.bits, other.consolidated)

    def __hash__(self) -> int:
        return hash((type(self), self.bits))

    def __repr__(self) -> str:
        return f"ModelArrays({len(self._nodes.arrays)} tensors, bits={self.bits})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self.reader, self.bits, self.consolidated)

    def with_read_only(self, read_only: bool = False) -> ModelArrays:
        """The same store, not opened; `ValueError` for one that could be written."""
        return type(self)(self.reader, bits=self.bits, consolidated=self.consolidated, read_only=read_only)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """The value at a key, or the part of it asked for; None if there is none."""
        await self._ensure_open()
        if key == METADATA or key.endswith("/" + METADATA):
            # In a thread: the root's document can be tens of megabytes
            document = await asyncio.to_thread(self._nodes.document, key[: -len(METADATA)].rstrip("/"))
            return None if document is None else prototype.buffer.from_bytes(_part(document, byte_range))
        found = self._nodes.chunk(key)
        if found is None:
            return None
        node, index = found
        if byte_range is not None and not _part(range(_size(node)), byte_range):
            return prototype.buffer.from_bytes(b"")
        chunk = await asyncio.to_thread(_chunk, self.reader, node, index)
        return prototype.buffer.from_bytes(_part(chunk, byte_range))

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Several values or parts of them, read at the same time."""
        return list(await asyncio.gather(*(self.get(key, prototype, part) for key, part in key_ranges)))

    async def exists(self, key: str) -> bool:
        """Whether the key has a value; nothing is read."""
        if key == METADATA or key.endswith("/" + METADATA):
            path = key[: -len(METADATA)].rstrip("/")
            return path in self._nodes.children or path in self._nodes.arrays
        return self._nodes.chunk(key) is not None

    async def getsize(self, key: str) -> int:
        """The size of a value in bytes, without reading a chunk; `FileNotFoundError` if there is none."""
        if found := self._nodes.chunk(key):
            return _size(found[0])
        document = self._nodes.document(key[: -len(METADATA)].rstrip("/")) if await self.exists(key) else None
        if document is None:
            raise FileNotFoundError(key)
        return len(document)

    async def list(self) -> AsyncIterator[str]:
        """Every key."""
        for key in self._nodes.all_keys():
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """Every key that starts with the prefix."""
        for key in self._nodes.keys_under(prefix):
            yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """The names directly under the prefix."""
        for name in self._nodes.members(prefix):
            yield name

    async def set(self, key: str, value: Buffer) -> None:  # noqa: ARG002
        """`ValueError`: a model is read-only."""
        self._check_writable()

    async def delete(self, key: str) -> None:  # noqa: ARG002
        """`ValueError`: a model is read-only."""
        self._check_writable()

    @property
    def supports_writes(self) -> bool:
        return False

    @property
    def supports_deletes(self) -> bool:
        return False

    @property
    def supports_listing(self) -> bool:
        return True


def _restored(reader: TensorReader, bits: bool, consolidated: bool) -> ModelArrays:
    return ModelArrays(reader, bits=bits, consolidated=consolidated)


def _chunk(reader: TensorReader, node: Node, index: Shape) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The bytes of one chunk as Zarr needs it: at the edges of the array padded with zeros to its full shape."""
    region = node.stored_region(index)
    raw = as_bytes(reader.read(node.name, region))
    expected = math.prod(extent(region)) * node.stored.itemsize
    if raw.size != expected:
        raise ValueError(f"{node.name}: {raw.size} bytes were read for region {region}, which has {expected}")
    return shown(node, index, raw)


def _size(node: Node) -> int:
    """Bytes of any one chunk of the array."""
    return math.prod(node.chunks) * node.view.dtype.itemsize


def _part(value: Any, request: ByteRequest | None) -> Any:
    """The part of a sequence that a request asks for, cut off at its end."""
    match request:
        case None:
            return value
        case RangeByteRequest(start, end):
            return value[start:end]
        case OffsetByteRequest(offset):
            return value[offset:]
        case SuffixByteRequest(suffix):
            return value[max(0, len(value) - suffix) :]
        case _:
            raise ValueError(f"Unexpected byte_range, got {request}.")
