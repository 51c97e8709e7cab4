"""Merges the parts that ranks saved into one version, and publishes it by the one write that makes it visible.

Nothing is stored again, except tensors whose slices were cut by borders that fit no common grid: these are read back and cut
again. The digest of a tensor that came in slices is computed by reading it back, in the order of its bytes, within the budget.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from modelstore.codecs.registry import codec as make_codec
from modelstore.errors import ConflictError, CorruptionError, NotFoundError
from modelstore.execute.read.fetcher import ChunkSource, Fetching
from modelstore.execute.read.loading import Variant
from modelstore.execute.read.reader import Reader
from modelstore.execute.write.encoding import Input
from modelstore.execute.write.packs import PackWriter, Written, known_chunks
from modelstore.execute.write.parts import PartPage, Published, Stored, published_key, session_id, session_prefix
from modelstore.execute.write.save import Against, against_base, base_of, plan_inputs, store_manifest
from modelstore.format import boxes, grid
from modelstore.format.buffers import Bytes
from modelstore.format.digest import name_of_pieces
from modelstore.format.dtypes import DTYPES
from modelstore.format.objects.manifest import Base, CodecSpec, Manifest, Tensor
from modelstore.format.objects.manifest_builder import Location, ManifestBuilder
from modelstore.format.objects.note import Note
from modelstore.format.objects.record import VersionRecord, pack_key
from modelstore.format.objects.sealed import seal
from modelstore.format.region import Region, Shape, extent, full, intersect, placed, shift, size
from modelstore.plan.parts import RankSlice, cells, common_chunk, piece_problem
from modelstore.plan.work import Work
from modelstore.plan.write import TensorPlan, plan_tensor
from modelstore.sources.base import Source
from modelstore.storage.base import Storage
from modelstore.storage.pool import REQUESTS, ordered
from modelstore.store.mend.heal import replace_pack
from modelstore.store.packs import FILE
from modelstore.store.repo import Repo
from modelstore.store.shelf import Shelf


@dataclass(frozen=True, slots=True)
class StoredSlice:
    """A piece of a tensor, with the entry that its rank's manifest has of it, and its codec."""

    piece: RankSlice
    tensor: Tensor
    codec: CodecSpec

    @property
    def encoding(self) -> tuple[CodecSpec, tuple[str, ...]]:
        """The codec, and the planes that it makes."""
        return self.codec, tuple(plane.name for plane in self.tensor.planes)


@dataclass(frozen=True)
class Merge:
    """The result of all parts together: each tensor's pieces, in model order; ties; files by path and the rank that gives
    them.
    """

    tensors: Mapping[str, tuple[StoredSlice, ...]]
    aliases: Mapping[str, str]
    files: Mapping[str, tuple[int, Tensor]]
    metadata: Mapping[str, str]
    codec: str
    base: Base | None


def plan_merge(parts: Sequence[Stored], replaced: Collection[str] = ()) -> Merge:
    """The merge of the parts of all ranks, in their order; files that are `replaced` need not agree.

    `ConflictError` names the tensor or file that does not go together, and the ranks.
    """
    pages = [part.page for part in parts]
    model = pages[0].model

    def wrong(what: str, **where: str) -> ConflictError:
        return ConflictError(
            f"the parts of model {model!r} do not go together: {what}; nothing was published, save those ranks again",
            model=model,
            **where,  # type: ignore[arg-type]
        )

    for page in pages:
        if page.codec != pages[0].codec:
            raise wrong(f"rank {pages[0].rank} has codec {pages[0].codec!r}, rank {page.rank} has {page.codec!r}")
        if page.manifest.base != pages[0].manifest.base:
            raise wrong(f"ranks {pages[0].rank} and {page.rank} stored differences to different versions")
    held: dict[str, list[StoredSlice]] = {}
    ties: dict[str, set[str | None]] = {}
    files: dict[str, tuple[int, Tensor]] = {}
    metadata: dict[str, str] = {}
    for page in pages:
        names = page.manifest.by_name
        for name, tensor in names.items():
            place = page.slices.get(name)
            whole, region = (place.shape, place.region) if place else (tensor.shape, full(tensor.shape))
            chunk = place.chunk if place else tensor.chunk
            piece = RankSlice(page.rank, tensor.dtype, whole, region, chunk)
            held.setdefault(name, []).append(StoredSlice(piece, tensor, page.manifest.codecs[tensor.codec]))
            ties.setdefault(name, set()).add(page.manifest.aliases.get(name))
        for file in page.manifest.files:
            rank, before = files.setdefault(file.name, (page.rank, file))
            if before.digest != file.digest and file.name not in replaced:
                raise wrong(f"file {file.name!r} of ranks {rank} and {page.rank} differs", object=file.name)
        metadata = {**page.manifest.metadata, **metadata}  # such as {"format": "pt"}: the lowest rank's counts
    for name, pieces in held.items():
        problem = piece_problem([one.piece for one in pieces])
        if problem:
            raise wrong(f"tensor {name!r}: {problem}", tensor=name)
        other = next((one for one in pieces if one.encoding != pieces[0].encoding), None)
        if other is not None:
            ranks = f"ranks {pieces[0].piece.rank} and {other.piece.rank}"
            raise wrong(f"tensor {name!r}: {ranks} encoded their slices differently", tensor=name)
    # A tie holds where every rank that has the tensor ties it so; else it is a tensor of its own, out of the same chunks.
    aliases = {name: found for name, (found, *more) in ((n, tuple(t)) for n, t in ties.items()) if found and not more}
    aliases = {name: to for name, to in aliases.items() if to not in aliases and len(held[to]) == len(held[name])}
    tensors = {name: tuple(pieces) for name, pieces in held.items() if name not in aliases}
    return Merge(tensors, aliases, files, metadata, pages[0].codec, pages[0].manifest.base)


def publish(
    repo: Repo,
    parts: Sequence[Stored],
    *,
    files: Source,
    previous: Against | None,
    note: Note,
    fetching: Fetching,
    work: Work,
) -> tuple[VersionRecord, Manifest]:
    """Publish the parts of all ranks as the next version; a session that was published already is not published again.

    `files` has further files, `note` the description of the version. `ConflictError` if the parts do not go together,
    `NotFoundError` if a pack of one is gone; nothing is visible then.
    """
    page = parts[0].page
    model, session = page.model, page.session
    merge = plan_merge(parts, files.files)
    if not (merge.tensors or merge.files or files.files):
        raise ConflictError(f"no rank's part of session {session!r} holds a tensor: save the parts again", model=model)
    storage = repo.storage
    shelf = Shelf(storage)
    # The session goes on: garbage collection keeps what its pages name.
    storage.create(f"{session_prefix(model, session)}publishing-{uuid.uuid4().hex}.json", b"{}")
    _refresh(storage, parts, set(previous.manifest.packs) if previous else set(), shelf)
    base = _base(repo, merge.base, fetching)
    readers = {
        p.page.rank: _reader(p.page, fetching(model, p.page.manifest, storage, repo.mirrors), base) for p in parts
    }
    by_rank = {p.page.rank: p.page.manifest for p in parts}
    cut = {name: _common_cut(name, pieces) for name, pieces in merge.tensors.items()}
    anew = [_input(name, merge.tensors[name], readers, previous, base) for name, chunk in cut.items() if chunk is None]
    inputs = [*anew, *plan_inputs(files, merge.codec, "auto", None)]
    plans = {item.plan.name: item.plan for item in inputs}
    known = known_chunks([*by_rank.values(), *([previous.manifest] if previous else [])])
    written = PackWriter(storage, work, known, shelf).write(inputs)
    joined = {name: chunk for name, chunk in cut.items() if chunk is not None and len(merge.tensors[name]) > 1}
    digests = _digests({name: (merge.tensors[name], chunk) for name, chunk in joined.items()}, readers, work)
    builder = ManifestBuilder()
    anew_of = {name: _entry(builder, plans, name, written) for name, chunk in cut.items() if chunk is None}
    tensors = [
        anew_of.get(name) or _kept(builder, name, pieces, joined.get(name), by_rank, digests)
        for name, pieces in merge.tensors.items()
    ]
    files.opened.check()
    own = [_entry(builder, plans, FILE + path, written) for path in files.files]
    others = [
        builder.carry(by_rank[rank], file) for path, (rank, file) in merge.files.items() if path not in files.files
    ]
    manifest = builder.build(
        tensors,
        [*others, *own],
        aliases=dict(merge.aliases),
        metadata={**merge.metadata, **files.metadata},
        base=merge.base,
    )
    entry = store_manifest(repo.manifests, model, manifest, merge.codec, shelf)
    after = min(part.page.after for part in parts)
    record = repo.catalog.publish_version(model, session_id(model, session), entry, after=after, note=note)
    storage.create(published_key(model, session), seal(Published(record.version)))
    forget(storage, model, session)
    return record, manifest


def _base(repo: Repo, base: Base | None, fetching: Fetching) -> Against | None:
    """What all parts' deltas are made to."""
    if base is None:
        return None
    found = Variant(repo, base.model, repo.manifests.read(base.model, base.manifest), fetching=fetching)
    return Against(base.model, base.manifest, found.manifest, found.reader, found.chain)


def _reader(page: PartPage, source: ChunkSource, base: Against | None) -> Reader:
    """Reads a part. A slice's deltas are made to a region of the base's tensor, which is found by the slice's place."""
    alone = Reader(source, None)
    if base is None:
        return alone

    def under(tensor: Tensor, region: Region) -> Bytes:
        place = page.slices.get(tensor.name)
        there = region if place is None else placed(region, place.region)
        return base.reader.region(base.manifest.by_name[tensor.name], there)

    return Reader(source, alone).over(under)


def _common_cut(name: str, pieces: Sequence[StoredSlice]) -> Shape | None:
    """The cut that all pieces kept to; None where there is none, or where they are differences to a tensor of another name."""
    if any(held.codec.name == "delta" and held.tensor.name != name for held in pieces):
        return None
    return common_chunk([held.piece for held in pieces])


def forget(storage: Storage, model: str, session: str) -> None:
    """Remove a session's pages, but for what says which version it became; `gc` removes that one later."""
    for info in list(storage.list(session_prefix(model, session))):
        if info.key != published_key(model, session):
            storage.delete(info.key)


def _renamed(tensor: Tensor, name: str) -> Tensor:
    """The entry of a tensor under another name: a tie that only some ranks have."""
    return Tensor(name, tensor.dtype, tensor.shape, tensor.chunk, tensor.codec, tensor.digest, tensor.planes)


def _kept(
    builder: ManifestBuilder,
    name: str,
    pieces: Sequence[StoredSlice],
    chunk: Shape | None,
    manifests: Mapping[int, Manifest],
    digests: Mapping[str, str],
) -> Tensor:
    """The entry of a tensor whose chunks stay as its ranks stored them; `chunk`: the cut of its slices, if it came in several."""
    first = pieces[0]
    if chunk is None:
        return _renamed(builder.carry(manifests[first.piece.rank], first.tensor), name)
    piece = first.piece
    planes = _planes(pieces, chunk, manifests)
    return builder.tensor(name, piece.dtype, piece.shape, chunk, first.codec, digests[name], planes)


def _entry(
    builder: ManifestBuilder, plans: Mapping[str, TensorPlan], name: str, written: Mapping[str, Written]
) -> Tensor:
    plan, done = plans[name], written[name]
    return builder.tensor(
        name.removeprefix(FILE), plan.dtype, plan.shape, plan.chunk, plan.codec, done.digest, done.planes
    )


def _refresh(storage: Storage, parts: Sequence[Stored], live: set[str], shelf: Shelf) -> None:
    """Make sure that every pack that pages name is there and right, and young enough that a collection leaves it alone.

    Those of the newest version (`live`) are kept for its sake. A pack is digested once in a process.
    """
    ranks: dict[str, int] = {}
    for part in parts:
        for pack in part.page.manifest.packs:
            ranks.setdefault(pack, part.page.rank)

    def refresh(item: tuple[str, int]) -> None:
        pack, rank = item
        info = storage.info(pack_key(pack))
        if info is not None and shelf.good(pack):
            with suppress(NotFoundError, CorruptionError):  # removed or changed meanwhile
                if pack not in live and not shelf.young(info.modified):
                    replace_pack(storage, storage, pack)
                return
        there = storage.info(pack_key(pack)) is not None
        kind, state = (CorruptionError, "damaged") if there else (NotFoundError, "gone")
        raise kind(
            f"pack {pack_key(pack)} of the part of rank {rank} is {state}: nothing was published; save that rank again",
            model=parts[0].page.model,
            object=pack_key(pack),
        )

    list(ordered(refresh, ranks.items(), REQUESTS, "modelstore-parts"))


class _RankSlices:
    """Reads regions of a tensor out of the slices that ranks stored."""

    def __init__(self, pieces: Sequence[StoredSlice], readers: Mapping[int, Reader]) -> None:
        self._pieces = pieces
        self._readers = readers
        self._kind = DTYPES[pieces[0].piece.dtype]
        self._regions = np.array([one.piece.region for one in pieces], np.int64).reshape(len(pieces), -1, 2)

    def read(self, region: Region, out: Bytes) -> None:
        """The region's raw bytes into `out`."""
        wanted = np.array(region, np.int64).reshape(-1, 2)
        touched = (self._regions[:, :, 0] < wanted[:, 1]) & (wanted[:, 0] < self._regions[:, :, 1])
        for at in np.flatnonzero(touched.all(axis=1)).tolist():
            piece, tensor = self._pieces[at].piece, self._pieces[at].tensor
            both = intersect(piece.region, region)
            assert both is not None, "regions that overlap in every dimension share elements"
            reader = self._readers[piece.rank]
            if both == region:
                reader.read_into(tensor, shift(both, piece.region), out)
                return
            values = reader.region(tensor, shift(both, piece.region))
            boxes.paste(values, out, extent(region), self._kind.itemsize, shift(both, region))


def _input(
    name: str,
    pieces: Sequence[StoredSlice],
    readers: Mapping[int, Reader],
    previous: Against | None,
    base: Against | None,
) -> Input:
    """A tensor to cut again, read from its slices."""
    first = pieces[0]
    piece = first.piece
    before = previous.manifest.by_name.get(name) if previous else None
    like = before.chunk if before and (before.shape, before.dtype) == (piece.shape, piece.dtype) else None
    spec, encoder = first.codec, None
    under = base_of(base, name, piece.shape, piece.dtype) if base is not None and spec.name == "delta" else None
    if spec.name == "delta" and under is None:
        spec = CodecSpec("lossless")
    plan, coder = plan_tensor(name, piece.dtype, piece.shape, spec, like=like), make_codec(spec.name, spec.params)
    if under is not None:
        encoder = against_base(coder, DTYPES[piece.dtype], under)
    return Input(plan, coder, _RankSlices(pieces, readers).read, encoder)


def _planes(
    pieces: Sequence[StoredSlice], chunk: Shape, manifests: Mapping[int, Manifest]
) -> dict[str, list[tuple[bytes, Location]]]:
    """The planes of a tensor whose slices kept to one cut: every rank's chunks at their places in the whole grid."""
    shape = pieces[0].piece.shape
    empty: tuple[bytes, Location] = (b"", ("", 0, 0))
    planes = {plane.name: [empty] * grid.count(shape, chunk) for plane in pieces[0].tensor.planes}
    for held in pieces:
        manifest = manifests[held.piece.rank]
        for plane in held.tensor.planes:
            rows = range(plane.first, plane.first + held.tensor.chunks)
            for at, row in zip(cells(held.piece, chunk).tolist(), rows, strict=True):
                pack = manifest.packs[int(manifest.pack[row])]
                where = pack, int(manifest.offset[row]), int(manifest.length[row])
                planes[plane.name][at] = manifest.digest(row), where
    return planes


def _digests(
    tensors: Mapping[str, tuple[Sequence[StoredSlice], Shape]],
    readers: Mapping[int, Reader],
    work: Work,
) -> dict[str, str]:
    """BLAKE3 of the raw bytes of tensors that came in slices, several tensors side by side."""
    threads = max(1, min(work.limits.threads or os.cpu_count() or 1, len(tensors) or 1))
    limit = work.memory // (4 * threads)

    def digest(item: tuple[Sequence[StoredSlice], Shape]) -> str:
        pieces, chunk = item
        piece, read = pieces[0].piece, _RankSlices(pieces, readers).read
        itemsize = DTYPES[piece.dtype].itemsize

        def bands() -> Iterator[Bytes]:
            for region in grid.runs(piece.shape, chunk, itemsize, limit):
                values = np.empty(size(region) * itemsize, np.uint8)
                read(region, values)
                yield values
                work.done(len(values))

        return name_of_pieces(bands())

    return dict(zip(tensors, ordered(digest, tensors.values(), threads, "modelstore-parts"), strict=True))
