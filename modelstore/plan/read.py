"""The plan of a read: which ranges of which packs are read, and where each chunk's values go."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from modelstore.format import grid
from modelstore.format.objects.manifest import Manifest, Tensor
from modelstore.format.region import Region, Shape, extent, full, shift
from modelstore.plan.layout_share import Share, overlaps

JOB_BYTES = 8 << 20  # raw bytes that one job decodes, about
JOB_CHUNKS = 4096  # that one job reads, at most
GAP = 32 << 10  # bytes between two wanted ranges that are read rather than skipped


@dataclass(frozen=True, slots=True)
class Want:
    """A part of a tensor to read, into a buffer of the share's shape."""

    tensor: Tensor
    share: Share

    @classmethod
    def of(cls, tensor: Tensor, region: Region) -> Want:
        """The want of one region of a tensor."""
        return cls(tensor, Share.of(region))

    @property
    def shape(self) -> Shape:
        return self.share.shape

    @property
    def nbytes(self) -> int:
        """Raw bytes of the buffer."""
        return math.prod(self.shape) * self.tensor.kind.itemsize


@dataclass(frozen=True, slots=True)
class Destination:
    """The destination of a part of a chunk: `source` within the chunk, `place` within the wanted buffer."""

    source: Region
    place: Region


@dataclass(frozen=True, slots=True)
class ChunkRead:
    """One chunk to read: its tensor's place among the wants, its index in the grid, its region, its rows (one for each plane)."""

    want: int
    chunk: int
    region: Region
    rows: tuple[int, ...]
    targets: tuple[Destination, ...]

    @property
    def whole(self) -> Region | None:
        """The chunk's destination, if all of it goes to one place."""
        if len(self.targets) != 1:
            return None
        place = self.targets[0].place
        return place if place == self.region or extent(place) == extent(self.region) else None


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes of a pack to fetch in one request."""

    pack: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class ReadJob:
    """Chunks that one worker fetches and decodes in one go; `nbytes` are raw."""

    chunks: tuple[ChunkRead, ...]
    ranges: tuple[Range, ...]
    nbytes: int

    @property
    def fetched(self) -> int:
        """Bytes that the job's requests ask for."""
        return sum(r.stop - r.start for r in self.ranges)


def chunk_reads(wants: Iterable[Want]) -> Iterator[ChunkRead]:
    """Every chunk that the wants touch, in their order."""
    for index, want in enumerate(wants):
        tensor = want.tensor
        if want.share.region == full(tensor.shape):  # as most are: a chunk's place is where it is in the tensor
            firsts = [plane.first for plane in tensor.planes]
            for chunk, (region, own) in enumerate(grid.regions(tensor.shape, tensor.chunk)):
                rows = tuple([first + chunk for first in firsts])
                yield ChunkRead(index, chunk, region, rows, (Destination(own, region),))
            continue
        pieces = list(want.share.pieces())
        if len(pieces) == 1:
            touched = grid.touching(tensor.shape, tensor.chunk, pieces[0][0]).tolist()
        else:
            touched = sorted({int(c) for p in pieces for c in grid.touching(tensor.shape, tensor.chunk, p[0])})
        for chunk in touched:
            region = grid.chunk_region(tensor.shape, tensor.chunk, chunk)
            targets = [Destination(shift(both, region), place) for both, place in overlaps(pieces, region)]
            rows = tuple(plane.first + chunk for plane in tensor.planes)
            yield ChunkRead(index, chunk, region, rows, tuple(targets))


def plan_read(manifest: Manifest, wants: list[Want]) -> Iterator[ReadJob]:
    """The wanted chunks in jobs, in order; each job's neighbouring bytes are fetched together.

    Pure and lazy: a job is made when it is asked for, so a plan for a million chunks costs what is used of it.
    """
    chunks: list[ChunkRead] = []
    nbytes = stored = 0
    for chunk in chunk_reads(wants):
        size = wants[chunk.want].tensor.kind.itemsize
        for a, b in chunk.region:
            size *= b - a
        encoded = sum([manifest.length.item(row) for row in chunk.rows])
        full = nbytes + size > JOB_BYTES or stored + encoded > 2 * JOB_BYTES or len(chunks) == JOB_CHUNKS
        if chunks and full:
            yield read_job(manifest, chunks, nbytes)
            chunks, nbytes, stored = [], 0, 0
        chunks.append(chunk)
        nbytes += size
        stored += encoded
    if chunks:
        yield read_job(manifest, chunks, nbytes)


def read_job(manifest: Manifest, chunks: Sequence[ChunkRead], nbytes: int) -> ReadJob:
    """The job that reads these chunks, of `nbytes` raw bytes, in as few requests as their places allow."""
    rows = [row for chunk in chunks for row in chunk.rows]
    ranges: list[Range] = []
    for p, start, n in sorted(manifest.places(rows)):
        last = ranges[-1] if ranges else None
        if last and last.pack == p and start - last.stop <= GAP:
            ranges[-1] = Range(p, last.start, max(last.stop, start + n))
        else:
            ranges.append(Range(p, start, start + n))
    return ReadJob(tuple(chunks), tuple(ranges), nbytes)
