"""Safetensors files and Hugging Face directories as a source."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from modelstore.errors import FormatError, ModelStoreError, UnsupportedError
from modelstore.format import region as regions
from modelstore.format.dtypes import dtype
from modelstore.format.files.checkpoint import PIPELINE, Weights, components
from modelstore.format.files.safetensors import PREFIX, HeaderEntry, header_length, parse_header
from modelstore.format.region import Region
from modelstore.sources.base import TensorSpec
from modelstore.sources.local.filed import Budget, CheckpointIndex, FiledBox, FiledSource, check_tiling, fingerprint
from modelstore.sources.local.folder import Folder, leave_duplicates, read_index, read_json, scan
from modelstore.sources.local.reading import ArrayPlace, Files, require_file, row_major
from modelstore.sources.local.states import State, states_of

SHARDING = "DCP_SHARDING_INFO"  # torch DCP's Hugging Face writer puts each piece's place in its tensor there

# The files of torch DCP's Hugging Face writer before they are put together.
_RANKED = re.compile(r"shard-\d+-model-\d+-of-\d+\.safetensors")
_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)\.safetensors")


def open_files(paths: Sequence[Path], *, files: Mapping[str, Path | bytes] | None = None) -> SafetensorsSource:
    """One or more `.safetensors` files as one checkpoint, in the order given. `FormatError` if a name repeats."""
    if not paths:
        raise ValueError("no safetensors files were given")
    for path in paths:
        require_file(path)
    shards = {f"{i:06}/{path.name}": path for i, path in enumerate(paths)}
    return _open(shards, Files(states_of(paths)), kept=files or {}, skipped={})


def open_directory(root: Path, reading: Callable[[Mapping[Path, State]], Files] = Files) -> SafetensorsSource:
    """A Hugging Face directory: its safetensors are the tensors, everything else its files (see `docs/sources.md`).

    `reading` makes what reads the files, given their states.
    """
    folder = scan(root)
    used, weights, tables = _choose(folder, Weights())
    kept, skipped = leave_duplicates(folder, used)
    for name in tables & kept.keys():
        del kept[name]  # an index is made again for the shards that are written
    shards = {name: folder.take(name) for name in sorted(used)}
    source = _open(shards, reading(folder.states), kept=kept, skipped=skipped)
    for name, file in weights.items():
        if not source.has(name, shards[file]):
            source.close()
            raise FormatError(f"{root}: the index says that {name!r} is in {file!r}, and it is not", object=str(root))
    return source


class SafetensorsSource(FiledSource[ArrayPlace]):
    """The tensors of one or more safetensors files."""

    def has(self, name: str, file: Path) -> bool:
        """Whether that file holds the tensor, or a piece of it."""
        return any(piece.where.path == file for piece in self._found.pieces.get(name, ()))


def open_pipeline(root: Path, reading: Callable[[Mapping[Path, State]], Files] = Files) -> SafetensorsSource:
    """A pipeline of diffusers: the safetensors of each component that `model_index.json` names, every other file beside them.

    The tensors' names start with their component's: `unet/conv_in.weight`. `UnsupportedError` if a component has weights in
    other formats alone.
    """
    folder = scan(root)
    used: set[str] = set()
    tables: set[str] = set()
    for place in components(read_json(folder.take(PIPELINE))):
        part = folder.part(place.folder)
        if not any(name.endswith(".safetensors") and "/" not in name for name in part.files):
            pickled = sorted(name for name in part.files if name.endswith((".bin", ".ckpt", ".msgpack", ".h5")))
            if pickled:
                raise UnsupportedError(
                    f"{root}: component {place.folder[:-1]!r} has its weights in {pickled[0]} alone: "
                    "convert it to safetensors with diffusers' save_pretrained",
                    object=str(root),
                )
            continue
        chosen, _, indexes = _choose(part, place)
        used |= {place.folder + name for name in chosen}
        tables |= {place.folder + name for name in indexes}
    if not used:
        raise FormatError(f"{root}: no component that {PIPELINE} names has weights here", object=str(root))
    kept, skipped = leave_duplicates(folder, used)
    for name in tables & kept.keys():
        del kept[name]  # indexes are made again for the shards that are written
    shards = {name: folder.take(name) for name in sorted(used)}
    return _open(shards, reading(folder.states), kept=kept, skipped=skipped, by_folder=True)


def _choose(folder: Folder, place: Weights) -> tuple[set[str], Mapping[str, str], set[str]]:
    """The safetensors files that are the checkpoint, the index's own account of them, and the indexes to leave out."""
    single, index = place.single, place.index
    top = [name for name in folder.files if "/" not in name]
    indexes = [name for name in top if name.endswith(".safetensors.index.json")]
    singles = [name for name in top if name.endswith(".safetensors")]
    if single in singles:  # as transformers does, which looks for it before any index
        return {single}, {}, {index}
    if index in indexes:
        indexes = [index]
    indexes = [name for name in indexes if not name.startswith("consolidated")] or indexes
    if len(indexes) > 1:
        raise FormatError(f"{folder.root} has several indexes ({', '.join(indexes)}): give the files of one of them")
    if indexes:
        weights = read_index(folder.files[indexes[0]])
        return set(weights.values()), weights, set(indexes)
    plain = [name for name in singles if not name.startswith("consolidated")] or singles
    ranked = bool(plain) and all(_RANKED.fullmatch(name) for name in plain)
    if len(plain) == 1 or ranked or _numbered(folder.root, plain):
        return set(plain), {}, set()
    linked = folder.skipped.get(single) or folder.skipped.get(index)
    if linked:
        named = single if single in folder.skipped else index
        raise FormatError(
            f"{folder.root / named} is not read, since {linked}: copy the file to the folder, or make a hard link to it",
            object=str(folder.root / named),
        )
    found = f"found {', '.join(plain) or 'no safetensors'}"
    raise FormatError(
        f"{folder.root} has neither {single} nor {index} nor one set of numbered shards ({found}): "
        "give the files themselves, as a list",
        object=str(folder.root),
    )


def _numbered(root: Path, names: Sequence[str]) -> bool:
    """Whether the names are one whole set `stem-00001-of-0000n`; `FormatError` if only some of it is missing."""
    found = [_NUMBERED.fullmatch(name) for name in names]
    matches = [m for m in found if m is not None]
    if not matches or len(matches) != len(names) or len({(m["stem"], int(m["count"])) for m in matches}) != 1:
        return False
    present, count = {int(m["number"]) for m in matches}, int(matches[0]["count"])
    if len(present) != count:
        raise FormatError(f"{root} has {len(present)} of {count} shards: fetch the others", object=str(root))
    return True


def _open(
    shards: Mapping[str, Path],
    opened: Files,
    *,
    kept: Mapping[str, Path | bytes],
    skipped: Mapping[str, str],
    by_folder: bool = False,
) -> SafetensorsSource:
    """`by_folder`: each file's tensors are named after its folder."""
    try:
        headers = {name: _read_header(opened, path) for name, path in shards.items()}
        tables = {name: _parse(shards[name], header) for name, header in headers.items()}
        if by_folder:
            tables = {name: (_within(name, entries), own) for name, (entries, own) in tables.items()}
        metadata: dict[str, str] = {}
        for _, own in tables.values():
            for key, value in own.items():
                metadata.setdefault(key, value)
        if SHARDING in metadata:
            specs, pieces = _assemble(shards, tables, headers)
            del metadata[SHARDING]
        else:
            specs, pieces = _gather(shards, tables, headers)
        found = CheckpointIndex(
            specs,
            pieces,
            files=kept,
            metadata=metadata,
            fingerprint=fingerprint([*shards.items(), *kept.items()], opened, headers),
            skipped=skipped,
        )
        return SafetensorsSource(found, opened)
    except BaseException:
        opened.close()
        raise


def _within(file: str, entries: list[HeaderEntry]) -> list[HeaderEntry]:
    """A component's tensors by the names that they have in the pipeline."""
    folder = file.rpartition("/")[0]
    return [replace(entry, name=f"{folder}/{entry.name}") for entry in entries]


def _read_header(opened: Files, path: Path) -> bytes:
    size = path.stat().st_size
    try:
        length = header_length(opened.bytes(path, 0, min(PREFIX, size)), size)
    except FormatError as error:
        raise FormatError(f"{path}: {error}", object=str(path)) from None
    return opened.bytes(path, PREFIX, length)


def _parse(path: Path, header: bytes) -> tuple[list[HeaderEntry], dict[str, str]]:
    try:
        return parse_header(header, path.stat().st_size)
    except ModelStoreError as error:
        raise type(error)(f"{path}: {error}", tensor=error.tensor, object=str(path)) from None


_Tables = Mapping[str, tuple[list[HeaderEntry], dict[str, str]]]
_Pieces = dict[str, tuple[FiledBox[ArrayPlace], ...]]


def _place(path: Path, header: bytes, entry: HeaderEntry) -> ArrayPlace:
    return ArrayPlace(path, PREFIX + len(header) + entry.start, row_major(entry.shape, dtype(entry.dtype).itemsize))


def _gather(
    shards: Mapping[str, Path], tables: _Tables, headers: Mapping[str, bytes]
) -> tuple[list[TensorSpec], _Pieces]:
    specs: list[TensorSpec] = []
    pieces: _Pieces = {}
    for name, (entries, _) in tables.items():
        for entry in entries:
            if entry.name in pieces:
                other = pieces[entry.name][0].where.path
                raise FormatError(f"tensor {entry.name!r} is in {other} and in {shards[name]}", tensor=entry.name)
            specs.append(TensorSpec(entry.name, dtype(entry.dtype), entry.shape))
            pieces[entry.name] = (FiledBox(regions.full(entry.shape), _place(shards[name], headers[name], entry)),)
    return specs, pieces


def _assemble(
    shards: Mapping[str, Path], tables: _Tables, headers: Mapping[str, bytes]
) -> tuple[list[TensorSpec], _Pieces]:
    """Tensors out of the pieces that torch DCP's Hugging Face writer left, one file a rank."""
    parts: dict[str, list[tuple[HeaderEntry, FiledBox[ArrayPlace]]]] = {}
    for name, (entries, metadata) in tables.items():
        origins = _origins(shards[name], metadata.get(SHARDING, "{}"))
        for entry in entries:
            origin = origins.get(entry.name, (0,) * len(entry.shape))
            if len(origin) != len(entry.shape):
                raise FormatError(
                    f"{shards[name]}: the offsets of {entry.name!r} do not fit its shape", tensor=entry.name
                )
            box: Region = tuple((a, a + n) for a, n in zip(origin, entry.shape, strict=True))
            piece = FiledBox(box, _place(shards[name], headers[name], entry))
            parts.setdefault(entry.name, []).append((entry, piece))
    specs = []
    budget = Budget()
    for name, found in parts.items():
        if len({(entry.dtype, len(entry.shape)) for entry, _ in found}) != 1:
            raise FormatError(f"the pieces of tensor {name!r} differ in dtype or dimensions", tensor=name)
        boxes = [piece.region for _, piece in found]
        shape = tuple(max(box[axis][1] for box in boxes) for axis in range(len(boxes[0])))
        check_tiling(name, shape, boxes, budget)
        specs.append(TensorSpec(name, dtype(found[0][0].dtype), shape))
    return specs, {name: tuple(piece for _, piece in found) for name, found in parts.items()}


def _origins(path: Path, text: str) -> dict[str, tuple[int, ...]]:
    bad = FormatError(f"{path}: {SHARDING} is not a valid account of pieces", object=str(path))
    try:
        table: Any = json.loads(text)
        origins = {name: tuple(fields["saved_offsets"]) for name, fields in table.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise bad from None
    if not all(type(n) is int and 0 <= n < 2**63 for origin in origins.values() for n in origin):
        raise bad
    return origins
