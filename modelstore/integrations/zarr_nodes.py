"""The nodes of a model's Zarr hierarchy: paths, groups, and the metadata documents."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from modelstore.format import boxes
from modelstore.format.buffers import Bytes
from modelstore.format.dtypes import DType
from modelstore.format.files.zarr_names import DOCUMENT
from modelstore.format.region import Region, Shape, full
from modelstore.integrations.zarr_values import ZarrDtype, view, widen

METADATA = DOCUMENT
_CHUNK_KEY = re.compile(r"^(.*)/c((?:/(?:0|[1-9]\d{0,17}))*)$", re.DOTALL)


class TensorLike(Protocol):
    """The facts about a tensor that are known without reading it."""

    @property
    def dtype(self) -> DType: ...
    @property
    def shape(self) -> Shape: ...
    @property
    def chunk_shape(self) -> Shape:
        """The regular grid's chunk: as many dimensions as `shape`; chunks at the end are cut off there."""
        ...


@dataclass(frozen=True)
class Node:
    """One tensor as a Zarr array; `shape` and `chunks` count elements as they are shown."""

    name: str
    path: str
    stored: DType
    view: ZarrDtype
    shape: Shape
    chunks: Shape

    @property
    def grid(self) -> Shape:
        """How many chunks there are along each dimension; 0 along one of length 0."""
        return tuple(-(-n // c) for n, c in zip(self.shape, self.chunks, strict=True))

    def stored_region(self, index: Shape) -> Region:
        """The region of the stored tensor that a chunk shows."""
        last, each = len(index) - 1, self.view.each
        return tuple(
            (i * c // per, min((i + 1) * c, n) // per)
            for axis, (i, c, n) in enumerate(zip(index, self.chunks, self.shape, strict=True))
            for per in (each if axis == last else 1,)
        )

    def metadata(self, dimension: str) -> dict[str, Any]:
        """The array's `zarr.json`. `dimension` starts the names of dimensions."""
        single_byte = self.view.dtype.itemsize == 1
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": self.view.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(self.chunks)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": self.view.fill_value,
            "codecs": [{"name": "bytes"} if single_byte else {"name": "bytes", "configuration": {"endian": "little"}}],
            "attributes": {"tensor": self.name, "dtype": self.stored.name},
            "dimension_names": _dimension_names(self.shape, dimension),
            "storage_transformers": [],
        }


class Nodes:
    """All nodes of a model: arrays by path, and the groups that slashes in tensor names make."""

    def __init__(
        self, tensors: Mapping[str, TensorLike], attributes: Mapping[str, Any], *, bits: bool, consolidated: bool
    ) -> None:
        self.attributes = attributes
        self.consolidated = consolidated
        self.arrays = {path: _node(name, path, tensors[name], bits) for path, name in _paths(tensors).items()}
        self.children: dict[str, dict[str, None]] = {"": {}}  # group → its members, in order
        for path in self.arrays:
            _, *above = path_and_groups(path)
            child = path
            for group in above:
                members = self.children.setdefault(group, {})
                members[child[len(group) + 1 if group else 0 :]] = None
                child = group
        self.dimension = "dim_"
        while any(
            path.startswith(self.dimension) for path in self.children[""]
        ):  # xarray: no array named as a dimension
            self.dimension = "_" + self.dimension

    def document(self, path: str) -> bytes | None:
        """The `zarr.json` of a node, None if there is no node."""
        if path == "":
            return self._root
        content = self._content(path)
        return None if content is None else _encoded(content)

    def _content(self, path: str) -> dict[str, Any] | None:
        if path in self.arrays:
            return self.arrays[path].metadata(self.dimension)
        if path in self.children:
            return _group({})
        return None

    @cached_property
    def _root(self) -> bytes:
        """The root's document; consolidated, with the metadata of all nodes in it, so that listing reads nothing more."""
        root = _group(dict(self.attributes))
        if not self.consolidated:
            return _encoded(root)
        paths = [*(group for group in self.children if group), *self.arrays]
        consolidated = {"kind": "inline", "must_understand": False, "metadata": {p: self._content(p) for p in paths}}
        return _encoded(root | {"consolidated_metadata": consolidated})

    def chunk(self, key: str) -> tuple[Node, Shape] | None:
        """The array and chunk index that a key such as `a.weight/c/0/3` names, None if it names none."""
        found = _CHUNK_KEY.match(key)
        node = self.arrays.get(found[1]) if found else None
        if node is None or found is None:
            return None
        index = tuple(int(i) for i in found[2].split("/")[1:])
        inside = len(index) == len(node.shape) and all(i < n for i, n in zip(index, node.grid, strict=True))
        return (node, index) if inside else None

    def all_keys(self) -> Iterator[str]:
        """Every key, metadata and chunks."""
        for group in self.children:
            yield f"{group}/{METADATA}" if group else METADATA
        for path, node in self.arrays.items():
            yield f"{path}/{METADATA}"
            for index in _indices(node.grid):
                yield "/".join((path, "c", *map(str, index)))

    def keys_under(self, prefix: str) -> Iterator[str]:
        """Every key that starts with `prefix`; chunks of other arrays are not enumerated."""
        for group in self.children:
            if (key := f"{group}/{METADATA}" if group else METADATA).startswith(prefix):
                yield key
        for path, node in self.arrays.items():
            start = f"{path}/"
            if not start.startswith(prefix[: len(start)]):
                continue
            if (key := start + METADATA).startswith(prefix):
                yield key
            for index in _indices(node.grid):
                if (key := "/".join((path, "c", *map(str, index)))).startswith(prefix):
                    yield key

    def members(self, prefix: str) -> Iterator[str]:
        """The names directly under a prefix: `zarr.json`, child nodes, and the steps of chunk keys."""
        prefix = prefix.strip("/")
        if prefix in self.children:
            yield METADATA
            yield from self.children[prefix]
        elif prefix in self.arrays:
            yield METADATA
            if 0 not in self.arrays[prefix].grid:
                yield "c"
        elif found := _CHUNK_KEY.match(prefix):
            node = self.arrays.get(found[1])
            index = tuple(int(i) for i in found[2].split("/")[1:])
            if node and len(index) < len(node.grid) and all(i < n for i, n in zip(index, node.grid, strict=False)):
                yield from map(str, range(node.grid[len(index)]) if 0 not in node.grid else ())


def path_and_groups(path: str) -> Iterator[str]:
    """A path, then the groups that contain it, nearest first, the root (`""`) last."""
    yield path
    while path:
        path = path.rpartition("/")[0]
        yield path


def _node(name: str, path: str, tensor: TensorLike, bits: bool) -> Node:
    shown = view(tensor.dtype, bits=bits, scalar=not tensor.shape)
    shape, chunks = tuple(tensor.shape), tuple(tensor.chunk_shape)
    if len(chunks) != len(shape):
        raise ValueError(f"{name}: chunks of shape {chunks} for a tensor of shape {shape}: give one length a dimension")
    # Zarr needs chunks of at least one element; one larger than the tensor would only be padding
    chunks = tuple(max(1, min(c, n)) for c, n in zip(chunks, shape, strict=True))
    if shown.each > 1:
        shape, chunks = (*shape[:-1], shape[-1] * shown.each), (*chunks[:-1], chunks[-1] * shown.each)
    return Node(name, path, tensor.dtype, shown, shape, chunks)


def _paths(names: Mapping[str, object]) -> dict[str, str]:
    """{path: tensor name}: the name itself where Zarr allows it, else with what it does not allow as %XX.

    A name under another tensor's name (`a/b` beside `a`) would be a node within an array: its slashes are escaped.
    """
    plain = {name: "/".join(_escaped(part) for part in name.split("/")) for name in names}
    arrays = set(plain.values())
    paths: dict[str, str] = {}
    for name, path in plain.items():
        if "/" in path and any(group in arrays for group in path_and_groups(path) if group != path):
            path = path.replace("/", "%2F")
        while path in paths:
            path += "%"
        paths[path] = name
    return paths


def _escaped(part: str) -> str:
    """A path component that Zarr allows: not empty, not dots only, no reserved start, no backslash."""
    if not part.strip("."):
        return part.replace(".", "%2E") or "%"
    if part.startswith("__") or part == METADATA:
        part = f"%{ord(part[0]):02X}{part[1:]}"
    return part.replace("\\", "%5C")


def _dimension_names(shape: Shape, prefix: str) -> list[str]:
    """Names that hold their length, so that arrays of one name agree; repeats within one array are numbered."""
    seen: dict[int, int] = {}
    names = []
    for n in shape:
        seen[n] = seen.get(n, 0) + 1
        names.append(f"{prefix}{n}" if seen[n] == 1 else f"{prefix}{n}_{seen[n]}")
    return names


def _group(attributes: dict[str, Any]) -> dict[str, Any]:
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def _encoded(document: dict[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


def _indices(grid: Shape) -> Iterator[Shape]:
    """Every index of a grid, in row-major order, without holding them."""
    if not grid:
        yield ()
        return
    for first in range(grid[0]):
        for rest in _indices(grid[1:]):
            yield (first, *rest)


def shown(node: Node, index: Shape, raw: Bytes) -> Bytes:
    """A chunk's bytes as Zarr needs them: widened, and at the edges of the array padded with zeros to the full shape."""
    if node.view.widened:
        raw = widen(raw, node.stored).view(np.uint8)
    part = tuple(min((i + 1) * c, n) - i * c for i, c, n in zip(index, node.chunks, node.shape, strict=True))
    if part == node.chunks:
        return raw
    itemsize = node.view.dtype.itemsize
    padded = np.zeros(math.prod(node.chunks) * itemsize, np.uint8)
    boxes.paste(raw, padded, node.chunks, itemsize, full(part))
    return padded
