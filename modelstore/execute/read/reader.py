"""Runs read plans: fetch, check, decode into place, tensor by tensor as they become ready."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from typing import TypeVar

import numpy as np

from modelstore.codecs.base import Codec
from modelstore.codecs.registry import codec as make_codec
from modelstore.errors import FormatError
from modelstore.execute.memory import Arena
from modelstore.execute.read.fetcher import ChunkSource
from modelstore.execute.read.scheduler import schedule
from modelstore.format import boxes
from modelstore.format.buffers import Buffer, Bytes
from modelstore.format.objects.manifest import Manifest, Tensor
from modelstore.format.region import Region, extent, full, rows, size
from modelstore.plan.read import ChunkRead, ReadJob, Want, plan_read, read_job
from modelstore.plan.work import Work

T = TypeVar("T")
Held = Callable[[Tensor, Region], Bytes | None]  # the raw bytes of a region, where memory has them
Allocate = Callable[[int, int], Bytes]  # (the want's place in the list, bytes) → a writable buffer of that many


class Reader:
    """Reads one manifest's tensors."""

    def __init__(self, fetcher: ChunkSource, base: Reader | None) -> None:
        self._fetcher = fetcher
        self._base = base
        self._held: Held | None = None
        try:
            self._codecs: list[Codec] = [make_codec(spec.name, spec.params) for spec in self.manifest.codecs]
        except (TypeError, ValueError) as error:
            raise FormatError(
                f"the manifest of model {fetcher.model!r} is not valid ({str(error)[:200]}): restore it",
                model=fetcher.model,
            ) from None
        self._local = fetcher.local

    @property
    def manifest(self) -> Manifest:
        return self._fetcher.manifest

    @property
    def fetcher(self) -> ChunkSource:
        """The source of the chunks."""
        return self._fetcher

    @property
    def base(self) -> Reader | None:
        """The base of deltas."""
        return self._base

    def over(self, held: Held) -> Reader:
        """The same, where deltas are decoded against what memory holds, as far as it holds their base, or their base's base."""
        made = copy(self)
        made._held = held
        made._base = None if self._base is None else self._base.over(held)
        return made

    @property
    def bytes_read(self) -> int:
        """Encoded bytes that were read so far, with those of the bases that deltas are decoded against."""
        return self._fetcher.bytes_read + (self._base.bytes_read if self._base is not None else 0)

    @property
    def local(self) -> bool:
        """Whether the packs are local files."""
        return self._local

    def region(self, tensor: Tensor, region: Region) -> Bytes:
        """The raw bytes of one region, read and decoded in this thread."""
        out = np.empty(size(region) * tensor.kind.itemsize, np.uint8)
        self.read_into(tensor, region, out)
        return out

    def read_into(self, tensor: Tensor, region: Region, out: Bytes) -> None:
        """The same, into a buffer of exactly that many bytes."""
        wants = [Want.of(tensor, region)]
        for job in plan_read(self.manifest, wants):
            self._run(job, wants, {0: out})

    def stream(
        self,
        wants: list[Want],
        work: Work,
        *,
        allocate: Allocate | None = None,
        bounded: bool = True,
    ) -> Iterator[tuple[int, Bytes]]:
        """Each want's place in the list and its raw bytes, as they become ready.

        Reads run in the order of the wants. With `bounded`, buffers not yet taken count against the memory, and one tensor
        above it is let through alone; without, all are the caller's.
        """
        arena = Arena()
        allocate = allocate or (lambda _, nbytes: arena.allocate(nbytes))
        return self.schedule(
            wants,
            work,
            lambda index: allocate(index, wants[index].nbytes),
            lambda job, buffers: self._run(job, wants, buffers),
            bounded=bounded,
        )

    def schedule(
        self,
        wants: list[Want],
        work: Work,
        begin: Callable[[int], T],
        run: Callable[[ReadJob, dict[int, T]], None],
        *,
        bounded: bool = True,
    ) -> Iterator[tuple[int, T]]:
        """As `stream`, but `begin` makes the memory of a want, and `run` reads a job's chunks into it."""
        return schedule(
            plan_read(self.manifest, wants),
            [want.nbytes for want in wants],
            begin,
            run,
            threads=work.limits.reading_threads(self._local),
            memory=work.memory // 2 if bounded else None,
            progress=work.advance,
        )

    def planes(self, job: ReadJob, wants: Sequence[Want]) -> Iterator[tuple[ChunkRead, list[Bytes]]]:
        """Each of a job's chunks with its encoded planes, checked; they are in this thread's memory until its next job."""
        found = self._fetcher.ranges(job, wants)
        for chunk in job.chunks:
            yield chunk, [found[row] for row in chunk.rows]

    def _run(self, job: ReadJob, wants: Sequence[Want], buffers: dict[int, Bytes]) -> None:
        """Fetch, check and decode one job's chunks into their buffers."""
        chunks = job.chunks
        if self._local:
            rest = tuple(c for c in chunks if not self._direct(c, wants, buffers))
            if not rest:
                return
            job = job if len(rest) == len(chunks) else read_job(self.manifest, rest, job.nbytes)
        under = self.bases(job.chunks, wants, buffers)
        for chunk, planes in self.planes(job, wants):
            self.decode(chunk, planes, wants[chunk.want], buffers[chunk.want], under.get((chunk.want, chunk.chunk)))

    def _direct(self, chunk: ChunkRead, wants: Sequence[Want], buffers: dict[int, Bytes]) -> bool:
        """Read a raw chunk straight into its place, where it is one run there; whether that was so."""
        want = wants[chunk.want]
        tensor = want.tensor
        if self._codecs[tensor.codec].name != "raw" or len(chunk.rows) != 1 or (place := chunk.whole) is None:
            return False
        out = rows(buffers[chunk.want], want.shape, tensor.kind.itemsize, place)
        if out is None or out.shape[0] != 1 or out.size != self.manifest.length[chunk.rows[0]]:
            return False
        self._fetcher.direct(chunk.rows[0], out[0], tensor.name, chunk.chunk)
        return True

    def codec(self, tensor: Tensor) -> Codec:
        """The codec of a tensor."""
        return self._codecs[tensor.codec]

    def decode(
        self, chunk: ChunkRead, planes: Sequence[Buffer], want: Want, buffer: Bytes, under: Bytes | None = None
    ) -> None:
        """Decode a chunk's planes into their places in the want's buffer; `under`: the base's values, as `bases` gives them."""
        tensor, shape = want.tensor, extent(chunk.region)
        codec = self.codec(tensor)
        out = _place(chunk, want, buffer)
        try:
            if out is not None:
                codec.decode(planes, shape, tensor.kind, out, under)
                return
            values = np.empty(size(chunk.region) * tensor.kind.itemsize, np.uint8)
            codec.decode(planes, shape, tensor.kind, values.reshape(1, -1), under)
        except FormatError as error:
            raise FormatError(
                f"chunk {chunk.chunk} of tensor {tensor.name!r} cannot be decoded: {error}",
                tensor=tensor.name,
                chunk=chunk.chunk,
            ) from None
        for target in chunk.targets:
            boxes.copy(values, shape, target.source, buffer, want.shape, target.place, tensor.kind.itemsize)

    def bases(
        self, chunks: Sequence[ChunkRead], wants: Sequence[Want], buffers: Mapping[int, Bytes]
    ) -> dict[tuple[int, int], Bytes]:
        """The base's values of those chunks that are deltas, by want and chunk: held in memory (do not write to them), or
        read.

        Values that are read go to their place if that is one run of bytes, and take as few requests as the chunks themselves.
        So a chain of deltas is decoded link after link onto the same memory.
        """
        found: dict[tuple[int, int], Bytes] = {}
        missing: list[Want] = []
        into: dict[int, Bytes] = {}
        for chunk in chunks:
            want = wants[chunk.want]
            if not self.codec(want.tensor).needs_base:
                continue
            base = self._base_tensor(want.tensor)
            values = self._held(base, chunk.region) if self._held is not None else None
            if values is None:
                out = _place(chunk, want, buffers[chunk.want])
                if out is not None and out.flags.c_contiguous:
                    values = out.reshape(-1)
                else:
                    values = np.empty(size(chunk.region) * want.tensor.kind.itemsize, np.uint8)
                into[len(missing)] = values
                missing.append(Want.of(base, chunk.region))
            found[chunk.want, chunk.chunk] = values
        if missing:
            assert self._base is not None
            for job in plan_read(self._base.manifest, missing):
                self._base._run(job, missing, into)
        return found

    def _base_tensor(self, tensor: Tensor) -> Tensor:
        if self._base is None or tensor.name not in self._base.manifest.by_name:
            raise FormatError(
                f"tensor {tensor.name!r} is stored against a base that does not have it: the manifest is not valid",
                tensor=tensor.name,
            )
        base = self._base.manifest.by_name[tensor.name]
        if base.shape != tensor.shape or base.dtype != tensor.dtype:
            raise FormatError(
                f"tensor {tensor.name!r} and its base differ in shape or dtype: the manifest is not valid",
                tensor=tensor.name,
            )
        return base


def _place(chunk: ChunkRead, want: Want, buffer: Bytes) -> Bytes | None:
    """The place of a whole chunk in the want's buffer, as (rows, bytes of a row); None if parts of it go to several places."""
    place = chunk.whole
    return rows(buffer, want.shape, want.tensor.kind.itemsize, place) if place is not None else None


def whole_want(tensor: Tensor) -> Want:
    """The want of a whole tensor."""
    return Want.of(tensor, full(tensor.shape))
