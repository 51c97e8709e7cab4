"""Runs read plans: fetch, check, decode into place, tensor by tensor as they become ready."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modelstore.codecs.base import Codec
from modelstore.codecs.registry import codec as make_codec
from modelstore.errors import FormatError
from modelstore.execute.fetch import Fetcher
from modelstore.execute.memory import Arena
from modelstore.format.buffers import Bytes
from modelstore.format.manifest import Manifest, Tensor
from modelstore.format.region import Region, extent, full, rows, size, slices
from modelstore.plan.layout import Share
from modelstore.plan.read import ChunkRead, ReadJob, Want, plan_read, read_job

_PER_THREAD = 24 << 20  # working memory of one reading thread: encoded bytes, a decoded plane, a chunk for cut copies
_REMOTE_THREADS = 16

Allocate = Callable[[int, int], Bytes]  # (the want's place in the list, bytes) → a writable buffer of that many


@dataclass(frozen=True)
class Limits:
    """What a work may use: bytes of working memory, and threads (None: as many as pay)."""

    memory: int
    threads: int | None = None

    def reading_threads(self, local: bool) -> int:
        """CPU-bound on local files; where requests wait for a network, more of them are in flight."""
        asked = self.threads or (os.cpu_count() or 1 if local else max(_REMOTE_THREADS, os.cpu_count() or 1))
        return max(1, min(asked, self.memory // _PER_THREAD))


class Reader:
    """Reads one manifest's tensors."""

    def __init__(self, fetcher: Fetcher, base: Reader | None) -> None:
        self._fetcher = fetcher
        self._base = base
        try:
            self._codecs: list[Codec] = [make_codec(spec.name, spec.params) for spec in self.manifest.codecs]
        except (TypeError, ValueError) as error:
            raise FormatError(
                f"the manifest of model {fetcher.model!r} is not valid ({str(error)[:200]}): restore it",
                model=fetcher.model,
            ) from None
        self._local = fetcher.storage.path("x") is not None

    @property
    def manifest(self) -> Manifest:
        return self._fetcher.manifest

    def region(self, tensor: Tensor, region: Region) -> Bytes:
        """The raw bytes of one region, read and decoded in this thread."""
        out = np.empty(size(region) * tensor.kind.itemsize, np.uint8)
        self.read_into(tensor, region, out)
        return out

    def read_into(self, tensor: Tensor, region: Region, out: Bytes) -> None:
        """The same, into a buffer of exactly that many bytes."""
        wants = [Want(tensor, Share(tuple((pair,) for pair in region)))]
        for job in plan_read(self.manifest, wants):
            self._run(job, wants, {0: out})

    def stream(
        self,
        wants: list[Want],
        limits: Limits,
        *,
        allocate: Allocate | None = None,
        bounded: bool = True,
        progress: Callable[[int], None] | None = None,
    ) -> Iterator[tuple[int, Bytes]]:
        """Each want's place in the list and its raw bytes, as they become ready.

        Reads run in the order of the wants. With `bounded`, buffers not yet taken count against the memory, and one
        tensor above it is let through alone; without, all are the caller's.
        """
        arena = Arena()
        allocate = allocate or (lambda _, nbytes: arena.allocate(nbytes))
        threads = limits.reading_threads(self._local)
        buffers: dict[int, Bytes] = {}
        left: dict[int, int] = {}  # chunks not finished, of the wants begun
        last = -1  # the highest want of which a chunk was submitted; those below it have no more to come
        held = 0
        pending: dict[Future[None], ReadJob] = {}

        def begin(index: int) -> None:
            nonlocal held
            nbytes = math.prod(wants[index].shape) * wants[index].tensor.kind.itemsize
            buffers[index] = allocate(index, nbytes)
            left[index] = 0
            held += nbytes

        pool = ThreadPoolExecutor(threads, thread_name_prefix="modelstore-read")
        try:
            jobs = plan_read(self.manifest, wants)
            job = next(jobs, None)
            ended = False
            while True:
                while job is not None and len(pending) < 2 * threads:
                    fresh = {c.want for c in job.chunks} - buffers.keys()
                    cost = sum(math.prod(wants[i].shape) * wants[i].tensor.kind.itemsize for i in fresh)
                    busy = pending or any(n == 0 and i < last for i, n in left.items())  # else waiting would never end
                    if bounded and fresh and busy and held + cost > limits.memory // 2:
                        break
                    upto = job.chunks[-1].want
                    for index in range(last + 1, upto + 1):
                        begin(index)
                    last = max(last, upto)
                    for chunk in job.chunks:
                        left[chunk.want] += 1
                    pending[pool.submit(self._run, job, wants, buffers)] = job
                    job = next(jobs, None)
                if job is None and not ended:
                    ended = True
                    for index in range(last + 1, len(wants)):
                        begin(index)
                    last = len(wants)
                ready = [i for i, n in left.items() if n == 0 and i < last]
                for index in ready:
                    del left[index]
                    buffer = buffers.pop(index)
                    nbytes = len(buffer)
                    yield index, buffer
                    del buffer
                    held -= nbytes
                if ready:
                    continue
                if not pending:
                    assert not left, "a tensor was not finished"
                    return
                done, _ = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    finished = pending.pop(future)
                    future.result()
                    for chunk in finished.chunks:
                        left[chunk.want] -= 1
                    if progress:
                        progress(finished.nbytes)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _run(self, job: ReadJob, wants: Sequence[Want], buffers: dict[int, Bytes]) -> None:
        """Fetch, check and decode one job's chunks into their buffers."""
        chunks = job.chunks
        if self._local:
            rest = tuple(c for c in chunks if not self._direct(c, wants, buffers))
            if not rest:
                return
            job = job if len(rest) == len(chunks) else read_job(self.manifest, rest, job.nbytes)
        found = self._fetcher.ranges(job, wants)
        for chunk in job.chunks:
            self._decode(chunk, [found[row] for row in chunk.rows], wants[chunk.want], buffers[chunk.want])

    def _direct(self, chunk: ChunkRead, wants: Sequence[Want], buffers: dict[int, Bytes]) -> bool:
        """Read a raw chunk straight into its place, where it is one run there; whether that was so."""
        want = wants[chunk.want]
        tensor = want.tensor
        place = chunk.whole
        if place is None or self._codecs[tensor.codec].name != "raw" or len(chunk.rows) != 1:
            return False
        out = rows(buffers[chunk.want], want.shape, tensor.kind.itemsize, place)
        if out is None or out.shape[0] != 1 or out.size != self.manifest.length[chunk.rows[0]]:
            return False
        self._fetcher.direct(chunk.rows[0], out[0], tensor.name, chunk.chunk)
        return True

    def _decode(self, chunk: ChunkRead, planes: list[Bytes], want: Want, buffer: Bytes) -> None:
        tensor = want.tensor
        codec = self._codecs[tensor.codec]
        shape = extent(chunk.region)
        base = self._base_region(tensor, chunk.region) if codec.needs_base else None
        place = chunk.whole
        out = rows(buffer, want.shape, tensor.kind.itemsize, place) if place is not None else None
        try:
            if out is not None:
                codec.decode(planes, shape, tensor.kind, out, base)
                return
            values = np.empty((1, size(chunk.region) * tensor.kind.itemsize), np.uint8)
            codec.decode(planes, shape, tensor.kind, values, base)
        except FormatError as error:
            raise FormatError(
                f"chunk {chunk.chunk} of tensor {tensor.name!r} cannot be decoded: {error}",
                tensor=tensor.name,
                chunk=chunk.chunk,
            ) from None
        box = _elements(values.reshape(-1), shape, tensor)
        whole = _elements(buffer, want.shape, tensor)
        for target in chunk.targets:
            whole[slices(target.place)] = box[slices(target.source)]

    def _base_region(self, tensor: Tensor, region: Region) -> Bytes:
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
        return self._base.region(base, region)


def whole_want(tensor: Tensor) -> Want:
    """The want of a whole tensor."""
    return Want(tensor, Share(tuple((pair,) for pair in full(tensor.shape))))


def _elements(buffer: Bytes, shape: Sequence[int], tensor: Tensor) -> NDArray[np.void]:
    """Raw bytes as an n-d array of opaque elements."""
    return buffer.view(f"V{tensor.kind.itemsize}").reshape(shape)
