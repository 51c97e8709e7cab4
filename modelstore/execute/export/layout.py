"""The files of an export, and the place of each tensor in them: pure decisions, made before anything is written."""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from modelstore.architecture.ties import tied
from modelstore.errors import FormatError, UnsupportedError
from modelstore.format import grid
from modelstore.format.buffers import Bytes
from modelstore.format.digest import name_of
from modelstore.format.dtypes import dtype
from modelstore.format.files.checkpoint import CONFIG, PIPELINE, Weights
from modelstore.format.files.safetensors import METADATA, HeaderEntry, build_header
from modelstore.format.names import STAGING, check_file
from modelstore.format.objects.manifest import Manifest, Tensor
from modelstore.format.region import Region, Shape, nbytes

if TYPE_CHECKING:
    from modelstore.execute.read.reader import Reader

log = logging.getLogger("modelstore")


# For tied tensors, transformers and vLLM make these again from the embedding, and its own `save_pretrained` leaves them out.
_HEAD = re.compile(
    r"(.*\.)?lm_head(\.decoder)?\.(weight|bias)|embed_out\.weight|cls\.predictions\.decoder\.(weight|bias)"
)
_SHARED = re.compile(r"(.*\.)?shared\.weight")
_FROM_SHARED = re.compile(r"(.*\.)?(encoder|decoder)\.embed_tokens\.weight")


class Form(Protocol):
    """How a tensor comes into a file, where its bytes are not written as they are. Used by several threads in parallel."""

    @property
    def key(self) -> str:
        """Tells this form of a tensor from every other one, where the file's header does not."""

    def regions(self, limit: int) -> Iterator[Region]:
        """The tensor in regions of about `limit` raw bytes, in order."""

    def places(self, region: Region) -> list[tuple[int, int]]:
        """The places of a region's bytes: runs of the file, each as its offset and how many bytes it has."""

    def read(self, reader: Reader, region: Region) -> list[Bytes]:
        """A region read and made into what is written: the bytes of each of its `places`."""


class Packing(Protocol):
    """A tensor that goes into a safetensors file as several, of other dtypes and shapes."""

    def parts(self, name: str) -> list[tuple[str, str, Shape]]:
        """Name, dtype and shape of each, of the tensor under that name."""

    def form(self, offsets: Sequence[int]) -> Form:
        """How they are written to these places in the file, in the order of `parts`."""


@dataclass(frozen=True, slots=True)
class _Item:
    """A tensor under one of its names, and how it is packed (None: as it is)."""

    name: str
    tensor: Tensor
    counts: bool
    packing: Packing | None = None

    @property
    def parts(self) -> list[tuple[str, str, Shape]]:
        return self.packing.parts(self.name) if self.packing else [(self.name, self.tensor.dtype, self.tensor.shape)]

    @property
    def nbytes(self) -> int:
        return sum(nbytes(shape, dtype(kind).itemsize) for _, kind, shape in self.parts)


@dataclass(frozen=True, slots=True)
class PlacedTensor:
    """A tensor's bytes within a file. A tied tensor's second copy does not count as progress.

    With a `form`, that gives the places of the bytes, and `offset` is the place of the first of them.
    """

    tensor: Tensor
    offset: int
    counts: bool = True
    form: Form | None = None

    def regions(self, limit: int) -> Iterator[Region]:
        """The regions in which the tensor is written."""
        return self.form.regions(limit) if self.form else blocks(self.tensor, limit)


@dataclass(frozen=True, slots=True)
class OutFile:
    """A file to write: its relative path, the bytes it starts with, the tensors after them.

    `weights`: the place of the weights that it is a shard or the index of; older files of these weights are replaced.
    """

    path: str
    header: bytes
    tensors: tuple[PlacedTensor, ...]
    size: int
    weights: Weights | None = None

    @property
    def digest(self) -> str:
        """Equal for files of equal bytes at the same path."""
        made = ((bytes.fromhex(p.tensor.digest), p.form.key.encode() if p.form else b"") for p in self.tensors)
        return name_of(self.header, *itertools.chain.from_iterable(made))


def one_file(manifest: Manifest, path: str, chosen: Mapping[str, Packing | None] | None = None) -> OutFile:
    """All tensors in one safetensors file, each tied name with bytes of its own: any loader finds every name.

    `chosen`: these names only, in parts where a packing says so.
    """
    named = [
        _Item(name, t, name == t.name or chosen is not None, (chosen or {}).get(name))
        for t, names in _names(manifest)
        for name in names
        if chosen is None or name in chosen
    ]
    return _weights(path, named, manifest.metadata)


def directory(
    manifest: Manifest,
    config: Mapping[str, Any] | None,
    places: Sequence[Weights],
    max_shard_bytes: int,
    packed: Mapping[str, Packing] | None = None,
    instead: Mapping[str, bytes] | None = None,
) -> list[OutFile]:
    """A directory that others load: shards of at most so many bytes of tensors (or of one tensor), their index, the files.

    `places`: the places of the weights (`format.files.checkpoint`). `packed` tensors, by name, are written in their parts;
    `instead` are files with other bytes than the model's. The files that loaders look for first come last, indexes before
    them: loaders that meet an unfinished directory then see that it is not a model.
    """
    left_out = _left_out(manifest, config)
    items: dict[Weights, list[_Item]] = {}
    for tensor, names in _names(manifest):
        kept = [name for name in names if name not in left_out]
        for name in kept:
            place = _place_of(name, places)
            packing = (packed or {}).get(tensor.name)
            items.setdefault(place, []).append(_Item(name.removeprefix(place.folder), tensor, name == kept[0], packing))
    if not items and places:
        items[places[0]] = []
    weights = [file for place, own in items.items() for file in _shards(place, own, manifest.metadata, max_shard_bytes)]
    other = instead or {}
    files = [f for f in _files(manifest, list(items)) if f.path not in other]
    files += [OutFile(path, data, (), len(data)) for path, data in other.items()]
    last = (CONFIG, PIPELINE)
    outputs = [f for f in files if f.path not in last] + weights + [f for f in files if f.path in last]
    _check_paths(outputs)
    return outputs


def _place_of(name: str, places: Sequence[Weights]) -> Weights:
    for place in places:
        if name.startswith(place.folder) and name != place.folder:
            return place
    raise UnsupportedError(
        f'tensor {name!r} is of none of the components that {PIPELINE} names: export with format="safetensors"',
        tensor=name,
    )


def _shards(place: Weights, items: Sequence[_Item], metadata: Mapping[str, str], most: int) -> list[OutFile]:
    """The files of one place's weights, and their index where there are several."""
    shards: list[list[_Item]] = [[]]
    held = 0
    for item in items:
        if place.sharded and shards[-1] and held + item.nbytes > most:
            shards.append([])
            held = 0
        shards[-1].append(item)
        held += item.nbytes
    n = len(shards)
    paths = [place.single] if n == 1 else [place.shard(i, n) for i in range(1, n + 1)]
    files = [
        replace(_weights(place.folder + path, shard, metadata), weights=place)
        for path, shard in zip(paths, shards, strict=True)
    ]
    if n > 1:
        total = sum(item.nbytes for item in items)
        shown = zip(paths, shards, strict=True)
        where = {name: path for path, shard in shown for item in shard for name, _, _ in item.parts}
        index = json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2, ensure_ascii=False)
        text = index.encode() + b"\n"
        files.append(OutFile(place.folder + place.index, text, (), len(text), place))
    return files


def block_limit(memory: int) -> int:
    """Raw bytes that are read and converted in one step, within that much working memory."""
    return max(2 << 20, min(16 << 20, memory // 16))


def blocks(tensor: Tensor, limit: int) -> Iterator[Region]:
    """The tensor in regions of at most `limit` bytes (or of one chunk), in order, each made of whole chunks.

    Each is one run of the tensor's bytes, where a row of chunks is within the limit; else a box of long rows.
    """
    shape, block = tensor.shape, _block(tensor, limit)
    for index in range(grid.count(shape, block)):
        yield grid.chunk_region(shape, block, index)


def _block(tensor: Tensor, limit: int) -> Shape:
    block = list(tensor.chunk)
    nbytes = tensor.kind.itemsize
    for n in block:
        nbytes *= n
    for axis in reversed(range(len(block))):
        times = max(1, limit // max(1, nbytes))
        if block[axis] * times < tensor.shape[axis]:
            block[axis] *= times
            break
        nbytes = nbytes // block[axis] * max(1, tensor.shape[axis])
        block[axis] = max(1, tensor.shape[axis])
    return tuple(block)


def _names(manifest: Manifest) -> Iterator[tuple[Tensor, list[str]]]:
    """Every tensor with all its names, its own first."""
    aliases: dict[str, list[str]] = {}
    for alias, name in manifest.aliases.items():
        aliases.setdefault(name, []).append(alias)
    for tensor in manifest.tensors:
        yield tensor, [tensor.name, *aliases.get(tensor.name, ())]


def _left_out(manifest: Manifest, config: Mapping[str, Any] | None) -> set[str]:
    """Tied names that the loaders tie again by themselves, because the config says so in so many words."""
    if not tied(config):
        return set()
    found: set[str] = set()
    for _, names in _names(manifest):
        heads = {name for name in names if _HEAD.fullmatch(name)}
        if len(heads) < len(names):
            found |= heads
        if any(_SHARED.fullmatch(name) for name in names):
            found |= {name for name in names if _FROM_SHARED.fullmatch(name)}
    return found


def _weights(path: str, items: Iterable[_Item], metadata: Mapping[str, str]) -> OutFile:
    # Wider numbers first, as the safetensors library does it: each tensor then starts at a multiple of its width.
    parts = [(item, part) for item in items for part in item.parts]
    parts.sort(key=lambda found: -dtype(found[1][1]).itemsize)
    entries = []
    at = 0
    for _, (name, kind, shape) in parts:
        known = dtype(kind)
        if known.safetensors is None or name == METADATA or (known.safetensors == "F4" and not shape):
            what = f"the name {name!r}" if name == METADATA else f"{len(shape)}-d {kind}"
            raise UnsupportedError(
                f"tensor {name!r} cannot be exported, because safetensors has no place for {what}: "
                'convert it, or export with format="zarr"',
                tensor=name,
            )
        size = nbytes(shape, known.itemsize)
        entries.append(HeaderEntry(name, kind, shape, at, at + size))
        at += size
    header = build_header(entries, {"format": "pt", **metadata})
    offsets = {entry.name: len(header) + entry.start for entry in entries}
    plain = [
        PlacedTensor(item.tensor, offsets[name], item.counts) for item, (name, _, _) in parts if item.packing is None
    ]
    made = []
    for item in {item.name: item for item, _ in parts}.values():
        if item.packing is None:
            continue
        places = [offsets[name] for name, _, _ in item.parts]
        made.append(PlacedTensor(item.tensor, min(places), item.counts, item.packing.form(places)))
    return OutFile(path, header, (*plain, *made), len(header) + at)


def _files(manifest: Manifest, places: Sequence[Weights]) -> Iterator[OutFile]:
    """The model's own files. One named as the weights are is left out: it would be taken for them."""
    for file in manifest.files:
        path = check_file(file.name)
        try:
            path.encode()
        except UnicodeEncodeError:
            raise FormatError(f"file name {path[:80]!r} is not valid Unicode: the manifest is not valid") from None
        if path.split("/")[0].casefold() == STAGING:
            raise FormatError(f"file name {path[:80]!r} is kept for unfinished exports: rename the file", object=path)
        if any(place.has(path) for place in places):
            log.warning("file %s of the model is left out: the exported weights have that name", path)
            continue
        yield OutFile(path, b"", (PlacedTensor(file, 0, False),), file.nbytes)


def _check_paths(outputs: Iterable[OutFile]) -> None:
    """`FormatError` if one path is there twice, or is a folder on the way to another."""
    paths = [output.path for output in outputs]
    folders: set[str] = set()
    for path in paths:
        parts = path.split("/")
        folders |= {"/".join(parts[:n]) for n in range(1, len(parts))}
    seen: set[str] = set()
    for path in paths:
        if path in folders or path in seen:
            raise FormatError(f"file {path[:80]!r} is a folder too, or is there twice: rename the file", object=path)
        seen.add(path)
