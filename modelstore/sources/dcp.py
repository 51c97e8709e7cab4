"""Directories of `torch.distributed.checkpoint` as a source.

`.metadata` is a pickle: it is read by a reader that knows DCP's own records and runs nothing. Each chunk of a tensor is a
`torch.save` archive at a range of a `.distcp` file, found when it is first read, and read in its place.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelstore.errors import FormatError, UnsupportedError
from modelstore.format import region as regions
from modelstore.format.dtypes import DType
from modelstore.format.files.safetensors import MAX_BYTES, MAX_DIMENSIONS
from modelstore.format.names import check_file
from modelstore.format.region import Region, Shape
from modelstore.sources.base import TensorSpec
from modelstore.sources.local.filed import (
    Budget,
    CheckpointIndex,
    FiledBox,
    FiledSource,
    check_expansion,
    check_tiling,
    fingerprint,
)
from modelstore.sources.local.folder import Folder, scan
from modelstore.sources.local.reading import ArrayPlace, Files
from modelstore.sources.pickles.archive import Archive
from modelstore.sources.pickles.tensors import Ref, stand_ins
from modelstore.sources.pickles.unpickle import Record, ordered_dict, record, unpickle

METADATA = ".metadata"
MAX_METADATA = 1 << 30


@dataclass(frozen=True, slots=True)
class Item:
    """A range of a file that holds one `torch.save` archive."""

    path: Path
    start: int
    length: int


class DcpSource(FiledSource[Item]):
    """The tensors of a DCP checkpoint, by the flattened names it was saved with."""

    def __init__(self, found: CheckpointIndex[Item], opened: Files) -> None:
        super().__init__(found, opened)
        self._placed: dict[Item, ArrayPlace] = {}
        self._lock = threading.Lock()

    def place(self, spec: TensorSpec, piece: FiledBox[Item]) -> ArrayPlace:
        """The place of a chunk's bytes, remembered; `FormatError` if its archive is not what the metadata says."""
        with self._lock:
            known = self._placed.get(piece.where)
        if known is not None:
            return known
        archive = Archive(self._files, piece.where.path, piece.where.start, piece.where.length)
        ref = archive.structure()
        shape = regions.extent(piece.region)
        if not isinstance(ref, Ref) or ref.dtype != spec.dtype or ref.shape != shape:
            raise FormatError(
                f"tensor {spec.name!r}: {piece.where.path} at {piece.where.start} does not hold the chunk of shape "
                f"{shape} and dtype {spec.dtype.name} that {METADATA} says",
                tensor=spec.name,
                object=str(piece.where.path),
            )
        placed = archive.place(ref)
        with self._lock:
            self._placed[piece.where] = placed
        return placed


def open_directory(root: Path) -> DcpSource:
    """A directory that `torch.distributed.checkpoint.save` wrote.

    Entries that are not tensors (step counters, Python objects) are left out: `skipped` names them. Files other than the
    checkpoint's own are kept. `FormatError` if the metadata is not valid or a chunk is missing.
    """
    folder = scan(root, keep=frozenset({METADATA}))
    opened = Files(folder.states)
    path = folder.take(METADATA)
    size = path.stat().st_size
    if size > MAX_METADATA:
        raise FormatError(f"{path} has {size} bytes, where {MAX_METADATA} is the limit", object=str(path))
    data = opened.bytes(path, 0, size)
    metadata = unpickle(data, _ALLOWED, where=str(path))
    entries = _field(metadata, "Metadata", "state_dict_metadata", dict, path)
    stored = _stored(_field(metadata, "Metadata", "storage_data", dict, path), folder)
    specs: list[TensorSpec] = []
    pieces: dict[str, tuple[FiledBox[Item], ...]] = {}
    skipped = dict(folder.skipped)
    budget = Budget()
    left = len(data)  # a chunk takes some bytes of the metadata: lists of them may not be shared without end
    for name, entry in entries.items():
        if not isinstance(name, str) or not isinstance(entry, Record):
            raise FormatError(f"{path}: an entry of the state dict is not valid", object=str(path))
        if entry.kind == "BytesStorageMetadata":
            skipped[name] = "it is not a tensor"
            continue
        left -= len(_field(entry, "TensorStorageMetadata", "chunks", list, path))
        if left < 0:
            raise FormatError(f"{path} names more chunks than it can hold", object=str(path))
        spec, boxes = _tensor(name, entry, path, budget)
        specs.append(spec)
        pieces[name] = tuple(FiledBox(box, _item(stored, name, box, path)) for box in boxes)
    own = {file for file in folder.files if file == METADATA or file.endswith(".distcp")}
    check_expansion(str(root), specs, sum(folder.files[file].stat().st_size for file in own))
    kept: dict[str, Path | bytes] = {name: file for name, file in folder.files.items() if name not in own}
    found = CheckpointIndex(
        specs,
        pieces,
        files=kept,
        fingerprint=fingerprint(folder.files.items(), opened, {METADATA: data}),
        skipped=skipped,
    )
    return DcpSource(found, opened)


def _field(of: Any, kind: str, name: str, type_: type, path: Path) -> Any:
    value = of.get(name) if isinstance(of, Record) and of.kind == kind else None
    if not isinstance(value, type_):
        raise FormatError(f"{path}: {kind} has no valid {name!r}", object=str(path))
    return value


def _tensor(name: str, entry: Record, path: Path, budget: Budget) -> tuple[TensorSpec, list[Region]]:
    properties = _field(entry, "TensorStorageMetadata", "properties", Record, path)
    state = properties.state
    kind = next(iter(state.values() if isinstance(state, dict) else state or ()), None)  # the dtype comes first
    if isinstance(state, dict):
        kind = state.get("dtype")
    if not isinstance(kind, DType):
        raise UnsupportedError(f"{path}: tensor {name!r} has a dtype that cannot be stored", tensor=name)
    shape = _shape(entry.get("size"), name, path)
    boxes = []
    for chunk in _field(entry, "TensorStorageMetadata", "chunks", list, path):
        offsets = _shape(_field(chunk, "ChunkStorageMetadata", "offsets", tuple, path), name, path)
        sizes = _shape(_field(chunk, "ChunkStorageMetadata", "sizes", tuple, path), name, path)
        if len(offsets) != len(sizes):
            raise FormatError(f"{path}: a chunk of tensor {name!r} has offsets that do not fit its sizes", tensor=name)
        boxes.append(tuple((a, a + n) for a, n in zip(offsets, sizes, strict=True)))
    if regions.size(regions.full(shape)) * kind.itemsize > MAX_BYTES:
        raise FormatError(f"{path}: tensor {name!r} is beyond 2**63 bytes", tensor=name)
    check_tiling(name, shape, boxes, budget)
    return TensorSpec(name, kind, shape), [box for box in boxes if regions.size(box)]


def _shape(value: Any, name: str, path: Path) -> Shape:
    valid = isinstance(value, tuple) and len(value) <= MAX_DIMENSIONS
    if not valid or not all(type(n) is int and 0 <= n <= MAX_BYTES for n in value):
        raise FormatError(f"{path}: tensor {name!r} has sizes that are not valid", tensor=name)
    return value  # type: ignore[no-any-return]


def _stored(table: dict[Any, Any], folder: Folder) -> dict[str, Item]:
    """Chunk (name and offsets, as one text) → range of a file, for all tensors' chunks; checked against the files' sizes."""
    sizes: dict[str, int] = {}
    stored: dict[str, Item] = {}
    path = folder.root / METADATA
    for name, offsets, info in _indexed(table, path):
        file, start, length = info.get("relative_path"), info.get("offset"), info.get("length")
        if not isinstance(file, str) or type(start) is not int or type(length) is not int:
            raise FormatError(f"{path}: the place of {name!r} is not valid", tensor=name, object=str(path))
        if info.get("transform_descriptors"):
            raise UnsupportedError(
                f"{path}: {name!r} was written through a stream extension; save it without one", tensor=name
            )
        if file not in sizes:
            sizes[check_file(file)] = folder.take(file).stat().st_size
        if not (start >= 0 and length > 0 and start + length <= sizes[file]):
            raise FormatError(f"{path}: {name!r} lies outside {file}, which has {sizes[file]} bytes", tensor=name)
        stored[_key(name, offsets)] = Item(folder.files[file], start, length)
    return stored


def _indexed(table: dict[Any, Any], path: Path) -> Iterator[tuple[str, Shape, Record]]:
    for index, info in table.items():
        name = index.get("fqn") if isinstance(index, Record) else None
        if not isinstance(name, str) or not isinstance(info, Record) or info.kind != "_StorageInfo":
            raise FormatError(f"{path}: the table of places is not valid", object=str(path))
        if index.get("offset") is not None:  # else it is not a tensor's
            yield name, _shape(index.get("offset"), name, path), info


def _key(name: str, offsets: Shape) -> str:
    """A chunk as a text: tuples of numbers can be chosen to have one hash, texts cannot."""
    return f"{offsets} {name}"


def _item(stored: Mapping[str, Item], name: str, box: Region, path: Path) -> Item:
    try:
        return stored[_key(name, tuple(a for a, _ in box))]
    except KeyError:
        raise FormatError(f"{path}: nothing says where chunk {box} of tensor {name!r} lies", tensor=name) from None


_OF_DCP = "torch.distributed.checkpoint.metadata."
_CLASSES = (
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "Metadata",
    "MetadataIndex",
    "StorageMeta",
    "TensorProperties",
    "TensorStorageMetadata",
    "_MEM_FORMAT_ENCODING",
)
_ALLOWED = (
    stand_ins()
    | {_OF_DCP + name: record(name) for name in _CLASSES}
    | {
        "torch.distributed.checkpoint.filesystem._StorageInfo": record("_StorageInfo"),
        "torch.distributed.checkpoint.filesystem._StoragePrefix": record("_StoragePrefix"),
        "collections.OrderedDict": ordered_dict,
        "pathlib.PosixPath": record("path"),
        "pathlib.WindowsPath": record("path"),
        "pathlib.PurePosixPath": record("path"),
        "pathlib._local.PosixPath": record("path"),
        "pathlib._local.WindowsPath": record("path"),
    }
)
