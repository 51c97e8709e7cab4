"""A damaged pack made again: from its own chunks that are right, and from the same chunks in other packs.

A save stores the chunks of a damaged pack that it needs again, so after it all chunks of that pack may be in other places. The
pack is written only where the bytes found are those that its name stands for.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from modelstore.errors import CorruptionError, NotFoundError
from modelstore.format.buffers import Pieces, view
from modelstore.format.digest import matches, name_of_pieces
from modelstore.format.objects.manifest import Manifest
from modelstore.format.objects.manifest_builder import Location
from modelstore.format.objects.record import pack_key
from modelstore.storage.base import Storage
from modelstore.store.packs import FILE, PackBuilder, TensorNote
from modelstore.store.runs import Span, read, runs

_LARGEST_HEADER = 64 << 20  # bytes

Elsewhere = Mapping[bytes, Iterable[Location]]  # digest of a chunk → where it may lie


class PackedChunk(NamedTuple):
    """A chunk in a pack: its place there, and its entry in the pack's header."""

    offset: int
    length: int
    digest: bytes
    name: str  # among the entries of the pack
    tensor: str
    note: TensorNote
    pack: str


ReadFrom = tuple[PackedChunk, Location]  # a chunk, and where it is read


def remake(storage: Storage, pack: str, parts: Sequence[PackedChunk], elsewhere: Elsewhere) -> bool:
    """Store a pack again whose bytes do not match its name; False, and nothing done, if not all of them can be found.

    `parts` are all of its contents, as from `contents`. Reads are in long runs, if chunks follow each other.
    """
    if not parts or any(a.offset + a.length != b.offset for a, b in itertools.pairwise(parts)):
        return False
    places = _find(storage, pack, parts, elsewhere)
    if places is None:
        return False
    found = list(zip(parts, places, strict=True))
    size = parts[-1].offset + parts[-1].length
    for header in _headers(storage, pack, parts):

        def pieces(header: bytes = header) -> Iterator[bytes]:
            yield header
            for run in runs(found, _span):
                for (part, place), data in zip(run, _read(storage, run), strict=True):
                    if data is None:
                        raise _wrong(part, place)
                    yield data

        if name_of_pieces(pieces()) == pack:
            storage.put(pack_key(pack), Pieces(pieces), size)
            return True
    return False


def contents(packs: Collection[str], manifests: Iterable[Manifest]) -> dict[str, list[PackedChunk]]:
    """The contents of packs, in order, according to the manifests that refer to them; complete only if they name everything in
    it.

    A chunk of several tensors has the name of the first, which is what wrote it.
    """
    found: dict[str, dict[int, PackedChunk]] = {pack: {} for pack in packs}
    for manifest in manifests:
        numbers = [number for number, pack in enumerate(manifest.packs) if pack in found]
        if not numbers:
            continue
        named = [(prefix, one) for prefix, many in (("", manifest.tensors), (FILE, manifest.files)) for one in many]
        planes = [(prefix, tensor, plane) for prefix, tensor in named for plane in tensor.planes]
        order = sorted(range(len(planes)), key=lambda i: planes[i][2].first)
        first = np.array([planes[i][2].first for i in order], np.int64)
        rows = np.flatnonzero(np.isin(manifest.pack, numbers))
        owners = np.searchsorted(first, rows, "right") - 1
        here: list[tuple[int, int, PackedChunk]] = []
        for row, owner in zip(rows.tolist(), owners.tolist(), strict=True):
            which = order[owner] if owner >= 0 else 0
            prefix, tensor, plane = planes[which]
            chunk = row - plane.first
            if not 0 <= chunk < tensor.chunks:
                continue  # of no tensor
            name = prefix + tensor.name
            note = TensorNote(tensor.dtype, tensor.shape, tensor.chunk, manifest.codecs[tensor.codec])
            at, entry = (int(manifest.offset[row]), int(manifest.length[row])), f"{name}/{plane.name}/{chunk}"
            here.append(
                (
                    which,
                    chunk,
                    PackedChunk(*at, manifest.digest(row), entry, name, note, manifest.packs[manifest.pack[row]]),
                )
            )
        for _, _, part in sorted(here, key=lambda item: item[:2]):
            found[part.pack].setdefault(part.offset, part)
    return {pack: [parts[offset] for offset in sorted(parts)] for pack, parts in found.items()}


def locations(manifests: Iterable[Manifest], wanted: Iterable[bytes]) -> dict[bytes, list[Location]]:
    """The places of these chunks, according to manifests; each place once."""
    found: dict[bytes, dict[Location, None]] = {digest: {} for digest in wanted}
    begin = np.frombuffer(b"".join(digest[:8] for digest in found), "<u8")
    for manifest in manifests:
        digests = np.frombuffer(manifest.chunks.digest, "<u8")[::4]  # the first eight bytes of each
        for row in np.flatnonzero(np.isin(digests, begin)).tolist():
            places = found.get(manifest.digest(row))
            if places is not None:
                pack = manifest.packs[manifest.pack[row]]
                places[pack, int(manifest.offset[row]), int(manifest.length[row])] = None
    return {digest: list(places) for digest, places in found.items()}


def _find(storage: Storage, pack: str, parts: Sequence[PackedChunk], elsewhere: Elsewhere) -> list[Location] | None:
    """The places of the right bytes of each part: in the pack itself, or in another; None if those of one are nowhere."""
    found: list[Location | None] = [None] * len(parts)
    candidates = [iter([(pack, p.offset, p.length), *elsewhere.get(p.digest, ())]) for p in parts]
    left = list(range(len(parts)))
    sizes: dict[str, int] = {}
    while left:
        wanted: list[tuple[int, PackedChunk, Location]] = []
        for i in left:
            place = next(candidates[i], None)
            if place is None:
                return None
            if place[0] not in sizes:
                info = storage.info(pack_key(place[0]))
                sizes[place[0]] = info.size if info is not None else 0
            if place[2] == parts[i].length and place[1] + place[2] <= sizes[place[0]]:
                wanted.append((i, parts[i], place))
        wanted.sort(key=lambda item: item[2])
        numbers = iter([i for i, _, _ in wanted])
        for run in runs([(part, place) for _, part, place in wanted], _span):
            for (_, place), data in zip(run, _read(storage, run), strict=True):
                i = next(numbers)
                if data is not None:
                    found[i] = place
        left = [i for i in left if found[i] is None]
    return [place for place in found if place is not None]


def _span(placed: ReadFrom) -> Span:
    pack, at, n = placed[1]
    return Span(pack, at, at + n)


def _read(storage: Storage, run: Sequence[ReadFrom]) -> list[bytes | None]:
    """The chunks of a run; None for one that has other bytes."""
    try:
        chunks = read(storage, [_span(placed) for placed in run])
    except (NotFoundError, CorruptionError):  # it was changed meanwhile
        return [None] * len(run)
    return [
        chunk.tobytes() if matches(chunk, part.digest) else None for chunk, (part, _) in zip(chunks, run, strict=True)
    ]


def _wrong(part: PackedChunk, place: Location) -> CorruptionError:
    key = pack_key(place[0])
    return CorruptionError(f"the chunk {part.name!r} in {key} was changed while it was read", object=key)


def _headers(storage: Storage, pack: str, parts: Sequence[PackedChunk]) -> Iterator[bytes]:
    """The possible headers of the pack: the one that is there, and the one that a writer of these chunks writes."""
    size = parts[0].offset
    if size <= _LARGEST_HEADER:
        data = np.empty(size, np.uint8)
        try:
            storage.read(pack_key(pack), 0, view(data))
            yield data.tobytes()
        except (NotFoundError, CorruptionError):
            pass  # it is cut short, or gone
    builder = PackBuilder()
    for part in parts:
        builder.notes.setdefault(part.tensor, part.note)
        builder.announce(part.name, "uint8", (part.length,), part.length)
    made = builder.header({})
    if len(made) == size:
        yield made
