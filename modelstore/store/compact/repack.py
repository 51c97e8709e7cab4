"""Moves what is live of packs into new ones: entries as they are, never decoded, each chunk checked on the way.

An entry of a pack moves whole, under its own name, so that chunk packs stay readable by themselves and whole-tensor packs stay
files that can be mapped. Nothing here knows of manifests: live *places* (offset, length, digest) say what is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
from numpy.typing import NDArray

from modelstore.errors import CorruptionError, NotFoundError
from modelstore.format.buffers import Buffer, Bytes, Pieces
from modelstore.format.digest import digest_of, name_of_pieces
from modelstore.format.files.safetensors import HeaderEntry
from modelstore.format.objects.decoding import prepared
from modelstore.format.objects.manifest import DIGEST_BYTES, FORMAT
from modelstore.format.objects.record import pack_key
from modelstore.plan.work import Work
from modelstore.storage.base import Storage
from modelstore.store import packs
from modelstore.store.compact.rehouse import NONCE
from modelstore.store.packs import METADATA_KEY, PackBuilder, PackNote
from modelstore.store.repo import Repo
from modelstore.store.runs import PIECE, Span, read, runs

PLACE = np.dtype([("offset", "<u8"), ("length", "<u8"), ("digest", f"S{DIGEST_BYTES}")])
SHARD_BYTES = 4 << 30  # of packs of whole tensors

_Segment = tuple[Span, bytes | None]  # bytes of a pack, and the digest that they are to have
PlaceRows = NDArray[np.void]  # of PLACE, each once, in the order of their offsets


class DamagedPackError(CorruptionError):
    """A live chunk of a pack does not have a good copy: `pack` cannot be moved."""

    def __init__(self, message: str, pack: str) -> None:
        super().__init__(message, object=pack_key(pack))
        self.pack = pack


@dataclass(frozen=True)
class Old:
    """A pack to be moved: its entries that have live places in them, in their order; `start` is of the data."""

    digest: str
    size: int
    start: int
    entries: tuple[HeaderEntry, ...]
    metadata: Mapping[str, str]
    note: PackNote
    places: PlaceRows

    @property
    def moved(self) -> int:
        """Bytes that will be moved."""
        return sum(entry.stop - entry.start for entry in self.entries)


@dataclass
class New:
    """A pack to be written: entries of old ones, one after another."""

    metadata: Mapping[str, str]
    builder: PackBuilder = field(default_factory=PackBuilder)
    parts: list[tuple[Old, HeaderEntry]] = field(default_factory=list)
    names: set[str] = field(default_factory=set)

    def takes(self, old: Old, entry: HeaderEntry, limit: int) -> bool:
        """Whether an entry fits, by its size, its name, and what the packs say of its tensor."""
        if self.builder.size + entry.stop - entry.start > limit or entry.name in self.names:
            return False
        tensor = _tensor(old, entry)
        return tensor is None or self.builder.notes.get(tensor, old.note.tensors[tensor]) == old.note.tensors[tensor]

    def add(self, old: Old, entry: HeaderEntry) -> None:
        """Append an entry."""
        self.builder.announce(entry.name, entry.dtype, entry.shape, entry.stop - entry.start)
        self.parts.append((old, entry))
        self.names.add(entry.name)
        tensor = _tensor(old, entry)
        if tensor is not None:
            self.builder.notes[tensor] = old.note.tensors[tensor]


@dataclass(frozen=True)
class Moved:
    """The new places of a pack's entries: for each, its first byte and its end before, its pack's number and first byte now."""

    start: NDArray[np.int64]
    stop: NDArray[np.int64]
    pack: NDArray[np.int64]
    now: NDArray[np.int64]


def old_pack(storage: Storage, digest: str, places: PlaceRows) -> Old | None:
    """A pack with what is live in it; None if its header does not say where that is, or it is a manifest's copy."""
    opened = packs.open_pack(storage, pack_key(digest))
    if opened.metadata.get("kind") == "manifest":
        return None
    entries = sorted(opened.entries, key=lambda entry: (entry.start, entry.stop))
    at = _within(entries, opened.data_start, places)
    if at is None:
        return None
    live = tuple(entries[i] for i in np.unique(at).tolist())
    metadata = {key: value for key, value in opened.metadata.items() if key not in (METADATA_KEY, NONCE)}
    note = _note(opened.metadata.get(METADATA_KEY, ""))
    return Old(digest, opened.size, opened.data_start, live, metadata, note, places)


def arrange(olds: Iterable[Old]) -> list[New]:
    """Which entries go into which new packs: in their order, as many as a pack takes, each name once in one."""
    done: list[New] = []
    filling: dict[tuple[tuple[str, str], ...], New] = {}
    for old in olds:
        kind = tuple(sorted(old.metadata.items()))
        limit = packs.PACK_BYTES if not kind and all(e.dtype == "uint8" for e in old.entries) else SHARD_BYTES
        for entry in old.entries:
            new = filling.get(kind)
            if new is None or not new.takes(old, entry, limit):
                new = filling[kind] = New(old.metadata)
                done.append(new)
            new.add(old, entry)
    return done


def write(repo: Repo, new: New, work: Work) -> str:
    """Write a new pack; its name.

    If a sixth of the memory cannot hold it, it is read twice: for its name, then to be written.

    `DamagedPackError` if a live chunk does not have a good copy.
    """
    header = new.builder.header(new.metadata)
    size = len(header) + new.builder.size

    def data() -> Iterator[Buffer]:
        yield header
        for old, entries in _by_pack(new.parts):
            yield from _checked((repo.storage, *repo.mirrors), old, entries)

    held = list(data()) if size <= work.memory // 6 else None
    digest = name_of_pieces(held if held is not None else data())
    # Also where one of that name is there: it was left by another compaction, and nobody has looked at its bytes since.
    repo.storage.put(pack_key(digest), held if held is not None else Pieces(data), size)
    work.done(new.builder.size)
    return digest


def moved(olds: Iterable[Old], news: Sequence[New], names: Sequence[str]) -> tuple[dict[str, Moved], tuple[str, ...]]:
    """The new places of each old pack's entries; packs are numbered as in the second answer."""
    found: dict[str, list[tuple[int, int, int, int]]] = {old.digest: [] for old in olds}
    for number, new in enumerate(news):
        now = len(new.builder.header(new.metadata))
        for old, entry in new.parts:
            found[old.digest].append((old.start + entry.start, old.start + entry.stop, number, now))
            now += entry.stop - entry.start
    columns = {digest: np.array(sorted(rows), np.int64).reshape(-1, 4).T for digest, rows in found.items()}
    return {digest: Moved(*rows) for digest, rows in columns.items()}, tuple(names)


def _within(entries: Sequence[HeaderEntry], data_start: int, places: PlaceRows) -> NDArray[np.int64] | None:
    """For each place, the number of the entry that it is in; None if one is in none."""
    starts = np.array([data_start + entry.start for entry in entries], np.int64)
    stops = np.array([data_start + entry.stop for entry in entries], np.int64)
    offset = places["offset"].astype(np.int64)
    at = np.searchsorted(starts, offset, "right") - 1
    if len(places) and (not len(entries) or (at < 0).any()):
        return None
    if (offset + places["length"].astype(np.int64) > stops[at]).any():
        return None
    return at


def _note(text: str) -> PackNote:
    """A pack's notes on its tensors; empty if they cannot be read, because they are a help and not needed."""
    try:
        return msgspec.json.decode(text, type=prepared(PackNote))
    except msgspec.MsgspecError:
        return PackNote(FORMAT)


def _tensor(old: Old, entry: HeaderEntry) -> str | None:
    """The tensor that an entry is of, where the pack's note knows it: the entry's name without plane and chunk, or all of it."""
    for name in (entry.name, entry.name.rsplit("/", 2)[0]):
        if name in old.note.tensors:
            return name
    return None


def _by_pack(parts: Iterable[tuple[Old, HeaderEntry]]) -> Iterator[tuple[Old, list[HeaderEntry]]]:
    """Entries that follow one another out of the same pack."""
    last: Old | None = None
    entries: list[HeaderEntry] = []
    for old, entry in parts:
        if old is not last and entries:
            assert last is not None
            yield last, entries
            entries = []
        last = old
        entries.append(entry)
    if last is not None and entries:
        yield last, entries


def _checked(storages: Sequence[Storage], old: Old, entries: Sequence[HeaderEntry]) -> Iterator[Bytes]:
    """The bytes of entries, in order, of which every live chunk matches its digest."""
    for run in runs(_segments(old, entries), lambda segment: segment[0]):
        yield from _read(storages, old, run)


def _segments(old: Old, entries: Sequence[HeaderEntry]) -> Iterator[_Segment]:
    """The live chunks in entries with their digests, and the bytes between them, which have none."""

    def gap(start: int, stop: int) -> Iterator[_Segment]:
        return ((Span(old.digest, a, min(stop, a + PIECE)), None) for a in range(start, stop, PIECE))

    offsets = old.places["offset"]
    for entry in entries:
        at, stop = old.start + entry.start, old.start + entry.stop
        first, last = np.searchsorted(offsets, [at, stop], "left")
        for place in old.places[first:last]:
            a, n = int(place["offset"]), int(place["length"])
            if a < at or not n:
                continue  # over another chunk, as no writer here makes them: readers check it
            yield from gap(at, a)
            yield Span(old.digest, a, a + n), place["digest"].ljust(DIGEST_BYTES, b"\0")
            at = a + n
        yield from gap(at, stop)


def _read(storages: Sequence[Storage], old: Old, run: Sequence[_Segment]) -> Iterator[Bytes]:
    """Read a run from the first store that has it right."""
    spans = [span for span, _ in run]
    reasons = []
    for storage in storages:
        try:
            found = read(storage, spans)
        except (NotFoundError, CorruptionError) as error:
            reasons.append(str(error))
            continue
        if all(digest in (None, digest_of(one)) for one, (_, digest) in zip(found, run, strict=True)):
            yield from found
            return
        reasons.append(f"the bytes in {storage.url} do not match their digest")
    raise DamagedPackError(
        f"bytes {spans[0].start} to {spans[-1].stop} of {pack_key(old.digest)} are wrong ({'; '.join(reasons)}): it stays as it "
        f"is; run 'modelstore verify' to see what needs them",
        old.digest,
    )
