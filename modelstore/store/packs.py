"""Packs: objects of many encoded chunks, each a valid safetensors file named by the BLAKE3 of its bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import msgspec
import numpy as np

from modelstore.errors import CorruptionError, FormatError, ModelStoreError, NotFoundError
from modelstore.format.buffers import Buffer, as_bytes, view
from modelstore.format.digest import name_of_pieces
from modelstore.format.files.safetensors import PREFIX, HeaderEntry, build_header, header_length, parse_header
from modelstore.format.objects.manifest import FORMAT, CodecSpec
from modelstore.format.objects.record import PACKS
from modelstore.format.region import Shape
from modelstore.storage.base import Storage
from modelstore.storage.pool import REQUESTS, ordered

METADATA_KEY = "modelstore"
COPY_ENTRY = "manifest"
FILE = "file:"  # before a file's path, among the names of entries
PACK_BYTES = 128 << 20


class TensorNote(msgspec.Struct, frozen=True):
    """A pack's note on a tensor that has chunks in it, so that the data can be read by the pack alone."""

    dtype: str
    shape: Shape
    chunk: Shape
    codec: CodecSpec


class PackNote(msgspec.Struct, frozen=True, omit_defaults=True):
    """A pack's own description, in its metadata."""

    format: int
    tensors: dict[str, TensorNote] = {}


@dataclass(slots=True)
class PackBuilder:
    """A pack being filled in memory. Entries are stored in the order in which they are added."""

    entries: list[HeaderEntry] = field(default_factory=list)
    pieces: list[Buffer] = field(default_factory=list)
    notes: dict[str, TensorNote] = field(default_factory=dict)
    size: int = 0

    def add(self, name: str, data: Buffer) -> int:
        """Append an entry; its offset from the first byte of the pack's data."""
        data = as_bytes(data)
        start = self.size
        self.entries.append(HeaderEntry(name, "uint8", (len(data),), start, start + len(data)))
        self.pieces.append(data)
        self.size += len(data)
        return start

    def announce(self, name: str, dtype: str, shape: Shape, nbytes: int) -> None:
        """An entry whose bytes will be written by the caller: a tensor in one piece, too large to be held."""
        self.entries.append(HeaderEntry(name, dtype, shape, self.size, self.size + nbytes))
        self.size += nbytes

    def header(self, metadata: Mapping[str, str]) -> bytes:
        """The safetensors header of what was added so far."""
        note = msgspec.json.encode(PackNote(FORMAT, self.notes), order="deterministic").decode()
        return build_header(self.entries, {**metadata, METADATA_KEY: note})


@dataclass(frozen=True, slots=True)
class Pack:
    """A finished pack: its name, its bytes, and the start of its data."""

    digest: str
    pieces: Iterable[Buffer]  # to be taken more than once
    size: int
    data_start: int


def finish(builder: PackBuilder, metadata: Mapping[str, str]) -> Pack:
    """The pack's bytes and name. The header comes first, so every offset is `data_start` later than `add` said."""
    header = builder.header(metadata)
    pieces = (header, *builder.pieces)
    return Pack(name_of_pieces(pieces), pieces, len(header) + builder.size, len(header))


def data_start(storage: Storage, key: str) -> int:
    """The start of the data of a pack, from its first bytes; 0 if they cannot be right, or it is gone."""
    prefix = np.empty(PREFIX, np.uint8)
    info = storage.info(key)
    try:
        storage.read(key, 0, view(prefix))
        return PREFIX + header_length(prefix.tobytes(), info.size) if info else 0
    except (NotFoundError, CorruptionError, FormatError):
        return 0


def copy_pack(model: str, digest: str, data: bytes) -> Pack:
    """The pack that is a manifest's copy, from the manifest's digest and its stored bytes."""
    builder = PackBuilder()
    builder.add(COPY_ENTRY, data)
    return finish(builder, {"kind": "manifest", "manifest": digest, "model": model})


@dataclass(frozen=True, slots=True)
class Opened:
    """A stored pack's header: its entries, its metadata, the start of its data, and the object's size."""

    entries: list[HeaderEntry]
    metadata: dict[str, str]
    data_start: int
    size: int


def open_pack(storage: Storage, key: str) -> Opened:
    """A stored pack's header; `NotFoundError` or `FormatError` if there is none."""
    info = storage.info(key)
    if info is None:
        raise NotFoundError(f"there is no object {key}: run 'modelstore repair'", object=key)
    prefix = np.empty(PREFIX, np.uint8)
    storage.read(key, 0, view(prefix))
    header = np.empty(header_length(prefix.tobytes(), info.size), np.uint8)
    storage.read(key, PREFIX, view(header))
    entries, metadata = parse_header(header.tobytes(), info.size)
    return Opened(entries, metadata, PREFIX + len(header), info.size)


def manifest_copies(storage: Storage) -> list[tuple[str, str, str]]:
    """(model, manifest, pack) of all packs that are copies of manifests, as their headers say; looked for among all packs."""

    def header(key: str) -> tuple[str, str, str] | None:
        try:
            metadata = open_pack(storage, key).metadata
        except ModelStoreError:
            return None  # a damaged pack is not a copy; if it is needed, it is reported
        if metadata.get("kind") != "manifest":
            return None
        return metadata.get("model", ""), metadata.get("manifest", ""), key.rpartition("/")[2].partition(".")[0]

    headers = ordered(header, (info.key for info in storage.list(PACKS)), REQUESTS, "modelstore-packs")
    return [one for one in headers if one is not None]
