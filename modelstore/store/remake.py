"""A damaged pack made again: from its own chunks that are right, and from the same chunks in other packs.

A save stores anew what it needs of a damaged pack, so after it all chunks of that pack may lie somewhere. The pack is
written only where the bytes found are those that its name stands for.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from blake3 import blake3

from modelstore.errors import CorruptionError, NotFoundError
from modelstore.format.buffers import Pieces, view
from modelstore.format.manifest import Manifest, Tensor
from modelstore.format.manifest_builder import Location
from modelstore.format.record import pack_key
from modelstore.storage.base import Storage
from modelstore.store.packs import FILE, PackBuilder, TensorNote

_LARGEST_HEADER = 64 << 20  # bytes

Elsewhere = Mapping[bytes, Iterable[Location]]  # digest of a chunk → where it may lie


class _Part(NamedTuple):
    offset: int
    length: int
    digest: bytes
    name: str  # among the entries of the pack
    tensor: str
    note: TensorNote


def remake(storage: Storage, pack: str, manifests: Iterable[Manifest], elsewhere: Elsewhere) -> bool:
    """Store a pack anew whose bytes are not what its name says; False, and nothing done, where not all of them can be found.

    `manifests` are some that refer to it: together they must name everything in it.
    """
    parts = _parts(pack, manifests)
    if not parts or any(a.offset + a.length != b.offset for a, b in itertools.pairwise(parts)):
        return False
    places = [_find(storage, pack, part, elsewhere) for part in parts]
    found = [place for place in places if place is not None]
    if len(found) < len(parts):
        return False
    size = parts[-1].offset + parts[-1].length
    for header in _headers(storage, pack, parts):

        def pieces(header: bytes = header) -> Iterator[bytes]:
            yield header
            for part, place in zip(parts, found, strict=True):
                yield _chunk(storage, part, place)

        hasher = blake3()
        for piece in pieces():
            hasher.update(piece)
        if hasher.hexdigest() == pack:
            storage.put(pack_key(pack), Pieces(pieces), size)
            return True
    return False


def locations(manifests: Iterable[Manifest], wanted: Iterable[bytes]) -> dict[bytes, list[Location]]:
    """Where these chunks lie, as manifests say."""
    found: dict[bytes, list[Location]] = {digest: [] for digest in wanted}
    begin = np.frombuffer(b"".join(digest[:8] for digest in found), "<u8")
    for manifest in manifests:
        digests = np.frombuffer(manifest.chunks.digest, "<u8")[::4]  # the first eight bytes of each
        for row in np.flatnonzero(np.isin(digests, begin)).tolist():
            places = found.get(manifest.digest(row))
            if places is not None:
                places.append(
                    (manifest.packs[manifest.pack[row]], int(manifest.offset[row]), int(manifest.length[row]))
                )
    return found


def chunks_in(pack: str, manifests: Iterable[Manifest]) -> set[bytes]:
    """The digests of all chunks that lie in a pack, as manifests say."""
    return {
        manifest.digest(row)
        for manifest in manifests
        if pack in manifest.packs
        for row in np.flatnonzero(manifest.pack == manifest.packs.index(pack)).tolist()
    }


def _parts(pack: str, manifests: Iterable[Manifest]) -> list[_Part]:
    """What lies in a pack, in order; a chunk of several tensors under the name of the first, which is what wrote it."""
    found: dict[int, _Part] = {}
    for manifest in manifests:
        if pack not in manifest.packs:
            continue
        number = manifest.packs.index(pack)
        for prefix, tensors in (("", manifest.tensors), (FILE, manifest.files)):
            for tensor in tensors:
                for part in _parts_of(manifest, number, tensor, prefix):
                    found.setdefault(part.offset, part)
    return [found[offset] for offset in sorted(found)]


def _parts_of(manifest: Manifest, number: int, tensor: Tensor, prefix: str) -> Iterator[_Part]:
    note = TensorNote(tensor.dtype, tensor.shape, tensor.chunk, manifest.codecs[tensor.codec])
    name = prefix + tensor.name
    for plane in tensor.planes:
        rows = manifest.pack[plane.first : plane.first + tensor.chunks]
        for chunk in np.flatnonzero(rows == number).tolist():
            row = plane.first + chunk
            entry = f"{name}/{plane.name}/{chunk}"
            yield _Part(int(manifest.offset[row]), int(manifest.length[row]), manifest.digest(row), entry, name, note)


def _find(storage: Storage, pack: str, part: _Part, elsewhere: Elsewhere) -> Location | None:
    """Where the right bytes of a chunk lie: in the pack itself, or in another."""
    for place in ((pack, part.offset, part.length), *elsewhere.get(part.digest, ())):
        try:
            _chunk(storage, part, place)
        except (NotFoundError, CorruptionError):
            continue
        return place
    return None


def _chunk(storage: Storage, part: _Part, place: Location) -> bytes:
    pack, offset, length = place
    if length != part.length:
        raise CorruptionError(f"a chunk in {pack_key(pack)} has another length", object=pack_key(pack))
    data = np.empty(length, np.uint8)
    storage.read(pack_key(pack), offset, view(data))
    if blake3(view(data)).digest() != part.digest:
        raise CorruptionError(f"a chunk in {pack_key(pack)} has other bytes", object=pack_key(pack))
    return data.tobytes()


def _headers(storage: Storage, pack: str, parts: Sequence[_Part]) -> Iterator[bytes]:
    """What the pack may begin with: what is there, and what a writer of these chunks writes."""
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
