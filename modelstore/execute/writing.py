"""Runs write plans: read, digest, encode, pack and upload, in parallel and within a byte budget."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from blake3 import blake3

from modelstore.codecs.base import Codec
from modelstore.execute.memory import huge
from modelstore.execute.reading import Limits
from modelstore.format import grid
from modelstore.format.buffers import Buffer, Bytes, as_bytes, view
from modelstore.format.dtypes import DTYPES
from modelstore.format.manifest import CodecSpec, Plane, Tensor
from modelstore.format.region import Region, extent, shift, slices
from modelstore.plan.write import Part, Step, TensorPlan, plan_steps
from modelstore.storage.base import Storage
from modelstore.store import packs
from modelstore.store.packs import PackBuilder, TensorNote

Location = tuple[str, int, int]  # pack digest, offset, length
_ALIGN = 64
ReadRegion = Callable[[Region, Bytes], None]
Placed = tuple[bytes, Location]  # a stored chunk's digest, and where it lies


@dataclass(frozen=True, slots=True)
class Input:
    """A tensor to write: its plan, its codec, how its bytes are read, and how its base's are (where the codec needs one)."""

    plan: TensorPlan
    codec: Codec
    read: ReadRegion
    base: Callable[[Region], Bytes] | None = None


@dataclass(frozen=True, slots=True)
class Written:
    """A tensor that is stored: its digest, and each plane's chunks as (digest, location)."""

    digest: str
    planes: Mapping[str, Sequence[tuple[bytes, Location]]]


@dataclass(slots=True)
class Tally:
    """What was done: bytes of packs newly written, of chunks found already stored, and the raw bytes."""

    stored: int = 0
    reused: int = 0
    raw: int = 0


@dataclass(slots=True)
class _Progress:
    """A tensor on its way: its running digest, and its chunks so far."""

    hasher: blake3
    planes: dict[str, list[tuple[bytes, Location | None]]]
    left: int
    waiting: int = 0  # chunks in packs that are not stored yet


@dataclass(frozen=True, slots=True)
class _Encoded:
    part: Part
    raw: Bytes | None
    chunks: tuple[tuple[int, tuple[tuple[bytes, Buffer], ...]], ...]


@dataclass
class PackWriter:
    """Encodes inputs into packs. `known` are chunks that lie in the store already, by digest."""

    storage: Storage
    limits: Limits
    known: dict[bytes, Location]
    refresh_before: float
    progress: Callable[[int], None] | None = None
    finished: Callable[[dict[str, Written], Sequence[Placed]], None] | None = None
    tally: Tally = field(default_factory=Tally)

    def __post_init__(self) -> None:
        # A pack is held whole, twice while one is uploaded and the next filled; steps take the rest.
        self._pack_bytes = min(packs.PACK_BYTES, self.limits.memory // 6)
        self._slab_limit = self.limits.memory // 16

    def write(self, inputs: Sequence[Input]) -> dict[str, Written]:
        """Store all inputs, in order; what became of each, by name.

        `finished` hears, as packs are stored, of tensors whose every chunk is, and of the pack's chunks of other tensors.
        """
        state = _State(self, inputs)
        threads = self.limits.threads or max(2, os.cpu_count() or 1)
        steps = plan_steps(((i, item.plan) for i, item in enumerate(inputs)), self._slab_limit)
        with (
            ThreadPoolExecutor(threads, thread_name_prefix="modelstore-encode") as encoders,
            ThreadPoolExecutor(1, thread_name_prefix="modelstore-upload") as uploader,
        ):
            encoding: deque[Future[list[_Encoded]]] = deque()
            try:
                room = _Room(2 * threads, self.limits.memory // 3)
                for encoded in _ordered(steps, lambda step: encoders.submit(_encode, step, inputs), encoding, room):
                    for item in encoded:
                        state.take(item)
                        if state.builder.size >= self._pack_bytes:
                            state.upload(uploader)
                    if self.progress:
                        self.progress(sum(e.part.nbytes for e in encoded if e.raw is not None))
                state.upload(uploader)
                state.settle()
            except BaseException:
                for future in encoding:
                    future.cancel()
                raise
        return state.written()


class _State:
    """The pack being filled, and the tensors on their way; used by one thread."""

    def __init__(self, writer: PackWriter, inputs: Sequence[Input]) -> None:
        self._writer = writer
        self._inputs = inputs
        self.builder = PackBuilder()
        self._tensors: dict[int, _Progress] = {}
        self._placed: list[tuple[int, str, int, bytes]] = []  # tensor, plane, chunk: in the pack being filled
        self._offsets: list[tuple[int, int]] = []
        self._filling: dict[bytes, tuple[int, str, int]] = {}  # digests in packs not stored yet → their first place
        self._twins: list[tuple[int, str, int, bytes]] = []  # the same chunk again, before its pack was stored
        self._uploading: (
            tuple[Future[str], list[tuple[int, str, int, bytes]], list[tuple[int, int]], PackBuilder] | None
        ) = None
        self._done: dict[str, Written] = {}
        for index, item in enumerate(inputs):
            names = item.codec.planes(DTYPES[item.plan.dtype])
            n = grid.count(item.plan.shape, item.plan.chunk)
            empty: list[tuple[bytes, Location | None]] = [(b"", None)] * n
            self._tensors[index] = _Progress(blake3(), {name: list(empty) for name in names}, n * len(names))

    def take(self, encoded: _Encoded) -> None:
        """Digest a part's raw bytes and place its chunks, in order."""
        index = encoded.part.tensor
        tensor, plan = self._tensors[index], self._inputs[index].plan
        if encoded.raw is not None:
            tensor.hasher.update(view(encoded.raw))
            self._writer.tally.raw += len(encoded.raw)
        for chunk, planes in encoded.chunks:
            for name, (digest, data) in zip(tensor.planes, planes, strict=True):
                at = self._writer.known.get(digest)
                tensor.left -= 1
                tensor.planes[name][chunk] = (digest, at)
                if at is not None:
                    self._writer.tally.reused += at[2]
                    continue
                tensor.waiting += 1
                if digest in self._filling:
                    self._twins.append((index, name, chunk, digest))
                    continue
                self._filling[digest] = (index, name, chunk)
                self.builder.notes.setdefault(plan.name, TensorNote(plan.dtype, plan.shape, plan.chunk, plan.codec))
                start = self.builder.add(f"{plan.name}/{name}/{chunk}", data)
                self._placed.append((index, name, chunk, digest))
                self._offsets.append((start, len(as_bytes(data))))

    def upload(self, uploader: ThreadPoolExecutor) -> None:
        """Store the pack that was filled, once the one before it is stored."""
        self.settle()
        if self.builder.entries:
            pack = packs.finish(self.builder, {})
            writer = self._writer

            def put() -> str:
                if packs.store(writer.storage, pack, writer.refresh_before):
                    writer.tally.stored += pack.size
                return pack.digest

            starts = [(pack.data_start + start, n) for start, n in self._offsets]
            self._uploading = uploader.submit(put), self._placed, starts, self.builder
            self.builder, self._placed, self._offsets = PackBuilder(), [], []

    def settle(self) -> None:
        """Wait for the pack on its way; then its chunks have a location, and tensors may be finished."""
        stored: list[tuple[int, Placed]] = []
        if self._uploading is not None:
            future, placed, offsets, _ = self._uploading
            digest = future.result()
            self._uploading = None
            for (index, plane, chunk, content), (start, n) in zip(placed, offsets, strict=True):
                self._writer.known[content] = (digest, start, n)
                self._filling.pop(content, None)
                self._tensors[index].planes[plane][chunk] = (content, (digest, start, n))
                self._tensors[index].waiting -= 1
                stored.append((index, (content, (digest, start, n))))
            again, self._twins = self._twins, []
            for index, plane, chunk, content in again:
                at = self._writer.known.get(content)
                if at is None:
                    self._twins.append((index, plane, chunk, content))
                    continue
                self._tensors[index].planes[plane][chunk] = (content, at)
                self._tensors[index].waiting -= 1
        self._finish(stored)

    def _finish(self, stored: Sequence[tuple[int, Placed]]) -> None:
        fresh: dict[str, Written] = {}
        for index in [i for i, t in self._tensors.items() if not t.left and not t.waiting]:
            tensor = self._tensors.pop(index)
            planes = {name: [(d, at) for d, at in rows if at is not None] for name, rows in tensor.planes.items()}
            fresh[self._inputs[index].plan.name] = Written(tensor.hasher.hexdigest(), planes)
        self._done.update(fresh)
        partial = [placed for index, placed in stored if index in self._tensors]
        if (fresh or partial) and self._writer.finished:
            self._writer.finished(fresh, partial)

    def written(self) -> dict[str, Written]:
        """All tensors; to be called when everything is stored."""
        assert not self._tensors, "a tensor was not finished"
        return self._done


def _encode(step: Step, inputs: Sequence[Input]) -> list[_Encoded]:
    """Read and encode one step's parts; runs in a worker."""
    buffer = huge(step.nbytes + _ALIGN * len(step.parts))
    encoded = []
    at = 0
    for part in step.parts:
        encoded.append(_encode_part(part, inputs[part.tensor], buffer[at : at + part.nbytes]))
        at += -(-part.nbytes // _ALIGN) * _ALIGN  # the codecs look at the bytes as words
    return encoded


def _encode_part(part: Part, item: Input, raw: Bytes) -> _Encoded:
    plan = item.plan
    codec = item.codec
    kind = DTYPES[plan.dtype]
    item.read(part.region, raw)
    box = raw.view(f"V{kind.itemsize}").reshape(extent(part.region)) if part.chunks else None
    chunks = []
    for chunk in part.chunks:
        assert box is not None
        region = grid.chunk_region(plan.shape, plan.chunk, chunk)
        values = np.ascontiguousarray(box[slices(shift(region, part.region))]).reshape(-1).view(np.uint8)
        base = item.base(region) if item.base is not None and codec.needs_base else None
        planes = codec.encode(values, extent(region), kind, base)
        chunks.append((chunk, tuple((blake3(view(as_bytes(plane))).digest(), plane) for plane in planes)))
    return _Encoded(part, raw if part.hashed else None, tuple(chunks))


@dataclass(frozen=True, slots=True)
class _Room:
    """How many steps may be under way, and the memory for them."""

    steps: int
    memory: int


def _ordered(
    steps: Iterable[Step],
    submit: Callable[[Step], Future[list[_Encoded]]],
    queue: deque[Future[list[_Encoded]]],
    room: _Room,
) -> Iterator[list[_Encoded]]:
    """Results in the order of the steps; as many under way as there is room for, and always one."""
    costs: deque[int] = deque()
    for step in steps:
        cost = 3 * step.nbytes  # its raw bytes, the encoded ones, and the copies of chunks
        while queue and (len(queue) >= room.steps or sum(costs) + cost > room.memory):
            costs.popleft()
            yield queue.popleft().result()
        queue.append(submit(step))
        costs.append(cost)
    while queue:
        yield queue.popleft().result()


def manifest_tensors(
    inputs: Sequence[Input],
    written: Mapping[str, Written],
    codecs: list[CodecSpec],
    packs_at: dict[str, int],
    rows: list[tuple[int, int, int, bytes]],
) -> tuple[Tensor, ...]:
    """The manifest's entries of the inputs; their codecs, packs and rows of the chunk table are added to those given."""
    tensors = []
    for item in inputs:
        plan, done = item.plan, written[item.plan.name]
        if plan.codec not in codecs:
            codecs.append(plan.codec)
        planes = []
        for name, chunks in done.planes.items():
            planes.append(Plane(name, len(rows)))
            for digest, (pack, start, n) in chunks:
                rows.append((packs_at.setdefault(pack, len(packs_at)), start, n, digest))
        tensors.append(
            Tensor(plan.name, plan.dtype, plan.shape, plan.chunk, codecs.index(plan.codec), done.digest, tuple(planes))
        )
    return tuple(tensors)
