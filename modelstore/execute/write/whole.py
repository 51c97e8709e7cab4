"""Writes tensors in one piece, raw, under their own names: packs that any safetensors loader reads.

A pack's name is the digest of its bytes and its header comes first, so a tensor is read twice: once for the digests, once
to be written. Nothing is held but the piece on its way, whatever the size of a tensor.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from blake3 import blake3

from modelstore.errors import ConflictError
from modelstore.execute.write.encoding import Input
from modelstore.execute.write.packs import Placed, Tally, Written
from modelstore.format import grid
from modelstore.format.buffers import Bytes, Pieces, view
from modelstore.format.digest import digest_of, name_of_pieces
from modelstore.format.objects.manifest_builder import Location
from modelstore.format.progress import Advance
from modelstore.storage.base import Storage
from modelstore.store.packs import Pack, PackBuilder, TensorNote
from modelstore.store.shelf import Shelf

SHARD_BYTES = 4 << 30  # larger tensors have a pack of their own; loaders and object stores like files below 5 GB


@dataclass(frozen=True, slots=True)
class _Digested:
    tensor: str
    chunks: tuple[tuple[bytes, int], ...]  # digest and length, in the order of the tensor's bytes


@dataclass
class WholeWriter:
    """Stores inputs as ordinary safetensors shards. `known` are chunks that are in the store already, by digest."""

    storage: Storage
    known: dict[bytes, Location]
    shelf: Shelf
    metadata: Mapping[str, str]
    progress: Advance | None = None
    finished: Callable[[dict[str, Written], Sequence[Placed]], None] | None = None
    tally: Tally = field(default_factory=Tally)
    _own: set[str] = field(default_factory=set)  # packs that were stored here

    def write(self, inputs: Sequence[Input]) -> dict[str, Written]:
        """Store all inputs, in order; what became of each, by name."""
        done: dict[str, Written] = {}
        shard: list[tuple[Input, _Digested]] = []
        for item in inputs:
            digested = self._digest(item)
            at = self._stored_in_one_piece(digested)
            if at is not None:
                for digest, n in digested.chunks:
                    self.tally.find(digest, n)
                done[item.plan.name] = Written(
                    digested.tensor, {"data": [(d, where) for (d, _), where in zip(digested.chunks, at, strict=True)]}
                )
                continue
            nbytes = sum(n for _, n in digested.chunks)
            if shard and sum(n for _, d in shard for _, n in d.chunks) + nbytes > SHARD_BYTES:
                done |= self._store(shard)
                shard = []
            shard.append((item, digested))
        if any(d.chunks for _, d in shard):
            return done | self._store(shard)
        return done | {
            item.plan.name: Written(d.tensor, {"data": []}) for item, d in shard
        }  # a pack of nothing is none

    def _digest(self, item: Input) -> _Digested:
        hasher = blake3()
        chunks = []
        for piece in _pieces(item):
            hasher.update(view(piece))
            chunks.append((digest_of(piece), len(piece)))
            self.tally.raw += len(piece)
            if self.progress:
                self.progress(len(piece))
        return _Digested(hasher.hexdigest(), tuple(chunks))

    def _stored_in_one_piece(self, tensor: _Digested) -> list[Location] | None:
        """The tensor's place in the store, if its chunks follow one another in one pack; None if they do not."""
        at = [self.known.get(digest) for digest, _ in tensor.chunks]
        if not at or any(where is None for where in at):
            return None
        found = [where for where in at if where is not None]
        if not all(pack in self._own or self.shelf.good(pack) for pack in {where[0] for where in found}):
            for digest, _ in tensor.chunks:
                self.known.pop(digest, None)
            return None
        ends = itertools.pairwise(found)
        return found if all(a[0] == b[0] and a[1] + a[2] == b[1] for a, b in ends) else None

    def _store(self, shard: Sequence[tuple[Input, _Digested]]) -> dict[str, Written]:
        builder = PackBuilder()
        for item, _ in shard:
            plan = item.plan
            nbytes = _nbytes(item)
            builder.announce(plan.name, plan.dtype, plan.shape, nbytes)
            builder.notes[plan.name] = TensorNote(plan.dtype, plan.shape, plan.chunk, plan.codec)
        header = builder.header(self.metadata)
        size = len(header) + builder.size
        digest = name_of_pieces(itertools.chain((header,), *(_pieces(item) for item, _ in shard)))

        def data() -> Iterator[bytes | Bytes]:
            again = blake3(header)
            yield header
            for item, _ in shard:
                for piece in _pieces(item):
                    again.update(view(piece))
                    yield piece
            if again.hexdigest() != digest:  # raised before the object is whole, so it never becomes visible
                raise ConflictError("the source changed while it was saved: nothing was published; save it again")

        written = self.shelf.put(Pack(digest, Pieces(data), size, len(header)))
        self.tally.stored += size if written else 0
        self._own.add(digest)
        done = {}
        at = len(header)
        for item, digested in shard:
            rows = []
            for content, n in digested.chunks:
                self.tally.seen.add(content) if written else self.tally.find(content, n)
                rows.append((content, (digest, at, n)))
                self.known[content] = (digest, at, n)
                at += n
            done[item.plan.name] = Written(digested.tensor, {"data": rows})
        if self.finished:
            self.finished(done, ())
        return done


def _nbytes(item: Input) -> int:
    return int(np.prod(item.plan.shape, dtype=np.int64)) * item.plan.itemsize


def _pieces(item: Input) -> Iterator[Bytes]:
    """The tensor's bytes, chunk by chunk: with chunks of whole rows that is the order of its bytes."""
    plan = item.plan
    for chunk in range(grid.count(plan.shape, plan.chunk)):
        region = grid.chunk_region(plan.shape, plan.chunk, chunk)
        piece = np.empty(int(np.prod([b - a for a, b in region], dtype=np.int64)) * plan.itemsize, np.uint8)
        item.read(region, piece)
        yield piece
