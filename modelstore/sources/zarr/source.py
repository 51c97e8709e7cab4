"""Zarr hierarchies (format 2 and 3) as a source, as JAX and Orbax write them too: every array is a tensor."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.storage import LocalStore

from modelstore.errors import FormatError, ModelStoreError, NotFoundError, UnsupportedError
from modelstore.format import region as regions
from modelstore.format.buffers import Bytes
from modelstore.format.dtypes import DType
from modelstore.format.files.safetensors import MAX_BYTES
from modelstore.format.files.zarr_names import DOCUMENT, ChunkNames, chunk_names
from modelstore.format.names import check_file, check_tensor
from modelstore.format.region import Region
from modelstore.sources.arrays import copy_box, dtype_of
from modelstore.sources.base import TensorSpec
from modelstore.sources.local.filed import check_expansion, fingerprint
from modelstore.sources.local.folder import PASSED_OVER, hidden, read_json, walk
from modelstore.sources.local.reading import Files, boxed
from modelstore.sources.local.trees import TreeFiles
from modelstore.sources.zarr.bounds import bound, check_array
from modelstore.sources.zarr.chunks import Chunks, chunk_bytes, overlapping
from modelstore.sources.zarr.dtypes import RenamedDtypes

ATTRIBUTES = "zarr_attributes.json"
MAX_CHUNK = 16 << 30  # a chunk is decoded whole
MAX_FILES = 5_000_000
SMALL = 256 << 20  # bytes that arrays may have however little stores them
EXPANSION = 1000  # and beyond, for each stored byte: zeros compress a thousand times
_NO_CHUNK = "it is not a chunk of the array that it lies in"
_MARKS = frozenset({"zarr.json", ".zarray", ".zgroup", ".zattrs", ".zmetadata"})


class ZarrSource:
    """The arrays of a Zarr hierarchy, named by their paths. Reading a region decodes the Zarr chunks it touches."""

    def __init__(
        self,
        arrays: Mapping[str, Any],
        stored: Mapping[str, DType],
        files: Mapping[str, Path | bytes],
        *,
        fingerprint: str | None = None,
        opened: Files | None = None,
        skipped: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._arrays = dict(arrays)
        self._files = dict(files)
        self._fingerprint = fingerprint
        self._opened = opened or Files()
        self.skipped = skipped
        self._chunks = Chunks()
        self._specs = {name: _spec(name, array, stored.get(name)) for name, array in arrays.items()}

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        return tuple(self._specs.values())

    @property
    def aliases(self) -> Mapping[str, str]:
        return MappingProxyType({})

    @property
    def files(self) -> Mapping[str, Path | bytes]:
        return MappingProxyType(self._files)

    @property
    def metadata(self) -> Mapping[str, str]:
        return MappingProxyType({})

    @property
    def fingerprint(self) -> str | None:
        return self._fingerprint

    @property
    def opened(self) -> Files:
        """See `Source.opened`."""
        return self._opened

    def read(self, name: str, region: Region, out: Bytes) -> None:
        """See `Source.read`; the Zarr chunks that the region touches are decoded whole, and large ones kept for a while.

        So memory is bounded by the largest chunk and `zarr_chunks.KEPT`, where a chunk is larger than `out`.
        """
        spec = self._specs[name]
        regions.check(region, spec.shape)
        boxed(out, region, spec.dtype.itemsize)
        if not out.size:
            return
        array = self._arrays[name]
        size = chunk_bytes(array.chunks, spec.dtype.itemsize)
        if size <= 2 * out.size:
            values = self._decode(name, region)
            copy_box(values, regions.full(values.shape), out)
            return
        # Chunks larger than what is asked for: each is decoded once, and serves the regions that follow.
        box = boxed(out, region, spec.dtype.itemsize)
        for chunk, shared in overlapping(region, spec.shape, array.chunks):
            values = self._chunks.get((name, chunk), size, lambda chunk=chunk: self._decode(name, chunk))  # type: ignore[misc]
            part = np.empty(regions.size(shared) * spec.dtype.itemsize, np.uint8)
            copy_box(values, regions.shift(shared, chunk), part)
            target = box[regions.slices(regions.shift(shared, region))]
            target[...] = part.reshape(target.shape)

    def _decode(self, name: str, region: Region) -> NDArray[Any]:
        try:
            return np.asarray(self._arrays[name].get_basic_selection(regions.slices(region)))
        except Exception as error:  # codecs fail in their own ways on bytes that are not theirs
            raise FormatError(f"tensor {name!r}: zarr cannot read {region}: {str(error)[:300]}", tensor=name) from error

    def close(self) -> None:
        self._arrays.clear()
        self._opened.close()
        self._chunks.clear()


def open_directory(root: Path) -> ZarrSource:
    """A directory with Zarr arrays in it, under groups or plain folders. Files that are not Zarr's are kept."""
    if not root.is_dir():
        raise NotFoundError(f"{root} is not a directory", object=str(root))
    opened = TreeFiles(root)
    skipped: dict[str, str] = {}
    paths, groups, others, everything, usage = _walk(root, skipped)
    store = RenamedDtypes(LocalStore(root, read_only=True))
    arrays, attributes = {}, {}
    for group in groups:
        attributes[group] = _attributes(root / group)
    for path, version in paths.items():
        name = path or root.name.removesuffix(".zarr")
        arrays[name] = _open_array(store, path, name, version)
        check_array(name, arrays[name], usage[path].files, usage[path].largest)
        attributes[path] = dict(arrays[name].attrs)
    stored = {path or root.name.removesuffix(".zarr"): kind for path, kind in store.renamed.items()}
    state = fingerprint(everything, opened)
    files = others | _written(attributes)
    source = ZarrSource(arrays, stored, files, fingerprint=state, opened=opened, skipped=skipped)
    total = sum(used.bytes for used in usage.values())
    check_expansion(str(root), source.tensors, total, most=EXPANSION, small=SMALL)
    return source


def open_group(group: zarr.Group) -> ZarrSource:
    """An open Zarr group, of any store; its arrays are named by their paths in the group."""
    store = RenamedDtypes(group.store)
    version = group.metadata.zarr_format
    try:
        again = zarr.open_group(store, path=group.path, mode="r", zarr_format=version, use_consolidated=False)
        members = sorted(again.members(max_depth=None))
    except ModelStoreError:
        raise
    except Exception as error:
        raise FormatError(f"zarr cannot read the group {group.path!r}: {str(error)[:300]}") from error
    prefix = f"{group.path}/" if group.path else ""
    arrays = {name: member for name, member in members if isinstance(member, zarr.Array)}
    for array in arrays.values():
        bound(array)
    stored = {path.removeprefix(prefix): kind for path, kind in store.renamed.items()}
    attributes = {name: dict(member.attrs) for name, member in members} | {"": dict(group.attrs)}
    return ZarrSource(arrays, stored, _written(attributes))


def _open_array(store: RenamedDtypes, path: str, name: str, version: Literal[2, 3]) -> Any:
    try:
        array = zarr.open_array(store, path=path, mode="r", zarr_format=version)
        bound(array)
        return array
    except ModelStoreError:
        raise
    except Exception as error:  # zarr's own refusals have many types
        raise FormatError(f"zarr cannot open the array {name!r}: {str(error)[:300]}", tensor=name) from error


def _spec(name: str, array: Any, stored: DType | None) -> TensorSpec:
    check_tensor(name)
    kind = stored or dtype_of(name, array.dtype)
    shape = tuple(int(n) for n in array.shape)
    chunk = chunk_bytes(array.chunks, kind.itemsize)
    if any(n < 0 for n in shape) or math.prod(n for n in shape if n) * kind.itemsize > MAX_BYTES:
        raise FormatError(f"array {name!r} has shape {shape}, which is not valid", tensor=name)
    if chunk > MAX_CHUNK:
        raise UnsupportedError(
            f"array {name!r} has chunks of {chunk} bytes, where {MAX_CHUNK} is the limit: write it in smaller ones",
            tensor=name,
        )
    return TensorSpec(name, kind, shape)


@dataclass
class _Usage:
    """An array's files: how many, their bytes, the largest one's."""

    files: int = 0
    bytes: int = 0
    largest: int = 0

    def add(self, size: int) -> None:
        self.files += 1
        self.bytes += size
        self.largest = max(self.largest, size)


_Walked = tuple[
    dict[str, Literal[2, 3]], list[str], dict[str, Path | bytes], list[tuple[str, Path | bytes]], dict[str, _Usage]
]


def _walk(root: Path, skipped: dict[str, str]) -> _Walked:
    """Arrays (path → format), groups, other files, every file, and the arrays' use of them, of a directory.

    Links that lead out are refused, as is anything but a file in the place of an array or its metadata. Hidden files are
    `skipped`.
    """
    real = root.resolve()
    arrays: dict[str, Literal[2, 3]] = {}
    groups: list[str] = []
    others: dict[str, Path | bytes] = {}
    everything: list[tuple[str, Path | bytes]] = []
    inside: dict[str, str] = {}  # folder → the array it lies in: what is there is chunks
    chunks: dict[str, ChunkNames | None] = {}  # array → how its chunks are called
    usage: dict[str, _Usage] = {}
    for folder, folders, names in walk(root):
        here = Path(folder)
        for name in folders:
            if (why := hidden((name,))) and name not in (".git", ".cache"):
                skipped[(here / name).relative_to(root).as_posix()] = why
        folders[:] = sorted(name for name in folders if name not in PASSED_OVER and not hidden((name,)))
        path = "" if here == root else here.relative_to(root).as_posix()
        below = path in inside
        if not below and "manifest.ocdbt" in names:
            raise _ocdbt(here)
        if not below:
            version = _node(here, names)
            if version:
                arrays[path] = version
                chunks[path] = chunk_names(read_json(here / (".zarray" if version == 2 else DOCUMENT)), version)
                below = True
            elif _MARKS & set(names):
                groups.append(path)
        owner = inside.get(path, path)
        shown = sorted(name for name in names if name in _MARKS or not hidden((name,)))
        strange = _strange(chunks.get(owner), path, owner, folders, shown) if below else set()
        left = dict.fromkeys(set(names).difference(shown), "it is hidden") | dict.fromkeys(strange, _NO_CHUNK)
        skipped.update(((here / name).relative_to(root).as_posix(), why) for name, why in left.items())
        folders[:] = [name for name in folders if name not in strange]
        shown = [name for name in shown if name not in strange]
        inside.update((f"{path}/{name}".lstrip("/"), owner) for name in folders if below)
        used = usage.setdefault(owner, _Usage()) if below else None
        for file in _plain(here, folders, shown, real, strict=below):
            relative = file.relative_to(root).as_posix()
            everything.append((relative, file))
            if file.name in _MARKS:
                continue
            if used is not None:
                used.add(file.stat().st_size)
            else:
                others[check_file(relative)] = file
        if len(everything) > MAX_FILES:
            raise FormatError(f"{root} has more than {MAX_FILES} files: write larger chunks", object=str(root))
    if not arrays:
        raise FormatError(f"{root} has no Zarr array: no folder holds a .zarray or zarr.json", object=str(root))
    return arrays, groups, others, everything, usage


def _ocdbt(here: Path) -> UnsupportedError:
    """That a folder is of a format that looks like Zarr and is none."""
    return UnsupportedError(
        f"{here} is a checkpoint in OCDBT, which zarr cannot read: save it with use_ocdbt=False", object=str(here)
    )


def _strange(
    chunks: ChunkNames | None, path: str, owner: str, folders: Iterable[str], names: Iterable[str]
) -> set[str]:
    """The entries in the folder `path` of the array at `owner` that are not the array's: not its metadata, its chunks, or a
    way to them.

    A folder in the place of a chunk is not told of here: it is refused when it is read.
    """
    if chunks is None:
        return set()
    inner = f"{path[len(owner) :]}/".lstrip("/")
    strange = {name for name in names if f"{inner}{name}" not in _MARKS and not chunks.chunk(f"{inner}{name}")}
    ways = (f"{inner}{name}" for name in folders)
    return strange | {way[len(inner) :] for way in ways if not (chunks.leads(way) or chunks.chunk(way))}


def _plain(here: Path, folders: list[str], names: list[str], real: Path, *, strict: bool) -> Iterator[Path]:
    for name in [*folders, *names]:
        path = here / name
        if path.is_symlink() and not path.resolve().is_relative_to(real):
            raise FormatError(f"{path} is a link out of the directory: copy what it leads to", object=str(path))
    for name in names:
        path = here / name
        if path.is_file():
            yield path
        elif strict or name in _MARKS:
            raise FormatError(
                f"{path} is not a regular file: remove it, or put the file in its place", object=str(path)
            )


def _node(here: Path, names: list[str]) -> Literal[2, 3] | None:
    """The Zarr format of the array in this folder, None if it holds none."""
    if ".zarray" in names:
        return 2
    if "zarr.json" in names and read_json(here / "zarr.json").get("node_type") == "array":
        return 3
    return None


def _attributes(here: Path) -> dict[str, Any]:
    if (here / "zarr.json").is_file():
        attributes = read_json(here / "zarr.json").get("attributes", {})
    else:
        attributes = read_json(here / ".zattrs") if (here / ".zattrs").is_file() else {}
    return attributes if isinstance(attributes, dict) else {}


def _written(attributes: Mapping[str, dict[str, Any]]) -> dict[str, Path | bytes]:
    """The attributes of groups and arrays as one JSON file: path → attributes, "" for the root."""
    filled = {path: attributes[path] for path in sorted(attributes) if attributes[path]}
    return {ATTRIBUTES: json.dumps(filled, indent=2, sort_keys=True).encode()} if filled else {}
